"""WikiText-2 or WikiText-103 (Merity et al. 2017), words, from three files that the user supplies."""

from ban_jax.data import reading, text, text_files
from ban_jax.types import Dataset

FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}
WORDS = reading.Reading("words", eos=True)  # the files have <unk> already


def load(*, dir: str, options: text.Options) -> Dataset:
  """Returns WikiText: of WikiText-2 2,088,628, 217,646 and 245,569 tokens of 33,278 words, `<eos>` at each line's end.

  Reads the three files in the directory `dir`; which of the two sets they hold, they tell. Raises ConfigError if no
  directory is named or the options do not fit the text, and DataError for a file that is missing, without a word, not
  UTF-8 or unreadable, and for a word that is not in the training file.
  """
  paths = text_files.find("wikitext", dir, FILES, "WikiText-2 or WikiText-103, words")
  parts = {
    split: text_files.decoded(f"wikitext: {path}", text_files.read("wikitext", path)) for split, path in paths.items()
  }
  return reading.build("wikitext", parts, WORDS, options=options)

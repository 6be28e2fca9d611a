"""The Penn Treebank in Mikolov's split (Table 6), from three files that the user supplies."""

import functools
import logging
import pathlib

from ban_jax.data import reading, text, text_files
from ban_jax.data.tokens import EOS, UNKNOWN
from ban_jax.errors import DataError
from ban_jax.types import Dataset

logger = logging.getLogger(__name__)

FILES = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}
# Tokens of each split with <eos>, words of the vocabulary, and the characters that these are written in: those of the
# files that the paper's numbers belong to.
SIZES = {"train": 929_589, "validation": 73_760, "test": 82_430}
WORDS, CHARACTERS = 10_000, 46


def load(*, dir: str, options: text.Options) -> Dataset:
  """Returns the Penn Treebank: 929,589, 73,760 and 82,430 tokens of 10,000 words.

  Reads the three files in the directory `dir`: words between white space, with `<eos>` at each line's end, whichever
  system's line ends they are. The vocabulary is that of the training file. Raises ConfigError if no directory is named
  or the options do not fit the text, and DataError, naming file and line, for a file that is missing, blank, not UTF-8
  or unreadable, for a word that is not in the vocabulary, and for an `<eos>` that is there already.
  """
  paths = text_files.find("ptb", dir, FILES, "the Penn Treebank in Mikolov's split")
  lines = {split: _read_lines(path) for split, path in paths.items()}
  known = {EOS, *(word for line in lines["train"] for word in line)}
  for split, path in paths.items():
    for number, line in enumerate(lines[split], 1):
      for word in line:
        if word not in known:
          raise DataError(
            f"ptb: {path}, line {number}: {word!r} is not in the vocabulary, the {len(known)} words of {FILES['train']}"
          )
  sizes = {split: text.count_tokens(part) for split, part in lines.items()}
  if sizes != SIZES:
    logger.warning(
      "ptb: %s holds %s tokens, not the %s of Mikolov's split: results are not the paper's", dir, sizes, SIZES
    )
  return reading.build("ptb", lines, reading.Reading("words", eos=True), options=options)


def describe(options: text.Options) -> Dataset:
  """Returns the Penn Treebank as shapes, without its files; raises ConfigError for options that do not fit it.

  The vocabulary is `made_up_words()`.
  """
  return text.describe("ptb", tokens=SIZES, words=made_up_words(), options=options)


@functools.cache
def made_up_words() -> tuple[str, ...]:
  """Returns 10,000 words written in 46 characters: all that the shapes of a language model depend on."""
  characters = [chr(ord("0") + number) for number in range(CHARACTERS)]
  words = (EOS, UNKNOWN, *characters)
  return words + tuple(characters[0] * 2 + str(number) for number in range(WORDS - len(words)))


def _read_lines(path: pathlib.Path) -> text.Lines:
  """Returns the words of each line of a file; raises DataError with the file's name and, if known, the line."""
  content = text_files.read("ptb", path)
  lines = text.lines_of(f"ptb: {path}", text_files.decoded(f"ptb: {path}", content))
  if not any(lines):
    raise DataError(f"ptb: {path}: expected text, but there is no word in the file's {len(content)} bytes")
  return lines

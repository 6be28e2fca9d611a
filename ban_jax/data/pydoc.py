"""The Python manual's topics, which come with CPython: a small text data set that needs no download."""

import collections
import re
from collections.abc import Mapping
from typing import NamedTuple

from ban_jax.data import reading, text
from ban_jax.data.tokens import UNKNOWN
from ban_jax.errors import DataError
from ban_jax.types import Dataset

# The topics are ordered by size; of every ten, those at these two ranks are held out: about a tenth of the words each.
HELD_OUT = {4: "validation", 5: "test"}
RAREST = 3  # how often a word must occur in train to be in the vocabulary
MARKUP = str.maketrans({"‘": "'", "’": "'"} | dict.fromkeys('“”"*`'))  # two quotes made one, the others deleted
UNDERLINE = re.compile(r"^\s*([*=\-~^+])\1{2,}\s*$", re.MULTILINE)
WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


class Options(NamedTuple):
  """The keys of a configuration's `data` group that it takes."""

  train_examples: int  # tokens to train on, from the beginning of the text; 0: all
  window: int  # tokens of a window, at least 1
  tokens: str = "words"  # one of reading.UNITS


def load(options: Options) -> Dataset:
  """Returns the manual's topics: about 70,000, 9,000 and 7,000 tokens of 1,500 words.

  Characters and bytes, about five times as many, are those of the same words with spaces between them, a paragraph a
  line.

  For tests and demonstrations only: it is small, it differs between versions of Python (the digest distinguishes
  them), and its numbers compare with nothing published.

  Whole topics go into train, validation or test by their rank in size, after repeated paragraphs are dropped. Words
  that occur in train fewer than three times are `<unk>`, in all splits; a paragraph ends in `<eos>`. Raises ConfigError
  if the options do not fit the text, and DataError if this Python comes without its manual.
  """
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise DataError("pydoc: this Python comes without its manual (module pydoc_data.topics)") from error
  lines = {split: [line for part in parts.values() for line in part] for split, parts in split_topics(topics).items()}
  read = text.Options(options.train_examples, options.window)
  if options.tokens != "words":
    parts = {split: "".join(f"{' '.join(line)}\n" for line in part) for split, part in lines.items()}
    if options.tokens == "characters":
      return reading.build("pydoc", parts, reading.Reading("characters", unknown=True), options=read)
    content = {split: part.encode() for split, part in parts.items()}
    return reading.build("pydoc", content, reading.Reading("bytes"), options=read)
  counts = collections.Counter(word for line in lines["train"] for word in line)
  lines = {
    split: [[word if counts[word] >= RAREST else UNKNOWN for word in line] for line in part]
    for split, part in lines.items()
  }
  return reading.build("pydoc", lines, reading.Reading("words", eos=True), options=read)


def split_topics(topics: Mapping[str, str]) -> dict[str, dict[str, text.Lines]]:
  """Returns split -> topic -> the words of its paragraphs, no paragraph twice, whatever the topics' order."""
  seen: set[tuple[str, ...]] = set()
  kept: dict[str, text.Lines] = {}
  for topic in sorted(topics):
    kept[topic] = []
    for words in paragraphs(topics[topic]):
      if tuple(words) not in seen:
        seen.add(tuple(words))
        kept[topic].append(words)
  splits: dict[str, dict[str, text.Lines]] = {"train": {}, "validation": {}, "test": {}}
  for rank, topic in enumerate(sorted(kept, key=lambda topic: (-text.count_tokens(kept[topic]), topic))):
    splits[HELD_OUT.get(rank % 10, "train")][topic] = kept[topic]
  return splits


def paragraphs(topic: str) -> text.Lines:
  """Returns the words and punctuation marks of each paragraph, in lower case and without markup."""
  parts = re.split(r"\n\s*\n", UNDERLINE.sub("", topic).lower().translate(MARKUP))
  return [words for words in map(WORD.findall, parts) if words]

"""Texts that are read by one unit, with a vocabulary of the training text: from a caller, or from files."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from ban_jax.data import text, tokens
from ban_jax.data.tokens import EOS, UNKNOWN
from ban_jax.errors import ConfigError, DataError
from ban_jax.types import Dataset, InputSpec

UNITS = ("words", "characters", "bytes")
Content = str | text.Lines | bytes | np.ndarray  # a text, the words of its lines, its bytes, or its tokens


class Reading(NamedTuple):
  """How text is read: by which unit, with which symbols, and how many tokens at most."""

  unit: str  # one of UNITS, or "tokens" of `own`
  most: int = 0  # tokens of the vocabulary, the most frequent ones; 0: all of the training text
  eos: bool = False  # whether each line of words ends in <eos>
  unknown: bool = False  # whether what is not in the vocabulary becomes <unk>; else it is an error
  own: tokens.Tokenizer | None = None

  @property
  def symbols(self) -> set[str]:
    """What is in the vocabulary whether or not the text has it."""
    found = {"\n"} if self.unit == "characters" else set()
    return found | ({EOS} if self.eos else set()) | ({UNKNOWN} if self.unknown else set())


def build(name: str, parts: Mapping[str, Content], how: Reading, *, options: text.Options) -> Dataset:
  """Returns the Dataset of the splits' texts: str of words and characters, bytes, or whole numbers [N].

  With `how.eos` also the words of each line. A tokenizer reads str; its tokens may also be given. Raises a DataError
  for a text without a token and for what the vocabulary or tokenizer does not know, and a ConfigError for options that
  do not fit the text.
  """
  if how.unit in ("words", "characters"):
    streams, words = _by_vocabulary(name, parts, how)
  else:
    streams = {split: _numbers(f"{name}, {split}", part, how) for split, part in parts.items()}
    words = tokens.BYTES if how.unit == "bytes" else ()
  for split, stream in streams.items():
    if not len(stream):
      raise DataError(f"{name}, {split}: expected text, but there is no token in it")
  largest = max(int(stream.max()) for stream in streams.values())
  spec = InputSpec("tokens", (options.window,), len(words) or how.most or largest + 1, words, how.unit)
  first = np.array([tokens.start(spec)], np.int32)
  written = {split: counts for split, part in parts.items() if (counts := _written(part))}
  streams = {split: np.concatenate([first, stream]) for split, stream in streams.items()}
  return text.of_streams(name, streams, spec, options=options, written=written)


def _by_vocabulary(
  name: str, parts: Mapping[str, Content], how: Reading
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Returns the tokens of each split, and the vocabulary: the most frequent first, equally frequent ones in order."""
  units = {split: _units(f"{name}, {split}", part, how) for split, part in parts.items()}
  counts, symbols = collections.Counter(units["train"]), how.symbols
  kept = sorted(counts.keys() - symbols, key=lambda unit: (-counts[unit], unit))
  if how.most:
    if how.most <= len(symbols):
      raise ConfigError(f"vocabulary={how.most}: expected more than the {len(symbols)} symbols that are in it anyway")
    kept, left = kept[: how.most - len(symbols)], kept[how.most - len(symbols) :]
    counts[UNKNOWN] += sum(counts[unit] for unit in left)
  words = tuple(sorted({*symbols, *kept}, key=lambda unit: (-counts[unit], unit)))
  known = tokens.numbers(words)
  unknown, streams = known.get(UNKNOWN, -1) if how.unknown else -1, {}
  for split, own in units.items():
    found = np.fromiter((known.get(unit, unknown) for unit in own), np.int32, len(own))
    if (missing := np.flatnonzero(found < 0)).size:
      raise DataError(
        f"{name}, {split}: {own[missing[0]]!r} is not in the vocabulary, the {len(words):,} {how.unit} of the training "
        "text"
      )
    streams[split] = found
  return streams, words


def _units(what: str, part: Content, how: Reading) -> Sequence[str]:
  """Returns a text's characters, or words."""
  assert isinstance(part, str | list), "what words and characters are read from"
  if isinstance(part, str) and not how.eos:
    return part if how.unit == "characters" else part.split()
  lines = text.lines_of(what, part) if isinstance(part, str) else part
  return [word for line in lines for word in (*line, EOS)] if any(lines) else []


def _numbers(what: str, part: Content, how: Reading) -> Int32[np.ndarray, " N"]:
  """Returns a text's bytes, or what a tokenizer makes of it; tokens as they are."""
  if isinstance(part, bytes):
    return np.frombuffer(part, np.uint8).astype(np.int32)
  assert not isinstance(part, list), "words, which have a vocabulary"
  found = tokens.encoded(what, tokens.tokenizer(how.own), part) if isinstance(part, str) else part
  return tokens.checked(what, found, how.most or None)


def _written(part: Content) -> dict[str, int]:
  """Returns the bytes and characters that a text is written in, as far as they are known."""
  if isinstance(part, str):
    return {"byte": len(part.encode()), "character": len(part)}
  if isinstance(part, list | np.ndarray):
    return {}
  try:
    return {"byte": len(part), "character": len(part.decode())}
  except UnicodeDecodeError:
    return {"byte": len(part)}

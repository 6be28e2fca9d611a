"""How text becomes tokens, and tokens text: words, characters, bytes, or what a tokenizer of one's own makes of it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from ban_jax.data.arrays import as_array
from ban_jax.errors import ConfigError, DataError, choices
from ban_jax.types import InputSpec

EOS, UNKNOWN = "<eos>", "<unk>"
BYTES = tuple(map(chr, range(256)))  # the vocabulary of bytes


class Tokenizer(NamedTuple):
  """A caller's own way from text to tokens and back."""

  encode: Callable[[str], Sequence[int]]
  decode: Callable[[Sequence[int]], str]


def tokenizer(given: Any) -> Tokenizer:
  """Returns the Tokenizer of a pair (encode, decode); None stands for tokens that are written as their numbers."""
  if given is None:
    return Tokenizer(lambda text: [int(word) for word in text.split()], lambda ids: " ".join(map(str, ids)))
  if not (isinstance(given, Sequence) and len(given) == 2 and all(map(callable, given))):
    raise ConfigError(f"a tokenizer is a pair of functions (encode, decode), not {type(given).__name__}")
  return Tokenizer(*given)


def encode(spec: InputSpec, text: str, own: Any = None) -> list[int]:
  """Returns the tokens of a text; `own` is the pair (encode, decode) for networks that read a tokenizer's tokens.

  What is not in the vocabulary is `<unk>`. Raises a DataError where the vocabulary has none, for tokens out of range
  and for what is no text.
  """
  if not isinstance(text, str):
    raise DataError(f"a text must be a string of {spec.unit}, not {type(text).__name__}")
  text = text.removeprefix("\ufeff")  # the mark that some editors put first
  if spec.unit == "bytes":
    return list(text.encode())
  if spec.unit == "tokens":
    return checked("the text", encoded("the text", tokenizer(own), text), spec.num_classes).tolist()
  known, units = numbers(spec.words), text.split() if spec.unit == "words" else list(text)
  missing = [unit for unit in units if unit not in known]
  if missing and UNKNOWN not in known:
    raise DataError(f"the {spec.unit} {choices(set(missing))} are not in the vocabulary, which has no {UNKNOWN}")
  return [known[unit if unit in known else UNKNOWN] for unit in units]


def decode(spec: InputSpec, ids: Sequence[int], own: Any = None) -> str:
  """Returns the text of tokens; bytes that are no UTF-8 become replacement characters."""
  if spec.unit == "bytes":
    return bytes(ids).decode(errors="replace")
  if spec.unit == "tokens":
    return tokenizer(own).decode(ids)
  return (" " if spec.unit == "words" else "").join(spec.words[token] for token in ids)


def start(spec: InputSpec) -> int:
  """Returns the token that a text is read after: `<eos>`, or the end of a line, or token 0."""
  known = numbers(spec.words)
  return known.get(EOS, known.get("\n", 0))


def encoded(what: str, own: Tokenizer, text: str) -> np.ndarray:
  """Returns what a tokenizer makes of a text; raises a DataError that names what it could not read."""
  try:
    return as_array(f"{what}: its tokens", own.encode(text))
  except Exception as error:  # of whatever kind the caller's function raises
    raise DataError(f"{what}: the tokenizer fails: {type(error).__name__}: {error}") from error


def checked(what: str, tokens: np.ndarray, most: int | None) -> Int32[np.ndarray, " N"]:
  """Returns tokens as int32; raises a DataError where they are no whole numbers [N] from 0, below `most` if given."""
  if tokens.ndim != 1 or tokens.size and not np.issubdtype(tokens.dtype, np.integer):
    raise DataError(f"{what}: the tokens are {tokens.dtype} {list(tokens.shape)}; expected whole numbers [N]")
  limit = most or np.iinfo(np.int32).max
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < limit:
    wrong = tokens.min() if tokens.min() < 0 else tokens.max()
    raise DataError(f"{what}: a token is {wrong}; expected 0 to {limit - 1}")
  return tokens.astype(np.int32)


@functools.lru_cache(maxsize=4)
def numbers(words: tuple[str, ...]) -> dict[str, int]:
  """Returns the token of each unit of a vocabulary."""
  return {word: number for number, word in enumerate(words)}

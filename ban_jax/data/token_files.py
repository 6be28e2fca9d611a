"""Tokens of any number, as in a file's memory map, that are read window by window."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ban_jax import devices as devices_lib
from ban_jax.data import text
from ban_jax.data.arrays import digest
from ban_jax.errors import ConfigError, DataError, check_name, check_whole
from ban_jax.types import Dataset, InputSpec, Stream

# Windows of each split that stand for all of them in the digest.
KNOWN = 64


class Windows(NamedTuple):
  """A Stream's reader of tokens, whole numbers [N]."""

  tokens: Any
  window: int
  vocabulary: int
  name: str

  def read(self, numbers: np.ndarray, places: np.ndarray, draw: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Returns "windows" int32 [n, T+1]: the token before each window, 0 before the first, and the window, padded by -1.

    Raises a DataError with the place of a token outside of the vocabulary.
    """
    del places, draw
    rows = np.full((len(numbers), self.window + 1), -1, np.int32)
    for row, number in zip(rows, numbers.tolist(), strict=True):
      first = number * self.window
      row[0] = self.tokens[first - 1] if first else 0
      found = self.tokens[first : first + self.window]
      row[1 : 1 + len(found)] = found
      if len(found) and not (found.min() >= 0 and found.max() < self.vocabulary):
        place = first + int(np.argmax((found < 0) | (found >= self.vocabulary)))
        raise DataError(f"{self.name}: token {place} is {self.tokens[place]}; expected 0 to {self.vocabulary - 1}")
    return {"windows": rows}


@devices_lib.default_modes()
def from_tokens(
  train: np.ndarray,
  test: np.ndarray,
  validation: np.ndarray | None = None,
  *,
  vocabulary: int,
  window: int = 64,
  name: str = "tokens",
) -> Dataset:
  """Returns a data set of tokens that are read as they are needed, for texts that are larger than memory.

  The bytes of a run are those of the same tokens given to `from_text`.

  Args:
    train: whole numbers [N], such as a `numpy.memmap` of a file of uint16.
    test: likewise.
    validation: likewise, or none.
    vocabulary: the number of tokens, which are from 0.
    window: tokens that are read at once, or before the gradient is cut.
    name: the data set's name, in messages and records.

  Returns:
    A Dataset.

  Raises:
    DataError: for arrays of another sort, and while training for a token outside of the vocabulary, with its place.
    ConfigError: for a value out of range.

  Examples:
    >>> import numpy as np
    >>> ban_jax.from_tokens(np.arange(900) % 7, np.arange(90) % 7, vocabulary=7, window=8).sizes["train"]
    900
  """
  check_name(name, "names the data set in messages")
  vocabulary, window = check_whole("vocabulary", vocabulary, 2), check_whole("window", window, 1)
  given = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
  for split, tokens in given.items():
    if not (isinstance(tokens, np.ndarray) and tokens.ndim == 1 and np.issubdtype(tokens.dtype, np.integer)):
      found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
      raise DataError(f"{name}, {split}: the tokens are {found}; expected an array of whole numbers [N]")
    if not len(tokens):
      raise DataError(f"{name}, {split}: it is empty; expected at least one token")
  sizes = {split: len(tokens) for split, tokens in given.items()}
  if window > sizes["train"]:
    raise ConfigError(f"window={window}: expected at most {sizes['train']}, the tokens that {name} is trained on")
  readers = {split: Windows(tokens, window, vocabulary, f"{name}, {split}") for split, tokens in given.items()}
  row = {"windows": jax.ShapeDtypeStruct((window + 1,), np.int32)}
  known = {split: reader.read(_spread(sizes[split], window), np.empty(0), ()) for split, reader in readers.items()}
  record = {split: {"tokens": sizes[split], "sample": digest({split: sample})} for split, sample in known.items()}
  counts = {"sizes": np.array([*sizes.values(), vocabulary, window])}
  return text.assemble(
    name, {split: {} for split in given}, sizes, InputSpec("tokens", (window,), vocabulary)
  )._replace(
    digest=digest({**known, "stream": counts}),
    record={"stream": record},
    streams={split: Stream(reader.read, row) for split, reader in readers.items()},
    options={"name": name, "vocabulary": vocabulary, "window": window, "stream": True},
  )


def _spread(size: int, window: int) -> np.ndarray:
  """Returns the numbers of some windows, evenly spaced."""
  return np.unique(np.linspace(0, -(-size // window) - 1, KNOWN).astype(np.int32))

"""What data sets of every kind share: the digest of their arrays, and orders in whole batches."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, PyTree

from ban_jax.errors import DataError, first_line


def digest(splits: Mapping[str, Mapping[str, np.ndarray]]) -> str:
  """Returns the SHA-256 of the splits' and arrays' names, types, shapes and bytes, whatever their order in the dict.

  Manifests and checkpoints record it: finished runs are refused if it changes.
  """
  sha = hashlib.sha256()
  for split, arrays in sorted(splits.items()):
    for key, array in sorted(arrays.items()):
      sha.update(f"{split}/{key} {array.dtype.str} {array.shape}\n".encode())
      sha.update(np.ascontiguousarray(array).data)
  return sha.hexdigest()


def as_array(what: str, given: Any) -> np.ndarray:
  """Returns what a caller gave as an array, without a copy if it is one; raises a DataError where it cannot be."""
  if isinstance(given, np.ma.MaskedArray) and np.ma.is_masked(given):
    raise DataError(f"{what} are masked in {np.ma.count_masked(given):,} places; expected numbers everywhere")
  try:
    return np.asarray(given)
  except Exception as error:  # whatever another library's tensor raises: on a GPU, or with a gradient
    reason = first_line(error)
    raise DataError(f"{what} cannot be one array: {reason}; expected an array, or what numpy.asarray takes") from error


def make_read_only(tree: PyTree[np.ndarray]) -> None:
  """Makes writing to any of the tree's arrays an error: all who load the same data set share them."""
  for array in jax.tree.leaves(tree):
    array.setflags(write=False)


def padded_range(count: int, batch_size: int) -> Int32[np.ndarray, " steps*batch"]:
  """Returns 0..count-1, padded with -1 to a multiple of `batch_size`."""
  order = np.full(-(-count // batch_size) * batch_size, -1, np.int32)
  order[:count] = np.arange(count)
  return order

"""What data sets of every kind share: the digest of their arrays, and orders in whole batches."""

import hashlib
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Int32, PyTree


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


def make_read_only(tree: PyTree[np.ndarray]) -> None:
  """Makes writing to any of the tree's arrays an error: all who load the same data set share them."""
  for array in jax.tree.leaves(tree):
    array.setflags(write=False)


def padded_range(count: int, batch_size: int) -> Int32[np.ndarray, " steps*batch"]:
  """Returns 0..count-1, padded with -1 to a multiple of `batch_size`."""
  order = np.full(-(-count // batch_size) * batch_size, -1, np.int32)
  order[:count] = np.arange(count)
  return order

"""Variables trees on the host: their leaves by path, digests, the lineage, and whether a tree fits a model."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
from jaxtyping import Float64, PyTree

from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.types import Generation, Model, Variables

Member = Generation | Variables


def thawed(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a tree of mappings as a tree of plain dicts."""
  return flax.core.unfreeze(tree if isinstance(tree, flax.core.FrozenDict) else dict(tree))


def leaves(tree: PyTree) -> dict[str, np.ndarray]:
  """Returns the tree's leaves by their path, as "params/stem/kernel"."""
  flat, _ = jax.tree_util.tree_flatten_with_path(thawed(tree) if isinstance(tree, Mapping) else tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def digest(tree: PyTree) -> str:
  """Returns the SHA-256 of the leaves' paths, dtypes, shapes and bytes, without the lineage."""
  total = hashlib.sha256()
  for path, leaf in sorted(leaves(tree).items()):
    if path.startswith("lineage/"):
      continue
    leaf = np.ascontiguousarray(leaf)
    total.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
    total.update(leaf.view(np.uint8).data if leaf.size else b"")
  return total.hexdigest()


def json_digest(value: Any) -> str:
  """Returns the SHA-256 of a value's JSON, keys in sorted order."""
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def standard(value: Any) -> Any:
  """Returns a copy of a value as standard JSON can hold it.

  Standard JSON has no number that is not finite: such a number becomes "NaN", "Infinity" or "-Infinity", as in JSON
  made by Protocol Buffers. `storage.numbers` reads them back.
  """
  if isinstance(value, Mapping):
    return {key: standard(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [standard(part) for part in value]
  return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def structure(tree: PyTree) -> str:
  """Returns the digest of the leaves' paths, dtypes and shapes: what a program must share with a tree to read it."""
  lines = (f"{path} {np.asarray(leaf).dtype} {np.shape(leaf)}\n" for path, leaf in sorted(leaves(tree).items()))
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def to_host(variables: Mapping[str, Any], generation: int) -> Variables:
  """Returns the variables as a FrozenDict of read-only NumPy arrays that carries the generation's number."""

  def read_only(leaf: Any) -> np.ndarray:
    leaf = np.array(leaf)
    leaf.flags.writeable = False
    return leaf

  tree = {**thawed(variables), "lineage": {"generation": np.int32(generation)}}
  return flax.core.freeze(jax.tree.map(read_only, tree))


def to_plain(variables: Variables) -> dict[str, Any]:
  """Returns the variables as the plain dicts that steps are compiled for, without the lineage."""
  return {name: tree for name, tree in thawed(variables).items() if name != "lineage"}


def lineage(variables: Variables) -> int:
  """Returns the generation that a variables tree belongs to; a tree without a lineage counts as generation 0."""
  return int(variables["lineage"]["generation"]) if "lineage" in variables else 0


def members_of(given: Any) -> list[Member]:
  """Returns one network, or several, as a flat list; raises a ConfigError for what cannot be networks."""
  if given is None:
    return []
  if isinstance(given, Generation | Mapping):
    return [given]
  # A Model and a Dataset are sequences too, of their fields.
  if not isinstance(given, Sequence) or isinstance(given, str | bytes) or hasattr(given, "_fields"):
    hint = "; read a directory with ban_jax.load or load_run" if isinstance(given, str | os.PathLike) else ""
    kind = type(given).__name__
    raise ConfigError(f"expected a variables tree, a Generation or a sequence of them, not {kind}{hint}")
  found: list[Member] = []
  for number, member in enumerate(given, 1):
    inner = members_of(member)
    if not inner:  # a training that failed, which the others would hide
      kind = "None" if member is None else "an empty sequence"
      raise ConfigError(f"member {number} of {len(given)} is {kind}; expected a variables tree or a Generation")
    found += inner
  return found


def check_fits(variables: Variables, model: Model, what: str, note: str = "") -> None:
  """Raises a CheckpointError for what is no variables tree, or does not fit the model: then it names the first path."""
  if not isinstance(variables, Mapping) or "params" not in variables:
    is_mapping = isinstance(variables, Mapping)
    given = f"a mapping with {', '.join(map(str, variables))}" if is_mapping else type(variables).__name__
    raise CheckpointError(
      f"{what} must be a variables tree with 'params' and 'batch_stats' (as Generation.params is), not {given}"
    )
  difference = first_difference(model.shapes, variables)
  if difference:
    path, want, have = difference
    raise CheckpointError(
      f"{what} does not fit model {model.name} with {model.spec.num_classes} classes: at {path} the model has "
      f"{want}, the tree {have}{note}"
    )


def first_difference(expected: PyTree, given: PyTree) -> tuple[str, str, str] | None:
  """Returns the first path at which dtypes or shapes differ, with both as text ("nothing": no such leaf), or None.

  The lineage of a variables tree is left out.
  """
  wanted, found = (
    {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves(tree).items() if not path.startswith("lineage/")}
    for tree in (expected, given)
  )
  for path in sorted(wanted.keys() | found.keys()):
    want, have = wanted.get(path, "nothing"), found.get(path, "nothing")
    if want != have:
      return path, want, have
  return None


def is_finite(variables: Variables) -> bool:
  """Returns whether every number of a variables tree is finite."""
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(to_plain(variables)))


def mean_weights(weights: Sequence[float] | None, count: int, name: str = "weights") -> Float64[np.ndarray, " M"]:
  """Returns the shares of `count` networks in a weighted mean; None weights them equally.

  Raises a ConfigError, in which they are called `name`, for anything but one number of at least 0 for each, not all 0.
  """
  try:
    given = np.ones(count) if weights is None else np.asarray(weights, np.float64)
  except Exception:  # words, a dict, rows of several lengths, another library's tensor with a gradient
    given = np.zeros(0)
  if given.shape != (count,) or not np.isfinite(given).all() or (given < 0).any() or not given.sum() > 0:
    raise ConfigError(f"{name}={weights!r}: expected {count} numbers of at least 0, not all of them 0")
  return given / given.sum()

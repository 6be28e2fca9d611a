"""Data sets: one literal registry, and `load`, which turns the configuration's `data` group into a Dataset.

A new data set is one file and one entry in DATASETS.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ban_jax.data import cifar, digits, own, ptb, pydoc, tfds
from ban_jax.errors import look_up
from ban_jax.types import Dataset, Kind


class Source(NamedTuple):
  """Where a data set comes from.

  `load(directory, options)` returns the Dataset; a loader that reads no files has no argument `directory`. The
  annotation of `options` is the NamedTuple of the keys that it takes: images.Options, text.Options or tfds.Options.
  """

  load: Callable[..., Dataset]
  kind: Kind
  describe: Callable[..., Dataset] | None = None  # from the options, without reading anything; None: only by loading
  embedded: bool = False  # comes with an installed package: always there, and small


DATASETS = {
  "cifar10": Source(cifar.load_cifar10, "images", cifar.describe_cifar10),
  "cifar100": Source(cifar.load_cifar100, "images", cifar.describe_cifar100),
  "digits": Source(digits.load, "images", embedded=True),
  "own": Source(own.load, "images"),
  "ptb": Source(ptb.load, "tokens", ptb.describe),
  "pydoc": Source(pydoc.load, "tokens", embedded=True),
  "tfds": Source(tfds.load, "images"),
}


def load(group: Mapping[str, Any]) -> Dataset:
  """Returns the data set that the configuration's `data` group describes; equal groups return the same object.

  `group` has the key `name` and those of `keys_of(name)`; others are ignored. Its values must be of the right types and
  ranges: what is checked here is whether they fit the data. Raises ConfigError if they do not, or for an unknown name,
  and DataError where the data are missing or broken.
  """
  return _load(group["name"], **_arguments(group))


@functools.lru_cache(maxsize=4)  # one CIFAR is 185 MB: a sweep over many subsets should not keep them all
def _load(name: str, **arguments: Any) -> Dataset:
  return DATASETS[name].load(**arguments)


def describe(group: Mapping[str, Any]) -> Dataset:
  """Returns the data set that `load` returns for a `data` group, with jax.ShapeDtypeStructs as arrays and no digest.

  Of data sets with a `describe` nothing is read, so they need not be there; others are loaded. Raises as `load` does.
  """
  source, arguments = look_up(DATASETS, group["name"], "data set"), _arguments(group)
  if source.describe:
    return source.describe(arguments["options"])
  dataset = load(group)
  splits = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(dataset.splits))
  return dataset._replace(splits=splits, digest="")


def keys_of(name: str) -> tuple[str, ...]:
  """Returns the keys of a `data` group, besides `name`, that the data set takes; ConfigError for an unknown name.

  They are the arguments of its loader: `dir` is its `directory`, and the others are the fields of its `options`.
  """
  parameters = _parameters(name)
  return (("dir",) if "directory" in parameters else ()) + parameters["options"].annotation._fields


def _arguments(group: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the loader's arguments."""
  parameters = _parameters(group["name"])
  options = parameters["options"].annotation
  # A group that was recorded before a key existed lacks it: the field's default is neutral.
  given = {key: group[key] for key in options._fields if key in group or key not in options._field_defaults}
  arguments = {"options": options(**given)}
  return arguments | ({"directory": group["dir"]} if "directory" in parameters else {})


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(look_up(DATASETS, name, "data set").load).parameters

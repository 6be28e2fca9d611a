"""Data sets: one literal registry, and `load`, which turns the configuration's `data` group into a Dataset.

A new data set is one file and one entry in DATASETS.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from ban_jax.data import augment, cifar, digits, enwik8, own, ptb, pydoc, tfds, wikitext
from ban_jax.errors import ConfigError
from ban_jax.registry import Registry
from ban_jax.types import Dataset, Kind


class Source(NamedTuple):
  """Where a data set comes from.

  `load(*, dir, options)` returns the Dataset; a loader that reads no files has no argument `dir`. The annotation of
  `options` is the NamedTuple of the other keys that it takes: images.Options, text.Options, or one of its own.
  """

  load: Callable[..., Dataset]
  kind: Kind
  # From the options, without reading anything; None, or one that returns None: only by loading.
  describe: Callable[..., Dataset | None] | None = None
  embedded: bool = False  # comes with an installed package: always there, and small


_ENTRIES = {
  **{
    name: Source(functools.partial(cifar.load, name), "images", functools.partial(cifar.describe, name))
    for name in cifar.CLASSES
  },
  "digits": Source(digits.load, "images", embedded=True),
  "enwik8": Source(enwik8.load, "tokens"),
  "own": Source(own.load, "images"),
  "ptb": Source(ptb.load, "tokens", ptb.describe),
  "pydoc": Source(pydoc.load, "tokens", embedded=True),
  "tfds": Source(tfds.load, "images", tfds.describe),
  "wikitext": Source(wikitext.load, "tokens"),
}
DATASETS = Registry("data.name", "data set", _ENTRIES)


def load(group: Mapping[str, Any]) -> Dataset:
  """Returns the data set that the configuration's `data` group describes; equal groups return the same object.

  `group` has the key `name` and those of `DATASETS.options(name)`; others are ignored. Its values must be of the right
  types and ranges: what is checked here is whether they fit the data. Raises ConfigError if they do not, or for an
  unknown name, and DataError where the data are missing or broken.
  """
  return _load(group["name"], **_arguments(group))


def _arguments(group: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arguments of the data set that a `data` group names, the augmentations with their options."""
  found = DATASETS.arguments(group["name"], group)
  options = found["options"]
  if hasattr(options, "augment"):
    found["options"] = options._replace(augment=augment.choose(options.augment, group))
  return found


@functools.lru_cache(maxsize=4)  # one CIFAR is 185 MB: a sweep over many subsets should not keep them all
def _load(name: str, **arguments: Any) -> Dataset:
  try:
    return DATASETS[name].load(**arguments)
  except ModuleNotFoundError as error:
    raise ConfigError(f"data.name={name!r} needs the package {error.name}: pip install 'ban_jax[tfds]'") from error


def describe(group: Mapping[str, Any]) -> Dataset:
  """Returns the data set that `load` returns for a `data` group, with jax.ShapeDtypeStructs as arrays and no digest.

  Of data sets with a `describe` nothing is read, so they need not be there; others are loaded. Raises as `load` does.
  """
  source = DATASETS.find(group["name"])
  if source.describe and (described := source.describe(_arguments(group)["options"])):
    return described
  dataset = load(group)
  splits = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), dict(dataset.splits))
  return dataset._replace(splits=splits, digest="")

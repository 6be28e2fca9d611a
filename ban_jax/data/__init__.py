"""Data sets: one literal registry, and `load`, which turns the configuration's `data` group into a Dataset."""

import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any

from ban_jax import errors
from ban_jax.data import images
from ban_jax.errors import ConfigError
from ban_jax.types import Dataset

# name -> loader(directory=, validation=, train_examples=, pad=, flip=) -> Dataset
DATASETS = {
  "cifar10": images.load_cifar10,
  "cifar100": images.load_cifar100,
  "digits": images.load_digits,
}


def load(data: Mapping[str, Any]) -> Dataset:
  """Returns the data set that the configuration's `data` group describes; equal groups return the same object.

  Keys: `name`; `dir` ("" is TensorFlow Datasets' own default: $TFDS_DATA_DIR or ~/tensorflow_datasets); `validation`
  (share of train held out, 0 for none); `train_examples` (that many of train, class-balanced, 0 for all of them); `pad`
  (pixels of reflection padding before the random crop, 0 for no crop); `flip` (random horizontal flip).

  Raises ConfigError for a value that cannot be right, before anything is read, and DataError where the data are
  missing or broken.
  """
  return _load(*_checked(data))


@functools.lru_cache(maxsize=4)  # one CIFAR is 185 MB: a sweep over many subsets should not keep them all
def _load(name: str, directory: str, validation: float, train_examples: int, pad: int, flip: bool) -> Dataset:
  return DATASETS[name](directory=directory, validation=validation, train_examples=train_examples, pad=pad, flip=flip)


def _checked(data: Mapping[str, Any]) -> tuple[str, str, float, int, int, bool]:
  """Returns the group's values in `_load`'s order, after checking each, or raises ConfigError."""

  # A bool is an int to Python, but `pad=True` is a mistake.
  def is_count(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 0

  def is_share(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1

  checks = {
    "name": (lambda value: isinstance(value, str), "the name of a data set"),
    "dir": (lambda value: isinstance(value, str) and "://" not in value, 'a local directory, or "" for the default'),
    "validation": (is_share, "a share in [0, 1), 0 for no validation split"),
    "train_examples": (is_count, "a whole number, 0 for all training examples"),
    "pad": (is_count, "a whole number of pixels, 0 for no crop"),
    "flip": (lambda value: isinstance(value, bool), "True or False"),
  }
  if set(data) != set(checks):
    missing, unknown = sorted(set(checks) - set(data)), sorted(set(data) - set(checks))
    raise ConfigError(f"data: missing keys {missing}, unknown keys {unknown}; the keys are: {errors.choices(checks)}")
  for key, (is_right, expected) in checks.items():
    if not is_right(data[key]):
      raise ConfigError(f"data.{key} = {data[key]!r}: expected {expected}")
  errors.look_up(DATASETS, data["name"], "data set")
  return (
    data["name"], data["dir"], float(data["validation"]), int(data["train_examples"]), int(data["pad"]), data["flip"]
  )  # fmt: skip

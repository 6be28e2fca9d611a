"""Data sets: one literal registry, and `load`, which turns the configuration's `data` group into a Dataset."""

import functools
import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any

from ban_jax import errors
from ban_jax.data import images, text
from ban_jax.errors import ConfigError
from ban_jax.types import Dataset

# name -> loader(directory=, train_examples=, ...) -> Dataset; what else a loader takes are keys of the data group, too.
DATASETS = {
  "cifar10": images.load_cifar10,
  "cifar100": images.load_cifar100,
  "digits": images.load_digits,
  "ptb": text.load_ptb,
  "pydoc": text.load_pydoc,
}

# What a key has to be for a data set whose loader does not take it, and why it does not.
UNUSED = {
  "validation": (0.0, "brings its own validation split"),
  "pad": (0, "is text, and no image is cropped"),
  "flip": (False, "is text, and no image is flipped"),
  "window": (0, "holds images, and no text is cut into windows"),
}


def load(data: Mapping[str, Any]) -> Dataset:
  """Returns the data set that the configuration's `data` group describes; equal groups return the same object.

  Keys: `name`; `dir` (of CIFAR, "" being TensorFlow Datasets' own default: $TFDS_DATA_DIR or ~/tensorflow_datasets; of
  ptb, where its files are); `validation` (share of train held out, 0 for none); `train_examples` (that many of train's
  images, class-balanced, or of its tokens, from its beginning; 0 for all of them); `pad` (pixels of reflection padding
  before the random crop, 0 for no crop); `flip` (random horizontal flip); `window` (of text: tokens a window). A key
  that a data set has no use for must be 0 or False.

  Raises ConfigError for a value that cannot be right, before anything is read, and DataError where the data are
  missing or broken.
  """
  name, options = _checked(data)
  return _load(name, **options)


@functools.lru_cache(maxsize=4)  # one CIFAR is 185 MB: a sweep over many subsets should not keep them all
def _load(name: str, **options: Any) -> Dataset:
  return DATASETS[name](**options)


def _checked(data: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
  """Returns the data set's name and its loader's arguments, after checking every value, or raises ConfigError."""

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
    "window": (is_count, "a whole number of tokens, 0 for images"),
  }
  if set(data) != set(checks):
    missing, unknown = sorted(set(checks) - set(data)), sorted(set(data) - set(checks))
    raise ConfigError(f"data: missing keys {missing}, unknown keys {unknown}; the keys are: {errors.choices(checks)}")
  for key, (is_right, expected) in checks.items():
    if not is_right(data[key]):
      raise ConfigError(f"data.{key} = {data[key]!r}: expected {expected}")
  loader = errors.look_up(DATASETS, data["name"], "data set")
  taken = inspect.signature(loader).parameters
  for key, (neutral, why) in UNUSED.items():
    if key not in taken and data[key] != neutral:
      raise ConfigError(f"data.{key} = {data[key]!r}: expected {neutral!r}, since {data['name']} {why}")
  if "window" in taken and not data["window"]:
    raise ConfigError(f"data.window = 0: expected at least 1, the tokens of a window of {data['name']}")
  values = {
    "directory": data["dir"],
    "validation": float(data["validation"]),
    "train_examples": int(data["train_examples"]),
    "pad": int(data["pad"]),
    "flip": data["flip"],
    "window": int(data["window"]),
  }
  return data["name"], {key: values[key] for key in taken}

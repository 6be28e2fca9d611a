"""A caller's own images as a data set."""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ban_jax import devices as devices_lib
from ban_jax.data import augment as augment_lib
from ban_jax.data import images, noise
from ban_jax.data.arrays import as_array
from ban_jax.errors import ConfigError, DataError, check_bool, check_name, check_whole, choices, look_up
from ban_jax.keys import KEYS
from ban_jax.types import Dataset

Pair = tuple[Any, Any]  # images and labels, as arrays or what numpy.asarray takes


class Options(NamedTuple):
  """The keys of a configuration's `data` group that it takes: none, since the arrays come with their own settings."""


def load(options: Options) -> Dataset:
  """Raises the ConfigError that names where data of one's own are given."""
  raise ConfigError("data.name='own': pass the data as dataset=: what ban_jax.from_arrays or from_text returns")


@devices_lib.default_modes()
def from_arrays(
  train: Pair,
  test: Pair,
  validation: Pair | float | None = None,
  *,
  num_classes: int | None = None,
  pad: int = 0,
  flip: bool = False,
  augment: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
  name: str = "arrays",
  train_examples: int = 0,
  label_noise: float = 0.0,
  noise_kind: str = "symmetric",
  noise_seed: int = 0,
) -> Dataset:
  """Returns a data set of the caller's own images, for the argument `dataset` of `train_generation` and others.

  uint8 images are divided by 255. Floats are taken as they are, whatever their range. All images are then normalised by
  the mean and standard deviation of each channel over the training images. The arrays are copied.

  Args:
    train: images, uint8 or floating [N, H, W, C] or [N, H, W], and integer labels [N] from 0.
    test: a pair too.
    validation: a pair too, or the share of `train` to hold out.
    num_classes: by default the largest label plus one.
    pad: pixels of reflection that are added before a random crop.
    flip: whether to mirror at random.
    augment: names of further augmentations in their order, as in `data.augment`, perhaps with their options:
      {"erasing": {}, "mixup": {"mixup_alpha": 0.2}}.
    name: the data set's name, in messages and records.
    train_examples: a class-balanced or proportional choice of so many training examples, as `data.train_examples`.
    label_noise: the share of training labels that are made wrong, as `data.label_noise`.
    noise_kind: how, as `data.noise_kind`.
    noise_seed: by which draws, as `data.noise_seed`.

  Returns:
    A Dataset.

  Raises:
    DataError: for arrays that are no such pairs or do not fit each other.
    ConfigError: for a value out of range.

  Examples:
    >>> ban_jax.from_arrays((images[:200], labels[:200]), (images[900:], labels[900:])).sizes["train"]
    200
  """
  share = 0.0
  if isinstance(validation, numbers.Real):
    share, validation = float(validation), None
  check_name(name, "names the data set in messages")
  options = _options(share, train_examples, pad, flip, label_noise, noise_kind, noise_seed)
  options = options._replace(augment=augmentations(augment))
  given: dict[str, Any] = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
  parts = {split: _examples(name, split, pair) for split, pair in given.items()}
  largest = max(int(part.labels.max(initial=0)) for part in parts.values())
  if num_classes is None and largest < 1:
    raise DataError(f"{name}: all labels are {largest}; expected at least two classes, or give num_classes")
  dataset = images.build(
    name,
    parts["train"],
    parts["test"],
    num_classes=largest + 1 if num_classes is None else check_whole("num_classes", num_classes, 2),
    options=options,
    validation=parts.get("validation"),
  )
  recorded = {key: value for key, value in options._asdict().items() if key != "augment" or value}  # as before it was
  return dataset._replace(options={"name": name, **recorded})


def _options(
  share: float, train_examples: int, pad: int, flip: bool, label_noise: float, noise_kind: str, noise_seed: int
) -> images.Options:
  """Returns the options of a caller's images; raises a ConfigError that names the first that is wrong."""
  if not 0 <= share < 1:
    raise ConfigError(f"validation={share}: expected a share in [0, 1), or a pair of images and labels")
  look_up(noise.KINDS, noise_kind, "noise_kind")
  if not isinstance(label_noise, numbers.Real) or not 0 <= label_noise < 1:
    raise ConfigError(f"label_noise={label_noise!r}: expected a share in [0, 1)")
  check_bool("flip", flip)
  return images.Options(
    validation=share,
    train_examples=check_whole("train_examples", train_examples, 0),
    pad=check_whole("pad", pad, 0),
    flip=bool(flip),
    label_noise=float(label_noise),
    noise_kind=noise_kind,
    noise_seed=check_whole("noise_seed", noise_seed, 0),
  )


def augmentations(given: Sequence[str] | Mapping[str, Mapping[str, Any]]) -> augment_lib.Chosen:
  """Returns the augmentations that are named, with their options; raises a ConfigError that names what is wrong."""
  if isinstance(given, str) or not isinstance(given, Sequence | Mapping):
    raise ConfigError(f"augment={given!r}: expected a sequence of names, or of each name the options")
  defaults = {name.removeprefix("data."): key for name, key in KEYS.items() if name.startswith("data.")}
  found: augment_lib.Chosen = ()
  for name in given:
    own = given[name] if isinstance(given, Mapping) else {}
    options = augment_lib.AUGMENTATIONS.options(name)
    if not isinstance(own, Mapping):
      raise ConfigError(f"augment: {name} has {own!r}; expected its options by name, which are: {choices(options)}")
    for option, value in own.items():
      look_up(dict.fromkeys(options), option, f"option of {name}")
      if not defaults[option].rule.holds(value):
        raise ConfigError(f"{option}={value!r}: expected {defaults[option].rule.expected}")
    found += augment_lib.choose([name], {**{option: defaults[option].default for option in options}, **own})
  return found


def _examples(name: str, split: str, pair: Pair) -> images.Examples:
  """Returns a split's examples as arrays of our own; raises a DataError where they cannot be images and labels."""
  if not (isinstance(pair, Sequence) and len(pair) == 2):
    raise DataError(f"{name}: {split} must be a pair (images, labels), not {_describe(pair)}")
  where = f"{name}, {split}"
  pixels, labels = (
    as_array(f"{where}: the {what}", array) for what, array in zip(("images", "labels"), pair, strict=True)
  )
  if pixels.dtype != np.uint8 and not jnp.issubdtype(pixels.dtype, jnp.floating):
    raise DataError(f"{where}: the images are {pixels.dtype}; expected uint8 from 0 to 255, or floating-point numbers")
  if pixels.ndim not in (3, 4):
    raise DataError(f"{where}: the images have the shape {pixels.shape}; expected [N, H, W, C] or [N, H, W]")
  if not jnp.issubdtype(labels.dtype, jnp.integer) and labels.ndim != 2:
    raise DataError(f"{where}: the labels are {labels.dtype}; expected whole numbers from 0 to classes - 1")
  if labels.ndim != 1:
    hint = ""
    if labels.ndim == 2 and labels.shape[1] == 1:
      hint = "; take labels[:, 0]"
    elif labels.ndim == 2 and ((labels == 1).sum(axis=1) == 1).all() and ((labels == 0) | (labels == 1)).all():
      hint = "; for one-hot labels take labels.argmax(axis=1)"
    elif labels.ndim == 2:
      hint = "; an image of several classes, or of shares of them, cannot be trained on"
    raise DataError(f"{where}: the labels have the shape {labels.shape}; expected [N], a class each{hint}")
  pixels = pixels[..., None] if pixels.ndim == 3 else pixels
  bounds = np.iinfo(np.int32)
  if labels.size and not (bounds.min <= labels.min() and labels.max() <= bounds.max):
    wrong = labels.max() if labels.max() > bounds.max else labels.min()
    raise DataError(f"{where}: a label is {wrong}; expected classes from 0")
  with np.errstate(over="ignore"):  # of float64; what is not finite is refused later
    pixels = np.array(pixels, np.uint8 if pixels.dtype == np.uint8 else np.float32, order="C")
  return images.Examples(pixels, labels.astype(np.int32))


def _describe(value: Any) -> str:
  kind = type(value).__name__
  try:
    return f"{kind} of {len(value)}"
  except TypeError:  # no length: a number, an array without axes, a class
    return kind

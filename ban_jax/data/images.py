"""What image data sets share: the split into training, validation and test examples, and mini-batches on the device."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, PRNGKeyArray, UInt8

from ban_jax import errors
from ban_jax.data import augment, noise
from ban_jax.data.arrays import digest, make_read_only, padded_range
from ban_jax.data.augment import Chosen
from ban_jax.errors import ConfigError, DataError
from ban_jax.types import Batch, Dataset, InputSpec, maker

# Which examples are held out, or chosen as a small training set, is part of a data set's definition and not of a run:
# runs with other seeds are compared on the same examples. Change this number and every such result changes.
SPLIT_SEED = 1805_04770


class Options(NamedTuple):
  """The keys of a configuration's `data` group that an image data set takes."""

  validation: float  # share of the training pool that is held out, in [0, 1); 0: no validation split
  train_examples: int  # choice of the others to train on, as `divide` says; 0: all
  pad: int  # pixels of reflection padding before the random crop; 0: no crop
  flip: bool  # random horizontal flips
  label_noise: float = 0.0  # share of the training labels that are replaced by another class, in [0, 1)
  noise_kind: str = "symmetric"  # a key of noise.KINDS
  noise_seed: int = 0  # which labels are replaced, and by what
  augment: Chosen = ()  # further augmentations


class Examples(NamedTuple):
  """Images and their classes, in an order that depends on nothing but the data."""

  images: UInt8[np.ndarray, "N H W C"] | Float32[np.ndarray, "N H W C"]
  labels: Int32[np.ndarray, " N"]


def take(examples: Examples, order: Int[np.ndarray, " N"]) -> Examples:
  """Returns the examples whose numbers are in `order`, themselves in the order of the whole."""
  order = np.sort(order)
  return Examples(examples.images[order], examples.labels[order])


def balanced_order(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
  """Returns a fixed permutation of the examples of which every stretch holds about as many of each class.

  Round after round it takes one example of each class that has any left, in random order: with classes of equal size
  the counts within any stretch differ by at most two, and within a prefix by at most one.
  """
  rng = np.random.default_rng(SPLIT_SEED)
  by_class, rounds = _shuffled_by_class(labels, rng)
  return by_class[np.lexsort((rng.random(len(labels)), rounds))]


def _shuffled_by_class(labels: Int[np.ndarray, " N"], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Returns the examples' numbers, class after class and shuffled within each, and the place of each in its class."""
  shuffled = rng.permutation(len(labels))
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
  return by_class, np.concatenate([np.arange(count) for count in np.bincount(labels)] or [by_class])


def check_examples(name: str, parts: Mapping[str, Examples], num_classes: int) -> None:
  """Raises a DataError where the examples of the splits cannot be trained on, or do not fit the training images."""
  if num_classes < 2:
    raise DataError(f"{name}: there is one class alone; expected at least two")
  height, width, channels = parts["train"].images.shape[1:]
  for split, part in parts.items():
    where = f"{name}, {split}"
    if len(part.images) != len(part.labels):
      raise DataError(f"{where}: {len(part.images)} images and {len(part.labels)} labels; expected as many of each")
    if not part.images.size:
      raise DataError(
        f"{where}: the images have the shape {part.images.shape}; expected at least one image with pixels"
      )
    if part.images.shape[1:] != (height, width, channels):
      found = "x".join(map(str, part.images.shape[1:]))
      raise DataError(f"{where}: the images are {found}; expected {height}x{width}x{channels}, as in train")
    if part.images.dtype != parts["train"].images.dtype:
      raise DataError(f"{where}: the images are {part.images.dtype}, those of train {parts['train'].images.dtype}")
    if part.images.dtype != np.uint8 and not np.isfinite(part.images).all():
      first = int(np.flatnonzero(~np.isfinite(part.images).all(axis=(1, 2, 3)))[0])
      raise DataError(f"{where}: image {first} has pixels that are not finite; expected numbers")
    low, high = part.labels.min(), part.labels.max()
    if low < 0 or high >= num_classes:
      hint = "; the labels seem to begin at 1: subtract 1" if low == 1 and high == num_classes else ""
      wrong = low if low < 0 else high
      raise DataError(f"{where}: a label is {wrong}; expected classes from 0 to {num_classes - 1}{hint}")
  present = np.unique(parts["train"].labels)
  if count := num_classes - len(present):
    # Labels may be identifiers of nine digits: nothing is as long as the largest of them.
    missing = list(itertools.islice((number for number in range(num_classes) if number not in present), 10))
    hint = "; the labels seem to begin at 1: subtract 1" if missing == [0] else ""
    listed = ", ".join(map(str, missing)) + (f" and {count - 10} more" if count > 10 else "")
    raise DataError(f"{name}, train: no example of class {listed}; expected some of each of the {num_classes}{hint}")


def build(
  name: str,
  pool: Examples,
  test: Examples,
  *,
  num_classes: int,
  options: Options,
  validation: Examples | None = None,
) -> Dataset:
  """Returns the Dataset of a training pool, a test set and, where the data have one of their own, a validation split.

  Otherwise the validation split is cut off the pool first, so that it stays the same whatever `options.train_examples`
  is; then the training examples are chosen from the rest, as `divide` says. Splits keep the pool's order. Every split's
  arrays are `images` uint8 or float32 [N, H, W, C], `labels` int32 [N], and the training examples' `mean` and `std`
  float32 [C], of images / 255 where they are uint8. Raises DataError for examples that do not fit each other, and
  ConfigError if the pool is too small for the options, or the images for the padding.

  With label noise there are four more splits, for the metrics of a finished generation on what it was trained on:
  "train_seen" and "train_true", the training examples with the labels it saw and with the true ones, and "wrong_seen"
  and "wrong_true", those of them whose labels are wrong.
  """
  parts = {"train": pool, "test": test} | ({} if validation is None else {"validation": validation})
  check_examples(name, parts, num_classes)
  shape = pool.images.shape[1:]
  _check_padding(name, shape, options)
  if options.validation or options.train_examples:
    held_out, chosen = divide(name, pool.labels, options)
    parts["train"] = take(pool, chosen)
    if len(held_out):
      parts["validation"] = take(pool, held_out)
  record = {}
  if options.label_noise:
    true = parts["train"]
    if not round(options.label_noise * len(true.labels)):
      raise ConfigError(
        f"data.label_noise={options.label_noise}: expected a share that replaces at least one label; it takes 0 of"
        f" {name}'s {len(true.labels)} training labels"
      )
    labels = noise.corrupt(true.labels, num_classes, options.label_noise, options.noise_kind, options.noise_seed)
    seen, wrong = true._replace(labels=labels), np.flatnonzero(labels != true.labels)
    parts |= {"train": seen, "train_seen": seen, "train_true": true}
    parts |= {"wrong_seen": take(seen, wrong), "wrong_true": take(true, wrong)}
    record = noise.record(true.labels, labels)
  mean, std = channel_statistics(parts["train"].images)
  splits = {
    split: {"images": part.images, "labels": part.labels, "mean": mean, "std": std} for split, part in parts.items()
  }
  make_read_only(splits)
  sizes = {split: len(part.labels) for split, part in parts.items()}
  dataset = assemble(name, InputSpec("images", shape, num_classes), splits, sizes, options)
  return dataset._replace(digest=digest(splits), record=record)


def describe(
  name: str, *, pool: int, test: int, shape: tuple[int, int, int], num_classes: int, options: Options
) -> Dataset:
  """Returns `build`'s Dataset for a pool and a test set of so many uint8 images of `shape` (H, W, C), as shapes.

  The classes must be about equally large: how many examples are held out of others depends on the size of each. Label
  noise changes no shape, and its splits are left out. Raises as `build` does.
  """
  _check_padding(name, shape, options)
  held_out = min(round(options.validation * pool), pool - num_classes)
  sizes = {"train": _train_size(name, pool, held_out, options), "test": test}
  sizes |= {"validation": held_out} if held_out else {}
  statistics = {key: jax.ShapeDtypeStruct(shape[-1:], np.float32) for key in ("mean", "std")}
  splits = {
    split: {
      "images": jax.ShapeDtypeStruct((size, *shape), np.uint8),
      "labels": jax.ShapeDtypeStruct((size,), np.int32),
      **statistics,
    }
    for split, size in sizes.items()
  }
  return assemble(name, InputSpec("images", shape, num_classes), splits, sizes, options)


def assemble(name: str, spec: InputSpec, splits: Any, sizes: Mapping[str, int], options: Options) -> Dataset:
  """Returns the Dataset of splits' arrays, or their shapes, without a digest."""
  return Dataset(
    name=name,
    spec=spec,
    splits=splits,
    sizes=sizes,
    digest="",
    fetch=make_fetch(options.pad, options.flip, spec.shape, options.augment, spec.num_classes),
    pack=pack,
    train_order=functools.partial(_train_order, name, sizes["train"]),
    eval_order=functools.partial(_eval_order, name, sizes),
  )


def divide(
  name: str, labels: Int[np.ndarray, " N"], options: Options
) -> tuple[Int[np.ndarray, " V"], Int[np.ndarray, " T"]]:
  """Returns which examples of a pool are held out for validation, and which of the others are trained on.

  Every class keeps a training example. Where the largest class is at most a tenth larger than the smallest, both are
  stretches of `balanced_order`, the last example of each class being set aside for training where a class would have
  none; but for that, a smaller choice of training examples is part of every larger one. Else each class gives its share
  to either, within one example; there, a larger choice lacks at most one example a class of a smaller one. Raises
  ConfigError if the pool is too small for the options.
  """
  _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
  is_even = 10 * counts.max() <= 11 * counts.min()
  spare = np.minimum(np.rint(options.validation * counts).astype(int), counts - 1)  # of each class
  held_out = min(round(options.validation * len(labels)), len(labels) - len(counts)) if is_even else int(spare.sum())
  chosen = _train_size(name, len(labels), held_out, options)
  if chosen < len(counts):
    raise ConfigError(
      f"data.train_examples={chosen}: expected at least {len(counts)}, one of each class of {name}, or 0 for all"
    )
  if is_even:
    order = balanced_order(labels)
    if len(np.unique(labels[order[held_out : held_out + chosen]])) < len(counts):
      kept = len(order) - 1 - np.unique(labels[order[::-1]], return_index=True)[1]  # each class's last place
      order = np.insert(np.delete(order, kept), held_out, order[kept])
    return order[:held_out], order[held_out : held_out + chosen]
  ends = spare + _quotas(counts - spare, chosen)
  by_class, places = _shuffled_by_class(labels, np.random.default_rng(SPLIT_SEED))
  first, end = spare[classes[by_class]], ends[classes[by_class]]
  return by_class[places < first], by_class[(first <= places) & (places < end)]


def _quotas(counts: Int[np.ndarray, " n"], total: int) -> Int[np.ndarray, " n"]:
  """Returns how many examples of each class make `total`, in proportion to `counts` by the largest remainders.

  Classes whose share is less than one example have one, and the others divide what is left.
  """
  rare = np.zeros(len(counts), bool)
  while True:
    left = np.where(rare, 0, counts)
    quotas, remainders = np.divmod((total - rare.sum()) * left, left.sum())
    if (quotas >= 1)[~rare].all():
      break
    rare |= quotas == 0
  missing = total - rare.sum() - quotas.sum()
  quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
  return quotas + rare


def _check_padding(name: str, shape: tuple[int, ...], options: Options) -> None:
  """Raises ConfigError if images of `shape` (H, W, C) are too small for the padding."""
  height, width, _ = shape
  if options.pad >= min(height, width):
    raise ConfigError(
      f"data.pad={options.pad}: expected at most {min(height, width) - 1}, because reflection needs more pixels than it"
      f" pads, and {name} has {height}x{width} images"
    )


def _train_size(name: str, pool: int, held_out: int, options: Options) -> int:
  """Returns how many of a pool's examples are trained on, `held_out` of them being held out for validation.

  Raises ConfigError if the pool is too small for the options.
  """
  available = pool - held_out
  if options.validation and not (held_out and available):
    raise ConfigError(
      f"data.validation={options.validation}: expected a share that leaves examples on both sides; it takes {held_out}"
      f" of {name}'s {pool} training examples"
    )
  if options.train_examples > available:
    raise ConfigError(
      f"data.train_examples={options.train_examples}: expected at most {available}, what {name} has to train on"
      + (f" after {held_out} examples are held out for validation" if held_out else "")
    )
  return options.train_examples or available


def pack(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a split's arrays with an image in each row, [N, H W C].

  Of images [N, H, W, C], XLA for TPUs copies all into another layout before it gathers any, in every dispatch.
  """
  images = arrays["images"]
  return {**arrays, "images": images if images.ndim == 2 else images.reshape(len(images), -1)}


@maker
def make_fetch(
  pad: int, flip: bool, shape: tuple[int, int, int], chosen: Chosen = (), num_classes: int = 0
) -> Callable[..., Batch]:
  """Returns the function that cuts a mini-batch of images of `shape` out of a split, the same for the same arguments.

  `chosen` are augmentations beside crop and flip, which need the number of classes where they mix images.

  Compiled steps are memoised on that object, so what differs between image data sets comes in through `arrays` and is
  never a constant of the program.
  """

  def fetch(
    arrays: Mapping[str, Array],
    index: Int[Array, " B"],
    *,
    key: PRNGKeyArray | None,
    positions: Int[Array, " B"] | None,
    train: bool,
  ) -> Batch:
    """Gathers the images at `index`, normalises them per channel and, if `train` is true, augments them.

    Returns float32 [B, H, W, C] of mean 0 and standard deviation 1 over the training set. A negative index gives a
    padding row: some image, mask False. `key` and `positions` may be None if `train` is false.
    """
    rows = jnp.maximum(index, 0)
    images = arrays["images"][rows].reshape(-1, *shape)  # uint8 [B, H, W, C]
    if train and (pad or flip):
      assert key is not None
      assert positions is not None
      offsets, flips = augment.draw(key, positions, pad)
      if pad:
        images = augment.crop(images, offsets, pad)
      if flip:
        images = augment.flip(images, flips)
    batch = Batch(normalise(images, arrays["mean"], arrays["std"]), arrays["labels"][rows], index >= 0)
    if not (train and chosen):
      return batch
    assert key is not None
    assert positions is not None
    inputs, shares = augment.apply(chosen, batch.inputs, batch.labels, num_classes, key, positions)
    if shares is None:
      return batch._replace(inputs=inputs)
    return batch._replace(inputs=inputs, labels=shares.argmax(-1).astype(jnp.int32), shares=shares)

  return fetch


def normalise(
  images: UInt8[Array, "B H W C"] | Float32[Array, "B H W C"], mean: Float[Array, " C"], std: Float[Array, " C"]
) -> Float[Array, "B H W C"]:
  """Returns what a network reads: uint8 is divided by 255, and both are normalised per channel."""
  scaled = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
  return (scaled - mean) / std


def channel_statistics(
  images: UInt8[np.ndarray, "N H W C"] | Float32[np.ndarray, "N H W C"],
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
  """Returns the mean and standard deviation of each channel, of images / 255 where they are uint8.

  Both are float32 and computed in float64.
  """
  if images.dtype != np.uint8:
    mean, std = (np.asarray(f(images, axis=(0, 1, 2), dtype=np.float64)) for f in (np.mean, np.std))
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
  # Counts of the 256 levels need no copy of the images in floating point, 1.2 GB for CIFAR, and sums of whole numbers
  # are exact: the last bit, which is part of the digest, is the same on every machine.
  levels, means, stds = np.arange(256), [], []
  for channel in np.moveaxis(images, -1, 0):  # [N, H, W]
    chunks = np.array_split(channel, len(channel) // 1000 + 1)
    counts = np.sum([np.bincount(chunk.ravel(), minlength=256) for chunk in chunks], axis=0)
    number, total, squares = int(counts.sum()), int(counts @ levels), int(counts @ levels**2)
    means.append(total / number / 255)
    # A channel that never changes is normalised to 0, not to NaN.
    stds.append(math.sqrt(number * squares - total**2) / number / 255 or 1.0)
  return np.array(means, np.float32), np.array(stds, np.float32)


def _train_order(name: str, size: int, key: PRNGKeyArray, batch_size: int) -> Int32[np.ndarray, "steps batch"]:
  """Returns one epoch's mini-batches, a permutation drawn from `key`; the incomplete last batch is dropped.

  Raises ConfigError if a batch holds more examples than there are: the epoch would have no step.
  """
  if size < batch_size:
    raise ConfigError(f"train.batch_size={batch_size}: expected at most {size}, the training examples of {name}")
  steps = size // batch_size
  order = np.asarray(jax.random.permutation(key, size), np.int32)
  return order[: steps * batch_size].reshape(steps, batch_size)


def _eval_order(name: str, sizes: Mapping[str, int], split: str, batch_size: int) -> Int32[np.ndarray, "steps batch"]:
  """Returns mini-batches that hold every example of the split exactly once, in order, padded with -1 at the end.

  Raises ConfigError for an unknown split, listing those of the data set.
  """
  size = errors.look_up(sizes, split, f"split of {name}")
  return padded_range(size, batch_size).reshape(-1, batch_size)

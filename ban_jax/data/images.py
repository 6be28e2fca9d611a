"""Image data sets: the split into training, validation and test examples, and mini-batches cut out on the device."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, UInt8

from ban_jax import errors
from ban_jax.data import augment
from ban_jax.errors import ConfigError
from ban_jax.types import Batch, Dataset, InputSpec

# Which examples are held out, or chosen as a small training set, is part of a data set's definition and not of a run:
# runs with other seeds are compared on the same examples. Change this number and every such result changes.
SPLIT_SEED = 1805_04770
DIGITS_TRAIN = 400  # of 1,797; few enough that a teacher leaves something to learn for its students


class Examples(NamedTuple):
  """Images and their classes, in an order that depends on nothing but the data."""

  images: UInt8[np.ndarray, "N H W C"]
  labels: Int32[np.ndarray, " N"]


def load_cifar10(*, directory: str, validation: float, train_examples: int, pad: int, flip: bool) -> Dataset:
  """Returns CIFAR-10: 50,000 + 10,000 images [32, 32, 3] of 10 classes, read from `directory` or prepared there."""
  return _load_cifar("cifar10", 10, directory, validation, train_examples, pad, flip)


def load_cifar100(*, directory: str, validation: float, train_examples: int, pad: int, flip: bool) -> Dataset:
  """Returns CIFAR-100: 50,000 + 10,000 images [32, 32, 3] of 100 classes, read from `directory` or prepared there."""
  return _load_cifar("cifar100", 100, directory, validation, train_examples, pad, flip)


def _load_cifar(
  name: str, num_classes: int, directory: str, validation: float, train_examples: int, pad: int, flip: bool
) -> Dataset:
  from ban_jax.data import cifar  # TensorFlow Datasets takes half a second to import, and digits do not need it

  splits = cifar.read(name, directory)
  return build(
    name, splits["train"], splits["test"], num_classes=num_classes, validation=validation,
    train_examples=train_examples, pad=pad, flip=flip,
  )  # fmt: skip


def load_digits(*, directory: str, validation: float, train_examples: int, pad: int, flip: bool) -> Dataset:
  """Returns scikit-learn's 1,797 handwritten digits [8, 8, 1]: 400 to train on, 40 of each class, and 1,397 to test.

  The 17 grey levels 0..16 become 0..255. The data come with scikit-learn: `directory` is not looked at.
  """
  del directory
  from sklearn.datasets import load_digits as read  # a second to import, and CIFAR does not need it

  pixels, labels = read(return_X_y=True)  # [N, 64] in 0..16, [N]
  everything = Examples(np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8), labels.astype(np.int32))
  order = balanced_order(everything.labels)
  return build(
    "digits", _take(everything, order[:DIGITS_TRAIN]), _take(everything, order[DIGITS_TRAIN:]), num_classes=10,
    validation=validation, train_examples=train_examples, pad=pad, flip=flip,
  )  # fmt: skip


def balanced_order(labels: Int[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
  """Returns a fixed permutation of the examples whose every stretch holds about as many of each class.

  Round after round it takes one example of each class that has any left, in random order: with classes of equal size
  the counts within any stretch differ by at most two, and within a prefix by at most one.
  """
  rng = np.random.default_rng(SPLIT_SEED)
  shuffled = rng.permutation(len(labels))
  by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # classes one after another, shuffled inside
  counts = np.bincount(labels)
  rounds = np.concatenate([np.arange(count) for count in counts]) if len(labels) else by_class
  return by_class[np.lexsort((rng.random(len(labels)), rounds))]


def build(
  name: str,
  pool: Examples,
  test: Examples,
  *,
  num_classes: int,
  validation: float,
  train_examples: int,
  pad: int,
  flip: bool,
) -> Dataset:
  """Returns the Dataset of a training pool and a test set.

  `validation` is a share of the pool and is cut off first, so that it stays the same whatever `train_examples` is; then
  `train_examples` (0: all) are chosen from the rest, a smaller choice being part of every larger one. Splits keep the
  pool's order. Every split's arrays are `images` uint8 [N, H, W, C], `labels` int32 [N], and the training examples'
  `mean` and `std` float32 [C] of images / 255. Raises ConfigError where the pool is too small or the
  images are too small for `pad`.
  """
  shape = pool.images.shape[1:]
  if pad >= min(shape[:2]):
    raise ConfigError(
      f"data.pad = {pad}: expected at most {min(shape[:2]) - 1}, because reflection needs more pixels than it pads, and"
      f" {name} has {shape[0]}x{shape[1]} images"
    )
  held_out = round(validation * len(pool.labels))
  available = len(pool.labels) - held_out
  if validation and not (held_out and available):
    raise ConfigError(
      f"data.validation = {validation}: expected a share that leaves examples on both sides; it takes {held_out} of"
      f" {name}'s {len(pool.labels)} training examples"
    )
  if train_examples > available:
    raise ConfigError(
      f"data.train_examples = {train_examples}: expected at most {available}, what {name} has to train on"
      + (f" after {held_out} examples are held out for validation" if held_out else "")
    )
  chosen = train_examples or available
  if chosen < len(pool.labels):
    order = balanced_order(pool.labels)
    parts = {"train": _take(pool, order[held_out : held_out + chosen]), "test": test}
    if held_out:
      parts["validation"] = _take(pool, order[:held_out])
  else:
    parts = {"train": pool, "test": test}

  mean, std = channel_statistics(parts["train"].images)
  splits = {
    split: {"images": part.images, "labels": part.labels, "mean": mean, "std": std} for split, part in parts.items()
  }
  for arrays in splits.values():
    for array in arrays.values():
      array.setflags(write=False)
  sizes = {split: len(part.labels) for split, part in parts.items()}
  return Dataset(
    name=name,
    spec=InputSpec("images", shape, num_classes),
    splits=splits,
    sizes=sizes,
    digest=digest(splits),
    fetch=make_fetch(pad, flip),
    train_order=functools.partial(_train_order, name, sizes["train"]),
    eval_order=functools.partial(_eval_order, name, sizes),
  )


@functools.cache
def make_fetch(pad: int, flip: bool) -> Callable[..., Batch]:
  """Returns the function that cuts a mini-batch out of a split; the same object for the same arguments.

  Compiled steps are memoised on that object; what differs between data sets of one kind therefore comes in through
  `arrays` and is never baked into the program.
  """

  def fetch(
    arrays: Mapping[str, Array],
    index: Int[Array, " B"],
    *,
    key: PRNGKeyArray | None,
    positions: Int[Array, " B"] | None,
    train: bool,
  ) -> Batch:
    """Gathers the images at `index`, crops and flips them where `train` is true, and normalises them per channel.

    Returns float32 [B, H, W, C] of mean 0 and standard deviation 1 over the training set. A negative index makes a row
    that only fills up the batch: some image, mask False. `key` and `positions` may be None where `train` is false.
    """
    rows = jnp.maximum(index, 0)
    images = arrays["images"][rows]  # uint8 [B, H, W, C]
    if train and (pad or flip):
      offsets, flips = augment.draw(key, positions, pad)
      if pad:
        images = augment.crop(images, offsets, pad)
      if flip:
        images = augment.flip(images, flips)
    inputs = (images.astype(jnp.float32) / 255 - arrays["mean"]) / arrays["std"]
    return Batch(inputs, arrays["labels"][rows], index >= 0)

  return fetch


def channel_statistics(
  images: UInt8[np.ndarray, "N H W C"],
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
  """Returns the mean and standard deviation of each channel of images / 255, float32, computed in float64."""
  # Counts of the 256 levels need no copy of the images in floating point, 1.2 GB for CIFAR, and sums of whole numbers
  # are exact: the last bit, which is part of the digest, is the same on every machine.
  levels, means, stds = np.arange(256), [], []
  for channel in np.moveaxis(images, -1, 0):  # [N, H, W]
    chunks = np.array_split(channel, len(channel) // 1000 + 1)
    counts = sum(np.bincount(chunk.ravel(), minlength=256) for chunk in chunks)
    number, total, squares = int(counts.sum()), int(counts @ levels), int(counts @ levels**2)
    means.append(total / number / 255)
    # A channel that never changes is normalised to 0, not to NaN.
    stds.append(math.sqrt(number * squares - total**2) / number / 255 or 1.0)
  return np.array(means, np.float32), np.array(stds, np.float32)


def digest(splits: Mapping[str, Mapping[str, np.ndarray]]) -> str:
  """Returns the SHA-256 of the splits' and arrays' names, types, shapes and bytes, whatever their order in the dict."""
  sha = hashlib.sha256()
  for split, arrays in sorted(splits.items()):
    for key, array in sorted(arrays.items()):
      sha.update(f"{split}/{key} {array.dtype.str} {array.shape}\n".encode())
      sha.update(np.ascontiguousarray(array).data)
  return sha.hexdigest()


def _take(examples: Examples, order: Int[np.ndarray, " N"]) -> Examples:
  """Returns the examples at `order`, in the order of the whole."""
  order = np.sort(order)
  return Examples(examples.images[order], examples.labels[order])


def check_batch_size(batch_size: int) -> None:
  """Raises a ConfigError where a batch would hold nothing."""
  if batch_size < 1:
    raise ConfigError(f"batch size = {batch_size}: expected at least 1")


def _train_order(name: str, size: int, key: PRNGKeyArray, batch_size: int) -> Int32[np.ndarray, "steps batch"]:
  """Returns one epoch's mini-batches, a permutation drawn from `key`; the incomplete last batch is dropped.

  Raises ConfigError where there are fewer examples than a batch holds: the epoch would have no step.
  """
  check_batch_size(batch_size)
  if size < batch_size:
    raise ConfigError(
      f"train.batch_size = {batch_size} is more than the {size} training examples of {name}: expected at most {size}"
    )
  steps = size // batch_size
  order = np.asarray(jax.random.permutation(key, size), np.int32)
  return order[: steps * batch_size].reshape(steps, batch_size)


def _eval_order(name: str, sizes: Mapping[str, int], split: str, batch_size: int) -> Int32[np.ndarray, "steps batch"]:
  """Returns mini-batches that hold every example of the split exactly once, in order, padded with -1 at the end.

  Raises ConfigError for a split that there is not, listing those that there are.
  """
  check_batch_size(batch_size)
  size = errors.look_up(sizes, split, f"split of {name}")
  steps = -(-size // batch_size)
  order = np.full(steps * batch_size, -1, np.int32)
  order[:size] = np.arange(size)
  return order.reshape(steps, batch_size)

"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 10 and of 100 classes."""

from ban_jax.data import images
from ban_jax.types import Dataset

TRAIN, TEST, SHAPE = 50_000, 10_000, (32, 32, 3)
CLASSES = {"cifar10": 10, "cifar100": 100}


def load(name: str, *, dir: str, options: images.Options) -> Dataset:
  """Returns `name` of CLASSES, read from the directory `dir` or prepared there; "" is TensorFlow Datasets' default.

  CIFAR-100 has its 100 fine classes. Raises ConfigError for options that do not fit the data, and DataError where they
  are missing or broken.
  """
  from ban_jax.data import tfds_cifar  # TensorFlow Datasets takes half a second to import

  splits = tfds_cifar.read(name, dir)
  return images.build(name, splits["train"], splits["test"], num_classes=CLASSES[name], options=options)


def describe(name: str, options: images.Options) -> Dataset:
  """Returns `name` of CLASSES as shapes, without its data; raises ConfigError for options that do not fit it."""
  return images.describe(name, pool=TRAIN, test=TEST, shape=SHAPE, num_classes=CLASSES[name], options=options)

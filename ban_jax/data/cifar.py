"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 10 and of 100 classes."""

from ban_jax.data import images
from ban_jax.types import Dataset

TRAIN, TEST, SHAPE = 50_000, 10_000, (32, 32, 3)
CLASSES = {"cifar10": 10, "cifar100": 100}


def load_cifar10(directory: str, options: images.Options) -> Dataset:
  """Returns CIFAR-10, read from `directory` or prepared there; "" is the default of TensorFlow Datasets.

  Raises ConfigError for options that do not fit the data, and DataError where they are missing or broken.
  """
  return _load("cifar10", directory, options)


def load_cifar100(directory: str, options: images.Options) -> Dataset:
  """Returns CIFAR-100 with its 100 fine classes; arguments and errors are those of `load_cifar10`."""
  return _load("cifar100", directory, options)


def _load(name: str, directory: str, options: images.Options) -> Dataset:
  from ban_jax.data import tfds_cifar  # TensorFlow Datasets takes half a second to import

  splits = tfds_cifar.read(name, directory)
  return images.build(name, splits["train"], splits["test"], num_classes=CLASSES[name], options=options)


def describe_cifar10(options: images.Options) -> Dataset:
  """Returns CIFAR-10 as shapes, without its data; raises ConfigError for options that do not fit it."""
  return _describe("cifar10", options)


def describe_cifar100(options: images.Options) -> Dataset:
  """Returns CIFAR-100 as shapes, without its data; raises ConfigError for options that do not fit it."""
  return _describe("cifar100", options)


def _describe(name: str, options: images.Options) -> Dataset:
  return images.describe(name, pool=TRAIN, test=TEST, shape=SHAPE, num_classes=CLASSES[name], options=options)

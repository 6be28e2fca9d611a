"""Any image classification set of TensorFlow Datasets (TFDS), by its name there."""

from typing import Any, NamedTuple

from ban_jax.data import images
from ban_jax.types import Dataset


class Asked(NamedTuple):
  """The keys of a configuration's `data` group that say what is read from TFDS."""

  dataset: str  # NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION
  size: int  # images are resized to size x size pixels; 0: not at all, and all must have one size
  train_split: str  # the training pool: a split, or a part of one as "train[:80%]"
  test_split: str
  validation_split: str  # "": none, or a share of the training pool as `validation` says


# An Asked and an images.Options in one, whose fields are all keys that the data set takes.
_FIELDS: Any = [*Asked.__annotations__.items(), *images.Options.__annotations__.items()]
Options: Any = NamedTuple("Options", _FIELDS)  # type: ignore[misc]  # whose fields are not written out


def load(*, dir: str, options: Options) -> Dataset:
  """Returns a data set of TFDS, read from the directory `dir` or prepared there; "" is TFDS's default.

  Raises ConfigError for what is no image classification set or options that do not fit it, and DataError where it is
  neither prepared in a format that can be read nor can be prepared.
  """
  from ban_jax.data import tfds_images  # TensorFlow Datasets takes half a second to import

  asked = Asked(*(getattr(options, key) for key in Asked._fields))
  own = images.Options(*(getattr(options, key) for key in images.Options._fields))
  wanted = tuple((key, split) for key, split in asked._asdict().items() if key.endswith("_split") and split)
  parts, num_classes = tfds_images.read(asked.dataset, asked.size, wanted, dir)
  return images.build(
    asked.dataset,
    parts["train_split"],
    parts["test_split"],
    validation=parts.get("validation_split"),
    num_classes=num_classes,
    options=own,
  )

"""Any image classification set of TensorFlow Datasets (TFDS), by its name there."""

import logging
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ban_jax.data import images, source
from ban_jax.data.decoding import Form
from ban_jax.errors import ConfigError
from ban_jax.types import Dataset

logger = logging.getLogger(__name__)

# The share of a device's memory beyond which a split is streamed, unasked.
SHARE = 0.5
NAMES = {"train_split": "train", "test_split": "test", "validation_split": "validation"}


class Asked(NamedTuple):
  """The keys of a configuration's `data` group that say what is read from TFDS."""

  dataset: str  # NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION
  size: int  # images are resized to size x size pixels; 0: not at all, and all must have one size
  train_split: str  # the training pool: a split, or a part of one as "train[:80%]"
  test_split: str
  validation_split: str  # "": none, or a share of the training pool as `validation` says
  stream: bool = False  # whether the images are read as they are needed, in the order of the files
  view: str = "whole"  # what becomes of an image that is resized: one of decoding.VIEWS
  workers: int = 0  # processes that read a stream; 0: threads


# Sets of colour images that are described without being there: the examples of their splits, and their classes.
KNOWN = {"imagenet2012": ({"train": 1_281_167, "validation": 50_000}, 1000)}
# An Asked and an images.Options in one, whose fields are all keys that the data set takes.
_FIELDS: Any = [*Asked.__annotations__.items(), *images.Options.__annotations__.items()]
Options: Any = NamedTuple("Options", _FIELDS)  # type: ignore[misc]  # whose fields are not written out


def load(*, dir: str, options: Options) -> Dataset:
  """Returns a data set of TFDS, read from the directory `dir` or prepared there; "" is TFDS's default.

  Raises ConfigError for what is no image classification set or options that do not fit it, and DataError where it is
  neither prepared in a format that can be read nor can be prepared.
  """
  from ban_jax.data import tfds_images  # TensorFlow Datasets takes half a second to import

  asked, own, wanted = _asked(options)
  known = tfds_images.look(asked.dataset, wanted, dir)
  if asked.stream or _is_large(asked, known):
    sources = {NAMES[key]: tfds_images.Prepared(asked.dataset, known.root, split) for key, split in wanted}
    return _streamed(asked, own, known, sources)
  if asked.view != "whole" or asked.workers:
    key, value = ("view", asked.view) if asked.view != "whole" else ("workers", asked.workers)
    raise ConfigError(f"data.{key}={value!r}: expected data.stream=True, because images on the devices are read once")
  parts, num_classes = tfds_images.read(asked.dataset, asked.size, wanted, dir)
  return images.build(
    asked.dataset,
    parts["train_split"],
    parts["test_split"],
    validation=parts.get("validation_split"),
    num_classes=num_classes,
    options=own,
  )


def describe(options: Options) -> Dataset | None:
  """Returns a set of KNOWN as shapes, without its data, if it is streamed; else None."""
  asked, own, wanted = _asked(options)
  sizes, num_classes = KNOWN.get(asked.dataset, ({}, 0))
  if not (asked.stream and asked.size) or not {split for _, split in wanted} <= sizes.keys():
    return None
  _check_streamed(asked, own)
  found = {NAMES[key]: sizes[split] for key, split in wanted}
  return source.describe(asked.dataset, found, num_classes, Form(asked.size, asked.view, 3), own)


def _asked(options: Options) -> tuple[Asked, images.Options, tuple[tuple[str, str], ...]]:
  """Returns what is read, what becomes of it, and the splits that are named, by key."""
  asked = Asked(*(getattr(options, key) for key in Asked._fields))
  own = images.Options(*(getattr(options, key) for key in images.Options._fields))
  return asked, own, tuple((key, split) for key, split in asked._asdict().items() if key.endswith("_split") and split)


def _is_large(asked: Asked, known: Any) -> bool:
  """Returns whether a split takes too much of a device's memory, and says so."""
  shape = (asked.size, asked.size, known.shape[-1] or 3) if asked.size else known.shape
  if None in shape:
    return False  # images that differ in size are refused, or resized
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # on CPU
  largest = max(known.sizes.values()) * math.prod(shape)
  if largest <= SHARE * limit:
    return False
  logger.warning(
    f"{asked.dataset}: its largest split takes {largest / 2**30:,.1f} GiB of the device's {limit / 2**30:,.1f}, so "
    "that it is streamed; set data.stream=True, so that it is on every machine"
  )
  return True


def _streamed(asked: Asked, own: images.Options, known: Any, sources: Mapping[str, Any]) -> Dataset:
  """Returns the Dataset that reads its images as they are needed."""
  _check_streamed(asked, own)
  form = Form(asked.size, asked.view, known.shape[-1] or 3)
  return source.build(asked.dataset, sources, known.num_classes, form, own, keys=known.keys, workers=asked.workers)


def _check_streamed(asked: Asked, own: images.Options) -> None:
  """Raises a ConfigError for an option that a stream cannot have."""
  for key, neutral in (("validation", 0.0), ("train_examples", 0), ("label_noise", 0.0)):
    if getattr(own, key) != neutral:
      raise ConfigError(
        f"data.{key}={getattr(own, key)!r}: expected {neutral!r}, because it takes the labels of all examples, and "
        f"{asked.dataset} is streamed; choose by data.train_split='train[:90%]' and data.validation_split='train[90%:]'"
      )
  if asked.view == "crops" and not asked.size:
    raise ConfigError("data.view='crops': expected a data.size, to which the parts are resized, such as 224")

"""Reading, and where necessary preparing, an image classification set of TensorFlow Datasets (TFDS) without TensorFlow.

Of TFDS's file formats array_record and parquet can be read without TensorFlow. Which sets TFDS can prepare without it
depends on the set's own code.
"""

import difflib
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming, read_only_builder, registered

from ban_jax.data import decoding, tfds_files
from ban_jax.data.arrays import make_read_only
from ban_jax.data.images import Examples
from ban_jax.errors import BanError, ConfigError, DataError, choices

# Keys of the configuration's `data` group and the splits that they name: (("train_split", "train[:80%]"), ...).
Splits = tuple[tuple[str, str], ...]


def read(dataset: str, size: int, wanted: Splits, directory: str) -> tuple[Mapping[str, Examples], int]:
  """Returns the examples of each split that is `wanted`, by its key, and the number of classes.

  They are in the order of a digest of their pixels, and resized to size x size unless `size` is 0. `directory` "" is
  TFDS's default. Raises ConfigError for an unknown name, a set that is not of images and classes, splits that are not
  there, empty, overlap or have no labels, and images of different sizes; DataError where the set cannot be read or
  prepared.
  """
  _parse(dataset)
  root = tfds_files.find_root(dataset, directory)
  with tfds_files.looking_into(dataset, root):
    return _read(dataset, size, wanted, root)


@functools.lru_cache(maxsize=2)  # several subsets of a data set decode it once
def _read(dataset: str, size: int, wanted: Splits, root: pathlib.Path) -> tuple[Mapping[str, Examples], int]:
  builder = _find(dataset, root) or _prepare(dataset, root)
  keys, num_classes = _features(dataset, builder.info)
  _check_splits(dataset, builder.info, dict(wanted))
  parts = {}
  try:
    for key, split in wanted:
      source = builder.as_data_source(split=split)
      parts[key] = _examples(dataset, size, source, keys)
      if parts[key].labels.min() < 0:
        raise ConfigError(f"data.{key}={split!r}: {dataset} has no labels there; choose another split")
  except BanError:
    raise
  except NotImplementedError as error:
    raise _unreadable_format(dataset, builder) from error
  except Exception as error:  # what a broken file raises depends on which file it is
    raise _damaged(dataset, builder.data_dir, error) from error
  shapes = [part.images.shape[1:] for part in parts.values()]
  for other in shapes[1:]:
    if other != shapes[0]:
      raise _sizes_differ(dataset, shapes[0], other)
  make_read_only(list(parts.values()))  # every subset of the data set shares them
  return parts, num_classes


class Prepared:
  """A split of a prepared set as a source of encoded images, whose records are read one by one, in the files' order.

  Its `identity` is that of the files: their names, sizes, and the records that are taken of each.
  """

  def __init__(self, dataset: str, root: pathlib.Path, split: str):
    self.made_of = dataset, root, split
    builder = _find(dataset, root) or _prepare(dataset, root)
    (image, _), _ = _features(dataset, builder.info)
    try:
      self.source = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
      raise _unreadable_format(dataset, builder) from error
    except Exception as error:
      raise _damaged(dataset, builder.data_dir, error) from error
    parts = builder.info.splits[split].file_instructions
    files = [(os.path.basename(part.filename), os.path.getsize(part.filename), part.skip, part.take) for part in parts]
    listed = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    self.identity = {"set": builder.info.full_name, "split": split, "files": len(files), "sha256": listed}

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, number: int) -> Mapping[str, Any]:
    return self.source[number]

  def __reduce__(self):
    return Prepared, self.made_of


class Known(NamedTuple):
  """What is known of a set before its images are read."""

  root: pathlib.Path
  keys: tuple[str, str]  # of an image and its class
  num_classes: int
  shape: tuple[int | None, ...]  # [H, W, C] of an image, None where images differ
  sizes: Mapping[str, int]  # examples of each split that is wanted, by its key


def look(dataset: str, wanted: Splits, directory: str) -> Known:
  """Returns what is known of a set, which is prepared if it is not there; raises as `read` does."""
  _parse(dataset)
  root = tfds_files.find_root(dataset, directory)
  with tfds_files.looking_into(dataset, root):
    builder = _find(dataset, root) or _prepare(dataset, root)
    keys, num_classes = _features(dataset, builder.info)
    _check_splits(dataset, builder.info, dict(wanted))
    sizes = {key: builder.info.splits[split].num_examples for key, split in wanted}
    return Known(root, keys, num_classes, builder.info.features[keys[0]].shape, sizes)


def _parse(dataset: str) -> tuple[str, dict[str, str]]:
  """Returns the name of a set in TFDS, and its configuration and version as far as they are given."""
  try:
    name, given = naming.parse_builder_name_kwargs(dataset)
  except ValueError:
    name, given = None, {}
  if name is None or name.namespace or not given.keys() <= {"config", "version"}:
    raise ConfigError(f"data.dataset={dataset!r}: expected NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION")
  return name.name, given


def _find(dataset: str, root: pathlib.Path) -> tfds.core.DatasetBuilder | None:
  """Returns the set that is prepared under `root`, or None."""
  try:
    return read_only_builder.builder_from_files(dataset, data_dir=root)  # by tfds.builder, TFDS may look further
  except registered.DatasetNotFoundError:
    return None
  except Exception as error:  # such as a broken dataset_info.json
    raise _damaged(dataset, root / _parse(dataset)[0], error) from error


def _features(dataset: str, info: tfds.core.DatasetInfo) -> tuple[tuple[str, str], int]:
  """Returns the names of the features that hold an image and its class, and the number of classes."""
  features = dict(info.features.items()) if isinstance(info.features, tfds.features.FeaturesDict) else {}
  for keys in (info.supervised_keys, ("image", "label")):
    image, label = [features.get(key) for key in keys] if keys and len(keys) == 2 else (None, None)
    if isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel) and label.num_classes:
      if image.np_dtype != np.uint8:
        raise ConfigError(f"data.dataset={dataset!r}: expected images of uint8, not of {np.dtype(image.np_dtype)}")
      return tuple(keys), label.num_classes
  found = choices(f"{key} ({type(feature).__name__})" for key, feature in features.items())
  raise ConfigError(
    f"data.dataset={dataset!r} is no image classification set: expected an Image and a ClassLabel, and its features"
    f" are {found or type(info.features).__name__}"
  )


def _check_splits(dataset: str, info: tfds.core.DatasetInfo, wanted: Mapping[str, str]) -> None:
  """Raises ConfigError for splits that the set does not have, or that have examples in common."""
  parts: list[tuple[str, str, int, int]] = []
  for key, split in wanted.items():
    try:
      ranges = tfds.core.ReadInstruction.from_spec(split).to_absolute(dict(info.splits.items()))
    except ValueError as error:
      raise ConfigError(
        f"data.{key}={split!r}: {dataset} has the splits {choices(info.splits)}; a part of one is written as"
        " train[:80%] or train[80%:]"
      ) from error
    before = len(parts)
    for part in ranges:
      first, end = part.from_ or 0, info.splits[part.splitname].num_examples if part.to is None else part.to
      if first < end:
        parts.append((key, part.splitname, first, end))
    if len(parts) == before:
      raise ConfigError(f"data.{key}={split!r}: {dataset} has no example there")
  for (one, split, first, end), (other, name, start, stop) in itertools.combinations(parts, 2):
    if split == name and max(first, start) < min(end, stop):
      raise ConfigError(
        f"data.{one}={wanted[one]!r} and data.{other}={wanted[other]!r} have examples of {dataset} in common; expected"
        " splits without overlap, such as train[:80%] and train[80%:]"
      )


def _examples(dataset: str, size: int, source: Sequence[Any], keys: tuple[str, str]) -> Examples:
  image_key, label_key = keys
  images: Any = None
  form = decoding.Form(size, "whole", 3)
  labels, ordered = np.empty(len(source), np.int32), []
  for i, example in enumerate(tfds_files.examples(source)):
    image = decoding.pixels(example[image_key], form)
    if images is None:
      images = np.empty((len(source), *image.shape), np.uint8)
    if image.shape != images.shape[1:]:
      raise _sizes_differ(dataset, images.shape[1:], image.shape)
    images[i], labels[i] = image, example[label_key]
    ordered.append((hashlib.sha256(images[i]).digest(), labels[i], i))
  # The files' order is shuffled, and depends on TFDS's version and the number of shards, and not every set has ids. The
  # order of the pixels' digests is the same wherever the set was prepared, so that a seed means the same mini-batches.
  order = [i for _, _, i in sorted(ordered)]
  return Examples(images[order], labels[order])


def _prepare(dataset: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
  """Downloads and prepares a set under `root` by TFDS's own code; if another process does it, this one waits."""
  name, given = _parse(dataset)
  known = tfds.list_builders(with_community_datasets=False)
  if name not in known and (there := _prepared(name, root)):
    raise ConfigError(f"data.dataset={dataset!r}: {root} has another of that name; expected one of: {choices(there)}")
  if name not in known:
    prepared = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    close = difflib.get_close_matches(name, {*known, *prepared})
    raise ConfigError(
      f"data.dataset={dataset!r}: TFDS has no such set, and none is prepared in {root}; "
      + (f"is it one of: {choices(close)}?" if close else "https://www.tensorflow.org/datasets/catalog lists all")
    )
  try:
    builder = tfds.builder_cls(name)(data_dir=root, **given)
    _features(dataset, builder.info)
  except BanError:
    raise
  except (ValueError, AssertionError) as error:  # an unknown configuration, another version than the code's
    raise ConfigError(f"data.dataset={dataset!r}: {tfds_files.brief(error)}") from error
  except Exception as error:
    raise _not_prepared(dataset, root, error) from error
  try:
    with tfds_files.lock(root, name), tfds_files.few_retries():
      if not _find(dataset, root):
        builder.download_and_prepare(
          file_format="array_record", download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
  except Exception as error:  # no network, a full disk, an archive to be supplied by hand, code that needs TensorFlow
    raise _not_prepared(dataset, root, error) from error
  return _find(dataset, root) or builder


def _prepared(name: str, root: pathlib.Path) -> list[str]:
  """Returns the configurations and versions of a set that are prepared under `root`, as NAME/CONFIG:VERSION."""
  found = [path.parent.relative_to(root).parts for path in (root / name).glob("**/dataset_info.json")]
  return ["/".join(parts[:-1]) + f":{parts[-1]}" for parts in found]


def _not_prepared(dataset: str, root: pathlib.Path, error: Exception) -> DataError:
  command = (
    f'python -c "import tensorflow_datasets as tfds; tfds.builder({dataset!r}, data_dir=DIRECTORY)'
    ".download_and_prepare(file_format='array_record')\""
  )
  if isinstance(error, ImportError) and "tensorflow" in str(error):
    reason, where = "TFDS prepares it with TensorFlow, which is not installed", "where TensorFlow is installed"
  else:
    reason, where = f"TFDS cannot prepare it there ({tfds_files.brief(error)})", "where that works"
  return DataError(
    f"{dataset}: it is not prepared in {root}, and {reason}. Prepare it {where} by {command}, and set data.dir to that"
    " directory"
  )


def _unreadable_format(dataset: str, builder: tfds.core.DatasetBuilder) -> DataError:
  prepared = pathlib.Path(builder.data_dir)
  copy = pathlib.Path("OTHER", *builder.info.full_name.split("/"))
  return DataError(
    f"{dataset}: {prepared} is prepared as {builder.info.file_format.value}, which cannot be read without TensorFlow;"
    f" expected array_record or parquet. Copy it to {copy}, run `tfds convert_format --dataset_version_dir={copy}"
    " --out_file_format=array_record` where tensorflow, apache-beam and mlcroissant are installed, which adds files to"
    " the copy, and set data.dir=OTHER"
  )


def _damaged(dataset: str, prepared: object, error: Exception) -> DataError:
  return DataError(
    f"{dataset}: the prepared data set in {prepared} cannot be read ({tfds_files.brief(error)}). If it is damaged,"
    " prepare it again in another directory and set data.dir to that"
  )


def _sizes_differ(dataset: str, one: tuple[int, ...], other: tuple[int, ...]) -> ConfigError:
  sizes = " and of ".join(f"{height}x{width}" for height, width, _ in (one, other))
  return ConfigError(
    f"data.size=0: {dataset} has images of {sizes} pixels; expected the size to which all are resized, such as 32"
  )

"""Preparing and reading CIFAR-10 and CIFAR-100 through TensorFlow Datasets (TFDS), without TensorFlow.

A directory that the stock builder prepared (as array_record) is read as it is. If there is none, it is prepared from
the original binary archive, with the stock builder's names, version, features and ids, so that the stock builder reads
it too. The stock builder itself cannot prepare it without TensorFlow.
"""

import functools
import hashlib
import logging
import os
import pathlib
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import requests
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.core.download import checksums

from ban_jax.data import tfds_files
from ban_jax.data.arrays import make_read_only
from ban_jax.data.images import Examples
from ban_jax.errors import DataError

logger = logging.getLogger(__name__)

VERSION = "3.0.2"
CONNECT_SECONDS = 5  # after which a server that does not answer counts as not reached


class Labels(NamedTuple):
  """One byte at the start of every row of an archive: a class, and the file that lists the classes' names."""

  feature: str
  names_file: str
  count: int  # type: ignore[assignment]  # tuple has a method of this name


class Archive(NamedTuple):
  """The original archive: rows of label bytes followed by 32x32 red, green and blue planes."""

  file: str
  url: str
  size: int  # bytes
  sha256: str
  labels: tuple[Labels, ...]
  splits: Mapping[str, tuple[str, ...]]


ARCHIVES = {
  "cifar10": Archive(
    file="cifar-10-binary.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    labels=(Labels("label", "batches.meta.txt", 10),),
    splits={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
  ),
  "cifar100": Archive(
    file="cifar-100-binary.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    size=168_513_733,
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    labels=(Labels("coarse_label", "coarse_label_names.txt", 20), Labels("label", "fine_label_names.txt", 100)),
    splits={"train": ("train.bin",), "test": ("test.bin",)},
  ),
}


class Contents(NamedTuple):
  """What an archive holds, checked."""

  sha256: str
  names: Mapping[str, list[str]]  # of each label feature
  rows: Mapping[str, UInt8[np.ndarray, "N row"]]  # of each split: label bytes, then the image's planes


def read(name: str, directory: str) -> dict[str, Examples]:
  """Returns the "train" and "test" examples in the archive's order; prepares the data set first if necessary.

  `directory` "" is TFDS's default, $TFDS_DATA_DIR or ~/tensorflow_datasets. Raises DataError, with a remedy, if the
  data set can neither be read nor prepared.
  """
  root = tfds_files.find_root(name, directory)
  with tfds_files.looking_into(name, root):
    return _read(name, root)


@functools.lru_cache(maxsize=2)  # several subsets of a data set decode it once
def _read(name: str, root: pathlib.Path) -> dict[str, Examples]:
  if not _is_prepared(name, root):
    prepare(name, root)
  prepared, file_format = _prepared_directory(name, root), None
  try:
    builder = tfds.builder_from_directory(prepared)  # reads local files only; by name TFDS may look further
    file_format = builder.info.file_format.value
    return {split: _read_split(builder, split) for split in ("train", "test")}
  except NotImplementedError as error:
    raise DataError(
      f"{name}: {prepared} is prepared as {file_format}, which cannot be read without TensorFlow;"
      f" expected array_record. Set data.dir to another directory, and it is prepared there from {ARCHIVES[name].file}"
    ) from error
  except Exception as error:  # what a broken file raises depends on which file it is
    raise DataError(
      f"{name}: the prepared data set in {prepared} cannot be read ({tfds_files.brief(error)}). Move that directory"
      f" away, and it is prepared again from {ARCHIVES[name].file}"
    ) from error


def _read_split(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
  source = builder.as_data_source(split=split)
  images, labels, ids = np.empty((len(source), 32, 32, 3), np.uint8), np.empty(len(source), np.int32), []
  for i, example in enumerate(tfds_files.examples(source)):
    images[i], labels[i] = example["image"], example["label"]
    ids.append(example["id"])
  # The files' order is shuffled, and depends on TFDS's version and the number of shards. The ids restore the archive's,
  # so that a seed means the same mini-batches, and a digest the same data, wherever they were prepared.
  order = sorted(range(len(ids)), key=ids.__getitem__)
  examples = Examples(images[order], labels[order])
  make_read_only(examples)  # every subset of the data set shares it
  return examples


def prepare(name: str, root: pathlib.Path) -> None:
  """Prepares the data set under `root` from its archive, which is downloaded if it is not there.

  If another process prepares it, this one waits. What a killed process left is removed and never read: the data set
  gets its name only when it is complete. Raises DataError.
  """
  archive = find_archive(name, root)
  if archive is None:
    _check_reachable(name, root)  # before any directory is made
  prepared = _prepared_directory(name, root)
  staging = prepared.parent / "incomplete.ban_jax"
  try:
    with tfds_files.lock(root, name):
      if _is_prepared(name, root):
        return
      shutil.rmtree(staging, ignore_errors=True)
      try:
        contents = unpack(name, archive or _download(name, root, staging))
        builder = BUILDERS[name](data_dir=staging, contents=contents)
        builder.download_and_prepare(
          file_format="array_record",
          download_dir=staging / "downloads",
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
        os.rename(builder.data_dir, prepared)  # all or nothing
      except OSError:
        if not _is_prepared(name, root):  # otherwise a program without our lock, perhaps TFDS itself, was faster
          raise
      finally:
        shutil.rmtree(staging, ignore_errors=True)
  except DataError:
    raise
  except Exception as error:  # a full disk is an OSError here and something else in the record writer
    raise DataError(f"{name}: cannot prepare the data set in {root}: {tfds_files.brief(error)}") from error


def find_archive(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the archive that is under `root`, or None."""
  return next((path for path in _archive_places(name, root) if path.is_file()), None)


def unpack(name: str, archive: pathlib.Path) -> Contents:
  """Returns what the archive holds, each row a label byte or two and 3,072 bytes of image.

  An archive supplied by the user need not be the official one: another is accepted with a warning. Raises DataError if
  it is broken or its files are not such rows.
  """
  official = ARCHIVES[name]
  wanted = {label.names_file for label in official.labels}.union(*official.splits.values())
  advice = f"Replace {archive} by the file from {official.url}"
  found = {}
  try:
    with tarfile.open(archive, "r:gz") as tar:
      for member in tar:
        file = pathlib.PurePosixPath(member.name).name
        if file in wanted and (content := tar.extractfile(member)):  # None: a directory of this name
          found[file] = content.read()
  except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
    raise DataError(f"{name}: {archive} is truncated or broken ({tfds_files.brief(error)}). {advice}") from error
  if missing := sorted(wanted - set(found)):
    raise DataError(f"{name}: {archive} does not hold {', '.join(missing)}. {advice}")

  names = {}
  for label in official.labels:
    names[label.feature] = [line for line in found[label.names_file].decode().splitlines() if line]
    if len(set(names[label.feature])) != label.count:
      raise DataError(
        f"{name}: {label.names_file} in {archive} names {len(set(names[label.feature]))} classes, expected"
        f" {label.count}. {advice}"
      )
  length = len(official.labels) + 32 * 32 * 3
  rows = {}
  for split, files in official.splits.items():
    for file in files:
      if not found[file] or len(found[file]) % length:
        raise DataError(
          f"{name}: {file} in {archive} has {len(found[file])} bytes, expected whole rows of {length} bytes. {advice}"
        )
    rows[split] = np.frombuffer(b"".join(found[file] for file in files), np.uint8).reshape(-1, length)
    for column, label in enumerate(official.labels):
      if (largest := rows[split][:, column].max()) >= label.count:
        raise DataError(
          f"{name}: {archive} has a {label.feature} of {largest} in {split}, expected less than {label.count}. {advice}"
        )

  with open(archive, "rb") as opened:
    sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
  if sha256 != official.sha256:
    logger.warning(
      "%s: %s is not the official archive (SHA-256 %s); preparing the %d training and %d test images it holds",
      name, archive, sha256, len(rows["train"]), len(rows["test"]),
    )  # fmt: skip
  return Contents(sha256, names, rows)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no annotations
  """Writes what the stock builder of the same name writes, from an unpacked archive."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, *, contents: Contents, **kwargs: Any):
    self._contents = contents  # first, since the base class calls `_info`
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    labels = {key: tfds.features.ClassLabel(names=names) for key, names in self._contents.names.items()}
    features = {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3)), **labels}
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      supervised_keys=("image", "label"),
      homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
      metadata=tfds.core.MetadataDict(archive_sha256=self._contents.sha256),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
    del dl_manager
    return {split: self._generate_examples(split) for split in self._contents.rows}

  def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    features = [label.feature for label in ARCHIVES[self.name].labels]
    for i, row in enumerate(self._contents.rows[split]):
      labels, planes = row[: len(features)], row[len(features) :]
      image = planes.reshape(3, 32, 32).transpose(1, 2, 0)  # [32, 32, 3]
      # TFDS encodes an array with TensorFlow, and a PIL image without.
      example = {"id": f"{split}_{i:05d}", "image": Image.fromarray(np.ascontiguousarray(image))}
      yield i, example | dict(zip(features, labels.tolist(), strict=True))


# TFDS names a data set after its class. In its registry these names belong to the stock builders, so ours stay out.
class Cifar10(_Builder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no annotations
  """CIFAR-10."""


class Cifar100(_Builder, skip_registration=True):  # type: ignore[call-arg]  # TFDS has no annotations
  """CIFAR-100."""


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100}


def _prepared_directory(name: str, root: pathlib.Path) -> pathlib.Path:
  return root / name / VERSION


def _is_prepared(name: str, root: pathlib.Path) -> bool:
  return _prepared_directory(name, root).is_dir()


def _archive_places(name: str, root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  return root / "downloads" / "manual" / ARCHIVES[name].file, root / ARCHIVES[name].file


def _not_reached(name: str, root: pathlib.Path, reason: str) -> DataError:
  official, (place, other) = ARCHIVES[name], _archive_places(name, root)
  return DataError(
    f"{name}: no prepared data set in {_prepared_directory(name, root)}, no archive at {place} or {other}, and"
    f" {official.url} cannot be downloaded: {reason}. Put {official.file} from that address at {place} and run again,"
    " or set data.dir to a directory where the data set is prepared"
  )


def _check_reachable(name: str, root: pathlib.Path) -> None:
  """Raises DataError within seconds if the archive's server does not answer, or not with the archive."""
  try:
    with requests.get(ARCHIVES[name].url, stream=True, timeout=CONNECT_SECONDS) as response:
      response.raise_for_status()
  except requests.RequestException as error:
    raise _not_reached(name, root, tfds_files.brief(error)) from error


def _download(name: str, root: pathlib.Path, staging: pathlib.Path) -> pathlib.Path:
  """Downloads the archive to its place under `root` and returns its path; raises DataError if it is not the official.

  It is downloaded into `staging`, so that nothing incomplete ever has the archive's name.
  """
  official, place = ARCHIVES[name], _archive_places(name, root)[0]
  logger.info("%s: downloading %s (%d MB) to %s", name, official.url, official.size // 10**6, place)
  try:
    info = checksums.UrlInfo(size=official.size, checksum=official.sha256, filename=official.file)
    manager = tfds.download.DownloadManager(
      download_dir=staging / "downloads", url_infos={official.url: info}, force_checksums_validation=True
    )
    with tfds_files.few_retries():
      downloaded = pathlib.Path(manager.download(official.url))
  except Exception as error:  # those of requests, and TFDS's own if the checksum differs
    raise _not_reached(name, root, tfds_files.brief(error)) from error
  place.parent.mkdir(parents=True, exist_ok=True)
  os.rename(downloaded, place)
  return place

"""CIFAR-10 and CIFAR-100 through TensorFlow Datasets, with no need of TensorFlow.

A directory that the stock builder prepared (as array_record) is read as it is. Where there is none, the original binary
archive is prepared into one that the stock builder reads in its turn: same names, version, features and ids. The stock
builder itself cannot do that without TensorFlow.
"""

import contextlib
import fcntl
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
from tensorflow_datasets.core.download import checksums, downloader

from ban_jax.data.images import Examples
from ban_jax.errors import DataError

logger = logging.getLogger(__name__)

VERSION = "3.0.2"
# Without a network TFDS would try in silence for three and a half minutes.
CONNECT_SECONDS = 5
RETRIES = 2


class Labels(NamedTuple):
  """One byte at the start of every row of the archive: a class and where its names stand."""

  feature: str
  names_file: str
  count: int


class Source(NamedTuple):
  """The original archive: rows of label bytes followed by 32x32 red, green and blue planes."""

  archive: str
  url: str
  size: int  # bytes
  sha256: str
  labels: tuple[Labels, ...]
  splits: Mapping[str, tuple[str, ...]]


SOURCES = {
  "cifar10": Source(
    archive="cifar-10-binary.tar.gz",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    size=170_052_171,
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    labels=(Labels("label", "batches.meta.txt", 10),),
    splits={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
  ),
  "cifar100": Source(
    archive="cifar-100-binary.tar.gz",
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
  """Returns the "train" and "test" examples, in the archive's order, and prepares them first where that is needed.

  `directory` "" is TensorFlow Datasets' default. Raises DataError, saying what to do, where the data set is neither
  prepared nor can be, or is prepared in another format or broken, and where the directory cannot be looked into.
  """
  root = pathlib.Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  advice = "Set data.dir to another directory"
  try:
    root = root.expanduser().absolute()
  except RuntimeError as error:
    raise DataError(f"{name}: {root}: {_brief(error)}. {advice}") from error
  try:
    return _read(name, root)
  except OSError as error:  # of the questions what is there; what is opened has messages of its own
    raise DataError(f"{name}: {root} cannot be looked into: {_brief(error)}. {advice}") from error


@functools.lru_cache(maxsize=2)  # subsets of one data set in one process: decoded once
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
      f" expected array_record. Set data.dir to another directory, or delete this one and it is prepared again from"
      f" {SOURCES[name].archive}"
    ) from error
  except Exception as error:  # what a broken file raises depends on which file it is
    raise DataError(
      f"{name}: the prepared data set in {prepared} cannot be read ({_brief(error)}). Delete that directory and it is"
      f" prepared again from {SOURCES[name].archive}"
    ) from error


def _read_split(builder: tfds.core.DatasetBuilder, split: str) -> Examples:
  source = builder.as_data_source(split=split)
  images, labels, ids = np.empty((len(source), 32, 32, 3), np.uint8), np.empty(len(source), np.int32), []
  for start in range(0, len(source), 1000):  # one by one takes twice as long, all at once needs memory for all
    stop = min(start + 1000, len(source))
    for i, example in enumerate(source.__getitems__(range(start, stop)), start):
      images[i], labels[i] = example["image"], example["label"]
      ids.append(example["id"])
  # Files are in a shuffled order that TFDS's version and number of shards may change. The ids give back the archive's,
  # so that a seed means the same mini-batches and a digest the same data wherever they were prepared.
  order = sorted(range(len(ids)), key=ids.__getitem__)
  examples = Examples(images[order], labels[order])
  for array in examples:
    array.setflags(write=False)  # shared by every data set that is cut out of it
  return examples


def prepare(name: str, root: pathlib.Path) -> None:
  """Prepares the data set under `root` from its archive, which is downloaded if it is not there.

  Another process that does the same is waited for. What a killed one left behind is removed and never read: the data
  set gets its name only when it is complete. Raises DataError.
  """
  archive = find_archive(name, root)
  if archive is None:
    _check_reachable(name, root)  # before any directory is made
  prepared = _prepared_directory(name, root)
  staging = prepared.parent / "incomplete.ban_jax"
  try:
    with _lock(root, name):
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
        if not _is_prepared(name, root):  # else somebody without our lock, perhaps TFDS itself, was faster
          raise
      finally:
        shutil.rmtree(staging, ignore_errors=True)
  except DataError:
    raise
  except Exception as error:  # a full disk, for one, is an OSError here and something else in the record writer
    raise DataError(f"{name}: cannot prepare the data set in {root}: {_brief(error)}") from error


def find_archive(name: str, root: pathlib.Path) -> pathlib.Path | None:
  """Returns the archive that was put under `root`, or None."""
  return next((path for path in _archive_places(name, root) if path.is_file()), None)


def unpack(name: str, archive: pathlib.Path) -> Contents:
  """Returns what the archive holds, each row a label byte or two and 3,072 bytes of image.

  An archive that somebody put in place need not be the official one: it is taken for what it holds, with a warning.
  Raises DataError where it is broken or its files are not such rows.
  """
  source = SOURCES[name]
  wanted = {file for files in source.splits.values() for file in files} | {spec.names_file for spec in source.labels}
  advice = f"Replace {archive} by the file from {source.url}"
  found = {}
  try:
    with tarfile.open(archive, "r:gz") as tar:
      for member in tar:
        file = pathlib.PurePosixPath(member.name).name
        if member.isfile() and file in wanted:
          found[file] = tar.extractfile(member).read()
  except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
    raise DataError(f"{name}: {archive} is truncated or broken ({_brief(error)}). {advice}") from error
  if missing := sorted(wanted - set(found)):
    raise DataError(f"{name}: {archive} does not hold {', '.join(missing)}. {advice}")

  names = {}
  for spec in source.labels:
    names[spec.feature] = [line for line in found[spec.names_file].decode().splitlines() if line]
    if len(set(names[spec.feature])) != spec.count:
      raise DataError(
        f"{name}: {spec.names_file} in {archive} names {len(set(names[spec.feature]))} classes, expected {spec.count}."
        f" {advice}"
      )
  length = len(source.labels) + 32 * 32 * 3
  rows = {}
  for split, files in source.splits.items():
    for file in files:
      if not found[file] or len(found[file]) % length:
        raise DataError(
          f"{name}: {file} in {archive} has {len(found[file])} bytes, expected whole rows of {length} bytes. {advice}"
        )
    rows[split] = np.frombuffer(b"".join(found[file] for file in files), np.uint8).reshape(-1, length)
    for column, spec in enumerate(source.labels):
      if (largest := rows[split][:, column].max()) >= spec.count:
        raise DataError(
          f"{name}: {archive} has a {spec.feature} of {largest} in {split}, expected less than {spec.count}. {advice}"
        )

  sha256 = _sha256(archive)
  if sha256 != source.sha256:
    logger.warning(
      "%s: %s is not the official archive (SHA-256 %s); preparing the %d training and %d test images it holds",
      name, archive, sha256, len(rows["train"]), len(rows["test"]),
    )  # fmt: skip
  return Contents(sha256, names, rows)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes what the stock builder of the same name writes, from an archive that is unpacked already."""

  VERSION = tfds.core.Version(VERSION)

  def __init__(self, *, contents: Contents, **kwargs: Any):
    self._contents = contents  # before the rest, which asks for `_info`
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
    features = [spec.feature for spec in SOURCES[self.name].labels]
    for i, row in enumerate(self._contents.rows[split]):
      labels, planes = row[: len(features)], row[len(features) :]
      image = planes.reshape(3, 32, 32).transpose(1, 2, 0)  # [32, 32, 3]
      # An array would be encoded by TensorFlow, a PIL image is not.
      example = {"id": f"{split}_{i:05d}", "image": Image.fromarray(np.ascontiguousarray(image))}
      yield i, example | dict(zip(features, labels.tolist(), strict=True))


# TFDS takes a data set's name from its class. They stay out of its registry, where the stock builders have these names.
class Cifar10(_Builder, skip_registration=True):
  """CIFAR-10."""


class Cifar100(_Builder, skip_registration=True):
  """CIFAR-100."""


BUILDERS = {"cifar10": Cifar10, "cifar100": Cifar100}


def _prepared_directory(name: str, root: pathlib.Path) -> pathlib.Path:
  return root / name / VERSION


def _is_prepared(name: str, root: pathlib.Path) -> bool:
  return _prepared_directory(name, root).is_dir()


def _archive_places(name: str, root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  return root / "downloads" / "manual" / SOURCES[name].archive, root / SOURCES[name].archive


@contextlib.contextmanager
def _lock(root: pathlib.Path, name: str) -> Iterator[None]:
  """Holds the right to prepare `name` under `root`; the system gives it back when the process ends, however it ends."""
  (root / name).mkdir(parents=True, exist_ok=True)
  with open(root / f".{name}.lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      logger.info("%s: another process is preparing it in %s; waiting", name, root)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _not_reached(name: str, root: pathlib.Path, reason: str) -> DataError:
  source, (place, other) = SOURCES[name], _archive_places(name, root)
  return DataError(
    f"{name}: no prepared data set in {_prepared_directory(name, root)}, no archive at {place} or {other}, and"
    f" {source.url} cannot be had: {reason}. Put {source.archive} from that address at {place} and run again, or set"
    " data.dir to a directory where the data set is prepared"
  )


def _check_reachable(name: str, root: pathlib.Path) -> None:
  """Raises DataError within seconds where the archive's server does not answer, or not with the archive."""
  try:
    with requests.get(SOURCES[name].url, stream=True, timeout=CONNECT_SECONDS) as response:
      response.raise_for_status()
  except requests.RequestException as error:
    raise _not_reached(name, root, _brief(error)) from error


def _download(name: str, root: pathlib.Path, staging: pathlib.Path) -> pathlib.Path:
  """Downloads the archive to its place under `root` and returns that; raises DataError if it is not the official one.

  It goes through `staging`, so that nothing half-downloaded ever has the archive's name.
  """
  source, place = SOURCES[name], _archive_places(name, root)[0]
  logger.info("%s: downloading %s (%d MB) to %s", name, source.url, source.size // 10**6, place)
  retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, RETRIES
  try:
    info = checksums.UrlInfo(size=source.size, checksum=source.sha256, filename=source.archive)
    manager = tfds.download.DownloadManager(
      download_dir=staging / "downloads", url_infos={source.url: info}, force_checksums_validation=True
    )
    downloaded = pathlib.Path(manager.download(source.url))
  except Exception as error:  # TFDS lets through what requests raises, and its own where the checksum differs
    raise _not_reached(name, root, _brief(error)) from error
  finally:
    downloader.MAX_RETRIES = retries
  place.parent.mkdir(parents=True, exist_ok=True)
  os.rename(downloaded, place)
  return place


def _sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _brief(error: BaseException) -> str:
  """Returns an error as one short line; TFDS's messages can list every data set there is."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

"""What data sets kept by TensorFlow Datasets (TFDS) share: their directory, the lock of a preparation, reading."""

import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from tensorflow_datasets.core.download import downloader

from ban_jax import processes
from ban_jax.errors import DataError

logger = logging.getLogger(__name__)

# Without a network TFDS would retry silently for three and a half minutes.
RETRIES = 2
CHUNK = 1000  # reading one by one takes twice as long, all at once needs memory for all


def find_root(name: str, directory: str) -> pathlib.Path:
  """Returns the absolute directory of all data sets; "" is TFDS's default, $TFDS_DATA_DIR or ~/tensorflow_datasets.

  Raises DataError, with the data set's name, for a home directory that does not exist.
  """
  root = pathlib.Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  try:
    return root.expanduser().absolute()
  except RuntimeError as error:
    raise DataError(f"{name}: {root}: {brief(error)}. Set data.dir to another directory") from error


@contextlib.contextmanager
def looking_into(name: str, root: pathlib.Path) -> Iterator[None]:
  """Turns an OSError of the existence checks into a DataError; reading and preparing have messages of their own."""
  try:
    yield
  except OSError as error:
    raise DataError(
      f"{name}: {root} cannot be looked into: {brief(error)}. Set data.dir to another directory"
    ) from error


@contextlib.contextmanager
def lock(root: pathlib.Path, name: str) -> Iterator[None]:
  """Holds the lock for preparing `name` under `root`; the system releases it when the process ends, however it ends."""
  (root / name).mkdir(parents=True, exist_ok=True)
  with open(root / f".{name}.lock", "w", encoding="utf-8") as file:
    try:
      locked = processes.lock_file(file, wait=False)
    except BlockingIOError:
      logger.info("%s: another process is preparing it in %s; waiting", name, root)
      locked = processes.lock_file(file, wait=True)
    if not locked:
      logger.warning("%s: the file system of %s has no locks; make sure that no other process prepares it", name, root)
    yield


@contextlib.contextmanager
def few_retries() -> Iterator[None]:
  """Makes TFDS's downloads fail soon where there is no network."""
  retries, downloader.MAX_RETRIES = downloader.MAX_RETRIES, RETRIES
  try:
    yield
  finally:
    downloader.MAX_RETRIES = retries


def examples(source: Any) -> Iterator[dict[str, Any]]:
  """Yields the decoded examples of a TFDS data source, in its files' order."""
  for start in range(0, len(source), CHUNK):
    yield from source.__getitems__(range(start, min(start + CHUNK, len(source))))


def brief(error: BaseException) -> str:
  """Returns an error as one short line; TFDS's messages can list every data set it knows."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

"""Files that are written whole, and the errors of disks: a full or failing disk, or a damaged file."""

import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from ban_jax.errors import BanError, StorageError, first_line
from ban_jax.trees import standard

# How a file is called until it is whole.
PARTIAL = ".partial"


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file such that a reader finds the old file or the whole new one, never a part."""
  partial = path.parent / f".{uuid.uuid4().hex}{PARTIAL}"  # of this writer: another one's would be torn
  try:
    partial.write_bytes(content)
    partial.replace(path)
  except BaseException:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)
    raise


def remove_partial(directory: epath.Path, seconds: float = 0.0) -> None:
  """Removes what writers that were killed have left in a directory: what nobody has written to for so long."""
  for path in directory.iterdir():
    if path.name.startswith(".") and path.name.endswith(PARTIAL):
      with contextlib.suppress(FileNotFoundError):  # of another process, which is about to finish
        if seconds <= 0 or time.time() - path.stat().mtime > seconds:
          path.unlink()


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as `trees.standard` JSON, whole or not at all."""
  text = json.dumps(standard(value), indent=2, sort_keys=True, allow_nan=False) + "\n"
  write_bytes(path, text.encode())


def read_json(path: epath.Path) -> Any:
  """Returns what a JSON file holds; raises a ValueError where it is none."""
  return json.loads(path.read_bytes())  # UTF-8, whatever the locale


def numbers(value: Any) -> Any:
  """Returns a record whose values are all numbers, as it was before `trees.standard`."""
  if isinstance(value, dict):
    return {key: numbers(part) for key, part in value.items()}
  if isinstance(value, list):
    return [numbers(part) for part in value]
  return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


@contextlib.contextmanager
def storage_errors(directory: epath.Path | None) -> Iterator[None]:
  """Turns the error of a full or failing disk below `directory` into a StorageError; None leaves errors as they are."""
  try:
    yield
  except BanError:
    raise
  except Exception as error:
    # Orbax's storage library reports a full disk as a ValueError with a status in its text.
    full = isinstance(error, ValueError) and re.search(r"RESOURCE_EXHAUSTED|Failed writing|No space left", str(error))
    if directory is None or not (full or isinstance(error, OSError)):
      raise
    raise storage_error(directory, error) from error


def storage_error(directory: epath.Path, error: Exception) -> StorageError:
  """Returns the error for a disk that is full or failing."""
  return StorageError(
    f"{directory} cannot be read or written: {first_line(error)}; the checkpoints before are intact, and the same "
    "command resumes from them once there is room"
  )


def damage(error: Exception) -> str:
  """Describes a damaged file by the error of reading it; raises the error again where the file may be sound."""
  missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
  failing = isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError) or "Gloo" in str(error)
  if failing and not missing:
    raise error
  return f"{type(error).__name__}: {first_line(error)}"

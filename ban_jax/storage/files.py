"""Files that are written whole, and the errors of disks: a full or failing disk, or a damaged file."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from ban_jax.errors import BanError, StorageError


def write_bytes(path: epath.Path, content: bytes) -> None:
  """Writes a file such that a reader finds the old file or the whole new one, never a part."""
  partial = path.parent / f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}.partial"  # as short as any
  partial.write_bytes(content)
  partial.replace(path)


def write_text(path: epath.Path, text: str) -> None:
  """Writes a text as UTF-8, whole or not at all."""
  write_bytes(path, text.encode())


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as `standard` JSON, whole or not at all."""
  write_text(path, json.dumps(standard(value), indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: epath.Path) -> Any:
  """Returns what a JSON file holds; raises a ValueError where it is none."""
  return json.loads(path.read_bytes())  # UTF-8, whatever the locale


def standard(value: Any) -> Any:
  """Returns a copy of a value as standard JSON can hold it.

  Standard JSON has no number that is not finite: such a number becomes "NaN", "Infinity" or "-Infinity", as in JSON
  made by Protocol Buffers. `numbers` reads them back.
  """
  if isinstance(value, Mapping):
    return {key: standard(part) for key, part in value.items()}
  if isinstance(value, list | tuple):
    return [standard(part) for part in value]
  return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def numbers(value: Any) -> Any:
  """Returns a record whose values are all numbers, as it was before `standard`."""
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
  """Returns what an error of reading says about a damaged file; raises it again where the file may be sound."""
  missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
  failing = isinstance(error, OSError | MemoryError | jax.errors.JaxRuntimeError) or "Gloo" in str(error)
  if failing and not missing:
    raise error
  return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
  """Returns an error's first line, cut short."""
  return (str(error) or type(error).__name__).splitlines()[0][:300]

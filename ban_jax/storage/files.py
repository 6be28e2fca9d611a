"""Files written whole, and what goes wrong with a disk, told apart: full or unreadable at the moment, or damaged."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ban_jax.errors import BanError, StorageError


def write_text(path: epath.Path, text: str) -> None:
  """Writes a file such that a reader finds the old file or the whole new one, never a part."""
  partial = path.parent / f".{path.name}.partial"
  partial.write_text(text)
  partial.replace(path)


def write_json(path: epath.Path, value: Any) -> None:
  """Writes a value as JSON, whole or not at all."""
  write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_lines(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes one JSON object a line, whole or not at all."""
  write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def storage_errors(directory: epath.Path | None) -> Iterator[None]:
  """Turns a failure to write below `directory` into a StorageError; None: nothing is written."""
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
  if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or "Gloo" in str(error) or is_passing(error):
    raise error
  return f"{type(error).__name__}: {first_line(error)}"


def is_passing(error: Exception) -> bool:
  """Returns whether an error says that the disk cannot be read at the moment, and not that a file is damaged."""
  missing = FileNotFoundError | NotADirectoryError | IsADirectoryError
  return isinstance(error, OSError) and not isinstance(error, missing)


def first_line(error: BaseException) -> str:
  """Returns an error's first line, cut short."""
  return (str(error) or type(error).__name__).splitlines()[0][:300]

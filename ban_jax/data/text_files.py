"""Text in files that the user supplies: found before anything is read, errors with the file's name and line."""

import os
import pathlib
from collections.abc import Mapping

from ban_jax.errors import ConfigError, DataError


def find(name: str, dir: str, files: Mapping[str, str], what: str) -> dict[str, pathlib.Path]:
  """Returns the paths of a data set's files in the directory `dir`; `what` they are is said in messages.

  Raises ConfigError if no directory is named, and DataError for files that are not there.
  """
  expected = (
    f"{name} is read from {', '.join(dict.fromkeys(files.values()))} in the directory that data.dir names; nothing is "
    f"downloaded: the files ({what}) have to be supplied by the user"
  )
  if not dir:
    raise ConfigError(f"data.dir={dir!r}: {expected}")
  paths = {split: pathlib.Path(os.path.expanduser(dir)) / file for split, file in files.items()}
  missing = [str(path) for path in dict.fromkeys(paths.values()) if _is_missing(path)]
  if missing:
    raise DataError(f"{name}: missing: {', '.join(missing)}; {expected}")
  return paths


def _is_missing(path: pathlib.Path) -> bool:
  """Returns whether there is no such file; if that is unknown the answer is no, and reading will report why."""
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file can have this name
    return True
  except OSError:
    return False
  return False


def read(name: str, path: pathlib.Path) -> bytes:
  """Returns a file's bytes; raises a DataError with its name."""
  try:
    return path.read_bytes()
  except OSError as error:
    raise DataError(f"{name}: {path} cannot be read: {error}") from error


def decoded(what: str, content: bytes) -> str:
  """Returns the text of UTF-8 with whichever system's line ends, without a mark; raises a DataError with the line."""
  try:
    text = content.decode("utf-8-sig")  # without the mark that some editors put first
  except UnicodeDecodeError as error:
    number = content[: error.start].count(b"\n") + 1
    raise DataError(f"{what}, line {number}: byte {content[error.start]:#04x} is not UTF-8") from error
  return one_line_end(text)


def one_line_end(text: str) -> str:
  """Returns a text whose lines end in one character, whichever system's they were."""
  return text.replace("\r\n", "\n").replace("\r", "\n")

"""Errors that a user can act on, and the checks that every module shares: registries and whole numbers."""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class BanError(Exception):
  """Base of the errors that need no traceback: the command line prints the message and exits with `exit_status`."""

  exit_status = 2  # a mistake that the user can correct


class ConfigError(BanError, ValueError):
  """A configuration, or a combination of its values, that cannot be run."""


class DataError(BanError, RuntimeError):
  """A data set that is missing, broken or does not fit what was asked of it."""


class CheckpointError(BanError, RuntimeError):
  """A run directory or parameter tree that does not belong to what was asked of it."""


class InUseError(CheckpointError):
  """A run directory that another process works on."""


class TrainingError(BanError, RuntimeError):
  """A training that diverged to numbers that are not finite."""

  exit_status = 3


class PeerError(BanError, RuntimeError):
  """A run of several processes that lost one of them; started again, all of them go on from the last checkpoint."""

  exit_status = 69  # EX_UNAVAILABLE


class StorageError(BanError, OSError):
  """A disk that is full or failing; what was saved before is intact. Rerun the command once there is room."""

  exit_status = 74  # EX_IOERR


class Preempted(BanError, RuntimeError):
  """A run asked to end by SIGTERM or Ctrl-C; what it had done is saved. Rerun the command to resume."""

  exit_status = 75  # EX_TEMPFAIL


def choices(names: Iterable[object]) -> str:
  """Returns the names as a sorted, comma-separated list for an error message."""
  return ", ".join(sorted(str(name) for name in names))


def look_up(registry: Mapping[str, T], name: str, what: str) -> T:
  """Returns `registry[name]`, or raises a ConfigError that names `what` was asked for and lists the choices."""
  if not isinstance(name, str) or name not in registry:
    given = repr(name) if name is None or isinstance(name, str) else f"(of type {type(name).__name__})"
    raise ConfigError(f"unknown {what} {given}; choose one of: {choices(registry)}")
  return registry[name]


def check_name(name: Any, use: str) -> None:
  """Raises a ConfigError for what cannot name something of the caller's; `use` says what the name does."""
  if not (isinstance(name, str) and name and name.isprintable()):
    raise ConfigError(f"name={name!r}: expected a printable word, because it {use}")


def check_flag(name: str, value: Any) -> bool:
  """Returns whether a value is true; raises a ConfigError for one that is neither true nor false, as an array."""
  try:
    return bool(value)
  except ValueError as error:
    raise ConfigError(f"{name}: expected True or False, not {type(value).__name__}") from error


def check_bool(name: str, value: Any) -> bool:
  """Returns True or False as a bool, NumPy's too; raises a ConfigError for anything else."""
  if not isinstance(value, bool | np.bool_):
    raise ConfigError(f"{name}={value!r}: expected True or False")
  return bool(value)


def check_whole(name: str, value: Any, least: int, note: str = "") -> int:
  """Returns a whole number of at least `least` as an int, NumPy's too; raises a ConfigError for anything else."""
  if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
    raise ConfigError(f"{name}={value!r}: expected a whole number of at least {least}{note}")
  return int(value)


def first_line(error: BaseException) -> str:
  """Returns an error's first line, cut short."""
  return (str(error) or type(error).__name__).splitlines()[0][:300]

"""Errors that a user can act on, and the one look-up that every registry shares."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class BanError(Exception):
  """Base of the errors whose message is the whole answer: the command line prints them without a traceback."""


class ConfigError(BanError, ValueError):
  """A configuration, or a combination of its values, that cannot be run."""


class DataError(BanError, RuntimeError):
  """A data set that is missing, broken or does not fit what was asked of it."""


class CheckpointError(BanError, RuntimeError):
  """A run directory or parameter tree that does not belong to what was asked of it."""


class TrainingError(BanError, RuntimeError):
  """A training that came to numbers that are not finite."""


def choices(names: Iterable[object]) -> str:
  """Returns the names as a sorted, comma-separated list for an error message."""
  return ", ".join(sorted(str(name) for name in names))


def look_up(registry: Mapping[str, T], name: str, what: str) -> T:
  """Returns `registry[name]`, or raises a ConfigError that names `what` was asked for and lists the choices."""
  if name not in registry:
    raise ConfigError(f"unknown {what} {name!r}; choose one of: {choices(registry)}")
  return registry[name]

"""Run directories: their names, and the checks that one belongs to this run, its configuration and its processes."""

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from ban_jax import config, processes
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.storage import lock
from ban_jax.storage.files import first_line, read_json, remove_partial, storage_error, write_json

# Seconds that a network file system may take to show one process what another has written.
VISIBLE_SECONDS = 5.0


def resolve_workdir(workdir: epath.PathLike, argument: str = "workdir") -> epath.Path:
  """Returns a run directory's full path, "~" resolved; raises a ConfigError for one that cannot be used.

  `argument` names it in messages.
  """
  if not isinstance(workdir, str | os.PathLike):
    raise ConfigError(f"{argument}={workdir!r}: expected a path, not {type(workdir).__name__}")
  if not str(workdir):
    raise ConfigError(f"the {argument} is empty; name the directory that the run is to be kept in")
  _check_scheme(str(workdir), argument)
  workdir = epath.Path(workdir).expanduser()
  workdir = workdir if "://" in str(workdir) else workdir.absolute()  # Orbax takes absolute paths only
  name = str(workdir)
  _check_scheme(name, argument)  # epath takes /s3/bucket for s3://bucket
  if "\0" in name or name.encode(errors="ignore").decode() != name:  # TensorStore takes names in UTF-8 only
    raise ConfigError(f"{argument} {name!r}: a name in UTF-8, without null bytes, is expected")
  return workdir


def _check_scheme(workdir: str, argument: str) -> None:
  scheme, separator, _ = workdir.partition("://")
  if separator and scheme != "gs":
    raise ConfigError(
      f"{argument} {workdir!r}: unknown storage {scheme + '://'!r}; give a local directory, or gs://..."
    )


@contextlib.contextmanager
def open_workdir(workdir: epath.PathLike, values: Mapping[str, Any]) -> Iterator[epath.Path]:
  """Creates a run directory, or opens one of the same configuration, and holds it; `values` is a config.record.

  Raises a CheckpointError where the directory holds another run, is held by another process (InUseError) or cannot be
  written; a StorageError where its disk is full; and a ConfigError where the processes of a run do not see the same
  directory.
  """
  workdir = resolve_workdir(workdir)
  with contextlib.ExitStack() as stack:
    with processes.together():
      if processes.is_primary():
        _claim(workdir, values, stack)
    _check_shared(workdir)
    yield workdir


def _claim(workdir: epath.Path, values: Mapping[str, Any], stack: contextlib.ExitStack) -> None:
  """Holds a run directory until the stack is closed, and records the configuration in it."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock.hold(workdir))
    remove_partial(workdir)
    _check_config(workdir, values)
    write_json(workdir / "config.json", values)
    if jax.process_count() > 1:
      write_json(workdir / "processes.json", {"token": uuid.uuid4().hex})
  except ImportError as error:  # the library that reaches a bucket
    raise ConfigError(f"workdir {workdir}: {first_line(error)} (pip install 'etils[epath-gcs]')") from error
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise storage_error(workdir, error) from error
    raise CheckpointError(f"workdir {workdir} cannot be written: {error}") from error


def _check_shared(workdir: epath.Path) -> None:
  """Raises a ConfigError on all processes of a run where they do not see the same directory."""
  deadline = time.monotonic() + VISIBLE_SECONDS
  while jax.process_count() > 1:
    try:
      token, reason = read_json(workdir / "processes.json")["token"], ""
    except Exception as error:  # a file half seen, or whatever an object store's library raises
      token, reason = "", f" (process {jax.process_index()}: {first_line(error)})"
    if processes.is_same(token):
      return
    if processes.on_any_process(time.monotonic() > deadline):
      raise ConfigError(
        f"the processes do not see the same workdir {workdir}{reason}; give all of them one directory of a file system "
        "that they share, or a bucket (gs://...)"
      )
    time.sleep(0.5)


def _check_config(workdir: epath.Path, values: Mapping[str, Any]) -> None:
  """Raises a CheckpointError where a directory's generations are of another configuration, or of an unknown one."""
  # Students share one identity, and generation 0 has its own.
  generations = sorted({min(int(path.name[4:]), 1) for path in workdir.glob("gen_*") if path.name[4:].isdecimal()})
  if not generations:
    return
  record = workdir / "config.json"
  if not record.exists():
    raise CheckpointError(f"{workdir} holds generations but no config.json that says whose; give another workdir")
  try:
    old = dict(read_json(record))
    differing = dict.fromkeys(line for number in generations for line in config.differences(old, values, number))
  except ConfigError as error:  # a name that is not registered: another version's, or of a module that is not imported
    raise CheckpointError(f"{workdir} holds a run of another configuration: {error}; give another workdir") from error
  except (ValueError, TypeError, KeyError) as error:
    raise CheckpointError(f"{record} is not a configuration: {error}; give another workdir") from error
  if differing:
    raise CheckpointError(
      f"{workdir} holds a run of another configuration ({'; '.join(differing)}); give another workdir"
    )


def begin(workdir: epath.Path, generation: int, teachers: Sequence[str]) -> None:
  """Records that a run begins with a generation, taught by networks of these digests; every process must call it.

  Raises a CheckpointError where the directory's generations belong to a run that began otherwise: its first one may be
  carried on by its own teachers, and later ones by what the directory holds.
  """
  with processes.together():
    first, taught, digests = _beginning(workdir)
    if first is not None and generation < first:
      raise CheckpointError(
        f"{workdir} holds a run that began with generation {first}, taught by a network that was given as params_prev; "
        "give it again, or another workdir"
      )
    if first is not None and generation == first and taught is not None and set(teachers) != set(taught):
      raise CheckpointError(
        f"{workdir} holds a run that began with generation {first}, taught by another network than params_prev; give "
        "another workdir"
      )
    if first is not None and generation > first and digests is not None and not set(teachers) <= set(digests):
      raise CheckpointError(
        f"{workdir} holds a run that began with generation {first}, which params_prev, of generation {generation - 1}, "
        "is no part of; give another workdir"
      )
  if first is None and processes.is_primary():
    write_json(workdir / "beginning.json", {"generation": generation, "teachers": list(teachers)})


def _beginning(workdir: epath.Path) -> tuple[int | None, list[str] | None, list[str] | None]:
  """Returns a run's first generation, or None; its teachers' digests; and those of the generations that it holds.

  Digests are None where they are not known: a manifest that cannot be read is reported where it is loaded.
  `train_generation` keeps no record: then it is the first that is there, unless 0 may have been removed to be trained
  again.
  """
  begun = {int(path.name[4:]): path for path in workdir.glob("gen_*") if path.name[4:].isdecimal()}
  digests: list[str] | None = None
  record = workdir / "beginning.json"
  try:
    manifests = [path / "manifest.json" for path in begun.values()]
    digests = [read_json(path)["digest"] for path in manifests if path.exists()]
    if record.exists():
      found = read_json(record)
      return found["generation"], found["teachers"], digests
  except (OSError, ValueError, KeyError, TypeError):
    digests = None
  first = min(begun, default=None)
  first = 0 if first == 1 else first
  return first, None, digests

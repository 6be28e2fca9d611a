"""Finished generations, read back without a configuration, without the lock and without writing anything."""

import re

from etils import epath

from ban_jax import storage
from ban_jax.errors import CheckpointError
from ban_jax.types import Generation


def load(path: epath.PathLike) -> Generation:
  """Returns the finished generation in a directory, `RUN/gen_K`: a str, pathlib or epath path, "~" or gs:// too.

  Raises a ConfigError for a path that cannot be one, a CheckpointError where there is no finished generation or a
  damaged one, and a StorageError where the disk cannot be read at the moment.
  """
  directory = storage.resolve_workdir(path)
  found = storage.load(directory)
  if found is None:
    inside = ", ".join(_generations(directory))
    hint = f"; it is a run with {inside}: load one of them, or all by load_run" if inside else ""
    raise CheckpointError(f"{directory} holds no finished generation: there is no manifest.json{hint}")
  return found[0]


def load_run(workdir: epath.PathLike) -> list[Generation]:
  """Returns the finished generations of a run directory, in their order; raises as `load`."""
  directory = storage.resolve_workdir(workdir)
  names = [name for name in _generations(directory) if (directory / name / "manifest.json").exists()]
  if not names:
    raise CheckpointError(f"{directory} holds no finished generation: there is no gen_K/manifest.json")
  return [load(directory / name) for name in names]


def _generations(directory: epath.Path) -> list[str]:
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir() if re.fullmatch(r"gen_\d+", path.name))
  return sorted(names, key=lambda name: int(name[4:]))

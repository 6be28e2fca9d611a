"""Finished generations, read back without a configuration, without the lock and without writing anything."""

import re

from etils import epath

from ban_jax import storage, trees
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.types import Generation, Model


def load(path: epath.PathLike, *, model: Model | None = None) -> Generation:
  """Returns the finished generation in a directory, `RUN/gen_K`: a str, pathlib or epath path, "~" or gs:// too.

  `model` is needed where the network is the caller's own, to predict with it. Raises a ConfigError for a path that
  cannot be one and for another network, a CheckpointError where there is no finished generation or a damaged one, and a
  StorageError where the disk cannot be read at the moment.
  """
  directory = storage.resolve_workdir(path)
  found = storage.load(directory)
  if found is None:
    inside = ", ".join(_generations(directory))
    hint = f"; it is a run with {inside}: load one of them, or all by load_run" if inside else ""
    raise CheckpointError(f"{directory} holds no finished generation: there is no manifest.json{hint}")
  return found[0] if model is None else _with_model(found[0], model, directory)


def _with_model(generation: Generation, model: Model, directory: epath.Path) -> Generation:
  """Returns a generation that carries the caller's own network; raises where it is not the one that was trained."""
  if not isinstance(model, Model):
    raise ConfigError(f"model must be a Model, as ban_jax.from_flax returns it, not {type(model).__name__}")
  network = generation.network
  recorded = "no network on record" if network is None else repr(network.group.get("own", network.group["name"]))
  if network is None or network.group.get("own") != model.name:
    raise ConfigError(f"{directory}: model is {model.name!r}, but the generation was trained with {recorded}")
  trees.check_fits(generation.params, model, str(directory))
  return generation._replace(network=network._replace(own=model))


def load_run(workdir: epath.PathLike, *, model: Model | None = None) -> list[Generation]:
  """Returns the finished generations of a run directory, in their order; arguments and errors are those of `load`.

  `model` is given to those generations that have a network of that name.
  """
  directory = storage.resolve_workdir(workdir)
  names = [name for name in _generations(directory) if (directory / name / "manifest.json").exists()]
  if not names:
    raise CheckpointError(f"{directory} holds no finished generation: there is no gen_K/manifest.json")
  found = [load(directory / name) for name in names]
  if model is None:
    return found
  named = {place for place, one in enumerate(found) if one.network and one.network.group.get("own") == model.name}
  if not named:
    raise ConfigError(f"{directory}: no generation was trained with a network of your own named {model.name!r}")
  return [_with_model(one, model, directory) if place in named else one for place, one in enumerate(found)]


def _generations(directory: epath.Path) -> list[str]:
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir() if re.fullmatch(r"gen_\d+", path.name))
  return sorted(names, key=lambda name: int(name[4:]))

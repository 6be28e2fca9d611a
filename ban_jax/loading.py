"""Finished generations, read back without a configuration, without the lock and without writing anything."""

import re
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax import networks, presets, resolving, storage, trees
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.trees import Member
from ban_jax.types import Dataset, Generation, Model


@devices_lib.default_modes()
def load(path: epath.PathLike, *, model: Model | None = None) -> Generation:
  """Returns the finished generation in a directory.

  Args:
    path: `RUN/gen_K`: a str, pathlib or epath path, "~" or gs:// too.
    model: the network, if it is the caller's own, to predict with it.

  Returns:
    A Generation.

  Raises:
    ConfigError: for a path that cannot be one, and for another network.
    CheckpointError: if there is no finished generation, or a damaged one.
    StorageError: if the disk cannot be read at the moment.

  Examples:
    >>> ban_jax.load(directory / "run" / "gen_1").index
    1
  """
  resolving.check_own(resolving.Own(model=model))
  directory = storage.resolve_workdir(path, "path")
  found = storage.load(directory)
  if found is None:
    inside = ", ".join(_generations(directory))
    hint = f"; it is a run with {inside}: load one of them, or all by load_run" if inside else ""
    raise CheckpointError(f"{directory} holds no finished generation: there is no manifest.json{hint}")
  return found[0] if model is None else _with_model(found[0], model, directory)


def load_config(path: epath.PathLike) -> ConfigDict:
  """Returns the locked configuration of a run directory, or of a finished generation in one, `RUN/gen_K`.

  `ban_jax.run` goes on with it in the same directory. Data and networks that the caller gave are given again; they
  stand in it as "own".

  Args:
    path: `RUN` or `RUN/gen_K`.

  Returns:
    A ConfigDict.

  Raises:
    CheckpointError: if there is none.
    ConfigError: for what this version does not know.

  Examples:
    >>> ban_jax.load_config(directory / "run").data.name
    'own'
  """
  directory = storage.resolve_workdir(path, "path")
  manifest, record = directory / "manifest.json", directory / "config.json"
  if not (manifest.exists() or record.exists()):
    raise CheckpointError(f"{directory} holds no run and no finished generation: there is no config.json")
  try:
    values = storage.read_json(manifest)["config"] if manifest.exists() else storage.read_json(record)
    return presets.of_record(values)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    if isinstance(error, ConfigError):
      raise
    raise CheckpointError(
      f"{directory} holds no configuration that can be read: {storage.first_line(error)}"
    ) from error


def _with_model(generation: Generation, model: Model, directory: epath.Path) -> Generation:
  """Returns a generation that carries the caller's own network; raises where it is not the one that was trained."""
  if reason := networks.misfit(model, generation):
    raise ConfigError(f"{directory}: {reason}")
  assert generation.network is not None, "which a network that fits is compared with"
  return generation._replace(network=generation.network._replace(own=model))


@devices_lib.default_modes()
def load_run(
  workdir: epath.PathLike, *, model: Model | None = None, teacher_model: Model | None = None
) -> list[Generation]:
  """Returns the finished generations of a run directory, in their order.

  Args:
    workdir: the run directory.
    model: a network of the caller's own, given to those generations that were trained with it.
    teacher_model: another one, in any order.

  Returns:
    A list of Generations.

  Raises:
    BanError: those of `load`.

  Examples:
    >>> [generation.index for generation in ban_jax.load_run(directory / "run")]
    [0, 1]
  """
  resolving.check_own(resolving.Own(model=model, teacher_model=teacher_model))
  directory = storage.resolve_workdir(workdir)
  names = [name for name in _generations(directory) if (directory / name / "manifest.json").exists()]
  if not names:
    hint = "; it is a generation: read it by load" if (directory / "manifest.json").exists() else ""
    raise CheckpointError(f"{directory} holds no finished generation: there is no gen_K/manifest.json{hint}")
  found = [load(directory / name) for name in names]
  _check_chain(directory, names)
  for own in (model, teacher_model):
    if own is None:
      continue
    reasons = [networks.misfit(own, one) for one in found]
    if all(reasons):
      named = [place for place, one in enumerate(found) if one.network and one.network.group.get("own") == own.name]
      if not named:
        raise ConfigError(f"{directory}: no generation was trained with a network of your own named {own.name!r}")
      raise ConfigError(f"{directory / names[named[-1]]}: {reasons[named[-1]]}")
    found = [one if reason else _with_model(one, own, directory) for one, reason in zip(found, reasons, strict=True)]
  return found


def _check_chain(directory: epath.Path, names: Sequence[str]) -> None:
  """Raises a CheckpointError where a directory holds parts of several runs: generations that no other one taught."""
  manifests = [storage.read_json(directory / name / "manifest.json") for name in names]
  for place, manifest in enumerate(manifests[1:], 1):
    teachers = set(manifest.get("teachers", ()))
    if teachers and not teachers & {other["digest"] for other in manifests[:place]}:
      earlier = " or ".join(names[:place])
      raise CheckpointError(
        f"{directory / names[place]} was not taught by {earlier}: {directory} holds parts of several runs; read each "
        "generation by load"
      )


@devices_lib.default_modes()
def with_network(
  member: Member,
  cfg: ConfigDict | resolving.Setup,
  *,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
) -> Generation:
  """Returns a Generation that carries its network, of a variables tree or of a generation of an earlier version.

  Network and normalisation of inputs are those of the configuration, or of what is given in its place, for the member's
  place in the lineage.

  Args:
    member: a variables tree or a Generation.
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: the students' network, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.

  Returns:
    A Generation, to be used by `predict`, `export` and others.

  Raises:
    CheckpointError: for a tree that does not fit that network; and the errors of `evaluate`.

  Examples:
    >>> ban_jax.with_network(teacher.params, cfg, dataset=data).network is not None
    True
  """
  setup = resolving.resolve(cfg, None, resolving.Own(dataset, model, teacher_model))
  given = member if isinstance(member, Generation) else None
  trees_, _ = networks.members(given._replace(network=None) if given else member, setup, "the network")
  if len(trees_) != 1:
    raise ConfigError(f"with_network takes one Generation or variables tree, not {len(trees_)}")
  index = trees.lineage(trees_[0])
  params = given.params if given else trees.to_host(trees.to_plain(trees_[0]), index)
  return Generation(index, params, given.metrics if given else {}, given.history if given else (), setup.network(index))


def _generations(directory: epath.Path) -> list[str]:
  if not directory.is_dir():
    return []
  names = (path.name for path in directory.iterdir() if re.fullmatch(r"gen_\d+", path.name))
  return sorted(names, key=lambda name: int(name[4:]))

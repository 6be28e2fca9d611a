"""Run directories: Orbax checkpoints while a generation trains, its final variables, and the manifest that ties it.

    workdir/config.json
    workdir/gen_K/steps/        checkpoints of a generation in training
    workdir/gen_K/params/       the finished variables
    workdir/gen_K/metrics.json, history.jsonl, events.out.tfevents.*
    workdir/gen_K/manifest.json the generation's lineage; written last, so its presence means: finished

Orbax restores a flipped byte without a word, hence the digests: every tree is compared with the digest it was saved
with before anything is computed from it.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from ban_jax import devices, report
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.types import Generation, Model, Variables
from ban_jax.version import __version__

# What may differ between a run and its resumption, because no byte of a generation depends on it.
FREE_KEYS = ("generations", "data.dir", "train.checkpoint_every")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


# --- trees ---------------------------------------------------------------------------------------------------------


def leaves(tree: PyTree) -> dict[str, np.ndarray]:
  """Returns the tree's leaves by their path, as "params/stem/kernel"."""
  flat, _ = jax.tree_util.tree_flatten_with_path(flax.core.unfreeze(tree) if isinstance(tree, Mapping) else tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def digest(tree: PyTree) -> str:
  """Returns the SHA-256 of the leaves' paths, dtypes, shapes and bytes; a lineage is left out."""
  total = hashlib.sha256()
  for path, leaf in sorted(leaves(tree).items()):
    if path.startswith("lineage/"):
      continue
    leaf = np.ascontiguousarray(leaf)
    total.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
    total.update(leaf.view(np.uint8).data if leaf.size else b"")
  return total.hexdigest()


def freeze(variables: Mapping[str, Any], generation: int) -> Variables:
  """Returns the variables as a FrozenDict of read-only NumPy arrays that carries the generation's number."""

  def read_only(leaf: Any) -> np.ndarray:
    leaf = np.array(leaf)
    leaf.flags.writeable = False
    return leaf

  tree = {**flax.core.unfreeze(variables), "lineage": {"generation": np.int32(generation)}}
  return flax.core.freeze(jax.tree.map(read_only, tree))


def thaw(variables: Variables) -> dict[str, Any]:
  """Returns the variables as the plain dicts that steps are compiled for, the lineage left out."""
  return {name: tree for name, tree in flax.core.unfreeze(variables).items() if name != "lineage"}


def lineage(variables: Variables) -> int:
  """Returns the generation that a variables tree belongs to; a tree that does not say counts as generation 0."""
  return int(variables["lineage"]["generation"]) if "lineage" in variables else 0


def check_fits(variables: Variables, model: Model, what: str) -> None:
  """Raises a CheckpointError that names the first path, with both shapes, where the tree does not fit the model."""
  if not isinstance(variables, Mapping) or "params" not in variables:
    held = (
      f"a mapping with {', '.join(map(str, variables))}" if isinstance(variables, Mapping) else type(variables).__name__
    )
    raise CheckpointError(
      f"{what} must be a variables tree with 'params' and 'batch_stats' (as Generation.params is), not {held}"
    )
  expected = leaves(jax.eval_shape(model.init, jax.random.key(0)))
  given = leaves(thaw(variables))
  for path in sorted(expected.keys() | given.keys()):
    want = f"{expected[path].dtype}{list(expected[path].shape)}" if path in expected else "nothing"
    have = f"{given[path].dtype}{list(given[path].shape)}" if path in given else "nothing"
    if want != have:
      raise CheckpointError(
        f"{what} does not fit model {model.name} with {model.spec.num_classes} classes: at {path} the model has "
        f"{want}, the tree {have}"
      )


# --- configurations ------------------------------------------------------------------------------------------------


def config_values(cfg: ConfigDict) -> dict[str, Any]:
  """Returns the configuration's values by dotted key, as JSON holds them."""
  values = {}

  def walk(prefix: str, node: Any) -> None:
    if isinstance(node, dict):
      for name, child in node.items():
        walk(f"{prefix}{name}.", child)
    else:
      values[prefix[:-1]] = node

  walk("", json.loads(cfg.to_json()))
  return values


def config_digest(cfg: ConfigDict) -> str:
  """Returns the SHA-256 of the values that a generation's bytes depend on."""
  values = {key: value for key, value in config_values(cfg).items() if key not in FREE_KEYS}
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def resolve_workdir(workdir: epath.PathLike) -> epath.Path:
  """Returns a run directory's full path, "~" resolved; raises a ConfigError for an empty one."""
  if not str(workdir):
    raise ConfigError("the workdir is empty; name the directory that the run is to be kept in")
  workdir = epath.Path(workdir).expanduser()
  return workdir if "://" in str(workdir) else workdir.absolute()  # Orbax takes absolute paths only


def open_workdir(workdir: epath.PathLike, cfg: ConfigDict) -> epath.Path:
  """Creates a run directory, or opens one of the same configuration, and records the configuration in it.

  Raises a CheckpointError that names the differing keys where the directory holds another run, and one that says why
  where it cannot be written.
  """
  workdir = resolve_workdir(workdir)
  record = workdir / "config.json"
  if record.exists():
    try:
      old = json.loads(record.read_text())
    except json.JSONDecodeError as error:
      raise CheckpointError(f"{record} is not a configuration: {error}; give another workdir, or remove it") from error
    new = config_values(cfg)
    differing = [
      f"{key}: {json.dumps(old.get(key))} there, {json.dumps(new.get(key))} here"
      for key in sorted(old.keys() | new.keys())
      if key not in FREE_KEYS and old.get(key) != new.get(key)
    ]
    if differing:
      raise CheckpointError(
        f"{workdir} holds a run of another configuration ({'; '.join(differing)}); give another workdir"
      )
  elif any(workdir.glob("gen_*")):
    raise CheckpointError(f"{workdir} holds generations but no config.json that says whose; give another workdir")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if devices.is_primary():
      report.write_json(record, config_values(cfg))
  except OSError as error:
    raise CheckpointError(f"workdir {workdir} cannot be written: {error}") from error
  return workdir


# --- a generation in training --------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_steps(directory: epath.Path) -> Iterator[Any]:
  """Yields an Orbax manager of a generation's checkpoints, the newest two kept; what is being saved ends with it."""
  import orbax.checkpoint as ocp

  trash = ".trash"  # a kill in the middle of a deletion then never leaves half a checkpoint under a valid name
  if devices.is_primary():
    (directory / trash).rmtree(missing_ok=True)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2, todelete_subdir=trash, cleanup_tmp_directories=True, enable_async_checkpointing=True
  )
  with ocp.CheckpointManager(directory, options=options) as manager:
    yield manager
    manager.wait_until_finished()


def save_step(manager: Any, step: int, tree: PyTree, meta: Mapping[str, Any]) -> None:
  """Saves a tree of NumPy arrays and a JSON record of it, without waiting for the disk."""
  import orbax.checkpoint as ocp

  meta = {**meta, "digest": digest(tree)}
  manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)))


def restore_step(manager: Any, target: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
  """Returns the newest checkpoint's tree and record, or None where there is no checkpoint yet.

  `target` is a tree of NumPy arrays that gives structure, shapes and dtypes. Raises a CheckpointError where the tree is
  not the one that was saved.
  """
  import orbax.checkpoint as ocp

  step = manager.latest_step()
  if step is None:
    return None
  args = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
  remedy = f"remove {manager.directory}/{step} to go on from the checkpoint before it, or from the beginning"
  try:
    restored = manager.restore(step, args=args)
  except Exception as error:  # Orbax raises nearly anything for a broken file
    raise CheckpointError(f"checkpoint {step} in {manager.directory} is damaged ({error}); {remedy}") from error
  tree = jax.tree.map(np.asarray, restored.state)
  if digest(tree) != restored.meta["digest"]:
    raise CheckpointError(
      f"checkpoint {step} in {manager.directory} is damaged: its digest is not the one it was saved with; {remedy}"
    )
  return tree, restored.meta


# --- a finished generation -----------------------------------------------------------------------------------------


def finish(directory: epath.Path, generation: Generation, manifest: Mapping[str, Any]) -> None:
  """Writes a generation's variables, metrics and history, then its manifest, and removes its checkpoints."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / "params", flax.core.unfreeze(generation.params), force=True)
  devices.wait_for_all(f"params of generation {generation.index}")
  if devices.is_primary():
    _write_records(directory, generation, manifest)
    (directory / "steps").rmtree(missing_ok=True)
  devices.wait_for_all(f"manifest of generation {generation.index}")


def _write_records(directory: epath.Path, generation: Generation, manifest: Mapping[str, Any]) -> None:
  report.write_json(directory / "metrics.json", dict(generation.metrics))
  report.write_lines(directory / "history.jsonl", list(generation.history))
  report.write_json(directory / "manifest.json", {**manifest, "digest": digest(generation.params)})


def load(directory: epath.Path) -> tuple[Generation, dict[str, Any]] | None:
  """Returns a finished generation and its manifest, or None where it is not finished.

  Raises a CheckpointError where the variables are not the ones that the manifest vouches for.
  """
  if not (directory / "manifest.json").exists():
    return None
  import orbax.checkpoint as ocp

  try:
    manifest = json.loads((directory / "manifest.json").read_text())
    metrics = json.loads((directory / "metrics.json").read_text())
    history = tuple(json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines())
    with ocp.StandardCheckpointer() as checkpointer:
      variables = checkpointer.restore(directory / "params")
  except Exception as error:  # Orbax raises nearly anything for a broken file
    raise CheckpointError(
      f"{directory} is damaged and cannot be read ({error}); remove it to train it again"
    ) from error
  if digest(variables) != manifest["digest"]:
    raise CheckpointError(
      f"{directory}/params is damaged: its digest is not the manifest's; remove {directory} to train it again"
    )
  if devices.is_primary():
    (directory / "steps").rmtree(missing_ok=True)  # left by a kill right behind the manifest
  index = manifest["generation"]
  return Generation(
    index, freeze({k: v for k, v in variables.items() if k != "lineage"}, index), metrics, history
  ), manifest


@functools.cache
def provenance() -> dict[str, Any]:
  """Returns which software this process runs, for the manifest: as it was at the first call, before a long training."""
  packages = {name: importlib.metadata.version(name) for name in PACKAGES}
  return {"ban_jax": __version__, "git_commit": _commit(), "packages": packages}


def _commit() -> str | None:
  """Returns the commit of the source tree that this package runs from, "+" behind it where it was changed."""
  git = ["git", "-C", str(pathlib.Path(__file__).parent)]
  try:
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit + ("+" if changed.strip() else "")

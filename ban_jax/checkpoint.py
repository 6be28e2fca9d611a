"""Run directories: Orbax checkpoints while a generation trains, its final variables, and the manifest that ties it.

    workdir/config.json
    workdir/processes.json      of several processes: the token by which they know that they see the same directory
    workdir/.lock               held while a process works on the directory (lease.json on an object store)
    workdir/gen_K/steps/        checkpoints of a generation in training
    workdir/gen_K/damaged/      checkpoints that were not what had been saved, moved aside until it is finished
    workdir/gen_K/params/       the finished variables
    workdir/gen_K/metrics.json, history.jsonl, events.out.tfevents.*
    workdir/gen_K/manifest.json the generation's lineage; written last, so its presence means: finished

Orbax restores a flipped byte without a word, hence the digests: every tree is compared with the digest it was saved
with before anything is computed from it.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree
from ml_collections import ConfigDict

from ban_jax import devices, lock, report
from ban_jax.errors import BanError, CheckpointError, ConfigError, StorageError
from ban_jax.types import Generation, Model, Variables
from ban_jax.version import __version__

logger = logging.getLogger(__name__)

# What may differ between a run and its resumption, because no byte of a generation depends on it.
FREE_KEYS = ("generations", "data.dir", "train.checkpoint_every")
# Seconds that a network's file system may take to show one process what another has written.
VISIBLE_SECONDS = 5.0
# Where Orbax moves what it deletes: a kill in the middle then never leaves half a checkpoint under a valid name.
TRASH = ".trash"
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


def structure(tree: PyTree) -> str:
  """Returns the SHA-256 of the leaves' paths, dtypes and shapes: of what a program must have in common to read them."""
  lines = (f"{path} {np.asarray(leaf).dtype} {np.shape(leaf)}\n" for path, leaf in sorted(leaves(tree).items()))
  return hashlib.sha256("".join(lines).encode()).hexdigest()


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
  """Returns a run directory's full path, "~" resolved; raises a ConfigError for one that cannot be used."""
  if not str(workdir):
    raise ConfigError("the workdir is empty; name the directory that the run is to be kept in")
  _check_scheme(str(workdir))
  workdir = epath.Path(workdir).expanduser()
  workdir = workdir if "://" in str(workdir) else workdir.absolute()  # Orbax takes absolute paths only
  _check_scheme(str(workdir))  # epath takes /s3/bucket for s3://bucket
  try:
    named = b"\0" not in str(workdir).encode()  # TensorStore takes names in UTF-8 only
  except UnicodeEncodeError:
    named = False
  if not named:
    raise ConfigError(f"workdir {str(workdir)!r}: a name in UTF-8, without null bytes, is expected")
  return workdir


def _check_scheme(workdir: str) -> None:
  """Raises a ConfigError for a workdir on a storage that is not one of those that a run can be kept on."""
  scheme, separator, _ = workdir.partition("://")
  if separator and scheme != "gs":
    raise ConfigError(f"workdir {workdir!r}: unknown storage {scheme + '://'!r}; give a local directory, or gs://...")


@contextlib.contextmanager
def open_workdir(workdir: epath.PathLike, cfg: ConfigDict) -> Iterator[epath.Path]:
  """Creates a run directory, or opens one of the same configuration, records the configuration, and holds it.

  Raises a CheckpointError that names the differing keys where the directory holds another run, one that names the owner
  where another process has it open, and one that says why where it cannot be written; a StorageError where its disk is
  full; and a ConfigError where the processes of a run do not see the same directory.
  """
  workdir = resolve_workdir(workdir)
  with contextlib.ExitStack() as stack:
    error = None
    if devices.is_primary():
      try:
        workdir.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock.hold(workdir))
        _check_config(workdir, cfg)
        report.write_json(workdir / "config.json", config_values(cfg))
        if jax.process_count() > 1:
          report.write_json(workdir / "processes.json", {"token": uuid.uuid4().hex})
      except CheckpointError as refusal:
        error = refusal
      except ImportError as refusal:  # of what a bucket is reached with
        error = ConfigError(f"workdir {workdir}: {_first_line(refusal)} (pip install 'etils[epath-gcs]')")
      except OSError as refusal:
        if refusal.errno in (errno.ENOSPC, errno.EDQUOT):
          error = _storage_error(workdir, refusal)
        else:
          error = CheckpointError(f"workdir {workdir} cannot be written: {refusal}")
    devices.raise_together(error)
    _check_shared(workdir)
    yield workdir


def _check_shared(workdir: epath.Path) -> None:
  """Raises a ConfigError on all processes of a run where they do not see the same directory."""
  deadline = time.monotonic() + VISIBLE_SECONDS
  while jax.process_count() > 1:
    try:
      token, reason = json.loads((workdir / "processes.json").read_text())["token"], ""
    except Exception as error:  # a file half seen, or whatever an object store's library raises
      token, reason = "", f" (process {jax.process_index()}: {_first_line(error)})"
    if devices.is_same(token):
      return
    if devices.on_any_process(time.monotonic() > deadline):
      raise ConfigError(
        f"the processes do not see the same workdir {workdir}{reason}; give all of them one directory of a file system "
        "that they share, or a bucket (gs://...)"
      )
    time.sleep(0.5)


def _check_config(workdir: epath.Path, cfg: ConfigDict) -> None:
  """Raises a CheckpointError where a directory's configuration is missing, broken or another one than `cfg`."""
  record = workdir / "config.json"
  if not record.exists():
    if any(workdir.glob("gen_*")):
      raise CheckpointError(f"{workdir} holds generations but no config.json that says whose; give another workdir")
    return
  try:
    old = dict(json.loads(record.read_text()))
  except (ValueError, TypeError) as error:
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


@contextlib.contextmanager
def storage_errors(directory: epath.Path | None) -> Iterator[None]:
  """Turns a failure to write below `directory` into a StorageError; nothing is written where it is None."""
  try:
    yield
  except BanError:
    raise
  except Exception as error:
    # Orbax's storage library reports a full disk as a ValueError with a status in its text.
    failed = isinstance(error, OSError) or (
      isinstance(error, ValueError) and re.search(r"RESOURCE_EXHAUSTED|Failed writing|No space left", str(error))
    )
    if directory is None or not failed:
      raise
    raise _storage_error(directory, error) from error


def _storage_error(directory: epath.Path, error: Exception) -> StorageError:
  return StorageError(
    f"{directory} cannot be read or written: {_first_line(error)}; the checkpoints before are intact, and the same "
    "command goes on from them once there is room"
  )


def _is_passing(error: Exception) -> bool:
  """Returns whether an error of reading says that the disk cannot be read at the moment, not that a file is damaged."""
  missing = FileNotFoundError | NotADirectoryError | IsADirectoryError
  return isinstance(error, OSError) and not isinstance(error, missing)


def _first_line(error: BaseException) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:300]


# --- a generation in training --------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_steps(directory: epath.Path) -> Iterator[Any]:
  """Yields an Orbax manager of a generation's checkpoints, the newest two kept; what is being saved ends with it."""
  import orbax.checkpoint as ocp

  class Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
      return False  # the training loop asks, once a step; a second count of the steps would break the agreement

  _empty_trash(directory)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2, todelete_subdir=TRASH, cleanup_tmp_directories=True, enable_async_checkpointing=True
  )
  with _without_stragglers():
    manager = Manager(directory, options=options)
    try:
      yield manager
      manager.wait_until_finished()
    except BaseException:
      # One of several processes may have failed alone: closing would wait for the others' share of what is being saved.
      if jax.process_count() == 1:
        with contextlib.suppress(Exception):  # of a disk that is full, what was raised has told
          manager.close()
      raise
    manager.close()


def _empty_trash(directory: epath.Path) -> None:
  """Removes the checkpoints that newer ones have replaced: Orbax only moves them aside."""
  if devices.is_primary() and (directory / TRASH).exists():
    for old in (directory / TRASH).iterdir():
      old.rmtree(missing_ok=True)


def save_step(manager: Any, step: int, tree: PyTree, record: Mapping[str, Any]) -> None:
  """Saves a tree of NumPy arrays, a JSON record and what both are known by again, without waiting for the disk."""
  import orbax.checkpoint as ocp

  manager.wait_until_finished()  # for the save before, as this one would anyway
  _empty_trash(manager.directory)

  # It is written in the background, while the training adds to its history.
  record = {**copy.deepcopy(record), "structure": structure(tree)}
  meta = {"record": record, "digest": digest(tree), "record_digest": _record_digest(record)}
  manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)))


def restore_newest(
  manager: Any, target: PyTree, check: Callable[[dict[str, Any]], None] = lambda record: None
) -> tuple[PyTree, dict[str, Any]] | None:
  """Returns the newest undamaged checkpoint's tree and record, or None where there is none.

  `target` is a tree of NumPy arrays that gives structure, shapes and dtypes. A checkpoint that is not what was saved is
  named in the log and moved to `damaged/STEP` beside the checkpoints, and the one before it is tried. `check(record)`
  may refuse a checkpoint that is sound and somebody else's, by raising. A disk that cannot be read at the moment, and a
  tree of another structure, which another version saved, are errors and no damage.
  """
  for step in sorted(manager.all_steps(), reverse=True):
    found, damage = _restore(manager, step, target, check)
    if not devices.on_any_process(damage is not None):
      return found
    aside = manager.directory.parent / "damaged" / str(step)
    if devices.is_primary():
      logger.warning(
        "checkpoint %s/%d is damaged (%s): moved to %s; going on from the one before it, or from the generation's "
        "beginning where there is none",
        manager.directory,
        step,
        damage or "as another process reads it",
        aside,
      )
      aside.parent.mkdir(exist_ok=True)
      aside.rmtree(missing_ok=True)
      (manager.directory / str(step)).rename(aside)
    devices.wait_for_all(f"damaged checkpoint {step}")
    manager.reload()
  return None


def _restore(
  manager: Any, step: int, target: PyTree, check: Callable[[dict[str, Any]], None]
) -> tuple[tuple[PyTree, dict[str, Any]] | None, str | None]:
  """Returns ((tree, record), None), or (None, what is wrong with the checkpoint)."""
  import orbax.checkpoint as ocp

  try:
    meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    record = meta["record"]
    if _record_digest(record) != meta["record_digest"]:
      return None, "the digest of its record is not the one it was saved with"
  except Exception as error:  # Orbax raises nearly anything for a broken file
    return None, _damage(error)
  check(record)
  # Compared before the arrays are read: a restoration fails with the same words where a file of theirs is missing.
  if record.pop("structure", None) not in (None, structure(target)):  # the first checkpoints did not say
    raise CheckpointError(
      f"checkpoint {manager.directory}/{step} holds a tree of another structure, as another version of the program or "
      "of a package would save it; go on with that version, or give another workdir"
    )
  try:
    with _without_stragglers():
      restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
    tree = jax.tree.map(np.asarray, restored.state)
    if digest(tree) != meta["digest"]:
      return None, "the digest of its arrays is not the one it was saved with"
  except Exception as error:
    return None, _damage(error)
  return (tree, record), None


def _damage(error: Exception) -> str:
  """Returns what a restoration's error says of the checkpoint; raises it anew where it says something else."""
  if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or "Gloo" in str(error) or _is_passing(error):
    raise error
  return f"{type(error).__name__}: {_first_line(error)}"


@contextlib.contextmanager
def _without_stragglers() -> Iterator[None]:
  """Keeps off the terminal what Orbax's other reads and writes print, a traceback each, once one of them has failed."""
  hooks = sys.excepthook, sys.unraisablehook

  def is_straggler(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and "Event loop is closed" in str(error)

  sys.excepthook = lambda kind, error, trace: None if is_straggler(error) else hooks[0](kind, error, trace)
  sys.unraisablehook = lambda told: None if is_straggler(told.exc_value) else hooks[1](told)
  try:
    yield
  except BanError:
    raise
  except Exception:
    time.sleep(1)  # for those under way
    raise
  finally:
    sys.excepthook, sys.unraisablehook = hooks


def _record_digest(record: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


# --- a finished generation -----------------------------------------------------------------------------------------


def finish(directory: epath.Path, generation: Generation, manifest: Mapping[str, Any]) -> None:
  """Writes a generation's variables, metrics and history, then its manifest, and removes its checkpoints."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / "params", flax.core.unfreeze(generation.params), force=True)
  devices.wait_for_all(f"params of generation {generation.index}")
  if devices.is_primary():
    metrics, history = dict(generation.metrics), list(generation.history)
    report.write_json(directory / "metrics.json", metrics)
    report.write_lines(directory / "history.jsonl", history)
    digests = {"digest": digest(generation.params), "records_digest": _record_digest([metrics, history])}
    report.write_json(directory / "manifest.json", {**manifest, **digests})
    _remove_leftovers(directory)
  devices.wait_for_all(f"manifest of generation {generation.index}")


def _remove_leftovers(directory: epath.Path) -> None:
  """Removes what a finished generation needs no more, after a kill right behind the manifest too."""
  for leftover in ("steps", "damaged", *(path.name for path in directory.glob("params.orbax-checkpoint-tmp*"))):
    (directory / leftover).rmtree(missing_ok=True)


def read_records(directory: epath.Path) -> tuple[dict[str, float], list[dict[str, float]], dict[str, Any]] | None:
  """Returns a finished generation's metrics, history and manifest, or None where it is not finished.

  Raises a CheckpointError where metrics or history are not those that the manifest vouches for, and a StorageError
  where the disk cannot be read at the moment.
  """
  try:
    if not (directory / "manifest.json").exists():
      return None
    manifest = json.loads((directory / "manifest.json").read_text())
    metrics = json.loads((directory / "metrics.json").read_text())
    history = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    expected = manifest["records_digest"]
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise _unreadable(directory, error) from error
  if _record_digest([metrics, history]) != expected:
    raise CheckpointError(
      f"{directory}/metrics.json or history.jsonl was changed: their digest is not the manifest's; {_remedy(directory)}"
    )
  return metrics, history, manifest


def load(directory: epath.Path) -> tuple[Generation, dict[str, Any]] | None:
  """Returns a finished generation and its manifest, or None where it is not finished.

  Raises a CheckpointError where the variables, metrics or history are not those that the manifest vouches for, and a
  StorageError where the disk cannot be read at the moment.
  """
  records = read_records(directory)
  if records is None:
    return None
  import orbax.checkpoint as ocp

  metrics, history, manifest = records
  try:
    with ocp.StandardCheckpointer() as checkpointer:
      variables = checkpointer.restore(directory / "params")
    index, expected = manifest["generation"], manifest["digest"]
  except Exception as error:  # Orbax raises nearly anything for a broken file
    raise _unreadable(directory, error) from error
  if digest(variables) != expected:
    raise CheckpointError(f"{directory}/params is damaged: its digest is not the manifest's; {_remedy(directory)}")
  if devices.is_primary():
    _remove_leftovers(directory)
  params = freeze({name: tree for name, tree in variables.items() if name != "lineage"}, index)
  return Generation(index, params, metrics, tuple(history)), manifest


def _unreadable(directory: epath.Path, error: Exception) -> CheckpointError | StorageError:
  if _is_passing(error):
    return _storage_error(directory, error)
  return CheckpointError(f"{directory} is damaged and cannot be read ({_damage(error)}); {_remedy(directory)}")


def _remedy(directory: epath.Path) -> str:
  return f"remove {directory} to train it again"


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

"""Checkpoints of a generation in training, by Orbax: saved in the background, verified when they are restored."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from ban_jax import processes, trees
from ban_jax.errors import CheckpointError
from ban_jax.storage.files import damage, standard

logger = logging.getLogger(__name__)

# Where Orbax moves what it deletes: a kill in the middle then never leaves half a checkpoint under a valid name.
TRASH = ".trash"


@contextlib.contextmanager
def open_steps(directory: epath.Path) -> Iterator[Any]:
  """Yields an Orbax manager of a generation's checkpoints, the newest two kept; it waits for what is being saved."""
  import orbax.checkpoint as ocp

  class Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
      return False  # the training loop asks, once a step, and processes must count their questions alike

  _empty_trash(directory)
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2, todelete_subdir=TRASH, cleanup_tmp_directories=True, enable_async_checkpointing=True
  )
  manager = Manager(directory, options=options)
  try:
    yield manager
    manager.wait_until_finished()
  except BaseException:
    # A process that fails alone must not wait for the others' share of a save, as closing does.
    if jax.process_count() == 1:
      with contextlib.suppress(Exception):  # the original error is already being raised
        manager.close()
    raise
  manager.close()


def _empty_trash(directory: epath.Path) -> None:
  """Removes the checkpoints that newer ones have replaced: Orbax only moves them aside."""
  if processes.is_primary() and (directory / TRASH).exists():
    for old in (directory / TRASH).iterdir():
      old.rmtree(missing_ok=True)


def save_step(manager: Any, step: int, tree: PyTree, record: Mapping[str, Any]) -> None:
  """Saves a tree of NumPy arrays and a record, as `standard` JSON, with their digests, not waiting for the disk."""
  import orbax.checkpoint as ocp

  manager.wait_until_finished()  # for the save before, as this one would anyway
  _empty_trash(manager.directory)
  # A copy, because it is written in the background, while the training adds to its history.
  record = standard({**record, "structure": trees.structure(tree)})
  meta = {"record": record, "digest": trees.digest(tree), "record_digest": trees.json_digest(record)}
  manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta)))


def restore_newest(
  manager: Any, target: PyTree, check: Callable[[dict[str, Any]], None] = lambda record: None
) -> tuple[PyTree, dict[str, Any]] | None:
  """Returns the newest undamaged checkpoint's tree and record, or None where there is none.

  `target` is a tree of NumPy arrays that gives structure, shapes and dtypes. A damaged checkpoint is named in the log
  and moved to `damaged/STEP` beside the checkpoints, and the one before it is tried. `check(record)` may refuse a sound
  checkpoint by raising. Raises a CheckpointError for a tree of another structure, which another version saved.
  """
  for step in sorted(manager.all_steps(), reverse=True):
    found, damage = _restore(manager, step, target, check)
    if not processes.on_any_process(damage is not None):
      return found
    aside = manager.directory.parent / "damaged" / str(step)
    if processes.is_primary():
      logger.warning(
        f"checkpoint {manager.directory}/{step} is damaged ({damage or 'as another process reads it'}): moved to "
        f"{aside}; resuming from the one before it, or from the generation's beginning where there is none"
      )
      aside.parent.mkdir(exist_ok=True)
      aside.rmtree(missing_ok=True)
      (manager.directory / str(step)).rename(aside)
    processes.wait_for_all(f"damaged checkpoint {step}")
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
    if trees.json_digest(record) != meta["record_digest"]:
      return None, "the digest of its record is not the one it was saved with"
  except Exception as error:  # Orbax raises nearly anything for a broken file
    return None, damage(error)
  check(record)
  # Compared before the arrays are read: where a file of theirs is missing, Orbax raises the same error.
  if record.pop("structure") != trees.structure(target):
    raise CheckpointError(
      f"checkpoint {manager.directory}/{step} holds a tree of another structure, as another version of the program or "
      "of a package would save it; go on with that version, or give another workdir"
    )
  try:
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))
    tree = jax.tree.map(np.asarray, restored.state)
    if trees.digest(tree) != meta["digest"]:
      return None, "the digest of its arrays is not the one it was saved with"
  except Exception as error:
    return None, damage(error)
  return (tree, record), None

"""Trains the nodes of a graph; several processes may share the work."""

import time
from collections.abc import Callable, Sequence

from etils import epath

import ban_jax
from ban_jax import config, processes, storage
from ban_jax.errors import CheckpointError, InUseError, PeerError, StorageError
from ban_jax.storage import load_together
from ban_jax.types import Devices, Generation
from experiments.tables import graph
from experiments.tables.graph import Node

# Seconds between two looks at a generation that another process trains.
PATIENCE = 5.0


def train(
  nodes: Sequence[Node], workdir: epath.Path, *, devices: Devices, progress: bool, log: Callable[[str], None]
) -> int:
  """Trains the unfinished nodes of a topological order and returns how many it trained.

  A generation that another process is training is left to it: the others are trained first, then this call waits.
  Raises what `ban_jax.train_generation` raises.
  """
  pending, trained, message = list(nodes), 0, ""
  loaded: dict[str, Generation] = {}  # the last teacher, since it often teaches the next student, too

  def finished(node: Node) -> bool:
    return not processes.on_any_process(graph.find(node, workdir) is None)

  while pending:
    busy: dict[str, str] = {}  # path -> why it cannot be trained now
    for node in pending:
      if node.teacher is not None and node.teacher.path in busy:
        busy[node.path] = busy[node.teacher.path]
        continue
      if finished(node):
        continue
      try:
        with storage.open_workdir(workdir / node.run, config.record(node.cfg)):
          if finished(node):  # by another process, between the check above and the lock
            continue
          log(f"[{nodes.index(node) + 1}/{len(nodes)}] {node.summary}, in {node.path}")
          if node.teacher is not None and node.teacher.path not in loaded:
            loaded = {node.teacher.path: _load(workdir / node.teacher.path)}
          generation = ban_jax.train_generation(
            loaded[node.teacher.path] if node.teacher is not None else None,
            node.cfg,
            generation=node.generation,
            workdir=workdir / node.run,
            devices=devices,
            progress=progress,
          )
      except (CheckpointError, PeerError) as error:
        if not processes.on_any_process(isinstance(error, InUseError)):
          raise
        busy[node.path] = str(error)
        continue
      trained += 1
      if any(other.teacher is not None and other.teacher.path == node.path for other in pending):
        loaded = {node.path: generation}
    pending = [node for node in pending if node.path in busy]
    if pending:
      if message != (message := next(iter(busy.values()))):
        log(f"waiting: {message}")
      time.sleep(PATIENCE)
  return trained


def _load(directory: epath.Path) -> Generation:
  """Returns a generation that is known to be finished."""
  found = load_together(directory)
  if found is None:
    raise StorageError(f"{directory} is finished, but not visible yet; rerun the command to continue")
  return found[0]

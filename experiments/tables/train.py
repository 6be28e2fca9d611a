"""Trains the nodes of a graph, several side by side; several processes may share the work."""

import collections
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

from ban_jax import config, job, losses, processes, storage
from ban_jax.errors import CheckpointError, ConfigError, InUseError, PeerError, StorageError
from ban_jax.generations import finished_or_trained
from ban_jax.types import Devices, Generation
from experiments.tables import graph
from experiments.tables.graph import Node

# Seconds between two looks at a generation that another process trains.
PATIENCE = 5.0


def device_groups(devices: Devices, per_student: int) -> list[Devices]:
  """Returns disjoint groups of `per_student` devices (0: one group of all), each of which trains a student.

  Raises a ConfigError where the devices cannot be grouped so.
  """
  if not per_student:
    return [devices]
  if len(devices) % per_student:
    works = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
    raise ConfigError(f"--devices_per_student={per_student}: {len(devices)} devices make groups of {works}")
  if jax.process_count() > 1:
    raise ConfigError(
      "--devices_per_student groups the devices of one process; start each process by itself, with a --shard of its own"
    )
  return [devices[first : first + per_student] for first in range(0, len(devices), per_student)]


def train(
  nodes: Sequence[Node],
  workdir: epath.Path,
  *,
  groups: Sequence[Devices],
  progress: bool,
  log: Callable[[str], None],
) -> int:
  """Trains the unfinished nodes of a topological order, one on each group of devices, and returns how many it trained.

  A generation that another process is training is left to it: the others are trained first, then this call waits.
  Students that share a teacher and a stream of mini-batches learn from its recorded logits. Raises what
  `ban_jax.train_generation` raises.
  """
  shared = collections.Counter(map(_stream, nodes))
  trained, message = 0, ""
  while True:
    busy: dict[str, str] = {}  # path -> why it cannot be trained now
    with contextlib.ExitStack() as stack:
      batch = _claim(nodes, workdir, len(groups), busy, stack)
      for node in batch:
        log(f"[{nodes.index(node) + 1}/{len(nodes)}] {node.summary}, in {node.path}")
      teachers = dict.fromkeys(node.teacher.path for node in batch if node.teacher is not None)
      loaded = {path: _load(workdir / path) for path in teachers}  # once, however many it teaches
      jobs = [
        _job(node, workdir, group, loaded, replay=shared[_stream(node)] > 1)
        for node, group in zip(batch, groups, strict=False)
      ]
      if jobs:
        finished_or_trained(jobs, [workdir / node.run for node in batch], progress)
    trained += len(batch)
    if not batch and not busy:
      break
    if not batch:
      if message != (message := next(iter(busy.values()))):
        log(f"waiting: {message}")
      time.sleep(PATIENCE)
  if processes.is_primary():
    (workdir / "replay").rmtree(missing_ok=True)
  return trained


def _claim(
  nodes: Sequence[Node], workdir: epath.Path, most: int, busy: dict[str, str], stack: contextlib.ExitStack
) -> list[Node]:
  """Returns up to `most` nodes that can be trained now, their run directories held by `stack`; notes the busy ones."""

  def finished(node: Node) -> bool:
    return not processes.on_any_process(graph.find(node, workdir) is None)

  claimed: list[Node] = []
  for node in nodes:
    if len(claimed) == most:
      break
    if finished(node):
      continue
    if node.teacher is not None and not finished(node.teacher):  # trained before it: here, or by another process
      if node.teacher.path in busy:
        busy[node.path] = busy[node.teacher.path]
      continue
    try:
      held = contextlib.ExitStack()
      held.enter_context(storage.open_workdir(workdir / node.run, config.record(node.cfg)))
    except (CheckpointError, PeerError) as error:
      if not processes.on_any_process(isinstance(error, InUseError)):
        raise
      busy[node.path] = str(error)
      continue
    if finished(node):  # by another process, between the check above and the lock
      held.close()
      continue
    stack.enter_context(held)
    claimed.append(node)
  return claimed


def _stream(node: Node) -> tuple:
  """Returns what students share that can learn from one recording: teacher, seed, generation and batch."""
  cfg = node.cfg
  if node.teacher is None or cfg.data.window or not losses.make_loss(cfg.loss).needs_teacher:
    return (node.path,)  # of its own; recorded logits over all words would take more room than they save time
  return node.teacher.path, cfg.seed, node.generation, cfg.train.batch_size


def _job(
  node: Node, workdir: epath.Path, devices: Devices, loaded: Mapping[str, Generation], *, replay: bool
) -> job.Job:
  """Returns the job of a node whose teacher is among those `loaded`, by path."""
  cfg: ConfigDict = node.cfg.copy_and_resolve_references()
  if replay:
    cfg.train.replay = str(workdir / "replay")
  teacher = None if node.teacher is None else loaded[node.teacher.path]
  return job.prepare(job.resolve_run(cfg, devices), teacher, node.generation)


def _load(directory: epath.Path) -> Generation:
  """Returns a generation that is known to be finished."""
  found = storage.load_together(directory)
  if found is None:
    raise StorageError(f"{directory} is finished, but not visible yet; rerun the command to continue")
  return found[0]

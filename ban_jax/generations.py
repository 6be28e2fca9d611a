"""Generations: a plain Python loop over immutable variables trees."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax import job as job_lib
from ban_jax import preemption, report, resolving, resuming, storage
from ban_jax.errors import ConfigError, check_flag
from ban_jax.job import Job
from ban_jax.optim import Optimizer
from ban_jax.resolving import Own, Setup
from ban_jax.train import train
from ban_jax.trees import Member
from ban_jax.types import Dataset, Generation, Model

# Held by the thread that trains.
_training = threading.Lock()


@devices_lib.default_modes()
def train_generation(
  params_prev: Member | Sequence[Member] | None,
  cfg: ConfigDict | Setup,
  *,
  generation: int | None = None,
  workdir: epath.PathLike | None = None,
  devices: Sequence[jax.Device] | None = None,
  progress: bool = True,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
  optimizer: Optimizer | None = None,
  initial: Member | None = None,
  writers: Sequence[report.Writer] = (),
  on_epoch: Callable[[Sequence[Mapping[str, float]]], Any] | None = None,
) -> Generation:
  """Trains one generation: from the labels where `params_prev` is None, else taught by it (Eq. 3).

  `params_prev` is a variables tree, a Generation, or a sequence of them, which teaches by its mean probabilities.
  `generation` defaults to 0 for None and else to one more than the teacher's; with `cfg.seed` it determines every
  random draw. The same arguments give the same bytes on the same machine, device count and thread settings.

  `dataset`, `model`, `teacher_model` and `optimizer` take the place of the configuration's `data`, `model`,
  `teacher.model` and `optim`: what `from_arrays`, `from_flax` and `from_optax` return. `initial`, a Generation or a
  variables tree of the student's network, is what the student begins with, in place of random parameters: to fine-tune,
  or to train a finished generation longer.

  After each epoch, `on_epoch` is called with the history so far, a row per epoch; if it returns true, the training ends
  there, with the parameters as they are, which the manifest records. It must decide by the history alone, so that a
  resumed training ends there too. Then each of `writers` is called with the step and the epoch's numbers, "generation"
  and "epoch" among them, as is TensorBoard's of a workdir; a resumed training repeats what came after its checkpoint.

  With `workdir`, the generation is checkpointed under `workdir/gen_K`, resumes from there when called again, and is
  only read back once it is finished. `devices` defaults to all; `progress` shows a bar on a terminal, lines elsewhere.

  Returns a Generation whose `params` are immutable and on the host. Raises, before any training, a ConfigError for a
  configuration that cannot be run, a DataError for missing data, and a CheckpointError for a tree that does not fit its
  network or a workdir that holds something else or is in use (InUseError). While it trains: a TrainingError within
  `IN_FLIGHT` steps, or a dispatch, of the first number that is not finite; with `workdir` a StorageError where that
  cannot be written any more, and Preempted, after a checkpoint, on SIGTERM or Ctrl-C (in a notebook: interrupt); a
  second Ctrl-C is a KeyboardInterrupt at once. Without `workdir`, Ctrl-C is a KeyboardInterrupt after the step.
  """
  progress = check_flag("progress", progress)
  setup = resolving.resolve(cfg, devices, Own(dataset, model, teacher_model, optimizer))
  job = job_lib.prepare(setup, params_prev, generation, initial, report.watch(writers, on_epoch))
  with storage.open_workdir(workdir, setup.values) if workdir is not None else contextlib.nullcontext() as held:
    return finished_or_trained([job], [held], progress)[0]


@devices_lib.default_modes()
def run(
  cfg: ConfigDict | Setup,
  workdir: epath.PathLike,
  *,
  params_prev: Member | Sequence[Member] | None = None,
  devices: Sequence[jax.Device] | None = None,
  progress: bool = True,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
  optimizer: Optimizer | None = None,
  writers: Sequence[report.Writer] = (),
  on_epoch: Callable[[Sequence[Mapping[str, float]]], Any] | None = None,
) -> list[Generation]:
  """Trains the whole sequence of Eq. 3, a teacher and `cfg.generations` born-again students, each taught by the last.

  With `params_prev`, a sequence that was begun elsewhere is carried on, perhaps with another configuration:
  `cfg.generations` students follow, the first of them taught by `params_prev`, and their numbers go on from its own.

  Resumes where an earlier call in the same `workdir` ended, skips what is finished, and returns all generations of the
  workdir. `on_epoch` and `writers` see one generation after the other. Other arguments and errors are those of
  `train_generation`.
  """
  progress = check_flag("progress", progress)
  setup = job_lib.resolve_run(cfg, devices, Own(dataset, model, teacher_model, optimizer))
  watch = report.watch(writers, on_epoch)
  with storage.open_workdir(workdir, setup.values) as held:  # from the first generation to the last
    return run_generations([setup], [held], progress, params_prev, watch)[0]


def run_generations(
  setups: Sequence[Setup],
  workdirs: Sequence[epath.Path],
  progress: bool,
  params_prev: Member | Sequence[Member] | None = None,
  watch: report.Watch = report.NOBODY,
) -> list[list[Generation]]:
  """Returns the generations of several runs, trained side by side, each on devices of its own.

  The caller holds the workdirs open. Generation by generation, the runs wait for each other. `params_prev` teaches the
  first generation of each, which then is a student.
  """
  runs: list[list[Generation]] = [[] for _ in setups]
  counts = [setup.cfg.generations + (params_prev is None) for setup in setups]
  for number in range(max(counts)):
    due = [place for place, count in enumerate(counts) if number < count]
    parents = [runs[place][-1] if number else params_prev for place in due]
    jobs = [job_lib.prepare(setups[i], parent, None, watch=watch) for i, parent in zip(due, parents, strict=True)]
    if number == 0:
      for job, place in zip(jobs, due, strict=True):
        storage.begin(workdirs[place], job.generation, job.teacher.digests)
    done = finished_or_trained(jobs, [workdirs[place] for place in due], progress)
    for place, generation in zip(due, done, strict=True):
      runs[place].append(generation)
  return runs


def finished_or_trained(jobs: Sequence[Job], workdirs: Sequence[epath.Path | None], progress: bool) -> list[Generation]:
  """Returns the generations that the workdirs hold, and trains the others side by side."""
  with _only_thread():
    return _finished_or_trained(jobs, workdirs, progress)


@contextlib.contextmanager
def _only_thread() -> Iterator[None]:
  """Raises a ConfigError where another thread trains: steps of two threads would wait for each other's devices."""
  if not _training.acquire(blocking=False):
    raise ConfigError(
      "another thread of this process is training; train one run after the other, or each in a process of its own"
    )
  try:
    yield
  finally:
    _training.release()


def _finished_or_trained(
  jobs: Sequence[Job], workdirs: Sequence[epath.Path | None], progress: bool
) -> list[Generation]:
  directories = [where and where / f"gen_{job.generation}" for job, where in zip(jobs, workdirs, strict=True)]
  found: list[Any] = [where and resuming.finished(job, where) for job, where in zip(jobs, directories, strict=True)]
  missing = [place for place, generation in enumerate(found) if generation is None]
  if missing:
    with preemption.watch(saves=directories[missing[0]] is not None) as requested:
      trained = train([jobs[i] for i in missing], [directories[i] for i in missing], requested, progress)
    for place, generation in zip(missing, trained, strict=True):
      found[place] = generation
  return found

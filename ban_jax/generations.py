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
  """Trains one generation: from the labels if there is no teacher, else taught by it (Eq. 3).

  The same arguments give the same bytes on the same machine, device count and thread settings. `dataset`, `model`,
  `teacher_model` and `optimizer` take the place of the configuration's `data`, `model`, `teacher.model` and `optim`.

  Args:
    params_prev: the teacher: a variables tree, a Generation, or a sequence of them, which teaches by its mean
      probabilities. None trains generation 0 from the labels.
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    generation: its number, which with `cfg.seed` determines every random draw; by default one more than the teacher's.
    workdir: the directory under which the generation is checkpointed, as `gen_K`, resumed when called again, and only
      read back once it is finished. None keeps nothing.
    devices: the devices to train on; all by default.
    progress: whether to show a bar on a terminal, and lines elsewhere.
    dataset: what `from_arrays` returns.
    model: what `from_flax` or `from_nnx` returns, for students, and for generation 0 unless `teacher_model` is given.
    teacher_model: the network of generation 0.
    optimizer: what `from_optax` returns.
    initial: what the student begins with, in place of random parameters: a Generation or a variables tree of its
      network. To fine-tune, or to train a finished generation longer.
    writers: functions of (step, numbers), called after each epoch; "generation" and "epoch" are among the numbers. A
      resumed training repeats what came after its checkpoint.
    on_epoch: a function of the history so far, a row per epoch. If it returns true, the training ends there, with the
      parameters as they are, which the manifest records. It must decide by the history alone, so that a resumed
      training ends there too.

  Returns:
    A Generation whose `params` are immutable and on the host.

  Raises:
    ConfigError: before any work, for a configuration that cannot be run.
    DataError: before any work, for missing data.
    CheckpointError: before any work, for a tree that does not fit its network, or a workdir that holds something else
      or is in use (InUseError).
    TrainingError: within `IN_FLIGHT` steps, or a dispatch, of the first number that is not finite.
    StorageError: if the workdir cannot be written any more.
    Preempted: on SIGTERM or Ctrl-C (in a notebook: interrupt), with a workdir, after a checkpoint. A second Ctrl-C is a
      KeyboardInterrupt at once; without a workdir, Ctrl-C is one after the step.

  Examples:
    >>> teacher = ban_jax.train_generation(None, cfg, dataset=data, progress=False)
    >>> student = ban_jax.train_generation(teacher, cfg, dataset=data, progress=False)
    >>> student.index
    1
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
  """Trains the whole sequence of Eq. 3: a teacher and `cfg.generations` born-again students, each taught by the last.

  Resumes where an earlier call in the same `workdir` ended, and skips what is finished.

  Args:
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    workdir: the run directory, which gets a `gen_K` for each generation.
    params_prev: the teacher of a sequence that was begun elsewhere, perhaps with another configuration:
      `cfg.generations` students follow, whose numbers go on from its own. None begins with generation 0.
    devices: the devices to train on; all by default.
    progress: whether to show a bar on a terminal, and lines elsewhere.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: the students' network, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.
    optimizer: what `from_optax` returns, in place of `cfg.optim`.
    writers: as in `train_generation`; they see one generation after the other.
    on_epoch: as in `train_generation`, for each generation.

  Returns:
    All generations of the workdir, in their order.

  Raises:
    BanError: those of `train_generation`.

  Examples:
    >>> generations = ban_jax.run(cfg, directory / "run", dataset=data, progress=False)
    >>> [generation.index for generation in generations]
    [0, 1]
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


@_only_thread()
def finished_or_trained(jobs: Sequence[Job], workdirs: Sequence[epath.Path | None], progress: bool) -> list[Generation]:
  """Returns the generations that the workdirs hold, and trains the others side by side."""
  directories = [where and where / f"gen_{job.generation}" for job, where in zip(jobs, workdirs, strict=True)]
  found: list[Any] = [where and resuming.finished(job, where) for job, where in zip(jobs, directories, strict=True)]
  missing = [place for place, generation in enumerate(found) if generation is None]
  if missing:
    with preemption.watch(saves=directories[missing[0]] is not None) as requested:
      trained = train([jobs[i] for i in missing], [directories[i] for i in missing], requested, progress)
    for place, generation in zip(missing, trained, strict=True):
      found[place] = generation
  return found

"""Generations: one loop over training steps, and a plain Python loop over immutable variables trees."""

import collections
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jaxtyping import Int, PyTree
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax import job as job_lib
from ban_jax import metrics, preemption, processes, profiling, replay, report, storage, trees
from ban_jax.errors import CheckpointError, ConfigError, Preempted, TrainingError, check_flag
from ban_jax.evaluating import Subject, measure
from ban_jax.job import Job, Own, Setup
from ban_jax.optim import Optimizer
from ban_jax.step import TrainStep, initial_state, make_train_step
from ban_jax.trees import Member
from ban_jax.types import Carry, Dataset, Generation, Model, TrainState

logger = logging.getLogger(__name__)

# Steps dispatched ahead of the one whose sums are read: enough to keep an accelerator busy, while unbounded dispatch to
# several CPU devices deadlocks. At least one dispatch, however many its steps.
IN_FLIGHT = 8
# The metric, the lower the better, that a schedule may look at.
VALIDATION_METRICS = {"images": "validation_error", "tokens": "validation_perplexity"}
# The metrics that the progress bar shows after an epoch.
SHOWN = ("train_loss", "train_error", "validation_perplexity", "test_error", "test_perplexity")
# What a generation's key is folded with, one number a purpose.
INIT, ORDER, STEPS = range(3)

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
  setup = job_lib.resolve(cfg, devices, Own(dataset, model, teacher_model, optimizer))
  job = job_lib.prepare(setup, params_prev, generation, initial, report.watch(writers, on_epoch))
  replay.check(setup.cfg)
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
  replay.check(setup.cfg)
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
  found: list[Any] = [where and _finished(job, where) for job, where in zip(jobs, directories, strict=True)]
  missing = [place for place, generation in enumerate(found) if generation is None]
  if missing:
    with preemption.watch(saves=directories[missing[0]] is not None) as requested:
      trained = train([jobs[i] for i in missing], [directories[i] for i in missing], requested, progress)
    for place, generation in zip(missing, trained, strict=True):
      found[place] = generation
  return found


def _finished(job: Job, directory: epath.Path) -> Generation | None:
  """Returns a generation that a workdir holds, or None; raises where it is of another origin."""
  _check_processes(job.lineage)
  finished = storage.load_together(directory)
  if finished is None:
    return None
  generation, manifest = finished
  storage.check_lineage(job.lineage, manifest, directory)
  if "stopped" in manifest and job.watch.on_epoch is None:
    raise CheckpointError(
      f"{directory} was ended by on_epoch after {manifest['stopped']['epoch']} of {manifest['stopped']['of']} epochs; "
      "give on_epoch again, or another workdir"
    )
  if processes.is_primary():
    storage.remove_leftovers(directory)
  return generation._replace(network=job.network)  # an earlier version recorded none, and a network may be the caller's


def _check_processes(lineage: Mapping[str, Any]) -> None:
  """Raises a ConfigError that names the differences where the processes of a run have other configurations or data."""
  given = {key: lineage.get(key) for key in ("generation", "teachers", "dataset", "programs")}
  given |= {key: value for key, value in lineage["config"].items() if key != "data.dir"}  # local copies are welcome
  if not processes.is_same(str(given)):
    differing = [key for key, value in given.items() if not processes.is_same(str(value))]
    raise ConfigError(
      f"the processes of this run differ in: {', '.join(differing)}; give all of them the same configuration and data"
    )


class Live(NamedTuple):
  """A generation between two dispatches. State and carry are donated to the next one: only the newest may be used."""

  state: TrainState
  carry: Carry
  done: int  # steps
  sums: Mapping[str, float]  # of the epoch so far, as far as they are read
  history: tuple[Mapping[str, float], ...]
  epoch_start: float
  saved: int  # the step of the newest checkpoint, 0 for none
  pending: tuple[tuple[int, int, jax.Array], ...] = ()  # first step, number of steps, and their sums on the devices
  order: Int[np.ndarray, "steps B"] | None = None  # the epoch's mini-batches
  source: PyTree = ()  # the teacher's, in this epoch
  stopped: bool = False  # by on_epoch


class Lane(NamedTuple):
  """A job on its devices: the compiled step, its constant inputs, and where checkpoints and progress go."""

  job: Job
  directory: epath.Path | None
  checkpoints: Any  # Orbax's manager; None without a directory
  step: TrainStep
  source: PyTree  # of a replayed teacher: none, since it changes with the epoch
  arrays: PyTree
  splits: Mapping[str, PyTree]  # those that are evaluated again and again
  key_data: jax.Array
  zero_carry: Carry
  bar: report.Progress
  write: Callable[[int, Mapping[str, float]], None]
  layouts: Sequence[Mapping[str, Any]]  # every one that took part, the own one last


def train(
  jobs: Sequence[Job],
  directories: Sequence[epath.Path | None],
  stop_requested: Callable[[], bool],
  progress: bool,
) -> list[Generation]:
  """Trains generations side by side, each on devices of its own and in its own directory (None keeps nothing).

  Each resumes from its newest checkpoint. Where `stop_requested` says so, all are saved and Preempted is raised.
  """
  finished: dict[int, Generation] = {}
  with contextlib.ExitStack() as stack:
    opened = []
    for job, directory in zip(jobs, directories, strict=True):
      title = f"generation {job.generation}" + (f", seed {job.cfg.seed}" if len(jobs) > 1 else "")
      opened.append(stack.enter_context(_open(job, directory, title, progress)))
    lanes, lives = map(list, zip(*opened, strict=True))
    dispatched = stack.enter_context(profiling.tracing())
    while len(finished) < len(lanes):
      running = [place for place in range(len(lanes)) if place not in finished]
      for place in running:
        with storage.storage_errors(directories[place]):
          lives[place] = _advance(lanes[place], lives[place])
          dispatched(lives[place].state)
      stop = stop_requested()
      for place in running:
        with storage.storage_errors(directories[place]):
          if _is_done(lanes[place], lives[place]):
            finished[place] = _finish(lanes[place], lives[place])
          else:
            lives[place] = _checkpoint(lanes[place], lives[place], due=stop)
      if stop:
        _end_early(lanes, lives)
  return [finished[place] for place in range(len(jobs))]


def _is_done(lane: Lane, live: Live) -> bool:
  return live.stopped or live.done == lane.job.total_steps


@contextlib.contextmanager
def _open(job: Job, directory: epath.Path | None, title: str, progress: bool) -> Iterator[tuple[Lane, Live]]:
  """Yields a job placed on its devices, at its newest checkpoint or its beginning."""
  primary = processes.is_primary()
  with contextlib.ExitStack() as stack:
    stack.enter_context(storage.storage_errors(directory))
    storage.provenance()  # as the software is before a long training
    checkpoints = stack.enter_context(storage.open_steps(directory / "steps")) if directory else None
    state, zero_carry = initial(job)
    carry, record = zero_carry, dict[str, Any](history=[], sums={}, layouts=[])
    if checkpoints:
      check = functools.partial(_check_resumed, job, directory)
      restored = storage.restore_newest(checkpoints, {"state": state, "carry": carry}, check)
      if restored:
        tree, record = restored
        state, carry = tree["state"], tree["carry"]
    done = int(state.step)
    bar = report.Progress(title, job.total_steps, done, progress and primary)
    history, sums = storage.numbers(record["history"]), storage.numbers(record["sums"])
    lane = Lane(
      job=job,
      directory=directory,
      checkpoints=checkpoints,
      step=step_of(job),
      source=() if job.teacher.recorded else devices_lib.broadcast(job.teacher.source, job.devices),
      arrays=devices_lib.broadcast_split(job.dataset, "train", job.devices),
      splits={split: devices_lib.broadcast_split(job.dataset, split, job.devices) for split in _repeated(job)},
      key_data=devices_lib.broadcast(jax.random.key_data(jax.random.fold_in(job.key, STEPS)), job.devices),
      zero_carry=devices_lib.split_rows(zero_carry, job.devices),
      bar=stack.enter_context(contextlib.closing(bar)),
      write=stack.enter_context(report.tensorboard(directory if primary else None, done)),
      layouts=_layouts(job, record, done),
    )
    state, carry = devices_lib.broadcast(state, job.devices), devices_lib.place_rows(carry, job.devices)
    yield lane, Live(state, carry, done, sums, tuple(history), time.monotonic(), done)


def initial(job: Job) -> tuple[TrainState, Carry]:
  """Returns a generation's state and carry before its first step, as NumPy arrays on the host, rows in global order."""
  key = jax.random.fold_in(job.key, INIT)
  variables = job.student.init(key) if job.initial is None else trees.to_plain(job.initial)
  state = initial_state(variables, job.optimizer.transformation, job.teacher.copied)
  rows = job.cfg.train.batch_size
  carry = (job.student.init_carry(rows), job.teacher.teaching.init_carry(rows))
  return jax.tree.map(np.asarray, jax.device_get((state, carry)))


def step_of(job: Job) -> TrainStep:
  """Returns the compiled training step of a job."""
  return make_train_step(
    student=job.student,
    teaching=job.teacher.teaching,
    frozen=tuple(job.teacher.copied),
    loss=job.loss,
    optimizer=job.optimizer.transformation,
    fetch=job.dataset.fetch,
    devices=job.devices,
    sync_batch_stats=job.cfg.train.sync_batch_stats and not job.student.local_batch_stats,
    gradient_split=job.cfg.train.gradient_split,
    mapping=job.cfg.train.mapping,
  )


def _check_resumed(job: Job, directory: epath.Path, record: Mapping[str, Any]) -> None:
  """Raises where a checkpoint cannot be continued by this job, and warns where it comes from another layout."""
  recorded, own = record["lineage"], job.lineage
  storage.check_lineage(own, recorded, directory)
  replayed = own["layout"]["replayed"]
  if recorded["layout"].get("replayed", replayed) != replayed:  # a recorded teacher has another carry
    begun, now = ("live", "recorded") if replayed else ("recorded", "live")
    raise CheckpointError(
      f"{directory} was begun with a {begun} teacher, and is now to have a {now} one (train.replay; tables record the "
      f"teachers that several of their columns share); continue it as it was begun, or remove {directory}/steps"
    )
  if job.has_dropout and recorded["layout"].get("dropout_draws", 1) != own["layout"]["dropout_draws"]:
    raise CheckpointError(
      f"{directory} was begun by an earlier version, which drew dropout's masks otherwise; continue it with that "
      f"version, or remove {directory}/steps to train it anew"
    )
  before, now = (flatten_dict(lineage["layout"], sep=".") for lineage in (recorded, own))
  # An earlier version recorded fewer settings: of those nothing is known.
  changed = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
  if changed and processes.is_primary():
    logger.warning(
      f"{directory} is resumed on another layout ({'; '.join(changed)}): its bytes may differ from those of a run left "
      "alone"
    )


def _layouts(job: Job, record: Mapping[str, Any], done: int) -> list[Mapping[str, Any]]:
  """Returns the layouts that took part in a generation, each with the steps that were done before: `record`'s and ours.

  A checkpoint of an earlier version, which keeps no list, has the layout of its lineage.
  """
  earlier = record.get("layouts") or ([{"steps": 0, **record["lineage"]["layout"]}] if "lineage" in record else [])
  own = {"steps": done, **job.lineage["layout"]}
  if earlier and {**earlier[-1], "steps": done} == own:
    return list(earlier)
  return [*earlier, own]


def _advance(lane: Lane, live: Live) -> Live:
  """Dispatches the next steps, reads the sums of earlier ones, and closes the epoch where it ends."""
  live = _dispatch(lane, live)
  live = _read(lane, live, keep=max(1, IN_FLIGHT // lane.job.steps_per_dispatch))
  return _end_epoch(lane, live) if live.done % lane.job.steps_per_epoch == 0 else live


def _dispatch(lane: Lane, live: Live) -> Live:
  """Starts the next steps on the devices, at most to the end of the epoch or to the next checkpoint."""
  job = lane.job
  epoch, first = divmod(live.done, job.steps_per_epoch)
  order, source = live.order, live.source
  if first == 0 or order is None:
    key = jax.random.fold_in(jax.random.fold_in(job.key, ORDER), epoch)
    order = job.dataset.train_order(key, job.cfg.train.batch_size)
    replayed = job.teacher.recorded is not None
    source = replay.epoch_source(job, epoch, order, lane.arrays, lane.key_data) if replayed else lane.source
  every = job.cfg.train.checkpoint_every
  count = min(job.steps_per_dispatch, job.steps_per_epoch - first, every - live.done % every)
  carry = devices_lib.place(lane.zero_carry, job.devices) if first == 0 else live.carry  # it is donated
  index = devices_lib.split_batches(order[first : first + count], job.devices, job.steps_per_dispatch)
  state, carry, sums = lane.step.run(live.state, source, carry, lane.arrays, index, lane.key_data)
  lane.bar.advance(count)
  pending = (*live.pending, (live.done + 1, count, sums))
  done = live.done + count
  return live._replace(state=state, carry=carry, done=done, pending=pending, order=order, source=source)


def _read(lane: Lane, live: Live, keep: int) -> Live:
  """Adds up the sums of all dispatches but the last `keep`; raises a TrainingError where they are not finite."""
  sums, pending = collections.Counter(live.sums), collections.deque(live.pending)
  while len(pending) > keep:
    first, count, device_sums = pending.popleft()
    for number, row in enumerate(devices_lib.unreplicate(device_sums)[:count], first):
      values = dict(zip(lane.step.sums, row.tolist(), strict=True))
      mean = values["loss"] / values["weight"] if values["weight"] else np.nan
      if not (values.pop("finite") and np.isfinite(mean)):
        raise _diverged(lane, live, number, mean)
      sums.update(values)
  return live._replace(sums=sums, pending=tuple(pending))


def _diverged(lane: Lane, live: Live, number: int, mean: float) -> TrainingError:
  what = "its parameters or batch statistics are" if np.isfinite(mean) else f"its training loss, {mean}, is"
  kept = f"; the checkpoint of step {live.saved} is kept" if lane.checkpoints and live.saved else ""
  epoch = (number - 1) // lane.job.steps_per_epoch + 1
  return TrainingError(
    f"generation {lane.job.generation} diverged in epoch {epoch} at step {number}: {what} not finite; "
    f"a lower optim.learning_rate or optim.clip_norm may help{kept}"
  )


def _end_epoch(lane: Lane, live: Live) -> Live:
  """Adds the epoch's row to the history, evaluates where that is due, and sets the rate where it depends on that."""
  job, live = lane.job, _read(lane, live, keep=0)
  epoch, state = live.done // job.steps_per_epoch, live.state
  last = epoch == job.cfg.train.epochs
  rate = job.optimizer.rate
  values = {
    **({"learning_rate": rate(live.done - 1, _validated(job, live.history))} if rate else {}),
    **metrics.training_row(live.sums),
    "seconds": round(time.monotonic() - live.epoch_start, 3),
    **_evaluate(lane, state, epoch, last),
  }
  row = {"epoch": epoch, "step": live.done, **values}
  stopped = job.watch.stops((*live.history, row)) and not last
  if stopped:
    values |= _evaluate(lane, state, epoch, last=True)
    row |= values
  history = (*live.history, row)
  if job.optimizer.between_epochs:
    state = state._replace(opt_state=job.optimizer.between_epochs(state.opt_state, _validated(job, history)))
  lane.write(live.done, values)
  if processes.is_primary():
    job.watch.write(live.done, {"generation": job.generation, "epoch": epoch, **values})
  lane.bar.note(**{name: values[name] for name in SHOWN if name in values})
  return live._replace(state=state, sums={}, history=history, epoch_start=time.monotonic(), stopped=stopped)


def _validated(job: Job, history: Sequence[Mapping[str, float]]) -> list[float]:
  """Returns the validation metric of the epochs so far, if the optimizer looks at it."""
  return [row[VALIDATION_METRICS[job.dataset.spec.kind]] for row in history] if job.optimizer.between_epochs else []


def _repeated(job: Job) -> list[str]:
  """Returns the splits that are evaluated in the course of the training, not only after it."""
  splits = ("validation", "test") if job.cfg.train.evaluate_every else ("validation",)
  during = job.cfg.train.evaluate_every or job.optimizer.between_epochs
  return [split for split in job.dataset.splits if during and split in splits]


def _evaluate(lane: Lane, state: TrainState, epoch: int, last: bool) -> dict[str, float]:
  """Returns the metrics, by split, of a network in training where they are due after this epoch."""
  job, cfg = lane.job, lane.job.cfg
  every = cfg.train.evaluate_every
  # Splits beside these three show what a finished generation made of its training examples.
  splits = [split for split in job.dataset.splits if split in ("validation", "test") or last and split != "train"]
  if not (last or every and epoch % every == 0):
    splits = ["validation"] if job.optimizer.between_epochs else []
  # After the last epoch as `evaluate` does it, because these metrics are reported.
  batch_size = cfg.evaluate.batch_size if last else cfg.evaluate.training_batch_size or cfg.evaluate.batch_size
  if not splits:
    return {}
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  dataset = job.dataset._replace(splits={**job.dataset.splits, **lane.splits})
  subject = Subject((job.student,), (variables,), dataset, job.devices)
  return {f"{split}_{name}": value for split in splits for name, value in measure(subject, split, batch_size).items()}


def variables_of(state: TrainState) -> dict[str, Any]:
  """Returns the variables of a state on the devices, on the host."""
  return devices_lib.unreplicate({"params": state.params, "batch_stats": state.batch_stats})


def _checkpoint(lane: Lane, live: Live, due: bool) -> Live:
  """Saves a checkpoint where one is due, without waiting for the disk."""
  job = lane.job
  if lane.checkpoints is None or not (due or live.done % job.cfg.train.checkpoint_every == 0):
    return live
  live = _read(lane, live, keep=0)
  tree = {"state": devices_lib.unreplicate(live.state), "carry": devices_lib.join_rows(live.carry, job.devices)}
  lineage = {key: value for key, value in job.lineage.items() if key != "data"}  # which nobody resumes by
  record = {"lineage": lineage, "history": live.history, "sums": live.sums, "layouts": lane.layouts}
  storage.save_step(lane.checkpoints, live.done, tree, record)
  return live._replace(saved=live.done)


def _finish(lane: Lane, live: Live) -> Generation:
  """Returns the trained generation, and writes it where there is a directory."""
  job = lane.job
  last = {name: value for name, value in live.history[-1].items() if name not in ("epoch", "step", "seconds")}
  params = trees.to_host(variables_of(live.state), job.generation)
  generation = Generation(job.generation, params, last, live.history, job.network)
  if lane.directory is not None:
    lane.checkpoints.wait_until_finished()  # all checkpoints are removed: a save that still runs would miss its own
    ended = {"stopped": {"epoch": len(live.history), "of": job.cfg.train.epochs}} if live.stopped else {}
    record = job.lineage | {"layouts": lane.layouts} | ended | storage.provenance()
    storage.finish(lane.directory, generation, record)
  return generation


def _end_early(lanes: Sequence[Lane], lives: Sequence[Live]) -> None:
  """Raises Preempted after all saves are complete."""
  states = []
  for lane, live in zip(lanes, lives, strict=True):
    state = "finished"
    if not _is_done(lane, live):
      with storage.storage_errors(lane.directory):
        lane.checkpoints.wait_until_finished()
      state = f"saved at step {live.done} of {lane.job.total_steps}"
    states.append(f"generation {lane.job.generation} is {state}")
  raise Preempted(f"asked to end by SIGTERM or Ctrl-C: {'; '.join(states)}. Rerun the command to resume")

"""The loop over training steps, of one generation or of several side by side."""

import collections
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jaxtyping import Int, PyTree

from ban_jax import devices as devices_lib
from ban_jax import feeding, metrics, processes, profiling, replay, report, resuming, storage, trees
from ban_jax.errors import Preempted, TrainingError
from ban_jax.evaluating import Subject, measure
from ban_jax.job import Job
from ban_jax.step import TrainStep, make_train_step
from ban_jax.types import TIMES, Carry, Feed, Generation, TrainState

logger = logging.getLogger(__name__)


# Steps dispatched ahead of the one whose sums are read: enough to keep an accelerator busy, while unbounded dispatch to
# several CPU devices deadlocks. At least one dispatch, however many its steps.
IN_FLIGHT = 8
# The metric, the lower the better, that a schedule may look at.
VALIDATION_METRICS = {"images": "validation_error", "tokens": "validation_perplexity"}
# The metrics that the progress bar shows after an epoch.
SHOWN = (
  *("test_error", "test_perplexity", "test_bits_per_byte", "validation_perplexity", "validation_bits_per_byte"),
  *("train_loss", "train_error"),
)
# What a generation's key is folded with, one number a purpose.
INIT, ORDER, STEPS = range(3)


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
  feeds: Iterator[tuple[int, Feed]] | None = None  # of the epoch's dispatches that are left: steps, and what they take
  waited: float = 0.0  # seconds, for them
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
      title = f"generation {job.generation} ({job.loss.name}{f', seed {job.cfg.seed}' if len(jobs) > 1 else ''})"
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
    carry, record = zero_carry, resuming.NOTHING
    check = functools.partial(resuming.check, job, directory)
    if checkpoints and (found := storage.restore_newest(checkpoints, {"state": state, "carry": carry}, check)):
      tree, record = found
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
      write=stack.enter_context(report.tensorboard(directory if primary else None, done, job.values)),
      layouts=resuming.layouts(job, record, done),
    )
    state, carry = devices_lib.broadcast(state, job.devices), devices_lib.place_rows(carry, job.devices)
    yield lane, Live(state, carry, done, sums, tuple(history), time.monotonic(), done)


def initial(job: Job) -> tuple[TrainState, Carry]:
  """Returns a generation's state and carry before its first step, as NumPy arrays on the host, rows in global order."""
  key = jax.random.fold_in(job.key, INIT)
  variables = job.student.init(key) if job.initial is None else trees.to_plain(job.initial)
  state = job.updates.init(variables, job.teacher.copied)
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
    updates=job.updates,
    fetch=job.dataset.fetch,
    devices=job.devices,
    sync_batch_stats=job.cfg.train.sync_batch_stats and not job.student.local_batch_stats,
    gradient_split=job.cfg.train.gradient_split,
    mapping=job.cfg.train.mapping,
  )


def _advance(lane: Lane, live: Live) -> Live:
  """Dispatches the next steps, reads the sums of earlier ones, and closes the epoch where it ends."""
  live = _dispatch(lane, live)
  live = _read(lane, live, keep=max(1, IN_FLIGHT // lane.job.steps_per_dispatch))
  return _end_epoch(lane, live) if live.done % lane.job.steps_per_epoch == 0 else live


def _dispatch(lane: Lane, live: Live) -> Live:
  """Starts the next steps on the devices, at most to the end of the epoch or to the next checkpoint."""
  job = lane.job
  epoch, first = divmod(live.done, job.steps_per_epoch)
  feeds, source = live.feeds, live.source
  if first == 0 or feeds is None:
    key = jax.random.fold_in(jax.random.fold_in(job.key, ORDER), epoch)
    order = job.dataset.train_order(key, job.cfg.train.batch_size)[: job.steps_per_epoch]
    replayed = job.teacher.recorded is not None
    source = replay.epoch_source(job, epoch, order, lane.arrays, lane.key_data) if replayed else lane.source
    feeds = _feeds(job, order, live.done)
  begun = time.monotonic()
  count, feed = next(feeds)
  waited = live.waited + time.monotonic() - begun
  carry = devices_lib.place(lane.zero_carry, job.devices) if first == 0 else live.carry  # it is donated
  state, carry, sums = lane.step.run(live.state, source, carry, lane.arrays, feed, lane.key_data)
  lane.bar.advance(count)
  pending = (*live.pending, (live.done + 1, count, sums))
  done = live.done + count
  new = {"state": state, "carry": carry, "done": done, "pending": pending}
  return live._replace(**new, feeds=feeds, waited=waited, source=source)


def _feeds(job: Job, order: Int[np.ndarray, "steps B"], done: int) -> Iterator[tuple[int, Feed]]:
  """Returns the dispatches that are left of an epoch after `done` steps: the steps of each, and what it takes."""
  epoch, first = divmod(done, job.steps_per_epoch)
  end, every, counts = done + len(order) - first, job.cfg.train.checkpoint_every, []
  while done < end:  # no dispatch goes beyond a checkpoint
    counts.append(min(job.steps_per_dispatch, end - done, every - done % every))
    done += counts[-1]
  place: dict[str, Any] = {"first": first, "draw": job.draw(epoch)}
  feeds = feeding.feeds(job.dataset, "train", order[first:], counts, job.devices, job.steps_per_dispatch, **place)
  return zip(counts, feeds, strict=True)


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
    **({"learning_rate": rate(live.done // job.updates.accumulate - 1, _validated(job, live.history))} if rate else {}),
    **metrics.training_row(live.sums),
    "seconds": round(time.monotonic() - live.epoch_start, 3),
    **({"waited": round(live.waited, 3)} if "train" in job.dataset.streams else {}),
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
  return live._replace(state=state, sums={}, history=history, epoch_start=time.monotonic(), waited=0.0, stopped=stopped)


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
  variables = job.updates.average(state) or {"params": state.params, "batch_stats": state.batch_stats}
  dataset = job.dataset._replace(splits={**job.dataset.splits, **lane.splits})
  subject = Subject((job.student,), (variables,), dataset, job.devices)
  return {f"{split}_{name}": value for split in splits for name, value in measure(subject, split, batch_size).items()}


def _checkpoint(lane: Lane, live: Live, due: bool) -> Live:
  """Saves a checkpoint where one is due, without waiting for the disk."""
  job = lane.job
  if lane.checkpoints is None or not (due or live.done % job.cfg.train.checkpoint_every == 0):
    return live
  live = _read(lane, live, keep=0)
  tree = {"state": devices_lib.unreplicate(live.state), "carry": devices_lib.join_rows(live.carry, job.devices)}
  # Nobody resumes by what is known of data on the devices.
  lineage = {key: value for key, value in job.lineage.items() if key != "data" or job.dataset.streams}
  record = {"lineage": lineage, "history": live.history, "sums": live.sums, "layouts": lane.layouts}
  storage.save_step(lane.checkpoints, live.done, tree, record)
  return live._replace(saved=live.done)


def _finish(lane: Lane, live: Live) -> Generation:
  """Returns the trained generation, and writes it where there is a directory."""
  job = lane.job
  last = {name: value for name, value in live.history[-1].items() if name not in ("epoch", "step", *TIMES)}
  own = {"params": live.state.params, "batch_stats": live.state.batch_stats}
  params = trees.to_host(job.updates.average(live.state) or devices_lib.unreplicate(own), job.generation)
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

"""Generations: a plain Python loop over training steps, and a plain Python loop over immutable variables trees."""

import collections
import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from ban_jax import checkpoint, data, gradient, losses, optim, preemption, report
from ban_jax import devices as devices_lib
from ban_jax.errors import BanError, CheckpointError, ConfigError, Preempted, StorageError, TrainingError, choices
from ban_jax.evaluate import (
  EVALUATION_LEAST,
  Member,
  check_evaluation,
  check_given,
  check_least,
  evaluate_trees,
  fit_models,
  make_models,
  members_of,
)
from ban_jax.losses import Loss
from ban_jax.models import check_options
from ban_jax.step import make_train_step
from ban_jax.types import Dataset, Devices, Generation, Model, TrainState, Variables

logger = logging.getLogger(__name__)

# Steps dispatched ahead of the one whose sums are read. Unbounded dispatch to several CPU devices deadlocks; this many
# keep an accelerator busy.
IN_FLIGHT = 8
# The metric, the lower the better, by which a plateau schedule decides.
PLATEAU_METRICS = {"images": "validation_error", "tokens": "validation_perplexity"}
# The metrics that the progress bar shows behind an epoch.
SHOWN = ("train_loss", "train_error", "validation_perplexity", "test_error", "test_perplexity")
# What a generation's key is folded with, one number a purpose.
INIT, ORDER, STEPS = range(3)
# The smallest value of what is counted.
LEAST = {
  "seed": 0,
  "generations": 0,
  "train.epochs": 1,
  "train.checkpoint_every": 1,
  "train.evaluate_every": 0,
  **EVALUATION_LEAST,
}


class _Job(NamedTuple):
  """Everything that a generation is trained from, checked and resolved before any work."""

  cfg: ConfigDict
  dataset: Dataset
  student: Model
  parents: tuple[Variables, ...]  # whom the generation depends on
  teachers: tuple[Model, ...]  # those of them whose outputs teach it
  frozen: tuple[str, ...]  # top-level parameters that it copies from its parent
  loss: Loss
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  devices: Devices
  generation: int
  steps_per_epoch: int

  @property
  def total_steps(self) -> int:
    return self.steps_per_epoch * self.cfg.train.epochs

  @property
  def key(self) -> jax.Array:
    """The generation's key."""
    return jax.random.fold_in(jax.random.key(self.cfg.seed, impl="threefry2x32"), self.generation)


def _prepare(
  params_prev: Member | Sequence[Member] | None,
  cfg: ConfigDict,
  generation: int | None,
  devices: Sequence[jax.Device] | None,
) -> _Job:
  """Checks and resolves what a generation needs; raises a BanError where it cannot be trained."""
  check_given(cfg)
  _check_counts(cfg)
  for key, group in (("model", cfg.model), ("teacher.model", cfg.teacher.model)):
    if group is not None:
      check_options(group, key)
  loss = losses.make_loss(cfg.loss)
  optim.make_optimizer(cfg.optim, 1)
  devices = devices_lib.resolve(devices)
  devices_lib.check_batch_size(cfg.train.batch_size, devices)

  dataset = data.load(cfg.data)
  if cfg.optim.schedule == "plateau" and "validation" not in dataset.splits:
    raise ConfigError(
      "optim.schedule='plateau' decides by a validation split, and there is none; hold out a share by data.validation, "
      f"or choose another of: {choices(optim.SCHEDULES)}"
    )
  check_evaluation(cfg, dataset)
  models = make_models(cfg, dataset.spec)
  for key, group, model in (("teacher.model", cfg.teacher.model, models[0]), ("model", cfg.model, models[1])):
    if group is not None:
      _check_memory(key, group, model)
  parents = tuple(members_of(params_prev))
  if params_prev is not None and not parents:
    raise ConfigError("an empty sequence cannot teach; pass None for generation 0")
  fitting = fit_models(parents, models, "teacher")
  for number, tree in enumerate(parents):
    if not _is_finite(checkpoint.thaw(tree)):
      raise CheckpointError(f"teacher {number + 1} has parameters that are not finite; it cannot teach")
  if generation is None:
    generation = 1 + max(map(checkpoint.lineage, parents)) if parents else 0
  if generation < 0:
    raise ConfigError(f"generation must be at least 0, not {generation}")
  student = models[min(generation, 1)]
  frozen = student.inherits if parents else ()
  if frozen:
    _check_inherits(student, parents)
  if not parents:
    loss = losses.make_loss({**cfg.loss, "name": "label"})
  if not loss.needs_teacher:
    fitting = ()
    parents = parents if frozen else ()

  steps_per_epoch = len(dataset.train_order(jax.random.key(0), cfg.train.batch_size))
  total = steps_per_epoch * cfg.train.epochs
  if total >= 2**31:
    raise ConfigError(
      f"train.epochs={cfg.train.epochs}: a run has fewer than 2**31 steps; expected at most "
      f"{(2**31 - 1) // steps_per_epoch} epochs of {steps_per_epoch} steps"
    )
  return _Job(
    cfg=cfg,
    dataset=dataset,
    student=student,
    parents=parents,
    teachers=fitting,
    frozen=frozen,
    loss=loss,
    schedule=optim.make_schedule(cfg.optim, total),
    optimizer=optim.make_optimizer(cfg.optim, total),
    devices=devices,
    generation=generation,
    steps_per_epoch=steps_per_epoch,
  )


def _check_counts(cfg: ConfigDict) -> None:
  """Raises a ConfigError where one of the configuration's whole numbers is out of range, or its label no label."""
  check_least(cfg, LEAST)
  if not cfg.scale.isprintable():
    raise ConfigError(f"scale={cfg.scale!r}: a word that can be printed is expected, since it labels the results")
  for key, bits in (("seed", 32), ("generations", 31)):
    if cfg[key] >= 2**bits:
      raise ConfigError(f"{key} must be below 2**{bits}, not {cfg[key]}")


def _check_memory(key: str, group: ConfigDict, model: Model) -> None:
  """Raises a ConfigError where the parameters of a `model` group's network do not fit into the host's memory."""
  shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
  size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes)
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if size > memory:
    options = ", ".join(f"{name}={value}" for name, value in group.items())
    raise ConfigError(
      f"{key} ({options}): its parameters take {size / 2**30:,.0f} GiB, and this machine has a memory of "
      f"{memory / 2**30:,.0f} GiB; choose smaller numbers"
    )


def _is_finite(variables: Variables) -> bool:
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))


def _check_inherits(student: Model, parents: tuple[Variables, ...]) -> None:
  """Raises a ConfigError where the layers that a student copies from its teacher are not there in the right shapes."""
  names = " and ".join(student.inherits)
  if len(parents) != 1:
    raise ConfigError(f"model {student.name} copies {names} from one teacher; {len(parents)} were given")
  expected = jax.eval_shape(student.init, jax.random.key(0))["params"]
  for name in student.inherits:
    want = checkpoint.leaves(expected[name])
    have = checkpoint.leaves(parents[0]["params"].get(name, {}))
    for path in sorted(want.keys() | have.keys()):
      shapes = [f"{list(tree[path].shape)}" if path in tree else "nothing" for tree in (want, have)]
      if shapes[0] != shapes[1]:
        raise ConfigError(
          f"model {student.name} copies {names} from its teacher, but they do not fit: at {name}/{path} the student "
          f"has {shapes[0]}, the teacher {shapes[1]} (model.stem and the last of model.stages must be what "
          "teacher.model makes them)"
        )


def train_generation(
  params_prev: Member | Sequence[Member] | None,
  cfg: ConfigDict,
  *,
  generation: int | None = None,
  workdir: epath.PathLike | None = None,
  devices: Sequence[jax.Device] | None = None,
  progress: bool = True,
) -> Generation:
  """Trains one generation: from the labels where `params_prev` is None, else taught by it (Eq. 3).

  `params_prev` is a variables tree, a Generation, or a sequence of them, which teaches by its mean probabilities.
  `generation` defaults to 0 for None and else to one more than the teacher's; with `cfg.seed` it determines every
  random draw. The same arguments give the same bytes on the same machine, device count and thread settings.

  With `workdir`, the generation is checkpointed under `workdir/gen_K`, goes on from there when called again, and is
  only read back once it is finished. `devices` defaults to all; `progress` shows a bar on a terminal, lines elsewhere.

  Returns a Generation whose `params` are immutable and on the host. Raises, before any training, a ConfigError for a
  configuration that cannot be run, a DataError for missing data, and a CheckpointError for a tree that does not fit its
  network or a workdir that holds something else or is in use. While it trains: a TrainingError within `IN_FLIGHT` steps
  of the first number that is not finite; with `workdir` a StorageError where that cannot be written any more, and
  Preempted behind a checkpoint after a SIGTERM.
  """
  job = _prepare(params_prev, cfg, generation, devices)
  if workdir is None:
    return _train(job, None, progress, lambda: False)
  with checkpoint.open_workdir(workdir, cfg) as workdir:
    _check_processes(_lineage(job))
    directory = workdir / f"gen_{job.generation}"
    finished = load_finished(directory)
    if finished is None:
      with preemption.watch() as requested, checkpoint.storage_errors(directory):
        return _train(job, directory, progress, requested)
    done, manifest = finished
    _check_lineage(_lineage(job), manifest, directory)
    return done


def run(
  cfg: ConfigDict,
  workdir: epath.PathLike,
  *,
  devices: Sequence[jax.Device] | None = None,
  progress: bool = True,
) -> list[Generation]:
  """Trains the whole sequence of Eq. 3, a teacher and `cfg.generations` born-again students, each taught by the last.

  Goes on where an earlier call in the same `workdir` ended, skips what is finished, and returns all generations. Raises
  what `train_generation` raises.
  """
  check_run(cfg, devices)
  generations = []
  with checkpoint.open_workdir(workdir, cfg):  # held from the first generation to the last
    for index in range(cfg.generations + 1):
      teacher = generations[-1] if generations else None
      generations.append(
        train_generation(teacher, cfg, generation=index, workdir=workdir, devices=devices, progress=progress)
      )
  return generations


def check_run(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
  """Raises what `run` would before any training: a workdir should not be given a configuration that cannot be run."""
  job = _prepare(None, cfg, 0, devices)
  student = make_models(cfg, job.dataset.spec)[1]
  if cfg.generations and student.inherits:
    _check_inherits(student, (jax.eval_shape(job.student.init, jax.random.key(0)),))


def load_finished(directory: epath.Path) -> tuple[Generation, dict[str, Any]] | None:
  """Returns what `checkpoint.load` does, alike on all processes: one that trained alone would wait for ever."""
  finished = error = None
  try:
    finished = checkpoint.load(directory)
  except BanError as refusal:
    error = refusal
  devices_lib.raise_together(error)
  if devices_lib.on_any_process(finished is None) and finished is not None:
    error = StorageError(f"another process does not see yet that {directory} is finished; start all of them again")
  devices_lib.raise_together(error)
  return finished


def _lineage(job: _Job) -> dict[str, Any]:
  """Returns what ties a generation to where it comes from."""
  return {
    "generation": job.generation,
    "seed": job.cfg.seed,
    "scale": job.cfg.scale,
    "model": job.student.name,
    "loss": job.loss.name,
    "teachers": [checkpoint.digest(tree) for tree in job.parents],
    "config": checkpoint.config_digest(job.cfg),
    "dataset": job.dataset.digest,
    # What bytes depend on beyond that; recorded, and no reason to refuse a resumption.
    "layout": devices_lib.layout(job.devices),
  }


def _check_processes(lineage: dict[str, Any]) -> None:
  """Raises a ConfigError where the processes of a run were not given the same, naming what differs."""
  differing = [key for key, value in lineage.items() if key != "layout" and not devices_lib.is_same(str(value))]
  if differing:
    raise ConfigError(
      f"the processes of this run differ in: {', '.join(differing)}; give all of them the same configuration and data"
    )


def _check_lineage(own: dict[str, Any], recorded: dict[str, Any], directory: epath.Path) -> None:
  """Raises a CheckpointError where a generation on disk has another origin."""
  differing = [key for key in own if key != "layout" and own[key] != recorded.get(key)]
  if differing:
    detail = "; ".join(f"{key}: {recorded.get(key)} there, {own[key]} here" for key in differing)
    raise CheckpointError(
      f"{directory} holds a generation of another origin ({detail}); give another workdir, or remove it"
    )


def _initial(job: _Job) -> tuple[TrainState, Any]:
  """Returns a generation's (state, carry) before its first step, as NumPy arrays on the host, rows in global order."""
  variables = job.student.init(jax.random.fold_in(job.key, INIT))
  params = variables["params"] | {name: checkpoint.thaw(job.parents[0])["params"][name] for name in job.frozen}
  trained = {name: tree for name, tree in params.items() if name not in job.frozen}
  state = TrainState(np.int32(0), params, variables.get("batch_stats", {}), job.optimizer.init(trained))
  rows = job.cfg.train.batch_size
  carry = (job.student.init_carry(rows), tuple(teacher.init_carry(rows) for teacher in job.teachers))
  return jax.tree.map(np.asarray, jax.device_get((state, carry)))


def _train(job: _Job, directory: epath.Path | None, show: bool, requested: Callable[[], bool]) -> Generation:
  """Trains a generation from its newest checkpoint, or its beginning, to its end, or until it is `requested` to end."""
  cfg, devices = job.cfg, job.devices
  lineage = _lineage(job)
  provenance = checkpoint.provenance()
  state, carry = _initial(job)
  zero_carry = carry
  history: list[dict[str, float]] = []
  sums = collections.Counter()  # of the epoch so far

  with checkpoint.open_steps(directory / "steps") if directory else contextlib.nullcontext() as manager:
    target = {"state": state, "carry": carry}
    restored = manager and checkpoint.restore_newest(
      manager, target, lambda record: _check_lineage(lineage, record["lineage"], directory)
    )
    if restored:
      tree, record = restored
      if lineage["layout"] != record["lineage"]["layout"] and devices_lib.is_primary():
        logger.warning(
          "%s was begun on %s and is resumed on %s: its bytes may differ from those of a run left alone",
          directory,
          record["lineage"]["layout"],
          lineage["layout"],
        )
      state, carry = tree["state"], tree["carry"]
      history, sums = record["history"], collections.Counter(record["sums"])
    start = saved = int(state.step)

    step = make_train_step(
      student=job.student,
      teachers=job.teachers,
      frozen=job.frozen,
      loss=job.loss,
      optimizer=job.optimizer,
      fetch=job.dataset.fetch,
      devices=devices,
      sync_batch_stats=cfg.train.sync_batch_stats,
      gradient_split=cfg.train.gradient_split,
    )
    state = devices_lib.replicate(state, devices)
    carry = devices_lib.split_rows(carry, devices)
    teacher_variables = devices_lib.broadcast(tuple(map(checkpoint.thaw, job.parents[: len(job.teachers)])), devices)
    arrays = devices_lib.broadcast(job.dataset.splits["train"], devices)
    key_data = devices_lib.broadcast(jax.random.key_data(jax.random.fold_in(job.key, STEPS)), devices)
    in_flight = collections.deque()

    def read(limit: int) -> None:
      """Adds up the sums of all steps but the last `limit`, once they are known to be finite."""
      while len(in_flight) > limit:
        number, values = in_flight.popleft()
        values = {name: float(value) for name, value in devices_lib.first(values).items()}
        mean = values["loss"] / values["weight"] if values["weight"] else np.nan
        if not (values.pop("finite") and np.isfinite(mean)):
          what = "its parameters or their momentum are" if np.isfinite(mean) else f"its training loss, {mean}, is"
          kept = f"; the checkpoint of step {saved} is kept" if manager and saved else ""
          epoch = (number - 1) // job.steps_per_epoch + 1
          raise TrainingError(
            f"generation {job.generation} diverged in epoch {epoch} at step {number}: {what} not finite; "
            f"a lower optim.learning_rate or optim.clip_norm may help{kept}"
          )
        sums.update(values)

    title = f"generation {job.generation}"
    epoch_start = time.monotonic()
    with (
      report.progress(title, job.total_steps, start, show and devices_lib.is_primary()) as bar,
      report.tensorboard(directory if devices_lib.is_primary() else None) as write,
    ):
      for done in range(start + 1, job.total_steps + 1):
        epoch, within = divmod(done - 1, job.steps_per_epoch)
        if within == 0 or done == start + 1:
          order_key = jax.random.fold_in(jax.random.fold_in(job.key, ORDER), epoch)
          order = job.dataset.train_order(order_key, cfg.train.batch_size)
        if within == 0:
          carry = devices_lib.split_rows(zero_carry, devices)
        index = devices_lib.split_rows(order[within], devices)
        state, carry, step_sums = step(state, teacher_variables, carry, arrays, index, key_data)
        in_flight.append((done, step_sums))
        read(IN_FLIGHT)
        bar.advance()

        if within + 1 == job.steps_per_epoch:
          read(0)
          row = _summary(job, epoch + 1, done, sums, history, epoch_start)
          sums.clear()
          row |= _evaluate(job, state, epoch + 1)
          history.append(row)
          if cfg.optim.schedule == "plateau":
            state = state._replace(opt_state=optim.set_rate(state.opt_state, _rate(job, done, history)))
          write(done, {name: value for name, value in row.items() if name not in ("epoch", "step")})
          bar.note(**{name: row[name] for name in SHOWN if name in row})
          epoch_start = time.monotonic()
        end = requested()
        if manager and done < job.total_steps and (end or done % cfg.train.checkpoint_every == 0):
          read(0)
          tree = {"state": devices_lib.first(state), "carry": devices_lib.join_rows(carry, devices)}
          checkpoint.save_step(manager, done, tree, {"lineage": lineage, "history": history, "sums": dict(sums)})
          saved = done
        if end and done < job.total_steps:
          manager.wait_until_finished()
          raise Preempted(
            f"asked to end by SIGTERM: generation {job.generation} is saved at step {done} of {job.total_steps}; "
            "the same command goes on from there"
          )

  variables = devices_lib.first({"params": state.params, "batch_stats": state.batch_stats})
  last = {name: value for name, value in history[-1].items() if name not in ("epoch", "step", "seconds")}
  generation = Generation(job.generation, checkpoint.freeze(variables, job.generation), last, tuple(history))
  if directory is not None:
    checkpoint.finish(directory, generation, lineage | provenance)
  if end:
    raise Preempted(
      f"asked to end by SIGTERM: generation {job.generation} is finished; the same command goes on behind it"
    )
  return generation


def _rate(job: _Job, step: int, history: list[dict[str, float]]) -> float:
  """Returns the learning rate of a step, behind the epochs in `history`."""
  if job.cfg.optim.schedule != "plateau":
    return float(job.schedule(step - 1))
  return optim.plateau_rate(job.cfg.optim, [row[PLATEAU_METRICS[job.dataset.spec.kind]] for row in history])


def _summary(
  job: _Job, epoch: int, step: int, sums: dict[str, float], history: list[dict[str, float]], start: float
) -> dict[str, float]:
  """Returns an epoch's row of the history, from its summed metrics and the rows before it."""
  row = {
    "epoch": epoch,
    "step": step,
    "learning_rate": _rate(job, step, history),
    "train_loss": sums["loss"] / sums["weight"],
    "train_error": 100 * sums["errors"] / sums["count"],
    "seconds": round(time.monotonic() - start, 3),
  }
  return row | (gradient.summarise(sums) if "dark_squared" in sums else {})


def _evaluate(job: _Job, state: TrainState, epoch: int) -> dict[str, float]:
  """Returns the metrics, by split, of a network in training where they are due behind this epoch."""
  cfg = job.cfg
  last = epoch == cfg.train.epochs
  due = last or cfg.train.evaluate_every and epoch % cfg.train.evaluate_every == 0
  splits = [split for split in ("validation", "test") if split in job.dataset.splits] if due else []
  if cfg.optim.schedule == "plateau":
    splits = splits or ["validation"]
  if not splits:
    return {}
  # The finished network's numbers are those that are reported.
  batch_size = cfg.evaluate.batch_size if last else cfg.evaluate.training_batch_size or cfg.evaluate.batch_size
  variables = devices_lib.first({"params": state.params, "batch_stats": state.batch_stats})
  return {
    f"{split}_{name}": value
    for split in splits
    for name, value in evaluate_trees((job.student,), (variables,), job.dataset, split, batch_size, job.devices).items()
  }

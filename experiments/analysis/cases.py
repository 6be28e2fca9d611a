"""What experiments/bench.py measures: networks on synthetic data of the real shapes, and our side of every measurement.

A network is one entry of ROWS, a kind of step one entry of KINDS. A side of a comparison is a function that runs a
number of steps and waits for the last one.
"""

import collections
import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ban_jax import config, data, presets, programs, replay, resolving, step, train
from ban_jax import devices as devices_lib
from ban_jax import job as job_lib
from ban_jax.data import augment, images, text
from ban_jax.errors import look_up
from ban_jax.job import Job
from ban_jax.programs import Program
from ban_jax.resolving import Setup
from ban_jax.types import Dataset, Devices, Model, Variables
from experiments import cli

Run = Callable[[int], None]

# Mini-batches of synthetic data. Steps go through them again and again.
BATCHES = 64
IMAGES = 64  # in a mini-batch, unless the command line says otherwise
# Labels are random and networks untrained: a small rate keeps all numbers finite, and no step's work depends on it.
RATE = 1e-3


class Row(NamedTuple):
  """A network: words of ban_jax/presets, what is changed, and whether it is measured on accelerators alone."""

  words: str
  changes: Mapping[str, Any] = {}
  large: bool = False


# Wide-ResNets have no dropout here: what is compared are convolutions, not random generators.
ROWS = {
  "wrn_16_1": Row("cifar10,wrn_16_1"),
  "wrn_28_2": Row("cifar10,wrn_28_2", {"model.dropout": 0.0}),
  "wrn_16_4": Row("cifar10,wrn_16_1", {"model.width": 4}),
  "densenet_40_12": Row("cifar10,densenet_40_12"),
  "lstm_200": Row("ptb,lstm_200"),
  "lstm_650": Row("ptb,lstm_200", {"model.units": 650, "model.dropout": 0.5, "model.init_scale": 0.05}),
  "lstm_1500": Row("ptb,lstm", large=True),  # of Table 6
  "cnn_lstm": Row("ptb,cnn_lstm"),
  "wrn_28_1": Row("cifar10,wrn_28_1", {"model.dropout": 0.0}, large=True),
  "wrn_28_10": Row("cifar10,wrn_28_10", {"model.dropout": 0.0}, large=True),
  "densenet_90_60": Row("cifar10,densenet_90_60", large=True),
}


class Kind(NamedTuple):
  """A kind of step: how its job is prepared, how a job's steps are run, and the program that they are.

  `prepare(setup, parent)` takes the variables of an untrained network, which may teach. `program(job)` takes one
  mini-batch a call, so that its operations can be counted, and `program(job, steps=0)` as many as `run`'s.
  """

  prepare: Callable[[Setup, Variables], Job]
  run: Callable[[Job], Run]
  program: Callable[..., Program] = functools.partial(programs.training, steps=1)
  trains: bool = True
  images_only: bool = False


def configuration(
  row: str, *, batch: int = 0, dtype: str = "float32", batches: int = BATCHES, changes: Mapping[str, Any] | None = None
) -> ConfigDict:
  """Returns the checked configuration of a row with an epoch of `batches` steps.

  `batch` 0 is the preset's mini-batch for text and `IMAGES` for images. Raises a ConfigError for an unknown row.
  """
  words, own, _ = look_up(ROWS, row, "row")
  cfg = presets.compose(f"{words},paper")
  cfg.update_from_flattened_dict({"optim.learning_rate": RATE, **own, "compute_dtype": dtype})
  cli.change(cfg, changes or {}, "--changes")
  cfg.train.batch_size = batch or (cfg.train.batch_size if cfg.data.window else IMAGES)
  cfg.data.train_examples = batches * cfg.train.batch_size * max(1, cfg.data.window)
  cfg.evaluate.update(batch_size=1, training_batch_size=1)
  config.check(cfg)
  return cfg


def is_measured(row: str, kind: str, *, training: bool = False) -> bool:
  """Returns whether a row has steps of a kind; with `training`, whether these train, too."""
  has_images = not presets.compose(f"{look_up(ROWS, row, 'row').words},paper").data.window
  return (has_images or not KINDS[kind].images_only) and (KINDS[kind].trains or not training)


def synthetic(group: ConfigDict) -> Dataset:
  """Returns random data of the shapes that a `data` group describes, with the smallest evaluation splits there can be.

  Nothing is read, and equal groups give the same object.
  """
  return _synthetic(tuple(sorted(group.items())))


@functools.lru_cache(maxsize=4)
def _synthetic(group: tuple[tuple[str, Any], ...]) -> Dataset:
  group = dict(group)
  known, rng = data.describe(group), np.random.default_rng(0)
  classes = known.spec.num_classes
  if known.spec.kind == "images":
    shape = known.splits["train"]["images"].shape
    pixels = rng.integers(0, 256, shape, np.uint8)
    labels = rng.permutation(np.arange(len(pixels), dtype=np.int32) % classes)  # some of each class
    pool = images.Examples(pixels, labels)
    options = images.Options(**{key: group[key] for key in images.Options._fields})
    options = options._replace(augment=augment.choose(options.augment, group))
    return images.build(group["name"], pool, images.take(pool, np.arange(1)), num_classes=classes, options=options)
  tokens = rng.integers(0, classes, known.splits["train"]["tokens"].shape, np.int32)
  window = tokens[: group["window"] + 1]
  options = text.Options(**{key: group[key] for key in text.Options._fields})
  return text.of_streams(
    group["name"], {"train": tokens, "validation": window, "test": window}, known.spec, options=options
  )


def setup_of(cfg: ConfigDict, devices: Devices) -> Setup:
  """Returns a configuration's Setup on synthetic data."""
  return resolving.resolve(cfg, devices, load=synthetic)


def job_of(kind: Kind, setup: Setup) -> Job:
  """Returns the job whose steps are measured; its teacher, if any, is an untrained network like the student."""
  return kind.prepare(setup, untrained(setup.models[0]))


def untrained(model: Model) -> Variables:
  """Returns variables that are finite and of the right shapes, without compiling anything."""
  shapes, rng = model.shapes, np.random.default_rng(1)
  params = jax.tree.map(lambda leaf: (0.05 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes["params"])
  batch_stats = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes["batch_stats"])
  return {"params": params, "batch_stats": batch_stats}


def training(job: Job, *, fixed: bool = False) -> Run:
  """Returns a function that runs training steps as ban_jax.train does; on one mini-batch again and again if `fixed`."""
  devices, size = job.devices, job.steps_per_dispatch
  compiled = train.step_of(job)
  state, carry = train.initial(job)
  state, carry = devices_lib.broadcast(state, devices), devices_lib.split_rows(carry, devices)
  source, arrays = (
    devices_lib.broadcast(job.teacher.source, devices),
    devices_lib.broadcast_split(job.dataset, "train", devices),
  )
  key_data = devices_lib.broadcast(jax.random.key_data(jax.random.fold_in(job.key, train.STEPS)), devices)
  order = job.dataset.train_order(job.key, job.cfg.train.batch_size)
  if job.teacher.recorded:
    source = replay.epoch_source(job, 0, order, arrays, key_data)
  batches = itertools.repeat(order[0]) if fixed else itertools.cycle(order)

  def run(steps: int) -> None:
    nonlocal state, carry
    pending = collections.deque()
    for first in range(0, steps, size):
      chosen = np.stack(list(itertools.islice(batches, min(size, steps - first))))
      feed = {"index": devices_lib.split_batches(chosen, devices, size)}
      state, carry, sums = compiled.run(state, source, carry, arrays, feed, key_data)
      pending.append(sums)
      if len(pending) > max(1, train.IN_FLIGHT // size):  # unbounded dispatch to several CPU devices deadlocks
        devices_lib.unreplicate(pending.popleft())
    jax.block_until_ready(state)

  return run


def evaluation(job: Job) -> Run:
  """Returns a function that runs evaluation steps of the student on training batches, as ban_jax.evaluate does."""
  devices, rows = job.devices, job.cfg.train.batch_size
  size = job_lib.block_size(job.dataset, "train", rows, devices)
  compiled = step.make_eval_step((job.student,), job.dataset.fetch, devices)
  variables = devices_lib.broadcast((untrained(job.student),), devices)
  arrays = devices_lib.broadcast_split(job.dataset, "train", devices)
  carries = devices_lib.split_rows((job.student.init_carry(rows),), devices)
  batches = itertools.cycle(job.dataset.train_order(job.key, rows))

  def run(steps: int) -> None:
    nonlocal carries
    for first in range(0, steps, size):
      chosen = np.stack(list(itertools.islice(batches, min(size, steps - first))))
      feed = {"index": devices_lib.split_batches(chosen, devices, size)}
      carries, sums = compiled.run(variables, carries, arrays, feed)
      devices_lib.unreplicate(sums)

  return run


@functools.cache
def recordings() -> tempfile.TemporaryDirectory:
  """Returns the directory of recorded teachers, which is removed when the process ends."""
  return tempfile.TemporaryDirectory(prefix="ban_jax_bench")


def evaluation_program(job: Job, steps: int = 1) -> Program:
  """Returns the program of `evaluation`'s steps."""
  return programs.evaluation(job, job.cfg.train.batch_size, steps, "train")


def prepare_supervised(setup: Setup, parent: Variables) -> Job:
  """Returns the job of generation 0."""
  del parent
  return job_lib.prepare(setup, None, 0)


def prepare_taught(setup: Setup, parent: Variables, *, teachers: int = 1) -> Job:
  """Returns the job of a student of a teacher, or of an ensemble of as many as `teachers` says."""
  return job_lib.prepare(setup, [parent] * teachers, 1)


def prepare_replayed(setup: Setup, parent: Variables, *, teachers: int = 1) -> Job:
  """Returns the job of a student of recorded teachers; of images, since text would record all words' logits."""
  cfg = setup.cfg.copy_and_resolve_references()
  cfg.train.replay = recordings().name
  return prepare_taught(setup._replace(cfg=cfg), parent, teachers=teachers)


KINDS = {
  "supervised": Kind(prepare_supervised, training),
  "distilled": Kind(prepare_taught, training),
  "replayed": Kind(prepare_replayed, training, images_only=True),
  "evaluation": Kind(prepare_supervised, evaluation, evaluation_program, trains=False),
  # By an ensemble of three.
  "distilled_3": Kind(functools.partial(prepare_taught, teachers=3), training),
  "replayed_3": Kind(functools.partial(prepare_replayed, teachers=3), training, images_only=True),
}

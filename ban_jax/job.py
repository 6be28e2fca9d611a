"""From what a caller gives to what is trained: a checked Setup for all generations of a run, and a Job for each one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from ml_collections import ConfigDict

from ban_jax import config, data, losses, optim, trees
from ban_jax import devices as devices_lib
from ban_jax import teacher as teacher_lib
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.losses import Loss
from ban_jax.models import make_model
from ban_jax.teacher import Teacher
from ban_jax.trees import Member
from ban_jax.types import Dataset, Devices, InputSpec, Model, Variables

# Steps a dispatch where the configuration leaves the number open, enough to hide the host's millisecond for a dispatch.
# Images on CPU take single steps: a convolution inside a compiled loop is 30 times slower there.
BLOCK = 32


class Setup(NamedTuple):
  """What the generations of a run share: the configuration, checked once, and what it names."""

  cfg: ConfigDict
  dataset: Dataset
  models: tuple[Model, Model]  # generation 0's network, the students' network
  devices: Devices


class Job(NamedTuple):
  """Everything that one generation is trained from, checked before any work."""

  cfg: ConfigDict
  dataset: Dataset
  devices: Devices
  generation: int
  student: Model
  teacher: Teacher
  loss: Loss
  schedule: optax.Schedule
  optimizer: optax.GradientTransformation
  steps_per_epoch: int
  steps_per_dispatch: int

  @property
  def total_steps(self) -> int:
    """The steps of all epochs."""
    return self.steps_per_epoch * self.cfg.train.epochs

  @property
  def key(self) -> jax.Array:
    """The generation's key."""
    return jax.random.fold_in(jax.random.key(self.cfg.seed, impl="threefry2x32"), self.generation)

  @property
  def lineage(self) -> dict[str, Any]:
    """What ties the generation to where it comes from, for its checkpoints and its manifest."""
    values = config.record(self.cfg)
    return {
      "generation": self.generation,
      "seed": self.cfg.seed,
      "scale": self.cfg.scale,
      "model": self.student.name,
      "loss": self.loss.name,
      "teachers": list(self.teacher.digests),
      "config": values,
      "identity": config.identity_digest(values, self.generation),
      "dataset": self.dataset.digest,
      "data": dict(self.dataset.record),
      # Bytes depend on it too, but a run may be resumed on another one.
      "layout": {
        **devices_lib.layout(self.devices),
        "steps_per_dispatch": self.steps_per_dispatch,
        "replayed": self.teacher.recorded is not None,
      },
    }


def resolve(cfg: ConfigDict, devices: Sequence[jax.Device] | None) -> Setup:
  """Returns what a configuration names; raises a ConfigError or a DataError where it cannot be run or evaluated."""
  if jax.config.jax_enable_x64:
    raise ConfigError("jax_enable_x64 is set: ban_jax trains in float32 or bfloat16; switch 64-bit mode off")
  config.check(cfg)
  dataset = data.load(cfg.data)
  config.check_dataset(cfg, dataset)
  return Setup(cfg, dataset, make_models(cfg, dataset.spec), devices_lib.resolve(devices))


def make_models(cfg: ConfigDict, spec: InputSpec) -> tuple[Model, Model]:
  """Returns (generation 0's network, the students' network) of a configuration, for a data set's inputs."""
  options = {"compute_dtype": cfg.compute_dtype, "sync_batch_stats": cfg.train.sync_batch_stats}
  student = make_model(cfg.model, spec, **options)
  teacher = make_model(cfg.teacher.model, spec, key="teacher.model", **options) if cfg.teacher.model else student
  return teacher, student


def resolve_run(cfg: ConfigDict, devices: Sequence[jax.Device] | None) -> Setup:
  """Returns `resolve`'s Setup, for training; raises whatever any generation of the run would raise at its start."""
  setup = resolve(cfg, devices)
  config.check_batch_size(cfg.train.batch_size, setup.devices)
  setup.dataset.train_order(jax.random.key(0), cfg.train.batch_size)
  if cfg.generations:
    teacher = jax.eval_shape(setup.models[0].init, jax.random.key(0))
    _check_inherits(setup.models[1], [teacher])
  return setup


def prepare(setup: Setup, params_prev: Member | Sequence[Member] | None, generation: int | None) -> Job:
  """Returns the job of one generation; raises a BanError where it cannot be trained.

  `generation` None is 0 without parents, and else one more than theirs.
  """
  cfg, dataset = setup.cfg, setup.dataset
  config.check_batch_size(cfg.train.batch_size, setup.devices)
  parents = trees.members_of(params_prev)
  if params_prev is not None and not parents:
    raise ConfigError("an empty sequence cannot teach; pass None for generation 0")
  models = trees.models_of(parents, setup.models, "teacher")
  for number, tree in enumerate(parents, 1):
    if not trees.is_finite(tree):
      raise CheckpointError(f"teacher {number} has parameters that are not finite; it cannot teach")
  if generation is None:
    generation = 1 + max(map(trees.lineage, parents)) if parents else 0
  if generation < 0:
    raise ConfigError(f"generation must be at least 0, not {generation}")
  student = setup.models[min(generation, 1)]
  if parents:
    _check_inherits(student, parents)
  loss = losses.make_loss(cfg.loss if parents else {"name": "label"})
  steps_per_epoch = len(dataset.train_order(jax.random.key(0), cfg.train.batch_size))
  total = steps_per_epoch * cfg.train.epochs
  single = setup.devices[0].platform == "cpu" and dataset.spec.kind == "images"
  teacher = teacher_lib.make(parents, models, student, needed=loss.needs_teacher)
  if cfg.train.replay and teacher.teaching.teaches:
    _check_replay(cfg, dataset.spec, steps_per_epoch)
    teacher = teacher._replace(teaching=teacher_lib.replayed(), recorded=teacher.teaching)
  return Job(
    cfg=cfg,
    dataset=dataset,
    devices=setup.devices,
    generation=generation,
    student=student,
    teacher=teacher,
    loss=loss,
    schedule=optim.make_schedule(cfg.optim, total),
    optimizer=optim.make_optimizer(cfg.optim, total),
    steps_per_epoch=steps_per_epoch,
    steps_per_dispatch=cfg.train.steps_per_dispatch or (1 if single else BLOCK),
  )


def _check_replay(cfg: ConfigDict, spec: InputSpec, steps: int) -> None:
  """Raises a ConfigError where the recorded logits of one epoch take more room than all recordings may."""
  outputs = math.prod(spec.shape) if spec.kind == "tokens" else 1
  size = 4 * steps * cfg.train.batch_size * outputs * spec.num_classes / 2**30
  if size > cfg.train.replay_gib:
    raise ConfigError(
      f"train.replay: an epoch's logits take {size:,.1f} GiB, more than train.replay_gib={cfg.train.replay_gib:g}; "
      'leave train.replay "", so that the teacher runs live'
    )


def _check_inherits(student: Model, parents: Sequence[Variables]) -> None:
  """Raises a ConfigError where the layers that a student copies from its teacher are not there in the right shapes."""
  if not student.inherits:
    return
  names = " and ".join(student.inherits)
  if len(parents) != 1:
    raise ConfigError(f"model {student.name} copies {names} from one teacher; {len(parents)} were given")
  expected = jax.eval_shape(student.init, jax.random.key(0))["params"]
  own, given = ({name: tree.get(name, {}) for name in student.inherits} for tree in (expected, parents[0]["params"]))
  difference = trees.first_difference(own, given)
  if difference:
    path, want, have = difference
    raise ConfigError(
      f"model {student.name} copies {names} from its teacher, but they do not fit: at {path} the student has {want}, "
      f"the teacher {have} (model.stem and the last of model.stages must be what teacher.model makes them)"
    )

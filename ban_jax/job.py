"""From a Setup to a Job: everything that one generation is trained from, checked before any work."""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ban_jax import config, feeding, losses, models, networks, optim, report, storage, trees
from ban_jax import devices as devices_lib
from ban_jax import teacher as teacher_lib
from ban_jax.errors import CheckpointError, ConfigError, check_whole
from ban_jax.losses import Loss
from ban_jax.models import common, program
from ban_jax.models.transformer import TransformerOptions
from ban_jax.optim import Optimizer
from ban_jax.registry import OWN
from ban_jax.resolving import NOTHING, Own, Setup, resolve
from ban_jax.teacher import Teacher
from ban_jax.trees import Member
from ban_jax.types import Dataset, Devices, Generation, InputSpec, Model, Network, Program, Variables
from ban_jax.updates import Updates, schedule_free_states

logger = logging.getLogger(__name__)

# Steps a dispatch where the configuration leaves the number open, enough to hide the host's millisecond for a dispatch.
# Images on CPU take single steps: a convolution inside a compiled loop is 30 times slower there.
BLOCK = 32
# The most bytes that a dispatch brings to a device of a streamed split, unless one mini-batch has more.
DISPATCH = 2**27

# The most that batch statistics may have left of their beginning when a training ends; more costs test errors.
BEGINNING = 0.1


class Job(NamedTuple):
  """Everything that one generation is trained from, checked before any work."""

  cfg: ConfigDict
  dataset: Dataset
  devices: Devices
  generation: int
  student: Model
  teacher: Teacher
  loss: Loss
  optimizer: Optimizer
  steps_per_epoch: int
  steps_per_dispatch: int
  values: dict[str, Any]  # the record of the configuration
  network: Network
  initial: Variables | None = None  # the student's variables before its first step, where the caller gives them
  watch: report.Watch = report.NOBODY

  @property
  def total_steps(self) -> int:
    """The steps of all epochs."""
    return self.steps_per_epoch * self.cfg.train.epochs

  @property
  def updates(self) -> Updates:
    """How a step changes the state."""
    group = self.cfg.train
    return Updates(self.optimizer.transformation, group.accumulate, group.ema)

  @property
  def key(self) -> jax.Array:
    """The generation's key."""
    return jax.random.fold_in(jax.random.key(self.cfg.seed, impl="threefry2x32"), self.generation)

  def draw(self, epoch: int) -> tuple[int, int, int]:
    """Returns what a streamed training split draws by in an epoch."""
    return self.cfg.seed, self.generation, epoch

  @property
  def programs(self) -> tuple[dict[str, str] | None, ...]:
    """What the student and the networks that teach it compute, of each that is a caller's own."""
    models = (self.student, *self.teacher.models)
    return tuple(
      None if model.program is None else program.record(model.name, model.program, trained=place == 0)
      for place, model in enumerate(models)
    )

  @property
  def has_dropout(self) -> bool:
    """Whether the student's network has the library's dropout."""
    group = self.network.group
    return group["name"] != "own" and any(group.get(key, 0) > 0 for key in ("dropout", "drop_path"))

  @property
  def lineage(self) -> dict[str, Any]:
    """What ties the generation to where it comes from, for its checkpoints and its manifest."""
    more: dict[str, Any] = {} if self.initial is None else {"initial": trees.digest(self.initial)}
    if any(self.programs):
      more["programs"] = list(self.programs)
    if self.values["optim.name"] == OWN:
      more["optimizer"] = _optimizer_record(self.optimizer, self.student, tuple(self.teacher.copied))
    drawn = {"dropout_draws": common.DRAWS} if self.has_dropout else {}
    return {
      "generation": self.generation,
      "seed": self.cfg.seed,
      "scale": self.cfg.scale,
      "model": self.student.name,
      "loss": self.loss.name,
      "teachers": list(self.teacher.digests),
      "config": self.values,
      "identity": config.identity_digest(self.values, self.generation),
      **more,
      "dataset": self.dataset.digest,
      "data": dict(self.dataset.record),
      # Bytes depend on it too, but a run may be resumed on another one.
      "layout": {
        **devices_lib.layout(self.devices),
        "steps_per_dispatch": self.steps_per_dispatch,
        "replayed": self.teacher.recorded is not None,
        **drawn,
      },
    }


@functools.lru_cache
def _optimizer_record(optimizer: Optimizer, student: Model, copied: tuple[str, ...]) -> dict[str, str]:
  """Returns what a caller's own optimizer computes for a network, as the record of a network's program."""

  def init_and_update(gradient, params, state):
    return optimizer.transformation.init(params), optimizer.transformation.update(gradient, state, params)

  params = {name: tree for name, tree in student.shapes["params"].items() if name not in copied}
  trace = program.trace(init_and_update, params, params, jax.eval_shape(optimizer.transformation.init, params))
  trains = Program(predicts="", trains=program.digest(trace), versions=program.VERSIONS)
  return program.record(optimizer.name, trains, trained=True)


def resolve_run(cfg: ConfigDict | Setup, devices: Sequence[jax.Device] | None, own: Own = NOTHING) -> Setup:
  """Returns `resolve`'s Setup, for training; raises whatever any generation of the run would raise at its start."""
  found = resolve(cfg, devices, own)
  config.check_batch_size(found.cfg.train.batch_size, found.devices)
  steps = steps_per_epoch(found)
  if found.cfg.generations:
    _check_replay(found.cfg, found.dataset.spec, steps)
    _check_inherits(found.models[1], [found.models[0].shapes])
  return found


def prepare(
  setup: Setup,
  params_prev: Member | Sequence[Member] | None,
  generation: int | None,
  initial: Member | None = None,
  watch: report.Watch = report.NOBODY,
) -> Job:
  """Returns the job of one generation; raises a BanError where it cannot be trained.

  `generation` None is 0 without parents, and else one more than theirs. `initial` replaces the student's initial
  variables, and its network's normalisation the data set's.
  """
  setup = networks.continued(initial, setup)
  config.check_batch_size(setup.cfg.train.batch_size, setup.devices)
  parents, models = networks.members(params_prev, setup, "teacher")
  if params_prev is not None and not parents:
    raise ConfigError("an empty sequence cannot teach; pass None for generation 0")
  for number, tree in enumerate(parents, 1):
    if not trees.is_finite(tree):
      raise CheckpointError(f"teacher {number} has parameters that are not finite; it cannot teach")
  if generation is None:
    generation = 1 + max(map(trees.lineage, parents)) if parents else 0
  generation = check_whole("generation", generation, 0, ", or None")
  if generation >= 2**31:  # lineages hold an int32
    raise ConfigError(f"generation={generation}: expected a whole number below 2**31")
  student = setup.models[min(generation, 1)]
  if parents:
    _check_inherits(student, parents)
  cfg = setup.cfg
  if not parents and cfg.loss.name != cfg.teacher.loss and not losses.LOSSES[cfg.loss.name].needs_teacher:
    logger.warning(
      f"generation 0 is trained by teacher.loss={cfg.teacher.loss!r}; loss.name={cfg.loss.name!r} is its students' loss"
    )
  loss = _loss(setup, taught=bool(parents))
  teacher = teacher_lib.make(parents, models, student, needed=loss.needs_teacher, **_shown(cfg))
  return _job(setup, generation, student, teacher, loss)._replace(
    initial=None if initial is None else _initial(initial, student), watch=watch
  )


def describe(setup: Setup, generation: int, *, teachers: int = 1) -> Job:
  """Returns the job of a generation as shapes, for programs that are compiled or counted, and not run.

  Its data are shapes, too, if `setup` is so. A student has as many `teachers` of the generation before it, whose
  variables are jax.ShapeDtypeStructs. Raises as `prepare` does.
  """
  config.check_batch_size(setup.cfg.train.batch_size, setup.devices)
  student = setup.models[min(generation, 1)]
  models = [setup.models[min(generation - 1, 1)]] * teachers if generation else []
  if models:
    _check_inherits(student, [model.shapes for model in models])
  loss = _loss(setup, taught=bool(models))
  return _job(
    setup,
    generation,
    student,
    teacher_lib.describe(models, student, needed=loss.needs_teacher, **_shown(setup.cfg)),
    loss,
  )


def _shown(cfg: ConfigDict) -> dict[str, Any]:
  """Returns how a teacher of this configuration is shown the examples, and its networks' weights."""
  return {"view": cfg.teacher.view, "weights": tuple(cfg.teacher.weights)}


def _loss(setup: Setup, *, taught: bool) -> Loss:
  """Returns the loss of a generation that is taught, or of generation 0."""
  cfg, dataset = setup.cfg, setup.dataset
  loss = losses.make_loss({**cfg.loss, "name": cfg.loss.name if taught else cfg.teacher.loss})
  weights = cfg.loss.class_weights
  if not weights:
    return loss
  if "train" in dataset.streams and weights == "balanced":
    raise ConfigError(
      "loss.class_weights='balanced': expected a weight for each class, because it takes the labels of all examples, "
      f"and {dataset.name} is streamed"
    )
  labels, classes = dataset.splits["train"].get("labels", ()), dataset.spec.num_classes
  if isinstance(labels, jax.ShapeDtypeStruct):
    labels = np.arange(classes)  # no shape depends on them
  return losses.weighted(loss, losses.class_weights(weights, labels, classes))


def _job(setup: Setup, generation: int, student: Model, teacher: Teacher, loss: Loss) -> Job:
  """Returns the job of a student with this teacher; raises a ConfigError for an epoch without an update."""
  cfg, dataset = setup.cfg, setup.dataset
  steps = steps_per_epoch(setup)
  if cfg.train.replay and teacher.teaching.teaches:
    _check_replay(cfg, dataset.spec, steps)
    teacher = teacher._replace(teaching=teacher_lib.replayed(), recorded=teacher.teaching)
  _warn_of_statistics(student, steps * cfg.train.epochs)
  job = Job(
    cfg=cfg,
    dataset=dataset,
    devices=setup.devices,
    generation=generation,
    student=student,
    teacher=teacher,
    loss=loss._replace(steps=steps * cfg.train.epochs) if loss.changes else loss,
    optimizer=setup.own.optimizer or optim.make(cfg.optim, steps // cfg.train.accumulate * cfg.train.epochs),
    steps_per_epoch=steps,
    steps_per_dispatch=min(cfg.train.steps_per_dispatch, steps)
    or block_size(dataset, "train", cfg.train.batch_size, setup.devices),
    values=setup.values,
    network=setup.network(generation),
  )
  _check_average(job)
  _check_attention(job)
  return job


def _check_average(job: Job) -> None:
  """Raises a ConfigError where an optimizer's own average would be no network, or would be averaged again."""
  if not schedule_free_states(jax.eval_shape(job.updates.init, job.student.shapes, job.teacher.copied).opt_state):
    return
  if job.updates.ema:
    raise ConfigError(f"train.ema={job.updates.ema}: expected 0.0, because {job.optimizer.name!r} averages by itself")
  if job.student.shapes.get("batch_stats"):
    raise ConfigError(
      f"optimizer {job.optimizer.name!r} evaluates an average of the parameters, of which {job.student.name} has no "
      "batch statistics; choose another optimizer, or a network without batch normalisation"
    )


def _check_attention(job: Job) -> None:
  """Raises a ConfigError where XLA would lose the gradient of cuDNN's attention.

  With deterministic kernels it looks for all layers but the first under another name than it keeps them
  (https://github.com/openxla/xla/pull/46500): "IndexError: absl::container_internal::raw_hash_map<>::at".
  """
  group = job.network.group
  options = None if group["name"] == OWN else models.check_options(group)[1]
  if not isinstance(options, TransformerOptions):
    return
  if options.cudnn and options.layers > 1 and devices_lib.are_deterministic():
    raise ConfigError(
      f"model.cudnn=True: XLA cannot train cuDNN's attention in {options.layers} layers with deterministic kernels; "
      "set XLA_FLAGS=--xla_gpu_deterministic_ops=false, and do without equal bytes of equal runs, or choose "
      "model.cudnn=False"
    )


def _warn_of_statistics(student: Model, steps: int) -> None:
  """Warns of batch statistics that will be no average of mini-batches yet when the training ends."""
  if (left := student.momentum**steps) > BEGINNING:
    logger.warning(
      f"model {student.name!r}: its batch normalisation keeps {student.momentum:g} of its statistics in each step, so "
      f"that after all {steps} steps {left:.0%} of them are still those it began with, and evaluation uses them; give "
      "it momentum=0.9, or more steps: a smaller train.batch_size, more train.epochs"
    )


def steps_per_epoch(setup: Setup) -> int:
  """Returns the mini-batches of an epoch; raises a ConfigError where they are too few for an update.

  Those that are left over, fewer than an update takes, are no part of it, as with one mini-batch in place of several.
  """
  group = setup.cfg.train
  steps = len(setup.dataset.train_order(jax.random.key(0), group.batch_size))
  if steps < group.accumulate:
    raise ConfigError(f"train.accumulate={group.accumulate}: expected at most {steps}, the mini-batches of an epoch")
  return steps // group.accumulate * group.accumulate


def _initial(given: Member, student: Model) -> Variables:
  """Returns the variables that a student begins with; raises a CheckpointError where they do not fit its network."""
  found = trees.members_of(given)
  if len(found) != 1:
    raise ConfigError(f"initial must be one Generation or variables tree, not {len(found)}")
  tree = found[0].params if isinstance(found[0], Generation) else found[0]
  trees.check_fits(tree, student, "initial")
  if not trees.is_finite(tree):
    raise CheckpointError("initial has parameters that are not finite")
  return tree


def block_size(dataset: Dataset, split: str, batch_size: int, devices: Devices) -> int:
  """Returns the steps a dispatch where the configuration leaves the number open, and those of evaluation."""
  if devices[0].platform == "cpu" and dataset.spec.kind == "images":
    return 1
  if split not in dataset.streams:
    return BLOCK
  step = batch_size // len(devices) * feeding.row_bytes(dataset.streams[split])
  return max(1, min(BLOCK, DISPATCH // step))


def _check_replay(cfg: ConfigDict, spec: InputSpec, steps: int) -> None:
  """Raises a ConfigError if a teacher is to be recorded and its recordings have no place, or too little room."""
  if not cfg.train.replay or not losses.LOSSES[cfg.loss.name].needs_teacher:
    return
  root = storage.resolve_workdir(cfg.train.replay, "train.replay")
  if root.exists() and not root.is_dir():
    raise ConfigError(f"train.replay={cfg.train.replay!r} is a file; name a directory")
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
  expected = student.shapes["params"]
  own, given = ({name: tree.get(name, {}) for name in student.inherits} for tree in (expected, parents[0]["params"]))
  difference = trees.first_difference(own, given)
  if difference:
    path, want, have = difference
    raise ConfigError(
      f"model {student.name} copies {names} from its teacher, but they do not fit: at {path} the student has {want}, "
      f"the teacher {have} (model.stem and the last of model.stages must be what teacher.model makes them)"
    )

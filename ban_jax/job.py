"""From what a caller gives to what is trained: a checked Setup for all generations of a run, and a Job for each one."""

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ban_jax import config, data, losses, optim, presets, report, trees
from ban_jax import devices as devices_lib
from ban_jax import teacher as teacher_lib
from ban_jax.data import arrays as arrays_lib
from ban_jax.errors import CheckpointError, ConfigError, check_whole
from ban_jax.keys import KEYS
from ban_jax.losses import Loss
from ban_jax.models import common, make_model, program
from ban_jax.optim import Optimizer
from ban_jax.registry import OWN
from ban_jax.teacher import Teacher
from ban_jax.trees import Member
from ban_jax.types import Dataset, Devices, Generation, InputSpec, Model, Network, Program, Variables

logger = logging.getLogger(__name__)

# Steps a dispatch where the configuration leaves the number open, enough to hide the host's millisecond for a dispatch.
# Images on CPU take single steps: a convolution inside a compiled loop is 30 times slower there.
BLOCK = 32


class Own(NamedTuple):
  """What the caller gives in place of what the configuration names; None where it does not."""

  dataset: Dataset | None = None
  model: Model | None = None  # the students' network, and generation 0's where nothing else names one
  teacher_model: Model | None = None  # generation 0's network
  optimizer: Optimizer | None = None


NOTHING = Own()


def check_own(own: Own) -> None:
  """Raises a ConfigError where the caller gave something of another type."""
  makers = {Dataset: "from_arrays", Model: "from_flax", Optimizer: "from_optax"}
  kinds = {"dataset": Dataset, "model": Model, "teacher_model": Model, "optimizer": Optimizer}
  for name, kind in kinds.items():
    value = getattr(own, name)
    if value is not None and not isinstance(value, kind):
      made = f"as ban_jax.{makers[kind]} returns it"
      raise ConfigError(f"{name} must be a {kind.__name__}, {made}, not {type(value).__name__}")


class Setup(NamedTuple):
  """What the generations of a run share: the configuration, checked once, and what it names. `setup` returns it."""

  cfg: ConfigDict
  dataset: Dataset
  models: tuple[Model, Model]  # generation 0's network, the students' network
  devices: Devices
  own: Own = NOTHING

  def __repr__(self) -> str:
    """Returns one line."""
    names = " and ".join(dict.fromkeys(model.name for model in self.models))
    return f"Setup({self.dataset!r}, {names}, {len(self.devices)} devices)"

  @property
  def values(self) -> dict[str, Any]:
    """The record of the configuration, with what the caller gave in its place."""
    return record(self.cfg, self.own)

  def network(self, generation: int) -> Network:
    """Returns what a generation carries of its network."""
    values = self.values
    student, teacher = _group("model", values), _group("teacher.model", values)
    model, dataset = self.models[min(generation, 1)], self.dataset
    group = student if generation or not teacher else teacher
    own = model if group["name"] == "own" else None
    dtype = "float32" if own else self.cfg.compute_dtype
    return Network(group, dtype, dataset.spec, dataset.scaling, own and own.program, own)


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
  def key(self) -> jax.Array:
    """The generation's key."""
    return jax.random.fold_in(jax.random.key(self.cfg.seed, impl="threefry2x32"), self.generation)

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


def record(cfg: ConfigDict, own: Own = NOTHING) -> dict[str, Any]:
  """Returns `config.record`, with "own" and their options for what the caller gave in place of a group."""
  values = config.record(cfg)
  given = {"data.": own.dataset, "model.": own.model, "teacher.model.": own.teacher_model, "optim.": own.optimizer}
  for prefix, value in given.items():
    if value is not None:
      values = {key: kept for key, kept in values.items() if not f"{key}.".startswith(prefix)}
      values[f"{prefix}name"] = "own"
  # Not under "data.", of which the identity keeps the options that a registered data set takes.
  if own.dataset is not None:
    values |= {f"dataset.{key}": value for key, value in {"name": own.dataset.name, **own.dataset.options}.items()}
  for prefix, model in (("model.", own.model), ("teacher.model.", own.teacher_model)):
    if model is not None:
      values |= {f"{prefix}{key}": value for key, value in _own_group(model).items()}
  if own.optimizer is not None:
    values |= {"optim.own": own.optimizer.name}
  return json.loads(json.dumps(values))


def _own_group(model: Model) -> dict[str, Any]:
  """Returns the `model` group that stands for a network of the caller's, as JSON holds it."""
  return json.loads(json.dumps({**dict(model.options), "name": "own", "own": model.name}))


def _group(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a group of a record; {} where there is none."""
  return {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}


def setup(
  cfg: ConfigDict,
  *,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
  optimizer: Optimizer | None = None,
  devices: Sequence[jax.Device] | None = None,
) -> Setup:
  """Returns a configuration with what the caller gives in place of its parts, checked, to be used in place of `cfg`.

  `train_generation`, `run`, `evaluate`, `reliability`, `compare`, `average` and `with_network` take it. The data are
  loaded once, and a later change of `cfg` does not reach it. Arguments are those of `train_generation`; raises a
  ConfigError or a DataError if the configuration cannot be run or evaluated.

    task = ban_jax.setup(cfg, dataset=data, model=cnn)
    teacher = ban_jax.train_generation(None, task)
    print(ban_jax.evaluate(teacher, task))
  """
  found = resolve(cfg, devices, Own(dataset, model, teacher_model, optimizer))
  return found._replace(cfg=FrozenConfigDict(found.cfg))


def resolve(
  cfg: ConfigDict | Setup,
  devices: Sequence[jax.Device] | None,
  own: Own = NOTHING,
  load: Callable[[ConfigDict], Dataset] | None = None,
) -> Setup:
  """Returns what a configuration names, or the caller gives in its place; a Setup as it is.

  With `load=data.describe`, data sets that can be described are not read: that Setup is for `describe`. Raises a
  ConfigError or a DataError if it cannot be run or evaluated.
  """
  if isinstance(cfg, Setup):
    twice = [name for name, value in {**own._asdict(), "devices": devices}.items() if value is not None]
    if twice:
      raise ConfigError(f"{', '.join(twice)}: a Setup was given in place of cfg; give this to ban_jax.setup instead")
    return cfg
  if devices_lib.SETTINGS.jax_enable_x64:
    raise ConfigError("jax_enable_x64 is set: ban_jax trains in float32 or bfloat16; switch 64-bit mode off")
  if not isinstance(cfg, ConfigDict):
    raise ConfigError(
      f"cfg must be a ConfigDict, as ban_jax.get_config returns it, not {type(cfg).__name__}; the first arguments are "
      "(params_prev, cfg) of train_generation, (cfg, workdir) of run and (generations, cfg) of evaluate"
    )
  found = devices_lib.resolve(devices)
  check_own(own)
  config.check(cfg)
  devices_lib.check_mapping(cfg.train.mapping)
  _check_replaced(cfg, own)
  dataset = own.dataset or (load or data.load)(cfg.data)
  config.check_dataset(cfg, dataset, own_optimizer=own.optimizer is not None)
  return Setup(cfg, dataset, make_models(cfg, dataset.spec, own, found), found, own)


def _check_replaced(cfg: ConfigDict, own: Own) -> None:
  """Raises a ConfigError for a setting that was changed, and has no effect beside what the caller gives."""
  if own.dataset is not None and cfg.data.name in presets.DATASETS:
    groups = [presets.compose(f"{cfg.data.name},own,{scale}").data for scale in presets.SCALES]
    unused = {name.removeprefix("data."): key.unused[0] for name, key in KEYS.items() if key.unused}
    neutral = {**groups[0], **unused}
    for key, value in cfg.data.items():
      if key != "dir" and value not in (neutral[key], *(group[key] for group in groups)):
        raise ConfigError(
          f"data.{key}={value!r}: expected {neutral[key]!r}, because it has no effect beside dataset=, and from_arrays "
          "takes such settings"
        )
  if own.model is not None and cfg.model.to_dict() not in [known.to_dict() for known in presets.MODELS.values()]:
    raise ConfigError(f"the options of model {cfg.model.name!r} were changed, and have no effect beside model=")
  if own.teacher_model is not None and cfg.teacher.model is not None and cfg.teacher.model.name != "own":
    raise ConfigError(f"teacher.model {cfg.teacher.model.name!r} has no effect beside teacher_model=: expected None")
  if own.model is not None and (own.teacher_model or not cfg.teacher.model) and cfg.compute_dtype != "float32":
    raise ConfigError(
      f"compute_dtype={cfg.compute_dtype!r}: expected 'float32', because {own.model.name!r} is a network of your own, "
      "which computes as its module says"
    )


def make_models(cfg: ConfigDict, spec: InputSpec, own: Own = NOTHING, devices: Devices = ()) -> tuple[Model, Model]:
  """Returns (generation 0's network, the students' network) of a configuration, for a data set's inputs.

  Raises the ConfigErrors of `make_model`, to which `devices` go.
  """
  options: dict[str, Any] = {"compute_dtype": cfg.compute_dtype, "sync_batch_stats": cfg.train.sync_batch_stats}
  options["devices"] = devices
  student = own.model or make_model(cfg.model, spec, **options)
  teacher = own.teacher_model or student
  if cfg.teacher.model and not own.teacher_model:
    teacher = make_model(cfg.teacher.model, spec, key="teacher.model", **options)
  for model in (teacher, student):
    _check_spec(f"model {model.name!r}", model.spec, spec)
  return teacher, student


def _check_spec(what: str, given: InputSpec, expected: InputSpec) -> None:
  """Raises a ConfigError where a network was made for other inputs or classes than the data set's."""
  for name, found, wanted in zip(InputSpec._fields[:3], given, expected, strict=False):
    if found != wanted:
      raise ConfigError(f"{what} is made for {name}={found}; the data set has {name}={wanted}")


def members(given: Member | Sequence[Member] | None, setup: Setup, what: str) -> tuple[list[Variables], list[Model]]:
  """Returns the variables trees of one network, or of several, and their networks, which they are known to fit.

  A Generation's network is its own, and normalises images as it was trained; a bare tree's is the configuration's for
  its place in the lineage. Raises a ConfigError for a network of the caller's own that is not at hand or that reads
  images of another type, and a CheckpointError for a tree that does not fit; `what` names the trees in messages.
  """
  found, trees_, models = trees.members_of(given), [], []
  for number, member in enumerate(found, 1):
    label = what if len(found) == 1 else f"{what} {number}"
    tree = member.params if isinstance(member, Generation) else member
    trees.check_tree(tree, label)
    if isinstance(member, Generation) and member.network is not None:
      model, source = _normalised(_model_of(member, member.network, setup, label), member.network, setup, label), ""
    else:
      model = setup.models[min(trees.lineage(tree), 1)]
      source = "; a tree does not say which network it is, so that the configuration's is taken"
    trees.check_fits(tree, model, label, source)
    trees_.append(tree)
    models.append(model)
  return trees_, models


def _normalised(model: Model, network: Network, setup: Setup, label: str) -> Model:
  """Returns a network that reads the data set's images normalised as those that it was trained on."""
  if _is_normalised_alike(network, setup.dataset, label):
    return model
  scalings = (setup.dataset.scaling, network.scaling)
  return _renormalised(model, *(tuple(tuple(one[name]) for name in ("mean", "std")) for one in scalings))


def _is_normalised_alike(network: Network, dataset: Dataset, label: str) -> bool:
  """Returns whether a network was trained on images normalised as the data set's, as far as that is known, or says so.

  Raises a ConfigError where they are of another type.
  """
  own, given = network.scaling, dataset.scaling
  if not own or not given or own == given:
    return True
  if own["dtype"] != given["dtype"]:
    raise ConfigError(f"{label} was trained on {own['dtype']} images; those of {dataset.name} are {given['dtype']}")
  logger.warning(
    f"{label} normalises images by its own mean {_shown(own['mean'])} and deviation {_shown(own['std'])}, not by those "
    f"of {dataset.name}, {_shown(given['mean'])} and {_shown(given['std'])}"
  )
  return False


def _shown(values: Sequence[float]) -> str:
  return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


@functools.lru_cache
def _renormalised(model: Model, given: tuple[tuple[float, ...], ...], own: tuple[tuple[float, ...], ...]) -> Model:
  """Returns a network of `own` (mean, std) for images normalised by `given`; equal arguments give the same object."""
  (mean, std), (own_mean, own_std) = (np.array(one, np.float64) for one in (given, own))
  factor, offset = ((value / own_std).astype(np.float32) for value in (std, mean - own_mean))

  def apply(variables, carry, inputs, **options):
    return model.apply(variables, carry, inputs * factor + offset, **options)

  return model._replace(apply=apply, normalisation=own)


def _continued(initial: Member | None, setup: Setup) -> Setup:
  """Returns a setup whose images are normalised as those that a student's initial network was trained on."""
  given = next(iter(trees.members_of(initial)), None)
  network = given.network if isinstance(given, Generation) else None
  if network is None or _is_normalised_alike(network, setup.dataset, "initial"):
    return setup
  statistics = {name: np.array(network.scaling[name], np.float32) for name in ("mean", "std")}
  splits = {split: {**arrays, **statistics} for split, arrays in setup.dataset.splits.items()}
  return setup._replace(dataset=setup.dataset._replace(splits=splits, digest=arrays_lib.digest(splits)))


def _model_of(member: Generation, network: Network, setup: Setup, label: str) -> Model:
  """Returns a generation's own network, of which it keeps `network`."""
  generation = min(member.index, 1)
  if network.own is not None:
    _check_spec(f"the network of {label}, {network.own.name!r},", network.own.spec, setup.dataset.spec)
    return network.own
  if network.group["name"] == "own":
    name = network.group["own"]
    given = [model for model in (setup.own.teacher_model, setup.own.model) if model is not None and model.name == name]
    if not given:
      raise ConfigError(f"{label} has a network of your own, {name!r}: give it as model= or teacher_model=, or to load")
    reasons = [misfit(model, member) for model in given]
    if all(reasons):
      raise ConfigError(f"{label}: {reasons[-1]}")
    return given[reasons.index("")]
  # The configuration's choice of how to compute the same network (dtype, rematerialisation, cuDNN) is kept.
  configured, name = setup.models[generation], setup.network(generation).group["name"]
  if name == network.group["name"] and not trees.first_difference(configured.shapes, member.params):
    return configured
  return make_model(
    network.group,
    setup.dataset.spec,
    compute_dtype=setup.cfg.compute_dtype,
    sync_batch_stats=setup.cfg.train.sync_batch_stats,
    key=f"the network of {label}",
    devices=setup.devices,
  )


def misfit(model: Model, member: Generation) -> str:
  """Returns in what a network of one's own is not the one that a generation was trained with; "" for nothing."""
  network = member.network
  recorded = {} if network is None else dict(network.group)
  own, name = _own_group(model), recorded.get("own")
  if name != model.name:
    trained = "no network on record" if network is None else repr(name or recorded["name"])
    return f"model is {model.name!r}, but the generation was trained with {trained}"
  differing = [key for key in sorted(own.keys() | recorded.keys()) if own.get(key) != recorded.get(key)]
  if differing:
    here, there = (", ".join(f"{key}={group.get(key)!r}" for key in differing) for group in (own, recorded))
    return f"model {name!r} has {here}; the generation was trained with {there}"
  if difference := trees.first_difference(model.shapes, member.params):
    path, want, have = difference
    return f"the generation was trained with another network {name!r}: at {path} the model has {want}, it has {have}"
  if network is not None and network.program is not None and model.program is not None:
    old, new = (program.record(model.name, each, trained=False) for each in (network.program, model.program))
    if words := program.changed(old, new):
      return words
  return ""


def resolve_run(cfg: ConfigDict | Setup, devices: Sequence[jax.Device] | None, own: Own = NOTHING) -> Setup:
  """Returns `resolve`'s Setup, for training; raises whatever any generation of the run would raise at its start."""
  found = resolve(cfg, devices, own)
  config.check_batch_size(found.cfg.train.batch_size, found.devices)
  found.dataset.train_order(jax.random.key(0), found.cfg.train.batch_size)
  if found.cfg.generations:
    teacher = found.models[0].shapes
    _check_inherits(found.models[1], [teacher])
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
  setup = _continued(initial, setup)
  config.check_batch_size(setup.cfg.train.batch_size, setup.devices)
  parents, models = members(params_prev, setup, "teacher")
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
  teacher = teacher_lib.make(parents, models, student, needed=loss.needs_teacher)
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
  return _job(setup, generation, student, teacher_lib.describe(models, student, needed=loss.needs_teacher), loss)


def _loss(setup: Setup, *, taught: bool) -> Loss:
  """Returns the loss of a generation that is taught, or of generation 0."""
  cfg, dataset = setup.cfg, setup.dataset
  loss = losses.make_loss({**cfg.loss, "name": cfg.loss.name if taught else cfg.teacher.loss})
  weights = cfg.loss.class_weights
  if not weights:
    return loss
  labels, classes = dataset.splits["train"]["labels"], dataset.spec.num_classes
  if isinstance(labels, jax.ShapeDtypeStruct):
    labels = np.arange(classes)  # no shape depends on them
  return losses.weighted(loss, losses.class_weights(weights, labels, classes))


def _job(setup: Setup, generation: int, student: Model, teacher: Teacher, loss: Loss) -> Job:
  """Returns the job of a student with this teacher; raises a ConfigError for an epoch without a step."""
  cfg, dataset = setup.cfg, setup.dataset
  steps_per_epoch = len(dataset.train_order(jax.random.key(0), cfg.train.batch_size))
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
    optimizer=setup.own.optimizer or optim.make(cfg.optim, steps_per_epoch * cfg.train.epochs),
    steps_per_epoch=steps_per_epoch,
    steps_per_dispatch=min(cfg.train.steps_per_dispatch, steps_per_epoch) or block_size(dataset.spec, setup.devices),
    values=setup.values,
    network=setup.network(generation),
  )


def _initial(given: Member, student: Model) -> Variables:
  """Returns the variables that a student begins with; raises a CheckpointError where they do not fit its network."""
  found = trees.members_of(given)
  if len(found) != 1:
    raise ConfigError(f"initial must be one Generation or variables tree, not {len(found)}")
  tree = found[0].params if isinstance(found[0], Generation) else found[0]
  trees.check_tree(tree, "initial")
  trees.check_fits(tree, student, "initial")
  if not trees.is_finite(tree):
    raise CheckpointError("initial has parameters that are not finite")
  return tree


def block_size(spec: InputSpec, devices: Devices) -> int:
  """Returns the steps a dispatch where the configuration leaves the number open, and those of evaluation."""
  return 1 if devices[0].platform == "cpu" and spec.kind == "images" else BLOCK


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
  expected = student.shapes["params"]
  own, given = ({name: tree.get(name, {}) for name in student.inherits} for tree in (expected, parents[0]["params"]))
  difference = trees.first_difference(own, given)
  if difference:
    path, want, have = difference
    raise ConfigError(
      f"model {student.name} copies {names} from its teacher, but they do not fit: at {path} the student has {want}, "
      f"the teacher {have} (model.stem and the last of model.stages must be what teacher.model makes them)"
    )

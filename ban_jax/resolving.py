"""From what a caller gives to a checked Setup, which all generations of a run share."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from ban_jax import config, data, presets
from ban_jax import devices as devices_lib
from ban_jax.errors import ConfigError
from ban_jax.keys import KEYS
from ban_jax.models import make_model
from ban_jax.optim import Optimizer
from ban_jax.types import Dataset, Devices, InputSpec, Model, Network


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
      values |= {f"{prefix}{key}": value for key, value in own_group(model).items()}
  if own.optimizer is not None:
    values |= {"optim.own": own.optimizer.name}
  return json.loads(json.dumps(values))


def own_group(model: Model) -> dict[str, Any]:
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
  loaded once, and a later change of `cfg` does not reach it.

  Args:
    cfg: the configuration, of `get_config`.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: what `from_flax` or `from_nnx` returns, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.
    optimizer: what `from_optax` returns, in place of `cfg.optim`.
    devices: the devices to train on; all by default.

  Returns:
    A Setup.

  Raises:
    ConfigError: for a configuration that can be neither run nor evaluated.
    DataError: for missing data.

  Examples:
    >>> task = ban_jax.setup(cfg, dataset=data)
    >>> task.dataset.sizes["train"]
    200
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
    check_spec(f"model {model.name!r}", model.spec, spec)
  return teacher, student


def check_spec(what: str, given: InputSpec, expected: InputSpec) -> None:
  """Raises a ConfigError where a network was made for other inputs or classes than the data set's."""
  for name, found, wanted in zip(InputSpec._fields[:3], given, expected, strict=False):
    if found != wanted:
      raise ConfigError(f"{what} is made for {name}={found}; the data set has {name}={wanted}")

"""Every check of a configuration's values, and the identity: the values that a generation's bytes depend on.

A network's own options are checked in its file (ban_jax/models), which `check` calls; what needs the data is checked by
`check_dataset`.
"""

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax
import optax
from ml_collections import ConfigDict

from ban_jax import data, losses, models, optim
from ban_jax.data import noise
from ban_jax.errors import ConfigError, choices, look_up
from ban_jax.trees import json_digest
from ban_jax.types import Dataset, Devices


class Rule(NamedTuple):
  """What a value must be: a test and the words for it."""

  holds: Callable[[Any], bool]
  expected: str


def _is_number(value: Any, kind: type) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)  # which Python counts as an int


def whole(least: int, most: int | None = None, note: str = "") -> Rule:
  """Returns the rule for a whole number."""
  span = f"of at least {least}" if most is None else f"from {least} to {most}"
  limit = math.inf if most is None else most
  return Rule(lambda v: _is_number(v, numbers.Integral) and least <= v <= limit, f"a whole number {span}{note}")


def real(holds: Callable[[float], bool], expected: str) -> Rule:
  """Returns the rule for a finite number for which `holds` is true."""
  return Rule(lambda v: _is_number(v, numbers.Real) and math.isfinite(v) and holds(v), expected)


def _is_rising(shares: Any) -> bool:
  inside = isinstance(shares, list | tuple) and all(isinstance(s, numbers.Real) and 0 < float(s) < 1 for s in shares)
  return inside and list(shares) == sorted(set(shares))


def _are_class_weights(value: Any) -> bool:
  if isinstance(value, list | tuple):
    return all(map(POSITIVE.holds, value))
  return isinstance(value, str) and value == "balanced"


FINITE = real(lambda v: True, "a finite number")
POSITIVE = real(lambda v: v > 0, "a finite number above 0")
NOT_NEGATIVE = real(lambda v: v >= 0, "a finite number of at least 0")
SHARE = real(lambda v: 0 <= v < 1, "a share in [0, 1)")
FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
ANY = Rule(lambda v: True, "a value")
NAME = Rule(lambda v: isinstance(v, str), "a name")  # the registry that it is looked up in lists the choices

RULES = {
  "seed": whole(0, 2**32 - 1),
  "generations": whole(0),
  "scale": Rule(lambda v: isinstance(v, str) and v.isprintable(), "a printable word, because it labels the results"),
  "compute_dtype": NAME,
  "data.name": NAME,
  "data.dir": Rule(lambda v: isinstance(v, str) and "://" not in v, 'a local directory, or "" for the default'),
  "data.validation": SHARE,
  "data.train_examples": whole(0, note=", 0 for all training examples"),
  "data.pad": whole(0),
  "data.flip": FLAG,
  "data.window": whole(0),
  "data.label_noise": SHARE,
  "data.noise_kind": NAME,
  "data.noise_seed": whole(0),
  "data.dataset": Rule(lambda v: isinstance(v, str), "a name of TensorFlow Datasets"),
  "data.size": whole(0, note=", 0 for the images' own size"),
  "data.train_split": Rule(lambda v: isinstance(v, str) and v != "", "a split"),
  "data.test_split": Rule(lambda v: isinstance(v, str) and v != "", "a split"),
  "data.validation_split": Rule(lambda v: isinstance(v, str), 'a split, or "" for none'),
  "loss.name": NAME,
  "loss.temperature": POSITIVE,
  "loss.label_weight": FINITE,
  "loss.teacher_weight": FINITE,
  "loss.class_weights": Rule(
    _are_class_weights, '(), "balanced", or a tuple of a finite number above 0 for each class'
  ),
  "loss.smoothing": real(lambda v: 0 <= v <= 1, "a share from 0 to 1"),
  "optim.learning_rate": POSITIVE,
  "optim.schedule": NAME,
  "optim.boundaries": Rule(_is_rising, "rising shares of the run, each between 0 and 1"),
  "optim.factor": POSITIVE,
  "optim.threshold": NOT_NEGATIVE,
  "optim.momentum": SHARE,
  "optim.nesterov": FLAG,
  "optim.weight_decay": NOT_NEGATIVE,
  "optim.clip_norm": NOT_NEGATIVE,
  "train.epochs": whole(1),
  "train.batch_size": whole(1),
  "train.checkpoint_every": whole(1),
  "train.evaluate_every": whole(0),
  "train.steps_per_dispatch": whole(0),
  "train.mapping": NAME,
  "train.replay": Rule(lambda v: isinstance(v, str), 'a directory, or "" for a live teacher'),
  "train.replay_gib": POSITIVE,
  "train.sync_batch_stats": FLAG,
  "train.gradient_split": FLAG,
  "evaluate.batch_size": whole(1),
  "evaluate.training_batch_size": whole(0),
}
_NOT_BY_NAME = "is not read from TFDS by a name, as data.name='tfds' is"
# What a key must be for a data set that has no use for it, and why it has none.
UNUSED = {
  "validation": (0.0, "brings its own validation split"),
  "pad": (0, "is text, and no image is cropped"),
  "flip": (False, "is text, and no image is flipped"),
  "window": (0, "holds images, and no text is cut into windows"),
  "label_noise": (0.0, "is text, and has no labels to replace"),
  "dataset": ("", _NOT_BY_NAME),
  "size": (0, _NOT_BY_NAME),
  "train_split": ("train", _NOT_BY_NAME),
  "test_split": ("test", _NOT_BY_NAME),
  "validation_split": ("", _NOT_BY_NAME),
}

# Keys that make no other generation: labels, places, and what is only logged, saved or evaluated. Steps a dispatch and
# replay change the rounding, which the layout records.
FREE = (
  *("generations", "scale", "data.dir", "evaluate.batch_size", "evaluate.training_batch_size"),
  *("train.checkpoint_every", "train.evaluate_every", "train.gradient_split", "train.steps_per_dispatch"),
  *("train.mapping", "train.replay", "train.replay_gib"),
)
# Keys that were added after the first runs, each with its neutral value: the one under which a run is as it was before
# the key existed, as JSON holds it. While a key has it, the identity leaves the key out, so every earlier run and table
# is still found.
NEUTRAL: dict[str, Any] = {
  **{"data.label_noise": 0.0, "data.noise_kind": "symmetric", "data.noise_seed": 0},
  "loss.class_weights": [],
}


def check(cfg: ConfigDict) -> None:
  """Raises a ConfigError where a value, or a combination of values, cannot be run; reads no data."""
  given = _flat(cfg)
  for key in RULES.keys() - given.keys():
    raise ConfigError(f"the configuration lacks {key}; ban_jax/presets/base.py documents every key")
  known = {*RULES, *NEUTRAL, *_options(given["data.name"], losses.LOSSES.values(), optim.SCHEDULES.values())}
  for key, value in given.items():
    if key not in known and not key.startswith(("model.", "teacher.")):
      raise ConfigError(f"unknown configuration key {key!r}; the keys are: {choices(known)}, and those of model")
    if key != "teacher.model":  # None without a teacher of its own
      _check_value(key, value)
  check_data(cfg.data)
  loss = losses.make_loss(cfg.loss)
  if "label_weight" in loss.options and cfg.loss.label_weight == cfg.loss.teacher_weight == 0:
    raise ConfigError("loss.label_weight and loss.teacher_weight cannot both be 0")
  look_up(optim.SCHEDULES, cfg.optim.schedule, "optim.schedule")
  look_up(models.DTYPES, cfg.compute_dtype, "compute_dtype")
  models.check_options(cfg.model, "model")
  if cfg.teacher.model is not None:
    models.check_options(cfg.teacher.model, "teacher.model")


def _options(
  dataset: str, own_losses: Iterable[losses.Loss], schedules: Iterable[Callable[..., optax.Schedule]]
) -> set[str]:
  """Returns the keys of the options that a data set and any of the losses and schedules take."""
  return (
    {f"data.{name}" for name in data.keys_of(dataset)}
    | {f"loss.{name}" for loss in own_losses for name in loss.options}
    | {f"optim.{name}" for schedule in schedules for name in optim.options(schedule)}
  )


def _check_value(key: str, value: Any) -> None:
  rule = RULES.get(key, ANY)
  if value is None:
    raise ConfigError(f"{key} is None: expected {rule.expected}")
  if not rule.holds(value):
    raise ConfigError(f"{key}={value!r}: expected {rule.expected}")


def check_data(group: Mapping[str, Any]) -> None:
  """Raises a ConfigError where a `data` group has a wrong value, or one that its data set has no use for."""
  group = dict(group.items())
  for name, value in group.items():
    _check_value(f"data.{name}", value)
  taken = data.keys_of(group["name"])
  for name, (neutral, why) in UNUSED.items():
    if name not in taken and group[name] != neutral:
      if group["name"] == "own":
        why = "is given as dataset=, and from_arrays takes such settings"
      raise ConfigError(f"data.{name}={group[name]!r}: expected {neutral!r}, because {group['name']} {why}")
  look_up(noise.KINDS, group["noise_kind"], "data.noise_kind")
  if "dataset" in taken and not group["dataset"]:
    raise ConfigError(f"data.dataset='': expected a name of TFDS, such as mnist, because data.name={group['name']!r}")
  if group["validation_split"] and group["validation"]:
    raise ConfigError(
      f"data.validation={group['validation']!r}: expected 0.0, because data.validation_split="
      f"{group['validation_split']!r} is the validation split"
    )
  if "window" in taken and not group["window"]:
    raise ConfigError(f"data.window=0: expected at least 1, the tokens of a window of {group['name']}")


def check_dataset(cfg: ConfigDict, dataset: Dataset) -> None:
  """Raises a ConfigError where a configuration cannot be run, or evaluated, on the data set that was loaded."""
  if cfg.optim.schedule == "plateau" and "validation" not in dataset.splits:
    others = choices(set(optim.SCHEDULES) - {"plateau"})
    raise ConfigError(
      "optim.schedule='plateau' decides by a validation split, and there is none; hold out a share with "
      f"data.validation, or choose another of: {others}"
    )
  weights, classes = cfg.loss.class_weights, dataset.spec.num_classes
  if weights and dataset.spec.kind == "tokens":
    raise ConfigError(f"loss.class_weights={weights!r}: expected (), because {dataset.name} is text")
  if weights and weights != "balanced" and len(weights) != classes:
    raise ConfigError(
      f"loss.class_weights has {len(weights)} numbers: expected {classes}, one for each class of {dataset.name}"
    )
  if dataset.spec.kind != "tokens":
    return  # a batch of images larger than a split is cut to it; one of text would change what streams there are
  most = max(len(dataset.eval_order(split, 1)) for split in dataset.splits)
  for name, rows in cfg.evaluate.items():
    if rows > most:
      raise ConfigError(
        f"evaluate.{name}={rows}: expected at most {most}, the windows of {dataset.spec.shape[0]} tokens in "
        f"{dataset.name}'s largest split"
      )


def check_batch_size(batch_size: int, devices: Devices) -> None:
  """Raises a ConfigError where the devices cannot share the mini-batch equally; it names the counts that work."""
  count = len(devices)
  if batch_size % count:
    works = ", ".join(str(n) for n in range(1, count) if batch_size % n == 0)
    below = batch_size // count * count
    sizes = f"{below} or {below + count}" if below else count
    raise ConfigError(
      f"train.batch_size={batch_size} cannot be shared equally by {count} devices; use {works} devices "
      f"(--devices), or a batch size of {sizes}"
    )


def _flat(cfg: ConfigDict) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(cfg.to_dict(), sep=".")


def record(cfg: ConfigDict) -> dict[str, Any]:
  """Returns all values of a configuration by dotted key, as JSON holds them: what a run directory records."""
  return json.loads(json.dumps(_flat(cfg)))


def identity(values: Mapping[str, Any], generation: int) -> dict[str, Any]:
  """Returns those of a `record`'s values that the bytes of its `generation` depend on, its teacher and data aside.

  A group keeps the options that the chosen data set, loss and schedule take. Generation 0 has the teacher's network,
  under "model", and the loss of the labels, with the students' class weights. Raises a ConfigError for a name that is
  not registered any more.
  """
  values = {**NEUTRAL, **values, **({} if generation else {"loss.name": "label"})}
  loss = look_up(losses.LOSSES, values["loss.name"], "loss")
  schedule = look_up(optim.SCHEDULES, values["optim.schedule"], "optim.schedule")
  taken = {"data.name", "loss.name", "loss.class_weights"} | _options(values["data.name"], [loss], [schedule])
  of_schedules = _options(values["data.name"], [], optim.SCHEDULES.values())
  network = "teacher.model." if not generation and "teacher.model.name" in values else "model."
  own = {}
  for key, value in values.items():
    optional = key.startswith(("data.", "loss.")) or key in of_schedules
    if key.startswith(network):
      own[f"model.{key.removeprefix(network)}"] = value
    elif not (key.startswith(("model.", "teacher.")) or key in FREE or optional and key not in taken):
      own[key] = value
  if values["optim.schedule"] == "plateau":  # evaluations in training decide the rate
    own["evaluate.training_batch_size"] = values["evaluate.training_batch_size"] or values["evaluate.batch_size"]
  return {key: value for key, value in own.items() if key not in NEUTRAL or NEUTRAL[key] != value}


def identity_digest(values: Mapping[str, Any], generation: int) -> str:
  """Returns the SHA-256 of a generation's identity."""
  return json_digest(identity(values, generation))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], generation: int) -> list[str]:
  """Returns "key: old there, new here" for each value of the identity in which two records differ."""
  one, other = ({**NEUTRAL, **identity(values, generation)} for values in (old, new))
  return [
    f"{key}: {json.dumps(one.get(key))} there, {json.dumps(other.get(key))} here"
    for key in sorted(one.keys() | other.keys())
    if one.get(key) != other.get(key)
  ]

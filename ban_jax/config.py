"""Every check of a configuration's values, and the identity: the values that a generation's bytes depend on.

What each key must be stands in keys.py. A network's own options are checked in its file (ban_jax/models), which `check`
calls; what needs the data is checked by `check_dataset`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax
from ml_collections import ConfigDict

from ban_jax import data, losses, models, optim, teacher
from ban_jax.data import augment, noise, reading
from ban_jax.errors import ConfigError, choices, look_up
from ban_jax.keys import KEYS, neutral_values
from ban_jax.registry import OWN
from ban_jax.trees import json_digest
from ban_jax.types import Dataset, Devices

# The registries whose entries take options; networks' options are checked in their files.
REGISTRIES = (data.DATASETS, augment.AUGMENTATIONS, losses.LOSSES, optim.SCHEDULES, optim.OPTIMIZERS)
# What the keys that name something choose from.
CHOICES: Mapping[str, Mapping[str, Any]] = {
  **{registry.key: registry for registry in REGISTRIES},
  "compute_dtype": models.DTYPES,
  "data.noise_kind": noise.KINDS,
  "data.tokens": dict.fromkeys(reading.UNITS),
  "optim.decay": optim.DECAYS,
  "teacher.loss": losses.LOSSES,
  "teacher.view": teacher.VIEWS,
}
# The keys of `teacher` that its students' bytes depend on; the others are generation 0's.
TEACHING = ("teacher.view", "teacher.weights")
# What messages call such a key, if not by its name.
CALLED = {"data.name": "data set", "loss.name": "loss"}


def check(cfg: ConfigDict) -> None:
  """Raises a ConfigError where a value, or a combination of values, cannot be run; reads no data."""
  given = _flat(cfg)
  for key in KEYS.keys() - given.keys():
    raise ConfigError(f"the configuration lacks {key}; ban_jax/keys.py documents every key")
  for key, value in given.items():
    if key in KEYS:
      _check_value(key, value)
  for key, entries in CHOICES.items():
    for name in _names(given[key]):
      look_up(entries, name, CALLED.get(key, key))
  taken, options = _taken(given), _options()
  for key in given:
    if key not in KEYS and key not in options and not key.startswith(("model.", "teacher.")):
      known = choices(KEYS.keys() | options)
      raise ConfigError(f"unknown configuration key {key!r}; the keys are: {known}, and those of model")
  _check_data(given, taken)
  if "loss.label_weight" in taken and given["loss.label_weight"] == given["loss.teacher_weight"] == 0:
    raise ConfigError("loss.label_weight and loss.teacher_weight cannot both be 0")
  if losses.LOSSES[given["teacher.loss"]].needs_teacher:
    without = choices(name for name, one in losses.LOSSES.items() if not one.needs_teacher)
    raise ConfigError(f"teacher.loss={given['teacher.loss']!r}: expected a loss that needs no teacher: {without}")
  models.check_options(cfg.model, "model")
  if cfg.teacher.model is not None:
    models.check_options(cfg.teacher.model, "teacher.model")


def _taken(values: Mapping[str, Any]) -> set[str]:
  """Returns the keys of the options that the chosen data set, loss, schedule and optimizer take."""
  # The optimizer that the caller gave has no schedule on record.
  return set().union(*(registry.taken(*_names(values.get(registry.key, OWN))) for registry in REGISTRIES))


def _names(value: Any) -> Sequence[str]:
  """Returns the names that a key chooses: one, or several in their order."""
  return (value,) if isinstance(value, str) else value


def _options() -> set[str]:
  """Returns the keys that are options: of some data set, loss, schedule or optimizer, and not of all."""
  return set().union(*(registry.taken(*registry) for registry in REGISTRIES))


def _check_value(key: str, value: Any) -> None:
  rule = KEYS[key].rule
  if value is None:
    raise ConfigError(f"{key} is None: expected {rule.expected}")
  if not rule.holds(value):
    raise ConfigError(f"{key}={value!r}: expected {rule.expected}")


def _check_data(given: Mapping[str, Any], taken: set[str]) -> None:
  """Raises a ConfigError if a value of the `data` group does not fit the data set, or another value of the group."""
  name = given["data.name"]
  for key, known in KEYS.items():
    if known.unused is None or key in taken or given[key] == known.unused[0]:
      continue
    neutral, why = known.unused
    if name == OWN:
      why = "is given as dataset=, and from_arrays takes such settings"
    raise ConfigError(f"{key}={given[key]!r}: expected {neutral!r}, because {name} {why}")
  if "data.dataset" in taken and not given["data.dataset"]:
    raise ConfigError(f"data.dataset='': expected a name of TFDS, such as mnist, because data.name={name!r}")
  if given["data.validation_split"] and given["data.validation"]:
    raise ConfigError(
      f"data.validation={given['data.validation']!r}: expected 0.0, because data.validation_split="
      f"{given['data.validation_split']!r} is the validation split"
    )
  if "data.window" in taken and not given["data.window"]:
    raise ConfigError(f"data.window=0: expected at least 1, the tokens of a window of {name}")


def check_dataset(cfg: ConfigDict, dataset: Dataset, own_optimizer: bool = False) -> None:
  """Raises a ConfigError where a configuration cannot be run, or evaluated, on the data set that was loaded.

  With `own_optimizer`, the caller's, the configuration's schedule is not used.
  """
  schedule = cfg.optim.schedule
  if optim.SCHEDULES[schedule].adapt and not own_optimizer and "validation" not in dataset.splits:
    others = choices(name for name, kind in optim.SCHEDULES.items() if not kind.adapt)
    raise ConfigError(
      f"optim.schedule={schedule!r} decides by a validation split, and there is none; hold out a share with "
      f"data.validation, or choose another of: {others}"
    )
  weights, classes = cfg.loss.class_weights, dataset.spec.num_classes
  if weights and dataset.spec.kind == "tokens":
    raise ConfigError(f"loss.class_weights={weights!r}: expected (), because {dataset.name} is text")
  if weights and weights != "balanced" and len(weights) != classes:
    raise ConfigError(
      f"loss.class_weights has {len(weights)} numbers: expected {classes}, one for each class of {dataset.name}"
    )
  if "k" in losses.LOSSES[cfg.loss.name].options and cfg.loss.k > classes:
    raise ConfigError(f"loss.k={cfg.loss.k}: expected at most {classes}, the classes of {dataset.name}")
  if cfg.teacher.view != "same" and dataset.spec.kind == "tokens":
    raise ConfigError(f"teacher.view={cfg.teacher.view!r}: expected 'same', because {dataset.name} is text")
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

  A group keeps the options that the chosen data set, loss, schedule and optimizer take. Generation 0 has the teacher's
  network, under "model", and the teacher's loss, with the students' options of it. Raises a ConfigError for a name that
  is not registered any more.
  """
  neutral = neutral_values()
  values = {**neutral, **values}
  values |= {} if generation else {"loss.name": values["teacher.loss"]}
  taken, options = _taken(values), _options()
  network = "teacher.model." if not generation and "teacher.model.name" in values else "model."
  own = {}
  for key, value in values.items():
    if key.startswith(network):
      own[f"model.{key.removeprefix(network)}"] = value
    elif generation and key in TEACHING or not key.startswith(("model.", "teacher.")) and _belongs(key, taken, options):
      own[key] = value
  if values["optim.name"] != OWN and optim.SCHEDULES[values["optim.schedule"]].adapt:  # by evaluations in training
    own["evaluate.training_batch_size"] = values["evaluate.training_batch_size"] or values["evaluate.batch_size"]
  neutral |= {f"model.{option}": value for option, value in models.defaults(own["model.name"]).items()}
  return {key: value for key, value in own.items() if key not in neutral or neutral[key] != value}


def _belongs(key: str, taken: set[str], options: set[str]) -> bool:
  """Returns whether a key is part of an identity, given those options that its entries take, and all options."""
  if key in KEYS and not KEYS[key].in_identity:
    return False
  # What only a data set or a loss can take that is not registered any more is an option, too.
  return key in taken or key not in options and (key in KEYS or not key.startswith(("data.", "loss.")))


def identity_digest(values: Mapping[str, Any], generation: int) -> str:
  """Returns the SHA-256 of a generation's identity."""
  return json_digest(identity(values, generation))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], generation: int) -> list[str]:
  """Returns "key: old there, new here" for each value of the identity in which two records differ."""
  one, other = ({**neutral_values(), **identity(values, generation)} for values in (old, new))
  return [
    f"{key}: {json.dumps(one.get(key))} there, {json.dumps(other.get(key))} here"
    for key in sorted(one.keys() | other.keys())
    if one.get(key) != other.get(key)
  ]

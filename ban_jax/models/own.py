"""Networks of one's own: a Flax module as a Model, and any function of variables and inputs as a fixed teacher."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ban_jax import devices, trees
from ban_jax.errors import ConfigError
from ban_jax.types import Dataset, Generation, InputSpec, Model, Network

COLLECTIONS = ("params", "batch_stats")
# What other code calls the argument `train`, or its opposite. Left at its default it would switch dropout off, or stop
# the batch statistics, without a word.
OTHER_NAMES = ("training", "is_training", "is_train", "deterministic", "eval", "use_running_average")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnOptions:
  """Options of a configuration's `own` network: none, since the caller gives it."""


def own(spec: InputSpec, options: OwnOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Raises the ConfigError that names where a network of one's own is given."""
  raise ConfigError("model.name='own': pass the network as model= or teacher_model=: what ban_jax.from_flax returns")


@devices.default_modes()
def from_flax(module: nn.Module, spec: InputSpec | Dataset, *, name: str | None = None) -> Model:
  """Returns a Flax module as a network, for the arguments `model` and `teacher_model` of `train_generation` and others.

  The module is called as `module(x, train=...)`, or as `module(x)` where it has no argument `train`; x is float32
  [B, H, W, C], normalised, and it returns logits [B, n]. It may have batch statistics, and dropout by the random
  generator "dropout". `spec` is the data set that it is for, or its `spec`; `name` defaults to the class's name. Name
  and plain field values identify the network in run directories: give changed code another name.

  Two things are kept for the library's own networks alone. Dropout by `nn.Dropout` depends on the number of devices,
  because it does not draw by the example's place in the mini-batch. `nn.BatchNorm` on several devices normalises by
  each device's own examples, and the running statistics are averaged over the devices, unless the module gives it
  `axis_name="devices"`.

  Raises a ConfigError for a module that cannot be called so, has other collections than "params" and "batch_stats", or
  does not return logits of the right shape.
  """
  spec = spec.spec if isinstance(spec, Dataset) else spec
  if not isinstance(module, nn.Module):
    raise ConfigError(f"from_flax takes an instance of flax.linen.Module, not {_kind(module)}")
  if not isinstance(spec, InputSpec):
    raise ConfigError(f"from_flax takes a Dataset or its spec as the second argument, not {_kind(spec)}")
  if spec.kind != "images":
    raise ConfigError("from_flax takes networks of images; the data set holds tokens")
  name = type(module).__name__ if name is None else name
  _check_name(name)
  try:
    return _from_flax(module, spec, name)
  except TypeError:  # a field of the module cannot be hashed: equal modules then compile again
    return _from_flax.__wrapped__(module, spec, name)


@functools.lru_cache
def _from_flax(module: nn.Module, spec: InputSpec, name: str) -> Model:
  parameters = inspect.signature(type(module).__call__).parameters
  trains = "train" in parameters
  for other in OTHER_NAMES:
    if other in parameters and not trains:
      raise ConfigError(f"model {name!r} has the argument {other!r}; expected module(x, train=): rename it to train")
  others = [
    p.name
    for p in list(parameters.values())[2:]
    if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "train"
  ]
  if others:
    raise ConfigError(
      f"model {name!r} needs the arguments {', '.join(others)}; expected module(x) or module(x, train=)"
    )

  def call(variables: Mapping[str, Any], inputs: jax.Array, train: bool, **options: Any) -> Any:
    return module.apply(variables, inputs, **(options | {"train": train} if trains else options))

  @jax.jit
  def init(key: jax.Array) -> dict[str, Any]:
    # `module(x)` alone may be what creates the variables, so that it is asked as in training; dropout draws nothing
    # that is kept.
    rngs = {"params": key, "dropout": key}
    options: dict[str, Any] = {"train": False} if trains else {}
    return dict(module.init(rngs, jnp.zeros((1, *spec.shape)), **options))

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    statistics = variables.get("batch_stats", {})
    if not train:
      return _logits(call(_without_empty(variables), inputs, False)), carry, statistics
    rngs = {"dropout": jax.random.fold_in(key, positions[0])}  # otherwise all devices would draw the same mask
    logits, updated = call(_without_empty(variables), inputs, True, rngs=rngs, mutable=["batch_stats"])
    return _logits(logits), carry, updated.get("batch_stats", statistics)

  model = Model(name, spec, init, lambda rows: (), apply, local_batch_stats=True, options=_plain_fields(module))
  _check(model)
  return model


def _without_empty(variables: Mapping[str, Any]) -> dict[str, Any]:
  return {collection: tree for collection, tree in variables.items() if tree}


def _logits(outputs: Any) -> jax.Array:
  """Returns a network's outputs as float32; raises a ConfigError where they are no array."""
  if not isinstance(outputs, jax.Array | np.ndarray):
    raise ConfigError(f"the network returns {type(outputs).__name__}; expected one array, the logits [B, classes]")
  return jnp.asarray(outputs, jnp.float32)


def _check_name(name: Any) -> None:
  if not (isinstance(name, str) and name.isprintable() and name):
    raise ConfigError(f"name={name!r}: expected a printable word, because it identifies the network in run directories")


def _check(model: Model) -> None:
  """Raises a ConfigError where a network cannot be called, keeps other state, or does not return logits."""
  inputs = jax.ShapeDtypeStruct((2, *model.spec.shape), jnp.float32)

  def train(variables: Any, x: jax.Array, key: jax.Array) -> Any:
    return model.apply(variables, (), x, train=True, key=key, positions=jnp.arange(2))

  # Mapped, so that the axis of synchronised batch statistics has its name.
  mapped = jax.vmap(train, in_axes=None, axis_name=devices.AXIS, axis_size=1)
  doing = "made for"
  try:
    variables = model.shapes
    if others := [collection for collection in variables if collection not in COLLECTIONS]:
      raise ConfigError(
        f"model {model.name!r} has the collections {', '.join(others)}; expected {' and '.join(COLLECTIONS)} alone"
      )
    doing = "called with"
    logits, _, _ = jax.eval_shape(lambda v, x: model.apply(v, (), x, train=False), variables, inputs)
    doing = "trained on"
    jax.eval_shape(mapped, variables, inputs, jax.random.key(0))
  except ConfigError:
    raise
  except Exception as error:  # whatever the caller's code raises
    shape, reason = "x".join(map(str, model.spec.shape)), (str(error) or type(error).__name__).splitlines()[0]
    hint = f'; batch statistics are synchronised by axis_name="{devices.AXIS}"' if "unbound axis" in reason else ""
    raise ConfigError(f"model {model.name!r} cannot be {doing} images of {shape}: {reason}{hint}") from error
  if logits.shape != (2, model.spec.num_classes):
    raise ConfigError(
      f"model {model.name!r} returns {list(logits.shape)} for two images; expected logits [2, {model.spec.num_classes}]"
    )


def _plain_fields(module: nn.Module) -> tuple[tuple[str, Any], ...]:
  """Returns the fields that are plain values, or sequences of them, as JSON holds them."""
  fields = ((name, getattr(module, name)) for name in module.__dataclass_fields__ if name not in ("parent", "name"))
  return tuple((name, value) for name, value in fields if _is_plain(value))


def _is_plain(value: Any) -> bool:
  if isinstance(value, tuple):
    return all(map(_is_plain, value))
  return value is None or isinstance(value, bool | int | float | str)


@devices.default_modes()
def from_function(
  apply: Callable[[Any, jax.Array], jax.Array], variables: Any, spec: InputSpec | Dataset, *, name: str
) -> Generation:
  """Returns a network of another library as a fixed teacher: a Generation to pass as `params_prev`.

  `apply(variables, inputs)` is a JAX function of a tree of arrays and of normalised images, float32 [B, H, W, C]; it
  returns logits [B, n]. Such a generation can teach and be evaluated, but not be trained. Where `spec` is a data set,
  it predicts too, and normalises images as that set does. Raises a ConfigError where the function does not return
  logits for inputs of `spec`.
  """
  scaling, spec = (spec.scaling, spec.spec) if isinstance(spec, Dataset) else ({}, spec)
  if not callable(apply) or not isinstance(spec, InputSpec):
    raise ConfigError("from_function takes a function, its variables and a Dataset or its spec")
  _check_name(name)
  try:
    variables = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), variables)  # float64 becomes float32
  except Exception as error:  # whatever another library's tensor raises
    raise ConfigError(f"the variables of {name!r} are no tree of arrays: {error}") from error

  def init(key: jax.Array) -> dict[str, Any]:
    return {"params": {"variables": jax.tree.map(jnp.asarray, variables)}}

  def call(tree, carry, inputs, *, train, key=None, positions=None):
    logits = apply(tree["params"]["variables"], inputs)
    return _logits(logits), carry, {}

  model = Model(name, spec, init, lambda rows: (), call)
  _check(model)
  params = trees.to_host({"params": {"variables": variables}, "batch_stats": {}}, 0)
  return Generation(0, params, {}, (), Network({"name": "own", "own": name}, "float32", spec, scaling, model))


def _kind(value: Any) -> str:
  return value.__name__ + " itself, not an instance" if isinstance(value, type) else type(value).__name__

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

from ban_jax import trees
from ban_jax.errors import ConfigError
from ban_jax.types import Dataset, Generation, InputSpec, Model, Network

COLLECTIONS = ("params", "batch_stats")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnOptions:
  """Options of a configuration's `own` network: none, since the caller gives it."""


def own(spec: InputSpec, options: OwnOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Raises the ConfigError that names where a network of one's own is given."""
  raise ConfigError("model.name='own': pass the network as model= or teacher_model=: what ban_jax.from_flax returns")


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
  try:
    return _from_flax(module, spec, name)
  except TypeError:  # a field of the module cannot be hashed: equal modules then compile again
    return _from_flax.__wrapped__(module, spec, name)


@functools.lru_cache
def _from_flax(module: nn.Module, spec: InputSpec, name: str) -> Model:
  parameters = inspect.signature(type(module).__call__).parameters
  trains = "train" in parameters
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
    return module.apply(variables, inputs, **({"train": train} if trains else {}), **options)

  @jax.jit
  def init(key: jax.Array) -> dict[str, Any]:
    # `module(x)` alone may be what creates the variables, so that it is asked as in training; dropout draws nothing
    # that is kept.
    rngs = {"params": key, "dropout": key}
    return module.init(rngs, jnp.zeros((1, *spec.shape)), **({"train": False} if trains else {}))

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    statistics = variables.get("batch_stats", {})
    if not train:
      return call(_without_empty(variables), inputs, False).astype(jnp.float32), carry, statistics
    rngs = {"dropout": jax.random.fold_in(key, positions[0])}  # otherwise all devices would draw the same mask
    logits, updated = call(_without_empty(variables), inputs, True, rngs=rngs, mutable=["batch_stats"])
    return logits.astype(jnp.float32), carry, updated.get("batch_stats", statistics)

  model = Model(name, spec, init, lambda rows: (), apply, local_batch_stats=True, options=_plain_fields(module))
  _check(model)
  return model


def _without_empty(variables: Mapping[str, Any]) -> dict[str, Any]:
  return {collection: tree for collection, tree in variables.items() if tree}


def _check(model: Model) -> None:
  """Raises a ConfigError where a network cannot be initialised, keeps other state, or does not return logits."""
  try:
    variables = jax.eval_shape(model.init, jax.random.key(0))
    if others := [collection for collection in variables if collection not in COLLECTIONS]:
      raise ConfigError(
        f"model {model.name!r} has the collections {', '.join(others)}; expected {' and '.join(COLLECTIONS)} alone"
      )
    inputs = jax.ShapeDtypeStruct((2, *model.spec.shape), jnp.float32)
    logits, _, _ = jax.eval_shape(lambda v, x: model.apply(v, (), x, train=False), variables, inputs)
  except (TypeError, ValueError, AttributeError) as error:
    if isinstance(error, ConfigError):
      raise
    shape = "x".join(map(str, model.spec.shape))
    raise ConfigError(f"model {model.name!r} cannot be called with images of {shape}: {error}") from error
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


def from_function(
  apply: Callable[[Any, jax.Array], jax.Array], variables: Any, spec: InputSpec | Dataset, *, name: str
) -> Generation:
  """Returns a network of another library as a fixed teacher: a Generation to pass as `params_prev`.

  `apply(variables, inputs)` is a JAX function of a tree of arrays and of normalised images, float32 [B, H, W, C]; it
  returns logits [B, n]. Such a generation can teach, be evaluated and predict, but not be trained. Raises a ConfigError
  where the function does not return logits for inputs of `spec`.
  """
  spec = spec.spec if isinstance(spec, Dataset) else spec
  if not callable(apply) or not isinstance(spec, InputSpec):
    raise ConfigError("from_function takes a function, its variables and a Dataset or its spec")
  variables = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), variables)  # float64 becomes float32

  def init(key: jax.Array) -> dict[str, Any]:
    return {"params": {"variables": jax.tree.map(jnp.asarray, variables)}}

  def call(tree, carry, inputs, *, train, key=None, positions=None):
    logits = apply(tree["params"]["variables"], inputs)
    return logits.astype(jnp.float32), carry, {}

  model = Model(name, spec, init, lambda rows: (), call)
  _check(model)
  params = trees.to_host({"params": {"variables": variables}, "batch_stats": {}}, 0)
  return Generation(0, params, {}, (), Network({"name": "own", "own": name}, "float32", spec, {}, model))


def _kind(value: Any) -> str:
  return value.__name__ + " itself, not an instance" if isinstance(value, type) else type(value).__name__

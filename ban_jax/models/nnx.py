"""Networks of one's own in Flax NNX: a module's constructor as a Model, and a module as a fixed teacher."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ban_jax import devices, trees
from ban_jax.errors import ConfigError, first_line
from ban_jax.models.own import check_call, check_name, check_rows, examine, logits_of, random_variables
from ban_jax.types import Dataset, Generation, InputSpec, Model, Network, Recipe


class Parts(NamedTuple):
  """A module, split once: its structure, and the variables of which the arrays are filled in at each call."""

  graph: Any
  params: nnx.State
  statistics: nnx.State
  streams: nnx.State  # of random numbers: made anew from the step's key at each call, and kept nowhere
  drops: bool = False  # whether it has dropout
  momentum: float = 0.0  # the largest of batch normalisation


@overload
def from_nnx(module: nnx.Module, spec: InputSpec | Dataset, *, name: str | None = None) -> Generation: ...
@overload
def from_nnx(module: Callable[..., nnx.Module], spec: InputSpec | Dataset, *, name: str | None = None) -> Model: ...
@devices.default_modes()
def from_nnx(module: Any, spec: InputSpec | Dataset, *, name: str | None = None) -> Model | Generation:
  """Returns an NNX module as a network, by its constructor, or a module itself as a fixed teacher.

  Every generation begins with a module of its own, `module(rngs)`, with `rngs` an nnx.Rngs. It is called as
  `module(x)`, or `module(x, train=)`, in the mode that `train()` or `eval()` sets, and takes and returns what the
  modules of `from_flax` do; so it is known by its class's name, or `name`, and by a digest of what it computes. Its
  variables are nnx.Param, which are trained, and nnx.BatchStat. What is not kept is the same, too: nnx.Dropout depends
  on the number of devices, and nnx.BatchNorm needs `axis_name="devices"` to normalise by all of them.

  Args:
    module: a function, or a class, of `rngs`; or a module, which is copied.
    spec: the data set that it is for, or its `spec`.
    name: by default the class's name.

  Returns:
    A Model; of a module itself a Generation, as `from_function` returns it.

  Raises:
    ConfigError: those of `from_flax`, and one that names the path of any other variable or array.

  Examples:
    >>> class Linear(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.dense = nnx.Linear(64, 10, rngs=rngs)
    ...   def __call__(self, x):
    ...     return self.dense(x.reshape(len(x), -1))
    >>> ban_jax.from_nnx(Linear, data).name
    'Linear'
  """
  scaling, spec = (spec.scaling, spec.spec) if isinstance(spec, Dataset) else ({}, spec)
  if not isinstance(spec, InputSpec):
    raise ConfigError(f"from_nnx takes a Dataset or its spec as the second argument, not {type(spec).__name__}")
  given = isinstance(module, nnx.Module)
  if not given and not callable(module):
    raise ConfigError(f"from_nnx takes a constructor of nnx.Module, or a module, not {type(module).__name__}")
  if name is not None:
    check_name(name)
  kind, parts = (type(module), _split(module, name)) if given else _shapes(module, name)
  name = kind.__name__ if name is None else name
  trains = "train" in inspect.signature(kind.__call__).parameters
  check_call(kind, name, trains)

  @jax.jit
  def init(key: jax.Array) -> dict[str, Any]:
    made = parts if given else _split(_construct(module, nnx.Rngs(key)), name)
    return {"params": _arrays(made.params), "batch_stats": _arrays(made.statistics)}

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    if train and key is None and parts.drops:
      raise ConfigError(f"model {name!r} has dropout, and needs a key in training")
    # Without the fold, all devices would draw the same mask.
    key = jax.random.fold_in(key, positions[0]) if train and key is not None else jax.random.key(0)
    state = _filled(parts.params, variables["params"]), _filled(parts.statistics, variables.get("batch_stats", {}))
    # A copy, or the call would change variables that belong to another trace.
    called = nnx.merge(parts.graph, *state, _seeded(parts.streams, key), copy=True)
    called.train() if train else called.eval()
    logits = called(inputs, **({"train": train} if trains else {}))
    return logits_of(logits), carry, _arrays(nnx.state(called, nnx.BatchStat))

  model = Model(name, spec, init, lambda rows: (), apply, local_batch_stats=True, momentum=parts.momentum)
  how = "train=True" if trains else "after train()"
  model = model._replace(program=examine(model, "" if given else f"called as module(x), {how}"))
  if not given:
    check_rows(model, random_variables(model.shapes))
    return model._replace(recipe=Recipe(_again, module, spec, name))
  params = trees.to_host(init(jax.random.key(0)), 0)
  check_rows(model, trees.to_plain(params))
  return Generation(
    0, params, {}, (), Network({"name": "own", "own": name}, "float32", spec, scaling, model.program, model)
  )


def _again(constructor: Callable[..., nnx.Module], spec: InputSpec, name: str) -> Model:
  return from_nnx(constructor, spec, name=name)


def _construct(constructor: Callable[..., Any], rngs: nnx.Rngs) -> nnx.Module:
  """Returns what a constructor makes; raises a ConfigError where that is no module."""
  # Of a class, NNX hides the arguments.
  made_by = constructor.__init__ if isinstance(constructor, type) else constructor  # type: ignore[misc]
  named = "rngs" in inspect.signature(made_by).parameters
  module = constructor(rngs=rngs) if named else constructor(rngs)
  if not isinstance(module, nnx.Module):
    raise ConfigError(f"from_nnx takes a constructor of nnx.Module; this one returns {type(module).__name__}")
  return module


def _shapes(constructor: Callable[..., Any], name: str | None) -> tuple[type, Parts]:
  """Returns the class of what a constructor makes, and its parts with shapes in place of arrays."""
  found: list[Any] = []

  def make() -> tuple[nnx.State, ...]:
    module = _construct(constructor, nnx.Rngs(0))
    parts = _split(module, name)
    found.extend((type(module), parts))
    return parts.params, parts.statistics, parts.streams

  try:
    params, statistics, streams = jax.eval_shape(make)
  except ConfigError:
    raise
  except Exception as error:  # whatever the caller's code raises
    reason = first_line(error)
    raise ConfigError(f"the constructor cannot make a module from rngs: {reason}") from error
  kind, parts = found
  return kind, parts._replace(params=params, statistics=statistics, streams=streams)


def _split(module: nnx.Module, name: str | None) -> Parts:
  """Returns a module's parts; raises a ConfigError that names the path of a variable of another kind."""
  states: Any = nnx.split(module, nnx.Param, nnx.BatchStat, nnx.RngState, ...)
  graph, params, statistics, streams, rest = states
  others = dict(nnx.to_flat_state(rest))
  for path, layer in nnx.iter_modules(module):  # NNX takes an array that is being traced for a part of the structure
    others |= {(*path, key): value for key, value in vars(layer).items() if isinstance(value, jax.Array)}
  for path, variable in others.items():
    kind = type(variable).__name__ if isinstance(variable, nnx.Variable) else "array"
    name = type(module).__name__ if name is None else name
    raise ConfigError(
      f"model {name!r} keeps the {kind} {'/'.join(map(str, path))}; expected nnx.Param, nnx.BatchStat and random "
      "streams alone: compute a constant where it is used"
    )
  layers = [layer for _, layer in nnx.iter_modules(module)]
  drops = any(layer.rate if isinstance(layer, nnx.Dropout) else getattr(layer, "dropout_rate", 0) for layer in layers)
  momentum = max([0.0, *(float(layer.momentum) for layer in layers if isinstance(layer, nnx.BatchNorm))])
  return Parts(graph, params, statistics, streams, drops, momentum)


def _arrays(state: nnx.State) -> dict[str, Any]:
  """Returns a state's arrays as plain dicts, in which the places of a list are words: "0", "1"."""
  return unflatten_dict({tuple(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)})


def _filled(state: nnx.State, tree: Mapping[str, Any]) -> nnx.State:
  """Returns a state with the arrays of a tree that `_arrays` made."""
  leaves = flatten_dict(tree)
  flat = nnx.to_flat_state(state)
  return nnx.from_flat_state({path: value.replace(leaves[tuple(map(str, path))]) for path, value in flat})


def _seeded(streams: nnx.State, key: jax.Array) -> nnx.State:
  """Returns random streams at their beginning, each with a key of its own."""
  found = {}
  for number, (path, variable) in enumerate(nnx.to_flat_state(streams)):
    shape = variable.get_value().shape
    if isinstance(variable, nnx.RngKey):
      own_key = jax.random.fold_in(key, number)
      found[path] = variable.replace(jax.random.split(own_key, shape) if shape else own_key)
    else:
      found[path] = variable.replace(jnp.zeros(shape, jnp.uint32))
  return nnx.from_flat_state(found)

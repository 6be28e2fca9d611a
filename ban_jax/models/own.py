"""Networks of one's own: a Flax module as a Model, and any function of variables and inputs as a fixed teacher."""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ban_jax import devices, errors, trees
from ban_jax.errors import ConfigError, first_line
from ban_jax.models import common, program
from ban_jax.types import Dataset, Generation, InputSpec, Model, Network, Program, Recipe

# Further collections are kept among the batch statistics, under names that no module has: "@ema".
COLLECTIONS = ("params", "batch_stats")
MARK = "@"
# What other code calls the argument `train`, or its opposite. Left at its default it would switch off what only
# training does, of which dropout and batch statistics are noticed by `_trained`.
OTHER_NAMES = (
  *("training", "is_training", "is_train", "train_mode", "deterministic", "use_running_average", "mode", "phase"),
  *("inference", "is_inference", "eval", "evaluate", "is_eval", "eval_mode", "test", "testing", "is_test"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnOptions:
  """Options of a configuration's `own` network: none, since the caller gives it."""


def own(spec: InputSpec, options: OwnOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Raises the ConfigError that names where a network of one's own is given."""
  raise ConfigError("model.name='own': pass the network as model= or teacher_model=: what ban_jax.from_flax returns")


@devices.default_modes()
def from_flax(module: nn.Module, spec: InputSpec | Dataset, *, name: str | None = None) -> Model:
  """Returns a Flax module as a network, for the arguments `model` and `teacher_model` of `train_generation` and others.

  The module is called as `module(x, train=...)`, or as `module(x)` if it has no argument `train`. It may have dropout
  by the random generator "dropout", batch statistics, and further collections of floating-point numbers, which
  training carries as it carries batch statistics. Name, plain field values and a digest of what its
  code computes identify the network in run directories.

  Two things are kept for the library's own networks alone. Dropout by `nn.Dropout` depends on the number of devices,
  because it does not draw by the example's place in the mini-batch. `nn.BatchNorm` on several devices normalises by
  each device's own examples, and the running statistics are averaged over the devices, unless the module gives it
  `axis_name="devices"`.

  Args:
    module: takes x, float32 [B, H, W, C], normalised, and returns logits [B, n]; of text, int32 [B, T], each row read
      on its own, and logits [B, T, n].
    spec: the data set that it is for, or its `spec`.
    name: by default the class's name.

  Returns:
    A Model.

  Raises:
    ConfigError: for a module that cannot be called so, has a state of whole numbers, does not return logits of the
      right shape, leaves batch statistics or dropout still in training, takes the images of a mini-batch together in
      evaluation, or tells a token from later ones.

  Examples:
    >>> linear = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)])
    >>> ban_jax.from_flax(linear, data, name="linear").name
    'linear'
  """
  spec = spec.spec if isinstance(spec, Dataset) else spec
  if not isinstance(module, nn.Module):
    raise ConfigError(f"from_flax takes an instance of flax.linen.Module, not {_kind(module)}")
  if not isinstance(spec, InputSpec):
    raise ConfigError(f"from_flax takes a Dataset or its spec as the second argument, not {_kind(spec)}")
  name = type(module).__name__ if name is None else name
  check_name(name)
  model, called = _of_module(module, spec, name)
  with _momenta() as momenta:
    found = examine(model, called)
  recipe = Recipe(functools.partial(from_flax, name=name), module, spec)
  model = model._replace(program=found, momentum=max(momenta), recipe=recipe)
  try:
    same = _same(module, spec, name, model.program)
  except TypeError:  # a field of the module cannot be hashed: equal modules then compile again
    same = []
  if not same:  # otherwise an equal one has passed
    check_rows(model, random_variables(model.shapes))
    same.append(model)
  return same[0]


@functools.lru_cache
def _same(module: nn.Module, spec: InputSpec, name: str, program: Program) -> list[Model]:
  """Returns where the model of equal modules, whose code is equal too, is kept: one for all, so that it compiles once.

  Equal modules are not enough: the functions that a class calls may have been changed since.
  """
  return []


def check_call(kind: type, name: str, trains: bool) -> None:
  """Raises a ConfigError where a module is not called as `module(x)`, or if it `trains`, as `module(x, train=)`."""
  parameters = inspect.signature(kind.__call__).parameters
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


def _of_module(module: nn.Module, spec: InputSpec, name: str) -> tuple[Model, str]:
  """Returns a module as a network, not examined yet, and in words how it is called in training."""
  trains = "train" in inspect.signature(type(module).__call__).parameters or _takes_train(module, spec)
  check_call(type(module), name, trains)

  def call(variables: Mapping[str, Any], inputs: jax.Array, train: bool, **options: Any) -> Any:
    return module.apply(variables, inputs, **(options | {"train": train} if trains else options))

  @jax.jit
  def init(key: jax.Array) -> dict[str, Any]:
    # `module(x)` alone may be what creates the variables, so that it is asked as in training; dropout draws nothing
    # that is kept.
    rngs = {"params": key, "dropout": key}
    options: dict[str, Any] = {"train": False} if trains else {}
    found = dict(module.init(rngs, common.blank(spec), **options))
    return {"params": found.get("params", {}), "batch_stats": _state(found)}

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    state = variables.get("batch_stats", {})
    collections = _collections(variables["params"], state)
    if not train:
      return logits_of(call(collections, inputs, False)), carry, state
    # Without the fold, all devices would draw the same mask.
    rngs = {} if key is None else {"dropout": jax.random.fold_in(key, positions[0])}
    kept = [name for name in collections if name != "params"]
    logits, updated = call(collections, inputs, True, rngs=rngs, mutable=kept)
    return logits_of(logits), carry, _state({**collections, **updated})

  model = Model(name, spec, init, lambda rows: (), apply, local_batch_stats=True, options=_plain_fields(module))
  if trains:
    return model, "called as module(x, train=True), and has to hand train on to its layers"
  return model, "called as module(x): it has to take an argument train, and hand that on to its layers"


@contextlib.contextmanager
def _momenta() -> Iterator[list[float]]:
  """Yields a list of 0 and, by and by, the momentum of each batch normalisation that is called."""
  found = [0.0]

  def watch(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, nn.BatchNorm):
      found.append(float(context.module.momentum))
    return next_call(*args, **kwargs)

  with nn.intercept_methods(watch):
    yield found


def _takes_train(module: nn.Module, spec: InputSpec) -> bool:
  """Returns whether a module that takes any keyword hands `train` on to what knows it, as nn.Sequential does."""
  if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(type(module).__call__).parameters.values()):
    return False
  inputs = jax.eval_shape(lambda: common.blank(spec))
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
  try:
    jax.eval_shape(lambda x: module.init(rngs, x, train=False), inputs)
  except Exception:  # whatever the caller's code raises; without `train` it is raised again where it matters
    return False
  return True


def _state(collections: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the batch statistics, with all other collections but the parameters among them."""
  others = {f"{MARK}{name}": tree for name, tree in collections.items() if name not in COLLECTIONS}
  return {**collections.get("batch_stats", {}), **others}


def _collections(params: Any, state: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the collections that `_state` was made of, without those that are empty."""
  statistics = {name: tree for name, tree in state.items() if not name.startswith(MARK)}
  others = {name.removeprefix(MARK): tree for name, tree in state.items() if name.startswith(MARK)}
  collections = {"params": params, "batch_stats": statistics, **others}
  return {name: tree for name, tree in collections.items() if tree}


def logits_of(outputs: Any) -> jax.Array:
  """Returns a network's outputs as float32; raises a ConfigError where they are no array."""
  if not isinstance(outputs, jax.Array | np.ndarray):
    raise ConfigError(f"the network returns {type(outputs).__name__}; expected one array, the logits [B, classes]")
  return jnp.asarray(outputs, jnp.float32)


def check_name(name: Any) -> None:
  """Raises a ConfigError for what cannot name a network."""
  errors.check_name(name, "identifies the network in run directories")


def examine(model: Model, called: str = "") -> Program:
  """Returns what a network computes, traced for a tiny batch; in evaluation mode alone where nothing is `called`.

  Raises a ConfigError where it cannot be called, keeps other state, does not return logits, or does not train.
  """
  inputs = jax.eval_shape(lambda: jnp.repeat(common.blank(model.spec), 2, axis=0))
  expected = (*inputs.shape[: 1 if model.spec.kind == "images" else 2], model.spec.num_classes)
  doing = "made for"
  try:
    made = program.trace(model.init, _key_shape())
    variables = made.out_info
    for path, leaf in trees.leaves(variables.get("batch_stats", {})).items():
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ConfigError(
          f"model {model.name!r} has the state {path.removeprefix(MARK)} of {leaf.dtype}; expected floating-point "
          "numbers, which can be averaged over devices"
        )
    doing = "called with"
    predicts = program.trace(lambda v, x: model.apply(v, (), x, train=False)[0], variables, inputs)
    shape = predicts.out_info.shape
    if shape != expected:
      raise ConfigError(
        f"model {model.name!r} returns {list(shape)} for two {_noun(model)}s; expected logits {list(expected)}"
      )
    doing = "trained on"
    trains = (made, _trained(model, variables, inputs, predicts.out_info, called)) if called else ()
    return Program(program.digest(predicts), program.digest(*trains) if trains else "", program.VERSIONS)
  except ConfigError:
    raise
  except Exception as error:  # whatever the caller's code raises
    raise _failed(model, doing, error) from error


def _failed(model: Model, doing: str, error: Exception) -> ConfigError:
  size, reason = "x".join(map(str, model.spec.shape)), first_line(error)
  hint = f'; batch statistics are synchronised by axis_name="{devices.AXIS}"' if "unbound axis" in reason else ""
  read = f"{_noun(model)}s of {size}{' tokens' * (model.spec.kind == 'tokens')}"
  return ConfigError(f"model {model.name!r} cannot be {doing} {read}: {reason}{hint}")


def _noun(model: Model) -> str:
  return "image" if model.spec.kind == "images" else "window"


def _key_shape() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32"))


def _trained(model: Model, variables: Any, inputs: Any, slope: Any, called: str) -> Any:
  """Returns the trace of a network in training, with its gradient; raises a ConfigError where training passes it by."""
  dropouts: dict[str, bool] = {}  # by path, whether it draws

  def watch(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    outputs, layer = next_call(*args, **kwargs), context.module
    if context.method_name == "__call__" and isinstance(layer, nn.Dropout) and layer.rate:
      dropouts["/".join(layer.path)] = outputs is not args[0]
    if context.method_name == "__call__" and isinstance(layer, nn.MultiHeadDotProductAttention) and layer.dropout_rate:
      given = kwargs.get("deterministic")
      dropouts["/".join(layer.path)] = not (layer.deterministic if given is None else given)
    return outputs

  def train(state: Any, params: Any, x: jax.Array, key: jax.Array | None, slope: jax.Array) -> Any:
    def logits(params: Any) -> tuple[jax.Array, Any]:
      variables = {"params": params, "batch_stats": state}
      found = model.apply(variables, (), x, train=True, key=key, positions=jnp.arange(2))
      return found[0], found[2]

    outputs, pullback, statistics = jax.vjp(logits, params, has_aux=True)
    return outputs, statistics, pullback(slope)

  # Mapped, so that the axis of synchronised batch statistics has its name.
  mapped = jax.vmap(train, in_axes=None, axis_name=devices.AXIS, axis_size=1)
  given = variables["batch_stats"], variables["params"], inputs
  with nn.intercept_methods(watch):
    traced = program.trace(mapped, *given, _key_shape(), slope)
  # What moves, moves with the parameters, as in spectral normalisation, or with the inputs.
  (_, with_params, _), (_, with_inputs, _) = program.reached(traced, 1), program.reached(traced, 2)
  draws, _, _ = program.reached(traced, 3)
  layers: dict[str, bool] = {}
  for path, moves in trees.leaves(jax.tree.map(lambda one, other: one or other, with_params, with_inputs)).items():
    layer = path.rpartition("/")[0]
    if not path.startswith(MARK):
      layers[layer] = layers.get(layer, False) or bool(moves)
  still = [f"batch statistics of {layer or model.name} do not move" for layer, moves in layers.items() if not moves]
  still += [f"dropout {path} is off" for path, on in dropouts.items() if not on]
  if not (still or draws) and (dropouts or _asks(mapped, given, slope)):
    still = ["dropout draws nothing from its key"]
  if still:
    raise ConfigError(f"model {model.name!r}: in training, {still[0]}; it is {called}")
  return traced


def _asks(train: Callable[..., Any], given: tuple[Any, ...], slope: Any) -> bool:
  """Returns whether a network asks for the random generator of dropout: without one, it then fails."""
  try:
    jax.eval_shape(lambda given, slope: train(*given, None, slope), given, slope)
  except Exception:  # whatever Flax raises: with the generator it ran
    return True
  return False


def random_variables(shapes: Any) -> Any:
  """Returns variables of these shapes, none of them zero: initial ones may hide what a network does."""
  rng = np.random.default_rng(0)

  def draw(leaf: Any) -> np.ndarray:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
      return np.zeros(leaf.shape, leaf.dtype)
    numbers = rng.normal(size=leaf.shape)
    numbers = numbers / math.sqrt(math.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1 + numbers / 10
    return np.asarray(numbers, leaf.dtype)

  return jax.tree.map(draw, shapes)


def check_rows(model: Model, variables: Any) -> None:
  """Raises a ConfigError where, in evaluation, logits depend on other rows of the mini-batch, or on later tokens."""
  rng, spec = np.random.default_rng(1), model.spec
  if spec.kind == "images":
    inputs = rng.normal(size=(3, *spec.shape)).astype(np.float32)
  else:
    inputs = rng.integers(0, spec.num_classes, (3, *spec.shape)).astype(np.int32)
    inputs[2, :-1], inputs[2, -1] = inputs[0, :-1], (inputs[0, -1] + 1) % spec.num_classes
  # Run once: to compile it well would take longer than to run it badly.
  cheap = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
  run = jax.jit(lambda v, x: model.apply(v, (), x, train=False)[0], compiler_options=cheap)
  try:
    one, other = (np.asarray(run(variables, inputs[rows])) for rows in ([0, 1], [2, 0]))
  except Exception as error:  # of a callback, which is called only now
    raise _failed(model, "called with", error) from error
  spread = np.ptp(np.stack([one, other]))
  if np.abs(one[0] - other[1]).max() > 0.01 * spread:  # false where a number is not finite
    noun = _noun(model)
    raise ConfigError(
      f"model {model.name!r}: in evaluation, the logits of a{'n' * (noun == 'image')} {noun} depend on its place or on "
      f"the others in its mini-batch; expected each {noun} to be taken alone, batch normalisation by running statistics"
    )
  if spec.kind == "tokens" and np.abs(one[0, :-1] - other[0, :-1]).max(initial=0) > 0.01 * spread:
    raise ConfigError(
      f"model {model.name!r}: the logits after a token depend on the tokens that follow it; expected a causal network, "
      "because these are what it is to predict"
    )


def _plain_fields(module: nn.Module) -> tuple[tuple[str, Any], ...]:
  """Returns the fields that are plain values, or sequences of them, as standard JSON holds them."""
  fields = ((name, getattr(module, name)) for name in module.__dataclass_fields__ if name not in ("parent", "name"))
  return tuple((name, _frozen(trees.standard(value))) for name, value in fields if _is_plain(value))


def _frozen(value: Any) -> Any:
  return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _is_plain(value: Any) -> bool:
  if isinstance(value, tuple):
    return all(map(_is_plain, value))
  return value is None or isinstance(value, bool | int | float | str)


@devices.default_modes()
def from_function(
  apply: Callable[[Any, jax.Array], jax.Array], variables: Any, spec: InputSpec | Dataset, *, name: str
) -> Generation:
  """Returns a network of another library as a fixed teacher: a Generation to pass as `params_prev`.

  It can teach and be evaluated, but not be trained.

  Args:
    apply: a JAX function `(variables, inputs)` that returns logits: of normalised images, float32 [B, H, W, C], logits
      [B, n]; of tokens, int32 [B, T], logits [B, T, n].
    variables: a tree of arrays.
    spec: a data set, by which it predicts too, and normalises images as that set does; or a data set's `spec`.
    name: its name, in messages and records.

  Returns:
    A Generation.

  Raises:
    ConfigError: if the function does not return logits for inputs of `spec`, takes the images of a mini-batch together,
      or tells a token from later ones.

  Examples:
    >>> weights = {"kernel": np.zeros((64, 10), np.float32)}
    >>> ban_jax.from_function(lambda w, x: x.reshape(len(x), -1) @ w["kernel"], weights, data, name="zero").index
    0
  """
  scaling, spec = (spec.scaling, spec.spec) if isinstance(spec, Dataset) else ({}, spec)
  if not callable(apply) or not isinstance(spec, InputSpec):
    raise ConfigError("from_function takes a function, its variables and a Dataset or its spec")
  check_name(name)
  try:
    variables = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), variables)  # float64 becomes float32
  except Exception as error:  # whatever another library's tensor raises
    raise ConfigError(f"the variables of {name!r} are no tree of arrays: {error}") from error

  def init(key: jax.Array) -> dict[str, Any]:
    return {"params": {"variables": jax.tree.map(jnp.asarray, variables)}}

  def call(tree, carry, inputs, *, train, key=None, positions=None):
    logits = apply(tree["params"]["variables"], inputs)
    return logits_of(logits), carry, {}

  model = Model(name, spec, init, lambda rows: (), call)
  model = model._replace(program=examine(model))
  params = trees.to_host({"params": {"variables": variables}, "batch_stats": {}}, 0)
  check_rows(model, trees.to_plain(params))
  network = Network({"name": "own", "own": name}, "float32", spec, scaling, model.program, model)
  return Generation(0, params, {}, (), network)


def _kind(value: Any) -> str:
  return value.__name__ + " itself, not an instance" if isinstance(value, type) else type(value).__name__

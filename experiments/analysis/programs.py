"""The training and evaluation steps of a configuration as programs, and their floating-point operations.

Nothing is run: operations are counted on the traced program. CIFAR and the Penn Treebank are not needed, only their
shapes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend import core
from ml_collections import ConfigDict

from ban_jax import data, losses, optim
from ban_jax import devices as devices_lib
from ban_jax.data import images, text
from ban_jax.evaluate import make_models
from ban_jax.step import make_eval_step, make_train_step
from ban_jax.types import Batch, Devices, InputSpec, Model, TrainState

# CIFAR's and the Penn Treebank's sizes, which ban_jax.data does not export: it knows them only once they are loaded.
_CLASSES = {"cifar10": 10, "cifar100": 100}
_CIFAR_EXAMPLES = 50_000
# Training tokens, words, and the characters of the words.
_PTB_TOKENS, WORDS, CHARACTERS = 929_589, 10_000, 46


class Program(NamedTuple):
  """A mapped step and the shapes of its arguments."""

  step: Callable[..., Any]
  arguments: tuple[Any, ...]


class Described(NamedTuple):
  """A data set as the steps see it: its inputs, its fetch function, its arrays' shapes, and the steps of an epoch."""

  spec: InputSpec
  fetch: Callable[..., Batch]
  arrays: dict[str, jax.ShapeDtypeStruct]
  steps_per_epoch: int


class Work(NamedTuple):
  """The work of an epoch of training: its steps, and the floating-point operations of each."""

  steps_per_epoch: int
  flops: int


def initial_state(
  student: Model, frozen: Sequence[str], optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
  """Returns a student's state before the first step; the optimizer does not see its frozen layers."""
  variables = student.init(key)
  trainable = {name: tree for name, tree in variables["params"].items() if name not in frozen}
  return TrainState(np.int32(0), variables["params"], variables.get("batch_stats", {}), optimizer.init(trainable))


def train_program(cfg: ConfigDict, devices: Devices, *, taught: bool = True) -> Program:
  """Returns the training step of a student, or without `taught` of generation 0, with its arguments' shapes.

  Loads the data set, except for CIFAR and PTB. Raises a ConfigError or DataError as a run would.
  """
  devices_lib.check_batch_size(cfg.train.batch_size, devices)
  spec, fetch, arrays, _ = describe(cfg)
  teacher, student = make_models(cfg, spec)
  loss = losses.make_loss(cfg.loss if taught else {**cfg.loss, "name": "label"})
  student, teachers = (student if taught else teacher), ((teacher,) if loss.needs_teacher else ())
  frozen = student.inherits if taught else ()
  optimizer = optim.make_optimizer(cfg.optim, 1)
  step = make_train_step(
    student=student,
    teachers=teachers,
    frozen=frozen,
    loss=loss,
    optimizer=optimizer,
    fetch=fetch,
    devices=devices,
    sync_batch_stats=cfg.train.sync_batch_stats,
    gradient_split=cfg.train.gradient_split,
  )
  rows = cfg.train.batch_size // len(devices)

  def initial(key):
    carry = (student.init_carry(rows), tuple(model.init_carry(rows) for model in teachers))
    return initial_state(student, frozen, optimizer, key), carry, tuple(model.init(key) for model in teachers)

  state, carry, teacher_variables = jax.eval_shape(initial, jax.random.key(0))
  index = jax.ShapeDtypeStruct((rows,), np.int32)
  key_data = jax.ShapeDtypeStruct((2,), np.uint32)
  mapped = functools.partial(_on_each, devices)
  return Program(step, (mapped(state), teacher_variables, mapped(carry), arrays, mapped(index), key_data))


def eval_program(cfg: ConfigDict, devices: Devices) -> Program:
  """Returns the evaluation step of one student with its arguments' shapes; data and errors as for `train_program`."""
  devices_lib.check_batch_size(cfg.train.batch_size, devices)
  spec, fetch, arrays, _ = describe(cfg)
  _, model = make_models(cfg, spec)
  rows = cfg.train.batch_size // len(devices)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  carry = jax.eval_shape(lambda: model.init_carry(rows))
  index = jax.ShapeDtypeStruct((rows,), np.int32)
  arguments = ((variables,), _on_each(devices, (carry,)), arrays, _on_each(devices, index))
  return Program(make_eval_step((model,), fetch, devices), arguments)


def work(cfg: ConfigDict, devices: Sequence[jax.Device], *, taught: bool = True) -> Work:
  """Returns the work of an epoch on all devices together; arguments and errors as for `train_program`."""
  flops = count_flops(train_program(cfg, tuple(devices), taught=taught)) * len(devices)
  return Work(describe(cfg).steps_per_epoch, flops)


def describe(cfg: ConfigDict) -> Described:
  """Describes a configuration's data set; raises a DataError if it must be loaded and is missing."""
  batch = cfg.train.batch_size
  if cfg.data.name in _CLASSES:
    shapes = {"images": (_CIFAR_EXAMPLES, 32, 32, 3), "labels": (_CIFAR_EXAMPLES,), "mean": (3,), "std": (3,)}
    dtypes = {"images": np.uint8, "labels": np.int32, "mean": np.float32, "std": np.float32}
    arrays = {name: jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in shapes.items()}
    spec = InputSpec("images", (32, 32, 3), _CLASSES[cfg.data.name])
    examples = (cfg.data.train_examples or _CIFAR_EXAMPLES) * (1 - cfg.data.validation)
    return Described(spec, images.make_fetch(cfg.data.pad, cfg.data.flip), arrays, int(examples) // batch)
  if cfg.data.name == "ptb":
    arrays = {"tokens": jax.ShapeDtypeStruct((_PTB_TOKENS + 1,), np.int32)}
    windows = (cfg.data.train_examples or _PTB_TOKENS) // cfg.data.window
    spec = InputSpec("tokens", (cfg.data.window,), WORDS, made_up_words())
    return Described(spec, text.make_fetch(cfg.data.window), arrays, windows // batch)
  dataset = data.load(cfg.data)
  arrays = {name: jax.ShapeDtypeStruct(np.shape(array), array.dtype) for name, array in dataset.splits["train"].items()}
  return Described(dataset.spec, dataset.fetch, arrays, len(dataset.train_order(jax.random.key(0), batch)))


@functools.cache
def made_up_words() -> tuple[str, ...]:
  """Returns as many words as the Penn Treebank has, in as many characters: they determine a network's shapes."""
  characters = [chr(ord("0") + number) for number in range(CHARACTERS)]
  words = ("<eos>", "<unk>", *characters)
  return words + tuple(characters[0] * 2 + str(number) for number in range(WORDS - len(words)))


@functools.cache
def trained_sizes(model: Model) -> dict[str, int]:
  """Returns the number of parameters of each top-level layer, except those copied from the teacher."""
  params = jax.eval_shape(model.init, jax.random.key(0))["params"]
  trained = {name: tree for name, tree in params.items() if name not in model.inherits}
  return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in trained.items()}


def _on_each(devices: Devices, tree: Any) -> Any:
  """Returns a tree's shapes with a leading device axis."""
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(devices), *leaf.shape), leaf.dtype), tree)


def count_flops(program: Program) -> int:
  """Returns the floating-point operations of one device's share of a step: products and convolutions only."""
  return _flops(jax.jit(program.step).trace(*program.arguments).jaxpr.jaxpr)


def _flops(jaxpr: core.Jaxpr) -> int:
  """Returns the operations of a traced function; a multiplication and an addition count as two.

  A convolution counts every tap of its kernel, including taps on padding, but not the zeros that the backward pass of a
  stride inserts between inputs: so its gradient counts as much as the convolution itself. Raises a ValueError for
  products in a loop of unknown length.
  """
  total = 0
  for equation in jaxpr.eqns:
    name, options = equation.primitive.name, equation.params
    inside = [_flops(sub) for sub in subprograms(options)]
    if name == "dot_general":
      (contracted, _), _ = options["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    elif name == "conv_general_dilated":
      kernel, numbers = equation.invars[1].aval.shape, options["dimension_numbers"]
      taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])  # input channels and kernel positions
      total += 2 * equation.outvars[0].aval.size * taps // math.prod(options["lhs_dilation"])
    elif name == "scan":
      total += options["length"] * sum(inside)
    elif name == "while" and any(inside):
      raise ValueError("products in a loop of unknown length cannot be counted")
    else:
      total += max(inside, default=0) if name == "cond" else sum(inside)
  return total


def subprograms(options: dict[str, Any]) -> list[core.Jaxpr]:
  """Returns the traced functions among an equation's options."""
  values = [entry for value in options.values() for entry in (value if isinstance(value, tuple) else (value,))]
  programs = [getattr(value, "jaxpr", value) for value in values]
  return [program for program in programs if hasattr(program, "eqns")]

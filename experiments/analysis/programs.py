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
from jax.extend import core
from ml_collections import ConfigDict

from ban_jax import config, data, losses, optim
from ban_jax.job import make_models
from ban_jax.step import initial_state, make_eval_step, make_train_step
from ban_jax.teacher import live, none
from ban_jax.types import Devices, Model


class Program(NamedTuple):
  """A mapped step and the shapes of its arguments."""

  step: Callable[..., Any]
  arguments: tuple[Any, ...]


class Work(NamedTuple):
  """The work of an epoch of training: its steps, and the floating-point operations of each."""

  steps_per_epoch: int
  flops: int


def train_program(cfg: ConfigDict, devices: Devices, *, taught: bool = True, teachers: int = 1) -> Program:
  """Returns the training step of a student, or without `taught` of generation 0, with its arguments' shapes.

  Several `teachers` are an ensemble. Loads the data set, except for CIFAR and PTB. Raises a ConfigError or DataError as
  a run would.
  """
  config.check_batch_size(cfg.train.batch_size, devices)
  known = data.describe(cfg.data)
  teacher, student = make_models(cfg, known.spec, devices=devices)
  loss = losses.make_loss(cfg.loss if taught else {"name": "label"})
  student, members = (student if taught else teacher), ((teacher,) * teachers if loss.needs_teacher else ())
  teaching = live(members) if members else none()
  frozen = student.inherits if taught else ()
  optimizer = optim.make_optimizer(cfg.optim, 1)
  step = make_train_step(
    student=student,
    teaching=teaching,
    frozen=frozen,
    loss=loss,
    optimizer=optimizer,
    fetch=known.fetch,
    devices=devices,
    sync_batch_stats=cfg.train.sync_batch_stats,
    gradient_split=cfg.train.gradient_split,
    mapping=cfg.train.mapping,
  )
  rows = cfg.train.batch_size // len(devices)

  def initial(key):
    copied = {name: student.init(key)["params"][name] for name in frozen}
    carry = (student.init_carry(rows), teaching.init_carry(rows))
    return initial_state(student.init(key), optimizer, copied), carry, tuple(model.init(key) for model in members)

  state, carry, source = jax.eval_shape(initial, jax.random.key(0))
  index = jax.ShapeDtypeStruct((1, rows), np.int32)
  key_data = jax.ShapeDtypeStruct((2,), np.uint32)
  mapped = functools.partial(_on_each, devices)
  return Program(step.run, (state, source, mapped(carry), known.arrays, mapped(index), key_data))


def eval_program(cfg: ConfigDict, devices: Devices) -> Program:
  """Returns the evaluation step of one student with its arguments' shapes; data and errors as for `train_program`."""
  config.check_batch_size(cfg.train.batch_size, devices)
  known = data.describe(cfg.data)
  _, model = make_models(cfg, known.spec, devices=devices)
  rows = cfg.train.batch_size // len(devices)
  variables = model.shapes
  carry = jax.eval_shape(lambda: model.init_carry(rows))
  index = jax.ShapeDtypeStruct((1, rows), np.int32)
  arguments = ((variables,), _on_each(devices, (carry,)), known.arrays, _on_each(devices, index))
  return Program(make_eval_step((model,), known.fetch, devices).run, arguments)


def work(cfg: ConfigDict, devices: Sequence[jax.Device], *, taught: bool = True) -> Work:
  """Returns the work of an epoch on all devices together; arguments and errors as for `train_program`."""
  flops = count_flops(train_program(cfg, tuple(devices), taught=taught)) * len(devices)
  return Work(data.describe(cfg.data).rows // cfg.train.batch_size, flops)


@functools.cache
def trained_sizes(model: Model) -> dict[str, int]:
  """Returns the number of parameters of each top-level layer, except those copied from the teacher."""
  params = model.shapes["params"]
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

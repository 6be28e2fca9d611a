"""A job's steps as programs, for devices that are here or not, and their floating-point operations.

Nothing is run. A job whose data and teachers are shapes (`job.describe`) will do, so that no data are needed.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from ban_jax import devices as devices_lib
from ban_jax import feeding, train
from ban_jax import job as job_lib
from ban_jax.evaluating import share
from ban_jax.job import Job
from ban_jax.predicting import make_predict_step
from ban_jax.step import make_eval_step
from ban_jax.types import Dataset, Devices


class Program(NamedTuple):
  """A mapped step and the shapes of its arguments."""

  step: Any  # a function with a method `lower`, as jax.jit and jax.pmap return it
  arguments: tuple[Any, ...]
  names: tuple[str, ...] = ()  # what each argument is: one of KINDS
  steps: int = 1  # mini-batches that a call of it takes
  rows: int = 0  # of each on a device
  devices: Devices = ()


# What the arguments of programs are.
KINDS = ("state", "network", "teacher", "data", "carry", "inputs")


def _shapes(tree: Any, count: int = 0) -> Any:
  """Returns a tree's shapes, with a leading axis of `count` devices where it is not 0."""
  leading = (count,) if count else ()
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*leading, *np.shape(leaf)), leaf.dtype), tree)


def _packed(dataset: Dataset, split: str) -> Any:
  """Returns the shapes of a split's arrays on the devices."""
  return jax.eval_shape(dataset.pack, _shapes(dict(dataset.splits[split])))


def training(job: Job, steps: int = 0) -> Program:
  """Returns a job's training step, of `steps` mini-batches a call; 0 are as many as a dispatch has."""
  count, teaching, steps = len(job.devices), job.teacher.teaching, steps or job.steps_per_dispatch
  rows = job.cfg.train.batch_size // count

  def first(copied):
    carry = (job.student.init_carry(rows), teaching.init_carry(rows))
    return job.updates.init(job.student.init(jax.random.key(0)), copied), carry

  state, carry = jax.eval_shape(first, job.teacher.copied)
  source = _shapes(job.teacher.source)
  if job.teacher.recorded:  # an epoch's logits
    spec = job.dataset.spec
    outputs = (*(spec.shape if spec.kind == "tokens" else ()), spec.num_classes)
    source = jax.ShapeDtypeStruct((count, job.steps_per_epoch, rows, *outputs), np.float32)
  arguments = (
    state,
    source,
    _shapes(carry, count),
    _packed(job.dataset, "train"),
    feeding.shapes(job.dataset, "train", (count, steps, rows)),
    jax.ShapeDtypeStruct((2,), np.uint32),
  )
  names = ("state", "teacher", "carry", "data", "inputs", "inputs")
  return Program(train.step_of(job).run, arguments, names, steps, rows, job.devices)


def evaluation(job: Job, batch_size: int = 0, steps: int = 0, split: str = "test") -> Program:
  """Returns the evaluation step of a job's student, as the end of its training has it.

  `batch_size` 0 is the configuration's, `steps` 0 as many mini-batches as a dispatch of an evaluation has.
  """
  models, dataset = (job.student,), job.dataset
  batch_size, devices = share(models, dataset, split, batch_size or job.cfg.evaluate.batch_size, job.devices)
  rows, steps = batch_size // len(devices), steps or job_lib.block_size(dataset, split, batch_size, devices)
  arguments = (
    (job.student.shapes,),
    _shapes(jax.eval_shape(lambda: (job.student.init_carry(rows),)), len(devices)),
    _packed(dataset, split),
    feeding.shapes(dataset, split, (len(devices), steps, rows)),
  )
  step = make_eval_step(models, dataset.fetch, devices)
  return Program(step.run, arguments, ("network", "carry", "data", "inputs"), steps, rows, devices)


def prediction(job: Job, batch_size: int = 256) -> Program:
  """Returns the step of `ban_jax.predict` for a job's student, on the devices of one host."""
  spec, devices = job.dataset.spec, devices_lib.local(job.devices)
  rows = -(-batch_size // len(devices))
  scaling: Any = ()
  dtype: Any = np.int32
  if spec.kind == "images":
    arrays = job.dataset.splits["train"]
    scaling = ((_shapes(arrays["mean"]), _shapes(arrays["std"])),)
    dtype = arrays["images"].dtype if "images" in arrays else np.uint8
  arguments = (
    (job.student.shapes,),
    scaling,
    _shapes(jax.eval_shape(lambda: (job.student.init_carry(rows),)), len(devices)),
    jax.ShapeDtypeStruct((len(devices), rows, *spec.shape), dtype),
    jax.ShapeDtypeStruct((1,), np.float32),
  )
  step = make_predict_step((job.student,), devices)
  return Program(step, arguments, ("network", "inputs", "carry", "inputs", "inputs"), 1, rows, devices)


def count_flops(program: Program) -> int:
  """Returns the floating-point operations of one device's share of a step: products and convolutions only.

  The program must take one mini-batch a call.
  """
  return _flops(jax.jit(program.step).trace(*program.arguments).jaxpr.jaxpr)


def _flops(jaxpr: Any) -> int:
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

"""The sizes of a network, counted from shapes: its trained parameters, and the memory of a training step."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from ban_jax.programs import subprograms
from ban_jax.types import Model


class Memory(NamedTuple):
  """Bytes of a training step on one device."""

  weights: int  # parameters and batch statistics, momentum, gradient, and a teacher as large as the student
  kept: int  # what the forward pass keeps for the backward pass, except parameters, images and broadcasts
  peak: int  # the most that is alive at any moment, including the weights


@functools.cache
def trained_sizes(model: Model) -> dict[str, int]:
  """Returns the number of parameters of each top-level layer, except those copied from the teacher."""
  params = model.shapes["params"]
  trained = {name: tree for name, tree in params.items() if name not in model.inherits}
  return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in trained.items()}


def count_memory(model: Model, batch: int) -> Memory:
  """Returns the memory of a training step on `batch` images.

  Assumes that results live in the order of the trace, each stored in full except broadcasts. A compiler that fuses
  element-wise operations needs less; the workspaces of convolutions are not counted.
  """
  variables = model.shapes
  images = jax.ShapeDtypeStruct((batch, *model.spec.shape), jnp.float32)

  def gradient(params, batch_stats, images):
    def logits_of(params):
      variables = {"params": params, "batch_stats": batch_stats}
      # The key is for dropout, which DenseNets do not have.
      logits, _, updated = model.apply(variables, (), images, train=True, key=jax.random.key(0), positions=None)
      return logits, updated

    logits, pull_back, updated = jax.vjp(logits_of, params, has_aux=True)
    # The values that the backward pass closes over, and its results; the logits have the shape of their own gradient.
    return jax.tree.leaves(pull_back), (pull_back(logits), updated)

  jaxpr, (closed_over, _) = jax.make_jaxpr(gradient, return_shape=True)(
    variables["params"], variables["batch_stats"], images
  )
  closed_over, results = jaxpr.jaxpr.outvars[: len(closed_over)], jaxpr.jaxpr.outvars[len(closed_over) :]
  # A set, since several units may keep the same variable; arguments are not results.
  kept = {variable for variable in closed_over if not isinstance(variable, core.Literal)} - {*jaxpr.jaxpr.invars}
  kept -= {made for equation in jaxpr.jaxpr.eqns if _is_broadcast(equation) for made in equation.outvars}
  parameters, statistics = _bytes(variables["params"]), 2 * _bytes(variables["batch_stats"])
  # The step's results include the gradient; the other weights and the images are alive all the time.
  peak = 3 * parameters + statistics + _bytes(images) + peak_bytes(jaxpr.jaxpr, results)
  return Memory(4 * parameters + statistics, sum(_bytes(variable.aval) for variable in kept), peak)


def peak_bytes(jaxpr: core.Jaxpr, results: Sequence[Any]) -> int:
  """Returns the most bytes alive at once in a traced function that returns `results`, without its arguments."""
  last = {variable: None for variable in results if not isinstance(variable, core.Literal)}
  dying: list[list[Any]] = []
  for equation in reversed(jaxpr.eqns):
    used = [v for v in (*equation.invars, *equation.outvars) if not isinstance(v, core.Literal) and v not in last]
    last.update(dict.fromkeys(used))
    dying.append(list(dict.fromkeys(used)))
  alive, peak, sizes = 0, 0, {}
  for equation, dead in zip(jaxpr.eqns, reversed(dying), strict=True):
    made = {variable: 0 if _is_broadcast(equation) else _bytes(variable.aval) for variable in equation.outvars}
    inside = max((peak_bytes(sub, sub.outvars) for sub in subprograms(equation.params)), default=0)
    peak = max(peak, alive + max(inside, sum(made.values())))
    sizes |= made
    alive += sum(made.values()) - sum(sizes.get(variable, 0) for variable in dead)
  return peak


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _is_broadcast(equation: core.JaxprEqn) -> bool:
  """Returns whether an equation only repeats a smaller array, which compilers do not store."""
  return equation.primitive.name == "broadcast_in_dim"

"""What becomes of a step's gradient: sums over several mini-batches, an update, and the average of what it leads to."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ban_jax import devices as devices_lib
from ban_jax.types import TrainState


class Averaging(NamedTuple):
  """The state of an optimizer, and the average of what it led to."""

  opt_state: PyTree
  average: optax.EmaState  # of (trainable parameters, batch statistics)


class Updates(NamedTuple):
  """How a training step changes its state by a gradient, as pure functions; equal values give the same steps.

  `accumulate` N adds up the gradients and weights of N mini-batches before an update. With an `ema` above 0, the
  average of the parameters and batch statistics after each update, whose age of n updates counts ema^n, is what is
  evaluated and kept.
  """

  transformation: optax.GradientTransformation
  accumulate: int = 1
  ema: float = 0.0

  def init(self, variables: Mapping[str, Any], copied: Mapping[str, PyTree]) -> TrainState:
    """Returns the state before the first step; `copied` replaces top-level parameters and is not trained."""
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    trainable = {name: tree for name, tree in params.items() if name not in copied}
    opt_state = of_sums(self.transformation, self.accumulate).init((trainable, jnp.float32(0)))
    if self.ema:
      opt_state = Averaging(opt_state, optax.ema(self.ema).init((trainable, batch_stats)))
    return TrainState(jnp.int32(0), {**params, **copied}, batch_stats, opt_state)

  def apply(
    self, gradient: PyTree, weight: Float[Array, ""], batch_stats: PyTree, state: TrainState, trainable: PyTree
  ) -> TrainState:
    """Returns the state after a step whose weighted losses have this gradient, a sum as their `weight` is."""
    opt_state, average = state.opt_state if self.ema else (state.opt_state, None)
    update = of_sums(self.transformation, self.accumulate).update
    (updates, _), opt_state = update((gradient, weight), opt_state, (trainable, weight))
    trainable = optax.apply_updates(trainable, updates)
    if self.ema:
      new = optax.ema(self.ema).update((trainable, batch_stats), average)[1]
      is_updated = (state.step + 1) % self.accumulate == 0
      average = jax.tree.map(lambda after, before: jnp.where(is_updated, after, before), new, average)
      opt_state = Averaging(opt_state, average)
    return TrainState(state.step + 1, {**state.params, **trainable}, batch_stats, opt_state)

  def average(self, state: TrainState) -> dict[str, Any] | None:
    """Returns the variables that are evaluated and kept in place of the state's, on the host; None where these are.

    They are `ema`'s average, or that of optax.contrib.schedule_free.
    """
    if self.ema:
      params, average = devices_lib.unreplicate((state.params, state.opt_state.average))
      # The average began at 0, of which a share of ema^n is left after n updates.
      share = np.float32(1 - self.ema ** int(average.count))
      trainable, batch_stats = jax.tree.map(lambda leaf: leaf / share, average.ema)
      return {"params": {**params, **trainable}, "batch_stats": batch_stats}
    if found := schedule_free_states(state.opt_state):
      params, batch_stats, b1, z = devices_lib.unreplicate((state.params, state.batch_stats, found[0].b1, found[0].z))
      trainable = {name: params[name] for name in z}
      trainable = optax.contrib.schedule_free_eval_params(found[0]._replace(b1=b1, z=z), trainable)
      return {"params": {**params, **trainable}, "batch_stats": batch_stats}
    return None


def schedule_free_states(opt_state: PyTree) -> list[Any]:
  """Returns the states of optax.contrib.schedule_free in an optimizer's state."""
  return [found for _, found in optax.tree.get_all_with_path(opt_state, "ScheduleFreeState")]


@functools.lru_cache
def of_sums(transformation: optax.GradientTransformation, accumulate: int) -> optax.GradientTransformation:
  """Returns an optimizer's transformation of (gradient, weight), sums over mini-batches, in place of their quotient.

  Parameters come as (parameters, a scalar). Updates are 0 but for those of every `accumulate`th call.
  """

  def init(params):
    return transformation.init(params[0])

  def update(sums, state, params):
    gradient, weight = sums
    updates, state = transformation.update(jax.tree.map(lambda g: g / weight, gradient), state, params[0])
    return (updates, jnp.zeros_like(weight)), state

  mean = optax.GradientTransformation(init, update)
  # MultiSteps of the transformation itself would take the mean of the mini-batches' means, whatever their weights.
  return optax.MultiSteps(mean, accumulate, use_grad_mean=False).gradient_transformation() if accumulate > 1 else mean

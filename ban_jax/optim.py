"""Learning-rate schedules and optimizers from the `optim` group of a configuration."""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ban_jax.registry import Registry


def piecewise(learning_rate: float, total: int, *, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """Returns the rate multiplied by `factor` at each boundary, a share of the `total` steps (the paper's schedule)."""
  scales: dict[int, float] = collections.defaultdict(lambda: 1.0)
  for share in boundaries:
    scales[round(share * total)] *= factor  # in a very short run two of them are one step
  return optax.piecewise_constant_schedule(learning_rate, dict(scales))


def cosine(learning_rate: float, total: int) -> optax.Schedule:
  """Returns half a cosine from the rate at the first step to zero after the last of `total`."""
  return optax.cosine_decay_schedule(learning_rate, total)


def plateau(learning_rate: float, total: int, *, factor: float, threshold: float) -> optax.Schedule:
  """Returns the constant rate that `plateau_rate` changes between epochs, by `factor` and `threshold`."""
  return optax.constant_schedule(learning_rate)


SCHEDULES: Registry[Callable[..., optax.Schedule]] = Registry(
  "optim.schedule", "optim.schedule", {"steps": piecewise, "cosine": cosine, "plateau": plateau}
)


def plateau_rate(optim: Mapping[str, Any], metrics: Sequence[float]) -> float:
  """Returns the learning rate after epochs whose validation metric, the lower the better, was `metrics`.

  The rate is multiplied by `optim.factor` after each epoch that does not improve on the best one before it by at least
  `optim.threshold`.
  """
  rate, best = optim["learning_rate"], math.inf
  for metric in metrics:
    if not (metric < best and best - metric >= optim["threshold"]):
      rate *= optim["factor"]
    best = min(best, metric)
  return rate


def set_rate(opt_state: PyTree, rate: float) -> PyTree:
  """Returns a plateau optimizer's state with another learning rate, placed where the old one is."""
  old = optax.tree.get(opt_state, "learning_rate")
  # With the same sharding, because the step is compiled for it.
  return optax.tree.set(opt_state, learning_rate=jax.device_put(np.full(old.shape, rate, old.dtype), old.sharding))


def make_schedule(optim: Mapping[str, Any], total: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, for a run of `total` steps; `optim` is a checked group."""
  name = optim["schedule"]
  return SCHEDULES.find(name)(optim["learning_rate"], total, **SCHEDULES.arguments(name, optim))


def make_optimizer(optim: Mapping[str, Any], total: int) -> optax.GradientTransformation:
  """Returns SGD with coupled weight decay on all parameters; equal arguments give the same object.

  `optim` is a checked group and `total` the number of steps that the schedule spans. Weight decay is added before the
  Nesterov trace, as in the reference Wide-ResNet; `clip_norm` 0 does not clip. Under a plateau schedule the learning
  rate is a number in the optimizer's state, changed by `set_rate`.
  """
  return _make(tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(optim.items())), total)


@functools.lru_cache
def _make(group: tuple, total: int) -> optax.GradientTransformation:
  optim = dict(group)
  clip = [optax.clip_by_global_norm(optim["clip_norm"])] if optim["clip_norm"] else []
  decay = [optax.add_decayed_weights(optim["weight_decay"])] if optim["weight_decay"] else []
  sgd, rate = optax.sgd, make_schedule(optim, total)
  if optim["schedule"] == "plateau":
    sgd, rate = optax.inject_hyperparams(optax.sgd, static_args=("momentum", "nesterov")), optim["learning_rate"]
  return optax.chain(*clip, *decay, sgd(rate, momentum=optim["momentum"] or None, nesterov=optim["nesterov"]))

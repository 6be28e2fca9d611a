"""Learning-rate schedules and optimizers from the `optim` group of a configuration."""

import collections
import functools
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ban_jax.errors import ConfigError, look_up

# Parameters are float32: its smallest number above 0 with all its digits, and its largest.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def steps(peak: float, total: int, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """Returns `peak`, multiplied by `factor` at each boundary, a share of the `total` steps (the paper's schedule)."""
  scales = collections.defaultdict(lambda: 1.0)
  for share in boundaries:
    scales[round(share * total)] *= factor  # in a very short run two of them are one step
  return optax.piecewise_constant_schedule(peak, dict(scales))


def cosine(peak: float, total: int, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """Returns half a cosine from `peak` at the first step to zero after the last of `total`."""
  return optax.cosine_decay_schedule(peak, total)


def plateau(peak: float, total: int, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """Returns the constant `peak`, from which `plateau_rate` departs by epoch."""
  return optax.constant_schedule(peak)


SCHEDULES = {"steps": steps, "cosine": cosine, "plateau": plateau}


def plateau_rate(optim: Mapping[str, Any], metrics: Sequence[float]) -> float:
  """Returns the learning rate after epochs whose validation metric, the lower the better, was `metrics`.

  It is multiplied by `optim.factor` after each epoch that is not better, by `optim.threshold` at least, than the best
  one before it.
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
  # Of the same sharding, or the step would be compiled for another.
  return optax.tree.set(opt_state, learning_rate=jax.device_put(np.full(old.shape, rate, old.dtype), old.sharding))


def make_schedule(optim: Mapping[str, Any], total: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, for a run of `total` steps; may raise a ConfigError."""
  schedule = look_up(SCHEDULES, optim["schedule"], "optim.schedule")
  boundaries = tuple(optim["boundaries"])
  if not all(isinstance(share, numbers.Real) and 0 < share < 1 for share in boundaries) or list(boundaries) != sorted(
    set(boundaries)
  ):
    raise ConfigError(f"optim.boundaries must be rising shares of the run between 0 and 1, not {boundaries}")
  for name in ("learning_rate", "factor"):
    if not SMALLEST <= optim[name] <= LARGEST:
      raise ConfigError(f"optim.{name} must be above 0 and finite, not {optim[name]} (in float32)")
  return schedule(optim["learning_rate"], total, boundaries, optim["factor"])


def make_optimizer(optim: Mapping[str, Any], total: int) -> optax.GradientTransformation:
  """Returns SGD with coupled weight decay on all parameters; equal arguments give the same object.

  Under a plateau schedule the learning rate is a number in the optimizer's state, changed by `set_rate`.
  `total` is the number of steps that the schedule spans. Weight decay is added before the Nesterov trace, as in
  the reference Wide-ResNet; `clip_norm` 0 leaves the gradient as it is. Raises a ConfigError for values out of range.
  """
  for name, below in (("momentum", 1.0), ("weight_decay", math.inf), ("clip_norm", math.inf), ("threshold", math.inf)):
    if not 0 <= optim[name] < below:
      raise ConfigError(f"optim.{name} must be at least 0 and below {below}, not {optim[name]}")
  for name in ("weight_decay", "clip_norm"):
    if optim[name] and not SMALLEST <= optim[name] <= LARGEST:
      raise ConfigError(f"optim.{name} must be 0, or above 0 and finite, not {optim[name]} (in float32)")
  make_schedule(optim, total)
  return _make(tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(optim.items())), total)


@functools.lru_cache
def _make(options: tuple, total: int) -> optax.GradientTransformation:
  optim = dict(options)
  clip = [optax.clip_by_global_norm(optim["clip_norm"])] if optim["clip_norm"] else []
  decay = [optax.add_decayed_weights(optim["weight_decay"])] if optim["weight_decay"] else []
  sgd, rate = optax.sgd, make_schedule(optim, total)
  if optim["schedule"] == "plateau":
    sgd, rate = optax.inject_hyperparams(optax.sgd, static_args=("momentum", "nesterov")), optim["learning_rate"]
  return optax.chain(*clip, *decay, sgd(rate, momentum=optim["momentum"] or None, nesterov=optim["nesterov"]))

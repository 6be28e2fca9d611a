"""Learning-rate schedules and optimizers from the `optim` group of a configuration."""

import collections
import functools
import math
import numbers
from collections.abc import Mapping
from typing import Any

import optax

from ban_jax.errors import ConfigError, look_up


def steps(peak: float, total: int, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """Returns `peak`, multiplied by `factor` at each boundary, a share of the `total` steps (the paper's schedule)."""
  scales = collections.defaultdict(lambda: 1.0)
  for share in boundaries:
    scales[round(share * total)] *= factor  # in a very short run two of them are one step
  return optax.piecewise_constant_schedule(peak, dict(scales))


def cosine(peak: float, total: int, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """Returns half a cosine from `peak` at the first step to zero after the last of `total`."""
  return optax.cosine_decay_schedule(peak, total)


SCHEDULES = {"steps": steps, "cosine": cosine}


def make_schedule(optim: Mapping[str, Any], total: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, for a run of `total` steps; may raise a ConfigError."""
  schedule = look_up(SCHEDULES, optim["schedule"], "optim.schedule")
  boundaries = tuple(optim["boundaries"])
  if not all(isinstance(share, numbers.Real) and 0 < share < 1 for share in boundaries) or list(boundaries) != sorted(
    set(boundaries)
  ):
    raise ConfigError(f"optim.boundaries must be rising shares of the run between 0 and 1, not {boundaries}")
  for name in ("learning_rate", "factor"):
    if not 0 < optim[name] < math.inf:
      raise ConfigError(f"optim.{name} must be above 0 and finite, not {optim[name]}")
  return schedule(optim["learning_rate"], total, boundaries, optim["factor"])


def make_optimizer(optim: Mapping[str, Any], total: int) -> optax.GradientTransformation:
  """Returns SGD with coupled weight decay on all parameters; equal arguments give the same object.

  `total` is the number of steps that the schedule spans. Weight decay is added before the Nesterov trace, as in
  the reference Wide-ResNet; `clip_norm` 0 leaves the gradient as it is. Raises a ConfigError for values out of range.
  """
  for name, below in (("momentum", 1.0), ("weight_decay", float("inf")), ("clip_norm", float("inf"))):
    if not 0 <= optim[name] < below:
      raise ConfigError(f"optim.{name} must be at least 0 and below {below}, not {optim[name]}")
  make_schedule(optim, total)
  return _make(tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(optim.items())), total)


@functools.lru_cache
def _make(options: tuple, total: int) -> optax.GradientTransformation:
  optim = dict(options)
  clip = [optax.clip_by_global_norm(optim["clip_norm"])] if optim["clip_norm"] else []
  return optax.chain(
    *clip,
    optax.add_decayed_weights(optim["weight_decay"]),
    optax.sgd(make_schedule(optim, total), momentum=optim["momentum"], nesterov=optim["nesterov"]),
  )

"""Optimizers and learning-rate schedules from the `optim` group of a configuration, or from the caller's own optax."""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ban_jax.errors import ConfigError, check_name
from ban_jax.registry import Registry

# Which parameters decay, as optax takes it: a function of the parameters' tree; None for all.
Mask = Callable[[PyTree], PyTree] | None


class Optimizer(NamedTuple):
  """How a generation's parameters are updated; equal configurations give the same object, so that nothing recompiles.

  `rate(step, metrics)` is the learning rate of a step, from 0, given the validation metric of each epoch before it;
  None if it is not known. `between_epochs(state, metrics)` returns the optimizer's state with the rate that the metrics
  so far ask for; None for a schedule that does not look at them.
  """

  transformation: optax.GradientTransformation
  rate: Callable[[int, Sequence[float]], float] | None = None
  between_epochs: Callable[[PyTree, Sequence[float]], PyTree] | None = None
  name: str = ""


def from_optax(
  transformation: optax.GradientTransformation, *, name: str, schedule: optax.Schedule | None = None
) -> Optimizer:
  """Returns an optax transformation as the argument `optimizer` of `train_generation`, `run` and `setup`.

  It takes the place of the configuration's `optim` group. Make it once and give the same object to all generations:
  another one, even if made alike, compiles anew.

  Args:
    transformation: an optax.GradientTransformation.
    name: identifies it in run directories, together with what it computes: one with changed settings does not resume
      the run of another.
    schedule: a function of the step, only recorded, as the history's learning rate. It must be the one that the
      transformation was made with.

  Returns:
    An Optimizer.

  Raises:
    ConfigError: for something else than an optax transformation.

  Examples:
    >>> rate = optax.cosine_decay_schedule(1e-3, 1000)
    >>> ban_jax.from_optax(optax.adabelief(rate), name="adabelief", schedule=rate).name
    'adabelief'
  """
  if not isinstance(transformation, optax.GradientTransformation):
    kind = type(transformation).__name__
    raise ConfigError(f"from_optax takes an optax.GradientTransformation, as optax.adamw(1e-3), not {kind}")
  check_name(name, "names the optimizer in run directories")
  if schedule is not None and not callable(schedule):
    raise ConfigError(f"schedule must be a function of the step, or None, not {type(schedule).__name__}")
  rate = None if schedule is None else _without_metrics(schedule)
  return Optimizer(transformation, rate, name=name)


def _without_metrics(schedule: optax.Schedule) -> Callable[[int, Sequence[float]], float]:
  return lambda step, metrics: float(schedule(step))


# --- Schedules --------------------------------------------------------------------------------------------------------


class ScheduleKind(NamedTuple):
  """A learning-rate schedule, an entry of SCHEDULES.

  `make(learning_rate, total, **options)` returns the rate as a function of the step, for `total` steps. If there is an
  `adapt(learning_rate, metrics, **options)`, it returns the rate after epochs with these validation metrics, the lower
  the better, and the options are those of both.
  """

  make: Callable[..., optax.Schedule]
  adapt: Callable[..., float] | None = None


def constant(learning_rate: float, total: int) -> optax.Schedule:
  """The same rate from the first step to the last."""
  return optax.constant_schedule(learning_rate)


def piecewise(learning_rate: float, total: int, *, boundaries: tuple[float, ...], factor: float) -> optax.Schedule:
  """The rate is multiplied by `factor` at each boundary, a share of the steps (the paper's schedule for images)."""
  scales: dict[int, float] = collections.defaultdict(lambda: 1.0)
  for share in boundaries:
    scales[round(share * total)] *= factor  # in a very short run two of them are one step
  return optax.piecewise_constant_schedule(learning_rate, dict(scales))


def cosine(learning_rate: float, total: int) -> optax.Schedule:
  """Half a cosine from the rate at the first step to zero after the last."""
  return optax.cosine_decay_schedule(learning_rate, total)


def plateau(learning_rate: float, total: int, *, factor: float, threshold: float) -> optax.Schedule:
  """The rate is multiplied by `factor` after each epoch that improves on the best one by less than `threshold`."""
  return optax.constant_schedule(learning_rate)


def plateau_rate(learning_rate: float, metrics: Sequence[float], *, factor: float, threshold: float) -> float:
  """Returns the rate of `plateau` after epochs whose validation metric, the lower the better, was `metrics`."""
  rate, best = learning_rate, math.inf
  for metric in metrics:
    if not (metric < best and best - metric >= threshold):
      rate *= factor
    best = min(best, metric)
  return rate


SCHEDULES = Registry(
  "optim.schedule",
  "optim.schedule",
  {
    "constant": ScheduleKind(constant),
    "cosine": ScheduleKind(cosine),
    "plateau": ScheduleKind(plateau, adapt=plateau_rate),
    "steps": ScheduleKind(piecewise),
  },
)


def make_schedule(optim: Mapping[str, Any], total: int) -> optax.Schedule:
  """Returns the learning rate as a function of the step, for a run of `total` steps; `optim` is a checked group.

  In the first `optim.warmup` of the steps it rises linearly to the peak; the schedule spans the others.
  """
  name, warmup = optim["schedule"], _warmup_steps(optim, total)
  rest = SCHEDULES.find(name).make(optim["learning_rate"], total - warmup, **SCHEDULES.arguments(name, optim))
  return optax.join_schedules([_rise(optim["learning_rate"], warmup), rest], [warmup]) if warmup else rest


def _warmup_steps(optim: Mapping[str, Any], total: int) -> int:
  return round(optim["warmup"] * total)


def _rise(peak: float, steps: int) -> optax.Schedule:
  return optax.linear_schedule(peak / (steps + 1), peak, steps)  # not from 0: the first step is to move, too


# --- Optimizers -------------------------------------------------------------------------------------------------------

# An optimizer, an entry of OPTIMIZERS, takes the learning rate (a number or a schedule) and the Mask of what decays,
# and its options. It returns the transformations to be chained, of which the last one takes the rate.
Transformations = tuple[optax.GradientTransformation, ...]


def sgd(
  rate: optax.ScalarOrSchedule, mask: Mask, *, momentum: float, nesterov: bool, weight_decay: float
) -> Transformations:
  """SGD with momentum and coupled weight decay, added before the momentum, as in the reference Wide-ResNet."""
  decay = (optax.add_decayed_weights(weight_decay, mask),) if weight_decay else ()
  return *decay, optax.sgd(rate, momentum=momentum or None, nesterov=nesterov)


def adamw(rate: optax.ScalarOrSchedule, mask: Mask, *, b1: float, b2: float, weight_decay: float) -> Transformations:
  """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
  return (optax.adamw(rate, b1, b2, weight_decay=weight_decay, mask=mask),)


def lion(rate: optax.ScalarOrSchedule, mask: Mask, *, b1: float, b2: float, weight_decay: float) -> Transformations:
  """The sign of an interpolated momentum, with decoupled weight decay (Chen et al. 2023)."""
  return (optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=mask),)


def lamb(rate: optax.ScalarOrSchedule, mask: Mask, *, b1: float, b2: float, weight_decay: float) -> Transformations:
  """Adam with a trust ratio per array, for large mini-batches (You et al. 2020)."""
  return (optax.lamb(rate, b1, b2, weight_decay=weight_decay, mask=mask),)


def muon(
  rate: optax.ScalarOrSchedule,
  mask: Mask,
  *,
  momentum: float,
  nesterov: bool,
  b1: float,
  b2: float,
  weight_decay: float,
) -> Transformations:
  """Orthogonalised momentum for kernels, AdamW for all else, with one rate for both (Liu et al. 2025)."""
  transformation = optax.contrib.muon(
    rate,
    beta=momentum,
    nesterov=nesterov,
    weight_decay=weight_decay,
    weight_decay_mask=mask,
    adam_b1=b1,
    adam_b2=b2,
    adam_weight_decay=0.0 if mask else weight_decay,  # what a mask leaves out is what Adam updates
    muon_weight_dimension_numbers=_matrices,
    consistent_rms=0.2,  # AdamW's usual size of an update
  )
  return (transformation,)


def schedule_free(
  rate: optax.ScalarOrSchedule, mask: Mask, *, b1: float, b2: float, weight_decay: float
) -> Transformations:
  """AdamW with an average of the weights in place of a falling rate and of momentum (Defazio et al. 2024)."""
  if not b1:
    raise ConfigError("optim.b1=0.0: expected a share above 0, because schedule_free interpolates by it")
  base = optax.adamw(rate, 0.0, b2, weight_decay=weight_decay, mask=mask)
  return (optax.contrib.schedule_free(base, rate, b1),)


_ENTRIES: dict[str, Callable[..., Transformations]] = {
  "adamw": adamw,
  "lamb": lamb,
  "lion": lion,
  "muon": muon,
  "schedule_free": schedule_free,
  "sgd": sgd,
}
OPTIMIZERS: Registry[Callable[..., Transformations]] = Registry("optim.name", "optim.name", _ENTRIES)


def kernels(params: PyTree) -> PyTree:
  """Returns, for each parameter, whether it is a kernel: no bias, scale of a normalisation, or embedding."""
  return jax.tree_util.tree_map_with_path(_is_kernel, params)


# Parameters of several axes that are no kernels, by the last name of their path.
NO_KERNELS = ("bias", "scale", "positions", "token")


def _is_kernel(path: tuple[Any, ...], parameter: Any) -> bool:
  name = str(getattr(path[-1], "key", path[-1]))
  return parameter.ndim > 1 and name not in NO_KERNELS and "embed" not in name


def _matrices(params: PyTree) -> PyTree:
  """Returns how Muon reads each kernel as a matrix, all axes but the last as its rows; None for what Adam updates."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1) if _is_kernel(path, x) else None
    ),
    params,
  )


# What `optim.decay` names.
DECAYS: Mapping[str, Mask] = {"all": None, "kernels": kernels}


def make(optim: Mapping[str, Any], total: int) -> Optimizer:
  """Returns the Optimizer of a checked `optim` group, for `total` steps; equal arguments give the same object.

  Gradients are clipped first; `clip_norm` 0 does not clip. Under a schedule that looks at validation metrics, the
  learning rate is a number in the optimizer's state, changed by `set_rate`.
  """
  return _make(tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in sorted(optim.items())), total)


@functools.lru_cache
def _make(group: tuple, total: int) -> Optimizer:
  optim = dict(group)
  name, clip = optim["name"], [optax.clip_by_global_norm(optim["clip_norm"])] if optim["clip_norm"] else []
  make = functools.partial(OPTIMIZERS.find(name), mask=DECAYS[optim["decay"]], **OPTIMIZERS.arguments(name, optim))
  schedule, adapt = make_schedule(optim, total), SCHEDULES.find(optim["schedule"]).adapt
  if adapt is None:
    return Optimizer(optax.chain(*clip, *make(schedule)), _without_metrics(schedule), name=name)
  peak, warmup = optim["learning_rate"], _warmup_steps(optim, total)
  rate_after = functools.partial(adapt, peak, **SCHEDULES.arguments(optim["schedule"], optim))
  before = make(peak)[:-1]
  injected = optax.inject_hyperparams(lambda learning_rate: make(learning_rate)[-1])(learning_rate=peak)
  rise = optax.join_schedules([_rise(1.0, warmup), optax.constant_schedule(1.0)], [warmup])
  warming = [optax.scale_by_schedule(rise)] if warmup else []

  def rate(step: int, metrics: Sequence[float]) -> float:
    return rate_after(metrics) * (float(rise(step)) if warmup else 1.0)

  def between_epochs(state: PyTree, metrics: Sequence[float]) -> PyTree:
    return set_rate(state, rate_after(metrics))

  return Optimizer(optax.chain(*clip, *before, injected, *warming), rate, between_epochs, name)


def set_rate(opt_state: PyTree, rate: float) -> PyTree:
  """Returns the state of an optimizer whose rate is a number in it, with another rate, placed where the old one is."""
  old = optax.tree.get(opt_state, "learning_rate")
  # With the same sharding, because the step is compiled for it.
  return optax.tree.set(opt_state, learning_rate=jax.device_put(np.full(old.shape, rate, old.dtype), old.sharding))

"""The losses of the paper (Furlanello et al. 2018, Eq. 1-11), and two controls that are not the paper's.

A new one is one function and one entry in LOSSES.

A loss returns `(values, weights)`, one per example or token; only step.py normalises, by the sum of the weights over
all devices. So the batch-wide weights of CWTM are right on any number of devices.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ban_jax.errors import ConfigError, look_up

# Losses are computed in float32: its smallest number above 0 with all its digits, and its largest.
SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

Logits = Float[Array, "B *T n"]
Labels = Int[Array, "B *T"]
PerExample = Float[Array, "B *T"]
ValuesAndWeights = tuple[PerExample, PerExample]


class Loss(NamedTuple):
  """A loss as a pure function.

  `apply(logits, labels, teacher_logits, *, key, positions)` returns `(values, weights)`, shaped as the labels. Where
  `needs_teacher` is false, `teacher_logits` may be None. `positions` [B] are the examples' places in the global
  mini-batch, by which random losses draw.
  """

  name: str
  needs_teacher: bool
  apply: Callable[..., ValuesAndWeights]


def cross_entropy(logits: Logits, targets: Logits) -> PerExample:
  """Returns the cross-entropy, in nats, of softmax(logits) with the probabilities `targets`."""
  return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def label_cross_entropy(logits: Logits, labels: Labels) -> PerExample:
  """Returns the cross-entropy, in nats, of softmax(logits) with the one-hot labels (Eq. 1)."""
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def distillation(logits: Logits, teacher_logits: Logits, temperature: float) -> PerExample:
  """Returns the teacher's cross-entropy (Eq. 2, 3), softened and rescaled by T^2 as in Hinton et al. 2015.

  At T = 1 its gradient in the logits is softmax(logits) - softmax(teacher_logits) (Eq. 5).
  """
  return temperature**2 * cross_entropy(logits / temperature, jax.nn.softmax(teacher_logits / temperature))


def label(logits, labels, teacher_logits, *, key, positions) -> ValuesAndWeights:
  """Cross-entropy with the label: the teacher of generation 0, and baselines (Eq. 1, 6)."""
  values = label_cross_entropy(logits, labels)
  return values, jnp.ones_like(values)


def ban(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Cross-entropy with the teacher's probabilities alone (Eq. 2, 3)."""
  values = distillation(logits, teacher_logits, temperature)
  return values, jnp.ones_like(values)


def ban_label(
  logits, labels, teacher_logits, *, key, positions, temperature: float, label_weight: float, teacher_weight: float
) -> ValuesAndWeights:
  """BAN+L: the weighted sum of the cross-entropies with the label and with the teacher's probabilities."""
  values = label_weight * label_cross_entropy(logits, labels)
  values += teacher_weight * distillation(logits, teacher_logits, temperature)
  return values, jnp.ones_like(values)


def cwtm(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Confidence weighted by teacher max: label cross-entropy weighted by the teacher's largest probability (Eq. 10)."""
  return label_cross_entropy(logits, labels), jnp.max(jax.nn.softmax(teacher_logits / temperature), axis=-1)


def dkpp(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Dark knowledge with permuted predictions: BAN, the teacher's outputs but the largest being shuffled (Eq. 11)."""
  return ban(
    logits, labels, permute_dark(teacher_logits, key, positions), key=None, positions=None, temperature=temperature
  )


def permute_dark(teacher_logits: Logits, key: PRNGKeyArray, positions: Int[Array, " B"]) -> Logits:
  """Permutes every row's logits other than its largest at random, each row on its own; the largest stays in place."""

  def permuted(row, key):  # [n]
    # The classes other than the argmax, in cyclic order behind it.
    dark = (jnp.argmax(row) + 1 + jnp.arange(row.size - 1)) % row.size
    return row.at[dark].set(row[jax.random.permutation(key, dark)])

  def example(rows, position):  # [*T, n]
    flat = rows.reshape(-1, rows.shape[-1])
    keys = jax.random.split(jax.random.fold_in(key, position), len(flat))
    return jax.vmap(permuted)(flat, keys).reshape(rows.shape)

  return jax.vmap(example)(teacher_logits, positions)


def label_smoothing(logits, labels, teacher_logits, *, key, positions, smoothing: float) -> ValuesAndWeights:
  """Cross-entropy with (1 - smoothing) label + smoothing / n: a control without a teacher (Szegedy et al. 2016)."""
  values = _smoothed(logits, labels, jnp.asarray(smoothing, jnp.float32))
  return values, jnp.ones_like(values)


def entropy_matched_smoothing(
  logits, labels, teacher_logits, *, key, positions, temperature: float
) -> ValuesAndWeights:
  """Label smoothing with, example by example, the teacher's entropy: its softness without its dark knowledge."""
  log_teacher = jax.nn.log_softmax(teacher_logits / temperature)
  entropy = -jnp.sum(jnp.exp(log_teacher) * log_teacher, axis=-1)
  values = _smoothed(logits, labels, smoothing_of_entropy(entropy, logits.shape[-1]))
  return values, jnp.ones_like(values)


def _smoothed(logits: Logits, labels: Labels, smoothing: Float[Array, "..."]) -> PerExample:
  """Returns the cross-entropy, in nats, with labels of which a share `smoothing` is spread over all classes."""
  uniform = -jax.nn.log_softmax(logits).mean(axis=-1)
  return (1 - smoothing) * label_cross_entropy(logits, labels) + smoothing * uniform


def smoothing_of_entropy(entropy: PerExample, num_classes: int) -> PerExample:
  """Returns the smoothing, in [0, 1], of the smoothed labels that have an entropy, in nats, from 0 to log(n)."""

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    rest = middle / num_classes  # of every class but the label's, which has 1 - (n - 1) * rest
    own = 1 - (num_classes - 1) * rest
    above = -jax.scipy.special.xlogy(own, own) - (num_classes - 1) * jax.scipy.special.xlogy(rest, rest) > entropy
    return jnp.where(above, low, middle), jnp.where(above, middle, high)

  # The entropy rises with the smoothing, and halving its range 24 times is as exact as float32.
  low, high = jax.lax.fori_loop(0, 24, halve, (jnp.zeros_like(entropy), jnp.ones_like(entropy)))
  return (low + high) / 2


LOSSES = {
  "label": label,
  "ban": ban,
  "ban_label": ban_label,
  "cwtm": cwtm,
  "dkpp": dkpp,
  "label_smoothing": label_smoothing,
  "entropy_matched_smoothing": entropy_matched_smoothing,
}
# Those that hear no teacher.
_FROM_LABELS = (label, label_smoothing)


def make_loss(loss: Mapping[str, Any]) -> Loss:
  """Returns the Loss that a `loss` group of a configuration names; equal arguments give the same object.

  Of the group's options (temperature, label_weight, teacher_weight, smoothing) a loss takes those that it knows. Raises
  a ConfigError for an unknown name and for values out of range.
  """
  options = dict(loss.items())
  function = look_up(LOSSES, options.pop("name"), "loss")
  if not 0 < options["temperature"] < math.inf:
    raise ConfigError(f"loss.temperature must be above 0 and finite, not {options['temperature']}")
  if not SMALLEST <= options["temperature"] * options["temperature"] <= LARGEST:
    raise ConfigError(f"loss.temperature={options['temperature']}: its square must be a number above 0 in float32")
  for name in ("label_weight", "teacher_weight"):
    if not 0 <= options[name] <= LARGEST:
      raise ConfigError(f"loss.{name} must be at least 0 and finite, not {options[name]} (in float32)")
  if not options["label_weight"] + options["teacher_weight"] >= SMALLEST:
    raise ConfigError("loss.label_weight and loss.teacher_weight cannot both be 0")
  if not 0 <= options["smoothing"] <= 1:
    raise ConfigError(f"loss.smoothing must be from 0 to 1, not {options['smoothing']}")
  accepted = inspect.signature(function).parameters
  return _make(function, tuple((name, value) for name, value in sorted(options.items()) if name in accepted))


@functools.lru_cache
def _make(function, options: tuple) -> Loss:
  return Loss(function.__name__, function not in _FROM_LABELS, functools.partial(function, **dict(options)))

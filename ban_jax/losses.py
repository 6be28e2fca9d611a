"""The losses of the paper (Furlanello et al. 2018, Eq. 1-11), and others: two controls, and four of today.

A loss is one function and one entry in LOSSES. step.py divides by the sum of its weights over all devices, so the
batch-wide weights of CWTM are right on any number of devices.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from ban_jax.registry import Registry, options_of

# The keyword-only arguments of a loss that the training step gives.
GIVEN = ("key", "positions", "progress")

Logits = Float[Array, "B *T n"]
Labels = Int[Array, "B *T"] | Float[Array, "B n"]  # a class each, or the share of each class (of mixed images)
PerExample = Float[Array, "B *T"]
ValuesAndWeights = tuple[PerExample, PerExample]


class Loss(NamedTuple):
  """A loss as a pure function, an entry of LOSSES.

  `apply(logits, labels, teacher_logits, *, key, positions, **options)` returns `(values, weights)`, float32 [B] or
  [B, T] as the labels, in nats. Both logits are float32 [B, n] or [B, T, n], the teacher's None where there is none;
  random losses take a key and the examples' places in the global mini-batch, int32 [B]. `options` are those of the
  configuration's `loss` group. `labels` are classes, or of mixed images float32 [B, n], the share of each class, which
  `label_cross_entropy` takes as well. One that `changes` over the run takes `progress` too: 0 at the first step, 1 at
  the last.
  """

  apply: Callable[..., ValuesAndWeights]
  needs_teacher: bool = True
  name: str = ""  # its key in LOSSES, filled in by `make_loss`
  changes: bool = False
  steps: int = 0  # of the run, filled in for one that changes

  def at(self, step: Int[Array, ""]) -> Callable[..., ValuesAndWeights]:
    """Returns `apply` as it is at a step."""
    return functools.partial(self.apply, progress=step / max(self.steps - 1, 1)) if self.changes else self.apply

  @property
  def options(self) -> tuple[str, ...]:
    """The options of the configuration's `loss` group that it takes."""
    return options_of(self, GIVEN)


def cross_entropy(logits: Logits, targets: Logits) -> PerExample:
  """Returns the cross-entropy, in nats, of softmax(logits) with the probabilities `targets`."""
  return jax.lax.platform_dependent(logits, targets, cpu=optax.softmax_cross_entropy, default=_cross_entropy_in_sums)


def label_cross_entropy(logits: Logits, labels: Labels) -> PerExample:
  """Returns the cross-entropy, in nats, of softmax(logits) with the labels (Eq. 1)."""
  if labels.ndim == logits.ndim:
    return cross_entropy(logits, labels)

  # optax.softmax_cross_entropy_with_integer_labels differs from this in the last bit, and so would every earlier run.
  def on_cpu(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]

  return jax.lax.platform_dependent(logits, labels, cpu=on_cpu, default=_label_cross_entropy_in_sums)


# On accelerators, where passes over the logits of 10,000 words cost as much as products, the same as sums alone:
# log(softmax) is kept for nothing, and the gradient adds up neither targets nor one-hot labels, which are 1 together.


def _cross_entropy_in_sums(logits: Logits, targets: Logits) -> PerExample:
  shifted = logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  return jnp.log(jnp.exp(shifted).sum(-1)) - (targets * shifted).sum(-1)


def _label_cross_entropy_in_sums(logits: Logits, labels: Labels) -> PerExample:
  largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  own = jnp.take_along_axis(logits, labels[..., None], axis=-1)
  return jnp.log(jnp.exp(logits - largest).sum(-1)) - (own - largest)[..., 0]


def distillation(logits: Logits, teacher_logits: Logits, temperature: float) -> PerExample:
  """Returns the teacher's cross-entropy (Eq. 2, 3), softened and rescaled by T^2 as in Hinton et al. 2015.

  At T = 1 its gradient in the logits is softmax(logits) - softmax(teacher_logits) (Eq. 5).
  """
  return temperature**2 * cross_entropy(logits / temperature, jax.nn.softmax(teacher_logits / temperature))


def label(logits, labels, teacher_logits, *, key, positions) -> ValuesAndWeights:
  """Cross-entropy with the label: the teacher of generation 0, and baselines (Eq. 1, 6).

  Examples:
    >>> values, weights = losses.label(logits, labels, teacher, key=key, positions=positions)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.6931 1.0000'
  """
  values = label_cross_entropy(logits, labels)
  return values, jnp.ones_like(values)


def ban(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Cross-entropy with the teacher's probabilities alone (Eq. 2, 3), softened by `temperature`.

  Examples:
    >>> values, weights = losses.ban(logits, labels, teacher, key=key, positions=positions, temperature=1.0)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.9380 1.0000'
  """
  values = distillation(logits, teacher_logits, temperature)
  return values, jnp.ones_like(values)


def ban_label(
  logits, labels, teacher_logits, *, key, positions, temperature: float, label_weight: float, teacher_weight: float
) -> ValuesAndWeights:
  """BAN+L: the weighted sum of the cross-entropies with the label and with the teacher's probabilities.

  Examples:
    >>> options = dict(temperature=1.0, label_weight=1.0, teacher_weight=1.0)
    >>> values, weights = losses.ban_label(logits, labels, teacher, key=key, positions=positions, **options)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '1.6312 1.0000'
  """
  values = label_weight * label_cross_entropy(logits, labels)
  values += teacher_weight * distillation(logits, teacher_logits, temperature)
  return values, jnp.ones_like(values)


def annealed(
  logits,
  labels,
  teacher_logits,
  *,
  key,
  positions,
  progress=0.0,
  temperature: float,
  label_weight: float,
  teacher_weight: float,
  label_weight_end: float,
  teacher_weight_end: float,
) -> ValuesAndWeights:
  """BAN+L with weights that change linearly, from the first step to the last (as in Annealing-KD and PS-KD).

  Examples:
    >>> options = dict(temperature=1.0, label_weight=0.0, teacher_weight=1.0, label_weight_end=1.0)
    >>> values, _ = losses.annealed(
    ...   logits, labels, teacher, key=key, positions=positions, progress=1.0, teacher_weight_end=0.0, **options
    ... )
    >>> bool((values == losses.label_cross_entropy(logits, labels)).all())
    True
  """
  of_label = label_weight + (label_weight_end - label_weight) * progress
  of_teacher = teacher_weight + (teacher_weight_end - teacher_weight) * progress
  values = of_label * label_cross_entropy(logits, labels)
  values += of_teacher * distillation(logits, teacher_logits, temperature)
  return values, jnp.ones_like(values)


def cwtm(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Confidence weighted by teacher max: label cross-entropy weighted by the teacher's largest probability (Eq. 10).

  Examples:
    >>> values, weights = losses.cwtm(logits, labels, teacher, key=key, positions=positions, temperature=1.0)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.6931 0.6000'
  """
  return label_cross_entropy(logits, labels), jnp.max(jax.nn.softmax(teacher_logits / temperature), axis=-1)


def dkpp(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Dark knowledge with permuted predictions: BAN, the teacher's outputs but the largest being shuffled (Eq. 11).

  Examples:
    >>> values, weights = losses.dkpp(logits, labels, teacher, key=key, positions=positions, temperature=1.0)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.9380 1.0000'
  """
  values = distillation(logits, permute_dark(teacher_logits, key, positions), temperature)
  return values, jnp.ones_like(values)


def permute_dark(teacher_logits: Logits, key: PRNGKeyArray, positions: Int[Array, " B"]) -> Logits:
  """Permutes every row's logits other than its largest at random, each row on its own; the largest stays in place."""

  def permuted(row, key):  # [n]
    # The classes other than the argmax, in cyclic order after it.
    dark = (jnp.argmax(row) + 1 + jnp.arange(row.size - 1)) % row.size
    return row.at[dark].set(row[jax.random.permutation(key, dark)])

  def example(rows, position):  # [*T, n]
    flat = rows.reshape(-1, rows.shape[-1])
    keys = jax.random.split(jax.random.fold_in(key, position), len(flat))
    return jax.vmap(permuted)(flat, keys).reshape(rows.shape)

  return jax.vmap(example)(teacher_logits, positions)


def reverse_kl(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """KL(student || teacher), which shuns what the teacher finds unlikely.

  Reference: Gu et al. 2024, arXiv:2306.08543.

  Examples:
    >>> values, weights = losses.reverse_kl(logits, labels, teacher, key=key, positions=positions, temperature=1.0)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.0475 1.0000'
  """
  own, theirs = (jax.nn.log_softmax(each / temperature) for each in (logits, teacher_logits))
  values = temperature**2 * _divergence(own, theirs)
  return values, jnp.ones_like(values)


def jensen_shannon(logits, labels, teacher_logits, *, key, positions, temperature: float) -> ValuesAndWeights:
  """Jensen-Shannon divergence: the mean divergence of student and teacher from their mean, at most log 2.

  Reference: Lin 1991, doi:10.1109/18.61115.

  Examples:
    >>> options = dict(temperature=1.0)
    >>> values, weights = losses.jensen_shannon(logits, labels, teacher, key=key, positions=positions, **options)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.0108 1.0000'
  """
  own, theirs = (jax.nn.log_softmax(each / temperature) for each in (logits, teacher_logits))
  mean = jnp.logaddexp(own, theirs) - jnp.log(2)
  values = temperature**2 * (_divergence(own, mean) + _divergence(theirs, mean)) / 2
  return values, jnp.ones_like(values)


def _divergence(log_probabilities: Logits, others: Logits) -> PerExample:
  """Returns KL(p || q), in nats, of the logarithms of p and of q, the `others`."""
  return jnp.sum(jnp.exp(log_probabilities) * (log_probabilities - others), axis=-1)


def hard(logits, labels, teacher_logits, *, key, positions) -> ValuesAndWeights:
  """Cross-entropy with the teacher's most probable class: what it says, without how sure it is.

  Examples:
    >>> values, weights = losses.hard(logits, labels, teacher, key=key, positions=positions)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.6931 1.0000'
  """
  values = label_cross_entropy(logits, jnp.argmax(teacher_logits, axis=-1))
  return values, jnp.ones_like(values)


def top_k(logits, labels, teacher_logits, *, key, positions, k: int) -> ValuesAndWeights:
  """Cross-entropy with the teacher's `k` most probable classes, each as probable.

  Reference: Jeong & Chung 2025, arXiv:2402.10482, with k = 2.

  Examples:
    >>> values, weights = losses.top_k(logits, labels, teacher, key=key, positions=positions, k=2)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.9486 1.0000'
  """
  _, classes = jax.lax.top_k(teacher_logits, k)  # [B, *T, k]
  values = -jnp.take_along_axis(jax.nn.log_softmax(logits), classes, axis=-1).mean(axis=-1)
  return values, jnp.ones_like(values)


def label_smoothing(logits, labels, teacher_logits, *, key, positions, smoothing: float) -> ValuesAndWeights:
  """Cross-entropy with (1 - smoothing) label + smoothing / n: a control without a teacher.

  Reference: Szegedy et al. 2016, arXiv:1512.00567.

  Examples:
    >>> values, weights = losses.label_smoothing(logits, labels, teacher, key=key, positions=positions, smoothing=0.1)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.7407 1.0000'
  """
  values = _smoothed(logits, labels, jnp.asarray(smoothing, jnp.float32))
  return values, jnp.ones_like(values)


def entropy_matched_smoothing(
  logits, labels, teacher_logits, *, key, positions, temperature: float
) -> ValuesAndWeights:
  """Label smoothing with, example by example, the teacher's entropy: its softness without its dark knowledge.

  Examples:
    >>> options = dict(key=key, positions=positions, temperature=1.0)
    >>> values, weights = losses.entropy_matched_smoothing(logits, labels, teacher, **options)
    >>> f"{values[0]:.4f} {weights[0]:.4f}"
    '0.9472 1.0000'
  """
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

  # The entropy rises with the smoothing, so bisection finds it; 24 halvings are as exact as float32.
  low, high = jax.lax.fori_loop(0, 24, halve, (jnp.zeros_like(entropy), jnp.ones_like(entropy)))
  return (low + high) / 2


_ENTRIES = {
  "label": Loss(label, needs_teacher=False),
  "ban": Loss(ban),
  "ban_label": Loss(ban_label),
  "annealed": Loss(annealed, changes=True),
  "cwtm": Loss(cwtm),
  "dkpp": Loss(dkpp),
  "reverse_kl": Loss(reverse_kl),
  "jensen_shannon": Loss(jensen_shannon),
  "hard": Loss(hard),
  "top_k": Loss(top_k),
  "label_smoothing": Loss(label_smoothing, needs_teacher=False),
  "entropy_matched_smoothing": Loss(entropy_matched_smoothing),
}
LOSSES = Registry("loss.name", "loss", _ENTRIES, given=GIVEN)


def class_weights(
  given: str | Sequence[int | float], labels: Int[np.ndarray, " N"], num_classes: int
) -> tuple[float, ...]:
  """Returns the weight of each class that `loss.class_weights` asks for, () for none.

  "balanced" weighs every class alike, whatever the number n_c of its examples among the N training `labels`: by
  N / (num_classes * n_c). A class without any has weight 0.
  """
  if given != "balanced":
    return tuple(map(float, given))
  counts = np.bincount(labels, minlength=num_classes)
  return tuple(float(len(labels) / (num_classes * count)) if count else 0.0 for count in counts)


@functools.lru_cache
def weighted(loss: Loss, weights: tuple[float, ...]) -> Loss:
  """Returns a loss that weighs each example by its label's class(es), besides; equal arguments give the same object."""

  @functools.wraps(loss.apply)
  def apply(logits, labels, *arguments, **options) -> ValuesAndWeights:
    values, own = loss.apply(logits, labels, *arguments, **options)
    table = jnp.asarray(weights, own.dtype)
    return values, own * (labels @ table if labels.ndim > own.ndim else table[labels])

  return loss._replace(apply=apply)


def make_loss(group: Mapping[str, Any] | ConfigDict) -> Loss:
  """Returns the Loss that a checked `loss` group names, its options filled in; equal arguments give the same object.

  Raises a ConfigError for an unknown name.
  """
  name = group["name"]
  return _make(LOSSES.find(name), name, tuple(LOSSES.arguments(name, group).items()))


@functools.lru_cache
def _make(loss: Loss, name: str, options: tuple[tuple[str, Any], ...]) -> Loss:
  return loss._replace(name=name, apply=functools.partial(loss.apply, **dict(options)))

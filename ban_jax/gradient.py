"""Decomposition of the distillation gradient into its correct-class and its dark-knowledge term (Eq. 7-9).

The gradient is that of the plain BAN loss between a student and its teacher, whatever loss trains the student.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ban_jax.losses import Labels, Logits, PerExample

SUMS = ("correct", "correct_squared", "dark_squared", "teacher_confidence", "teacher_entropy")


class GradientSplit(NamedTuple):
  """The two terms of the gradient softmax(z) - softmax(t) of the BAN loss at the logits; they add up to it."""

  correct: PerExample  # q_* - p_* of the label's class
  dark: Logits  # q_i - p_i of the other classes, zero at the label's


def split_gradient(logits: Logits, labels: Labels, teacher_logits: Logits) -> GradientSplit:
  """Returns the two terms of Eq. 7 for every example, before the division by the batch size."""
  gradient = jax.nn.softmax(logits) - jax.nn.softmax(teacher_logits)
  is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
  return GradientSplit((gradient * is_label).sum(-1), jnp.where(is_label, 0, gradient))


def split_sums(
  logits: Logits, labels: Labels, teacher_logits: Logits, mask: Bool[Array, " B *T"]
) -> dict[str, Float[Array, ""]]:
  """Returns SUMS, summed over one device's examples; `summarise` divides them."""
  correct, dark = split_gradient(logits, labels, teacher_logits)
  log_teacher = jax.nn.log_softmax(teacher_logits)
  teacher = jnp.exp(log_teacher)
  sums = {
    "correct": correct,
    "correct_squared": correct**2,
    "dark_squared": (dark**2).sum(-1),
    "teacher_confidence": teacher.max(-1),
    "teacher_entropy": -(teacher * log_teacher).sum(-1),
  }
  return {name: jnp.where(mask, value, 0).sum() for name, value in sums.items()}


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
  """Returns the history's columns from summed `split_sums` and "count".

  "dark_share" is 1 - sum (q_* - p_*)^2 / sum |q - p|^2, not the paper's plain sums, which cancel: gradient rows sum to
  zero. "correct_gradient" is the signed mean of q_* - p_*; "teacher_confidence" the mean of the teacher's largest
  probability; "teacher_entropy" its mean entropy in nats. Without any gradient the share is not a number.
  """
  squared = sums["correct_squared"] + sums["dark_squared"]
  return {
    "dark_share": sums["dark_squared"] / squared if squared else np.nan,
    "correct_gradient": sums["correct"] / sums["count"],
    "teacher_confidence": sums["teacher_confidence"] / sums["count"],
    "teacher_entropy": sums["teacher_entropy"] / sums["count"],
  }

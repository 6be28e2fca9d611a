"""Metrics: the sums over a batch that the compiled steps compute, and the means computed from these sums."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ban_jax import gradient
from ban_jax.types import Batch

CALIBRATION_BINS = 15
# The sums of a training step, in the order in which they leave it; `gradient.SUMS` may follow. "loss" / "weight" is the
# mean loss, and "finite" is 1 where every number of the new state is finite.
TRAINING_SUMS = ("loss", "weight", "errors", "count", "finite")


def mean_log_probabilities(
  logits: Sequence[Float[Array, "B *T n"]], weights: Sequence[float] = ()
) -> Float[Array, "B *T n"]:
  """Returns the log of the members' mean softmax (Eq. 4), itself logits; one member's logits come back normalised.

  `weights` of the mean, one for each member, add up to one; without, all count alike.
  """
  stacked = jnp.stack([jax.nn.log_softmax(member) for member in logits])  # [M, B, *T, n]
  if weights:
    return jax.nn.logsumexp(stacked, axis=0, b=jnp.array(weights).reshape(-1, *(1,) * (stacked.ndim - 1)))
  return jax.nn.logsumexp(stacked, axis=0) - jnp.log(len(logits))


def top1_correct(logits: Float[Array, "B *T n"], labels: Int[Array, " B *T"]) -> Bool[Array, " B *T"]:
  """Returns whether the label's logit is the largest, the first of equal ones; never where a logit is not a number.

  This is argmax(logits) == labels, which XLA's CPU back end computes slowly: with 10,000 words it took a fifth of an
  LSTM's training step.
  """
  own = jnp.take_along_axis(logits, labels[..., None], -1)
  before = jnp.arange(logits.shape[-1]) < labels[..., None]
  # Counted and not only looked for, since XLA for TPUs joins it to the loss's sums: one pass over the logits less.
  return ((logits > own) | (logits == own) & before | jnp.isnan(logits)).astype(jnp.float32).sum(-1) == 0


def training_sums(logits: Float[Array, "B *T n"], batch: Batch, weights: Float[Array, " B *T"]) -> dict[str, Array]:
  """Returns those of TRAINING_SUMS over one device's batch that depend on its predictions; `weights` are the loss's."""
  errors = ~top1_correct(logits, batch.labels) & batch.mask
  return {"weight": weights.sum(), "errors": errors.sum(), "count": batch.mask.sum()}


def training_row(sums: Mapping[str, float]) -> dict[str, float]:
  """Returns an epoch's columns of the history from its summed TRAINING_SUMS, and `gradient.SUMS` where they are."""
  row = {"train_loss": sums["loss"] / sums["weight"], "train_error": 100 * sums["errors"] / sums["count"]}
  return row | (gradient.summarise(sums) if "dark_squared" in sums else {})


def prediction_sums(log_probabilities: Float[Array, "B *T n"], batch: Batch) -> Mapping[str, Array]:
  """Returns the sums over one device's batch that `summarise` and `bins` divide.

  Scalars "count", "errors", "nll", "brier"; by bin of the largest probability, ((b-1)/15, b/15], "bin_count",
  "bin_confidence" and "bin_correct" [15].
  """
  labels = batch.labels[..., None]
  probabilities = jnp.exp(log_probabilities)
  correct = top1_correct(log_probabilities, batch.labels)
  confidence = probabilities.max(axis=-1)
  # (p - one_hot)^2 summed over classes, without the one-hot.
  brier = (probabilities**2).sum(-1) - 2 * jnp.take_along_axis(probabilities, labels, -1)[..., 0] + 1
  bins = jnp.clip(jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1, 0, CALIBRATION_BINS - 1)
  member = (bins[..., None] == jnp.arange(CALIBRATION_BINS)) & batch.mask[..., None]  # [B, *T, bins]
  axes = tuple(range(bins.ndim))
  return {
    "count": batch.mask.sum(),
    "errors": (batch.mask & ~correct).sum(),
    "nll": jnp.where(batch.mask, -jnp.take_along_axis(log_probabilities, labels, -1)[..., 0], 0).sum(),
    "brier": jnp.where(batch.mask, brier, 0).sum(),
    "bin_count": member.sum(axes),
    "bin_confidence": jnp.where(member, confidence[..., None], 0).sum(axes),
    "bin_correct": (member & correct[..., None]).sum(axes),
  }


def ensemble_sums(logits: Sequence[Float[Array, "B *T n"]], batch: Batch) -> Mapping[str, Array]:
  """Returns the `prediction_sums` of an ensemble, which predicts its members' mean probabilities (Eq. 4)."""
  return prediction_sums(mean_log_probabilities(logits), batch)


def summarise(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns error [%], NLL [nats], ECE [share], Brier score and count from summed `prediction_sums`."""
  count = sums["count"]
  return {
    "error": float(100 * sums["errors"] / count),
    "nll": float(sums["nll"] / count),
    "ece": float(np.abs(sums["bin_correct"] - sums["bin_confidence"]).sum() / count),
    "brier": float(sums["brier"] / count),
    "count": int(count),
  }


def of_text(found: Mapping[str, float], written: Mapping[str, int]) -> dict[str, float]:
  """Returns "perplexity" from `summarise`'s numbers, and bits per unit of a split "written" in so many of each.

  With `written` = {"byte": 5, "character": 4}, "bits_per_byte" is all nats of the split / (ln 2 * 5).
  """
  bits = found["nll"] * found["count"] / math.log(2)
  per_unit = {f"bits_per_{unit}": bits / number for unit, number in written.items()}
  return {"perplexity": float(np.exp(found["nll"])), **per_unit}


def bins(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns `reliability`'s numbers from summed `prediction_sums`."""
  count = sums["bin_count"]
  divisor = np.where(count > 0, count, np.nan)
  return {
    "count": count.astype(np.int64),
    "confidence": sums["bin_confidence"] / divisor,
    "accuracy": sums["bin_correct"] / divisor,
  }


def comparison_sums(logits: list[Float[Array, "B *T n"]], batch: Batch) -> Mapping[str, Array]:
  """Returns, summed over one device's batch, how M networks' predictions differ, pair by pair.

  "count" (scalar); "agreement" [M, M], the examples or tokens for which both have the same top class, the first of
  equal ones; "kl" [M, M], KL(p_row || p_column) in nats.
  """
  top = jnp.stack([member.argmax(-1) for member in logits])  # [M, B, *T]
  logs = jnp.stack([jax.nn.log_softmax(member) for member in logits])  # [M, B, *T, n]
  inner = tuple(range(1, top.ndim))

  # Row by row, which needs no more memory than the logits do. The logarithms are subtracted first, because a difference
  # of entropies would lose small divergences.
  def row(member):
    own_top, own_logs = member
    divergence = (jnp.exp(own_logs) * (own_logs - logs)).sum(-1)  # [M, B, *T]
    return ((own_top == top) & batch.mask).sum(inner), jnp.where(batch.mask, divergence, 0).sum(inner)

  agreement, kl = jax.lax.map(row, (top, logs))
  return {"count": batch.mask.sum(), "agreement": agreement, "kl": kl}


def compared(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns `evaluating.compare`'s numbers from summed `comparison_sums`."""
  count = sums["count"]
  return {"agreement": sums["agreement"] / count, "kl": sums["kl"] / count, "count": int(count)}

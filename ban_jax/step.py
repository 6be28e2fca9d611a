"""The training step and the evaluation step: the only place where losses are normalised and devices are summed over."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ban_jax import devices as devices_lib
from ban_jax import gradient as gradient_lib
from ban_jax.losses import Loss
from ban_jax.types import Batch, Devices, Model, TrainState

CALIBRATION_BINS = 15


def mean_probabilities(logits: list[Float[Array, "B *T n"]]) -> Float[Array, "B *T n"]:
  """Returns the log of the members' mean softmax (Eq. 4), itself logits; one member's logits come back normalised."""
  stacked = jnp.stack([jax.nn.log_softmax(member) for member in logits])  # [M, B, *T, n]
  return jax.nn.logsumexp(stacked, axis=0) - jnp.log(len(logits))


@functools.lru_cache
def make_train_step(
  *,
  student: Model,
  teachers: tuple[Model, ...],
  frozen: tuple[str, ...],
  loss: Loss,
  optimizer: optax.GradientTransformation,
  fetch: Callable[..., Batch],
  devices: Devices,
  sync_batch_stats: bool,
  gradient_split: bool,
) -> Callable[..., tuple[TrainState, Any, dict[str, Array]]]:
  """Returns the pmapped step `(state, teacher_variables, carry, arrays, index, key_data) -> (state, carry, sums)`.

  Equal arguments give the same object, so that it compiles once for all generations. Without a leading device axis and
  broadcast: `teacher_variables`, one tree a member of `teachers` (evaluation mode, no gradient, never donated); the
  data set's `arrays`; `key_data` uint32 [2], the generation's key. With one: `state` and `carry = (student's,
  teachers')`, both donated, and `index` int32 [devices, B / devices]. The optimizer sees the parameters other than the
  `frozen` top-level ones. `sums` are over the global mini-batch, the same on every device: "loss" and "weight" (their
  quotient is the mean loss), "errors" and "count"; with `gradient_split` those of gradient.split_sums, too; and
  "finite", which says whether every number of the new state is.
  """

  def train_step(state: TrainState, teacher_variables, carry, arrays, index, key_data):
    positions = devices_lib.example_positions(len(index))
    key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl="threefry2x32"), state.step)
    augment_key, dropout_key, loss_key = jax.random.split(key, 3)
    batch = fetch(arrays, index, key=augment_key, positions=positions, train=True)
    student_carry, teacher_carries = carry
    taught = [
      teacher.apply(variables, teacher_carry, batch.inputs, train=False)
      for teacher, variables, teacher_carry in zip(teachers, teacher_variables, teacher_carries, strict=True)
    ]
    teacher_carries = tuple(teacher_carry for _, teacher_carry, _ in taught)
    teacher_logits = jax.lax.stop_gradient(_teaching_logits([logits for logits, _, _ in taught]))
    kept = {name: tree for name, tree in state.params.items() if name in frozen}
    trained = {name: tree for name, tree in state.params.items() if name not in frozen}

    def weighted_sum(trained):
      logits, new_carry, batch_stats = student.apply(
        {"params": {**trained, **kept}, "batch_stats": state.batch_stats},
        student_carry,
        batch.inputs,
        train=True,
        key=dropout_key,
        positions=positions,
      )
      values, weights = loss.apply(logits, batch.labels, teacher_logits, key=loss_key, positions=positions)
      weights = weights * batch.mask
      errors = ~is_top(logits, batch.labels) & batch.mask
      sums = {"weight": weights.sum(), "errors": errors.sum(), "count": batch.mask.sum()}
      if gradient_split and taught:
        sums |= gradient_lib.split_sums(logits, batch.labels, teacher_logits, batch.mask)
      return (values * weights).sum(), (sums, new_carry, batch_stats)

    (total, (sums, student_carry, batch_stats)), gradient = jax.value_and_grad(weighted_sum, has_aux=True)(trained)
    # The sum of this device's losses alone is differentiated: a psum inside the closure would count the others twice.
    gradient, sums = devices_lib.all_sum((gradient, {"loss": total, **sums}))
    gradient = jax.tree.map(lambda g: g / sums["weight"], gradient)
    if not sync_batch_stats:
      batch_stats = devices_lib.all_mean(batch_stats)
    updates, opt_state = optimizer.update(gradient, state.opt_state, trained)
    params = {**optax.apply_updates(trained, updates), **kept}
    new = TrainState(state.step + 1, params, batch_stats, opt_state)
    return new, (student_carry, teacher_carries), sums | {"finite": all_finite(new)}

  return devices_lib.pmap(train_step, devices=devices, in_axes=(0, None, 0, None, 0, None), donate_argnums=(0, 2))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
  """Returns whether every number of every leaf is finite."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def is_top(logits: Float[Array, "B *T n"], labels: Int[Array, " B *T"]) -> Bool[Array, " B *T"]:
  """Returns whether the label's logit is the largest, the first of equal ones; never where a logit is not a number.

  That is argmax(logits) == labels, which XLA's CPU back end computes slowly: of 10,000 words in a fifth of an LSTM's
  training step.
  """
  own = jnp.take_along_axis(logits, labels[..., None], -1)
  before = jnp.arange(logits.shape[-1]) < labels[..., None]
  return ~((logits > own) | (logits == own) & before | jnp.isnan(logits)).any(-1)


def _teaching_logits(logits: list[Float[Array, "B *T n"]]) -> Float[Array, "B *T n"] | None:
  """Returns the only teacher's logits as they are, several teachers' mean probabilities as logits, or None."""
  if not logits:
    return None
  return logits[0] if len(logits) == 1 else mean_probabilities(logits)


@functools.lru_cache
def make_eval_step(
  members: tuple[Model, ...], fetch: Callable[..., Batch], devices: Devices
) -> Callable[..., tuple[Any, dict[str, Array]]]:
  """Returns the pmapped step `(variables, carries, arrays, index) -> (carries, sums)` of an ensemble of `members`.

  `variables` (one tree a member) and `arrays` are broadcast, `carries` and `index` have a leading device axis. `sums`
  are over the global batch: "count", "errors", "nll", "brier" (scalars), and by confidence bin (top probability in
  ((b-1)/15, b/15]) "bin_count", "bin_confidence" and "bin_correct" [15]: what the calibration error is made of.
  """
  return _make_predicting_step(
    members, fetch, devices, lambda logits, batch: prediction_sums(mean_probabilities(logits), batch)
  )


@functools.lru_cache
def make_compare_step(
  members: tuple[Model, ...], fetch: Callable[..., Batch], devices: Devices
) -> Callable[..., tuple[Any, dict[str, Array]]]:
  """Returns the pmapped step `(variables, carries, arrays, index) -> (carries, sums)` that compares M `members`.

  Its arguments are those of `make_eval_step`'s. `sums` are `comparison_sums`, over the global batch.
  """
  return _make_predicting_step(members, fetch, devices, comparison_sums)


def _make_predicting_step(
  members: tuple[Model, ...],
  fetch: Callable[..., Batch],
  devices: Devices,
  sums_of: Callable[[list[Float[Array, "B *T n"]], Batch], Mapping[str, Array]],
) -> Callable[..., tuple[Any, dict[str, Array]]]:
  """Returns the pmapped step that adds up over the devices what `sums_of` makes of all members' logits."""

  def predicting_step(variables, carries, arrays, index):
    batch = fetch(arrays, index, key=None, positions=None, train=False)
    outputs = [
      member.apply(tree, carry, batch.inputs, train=False)
      for member, tree, carry in zip(members, variables, carries, strict=True)
    ]
    sums = sums_of([logits for logits, _, _ in outputs], batch)
    return tuple(carry for _, carry, _ in outputs), devices_lib.all_sum(sums)

  return devices_lib.pmap(predicting_step, devices=devices, in_axes=(None, 0, None, 0))


def prediction_sums(log_probabilities: Float[Array, "B *T n"], batch: Batch) -> Mapping[str, Array]:
  """Returns `make_eval_step`'s sums over one device's batch."""
  labels = batch.labels[..., None]
  probabilities = jnp.exp(log_probabilities)
  correct = is_top(log_probabilities, batch.labels)
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


def comparison_sums(logits: list[Float[Array, "B *T n"]], batch: Batch) -> Mapping[str, Array]:
  """Returns, summed over one device's batch, how M networks' predictions differ, pair by pair.

  "count" (scalar); "agreement" [M, M], the examples or tokens for which both have the same top class, the first of
  equal ones; "kl" [M, M], KL(p_row || p_column) in nats.
  """
  top = jnp.stack([member.argmax(-1) for member in logits])  # [M, B, *T]
  logs = jnp.stack([jax.nn.log_softmax(member) for member in logits])  # [M, B, *T, n]
  inner = tuple(range(1, top.ndim))

  # Row by row, so that of many classes no more is alive at a time than the logits themselves are. Logarithms are
  # subtracted first: small differences would vanish behind the entropies otherwise.
  def row(member):
    own_top, own_logs = member
    divergence = (jnp.exp(own_logs) * (own_logs - logs)).sum(-1)  # [M, B, *T]
    return ((own_top == top) & batch.mask).sum(inner), jnp.where(batch.mask, divergence, 0).sum(inner)

  agreement, kl = jax.lax.map(row, (top, logs))
  return {"count": batch.mask.sum(), "agreement": agreement, "kl": kl}

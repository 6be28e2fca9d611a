"""The training step and the evaluation step: the only place where losses are normalised and devices are summed over."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from ban_jax import devices as devices_lib
from ban_jax import gradient as gradient_lib
from ban_jax import metrics
from ban_jax.losses import Logits, Loss
from ban_jax.teacher import Teaching
from ban_jax.types import Batch, Carry, Devices, Feed, InputSpec, Model, TrainState
from ban_jax.updates import Updates

# From the logits of M networks, and their batch, to sums over its examples: metrics.ensemble_sums or comparison_sums.
SumsOf = Callable[[list[Logits], Batch], Mapping[str, Array]]


class TrainStep(NamedTuple):
  """A compiled training step, and the names of the sums that it returns."""

  run: Callable[..., tuple[TrainState, Any, Float[Array, "n sums"]]]
  sums: tuple[str, ...]


class EvalStep(NamedTuple):
  """A compiled evaluation step, and the shapes of the sums that it returns, by name."""

  run: Callable[..., tuple[Carry, Float[Array, "n sums"]]]
  shapes: Mapping[str, jax.ShapeDtypeStruct]


class Drawn(NamedTuple):
  """One device's share of a training step's mini-batch, and what else the step draws by."""

  batch: Batch
  shown: Batch  # what the teacher sees
  positions: Int[Array, " B"]  # the examples' places in the global mini-batch
  dropout_key: PRNGKeyArray
  loss_key: PRNGKeyArray


def batch_of(
  fetch: Callable[..., Batch], arrays: Feed, feed: Feed, key_data: Array, step: Array, view: str = "same"
) -> Drawn:
  """Returns a training step's mini-batch, inside a mapped function; arguments are those of the training step.

  `view`, one of teacher.VIEWS, says which images the teacher sees.
  """
  index, rows = _taken(feed)
  positions = devices_lib.example_positions(len(index))
  key = jax.random.fold_in(jax.random.wrap_key_data(key_data, impl="threefry2x32"), step)
  augment_key, dropout_key, loss_key = jax.random.split(key, 3)
  cut = functools.partial(fetch, {**arrays, **rows}, index, positions=positions)
  batch = shown = cut(key=augment_key, train=True)
  if view != "same":
    other_key = jax.random.fold_in(augment_key, jnp.uint32(2**32 - 1))  # positions and augmentations are below
    shown = cut(key=other_key, train=view == "other")
  return Drawn(batch, shown, positions, dropout_key, loss_key)


def _taken(feed: Feed) -> tuple[Int[Array, " B"], Feed]:
  """Returns a mini-batch's index, and the rows that were read for it: of a split on the devices, none."""
  return feed["index"], {name: rows for name, rows in feed.items() if name != "index"}


@functools.lru_cache
def make_train_step(
  *,
  student: Model,
  teaching: Teaching,
  frozen: tuple[str, ...],
  loss: Loss,
  updates: Updates,
  fetch: Callable[..., Batch],
  devices: Devices,
  sync_batch_stats: bool,
  gradient_split: bool,
  mapping: str = "pmap",
) -> TrainStep:
  """Returns the pmapped step `(state, source, carry, arrays, feed, key_data) -> (state, carry, sums)`.

  Equal arguments give the same object, so that it compiles once for all generations. It takes

    state     TrainState, broadcast; donated
    source    the teacher's source, placed as teaching.source_axis says; never donated, no gradient
    carry     (student's, teacher's), rows first, split over the devices; donated
    arrays    the data set's training arrays, broadcast
    feed      n mini-batches as feeding.feeds makes them: "index" int32 [devices, n, B / devices], and what was read
    key_data  uint32 [2], the key of the generation's steps, broadcast

  and returns the new state and carry, and the sums over each global mini-batch, float32 [n, sums]:
  metrics.TRAINING_SUMS and, with `gradient_split` and a teacher, gradient.SUMS. `mapping` changes no byte.
  """
  split = gradient_split and teaching.teaches
  names = metrics.TRAINING_SUMS + (gradient_lib.SUMS if split else ())

  def one_step(source, arrays, key_data, loop: tuple[TrainState, Any], feed):
    state, (student_carry, teacher_carry) = loop
    drawn = batch_of(fetch, arrays, feed, key_data, state.step, teaching.view)
    batch, shown, positions, dropout_key, loss_key = drawn
    teacher_logits, teacher_carry = teaching.logits(source, teacher_carry, shown)
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    fixed, trainable = ({k: v for k, v in state.params.items() if (k in frozen) == kept} for kept in (True, False))

    def weighted_sum(trainable):
      variables = {"params": {**trainable, **fixed}, "batch_stats": state.batch_stats}
      logits, new_carry, batch_stats = student.apply(
        variables, student_carry, batch.inputs, train=True, key=dropout_key, positions=positions
      )
      values, weights = loss.at(state.step)(logits, batch.targets, teacher_logits, key=loss_key, positions=positions)
      weights = weights * batch.mask
      sums = metrics.training_sums(logits, batch, weights)
      if split and teacher_logits is not None:
        sums |= gradient_lib.split_sums(logits, batch.labels, teacher_logits, batch.mask)
      return (values * weights).sum(), (sums, new_carry, batch_stats)

    (total, (sums, student_carry, batch_stats)), gradient = jax.value_and_grad(weighted_sum, has_aux=True)(trainable)
    # The sum of this device's losses alone is differentiated: a psum inside the closure would count the others twice.
    gradient, sums = devices_lib.psum((gradient, {"loss": total, **sums}))
    if not sync_batch_stats:
      batch_stats = devices_lib.pmean(batch_stats)
    state = updates.apply(gradient, sums["weight"], batch_stats, state, trainable)
    # A momentum that is not finite makes its parameter so in the same step. XLA fuses this into the update.
    sums["finite"] = all_finite((state.params, batch_stats))
    # One array is read at a time. Counts stay exact: a mini-batch has fewer than 2^24 examples or tokens.
    row = jnp.stack([sums[name].astype(jnp.float32) for name in names])
    return (state, (student_carry, teacher_carry)), row

  def train_step(state, source, carry, arrays, feed, key_data):
    step = functools.partial(one_step, source, arrays, key_data)
    (state, carry), rows = _several(step, (state, carry), feed, len(names))
    return state, carry, rows

  mapped, axes, out = devices_lib.MAPPINGS[mapping], (None, teaching.source_axis, 0, None, 0, None), (None, 0, None)
  return TrainStep(mapped(train_step, devices=devices, in_axes=axes, out_axes=out, donate_argnums=(0, 2)), names)


def _several(
  one_step: Callable[[Any, Feed], tuple[Any, Float[Array, " sums"]]],
  loop: Any,
  feed: Feed,
  sums: int,
) -> tuple[Any, Float[Array, "n sums"]]:
  """Takes a step for each of n mini-batches: `one_step` makes what the next one begins with, and a row of `sums`."""
  index = feed["index"]
  if len(index) == 1:  # no loop: XLA's CPU back end runs a convolution inside one 30 times slower
    loop, row = one_step(loop, jax.tree.map(lambda leaf: leaf[0], feed))
    return loop, row[None]

  def body(number, state):
    loop, rows = state
    loop, row = one_step(loop, jax.tree.map(lambda leaf: leaf[number], feed))
    return loop, rows.at[number].set(row)

  # The length is known at run time only, so that one program, with the same bytes, serves every chunk.
  count = (index[:, 0] != devices_lib.NO_BATCH).sum()
  return jax.lax.fori_loop(0, count, body, (loop, jnp.zeros((len(index), sums))))


def all_finite(tree: PyTree) -> Bool[Array, ""]:
  """Returns whether every number of every leaf is finite."""
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


@functools.lru_cache
def make_eval_step(
  members: tuple[Model, ...], fetch: Callable[..., Batch], devices: Devices, sums_of: SumsOf = metrics.ensemble_sums
) -> EvalStep:
  """Returns the pmapped step `(variables, carries, arrays, feed) -> (carries, sums)` of M networks, the `members`.

  `variables` (one tree a member) and `arrays` are broadcast, `carries` and `feed` (n mini-batches, as feeding.feeds
  makes them) have a leading device axis. `sums` are float32 [n, sums]: what `sums_of` makes of the
  members' logits on each mini-batch, one after the other in the order of a tree's leaves.
  """
  shapes = jax.eval_shape(sums_of, *_examples(members[0].spec, len(members)))

  def one_step(variables, arrays, carries, feed):
    index, rows = _taken(feed)
    batch = fetch({**arrays, **rows}, index, key=None, positions=None, train=False)
    outputs = [
      member.apply(tree, carry, batch.inputs, train=False)
      for member, tree, carry in zip(members, variables, carries, strict=True)
    ]
    sums = devices_lib.psum(sums_of([logits for logits, _, _ in outputs], batch))
    # Counts stay exact, as in training.
    row = jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(sums)])
    return tuple(carry for _, carry, _ in outputs), row

  def eval_step(variables, carries, arrays, feed):
    step = functools.partial(one_step, variables, arrays)
    return _several(step, carries, feed, sum(leaf.size for leaf in jax.tree.leaves(shapes)))

  run = devices_lib.pmap(eval_step, devices=devices, in_axes=(None, 0, None, 0), out_axes=(0, None))
  return EvalStep(run, shapes)


def _examples(spec: InputSpec, networks: int) -> tuple[list[jax.ShapeDtypeStruct], Batch]:
  """Returns the shapes of the logits of some networks for a mini-batch of one example, and of its labels."""
  rows = (1, *spec.shape) if spec.kind == "tokens" else (1,)
  inputs: Any = None
  labels, mask = (jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.int32, jnp.bool_))
  batch = Batch(inputs, cast(jax.Array, labels), cast(jax.Array, mask))
  return [jax.ShapeDtypeStruct((*rows, spec.num_classes), jnp.float32)] * networks, batch


@functools.lru_cache
def make_statistics_step(model: Model, fetch: Callable[..., Batch], devices: Devices) -> Callable[..., PyTree]:
  """Returns the pmapped step `(params, batch_stats, arrays, feed, key_data, step) -> batch_stats` that trains nothing.

  Of the arguments only `feed`, one mini-batch, has a leading device axis.
  """

  def statistics_step(params, batch_stats, arrays, feed, key_data, step):
    batch, _, positions, dropout_key, _ = batch_of(fetch, arrays, feed, key_data, step)
    variables = {"params": params, "batch_stats": batch_stats}
    _, _, new = model.apply(
      variables, model.init_carry(len(positions)), batch.inputs, train=True, key=dropout_key, positions=positions
    )
    return devices_lib.pmean(new)

  return devices_lib.pmap(statistics_step, devices=devices, in_axes=(None, None, None, 0, None, None), out_axes=None)

"""The teacher: what goes into the training step beside the student, and how a batch's teacher logits come out of it.

There are three kinds: none (generation 0, and losses of the labels); live, which runs one network, or an ensemble, on
every batch; and replayed, which reads what a live one gave (replay.py). A further kind is one more function that
returns a `Teaching`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from ban_jax import metrics, trees
from ban_jax.losses import Logits
from ban_jax.types import Batch, Carry, Model, Variables

# Which images teach, where training augments them: the student's own; the same examples, with augmentations drawn anew;
# or the same examples as they are.
VIEWS = dict.fromkeys(("same", "other", "plain"))


class Teaching(NamedTuple):
  """A teacher's part of the compiled step, as pure functions. Equal teachers give the same object.

  `logits(source, carry, batch)` returns `(logits, carry)`: float32 [B, n] or [B, T, n], or None where nothing teaches;
  its batch is the `view` of VIEWS.
  `init_carry(rows)` gives the carry at the beginning of an epoch, rows first.
  """

  teaches: bool
  source_axis: int | None  # of the source: None is broadcast to all devices, 0 is split over them
  init_carry: Callable[[int], Carry]
  logits: Callable[[PyTree, Carry, Batch], tuple[Logits | None, Carry]]
  view: str = "same"
  weights: tuple[float, ...] = ()  # of several networks that teach together; () for the same


class Teacher(NamedTuple):
  """What a generation learns from, as one value."""

  teaching: Teaching
  source: PyTree  # the networks' variables; of a live teacher the step's undonated, undifferentiated input
  digests: tuple[str, ...]  # of the networks that the generation depends on, for its manifest
  copied: Mapping[str, PyTree]  # top-level parameters that the student copies and keeps frozen (Table 5)
  recorded: Teaching | None = None  # of a replayed teacher: the live one whose logits are recorded
  models: tuple[Model, ...] = ()  # that it runs


def make(
  parents: Sequence[Variables],
  models: Sequence[Model],
  student: Model,
  *,
  needed: bool,
  view: str = "same",
  weights: Sequence[float] = (),
) -> Teacher:
  """Returns the teacher of a student whose parents, M variables trees of these models, are known to fit.

  Where its outputs are not `needed`, since the loss does not use them, the parents only lend the layers that the
  student copies. `view` is one of VIEWS. `weights` are those of several parents, () for equal ones, and say nothing
  where there is one; raises a ConfigError for another number of them.
  """
  teacher = _of([trees.to_plain(parent) for parent in parents], models, student, needed, view, weights)
  used = teacher.teaching.teaches or teacher.copied
  return teacher._replace(digests=tuple(map(_digest, parents, models)) if used else ())


def describe(
  models: Sequence[Model], student: Model, *, needed: bool, view: str = "same", weights: Sequence[float] = ()
) -> Teacher:
  """Returns `make`'s teacher with jax.ShapeDtypeStructs as variables, and no digests."""
  return _of([model.shapes for model in models], models, student, needed, view, weights)


def _of(
  plain: Sequence[PyTree],
  models: Sequence[Model],
  student: Model,
  needed: bool,
  view: str,
  weights: Sequence[float],
) -> Teacher:
  copied = {name: plain[0]["params"][name] for name in student.inherits} if plain else {}
  taught = bool(plain) and needed
  if not taught:
    return Teacher(none(), (), (), copied)
  shares = tuple(trees.mean_weights(weights, len(plain), "teacher.weights").tolist()) if weights and plain[1:] else ()
  return Teacher(live(tuple(models), view, shares), tuple(plain), (), copied, models=tuple(models))


def _digest(parent: Variables, model: Model) -> str:
  """Returns the digest of a network, with its normalisation of images where that is not the data set's."""
  own = trees.digest(parent)
  return trees.json_digest([own, model.normalisation]) if model.normalisation else own


@functools.cache
def none() -> Teaching:
  """Returns the teaching of labels alone."""
  return Teaching(False, None, lambda rows: (), lambda source, carry, batch: (None, carry))


@functools.lru_cache
def live(models: tuple[Model, ...], view: str = "same", weights: tuple[float, ...] = ()) -> Teaching:
  """Returns the teaching of networks in evaluation mode; several teach by their mean probabilities (Eq. 4).

  The source is a tuple of variables trees, one a model. `weights` of the mean add up to one; () weights all equally.
  """

  def init_carry(rows: int) -> Carry:
    return tuple(model.init_carry(rows) for model in models)

  def logits(source: PyTree, carry: Carry, batch: Batch) -> tuple[Logits, Carry]:
    outputs = [
      model.apply(variables, own, batch.inputs, train=False)
      for model, variables, own in zip(models, source, carry, strict=True)
    ]
    every = [out for out, _, _ in outputs]
    mean = every[0] if len(every) == 1 else metrics.mean_log_probabilities(every, weights)
    return mean, tuple(own for _, own, _ in outputs)

  return Teaching(True, None, init_carry, logits, view, weights)


@functools.cache
def replayed() -> Teaching:
  """Returns the teaching of recorded logits.

  The source is an epoch's, float32 [steps, B / devices, ...] on each device; the carry, int32 [B], counts the epoch's
  steps, alike in all rows.
  """

  def logits(source: PyTree, carry: Carry, batch: Batch) -> tuple[Logits, Carry]:
    return source[carry[0]], carry + 1

  return Teaching(True, 0, lambda rows: np.zeros(rows, np.int32), logits)

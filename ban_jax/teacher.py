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


class Teaching(NamedTuple):
  """A teacher's part of the compiled step, as pure functions. Equal teachers give the same object.

  `logits(source, carry, batch)` returns `(logits, carry)`: float32 [B, n] or [B, T, n], or None where nothing teaches.
  `init_carry(rows)` gives the carry at the beginning of an epoch, rows first.
  """

  teaches: bool
  source_axis: int | None  # of the source: None is broadcast to all devices, 0 is split over them
  init_carry: Callable[[int], Carry]
  logits: Callable[[PyTree, Carry, Batch], tuple[Logits | None, Carry]]


class Teacher(NamedTuple):
  """What a generation learns from, as one value."""

  teaching: Teaching
  source: PyTree  # the networks' variables; of a live teacher the step's undonated, undifferentiated input
  digests: tuple[str, ...]  # of the networks that the generation depends on, for its manifest
  copied: Mapping[str, PyTree]  # top-level parameters that the student copies and keeps frozen (Table 5)
  recorded: Teaching | None = None  # of a replayed teacher: the live one whose logits are recorded


def make(parents: Sequence[Variables], models: Sequence[Model], student: Model, *, needed: bool) -> Teacher:
  """Returns the teacher of a student whose parents, M variables trees of these models, are known to fit.

  Where its outputs are not `needed`, since the loss does not use them, the parents only lend the layers that the
  student copies.
  """
  teacher = _of([trees.to_plain(parent) for parent in parents], models, student, needed)
  used = teacher.teaching.teaches or teacher.copied
  return teacher._replace(digests=tuple(trees.digest(parent) for parent in parents) if used else ())


def describe(models: Sequence[Model], student: Model, *, needed: bool) -> Teacher:
  """Returns `make`'s teacher with jax.ShapeDtypeStructs as variables, and no digests."""
  return _of([model.shapes for model in models], models, student, needed)


def _of(plain: Sequence[PyTree], models: Sequence[Model], student: Model, needed: bool) -> Teacher:
  copied = {name: plain[0]["params"][name] for name in student.inherits} if plain else {}
  taught = bool(plain) and needed
  return Teacher(live(tuple(models)) if taught else none(), tuple(plain) if taught else (), (), copied)


@functools.cache
def none() -> Teaching:
  """Returns the teaching of labels alone."""
  return Teaching(False, None, lambda rows: (), lambda source, carry, batch: (None, carry))


@functools.lru_cache
def live(models: tuple[Model, ...]) -> Teaching:
  """Returns the teaching of networks in evaluation mode; several teach by their mean probabilities (Eq. 4).

  The source is a tuple of variables trees, one a model.
  """

  def init_carry(rows: int) -> Carry:
    return tuple(model.init_carry(rows) for model in models)

  def logits(source: PyTree, carry: Carry, batch: Batch) -> tuple[Logits, Carry]:
    outputs = [
      model.apply(variables, own, batch.inputs, train=False)
      for model, variables, own in zip(models, source, carry, strict=True)
    ]
    every = [out for out, _, _ in outputs]
    return every[0] if len(every) == 1 else metrics.mean_log_probabilities(every), tuple(own for _, own, _ in outputs)

  return Teaching(True, None, init_carry, logits)


@functools.cache
def replayed() -> Teaching:
  """Returns the teaching of recorded logits.

  The source is an epoch's, float32 [steps, B / devices, ...] on each device; the carry, int32 [B], counts the epoch's
  steps, alike in all rows.
  """

  def logits(source: PyTree, carry: Carry, batch: Batch) -> tuple[Logits, Carry]:
    return source[carry[0]], carry + 1

  return Teaching(True, 0, lambda rows: np.zeros(rows, np.int32), logits)

"""Exact evaluation of a network or an ensemble: padded, masked, summed over every example, then divided."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax import feeding, job, metrics, networks, resolving, trees
from ban_jax.errors import ConfigError
from ban_jax.step import SumsOf, make_eval_step
from ban_jax.trees import Member
from ban_jax.types import Dataset, Devices, Model


class Subject(NamedTuple):
  """What is evaluated: one network or an ensemble, on which data, on which devices.

  Variables and splits that lie on these devices already, as `devices.broadcast` places them, are not copied.
  """

  models: tuple[Model, ...]
  variables: tuple[Any, ...]  # plain trees, known to fit their models
  dataset: Dataset
  devices: Devices


@devices_lib.default_modes()
def evaluate(
  generations: Member | Sequence[Member],
  cfg: ConfigDict | resolving.Setup,
  split: str = "test",
  *,
  devices: Sequence[jax.Device] | None = None,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
) -> dict[str, float]:
  """Evaluates a network, or the ensemble of several by their mean probabilities (Eq. 4), on every example of a split.

  Args:
    generations: Generations or variables trees, one or several, of generation 0's network or the students'.
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    split: "train", "validation" or "test".
    devices: the devices to use; all by default.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: the students' network, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.

  Returns:
    "error" in %, "nll" in nats, "ece" (15 equal bins of confidence, a share; Guo et al. 2017), "brier" and "count"; of
    tokens "perplexity" too, and where it is known how much text they are, "bits_per_byte" and "bits_per_character".

  Raises:
    ConfigError: before any work, for an unknown split, no members, or a configuration that cannot be evaluated.
    CheckpointError: before any work, for a tree that does not fit its network.

  Examples:
    >>> ban_jax.evaluate([teacher, student], cfg, dataset=data)["count"]
    100
  """
  subject, rows = _resolve("evaluate", generations, cfg, devices, resolving.Own(dataset, model, teacher_model))
  return measure(subject, split, rows)


@devices_lib.default_modes()
def reliability(
  generations: Member | Sequence[Member],
  cfg: ConfigDict | resolving.Setup,
  split: str = "test",
  *,
  devices: Sequence[jax.Device] | None = None,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
) -> dict[str, np.ndarray]:
  """Returns a reliability diagram's numbers on every example of a split: what `evaluate`'s "ece" is the sum of.

  Bin b of 15 holds the examples, or tokens, whose largest probability is in ((b-1)/15, b/15]. Several networks are an
  ensemble (Eq. 4). Reference: Guo et al. 2017, arXiv:1706.04599.

  Args:
    generations: Generations or variables trees, one or several.
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    split: "train", "validation" or "test".
    devices: the devices to use; all by default.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: the students' network, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.

  Returns:
    "count" int64 [15], the number of examples in each bin, and their means "confidence" and "accuracy" float64 [15], as
    shares; not a number in an empty bin.

  Raises:
    BanError: those of `evaluate`.

  Examples:
    >>> int(ban_jax.reliability(student, cfg, dataset=data)["count"].sum())
    100
  """
  subject, rows = _resolve("reliability", generations, cfg, devices, resolving.Own(dataset, model, teacher_model))
  return metrics.bins(sum_predictions(subject, split, rows))


@devices_lib.default_modes()
def compare(
  generations: Member | Sequence[Member],
  cfg: ConfigDict | resolving.Setup,
  split: str = "test",
  *,
  devices: Sequence[jax.Device] | None = None,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
) -> dict[str, Any]:
  """Compares the predictions of M networks, pair by pair, on every example of a split.

  Args:
    generations: Generations or variables trees, one or several.
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    split: "train", "validation" or "test".
    devices: the devices to use; all by default.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: the students' network, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.

  Returns:
    "agreement" float64 [M, M], the share of examples or tokens for which both predict the same class; "kl" float64
    [M, M], the mean of KL(p_row || p_column) in nats, the excess of the loss of Eq. 2 and 3 over its minimum with row
    as teacher and column as student; and "count".

  Raises:
    BanError: those of `evaluate`.

  Examples:
    >>> ban_jax.compare([teacher, student], cfg, dataset=data)["agreement"].shape
    (2, 2)
  """
  subject, rows = _resolve("compare", generations, cfg, devices, resolving.Own(dataset, model, teacher_model))
  return measure_pairs(subject, split, rows)


def _resolve(
  what: str,
  generations: Member | Sequence[Member],
  cfg: ConfigDict | resolving.Setup,
  devices: Sequence[jax.Device] | None,
  own: resolving.Own,
) -> tuple[Subject, int]:
  """Returns the checked Subject and the evaluation batch; `what` names the caller in messages."""
  setup = resolving.resolve(cfg, devices, own)
  members, models = networks.members(generations, setup, "member")
  if not members:
    raise ConfigError(f"{what} needs at least one network")
  subject = Subject(tuple(models), tuple(map(trees.to_plain, members)), setup.dataset, setup.devices)
  return subject, setup.cfg.evaluate.batch_size


def measure(subject: Subject, split: str, batch_size: int) -> dict[str, float]:
  """Returns `evaluate`'s numbers."""
  found = metrics.summarise(sum_predictions(subject, split, batch_size))
  if subject.dataset.spec.kind == "tokens":
    found |= metrics.of_text(found, subject.dataset.written.get(split, {}))
  return found


def measure_pairs(subject: Subject, split: str, batch_size: int) -> dict[str, Any]:
  """Returns `compare`'s numbers; the subject's models may all differ."""
  return metrics.compared(sum_predictions(subject, split, batch_size, metrics.comparison_sums))


def sum_predictions(
  subject: Subject, split: str, batch_size: int, sums_of: SumsOf = metrics.ensemble_sums
) -> dict[str, np.ndarray]:
  """Returns the float64 sums of `sums_of` over every example of a split, each exactly once.

  A batch larger than the split is cut to its examples or windows. Where the devices cannot share a batch equally, it is
  rounded up; but a model with a carry keeps its batch, because more rows would start more streams from a zero state,
  and runs on as many of this process's devices as can share it.
  """
  models, variables, dataset, _ = subject
  batch_size, devices = share(models, dataset, split, batch_size, subject.devices)
  variables = devices_lib.broadcast(variables, devices)
  arrays = devices_lib.broadcast_split(dataset, split, devices)
  carries = devices_lib.place_rows(tuple(model.init_carry(batch_size) for model in models), devices)
  step = make_eval_step(models, dataset.fetch, devices, sums_of)
  order, block = dataset.eval_order(split, batch_size), job.block_size(dataset, split, batch_size, devices)
  counts = [min(block, len(order) - first) for first in range(0, len(order), block)]
  total: Any = 0.0
  for count, feed in zip(counts, feeding.feeds(dataset, split, order, counts, devices, block), strict=True):
    carries, sums = step.run(variables, carries, arrays, feed)
    # Reading the sums at once bounds what is in flight to one dispatch.
    for row in devices_lib.unreplicate(sums)[:count]:
      total += row.astype(np.float64)
  shapes, structure = jax.tree.flatten(step.shapes)
  parts = np.split(total, np.cumsum([leaf.size for leaf in shapes])[:-1])
  return jax.tree.unflatten(structure, [part.reshape(leaf.shape) for part, leaf in zip(parts, shapes, strict=True)])


def share(
  models: Sequence[Model], dataset: Dataset, split: str, batch_size: int, devices: Devices
) -> tuple[int, Devices]:
  """Returns the batch and the devices of an evaluation, as `sum_predictions` chooses them."""
  # Further rows would be padding, for text too: where every window has a row of its own, no stream is left to start.
  batch_size = min(batch_size, -(-len(dataset.eval_order(split, 1)) // len(devices)) * len(devices))
  if batch_size % len(devices):
    if any(jax.tree.leaves(model.init_carry(1)) for model in models):
      own = devices_lib.local(devices)
      devices = own[: max(count for count in range(1, len(own) + 1) if batch_size % count == 0)]
    else:
      batch_size = -(-batch_size // len(devices)) * len(devices)
  return batch_size, devices

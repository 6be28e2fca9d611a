"""Exact evaluation of a network or an ensemble: padded, masked, summed over every example, then divided."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ban_jax import checkpoint, data
from ban_jax import devices as devices_lib
from ban_jax.errors import ConfigError
from ban_jax.models import make_model
from ban_jax.step import make_eval_step
from ban_jax.types import Dataset, Devices, Generation, InputSpec, Model, Variables

Member = Generation | Variables


def make_models(cfg: ConfigDict, spec: InputSpec) -> tuple[Model, Model]:
  """Returns (generation 0's network, the students' network) of a configuration, for a data set's inputs."""
  options = {"compute_dtype": cfg.compute_dtype, "sync_batch_stats": cfg.train.sync_batch_stats}
  student = make_model(cfg.model, spec, **options)
  return (make_model(cfg.teacher.model, spec, **options) if cfg.teacher.model else student), student


def members_of(given: Member | Sequence[Member] | None) -> list[Variables]:
  """Returns the variables trees of one network, or of several, given as trees or as Generations."""
  if given is None:
    return []
  if isinstance(given, Generation):
    return [given.params]
  if isinstance(given, Mapping):
    return [given]
  if not isinstance(given, Sequence):
    raise ConfigError(f"expected a variables tree, a Generation or a sequence of them, not {type(given).__name__}")
  return [tree for member in given for tree in members_of(member)]


def fit_models(trees: Sequence[Variables], models: tuple[Model, Model], what: str) -> tuple[Model, ...]:
  """Returns each tree's network, by its lineage, or raises a CheckpointError where a tree does not fit it."""
  fitting = tuple(
    models[min(checkpoint.lineage(tree), 1)] if isinstance(tree, Mapping) else models[0] for tree in trees
  )
  for number, (tree, model) in enumerate(zip(trees, fitting, strict=True)):
    checkpoint.check_fits(tree, model, what if len(trees) == 1 else f"{what} {number + 1}")
  return fitting


def evaluate(
  generations: Member | Sequence[Member],
  cfg: ConfigDict,
  split: str = "test",
  *,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
  """Evaluates a network, or the ensemble of several by their mean probabilities (Eq. 4), on every example of a split.

  Returns "error" in %, "nll" in nats, "ece" (15 equal bins of confidence, a share), "brier" and "count", of tokens
  "perplexity" too. Members may be Generations or variables trees, of generation 0's network or the students'. Raises
  before any work: ConfigError for an unknown split or no members, CheckpointError for a tree that does not fit its
  network.
  """
  dataset = data.load(cfg.data)
  trees = members_of(generations)
  if not trees:
    raise ConfigError("evaluate needs at least one network")
  models = fit_models(trees, make_models(cfg, dataset.spec), "member")
  devices = devices_lib.resolve(devices)
  return evaluate_trees(models, tuple(map(checkpoint.thaw, trees)), dataset, split, cfg.evaluate.batch_size, devices)


def evaluate_trees(
  models: tuple[Model, ...], trees: Sequence[Any], dataset: Dataset, split: str, batch_size: int, devices: Devices
) -> dict[str, float]:
  """Returns `evaluate`'s numbers for plain variables trees that are known to fit their models.

  Where the devices cannot share the batch equally, it is rounded up; but a model with a carry keeps its batch, since
  more rows would start more streams from a zero state, and runs on as many of each process's devices as can share it.
  """
  if batch_size % len(devices):
    if any(jax.tree.leaves(model.init_carry(1)) for model in models):
      own = devices_lib.local(devices)
      devices = own[: max(count for count in range(1, len(own) + 1) if batch_size % count == 0)]
    else:
      batch_size = -(-batch_size // len(devices)) * len(devices)
  variables = devices_lib.broadcast(tuple(trees), devices)
  order = dataset.eval_order(split, batch_size)
  arrays = devices_lib.broadcast(dataset.splits[split], devices)
  carries = devices_lib.split_rows(tuple(model.init_carry(batch_size) for model in models), devices)
  step = make_eval_step(models, dataset.fetch, devices)
  total = None
  for index in order:
    carries, sums = step(variables, carries, arrays, devices_lib.split_rows(index, devices))
    # Reading the sums at once bounds what is in flight to one step.
    sums = jax.tree.map(lambda leaf: leaf.astype(np.float64), devices_lib.first(sums))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  metrics = summarise(total)
  if dataset.spec.kind == "tokens":
    metrics["perplexity"] = float(np.exp(metrics["nll"]))
  return metrics


def summarise(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns error [%], NLL [nats], ECE [share], Brier score and count from summed `step.prediction_sums`."""
  count = sums["count"]
  return {
    "error": float(100 * sums["errors"] / count),
    "nll": float(sums["nll"] / count),
    "ece": float(np.abs(sums["bin_correct"] - sums["bin_confidence"]).sum() / count),
    "brier": float(sums["brier"] / count),
    "count": int(count),
  }

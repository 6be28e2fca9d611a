"""Exact evaluation of a network or an ensemble: padded, masked, summed over every example, then divided."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ban_jax import checkpoint, data
from ban_jax import devices as devices_lib
from ban_jax.errors import ConfigError
from ban_jax.models import make_model
from ban_jax.step import make_compare_step, make_eval_step
from ban_jax.types import Dataset, Devices, Generation, InputSpec, Model, Variables

Member = Generation | Variables
# The smallest value of what is counted.
EVALUATION_LEAST = {"evaluate.batch_size": 1, "evaluate.training_batch_size": 0}


def make_models(cfg: ConfigDict, spec: InputSpec) -> tuple[Model, Model]:
  """Returns (generation 0's network, the students' network) of a configuration, for a data set's inputs."""
  options = {"compute_dtype": cfg.compute_dtype, "sync_batch_stats": cfg.train.sync_batch_stats}
  student = make_model(cfg.model, spec, **options)
  teacher = make_model(cfg.teacher.model, spec, key="teacher.model", **options) if cfg.teacher.model else student
  return teacher, student


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


def check_given(group: ConfigDict, path: str = "") -> None:
  """Raises a ConfigError where a key is None, which a configuration takes for every key; it has a meaning for one."""
  for name, value in group.items():
    key = path + name
    if isinstance(value, ConfigDict):
      check_given(value, f"{key}.")
    elif value is None and key != "teacher.model":
      raise ConfigError(f"{key} is None: a value is expected")


def check_least(cfg: ConfigDict, least: Mapping[str, int]) -> None:
  """Raises a ConfigError where one of the configuration's whole numbers is below its `least` value, by dotted key."""
  for key, smallest in least.items():
    group, _, name = key.rpartition(".")
    value = (cfg[group] if group else cfg)[name]
    if isinstance(value, bool) or value < smallest:
      raise ConfigError(f"{key} must be at least {smallest}, not {value}")


def check_evaluation(cfg: ConfigDict, dataset: Dataset) -> None:
  """Raises a ConfigError where a batch to be evaluated has more rows than any split has examples, or windows."""
  most = max(_entries(dataset, split) for split in dataset.splits)
  text = dataset.spec.kind == "tokens"
  what = f"the windows of {dataset.spec.shape[0]} tokens in" if text else "the size of"
  for name in ("batch_size", "training_batch_size"):
    if cfg.evaluate[name] > most:
      raise ConfigError(
        f"evaluate.{name}={cfg.evaluate[name]}: expected at most {most}, {what} {dataset.name}'s largest split"
      )


def _entries(dataset: Dataset, split: str) -> int:
  """Returns how many rows a split's examples take, or of a text its windows."""
  return len(dataset.eval_order(split, 1))


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
  before any work: ConfigError for an unknown split, no members or a configuration that cannot be evaluated,
  CheckpointError for a tree that does not fit its network.
  """
  models, trees, dataset, devices = _resolve("evaluate", generations, cfg, devices)
  return evaluate_trees(models, trees, dataset, split, cfg.evaluate.batch_size, devices)


def reliability(
  generations: Member | Sequence[Member],
  cfg: ConfigDict,
  split: str = "test",
  *,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, np.ndarray]:
  """Returns a reliability diagram's numbers on every example of a split: what `evaluate`'s "ece" is the sum of.

  Of 15 bins of the largest probability, b of them ((b-1)/15, b/15], "count" int64 [15], of examples or tokens, and
  "confidence" and "accuracy" float64 [15], the means as shares, not a number where a bin is empty. Several networks are
  an ensemble (Eq. 4). Arguments and errors are those of `evaluate`.
  """
  models, trees, dataset, devices = _resolve("reliability", generations, cfg, devices)
  return bins(sum_predictions(models, trees, dataset, split, cfg.evaluate.batch_size, devices))


def compare(
  generations: Member | Sequence[Member],
  cfg: ConfigDict,
  split: str = "test",
  *,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Compares the predictions of M networks, pair by pair, on every example of a split.

  Returns "agreement" float64 [M, M], the share of examples or tokens for which both predict the same class; "kl"
  float64 [M, M], the mean of KL(p_row || p_column) in nats, which is what the loss of Eq. 2 and 3, with row for teacher
  and column for student, has above the least it can be; and "count". Arguments and errors are those of `evaluate`.
  """
  models, trees, dataset, devices = _resolve("compare", generations, cfg, devices)
  return compare_trees(models, trees, dataset, split, cfg.evaluate.batch_size, devices)


def _resolve(
  what: str, generations: Member | Sequence[Member], cfg: ConfigDict, devices: Sequence[jax.Device] | None
) -> tuple[tuple[Model, ...], tuple[Any, ...], Dataset, Devices]:
  """Returns models, plain trees, data set and devices of what the caller, named `what`, was given; checks it all."""
  check_given(cfg)
  check_least(cfg, EVALUATION_LEAST)
  dataset = data.load(cfg.data)
  check_evaluation(cfg, dataset)
  trees = members_of(generations)
  if not trees:
    raise ConfigError(f"{what} needs at least one network")
  models = fit_models(trees, make_models(cfg, dataset.spec), "member")
  return models, tuple(map(checkpoint.thaw, trees)), dataset, devices_lib.resolve(devices)


def evaluate_trees(
  models: tuple[Model, ...], trees: Sequence[Any], dataset: Dataset, split: str, batch_size: int, devices: Devices
) -> dict[str, float]:
  """Returns `evaluate`'s numbers for plain variables trees that are known to fit their models."""
  metrics = summarise(sum_predictions(models, trees, dataset, split, batch_size, devices))
  if dataset.spec.kind == "tokens":
    metrics["perplexity"] = float(np.exp(metrics["nll"]))
  return metrics


def compare_trees(
  models: tuple[Model, ...], trees: Sequence[Any], dataset: Dataset, split: str, batch_size: int, devices: Devices
) -> dict[str, Any]:
  """Returns `compare`'s numbers for plain variables trees that are known to fit their models, which may all differ."""
  total = _sum_over(make_compare_step, models, trees, dataset, split, batch_size, devices)
  count = total["count"]
  return {"agreement": total["agreement"] / count, "kl": total["kl"] / count, "count": int(count)}


def sum_predictions(
  models: tuple[Model, ...], trees: Sequence[Any], dataset: Dataset, split: str, batch_size: int, devices: Devices
) -> dict[str, np.ndarray]:
  """Returns the float64 sums over a split of `step.prediction_sums`, what `summarise` and `bins` are made from."""
  return _sum_over(make_eval_step, models, trees, dataset, split, batch_size, devices)


def _sum_over(
  make_step: Callable[..., Callable[..., tuple[Any, dict[str, jax.Array]]]],
  models: tuple[Model, ...],
  trees: Sequence[Any],
  dataset: Dataset,
  split: str,
  batch_size: int,
  devices: Devices,
) -> dict[str, np.ndarray]:
  """Returns the float64 sums of an evaluating step over every example of a split, each exactly once.

  A batch larger than the split is cut to the rows that there are, and to what the devices can share equally. Where they
  cannot share the batch, it is rounded up; but a model with a carry keeps its batch, since more rows would start more
  streams from a zero state, and runs on as many of each process's devices as can share it.
  """
  # Whatever is cut off is padding, also of a text: with a row for every window there are no more streams to start.
  batch_size = min(batch_size, -(-_entries(dataset, split) // len(devices)) * len(devices))
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
  step = make_step(models, dataset.fetch, devices)
  total = None
  for index in order:
    carries, sums = step(variables, carries, arrays, devices_lib.split_rows(index, devices))
    # Reading the sums at once bounds what is in flight to one step.
    sums = jax.tree.map(lambda leaf: leaf.astype(np.float64), devices_lib.first(sums))
    total = sums if total is None else jax.tree.map(np.add, total, sums)
  return total


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


def bins(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns `reliability`'s numbers from summed `step.prediction_sums`."""
  count = sums["bin_count"]
  divisor = np.where(count > 0, count, np.nan)
  return {
    "count": count.astype(np.int64),
    "confidence": sums["bin_confidence"] / divisor,
    "accuracy": sums["bin_correct"] / divisor,
  }

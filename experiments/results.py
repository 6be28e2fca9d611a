"""The results of a run: its generations and ensembles evaluated, averaged over seeds, as a Markdown table."""

import contextlib
import math
import statistics
import uuid
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

import ban_jax
from ban_jax import config, job, resolving, storage
from ban_jax.generations import run_generations
from ban_jax.processes import is_primary
from ban_jax.types import Generation

Metrics = Mapping[str, float]
CONFIDENCE = 0.95
# Columns of a table: metric, title, decimals.
COLUMNS = (
  ("validation_perplexity", "validation perplexity", 2),
  ("perplexity", "test perplexity", 2),
  ("bits_per_byte", "bits per byte", 3),
  ("bits_per_character", "bits per character", 3),
  ("error", "test error %", 2),
  ("nll", "NLL", 4),
  ("ece", "ECE", 4),
  ("brier", "Brier", 4),
)
DECIMALS = {metric: decimals for metric, _, decimals in COLUMNS}
# Row name -> metrics, in display order.
Results = dict[str, Metrics]


def name_of(generation: int) -> str:
  """Returns the paper's name of a generation."""
  return f"BAN-{generation}" if generation else "teacher"


def members(generations: int) -> dict[str, tuple[int, ...]]:
  """Returns the rows of a run with this many students: each generation, then Ens*k, which is BAN-1 to BAN-k."""
  rows = {name_of(index): (index,) for index in range(generations + 1)}
  return rows | {f"Ens*{size}": tuple(range(1, size + 1)) for size in range(2, generations + 1)}


def evaluate_run(
  cfg: ConfigDict, workdir: epath.PathLike, *, devices: Sequence[jax.Device], progress: bool
) -> tuple[Results, bool]:
  """Finishes a run and evaluates it: `evaluate_runs` of one."""
  return evaluate_runs([cfg], [workdir], devices=[devices], progress=progress)[0]


def evaluate_runs(
  cfgs: Sequence[ConfigDict],
  workdirs: Sequence[epath.PathLike],
  *,
  devices: Sequence[Sequence[jax.Device]],
  progress: bool,
) -> list[tuple[Results, bool]]:
  """Finishes runs side by side, each on its own devices, and evaluates every row of each on the test split.

  Returns, for each, (results, whether all of it existed already). `workdir/evaluations.json` keeps the evaluations
  beside the digests of the networks that they belong to.
  """
  setups = [job.resolve_run(cfg, own) for cfg, own in zip(cfgs, devices, strict=True)]
  with contextlib.ExitStack() as stack:  # locked until the evaluations are written, too
    held = [
      stack.enter_context(storage.open_workdir(workdir, config.record(cfg)))
      for cfg, workdir in zip(cfgs, workdirs, strict=True)
    ]
    runs = run_generations(setups, held, progress)
    return [_evaluate_run(*run) for run in zip(setups, held, runs, strict=True)]


def _evaluate_run(
  setup: resolving.Setup, workdir: epath.Path, generations: Sequence[Generation]
) -> tuple[Results, bool]:
  rows, results, fresh = members(setup.cfg.generations), {}, {}
  record = workdir / "evaluations.json"
  try:
    kept = storage.numbers(dict(storage.read_json(record)))
  except (FileNotFoundError, ValueError, TypeError):  # evaluated again below
    kept = {}
  digests = [storage.read_json(workdir / f"gen_{g.index}" / "manifest.json")["digest"] for g in generations]
  for name, indices in rows.items():
    own = [digests[index] for index in indices]
    if kept.get(name, {}).get("members") != own:
      metrics = evaluate([generations[index] for index in indices], setup.cfg, setup.devices)
      fresh[name] = {"members": own, "metrics": metrics}
    results[name] = (fresh.get(name) or kept[name])["metrics"]
  if fresh and is_primary():
    storage.write_json(record, kept | fresh)
  return results, not fresh


def evaluate(generations: Sequence[Generation], cfg: ConfigDict, devices: Sequence[jax.Device]) -> Metrics:
  """Returns a row's metrics on the test split and, for text, the validation perplexity, since Table 6 shows both."""
  if len(generations) == 1:  # evaluated when its training ended
    return reported(generations[0].metrics)
  metrics = ban_jax.evaluate(generations, cfg, devices=devices)
  if "perplexity" in metrics:
    metrics["validation_perplexity"] = ban_jax.evaluate(generations, cfg, "validation", devices=devices)["perplexity"]
  return metrics


def reported(own: Metrics) -> Metrics:
  """Returns a generation's own metrics under a table's names: the test metrics and the validation perplexity."""
  metrics = {name.removeprefix("test_"): value for name, value in own.items() if name.startswith("test_")}
  return metrics | {name: own[name] for name in ("validation_perplexity",) if name in own}


def network(model: ConfigDict) -> str:
  """Returns a `model` group as one line, such as "wide_resnet(depth=16, dropout=0.0, width=1)"."""
  return f"{model.name}({', '.join(f'{name}={value}' for name, value in model.items() if name != 'name')})"


def labels(noise: float) -> str:
  """Returns what the training labels of a share of wrong ones are called."""
  return f"{noise:.0%} wrong labels" if noise else "true labels"


def describe(cfg: ConfigDict, loss: str | None = None) -> str:
  """Returns what was trained on what, how and for how long: the line above a table."""
  teacher = f" taught by {network(cfg.teacher.model)}" if cfg.teacher.model else ""
  name = cfg.data.dataset or cfg.data.name
  examples = "tokens" if cfg.data.window else "examples"
  return (
    f"{name}, {cfg.data.train_examples or 'all'} training {examples}, {network(cfg.model)}{teacher}, "
    f"loss {loss or cfg.loss.name}, {cfg.train.epochs} epochs, scale {cfg.scale}, seed {cfg.seed}; "
    "test split, last epoch"
  )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean over seeds and its standard error, which is NaN for a single seed."""
  error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
  return statistics.fmean(values), error


class Difference(NamedTuple):
  """A mean of differences, paired by seed, with its confidence interval (NaN for a single seed)."""

  mean: float
  low: float
  high: float
  seeds: int

  @property
  def text(self) -> str:
    """The difference as a table shows it."""
    interval = "" if math.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]"
    return f"{self.mean:+.2f}{interval}"


def mean_difference(differences: Sequence[float]) -> Difference:
  """Returns the mean of differences that are paired by seed, with Student's 95% interval."""
  import scipy.stats  # slow to import

  mean, error = mean_and_error(differences)
  half = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) if len(differences) > 1 else math.nan
  return Difference(mean, mean - half, mean + half, len(differences))


def paired_difference(per_seed: Sequence[Results], row: str, reference: str, metric: str = "error") -> Difference:
  """Returns a row's metric minus the reference's, paired by seed."""
  return mean_difference([rows[row][metric] - rows[reference][metric] for rows in per_seed])


def table(per_seed: Sequence[Results], reference: str | None = None, compared: str | None = None) -> str:
  """Returns a Markdown table of the test metrics (for text, perplexities first): mean and standard error over seeds.

  With a `reference`, a row's name, there is one more column: the metric `compared`, by default the first, minus the
  reference's, paired by seed.
  """
  columns = [column for column in COLUMNS if column[0] in next(iter(per_seed[0].values()))]
  cells = [["", *(title for _, title, _ in columns), *([f"minus {reference}"] if reference else [])]]
  for name in per_seed[0]:
    row = [name]
    for key, _, digits in columns:
      mean, error = mean_and_error([results[name][key] for results in per_seed])
      row.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(per_seed) > 1 else ""))
    if reference:
      difference = paired_difference(per_seed, name, reference, compared or columns[0][0])
      row.append("" if name == reference else difference.text)
    cells.append(row)
  return markdown(cells)


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table whose first row is the header."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(path: epath.Path, content: str | bytes) -> None:
  """Writes a file whole or not at all; where several processes write the same file, the last one wins."""
  partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
  partial.write_bytes(content.encode() if isinstance(content, str) else content)
  partial.replace(path)

"""Results over seeds: means, differences that are paired by seed, with their intervals, and Markdown tables of them."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ban_jax.errors import ConfigError, look_up
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


def seed_table(runs: Sequence[Sequence[Generation]], reference: str = "teacher") -> str:
  """Returns the generations of several seeds as a Markdown table, each beside its difference from the teacher.

  Args:
    runs: what `run` or `load_run` returned for each seed, all with the same number of generations.
    reference: the row that the others are compared with, "teacher" or "BAN-1".

  Returns:
    A row for each generation, with mean and standard error over seeds of the metrics of the test split (error and ECE
    in percent and as a share, NLL in nats), and the first metric minus the reference's, paired by seed, with Student's
    95% interval.

  Raises:
    ConfigError: no list of runs, runs of different lengths or metrics, or a reference that is no row.

  Examples:
    >>> runs = [[teacher, student], [teacher, student]]
    >>> print(ban_jax.seed_table(runs).splitlines()[0].split("|")[-2].strip())
    minus teacher
  """
  lists = (list, tuple)
  if not isinstance(runs, lists) or not runs or not all(isinstance(run, lists) and run for run in runs):
    raise ConfigError(f"seed_table: expected a list of runs, each a list of generations, not {runs!r:.80}")
  others = [type(one).__name__ for run in runs for one in run if not isinstance(one, Generation)]
  if others:
    raise ConfigError(f"seed_table: a run holds a {others[0]}; expected generations, as run returns them")
  per_seed = [{name_of(one.index): reported(one.metrics) for one in run} for run in runs]
  lengths = [list(rows) for rows in per_seed]
  if any(rows != lengths[0] for rows in lengths):
    raise ConfigError(f"seed_table: the runs have different generations: {', '.join(map(str, lengths))}")
  look_up(per_seed[0], reference, "reference")
  every = [metrics for rows in per_seed for metrics in rows.values()]
  shared = {key for key in every[0] if all(key in metrics for metrics in every)}
  if not shared & set(DECIMALS):
    raise ConfigError("seed_table: the generations share no metric of the test split")
  per_seed = [{name: {key: metrics[key] for key in shared} for name, metrics in rows.items()} for rows in per_seed]
  return table(per_seed, reference)


def name_of(generation: int) -> str:
  """Returns the paper's name of a generation."""
  return f"BAN-{generation}" if generation else "teacher"


def reported(own: Metrics) -> Metrics:
  """Returns a generation's own metrics under a table's names: the test metrics and the validation perplexity."""
  metrics = {name.removeprefix("test_"): value for name, value in own.items() if name.startswith("test_")}
  return metrics | {name: own[name] for name in ("validation_perplexity",) if name in own}


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

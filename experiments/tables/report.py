"""A table as it is written: every cell beside the paper's number, with its uncertainty and its sources."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from etils import epath

from ban_jax import data, summary
from ban_jax.errors import ConfigError
from ban_jax.resolving import make_models
from ban_jax.summary import CONFIDENCE
from experiments import plots, results
from experiments.analysis.memory import trained_sizes
from experiments.tables.graph import Node
from experiments.tables.plot import plot_table
from experiments.tables.spec import Cell, Table
from experiments.tables.values import Entry, entries_of

# Columns of the CSV file, which has a line for each cell; semicolons separate the seeds, their values and sources.
HEADER = (
  *("table", "row", "column", "metric", "scale", "seeds", "paper", "mean", "standard_error", "difference_from_paper"),
  *("minus_reference", "interval_low", "interval_high", "values", "sources"),
)


def setting(cells: Sequence[Cell]) -> str:
  """Returns one line on the training of a table's networks: scale, data, epochs, batch."""
  configs = [node.cfg for cell in cells for members in cell.members for node in members]
  cfg = configs[0]
  examples = "tokens" if cfg.data.window else "examples"
  batches = " or ".join(str(size) for size in sorted({each.train.batch_size for each in configs}))
  return (
    f"scale {cfg.scale}, {cfg.data.name}, {f'{cfg.data.train_examples:,}' if cfg.data.train_examples else 'all'} "
    f"training {examples}, {min(each.train.epochs for each in configs)} epochs, batch {batches}"
  )


class Existing(NamedTuple):
  """What a workdir holds of a table: number of seeds, rows, columns."""

  seeds: int
  rows: set[str]
  columns: set[str]


class Output(NamedTuple):
  """The files of one table at one scale in one workdir."""

  table: Table
  scale: str
  workdir: epath.Path

  def paths(self) -> list[epath.Path]:
    """Returns the paths of the Markdown table, the CSV file and the plot."""
    return [self.workdir / f"{self.table.stem}.{suffix}" for suffix in ("md", "csv", "png")]

  def existing(self) -> Existing:
    """Returns what the workdir holds of this table; raises a ConfigError if that is of another scale."""
    path = self.paths()[1]
    if not path.exists():
      return Existing(0, set(), set())
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    scales = {row.get("scale") for row in rows}
    if scales - {self.scale}:
      other = ", ".join(sorted(map(str, scales)))
      raise ConfigError(f"{path} is of the scale {other}, not {self.scale}; give another --workdir")
    seeds = max((int(seed) + 1 for row in rows for seed in (row.get("seeds") or "").split(";") if seed), default=0)
    return Existing(seeds, {row.get("row") for row in rows}, {row.get("column") for row in rows})

  def write(self, cells: Sequence[Cell], seeds: int, *, plot: bool) -> str:
    """Writes the table, the CSV file and, with `plot`, the plot, from the finished values; returns the table."""
    self.workdir.mkdir(parents=True, exist_ok=True)
    entries = entries_of(self.table, cells, self.workdir)
    markdown, numbers, picture = self.paths()
    text = self._text(entries, seeds)
    results.write(markdown, text)
    results.write(numbers, self._csv(entries))
    if plot:
      plots.save(plot_table(self.table, self.scale, setting(cells), entries), picture)
    return text

  def _text(self, entries: Sequence[Entry], seeds: int) -> str:
    table, cells = self.table, [entry.cell for entry in entries]
    minus = f"minus {table.reference}"
    source = table.heading
    changed = "".join(f", {key}={value}" for key, value in table.changes.items())
    rows = [["", "", source, f"ours, {self.scale}", "difference", f"{source} {minus}", f"ours {minus}"]]
    shown = None
    for entry in entries:
      row = entry.cell.row
      rows.append(["" if row == shown else row, *_entry(entry, seeds)])
      shown = row
    return "\n\n".join([
      f"# {table.label}: {table.title}",
      f"Ours: {setting(cells)}{changed}; {table.unit}, last epoch; mean ± standard error over {seeds} "
      f"seed{'s' * (seeds > 1)}. {table.source.capitalize()}: {table.dataset}, one number per cell, no error bars. "
      f"The difference is ours minus {table.source}. Ours {minus} is paired by seed: mean [{CONFIDENCE:.0%} confidence "
      "interval, Student's t].",
      summary.markdown(rows),
      f"![{table.label}]({table.stem}.png)",
      "## Networks",
      summary.markdown(_networks(table, cells)),
      "## Where the numbers come from",
      "By row, column and seed, the generations whose mean probabilities were tested; the `manifest.json` of each has "
      "its teacher's digest, configuration, data, seed, software and commit.",
      "\n".join(
        f"- {cell.row}, {cell.column}, seed {value.seed}: {value.value:.{summary.DECIMALS[cell.metric]}f} from "
        f"{', '.join(value.sources)}"
        for cell, values, *_ in entries
        for value in values
      ),
    ]) + "\n"  # fmt: skip

  def _csv(self, entries: Sequence[Entry]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    for entry in entries:
      cell, difference = entry.cell, entry.difference or (math.nan,) * 3
      writer.writerow([
        *(self.table.number, cell.row, cell.column, cell.metric, self.scale),
        ";".join(str(value.seed) for value in entry.values),
        "" if cell.paper is None else cell.paper,
        *(_number(number, ".6g") for number in (entry.mean, entry.error, entry.from_paper, *difference[:3])),
        ";".join(f"{value.value:.6g}" for value in entry.values),
        ";".join("+".join(value.sources) for value in entry.values),
      ])  # fmt: skip
    return file.getvalue()


def _number(number: float, form: str) -> str:
  """Returns a formatted number, or nothing for NaN."""
  return "" if math.isnan(number) else format(number, form)


def _entry(entry: Entry, seeds: int) -> list[str]:
  """Returns an entry's line in the Markdown table, from its column to its difference from the reference."""
  cell, difference = entry.cell, entry.difference
  form = f".{summary.DECIMALS[cell.metric] if cell.metric else 2}f"  # a cell that is only quoted has no metric
  paper = "" if cell.paper is None else f"{cell.paper:g}"
  ours = "…" if cell.members else "quoted only"
  if entry.values:
    error = "" if math.isnan(entry.error) else f" ± {entry.error:{form}}"
    ours = f"{entry.mean:{form}}{error}{_of_seeds(len(entry.values), seeds)}"
  compared = "" if entry.reference is None else "…"
  if difference is not None:
    interval = "" if math.isnan(difference.low) else f" [{difference.low:+{form}}, {difference.high:+{form}}]"
    compared = f"{difference.mean:+{form}}{interval}{_of_seeds(difference.seeds, seeds)}"
  numbers = [_number(number, f"+{form}") for number in (entry.from_paper, entry.paper_difference)]
  return [cell.column, paper, ours, *numbers, compared]


def _of_seeds(count: int, seeds: int) -> str:
  return f" ({count} of {seeds} seeds)" if count < seeds else ""


def _networks(table: Table, cells: Iterable[Cell]) -> list[list[str]]:
  """Returns the table of networks: their columns, their trained parameters and those that the paper prints."""
  columns: dict[tuple[str, ...], list[str]] = {}
  for cell in cells:
    if cell.members:
      node = cell.members[0][-1]
      printed = table.parameters().get(node.paper_network)
      paper = node.paper_network + (f", {printed}" if printed else "")
      columns.setdefault((cell.row, node.network, f"{_parameters(node):,}", paper), []).append(cell.column)
  header = ["row", "network", "trained parameters", "the paper's network, parameters", "columns"]
  return [header, *([*key, "; ".join(dict.fromkeys(names)).replace("*", r"\*")] for key, names in columns.items())]


def _parameters(node: Node) -> int:
  """Returns the number of trained parameters, without those that are copied from the teacher."""
  model = make_models(node.cfg, data.describe(node.cfg.data).spec)[min(node.generation, 1)]
  return sum(trained_sizes(model).values())

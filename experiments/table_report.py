"""A table as it is written: every cell beside the paper's number, what is certain about it, and where it comes from."""

import csv
import hashlib
import io
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from ban_jax import processes
from ban_jax.errors import ConfigError
from ban_jax.job import make_models
from ban_jax.processes import is_primary
from ban_jax.storage import load_together
from ban_jax.types import Devices
from experiments import plan, programs, results
from experiments.plan import Part

if TYPE_CHECKING:  # heavy, or imports this
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

  from experiments.tables import Table

CONFIDENCE = 0.95
# Of the file of numbers, a line a cell; of several seeds, values and sources are separated by semicolons.
HEADER = (
  *("table", "row", "column", "metric", "scale", "seeds", "paper", "mean", "standard_error", "difference_from_paper"),
  *("minus_reference", "interval_low", "interval_high", "values", "sources"),
)


class Cell(NamedTuple):
  """A cell: the networks behind it by seed (none where it is only quoted), and the paper's number, if there is one."""

  row: str
  column: str
  metric: str
  members: tuple[tuple[Part, ...], ...]  # [seeds][members of the ensemble, or the one network]
  paper: float | None
  control: bool  # whether it is none of the paper's


class Value(NamedTuple):
  """What one seed gave a cell, and the run directories that it comes from."""

  seed: int
  value: float
  sources: tuple[str, ...]


Values = Mapping[tuple[str, str], Sequence[Value]]  # (row, column) -> those that are finished, by seed


# --- reading ---------------------------------------------------------------------------------------------------------


def _record(members: Sequence[Part], workdir: epath.Path) -> epath.Path:
  """Returns where an ensemble's evaluation is kept."""
  digest = hashlib.sha256(" ".join(part.path for part in members).encode()).hexdigest()[:8]
  return workdir / "ensembles" / f"{members[-1].run.removeprefix('runs/')}-{len(members)}-{digest}.json"


def evaluate_ensemble(members: Sequence[Part], workdir: epath.Path, devices: Devices) -> None:
  """Evaluates an ensemble of finished generations (Eq. 4) and keeps its metrics, unless they are kept already."""
  if not processes.on_any_process(ensemble_metrics(members, workdir) is None):
    return
  loaded = [load_together(workdir / part.path) for part in members]
  metrics = results.evaluate([generation for generation, _ in loaded], members[-1].cfg, devices)
  if is_primary():
    path = _record(members, workdir)
    path.parent.mkdir(exist_ok=True)
    digests = {part.path: manifest["digest"] for part, (_, manifest) in zip(members, loaded, strict=True)}
    _write(path, json.dumps({"members": digests, "metrics": metrics}, indent=2).encode())


def ensemble_metrics(
  members: Sequence[Part], workdir: epath.Path, known: dict[str, plan.Found] | None = None
) -> Mapping[str, float] | None:
  """Returns an ensemble's metrics, or None where they are not there, or are those of other networks than now lie there.

  Raises a CheckpointError for a damaged generation.
  """
  found = [plan.find(part, workdir, known) for part in members]
  try:
    kept = json.loads(_record(members, workdir).read_text())
    now = {part.path: here and here[1]["digest"] for part, here in zip(members, found, strict=True)}
    return kept["metrics"] if kept["members"] == now else None
  except (FileNotFoundError, ValueError, KeyError, TypeError):  # it can be made again
    return None


def values_of(cells: Iterable[Cell], workdir: epath.Path) -> Values:
  """Returns every cell's values as far as they are finished."""
  values, known = {}, {}
  for cell in cells:
    found = []
    for seed, members in enumerate(cell.members):
      if len(members) > 1:
        metrics = ensemble_metrics(members, workdir, known)
      else:
        here = plan.find(members[0], workdir, known)
        metrics = here and results.reported(here[0])
      if metrics is not None:
        found.append(Value(seed, float(metrics[cell.metric]), tuple(part.path for part in members)))
    values[cell.row, cell.column] = found
  return values


# --- statistics ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
  """A mean of differences, paired by seed, with its confidence interval (not numbers where there is one seed)."""

  mean: float
  low: float
  high: float
  seeds: int


def paired(values: Sequence[Value], reference: Sequence[Value]) -> Difference | None:
  """Returns values minus reference over the seeds that both have, with Student's interval; None where they share none.

  The interval is that of the mean of the differences at a confidence of 95%, by t with one degree less than seeds.
  """
  import scipy.stats

  by_seed = {value.seed: value.value for value in reference}
  differences = [value.value - by_seed[value.seed] for value in values if value.seed in by_seed]
  if not differences:
    return None
  mean, error = results.mean_and_error(differences)
  half = error * scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) if len(differences) > 1 else math.nan
  return Difference(mean, mean - half, mean + half, len(differences))


def mean_of(values: Sequence[Value]) -> tuple[float, float]:
  """Returns mean and standard error of a cell's values."""
  return results.mean_and_error([value.value for value in values])


# --- the table -------------------------------------------------------------------------------------------------------


def in_order(names: Iterable[str]) -> list[str]:
  """Returns the names, each once, in the order in which they first come."""
  return list(dict.fromkeys(names))


def references_of(table: "Table", cells: Sequence[Cell]) -> dict[tuple[str, str], Cell | None]:
  """Returns, by row and column, the cell that each is compared with; a reference itself is compared with none."""
  by_place = {(cell.row, cell.column): cell for cell in cells}
  references = {}
  for cell in cells:
    ending = next((end for end in table.metrics if end and cell.column.endswith(f" {end}")), "")
    reference = by_place.get((cell.row, f"{table.reference} {ending}".strip()))
    references[cell.row, cell.column] = None if reference is cell else reference
  return references


def setting(cells: Sequence[Cell]) -> str:
  """Returns what a table's networks are trained on, and for how long."""
  configs = [part.cfg for cell in cells for members in cell.members for part in members]
  cfg = configs[0]
  examples = "tokens" if cfg.data.window else "examples"
  batches = " or ".join(str(size) for size in sorted({each.train.batch_size for each in configs}))
  return (
    f"scale {cfg.scale}, {cfg.data.name}, {f'{cfg.data.train_examples:,}' if cfg.data.train_examples else 'all'} "
    f"training {examples}, {min(each.train.epochs for each in configs)} epochs, batch {batches}"
  )


class Before(NamedTuple):
  """What a workdir has of a table: from how many seeds, and which rows and columns."""

  seeds: int
  rows: set[str]
  columns: set[str]


class Output:
  """The files of one table at one scale in one workdir."""

  def __init__(self, table: "Table", scale: str, workdir: epath.Path):
    self._table, self._scale, self._workdir = table, scale, workdir

  def paths(self) -> list[epath.Path]:
    """Returns the paths of table, numbers and plot."""
    return [self._workdir / f"table{self._table.number}.{ending}" for ending in ("md", "csv", "png")]

  def check(self) -> Before:
    """Returns what the workdir has of this table.

    Raises a ConfigError where it is of another scale: no table mixes two.
    """
    path = self.paths()[1]
    if not path.exists():
      return Before(0, set(), set())
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    scales = {row.get("scale") for row in rows}
    if scales - {self._scale}:
      other = ", ".join(sorted(map(str, scales)))
      raise ConfigError(f"{path} is of the scale {other}, not {self._scale}; give another --workdir")
    seeds = max((int(seed) + 1 for row in rows for seed in (row.get("seeds") or "").split(";") if seed), default=0)
    return Before(seeds, {row.get("row") for row in rows}, {row.get("column") for row in rows})

  def write(self, cells: Sequence[Cell], seeds: int, *, plot: bool) -> str:
    """Writes the table, its numbers and, if asked, its plot, as far as the cells are finished; returns the table."""
    self._workdir.mkdir(parents=True, exist_ok=True)
    values = values_of(cells, self._workdir)
    text = self._text(cells, seeds, values)
    table, numbers, picture = self.paths()
    _write(table, text.encode())
    _write(numbers, self._csv(cells, values).encode())
    if plot:
      file = io.BytesIO()
      draw(self._table, self._scale, cells, values).savefig(file, format="png", dpi=150)
      _write(picture, file.getvalue())
    return text

  def _text(self, cells: Sequence[Cell], seeds: int, values: Values) -> str:
    table = self._table
    references = references_of(table, cells)
    lines = [["", "", "paper", f"ours, {self._scale}", "difference", f"paper minus {table.reference}",
              f"ours minus {table.reference}"]]  # fmt: skip
    shown = None
    for cell in cells:
      reference = references[cell.row, cell.column]
      lines.append([
        cell.row if cell.row != shown else "",
        cell.column,
        "" if cell.paper is None else f"{cell.paper:g}",
        _mean(values[cell.row, cell.column], seeds) if cell.members else "quoted only",
        _from_paper(cell, values),
        _paper_difference(cell, reference),
        _paired_difference(cell, reference, seeds, values),
      ])  # fmt: skip
      shown = cell.row
    parts = [
      f"# Table {table.number}: {table.title}",
      f"Ours: {setting(cells)}; {table.unit}, last epoch; mean ± standard error over {seeds} "
      f"seed{'s' * (seeds > 1)}. The paper's: {table.dataset}, one number a cell, no error bars. The difference "
      f"is ours minus the paper's. Ours minus {table.reference} is paired by seed: mean [{CONFIDENCE:.0%} confidence "
      "interval, Student's t].",
      results.markdown(lines),
      f"![Table {table.number}](table{table.number}.png)",
      "## Networks",
      results.markdown(self._networks(cells)),
      "## Where the numbers come from",
      "By row, column and seed, the generations whose mean probabilities were tested; the `manifest.json` of each has "
      "its teacher's digest, configuration, data, seed, software and commit.",
      "\n".join(
        f"- {cell.row}, {cell.column}, seed {value.seed}: {value.value:.2f} from {', '.join(value.sources)}"
        for cell in cells
        for value in values[cell.row, cell.column]
      ),
    ]
    return "\n\n".join(parts) + "\n"

  def _networks(self, cells: Iterable[Cell]) -> list[list[str]]:
    """Returns which network is behind which columns, with its trained parameters and those that the paper prints."""
    columns: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
      if cell.members:
        part = cell.members[0][-1]
        printed = self._table.parameters.get(part.stands_for)
        paper = part.stands_for + (f", {printed}" if printed else "")
        columns.setdefault((cell.row, part.network, f"{parameters(part):,}", paper), []).append(cell.column)
    lines = [["row", "network", "trained parameters", "the paper's network, parameters", "columns"]]
    return lines + [[*key, "; ".join(in_order(names)).replace("*", r"\*")] for key, names in columns.items()]

  def _csv(self, cells: Sequence[Cell], values: Values) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEADER)
    references = references_of(self._table, cells)
    for cell in cells:
      found = values[cell.row, cell.column]
      mean, error = mean_of(found) if found else (math.nan, math.nan)
      other = references[cell.row, cell.column]
      pair = other and paired(found, values[other.row, other.column])
      numbers = [mean, error, math.nan if cell.paper is None else mean - cell.paper, *(pair or (math.nan,) * 3)[:3]]
      writer.writerow([
        *(self._table.number, cell.row, cell.column, cell.metric, self._scale),
        ";".join(str(value.seed) for value in found),
        "" if cell.paper is None else cell.paper,
        *("" if math.isnan(number) else f"{number:.6g}" for number in numbers),
        ";".join(f"{value.value:.6g}" for value in found),
        ";".join("+".join(value.sources) for value in found),
      ])  # fmt: skip
    return file.getvalue()


def _mean(found: Sequence[Value], seeds: int) -> str:
  if not found:
    return "…"
  mean, error = mean_of(found)
  return f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}") + _of_seeds(len(found), seeds)


def _of_seeds(count: int, seeds: int) -> str:
  return f" ({count} of {seeds} seeds)" if count < seeds else ""


def _from_paper(cell: Cell, values: Values) -> str:
  found = values[cell.row, cell.column]
  return f"{mean_of(found)[0] - cell.paper:+.2f}" if found and cell.paper is not None else ""


def _paper_difference(cell: Cell, reference: Cell | None) -> str:
  if reference is None or None in (cell.paper, reference.paper):
    return ""
  return f"{cell.paper - reference.paper:+.2f}"


def _paired_difference(cell: Cell, reference: Cell | None, seeds: int, values: Values) -> str:
  if reference is None:
    return ""
  found = paired(values[cell.row, cell.column], values[reference.row, reference.column])
  if found is None:
    return "…"
  interval = "" if math.isnan(found.low) else f" [{found.low:+.2f}, {found.high:+.2f}]"
  return f"{found.mean:+.2f}{interval}{_of_seeds(found.seeds, seeds)}"


def parameters(part: Part) -> int:
  """Returns the trained parameters of a part's network: those that it copies from its teacher are left out."""
  spec = programs.describe(part.cfg).spec
  model = make_models(part.cfg, spec)[min(part.generation, 1)]
  return sum(programs.trained_sizes(model).values())


def _write(path: epath.Path, content: bytes) -> None:
  """Writes a file whole or not at all; several processes may write the same one, and the last one's stays."""
  partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
  partial.write_bytes(content)
  partial.replace(path)


# --- the plot --------------------------------------------------------------------------------------------------------


def draw(table: "Table", scale: str, cells: Sequence[Cell], values: Values) -> "Figure":
  """Draws a table: above, its numbers, every seed a dot; below, what each column has beyond its reference.

  The paper's numbers are hollow diamonds. At a scale that is not the paper's they stand in the lower panels only, since
  what can be compared across scales is the difference.
  """
  import matplotlib.figure

  trained = [cell for cell in cells if cell.members]
  rows, columns = in_order(cell.row for cell in trained), in_order(cell.column for cell in trained)
  panels = [rows] if table.by_row else [[row] for row in rows]
  width = max(1.1 * len(rows) * len(columns) ** 0.5, 7) if table.by_row else max(0.75 * len(columns), 5) * len(panels)
  figure = matplotlib.figure.Figure(figsize=(min(width, 20), 7.5), layout="constrained")
  grid = figure.subplots(2, len(panels), squeeze=False, sharex="col", sharey="row" if table.by_row else False)
  figure.suptitle(f"Table {table.number}: {table.title}\n{setting(cells)}", fontsize="medium")
  for (above, below), shown in zip(grid.T, panels, strict=True):
    own = [cell for cell in trained if cell.row in shown]
    references = references_of(table, own)
    if table.by_row:
      _draw_rows(above, below, table, scale, own, references, values)
    else:
      _draw_columns(above, below, table, scale, own, references, values)
      above.set_title(shown[0], fontsize="medium")
    for axes in (above, below):
      axes.grid(axis="y", alpha=0.3)
      for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    below.axhline(0, color="0.5", linewidth=1, linestyle="--")
  grid[0, 0].set_ylabel(table.unit)
  grid[1, 0].set_ylabel(f"minus {table.reference}\n(paired, {CONFIDENCE:.0%} interval)")
  handles, labels = grid[0, 0].get_legend_handles_labels()
  more = [pair for pair in zip(*grid[1, 0].get_legend_handles_labels(), strict=True) if pair[1] not in labels]
  handles, labels = [*handles, *(h for h, _ in more)], [*labels, *(text for _, text in more)]
  if handles:
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
  return figure


def _draw_rows(above: "Axes", below: "Axes", table: "Table", scale: str, cells, references, values: Values) -> None:
  """Draws the rows side by side, a color a column."""
  import matplotlib

  rows, columns = in_order(cell.row for cell in cells), in_order(cell.column for cell in cells)
  colors = matplotlib.colormaps["tab10"].colors
  for cell in cells:
    order = columns.index(cell.column)
    place = rows.index(cell.row) + 0.7 * ((order + 0.5) / len(columns) - 0.5)
    reference = references[cell.row, cell.column]
    _draw_cell(above, below, table, scale, cell, reference, values, place, colors[order % 10], label=cell.column)
  below.set_xticks(range(len(rows)), rows, **({"rotation": 20, "ha": "right"} if len(rows) > 4 else {}))
  below.set_xlim(-0.6, len(rows) - 0.4)


def _draw_columns(above: "Axes", below: "Axes", table: "Table", scale: str, cells, references, values: Values) -> None:
  """Draws the columns side by side: generations, joined by a line, their ensembles, then all else."""
  sequence = [cell for cell in cells if cell.column == table.reference or cell.column.startswith("BAN-")]
  ensembles = [cell for cell in cells if "*" in cell.column and not cell.control]
  others = [cell for cell in cells if cell not in sequence and cell not in ensembles]
  shown = [*sequence, *ensembles, *others]
  for place, cell in enumerate(shown):
    color = "tab:green" if cell.control else "tab:orange" if cell in ensembles else "tab:blue"
    reference = references[cell.row, cell.column]
    _draw_cell(above, below, table, scale, cell, reference, values, place, color, label="")
  line = [(place, mean_of(found)[0]) for place, cell in enumerate(sequence) if (found := values[cell.row, cell.column])]
  if len(line) > 1:
    above.plot(*zip(*line, strict=True), color="tab:blue", linewidth=1)
  below.set_xticks(range(len(shown)), [cell.column for cell in shown], rotation=35, ha="right")
  below.set_xlim(-0.6, len(shown) - 0.4)


def _draw_cell(
  above: "Axes",
  below: "Axes",
  table: "Table",
  scale: str,
  cell: Cell,
  reference: Cell | None,
  values,
  place,
  color,
  label,
) -> None:
  found = values[cell.row, cell.column]
  drawn = {entry for axes in (above, below) for entry in axes.get_legend_handles_labels()[1]}
  if found:
    mean, error = mean_of(found)
    spread = (0.03 if table.by_row else 0.12) * np.linspace(-1, 1, len(found)) if len(found) > 1 else [0]
    above.plot(place + np.asarray(spread), [value.value for value in found], ".", color=color, alpha=0.4)
    named = label if label and label not in drawn else None
    above.errorbar(place, mean, 0 if math.isnan(error) else error, fmt="o", color=color, capsize=4, label=named)
    pair = reference and paired(found, values[reference.row, reference.column])
    if pair:
      half = 0 if math.isnan(pair.low) else pair.high - pair.mean
      below.errorbar(place, pair.mean, half, fmt="o", color=color, capsize=4)
  if cell.paper is not None:
    hollow = {"marker": "D", "color": color, "markerfacecolor": "none", "linestyle": "none"}
    named = "the paper's" if "the paper's" not in drawn else None
    if scale == "paper":
      above.plot(place, cell.paper, **hollow, label=named)
    if reference is not None and reference.paper is not None:
      below.plot(place, cell.paper - reference.paper, **hollow, label=named)

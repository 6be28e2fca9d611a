"""A table as a plot: its numbers above, every seed a dot; below, the difference of each column from its reference."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

from ban_jax import plotting
from ban_jax.summary import CONFIDENCE
from experiments import plots
from experiments.tables.spec import Table
from experiments.tables.values import Entry


class Panel(NamedTuple):
  """Two axes, one above the other, and the entries that are plotted in them."""

  above: "matplotlib.axes.Axes"
  below: "matplotlib.axes.Axes"
  entries: Sequence[Entry]
  absolute: bool  # whether the paper's numbers are plotted above, too
  source: str  # whose numbers they are


def _names(entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
  """Returns the names of the rows and of the columns, each once."""
  return list(dict.fromkeys(entry.cell.row for entry in entries)), list(dict.fromkeys(e.cell.column for e in entries))


def plot_table(table: Table, scale: str, setting: str, entries: Sequence[Entry]) -> "matplotlib.figure.Figure":
  """Plots a table; the paper's numbers are hollow diamonds.

  Below the paper's scale they are only in the lower panels, since only differences can be compared across scales.
  """
  kind = next(iter(table.metrics.values())).removeprefix("validation_")  # others have another axis
  trained = [e for e in entries if e.cell.members and e.cell.metric.removeprefix("validation_") == kind]
  rows, columns = _names(trained)
  groups = [rows] if table.by_row else [[row] for row in rows]
  width = max(1.1 * len(rows) * len(columns) ** 0.5, 7) if table.by_row else max(0.75 * len(columns), 5) * len(groups)
  figure = plotting.figure_of(min(width, 20), 7.5)
  grid = figure.subplots(2, len(groups), squeeze=False, sharex="col", sharey="row" if table.by_row else False)
  figure.suptitle(f"{table.label}: {table.title}\n{setting}", fontsize="medium")
  for (above, below), group in zip(grid.T, groups, strict=True):
    panel = Panel(above, below, [entry for entry in trained if entry.cell.row in group], scale == "paper", table.source)
    if table.by_row:
      _plot_rows(panel)
    else:
      _plot_columns(panel, table.reference)
      above.set_title(group[0], fontsize="medium")
    for axes in (above, below):
      plotting.tidy(axes, grid=True)
    plotting.zero_line(below)
  grid[0, 0].set_ylabel(table.unit)
  grid[1, 0].set_ylabel(f"minus {table.reference}\n(paired, {CONFIDENCE:.0%} interval)")
  legend = {}
  for axes in grid[:, 0]:
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
      legend.setdefault(label, handle)
  if legend:
    place = {"loc": "outside lower center", "ncols": min(len(legend), 4), "frameon": False}
    figure.legend(legend.values(), legend.keys(), **place)
  return figure


def _plot_rows(panel: Panel) -> None:
  """Plots the rows side by side, with a color for each column."""
  rows, columns = _names(panel.entries)
  colors = matplotlib.colormaps["tab10"].colors
  for entry in panel.entries:
    order = columns.index(entry.cell.column)
    place = rows.index(entry.cell.row) + 0.7 * ((order + 0.5) / len(columns) - 0.5)
    _plot_entry(panel, entry, place, colors[order % 10], label=entry.cell.column, width=0.03)
  panel.below.set_xticks(range(len(rows)), rows, **({"rotation": 20, "ha": "right"} if len(rows) > 4 else {}))
  panel.below.set_xlim(-0.6, len(rows) - 0.4)


def _plot_columns(panel: Panel, reference: str) -> None:
  """Plots the columns side by side: generations, joined by a line, their ensembles, then the others."""

  def rank(entry: Entry) -> int:
    column = entry.cell.column
    if column == reference or column.startswith("BAN-"):
      return 0
    return 1 if "*" in column and not entry.cell.control else 2

  shown = sorted(panel.entries, key=rank)
  for place, entry in enumerate(shown):
    color = "tab:green" if entry.cell.control else "tab:orange" if rank(entry) == 1 else "tab:blue"
    _plot_entry(panel, entry, place, color)
  line = [(place, entry.mean) for place, entry in enumerate(shown) if rank(entry) == 0 and entry.values]
  if len(line) > 1:
    panel.above.plot(*zip(*line, strict=True), color="tab:blue", linewidth=1)
  panel.below.set_xticks(range(len(shown)), [entry.cell.column for entry in shown], rotation=35, ha="right")
  panel.below.set_xlim(-0.6, len(shown) - 0.4)


def _plot_entry(
  panel: Panel, entry: Entry, place: float, color: object, *, label: str | None = None, width: float = 0.12
) -> None:
  """Plots the seeds, their mean and standard error, the difference from the reference, and the paper's numbers."""
  style = {"fmt": "o", "color": color, "capsize": 4}
  if entry.values:
    plots.seeds(panel.above, place, [value.value for value in entry.values], color, width=width)
    panel.above.errorbar(place, entry.mean, np.nan_to_num(entry.error), label=label, **style)
  if entry.difference is not None:
    half = np.nan_to_num(entry.difference.high - entry.difference.mean)
    panel.below.errorbar(place, entry.difference.mean, half, **style)
  diamond = {"marker": "D", "color": color, "markerfacecolor": "none", "linestyle": "none", "label": panel.source}
  if panel.absolute and entry.cell.paper is not None:
    panel.above.plot(place, entry.cell.paper, **diamond)
  if not math.isnan(entry.paper_difference):
    panel.below.plot(place, entry.paper_difference, **diamond)

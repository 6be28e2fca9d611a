"""Plots of generations: calibration, agreement with each other, and dark knowledge during training."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ban_jax.errors import ConfigError
from ban_jax.types import Generation

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

RELIABILITY = ("count", "confidence", "accuracy")
# Metric and axis label of each bar chart.
CALIBRATION = (("ece", "ECE (share)"), ("nll", "NLL (nats)"), ("brier", "Brier score"))
# Recorded key and axis label of each dark-knowledge plot (ban_jax/gradient.py).
DARK_KNOWLEDGE = (
  ("dark_share", "dark-knowledge share\nof the squared gradient"),
  ("correct_gradient", "mean correct-class term\n$q_* - p_*$ (probability)"),
)


def figure_of(width: float, height: float) -> "Figure":
  """Returns an empty figure of this size in inches, which needs no display."""
  try:
    import matplotlib.figure  # slow to import, and needed by those who plot
  except ImportError as error:
    raise ConfigError("plots need matplotlib: pip install 'ban_jax[plots]'") from error

  return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def tidy(axes: "Axes", *, grid: bool = False) -> None:
  """Removes the upper and the right spine; `grid` adds light horizontal lines."""
  axes.spines[["top", "right"]].set_visible(False)
  if grid:
    axes.grid(axis="y", alpha=0.3)


def zero_line(axes: "Axes") -> None:
  """Draws a dashed line where y is 0."""
  axes.axhline(0, color="0.5", linewidth=1, linestyle="--")


def dark_knowledge(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]] | None:
  """Returns a student's dark-knowledge share and correct-class term by epoch, or None if they were not recorded."""
  if not all("dark_share" in row for row in history):
    return None
  return {key: [row[key] for row in history] for key in ("epoch", *(key for key, _ in DARK_KNOWLEDGE))}


def _colors(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
  """Returns a color for each name, dark to light; even the lightest can be read on white."""
  import matplotlib

  steps = max(len(names) - 1, 1)
  return {name: matplotlib.colormaps["viridis"](0.8 * place / steps) for place, name in enumerate(names)}


def _check(expected: str, rows: Sequence[Any], parts: Sequence[str]) -> None:
  """Raises a ConfigError unless there are rows, all dictionaries in which these parts are numbers."""
  for row in rows or [None]:
    if not (isinstance(row, Mapping) and all(np.asarray(row.get(part)).dtype.kind in "fiu" for part in parts)):
      raise ConfigError(f"{expected}: a dictionary with numbers for {', '.join(parts)}")


def _values(given: Any) -> list[Any]:
  return list(given.values()) if isinstance(given, Mapping) else []


def plot_calibration(
  reliability: Mapping[str, Mapping[str, np.ndarray]],
  metrics: Mapping[str, Mapping[str, float]],
  unit: str = "examples",
) -> "Figure":
  """Plots a reliability diagram of each network, and bars of ECE, NLL and Brier score.

  Reference: Guo et al. 2017, arXiv:1706.04599.

  Args:
    reliability: what `reliability` returned for each network, by name.
    metrics: what `evaluate` returned for each, by the same names.
    unit: what was counted, "examples" or "tokens".

  Returns:
    A matplotlib Figure; `figure.savefig(path)` writes it, and a notebook shows it.

  Raises:
    ConfigError: no network, other names in `metrics`, or matplotlib is not installed.

  Examples:
    >>> found = {"student": ban_jax.reliability(student, cfg, dataset=data)}
    >>> ban_jax.plot_calibration(found, {"student": ban_jax.evaluate(student, cfg, dataset=data)})
    <Figure size 900x400 with 6 Axes>
  """
  _check("plot_calibration: expected, by name, what reliability returned", _values(reliability), RELIABILITY)
  _check("plot_calibration: expected, by name, what evaluate returned", _values(metrics), list(dict(CALIBRATION)))
  if list(reliability) != list(metrics):
    raise ConfigError(
      f"plot_calibration: reliability of {list(reliability)} and metrics of {list(metrics)}; expected the same networks"
    )
  names = list(metrics)
  colors = _colors(names)
  columns = min(max(len(names), 3), 4)
  rows = math.ceil(len(names) / columns)
  heights = (2.9 * rows, 0.3 * len(names) + 0.8)  # in inches
  figure = figure_of(3 * columns, sum(heights))
  halves: Any = figure.subfigures(2, 1, height_ratios=heights)
  above, below = halves
  panels = above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
  for axes in panels[len(names) :]:
    axes.set_visible(False)
  for place, (axes, (name, found)) in enumerate(zip(panels, reliability.items(), strict=False)):
    found = {key: np.asarray(value) for key, value in found.items()}
    shares = found["count"] / found["count"].sum()
    edges = np.linspace(0, 1, len(shares) + 1)
    axes.bar(edges[:-1], shares, edges[1], align="edge", color="0.85")
    axes.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1)
    full = shares > 0
    line = (found["confidence"][full], found["accuracy"][full])
    axes.plot(*line, color=colors[name], linewidth=1)
    # The area of a dot grows with its bin, so that bins of a few examples hardly show.
    axes.scatter(*line, s=4 + 60 * np.sqrt(shares[full]), color=colors[name], zorder=3, clip_on=False)
    axes.set(title=name, xlim=(0, 1), ylim=(0, 1.02), aspect="equal")
    axes.title.set_size("medium")
    axes.xaxis.set_tick_params(labelbottom=place + columns >= len(names))
    tidy(axes)
  above.supxlabel("confidence (largest probability), mean of a bin", size="medium")
  above.supylabel(f"accuracy of a bin (line);\nshare of {unit} in it (bars)", size="medium")
  for axes, (metric, label) in zip(below.subplots(1, len(CALIBRATION), sharey=True), CALIBRATION, strict=True):
    bars = axes.barh(names, [metrics[name][metric] for name in names], color=colors.values())
    axes.bar_label(bars, fmt="%.3g", size="small", padding=2)
    axes.set_xlabel(label)
    axes.margins(x=0.2)
    tidy(axes)
  axes.invert_yaxis()  # shared by all three charts: the first name is on top
  return figure


def plot_agreement(compared: Mapping[str, Any], names: Sequence[str], unit: str = "examples") -> "Figure":
  """Plots two annotated matrices: the share of examples that two networks classify alike, and their mean KL.

  Args:
    compared: what `compare` returned for M networks.
    names: the networks' M names, in the same order.
    unit: what was counted, "examples" or "tokens".

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: another number of names, or matplotlib is not installed.

  Examples:
    >>> pairs = ban_jax.compare([teacher, student], cfg, dataset=data)
    >>> len(ban_jax.plot_agreement(pairs, ["teacher", "BAN-1"]).get_axes())
    2
  """
  _check("plot_agreement: expected what compare returned", [compared], ("agreement", "kl"))
  count = len(np.atleast_1d(compared["agreement"]))
  if not isinstance(names, list | tuple) or len(names) != count or not all(isinstance(name, str) for name in names):
    raise ConfigError(f"plot_agreement: names={names!r}: expected the names of {count} networks")
  slant = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
  size = max(3.2, 0.8 * len(names) + 1.6)
  figure = figure_of(2.5 * size, size)
  shown = (
    (100 * np.asarray(compared["agreement"]), f"same top-1 class, % of {unit}", "{:.1f}", "Blues", "", ""),
    (np.asarray(compared["kl"]), "mean KL(p ‖ q), nats", "{:.3g}", "Oranges", "p", "q"),
  )
  for axes, (values, title, form, colors, row, column) in zip(figure.subplots(1, 2), shown, strict=True):
    off = values[~np.eye(len(names), dtype=bool)]
    # The diagonals are always 100 and 0, so the colors span the other entries.
    low, high = (off.min(), off.max()) if len(off) else (0, 1)
    image = axes.imshow(values, cmap=colors, vmin=low - 0.2 * (high - low), vmax=high + 0.2 * (high - low))
    for i, j in np.ndindex(values.shape):
      dark = np.dot(image.cmap(image.norm(values[i, j]))[:3], (0.299, 0.587, 0.114)) < 0.5
      axes.text(j, i, form.format(values[i, j]), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(names)), names, **slant)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=column, ylabel=row)
    axes.set_title(title, fontsize="medium")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
  return figure


def plot_dark_knowledge(generations: Mapping[str, Generation]) -> "Figure":
  """Plots the dark-knowledge share of the gradient and the mean correct-class term by epoch, a line for each student.

  Reference: Furlanello et al. 2018, Eq. 7 to 9 (`ban_jax/gradient.py`).

  Args:
    generations: the generations by name. Those whose gradient was not split (`train.gradient_split`) have no line, and
      keep their color among the others.

  Returns:
    A matplotlib Figure.

  Raises:
    ConfigError: no generation recorded its gradient's split, or matplotlib is not installed.

  Examples:
    >>> cfg.train.gradient_split = True
    >>> split = ban_jax.train_generation(teacher, cfg, dataset=data, progress=False)
    >>> cfg.train.gradient_split = False
    >>> len(ban_jax.plot_dark_knowledge({"teacher": teacher, "BAN-1": split}).get_axes())
    2
  """
  if not isinstance(generations, Mapping) or not all(isinstance(one, Generation) for one in generations.values()):
    raise ConfigError("plot_dark_knowledge: expected a dictionary of names and generations")
  curves = {name: curve for name, one in generations.items() if (curve := dark_knowledge(one.history))}
  if not curves:
    raise ConfigError(
      f"none of {', '.join(generations)} recorded the split of its gradient; train with train.gradient_split=True, by "
      "a loss that has a teacher"
    )
  colors = _colors(list(generations))
  figure = figure_of(10, 3.6)
  for axes, (key, label) in zip(figure.subplots(1, 2), DARK_KNOWLEDGE, strict=True):
    for name, curve in curves.items():
      marker = "o" if len(curve["epoch"]) <= 20 else ""
      axes.plot(curve["epoch"], curve[key], color=colors[name], label=name, marker=marker, markersize=4)
    axes.set(xlabel="epoch", ylabel=label)
    axes.locator_params(axis="x", integer=True)
    tidy(axes, grid=True)
  zero_line(axes)  # the correct-class term has either sign
  figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
  return figure

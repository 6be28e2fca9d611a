"""Compares finished generations: calibration, agreement with each other, and dark knowledge during training.

    python experiments/figures.py --workdir=runs/c100
    python experiments/figures.py --generations=runs/losses/teacher/gen_0,runs/losses/ban/gen_1 --out=runs/losses

Evaluates the generations on the test split and writes calibration.png, agreement.png and dark_knowledge.png, with the
numbers in figures.md and figures.json. It trains nothing.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
from absl import flags
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from ban_jax import data, metrics, storage, trees
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.evaluating import Subject, measure_pairs, sum_predictions
from ban_jax.processes import is_primary
from ban_jax.resolving import make_models
from ban_jax.types import Dataset, Generation, Model
from experiments import cli, plots, results

WORKDIR = flags.DEFINE_string("workdir", None, "A run directory of experiments/train.py; shows all its generations.")
GENERATIONS = flags.DEFINE_list(
  "generations", None, "Instead of --workdir: directories RUN/gen_K of the same data, in display order."
)
OUT = flags.DEFINE_string("out", None, "Output directory; by default the workdir.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Data directory, if it is not the one that the runs recorded.")

SPLIT = "test"
# Keys that a recorded configuration needs for evaluation; `data.load` checks the other keys of the data set.
NEEDED = (
  *("generations", "data.name", "data.dir", "model.name", "compute_dtype"),
  *("train.sync_batch_stats", "evaluate.batch_size"),
)
# Metric and axis label of each bar chart.
CALIBRATION = (("ece", "ECE (share)"), ("nll", "NLL (nats)"), ("brier", "Brier score"))
# Recorded key and axis label of each dark-knowledge plot (ban_jax/gradient.py).
DARK_KNOWLEDGE = (
  ("dark_share", "dark-knowledge share\nof the squared gradient"),
  ("correct_gradient", "mean correct-class term\n$q_* - p_*$ (probability)"),
)
HOW_TO_RECORD = """\
No student shown has recorded its dark-knowledge share: train with --config.train.gradient_split=True, by a loss that \
has a teacher."""


class Shown(NamedTuple):
  """A generation to be shown: its display name, its origin, and its network."""

  name: str
  directory: epath.Path
  cfg: ConfigDict
  generation: Generation
  digest: str
  model: Model


class Measured(NamedTuple):
  """The measurements of several generations, in display order."""

  metrics: results.Results
  reliability: Mapping[str, Mapping[str, np.ndarray]]  # of `ban_jax.reliability`, by name
  pairs: Mapping[str, Any]  # of `ban_jax.compare`
  examples: str  # "examples" or "tokens", whichever was counted


# --- reading --------------------------------------------------------------------------------------------------------


def read_config(workdir: epath.Path) -> ConfigDict:
  """Returns the locked configuration that a run directory records; raises a CheckpointError if there is none."""
  record = workdir / "config.json"
  try:
    values = dict(storage.read_json(record))
  except FileNotFoundError as error:
    raise CheckpointError(f"{workdir} is no run directory: there is no config.json") from error
  except (ValueError, TypeError) as error:
    raise CheckpointError(f"{record} is not a configuration: {error}") from error
  own = [key for key in ("data.name", "model.name", "teacher.model.name") if values.get(key) == "own"]
  if own:
    raise CheckpointError(
      f"{record}: {' and '.join(own)} of your own, which no command line can load; compare such generations by "
      "ban_jax.reliability and ban_jax.compare"
    )
  missing = [key for key in NEEDED if key not in values]
  if missing:
    raise CheckpointError(f"{record} lacks {', '.join(missing)}; expected what this version of the program records")
  nested = traverse_util.unflatten_dict(values, sep=".")
  nested.setdefault("teacher", {}).setdefault("model", None)
  return ConfigDict(nested).lock()


def chosen(
  workdir: str | None, generations: Sequence[str] | None, out: str | None
) -> tuple[list[epath.Path], epath.Path]:
  """Returns the directories of the generations that the flags name, and the output directory.

  For a run these are the generations of its configuration and any others found in it. Raises a ConfigError for flags
  that contradict each other, and a CheckpointError if there is no run.
  """
  if (workdir is None) == (generations is None):
    raise ConfigError("expected one of --workdir=RUN and --generations=RUN/gen_K,..., which select what to show")
  if workdir is not None:
    run = storage.resolve_workdir(workdir)
    numbers = set(range(read_config(run).generations + 1))
    numbers |= {int(path.name[4:]) for path in run.glob("gen_*") if re.fullmatch(r"gen_\d+", path.name)}
    return [run / f"gen_{number}" for number in sorted(numbers)], storage.resolve_workdir(out or workdir)
  if not out:
    raise ConfigError("--generations needs --out, the directory to write to")
  if not generations or not all(generations):
    raise ConfigError(f"--generations={','.join(generations)}: expected directories, separated by commas")
  directories = [storage.resolve_workdir(directory) for directory in generations]
  twice = {str(directory) for directory in directories if directories.count(directory) > 1}
  if twice:
    raise ConfigError(f"--generations names {', '.join(sorted(twice))} more than once")
  return directories, storage.resolve_workdir(out)


def names_of(directories: Sequence[epath.Path], indices: Sequence[int]) -> list[str]:
  """Returns the paper's names of generations, each after as many parent directories as make the names unique."""
  names = [results.name_of(index) for index in indices]
  parents = [directory.parent.parts for directory in directories]
  depth = 0
  while len(set(names)) < len(names):  # ends, since no two have the same directory and number
    depth += 1
    names = ["/".join([*parts[-depth:], results.name_of(index)]) for parts, index in zip(parents, indices, strict=True)]
  return names


def read(directories: Sequence[epath.Path], data_dir: str | None) -> tuple[Dataset, list[Shown]]:
  """Returns the data set of finished generations, and the generations with their networks.

  Raises a CheckpointError for one that is missing, unfinished or damaged, or that was trained on different data.
  """
  configs = [read_config(directory.parent) for directory in directories]
  for directory in directories:
    if not (directory / "manifest.json").exists():
      state = "is not finished" if directory.exists() else "does not exist"
      raise CheckpointError(f"{directory} {state}: rerun its command, or name finished ones by --generations")
  for cfg in configs if data_dir is not None else ():
    cfg.data.dir = data_dir
  dataset = data.load(configs[0].data)
  loaded = [storage.load(directory) for directory in directories]
  for directory, (generation, _) in zip(directories, loaded, strict=True):
    if directory.name != f"gen_{generation.index}":
      raise CheckpointError(f"{directory} holds generation {generation.index}: expected it as gen_{generation.index}")
  names = names_of(directories, [generation.index for generation, _ in loaded])
  shown = []
  for name, directory, cfg, (generation, manifest) in zip(names, directories, configs, loaded, strict=True):
    if manifest.get("dataset") != dataset.digest:
      where = f"{configs[0].data.name} as {directories[0].parent / 'config.json'} has it"
      raise CheckpointError(f"{directory} was trained on other data than those found: {where}; expected the same")
    if data.load(cfg.data).spec != dataset.spec:
      raise CheckpointError(f"{directory} and {directories[0]} differ in how they read the data: compare data.window")
    model = make_models(cfg, dataset.spec)[min(generation.index, 1)]
    trees.check_fits(generation.params, model, str(directory))
    shown.append(Shown(name, directory, cfg, generation, manifest["digest"], model))
  return dataset, shown


def measure(shown: Sequence[Shown], dataset: Dataset, devices: Sequence[jax.Device]) -> Measured:
  """Evaluates each generation, and all pairs of them, on every example of the test split."""
  # For text the smallest batch is the most exact: it has the fewest streams that begin with a zero state.
  rows = min(each.cfg.evaluate.batch_size for each in shown)
  plain = [trees.to_plain(each.generation.params) for each in shown]
  every = Subject(tuple(each.model for each in shown), tuple(plain), dataset, tuple(devices))
  sums = {
    each.name: sum_predictions(every._replace(models=(each.model,), variables=(tree,)), SPLIT, rows)
    for each, tree in zip(shown, plain, strict=True)
  }
  summarised, reliability = (
    {name: of(total) for name, total in sums.items()} for of in (metrics.summarise, metrics.bins)
  )
  pairs = measure_pairs(every, SPLIT, rows)
  return Measured(summarised, reliability, pairs, "tokens" if dataset.spec.kind == "tokens" else "examples")


def dark_knowledge(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]] | None:
  """Returns a student's dark-knowledge share and correct-class term by epoch, or None if they were not recorded."""
  if not all("dark_share" in row for row in history):
    return None
  return {key: [row[key] for row in history] for key in ("epoch", *(key for key, _ in DARK_KNOWLEDGE))}


# --- plots ----------------------------------------------------------------------------------------------------------


def _colors(names: Sequence[str]) -> dict[str, tuple[float, ...]]:
  """Returns a color for each name, dark to light; even the lightest can be read on white."""
  steps = max(len(names) - 1, 1)
  return {name: matplotlib.colormaps["viridis"](0.8 * place / steps) for place, name in enumerate(names)}


def plot_calibration(measured: Measured) -> "matplotlib.figure.Figure":
  """Plots a reliability diagram of each generation, and bar charts of ECE, NLL and Brier score."""
  names = list(measured.metrics)
  colors = _colors(names)
  columns = min(max(len(names), 3), 4)
  rows = math.ceil(len(names) / columns)
  heights = (2.9 * rows, 0.3 * len(names) + 0.8)  # in inches
  figure = plots.figure(3 * columns, sum(heights))
  above, below = figure.subfigures(2, 1, height_ratios=heights)
  panels = above.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
  for axes in panels[len(names) :]:
    axes.set_visible(False)
  for place, (axes, (name, found)) in enumerate(zip(panels, measured.reliability.items(), strict=False)):
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
    plots.tidy(axes)
  above.supxlabel("confidence (largest probability), mean of a bin", size="medium")
  above.supylabel(f"accuracy of a bin (line);\nshare of {measured.examples} in it (bars)", size="medium")
  for axes, (metric, label) in zip(below.subplots(1, len(CALIBRATION), sharey=True), CALIBRATION, strict=True):
    bars = axes.barh(names, [measured.metrics[name][metric] for name in names], color=colors.values())
    axes.bar_label(bars, fmt="%.3g", size="small", padding=2)
    axes.set_xlabel(label)
    axes.margins(x=0.2)
    plots.tidy(axes)
  axes.invert_yaxis()  # shared by all three charts: the first name is on top
  return figure


def plot_agreement(measured: Measured) -> "matplotlib.figure.Figure":
  """Plots two annotated matrices: the share of examples that two generations classify alike, and their mean KL."""
  names = list(measured.metrics)
  slant = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
  size = max(3.2, 0.8 * len(names) + 1.6)
  figure = plots.figure(2.5 * size, size)
  shown = (
    (100 * measured.pairs["agreement"], f"same top-1 class, % of {measured.examples}", "{:.1f}", "Blues", "", ""),
    (measured.pairs["kl"], "mean KL(p ‖ q), nats", "{:.3g}", "Oranges", "p", "q"),
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


def plot_dark_knowledge(
  curves: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]
) -> "matplotlib.figure.Figure":
  """Plots the dark-knowledge share of the gradient and the mean correct-class term by epoch, one line per student.

  `names` are all generations shown; a student keeps its color among them.
  """
  colors = _colors(names)
  figure = plots.figure(10, 3.6)
  for axes, (key, label) in zip(figure.subplots(1, 2), DARK_KNOWLEDGE, strict=True):
    for name, curve in curves.items():
      marker = "o" if len(curve["epoch"]) <= 20 else ""
      axes.plot(curve["epoch"], curve[key], color=colors[name], label=name, marker=marker, markersize=4)
    axes.set(xlabel="epoch", ylabel=label)
    axes.locator_params(axis="x", integer=True)
    plots.tidy(axes, grid=True)
  plots.zero_line(axes)  # the correct-class term has either sign
  figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
  return figure


# --- writing --------------------------------------------------------------------------------------------------------


def _matrix(names: Sequence[str], values: np.ndarray, form: str) -> str:
  rows = [[name, *map(form.format, row)] for name, row in zip(names, values, strict=True)]
  return results.markdown([["", *names], *rows])


def report_of(
  shown: Sequence[Shown], measured: Measured, dataset: Dataset, curves: Mapping[str, Mapping[str, Sequence[float]]]
) -> str:
  """Returns the text of figures.md."""
  names, examples = list(measured.metrics), measured.examples
  trained = [results.describe(each.cfg) for each in shown]
  same = len(set(trained)) == 1
  sources = [
    f"- {each.name}: {each.directory}" + ("" if same else f"; {description}")
    for each, description in zip(shown, trained, strict=True)
  ]
  if curves:
    unrecorded = [each.name for each in shown if each.generation.index and each.name not in curves]
    rows = [
      [name, str(curve["epoch"][-1]), f"{curve['dark_share'][-1]:.4f}", f"{curve['correct_gradient'][-1]:+.4f}"]
      for name, curve in curves.items()
    ]
    dark = [
      "The plain BAN gradient between a student and its teacher, whatever loss trains the student, in the last epoch:",
      results.markdown([["", "epoch", "dark-knowledge share", "mean correct-class term"], *rows]),
      *([f"Not recorded by: {', '.join(unrecorded)}."] if unrecorded else []),
      "![Dark knowledge](dark_knowledge.png)",
    ]
  else:
    dark = [HOW_TO_RECORD]
  return "\n\n".join([
    "# Generations compared",
    f"{dataset.name}, {SPLIT} split, {measured.pairs['count']} {examples}." + (f" {trained[0]}." if same else ""),
    "\n".join(sources),
    "## Calibration",
    results.table([measured.metrics]),
    "![Calibration](calibration.png)",
    "## Agreement",
    f"The same top-1 class, % of {examples}:",
    _matrix(names, 100 * measured.pairs["agreement"], "{:.2f}"),
    "Mean KL(row ‖ column) of the predicted distributions, nats:",
    _matrix(names, measured.pairs["kl"], "{:.4f}"),
    "![Agreement](agreement.png)",
    "## Dark knowledge",
    *dark,
  ]) + "\n"  # fmt: skip


def _numbers(values: Any) -> list[Any]:
  """Returns an array as lists for JSON, with None in place of NaN."""
  values = np.asarray(values)
  return np.where(np.isnan(values), None, values).tolist() if values.dtype.kind == "f" else values.tolist()


def write(out: epath.Path, shown: Sequence[Shown], measured: Measured, dataset: Dataset) -> str:
  """Writes the figures and their numbers into `out`; returns the text of figures.md."""
  curves = {each.name: dark_knowledge(each.generation.history) for each in shown}
  recorded = {name: curve for name, curve in curves.items() if curve}
  plots.save(plot_calibration(measured), out / "calibration.png")
  plots.save(plot_agreement(measured), out / "agreement.png")
  if recorded:
    plots.save(plot_dark_knowledge(recorded, list(curves)), out / "dark_knowledge.png")
  else:
    (out / "dark_knowledge.png").unlink(missing_ok=True)  # an old plot would show other generations
  generations = [
    {
      "name": each.name,
      "directory": str(each.directory),
      "digest": each.digest,
      "metrics": measured.metrics[each.name],
      "reliability": {name: _numbers(values) for name, values in measured.reliability[each.name].items()},
      "dark_knowledge": curves[each.name] and {name: _numbers(values) for name, values in curves[each.name].items()},
    }
    for each in shown
  ]
  pairs = {name: _numbers(measured.pairs[name]) for name in ("agreement", "kl")}
  found = {"dataset": dataset.name, "split": SPLIT, "generations": generations, **pairs}
  storage.write_json(out / "figures.json", found)
  text = report_of(shown, measured, dataset, recorded)
  results.write(out / "figures.md", text)
  return text


def main() -> None:
  """Compares the generations that the flags name."""
  directories, out = chosen(WORKDIR.value, GENERATIONS.value, OUT.value)
  devices = cli.start_jax()
  dataset, shown = read(directories, DATA_DIR.value)
  if is_primary():
    out.mkdir(parents=True, exist_ok=True)
  measured = measure(shown, dataset, devices)
  if is_primary():
    print(f"{write(out, shown, measured, dataset)}\nfigures: {out}")


if __name__ == "__main__":
  cli.run(main)

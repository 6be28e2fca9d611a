"""What text.py and images.py share: columns of networks by seed, trained as one graph, compared with their teacher.

A panel has the networks of one training set by column: teacher, students, controls, ensembles. Networks that several
columns or seeds need are trained once; several processes may share a workdir, and finished results are shown at once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from absl import flags
from etils import epath

from ban_jax import plotting, storage, summary
from ban_jax.errors import ConfigError, StorageError
from ban_jax.processes import is_primary
from experiments import cli, plots, records, results
from experiments.tables import graph, values
from experiments.tables import train as training
from experiments.tables.graph import Node
from experiments.tables.spec import Builder, Columns

SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "The first seed; searches use seeds from 100 on.", lower_bound=0)
DATA_DIR = flags.DEFINE_string("data_dir", "", "Data directory: TFDS's for CIFAR, that of the text files for ptb.")
CONTROLS = flags.DEFINE_string(
  "controls", "all", 'The controls to train: "all", "none", or names of columns with semicolons between them.'
)
SCALE = flags.DEFINE_enum("scale", "cpu", ["cpu", "smoke"], "cpu (the setting that is reported) or smoke (seconds).")


class Panel(NamedTuple):
  """The networks of one training set, by seed and column; "teacher" is the column that the others are compared with."""

  title: str
  columns: Sequence[Columns]
  comparisons: Sequence[tuple[str, str]]  # pairs of columns, besides each with the teacher


class Report(NamedTuple):
  """How panels are reported: the files' name, and the metric and its unit."""

  name: str
  heading: str
  metric: str
  unit: str


def seeds() -> range:
  """Returns the seeds that the flags ask for."""
  return range(FIRST_SEED.value, FIRST_SEED.value + SEEDS.value)


def named_seeds() -> str:
  """Returns the seeds as a heading names them."""
  return f"seeds {seeds()[0]} to {seeds()[-1]}" if SEEDS.value > 1 else f"seed {seeds()[0]}"


def numbers(name: str, given: Sequence[str]) -> list[float]:
  """Returns the numbers of a list flag; raises a ConfigError for what is none."""
  try:
    return [float(value) for value in given]
  except ValueError as error:
    raise ConfigError(f"--{name}={','.join(given)}: expected numbers, separated by commas ({error})") from error


def builder(dataset: str, seed: int, changes: Mapping[str, object]) -> Builder:
  """Returns the builder of a seed's networks; with label noise the seed decides it, too."""
  changes = {**changes, **({"data.dir": DATA_DIR.value} if DATA_DIR.value else {})}
  if changes.get("data.label_noise"):
    changes["data.noise_seed"] = seed
  return Builder(dataset, SCALE.value, seed, changes, None)


def with_controls(found: Columns, controls: Columns) -> Columns:
  """Returns columns and those of the controls that the flag names; raises a ConfigError for an unknown name."""
  given = [name.strip() for name in CONTROLS.value.split(";")]
  names = {"all": list(controls), "none": []}.get(CONTROLS.value, given)
  unknown = [name for name in names if name not in controls]
  if unknown:
    known = "; ".join(controls)
    raise ConfigError(f"--controls: there is no control {unknown[0]!r}; expected all, none, or some of: {known}")
  return {**found, **{name: controls[name] for name in names}}


def train(panels: Sequence[Panel], workdir: epath.Path) -> list[list[summary.Results]]:
  """Trains what is missing, one network on each device, and returns each panel's results by seed and column."""
  devices = cli.start_jax(side_by_side=True)
  ensembles = [members for panel in panels for columns in panel.columns for members in columns.values()]
  nodes = graph.topological_order(node for members in ensembles for node in members)
  groups = [(device,) for device in devices]
  graph.check(nodes, workdir, groups[0])

  def log(message: str) -> None:
    if cli.PROGRESS.value and is_primary():
      print(message, flush=True)

  training.train(nodes, workdir, groups=groups, progress=cli.PROGRESS.value, log=log)
  for members in ensembles:
    if len(members) > 1:
      values.evaluate_ensemble(members, workdir, groups[0])
  return [[_results(columns, workdir) for columns in panel.columns] for panel in panels]


def _results(columns: Columns, workdir: epath.Path) -> summary.Results:
  return {name: _metrics(members, workdir) for name, members in columns.items()}


def _metrics(members: Sequence[Node], workdir: epath.Path) -> summary.Metrics:
  """Returns the test metrics of a finished network or of an evaluated ensemble."""
  if len(members) > 1:
    found = values.ensemble_metrics(members, workdir)
  else:
    found = summary.reported(own_metrics(members[0], workdir))
  if found is None:
    raise StorageError(f"{workdir} holds no evaluation of {', '.join(node.path for node in members)}; rerun")
  return found


def own_metrics(node: Node, workdir: epath.Path) -> Mapping[str, float]:
  """Returns all metrics of a finished network, those on its validation split among them."""
  found = graph.find(node, workdir)
  if found is None:
    raise StorageError(f"{workdir / node.path} is finished, but not visible yet; rerun the command to continue")
  return found[0]


def report(
  panels: Sequence[Panel],
  how: Report,
  workdir: epath.Path,
  found: Sequence[Sequence[summary.Results]],
  notes: Sequence[str] = (),
) -> None:
  """Prints and writes the tables, each with its note, writes the plot, and a line for each lineage and seed."""
  if not is_primary():
    return
  parts = []
  for panel, per_seed, note in zip(panels, found, notes or [""] * len(panels), strict=True):
    parts += [f"**{panel.title}**", summary.table(per_seed, "teacher", how.metric)]
    lines = [
      f"- {first} minus {second}: {summary.paired_difference(per_seed, first, second, how.metric).text}"
      for first, second in panel.comparisons
      if {first, second} <= per_seed[0].keys()
    ]
    parts += ["\n".join(lines + ([note] if note else []))] if lines or note else []
  text = "\n\n".join([how.heading, *parts])
  lines = [json.dumps(line) for panel in panels for columns in panel.columns for line in _records(columns, workdir)]
  results.write(workdir / f"{how.name}.md", text + "\n")
  results.write(workdir / f"{how.name}.jsonl", "\n".join(lines) + "\n")
  plots.save(plot(panels, how, found), workdir / f"{how.name}.png")
  print(f"\n{text}\n\nwritten: {', '.join(str(workdir / f'{how.name}.{end}') for end in ('md', 'jsonl', 'png'))}")


def plot(
  panels: Sequence[Panel], how: Report, found: Sequence[Sequence[summary.Results]]
) -> "matplotlib.figure.Figure":
  """Plots each column's difference from the teacher, paired by seed, with its interval and every seed as a dot."""
  most = max(len(per_seed[0]) for per_seed in found)
  figure = plotting.figure_of(1 + 5 * len(panels), 1.2 + 0.36 * most)
  grid = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, panel, per_seed in zip(grid, panels, found, strict=True):
    names = [name for name in per_seed[0] if name != "teacher"]
    for place, name in enumerate(names):
      color = "tab:blue" if name.startswith("BAN") else "tab:orange" if name.startswith("Ens") else "tab:green"
      single = [seed[name][how.metric] - seed["teacher"][how.metric] for seed in per_seed]
      difference = summary.mean_difference(single)
      half = 0 if len(single) == 1 else difference.high - difference.mean
      axes.errorbar(difference.mean, place, xerr=half, fmt="o", color=color, capsize=3, zorder=3)
      axes.plot(single, [place + 0.25] * len(single), ".", color=color, alpha=0.4)
    axes.axvline(0, color="0.5", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first at the top
    teacher = summary.mean_and_error([seed["teacher"][how.metric] for seed in per_seed])[0]
    axes.set_title(f"{panel.title}; teacher {teacher:.1f}", fontsize="medium")
    axes.set_xlabel(f"minus teacher, {how.unit}\n(paired, {summary.CONFIDENCE:.0%} interval)")
    plotting.tidy(axes)
  return figure


def _records(columns: Columns, workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns the lines of a seed's lineages: "teacher" and "BAN-K", at each length of training that follows a comma."""
  lineages: dict[str, dict[str, Node]] = {}
  for column, members in columns.items():
    name, _, length = column.partition(", ")
    if name == "teacher" or name.startswith("BAN-"):
      lineages.setdefault(length, {})[name] = members[0]
  return [records.of_lineage(lineage, workdir) for lineage in lineages.values()]


def check_workdir(workdir: str) -> epath.Path:
  """Returns the workdir; raises a ConfigError for seeds that no table's variants leave room for."""
  if max(seeds()) >= 1000:
    raise ConfigError(f"--first_seed={FIRST_SEED.value}: expected seeds below 1000, where those of the controls begin")
  return storage.resolve_workdir(workdir)

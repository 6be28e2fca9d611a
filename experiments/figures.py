"""Compares finished generations: calibration, agreement with each other, and dark knowledge during training.

    python experiments/figures.py --workdir=runs/c100
    python experiments/figures.py --generations=runs/losses/teacher/gen_0,runs/losses/ban/gen_1 --out=runs/losses

Evaluates the generations on the test split and writes calibration.png, agreement.png and dark_knowledge.png, with the
numbers in figures.md and figures.json. It trains nothing.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from flax import traverse_util
from ml_collections import ConfigDict

from ban_jax import data, metrics, plotting, storage, summary, trees
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
  names = [summary.name_of(index) for index in indices]
  parents = [directory.parent.parts for directory in directories]
  depth = 0
  while len(set(names)) < len(names):  # ends, since no two have the same directory and number
    depth += 1
    names = ["/".join([*parts[-depth:], summary.name_of(index)]) for parts, index in zip(parents, indices, strict=True)]
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


# --- writing --------------------------------------------------------------------------------------------------------


def _matrix(names: Sequence[str], values: np.ndarray, form: str) -> str:
  rows = [[name, *map(form.format, row)] for name, row in zip(names, values, strict=True)]
  return summary.markdown([["", *names], *rows])


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
      summary.markdown([["", "epoch", "dark-knowledge share", "mean correct-class term"], *rows]),
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
    summary.table([measured.metrics]),
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
  curves = {each.name: plotting.dark_knowledge(each.generation.history) for each in shown}
  recorded = {name: curve for name, curve in curves.items() if curve}
  plots.save(
    plotting.plot_calibration(measured.reliability, measured.metrics, measured.examples), out / "calibration.png"
  )
  plots.save(plotting.plot_agreement(measured.pairs, list(measured.metrics), measured.examples), out / "agreement.png")
  if recorded:
    plots.save(plotting.plot_dark_knowledge({each.name: each.generation for each in shown}), out / "dark_knowledge.png")
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

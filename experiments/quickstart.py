"""The main job in half a minute: born-again generations on digits with true labels, and on digits with wrong ones.

    make quickstart        or        python -m experiments.quickstart --workdir=runs/quickstart

A teacher and its born-again students, perceptrons, learn from 400 handwritten digits of scikit-learn; 1397 others test
them. On the left all labels are true; on the right 40 % of them are replaced by another class. Both run side by side,
each on devices of its own. Finished results are shown at once; an interrupted run is resumed.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from absl import flags
from etils import epath

from ban_jax import plotting, storage, summary
from ban_jax.processes import is_primary
from ban_jax.types import Devices
from configs import digits
from experiments import cli, plots, results

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Directory for the runs, the table and the plot.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds to average over.", lower_bound=1)
WORDS = flags.DEFINE_string("words", "digits,mlp_256,cpu", "Configuration words, as in configs/digits.py.")


class Panel(NamedTuple):
  """A column of the plot: one way to make the training labels."""

  name: str
  title: str
  label_noise: float


PANELS = (Panel("clean", "true labels", 0.0), Panel("noisy", "40 % wrong labels", 0.4))
# Small batches fit wrong labels in few epochs; an epoch's 20 steps are one call of a compiled program.
SETTING = {
  **{"data.train_examples": 400, "train.batch_size": 20, "train.steps_per_dispatch": 20, "train.evaluate_every": 0},
  "optim.learning_rate": 0.05,
}
EPOCHS = 5 / 3  # of the scale's: 100 at the scale cpu


def evaluate(workdir: epath.Path, devices: Devices) -> tuple[dict[str, list[summary.Results]], bool]:
  """Returns each panel's results by seed, and whether all of them existed already; trains one run on each device.

  A device keeps to a panel if it can, and so to the programs that were compiled for it.
  """
  runs = [(panel, seed) for seed in range(SEEDS.value) for panel in PANELS]
  found: dict[str, list[summary.Results]] = {panel.name: [] for panel in PANELS}
  finished = True
  for first in range(0, len(runs), len(devices)):
    batch = runs[first : first + len(devices)]
    if cli.PROGRESS.value:
      print("; ".join(f"{panel.title}, seed {seed}" for panel, seed in batch), flush=True)
    done = results.evaluate_runs(
      [config_of(*run) for run in batch],
      [workdir / panel.name / f"seed_{seed}" for panel, seed in batch],
      devices=[[device] for device in devices[: len(batch)]],
      progress=cli.PROGRESS.value,
    )
    for (panel, _), (rows, existed) in zip(batch, done, strict=True):
      found[panel.name].append(rows)
      finished &= existed
  return found, finished


def config_of(panel: Panel, seed: int):
  """Returns a panel's configuration for a seed, which also decides which labels are wrong."""
  cfg = digits.get_config(WORDS.value)
  cfg.update_from_flattened_dict({**SETTING, "seed": seed, "data.label_noise": panel.label_noise})
  cfg.train.epochs = round(EPOCHS * cfg.train.epochs)
  if panel.label_noise:
    cfg.data.noise_seed = seed
  return cfg


def plot(found: Mapping[str, Sequence[summary.Results]], titles: Mapping[str, str], path: epath.Path) -> None:
  """Plots the test error of generations and ensembles, one panel each, with every seed as a dot."""
  figure = plotting.figure_of(10, 4.2)
  for axes, (name, per_seed) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
    rows = list(per_seed[0])
    single = [row for row in rows if not row.startswith("Ens")]
    places = {row: place + 0.5 * (row not in single) for place, row in enumerate(rows)}
    ensembles = rows[len(single) :]
    for group, color, style in ((single, "tab:blue", "o-"), (ensembles, "tab:orange", "s"))[: 1 + bool(ensembles)]:
      errors = {row: [seed[row]["error"] for seed in per_seed] for row in group}
      bars = {row: summary.mean_and_error(values) for row, values in errors.items()}
      means, spreads = zip(*bars.values(), strict=True)
      axes.errorbar([places[row] for row in group], means, spreads, fmt=style, color=color, capsize=4, zorder=3)
      for row, (mean, _) in bars.items():
        plots.seeds(axes, places[row], errors[row], color)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
        offset = {"xytext": (10, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{mean:.1f}", (places[row], mean), color=color, bbox=box, fontsize="small", **offset)
    axes.axhline(summary.mean_and_error([seed[rows[0]]["error"] for seed in per_seed])[0], color="0.6", ls=":", lw=1)
    axes.set_xticks(list(places.values()), rows)
    axes.margins(x=0.12)
    axes.set_title(titles[name], fontsize="medium")
    plotting.tidy(axes, grid=True)
  figure.axes[0].set_ylim(bottom=0)
  figure.axes[0].set_ylabel("test error, %")
  plots.save(figure, path)


def sentence(found: Mapping[str, Sequence[summary.Results]]) -> str:
  """Returns what the numbers say, panel by panel: the last generation minus its first teacher, paired by seed."""
  said = []
  for panel in PANELS:
    rows = [row for row in found[panel.name][0] if not row.startswith("Ens")]
    difference = summary.paired_difference(found[panel.name], rows[-1], rows[0])
    if difference.high < 0:
      word = "better than"
    elif difference.low > 0:
      word = "worse than"
    else:
      word = "not distinguishable from"
    said.append(f"With {panel.title}, {rows[-1]} is {word} the teacher ({difference.text} points of test error).")
  reason = (
    "A teacher that half believes wrong labels gives its students cleaner targets than those it had; from true labels "
    "that it fits, a student of the same network has little to gain."
  )
  return " ".join([*said, reason])


def main() -> None:
  """Trains what is missing, then prints the tables and the path of the plot."""
  start = time.monotonic()
  devices = cli.start_jax(side_by_side=True)
  workdir = storage.resolve_workdir(WORKDIR.value)
  parts, titles = [], {}
  found, finished = evaluate(workdir, devices)
  for panel in PANELS:
    cfg = config_of(panel, 0)
    titles[panel.name] = f"{cfg.data.train_examples} training digits, {panel.title}, {cfg.train.epochs} epochs"
    parts += [f"**{titles[panel.name]}**", summary.table(found[panel.name], reference="teacher")]
  if not is_primary():
    return
  seeds = f"{SEEDS.value} seed{'s' * (SEEDS.value > 1)}"
  heading = (
    f"{results.network(config_of(PANELS[0], 0).model)}, {seeds}; mean ± standard error, test split, last epoch; "
    "difference paired by seed, with its 95% interval"
  )
  text = "\n\n".join([heading, *parts, sentence(found)])
  table, picture = workdir / "table.md", workdir / "error_by_generation.png"
  results.write(table, text + "\n")
  plot(found, titles, picture)
  print("everything was finished already" if finished else f"finished in {time.monotonic() - start:.0f} s")
  print(f"\n{text}\n\ntable: {table}\nplot:  {picture}")


if __name__ == "__main__":
  cli.run(main)

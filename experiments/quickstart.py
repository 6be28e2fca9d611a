"""The main job in a few minutes: a teacher, three born-again generations and their ensembles, over several seeds.

    make quickstart        or        python -m experiments.quickstart --workdir=runs/quickstart

Trains on 200 handwritten digits from scikit-learn and tests on 1397 others. Finished results are shown at once; an
interrupted run is resumed.
"""

import time
from collections.abc import Sequence

from absl import flags
from etils import epath

from ban_jax import storage
from ban_jax.processes import is_primary
from configs import digits
from experiments import cli, plots, results

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Directory for the runs, the table and the plot.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds to average over.", lower_bound=1)
WORDS = flags.DEFINE_string("words", "digits,wrn_10_1,cpu", "Configuration words, as in configs/digits.py.")


def plot(per_seed: Sequence[results.Results], title: str, path: epath.Path) -> None:
  """Plots the test error of generations and ensembles: every seed as a dot, the mean with its standard error."""
  names = list(per_seed[0])
  single = [name for name in names if not name.startswith("Ens")]
  places = {name: place + 0.5 * (name not in single) for place, name in enumerate(names)}
  figure = plots.figure(7, 4.2)
  axes = figure.subplots()
  for group, color, style in ((single, "tab:blue", "o-"), (names[len(single) :], "tab:orange", "s")):
    errors = {name: [rows[name]["error"] for rows in per_seed] for name in group}
    bars = {name: results.mean_and_error(values) for name, values in errors.items()}
    axes.errorbar(
      [places[name] for name in group],
      [mean for mean, _ in bars.values()],
      [error for _, error in bars.values()],
      fmt=style, color=color, capsize=4, zorder=3,
    )  # fmt: skip
    for name, (mean, _) in bars.items():
      plots.seeds(axes, places[name], errors[name], color)
      box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
      offset = {"xytext": (12, 0), "textcoords": "offset points", "va": "center"}
      axes.annotate(f"{mean:.2f}", (places[name], mean), color=color, bbox=box, **offset)
  axes.set_xticks(list(places.values()), names)
  axes.margins(x=0.12)
  axes.set_ylabel("test error, % (mean, standard error, seeds)")
  axes.set_title(title, fontsize="medium")
  plots.tidy(axes, grid=True)
  plots.save(figure, path)


def main() -> None:
  """Trains what is missing, then prints the table and the path of the plot."""
  start = time.monotonic()
  devices = cli.start_jax()
  workdir = storage.resolve_workdir(WORKDIR.value)
  per_seed, finished = [], True
  for seed in range(SEEDS.value):
    cfg = digits.get_config(WORDS.value)
    cfg.seed = seed
    if cli.PROGRESS.value:
      print(f"seed {seed + 1} of {SEEDS.value}", flush=True)
    rows, existed = results.evaluate_run(cfg, workdir / f"seed_{seed}", devices=devices, progress=cli.PROGRESS.value)
    per_seed.append(rows)
    finished &= existed
  if not is_primary():
    return
  seeds = f"{SEEDS.value} seed{'s' * (SEEDS.value > 1)}"
  title = f"{cfg.data.train_examples} digits, {results.network(cfg.model)}, scale {cfg.scale}, {seeds}"
  text = f"{title}; mean and standard error; test split, last epoch\n\n{results.table(per_seed)}\n"
  table, picture = workdir / "table.md", workdir / "error_by_generation.png"
  results.write(table, text)
  plot(per_seed, title, picture)
  print("everything was finished already" if finished else f"finished in {time.monotonic() - start:.0f} s")
  print(f"\n{text}\ntable: {table}\nplot:  {picture}")


if __name__ == "__main__":
  cli.run(main)

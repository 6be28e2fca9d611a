"""How much training is enough, and how many wrong labels: where being born again begins to pay, on digits.

    python experiments/enough.py --workdir=runs/enough

Trains a teacher and its born-again students for every share of wrong labels and every number of epochs, several seeds
each, and plots what the last student gains against what its teacher makes of its training labels. A validation split
with true labels chooses the teacher's best early stop, the cheap rival. Finished results are shown at once.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from absl import flags
from etils import epath

from ban_jax import loading, plotting, storage, summary
from ban_jax.errors import ConfigError
from ban_jax.processes import is_primary
from ban_jax.types import Devices, Generation
from configs import digits
from experiments import cli, plots, records, results

WORKDIR = flags.DEFINE_string("workdir", "runs/enough", "Directory for the runs, the table, the plot and the lines.")
SEEDS = flags.DEFINE_integer("seeds", 5, "Number of seeds.", lower_bound=1)
FIRST_SEED = flags.DEFINE_integer("first_seed", 0, "The first seed; searches use seeds from 100 on.", lower_bound=0)
NOISE = flags.DEFINE_list("noise", ["0", "0.2", "0.4"], "Shares of wrong labels.")
EPOCHS = flags.DEFINE_list("epochs", ["10", "20", "30", "60", "120"], "Numbers of epochs.")
GENERATIONS = flags.DEFINE_integer("generations", 3, "Students after the teacher.", lower_bound=1)
WORDS = flags.DEFINE_string("words", "digits,wrn_10_1,cpu", "Configuration words, as in configs/digits.py.")
VALIDATION = 0.2


class Setting(NamedTuple):
  """A share of wrong labels and a number of epochs."""

  noise: float
  epochs: int


def settings() -> list[Setting]:
  """Returns the settings that the flags ask for; raises a ConfigError for what is no number."""
  try:
    return [Setting(float(noise), int(epochs)) for noise in NOISE.value for epochs in EPOCHS.value]
  except ValueError as error:
    raise ConfigError(f"--noise and --epochs take numbers, separated by commas: {error}") from error


def config_of(setting: Setting, seed: int):
  """Returns the configuration of a setting and seed, which also decides which labels are wrong."""
  cfg = digits.get_config(WORDS.value)
  changes = {"seed": seed, "generations": GENERATIONS.value, "data.train_examples": 0, "data.validation": VALIDATION}
  changes |= {"data.label_noise": setting.noise, "train.epochs": setting.epochs, "train.evaluate_every": 0}
  cfg.update_from_flattened_dict(changes)
  if setting.noise:
    cfg.data.noise_seed = seed
  return cfg


def train(setting: Setting, workdir: epath.Path, devices: Devices) -> list[list[Generation]]:
  """Returns the generations of a setting by seed; as many seeds as devices are trained side by side."""
  seeds = range(FIRST_SEED.value, FIRST_SEED.value + SEEDS.value)
  places = [workdir / f"noise_{setting.noise:g}_epochs_{setting.epochs}" / f"seed_{seed}" for seed in seeds]
  for first in range(0, len(seeds), len(devices)):
    here = slice(first, first + len(devices))
    results.evaluate_runs(
      [config_of(setting, seed) for seed in seeds[here]],
      places[here],
      devices=[[device] for device in devices[: len(places[here])]],
      progress=cli.PROGRESS.value,
    )
  return [loading.load_run(place) for place in places]


def metric(runs: Sequence[Sequence[Generation]], generation: int, name: str) -> list[float]:
  """Returns a metric of a generation by seed; without wrong labels the training error is that of the last epoch."""
  fallback = {"train_seen_error": "train_error"}
  own = [run[generation].metrics for run in runs]
  return [metrics.get(name, metrics.get(fallback.get(name, name))) for metrics in own]


def difference(values: Sequence[float], reference: Sequence[float]) -> summary.Difference:
  """Returns values minus reference, paired by seed."""
  return summary.mean_difference([value - other for value, other in zip(values, reference, strict=True)])


def table(found: Mapping[Setting, Sequence[Sequence[Generation]]]) -> str:
  """Returns a row a setting: the teacher's errors, and every student's difference from it, paired by seed."""
  students = range(1, GENERATIONS.value + 1)
  rows = [["wrong labels", "epochs", "teacher, training %", "teacher, test %", *(f"BAN-{k} minus" for k in students)]]
  for setting, runs in found.items():
    teacher = metric(runs, 0, "test_error")
    differences = [difference(metric(runs, k, "test_error"), teacher).text for k in students]
    error = fmean(metric(runs, 0, "train_seen_error"))
    rows.append([f"{setting.noise:.0%}", str(setting.epochs), f"{error:.1f}", f"{fmean(teacher):.2f}", *differences])
  return summary.markdown(rows)


def early_stops(found: Mapping[Setting, Sequence[Sequence[Generation]]]) -> str:
  """Returns, by share of wrong labels, the teacher's best early stop, and the last student minus it.

  Teacher and student each take the number of epochs with the lowest mean validation error.
  """
  last = GENERATIONS.value
  rows = [["wrong labels", "teacher's best stop", "test %", f"BAN-{last}'s best epochs", "test %", "minus the stop"]]
  for noise in dict.fromkeys(setting.noise for setting in found):
    runs = {setting: own for setting, own in found.items() if setting.noise == noise}
    stop, best = (min(runs, key=lambda s, k=k: fmean(metric(runs[s], k, "validation_error"))) for k in (0, last))
    stopped, student = metric(runs[stop], 0, "test_error"), metric(runs[best], last, "test_error")
    gain = difference(student, stopped).text
    rows.append(
      [
        f"{noise:.0%}",
        f"{stop.epochs} epochs",
        f"{fmean(stopped):.2f}",
        str(best.epochs),
        f"{fmean(student):.2f}",
        gain,
      ]
    )
  return summary.markdown(rows)


def plot(found: Mapping[Setting, Sequence[Sequence[Generation]]], path: epath.Path) -> None:
  """Plots the last student minus its teacher against the teacher's error on its training labels."""
  figure = plotting.figure_of(7, 4.5)
  axes = figure.subplots()
  shares = list(dict.fromkeys(setting.noise for setting in found))
  for number, noise in enumerate(shares):
    own = [(setting, runs) for setting, runs in found.items() if setting.noise == noise]
    errors = [fmean(metric(runs, 0, "train_seen_error")) for _, runs in own]
    gains = [
      difference(metric(runs, GENERATIONS.value, "test_error"), metric(runs, 0, "test_error")) for _, runs in own
    ]
    bars = [[gain.mean - gain.low for gain in gains], [gain.high - gain.mean for gain in gains]]
    color = f"C{number}"
    label = results.labels(noise)
    axes.errorbar(errors, [gain.mean for gain in gains], bars, fmt="o-", color=color, capsize=3, label=label)
    width, height, before = max(errors) - min(errors), 5, None
    for error, gain, (setting, _) in zip(errors, gains, own, strict=True):
      # Where settings crowd, each number is above the one before it.
      height = height + 9 if before is not None and abs(error - before) < 0.15 * width else 5
      before = error
      place = {"xytext": (5, height), "textcoords": "offset points", "fontsize": "x-small"}
      axes.annotate(str(setting.epochs), (error, gain.mean), **place)
  plotting.zero_line(axes)
  axes.set_xlabel("teacher's error on the training labels it saw, % (numbers: epochs)")
  axes.set_ylabel(f"BAN-{GENERATIONS.value} minus teacher,\ntest error in points (95% interval)")
  axes.legend(frameon=False)
  plotting.tidy(axes, grid=True)
  plots.save(figure, path)


def lines(found: Mapping[Setting, Sequence[Sequence[Generation]]]) -> str:
  """Returns a line, as JSON, for each setting and seed: what experiments/gains.py plots beside other runs."""
  made = []
  for setting, runs in found.items():
    for seed, run in enumerate(runs, FIRST_SEED.value):
      generations = {summary.name_of(own.index): own for own in run}
      made.append(json.dumps(records.make(config_of(setting, seed), WORDS.value, generations)))
  return "\n".join(made) + "\n"


def main() -> None:
  """Trains what is missing, then prints the tables and the path of the plot."""
  chosen = settings()
  devices = cli.start_jax(side_by_side=True)
  workdir = storage.resolve_workdir(WORKDIR.value)
  found = {}
  for number, setting in enumerate(chosen, 1):
    if cli.PROGRESS.value:
      print(f"[{number}/{len(chosen)}] {setting.noise:.0%} wrong labels, {setting.epochs} epochs", flush=True)
    found[setting] = train(setting, workdir, devices)
  if not is_primary():
    return
  last = FIRST_SEED.value + SEEDS.value - 1
  seeds = f"seeds {FIRST_SEED.value} to {last}" if SEEDS.value > 1 else f"seed {last}"
  cfg = config_of(chosen[0], 0)
  heading = (
    f"{results.network(cfg.model)}, {summary.name_of(0)} and {GENERATIONS.value} students, {seeds}; test error of the "
    "last epoch; differences paired by seed, with their 95% interval"
  )
  text = "\n\n".join([heading, table(found), early_stops(found)])
  results.write(workdir / "enough.md", text + "\n")
  results.write(workdir / "enough.jsonl", lines(found))
  plot(found, workdir / "enough.png")
  print(f"\n{text}\n\ntable: {workdir / 'enough.md'}\nplot:  {workdir / 'enough.png'}")


if __name__ == "__main__":
  cli.run(main)

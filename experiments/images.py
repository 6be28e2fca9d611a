"""The effect on real images, on two cores: CIFAR-10 subsets that a small Wide-ResNet fits, with true and wrong labels.

    python experiments/images.py --data_dir=DIR --workdir=runs/images

Per seed a teacher, two born-again generations and their ensemble, beside what the same work brings without a teacher's
knowledge: smoothed labels, labels for twice as long, an ensemble of independent teachers, and teachers that stop
earlier, among which a validation split with true labels chooses. The setting was chosen on seeds from 100 on; all that
was tried is in docs/searched.jsonl. Finished results are shown at once, an interrupted run is resumed, and several
processes may share a workdir.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from collections.abc import Sequence

from absl import flags
from etils import epath

from experiments import cli, results, study
from experiments.tables.spec import Builder, Columns, Row, independent_ensembles, label_controls

WORKDIR = flags.DEFINE_string("workdir", "runs/images", "Directory for the runs, the table and the plot.")
NOISE = flags.DEFINE_list("noise", ["0", "0.4"], "Shares of wrong labels, a panel each.")
# Scale -> data set, network, configuration values, and the earlier stops, in epochs.
SETTINGS = {
  "cpu": (
    "cifar10",
    "wrn_10_1",
    {
      "data.train_examples": 1000,
      "data.validation": 0.04,
      "data.pad": 0,
      "data.flip": False,
      "train.batch_size": 50,
      "train.epochs": 15,
      "train.evaluate_every": 0,
      "train.checkpoint_every": 200,
    },
    (8, 11),
  ),
  "smoke": ("digits", "wrn_10_1", {"data.validation": 0.2, "train.checkpoint_every": 100}, (1,)),
}


def columns(builder: Builder, network: str, stops: Sequence[int]) -> Columns:
  """Returns a seed's networks: teacher and two students, their ensemble, teachers that stop earlier, controls."""
  teacher = builder.teacher(network)
  students = builder.sequence(teacher, network, "ban", 2)
  found = {"teacher": [teacher], "BAN-1": students[:1], "BAN-2": students[1:], "Ens*2": students}
  for epochs in stops:
    short = builder._replace(changes={**builder.changes, "train.epochs": epochs})
    found[f"teacher, {epochs} epochs"] = [short.teacher(network)]
  row = Row("", network, {})
  return study.with_controls(found, {**label_controls(builder, row), **independent_ensembles(builder, row, (2,))})


def best_stop(panel: study.Panel, per_seed: Sequence[results.Results], workdir: epath.Path) -> str:
  """Returns what the students bring beyond the teacher at the stop with the lowest mean validation error."""
  names = [column for column in panel.columns[0] if column.partition(", ")[0] == "teacher"]

  def validation(column: str) -> float:
    own = [study.own_metrics(by_name[column][0], workdir)["validation_error"] for by_name in panel.columns]
    return results.mean_and_error(own)[0]

  stop = min(names, key=validation)
  error = results.mean_and_error([seed[stop]["error"] for seed in per_seed])[0]
  lines = [f"- the teacher's best stop by the validation split: {stop}, test error {error:.2f} %"]
  for student in ("BAN-1", "BAN-2", "Ens*2"):
    lines.append(f"- {student} minus {stop}: {results.paired_difference(per_seed, student, stop).text}")
  return "\n".join(lines)


COMPARISONS = (
  *(("BAN-1", other) for other in ("label smoothing", "entropy-matched smoothing", "labels, twice as long")),
  ("Ens*2", "independent*2"),
)


def main() -> None:
  """Trains what is missing, then prints the tables and the path of the plot."""
  workdir = study.check_workdir(WORKDIR.value)
  dataset, network, changes, stops = SETTINGS[study.SCALE.value]
  panels = []
  for noise in study.numbers("noise", NOISE.value):
    own = {**changes, "data.label_noise": noise}
    by_seed = [columns(study.builder(dataset, seed, own), network, stops) for seed in study.seeds()]
    panels.append(study.Panel(f"{noise:.0%} wrong labels" if noise else "true labels", by_seed, COMPARISONS))
  found = study.train(panels, workdir)
  notes = [best_stop(panel, per_seed, workdir) for panel, per_seed in zip(panels, found, strict=True)]
  cfg = panels[0].columns[0]["BAN-1"][0].cfg
  examples = cfg.data.train_examples or "all"
  heading = (
    f"{dataset}, {examples} training images, {results.network(cfg.model)}, {cfg.train.epochs} epochs of batch "
    f"{cfg.train.batch_size}, {'augmented' if cfg.data.pad else 'not augmented'}, students by {cfg.loss.name}, "
    f"{study.named_seeds()}; mean ± standard error, test split, last epoch; test error minus the teacher's paired by "
    "seed, with its 95% interval"
  )
  study.report(panels, study.Report("images", heading, "error", "points of test error"), workdir, found, notes)


if __name__ == "__main__":
  cli.run(main)

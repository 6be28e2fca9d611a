"""The effect on images, on two cores: training sets that a small Wide-ResNet fits, with true and with wrong labels.

    python experiments/images.py --data_dir=DIR --workdir=runs/images
    python experiments/images.py --dataset=cifar100 --data_dir=DIR --workdir=runs/images100
    python experiments/images.py --dataset=digits --workdir=runs/images_digits
    python experiments/images.py --dataset=cifar100 --network=vit_32 --noise=0 --data_dir=DIR --workdir=runs/vit

Per seed a teacher, two born-again generations and their ensemble, beside what the same work brings without a teacher's
knowledge: smoothed labels, labels for twice as long, an ensemble of independent teachers, and teachers that stop
earlier, among which a validation split with true labels chooses. BAN+L comes with several weights, some beyond 1 for
the teacher and below 0 for the label. The settings were chosen on seeds from 100 on; all that was tried is in
docs/searched.jsonl. Finished results are shown at once, an interrupted run is resumed, and several processes may share
a workdir.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from collections.abc import Sequence

from absl import flags
from etils import epath

from ban_jax import summary
from experiments import cli, results, study
from experiments.tables.spec import EMBEDDED, FITTED, Builder, Columns, Row, independent_ensembles, label_controls

WORKDIR = flags.DEFINE_string("workdir", "runs/images", "Directory for the runs, the table and the plot.")
NOISE = flags.DEFINE_list("noise", ["0", "0.4"], "Shares of wrong labels, a panel each.")
DATASETS = ("cifar10", "cifar100", "digits")
DATASET = flags.DEFINE_enum("dataset", "cifar10", DATASETS, "The images; CIFAR needs --data_dir.")
NETWORK = flags.DEFINE_enum("network", "", ["", "vit_32"], 'The network at the scale cpu; "" is that of the setting.')
TRAIN_EXAMPLES = flags.DEFINE_integer(
  "train_examples", None, "Number of training images, by default that of the setting.", lower_bound=0
)
CIFAR = {**FITTED, "data.validation": 0.04, "train.checkpoint_every": 200}
# Scale -> data set -> network, configuration values, and the earlier stops, in epochs.
SETTINGS = {
  "cpu": {
    "cifar10": ("wrn_10_1", {**CIFAR, "data.train_examples": 1000, "train.epochs": 15}, (8, 11)),
    "cifar100": ("wrn_10_1", {**CIFAR, "data.train_examples": 2500, "train.epochs": 30}, (18,)),
    # All 400 training digits but the 80 of the validation split.
    "digits": ("wrn_10_1", {"data.train_examples": 0, "data.validation": 0.2, "train.evaluate_every": 0}, (20, 30)),
  },
  "smoke": dict.fromkeys(DATASETS, ("mlp_16", {"data.validation": 0.2, "train.checkpoint_every": 100}, (1,))),
}
# With --network: what differs from the data set's setting. A small ViT of 16 patches, so that two cores are enough; at
# 20 epochs and a rate of 0.001 it still underfitted (docs/searched.jsonl).
NETWORKS: dict[str, dict[str, object]] = {
  "vit_32": {
    **{"model.width": 64, "model.layers": 4, "model.patch": 8, "model.drop_path": 0.0},
    **{"optim.learning_rate": 3e-3, "train.epochs": 40},
  }
}
# The teacher's weight in BAN+L; the label's is what is left of 1. Beyond 1 it takes back a part of what the teacher
# believes of the label, which Das and Sanghavi (2023, arXiv:2301.13304) find best under strong noise.
WEIGHTS = (0.5, 1.25, 1.5)


def columns(builder: Builder, network: str, stops: Sequence[int]) -> Columns:
  """Returns a seed's networks: teacher and two students, their ensemble, teachers that stop earlier, controls."""
  teacher = builder.teacher(network)
  students = builder.sequence(teacher, network, "ban", 2)
  found = {"teacher": [teacher], "BAN-1": students[:1], "BAN-2": students[1:], "Ens*2": students}
  for epochs in stops:
    found[f"teacher, {epochs} epochs"] = [builder.changed({"train.epochs": epochs}).teacher(network)]
  row = Row("", network, {})
  controls = label_controls(builder, row)
  for weight in WEIGHTS:
    weighted = builder.changed({"loss.teacher_weight": weight, "loss.label_weight": 1 - weight})
    controls[f"BAN+L, teacher {weight:g}"] = [weighted.student(teacher, network, "ban_label")]
  controls |= independent_ensembles(builder, row, (2,))
  return study.with_controls(found, controls)


def best_stop(panel: study.Panel, per_seed: Sequence[summary.Results], workdir: epath.Path) -> str:
  """Returns what the students bring beyond the teacher at the stop with the lowest mean validation error."""
  names = [column for column in panel.columns[0] if column.partition(", ")[0] == "teacher"]

  def validation(column: str) -> float:
    own = [study.own_metrics(by_name[column][0], workdir)["validation_error"] for by_name in panel.columns]
    return summary.mean_and_error(own)[0]

  stop = min(names, key=validation)
  error = summary.mean_and_error([seed[stop]["error"] for seed in per_seed])[0]
  lines = [f"- the teacher's best stop by the validation split: {stop}, test error {error:.2f} %"]
  for student in ("BAN-1", "BAN-2", "Ens*2"):
    lines.append(f"- {student} minus {stop}: {summary.paired_difference(per_seed, student, stop).text}")
  return "\n".join(lines)


COMPARISONS = (
  *(("BAN-1", other) for other in ("label smoothing", "entropy-matched smoothing", "labels, twice as long")),
  *((f"BAN+L, teacher {weight:g}", "BAN-1") for weight in WEIGHTS),
  ("Ens*2", "independent*2"),
)


def main() -> None:
  """Trains what is missing, then prints the tables and the path of the plot."""
  workdir = study.check_workdir(WORKDIR.value)
  network, changes, stops = SETTINGS[study.SCALE.value][DATASET.value]
  if NETWORK.value and study.SCALE.value != "smoke":
    network, changes = NETWORK.value, {**changes, **NETWORKS[NETWORK.value]}
  if TRAIN_EXAMPLES.value is not None:
    changes = {**changes, "data.train_examples": TRAIN_EXAMPLES.value}
  dataset = EMBEDDED.get(DATASET.value, DATASET.value) if study.SCALE.value == "smoke" else DATASET.value
  panels = []
  for noise in study.numbers("noise", NOISE.value):
    own = {**changes, "data.label_noise": noise}
    by_seed = [columns(study.builder(dataset, seed, own), network, stops) for seed in study.seeds()]
    panels.append(study.Panel(results.labels(noise), by_seed, COMPARISONS))
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

"""Anchors: numbers that others published, reproduced, and then the same networks born again.

    python experiments/anchors.py --anchor=ptb_small --scale=paper --data_dir=PTB --workdir=runs/anchors
    timeout 2h python experiments/anchors.py --anchor=ptb_medium --scale=paper --data_dir=PTB --workdir=runs/anchors

An anchor is a setting of the literature with the number that is known for it. Its teacher is trained first, then
born-again students and the controls, and each column is compared with the teacher, paired by seed. The flags are those
of the tables' scripts: what is finished is shown at once, SIGTERM saves and ends, and the same command resumes, so that
a long anchor can be trained in slices. `--list` shows networks and published numbers, `--dry_run` the cost. Beside the
table stands a file of lines, a lineage each, for experiments/gains.py.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import functools
import json
from collections.abc import Mapping
from typing import Any

from absl import flags

from ban_jax.errors import look_up
from ban_jax.processes import is_primary
from experiments import cli, records, results
from experiments.tables import graph, run
from experiments.tables.report import Output
from experiments.tables.spec import Builder, Columns, Row, Table, independent_ensembles, make_rows

ANCHOR = flags.DEFINE_string("anchor", "ptb_small", "The anchor to train and report; a wrong name lists them.")

TEXT = {"metrics": {"": "perplexity"}, "unit": "test perplexity"}
# SGD as in the Wide-ResNet paper. Evaluated rarely, since that takes a tenth of the time on CPU.
IMAGES = {"train.evaluate_every": 20, "train.checkpoint_every": 100}
# train_teacher.py of RepDistiller, which reports the best epoch on the test images; ours is the last.
REPDISTILLER = {
  **{"train.batch_size": 64, "train.epochs": 240, "optim.learning_rate": 0.05, "optim.nesterov": False},
  **{"optim.schedule": "steps", "optim.boundaries": (150 / 240, 180 / 240, 210 / 240), "optim.factor": 0.1},
}
# deterministic.py of Uncertainty Baselines on eight cores; its l2 of 2e-4 adds twice that, times the weight, to the
# gradient.
UNCERTAINTY_BASELINES = {
  **{"model.dropout": 0.0, "train.batch_size": 512, "optim.learning_rate": 0.4, "optim.weight_decay": 4e-4},
  "optim.warmup": 1 / 200,
}
# main.py of PS-KD (Kim et al. 2021).
PS_KD = {
  **{"train.epochs": 300, "optim.schedule": "steps", "optim.boundaries": (150 / 300, 225 / 300), "optim.factor": 0.1},
}
CALIBRATION = {"metrics": {"": "error", "NLL": "nll", "ECE": "ece"}}
CALIBRATED = ("teacher", "teacher NLL", "teacher ECE")
SMOOTHED = tuple(column.replace("teacher", "label smoothing") for column in CALIBRATED)


def zaremba(steps: int, epochs: int, first: int, factor: float) -> dict[str, object]:
  """Returns the training of Zaremba et al. 2014: the rate is multiplied by `factor` after each epoch from `first` on.

  Their code sums the loss over the steps of a window, with a rate of 1 and a clip norm of 5; ours averages.
  """
  return {
    **{"data.window": steps, "train.batch_size": 20, "train.epochs": epochs, "train.checkpoint_every": 500},
    **{"optim.schedule": "steps", "optim.boundaries": tuple(epoch / epochs for epoch in range(first, epochs))},
    **{"optim.learning_rate": float(steps), "optim.clip_norm": 5 / steps, "optim.factor": factor},
    "train.evaluate_every": 0,
  }


def columns(changes: Mapping[str, object], loss: str, students: int, builder: Builder, row: Row) -> Columns:
  """Returns the networks of a row: a teacher, its born-again students in sequence, and their ensemble."""
  builder = _at_full_length(builder, changes)
  teacher = builder.teacher(row.network)
  sequence = builder.sequence(teacher, row.network, loss, students)
  found = {"teacher": [teacher], **{f"BAN-{number}": [student] for number, student in enumerate(sequence, 1)}}
  return found | ({f"Ens*{students}": sequence} if students > 1 else {})


def controls(changes: Mapping[str, object], builder: Builder, row: Row) -> Columns:
  """Returns the controls of a row: smoothed labels, and an ensemble of two networks that learn from the labels."""
  builder = _at_full_length(builder, changes)
  smoothed = builder.student(builder.teacher(row.network), row.network, "label_smoothing")
  return {"label smoothing": [smoothed], **independent_ensembles(builder, row, (2,))}


def _at_full_length(builder: Builder, changes: Mapping[str, object]) -> Builder:
  """Returns the builder with an anchor's settings; the scale `smoke` keeps its own."""
  return builder if builder.scale == "smoke" else builder.changed(changes)


def anchor(
  name: str,
  title: str,
  dataset: str,
  rows: tuple[Row, ...],
  changes: Mapping[str, object],
  *,
  loss: str = "ban",
  students: int = 1,
  smoke: str = "wrn_10_1",
  **more: object,
) -> Table:
  """Returns an anchor as a table: its published numbers stand where a table of the paper has the paper's."""
  return Table(
    number=name,
    title=title,
    dataset=dataset,
    rows=rows,
    columns=functools.partial(columns, changes, loss, students),
    controls=functools.partial(controls, changes),
    substitutes={"smoke": {row.network: smoke for row in rows}},
    source="the published",
    **more,
  )


ANCHORS = [
  anchor(
    "ptb_small",
    "the Penn Treebank, a small LSTM without dropout. Published: 115 in the README of Zaremba's code, 115.91 by "
    "TensorFlow's tutorial of the same setting",
    "ptb",
    make_rows(("teacher",), ("LSTM 2 x 200", "zaremba_small", "4.7M", 115.0)),
    zaremba(20, 13, 5, 0.5),
    **{"loss": "ban_label", "students": 2, "smoke": "lstm_32"},
    **TEXT,
  ),
  anchor(
    "ptb_medium",
    "the Penn Treebank, a medium LSTM with dropout 0.5. Published: 82.7 by Zaremba et al. 2014, 82.07 by TensorFlow's "
    "tutorial, whose rate falls by 0.8 per epoch in place of 1/1.2",
    "ptb",
    make_rows(("teacher",), ("LSTM 2 x 650", "zaremba_medium", "19.8M", 82.7)),
    zaremba(35, 39, 6, 1 / 1.2),
    **{"loss": "ban_label", "smoke": "lstm_32"},
    **TEXT,
  ),
  anchor(
    "cifar10_wrn_16_1",
    "CIFAR-10, a Wide-ResNet with 0.2M parameters. Published: 91.23 % accuracy by Zagoruyko and Komodakis 2017",
    "cifar10",
    make_rows(("teacher",), ("Wide-ResNet-16-1", "wrn_16_1", "0.2M", 8.77)),
    IMAGES,
  ),
  anchor(
    "cifar10_wrn_16_2",
    "CIFAR-10, a Wide-ResNet with 0.7M parameters. Published: 93.69 % accuracy by Zagoruyko and Komodakis 2017",
    "cifar10",
    make_rows(("teacher",), ("Wide-ResNet-16-2", "wrn_16_2", "0.7M", 6.31)),
    IMAGES,
  ),
  anchor(
    "cifar100_resnet_20",
    "CIFAR-100, ResNet-20. Published: 69.06 % accuracy by RepDistiller, at the best epoch",
    "cifar100",
    make_rows(("teacher",), ("ResNet-20", "resnet_20", "0.28M", 30.94)),
    IMAGES | REPDISTILLER,
  ),
  anchor(
    "cifar100_preact_resnet_18",
    "CIFAR-100, a pre-activated ResNet-18 with its calibration. Published: 24.18 % errors, 1.10 and 0.1184 by PS-KD, "
    "whose network that learns from its last epoch has 20.82 %, 0.76 and 0.0177",
    "cifar100",
    make_rows(
      (*CALIBRATED, *SMOOTHED),
      ("PreAct ResNet-18", "preact_resnet_18", "11.2M", 24.18, 1.10, 0.1184, 20.94, 0.98, 0.1079),
    ),
    IMAGES | PS_KD,
    **CALIBRATION,
  ),
  anchor(
    "cifar10_wrn_28_10",
    "CIFAR-10, Wide-ResNet-28-10 with its calibration. Published: 96.0 %, 0.159 and 0.0231 by Uncertainty Baselines",
    "cifar10",
    make_rows(CALIBRATED, ("Wide-ResNet-28-10", "wrn_28_10", "36.5M", 4.0, 0.159, 0.0231)),
    UNCERTAINTY_BASELINES,
    **CALIBRATION,
  ),
  anchor(
    "cifar100_wrn_28_10",
    "CIFAR-100, Wide-ResNet-28-10 with its calibration. Published: 79.8 %, 0.875 and 0.0857 by Uncertainty Baselines",
    "cifar100",
    make_rows(CALIBRATED, ("Wide-ResNet-28-10", "wrn_28_10", "36.5M", 20.2, 0.875, 0.0857)),
    UNCERTAINTY_BASELINES,
    **CALIBRATION,
  ),
]


def lines(output: Output, data_dir: str) -> list[dict[str, Any]]:
  """Returns the line of each lineage of which a student is finished, by row and seed, for all seeds of the workdir."""
  table, scale, workdir = output
  found = []
  for row in table.rows_at(scale):
    for seed in range(output.existing().seeds):
      columns = table.columns(table.builder(scale, seed, data_dir), row)
      lineage = {name: own[0] for name, own in columns.items() if len(own) == 1 and graph.find(own[0], workdir)}
      if len(lineage) > 1:
        found.append(records.of_lineage(lineage, workdir) | {"anchor": table.number})
  return found


def main() -> None:
  """Trains and reports the anchor that the flag names."""
  output = run.make_table(look_up({table.number: table for table in ANCHORS}, ANCHOR.value, "--anchor"))
  if output is not None and is_primary():
    path = output.workdir / f"{output.table.stem}.jsonl"
    results.write(path, "".join(json.dumps(line) + "\n" for line in lines(output, flags.FLAGS.data_dir)))
    print(f"and {path}")


if __name__ == "__main__":
  run.define_flags()
  cli.run(main)

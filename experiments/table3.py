"""Table 3 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, Wide-ResNets that teach themselves and a DenseNet.

python experiments/table3.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

Paper scale: 36 generations, 8,195 PFLOP; expected (--dry_run) 77 h on an A100, 27 h on an H100, 14 h on a TPU v4-8.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from experiments.tables import run
from experiments.tables.spec import SUBSTITUTES, Builder, Columns, Row, Table, label_controls, make_rows

STUDENT = "densenet_90_60"


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a Wide-ResNet, a student of the same kind, and a DenseNet student of the same teacher."""
  teacher = builder.teacher(row.network)
  return {
    "teacher": [teacher],
    "BAN": [builder.student(teacher, row.network, "ban")],
    "DenseNet-90-60": [builder.student(teacher, STUDENT, "ban")],
  }


def controls(builder: Builder, row: Row) -> Columns:
  """Returns the controls by labels alone, for the teacher's network and for the DenseNet."""
  return label_controls(builder, row) | {"DenseNet-90-60, labels": [builder.teacher(STUDENT)]}


TABLE = Table(
  number=3,
  title="students of Wide-ResNets",
  dataset="cifar100",
  rows=make_rows(
    ("teacher", "BAN", "DenseNet-90-60"),
    ("Wide-ResNet-28-1", "wrn_28_1", "", 30.05, 29.43, 24.93),
    ("Wide-ResNet-28-2", "wrn_28_2", "", 25.32, 24.38, 18.49),
    ("Wide-ResNet-28-5", "wrn_28_5", "", 20.88, 20.93, 17.52),
    ("Wide-ResNet-28-10", "wrn_28_10", "", 19.08, 18.25, 16.79),
  ),
  columns=columns,
  controls=controls,
  substitutes={"cpu": SUBSTITUTES, "smoke": {"wrn_28_1": "mlp_16", STUDENT: "mlp_32"}},
)

if __name__ == "__main__":
  run.main(TABLE)

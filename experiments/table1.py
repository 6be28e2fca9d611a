"""Table 1 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-10, a teacher and its born-again student.

python experiments/table1.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

Paper scale: 48 generations, 19,796 PFLOP; expected (--dry_run) 181 h on an A100, 61 h on an H100, 30 h on a TPU v4-8.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from experiments.tables import run
from experiments.tables.spec import SUBSTITUTES, Builder, Columns, Row, Table, label_controls, make_rows


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a network that learns from the labels, and one of the same kind that learns from it."""
  teacher = builder.teacher(row.network)
  return {"teacher": [teacher], "BAN": [builder.student(teacher, row.network, "ban")]}


TABLE = Table(
  number=1,
  title="a teacher and its born-again student",
  dataset="cifar10",
  rows=make_rows(
    ("teacher", "BAN"),
    ("Wide-ResNet-28-1", "wrn_28_1", "0.38M", 6.69, 6.64),
    ("Wide-ResNet-28-2", "wrn_28_2", "1.48M", 5.06, 4.86),
    ("Wide-ResNet-28-5", "wrn_28_5", "9.16M", 4.13, 4.03),
    ("Wide-ResNet-28-10", "wrn_28_10", "36M", 3.77, 3.86),
    ("DenseNet-112-33", "densenet_112_33", "6.3M", 3.84, 3.61),
    ("DenseNet-90-60", "densenet_90_60", "16.1M", 3.81, 3.5),
    ("DenseNet-80-80", "densenet_80_80", "22.4M", 3.48, 3.49),
    ("DenseNet-80-120", "densenet_80_120", "50.4M", 3.37, 3.54),
  ),
  columns=columns,
  controls=label_controls,
  substitutes={"cpu": SUBSTITUTES, "smoke": {"wrn_28_1": "mlp_16"}},
)

if __name__ == "__main__":
  run.main(TABLE)

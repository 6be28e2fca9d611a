"""Table 3 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, Wide-ResNets that teach themselves and a DenseNet.

python experiments/table3.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

At the paper's scale with three seeds: 36 generations, 8,195 PFLOP; expected, not measured:
77 h on one A100, 27 h on one H100, 14 h on one TPU v4-8 (--dry_run names the assumptions).
"""

from experiments.tables import run
from experiments.tables.spec import SUBSTITUTES, Builder, Columns, Row, Table, label_controls

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
  rows=(
    Row("Wide-ResNet-28-1", "wrn_28_1", {"teacher": 30.05, "BAN": 29.43, "DenseNet-90-60": 24.93}),
    Row("Wide-ResNet-28-2", "wrn_28_2", {"teacher": 25.32, "BAN": 24.38, "DenseNet-90-60": 18.49}),
    Row("Wide-ResNet-28-5", "wrn_28_5", {"teacher": 20.88, "BAN": 20.93, "DenseNet-90-60": 17.52}),
    Row("Wide-ResNet-28-10", "wrn_28_10", {"teacher": 19.08, "BAN": 18.25, "DenseNet-90-60": 16.79}),
  ),
  columns=columns,
  controls=controls,
  substitutes={"cpu": SUBSTITUTES, "smoke": {"wrn_28_1": "wrn_10_1", STUDENT: "densenet_10_16"}},
)

if __name__ == "__main__":
  run.main(TABLE)

"""Table 3 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, Wide-ResNets that teach themselves and a DenseNet.

python experiments/table3.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

The whole table at the paper's scale, three seeds: 36 generations, 8,195 PFLOP (10^15 operations) of training;
expected 77 h on one A100, 27 h on one H100, 14 h on one TPU v4-8. That is arithmetic, by the assumptions that
--dry_run names, and no measurement; --rows, --seeds and --shard divide it.
"""

from experiments import tables
from experiments.tables import Columns, Lab, Row, Table

STUDENT = "densenet_90_60"


def columns(lab: Lab, row: Row) -> Columns:
  """Returns a row's networks: a Wide-ResNet, a student of the same kind, and a DenseNet that learns from the same."""
  teacher = lab.teacher(row.network)
  return {
    "teacher": [teacher],
    "BAN": [lab.student(teacher, row.network, "ban")],
    "DenseNet-90-60": [lab.student(teacher, STUDENT, "ban")],
  }


def controls(lab: Lab, row: Row) -> Columns:
  """Returns what labels alone can do, for the teacher's network and for the DenseNet."""
  return tables.label_controls(lab, row) | {"DenseNet-90-60, labels": [lab.teacher(STUDENT)]}


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
  stand_ins={"cpu": tables.SMALL, "smoke": {"wrn_28_1": "wrn_10_1", STUDENT: "densenet_10_16"}},
)

if __name__ == "__main__":
  tables.run(TABLE)

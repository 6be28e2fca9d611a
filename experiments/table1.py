"""Table 1 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-10, a teacher and its born-again student.

python experiments/table1.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

At the paper's scale with three seeds: 48 generations, 19,796 PFLOP; expected, not measured:
181 h on one A100, 61 h on one H100, 30 h on one TPU v4-8 (--dry_run names the assumptions).
"""

from experiments.tables import run
from experiments.tables.spec import SUBSTITUTES, Builder, Columns, Row, Table, label_controls


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a network that learns from the labels, and one of the same kind that learns from it."""
  teacher = builder.teacher(row.network)
  return {"teacher": [teacher], "BAN": [builder.student(teacher, row.network, "ban")]}


TABLE = Table(
  number=1,
  title="a teacher and its born-again student",
  dataset="cifar10",
  rows=(
    Row("Wide-ResNet-28-1", "wrn_28_1", {"teacher": 6.69, "BAN": 6.64}),
    Row("Wide-ResNet-28-2", "wrn_28_2", {"teacher": 5.06, "BAN": 4.86}),
    Row("Wide-ResNet-28-5", "wrn_28_5", {"teacher": 4.13, "BAN": 4.03}),
    Row("Wide-ResNet-28-10", "wrn_28_10", {"teacher": 3.77, "BAN": 3.86}),
    Row("DenseNet-112-33", "densenet_112_33", {"teacher": 3.84, "BAN": 3.61}),
    Row("DenseNet-90-60", "densenet_90_60", {"teacher": 3.81, "BAN": 3.5}),
    Row("DenseNet-80-80", "densenet_80_80", {"teacher": 3.48, "BAN": 3.49}),
    Row("DenseNet-80-120", "densenet_80_120", {"teacher": 3.37, "BAN": 3.54}),
  ),
  columns=columns,
  controls=label_controls,
  parameters={
    "wrn_28_1": "0.38M",
    "wrn_28_2": "1.48M",
    "wrn_28_5": "9.16M",
    "wrn_28_10": "36M",
    "densenet_112_33": "6.3M",
    "densenet_90_60": "16.1M",
    "densenet_80_80": "22.4M",
    "densenet_80_120": "50.4M",
  },
  substitutes={"cpu": SUBSTITUTES, "smoke": {"wrn_28_1": "wrn_10_1"}},
)

if __name__ == "__main__":
  run.main(TABLE)

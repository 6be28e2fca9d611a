"""Table 5 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, ResNets taught by a DenseNet.

    python experiments/table5.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

First and last layer are copied from the teacher and frozen, also in the baseline, which learns from the labels. The
numbers in a name are the units per stage and the ratio of the stages' widths. ban_jax/models/matched_resnet.py explains
our reading of the bottleneck students. The paper quotes the Pre-activation ResNet-1001 from He et al. 2016.

Paper scale: 39 generations, 24,720 PFLOP; expected (--dry_run) 224 h on an A100, 74 h on an H100, 35 h on a TPU v4-8.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from experiments.tables import run
from experiments.tables.spec import Builder, Columns, Row, Table, make_rows

TEACHER = "densenet_90_60"


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a student by labels alone and one by BAN, both with the teacher's first and last layer."""
  teacher = builder.teacher(TEACHER)
  return {
    "baseline": [builder.student(teacher, row.network, "label")],
    "BAN": [builder.student(teacher, row.network, "ban")],
  }


def controls(builder: Builder, row: Row) -> Columns:
  """Returns the teacher itself."""
  return {"teacher, DenseNet-90-60": [builder.teacher(TEACHER)]}


TABLE = Table(
  number=5,
  title="ResNets taught by DenseNet-90-60, whose first and last layer they keep",
  dataset="cifar100",
  rows=make_rows(
    ("baseline", "BAN"),
    ("Pre-activation ResNet-1001", None, "", 22.71, None),
    ("BAN-Pre-ResNet-14-0.5", "pre_resnet_14_0_5", "7.3M", 20.28, 18.8),
    ("BAN-Pre-ResNet-14-1", "pre_resnet_14_1", "17.7M", 18.84, 17.39),
    ("BAN-Wide-ResNet-1-1", "wide_match_1_1", "20.9M", 20.4, 19.12),
    ("BAN-Match-Wide-ResNet-2-1", "wide_match_2_1", "43.1M", 18.83, 17.42),
    ("BAN-Wide-ResNet-4-0.5", "wide_match_4_0_5", "24.3M", 19.63, 17.13),
    ("BAN-Wide-ResNet-4-1", "wide_match_4_1", "87.3M", 18.77, 17.18),
  ),
  columns=columns,
  controls=controls,
  substitutes={
    "cpu": {
      TEACHER: "densenet_16_8",
      "pre_resnet_14_0_5": "small_pre_resnet_2_0_5",
      "pre_resnet_14_1": "small_pre_resnet_2_1",
      "wide_match_1_1": "small_wide_match_1_1",
      "wide_match_2_1": "small_wide_match_2_1",
      "wide_match_4_0_5": "small_wide_match_4_0_5",
      "wide_match_4_1": "small_wide_match_4_1",
    },
    "smoke": {
      TEACHER: "densenet_10_16",
      "pre_resnet_14_1": "small_pre_resnet_1_1",
      "wide_match_1_1": "small_wide_match_1_1",
    },
  },
  reference="baseline",
)

if __name__ == "__main__":
  run.main(TABLE)

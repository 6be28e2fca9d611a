"""Table 5 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, ResNets taught by a DenseNet.

    python experiments/table5.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

First and last layer are copied from the teacher and frozen, also in the baseline, which learns from the labels. The
numbers in a name are the units per stage and the ratio of the stages' widths. ban_jax/models/matched_resnet.py explains
our reading of the bottleneck students. The paper quotes the Pre-activation ResNet-1001 from He et al. 2016.

At the paper's scale with three seeds: 39 generations, 24,720 PFLOP; expected, not measured:
224 h on one A100, 74 h on one H100, 35 h on one TPU v4-8 (--dry_run names the assumptions).
"""

from experiments.tables import run
from experiments.tables.spec import Builder, Columns, Row, Table

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
  rows=(
    Row("Pre-activation ResNet-1001", None, {"baseline": 22.71}),
    Row("BAN-Pre-ResNet-14-0.5", "pre_resnet_14_0_5", {"baseline": 20.28, "BAN": 18.8}),
    Row("BAN-Pre-ResNet-14-1", "pre_resnet_14_1", {"baseline": 18.84, "BAN": 17.39}),
    Row("BAN-Wide-ResNet-1-1", "wide_match_1_1", {"baseline": 20.4, "BAN": 19.12}),
    Row("BAN-Match-Wide-ResNet-2-1", "wide_match_2_1", {"baseline": 18.83, "BAN": 17.42}),
    Row("BAN-Wide-ResNet-4-0.5", "wide_match_4_0_5", {"baseline": 19.63, "BAN": 17.13}),
    Row("BAN-Wide-ResNet-4-1", "wide_match_4_1", {"baseline": 18.77, "BAN": 17.18}),
  ),
  columns=columns,
  controls=controls,
  parameters={
    "pre_resnet_14_0_5": "7.3M",
    "pre_resnet_14_1": "17.7M",
    "wide_match_1_1": "20.9M",
    "wide_match_2_1": "43.1M",
    "wide_match_4_0_5": "24.3M",
    "wide_match_4_1": "87.3M",
  },
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

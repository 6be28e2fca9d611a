"""Table 5 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, ResNets taught by a DenseNet.

    python experiments/table5.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

First and last layer are copied from the teacher and frozen, for the baseline, which learns from the labels, too. A
name's numbers are units a stage and the ratio of the stages' widths. The bottleneck students are a reading
(ban_jax/models/matched_resnet.py). The Pre-activation ResNet-1001 is quoted there from He et al. 2016.

The whole table at the paper's scale, three seeds: 39 generations, 24,720 PFLOP (10^15 operations) of training;
expected 224 h on one A100, 74 h on one H100, 35 h on one TPU v4-8. That is arithmetic, by the assumptions that
--dry_run names, and no measurement; --rows, --seeds and --shard divide it.
"""

from experiments import tables
from experiments.tables import Columns, Lab, Row, Table

TEACHER = "densenet_90_60"


def columns(lab: Lab, row: Row) -> Columns:
  """Returns a student by the labels alone and one by BAN, both between the same teacher's layers."""
  teacher = lab.teacher(TEACHER)
  return {
    "baseline": [lab.student(teacher, row.network, "label")],
    "BAN": [lab.student(teacher, row.network, "ban")],
  }


def controls(lab: Lab, row: Row) -> Columns:
  """Returns the teacher itself."""
  return {"teacher, DenseNet-90-60": [lab.teacher(TEACHER)]}


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
  stand_ins={
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
  tables.run(TABLE)

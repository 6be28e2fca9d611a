"""Table 4 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, students deeper, shallower and otherwise compressed.

    python experiments/table4.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

The paper does not define its compression: configs/presets.py has our reading, which does not reproduce the counts.

At the paper's scale with three seeds: 24 generations, 14,797 PFLOP; expected, not measured:
134 h on one A100, 44 h on one H100, 21 h on one TPU v4-8 (--dry_run names the assumptions).
"""

from experiments.tables import run
from experiments.tables.spec import Builder, Columns, Row, Table

STUDENTS = {
  "0.5x depth": "densenet_90_60_depth_0_5",
  "2x depth": "densenet_90_60_depth_2",
  "3x depth": "densenet_90_60_depth_3",
  "4x depth": "densenet_90_60_depth_4",
  "0.5x compr.": "densenet_90_60_compression_0_5",
  "0.75x compr.": "densenet_90_60_compression_0_75",
  "1.5x compr.": "densenet_90_60_compression_1_5",
}


def columns(builder: Builder, row: Row) -> Columns:
  """Returns the teacher and those of its students that exist at the scale."""
  teacher = builder.teacher(row.network)
  students = {column: network for column, network in STUDENTS.items() if builder.has(network)}
  return {
    "teacher": [teacher],
    **{column: [builder.student(teacher, network, "ban")] for column, network in students.items()},
  }


def controls(builder: Builder, row: Row) -> Columns:
  """Returns the students' networks, trained from the labels alone."""
  students = {column: network for column, network in STUDENTS.items() if builder.has(network)}
  return {f"{column}, labels": [builder.teacher(network)] for column, network in students.items()}


TABLE = Table(
  number=4,
  title="modified DenseNet-90-60s taught by DenseNet-90-60",
  dataset="cifar100",
  rows=(
    Row(
      "DenseNet-90-60",
      "densenet_90_60",
      {"teacher": 17.69, **dict(zip(STUDENTS, (16.95, 16.43, 16.64, 16.64, 19.83, 17.3, 18.89), strict=True))},
    ),
  ),
  columns=columns,
  controls=controls,
  parameters={
    "densenet_90_60": "22.4M (sic)",
    "densenet_90_60_depth_0_5": "21.2M",
    "densenet_90_60_depth_2": "13.7M",
    "densenet_90_60_depth_3": "12.9M",
    "densenet_90_60_depth_4": "12.6M",
    "densenet_90_60_compression_0_5": "5.1M",
    "densenet_90_60_compression_0_75": "10.1M",
    "densenet_90_60_compression_1_5": "80.5M",
  },
  substitutes={
    "cpu": {
      "densenet_90_60": "densenet_16_8",
      "densenet_90_60_depth_0_5": "densenet_10_16",
      "densenet_90_60_depth_2": "densenet_28_4",
      "densenet_90_60_depth_3": "densenet_40_3",
      "densenet_90_60_depth_4": "densenet_52_2",
      "densenet_90_60_compression_0_5": "densenet_16_8_compression_0_5",
      "densenet_90_60_compression_0_75": "densenet_16_8_compression_0_75",
      "densenet_90_60_compression_1_5": "densenet_16_8_compression_1_5",
    },
    # The teacher has one unit per stage, so the only possible variant in depth is the one with two.
    "smoke": {
      "densenet_90_60": "densenet_10_16",
      "densenet_90_60_depth_2": "densenet_16_8",
      "densenet_90_60_compression_0_75": "densenet_10_16_compression_0_75",
    },
  },
  by_row=False,
)

if __name__ == "__main__":
  run.main(TABLE)

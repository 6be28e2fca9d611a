"""Table 4 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, students deeper, shallower and otherwise compressed.

    python experiments/table4.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

The paper does not define its compression: ban_jax/presets has our reading, which does not reproduce the counts.

Paper scale: 24 generations, 14,797 PFLOP; expected (--dry_run) 134 h on an A100, 44 h on an H100, 21 h on a TPU v4-8.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from typing import NamedTuple

from experiments.tables import run
from experiments.tables.spec import Builder, Columns, Row, Table


class Student(NamedTuple):
  """A student: its network, the paper's error and parameters, and its substitute at the cpu scale."""

  network: str
  error: float
  parameters: str
  substitute: str


STUDENTS = {
  "0.5x depth": Student("densenet_90_60_depth_0_5", 16.95, "21.2M", "densenet_10_16"),
  "2x depth": Student("densenet_90_60_depth_2", 16.43, "13.7M", "densenet_28_4"),
  "3x depth": Student("densenet_90_60_depth_3", 16.64, "12.9M", "densenet_40_3"),
  "4x depth": Student("densenet_90_60_depth_4", 16.64, "12.6M", "densenet_52_2"),
  "0.5x compr.": Student("densenet_90_60_compression_0_5", 19.83, "5.1M", "densenet_16_8_compression_0_5"),
  "0.75x compr.": Student("densenet_90_60_compression_0_75", 17.3, "10.1M", "densenet_16_8_compression_0_75"),
  "1.5x compr.": Student("densenet_90_60_compression_1_5", 18.89, "80.5M", "densenet_16_8_compression_1_5"),
}


def networks(builder: Builder) -> dict[str, str]:
  """Returns the students' networks that exist at the scale, by column."""
  return {column: student.network for column, student in STUDENTS.items() if builder.has(student.network)}


def columns(builder: Builder, row: Row) -> Columns:
  """Returns the teacher and its students."""
  teacher = builder.teacher(row.network)
  students = {column: [builder.student(teacher, network, "ban")] for column, network in networks(builder).items()}
  return {"teacher": [teacher], **students}


def controls(builder: Builder, row: Row) -> Columns:
  """Returns the students' networks, trained from the labels alone."""
  return {f"{column}, labels": [builder.teacher(network)] for column, network in networks(builder).items()}


ERRORS = {"teacher": 17.69, **{column: student.error for column, student in STUDENTS.items()}}
TABLE = Table(
  number=4,
  title="modified DenseNet-90-60s taught by DenseNet-90-60",
  dataset="cifar100",
  rows=(Row("DenseNet-90-60", "densenet_90_60", ERRORS, "22.4M (sic)"),),
  columns=columns,
  controls=controls,
  more_parameters={student.network: student.parameters for student in STUDENTS.values()},
  substitutes={
    "cpu": {"densenet_90_60": "densenet_16_8"} | {each.network: each.substitute for each in STUDENTS.values()},
    "smoke": {"densenet_90_60": "mlp_16", "densenet_90_60_depth_2": "mlp_32"},
  },
  by_row=False,
)

if __name__ == "__main__":
  run.main(TABLE)

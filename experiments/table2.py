"""Table 2 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, every loss, three generations and their ensembles.

python experiments/table2.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

Paper scale: 93 generations, 69,160 PFLOP; expected (--dry_run) 626 h on an A100, 204 h on an H100, 97 h on a TPU v4-8.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from experiments.tables import run
from experiments.tables.spec import (
  SUBSTITUTES,
  Builder,
  Columns,
  Row,
  Table,
  independent_ensembles,
  label_controls,
  make_rows,
)

# Losses of the direct students of the teacher; BAN is BAN-1 with another seed.
LOSSES = {"BAN": "ban", "BAN+L": "ban_label", "CWTM": "cwtm", "DKPP": "dkpp"}


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a teacher, a student of it by each loss, a sequence of students, and the ensembles of the sequence."""
  teacher = builder.teacher(row.network)
  students = {column: [builder.student(teacher, row.network, loss, variant=1)] for column, loss in LOSSES.items()}
  # The paper has no BAN-3 of DenseNet-80-120; its Ens*3 is the teacher, BAN-1 and BAN-2.
  short = row.name == "DenseNet-80-120"
  sequence = builder.sequence(teacher, row.network, "ban", 2 if short else 3)
  generations = {f"BAN-{number}": [node] for number, node in enumerate(sequence, 1)}
  ensembles = {"Ens*2": sequence[:2], "Ens*3": [teacher, *sequence] if short else sequence}
  return {"teacher": [teacher], **students, **generations, **ensembles}


def controls(builder: Builder, row: Row) -> Columns:
  """Returns the controls by labels alone, and ensembles of the same sizes without any teacher."""
  return label_controls(builder, row, variant=1) | independent_ensembles(builder, row, (2, 3))


TABLE = Table(
  number=2,
  title="every loss, generations and ensembles",
  dataset="cifar100",
  rows=make_rows(
    ("teacher", *LOSSES, "BAN-1", "BAN-2", "BAN-3", "Ens*2", "Ens*3"),
    ("DenseNet-112-33", "densenet_112_33", "", 18.25, 16.95, 17.68, 17.84, 17.84, 17.61, 17.22, 16.59, 15.77, 15.68),
    ("DenseNet-90-60", "densenet_90_60", "", 17.69, 16.69, 16.93, 17.42, 17.43, 16.62, 16.44, 16.72, 15.39, 15.74),
    ("DenseNet-80-80", "densenet_80_80", "", 17.16, 16.36, 16.5, 17.16, 16.84, 16.26, 16.30, 15.5, 15.46, 15.14),
    ("DenseNet-80-120", "densenet_80_120", "", 16.87, 16.00, 16.41, 17.12, 16.34, 16.13, 16.13, None, 15.13, 14.9),
  ),
  columns=columns,
  controls=controls,
  substitutes={"cpu": SUBSTITUTES, "smoke": {"densenet_112_33": "mlp_16"}},
  by_row=False,
)

if __name__ == "__main__":
  run.main(TABLE)

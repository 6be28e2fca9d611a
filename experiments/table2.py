"""Table 2 of Furlanello et al. 2018 (arXiv:1805.04770): CIFAR-100, every loss, three generations and their ensembles.

python experiments/table2.py --scale=paper --data_dir=DIR --workdir=runs/tables/paper

The whole table at the paper's scale, three seeds: 93 generations, 69,160 PFLOP (10^15 operations) of training;
expected 626 h on one A100, 204 h on one H100, 97 h on one TPU v4-8. That is arithmetic, by the assumptions that
--dry_run names, and no measurement; --rows, --seeds and --shard divide it.
"""

from experiments import tables
from experiments.tables import Columns, Lab, Row, Table

# Of the students that the teacher teaches once: BAN is another draw of what BAN-1 is.
LOSSES = {"BAN": "ban", "BAN+L": "ban_label", "CWTM": "cwtm", "DKPP": "dkpp"}


def columns(lab: Lab, row: Row) -> Columns:
  """Returns a row's networks: a teacher, a student of it by each loss, a sequence of students, and its ensembles."""
  teacher = lab.teacher(row.network)
  students = {column: [lab.student(teacher, row.network, loss, variant=1)] for column, loss in LOSSES.items()}
  # The paper has no BAN-3 of DenseNet-80-120; its Ens*3 is the teacher, BAN-1 and BAN-2.
  short = row.name == "DenseNet-80-120"
  sequence = lab.sequence(teacher, row.network, "ban", 2 if short else 3)
  generations = {f"BAN-{number}": [part] for number, part in enumerate(sequence, 1)}
  ensembles = {"Ens*2": sequence[:2], "Ens*3": [teacher, *sequence] if short else sequence}
  return {"teacher": [teacher], **students, **generations, **ensembles}


def controls(lab: Lab, row: Row) -> Columns:
  """Returns what labels alone can do, and ensembles of as many networks that no other has taught."""
  return tables.label_controls(lab, row, variant=1) | tables.independent_ensembles(lab, row, (2, 3))


def numbers(*values: float | None) -> dict[str, float]:
  """Returns a row's numbers by column."""
  names = ("teacher", *LOSSES, "BAN-1", "BAN-2", "BAN-3", "Ens*2", "Ens*3")
  return {name: value for name, value in zip(names, values, strict=True) if value is not None}


TABLE = Table(
  number=2,
  title="every loss, generations and ensembles",
  dataset="cifar100",
  rows=(
    Row(
      "DenseNet-112-33",
      "densenet_112_33",
      numbers(18.25, 16.95, 17.68, 17.84, 17.84, 17.61, 17.22, 16.59, 15.77, 15.68),
    ),
    Row(
      "DenseNet-90-60",
      "densenet_90_60",
      numbers(17.69, 16.69, 16.93, 17.42, 17.43, 16.62, 16.44, 16.72, 15.39, 15.74),
    ),
    Row(
      "DenseNet-80-80",
      "densenet_80_80",
      numbers(17.16, 16.36, 16.5, 17.16, 16.84, 16.26, 16.30, 15.5, 15.46, 15.14),
    ),
    Row(
      "DenseNet-80-120",
      "densenet_80_120",
      numbers(16.87, 16.00, 16.41, 17.12, 16.34, 16.13, 16.13, None, 15.13, 14.9),
    ),
  ),
  columns=columns,
  controls=controls,
  stand_ins={"cpu": tables.SMALL, "smoke": {"densenet_112_33": "densenet_10_16"}},
  by_row=False,
)

if __name__ == "__main__":
  tables.run(TABLE)

"""Table 6 of Furlanello et al. 2018 (arXiv:1805.04770): the Penn Treebank, language models and their BAN+L students.

    python experiments/table6.py --scale=paper --data_dir=PTB --workdir=runs/tables/paper

PTB is a directory with ptb.train.txt, ptb.valid.txt and ptb.test.txt, which you supply.

Paper scale: 12 generations, 110 PFLOP; expected (--dry_run) 1.7 h on an A100, 1 h on an H100, 0.86 h on a TPU v4-8.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from experiments.tables import run
from experiments.tables.spec import Builder, Columns, Row, Table, label_controls, make_rows


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a language model, and one of the same kind that learns from it and from the text."""
  teacher = builder.teacher(row.network)
  return {"teacher": [teacher], "BAN+L": [builder.student(teacher, row.network, "ban_label")]}


TABLE = Table(
  number=6,
  title="language models and their born-again students",
  dataset="ptb",
  rows=make_rows(
    ("teacher val", "BAN+L val", "teacher test", "BAN+L test"),
    ("CNN-LSTM", "cnn_lstm", "19M", 83.69, 80.27, 80.05, 76.97),
    ("LSTM", "lstm", "52M", 75.11, 71.19, 71.87, 68.56),
  ),
  columns=columns,
  controls=label_controls,
  substitutes={"cpu": {"cnn_lstm": "cnn_lstm_32", "lstm": "lstm_200"}, "smoke": {"cnn_lstm": "cnn_lstm_32"}},
  metrics={"val": "validation_perplexity", "test": "perplexity"},
  unit="perplexity",
)

if __name__ == "__main__":
  run.main(TABLE)

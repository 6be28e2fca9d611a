"""Table 6 of Furlanello et al. 2018 (arXiv:1805.04770): the Penn Treebank, language models and their BAN+L students.

    python experiments/table6.py --scale=paper --data_dir=PTB --workdir=runs/tables/paper

PTB is a directory with ptb.train.txt, ptb.valid.txt and ptb.test.txt, which you supply.

At the paper's scale with three seeds: 12 generations, 110 PFLOP; expected, not measured:
1.7 h on one A100, 1 h on one H100, 0.86 h on one TPU v4-8 (--dry_run names the assumptions).
"""

from experiments.tables import run
from experiments.tables.spec import Builder, Columns, Row, Table, label_controls


def columns(builder: Builder, row: Row) -> Columns:
  """Returns a language model, and one of the same kind that learns from it and from the text."""
  teacher = builder.teacher(row.network)
  return {"teacher": [teacher], "BAN+L": [builder.student(teacher, row.network, "ban_label")]}


TABLE = Table(
  number=6,
  title="language models and their born-again students",
  dataset="ptb",
  rows=(
    Row("CNN-LSTM", "cnn_lstm", {"teacher val": 83.69, "BAN+L val": 80.27, "teacher test": 80.05, "BAN+L test": 76.97}),
    Row("LSTM", "lstm", {"teacher val": 75.11, "BAN+L val": 71.19, "teacher test": 71.87, "BAN+L test": 68.56}),
  ),
  columns=columns,
  controls=label_controls,
  parameters={"cnn_lstm": "19M", "lstm": "52M"},
  substitutes={"cpu": {"cnn_lstm": "cnn_lstm_32", "lstm": "lstm_200"}, "smoke": {"cnn_lstm": "cnn_lstm_32"}},
  metrics={"val": "validation_perplexity", "test": "perplexity"},
  unit="perplexity",
)

if __name__ == "__main__":
  run.main(TABLE)

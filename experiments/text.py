"""The effect on text: a language model, its born-again students, and what the same work brings without a teacher.

    python experiments/text.py --workdir=runs/text
    python experiments/text.py --dataset=ptb --data_dir=PTB --workdir=runs/ptb
    python experiments/text.py --dataset=characters --controls="labels, twice as long" --workdir=runs/characters

Per seed a teacher, BAN+L generations, and the controls: a second network from the labels, one trained for twice as
long, one with more dropout (and its student), and an ensemble of teacher and second network beside that of the two
generations. Differences from the teacher are paired by seed. pydoc comes with Python; PTB is a directory with
ptb.train.txt, ptb.valid.txt and ptb.test.txt; characters are those of pydoc, learned by a GPT. Finished results are
shown at once, an interrupted run is resumed, and several processes may share a workdir.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from absl import flags

from experiments import cli, results, study
from experiments.tables.spec import Builder, Columns

WORKDIR = flags.DEFINE_string("workdir", "runs/text", "Directory for the runs, the table and the plot.")
STUDENTS = flags.DEFINE_integer("students", 2, "Number of born-again generations.", lower_bound=1)
DATASET = flags.DEFINE_enum(
  "dataset", "pydoc", ["pydoc", "ptb", "characters"], "pydoc (embedded), ptb (files, --data_dir) or pydoc's characters."
)
# A plateau schedule needs the validation split after each epoch; the test split is read once, at the end.
SHARED = {"train.evaluate_every": 0, "train.checkpoint_every": 250}
# Scale -> data set -> network, configuration values, and the dropout of the control that has more. Chosen by the
# validation split on seeds from 100 on (for ptb only the control's dropout); docs/searched.jsonl has what was tried.
SETTINGS = {
  "cpu": {
    "pydoc": ("lstm_200", {"model.units": 100, "model.dropout": 0.2, "train.epochs": 30}, 0.3),
    # The first 200,000 of the 930,000 training tokens, which a network of this size overfits within 20 epochs.
    "ptb": ("lstm_200", {"data.train_examples": 200_000, "model.dropout": 0.2, "train.epochs": 20}, 0.5),
    # Found on seed 100: such a teacher overfits (docs/results.md).
    "characters": (
      "gpt_64",
      {
        **{"data.tokens": "characters", "data.train_examples": 20_000, "data.window": 32, "model.layers": 2},
        **{"model.width": 32, "optim.learning_rate": 3e-3, "train.batch_size": 16, "train.epochs": 30},
      },
      0.2,
    ),
  },
  "smoke": {
    **dict.fromkeys(("pydoc", "ptb"), ("lstm_32", {}, 0.3)),
    "characters": ("gpt_64", {"data.tokens": "characters", "model.layers": 1, "model.width": 16}, 0.3),
  },
}


def columns(builder: Builder, network: str, dropout: float) -> Columns:
  """Returns a seed's networks: teacher, students in sequence, their ensemble, and the controls."""
  teacher, second = builder.teacher(network), builder.teacher(network, variant=2)
  students = builder.sequence(teacher, network, "ban_label", STUDENTS.value)
  found = {"teacher": [teacher], **{f"BAN-{number}": [student] for number, student in enumerate(students, 1)}}
  if len(students) > 1:
    found[f"Ens*{len(students)}"] = students
  dropped = builder.changed({"model.dropout": dropout})
  rival = dropped.teacher(network)
  controls = {
    "second teacher": [second],
    f"teacher, dropout {dropout:g}": [rival],
    f"BAN-1, dropout {dropout:g}": [dropped.student(rival, network, "ban_label")],
    "labels, twice as long": [builder.teacher(network, variant=1, longer=2)],
    "independent*2": [teacher, second],
  }
  return study.with_controls(found, controls)


def main() -> None:
  """Trains what is missing, then prints the table and the path of the plot."""
  workdir = study.check_workdir(WORKDIR.value)
  network, changes, dropout = SETTINGS[study.SCALE.value][DATASET.value]
  letters = DATASET.value == "characters"
  dataset = "pydoc" if letters else DATASET.value
  by_seed = [columns(study.builder(dataset, seed, SHARED | changes), network, dropout) for seed in study.seeds()]
  more = f"dropout {dropout:g}"
  rivals = ("second teacher", f"teacher, {more}", "labels, twice as long")
  students = [f"BAN-{number}" for number in range(1, STUDENTS.value + 1)]
  comparisons = [(student, rival) for student in students for rival in rivals]
  comparisons += [(f"BAN-1, {more}", f"teacher, {more}"), ("BAN-1", f"BAN-1, {more}"), ("Ens*2", "independent*2")]
  panel = study.Panel(DATASET.value, by_seed, comparisons)
  found = study.train([panel], workdir)
  cfg = by_seed[0]["BAN-1"][0].cfg
  examples = f"{cfg.data.train_examples:,}" if cfg.data.train_examples else "all"
  unit = "bits per character" if letters else "perplexity"
  heading = (
    f"{DATASET.value}, {examples} training tokens, {results.network(cfg.model)}, {cfg.train.epochs} epochs, students "
    f"by {cfg.loss.name}, {study.named_seeds()}; mean ± standard error, test split, last epoch; {unit} minus the "
    "teacher's paired by seed, with its 95% interval"
  )
  metric = "bits_per_character" if letters else "perplexity"
  study.report([panel], study.Report("text", heading, metric, f"test {unit}"), workdir, found)


if __name__ == "__main__":
  cli.run(main)

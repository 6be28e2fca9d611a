"""One teacher, and a student of it by each loss, controls included: checks that every loss trains, at any scale.

    python experiments/losses.py --config=configs/cifar.py:cifar100,wrn_16_1,cpu --workdir=runs/losses

A run shorter than the paper's shows that a loss works, not which loss is best.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from absl import flags
from ml_collections import config_flags

import ban_jax
from ban_jax import storage, summary
from ban_jax.losses import LOSSES
from ban_jax.processes import is_primary
from experiments import cli, results

CONFIG = config_flags.DEFINE_config_file("config", None, "A configuration; each loss in turn replaces its own.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs; unfinished ones are resumed.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
  """Trains what is missing, prints the table and writes it to workdir/losses.md."""
  cfg, devices, workdir = CONFIG.value, cli.start_jax(), storage.resolve_workdir(WORKDIR.value)
  options = {"devices": devices, "progress": cli.PROGRESS.value}
  teacher = ban_jax.train_generation(None, cfg, workdir=workdir / "teacher", **options)
  rows = {"teacher": ban_jax.evaluate(teacher, cfg, devices=devices)}
  for name in LOSSES:
    student_cfg = cfg.copy_and_resolve_references()
    student_cfg.loss.name = name
    student = ban_jax.train_generation(teacher, student_cfg, workdir=workdir / name, **options)
    rows[name] = ban_jax.evaluate(student, student_cfg, devices=devices)
  if is_primary():
    text = f"{results.describe(cfg, 'by row')}\n\n{summary.table([rows])}\n"
    results.write(workdir / "losses.md", text)
    print(f"{text}\ntable: {workdir / 'losses.md'}")


if __name__ == "__main__":
  cli.run(main)

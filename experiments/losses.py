"""One teacher, and one student of it by each loss, the controls included: that every loss trains, at whatever scale.

    python experiments/losses.py --config=configs/cifar.py:cifar100,wrn_16_1,cpu --workdir=runs/losses

A run shorter than the paper says that a loss works, and nothing about which is best.
"""

from absl import flags
from ml_collections import config_flags

import ban_jax
from ban_jax import storage
from ban_jax.losses import LOSSES
from ban_jax.processes import is_primary
from experiments import cli, results

CONFIG = config_flags.DEFINE_config_file("config", None, "A configuration; its loss is replaced by each in turn.")
WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs are kept; what is not finished goes on.")
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
  text = f"{results.describe(cfg, 'by row')}\n\n{results.table([rows])}\n"
  if is_primary():
    (workdir / "losses.md").write_text(text)
    print(f"{text}\ntable: {workdir / 'losses.md'}")


if __name__ == "__main__":
  cli.run(main)

"""Trains a teacher and its born-again generations as a configuration says, and evaluates them and their ensembles.

python experiments/train.py --config=configs/cifar.py:cifar100,wrn_28_1,paper --workdir=runs/c100
"""

from absl import flags
from ml_collections import config_flags

import ban_jax
from experiments import cli

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A configuration file and its words, as configs/cifar.py:cifar10,wrn_16_1,cpu."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; a run in it that is not finished goes on.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
  """Trains what is missing and prints a table of all generations and ensembles."""
  cfg = CONFIG.value
  devices = cli.start_jax()
  generations = ban_jax.run(cfg, WORKDIR.value, devices=devices, progress=cli.PROGRESS.value)
  rows = [(f"BAN-{g.index}" if g.index else "teacher", ban_jax.evaluate(g, cfg, devices=devices)) for g in generations]
  students = generations[1:]
  for size in range(2, len(students) + 1):
    rows.append((f"Ens*{size}", ban_jax.evaluate(students[:size], cfg, devices=devices)))
  print(f"{cfg.data.name}, {cfg.model.name}, scale {cfg.scale}, seed {cfg.seed}; test split, last epoch")
  print(f"{'':10}{'error %':>10}{'NLL':>10}{'ECE':>10}{'Brier':>10}{'examples':>10}")
  for name, m in rows:
    print(f"{name:10}{m['error']:10.2f}{m['nll']:10.4f}{m['ece']:10.4f}{m['brier']:10.4f}{m['count']:10d}")
  print(f"results: {WORKDIR.value}")


if __name__ == "__main__":
  cli.run(main)

"""Trains a teacher and its born-again generations from a configuration; evaluates them and their ensembles.

python experiments/train.py --config=configs/cifar.py:cifar100,wrn_28_1,paper --workdir=runs/c100
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

from absl import flags
from ml_collections import config_flags

from ban_jax import summary
from ban_jax.processes import is_primary
from experiments import cli, configuration, results

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A configuration file and its words, as configs/cifar.py:cifar10,wrn_16_1,cpu."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run directory; an unfinished run in it is resumed.")
flags.DEFINE_flag(configuration.ListFlag())
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
  """Trains what is missing and prints a table of all generations and ensembles."""
  cfg, devices = CONFIG.value, cli.start_jax()
  rows, finished = results.evaluate_run(cfg, WORKDIR.value, devices=devices, progress=cli.PROGRESS.value)
  if is_primary():
    if finished:
      print("everything was finished already")
    print(f"{results.describe(cfg)}\n\n{summary.table([rows])}\n\nresults: {WORKDIR.value}")


if __name__ == "__main__":
  cli.run(main)

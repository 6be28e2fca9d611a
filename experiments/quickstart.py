"""The main job in a few minutes: a teacher, three born-again generations and their ensembles, over several seeds.

    make quickstart        or        python -m experiments.quickstart --workdir=runs/quickstart

Trains on 200 handwritten digits out of scikit-learn, tests on 1397 others. Run again, it shows the result at once;
interrupted, it goes on where it was.
"""

import time

from absl import flags

from ban_jax import storage
from ban_jax.errors import ConfigError
from ban_jax.processes import is_primary
from configs import digits
from experiments import cli, results

WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Where the runs, the table and the plot are kept.")
SEEDS = flags.DEFINE_integer("seeds", 5, "How many seeds to average over.")
WORDS = flags.DEFINE_string("words", "digits,wrn_10_1,cpu", "The configuration's words, as in configs/digits.py.")


def main() -> None:
  """Trains what is missing, then prints the table and names the plot."""
  if SEEDS.value < 1:
    raise ConfigError(f"--seeds must be at least 1, not {SEEDS.value}")
  start = time.monotonic()
  devices = cli.start_jax()
  workdir = storage.resolve_workdir(WORKDIR.value)
  per_seed, finished = [], True
  for seed in range(SEEDS.value):
    cfg = digits.get_config(WORDS.value)
    cfg.seed = seed
    if cli.PROGRESS.value:
      print(f"seed {seed + 1} of {SEEDS.value}", flush=True)
    rows, there = results.evaluate_run(cfg, workdir / f"seed_{seed}", devices=devices, progress=cli.PROGRESS.value)
    per_seed.append(rows)
    finished &= there
  seeds = f"{SEEDS.value} seed{'s' * (SEEDS.value > 1)}"
  title = f"{cfg.data.train_examples} digits, {results.network(cfg.model)}, scale {cfg.scale}, {seeds}"
  if not is_primary():
    return
  table = results.table(per_seed)
  (workdir / "table.md").write_text(f"{title}; mean and standard error; test split, last epoch\n\n{table}\n")
  plot = workdir / "error_by_generation.png"
  results.plot(per_seed, title, plot)
  print("everything was finished already" if finished else f"finished in {time.monotonic() - start:.0f} s")
  print(f"\n{title}; mean and standard error; test split, last epoch\n\n{table}\n")
  print(f"table: {workdir / 'table.md'}\nplot:  {plot}")


if __name__ == "__main__":
  cli.run(main)

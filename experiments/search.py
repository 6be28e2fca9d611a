r"""Tries settings on seeds kept for searching, and appends every one to a file: nothing that was tried gets lost.

    python experiments/search.py --config=configs/cifar.py:cifar10,wrn_10_1,cpu --config.data.dir=DIR \
      --config.data.validation=0.1 --grid='{"data.train_examples": [1000, 2000], "train.epochs": [30, 60]}'

Each combination of the grid's values is trained for each seed: a teacher and its students. Choose by the validation
split. Settings that are finished in the workdir are not trained again, and no line is appended twice.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import itertools
import json
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from ban_jax import config, loading, storage, summary
from ban_jax.errors import ConfigError
from ban_jax.processes import is_primary
from ban_jax.trees import json_digest
from experiments import cli, records, results

CONFIG = config_flags.DEFINE_config_file("config", "configs/pydoc.py:pydoc,lstm_200,cpu", "What all settings share.")
GRID = flags.DEFINE_string("grid", "{}", "Values to try, as JSON: dotted key -> list of values.")
SEEDS = flags.DEFINE_list("seeds", ["100"], "Seeds, separated by commas; from 100 on, to keep the first ones fresh.")
WORKDIR = flags.DEFINE_string("workdir", "runs/search", "Directory for the runs.")
LOG = flags.DEFINE_string("log", "docs/searched.jsonl", "The file that every setting is appended to.")


def combinations(grid: str) -> list[dict[str, Any]]:
  """Returns the changes of each setting; raises a ConfigError where the grid is no JSON object of lists."""
  try:
    values = json.loads(grid)
    if not (isinstance(values, dict) and all(isinstance(own, list) and own for own in values.values())):
      raise ValueError(f"expected an object of lists, not {grid}")
  except ValueError as error:
    raise ConfigError(f"--grid: {error}") from error
  return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def seeds() -> list[int]:
  """Returns the seeds; raises a ConfigError for those that are kept for reported results."""
  given = [int(seed) if seed.strip().isdecimal() else -1 for seed in SEEDS.value]
  if not given or min(given) < records.SEARCH:
    raise ConfigError(f"--seeds={','.join(SEEDS.value)}: expected whole numbers from {records.SEARCH} on")
  return given


def settings(base: ConfigDict) -> Iterator[tuple[ConfigDict, dict[str, Any]]]:
  """Yields (configuration, changes) of every seed and combination; with label noise the seed decides it, too."""
  for seed in seeds():
    for changes in combinations(GRID.value):
      cfg = base.copy_and_resolve_references()
      cli.change(cfg, changes, "--grid")
      cfg.seed = seed
      if cfg.data.label_noise:
        cfg.data.noise_seed = seed
      config.check(cfg)
      yield cfg, changes


def append(line: dict[str, Any], log: epath.Path) -> None:
  """Appends a line to the file, unless it has one of the same setting and seed."""
  same = ("words", "changes", "seed")
  known = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
  if not any(all(own[key] == line[key] for key in same) for own in known):
    with log.open("a") as file:
      file.write(json.dumps(line) + "\n")


def main() -> None:
  """Trains every setting that is not finished, and appends it to the file."""
  given, _, words = flags.FLAGS["config"].config_filename.partition(":")
  if not words:
    raise ConfigError(f'--config={given}: name its words, "data set,network,scale", since lines say what differs')
  chosen = list(settings(CONFIG.value))
  devices = cli.start_jax()
  workdir, log = storage.resolve_workdir(WORKDIR.value), epath.Path(LOG.value)
  for number, (cfg, changes) in enumerate(chosen, 1):
    digest = json_digest([words, {key: value for key, value in config.record(cfg).items() if key != "data.dir"}])
    place = workdir / f"seed_{cfg.seed}_{digest[:8]}"
    rows, _ = results.evaluate_run(cfg, place, devices=devices, progress=cli.PROGRESS.value)
    if is_primary():
      append(records.make(cfg, words, {summary.name_of(own.index): own for own in loading.load_run(place)}), log)
      print(f"[{number}/{len(chosen)}] {json.dumps(changes)}, seed {cfg.seed}\n{summary.table([rows])}", flush=True)
    jax.clear_caches()  # each setting compiles its own programs


if __name__ == "__main__":
  cli.run(main)

"""The files of results in docs/: a line, as JSON, for each setting and seed, of what was searched and what is reported.

docs/searched.jsonl has what experiments/search.py tried, on seeds from 100 on; text.py, images.py, enough.py and
anchors.py write such lines for the seeds that they report.
"""

import datetime
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from ban_jax import config, loading, presets
from ban_jax.keys import KEYS
from ban_jax.types import Generation
from experiments.tables.graph import Node

# The first seed of searches; smaller ones are for what is reported.
SEARCH = 100
# What is kept of a generation's metrics.
KEPT = (
  *("train_error", "train_loss", "train_seen_error", "wrong_seen_error", "wrong_true_error"),
  *("validation_error", "validation_nll", "validation_perplexity", "test_error", "test_nll", "test_perplexity"),
  *("validation_bits_per_byte", "validation_bits_per_character", "test_bits_per_byte", "test_bits_per_character"),
)


def make(cfg: ConfigDict, words: str, generations: Mapping[str, Generation]) -> dict[str, Any]:
  """Returns the line of a seed: date, setting, seconds, and what was measured of each generation, by its name.

  `words` are "data set,network,scale"; the setting is what differs from theirs. The seconds are those of training and
  of the evaluations between epochs.
  """
  seconds = sum(row["seconds"] for own in generations.values() for row in own.history)
  return {
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "words": words,
    "changes": differences(cfg, words),
    "seed": cfg.seed,
    "seconds": round(seconds),
    "results": {
      name: {key: round(own.metrics[key], 4) for key in KEPT if key in own.metrics} for name, own in generations.items()
    },
  }


def of_lineage(lineage: Mapping[str, Node], workdir: epath.Path) -> dict[str, Any]:
  """Returns the line of finished networks by name: a teacher, and students each taught by the one before it."""
  *_, last = lineage.values()
  generations = {name: loading.load(workdir / node.path) for name, node in lineage.items()}
  return make(last.cfg, f"{last.cfg.data.name},{last.network},{last.cfg.scale}", generations)


def differences(cfg: ConfigDict, words: str) -> dict[str, Any]:
  """Returns the values, by dotted key, on which bytes depend and in which a configuration differs from its words'.

  The loss is always among them, the seeds are not.
  """
  own, known = config.record(cfg), config.record(presets.compose(words))
  left_out = {*(name for name, key in KEYS.items() if not key.in_identity), "seed", "data.noise_seed"}
  return {
    key: value for key, value in own.items() if key not in left_out and (known.get(key) != value or key == "loss.name")
  }

"""A finished run as files for publication: parameters, configuration, lineage, and a card that says what they are."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ban_jax import storage
from ban_jax.errors import ConfigError
from ban_jax.exporting import export_parameters
from ban_jax.loading import load_run
from ban_jax.summary import name_of
from ban_jax.types import Generation

# What lineage.json keeps of each generation's manifest.
LINEAGE = (
  *("generation", "seed", "model", "loss", "teachers", "initial", "identity", "dataset", "data", "layout", "layouts"),
  *("stopped", "digest", "ban_jax", "git_commit", "packages"),
)
COLUMNS = {
  **{"test_perplexity": "perplexity", "test_bits_per_byte": "bits per byte"},
  **{"test_nll": "NLL", "test_ece": "ECE", "test_brier": "Brier"},
}
HOW_TO_LOAD = """\
```python
import json

from flax.traverse_util import unflatten_dict
from safetensors import safe_open

with safe_open("{file}", "numpy") as file:
  network = json.loads(file.metadata()["network"])             # its options, its inputs and their normalisation
  variables = unflatten_dict({{name: file.get_tensor(name) for name in file.keys()}}, sep="/")
```

`variables` holds `params` and `batch_stats`. With ban_jax, `with_network(variables, cfg)` makes a generation of it, to
predict with, to evaluate, or to teach; `cfg` is the configuration in `config.json`."""


def export_card(run: epath.PathLike, path: epath.PathLike) -> None:
  """Writes a finished run into a directory for others: parameters, configuration, lineage, and a README.md.

  The directory gets gen_K.safetensors for each generation (`export_parameters`); config.json with the last generation's
  configuration by dotted key; lineage.json with digests, teachers, data, seed and software of each generation; and
  README.md: a table of the test split with 95% intervals of the errors, the lineage, and how to load the files. The
  intervals are Wilson's, over test examples; they say nothing of other seeds.

  Args:
    run: a run directory.
    path: the directory to write.

  Raises:
    ConfigError: for a path that is no directory; and the errors of `load_run`.
    StorageError: for one that cannot be written.

  Examples:
    >>> ban_jax.export_card(directory / "run", directory / "card")
    >>> (directory / "card" / "README.md").exists()
    True
  """
  source, target = storage.resolve_workdir(run), storage.resolve_workdir(path, "path")
  if target.exists() and not target.is_dir():
    raise ConfigError(f"path={str(path)!r} is a file; name a directory")
  generations = load_run(source)
  manifests = [storage.read_json(source / f"gen_{one.index}" / "manifest.json") for one in generations]
  for generation in generations:
    export_parameters(generation, target / f"gen_{generation.index}.safetensors")
  lineage = [{key: manifest[key] for key in LINEAGE if key in manifest} for manifest in manifests]
  with storage.storage_errors(target):
    storage.write_json(target / "config.json", manifests[-1]["config"])
    storage.write_json(target / "lineage.json", lineage)
    storage.write_bytes(target / "README.md", _card(generations, manifests).encode())


def _card(generations: Sequence[Generation], manifests: Sequence[Mapping[str, Any]]) -> str:
  last = manifests[-1]
  name = last["config"].get("dataset.name", last["config"]["data.name"])
  digests = {manifest["digest"]: name_of(one.index) for one, manifest in zip(generations, manifests, strict=True)}
  lines = []
  for one, manifest in zip(generations, manifests, strict=True):
    teachers = ", ".join(digests.get(digest, digest[:12]) for digest in manifest["teachers"]) or "labels"
    ended = f", ended after epoch {manifest['stopped']['epoch']}" if "stopped" in manifest else ""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(one.params["params"]))
    lines.append(
      f"- **{name_of(one.index)}**, `gen_{one.index}.safetensors`: {manifest['model']}, {size:,} parameters, trained "
      f"for {len(one.history)} epochs{ended} with the loss `{manifest['loss']}`, taught by: {teachers}. SHA-256 of the "
      f"variables: `{manifest['digest']}`"
    )
  return "\n\n".join(
    [
      f"# Born-again networks on {name}",
      f"{len(generations)} generations (Furlanello et al., ICML 2018), seed {last['seed']}, trained by ban_jax "
      f"{last['ban_jax']}. `config.json` has every setting, `lineage.json` the digests of data, teachers and "
      "variables, and the versions of all software.",
      "## Test split",
      _table(generations),
      "In brackets: Wilson's 95% interval over the test examples. Of other seeds it says nothing.",
      "## Lineage",
      "\n".join(lines),
      "## Loading",
      HOW_TO_LOAD.format(file=f"gen_{generations[-1].index}.safetensors") + "\n",
    ]
  )


def _table(generations: Sequence[Generation]) -> str:
  from scipy import stats  # takes a second to import

  columns = {key: title for key, title in COLUMNS.items() if any(key in one.metrics for one in generations)}
  rows = [["", "error %", *columns.values(), "examples"]]
  rows.append(["---"] * len(rows[0]))
  for one in generations:
    count = int(one.metrics["test_count"])
    wrong = round(count * one.metrics["test_error"] / 100)
    low, high = stats.binomtest(wrong, count).proportion_ci(method="wilson")
    error = f"{one.metrics['test_error']:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
    rows.append([name_of(one.index), error, *(f"{one.metrics[key]:.4g}" for key in columns), f"{count:,}"])
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)

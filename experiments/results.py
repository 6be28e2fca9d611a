"""The results of a run: its generations and ensembles evaluated, averaged over seeds, as a Markdown table."""

import json
import statistics
import uuid
from collections.abc import Mapping, Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

import ban_jax
from ban_jax import config, job, storage
from ban_jax.processes import is_primary
from ban_jax.train import run_generations
from ban_jax.types import Generation

Metrics = Mapping[str, float]
# Columns of a table: metric, title, decimals.
COLUMNS = (
  ("validation_perplexity", "validation perplexity", 2),
  ("perplexity", "test perplexity", 2),
  ("error", "test error %", 2),
  ("nll", "NLL", 4),
  ("ece", "ECE", 4),
  ("brier", "Brier", 4),
)
# Row name -> metrics, in display order.
Results = dict[str, Metrics]


def name_of(generation: int) -> str:
  """Returns the paper's name of a generation."""
  return f"BAN-{generation}" if generation else "teacher"


def members(generations: int) -> dict[str, tuple[int, ...]]:
  """Returns the rows of a run with this many students: each generation, then Ens*k, which is BAN-1 to BAN-k."""
  rows = {name_of(index): (index,) for index in range(generations + 1)}
  return rows | {f"Ens*{size}": tuple(range(1, size + 1)) for size in range(2, generations + 1)}


def evaluate_run(
  cfg: ConfigDict, workdir: epath.PathLike, *, devices: Sequence[jax.Device], progress: bool
) -> tuple[Results, bool]:
  """Finishes a run, evaluates every row on the test split, and returns (results, whether all of it existed already).

  `workdir/evaluations.json` keeps the evaluations beside the digests of the networks that they belong to.
  """
  setup = job.resolve_run(cfg, devices)
  rows, results, fresh = members(cfg.generations), {}, {}
  with storage.open_workdir(workdir, config.record(cfg)) as workdir:  # locked until the evaluations are written, too
    generations = run_generations(setup, workdir, progress)
    record = workdir / "evaluations.json"
    try:
      kept = dict(json.loads(record.read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # evaluated again below
      kept = {}
    digests = [json.loads((workdir / f"gen_{g.index}" / "manifest.json").read_text())["digest"] for g in generations]
    for name, indices in rows.items():
      own = [digests[index] for index in indices]
      if kept.get(name, {}).get("members") != own:
        fresh[name] = {"members": own, "metrics": evaluate([generations[index] for index in indices], cfg, devices)}
      results[name] = (fresh.get(name) or kept[name])["metrics"]
    if fresh and is_primary():
      storage.write_json(record, kept | fresh)
  return results, not fresh


def evaluate(generations: Sequence[Generation], cfg: ConfigDict, devices: Sequence[jax.Device]) -> Metrics:
  """Returns a row's metrics on the test split and, for text, the validation perplexity, since Table 6 shows both."""
  if len(generations) == 1:  # evaluated when its training ended
    return reported(generations[0].metrics)
  metrics = ban_jax.evaluate(generations, cfg, devices=devices)
  if "perplexity" in metrics:
    metrics["validation_perplexity"] = ban_jax.evaluate(generations, cfg, "validation", devices=devices)["perplexity"]
  return metrics


def reported(own: Metrics) -> Metrics:
  """Returns a generation's own metrics under a table's names: the test metrics and the validation perplexity."""
  metrics = {name.removeprefix("test_"): value for name, value in own.items() if name.startswith("test_")}
  return metrics | {name: own[name] for name in ("validation_perplexity",) if name in own}


def network(model: ConfigDict) -> str:
  """Returns a `model` group as one line, such as "wide_resnet(depth=16, dropout=0.0, width=1)"."""
  return f"{model.name}({', '.join(f'{name}={value}' for name, value in model.items() if name != 'name')})"


def describe(cfg: ConfigDict, loss: str | None = None) -> str:
  """Returns what was trained on what, how and for how long: the line above a table."""
  teacher = f" taught by {network(cfg.teacher.model)}" if cfg.teacher.model else ""
  examples = "tokens" if cfg.data.window else "examples"
  return (
    f"{cfg.data.name}, {cfg.data.train_examples or 'all'} training {examples}, {network(cfg.model)}{teacher}, "
    f"loss {loss or cfg.loss.name}, {cfg.train.epochs} epochs, scale {cfg.scale}, seed {cfg.seed}; "
    "test split, last epoch"
  )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean over seeds and its standard error, which is NaN for a single seed."""
  error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
  return statistics.fmean(values), error


def table(per_seed: Sequence[Results]) -> str:
  """Returns a Markdown table of the test metrics (for text, perplexities first): mean and standard error over seeds."""
  columns = [column for column in COLUMNS if column[0] in next(iter(per_seed[0].values()))]
  cells = [["", *(title for _, title, _ in columns)]]
  for name in per_seed[0]:
    row = [name]
    for key, _, digits in columns:
      mean, error = mean_and_error([results[name][key] for results in per_seed])
      row.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(per_seed) > 1 else ""))
    cells.append(row)
  return markdown(cells)


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """Returns a Markdown table whose first row is the header."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(path: epath.Path, content: str | bytes) -> None:
  """Writes a file whole or not at all; where several processes write the same file, the last one wins."""
  partial = path.parent / f".{path.name}.{uuid.uuid4().hex}"
  partial.write_bytes(content.encode() if isinstance(content, str) else content)
  partial.replace(path)

"""The results of a run: its generations and ensembles evaluated, kept beside the digests of what was evaluated."""

import contextlib
from collections.abc import Sequence

import jax
from etils import epath
from ml_collections import ConfigDict

import ban_jax
from ban_jax import config, job, resolving, storage, summary
from ban_jax.generations import run_generations
from ban_jax.processes import is_primary
from ban_jax.summary import Metrics, Results
from ban_jax.types import Generation


def members(generations: int) -> dict[str, tuple[int, ...]]:
  """Returns the rows of a run with this many students: each generation, then Ens*k, which is BAN-1 to BAN-k."""
  rows = {summary.name_of(index): (index,) for index in range(generations + 1)}
  return rows | {f"Ens*{size}": tuple(range(1, size + 1)) for size in range(2, generations + 1)}


def evaluate_run(
  cfg: ConfigDict, workdir: epath.PathLike, *, devices: Sequence[jax.Device], progress: bool
) -> tuple[Results, bool]:
  """Finishes a run and evaluates it: `evaluate_runs` of one."""
  return evaluate_runs([cfg], [workdir], devices=[devices], progress=progress)[0]


def evaluate_runs(
  cfgs: Sequence[ConfigDict],
  workdirs: Sequence[epath.PathLike],
  *,
  devices: Sequence[Sequence[jax.Device]],
  progress: bool,
) -> list[tuple[Results, bool]]:
  """Finishes runs side by side, each on its own devices, and evaluates every row of each on the test split.

  Returns, for each, (results, whether all of it existed already). `workdir/evaluations.json` keeps the evaluations
  beside the digests of the networks that they belong to.
  """
  setups = [job.resolve_run(cfg, own) for cfg, own in zip(cfgs, devices, strict=True)]
  with contextlib.ExitStack() as stack:  # locked until the evaluations are written, too
    held = [
      stack.enter_context(storage.open_workdir(workdir, config.record(cfg)))
      for cfg, workdir in zip(cfgs, workdirs, strict=True)
    ]
    runs = run_generations(setups, held, progress)
    return [_evaluate_run(*run) for run in zip(setups, held, runs, strict=True)]


def _evaluate_run(
  setup: resolving.Setup, workdir: epath.Path, generations: Sequence[Generation]
) -> tuple[Results, bool]:
  rows, results, fresh = members(setup.cfg.generations), {}, {}
  record = workdir / "evaluations.json"
  try:
    kept = storage.numbers(dict(storage.read_json(record)))
  except (FileNotFoundError, ValueError, TypeError):  # evaluated again below
    kept = {}
  digests = [storage.read_json(workdir / f"gen_{g.index}" / "manifest.json")["digest"] for g in generations]
  for name, indices in rows.items():
    own = [digests[index] for index in indices]
    if kept.get(name, {}).get("members") != own:
      metrics = evaluate([generations[index] for index in indices], setup.cfg, setup.devices)
      fresh[name] = {"members": own, "metrics": metrics}
    results[name] = (fresh.get(name) or kept[name])["metrics"]
  if fresh and is_primary():
    storage.write_json(record, kept | fresh)
  return results, not fresh


def evaluate(generations: Sequence[Generation], cfg: ConfigDict, devices: Sequence[jax.Device]) -> Metrics:
  """Returns a row's metrics on the test split and, for text, the validation perplexity, since Table 6 shows both."""
  if len(generations) == 1:  # evaluated when its training ended
    return summary.reported(generations[0].metrics)
  metrics = ban_jax.evaluate(generations, cfg, devices=devices)
  if "perplexity" in metrics:
    metrics["validation_perplexity"] = ban_jax.evaluate(generations, cfg, "validation", devices=devices)["perplexity"]
  return metrics


def network(model: ConfigDict) -> str:
  """Returns a `model` group as one line, such as "wide_resnet(depth=16, dropout=0.0, width=1)"."""
  return f"{model.name}({', '.join(f'{name}={value}' for name, value in model.items() if name != 'name')})"


def labels(noise: float) -> str:
  """Returns what the training labels of a share of wrong ones are called."""
  return f"{noise:.0%} wrong labels" if noise else "true labels"


def describe(cfg: ConfigDict, loss: str | None = None) -> str:
  """Returns what was trained on what, how and for how long: the line above a table."""
  teacher = f" taught by {network(cfg.teacher.model)}" if cfg.teacher.model else ""
  name = cfg.data.dataset or cfg.data.name
  examples = "tokens" if cfg.data.window else "examples"
  return (
    f"{name}, {cfg.data.train_examples or 'all'} training {examples}, {network(cfg.model)}{teacher}, "
    f"loss {loss or cfg.loss.name}, {cfg.train.epochs} epochs, scale {cfg.scale}, seed {cfg.seed}; "
    "test split, last epoch"
  )


def write(path: epath.Path, content: str | bytes) -> None:
  """Writes a file whole or not at all; where several processes write the same file, the last one wins."""
  storage.write_bytes(path, content.encode() if isinstance(content, str) else content)

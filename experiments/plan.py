"""Generations as a graph: what is to be trained, whom it is taught by, what is finished, and what the rest would cost.

A generation's directory follows from its configuration and its teacher's directory, so that whatever asks for the same
one finds it: other rows, other tables, other processes on the same workdir.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

import ban_jax
from ban_jax import config, data, losses, processes, storage
from ban_jax.errors import CheckpointError, InUseError, PeerError, StorageError
from ban_jax.job import make_models
from ban_jax.storage import load_together
from ban_jax.types import Devices, Generation
from configs import presets
from experiments import programs

# What estimated hours assume. The peaks are of dense products as JAX computes float32 ones by default: TF32 on A100
# (NVIDIA's data sheet) and H100 (SXM), bfloat16 on the four chips of a TPU v4-8. The share of the peak, and the time
# that a step takes however small it is, are guesses for small images and small batches; nothing was measured.
PEAKS = {"A100": 156e12, "H100": 495e12, "TPU v4-8": 4 * 275e12}
UTILIZATION, STEP_SECONDS = 0.2, 0.005
# Seconds between two looks at a generation that another process trains.
PATIENCE = 5.0


class Part(NamedTuple):
  """A generation that is trained or to be trained."""

  run: str  # its run directory, below the workdir
  cfg: ConfigDict
  generation: int
  teacher: "Part | None"
  network: str  # of configs/presets.py
  stands_for: str  # the paper's network that it is, or takes the place of

  @property
  def path(self) -> str:
    """The generation's directory, below the workdir."""
    return f"{self.run}/gen_{self.generation}"

  @property
  def loss(self) -> str:
    """Its loss's name: generation 0 learns from the labels."""
    return self.cfg.loss.name if self.generation else "label"


def teacher(words: str, stands_for: str, changes: Mapping[str, object], seed: int) -> Part:
  """Returns a generation 0, a network that learns from the labels: "data set,network,scale", and changes by key."""
  return _part(words, stands_for, "label", changes, seed, None)


def student(words: str, stands_for: str, loss: str, changes: Mapping[str, object], seed: int, taught_by: Part) -> Part:
  """Returns a network, "data set,network,scale", that learns by `loss` from the generation 0 `taught_by`."""
  return _part(words, stands_for, loss, changes, seed, taught_by)


def successor(taught_by: Part) -> Part:
  """Returns the next generation of a student's sequence: the same network and loss, taught by the student."""
  return taught_by._replace(generation=taught_by.generation + 1, teacher=taught_by)


def _part(
  words: str, stands_for: str, loss: str, changes: Mapping[str, object], seed: int, taught_by: Part | None
) -> Part:
  dataset, network, scale = words.split(",")
  other = taught_by is not None and taught_by.network != network
  more = ([loss] if taught_by else []) + ([f"teacher={taught_by.network}"] if other else [])
  cfg = presets.compose(",".join([words, *more]))
  cfg.update_from_flattened_dict(dict(changes))
  cfg.seed = seed
  # Next to nothing beside a convolution, and figures.py draws it; beside 10,000 words it would be felt.
  cfg.train.gradient_split = taught_by is not None and not cfg.data.window
  # Of no consequence here: the plan says how long a sequence is, and all of it shares one configuration.
  cfg.generations = int(taught_by is not None)
  origin = f"{storage.config_digest(cfg)} {taught_by.path if taught_by else ''}"
  digest = hashlib.sha256(origin.encode()).hexdigest()[:8]
  by = f"-of-{taught_by.network}" if other else ""
  run = f"runs/{dataset}-{network}-{loss}{by}-{scale}-seed{seed}-{digest}"
  return Part(run, cfg, cfg.generations, taught_by, network, stands_for)


def ancestry(parts: Iterable[Part]) -> list[Part]:
  """Returns the parts and all that they depend on, each once, teachers before students, otherwise in their order."""
  ordered: dict[str, Part] = {}

  def add(part: Part) -> None:
    if part.path not in ordered:
      if part.teacher is not None:
        add(part.teacher)
      ordered[part.path] = part

  for part in parts:
    add(part)
  return list(ordered.values())


# --- what is there ---------------------------------------------------------------------------------------------------


# What a generation's directory holds: its metrics and manifest, or None where it is not finished.
Found = tuple[dict[str, float], dict[str, Any]] | None


def find(part: Part, workdir: epath.Path, known: dict[str, Found] | None = None) -> Found:
  """Returns a finished generation's metrics and manifest, or None where it is not finished.

  Raises a CheckpointError for one that is damaged, or not the one that the plan means: of another configuration, or
  taught by another teacher than the one that now lies where its teacher belongs. `known` keeps what has been found, for
  the next call; without it everything is read.
  """
  known = {} if known is None else known
  if part.path not in known:
    known[part.path] = _find(part, workdir, known)
  return known[part.path]


def _find(part: Part, workdir: epath.Path, known: dict[str, Found]) -> Found:
  directory = workdir / part.path
  records = storage.read_records(directory)
  if records is None:
    return None
  metrics, _, manifest = records
  remedy = f"remove {directory}, and what learnt from it, to train it again"
  missing = [key for key in ("config", "dataset", "digest", "generation", "teachers") if key not in manifest]
  if missing:
    raise CheckpointError(f"{directory}/manifest.json lacks {', '.join(missing)}; {remedy}")
  if manifest["config"] != storage.config_digest(part.cfg) or manifest["generation"] != part.generation:
    raise CheckpointError(f"{directory} holds a generation of another configuration; {remedy}")
  if manifest["teachers"]:  # a loss without a teacher has none, whatever the plan says
    taught_by = part.teacher and find(part.teacher, workdir, known)
    now = taught_by and taught_by[1]["digest"]
    if manifest["teachers"] != [now]:
      raise CheckpointError(
        f"{directory} was taught by a teacher with the digest {', '.join(manifest['teachers'])}; that in "
        f"{workdir / part.teacher.path if part.teacher else 'the plan'} has {now}; {remedy}"
      )
  return metrics, manifest


def state_of(part: Part, workdir: epath.Path, known: dict[str, Found] | None = None) -> str:
  """Returns how far a generation is: "finished", "begun", or "to do"; `known` as `find` takes it."""
  if find(part, workdir, known) is not None:
    return "finished"
  return "begun" if (workdir / part.path / "steps").exists() else "to do"


def check(parts: Iterable[Part], workdir: epath.Path, devices: Devices) -> None:
  """Raises, before anything is trained, where parts cannot be: a BanError for missing data, a batch, finished parts.

  Finished ones must be of the data that are found now: else a table would mix two data sets.
  """
  known: dict[str, Found] = {}
  for part in parts:
    config.check_batch_size(part.cfg.train.batch_size, devices)
    dataset = data.load(part.cfg.data)
    make_models(part.cfg, dataset.spec)
    found = find(part, workdir, known)
    if found is not None and found[1]["dataset"] != dataset.digest:
      raise CheckpointError(
        f"{workdir / part.path} was trained on other data than the {dataset.name} found now (digest "
        f"{found[1]['dataset']} there, {dataset.digest} here); give the same data, or another workdir"
      )


# --- training --------------------------------------------------------------------------------------------------------


def train(
  parts: Sequence[Part],
  workdir: epath.Path,
  *,
  devices: Sequence[jax.Device],
  progress: bool,
  say: Callable[[str], None],
) -> int:
  """Trains what is not finished of `parts`, which hold their teachers before them; returns how many that were.

  What another process has in hand is left to it: the others are trained first, then it is waited for. So several
  processes may share a workdir. Raises what `ban_jax.train_generation` raises.
  """
  pending, trained, told = list(parts), 0, ""
  at_hand: dict[str, Generation] = {}  # the last teacher, which often teaches again

  def finished(part: Part) -> bool:
    return not processes.on_any_process(find(part, workdir) is None)

  while pending:
    busy: dict[str, str] = {}
    for part in pending:
      if part.teacher is not None and part.teacher.path in busy:
        busy[part.path] = busy[part.teacher.path]
        continue
      if finished(part):
        continue
      try:
        with storage.open_workdir(workdir / part.run, part.cfg):
          if finished(part):  # by another process, since we looked
            continue
          say(f"[{parts.index(part) + 1}/{len(parts)}] {describe(part)}, in {part.path}")
          if part.teacher is not None and part.teacher.path not in at_hand:
            at_hand = {part.teacher.path: _load(workdir / part.teacher.path)}
          generation = ban_jax.train_generation(
            at_hand[part.teacher.path] if part.teacher is not None else None,
            part.cfg,
            generation=part.generation,
            workdir=workdir / part.run,
            devices=devices,
            progress=progress,
          )
      except (CheckpointError, PeerError) as error:
        if not processes.on_any_process(isinstance(error, InUseError)):
          raise
        busy[part.path] = str(error)
        continue
      trained += 1
      if any(other.teacher is not None and other.teacher.path == part.path for other in pending):
        at_hand = {part.path: generation}
    pending = [part for part in pending if part.path in busy]
    if pending:
      if told != (told := next(iter(busy.values()))):
        say(f"waiting: {told}")
      time.sleep(PATIENCE)
  return trained


def _load(directory: epath.Path) -> Generation:
  """Returns a generation that is known to be finished."""
  loaded = load_together(directory)
  if loaded is None:
    raise StorageError(f"{directory} is finished, but cannot be seen yet; the same command goes on")
  return loaded[0]


def describe(part: Part) -> str:
  """Returns in a few words what a part is."""
  by = f" from {part.teacher.network}" if part.teacher is not None else ""
  name = f"generation {part.generation}" if part.generation else "teacher"
  return f"{name}: {part.network} by {part.loss}{by}, seed {part.cfg.seed}"


# --- cost ------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
  """What a training takes: steps, and floating-point operations of products and convolutions."""

  steps: int
  flops: float

  def hours(self, peak: float) -> float:
    """Returns the hours that are expected on an accelerator with this peak, in operations a second."""
    return (self.flops / (peak * UTILIZATION) + self.steps * STEP_SECONDS) / 3600


def cost(part: Part, known: dict[str, programs.Work]) -> Cost:
  """Returns what a part's training costs from beginning to end; `known` keeps what was counted, for the next call."""
  taught = part.generation > 0 and losses.make_loss(part.cfg.loss).needs_teacher
  key = f"{part.network} {part.teacher.network if taught else ''} {part.cfg.data} {part.cfg.train.batch_size}"
  if key not in known:
    known[key] = programs.work(part.cfg, jax.devices()[:1], taught=part.generation > 0)
  steps = known[key].steps_per_epoch * part.cfg.train.epochs
  return Cost(steps, steps * float(known[key].flops))


def cost_table(parts: Sequence[Part], workdir: epath.Path) -> list[str]:
  """Returns the lines of a plan: every part with its state and cost, and what is left to do in all."""
  counted: dict[str, programs.Work] = {}
  known: dict[str, Found] = {}
  lines = ["| generation | state | steps | PFLOP | directory |", "|---|---|---|---|---|"]
  if not parts:
    return ["0 generations: there is nothing to do for this shard"]
  counts = {"finished": 0, "begun": 0, "to do": 0}
  left = Cost(0, 0.0)
  for part in parts:
    state, own = state_of(part, workdir, known), cost(part, counted)
    counts[state] += 1
    if state != "finished":
      left = Cost(left.steps + own.steps, left.flops + own.flops)
    lines.append(f"| {describe(part)} | {state} | {own.steps:,} | {_number(own.flops / 1e15)} | {part.path} |")
  told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
  hours = ", ".join(f"{_number(left.hours(peak))} h on one {name}" for name, peak in PEAKS.items())
  return [
    *lines,
    "",
    f"{len(parts)} generations: {told}. Left, at most: {left.steps:,} steps, {_number(left.flops / 1e15)} PFLOP of "
    f"training; expected {hours} ({UTILIZATION:.0%} of the peak and {1e3 * STEP_SECONDS:g} ms a step: assumed, not "
    "measured).",
  ]


def _number(value: float) -> str:
  """Returns a number with two or three digits that tell something, and all that stand before the point."""
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

"""What a configuration's programs cost on TPUs or GPUs that are not here: do they fit, and where do the cycles go.

  python experiments/compile.py --config=configs/cifar.py:cifar100,wrn_28_10,paper --topology=v5e-16 --largest_batch

Compiles the steps of a run for the named chips by their own compiler, on this machine's processor, and prints what the
compiler says. Cycles are estimates of its cost model, not measured times; collectives are not in them. TPUs need
pip install 'ban_jax[compile]', GPUs 'ban_jax[cuda]'; neither needs an accelerator, and CIFAR, PTB and ImageNet no
data. A Wide-ResNet-28-10 takes minutes. docs/guides/before_you_rent_a_pod.md explains the numbers.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from ban_jax import chips, compiled, config, data, memory, models, programs, resolving, summary
from ban_jax import job as job_lib
from ban_jax.chips import Slice
from ban_jax.compiled import Report
from ban_jax.errors import ConfigError, choices
from ban_jax.models.recurrent import StackOptions
from ban_jax.programs import Program
from ban_jax.resolving import Setup
from experiments import cli

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A configuration file and its words, as configs/cifar.py:cifar100,wrn_28_10,paper."
)
TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", f"The chips; {chips.EXPECTED}.")
PROGRAMS = flags.DEFINE_list(
  "programs", ["teacher", "student", "evaluation", "prediction"], "Which: teacher, student, evaluation, prediction."
)
LARGEST = flags.DEFINE_bool("largest_batch", False, "Find the largest batch of a chip that fits, by some compilations.")
OUT = flags.DEFINE_string("out", "runs/compile.json", "File for the numbers as JSON.")
CACHE = flags.DEFINE_string(
  "cache", str(memory.caches() / "compiled"), 'Directory of programs compiled before; "": none.'
)
DUMP = flags.DEFINE_string("dump", "", "Directory for the optimized programs as text.")
flags.mark_flag_as_required("config")

# Seconds between two lines that say that a compiler is still at work.
EVERY = 30.0


def program(name: str, setup: Setup, steps: int = 0) -> Program:
  """Returns a program of a run, of `steps` mini-batches a dispatch, or of as many as a run has."""
  job = job_lib.describe(setup, int(name != "teacher"))
  if name == "prediction":
    return programs.prediction(job)
  return programs.evaluation(job, steps=steps) if name == "evaluation" else programs.training(job, steps)


def look(name: str, setup: Setup, where: Slice) -> Report:
  """Compiles a program of a run, and returns what it costs."""
  made = program(name, setup)
  flops = programs.count_flops(made if made.steps == 1 else program(name, setup, 1))
  with saying(f"compiling the {name}'s step for {where}, {made.rows} examples a chip"):
    found = compiled.compile_for(made, where, epath.Path(CACHE.value) if CACHE.value else None)
  if DUMP.value:
    folder = epath.Path(DUMP.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(found.text)
  return compiled.report(name, made, flops, found, where)


def check_lstms(cfg: ConfigDict) -> None:
  """Raises a ConfigError for an LSTM of cuDNN, whose sizes JAX asks of a GPU that is here."""
  for key, group in {"model": cfg.model, "teacher.model": cfg.teacher.model}.items():
    options = models.check_options(group, key)[1] if group is not None else None
    if isinstance(options, StackOptions) and options.cudnn:
      raise ConfigError(f"{key}.cudnn=True: cuDNN's LSTM compiles only where there is a GPU; choose {key}.cudnn=False")


@contextlib.contextmanager
def saying(what: str) -> Iterator[None]:
  """Says on standard error what is being done, and from time to time that it still is."""
  start, done = time.monotonic(), threading.Event()

  def say() -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)
    while not done.wait(EVERY):
      print(f"{what}: for {time.monotonic() - start:.0f} s now", file=sys.stderr, flush=True)

  thread = threading.Thread(target=say, daemon=True)
  if cli.PROGRESS.value:
    thread.start()
  try:
    yield
  finally:
    done.set()


class Largest(NamedTuple):
  """The answer of --largest_batch."""

  program: str
  batch: int  # of a chip; 0: none fits
  refused: int | None  # the least that was tried and does not fit; None: the training examples end within 2 %
  report: Report | None


def largest_batch(name: str, setup: Setup, where: Slice, first: int, fixed: int) -> Largest:
  """Returns the largest batch of a chip with which a training step fits.

  `first` is tried first; `fixed` bytes are needed without a batch.
  """
  chips_, examples = len(where.devices), len(setup.dataset.train_order(jax.random.key(0), 1))
  reports: dict[int, Report] = {}

  def needed(batch: int) -> tuple[bool, int]:
    cfg = setup.cfg.copy_and_resolve_references()
    cfg.train.batch_size = batch * chips_
    reports[batch] = look(name, setup._replace(cfg=cfg), where)
    return reports[batch].fits, reports[batch].needed

  found = compiled.largest_batch(needed, first, examples // chips_, where.chip.memory, fixed)
  refused = min((batch for batch, report in reports.items() if not report.fits), default=None)
  return Largest(name, found, refused, reports.get(found))


def main() -> None:
  """Prints, and writes, what the programs of a configuration cost on the chips of --topology."""
  known = ("teacher", "student", "evaluation", "prediction")
  if unknown := set(PROGRAMS.value) - set(known):
    raise ConfigError(f"--programs: {choices(unknown)}: expected some of {choices(known)}")
  jax.config.update("jax_platforms", "cpu")
  cli.limit_vmem()
  where = chips.find(TOPOLOGY.value)
  setup = resolving.resolve(CONFIG.value, where.devices, load=data.describe)
  check_lstms(setup.cfg)
  reports = [look(name, setup, where) for name in PROGRAMS.value]
  answer: dict[str, Any] = {
    "topology": TOPOLOGY.value,
    "chips": len(where.devices),
    "compiler": where.compiler,
    "libtpu_flags": os.environ.get("LIBTPU_INIT_ARGS", ""),
    "jax": jax.__version__,
    "config": config.record(setup.cfg),
    "programs": [report._asdict() for report in reports],
  }
  own = f", LIBTPU_INIT_ARGS={answer['libtpu_flags']}" if where.chip.axes and answer["libtpu_flags"] else ""
  title = f"{setup.models[1].name} on {where}, {where.compiler}, JAX {jax.__version__}{own}"
  lines = [title, overview(reports, where)]
  lines += [costly(report) for report in reports if report.costly]
  if LARGEST.value:
    name = "student" if "student" in PROGRAMS.value else "teacher"
    first = setup.cfg.train.batch_size // len(where.devices)
    fixed = next((compiled.fixed(each) for each in reports if each.program == name), 0)
    found = largest_batch(name, setup, where, first, fixed)
    answer["largest_batch"] = {**found._asdict(), "report": found.report and found.report._asdict()}
    lines.append(sentence(found, where))
  out = epath.Path(OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(answer, indent=1) + "\n")
  print("\n\n".join([*lines, f"numbers: {out}"]))
  if not LARGEST.value and (large := [report for report in reports if not report.fits]):
    raise ConfigError(" ".join(misfit(report, where) for report in large))


def overview(reports: Sequence[Report], where: Slice) -> str:
  """Returns a Markdown table with a column for each program."""
  estimate = "estimated" if where.chip.flops_per_cycle else "not estimated for GPUs"
  rows: dict[str, Callable[[Report], str]] = {
    "fits": lambda report: "yes" if report.fits else "no",
    f"MiB a chip, of {mib(where.chip.memory)}": lambda report: mib(report.needed) if report.needed else "",
  }
  kinds = {kind for report in reports for kind in report.memory}
  for kind in (*programs.KINDS, "output", "temporaries", "code"):
    if kind in kinds:
      rows[f"  {kind}"] = lambda report, kind=kind: mib(report.memory[kind]) if kind in report.memory else ""
  rows |= {
    "examples a chip, steps a dispatch": lambda report: f"{report.batch:,}, {report.steps}",
    "GFLOP a chip and step": lambda report: f"{report.flops / 1e9:,.4g}",
    f"million cycles a step, {estimate}": lambda report: f"{report.cycles / 1e6:,.4g}" if report.cycles else "",
    f"share of the peak, {estimate}": lambda report: f"{report.share:.1%}" if report.share else "",
  }
  for kind in sorted({kind for report in reports for kind in report.collectives}):
    rows[f"{kind}s a step, and their MB"] = lambda report, kind=kind: exchange(report, kind)
  rows["seconds to compile"] = lambda report: f"{report.seconds:,.0f}"
  table = [["", *(report.program for report in reports)]]
  return summary.markdown([*table, *([name, *map(show, reports)] for name, show in rows.items())])


def mib(size: int) -> str:
  """Returns bytes as MiB."""
  return f"{size / 2**20:,.0f}" if size >= 10 * 2**20 else f"{size / 2**20:.2g}"


def exchange(report: Report, kind: str) -> str:
  """Returns number and size of a step's collectives of one kind."""
  found = report.collectives.get(kind)
  return f"{found['number']:.4g}, {found['bytes'] / 1e6:,.3g}" if found else ""


def costly(report: Report) -> str:
  """Returns a Markdown table of a program's most expensive instructions."""
  rows = [["cycles a step", "share", "instruction", "result", "layer"]]
  for each in report.costly:
    shape = each["shape"].partition("{")[0]
    rows.append([f"{each['cycles']:,.0f}", f"{each['share']:.1%}", each["instruction"], shape, each["layer"]])
  return f"The {report.program}'s most expensive instructions, by the compiler's estimate:\n\n" + summary.markdown(rows)


def misfit(report: Report, where: Slice) -> str:
  """Returns the sentence for a program that does not fit."""
  needs = f"needs {mib(report.needed)} MiB" if report.needed else "needs more than there is"
  return (
    f"the {report.program}'s step with {report.batch:,} examples a chip does not fit: it {needs} of "
    f"{mib(report.available)} MiB on a chip of {where.kind}; give it more chips, a smaller batch, or --largest_batch"
  )


def sentence(found: Largest, where: Slice) -> str:
  """Returns the answer of --largest_batch as a sentence."""
  if found.report is None:
    return f"Largest batch: the {found.program}'s step fits on no chip of {where.kind}, however small the batch."
  return (
    f"Largest batch: {found.batch:,} examples a chip, {found.batch * len(where.devices):,} in all, for the "
    f"{found.program}'s step; it takes {mib(found.report.needed)} of {mib(found.report.available)} MiB, and "
    f"{f'{found.refused:,} do not fit' if found.refused else 'the training examples end within 2% of it'}."
  )


if __name__ == "__main__":
  cli.run(main)

"""Everything that waits for an accelerator, in one command: numerics, speed, and full-length rows of Tables 1, 3 and 6.

    python experiments/accelerator.py --data_dir=DIR --workdir=runs/accelerator --minutes=9
    python experiments/accelerator.py --parts=numerics,bench --side_by_side=8 --workdir=runs/accelerator

Needs a GPU or TPU and the packages, no network; the tables need CIFAR-10 and CIFAR-100 prepared in DIR, and the three
files of the Penn Treebank in PTB (--ptb_dir). Checks small runs against the CPU, and a second time against the first;
measures steps by bench.py beside what the compiler and the chip's own rates say; then trains rows of Tables 1, 3 and 6
with the paper's settings. After --minutes it saves and ends with status 75: rerun it, as often as it takes, to
continue. What is known by then is in accelerator.md and accelerator.json of the workdir. `--scale=smoke` shows on a CPU
that everything runs.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from ban_jax import storage, summary
from ban_jax.errors import Preempted, TrainingError, look_up
from experiments import cli, results

WORKDIR = flags.DEFINE_string("workdir", "runs/accelerator", "Directory for the runs, the table and the numbers.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS data directory with CIFAR-10 and CIFAR-100.")
PTB_DIR = flags.DEFINE_string("ptb_dir", "", "Directory of the Penn Treebank's three files; without it no Table 6.")
SCALE = flags.DEFINE_enum("scale", "paper", ["paper", "smoke"], "paper, or smoke: seconds, on embedded data.")
PARTS = flags.DEFINE_list("parts", ["numerics", "bench", "tables"], "What to do: numerics, bench, tables.")
MINUTES = flags.DEFINE_float("minutes", 0.0, "End after so many minutes, to be rerun; 0: no limit.", lower_bound=0.0)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)
SIDE_BY_SIDE = flags.DEFINE_integer(
  "side_by_side", 3, "Processes that share the accelerator and its memory; 1 on a TPU, which one process holds.",
  lower_bound=1,
)  # fmt: skip
HERE = pathlib.Path(__file__).parent
# Of the minutes: what a process gets to save and end before it is killed, and the least for which one is started.
GRACE, LEAST = 45.0, 20.0
# The largest relative difference of a loss that rounding may make of ten or twenty steps.
ALLOWED = 0.02
COLUMNS = ("teacher", "BAN")  # of Table 3 not the DenseNet students, which take longer than all others together
ROWS = {"paper": ("Wide-ResNet-28-1", "Wide-ResNet-28-2"), "smoke": ("Wide-ResNet-28-1",)}
CUDNN = ("--config.model.cudnn",)
FREE = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=false"}


class Check(NamedTuple):
  """A small run that is compared with the CPU's: its configuration, and what only a GPU's has."""

  config: str
  flags: Sequence[str] = ()
  own: Sequence[str] = ()
  environment: Mapping[str, str] = {}
  may_fail: bool = False
  places: Sequence[str] = ("cpu", "here", "again")


class Bench(NamedTuple):
  """A step that is measured: a row of bench.py, in which type, and with what."""

  row: str
  dtype: str = "bfloat16"
  flags: Sequence[str] = ()
  environment: Mapping[str, str] = {}


# A convolutional network and a recurrent one; and on GPUs cuDNN's LSTM and attention, which must give what XLA's give.
# Layers of attention fail in XLA with deterministic kernels (ban_jax/job.py); without them they were not run yet.
CHECKED = {
  "paper": {"images": Check("digits.py:digits,wrn_10_1,smoke"), "text": Check("pydoc.py:pydoc,lstm_32,smoke")},
  "smoke": {
    "images": Check("digits.py:digits,mlp_16,smoke"),
    "text": Check("pydoc.py:pydoc,lstm_32,smoke", places=("cpu", "here")),
  },
}
CHECKED_ON_GPUS = {
  "text, cuDNN's LSTM": Check("pydoc.py:pydoc,lstm_32,smoke", own=CUDNN),
  "text, cuDNN's attention": Check(
    "pydoc.py:pydoc,gpt_64,smoke", ("--config.compute_dtype=bfloat16",), CUDNN, FREE, may_fail=True
  ),
}
# The distilled steps of docs/performance.md.
ONE_STEP = ('--changes={"train.steps_per_dispatch": 1}',)
BENCH = {
  "paper": {
    "wrn_16_4": Bench("wrn_16_4"),
    "wrn_16_4, one step a dispatch": Bench("wrn_16_4", flags=ONE_STEP),
    "wrn_28_10": Bench("wrn_28_10"),
    "densenet_40_12": Bench("densenet_40_12"),
    "lstm_1500": Bench("lstm_1500", "float32"),
    "lstm_1500, one step a dispatch": Bench("lstm_1500", "float32", ONE_STEP),
    "lstm_1500, bfloat16": Bench("lstm_1500"),
  },
  "smoke": {"lstm_200": Bench("lstm_200", "float32")},
}
BENCH_ON_GPUS = {
  "lstm_1500, cuDNN": Bench("lstm_1500", "float32", ('--changes={"model.cudnn": true}',)),
  "lstm_1500, cuDNN, one step a dispatch": Bench(
    "lstm_1500", "float32", ('--changes={"model.cudnn": true, "train.steps_per_dispatch": 1}',)
  ),
  "wrn_16_4, not deterministic": Bench("wrn_16_4", environment=FREE),
}
BENCH_FLAGS = {
  "paper": ("--sections=memory,floor", "--kinds=distilled", "--turns=5", "--notorch"),
  "smoke": ("--sections=steps", "--kinds=supervised", "--turns=1", "--steps=1", "--notorch"),
}
# What fills the cache of compiled programs beforehand, on the CPU's cores.
COMPILING = ("--turns=1", "--steps=1")


class Command(NamedTuple):
  """A process: its log's name, a script of experiments/ and its flags, and the file that shows that it has finished."""

  name: str
  line: Sequence[str]
  environment: Mapping[str, str] = {}
  result: epath.Path | None = None  # None: it knows itself what is left to do
  may_fail: bool = False  # then the others go on, and the report names it


class Part(NamedTuple):
  """Commands, of which up to `side_by_side` run at once."""

  name: str
  commands: Sequence[Command]
  side_by_side: int = 1


@functools.cache
def has_gpu() -> bool:
  """Returns whether this machine has a GPU of NVIDIA's; asking JAX would hold it."""
  if not shutil.which("nvidia-smi"):
    return False
  return subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, check=False).returncode == 0


def checks() -> dict[str, Check]:
  """Returns the small runs of this machine by name."""
  return CHECKED[SCALE.value] | (CHECKED_ON_GPUS if has_gpu() else {})


def benches() -> dict[str, Bench]:
  """Returns the steps that are measured on this machine by name."""
  return BENCH[SCALE.value] | (BENCH_ON_GPUS if has_gpu() else {})


def file_name(name: str) -> str:
  """Returns a name without what a file's name should not have."""
  return name.replace(", ", "_").replace(" ", "_").replace("'", "")


def parts(workdir: epath.Path) -> list[Part]:
  """Returns the chosen parts in their order."""
  # Several processes that share a GPU share its memory.
  share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / SIDE_BY_SIDE.value:.3f}"} if SIDE_BY_SIDE.value > 1 else {}
  made = {"numerics": _numerics_parts, "bench": _bench_parts, "tables": _table_parts}
  for name in PARTS.value:
    look_up(made, name, "part")
  return [part for name in made if name in PARTS.value for part in made[name](workdir, share)]


def _numerics_parts(workdir: epath.Path, share: Mapping[str, str]) -> list[Part]:
  """Returns each small run on the CPU, here, and here again."""
  commands = []
  for kind, small in checks().items():
    for place in small.places:
      run = workdir / "numerics" / file_name(f"{kind}_{place}")
      line = ["train.py", f"--config={HERE.parent / 'configs' / small.config}", f"--workdir={run}", "--devices=1"]
      line += [*small.flags, *(small.own if place != "cpu" else ())]
      # Not TF32.
      environment = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"} | (
        {"JAX_PLATFORMS": "cpu"} if place == "cpu" else {**share, **small.environment}
      )
      result = run / "evaluations.json"
      commands.append(Command(f"numerics, {kind}, {place}", line, environment, result, small.may_fail))
  return [Part("numerics", commands, SIDE_BY_SIDE.value)]


def _bench_parts(workdir: epath.Path, share: Mapping[str, str]) -> list[Part]:
  """Returns the compilation of all steps side by side, and then each measurement alone."""
  compiling, measuring = [], []
  for name, bench in benches().items():
    out = workdir / "bench" / f"{file_name(name)}.json"
    line = ["bench.py", f"--rows={bench.row}", f"--dtypes={bench.dtype}", *BENCH_FLAGS[SCALE.value], *bench.flags]
    line += ["--batch=128"] if not bench.row.startswith("lstm") else []
    line.append(f"--devices={cli.DEVICES.value}")
    compiled = out.with_suffix(".compiled")
    compiling.append(
      Command(f"programs, {name}", [*line, *COMPILING, f"--out={compiled}"], {**share, **bench.environment}, compiled)
    )
    partial = [*line, f"--out={out.with_suffix('.partial')}"]
    measuring.append(Part(f"bench, {name}", [Command(f"bench, {name}", partial, bench.environment, out)]))
  together = [Part("programs", compiling, SIDE_BY_SIDE.value)] if SIDE_BY_SIDE.value > 1 else []
  return [*together, *measuring]


def _table_parts(workdir: epath.Path, share: Mapping[str, str]) -> list[Part]:
  """Returns the tables, each trained by several processes that share the work."""
  found = []
  rows, columns = ",".join(ROWS[SCALE.value]), ",".join(COLUMNS)
  chosen = {number: [f"--rows={rows}", f"--columns={columns}", f"--data_dir={DATA_DIR.value}"] for number in (1, 3)}
  if PTB_DIR.value:
    chosen[6] = ["--rows=LSTM", f"--data_dir={PTB_DIR.value}"]
  for number, own in chosen.items():
    line = [f"table{number}.py", f"--scale={SCALE.value}", *own, f"--seeds={SEEDS.value}",
            f"--workdir={workdir / 'tables'}", "--devices_per_student=1", f"--devices={cli.DEVICES.value}"]  # fmt: skip
    count = SIDE_BY_SIDE.value
    commands = [Command(f"table {number}, {worker}", line, share) for worker in range(count)]
    found.append(Part(f"table {number}", commands, count))
  return found


def run_part(part: Part, logs: epath.Path, deadline: float) -> bool:
  """Runs a part until it is finished or the deadline has come; returns whether it is finished.

  Raises a TrainingError where a process fails.
  """
  left = [command for command in part.commands if command.result is None or not command.result.exists()]
  with contextlib.ExitStack() as stack:
    running: list[tuple[Command, subprocess.Popen]] = []
    while left or running:
      if deadline - time.monotonic() < GRACE + LEAST and not running:
        return False
      while left and len(running) < part.side_by_side and deadline - time.monotonic() >= GRACE + LEAST:
        running.append((left[0], _start(left.pop(0), logs, stack)))
      _wait([process for _, process in running], deadline)
      ended = [pair for pair in running if pair[1].poll() is not None]
      running = [pair for pair in running if pair[1].poll() is None]
      succeeded = [_succeeded(*pair, logs) for pair in ended]
      if not all(succeeded):
        return False  # it was asked to end, as all others are
  return True


def _log(name: str, logs: epath.Path) -> epath.Path:
  return logs / f"{file_name(name)}.log"


def _start(command: Command, logs: epath.Path, stack: contextlib.ExitStack) -> subprocess.Popen:
  """Returns a command's process, which the stack ends."""
  file = stack.enter_context(_log(command.name, logs).open("w"))
  script, *given = command.line
  line = [sys.executable, str(HERE / script), *given, "--noprogress"]
  process = subprocess.Popen(line, env={**os.environ, **command.environment}, stdout=file, stderr=subprocess.STDOUT)
  stack.callback(process.wait)
  stack.callback(process.kill)
  return process


def _succeeded(command: Command, process: subprocess.Popen, logs: epath.Path) -> bool:
  """Returns whether a process did its work, or ended because it was asked to; raises a TrainingError otherwise."""
  if process.returncode in (-signal.SIGTERM, -signal.SIGKILL, Preempted.exit_status):  # before it watched, or too late
    return False
  if process.returncode:
    failure = f"{command.name} failed with status {process.returncode}: see {_log(command.name, logs)}"
    if not command.may_fail:
      raise TrainingError(failure)
    results.write(_log(command.name, logs).with_suffix(".failed"), failure)
    return True
  _log(command.name, logs).with_suffix(".failed").unlink(missing_ok=True)
  if command.result is not None and not command.result.exists():  # the benchmark's, which writes it bit by bit
    command.result.with_suffix(".partial").rename(command.result)
  return True


def _wait(processes: Sequence[subprocess.Popen], deadline: float) -> None:
  """Waits until one of the processes ends; asks all to save shortly before the deadline, and kills them at it."""
  asked = False
  while all(process.poll() is None for process in processes) or asked:
    if not any(process.poll() is None for process in processes):
      return
    if time.monotonic() > deadline:
      for process in processes:
        process.kill()
    elif time.monotonic() > deadline - GRACE and not asked:
      asked = True
      for process in processes:
        process.terminate()
    time.sleep(0.1)


def numerics(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns, for each small run that is finished, how it differs from the CPU's and whether its bytes come again."""
  rows = []
  for kind, small in checks().items():
    found = [_losses(workdir / "numerics" / file_name(f"{kind}_{place}")) for place in small.places]
    if None in found:
      continue
    (expected, *_), (own, layout, digests), *again = found
    largest = max(abs(own[name] - expected[name]) / abs(expected[name]) for name in expected)
    place = f"{layout['devices']} x {layout['device_kind']}"
    row = {"kind": kind, "device": place, "values": len(expected), "largest_relative_difference": largest}
    rows.append({**row, "repeated": digests == again[0][2] if again else None})
  return rows


def check(rows: Sequence[Mapping[str, Any]], workdir: epath.Path) -> None:
  """Raises a TrainingError where a small run differs by more from the CPU's than rounding explains."""
  for row in rows:
    largest = row["largest_relative_difference"]
    if not largest <= ALLOWED:
      raise TrainingError(
        f"a small run on {row['kind']} differs between CPU and {row['device']} by {largest:.2%} of a loss, more than "
        f"rounding's {ALLOWED:.0%}: see {workdir / 'numerics'}"
      )


def _losses(run: epath.Path) -> tuple[dict[str, float], Mapping[str, Any], list[str]] | None:
  """Returns a small run's losses by generation and epoch, layout, and networks' digests; None: it is not finished."""
  losses, layout, digests = {}, {}, []
  for index in (0, 1):
    records = storage.read_records(run / f"gen_{index}")
    if records is None:
      return None
    metrics, history, manifest = records
    layout = manifest["layout"]
    digests.append(manifest["digest"])
    losses |= {f"{index}, epoch {row['epoch']}": row["train_loss"] for row in history}
    losses[f"{index}, test"] = metrics["test_nll"]
  return losses, layout, digests


def report(workdir: epath.Path, states: Mapping[str, str]) -> None:
  """Writes and prints what is known so far, as Markdown and as JSON."""
  checked = numerics(workdir)
  rows = [["small run", "device", "losses compared with CPU", "largest difference", "same bytes again"]]
  rows += [
    [own["kind"], own["device"], str(own["values"]), f"{own['largest_relative_difference']:.1e}",
     {True: "yes", False: "no", None: ""}[own["repeated"]]]
    for own in checked
  ]  # fmt: skip
  known = [["part", "state"], *([name, state] for name, state in states.items())]
  failures = [f"- {path.read_text()}" for path in sorted((workdir / "logs").glob("*.failed"))]
  sections = ["# Accelerator", summary.markdown(known), "## Numerics", summary.markdown(rows), *failures, "## Speed"]
  measured = {path.stem: json.loads(path.read_text()) for path in sorted((workdir / "bench").glob("*.json"))}
  for name in benches():
    if file_name(name) in measured:
      sections += [f"### {name}", _log(f"bench, {name}", workdir / "logs").read_text().strip()]
  tables = [workdir / "tables" / f"table{number}" for number in (1, 3, 6)]
  sections += [table.with_suffix(".md").read_text().strip() for table in tables if table.with_suffix(".md").exists()]
  numbers = {
    "scale": SCALE.value,
    "states": dict(states),
    "numerics": checked,
    "bench": measured,
    "tables": {
      table.name: table.with_suffix(".csv").read_text() for table in tables if table.with_suffix(".csv").exists()
    },
  }
  text = "\n\n".join(sections) + "\n"
  results.write(workdir / "accelerator.md", text)
  results.write(workdir / "accelerator.json", json.dumps(numbers, indent=2) + "\n")
  print(f"{text}\nwritten: {workdir / 'accelerator.md'}, {workdir / 'accelerator.json'}", flush=True)


def main() -> None:
  """Runs what is not finished, as far as the minutes go, and reports."""
  cli.unwind_on_interrupt()
  deadline = time.monotonic() + 60 * (MINUTES.value or 60 * 24 * 365)
  workdir = storage.resolve_workdir(WORKDIR.value)
  for folder in ("logs", "bench", "numerics"):
    (workdir / folder).mkdir(parents=True, exist_ok=True)
  chosen = parts(workdir)
  states = {part.name: "to do" for part in chosen}
  try:
    for part in chosen:
      start = time.monotonic()
      if not run_part(part, workdir / "logs", deadline):
        break
      states[part.name] = "finished"
      if cli.PROGRESS.value:
        print(f"{part.name}: finished, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
      check(numerics(workdir), workdir)  # wrong numbers end the command before hours are spent
  finally:
    report(workdir, states)
  if "to do" in states.values():
    raise Preempted(f"--minutes={MINUTES.value:g} are over, and all is saved; rerun the command to continue")


if __name__ == "__main__":
  cli.run(main)

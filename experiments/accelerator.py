"""Everything that waits for an accelerator, in one command: numerics, speed, and full-length rows of Tables 1 and 3.

    python experiments/accelerator.py --data_dir=DIR --workdir=runs/accelerator --minutes=9

Needs a GPU or TPU, the packages, and CIFAR-10 and CIFAR-100 prepared in DIR; no network. Checks small runs against the
CPU, measures steps by bench.py, then trains the Wide-ResNet-28-1 and 28-2 rows of Tables 1 and 3 with the paper's
settings. After --minutes it saves and ends with status 75: rerun it, as often as it takes, to continue. What is known
by then is in accelerator.md and accelerator.json of the workdir. `--scale=smoke` shows on a CPU that everything runs.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from etils import epath

from ban_jax import storage, summary
from ban_jax.errors import Preempted, TrainingError
from experiments import cli, results

WORKDIR = flags.DEFINE_string("workdir", "runs/accelerator", "Directory for the runs, the table and the numbers.")
DATA_DIR = flags.DEFINE_string("data_dir", "", "TFDS data directory with CIFAR-10 and CIFAR-100.")
SCALE = flags.DEFINE_enum("scale", "paper", ["paper", "smoke"], "paper, or smoke: seconds, on embedded data.")
MINUTES = flags.DEFINE_float("minutes", 0.0, "End after so many minutes, to be rerun; 0: no limit.", lower_bound=0.0)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)
SIDE_BY_SIDE = flags.DEFINE_integer(
  "side_by_side", 3, "Processes that share the accelerator and its memory; 1 on a TPU, which one process holds.",
  lower_bound=1,
)  # fmt: skip
HERE = pathlib.Path(__file__).parent
# Of the minutes: what a process gets to save and end before it is killed, and the least for which one is started.
GRACE, LEAST = 45.0, 20.0
# Small runs that are compared with the CPU, a convolutional network and a recurrent one, and the largest relative
# difference of a loss that rounding may make of ten or twenty steps.
CHECKED = {
  "paper": {"images": "digits.py:digits,wrn_10_1,smoke", "text": "pydoc.py:pydoc,lstm_32,smoke"},
  "smoke": {"images": "digits.py:digits,mlp_16,smoke", "text": "pydoc.py:pydoc,lstm_32,smoke"},
}
ALLOWED = 0.02
COLUMNS = ("teacher", "BAN")  # of Table 3 not the DenseNet students, which take longer than all others together
ROWS = {"paper": ("Wide-ResNet-28-1", "Wide-ResNet-28-2"), "smoke": ("Wide-ResNet-28-1",)}
BENCH = {
  "paper": ("wrn_28_1", "wrn_28_2", "wrn_28_10", "densenet_90_60", "lstm_650"),
  "smoke": ("lstm_200",),
}
BENCH_FLAGS = {
  "paper": ("--sections=steps,epoch", "--kinds=supervised,distilled", "--turns=3", "--notorch"),
  "smoke": ("--sections=steps", "--kinds=supervised", "--turns=1", "--steps=1", "--notorch"),
}


class Part(NamedTuple):
  """Processes that run side by side, and the file that shows that they are finished; None: they know themselves."""

  name: str
  commands: Sequence[Sequence[str]]  # a script of experiments/ and its flags
  environment: Mapping[str, str] = {}
  result: epath.Path | None = None


def parts(workdir: epath.Path) -> list[Part]:
  """Returns the parts in their order."""
  devices = f"--devices={cli.DEVICES.value}"
  found = []
  for kind, config in CHECKED[SCALE.value].items():
    for place, environment in {"cpu": {"JAX_PLATFORMS": "cpu"}, "here": {}}.items():
      run = workdir / "numerics" / f"{kind}_{place}"
      command = ["train.py", f"--config={HERE.parent / 'configs' / config}", f"--workdir={run}", "--devices=1"]
      exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", **environment}  # not TF32
      found.append(Part(f"numerics, {kind}, {place}", [command], exact, run / "evaluations.json"))
  for row in BENCH[SCALE.value]:
    out = workdir / "bench" / f"{row}.json"
    command = ["bench.py", f"--rows={row}", *BENCH_FLAGS[SCALE.value], f"--out={out.with_suffix('.partial')}", devices]
    found.append(Part(f"bench, {row}", [command], result=out))
  share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / SIDE_BY_SIDE.value:.3f}"}  # of a GPU's memory
  for number in (1, 3):
    rows, columns = ",".join(ROWS[SCALE.value]), ",".join(COLUMNS)
    command = [f"table{number}.py", f"--scale={SCALE.value}", f"--rows={rows}", f"--columns={columns}",
               f"--seeds={SEEDS.value}", f"--data_dir={DATA_DIR.value}", f"--workdir={workdir / 'tables'}",
               "--devices_per_student=1", devices]  # fmt: skip
    found.append(Part(f"table {number}", [command] * SIDE_BY_SIDE.value, share))
  return found


def run_part(part: Part, logs: epath.Path, deadline: float) -> bool:
  """Runs a part until it is finished or the deadline has come; returns whether it is finished.

  Raises a TrainingError where a process fails.
  """
  if part.result is not None and part.result.exists():
    return True
  if deadline - time.monotonic() < GRACE + LEAST:
    return False
  processes, files = [], []
  try:
    for number, (script, *given) in enumerate(part.commands):
      files.append((logs / f"{part.name.replace(', ', '_').replace(' ', '_')}_{number}.log").open("w"))
      line = [sys.executable, str(HERE / script), *given, "--noprogress"]
      environment = {**os.environ, **part.environment}
      processes.append(subprocess.Popen(line, env=environment, stdout=files[-1], stderr=subprocess.STDOUT))
    _end(processes, deadline)
  finally:
    for process in processes:
      process.kill()
      process.wait()
    for file in files:
      file.close()
  ended = (-signal.SIGTERM, -signal.SIGKILL, Preempted.exit_status)  # asked before it watched, too late, or in time
  for process, file in zip(processes, files, strict=True):
    if process.returncode and process.returncode not in ended:
      raise TrainingError(f"{part.name} failed with status {process.returncode}: see {file.name}")
  finished = not any(process.returncode for process in processes)
  if finished and part.result is not None and not part.result.exists():  # the benchmark's, which writes it bit by bit
    part.result.with_suffix(".partial").rename(part.result)
  return finished


def _end(processes: Sequence[subprocess.Popen], deadline: float) -> None:
  """Waits for processes to end, asks those that still run shortly before the deadline to save, and kills at it."""

  def wait(until: float) -> list[subprocess.Popen]:
    for process in processes:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, until - time.monotonic()))
    return [process for process in processes if process.poll() is None]

  for process in wait(deadline - GRACE):
    process.terminate()
  for process in wait(deadline):
    process.kill()
    process.wait()


def numerics(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns the differences between CPU and accelerator; raises a TrainingError where one is too large."""
  rows = []
  for kind in CHECKED[SCALE.value]:
    found = [_losses(workdir / "numerics" / f"{kind}_{place}") for place in ("cpu", "here")]
    if None in found:
      continue
    (expected, _), (own, layout) = found
    largest = max(abs(own[name] - expected[name]) / abs(expected[name]) for name in expected)
    place = f"{layout['devices']} x {layout['device_kind']}"
    rows.append({"kind": kind, "device": place, "values": len(expected), "largest_relative_difference": largest})
    if not largest <= ALLOWED:
      raise TrainingError(
        f"a small run on {kind} differs between CPU and {place} by {largest:.2%} of a loss, more than rounding's "
        f"{ALLOWED:.0%}: see {workdir / 'numerics'}"
      )
  return rows


def _losses(run: epath.Path) -> tuple[dict[str, float], Mapping[str, Any]] | None:
  """Returns a small run's losses by generation and epoch, and its layout; None: it is not finished."""
  losses, layout = {}, {}
  for index in (0, 1):
    records = storage.read_records(run / f"gen_{index}")
    if records is None:
      return None
    metrics, history, manifest = records
    layout = manifest["layout"]
    losses |= {f"{index}, epoch {row['epoch']}": row["train_loss"] for row in history}
    losses[f"{index}, test"] = metrics["test_nll"]
  return losses, layout


def report(workdir: epath.Path, states: Mapping[str, str]) -> None:
  """Writes and prints what is known so far, as Markdown and as JSON."""
  checked = numerics(workdir)
  rows = [["small run", "device", "losses compared with CPU", "largest difference"]]
  rows += [
    [own["kind"], own["device"], str(own["values"]), f"{own['largest_relative_difference']:.1e}"] for own in checked
  ]
  known = [["part", "state"], *([name, state] for name, state in states.items())]
  sections = ["# Accelerator", summary.markdown(known), "## Numerics", summary.markdown(rows), "## Speed"]
  measured = {path.stem: json.loads(path.read_text()) for path in sorted((workdir / "bench").glob("*.json"))}
  logs = [workdir / "logs" / f"bench_{row}_0.log" for row in measured]
  sections += [log.read_text().strip() for log in logs if log.exists()]
  tables = [workdir / "tables" / f"table{number}" for number in (1, 3)]
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
  states = {}
  for part in parts(workdir):
    start = time.monotonic()
    finished = "to do" not in states.values() and run_part(part, workdir / "logs", deadline)
    states[part.name] = "finished" if finished else "to do"
    if cli.PROGRESS.value:
      print(f"{part.name}: {states[part.name]}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if finished:
      numerics(workdir)  # wrong numbers end the command before hours are spent
  report(workdir, states)
  if "to do" in states.values():
    raise Preempted(f"--minutes={MINUTES.value:g} are over, and all is saved; rerun the command to continue")


if __name__ == "__main__":
  cli.run(main)

"""Kills a run at random, again and again, and compares its final bytes with those of an undisturbed run.

python experiments/soak.py --kills=100 --seconds=3600 --config=configs/digits.py:digits,wrn_10_1,smoke

The run is experiments/train.py in a process of its own. SIGKILL ends it at a random time between the end of its start
and shortly after its next checkpoints. With --processes=2 the run has two processes, and one of them, at random, is
killed; with --interrupt it is SIGINT, so that the run saves first. Exit status 0 means that all kills were made and all
bytes agree.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

import tqdm
from absl import flags
from ml_collections import config_flags

from ban_jax import report, storage
from ban_jax.errors import TrainingError
from ban_jax.types import TIMES
from experiments import cli

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py:digits,wrn_10_1,smoke", "What to train.")
KILLS = flags.DEFINE_integer("kills", 100, "Number of kills.", lower_bound=1)
SECONDS = flags.DEFINE_float(
  "seconds", 3600.0, "Time limit of the kills, and of each of the three undisturbed runs.", lower_bound=1.0
)
SEED = flags.DEFINE_integer("soak_seed", 0, "Random seed of the kill times.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Number of processes of the run.", lower_bound=1)
INTERRUPT = flags.DEFINE_bool("interrupt", False, "Send SIGINT (Ctrl-C) instead of SIGKILL.")
# A run that is asked to end, or loses a process, may take so long.
END_SECONDS = 120.0
TRAIN = pathlib.Path(__file__).with_name("train.py")


def command(workdir: pathlib.Path) -> list[str]:
  """Returns the command line of the run, with this one's configuration, changes of it, and devices."""
  config = flags.FLAGS["config"]
  values = {"train.checkpoint_every": 3, **config.override_values}  # so that a run of seconds has checkpoints
  changes = [f"--config.{key}={value}" for key, value in values.items()]
  run = [str(TRAIN), f"--config={config.config_filename}", *changes, f"--workdir={workdir}", "--noprogress"]
  if PROCESSES.value == 1:
    return [sys.executable, *run, f"--devices={cli.DEVICES.value}"]
  launch = [str(TRAIN.with_name("launch.py")), f"--processes={PROCESSES.value}", "--peer_timeout=10"]
  return [sys.executable, *launch, f"--devices_per_process={cli.DEVICES.value or 1}", "--", *run]


@contextlib.contextmanager
def started(workdir: pathlib.Path) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
  """Starts or resumes the run; yields the process, which is killed on exit, and its standard error."""
  # Files, because a pipe would block the process once it is full.
  with tempfile.TemporaryDirectory() as name, open(f"{name}/err", "w+", encoding="utf-8", errors="replace") as errors:
    process = subprocess.Popen(command(workdir), stdout=subprocess.DEVNULL, stderr=errors)
    try:
      yield process, errors
    finally:
      for pid in members(process, errors):
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      process.wait()


def members(process: subprocess.Popen, errors: IO[str]) -> list[int]:
  """Returns the ids of the run's processes, the launcher's last where there is one."""
  launched = re.search(r"^launch: process ids (.+)$", head(errors), re.M)
  return [*(map(int, launched.group(1).split()) if launched else ()), process.pid]


def head(errors: IO[str]) -> str:
  """Returns the beginning of a process's standard error, which the process may be writing."""
  return os.pread(errors.fileno(), 1000, 0).decode(errors="replace")


def tail(errors: IO[str]) -> str:
  """Returns the end of a process's standard error."""
  errors.seek(0)
  return errors.read()[-4000:]


def outcome(workdir: pathlib.Path) -> dict[str, object]:
  """Returns the results of a finished run: digests of the variables on the disk, histories, evaluations.

  Raises a CheckpointError if the disk does not hold what the manifests record.
  """
  found = {"evaluations": (workdir / "evaluations.json").read_text("utf-8")}
  for index in range(CONFIG.value.generations + 1):
    generation, manifest = storage.load(storage.resolve_workdir(workdir) / f"gen_{index}")
    rows = [{name: value for name, value in row.items() if name not in TIMES} for row in generation.history]
    found[f"generation {index}"] = (manifest["digest"], json.dumps(rows), json.dumps(dict(generation.metrics)))
  return found


def compare(found: dict[str, object], expected: dict[str, object], what: str) -> None:
  """Raises a TrainingError if two outcomes differ."""
  differing = [name for name in expected if found.get(name) != expected[name]]
  if differing:
    raise TrainingError(f"{what} ended otherwise than the run left alone, in: {', '.join(differing)}")


def newest(workdir: pathlib.Path) -> list[str]:
  """Returns the checkpoints and finished generations of a run; they change when it makes progress."""
  return sorted(str(path) for path in (*workdir.glob("gen_*/steps/[0-9]*"), *workdir.glob("gen_*/manifest.json")))


def run_whole(workdir: pathlib.Path, limit: float) -> tuple[float, float]:
  """Runs to the end without a kill; returns the seconds to the first checkpoint and to the end.

  Raises a TrainingError if the run fails or takes more than `limit` seconds.
  """
  begin, first = time.monotonic(), None
  with started(workdir) as (process, errors):
    while process.poll() is None:
      passed = time.monotonic() - begin
      if first is None and any(path.name.isdigit() for path in workdir.glob("gen_0/steps/*")):
        first = passed
      if passed > limit:
        raise TrainingError(f"a run left alone did not end within {limit:g} seconds (--seconds):\n{tail(errors)}")
      time.sleep(0.01)
    if process.returncode:
      raise TrainingError(f"the run fails without any kill:\n{tail(errors)}")
  total = time.monotonic() - begin
  return first or total, total


def run_killed(workdir: pathlib.Path, seconds: float, rng: random.Random) -> bool:
  """Starts or resumes the run and kills it, or one of its processes, after `seconds`; returns whether it ended before.

  Raises a TrainingError where it fails by itself, or does not end after that.
  """
  with started(workdir) as (process, errors):
    try:
      process.wait(seconds)
    except subprocess.TimeoutExpired:
      number = signal.SIGINT if INTERRUPT.value else signal.SIGKILL
      victims = members(process, errors)
      with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(victims[:-1] or victims), number)
      try:
        process.wait(END_SECONDS)
      except subprocess.TimeoutExpired:
        raise TrainingError(f"the run did not end after {number.name}:\n{tail(errors)}") from None
      if INTERRUPT.value and "Traceback" in (said := tail(errors)):
        raise TrainingError(f"the run ended with a traceback after SIGINT:\n{said}") from None
      return process.returncode == 0
    if process.returncode:
      raise TrainingError(f"a resumption failed with status {process.returncode}:\n{tail(errors)}")
  return True


def soak(folder: pathlib.Path) -> tuple[int, int, int]:
  """Runs twice undisturbed, then with kills, and compares every outcome; returns kills, runs and kills after progress.

  Raises a TrainingError for the first difference.
  """
  begin, whole, again = time.monotonic(), folder / "whole", folder / "again"
  run_whole(whole, SECONDS.value)  # fills the compilation cache
  first, total = run_whole(again, SECONDS.value)
  expected = outcome(whole)
  compare(outcome(again), expected, "a second run without a kill")
  print(f"left alone, it takes {total:.1f} s, {first:.1f} s of them until the first checkpoint", flush=True)

  # Long enough that some checkpoints come between kills, short enough that one run takes about all of them.
  span = max(1.0, 2 * (total - first) / KILLS.value)
  rng, kills, runs, before_run, reached, before = random.Random(SEED.value), 0, 1, 0, 0, None
  with tqdm.tqdm(
    total=KILLS.value, unit="kill", disable=not (cli.PROGRESS.value and report.is_terminal(sys.stderr))
  ) as bar:
    while kills < KILLS.value and time.monotonic() - begin < SECONDS.value:
      workdir = folder / f"killed_{runs}"
      if run_killed(workdir, rng.uniform(0.5 * first, first + span), rng):
        compare(outcome(workdir), expected, f"run {runs}, killed {kills - before_run} times,")
        runs, before_run = runs + 1, kills
      else:
        kills += 1
        reached += (now := newest(workdir)) != before
        before = now
        bar.update()
        if not report.is_terminal(sys.stderr) and kills % 10 == 0:
          print(f"{kills} kills", flush=True)
  workdir = folder / f"killed_{runs}"
  run_whole(workdir, SECONDS.value)
  compare(outcome(workdir), expected, f"run {runs}, killed {kills - before_run} times,")
  return kills, runs, reached


def main() -> None:
  """Runs the soak and prints its result."""
  cli.unwind_on_interrupt()
  begin = time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    kills, runs, reached = soak(pathlib.Path(folder))
  seconds = time.monotonic() - begin
  print(f"{reached} of the kills came after a new checkpoint, the others while a run was starting")
  print(f"{kills} kills in {runs} runs, {seconds:.0f} s: all ended with the bytes of the run left alone")
  if kills < KILLS.value:
    raise TrainingError(f"--seconds={SECONDS.value:g} was over after {kills} of {KILLS.value} kills")


if __name__ == "__main__":
  cli.run(main)

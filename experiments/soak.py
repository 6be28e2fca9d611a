"""Kills a run at random, again and again, and compares what it ends with to a run that was left alone, byte by byte.

python experiments/soak.py --kills=100 --seconds=3600 --config=configs/digits.py:digits,wrn_10_1,smoke

The run is a process of its own, experiments/train.py, ended by SIGKILL at a moment drawn at random between its start-up
and a little beyond its next checkpoints. Exit status 0 means that all kills were made and all bytes agree.
"""

import contextlib
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

import tqdm
from absl import flags
from ml_collections import config_flags

from ban_jax import storage
from ban_jax.errors import ConfigError, TrainingError
from experiments import cli

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py:digits,wrn_10_1,smoke", "What is trained.")
KILLS = flags.DEFINE_integer("kills", 100, "How often the run is killed.")
SECONDS = flags.DEFINE_float(
  "seconds",
  3600.0,
  "After so long nothing more is killed, and what was not reached is told. Each of the runs that are left alone, two "
  "before the kills and one behind them, may take as long.",
)
SEED = flags.DEFINE_integer("soak_seed", 0, "Of the moments at which it is killed.")
TRAIN = pathlib.Path(__file__).with_name("train.py")


def command(workdir: pathlib.Path) -> list[str]:
  """Returns the command line of the run: this one's configuration, with all that was changed in it, and the devices."""
  config = flags.FLAGS["config"]
  changes = [f"--config.{key}={value}" for key, value in config.override_values.items()]
  return [sys.executable, str(TRAIN), f"--config={config.config_filename}", *changes, f"--devices={cli.DEVICES.value}",
          f"--workdir={workdir}", "--noprogress"]  # fmt: skip


@contextlib.contextmanager
def started(workdir: pathlib.Path) -> Iterator[tuple[subprocess.Popen, IO[str]]]:
  """Starts or resumes the run; yields the process, which is ended with the block, and what it complains of."""
  with tempfile.TemporaryFile("w+") as errors:  # a pipe that nobody reads would stop it once it is full
    process = subprocess.Popen(command(workdir), stdout=subprocess.DEVNULL, stderr=errors)
    try:
      yield process, errors
    finally:
      process.kill()
      process.wait()


def told(errors: IO[str]) -> str:
  """Returns the end of what a process complained of."""
  errors.seek(0)
  return errors.read()[-4000:]


def outcome(workdir: pathlib.Path) -> dict[str, object]:
  """Returns all that a finished run came to: digests of the variables as they lie on the disk, histories, evaluations.

  Raises a CheckpointError where the disk does not hold what the manifests vouch for.
  """
  found = {"evaluations": (workdir / "evaluations.json").read_text()}
  for index in range(CONFIG.value.generations + 1):
    generation, manifest = storage.load(storage.resolve_workdir(workdir) / f"gen_{index}")
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in generation.history]
    found[f"generation {index}"] = (manifest["digest"], json.dumps(rows), json.dumps(dict(generation.metrics)))
  return found


def newest(workdir: pathlib.Path) -> list[str]:
  """Returns the checkpoints and finished generations of a run, by which one sees whether it got further."""
  return sorted(str(path) for path in (*workdir.glob("gen_*/steps/[0-9]*"), *workdir.glob("gen_*/manifest.json")))


def run_whole(workdir: pathlib.Path, limit: float) -> tuple[float, float]:
  """Runs without a kill; returns the seconds until the first checkpoint and those until the end.

  Raises a TrainingError where the run fails, or has not ended after `limit` seconds.
  """
  begin, first = time.monotonic(), None
  with started(workdir) as (process, errors):
    while process.poll() is None:
      passed = time.monotonic() - begin
      if first is None and any(path.name.isdigit() for path in workdir.glob("gen_0/steps/*")):
        first = passed
      if passed > limit:
        raise TrainingError(f"a run left alone did not end within {limit:g} seconds (--seconds):\n{told(errors)}")
      time.sleep(0.01)
    if process.returncode:
      raise TrainingError(f"the run fails without any kill:\n{told(errors)}")
  total = time.monotonic() - begin
  return first or total, total


def run_killed(workdir: pathlib.Path, moment: float) -> bool:
  """Starts or resumes the run and kills it after `moment` seconds; returns whether it was finished before."""
  with started(workdir) as (process, errors):
    try:
      process.wait(moment)
    except subprocess.TimeoutExpired:
      return False
    if process.returncode:
      raise TrainingError(f"a resumption failed with status {process.returncode}:\n{told(errors)}")
  return True


def main() -> None:
  """Runs once undisturbed, then until all kills are made, and compares every finished run with the first."""
  if KILLS.value < 1:
    raise ConfigError(f"--kills must be at least 1, not {KILLS.value}")
  if not SECONDS.value > 0:
    raise ConfigError(f"--seconds must be above 0, not {SECONDS.value}")
  draw, begin = random.Random(SEED.value), time.monotonic()
  with tempfile.TemporaryDirectory() as folder:
    whole = pathlib.Path(folder) / "whole"
    run_whole(whole, SECONDS.value)  # fills the compilation cache
    again = pathlib.Path(folder) / "again"
    first, total = run_whole(again, SECONDS.value)
    expected = outcome(whole)
    _compare(outcome(again), expected, "a second run without a kill")
    print(f"left alone, it takes {total:.1f} s, {first:.1f} s of them until the first checkpoint", flush=True)

    # As long that a life of the run meets about all kills, and at least some checkpoints come between them.
    span = max(1.0, 2 * (total - first) / KILLS.value)
    kills, lives, left, reached, before = 0, 1, 0, 0, None
    with tqdm.tqdm(total=KILLS.value, unit="kill", disable=not (cli.PROGRESS.value and sys.stderr.isatty())) as bar:
      while kills < KILLS.value and time.monotonic() - begin < SECONDS.value:
        workdir = pathlib.Path(folder) / f"killed_{lives}"
        if run_killed(workdir, draw.uniform(0.5 * first, first + span)):
          _compare(outcome(workdir), expected, f"run {lives}, killed {kills - left} times,")
          lives, left = lives + 1, kills
        else:
          kills += 1
          reached += (now := newest(workdir)) != before
          before = now
          bar.update()
          if not sys.stderr.isatty() and kills % 10 == 0:
            print(f"{kills} kills", flush=True)
    workdir = pathlib.Path(folder) / f"killed_{lives}"
    run_whole(workdir, SECONDS.value)
    _compare(outcome(workdir), expected, f"run {lives}, killed {kills - left} times,")
    seconds = time.monotonic() - begin
    print(f"{reached} of the kills came behind a new checkpoint, the others while a run was starting")
    print(f"{kills} kills in {lives} runs, {seconds:.0f} s: all ended with the bytes of the run left alone")
    if kills < KILLS.value:
      raise TrainingError(f"--seconds={SECONDS.value:g} was over behind {kills} of {KILLS.value} kills")


def _compare(found: dict[str, object], expected: dict[str, object], what: str) -> None:
  differing = [name for name in expected if found.get(name) != expected[name]]
  if differing:
    raise TrainingError(f"{what} ended otherwise than the run left alone, in: {', '.join(differing)}")


if __name__ == "__main__":
  cli.run(main)

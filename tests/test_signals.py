"""Ctrl-C at random moments, many in one process and some in real runs: none is lost, none prints a traceback."""

import json
import random
import signal
import subprocess
import sys
import threading
import time

import forks
import pytest
from conftest import ROOT, TRAIN, config

import ban_jax
from ban_jax import preemption, train
from ban_jax.errors import Preempted

QUIET = {"progress": False}
COMMAND = [
  *TRAIN,
  "--config.train.epochs=12",
  "--config.train.checkpoint_every=3",
  "--noprogress",
]


@pytest.fixture(autouse=True, scope="module")
def listening():
  """Lets processes notice SIGINT, which a script ignores in what it starts in the background, the tests perhaps."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


# Sends itself SIGINT at random moments of a small loop that does what loses a KeyboardInterrupt: most of its time is
# spent in destructors and in callbacks of the garbage collector. Prints how many signals were answered, and by whom.
MANY = """
import gc, os, random, signal, sys, threading, time
import jax, jax.numpy as jnp
from ban_jax import preemption

rounds, saves, random_ = int(sys.argv[1]), sys.argv[2] == "saves", random.Random(0)

class Slow:
  def __del__(self):
    sum(range(300))

def slow(phase, info):
  sum(range(300))

gc.callbacks.append(slow)
add = jax.jit(lambda x: x + 1)
add(jnp.zeros(3))
outer, inner, lost = [], 0, 0
signal.signal(signal.SIGINT, lambda *_: outer.append(1))

def work(steps, requested, before):
  for _ in range(steps):
    cycle = [Slow()]
    cycle.append(cycle)
    del cycle
    gc.collect(0)
    add(jnp.zeros(3))
    if requested():
      return True
    if len(outer) > before:  # it came before the watch began
      return False
  return False

for number in range(rounds):
  before, found = len(outer), False
  delay = random_.uniform(0, 0.006)
  sender = threading.Thread(target=lambda: (time.sleep(delay), os.kill(os.getpid(), signal.SIGINT)))
  sender.start()
  try:
    with preemption.watch(saves=saves) as requested:
      # Every other loop goes on until the signal comes; of the others, many end before it.
      found = work(10**9 if number % 2 else random_.randrange(1, 5), requested, before)
  except KeyboardInterrupt:
    found = True
  sender.join()
  deadline = time.monotonic() + 5
  while not found and len(outer) == before and time.monotonic() < deadline:
    pass
  inner += found
  lost += not found and len(outer) == before
print(inner, len(outer), lost)
"""


@pytest.mark.parametrize("saves", ["saves", "without"])
def test_no_signal_of_many_is_lost(saves):
  rounds = 300
  done = subprocess.run(
    [sys.executable, "-c", MANY, str(rounds), saves], capture_output=True, text=True, check=False, timeout=120, cwd="/"
  )
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  inner, outer, lost = map(int, done.stdout.split())
  assert lost == 0
  assert inner + outer == rounds
  assert inner > 20  # noticed by the loop
  assert outer > 20  # handed on, because the loop had ended


def test_without_a_workdir_ctrl_c_is_a_keyboard_interrupt():
  steps = []

  def interrupt_third(lane, live, real=train._dispatch):
    steps.append(live.done)
    if len(steps) == 3:
      signal.raise_signal(signal.SIGINT)
    return real(lane, live)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "_dispatch", interrupt_third)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, config(), **QUIET)
  assert steps == [0, 1, 2]  # after the step
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_with_a_workdir_the_first_ctrl_c_saves_and_the_second_is_a_keyboard_interrupt_at_once(tmp_path):
  times = []

  def interrupt(lane, live, real=train._dispatch):
    for _ in range(times.pop(0)):
      signal.raise_signal(signal.SIGINT)
    return real(lane, live)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "_dispatch", interrupt)
    times[:] = [0, 1]
    with pytest.raises(Preempted, match=r"asked to end by SIGTERM or Ctrl-C: generation 0 is saved at step 2 of "):
      ban_jax.train_generation(None, config(), workdir=tmp_path, **QUIET)
    times[:] = [2]
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, config(), workdir=tmp_path, **QUIET)
  assert not times
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_ctrl_c_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background job of a script
  try:
    with preemption.watch(saves=True) as requested:
      signal.raise_signal(signal.SIGINT)
      assert not requested()
  finally:
    signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_watched():
  answers = []

  def ask():
    with preemption.watch(saves=True) as requested:
      answers.append(requested())

  thread = threading.Thread(target=ask)
  thread.start()
  thread.join()
  assert answers == [False]


# Stands in compiled code that never comes back to Python, in a training and elsewhere.
STUCK = """
import hashlib, sys
from ban_jax import preemption
from experiments import interrupts
interrupts.install()
with preemption.watch(saves=True):
  print("begun", flush=True)
  hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_the_second_ctrl_c_ends_at_once_even_in_compiled_code():
  process = subprocess.Popen(
    [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
  )
  assert process.stdout.readline() == "begun\n"
  process.send_signal(signal.SIGINT)
  assert process.stderr.readline().startswith("interrupted: a checkpoint is saved first; Ctrl-C once more ends")
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=20)
  assert process.returncode == 130
  assert err == "interrupted; rerun the command to continue from the last checkpoint\n"


def digests(workdir):
  return [json.loads((workdir / f"gen_{i}" / "manifest.json").read_text())["digest"] for i in range(2)]


def newest(workdir):
  return max((int(path.name) for path in workdir.glob("gen_*/steps/[0-9]*") if path.name.isdigit()), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [1, pytest.param(100, marks=pytest.mark.soak)])
def test_real_runs_that_are_interrupted_end_with_the_bytes_of_one_left_alone(tmp_path, signals):
  assert forks.run([*COMMAND, f"--workdir={tmp_path}/whole"]).returncode == 0
  rng, statuses, runs = random.Random(1), [], 1
  while len(statuses) < signals:
    workdir = tmp_path / f"interrupted_{runs}"
    command, before = [*COMMAND, f"--workdir={workdir}"], newest(workdir)
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # While it starts (Python itself has after 0.1 s), or while it trains.
    time.sleep(rng.uniform(0.2, 2))
    if len(statuses) % 2:
      while newest(workdir) == before and process.poll() is None:
        time.sleep(0.01)
      time.sleep(rng.uniform(0, 0.5))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    if process.returncode == 0:  # all was done before the signal came
      assert digests(workdir) == digests(tmp_path / "whole")
      runs += 1
      continue
    statuses.append(process.returncode)
    # Python gives SIGINT back to the system, which ends a process by it, once the script is over.
    assert process.returncode in (75, 130, -signal.SIGINT), err
    if process.returncode > 0:
      saved = process.returncode == Preempted.exit_status
      expected = "error: asked to end by SIGTERM or Ctrl-C: gen" if saved else "interrupted; rerun the command"
      assert err.splitlines()[-1].startswith(expected)
  assert 130 in statuses
  assert forks.run([*COMMAND, f"--workdir={workdir}"]).returncode == 0
  assert digests(workdir) == digests(tmp_path / "whole")


def test_every_script_imports_the_answer_to_ctrl_c_first():
  scripts = [path for path in (ROOT / "experiments").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()]
  assert len(scripts) > 12
  for path in scripts:
    first = next(line for line in path.read_text().split('"""\n')[1].splitlines() if line)
    assert path.name == "launch.py" or first.startswith("import experiments.interrupts  # noqa"), path

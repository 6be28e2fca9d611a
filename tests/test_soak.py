"""A short run of experiments/soak.py: a run killed at random, and the script's output if bytes differ."""

import subprocess
import sys

import forks
import pytest
from conftest import IMAGES, ROOT

COMMAND = [sys.executable, str(ROOT / "experiments" / "soak.py"), "--devices=2"]
# The script, whose runs are forks of a process that has imported the libraries: most of a short run is its start.
FORKED = """
import pathlib, subprocess, sys, types
sys.path.insert(0, TESTS)
import forks
from experiments import cli, soak
def fork(line, stdout, stderr):
  return forks.Fork(line, pathlib.Path(stderr.name).parent)
soak.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": fork})
cli.run(soak.main)
""".replace("TESTS", repr(str(ROOT / "tests")))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("words", "epochs", "kills"),
  [
    (IMAGES, 8, 3),
    pytest.param("digits,wrn_10_1,smoke", 8, 30, marks=pytest.mark.soak),
    pytest.param("pydoc,lstm_32,smoke", 3, 30, marks=pytest.mark.soak),
  ],
)
def test_a_run_killed_at_random_ends_with_the_bytes_of_one_left_alone(words, epochs, kills):
  flags = [f"--config={ROOT}/configs/{words.partition(',')[0]}.py:{words}", f"--config.train.epochs={epochs}"]
  command = [sys.executable, "-c", FORKED, "--devices=2", f"--kills={kills}", "--seconds=1000", *flags]
  done = forks.run(command, timeout=5000)
  assert done.returncode == 0, done.stderr
  assert f"{kills} kills in " in done.stdout
  assert done.stdout.splitlines()[-1].endswith("all ended with the bytes of the run left alone")


@pytest.mark.soak
@pytest.mark.parametrize("flags", [[], ["--interrupt"], ["--processes=2"]], ids=["killed", "interrupted", "of two"])
def test_a_run_that_starts_python_each_time_does_so_too(flags):
  command = [*COMMAND, "--kills=10", "--seconds=1000", "--config.train.epochs=8", "--devices=1", *flags]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=5000)
  assert done.returncode == 0, done.stderr
  assert "10 kills in " in done.stdout


def test_runs_that_differ_are_told():
  code = """
from experiments import soak
same = {"evaluations": "x", "generation 0": ("digest", "rows", "metrics")}
soak.compare(dict(same), same, "run 1, killed 3 times,")
print("equal", flush=True)
soak.compare({**same, "generation 0": ("other", "rows", "metrics")}, same, "run 1, killed 3 times,")
"""
  # In a separate process, because each script defines its own flags.
  done = forks.run([sys.executable, "-c", code], cwd=ROOT)
  assert done.stdout == "equal\n"
  told = done.stderr.splitlines()[-1]
  assert told.endswith(
    "TrainingError: run 1, killed 3 times, ended otherwise than the run left alone, in: generation 0"
  )


def soaked(code, *arguments):
  """Runs code after an import of soak, in a separate process, because each script defines its own flags."""
  begin = "import pathlib, sys\nfrom absl import flags\nfrom ban_jax.errors import TrainingError\n"
  begin += "from experiments import soak\nflags.FLAGS(sys.argv)\n"
  return forks.run([sys.executable, "-c", begin + code, *arguments], cwd=ROOT)


WHOLE = """
soak.command = lambda workdir: [sys.executable, "-c", CODE]
try:
  soak.run_whole(pathlib.Path(WORKDIR), 5.0)
except TrainingError as error:
  print(error)
"""


@pytest.mark.parametrize(
  ("code", "message"),
  [
    ("import time; time.sleep(999)", "a run left alone did not end within 5 seconds (--seconds):\n\n"),
    ("raise SystemExit('x' * 10**6 + ' the end')", f"the run fails without any kill:\n{'x' * 3991} the end\n\n"),
  ],
  ids=["hangs", "complains"],
)
def test_a_run_that_hangs_or_complains_much_ends_the_soak(code, message, tmp_path):
  done = soaked(WHOLE.replace("CODE", repr(code)).replace("WORKDIR", repr(str(tmp_path))))
  assert done.stdout == message, done.stderr


def test_changes_of_the_configuration_are_handed_on_however_they_are_written():
  changes = ["-config.train.epochs", "3", "--noconfig.data.flip", "--config.seed=2", "--config.model.dropout", ".5"]
  done = soaked("print(soak.command('there')[2:])", *changes, "--devices=2")
  handed_on = [
    *("--config=configs/digits.py:digits,wrn_10_1,smoke", "--config.train.checkpoint_every=3"),
    *("--config.train.epochs=3", "--config.data.flip=False", "--config.seed=2", "--config.model.dropout=0.5"),
    *("--workdir=there", "--noprogress", "--devices=2"),
  ]
  assert done.stdout == f"{handed_on}\n", done.stderr


@pytest.mark.parametrize(
  ("flag", "message"),
  [("--kills=0", "flag --kills=0: 0 is not a positive integer"), ("--seconds=0", "flag --seconds=0: ")],
)
def test_wrong_bounds_are_refused(flag, message):
  done = forks.run([*COMMAND, flag], cwd=ROOT)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {message}")
  assert done.stderr.count("\n") == 1

"""Several processes on one machine: the same training as one process, and what happens when one is lost."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import forks
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import IMAGES, ROOT
from etils import epath

from ban_jax import storage, trees
from ban_jax.errors import ConfigError, PeerError
from experiments import cli, launch

# Dropout, augmentation (the digits' random crops), batch norm and the batch-wide weights of CWTM, all at once.
TRAIN = [
  str(ROOT / "experiments" / "train.py"),
  f"--config={ROOT}/configs/digits.py:{IMAGES},cwtm",
  "--config.model.dropout=0.3",
  "--config.train.evaluate_every=0",
]
# Sixty steps per generation: enough time to lose a process several times.
LONG = ["--config.train.epochs=20", "--config.train.checkpoint_every=5"]
TEACHER = [*LONG, "--config.generations=0"]
# The launcher with processes that are forks; see there.
LAUNCH = str(ROOT / "tests" / "forked_launch.py")
# Runs a script until its first checkpoint.
KILLED = """
import os, runpy, signal, sys
from ban_jax import storage
save = storage.save_step
def save_and_die(manager, *given):
  save(manager, *given)
  manager.wait_until_finished()
  os.kill(os.getpid(), signal.SIGKILL)
storage.save_step = save_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ENDED_WITH_ITS_PEER = "launch: process {} (was aborted .SIGABRT.: another process of the run|ended with status 69)"
# Seconds without a heartbeat, and the most that a test waits for anything.
PEER_TIMEOUT, PATIENCE = 20, 300


def alone(workdir, devices, *more):
  """Returns the arguments of a run of one process."""
  return [sys.executable, *TRAIN, f"--workdir={workdir}", f"--devices={devices}", *more]


def several(workdir, processes, *more, peer_timeout=PEER_TIMEOUT):
  """Returns the arguments of a run of several processes with a device each."""
  own = [f"--processes={processes}", f"--peer_timeout={peer_timeout}"]
  return [sys.executable, LAUNCH, *own, "--", *TRAIN, f"--workdir={workdir}", *more]


def finish(arguments):
  done = forks.run(arguments, cwd=ROOT, timeout=PATIENCE)
  assert done.returncode == 0, done.stderr
  return done


def wait_until(condition, process):
  deadline = time.monotonic() + PATIENCE
  while not condition():
    assert process.poll() is None, "the run ended before it could be interrupted"
    assert time.monotonic() < deadline
    time.sleep(0.005)


def checkpoints(workdir):
  # A checkpoint's directory gets its final name when it is complete.
  return {int(path.name) for path in (workdir / "gen_0" / "steps").glob("*") if path.name.isdigit()}


def interrupt(arguments, workdir, number, victim):
  """Starts a run and sends a signal to one process at its next checkpoint; returns (status, messages, seconds)."""
  before = checkpoints(workdir)
  folder = workdir.with_name(f"{workdir.name}_{time.monotonic_ns()}")
  folder.mkdir()
  messages = folder / "err"
  process = forks.Fork(arguments, folder, ROOT)
  try:
    wait_until(lambda: checkpoints(workdir) - before, process)
    pid = int(re.search(r"launch: process ids (.*)", messages.read_text()).group(1).split()[victim])
    start = time.monotonic()
    os.kill(pid, number)
    status = process.wait(PATIENCE)
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.kill(process.pid, signal.SIGTERM)
  return status, messages.read_text(), time.monotonic() - start


def manifest(workdir, generation):
  return json.loads((workdir / f"gen_{generation}" / "manifest.json").read_text())


def assert_close(workdir, other, generation, tolerance):
  """Compares the parameters, batch statistics and metrics of a generation in two run directories."""
  (one, _), (two, _) = (storage.load(epath.Path(run) / f"gen_{generation}") for run in (workdir, other))
  theirs = trees.leaves(two.params)
  assert theirs
  for path, leaf in trees.leaves(one.params).items():
    np.testing.assert_allclose(leaf, theirs[path], rtol=tolerance, atol=tolerance, err_msg=path)
  assert one.metrics == pytest.approx(two.metrics, rel=tolerance)
  assert (one.metrics["test_count"], one.metrics["test_error"]) == (1397, two.metrics["test_error"])


def table(stdout):
  return [line for line in stdout.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  """A run of two generations by two processes with a device each."""
  workdir = tmp_path_factory.mktemp("processes") / "two"
  return workdir, finish(several(workdir, 2, *LONG))


@pytest.mark.slow
def test_two_processes_train_what_one_process_with_two_devices_trains(two, tmp_path):
  workdir, done = two
  one = finish(alone(tmp_path, 2, *LONG))
  assert [manifest(run, 1)["layout"]["processes"] for run in (workdir, tmp_path)] == [2, 1]
  for generation in (0, 1):
    assert_close(workdir, tmp_path, generation, 1e-3)
  assert len(table(one.stdout)) == 4
  assert table(done.stdout) == table(one.stdout)
  evaluations = json.loads((workdir / "evaluations.json").read_text())
  assert [row["metrics"]["count"] for row in evaluations.values()] == [1397, 1397]
  # The second process prints only what JAX's transport prints.
  shown = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("[1]") and "Gloo" not in line]
  assert not shown


@pytest.mark.slow
def test_four_processes_train_what_one_process_with_four_devices_trains(tmp_path):
  one, four = tmp_path / "one", tmp_path / "four"
  finish(alone(one, 4))
  four.mkdir()
  shutil.copy(one / "config.json", four)
  shutil.copytree(one / "gen_0", four / "gen_0")  # the same teacher
  finish(several(four, 4))
  assert manifest(four, 1)["layout"]["processes"] == 4
  assert_close(one, four, 1, 1e-4)


@pytest.mark.slow
def test_what_one_process_left_two_go_on_with(two, tmp_path):
  workdir = tmp_path / "run"
  killed = forks.run([sys.executable, "-c", KILLED, *alone(workdir, 2, *TEACHER)[1:]], cwd=ROOT)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (workdir / "gen_0" / "manifest.json").exists()
  done = finish(several(workdir, 2, *TEACHER))
  assert "its bytes may differ" in done.stderr
  assert_close(two[0], workdir, 0, 1e-3)


@pytest.mark.slow
def test_a_run_that_loses_processes_hangs_and_is_preempted_ends_with_the_same_bytes(two, tmp_path):
  workdir, copy = tmp_path / "run", tmp_path / "copy"
  arguments = several(workdir, 2, *TEACHER)

  # A worker is killed: the other reports it at once, as below, or, where both were about to meet at the end of a
  # checkpoint, after JAX's heartbeat, when JAX may be faster to abort it.
  status, messages, seconds = interrupt(arguments, workdir, signal.SIGKILL, victim=1)
  assert status == 128 + signal.SIGKILL
  assert "launch: process 1 was killed by SIGKILL" in messages
  assert re.search(ENDED_WITH_ITS_PEER.format(0), messages)
  assert seconds < PEER_TIMEOUT + launch.MARGIN
  assert not (workdir / "gen_0" / "manifest.json").exists()
  shutil.copytree(workdir, copy)

  # The coordinator is killed: JAX aborts the other.
  status, messages, seconds = interrupt(arguments, workdir, signal.SIGKILL, victim=0)
  assert status == 128 + signal.SIGKILL
  assert "launch: process 0 was killed by SIGKILL" in messages
  assert re.search(ENDED_WITH_ITS_PEER.format(1), messages)
  assert seconds < PEER_TIMEOUT + launch.MARGIN
  assert not (workdir / "gen_0" / "manifest.json").exists()

  # A stopped process keeps its connections and sends no heartbeat, like a machine that hangs or has lost its network.
  hanging = [sys.executable, LAUNCH, "--patient", *several(workdir, 2, *TEACHER, peer_timeout=10)[2:]]
  status, messages, seconds = interrupt(hanging, workdir, signal.SIGSTOP, victim=1)
  assert status == 128 + signal.SIGABRT
  assert "launch: process 0 was aborted (SIGABRT): another process of the run had gone, or gave" in messages
  # Ten seconds, and ten more for the other to end; then the launcher waits before it kills the stopped one.
  assert seconds < 2 * 10 + 10 + launch.MARGIN
  assert "launch: process 1 did not end within 11 seconds: killed" in messages
  assert not (workdir / "gen_0" / "manifest.json").exists()

  # One process gets SIGTERM: all save the same step.
  status, messages, _ = interrupt(arguments, workdir, signal.SIGTERM, victim=1)
  assert status == 75, messages
  assert "launch: process 0 ended with status 75" in messages
  assert "launch: process 1 ended with status 75" in messages
  steps = set(re.findall(r"error: asked to end by SIGTERM or Ctrl-C: generation 0 is saved at step (\d+)", messages))
  assert steps == {str(max(checkpoints(workdir)))}

  finish(arguments)
  assert manifest(workdir, 0)["digest"] == manifest(two[0], 0)["digest"]

  # One process resumes the run of two.
  done = finish(alone(copy, 2, *TEACHER))
  assert "its bytes may differ" in done.stderr
  assert_close(two[0], copy, 0, 1e-3)


FAILING = """
import os, signal
import jax
from jax.experimental import multihost_utils
from ban_jax.errors import ConfigError
from experiments import cli

def main():
  cli.start_jax()
  multihost_utils.sync_global_devices("start")
  if jax.process_index() == 1:
    {fails}
  multihost_utils.sync_global_devices("end")

cli.run(main)
"""


@pytest.mark.parametrize(
  ("fails", "status", "how", "messages"),
  [
    ("raise ConfigError('a mistake')", 2, "ended with status 2", ["[1] error: a mistake"]),
    ("raise RuntimeError('a mistake')", 1, "ended with status 1", ["[1] Traceback", "[1] RuntimeError: a mistake"]),
    ("os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, "was killed by SIGKILL", []),
  ],
)
def test_a_process_that_fails_alone_keeps_nobody_waiting(fails, status, how, messages, tmp_path):
  script = tmp_path / "failing.py"
  script.write_text(FAILING.format(fails=fails))
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-m", "experiments.launch", "--processes=2", "--peer_timeout=100", "--", str(script)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=PATIENCE,
  )
  assert time.monotonic() - start < 80
  assert done.returncode == status
  assert f"launch: process 1 {how}" in done.stderr
  assert "launch: process 0 ended with status 69" in done.stderr
  assert len(
    re.findall(r"^error: lost another process of the run \(.+\); start all of them again: .*$", done.stderr, re.M)
  )
  for message in messages:
    assert re.search(f"^{re.escape(message)}", done.stderr, re.M)
  assert done.stderr.count("Traceback") == ("[1] Traceback" in messages)


@pytest.mark.parametrize("process", [0, 1])
def test_a_run_whose_other_process_never_comes_ends_with_a_message(process, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    address = f"localhost:{probe.getsockname()[1]}"
  where = [f"--coordinator_address={address}", "--num_processes=2", f"--process_id={process}", "--start_timeout=2"]
  done = forks.run(alone(tmp_path, 1, *where))
  assert done.returncode == 69
  expected = f"error: not all processes of the run met at {address} within 2 seconds (--start_timeout)"
  assert done.stderr.splitlines()[-1].startswith(expected)
  assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_named(tmp_path):
  with socket.socket() as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    where = [f"--coordinator_address=localhost:{port}", "--num_processes=2", "--process_id=0"]
    done = forks.run(alone(tmp_path, 1, *where))
  assert done.returncode == 2
  expected = f"error: --coordinator_address: port {port} of this machine cannot be opened: "
  assert done.stderr.startswith(expected)
  assert done.stderr.count("\n") == 1


MEETING = {"coordinator_address": "host:1234", "num_processes": 2, "process_id": 0}


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"num_processes": 2}, "--num_processes also needs --coordinator_address and --process_id"),
    ({"coordinator_address": "host:1"}, "--coordinator_address also needs --num_processes and --process_id"),
    ({**MEETING, "coordinator_address": "host"}, "--coordinator_address must be host:port of process 0, not 'host'"),
    ({**MEETING, "coordinator_address": ""}, "--coordinator_address must be host:port of process 0, not ''"),
    ({**MEETING, "coordinator_address": "host:99999"}, "must be host:port of process 0, not 'host:99999'"),
    ({**MEETING, "num_processes": 0}, "--num_processes must be at least 1, not 0"),
    ({**MEETING, "process_id": 2}, "--process_id must be from 0 to 1 with --num_processes=2, not 2"),
    ({**MEETING, "process_id": -1}, "--process_id must be from 0 to 1 with --num_processes=2, not -1"),
    ({**MEETING, "distributed": True}, "--distributed finds the other processes by itself; leave out --coordinator"),
    ({**MEETING, "peer_timeout": 1}, "--peer_timeout must be at least 10 (seconds), not 1"),
    ({**MEETING, "start_timeout": 0}, "--start_timeout must be at least 1 (seconds), not 0"),
  ],
)
def test_flags_that_do_not_fit_together_are_refused(values, message):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  with flagsaver.flagsaver(**values), pytest.raises(ConfigError, match=re.escape(message)):
    cli.start_jax()


def test_wrong_flags_end_with_one_line_and_status_2(tmp_path):
  done = forks.run(alone(tmp_path, 1, "--num_processes=2"))
  assert done.returncode == 2
  assert done.stderr == "error: --num_processes also needs --coordinator_address and --process_id\n"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--processes=0", "--", "x.py"], "argument --processes: must be a whole number of at least 1, not '0'"),
    (["--", "x.py"], "the following arguments are required: --processes"),
    (["--processes=2"], "the command is missing"),
    (["--processes=2", "--peer_timeout=9", "--", "x.py"], "must be a whole number of at least 10, not '9'"),
    (["--processes=2", "x.py"], "unrecognized arguments: x.py"),
    (
      ["--processes=2", "--", "x.py", "--devices=2"],
      "the launcher sets --devices itself; give --devices_per_process in front of the --",
    ),
    (["--processes=2", "--", "x.py", "--process_id=1"], "the launcher sets --process_id itself"),
  ],
)
def test_the_launcher_answers_mistakes_with_one_line(arguments, message, capsys):
  with pytest.raises(SystemExit) as ended:
    launch.main(arguments)
  assert ended.value.code == 2
  shown = capsys.readouterr().err
  assert shown.startswith("error: ")
  assert message in shown
  assert shown.count("\n") == 1


def test_the_launcher_kills_who_does_not_end(capsys):
  sleeper, failing = (
    subprocess.Popen([sys.executable, "-c", code]) for code in ("import time; time.sleep(999)", "raise SystemExit(5)")
  )
  assert launch._wait([sleeper, failing], 0.1) == 5
  assert sleeper.returncode == -signal.SIGKILL
  assert "launch: process 0 did not end within 0.1 seconds: killed" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("codes", "expected"), [((69, 2), 2), ((2, 69), 2), ((69, 69), 69), ((0, 69), 69), ((0, 0), 0)]
)
def test_the_status_is_that_of_the_first_process_that_failed_by_itself(codes, expected):
  line = "import sys, time; time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"
  processes = [
    subprocess.Popen([sys.executable, "-S", "-c", line, str(place / 2), str(code)]) for place, code in enumerate(codes)
  ]
  assert launch._wait(processes, 60) == expected


def test_a_lost_process_is_told_from_a_mistake(monkeypatch):
  gloo = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:41")
  wrapped = ValueError("a checkpoint could not be saved")
  wrapped.__cause__ = gloo
  storage = ValueError("UNAVAILABLE: the storage did not answer")
  cases = [(gloo, True), (wrapped, True), (PeerError("gone"), True), (storage, False), (KeyError("Glue"), False)]
  assert not any(cli.lost_peer(error) for error, _ in cases)  # one process has no peer to lose
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  assert [cli.lost_peer(error) for error, _ in cases] == [lost for _, lost in cases]


def test_paths_of_the_documented_commands_exist():
  commands = (ROOT / "docs" / "pods.md").read_text()
  for path in set(re.findall(r"(?:experiments|configs)/\w+\.py", commands)):
    assert pathlib.Path(ROOT / path).is_file(), path


@pytest.mark.slow
def test_a_language_models_states_are_the_same_on_one_process_and_on_two(tmp_path):
  # Evaluated in one stream, so on one device per process; checkpointed in the middle of epochs.
  text = [
    TRAIN[0],
    f"--config={ROOT}/configs/pydoc.py:pydoc,lstm_32,smoke",
    "--config.train.epochs=6",
    "--config.train.checkpoint_every=7",
    "--config.evaluate.batch_size=1",
    "--config.generations=0",
  ]

  def one(workdir):
    return [sys.executable, *text, f"--workdir={workdir}", "--devices=2"]

  def two(workdir):
    launched = [sys.executable, LAUNCH, "--processes=2", "--"]
    return [*launched, *text, f"--workdir={workdir}"]

  def compare(workdir):
    own, _ = storage.load(epath.Path(workdir) / "gen_0")
    expected, _ = storage.load(epath.Path(tmp_path / "one") / "gen_0")
    for path, leaf in trees.leaves(own.params).items():
      np.testing.assert_allclose(leaf, trees.leaves(expected.params)[path], rtol=1e-3, atol=1e-3, err_msg=path)
    assert own.metrics["test_count"] == expected.metrics["test_count"]
    assert own.metrics["test_perplexity"] == pytest.approx(expected.metrics["test_perplexity"], rel=1e-3)

  finish(one(tmp_path / "one"))
  finish(two(tmp_path / "two"))
  compare(tmp_path / "two")
  # A checkpoint of two processes holds the states of both: one process resumes it and ends with the same result.
  interrupt(two(tmp_path / "changed"), tmp_path / "changed", signal.SIGKILL, victim=1)
  assert not (tmp_path / "changed" / "gen_0" / "manifest.json").exists()
  finish(one(tmp_path / "changed"))
  compare(tmp_path / "changed")


def met(arguments):
  """Runs connected processes, each with its own arguments; returns (status, messages) of each.

  Their number, ids, coordinator address and a --peer_timeout are appended to the arguments.
  """
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  shared = [f"--coordinator_address={address}", f"--num_processes={len(arguments)}", "--peer_timeout=10"]
  processes = [
    subprocess.Popen(
      [*own, *shared, f"--process_id={place}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for place, own in enumerate(arguments)
  ]
  messages = [process.communicate(timeout=PATIENCE)[1] for process in processes]
  return [(process.returncode, message) for process, message in zip(processes, messages, strict=True)]


@pytest.mark.slow
def test_processes_that_were_given_different_runs_are_refused_by_name(tmp_path):
  for status, messages in met([alone(tmp_path / "run", 1, f"--config.seed={seed}") for seed in (0, 1)]):
    assert status == 2, messages
    assert "error: the processes of this run differ in: seed; give all of them the same" in messages
  assert not (tmp_path / "run" / "gen_0").exists()


@pytest.mark.slow
def test_processes_that_do_not_share_the_workdir_are_refused(tmp_path):
  # Like a local path on each of two machines; if resumed, the one with a finished generation would wait forever.
  runs = [tmp_path / name for name in ("first", "second")]
  for place, (status, messages) in enumerate(met([alone(run, 1) for run in runs])):
    assert status == 2, messages
    assert f"error: the processes do not see the same workdir {runs[place]}" in messages
    assert "give all of them one directory of a file system that they share, or a bucket (gs://...)" in messages
    assert "Traceback" not in messages
    assert not (runs[place] / "gen_0").exists()

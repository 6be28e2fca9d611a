"""Faults, produced for real: damaged files, full disks, signals, a second process, numbers that are not finite."""

import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import ends
import forks
import jax
import numpy as np
import pytest
from conftest import ROOT, TRAIN, config
from etils import epath

import ban_jax
from ban_jax import data, preemption, processes, report, resolving, storage, train, trees
from ban_jax import job as job_lib
from ban_jax.data import tfds_files
from ban_jax.errors import CheckpointError, ConfigError, InUseError, Preempted, StorageError, TrainingError
from ban_jax.storage import finished, lock
from ban_jax.storage.steps import TRASH
from experiments import results

QUIET = {"progress": False}
COMMAND = [
  *TRAIN,
  *("--config.generations=0", "--config.train.evaluate_every=0", "--config.train.checkpoint_every=3"),
]
PLAIN = {"train__evaluate_every": 0, "train__checkpoint_every": 3}


def with_one_cache(command):
  """Returns a command whose process, started anew, finds what the tests compiled."""
  return [command[0], str(ROOT / "tests" / "one_cache.py"), *command[1:]]


def start(workdir, *flags, command=COMMAND):
  return subprocess.Popen(
    [*with_one_cache(command), f"--workdir={workdir}", *flags],
    cwd="/",
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process):
  out, err = process.communicate(timeout=300)
  return process.returncode, out, err


def run(workdir, *flags, command=COMMAND):
  done = forks.run([*command, f"--workdir={workdir}", *flags], cwd="/")
  return done.returncode, done.stdout, done.stderr


def wait_until(condition, process):
  deadline = time.monotonic() + 200
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.005)


def steps_of(workdir, generation=0):
  return sorted(int(path.name) for path in workdir.glob(f"gen_{generation}/steps/[0-9]*") if path.name.isdigit())


def digest_of(workdir, generation=0):
  return json.loads((workdir / f"gen_{generation}" / "manifest.json").read_text())["digest"]


def interrupted(*_):
  raise KeyboardInterrupt


def leave_unfinished(workdir, cfg):
  """Trains generation 0 to the end, without writing its final files; returns its directory."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, cfg, workdir=workdir, **QUIET)
  return workdir / "gen_0"


@pytest.fixture(scope="module")
def whole():
  """The digest of generation 0, trained in one go in this process."""
  return trees.digest(ban_jax.train_generation(None, config(**PLAIN), **QUIET).params)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
  """A generation with checkpoints of steps 6 and 9 and without final files."""
  return leave_unfinished(tmp_path_factory.mktemp("unfinished"), config(**PLAIN)).parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  """The workdir of a run of two generations by the command line."""
  workdir = tmp_path_factory.mktemp("undisturbed") / "run"
  status, _, err = run(workdir, "--config.generations=1")
  assert status == 0, err
  return workdir


# --- bad disks -----------------------------------------------------------------------------------------------------


def data_files(step):
  files = [path for path in (step / "state").rglob("*") if path.is_file() and path.parent.name == "d"]
  assert files
  return files


def truncate(step):
  for path in data_files(step):
    os.truncate(path, path.stat().st_size // 2)


def remove(step):
  shutil.rmtree(step / "state")


def remove_metadata(step):
  # What remains fails to restore in the same way as a tree of another structure.
  (step / "state" / "_METADATA").unlink()


def flip_a_byte(step):
  # In the middle of the largest file, inside the arrays: Orbax does not notice it.
  flip_a_byte_below(step / "state")


def flip_a_byte_below(folder):
  files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
  path = max(files, key=lambda file: file.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def alter_the_record(step):
  (path,) = [path for path in (step / "meta").rglob("*") if path.is_file() and '"sums"' in path.read_text("latin-1")]
  content = path.read_text()
  assert '"errors": ' in content
  path.write_text(content.replace('"errors": ', '"errors": 1'))


@pytest.mark.parametrize("damage", [truncate, remove, remove_metadata, flip_a_byte, alter_the_record])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(damage, unfinished, whole, tmp_path, caplog):
  workdir = shutil.copytree(unfinished, tmp_path / "run")
  assert steps_of(workdir) == [6, 9]
  damage(workdir / "gen_0" / "steps" / "9")
  with pytest.MonkeyPatch.context() as patch:
    dispatched = replaced_step(patch, lambda state: state)
    resumed = ban_jax.train_generation(None, config(**PLAIN), workdir=workdir, **QUIET)
  assert dispatched == [7, 8, 9, 10]  # the steps after the checkpoint of step 6
  # Only this package's records: asyncio may log Orbax's other reads, with the path of this test in them.
  own = [record for record in caplog.records if record.name.startswith("ban_jax")]
  (message,) = [record.getMessage() for record in own if "damaged" in record.getMessage()]
  assert message.startswith(f"checkpoint {workdir}/gen_0/steps/9 is damaged (")
  assert f"moved to {workdir}/gen_0/damaged/9; resuming from the one before it" in message
  assert trees.digest(resumed.params) == whole == digest_of(workdir)
  assert [row["epoch"] for row in resumed.history] == [1, 2]
  assert not (workdir / "gen_0" / "damaged").exists()  # not needed after the generation is finished


def test_what_is_saved_is_what_the_record_held_then(tmp_path):
  # Orbax writes in the background while the training adds rows to the history.
  tree = {"a": np.arange(10.0)}
  for number in range(5):
    history = []
    with storage.open_steps(epath.Path(tmp_path) / str(number)) as manager:
      storage.save_step(manager, 1, tree, {"history": history})
      history.append({"epoch": 1})
      manager.wait_until_finished()
      assert storage.restore_newest(manager, tree)[1] == {"history": []}


def test_another_versions_checkpoints_are_refused_and_cost_nothing(unfinished, tmp_path):
  workdir = shutil.copytree(unfinished, tmp_path / "run")
  with pytest.MonkeyPatch.context() as patch:
    initial = train.initial

    def with_other_dtypes(job):  # which Orbax would cast and restore without a warning
      state, carry = initial(job)
      return state._replace(opt_state=jax.tree.map(np.float16, state.opt_state)), carry

    patch.setattr(train, "initial", with_other_dtypes)
    with pytest.raises(CheckpointError, match="gen_0/steps/9 holds a tree of another structure, .*go on with that ver"):
      ban_jax.train_generation(None, config(**PLAIN), workdir=workdir, **QUIET)
  assert steps_of(workdir) == [6, 9]
  assert not (workdir / "gen_0" / "damaged").exists()


def test_a_disk_that_cannot_be_read_at_the_moment_costs_no_checkpoint(unfinished, tmp_path):
  import orbax.checkpoint as ocp

  def busy(*_, **__):
    raise OSError(5, "server busy")

  workdir = shutil.copytree(unfinished, tmp_path / "run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, "restore", busy)
    with pytest.raises(StorageError, match="gen_0 cannot be read or written: .*server busy"):
      ban_jax.train_generation(None, config(**PLAIN), workdir=workdir, **QUIET)
  assert steps_of(workdir) == [6, 9]


@pytest.mark.parametrize("what", ["manifest.json", "history.jsonl", "params"])
def test_a_finished_generation_that_cannot_be_read_at_the_moment_is_not_called_damaged(what, tmp_path):
  import orbax.checkpoint as ocp

  cfg = config(train__epochs=1, **PLAIN)
  ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  path_class, read = type(epath.Path(tmp_path)), type(epath.Path(tmp_path)).read_bytes

  def busy(path, *_, **__):
    if not isinstance(path, epath.Path) or path.name == what:
      raise OSError(5, "Input/output error")
    return read(path)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(path_class, "read_bytes", busy)
    if what == "params":
      patch.setattr(ocp.StandardCheckpointer, "restore", busy)
    with pytest.raises(StorageError, match="gen_0 cannot be read or written: .*Input/output error") as raised:
      ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  assert "damaged" not in str(raised.value)
  assert ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET).index == 0


def test_replaced_checkpoints_do_not_fill_the_disk(tmp_path):
  tree = {"a": np.arange(1000.0)}
  with storage.open_steps(epath.Path(tmp_path) / "steps") as manager:
    for step in range(1, 9):
      storage.save_step(manager, step, tree, {})
  assert sorted(path.name for path in (tmp_path / "steps").iterdir() if path.name.isdigit()) == ["7", "8"]
  assert len(list((tmp_path / "steps" / TRASH).iterdir())) <= 1


def test_with_all_checkpoints_damaged_a_generation_begins_again(unfinished, whole, tmp_path, caplog):
  workdir = shutil.copytree(unfinished, tmp_path / "run")
  for step in (6, 9):
    truncate(workdir / "gen_0" / "steps" / str(step))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, config(**PLAIN), workdir=workdir, **QUIET)
  assert len([record for record in caplog.records if "is damaged" in record.getMessage()]) == 2
  assert sorted(path.name for path in (workdir / "gen_0" / "damaged").iterdir()) == ["6", "9"]
  resumed = ban_jax.train_generation(None, config(**PLAIN), workdir=workdir, **QUIET)
  assert trees.digest(resumed.params) == whole


@pytest.mark.parametrize("damage", [truncate, flip_a_byte])
def test_damaged_final_params_neither_teach_nor_are_evaluated(damage, tmp_path):
  cfg = config(train__epochs=1, generations=1, **PLAIN)
  ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  shutil.copytree(tmp_path / "gen_0" / "params", tmp_path / "copy" / "state")  # named as in a checkpoint
  damage(tmp_path / "copy")
  shutil.rmtree(tmp_path / "gen_0" / "params")
  shutil.copytree(tmp_path / "copy" / "state", tmp_path / "gen_0" / "params")
  with pytest.raises(CheckpointError, match=rf"{tmp_path}/gen_0.* is damaged.*remove .*gen_0 to train it again"):
    ban_jax.run(cfg, tmp_path, **QUIET)
  assert not (tmp_path / "gen_1").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_other_data_are_refused_by_name(finished, unfinished, tmp_path):
  cfg = config(**PLAIN)
  workdir = tmp_path / "run"
  if finished:
    ban_jax.train_generation(None, cfg, workdir=workdir, **QUIET)
  else:
    shutil.copytree(unfinished, workdir)
  dataset = data.load(cfg.data)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "load", lambda group: dataset._replace(digest="0" * 64))
    with pytest.raises(
      CheckpointError, match=f"gen_0 holds a generation of another origin .dataset: {dataset.digest} there, 0000.* here"
    ):
      ban_jax.train_generation(None, cfg, workdir=workdir, **QUIET)
  assert finished or steps_of(workdir) == [6, 9]


@pytest.mark.skipif(
  importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed: it would ask the network"
)
def test_a_bucket_that_cannot_be_reached_is_answered_with_what_to_install():
  with pytest.raises(ConfigError, match=r"gs://bucket/run: Please install gcsfs .*pip install 'etils\[epath-gcs\]'"):
    ban_jax.train_generation(None, config(**PLAIN), workdir="gs://bucket/run", **QUIET)


def test_altered_results_are_noticed(tmp_path):
  cfg = config(train__epochs=1, **PLAIN)
  ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  metrics = tmp_path / "gen_0" / "metrics.json"
  metrics.write_text(metrics.read_text().replace('"test_error": ', '"test_error": 1'))
  with pytest.raises(CheckpointError, match="gen_0/metrics.json or history.jsonl was changed"):
    ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)


def namespace_allowed():
  if shutil.which("unshare") is None:
    return False
  script = "mount -t tmpfs -o size=1m none /mnt"
  return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, check=False).returncode == 0


# $1 is the mount point, the rest the command. The disk is at first too small for a later checkpoint, then larger; the
# output and files of the first run are copied next to it.
FULL_DISK = r"""
disk=$1; shift
mount -t tmpfs -o size=1600k none "$disk" || exit 99
"$@" > "$disk.out1" 2> "$disk.err1"; echo $? > "$disk.status1"
ls "$disk"/run/gen_0/steps > "$disk.steps1"; ls "$disk"/run/gen_0 > "$disk.files1"
# The disk is completely full: the next start cannot even write its record.
cat /dev/zero > "$disk/filler" 2> /dev/null
"$@" > "$disk.out_full" 2> "$disk.err_full"; echo $? > "$disk.status_full"
ls "$disk"/run/gen_0/steps > "$disk.steps_full"
rm "$disk/filler"; mount -o remount,size=200m "$disk" || exit 99
"$@" > "$disk.out2" 2> "$disk.err2"; echo $? > "$disk.status2"
cp "$disk"/run/gen_0/manifest.json "$disk.manifest"
"""


@pytest.mark.slow
@pytest.mark.skipif(not namespace_allowed(), reason="no mount namespaces here (unshare -rm), so no small disk to fill")
def test_a_full_disk_ends_with_an_error_and_the_run_goes_on_once_there_is_room(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  wide = "--config.model.units=1024"  # a checkpoint of 0.6 MB
  command = [*with_one_cache(COMMAND), f"--workdir={disk}/run", "--config.train.checkpoint_every=1", wide]
  done = subprocess.run(
    ["unshare", "-rm", "bash", "-c", FULL_DISK, "full", str(disk), *command],
    capture_output=True, text=True, timeout=300, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  read = lambda name: pathlib.Path(f"{disk}.{name}").read_text()  # noqa: E731
  assert read("status1") == "74\n", read("err1")
  assert f"error: {disk}/run/gen_0 cannot be read or written: " in read("err1")
  assert "the checkpoints before are intact, and the same command resumes from them" in read("err1")
  assert read("err1").count("error: ") == 1  # Orbax's other threads may print of their own after it
  assert any(line.isdigit() for line in read("steps1").splitlines())
  assert "manifest.json" not in read("files1")
  assert read("status_full") == "74\n", read("err_full")
  assert read("err_full").startswith(f"error: {disk}/run cannot be read or written: ")
  assert read("err_full").count("\n") == 1
  assert read("steps_full") == read("steps1")
  assert read("status2") == "0\n", read("err2")
  assert run(tmp_path / "whole", wide)[0] == 0
  assert json.loads(read("manifest"))["digest"] == digest_of(tmp_path / "whole")


# Writes more scalars than the file's buffer holds, so that writing them fails on the full disk.
EVENTS = """
import pathlib
from ban_jax import report, storage
from experiments import cli

def main():
  with storage.storage_errors(pathlib.Path(DISK)), report.tensorboard(pathlib.Path(DISK)) as write:
    for step in range(1000):
      write(step, {f"metric_{number}": 0.5 for number in range(500)})

cli.run(main)
"""


@pytest.mark.skipif(not namespace_allowed(), reason="no mount namespaces here (unshare -rm), so no small disk to fill")
def test_a_disk_that_events_fill_ends_the_run_and_nothing_is_printed_after_the_message(tmp_path):
  script = 'mount -t tmpfs -o size=300k none "$1" && exec "$2" -c "$3"'
  code = EVENTS.replace("DISK", repr(str(tmp_path)))
  done = subprocess.run(
    ["unshare", "-rm", "bash", "-c", script, "full", tmp_path, sys.executable, code],
    capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
  )  # fmt: skip
  assert done.returncode == 74, done.stderr
  assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path} cannot be read or written: [Errno 28] No space")
  assert "Traceback" not in done.stderr


# --- signals, and a second process ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_and_a_second_process_is_refused_meanwhile(tmp_path):
  flags = ("--config.train.epochs=30", "--config.train.checkpoint_every=7")
  process = start(tmp_path / "run", *flags)
  wait_until(lambda: steps_of(tmp_path / "run"), process)

  process.send_signal(signal.SIGSTOP)  # stopped in the middle of its training while the other one starts
  status, out, err = run(tmp_path / "run", *flags)
  assert status == 2
  assert err.startswith(f"error: workdir {tmp_path}/run is in use by process {process.pid} on ")
  assert "wait until it ends, or give another workdir" in err
  assert not out

  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGCONT)
  status, out, err = finish(process)
  assert status == Preempted.exit_status == 75
  assert "error: asked to end by SIGTERM or Ctrl-C: generation 0 is saved at step " in err
  assert not out
  saved = steps_of(tmp_path / "run")[-1]
  assert f"saved at step {saved} of 150. Rerun the command to resume" in err
  assert not (tmp_path / "run" / "gen_0" / "manifest.json").exists()

  status, _, err = run(tmp_path / "run", *flags)
  assert status == 0, err
  assert f"step {saved + 1}/" in err or "step 150/150" in err
  assert run(tmp_path / "undisturbed", *flags)[0] == 0
  assert digest_of(tmp_path / "run") == digest_of(tmp_path / "undisturbed")


def test_a_signal_that_comes_after_the_last_step_is_handed_on():
  received = []
  before = signal.signal(signal.SIGTERM, lambda *_: received.append("outer"))
  try:
    with preemption.watch(saves=True) as requested:
      assert not requested()
      signal.raise_signal(signal.SIGTERM)
      assert not received
    assert received == ["outer"]
    with preemption.watch(saves=True) as requested:
      signal.raise_signal(signal.SIGTERM)
      assert requested()
    assert received == ["outer"]
  finally:
    signal.signal(signal.SIGTERM, before)


def test_a_signal_at_the_last_step_lets_the_generation_finish_and_then_ends_the_run(tmp_path):
  cfg = config(train__epochs=1, generations=1, **PLAIN)  # five steps

  def at_the_last(state):
    if int(state.step) == 4:
      signal.raise_signal(signal.SIGTERM)
    return state

  with pytest.MonkeyPatch.context() as patch:
    dispatched = replaced_step(patch, at_the_last)
    with pytest.raises(Preempted, match="generation 0 is finished. Rerun the command to resume"):
      ban_jax.run(cfg, tmp_path, **QUIET)
  assert dispatched == [1, 2, 3, 4, 5]
  assert (tmp_path / "gen_0" / "manifest.json").exists()
  assert not (tmp_path / "gen_1").exists()


def history_of(workdir, generation):
  rows = (workdir / f"gen_{generation}" / "history.jsonl").read_text().splitlines()
  return [{**json.loads(row), "seconds": 0} for row in rows]


# Where a run ends (tests/ends.py), how many generations are finished by then, and the steps that may be saved of the
# next.
PLACES = {
  "config.json": (0, ([],)),
  "gen_0": (0, ([3],)),
  "save": (0, ([3], [3, 6])),
  "metrics.json": (0, ([6, 9],)),
  "manifest.json": (0, ([6, 9],)),
  "between": (1, ([],)),
  "gen_1": (1, ([3],)),
}


def no_room():
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# How it ends, beside SIGKILL: what happens there, and the error that the caller gets.
WAYS = {
  "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), (Preempted, SystemExit)),
  "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), (Preempted, KeyboardInterrupt)),
  "ENOSPC": (no_room, (StorageError, CheckpointError)),
}


def assert_left_as_alone(workdir, done, undisturbed):
  for generation in range(done + 1):
    assert digest_of(workdir, generation) == digest_of(undisturbed, generation)
    assert history_of(workdir, generation) == history_of(undisturbed, generation)
    assert not (workdir / f"gen_{generation}" / "steps").exists()


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_ends_with_the_bytes_and_the_history_of_one_left_alone(place, undisturbed, tmp_path):
  workdir, (done, saved) = tmp_path / "run", PLACES[place]
  flags = ["--config.generations=1"] if done else []
  killing = [sys.executable, str(ROOT / "tests" / "ends.py"), place]
  killed = forks.run([*killing, *COMMAND[1:], f"--workdir={workdir}", *flags], cwd="/")
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  manifests = [(workdir / f"gen_{generation}" / "manifest.json").exists() for generation in range(done + 1)]
  assert manifests == [True] * done + [False]
  assert steps_of(workdir, done) in saved
  assert place != "between" or steps_of(workdir)  # the next start removes them
  status, _, err = run(workdir, *flags)
  assert status == 0, err
  assert_left_as_alone(workdir, done, undisturbed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_asked_to_end_or_finds_no_room_does_so_too(place, way, undisturbed, tmp_path):
  done, (end, errors) = PLACES[place][0], WAYS[way]
  cfg, given = config(generations=done, **PLAIN), {"devices": jax.devices()[:2], **QUIET}

  def terminated(*_):  # as experiments/cli.py
    raise SystemExit(Preempted.exit_status)

  before = signal.signal(signal.SIGTERM, terminated), signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with pytest.MonkeyPatch.context() as patch:
      ends.install(place, end, patch.setattr)
      with pytest.raises(errors) as raised:
        ban_jax.run(cfg, tmp_path, **given)
  finally:
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
      signal.signal(number, handler)
  if place in ("gen_0", "save", "gen_1") and way != "ENOSPC":  # in the middle of a generation
    assert "is saved at step" in str(raised.value)
  elif way == "ENOSPC":
    assert "No space left on device" in str(raised.value)
  ban_jax.run(cfg, tmp_path, **given)
  assert_left_as_alone(tmp_path, done, undisturbed)


def test_a_thread_beside_is_refused_and_the_same_thread_is_not(tmp_path):
  path, refused = epath.Path(tmp_path), []

  def second():
    try:
      with lock.hold(path):
        pass
    except CheckpointError as error:
      refused.append(str(error))

  with lock.hold(path), lock.hold(path):
    beside = threading.Thread(target=second)
    beside.start()
    beside.join()
  assert refused == [f"workdir {tmp_path} is in use by another thread of this process; wait until it ends, or give "
                     "another workdir"]  # fmt: skip
  beside = threading.Thread(target=second)
  beside.start()
  beside.join()
  assert len(refused) == 1


def test_a_run_is_held_while_its_ensembles_are_evaluated(tmp_path):
  refused = []

  def beside():
    with pytest.raises(InUseError, match=f"workdir {tmp_path}/run is in use by another thread"):
      lock.hold(epath.Path(tmp_path / "run")).__enter__()
    refused.append(True)

  def evaluate(*given, **options):
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    return real(*given, **options)

  real = ban_jax.evaluate
  cfg = config(train__epochs=1, generations=2, **PLAIN)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ban_jax, "evaluate", evaluate)
    rows, there = results.evaluate_run(cfg, tmp_path / "run", devices=jax.devices(), progress=False)
  assert refused == [True]  # only Ens*2 is evaluated; networks are evaluated when their training ends
  assert list(rows) == ["teacher", "BAN-1", "BAN-2", "Ens*2"]
  assert not there


def test_a_configuration_that_cannot_be_run_leaves_no_directory(tmp_path):
  with pytest.raises(ConfigError, match="train.epochs=0: expected a whole number of at least 1"):
    results.evaluate_run(config(train__epochs=0), tmp_path / "run", devices=jax.devices(), progress=False)
  assert not list(tmp_path.iterdir())


def test_a_bucket_is_used_without_a_lock_and_a_warning_says_so(caplog):
  with lock.hold(epath.Path("gs://bucket/run")):
    pass
  (record,) = caplog.records
  assert record.getMessage() == (
    "workdir gs://bucket/run: object stores have no locks; make sure that no other process runs on it"
  )


WITHOUT_LOCKS = [None, *sorted({errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})]


@pytest.fixture(params=WITHOUT_LOCKS, ids=lambda code: errno.errorcode.get(code, "no module"))
def without_locks(request, monkeypatch):
  """A system without locks, or a file system that says in one of several ways that it has none."""

  def refuse(*_):
    raise OSError(request.param, os.strerror(request.param))

  if request.param is None:
    monkeypatch.setattr(processes, "fcntl", None)
  else:
    monkeypatch.setattr(processes.fcntl, "flock", refuse)


def test_a_file_system_without_locks_is_used_and_a_warning_says_so(without_locks, caplog, tmp_path):
  with storage.open_workdir(tmp_path / "run", {}) as held:
    assert (held / "config.json").exists()
  with tfds_files.lock(tmp_path, "cifar10"):
    pass
  assert caplog.messages == [
    f"workdir {tmp_path}/run: its file system has no locks; make sure that no other process runs on it",
    f"cifar10: the file system of {tmp_path} has no locks; make sure that no other process prepares it",
  ]


def test_a_lock_that_fails_otherwise_is_an_error(monkeypatch, tmp_path):
  monkeypatch.setattr(processes.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
  with pytest.raises(CheckpointError, match="cannot be written: .*broken"), storage.open_workdir(tmp_path, {}):
    pass


class Writes:
  """A stream of a notebook's or a daemon's wrapper: it takes text and knows nothing else."""

  def __init__(self):
    self.text = ""

  def write(self, text):
    self.text += text


class Unread(io.StringIO):
  def write(self, text):
    raise BrokenPipeError(errno.EPIPE, "nobody reads")


def closed():
  stream = io.StringIO()
  stream.close()
  return stream


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("stream", [lambda: None, Writes, Unread, closed, object], ids=lambda make: make.__name__)
def test_a_stream_that_cannot_show_progress_ends_no_training(stream, enabled, monkeypatch, capsys):
  stream = stream()
  monkeypatch.setattr(sys, "stderr", stream)
  monkeypatch.setattr(report, "PLAIN_INTERVAL", 0)
  bar = report.Progress("generation 0", 10, 0, enabled)
  for _ in range(10):
    bar.advance(1)
  bar.note(error=1.0)
  bar.close()
  assert capsys.readouterr().out == ""
  if isinstance(stream, Writes):
    assert ("generation 0: step 10/10" in stream.text) == enabled


@pytest.mark.parametrize("package", finished.PACKAGES)
def test_a_package_that_python_does_not_know_of_hinders_no_training(package, monkeypatch):
  version = importlib.metadata.version

  def known(name):
    if name == package:
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, "version", known)
  found = finished.provenance.__wrapped__()["packages"]
  assert found[package] is None
  assert sum(one is None for one in found.values()) == 1


# --- bad numbers ---------------------------------------------------------------------------------------------------


def replaced_step(patch, before):
  """Makes the trainer call `before(state)`, which may change it, ahead of every step; returns the steps dispatched."""
  dispatched = []

  def make(**arguments):
    step = real(**arguments)

    def changed(state, *given):
      dispatched.append(1 + int(state.step))
      return step.run(before(state), *given)

    return step._replace(run=changed)

  real = train.make_train_step
  patch.setattr(train, "make_train_step", make)
  return dispatched


def test_a_nan_in_the_data_stops_the_run_within_a_few_steps_and_names_the_step(tmp_path):
  cfg = config(train__epochs=6, **(PLAIN | {"train__checkpoint_every": 2}))
  dataset = data.load(cfg.data)
  # One of 100 images is NaN; the generation's order determines the first step that uses it.
  job = job_lib.prepare(resolving.resolve(cfg, None), None, None)
  order_key = jax.random.fold_in(jax.random.fold_in(job.key, train.ORDER), 0)
  bad = 4
  images = dataset.splits["train"]["images"].astype(np.float32)
  images[dataset.train_order(order_key, cfg.train.batch_size)[bad - 1][0]] = np.nan
  broken = dataset._replace(splits={**dataset.splits, "train": {**dataset.splits["train"], "images": images}})
  with pytest.MonkeyPatch.context() as patch:
    dispatched = replaced_step(patch, lambda state: state)
    patch.setattr(data, "load", lambda group: broken)
    with pytest.raises(
      TrainingError,
      match=f"generation 0 diverged in epoch 1 at step {bad}: its training loss, nan, .* of step 2 is kept",
    ):
      ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  assert dispatched[-1] <= bad + train.IN_FLIGHT
  assert steps_of(tmp_path) == [2]
  assert not (tmp_path / "gen_0" / "manifest.json").exists()


def test_parameters_that_are_not_finite_stop_a_run_whose_loss_still_is(whole, tmp_path):
  # The first steps are good and checkpointed; then the momentum becomes infinite, as after an overflow.
  cfg = config(**PLAIN)

  def poisoned(state):
    overflow = int(state.step) == 7
    return state._replace(opt_state=jax.tree.map(lambda leaf: leaf * np.inf, state.opt_state)) if overflow else state

  with pytest.MonkeyPatch.context() as patch:
    replaced_step(patch, poisoned)
    with pytest.raises(
      TrainingError,
      match="diverged in epoch 2 at step 8: its parameters or batch statistics are not finite; .* of step 6 is kept",
    ):
      ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  assert steps_of(tmp_path) == [3, 6]
  assert not (tmp_path / "gen_0" / "manifest.json").exists()
  assert trees.digest(ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET).params) == whole


def test_the_command_line_tells_divergence_by_its_status(tmp_path):
  status, out, err = run(tmp_path / "run", "--config.optim.learning_rate=1e30")
  assert status == TrainingError.exit_status == 3
  assert err.splitlines()[-1].startswith("error: generation 0 diverged in epoch 1 at step ")
  assert "Traceback" not in err
  assert not out
  assert not (tmp_path / "run" / "gen_0" / "manifest.json").exists()


# --- what the command line says, and leaves ------------------------------------------------------------------------


def contents(folder):
  """Returns the bytes of every file except the lock, which every start rewrites."""
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def one_generation(folder):
  """Leaves a finished generation 0 of one epoch; returns its directory and its command."""
  cfg = config(train__epochs=1, generations=0, **PLAIN)
  ban_jax.train_generation(None, cfg, workdir=folder / "run", **QUIET)
  return folder / "run" / "gen_0", [*COMMAND, "--config.train.epochs=1"]


def with_damaged_params(folder, _):
  directory, command = one_generation(folder)
  flip_a_byte_below(directory / "params")
  return command, "run/gen_0/params is damaged: its digest is not the manifest's; remove "


def with_altered_metrics(folder, _):
  directory, command = one_generation(folder)
  metrics = directory / "metrics.json"
  metrics.write_text(metrics.read_text().replace('"test_error": ', '"test_error": 1'))
  return command, "run/gen_0/metrics.json or history.jsonl was changed: their digest is not the manifest's; remove "


def with_a_swapped_teacher(folder, undisturbed):
  # The same configuration on another number of devices: only the bytes differ.
  shutil.copytree(undisturbed, folder / "run")
  ban_jax.train_generation(None, config(**PLAIN), workdir=folder / "other", **QUIET)
  own, other = digest_of(folder / "run"), digest_of(folder / "other")
  assert own != other
  shutil.rmtree(folder / "run" / "gen_0")
  (folder / "other" / "gen_0").rename(folder / "run" / "gen_0")
  message = (
    f"run/gen_1 holds a generation of another origin (teachers: ['{own}'] there, ['{other}'] here); give another"
  )
  return [*COMMAND, "--config.generations=1"], message


def with_another_word(folder, _):
  generator, words = np.random.default_rng(0), np.array(["the", "cat", "sat", "on", "a", "mat"])
  for split, lines in (("train", 200), ("valid", 40), ("test", 40)):
    text = "\n".join(" ".join(generator.choice(words, 9)) for _ in range(lines))
    (folder / f"ptb.{split}.txt").write_text(f"the cat sat on a mat\n{text}\n")
  command = [*COMMAND[:2], f"--config={ROOT}/configs/ptb.py:ptb,lstm_32,smoke", f"--config.data.dir={folder}"]
  command += ["--config.data.train_examples=0", "--config.train.epochs=1", "--config.generations=0"]
  assert run(folder / "run", command=command)[0] == 0
  train_text = folder / "ptb.train.txt"
  train_text.write_text(train_text.read_text().replace("the cat", "the mat", 1))
  return command, "run/gen_0 holds a generation of another origin (dataset: "


@pytest.mark.slow
@pytest.mark.parametrize(
  "prepare", [with_damaged_params, with_altered_metrics, with_a_swapped_teacher, with_another_word]
)
def test_what_the_command_line_refuses_it_leaves_as_it_is(prepare, undisturbed, tmp_path):
  command, message = prepare(tmp_path, undisturbed)
  before = contents(tmp_path)
  status, out, err = run(tmp_path / "run", command=command)
  assert status == 2
  assert err.splitlines()[-1].startswith(f"error: {tmp_path}/{message}")
  assert "Traceback" not in err
  assert not out
  assert contents(tmp_path) == before


def test_the_command_line_refuses_a_workdir_that_cannot_be_written():
  status, out, err = run("/proc/ban_jax")
  assert status == 2
  assert err.startswith("error: workdir /proc/ban_jax cannot be written: ")
  assert err.count("\n") == 1
  assert not out


@pytest.mark.slow
def test_the_command_line_goes_on_from_the_checkpoint_before_a_damaged_one(unfinished, whole, tmp_path):
  workdir = shutil.copytree(unfinished, tmp_path / "run")
  flip_a_byte(workdir / "gen_0" / "steps" / "9")
  status, out, err = run(workdir, "--devices=4")
  assert status == 0, err
  assert f"checkpoint {workdir}/gen_0/steps/9 is damaged (the digest of its arrays is not the one it was saved" in err
  assert "resuming from the one before it" in err
  assert "Traceback" not in err
  assert "| teacher |" in out
  assert digest_of(workdir) == whole
  assert sorted(path.name for path in (workdir / "gen_0").iterdir() if path.is_dir()) == ["params"]

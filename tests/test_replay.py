"""Recorded teachers: what is recorded, who may read it, and that nothing but rounding differs."""

import errno
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import config

import ban_jax
from ban_jax import data, replay, resolving, storage, trees
from ban_jax import job as job_lib
from ban_jax.errors import CheckpointError, ConfigError, StorageError
from configs import pydoc

# Crops, flips, mixed images and dropout: all that is drawn in a step.
AUGMENTED = {"train__epochs": 2, "train__evaluate_every": 0, "data__flip": True, "model__dropout": 0.2}
AUGMENTED |= {"data__augment": ("mixup",), "teacher__weights": (0.8, 0.2)}


def train(teacher, cfg, **options):
  return ban_jax.train_generation(teacher, cfg, devices=jax.devices()[:2], progress=False, **options)


def recordings(root, pattern="*/*/*.npy"):
  return sorted(root.glob(pattern))


@pytest.fixture(scope="module")
def teachers():
  cfg = config(train__epochs=1, train__evaluate_every=0)
  return [train(None, cfg) for cfg in (cfg, config(seed=1, **AUGMENTED))]


@pytest.mark.parametrize(("loss", "count"), [("ban", 1), ("ban_label", 2), ("cwtm", 1), ("dkpp", 2)])
def test_a_replayed_teacher_teaches_what_a_live_one_does(loss, count, teachers, tmp_path):
  members = teachers if count == 2 else teachers[0]  # an ensemble is recorded as its mean
  live, replayed = (
    train(members, config(loss__name=loss, train__replay=replay, **AUGMENTED)) for replay in ("", str(tmp_path))
  )
  for path, leaf in trees.leaves(replayed.params).items():
    np.testing.assert_allclose(leaf, trees.leaves(live.params)[path], rtol=1e-3, atol=1e-4, err_msg=path)
  assert live.history[0]["train_loss"] == pytest.approx(replayed.history[0]["train_loss"], rel=1e-5)
  assert len(recordings(tmp_path)) == 2  # one an epoch


def test_text_is_recorded_with_the_teacher_s_state_carried(tmp_path):
  cfg = pydoc.get_config("pydoc,lstm_32,smoke")
  teacher = train(None, cfg)
  live = train(teacher, cfg)
  cfg.train.replay = str(tmp_path)
  replayed = train(teacher, cfg)
  for path, leaf in trees.leaves(replayed.params).items():
    np.testing.assert_allclose(leaf, trees.leaves(live.params)[path], rtol=1e-3, atol=1e-4, err_msg=path)


def test_students_of_other_losses_share_a_recording_and_other_streams_do_not(teachers, tmp_path):
  def record(**changes):
    train(teachers[0], config(train__replay=str(tmp_path), **{**AUGMENTED, **changes}))
    return len(recordings(tmp_path))

  assert record() == 2
  assert record(loss__name="dkpp") == record(model__dropout=0.0) == 2
  assert record(seed=5) == 4
  assert record(data__flip=False) == 6
  assert record(train__batch_size=12) == 8
  assert record(teacher__view="other") == 10
  assert record(train__epochs=3) == 11  # the third epoch of the first stream


def interrupted(*_):
  raise KeyboardInterrupt


def test_a_killed_replay_ends_with_the_same_bytes(teachers, tmp_path, monkeypatch):
  cfg = config(train__replay=str(tmp_path / "replay"), **AUGMENTED, train__checkpoint_every=3)
  whole = train(teachers[0], cfg)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      train(teachers[0], cfg, workdir=tmp_path / "run")
  with pytest.raises(CheckpointError, match="gen_1 was begun with a recorded teacher, and is now to have a live one"):
    train(teachers[0], config(**AUGMENTED, train__checkpoint_every=3), workdir=tmp_path / "run")
  # In the middle of an epoch, and with a recording that has to be made again.
  assert {path.name for path in (tmp_path / "run" / "gen_1" / "steps").glob("[0-9]*")} == {"6", "9"}
  recordings(tmp_path / "replay")[1].unlink()
  resumed = train(teachers[0], cfg, workdir=tmp_path / "run")
  assert trees.digest(resumed.params) == trees.digest(whole.params)
  manifest = json.loads((tmp_path / "run" / "gen_1" / "manifest.json").read_text())
  assert manifest["layout"]["replayed"] is True


def test_a_damaged_recording_is_named_and_made_again(teachers, tmp_path, caplog):
  cfg = config(train__replay=str(tmp_path), **AUGMENTED)
  first = train(teachers[0], cfg)
  for number, path in enumerate(recordings(tmp_path)):
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:-7] if number else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
  second = train(teachers[0], cfg)
  assert trees.digest(first.params) == trees.digest(second.params)
  named = [record.getMessage() for record in caplog.records if "is damaged" in record.getMessage()]
  assert len(named) == 2
  assert "its digest is not the one it was saved with" in named[0]
  third = train(teachers[0], cfg)  # whole again
  assert trees.digest(third.params) == trees.digest(first.params)
  assert len([record for record in caplog.records if "is damaged" in record.getMessage()]) == 2


def test_recordings_keep_to_their_bound(teachers, tmp_path, caplog):
  cfg = config(train__replay=str(tmp_path), **AUGMENTED)
  size = 4 * 100 * 10 / 2**30  # an epoch's
  cfg.train.replay_gib = 1.5 * size
  bounded = train(teachers[0], cfg)
  assert len(recordings(tmp_path)) == 1
  (message,) = [r.getMessage() for r in caplog.records if "train.replay_gib" in r.getMessage()]
  assert message.endswith("further epochs are computed anew for each student")
  cfg.train.replay_gib = 16.0
  assert trees.digest(train(teachers[0], cfg).params) == trees.digest(bounded.params)
  cfg.train.replay_gib = 0.5 * size
  with pytest.raises(ConfigError, match="train.replay: an epoch's logits take 0.0 GiB, more than train.replay_gib"):
    train(teachers[0], cfg)


def test_a_teacher_that_is_not_heard_is_not_recorded(teachers, tmp_path):
  cfg = config(loss__name="label", train__replay=str(tmp_path), **AUGMENTED)
  setup = resolving.resolve(cfg, None)
  assert job_lib.prepare(setup, teachers[0], 1).teacher.recorded is None
  assert job_lib.prepare(setup, None, 0).teacher.recorded is None
  assert data.load(cfg.data).sizes["train"] == 100


RACE = """
import sys
from etils import epath
from ban_jax import storage
path = epath.Path(sys.argv[1]) / "epoch_00000.npy"
content = bytes([int(sys.argv[2])]) * 2_000_000
for _ in range(50):
  storage.write_bytes(path, content)
  found = path.read_bytes()
  assert len(found) == len(content) and len(set(found[:1] + found[-1:])) == 1, "torn"
"""


def test_several_processes_that_write_one_recording_do_not_meet(tmp_path):
  command = [sys.executable, "-c", RACE, str(tmp_path)]
  both = [subprocess.Popen([*command, number], stderr=subprocess.PIPE, text=True) for number in "12"]
  for process in both:
    assert process.wait() == 0, process.stderr.read()
  assert [path.name for path in tmp_path.iterdir()] == ["epoch_00000.npy"]


def test_a_recording_that_another_process_makes_meanwhile_is_the_one_that_is_used(teachers, tmp_path, monkeypatch):
  cfg = config(train__replay=str(tmp_path), **AUGMENTED)
  whole = train(teachers[0], cfg)
  before = [path.stat().st_mtime_ns for path in recordings(tmp_path)]
  real, asked = replay._read, []

  def late(job, path, **options):  # the first time it is asked for an epoch, there is none yet
    asked.append(path)
    return None if asked.count(path) == 1 else real(job, path, **options)

  monkeypatch.setattr(replay, "_read", late)
  assert trees.digest(train(teachers[0], cfg).params) == trees.digest(whole.params)
  assert [path.stat().st_mtime_ns for path in recordings(tmp_path)] == before


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(teachers, tmp_path):
  cfg = config(train__replay=str(tmp_path), **AUGMENTED)
  train(teachers[0], cfg)
  (folder,) = tmp_path.glob("*/*")
  old, new = folder / ".old.partial", folder / ".new.partial"
  for path in (old, new):
    path.write_bytes(b"x")
  os.utime(old, (0, 0))
  recordings(tmp_path)[0].unlink()
  train(teachers[0], cfg)
  assert new.exists()
  assert not old.exists()


@pytest.mark.parametrize("made", ["file", "empty", "unreadable", "full"])
def test_errors_of_the_recordings_name_their_directory(made, teachers, tmp_path, monkeypatch):
  root, workdir = tmp_path / "replay", tmp_path / "run"
  cfg = config(train__replay=str(root), **AUGMENTED)
  error, message = StorageError, f"{root} cannot be read or written: "
  if made == "file":
    root.write_text("x")
    error, message = ConfigError, f"train.replay={str(root)!r} is a file; name a directory"
  elif made == "empty":
    train(teachers[0], cfg)
    recordings(root)[0].write_bytes(b"")  # made again
    train(teachers[0], cfg)
    assert recordings(root)[0].stat().st_size > 1000
    return
  else:

    def fail(*_):
      raise OSError(errno.ENOSPC if made == "full" else errno.EIO, "of the test")

    if made == "unreadable":
      train(teachers[0], cfg)
    monkeypatch.setattr(*((storage, "write_bytes", fail) if made == "full" else (replay.np, "load", fail)))
  with pytest.raises(error) as raised:
    train(teachers[0], cfg, workdir=workdir)
  assert str(raised.value).startswith(message)
  assert str(workdir) not in str(raised.value)

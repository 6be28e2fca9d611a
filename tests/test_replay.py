"""Recorded teachers: what is recorded, who may read it, and that nothing but rounding differs."""

import json

import jax
import numpy as np
import pytest
from conftest import config

import ban_jax
from ban_jax import data, storage, trees
from ban_jax import job as job_lib
from ban_jax.errors import CheckpointError, ConfigError
from configs import pydoc

# Crops, flips and dropout: all that is drawn in a step.
AUGMENTED = {"train__epochs": 2, "train__evaluate_every": 0, "data__flip": True, "model__dropout": 0.2}


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
  assert record(train__epochs=3) == 9  # the third epoch of the first stream


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
  setup = job_lib.resolve(cfg, None)
  assert job_lib.prepare(setup, teachers[0], 1).teacher.recorded is None
  assert job_lib.prepare(setup, None, 0).teacher.recorded is None
  assert data.load(cfg.data).sizes["train"] == 100

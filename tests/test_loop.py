"""The training loop: several steps a dispatch, and several generations side by side."""

import jax
import numpy as np
import pytest
from conftest import config

import ban_jax
from ban_jax import job as job_lib
from ban_jax import resolving, storage, train, trees
from ban_jax.errors import Preempted, TrainingError
from configs import pydoc

QUIET = {"progress": False}
# 10 steps an epoch, and a rate that falls after the second.
EPOCHS = {"train.epochs": 3, "train.checkpoint_every": 1000, "optim.threshold": 1000.0}


def text(steps, **changes):
  cfg = pydoc.get_config("pydoc,lstm_32,smoke")
  changes = {key.replace("__", "."): value for key, value in changes.items()}
  cfg.update_from_flattened_dict({**EPOCHS, "train.steps_per_dispatch": steps, **changes})
  return cfg


@pytest.fixture(scope="module")
def teacher():
  return ban_jax.train_generation(None, text(1), **QUIET)


@pytest.fixture(scope="module")
def students(teacher):
  """A student by its number of steps a dispatch."""
  return {steps: ban_jax.train_generation(teacher, text(steps), **QUIET) for steps in (1, 7, 32)}


@pytest.mark.parametrize("steps", [7, 32])
def test_several_steps_a_dispatch_end_where_single_steps_do(steps, students):
  one, many = students[1], students[steps]
  for path, leaf in trees.leaves(many.params).items():
    np.testing.assert_allclose(leaf, trees.leaves(one.params)[path], rtol=2e-4, atol=2e-5, err_msg=path)
  for row, other in zip(many.history, one.history, strict=True):
    assert row.keys() == other.keys()
    for name in row.keys() - {"seconds"}:
      assert row[name] == pytest.approx(other[name], rel=1e-4), name


def test_all_chunks_have_one_program_so_their_lengths_change_no_byte(teacher, students):
  # Chunks of 7, 3 | ..., and with a checkpoint after every 4th step 4, 4, 2 | 2, 4, 4 | ...
  other = ban_jax.train_generation(teacher, text(7, train__checkpoint_every=4), **QUIET)
  assert trees.digest(other.params) == trees.digest(students[7].params)


def interrupted(*_):
  raise KeyboardInterrupt


@pytest.mark.parametrize("steps", [7, 32])
def test_a_run_killed_between_chunks_ends_with_the_same_bytes(steps, teacher, students, tmp_path, monkeypatch):
  cfg = text(steps, train__checkpoint_every=13)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  assert {path.name for path in (tmp_path / "gen_1" / "steps").glob("[0-9]*")} == {"13", "26"}
  resumed = ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  assert trees.digest(resumed.params) == trees.digest(students[steps].params)
  for row, other in zip(resumed.history, students[steps].history, strict=True):
    assert {**row, "seconds": 0} == {**other, "seconds": 0}


def test_a_stop_between_chunks_is_resumed_from(teacher, students, tmp_path):
  setup = resolving.resolve(text(7), None)
  job = job_lib.prepare(setup, teacher, 1)
  directory = storage.resolve_workdir(tmp_path) / "gen_1"
  asked = iter([False, False, True])
  with pytest.raises(Preempted, match="generation 1 is saved at step 17 of 30. Rerun the command to resume"):
    train.train([job], [directory], lambda: next(asked), False)
  (resumed,) = train.train([job], [directory], lambda: False, False)
  assert trees.digest(resumed.params) == trees.digest(students[7].params)


def test_a_diverged_step_within_a_chunk_is_named(teacher):
  cfg = text(7, optim__learning_rate=1e38, optim__clip_norm=0.0)
  with pytest.raises(TrainingError, match=r"generation 1 diverged in epoch 1 at step [123]: ") as chunked:
    ban_jax.train_generation(teacher, cfg, **QUIET)
  cfg.train.steps_per_dispatch = 1
  with pytest.raises(TrainingError) as single:
    ban_jax.train_generation(teacher, cfg, **QUIET)
  assert str(single.value).split(":")[0] == str(chunked.value).split(":")[0]


def test_the_layout_records_the_steps_a_dispatch(tmp_path):
  cfg = config(train__epochs=1, train__evaluate_every=0, generations=0)
  ban_jax.run(cfg, tmp_path, **QUIET)
  _, manifest = storage.load(storage.resolve_workdir(tmp_path) / "gen_0")
  assert manifest["layout"]["steps_per_dispatch"] == 1  # a convolution inside a compiled loop is slow on a CPU
  assert job_lib.prepare(resolving.resolve(text(0), None), None, 0).steps_per_dispatch == job_lib.BLOCK


# --- side by side ----------------------------------------------------------------------------------------------------


def jobs_of(cfgs, teacher, devices):
  return [
    job_lib.prepare(resolving.resolve(cfg, [device]), teacher, 1) for cfg, device in zip(cfgs, devices, strict=True)
  ]


def test_generations_side_by_side_are_those_of_runs_of_their_own(tmp_path):
  # Their losses and lengths differ, so that one ends before the other.
  cfgs = [config(loss__name="ban", train__epochs=1), config(loss__name="dkpp", train__epochs=2, seed=5)]
  teacher = ban_jax.train_generation(None, config(train__epochs=1), devices=jax.devices()[:1], **QUIET)
  solo = [ban_jax.train_generation(teacher, cfg, devices=jax.devices()[:1], **QUIET) for cfg in cfgs]
  root = storage.resolve_workdir(tmp_path)
  directories = [root / "a" / "gen_1", root / "b" / "gen_1"]
  both = train.train(jobs_of(cfgs, teacher, jax.devices()[1:3]), directories, lambda: False, False)
  for own, other, directory in zip(solo, both, directories, strict=True):
    assert trees.digest(own.params) == trees.digest(other.params) == storage.load(directory)[1]["digest"]
    assert own.metrics == other.metrics


def test_generations_side_by_side_are_stopped_and_resumed_together(tmp_path):
  cfgs = [text(7), text(7, seed=1)]
  solo = [ban_jax.train_generation(None, cfg, devices=jax.devices()[:1], **QUIET) for cfg in cfgs]
  root = storage.resolve_workdir(tmp_path)
  directories = [root / "a", root / "b"]
  jobs = [
    job_lib.prepare(resolving.resolve(cfg, [device]), None, 0)
    for cfg, device in zip(cfgs, jax.devices()[:2], strict=True)
  ]
  asked = iter([False, True])
  with pytest.raises(Preempted, match="generation 0 is saved at step 10 of 30; generation 0 is saved at step 10 of 30"):
    train.train(jobs, directories, lambda: next(asked), False)
  resumed = train.train(jobs, directories, lambda: False, False)
  assert [trees.digest(g.params) for g in resumed] == [trees.digest(g.params) for g in solo]


def test_a_dispatch_is_no_longer_than_an_epoch():
  cfg = config(train__steps_per_dispatch=10**9)
  assert job_lib.prepare(resolving.resolve(cfg, None), None, 0).steps_per_dispatch == 5

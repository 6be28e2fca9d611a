"""Generations read back: from any path, without a configuration, without the lock, and nothing is written."""

import copy
import os
import pickle
import stat

import jax
import numpy as np
import pytest
from conftest import config
from etils import epath

import ban_jax
from ban_jax import storage, trees

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  return workdir, ban_jax.run(config(generations=1, train__epochs=1), workdir, **QUIET)


def test_a_generation_is_loaded_from_any_kind_of_path(run, monkeypatch):
  workdir, generations = run
  monkeypatch.setenv("HOME", str(workdir))
  monkeypatch.chdir(workdir)
  for path in (str(workdir / "gen_1"), workdir / "gen_1", epath.Path(workdir) / "gen_1", "gen_1", "~/gen_1"):
    loaded = ban_jax.load(path)
    assert trees.digest(loaded.params) == trees.digest(generations[1].params)
    assert (loaded.index, loaded.metrics, loaded.history) == (1, generations[1].metrics, generations[1].history)
  assert [generation.index for generation in ban_jax.load_run(workdir)] == [0, 1]


def test_a_loaded_generation_teaches_and_is_evaluated(run):
  workdir, generations = run
  cfg = config(train__epochs=1)
  loaded = ban_jax.load(workdir / "gen_0")
  again = ban_jax.train_generation(loaded, cfg, **QUIET)
  assert trees.digest(again.params) == trees.digest(generations[1].params)
  assert ban_jax.evaluate(ban_jax.load_run(workdir), cfg)["count"] == 1397


def test_loading_needs_no_lock_and_writes_nothing(run):
  workdir, _ = run
  before = {path: os.stat(path).st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"}
  with storage.lock.hold(epath.Path(workdir)):
    for path in workdir.rglob("*"):
      path.chmod(path.stat().st_mode & ~stat.S_IWUSR)
    try:
      assert len(ban_jax.load_run(workdir)) == 2
    finally:
      for path in workdir.rglob("*"):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
  assert {path: os.stat(path).st_mtime_ns for path in workdir.rglob("*") if path.name != ".lock"} == before


def test_what_is_no_generation_is_named(run, tmp_path):
  workdir, _ = run
  with pytest.raises(
    ban_jax.CheckpointError, match="it is a run with gen_0, gen_1: load one of them, or all by load_run"
  ):
    ban_jax.load(workdir)
  with pytest.raises(ban_jax.CheckpointError, match="nothing holds no finished generation: there is no manifest.json$"):
    ban_jax.load(tmp_path / "nothing")
  with pytest.raises(ban_jax.CheckpointError, match="holds no finished generation: there is no gen_K/manifest.json"):
    ban_jax.load_run(tmp_path)
  with pytest.raises(ban_jax.ConfigError, match="unknown storage 's3://'"):
    ban_jax.load("s3://bucket/gen_0")


def test_a_generation_prints_in_one_line_pickles_and_copies(run):
  generation = run[1][1]
  assert repr(generation) == (
    f"Generation(index=1, parameters=77,562, epochs=1, test_error={generation.metrics['test_error']:.4g})"
  )
  for other in (pickle.loads(pickle.dumps(generation)), copy.deepcopy(generation)):
    assert trees.digest(other.params) == trees.digest(generation.params)
    assert other.metrics == generation.metrics
  assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(generation.params) if isinstance(leaf, np.ndarray))

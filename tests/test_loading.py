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
from flax import linen as nn

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


# --- Networks of one's own -------------------------------------------------------------------------------------------


class MLP(nn.Module):
  width: int
  limit: float = float("inf")
  bounds: tuple = (float("-inf"), 1.0)

  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(nn.relu(nn.Dense(self.width)(x.reshape(x.shape[0], -1))))


def sequence(width):
  return nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(width), nn.Dense(3)])


OWN = {"train__epochs": 1, "train__batch_size": 20, "train__evaluate_every": 0, "generations": 1}


@pytest.fixture(scope="module")
def own_data():
  rng = np.random.default_rng(0)
  images, labels = rng.normal(size=(60, 4, 4)), np.arange(60) % 3
  return ban_jax.from_arrays((images[:40], labels[:40]), (images[40:], labels[40:]))


@pytest.mark.parametrize("make", [MLP, sequence], ids=["by options", "by shapes"])
def test_two_networks_of_one_class_are_read_back_and_told_apart(make, own_data, tmp_path):
  teacher, student = (ban_jax.from_flax(make(width), own_data) for width in (6, 4))
  given = {"dataset": own_data, "teacher_model": teacher, "model": student}
  cfg = config(**OWN)
  generations = ban_jax.run(cfg, tmp_path, **given, **QUIET)
  inputs = own_data.splits["test"]["images"]
  expected = ban_jax.predict(generations, inputs)
  for order in ((teacher, student), (student, teacher)):
    loaded = ban_jax.load_run(tmp_path, model=order[0], teacher_model=order[1])
    assert [one.network.own for one in loaded] == [teacher, student]
    np.testing.assert_array_equal(ban_jax.predict(loaded, inputs), expected)
  partly = ban_jax.load_run(tmp_path, model=student)
  assert [one.network.own for one in partly] == [None, student]
  unnamed = ban_jax.load_run(tmp_path)
  assert ban_jax.evaluate(unnamed, cfg, **given) == ban_jax.evaluate(generations, cfg, **given)
  assert ban_jax.load(tmp_path / "gen_0", model=teacher).network.own == teacher
  again = ban_jax.run(cfg, tmp_path, **given, **QUIET)
  assert [trees.digest(one.params) for one in again] == [trees.digest(one.params) for one in generations]


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (MLP, "gen_1: model 'MLP' has width=5; the generation was trained with width=4"),
    (
      sequence,
      "gen_1: the generation was trained with another network 'Sequential': at params/layers_1/bias the model has "
      "float32[5], it has float32[4]",
    ),
  ],
)
def test_another_network_of_the_name_is_said_to_be_one(make, message, own_data, tmp_path):
  given = {"dataset": own_data, "model": ban_jax.from_flax(make(4), own_data)}
  ban_jax.run(config(**OWN), tmp_path, **given, **QUIET)
  other = ban_jax.from_flax(make(5), own_data)
  for call in (
    lambda: ban_jax.load_run(tmp_path, model=other),
    lambda: ban_jax.load(tmp_path / "gen_1", model=other),
    lambda: ban_jax.evaluate(ban_jax.load(tmp_path / "gen_1"), config(**OWN), dataset=own_data, model=other),
  ):
    with pytest.raises(ban_jax.ConfigError) as error:
      call()
    assert str(error.value).endswith(message.removeprefix("gen_1: "))


def test_fields_that_are_not_finite_are_kept_and_found(own_data, tmp_path):
  given = {"dataset": own_data, "model": ban_jax.from_flax(MLP(4), own_data)}
  first, again = (ban_jax.run(config(**OWN), tmp_path, **given, **QUIET) for _ in range(2))
  assert trees.digest(again[1].params) == trees.digest(first[1].params)
  loaded = ban_jax.load(tmp_path / "gen_1")
  assert loaded.network.group["limit"] == "Infinity"
  assert loaded.network.group["bounds"] == ["-Infinity", 1.0]
  assert ban_jax.load(tmp_path / "gen_1", model=given["model"]).network.own == given["model"]
  other = ban_jax.from_flax(MLP(4, limit=float("nan")), own_data)
  with pytest.raises(ban_jax.CheckpointError, match='model.limit: "Infinity" there, "NaN" here'):
    ban_jax.run(config(**OWN), tmp_path, dataset=own_data, model=other, **QUIET)

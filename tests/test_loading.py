"""Generations read back: from any path, without a configuration, without the lock, and nothing is written."""

import copy
import json
import os
import pickle
import shutil
import stat

import jax
import numpy as np
import pytest
from conftest import config
from etils import epath
from flax import linen as nn

import ban_jax
from ban_jax import config as config_lib
from ban_jax import data, keys, models, presets, storage, trees

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
    f"Generation(index=1, parameters=1,226, epochs=1, test_error={generation.metrics['test_error']:.4g})"
  )
  for other in (pickle.loads(pickle.dumps(generation)), copy.deepcopy(generation)):
    assert trees.digest(other.params) == trees.digest(generation.params)
    assert other.metrics == generation.metrics
  assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(generation.params) if isinstance(leaf, np.ndarray))


# --- Values that compare and pickle ----------------------------------------------------------------------------------


def test_generations_compare_by_what_they_hold_and_are_elements_of_sets(run):
  workdir, generations = run
  loaded = ban_jax.load_run(workdir)
  assert loaded == generations
  assert (loaded[0] != generations[0]) is False
  assert loaded[0] != loaded[1]
  assert len({*loaded, *generations}) == 2
  assert pickle.loads(pickle.dumps(loaded[0])) == generations[0]
  params = trees.thawed(loaded[0].params)
  params["params"]["classifier"]["bias"] = params["params"]["classifier"]["bias"] + np.float32(1e-7)
  assert loaded[0]._replace(params=params) != loaded[0]
  odd = loaded[0]._replace(metrics={"test_error": float("nan")})
  assert odd == odd._replace(metrics={"test_error": float("nan")})
  assert odd != loaded[0]
  assert loaded[0] != tuple(loaded[0])
  assert loaded[0] != "generation"


@pytest.mark.parametrize("words", ["digits,wrn_10_1,smoke", "pydoc,lstm_32,smoke"])
def test_data_sets_pickle_and_compare(words):
  dataset = data.load(presets.compose(words).data)
  again = pickle.loads(pickle.dumps(dataset))
  assert again == dataset
  assert hash(again) == hash(dataset)
  assert again.fetch is dataset.fetch  # for which steps are compiled
  assert not again.splits["train"][min(again.splits["train"])].flags.writeable
  key = jax.random.key(0)
  np.testing.assert_array_equal(again.train_order(key, 5), dataset.train_order(key, 5))
  np.testing.assert_array_equal(again.eval_order("test", 5), dataset.eval_order("test", 5))
  assert again != dataset._replace(digest="0")


@pytest.mark.parametrize(
  "words", ["digits,wrn_10_1,smoke", "digits,densenet_16_8,smoke", "pydoc,lstm_32,smoke", "pydoc,cnn_lstm_32,smoke"]
)
def test_networks_pickle(words):
  cfg = presets.compose(words)
  model = models.make_model(cfg.model, data.load(cfg.data).spec)
  assert pickle.loads(pickle.dumps(model)) is model
  with pytest.raises(pickle.PicklingError, match="was made by hand"):
    pickle.dumps(model._replace(recipe=None))


def test_a_network_of_one_s_own_pickles_with_its_data(own_data):
  model = ban_jax.from_flax(MLP(4), own_data)
  again, read = pickle.loads(pickle.dumps((model, own_data)))
  assert again is model
  assert read == own_data


# --- Configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("words", "changes"),
  [
    ("cifar100,wrn_28_10,paper", {}),
    ("cifar100,wide_match_1_1,paper,teacher=densenet_90_60", {}),
    ("digits,wrn_10_1,smoke,cwtm,teacher=densenet_16_8", {"loss__class_weights": "balanced"}),
    ("digits,wrn_10_1,smoke", {"loss__class_weights": (1.0,) * 10, "optim__boundaries": (0.5,), "seed": 7}),
    ("ptb,lstm,paper", {}),
    ("pydoc,cnn_lstm_32,smoke,dkpp", {"train__replay": "there"}),
  ],
)
def test_a_recorded_configuration_comes_back(words, changes, tmp_path):
  cfg = presets.compose(words)
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  storage.write_json(epath.Path(tmp_path) / "config.json", config_lib.record(cfg))
  read = ban_jax.load_config(tmp_path)
  assert read == cfg
  assert read.is_locked
  config_lib.check(read)


def test_a_configuration_of_an_earlier_version_has_neutral_values(tmp_path):
  record = {key: value for key, value in config_lib.record(config()).items() if key not in keys.neutral_values()}
  (tmp_path / "config.json").write_text(json.dumps(record))
  assert ban_jax.load_config(tmp_path) == config()


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (None, "holds no run and no finished generation: there is no config.json"),
    ("{", "holds no configuration that can be read"),
    ("[3]", "holds no configuration that can be read"),
    ("{}", "holds no configuration that can be read: 'data.name'"),
    (
      '{"data.name": "digits", "train.fancy": 1}',
      "unknown configuration key 'train.fancy'; another version of ban_jax",
    ),
  ],
)
def test_what_is_no_configuration_is_named(content, message, tmp_path):
  if content is not None:
    (tmp_path / "config.json").write_text(content)
  with pytest.raises(ban_jax.BanError, match=message):
    ban_jax.load_config(tmp_path)


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
  for place in (tmp_path, tmp_path / "gen_1"):
    read = ban_jax.load_config(place)
    assert (read.data.name, read.model.name, read.teacher.model.name) == ("own", "own", "own")
    assert ban_jax.run(read, tmp_path, **given, **QUIET) == generations


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


# --- Parts of several runs -------------------------------------------------------------------------------------------


def small(model, data_, workdir, **options):
  """Returns a run of two generations that learn from the labels in a moment."""
  return ban_jax.run(config(**OWN), workdir, dataset=data_, model=model, **options, **QUIET)


@pytest.fixture(scope="module")
def begun(own_data, tmp_path_factory):
  """A run of generations 0 and 1, and one of generation 2 that was begun with it."""
  model = ban_jax.from_flax(MLP(4), own_data)
  one, other = (tmp_path_factory.mktemp(name) for name in ("one", "other"))
  first = small(model, own_data, one)
  later = small(model, own_data, other, params_prev=first[1])
  return model, one, first, other, later


def test_a_run_that_was_begun_with_params_prev_is_not_carried_on_without(begun, own_data, tmp_path):
  model, _, first, other, later = begun
  shutil.copytree(other, tmp_path / "run")
  for finished in (True, False):
    with pytest.raises(ban_jax.CheckpointError) as error:
      small(model, own_data, tmp_path / "run")
    assert str(error.value) == (
      f"{tmp_path}/run holds a run that began with generation 2, taught by a network that was given as params_prev; "
      "give it again, or another workdir"
    )
    assert not (tmp_path / "run" / "gen_0").exists()
    if finished:  # the same of a run that was killed before it left anything
      shutil.rmtree(tmp_path / "run" / "gen_2")
  assert small(model, own_data, tmp_path / "run", params_prev=first[1]) == later


def test_a_run_of_an_earlier_version_is_known_by_its_first_generation(begun, own_data, tmp_path):
  model, _, first, other, later = begun
  shutil.copytree(other, tmp_path / "run")
  (tmp_path / "run" / "beginning.json").unlink()
  with pytest.raises(ban_jax.CheckpointError, match="holds a run that began with generation 2, taught by"):
    small(model, own_data, tmp_path / "run")
  assert small(model, own_data, tmp_path / "run", params_prev=first[1]) == later


def test_a_run_is_carried_on_by_its_own_generations_alone(begun, own_data, tmp_path):
  model, one, first, _, later = begun
  shutil.copytree(one, tmp_path / "run")
  with pytest.raises(ban_jax.CheckpointError, match="which params_prev, of generation 1, is no part of; give another"):
    small(model, own_data, tmp_path / "run", params_prev=first[1]._replace(params=_other(first[1].params)))
  assert not (tmp_path / "run" / "gen_2").exists()
  assert small(model, own_data, tmp_path / "run", params_prev=first[1]) == later
  assert [one.index for one in ban_jax.load_run(tmp_path / "run")] == [0, 1, 2]


def test_a_teacher_that_was_removed_is_trained_again(begun, own_data, tmp_path):
  model, one, first, _, _ = begun
  for record in (True, False):
    shutil.copytree(one, tmp_path / str(record))
    shutil.rmtree(tmp_path / str(record) / "gen_0")
    if not record:  # of an earlier version
      (tmp_path / str(record) / "beginning.json").unlink()
    assert small(model, own_data, tmp_path / str(record)) == first


def test_another_first_teacher_is_named(begun, own_data, tmp_path):
  model, _, first, other, _ = begun
  shutil.copytree(other, tmp_path / "run")
  teacher = first[1]._replace(params=_other(first[1].params))
  with pytest.raises(ban_jax.CheckpointError, match="began with generation 2, taught by another network than params_"):
    small(model, own_data, tmp_path / "run", params_prev=teacher)


def _other(params):
  return trees.to_host(jax.tree.map(lambda leaf: -leaf, trees.to_plain(params)), 1)


def test_parts_of_several_runs_are_not_read_as_one(begun, own_data, tmp_path):
  model, one, first, _, _ = begun
  shutil.copytree(one, tmp_path / "run")
  other = first[1]._replace(params=_other(first[1].params))
  mixed = ban_jax.train_generation(
    other, config(**OWN), dataset=own_data, model=model, workdir=tmp_path / "run", **QUIET
  )
  with pytest.raises(ban_jax.CheckpointError, match="run/gen_2 was not taught by gen_0 or gen_1: .* parts of"):
    ban_jax.load_run(tmp_path / "run")
  assert ban_jax.load(tmp_path / "run" / "gen_2") == mixed

"""Identity: new options, labels and logging settings must not orphan earlier runs; what changes bytes must."""

import json

import jax
import pytest
from conftest import IMAGES, config

import ban_jax
from ban_jax import config as config_lib
from ban_jax import keys, presets, storage, trees
from ban_jax.errors import CheckpointError, ConfigError

QUIET = {"progress": False}
TINY = {"train__epochs": 1, "train__evaluate_every": 0}

# Digests for teacher and students. If one of them changes, users' run directories and tables are not found any more:
# give a new key a neutral value in ban_jax/keys.py instead.
KNOWN = {
  "cifar100,wrn_28_10,paper": ("94ba99", "03007f"),
  "cifar10,densenet_90_60,quick,cwtm": ("711731", "2fc7c0"),
  "cifar100,wide_match_1_1,paper,teacher=densenet_90_60": ("5fbd8a", "0a6c54"),
  "digits,wrn_10_1,cpu,label_smoothing": ("7dbc3b", "0e5fb3"),
  "ptb,lstm,paper": ("f2d60a", "8a5a66"),
  "pydoc,cnn_lstm_32,smoke,dkpp": ("e61301", "2f9d6b"),
}


def identity_of(cfg, generation=1):
  return config_lib.identity_digest(config_lib.record(cfg), generation)


@pytest.mark.parametrize("words", KNOWN)
def test_identities_are_those_of_earlier_versions(words):
  record = config_lib.record(presets.compose(words))
  assert tuple(config_lib.identity_digest(record, generation)[:6] for generation in (0, 1)) == KNOWN[words]


@pytest.fixture
def later_key(monkeypatch):
  """Makes every new configuration have a key `train.fancy`, whose neutral value is 0."""
  key = keys.Key(0, keys.whole(0), "How fancy.", neutral=0)
  return lambda: monkeypatch.setitem(keys.KEYS, "train.fancy", key)


def test_a_later_key_with_its_neutral_value_finds_earlier_runs(later_key, tmp_path):
  earlier = config(generations=1, **TINY)
  first = ban_jax.run(earlier, tmp_path, **QUIET)
  later_key()
  cfg = config(generations=1, **TINY)
  assert "fancy" in cfg.train
  assert identity_of(cfg) == identity_of(earlier)
  assert ban_jax.run(cfg, tmp_path, **QUIET)[1].metrics == first[1].metrics
  cfg.train.fancy = 1
  with pytest.raises(CheckpointError, match="holds a run of another configuration .train.fancy: 0 there, 1 here."):
    ban_jax.run(cfg, tmp_path, **QUIET)


def test_an_unknown_key_is_refused():
  cfg = config().copy_and_resolve_references()
  with cfg.unlocked():
    cfg.train.fancy = 0
  with pytest.raises(ConfigError, match="unknown configuration key 'train.fancy'; the keys are: compute_dtype"):
    ban_jax.train_generation(None, cfg, **QUIET)
  with cfg.unlocked():
    del cfg.train.fancy
    del cfg.loss.temperature
  with pytest.raises(ConfigError, match=r"the configuration lacks loss.temperature; ban_jax/keys.py documents every"):
    ban_jax.train_generation(None, cfg, **QUIET)


@pytest.mark.parametrize(
  "changes",
  [
    *({"loss__smoothing": 0.3}, {"loss__label_weight": 0.7}, {"data__window": 0}, {"optim__threshold": 0.5}),
    *({"scale": "mine"}, {"generations": 9}, {"data__dir": "/elsewhere"}, {"train__checkpoint_every": 7}),
    *({"train__gradient_split": True}, {"train__evaluate_every": 0}, {"evaluate__batch_size": 10}),
    *({"train__steps_per_dispatch": 4}, {"train__mapping": "shard_map"}, {"evaluate__training_batch_size": 10}),
    {"data__mixup_alpha": 0.2},
  ],
  ids=str,
)
def test_what_no_byte_depends_on_is_not_part_of_the_identity(changes):
  for generation in (0, 1):
    assert identity_of(config(**changes), generation) == identity_of(config(), generation)


@pytest.mark.parametrize(
  "changes",
  [
    *({"seed": 1}, {"data__pad": 0}, {"model__dropout": 0.1}, {"optim__factor": 0.5}, {"optim__weight_decay": 0.0}),
    *({"train__epochs": 1}, {"train__batch_size": 10}, {"compute_dtype": "bfloat16"}, {"data__train_examples": 60}),
    *({"train__sync_batch_stats": False}, {"loss__class_weights": "balanced"}, {"loss__class_weights": (1.0,) * 10}),
    *({"train__accumulate": 2}, {"train__ema": 0.9}, {"data__augment": ("mixup",)}),
  ],
  ids=str,
)
def test_what_bytes_depend_on_is_part_of_the_identity(changes):
  for generation in (0, 1):
    assert identity_of(config(**changes), generation) != identity_of(config(), generation)


def test_class_weights_are_recorded_where_there_are_any():
  assert "loss.class_weights" not in config_lib.identity(config_lib.record(config()), 1)
  for given, recorded in (("balanced", "balanced"), ((0.5, *[1] * 9), [0.5, *[1] * 9])):
    values = config_lib.record(config(loss__class_weights=given))
    for generation in (0, 1):
      assert config_lib.identity(values, generation)["loss.class_weights"] == recorded


def test_options_belong_to_what_takes_them():
  assert identity_of(config(loss__temperature=2.0)) != identity_of(config())
  assert identity_of(config(loss__temperature=2.0), 0) == identity_of(config(), 0)  # generation 0 learns from labels
  assert identity_of(config(teacher__loss="label_smoothing"), 0) != identity_of(config(), 0)
  assert identity_of(config(teacher__loss="label_smoothing")) == identity_of(config())
  smoothed = config(f"{IMAGES},label_smoothing")
  assert identity_of(smoothed) != identity_of(config(f"{IMAGES},label_smoothing", loss__smoothing=0.3))
  cosine = {"optim__schedule": "cosine"}
  assert identity_of(config(**cosine, optim__factor=0.5)) == identity_of(config(**cosine))
  mixed = {"data__augment": ("mixup", "erasing")}
  assert identity_of(config(**mixed, data__mixup_alpha=0.2)) != identity_of(config(**mixed))
  assert identity_of(config(**mixed)) != identity_of(config(data__augment=("erasing", "mixup")))
  for changes in ({"teacher__view": "plain"}, {"teacher__weights": (1.0, 2.0)}):  # generation 0 has no teacher
    assert identity_of(config(**changes), 0) == identity_of(config(), 0)
    assert identity_of(config(**changes)) != identity_of(config())
  # Generation 0 has the teacher's network, whatever the students' network is.
  teacher = config("digits,densenet_16_8,smoke,teacher=mlp_16")
  assert identity_of(teacher, 0) == identity_of(config(), 0)
  assert identity_of(teacher, 1) == identity_of(config("digits,densenet_16_8,smoke"), 1)


def test_under_a_plateau_the_evaluation_in_training_counts():
  plateau = {"optim__schedule": "plateau", "data__validation": 0.1}
  assert identity_of(config(**plateau, evaluate__training_batch_size=10)) != identity_of(config(**plateau))
  assert identity_of(config(**plateau, train__evaluate_every=0)) == identity_of(config(**plateau))


def test_the_records_of_logs_and_evaluations_change_no_byte():
  teacher = ban_jax.train_generation(None, config(**TINY), **QUIET)
  plain, split = (
    ban_jax.train_generation(teacher, config(train__epochs=1, **changes), **QUIET)
    for changes in ({}, {"train__gradient_split": True, "train__evaluate_every": 0, "evaluate__batch_size": 100})
  )
  assert trees.digest(plain.params) == trees.digest(split.params)


def test_a_run_may_change_what_it_logs_and_a_finished_one_keeps_its_record(tmp_path):
  ban_jax.run(config(generations=1, **TINY), tmp_path, **QUIET)
  cfg = config(generations=1, scale="mine", train__gradient_split=True, loss__smoothing=0.5, **TINY)
  assert len(ban_jax.run(cfg, tmp_path, **QUIET)) == 2
  _, manifest = storage.load(storage.resolve_workdir(tmp_path) / "gen_1")
  assert manifest["config"]["scale"] == "smoke"  # the full configuration of the run that trained it
  assert manifest["config"]["loss.smoothing"] == 0.1
  assert json.loads((tmp_path / "config.json").read_text())["scale"] == "mine"


def test_a_manifest_of_the_earlier_form_is_read(tmp_path):
  cfg = config(generations=1, **TINY)
  ban_jax.run(cfg, tmp_path, **QUIET)
  for generation in (0, 1):
    path = tmp_path / f"gen_{generation}" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]
    path.write_text(json.dumps({**manifest, "config": "0" * 64}))
  assert [g.index for g in ban_jax.run(cfg, tmp_path, **QUIET)] == [0, 1]
  with pytest.raises(CheckpointError, match="another configuration .optim.momentum: 0.9 there, 0.5 here"):
    ban_jax.run(config(generations=1, optim__momentum=0.5, **TINY), tmp_path, **QUIET)


def test_a_teacher_serves_students_of_another_loss_in_its_directory(tmp_path):
  devices = jax.devices()[:1]
  ban_jax.run(config(generations=0, **TINY), tmp_path, devices=devices, **QUIET)
  cwtm = config(f"{IMAGES},cwtm", generations=1, **TINY)
  assert [g.index for g in ban_jax.run(cwtm, tmp_path, devices=devices, **QUIET)] == [0, 1]
  with pytest.raises(CheckpointError, match='loss.name: "cwtm" there, "ban" here'):
    ban_jax.run(config(generations=1, **TINY), tmp_path, devices=devices, **QUIET)

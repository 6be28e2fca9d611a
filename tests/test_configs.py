"""Presets: what they compose to, and how a wrong word is answered."""

import pytest

from ban_jax import data, models
from ban_jax.errors import ConfigError
from ban_jax.types import InputSpec
from configs import base, cifar, digits, presets


def test_the_papers_settings():
  cfg = cifar.get_config("cifar100,wrn_28_10,paper")
  assert (cfg.data.name, cfg.model.depth, cfg.model.width, cfg.model.dropout) == ("cifar100", 28, 10, 0.3)
  assert (cfg.train.epochs, cfg.train.batch_size, cfg.generations, cfg.loss.name) == (200, 128, 3, "ban")
  assert (cfg.optim.learning_rate, cfg.optim.momentum, cfg.optim.weight_decay) == (0.1, 0.9, 5e-4)
  assert cfg.optim.nesterov
  assert cfg.optim.schedule == "steps"
  assert (cfg.data.pad, cfg.data.flip) == (4, True)


@pytest.mark.parametrize("name", presets.MODELS)
@pytest.mark.parametrize("scale", presets.SCALES)
def test_every_network_composes_with_every_scale(name, scale):
  cfg = cifar.get_config(f"cifar10,{name},{scale},cwtm")
  assert cfg.scale == scale
  assert cfg.loss.name == "cwtm"
  assert cfg.is_locked
  models.make_model(cfg.model, InputSpec("images", (32, 32, 3), 10))


def test_the_teacher_may_be_another_network():
  cfg = cifar.get_config("cifar100,densenet_90_60,paper,teacher=wrn_28_2")
  assert (cfg.model.name, cfg.teacher.model.name, cfg.teacher.model.width) == ("densenet", "wide_resnet", 2)
  assert cifar.get_config("cifar100,densenet_90_60,paper").teacher.model is None


def test_presets_leave_the_base_as_it_is():
  before = base.get_config().to_json()
  cfg = digits.get_config()
  cfg.model.width = 7
  assert base.get_config().to_json() == before
  assert digits.get_config().model.width == 1


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("cifar11,wrn_28_1,paper", "unknown data set 'cifar11'; choose one of: cifar10, cifar100"),
    ("cifar10,wrn_28,paper", "unknown network 'wrn_28'; choose one of: .*wrn_28_1, .*wrn_28_10"),
    ("cifar10,wrn_28_1,fast", "unknown scale 'fast'; choose one of: cpu, paper, quick, smoke"),
    ("cifar10", "unknown network ''.*is named \"dataset,network,scale\""),
    (
      "cifar10,wrn_28_1,cpu,kd",
      "unknown word 'kd'; after the scale may stand a loss .ban, ban_label, cwtm, dkpp",
    ),
    ("cifar10,wrn_28_1,cpu,teacher=vgg", "unknown word 'teacher=vgg'.*teacher=NETWORK"),
  ],
)
def test_unknown_words_list_the_choices(words, message):
  with pytest.raises(ConfigError, match=message):
    cifar.get_config(words)


def test_every_data_key_is_one_that_data_sets_take():
  data.load(digits.get_config().data)
  cfg = digits.get_config()
  with pytest.raises(AttributeError, match="padding"):
    cfg.data.padding = 1

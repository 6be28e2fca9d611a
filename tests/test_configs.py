"""Presets: the configurations they compose to, and the errors for unknown words."""

import pytest

from ban_jax import config, data, models, presets
from ban_jax.errors import ConfigError
from ban_jax.presets import base
from ban_jax.types import InputSpec
from configs import cifar, digits, ptb, pydoc


def test_the_papers_settings():
  cfg = cifar.get_config("cifar100,wrn_28_10,paper")
  assert (cfg.data.name, cfg.model.depth, cfg.model.width, cfg.model.dropout) == ("cifar100", 28, 10, 0.3)
  assert (cfg.train.epochs, cfg.train.batch_size, cfg.generations, cfg.loss.name) == (200, 128, 3, "ban")
  assert (cfg.optim.learning_rate, cfg.optim.momentum, cfg.optim.weight_decay) == (0.1, 0.9, 5e-4)
  assert cfg.optim.nesterov
  assert cfg.optim.schedule == "steps"
  assert (cfg.data.pad, cfg.data.flip) == (4, True)


def test_the_papers_settings_for_language():
  lstm, cnn = ptb.get_config("ptb,lstm,paper"), ptb.get_config("ptb,cnn_lstm,paper")
  assert (lstm.model.units, lstm.model.layers, lstm.model.dropout, lstm.model.init_scale) == (1500, 2, 0.65, 0.04)
  assert (cnn.model.units, cnn.model.layers, cnn.model.dropout, cnn.model.init_scale) == (650, 2, 0.5, 0.05)
  for cfg in (lstm, cnn):
    assert (cfg.data.name, cfg.data.window, cfg.data.pad, cfg.data.flip) == ("ptb", 35, 0, False)
    assert (cfg.train.epochs, cfg.generations, cfg.loss.name) == (40, 1, "ban_label")
    assert (cfg.optim.schedule, cfg.optim.momentum, cfg.optim.weight_decay) == ("plateau", 0, 0)
    assert (cfg.evaluate.batch_size, cfg.evaluate.training_batch_size, cfg.train.evaluate_every) == (1, 10, 1)
    assert not cfg.optim.nesterov
  assert (lstm.train.batch_size, lstm.optim.factor, lstm.optim.threshold) == (32, 0.25, 0)
  assert (cnn.train.batch_size, cnn.optim.factor, cnn.optim.threshold) == (20, 0.5, 0.5)
  assert (lstm.optim.learning_rate, lstm.optim.clip_norm) == (20, 0.25)
  # 2 and 5 are for a loss summed over 35 tokens.
  assert (cnn.optim.learning_rate, cnn.optim.clip_norm) == (70, 5 / 35)


def test_scales_of_text():
  epochs = {scale: ptb.get_config(f"ptb,lstm_200,{scale}").train.epochs for scale in presets.SCALES}
  assert epochs == {"paper": 40, "quick": 15, "cpu": 10, "smoke": 2}
  assert ptb.get_config("ptb,lstm_200,cpu").optim.schedule == "plateau"
  smoke = pydoc.get_config("pydoc,lstm_32,smoke")
  dataset = data.load(smoke.data)
  assert dataset.sizes["train"] == 2000
  assert dataset.train_order(None, smoke.train.batch_size).shape == (10, 20)


def test_image_networks_are_trained_as_the_base_says():
  assert cifar.get_config("cifar10,wrn_10_1,paper").optim.to_dict() == base.get_config().optim.to_dict()


@pytest.mark.parametrize("name", [name for name in presets.MODELS if name != "own"])  # which is the caller's
@pytest.mark.parametrize("scale", presets.SCALES)
def test_every_network_composes_with_every_scale(name, scale):
  text = presets.MODELS[name].name in ("lstm", "char_cnn_lstm", "gpt")
  cfg = ptb.get_config(f"ptb,{name},{scale},cwtm") if text else cifar.get_config(f"cifar10,{name},{scale},cwtm")
  assert cfg.scale == scale
  assert cfg.loss.name == "cwtm"
  assert cfg.is_locked
  tokens = InputSpec("tokens", (35,), 3, ("a", "b", "c"))
  models.make_model(cfg.model, tokens if text else InputSpec("images", (32, 32, 3), 10))


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
    ("ptb,lstm,paper", "unknown data set 'ptb'; choose one of: cifar10, cifar100"),
    ("cifar10", "unknown network ''.*is named \"dataset,network,scale\""),
    (
      "cifar10,wrn_28_1,cpu,kd",
      "unknown word 'kd'; the scale may be followed by a loss .annealed, ban, ban_label, cwtm, dkpp",
    ),
    ("cifar10,wrn_28_1,cpu,teacher=vgg", "unknown word 'teacher=vgg'.*teacher=NETWORK"),
  ],
)
def test_unknown_words_list_the_choices(words, message):
  with pytest.raises(ConfigError, match=message):
    cifar.get_config(words)


def test_every_data_key_is_one_that_data_sets_take():
  data.load(digits.get_config().data)
  data.load(pydoc.get_config().data)
  cfg = digits.get_config()
  with pytest.raises(AttributeError, match="padding"):
    cfg.data.padding = 1


@pytest.mark.parametrize("scale", presets.SCALES)
@pytest.mark.parametrize("network", ["lstm", "cnn_lstm_32"])
def test_a_language_model_of_own_data_is_trained_as_one_of_registered_text(network, scale):
  cfg = presets.compose(f"own,{network},{scale}")
  own, text = cfg.to_dict(), presets.compose(f"pydoc,{network},{scale}").to_dict()
  assert {key: own[key] for key in own if key != "data"} == {key: text[key] for key in text if key != "data"}
  config.check(cfg)  # no setting that has no effect


@pytest.mark.parametrize("scale", presets.SCALES)
def test_own_data_have_no_settings_of_other_data(scale):
  config.check(presets.compose(f"own,own,{scale}"))


def test_transformers_are_trained_by_adamw():
  vit, gpt = cifar.get_config("cifar10,vit_32,paper"), pydoc.get_config("pydoc,gpt_64,paper")
  for cfg in (vit, gpt):
    assert (cfg.optim.name, cfg.optim.decay, cfg.optim.schedule, cfg.optim.warmup) == (
      "adamw",
      "kernels",
      "cosine",
      0.05,
    )
  assert (vit.optim.weight_decay, gpt.optim.weight_decay, gpt.optim.b2, gpt.optim.clip_norm) == (0.05, 0.1, 0.95, 1.0)
  assert presets.compose("own,vit_32,smoke").evaluate.batch_size == 300  # of images
  assert presets.compose("own,gpt_64,smoke").evaluate.batch_size == 100


def test_more_classes_than_there_are_are_refused():
  cfg = digits.get_config("digits,wrn_10_1,smoke,top_k")
  cfg.loss.k = 11
  with pytest.raises(ConfigError, match="loss.k=11: expected at most 10, the classes of digits"):
    config.check_dataset(cfg, data.load(cfg.data))

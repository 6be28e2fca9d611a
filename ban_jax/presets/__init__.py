"""Presets of data sets, networks and scales.

`compose("cifar10,wrn_16_1,cpu")` applies the presets of a data set, a network and a scale to the base, in this order.
Further words may follow: the name of the students' loss, the name of an optimizer, with its usual learning rate and
decay, or `teacher=NETWORK` for another network as generation 0, which is trained with the students' settings and by
`teacher.loss`, by default the plain labels.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from ban_jax.errors import ConfigError, choices
from ban_jax.keys import neutral_values
from ban_jax.losses import LOSSES
from ban_jax.optim import OPTIMIZERS
from ban_jax.presets import base

Preset = Callable[[ConfigDict], None]


def _images(name: str) -> Preset:
  def apply(config: ConfigDict) -> None:
    config.data.name = name

  return apply


def _digits(config: ConfigDict) -> None:
  # Few training images, or the test error would be near zero; no flips, because mirrored digits are no digits.
  config.data.update(name="digits", train_examples=200, pad=1, flip=False)
  config.train.update(batch_size=50)


def _text(name: str) -> Preset:
  def apply(config: ConfigDict) -> None:
    config.data.update(name=name, window=35, pad=0, flip=False)
    _trained_on_text(config)

  return apply


def _trained_on_text(config: ConfigDict) -> None:
  # In the paper only BAN+L worked for language models, and Table 6 has one student.
  config.loss.name = "ban_label"
  config.generations = 1
  config.optim.update(schedule="plateau", momentum=0.0, nesterov=False, weight_decay=0.0)
  config.train.epochs = 40
  # Reported numbers read the text as one stream; training-time evaluation may be approximate.
  config.evaluate.update(batch_size=1, training_batch_size=10)


def _own(config: ConfigDict) -> None:
  # The data bring their own settings: ban_jax.from_arrays. Whether they are text, the network tells.
  config.data.update(name="own", pad=0, flip=False)
  if _is_text(config):
    _trained_on_text(config)


DATASETS = {
  "cifar10": _images("cifar10"),
  "cifar100": _images("cifar100"),
  "digits": _digits,
  "enwik8": _text("enwik8"),
  "own": _own,
  "ptb": _text("ptb"),
  "pydoc": _text("pydoc"),
  "tfds": _images("tfds"),
  "wikitext": _text("wikitext"),
}


def _wide_resnet(depth: int, width: int) -> ConfigDict:
  return ConfigDict({"name": "wide_resnet", "depth": depth, "width": width, "dropout": 0.3})


def _densenet(
  depth: int, growth: int | tuple[int, ...], stem: int | None = None, compression: float = 0.5, remat: bool = True
) -> ConfigDict:
  options = {"units": (depth - 4) // 6, "growth": growth, "stem": stem or 2 * growth}
  return ConfigDict({"name": "densenet", **options, "compression": compression, "remat": remat})


# Stem and stage widths of the teachers that students are matched to: DenseNet-90-60 and the small DenseNet-16-8.
_WIDTHS_90_60 = {"stem": 120, "stages": (480, 660, 750)}
_WIDTHS_16_8 = {"stem": 16, "stages": (16, 16, 16)}


def _matched_pre_resnet(units: int, ratio: float, widths: dict) -> ConfigDict:
  return ConfigDict({"name": "matched_pre_resnet", "units": units, "ratio": ratio, **widths})


def _matched_wide_resnet(units: int, ratio: float, widths: dict) -> ConfigDict:
  return ConfigDict({"name": "matched_wide_resnet", "units": units, "ratio": ratio, "dropout": 0.0, **widths})


def _resnet(*blocks: int, width: int = 64, **changed: bool) -> ConfigDict:
  options = {"bottleneck": False, "projection": True, "zero_scale": True, "preactivation": False, **changed}
  return ConfigDict({"name": "resnet", "blocks": blocks, "width": width, **options})


def _transformer(name: str, width: int, layers: int, heads: int, **options: object) -> ConfigDict:
  shared = {"width": width, "layers": layers, "heads": heads, "dropout": 0.0, "drop_path": 0.0, "cudnn": False}
  return ConfigDict({"name": name, **shared, **options})


def _lstm(units: int, layers: int, dropout: float, init_scale: float, tied: bool = True) -> ConfigDict:
  options = {"units": units, "layers": layers, "dropout": dropout, "init_scale": init_scale}
  return ConfigDict({"name": "lstm", **options, "cudnn": False, "tied": tied})


# Kim et al. 2016, large.
_CNN_LSTM = {
  "name": "char_cnn_lstm",
  "char_embedding": 15,
  "max_width": 7,
  "filters_per_width": 50,
  "filters_at_most": 200,
  "highway_layers": 2,
  "units": 650,
  "layers": 2,
  "dropout": 0.5,
  "init_scale": 0.05,
  "cudnn": False,
  "max_word_length": 65,
}

# Keys follow the paper's names. The smaller networks are for CPUs: the WRNs have no dropout, because they underfit
# anyway, and the DenseNets no rematerialisation.
MODELS = {
  "own": ConfigDict({"name": "own"}),  # the caller's: ban_jax.from_flax
  "wrn_28_1": _wide_resnet(28, 1),
  "wrn_28_2": _wide_resnet(28, 2),
  "wrn_28_5": _wide_resnet(28, 5),
  "wrn_28_10": _wide_resnet(28, 10),
  "wrn_16_4": ConfigDict({**_wide_resnet(16, 4), "dropout": 0.0}),
  "wrn_16_2": ConfigDict({**_wide_resnet(16, 2), "dropout": 0.0}),
  "wrn_16_1": ConfigDict({**_wide_resnet(16, 1), "dropout": 0.0}),
  "wrn_10_1": ConfigDict({**_wide_resnet(10, 1), "dropout": 0.0}),
  # The smallest, which compile in seconds: for tests, for the tables at the smoke scale, and to try something out.
  "mlp_16": ConfigDict({"name": "mlp", "units": 16, "layers": 1, "dropout": 0.0}),
  "mlp_32": ConfigDict({"name": "mlp", "units": 32, "layers": 2, "dropout": 0.1}),
  "mlp_256": ConfigDict({"name": "mlp", "units": 256, "layers": 2, "dropout": 0.0}),
  "densenet_112_33": _densenet(112, 33),
  "densenet_90_60": _densenet(90, 60),
  "densenet_80_80": _densenet(80, 80),
  "densenet_80_120": _densenet(80, 120),
  # Table 4, depth: DenseNet-90-60 with 7, 28, 42 and 56 units per stage; the growth is such that the widths at the end
  # of each stage stay the same.
  "densenet_90_60_depth_0_5": _densenet(46, 120, stem=120),
  "densenet_90_60_depth_2": _densenet(172, 30, stem=120),
  "densenet_90_60_depth_3": _densenet(256, 20, stem=120),
  "densenet_90_60_depth_4": _densenet(340, 15, stem=120),
  # Table 4, compression: taken as 0.5, 0.75 and 1.5 times one half, the fraction of channels that a transition removes.
  # These students keep the teacher's stage widths too (to within 4 channels), which determines the growth per stage.
  # The paper's counts are 5.1M, 10.1M, 80.5M; this interpretation gives 6.1M, 9.6M, 75.6M. Others that we tried: the
  # same growth in all stages 8.8M, 11.3M, 55.7M; more units instead of growth 7.7M, 10.9M, 56.2M; stem and growth
  # scaled 4.1M, 9.2M, 36.4M; the growth unchanged and the fraction kept scaled instead 12.4M, 14.1M, 21.9M.
  "densenet_90_60_compression_0_5": _densenet(90, (37, 29, 24), stem=120, compression=0.75),
  "densenet_90_60_compression_0_75": _densenet(90, (46, 41, 39), stem=120, compression=0.625),
  "densenet_90_60_compression_1_5": _densenet(90, (129, 154, 167), stem=120, compression=0.25),
  "densenet_40_12": _densenet(40, 12, remat=False),
  "densenet_22_12": _densenet(22, 12, remat=False),
  "densenet_16_8": _densenet(16, 8, remat=False),
  # A small Table 4: students of DenseNet-16-8 with 1, 4, 6 and 8 units per stage, and with other compressions.
  "densenet_10_16": _densenet(10, 16, stem=16, remat=False),
  "densenet_28_4": _densenet(28, 4, stem=16, remat=False),
  "densenet_40_3": _densenet(40, 3, stem=16, remat=False),
  "densenet_52_2": _densenet(52, 2, stem=16, remat=False),
  "densenet_16_8_compression_0_5": _densenet(16, 3, stem=16, compression=0.75, remat=False),
  "densenet_16_8_compression_0_75": _densenet(16, 5, stem=16, compression=0.625, remat=False),
  "densenet_16_8_compression_1_5": _densenet(16, 24, stem=16, compression=0.25, remat=False),
  "densenet_10_16_compression_0_75": _densenet(10, 10, stem=16, compression=0.625, remat=False),
  # Table 5, named by units and ratio, then the same for DenseNet-16-8.
  "pre_resnet_14_0_5": _matched_pre_resnet(14, 0.5, _WIDTHS_90_60),
  "pre_resnet_14_1": _matched_pre_resnet(14, 1.0, _WIDTHS_90_60),
  "wide_match_1_1": _matched_wide_resnet(1, 1.0, _WIDTHS_90_60),
  "wide_match_2_1": _matched_wide_resnet(2, 1.0, _WIDTHS_90_60),
  "wide_match_4_0_5": _matched_wide_resnet(4, 0.5, _WIDTHS_90_60),
  "wide_match_4_1": _matched_wide_resnet(4, 1.0, _WIDTHS_90_60),
  "small_pre_resnet_1_1": _matched_pre_resnet(1, 1.0, _WIDTHS_16_8),
  "small_pre_resnet_2_0_5": _matched_pre_resnet(2, 0.5, _WIDTHS_16_8),
  "small_pre_resnet_2_1": _matched_pre_resnet(2, 1.0, _WIDTHS_16_8),
  "small_wide_match_1_1": _matched_wide_resnet(1, 1.0, _WIDTHS_16_8),
  "small_wide_match_2_1": _matched_wide_resnet(2, 1.0, _WIDTHS_16_8),
  "small_wide_match_4_0_5": _matched_wide_resnet(4, 0.5, _WIDTHS_16_8),
  "small_wide_match_4_1": _matched_wide_resnet(4, 1.0, _WIDTHS_16_8),
  # He et al. 2016: of CIFAR, with the shortcuts without parameters (A) that they have there, and of ImageNet.
  "resnet_20": _resnet(3, 3, 3, width=16, projection=False, zero_scale=False),
  "resnet_56": _resnet(9, 9, 9, width=16, projection=False, zero_scale=False),
  "resnet_18": _resnet(2, 2, 2, 2),
  "resnet_50": _resnet(3, 4, 6, 3, bottleneck=True),
  # Kim et al. 2021 (PS-KD), for CIFAR: pre-activated blocks, a norm after the stem and none after the last block.
  "preact_resnet_18": _resnet(2, 2, 2, 2, zero_scale=False, preactivation=True),
  # Touvron et al. 2021, and one for 32x32 pixels.
  "vit_32": _transformer("vit", 128, 6, 4, patch=4, drop_path=0.1),
  "vit_ti_16": _transformer("vit", 192, 12, 3, patch=16, drop_path=0.1),
  "vit_s_16": _transformer("vit", 384, 12, 6, patch=16, drop_path=0.1),
  # By width: 0.2M, 0.8M and 10.6M parameters beside the embedding, and GPT-2 with 124M in all.
  "gpt_64": _transformer("gpt", 64, 4, 4, positions="rotary", dropout=0.1),
  "gpt_128": _transformer("gpt", 128, 4, 4, positions="rotary", dropout=0.1),
  "gpt_384": _transformer("gpt", 384, 6, 6, positions="rotary", dropout=0.1),
  "gpt_768": _transformer("gpt", 768, 12, 12, positions="learned", dropout=0.1),
  # Table 6. The paper's text says one layer, but 52M parameters fit two layers (51.0M; one layer has 33.0M).
  "lstm": _lstm(1500, 2, dropout=0.65, init_scale=0.04),
  "lstm_1": _lstm(1500, 1, dropout=0.65, init_scale=0.04),
  "lstm_200": _lstm(200, 2, dropout=0.2, init_scale=0.1),
  "lstm_32": _lstm(32, 2, dropout=0.2, init_scale=0.1),
  # Zaremba et al. 2014: the networks of their "non-regularized" and "medium regularized" rows.
  "zaremba_small": _lstm(200, 2, dropout=0.0, init_scale=0.1, tied=False),
  "zaremba_medium": _lstm(650, 2, dropout=0.5, init_scale=0.05, tied=False),
  "cnn_lstm": ConfigDict(_CNN_LSTM),
  "cnn_lstm_32": ConfigDict({**_CNN_LSTM, "filters_per_width": 4, "filters_at_most": 16, "units": 32}),
}

# Settings of a set of TFDS, at every scale, where they are not CIFAR's. ImageNet: Goyal et al. 2017 and He et al. 2019,
# whose rate of 0.1 is for batches of 256.
OF_TFDS = {
  "imagenet2012": {
    "data.stream": True,
    "data.size": 224,
    "data.view": "crops",
    "data.pad": 0,
    "data.test_split": "validation",
    "teacher.loss": "label_smoothing",
    "optim.learning_rate": 0.4,
    "optim.schedule": "cosine",
    "optim.warmup": 0.05,
    "optim.weight_decay": 1e-4,
    "optim.decay": "kernels",
    "train.epochs": 90,
    "train.batch_size": 1024,
    "train.ema": 0.9999,
    "evaluate.batch_size": 1000,
    "compute_dtype": "bfloat16",
  }
}

_ADAMW = {"optim.name": "adamw", "optim.decay": "kernels", "optim.schedule": "cosine", "optim.warmup": 0.05}
# Training settings of a network at every scale, by model name; image networks use the base's. The code that the paper
# took its language settings from sums the loss over the 35 tokens of a window, ours averages it: the same update needs
# 35 times the learning rate and 1/35 of the clip norm.
TRAINING = {
  # The paper's 1 and 10 would become 35 and 10 / 35; 20 and 0.25 are from PyTorch's word_language_model, which averages
  # too.
  "lstm": {
    "optim.learning_rate": 20.0,
    "optim.clip_norm": 0.25,
    "optim.factor": 0.25,
    "optim.threshold": 0.0,
    "train.batch_size": 32,
  },
  "char_cnn_lstm": {
    "optim.learning_rate": 2.0 * 35,
    "optim.clip_norm": 5.0 / 35,
    "optim.factor": 0.5,
    "optim.threshold": 0.5,
    "train.batch_size": 20,
  },
  # Touvron et al. 2021, whose rate of 5e-4 is for batches of 512; small data take more.
  "vit": {**_ADAMW, "optim.learning_rate": 5e-4, "optim.weight_decay": 0.05},
  # Brown et al. 2020: decay, clipping and the second moment's share; small networks take a higher rate than GPT-2's.
  "gpt": {
    **_ADAMW,
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 0.1,
    "optim.b2": 0.95,
    "optim.clip_norm": 1.0,
    "train.batch_size": 32,
    "evaluate.batch_size": 10,  # without a carry, any batch gives the same numbers
  },
}
TEXT_MODELS = ("char_cnn_lstm", "gpt", "lstm")

# Settings of an optimizer that is named by a word, where they differ from the base's, which are SGD's. Lion's rate is a
# tenth of AdamW's, and its decay ten times as large (Chen et al. 2023); Muon's updates have the size of AdamW's.
OPTIMIZER_SETTINGS = {
  "adamw": {"learning_rate": 1e-3, "weight_decay": 0.01, "decay": "kernels"},
  "lamb": {"learning_rate": 3e-3, "weight_decay": 0.01, "decay": "kernels"},
  "lion": {"learning_rate": 1e-4, "weight_decay": 0.1, "decay": "kernels", "b2": 0.99},
  "muon": {"learning_rate": 1e-3, "weight_decay": 0.01, "decay": "kernels", "momentum": 0.95},
  "schedule_free": {
    "learning_rate": 2.5e-3,
    "weight_decay": 0.01,
    "decay": "kernels",
    "schedule": "constant",
    "warmup": 0.05,
  },
}


def _is_text(config: ConfigDict) -> bool:
  return config.data.window > 0 or config.data.name == "own" and config.model.name in TEXT_MODELS


def _paper(config: ConfigDict) -> None:
  """The paper's durations: for images 200 epochs and three students, for text 40 epochs and one student."""


def _quick(config: ConfigDict) -> None:
  """One accelerator, under an hour."""
  config.train.epochs = 15 if _is_text(config) else 30


def _cpu(config: ConfigDict) -> None:
  """Two CPU cores: an hour for a teacher and a student on CIFAR, half a minute for a teacher and three on digits.

  With lstm_200, a teacher and a student take an hour or two on ptb and minutes on pydoc.
  """
  digits = config.data.name == "digits"
  config.train.epochs = 60 if digits else 10
  config.train.evaluate_every = 20 if digits else 1
  config.generations = 3 if digits else 1
  if not _is_text(config):
    # With so few epochs, the step schedule would spend most of them at learning rates too low to make progress.
    config.optim.schedule = "cosine"


def _smoke(config: ConfigDict) -> None:
  """Seconds, for tests: only shows that everything runs."""
  config.train.update(epochs=2, batch_size=20)
  config.generations = 1
  if _is_text(config):
    config.evaluate.update(batch_size=100, training_batch_size=100)
  else:
    config.evaluate.batch_size = 300
  if config.data.stream:  # parts of splits, since no subset is chosen by classes
    config.data.update(train_split="train[:200]", test_split=f"{config.data.test_split}[:100]")
  elif config.data.name != "own":
    config.data.update({"train_examples": 2000, "window": 10} if _is_text(config) else {"train_examples": 100})


SCALES = {"paper": _paper, "quick": _quick, "cpu": _cpu, "smoke": _smoke}


def compose(words: str, datasets: tuple[str, ...] = tuple(DATASETS)) -> ConfigDict:
  """Returns the locked configuration for the words `dataset,network,scale[,loss][,optimizer][,teacher=network]`.

  The word tfds=NAME is the data set NAME of TensorFlow Datasets. `datasets` are the data sets that the calling
  configuration file accepts. Raises a ConfigError that lists the choices for an unknown word.
  """
  if not isinstance(words, str):
    raise ConfigError(f'a configuration is named by one string, "dataset,network,scale", not by {words!r}')
  dataset, network, scale, *more = [word.strip() for word in words.split(",")] + [""] * (3 - len(words.split(",")))
  name, _, of_tfds = dataset.partition("=")
  form = f'a configuration is named "dataset,network,scale", not {words!r}'
  for word, known, what in ((name, datasets, "data set"), (network, MODELS, "network"), (scale, SCALES, "scale")):
    if word not in known:
      raise ConfigError(f"unknown {what} {word!r}; choose one of: {choices(known)} ({form})")
  config = base.get_config()
  config.model = _copy(network)
  DATASETS[name](config)
  config.data.dataset = of_tfds
  config.update_from_flattened_dict(OF_TFDS.get(of_tfds, {}))
  config.update_from_flattened_dict(TRAINING.get(config.model.name, {}))
  config.scale = scale
  SCALES[scale](config)
  for word in more:
    _apply_more(config, word)
  return config.lock()


def get_config(words: str = "digits,wrn_10_1,cpu") -> ConfigDict:
  """Returns the locked configuration for the words `dataset,network,scale[,loss][,optimizer][,teacher=network]`.

  It is what the configuration files of a checkout return. The loss is the students'; generation 0 has `teacher.loss`,
  by default the plain labels. "own" stands for data, or a network, that the caller gives as `dataset=` and `model=`.
  docs/configuration.md lists every word and every key.

  Args:
    words: the words, in one string.

  Returns:
    A ConfigDict, of which values can be changed: `cfg.train.epochs = 30`.

  Raises:
    ConfigError: for an unknown word; it lists the choices.

  Examples:
    >>> ban_jax.get_config("digits,wrn_10_1,cpu,ban_label").loss.name
    'ban_label'
  """
  return compose(words)


def of_record(values: Mapping[str, Any]) -> ConfigDict:
  """Returns the locked configuration that a record (`config.record`, also of an earlier version) is of.

  What the caller gave stands in it as "own". Raises a ConfigError for a key that this version does not know.
  """
  config = base.get_config()
  if values["data.name"] == "own":
    _own(config)
  for group, name in ((config, "model"), (config.teacher, "teacher.model")):
    options = {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
    if options:
      group.model = ConfigDict({"name": "own"} if options["name"] == "own" else _tuples(options))
  known = flatten_dict(config.to_dict(), sep=".")
  given = ("model.", "teacher.model", "dataset.", "optim.own")
  plain = {key: value for key, value in values.items() if not key.startswith(given)}
  if unknown := plain.keys() - known.keys():
    raise ConfigError(f"unknown configuration key {min(unknown)!r}; another version of ban_jax wrote the record")
  neutral = {key: value for key, value in neutral_values().items() if key in known}
  config.update_from_flattened_dict(_tuples({**neutral, **plain}))
  return config.lock()


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
  return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _copy(network: str) -> ConfigDict:
  return ConfigDict(MODELS[network].to_dict())


def _apply_more(config: ConfigDict, word: str) -> None:
  name, _, value = word.partition("=")
  if word in LOSSES:
    config.loss.name = word
  elif word in OPTIMIZERS:
    config.optim.update({"name": word, **OPTIMIZER_SETTINGS.get(word, {})})
  elif name == "teacher" and value in MODELS:
    config.teacher.model = _copy(value)
  else:
    raise ConfigError(
      f"unknown word {word!r}; the scale may be followed by a loss ({choices(LOSSES)}), an optimizer "
      f"({choices(OPTIMIZERS)}), or teacher=NETWORK, where NETWORK is one of: {choices(MODELS)}"
    )

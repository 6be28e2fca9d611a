"""What varies between configurations: data sets, networks and scales, each a function that changes a copy.

`compose("cifar10,wrn_16_1,cpu")` applies a data set's preset, a network's and a scale's to the base, in this order, and
further words behind them: a loss's name, or `teacher=NETWORK` for a generation 0 of another kind.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from ban_jax.errors import ConfigError, choices
from configs import base

Preset = Callable[[ConfigDict], None]


def _cifar(name: str) -> Preset:
  def apply(config: ConfigDict) -> None:
    config.data.name = name

  return apply


def _digits(config: ConfigDict) -> None:
  # Few training images, so that there are errors left to make; digits are not mirrored.
  config.data.update(name="digits", train_examples=200, pad=1, flip=False)
  config.train.update(batch_size=50)


DATASETS = {"cifar10": _cifar("cifar10"), "cifar100": _cifar("cifar100"), "digits": _digits}


def _wide_resnet(depth: int, width: int) -> ConfigDict:
  return ConfigDict({"name": "wide_resnet", "depth": depth, "width": width, "dropout": 0.3})


# By the paper's names. The smaller ones are for CPUs, and go without dropout: they underfit as it is.
MODELS = {
  "wrn_28_1": _wide_resnet(28, 1),
  "wrn_28_2": _wide_resnet(28, 2),
  "wrn_28_5": _wide_resnet(28, 5),
  "wrn_28_10": _wide_resnet(28, 10),
  "wrn_16_1": ConfigDict({**_wide_resnet(16, 1), "dropout": 0.0}),
  "wrn_10_1": ConfigDict({**_wide_resnet(10, 1), "dropout": 0.0}),
}


def _paper(config: ConfigDict) -> None:
  """The paper's durations: 200 epochs, three students."""


def _quick(config: ConfigDict) -> None:
  """One accelerator, under an hour."""
  config.train.epochs = 30


def _cpu(config: ConfigDict) -> None:
  """Two cores, under an hour a sequence: ten epochs, one student."""
  config.train.epochs = 10
  config.train.checkpoint_every = 200
  config.generations = 1
  # Squeezed into ten epochs, the steps leave most of them to rates too low to learn by.
  config.optim.schedule = "cosine"


def _smoke(config: ConfigDict) -> None:
  """Seconds, for tests: it shows that everything runs, and nothing else."""
  config.data.train_examples = 100
  config.train.update(epochs=2, batch_size=20, checkpoint_every=3)
  config.evaluate.batch_size = 300
  config.generations = 1


SCALES = {"paper": _paper, "quick": _quick, "cpu": _cpu, "smoke": _smoke}


def compose(words: str, datasets: tuple[str, ...] = tuple(DATASETS)) -> ConfigDict:
  """Returns the locked configuration that "dataset,network,scale[,loss][,teacher=network]" stands for.

  `datasets` are those that the calling configuration file offers. Raises a ConfigError that lists the choices for an
  unknown word.
  """
  dataset, network, scale, *more = [word.strip() for word in words.split(",")] + [""] * (3 - len(words.split(",")))
  form = f'a configuration is named "dataset,network,scale", not {words!r}'
  for word, known, what in ((dataset, datasets, "data set"), (network, MODELS, "network"), (scale, SCALES, "scale")):
    if word not in known:
      raise ConfigError(f"unknown {what} {word!r}; choose one of: {choices(known)} ({form})")
  config = base.get_config()
  DATASETS[dataset](config)
  config.model = _copy(network)
  config.scale = scale
  SCALES[scale](config)
  for word in more:
    _apply_more(config, word)
  return config.lock()


def _copy(network: str) -> ConfigDict:
  return ConfigDict(MODELS[network].to_dict())


def _apply_more(config: ConfigDict, word: str) -> None:
  from ban_jax.losses import LOSSES

  name, _, value = word.partition("=")
  if word in LOSSES:
    config.loss.name = word
  elif name == "teacher" and value in MODELS:
    config.teacher.model = _copy(value)
  else:
    raise ConfigError(
      f"unknown word {word!r}; after the scale may stand a loss ({choices(LOSSES)}) or teacher=NETWORK, where NETWORK "
      f"is one of: {choices(MODELS)}"
    )

"""CIFAR-10 and CIFAR-100, the data sets of Tables 1 to 5 of Furlanello et al. 2018 (arXiv:1805.04770).

python experiments/train.py --config=configs/cifar.py:cifar100,wrn_28_1,paper --workdir=runs/c100
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "cifar100,wrn_28_1,paper") -> ConfigDict:
  """Returns the locked configuration for the words "dataset,network,scale[,more]"; see ban_jax/presets."""
  return presets.compose(words, ("cifar10", "cifar100"))

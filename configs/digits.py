"""Handwritten digits from scikit-learn, 200 of them for training; nothing to download.

python experiments/train.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "digits,wrn_10_1,cpu") -> ConfigDict:
  """Returns the locked configuration for the words "digits,network,scale[,more]"; see ban_jax/presets."""
  return presets.compose(words, ("digits",))

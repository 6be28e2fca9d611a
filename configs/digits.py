"""Handwritten digits out of scikit-learn, 200 of them for training: the embedded data set, nothing to download.

python experiments/train.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from configs import presets


def get_config(words: str = "digits,wrn_10_1,cpu") -> ConfigDict:
  """Returns the locked configuration that "digits,network,scale[,more]" stands for (presets.py)."""
  return presets.compose(words, ("digits",))

"""enwik8, bytes, from the file of this name; its test split is reported in bits per byte.

python experiments/train.py --config=configs/enwik8.py:enwik8,gpt_384,quick --config.data.dir=DIR --workdir=runs/enwik8
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "enwik8,gpt_384,quick") -> ConfigDict:
  """Returns the locked configuration for the words "dataset,network,scale[,more]"; see ban_jax/presets."""
  return presets.compose(words, ("enwik8",))

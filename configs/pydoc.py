"""Topics of the Python manual, shipped with CPython: a small text for tests and demonstrations; nothing to download.

python experiments/train.py --config=configs/pydoc.py --workdir=runs/pydoc

Results differ between Python versions and are not comparable with any published number.
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "pydoc,lstm_32,cpu") -> ConfigDict:
  """Returns the locked configuration for the words "dataset,network,scale[,more]"; see ban_jax/presets."""
  return presets.compose(words, ("pydoc",))

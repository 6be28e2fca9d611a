"""Topics of the Python manual that come with CPython: a small text for tests and demonstrations, nothing to download.

python experiments/train.py --config=configs/pydoc.py --workdir=runs/pydoc

Its numbers compare with nothing published, and differ between versions of Python.
"""

from ml_collections import ConfigDict

from configs import presets


def get_config(words: str = "pydoc,lstm_32,cpu") -> ConfigDict:
  """Returns the locked configuration that "dataset,network,scale[,more]" stands for (presets.py)."""
  return presets.compose(words, ("pydoc",))

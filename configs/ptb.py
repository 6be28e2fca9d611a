"""The Penn Treebank, the text of Table 6 of Furlanello et al. 2018 (arXiv:1805.04770).

python experiments/train.py --config=configs/ptb.py:ptb,lstm,paper --config.data.dir=PTB --workdir=runs/ptb

PTB is a directory with ptb.train.txt, ptb.valid.txt and ptb.test.txt (Mikolov's split), which you have to supply.
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "ptb,lstm,paper") -> ConfigDict:
  """Returns the locked configuration for the words "dataset,network,scale[,more]"; see ban_jax/presets."""
  return presets.compose(words, ("ptb",))

"""WikiText-2 and WikiText-103, words, from wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.

python experiments/train.py --config=configs/wikitext.py:wikitext,gpt_384,quick --config.data.dir=DIR --workdir=runs/wt
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "wikitext,gpt_384,quick") -> ConfigDict:
  """Returns the locked configuration for the words "dataset,network,scale[,more]"; see ban_jax/presets."""
  return presets.compose(words, ("wikitext",))

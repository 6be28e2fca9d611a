"""The base configuration, made of ban_jax/keys.py, which says of every key what it means."""

from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict, FieldReference

from ban_jax.keys import KEYS


def get_config() -> ConfigDict:
  """Returns the base configuration, which `presets.compose` turns into the configuration of a run."""
  # A reference of type object may hold values of several types.
  values = {
    name: FieldReference(key.default, field_type=object) if key.several_types else key.default
    for name, key in KEYS.items()
  }
  config = ConfigDict(unflatten_dict(values, sep="."))
  # The students' network: a key of ban_jax.models.MODELS and that network's options, which its file describes.
  config.model = ConfigDict({"name": "wide_resnet", "depth": 28, "width": 10, "dropout": 0.3})
  # The network of generation 0, a group like `model`; None for the same network as the students'.
  config.teacher.model = None
  return config

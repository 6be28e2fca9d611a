"""The base configuration, with all keys: ban_jax/keys.py documents them."""

from ban_jax.presets.base import get_config

__all__ = ["get_config"]

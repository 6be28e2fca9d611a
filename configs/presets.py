"""The presets of data sets, networks and scales: ban_jax/presets/__init__.py has them."""

from ban_jax.presets import DATASETS, MODELS, SCALES, TRAINING, compose

__all__ = ["DATASETS", "MODELS", "SCALES", "TRAINING", "compose"]

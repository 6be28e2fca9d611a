"""Born-Again Networks in JAX and Flax: self-distillation over generations (Furlanello et al., ICML 2018)."""

from ban_jax.errors import (
  BanError,
  CheckpointError,
  ConfigError,
  DataError,
  InUseError,
  PeerError,
  Preempted,
  StorageError,
  TrainingError,
)
from ban_jax.evaluate import compare, evaluate, reliability
from ban_jax.loading import load, load_run
from ban_jax.memory import keep_freed_memory
from ban_jax.train import run, train_generation
from ban_jax.types import Generation
from ban_jax.version import __version__

__all__ = [
  "BanError",
  "CheckpointError",
  "ConfigError",
  "DataError",
  "Generation",
  "InUseError",
  "PeerError",
  "Preempted",
  "StorageError",
  "TrainingError",
  "__version__",
  "compare",
  "evaluate",
  "keep_freed_memory",
  "load",
  "load_run",
  "reliability",
  "run",
  "train_generation",
]

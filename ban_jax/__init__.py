"""Born-Again Networks in JAX and Flax: self-distillation over generations (Furlanello et al., ICML 2018)."""

from typing import TYPE_CHECKING, Any

from ban_jax.averaging import average
from ban_jax.card import export_card
from ban_jax.data.own import from_arrays
from ban_jax.data.own_text import from_text
from ban_jax.data.source import from_source
from ban_jax.data.token_files import from_tokens
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
from ban_jax.evaluating import compare, evaluate, reliability
from ban_jax.exporting import export, export_parameters
from ban_jax.generations import run, train_generation
from ban_jax.language import log_probabilities, sample
from ban_jax.loading import load, load_config, load_run, with_network
from ban_jax.memory import keep_freed_memory, keep_programs
from ban_jax.models.own import from_flax, from_function
from ban_jax.optim import Optimizer, from_optax
from ban_jax.plotting import plot_agreement, plot_calibration, plot_dark_knowledge
from ban_jax.predicting import normalise, predict
from ban_jax.presets import get_config
from ban_jax.profiling import trace_steps
from ban_jax.resolving import Setup, setup
from ban_jax.summary import seed_table
from ban_jax.types import Dataset, Generation, Model
from ban_jax.version import __version__

if TYPE_CHECKING:
  from ban_jax.models.nnx import from_nnx

__all__ = [
  "BanError",
  "CheckpointError",
  "ConfigError",
  "DataError",
  "Dataset",
  "Generation",
  "InUseError",
  "Model",
  "Optimizer",
  "PeerError",
  "Preempted",
  "Setup",
  "StorageError",
  "TrainingError",
  "__version__",
  "average",
  "compare",
  "evaluate",
  "export",
  "export_card",
  "export_parameters",
  "from_arrays",
  "from_flax",
  "from_function",
  "from_nnx",
  "from_optax",
  "from_source",
  "from_text",
  "from_tokens",
  "get_config",
  "keep_freed_memory",
  "keep_programs",
  "load",
  "load_config",
  "load_run",
  "log_probabilities",
  "normalise",
  "plot_agreement",
  "plot_calibration",
  "plot_dark_knowledge",
  "predict",
  "reliability",
  "run",
  "sample",
  "seed_table",
  "setup",
  "trace_steps",
  "train_generation",
  "with_network",
]


def __getattr__(name: str) -> Any:
  """Returns `from_nnx` once it is asked for: Flax NNX takes a sixth of the time that all else takes to import."""
  if name == "from_nnx":
    from ban_jax.models.nnx import from_nnx

    return from_nnx
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The networks. A new one is one file and one entry in MODELS."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ban_jax import devices
from ban_jax.errors import ConfigError, choices, look_up
from ban_jax.models.char_cnn_lstm import char_cnn_lstm
from ban_jax.models.densenet import densenet
from ban_jax.models.lstm import lstm
from ban_jax.models.matched_resnet import matched_pre_resnet, matched_wide_resnet
from ban_jax.models.wide_resnet import wide_resnet
from ban_jax.types import InputSpec, Model

MODELS = {
  "char_cnn_lstm": char_cnn_lstm,
  "densenet": densenet,
  "lstm": lstm,
  "matched_pre_resnet": matched_pre_resnet,
  "matched_wide_resnet": matched_wide_resnet,
  "wide_resnet": wide_resnet,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check_options(model: Mapping[str, Any], key: str = "model") -> tuple[Callable[..., Model], dict[str, Any]]:
  """Returns a `model` group's factory and options; raises a ConfigError for an unknown name, or options not its own.

  `key` is the group's, for the message where it is no group or has no name.
  """
  if not isinstance(model, Mapping | ConfigDict) or not isinstance(dict(model).get("name"), str):
    raise ConfigError(f"{key} must be a group with a name, one of: {choices(MODELS)}; it is {str(model).strip()!r}")
  options = dict(model.items())
  factory = look_up(MODELS, options.pop("name"), key)
  parameters = inspect.signature(factory).parameters.values()
  accepted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("dtype", "axis_name")]
  if sorted(options) != sorted(accepted):
    raise ConfigError(
      f"model {model['name']!r} takes the options {', '.join(accepted)}; the configuration gives "
      f"{', '.join(options) or 'none'}"
    )
  return factory, options


def make_model(
  model: Mapping[str, Any],
  spec: InputSpec,
  *,
  compute_dtype: str = "float32",
  sync_batch_stats: bool = True,
  key: str = "model",
) -> Model:
  """Returns the network that a `model` group of a configuration names; equal arguments give the same object.

  With `sync_batch_stats` its training mode runs only under a mapped axis (devices.AXIS). `key` is the group's, for
  messages. Raises a ConfigError for an unknown name, dtype or option, for a missing option, and for one out of range.
  """
  factory, options = check_options(model, key)
  dtype = look_up(DTYPES, compute_dtype, "compute_dtype")
  frozen = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in sorted(options.items()))
  try:
    return _make(factory, spec, dtype, devices.AXIS if sync_batch_stats else None, frozen)
  except ConfigError as error:  # a network knows its options, and not whose it is: "model.depth=11: ..."
    raise ConfigError(str(error).replace("model.", f"{key}.")) from error


@functools.lru_cache
def _make(factory, spec: InputSpec, dtype: Any, axis_name: str | None, options: tuple) -> Model:
  return factory(spec, dtype=dtype, axis_name=axis_name, **dict(options))

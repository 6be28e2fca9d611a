"""The networks; a new one is one file and one entry in MODELS."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from ban_jax.devices import AXIS
from ban_jax.errors import ConfigError, choices, look_up
from ban_jax.models import common
from ban_jax.models.char_cnn_lstm import CharCNNLSTMOptions, char_cnn_lstm
from ban_jax.models.densenet import DenseNetOptions, densenet
from ban_jax.models.gpt import GPTOptions, gpt
from ban_jax.models.lstm import LSTMOptions, lstm
from ban_jax.models.matched_resnet import MatchedPreResNetOptions, MatchedWideResNetOptions, matched_resnet
from ban_jax.models.mlp import MLPOptions, mlp
from ban_jax.models.own import OwnOptions, own
from ban_jax.models.resnet import ResNetOptions, resnet
from ban_jax.models.vit import ViTOptions, vit
from ban_jax.models.wide_resnet import WideResNetOptions, wide_resnet
from ban_jax.registry import Registry
from ban_jax.types import Devices, InputSpec, Model, Recipe


class ModelKind(NamedTuple):
  """A kind of network: the dataclass that holds its options, and the function that builds it from them."""

  options: type[Any]  # frozen and keyword-only; checks the values
  make: Callable[..., Model]  # (spec, options, *, dtype, axis_name) -> Model


_ENTRIES = {
  "char_cnn_lstm": ModelKind(CharCNNLSTMOptions, char_cnn_lstm),
  "densenet": ModelKind(DenseNetOptions, densenet),
  "gpt": ModelKind(GPTOptions, gpt),
  "lstm": ModelKind(LSTMOptions, lstm),
  "matched_pre_resnet": ModelKind(MatchedPreResNetOptions, matched_resnet),
  "matched_wide_resnet": ModelKind(MatchedWideResNetOptions, matched_resnet),
  "mlp": ModelKind(MLPOptions, mlp),
  "own": ModelKind(OwnOptions, own),
  "resnet": ModelKind(ResNetOptions, resnet),
  "vit": ModelKind(ViTOptions, vit),
  "wide_resnet": ModelKind(WideResNetOptions, wide_resnet),
}
MODELS = Registry("model.name", "model", _ENTRIES)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def defaults(name: str) -> dict[str, Any]:
  """Returns those options of a network that have a default: they came later, and earlier records lack them."""
  fields = dataclasses.fields(MODELS[name].options) if name in MODELS else ()
  return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def check_options(group: Mapping[str, Any], key: str = "model") -> tuple[Callable[..., Model], Any]:
  """Returns the factory and the options that a `model` group of a configuration stands for.

  `key` is the group's name in the configuration, used in messages. Raises a ConfigError for an unknown network, for
  unknown or missing options, and for a value out of range.
  """
  if not isinstance(group, Mapping | ConfigDict) or not isinstance(dict(group).get("name"), str):
    raise ConfigError(f"{key} must be a group with a name, one of: {choices(MODELS)}; it is {str(group).strip()!r}")
  values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
  name = values.pop("name")
  kind = look_up(MODELS, name, key)
  accepted = MODELS.options(name)
  if not set(accepted) - defaults(name).keys() <= values.keys() <= set(accepted):
    raise ConfigError(
      f"model {name!r} takes the options {', '.join(accepted)}; the configuration gives {', '.join(values) or 'none'}"
    )
  for option, value in values.items():
    if value is None:
      raise ConfigError(f"{key}.{option} is None: expected a value")
  with _messages_about(key):
    return kind.make, kind.options(**values)


def make_model(
  group: Mapping[str, Any],
  spec: InputSpec,
  *,
  compute_dtype: str = "float32",
  sync_batch_stats: bool = True,
  key: str = "model",
  devices: Devices = (),
) -> Model:
  """Returns the network that a `model` group of a configuration stands for; equal arguments give the same object.

  With `sync_batch_stats`, training mode runs only under a mapped axis (devices.AXIS). Raises the ConfigErrors of
  `check_options`, and one for an unknown dtype, where network and data set do not fit, or where the network cannot run
  on the `devices` that it is to run on.
  """
  factory, options = check_options(group, key)
  dtype = look_up(DTYPES, compute_dtype, "compute_dtype")
  with _messages_about(key):
    if getattr(options, "cudnn", False):
      common.check_cudnn(dtype, options.cudnn_dtype, devices)
    return _make(factory, spec, options, dtype, AXIS if sync_batch_stats else None)


@functools.lru_cache
def _make(factory: Callable[..., Model], spec: InputSpec, options: Any, dtype: Any, axis_name: str | None) -> Model:
  made = factory(spec, options, dtype=dtype, axis_name=axis_name)
  return made._replace(recipe=Recipe(_make, factory, spec, options, dtype, axis_name))


@contextlib.contextmanager
def _messages_about(key: str) -> Iterator[None]:
  """Replaces the prefix in "model.depth=11: ..." by `key`: a network does not know which group its options are from."""
  try:
    yield
  except ConfigError as error:
    raise ConfigError(str(error).replace("model.", f"{key}.")) from error

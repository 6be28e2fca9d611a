"""A multi-layer perceptron for images: the smallest network here, which trains and compiles in a moment."""

import dataclasses
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.models import common
from ban_jax.types import InputSpec, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPOptions:
  """Options of `mlp`; raises a ConfigError for a value out of range."""

  units: int  # of each hidden layer
  layers: int  # number of hidden layers
  dropout: float  # rate after each hidden layer, in [0, 1)

  def __post_init__(self):
    common.check_at_least(1, units=self.units, layers=self.layers)
    common.check_dropout(self.dropout)


class MLP(nn.Module):
  """Hidden layers of linear, BN-ReLU and dropout on the flattened image, and a linear classifier."""

  options: MLPOptions
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    x = x.reshape(x.shape[0], -1)
    for layer in range(1, self.options.layers + 1):
      x = nn.Dense(
        self.options.units,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=common.he_normal,
        name=f"layer{layer}",
      )(x)
      x = common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name=f"norm{layer}")
      x = common.Dropout(self.options.dropout)(x, train=train, positions=positions)
    return common.classifier(x, self.num_classes, self.dtype)


def mlp(spec: InputSpec, options: MLPOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns a perceptron; raises a ConfigError for a data set of text."""
  name = f"mlp_{options.layers}_{options.units}"
  common.require_kind(name, "images", spec)
  return common.from_module(name, MLP(options, spec.num_classes, dtype, axis_name), spec)

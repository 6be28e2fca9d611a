"""What the transformers share: options, pre-norm blocks of attention and an MLP, dropout and drop-path by position."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerOptions:
  """Options that all transformers have; raises a ConfigError for a value out of range."""

  width: int  # channels of a token
  layers: int
  heads: int  # of attention, each with width / heads channels
  dropout: float  # rate after the embedding, after attention and after the MLP, in [0, 1); none of attention's weights
  drop_path: float  # rate at which the last layer leaves an example's branch out, in [0, 1); rises linearly with depth
  cudnn: bool  # compute attention with cuDNN's flash attention: bfloat16 on NVIDIA GPUs only
  cudnn_dtype: ClassVar[Any] = jnp.bfloat16

  def __post_init__(self):
    common.check_at_least(1, width=self.width, layers=self.layers, heads=self.heads)
    if self.width % self.heads:
      raise ConfigError(f"model.width={self.width}: a multiple of model.heads={self.heads} is expected")
    common.check_dropout(self.dropout)
    common.check_dropout(self.drop_path, "drop_path")
    common.check_bool(cudnn=self.cudnn)
    if self.cudnn and self.width // self.heads % 8:
      raise ConfigError(
        f"model.cudnn=True: a multiple of 8 channels per head is expected, not model.width={self.width} / "
        f"model.heads={self.heads}"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
  """In what the published networks differ."""

  causal: bool  # whether a token attends to itself and those before it alone, or to all
  epsilon: float  # of the layer norms
  tanh: bool  # whether GELU is its approximation by tanh
  init: nn.initializers.Initializer  # of the kernels
  last_init: nn.initializers.Initializer  # of the kernels whose product is added to the residual stream
  rotary: bool = False  # whether queries and keys are turned by their places (Su et al. 2021)


def layer_norm(style: Style, dtype: Any, name: str) -> nn.LayerNorm:
  """Returns layer normalisation, whose mean and variance are float32 and take two passes."""
  return nn.LayerNorm(epsilon=style.epsilon, use_fast_variance=False, dtype=dtype, name=name)


def rotate(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
  """Turns channel pairs (i, i + H / 2) of the token at place t by the angle t / 10000^(2 i / H), in float32."""
  half = x.shape[-1] // 2
  frequencies = 10_000.0 ** (-jnp.arange(half) / half)
  angles = jnp.arange(x.shape[1])[:, None, None] * frequencies  # [T, 1, H / 2]
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
  """A pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)); the MLP is four times as wide inside.

  Queries, keys and values are one product; each head has its own part of each.
  """

  options: TransformerOptions
  style: Style
  drop_path: float
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B T D"]:
    options, style = self.options, self.style

    def dense(x, width, init, name):
      # Batch and time are merged: on CPUs, XLA takes twice as long for the kernel's gradient if it contracts two axes.
      layer = nn.Dense(width, dtype=self.dtype, kernel_init=init, name=name)
      return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], width)

    def branch(y, name):
      y = common.Dropout(options.dropout, name=f"{name}_dropout")(y, train=train, positions=positions)
      return common.drop_path(y, self.drop_path, train=train, positions=positions, name=f"{name}_path")

    y = dense(layer_norm(style, self.dtype, "norm1")(x), 3 * options.width, style.init, "qkv")
    q, k, v = jnp.moveaxis(y.reshape(*y.shape[:2], 3, options.heads, -1), 2, 0)  # [B, T, heads, D / heads] each
    if style.rotary:
      q, k = rotate(q), rotate(k)
    kind: Literal["cudnn", "xla"] = "cudnn" if options.cudnn else "xla"
    y = jax.nn.dot_product_attention(q, k, v, is_causal=style.causal, implementation=kind).reshape(x.shape)
    x = x + branch(dense(y, options.width, style.last_init, "attention"), "attention")
    y = dense(layer_norm(style, self.dtype, "norm2")(x), 4 * options.width, style.init, "mlp_in")
    y = nn.gelu(y, approximate=style.tanh)
    return x + branch(dense(y, options.width, style.last_init, "mlp_out"), "mlp")


class Stack(nn.Module):
  """Dropout, the blocks, and a norm."""

  options: TransformerOptions
  style: Style
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B T D"]:
    options = self.options
    x = common.Dropout(options.dropout, name="dropout")(x, train=train, positions=positions)
    for number in range(1, options.layers + 1):
      drop_path = options.drop_path * number / options.layers
      x = Block(options, self.style, drop_path, self.dtype, name=f"layer{number}")(x, train=train, positions=positions)
    return layer_norm(self.style, self.dtype, "norm")(x)

"""The vision transformer (Dosovitskiy et al. 2021), of the sizes and initial values of DeiT (Touvron et al. 2021)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common, transformer
from ban_jax.types import InputSpec, Model

# PyTorch's trunc_normal_ of DeiT: a deviation of 0.02, cut off far outside.
INIT = nn.initializers.normal(0.02)
STYLE = transformer.Style(causal=False, epsilon=1e-6, tanh=False, init=INIT, last_init=INIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTOptions(transformer.TransformerOptions):
  """Options of `vit`; raises a ConfigError for a value out of range."""

  patch: int  # pixels of a patch's side

  def __post_init__(self):
    super().__post_init__()
    common.check_at_least(1, patch=self.patch)


class ViT(nn.Module):
  """A linear embedding of patches, a class token and learned positions, blocks, and a classifier of the class token."""

  options: ViTOptions
  num_classes: int
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    width, patch = self.options.width, self.options.patch
    batch, height, breadth, channels = x.shape
    x = x.reshape(batch, height // patch, patch, breadth // patch, patch, channels)
    x = x.swapaxes(2, 3).reshape(-1, patch * patch * channels)  # [B patches, inputs], the inputs row by row
    x = nn.Dense(width, dtype=self.dtype, kernel_init=INIT, name="patches")(x).reshape(batch, -1, width)
    token = self.param("token", INIT, (1, 1, width)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x], axis=1)
    x = x + self.param("positions", INIT, (1, x.shape[1], width)).astype(self.dtype)
    x = transformer.Stack(self.options, STYLE, self.dtype, name="stack")(x, train=train, positions=positions)
    classifier = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=INIT, name="classifier")
    return classifier(x[:, 0]).astype(jnp.float32)


def vit(spec: InputSpec, options: ViTOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns ViT; raises a ConfigError for text, images that are no whole patches, and cuDNN if it cannot run here."""
  del axis_name  # no batch norm
  name = f"vit_{options.layers}x{options.width}_{options.patch}"
  common.require_kind(name, "images", spec)
  if spec.shape[0] % options.patch or spec.shape[1] % options.patch:
    raise ConfigError(
      f"model.patch={options.patch}: a divisor of the images' sides, {spec.shape[0]} and {spec.shape[1]}, is expected"
    )
  return common.from_module(name, ViT(options, spec.num_classes, dtype), spec)

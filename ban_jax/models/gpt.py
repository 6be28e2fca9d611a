"""A decoder-only transformer for text: GPT-2 (Radford et al. 2019), with learned or rotary positions."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common, transformer
from ban_jax.types import InputSpec, Model

POSITIONS = ("learned", "rotary")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTOptions(transformer.TransformerOptions):
  """Options of `gpt`; raises a ConfigError for a value out of range."""

  positions: str  # "learned", a vector for each place of the window, or "rotary", without parameters

  def __post_init__(self):
    super().__post_init__()
    if self.positions not in POSITIONS:
      raise ConfigError(f"model.positions={self.positions!r}: learned or rotary is expected")
    if self.positions == "rotary" and self.width // self.heads % 2:
      raise ConfigError(
        f"model.positions='rotary': an even number of channels per head is expected, not model.width={self.width} / "
        f"model.heads={self.heads}"
      )


class GPT(nn.Module):
  """An embedding, causal blocks, and the embedding matrix again as the output kernel."""

  options: GPTOptions
  window: int
  num_classes: int
  dtype: Any

  @nn.compact
  def __call__(
    self, inputs: Int[Array, "B T"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B T n"]:
    options, init = self.options, nn.initializers.normal(0.02)
    style = transformer.Style(
      causal=True,
      epsilon=1e-5,
      tanh=True,
      init=init,
      # Each layer adds two products to the residual stream.
      last_init=nn.initializers.normal(0.02 / math.sqrt(2 * options.layers)),
      rotary=options.positions == "rotary",
    )
    embedding = nn.Embed(self.num_classes, options.width, dtype=self.dtype, embedding_init=init, name="embedding")
    x = embedding(inputs)
    if options.positions == "learned":
      table = self.param("positions", init, (self.window, options.width))
      x = x + table[: inputs.shape[1]].astype(self.dtype)
    x = transformer.Stack(options, style, self.dtype, name="stack")(x, train=train, positions=positions)
    # Merged as in the blocks.
    logits = embedding.attend(x.reshape(-1, options.width)).astype(jnp.float32)  # [B T, n]
    return logits.reshape(*inputs.shape, -1)


def gpt(spec: InputSpec, options: GPTOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns a language model that reads each window on its own; raises a ConfigError for images, and as `vit`."""
  del axis_name  # no batch norm
  name = f"gpt_{options.layers}x{options.width}"
  common.require_kind(name, "tokens", spec)
  return common.from_module(name, GPT(options, spec.shape[0], spec.num_classes, dtype), spec)

"""The word-level LSTM language model (Zaremba et al. 2014), in Table 6 with tied input and output embeddings."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.models import common, recurrent
from ban_jax.types import InputSpec, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTMOptions(recurrent.StackOptions):
  """Options of `lstm`; embeddings have `units` dimensions, and `dropout` also follows the input embedding."""

  # Whether the output kernel is the embedding matrix (Table 6), or one of its own (Zaremba et al. 2014).
  tied: bool = True

  def __post_init__(self):
    super().__post_init__()
    common.check_bool(tied=self.tied)


class LSTM(nn.Module):
  """Embedding, dropout, LSTM layers with dropout after each, and an output kernel, the embedding matrix if tied."""

  options: LSTMOptions
  num_classes: int
  dtype: Any

  @nn.compact
  def __call__(
    self,
    inputs: Int[Array, "B T"],
    carry: tuple[recurrent.State, ...],
    *,
    train: bool,
    positions: Int[Array, " B"] | None,
  ) -> tuple[Float[Array, "B T n"], tuple[recurrent.State, ...]]:
    units, init = self.options.units, recurrent.uniform(self.options.init_scale)
    embedding = nn.Embed(self.num_classes, units, dtype=self.dtype, embedding_init=init, name="embedding")
    bias = self.param("bias", init, (self.num_classes,))
    x = common.Dropout(self.options.dropout, name="dropout")(embedding(inputs), train=train, positions=positions)
    stack = recurrent.LSTMStack(self.options, self.dtype, name="lstm")
    x, carry = stack(x, carry, train=train, positions=positions)
    # Batch and time are merged: on CPUs, XLA takes twice as long for the kernel's gradient if it contracts two axes.
    x = x.reshape(-1, units)
    if self.options.tied:
      logits = embedding.attend(x)  # [B T, n]
    else:
      logits = x @ self.param("output_kernel", init, (units, self.num_classes)).astype(self.dtype)
    logits = logits.astype(jnp.float32) + bias
    return logits.reshape(*inputs.shape, -1), carry


def lstm(spec: InputSpec, options: LSTMOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns a language model over words; raises a ConfigError for images."""
  del axis_name  # no batch norm
  name = f"lstm_{options.layers}x{options.units}"
  common.require_kind(name, "tokens", spec)
  return recurrent.from_token_module(name, LSTM(options, spec.num_classes, dtype), spec, options)

"""The word-level LSTM language model of Table 6 (Zaremba et al. 2014, large), with tied input and output embeddings."""

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


class TiedLSTM(nn.Module):
  """Embedding, dropout, LSTM layers with dropout after each, and the embedding matrix again as the output kernel."""

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
    logits = embedding.attend(x.reshape(-1, units)).astype(jnp.float32) + bias  # [B T, n]
    return logits.reshape(*inputs.shape, -1), carry


def lstm(spec: InputSpec, options: LSTMOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns a language model over words; raises a ConfigError for images."""
  del axis_name  # no batch norm
  name = f"lstm_{options.layers}x{options.units}"
  common.require_kind(name, "tokens", spec)
  return recurrent.from_token_module(name, TiedLSTM(options, spec.num_classes, dtype), spec, options)

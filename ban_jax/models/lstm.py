"""The word-level LSTM language model of Table 6 (Zaremba et al. 2014, large), input and output embeddings tied."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.models import common, recurrent
from ban_jax.types import InputSpec, Model


class TiedLSTM(nn.Module):
  """Embedding, dropout, LSTM layers with dropout behind each, and the embedding once more as the output's kernel."""

  units: int
  layers: int
  dropout: float
  init_scale: float
  cudnn: bool
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
    draw = recurrent.uniform(self.init_scale)
    embedding = nn.Embed(self.num_classes, self.units, dtype=self.dtype, embedding_init=draw, name="embedding")
    bias = self.param("bias", draw, (self.num_classes,))
    x = common.Dropout(self.dropout, name="dropout")(embedding(inputs), train=train, positions=positions)
    stack = recurrent.LSTMStack(
      self.units, self.layers, self.dropout, self.init_scale, self.cudnn, self.dtype, name="lstm"
    )
    x, carry = stack(x, carry, train=train, positions=positions)
    # By rows: XLA's CPU back end computes the kernel's gradient at half the speed where it has to sum over two axes.
    logits = embedding.attend(x.reshape(-1, self.units)).astype(jnp.float32) + bias  # [B T, n]
    return logits.reshape(*inputs.shape, -1), carry


def lstm(
  spec: InputSpec,
  *,
  dtype: Any,
  axis_name: str | None,
  units: int,
  layers: int,
  dropout: float,
  init_scale: float,
  cudnn: bool,
) -> Model:
  """Returns a language model of `layers` LSTM layers of `units` units, over word embeddings of the same size.

  Every parameter is drawn evenly from +-`init_scale`, biases too. A layer has one bias of 4 `units`. With `cudnn` the
  layers run by cuDNN, from and to the same parameters; float32 on NVIDIA GPUs only. Raises a ConfigError for an option
  out of range, for images, and where cuDNN was asked for and cannot be had.
  """
  recurrent.check_options(units=units, layers=layers, dropout=dropout, init_scale=init_scale, cudnn=cudnn, dtype=dtype)
  name = f"lstm_{layers}x{units}"
  common.require_kind(name, "tokens", spec)
  module = TiedLSTM(units, layers, dropout, init_scale, cudnn, spec.num_classes, dtype)
  return recurrent.from_token_module(name, module, spec, units=units, layers=layers)

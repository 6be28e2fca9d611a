"""The CNN-LSTM language model of Table 6: words read as characters (Kim et al. 2016, large), an LSTM over them."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common, recurrent
from ban_jax.types import InputSpec, Model

# Words that stand for something: one symbol each, so that they share no character with the words that are written so.
SYMBOLS = ("<eos>", "<unk>")
# Numbers in a character table; the characters' follow.
PADDING, BEGIN, END = range(3)
GATE_BIAS = -2.0  # a highway layer begins by carrying most of its input through


def spell(word: str, max_word_length: int) -> tuple[str, ...]:
  """Returns what is read of a word between its boundaries: its characters, or one symbol for a word of SYMBOLS.

  With both boundaries it is at most `max_word_length` long; what is beyond is cut off.
  """
  return (word,) if word in SYMBOLS else tuple(word[: max_word_length - 2])


def character_table(words: Iterable[str], max_word_length: int, width: int) -> tuple[Int[np.ndarray, "V L"], int]:
  """Returns every word as the numbers of its characters, and how many numbers there are, padding included.

  Row i is BEGIN, the characters of word i in their order, END, PADDING. L is the longest word's length, at least
  `width`. The characters are those of `words`, numbered in sorted order.
  """
  spellings = [spell(word, max_word_length) for word in words]
  numbers = {character: number for number, character in enumerate(sorted(set().union(*spellings)), END + 1)}
  table = np.full((len(spellings), max(width, *(len(spelling) + 2 for spelling in spellings))), PADDING, np.int32)
  for row, spelling in zip(table, spellings, strict=True):
    row[: len(spelling) + 2] = [BEGIN, *(numbers[character] for character in spelling), END]
  return table, END + 1 + len(numbers)


class CharacterCNN(nn.Module):
  """A word's vector: for every filter the largest of its values along the word, tanh behind.

  A filter of width w stands at the places where it lies within the word, boundaries included; a shorter word is filled
  up to w by zeros. So a word's vector does not depend on how long other words are.
  """

  embedding: int
  filters: tuple[int, ...]  # of widths 1, 2, ...
  characters: int
  init_scale: float
  dtype: Any

  @nn.compact
  def __call__(self, characters: Int[Array, "*N L"]) -> Float[Array, "*N C"]:
    draw = recurrent.uniform(self.init_scale)
    embed = nn.Embed(self.characters, self.embedding, dtype=self.dtype, embedding_init=draw, name="embedding")
    written = characters != PADDING
    x = embed(characters) * written[..., None]  # [*N, L, E]
    length = written.sum(-1, keepdims=True)  # [*N, 1]
    vectors = []
    for width, filters in enumerate(self.filters, 1):
      places = x.shape[-2] - width + 1
      # As products: the channels are too few for a convolution to be fast.
      windows = jnp.concatenate([x[..., i : i + places, :] for i in range(width)], axis=-1)  # [*N, places, w E]
      dense = nn.Dense(filters, use_bias=False, dtype=self.dtype, kernel_init=draw, name=f"width{width}")
      within = jnp.arange(places) <= jnp.maximum(length - width, 0)  # [*N, places]
      values = jnp.where(within[..., None], dense(windows), -jnp.inf)
      vectors.append(values.max(axis=-2))
    # Bias and tanh are the same at every place and keep the order: behind the maximum they are computed once a word.
    bias = self.param("bias", draw, (sum(self.filters),))
    return jnp.tanh(jnp.concatenate(vectors, axis=-1) + bias.astype(self.dtype))


class Highway(nn.Module):
  """A highway layer (Srivastava et al. 2015): a gate decides how much of a ReLU layer replaces the input."""

  init_scale: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    draw = recurrent.uniform(self.init_scale)

    def dense(bias_init, name):
      return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=draw, bias_init=bias_init, name=name)(x)

    gate = jax.nn.sigmoid(dense(nn.initializers.constant(GATE_BIAS), "gate"))
    return gate * nn.relu(dense(draw, "transform")) + (1 - gate) * x


class CharCNNLSTM(nn.Module):
  """Characters to words, highway layers, LSTM layers with dropout behind each, and a linear classifier over words."""

  embedding: int
  filters: tuple[int, ...]
  characters: int
  highway_layers: int
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
    characters: Int[Array, "B T L"],
    carry: tuple[recurrent.State, ...],
    *,
    train: bool,
    positions: Int[Array, " B"] | None,
  ) -> tuple[Float[Array, "B T n"], tuple[recurrent.State, ...]]:
    draw = recurrent.uniform(self.init_scale)
    x = CharacterCNN(self.embedding, self.filters, self.characters, self.init_scale, self.dtype, name="cnn")(characters)
    for number in range(1, self.highway_layers + 1):
      x = Highway(self.init_scale, self.dtype, name=f"highway{number}")(x)
    stack = recurrent.LSTMStack(
      self.units, self.layers, self.dropout, self.init_scale, self.cudnn, self.dtype, name="lstm"
    )
    x, carry = stack(x, carry, train=train, positions=positions)
    classifier = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=draw, bias_init=draw, name="classifier")
    return classifier(x).astype(jnp.float32), carry


def char_cnn_lstm(
  spec: InputSpec,
  *,
  dtype: Any,
  axis_name: str | None,
  char_embedding: int,
  max_width: int,
  filters_per_width: int,
  filters_at_most: int,
  highway_layers: int,
  units: int,
  layers: int,
  dropout: float,
  init_scale: float,
  cudnn: bool,
  max_word_length: int,
) -> Model:
  """Returns a language model that reads words as characters: filters of widths 1 to `max_width`, highway, LSTM.

  There are min(`filters_at_most`, `filters_per_width` * w) filters of width w. Words are read up to `max_word_length`
  characters, boundaries included; `<eos>` and `<unk>` are one symbol each. Every parameter is drawn evenly from
  +-`init_scale`, but for the highway gates' biases, -2. Dropout is behind the LSTM layers alone. With `cudnn` these run
  by cuDNN, from and to the same parameters; float32 on NVIDIA GPUs only. Raises a ConfigError for an option out of
  range, for images, for a data set without its vocabulary, and where cuDNN was asked for and cannot be had.
  """
  recurrent.check_options(units=units, layers=layers, dropout=dropout, init_scale=init_scale, cudnn=cudnn, dtype=dtype)
  common.check_positive(
    char_embedding=char_embedding,
    max_width=max_width,
    filters_per_width=filters_per_width,
    filters_at_most=filters_at_most,
  )
  common.check_at_least(0, highway_layers=highway_layers)
  common.check_at_least(3, max_word_length=max_word_length)  # a character between two boundaries
  name = f"char_cnn_lstm_{layers}x{units}"
  common.require_kind(name, "tokens", spec)
  if len(spec.words) != spec.num_classes:
    raise ConfigError(
      f"model {name!r} reads the vocabulary's characters; the data set gives {len(spec.words)} words for "
      f"{spec.num_classes} tokens"
    )
  table, characters = character_table(spec.words, max_word_length, max_width)
  filters = tuple(min(filters_at_most, filters_per_width * width) for width in range(1, max_width + 1))
  module = CharCNNLSTM(
    char_embedding,
    filters,
    characters,
    highway_layers,
    units,
    layers,
    dropout,
    init_scale,
    cudnn,
    spec.num_classes,
    dtype,
  )

  def read(inputs):  # [B, T] -> [B, T, L]
    return jnp.asarray(table)[inputs]

  return recurrent.from_token_module(name, module, spec, units=units, layers=layers, read=read)

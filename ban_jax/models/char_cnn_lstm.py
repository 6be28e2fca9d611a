"""The CNN-LSTM language model of Table 6 (Kim et al. 2016, large): a character CNN per word, an LSTM over words."""

import dataclasses
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

# Special tokens: one symbol each, so that they share no characters with ordinary words.
SYMBOLS = ("<eos>", "<unk>")
# Reserved ids in a character table; those of the characters follow.
PADDING, BEGIN, END = range(3)
GATE_BIAS = -2.0  # at first a highway layer passes most of its input through


@dataclasses.dataclass(frozen=True, kw_only=True)
class CharCNNLSTMOptions(recurrent.StackOptions):
  """Options of `char_cnn_lstm`; `dropout` follows the LSTM layers only. Raises a ConfigError for a value out of range.

  `init_scale` does not hold for the biases of the highway gates, which start at -2.
  """

  char_embedding: int  # dimensions of a character's embedding
  max_width: int  # the filters have widths 1 to max_width, in characters
  filters_per_width: int  # there are filters_per_width * w filters of width w ...
  filters_at_most: int  # ... but at most this many
  highway_layers: int  # 0 for none
  max_word_length: int  # characters read of a word, including the two boundaries; the rest is cut off

  def __post_init__(self):
    super().__post_init__()
    common.check_at_least(
      1,
      char_embedding=self.char_embedding,
      max_width=self.max_width,
      filters_per_width=self.filters_per_width,
      filters_at_most=self.filters_at_most,
    )
    common.check_at_least(0, highway_layers=self.highway_layers)
    common.check_at_least(3, max_word_length=self.max_word_length)  # one character between two boundaries

  @property
  def filters(self) -> tuple[int, ...]:
    """The number of filters of widths 1, 2, ..., `max_width`."""
    return tuple(min(self.filters_at_most, self.filters_per_width * width) for width in range(1, self.max_width + 1))


def spell(word: str, max_word_length: int) -> tuple[str, ...]:
  """Returns a word's characters without boundaries, or a single symbol for a word of SYMBOLS.

  Words are truncated to `max_word_length` characters, the two boundaries included.
  """
  return (word,) if word in SYMBOLS else tuple(word[: max_word_length - 2])


def character_table(words: Iterable[str], max_word_length: int, width: int) -> tuple[Int[np.ndarray, "V L"], int]:
  """Returns the character ids of every word, and the number of ids, padding included.

  Row i is BEGIN, the characters of word i, END, PADDING. L is the length of the longest word, at least `width`. Ids
  follow the sorted order of the characters that occur in `words`.
  """
  spellings = [spell(word, max_word_length) for word in words]
  ids = {character: number for number, character in enumerate(sorted(set().union(*spellings)), END + 1)}
  table = np.full((len(spellings), max(width, *(len(spelling) + 2 for spelling in spellings))), PADDING, np.int32)
  for row, spelling in zip(table, spellings, strict=True):
    row[: len(spelling) + 2] = [BEGIN, *(ids[character] for character in spelling), END]
  return table, END + 1 + len(ids)


class CharacterCNN(nn.Module):
  """A word's vector: convolutions over its characters, the maximum over positions, tanh.

  The maximum is over the positions where the filter lies within the word, boundaries included; a word shorter than the
  filter is padded with zeros to its width. So a word's vector does not depend on the length of other words.
  """

  options: CharCNNLSTMOptions
  characters: int  # number of character ids
  dtype: Any

  @nn.compact
  def __call__(self, characters: Int[Array, "*N L"]) -> Float[Array, "*N C"]:
    options, init = self.options, recurrent.uniform(self.options.init_scale)
    embed = nn.Embed(self.characters, options.char_embedding, dtype=self.dtype, embedding_init=init, name="embedding")
    mask = characters != PADDING  # [*N, L]
    x = embed(characters) * mask[..., None]  # [*N, L, E]
    length = mask.sum(-1, keepdims=True)  # [*N, 1]
    vectors = []
    for width, filters in enumerate(options.filters, 1):
      starts = x.shape[-2] - width + 1
      # A dense layer over windows: with so few channels it is faster than a convolution.
      windows = jnp.concatenate([x[..., i : i + starts, :] for i in range(width)], axis=-1)  # [*N, starts, w E]
      dense = nn.Dense(filters, use_bias=False, dtype=self.dtype, kernel_init=init, name=f"width{width}")
      within = jnp.arange(starts) <= jnp.maximum(length - width, 0)  # [*N, starts]
      values = jnp.where(within[..., None], dense(windows), -jnp.inf)
      vectors.append(values.max(axis=-2))
    # Bias and tanh are monotonic and the same at all positions, so they are applied once, after the maximum.
    bias = self.param("bias", init, (sum(options.filters),))
    return jnp.tanh(jnp.concatenate(vectors, axis=-1) + bias.astype(self.dtype))


class Highway(nn.Module):
  """A highway layer (Srivastava et al. 2015): a gate mixes the input with the output of a ReLU layer."""

  init_scale: float
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*N C"]) -> Float[Array, "*N C"]:
    init = recurrent.uniform(self.init_scale)

    def dense(bias_init, name):
      return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, bias_init=bias_init, name=name)(x)

    gate = jax.nn.sigmoid(dense(nn.initializers.constant(GATE_BIAS), "gate"))
    return gate * nn.relu(dense(init, "transform")) + (1 - gate) * x


class CharCNNLSTM(nn.Module):
  """A character CNN per word, highway layers, LSTM layers with dropout after each, and a linear classifier."""

  options: CharCNNLSTMOptions
  characters: int  # number of character ids
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
    options, init = self.options, recurrent.uniform(self.options.init_scale)
    x = CharacterCNN(options, self.characters, self.dtype, name="cnn")(characters)
    for number in range(1, options.highway_layers + 1):
      x = Highway(options.init_scale, self.dtype, name=f"highway{number}")(x)
    stack = recurrent.LSTMStack(options, self.dtype, name="lstm")
    x, carry = stack(x, carry, train=train, positions=positions)
    classifier = nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=init, bias_init=init, name="classifier")
    return classifier(x).astype(jnp.float32), carry


def char_cnn_lstm(spec: InputSpec, options: CharCNNLSTMOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns a language model over words that are read character by character.

  Raises a ConfigError for images, and for a data set without its vocabulary.
  """
  del axis_name  # no batch norm
  name = f"char_cnn_lstm_{options.layers}x{options.units}"
  common.require_kind(name, "tokens", spec)
  if len(spec.words) != spec.num_classes:
    raise ConfigError(
      f"model {name!r} reads the vocabulary's characters; the data set gives {len(spec.words)} words for "
      f"{spec.num_classes} tokens"
    )
  table, characters = character_table(spec.words, options.max_word_length, options.max_width)
  module = CharCNNLSTM(options, characters, spec.num_classes, dtype)

  def read(inputs):  # [B, T] -> [B, T, L]
    return jnp.asarray(table)[inputs]

  return recurrent.from_token_module(name, module, spec, options, read=read)

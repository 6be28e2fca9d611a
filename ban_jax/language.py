"""What trained language models say of text: the probabilities of its words, or other tokens, and samples of it."""

import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Float64

from ban_jax import devices as devices_lib
from ban_jax.data import tokens as tokens_lib
from ban_jax.data.tokens import EOS
from ban_jax.errors import ConfigError, DataError, check_whole
from ban_jax.predicting import Predictor, filled, pad, prepare
from ban_jax.types import Generation

# Sentences are padded to a multiple of this many tokens, so that few lengths are compiled.
PAD_TO = 32


@devices_lib.default_modes()
def log_probabilities(
  generations: Generation | Sequence[Generation],
  sentences: Sequence[str],
  *,
  weights: Sequence[float] | None = None,
  batch_size: int = 32,
  devices: Sequence[jax.Device] | None = None,
  tokenizer: Any = None,
) -> list[Float32[np.ndarray, " tokens"]]:
  """Returns the natural logarithm of the probability of each token of each sentence, and of its end, `<eos>`.

  Each sentence is read on its own, after `<eos>`; its perplexity is exp of minus the mean. Without `<eos>` in the
  vocabulary it is read after a line's end or token 0, and its end has no probability. What is not in the vocabulary
  counts as `<unk>`. A network without a carry reads a longer sentence window by window, as in evaluation.

  Args:
    generations: one or several, an ensemble, with their networks, as `train_generation` or `load` returns them.
    sentences: texts as in training: words with spaces between them, characters, or bytes.
    weights: of the members, at least 0; by default equal.
    batch_size: bounds the memory, and does not change the result beyond rounding.
    devices: the devices to use; all of this process by default.
    tokenizer: for tokens of a tokenizer of one's own, the pair (encode, decode) of `from_text`; without it a text is
      the tokens' numbers.

  Returns:
    An array for each sentence.

  Raises:
    CheckpointError: for generations that do not say which network they are.
    ConfigError: for networks of images, weights or a batch size out of range, and networks that read different inputs.
    DataError: for what is no text, and for what is not in a vocabulary without `<unk>`.

  Examples:
    >>> text = ban_jax.from_text("to be or not to be " * 100, tokens="characters", unknown=False)
    >>> apply = lambda weights, x: jnp.broadcast_to(weights, (*x.shape, text.spec.num_classes))
    >>> uniform = ban_jax.from_function(apply, np.zeros(text.spec.num_classes, np.float32), text, name="uniform")
    >>> [sentence.shape for sentence in ban_jax.log_probabilities(uniform, ["to be"])]
    [(5,)]
  """
  predictor = _language_model(generations, weights, devices, "log_probabilities")
  spec, unit = predictor.spec, predictor.window or PAD_TO
  batch_size = check_whole("batch_size", batch_size, 1)
  if isinstance(sentences, str):
    raise DataError("log_probabilities takes a sequence of sentences, not one string; pass [sentence]")
  try:
    texts = list(sentences)
  except TypeError as error:
    raise DataError(f"log_probabilities takes a sequence of sentences, not {type(sentences).__name__}") from error
  first = tokens_lib.start(spec)
  end = [first] if EOS in spec.words else []
  tokens = [np.array([first, *tokens_lib.encode(spec, text, tokenizer), *end]) for text in texts]
  found = []
  for place in range(0, len(tokens), batch_size):
    part = tokens[place : place + batch_size]
    longest = -(-max(map(len, part)) // unit) * unit
    rows = np.zeros((len(part), longest), np.int32)  # what follows a sentence does not change what is said of it
    for row, own in zip(rows, part, strict=True):
      row[: len(own)] = own
    rows = pad(rows, filled(batch_size, len(tokens), predictor.devices))
    carries, read = predictor.carries(len(rows)), []
    for window in np.split(rows, longest // predictor.window if predictor.window else 1, axis=1):
      carries, logs = predictor.step(carries, window)
      read.append(logs)
    logs = np.concatenate(read, axis=1)
    found += [row[np.arange(len(own) - 1), own[1:]] for row, own in zip(logs, part, strict=False)]
  return found


@devices_lib.default_modes()
def sample(
  generations: Generation | Sequence[Generation],
  length: int,
  *,
  prompt: str = "",
  seed: int = 0,
  temperature: float = 1.0,
  top_k: int = 0,
  weights: Sequence[float] | None = None,
  tokenizer: Any = None,
) -> str:
  """Returns `length` tokens sampled from a language model, or from an ensemble, after a `prompt`, as text.

  Tokens are drawn with probabilities proportional to p^(1 / temperature); `<eos>` is one of them. If a network has no
  carry, each token follows from the last window of tokens alone.

  Args:
    generations: those that `log_probabilities` takes.
    length: the number of tokens.
    prompt: a text as in training.
    seed: the same seed gives the same text on the same machine.
    temperature: at 0 it is always the likeliest token.
    top_k: how many of the likeliest tokens are drawn from; 0 for all.
    weights: of the members, at least 0; by default equal.
    tokenizer: that of `log_probabilities`; its decode makes the text.

  Returns:
    The tokens after the prompt, as text.

  Raises:
    ConfigError: for a value out of range; otherwise as `log_probabilities`.

  Examples:
    >>> len(ban_jax.sample(uniform, 20, prompt="to be "))
    20
  """
  length, seed, top_k = check_whole("length", length, 0), check_whole("seed", seed, 0), check_whole("top_k", top_k, 0)
  if not isinstance(temperature, numbers.Real) or not 0 <= temperature <= sys.float_info.max:
    raise ConfigError(f"temperature={temperature!r}: expected a finite number of at least 0")
  predictor = _language_model(generations, weights, jax.local_devices()[:1], "sample")
  rng, found, read = np.random.default_rng(seed), [], _reader(predictor)
  logs = read([tokens_lib.start(predictor.spec), *tokens_lib.encode(predictor.spec, prompt, tokenizer)])
  for _ in range(length):
    found.append(_draw(rng, logs.astype(np.float64), float(temperature), top_k))
    logs = read(found[-1:])
  return tokens_lib.decode(predictor.spec, found, tokenizer)


def _draw(rng: np.random.Generator, logs: Float64[np.ndarray, " n"], temperature: float, top_k: int) -> int:
  """Returns a token drawn by log-probabilities; the first of equally likely ones is the likelier."""
  if not temperature:
    return int(logs.argmax())
  if 0 < top_k < len(logs):
    logs[np.argsort(-logs, kind="stable")[top_k:]] = -np.inf
  with np.errstate(all="ignore"):  # at a temperature near 0 all tokens but the likeliest are infinitely unlikely
    odds = np.exp((logs - logs.max()) / temperature)
  return int(rng.choice(len(odds), p=odds / odds.sum()))


def _reader(predictor: Predictor) -> Callable[[Sequence[int]], Float32[np.ndarray, " words"]]:
  """Returns the function that reads a text's further tokens and returns the log-probabilities of the one after them."""
  text: list[int] = []
  carries = predictor.carries(1)

  def read(tokens: Sequence[int]) -> np.ndarray:
    nonlocal carries
    if predictor.window is None:
      for token in tokens:
        carries, logs = predictor.step(carries, np.array([[token]], np.int32))
      return logs[0, 0]
    text.extend(tokens)
    last = text[-predictor.window :]
    row = np.array([last + [0] * (predictor.window - len(last))], np.int32)  # what follows does not change the past
    return predictor.step(carries, row)[1][0, len(last) - 1]

  return read


def _language_model(generations, weights, devices, what: str) -> Predictor:
  predictor = prepare(generations, weights, devices)
  if predictor.spec.kind != "tokens":
    raise ConfigError(f"{what} takes language models; these networks read images")
  return predictor

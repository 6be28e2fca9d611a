"""What text data sets share: one stream of tokens a split, cut into windows that are read one after another."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray

from ban_jax import errors
from ban_jax.data.arrays import digest, make_read_only, padded_range
from ban_jax.data.tokens import EOS
from ban_jax.errors import ConfigError, DataError
from ban_jax.types import Batch, Dataset, InputSpec, maker

Lines = list[list[str]]  # the words of each line, without the <eos> that follows the last


class Options(NamedTuple):
  """The keys of a configuration's `data` group that a text data set takes."""

  train_examples: int  # tokens to train on, from the beginning of the text; 0: all
  window: int  # tokens of a window, at least 1


def count_tokens(lines: Lines) -> int:
  """Returns the number of tokens, one `<eos>` a line included."""
  return sum(len(line) + 1 for line in lines)


def lines_of(what: str, content: str) -> Lines:
  """Returns the words of each line of a text; raises a DataError where a line has the `<eos>` that will end it."""
  lines = [line.split() for line in content.removesuffix("\n").split("\n")]
  for number, line in enumerate(lines, 1):
    if EOS in line:
      raise DataError(f"{what}, line {number}: {EOS!r} is added at each line's end; expected text without it")
  return lines


def of_streams(
  name: str,
  streams: Mapping[str, Int32[np.ndarray, " N+1"]],
  spec: InputSpec,
  *,
  options: Options,
  written: Mapping[str, Mapping[str, int]] = {},
) -> Dataset:
  """Returns the Dataset of the splits' tokens.

  Every split's array is `tokens` int32 [N+1]: a first one, and then the split's N tokens, each of which is predicted
  from those before it. Orders hold numbers of windows: window w predicts tokens w*T+1..(w+1)*T of the stream, with T
  tokens a window. Raises ConfigError if there are fewer training tokens than the options ask for.

  `written` are the bytes and characters of each split (types.Dataset); those of a training text that is cut are left
  out.
  """
  streams = dict(streams)
  chosen = _train_tokens(name, len(streams["train"]) - 1, options)
  if chosen + 1 < len(streams["train"]):
    streams["train"] = streams["train"][: chosen + 1]
    written = {split: counts for split, counts in written.items() if split != "train"}
  splits = {split: {"tokens": tokens} for split, tokens in streams.items()}
  make_read_only(splits)
  sizes = {split: len(tokens) - 1 for split, tokens in streams.items()}
  listed = np.frombuffer("\n".join(spec.words).encode(), np.uint8)
  return assemble(name, splits, sizes, spec)._replace(
    digest=digest({**splits, "vocabulary": {"words": listed}}), written=written
  )


def describe(name: str, *, tokens: Mapping[str, int], words: tuple[str, ...], options: Options) -> Dataset:
  """Returns `of_streams`' Dataset for so many `tokens` of each split, all in the vocabulary `words`, as shapes.

  Raises as `of_streams` does.
  """
  sizes = {**tokens, "train": _train_tokens(name, tokens["train"], options)}
  splits = {split: {"tokens": jax.ShapeDtypeStruct((size + 1,), np.int32)} for split, size in sizes.items()}
  return assemble(name, splits, sizes, InputSpec("tokens", (options.window,), len(words), words))


def assemble(name: str, splits: Any, sizes: Mapping[str, int], spec: InputSpec) -> Dataset:
  """Returns the Dataset of splits' arrays, or their shapes, without a digest."""
  window = spec.shape[0]
  return Dataset(
    name=name,
    spec=spec,
    splits=splits,
    sizes=sizes,
    digest="",
    fetch=make_fetch(window),
    train_order=functools.partial(_train_order, name, sizes["train"], window),
    eval_order=functools.partial(_eval_order, name, sizes, window),
  )


def _train_tokens(name: str, available: int, options: Options) -> int:
  """Returns how many tokens are trained on; raises ConfigError if there are not as many, or less than a window."""
  if options.train_examples > available:
    raise ConfigError(
      f"data.train_examples={options.train_examples}: expected at most {available}, the tokens that {name} has to train"
      " on"
    )
  chosen = options.train_examples or available
  if options.window > chosen:
    raise ConfigError(f"data.window={options.window}: expected at most {chosen}, the tokens that {name} is trained on")
  return chosen


@maker
def make_fetch(window: int) -> Callable[..., Batch]:
  """Returns the function that cuts windows of `window` tokens out of a split; the same object for the same argument."""

  def fetch(
    arrays: Mapping[str, Array],
    index: Int[Array, " B"],
    *,
    key: PRNGKeyArray | None,
    positions: Int[Array, " B"] | None,
    train: bool,
  ) -> Batch:
    """Cuts the windows `index` out of the stream: inputs and labels int32 [B, T], each label the token after its input.

    The mask is False after the stream's end and in the rows of a negative index. Nothing is random: `key` and
    `positions` may be None, and `train` changes nothing.
    """
    del key, positions, train
    if "windows" in arrays:  # of a stream: int32 [.., T+1], padded by -1
      rows = arrays["windows"][jnp.maximum(index, 0)]
      tokens = jnp.maximum(rows, 0)
      return Batch(tokens[:, :-1], tokens[:, 1:], (index[:, None] >= 0) & (rows[:, 1:] >= 0))
    tokens = arrays["tokens"]
    last = len(tokens) - 2  # the last token that is followed by another
    places = index[:, None] * window + jnp.arange(window)  # [B, T]
    inside = jnp.clip(places, 0, last)
    return Batch(tokens[inside], tokens[inside + 1], (index[:, None] >= 0) & (places <= last))

  return fetch


def _train_order(
  name: str, size: int, window: int, key: PRNGKeyArray, batch_size: int
) -> Int32[np.ndarray, "steps batch"]:
  """Returns an epoch's windows: the text in `batch_size` equal streams, one a column, each in the text's order.

  The hidden state is carried from step to step, so nothing is shuffled and `key` is not used. The incomplete last
  window is dropped, and whole ones that would make the streams unequal. Raises ConfigError if there are fewer whole
  windows than a batch holds.
  """
  del key
  whole = size // window
  if whole < batch_size:
    raise ConfigError(
      f"train.batch_size={batch_size}: expected at most {whole}, the windows of {window} tokens in the {size} training"
      f" tokens of {name}"
    )
  steps = whole // batch_size
  return np.arange(batch_size * steps, dtype=np.int32).reshape(batch_size, steps).T.copy()


def _eval_order(
  name: str, sizes: Mapping[str, int], window: int, split: str, batch_size: int
) -> Int32[np.ndarray, "steps batch"]:
  """Returns windows that hold every token of the split exactly once, in columns as `_train_order`, padded with -1.

  Each of the `batch_size` streams begins without a hidden state; a batch of 1 has one such beginning. Raises
  ConfigError for an unknown split, listing those of the data set.
  """
  count = -(-errors.look_up(sizes, split, f"split of {name}") // window)
  return padded_range(count, batch_size).reshape(batch_size, -1).T.copy()

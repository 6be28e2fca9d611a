"""Text data sets: one stream of tokens a split, cut into windows that a recurrent network reads one after another."""

import collections
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, PRNGKeyArray

from ban_jax import errors
from ban_jax.data.images import check_batch_size, digest
from ban_jax.errors import ConfigError, DataError
from ban_jax.types import Batch, Dataset, InputSpec

logger = logging.getLogger(__name__)

Lines = list[list[str]]  # the words of each line; what follows the last word, <eos>, is not among them

EOS, UNKNOWN = "<eos>", "<unk>"

PTB_FILES = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}
# Tokens of each split, <eos> included: by them the files that the paper's numbers are of can be told from others.
PTB_SIZES = {"train": 929_589, "validation": 73_760, "test": 82_430}

# Of ten topics, in the order of their sizes, these two are held out: about a tenth of the words each.
HELD_OUT = {4: "validation", 5: "test"}
RAREST = 3  # how often a word must stand in train to be in the vocabulary
MARKUP = str.maketrans({"‘": "'", "’": "'"} | dict.fromkeys('“”"*`'))  # two quotes made one, the others deleted
UNDERLINE = re.compile(r"^\s*([*=\-~^+])\1{2,}\s*$", re.MULTILINE)
WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def load_ptb(*, directory: str, train_examples: int, window: int) -> Dataset:
  """Returns the Penn Treebank in Mikolov's split: 929,589, 73,760 and 82,430 tokens of 10,000 words (Table 6).

  Reads the three files that the user has put into `directory`: words between white space, `<eos>` at each line's end.
  The vocabulary is train's. Raises a ConfigError where no directory is named, and a DataError, naming file and line,
  for a file that is missing, blank, not UTF-8 or not to be read, and for a word that is not in the vocabulary.
  """
  expected = (
    f"ptb is read from {', '.join(PTB_FILES.values())} in the directory that data.dir names; nothing is downloaded: the"
    " files (the Penn Treebank in Mikolov's split) have to be supplied by the user"
  )
  if not directory:
    raise ConfigError(f'data.dir = "": {expected}')
  paths = {split: pathlib.Path(os.path.expanduser(directory)) / file for split, file in PTB_FILES.items()}
  missing = [str(path) for path in paths.values() if _is_missing(path)]
  if missing:
    raise DataError(f"ptb: missing: {', '.join(missing)}; {expected}")
  lines = {split: _read_lines(path) for split, path in paths.items()}
  words = vocabulary(lines["train"])
  known = set(words)
  for split, path in paths.items():
    for number, line in enumerate(lines[split], 1):
      for word in line:
        if word not in known:
          raise DataError(
            f"ptb: {path}, line {number}: {word!r} is not in the vocabulary, the {len(words)} words of "
            f"{PTB_FILES['train']}"
          )
  sizes = {split: _count(part) for split, part in lines.items()}
  if sizes != PTB_SIZES:
    logger.warning(
      "ptb: %s holds %s tokens, not the %s of Mikolov's split: results are not the paper's", directory, sizes, PTB_SIZES
    )
  return build("ptb", lines, words, train_examples=train_examples, window=window)


def _is_missing(path: pathlib.Path) -> bool:
  """Returns whether there is no such file. Where that cannot be told it is not missing: reading it will say why."""
  try:
    path.stat()
  except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that no file can have
    return True
  except OSError:
    return False
  return False


def _read_lines(path: pathlib.Path) -> Lines:
  """Returns the words of each line of a file; may raise a DataError that names the file, and the line."""
  try:
    content = path.read_bytes()
  except OSError as error:
    raise DataError(f"ptb: {path} cannot be read: {error}") from error
  try:
    text = content.decode("utf-8")
  except UnicodeDecodeError as error:
    number = content[: error.start].count(b"\n") + 1
    raise DataError(f"ptb: {path}, line {number}: byte {content[error.start]:#04x} is not UTF-8") from error
  lines = [line.split() for line in text.removesuffix("\n").split("\n")]
  if not any(lines):
    raise DataError(f"ptb: {path}: expected text, but there is no word in the file's {len(content)} bytes")
  return lines


def load_pydoc(*, directory: str, train_examples: int, window: int) -> Dataset:
  """Returns the Python manual's topics, which come with CPython: about 70,000, 9,000 and 7,000 tokens of 1,500 words.

  For tests and demonstrations only: it is small, it differs between versions of Python (the digest tells them apart),
  and no number of it compares with anything published. `directory` is not looked at.

  Topics are split by their sizes, whole ones into train, validation or test, after every paragraph but the first of
  its words is dropped. Words that stand in train fewer than three times, or not at all, are `<unk>`; a paragraph ends
  in `<eos>`. Raises a DataError where the Python at hand comes without its manual.
  """
  del directory
  try:
    from pydoc_data.topics import topics
  except ImportError as error:
    raise DataError("pydoc: this Python comes without its manual (module pydoc_data.topics)") from error
  lines = {split: [line for part in parts.values() for line in part] for split, parts in split_topics(topics).items()}
  counts = collections.Counter(word for line in lines["train"] for word in line)
  lines = {
    split: [[word if counts[word] >= RAREST else UNKNOWN for word in line] for line in part]
    for split, part in lines.items()
  }
  return build("pydoc", lines, vocabulary(lines["train"]), train_examples=train_examples, window=window)


def split_topics(topics: Mapping[str, str]) -> dict[str, dict[str, Lines]]:
  """Returns split -> topic -> the words of its paragraphs, no paragraph twice, whatever the topics' order."""
  seen, kept = set(), {}
  for topic in sorted(topics):
    kept[topic] = []
    for words in paragraphs(topics[topic]):
      if tuple(words) not in seen:
        seen.add(tuple(words))
        kept[topic].append(words)
  splits = {"train": {}, "validation": {}, "test": {}}
  for rank, topic in enumerate(sorted(kept, key=lambda topic: (-_count(kept[topic]), topic))):
    splits[HELD_OUT.get(rank % 10, "train")][topic] = kept[topic]
  return splits


def paragraphs(text: str) -> Lines:
  """Returns the words and punctuation marks of each paragraph, in lower case and without markup."""
  parts = re.split(r"\n\s*\n", UNDERLINE.sub("", text).lower().translate(MARKUP))
  return [words for words in map(WORD.findall, parts) if words]


def vocabulary(lines: Lines) -> tuple[str, ...]:
  """Returns the words and `<eos>`, the most frequent first and equally frequent ones in the order of the alphabet."""
  counts = collections.Counter(word for line in lines for word in line)
  counts[EOS] += len(lines)
  return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def _count(lines: Lines) -> int:
  """Returns the number of tokens, one `<eos>` a line included."""
  return sum(len(line) + 1 for line in lines)


def build(
  name: str, lines: Mapping[str, Lines], words: tuple[str, ...], *, train_examples: int, window: int
) -> Dataset:
  """Returns the Dataset of the splits' lines, all of whose words are in the vocabulary `words`.

  Every split's array is `tokens` int32 [N+1], `<eos>` and then the split's N tokens, each of which is predicted from
  those before it. What orders hold are numbers of windows: window w predicts positions w*T+1..(w+1)*T of the stream,
  T being `window`. `train_examples` keeps that many tokens of train, from its beginning (0: all). Raises a ConfigError
  where train is smaller than that, or than a window.
  """
  ids = {word: number for number, word in enumerate(words)}
  streams = {split: _stream(part, ids) for split, part in lines.items()}
  available = len(streams["train"]) - 1
  if train_examples > available:
    raise ConfigError(
      f"data.train_examples = {train_examples}: expected at most {available}, the tokens that {name} has to train on"
    )
  streams["train"] = streams["train"][: (train_examples or available) + 1]
  sizes = {split: len(tokens) - 1 for split, tokens in streams.items()}
  if window > sizes["train"]:
    raise ConfigError(
      f"data.window = {window}: expected at most {sizes['train']}, the tokens that {name} is trained on"
    )
  for tokens in streams.values():
    tokens.setflags(write=False)
  splits = {split: {"tokens": tokens} for split, tokens in streams.items()}
  listed = np.frombuffer("\n".join(words).encode(), np.uint8)
  return Dataset(
    name=name,
    spec=InputSpec("tokens", (window,), len(words), words),
    splits=splits,
    sizes=sizes,
    digest=digest({**splits, "vocabulary": {"words": listed}}),
    fetch=make_fetch(window),
    train_order=functools.partial(_train_order, name, sizes["train"], window),
    eval_order=functools.partial(_eval_order, name, sizes, window),
  )


def _stream(lines: Iterable[list[str]], ids: Mapping[str, int]) -> Int32[np.ndarray, " N+1"]:
  """Returns `<eos>`, and behind it the numbers of the lines' words, each line ending in `<eos>`."""
  return np.array([ids[EOS], *(ids[word] for line in lines for word in (*line, EOS))], np.int32)


@functools.cache
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
    """Cuts the windows `index` out of the stream: inputs and labels int32 [B, T], each label the input behind it.

    The mask is False behind the stream's end and in the rows of a negative index. Nothing is drawn: `key` and
    `positions` may be None, and `train` changes nothing.
    """
    del key, positions, train
    tokens = arrays["tokens"]
    last = len(tokens) - 2  # the place of the last token that another is predicted from
    places = index[:, None] * window + jnp.arange(window)  # [B, T]
    inside = jnp.clip(places, 0, last)
    return Batch(tokens[inside], tokens[inside + 1], (index[:, None] >= 0) & (places <= last))

  return fetch


def _train_order(
  name: str, size: int, window: int, key: PRNGKeyArray, batch_size: int
) -> Int32[np.ndarray, "steps batch"]:
  """Returns an epoch's windows: the text in `batch_size` equal stretches, each read in its own column, in order.

  So the hidden state is carried from step to step, and nothing may be shuffled: `key` is not used. The incomplete last
  window is dropped, and whole ones that would make the stretches unequal. Raises a ConfigError where there are fewer
  whole windows than a batch holds.
  """
  del key
  check_batch_size(batch_size)
  whole = size // window
  if whole < batch_size:
    raise ConfigError(
      f"train.batch_size = {batch_size} is more than the {whole} windows of {window} tokens in the {size} training"
      f" tokens of {name}: expected at most {whole}"
    )
  steps = whole // batch_size
  return np.arange(batch_size * steps, dtype=np.int32).reshape(batch_size, steps).T.copy()


def _eval_order(
  name: str, sizes: Mapping[str, int], window: int, split: str, batch_size: int
) -> Int32[np.ndarray, "steps batch"]:
  """Returns windows that hold every token of the split exactly once, in columns as `_train_order`, padded with -1.

  Each of the `batch_size` stretches begins without a hidden state: with a batch of 1 there is one such beginning.
  Raises a ConfigError for a split that there is not, listing those that there are.
  """
  check_batch_size(batch_size)
  count = -(-errors.look_up(sizes, split, f"split of {name}") // window)
  steps = -(-count // batch_size)
  order = np.full(batch_size * steps, -1, np.int32)
  order[:count] = np.arange(count)
  return order.reshape(batch_size, steps).T.copy()

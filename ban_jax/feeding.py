"""From an order of examples to what a step takes: index vectors, and of a streamed split the rows that they name.

The order follows from seed, generation, epoch and step, and what is read from it and the source alone. So a stream has
no state: a resumed run begins to read at its step, and neither processes, devices nor workers change a byte. A process
reads the rows of its own devices, and one dispatch ahead while the devices work.
"""

import collections
import concurrent.futures
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ban_jax import devices as devices_lib
from ban_jax import workers
from ban_jax.types import Dataset, Devices, Feed, Stream

logger = logging.getLogger(__name__)

# The most examples that a thread or a process reads at once.
PIECE = 32
# Bytes of examples that a process keeps ready beside the two dispatches that are in use.
READY = 2**28
# Seconds without a mini-batch after which the log says so.
SLOW = 60.0


def feeds(
  dataset: Dataset,
  split: str,
  batches: Int[np.ndarray, "steps B"],
  counts: Iterable[int],
  devices: Devices,
  block: int = 1,
  *,
  first: int = 0,
  draw: tuple[int, ...] = (),
) -> Iterator[Feed]:
  """Yields what each dispatch takes, `counts` of the mini-batches at a time, filled up to `block`.

  A feed has "index" int32 [local devices, n, B / devices]; of a streamed split it is the number of a row among those
  that come with it, [local devices, n, B / devices, ...] each. `first` is the step of the epoch that the first
  mini-batch belongs to, and `draw` (seed, generation, epoch) in training. Raises a DataError for what cannot be read.
  """
  stream = dataset.streams.get(split)
  if stream is None:
    return _resident(batches, counts, devices, block)
  what = f"{dataset.name}, {split}"
  return _ahead(_streamed(stream, batches, counts, devices, block, first, draw, what), what)


def singly(
  dataset: Dataset, split: str, batches: Int[np.ndarray, "steps B"], devices: Devices, draw: tuple[int, ...]
) -> Iterator[Feed]:
  """Yields `feeds` of single mini-batches without the axis of steps, for steps that take one at a time."""
  for feed in feeds(dataset, split, batches, [1] * len(batches), devices, draw=draw):
    yield jax.tree.map(lambda leaf: leaf[:, 0], feed)


def shapes(dataset: Dataset, split: str, shape: tuple[int, int, int]) -> Feed:
  """Returns the shapes of a feed, `shape` being (devices, n, B / devices)."""
  row = dataset.streams[split].row if split in dataset.streams else {}
  rows = {name: jax.ShapeDtypeStruct((*shape, *one.shape), one.dtype) for name, one in row.items()}
  return {"index": jax.ShapeDtypeStruct(shape, np.int32), **rows}


def row_bytes(stream: Stream) -> int:
  """Returns the bytes of one example."""
  return sum(one.size * one.dtype.itemsize for one in stream.row.values())


def _resident(batches: np.ndarray, counts: Iterable[int], devices: Devices, block: int) -> Iterator[Feed]:
  done = 0
  for count in counts:
    yield {"index": devices_lib.split_batches(batches[done : done + count], devices, block)}
    done += count


def _streamed(
  stream: Stream,
  batches: np.ndarray,
  counts: Iterable[int],
  devices: Devices,
  block: int,
  first: int,
  draw: tuple[int, ...],
  what: str,
) -> Iterator[Feed]:
  """Yields the feeds of a streamed split, placed on the devices."""
  places = first * batches.shape[1] + np.arange(batches.size, dtype=np.int64).reshape(batches.shape)
  own, own_places = (devices_lib.split_batches(each, devices).swapaxes(0, 1) for each in (batches, places))
  _, local, rows = own.shape  # [steps, local devices, B / devices]
  width = local * rows
  parts = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(width), -(-width // PIECE))]
  steps = zip(np.maximum(own, 0).reshape(-1, width), own_places.reshape(-1, width), strict=True)  # padding: any example
  pieces = ((numbers[part], places[part]) for numbers, places in steps for part in parts)
  found = _by_workers(stream, pieces, draw, what) if stream.workers else _by_threads(stream, pieces, draw)
  done = 0
  for count in counts:
    index = devices_lib.split_batches(batches[done : done + count], devices, block)  # [local, n, rows]
    read = {name: np.zeros((index.shape[1], width, *one.shape), one.dtype) for name, one in stream.row.items()}
    for number in range(count):
      for part in parts:
        for name, values in next(found).items():
          read[name][number, part] = values
    feed: dict[str, Any] = {"index": np.where(index >= 0, np.arange(rows, dtype=np.int32), index)}
    for name, values in read.items():
      feed[name] = values.reshape(-1, local, rows, *values.shape[2:]).swapaxes(0, 1)
    yield devices_lib.place(feed, devices)
    done += count


def _by_threads(stream: Stream, pieces: Iterator[workers.Piece], draw: tuple[int, ...]) -> Iterator[workers.Rows]:
  """Yields the examples of each piece."""
  threads = devices_lib.cores()
  pool = concurrent.futures.ThreadPoolExecutor(threads, "reading")
  try:
    started = (pool.submit(stream.read, *piece, draw) for piece in pieces)
    pending = collections.deque(itertools.islice(started, max(_ready(stream), threads + 1)))
    while pending:
      yield pending.popleft().result()
      pending.extend(itertools.islice(started, 1))
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _by_workers(
  stream: Stream, pieces: Iterator[workers.Piece], draw: tuple[int, ...], what: str
) -> Iterator[workers.Rows]:
  """Yields the examples of each piece."""
  ready = min(max(_ready(stream), stream.workers + 1), workers.MOST)
  return workers.read(stream.read, workers.Layout(stream.row, PIECE, ready, stream.workers), pieces, draw, what)


def _ready(stream: Stream) -> int:
  """Returns how many pieces are kept ready."""
  return READY // (PIECE * row_bytes(stream))


def _ahead(feeds: Iterator[Feed], what: str) -> Iterator[Feed]:
  """Yields the feeds, each made by a thread while the one before is in use."""
  with concurrent.futures.ThreadPoolExecutor(1, "feeding") as pool:
    following = pool.submit(next, feeds, None)
    while (feed := _result(following, what)) is not None:
      following = pool.submit(next, feeds, None)
      yield feed


def _result(future: concurrent.futures.Future, what: str) -> Any:
  while True:
    try:
      return future.result(SLOW)
    except TimeoutError:
      if future.done():  # the reader's own
        raise
      logger.warning(f"{what}: no mini-batch for {SLOW:.0f} s; the disk is slow or does not answer")

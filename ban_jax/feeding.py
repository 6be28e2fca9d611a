"""From an order of examples to what a step takes: index vectors, and of a streamed split the rows that they name.

The order follows from seed, generation, epoch and step, and what is read from it and the source alone. So a stream has
no state: a resumed run begins to read at its step, and neither processes, devices nor workers change a byte. A process
reads the rows of its own devices, and one dispatch ahead while the devices work.
"""

import collections
import concurrent.futures
import itertools
import logging
import multiprocessing
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from ban_jax import devices as devices_lib
from ban_jax.errors import DataError
from ban_jax.types import Dataset, Devices, Feed, Stream

logger = logging.getLogger(__name__)

# The most examples that a thread or a process reads at once.
PIECE = 32
# Bytes of examples that a process keeps ready beside the two dispatches that are in use.
READY = 2**28
# Seconds without a mini-batch after which the log says so.
SLOW = 60.0

_worker_reads: Any = None


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
  return _ahead(_streamed(stream, batches, counts, devices, block, first, draw), f"{dataset.name}, {split}")


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
) -> Iterator[Feed]:
  """Yields the feeds of a streamed split, placed on the devices."""
  local = len(devices_lib.local(devices))
  places = first * batches.shape[1] + np.arange(batches.size, dtype=np.int64).reshape(batches.shape)
  own, own_places = (devices_lib.split_batches(each, devices).swapaxes(0, 1) for each in (batches, places))
  steps = _read(stream, own.reshape(len(own), -1), own_places.reshape(len(own), -1), draw)
  done, rows = 0, batches.shape[1] // len(devices)
  for count in counts:
    index = devices_lib.split_batches(batches[done : done + count], devices, block)  # [local, n, rows]
    feed: dict[str, Any] = {"index": np.where(index >= 0, np.arange(rows, dtype=np.int32), index)}
    feed |= {name: np.zeros((local, index.shape[1], rows, *one.shape), one.dtype) for name, one in stream.row.items()}
    for number in range(count):
      for name, values in next(steps).items():
        feed[name][:, number] = values.reshape(local, rows, *values.shape[1:])
    yield devices_lib.place(feed, devices)
    done += count


def _read(stream: Stream, numbers: np.ndarray, places: np.ndarray, draw: tuple[int, ...]) -> Iterator[Feed]:
  """Yields the examples of each row of `numbers` [steps, rows]; padding is read as the first example."""
  parts = -(-numbers.shape[1] // PIECE)  # of a step
  readers = stream.workers or devices_lib.cores()
  ready = max(READY // (PIECE * row_bytes(stream)), readers + 1)
  pieces = (
    piece
    for step in zip(np.maximum(numbers, 0), places, strict=True)
    for piece in zip(*(np.array_split(each, parts) for each in step), strict=True)
  )
  pool: concurrent.futures.Executor
  if stream.workers:
    context = multiprocessing.get_context("forkserver")  # a fork of this process would have its threads' locks
    context.set_forkserver_preload([__name__])
    pool, read = concurrent.futures.ProcessPoolExecutor(readers, context, _begin, (stream.read,)), _read_here
  else:
    pool, read = concurrent.futures.ThreadPoolExecutor(readers, "reading"), stream.read
  pending, found = collections.deque(pool.submit(read, *piece, draw) for piece in itertools.islice(pieces, ready)), []
  try:
    while pending:
      found.append(pending.popleft().result())
      pending.extend(pool.submit(read, *piece, draw) for piece in itertools.islice(pieces, 1))
      if len(found) == parts:
        yield {name: np.concatenate([part[name] for part in found]) for name in stream.row}
        found = []
  except concurrent.futures.BrokenExecutor as error:
    raise DataError(
      f"one of the {stream.workers} processes that read the data has died, perhaps for want of memory; rerun to resume"
    ) from error
  finally:
    pool.shutdown(wait=False, cancel_futures=True)


def _begin(read: Any) -> None:
  """Keeps what a worker reads by, which every task would else bring along."""
  global _worker_reads
  _worker_reads = read


def _read_here(*arguments: Any) -> Feed:
  return _worker_reads(*arguments)


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

"""Processes that read a stream into memory that they share with the one that trains.

What is to be read stands in that memory, too, so that a task is one byte in a pipe, and whoever is free takes the next:
there is no lock that a process could die with. The memory has no name that could stay behind, and the processes end
with the pipe, however the one that trains has ended.
"""

import collections
import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import connection, forkserver, process, reduction
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int64

from ban_jax.errors import DataError

# The most pieces of the memory that one byte can tell apart.
MOST = 256
NONE = -1

Piece = tuple[np.ndarray, np.ndarray]  # of the examples: their numbers, and their places in the epoch
Rows = Mapping[str, np.ndarray]


def prepare(modules: Iterable[str] = ()) -> None:
  """Starts the process that readers are forked from; it imports this module and others, which may take seconds."""
  multiprocessing.set_forkserver_preload([__name__, *sorted(modules)])
  forkserver.ensure_running()


class Layout(NamedTuple):
  """How the memory is divided."""

  row: Mapping[str, jax.ShapeDtypeStruct]  # one example's arrays
  rows: int  # of a piece, at most
  pieces: int
  workers: int

  @property
  def piece(self) -> np.dtype:
    row = np.dtype([(name, one.dtype, one.shape) for name, one in self.row.items()], align=True)
    task = [("count", np.int64), ("numbers", np.int64, self.rows), ("places", np.int64, self.rows)]
    return np.dtype([*task, ("rows", row, self.rows)], align=True)

  @property
  def size(self) -> int:
    return 8 * self.workers + self.pieces * self.piece.itemsize


class Memory:
  """Bytes of a file without a name, which other processes get with their arguments."""

  def __init__(self, layout: Layout, file: int):
    self.layout, self.file = layout, file
    mapped = mmap.mmap(file, layout.size)
    self.current: Int64[np.ndarray, " workers"] = np.frombuffer(mapped, np.int64, layout.workers)  # records being read
    self.pieces = np.frombuffer(mapped, layout.piece, layout.pieces, self.current.nbytes)

  def __reduce__(self) -> tuple[Any, ...]:
    return _received, (self.layout, reduction.DupFd(self.file))


def _received(layout: Layout, file: Any) -> Memory:
  return Memory(layout, file.detach())


def read(
  read: Callable[..., Rows],
  layout: Layout,
  pieces: Iterator[Piece],
  draw: tuple[int, ...],
  what: str,
) -> Iterator[Rows]:
  """Yields what `read` returns for each of the pieces, in their order; it holds until the next one is asked for.

  As many pieces are read ahead as the memory has. Raises a DataError, of `what`.
  """
  prepare()
  with contextlib.ExitStack() as stack:
    context = multiprocessing.get_context("forkserver")  # a fork of this process would have its threads' locks
    taken, tasks = (stack.enter_context(end) for end in context.Pipe(duplex=False))
    with _nameless(layout.size) as file:
      memory, readers = Memory(layout, file), dict[Any, tuple[int, process.BaseProcess]]()
      memory.current[:] = NONE
      for worker in range(layout.workers):
        answers, given = context.Pipe(duplex=False)
        stack.enter_context(answers)
        with given:
          arguments = (read, memory, worker, draw, taken, given)
          readers[answers] = worker, _started(context.Process(target=_work, args=arguments, daemon=True), what)
    free, order, done = list(range(layout.pieces)), collections.deque[int](), dict[int, DataError | None]()
    while True:
      while free and (piece := next(pieces, None)):
        order.append(free.pop())
        _write_task(memory.pieces[order[-1]], *piece)
        os.write(tasks.fileno(), bytes([order[-1]]))
      if not order:
        return
      place = order.popleft()
      while place not in done:
        for ready in connection.wait(list(readers)):
          done |= [_answer(ready, *readers[ready], memory, what)]
      if error := done.pop(place):
        raise error
      rows = memory.pieces[place]["rows"][: memory.pieces[place]["count"]]
      yield {name: rows[name] for name in layout.row}
      free.append(place)


@contextlib.contextmanager
def _nameless(size: int) -> Iterator[int]:
  """Yields a file in memory, or on a disk where the system knows none of these."""
  with os.fdopen(os.memfd_create("rows"), "r+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile() as file:
    file.truncate(size)
    yield file.fileno()


def _started(reader: process.BaseProcess, what: str) -> process.BaseProcess:
  try:
    reader.start()
  except (pickle.PicklingError, TypeError, AttributeError) as error:
    raise DataError(
      f"{what}: the source cannot be given to other processes ({type(error).__name__}: {error}); expected one that "
      "pickles, or workers=0 for threads"
    ) from error
  return reader


def _write_task(piece: Any, numbers: np.ndarray, places: np.ndarray) -> None:
  count = piece["count"] = len(numbers)
  piece["numbers"][:count], piece["places"][:count] = numbers, places


def _answer(
  answers: Any, worker: int, reader: process.BaseProcess, memory: Memory, what: str
) -> tuple[int, DataError | None]:
  """Returns which piece a reader has done, and what it met."""
  try:
    return answers.recv()
  except (EOFError, OSError):
    reader.join()
    code = reader.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    if memory.current[worker] == NONE:
      raise DataError(
        f"{what}: a process that was to read has ended at its start ({how}) and said why above; the source must "
        'pickle, and a script needs `if __name__ == "__main__":`'
      ) from None
    raise DataError(
      f"{what}: a process that read record {memory.current[worker]} has died ({how}), perhaps for want of memory; "
      "rerun to resume"
    ) from None


def _work(
  read: Callable[..., Rows], memory: Memory, worker: int, draw: tuple[int, ...], tasks: Any, given: Any
) -> None:
  """Reads until the process that trains has closed its ends of the pipes."""
  os.setpgrp()  # signals for a group, as Ctrl-C, are the training's to answer
  while task := os.read(tasks.fileno(), 1):
    piece, error = memory.pieces[task[0]], None
    numbers, places = (piece[key][: piece["count"]] for key in ("numbers", "places"))
    try:
      for row in range(len(numbers)):
        memory.current[worker] = numbers[row]
        for name, values in read(numbers[row : row + 1], places[row : row + 1], draw).items():
          piece["rows"][name][row] = values[0]
    except DataError as met:
      error = met
    try:
      given.send((task[0], error))
    except OSError:
      return

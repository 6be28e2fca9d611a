"""Signals that ask a training to end, noticed between steps: SIGTERM, by which clusters take a machine, and Ctrl-C."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import jax
from jax.experimental import multihost_utils

# Numbers the calls, over all generations: JAX lets all processes learn of a SIGTERM at the call of the same number.
_calls = itertools.count(1)


@contextlib.contextmanager
def watch(saves: bool) -> Iterator[Callable[[], bool]]:
  """Yields a function, to be called after each step, that says whether the run is to save a checkpoint and end.

  With `saves`, SIGTERM and the first Ctrl-C (SIGINT) do that; a second Ctrl-C goes to the previous handler, at once.
  Without, SIGTERM is not watched, and the function raises KeyboardInterrupt after a Ctrl-C. Python alone would raise it
  anywhere, and lose it in a destructor or a callback of the garbage collector.

  Several processes must call it equally often; a signal to any of them makes it true at the same call on all. A signal
  that comes after the last call goes to the previous handler. Outside the main thread, where Python handles no signals,
  it is always false.
  """
  in_main = threading.current_thread() is threading.main_thread()
  if jax.process_count() > 1:
    # JAX makes a SIGTERM known to all processes, so a Ctrl-C becomes one.
    forward = lambda number: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with _handled([signal.SIGINT] if in_main and saves else [], forward):
      yield lambda: saves and multihost_utils.reached_preemption_sync_point(next(_calls))
    return
  received: set[int] = set()
  asked: set[int] = set()

  def requested() -> bool:
    asked.update(received)
    if asked and not saves:
      raise KeyboardInterrupt
    return bool(asked)  # not `received`: a signal that has come since is neither asked about nor answered

  watched = [signal.SIGTERM, signal.SIGINT] if saves else [signal.SIGINT]
  try:
    with _handled(watched if in_main else [], received.add):
      yield requested
  finally:
    for number in received - asked:
      signal.raise_signal(number)


@contextlib.contextmanager
def _handled(numbers: Sequence[int], receive: Callable[[int], object]) -> Iterator[None]:
  """Calls `receive` with a signal that comes while the block runs; a second SIGINT goes to the previous handler."""
  interrupted = False

  def handle(number: int, frame: FrameType | None) -> None:
    nonlocal interrupted
    if number == signal.SIGINT and interrupted:
      signal.signal(number, before[number] or signal.SIG_DFL)
      signal.raise_signal(number)
    interrupted |= number == signal.SIGINT
    receive(number)

  # Ctrl-C is ignored in the background jobs of a script, and stays so.
  watched = [n for n in numbers if n == signal.SIGTERM or signal.getsignal(n) is not signal.SIG_IGN]
  before = {number: signal.getsignal(number) for number in watched}
  try:
    for number in watched:
      signal.signal(number, handle)
    yield
  finally:
    for number in watched:
      signal.signal(number, before[number] or signal.SIG_DFL)  # None: a handler that is not Python's

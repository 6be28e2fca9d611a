"""SIGTERM, by which clusters announce that a machine is taken away: noticed between steps, at one step everywhere."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# Numbers the calls, over all generations: JAX lets all processes learn of a SIGTERM at the call of the same number.
_calls = itertools.count(1)


@contextlib.contextmanager
def watch() -> Iterator[Callable[[], bool]]:
  """Yields a function, to be called after each step, that says whether the run is to end now.

  Several processes must call it equally often; a SIGTERM to any of them makes it true at the same call on all. A signal
  that comes after the last call goes to the previous handler. Outside the main thread, where Python handles no signals,
  it is always false.
  """
  if jax.process_count() > 1:
    yield lambda: multihost_utils.reached_preemption_sync_point(next(_calls))
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False
    return
  received = asked = False

  def receive(*_) -> None:
    nonlocal received
    received = True

  def requested() -> bool:
    nonlocal asked
    asked = received
    return received

  before = signal.signal(signal.SIGTERM, receive)
  try:
    yield requested
  finally:
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: a handler that is not Python's
    if received and not asked:
      signal.raise_signal(signal.SIGTERM)

"""A profiler's trace of a few training steps, for Perfetto, TensorBoard or xprof."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ban_jax import processes

logger = logging.getLogger(__name__)

# The dispatches of a training that are traced, counted from 0: those before them compile and warm up.
TRACED = range(6, 9)

# The directory that was asked for, until a training takes it.
_asked: list[str] = []


def trace_steps(directory: str | os.PathLike) -> None:
  """Profiles a few warmed-up dispatches of the next training of this process.

  A training of at most `TRACED.start` dispatches writes none and logs a warning. No byte of a result changes.

  Args:
    directory: a local directory. `directory/plugins/profile/DATE` then has a trace.json.gz for ui.perfetto.dev, and an
      xplane.pb for TensorBoard or xprof.

  Raises:
    OSError: if the directory cannot be written.

  Examples:
    >>> ban_jax.trace_steps(directory / "trace")
  """
  directory = os.path.abspath(os.path.expanduser(directory))
  os.makedirs(directory, exist_ok=True)
  if not os.access(directory, os.W_OK):
    raise PermissionError(f"{directory} cannot be written")
  _asked[:] = [directory]


@contextlib.contextmanager
def tracing() -> Iterator[Callable[[Any], None]]:
  """Yields a function to be called with what each dispatch returned; it writes the trace that was asked for."""
  if not (_asked and processes.is_primary()):
    yield lambda arrays: None
    return
  directory, dispatches, running = _asked.pop(), 0, False

  def dispatched(arrays: Any) -> None:
    nonlocal dispatches, running
    dispatches += 1
    if dispatches in (TRACED.start, TRACED.stop):
      jax.block_until_ready(arrays)  # a dispatch that began earlier is not in the trace, and the last one is to its end
      running = dispatches == TRACED.start
      jax.profiler.start_trace(directory) if running else jax.profiler.stop_trace()

  try:
    yield dispatched
  finally:
    if running:  # the training was shorter, or ended early
      jax.profiler.stop_trace()
    if dispatches < TRACED.start:
      logger.warning(f"no trace in {directory}: the training had {dispatches} dispatches, too few to be warm")

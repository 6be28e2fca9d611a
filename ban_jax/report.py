"""What a run shows while it trains: progress, TensorBoard events, and the caller's own functions."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm
from etils import epath

from ban_jax import processes
from ban_jax.errors import ConfigError, StorageError

# Minimum seconds between lines where there is no terminal.
PLAIN_INTERVAL = 30.0

Writer = Callable[[int, Mapping[str, float]], Any]


class Watch(NamedTuple):
  """The caller's functions that a training calls after each epoch, in the first process of several."""

  writers: tuple[Writer, ...] = ()
  on_epoch: Callable[[Sequence[Mapping[str, float]]], Any] | None = None

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Calls the writers; raises a StorageError if one of them cannot write."""
    for writer in self.writers:
      try:
        writer(step, dict(scalars))
      except OSError as error:
        name = getattr(writer, "__name__", type(writer).__name__)
        raise StorageError(f"the writer {name} failed: {error}; what the run saved before is intact") from error

  def stops(self, history: Sequence[Mapping[str, float]]) -> bool:
    """Returns whether `on_epoch` asks to end the training, the same in all processes."""
    if self.on_epoch is None:
      return False
    return processes.on_any_process(processes.is_primary() and bool(self.on_epoch(tuple(map(dict, history)))))


NOBODY = Watch()


def watch(writers: Sequence[Writer], on_epoch: Callable[..., Any] | None) -> Watch:
  """Returns the caller's functions; raises a ConfigError if they are none."""
  if not isinstance(writers, Sequence) or not all(map(callable, writers)):
    raise ConfigError(f"writers must be a sequence of functions of (step, scalars), not {writers!r}")
  if on_epoch is not None and not callable(on_epoch):
    raise ConfigError(f"on_epoch must be a function of the history, or None, not {on_epoch!r}")
  return Watch(tuple(writers), on_epoch)


class Progress:
  """A progress bar of `total` steps, `initial` of them done, on a terminal; a line now and then where there is none."""

  def __init__(self, title: str, total: int, initial: int, enabled: bool):
    steps = {"desc": title, "total": total, "initial": initial, "unit": "step", "disable": not enabled}
    self._plain = enabled and not sys.stderr.isatty()
    if self._plain:  # tqdm decides when a line is due and how it reads; what it draws itself goes nowhere
      line = "{desc}: step {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"
      self._bar = tqdm.tqdm(file=io.StringIO(), bar_format=line, mininterval=PLAIN_INTERVAL, miniters=1, **steps)
    else:
      self._bar = tqdm.tqdm(dynamic_ncols=True, **steps)

  def advance(self, steps: int) -> None:
    """Counts steps as done."""
    if self._bar.update(steps) and self._plain:
      self._print()

  def note(self, **values: float) -> None:
    """Shows values beside the steps from now on."""
    self._bar.set_postfix_str(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()))

  def close(self) -> None:
    """Shows the last state."""
    if self._plain:
      self._print()
    self._bar.close()

  def _print(self) -> None:
    print(self._bar, file=sys.stderr, flush=True)


@contextlib.contextmanager
def tensorboard(directory: epath.Path | None, done: int = 0) -> Iterator[Any]:
  """Yields `write(step, values)`, which adds scalars to an event file under `directory`; None writes nothing.

  A resumed run comes with the steps that are `done`: what an earlier event file has of later ones is not shown again.
  """
  if directory is None:
    yield lambda step, values: None
    return
  from tensorboardX import event_file_writer, summary
  from tensorboardX.proto import event_pb2

  # SummaryWriter writes from a thread of its own: on a full disk the thread dies, and the next scalar waits for ever.
  # The step in the name keeps sessions that start in the same second apart.
  writer = event_file_writer.EventsWriter(str(directory / "events"), f".{done:09d}")
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  writer.write_event(event_pb2.Event(wall_time=time.time(), step=done + 1, session_log=start))

  def write(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value)))
    writer.flush()

  try:
    yield write
  finally:
    with contextlib.suppress(OSError):  # every scalar is flushed already, or its error was raised
      writer.close()

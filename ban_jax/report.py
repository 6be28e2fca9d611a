"""What a run shows while it trains: progress, TensorBoard events, and the caller's own functions."""

import contextlib
import io
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tqdm
from etils import epath

from ban_jax import processes
from ban_jax.errors import ConfigError, StorageError

# What the names of TensorBoard's files begin with; a time in seconds follows.
EVENTS = "events.out.tfevents."
# Minimum seconds between lines where there is no terminal.
PLAIN_INTERVAL = 30.0
# What a terminal shows: at 80 columns the bar and the rate give way, not the values.
LINE = "{desc}: {n_fmt}/{total_fmt}{postfix}, {remaining} left {bar} {rate_fmt}"
# The metrics that TensorBoard groups by split; any other number of an epoch is the training's.
GROUPED = ("loss", "error", "nll", "ece", "brier", "perplexity", "bits_per_byte", "bits_per_character")

Writer = Callable[[int, Mapping[str, float]], Any]


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
  """Turns an OSError of the caller's function into a StorageError that names it: the workdir is sound."""
  try:
    yield
  except OSError as error:
    raise StorageError(f"{what} failed: {error}; what the run saved before is intact") from error


class Watch(NamedTuple):
  """The caller's functions that a training calls after each epoch, in the first process of several."""

  writers: tuple[Writer, ...] = ()
  on_epoch: Callable[[Sequence[Mapping[str, float]]], Any] | None = None

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Calls the writers; raises a StorageError if one of them cannot write."""
    for writer in self.writers:
      with _named(f"the writer {getattr(writer, '__name__', type(writer).__name__)}"):
        writer(step, dict(scalars))

  def stops(self, history: Sequence[Mapping[str, float]]) -> bool:
    """Returns whether `on_epoch` asks to end the training, the same in all processes."""
    if self.on_epoch is None:
      return False
    asked = False
    if processes.is_primary():
      with _named("on_epoch"):
        asked = bool(self.on_epoch(tuple(map(dict, history))))
    return processes.on_any_process(asked)


NOBODY = Watch()


def watch(writers: Sequence[Writer], on_epoch: Callable[..., Any] | None) -> Watch:
  """Returns the caller's functions; raises a ConfigError if they are not functions."""
  if not isinstance(writers, Sequence) or not all(map(callable, writers)):
    raise ConfigError(f"writers must be a sequence of functions of (step, scalars), not {writers!r}")
  if on_epoch is not None and not callable(on_epoch):
    raise ConfigError(f"on_epoch must be a function of the history, or None, not {on_epoch!r}")
  return Watch(tuple(writers), on_epoch)


class Progress:
  """A progress bar of `total` steps, `initial` of them done, on a terminal; a line now and then where there is none."""

  def __init__(self, title: str, total: int, initial: int, enabled: bool):
    steps = {"desc": title, "total": total, "initial": initial, "unit": "step", "disable": not enabled}
    self._plain = enabled and not is_terminal(sys.stderr)
    self._compiling = enabled and not self._plain  # until the first steps return
    if self._compiling:
      self._bar = tqdm.tqdm(dynamic_ncols=True, bar_format=LINE, postfix="compiling", **steps)
    else:  # tqdm decides when a line is due and how it reads; what it draws itself goes nowhere
      line = "{desc}: step {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"
      self._bar = tqdm.tqdm(file=io.StringIO(), bar_format=line, mininterval=PLAIN_INTERVAL, miniters=1, **steps)

  def advance(self, steps: int) -> None:
    """Counts steps as done."""
    if self._compiling:
      self._bar.set_postfix_str("", refresh=False)
      self._compiling = False
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
    if sys.stderr is not None:  # as in a daemon; print would take the standard output
      with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or one that nobody reads any more
        print(self._bar, file=sys.stderr, flush=True)


def is_terminal(stream: Any) -> bool:
  """Returns whether a stream is a terminal; false for None, a wrapper that does not say, and a closed one."""
  try:
    return bool(stream.isatty())
  except (AttributeError, ValueError):
    return False


@contextlib.contextmanager
def tensorboard(
  directory: epath.Path | None, done: int = 0, configuration: Mapping[str, Any] | None = None
) -> Iterator[Any]:
  """Yields `write(step, values)`, which adds scalars to an event file under `directory`; None writes nothing.

  The tags are in groups, "test/error" for the value "test_error", without counts. The configuration's values by key are
  shown as a table under "text".

  A resumed run comes with the steps that are `done`: what an earlier event file has of later ones is not shown again.
  Files are read in the order of the times in their names, so that no file gets an earlier time than those before it,
  even if the clock was set back.
  """
  if directory is None:
    yield lambda step, values: None
    return
  from tensorboardX import summary
  from tensorboardX.proto import event_pb2
  from tensorboardX.record_writer import RecordWriter

  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  begin = max([time.time(), *(_last_time(path) + 1 for path in directory.glob(f"{EVENTS}*"))])
  opened = time.monotonic()
  # SummaryWriter writes from a thread of its own: on a full disk the thread dies, and the next scalar waits for ever.
  writer = RecordWriter(str(directory / f"{EVENTS}{int(begin):010d}.{socket.gethostname()}.{done:09d}"))

  def add(**fields: Any) -> None:
    event = event_pb2.Event(wall_time=begin + time.monotonic() - opened, **fields)
    writer.write(event.SerializeToString())

  add(file_version="brain.Event:2")
  add(step=done + 1, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
  if configuration:
    rows = ["| key | value |", "|---|---|", *(f"| {key} | {value!r} |" for key, value in configuration.items())]
    add(step=done, summary=summary.text("configuration", "\n".join(rows)))

  def write(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      if not name.endswith("_count"):
        add(step=step, summary=summary.scalar(_tag(name), value))
    writer.flush()

  try:
    yield write
  finally:
    with contextlib.suppress(OSError):  # every scalar is flushed already, or its error was raised
      writer.close()


def _tag(name: str) -> str:
  """Returns the tag of an epoch's number."""
  metric = next((metric for metric in GROUPED if name.endswith(f"_{metric}")), "")
  return f"{name.removesuffix(f'_{metric}')}/{metric}" if metric else f"train/{name}"


def _last_time(events: epath.Path) -> float:
  """Returns the time of an event file's beginning or of its last change, whichever is later, in seconds."""
  stamp = events.name.removeprefix(EVENTS).partition(".")[0]
  return max(float(stamp) if stamp.isdecimal() else 0.0, events.stat().mtime)

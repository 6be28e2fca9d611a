"""What a run shows while it trains: a progress bar on a terminal or plain lines, and TensorBoard events."""

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm
from etils import epath

# Minimum seconds between lines where there is no terminal.
PLAIN_INTERVAL = 30.0


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

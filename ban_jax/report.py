"""What a run shows while it trains: a progress bar on a terminal or plain lines, and TensorBoard events."""

import contextlib
import math
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm
from etils import epath

# Minimum seconds between lines where there is no terminal.
PLAIN_INTERVAL = 30.0


class Progress:
  """A progress bar on a terminal, a line now and then elsewhere, nothing where it is switched off."""

  def __init__(self, title: str, total: int, initial: int, enabled: bool):
    self._title, self._total, self._done, self._initial = title, total, initial, initial
    self._terminal = enabled and sys.stderr.isatty()
    self._enabled = enabled
    self._note = ""
    self._start = self._shown = time.monotonic()
    self._bar = tqdm.tqdm(
      total=total, initial=initial, desc=title, unit="step", disable=not self._terminal, dynamic_ncols=True
    )

  def advance(self, steps: int) -> None:
    self._done += steps
    self._bar.update(steps)
    if self._enabled and not self._terminal and time.monotonic() - self._shown > PLAIN_INTERVAL:
      self._print()

  def note(self, **values: float) -> None:
    self._note = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
    self._bar.set_postfix_str(self._note)

  def close(self) -> None:
    self._bar.close()
    if self._enabled and not self._terminal:
      self._print()

  def _print(self) -> None:
    self._shown = time.monotonic()
    rate = (self._done - self._initial) / max(self._shown - self._start, 1e-9)
    left = (self._total - self._done) / rate if rate else math.inf
    remaining = f", {left:.0f} s left" if 0 < left < math.inf else ""
    note = f", {self._note}" if self._note else ""
    print(
      f"{self._title}: step {self._done}/{self._total}, {rate:.3g} steps/s{remaining}{note}",
      file=sys.stderr,
      flush=True,
    )


@contextlib.contextmanager
def progress(title: str, total: int, initial: int, enabled: bool) -> Iterator[Progress]:
  """Yields a Progress over `total` steps of which `initial` are done, and closes it however the block is left."""
  shown = Progress(title, total, initial, enabled)
  try:
    yield shown
  finally:
    shown.close()


@contextlib.contextmanager
def tensorboard(directory: epath.Path | None) -> Iterator[Any]:
  """Yields `write(step, values)`, which adds scalars to an event file under `directory`; None writes nothing."""
  if directory is None:
    yield lambda step, values: None
    return
  # Not needed, and not imported, where nothing is written.
  from tensorboardX import event_file_writer, summary
  from tensorboardX.proto import event_pb2

  # The library's SummaryWriter writes from a thread, which dies of a full disk; the next scalar then waits for ever.
  writer = event_file_writer.EventsWriter(str(directory / "events"))

  def write(step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      scalar = summary.scalar(name, value)
      writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=scalar))
    writer.flush()

  try:
    yield write
  finally:
    with contextlib.suppress(OSError):  # all that was written is flushed, or has raised
      writer.close()

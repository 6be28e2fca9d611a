"""Ctrl-C in the command lines: noticed at any moment, answered without a traceback. Imported first by every script.

Python turns SIGINT into a KeyboardInterrupt between two of its own instructions. In a destructor or a callback of the
garbage collector that is printed and forgotten; in an import it prints another library's traceback; and while compiled
code runs, two signals count as one. So a thread of its own reads every signal from a pipe. While a training that saves
checkpoints runs, the first one is the training's (ban_jax/preemption.py). Any other ends the process at once: all that
is on the disk may be cut off at any moment.
"""

import os
import pathlib
import signal
import sys
import threading

# Exit status of a process that SIGINT ended, as shells count it.
STATUS = 130
# Seconds that what is printed already may take to leave the process.
FLUSH_SECONDS = 1.0

_ending = threading.Lock()


def install() -> None:
  """Watches for SIGINT from now on; not where it is ignored, as in a background job of a script."""
  if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    return
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.signal(signal.SIGINT, end)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # every signal's number is written there, in C
  threading.Thread(target=_answer, args=(read,), daemon=True).start()


def _answer(read: int) -> None:
  """Answers each SIGINT that the pipe tells of; other signals are left to their handlers."""
  first = True
  while numbers := os.read(read, 1):
    if numbers[0] != signal.SIGINT:
      continue
    handler = signal.getsignal(signal.SIGINT)
    if handler is end or not first:
      end()
    first = False
    if handler is not signal.default_int_handler:
      _print("interrupted: a checkpoint is saved first; Ctrl-C once more ends at once")


def end(*_) -> None:
  """Ends the process at once."""
  if not _ending.acquire(blocking=False):  # another thread is about to
    return
  flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # a full pipe must not keep the process
  flush.start()
  flush.join(FLUSH_SECONDS)
  _print("interrupted; rerun the command to continue from the last checkpoint")
  os._exit(STATUS)


def _print(message: str) -> None:
  """Writes a line to standard error, below a progress bar, past Python's buffers, which may be in use."""
  start = "\n" if os.isatty(2) else ""
  os.write(2, f"{start}{message}\n".encode())


def _is_script() -> bool:
  """Returns whether the program is one of the scripts beside this file: a test or a notebook keeps its own Ctrl-C."""
  main = getattr(sys.modules["__main__"], "__file__", None)
  return main is not None and pathlib.Path(main).resolve().parent == pathlib.Path(__file__).resolve().parent


if _is_script():
  install()

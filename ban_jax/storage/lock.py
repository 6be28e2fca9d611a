"""One run a directory: a second process or thread is refused, and a lock that a killed process left blocks nobody.

The lock is flock's, which the system gives back whenever its holder ends. Object stores and some file systems have no
locks: there a warning asks for care.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

from etils import epath

from ban_jax import processes
from ban_jax.errors import InUseError

logger = logging.getLogger(__name__)

# The thread of this process that holds a directory.
_held: dict[str, int] = {}


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds a run directory for this thread while the block runs, or raises an InUseError that says who has it.

  A thread may hold a directory again that it holds already. Where there are no locks, other processes are not kept out.
  """
  name, thread = str(workdir), threading.get_ident()
  if _held.get(name) == thread:
    yield
    return
  if _held.setdefault(name, thread) != thread:
    raise _in_use(workdir, "another thread of this process")
  try:
    if "://" in name:
      _warn(workdir, "object stores have")
      yield
    else:
      with _flock(workdir):
        yield
  finally:
    del _held[name]


@contextlib.contextmanager
def _flock(workdir: epath.Path) -> Iterator[None]:
  with open(workdir / ".lock", "a+", encoding="utf-8") as file:
    try:
      if not processes.lock_file(file, wait=False):
        _warn(workdir, "its file system has")
    except BlockingIOError as error:
      file.seek(0)
      raise _in_use(workdir, file.read().strip() or "another process") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    yield


def _warn(workdir: epath.Path, what: str) -> None:
  logger.warning("workdir %s: %s no locks; make sure that no other process runs on it", workdir, what)


def _in_use(workdir: epath.Path, owner: str) -> InUseError:
  return InUseError(f"workdir {workdir} is in use by {owner}; wait until it ends, or give another workdir")

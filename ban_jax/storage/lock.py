"""One run a directory: a second process on it is refused, and a lock that a killed one left behind blocks nobody.

On a local disk the lock is flock's, which the system gives back whenever its holder ends. An object store has no locks:
there the holder writes a lease and renews it; whoever finds one watches it, and takes it over once it stays unrenewed.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from etils import epath

from ban_jax.errors import CheckpointError, InUseError

logger = logging.getLogger(__name__)

# A lease that is not renewed for so many seconds has no living owner; a living one renews it in a quarter of the time.
LEASE_SECONDS = 60.0

# What this process holds already: the same thread may hold it again, as `run` and the `train_generation` it calls do.
_held: dict[str, int] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[None]:
  """Holds a run directory for this thread while the block runs, or raises an InUseError that says who has it."""
  name, thread = str(workdir), threading.get_ident()
  with _guard:
    if _held.get(name, thread) != thread:
      raise _in_use(workdir, "another thread of this process")
    nested = name in _held
    _held[name] = thread
  if nested:
    yield
    return
  try:
    with _lease(workdir) if "://" in name else _flock(workdir):
      yield
  finally:
    with _guard:
      del _held[name]


def _in_use(workdir: epath.Path, owner: str) -> InUseError:
  return InUseError(f"workdir {workdir} is in use by {owner}; wait until it ends, or give another workdir")


def _owner() -> str:
  return f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


@contextlib.contextmanager
def _flock(workdir: epath.Path) -> Iterator[None]:
  with open(workdir / ".lock", "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise _in_use(workdir, file.read().strip() or "another process") from error
    file.truncate(0)
    file.write(_owner())
    file.flush()
    yield


@contextlib.contextmanager
def _lease(workdir: epath.Path, seconds: float | None = None) -> Iterator[None]:
  """Holds `workdir/lease.json`; a lease found there is watched for `seconds`, so that no two clocks are compared."""
  seconds = LEASE_SECONDS if seconds is None else seconds
  path = workdir / "lease.json"
  own = {"owner": _owner(), "token": uuid.uuid4().hex, "seconds": seconds}
  found = _read(path)
  if found:
    logger.info("%s is held by %s; waiting up to %g s for a sign of life", workdir, found["owner"], found["seconds"])
    deadline = time.monotonic() + found["seconds"]
    while time.monotonic() < deadline:
      time.sleep(found["seconds"] / 20)
      if (now := _read(path)) not in (None, found):
        raise _in_use(workdir, now["owner"])
  renewals = 0

  def renew() -> None:
    nonlocal renewals
    renewals += 1
    path.write_text(json.dumps({**own, "renewals": renewals}))

  renew()
  time.sleep(min(1.0, seconds / 20))  # of two that take it over at once, the later writer's stays
  now = _read(path) or own
  if now["token"] != own["token"]:
    raise _in_use(workdir, now["owner"])
  ended = threading.Event()

  def keep() -> None:
    while not ended.wait(seconds / 4):
      try:
        held = _read(path)
        if held and held["token"] != own["token"]:
          # It stood still for longer than the lease, and another took over: two writers would mix their files.
          logger.critical("%s was taken over by %s; this process ends", workdir, held["owner"])
          os._exit(CheckpointError.exit_status)
        renew()
      except Exception as error:  # whatever the object store's library raises: the next renewal may succeed
        logger.warning("the lease of %s could not be renewed: %s", workdir, error)

  keeper = threading.Thread(target=keep, daemon=True, name="lease")
  keeper.start()
  try:
    yield
  finally:
    ended.set()
    keeper.join()
    held = _read(path)
    if held and held["token"] == own["token"]:  # that of another, who took it over meanwhile, stays
      path.unlink(missing_ok=True)


def _read(path: epath.Path) -> dict | None:
  """Returns a lease, or None where there is none, or only a part of one."""
  try:
    lease = json.loads(path.read_text())
  except (OSError, json.JSONDecodeError):
    return None
  return lease if isinstance(lease, dict) and lease.keys() >= {"owner", "token", "seconds"} else None

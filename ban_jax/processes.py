"""What the processes of one run agree on. Every function with more than one process must be called by all of them."""

import contextlib
import errno
from collections.abc import Iterator
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils

from ban_jax.errors import BanError, PeerError
from ban_jax.trees import json_digest

try:
  import fcntl
except ImportError:  # not a POSIX system
  fcntl = None  # type: ignore[assignment]

# How a file system says that it has no locks: some mounts of Lustre and NFS, some systems in user space.
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def is_primary() -> bool:
  """Returns whether this process is the one that reports: the first of several, or the only one."""
  return jax.process_index() == 0


def on_any_process(flag: bool) -> bool:
  """Returns whether the flag is set on any of the processes."""
  return bool(np.any(multihost_utils.process_allgather(np.bool_(flag)))) if jax.process_count() > 1 else flag


def is_same(value: str) -> bool:
  """Returns whether all processes ask with the same text."""
  if jax.process_count() == 1:
    return True
  own = np.frombuffer(bytes.fromhex(json_digest(value)), np.uint8)
  every = multihost_utils.process_allgather(own)
  return bool((every == every[0]).all())


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Raises a BanError of the block on all processes: this one's own, or a PeerError where only another met one."""
  error = None
  try:
    yield
  except BanError as own:
    error = own
  failed = on_any_process(error is not None)
  if error is not None:
    raise error
  if failed:
    raise PeerError("another process of the run was refused; its own message says why")


def wait_for_all(what: str) -> None:
  """Waits until every process has come this far."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def lock_file(file: IO, *, wait: bool) -> bool:
  """Locks an open file until it is closed or this process ends; returns whether its file system has locks at all.

  Raises a BlockingIOError if another process holds it and `wait` is false.
  """
  if fcntl is None:
    return False
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except OSError as error:
    if error.errno not in WITHOUT_LOCKS:
      raise
    return False
  return True

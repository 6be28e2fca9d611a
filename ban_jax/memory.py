"""What a process keeps, to be faster: freed memory, on CPU, and compiled programs, for later processes."""

import ctypes
import os
import pathlib
import platform

import jax

# glibc's mallopt: no allocation by mmap, no trimming below 2 GB at the top of the heap, and one arena for all threads.
MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2_000_000_000), "M_ARENA_MAX": (-8, 1)}


def keep_freed_memory() -> bool:
  """Makes this process keep the memory that it frees, for training on CPU.

  XLA allocates a step's buffers anew each time, and glibc maps and unmaps them: 25,000 page faults a step of
  Wide-ResNet-16-1, a quarter of its time. Call it before the first computation; later it has no effect. The command
  lines do (--nokeep_memory switches it off). No byte of a result changes.

  Returns:
    Whether it could; False if the C library is not glibc.
  """
  if platform.libc_ver()[0] != "glibc":
    return False
  libc = ctypes.CDLL(None)
  return min(libc.mallopt(option, value) for option, value in MALLOPT.values()) == 1


def caches() -> pathlib.Path:
  """Returns the directory of what later processes find again, below $XDG_CACHE_HOME, or else ~/.cache."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ban_jax"


def keep_programs(directory: str | os.PathLike | None = None) -> str:
  """Makes JAX keep compiled programs on disk, so that a later process need not compile them again.

  The command lines do. Call it before the first computation.

  Args:
    directory: where; by default the one that JAX is set to already ($JAX_COMPILATION_CACHE_DIR), or else
      ~/.cache/ban_jax/xla, or ban_jax/xla in $XDG_CACHE_HOME.

  Returns:
    The directory.
  """
  found = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # made at run time
  default = found or caches() / "xla"
  kept = os.fspath(default if directory is None else directory)
  jax.config.update("jax_compilation_cache_dir", kept)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # dozens of small ones at each start, too
  return kept

"""Runs scripts in forks of a process that has imported what they import, which takes most of a short run's time.

Nothing is computed before a fork. Tests of signals, and of how a process starts or ends, start real processes instead.
"""

import atexit
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time

import one_cache

# What the scripts import. Not the scripts: each defines its own flags.
IMPORTED = (
  *("ban_jax.data", "ban_jax.storage", "ban_jax.train", "orbax.checkpoint", "sklearn.datasets", "tensorboardX"),
  *("experiments.cli", "experiments.results", "experiments.tables.run"),
)


class Fork:
  """A running script, with what is used here of a `subprocess.Popen`."""

  def __init__(self, arguments: list[str], folder: pathlib.Path, cwd: str | os.PathLike = "/"):
    """Starts a command line that begins with `sys.executable`; `folder` receives its output as `out` and `err`."""
    python, *self.args = map(os.fspath, arguments)
    if python != sys.executable:
      raise ValueError(f"a fork runs with {sys.executable}, not with {python}")
    self._folder, self.returncode = folder, None
    server = _server()
    server.stdin.write(json.dumps([self.args, os.fspath(cwd), os.fspath(folder)]) + "\n")
    server.stdin.flush()
    while not (folder / "pid").exists():
      if server.poll() is not None:
        raise RuntimeError(f"the process that forks has ended with status {server.returncode}")
      time.sleep(0.001)
    self.pid = int((folder / "pid").read_text())

  def poll(self) -> int | None:
    """Returns the exit status, -N after signal N, or None while the script runs."""
    if self.returncode is None and (self._folder / "status").exists():
      self.returncode = int((self._folder / "status").read_text())
    return self.returncode

  def wait(self, timeout: float | None = None) -> int:
    """Returns the exit status; raises subprocess.TimeoutExpired after `timeout` seconds."""
    end = None if timeout is None else time.monotonic() + timeout
    while self.poll() is None:
      if end is not None and time.monotonic() > end:
        raise subprocess.TimeoutExpired(self.args, timeout)
      time.sleep(0.005)
    return self.returncode


def run(arguments: list[str], cwd: str | os.PathLike = "/", timeout: int = 300) -> subprocess.CompletedProcess[str]:
  """Runs a command line that begins with `sys.executable`, like `subprocess.run` with the output as text."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    fork = Fork(arguments, folder, cwd)
    try:
      fork.wait(timeout)
    except subprocess.TimeoutExpired:
      os.kill(fork.pid, signal.SIGKILL)
      fork.wait()
      raise
    out, err = ((folder / file).read_text("utf-8", "replace") for file in ("out", "err"))
    return subprocess.CompletedProcess(arguments, fork.returncode, out, err)


@functools.cache
def _server() -> subprocess.Popen:
  server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, text=True)
  atexit.register(server.communicate)  # ends it
  return server


def serve() -> None:
  """Forks for every line of the standard input."""
  one_cache.install()
  for name in IMPORTED:
    __import__(name)
  gc.freeze()  # the memory of what is imported stays shared
  gc.set_threshold(100_000, 50, 50)  # as in conftest.py
  for line in sys.stdin:
    multiprocessing.get_context("fork").Process(target=_keep, args=json.loads(line)).start()
    multiprocessing.active_children()  # forgets those that have ended
  for child in multiprocessing.active_children():
    child.join()


def _keep(arguments: list[str], cwd: str, folder: str) -> None:
  """Starts the script in a fork, waits for it, and leaves its process id and its exit status in the folder."""
  script = multiprocessing.get_context("fork").Process(target=_start, args=(arguments, cwd, folder))
  script.start()
  _leave(folder, "pid", script.pid)
  script.join()
  _leave(folder, "status", script.exitcode)


def _leave(folder: str, name: str, number: int | None) -> None:
  path = os.path.join(folder, name)
  try:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
      file.write(str(number))
    os.rename(f"{path}.new", path)  # complete, or not there
  except FileNotFoundError:
    pass  # nobody waits any more


def _start(arguments: list[str], cwd: str, folder: str) -> None:
  """Runs a command line with its output in files of the folder."""
  for path, target in ((os.devnull, 0), (f"{folder}/out", 1), (f"{folder}/err", 2)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), target)
  os.chdir(cwd)
  become(arguments)


def become(arguments: list[str]) -> None:
  """Does what Python does with its arguments, in a process that has done nothing else."""
  first, *rest = arguments
  if first in ("-c", "-m"):
    sys.path[0] = os.getcwd()
    code, *rest = rest
  if first == "-c":
    sys.argv[:] = ["-c", *rest]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
  elif first == "-m":
    sys.argv[:] = [code, *rest]
    runpy.run_module(code, run_name="__main__", alter_sys=True)
  else:
    sys.path[0] = os.path.dirname(first)
    sys.argv[:] = [first, *rest]
    runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
  serve()

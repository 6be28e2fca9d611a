"""Runs scripts in forks of a process that has imported what they import, which takes most of a short run's time.

Nothing is computed before a fork. Tests that send signals, or whose subject is how a process starts or ends, start real
processes.
"""

import atexit
import functools
import gc
import json
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

# What the scripts import. Not the scripts: each defines its own flags.
IMPORTED = (
  *("ban_jax.data", "ban_jax.storage", "ban_jax.train", "orbax.checkpoint", "sklearn.datasets", "tensorboardX"),
  *("experiments.cli", "experiments.results", "experiments.tables.run"),
)


def run(arguments: list[str], cwd: str | os.PathLike = "/", timeout: int = 300) -> subprocess.CompletedProcess[str]:
  """Runs a command line that begins with `sys.executable`, like `subprocess.run` with the output as text."""
  python, *given = map(os.fspath, arguments)
  assert python == sys.executable
  with tempfile.TemporaryDirectory() as folder:
    out, err = pathlib.Path(folder, "out"), pathlib.Path(folder, "err")
    server = _server()
    server.stdin.write(json.dumps([given, os.fspath(cwd), str(out), str(err), timeout]) + "\n")
    server.stdin.flush()
    status = json.loads(server.stdout.readline())
    assert status is not None, f"{given} did not end within {timeout} seconds: {err.read_text()}"
    return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


@functools.cache
def _server() -> subprocess.Popen:
  server = subprocess.Popen(
    [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
  )
  atexit.register(server.communicate)  # ends it
  return server


def _serve() -> None:
  """Forks for every line of the standard input and prints the exit status."""
  for name in IMPORTED:
    __import__(name)
  gc.freeze()  # the memory of what is imported stays shared
  for line in sys.stdin:
    *given, timeout = json.loads(line)
    fork = multiprocessing.get_context("fork").Process(target=_become, args=given)
    fork.start()
    fork.join(timeout)
    if fork.exitcode is None:
      fork.kill()
      fork.join()
      print(json.dumps(None), flush=True)
    else:
      print(fork.exitcode, flush=True)


def _become(arguments: list[str], cwd: str, out: str, err: str) -> None:
  """Does what Python does with its arguments."""
  for path, target in ((os.devnull, 0), (out, 1), (err, 2)):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), target)
  os.chdir(cwd)
  first, *rest = arguments
  if first in ("-c", "-m"):
    sys.path[0] = cwd
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
  _serve()

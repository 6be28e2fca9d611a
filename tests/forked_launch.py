"""The launcher with processes that are forks of it, which saves each of them the imports; run in a fork itself.

python tests/forked_launch.py --processes=2 -- SCRIPT, as experiments/launch.py
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import types

import forks

from experiments import launch


class Child:
  """A process that the launcher starts, with what it uses of a `subprocess.Popen`."""

  def __init__(self, line, env, process_group, stdin, stdout, stderr):
    assert (process_group, stdin) == (0, subprocess.DEVNULL)
    pipes = [os.pipe() if stream == subprocess.PIPE else None for stream in (stdout, stderr)]
    self._process = multiprocessing.get_context("fork").Process(target=become, args=(line[1:], env, pipes))
    self._process.start()
    self.pid = self._process.pid
    for _, write in filter(None, pipes):
      os.close(write)
    self.stdout, self.stderr = (pipe and os.fdopen(pipe[0], "rb") for pipe in pipes)

  def poll(self):
    return self._process.exitcode

  def wait(self):
    while self._process.exitcode is None:  # another thread may have asked at the same moment
      self._process.join()
    return self._process.exitcode

  def send_signal(self, number):
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid, number)

  def terminate(self):
    self.send_signal(signal.SIGTERM)

  def kill(self):
    self.send_signal(signal.SIGKILL)


def become(arguments, env, pipes):
  os.setpgid(0, 0)
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_DFL)  # not the launcher's handlers
  os.environ.update(env)
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for target, pipe in enumerate(pipes, 1):
    if pipe:
      os.dup2(pipe[1], target)
  # The launcher's own were made for files.
  sys.stdout, sys.stderr = (os.fdopen(target, "w", encoding="utf-8", closefd=False) for target in (1, 2))
  forks.become(arguments)


if __name__ == "__main__":
  launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": Child})  # the processes keep their own
  if "--patient" in sys.argv:  # a second in place of its margin for processes to end in
    sys.argv.remove("--patient")
    launch.MARGIN = 1
  sys.exit(launch.main(sys.argv[1:]))

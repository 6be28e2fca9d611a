"""Runs one command as several CPU processes on this machine, for tests and to try out what a cluster would do.

python -m experiments.launch --processes=2 -- experiments/train.py --config=configs/digits.py --workdir=runs/digits

Appends `--coordinator_address`, `--num_processes`, `--process_id`, `--devices` and `--peer_timeout` to the command of
each process. Output of process 0 is passed through; that of process K is prefixed with `[K]`. SIGTERM and SIGINT go to
all. The exit status is that of the first process that failed for a reason of its own, 128 + N if signal N killed it.
Accelerators need no launcher: one process uses all of a machine's.
"""

import argparse
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

# Seconds beyond --peer_timeout that the other processes get to end by themselves.
MARGIN = 15.0
# Exit status of a process that has lost another one (errors.PeerError): never the first cause.
LOST_PEER = os.EX_UNAVAILABLE
# Flags that the launcher sets, so that the command must not.
OWN_FLAGS = ("coordinator_address", "num_processes", "process_id", "devices", "peer_timeout", "distributed")


def main(arguments: Sequence[str]) -> int:
  """Runs the command after `--` and returns the exit status."""
  options, command = _parse(list(arguments))
  processes: list[subprocess.Popen] = []
  port = _free_port()

  def forward(number: int, _) -> None:
    for process in processes:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  for place in range(options.processes):
    processes.append(_start(place, port, options, command))
  _log(f"process ids {' '.join(str(process.pid) for process in processes)}")
  readers = [_show(place, process) for place, process in enumerate(processes) if place]
  status = _wait(processes, options.peer_timeout + MARGIN)
  for reader in (thread for pair in readers for thread in pair):
    reader.join()
  return status


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns (the launcher's options, the command); a mistake ends with one line and status 2."""

  def at_least(least: int):
    def number(text: str) -> int:
      if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text!r}")
      return int(text)

    return number

  parser = argparse.ArgumentParser(
    "python -m experiments.launch", description=__doc__.partition("\n")[0], allow_abbrev=False,
    usage="%(prog)s --processes=N [options] -- SCRIPT [its flags]",
  )  # fmt: skip
  parser.add_argument("--processes", type=at_least(1), required=True, help="how many processes to start")
  parser.add_argument("--devices_per_process", type=at_least(1), default=1, help="CPU devices of each (default: 1)")
  parser.add_argument(
    "--peer_timeout", type=at_least(10), default=60, help="the command's --peer_timeout, in seconds (default: 60)"
  )
  parser.error = lambda message: parser.exit(2, f"error: {message}\n")  # one line, as the other commands answer
  split = arguments.index("--") if "--" in arguments else len(arguments)
  options, command = parser.parse_args(arguments[:split]), arguments[split + 1 :]
  if not command:
    parser.error("the command is missing: --processes=2 -- experiments/train.py --config=...")
  for argument in command:
    name = argument.partition("=")[0].lstrip("-")
    if argument.startswith("--") and name in OWN_FLAGS:
      own = "--devices_per_process" if name == "devices" else f"--{name}"
      how = f"; give {own} in front of the --" if name in ("devices", "peer_timeout") else ""
      parser.error(f"the launcher sets --{name} itself{how}")
  return options, command


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def _start(place: int, port: int, options: argparse.Namespace, command: list[str]) -> subprocess.Popen:
  """Starts a process in a group of its own, so that a terminal's Ctrl-C reaches it once, through the launcher."""
  own = {
    "coordinator_address": f"localhost:{port}",
    "num_processes": options.processes,
    "process_id": place,
    "devices": options.devices_per_process,
    "peer_timeout": options.peer_timeout,
  }
  line = [sys.executable, *command, *(f"--{name}={value}" for name, value in own.items())]
  pipe = subprocess.PIPE if place else None
  streams = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
  return subprocess.Popen(line, env={**os.environ, "JAX_PLATFORMS": "cpu"}, process_group=0, **streams)


def _show(place: int, process: subprocess.Popen) -> tuple[threading.Thread, threading.Thread]:
  """Copies the output of a process to the same streams here, each line after its number."""

  def copy(source: IO[bytes], target: int) -> None:
    for line in source:
      # One write per line, so that lines of several processes do not mix.
      os.write(target, f"[{place}] ".encode() + line.rstrip(b"\n") + b"\n")

  streams = ((process.stdout, sys.stdout.fileno()), (process.stderr, sys.stderr.fileno()))
  readers = tuple(threading.Thread(target=copy, args=stream, daemon=True) for stream in streams)
  for reader in readers:
    reader.start()
  return readers


def _wait(processes: list[subprocess.Popen], patience: float) -> int:
  """Waits for all and returns the exit status; after one has failed, kills the others in `patience` seconds."""
  ended = queue.SimpleQueue()
  for place, process in enumerate(processes):
    wait = lambda place=place, process=process: ended.put((place, process.wait()))  # noqa: E731
    threading.Thread(target=wait, daemon=True).start()
  status, deadline = 0, None
  for _ in processes:
    try:
      place, code = ended.get(timeout=None if deadline is None else max(deadline - time.monotonic(), 0))
    except queue.Empty:
      for left, process in enumerate(processes):
        if process.poll() is None:
          _log(f"process {left} did not end within {patience:g} seconds: killed")
          process.kill()
      deadline = None
      place, code = ended.get()
    if code:
      _log(f"process {place} {_how_it_ended(code)}")
    if code and (not status or status == LOST_PEER and deadline):  # without a deadline, it was killed here
      status = 128 - code if code < 0 else code
      deadline = deadline or time.monotonic() + patience
  return status


def _how_it_ended(code: int) -> str:
  """Returns a description of a return code."""
  if code == -signal.SIGABRT:  # so JAX ends a process, with a stack trace, when the coordination service fails
    return (
      "was aborted (SIGABRT): another process of the run had gone, or gave no sign of life; rerun the command to "
      "continue from the last checkpoint"
    )
  return f"ended with status {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def _log(message: str) -> None:
  print(f"launch: {message}\n", end="", file=sys.stderr, flush=True)  # in one write, as above


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

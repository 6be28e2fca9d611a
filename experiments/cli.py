"""What the command lines share: starting JAX, reading flags, and answering a user's mistake without a traceback."""

import contextlib
import logging
import os
import pathlib
import re
import shlex
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax import processes
from ban_jax.errors import BanError, ConfigError, PeerError, Preempted, StorageError, choices

DEVICES = flags.DEFINE_integer(
  "devices",
  0,
  "How many devices to run on; 0 takes all accelerators, or on CPU one device a core (2, 4 or 8 at most). With several "
  "processes: how many CPU devices this process has; each then takes all accelerators that it sees.",
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Start as one of several processes that find each other by themselves (TPU pods, Slurm)."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0, where they do not find each other."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many processes there are.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which of them this is, from 0.")
START_TIMEOUT = flags.DEFINE_integer(
  "start_timeout", 300, "With several processes: how many seconds to wait for the others at the start."
)
PEER_TIMEOUT = flags.DEFINE_integer(
  "peer_timeout", 60, "With several processes: after how many seconds without a sign of life from one a run ends."
)
PROGRESS = flags.DEFINE_bool("progress", True, "Show progress on standard error.")

# What the messages of JAX, its CPU collectives and Orbax have in them when another process is gone.
PEER_SIGNS = ("Gloo", "coordination service", "CoordinationService")
# Seconds that a failing process waits for the others to end with it.
PATIENCE = 3.0
# Exit status of a mistake that the user can mend.
USAGE = 2


def cpu_devices(cores: int) -> int:
  """Returns how many CPU devices to run on: the largest power of two up to the cores and 8.

  XLA splits a convolution poorly over threads: one device a core is about 1.5 times faster than one device with all.
  """
  return 1 << (min(cores, 8).bit_length() - 1)


def use_compilation_cache() -> None:
  """Keeps compiled programs on disk, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/ban_jax/xla."""
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "ban_jax" / "xla"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def start_jax() -> tuple[jax.Device, ...]:
  """Sets JAX up as the flags say, before its first computation, and returns the devices to run on."""
  _check_processes()
  use_compilation_cache()
  if "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
  if DEVICES.value < 0:
    raise ConfigError(f"--devices must be at least 0, not {DEVICES.value}")
  jax.config.update("jax_num_cpu_devices", DEVICES.value or cpu_devices(devices_lib.cores()))
  if COORDINATOR.value is not None or DISTRIBUTED.value:
    _join_processes()
  several = jax.process_count() > 1
  devices = jax.devices()
  own = jax.local_devices()
  if DEVICES.value > len(own) or several and DEVICES.value not in (0, len(own)):
    each = "; one of several processes takes all that it has" if several else ""
    raise ConfigError(f"--devices={DEVICES.value}, but there are {len(own)} devices of kind {own[0].device_kind}{each}")
  if DEVICES.value and not several:
    devices = devices[: DEVICES.value]
  return tuple(devices)


def _check_processes() -> None:
  """Raises a ConfigError where the flags of a run of several processes do not fit together."""
  given = {flag.name: flag.value for flag in (COORDINATOR, PROCESSES, PROCESS) if flag.value is not None}
  if DISTRIBUTED.value and given:
    raise ConfigError(f"--distributed finds the other processes by itself; leave out --{' and --'.join(given)}")
  if 0 < len(given) < 3:
    missing = [flag.name for flag in (COORDINATOR, PROCESSES, PROCESS) if flag.name not in given]
    raise ConfigError(f"--{' and --'.join(given)} also needs --{' and --'.join(missing)}")
  for flag, least in ((START_TIMEOUT, 1), (PEER_TIMEOUT, 10)):
    if flag.value < least:
      raise ConfigError(f"--{flag.name} must be at least {least} (seconds), not {flag.value}")
  if not given:
    return
  host, _, port = COORDINATOR.value.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 2**16):
    raise ConfigError(f"--coordinator_address must be host:port of process 0, not {COORDINATOR.value!r}")
  if PROCESSES.value < 1:
    raise ConfigError(f"--num_processes must be at least 1, not {PROCESSES.value}")
  if not 0 <= PROCESS.value < PROCESSES.value:
    raise ConfigError(
      f"--process_id must be from 0 to {PROCESSES.value - 1} with --num_processes={PROCESSES.value}, "
      f"not {PROCESS.value}"
    )


def _join_processes() -> None:
  """Waits for the other processes; where they do not all come, ends this one (JAX would abort it without a word)."""

  def give_up() -> None:
    where = f" at {COORDINATOR.value}" if COORDINATOR.value else ""
    print(
      f"error: not all processes of the run met{where} within {START_TIMEOUT.value} seconds (--start_timeout); start "
      "all of them, with the same address and number",
      file=sys.stderr,
      flush=True,
    )
    os._exit(PeerError.exit_status)

  if COORDINATOR.value is not None and PROCESS.value == 0:
    _check_port(int(COORDINATOR.value.rpartition(":")[2]))
  timer = threading.Timer(START_TIMEOUT.value, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      COORDINATOR.value,
      PROCESSES.value,
      PROCESS.value,
      initialization_timeout=START_TIMEOUT.value + 60,  # behind the timer's end
      heartbeat_timeout_seconds=PEER_TIMEOUT.value,
      shutdown_timeout_seconds=PEER_TIMEOUT.value,
    )
    # gloo connects at the first collective, and waits half a minute: the others must not be preparing data by then.
    processes.wait_for_all("start")
  except ValueError as error:
    raise ConfigError(
      f"the processes of the run cannot meet ({_told(error)}); --distributed is for TPU pods, Slurm and Open MPI: "
      "elsewhere give --coordinator_address, --num_processes and --process_id"
    ) from error
  finally:
    timer.cancel()


def _check_port(port: int) -> None:
  """Raises a ConfigError where process 0 cannot open its port; JAX, asked for a taken one, may crash."""
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what closed connections left behind is no hindrance
    try:
      probe.bind(("", port))
    except OSError as error:
      raise ConfigError(f"--coordinator_address: port {port} of this machine cannot be opened: {error}") from error


def lost_peer(error: BaseException) -> bool:
  """Returns whether an error of a run of several processes, or what is behind it, says that another one has gone."""
  link = error if jax.distributed.is_initialized() else None
  while link is not None:
    if isinstance(link, PeerError) or any(sign in str(link) for sign in PEER_SIGNS):
      return True
    link = link.__cause__ or link.__context__
  return False


@contextlib.contextmanager
def _peer_errors() -> Iterator[None]:
  """Turns what JAX and Orbax raise when another process has gone into a PeerError."""
  try:
    yield
  except Exception as error:
    if not lost_peer(error):
      raise
    raise PeerError(
      f"lost another process of the run ({_told(error)}); start all of them again: the run goes on from the last "
      "checkpoint"
    ) from error


@contextlib.contextmanager
def _ending_promptly() -> Iterator[None]:
  """Ends one of several processes as soon as it fails: JAX's own end would wait for others that may never come."""
  try:
    yield
  except BaseException as error:
    if not jax.distributed.is_initialized():
      raise
    if isinstance(error, SystemExit):  # its message is told already
      status = error.code if isinstance(error.code, int) else int(error.code is not None)
    else:
      traceback.print_exc()
      status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Where all end alike they meet in here at once. Otherwise process 0 stays a little, for the others to say what they
    # have to: they are aborted when it goes.
    if status != PeerError.exit_status or processes.is_primary():
      end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
      end.start()
      end.join(PATIENCE)
    os._exit(status)


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; a wrong flag ends with its message and status 2, a BanError with its own."""

  def parse(arguments: list[str]) -> list[str]:
    try:
      rest = flags.FLAGS(arguments)
      if "config" in flags.FLAGS and not isinstance(flags.FLAGS["config"].value, ConfigDict):
        raise ConfigError(_missing_config(arguments))
    except OSError:
      _fail(_missing_config(arguments))
    except Exception as error:  # flags, or whatever the configuration file raises
      told = _cause(error) or _wrong_key(arguments) or _repeated_config(arguments) or _endless(arguments, error)
      _fail(told or _without_traceback(str(error)) or type(error).__name__)
    if len(rest) > 1:
      _fail(f"unexpected arguments: {shlex.join(rest[1:])}; options begin with --")
    return rest

  def guarded(_) -> None:
    signal.signal(signal.SIGTERM, _terminated)
    absl_logging.set_verbosity(absl_logging.ERROR)  # TFDS warns at each start that OpenCV would decode faster
    logging.getLogger("ban_jax").setLevel(logging.INFO)
    try:
      with _peer_errors():
        main()
    except BanError as error:
      _fail(str(error), error.exit_status)
    except OSError as error:  # a table or a plot on a full disk
      _fail(str(error), StorageError.exit_status)
    except KeyboardInterrupt:
      print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
      sys.exit(130)

  def started(arguments: list[str]) -> None:
    with _ending_promptly():
      guarded(arguments)

  app.run(started, flags_parser=parse)


def _cause(error: BaseException) -> str | None:
  """Returns our own message where there is one behind the flag library's, which prints a traceback around it."""
  link, message = error, None
  while link is not None:
    message = str(link) if isinstance(link, BanError) else message
    link = link.__context__
  return message


def _without_traceback(message: str) -> str:
  """Returns a message's first and last line where the flag library has put a traceback between them."""
  lines = message.strip().splitlines()
  return f"{lines[0]} {lines[-1]}" if "Traceback" in message else message


def _config_argument(arguments: list[str]) -> str:
  """Returns what --config was given, as --config=FILE or as --config FILE."""
  given = ""
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      given = value if equals else following
  return given


def _missing_config(arguments: list[str]) -> str:
  """Returns what is wrong with a configuration file that could not be loaded."""
  path = _config_argument(arguments).partition(":")[0]
  return f"--config={path}: there is no such file" if not os.path.exists(path) else f"--config={path} cannot be read"


def _wrong_key(arguments: list[str]) -> str | None:
  """Returns which `--config.group.key` (or `--noconfig...`) names nothing, or no single value, and what could be there.

  Or what the configuration file raises, where it cannot be loaded at all.
  """
  keys = [found.group(1) for found in (re.match(r"--?(?:no)?config\.([^=]*)", given) for given in arguments) if found]
  for key in keys:
    if not all(key.split(".")):
      return f"--config.{key}: a configuration's key is expected, words with dots between them"
  given = _config_argument(arguments)
  if not given or not os.path.exists(given.partition(":")[0]):
    return None
  try:
    config = flags.FLAGS["config"].parser.parse(given)
  except Exception as error:
    # The library raises a TypeError or ValueError anew, with the traceback in its text.
    raised = error.__context__ or error
    lines = [frame.lineno for frame in traceback.extract_tb(raised.__traceback__) if frame.filename in given]
    where = f" (line {lines[-1]})" if lines else ""
    return f"--config={given} cannot be loaded: {type(raised).__name__}: {raised}{where}"
  if not isinstance(config, ConfigDict):
    return _missing_config(arguments)
  for key in keys:
    value, path = config, []
    for name in key.split("."):
      if not isinstance(value, ConfigDict) or name not in value:
        known = choices(value) if isinstance(value, ConfigDict) else "none, it is a value"
        where = f"under {'.'.join(path)}" if path else "there"
        return f"unknown configuration key {'.'.join([*path, name])!r}; {where} are: {known}"
      value, path = value[name], [*path, name]
    if isinstance(value, ConfigDict) or path == ["teacher", "model"]:
      keys = f" with the keys: {choices(value)}" if value else ""
      return (
        f"--config.{'.'.join(path)} is a group{keys}; networks are chosen by the words behind the configuration file "
        '("data set,network,scale,teacher=network")'
      )
  return None


def _repeated_config(arguments: list[str]) -> str | None:
  """Returns that there are several configurations: the library checks the keys by the first and changes the last."""
  count = sum(argument.partition("=")[0] in ("--config", "-config") for argument in arguments)
  return f"--config is given {count} times; give it once" if count > 1 else None


def _endless(arguments: list[str], error: Exception) -> str | None:
  """Returns which argument is so long that the flag library, which looks for names like it, goes too deep."""
  longest = max(arguments, key=len)
  is_it = isinstance(error, RecursionError)
  return f"an argument of {len(longest):,} characters is no option: {longest[:40]}..." if is_it else None


def _told(error: BaseException) -> str:
  """Returns an error's first line, cut short."""
  return (str(error) or type(error).__name__).splitlines()[0][:200]


def _terminated(*_) -> None:
  """Ends a process that gets SIGTERM while it trains nothing: all that is finished is on the disk."""
  _fail("asked to end by SIGTERM; the same command goes on from there", Preempted.exit_status)


def _fail(message: str, status: int = USAGE) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)

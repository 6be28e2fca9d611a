"""What the entry points share: starting JAX, parsing flags, and reporting a user's mistake without a traceback."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from ban_jax import chips, config, memory, processes, profiling
from ban_jax import devices as devices_lib
from ban_jax.errors import BanError, ConfigError, PeerError, Preempted, StorageError, choices, first_line
from experiments import interrupts

DEVICES = flags.DEFINE_integer(
  "devices",
  0,
  "Number of devices of this process; 0: all accelerators, or one CPU device with all cores; for students side by side "
  "one per core (at most 8).",
)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Run as one of several processes that find each other.")
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0; without --distributed.")
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: the number of processes.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator_address: the number of this process, from 0.")
START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes at the start.")
PEER_TIMEOUT = flags.DEFINE_integer("peer_timeout", 60, "Seconds without a sign of another process until the run ends.")
KEEP_MEMORY = flags.DEFINE_bool(
  "keep_memory", True, "Keep freed memory in the process (glibc's mallopt): a CPU step is a quarter faster."
)
ONEDNN = flags.DEFINE_bool(
  "onednn",
  False,
  "Use oneDNN's convolutions on CPU: from JAX 0.12 on, steps of narrow networks are 15% faster, but programs cannot be "
  "kept in the compilation cache. XLA_FLAGS that name oneDNN win.",
)
VMEM = flags.DEFINE_integer(
  "vmem_kib",
  0,
  "On TPUs, KiB of a chip's vector memory that one fused operation may use; 0: the compiler's own limit. By the "
  "compiler's estimate 65536 makes steps of Wide-ResNets up to 18% cheaper, those of DenseNets and LSTMs 5% dearer. "
  "LIBTPU_INIT_ARGS that name the limit win.",
  lower_bound=0,
)
PROFILE = flags.DEFINE_string(
  "profile", None, "Directory for a profiler's trace of a few steps, after those that compile and warm up."
)
PROGRESS = flags.DEFINE_bool("progress", True, "Show progress on standard error.")

# Found in the messages of JAX, its CPU collectives and Orbax when another process is gone.
PEER_SIGNS = ("Gloo", "coordination service", "CoordinationService")
# Seconds that a failing process waits for the others to end, too.
PATIENCE = 3.0
# Exit status of a mistake that the user can correct.
USAGE = 2
# The flags that ask for help; absl's own show a part of the flags and end with status 1.
HELP = {"help", "h", "helpshort", "helpfull"}


def cpu_devices(cores: int) -> int:
  """Returns on how many CPU devices to train students side by side: the largest power of two up to the cores and 8."""
  return 1 << (min(cores, 8).bit_length() - 1)


def start_jax(*, side_by_side: bool = False) -> tuple[jax.Device, ...]:
  """Configures JAX by the flags, before its first computation, and returns the devices to run on.

  If the flags leave it open, that is one CPU device with all cores, or one per core for students `side_by_side`.
  """
  _check_processes()
  chips.describe_host()
  memory.keep_programs()
  limit_vmem()
  _add_flags("XLA_FLAGS", "xla_gpu_deterministic_ops", "--xla_gpu_deterministic_ops=true")
  if ONEDNN.value:
    _add_flags("XLA_FLAGS", "onednn", "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_custom_call=true")
  if KEEP_MEMORY.value:
    memory.keep_freed_memory()
  if DEVICES.value < 0:
    raise ConfigError(f"--devices must be at least 0, not {DEVICES.value}")
  jax.config.update("jax_num_cpu_devices", DEVICES.value or (cpu_devices(devices_lib.cores()) if side_by_side else 1))
  if COORDINATOR.value is not None or DISTRIBUTED.value:
    _join_processes()
  devices = devices_lib.resolve(None)
  several = jax.process_count() > 1
  if PROFILE.value is not None:
    if not PROFILE.value:
      raise ConfigError("--profile is empty; name the directory for the trace")
    profiling.trace_steps(PROFILE.value)
  own = jax.local_devices()
  if DEVICES.value > len(own) or several and DEVICES.value not in (0, len(own)):
    each = "; one of several processes takes all that it has" if several else ""
    raise ConfigError(f"--devices={DEVICES.value}, but there are {len(own)} devices of kind {own[0].device_kind}{each}")
  if DEVICES.value and not several:
    devices = devices[: DEVICES.value]
  return tuple(devices)


def limit_vmem() -> None:
  """Tells libtpu, before it is loaded, how much of a chip's vector memory one fused operation may use."""
  if VMEM.value:
    _add_flags("LIBTPU_INIT_ARGS", "xla_tpu_scoped_vmem_limit_kib", f"--xla_tpu_scoped_vmem_limit_kib={VMEM.value}")


def read_changes(flag: str, text: str) -> dict[str, Any]:
  """Returns configuration values by dotted key, which a flag gives as JSON; raises a ConfigError for anything else."""
  try:
    values = json.loads(text)
  except ValueError as error:
    raise ConfigError(f"{flag}: {error}") from error
  if not isinstance(values, dict):
    raise ConfigError(f'{flag}={text}: expected an object of values by key, as {{"train.epochs": 30}}')
  return values


def change(cfg: ConfigDict, changes: Mapping[str, Any], flag: str) -> None:
  """Changes a configuration's values by dotted key; raises a ConfigError for a key or a type that it does not have."""
  known = config.record(cfg)
  for key, value in changes.items():
    if key not in known:
      raise ConfigError(f"{flag}: unknown configuration key {key!r}; choose one of: {choices(known)}")
    try:
      cfg.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    except (TypeError, ValueError) as error:
      raise ConfigError(f"{flag}: {key}={json.dumps(value)}: expected a value like {known[key]!r}") from error


def _add_flags(variable: str, word: str, added: str) -> None:
  """Adds flags to an environment variable, unless the user's own contain the word."""
  own = os.environ.get(variable, "")
  if word not in own:
    os.environ[variable] = f"{own} {added}".strip()


def _check_processes() -> None:
  """Raises a ConfigError if the flags for several processes contradict each other."""
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
  """Waits for the other processes; ends this one if some do not come, where JAX would abort it without a message."""

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
      initialization_timeout=START_TIMEOUT.value + 60,  # the timer ends first
      heartbeat_timeout_seconds=PEER_TIMEOUT.value,
      shutdown_timeout_seconds=PEER_TIMEOUT.value,
    )
    # gloo connects at the first collective and waits half a minute, so no process may start preparing data before it.
    processes.wait_for_all("start")
  except ValueError as error:
    raise ConfigError(
      f"the processes of the run cannot meet ({first_line(error)}); --distributed is for TPU pods, Slurm and Open "
      "MPI: elsewhere give --coordinator_address, --num_processes and --process_id"
    ) from error
  finally:
    timer.cancel()


def _check_port(port: int) -> None:
  """Raises a ConfigError if process 0 cannot open its port; JAX may crash on a port that is taken."""
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX does: closed connections do not block it
    try:
      probe.bind(("", port))
    except OSError as error:
      raise ConfigError(f"--coordinator_address: port {port} of this machine cannot be opened: {error}") from error


def lost_peer(error: BaseException) -> bool:
  """Returns whether an error, or one of its causes, means that another process of the run has gone."""
  link = error if jax.distributed.is_initialized() else None
  while link is not None:
    if isinstance(link, PeerError) or any(sign in str(link) for sign in PEER_SIGNS):
      return True
    link = link.__cause__ or link.__context__
  return False


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; a wrong flag ends with its message and status 2, a BanError with its own."""

  def guarded(_) -> None:
    signal.signal(signal.SIGTERM, _terminated)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where the process was started with it closed
      stream.reconfigure(errors="backslashreplace")  # a terminal of another locale shows what it can
    absl_logging.set_verbosity(absl_logging.ERROR)  # TFDS would warn at each start that OpenCV decodes faster
    logging.getLogger("ban_jax").setLevel(logging.INFO)
    try:
      main()
    except BaseException as error:
      _end(_explain(error))

  app.run(guarded, flags_parser=_parse)


def unwind_on_interrupt() -> None:
  """Makes Ctrl-C an exception from now on, for a script that has children to end and temporary files to remove."""
  if signal.getsignal(signal.SIGINT) is interrupts.end:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _explain(error: BaseException) -> int:
  """Prints the message of an error, or the traceback of an unexpected one; returns the exit status."""
  if isinstance(error, SystemExit):  # its message is printed already
    return error.code if isinstance(error.code, int) else int(error.code is not None)
  if isinstance(error, KeyboardInterrupt):
    print("interrupted", file=sys.stderr)
    return interrupts.STATUS
  if lost_peer(error):
    error = PeerError(
      f"lost another process of the run ({first_line(error)}); start all of them again: the run continues from the "
      "last checkpoint"
    )
  if not isinstance(error, OSError | BanError):
    traceback.print_exception(error)
    return 1
  print(f"error: {error}\n", end="", file=sys.stderr)  # in one write, so that lines of several processes do not mix
  return error.exit_status if isinstance(error, BanError) else StorageError.exit_status  # a plot on a full disk


def _end(status: int) -> NoReturn:
  """Ends this process; one of several at once, since JAX's own shutdown would wait for the others, even forever."""
  if not jax.distributed.is_initialized():
    sys.exit(status)
  for stream in filter(None, (sys.stdout, sys.stderr)):
    stream.flush()
  # If all processes end for the same reason, they meet in this shutdown at once. Otherwise process 0 stays a little, so
  # that the others can print their messages: they are aborted when it goes.
  if status != PeerError.exit_status or processes.is_primary():
    end = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    end.start()
    end.join(PATIENCE)
  os._exit(status)


def _parse(arguments: list[str]) -> list[str]:
  """Returns the arguments that are no flags; a mistake ends with one line and status 2, --help with all flags and 0."""
  if {argument.lstrip("-") for argument in arguments[1:] if argument.startswith("-")} & HELP:
    print(usage())
    sys.exit(0)
  try:
    rest = flags.FLAGS(arguments)
    if "config" in flags.FLAGS and not isinstance(flags.FLAGS["config"].value, ConfigDict):
      raise ConfigError(_missing_config(arguments))
  except OSError:
    _fail(_missing_config(arguments))
  except Exception as error:  # a wrong flag, or anything that the configuration file raises
    _fail(_cause(error) or _wrong_key(arguments) or _without_traceback(str(error)) or type(error).__name__)
  if len(rest) > 1:
    _fail(f"unexpected arguments: {shlex.join(rest[1:])}; options begin with --")
  return rest


def usage() -> str:
  """Returns what the script does, as its docstring says, and every flag that it takes."""
  width = min(shutil.get_terminal_size().columns, 100)
  parts, shared = [sys.modules["__main__"].__doc__ or ""], []
  for module, defined in sorted(flags.FLAGS.flags_by_module_dict().items(), key=lambda item: item[0] != sys.argv[0]):
    if module == sys.argv[0] or module.startswith("experiments."):
      (shared if module == __name__ else parts).extend(_describe(flag, width) for flag in defined)
  parts.insert(1, "Flags of this script:" if len(parts) > 1 else "It has no flags of its own.")
  if "config" in flags.FLAGS:
    parts.append(
      "  --config.KEY=VALUE\n      Changes a value of the configuration; ban_jax/keys.py documents every key."
    )
  return "\n\n".join([*(part.strip("\n") for part in parts), "Flags of all scripts:", *shared])


def _describe(flag: flags.Flag, width: int) -> str:
  """Returns a flag's name, meaning, choices and default."""
  if flag.boolean:
    name, default = f"--[no]{flag.name}", "yes" if flag.default else "no"
  else:
    name, default = f"--{flag.name}=VALUE", flag.default is not None and flag.default_as_str.strip("'")
  text = " ".join((flag.help or "").split())
  of = f" One of: {', '.join(flag.parser.enum_values)}." if isinstance(flag, flags.EnumFlag) else ""
  end = f" (default: {default})" if default else ""
  return f"  {name}\n" + textwrap.fill(text + of + end, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _cause(error: BaseException) -> str | None:
  """Returns the message of a BanError among the causes, which the flag library wraps into a traceback."""
  link, message = error, None
  while link is not None:
    message = str(link) if isinstance(link, BanError) else message
    link = link.__context__
  return message


def _without_traceback(message: str) -> str:
  """Returns a message without the traceback that the flag library puts between its first and last line."""
  lines = message.strip().splitlines()
  return f"{lines[0]} {lines[-1]}" if "Traceback" in message else message


def _config_argument(arguments: list[str]) -> str:
  """Returns the value of --config, given as --config=FILE or as --config FILE."""
  given = ""
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      given = value if equals else following
  return given


def _missing_config(arguments: list[str]) -> str:
  """Returns why a configuration file could not be loaded."""
  path = _config_argument(arguments).partition(":")[0]
  return f"--config={path}: there is no such file" if not os.path.exists(path) else f"--config={path} cannot be read"


def _wrong_key(arguments: list[str]) -> str | None:
  """Returns a message for a `--config.group.key` (or `--noconfig...`) that names nothing, or a whole group.

  If the configuration file itself fails to load, returns its error.
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
    # The library wraps a TypeError or ValueError into another one, with the traceback in its text.
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
        f"--config.{'.'.join(path)} is a group{keys}; networks are chosen by the words after the configuration file "
        '("data set,network,scale,teacher=network")'
      )
  return None


def _terminated(*_) -> None:
  """Ends a process that gets SIGTERM between trainings, when all results are on the disk."""
  _fail("asked to end by SIGTERM; rerun the command to continue", Preempted.exit_status)


def _fail(message: str, status: int = USAGE) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(status)

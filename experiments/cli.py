"""What the command lines share: starting JAX, reading flags, and answering a user's mistake without a traceback."""

import logging
import os
import pathlib
import sys
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax.errors import BanError, ConfigError, choices

DEVICES = flags.DEFINE_integer(
  "devices", 0, "How many devices to run on; 0 takes all accelerators, or on CPU one device a core (2, 4 or 8 at most)."
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Start as one of several processes that find each other by themselves (TPU pods, Slurm)."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator_address", None, "host:port of process 0, where they do not find each other."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator_address: how many processes there are.")
PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator_address: which of them this is, from 0.")
PROGRESS = flags.DEFINE_bool("progress", True, "Show progress on standard error.")

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
  use_compilation_cache()
  if "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
  if DEVICES.value < 0:
    raise ConfigError(f"--devices must be at least 0, not {DEVICES.value}")
  jax.config.update("jax_num_cpu_devices", DEVICES.value or cpu_devices(devices_lib.cores()))
  if COORDINATOR.value:
    if PROCESSES.value is None or PROCESS.value is None:
      raise ConfigError("--coordinator_address needs --num_processes and --process_id beside it")
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  elif DISTRIBUTED.value:
    jax.distributed.initialize()
  devices = jax.devices()
  if DEVICES.value > len(devices):
    raise ConfigError(
      f"--devices={DEVICES.value}, but there are {len(devices)} devices of kind {devices[0].device_kind}"
    )
  if DEVICES.value and jax.process_count() == 1:
    devices = devices[: DEVICES.value]
  return tuple(devices)


def run(main: Callable[[], None]) -> None:
  """Parses the flags and calls `main`; a BanError or a wrong flag ends with its message and exit status 2."""

  def parse(arguments: list[str]) -> list[str]:
    try:
      rest = flags.FLAGS(arguments)
      if "config" in flags.FLAGS and not isinstance(flags.FLAGS["config"].value, ConfigDict):
        raise ConfigError(_missing_config(arguments))
    except OSError:
      _fail(_missing_config(arguments))
    except (BanError, flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
      _fail(_cause(error) or _wrong_key(arguments) or str(error))
    if len(rest) > 1:
      _fail(f"unexpected arguments: {' '.join(rest[1:])}; options begin with --")
    return rest

  def guarded(_) -> None:
    absl_logging.set_verbosity(absl_logging.ERROR)  # TFDS warns at each start that OpenCV would decode faster
    logging.getLogger("ban_jax").setLevel(logging.INFO)
    try:
      main()
    except BanError as error:
      _fail(str(error))
    except KeyboardInterrupt:
      print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
      sys.exit(130)

  app.run(guarded, flags_parser=parse)


def _cause(error: BaseException) -> str | None:
  """Returns our own message where there is one behind the flag library's, which prints a traceback around it."""
  link, message = error, None
  while link is not None:
    message = str(link) if isinstance(link, BanError) else message
    link = link.__context__
  return message


def _config_argument(arguments: list[str]) -> str:
  """Returns what --config was given, as --config=FILE or as --config FILE."""
  given = ""
  for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name == "--config":
      given = value if equals else following
  return given


def _missing_config(arguments: list[str]) -> str:
  """Returns what is wrong with a configuration file that could not be loaded."""
  path = _config_argument(arguments).partition(":")[0]
  return f"--config={path}: there is no such file" if not os.path.exists(path) else f"--config={path} cannot be read"


def _wrong_key(arguments: list[str]) -> str | None:
  """Returns which `--config.group.key` names nothing, or no single value, and what could stand there."""
  given = _config_argument(arguments)
  if not given or not os.path.exists(given.partition(":")[0]):
    return None
  config = flags.FLAGS["config"].parser.parse(given)
  for argument in arguments:
    if not argument.startswith("--config."):
      continue
    value, path = config, []
    for name in argument.partition("=")[0].removeprefix("--config.").split("."):
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


def _fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(USAGE)

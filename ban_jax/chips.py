"""Accelerators that are not here: their names, what they have, and devices to compile for.

XLA's compilers need a description of a chip, not the chip: libtpu for TPUs (pip install 'ban_jax[compile]'), the wheels
of jax[cuda12] for GPUs ('ban_jax[cuda]').
"""

import importlib.util
import logging
import os
import pathlib
import re
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from ban_jax.errors import ConfigError
from ban_jax.types import Devices


class Chip(NamedTuple):
  """What a program finds on a chip."""

  memory: int  # bytes that the compiler lets a program have
  peak: float  # operations a second in bfloat16, for TPUs float32's too, at JAX's default precision
  # Of TPUs: operations a cycle in bfloat16, those of all its matrix units. The compiler's own estimate for a product of
  # 8192 x 8192 matrices is 88 % of it on v5e, 93 % on v4, 90 % on v5p and 70 % on v6e.
  flops_per_cycle: int = 0
  axes: int = 0  # of the torus that the chips of a pod are joined in

  @property
  def clock(self) -> float:
    """Cycles a second, of TPUs."""
    return self.peak / self.flops_per_cycle


# Peaks from https://docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, and NVIDIA's data sheet (H100 SXM, dense).
# Of a v4's 32 GiB, a v5e's 16, a v5p's 95 and a v6e's 32, the compiler keeps a part for itself.
CHIPS = {
  "v4": Chip(int(30.75 * 2**30), 275e12, 2**18, 3),
  "v5e": Chip(int(15.75 * 2**30), 197e12, 2**17, 2),
  "v5p": Chip(int(95.74 * 2**30), 459e12, 2**18, 3),
  "v6e": Chip(int(31.25 * 2**30), 918e12, 2**19, 2),
  "h100": Chip(84_942_979_072, 989e12),
}
# What JAX calls the TPUs that it finds.
DEVICE_KINDS = {
  **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
  **{"TPU v6 lite": "v6e", "TPU v6e": "v6e"},
}
EXPECTED = "expected CHIPS:SHAPE as v5e:4x4, or CHIPS-NUMBER as v5e-16, with v4, v5e, v5p or v6e; or h100, or h100x8"
# What keeps libtpu from asking a TPU machine about itself, and lets other processes compile at the same time.
LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}
# Nothing can be timed where there is no GPU; untuned tiles of Triton do not fit a transformer's products, cuBLAS does.
XLA_GPU = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
# In the words of XLA's own description of this GPU.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "12.9.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0" dnn_version: "9.28.0"
  name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Slice(NamedTuple):
  """Chips that are not here."""

  kind: str
  chip: Chip
  shape: tuple[int, ...]  # chips along each axis
  devices: Devices
  compiler: str  # its name and version

  def __str__(self) -> str:
    chips = "1 chip" if len(self.devices) == 1 else f"{len(self.devices)} chips"
    return f"{chips} of {self.kind} ({'x'.join(map(str, self.shape))})"


def find(name: str) -> Slice:
  """Returns the chips that a name means, each as one device to compile for.

  `v5e:4x4` names their shape, `v5e-16` is Google's name of a slice: on v4 and v5p its number counts the two cores of
  each chip. `h100x8` is one machine of eight GPUs. Raises a ConfigError for other names, for a slice that there cannot
  be, and where the compiler is not installed. Sets environment variables that libtpu, or XLA for GPUs, reads as it is
  loaded: use a process of its own, whose JAX runs on the CPU.
  """
  kind, shape = parse(name)
  chip = CHIPS[kind]
  if chip.axes:
    return Slice(kind, chip, shape, _tpus(name, kind, shape), f"libtpu {version('libtpu')}")
  return Slice(kind, chip, shape, _gpus(shape[0]), f"XLA for GPUs of jaxlib {version('jaxlib')}")


def of_device(device: jax.Device) -> Chip | None:
  """Returns what is known of the TPU that a device is; None for anything else."""
  return CHIPS.get(DEVICE_KINDS.get(device.device_kind, ""))


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Returns the kind of a slice's chips, and how many lie along each axis."""
  found = re.fullmatch(r"(h100)(?:x([1-9]\d*))?|(v4|v5e|v5p|v6e)(?::([1-9]\d*(?:x[1-9]\d*)*)|-([1-9]\d*))", name)
  if not found:
    raise ConfigError(f"topology={name!r}: {EXPECTED}")
  gpu, count, tpu, shape, number = found.groups()
  if gpu:
    return gpu, (int(count or 1),)
  axes = CHIPS[tpu].axes
  if number:
    chips, rest = divmod(int(number), axes - 1)  # Google counts cores where the torus has three axes
    if rest or chips & (chips - 1) or not chips:
      raise ConfigError(f"topology={name!r}: expected a power of two of chips, or their shape ({EXPECTED})")
    power = chips.bit_length() - 1
    lengths = [2 ** ((power + place) // axes) for place in range(axes)]
    return tpu, (2, 2, 1) if chips == 4 and axes == 3 else tuple(lengths)
  lengths = [int(length) for length in shape.split("x")]
  if len(lengths) != axes:
    raise ConfigError(f"topology={name!r}: expected {axes} axes, since the chips of {tpu} lie in as many")
  return tpu, tuple(lengths)


def describe_host() -> None:
  """Tells libtpu what it would ask a TPU machine, if this is none: else it complains at length as JAX starts."""
  if not any(pathlib.Path("/dev").glob("accel*")) and not pathlib.Path("/dev/vfio").exists():
    for variable, value in LIBTPU.items():
      os.environ.setdefault(variable, value)


def _tpus(name: str, kind: str, shape: tuple[int, ...]) -> Devices:
  if not importlib.util.find_spec("libtpu"):
    raise ConfigError(
      f"topology={name!r}: libtpu, which holds the compiler for TPUs, is not installed: pip install 'ban_jax[compile]' "
      "(Linux x86-64)"
    )
  describe_host()
  options: dict[str, Any] = {"chip_config_name": "megacore"} if len(shape) == 3 else {}  # both cores are one device
  if set(shape) == {1}:
    options["chips_per_host_bounds"] = (1,) * 3
  layout = "x".join(map(str, shape))
  try:
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{layout}", **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"topology={name!r}: {str(error).splitlines()[0]}") from error


def _gpus(count: int) -> Devices:
  from jax._src import xla_bridge  # private, for what jax-ml/jax issue 23971 asks for

  if not any(importlib.util.find_spec(f"jax_cuda{number}_plugin") for number in (12, 13)):
    raise ConfigError(
      "topology='h100': the compiler for GPUs is not installed: pip install 'ban_jax[cuda]' (Linux, 6 GB)"
    )
  os.environ.update(CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
  own = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = own if XLA_GPU in own else f"{own} {XLA_GPU}".strip()
  level = logging.root.manager.disable
  logging.disable(logging.ERROR)  # that there is no GPU
  jax.devices()  # finds the plugins, once
  logging.disable(level)
  # A GPU that is described and not attached is found by no other name.
  if not hasattr(xla_bridge.canonicalize_platform, "described"):
    canonicalize = xla_bridge.canonicalize_platform

    def canonicalize_platform(platform: str) -> str:
      return "cuda" if platform in ("gpu", "cuda") else canonicalize(platform)

    canonicalize_platform.described = True  # type: ignore[attr-defined]
    xla_bridge.canonicalize_platform = canonicalize_platform
  # One slice of one machine.
  described = topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{count}")
  return tuple(described.devices)

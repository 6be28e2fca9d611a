"""What the devices of a training step exchange, and its expected time on a TPU pod: arithmetic, not measurement.

  python experiments/scaling.py --config=configs/cifar.py:cifar100,wrn_28_10,paper

Needs no accelerator and, for CIFAR and PTB, no data. The step is compiled for a few virtual CPU devices: collectives
are read from the compiled program, floating-point operations counted on the traced one. docs/scaling.md explains the
tables. Defaults are for TPU v4: peak from https://docs.cloud.google.com/tpu/docs/v4, interconnect from
https://jax-ml.github.io/scaling-book/tpus and https://jax-ml.github.io/scaling-book/sharding, share of the peak from
PaLM (arXiv:2204.02311).
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from ban_jax import data, job, programs, resolving
from ban_jax.compiled import exchanges
from ban_jax.errors import ConfigError
from experiments import cli, results

BOUNDS = (1e-6, 1e6)  # of rates: positive and finite
CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A configuration file and its words, as configs/cifar.py:cifar100,wrn_28_10,paper."
)
_TEACHER = flags.DEFINE_bool("teacher", True, "Count a student's step; without it, generation 0's.")
_SLICES = flags.DEFINE_list("slices", ["2x2x2", "4x4x4", "8x8x8"], "Slices of the pod, as chips along each axis.")
_PEAK = flags.DEFINE_float("peak_tflops", 275.0, "Peak of a chip in 10^12 operations/s, bfloat16 (TPU v4).", *BOUNDS)
_UTILIZATION = flags.DEFINE_float("utilization", 0.462, "Share of the peak that the network reaches (PaLM).", 1e-6, 1.0)
_LINK = flags.DEFINE_float("link_gbps", 45.0, "Bandwidth of a link, one way, in 10^9 bytes/s (TPU v4).", *BOUNDS)
_HOP = flags.DEFINE_float("hop_us", 1.0, "Latency of a hop between neighboring chips, in microseconds.", 0.0, 1e6)

# Collectives do not depend on the number of devices if there are several; every preset's batch is even.
VIRTUAL = 2


class Collective(NamedTuple):
  """One exchange of data between devices, or between device and host."""

  kind: str
  bytes: int


class Slice(NamedTuple):
  """A slice of a pod."""

  axes: tuple[int, ...]  # chips along each axis
  link: float  # rate of one link, bytes/s, one way
  hop: float  # latency of a hop, seconds

  @property
  def chips(self) -> int:
    return math.prod(self.axes)


def collectives(text: str) -> list[Collective]:
  """Returns the exchanges between devices, and between device and host, in the text of a compiled program."""
  return [Collective(kind, each.bytes) for kind, each in exchanges(text)]


def all_reduce_seconds(size: int, pod: Slice) -> float:
  """Returns the time of an all-reduce of `size` bytes over all chips of a slice, one axis after another.

  An axis reduces the share left by the axis before it, and gathers on the way back. An axis of a multiple of 4 chips is
  a closed ring, whose links carry data in both directions; others are lines. A ring takes
  2 (n - 1) / n * size / bandwidth, and a hop for each link to the farthest chip and back.
  """
  seconds, share = 0.0, float(size)
  for chips in pod.axes:
    closed = chips % 4 == 0
    hops = chips // 2 if closed else chips - 1
    rate = pod.link * (2 if closed else 1)
    seconds += 2 * share * (chips - 1) / chips / rate + 2 * hops * pod.hop
    share /= chips
  return seconds


def collectives_table(found: Sequence[Collective]) -> str:
  """Returns a Markdown table of a step's collectives, the largest one in a line of its own."""
  gradients = max(entry.bytes for entry in found)
  kinds = sorted({(entry.kind, entry.bytes == gradients) for entry in found}, reverse=True)
  rows = [["collective", "number", "bytes"]]
  for kind, largest in kinds:
    sizes = [entry.bytes for entry in found if (entry.kind, entry.bytes == gradients) == (kind, largest)]
    what = "the largest: gradients, loss" if largest else "others: counts, batch norm's statistics"
    rows.append([f"{kind}, {what}", str(len(sizes)), f"{sum(sizes):,}"])
  return results.markdown(rows)


def scaling_table(
  found: Sequence[Collective], flops: float, batch: int, rate: float, slices: Sequence[Slice]
) -> list[list[str]]:
  """Returns the rows of the table of efficiencies, for `flops` per example and `rate` per second and chip.

  First with `batch` as the global mini-batch, then with `batch` examples on each chip. Assumes that communication and
  computation do not overlap.
  """
  times = ("compute [ms]", "largest [ms]", "others [ms]")
  rows = [["chips", "slice", "global batch", "a chip", *times, "efficiency", "examples/s"]]
  sizes = sorted((entry.bytes for entry in found), reverse=True)
  for fixed in (True, False):
    for pod in slices:
      total = batch if fixed else batch * pod.chips
      row = [str(pod.chips), "x".join(map(str, pod.axes)), f"{total:,}"]
      if total % pod.chips:
        rows.append([*row, "cannot be shared", *[""] * 5])
        continue
      compute = flops * total / pod.chips / rate
      gradients, *others = (all_reduce_seconds(size, pod) for size in sizes)
      step = compute + gradients + sum(others)
      times = [f"{1e3 * seconds:.3f}" for seconds in (compute, gradients, sum(others))]
      rows.append([*row, str(total // pod.chips), *times, f"{compute / step:.0%}", f"{total / step:,.0f}"])
  return rows


def parse_slices(names: Sequence[str], link: float, hop: float) -> list[Slice]:
  """Returns the slices for names such as "4x4x4"; raises a ConfigError for anything else."""
  for name in names:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", name):
      raise ConfigError(f"--slices={name}: the chips along each axis are expected, as 4x4x4")
  return [Slice(tuple(int(chips) for chips in name.split("x")), link, hop) for name in names]


def main() -> None:
  """Prints the collectives, the operations and the expected efficiencies of a configuration's training step."""
  slices = parse_slices(_SLICES.value, _LINK.value * 1e9, _HOP.value * 1e-6)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", VIRTUAL)
  cli.use_compilation_cache()
  cfg = CONFIG.value
  setup = resolving.resolve(cfg, jax.devices(), load=data.describe)
  program = programs.training(job.describe(setup, int(_TEACHER.value)), 1)
  batch = cfg.train.batch_size
  flops = programs.count_flops(program) * VIRTUAL / batch
  found = collectives(program.step.lower(*program.arguments).compile().as_text())
  rate = _PEAK.value * 1e12 * _UTILIZATION.value
  teacher = "with" if _TEACHER.value else "without"
  print(
    f"{flops:.4g} floating-point operations a step and example, {teacher} a teacher\n\n{collectives_table(found)}\n"
  )
  rates = f"{_LINK.value:g} GB/s a link, {_HOP.value:g} us a hop"
  print(f"At {_UTILIZATION.value:.1%} of {_PEAK.value:g} TFLOP/s, {rates}:\n")
  print(results.markdown(scaling_table(found, flops, batch, rate, slices)))


flags.mark_flag_as_required("config")

if __name__ == "__main__":
  cli.run(main)

"""What the nodes of a graph cost to train: steps, operations, and expected hours on accelerators."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict

from ban_jax import data, job, losses, programs, resolving, summary
from ban_jax.types import Devices
from experiments.tables import graph
from experiments.tables.graph import Node

# Assumptions of the expected hours. The peaks are those of dense products at JAX's default precision for float32: TF32
# on A100 (NVIDIA's data sheet) and H100 (SXM), bfloat16 on the four chips of a TPU v4-8. The share of the peak and the
# minimum time per step are guesses for small images and small batches, made before anything was measured: on an H200
# steps of four networks took 0.4 to 1.3 times as long as an H100's would by them (docs/performance.md).
PEAKS = {"A100": 156e12, "H100": 495e12, "TPU v4-8": 4 * 275e12}
UTILIZATION, STEP_SECONDS = 0.2, 0.005


class Cost(NamedTuple):
  """The cost of a training: steps, and floating-point operations of products and convolutions."""

  steps: int
  flops: float

  def hours(self, peak: float) -> float:
    """Returns the expected hours on an accelerator with this peak, in operations per second."""
    return (self.flops / (peak * UTILIZATION) + self.steps * STEP_SECONDS) / 3600


class Work(NamedTuple):
  """The work of an epoch of training: its steps, and the floating-point operations of each on all devices together."""

  steps_per_epoch: int
  flops: int


def work(cfg: ConfigDict, devices: Devices, *, taught: bool = True) -> Work:
  """Returns the work of an epoch of a student, or without `taught` of generation 0; raises as a run would."""
  found = job.describe(resolving.resolve(cfg, devices, load=data.describe), int(taught))
  return Work(found.steps_per_epoch, programs.count_flops(programs.training(found, 1)) * len(devices))


def cost(node: Node, known: dict[str, Work]) -> Cost:
  """Returns the cost of training a node from start to end; `known` caches counts across calls."""
  taught = node.generation > 0 and losses.make_loss(node.cfg.loss).needs_teacher
  key = f"{node.network} {node.teacher.network if taught else ''} {node.cfg.data} {node.cfg.train.batch_size}"
  if key not in known:
    known[key] = work(node.cfg, tuple(jax.devices()[:1]), taught=node.generation > 0)
  steps = known[key].steps_per_epoch * node.cfg.train.epochs
  return Cost(steps, steps * float(known[key].flops))


def cost_table(nodes: Sequence[Node], workdir: epath.Path) -> str:
  """Returns a Markdown table of every node's state and cost, and the sum of what is left to do."""
  if not nodes:
    return "0 generations: there is nothing to do for this shard"
  counted: dict[str, Work] = {}
  known: dict[str, graph.Found] = {}
  states = [graph.state(node, workdir, known) for node in nodes]
  costs = [cost(node, counted) for node in nodes]
  rows = [
    [node.summary, state, f"{own.steps:,}", _rounded(own.flops / 1e15), node.path]
    for node, state, own in zip(nodes, states, costs, strict=True)
  ]
  left = [own for state, own in zip(states, costs, strict=True) if state != "finished"]
  total = Cost(sum(own.steps for own in left), sum(own.flops for own in left))
  counts = [f"{states.count(state)} {state}" for state in ("finished", "begun", "to do") if state in states]
  hours = ", ".join(f"{_rounded(total.hours(peak))} h on one {name}" for name, peak in PEAKS.items())
  return (
    summary.markdown([["generation", "state", "steps", "PFLOP", "directory"], *rows])
    + f"\n\n{len(nodes)} generations: {', '.join(counts)}. Left, at most: {total.steps:,} steps, "
    f"{_rounded(total.flops / 1e15)} PFLOP of training; expected {hours} ({UTILIZATION:.0%} of the peak and "
    f"{1e3 * STEP_SECONDS:g} ms a step: assumed; steps on an H200 took 0.4 to 1.3 times as long)."
  )


def _rounded(value: float) -> str:
  """Returns a number with two significant digits, or all its digits before the point."""
  return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"

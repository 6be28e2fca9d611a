"""Every network of Tables 1-6 with its parameters, beside the count that Furlanello et al. 2018 print.

  python experiments/parameters.py             about 15 seconds: nothing is computed but shapes
  python experiments/parameters.py --memory    and what a training step of a DenseNet keeps in memory

The table's footnotes say how to read it; docs/design.md and the networks' own files, how the layers were worked out.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.extend import core

from ban_jax.models import make_model
from ban_jax.types import InputSpec, Model
from configs import presets
from experiments import cli
from experiments.programs import WORDS, made_up_words, subprograms, trained_sizes

_MEMORY = flags.DEFINE_bool("memory", False, "also count the memory of a training step of --network")
_DENSENETS = sorted(name for name in presets.MODELS if name.startswith("densenet"))
_NETWORK = flags.DEFINE_enum("network", "densenet_80_120", _DENSENETS, "the DenseNet that --memory counts")
_BATCH = flags.DEFINE_integer("batch", 128, "images per device in the step that --memory counts", lower_bound=1)


class Row(NamedTuple):
  """A network: its preset, the tables it stands in, and the parameters that the paper prints, in millions."""

  network: str
  tables: str
  paper: str


ROWS = (
  Row("wrn_28_1", "1, 3", "0.38"),
  Row("wrn_28_2", "1, 3", "1.48"),
  Row("wrn_28_5", "1, 3", "9.16"),
  Row("wrn_28_10", "1, 3", "36"),
  Row("densenet_112_33", "1, 2", "6.3"),
  Row("densenet_90_60", "1, 2, 3", "16.1"),
  Row("densenet_80_80", "1, 2", "22.4"),
  Row("densenet_80_120", "1, 2", "50.4"),
  Row("densenet_90_60", "4, 5", "22.4"),  # the teacher; evidently DenseNet-80-80's count
  Row("densenet_90_60_depth_0_5", "4", "21.2"),
  Row("densenet_90_60_depth_2", "4", "13.7"),
  Row("densenet_90_60_depth_3", "4", "12.9"),
  Row("densenet_90_60_depth_4", "4", "12.6"),
  Row("densenet_90_60_compression_0_5", "4", "5.1"),
  Row("densenet_90_60_compression_0_75", "4", "10.1"),
  Row("densenet_90_60_compression_1_5", "4", "80.5"),
  Row("pre_resnet_14_0_5", "5", "7.3"),
  Row("pre_resnet_14_1", "5", "17.7"),
  Row("wide_match_1_1", "5", "20.9"),
  Row("wide_match_2_1", "5", "43.1"),
  Row("wide_match_4_0_5", "5", "24.3"),
  Row("wide_match_4_1", "5", "87.3"),
)

# Table 6, with the millions that the paper prints.
LANGUAGE_ROWS = (("lstm", "52"), ("lstm_1", "52"), ("cnn_lstm", "19"))
LANGUAGE_FOOTNOTES = """\
With the Penn Treebank's 10,000 words; the LSTMs' embedding is their output's kernel, the CNN-LSTM's output has its own.
The paper's text says that its LSTM has one layer; 52M parameters are nearer to two, which is why `lstm` has two."""

FOOTNOTES = """\
Parameters in millions, with 10 and with 100 classes; of Table 5's students only those that are trained, since the paper
leaves the teacher's stem and classifier out. The difference is that of the column nearer to the paper's figure.
* The paper's figure is not reproduced. It counts as reproduced where either column, rounded or truncated, shows the
  printed digits: the paper does both, and its Table 1 evidently counts the Wide-ResNets with 100 classes.
DenseNet-112-33 has 6.3M in Table 1 and 6.5M in the text, which also calls it 116-33 and 106-33.
Table 4's compression variants and Table 5's bottleneck students are readings: configs/presets.py and
ban_jax/models/matched_resnet.py give the reasons. Table 5's Pre-activation ResNet-1001 is quoted there, not trained."""


class Network(NamedTuple):
  """What a network's shapes tell."""

  units: int  # per stage
  stages: tuple[int, ...]  # channels at the end of each stage
  parameters: dict[int, int]  # number of classes -> trained parameters


def build(network: str, num_classes: int = 100, **settings: Any) -> Model:
  """Returns the preset's network for CIFAR images; `settings` are its options, or those of `make_model`."""
  options = presets.MODELS[network].to_dict()
  options |= {key: settings.pop(key) for key in tuple(settings) if key in options}
  spec = InputSpec("images", (32, 32, 3), num_classes)
  return make_model(options, spec, sync_batch_stats=False, **settings)


def parameter_shapes(model: Model) -> dict[str, Any]:
  """Returns the parameter tree with shapes in place of arrays."""
  return jax.eval_shape(model.init, jax.random.key(0))["params"]


@functools.cache
def describe(network: str) -> Network:
  """Returns the preset's units, stage widths and trained parameters."""
  model = build(network, 100)
  params = parameter_shapes(model)
  trained = trained_sizes(model)
  # Nothing but the classifier depends on the number of classes, and all of it in proportion.
  ten = sum(size // 10 if name == "classifier" else size for name, size in trained.items())
  units = sum(name.startswith("stage1_unit") for name in params)
  stages = tuple(_width(params, stage, units) for stage in (1, 2, 3))
  return Network(units, stages, {10: ten, 100: sum(trained.values())})


def difference(paper: str, counts: Sequence[int]) -> tuple[float, bool]:
  """Returns the nearest count's relative difference from the paper's millions, and whether the digits agree."""
  decimals = len(paper.partition(".")[2])
  printed = round(float(paper) * 10**decimals)
  shown = [count / 1e6 * 10**decimals for count in counts]
  nearest = min((count / 1e6 / float(paper) - 1 for count in counts), key=abs)
  return nearest, any(printed in (round(value), int(value)) for value in shown)


def table() -> list[str]:
  """Returns the lines of the table, in Markdown."""
  lines = [
    f"| {'network':<31} | tables  | units | {'stage widths':<15} | 10 cl.  | 100 cl. | paper | difference |",
    f"|{'-' * 33}|{'-' * 9}|{'-' * 7}|{'-' * 17}|{'-' * 9}|{'-' * 9}|{'-' * 7}|{'-' * 12}|",
  ]
  for row in ROWS:
    network = describe(row.network)
    share, reproduced = difference(row.paper, tuple(network.parameters.values()))
    counts = " | ".join(f"{network.parameters[classes] / 1e6:7.3f}" for classes in (10, 100))
    stages = ", ".join(map(str, network.stages))
    lines.append(
      f"| {row.network:<31} | {row.tables:<7} | {network.units:5} | {stages:<15} | {counts} | {row.paper:>5} | "
      f"{share:+8.1%} {' ' if reproduced else '*'} |"
    )
  return lines


def language_table() -> list[str]:
  """Returns the lines of Table 6's networks, in Markdown."""
  spec = InputSpec("tokens", (35,), WORDS, made_up_words())
  lines = [
    "| network  | table | LSTM layers | parameters | paper | difference |",
    "|----------|-------|-------------|------------|-------|------------|",
  ]
  for network, paper in LANGUAGE_ROWS:
    count = _size(parameter_shapes(make_model(presets.MODELS[network], spec))) / 1e6
    layers = presets.MODELS[network].layers
    lines.append(
      f"| {network:<8} | 6     | {layers:11} | {count:10.3f} | {paper:>5} | {count / float(paper) - 1:+10.1%} |"
    )
  return lines


class Memory(NamedTuple):
  """Bytes of a training step on one device, counted from shapes."""

  weights: int  # parameters and batch statistics, momentum, gradient, and a teacher as large as the student
  kept: int  # what the forward pass keeps for the backward pass, parameters, images and broadcasts aside
  peak: int  # the most that is alive at any moment, weights included


def count_memory(model: Model, batch: int) -> Memory:
  """Returns what a training step on `batch` images needs, by the lifetimes of its intermediate results.

  The results are taken to come and go in the order in which JAX traces them, each stored in full but for broadcasts. A
  compiler that fuses element-wise operations needs less; the convolutions' own workspaces come on top.
  """
  variables = jax.eval_shape(model.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((batch, *model.spec.shape), jnp.float32)

  def forward(params, batch_stats, images):
    def logits_of(params):
      variables = {"params": params, "batch_stats": batch_stats}
      # The key is for dropout, which DenseNets have none of.
      logits, _, updated = model.apply(variables, (), images, train=True, key=jax.random.key(0), positions=None)
      return logits, updated

    return jax.vjp(logits_of, params, has_aux=True)

  def gradient(*arguments):
    logits, pull_back, updated = forward(*arguments)
    # What the backward pass closes over; and its results, the logits standing for their own gradient's shape.
    return jax.tree.leaves(pull_back), (pull_back(logits), updated)

  jaxpr, (closed_over, _) = jax.make_jaxpr(gradient, return_shape=True)(
    variables["params"], variables["batch_stats"], images
  )
  closed_over, results = jaxpr.jaxpr.outvars[: len(closed_over)], jaxpr.jaxpr.outvars[len(closed_over) :]
  # A result kept for several units is one variable, hence the set; arguments are no results.
  kept = {variable for variable in closed_over if not isinstance(variable, core.Literal)} - {*jaxpr.jaxpr.invars}
  kept -= {made for equation in jaxpr.jaxpr.eqns if _is_broadcast(equation) for made in equation.outvars}
  parameters = _bytes(variables["params"])
  weights = 4 * parameters + 2 * _bytes(variables["batch_stats"])
  # The gradient is among the step's own results; the other weights and the images are there all along.
  standing = 3 * parameters + 2 * _bytes(variables["batch_stats"]) + _bytes(images)
  peak = standing + _peak(jaxpr.jaxpr, results)
  return Memory(weights, sum(_bytes(variable.aval) for variable in kept), peak)


def memory_table(network: str, batch: int) -> list[str]:
  """Returns the lines of the memory table, in GiB, in Markdown."""
  lines = [
    f"Training step of {network}, {batch} images, GiB:",
    "",
    "| compute  | remat | weights | kept for backward | peak |",
    "|----------|-------|---------|-------------------|------|",
  ]
  for dtype in ("float32", "bfloat16"):
    for remat in (False, True):
      model = build(network, remat=remat, compute_dtype=dtype)
      weights, kept, peak = (value / 2**30 for value in count_memory(model, batch))
      lines.append(f"| {dtype:<8} | {'yes' if remat else 'no':<5} | {weights:7.2f} | {kept:17.2f} | {peak:4.1f} |")
  return [
    *lines,
    "",
    "Weights: parameters, momentum, gradient and a teacher of the same size. Peak: the most alive at any moment, every",
    "intermediate result stored in full, in the order of the trace; a compiler that fuses needs less.",
  ]


def _size(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _width(params: dict[str, Any], stage: int, units: int) -> int:
  """Returns the channels at a stage's end: of its closing 1x1 convolution, or else of its last unit."""
  if f"transition{stage}" in params:
    kernel = params[f"transition{stage}"]["conv"]["kernel"]
  elif f"match{stage}" in params:
    kernel = params[f"match{stage}"]["kernel"]
  else:
    unit = params[f"stage{stage}_unit{units}"]
    kernel = unit[max(name for name in unit if name.startswith("conv"))]["kernel"]
  return kernel.shape[-1]


def _peak(jaxpr: core.Jaxpr, results: Sequence[Any]) -> int:
  """Returns the most bytes alive at once in a traced function that returns `results`, its arguments aside."""
  last = {variable: None for variable in results if not isinstance(variable, core.Literal)}
  dying: list[list[Any]] = []
  for equation in reversed(jaxpr.eqns):
    used = [v for v in (*equation.invars, *equation.outvars) if not isinstance(v, core.Literal) and v not in last]
    last.update(dict.fromkeys(used))
    dying.append(list(dict.fromkeys(used)))
  alive, peak, sizes = 0, 0, {}
  for equation, dead in zip(jaxpr.eqns, reversed(dying), strict=True):
    made = {variable: 0 if _is_broadcast(equation) else _bytes(variable.aval) for variable in equation.outvars}
    inside = max((_peak(sub, sub.outvars) for sub in subprograms(equation.params)), default=0)
    peak = max(peak, alive + max(inside, sum(made.values())))
    sizes |= made
    alive += sum(made.values()) - sum(sizes.get(variable, 0) for variable in dead)
  return peak


def _is_broadcast(equation: core.JaxprEqn) -> bool:
  """Tells whether an equation only repeats a smaller array, which compilers do not store."""
  return equation.primitive.name == "broadcast_in_dim"


def main() -> None:
  """Prints what the flags ask for."""
  print("\n".join([*table(), "", FOOTNOTES, "", *language_table(), "", LANGUAGE_FOOTNOTES]))
  if _MEMORY.value:
    print("\n".join(["", *memory_table(_NETWORK.value, _BATCH.value)]))


if __name__ == "__main__":
  cli.run(main)

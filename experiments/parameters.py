"""Every network of Tables 1-6 with its parameters, beside the count that Furlanello et al. 2018 print.

  python experiments/parameters.py             about 15 seconds: only shapes are computed
  python experiments/parameters.py --memory    also the memory of a DenseNet's training step

The table's footnotes say how to read it; docs/design.md and the networks' own files, how the layers were worked out.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from ban_jax import presets, summary
from ban_jax.data import ptb
from ban_jax.models import make_model
from ban_jax.types import InputSpec, Model
from experiments import cli, table1, table2, table3, table4, table5, table6
from experiments.analysis.memory import count_memory, trained_sizes
from experiments.tables.graph import topological_order

_MEMORY = flags.DEFINE_bool("memory", False, "Also count the memory of a training step of --network.")
_DENSENETS = sorted(name for name in presets.MODELS if name.startswith("densenet"))
_NETWORK = flags.DEFINE_enum("network", "densenet_80_120", _DENSENETS, "The DenseNet that --memory counts.")
_BATCH = flags.DEFINE_integer("batch", 128, "Images per device in the step that --memory counts.", lower_bound=1)

TABLES = tuple(module.TABLE for module in (table1, table2, table3, table4, table5))
# Table 6's networks, and those of the paper that they stand beside: `lstm_1` is another reading of the same one.
LANGUAGE = {"lstm": "lstm", "lstm_1": "lstm", "cnn_lstm": "cnn_lstm"}
LANGUAGE_FOOTNOTES = """\
With the Penn Treebank's 10,000 words; the LSTMs' embedding is their output's kernel, the CNN-LSTM's output has its own.
The paper's text says that its LSTM has one layer; 52M parameters are nearer to two, which is why `lstm` has two."""

FOOTNOTES = """\
Parameters in millions, with 10 and with 100 classes; of Table 5's students only those that are trained, since the paper
leaves the teacher's stem and classifier out. The difference is that of the column nearer to the paper's figure.
* The paper's figure is not reproduced. It counts as reproduced where either column, rounded or truncated, shows the
  printed digits: the paper does both, and its Table 1 evidently counts the Wide-ResNets with 100 classes.
DenseNet-112-33 has 6.3M in Table 1 and 6.5M in the text, which also calls it 116-33 and 106-33.
Table 4's compression variants and Table 5's bottleneck students are readings: ban_jax/presets and
ban_jax/models/matched_resnet.py give the reasons. Table 5's Pre-activation ResNet-1001 is quoted there, not trained."""


class Row(NamedTuple):
  """A network: its preset, the tables that it is in, and the parameters that the paper prints, in millions."""

  network: str
  tables: str
  paper: str


def rows() -> list[Row]:
  """Returns the networks of Tables 1 to 5; a count that a table prints is also that of the tables after it."""
  printed: dict[str, str] = {}
  numbers: dict[tuple[str, str], list[str]] = {}
  for table in TABLES:
    printed |= table.parameters()
    cells = table.cells("paper", 1, "", controls=False)
    nodes = topological_order(node for cell in cells for members in cell.members for node in members)
    for network in dict.fromkeys(node.paper_network for node in nodes):
      numbers.setdefault((network, printed[network].partition("M")[0]), []).append(str(table.number))
  return [Row(network, ", ".join(tables), paper) for (network, paper), tables in numbers.items()]


class Network(NamedTuple):
  """What the shapes of a network show."""

  units: int  # per stage
  stages: tuple[int, ...]  # channels at the end of each stage
  parameters: dict[int, int]  # number of classes -> trained parameters


def build(network: str, num_classes: int = 100, **settings: Any) -> Model:
  """Returns the preset's network for CIFAR images; `settings` are its options, or those of `make_model`."""
  options = presets.MODELS[network].to_dict()
  options |= {key: settings.pop(key) for key in tuple(settings) if key in options}
  spec = InputSpec("images", (32, 32, 3), num_classes)
  return make_model(options, spec, sync_batch_stats=False, **settings)


@functools.cache
def describe(network: str) -> Network:
  """Returns the preset's units, stage widths and trained parameters."""
  model = build(network, 100)
  params = model.shapes["params"]
  trained = trained_sizes(model)
  # Only the classifier depends on the number of classes, and in proportion to it.
  ten = sum(size // 10 if name == "classifier" else size for name, size in trained.items())
  units = sum(name.startswith("stage1_unit") for name in params)
  stages = tuple(_width(params, stage, units) for stage in (1, 2, 3))
  return Network(units, stages, {10: ten, 100: sum(trained.values())})


def _width(params: dict[str, Any], stage: int, units: int) -> int:
  """Returns the channels at the end of a stage: of its closing 1x1 convolution, or else of its last unit."""
  if f"transition{stage}" in params:
    kernel = params[f"transition{stage}"]["conv"]["kernel"]
  elif f"match{stage}" in params:
    kernel = params[f"match{stage}"]["kernel"]
  else:
    unit = params[f"stage{stage}_unit{units}"]
    kernel = unit[max(name for name in unit if name.startswith("conv"))]["kernel"]
  return kernel.shape[-1]


def difference(paper: str, counts: Sequence[int]) -> tuple[float, bool]:
  """Returns the nearest count's relative difference from the paper's millions, and whether the digits agree."""
  decimals = len(paper.partition(".")[2])
  printed = round(float(paper) * 10**decimals)
  shown = [count / 1e6 * 10**decimals for count in counts]
  nearest = min((count / 1e6 / float(paper) - 1 for count in counts), key=abs)
  return nearest, any(printed in (round(value), int(value)) for value in shown)


def table(rows: Sequence[Row]) -> str:
  """Returns a Markdown table of the networks of Tables 1 to 5."""
  lines = [["network", "tables", "units", "stage widths", "10 cl.", "100 cl.", "paper", "difference"]]
  for name, tables, paper in rows:
    network = describe(name)
    share, reproduced = difference(paper, tuple(network.parameters.values()))
    counts = [f"{network.parameters[classes] / 1e6:7.3f}" for classes in (10, 100)]
    stages = ", ".join(map(str, network.stages))
    star = " " if reproduced else "*"
    lines.append([name, tables, f"{network.units:5}", stages, *counts, f"{paper:>5}", f"{share:+8.1%} {star}"])
  return summary.markdown(lines)


def language_table() -> str:
  """Returns a Markdown table of the networks of Table 6."""
  spec = InputSpec("tokens", (35,), ptb.WORDS, ptb.made_up_words())
  lines = [["network", "table", "LSTM layers", "parameters", "paper", "difference"]]
  for name, printed in LANGUAGE.items():
    options = presets.MODELS[name]
    count = sum(trained_sizes(make_model(options, spec)).values()) / 1e6
    paper = table6.TABLE.parameters()[printed].removesuffix("M")
    lines.append(
      [name, "6", f"{options.layers:11}", f"{count:10.3f}", f"{paper:>5}", f"{count / float(paper) - 1:+10.1%}"]
    )
  return summary.markdown(lines)


def memory_table(network: str, batch: int) -> str:
  """Returns a Markdown table of the memory of a training step, in GiB."""
  lines = [["compute", "remat", "weights", "kept for backward", "peak"]]
  for dtype in ("float32", "bfloat16"):
    for remat in (False, True):
      model = build(network, remat=remat, compute_dtype=dtype)
      weights, kept, peak = (value / 2**30 for value in count_memory(model, batch))
      lines.append([dtype, "yes" if remat else "no", f"{weights:7.2f}", f"{kept:17.2f}", f"{peak:4.1f}"])
  return f"""\
Training step of {network}, {batch} images, GiB:

{summary.markdown(lines)}

Weights: parameters, momentum, gradient and a teacher of the same size. Peak: the most alive at any moment, every
intermediate result stored in full, in the order of the trace; a compiler that fuses needs less."""


def main() -> None:
  """Prints what the flags ask for."""
  print(f"{table(rows())}\n\n{FOOTNOTES}\n\n{language_table()}\n\n{LANGUAGE_FOOTNOTES}")
  if _MEMORY.value:
    print(f"\n{memory_table(_NETWORK.value, _BATCH.value)}")


if __name__ == "__main__":
  cli.run(main)

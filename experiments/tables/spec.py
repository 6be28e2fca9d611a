"""How a table of the paper is declared: its rows, the generations of its cells, the paper's numbers, its scales."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ban_jax import presets
from experiments.tables import graph
from experiments.tables.graph import Node

# Seed s of a table gives its variant v the configuration's seed s + v * VARIANT, for independent networks of one seed.
VARIANT = 1000
# Few images, seen often and as they are: so a small network fits what it is given, and a minute or two of a core are
# enough (docs/searched.jsonl has what else was tried). Evaluated only at the end, since that takes a third of the time.
FITTED: dict[str, object] = {
  "data.pad": 0,
  "data.flip": False,
  "train.batch_size": 50,
  "train.evaluate_every": 0,
}
# What a scale means for a table beyond its preset: the number of seeds, and by data set the changes by dotted key.
SCALES: dict[str, tuple[int, Mapping[str, Mapping[str, object]]]] = {
  "paper": (3, {}),
  "quick": (3, {}),
  "cpu": (
    3,
    {
      "cifar10": {**FITTED, "data.train_examples": 2000, "train.epochs": 15},
      "cifar100": {**FITTED, "data.train_examples": 2500, "train.epochs": 30},
      "ptb": {"train.epochs": 3},
    },
  ),
  "smoke": (2, {}),
}
# Networks at the cpu scale: of the paper's kinds, small enough for two cores. Unlike in the paper, the DenseNets are
# smaller than the Wide-ResNets. At the smoke scale, which only shows that everything runs, perceptrons stand for both.
SUBSTITUTES = {
  "wrn_28_1": "wrn_10_1",
  "wrn_28_2": "wrn_16_1",
  "densenet_112_33": "densenet_10_16",
  "densenet_90_60": "densenet_16_8",
  "densenet_80_80": "densenet_22_12",
}
# Data sets at the smoke scale, which needs no files.
EMBEDDED = {"cifar10": "digits", "cifar100": "digits", "ptb": "pydoc"}


class Row(NamedTuple):
  """A row of the paper: its name, its network (of ban_jax/presets; None is not trained), its numbers."""

  name: str
  network: str | None
  paper: Mapping[str, float]  # by column
  parameters: str = ""  # of the network, as the paper's table prints them


def make_rows(columns: Sequence[str], *rows: tuple[str | float | None, ...]) -> tuple[Row, ...]:
  """Returns rows from (name, network, printed parameters, *numbers); None is a number that the paper does not have."""
  made = []
  for name, network, parameters, *numbers in rows:
    paper = {column: number for column, number in zip(columns, numbers, strict=True) if number is not None}
    made.append(Row(name, network, paper, parameters))
  return tuple(made)


class Cell(NamedTuple):
  """A cell: its networks by seed (none if it is only quoted), and the paper's number, if there is one."""

  row: str
  column: str
  metric: str
  members: tuple[tuple[Node, ...], ...]  # [seeds][members of the ensemble, or the one network]
  paper: float | None
  control: bool  # a column that the paper does not have


class Builder(NamedTuple):
  """Makes the nodes of a table at one scale and seed; trains nothing."""

  dataset: str
  scale: str
  seed: int
  changes: Mapping[str, object]  # configuration values by dotted key
  substitutes: Mapping[str, str] | None  # the paper's network -> that of this scale; None: all are the paper's

  def has(self, network: str | None) -> bool:
    """Returns whether a network is part of the table at this scale."""
    return network is not None and (self.substitutes is None or network in self.substitutes)

  def changed(self, changes: Mapping[str, object]) -> "Builder":
    """Returns a builder with other configuration values."""
    return self._replace(changes={**self.changes, **changes})

  def teacher(self, network: str, *, variant: int = 0, longer: int = 1) -> Node:
    """Returns a network that learns from the labels; `longer` multiplies its epochs."""
    words = self._words(network)
    epochs = self.changes.get("train.epochs", presets.compose(words).train.epochs)
    changes = {**self.changes, "train.epochs": longer * epochs}
    return graph.make_node(words, network, changes, self._seed(variant), None, "label")

  def student(self, teacher: Node, network: str, loss: str, *, variant: int = 0) -> Node:
    """Returns a network that learns from a teacher; variants differ in their seed only."""
    return graph.make_node(self._words(network), network, self.changes, self._seed(variant), teacher, loss)

  def sequence(self, teacher: Node, network: str, loss: str, length: int) -> list[Node]:
    """Returns BAN-1 to BAN-`length`: `teacher` teaches the first, each of them the next (Eq. 3)."""
    nodes = [self.student(teacher, network, loss)]
    while len(nodes) < length:
      nodes.append(nodes[-1]._replace(generation=nodes[-1].generation + 1, teacher=nodes[-1]))
    return nodes

  def _words(self, network: str) -> str:
    return f"{self.dataset},{self.substitutes[network] if self.substitutes else network},{self.scale}"

  def _seed(self, variant: int) -> int:
    return self.seed + variant * VARIANT


# Column -> its networks: one, or the members of an ensemble, which predicts by the mean of their probabilities.
Columns = Mapping[str, Sequence[Node]]


class Table(NamedTuple):
  """A table of the paper, or of numbers that others published."""

  number: int | str  # the paper's, or a name
  title: str
  dataset: str
  rows: tuple[Row, ...]
  columns: Callable[[Builder, Row], Columns]
  controls: Callable[[Builder, Row], Columns]
  substitutes: Mapping[str, Mapping[str, str]]  # scale -> the paper's network -> its substitute
  more_parameters: Mapping[str, str] = {}  # network -> parameters as printed, if it is not the network of a row
  metrics: Mapping[str, str] = {"": "error"}  # column suffix -> metric of experiments/results.py
  unit: str = "test error, %"
  reference: str = "teacher"  # the column that the others are compared with
  by_row: bool = True  # the plot groups by row; otherwise it has a panel for each row
  source: str = "the paper's"  # whose numbers ours stand beside
  changes: Mapping[str, object] = {}  # configuration values by dotted key that the caller of the script gives

  @property
  def label(self) -> str:
    """What headings call it."""
    return f"Table {self.number}" if isinstance(self.number, int) else f"Anchor {self.number}"

  @property
  def heading(self) -> str:
    """The heading of the column of its source's numbers: "paper", or "published"."""
    return self.source.removeprefix("the ").removesuffix("'s")

  @property
  def stem(self) -> str:
    """What its files are called."""
    return f"table{self.number}" if isinstance(self.number, int) else f"anchor_{self.number}"

  def parameters(self) -> dict[str, str]:
    """Returns the trained parameters that the paper's table prints, by network."""
    return {row.network: row.parameters for row in self.rows if row.parameters} | self.more_parameters

  def builder(self, scale: str, seed: int, data_dir: str) -> Builder:
    """Returns the builder of the table's nodes at a scale and seed."""
    dataset = EMBEDDED[self.dataset] if scale == "smoke" else self.dataset
    changes = dict(SCALES[scale][1].get(self.dataset, {}))
    if data_dir and scale != "smoke":
      changes["data.dir"] = data_dir
    return Builder(dataset, scale, seed, {**changes, **self.changes}, self.substitutes.get(scale))

  def rows_at(self, scale: str) -> list[Row]:
    """Returns the rows at a scale, including those that are only quoted."""
    return [row for row in self.rows if row.network is None or self.builder(scale, 0, "").has(row.network)]

  def cells(self, scale: str, seeds: int, data_dir: str, *, controls: bool) -> list[Cell]:
    """Returns all cells at a scale, row by row, with their networks for each seed."""
    cells = []
    for row in self.rows_at(scale):
      if row.network is None:
        cells += [Cell(row.name, column, "", (), paper, False) for column, paper in row.paper.items()]
        continue
      builders = [self.builder(scale, seed, data_dir) for seed in range(seeds)]
      columns = [dict(self.columns(builder, row)) for builder in builders]
      extra = [dict(self.controls(builder, row)) if controls else {} for builder in builders]
      for suffix, metric in self.metrics.items():
        for column in (*columns[0], *extra[0]):
          name = f"{column} {suffix}".strip()
          members = tuple(tuple((own | more)[column]) for own, more in zip(columns, extra, strict=True))
          cells.append(Cell(row.name, name, metric, members, row.paper.get(name), column in extra[0]))
    return cells


def label_controls(builder: Builder, row: Row, *, variant: int = 0) -> dict[str, Sequence[Node]]:
  """Returns the controls of a born-again student: smoothed labels, and labels for twice as long.

  `variant` is that of the student they are compared with, so that those with smoothed labels share its initial state.
  """
  teacher = builder.teacher(row.network)
  return {
    "label smoothing": [builder.student(teacher, row.network, "label_smoothing", variant=variant)],
    "entropy-matched smoothing": [builder.student(teacher, row.network, "entropy_matched_smoothing", variant=variant)],
    "labels, twice as long": [builder.teacher(row.network, variant=1, longer=2)],
  }


def independent_ensembles(builder: Builder, row: Row, sizes: Sequence[int]) -> dict[str, Sequence[Node]]:
  """Returns ensembles of networks that all learn from the labels, the teacher among them: Ens*k without a lineage."""
  members = [builder.teacher(row.network, variant=variant) for variant in (0, *range(2, max(sizes) + 1))]
  return {f"independent*{size}": members[:size] for size in sizes}

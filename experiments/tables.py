"""What the scripts of the six tables share: how a table is declared, planned, trained and written.

A table declares its rows and, for each, the generations behind its cells; everything else is here. What several cells
need is trained once, what is finished is skipped, what was killed goes on, and several processes may share a workdir.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import flags
from etils import epath

from ban_jax import storage
from ban_jax.errors import ConfigError, choices
from ban_jax.processes import is_primary
from configs import presets
from experiments import cli, plan, results, table_report
from experiments.plan import Part
from experiments.table_report import Cell

# Different draws of one seed: a table's seed s gives its variant v the configuration's seed s + v * VARIANT.
VARIANT = 1000
# Beyond the presets, what a scale is for a table: its number of seeds, and changes by key for images and for text.
SCALES = {
  "paper": (3, {}, {}),
  "quick": (3, {}, {}),
  # A network in a few minutes on two cores; no evaluation but the last, which is a third of an epoch's work.
  "cpu": (
    3,
    {"data.train_examples": 5000, "train.epochs": 10, "train.batch_size": 64, "train.evaluate_every": 0},
    {"train.epochs": 3},
  ),
  "smoke": (2, {}, {}),
}
# What takes a network's place at the cpu scale: one of its kind, small enough for two cores. Other than in the
# paper, the DenseNets are smaller than the Wide-ResNets.
SMALL = {
  "wrn_28_1": "wrn_10_1",
  "wrn_28_2": "wrn_16_1",
  "densenet_112_33": "densenet_10_16",
  "densenet_90_60": "densenet_16_8",
  "densenet_80_80": "densenet_22_12",
}
EMBEDDED = {"cifar10": "digits", "cifar100": "digits", "ptb": "pydoc"}


class Row(NamedTuple):
  """A row as the paper has it: its name, its network (of configs/presets.py; None is not trained), its numbers."""

  name: str
  network: str | None
  paper: Mapping[str, float]  # by column


class Lab(NamedTuple):
  """Makes the generations behind a table's cells, at one scale and seed; it trains nothing."""

  dataset: str
  scale: str
  seed: int
  changes: Mapping[str, object]
  stand_ins: Mapping[str, str] | None  # network -> what takes its place at this scale; None: all as they are

  def has(self, network: str | None) -> bool:
    """Returns whether a network is part of the table at this scale."""
    return network is not None and (self.stand_ins is None or network in self.stand_ins)

  def teacher(self, network: str, *, variant: int = 0, longer: int = 1) -> Part:
    """Returns a network that learns from the labels; `longer` multiplies its epochs."""
    words = self._words(network)
    epochs = self.changes.get("train.epochs") or presets.compose(words).train.epochs
    changes = {**self.changes, "train.epochs": longer * epochs}
    return plan.teacher(words, network, changes, self._seed(variant))

  def student(self, taught_by: Part, network: str, loss: str, *, variant: int = 0) -> Part:
    """Returns a network that learns from a teacher; another `variant` is another draw of the same."""
    return plan.student(self._words(network), network, loss, self.changes, self._seed(variant), taught_by)

  def sequence(self, taught_by: Part, network: str, loss: str, length: int) -> list[Part]:
    """Returns BAN-1 to BAN-`length`, each taught by the one before and the first by `taught_by` (Eq. 3)."""
    parts = [self.student(taught_by, network, loss)]
    while len(parts) < length:
      parts.append(plan.successor(parts[-1]))
    return parts

  def _words(self, network: str) -> str:
    return f"{self.dataset},{self.stand_ins[network] if self.stand_ins else network},{self.scale}"

  def _seed(self, variant: int) -> int:
    return self.seed + variant * VARIANT


# Column -> the networks behind it, whose mean probabilities are what is tested: one, or an ensemble.
Columns = Mapping[str, Sequence[Part]]


class Table(NamedTuple):
  """A table of the paper: its rows, what is behind their cells, and its numbers."""

  number: int
  title: str
  dataset: str
  rows: tuple[Row, ...]
  columns: Callable[[Lab, Row], Columns]
  stand_ins: Mapping[str, Mapping[str, str]]  # scale -> network -> what takes its place; a scale left out: itself
  controls: Callable[[Lab, Row], Columns]
  # The trained parameters that the paper's table prints, by network.
  parameters: Mapping[str, str] = {}
  # What is told of every column: the ending of its name -> a metric, of experiments/results.py.
  metrics: Mapping[str, str] = {"": "error"}
  unit: str = "test error, %"
  reference: str = "teacher"  # the column that the others are compared with
  by_row: bool = True  # whether the plot has the rows side by side; otherwise the columns


def label_controls(lab: Lab, row: Row, *, variant: int = 0) -> dict[str, Sequence[Part]]:
  """Returns the controls of a network and its born-again student: what labels alone can do, softened or for longer.

  `variant` is that of the student that they are compared with: those with smoothed labels begin as it does.
  """
  teacher = lab.teacher(row.network)
  return {
    "label smoothing": [lab.student(teacher, row.network, "label_smoothing", variant=variant)],
    "entropy-matched smoothing": [lab.student(teacher, row.network, "entropy_matched_smoothing", variant=variant)],
    "labels, twice as long": [lab.teacher(row.network, variant=1, longer=2)],
  }


def independent_ensembles(lab: Lab, row: Row, sizes: Sequence[int]) -> dict[str, Sequence[Part]]:
  """Returns ensembles of networks that all learn from the labels, the teacher one of them: Ens*k without a lineage."""
  members = [lab.teacher(row.network, variant=variant) for variant in (0, *range(2, max(sizes) + 1))]
  return {f"independent*{size}": members[:size] for size in sizes}


# --- planning --------------------------------------------------------------------------------------------------------


def lab_of(table: Table, scale: str, seed: int, data_dir: str) -> Lab:
  """Returns what makes a table's generations at a scale and seed."""
  dataset = EMBEDDED[table.dataset] if scale == "smoke" else table.dataset
  _, images, text = SCALES[scale]
  changes = dict(text if dataset in ("ptb", "pydoc") else images)
  if data_dir and scale != "smoke":
    changes["data.dir"] = data_dir
  return Lab(dataset, scale, seed, changes, table.stand_ins.get(scale))


def rows_of(table: Table, scale: str) -> list[Row]:
  """Returns a table's rows at a scale, those that are only quoted included."""
  return [row for row in table.rows if row.network is None or lab_of(table, scale, 0, "").has(row.network)]


def cells_of(table: Table, scale: str, seeds: int, data_dir: str, *, controls: bool) -> list[Cell]:
  """Returns all cells of a table, row by row; a cell has the networks behind it seed by seed."""
  cells = []
  for row in rows_of(table, scale):
    if row.network is None:
      cells += [Cell(row.name, column, "", (), paper, False) for column, paper in row.paper.items()]
      continue
    labs = [lab_of(table, scale, seed, data_dir) for seed in range(seeds)]
    made = [dict(table.columns(lab, row)) for lab in labs]
    extra = [dict(table.controls(lab, row)) if controls else {} for lab in labs]
    for ending, metric in table.metrics.items():
      for column in (*made[0], *extra[0]):
        name = f"{column} {ending}".strip()
        members = tuple(tuple((own | more)[column]) for own, more in zip(made, extra, strict=True))
        cells.append(Cell(row.name, name, metric, members, row.paper.get(name), column in extra[0]))
  return cells


def shard_of(cells: Sequence[Cell], rows: Sequence[str], seeds: int, shard: tuple[int, int]) -> list[list[Part]]:
  """Returns the members of those cells that a shard trains: of all rows and seeds every N-th, seed by seed."""
  number, count = shard
  # Counted row by row, so that large rows do not all fall to one shard; trained seed by seed, so that each row has a
  # number early.
  units = sorted([(seed, row) for row in rows for seed in range(seeds)][number - 1 :: count], key=lambda unit: unit[0])
  return [list(cell.members[seed]) for seed, row in units for cell in cells if cell.row == row and cell.members]


# --- the command line ------------------------------------------------------------------------------------------------


def define_flags() -> None:
  """Defines what all six scripts take; the scripts can be imported side by side."""
  flags.DEFINE_string(
    "scale",
    "smoke",
    "paper (exact), quick (one accelerator), cpu (two cores, small networks on real data) or smoke (seconds: small "
    "networks on embedded data, which show that everything runs and nothing else).",
  )
  flags.DEFINE_list("rows", None, "The rows to train, by their names, separated by commas; all by default.")
  flags.DEFINE_integer("seeds", None, "How many seeds, from 0; by default what the scale asks for.")
  flags.DEFINE_string(
    "workdir", None, "Where runs and tables are kept, for all tables alike; by default runs/tables/SCALE."
  )
  flags.DEFINE_string(
    "data_dir", "", "Where the data are: TFDS's data directory for CIFAR, that of the three text files for PTB."
  )
  flags.DEFINE_string(
    "shard", "1/1", "K/N: of N processes on one workdir, this is the K-th; it trains every N-th row and seed."
  )
  flags.DEFINE_bool(
    "controls",
    False,
    "Also train what tells a born-again gain from a cheaper cause (smoothed labels, longer training...).",
  )
  flags.DEFINE_bool("list", False, "Show the rows, the networks and the paper's numbers, and end.")
  flags.DEFINE_bool("dry_run", False, "Show what would be trained and what it would cost, and end.")
  for module in (__name__, cli.__name__):  # so that a script's --help shows them
    for flag in flags.FLAGS.get_flags_for_module(module):
      flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


class Asked(NamedTuple):
  """What the flags ask for."""

  scale: str
  rows: list[str]
  seeds: int
  shard: tuple[int, int]
  workdir: epath.Path


def asked_for(table: Table) -> Asked:
  """Returns what the flags ask for; raises a ConfigError for what the table has not."""
  scale = flags.FLAGS.scale
  if scale not in SCALES:
    raise ConfigError(f"unknown scale {scale!r}; choose one of: {choices(SCALES)}")
  names = {row.name.lower(): row.name for row in rows_of(table, scale) if row.network is not None}
  given = list(names) if flags.FLAGS.rows is None else [name.strip() for name in flags.FLAGS.rows]
  unknown = [name for name in given if name.lower() not in names]
  if unknown or not given:
    known = choices(names.values())
    name = unknown[0] if unknown else ""
    raise ConfigError(f"--rows: table {table.number} has no row {name!r} at the scale {scale}; choose from: {known}")
  seeds = SCALES[scale][0] if flags.FLAGS.seeds is None else flags.FLAGS.seeds
  if not 0 < seeds <= VARIANT:
    raise ConfigError(f"--seeds must be from 1 to {VARIANT}, not {seeds}")
  number, _, count = flags.FLAGS.shard.partition("/")
  if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
    raise ConfigError(f"--shard={flags.FLAGS.shard}: K/N is expected, with K from 1 to N, as 2/4")
  workdir = storage.resolve_workdir(f"runs/tables/{scale}" if flags.FLAGS.workdir is None else flags.FLAGS.workdir)
  return Asked(scale, [names[name.lower()] for name in dict.fromkeys(given)], seeds, (int(number), int(count)), workdir)


def overview(table: Table, scale: str) -> str:
  """Returns a table's cells with their networks at a scale and the paper's numbers."""
  lines = [["row", "column", f"network at the scale {scale}", "paper"]]
  for cell in cells_of(table, scale, 1, "", controls=False):
    network = cell.members[0][-1].network if cell.members else "quoted only"
    lines.append([cell.row, cell.column, network, "" if cell.paper is None else f"{cell.paper:g}"])
  told = f"Table {table.number}: {table.title}. The paper's {table.unit}, on {table.dataset}"
  return f"{told}:\n\n" + results.markdown(lines)


def main(table: Table) -> None:
  """Does what the flags ask for: lists, plans, or trains what is missing and writes the table."""
  asked = asked_for(table)
  if flags.FLAGS.list:
    print(overview(table, asked.scale))
    return
  devices = cli.start_jax()
  cells = cells_of(table, asked.scale, asked.seeds, flags.FLAGS.data_dir, controls=flags.FLAGS.controls)
  mine = shard_of(cells, asked.rows, asked.seeds, asked.shard)
  parts = plan.ancestry(part for members in mine for part in members)
  if flags.FLAGS.dry_run:
    print("\n".join(plan.cost_table(parts, asked.workdir)))
    return
  out = table_report.Output(table, asked.scale, asked.workdir)
  # The table keeps what it has, whatever the flags ask to train: seeds, rows, and the columns of controls.
  before = out.check()
  seeds = max(asked.seeds, before.seeds)
  rows, columns = before.rows | {*asked.rows}, before.columns | {cell.column for cell in cells}
  shown = [
    cell
    for cell in cells_of(table, asked.scale, seeds, flags.FLAGS.data_dir, controls=True)
    if (cell.row in rows or not cell.members) and cell.column in columns
  ]
  plan.check(plan.ancestry(part for cell in shown for own in cell.members for part in own), asked.workdir, devices)

  def say(message: str) -> None:
    if is_primary():
      if cli.PROGRESS.value:
        print(message, flush=True)
      out.write(shown, seeds, plot=False)  # what is finished by now

  trained = plan.train(parts, asked.workdir, devices=devices, progress=cli.PROGRESS.value, say=say)
  for members in mine:
    if len(members) > 1:
      table_report.evaluate_ensemble(members, asked.workdir, devices)
  if is_primary():
    text = out.write(shown, seeds, plot=True)
    print(f"\n{text}\n{trained} of {len(parts)} generations were trained, the others finished already")
    print(f"written: {', '.join(str(path) for path in out.paths())}")


def run(table: Table) -> None:
  """Runs a table's script."""
  define_flags()
  cli.run(lambda: main(table))

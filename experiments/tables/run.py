"""The command line of the six table scripts: flags, and the main function that lists, plans, or trains and writes.

Generations that several cells or tables need are trained once. Finished ones are skipped, killed ones are resumed, and
several processes may share a workdir.
"""

from collections.abc import Sequence
from typing import NamedTuple

from absl import flags
from etils import epath

from ban_jax import storage, summary
from ban_jax.errors import ConfigError, choices
from ban_jax.processes import is_primary
from experiments import cli
from experiments.tables import graph
from experiments.tables.cost import cost_table
from experiments.tables.graph import Node
from experiments.tables.report import Output
from experiments.tables.spec import SCALES, VARIANT, Cell, Table
from experiments.tables.train import device_groups, train
from experiments.tables.values import evaluate_ensemble


def define_flags() -> None:
  """Defines the flags of all six scripts; in a function, so that several scripts can be imported together."""
  scales = "paper (exact), quick (one accelerator), cpu (small networks, real data) or smoke (seconds, embedded data)."
  flags.DEFINE_string("scale", "smoke", scales)
  flags.DEFINE_list("rows", None, "Names of the rows to train, separated by commas; by default all.")
  flags.DEFINE_list("columns", None, "Names of the columns to train, separated by commas; by default all.")
  flags.DEFINE_integer("seeds", None, "Number of seeds, counted from 0; by default that of the scale.")
  flags.DEFINE_string("workdir", None, "Directory of runs and tables, common to all tables (runs/tables/SCALE).")
  flags.DEFINE_string("data_dir", "", "Data directory: that of TFDS for CIFAR, that of the three text files for PTB.")
  flags.DEFINE_string(
    "changes", "{}", "Values to change in all networks, as JSON: dotted key -> value. Use a workdir of its own."
  )
  flags.DEFINE_string("shard", "1/1", "K/N: as the K-th of N processes on one workdir, train every N-th row and seed.")
  flags.DEFINE_integer(
    "devices_per_student",
    0,
    "Train several students side by side, each on so many devices; 0: one on all.",
    lower_bound=0,
  )
  flags.DEFINE_bool("controls", False, "Also train the controls (smoothed labels, longer training...).")
  flags.DEFINE_bool("list", False, "Show the rows, the networks and the paper's numbers, and exit.")
  flags.DEFINE_bool("dry_run", False, "Show what would be trained and its cost, and exit.")


class Request(NamedTuple):
  """The checked values of the flags."""

  scale: str
  rows: list[str]
  seeds: int
  shard: tuple[int, int]
  workdir: epath.Path


def check_flags(table: Table) -> Request:
  """Returns the values of the flags; raises a ConfigError for those that do not fit the table."""
  scale = flags.FLAGS.scale
  if scale not in SCALES:
    raise ConfigError(f"unknown scale {scale!r}; choose one of: {choices(SCALES)}")
  names = {row.name.lower(): row.name for row in table.rows_at(scale) if row.network is not None}
  given = list(names) if flags.FLAGS.rows is None else [name.strip() for name in flags.FLAGS.rows]
  unknown = [name for name in given if name.lower() not in names]
  if unknown or not given:
    known = choices(names.values())
    name = unknown[0] if unknown else ""
    raise ConfigError(f"--rows: {table.label} has no row {name!r} at the scale {scale}; choose from: {known}")
  seeds = SCALES[scale][0] if flags.FLAGS.seeds is None else flags.FLAGS.seeds
  if not 0 < seeds <= VARIANT:
    raise ConfigError(f"--seeds must be from 1 to {VARIANT}, not {seeds}")
  number, _, count = flags.FLAGS.shard.partition("/")
  if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
    raise ConfigError(f"--shard={flags.FLAGS.shard}: K/N is expected, with K from 1 to N, as 2/4")
  workdir = storage.resolve_workdir(f"runs/tables/{scale}" if flags.FLAGS.workdir is None else flags.FLAGS.workdir)
  rows = [names[name.lower()] for name in dict.fromkeys(given)]
  return Request(scale, rows, seeds, (int(number), int(count)), workdir)


def of_columns(cells: Sequence[Cell]) -> list[Cell]:
  """Returns the cells of the columns that the flags name; raises a ConfigError for a column that there is none of."""
  names = {cell.column.lower(): cell.column for cell in cells}
  given = list(names) if flags.FLAGS.columns is None else [name.strip().lower() for name in flags.FLAGS.columns]
  unknown = [name for name in given if name not in names]
  if unknown or not given:
    name = unknown[0] if unknown else ""
    raise ConfigError(f"--columns: there is no column {name!r}; choose from: {choices(names.values())}")
  return [cell for cell in cells if cell.column.lower() in given]


def shard_of(cells: Sequence[Cell], rows: Sequence[str], seeds: int, shard: tuple[int, int]) -> list[list[Node]]:
  """Returns the members of the cells that a shard trains: every N-th row and seed, ordered by seed."""
  number, count = shard
  # Dealt out row by row, so that large rows do not all go to one shard; trained seed by seed, so that each row has its
  # first number early.
  units = sorted([(seed, row) for row in rows for seed in range(seeds)][number - 1 :: count], key=lambda unit: unit[0])
  return [list(cell.members[seed]) for seed, row in units for cell in cells if cell.row == row and cell.members]


def overview(table: Table, scale: str) -> str:
  """Returns a table's cells with their networks at a scale and the paper's numbers."""
  rows = [["row", "column", f"network at the scale {scale}", table.heading]]
  for cell in table.cells(scale, 1, "", controls=False):
    network = cell.members[0][-1].network if cell.members else "quoted only"
    rows.append([cell.row, cell.column, network, "" if cell.paper is None else f"{cell.paper:g}"])
  source = table.source.capitalize()
  title = f"{table.label}: {table.title}. {source} {table.unit}, on {table.dataset}"
  return f"{title}:\n\n{summary.markdown(rows)}"


def make_table(table: Table) -> Output | None:
  """Lists, plans, or trains what is missing and writes the table, as the flags say; returns what was written."""
  table = table._replace(changes=cli.read_changes("--changes", flags.FLAGS.changes))
  request = check_flags(table)
  scale, workdir, data_dir = request.scale, request.workdir, flags.FLAGS.data_dir
  if flags.FLAGS.list:
    print(overview(table, scale))
    return None
  devices = cli.start_jax(side_by_side=flags.FLAGS.devices_per_student > 0)
  cells = of_columns(table.cells(scale, request.seeds, data_dir, controls=flags.FLAGS.controls))
  ensembles = shard_of(cells, request.rows, request.seeds, request.shard)
  nodes = graph.topological_order(node for members in ensembles for node in members)
  if flags.FLAGS.dry_run:
    print(cost_table(nodes, workdir))
    return None
  groups = device_groups(devices, flags.FLAGS.devices_per_student)
  output = Output(table, scale, workdir)
  # The written table keeps all seeds, rows and controls of the workdir, whatever the flags ask for now.
  existing = output.existing()
  seeds = max(request.seeds, existing.seeds)
  rows, columns = existing.rows | {*request.rows}, existing.columns | {cell.column for cell in cells}
  shown = [
    cell
    for cell in table.cells(scale, seeds, data_dir, controls=True)
    if (cell.row in rows or not cell.members) and cell.column in columns
  ]
  everything = graph.topological_order(node for cell in shown for members in cell.members for node in members)
  graph.check(everything, workdir, groups[0])

  def log(message: str) -> None:
    if is_primary():
      if cli.PROGRESS.value:
        print(message, flush=True)
      output.write(shown, seeds, plot=False)  # what is finished by now

  trained = train(nodes, workdir, groups=groups, progress=cli.PROGRESS.value, log=log)
  for members in ensembles:
    if len(members) > 1:
      evaluate_ensemble(members, workdir, devices)
  if is_primary():
    text = output.write(shown, seeds, plot=True)
    print(f"\n{text}\n{trained} of {len(nodes)} generations were trained, the others finished already")
    print(f"written: {', '.join(str(path) for path in output.paths())}")
  return output


def main(table: Table) -> None:
  """Runs a table's script."""
  define_flags()
  cli.run(lambda: make_table(table))

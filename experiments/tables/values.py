"""The values of a table's cells: read from finished generations, averaged over seeds, compared in pairs."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath

from ban_jax import storage, summary
from ban_jax.processes import is_primary, on_any_process
from ban_jax.types import Devices
from experiments import results
from experiments.tables import graph
from experiments.tables.graph import Node
from experiments.tables.spec import Cell, Table


class Value(NamedTuple):
  """A cell's value for one seed, and the directories of the generations that it comes from."""

  seed: int
  value: float
  sources: tuple[str, ...]


def _record(members: Sequence[Node], workdir: epath.Path) -> epath.Path:
  """Returns the path of an ensemble's evaluation."""
  digest = hashlib.sha256(" ".join(node.path for node in members).encode()).hexdigest()[:8]
  return workdir / "ensembles" / f"{members[-1].run.removeprefix('runs/')}-{len(members)}-{digest}.json"


def evaluate_ensemble(members: Sequence[Node], workdir: epath.Path, devices: Devices) -> None:
  """Evaluates an ensemble of finished generations (Eq. 4) and stores its metrics, unless they are stored already."""
  if not on_any_process(ensemble_metrics(members, workdir) is None):
    return
  loaded = [storage.load_together(workdir / node.path) for node in members]
  metrics = results.evaluate([generation for generation, _ in loaded], members[-1].cfg, devices)
  if is_primary():
    path = _record(members, workdir)
    path.parent.mkdir(exist_ok=True)
    digests = {node.path: manifest["digest"] for node, (_, manifest) in zip(members, loaded, strict=True)}
    record = storage.standard({"members": digests, "metrics": metrics})
    results.write(path, json.dumps(record, indent=2, allow_nan=False))


def ensemble_metrics(
  members: Sequence[Node], workdir: epath.Path, known: dict[str, graph.Found] | None = None
) -> Mapping[str, float] | None:
  """Returns an ensemble's stored metrics; None if there are none, or if a member has been trained again since.

  Raises a CheckpointError for a damaged generation.
  """
  found = [graph.find(node, workdir, known) for node in members]
  try:
    stored = storage.numbers(storage.read_json(_record(members, workdir)))
    digests = {node.path: here and here[1]["digest"] for node, here in zip(members, found, strict=True)}
    return stored["metrics"] if stored["members"] == digests else None
  except (FileNotFoundError, ValueError, KeyError, TypeError):  # evaluated again
    return None


def paired(values: Sequence[Value], reference: Sequence[Value]) -> summary.Difference | None:
  """Returns values minus reference over the seeds that both have, with its 95% interval; None if they share none."""
  by_seed = {value.seed: value.value for value in reference}
  differences = [value.value - by_seed[value.seed] for value in values if value.seed in by_seed]
  return summary.mean_difference(differences) if differences else None


class Entry(NamedTuple):
  """A cell with its finished values, and its comparison with the reference cell of its row."""

  cell: Cell
  values: Sequence[Value]
  mean: float  # NaN without values
  error: float  # standard error of the mean; NaN with fewer than two values
  reference: Cell | None  # None for the reference itself
  difference: summary.Difference | None  # from the reference; None if they share no seed

  @property
  def from_paper(self) -> float:
    """The mean minus the paper's number, or NaN."""
    return math.nan if self.cell.paper is None else self.mean - self.cell.paper

  @property
  def paper_difference(self) -> float:
    """The paper's number minus the paper's number for the reference, or NaN."""
    papers = (self.cell.paper, self.reference and self.reference.paper)
    return math.nan if None in papers else papers[0] - papers[1]


def entries_of(table: Table, cells: Sequence[Cell], workdir: epath.Path) -> list[Entry]:
  """Returns the cells with their values as far as they are finished."""
  known: dict[str, graph.Found] = {}
  by_place = {(cell.row, cell.column): cell for cell in cells}
  values = {place: _values_of(cell, workdir, known) for place, cell in by_place.items()}
  entries = []
  for (row, column), cell in by_place.items():
    suffix = next((end for end in table.metrics if end and column.endswith(f" {end}")), "")
    place = (row, f"{table.reference} {suffix}".strip())
    reference = by_place.get(place) if place != (row, column) else None
    found = values[row, column]
    mean, error = summary.mean_and_error([value.value for value in found]) if found else (math.nan, math.nan)
    difference = paired(found, values[place]) if reference is not None else None
    entries.append(Entry(cell, found, mean, error, reference, difference))
  return entries


def _values_of(cell: Cell, workdir: epath.Path, known: dict[str, graph.Found]) -> list[Value]:
  """Returns the finished values of a cell."""
  values = []
  for seed, members in enumerate(cell.members):
    if len(members) > 1:
      metrics = ensemble_metrics(members, workdir, known)
    else:
      found = graph.find(members[0], workdir, known)
      metrics = found and summary.reported(found[0])
    if metrics is not None:
      values.append(Value(seed, float(metrics[cell.metric]), tuple(node.path for node in members)))
  return values

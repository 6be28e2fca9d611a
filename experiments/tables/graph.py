"""Generations as a graph: which network learns from which, where each is kept, and which are finished.

The directory of a generation follows from its configuration and its teacher's directory. So rows, tables and processes
that need the same generation find the same directory.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from ban_jax import config, job, presets, storage
from ban_jax.errors import CheckpointError
from ban_jax.trees import json_digest
from ban_jax.types import Devices
from experiments import cli


class Node(NamedTuple):
  """A generation, trained or to be trained."""

  run: str  # run directory, relative to the workdir
  cfg: ConfigDict
  generation: int
  teacher: "Node | None"
  network: str  # of ban_jax/presets
  paper_network: str  # the paper's network that it is, or that it substitutes

  @property
  def path(self) -> str:
    """The generation's directory, relative to the workdir."""
    return f"{self.run}/gen_{self.generation}"

  @property
  def loss(self) -> str:
    """The name of its loss: generation 0 learns from the labels."""
    return self.cfg.loss.name if self.generation else "label"

  @property
  def summary(self) -> str:
    """One line about the generation."""
    teacher = f" from {self.teacher.network}" if self.teacher is not None else ""
    name = f"generation {self.generation}" if self.generation else "teacher"
    return f"{name}: {self.network} by {self.loss}{teacher}, seed {self.cfg.seed}"


def make_node(
  words: str, paper_network: str, changes: Mapping[str, object], seed: int, teacher: Node | None, loss: str
) -> Node:
  """Returns a generation 0 or, with a generation 0 as `teacher`, its student by `loss`.

  `words` are "data set,network,scale"; `changes` are configuration values by dotted key.
  """
  dataset, network, scale = words.split(",")
  crossed = teacher is not None and teacher.network != network
  more = ([loss] if teacher else []) + ([f"teacher={teacher.network}"] if crossed else [])
  cfg = presets.compose(",".join([words, *more]))
  cli.change(cfg, changes, "--changes")
  cfg.seed = seed
  # Costs almost nothing beside a convolution, and figures.py plots it; over 10,000 words it would cost time.
  cfg.train.gradient_split = teacher is not None and not cfg.data.window
  # Has no effect here, since the graph holds the length of a sequence, whose generations share one configuration.
  cfg.generations = int(teacher is not None)
  identity = config.identity_digest(config.record(cfg), cfg.generations)
  digest = json_digest([identity, teacher.path if teacher else ""])[:8]
  of = f"-of-{teacher.network}" if crossed else ""
  run = f"runs/{dataset}-{network}-{loss}{of}-{scale}-seed{seed}-{digest}"
  return Node(run, cfg, cfg.generations, teacher, network, paper_network)


def topological_order(nodes: Iterable[Node]) -> list[Node]:
  """Returns the nodes and their teachers, each once, teachers before students, otherwise in the order given."""
  ordered: dict[str, Node] = {}

  def add(node: Node) -> None:
    if node.path not in ordered:
      if node.teacher is not None:
        add(node.teacher)
      ordered[node.path] = node

  for node in nodes:
    add(node)
  return list(ordered.values())


# The metrics and the manifest in a generation's directory, or None if it is not finished.
Found = tuple[dict[str, float], dict[str, Any]] | None


def find(node: Node, workdir: epath.Path, known: dict[str, Found] | None = None) -> Found:
  """Returns a finished generation's metrics and manifest, or None if it is not finished.

  Raises a CheckpointError for a damaged generation, and for one of another configuration or of another teacher than
  the one in its teacher's directory. `known` caches what has been read across calls; without it everything is read.
  """
  known = {} if known is None else known
  if node.path not in known:
    known[node.path] = _read(node, workdir, known)
  return known[node.path]


def _read(node: Node, workdir: epath.Path, known: dict[str, Found]) -> Found:
  directory = workdir / node.path
  records = storage.read_records(directory)
  if records is None:
    return None
  metrics, _, manifest = records
  remedy = f"remove {directory}, and what learnt from it, to train it again"
  missing = [key for key in ("identity", "dataset", "digest", "generation", "teachers") if key not in manifest]
  if missing:
    raise CheckpointError(f"{directory}/manifest.json lacks {', '.join(missing)}; {remedy}")
  identity = config.identity_digest(config.record(node.cfg), node.generation)
  if manifest["identity"] != identity or manifest["generation"] != node.generation:
    raise CheckpointError(f"{directory} holds a generation of another configuration; {remedy}")
  if manifest["teachers"]:  # a loss without a teacher records none, although the node has one
    teacher = node.teacher and find(node.teacher, workdir, known)
    digest = teacher and teacher[1]["digest"]
    if manifest["teachers"] != [digest]:
      raise CheckpointError(
        f"{directory} was taught by a teacher with the digest {', '.join(manifest['teachers'])}; that in "
        f"{workdir / node.teacher.path if node.teacher else 'the plan'} has {digest}; {remedy}"
      )
  return metrics, manifest


def state(node: Node, workdir: epath.Path, known: dict[str, Found] | None = None) -> str:
  """Returns "finished", "begun" or "to do" for a generation; `known` as in `find`."""
  if find(node, workdir, known) is not None:
    return "finished"
  return "begun" if (workdir / node.path / "steps").exists() else "to do"


def check(nodes: Iterable[Node], workdir: epath.Path, devices: Devices) -> None:
  """Raises a BanError, before any training, if data are missing, a batch does not fit, or a finished node is wrong.

  Finished generations must be of the data found now, or a table would mix two data sets.
  """
  known: dict[str, Found] = {}
  for node in nodes:
    dataset = job.resolve_run(node.cfg, devices).dataset
    found = find(node, workdir, known)
    if found is not None and found[1]["dataset"] != dataset.digest:
      raise CheckpointError(
        f"{workdir / node.path} was trained on other data than the {dataset.name} found now (digest "
        f"{found[1]['dataset']} there, {dataset.digest} here); give the same data, or another workdir"
      )

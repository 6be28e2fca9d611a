"""What a finished generation leaves: its variables, metrics, history, and the manifest that ties them together."""

import contextlib
import functools
import importlib.metadata
import json
import pathlib
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from ban_jax import config, processes, trees
from ban_jax.errors import BanError, CheckpointError, StorageError
from ban_jax.models import program
from ban_jax.storage.files import (
  damage,
  first_line,
  numbers,
  read_json,
  remove_partial,
  standard,
  storage_errors,
  write_bytes,
  write_json,
)
from ban_jax.types import Generation, InputSpec, Network, Program
from ban_jax.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def finish(directory: epath.Path, generation: Generation, manifest: Mapping[str, Any]) -> None:
  """Writes a generation's variables, metrics and history, then its manifest, and removes its checkpoints."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / "params", trees.thawed(generation.params), force=True)
  processes.wait_for_all(f"params of generation {generation.index}")
  if processes.is_primary():
    metrics, history = dict(generation.metrics), list(generation.history)
    write_json(directory / "metrics.json", metrics)
    lines = (json.dumps(standard(row), allow_nan=False) + "\n" for row in history)
    write_bytes(directory / "history.jsonl", "".join(lines).encode())
    digests = {"digest": trees.digest(generation.params), "records_digest": trees.json_digest([metrics, history])}
    if generation.network is not None:
      network = network_record(generation.network)
      write_json(directory / "network.json", network)
      digests["network_digest"] = trees.json_digest(network)
    write_json(directory / "manifest.json", {**manifest, **digests})
    remove_leftovers(directory)
  processes.wait_for_all(f"manifest of generation {generation.index}")


def network_record(network: Network) -> dict[str, Any]:
  """Returns what is kept of a generation's network, as JSON holds it; a caller's own functions are not."""
  values = {name: value for name, value in network._asdict().items() if name not in ("own", "program")}
  values["spec"] = network.spec._asdict()
  if network.spec.unit == "words":  # as records were before there were other units
    del values["spec"]["unit"]
  if network.program is not None:
    values["program"] = network.program._asdict()
  return json.loads(json.dumps(standard(values)))


def _read_network(directory: epath.Path, manifest: Mapping[str, Any]) -> Network | None:
  """Returns a generation's network, or None where an earlier version wrote none."""
  if "network_digest" not in manifest:
    return None
  record = read_json(directory / "network.json")
  # An earlier version took the digest before numbers that are not finite became words.
  if manifest["network_digest"] not in (trees.json_digest(record), trees.json_digest(numbers(record))):
    raise ValueError("network.json was changed: its digest is not the manifest's")
  known = {"unit": "words", **record["spec"]}
  spec = InputSpec(known["kind"], tuple(known["shape"]), known["num_classes"], tuple(known["words"]), known["unit"])
  program = Program(**record["program"]) if "program" in record else None
  return Network(record["group"], record["compute_dtype"], spec, record["scaling"], program)


def remove_leftovers(directory: epath.Path) -> None:
  """Removes what a finished generation needs no more, also after a kill right after the manifest."""
  remove_partial(directory)
  for leftover in ("steps", "damaged", *(path.name for path in directory.glob("params.orbax-checkpoint-tmp*"))):
    (directory / leftover).rmtree(missing_ok=True)


def read_records(directory: epath.Path) -> tuple[dict[str, float], list[dict[str, float]], dict[str, Any]] | None:
  """Returns a finished generation's metrics, history and manifest, or None where it is not finished.

  Raises a CheckpointError where they are damaged or changed, and a StorageError where the disk fails at the moment.
  """
  with _reading(directory):
    if not (directory / "manifest.json").exists():
      return None
    manifest = read_json(directory / "manifest.json")
    metrics = numbers(read_json(directory / "metrics.json"))
    history = [numbers(json.loads(line)) for line in (directory / "history.jsonl").read_bytes().splitlines()]
    with _parsing(directory):
      expected = manifest["records_digest"]
  if trees.json_digest([metrics, history]) != expected:
    what = f"{directory}/metrics.json or history.jsonl was changed"
    raise CheckpointError(f"{what}: their digest is not the manifest's; {_remedy(directory)}")
  return metrics, history, manifest


def load(directory: epath.Path) -> tuple[Generation, dict[str, Any]] | None:
  """Returns a finished generation and its manifest, or None where it is not finished; raises as `read_records`."""
  import orbax.checkpoint as ocp

  records = read_records(directory)
  if records is None:
    return None
  metrics, history, manifest = records
  with _reading(directory, manifest):
    with ocp.StandardCheckpointer() as checkpointer:
      variables = checkpointer.restore(directory / "params")
    with _parsing(directory):
      index, expected = manifest["generation"], manifest["digest"]
      network = _read_network(directory, manifest)
  if trees.digest(variables) != expected:
    raise CheckpointError(f"{directory}/params is damaged: its digest is not the manifest's; {_remedy(directory)}")
  params = trees.to_host(trees.to_plain(variables), index)
  return Generation(index, params, metrics, tuple(history), network), manifest


def load_together(directory: epath.Path) -> tuple[Generation, dict[str, Any]] | None:
  """Returns what `load` does, alike on all processes: one that trained alone would wait for the others for ever."""
  with processes.together():
    finished = load(directory)
  unfinished = processes.on_any_process(finished is None)
  with processes.together():
    if unfinished and finished is not None:
      raise StorageError(f"another process does not see yet that {directory} is finished; start all of them again")
  return finished


@contextlib.contextmanager
def _reading(directory: epath.Path, manifest: Mapping[str, Any] | None = None) -> Iterator[None]:
  with storage_errors(directory):
    try:
      yield
    except BanError:
      raise
    except Exception as error:  # Orbax raises nearly anything for a broken file
      raise CheckpointError(
        f"{directory} is damaged and cannot be read ({damage(error)}); {_remedy(directory, manifest)}"
      ) from error


@contextlib.contextmanager
def _parsing(directory: epath.Path) -> Iterator[None]:
  """Raises a CheckpointError for whole files that say other things than this version's."""
  try:
    yield
  except (KeyError, TypeError, AttributeError) as error:
    what = f"{type(error).__name__}: {first_line(error)}"
    raise CheckpointError(
      f"{directory} cannot be read by ban_jax {__version__} ({what}); read it with the version that wrote it"
    ) from error


def _remedy(directory: epath.Path, manifest: Mapping[str, Any] | None = None) -> str:
  """Returns what to do about a damaged generation; where another Orbax wrote it, it may be sound."""
  orbax = "orbax-checkpoint"
  wrote = dict((manifest or {}).get("packages", {})).get(orbax)
  if wrote not in (None, importlib.metadata.version(orbax)):
    return f"read it with {orbax} {wrote}, which wrote it"
  return f"remove {directory} to train it again"


def check_lineage(own: Mapping[str, Any], recorded: Mapping[str, Any], directory: epath.Path) -> None:
  """Raises a CheckpointError where a generation on disk has another origin: configuration, teacher or data."""
  differing = [
    f"{key}: {recorded.get(key)} there, {own.get(key)} here"
    for key in ("generation", "teachers", "dataset", "initial")
    if own.get(key) != recorded.get(key)
  ]
  streams = [each.get("data", {}).get("stream", {}) for each in (recorded, own)]
  for split in streams[0].keys() & streams[1].keys():
    there, here = (stream[split] for stream in streams)
    differing += [
      f"{split}'s {key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]
    ]
  values: Any = recorded.get("config")
  if isinstance(values, str):  # an earlier version's digest of what config.json holds
    values = read_json(directory.parent / "config.json")
  differing += config.differences(values, own["config"], own["generation"])
  # An earlier version recorded no programs.
  for here, there in zip(own.get("programs", ()), recorded.get("programs", ()), strict=False):
    differing += filter(None, [program.changed(there, here)])
  differing += filter(None, [program.changed(recorded.get("optimizer"), own.get("optimizer"), "optimizer")])
  if differing:
    raise CheckpointError(
      f"{directory} holds a generation of another origin ({'; '.join(differing)}); give another workdir"
    )


@functools.cache
def provenance() -> dict[str, Any]:
  """Returns which software this process runs, for the manifest: as it was at the first call, before a long training."""
  return {"ban_jax": __version__, "git_commit": _commit(), "packages": {name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str | None:
  """Returns a package's version, or None where it is not installed, or not so that Python knows of it."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit() -> str | None:
  """Returns the commit of the source tree that this package runs from, followed by "+" where it was changed.

  None where the package is installed: the repository that an environment lies in is another project's.
  """
  tree = pathlib.Path(__file__).resolve().parents[2]

  def git(*arguments: str) -> str:
    line = ["git", "-C", str(tree), *arguments]
    return subprocess.run(line, capture_output=True, encoding="utf-8", check=True).stdout.strip()

  try:
    if pathlib.Path(git("rev-parse", "--show-toplevel")).resolve() != tree:
      return None
    return git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+")
  except (OSError, ValueError, subprocess.CalledProcessError):
    return None

"""What an earlier call left in a generation's directory: a finished generation, or checkpoints of one in training."""

import logging
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from ban_jax import processes, storage
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.job import Job
from ban_jax.types import Generation

logger = logging.getLogger(__name__)

# The record of a generation without a checkpoint.
NOTHING: Mapping[str, Any] = {"history": [], "sums": {}, "layouts": []}


def finished(job: Job, directory: epath.Path) -> Generation | None:
  """Returns a generation that a workdir holds, or None; raises where it is of another origin."""
  _check_processes(job.lineage)
  finished = storage.load_together(directory)
  if finished is None:
    return None
  generation, manifest = finished
  storage.check_lineage(job.lineage, manifest, directory)
  if "stopped" in manifest and job.watch.on_epoch is None:
    raise CheckpointError(
      f"{directory} was ended by on_epoch after {manifest['stopped']['epoch']} of {manifest['stopped']['of']} epochs; "
      "give on_epoch again, or another workdir"
    )
  if processes.is_primary():
    storage.remove_leftovers(directory)
  return generation._replace(network=job.network)  # an earlier version recorded none, and a network may be the caller's


def _check_processes(lineage: Mapping[str, Any]) -> None:
  """Raises a ConfigError that names the differences where the processes of a run have other configurations or data."""
  given = {key: lineage.get(key) for key in ("generation", "teachers", "dataset", "programs")}
  given |= {key: value for key, value in lineage["config"].items() if key != "data.dir"}  # local copies are welcome
  if not processes.is_same(str(given)):
    differing = [key for key, value in given.items() if not processes.is_same(str(value))]
    raise ConfigError(
      f"the processes of this run differ in: {', '.join(differing)}; give all of them the same configuration and data"
    )


def check(job: Job, directory: epath.Path, record: Mapping[str, Any]) -> None:
  """Raises where a checkpoint cannot be continued by this job, and warns where it comes from another layout."""
  recorded, own = record["lineage"], job.lineage
  storage.check_lineage(own, recorded, directory)
  replayed = own["layout"]["replayed"]
  if recorded["layout"].get("replayed", replayed) != replayed:  # a recorded teacher has another carry
    begun, now = ("live", "recorded") if replayed else ("recorded", "live")
    raise CheckpointError(
      f"{directory} was begun with a {begun} teacher, and is now to have a {now} one (train.replay; tables record the "
      f"teachers that several of their columns share); continue it as it was begun, or remove {directory}/steps"
    )
  if job.has_dropout and recorded["layout"].get("dropout_draws", 1) != own["layout"]["dropout_draws"]:
    raise CheckpointError(
      f"{directory} was begun by an earlier version, which drew dropout's masks otherwise; continue it with that "
      f"version, or remove {directory}/steps to train it anew"
    )
  before, now = (flatten_dict(lineage["layout"], sep=".") for lineage in (recorded, own))
  # An earlier version recorded fewer settings: of those nothing is known.
  changed = [f"{key} was {before[key]!r}, is {now[key]!r}" for key in now if before.get(key, now[key]) != now[key]]
  if changed and processes.is_primary():
    logger.warning(
      f"{directory} is resumed on another layout ({'; '.join(changed)}): its bytes may differ from those of a run left "
      "alone"
    )


def layouts(job: Job, record: Mapping[str, Any], done: int) -> list[Mapping[str, Any]]:
  """Returns the layouts that took part in a generation, each with the steps that were done before: `record`'s and ours.

  A checkpoint of an earlier version, which keeps no list, has the layout of its lineage.
  """
  earlier = record.get("layouts") or ([{"steps": 0, **record["lineage"]["layout"]}] if "lineage" in record else [])
  own = {"steps": done, **job.lineage["layout"]}
  if earlier and {**earlier[-1], "steps": done} == own:
    return list(earlier)
  return [*earlier, own]

"""Recorded teachers: the logits of a fixed teacher on a fixed stream of mini-batches, computed once for all students.

A teacher's logits follow from its networks, the data and the stream, that is the order of the examples and their
augmentation, which seed and generation decide. Students that share these, such as those of different losses, can learn
from one recording. It is made epoch by epoch, when an epoch is first needed, by a program that runs the teacher alone;
every student, the first one included, reads it. So equal recordings give equal bytes, wherever a run was killed, and a
replayed student differs from a live-taught one by rounding only.
"""

import functools
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax import feeding, storage, trees
from ban_jax.data.augment import AUGMENTATIONS
from ban_jax.job import Job
from ban_jax.keys import KEYS
from ban_jax.step import batch_of
from ban_jax.teacher import Teaching
from ban_jax.types import Batch, Devices

logger = logging.getLogger(__name__)

# Seconds after which a part of a recording is of a process that was killed: several write at once.
STALE = 3600.0

Logits = Float[np.ndarray, "local steps rows *T n"]


def epoch_source(
  job: Job, epoch: int, order: Int[np.ndarray, "steps B"], arrays: Any, key_data: jax.Array
) -> Float[jax.Array, "local steps rows *T n"]:
  """Returns the logits of a job's teacher for an epoch's mini-batches, each device's rows on that device.

  They are read from the job's directory of recordings (`train.replay`), or computed and kept there. A recording whose
  digest is wrong is named in the log and made again.
  """
  path = _directory(job) / f"epoch_{epoch:05d}"
  logits = _read(job, path)
  if logits is None:
    logits = _record(job, epoch, order, arrays, key_data)
    earlier = _read(job, path, named=True)  # of another process, which was faster: all students learn from one
    if earlier is None:
      _keep(job, path, logits)
    else:
      logits = earlier
  return devices_lib.place(logits, job.devices)


def _root(cfg: ConfigDict) -> epath.Path:
  return storage.resolve_workdir(cfg.train.replay, "train.replay")


def _directory(job: Job) -> epath.Path:
  """Returns where the recordings of a job's teacher and stream lie: one directory for all students that share them."""
  values = job.lineage
  stream = {key: values[key] for key in ("generation", "seed", "teachers", "dataset")}
  stream |= {
    **_data(values["config"]),
    "data.dir": "",
    "batch": job.cfg.train.batch_size,
    "layout": devices_lib.layout(job.devices),
  }
  if job.cfg.train.accumulate > 1:  # by which steps may be left out at the end of an epoch
    stream["accumulate"] = job.cfg.train.accumulate
  assert job.teacher.recorded is not None, "of a replayed teacher"
  if job.teacher.recorded.view != "same":
    stream["view"] = job.teacher.recorded.view
  if job.teacher.recorded.weights:
    stream["weights"] = job.teacher.recorded.weights
  # Equal variables may be another function's. Left out where they say nothing, so that earlier recordings are found.
  if job.cfg.compute_dtype != "float32":
    stream["compute_dtype"] = job.cfg.compute_dtype
  if any(programs := job.programs[1:]):
    stream["programs"] = programs
  return _root(job.cfg) / trees.json_digest(stream)[:16] / f"process_{jax.process_index()}"


def _data(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of the data that mini-batches depend on, those of later versions where they say something."""
  unused = AUGMENTATIONS.taken(*AUGMENTATIONS) - AUGMENTATIONS.taken(*config.get("data.augment", ()))

  def counts(key: str, value: Any) -> bool:
    if key not in KEYS:
      return key.startswith("dataset.")
    first = key.startswith(("data.label_noise", "data.noise_"))  # they were there before there were recordings
    known = KEYS[key]
    return key.startswith("data.") and known.in_identity and key not in unused and (first or value != known.neutral)

  return {key: value for key, value in config.items() if counts(key, value)}


def _record(job: Job, epoch: int, order: Int[np.ndarray, "steps B"], arrays: Any, key_data: jax.Array) -> Logits:
  """Returns the logits of a job's live teacher for an epoch's mini-batches."""
  teaching = job.teacher.recorded
  assert teaching is not None, "of a replayed teacher"
  step = make_record_step(teaching, job.dataset.fetch, job.devices)
  source = devices_lib.broadcast(job.teacher.source, job.devices)
  carry = jax.tree.map(np.asarray, teaching.init_carry(order.shape[1]))
  carry, rows = devices_lib.place_rows(carry, job.devices), []
  feeds = feeding.singly(job.dataset, "train", order, job.devices, draw=job.draw(epoch))
  for number, feed in enumerate(feeds, epoch * job.steps_per_epoch):
    carry, logits = step(source, carry, arrays, feed, key_data, np.int32(number))
    rows.append(np.asarray(logits))
  return np.stack(rows, axis=1)


@functools.lru_cache
def make_record_step(teaching: Teaching, fetch: Callable[..., Batch], devices: Devices) -> Callable[..., Any]:
  """Returns the pmapped step `(source, carry, arrays, feed, key_data, step) -> (carry, logits)` of a live teacher.

  The arguments are those of the training step; `feed` is one mini-batch and `step` int32 [], the number of the training
  step that this is the mini-batch of. `logits` are float32 [devices, B / devices, ...].
  """

  def record_step(source, carry, arrays, feed, key_data, step):
    drawn = batch_of(fetch, arrays, feed, key_data, step, teaching.view)
    logits, carry = teaching.logits(source, carry, drawn.shown)
    return carry, logits

  return devices_lib.pmap(record_step, devices=devices, in_axes=(None, 0, None, 0, None, None))


def _read(job: Job, path: epath.Path, *, named: bool = False) -> Logits | None:
  """Returns a recording, or None where there is none, or only a damaged one, which the log names unless it was."""
  record = path.with_suffix(".json")  # written last
  with storage.storage_errors(_root(job.cfg)):
    try:
      if not record.exists():
        return None
      logits = np.load(io.BytesIO(path.with_suffix(".npy").read_bytes()))
      if trees.digest({"logits": logits}) == storage.read_json(record)["digest"]:
        return logits
      reason = "its digest is not the one it was saved with"
    except Exception as error:  # NumPy raises many kinds for a broken file
      reason = storage.damage(error)
  if not named:
    logger.warning(f"recording {path}.npy is damaged ({reason}): it is made again")
  return None


def _keep(job: Job, path: epath.Path, logits: Logits) -> None:
  """Writes a recording, unless all of them would take more room than the configuration allows."""
  root = _root(job.cfg)
  with storage.storage_errors(root):
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.remove_partial(path.parent, seconds=STALE)
    taken = sum(file.stat().length for file in root.glob("*/*/*.npy"))
    if taken + logits.nbytes > job.cfg.train.replay_gib * 2**30:
      _warn_full(root, job.cfg.train.replay_gib)
      return
    content = io.BytesIO()
    np.save(content, logits)
    storage.write_bytes(path.with_suffix(".npy"), content.getvalue())
    storage.write_json(path.with_suffix(".json"), {"digest": trees.digest({"logits": logits})})


@functools.cache
def _warn_full(root: epath.Path, gib: float) -> None:
  logger.warning(
    f"the recordings in {root} have reached train.replay_gib={gib:g}: further epochs are computed anew for each student"
  )

"""Where arrays lie and how devices talk: the axis that every step is mapped over, placement, and the one reduction.

State and carry have a leading device axis; a teacher's variables and the data set are placed once and broadcast.
`jax.pmap` is used here and in step.py only.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from ban_jax.errors import BanError, ConfigError, PeerError
from ban_jax.types import Devices

AXIS = "devices"


def resolve(devices: Sequence[jax.Device] | None) -> Devices:
  """Returns the devices to run on, in mapped order: those named, or all devices of all processes."""
  return tuple(jax.devices() if devices is None else devices)


def local(devices: Devices) -> Devices:
  """Returns the devices among `devices` that this process feeds."""
  return tuple(device for device in devices if device.process_index == jax.process_index())


def pmap(function, *, devices: Devices, in_axes, donate_argnums: tuple[int, ...] = ()):
  """Maps `function` over `devices`; arrays go in and come out with one leading row per device of this process."""
  # Named devices would pin a run of several processes to a layout that pmap already knows: leave that case to it.
  named = None if devices == tuple(jax.devices()) else devices
  return jax.pmap(function, axis_name=AXIS, in_axes=in_axes, donate_argnums=donate_argnums, devices=named)


def all_sum(tree: PyTree) -> PyTree:
  """Sums every leaf over the devices, inside a mapped function: the only cross-device sum outside batch norm.

  The leaves of one dtype travel as one vector, so that a step has one all-reduce for all its gradients and floating
  sums and one for its counts, which stay exact whole numbers.
  """
  # XLA would merge a few hundred leaves by itself, but not all those of a deep DenseNet, and on no fixed terms.
  leaves, structure = jax.tree.flatten(tree)
  for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
    places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
    vector, split = ravel_pytree([leaves[place] for place in places])
    for place, leaf in zip(places, split(jax.lax.psum(vector, AXIS)), strict=True):
      leaves[place] = leaf
  return jax.tree.unflatten(structure, leaves)


def all_mean(tree: PyTree) -> PyTree:
  """Averages every leaf over the devices, inside a mapped function, in one all-reduce a dtype as `all_sum`."""
  return jax.tree.map(lambda leaf: leaf / jax.lax.axis_size(AXIS), all_sum(tree))


def example_positions(rows: int) -> Int[jax.Array, " B"]:
  """Returns this device's examples' places in the global mini-batch, inside a mapped function with `rows` rows each."""
  return jax.lax.axis_index(AXIS) * rows + jax.numpy.arange(rows)


def _sharding(devices: Devices, spec: PartitionSpec) -> NamedSharding:
  return NamedSharding(Mesh(np.asarray(local(devices)), (AXIS,)), spec)


def broadcast(tree: PyTree, devices: Devices) -> PyTree:
  """Copies every leaf to each local device, for an argument that is mapped with axis `None`."""
  return jax.device_put(tree, _sharding(devices, PartitionSpec()))


def replicate(tree: PyTree, devices: Devices) -> PyTree:
  """Copies every leaf to each local device behind a leading device axis, for an argument mapped with axis 0."""
  count = len(local(devices))

  def stacked(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return np.broadcast_to(leaf, (count, *leaf.shape))

  return jax.device_put(jax.tree.map(stacked, tree), _sharding(devices, PartitionSpec(AXIS)))


def split_rows(tree: PyTree, devices: Devices) -> PyTree:
  """Cuts every leaf [B, ...] into this process's rows [local devices, B / devices, ...]."""
  here = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]

  def rows(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.reshape(len(devices), -1, *leaf.shape[1:])[here]

  return jax.tree.map(rows, tree)


def join_rows(tree: PyTree, devices: Devices) -> PyTree:
  """Joins all processes' rows [local devices, B / devices, ...] to NumPy arrays [B, ...]: what `split_rows` cut.

  Every process must call it, and gets the whole.
  """
  rows = jax.device_get(tree)
  if jax.process_count() > 1 and jax.tree.leaves(rows):
    every = multihost_utils.process_allgather(rows)  # [processes, local devices, B / devices, ...]
    places = [(device.process_index, local_index(device, devices)) for device in devices]
    rows = jax.tree.map(lambda leaf: np.stack([leaf[place] for place in places]), every)
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def local_index(device: jax.Device, devices: Devices) -> int:
  """Returns a device's place among those of `devices` that its own process feeds."""
  return [other for other in devices if other.process_index == device.process_index].index(device)


def first(tree: PyTree) -> PyTree:
  """Returns the first local device's copy of every leaf as a NumPy array: what `replicate` put there, brought back."""
  shards = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, tree)
  return jax.tree.map(lambda leaf: leaf[0], jax.device_get(shards))


def check_batch_size(batch_size: int, devices: Devices) -> None:
  """Raises a ConfigError where the devices cannot share the mini-batch equally; it names the counts that work."""
  if batch_size < 1:
    raise ConfigError(f"train.batch_size must be at least 1, not {batch_size}")
  count = len(devices)
  if batch_size % count:
    works = ", ".join(str(n) for n in range(1, count + 1) if batch_size % n == 0)
    below = batch_size // count * count
    sizes = " or ".join(str(size) for size in (below, below + count) if size)
    raise ConfigError(
      f"train.batch_size={batch_size} cannot be shared equally by {count} devices; use {works} devices "
      f"(--devices), or a batch size of {sizes}"
    )


def cores() -> int:
  """Returns how many processor cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_primary() -> bool:
  """Returns whether this process is the one that reports: the first of several, or the only one."""
  return jax.process_index() == 0


def on_any_process(flag: bool) -> bool:
  """Returns whether the flag is set on any of the processes, all of which must ask."""
  return bool(np.any(multihost_utils.process_allgather(np.bool_(flag)))) if jax.process_count() > 1 else flag


def is_same(value: str) -> bool:
  """Returns whether all processes, all of which must ask, ask with the same text."""
  if jax.process_count() == 1:
    return True
  every = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8))
  return bool((every == every[0]).all())


def raise_together(error: BanError | None) -> None:
  """Raises the error that this process met, or a PeerError where only another met one; all of them must ask."""
  failed = on_any_process(error is not None)
  if error is not None:
    raise error
  if failed:
    raise PeerError("another process of the run was refused; its own message says why")


def wait_for_all(what: str) -> None:
  """Waits until every process has come this far; nothing to wait for where there is one."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def layout(devices: Devices) -> dict[str, Any]:
  """Returns what the bytes of a run depend on besides its configuration, for the manifest."""
  return {
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "processes": len({device.process_index for device in devices}),
    "cores": cores(),
  }

"""Where arrays lie and how devices talk: the axis that every step is mapped over, placement, and the one reduction.

What is alike on all devices (state, teacher, data set, sums) has no device axis: XLA for TPUs would copy every large
matrix of a state with one into another layout and back. Carry and index have one. `jax.pmap` and its successor,
`jax.shard_map`, are used in this file alone.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int, PyTree

from ban_jax.errors import ConfigError, look_up
from ban_jax.types import Dataset, Devices

AXIS = "devices"
# The index in place of all examples of a mini-batch that only fills up a dispatch. (-1 is one example's padding.)
NO_BATCH = -2
# JAX's settings are defined as it is imported, where no type checker sees them.
SETTINGS: Any = jax.config
# The flags with which XLA leaves out what adds in an order of its own on GPUs.
DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")


@contextlib.contextmanager
def default_modes() -> Iterator[None]:
  """Computes in the default modes of JAX and NumPy, whatever stricter ones a program has set for its own code.

  It decorates the public functions that compute. Raises a ConfigError where JAX compiles nothing.
  """
  if SETTINGS.jax_disable_jit:
    raise ConfigError("jax_disable_jit is set: a step would take minutes; ban_jax runs compiled, switch it off")
  with (
    jax.numpy_rank_promotion("allow"),
    jax.numpy_dtype_promotion("standard"),
    jax.transfer_guard("allow"),
    np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"),
  ):
    yield


def resolve(devices: Sequence[jax.Device] | None) -> Devices:
  """Returns the devices to run on, in mapped order: those named, or all devices of all processes.

  Raises a ConfigError for anything else than a sequence of devices, and where JAX finds no device of the platform that
  was asked for.
  """
  try:
    every = jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter of a platform whose plugin is absent
    reason = (str(error) or "no such platform").splitlines()[0]
    raise ConfigError(
      f"JAX finds no device of the platform {SETTINGS.jax_platforms or 'it was installed for'} ({reason}); unset "
      "JAX_PLATFORMS to run on what there is, or install JAX for it: pip install 'ban_jax[cuda]' or 'ban_jax[tpu]'"
    ) from error
  if devices is None:
    return tuple(every)
  if not isinstance(devices, Sequence) or not devices or not all(isinstance(d, jax.Device) for d in devices):
    raise ConfigError(f"devices={devices!r}: expected a sequence of devices, as jax.devices()[:2]")
  if len(set(devices)) < len(devices):
    raise ConfigError(f"devices={devices!r}: a device is named twice")
  return tuple(devices)


def local(devices: Devices) -> Devices:
  """Returns the devices among `devices` that this process feeds."""
  return tuple(device for device in devices if device.process_index == jax.process_index())


def pmap(function, *, devices: Devices, in_axes, out_axes: Any = 0, donate_argnums: tuple[int, ...] = ()):
  """Maps `function` over `devices`.

  Arguments and results of axis 0 have one leading row per device of this process; those of axis None are alike on all
  devices and have none.
  """
  # Named devices would pin a run of several processes to a layout that pmap already knows: leave that case to it.
  named = None if devices == tuple(jax.devices()) else devices
  return jax.pmap(
    function, axis_name=AXIS, in_axes=in_axes, out_axes=out_axes, donate_argnums=donate_argnums, devices=named
  )


def shard_map(function, *, devices: Devices, in_axes, out_axes, donate_argnums: tuple[int, ...]):
  """Maps `function` as `pmap` does, by jax.jit and jax.shard_map, in one process; an axis is one for all of a tree."""
  mesh = Mesh(np.asarray(devices), (AXIS,))

  def specs(axes):
    return tuple(PartitionSpec() if axis is None else PartitionSpec(AXIS) for axis in axes)

  def body(*arguments):
    own = [
      tree if axis is None else jax.tree.map(lambda x: x[0], tree)
      for tree, axis in zip(arguments, in_axes, strict=True)
    ]
    results = zip(function(*own), out_axes, strict=True)
    return tuple(tree if axis is None else jax.tree.map(lambda x: x[None], tree) for tree, axis in results)

  # Without check_vma gradients are each device's own, as under pmap.
  mapped = jax.shard_map(body, mesh=mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)
  placed = tuple(NamedSharding(mesh, spec) for spec in specs(in_axes))
  return jax.jit(mapped, in_shardings=placed, donate_argnums=donate_argnums)


# How a training step is mapped over the devices; with the same bytes.
MAPPINGS = {"pmap": pmap, "shard_map": shard_map}


def check_mapping(name: str) -> None:
  """Raises a ConfigError for an unknown mapping, and for one that cannot map over the devices of several processes."""
  if look_up(MAPPINGS, name, "train.mapping") is shard_map and jax.process_count() > 1:
    raise ConfigError(f"train.mapping={name!r} takes one process, and there are {jax.process_count()}; choose 'pmap'")


def psum(tree: PyTree) -> PyTree:
  """Sums every leaf over the devices, inside a mapped function: the only cross-device sum outside batch norm.

  The leaves of one dtype travel as one vector, so that a step has two all-reduces: of all gradients and floating sums,
  and of the counts, which stay exact whole numbers.
  """
  # XLA merges a few hundred leaves by itself, but not those of a deep DenseNet.
  leaves, structure = jax.tree.flatten(tree)
  for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
    places = [place for place, leaf in enumerate(leaves) if leaf.dtype == dtype]
    vector, split = ravel_pytree([leaves[place] for place in places])
    for place, leaf in zip(places, split(jax.lax.psum(vector, AXIS)), strict=True):
      leaves[place] = leaf
  return jax.tree.unflatten(structure, leaves)


def pmean(tree: PyTree) -> PyTree:
  """Averages every leaf over the devices, inside a mapped function, in one all-reduce a dtype as `psum`."""
  return jax.tree.map(lambda leaf: leaf / jax.lax.axis_size(AXIS), psum(tree))


def example_positions(rows: int) -> Int[jax.Array, " B"]:
  """Returns this device's examples' places in the global mini-batch, inside a mapped function with `rows` rows each."""
  return jax.lax.axis_index(AXIS) * rows + jax.numpy.arange(rows)


def next_rows(tree: PyTree) -> PyTree:
  """Returns, for each example of every leaf [B, ...], the next one of the global mini-batch, inside a mapped function.

  The first one follows the last.
  """
  count = jax.lax.axis_size(AXIS)
  ring = [(place, (place - 1) % count) for place in range(count)]
  return jax.tree.map(lambda x: jax.numpy.concatenate([x[1:], jax.lax.ppermute(x[:1], AXIS, ring)]), tree)


def _sharding(devices: Devices, spec: PartitionSpec) -> NamedSharding:
  return NamedSharding(Mesh(np.asarray(local(devices)), (AXIS,)), spec)


def broadcast(tree: PyTree, devices: Devices) -> PyTree:
  """Copies every leaf to each local device, for an argument that is mapped with axis `None`."""
  return jax.device_put(tree, _sharding(devices, PartitionSpec()))


def broadcast_split(dataset: Dataset, split: str, devices: Devices) -> Mapping[str, jax.Array]:
  """Copies a split's arrays to each local device, as programs read them; those that lie there already stay."""
  return broadcast(dataset.pack(dataset.splits[split]), devices)


def place(tree: PyTree, devices: Devices) -> PyTree:
  """Places leaves [local devices, ...] on the devices, for an argument mapped with axis 0."""
  return jax.device_put(tree, _sharding(devices, PartitionSpec(AXIS)))


def split_rows(tree: PyTree, devices: Devices) -> PyTree:
  """Cuts every leaf [B, ...] into this process's rows [local devices, B / devices, ...]."""
  here = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
  return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(len(devices), -1, *np.shape(leaf)[1:])[here], tree)


def place_rows(tree: PyTree, devices: Devices) -> PyTree:
  """Places what `split_rows` cuts; a carry that began on the host would have its step compiled twice."""
  return place(split_rows(tree, devices), devices)


def split_batches(batches: Int[np.ndarray, "m B"], devices: Devices, block: int = 1) -> Int[np.ndarray, "local n rows"]:
  """Cuts mini-batches of B rows into this process's share of each, B / devices rows a device.

  Fewer than `block` mini-batches are filled up to as many by ones that steps leave out.
  """
  filled = np.full((max(block, len(batches)), batches.shape[1]), NO_BATCH, np.int32)
  filled[: len(batches)] = batches
  return split_rows(filled.T, devices).swapaxes(1, 2)


def join_rows(tree: PyTree, devices: Devices) -> PyTree:
  """Joins what `split_rows` cut, on all processes, to NumPy arrays [B, ...]; every process must call it."""
  rows = jax.device_get(tree)
  if jax.process_count() > 1 and jax.tree.leaves(rows):
    every = multihost_utils.process_allgather(rows)  # [processes, local devices, B / devices, ...]
    groups = {index: [d for d in devices if d.process_index == index] for index in range(jax.process_count())}
    places = [(device.process_index, groups[device.process_index].index(device)) for device in devices]
    rows = jax.tree.map(lambda leaf: np.stack([leaf[place] for place in places]), every)
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)


def unreplicate(tree: PyTree) -> PyTree:
  """Returns the first local device's copy of every leaf, which is alike on all, as a NumPy array."""
  return jax.device_get(jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, tree))


def cores() -> int:
  """Returns how many processor cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_on(flags: Sequence[str], name: str) -> bool:
  """Returns whether a boolean flag of XLA is given and true; of several, the last one counts."""
  given = [flag.partition("=")[2] for flag in flags if flag.partition("=")[0] == f"--{name}"]
  return bool(given) and given[-1].lower() in ("", "1", "true")


def are_deterministic() -> bool:
  """Returns whether XLA's flags ask for kernels that give the same bytes each time on GPUs."""
  return any(_is_on(os.environ.get("XLA_FLAGS", "").split(), name) for name in DETERMINISTIC)


def layout(devices: Devices) -> dict[str, Any]:
  """Returns what the bytes of a run depend on besides its configuration, for the manifest."""
  flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
  of_tpus = {"libtpu_flags": " ".join(sorted(os.environ.get("LIBTPU_INIT_ARGS", "").split()))}
  return {
    "platform": devices[0].platform,
    "device_kind": devices[0].device_kind,
    "devices": len(devices),
    "processes": len({device.process_index for device in devices}),
    "cores": cores(),
    "settings": {
      "matmul_precision": SETTINGS.jax_default_matmul_precision or "default",  # "default" is TF32 on NVIDIA's GPUs
      "threefry_partitionable": SETTINGS.jax_threefry_partitionable,
      "prng_impl": SETTINGS.jax_default_prng_impl,
      "deterministic_ops": are_deterministic(),
      "xla_flags": " ".join(sorted(flags)),
      **(of_tpus if devices[0].platform == "tpu" else {}),
    },
  }

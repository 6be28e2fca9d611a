"""Averaged weights: one network from several of the same kind, its batch statistics estimated anew."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ban_jax import config, feeding, networks, resolving, trees
from ban_jax import devices as devices_lib
from ban_jax.errors import ConfigError
from ban_jax.step import make_statistics_step
from ban_jax.trees import Member
from ban_jax.types import Dataset, Generation, Model

# Mini-batches that the batch statistics are estimated from, at least: their running mean, of momentum 0.9, has
# forgotten all but 0.9^100 of what it began with.
BATCHES = 100


@devices_lib.default_modes()
def average(
  generations: Sequence[Member],
  cfg: ConfigDict | resolving.Setup,
  *,
  weights: Sequence[float] | None = None,
  devices: Sequence[jax.Device] | None = None,
  dataset: Dataset | None = None,
  model: Model | None = None,
  teacher_model: Model | None = None,
) -> Generation:
  """Returns the network with the mean parameters of several networks of the same kind.

  Its batch statistics are estimated anew on the training split, in the configuration's mini-batches, augmented as in
  training. Reference: Izmailov et al. 2018, arXiv:1803.05407.

  Args:
    generations: Generations or variables trees of one network.
    cfg: the configuration, of `get_config`, or a Setup, of `setup`.
    weights: of the mean, at least 0; None weights all equally.
    devices: the devices to use; all by default.
    dataset: what `from_arrays` returns, in place of `cfg.data`.
    model: the students' network, in place of `cfg.model`.
    teacher_model: the network of generation 0, in place of `cfg.teacher.model`.

  Returns:
    A Generation with the largest of the generations' numbers, and no metrics: `evaluate` has them.

  Raises:
    ConfigError: for networks of different kinds; and the errors of `evaluate`.

  Examples:
    >>> ban_jax.average([teacher, student], cfg, dataset=data).index
    1
  """
  setup = resolving.resolve(cfg, devices, resolving.Own(dataset, model, teacher_model))
  members, models = networks.members(generations, setup, "member")
  if not members:
    raise ConfigError("average needs at least one network")
  for other in models[1:]:
    if other != models[0]:
      alike = " that normalise images alike" if other.name == models[0].name else ""
      raise ConfigError(f"average takes networks of one kind{alike}, not {models[0].name!r} and {other.name!r}")
  shares = trees.mean_weights(weights, len(members))
  plain = [trees.to_plain(tree) for tree in members]
  mean = jax.tree.map(lambda *leaves: _mean(leaves, shares), *plain)
  if jax.tree.leaves(mean.get("batch_stats", {})):
    mean["batch_stats"] = _statistics(setup, models[0], mean)
  index = max(map(trees.lineage, members))
  first = trees.members_of(generations)[0]
  network = first.network if isinstance(first, Generation) else None
  return Generation(index, trees.to_host(mean, index), {}, (), network or setup.network(index))


def _mean(leaves: Sequence[np.ndarray], shares: Sequence[float] | np.ndarray) -> np.ndarray:
  total = np.zeros(leaves[0].shape)
  for share, leaf in zip(shares, leaves, strict=True):
    total += share * np.asarray(leaf, np.float64)
  return total.astype(leaves[0].dtype)


def _statistics(setup: resolving.Setup, model: Model, variables: dict) -> dict:
  """Returns the batch statistics of a network on the training split, after at least BATCHES mini-batches."""
  cfg, devices = setup.cfg, setup.devices
  config.check_batch_size(cfg.train.batch_size, devices)
  step = make_statistics_step(model, setup.dataset.fetch, devices)
  statistics = devices_lib.broadcast(variables["batch_stats"], devices)
  params = devices_lib.broadcast(variables["params"], devices)
  arrays = devices_lib.broadcast_split(setup.dataset, "train", devices)
  key = jax.random.key(cfg.seed, impl="threefry2x32")
  key_data = devices_lib.broadcast(jax.random.key_data(key), devices)
  done, epoch = 0, 0
  while done < BATCHES:
    order = setup.dataset.train_order(jax.random.fold_in(key, epoch), cfg.train.batch_size)
    for feed in feeding.singly(setup.dataset, "train", order, devices, draw=(cfg.seed, 0, epoch)):
      statistics = step(params, statistics, arrays, feed, key_data, jnp.int32(done))
      jax.block_until_ready(statistics)  # unbounded dispatch to several CPU devices deadlocks
      done += 1
    epoch += 1
  return devices_lib.unreplicate(statistics)

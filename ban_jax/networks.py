"""The networks of the generations and variables trees that a caller gives: as teachers, members or initial weights."""

import functools
import logging
from collections.abc import Sequence

import numpy as np

from ban_jax import resolving, trees
from ban_jax.data import arrays as arrays_lib
from ban_jax.errors import ConfigError
from ban_jax.models import make_model, program
from ban_jax.resolving import Setup
from ban_jax.trees import Member
from ban_jax.types import Dataset, Generation, Model, Network, Variables

logger = logging.getLogger(__name__)


def members(given: Member | Sequence[Member] | None, setup: Setup, what: str) -> tuple[list[Variables], list[Model]]:
  """Returns the variables trees of one network, or of several, and their networks, which they are known to fit.

  A Generation's network is its own, and normalises images as it was trained; a bare tree's is the configuration's for
  its place in the lineage. Raises a ConfigError for a network of the caller's own that is not at hand or that reads
  images of another type, and a CheckpointError for a tree that does not fit; `what` names the trees in messages.
  """
  found, trees_, models = trees.members_of(given), [], []
  for number, member in enumerate(found, 1):
    label = what if len(found) == 1 else f"{what} {number}"
    tree = member.params if isinstance(member, Generation) else member
    if isinstance(member, Generation) and member.network is not None:
      model, source = _normalised(_model_of(member, member.network, setup, label), member.network, setup, label), ""
    else:
      model = setup.models[min(trees.lineage(tree), 1)]
      source = "; a tree does not say which network it is, so that the configuration's is taken"
    trees.check_fits(tree, model, label, source)
    trees_.append(tree)
    models.append(model)
  return trees_, models


def _normalised(model: Model, network: Network, setup: Setup, label: str) -> Model:
  """Returns a network that reads the data set's images normalised as those that it was trained on."""
  if _is_normalised_alike(network, setup.dataset, label):
    return model
  scalings = (setup.dataset.scaling, network.scaling)
  return _renormalised(model, *(tuple(tuple(one[name]) for name in ("mean", "std")) for one in scalings))


def _is_normalised_alike(network: Network, dataset: Dataset, label: str) -> bool:
  """Returns whether a network was trained on images normalised as the data set's, as far as that is known, or says so.

  Raises a ConfigError where they are of another type.
  """
  own, given = network.scaling, dataset.scaling
  if not own or not given or own == given:
    return True
  if own["dtype"] != given["dtype"]:
    raise ConfigError(f"{label} was trained on {own['dtype']} images; those of {dataset.name} are {given['dtype']}")
  logger.warning(
    f"{label} normalises images by its own mean {_shown(own['mean'])} and deviation {_shown(own['std'])}, not by those "
    f"of {dataset.name}, {_shown(given['mean'])} and {_shown(given['std'])}"
  )
  return False


def _shown(values: Sequence[float]) -> str:
  return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


@functools.lru_cache
def _renormalised(model: Model, given: tuple[tuple[float, ...], ...], own: tuple[tuple[float, ...], ...]) -> Model:
  """Returns a network of `own` (mean, std) for images normalised by `given`; equal arguments give the same object."""
  (mean, std), (own_mean, own_std) = (np.array(one, np.float64) for one in (given, own))
  factor, offset = ((value / own_std).astype(np.float32) for value in (std, mean - own_mean))

  def apply(variables, carry, inputs, **options):
    return model.apply(variables, carry, inputs * factor + offset, **options)

  return model._replace(apply=apply, normalisation=own)


def continued(initial: Member | None, setup: Setup) -> Setup:
  """Returns a setup whose images are normalised as those that a student's initial network was trained on."""
  given = next(iter(trees.members_of(initial)), None)
  network = given.network if isinstance(given, Generation) else None
  if network is None or _is_normalised_alike(network, setup.dataset, "initial"):
    return setup
  statistics = {name: np.array(network.scaling[name], np.float32) for name in ("mean", "std")}
  splits = {split: {**arrays, **statistics} for split, arrays in setup.dataset.splits.items()}
  digest = arrays_lib.digest(splits)
  if setup.dataset.streams:  # whose arrays say nothing of the images
    digest = trees.json_digest([setup.dataset.digest, digest])
  return setup._replace(dataset=setup.dataset._replace(splits=splits, digest=digest))


def _model_of(member: Generation, network: Network, setup: Setup, label: str) -> Model:
  """Returns a generation's own network, of which it keeps `network`."""
  generation = min(member.index, 1)
  if network.own is not None:
    resolving.check_spec(f"the network of {label}, {network.own.name!r},", network.own.spec, setup.dataset.spec)
    return network.own
  if network.group["name"] == "own":
    name = network.group["own"]
    given = [model for model in (setup.own.teacher_model, setup.own.model) if model is not None and model.name == name]
    if not given:
      raise ConfigError(f"{label} has a network of your own, {name!r}: give it as model= or teacher_model=, or to load")
    reasons = [misfit(model, member) for model in given]
    if all(reasons):
      raise ConfigError(f"{label}: {reasons[-1]}")
    return given[reasons.index("")]
  # The configuration's choice of how to compute the same network (dtype, rematerialisation, cuDNN) is kept.
  configured, name = setup.models[generation], setup.network(generation).group["name"]
  if name == network.group["name"] and not trees.first_difference(configured.shapes, member.params):
    return configured
  return make_model(
    network.group,
    setup.dataset.spec,
    compute_dtype=setup.cfg.compute_dtype,
    sync_batch_stats=setup.cfg.train.sync_batch_stats,
    key=f"the network of {label}",
    devices=setup.devices,
  )


def misfit(model: Model, member: Generation) -> str:
  """Returns in what a network of one's own is not the one that a generation was trained with; "" for nothing."""
  network = member.network
  recorded = {} if network is None else dict(network.group)
  own, name = resolving.own_group(model), recorded.get("own")
  if name != model.name:
    trained = "no network on record" if network is None else repr(name or recorded["name"])
    return f"model is {model.name!r}, but the generation was trained with {trained}"
  differing = [key for key in sorted(own.keys() | recorded.keys()) if own.get(key) != recorded.get(key)]
  if differing:
    here, there = (", ".join(f"{key}={group.get(key)!r}" for key in differing) for group in (own, recorded))
    return f"model {name!r} has {here}; the generation was trained with {there}"
  if difference := trees.first_difference(model.shapes, member.params):
    path, want, have = difference
    return f"the generation was trained with another network {name!r}: at {path} the model has {want}, it has {have}"
  if network is not None and network.program is not None and model.program is not None:
    old, new = (program.record(model.name, each, trained=False) for each in (network.program, model.program))
    if words := program.changed(old, new):
      return words
  return ""

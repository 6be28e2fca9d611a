"""DenseNet-BC (Huang et al. 2017), in the variant that matches the parameter counts of Furlanello et al. 2018."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.types import InputSpec, Model

STAGES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseNetOptions:
  """Options of `densenet`; raises a ConfigError for a value out of range."""

  units: int  # bottleneck units per stage; the depth is 6 units + 4
  growth: int | tuple[int, ...]  # channels that each unit adds: one number, or one per stage
  stem: int  # channels after the first convolution
  compression: float  # fraction of the channels that a transition keeps, rounded down; in (0, 1]
  remat: bool  # recompute units and transitions in the backward pass: the same values, less memory, more time

  def __post_init__(self):
    common.check_at_least(1, units=self.units, stem=self.stem)
    if len(self.growths) != STAGES:
      raise ConfigError(f"model.growth={self.growth}: one number, or {STAGES}, one for each stage, are expected")
    for growth in self.growths:
      common.check_at_least(1, growth=growth)
    if not 0 < self.compression <= 1:
      raise ConfigError(f"model.compression={self.compression}: the share of channels kept lies in (0, 1]")
    if int(self.stem * self.compression) < 1:
      raise ConfigError(f"model.compression={self.compression}: it leaves no channel of model.stem={self.stem}")
    common.check_bool(remat=self.remat)

  @property
  def growths(self) -> tuple[int, ...]:
    """The growth of each stage."""
    return self.growth if isinstance(self.growth, tuple) else (self.growth,) * STAGES


class Map(NamedTuple):
  """A feature map, which all later units of its stage read, and in training the moments of its channels."""

  values: Float[Array, "B H W C"]
  moments: Float[Array, "2 C"] | None


class DenseUnit(nn.Module):
  """Bottleneck unit: BN-ReLU-1x1 conv to four times the growth, BN-ReLU-3x3 conv to the growth.

  The stage's feature maps are separate arguments, concatenated inside. A rematerialised unit then keeps each map once
  for the backward pass, where keeping one concatenation per unit would take quadratic memory.
  """

  growth: int
  train: bool
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, *maps: Map) -> Float[Array, "B H W growth"]:
    activated = functools.partial(common.norm_relu, train=self.train, dtype=self.dtype, axis_name=self.axis_name)
    y = common.relu(common.JoinedNorm(self.train, self.dtype, self.axis_name, name="norm1")(*_join(maps)))
    y = common.conv(4 * self.growth, 1, dtype=self.dtype, name="conv1")(y)  # [B, H, W, 4 growth]
    return common.conv(self.growth, 3, dtype=self.dtype, name="conv2")(activated(y, name="norm2"))


class Transition(nn.Module):
  """The end of a stage: concatenation, then BN-ReLU-1x1 conv to the fraction `compression` of the channels."""

  compression: float
  train: bool
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, *maps: Map) -> Float[Array, "B H W C"]:
    x, moments = _join(maps)
    y = common.relu(common.JoinedNorm(self.train, self.dtype, self.axis_name, name="norm")(x, moments))
    width = int(round(x.shape[-1] * self.compression, 6))  # floor, where 100 * 0.29 counts as 29
    return common.conv(width, 1, dtype=self.dtype, name="conv")(y)


def _join(maps: Sequence[Map]) -> Map:
  """Returns the maps as one of all channels."""
  values, moments = zip(*maps, strict=True)
  return Map(jnp.concatenate(values, axis=-1), None if moments[0] is None else jnp.concatenate(moments, axis=-1))


def _keep_sums(primitive, *_, **__) -> bool:
  """Keeps the results of psum (two numbers per channel), so that the backward pass repeats no all-reduce."""
  return primitive.name == "psum"


class DenseNet(nn.Module):
  """A 3x3 stem, three stages of bottleneck units, BN-ReLU, global average pooling and a linear classifier.

  Every stage ends in a compressing transition, followed by 2x2 average pooling after the first two. Standard
  DenseNet-BC has no transition after the last stage; without it the counts are 6% below the paper's.
  """

  options: DenseNetOptions
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    del positions  # no dropout
    # Transitions are rematerialised too: they hold the largest concatenations.
    unit: Any = DenseUnit
    transition: Any = Transition
    if self.options.remat:
      unit, transition = (nn.remat(module, policy=_keep_sums) for module in (unit, transition))
    settings = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
    x = common.conv(self.options.stem, 3, dtype=self.dtype, name="stem")(x)
    moments = common.moments if train else lambda x: None
    for stage, growth in enumerate(self.options.growths, 1):
      maps = [Map(x, moments(x))]
      for number in range(1, self.options.units + 1):
        y = unit(growth, name=f"stage{stage}_unit{number}", **settings)(*maps)
        maps.append(Map(y, moments(y)))
      x = transition(self.options.compression, name=f"transition{stage}", **settings)(*maps)
      x = common.avg_pool_2x2(x) if stage < STAGES else x
    x = common.norm_relu(x, name="norm", **settings)
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def densenet(spec: InputSpec, options: DenseNetOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns a DenseNet-BC; raises a ConfigError for a data set of text."""
  name = f"densenet_3x{options.units}_{'_'.join(str(growth) for growth in dict.fromkeys(options.growths))}"
  common.require_kind(name, "images", spec)
  module = DenseNet(options, spec.num_classes, dtype, axis_name)
  return common.from_module(name, module, spec, poolings=STAGES - 1)

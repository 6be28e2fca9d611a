"""DenseNet-BC (Huang et al. 2017) in the form that the parameter counts of Furlanello et al. 2018 demand."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.types import InputSpec, Model

STAGES = 3


class DenseUnit(nn.Module):
  """Bottleneck unit: BN-ReLU-1x1 conv to four times the growth, BN-ReLU-3x3 conv to the growth.

  It takes the stage's feature maps one by one and joins them itself: when it is rematerialised, what is kept for the
  backward pass are the maps, each once, and not a concatenation per unit, whose sizes add up quadratically.
  """

  growth: int
  train: bool
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, *maps: Float[Array, "B H W _"]) -> Float[Array, "B H W growth"]:
    activated = functools.partial(common.norm_relu, train=self.train, dtype=self.dtype, axis_name=self.axis_name)
    y = activated(jnp.concatenate(maps, axis=-1), name="norm1")  # [B, H, W, C]
    y = common.conv(4 * self.growth, 1, dtype=self.dtype, name="conv1")(y)  # [B, H, W, 4 growth]
    return common.conv(self.growth, 3, dtype=self.dtype, name="conv2")(activated(y, name="norm2"))


class Transition(nn.Module):
  """The end of a stage: its feature maps joined, BN-ReLU-1x1 conv to the share `compression` of their channels."""

  compression: float
  train: bool
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, *maps: Float[Array, "B H W _"]) -> Float[Array, "B H W C"]:
    x = jnp.concatenate(maps, axis=-1)
    y = common.norm_relu(x, train=self.train, dtype=self.dtype, axis_name=self.axis_name, name="norm")
    width = int(round(x.shape[-1] * self.compression, 6))  # down, but not for 28.999999999999996 = 100 * 0.29
    return common.conv(width, 1, dtype=self.dtype, name="conv")(y)


def _keep_sums(primitive, *_, **__) -> bool:
  """Keeps what devices have summed, two numbers a channel, so that the backward pass does not sum it once more."""
  return primitive.name == "psum"


class DenseNet(nn.Module):
  """A 3x3 stem and three stages of bottleneck units; BN-ReLU, global average and a linear classifier behind.

  Every stage ends in a compressing transition, the first two of them followed by 2x2 average pooling. Standard
  DenseNet-BC has none behind its last stage; without it the counts come out 6% below the paper's.
  """

  units: int
  growth: tuple[int, ...]
  stem: int
  compression: float
  remat: bool
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    del positions  # no dropout
    # The transitions hold the largest concatenations of all, hence they are rematerialised as well.
    unit, transition = DenseUnit, Transition
    if self.remat:
      unit, transition = (nn.remat(module, policy=_keep_sums) for module in (unit, transition))
    settings = {"train": train, "dtype": self.dtype, "axis_name": self.axis_name}
    x = common.conv(self.stem, 3, dtype=self.dtype, name="stem")(x)
    for stage, growth in enumerate(self.growth, 1):
      maps = [x]
      for number in range(1, self.units + 1):
        maps.append(unit(growth, name=f"stage{stage}_unit{number}", **settings)(*maps))
      x = transition(self.compression, name=f"transition{stage}", **settings)(*maps)
      x = common.halve(x) if stage < STAGES else x
    x = common.norm_relu(x, name="norm", **settings)
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def densenet(
  spec: InputSpec,
  *,
  dtype: Any,
  axis_name: str | None,
  units: int,
  growth: int | tuple[int, ...],
  stem: int,
  compression: float,
  remat: bool,
) -> Model:
  """Returns a DenseNet-BC of `units` bottleneck units in each of three stages (depth 6 `units` + 4).

  Each unit adds `growth` channels (one number, or one for each stage) to the `stem` channels that the first convolution
  makes; a transition keeps the share `compression` of them, rounded down. `remat` computes units and transitions anew
  in the backward pass instead of keeping their insides: the same parameters and the same values for less memory and
  another forward pass. Raises a ConfigError for a number below 1 and unless 0 < compression <= 1.
  """
  common.check_positive(units=units, stem=stem)
  growths = growth if isinstance(growth, tuple) else (growth,) * STAGES
  if len(growths) != STAGES:
    raise ConfigError(f"model.growth={growth}: one number, or {STAGES}, one for each stage, are expected")
  for value in growths:
    common.check_positive(growth=value)
  name = f"densenet_3x{units}_{'_'.join(str(value) for value in dict.fromkeys(growths))}"
  common.require_kind(name, "images", spec)
  if not 0 < compression <= 1:
    raise ConfigError(f"model.compression={compression}: the share of channels kept lies in (0, 1]")
  if int(stem * compression) < 1:
    raise ConfigError(f"model.compression={compression}: it leaves no channel of model.stem={stem}")
  module = DenseNet(units, growths, stem, compression, remat, spec.num_classes, dtype, axis_name)
  return common.from_image_module(name, module, spec)

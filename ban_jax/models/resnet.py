"""ResNet (He et al. 2016): those of CIFAR (20 to 110 layers) and of ImageNet (18 to 152), and pre-activated ones."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.models.wide_resnet import WideBlock
from ban_jax.types import InputSpec, Model

# Images of more pixels than this on their shorter side get ImageNet's stem, which makes them four times smaller.
SMALL = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetOptions:
  """Options of `resnet`; raises a ConfigError for a value out of range."""

  blocks: tuple[int, ...]  # of each stage: (3, 3, 3) is ResNet-20, (3, 4, 6, 3) with bottlenecks ResNet-50
  width: int  # channels of the first stage's 3x3 convolutions; each later stage has twice as many, at half the size
  bottleneck: bool  # blocks of 1x1, 3x3 and 1x1 convolutions, the last four times as wide, in place of two 3x3
  # Whether a shortcut that changes the shape is a 1x1 convolution and a norm (B), or takes every second pixel and fills
  # up with channels of zeros (A).
  projection: bool
  zero_scale: bool  # the last norm of each block starts with a scale of 0 (Goyal et al. 2017), or of 1
  # Whether blocks are those of a Wide-ResNet, in which norms and ReLUs come before the convolutions.
  preactivation: bool = False

  def __post_init__(self):
    if not isinstance(self.blocks, tuple) or not self.blocks:
      raise ConfigError(f"model.blocks={self.blocks}: the number of blocks of each stage is expected")
    for blocks in self.blocks:
      common.check_at_least(1, blocks=blocks)
    common.check_at_least(1, width=self.width)
    common.check_bool(bottleneck=self.bottleneck, projection=self.projection, zero_scale=self.zero_scale)
    common.check_bool(preactivation=self.preactivation)
    if self.preactivation and (self.bottleneck, self.projection, self.zero_scale) != (False, True, False):
      raise ConfigError(
        "model.preactivation=True: expected model.bottleneck=False, model.projection=True and model.zero_scale=False, "
        "since such blocks have two convolutions and no norm at their end"
      )

  @property
  def depth(self) -> int:
    """The number of layers with weights, shortcuts aside."""
    return 2 + sum(self.blocks) * (3 if self.bottleneck else 2)


class ResNetBlock(nn.Module):
  """Convolutions with a norm after each and ReLU between them, plus the shortcut, then ReLU.

  A bottleneck's stride is that of its 3x3 convolution, as in PyTorch's ResNets; the paper's is in its first 1x1.
  """

  options: ResNetOptions
  width: int
  stride: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w D"]:
    options, outputs = self.options, self.width * (4 if self.options.bottleneck else 1)
    norm = functools.partial(common.norm, train=train, dtype=self.dtype, axis_name=self.axis_name)
    last = nn.initializers.zeros if options.zero_scale else nn.initializers.ones
    first = (self.width, 3, self.stride), (outputs, 3, 1)
    layers = ((self.width, 1, 1), (self.width, 3, self.stride), (outputs, 1, 1)) if options.bottleneck else first
    y = x
    for number, (width, size, stride) in enumerate(layers, 1):
      y = common.conv(width, size, stride=stride, dtype=self.dtype, name=f"conv{number}")(y)
      if number < len(layers):
        y = common.relu(norm(name=f"norm{number}")(y))
    y = norm(name=f"norm{len(layers)}", scale=last)(y)
    if (x.shape[-1], self.stride) != (outputs, 1):
      if options.projection:
        x = common.conv(outputs, 1, stride=self.stride, dtype=self.dtype, name="shortcut")(x)
        x = norm(name="shortcut_norm")(x)
      else:
        x = x[:, :: self.stride, :: self.stride]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, outputs - x.shape[-1])))
    return common.relu(x + y)


class ResNet(nn.Module):
  """A stem, stages of blocks, global average pooling and a linear classifier.

  The stem is a 3x3 convolution; for images of more than 64 pixels it is 7x7 of stride 2, with 3x3 max pooling of stride
  2 after its norm. Pre-activated blocks have no norm after the last of them, as in the networks of Kim et al. 2021.
  """

  options: ResNetOptions
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    large = min(x.shape[1:3]) > SMALL
    x = common.conv(self.options.width, 7 if large else 3, stride=2 if large else 1, dtype=self.dtype, name="stem")(x)
    x = common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm")
    if large:
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate(self.options.blocks):
      for unit in range(blocks):
        shared = {
          "width": self.options.width * 2**stage,
          "stride": 2 if stage > 0 and unit == 0 else 1,
          "dtype": self.dtype,
          "axis_name": self.axis_name,
          "name": f"stage{stage + 1}_unit{unit + 1}",
        }
        if self.options.preactivation:
          x = WideBlock(dropout=0.0, **shared)(x, train=train, positions=positions)
        else:
          x = ResNetBlock(options=self.options, **shared)(x, train=train)
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def resnet(spec: InputSpec, options: ResNetOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns ResNet-depth, pre-activated or not; raises a ConfigError for a data set of text."""
  name = f"{'preact_' if options.preactivation else ''}resnet_{options.depth}"
  common.require_kind(name, "images", spec)
  return common.from_module(name, ResNet(options, spec.num_classes, dtype, axis_name), spec)

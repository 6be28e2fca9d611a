"""Wide-ResNet (Zagoruyko & Komodakis 2016), the networks of Table 1 and Table 3 of Furlanello et al. 2018."""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.types import InputSpec, Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class WideResNetOptions:
  """Options of `wide_resnet`; raises a ConfigError for a value out of range."""

  depth: int  # number of layers: 6n + 4, with n >= 1 blocks per stage
  width: int  # width factor: the stages have 16, 32 and 64 times as many channels
  dropout: float  # rate between the two convolutions of a block, in [0, 1)

  def __post_init__(self):
    if self.depth < 10 or self.depth % 6 != 4:
      raise ConfigError(
        f"model.depth={self.depth}: a Wide-ResNet has depth 6n + 4 with n >= 1: 10, 16, 22, 28, 40, ..."
      )
    if self.width < 1:
      raise ConfigError(f"model.width={self.width}: a Wide-ResNet's width factor is at least 1")
    common.check_at_least(1, depth=self.depth, width=self.width)
    common.check_dropout(self.dropout)


class WideBlock(nn.Module):
  """Pre-activation block: BN-ReLU-3x3 conv, BN-ReLU, dropout, 3x3 conv, plus the shortcut.

  The shortcut is the input, or where the width changes a 1x1 convolution of the activated input.
  """

  width: int
  stride: int
  dropout: float
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, x, *, train, positions):  # [B, H, W, C] -> [B, H / stride, W / stride, width]
    conv = functools.partial(common.conv, self.width, dtype=self.dtype)
    activated = functools.partial(common.norm_relu, train=train, dtype=self.dtype, axis_name=self.axis_name)
    y = activated(x, name="norm1")
    shortcut = x if x.shape[-1] == self.width else conv(1, stride=self.stride, name="shortcut")(y)
    y = conv(3, stride=self.stride, name="conv1")(y)
    y = common.Dropout(self.dropout)(activated(y, name="norm2"), train=train, positions=positions)
    return shortcut + conv(3, name="conv2")(y)


class WideResNet(nn.Module):
  """A 3x3 stem, three stages of widths 16w, 32w and 64w, BN-ReLU, global average pooling and a linear classifier."""

  options: WideResNetOptions
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    x = common.conv(16, 3, dtype=self.dtype, name="stem")(x)
    for stage in range(3):
      for unit in range((self.options.depth - 4) // 6):
        block = WideBlock(
          width=16 * 2**stage * self.options.width,
          stride=2 if stage > 0 and unit == 0 else 1,
          dropout=self.options.dropout,
          dtype=self.dtype,
          axis_name=self.axis_name,
          name=f"stage{stage + 1}_unit{unit + 1}",
        )
        x = block(x, train=train, positions=positions)
    x = common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm")
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def wide_resnet(spec: InputSpec, options: WideResNetOptions, *, dtype: Any, axis_name: str | None) -> Model:
  """Returns Wide-ResNet-depth-width; raises a ConfigError for a data set of text."""
  name = f"wide_resnet_{options.depth}_{options.width}"
  common.require_kind(name, "images", spec)
  return common.from_module(name, WideResNet(options, spec.num_classes, dtype, axis_name), spec)

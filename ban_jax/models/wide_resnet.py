"""Wide-ResNet (Zagoruyko & Komodakis 2016), the networks of Table 1 and Table 3 of Furlanello et al. 2018."""

import functools
from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.types import InputSpec, Model


class WideBlock(nn.Module):
  """Pre-activation block: BN-ReLU-3x3 conv, BN-ReLU, dropout, 3x3 conv, and the shortcut.

  Where the width changes, the shortcut is a 1x1 convolution of the activated input; elsewhere it is the input itself.
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
  """Three stages of widths 16w, 32w, 64w after a 3x3 stem; BN-ReLU, global average and a linear classifier behind."""

  depth: int
  width: int
  dropout: float
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    x = common.conv(16, 3, dtype=self.dtype, name="stem")(x)
    for stage in range(3):
      for unit in range((self.depth - 4) // 6):
        x = WideBlock(
          16 * 2**stage * self.width,
          2 if stage and not unit else 1,
          self.dropout,
          self.dtype,
          self.axis_name,
          name=f"stage{stage + 1}_unit{unit + 1}",
        )(x, train=train, positions=positions)
    x = common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm")
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def wide_resnet(spec: InputSpec, *, dtype: Any, axis_name: str | None, depth: int, width: int, dropout: float) -> Model:
  """Returns Wide-ResNet-`depth`-`width`, with `dropout` between the two convolutions of a block.

  Raises a ConfigError unless depth is 6n + 4 with n >= 1, width >= 1 and 0 <= dropout < 1.
  """
  name = f"wide_resnet_{depth}_{width}"
  common.require_kind(name, "images", spec)
  if depth < 10 or depth % 6 != 4:
    raise ConfigError(f"model.depth={depth}: a Wide-ResNet has depth 6n + 4 with n >= 1: 10, 16, 22, 28, 40, ...")
  if width < 1:
    raise ConfigError(f"model.width={width}: a Wide-ResNet's width factor is at least 1")
  common.check_positive(depth=depth, width=width)
  common.check_dropout(dropout)
  module = WideResNet(depth, width, dropout, spec.num_classes, dtype, axis_name)
  return common.from_image_module(name, module, spec)

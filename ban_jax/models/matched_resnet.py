"""ResNet students built to a DenseNet teacher's stage widths: Table 5 of Furlanello et al. 2018.

The paper prints no layer list. The wide students' structure reproduces its four parameter counts. The bottleneck
students' counts (7.3M at ratio 0.5, 17.7M at 1) no reading tried reproduces; see PreUnit for the one taken.
"""

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.models.wide_resnet import WideBlock
from ban_jax.types import InputSpec, Model

# The teacher's layers that a student copies and keeps frozen: their names and shapes are DenseNet's.
INHERITS = ("stem", "classifier")


class PreUnit(nn.Module):
  """Pre-activation bottleneck (He et al. 2016): BN-ReLU-1x1 conv, BN-ReLU-3x3 conv, BN-ReLU-1x1 conv, and the shortcut.

  The residual stream is as wide as the teacher's stage, and `inner`, the width between the 1x1 convolutions, is a
  quarter of it times the ratio: 7.6M and 19.1M parameters for the students that the paper gives 7.3M and 17.7M. With
  the ratio on the stream as well, as in the wide students, they are 5.7M and 19.1M, or 20.3M with their closing 1x1.
  """

  width: int
  inner: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, x, *, train):  # [B, H, W, C] -> [B, H, W, width]
    def activated(x, name):
      return common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name=name)

    def conv(width, size, name):
      return common.conv(width, size, dtype=self.dtype, name=name)

    y = activated(x, "norm1")
    shortcut = x if x.shape[-1] == self.width else conv(self.width, 1, "shortcut")(y)
    y = activated(conv(self.inner, 1, "conv1")(y), "norm2")
    y = activated(conv(self.inner, 3, "conv2")(y), "norm3")
    return shortcut + conv(self.width, 1, "conv3")(y)


class MatchedPreResNet(nn.Module):
  """The teacher's stem; three stages of bottleneck units, pooled as the teacher's; BN-ReLU, mean, its classifier."""

  units: int
  inner: tuple[int, ...]
  stem: int
  stages: tuple[int, ...]
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    del positions  # no dropout
    x = common.conv(self.stem, 3, dtype=self.dtype, name="stem")(x)
    for stage, (width, inner) in enumerate(zip(self.stages, self.inner, strict=True), 1):
      for number in range(1, self.units + 1):
        x = PreUnit(width, inner, self.dtype, self.axis_name, name=f"stage{stage}_unit{number}")(x, train=train)
      x = common.halve(x) if stage < len(self.stages) else x
    x = common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm")
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


class MatchedWideResNet(nn.Module):
  """The teacher's stem; three stages of wide blocks, pooled as the teacher's; BN-ReLU, mean, its classifier.

  A 1x1 convolution at each stage's end makes the teacher's width of the blocks'.
  """

  units: int
  widths: tuple[int, ...]
  stem: int
  stages: tuple[int, ...]
  dropout: float
  num_classes: int
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B n"]:
    x = common.conv(self.stem, 3, dtype=self.dtype, name="stem")(x)
    for stage, (width, matched) in enumerate(zip(self.widths, self.stages, strict=True), 1):
      for number in range(1, self.units + 1):
        block = WideBlock(width, 1, self.dropout, self.dtype, self.axis_name, name=f"stage{stage}_unit{number}")
        x = block(x, train=train, positions=positions)
      x = common.conv(matched, 1, dtype=self.dtype, name=f"match{stage}")(x)
      x = common.halve(x) if stage < len(self.stages) else x
    x = common.norm_relu(x, train=train, dtype=self.dtype, axis_name=self.axis_name, name="norm")
    return common.classifier(x.mean(axis=(1, 2)), self.num_classes, self.dtype)


def matched_pre_resnet(
  spec: InputSpec,
  *,
  dtype: Any,
  axis_name: str | None,
  units: int,
  ratio: float,
  stem: int,
  stages: tuple[int, ...],
) -> Model:
  """Returns a bottleneck student of `units` units a stage for a teacher of stem width `stem` and stage widths `stages`.

  The width between a unit's 1x1 convolutions is `ratio` times a quarter of the stage's, rounded down. Raises a
  ConfigError for a number below 1, and for a ratio that leaves no channel.
  """
  _check(units, ratio, stem, stages)
  name = f"matched_pre_resnet_{units}_{ratio:g}"
  common.require_kind(name, "images", spec)
  inner = tuple(int(round(ratio * width / 4, 6)) for width in stages)
  if min(inner) < 1:
    raise ConfigError(f"model.ratio={ratio}: a ratio that leaves at least 1 of {min(stages)} / 4 channels is expected")
  module = MatchedPreResNet(units, inner, stem, stages, spec.num_classes, dtype, axis_name)
  return common.from_image_module(name, module, spec)._replace(inherits=INHERITS)


def matched_wide_resnet(
  spec: InputSpec,
  *,
  dtype: Any,
  axis_name: str | None,
  units: int,
  ratio: float,
  stem: int,
  stages: tuple[int, ...],
  dropout: float,
) -> Model:
  """Returns a student of `units` wide blocks a stage for a teacher of stem width `stem` and stage widths `stages`.

  The blocks are `ratio` times as wide as the stage. Raises a ConfigError for a number below 1, for a ratio that gives
  no whole number of channels, and unless 0 <= dropout < 1.
  """
  _check(units, ratio, stem, stages)
  name = f"matched_wide_resnet_{units}_{ratio:g}"
  common.require_kind(name, "images", spec)
  widths = tuple(round(ratio * width) for width in stages)
  for stage, width in zip(stages, widths, strict=True):
    if width < 1 or abs(width - ratio * stage) > 1e-6:
      raise ConfigError(
        f"model.ratio={ratio}: a ratio is expected that makes a whole number of channels, at least 1, of each of "
        f"model.stages={stages}; of {stage} it makes {ratio * stage:g}"
      )
  common.check_dropout(dropout)
  module = MatchedWideResNet(units, widths, stem, stages, dropout, spec.num_classes, dtype, axis_name)
  return common.from_image_module(name, module, spec)._replace(inherits=INHERITS)


def _check(units: int, ratio: float, stem: int, stages: tuple[int, ...]) -> None:
  common.check_positive(units=units, stem=stem)
  if not isinstance(stages, tuple) or len(stages) != 3:
    raise ConfigError(f"model.stages={stages}: the teacher's three stage widths are expected")
  for width in stages:
    common.check_positive(stages=width)
    if not abs(ratio * width) < 2**31:  # NaN too
      raise ConfigError(f"model.ratio={ratio}: a ratio is expected that makes fewer than 2**31 channels of {width}")

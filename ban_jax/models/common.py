"""What the networks share: initialisers, batch norm, dropout by position, and the step from a module to a Model."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.types import InputSpec, Model

# He et al. 2015, as the reference Wide-ResNet in PyTorch has it: normal, by fan-in, for convolutions and classifier.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def norm(*, train: bool, dtype: Any, axis_name: str | None, name: str) -> nn.BatchNorm:
  """Returns batch normalisation with the paper's open settings filled in: momentum 0.9, epsilon 1e-5 (docs/design.md).

  Statistics are float32 and, where `axis_name` is given, those of the whole mini-batch on all devices.
  """
  return nn.BatchNorm(
    use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=dtype, axis_name=axis_name, name=name
  )


def norm_relu(x: Float[Array, "B H W C"], *, train: bool, dtype: Any, axis_name: str | None, name: str) -> Array:
  """Returns the activated input: `norm` and ReLU; called in a compact module, whose submodule `name` it makes."""
  return nn.relu(norm(train=train, dtype=dtype, axis_name=axis_name, name=name)(x))


def conv(width: int, size: int, *, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
  """Returns a `size` x `size` convolution to `width` channels, He-initialised and without bias.

  Padding is size // 2 on all sides, as PyTorch has it, so that H becomes H / stride.
  """
  return nn.Conv(
    width,
    (size, size),
    stride,
    "SAME" if stride == 1 else [(size // 2, size // 2)] * 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=he_normal,
    name=name,
  )


def halve(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
  """Returns the means of 2x2 pixels, as the networks pool between their stages."""
  return nn.avg_pool(x, (2, 2), (2, 2))


class Dropout(nn.Module):
  """Dropout whose mask belongs to an example's place in the global mini-batch.

  One key, the same on all devices, is folded with each example's position, so a run does not depend on how many devices
  share the batch. 16 random bits decide each unit; the rate is rounded to the nearest 1/65536 and the kept units are
  scaled by exactly the rate that was drawn with.
  """

  rate: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B ..."], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B ..."]:
    dropped = round(self.rate * 65536)
    if not train or not dropped:
      return x
    key = self.make_rng("dropout")
    size = x[0].size

    def bits(position):  # half as many 32-bit words as units: threefry is the cost here
      words = jax.random.bits(jax.random.fold_in(key, position), ((size + 1) // 2,), jnp.uint32)
      return jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size]

    keep = jax.vmap(bits)(positions).reshape(x.shape) >= dropped  # [B, ...]
    return jnp.where(keep, x * jnp.asarray(65536 / (65536 - dropped), x.dtype), 0)


def from_image_module(name: str, module: nn.Module, spec: InputSpec) -> Model:
  """Returns the Model behind which `module(images, train=, positions=)` stands; it has no carry."""

  @jax.jit
  def init(key):
    return module.init({"params": key}, jnp.zeros((1, *spec.shape)), train=False, positions=None)

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    run = functools.partial(module.apply, variables, inputs, train=train, positions=positions)
    if not train:
      return run(), carry, variables["batch_stats"]
    logits, updated = run(rngs={"dropout": key}, mutable=["batch_stats"])
    return logits, carry, updated["batch_stats"]

  return Model(name, spec, init, lambda batch: (), apply)


def require_kind(name: str, kind: str, spec: InputSpec) -> None:
  """Raises a ConfigError where the network cannot read the data set's examples."""
  if spec.kind != kind:
    raise ConfigError(f"model {name!r} reads {kind}; the data set holds {spec.kind}")


def check_dropout(rate: float) -> None:
  """Raises a ConfigError unless 0 <= rate < 1, as `Dropout` rounds it."""
  if not 0 <= rate < 1:
    raise ConfigError(f"model.dropout={rate}: a dropout rate lies in [0, 1)")
  if round(rate * 65536) == 65536:
    raise ConfigError(f"model.dropout={rate}: of rates below 1 the largest is 65535 / 65536, since 16 bits are drawn")


def check_positive(**options: Any) -> None:
  """Raises a ConfigError unless every option is a whole number of at least 1."""
  check_at_least(1, **options)


def check_at_least(least: int, **options: Any) -> None:
  """Raises a ConfigError unless every option is a whole number from `least` to 2**31 - 1, an index's largest."""
  for key, value in options.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise ConfigError(f"model.{key}={value}: a whole number of at least {least} is expected")
    if value >= 2**31:
      raise ConfigError(f"model.{key}={value}: a whole number below 2**31 is expected")


def classifier(x: Float[Array, "B C"], num_classes: int, dtype: Any) -> Float[Array, "B n"]:
  """Returns float32 logits; called in a compact module, whose submodule `classifier` it makes."""
  return nn.Dense(num_classes, dtype=dtype, kernel_init=he_normal, name="classifier")(x).astype(jnp.float32)

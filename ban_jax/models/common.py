"""What the networks share: layers, dropout by position, checks of options, and the wrapper from module to Model."""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.types import InputSpec, Model

# He et al. 2015, as the reference Wide-ResNet in PyTorch has it: normal, by fan-in, for convolutions and classifier.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


# Of batch normalisation.
MOMENTUM, EPSILON = 0.9, 1e-5


def norm(
  *,
  train: bool,
  dtype: Any,
  axis_name: str | None,
  name: str,
  scale: nn.initializers.Initializer = nn.initializers.ones,
) -> nn.BatchNorm:
  """Returns batch normalisation with momentum 0.9 and epsilon 1e-5, which the paper does not state (docs/design.md).

  Statistics are float32; with `axis_name` they are those of the global mini-batch. The variance is E[x^2] - E[x]^2,
  which takes one all-reduce where two passes over x would take two. It loses digits where a channel's mean is large:
  4 % at 300 standard deviations, half at 1,000; in networks trained here the ratio stayed below 1.8.
  """
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=MOMENTUM,
    epsilon=EPSILON,
    dtype=dtype,
    scale_init=scale,
    axis_name=axis_name,
    name=name,
  )


def _mean(x: Float[Array, "B ... C"]) -> Float[Array, " C"]:
  return x.astype(jnp.float32).mean(range(x.ndim - 1))


def _mean_square(x: Float[Array, "B ... C"]) -> Float[Array, " C"]:
  return jax.lax.square(x.astype(jnp.float32)).mean(range(x.ndim - 1))


def moments(x: Float[Array, "B ... C"]) -> Float[Array, "2 C"]:
  """Returns mean and mean square of each channel, which `JoinedNorm` takes; on CPUs, where it does not, zeros."""
  return jax.lax.platform_dependent(
    x, cpu=lambda x: jnp.zeros((2, x.shape[-1])), default=lambda x: jnp.stack([_mean(x), _mean_square(x)])
  )


class JoinedNorm(nn.Module):
  """`norm` of joined maps with their joined `moments`: those of a map that many layers read are computed once.

  On CPUs they are computed of the joined maps in every layer, as `norm` does it, so that no byte differs.
  """

  train: bool
  dtype: Any
  axis_name: str | None

  @nn.compact
  def __call__(self, x: Float[Array, "B ... C"], known: Float[Array, "2 C"] | None) -> Float[Array, "B ... C"]:
    shape = x.shape[-1:]
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
    mean, var = running_mean.value, running_var.value
    if self.train:
      assert known is not None
      # One at a time, the square first: so their gradients are added up in `norm`'s order on CPUs.
      square, mean = (
        jax.lax.platform_dependent(x, own, cpu=lambda x, own, of=of: of(x), default=lambda x, own: own)
        for of, own in ((_mean_square, known[1]), (_mean, known[0]))
      )
      if self.axis_name and not self.is_initializing():
        mean, square = jax.lax.pmean(jnp.stack([mean, square]), self.axis_name)
      var = jnp.maximum(0.0, square - jax.lax.square(mean))
      if not self.is_initializing():
        running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
        running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
    scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
    y = (x - mean) * (jax.lax.rsqrt(var + EPSILON) * scale) + bias
    return y.astype(self.dtype)


def norm_relu(x: Float[Array, "B ... C"], *, train: bool, dtype: Any, axis_name: str | None, name: str) -> Array:
  """Returns relu(norm(x)); call it in a compact module, where it creates the submodule `name`."""
  return relu(norm(train=train, dtype=dtype, axis_name=axis_name, name=name)(x))


def relu(x: Float[Array, "B ... C"]) -> Float[Array, "B ... C"]:
  """Returns the input of a convolution, behind a barrier on CPU."""
  x = nn.relu(x)  # XLA would compute it anew inside each strided copy that a convolution needs
  # Chosen where the step is lowered, by the platform it is lowered for, which need not be the process's own.
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def conv(width: int, size: int, *, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
  """Returns a `size` x `size` convolution to `width` channels, He-initialised and without bias.

  Padding is size // 2 on every side, as in PyTorch, so H becomes H / stride. On CPU a 1x1 convolution is computed as a
  matrix product, a quarter faster there (DenseNet-40-12); XLA for GPUs, in JAX 0.10, aborts on a strided one.
  """
  return nn.Conv(
    width,
    (size, size),
    stride,
    "SAME" if stride == 1 else [(size // 2, size // 2)] * 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=he_normal,
    conv_general_dilated=_convolve_1x1 if size == 1 else jax.lax.conv_general_dilated,
    name=name,
  )


def _convolve_1x1(
  x: Float[Array, "B H W C"], kernel: Float[Array, "1 1 C D"], strides, padding, **settings
) -> Float[Array, "B h w D"]:
  """Returns a 1x1 convolution, in the form in which flax calls jax.lax.conv_general_dilated."""

  def product(x, kernel):
    x = x[:, :: strides[0], :: strides[1]]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)

  def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **settings)

  return jax.lax.platform_dependent(x, kernel, cpu=product, default=convolution)


def avg_pool_2x2(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
  """Returns the average over 2x2 windows with stride 2."""
  return nn.avg_pool(x, (2, 2), (2, 2))


def classifier(x: Float[Array, "B C"], num_classes: int, dtype: Any) -> Float[Array, "B n"]:
  """Returns float32 logits; call it in a compact module, where it creates the submodule `classifier`."""
  return nn.Dense(num_classes, dtype=dtype, kernel_init=he_normal, name="classifier")(x).astype(jnp.float32)


# The version of Dropout's draws. A run that was begun with another one is not resumed.
DRAWS = 3


class Dropout(nn.Module):
  """Dropout whose mask depends on an example's position in the global mini-batch.

  All devices draw by the same key and each example's position, so a run does not depend on the number of devices. Each
  unit takes 16 random bits: the rate is rounded to the nearest 1/65536, and the kept units are scaled by the inverse of
  the rounded keep rate.
  """

  rate: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B ..."], *, train: bool, positions: Int[Array, " B"] | None
  ) -> Float[Array, "B ..."]:
    dropped = round(self.rate * 65536)
    if not train or not dropped:
      return x
    assert positions is not None
    # Threefry dominates the cost of dropout, so four units share a call, which gives two words of 32 bits: one of each
    # quarter of the first axis (an image's rows). Neighbours would need an axis of two, which a TPU pads to 128.
    rows = x.shape[1]
    shape = (len(x), -(-rows // 4), *x.shape[2:])
    key = jax.random.bits(self.make_rng("dropout"), (2,), jnp.uint32)  # of a key of any kind
    places = jnp.arange(math.prod(shape[1:]), dtype=jnp.uint32).reshape(1, *shape[1:])
    counters = jnp.broadcast_arrays(positions.astype(jnp.uint32).reshape(-1, *(1,) * (x.ndim - 1)), places)
    words = threefry2x32_p.bind(*key, *counters)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    # One byte holds what becomes of the four, and a TPU's convolution reads it. Where it read a mask of each quarter,
    # XLA cut a convolution of Wide-ResNet-28-10 into tiny pieces (docs/performance.md).
    kept = sum(((half >= dropped).astype(jnp.uint8) << i for i, half in enumerate(halves)), jnp.uint8(0))
    quarter = jnp.repeat(jnp.arange(4, dtype=jnp.uint8), shape[1]).reshape(-1, *(1,) * (x.ndim - 2))
    keep = (jnp.concatenate([kept] * 4, axis=1) >> quarter & 1)[:, :rows] > 0
    return jnp.where(keep, x * jnp.asarray(65536 / (65536 - dropped), x.dtype), 0)


def drop_path(
  x: Float[Array, "B ..."], rate: float, *, train: bool, positions: Int[Array, " B"] | None, name: str
) -> Float[Array, "B ..."]:
  """Leaves out a whole example at the rate, by its position, and scales the others (Huang et al. 2016).

  Call it in a compact module, where it creates the submodule `name`.
  """
  kept = jnp.ones((len(x), *(1,) * (x.ndim - 1)), x.dtype)
  return x * Dropout(rate, name=name)(kept, train=train, positions=positions)


def from_module(name: str, module: nn.Module, spec: InputSpec, *, poolings: int = 0) -> Model:
  """Wraps a Flax module, called as `module(inputs, train=, positions=)`, as a Model without a carry.

  Raises a ConfigError for images of which so many 2x2 `poolings` leave no pixel.
  """
  if poolings and min(spec.shape[:2]) < 2**poolings:
    height, width, _ = spec.shape
    raise ConfigError(
      f"model {name!r} halves images {poolings} times: expected at least {2**poolings}x{2**poolings} pixels, and the "
      f"data set has {height}x{width}"
    )

  @jax.jit
  def init(key):
    return module.init({"params": key}, blank(spec), train=False, positions=None)

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    run = functools.partial(module.apply, variables, inputs, train=train, positions=positions)
    statistics = variables.get("batch_stats", {})
    if not train:
      return run(), carry, statistics
    logits, updated = run(rngs={"dropout": key}, mutable=["batch_stats"])
    return logits, carry, updated.get("batch_stats", statistics)

  return Model(name, spec, init, lambda batch: (), apply)


def blank(spec: InputSpec) -> Array:
  """Returns one example of a data set, all zeros: what a network's variables are made for."""
  return jnp.zeros((1, *spec.shape), jnp.float32 if spec.kind == "images" else jnp.int32)


def require_kind(name: str, kind: str, spec: InputSpec) -> None:
  """Raises a ConfigError unless the data set's examples are of the `kind` that the network reads."""
  if spec.kind != kind:
    raise ConfigError(f"model {name!r} reads {kind}; the data set holds {spec.kind}")


def check_dropout(rate: float, key: str = "dropout") -> None:
  """Raises a ConfigError unless 0 <= rate < 1, also after rounding to 1/65536."""
  if not 0 <= rate < 1:
    raise ConfigError(f"model.{key}={rate}: a dropout rate lies in [0, 1)")
  if round(rate * 65536) == 65536:
    raise ConfigError(f"model.{key}={rate}: the largest dropout rate is 65535 / 65536 (16 random bits per unit)")


def check_cudnn(dtype: Any, computes: Any, devices: Sequence[Any]) -> None:
  """Raises a ConfigError unless cuDNN can compute layers on the devices, NVIDIA GPUs, in the dtype it `computes` in."""
  advice = "choose model.cudnn=False, which runs everywhere"
  for device in devices:
    if device.platform not in ("gpu", "cuda") or "rocm" in device.client.platform_version.lower():
      raise ConfigError(f"model.cudnn=True needs an NVIDIA GPU, and this is {device.device_kind}; {advice}")
  if dtype != computes:
    raise ConfigError(
      f"model.cudnn=True computes in {jnp.dtype(computes).name} only, not in {jnp.dtype(dtype).name}; choose "
      f"compute_dtype {jnp.dtype(computes).name}, or {advice}"
    )


def check_at_least(least: int, **options: Any) -> None:
  """Raises a ConfigError unless every option is an integer of at least `least`."""
  for key, value in options.items():
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      raise ConfigError(f"model.{key}={value}: a whole number of at least {least} is expected")


def check_finite_positive(**options: Any) -> None:
  """Raises a ConfigError unless every option is a finite number above 0."""
  for key, value in options.items():
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
      raise ConfigError(f"model.{key}={value}: a finite number above 0 is expected")


def check_bool(**options: Any) -> None:
  """Raises a ConfigError unless every option is True or False."""
  for key, value in options.items():
    if not isinstance(value, bool):
      raise ConfigError(f"model.{key}={value}: True or False is expected")

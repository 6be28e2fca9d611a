"""What the language models share: LSTM layers whose state is carried from window to window, and the way to a Model."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import rnn
from jaxtyping import Array, Float, Int

from ban_jax.errors import ConfigError
from ban_jax.models import common
from ban_jax.types import InputSpec, Model

# A layer's output and cell at the end of a window, float32 [B, units] each.
State = tuple[Float[Array, "B units"], Float[Array, "B units"]]


def uniform(scale: float) -> nn.initializers.Initializer:
  """Returns an initialiser that draws evenly from [-scale, scale)."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)


def _cell(gates: Float[Array, "B gates"], cell: Float[Array, "B units"]) -> State:
  """Returns output and cell after a step; the gates are input, forget, candidate and output, in cuDNN's order."""
  enter, keep, candidate, leave = jnp.split(gates, 4, axis=-1)  # [B, units] each
  cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
  return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell


@jax.custom_vjp
def recur(
  kernel: Float[Array, "units gates"], projected: Float[Array, "T B gates"], state: State
) -> tuple[Float[Array, "T B units"], State]:
  """Returns an LSTM's outputs and its last state, given what the inputs add to the gates of all steps.

  Products are in `kernel`'s dtype, all else is float32. The gradient is written out for two reasons of speed. That of
  `kernel` is one product over all steps: differentiating the scan would add one up at every step, and read and write
  all of it T times. And the loop multiplies by a kernel that was transposed before it.
  """
  return _recur_forward(kernel, projected, state)[0]


def _recur_forward(kernel, projected, state):
  def step(state, projected):
    hidden, cell = state
    gates = projected.astype(jnp.float32) + (hidden.astype(kernel.dtype) @ kernel).astype(jnp.float32)
    hidden, cell = _cell(gates, cell)
    return (hidden, cell), (hidden.astype(kernel.dtype), cell, gates)

  last, (outputs, cells, gates) = jax.lax.scan(step, state, projected)
  return (outputs, last), (kernel, state, outputs, cells, gates)


def _recur_backward(residuals, gradients):
  kernel, (hidden, cell), outputs, cells, gates = residuals
  output_gradients, last_gradients = gradients
  transposed = kernel.T
  # What each step began with, [T, B, units].
  hiddens = jnp.concatenate([hidden.astype(outputs.dtype)[None], outputs[:-1]])
  cells = jnp.concatenate([cell[None], cells[:-1]])

  def step(state_gradients, now):
    hidden_gradient, cell_gradient = state_gradients
    output_gradient, gates, cell = now
    _, pull_back = jax.vjp(_cell, gates, cell)
    gates_gradient, cell_gradient = pull_back((hidden_gradient + output_gradient.astype(jnp.float32), cell_gradient))
    gates_gradient = gates_gradient.astype(kernel.dtype)
    return ((gates_gradient @ transposed).astype(jnp.float32), cell_gradient), gates_gradient

  state_gradients, gates_gradients = jax.lax.scan(step, last_gradients, (output_gradients, gates, cells), reverse=True)
  kernel_gradient = _rows(hiddens).T @ _rows(gates_gradients)
  return kernel_gradient, gates_gradients, state_gradients


def _rows(x: Float[Array, "... D"]) -> Float[Array, "N D"]:
  """Returns the rows of all leading axes in one: XLA's CPU back end is slow at sums over two axes of a product."""
  return x.reshape(-1, x.shape[-1])


recur.defvjp(_recur_forward, _recur_backward)


def pack_weights(
  input_kernel: Float[Array, "D gates"], recurrent_kernel: Float[Array, "units gates"], bias: Float[Array, " gates"]
) -> Float[Array, " weights"]:
  """Returns a layer's weights in cuDNN's order; of its two biases, which are only ever added, the second is zero."""
  return jnp.concatenate([input_kernel.T.ravel(), recurrent_kernel.T.ravel(), bias, jnp.zeros_like(bias)])


class LSTMLayer(nn.Module):
  """An LSTM layer: one kernel [D, 4 units] for all gates of the input, one [units, 4 units] for the state, one bias.

  With `cudnn` cuDNN computes it from the same parameters.
  """

  units: int
  init_scale: float
  cudnn: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], state: State) -> tuple[Float[Array, "B T units"], State]:
    draw = uniform(self.init_scale)
    input_kernel = self.param("input_kernel", draw, (x.shape[-1], 4 * self.units))
    recurrent_kernel = self.param("recurrent_kernel", draw, (self.units, 4 * self.units))
    bias = self.param("bias", draw, (4 * self.units,))
    if self.cudnn:
      hidden, cell = state
      outputs, hidden, cell = rnn.lstm(
        x,
        hidden[None],
        cell[None],
        pack_weights(input_kernel, recurrent_kernel, bias),
        jnp.full(len(x), x.shape[1], jnp.int32),
        input_size=x.shape[-1],
        hidden_size=self.units,
        num_layers=1,
        dropout=0.0,
        bidirectional=False,
      )
      return outputs, (hidden[0], cell[0])
    x, input_kernel, recurrent_kernel, bias = (
      leaf.astype(self.dtype) for leaf in (x, input_kernel, recurrent_kernel, bias)
    )
    x = jnp.swapaxes(x, 0, 1)  # [T, B, D]
    projected = (_rows(x) @ input_kernel + bias).reshape(*x.shape[:2], -1)  # [T, B, 4 units]
    outputs, state = recur(recurrent_kernel, projected, state)
    return jnp.swapaxes(outputs, 0, 1), state


class LSTMStack(nn.Module):
  """LSTM layers on top of each other, dropout behind each of them."""

  units: int
  layers: int
  dropout: float
  init_scale: float
  cudnn: bool
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], carry: tuple[State, ...], *, train: bool, positions: Int[Array, " B"] | None
  ) -> tuple[Float[Array, "B T units"], tuple[State, ...]]:
    last = []
    for number, state in enumerate(carry, 1):
      layer = LSTMLayer(self.units, self.init_scale, self.cudnn, self.dtype, name=f"layer{number}")
      x, state = layer(x, state)
      x = common.Dropout(self.dropout, name=f"dropout{number}")(x, train=train, positions=positions)
      last.append(state)
    return x, tuple(last)


def from_token_module(
  name: str,
  module: nn.Module,
  spec: InputSpec,
  *,
  units: int,
  layers: int,
  read: Callable[[Int[Array, "B T"]], Array] = lambda inputs: inputs,
) -> Model:
  """Returns the Model behind which `module(read(inputs), carry, train=, positions=)` stands.

  Its carry is a tuple of one State a layer, zeros at a text's beginning. A window's gradient ends at its first token,
  since what came before enters only as the carry.
  """

  def init_carry(batch: int) -> tuple[State, ...]:
    return tuple((jnp.zeros((batch, units)), jnp.zeros((batch, units))) for _ in range(layers))

  @jax.jit
  def init(key):
    # No parameter's shape depends on the window's length.
    inputs = read(jnp.zeros((1, 1), jnp.int32))
    variables = module.init({"params": key}, inputs, init_carry(1), train=False, positions=None)
    return {"params": variables["params"], "batch_stats": {}}

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    logits, carry = module.apply(
      {"params": variables["params"]},
      read(inputs),
      carry,
      train=train,
      positions=positions,
      rngs={"dropout": key} if train else None,
    )
    return logits, carry, {}

  return Model(name, spec, init, init_carry, apply)


def check_options(*, units: int, layers: int, dropout: float, init_scale: float, cudnn: bool, dtype: Any) -> None:
  """Raises a ConfigError for an option out of range, and where cuDNN is asked for and cannot be had."""
  common.check_positive(units=units, layers=layers)
  common.check_dropout(dropout)
  if not isinstance(init_scale, numbers.Real) or not 0 < init_scale < math.inf:
    raise ConfigError(f"model.init_scale={init_scale}: a finite number above 0 is expected")
  float32 = np.finfo(np.float32)
  if not float(float32.tiny) <= 2 * init_scale <= float(float32.max):
    raise ConfigError(f"model.init_scale={init_scale}: the width of the range drawn from, twice it, must fit float32")
  if not isinstance(cudnn, bool):
    raise ConfigError(f"model.cudnn={cudnn}: True or False is expected")
  if cudnn:
    check_cudnn(dtype)


def check_cudnn(dtype: Any) -> None:
  """Raises a ConfigError unless cuDNN can compute an LSTM here: in float32, on an NVIDIA GPU."""
  advice = "choose model.cudnn=False, which runs everywhere"
  device = jax.devices()[0]
  if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
    raise ConfigError(f"model.cudnn=True needs an NVIDIA GPU, and this is {device.device_kind}; {advice}")
  if dtype != jnp.float32:
    raise ConfigError(
      f"model.cudnn=True computes in float32 only, not in {jnp.dtype(dtype).name}; choose compute_dtype float32, "
      f"or {advice}"
    )

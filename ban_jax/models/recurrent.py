"""What the language models share: LSTM layers, a state carried from window to window, the wrapper to a Model."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import rnn
from jaxtyping import Array, Float, Int

from ban_jax.models import common
from ban_jax.types import InputSpec, Model

# A layer's hidden state and cell at the end of a window, float32 [B, units] each.
State = tuple[Float[Array, "B units"], Float[Array, "B units"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackOptions:
  """Options of the LSTM layers, which all language models have; raises a ConfigError for a value out of range."""

  units: int  # hidden units of a layer
  layers: int
  dropout: float  # rate after each layer, in [0, 1)
  init_scale: float  # parameters, biases included, are initialised uniformly in [-init_scale, init_scale)
  cudnn: bool  # compute the layers with cuDNN, from the same parameters: float32 on NVIDIA GPUs only
  cudnn_dtype: ClassVar[Any] = jnp.float32

  def __post_init__(self):
    common.check_at_least(1, units=self.units, layers=self.layers)
    common.check_dropout(self.dropout)
    common.check_finite_positive(init_scale=self.init_scale)
    common.check_bool(cudnn=self.cudnn)


def uniform(scale: float) -> nn.initializers.Initializer:
  """Returns an initialiser that samples uniformly from [-scale, scale)."""
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -scale, scale)


def _cell(gates: Float[Array, "B gates"], cell: Float[Array, "B units"]) -> State:
  """Returns hidden state and cell after a step; the gates are in cuDNN's order: input, forget, candidate, output."""
  i, f, g, o = jnp.split(gates, 4, axis=-1)  # [B, units] each
  cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
  return jax.nn.sigmoid(o) * jnp.tanh(cell), cell


@jax.custom_vjp
def recur(
  kernel: Float[Array, "units gates"], projected: Float[Array, "T B gates"], state: State
) -> tuple[Float[Array, "T B units"], State]:
  """Returns an LSTM's outputs and final state; `projected` is the inputs' contribution to the gates of all steps.

  Matrix products are in `kernel`'s dtype, everything else in float32. The gradient is written by hand for speed: the
  kernel's gradient is one product over all steps, where differentiating the scan would accumulate it in every step, and
  the kernel is transposed once, before the loop.
  """
  return _recur_forward(kernel, projected, state)[0]


def _recur_forward(kernel, projected, state):
  def step(state, projected):
    hidden, cell = state
    gates = projected.astype(jnp.float32) + (hidden.astype(kernel.dtype) @ kernel).astype(jnp.float32)
    hidden, cell = _cell(gates, cell)
    return (hidden, cell), (hidden.astype(kernel.dtype), cell, gates)

  final, (outputs, cells, gates) = jax.lax.scan(step, state, projected)
  return (outputs, final), (kernel, state, outputs, cells, gates)


def _recur_backward(residuals, gradients):
  kernel, (hidden, cell), outputs, cells, gates = residuals
  output_gradients, final_gradients = gradients
  transposed = kernel.T
  # The state before each step, [T, B, units].
  hiddens = jnp.concatenate([hidden.astype(outputs.dtype)[None], outputs[:-1]])
  cells = jnp.concatenate([cell[None], cells[:-1]])

  def step(state_gradients, inputs):
    hidden_gradient, cell_gradient = state_gradients
    output_gradient, gates, cell = inputs
    _, cell_vjp = jax.vjp(_cell, gates, cell)
    gates_gradient, cell_gradient = cell_vjp((hidden_gradient + output_gradient.astype(jnp.float32), cell_gradient))
    gates_gradient = gates_gradient.astype(kernel.dtype)
    return ((gates_gradient @ transposed).astype(jnp.float32), cell_gradient), gates_gradient

  state_gradients, gates_gradients = jax.lax.scan(step, final_gradients, (output_gradients, gates, cells), reverse=True)
  kernel_gradient = _rows(hiddens).T @ _rows(gates_gradients)
  return kernel_gradient, gates_gradients, state_gradients


def _rows(x: Float[Array, "... D"]) -> Float[Array, "N D"]:
  """Merges all leading axes: XLA's CPU back end is slow at products that contract two axes."""
  return x.reshape(-1, x.shape[-1])


recur.defvjp(_recur_forward, _recur_backward)


def pack_weights(
  input_kernel: Float[Array, "D gates"], recurrent_kernel: Float[Array, "units gates"], bias: Float[Array, " gates"]
) -> Float[Array, " weights"]:
  """Returns a layer's weights in cuDNN's order; cuDNN adds two biases, and the second is zero here."""
  return jnp.concatenate([input_kernel.T.ravel(), recurrent_kernel.T.ravel(), bias, jnp.zeros_like(bias)])


class LSTMLayer(nn.Module):
  """An LSTM layer: an input kernel [D, 4 units], a recurrent kernel [units, 4 units] and one bias [4 units]."""

  options: StackOptions
  dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], state: State) -> tuple[Float[Array, "B T units"], State]:
    units, init = self.options.units, uniform(self.options.init_scale)
    input_kernel = self.param("input_kernel", init, (x.shape[-1], 4 * units))
    recurrent_kernel = self.param("recurrent_kernel", init, (units, 4 * units))
    bias = self.param("bias", init, (4 * units,))
    if self.options.cudnn:
      hidden, cell = state
      outputs, hidden, cell = rnn.lstm(
        x,
        hidden[None],
        cell[None],
        pack_weights(input_kernel, recurrent_kernel, bias),
        jnp.full(len(x), x.shape[1], jnp.int32),
        input_size=x.shape[-1],
        hidden_size=units,
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
  """Stacked LSTM layers with dropout after each."""

  options: StackOptions
  dtype: Any

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], carry: tuple[State, ...], *, train: bool, positions: Int[Array, " B"] | None
  ) -> tuple[Float[Array, "B T units"], tuple[State, ...]]:
    final = []
    for number, state in enumerate(carry, 1):
      x, state = LSTMLayer(self.options, self.dtype, name=f"layer{number}")(x, state)
      x = common.Dropout(self.options.dropout, name=f"dropout{number}")(x, train=train, positions=positions)
      final.append(state)
    return x, tuple(final)


def from_token_module(
  name: str,
  module: nn.Module,
  spec: InputSpec,
  options: StackOptions,
  *,
  read: Callable[[Int[Array, "B T"]], Array] = lambda inputs: inputs,
) -> Model:
  """Wraps a Flax module, called as `module(read(inputs), carry, train=, positions=)`, as a Model.

  The carry is a tuple of one State per layer, zeros at the beginning of a text. Gradients stop at the first token of a
  window, because earlier windows enter only through the carry.
  """

  def init_carry(batch: int) -> tuple[State, ...]:
    shape = (batch, options.units)
    return tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(options.layers))

  @jax.jit
  def init(key):
    # No parameter's shape depends on the window's length, so a single token is enough.
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

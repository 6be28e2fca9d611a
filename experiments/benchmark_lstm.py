"""Tokens per second of the LSTM's training step, and of the same work with PyTorch's nn.LSTM on the same processor.

    pip install -e '.[benchmark]'
    python experiments/benchmark_lstm.py                        2x200 and 2x650 units, batch 20, windows of 35 tokens
    python experiments/benchmark_lstm.py --units=200 --batch=32
    taskset -c 0 python experiments/benchmark_lstm.py --processor_time    on a busy machine

Both sides: embedding, dropout, LSTM layers each followed by dropout, an output that shares the embedding, cross-entropy
with the label, gradient, clipping by the global norm, SGD, float32, state carried from window to window. Our side is
the training step itself, on one device and on --devices; it also counts errors and checks for finite values. The sides
take turns, and each ratio is of two neighboring turns. Tokens are random, since the work does not depend on them.
"""

import importlib.util
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from ban_jax import config, losses, models, optim, step
from ban_jax import devices as devices_lib
from ban_jax.data.text import make_fetch
from ban_jax.errors import ConfigError
from ban_jax.teacher import none
from ban_jax.types import Devices, InputSpec
from configs import base
from experiments import cli, results

UNITS = flags.DEFINE_multi_integer(
  "units", [200, 650], "Units of the LSTM layers; repeat it for several sizes.", lower_bound=1
)
LAYERS = flags.DEFINE_integer("layers", 2, "LSTM layers.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 20, "Windows in a mini-batch.", lower_bound=1)
WINDOW = flags.DEFINE_integer("window", 35, "Tokens in a window.", lower_bound=1)
WORDS = flags.DEFINE_integer("words", 10_000, "Words in the vocabulary.", lower_bound=2)
DROPOUT = flags.DEFINE_float("dropout", 0.5, "Dropout rate.", lower_bound=0.0, upper_bound=0.9)
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each side.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 6, "Steps in a turn.", lower_bound=1)
PROCESSOR_TIME = flags.DEFINE_bool("processor_time", False, "Measure processor time, with one thread on each side.")

CLIP, RATE, SCALE = 0.25, 1.0, 0.05
Turn = Callable[[], None]


def tokens() -> np.ndarray:
  """Returns random int32 tokens for a turn, in which every step reads new windows."""
  size = BATCH.value * WINDOW.value * STEPS.value + 1
  return np.random.default_rng(0).integers(0, WORDS.value, size).astype(np.int32)


def ours(units: int, devices: Devices) -> Turn:
  """Returns a function that runs `STEPS` of our training steps on these devices and waits for the last."""
  group = {"name": "lstm", "units": units, "layers": LAYERS.value, "dropout": DROPOUT.value, "init_scale": SCALE}
  model = models.make_model(group | {"cudnn": False}, InputSpec("tokens", (WINDOW.value,), WORDS.value))
  cfg = base.get_config()
  plain = {"learning_rate": RATE, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "boundaries": ()}
  optimizer = optim.make_optimizer(cfg.optim.to_dict() | plain | {"clip_norm": CLIP}, 1)
  train_step = step.make_train_step(
    student=model,
    teaching=none(),
    frozen=(),
    loss=losses.make_loss({"name": "label"}),
    optimizer=optimizer,
    fetch=make_fetch(WINDOW.value),
    devices=devices,
    sync_batch_stats=True,
    gradient_split=False,
  )
  state = jax.device_get(step.initial_state(model, optimizer, jax.random.key(0), {}))
  state = devices_lib.replicate(state, devices)
  carry = devices_lib.split_rows((model.init_carry(BATCH.value), ()), devices)
  arrays = devices_lib.broadcast({"tokens": tokens()}, devices)
  key_data = devices_lib.broadcast(jax.random.key_data(jax.random.key(1, impl="threefry2x32")), devices)
  order = np.arange(BATCH.value * STEPS.value, dtype=np.int32).reshape(BATCH.value, STEPS.value).T

  def turn() -> None:
    nonlocal state, carry
    for index in order:
      batches = devices_lib.split_batches(index[None], devices)
      state, carry, sums = train_step.run(state, (), carry, arrays, batches, key_data)
      devices_lib.unreplicate(sums)
    jax.block_until_ready(state)

  return turn


def theirs(units: int, torch: Any) -> Turn:
  """Returns a function that runs `STEPS` training steps in PyTorch."""
  nn = torch.nn
  embedding = nn.Embedding(WORDS.value, units)
  lstm = nn.LSTM(units, units, LAYERS.value, dropout=DROPOUT.value if LAYERS.value > 1 else 0.0)
  output = nn.Linear(units, WORDS.value)
  output.weight = embedding.weight
  drop, criterion = nn.Dropout(DROPOUT.value), nn.CrossEntropyLoss()
  parameters = list(nn.ModuleList([embedding, lstm, output]).parameters())
  for parameter in parameters:
    nn.init.uniform_(parameter, -SCALE, SCALE)
  optimizer = torch.optim.SGD(parameters, lr=RATE)
  stream = torch.from_numpy(tokens().astype(np.int64))
  rows = stream[:-1].reshape(BATCH.value, -1), stream[1:].reshape(BATCH.value, -1)
  # Time first, which is nn.LSTM's own layout.
  inputs, labels = (part.T.reshape(STEPS.value, WINDOW.value, BATCH.value).contiguous() for part in rows)
  state = tuple(torch.zeros(LAYERS.value, BATCH.value, units) for _ in range(2))

  def turn() -> None:
    nonlocal state
    for number in range(STEPS.value):
      optimizer.zero_grad(set_to_none=True)
      hidden, state = lstm(drop(embedding(inputs[number])), tuple(part.detach() for part in state))
      loss = criterion(output(drop(hidden)).flatten(0, 1), labels[number].flatten())
      loss.backward()
      nn.utils.clip_grad_norm_(parameters, CLIP)
      optimizer.step()
      loss.item()

  return turn


def measure(turns: dict[str, Turn]) -> dict[str, list[float]]:
  """Returns each side's tokens per second in every round, after a turn that compiles and warms up."""
  for turn in turns.values():
    turn()
  clock = time.process_time if PROCESSOR_TIME.value else time.perf_counter
  rates = {name: [] for name in turns}
  for _ in range(ROUNDS.value):
    for name, turn in turns.items():
      start = clock()
      turn()
      rates[name].append(BATCH.value * WINDOW.value * STEPS.value / (clock() - start))
  return rates


def row(units: int, rates: dict[str, list[float]]) -> list[str]:
  """Returns a row of the table: median rates, and the median ratio of our best layout with its range over rounds."""
  medians = {name: statistics.median(values) for name, values in rates.items()}
  *layouts, torch = rates
  best = max(layouts, key=medians.get)
  ratios = [mine / other for mine, other in zip(rates[best], rates[torch], strict=True)]
  ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {best}"
  return [f"{LAYERS.value}x{units}", *(f"{medians[name]:,.0f}" for name in rates), ratio]


def processor() -> str:
  """Returns the processor's name, or its architecture if the system does not give the name."""
  information = pathlib.Path("/proc/cpuinfo")
  lines = information.read_text().splitlines() if information.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def main() -> None:
  """Measures and prints the table."""
  if importlib.util.find_spec("torch") is None:
    raise ConfigError("this benchmark needs PyTorch to compare with: pip install -e '.[benchmark]'")
  import torch

  devices = cli.start_jax()
  if devices[0].platform != "cpu":
    raise ConfigError(f"this benchmark needs a CPU, not {devices[0].device_kind}: set JAX_PLATFORMS=cpu")
  if PROCESSOR_TIME.value and devices_lib.cores() > 1:
    raise ConfigError("--processor_time needs a single core: taskset -c 0 python ...")
  layouts = [devices[:count] for count in sorted({1, len(devices)})]
  for layout in layouts:
    config.check_batch_size(BATCH.value, layout)
  torch.set_num_threads(devices_lib.cores())
  names = [f"ours, {len(layout)} device{'s' if len(layout) > 1 else ''}" for layout in layouts]
  second = "second of processor time" if PROCESSOR_TIME.value else "second"
  print(
    f"Training step, batch {BATCH.value}, {WINDOW.value} tokens a window, {WORDS.value:,} words, float32: tokens a\n"
    f"{second}, medians of {ROUNDS.value} rounds of {STEPS.value} steps. {processor()}, cores: {devices_lib.cores()};\n"
    f"PyTorch {torch.__version__} threads: {torch.get_num_threads()}; JAX {jax.__version__}.\n"
  )
  rows = [["LSTM", *names, "PyTorch", "ours / PyTorch (range), best layout"]]
  for units in UNITS.value:
    turns = {name: ours(units, layout) for name, layout in zip(names, layouts, strict=True)}
    rows.append(row(units, measure(turns | {"PyTorch": theirs(units, torch)})))
  print(results.markdown(rows))


if __name__ == "__main__":
  cli.run(main)

"""PyTorch equivalents of the networks and steps that experiments/bench.py measures. Needs PyTorch (extra `benchmark`).

Layers have the names that they have in ban_jax.models, so that parameters can be carried over. A network is called as
`network(inputs, state)` and returns (logits, state); images have the state (). Text is time first, as nn.LSTM has it.
What is left out favors PyTorch: its mini-batches lie ready on the device, where ours are cut, cropped and flipped in
the step; it counts no errors, bins or Brier scores and looks for no number that is not finite; and it keeps the maps
that ours recompute in the large DenseNets to save memory.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from ml_collections import ConfigDict
from torch import nn
from torch.nn import functional

from ban_jax.errors import ConfigError, look_up
from ban_jax.models.char_cnn_lstm import GATE_BIAS, PADDING, CharCNNLSTMOptions, character_table
from ban_jax.models.densenet import STAGES, DenseNetOptions
from ban_jax.models.lstm import LSTMOptions
from ban_jax.models.recurrent import StackOptions
from ban_jax.models.wide_resnet import WideResNetOptions
from ban_jax.types import InputSpec, Model
from experiments.analysis.memory import trained_sizes

Run = Callable[[int], None]
# Mini-batches that the steps go through again and again.
BATCHES = 4


class NormReLU(nn.BatchNorm2d):
  """Batch normalisation and ReLU."""

  def forward(self, x):
    return functional.relu(super().forward(x))


def conv(inputs: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
  """Returns a convolution without bias whose output is `stride` times smaller."""
  return nn.Conv2d(inputs, width, size, stride, size // 2, bias=False)


class WideBlock(nn.Module):
  """Pre-activation block; the shortcut is the input, or a 1x1 convolution of the activated input."""

  def __init__(self, inputs: int, width: int, stride: int, dropout: float):
    super().__init__()
    self.norm1, self.conv1 = NormReLU(inputs), conv(inputs, width, 3, stride)
    self.norm2, self.conv2 = NormReLU(width), conv(width, width, 3)
    self.shortcut = None if inputs == width else conv(inputs, width, 1, stride)
    self.dropout = nn.Dropout(dropout)

  def forward(self, x):
    y = self.norm1(x)
    shortcut = x if self.shortcut is None else self.shortcut(y)
    return shortcut + self.conv2(self.dropout(self.norm2(self.conv1(y))))


class ImageNetwork(nn.Module):
  """A stem, the layers in between, and BN-ReLU, global average pooling and a classifier."""

  def __init__(self, spec: InputSpec, stem: int, width: int):
    super().__init__()
    self.stem, self.norm = conv(spec.shape[-1], stem, 3), NormReLU(width)
    self.classifier = nn.Linear(width, spec.num_classes)

  def features(self, x):
    raise NotImplementedError

  def forward(self, x, state=()):
    return self.classifier(self.norm(self.features(self.stem(x))).mean((2, 3))), state


class WideResNet(ImageNetwork):
  """Wide-ResNet-depth-width."""

  def __init__(self, spec: InputSpec, options: WideResNetOptions):
    super().__init__(spec, 16, 64 * options.width)
    width = 16
    for stage, unit in itertools.product(range(3), range((options.depth - 4) // 6)):
      inputs, width = width, 16 * 2**stage * options.width
      block = WideBlock(inputs, width, 2 if stage and not unit else 1, options.dropout)
      self.add_module(f"stage{stage + 1}_unit{unit + 1}", block)

  def features(self, x):
    for name, block in self.named_children():
      x = block(x) if name.startswith("stage") else x
    return x


class DenseUnit(nn.Module):
  """BN-ReLU-1x1 conv to four times the growth, BN-ReLU-3x3 conv to the growth."""

  def __init__(self, inputs: int, growth: int):
    super().__init__()
    self.norm1, self.conv1 = NormReLU(inputs), conv(inputs, 4 * growth, 1)
    self.norm2, self.conv2 = NormReLU(4 * growth), conv(4 * growth, growth, 3)

  def forward(self, x):
    return self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Transition(nn.Module):
  """BN-ReLU-1x1 conv to fewer channels."""

  def __init__(self, inputs: int, width: int):
    super().__init__()
    self.norm, self.conv = NormReLU(inputs), conv(inputs, width, 1)

  def forward(self, x):
    return self.conv(self.norm(x))


class DenseNet(ImageNetwork):
  """DenseNet-BC with a transition after each of its three stages."""

  def __init__(self, spec: InputSpec, options: DenseNetOptions):
    layers, width = {}, options.stem
    for stage, growth in enumerate(options.growths, 1):
      for unit in range(1, options.units + 1):
        layers[f"stage{stage}_unit{unit}"] = width, growth
        width += growth
      inputs, width = width, int(round(width * options.compression, 6))
      layers[f"transition{stage}"] = inputs, width
    super().__init__(spec, options.stem, width)
    for name, sizes in layers.items():
      self.add_module(name, (Transition if name.startswith("transition") else DenseUnit)(*sizes))

  def features(self, x):
    for name, layer in self.named_children():
      if name.startswith("stage"):
        x = torch.cat([x, layer(x)], 1)
      elif name.startswith("transition"):
        x = layer(x)
        x = x if name.endswith(str(STAGES)) else functional.avg_pool2d(x, 2)
    return x


class Stack(nn.Module):
  """LSTM layers with dropout after each. Of nn.LSTM's two biases, the second is zero and not trained, as ours."""

  def __init__(self, inputs: int, options: StackOptions):
    super().__init__()
    between = options.dropout if options.layers > 1 else 0.0
    self.layers = nn.LSTM(inputs, options.units, options.layers, dropout=between)
    self.dropout = nn.Dropout(options.dropout)
    for name, parameter in self.layers.named_parameters():
      parameter.requires_grad_(not name.startswith("bias_hh"))

  def forward(self, x, state):
    x, state = self.layers(x, state)
    return self.dropout(x), state


class TiedLSTM(nn.Module):
  """Embedding, dropout, LSTM layers, and the embedding matrix again as the output's."""

  def __init__(self, spec: InputSpec, options: LSTMOptions):
    super().__init__()
    self.embedding, self.bias = (
      nn.Embedding(spec.num_classes, options.units),
      nn.Parameter(torch.empty(spec.num_classes)),
    )
    self.dropout, self.lstm = nn.Dropout(options.dropout), Stack(options.units, options)
    _uniform(self, options.init_scale)

  def forward(self, inputs, state):  # [T, B]
    x, state = self.lstm(self.dropout(self.embedding(inputs)), state)
    return functional.linear(x, self.embedding.weight, self.bias), state


class CharacterCNN(nn.Module):
  """A word's vector: convolutions over its characters, the maximum over the positions within the word, tanh."""

  def __init__(self, options: CharCNNLSTMOptions, characters: int):
    super().__init__()
    self.embedding = nn.Embedding(characters, options.char_embedding, padding_idx=PADDING)
    for width, filters in enumerate(options.filters, 1):
      self.add_module(f"width{width}", nn.Conv1d(options.char_embedding, filters, width, bias=False))
    self.widths = len(options.filters)
    self.bias = nn.Parameter(torch.empty(sum(options.filters)))

  def forward(self, characters):  # [N, L]
    length = (characters != PADDING).sum(1, keepdim=True)  # [N, 1]
    x = self.embedding(characters).transpose(1, 2)  # [N, E, L]
    found = []
    for width in range(1, self.widths + 1):
      values = getattr(self, f"width{width}")(x)  # [N, filters, starts]
      beyond = torch.arange(values.shape[2], device=x.device) > (length - width).clamp(min=0)  # [N, starts]
      found.append(values.masked_fill(beyond[:, None], -torch.inf).amax(2))
    return torch.tanh(torch.cat(found, 1) + self.bias)


class Highway(nn.Module):
  """A gate mixes the input with the output of a ReLU layer."""

  def __init__(self, width: int):
    super().__init__()
    self.gate, self.transform = nn.Linear(width, width), nn.Linear(width, width)

  def forward(self, x):
    gate = torch.sigmoid(self.gate(x))
    return gate * functional.relu(self.transform(x)) + (1 - gate) * x


class CharCNNLSTM(nn.Module):
  """A character CNN per word, highway layers, LSTM layers and a classifier."""

  def __init__(self, spec: InputSpec, options: CharCNNLSTMOptions):
    super().__init__()
    table, characters = character_table(spec.words, options.max_word_length, options.max_width)
    self.register_buffer("table", torch.from_numpy(table).long())
    width = sum(options.filters)
    self.cnn = CharacterCNN(options, characters)
    self.highways = [f"highway{number}" for number in range(1, options.highway_layers + 1)]
    for name in self.highways:
      self.add_module(name, Highway(width))
    self.lstm, self.classifier = Stack(width, options), nn.Linear(options.units, spec.num_classes)
    _uniform(self, options.init_scale)
    for name in self.highways:
      nn.init.constant_(getattr(self, name).gate.bias, GATE_BIAS)

  def forward(self, inputs, state):  # [T, B]
    x = self.cnn(self.table[inputs].flatten(0, 1)).unflatten(0, inputs.shape)
    for name in self.highways:
      x = getattr(self, name)(x)
    x, state = self.lstm(x, state)
    return self.classifier(x), state


def _uniform(network: nn.Module, scale: float) -> None:
  """Initialises the trained parameters of a language model uniformly, and the others with zeros."""
  for parameter in network.parameters():
    nn.init.uniform_(parameter, -scale, scale) if parameter.requires_grad else nn.init.zeros_(parameter)


# By the name of a configuration's `model` group: the options' type, and the network.
NETWORKS = {
  "wide_resnet": (WideResNetOptions, WideResNet),
  "densenet": (DenseNetOptions, DenseNet),
  "lstm": (LSTMOptions, TiedLSTM),
  "char_cnn_lstm": (CharCNNLSTMOptions, CharCNNLSTM),
}


def make(group: ConfigDict, ours: Model) -> nn.Module:
  """Returns the equivalent of `ours`; raises a ConfigError where it has another number of parameters."""
  values = {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
  options, network = look_up(NETWORKS, values.pop("name"), "network in PyTorch")
  made = network(ours.spec, options(**values))
  counts = sum(trained_sizes(ours).values()), sum(p.numel() for p in made.parameters() if p.requires_grad)
  if counts[0] != counts[1]:
    raise ConfigError(f"{ours.name} has {counts[0]:,} parameters, and its equivalent in PyTorch {counts[1]:,}")
  return made


class Side(NamedTuple):
  """What is run in PyTorch: a configuration, our network for it, and where and how its equivalent runs."""

  cfg: ConfigDict
  ours: Model
  device: str
  compiled: bool = False

  @property
  def reads_images(self) -> bool:
    return self.ours.spec.kind == "images"

  def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields random mini-batches on the device, the same few again and again."""
    rows, classes = self.cfg.train.batch_size, self.ours.spec.num_classes
    if self.reads_images:
      height, width, channels = self.ours.spec.shape
      made = [(torch.randn(rows, channels, height, width), torch.randint(classes, (rows,))) for _ in range(BATCHES)]
      made = [(images.to(memory_format=torch.channels_last), labels) for images, labels in made]
    else:
      shape = (*self.ours.spec.shape, rows)
      made = [(torch.randint(classes, shape), torch.randint(classes, shape)) for _ in range(BATCHES)]
    return itertools.cycle([tuple(part.to(self.device) for part in batch) for batch in made])

  def network(self, *, trains: bool) -> tuple[nn.Module, Callable[..., Any]]:
    """Returns a new network, and the function that runs it: itself, or what torch.compile makes of it."""
    network = make(self.cfg.model, self.ours).to(self.device).train(trains)
    if self.reads_images:
      network = network.to(memory_format=torch.channels_last)
    return network, torch.compile(network) if self.compiled else network

  def zero_state(self) -> tuple[torch.Tensor, ...]:
    if self.reads_images:
      return ()
    shape = (self.cfg.model.layers, self.cfg.train.batch_size, self.cfg.model.units)
    return tuple(torch.zeros(shape, device=self.device) for _ in range(2))

  def precision(self) -> contextlib.AbstractContextManager:
    if self.cfg.compute_dtype == "float32":
      return contextlib.nullcontext()
    return torch.autocast(self.device, getattr(torch, self.cfg.compute_dtype))

  def wait(self) -> None:
    if self.device == "cuda":
      torch.cuda.synchronize()


def training(side: Side, *, taught: bool = False, recorded: bool = False) -> Run:
  """Returns a function that runs training steps, from labels or, `taught`, by the configuration's loss.

  The teacher is a network, or `recorded`: its logits then lie on the device.
  """
  network, forward = side.network(trains=True)
  optim, loss = side.cfg.optim, side.cfg.loss
  label_weight, teacher_weight = 1.0, 0.0
  if taught:
    weights = {"ban": (0.0, 1.0), "ban_label": (loss.label_weight, loss.teacher_weight)}
    label_weight, teacher_weight = look_up(weights, loss.name, "loss in PyTorch")
  _, teach = side.network(trains=False) if taught and not recorded else (None, None)
  record = torch.randn(side.cfg.train.batch_size, side.ours.spec.num_classes, device=side.device)
  parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
  sgd = torch.optim.SGD(parameters, optim.learning_rate, optim.momentum, weight_decay=optim.weight_decay,
                        nesterov=optim.nesterov)  # fmt: skip
  state, teacher_state, batches = side.zero_state(), side.zero_state(), side.batches()

  def one(inputs, labels) -> None:
    nonlocal state, teacher_state
    sgd.zero_grad(set_to_none=True)
    with side.precision():
      targets = record
      if teach is not None:
        with torch.no_grad():
          targets, teacher_state = teach(inputs, teacher_state)
      logits, state = forward(inputs, tuple(part.detach() for part in state))
    logits, total = logits.flatten(0, -2).float(), 0.0
    if label_weight:
      total = total + label_weight * functional.cross_entropy(logits, labels.flatten())
    if taught:
      targets = functional.softmax(targets.flatten(0, -2).float(), -1)
      total = total + teacher_weight * functional.cross_entropy(logits, targets)
    total.backward()
    if optim.clip_norm:
      nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
    sgd.step()

  def run(steps: int) -> None:
    for inputs, labels in itertools.islice(batches, steps):
      one(inputs, labels)
    side.wait()

  return run


def evaluation(side: Side) -> Run:
  """Returns a function that runs evaluation steps: the sums of the negative log-likelihoods and of the errors."""
  _, forward = side.network(trains=False)
  state, batches = side.zero_state(), side.batches()

  def run(steps: int) -> None:
    nonlocal state
    for inputs, labels in itertools.islice(batches, steps):
      with torch.no_grad(), side.precision():
        logits, state = forward(inputs, state)
        logits, labels = logits.flatten(0, -2).float(), labels.flatten()
        sums = functional.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) != labels).sum()
      _ = [part.item() for part in sums]

  return run


# By kind of step; a kind that is missing here is measured without a comparison.
KINDS = {
  "supervised": training,
  "distilled": functools.partial(training, taught=True),
  "replayed": functools.partial(training, taught=True, recorded=True),
  "evaluation": evaluation,
}


def run_of(kind: str, cfg: ConfigDict, ours: Model, *, device: str, compiled: bool = False) -> Run:
  """Returns a function that runs steps of a kind in PyTorch and waits for the last."""
  return KINDS[kind](Side(cfg, ours, device, compiled))


def start(threads: int) -> None:
  """Sets the threads of a CPU, and on GPUs what JAX does by default: TF32 products, and the fastest convolution."""
  torch.set_num_threads(threads)
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
  torch.backends.cudnn.benchmark = True

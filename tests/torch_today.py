"""ResNet, ViT and GPT in PyTorch, from its own layers: what tests/test_networks.py compares ours with."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ban_jax import trees

# In PyTorch 2.14, on a processor without AVX-512, oneDNN wrote past the gradient of a strided 1x1 kernel of 4 channels.
torch._C._set_mkldnn_enabled(False)
NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
# Of our blocks' layers, in PyTorch's transformer.
LAYERS = {"attention": "self_attn.out_proj", "mlp_in": "linear1", "mlp_out": "linear2"}


class ResNetBlock(nn.Module):
  def __init__(self, inputs, width, stride, bottleneck, projection):
    super().__init__()
    outputs = 4 * width if bottleneck else width
    basic = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
    layers = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)] if bottleneck else basic
    self.count, self.stride, self.missing = len(layers), stride, outputs - inputs
    for number, (before, after, size, step) in enumerate(layers, 1):
      self.add_module(f"conv{number}", nn.Conv2d(before, after, size, step, size // 2, bias=False))
      self.add_module(f"norm{number}", nn.BatchNorm2d(after))
    if projection and (stride, inputs) != (1, outputs):
      self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
      self.shortcut_norm = nn.BatchNorm2d(outputs)

  def forward(self, x):
    y = x
    for number in range(1, self.count + 1):
      y = getattr(self, f"norm{number}")(getattr(self, f"conv{number}")(y))
      y = functional.relu(y) if number < self.count else y
    if hasattr(self, "shortcut"):
      x = self.shortcut_norm(self.shortcut(x))
    elif self.missing or self.stride > 1:
      x = functional.pad(functional.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, 0, self.missing))
    return functional.relu(x + y)


class PreactivatedBlock(nn.Module):
  def __init__(self, inputs, width, stride):
    super().__init__()
    self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
    self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
    if (stride, inputs) != (1, width):
      self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

  def forward(self, x):
    activated = functional.relu(self.norm1(x))
    y = self.conv2(functional.relu(self.norm2(self.conv1(activated))))
    return y + (self.shortcut(activated) if hasattr(self, "shortcut") else x)


class ResNet(nn.Module):
  def __init__(self, spec, options):
    super().__init__()
    channels = options.width
    self.large = spec.shape[0] > 64
    self.stem = (
      nn.Conv2d(3, channels, 7, 2, 3, bias=False) if self.large else nn.Conv2d(3, channels, 3, 1, 1, bias=False)
    )
    self.norm = nn.BatchNorm2d(channels)
    for stage, blocks in enumerate(options.blocks):
      for unit in range(blocks):
        width, stride = options.width * 2**stage, 2 if stage and not unit else 1
        if options.preactivation:
          block = PreactivatedBlock(channels, width, stride)
        else:
          block = ResNetBlock(channels, width, stride, options.bottleneck, options.projection)
        self.add_module(f"stage{stage + 1}_unit{unit + 1}", block)
        channels = 4 * width if options.bottleneck else width
    self.classifier = nn.Linear(channels, spec.num_classes)

  def forward(self, x):  # [B, H, W, C]
    x = functional.relu(self.norm(self.stem(x.permute(0, 3, 1, 2))))
    x = functional.max_pool2d(x, 3, 2, 1) if self.large else x
    for name, block in self.named_children():
      x = block(x) if name.startswith("stage") else x
    return self.classifier(x.mean((2, 3)))


class RotaryLayer(nn.TransformerEncoderLayer):
  """A layer whose queries and keys are complex numbers, turned by their places."""

  def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):
    attention = self.self_attn
    batch, time, width = x.shape
    parts = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = parts.view(batch, time, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, T, channels]
    half = q.shape[-1] // 2
    angles = torch.outer(torch.arange(time), 10_000 ** (-torch.arange(half) / half))
    turn = torch.polar(torch.ones_like(angles), angles)
    q, k = (torch.complex(y[..., :half].contiguous(), y[..., half:].contiguous()) * turn for y in (q, k))
    q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return attention.out_proj(y.transpose(1, 2).reshape(batch, time, width))


def stack(options, layer=nn.TransformerEncoderLayer, **kind):
  """Returns PyTorch's own pre-norm transformer."""
  kind |= {"dropout": 0.0, "batch_first": True, "norm_first": True}
  one = layer(options.width, options.heads, 4 * options.width, **kind)
  norm = nn.LayerNorm(options.width, eps=kind["layer_norm_eps"])
  return nn.TransformerEncoder(one, options.layers, norm=norm, enable_nested_tensor=False)


class ViT(nn.Module):
  def __init__(self, spec, options):
    super().__init__()
    height, width, channels = spec.shape
    self.patches = nn.Conv2d(channels, options.width, options.patch, options.patch)
    self.token = nn.Parameter(torch.empty(1, 1, options.width))
    count = height * width // options.patch**2
    self.positions = nn.Parameter(torch.empty(1, count + 1, options.width))
    self.stack = stack(options, activation="gelu", layer_norm_eps=1e-6)
    self.classifier = nn.Linear(options.width, spec.num_classes)

  def forward(self, x):  # [B, H, W, C]
    x = self.patches(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
    return self.classifier(self.stack(x)[:, 0])


class GPT(nn.Module):
  def __init__(self, spec, options):
    super().__init__()
    self.embedding = nn.Embedding(spec.num_classes, options.width)
    learned = options.positions == "learned"
    if learned:
      self.positions = nn.Parameter(torch.empty(*spec.shape, options.width))
    gelu = functools.partial(functional.gelu, approximate="tanh")
    layer = nn.TransformerEncoderLayer if learned else RotaryLayer
    self.stack = stack(options, layer, activation=gelu, layer_norm_eps=1e-5)

  def forward(self, tokens):  # [B, T]
    x = self.embedding(tokens)
    if hasattr(self, "positions"):
      x = x + self.positions[: tokens.shape[1]]
    mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
    return functional.linear(self.stack(x, mask=mask, is_causal=True), self.embedding.weight)


NETWORKS = {"resnet": ResNet, "vit": ViT, "gpt": GPT}


def carried(variables, network):
  """Returns a PyTorch network's state that holds our variables."""
  state = dict(network.state_dict())
  for path, leaf in trees.leaves(variables).items():
    _, *layers, name = path.split("/")
    leaf = np.array(leaf)
    if layers[:1] == ["stack"] and len(layers) == 3:
      layers = ["stack", "layers", str(int(layers[1].removeprefix("layer")) - 1), LAYERS.get(layers[2], layers[2])]
    if layers[-1:] == ["qkv"]:
      key = ".".join([*layers[:-1], "self_attn", f"in_proj_{NAMES.get(name, name)}"])
    else:
      key = ".".join([*layers, NAMES.get(name, name)])
    if layers == ["patches"] and name == "kernel":
      size = state[key].shape[-1]
      leaf = leaf.reshape(size, size, -1, leaf.shape[-1])
    if name == "kernel":
      leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    assert state[key].shape == leaf.shape, key
    state[key] = torch.from_numpy(leaf.copy())
  return state


def step(network, inputs, labels, rate):
  """Returns the logits in training mode, and the state after a step of plain SGD on the mean cross-entropy."""
  network.train()
  optimizer = torch.optim.SGD(network.parameters(), rate)
  logits = network(inputs)
  functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
  optimizer.step()
  return logits.detach().numpy(), {key: leaf.detach() for key, leaf in network.state_dict().items()}

"""Inference: the probabilities of images' classes, and of the token after each."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from ban_jax import devices as devices_lib
from ban_jax import report, resolving, trees
from ban_jax.data import images as images_lib
from ban_jax.data.arrays import as_array
from ban_jax.errors import CheckpointError, ConfigError, DataError, check_flag, check_whole
from ban_jax.models import make_model
from ban_jax.types import Carry, Dataset, Devices, Generation, InputSpec, Model, Network

# Pixels that are looked at together for numbers that are not finite.
CHECKED_AT_ONCE = 2**22


class Predictor(NamedTuple):
  """One network or an ensemble on its devices, ready for inputs."""

  models: tuple[Model, ...]
  variables: Any  # one tree a network, broadcast
  scaling: Any  # of images the (mean, std) that each network normalises by, broadcast; of text ()
  log_weights: Float32[np.ndarray, " M"]
  spec: InputSpec
  dtype: str  # of the images that the networks were trained on; of tokens ""
  devices: Devices

  @property
  def window(self) -> int | None:
    """How many tokens the networks read at once: the shortest window of those that have no carry, else any."""
    stateless = [model.spec.shape[0] for model in self.models if not jax.tree.leaves(model.init_carry(1))]
    return min(stateless, default=None) if self.spec.kind == "tokens" else None

  def carries(self, rows: int) -> Carry:
    """Returns the carries at the beginning of `rows` texts."""
    return devices_lib.split_rows(tuple(model.init_carry(rows) for model in self.models), self.devices)

  def step(self, carries: Carry, inputs: np.ndarray) -> tuple[Carry, Float[np.ndarray, "B *T n"]]:
    """Returns the carries after the inputs [B, ...], which the devices share equally, and the log-probabilities."""
    run = make_predict_step(self.models, self.devices)
    with np.errstate(over="ignore"):  # of padding; other pixels are known to be finite in float32
      inputs = inputs.astype(self.dtype or np.int32, copy=False)
    rows = devices_lib.split_rows(inputs, self.devices)
    carries, found = run(self.variables, self.scaling, carries, rows, self.log_weights)
    return carries, devices_lib.join_rows(found, self.devices)


def log_mean(
  models: Sequence[Model], variables: Any, scaling: Any, carries: Carry, inputs: Array, log_weights: Array
) -> tuple[Carry, Float[Array, "B *T n"]]:
  """Returns the carries after the inputs, and the log of the networks' weighted mean probabilities; a JAX function."""
  outputs = []
  for place, (model, tree, carry) in enumerate(zip(models, variables, carries, strict=True)):
    own = images_lib.normalise(inputs, *scaling[place]) if scaling else inputs
    outputs.append(model.apply(tree, carry, own, train=False))
  stacked = jnp.stack([jax.nn.log_softmax(logits) for logits, _, _ in outputs])  # [M, B, *T, n]
  weights = log_weights.reshape(-1, *(1,) * (stacked.ndim - 1))
  return tuple(carry for _, carry, _ in outputs), jax.nn.logsumexp(stacked + weights, axis=0)


@functools.lru_cache
def make_predict_step(models: tuple[Model, ...], devices: Devices) -> Callable[..., tuple[Carry, Array]]:
  """Returns the pmapped `log_mean` of these networks, `(variables, scaling, carries, inputs, log_weights)`."""
  step = functools.partial(log_mean, models)
  # An axis for each tree: a flat tuple is taken for the arrays' own axes where there are as many arrays as arguments.
  return devices_lib.pmap(step, devices=devices, in_axes=((None,) * len(models), None, 0, 0, None))


@devices_lib.default_modes()
def predict(
  generations: Generation | Sequence[Generation],
  inputs: Any,
  *,
  weights: Sequence[float] | None = None,
  batch_size: int = 256,
  devices: Sequence[jax.Device] | None = None,
  progress: bool = True,
  dataset: Dataset | None = None,
) -> Float32[np.ndarray, "N *T n"]:
  """Returns the probabilities of one network, or of an ensemble (Eq. 4), for new inputs.

  Images are normalised as in training, for each network by its own training images.

  Args:
    generations: one or several, with their networks, as `train_generation` or `load` returns them.
    inputs: images [N, H, W, C], or [N, H, W] of one channel, of the type that the networks were trained on: uint8 from
      0 to 255, or floats in the range of the training images. For language models whole numbers [N, T], tokens of the
      vocabulary, each row a text of its own.
    weights: of the ensemble's members, at least 0; None weights them equally.
    batch_size: bounds the memory, and does not change the result beyond rounding.
    devices: the devices to use; all of this process by default.
    progress: whether to show a bar on a terminal, if there are many inputs.
    dataset: normalises if a generation does not say how its images were.

  Returns:
    float32 [N, n]; of tokens [N, T, n], of the token after each.

  Raises:
    CheckpointError: before any work, for generations that do not say which network they are.
    ConfigError: before any work, for weights or a batch size out of range, and networks that read different inputs.
    DataError: before any work, for inputs that the networks cannot read.

  Examples:
    >>> ban_jax.predict([teacher, student], images[:3], progress=False).shape
    (3, 10)
  """
  predictor = prepare(generations, weights, devices, dataset)
  inputs = _checked(predictor.spec, predictor.dtype, inputs, predictor.window)
  batch_size, progress = check_whole("batch_size", batch_size, 1), check_flag("progress", progress)
  if not inputs.size:
    return np.zeros((*inputs.shape[: 1 if predictor.spec.kind == "images" else 2], predictor.spec.num_classes), "f4")
  found = []
  title = f"predicting {len(inputs)} inputs"
  with contextlib.closing(report.Progress(title, len(inputs), 0, progress and len(inputs) > 20 * batch_size)) as bar:
    for first in range(0, len(inputs), batch_size):
      part = inputs[first : first + batch_size]
      rows = pad(part, filled(batch_size, len(inputs), predictor.devices))
      found.append(np.exp(predictor.step(predictor.carries(len(rows)), rows)[1][: len(part)]))
      bar.advance(len(part))
  return np.concatenate(found)


@devices_lib.default_modes()
def normalise(images: Any, source: Dataset | Generation) -> Float32[np.ndarray, "N H W C"]:
  """Returns images as the networks of a data set, or a generation, read them: for functions of one's own.

  uint8 is divided by 255; then the mean of each channel over the training images is subtracted, and the result divided
  by their standard deviation.

  Args:
    images: those that `predict` takes.
    source: a Dataset, or a Generation.

  Returns:
    float32 [N, H, W, C].

  Raises:
    ConfigError: for another source, and for one that does not say how its images are normalised.
    DataError: for images that its networks cannot read.

  Examples:
    >>> ban_jax.normalise(images[:3], data).shape
    (3, 8, 8, 1)
  """
  if not isinstance(source, Dataset | Generation):
    raise ConfigError(f"normalise takes a Dataset or a Generation as the second argument, not {type(source).__name__}")
  known = source if isinstance(source, Dataset) else source.network
  if known is None or not known.scaling:
    raise ConfigError(f"{source!r} does not say how images are normalised: it is of text, made by hand, or too old")
  images = jnp.asarray(_checked(known.spec, known.scaling["dtype"], images), known.scaling["dtype"])
  mean, std = (jnp.array(known.scaling[name], jnp.float32) for name in ("mean", "std"))
  return np.asarray(images_lib.normalise(images, mean, std))


def prepare(
  generations: Generation | Sequence[Generation],
  weights: Sequence[float] | None,
  devices: Sequence[jax.Device] | None,
  dataset: Dataset | None = None,
) -> Predictor:
  """Returns what predicts; raises the errors of `predict` that are not about inputs."""
  resolving.check_own(resolving.Own(dataset=dataset))
  members: list[Any] = trees.members_of(generations)  # `_network_of` refuses bare trees
  if not members:
    raise ConfigError("predict needs at least one generation")
  networks = [_network_of(member, number, dataset) for number, member in enumerate(members, 1)]
  spec, dtype = networks[0].spec, networks[0].scaling.get("dtype", "")
  for network in networks[1:]:
    other = network.spec, network.scaling.get("dtype", "")
    if (_of_network(other[0]), other[1]) != (_of_network(spec), dtype):
      raise ConfigError(f"the networks read different inputs: {_inputs(spec, dtype)}, and {_inputs(*other)}")
  devices = devices_lib.local(devices_lib.resolve(devices))
  models = tuple(
    network.own or make_model(network.group, network.spec, compute_dtype=network.compute_dtype, devices=devices)
    for network in networks
  )
  scaling: tuple[tuple[np.ndarray, ...], ...] = ()
  if spec.kind == "images":
    scaling = tuple(
      tuple(np.array(network.scaling[key], np.float32) for key in ("mean", "std")) for network in networks
    )
  variables = tuple(trees.to_plain(member.params) for member in members)
  with np.errstate(divide="ignore"):  # a weight of 0 is a logarithm of minus infinity
    log_weights = np.log(trees.mean_weights(weights, len(members))).astype(np.float32)
  return Predictor(
    models,
    devices_lib.broadcast(variables, devices),
    devices_lib.broadcast(scaling, devices),
    devices_lib.broadcast(log_weights, devices),
    spec,
    dtype,
    devices,
  )


def _network_of(member: Any, number: int, dataset: Dataset | None) -> Network:
  """Returns a generation's network, with all that `predict` needs of it."""
  if not isinstance(member, Generation):
    raise CheckpointError(
      "a variables tree does not say which network it is, nor how its inputs are normalised: give the Generation, or "
      "ban_jax.with_network(tree, cfg)"
    )
  network = member.network
  if dataset is not None and network is not None and not network.scaling:
    network = network._replace(scaling=dataset.scaling)
  if network is None or network.spec.kind == "images" and not network.scaling:
    raise CheckpointError(
      f"generation {number} of those given does not say how its inputs were normalised: it was written by an earlier "
      "version, trained on a data set made by hand, or made from a spec; give dataset=, or "
      "ban_jax.with_network(generation, cfg)"
    )
  if network.group["name"] == "own" and network.own is None:
    raise CheckpointError(
      f"generation {number} of those given has a network of your own, {network.group['own']!r}: give it to "
      "load(path, model=...)"
    )
  return network


def _of_network(spec: InputSpec) -> InputSpec:
  """Returns what is a network's own of its inputs: a window of text is the training's."""
  return spec._replace(shape=()) if spec.kind == "tokens" else spec


def _inputs(spec: InputSpec, dtype: str) -> str:
  if spec.kind == "tokens":
    listed = ", ".join(spec.words[:4])
    return f"tokens of {spec.num_classes} {spec.unit}, {listed}, ..."
  return f"{dtype} images {'x'.join(map(str, spec.shape))} of {spec.num_classes} classes".strip()


def filled(batch_size: int, count: int, devices: Devices) -> int:
  """Returns the rows of each batch of `count` inputs: as many for every device."""
  return -(-min(batch_size, count) // len(devices)) * len(devices)


def pad(rows: np.ndarray, count: int) -> np.ndarray:
  """Returns the rows, followed by copies of the last up to `count`."""
  return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)]) if len(rows) < count else rows


def _checked(spec: InputSpec, dtype: str, inputs: Any, window: int | None = None) -> np.ndarray:
  """Returns the inputs as an array that networks read, in the caller's type and memory; DataError where it is none."""
  if isinstance(inputs, Dataset):
    raise DataError("the inputs are a Dataset: its images are dataset.splits['test']['images']")
  inputs = as_array("the inputs", inputs)
  if spec.kind == "tokens":
    if inputs.ndim != 2 or inputs.size and not jnp.issubdtype(inputs.dtype, jnp.integer):
      raise DataError(f"the inputs are {inputs.dtype} {list(inputs.shape)}; expected tokens, whole numbers [N, T]")
    low, high = (int(inputs.min()), int(inputs.max())) if inputs.size else (0, 0)
    if low < 0 or high >= spec.num_classes:
      raise DataError(f"a token is {low if low < 0 else high}; expected 0 to {spec.num_classes - 1}")
    if window and inputs.shape[1] > window:
      raise DataError(
        f"the inputs have {inputs.shape[1]} tokens; a network without a carry reads at most its window, {window}"
      )
    return inputs
  if inputs.ndim == 3 and spec.shape[-1] == 1:
    inputs = inputs[..., None]
  if inputs.ndim != 4 or inputs.shape[1:] != spec.shape:
    one = "; for one image pass images[None]" if inputs.shape in (spec.shape, spec.shape[:2]) else ""
    raise DataError(
      f"the inputs have the shape {list(inputs.shape)}; expected images [N, {', '.join(map(str, spec.shape))}]{one}"
    )
  if dtype == "uint8" and inputs.dtype != np.uint8:
    raise DataError(f"the inputs are {inputs.dtype}; the networks were trained on uint8 images from 0 to 255")
  if dtype == "float32" and not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise DataError(f"the inputs are {inputs.dtype}; the networks were trained on floating-point images")
  if dtype == "float32":
    rows = max(1, CHECKED_AT_ONCE // math.prod(spec.shape))
    for first in range(0, len(inputs), rows):  # a memory map may be larger than the memory
      with np.errstate(over="ignore"):
        if not np.isfinite(inputs[first : first + rows].astype(np.float32, copy=False)).all():
          raise DataError("the inputs have pixels that are not finite")
  return inputs

"""The types that the modules share: model, data set, training state, generation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped

# A nested mapping of arrays: {"params": ..., "batch_stats": ...}, and outside a training step also "lineage".
Variables = Mapping[str, Any]
# What a recurrent model passes from one window to the next, rows first ([B, ...] in every leaf); () for image models.
Carry = Any
# What a data set's examples are. A teacher and its student must agree on it.
Kind = Literal["images", "tokens"]


class Batch(NamedTuple):
  """One device's share of a mini-batch, as the models and losses see it."""

  inputs: Shaped[Array, "B ..."]  # float32 [B, H, W, C] images, or int32 [B, T] tokens
  labels: Int[Array, "B ..."]  # int32 [B], or [B, T]
  mask: Bool[Array, "B ..."]  # the labels' shape; False where a row or position only fills up the shape


class InputSpec(NamedTuple):
  """What a model must know of its data set to be built."""

  kind: Kind
  shape: tuple[int, ...]  # one example's: (H, W, C), or (T,)
  num_classes: int
  words: tuple[str, ...] = ()  # of tokens: the vocabulary, token i being words[i]


class Model(NamedTuple):
  """A network as pure functions, the way an optax transformation is.

  `apply(variables, carry, inputs, *, train, key, positions)` returns `(logits, carry, batch_stats)`: float32 logits
  [B, n] or [B, T, n], the carry after the window, and the batch statistics as they are after this batch (unchanged
  where `train` is false). `positions` [B] are the examples' places in the global mini-batch: dropout draws by them, so
  that a run does not depend on how the batch is spread over devices. `key` and `positions` may be None where `train`
  is false.
  """

  name: str
  spec: InputSpec
  init: Callable[[PRNGKeyArray], dict[str, Any]]
  init_carry: Callable[[int], Carry]
  apply: Callable[..., tuple[Array, Carry, Any]]
  # Top-level names in `params` that a student copies from its teacher and keeps frozen (Table 5: stem and classifier).
  inherits: tuple[str, ...] = ()
  # Whether its batch statistics are each device's own, so that the step averages them (models.from_flax).
  local_batch_stats: bool = False
  # Of a network that the caller gave: its options, (name, plain value) each, for the records.
  options: tuple[tuple[str, Any], ...] = ()

  @property
  def shapes(self) -> dict[str, Any]:
    """The shapes and dtypes of its variables, as a tree of jax.ShapeDtypeStruct."""
    return jax.eval_shape(self.init, jax.random.key(0))


class Dataset(NamedTuple):
  """A data set whose arrays lie on the device, and the pure functions that cut mini-batches out of them.

  `fetch(arrays, index, *, key, positions, train)` turns an index vector int32 [B] into a Batch inside the compiled
  step: gather, augmentation (where `train`), normalisation, mask; a negative index is a padding row. `fetch` is the
  same object for every data set that behaves alike, because compiled steps are memoised on it.
  In text, an index is the number of a window, column by column and in the text's order, and `sizes` counts tokens.
  `train_order(key, batch_size)` gives one epoch's index vectors, int32 [steps, batch_size], incomplete batch dropped;
  `eval_order(split, batch_size)` gives every example of a split exactly once, int32 [steps, batch_size], padded by -1.
  `pack(arrays)` returns a split's arrays in the shapes in which the devices hold them and `fetch` reads them.
  """

  name: str
  spec: InputSpec
  splits: Mapping[str, Mapping[str, Any]]  # "train", "test", perhaps "validation" -> arrays for `fetch`
  sizes: Mapping[str, int]  # examples, or tokens, of each split
  digest: str  # SHA-256 of the arrays
  fetch: Callable[..., Batch]
  train_order: Callable[[PRNGKeyArray, int], np.ndarray]
  eval_order: Callable[[str, int], np.ndarray]
  record: Mapping[str, Any] = {}  # what a manifest keeps of how the data were made, as JSON
  options: Mapping[str, Any] = {}  # of data that the caller gave: what its mini-batches depend on beside the arrays
  pack: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

  def __repr__(self) -> str:
    """Returns one line; the arrays would take a page in a notebook."""
    sizes = ", ".join(f"{split}={size:,}" for split, size in self.sizes.items())
    return f"Dataset({self.name!r}, {self.spec.kind} {self.spec.shape}, {self.spec.num_classes:,} classes, {sizes})"

  @property
  def scaling(self) -> dict[str, Any]:
    """How its images are normalised, as Network records it; {} for text, images without a mean, and shapes."""
    arrays = self.splits["train"]
    known = {"images", "mean", "std"} <= arrays.keys() and not isinstance(arrays["mean"], jax.ShapeDtypeStruct)
    if self.spec.kind != "images" or not known:
      return {}
    statistics = {name: [float(value) for value in arrays[name]] for name in ("mean", "std")}
    return {"dtype": str(arrays["images"].dtype), **statistics}


class TrainState(NamedTuple):
  """What a training step changes, the carry aside."""

  step: Int[Array, ""]
  params: Any
  batch_stats: Any
  opt_state: Any


class Network(NamedTuple):
  """What is known of a generation's network, as plain values: enough to build it again and to feed it raw inputs."""

  group: Mapping[str, Any]  # the configuration's `model` group; of a caller's own network {"name": "own", "own": NAME}
  compute_dtype: str
  spec: InputSpec
  # Of images: "dtype", "uint8" (taken as x / 255) or "float32" (taken as it is), and then the "mean" and "std" of each
  # channel that inputs are normalised by. Empty for text, and where it is not known.
  scaling: Mapping[str, Any] = {}
  own: Model | None = None  # the caller's own network, in the process where it was given; pickle leaves it out

  def __reduce__(self):
    """Leaves out the caller's own network: its functions belong to the process."""
    return Network, tuple(self._replace(own=None))

  def __copy__(self):
    return self  # immutable

  def __deepcopy__(self, memo):
    return self


class Generation(NamedTuple):
  """A trained network: its place in the lineage, its variables, how it came about, and which network it is.

  `params` is the full immutable variables tree on the host (parameters, batch statistics, lineage), ready to be handed
  to `train_generation` as the next teacher. `network` is None where it is not known: then a function that needs it
  takes the configuration's.
  """

  index: int  # type: ignore[assignment]  # tuple has a method of this name, which nobody calls here
  params: Variables
  metrics: Mapping[str, float]
  history: Sequence[Mapping[str, float]]
  network: Network | None = None

  def __reduce__(self):
    """Makes the arrays read-only again where a pickled generation is read."""
    return _restored, tuple(self)

  def __copy__(self):
    return self  # immutable

  def __deepcopy__(self, memo):
    return self

  def __repr__(self) -> str:
    """Returns one line; the arrays would take thousands in a notebook."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params.get("params", {})))
    shown = [name for name in ("test_error", "test_perplexity") if name in self.metrics]
    numbers = "".join(f", {name}={self.metrics[name]:.4g}" for name in shown)
    return f"Generation(index={self.index}, parameters={size:,}, epochs={len(self.history)}{numbers})"


def _restored(index: int, params: Variables, *rest: Any) -> Generation:
  for leaf in jax.tree.leaves(params):
    leaf.setflags(write=False)
  return Generation(index, params, *rest)


Devices = tuple[jax.Device, ...]

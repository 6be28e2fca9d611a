"""The types that the modules share: model, data set, training state, generation."""

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, Shaped

# A nested mapping of arrays: {"params": ..., "batch_stats": ...}, and outside a training step also "lineage".
Variables = Mapping[str, Any]
# What a recurrent model passes from one window to the next, rows first ([B, ...] in every leaf); () for image models.
Carry = Any
# Mini-batches as a step takes them: their "index", and the rows that were read for them where a split is streamed.
Feed = Mapping[str, Any]
# What a history's row has of the clock: seconds of an epoch, and for the data of a streamed one. No two runs agree.
TIMES = ("seconds", "waited")
# What a data set's examples are. A teacher and its student must agree on it.
Kind = Literal["images", "tokens"]


class Made:
  """A function that a maker made, which pickles as the maker and its arguments."""

  def __init__(self, function: Callable[..., Any], make: Callable[..., Any], arguments: tuple[Any, ...]):
    self.make, self.arguments = make, arguments
    functools.update_wrapper(self, function)

  def __call__(self, *arguments: Any, **options: Any) -> Any:
    return self.__wrapped__(*arguments, **options)  # type: ignore[attr-defined]

  def __reduce__(self):
    return self.make, self.arguments


def maker(make: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
  """Makes a function that returns functions return the same one for the same arguments, which pickles."""

  @functools.cache
  @functools.wraps(make)
  def made(*arguments: Any) -> Made:
    return Made(make(*arguments), made, arguments)

  return made


class Recipe:
  """How a Model is made again, in another process: `make(*arguments)`. Each is equal to itself alone."""

  def __init__(self, make: Callable[..., "Model"], *arguments: Any):
    self.make, self.arguments = make, arguments


class Batch(NamedTuple):
  """One device's share of a mini-batch, as the models and losses see it."""

  inputs: Shaped[Array, "B ..."]  # float32 [B, H, W, C] images, or int32 [B, T] tokens
  labels: Int[Array, "B ..."]  # int32 [B], or [B, T]
  mask: Bool[Array, "B ..."]  # the labels' shape; False where a row or position only fills up the shape
  # Of images that are mixed of several: each class's share, float32 [B, n]; then `labels` are those of the largest.
  shares: Array | None = None

  @property
  def targets(self) -> Array:
    """What a loss of the labels learns: the labels, or the shares of mixed ones."""
    return self.labels if self.shares is None else self.shares


class InputSpec(NamedTuple):
  """What a model must know of its data set to be built."""

  kind: Kind
  shape: tuple[int, ...]  # one example's: (H, W, C), or (T,)
  num_classes: int
  words: tuple[str, ...] = ()  # of tokens: the vocabulary, token i being words[i]; () if only a tokenizer knows
  unit: str = "words"  # of tokens: "words", "characters", "bytes", or "tokens" of a tokenizer of one's own


class Program(NamedTuple):
  """What a caller's own network computes, as digests that tell it from another one of its name (models.program)."""

  predicts: str  # of evaluation mode
  trains: str  # of initialisation, training mode and gradient; "" where it is never trained
  versions: str  # of the packages that made the programs: with others, equal code may have other digests


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
  # Of a network that the caller gave: the share of its batch statistics that a step keeps, where most is kept.
  momentum: float = 0.0
  # Of a network that the caller gave: its options, (name, plain value) each, for the records.
  options: tuple[tuple[str, Any], ...] = ()
  program: Program | None = None  # of a network that the caller gave: what it computes
  # Where it normalises images as it was trained, and not as the data set does: its (mean, std), per channel each.
  normalisation: tuple[tuple[float, ...], ...] = ()
  recipe: Recipe | None = None  # by which it pickles; None where it was made by hand

  def __reduce__(self):
    """Makes it again where it is read; a module's class has to be known there, as pickle asks of every class."""
    if self.recipe is None:
      raise pickle.PicklingError(f"model {self.name!r} was made by hand, of functions that do not pickle")
    return _made_again, (self.recipe.make, self.recipe.arguments, self.name, self.inherits)

  @property
  def shapes(self) -> dict[str, Any]:
    """The shapes and dtypes of its variables, as a tree of jax.ShapeDtypeStruct."""
    return jax.eval_shape(self.init, jax.random.key(0))


def _made_again(make: Callable[..., Model], arguments: tuple[Any, ...], name: str, inherits: tuple[str, ...]) -> Model:
  model = make(*arguments)
  same = (model.name, model.inherits) == (name, inherits)
  return model if same else model._replace(name=name, inherits=inherits)


class Stream(NamedTuple):
  """A split whose examples are read on the host, as they are needed (`feeding`).

  `read(numbers, places, draw)` returns the examples `numbers`, int32 [n], as arrays [n, ...] by name, with which
  `fetch` works in place of the split's own. In training, `draw` is (seed, generation, epoch) and `places` int32 [n]
  are the examples' places in the epoch, by both of which it draws; else `draw` is (). Equal arguments give equal bytes.
  It pickles, and raises a DataError that names the example that cannot be read.
  """

  read: Callable[[np.ndarray, np.ndarray, tuple[int, ...]], Mapping[str, np.ndarray]]
  row: Mapping[str, jax.ShapeDtypeStruct]  # one example's arrays
  workers: int = 0  # processes that read; 0: threads of this one


class Dataset(NamedTuple):
  """A data set whose arrays lie on the device, and the pure functions that cut mini-batches out of them.

  Of a split in `streams`, the arrays hold only what all its examples share; the examples are read as they are needed.

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
  streams: Mapping[str, Stream] = {}
  # Of text, if it is known: split -> how many of "byte" and "character" it is written in.
  written: Mapping[str, Mapping[str, int]] = {}

  def __reduce__(self):
    """Makes the arrays read-only again where a pickled data set is read."""
    return _read_only, (Dataset, *self)

  def __eq__(self, other: object) -> bool:
    """Returns whether another data set gives the same mini-batches: the digest stands for the arrays."""
    return isinstance(other, Dataset) and self._known() == other._known()

  def __ne__(self, other: object) -> bool:
    return not self == other

  def __hash__(self) -> int:
    return hash((self.name, self.digest))

  def _known(self) -> tuple[Any, ...]:
    return self.name, self.spec, self.digest, dict(self.sizes), self.fetch, dict(self.record), dict(self.options)

  def __repr__(self) -> str:
    """Returns one line; the arrays would take a page in a notebook."""
    sizes = ", ".join(f"{split}={size:,}" for split, size in self.sizes.items())
    return f"Dataset({self.name!r}, {self.spec.kind} {self.spec.shape}, {self.spec.num_classes:,} classes, {sizes})"

  @property
  def scaling(self) -> dict[str, Any]:
    """How its images are normalised, as Network records it; {} for text, images without a mean, and shapes."""
    arrays = {**self.splits["train"], **(self.streams["train"].row if "train" in self.streams else {})}
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
  program: Program | None = None  # of a caller's own network, unless an earlier version wrote none
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
    return _read_only, (Generation, *self)

  def __copy__(self):
    return self  # immutable

  def __deepcopy__(self, memo):
    return self

  def __eq__(self, other: object) -> bool:
    """Returns whether another generation has the same bytes, records and network, however long either took."""
    return self is other or isinstance(other, Generation) and self._known() == other._known()

  def __ne__(self, other: object) -> bool:
    return not self == other

  def __hash__(self) -> int:
    return hash((self.index, _text(self.metrics)))

  def _known(self) -> tuple[Any, ...]:
    leaves = [
      (
        jax.tree_util.keystr(path, simple=True, separator="/"),
        str(leaf.dtype),
        np.shape(leaf),
        np.asarray(leaf).tobytes(),
      )
      for path, leaf in jax.tree_util.tree_flatten_with_path(self.params)[0]
    ]
    network = self.network and self.network._replace(own=None)
    return self.index, _text(self.metrics), [_text(row) for row in self.history], network, sorted(leaves)

  def __repr__(self) -> str:
    """Returns one line; the arrays would take thousands in a notebook."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params.get("params", {})))
    shown = [name for name in ("test_error", "test_perplexity") if name in self.metrics]
    numbers = "".join(f", {name}={self.metrics[name]:.4g}" for name in shown)
    return f"Generation(index={self.index}, parameters={size:,}, epochs={len(self.history)}{numbers})"


def _text(row: Mapping[str, float]) -> str:
  """Returns a record's numbers as text, in which one that is no number equals itself; without its time."""
  return repr(sorted((name, float(value)) for name, value in row.items() if name not in TIMES))


def _read_only(kind: Callable[..., Any], *fields: Any) -> Any:
  """Returns a value that was pickled, its arrays read-only as before."""
  for leaf in jax.tree.leaves(fields):
    if isinstance(leaf, np.ndarray):
      leaf.setflags(write=False)
  return kind(*fields)


Devices = tuple[jax.Device, ...]

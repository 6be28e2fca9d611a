"""Data sets that are read as they are needed, from anything with `len` and `[i]`."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ban_jax import devices as devices_lib
from ban_jax import workers as workers_lib
from ban_jax.data import images, own
from ban_jax.data.arrays import digest, make_read_only
from ban_jax.data.decoding import VIEWS, Form, Reader
from ban_jax.errors import ConfigError, DataError, check_bool, check_name, check_whole, choices
from ban_jax.types import Dataset, InputSpec, Stream

# Decoded bytes of the training examples, evenly spaced, that the mean and the deviation are of; of all if there are no
# more: then they are those of the same images on the devices.
SAMPLE = 2**28
# Examples of each split whose pixels and labels stand for all of them in the digest.
KNOWN = 32
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


class Folder:
  """The images of a folder, `class/name.jpg`, as encoded bytes with the number of their class, ordered by name."""

  def __init__(self, directory: str | os.PathLike):
    self.root = pathlib.Path(directory).expanduser().absolute()
    try:
      self.classes = sorted(entry.name for entry in os.scandir(self.root) if entry.is_dir())
      found = [
        (f"{name}/{entry.name}", label, entry.stat().st_size)
        for label, name in enumerate(self.classes)
        for entry in sorted(os.scandir(self.root / name), key=lambda entry: entry.name)
        if entry.name.lower().endswith(SUFFIXES)
      ]
    except OSError as error:
      raise DataError(f"{self.root} cannot be read as a folder of images ({error}); expected class/name.jpg") from error
    if not found:
      raise DataError(f"{self.root} has no images in folders of its own; expected class/name.jpg ({choices(SUFFIXES)})")
    self.names, labels, sizes = zip(*found, strict=True)
    self.labels = np.array(labels, np.int32)
    listed = json.dumps([self.names, sizes]).encode()
    self.identity = {"files": len(found), "bytes": sum(sizes), "sha256": hashlib.sha256(listed).hexdigest()}

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, number: int) -> tuple[bytes, int]:
    return (self.root / self.names[number]).read_bytes(), int(self.labels[number])


class Arrays:
  """Images uint8 [N, H, W, C] or [N, H, W] and labels [N], which may be larger than memory, as a numpy.memmap is."""

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    self.images, self.labels = images, labels
    self.identity = {"shape": list(self.images.shape), "dtype": str(self.images.dtype)}

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
    return np.asarray(self.images[number]), self.labels[number]


@devices_lib.default_modes()
def from_source(
  train: Any,
  test: Any,
  validation: Any = None,
  *,
  num_classes: int | None = None,
  size: int = 0,
  view: str = "whole",
  channels: int = 3,
  pad: int = 0,
  flip: bool = False,
  augment: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
  keys: tuple[str, str] = ("image", "label"),
  workers: int = 0,
  name: str = "source",
) -> Dataset:
  """Returns a data set whose images are read as they are needed, for data that are larger than memory.

  The bytes of a run are those of the same images given to `from_arrays`, and depend on no worker, process or device.

  Args:
    train: anything with `len` and `[i]` (a data source of TFDS or Grain, a map-style set of Hugging Face, your own
      class), a folder with `class/name.jpg`, or a pair of arrays (images, labels), which may be `numpy.memmap`s. `[i]`
      is an image and its class from 0, or a mapping with these under `keys`; the image uint8 [H, W, C] or [H, W], an
      encoded file's bytes, or Pillow's.
    test: likewise.
    validation: likewise, or none.
    num_classes: needed except for folders and arrays.
    size: images become size x size pixels; 0 for images that have one size.
    view: what of an image does: "whole", all of it, or "crops", in training a random part and in evaluation the middle
      (Szegedy et al. 2015).
    channels: 1 or 3, of encoded images.
    pad: pixels of reflection that are added before a random crop.
    flip: whether to mirror at random.
    augment: further augmentations, as of `from_arrays`.
    keys: the names of an image and its class where a record is a mapping.
    workers: processes that read; 0 for threads, which suffice where decoding takes the time. With processes, the source
      must pickle, and a script needs `if __name__ == "__main__":`.
    name: the data set's name, in messages and records.

  Returns:
    A Dataset. Images are normalised by the mean and deviation of all training images, or of evenly spaced ones if they
    take more than `SAMPLE` bytes.

  Raises:
    DataError: for what cannot be read, with the number of the record; also while training.
    ConfigError: for a value out of range.

  Examples:
    >>> ban_jax.from_source((images[:200], labels[:200]), (images[900:], labels[900:])).sizes["train"]
    200
  """
  check_name(name, "names the data set in messages")
  if view not in VIEWS:
    raise ConfigError(f"view={view!r}: expected one of: {choices(VIEWS)}")
  if view == "crops" and not size:
    raise ConfigError("view='crops': expected a size, to which the parts are resized")
  if channels not in (1, 3):
    raise ConfigError(f"channels={channels!r}: expected 1 or 3")
  given = {"train": train, "test": test} | ({} if validation is None else {"validation": validation})
  sources = {split: _source(f"{name}, {split}", one, workers) for split, one in given.items()}
  classes = _num_classes(name, sources) if num_classes is None else check_whole("num_classes", num_classes, 2)
  form = Form(check_whole("size", size, 0), view, channels)
  chosen = own.augmentations(augment)
  options = images.Options(0.0, 0, check_whole("pad", pad, 0), check_bool("flip", flip), augment=chosen)
  dataset = build(name, sources, classes, form, options, keys=keys, workers=check_whole("workers", workers, 0))
  kept = {"name": name, "pad": options.pad, "flip": options.flip, **form._asdict(), "stream": True}
  return dataset._replace(options=kept | ({"augment": chosen} if chosen else {}))


def _source(where: str, given: Any, workers: int) -> Any:
  """Returns what a caller gave as a source."""
  if isinstance(given, str | os.PathLike):
    return Folder(given)
  if isinstance(given, tuple) and len(given) == 2 and all(hasattr(one, "shape") for one in given):
    pixels, labels = given
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or labels.shape != pixels.shape[:1]:
      raise DataError(
        f"{where}: the arrays are {pixels.dtype} {list(pixels.shape)} and {labels.dtype} {list(labels.shape)}; "
        "expected images uint8 [N, H, W, C] or [N, H, W] and a label of each"
      )
    if workers:
      raise ConfigError(f"workers={workers}: expected 0 for {where}: arrays are read by threads")
    return Arrays(pixels, labels)
  if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")) or isinstance(given, Mapping):
    raise DataError(
      f"{where} is of type {type(given).__name__}; expected anything with len and [i], a folder's path, or a pair of "
      "arrays (images, labels)"
    )
  return given


def _num_classes(name: str, sources: Mapping[str, Any]) -> int:
  if all(isinstance(source, Folder) for source in sources.values()):
    known = sources["train"].classes
    for split, source in sources.items():
      if source.classes != known:
        odd = choices(set(known) ^ set(source.classes))
        raise DataError(f"{name}, {split}: its folders are not those of train, which differ in: {odd}")
    return len(known)
  if all(isinstance(source, Arrays) for source in sources.values()):
    return 1 + max(int(np.max(source.labels)) for source in sources.values())
  raise ConfigError("num_classes: expected the number of classes, which is known of folders and arrays alone")


def build(
  name: str,
  sources: Mapping[str, Any],
  num_classes: int,
  form: Form,
  options: images.Options,
  *,
  keys: tuple[str, str],
  workers: int,
) -> Dataset:
  """Returns the Dataset of the sources of its splits, of `options` taking the padding and the flips.

  A source's attribute `identity`, plain values, becomes part of the digest, as its length does, the pixels of some
  records, and all options.
  """
  if workers:
    workers_lib.prepare({type(source).__module__ for source in sources.values()} - {"__main__"})
  sizes, readers = {split: len(source) for split, source in sources.items()}, {}
  shape: tuple[int, ...] = ()
  for split, source in sources.items():
    if not sizes[split]:
      raise DataError(f"{name}, {split}: it is empty; expected at least one example")
    reader = Reader(source, f"{name}, {split}", sizes[split], keys, form, shape, num_classes)
    shape = shape or reader.example(0)[0].shape
    readers[split] = reader._replace(shape=shape)
  sample = _sample(readers["train"], max(KNOWN, SAMPLE // int(np.prod(shape))))
  mean, std = images.channel_statistics(sample["images"].reshape(-1, *shape))
  shared = {"mean": mean, "std": std}
  make_read_only(shared)
  splits = dict.fromkeys(sources, shared)
  record = {
    split: {
      "examples": sizes[split],
      "sample": digest({split: _sample(reader, KNOWN)}),
      **getattr(reader.source, "identity", {}),
    }
    for split, reader in readers.items()
  }
  known = json.dumps([record, num_classes, form], sort_keys=True).encode()
  described = {"source": np.frombuffer(known, np.uint8)}
  spec = InputSpec("images", shape, num_classes)
  return images.assemble(name, spec, splits, sizes, options)._replace(
    digest=digest({**splits, "source": described}),
    record={"stream": record},
    pack=dict,
    streams={split: Stream(reader.read, _row(spec), workers) for split, reader in readers.items()},
  )


def describe(name: str, sizes: Mapping[str, int], num_classes: int, form: Form, options: images.Options) -> Dataset:
  """Returns `build`'s Dataset for splits of so many examples of form.size pixels, as shapes; nothing can be read."""
  spec = InputSpec("images", (form.size, form.size, form.channels), num_classes)
  shared = {key: jax.ShapeDtypeStruct((form.channels,), np.float32) for key in ("mean", "std")}
  streams = {split: Stream(_unreadable, _row(spec), 0) for split in sizes}
  dataset = images.assemble(name, spec, dict.fromkeys(sizes, shared), sizes, options)
  return dataset._replace(pack=dict, streams=streams)


def _row(spec: InputSpec) -> Mapping[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of an example as it is read."""
  pixels = jax.ShapeDtypeStruct((int(np.prod(spec.shape)),), np.uint8)
  return {"images": pixels, "labels": jax.ShapeDtypeStruct((), np.int32)}


def _unreadable(*arguments: Any) -> Any:
  raise DataError("the data were described, and are not read")


def _sample(reader: Reader, count: int) -> Mapping[str, np.ndarray]:
  """Returns as many examples of a split, evenly spaced, or all if there are no more; as in evaluation."""
  numbers = np.unique(np.linspace(0, reader.records - 1, min(count, reader.records)).astype(np.int32))
  parts = np.array_split(numbers, -(-len(numbers) // 32))
  with concurrent.futures.ThreadPoolExecutor(devices_lib.cores()) as pool:
    found = list(pool.map(lambda part: reader.read(part, part, ()), parts))
  return {key: np.concatenate([part[key] for part in found]) for key in ("images", "labels")}

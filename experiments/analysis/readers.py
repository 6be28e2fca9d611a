"""What the section `feed` of bench.py measures: sets made on the spot, and who reads them."""

import importlib.util
import io
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import ban_jax
from ban_jax import feeding
from ban_jax import workers as workers_lib
from ban_jax.data.decoding import Form, pixels
from ban_jax.types import Dataset, Devices

SIZE = 224
# As a training step reads them: a random part, by the draws of an epoch.
FORM = Form(SIZE, "crops", 3)
ROW = SIZE * SIZE * 3
WORKERS = (0, 1, 2, 4)


class Jpegs:
  """JPEGs of many sizes in an array_record file, each behind the two bytes of its label."""

  def __init__(self, path: pathlib.Path):
    from array_record.python import array_record_data_source

    self.path = path
    self.records = array_record_data_source.ArrayRecordDataSource([str(path)])

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, number: int) -> tuple[bytes, int]:
    record = self.records[number]
    return record[2:], int.from_bytes(record[:2], "little")

  def __reduce__(self):
    return Jpegs, (self.path,)


class Decoded:
  """The images of a source as training takes them, for readers that are not ours."""

  def __init__(self, source: Any, form: Form):
    self.source, self.form = source, form

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
    image, label = self.source[number]
    return pixels(image, self.form, (0, 0, 0, number)), int(label)


def jpegs(folder: pathlib.Path, count: int) -> Jpegs:
  """Writes JPEGs of about ImageNet's size and detail, 110 kB each."""
  from array_record.python import array_record_module

  rng, path = np.random.default_rng(0), folder / "images.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for number in range(count):
    width, height = (int(side) for side in rng.integers(300, 600, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    image = np.asarray(coarse.resize((width, height))) // 2 + rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=92)
    writer.write((number % 1000).to_bytes(2, "little") + file.getvalue())
  writer.close()
  return Jpegs(path)


def raw(folder: pathlib.Path, gigabytes: float) -> tuple[np.memmap, np.ndarray]:
  """Writes so many 10^9 bytes of images, at least a few mini-batches, and returns them as a memory map, with labels."""
  count = max(int(gigabytes * 1e9) // ROW, 512)
  part = np.random.default_rng(0).integers(0, 256, (64, SIZE, SIZE, 3), dtype=np.uint8)
  with open(folder / "images.raw", "wb") as file:
    for first in range(0, count, len(part)):
      part[:, 0, 0, 0] = first % 251  # no two parts are equal
      file.write(part[: count - first].tobytes())
  return np.memmap(folder / "images.raw", np.uint8, "r", shape=(count, SIZE, SIZE, 3)), np.arange(count) % 1000


def streamed(source: Any, form: Form, workers: int = 0) -> Dataset:
  """Returns a source as a data set."""
  return ban_jax.from_source(source, source, num_classes=1000, size=form.size, view=form.view, workers=workers)


def order_of(count: int, batch: int, steps: int) -> np.ndarray:
  """Returns mini-batches of examples in random order, again and again."""
  rng = np.random.default_rng(0)
  rounds = -(-steps * batch // count)
  return np.concatenate([rng.permutation(count) for _ in range(rounds)])[: steps * batch].reshape(steps, batch)


def ours(dataset: Dataset, order: np.ndarray, devices: Devices) -> Iterator[Any]:
  """Yields mini-batches as a training takes them, on the devices."""
  numbers = order.astype(np.int32)
  return feeding.feeds(dataset, "train", numbers, [1] * len(order), devices, draw=(0, 0, 0))


def grains(source: Any, order: np.ndarray, workers: int) -> Iterator[Any]:
  """Yields what Grain's plain loop makes of the same images in the same order."""
  import grain
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # its processes ask for its own flags
  numbers = order.ravel()
  found = grain.MapDataset.source(numbers).map(lambda number: source[int(number)]).batch(order.shape[1])
  loop: Any = found.to_iter_dataset()
  return iter(loop.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)) if workers else loop)


def torches(source: Any, order: np.ndarray, workers: int) -> Iterator[Any]:
  """Yields what PyTorch's DataLoader makes of the same images in the same order.

  Its processes are forks of the same one as ours: array_record cannot be read in forks of one that has read it.
  """
  from torch.utils import data

  batches = [list(map(int, batch)) for batch in order]
  context = "forkserver" if workers else None
  return iter(data.DataLoader(source, batch_sampler=batches, num_workers=workers, multiprocessing_context=context))


def prepare() -> None:
  """Starts the process that workers are forked from, with what ours and PyTorch's import."""
  there = ["torch.utils.data"] if importlib.util.find_spec("torch") else []
  workers_lib.prepare([__name__, *there])


class Pass(NamedTuple):
  """A pass over some mini-batches, from the first request on: the start of threads and processes is part of it."""

  seconds: float  # a mini-batch
  waited: float  # the share of a step that it waits for its data, the first step left out
  own_gib: float  # the most memory of its own that this process has; pages of a mapped file are the system's


def go_through(make: Callable[[], Iterator[Any]], clock: Callable[[], float], step: float = 0.0) -> Pass:
  """Reads all mini-batches, and sleeps for `step` seconds after each, as a step on an accelerator."""
  start, own, waited = clock(), [], []
  feeds, began = make(), clock()
  for _ in feeds:
    waited.append(clock() - began)
    own.append(_own_bytes() / 2**30)
    time.sleep(step)
    began = clock()
  share = sum(waited[1:]) / (step * len(waited[1:])) if step else 0.0
  return Pass((clock() - start) / len(waited), share, max(own))


def _own_bytes() -> int:
  lines = pathlib.Path("/proc/self/status").read_text("ascii").splitlines()
  return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))

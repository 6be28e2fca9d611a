"""Reading images on the host: from a source's records to rows of pixels, cropped and resized where that is asked for.

What is drawn follows from seed, generation, epoch and the example's place in the epoch, and from nothing else.
"""

import io
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from ban_jax.errors import DataError

if TYPE_CHECKING:
  from PIL import Image

# What is made of images of several sizes. "whole": all of an image, resized. "crops": in training a random part, and in
# evaluation the middle, as in Szegedy et al. 2015 and He et al. 2016.
VIEWS = ("whole", "crops")
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random part: its share of the image, and its width by its height
TRIES = 10
MIDDLE = 0.875  # of the shorter side

Box = tuple[float, float, float, float]  # left, upper, right, lower, in pixels


class Form(NamedTuple):
  """What a record's image becomes."""

  size: int  # size x size pixels; 0: as it is
  view: str  # one of VIEWS
  channels: int  # of encoded images: 1 or 3


class Reader(NamedTuple):
  """A Stream's reader, of any object with `len` and `[i]` that returns an image and a label."""

  source: Any
  name: str  # in messages
  records: int
  keys: tuple[str, str]  # of an image and a label, where a record is a mapping
  form: Form
  shape: tuple[int, ...]  # [H, W, C] of every image
  num_classes: int

  def read(
    self, numbers: Int[np.ndarray, " n"], places: Int[np.ndarray, " n"], draw: tuple[int, ...]
  ) -> Mapping[str, np.ndarray]:
    """Returns "images" uint8 [n, H W C] and "labels" int32 [n]; raises a DataError with the record's number."""
    images, labels = np.empty((len(numbers), math.prod(self.shape)), np.uint8), np.empty(len(numbers), np.int32)
    for row, (number, place) in enumerate(zip(numbers.tolist(), places.tolist(), strict=True)):
      image, labels[row] = self.example(number, (*draw, place) if draw else ())
      if image.shape != self.shape:
        raise DataError(
          f"{self.name}: the image of record {number} is {_by(image.shape)}; expected {_by(self.shape)}, as the first, "
          "or a size to which all are resized"
        )
      images[row] = image.ravel()
    return {"images": images, "labels": labels}

  def example(self, number: int, draw: tuple[int, ...] = ()) -> tuple[UInt8[np.ndarray, "H W C"], int]:
    """Returns a record's image and label; `draw` is (seed, generation, epoch, place) in training."""
    where = f"{self.name}: record {number} of {self.records}"
    try:
      record = self.source[number]
    except DataError:
      raise
    except Exception as error:  # of whatever the source is made of
      changed = "" if len(self.source) == self.records else f", of which there are {len(self.source)} by now,"
      raise DataError(f"{where}{changed} cannot be read ({type(error).__name__}: {error})") from error
    named = isinstance(record, Mapping) and all(key in record for key in self.keys)
    found = [record[key] for key in self.keys] if named else record
    if not (isinstance(found, tuple | list) and len(found) == 2):
      raise DataError(
        f"{where} is {_kind(record)}; expected (image, label), or a mapping with {' and '.join(self.keys)}"
      )
    image, given = found
    try:
      label = operator.index(given.item() if isinstance(given, np.ndarray) else given)
    except (TypeError, ValueError):
      raise DataError(f"{where} has the label {given!r}; expected a whole number") from None
    if not 0 <= label < self.num_classes:
      raise DataError(f"{where} has the label {label}; expected classes from 0 to {self.num_classes - 1}")
    try:
      return pixels(image, self.form, draw), label
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of broken files
      raise DataError(f"{where} has an image that cannot be decoded ({type(error).__name__}: {error})") from error


def _kind(record: Any) -> str:
  return f"a mapping with {', '.join(map(str, record))}" if isinstance(record, Mapping) else type(record).__name__


def _by(shape: tuple[int, ...]) -> str:
  return "x".join(map(str, shape))


def pixels(given: Any, form: Form, draw: tuple[int, ...] = ()) -> UInt8[np.ndarray, "H W C"]:
  """Returns an image, as an array uint8 [H, W] or [H, W, C], an encoded file's bytes or Pillow's, in its form.

  Raises a ValueError or an OSError for what is none or does not decode.
  """
  from PIL import Image  # what is on the devices needs none

  if isinstance(given, bytes | bytearray | memoryview):
    given = Image.open(io.BytesIO(given))
  if isinstance(given, Image.Image):
    mode = {1: "L", 3: "RGB"}[form.channels]
    if form.size and form.view == "crops":
      given, part = _draft(given, mode, form.size, _box(given.size, draw))
      return np.atleast_3d(np.asarray(_resized(given.convert(mode), form.size, part)))
    given = given.convert(mode)
  array = np.asarray(given)
  if array.dtype != np.uint8 or array.ndim not in (2, 3) or not array.size:
    raise ValueError(f"{array.dtype} {list(array.shape)}; expected uint8 [H, W, C] or [H, W], or an encoded image")
  array = np.atleast_3d(array)
  if not form.size:
    return array
  box = _box((array.shape[1], array.shape[0]), draw) if form.view == "crops" else None
  planes = [
    _resized(Image.fromarray(np.ascontiguousarray(array[..., c])), form.size, box) for c in range(array.shape[2])
  ]
  return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def _resized(image: "Image.Image", size: int, box: Box | None) -> "Image.Image":
  """Returns a part of an image at size x size pixels: bilinear, with antialiasing where it gets smaller."""
  from PIL import Image

  return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _draft(image: "Image.Image", mode: str, size: int, box: Box) -> tuple["Image.Image", Box]:
  """Lets a JPEG be decoded at an eighth, a quarter or half of its size where the part in the box stays large enough."""
  width, height = image.size
  scale = size / min(box[2] - box[0], box[3] - box[1])
  image.draft(mode, (math.ceil(width * scale), math.ceil(height * scale)))
  x, y = image.size[0] / width, image.size[1] / height
  return image, (box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def _box(size: tuple[int, int], draw: tuple[int, ...]) -> Box:
  """Returns the part of an image of width and height `size` that is taken: drawn by `draw`, or the middle without."""
  width, height = size
  if not draw:
    side = MIDDLE * min(size)
    return _centred(width, height, side, side)
  seed, generation, epoch, place = draw
  # Each example has a counter of its own: keys that differ by one, as of seed and place added, would share draws.
  rng = np.random.Generator(np.random.Philox(counter=[0, place, epoch, 0], key=[seed, generation]))
  for _ in range(TRIES):
    area = rng.uniform(AREA[0], AREA[1]) * width * height
    ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    wide, high = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if wide <= width and high <= height:
      left, upper = rng.uniform(0, width - wide), rng.uniform(0, height - high)
      return left, upper, left + wide, upper + high
  ratio = min(max(width / height, RATIO[0]), RATIO[1])
  return _centred(width, height, min(width, height * ratio), min(height, width / ratio))


def _centred(width: int, height: int, wide: float, high: float) -> Box:
  left, upper = (width - wide) / 2, (height - high) / 2
  return left, upper, left + wide, upper + high

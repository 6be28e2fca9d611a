"""Augmentation as pure functions on the device, by each example's place in the global mini-batch.

Crop and flip come first, of pixels as they are stored (`data.pad`, `data.flip`). What `data.augment` names follows, of
normalised images, whatever their type and range: an augmentation is one function and one entry in AUGMENTATIONS.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped
from ml_collections import ConfigDict

from ban_jax import devices as devices_lib
from ban_jax.registry import Registry


def draw(key: PRNGKeyArray, positions: Int[Array, " B"], pad: int) -> tuple[Int[Array, "B 2"], Bool[Array, " B"]]:
  """Draws each example's crop offsets (down, right), uniform in 0..2*pad, and whether it is flipped.

  `key` is the same on all devices and `positions` [B] are the examples' places in the global mini-batch: what an
  example draws does not depend on how the batch is spread over devices. Flips do not depend on `pad`.
  """
  words = jax.vmap(lambda position: jax.random.bits(jax.random.fold_in(key, position), (3,)))(positions)  # [B, 3]
  # 2^32 is no multiple of 2 * pad + 1; for the 9 offsets of CIFAR the most frequent one gains 2e-9 of its share.
  offsets = (words[:, :2] % jnp.uint32(2 * pad + 1)).astype(jnp.int32)
  return offsets, (words[:, 2] & 1).astype(bool)


def crop(images: Shaped[Array, "B H W C"], offsets: Int[Array, "B 2"], pad: int) -> Shaped[Array, "B H W C"]:
  """Pads by `pad` < min(H, W) pixels of reflection and cuts [H, W] out at each image's offsets in 0..2*pad.

  Section 2 of the paper (arXiv:1805.04770) takes this from Wide-ResNets. The edge pixel itself is not repeated, as in
  `np.pad(mode="reflect")`.
  """
  _, height, width, _ = images.shape
  # Reflecting the indices instead of the pixels makes it one gather, five times faster on a CPU than pad and slice.
  rows = _reflect(jnp.arange(height) + offsets[:, :1] - pad, height)  # [B, H]
  columns = _reflect(jnp.arange(width) + offsets[:, 1:] - pad, width)  # [B, W]
  return jax.vmap(lambda image, row, column: image[row[:, None], column])(images, rows, columns)


def flip(images: Shaped[Array, "B H W C"], flips: Bool[Array, " B"]) -> Shaped[Array, "B H W C"]:
  """Mirrors those images left to right whose entry of `flips` is true."""
  return jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)


def _reflect(index: Int[Array, "..."], size: int) -> Int[Array, "..."]:
  """Maps indices in (-size, 2 * size - 1) into 0..size-1 as reflection padding does."""
  return size - 1 - jnp.abs(size - 1 - jnp.abs(index))


# --- Of normalised images ---------------------------------------------------------------------------------------------

Image = Float[Array, "H W C"]
Share = Float[Array, ""]
# The names of augmentations and their options, (name, value) each.
Chosen = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


class Augmentation(NamedTuple):
  """An entry of AUGMENTATIONS: a pure function of one image, float32 [H, W, C], that draws by a key of its own.

  0 is the training images' mean, and 1 their deviation, of each channel. `apply(image, key, **options)` returns an
  image. One that `mixes` is `apply(image, other, key, **options)`, where `other` is the next image of the global
  mini-batch; it returns (image, share), and the image has the label of `image` to this share, and else that of `other`.
  """

  apply: Callable[..., Any]
  mixes: bool = False


def mixup(image: Image, other: Image, key: PRNGKeyArray, *, mixup_alpha: float) -> tuple[Image, Share]:
  """A weighted mean of two images, the weight from Beta(alpha, alpha) (Zhang et al. 2018)."""
  share = _beta(key, mixup_alpha)
  return share * image + (1 - share) * other, share


def cutmix(image: Image, other: Image, key: PRNGKeyArray, *, cutmix_alpha: float) -> tuple[Image, Share]:
  """A rectangle of another image, its area from Beta(alpha, alpha), at a random place (Yun et al. 2019)."""
  area_key, place_key = jax.random.split(key)
  side = jnp.sqrt(_beta(area_key, cutmix_alpha))
  inside = _rectangle(image.shape, side, side, jax.random.uniform(place_key, (2,)))
  return jnp.where(inside[..., None], other, image), 1 - inside.mean()


def _beta(key: PRNGKeyArray, alpha: float) -> Share:
  return jax.random.uniform(key) if alpha == 1 else jax.random.beta(key, alpha, alpha)  # which compiles for seconds


def erasing(image: Image, key: PRNGKeyArray, *, erasing: float) -> Image:
  """With probability `erasing`, noise in a rectangle of 2 to 33 % of the area (Zhong et al. 2020)."""
  area_key, aspect_key, place_key, noise_key, key = jax.random.split(key, 5)
  area = jax.random.uniform(area_key, minval=0.02, maxval=0.33)
  aspect = jnp.exp(jax.random.uniform(aspect_key, minval=jnp.log(0.3), maxval=-jnp.log(0.3)))
  inside = _rectangle(
    image.shape, jnp.sqrt(area / aspect), jnp.sqrt(area * aspect), jax.random.uniform(place_key, (2,))
  )
  erased = inside & (jax.random.uniform(key) < erasing)
  return jnp.where(erased[..., None], jax.random.normal(noise_key, image.shape), image)


def _rectangle(shape: tuple[int, ...], height: Share, width: Share, centre: Float[Array, " 2"]) -> Bool[Array, "H W"]:
  """Returns which pixels are in a rectangle; sides and centre are shares of the image, outside of which it is cut."""
  rows, columns = (
    jnp.abs((jnp.arange(size) + 0.5) / size - middle) < side / 2
    for size, middle, side in zip(shape, centre, (height, width), strict=False)
  )
  return rows[:, None] & columns


def random_resized_crop(image: Image, key: PRNGKeyArray, *, crop_area: float) -> Image:
  """A rectangle of `crop_area` to all of the area, of aspect 3/4 to 4/3, resized to the image's size (Szegedy 2015)."""
  area_key, aspect_key, place_key = jax.random.split(key, 3)
  area = jax.random.uniform(area_key, minval=crop_area, maxval=1.0)
  aspect = jnp.exp(jax.random.uniform(aspect_key, minval=jnp.log(3 / 4), maxval=jnp.log(4 / 3)))
  sides = jnp.minimum(1.0, jnp.stack([jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)]))  # shares of height and width
  corner = jax.random.uniform(place_key, (2,)) * (1 - sides)
  size = jnp.array(image.shape[:2])
  return jax.image.scale_and_translate(image, image.shape, (0, 1), 1 / sides, -corner * size / sides, "linear")


def randaugment(image: Image, key: PRNGKeyArray, *, distortions: int, distortion_strength: float) -> Image:
  """So many random distortions one after the other: of geometry or colour, or none (after Cubuk et al. 2020)."""
  for own in jax.random.split(key, distortions):
    image = _distorted(image, own, distortion_strength)
  return image


# Its distortions, and what they are at strength 1: radians, pixels per pixel, shares of the size, deviations, factors.
DISTORTIONS = {
  **{"none": 0.0, "rotate": np.pi / 6, "shear_x": 0.3, "shear_y": 0.3, "shift_x": 0.3, "shift_y": 0.3},
  **{"brightness": 1.0, "contrast": 0.9, "saturation": 0.9, "solarize": 1.0},
}


def _distorted(image: Image, key: PRNGKeyArray, strength: float) -> Image:
  """Returns an image after one distortion, to one side or the other; what is beyond the border is the mean colour."""
  kind_key, sign_key = jax.random.split(key)
  chosen = jax.random.randint(kind_key, (), 0, len(DISTORTIONS)) == jnp.arange(len(DISTORTIONS))
  values = chosen * jnp.array(list(DISTORTIONS.values())) * strength * jax.random.rademacher(sign_key, ())
  by = dict(zip(DISTORTIONS, values, strict=True))
  # All of geometry is one affine map of the places, about the middle.
  height, width, channels = image.shape
  y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
  cos, sin = jnp.cos(by["rotate"]), jnp.sin(by["rotate"])
  rows = cos * y - sin * x + by["shear_y"] * x + by["shift_y"] * height + (height - 1) / 2
  columns = sin * y + cos * x + by["shear_x"] * y + by["shift_x"] * width + (width - 1) / 2
  image = jnp.stack([map_coordinates(image[..., c], [rows, columns], order=1) for c in range(channels)], axis=-1)
  grey = image.mean(axis=-1, keepdims=True)
  image = grey + (image - grey) * (1 + by["saturation"])
  image = image.mean() + (image - image.mean()) * (1 + by["contrast"]) + by["brightness"]
  # Of the brightest pixels, or the darkest, a negative: those beyond a threshold that falls with the strength.
  beyond = chosen[-1] & (image * jnp.sign(by["solarize"]) > 2 - 2 * jnp.abs(by["solarize"]))
  return jnp.where(beyond, -image, image)


_ENTRIES = {
  "cutmix": Augmentation(cutmix, mixes=True),
  "erasing": Augmentation(erasing),
  "mixup": Augmentation(mixup, mixes=True),
  "randaugment": Augmentation(randaugment),
  "random_resized_crop": Augmentation(random_resized_crop),
}
AUGMENTATIONS = Registry("data.augment", "augmentation", _ENTRIES)


def choose(names: Sequence[str], group: Mapping[str, Any] | ConfigDict) -> Chosen:
  """Returns the augmentations of these names with their options in a `data` group; raises a ConfigError otherwise."""
  return tuple((name, tuple(AUGMENTATIONS.arguments(name, group).items())) for name in names)


def apply(
  chosen: Chosen,
  images: Float[Array, "B H W C"],
  labels: Int[Array, " B"],
  num_classes: int,
  key: PRNGKeyArray,
  positions: Int[Array, " B"],
) -> tuple[Float[Array, "B H W C"], Float[Array, "B n"] | None]:
  """Returns a device's images after the chosen augmentations, and the share of each class in their labels.

  The shares are None where nothing mixes. One that mixes must be inside a mapped function, since a device's last
  example is mixed with the next device's first. `key` and `positions` are as `draw` takes them.
  """
  shares = jax.nn.one_hot(labels, num_classes)
  for number, (name, options) in enumerate(chosen):
    entry = AUGMENTATIONS.find(name)
    function = functools.partial(entry.apply, **dict(options))
    own = jax.random.fold_in(key, np.uint32(2**31 + number))  # `draw` folds with positions, which are below
    keys = jax.vmap(functools.partial(jax.random.fold_in, own))(positions)
    if entry.mixes:
      others, their_shares = devices_lib.next_rows((images, shares))
      images, share = jax.vmap(function)(images, others, keys)
      shares = share[:, None] * shares + (1 - share[:, None]) * their_shares
    else:
      images = jax.vmap(function)(images, keys)
  return images, shares if any(AUGMENTATIONS.find(name).mixes for name, _ in chosen) else None

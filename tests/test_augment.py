"""Random crop and flip: against NumPy, in distribution, and independent of how a batch is split over devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ban_jax.data import augment, images


def random_images(batch, height=12, width=10, channels=3, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (batch, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("pad", "height", "width"), [(4, 32, 32), (1, 8, 8), (3, 5, 9), (4, 5, 5)])
def test_crop_is_reflection_padding_and_a_window(pad, height, width):
  every = np.array(list(itertools.product(range(2 * pad + 1), repeat=2)), np.int32)
  batch = random_images(len(every), height, width)
  padded = np.pad(batch, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
  expected = np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, every, strict=True)])
  cropped = jax.jit(augment.crop, static_argnums=2)(batch, every, pad)
  assert cropped.dtype == np.uint8
  np.testing.assert_array_equal(cropped, expected)


def test_flip_mirrors_columns_of_the_chosen_images_only():
  batch = random_images(4)
  flipped = np.asarray(augment.flip(batch, np.array([True, False, False, True])))
  assert flipped.dtype == np.uint8
  np.testing.assert_array_equal(flipped[[0, 3]], batch[[0, 3]][:, :, ::-1])
  np.testing.assert_array_equal(flipped[[1, 2]], batch[[1, 2]])


def test_every_offset_and_flip_is_about_equally_frequent():
  pad, count = 4, 162 * 200
  offsets, flips = jax.jit(augment.draw, static_argnums=2)(jax.random.key(3), jnp.arange(count), pad)
  assert offsets.shape == (count, 2)
  outcome = (np.asarray(offsets) @ [9, 1]) * 2 + np.asarray(flips)
  frequency = np.bincount(outcome, minlength=162)
  assert len(frequency) == 162
  chi_squared = ((frequency - 200) ** 2 / 200).sum()
  assert 90 < chi_squared < 240, "161 degrees of freedom: 161 +- 18 is expected of independent uniform draws"


def test_draws_depend_on_key_and_position_only():
  positions = jnp.array([5, 0, 300, 5])
  offsets, flips = augment.draw(jax.random.key(0), positions, 40)
  assert (offsets[0] == offsets[3]).all()
  assert flips[0] == flips[3]
  alone, _ = augment.draw(jax.random.key(0), jnp.array([300]), 40)
  np.testing.assert_array_equal(alone[0], offsets[2])
  other, _ = augment.draw(jax.random.key(1), positions, 40)
  assert (other != offsets).any(axis=1).all()


def arrays_of(batch):
  mean, std = images.channel_statistics(batch)
  return {"images": batch, "labels": np.arange(len(batch), dtype=np.int32), "mean": mean, "std": std}


def grey_levels(arrays, inputs):
  """Undoes the normalisation, whose last bit may depend on how the compiler fuses it."""
  return np.round((np.asarray(inputs) * arrays["std"] + arrays["mean"]) * 255).astype(np.uint8)


@pytest.mark.parametrize(("pad", "flip"), [(4, True), (0, True), (2, False)])
@pytest.mark.parametrize("parts", [2, 4])
def test_augmentation_does_not_depend_on_how_the_batch_is_split(pad, flip, parts):
  arrays = arrays_of(random_images(64))
  fetch = jax.jit(images.make_fetch(pad, flip, arrays["images"].shape[1:]), static_argnames="train")
  key, index = jax.random.key(7), np.random.default_rng(1).permutation(64).astype(np.int32)[:32]
  positions = np.arange(32)
  whole = fetch(arrays, index, key=key, positions=positions, train=True)
  split = [
    fetch(arrays, i, key=key, positions=p, train=True)
    for i, p in zip(np.split(index, parts), np.split(positions, parts), strict=True)
  ]
  expected = grey_levels(arrays, whole.inputs)
  assert (expected != arrays["images"][index]).any(), "nothing was augmented"
  assert np.concatenate([grey_levels(arrays, part.inputs) for part in split]).tobytes() == expected.tobytes()
  np.testing.assert_array_equal(np.concatenate([part.labels for part in split]), index)


def test_fetch_augments_with_the_drawn_offsets_and_flips():
  arrays = arrays_of(random_images(16))
  key, positions, index = jax.random.key(2), np.arange(100, 116), np.arange(16, dtype=np.int32)
  got = images.make_fetch(3, True, arrays["images"].shape[1:])(arrays, index, key=key, positions=positions, train=True)
  offsets, flips = augment.draw(key, positions, 3)
  padded = np.pad(arrays["images"], ((0, 0), (3, 3), (3, 3), (0, 0)), mode="reflect")
  for i, (y, x) in enumerate(np.asarray(offsets)):
    image = padded[i, y : y + 12, x : x + 10]
    np.testing.assert_array_equal(grey_levels(arrays, got.inputs[i]), image[:, ::-1] if flips[i] else image)


@pytest.mark.parametrize(("pad", "flip", "train"), [(4, True, False), (0, False, True)])
def test_images_stay_as_they_are(pad, flip, train):
  arrays = arrays_of(random_images(9))
  index = np.arange(9, dtype=np.int32)
  got = images.make_fetch(pad, flip, arrays["images"].shape[1:])(arrays, index, key=None, positions=None, train=train)
  np.testing.assert_array_equal(grey_levels(arrays, got.inputs), arrays["images"])


def test_padding_rows_are_masked_and_finite():
  arrays = arrays_of(random_images(3))
  got = images.make_fetch(0, False, arrays["images"].shape[1:])(
    arrays, jnp.array([2, -1, 0, -1]), key=None, positions=None, train=False
  )
  np.testing.assert_array_equal(got.mask, [True, False, True, False])
  # A padding row only has to keep the loss finite: no label outside the classes, no infinite pixel.
  np.testing.assert_array_equal(got.labels, [2, 0, 0, 0])
  assert np.isfinite(got.inputs).all()
  assert (got.inputs.dtype, got.labels.dtype, got.mask.dtype) == (np.float32, np.int32, np.bool_)


def test_fetch_is_one_object_for_one_behaviour():
  shape = (8, 8, 1)
  assert images.make_fetch(4, True, shape) is images.make_fetch(4, True, shape)
  assert images.make_fetch(4, True, shape) is not images.make_fetch(4, False, shape)


def test_packed_images_give_the_same_mini_batch():
  arrays = arrays_of(random_images(9))
  packed = images.pack(arrays)
  assert packed["images"].shape == (9, arrays["images"][0].size)
  fetch = functools.partial(images.make_fetch(2, True, arrays["images"].shape[1:]), key=jax.random.key(1), train=True)
  index = np.array([3, 8, -1, 0], np.int32)
  plain, flat = (fetch(given, index, positions=np.arange(4)) for given in (arrays, images.pack(packed)))
  jax.tree.map(np.testing.assert_array_equal, plain, flat)

"""Augmentations: against NumPy, in distribution, and independent of how a batch is split over devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ban_jax import devices as devices_lib
from ban_jax import step
from ban_jax.data import augment, images
from ban_jax.keys import KEYS


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


# --- Of normalised images ---------------------------------------------------------------------------------------------


def chosen(*names, **options):
  """Returns augmentations with their default options, or with these."""
  group = {name.removeprefix("data."): key.default for name, key in KEYS.items()}
  return augment.choose(names, {**group, **options})


def pixels(count=2000, height=8, width=8, channels=3, seed=0):
  return np.random.default_rng(seed).normal(size=(count, height, width, channels)).astype(np.float32)


def each(function, count, *images, **options):
  """Returns what a function of one image makes of each, by keys of their own."""
  keys = jax.random.split(jax.random.key(0), count)
  return jax.jit(jax.vmap(functools.partial(function, **options)))(*images, keys)


def test_mixup_is_a_weighted_mean():
  one, other = pixels(seed=1), pixels(seed=2)
  mixed, share = each(augment.mixup, 2000, one, other, mixup_alpha=0.4)
  weight = np.asarray(share)[:, None, None, None]
  np.testing.assert_allclose(mixed, weight * one + (1 - weight) * other, atol=1e-5)
  # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1)).
  np.testing.assert_allclose((share.mean(), share.var()), (0.5, 1 / 7.2), atol=0.02)


def test_cutmix_is_a_rectangle_and_its_share_is_the_area():
  one, other = np.zeros((2000, 8, 10, 1), np.float32), np.ones((2000, 8, 10, 1), np.float32)
  mixed, share = each(augment.cutmix, 2000, one, other, cutmix_alpha=1.0)
  mixed = np.asarray(mixed)[..., 0]
  np.testing.assert_allclose(share, 1 - mixed.mean((1, 2)), atol=1e-6)
  assert (mixed == mixed.max(1, keepdims=True) * mixed.max(2, keepdims=True)).all()  # a rectangle, or nothing
  assert 0.55 < share.mean() < 0.75  # 1/2 and what is cut off at the border


def test_erasing_changes_a_rectangle_of_some_images():
  images = pixels(height=32, width=32, channels=1)
  changed = np.asarray(each(augment.erasing, 2000, images, erasing=0.25) != images)[..., 0]
  assert 0.2 < changed.any((1, 2)).mean() < 0.3
  assert (changed == changed.any(1, keepdims=True) & changed.any(2, keepdims=True)).mean() > 0.999
  assert 0.05 < changed[changed.any((1, 2))].mean() < 0.2


def test_a_resized_crop_of_all_is_the_image_and_of_a_part_a_stretched_part():
  ramp = np.broadcast_to(np.linspace(-1, 1, 16, dtype=np.float32), (500, 16, 16))[..., None]
  whole = np.asarray(each(augment.random_resized_crop, 500, ramp, crop_area=1.0))
  slopes = np.diff(np.asarray(each(augment.random_resized_crop, 500, ramp, crop_area=0.1))[:, 8, 4:12, 0]).mean(1)
  step = 2 / 15
  np.testing.assert_allclose(whole[:, :, 1:-1].mean(), 0, atol=0.02)
  assert (np.diff(whole[:, 8, 2:-2, 0]).mean(1) > 0.8 * step).all()  # of an aspect other than 1 a little is cut off
  assert (slopes < 1.01 * step).all()
  assert slopes.min() < 0.45 * step
  assert np.abs(whole).max() <= 1.001


def test_every_distortion_is_about_equally_frequent_and_none_at_strength_0():
  images = np.repeat(pixels(1, 16, 16), 1000, 0)
  same = each(augment.randaugment, 1000, images, distortions=2, distortion_strength=0.0)
  np.testing.assert_allclose(same, images, atol=1e-5)
  done = np.asarray(each(augment.randaugment, 1000, images, distortions=1, distortion_strength=0.7)).round(3)
  kinds, counts = np.unique(done.reshape(1000, -1), axis=0, return_counts=True)
  assert len(kinds) == 2 * len(augment.DISTORTIONS) - 1  # to either side, but "none"
  assert counts.min() > 25
  assert counts.max() > 75
  assert np.isfinite(done).all()


def mapped(fetch, arrays, view, count):
  """Returns what a step's mini-batch of 16 examples is on so many devices, and what the teacher sees."""

  def rows(feed, key_data):
    drawn = step.batch_of(fetch, arrays, feed, key_data, jnp.int32(3), view)
    return drawn.batch.inputs, drawn.batch.targets, drawn.batch.labels, drawn.shown.inputs

  run = devices_lib.pmap(rows, devices=tuple(jax.devices()[:count]), in_axes=(0, None))
  found = run({"index": np.arange(16, dtype=np.int32).reshape(count, -1)}, jax.random.key_data(jax.random.key(5)))
  return [np.asarray(leaf).reshape(16, *leaf.shape[2:]) for leaf in found]


def placed():
  arrays = arrays_of(random_images(16, 8, 8))
  return jax.tree.map(jnp.asarray, arrays | {"labels": arrays["labels"] % 4})


def test_augmentations_do_not_depend_on_the_number_of_devices():
  fetch = images.make_fetch(1, True, (8, 8, 3), chosen("random_resized_crop", "cutmix", "mixup"), 4)
  one, four = (mapped(fetch, placed(), "same", count) for count in (1, 4))
  for a, b in zip(one, four, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  inputs, targets, labels, shown = one
  np.testing.assert_array_equal(shown, inputs)
  np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-5)
  np.testing.assert_array_equal(labels, targets.argmax(1))
  # An example's own class and the next ones'; after the last comes the first.
  assert (targets[np.arange(16), np.arange(16) % 4] > 0).all()
  assert (targets > 0).sum(1).max() == 3


def test_the_teacher_may_be_shown_other_images_as_a_control():
  fetch = images.make_fetch(1, False, (8, 8, 3), chosen("erasing", erasing=1.0), 4)
  own, targets, _, plain = mapped(fetch, placed(), "plain", 2)
  again, _, _, other = mapped(fetch, placed(), "other", 2)
  as_they_are = fetch(placed(), np.arange(16), key=None, positions=None, train=False)
  np.testing.assert_allclose(plain, as_they_are.inputs, atol=1e-5)
  np.testing.assert_array_equal(own, again)
  np.testing.assert_array_equal(targets, np.arange(16) % 4)
  assert (np.abs(np.stack([own - plain, own - other, other - plain])).max((2, 3, 4)) > 0.3).all()

"""The losses against their definitions in the paper, for any logits that hypothesis can think of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ban_jax import errors, gradient, losses

ROWS, CLASSES = 4, 5
KEY = jax.random.key(0)
POSITIONS = jnp.arange(ROWS)

# XLA flushes subnormal numbers to zero.
logits_arrays = hnp.arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-20, 20, width=32, allow_subnormal=False))
labels_arrays = hnp.arrays(np.int32, (ROWS,), elements=st.integers(0, CLASSES - 1))
weights = st.floats(0.01, 4)
fast = settings(max_examples=60, deadline=None)


def loss(name, **options):
  defaults = {"temperature": 1.0, "label_weight": 0.5, "teacher_weight": 0.5, "smoothing": 0.1}
  return losses.make_loss({"name": name, **defaults, **options})


@functools.cache
def compiled(chosen):
  """Returns the loss's (values, weights) and the gradient of the summed values, both jitted."""

  def apply(z, y, t, key, positions):
    return chosen.apply(z, y, t, key=key, positions=positions)

  return jax.jit(apply), jax.jit(jax.grad(lambda *args: apply(*args)[0].sum()))


def eager(chosen, z, y, t):
  """Returns the values without compiling anew for every drawn option."""
  return np.asarray(chosen.apply(z, y, t, key=KEY, positions=POSITIONS)[0])


def values_of(chosen, z, y, t):
  return [np.asarray(x) for x in compiled(chosen)[0](z, y, t, KEY, POSITIONS)]


def gradient_of(chosen, z, y, t):
  return np.asarray(compiled(chosen)[1](z, y, t, KEY, POSITIONS))


permute = jax.jit(losses.permute_dark)


def softmax(x):
  x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


@fast
@given(logits_arrays, labels_arrays, logits_arrays)
def test_ban_gradient_is_the_difference_of_the_softmaxes(z, y, t):
  np.testing.assert_allclose(gradient_of(loss("ban"), z, y, t), softmax(z) - softmax(t), atol=1e-5)  # Eq. 5


@fast
@given(logits_arrays, labels_arrays)
def test_ban_gradient_is_the_label_gradient_for_a_one_hot_teacher(z, y):
  one_hot = np.where(np.arange(CLASSES) == y[:, None], 0, -1e4).astype(np.float32)
  np.testing.assert_allclose(
    gradient_of(loss("ban"), z, y, one_hot), gradient_of(loss("label"), z, y, one_hot), atol=1e-5
  )  # Eq. 6
  np.testing.assert_allclose(values_of(loss("ban"), z, y, one_hot)[0], values_of(loss("label"), z, y, z)[0], atol=1e-4)


@fast
@given(logits_arrays, labels_arrays)
def test_a_student_equal_to_its_teacher_has_no_ban_gradient(z, y):
  np.testing.assert_allclose(gradient_of(loss("ban"), z, y, z), 0, atol=1e-6)


@fast
@given(logits_arrays, labels_arrays, logits_arrays, st.sampled_from(["ban", "dkpp"]))
def test_gradient_rows_sum_to_zero(z, y, t, name):
  np.testing.assert_allclose(gradient_of(loss(name), z, y, t).sum(-1), 0, atol=1e-5)


@fast
@given(logits_arrays, labels_arrays, st.floats(0, 10))
def test_cwtm_with_a_constant_confidence_is_mean_cross_entropy(z, y, scale):
  t = np.zeros((ROWS, CLASSES), np.float32)
  t[np.arange(ROWS), np.arange(ROWS)] = scale  # the same confidence in another class for each row
  values, confidence = values_of(loss("cwtm"), z, y, t)
  plain = values_of(loss("label"), z, y, t)[0]
  np.testing.assert_allclose((values * confidence).sum() / confidence.sum(), plain.mean(), rtol=1e-5, atol=1e-6)


@fast
@given(logits_arrays, labels_arrays, logits_arrays)
def test_cwtm_weights_are_the_teachers_largest_probabilities(z, y, t):
  np.testing.assert_allclose(values_of(loss("cwtm"), z, y, t)[1], softmax(t).max(-1), rtol=1e-5)  # Eq. 10


@fast
@given(logits_arrays, labels_arrays, logits_arrays, weights, weights)
def test_ban_label_is_linear_in_its_weights(z, y, t, a, b):
  combined = eager(loss("ban_label", label_weight=a, teacher_weight=b), z, y, t)
  parts = a * values_of(loss("label"), z, y, t)[0] + b * values_of(loss("ban"), z, y, t)[0]
  np.testing.assert_allclose(combined, parts, rtol=1e-5, atol=1e-5)


@fast
@given(logits_arrays, st.integers(0, 2**31 - 1))
def test_dkpp_keeps_the_argmax_and_the_multiset(t, seed):
  permuted = np.asarray(permute(t, jax.random.key(seed), POSITIONS))
  rows, top = np.arange(ROWS), t.argmax(-1)
  np.testing.assert_array_equal(permuted[rows, top], t[rows, top])
  np.testing.assert_array_equal(np.sort(permuted), np.sort(t))
  np.testing.assert_allclose(softmax(permuted).sum(-1), 1, rtol=1e-9)


def test_dkpp_permutes_every_row_on_its_own_afresh_and_uniformly():
  t = jnp.asarray(np.tile([9.0, 1, 2, 3, 4], (6000, 1)), jnp.float32)
  permuted = np.asarray(permute(t, KEY, jnp.arange(len(t))))
  assert (permuted[:, 0] == 9).all()
  orders, counts = np.unique(permuted, axis=0, return_counts=True)
  assert len(orders) == 24  # all orders of four outputs,
  assert counts.min() > 180  # 250 times each, within 4.5 standard deviations
  assert counts.max() < 320
  again = np.asarray(permute(t, jax.random.key(1), jnp.arange(len(t))))
  assert (again != permuted).any(-1).mean() > 0.9


def test_dkpp_does_not_depend_on_how_the_batch_is_cut():
  t = jax.random.normal(KEY, (8, CLASSES))
  whole = permute(t, KEY, jnp.arange(8))
  halves = [permute(t[i : i + 4], KEY, jnp.arange(i, i + 4)) for i in (0, 4)]
  np.testing.assert_array_equal(whole, jnp.concatenate(halves))


@fast
@given(logits_arrays, labels_arrays, st.floats(0, 9, width=32))
def test_dkpp_equals_ban_where_the_dark_outputs_are_equal(z, y, scale):
  t = np.where(np.arange(CLASSES) == y[:, None], scale, 0).astype(np.float32)
  np.testing.assert_allclose(values_of(loss("dkpp"), z, y, t)[0], values_of(loss("ban"), z, y, t)[0], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", ["ban", "ban_label"])
def test_temperature_softens_both_and_rescales(name, temperature):
  z, t = np.asarray(jax.random.normal(KEY, (2, ROWS, CLASSES))) * 5
  chosen = loss(name, temperature=temperature, label_weight=0.0, teacher_weight=1.0)
  expected = temperature * (softmax(z / temperature) - softmax(t / temperature))  # T^2 / T
  np.testing.assert_allclose(gradient_of(chosen, z, np.zeros(ROWS, np.int32), t), expected, atol=1e-4)


@fast
@given(logits_arrays, labels_arrays, st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_label_smoothing(z, y, smoothing):
  targets = (1 - smoothing) * np.eye(CLASSES)[y] + smoothing / CLASSES
  chosen = loss("label_smoothing", smoothing=smoothing)
  assert not chosen.needs_teacher
  np.testing.assert_allclose(gradient_of(chosen, z, y, None), softmax(z) - targets, atol=1e-4)


@fast
@given(logits_arrays, labels_arrays, logits_arrays)
def test_matched_smoothing_has_the_teachers_entropy_and_nothing_else_of_it(z, y, t):
  targets = softmax(z) - np.asarray(gradient_of(loss("entropy_matched_smoothing"), z, y, t), np.float64)
  taught = softmax(t)
  entropies = [-np.sum(np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0), -1) for p in (targets, taught)]
  np.testing.assert_allclose(*entropies, atol=2e-3)
  for row, own in zip(targets, y, strict=True):
    others = np.delete(row, own)
    np.testing.assert_allclose(others, others.mean(), atol=1e-4)
    assert row[own] >= others.max() - 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.1, 0.7, 1.0])
def test_the_smoothing_of_an_entropy(smoothing):
  targets = np.full(CLASSES, smoothing / CLASSES)
  targets[0] += 1 - smoothing
  entropy = -np.sum(np.where(targets > 0, targets * np.log(np.maximum(targets, 1e-300)), 0))
  found = losses.smoothing_of_entropy(jnp.asarray([entropy], jnp.float32), CLASSES)
  # Where all classes have the same probability, the entropy says next to nothing of the last of the smoothing.
  np.testing.assert_allclose(found, smoothing, atol=1e-6 if smoothing < 1 else 2e-3)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_for_huge_logits(name, dtype):
  z = jnp.asarray([[1e4, -1e4, 0], [-1e4, -1e4, 1e4], [0, 0, 0]], dtype)
  t = jnp.asarray([[-1e4, 1e4, 0], [1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype)
  y = jnp.asarray([0, 1, 2])
  chosen = loss(name)
  values, row_weights = chosen.apply(z, y, t, key=KEY, positions=jnp.arange(3))
  slope = jax.grad(lambda z: chosen.apply(z, y, t, key=KEY, positions=jnp.arange(3))[0].sum())(z)
  for x in (values, row_weights, slope):
    assert np.isfinite(np.asarray(x, np.float32)).all()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_tokens_have_a_value_each(name):
  shape = (2, 3, CLASSES)
  z, t = jax.random.normal(KEY, shape), jax.random.normal(jax.random.key(1), shape)
  y = jnp.asarray([[0, 1, 2], [3, 4, 0]])
  values, row_weights = loss(name).apply(z, y, t, key=KEY, positions=jnp.arange(2))
  assert values.shape == row_weights.shape == (2, 3)
  if name != "dkpp":  # which draws by the place in the window
    first, _ = loss(name).apply(z[:, 0], y[:, 0], t[:, 0], key=KEY, positions=jnp.arange(2))
    np.testing.assert_allclose(values[:, 0], first, rtol=1e-6)


@fast
@given(logits_arrays, labels_arrays, logits_arrays)
def test_gradient_split_adds_up(z, y, t):
  split = gradient.split_gradient(z, y, t)
  whole, rows = softmax(z) - softmax(t), np.arange(ROWS)
  np.testing.assert_allclose(split.correct, whole[rows, y], atol=1e-5)
  np.testing.assert_array_equal(np.asarray(split.dark)[rows, y], 0)
  np.testing.assert_allclose(np.asarray(split.dark).sum(-1), -np.asarray(split.correct), atol=1e-5)
  sums = {name: float(x) for name, x in gradient.split_sums(z, y, t, jnp.ones(ROWS, bool)).items()}
  summary = gradient.summarise({**sums, "count": ROWS})
  if (whole**2).sum() > 1e-6:
    expected = 1 - (whole[rows, y] ** 2).sum() / (whole**2).sum()
    np.testing.assert_allclose(summary["dark_share"], expected, atol=1e-4)
  np.testing.assert_allclose(summary["correct_gradient"], whole[rows, y].mean(), atol=1e-5)
  np.testing.assert_allclose(summary["teacher_confidence"], softmax(t).max(-1).mean(), atol=1e-5)
  entropy = -np.where(softmax(t) > 0, softmax(t) * np.log(np.maximum(softmax(t), 1e-300)), 0).sum(-1).mean()
  np.testing.assert_allclose(summary["teacher_entropy"], entropy, atol=1e-4)


def test_an_unknown_loss_lists_the_choices():
  names = "ban, ban_label, cwtm, dkpp, entropy_matched_smoothing, label, label_smoothing"
  with pytest.raises(errors.ConfigError, match=f"unknown loss 'kd'; choose one of: {names}"):
    losses.make_loss({"name": "kd"})


def test_equal_options_give_the_same_object():
  assert loss("ban") is loss("ban", label_weight=0.25)  # which ban does not read
  assert loss("ban_label") is not loss("ban_label", label_weight=0.25)

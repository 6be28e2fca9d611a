"""The compiled steps: gradients, normalisation, and exact evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ban_jax import data, losses, metrics, models, optim, step, teacher
from ban_jax import devices as devices_lib
from ban_jax.types import Batch, InputSpec, Model
from ban_jax.updates import Updates

SPEC = InputSpec("images", (6,), 3)


def linear(spec=SPEC):
  """Returns a linear classifier with a batch statistic, small enough to calculate by hand."""

  def init(key):
    kernel = jax.random.normal(key, (*spec.shape, spec.num_classes))
    return {"params": {"kernel": kernel, "bias": jnp.zeros(spec.num_classes)}, "batch_stats": {"seen": jnp.zeros(())}}

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    logits = inputs @ variables["params"]["kernel"] + variables["params"]["bias"]
    return logits, carry, {"seen": variables["batch_stats"]["seen"] + train}

  return Model("linear", spec, init, lambda batch: (), apply)


def fetch(arrays, index, *, key, positions, train):
  rows = jnp.maximum(index, 0)
  return Batch(arrays["inputs"][rows], arrays["labels"][rows], index >= 0)


@functools.cache
def arrays(n=64):
  rng = np.random.default_rng(0)
  return {"inputs": rng.normal(size=(n, 6)).astype(np.float32), "labels": rng.integers(0, 3, n).astype(np.int32)}


MODEL = linear()


def sgd():
  """Returns plain SGD with rate 1."""
  plain = {"learning_rate": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "boundaries": ()}
  return Updates(optim.make(config().optim.to_dict() | plain, 1).transformation)


def make_step(loss, members, devices, frozen=(), split=False, class_weights=(), mapping="pmap", teachers=()):
  group = {"name": loss, "temperature": 1.0, "label_weight": 0.3, "teacher_weight": 0.7, "smoothing": 0.1}
  return step.make_train_step(
    student=MODEL,
    teaching=teacher.live((MODEL,) * members, weights=teachers) if members else teacher.none(),
    frozen=frozen,
    loss=losses.weighted(losses.make_loss(group), class_weights) if class_weights else losses.make_loss(group),
    updates=sgd(),
    fetch=fetch,
    devices=devices,
    sync_batch_stats=True,
    gradient_split=split,
    mapping=mapping,
  )


def initial(frozen=()):
  variables = jax.device_get(MODEL.init(jax.random.key(1)))
  copied = {name: variables["params"][name] for name in frozen}
  return variables, jax.device_get(sgd().init(MODEL.init(jax.random.key(1)), copied))


def one_step(loss, teachers, index, devices, frozen=(), split=False, class_weights=(), weights=()):
  """Returns (variables before, state after, sums, placed teachers) of one step of plain SGD with rate 1."""
  train_step = make_step(loss, len(teachers), devices, frozen, split, class_weights, teachers=weights)
  variables, state = initial(frozen)
  placed = devices_lib.broadcast(tuple(teachers), devices)
  new_state, _, rows = train_step.run(
    devices_lib.broadcast(state, devices),
    placed,
    ((), ((),) * len(teachers)),
    devices_lib.broadcast(arrays(), devices),
    {"index": devices_lib.split_batches(np.asarray([index], np.int32), devices)},
    devices_lib.broadcast(jax.random.key_data(jax.random.key(3)), devices),
  )
  (row,) = devices_lib.unreplicate(rows)
  return variables, devices_lib.unreplicate(new_state), dict(zip(train_step.sums, row, strict=True)), placed


TEACHER = jax.device_get(MODEL.init(jax.random.key(9)))
OTHER = jax.device_get(MODEL.init(jax.random.key(10)))


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def expected_update(variables, index, gradient, row_weights):
  x = arrays()["inputs"][index]
  return variables["params"]["kernel"] - x.T @ (gradient * row_weights[:, None]) / row_weights.sum()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("loss", ["label", "ban", "cwtm"])
def test_one_step_is_the_formula_on_any_number_of_devices(loss, count):
  index = np.arange(16)
  before, after, sums, _ = one_step(loss, [TEACHER], index, tuple(jax.devices()[:count]))
  x, y = arrays()["inputs"][index], arrays()["labels"][index]
  q = softmax(x @ before["params"]["kernel"])
  p = softmax(x @ TEACHER["params"]["kernel"])
  one_hot = np.eye(3)[y]
  row_weights = p.max(-1) if loss == "cwtm" else np.ones(16)
  gradient = q - (p if loss == "ban" else one_hot)
  np.testing.assert_allclose(
    after.params["kernel"], expected_update(before, index, gradient, row_weights), rtol=2e-5, atol=1e-6
  )
  values = -np.sum((p if loss == "ban" else one_hot) * np.log(q), axis=-1)
  np.testing.assert_allclose(sums["loss"], (values * row_weights).sum(), rtol=1e-5)
  # CWTM's weights are each divided by this, their sum over the whole mini-batch (Eq. 10).
  np.testing.assert_allclose(sums["weight"], row_weights.sum(), rtol=1e-6)
  assert sums["count"] == 16
  assert sums["errors"] == (q.argmax(-1) != y).sum()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("loss", ["label", "ban", "cwtm"])
def test_class_weights_give_the_weighted_mean_on_any_number_of_devices(loss, count):
  index, by_class = np.arange(16), (0.5, 1.0, 4.0)
  before, after, sums, _ = one_step(loss, [TEACHER], index, tuple(jax.devices()[:count]), class_weights=by_class)
  x, y = arrays()["inputs"][index], arrays()["labels"][index]
  assert set(y) == {0, 1, 2}
  q, p = (softmax(x @ variables["params"]["kernel"]) for variables in (before, TEACHER))
  row_weights = np.array(by_class)[y] * (p.max(-1) if loss == "cwtm" else 1)
  gradient = q - (p if loss == "ban" else np.eye(3)[y])
  np.testing.assert_allclose(
    after.params["kernel"], expected_update(before, index, gradient, row_weights), rtol=2e-5, atol=1e-6
  )
  np.testing.assert_allclose(sums["weight"], row_weights.sum(), rtol=1e-6)
  assert sums["count"] == 16


@pytest.mark.parametrize("count", [1, 4])
@settings(max_examples=15, deadline=None)
@given(hnp.arrays(np.float32, (6, 3), elements=st.floats(-3, 3, width=32, allow_subnormal=False)))
def test_cwtm_weights_sum_to_one_over_the_global_batch(count, kernel):
  own = {"params": {"kernel": kernel, "bias": np.zeros(3, np.float32)}, "batch_stats": TEACHER["batch_stats"]}
  _, _, sums, _ = one_step("cwtm", [own], np.arange(16), tuple(jax.devices()[:count]))
  confidences = softmax(arrays()["inputs"][:16] @ kernel).max(-1)
  np.testing.assert_allclose((confidences / sums["weight"]).sum(), 1, rtol=1e-5)  # Eq. 10


def test_padding_rows_count_for_nothing():
  index = np.arange(12)
  _, plain, plain_sums, _ = one_step("cwtm", [TEACHER], index, tuple(jax.devices()[:1]))
  _, padded, padded_sums, _ = one_step("cwtm", [TEACHER], [*index, -1, -1, -1, -1], tuple(jax.devices()[:1]))
  np.testing.assert_allclose(padded.params["kernel"], plain.params["kernel"], rtol=1e-5, atol=1e-6)
  for name, value in plain_sums.items():
    np.testing.assert_allclose(padded_sums[name], value, rtol=1e-6)


@pytest.mark.parametrize("weights", [(), (0.9, 0.1)], ids=str)
def test_several_teachers_teach_by_their_mean_probabilities(weights):
  index = np.arange(16)
  before, after, _, _ = one_step("ban", [TEACHER, OTHER], index, tuple(jax.devices()[:4]), weights=weights)
  x = arrays()["inputs"][index]
  every = [softmax(x @ member["params"]["kernel"]) for member in (TEACHER, OTHER)]
  p = np.average(every, axis=0, weights=weights or None)
  q = softmax(x @ before["params"]["kernel"])
  np.testing.assert_allclose(
    after.params["kernel"], expected_update(before, index, q - p, np.ones(16)), rtol=2e-5, atol=1e-6
  )


def test_the_teacher_is_neither_changed_nor_donated_nor_differentiated():
  before = {path: leaf.tobytes() for path, leaf in TEACHER["params"].items()}
  _, _, _, (placed,) = one_step("ban", [TEACHER], np.arange(16), tuple(jax.devices()))
  assert {path: np.asarray(leaf).tobytes() for path, leaf in placed["params"].items()} == before
  assert float(np.asarray(placed["batch_stats"]["seen"])) == 0  # evaluation mode

  train_step = make_step("ban", 1, tuple(jax.devices()[:1]))

  def reported_loss(other):
    state = jax.tree.map(jnp.asarray, initial()[1])
    feed = {"index": jnp.arange(16, dtype=jnp.int32)[None, None]}
    key = jax.random.key_data(jax.random.key(3))
    rows = train_step.run(state, (other,), ((), ((),)), jax.tree.map(jnp.asarray, arrays()), feed, key)[2]
    return rows[..., train_step.sums.index("loss")].sum()

  for leaf in jax.tree.leaves(jax.grad(reported_loss)(jax.tree.map(jnp.asarray, TEACHER))):
    np.testing.assert_array_equal(leaf, 0)


def test_frozen_parameters_keep_their_bytes():
  before, after, _, _ = one_step("label", [], np.arange(16), tuple(jax.devices()[:4]), frozen=("bias",))
  assert after.params["bias"].tobytes() == before["params"]["bias"].tobytes()
  assert (after.params["kernel"] != before["params"]["kernel"]).all()
  assert not [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.shape == (3,)]  # no momentum either


def test_gradient_split_is_logged_over_all_devices():
  index = np.arange(16)
  before, _, sums, _ = one_step("ban", [TEACHER], index, tuple(jax.devices()), split=True)
  x, y = arrays()["inputs"][index], arrays()["labels"][index]
  p = softmax(x @ TEACHER["params"]["kernel"])
  difference = softmax(x @ before["params"]["kernel"]) - p
  correct = difference[np.arange(16), y]
  np.testing.assert_allclose(sums["correct"], correct.sum(), rtol=1e-4)
  np.testing.assert_allclose(sums["correct_squared"], (correct**2).sum(), rtol=1e-4)
  np.testing.assert_allclose(sums["dark_squared"], (difference**2).sum() - (correct**2).sum(), rtol=1e-4)
  np.testing.assert_allclose(sums["teacher_confidence"], p.max(-1).sum(), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shard_map_gives_the_bytes_of_pmap_and_donates(count):
  devices = tuple(jax.devices()[:count])
  found = []
  for mapping in ("pmap", "shard_map"):
    run = make_step("ban", 1, devices, mapping=mapping).run
    state, carry = devices_lib.broadcast(initial()[1], devices), ((), ((),))
    arguments = devices_lib.broadcast((arrays(), jax.random.key_data(jax.random.key(3))), devices)
    source = devices_lib.broadcast((TEACHER,), devices)
    for index in np.arange(32, dtype=np.int32).reshape(2, 1, 16):
      before, feed = state, {"index": devices_lib.split_batches(index, devices)}
      state, carry, rows = run(state, source, carry, arguments[0], feed, arguments[1])
      assert before.params["kernel"].is_deleted()
      assert not source[0]["params"]["kernel"].is_deleted()
    found.append([leaf.tobytes() for leaf in jax.tree.leaves(devices_lib.unreplicate((state, rows)))])
  assert found[0] == found[1]


@pytest.mark.parametrize("place", ["nowhere", "params", "batch_stats"])
def test_what_is_not_finite_is_seen_though_no_loss_shows_it(place):
  devices = tuple(jax.devices()[:2])
  _, state = initial(("bias",))
  if place == "params":  # of a class that no example has
    state.params["bias"] = np.array([0, 0, -np.inf], np.float32)
  if place == "batch_stats":
    state.batch_stats["seen"] = np.float32(np.inf)
  run = make_step("label", 0, devices, ("bias",))
  rows = run.run(
    devices_lib.broadcast(state, devices),
    (),
    ((), ()),
    devices_lib.broadcast(arrays(), devices),
    {"index": devices_lib.split_batches(np.flatnonzero(arrays()["labels"] < 2)[:32].reshape(2, 16), devices, block=4)},
    devices_lib.broadcast(jax.random.key_data(jax.random.key(3)), devices),
  )[2]
  found = dict(zip(run.sums, devices_lib.unreplicate(rows).T, strict=True))
  assert np.isfinite(found["loss"]).all()
  assert found["finite"].tolist() == [place == "nowhere"] * 2 + [0, 0]  # the last two only fill up the dispatch


def test_steps_are_the_same_object_for_equal_arguments():
  dataset = data.load(config().data)
  made = [models.make_model(config().model, dataset.spec) for _ in range(2)]
  assert made[0] is made[1]
  devices = tuple(jax.devices()[:2])
  assert step.make_eval_step((made[0],), dataset.fetch, devices) is step.make_eval_step(
    (made[1],), data.load(config().data).fetch, devices
  )


def test_the_top_class_is_that_of_argmax_and_the_first_of_equal_ones():
  logits = np.random.default_rng(0).integers(0, 4, (50, 7, 6)).astype(np.float32)  # many ties
  for label in range(6):
    labels = np.full((50, 7), label)
    np.testing.assert_array_equal(metrics.top1_correct(logits, labels), logits.argmax(-1) == label)
  logits[..., 2] = np.nan
  assert not metrics.top1_correct(logits, np.full((50, 7), 2)).any()
  assert not metrics.top1_correct(logits, np.full((50, 7), 1)).any()

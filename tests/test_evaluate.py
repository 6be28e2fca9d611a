"""Evaluation against numbers calculated by hand and by scikit-learn; every example once; ensembles."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from conftest import config

import ban_jax
from ban_jax import data, job, metrics, models, presets
from ban_jax.data import reading, text
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.evaluating import Subject, measure, measure_pairs, sum_predictions
from ban_jax.step import make_eval_step
from ban_jax.types import Batch

CFG = config()
WRN = "digits,wrn_10_1,smoke"


def network(seed):
  """Returns an untrained network's variables, with random batch statistics so that its outputs differ by input."""
  model = models.make_model(CFG.model, data.load(CFG.data).spec, sync_batch_stats=False)
  return jax.device_get(model.init(jax.random.key(seed)))


def probabilities(variables, split="test"):
  """Returns the softmax outputs over a split, computed outside of any step."""
  dataset = data.load(CFG.data)
  model = models.make_model(CFG.model, dataset.spec, sync_batch_stats=False)
  arrays, size = dataset.splits[split], dataset.sizes[split]
  batch = dataset.fetch(arrays, jnp.arange(size), key=None, positions=None, train=False)
  return np.asarray(jax.nn.softmax(model.apply(variables, (), batch.inputs, train=False)[0]), np.float64)


def labels(split="test"):
  return data.load(CFG.data).splits[split]["labels"]


def by_hand(p, y):
  p = p / p.sum(-1, keepdims=True)
  top = p.argmax(-1)
  confidence, correct = p.max(-1), top == y
  ece, edges = 0.0, np.linspace(0, 1, metrics.CALIBRATION_BINS + 1)
  for low, high in itertools.pairwise(edges):
    inside = (confidence > low) & (confidence <= high)
    if inside.any():
      ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
  return {
    "error": 100 * (1 - sklearn.metrics.accuracy_score(y, top)),
    "nll": sklearn.metrics.log_loss(y, p, labels=range(10)),
    "ece": ece,
    "brier": sum(sklearn.metrics.brier_score_loss(y == label, p[:, label]) for label in range(10)),
    "count": len(y),
  }


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("batch_size", [300, 1397])
def test_every_example_counts_once_whatever_the_batch_and_the_devices(count, batch_size):
  variables = network(0)
  cfg = config(evaluate__batch_size=batch_size)  # 1397 is prime: none of them divides, nor do 4 devices
  got = ban_jax.evaluate(variables, cfg, devices=jax.devices()[:count])
  for name, value in by_hand(probabilities(variables), labels()).items():
    np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)


def test_an_ensembles_probabilities_are_the_mean_of_its_members():
  members = [network(seed) for seed in range(3)]
  got = ban_jax.evaluate(members, CFG)
  mean = np.mean([probabilities(member) for member in members], axis=0)
  for name, value in by_hand(mean, labels()).items():
    np.testing.assert_allclose(got[name], value, rtol=2e-5, err_msg=name)
  alone = ban_jax.evaluate(members[0], CFG)
  assert ban_jax.evaluate([members[0]], CFG) == alone  # one model is an ensemble of one
  twice = ban_jax.evaluate([members[0], members[0]], CFG)
  np.testing.assert_allclose(twice["nll"], alone["nll"], rtol=1e-6)


def test_mean_probabilities_of_logits():
  logits = jnp.asarray([[[0.0, 0.0]], [[np.log(9.0), 0.0]]])  # (1/2, 1/2) and (9/10, 1/10)
  np.testing.assert_allclose(jnp.exp(metrics.mean_log_probabilities(list(logits))), [[0.7, 0.3]], rtol=1e-6)


def test_calibration_worked_out_by_hand():
  p = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.3, 0.7]])
  y = np.array([0, 1, 0, 1])
  mask = np.array([True, True, True, False])
  sums = metrics.prediction_sums(jnp.log(p), Batch(None, jnp.asarray(y), jnp.asarray(mask)))
  got = metrics.summarise(jax.device_get(sums))
  assert got["count"] == 3
  np.testing.assert_allclose(got["error"], 100 / 3)
  # Two at 0.95, one of them right; one at 0.6, right; the last is padding.
  np.testing.assert_allclose(got["ece"], (2 * abs(0.5 - 0.95) + abs(1 - 0.6)) / 3, rtol=1e-6)
  np.testing.assert_allclose(got["brier"], (2 * 0.05**2 + 2 * 0.95**2 + 2 * 0.4**2) / 3, rtol=1e-6)
  np.testing.assert_allclose(got["nll"], -np.log([0.95, 0.05, 0.6]).mean(), rtol=1e-6)


def test_other_splits():
  cfg = config(data__validation=0.3)
  assert ban_jax.evaluate(network(0), cfg, split="validation")["count"] == data.load(cfg.data).sizes["validation"]
  with pytest.raises(ConfigError, match="validation.*test, train"):
    ban_jax.evaluate(network(0), CFG, split="validation")
  with pytest.raises(ConfigError, match="at least one network"):
    ban_jax.evaluate([], CFG)
  with pytest.raises(ConfigError, match="a Generation or a sequence of them, not int"):
    ban_jax.evaluate([3], CFG)


def test_a_batch_larger_than_the_split_is_filled_up():
  got = ban_jax.evaluate(network(0), config(evaluate__batch_size=1000), split="train")
  assert got["count"] == 100
  np.testing.assert_allclose(got["nll"], by_hand(probabilities(network(0), "train"), labels("train"))["nll"], rtol=2e-5)


def watched(model, seen):
  """Returns the model; it notes how many rows a device gives it."""

  def apply(variables, carry, inputs, **options):
    seen.append(len(inputs))
    return model.apply(variables, carry, inputs, **options)

  return model._replace(apply=apply)


@pytest.mark.parametrize(("batch_size", "count", "rows"), [(1397, 1, 100), (98, 4, 25), (102, 4, 25), (60, 1, 60)])
def test_a_batch_larger_than_the_split_costs_no_padding(batch_size, count, rows):
  dataset, seen = data.load(CFG.data), []
  model = watched(models.make_model(CFG.model, dataset.spec), seen)
  got = measure(Subject((model,), (network(0),), dataset, tuple(jax.devices()[:count])), "train", batch_size)
  assert set(seen) == {rows}
  assert got["count"] == 100
  np.testing.assert_allclose(got["nll"], by_hand(probabilities(network(0), "train"), labels("train"))["nll"], rtol=2e-5)


@pytest.mark.parametrize("function", [ban_jax.evaluate, ban_jax.reliability, ban_jax.compare])
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"evaluate__batch_size": None}, "evaluate.batch_size is None: expected a whole number of at least 1"),
    ({"evaluate__batch_size": -1}, "evaluate.batch_size=-1: expected a whole number of at least 1"),
    ({"evaluate__batch_size": 0}, "evaluate.batch_size=0: expected a whole number of at least 1"),
    ({"evaluate__batch_size": True}, "evaluate.batch_size=True: expected a whole number of at least 1"),
    ({"evaluate__training_batch_size": -1}, "evaluate.training_batch_size=-1: expected a whole number of at least 0"),
    ({"model__depth": None}, "model.depth is None: expected a value"),
    ({"model__depth": 11}, "model.depth=11: a Wide-ResNet has depth 6n + 4"),
  ],
)
def test_configurations_that_cannot_be_evaluated_are_refused_as_those_that_cannot_be_run(function, changes, message):
  cfg = config(WRN, **changes)
  for call in (lambda: function(network(0), cfg), lambda: ban_jax.train_generation(None, cfg, progress=False)):
    with pytest.raises(ConfigError) as error:
      call()
    assert str(error.value).startswith(message)


def test_an_option_out_of_range_is_named_by_whose_it_is():
  cfg = config("digits,wrn_10_1,smoke,teacher=wrn_10_1")
  cfg.teacher.model.depth = 11
  with pytest.raises(ConfigError, match=r"^teacher\.model\.depth=11: a Wide-ResNet has depth"):
    ban_jax.evaluate(network(0), cfg)
  matched = config("digits,wrn_10_1,smoke,teacher=small_wide_match_1_1")
  matched.teacher.model.ratio = 0.3
  with pytest.raises(ConfigError, match=r"^teacher\.model\.ratio=0.3: .* of each of teacher\.model\.stages="):
    ban_jax.evaluate(network(0), matched)


def test_confidences_in_neighbouring_bins_do_not_cancel():
  p = np.full((2, 30), 1 / 30)  # right at a confidence of 1/30, in the lowest bin,
  p[1] = [0.1] + [0.9 / 29] * 29  # and wrong at 0.1, in the next
  sums = metrics.prediction_sums(jnp.log(p), Batch(None, jnp.asarray([0, 1]), jnp.ones(2, bool)))
  np.testing.assert_allclose(metrics.summarise(jax.device_get(sums))["ece"], ((1 - 1 / 30) + 0.1) / 2, rtol=1e-6)


# --- reliability diagrams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_the_bins_are_those_of_an_independent_count(count):
  members = [network(seed) for seed in range(2)]
  got = ban_jax.reliability(members, config(evaluate__batch_size=300), devices=jax.devices()[:count])
  p, y = np.mean([probabilities(member) for member in members], axis=0), labels()
  # Bins are (low, high]; none of these confidences is at an edge.
  places = np.digitize(p.max(-1), np.linspace(0, 1, 16)) - 1
  np.testing.assert_array_equal(got["count"], np.bincount(places, minlength=15))
  assert got["count"].dtype == np.int64
  assert len(set(places)) > 3, "the networks' confidences are too much alike to test anything"
  for place in range(15):
    inside = places == place
    if inside.any():
      np.testing.assert_allclose(got["confidence"][place], p.max(-1)[inside].mean(), rtol=2e-5)
      np.testing.assert_allclose(got["accuracy"][place], (p.argmax(-1) == y)[inside].mean(), rtol=2e-5)
    else:
      assert np.isnan([got["confidence"][place], got["accuracy"][place]]).all()
  gaps = np.nan_to_num(got["count"] * np.abs(got["accuracy"] - got["confidence"]))
  np.testing.assert_allclose(ban_jax.evaluate(members, CFG)["ece"], gaps.sum() / len(y), rtol=2e-5)


def test_bins_worked_out_by_hand():
  p = np.array([[0.95, 0.05], [0.97, 0.03], [0.6, 0.4], [0.3, 0.7]])
  mask = jnp.asarray([True, True, True, False])
  got = metrics.bins(jax.device_get(metrics.prediction_sums(jnp.log(p), Batch(None, jnp.asarray([0, 1, 0, 1]), mask))))
  expected = np.zeros(15, np.int64)
  expected[[8, 14]] = 1, 2  # 0.6 is in (8/15, 9/15]
  np.testing.assert_array_equal(got["count"], expected)
  np.testing.assert_allclose(got["confidence"][[8, 14]], [0.6, 0.96], rtol=1e-6)
  np.testing.assert_allclose(got["accuracy"][[8, 14]], [1, 0.5], rtol=1e-6)


# --- pairs of networks ------------------------------------------------------------------------------------------------


def pairs_by_hand(outputs):
  """Returns (agreement, KL(row || column)) of networks' outputs [examples, n], by scikit-learn and SciPy."""
  tops = [p.argmax(-1) for p in outputs]
  agreement = [[sklearn.metrics.accuracy_score(one, other) for other in tops] for one in tops]
  return agreement, [[scipy.stats.entropy(p, q, axis=-1).mean() for q in outputs] for p in outputs]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("batch_size", [300, 1397])
def test_every_pair_is_compared_on_every_example_once(count, batch_size):
  members = [network(seed) for seed in range(3)]
  cfg = config(evaluate__batch_size=batch_size)
  got = ban_jax.compare(members, cfg, devices=jax.devices()[:count])
  agreement, kl = pairs_by_hand([probabilities(member) for member in members])
  assert got["count"] == 1397
  np.testing.assert_allclose(got["agreement"], agreement, rtol=1e-12)
  np.testing.assert_allclose(got["kl"], kl, rtol=1e-4, atol=1e-7)
  assert (np.diag(got["agreement"]) == 1).all()
  assert (np.diag(got["kl"]) == 0).all()
  assert 0 < got["agreement"][0, 1] < 1, "the networks are too much alike, or too different, to test anything"
  assert got["kl"][0, 1] != pytest.approx(got["kl"][1, 0], rel=0.01), "rows and columns are mixed up"


def test_pairs_worked_out_by_hand():
  p = np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])  # of equal ones, the first
  q = np.array([[0.9, 0.1], [0.5, 0.5], [0.6, 0.4], [0.1, 0.9]])
  mask = jnp.asarray([True, True, True, False])
  shifted = jnp.log(q) + 7  # logits need not be normalised
  sums = jax.device_get(metrics.comparison_sums([jnp.log(p), shifted], Batch(None, jnp.zeros(4, int), mask)))
  assert sums["count"] == 3
  np.testing.assert_array_equal(sums["agreement"], [[3, 2], [2, 3]])
  one = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
  other = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
  third = 0.2 * np.log(0.2 / 0.6) + 0.8 * np.log(0.8 / 0.4)
  back = 0.6 * np.log(0.6 / 0.2) + 0.4 * np.log(0.4 / 0.8)
  np.testing.assert_allclose(sums["kl"], [[0, one + other + third], [other + one + back, 0]], rtol=1e-5, atol=1e-9)


def test_networks_of_nearly_the_same_outputs_are_told_apart():
  z = np.random.default_rng(0).normal(size=(64, 100))
  near = z + 1e-3 * np.random.default_rng(1).normal(size=z.shape)
  batch = Batch(None, jnp.zeros(64, int), jnp.ones(64, bool))
  got = metrics.comparison_sums([jnp.asarray(z, jnp.float32), jnp.asarray(near, jnp.float32)], batch)["kl"]
  softmax = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (z, near)]
  # About 5e-7 a row, where the entropies are about 4: a difference of the two would be noise.
  np.testing.assert_allclose(got[0, 1], scipy.stats.entropy(*softmax, axis=-1).sum(), rtol=0.05)


def test_pairs_are_refused_as_ensembles_are():
  with pytest.raises(ConfigError, match="validation.*test, train"):
    ban_jax.compare(network(0), CFG, split="validation")
  with pytest.raises(ConfigError, match="compare needs at least one network"):
    ban_jax.compare([], CFG)
  with pytest.raises(ConfigError, match="reliability needs at least one network"):
    ban_jax.reliability([], CFG)
  with pytest.raises(CheckpointError, match="member 2 does not fit"):
    ban_jax.compare([network(0), {"params": {}, "batch_stats": {}}], CFG)


# --- language models --------------------------------------------------------------------------------------------------


@functools.cache
def text_and_networks():
  """Returns a text of 103 tokens in windows of 10, two language models with large weights, and their variables."""
  parts = dict.fromkeys(("train", "validation", "test"), " ".join(f"w{(7 * i + i * i) % 23:02}" for i in range(102)))
  dataset = reading.build("cycle", parts, reading.Reading("words", eos=True), options=text.Options(0, 10))
  small = presets.MODELS["lstm_32"].to_dict()
  networks = tuple(models.make_model(small | {"layers": layers, "init_scale": 2.0}, dataset.spec) for layers in (1, 2))
  return dataset, networks, tuple(jax.device_get(model.init(jax.random.key(0))) for model in networks)


def stream_probabilities(dataset, networks, trees):
  """Returns the networks' softmax outputs [tokens, n], the whole stream read as a single window.

  So no state has to be carried, and the tokens end within what is their 11th window elsewhere.
  """
  inputs = dataset.splits["test"]["tokens"][None, :-1]
  return [
    np.asarray(jax.nn.softmax(model.apply(tree, model.init_carry(1), inputs, train=False)[0])[0], np.float64)
    for model, tree in zip(networks, trees, strict=True)
  ]


@pytest.mark.parametrize("count", [1, 4])
def test_language_models_are_compared_token_by_token_along_the_text(count):
  dataset, networks, trees = text_and_networks()
  got = measure_pairs(Subject(networks, trees, dataset, tuple(jax.devices()[:count])), "test", 1)
  agreement, kl = pairs_by_hand(stream_probabilities(dataset, networks, trees))
  assert got["count"] == dataset.sizes["test"] == 103
  np.testing.assert_allclose(got["agreement"], agreement, rtol=1e-12)
  np.testing.assert_allclose(got["kl"], kl, rtol=1e-3, atol=1e-6)
  assert got["kl"][0, 1] > 0.01


@pytest.mark.parametrize("count", [1, 4])
def test_an_ensemble_of_language_models_is_the_mean_of_their_probabilities_along_the_text(count):
  dataset, networks, trees = text_and_networks()
  got = measure(Subject(networks, trees, dataset, tuple(jax.devices()[:count])), "test", 1)
  labels = dataset.splits["test"]["tokens"][1:]
  members = [p / p.sum(-1, keepdims=True) for p in stream_probabilities(dataset, networks, trees)]
  mean = np.mean(members, axis=0)
  nll = -np.log(mean[np.arange(103), labels]).mean()
  assert got["count"] == 103
  np.testing.assert_allclose(got["nll"], nll, rtol=2e-5)
  np.testing.assert_allclose(got["perplexity"], np.exp(nll), rtol=1e-4)
  np.testing.assert_allclose(got["error"], 100 * (mean.argmax(-1) != labels).mean(), rtol=1e-6)
  geometric = np.exp(np.mean(np.log(members), axis=0))
  geometric /= geometric.sum(-1, keepdims=True)
  assert abs(-np.log(geometric[np.arange(103), labels]).mean() - nll) > 0.01, "another mean would not be noticed"


@pytest.mark.parametrize(("batch_size", "count", "windows"), [(1, 1, 11), (4, 4, 3)])
def test_several_windows_a_dispatch_are_those_of_one_at_a_time(batch_size, count, windows, monkeypatch):
  # On four devices, the last one's third window is padding, which the others must not leave out with it.
  dataset, networks, trees = text_and_networks()
  subject, dispatched = Subject(networks, trees, dataset, tuple(jax.devices()[:count])), []

  def counting(*arguments):
    step = make_eval_step(*arguments)
    return step._replace(run=lambda *inputs: dispatched.append(inputs[3]["index"].shape[1]) or step.run(*inputs))

  monkeypatch.setitem(sum_predictions.__globals__, "make_eval_step", counting)
  found = {}
  for block in (1, 2, 32):
    monkeypatch.setattr(job, "BLOCK", block)
    found[block] = sum_predictions(subject, "test", batch_size)
    assert dispatched == [block] * -(-windows // block)
    dispatched.clear()
  assert found[1]["count"] == 103
  for block in (2, 32):
    for name, value in found[1].items():
      np.testing.assert_allclose(found[block][name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
  ("batch_size", "count", "rows"),
  [(11, 1, 11), (1000, 1, 11), (12, 4, 3), (1000, 4, 3), (13, 4, 3), (11, 4, 11), (7, 1, 7)],
)
def test_a_batch_of_more_rows_than_windows_costs_no_padding(batch_size, count, rows):
  dataset, networks, trees = text_and_networks()  # 11 windows, the last of 3 tokens
  seen = []
  model = watched(networks[1], seen)
  got = measure(Subject((model,), trees[1:], dataset, tuple(jax.devices()[:count])), "test", batch_size)
  assert set(seen) == {rows}
  assert got["count"] == 103
  # Each row starts from a zero state: with as many rows as windows, every window does.
  tokens = np.append(dataset.splits["test"]["tokens"], [0] * 7)
  each = -(-11 // batch_size) * 10
  logs = [
    jax.nn.log_softmax(model.apply(trees[1], model.init_carry(1), tokens[None, start : start + each], train=False)[0])[
      0
    ]
    for start in range(0, 110, each)
  ]
  own = np.concatenate(logs)[:103]
  np.testing.assert_allclose(got["nll"], -own[np.arange(103), tokens[1:104]].mean(), rtol=2e-5)

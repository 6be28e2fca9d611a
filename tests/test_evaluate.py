"""Evaluation against numbers worked out by hand and by scikit-learn; every example once; ensembles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from conftest import config

import ban_jax
from ban_jax import data, models, step
from ban_jax.errors import ConfigError
from ban_jax.evaluate import summarise
from ban_jax.types import Batch

CFG = config()


def network(seed):
  """Returns an untrained network's variables, its batch statistics made up so that its outputs differ by input."""
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
  ece, edges = 0.0, np.linspace(0, 1, step.CALIBRATION_BINS + 1)
  for low, high in itertools.pairwise(edges):
    inside = (confidence > low) & (confidence <= high)
    if inside.any():
      ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
  return {
    "error": 100 * (1 - sklearn.metrics.accuracy_score(y, top)),
    "nll": sklearn.metrics.log_loss(y, p, labels=range(10)),
    "ece": ece,
    "brier": ((p - np.eye(10)[y]) ** 2).sum(-1).mean(),
    "count": len(y),
  }


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("batch_size", [300, 1397, 2000])
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
  np.testing.assert_allclose(jnp.exp(step.mean_probabilities(list(logits))), [[0.7, 0.3]], rtol=1e-6)


def test_calibration_worked_out_by_hand():
  p = np.array([[0.95, 0.05], [0.95, 0.05], [0.6, 0.4], [0.3, 0.7]])
  y = np.array([0, 1, 0, 1])
  mask = np.array([True, True, True, False])
  sums = step.prediction_sums(jnp.log(p), Batch(None, jnp.asarray(y), jnp.asarray(mask)))
  got = summarise(jax.device_get(sums))
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


def test_confidences_in_neighbouring_bins_do_not_cancel():
  p = np.full((2, 30), 1 / 30)  # right at a confidence of 1/30, in the lowest bin,
  p[1] = [0.1] + [0.9 / 29] * 29  # and wrong at 0.1, in the next
  sums = step.prediction_sums(jnp.log(p), Batch(None, jnp.asarray([0, 1]), jnp.ones(2, bool)))
  np.testing.assert_allclose(summarise(jax.device_get(sums))["ece"], ((1 - 1 / 30) + 0.1) / 2, rtol=1e-6)

"""Schedules and optimizers against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from ban_jax import optim
from ban_jax.presets import base

OPTIM = base.get_config().optim.to_dict()


def test_the_papers_steps():
  schedule = optim.make_schedule(OPTIM, 200)
  rates = [float(schedule(epoch)) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
  np.testing.assert_allclose(rates, np.repeat([0.1, 0.02, 0.004, 0.0008], 2), rtol=1e-6)


def test_cosine_falls_from_the_peak_to_zero():
  schedule = optim.make_schedule(OPTIM | {"schedule": "cosine"}, 100)
  np.testing.assert_allclose([float(schedule(s)) for s in (0, 50, 100)], [0.1, 0.05, 0], atol=1e-8)


def test_sgd_with_coupled_weight_decay_and_nesterov_momentum():
  optimizer = optim.make_optimizer(OPTIM | {"boundaries": ()}, 10)
  params = {"w": jnp.asarray([1.0, -2.0]), "scale": jnp.asarray([0.5])}
  state = optimizer.init(params)
  w, velocity = np.array([1.0, -2.0]), np.zeros(2)
  for gradient in ([0.3, 0.1], [-0.2, 0.4], [0.5, 0.5]):
    gradients = {"w": jnp.asarray(gradient), "scale": jnp.zeros(1)}
    updates, state = optimizer.update(gradients, state, params)
    params = {name: params[name] + updates[name] for name in params}
    g = np.array(gradient) + 5e-4 * w
    velocity = 0.9 * velocity + g
    w = w - 0.1 * (g + 0.9 * velocity)
    np.testing.assert_allclose(params["w"], w, rtol=1e-6)
  assert float(params["scale"][0]) < 0.5  # decay reaches every parameter


@pytest.mark.parametrize(("largest", "expected"), [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_clipping_by_the_global_norm(largest, expected):
  plain = {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "boundaries": (), "clip_norm": largest}
  optimizer = optim.make_optimizer(OPTIM | plain, 10)
  gradient = {"w": jnp.asarray([3.0, 4.0])}
  updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
  np.testing.assert_allclose(np.linalg.norm(updates["w"]), expected, rtol=1e-6)

"""One door for what the caller gives: a Setup in place of the configuration and its companions."""

import jax
import numpy as np
import pytest
from conftest import config

import ban_jax
from ban_jax import trees
from ban_jax.errors import ConfigError

QUIET = {"progress": False}


@pytest.fixture
def cfg():
  return config("digits,own,smoke", generations=1, train__batch_size=8)


def test_a_setup_takes_the_place_of_the_configuration_in_every_function(cfg, tiny, tmp_path):
  task = ban_jax.setup(cfg, **tiny)
  cfg.train.epochs = 1  # too late
  teacher = ban_jax.train_generation(None, task, **QUIET)
  with pytest.raises(AttributeError, match="immutable"):
    task.cfg.train.epochs = 1
  cfg.train.epochs = 2
  assert trees.digest(ban_jax.train_generation(None, cfg, **tiny, **QUIET).params) == trees.digest(teacher.params)
  run = ban_jax.run(task, tmp_path, **QUIET)
  assert trees.digest(run[0].params) == trees.digest(teacher.params)
  assert ban_jax.run(cfg, tmp_path, **tiny, **QUIET)[1].metrics == run[1].metrics  # the same run
  assert ban_jax.evaluate(run, task) == ban_jax.evaluate(run, cfg, **tiny)
  for function in (ban_jax.reliability, ban_jax.compare):
    one, other = function(run, task), function(run, cfg, **tiny)
    assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)
  assert trees.digest(ban_jax.average(run, task).params) == trees.digest(ban_jax.average(run, cfg, **tiny).params)
  assert ban_jax.with_network(teacher.params, task).network.own is tiny["model"]
  assert repr(task).startswith("Setup(Dataset('arrays', images (4, 4, 1), 4 classes")


def test_what_is_given_twice_or_does_not_fit_is_refused(cfg, tiny):
  task = ban_jax.setup(cfg, **tiny)
  with pytest.raises(ConfigError, match="^model, devices: a Setup was given in place of cfg; give this to"):
    ban_jax.evaluate({}, task, model=tiny["model"], devices=jax.devices())
  with pytest.raises(ConfigError, match="train.epochs=0: expected a whole number of at least 1"):
    ban_jax.setup(config(train__epochs=0))
  with pytest.raises(ConfigError, match="model must be a Model, as ban_jax.from_flax returns it, not int"):
    ban_jax.setup(cfg, model=3)

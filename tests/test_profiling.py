"""A profiler's trace of a few steps: which ones, and that it changes no byte."""

import gzip
import json
import logging

import jax
import pytest
from conftest import config

import ban_jax
from ban_jax import profiling, trees


def trained(devices, epochs):
  cfg = config(train__epochs=epochs, train__evaluate_every=0)
  params = ban_jax.train_generation(None, cfg, devices=jax.devices()[:devices], progress=False).params
  return trees.digest(trees.to_plain(params))


def test_three_warm_dispatches_of_the_next_training_are_traced(tmp_path):
  ban_jax.trace_steps(tmp_path / "trace")
  traced = trained(2, 2)
  (found,) = (tmp_path / "trace").rglob("*.trace.json.gz")
  assert len(list(found.parent.glob("*.xplane.pb"))) == 1
  names = [event.get("name", "") for event in json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]]
  assert sum(name.startswith("$train.py:") and name.endswith(" _dispatch") for name in names) == len(profiling.TRACED)
  assert sum(name.startswith("ThunkExecutor") for name in names) >= len(profiling.TRACED) * 2  # XLA's own
  assert trained(2, 2) == traced  # and it is not traced again
  assert len(list((tmp_path / "trace").rglob("*.xplane.pb"))) == 1


def test_a_training_too_short_to_be_warm_leaves_a_warning(tmp_path, caplog):
  ban_jax.trace_steps(tmp_path / "trace")
  with caplog.at_level(logging.WARNING, "ban_jax"):
    trained(1, 1)
  assert f"no trace in {tmp_path}/trace: the training had 5 dispatches, too few to be warm" in caplog.text
  assert not list((tmp_path / "trace").iterdir())


def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="file"):
    ban_jax.trace_steps(tmp_path / "file")

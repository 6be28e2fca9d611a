"""What becomes of a step's gradient: sums over several mini-batches, and averages of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import config

import ban_jax
from ban_jax import devices as devices_lib
from ban_jax import optim, storage, trees
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.updates import Updates

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def one(tiny):
  """Returns the arguments of a tiny training on one device, 48 examples, and a teacher."""
  one = {**tiny, "devices": jax.devices()[:1]}
  return one, ban_jax.train_generation(None, short(), **one, **QUIET)


def short(**changes):
  changes = {"train__epochs": 2, "train__batch_size": 10, "optim__warmup": 0.3, "optim__clip_norm": 0.5} | changes
  return config("digits,own,smoke,adamw,cwtm", **changes)


def interrupted(*_):
  raise KeyboardInterrupt


def test_several_mini_batches_are_one_as_large(one):
  one, teacher = one
  # 48 examples: nine mini-batches of 5, of which the last one is too little for an update. CWTM's weights differ.
  large, small = (
    ban_jax.train_generation(teacher, short(**changes), **one, **QUIET)
    for changes in ({}, {"train__batch_size": 5, "train__accumulate": 2})
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), large.params, small.params)
  assert [row["step"] for row in small.history] == [8, 16]
  for name in ("learning_rate", "train_loss"):
    np.testing.assert_allclose(*([row[name] for row in each.history] for each in (large, small)), rtol=1e-5)
  other = ban_jax.train_generation(teacher, short(train__batch_size=5), **one, **QUIET)
  assert not np.allclose(*(each.params["params"]["Dense_0"]["kernel"] for each in (small, other)), rtol=1e-2)


@pytest.mark.parametrize("changes", [{"train__ema": 0.5}, {"train__steps_per_dispatch": 3}], ids=["ema", "chunks"])
def test_a_run_killed_inside_an_accumulation_ends_with_the_same_bytes(changes, one, tmp_path, monkeypatch):
  one, teacher = one
  cfg = short(train__batch_size=5, train__accumulate=4, train__checkpoint_every=3, **changes)
  alone = ban_jax.train_generation(teacher, cfg, **one, **QUIET)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **one, **QUIET)
  assert {path.name for path in (tmp_path / "gen_1" / "steps").glob("[0-9]*")} == {"12", "15"}  # 16 in all
  resumed = ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **one, **QUIET)
  assert trees.digest(resumed.params) == trees.digest(alone.params)


def test_more_than_an_epoch_is_not_accumulated(one):
  with pytest.raises(ConfigError, match="train.accumulate=5: expected at most 4, the mini-batches of an epoch"):
    ban_jax.train_generation(None, short(train__accumulate=5), **one[0], **QUIET)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaged_weights_are_the_mean_by_age_and_leave_copied_layers_alone(accumulate):
  updates = Updates(optax.sgd(0.1), accumulate, ema=0.8)
  copied = {"stem": np.float32([0.1, 0.7])}
  state = updates.init({"params": {"w": jnp.float32(3), "stem": jnp.zeros(2)}, "batch_stats": {"m": 0.0}}, copied)
  w, weights, stats = 3.0, [], []
  for step in range(1, 7):
    trainable, statistics = {"w": state.params["w"]}, {"m": jnp.float32(step)}
    state = updates.apply({"w": 8.0 * trainable["w"]}, jnp.float32(4), statistics, state, trainable)
    if step % accumulate == 0:
      w -= 0.1 * 2 * w
      weights, stats = [*weights, w], [*stats, step]
  age = 0.8 ** np.arange(len(weights))[::-1]
  kept = updates.average(devices_lib.broadcast(state, (jax.devices()[0],)))
  np.testing.assert_allclose(kept["params"]["w"], np.average(weights, weights=age), rtol=1e-6)
  np.testing.assert_allclose(kept["batch_stats"]["m"], np.average(stats, weights=age), rtol=1e-6)
  assert kept["params"]["stem"].tobytes() == copied["stem"].tobytes()


def test_averaged_weights_are_evaluated_saved_and_teach(one, tmp_path):
  one, plain = one
  cfg = short(train__ema=0.5)
  averaged = ban_jax.train_generation(None, cfg, workdir=tmp_path, **one, **QUIET)
  assert averaged.history[0]["train_loss"] == plain.history[0]["train_loss"]  # the training is the same
  assert trees.digest(averaged.params) != trees.digest(plain.params)
  for split in ("validation", "test"):
    found = ban_jax.evaluate(averaged, cfg, split, **one)
    assert {f"{split}_{name}": value for name, value in found.items()}.items() <= averaged.metrics.items()
  read = ban_jax.load(tmp_path / "gen_0", model=one["model"])
  students = [ban_jax.train_generation(teacher, cfg, **one, **QUIET) for teacher in (averaged, read)]
  assert trees.digest(students[0].params) == trees.digest(students[1].params)
  with pytest.raises(CheckpointError, match="train.ema: 0.5 there, 0.0 here"):
    ban_jax.train_generation(None, short(), workdir=tmp_path, **one, **QUIET)


def test_a_loss_may_change_from_step_to_step(one):
  one, teacher = one
  # Two steps: the first learns from the labels alone, the second from the teacher alone.
  ends = {"loss__label_weight": 1.0, "loss__teacher_weight": 0.0, "loss__label_weight_end": 0.0}
  annealed, fixed = (
    ban_jax.train_generation(
      teacher, short(train__batch_size=48, loss__name=name, loss__teacher_weight_end=1.0, **ends), **one, **QUIET
    )
    for name in ("annealed", "ban_label")
  )
  first, second = ([row["train_loss"] for row in each.history] for each in (annealed, fixed))
  assert first[0] == pytest.approx(second[0], rel=1e-6)
  assert first[1] != pytest.approx(second[1], rel=1e-2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedule_free_is_the_mean_of_its_steps(accumulate):
  group = short().optim.to_dict() | {"warmup": 0.0, "schedule": "constant", "weight_decay": 0.0, "clip_norm": 0.0}
  updates = Updates(optim.make(group | {"name": "schedule_free", "learning_rate": 0.1}, 9).transformation, accumulate)
  state = updates.init({"params": {"w": jnp.float32(3)}}, {})
  for _ in range(4 * accumulate):
    state = updates.apply({"w": jnp.float32(8)}, jnp.float32(4), {}, state, state.params)
  # Adam's steps by a constant gradient are 0.1 each: z goes to 2.9, 2.8, 2.7, 2.6, and x is the mean of these.
  kept = updates.average(devices_lib.broadcast(state, (jax.devices()[0],)))
  np.testing.assert_allclose(kept["params"]["w"], 2.75, rtol=1e-5)
  np.testing.assert_allclose(state.params["w"], 0.9 * 2.75 + 0.1 * 2.6, rtol=1e-5)


def test_schedule_free_evaluates_its_average_and_takes_no_other(one):
  one, _ = one
  words = {"optim__name": "schedule_free", "optim__schedule": "constant"}
  generation = ban_jax.train_generation(None, short(**words), **one, **QUIET)
  found = ban_jax.evaluate(generation, short(**words), **one)
  assert {f"test_{name}": value for name, value in found.items()}.items() <= generation.metrics.items()
  for cfg, message in (
    (short(**words, train__ema=0.5), "train.ema=0.5: expected 0.0, because 'schedule_free' averages by itself"),
    (short(**words, optim__b1=0.0), "optim.b1=0.0: expected a share above 0"),
  ):
    with pytest.raises(ConfigError, match=message):
      ban_jax.train_generation(None, cfg, **one, **QUIET)
  with pytest.raises(ConfigError, match="average of the parameters, of which .* has no batch statistics"):
    ban_jax.train_generation(None, config("digits,wrn_10_1,smoke,schedule_free"), **QUIET)

"""Schedules and optimizers against their definitions, by name and as the caller's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import config

import ban_jax
from ban_jax import config as config_lib
from ban_jax import optim, presets, storage, trees
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.presets import base

OPTIM = base.get_config().optim.to_dict()
QUIET = {"progress": False}


def settings(name, **changes):
  """Returns an `optim` group with the settings of an optimizer's word, at a constant rate."""
  return OPTIM | {"schedule": "constant"} | presets.OPTIMIZER_SETTINGS.get(name, {}) | {"name": name} | changes


def updated(optimizer, gradients, params):
  """Returns the parameters after a step for each gradient."""
  state = optimizer.init(params)
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_the_papers_steps():
  schedule = optim.make_schedule(OPTIM, 200)
  rates = [float(schedule(epoch)) for epoch in (0, 59, 60, 119, 120, 159, 160, 199)]
  np.testing.assert_allclose(rates, np.repeat([0.1, 0.02, 0.004, 0.0008], 2), rtol=1e-6)


def test_cosine_falls_from_the_peak_to_zero():
  schedule = optim.make_schedule(OPTIM | {"schedule": "cosine"}, 100)
  np.testing.assert_allclose([float(schedule(s)) for s in (0, 50, 100)], [0.1, 0.05, 0], atol=1e-8)


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_any_schedule_may_be_warmed_up(name):
  group = settings("sgd", schedule=name, warmup=0.2, momentum=0.0, weight_decay=0.0, nesterov=False)
  optimizer, rest = optim.make(group, 20), optim.make(group | {"warmup": 0.0}, 16)
  rates = [optimizer.rate(step, []) for step in range(20)]
  np.testing.assert_allclose(rates, [0.02, 0.04, 0.06, 0.08, *(rest.rate(s, []) for s in range(16))], rtol=1e-6)
  # What is recorded is what is done.
  ones = {"w": jnp.ones(())}
  state, moved = optimizer.transformation.init(ones), []
  for _ in range(20):
    updates, state = optimizer.transformation.update(ones, state, ones)
    moved.append(-float(updates["w"]))
  np.testing.assert_allclose(moved, rates, rtol=1e-5)


def test_a_plateau_is_warmed_up_and_falls():
  optimizer = optim.make(settings("sgd", schedule="plateau", warmup=0.5, factor=0.1, momentum=0.0), 8)
  assert optimizer.rate(1, [5.0, 6.0]) == pytest.approx(0.1 * 0.1 * 2 / 5)
  assert optimizer.rate(7, [5.0, 6.0]) == pytest.approx(0.01)
  state = optimizer.transformation.init({"w": jnp.ones(())})
  assert float(optax.tree.get(optimizer.between_epochs(state, [5.0, 6.0]), "learning_rate")) == pytest.approx(0.01)
  assert optim.make(settings("sgd"), 8).between_epochs is None


def test_sgd_with_coupled_weight_decay_and_nesterov_momentum():
  optimizer = optim.make(OPTIM | {"boundaries": ()}, 10).transformation
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


def adamw(w, gradients, b1=0.9, b2=0.999, rate=1e-3, decay=0.01):
  m, v = np.zeros_like(w), np.zeros_like(w)
  for t, g in enumerate(gradients, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    w = w - rate * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * w)
  return w


def lion(w, gradients, b1=0.9, b2=0.99, rate=1e-4, decay=0.1):
  m = np.zeros_like(w)
  for g in gradients:
    w, m = w - rate * (np.sign(b1 * m + (1 - b1) * g) + decay * w), b2 * m + (1 - b2) * g
  return w


def lamb(w, gradients, b1=0.9, b2=0.999, rate=3e-3, decay=0.01):
  m, v = np.zeros_like(w), np.zeros_like(w)
  for t, g in enumerate(gradients, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    update = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-6) + decay * w
    w = w - rate * np.linalg.norm(w) / np.linalg.norm(update) * update
  return w


def muon(w, gradients, momentum=0.95, rate=1e-3, decay=0.01):
  m = np.zeros_like(w)
  for t, g in enumerate(gradients, 1):
    m = momentum * m + (1 - momentum) * g
    seen = momentum * m / (1 - momentum ** (t + 1)) + (1 - momentum) * g / (1 - momentum**t)  # Nesterov's, unbiased
    x = seen.reshape(-1, seen.shape[-1])
    x = x / np.linalg.norm(x)
    for _ in range(5):  # Newton-Schulz: singular values go to about 1
      a = x @ x.T
      x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    w = w - rate * (0.2 * np.sqrt(max(x.shape)) * x.reshape(w.shape) + decay * w)
  return w


@pytest.mark.parametrize("oracle", [adamw, lion, lamb, muon], ids=lambda oracle: oracle.__name__)
def test_optimizers_by_name_are_their_definitions(oracle):
  rng = np.random.default_rng(0)
  w, gradients = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 2, 3, 4))  # as of a convolution
  optimizer = optim.make(settings(oracle.__name__), 10).transformation
  found = updated(optimizer, [{"kernel": jnp.asarray(g)} for g in gradients], {"kernel": jnp.asarray(w)})
  np.testing.assert_allclose(found["kernel"], oracle(w, gradients), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_kernels_alone_decay_if_asked_for(name):
  params = {
    "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "norm": {"scale": jnp.ones(4)},
    "attention": {"bias": jnp.ones((2, 2))},
    "words": {"embedding": jnp.ones((5, 2))},
    "positions": jnp.ones((3, 2)),
    "token": jnp.ones((1, 1, 2)),
  }
  nothing = jax.tree.map(jnp.zeros_like, params)
  for decay, expected in (("all", set(trees.leaves(params))), ("kernels", {"dense/kernel"})):
    found = updated(optim.make(settings(name, decay=decay), 10).transformation, [nothing], params)
    assert {path for path, leaf in trees.leaves(found).items() if (leaf < 1).all()} == expected
    assert {path for path, leaf in trees.leaves(found).items() if (leaf == 1).all()} == set(
      trees.leaves(params)
    ) - expected


@pytest.mark.parametrize(("largest", "expected"), [(0.0, 5.0), (10.0, 5.0), (1.0, 1.0)])
def test_clipping_by_the_global_norm(largest, expected):
  plain = {"momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "boundaries": (), "clip_norm": largest}
  optimizer = optim.make(OPTIM | plain, 10).transformation
  gradient = {"w": jnp.asarray([3.0, 4.0])}
  updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
  np.testing.assert_allclose(np.linalg.norm(updates["w"]), expected, rtol=1e-6)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_equal_groups_are_one_optimizer_so_that_generations_compile_once(name):
  assert optim.make(settings(name), 10) is optim.make(settings(name, boundaries=list(OPTIM["boundaries"])), 10)
  assert optim.make(settings(name), 10) is not optim.make(settings(name), 11)


def test_an_optimizer_is_a_word_with_its_usual_settings():
  group = presets.compose("digits,wrn_10_1,smoke,adamw,cwtm").optim
  assert (group.name, group.learning_rate, group.weight_decay, group.decay) == ("adamw", 1e-3, 0.01, "kernels")
  with pytest.raises(ConfigError, match="unknown optim.name 'adam'; choose one of: adamw, lamb, lion, muon, sch"):
    config_lib.check(config(optim__name="adam"))
  with pytest.raises(ConfigError, match="unknown optim.decay 'none'; choose one of: all, kernels"):
    config_lib.check(config(optim__decay="none"))


def test_the_identity_has_what_the_optimizer_takes():
  def identity(**changes):
    return config_lib.identity(config_lib.record(config(**changes)), 1)

  adam = {"optim__name": "adamw"}
  assert identity(**adam) == identity(**adam, optim__momentum=0.5)
  assert identity(**adam) != identity(**adam, optim__b1=0.8)
  assert identity() == identity(optim__b1=0.8)
  for changes in ({"optim__warmup": 0.1}, {"optim__decay": "kernels"}, adam):
    assert identity() != identity(**changes)


# --- In training ------------------------------------------------------------------------------------------------------


def short(*words, **changes):
  changes = {"optim__warmup": 0.2, "train__batch_size": 8, "train__checkpoint_every": 5} | changes
  return config(",".join(["digits,own,smoke", *words]), generations=1, **changes)


def interrupted(*_):
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  ("word", "changes"),
  [("adamw", {}), ("muon", {}), ("adamw", {"optim__schedule": "plateau", "optim__threshold": 100.0})],
)
def test_a_killed_run_ends_with_the_bytes_of_one_left_alone(word, changes, tiny, tmp_path, monkeypatch):
  cfg = short(word, train__epochs=3, **changes)
  alone = ban_jax.train_generation(None, cfg, **tiny, **QUIET)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, cfg, workdir=tmp_path, **tiny, **QUIET)
  assert {path.name for path in (tmp_path / "gen_0" / "steps").glob("[0-9]*")} == {"10", "15"}
  resumed = ban_jax.train_generation(None, cfg, workdir=tmp_path, **tiny, **QUIET)
  assert trees.digest(resumed.params) == trees.digest(alone.params)
  rates = [row["learning_rate"] for row in resumed.history]
  assert rates == [row["learning_rate"] for row in alone.history]
  if changes:
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 2e-4])


def test_an_optimizer_of_ones_own_is_known_by_what_it_computes(tiny, tmp_path):
  def train(rate):
    optimizer = ban_jax.from_optax(optax.adabelief(rate), name="adabelief")
    return ban_jax.train_generation(None, short(), **tiny, **QUIET, workdir=tmp_path, optimizer=optimizer)

  first = train(1e-2)
  assert train(1e-2).metrics == first.metrics  # made anew, as in another process
  with pytest.raises(
    CheckpointError, match="the code of optimizer 'adabelief' was changed: it computes something else"
  ):
    train(2e-2)


def test_an_optax_transformation_of_ones_own_trains_and_is_known_by_its_name(tiny, tmp_path):
  rate = optax.cosine_decay_schedule(1e-2, 12)
  one = ban_jax.from_optax(optax.adabelief(rate), name="adabelief", schedule=rate)
  plateau = short(optim__schedule="plateau")  # which is not used, so it needs no validation split
  splits = {name: split for name, split in tiny["dataset"].splits.items() if name != "validation"}
  tiny = tiny | {"dataset": tiny["dataset"]._replace(splits=splits)}
  teacher, student = ban_jax.run(plateau, tmp_path, **tiny, **QUIET, optimizer=one)
  assert [row["learning_rate"] for row in student.history] == [float(rate(5)), float(rate(11))]
  manifest = storage.load(storage.resolve_workdir(tmp_path) / "gen_1")[1]
  recorded = {key: value for key, value in manifest["config"].items() if key.startswith("optim.")}
  assert recorded == {"optim.name": "own", "optim.own": "adabelief"}
  unnamed = ban_jax.from_optax(optax.adabelief(rate), name="adabelief")  # the same, its rate unknown
  again = ban_jax.train_generation(teacher, short(), **tiny, **QUIET, optimizer=unnamed)
  assert trees.digest(again.params) == trees.digest(student.params)
  assert "learning_rate" not in again.history[0]
  for other, there in ((unnamed._replace(name="belief"), '"adabelief"'), (None, '"own"')):
    with pytest.raises(CheckpointError, match=f"holds a .* of another .*optim.(own|name): {there} there"):
      ban_jax.run(short(), tmp_path, **tiny, **QUIET, optimizer=other)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: ban_jax.from_optax(optax.adamw, name="a"), "from_optax takes an optax.GradientTransformation, as optax."),
    (lambda: ban_jax.from_optax(optax.sgd(1.0), name=""), "name='': expected a printable word"),
    (lambda: ban_jax.from_optax(optax.sgd(1.0), name="a", schedule=0.1), "schedule must be a function of the step"),
    (
      lambda: ban_jax.train_generation(None, config(), optimizer=optax.sgd(1.0), **QUIET),
      "optimizer must be a Optimizer, as ban_jax.from_optax returns it, not GradientTransformationExtraArgs",
    ),
  ],
)
def test_what_is_no_optimizer_is_refused(make, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    make()

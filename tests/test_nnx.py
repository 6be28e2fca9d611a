"""Flax NNX modules as networks: the same arrays and logits as in linen, pure steps, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import config
from flax import linen, nnx

import ban_jax
from ban_jax import storage, trees
from ban_jax.types import InputSpec

QUIET = {"progress": False}
SPEC = InputSpec("images", (4, 4, 1), 3)


class Net(nnx.Module):
  """A convolution, batch statistics, dropout, a list, a sequence and a shared layer."""

  def __init__(self, rngs, axis_name="devices"):
    self.rngs = rngs  # the same object in several places
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, axis_name=axis_name, rngs=rngs)
    self.drop = nnx.Dropout(0.2, rngs=rngs)
    self.blocks = nnx.List([nnx.Linear(64, 64, rngs=rngs)] + [nnx.Linear(64, 64, rngs=rngs) for _ in range(10)])
    self.again = self.blocks[0]
    self.head = nnx.Sequential(nnx.relu, nnx.Linear(64, 3, rngs=rngs))

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    x = self.drop(x.reshape(x.shape[0], -1))
    for block in (*self.blocks[:2], self.blocks[10], self.again):
      x = block(x)
    return self.head(x)


class Twin(linen.Module):
  """The same network in linen, with the same names."""

  @linen.compact
  def __call__(self, x, train):
    x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(linen.Conv(4, (3, 3), name="conv")(x))
    x = linen.relu(x).reshape(x.shape[0], -1)
    return linen.Dense(3, name="head")(x)


class Small(nnx.Module):
  def __init__(self, *, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
    self.head = nnx.Linear(64, 3, rngs=rngs)

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def dataset():
  rng = np.random.default_rng(0)
  images, labels = rng.normal(size=(60, 4, 4)), np.arange(60) % 3
  return ban_jax.from_arrays((images[:40], labels[:40]), (images[40:], labels[40:]))


@pytest.fixture(scope="module")
def net(dataset):
  return ban_jax.from_nnx(Net, dataset)


def own(**changes):
  return config(
    "digits,wrn_10_1,smoke",
    generations=1,
    **{"train__epochs": 2, "train__batch_size": 20, "train__evaluate_every": 0, **changes},
  )


def paths(tree):
  return sorted(trees.leaves(tree))


def test_a_twin_of_a_linen_network_gives_its_logits_from_its_arrays():
  ours, theirs = ban_jax.from_nnx(Small, SPEC), ban_jax.from_flax(Twin(), SPEC)
  variables = jax.jit(theirs.init)(jax.random.key(0))
  assert not trees.first_difference(ours.shapes, variables)
  x = np.random.default_rng(1).normal(size=(4, 4, 4, 1)).astype(np.float32)
  for train in (False, True):
    found, expected = (
      jax.jit(functools.partial(model.apply, train=train))(
        variables, (), x, key=jax.random.key(1), positions=jnp.arange(4)
      )
      for model in (ours, theirs)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert train == bool(np.abs(found[2]["norm"]["mean"] - variables["batch_stats"]["norm"]["mean"]).max() > 0)


def test_its_trees_are_plain_and_hold_every_array_once_and_no_random_stream(net):
  shapes = net.shapes
  assert all(type(key) is str for path in paths(shapes) for key in path.split("/"))
  lists = [f"params/blocks/{place}/{leaf}" for place in range(1, 11) for leaf in ("bias", "kernel")]
  lists += ["params/again/bias", "params/again/kernel"]  # blocks[0], at its first path
  layers = [f"params/{layer}" for layer in ("conv/bias", "conv/kernel", "norm/bias", "norm/scale")]
  head = [f"params/head/layers/1/{leaf}" for leaf in ("bias", "kernel")]  # ReLU has none
  assert paths(shapes) == sorted([*lists, *layers, *head, "batch_stats/norm/mean", "batch_stats/norm/var"])


def test_places_of_a_long_list_are_not_mixed_up(net):
  variables = jax.jit(net.init)(jax.random.key(0))
  x = jnp.ones((2, *net.spec.shape))
  run = jax.jit(lambda params: net.apply({**variables, "params": params}, (), x, train=False)[0])
  reached = {}
  for place in ("1", "2", "10"):
    params = jax.tree.map(lambda leaf: leaf, variables["params"])
    params["blocks"][place]["kernel"] = 0 * params["blocks"][place]["kernel"]
    reached[place] = bool(np.abs(run(params) - run(variables["params"])).max() > 0)
  assert reached == {"1": True, "2": False, "10": True}


def test_dropout_follows_the_key_and_the_device_s_first_place(net):
  variables = jax.jit(net.init)(jax.random.key(0))
  x = jnp.ones((2, *net.spec.shape))

  @jax.jit
  def run(key, positions):
    apply = functools.partial(net.apply, variables, (), x, train=True, key=jax.random.key(key))
    return jax.vmap(lambda own: apply(positions=own)[0], axis_name="devices")(positions[None])[0]

  same, again, key, place = (run(key, jnp.arange(2) + first) for key, first in ((0, 0), (0, 0), (1, 0), (0, 2)))
  np.testing.assert_array_equal(same, again)
  assert np.abs(same - key).max() > 1e-3
  assert np.abs(same - place).max() > 1e-3


def test_it_is_born_again_and_loaded_and_a_killed_run_ends_with_the_same_bytes(net, dataset, tmp_path, monkeypatch):
  cfg, kept = own(train__checkpoint_every=3), {"dataset": dataset, "model": net, "devices": jax.devices()[:1], **QUIET}
  generations = ban_jax.run(cfg, tmp_path / "whole", **kept)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.run(cfg, tmp_path / "killed", **kept)
  assert list((tmp_path / "killed" / "gen_0" / "steps").glob("3"))
  resumed = ban_jax.run(cfg, tmp_path / "killed", **kept)
  assert [trees.digest(one.params) for one in resumed] == [trees.digest(one.params) for one in generations]
  images = np.random.default_rng(1).normal(size=(5, 4, 4))
  loaded = ban_jax.load_run(tmp_path / "whole", model=net)
  np.testing.assert_array_equal(ban_jax.predict(loaded, images), ban_jax.predict(generations, images))


def interrupted(*_):
  raise KeyboardInterrupt


def test_one_and_four_devices_agree_without_dropout(dataset):
  model = ban_jax.from_nnx(lambda rngs: Synchronised(rngs), dataset)
  digests, cfg = [], own()
  for count in (1, 4):
    given = {"dataset": dataset, "model": model, "devices": jax.devices()[:count], **QUIET}
    digests.append(ban_jax.train_generation(None, cfg, **given).params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, *(dict(tree["params"]) for tree in digests))
  jax.tree.map(close, *(dict(tree["batch_stats"]) for tree in digests))


class Synchronised(Small):
  def __init__(self, rngs):
    super().__init__(rngs=rngs)
    self.norm = nnx.BatchNorm(4, momentum=0.9, axis_name="devices", rngs=rngs)


def test_a_module_itself_is_a_fixed_teacher_and_is_not_changed(dataset):
  module = Small(rngs=nnx.Rngs(3))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module)))
  teacher = ban_jax.from_nnx(module, dataset, name="mine")
  assert (teacher.index, teacher.network.group["own"]) == (0, "mine")
  student = ban_jax.train_generation(teacher, own(), dataset=dataset, model=ban_jax.from_nnx(Small, dataset), **QUIET)
  assert student.index == 1
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module))))
  x = np.random.default_rng(1).normal(size=(3, 4, 4))
  arrays = dataset.splits["train"]
  module.eval()
  logits = module((x[..., None].astype(np.float32) - arrays["mean"]) / arrays["std"])
  np.testing.assert_allclose(ban_jax.predict(teacher, x), jax.nn.softmax(logits), rtol=1e-4, atol=1e-5)


# ---- Text.


class Bigram(nnx.Module):
  def __init__(self, rngs):
    self.embed = nnx.Embed(5, 5, rngs=rngs)

  def __call__(self, tokens):
    return self.embed(tokens)


class Peeks(Bigram):
  def __call__(self, tokens):
    return jnp.roll(self.embed(tokens), -1, axis=1)


def test_a_module_of_tokens():
  spec = InputSpec("tokens", (6,), 5, tuple("abcde"))
  model = ban_jax.from_nnx(Bigram, spec)
  logits, _, _ = model.apply(jax.jit(model.init)(jax.random.key(0)), (), np.zeros((2, 3), np.int32), train=False)
  assert logits.shape == (2, 3, 5)
  with pytest.raises(ban_jax.ConfigError, match="the logits after a token depend on the tokens that follow it"):
    ban_jax.from_nnx(Peeks, spec)


# ---- Refusals.


def module_with(make):
  class Kept(nnx.Module):
    def __init__(self, rngs):
      self.head = nnx.Linear(16, 3, rngs=rngs)
      self.extra = make(rngs)

    def __call__(self, x):
      return self.head(x.reshape(x.shape[0], -1))

  return Kept


class Deterministic(nnx.Module):
  def __init__(self, rngs):
    self.head = nnx.Linear(16, 3, rngs=rngs)

  def __call__(self, x, deterministic=True):
    return self.head(x.reshape(x.shape[0], -1))


class Always(nnx.Module):
  """Its dropout takes no heed of the mode."""

  def __init__(self, rngs):
    self.head, self.drop = nnx.Linear(16, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.head(self.drop(x.reshape(x.shape[0], -1), deterministic=True))


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (3, "from_nnx takes a constructor of nnx.Module, or a module, not int"),
    (lambda rngs: 3, "from_nnx takes a constructor of nnx.Module; this one returns int"),
    (lambda: Small(rngs=nnx.Rngs(0)), "the constructor cannot make a module from rngs: "),
    (module_with(lambda rngs: nnx.Cache(jnp.zeros(2))), "model 'Kept' keeps the Cache extra; expected nnx.Param"),
    (module_with(lambda rngs: jnp.zeros(2)), "model 'Kept' keeps the array extra; expected nnx.Param, nnx.BatchStat"),
    (module_with(lambda rngs: nnx.BatchStat(jnp.int32(0))), "model 'Kept' has the state extra of int32; expected"),
    (Deterministic, "model 'Deterministic' has the argument 'deterministic'; expected module(x, train=): rename it"),
    (Always, "model 'Always': in training, dropout draws nothing from its key; it is called as"),
    (lambda rngs: nnx.Linear(1, 3, rngs=rngs), "model 'Linear' returns [2, 4, 4, 3] for two images; expected logits"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_its_path(given, message):
  with pytest.raises(ban_jax.ConfigError) as error:
    ban_jax.from_nnx(given, SPEC)
  assert str(error.value).startswith(message)

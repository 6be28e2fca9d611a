"""What a network of one's own computes, as its digest says, and what is noticed of its behaviour before training."""

import json
import logging
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, config
from flax import linen as nn
from flax import nnx

import ban_jax
from ban_jax import config as config_lib
from ban_jax import storage, trees
from ban_jax.models import program
from ban_jax.types import InputSpec

QUIET = {"progress": False}
SPEC = InputSpec("images", (4, 4, 1), 3)
TINY = {"train__epochs": 1, "train__batch_size": 20, "train__evaluate_every": 0}


def flat(x):
  return x.reshape(x.shape[0], -1)


class MLP(nn.Module):
  width: int = 8
  act: Any = nn.relu
  rate: float = 0.0
  start: Any = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x, train=False):
    x = self.act(nn.Dense(self.width, kernel_init=self.start)(flat(x)))
    return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


class Renamed(nn.Module):
  """The same computation with other names."""

  @nn.compact
  def __call__(self, images, train=False):
    def positive(values):
      return jax.nn.relu(values)

    hidden = positive(nn.Dense(8, name="Dense_0")(flat(images)))
    return nn.Dense(3, name="Dense_1")(hidden)


@pytest.fixture(scope="module")
def dataset():
  rng = np.random.default_rng(0)
  images, labels = rng.normal(size=(60, 4, 4)), np.arange(60) % 3
  return ban_jax.from_arrays((images[:40], labels[:40]), (images[40:], labels[40:]))


def programs_of(module):
  return ban_jax.from_flax(module, SPEC).program


# --- The digest ------------------------------------------------------------------------------------------------------


def edited(constant):
  """Returns a class of the name MLP, as a cell of a notebook defines it anew; only a constant of its code differs."""

  class Edited(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(constant * flat(x))

  Edited.__name__ = Edited.__qualname__ = "MLP"
  return Edited()


@jax.custom_vjp
def straight(x):
  return jnp.sign(x)


straight.defvjp(lambda x: (jnp.sign(x), None), lambda _, g: (g,))


def helped(helper):
  compiled = jax.jit(helper)
  return MLP(act=compiled)


def first_helper(x):
  return x**2


def second_helper(values):
  return values**2


SAME = {
  "names of compiled functions": (lambda: helped(first_helper), lambda: helped(second_helper)),
  "names of classes and functions": (MLP, Renamed),
  "another object": (lambda: edited(2.0), lambda: edited(2.0)),
  "activation by another path": (lambda: MLP(act=nn.relu), lambda: MLP(act=lambda x: jax.nn.relu(x))),
}
OTHERS = {
  "activation": (lambda: MLP(act=nn.gelu), "predicts trains"),
  "dropout": (lambda: MLP(rate=0.5), "trains"),
  "initial values": (lambda: MLP(start=nn.initializers.he_normal()), "trains"),
  "gradient cut": (lambda: MLP(act=lambda x: nn.relu(jax.lax.stop_gradient(x))), "trains"),
  "sequence": (lambda: nn.Sequential([flat, nn.Dense(8), nn.tanh, nn.Dense(3)]), "predicts trains"),
  "width": (lambda: MLP(width=9), "predicts trains"),
}


@pytest.mark.parametrize("case", SAME)
def test_equal_code_has_equal_digests_whatever_it_is_called(case):
  one, other = (programs_of(make()) for make in SAME[case])
  assert one == other


@pytest.mark.parametrize("case", OTHERS)
def test_other_code_has_other_digests_of_what_it_changes(case):
  one, other = programs_of(MLP()), programs_of(OTHERS[case][0]())
  assert [name for name in ("predicts", "trains") if getattr(one, name) != getattr(other, name)] == (
    OTHERS[case][1].split()
  )


def test_a_gradient_of_one_s_own_belongs_to_the_digest():
  one, other = (programs_of(MLP(act=act)) for act in (straight, jnp.sign))
  assert one.predicts == other.predicts
  assert one.trains != other.trains


LARGE = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)


@pytest.mark.parametrize("place", [(0, 0), (15, 2)])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_arrays_that_a_function_captures_belong_to_the_digest(kind, place):
  def digest(array):
    captured = kind(array)
    return ban_jax.from_function(lambda v, x: flat(x) @ captured, {}, SPEC, name="f").network.program.predicts

  other = LARGE.copy()
  other[place] += 1e-6
  assert digest(LARGE) == digest(LARGE.copy()) != digest(other)


def test_an_argument_s_place_belongs_to_the_digest():
  variables = {"a": np.zeros((16, 3)), "b": np.zeros((16, 3))}
  one, other = (
    ban_jax.from_function(lambda v, x, name=name: flat(x) @ v[name], variables, SPEC, name="f").network.program
    for name in variables
  )
  assert one != other


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_default_prng_impl", "rbg")
jax.config.update("jax_threefry_partitionable", False)
from flax import linen as nn
import test_programs
jax.numpy.linalg.norm(jax.random.normal(jax.random.key(1), (3,)))  # other programs before it
print(*test_programs.programs_of(test_programs.MLP(rate=0.5, act=nn.gelu))[:2])
"""


def test_digests_are_alike_in_other_processes_with_other_settings():
  command = [sys.executable, "-c", SCRIPT, str(ROOT / "tests")]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert tuple(done.stdout.split()) == programs_of(MLP(rate=0.5, act=nn.gelu))[:2]


def test_a_class_whose_helper_was_changed_is_another_network(monkeypatch):
  class Calls(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.Dense(3)(flat(x)) * sys.modules[__name__].flat(x).mean(axis=1, keepdims=True)

  before, again = ban_jax.from_flax(Calls(), SPEC), ban_jax.from_flax(Calls(), SPEC)
  assert before is again
  # Equal modules still, of which one would be taken for the other, and steps that are compiled would run the old code.
  monkeypatch.setattr(sys.modules[__name__], "flat", lambda x: 2 * x.reshape(x.shape[0], -1))
  after = ban_jax.from_flax(Calls(), SPEC)
  assert after is not before
  assert after.program != before.program


# --- Its uses --------------------------------------------------------------------------------------------------------


def test_an_edited_network_s_workdir_is_not_read_back(dataset, tmp_path):
  def run(module, **options):
    model = ban_jax.from_flax(module, dataset, name="mine")
    return ban_jax.run(config(generations=0, **TINY), tmp_path, dataset=dataset, model=model, **QUIET, **options)

  first = run(edited(2.0))
  assert trees.digest(run(edited(2.0))[0].params) == trees.digest(first[0].params)
  for module in (edited(3.0), nn.Sequential([flat, nn.Dense(3)])):
    with pytest.raises(ban_jax.BanError, match="gen_0 .*the code of network 'mine' was changed: it computes something"):
      run(module)
    with pytest.raises(ban_jax.ConfigError, match="gen_0: the code of network 'mine' was changed"):
      ban_jax.load(tmp_path / "gen_0", model=ban_jax.from_flax(edited(3.0), dataset, name="mine"))
  # Generations that an earlier version wrote say nothing of the code, and are read as before.
  path = tmp_path / "gen_0" / "manifest.json"
  record = json.loads(path.read_text())
  del record["programs"]
  path.write_text(json.dumps(record))
  assert trees.digest(run(edited(3.0))[0].params) == trees.digest(first[0].params)


def test_a_network_that_was_changed_in_training_alone_is_named():
  lineage = {"generation": 0, "teachers": [], "dataset": "d", "config": config_lib.record(config())}
  one, other = (
    {**lineage, "programs": [program.record("mine", programs_of(module), trained=True)]}
    for module in (MLP(), MLP(rate=0.5))
  )
  with pytest.raises(ban_jax.CheckpointError, match="'mine' was changed: it computes something else in training"):
    storage.check_lineage(one, other, storage.resolve_workdir("here"))


def test_another_version_of_jax_is_told_from_another_network(caplog):
  own = program.record("versions", programs_of(MLP()), trained=True)
  assert not program.changed({**own, "versions": "JAX 0.1, Flax 0.1"}, own)
  assert not caplog.records
  with caplog.at_level(logging.WARNING):
    assert not program.changed({**own, "predicts": "0", "versions": "JAX 0.1, Flax 0.1"}, own)
  assert (
    caplog.records[0].getMessage().startswith("network 'versions' was recorded by JAX 0.1, Flax 0.1, and this is JAX ")
  )
  assert program.changed({**own, "predicts": "0"}, own).endswith("it computes something else in evaluation")


def test_teachers_of_equal_variables_and_other_functions_are_not_one(dataset, tmp_path):
  weights = np.random.default_rng(0).normal(size=(16, 3))
  teachers = [
    ban_jax.from_function(lambda v, x, sign=sign: sign * flat(x) @ v, weights, dataset, name="f") for sign in (1, -1)
  ]
  assert trees.digest(teachers[0].params) == trees.digest(teachers[1].params)
  model = ban_jax.from_flax(MLP(), dataset)

  def train(teacher, dtype="float32", **options):
    cfg = config(train__replay=str(tmp_path / "replay"), **TINY)
    return ban_jax.train_generation(teacher, cfg, dataset=dataset, model=model, **QUIET, **options)

  students = [train(teacher) for teacher in teachers]
  assert len(list((tmp_path / "replay").glob("*/*/*.npy"))) == 2
  assert trees.digest(students[0].params) != trees.digest(students[1].params)
  train(teachers[0], workdir=tmp_path / "run")
  with pytest.raises(ban_jax.CheckpointError, match="the code of network 'f' was changed: .* in evaluation"):
    train(teachers[1], workdir=tmp_path / "run")


# --- Behaviour -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
  rate: float = 0.5

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), 2)(x)))
    return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(flat(x)))


def module(call, **fields):
  """Returns a module whose `__call__` is a function of (self, x) or (self, x, train)."""
  made = type("Made", (nn.Module,), {"__annotations__": {}, "__call__": nn.compact(call), **fields})
  return made()


def attention(self, x, train=False):
  x = x[..., 0]
  return nn.Dense(3)(flat(nn.MultiHeadDotProductAttention(2, dropout_rate=0.1)(x, x, deterministic=not train)))


def attention_off(self, x, train=False):
  x = x[..., 0]
  return nn.Dense(3)(flat(nn.MultiHeadDotProductAttention(2, dropout_rate=0.1)(x, x, deterministic=True)))


class Bridged(nnx.Module):
  """A module of Flax's other interface, whose layers are in training mode unless they are told."""

  def __init__(self, rngs):
    self.norm, self.out = nnx.BatchNorm(1, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    return self.out(flat(self.norm(x)))


class BridgedWell(Bridged):
  def __call__(self, x, train=False):
    return self.out(self.dropout(flat(self.norm(x, use_running_average=not train)), deterministic=not train))


class BridgedStill(Bridged):
  def __call__(self, x):
    return self.out(flat(self.norm(x, use_running_average=True)))


def normed_over_the_batch(self, x):
  x = nn.Dense(8)(flat(x))
  return nn.Dense(3, kernel_init=nn.initializers.zeros)((x - x.mean(axis=0)) / (x.std(axis=0) + 1e-3))


NO_TRAIN = "it is called as module(x): it has to take an argument train, and hand that on to its layers"
TRAIN = "it is called as module(x, train=True), and has to hand train on to its layers"
STILL = {
  "second in a sequence": (
    nn.Sequential([nn.Conv(1, (1, 1)), Net()]),
    f"in training, batch statistics of layers_1/BatchNorm_0 do not move; {NO_TRAIN}",
  ),
  "a wrapper that keeps it": (
    module(lambda self, x, train=False: Net()(x)),
    f"in training, batch statistics of Net_0/BatchNorm_0 do not move; {TRAIN}",
  ),
  "a wrapper that swallows it": (
    module(lambda self, x, **options: Net()(x)),
    f"in training, batch statistics of Net_0/BatchNorm_0 do not move; {TRAIN}",
  ),
  "one of two": (
    module(lambda self, x, train: Net()(x, train) + Net()(x)),
    f"in training, batch statistics of Net_1/BatchNorm_0 do not move; {TRAIN}",
  ),
  "a field": (
    module(lambda self, x: Net()(x, self.train), train=False, __annotations__={"train": bool}),
    f"in training, batch statistics of Net_0/BatchNorm_0 do not move; {NO_TRAIN}",
  ),
  "a bridge": (
    nnx.bridge.to_linen(BridgedStill),
    f"in training, batch statistics of norm do not move; {NO_TRAIN}",
  ),
  "rematerialised": (
    module(lambda self, x, train=False: nn.remat(Net)()(x)),
    f"in training, batch statistics of CheckpointNet_0/BatchNorm_0 do not move; {TRAIN}",
  ),
  "dropout alone": (
    nn.Sequential([flat, nn.Dropout(0.5, deterministic=True), nn.Dense(3)]),
    f"in training, dropout layers_1 is off; {NO_TRAIN}",
  ),
  "dropout of attention": (
    module(attention_off),
    f"in training, dropout MultiHeadDotProductAttention_0 is off; {TRAIN}",
  ),
  "the same mask in every step": (
    module(
      lambda self, x, train: nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(flat(x), rng=jax.random.key(0)))
    ),
    f"in training, dropout draws nothing from its key; {TRAIN}",
  ),
  "a generator that is not used": (
    module(lambda self, x, train: (self.make_rng("dropout") if train else 0, nn.Dense(3)(flat(x)))[1]),
    f"in training, dropout draws nothing from its key; {TRAIN}",
  ),
}


@pytest.mark.parametrize("case", STILL)
def test_what_training_would_pass_by_is_named(case):
  given, message = STILL[case]
  with pytest.raises(ban_jax.ConfigError) as error:
    ban_jax.from_flax(given, SPEC, name="mine")
  assert str(error.value) == f"model 'mine': {message}"


TOGETHER = {
  "batch statistics": module(normed_over_the_batch),
  "place": module(lambda self, x: nn.Dense(3)(flat(x)) * jnp.arange(x.shape[0])[:, None]),
  "a bridge": nnx.bridge.to_linen(Bridged),
  "one mask": module(
    lambda self, x: nn.Dense(3)(flat(x) * jax.random.bernoulli(jax.random.key(0), 0.5, flat(x).shape))
  ),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_images_that_are_not_taken_alone_are_noticed(case):
  with pytest.raises(ban_jax.ConfigError, match="model 'mine': in evaluation, the logits of an image depend on its pl"):
    ban_jax.from_flax(TOGETHER[case], SPEC, name="mine")


def test_a_function_that_normalises_by_its_mini_batch_is_no_teacher():
  with pytest.raises(ban_jax.ConfigError, match="model 'f': in evaluation, the logits of an image depend on its place"):
    ban_jax.from_function(lambda v, x: (flat(x) - flat(x).mean(axis=0)) @ v, np.ones((16, 3)) * LARGE, SPEC, name="f")


@pytest.mark.parametrize("name", ["inference", "mode", "is_eval", "training", "deterministic", "phase"])
def test_other_names_for_train_are_refused(name):
  scope = {"nn": nn, "flat": flat}
  exec(f"def call(self, x, {name}=None):\n  return nn.Dense(3)(flat(x))", scope)
  with pytest.raises(ban_jax.ConfigError, match=f"has the argument '{name}'; expected module.x, train=.: rename it"):
    ban_jax.from_flax(module(scope["call"]), SPEC)


WELL = {
  "sequence": lambda: nn.Sequential([Net(), nn.Dense(3)]),
  "keywords": lambda: module(lambda self, x, **options: Net()(x, **options)),
  "sequence of layers": lambda: nn.Sequential([flat, nn.Dense(3)]),
  "bridge": lambda: nnx.bridge.to_linen(BridgedWell),
  "attention": lambda: module(attention),
  "no dropout": lambda: Net(rate=0.0),
  "rematerialised": lambda: module(lambda self, x, train: nn.remat(Net, static_argnums=(2,))()(x, train)),
  "last layer zero": lambda: module(
    lambda self, x, train: nn.Dense(3, kernel_init=nn.initializers.zeros)(Net(name="net")(x, train))
  ),
}


@pytest.mark.parametrize("case", WELL)
def test_modules_that_behave_train_and_evaluate(case):
  model = ban_jax.from_flax(WELL[case](), SPEC, name="mine")
  variables = model.init(jax.random.key(0))
  images = np.random.default_rng(0).normal(size=(4, *SPEC.shape)).astype(np.float32)

  def train(seed):
    return model.apply(variables, (), images, train=True, key=jax.random.key(seed), positions=jnp.arange(4))

  (logits, _, statistics), (other, _, _) = train(0), train(1)
  assert np.allclose(logits, other) == (case in ("sequence of layers", "no dropout", "last layer zero"))
  before = trees.leaves(variables.get("batch_stats", {}))
  assert all((trees.leaves(statistics)[path] != leaf).any() for path, leaf in before.items())

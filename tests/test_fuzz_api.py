"""Random arguments for every public function: each call works, or is answered by one of the library's own errors."""

import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from conftest import config
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import ban_jax
from ban_jax import generations, models, resolving, trees
from ban_jax.errors import BanError
from ban_jax.types import Generation


class Classifier(nn.Module):
  """A user's network."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Anything:
  """An object that no function knows."""


IMAGES, LABELS = np.arange(640).astype(np.uint8).reshape(10, 8, 8), np.arange(10)


@functools.cache
def network(generation=0, words="digits,wrn_10_1,smoke"):
  """An untrained network of a configuration, as a Generation."""
  setup = resolving.resolve(config(words) if words.startswith("digits") else ban_jax.get_config(words), None)
  variables = jax.device_get(setup.models[0].init(jax.random.key(generation)))
  return Generation(generation, trees.to_host(variables, generation), {}, (), setup.network(generation))


@functools.cache
def dataset():
  return ban_jax.from_arrays((IMAGES, LABELS), (IMAGES, LABELS), num_classes=10)


@functools.cache
def model():
  return ban_jax.from_flax(Classifier(), dataset())


@functools.cache
def optimizer():
  return ban_jax.from_optax(optax.sgd(0.1), name="plain")


NUMBERS = (True, -1, 0, 1, 1.5, float("nan"), float("inf"), 10**20)
ODD = (
  *(None, *NUMBERS, "", "é", "\0", "x" * 300, b"x", (), [], {}, {"params": {}}, Anything(), (1, 2), [None], [[]]),
  *(np.zeros(3), np.zeros((2, 0)), np.array("x"), np.array(None), np.full((10, 8, 8), np.nan), {1: 2}, lambda: None),
  *(int, Classifier, Classifier(), models, pathlib.Path("/nonexistent/run"), jax.devices()[0]),
)
odd = st.sampled_from(range(len(ODD))).map(ODD.__getitem__)


class Made(NamedTuple):
  """An argument that is made when the call is."""

  maker: Callable[[], Any]


def of(*makers):
  """Draws one of the values that these functions return."""
  return st.sampled_from([Made(maker) for maker in makers])


# What each argument should be, by its name.
GOOD = {
  "params_prev": of(lambda: None, network, lambda: network().params, lambda: [network(), network(1)]),
  "generations": of(network, lambda: [network(), network(1)]),
  "generation": of(lambda: None, network),
  "member": of(network, lambda: network().params),
  "initial": of(lambda: None, lambda: network().params),
  "cfg": of(config),
  "devices": of(lambda: None, lambda: jax.devices()[:1], lambda: jax.devices()[:2]),
  "inputs": of(lambda: IMAGES),
  "images": of(lambda: IMAGES),
  "source": of(dataset, network),
  "sentences": of(lambda: ["the return value", ""]),
  "prompt": of(lambda: "", lambda: "the"),
  "length": of(lambda: 3),
  "temperature": of(lambda: 0.7),
  "split": st.sampled_from(("test", "train")),
  "weights": of(lambda: None),
  "batch_size": of(lambda: 4),
  "progress": of(lambda: False),
  "dataset": of(lambda: None, dataset),
  "model": of(lambda: None, model),
  "teacher_model": of(lambda: None, model),
  "train": of(lambda: (IMAGES, LABELS)),
  "test": of(lambda: (IMAGES, LABELS)),
  "validation": of(lambda: None, lambda: (IMAGES, LABELS)),
  "module": of(Classifier),
  "spec": of(dataset),
  "apply": of(lambda: lambda variables, images: images.reshape(len(images), -1) @ variables["kernel"]),
  "variables": of(lambda: {"kernel": np.zeros((64, 10), np.float32)}),
  "name": of(lambda: "mine"),
  "vocabulary": of(lambda: 99),
  "words": st.just("digits,wrn_10_1,smoke"),
  "platforms": of(lambda: ("cpu",)),
  "optimizer": of(lambda: None, optimizer),
  "transformation": of(lambda: optax.sgd(0.1)),
  "schedule": of(lambda: None, lambda: optax.constant_schedule(0.1)),
  "writers": of(tuple, lambda: (lambda step, scalars: None,)),
  "reliability": of(lambda: {"a": dict.fromkeys(("count", "confidence", "accuracy"), np.ones(15))}),
  "metrics": of(lambda: {"a": {"ece": 0.1, "nll": 1.0, "brier": 0.5}}),
  "compared": of(lambda: {"agreement": np.eye(2), "kl": np.ones((2, 2))}),
  "names": of(lambda: ["a", "b"]),
  "runs": of(lambda: [[network(), network(1)]]),
  "reference": of(lambda: "teacher", lambda: "BAN-1"),
  "unit": of(lambda: "tokens"),
  "on_epoch": of(lambda: None, lambda: lambda history: False),
}
FUNCTIONS = (
  *("average", "compare", "evaluate", "export", "export_card", "export_parameters", "from_arrays", "from_flax"),
  *("from_function", "from_nnx", "from_optax", "from_source", "from_text", "from_tokens", "get_config", "load"),
  *("load_config", "load_run", "log_probabilities", "normalise", "plot_agreement", "plot_calibration"),
  *("plot_dark_knowledge", "predict", "reliability", "run", "sample", "seed_table", "setup", "train_generation"),
  "with_network",
)


@st.composite
def calls(draw):
  """Draws a function and its arguments, one or two of which may be anything."""
  name = draw(st.sampled_from(FUNCTIONS))
  parameters = inspect.signature(getattr(ban_jax, name)).parameters
  wrong = draw(st.sets(st.sampled_from(sorted(parameters)), max_size=2))
  arguments = {}
  for key, parameter in parameters.items():
    if key in wrong:
      arguments[key] = draw(odd)
    elif key in ("path", "run", "workdir"):
      arguments[key] = ...  # a new one for each call
    elif name in ("log_probabilities", "sample") and key == "generations":
      arguments[key] = Made(lambda: network(0, "pydoc,lstm_32,smoke"))
    elif name == "plot_dark_knowledge":
      arguments[key] = draw(of(lambda: {"teacher": network(), "BAN-1": network(1)}))
    elif name == "from_text" and key in ("train", "validation", "test"):
      arguments[key] = draw(of(lambda: "to be or not to be\n" * 9, lambda: np.arange(99)))
    elif name == "from_tokens" and key in ("train", "validation", "test"):
      arguments[key] = draw(of(lambda: np.arange(99)))
    elif key in GOOD and (parameter.default is parameter.empty or draw(st.booleans())):
      arguments[key] = draw(GOOD[key])
  return name, arguments


def test_every_public_function_that_takes_arguments_is_called():
  public = {name for name in ban_jax.__all__ if inspect.isfunction(getattr(ban_jax, name))}
  # The first takes none; the second asks for a trace of the next training.
  assert set(FUNCTIONS) == public - {"keep_freed_memory", "keep_programs", "trace_steps"}
  for name in FUNCTIONS:
    for key, parameter in inspect.signature(getattr(ban_jax, name)).parameters.items():
      assert key in GOOD or key in ("path", "run", "workdir") or parameter.default is not parameter.empty, (name, key)


@pytest.fixture(autouse=True, scope="module")
def no_training(tmp_path_factory):
  """Trains nothing, since what is wrong must be found before; some strings are paths to write, relative ones."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path_factory.mktemp("here"))
    patch.setattr(generations, "finished_or_trained", lambda jobs, workdirs, progress: [network() for _ in jobs])
    yield


def check(call, folder):
  name, arguments = call
  paths = {key: folder / name for key, value in arguments.items() if value is ...}
  made = {key: value.maker() for key, value in arguments.items() if isinstance(value, Made)}
  try:
    getattr(ban_jax, name)(**arguments | paths | made)
  except BanError as error:
    message = str(error)
    assert message.strip()
    assert "Traceback" not in message


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_a_call_works_or_is_answered_in_words(tmp_path_factory, call):
  check(call, tmp_path_factory.mktemp("call"))


@pytest.mark.soak
@settings(max_examples=3000, deadline=None)
@given(calls())
def test_many_calls_work_or_are_answered_in_words(tmp_path_factory, call):
  check(call, tmp_path_factory.mktemp("call"))

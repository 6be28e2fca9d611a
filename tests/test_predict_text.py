"""Language models asked about new text: predictions, sentences' probabilities, samples."""

import jax
import numpy as np
import pytest
from conftest import config

import ban_jax
from ban_jax import data
from configs import pydoc

QUIET = {"progress": False}


def text(**changes):
  cfg = pydoc.get_config("pydoc,lstm_32,smoke")
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return cfg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("text")
  ban_jax.run(text(), workdir, **QUIET)
  return ban_jax.load_run(workdir)


def test_predictions_are_the_evaluation_s_on_one_and_on_four_devices(run):
  dataset = data.load(text().data)
  window, tokens = dataset.spec.shape[0], dataset.splits["test"]["tokens"]
  size = len(tokens) - 1
  count = len(dataset.eval_order("test", 1))
  inputs = np.resize(tokens[:-1], count * window).reshape(count, window)  # the last window is filled up
  # Every window in a row of its own begins without a hidden state.
  cfg = text(evaluate__batch_size=count)
  for members in (run[0], run):
    expected = ban_jax.evaluate(members, cfg, devices=jax.devices()[:1])
    for devices in (jax.devices()[:1], jax.devices()[:4]):
      found = ban_jax.predict(members, inputs, devices=devices, batch_size=100)
      assert found.shape == (count, window, dataset.spec.num_classes)
      own = found.reshape(-1, dataset.spec.num_classes)[np.arange(size), tokens[1:]]
      assert -np.log(own.astype(np.float64)).mean() == pytest.approx(expected["nll"], rel=1e-5)
      assert expected["count"] == size


def test_a_sentence_s_probabilities_are_those_of_its_words(run):
  words = run[0].network.spec.words
  sentences = [" ".join(words[:3]), "", " ".join(words[5:50])]
  logs = ban_jax.log_probabilities(run, sentences, batch_size=2)
  assert [len(one) for one in logs] == [4, 1, 46]
  end = words.index("<eos>")
  for sentence, found in zip(sentences, logs, strict=True):
    tokens = np.array([end, *(words.index(word) for word in sentence.split()), end])
    probabilities = ban_jax.predict(run, tokens[None, :-1])[0]
    np.testing.assert_allclose(found, np.log(probabilities[np.arange(len(tokens) - 1), tokens[1:]]), rtol=1e-4)
  unknown = ban_jax.log_probabilities(run, ["zzyzx"])[0]
  np.testing.assert_array_equal(unknown, ban_jax.log_probabilities(run, ["<unk>"])[0])


def test_samples_follow_the_seed_the_prompt_and_the_temperature(run):
  one = ban_jax.sample(run, 20, seed=1)
  assert one == ban_jax.sample(run, 20, seed=1)
  assert one != ban_jax.sample(run, 20, seed=2)
  assert len(one.split(" ")) == 20
  assert set(one.split(" ")) <= set(run[0].network.spec.words)
  # Near temperature 0 it is the most probable word after the prompt, read from the beginning.
  words = run[0].network.spec.words
  tokens = np.array([[words.index("<eos>"), 3, 4]])
  likely = words[int(ban_jax.predict(run, tokens)[0, -1].argmax())]
  for temperature in (1e-3, 1e-310, 5e-324, 0):
    assert ban_jax.sample(run, 1, prompt=f"{words[3]} {words[4]}", temperature=temperature) == likely
  assert ban_jax.sample(run, 1, temperature=1e308) in words  # each as likely
  assert ban_jax.sample(run, 1, prompt=f"{words[3]} {words[4]}", temperature=1e308, top_k=1) == likely
  assert ban_jax.sample(run, 1, prompt=f"\ufeff{words[3]} {words[4]}", temperature=1e-3) == likely


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (0, 0)])
@pytest.mark.parametrize("dtype", [int, float])
def test_no_tokens_get_no_probabilities(run, shape, dtype):
  assert ban_jax.predict(run, np.zeros(shape, dtype)).shape == (*shape, run[0].network.spec.num_classes)


def test_language_models_of_other_windows_predict_together(run):
  one, other = run
  spec = other.network.spec
  longer = other._replace(network=other.network._replace(spec=spec._replace(shape=(35,))))
  tokens = np.arange(12).reshape(2, 6)
  np.testing.assert_array_equal(ban_jax.predict([one, longer], tokens), ban_jax.predict([one, other], tokens))
  words = other._replace(network=other.network._replace(spec=spec._replace(words=spec.words[::-1])))
  with pytest.raises(
    ban_jax.ConfigError, match="the networks read different inputs: tokens of .* words, .*, and tokens"
  ):
    ban_jax.predict([one, words], tokens)


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (lambda run: ban_jax.log_probabilities(run, "a b"), ban_jax.DataError, "takes a sequence of sentences, not one"),
    (lambda run: ban_jax.sample(run, -1), ban_jax.ConfigError, "length=-1: expected a whole number of at least 0"),
    (
      lambda run: ban_jax.sample(run, 1, temperature=-1),
      ban_jax.ConfigError,
      "temperature=-1: expected a finite number of at least 0",
    ),
    (lambda run: ban_jax.log_probabilities(run, None), ban_jax.DataError, "a sequence of sentences, not NoneType"),
    (lambda run: ban_jax.log_probabilities(run, np.array(None)), ban_jax.DataError, "of sentences, not ndarray"),
    (lambda run: ban_jax.log_probabilities(run, [3]), ban_jax.DataError, "a text must be a string .*, not int"),
    (lambda run: ban_jax.sample(run, 1, prompt=("a",)), ban_jax.DataError, "a text must be a string .*, not tuple"),
    (lambda run: ban_jax.sample(run, 1, seed=[1]), ban_jax.ConfigError, r"seed=\[1\]: expected a whole number of at"),
    (lambda run: ban_jax.sample(run, 1, temperature="1"), ban_jax.ConfigError, "temperature='1': expected a finite"),
    (lambda run: ban_jax.sample(run, 1, temperature=np.inf), ban_jax.ConfigError, "temperature=inf: expected a finite"),
    (
      lambda run: ban_jax.sample(run, 1, temperature=10**400),
      ban_jax.ConfigError,
      "temperature=1000.*: expected a fin",
    ),
    (lambda run: ban_jax.sample(run, 1, top_k=-1), ban_jax.ConfigError, "top_k=-1: expected a whole number of at lea"),
    (lambda run: ban_jax.predict(run, [[-1]]), ban_jax.DataError, "a token is -1; expected 0 to "),
    (lambda run: ban_jax.predict(run, [[0.5]]), ban_jax.DataError, "expected tokens, whole numbers"),
    (lambda run: ban_jax.export(run, "x"), ban_jax.ConfigError, "export takes networks of images"),
  ],
)
def test_what_a_language_model_cannot_read_is_named(run, call, error, message):
  with pytest.raises(error, match=message):
    call(run)


def test_a_network_of_images_is_no_language_model(tmp_path):
  generation = ban_jax.train_generation(None, config(train__epochs=1), **QUIET)
  for function, arguments in ((ban_jax.sample, (1,)), (ban_jax.log_probabilities, (["a"],))):
    with pytest.raises(ban_jax.ConfigError, match=f"{function.__name__} takes language models; these networks read"):
      function(generation, *arguments)

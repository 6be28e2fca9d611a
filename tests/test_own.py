"""Users' own images and networks: from arrays to predictions and exported functions, through the public API alone."""

import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import IMAGES, ROOT, config
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import ban_jax
from ban_jax import job, resolving, trees
from ban_jax.data import digits, images
from ban_jax.data import load as load_data
from ban_jax.types import Generation, InputSpec

QUIET = {"progress": False}
READ = """
import sys
import jax.export, numpy as np
function = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[3], function.call(np.load(sys.argv[2])))
assert not any(name.split(".")[0] in ("ban_jax", "flax") for name in sys.modules)
"""


class CNN(nn.Module):
  """A small network with batch statistics and dropout."""

  features: int = 4
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x, train):
    x = nn.Conv(self.features, (3, 3), 2)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x))
    x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Linear(nn.Module):
  """A network without the argument `train`, without batch statistics."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


def own(**changes):
  """Returns a configuration of two short generations for own data and networks."""
  return config(generations=1, **changes)


@pytest.fixture(scope="module")
def arrays():
  """Digits as floats from 0 to 16: 200 to train, 100 to test."""
  from sklearn.datasets import load_digits

  pixels, labels = load_digits(return_X_y=True)
  return pixels[:300].reshape(-1, 8, 8), labels[:300]


@pytest.fixture(scope="module")
def dataset(arrays):
  pixels, labels = arrays
  return ban_jax.from_arrays((pixels[:200], labels[:200]), (pixels[200:], labels[200:]), pad=1, name="mine")


@pytest.fixture(scope="module")
def cnn(dataset):
  return ban_jax.from_flax(CNN(), dataset)


@pytest.fixture(scope="module")
def run(dataset, cnn, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("own")
  return workdir, ban_jax.run(own(), workdir, dataset=dataset, model=cnn, devices=jax.devices()[:1], **QUIET)


# What only extras install.
EXTRA = ["array_record", "matplotlib", "requests", "tensorflow_datasets"]


def readme_script(heading="Your own data and network") -> str:
  section = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1]
  return re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)


def test_the_readme_s_first_lines_train_a_teacher_and_its_students(capsys, monkeypatch):
  small = ban_jax.get_config(IMAGES)
  monkeypatch.setattr(ban_jax, "get_config", lambda words: small)
  exec(readme_script("Ten lines"), {})
  assert re.fullmatch(r"0 [\d.]+ %\n1 [\d.]+ %\n", capsys.readouterr().out)


@pytest.mark.parametrize(("momentum", "epochs", "warned"), [(0.99, 9, True), (0.99, 30, False), (0.9, 9, False)])
def test_batch_statistics_that_would_not_forget_their_beginning_are_named(momentum, epochs, warned, dataset, caplog):
  class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return Linear()(nn.BatchNorm(use_running_average=not train, momentum=momentum)(x))

  setup = ban_jax.setup(own(train__epochs=epochs), dataset=dataset, model=ban_jax.from_flax(Normalised(), dataset))
  assert not caplog.messages
  steps = job.prepare(setup, None, None).total_steps
  expected = (
    f"model 'Normalised': its batch normalisation keeps 0.99 of its statistics in each step, so that after all "
    f"{steps} steps 40% of them are still those it began with, and evaluation uses them; give it momentum=0.9"
  )
  assert [message.startswith(expected) for message in caplog.messages] == [True] * warned


@pytest.mark.slow
def test_the_readme_s_script_trains_predicts_and_exports_outside_the_checkout(tmp_path):
  script = readme_script()
  assert len([line for line in script.splitlines() if line]) <= 30
  assert "import configs" not in script
  assert script.count("cfg.train.epochs, cfg.generations = 60, 2") == 1
  script = script.replace("= 60, 2", "= 20, 2")
  script = f"import sys; sys.modules |= dict.fromkeys({EXTRA})\n{script}"
  script += (
    "\nimport numpy as np; np.save('p.npy', probabilities); np.save('x.npy', images[900:, ..., None].astype('f4'))"
  )
  script += "\ntry:\n  ban_jax.train_generation(None, ban_jax.get_config('cifar10,mlp_16,smoke'))"
  script += "\nexcept ban_jax.ConfigError as error:\n  print(error, file=sys.stderr)"
  done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  needed = "data.name='cifar10' needs the package requests: pip install 'ban_jax[tfds]'"
  assert done.stderr.splitlines()[-1] == needed
  errors = json.loads(done.stdout.splitlines()[-1])
  assert len(errors) == 3
  assert max(errors) < 20
  files = [str(tmp_path / name) for name in ("runs/mine/ensemble.stablehlo", "x.npy", "q.npy")]
  read = subprocess.run([sys.executable, "-c", READ, *files], cwd="/", capture_output=True, text=True, check=False)
  assert read.returncode == 0, read.stderr
  np.testing.assert_allclose(np.load(tmp_path / "q.npy"), np.load(tmp_path / "p.npy"), atol=1e-6)


def linear_teacher(data, name="f"):
  """Returns a fixed linear network for a data set's images, with the normalisation of that set."""
  inputs = int(np.prod(data.spec.shape))
  weights = np.random.default_rng(0).normal(size=(inputs, data.spec.num_classes)).astype(np.float32)
  return ban_jax.from_function(lambda v, x: x.reshape(x.shape[0], -1) @ v, weights, data, name=name)


PIXELS_OF = {
  "floats": lambda rng, n: rng.normal(size=(n, 4, 4, 2)) * (1, 10) + (0, 30),
  "uint8": lambda rng, n: rng.integers(0, 120, (n, 4, 4, 2)).astype(np.uint8),
}


@pytest.fixture(params=PIXELS_OF)
def two_sets(request):
  """Two data sets of the same test images, whose training images have other means and deviations."""
  draw, rng, labels = PIXELS_OF[request.param], np.random.default_rng(0), np.arange(60) % 3
  pixels = draw(rng, 60)
  test = (pixels, labels)
  return [ban_jax.from_arrays((train, labels), test, name="set") for train in (pixels, pixels // 2 + 7)], test


def test_a_network_normalises_as_it_was_trained_wherever_it_is_used(two_sets, caplog):
  (first, second), (pixels, labels) = two_sets
  teacher, linear = linear_teacher(first), ban_jax.from_flax(Linear3(), second)
  cfg, devices = ban_jax.get_config("own,own,smoke"), jax.devices()[:1]
  cfg.train.update(epochs=1, batch_size=20)
  given_ = {"dataset": second, "model": linear, "devices": devices}
  found = ban_jax.predict(teacher, pixels)
  for dataset in (first, second):
    metrics = ban_jax.evaluate(teacher, cfg, **{**given_, "dataset": dataset})
    assert metrics["error"] == pytest.approx(100 * (found.argmax(axis=1) != labels).mean())
    assert metrics["nll"] == pytest.approx(-np.log(found[np.arange(60), labels]).mean(), rel=1e-4)
  assert "member normalises images by its own mean (" in caplog.text
  # As a teacher, too; with another normalisation it is another one.
  setup = resolving.resolve(cfg, devices, resolving.Own(second, linear))
  prepared = job.prepare(setup, teacher, None)
  batch = second.fetch(second.splits["test"], np.arange(60), key=None, positions=None, train=False)
  (teaching, source) = prepared.teacher[:2]
  np.testing.assert_allclose(
    jax.nn.softmax(teaching.logits(source, teaching.init_carry(60), batch)[0]), found, atol=1e-4
  )
  unaware = teacher._replace(network=teacher.network._replace(scaling=second.scaling))
  assert prepared.lineage["teachers"] != job.prepare(setup, unaware, None).lineage["teachers"]
  # A network that is trained further keeps its normalisation.
  begun = Generation(0, setup.models[1].init(jax.random.key(0)), {}, (), setup.network(0))
  assert job.prepare(setup, None, None, begun).dataset is second
  begun = begun._replace(network=begun.network._replace(scaling=first.scaling))
  continued = job.prepare(setup, None, None, begun)
  assert continued.network.scaling == continued.dataset.scaling == first.scaling
  assert continued.dataset.digest != second.digest


class Linear3(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
  "use",
  [
    lambda one, cfg, given: ban_jax.evaluate(one, cfg, **given),
    lambda one, cfg, given: ban_jax.compare([one, one], cfg, **given),
    lambda one, cfg, given: ban_jax.train_generation(one, cfg, **given),
    lambda one, cfg, given: ban_jax.train_generation(None, cfg, initial=one, **given),
  ],
)
def test_a_network_of_images_of_another_type_is_refused(use, dataset, arrays):
  pixels, labels = arrays
  of_bytes = ban_jax.from_arrays((pixels.astype(np.uint8), labels), (pixels.astype(np.uint8), labels), name="bytes")
  with pytest.raises(ban_jax.ConfigError, match=r"was trained on uint8 images; those of mine are float32"):
    use(linear_teacher(of_bytes), own(), {"dataset": dataset, "model": ban_jax.from_flax(Linear(), dataset)})


@pytest.mark.parametrize("kind", PIXELS_OF)
def test_normalised_images_are_what_networks_read(kind):
  pixels, labels = PIXELS_OF[kind](np.random.default_rng(0), 60), np.arange(60) % 3
  made = ban_jax.from_arrays((pixels, labels), (pixels, labels))
  batch = made.fetch(made.splits["test"], np.arange(60), key=None, positions=None, train=False)
  for source in (made, linear_teacher(made)):
    np.testing.assert_allclose(ban_jax.normalise(pixels, source), batch.inputs, atol=1e-6)
  for wrong, message in ((pixels.astype(int), "the inputs are int64"), (pixels[:, :2], "the inputs have the shape")):
    with pytest.raises(ban_jax.DataError, match=message):
      ban_jax.normalise(wrong, made)
  with pytest.raises(
    ban_jax.ConfigError, match="normalise takes a Dataset or a Generation as the second argument, not"
  ):
    ban_jax.normalise(made, pixels)


def test_the_digits_as_arrays_give_the_bytes_of_the_digits():
  cfg = config(train__epochs=1, data__train_examples=0)
  registered = load_data(cfg.data)
  splits = [(registered.splits[name]["images"], registered.splits[name]["labels"]) for name in ("train", "test")]
  given_ = ban_jax.from_arrays(*splits, pad=1)
  expected = ban_jax.train_generation(None, cfg, **QUIET)
  assert trees.digest(ban_jax.train_generation(None, cfg, dataset=given_, **QUIET).params) == trees.digest(
    expected.params
  )


def test_the_arrays_are_copied_and_stay_writable(arrays):
  pixels, labels = (array.copy() for array in arrays)
  made = ban_jax.from_arrays((pixels, labels), (pixels, labels), 0.2)
  pixels[:], labels[:] = 0, 0
  assert pixels.flags.writeable
  assert made.splits["test"]["images"].max() == 16
  assert set(made.splits) == {"train", "test", "validation"}
  assert not made.splits["train"]["images"].flags.writeable


def test_a_data_set_prints_in_one_line(dataset):
  assert repr(dataset) == "Dataset('mine', images (8, 8, 1), 10 classes, train=200, test=100)"


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_the_range_of_floats_does_not_matter(scale, shift):
  pixels = np.random.default_rng(0).normal(size=(12, 4, 4, 3))
  labels = np.arange(12) % 3
  plain, moved = (ban_jax.from_arrays((x, labels), (x, labels)) for x in (pixels, pixels * scale + shift))
  inputs = [
    np.asarray(images.normalise(*(made.splits["test"][name] for name in ("images", "mean", "std"))))
    for made in (plain, moved)
  ]
  np.testing.assert_allclose(inputs[0], inputs[1], atol=2e-3 * (1 + abs(shift) / scale))


PIXELS = np.zeros((4, 8, 8), np.uint8)
LABELS = np.array([0, 1, 2, 1])


class Tensor:
  """A tensor of another library that NumPy cannot read, as one on a GPU."""

  def __array__(self, dtype=None, copy=None):
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"train": PIXELS}, "arrays: train must be a pair (images, labels), not ndarray of 4"),
    ({"train": np.array("x")}, "arrays: train must be a pair (images, labels), not ndarray"),
    ({"test": dict}, "arrays: test must be a pair (images, labels), not type"),
    (
      {"train": (PIXELS, np.array([[1, 1, 0], [0, 0, 0], [0, 1, 1], [1, 0, 0]]))},
      "arrays, train: the labels have the shape (4, 3); expected [N], a class each; an image of several classes, or of "
      "shares of them, cannot be trained on",
    ),
    (
      {"train": (PIXELS, np.full((4, 3), 1 / 3))},
      "arrays, train: the labels have the shape (4, 3); expected [N], a class each; an image of several classes, or of "
      "shares of them, cannot be trained on",
    ),
    (
      {"train": (PIXELS, np.eye(3)[LABELS])},
      "arrays, train: the labels have the shape (4, 3); expected [N], a class each; for one-hot labels take labels.arg",
    ),
    (
      {"train": (np.ma.masked_equal(np.eye(8, dtype=np.uint8)[None].repeat(4, 0), 1), LABELS)},
      "arrays, train: the images are masked in 32 places; expected numbers everywhere",
    ),
    ({"train": (Tensor(), LABELS)}, "arrays, train: the images cannot be one array: can't convert cuda:0 device type"),
    (
      {"label_noise": 0.1},
      "data.label_noise=0.1: expected a share that replaces at least one label; it takes 0 of arr",
    ),
    ({"train_examples": 2}, "data.train_examples=2: expected at least 3, one of each class of arrays, or 0 for all"),
    ({"train": (PIXELS, LABELS[:3])}, "arrays, train: 4 images and 3 labels; expected as many of each"),
    ({"train": (PIXELS, LABELS - 1)}, "arrays, train: a label is -1; expected classes from 0 to 2"),
    ({"num_classes": 2}, "arrays, train: a label is 2; expected classes from 0 to 1"),
    (
      {"train": (PIXELS, LABELS + 1), "num_classes": 3},
      "arrays, train: a label is 3; expected classes from 0 to 2; the labels seem to begin at 1: subtract 1",
    ),
    (
      {"train": (PIXELS, LABELS + 1)},
      "arrays, train: no example of class 0; expected some of each of the 4; the labels seem to begin at 1: subtract 1",
    ),
    ({"num_classes": 5}, "arrays, train: no example of class 3, 4; expected some of each of the 5"),
    (
      {"train": (PIXELS, LABELS[:, None])},
      "arrays, train: the labels have the shape (4, 1); expected [N], a class each; take labels[:, 0]",
    ),
    (
      {"train": (PIXELS, np.eye(3, dtype=int)[LABELS])},
      "arrays, train: the labels have the shape (4, 3); expected [N], a class each; for one-hot labels take "
      "labels.argmax(axis=1)",
    ),
    (
      {"train": (PIXELS, LABELS.astype(float))},
      "arrays, train: the labels are float64; expected whole numbers from 0 to classes - 1",
    ),
    (
      {"train": (PIXELS.astype(int), LABELS)},
      "arrays, train: the images are int64; expected uint8 from 0 to 255, or floating-point numbers",
    ),
    (
      {"train": (PIXELS[0], LABELS)},
      "arrays, train: the images have the shape (8, 8); expected [N, H, W, C] or [N, H, W]",
    ),
    ({"test": (PIXELS[:, :6], LABELS)}, "arrays, test: the images are 6x8x1; expected 8x8x1, as in train"),
    ({"test": (PIXELS.astype("f4"), LABELS)}, "arrays, test: the images are float32, those of train uint8"),
    (
      {"train": (np.full((4, 8, 8), np.nan), LABELS), "test": (PIXELS.astype(float), LABELS)},
      "arrays, train: image 0 has pixels that are not finite; expected numbers",
    ),
    ({"test": (PIXELS[:0], LABELS[:0])}, "arrays, test: the images have the shape (0, 8, 8, 1); expected at least one"),
    ({"validation": 1.5}, "validation=1.5: expected a share in [0, 1), or a pair of images and labels"),
    ({"pad": 8}, "data.pad=8: expected at most 7"),
    ({"pad": 1.5}, "pad=1.5: expected a whole number of at least 0"),
    ({"label_noise": 1.0}, "label_noise=1.0: expected a share in [0, 1)"),
    ({"noise_kind": "x"}, "unknown noise_kind 'x'; choose one of: pairwise, symmetric"),
    ({"num_classes": 1}, "num_classes=1: expected a whole number of at least 2"),
    ({"num_classes": 3.0}, "num_classes=3.0: expected a whole number of at least 2"),
    ({"label_noise": "some"}, "label_noise='some': expected a share in [0, 1)"),
    ({"noise_kind": ["symmetric"]}, "unknown noise_kind (of type list); choose one of: pairwise, symmetric"),
    ({"flip": "no"}, "flip='no': expected True or False"),
    ({"augment": "mixup"}, "augment='mixup': expected a sequence of names, or of each name the options"),
    ({"augment": {"erasing": 0.25}}, "augment: erasing has 0.25; expected its options by name, which are: "),
    ({"augment": ("mix",)}, "unknown augmentation 'mix'; choose one of: cutmix, erasing, mixup, "),
    ({"augment": {"mixup": {"alpha": 1}}}, "unknown option of mixup 'alpha'; choose one of: mixup_alpha"),
    ({"augment": {"erasing": {"erasing": 2}}}, "erasing=2: expected a share from 0 to 1"),
    (
      {"train": ([PIXELS[0], PIXELS[0, 1:]], LABELS[:2])},
      "arrays, train: the images cannot be one array: ",
    ),
    (
      {"train": (PIXELS, np.array([0, 1, 2, 10**9]))},  # identifiers in place of classes
      "arrays, train: no example of class 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 999999987 more; expected some of each of "
      "the 1000000001",
    ),
    (
      {"train": (PIXELS, np.array([0, 1, 2, 2**64 - 1], np.uint64))},
      "arrays, train: a label is 18446744073709551615; expected classes from 0",
    ),
    (
      {"train": (PIXELS, LABELS * 0), "test": (PIXELS, LABELS * 0)},
      "arrays: all labels are 0; expected at least two classes, or give num_classes",
    ),
  ],
)
def test_arrays_that_do_not_fit_are_refused_in_one_sentence(changes, message):
  arguments = {"train": (PIXELS, LABELS), "test": (PIXELS, LABELS), **changes}
  with pytest.raises(ban_jax.BanError) as error:
    ban_jax.from_arrays(**arguments)
  assert str(error.value).startswith(message)


def test_numbers_of_numpy_are_numbers():
  pixels, labels = np.repeat(PIXELS, 3, axis=0), np.arange(12) % 3
  given_ = {"num_classes": labels.max() + 1, "pad": np.int32(1), "flip": np.bool_(True), "noise_seed": np.uint8(2)}
  made = ban_jax.from_arrays((pixels, labels), (pixels, labels), np.float64(0.5), **given_)
  assert made.sizes == {"train": 6, "test": 12, "validation": 6}
  assert json.loads(json.dumps(made.options))["noise_seed"] == 2


def test_wrong_labels_are_made_of_arrays_too(arrays):
  pixels, labels = arrays
  made = ban_jax.from_arrays((pixels, labels), (pixels, labels), label_noise=0.3)
  assert (made.splits["train"]["labels"] != labels).mean() == pytest.approx(0.3, abs=0.01)
  assert made.record["wrong_labels"] == pytest.approx(0.3, abs=0.01)


class Needs(nn.Module):
  @nn.compact
  def __call__(self, x, mask):
    return nn.Dense(10)(x * mask)


class Spatial(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x)


class Counter(nn.Module):
  @nn.compact
  def __call__(self, x):
    self.variable("cache", "n", lambda: 0)
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Deterministic(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):  # left at its default, dropout would be off in training
    return nn.Dense(10)(nn.Dropout(0.5, deterministic=deterministic)(x.reshape(x.shape[0], -1)))


class Always(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(nn.Dropout(0.5, deterministic=False)(x.reshape(x.shape[0], -1)))


class Two(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x.reshape(x.shape[0], -1)), x


class Noise(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x
    return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Wrapper(nn.Module):
  @nn.compact
  def __call__(self, x, train=False):
    return CNN()(x, train=False)


class Together(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x.reshape(x.shape[0], -1)
    return nn.Dense(10)(x - x.mean(axis=0))


class Broken(nn.Module):
  @nn.compact
  def __call__(self, x):
    raise KeyError("width")


class Averaged(nn.Module):
  """Its collection "ema" is a running mean of the inputs."""

  @nn.compact
  def __call__(self, x, train):
    x = x.reshape(x.shape[0], -1)
    mean = self.variable("ema", "mean", jnp.zeros, x.shape[-1])
    if train:
      mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
    return nn.Dense(10)(x - mean.value)


class Spectral(nn.Module):
  """Its statistics move with the parameters, not with the images."""

  @nn.compact
  def __call__(self, x, train):
    return nn.SpectralNorm(nn.Dense(10))(x.reshape(x.shape[0], -1), update_stats=train)


def test_further_collections_are_carried_as_state_and_saved(dataset, tmp_path):
  model, cfg = (
    ban_jax.from_flax(Averaged(), dataset),
    own(train__epochs=1, train__batch_size=200, train__evaluate_every=0),
  )
  kept = {"dataset": dataset, "model": model, "devices": jax.devices()[:1], **QUIET}
  trained = ban_jax.train_generation(None, cfg, workdir=tmp_path, **kept)
  state = trained.params["batch_stats"]
  assert set(state) == {"@ema"}
  arrays = dataset.splits["train"]
  images = (arrays["images"] - arrays["mean"]) / arrays["std"]  # cropped at random: the sum over pixels moves little
  assert state["@ema"]["mean"].mean() == pytest.approx(images.mean() / 2, abs=0.05)
  assert np.abs(state["@ema"]["mean"]).max() > 0.1
  loaded = ban_jax.load(tmp_path / "gen_0", model=model)
  assert trees.digest(loaded.params) == trees.digest(trained.params)
  assert set(ban_jax.from_flax(Spectral(), dataset).shapes["batch_stats"]) == {"SpectralNorm_0"}


class Bigram(nn.Module):
  """Logits of each token from itself alone, or, `peeking`, from the next."""

  peeking: bool = False

  @nn.compact
  def __call__(self, tokens):
    return nn.Embed(WORDS, WORDS)(jnp.roll(tokens, -1, axis=1) if self.peeking else tokens)


WORDS = 7


def test_networks_of_tokens_are_networks(dataset):
  spec = InputSpec("tokens", (4,), WORDS, tuple("abcdefg"))
  model = ban_jax.from_flax(Bigram(), spec)
  table = np.random.default_rng(0).normal(size=(WORDS, WORDS)).astype(np.float32)
  tokens = np.arange(6).reshape(2, 3)
  logits, carry, _ = model.apply({"params": {"Embed_0": {"embedding": table}}}, (), tokens, train=False)
  np.testing.assert_array_equal(logits, table[tokens])
  assert carry == ()
  teacher = ban_jax.from_function(lambda table, tokens: table[tokens], table, spec, name="table")
  np.testing.assert_allclose(ban_jax.predict(teacher, tokens), jax.nn.softmax(logits), rtol=1e-5)
  with pytest.raises(
    ban_jax.ConfigError, match="the logits after a token depend on the tokens that follow it; expected"
  ):
    ban_jax.from_flax(Bigram(peeking=True), spec)
  with pytest.raises(
    ban_jax.ConfigError, match=re.escape("returns [2, 4, 3] for two windows; expected logits [2, 4, 7]")
  ):
    ban_jax.from_flax(nn.Embed(WORDS, 3), spec)


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (CNN, "from_flax takes an instance of flax.linen.Module, not CNN itself, not an instance"),
    (lambda x: x, "from_flax takes an instance of flax.linen.Module, not function"),
    (Needs(), "model 'Needs' needs the arguments mask; expected module(x) or module(x, train=)"),
    (Spatial(), "model 'Spatial' returns [2, 8, 8, 10] for two images; expected logits [2, 10]"),
    (Counter(), "model 'Counter' has the state cache/n of int32; expected floating-point numbers, which can be"),
    (nn.Dense(10, kernel_init=None), "model 'Dense' cannot be made for images of 8x8x1: "),
    (Broken(), "model 'Broken' cannot be made for images of 8x8x1: 'width'"),
    (Always(), "model 'Always' cannot be called with images of 8x8x1: Dropout_0 needs PRNG for"),
    (Noise(), "model 'Noise' cannot be trained on images of 8x8x1: "),
    (
      CNN(axis_name="batch"),
      "model 'CNN' cannot be trained on images of 8x8x1: Found an unbound axis name: batch",
    ),
    (
      Deterministic(),
      "model 'Deterministic' has the argument 'deterministic'; expected module(x, train=): rename it to train",
    ),
    (
      Wrapper(),
      "model 'Wrapper': in training, batch statistics of CNN_0/BatchNorm_0 do not move; it is called as module(x, "
      "train=True), and has to hand train on to its layers",
    ),
    (
      nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dropout(0.5, deterministic=True), nn.Dense(10)]),
      "model 'Sequential': in training, dropout layers_1 is off; it is called as module(x): it has to take an argument "
      "train, and hand that on to its layers",
    ),
    (Together(), "model 'Together': in evaluation, the logits of an image depend on its place or on the others in its"),
    (Two(), "the network returns tuple; expected one array, the logits [B, classes]"),
  ],
)
def test_modules_that_do_not_fit_are_refused(dataset, module, message):
  with pytest.raises(ban_jax.ConfigError) as error:
    ban_jax.from_flax(module, dataset)
  assert str(error.value).startswith(message)


def test_a_module_and_its_equal_are_one_network(dataset, cnn):
  assert ban_jax.from_flax(CNN(), dataset) is cnn
  assert ban_jax.from_flax(CNN(features=5), dataset) != cnn


def test_a_run_is_resumed_loaded_and_predicts_what_it_did(run, dataset, cnn, arrays):
  workdir, generations = run
  again = ban_jax.run(own(), workdir, dataset=dataset, model=cnn, devices=jax.devices()[:1], **QUIET)
  assert [trees.digest(one.params) for one in again] == [trees.digest(one.params) for one in generations]
  loaded = ban_jax.load_run(workdir, model=cnn)
  tests = arrays[0][200:]
  np.testing.assert_array_equal(ban_jax.predict(loaded, tests), ban_jax.predict(generations, tests))
  unnamed = ban_jax.load(workdir / "gen_0")
  with pytest.raises(ban_jax.CheckpointError, match="has a network of your own, 'CNN': give it to load"):
    ban_jax.predict(unnamed, tests)
  with pytest.raises(ban_jax.ConfigError, match="model is 'Linear', but the generation was trained with 'CNN'"):
    ban_jax.load(workdir / "gen_0", model=ban_jax.from_flax(Linear(), dataset))
  with pytest.raises(ban_jax.CheckpointError, match="it is a generation: read it by load"):
    ban_jax.load_run(workdir / "gen_0")
  other = ban_jax.from_arrays((arrays[0][:200], arrays[1][:200]), (arrays[0], arrays[1]), name="mine")
  with pytest.raises(ban_jax.CheckpointError, match="dataset.pad: 1 there, 0 here"):
    ban_jax.run(own(), workdir, dataset=other, model=cnn, **QUIET)
  with pytest.raises(ban_jax.CheckpointError, match="model.features: 4 there, 5 here"):
    ban_jax.run(own(), workdir, dataset=dataset, model=ban_jax.from_flax(CNN(features=5), dataset), **QUIET)


def test_predictions_are_the_evaluation_s(run, dataset, cnn, arrays):
  _, generations = run
  tests, labels = arrays[0][200:], arrays[1][200:]
  for members in (generations[0], generations):
    metrics = ban_jax.evaluate(members, own(), dataset=dataset, model=cnn, devices=jax.devices()[:1])
    for batch_size, count in ((7, 1), (100, 4), (1000, 2)):
      found = ban_jax.predict(members, tests, batch_size=batch_size, devices=jax.devices()[:count])
      assert found.shape == (100, 10)
      assert 100 * (found.argmax(axis=1) != labels).mean() == pytest.approx(metrics["error"])
      assert -np.log(found[np.arange(100), labels]).mean() == pytest.approx(metrics["nll"], rel=1e-5)
  alone = ban_jax.predict(generations, tests, weights=[0, 2])
  np.testing.assert_allclose(alone, ban_jax.predict(generations[1], tests), atol=1e-6)
  assert ban_jax.predict(generations, tests[:0]).shape == (0, 10)


@pytest.mark.parametrize(
  ("inputs", "message"),
  [
    (np.zeros((2, 8, 8), np.uint8), "the inputs are uint8; the networks were trained on floating-point images"),
    (
      np.zeros((8, 8)),
      "the inputs have the shape [8, 8]; expected images [N, 8, 8, 1]; for one image pass images[None]",
    ),
    (np.zeros((2, 9, 9)), "the inputs have the shape [2, 9, 9, 1]; expected images [N, 8, 8, 1]"),
    (np.full((2, 8, 8), np.inf), "the inputs have pixels that are not finite"),
    (np.full((2, 8, 8), 1e300), "the inputs have pixels that are not finite"),  # in float32
    ([np.zeros((8, 8)), np.zeros((9, 8))], "the inputs cannot be one array: "),
    (None, "the inputs have the shape []; expected images [N, 8, 8, 1]"),
    (Tensor(), "the inputs cannot be one array: can't convert cuda:0 device type tensor to numpy; expected an array"),
  ],
)
def test_inputs_that_the_network_cannot_read_are_refused(run, inputs, message):
  with pytest.raises(ban_jax.DataError, match=re.escape(message)):
    ban_jax.predict(run[1], inputs)


def test_inputs_larger_than_the_memory_are_read_batch_by_batch(dataset, tmp_path):
  mapped = np.memmap(tmp_path / "inputs", np.float32, "w+", shape=(200_000, 8, 8, 1))  # 51 MB
  tracemalloc.start()
  found = ban_jax.predict(linear_teacher(dataset), mapped, batch_size=10_000, **QUIET)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 * found.nbytes + 2 * 4 * 2**22
  mapped[150_000, 0, 0, 0] = np.nan
  with pytest.raises(ban_jax.DataError, match="the inputs have pixels that are not finite"):
    ban_jax.predict(linear_teacher(dataset), mapped, **QUIET)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn, np.float16, np.float64, np.longdouble])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, list], ids=["numpy", "jax", "list"])
def test_floats_of_any_width_are_floats(dtype, kind, arrays):
  pixels = arrays[0][:60].astype(dtype)
  given_ = pixels if dtype in (np.float64, np.longdouble) else kind(pixels)  # JAX has none of these
  rounded, labels = pixels.astype(np.float32), arrays[1][:60]
  made, expected = (ban_jax.from_arrays((x, labels), (x, labels)) for x in (given_, rounded))
  assert made.digest == expected.digest
  teacher = linear_teacher(made)
  np.testing.assert_array_equal(ban_jax.predict(teacher, given_, **QUIET), ban_jax.predict(teacher, rounded, **QUIET))


MODES = {
  "jax_numpy_rank_promotion": "raise",
  "jax_numpy_dtype_promotion": "strict",
  "jax_transfer_guard": "disallow",
  "jax_transfer_guard_device_to_host": "disallow",
}


@pytest.fixture(params=[*MODES, "numpy"])
def strict_mode(request):
  """A strict mode of JAX, or of NumPy, that a program has set for its own code."""
  if request.param == "numpy":
    with np.errstate(all="raise"):
      yield
    return
  before = getattr(jax.config, request.param)
  jax.config.update(request.param, MODES[request.param])
  yield
  jax.config.update(request.param, before)


def used(arrays):
  """Returns what public functions that compute say of a small network, through one generation of it."""
  pixels, labels = arrays[0][:100], arrays[1][:100]
  made = ban_jax.from_arrays((pixels * 1e-38, labels), (pixels * 1e-38, labels), pad=1, flip=True)
  teacher, model = linear_teacher(made), ban_jax.from_flax(Linear(), made)
  cfg, one = ban_jax.get_config("own,own,smoke,ban_label"), jax.devices()[:1]
  cfg.train.epochs, given_ = 1, {"dataset": made, "model": model, "devices": one}
  student = ban_jax.train_generation(teacher, cfg, **given_, **QUIET)
  both = [teacher, student]
  return [
    trees.digest(student.params),
    ban_jax.predict(both, pixels * 1e-38, weights=[0, 1], devices=one, **QUIET).tobytes(),
    ban_jax.normalise(pixels * 1e-38, made).tobytes(),
    ban_jax.evaluate(both, cfg, **given_),
    trees.digest(ban_jax.average([student, student], cfg, **given_).params),
  ]


@pytest.fixture(scope="module")
def expected_use(arrays):
  return used(arrays)


def test_strict_modes_of_a_program_hinder_nothing(expected_use, strict_mode, arrays):
  assert used(arrays) == expected_use


@pytest.mark.parametrize("function", ["train_generation", "evaluate", "predict"])
def test_without_compilation_nothing_is_computed(function, dataset):
  teacher = linear_teacher(dataset)
  arguments = {
    "train_generation": (None, own()), "evaluate": (teacher, own()), "predict": (teacher, np.zeros((1, 8, 8))),
  }  # fmt: skip
  with jax.disable_jit(), pytest.raises(ban_jax.ConfigError, match="jax_disable_jit is set: a step would take minutes"):
    getattr(ban_jax, function)(*arguments[function])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"weights": Tensor()}, "expected 2 numbers of at least 0, not all of them 0"),
    ({"weights": [1.0]}, "weights=[1.0]: expected 2 numbers of at least 0, not all of them 0"),
    ({"weights": [0, 0]}, "weights=[0, 0]: expected 2 numbers of at least 0, not all of them 0"),
    ({"weights": "equal"}, "weights='equal': expected 2 numbers of at least 0, not all of them 0"),
    ({"weights": {0: 1, 1: 1}}, "weights={0: 1, 1: 1}: expected 2 numbers of at least 0, not all of them 0"),
    ({"batch_size": 0}, "batch_size=0: expected a whole number of at least 1"),
    ({"devices": 2}, "devices=2: expected a sequence of devices, as jax.devices()[:2]"),
    ({"generations": []}, "predict needs at least one generation"),
    (
      {"generations": "gen_0"},
      "expected a variables tree, a Generation or a sequence of them, not str; read a directory with ban_jax.load or "
      "load_run",
    ),
  ],
)
def test_wrong_arguments_of_predict_are_refused(run, arguments, message):
  with pytest.raises(ban_jax.ConfigError, match=re.escape(message)):
    ban_jax.predict(**{"generations": run[1], "inputs": np.zeros((1, 8, 8)), **arguments})


@pytest.mark.slow
def test_an_ensemble_of_two_kinds_needs_nothing_but_its_directories(tmp_path, dataset, arrays):
  kinds = (IMAGES, "digits,densenet_10_16,smoke")
  paths = []
  teacher = None
  for number, words in enumerate(kinds):
    cfg = config(words, train__epochs=1, data__train_examples=0)
    teacher = ban_jax.train_generation(
      teacher, cfg, workdir=tmp_path / str(number), **QUIET
    )  # one kind teaches another
    paths.append(tmp_path / str(number) / f"gen_{number}")
  loaded = [ban_jax.load(path) for path in paths]
  assert [one.network.group["name"] for one in loaded] == ["mlp", "densenet"]
  tests = load_data(cfg.data).splits["test"]
  found = ban_jax.predict(loaded, tests["images"])
  metrics = ban_jax.evaluate(loaded, cfg)
  assert 100 * (found.argmax(axis=1) != tests["labels"]).mean() == pytest.approx(metrics["error"])
  assert -np.log(found[np.arange(len(found)), tests["labels"]]).mean() == pytest.approx(metrics["nll"], rel=1e-5)


@pytest.mark.parametrize(
  ("members", "message"),
  [
    (lambda g: [g, None], "member 2 of 2 is None; expected a variables tree or a Generation"),
    (lambda g: [None, g, g], "member 1 of 3 is None; expected a variables tree or a Generation"),
    (lambda g: [None], "member 1 of 1 is None; expected a variables tree or a Generation"),
    (lambda g: [g, [g, None]], "member 2 of 2 is None; expected a variables tree or a Generation"),
    (lambda g: (g, []), "member 2 of 2 is an empty sequence; expected a variables tree or a Generation"),
  ],
)
def test_a_member_that_is_missing_is_named(run, dataset, cnn, members, message):
  given_ = members(run[1][0])
  for call in (
    lambda: ban_jax.predict(given_, np.zeros((1, 8, 8))),
    lambda: ban_jax.evaluate(given_, own(), dataset=dataset, model=cnn),
    lambda: ban_jax.average(given_, own(), dataset=dataset, model=cnn),
    lambda: ban_jax.train_generation(given_, own(), dataset=dataset, model=cnn, **QUIET),
  ):
    with pytest.raises(ban_jax.ConfigError) as error:
      call()
    assert str(error.value) == message


def test_generations_are_pickled_and_copied_and_stay_read_only(run):
  generation = run[1][1]
  read = pickle.loads(pickle.dumps(generation))
  assert trees.digest(read.params) == trees.digest(generation.params)
  assert read.network == generation.network._replace(own=None)
  assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(read.params))
  assert copy.deepcopy(generation) is copy.copy(generation) is generation
  assert len(repr(generation).splitlines()) == 1


def test_a_directory_of_an_earlier_version_is_read_and_named_where_it_does_not_suffice(run, tmp_path, dataset, cnn):
  workdir, generations = run
  shutil.copytree(workdir, tmp_path / "old")
  for path in (tmp_path / "old").glob("gen_*"):
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["network_digest"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "network.json").unlink()
  old = ban_jax.load(tmp_path / "old" / "gen_1")
  assert old.network is None
  assert trees.digest(old.params) == trees.digest(generations[1].params)
  with pytest.raises(ban_jax.CheckpointError, match="does not say how its inputs were normalised"):
    ban_jax.predict(old, np.zeros((1, 8, 8)))
  for member in (old, old.params):
    known = ban_jax.with_network(member, own(), dataset=dataset, model=cnn)
    assert (known.index, known.network) == (1, generations[1].network)
    np.testing.assert_array_equal(
      ban_jax.predict(known, np.zeros((1, 8, 8))), ban_jax.predict(generations[1], np.zeros((1, 8, 8)))
    )
  with pytest.raises(ban_jax.CheckpointError, match="the network does not fit model mlp_1_16"):
    ban_jax.with_network(old, own())
  # The configuration's network is taken, and the resumed run knows its own.
  assert ban_jax.evaluate(old, own(), dataset=dataset, model=cnn)["count"] == 100
  resumed = ban_jax.run(own(), tmp_path / "old", dataset=dataset, model=cnn, devices=jax.devices()[:1], **QUIET)
  assert resumed[1].network == generations[1].network


def test_a_changed_network_record_is_damage(run, tmp_path):
  shutil.copytree(run[0] / "gen_0", tmp_path / "gen_0")
  record = tmp_path / "gen_0" / "network.json"
  record.write_text(record.read_text().replace("4.", "5."))
  with pytest.raises(ban_jax.CheckpointError, match="network.json was changed"):
    ban_jax.load(tmp_path / "gen_0")


def test_batch_statistics_on_several_devices_are_all_devices(dataset):
  """With the mapped axis they are one device's; without it, the mean over devices, never the first device's alone."""
  cfg = own(train__epochs=1, train__batch_size=200, optim__learning_rate=1e-9)
  means = {}
  for axis_name in (None, "devices"):
    model = ban_jax.from_flax(CNN(axis_name=axis_name), dataset)
    for count in (1, 4):
      generation = ban_jax.train_generation(
        None, cfg, dataset=dataset, model=model, devices=jax.devices()[:count], **QUIET
      )
      # After one step of momentum 0.99 from a mean of 0 and a variance of 1.
      running = generation.params["batch_stats"]["BatchNorm_0"]
      means[axis_name, count] = {"mean": running["mean"] / 0.01, "var": (running["var"] - 0.99) / 0.01}
  for axis_name in (None, "devices"):
    np.testing.assert_allclose(means[axis_name, 4]["mean"], means[axis_name, 1]["mean"], rtol=1e-3, atol=1e-4)
  np.testing.assert_allclose(means["devices", 4]["var"], means["devices", 1]["var"], atol=3e-5)
  assert not np.allclose(means[None, 4]["var"], means[None, 1]["var"], atol=1e-4)  # of each device's own examples


def test_a_function_of_another_library_teaches(dataset, arrays):
  weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
  teacher = ban_jax.from_function(
    lambda v, x: x.reshape(x.shape[0], -1) @ v["w"], {"w": weights}, dataset, name="torch"
  )
  cfg = own(train__epochs=1, train__batch_size=100)
  linear = ban_jax.from_flax(Linear(), dataset)
  student = ban_jax.train_generation(teacher, cfg, dataset=dataset, model=linear, **QUIET)
  assert student.index == 1
  agreement = ban_jax.compare([teacher, student], cfg, dataset=dataset, model=linear)["agreement"][0, 1]
  assert agreement > ban_jax.compare([teacher, teacher._replace(params=trees.to_host({"params": {"variables": {
    "w": -weights}}, "batch_stats": {}}, 0))], cfg, dataset=dataset, model=linear)["agreement"][0, 1]  # fmt: skip
  # With its data set, it knows how its images are normalised; with a spec alone it does not.
  pixels, labels = arrays[0][200:], arrays[1][200:]
  metrics = ban_jax.evaluate(teacher, cfg, dataset=dataset, model=linear)
  assert 100 * (ban_jax.predict(teacher, pixels).argmax(axis=1) != labels).mean() == pytest.approx(metrics["error"])
  plain = ban_jax.from_function(lambda v, x: x.reshape(x.shape[0], -1) @ v["w"], {"w": weights}, dataset.spec, name="s")
  with pytest.raises(ban_jax.CheckpointError, match="or made from a spec"):
    ban_jax.predict(plain, pixels)
  np.testing.assert_array_equal(ban_jax.predict(plain, pixels, dataset=dataset), ban_jax.predict(teacher, pixels))
  with pytest.raises(
    ban_jax.ConfigError, match="dataset must be a Dataset, as ban_jax.from_arrays returns it, not tup"
  ):
    ban_jax.predict(plain, pixels, dataset=(pixels, labels))


@pytest.mark.parametrize(
  ("apply", "variables", "name", "message"),
  [
    (lambda v, x: x.reshape(x.shape[0], -1), {}, "f", "model 'f' returns [2, 64] for two images; expected logits"),
    (lambda x: x, {}, "f", "model 'f' cannot be called with images of 8x8x1: "),
    (lambda v, x: None, {}, "f", "the network returns NoneType; expected one array, the logits [B, classes]"),
    (lambda v, x: x, {"kind": "vgg"}, "f", "the variables of 'f' are no tree of arrays: "),
    (lambda v, x: x, {"w": Tensor()}, "f", "the variables of 'f' are no tree of arrays: can't convert cuda:0"),
    (lambda v, x: x, {}, None, "name=None: expected a printable word, because it identifies the network"),
  ],
)
def test_functions_that_do_not_fit_are_refused(dataset, apply, variables, name, message):
  with pytest.raises(ban_jax.ConfigError, match=re.escape(message)):
    ban_jax.from_function(apply, variables, dataset, name=name)


@pytest.mark.parametrize("count", [1, 4])
def test_a_network_of_a_single_array_predicts_on_any_number_of_devices(dataset, arrays, count):
  weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
  linear = ban_jax.from_function(lambda v, x: x.reshape(x.shape[0], -1) @ v, weights, dataset, name="matrix")
  pixels = arrays[0][200:].reshape(100, -1)
  scores = (pixels - dataset.splits["train"]["mean"]) / dataset.splits["train"]["std"] @ weights
  found = ban_jax.predict(linear, arrays[0][200:], devices=jax.devices()[:count])
  np.testing.assert_allclose(found, jax.nn.softmax(scores), atol=1e-5)


def test_a_sequence_is_carried_on_with_another_configuration(run, dataset, cnn, tmp_path):
  cfg = own(train__batch_size=40, train__epochs=1, loss__name="dkpp")
  more = ban_jax.run(cfg, tmp_path, params_prev=run[1][-1], dataset=dataset, model=cnn, **QUIET)
  assert [one.index for one in more] == [2]
  assert json.loads((tmp_path / "gen_2" / "manifest.json").read_text())["teachers"] == [trees.digest(run[1][-1].params)]


def test_training_begins_from_given_weights_and_records_them(run, dataset, cnn, tmp_path):
  _, generations = run
  cfg = own(train__epochs=1, train__batch_size=200, optim__learning_rate=1e-9)
  longer = ban_jax.train_generation(
    generations[0], cfg, dataset=dataset, model=cnn, initial=generations[1], workdir=tmp_path, **QUIET
  )
  for mine, theirs in zip(*(jax.tree.leaves(one.params["params"]) for one in (longer, generations[1])), strict=True):
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
  manifest = json.loads((tmp_path / "gen_1" / "manifest.json").read_text())
  assert manifest["initial"] == trees.digest(generations[1].params)
  with pytest.raises(ban_jax.CheckpointError, match="initial: .* there, None here"):
    ban_jax.train_generation(generations[0], cfg, dataset=dataset, model=cnn, workdir=tmp_path, **QUIET)
  with pytest.raises(ban_jax.CheckpointError, match="initial does not fit model CNN"):
    ban_jax.train_generation(None, cfg, dataset=dataset, model=cnn, initial={"params": {}}, **QUIET)


def test_averaged_weights_get_their_own_batch_statistics(run, dataset, cnn):
  _, generations = run
  mean = ban_jax.average(generations, own(), weights=[1, 3], dataset=dataset, model=cnn)
  one, other = (generation.params["params"]["Dense_0"]["kernel"] for generation in generations)
  np.testing.assert_allclose(mean.params["params"]["Dense_0"]["kernel"], (one + 3 * other) / 4, atol=1e-7)
  own_ = ban_jax.average(generations[0], own(), dataset=dataset, model=cnn)
  assert mean.index == 1
  # Its own statistics, estimated anew, are those of the training set: near the running ones of training.
  np.testing.assert_allclose(
    own_.params["batch_stats"]["BatchNorm_0"]["mean"],
    generations[0].params["batch_stats"]["BatchNorm_0"]["mean"],
    atol=1,
  )
  assert ban_jax.evaluate(mean, own(), dataset=dataset, model=cnn)["count"] == 100
  # Its network is the generations', not the configuration's.
  assert ban_jax.average(generations, own(), dataset=dataset).network == mean.network == generations[0].network
  teacher = ban_jax.from_function(lambda v, x: x.reshape(x.shape[0], -1) @ v, np.zeros((64, 10)), dataset, name="f")
  with pytest.raises(ban_jax.ConfigError, match="average takes networks of one kind"):
    ban_jax.average([teacher, generations[0]], own(), dataset=dataset, model=cnn)


@pytest.mark.parametrize("count", [2, 3])
def test_averages_on_several_devices_are_those_of_one(count, run, dataset, cnn, monkeypatch):
  monkeypatch.setattr("ban_jax.averaging.BATCHES", 20)
  given_ = {"dataset": dataset, "model": cnn}
  if count == 3:
    with pytest.raises(ban_jax.ConfigError, match="train.batch_size=20 cannot be shared equally by 3 devices"):
      ban_jax.average(run[1], own(), devices=jax.devices()[:3], **given_)
    return
  one, several = (ban_jax.average(run[1], own(), devices=jax.devices()[:n], **given_).params for n in (1, count))
  for mine, theirs in zip(*(jax.tree.leaves(tree["batch_stats"]) for tree in (one, several)), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=0.2)  # of each device's own examples


@pytest.mark.parametrize("statistics", [{}, {"batch_stats": {}}])
def test_an_average_needs_no_batch_statistics(statistics, dataset):
  model = ban_jax.from_flax(Linear(), dataset)
  members = [{"params": model.init(jax.random.key(seed))["params"], **statistics} for seed in (0, 1)]
  mean = ban_jax.average(members, own(), dataset=dataset, model=model)
  one, other = (member["params"]["Dense_0"]["kernel"] for member in members)
  np.testing.assert_allclose(mean.params["params"]["Dense_0"]["kernel"], (one + other) / 2, atol=1e-7)
  assert ban_jax.predict(mean, np.zeros((1, 8, 8)), **QUIET).shape == (1, 10)


@pytest.mark.parametrize("name", ["a" * 250, "é" * 125 + "a" * 5], ids=["ascii", "utf-8"])
def test_a_name_may_be_as_long_as_file_systems_take_it(name, run, tmp_path):
  ban_jax.export_parameters(run[1][0], tmp_path / name)
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_parameters_are_written_as_safetensors(run, tmp_path):
  from safetensors import safe_open

  generation = run[1][0]
  ban_jax.export_parameters(generation, tmp_path / "p.safetensors")
  with safe_open(tmp_path / "p.safetensors", "np") as file:
    assert json.loads(file.metadata()["network"])["group"] == {
      "name": "own",
      "own": "CNN",
      "features": 4,
      "axis_name": None,
    }
    for name, leaf in trees.leaves(trees.to_plain(generation.params)).items():
      np.testing.assert_array_equal(file.get_tensor(name), leaf)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"path": "."}, "path='.' is a directory; name a file"),
    ({"path": "x.onnx"}, "path='x.onnx': what is written is "),
    ({"path": "x.PT"}, "path='x.PT': what is written is "),
    ({"path": "x.tflite"}, "path='x.tflite': what is written is "),
    ({"path": "x.npz"}, "path='x.npz': what is written is "),
    ({"path": "é" * 200}, "expected a name of at most 255 bytes, as file systems take it"),
    ({"path": ROOT / "setup.py" / "x"}, "setup.py is a file, not a directory"),
    ({"path": None}, "path=None: expected a path, not NoneType"),
    ({"platforms": "cpu"}, "platforms='cpu': expected a sequence, some of cpu, cuda, rocm, tpu"),
    ({"platforms": []}, "platforms=[]: expected a sequence, some of cpu, cuda, rocm, tpu"),
    ({"platforms": ["gpu"]}, "platforms: gpu: expected some of cpu, cuda, rocm, tpu"),
    ({"batch_size": 0}, "batch_size=0: expected a whole number of at least 1, or None"),
  ],
)
def test_wrong_arguments_of_export_are_refused(run, arguments, message):
  with pytest.raises(ban_jax.ConfigError, match=re.escape(message)):
    ban_jax.export(run[1], **{"path": "x", **arguments})
  if set(arguments) == {"path"}:
    with pytest.raises(ban_jax.ConfigError, match=re.escape(message)):
      ban_jax.export_parameters(run[1][0], **arguments)


class Fixed(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(x.reshape(len(x), -1))


def test_a_network_that_needs_a_fixed_number_of_images_is_exported_for_it(dataset, tmp_path):
  model = ban_jax.from_flax(Fixed(), dataset)
  generation = ban_jax.train_generation(None, own(train__epochs=1), dataset=dataset, model=model, **QUIET)
  with pytest.raises(
    ban_jax.ConfigError, match="cannot be exported for any number of images .*give export a batch_size"
  ):
    ban_jax.export(generation, tmp_path / "f")
  ban_jax.export(generation, tmp_path / "f", batch_size=3, platforms=["cpu"])
  inputs = np.random.default_rng(0).uniform(0, 16, (3, 8, 8, 1)).astype(np.float32)
  found = jax.export.deserialize(bytearray((tmp_path / "f").read_bytes())).call(inputs)
  np.testing.assert_allclose(found, ban_jax.predict(generation, inputs), atol=1e-6)
  with pytest.raises(ban_jax.ConfigError, match="platforms: xpu: expected some of cpu, cuda, rocm, tpu"):
    ban_jax.export(generation, tmp_path / "f", platforms=["xpu"])


def test_a_second_thread_that_trains_is_refused_at_once(dataset, cnn):
  entered, leave, errors = threading.Event(), threading.Event(), []

  def wait(*_):
    entered.set()
    leave.wait(30)
    return {}

  slow = dataset._replace(train_order=lambda *arguments: (wait(), dataset.train_order(*arguments))[1])

  def second():
    entered.wait(30)
    try:
      ban_jax.train_generation(None, own(train__epochs=1), dataset=dataset, model=cnn, **QUIET)
    except ban_jax.ConfigError as error:
      errors.append(str(error))
    leave.set()

  thread = threading.Thread(target=second)
  # `prepare` asks for the order once before training; the second thread begins when training asks.
  calls = []
  slow = dataset._replace(
    train_order=lambda *arguments: (calls.append(1), len(calls) > 1 and wait(), dataset.train_order(*arguments))[2]
  )
  thread.start()
  ban_jax.train_generation(None, own(train__epochs=1), dataset=slow, model=cnn, **QUIET)
  thread.join()
  assert len(errors) == 1
  assert errors[0].startswith("another thread of this process is training")


def set_data(words, **changes):
  cfg = ban_jax.get_config(words)
  cfg.data.update(changes)
  return cfg


SETTINGS = {
  "label_noise": 0.4,
  "noise_kind": "pairwise",
  "noise_seed": 3,
  "train_examples": 50,
  "validation": 0.1,
  "pad": 3,
  "flip": True,
}


@pytest.mark.parametrize("words", ["digits,own,smoke", "own,own,smoke"])
@pytest.mark.parametrize("key", SETTINGS)
def test_a_setting_of_the_data_beside_a_data_set_is_refused(words, key, dataset, cnn):
  cfg = set_data(words, **{key: SETTINGS[key]})
  with pytest.raises(ban_jax.ConfigError, match=rf"data\.{key}=.*: expected .*from_arrays takes such settings"):
    ban_jax.train_generation(None, cfg, dataset=dataset, model=cnn, **QUIET)


@pytest.mark.parametrize(
  ("words", "changes", "given", "message"),
  [
    (
      "own,wrn_10_1,smoke",
      {"model__depth": 22},
      "model",
      "the options of model 'wide_resnet' were changed, and have no",
    ),
    ("own,own,smoke,teacher=wrn_10_1", {}, "model teacher_model", "teacher.model 'wide_resnet' has no effect beside"),
    (
      "own,own,smoke",
      {"compute_dtype": "bfloat16"},
      "model",
      "compute_dtype='bfloat16': expected 'float32', because 'CNN",
    ),
    ("own,wrn_10_1,smoke", {"compute_dtype": "bfloat16"}, "model", "compute_dtype='bfloat16': expected 'float32'"),
    ("own,own,smoke", {"compute_dtype": "bfloat16"}, "model teacher_model", "compute_dtype='bfloat16': expected"),
  ],
)
def test_a_setting_of_a_network_beside_a_network_is_refused(words, changes, given, message, dataset, cnn):
  cfg = ban_jax.get_config(words)
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  with pytest.raises(ban_jax.ConfigError, match=message):
    ban_jax.train_generation(None, cfg, dataset=dataset, **dict.fromkeys(given.split(), cnn), **QUIET)


def test_a_teacher_of_the_library_may_compute_in_another_dtype_than_an_own_student(dataset, cnn):
  cfg = ban_jax.get_config("own,own,smoke,teacher=wrn_10_1")
  cfg.compute_dtype = "bfloat16"
  setup = resolving.resolve(cfg, None, resolving.Own(dataset, cnn))
  assert [setup.network(generation).compute_dtype for generation in (0, 1)] == ["bfloat16", "float32"]


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda cfg: ban_jax.train_generation(cfg, None),
      "cfg must be a ConfigDict, as ban_jax.get_config returns it, not None",
    ),
    (
      lambda cfg: ban_jax.train_generation(None, cfg.to_dict()),
      "cfg must be a ConfigDict, as ban_jax.get_config returns it",
    ),
    (lambda cfg: ban_jax.run("runs", cfg), "cfg must be a ConfigDict, as ban_jax.get_config returns it, not str"),
    (lambda cfg: ban_jax.run(cfg, 3), "workdir=3: expected a path, not int"),
    (lambda cfg: ban_jax.train_generation(None, cfg, generation=1.0), "generation=1.0: expected a whole number"),
    (lambda cfg: ban_jax.train_generation(None, cfg, devices=2), "devices=2: expected a sequence of devices"),
    (lambda cfg: ban_jax.train_generation(None, cfg, devices=[]), r"devices=\[\]: expected a sequence of devices"),
    (
      lambda cfg: ban_jax.train_generation(None, cfg, dataset=(1, 2)),
      "dataset must be a Dataset, as ban_jax.from_arrays",
    ),
    (
      lambda cfg: ban_jax.train_generation(None, cfg, model=CNN()),
      "model must be a Model, as ban_jax.from_flax returns",
    ),
    (lambda cfg: ban_jax.load(None), "path=None: expected a path, not NoneType"),
    (lambda cfg: ban_jax.load_run(ROOT, model=Linear()), "model must be a Model, as ban_jax.from_flax returns"),
    (lambda cfg: ban_jax.get_config(["digits", "wrn_10_1", "cpu"]), 'named by one string, "dataset,network,scale"'),
    (
      lambda cfg: ban_jax.train_generation(ROOT, cfg),
      "a Generation or a sequence of them, not PosixPath; read a directory with ban_jax.load",
    ),
    (
      lambda cfg: ban_jax.train_generation(load_data(cfg.data), cfg),
      "a Generation or a sequence of them, not Dataset",
    ),
    (lambda cfg: ban_jax.train_generation(None, cfg, generation=2**40), "expected a whole number below 2"),
    (lambda cfg: load_data(cfg.data).eval_order((1, 2), 3), r"unknown split of digits \(of type tuple\); choose one"),
    (
      lambda cfg: ban_jax.train_generation(None, set_data("own,own,cpu", label_noise=0.4)),
      "data.label_noise=0.4: expected 0.0, because own is given as dataset=, and from_arrays takes such settings",
    ),
    (
      lambda cfg: ban_jax.train_generation(None, ban_jax.get_config("own,own,cpu")),
      "data.name='own': pass the data as",
    ),
    (
      lambda cfg: ban_jax.train_generation(None, ban_jax.get_config("digits,own,cpu")),
      "model.name='own': pass the network as model=",
    ),
  ],
)
def test_arguments_of_a_wrong_type_get_one_sentence(call, message):
  with pytest.raises(ban_jax.ConfigError, match=message) as error:
    call(config())
  assert "damage" not in str(error.value)
  assert "remove" not in str(error.value)


def test_an_absent_platform_is_named():
  code = "import ban_jax; ban_jax.train_generation(None, ban_jax.get_config('digits,wrn_10_1,smoke'))"
  environment = {"JAX_PLATFORMS": "cuda", "PATH": "", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
  assert "ConfigError: JAX finds no device of the platform cuda" in done.stderr


def test_the_registered_digits_pass_the_same_checks(monkeypatch):
  monkeypatch.setattr(images, "check_examples", lambda *_: (_ for _ in ()).throw(ban_jax.DataError("checked")))
  with pytest.raises(ban_jax.DataError, match="checked"):
    digits.load(images.Options(validation=0, train_examples=0, pad=1, flip=False))

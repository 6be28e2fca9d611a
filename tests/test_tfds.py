"""Image classification sets of TFDS by name: two sets that are made here, prepared and read without TensorFlow."""

import functools
import pickle

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import ban_jax
from ban_jax import config, data, feeding, job, presets, resolving
from ban_jax.data import decoding
from ban_jax.data import tfds as tfds_data
from ban_jax.errors import ConfigError, DataError
from ban_jax.types import InputSpec
from configs import tfds as tfds_config

COLOURS, GREYS = ("red", "green", "blue"), ("dark", "light")


@functools.cache
def colours():
  """Returns the images, of several sizes, and classes of each split of a long-tailed RGB set."""
  rng, splits = np.random.default_rng(0), {}
  for split, counts in (("train", (20, 8, 4)), ("test", (3, 3, 3))):
    labels = rng.permutation(np.repeat(np.arange(3), counts))
    pixels = [rng.integers(0, 256, (10 + i % 3, 12 - i % 2, 3), dtype=np.uint8) for i in range(len(labels))]
    splits[split] = (pixels, labels)
  return splits


@functools.cache
def greys():
  """Returns the 8x8 images and classes of each split of a greyscale set."""
  rng, splits = np.random.default_rng(1), {}
  for split, count in (("train", 48), ("validation", 10), ("test", 12)):
    labels = np.arange(count) % 2
    pixels = rng.integers(0, 128, (count, 8, 8, 1)) + 127 * labels[:, None, None, None]
    splits[split] = (list(pixels.astype(np.uint8)), labels)
  return splits


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version("1.2.0")
  FEATURES = {}
  EXAMPLES = staticmethod(dict)

  def _info(self):
    features = tfds.features.FeaturesDict(self.FEATURES)
    return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=tuple(self.FEATURES))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(*part) for split, part in self.EXAMPLES().items()}

  def _generate_examples(self, pixels, labels):
    image, label = self.FEATURES
    for i, (array, number) in enumerate(zip(pixels, labels, strict=True)):
      yield i, {image: Image.fromarray(array.squeeze()), label: int(number)}


def make(name, examples, features, *, register, **attributes):
  """Returns the class of a TFDS set, which gets its name from it."""
  members = {"EXAMPLES": staticmethod(examples), "FEATURES": features, "__module__": __name__, **attributes}
  return type(_Builder)(name, (_Builder,), members, skip_registration=not register)


def prepare(cls, root, file_format="array_record", **settings):
  settings = tfds.download.DownloadConfig(try_download_gcs=False, **settings)
  cls(data_dir=root).download_and_prepare(file_format=file_format, download_config=settings)


def features_of(shape, names, image="image", label="label"):
  return {image: tfds.features.Image(shape=shape), label: tfds.features.ClassLabel(names=names)}


# TFDS finds these by their names.
make("TinyColours", colours, features_of((None, None, 3), COLOURS), register=True)
make("TinyGreys", greys, features_of((8, 8, 1), GREYS), register=True)


def group(dataset, directory, **changes):
  cfg = tfds_config.get_config(f"{dataset},wrn_10_1,smoke")
  cfg.data.update(dir=str(directory), pad=0, flip=False, train_examples=0)
  cfg.data.update(changes)
  config.check(cfg)
  return cfg.data


@pytest.fixture(scope="module")
def both(tmp_path_factory):
  """Returns a TFDS directory with both sets."""
  root = tmp_path_factory.mktemp("tfds")
  data.load(group("tiny_colours", root, size=8))
  data.load(group("tiny_greys", root))
  return root


def assert_holds(dataset, split, pixels, labels):
  """Asserts that a split has these examples, in whatever order."""
  arrays = dataset.splits[split]
  found = sorted((image.tobytes(), label) for image, label in zip(arrays["images"], arrays["labels"], strict=True))
  assert found == sorted((image.tobytes(), label) for image, label in zip(pixels, labels, strict=True))


def test_greyscale_images_keep_their_one_channel_and_their_validation_split(both):
  dataset = data.load(group("tiny_greys", both, validation_split="validation"))
  assert (dataset.name, dataset.spec) == ("tiny_greys", InputSpec("images", (8, 8, 1), 2))
  assert dataset.sizes == {"train": 48, "test": 12, "validation": 10}
  for split, part in greys().items():
    assert_holds(dataset, split, *part)
  assert set(data.load(group("tiny_greys", both)).splits) == {"train", "test"}
  held_out = data.load(group("tiny_greys", both, validation=0.25))
  assert held_out.sizes == {"train": 36, "test": 12, "validation": 12}


def test_images_of_different_sizes_are_resized(both):
  dataset = data.load(group("tiny_colours", both, size=6))
  assert dataset.spec == InputSpec("images", (6, 6, 3), 3)
  for split, (pixels, labels) in colours().items():
    small = [np.asarray(Image.fromarray(array).resize((6, 6), Image.Resampling.BILINEAR)) for array in pixels]
    assert_holds(dataset, split, small, labels)


def test_a_stream_has_the_same_images_and_is_chosen_where_they_are_too_many(both, monkeypatch, caplog):
  whole = data.load(group("tiny_colours", both, size=6)).splits["train"]
  asked = group("tiny_colours", both, size=6, stream=True, workers=1)
  numbers = np.arange(32, dtype=np.int32)
  found = pickle.loads(pickle.dumps(data.load(asked).streams["train"].read))(numbers, numbers, ())
  pairs = [
    sorted((image.tobytes(), int(label)) for image, label in zip(part["images"], part["labels"], strict=True))
    for part in (whole, found)
  ]
  assert pairs[0] == pairs[1]
  monkeypatch.setattr(tfds_data, "SHARE", 0.0)
  assert data.load(group("tiny_colours", both, size=5)).streams
  assert "so that it is streamed; set data.stream=True" in caplog.text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stream": True, "validation": 0.25}, "data.validation=0.25: expected 0.0, because it takes the labels of all"),
    ({"stream": True, "view": "crops"}, "data.view='crops': expected a data.size"),
    ({"view": "crops", "size": 6}, "data.view='crops': expected data.stream=True"),
    ({"workers": 2, "size": 6}, "data.workers=2: expected data.stream=True"),
    ({"view": "all"}, "data.view='all': expected 'whole' or 'crops'"),
  ],
)
def test_options_of_a_stream_that_do_not_fit_are_refused(both, changes, message):
  with pytest.raises(ConfigError, match=message):
    data.load(group("tiny_colours", both, **changes))


def test_resizing_smooths_and_keeps_what_has_the_size():
  board = np.indices((8, 8)).sum(0)[..., None].astype(np.uint8) % 2 * 255

  def resize(image, size):
    return decoding.pixels(image, decoding.Form(size, "whole", 3))

  assert np.ptp(resize(board, 4)) < 64, "without antialiasing, single pixels would be taken"
  np.testing.assert_array_equal(resize(board, 8), board)
  two = np.concatenate([board, 255 - board], axis=-1)
  assert resize(two, 5).shape == (5, 5, 2)
  np.testing.assert_array_equal(resize(two, 5)[..., :1], resize(board, 5))


def test_long_tailed_classes_keep_their_share(both):
  dataset = data.load(group("tiny_colours", both, size=8, validation=0.25, train_examples=12))
  assert np.bincount(dataset.splits["validation"]["labels"]).tolist() == [5, 2, 1]
  assert np.bincount(dataset.splits["train"]["labels"]).tolist() == [8, 3, 1]  # of 15, 6 and 3


def test_a_set_whose_code_is_not_there_is_read_whatever_its_shards_and_format(tmp_path):
  cls = make("TinyUnknown", greys, features_of((8, 8, 1), GREYS, "picture", "kind"), register=False)
  digests = []
  for number, (file_format, shards) in enumerate((("array_record", 1), ("array_record", 3), ("parquet", 2))):
    root = tmp_path / str(number)
    prepare(cls, root, file_format, num_shards=shards)
    for name in ("tiny_unknown", "tiny_unknown:1.2.0", "tiny_unknown:1.*.*"):
      dataset = data.load(group(name, root))
      digests.append(dataset.digest)
  assert_holds(dataset, "test", *greys()["test"])
  assert len(set(digests)) == 1


def test_parts_of_splits(both):
  whole = data.load(group("tiny_greys", both))
  dataset = data.load(group("tiny_greys", both, train_split="train[:75%]", test_split="train[75%:]"))
  assert dataset.sizes == {"train": 36, "test": 12}
  rows = [image.tobytes() for split in ("train", "test") for image in dataset.splits[split]["images"]]
  assert sorted(rows) == sorted(image.tobytes() for image in whole.splits["train"]["images"])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"dataset": "tiny_grays"},
      "data.dataset='tiny_grays': TFDS has no such set, and none .*; is it one of: .*tiny_greys",
    ),
    ({"dataset": "qqqqqqqqq"}, "TFDS has no such set, .*; https://www.tensorflow.org/datasets/catalog lists all"),
    ({"dataset": "a b"}, "data.dataset='a b': expected NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION"),
    ({"dataset": "kaggle:x"}, "data.dataset='kaggle:x': expected NAME, "),
    ({"dataset": "mnist/a=1"}, "data.dataset='mnist/a=1': expected NAME, "),
    ({"dataset": "mnist:9.9.9"}, "data.dataset='mnist:9.9.9': .*cannot be loaded at version 9.9.9, only: 3.0.1"),
    ({"dataset": "eurosat/nope"}, "data.dataset='eurosat/nope': .*BuilderConfig nope not found"),
    (
      {"dataset": "div2k"},
      "'div2k' is no image classification set: expected an Image and a ClassLabel, .* hr .Im",
    ),
    (
      {"dataset": "tiny_colours"},
      "data.size=0: tiny_colours has images of 1.x1. and of 1.x1. pixels; expected the",
    ),
    ({"test_split": "tset"}, "data.test_split='tset': tiny_greys has the splits test, train, validation; a part of"),
    ({"train_split": "train[:"}, r"data.train_split='train\[:': tiny_greys has the splits test, "),
    ({"test_split": "test[:0]"}, r"data.test_split='test\[:0\]': tiny_greys has no example there"),
    ({"test_split": "train[40:]"}, "data.train_split='train' and data.test_split='train.40:.' have examples of tiny_g"),
    ({"validation_split": "test"}, "data.test_split='test' and data.validation_split='test' have examples of tiny_gr"),
  ],
  ids=str,
)
def test_what_cannot_be_read_is_reported(both, changes, message):
  with pytest.raises(ConfigError, match=message):
    data.load(group(**{"dataset": "tiny_greys", "directory": both} | changes))


def test_splits_of_different_sizes_are_reported(tmp_path):
  def examples():
    return {split: ([np.zeros((size, 9, 3), np.uint8)], [0]) for split, size in (("train", 8), ("test", 7))}

  prepare(make("TinyMixed", examples, features_of((None, 9, 3), COLOURS), register=False), tmp_path)
  with pytest.raises(ConfigError, match="data.size=0: tiny_mixed has images of 8x9 and of 7x9 pixels"):
    data.load(group("tiny_mixed", tmp_path))


@pytest.mark.parametrize("asked", ["tiny_own:2.0.0", "tiny_own:9.*.*", "tiny_own/small", "tiny_own/small:1.2.0"])
def test_another_version_of_a_set_without_code_names_those_that_are_there(asked, tmp_path):
  prepare(make("TinyOwn", greys, features_of((8, 8, 1), GREYS), register=False), tmp_path)
  with pytest.raises(ConfigError, match=rf"data.dataset='.*': {tmp_path} has another of .*one of: tiny_own:1.2.0$"):
    data.load(group(asked, tmp_path))


def test_a_set_of_one_class_is_reported(tmp_path):
  def alone():
    return {split: (pixels, np.zeros_like(labels)) for split, (pixels, labels) in greys().items()}

  prepare(make("TinyAlone", alone, features_of((8, 8, 1), ["all"]), register=False), tmp_path)
  with pytest.raises(DataError, match="tiny_alone: there is one class alone; expected at least two"):
    data.load(group("tiny_alone", tmp_path))


def test_a_split_without_labels_is_reported(tmp_path):
  def examples():
    return {"train": ([np.zeros((8, 8, 3), np.uint8)], [0]), "test": ([np.zeros((8, 8, 3), np.uint8)], [-1])}

  prepare(make("TinyHidden", examples, features_of((8, 8, 3), COLOURS), register=False), tmp_path)
  with pytest.raises(ConfigError, match="data.test_split='test': tiny_hidden has no labels there; choose another"):
    data.load(group("tiny_hidden", tmp_path))


def test_another_file_format_is_reported_with_a_way_that_keeps_the_copy(tmp_path):
  prepare(make("TinyOld", greys, features_of((8, 8, 1), GREYS), register=False), tmp_path)
  info = tmp_path / "tiny_old/1.2.0/dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  for file in info.parent.glob("*.array_record-*"):
    file.rename(str(file).replace("array_record", "tfrecord"))
  before = sorted(info.parent.iterdir())
  with pytest.raises(DataError) as error:
    data.load(group("tiny_old", tmp_path))
  for part in (
    f"tiny_old: {info.parent} is prepared as tfrecord", "expected array_record or parquet",
    "Copy it to OTHER/tiny_old/1.2.0", "tfds convert_format --dataset_version_dir=OTHER/tiny_old/1.2.0",
    "data.dir=OTHER",
  ):  # fmt: skip
    assert part in str(error.value)
  assert "elete" not in str(error.value)
  assert sorted(info.parent.iterdir()) == before


@pytest.mark.parametrize("damage", ["truncated", "missing", "info"])
def test_a_damaged_set_is_reported(damage, tmp_path):
  prepare(make("TinyBroken", greys, features_of((8, 8, 1), GREYS), register=False), tmp_path)
  directory = tmp_path / "tiny_broken/1.2.0"
  file = next(directory.glob("*test.array_record*")) if damage != "info" else directory / "dataset_info.json"
  if damage == "missing":
    file.unlink()
  else:
    file.write_bytes(file.read_bytes()[:100])
  with pytest.raises(DataError, match="tiny_broken: the prepared data set in .*tiny_broken.* cannot be read .*If it"):
    data.load(group("tiny_broken", tmp_path))


registered = functools.partial(make, examples=greys, features=features_of((8, 8, 1), GREYS), register=True)


def test_no_network_is_reported_within_seconds(tmp_path, monkeypatch):
  for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")

  def download(self, dl_manager):
    dl_manager.download("https://www.example.org/images.zip")

  registered("TinyRemote", _split_generators=download)
  with pytest.raises(DataError) as error:
    data.load(group("tiny_remote", tmp_path))
  for part in (
    f"tiny_remote: it is not prepared in {tmp_path}", "ProxyError", "tfds.builder('tiny_remote', data_dir=DIRECTORY)",
    ".download_and_prepare(file_format='array_record')", "set data.dir",
  ):  # fmt: skip
    assert part in str(error.value)
  assert not (tmp_path / "tiny_remote/1.2.0").exists()


def test_code_that_needs_tensorflow_is_reported(tmp_path):
  def generate(self, pixels, labels):
    yield 0, {"image": pixels[0], "label": 0}  # an array is encoded with TensorFlow

  registered("TinyArrays", _generate_examples=generate)
  with pytest.raises(DataError, match="tiny_arrays: .* with TensorFlow, which is not installed. .* python -c .import"):
    data.load(group("tiny_arrays", tmp_path))


def test_images_of_16_bits_are_refused(tmp_path):
  image = tfds.features.Image(shape=(8, 8, 1), dtype=np.uint16, encoding_format="png")
  registered("TinyDeep", features={"image": image, "label": tfds.features.ClassLabel(names=GREYS)})
  with pytest.raises(ConfigError, match="data.dataset='tiny_deep': expected images of uint8, not of uint16"):
    data.load(group("tiny_deep", tmp_path))
  assert list(tmp_path.iterdir()) == []


def test_configurations_are_named_by_the_set():
  cfg = tfds_config.get_config("mnist:3.0.1,wrn_16_4,paper,cwtm")
  assert (cfg.data.name, cfg.data.dataset, cfg.loss.name, cfg.train.epochs) == ("tfds", "mnist:3.0.1", "cwtm", 200)
  assert presets.compose("tfds=mnist:3.0.1,wrn_16_4,paper,cwtm") == cfg
  with pytest.raises(ConfigError, match="unknown network 'wrn_16'"):
    tfds_config.get_config("mnist,wrn_16,paper")
  config.check(cfg)
  with pytest.raises(ConfigError, match="data.dataset='': expected a name of TFDS"):
    config.check(presets.compose("tfds,wrn_16_4,paper"))
  with pytest.raises(ConfigError, match="data.dataset='x': expected '', because cifar10 is not read from TFDS"):
    config.check(presets.compose("cifar10=x,wrn_16_4,paper"))


def test_what_is_read_is_part_of_the_identity_of_such_runs_alone():
  of = {words: config.record(presets.compose(words)) for words in ("tfds=mnist,wrn_10_1,cpu", "digits,wrn_10_1,cpu")}
  for key, value in (("data.dataset", "svhn_cropped"), ("data.size", 8), ("data.train_split", "train[:50%]"),
                     ("data.test_split", "validation"), ("data.validation_split", "validation")):  # fmt: skip
    same = [config.identity(record, 1) == config.identity(record | {key: value}, 1) for record in of.values()]
    assert same == [False, True]


def test_two_steps_of_training(both):
  cfg = tfds_config.get_config("tiny_colours,mlp_16,smoke")
  cfg.data.update(dir=str(both), size=8, pad=1, train_examples=0)
  cfg.train.update(epochs=1, batch_size=16)
  cfg.evaluate.batch_size = 5
  generation = ban_jax.train_generation(None, cfg, devices=jax.devices()[:1], progress=False)
  assert generation.metrics["test_count"] == 9
  assert np.isfinite(generation.metrics["test_nll"])


def test_imagenet_is_described_without_being_there():
  setup = resolving.resolve(presets.compose("tfds=imagenet2012,mlp_16,paper"), None, load=data.describe)
  dataset = setup.dataset
  assert (dataset.sizes, dataset.spec[1:3]) == ({"train": 1_281_167, "test": 50_000}, ((224, 224, 3), 1000))
  assert feeding.shapes(dataset, "train", (1, 1, 4))["images"].shape == (1, 1, 4, 224 * 224 * 3)
  assert job.describe(setup, 1).steps_per_epoch == 1_281_167 // 1024
  with pytest.raises(ConfigError, match=r"data.validation=0.1: expected 0.0, because it takes the labels"):
    data.describe({**setup.cfg.data, "validation": 0.1})


def test_recordings_of_a_thousand_classes_are_refused_with_their_size():
  cfg = presets.compose("tfds=imagenet2012,mlp_16,paper")
  cfg.train.update(replay="unused", replay_gib=4.0)
  with pytest.raises(ConfigError, match=r"an epoch's logits take 4.8 GiB, more than train.replay_gib=4; leave"):
    job.describe(resolving.resolve(cfg, None, load=data.describe), 1)

"""Data sets: preparing and reading CIFAR without TensorFlow or network, splits, mini-batch orders, error messages."""

import contextlib
import hashlib
import http.server
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

import forks
import jax
import ml_collections
import numpy as np
import pytest
from conftest import config as conftest_config
from hypothesis import assume, given, settings
from hypothesis import example as with_example
from hypothesis import strategies as st

import ban_jax
from ban_jax import config, data, storage
from ban_jax.data import images, tfds_cifar
from ban_jax.data.arrays import digest
from ban_jax.errors import ConfigError, DataError
from ban_jax.keys import KEYS
from ban_jax.presets import base
from ban_jax.types import InputSpec

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("BAN_SHARED", ROOT.parent / "shared"))
BOTH = pytest.mark.parametrize("name", ["cifar10", "cifar100"])

# Layout of the original archives: the label columns (feature, file of names, classes) and the files of each split.
LAYOUT = {
  "cifar10": (
    [("label", "batches.meta.txt", 10)],
    {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
  ),
  "cifar100": (
    [("coarse_label", "coarse_label_names.txt", 20), ("label", "fine_label_names.txt", 100)],
    {"train": ["train.bin"], "test": ["test.bin"]},
  ),
}
ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def check_data(values):
  """Checks a configuration with this `data` group."""
  config.check(ml_collections.ConfigDict({**base.get_config().to_dict(), "data": values}))


def group(**changes):
  """Returns a configuration's `data` group, of digits that nothing changes."""
  defaults = {name.removeprefix("data."): key.default for name, key in KEYS.items() if name.startswith("data.")}
  values = {**defaults, "name": "digits", "pad": 0, "flip": False, **changes}
  return ml_collections.ConfigDict(values).lock()


def write_archive(path, name, *, rows=24, seed=0, change=lambda files: None):
  """Writes an archive in the original format, `rows` random images per file, and returns its contents.

  `change` may alter the dict of file names and bytes before they are packed.
  """
  rng, (columns, splits), files, expected = np.random.default_rng(seed), LAYOUT[name], {}, {}
  for split, names in splits.items():
    rows = max(rows, 100) if name == "cifar100" else rows
    pixels = rng.integers(0, 256, (rows * len(names), 32, 32, 3), dtype=np.uint8)
    # Every class occurs: training images without one of them are refused.
    labels = {
      feature: rng.permutation(np.arange(len(pixels)) % count).astype(np.uint8) for feature, _, count in columns
    }
    expected[split] = {"image": pixels} | labels
    table = np.concatenate([*(label[:, None] for label in labels.values()),
                            *(pixels[..., channel].reshape(-1, 1024) for channel in range(3))], axis=1)  # fmt: skip
    for file, part in zip(names, np.split(table, len(names)), strict=True):
      files[file] = part.tobytes()
  for feature, file, count in columns:
    files[file] = "\n".join(f"{feature} {i}" for i in range(count)).encode() + b"\n\n"
  files["readme.html"] = b"not data"
  change(files)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w:gz", compresslevel=1) as tar:
    for file, content in files.items():
      member = tarfile.TarInfo(f"{name}-batches-bin/{file}")
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return expected


def assert_holds(dataset, expected):
  """Asserts that a data set is the archive's images and labels, in the archive's order."""
  for split in ("train", "test"):
    arrays = dataset.splits[split]
    np.testing.assert_array_equal(arrays["images"], expected[split]["image"])
    np.testing.assert_array_equal(arrays["labels"], expected[split]["label"])
    assert dataset.sizes[split] == len(arrays["labels"])


def run_python(code, *arguments):
  """Starts code in another Python process."""
  return subprocess.Popen(
    [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
  """Makes every connection fail as without a network: nothing listens at the proxy's port."""
  for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
  monkeypatch.setenv("NO_PROXY", "")
  monkeypatch.setenv("no_proxy", "")


@pytest.fixture
def no_connections(monkeypatch):
  """Collects the addresses that anything in this process tries to connect to or look up."""
  attempts = []

  def refuse(*arguments, **_):
    attempts.append(arguments)
    raise OSError("no connection in this test")

  monkeypatch.setattr(socket.socket, "connect", refuse)
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  return attempts


# --- CIFAR: an archive in the original format, prepared and read ------------------------------------------------------


@BOTH
@pytest.mark.parametrize("place", ["downloads/manual", "."])
def test_archive_is_prepared_and_read_back(name, place, tmp_path, no_connections):
  expected = write_archive(tmp_path / place / ARCHIVES[name], name)
  dataset = data.load(group(name=name, dir=str(tmp_path)))
  assert_holds(dataset, expected)
  assert dataset.spec == InputSpec("images", (32, 32, 3), {"cifar10": 10, "cifar100": 100}[name])
  assert no_connections == []


@BOTH
def test_stock_tfds_reads_what_was_prepared(name, tmp_path, no_connections):
  import tensorflow_datasets as tfds

  expected = write_archive(tmp_path / ARCHIVES[name], name)
  data.load(group(name=name, dir=str(tmp_path)))
  builder = tfds.builder(name, data_dir=tmp_path)
  assert type(builder).__module__ == "tensorflow_datasets.image_classification.cifar"
  assert str(builder.version) == "3.0.2"
  assert builder.info.features["label"].names[:2] == ["label 0", "label 1"]
  for split in ("train", "test"):
    source = tfds.data_source(name, data_dir=tmp_path, split=split, download=False)
    assert len(source) == len(expected[split]["label"])
    numbers = []
    for example in source:
      numbers.append(int(re.fullmatch(rf"{split}_(\d{{5}})", example["id"].decode()).group(1)))
      for feature, values in expected[split].items():
        np.testing.assert_array_equal(example[feature], values[numbers[-1]])
    assert sorted(numbers) == list(range(len(source)))
    assert numbers != sorted(numbers), "in archive order already: this test would not notice that ids are not used"
  assert no_connections == []


def test_prepared_directory_alone_is_enough(tmp_path, no_connections):
  archive = tmp_path / ARCHIVES["cifar10"]
  expected = write_archive(archive, "cifar10")
  tfds_cifar.prepare("cifar10", tmp_path)
  archive.unlink()
  assert_holds(data.load(group(name="cifar10", dir=str(tmp_path))), expected)
  assert no_connections == []


def test_default_directory_is_that_of_tfds(tmp_path, monkeypatch):
  expected = write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", rows=2)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  np.testing.assert_array_equal(tfds_cifar.read("cifar10", "")["test"].images, expected["test"]["image"])


def test_official_checksums_are_those_of_tfds():
  import tensorflow_datasets as tfds

  for name, archive in tfds_cifar.ARCHIVES.items():
    info = tfds.builder_cls(name).url_infos[archive.url]
    assert (info.size, info.checksum, info.filename) == (archive.size, archive.sha256, archive.file)


def test_unofficial_archive_is_accepted_with_a_warning_and_recorded(tmp_path, caplog):
  archive = tmp_path / ARCHIVES["cifar10"]
  write_archive(archive, "cifar10")
  sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
  with caplog.at_level("WARNING", logger="ban_jax"):
    data.load(group(name="cifar10", dir=str(tmp_path)))
  message = next(record.getMessage() for record in caplog.records if "not the official" in record.getMessage())
  assert sha256 in message
  assert "120 training and 24 test images" in message
  assert json.loads((tmp_path / "cifar10/3.0.2/metadata.json").read_text()) == {"archive_sha256": sha256}


def test_no_network_is_reported_within_seconds_and_leaves_nothing(tmp_path, offline):
  directory = tmp_path / "absent"
  start = time.monotonic()
  with pytest.raises(DataError) as error:
    data.load(group(name="cifar100", dir=str(directory)))
  assert time.monotonic() - start < 5
  for part in (
    "cifar100", str(directory / "cifar100/3.0.2"), str(directory / "downloads/manual/cifar-100-binary.tar.gz"),
    "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", "ProxyError", "run again",
  ):  # fmt: skip
    assert part in str(error.value)
  assert len(str(error.value).replace(str(directory), "DIR")) < 800
  assert not directory.exists()


def truncate(path):
  content = path.read_bytes()
  path.write_bytes(content[: len(content) * 2 // 3])


def drop_a_byte(files):
  files["data_batch_3.bin"] = files["data_batch_3.bin"][:-1]


def empty_a_file(files):
  files["test_batch.bin"] = b""


def make_a_label_of_ten(files):
  files["data_batch_1.bin"] = b"\x0a" + files["data_batch_1.bin"][1:]


def lose_a_file(files):
  del files["test_batch.bin"]


def lose_a_name(files):
  files["batches.meta.txt"] = files["batches.meta.txt"].replace(b"label 4\n", b"")


BROKEN = {
  "not an archive": (lambda path: path.write_bytes(b"<html>404</html>"), "truncated or broken"),
  "empty": (lambda path: path.write_bytes(b""), "truncated or broken"),
  "truncated": (truncate, "truncated or broken"),
  "row length": (drop_a_byte, "data_batch_3.bin .* has 73751 bytes, expected whole rows of 3073 bytes"),
  "no rows": (empty_a_file, "test_batch.bin .* has 0 bytes, expected whole rows of 3073 bytes"),
  "label": (make_a_label_of_ten, "label of 10 in train, expected less than 10"),
  "file": (lose_a_file, "does not hold test_batch.bin"),
  "names": (lose_a_name, "batches.meta.txt .* names 9 classes, expected 10"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_archive_is_refused_and_a_good_one_then_works(case, tmp_path):
  break_it, message = BROKEN[case]
  archive = tmp_path / "downloads/manual" / ARCHIVES["cifar10"]
  if break_it in (drop_a_byte, empty_a_file, make_a_label_of_ten, lose_a_file, lose_a_name):
    write_archive(archive, "cifar10", change=break_it)
  else:
    write_archive(archive, "cifar10")
    break_it(archive)
  with pytest.raises(DataError, match=message) as error:
    data.load(group(name="cifar10", dir=str(tmp_path)))
  for part in ("cifar10: ", str(archive), "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"):
    assert part in str(error.value)
  assert not (tmp_path / "cifar10/3.0.2").exists()
  expected = write_archive(archive, "cifar10")
  assert_holds(data.load(group(name="cifar10", dir=str(tmp_path))), expected)


def test_another_file_format_is_reported(tmp_path):
  write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", rows=2)
  tfds_cifar.prepare("cifar10", tmp_path)
  info = tmp_path / "cifar10/3.0.2/dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  for file in info.parent.glob("*.array_record-*"):
    file.rename(str(file).replace("array_record", "tfrecord"))
  with pytest.raises(DataError, match=r"cifar10: .*3\.0\.2 is prepared as tfrecord.*expected array_record.*data\.dir"):
    data.load(group(name="cifar10", dir=str(tmp_path)))


@pytest.mark.parametrize("damage", ["truncated", "missing", "no info", "empty"])
def test_damaged_prepared_directory_is_reported(damage, tmp_path):
  write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10")
  tfds_cifar.prepare("cifar10", tmp_path)
  prepared = tmp_path / "cifar10/3.0.2"
  if damage == "truncated":
    truncate(next(prepared.glob("*train.array_record*")))
  elif damage == "missing":
    next(prepared.glob("*test.array_record*")).unlink()
  elif damage == "no info":
    (prepared / "dataset_info.json").unlink()
  else:
    for file in prepared.iterdir():
      file.unlink()
  with pytest.raises(DataError, match=r"cifar10: the prepared data set in .*3\.0\.2 cannot be read .*Move that"):
    data.load(group(name="cifar10", dir=str(tmp_path)))


def test_directory_that_cannot_be_written_is_reported(tmp_path):
  (tmp_path / "cifar10").write_text("in the way")
  write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", rows=2)
  with pytest.raises(DataError, match="cifar10: cannot prepare the data set in .*FileExistsError"):
    data.load(group(name="cifar10", dir=str(tmp_path)))


@pytest.mark.parametrize(
  ("directory", "message"),
  [("a" * 300, "/a{300} cannot be looked into: .*File name too long"), ("~nobody-here/x", "~nobody-here/x: .*home")],
)
def test_directory_that_cannot_be_looked_into_is_reported(directory, message, no_connections):
  with pytest.raises(DataError, match=f"^cifar10: .*{message}.* Set data.dir to another directory$"):
    data.load(group(name="cifar10", dir=directory))
  assert not no_connections


READ = "import sys; from ban_jax.data import arrays, tfds_cifar; splits = tfds_cifar.read('cifar10', sys.argv[1]); " \
  "print(arrays.digest({split: part._asdict() for split, part in splits.items()}))"  # fmt: skip


def test_killed_preparation_is_never_trusted(tmp_path):
  expected = write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", rows=1000)
  process = run_python(READ, tmp_path)
  staging = tmp_path / "cifar10/incomplete.ban_jax"
  deadline = time.monotonic() + 60
  while not any(path.is_file() for path in staging.rglob("*")):
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert staging.exists()
  assert not (tmp_path / "cifar10/3.0.2").exists()
  assert_holds(data.load(group(name="cifar10", dir=str(tmp_path))), expected)
  assert [path.name for path in (tmp_path / "cifar10").iterdir()] == ["3.0.2"]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_a_preparation_killed_at_random_times_leaves_all_or_nothing(kills, tmp_path):
  root, prepared = tmp_path / "root", tmp_path / "root/cifar10/3.0.2"
  write_archive(root / ARCHIVES["cifar10"], "cifar10", rows=300)
  command, begin = [sys.executable, "-c", READ, str(root)], time.monotonic()
  expected = forks.run(command).stdout.splitlines()[-1]
  assert re.fullmatch("[0-9a-f]{64}", expected)
  seconds, rng = time.monotonic() - begin, random.Random(kills)
  for kill in range(kills):
    shutil.rmtree(prepared, ignore_errors=True)
    folder = tmp_path / f"kill_{kill}"
    folder.mkdir()
    process = forks.Fork(command, folder)
    time.sleep(rng.uniform(0, 1.2 * seconds))
    with contextlib.suppress(ProcessLookupError):
      os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60) in (0, -signal.SIGKILL)
    if prepared.exists():
      assert forks.run(command).stdout.splitlines()[-1] == expected
  assert forks.run(command).stdout.splitlines()[-1] == expected
  assert [path.name for path in (root / "cifar10").iterdir()] == ["3.0.2"]


def test_leftover_of_another_archive_is_not_taken(tmp_path):
  """A process killed just before the last rename leaves a complete data set under the provisional name."""
  write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", seed=1)
  tfds_cifar.prepare("cifar10", tmp_path)
  leftover = tmp_path / "cifar10/incomplete.ban_jax/cifar10"
  leftover.mkdir(parents=True)
  (tmp_path / "cifar10/3.0.2").rename(leftover / "3.0.2")
  expected = write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", seed=2)
  assert_holds(data.load(group(name="cifar10", dir=str(tmp_path))), expected)


def test_somebody_without_our_lock_may_be_faster(tmp_path):
  other, ours = tmp_path / "other", tmp_path / "ours"
  write_archive(other / ARCHIVES["cifar10"], "cifar10", seed=1)
  write_archive(ours / ARCHIVES["cifar10"], "cifar10", rows=400)
  tfds_cifar.prepare("cifar10", other)

  def be_faster():
    while not (ours / "cifar10/incomplete.ban_jax/cifar10").exists():
      time.sleep(0.001)
    (other / "cifar10/3.0.2").rename(ours / "cifar10/3.0.2")

  thread = threading.Thread(target=be_faster, daemon=True)
  thread.start()
  dataset = data.load(group(name="cifar10", dir=str(ours)))
  thread.join(timeout=10)
  assert dataset.sizes["test"] == 24, "theirs was there first, so it is theirs that is read"
  assert [path.name for path in (ours / "cifar10").iterdir()] == ["3.0.2"]


def test_two_processes_prepare_at_once(tmp_path):
  write_archive(tmp_path / ARCHIVES["cifar10"], "cifar10", rows=400)
  processes = [run_python(READ, tmp_path) for _ in range(2)]
  outputs = [process.communicate()[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  digests = [output.split()[-1] for output in outputs]
  assert re.fullmatch("[0-9a-f]{64}", digests[0])
  assert digests[0] == digests[1]
  assert sum("Generating train examples" in output for output in outputs) == 1, "both did the work"


@contextlib.contextmanager
def serve(directory):
  """Serves a directory over HTTP and yields its address and the list of requested paths."""
  asked = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, directory=directory, **options)

    def log_message(self, *_):
      asked.append(self.path)

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
      server.shutdown()
      thread.join()


def test_downloaded_archive_must_be_the_official_one(tmp_path, monkeypatch):
  monkeypatch.setenv("NO_PROXY", "127.0.0.1")
  served, directory = tmp_path / "served", tmp_path / "data"
  official = tfds_cifar.ARCHIVES["cifar10"]
  expected = write_archive(served / official.file, "cifar10")
  with serve(served) as (address, asked):
    url = f"{address}/{official.file}"
    monkeypatch.setitem(tfds_cifar.ARCHIVES, "cifar10", official._replace(url=url))
    with pytest.raises(DataError, match=r"cifar10: .*cannot be downloaded: NonMatchingChecksumError"):
      data.load(group(name="cifar10", dir=str(directory)))
    left = sorted(path.name for path in directory.rglob("*"))
    assert left == [".cifar10.lock", "cifar10"], "something of the wrong file was left"

    monkeypatch.setitem(tfds_cifar.ARCHIVES, "cifar10", official._replace(url=f"{address}/absent.tar.gz"))
    with pytest.raises(DataError, match=r"cifar10: .*absent.tar.gz cannot be downloaded: HTTPError: 404"):
      data.load(group(name="cifar10", dir=str(directory)))

    content = (served / official.file).read_bytes()
    as_if = official._replace(url=url, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(tfds_cifar.ARCHIVES, "cifar10", as_if)
    assert_holds(data.load(group(name="cifar10", dir=str(directory))), expected)
    assert (directory / "downloads/manual" / official.file).read_bytes() == content
    assert [path.name for path in (directory / "cifar10").iterdir()] == ["3.0.2"]
    assert asked


@pytest.mark.slow
def test_the_real_data_set(pytestconfig):
  tool = SHARED / "tools/make_tfds.py"
  if not tool.exists():
    pytest.skip(f"no real CIFAR-10 at {SHARED}; set BAN_SHARED")
  directory = pytestconfig.cache.mkdir("data")  # kept: it takes most of a minute, and nothing if it was made before
  subprocess.run([sys.executable, tool, directory, "cifar10"], check=True, capture_output=True)
  cfg = group(name="cifar10", dir=str(directory), pad=4, flip=True)
  dataset = data.load(cfg)
  assert dataset.sizes == {"train": 50_000, "test": 10_000}
  assert_describes(data.describe(cfg), dataset)
  assert (np.bincount(dataset.splits["train"]["labels"]) == 5000).all()
  assert (np.bincount(dataset.splits["test"]["labels"]) == 1000).all()
  # The usual normalisation of CIFAR-10.
  np.testing.assert_allclose(dataset.splits["train"]["mean"], [0.4914, 0.4822, 0.4465], atol=5e-4)
  np.testing.assert_allclose(dataset.splits["train"]["std"], [0.2470, 0.2435, 0.2616], atol=5e-4)


# --- Splits -----------------------------------------------------------------------------------------------------------


def rows_of(arrays):
  return [image.tobytes() for image in arrays["images"]]


def test_digits_are_the_1797_digits():
  from sklearn.datasets import load_digits

  dataset = data.load(group())
  assert dataset.spec == InputSpec("images", (8, 8, 1), 10)
  assert dataset.sizes == {"train": 400, "test": 1397}
  assert set(dataset.splits) == {"train", "test"}
  assert (np.bincount(dataset.splits["train"]["labels"]) == 40).all()
  pixels, labels = load_digits(return_X_y=True)
  grey = np.floor(pixels * 255 / 16 + 0.5).astype(np.uint8)
  original = sorted((image.tobytes(), label) for image, label in zip(grey, labels, strict=True))
  ours = [pair for arrays in dataset.splits.values() for pair in zip(rows_of(arrays), arrays["labels"], strict=True)]
  assert sorted(ours) == original
  assert len(np.unique(dataset.splits["train"]["images"])) == 17


def test_which_digits_train_never_changes():
  """Published results depend on exactly these examples."""
  train = data.load(group()).splits["train"]
  assert hashlib.sha256(train["images"].tobytes() + train["labels"].tobytes()).hexdigest() == (
    "dd700ccf2b0866d01b2d617d4ec97a6c2b640ced36dc82249dd357fb3712783f"
  )


@pytest.mark.parametrize(("validation", "train_examples"), [(0.25, 0), (0.25, 100), (0.0, 50), (0.1, 359)])
def test_splits_are_disjoint_and_balanced(validation, train_examples):
  whole = data.load(group())
  dataset = data.load(group(validation=validation, train_examples=train_examples))
  held_out = round(400 * validation)
  chosen = train_examples or 400 - held_out
  assert dataset.sizes == {"train": chosen, "test": 1397} | ({"validation": held_out} if held_out else {})
  parts = [dataset.splits[split] for split in dataset.splits if split != "test"]
  seen = [row for arrays in parts for row in rows_of(arrays)]
  assert len(set(seen)) == len(seen)
  assert set(seen) <= set(rows_of(whole.splits["train"]))
  for arrays in parts:
    counts = np.bincount(arrays["labels"], minlength=10)
    assert counts.max() - counts.min() <= 1
  np.testing.assert_array_equal(dataset.splits["test"]["images"], whole.splits["test"]["images"])


def test_choices_are_fixed_nested_and_leave_validation_alone():
  small = data.load(group(validation=0.1, train_examples=60))
  large = data.load(group(validation=0.1, train_examples=200, pad=1))
  assert set(rows_of(small.splits["train"])) < set(rows_of(large.splits["train"]))
  np.testing.assert_array_equal(small.splits["validation"]["images"], large.splits["validation"]["images"])
  np.random.seed(0)  # noqa: NPY002  # the global generator must not matter
  data._load.cache_clear()
  assert data.load(group(validation=0.1, train_examples=60)).digest == small.digest


def test_balanced_order_takes_classes_in_turn():
  labels = np.repeat(np.arange(4), [10, 10, 3, 5])
  order = images.balanced_order(labels)
  assert sorted(order) == list(range(28))
  for round_ in range(3):
    assert sorted(labels[order[4 * round_ : 4 * round_ + 4]]) == [0, 1, 2, 3]
  assert (np.diff(order[labels[order] == 0]) < 0).any(), "a class is taken in the order of the file"


# Digests of digits, whose classes are equally large: how other sets are divided must not change these.
EVEN = {
  (0.0, 0): "ef176c7983ec9219d81555c84971a6b7a380f5d5b528581c0d5c99ae4c198c6b",
  (0.1, 0): "116556fa487afcef8cd0e3e9aa1f8f2195cbc27aab4e5d39fdebe10b9cfac05b",
  (0.0, 60): "36cd56ca288dedfaa145a5c023679527a5def280277a5ebaf6feae43d1deefa7",
  (0.25, 101): "d73df564cdad9525c220676926613275f7b2363980bf863eb5556407255d5bbd",
}


@pytest.mark.parametrize(("validation", "train_examples"), EVEN)
def test_even_classes_are_divided_as_ever(validation, train_examples):
  dataset = data.load(group(validation=validation, train_examples=train_examples))
  assert dataset.digest == EVEN[validation, train_examples]


def options_of(**changes):
  values = group(**changes)
  return images.Options(*[values[key] for key in images.Options._fields])


def labels_of(counts):
  """Returns the labels of a pool in some order, class c being there `counts[c]` times."""
  return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(100, 110), min_size=1, max_size=5), st.floats(0.01, 0.9), st.integers(0, 10))
def test_nearly_even_classes_are_divided_as_even_ones(counts, validation, train_examples):
  labels = labels_of(counts)
  assume(not train_examples or train_examples >= len(counts))
  parts = images.divide("mine", labels, options_of(validation=validation, train_examples=train_examples))
  order, held_out = images.balanced_order(labels), round(len(labels) * validation)
  end = held_out + train_examples if train_examples else len(labels)
  assume(len(np.unique(labels[order[held_out:end]])) == len(counts))
  np.testing.assert_array_equal(parts[0], order[:held_out])
  np.testing.assert_array_equal(parts[1], order[held_out:end])


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.integers(1, 12), st.floats(0, 0.99), st.floats(0, 1))
@with_example(50, 2, 0.2, 0.0)
@with_example(10, 10, 0.99, 1.0)
@with_example(10, 2, 0.0, 0.5)  # fifteen of twenty: a stretch of whole rounds
def test_even_classes_keep_an_example_each_however_small_they_are(classes, size, validation, chosen):
  labels, held_out = labels_of([size] * classes), min(round(validation * classes * size), classes * (size - 1))
  assume(held_out or not validation)
  train_examples = round(classes + chosen * (classes * (size - 1) - held_out))
  for changes in ({}, {"train_examples": train_examples}):
    validating, training = images.divide("mine", labels, options_of(validation=validation, **changes))
    assert len(validating) == held_out
    assert len(training) == (train_examples if changes else classes * size - held_out)
    assert len({*validating, *training}) == len(validating) + len(training)
    assert set(labels[training]) == set(range(classes))


@pytest.mark.parametrize(
  ("counts", "change", "message"),
  [
    ([1] * 50, {"validation": 0.2}, "data.validation=0.2: expected a share that leaves examples on both sides; it"),
    ([2] * 50, {"train_examples": 49}, "data.train_examples=49: expected at least 50, one of each class of mine"),
    ([2] * 50, {"validation": 0.2, "train_examples": 49}, "data.train_examples=49: expected at least 50, one of each"),
  ],
)
def test_even_classes_that_would_be_emptied_are_refused(counts, change, message):
  with pytest.raises(ConfigError, match=message):
    images.divide("mine", labels_of(counts), options_of(**change))


LONG_TAILED = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 500)), min_size=2, max_size=8)


@settings(max_examples=200, deadline=None)
@given(LONG_TAILED, st.floats(0, 0.99), st.floats(0, 1))
@with_example([1000, 1], 0.1, 0.0)  # in a round each, the second class would be in the validation alone
@with_example([1000, 200, 40, 8, 2], 0.1, 0.01)
def test_long_tailed_classes_are_divided_in_proportion(counts, validation, chosen):
  counts, labels = np.array(counts), labels_of(counts)
  assume(10 * counts.max() > 11 * counts.min())
  held_out = np.round(validation * counts).clip(max=counts - 1).sum()
  assume(held_out or not validation)
  train_examples = round(len(counts) + chosen * (len(labels) - held_out - len(counts)))
  for changes in ({}, {"train_examples": train_examples}):
    options = options_of(validation=validation, **changes)
    validating, training = images.divide("mine", labels, options)
    again = images.divide("mine", labels, options)
    assert [part.tolist() for part in again] == [validating.tolist(), training.tolist()]
    together = np.concatenate([validating, training])
    assert len(np.unique(together)) == len(together) == (held_out + train_examples if changes else len(labels))
    of_validation, of_training = (np.bincount(labels[part], minlength=len(counts)) for part in (validating, training))
    assert (abs(of_validation - validation * counts) < 1).all()
    assert (of_training > 0).all()
    rest = counts - of_validation
    share = rest * of_training.sum() / rest.sum()
    if (share >= 1).all():
      assert (abs(of_training - share) < 1).all()
    else:  # others make room for the one example of a rare class
      assert (of_training[share < 1] == 1).all()
      assert (of_training[share >= 1] < share[share >= 1] + 1).all()


def test_long_tailed_training_examples_lack_at_most_one_a_class_of_fewer():
  labels = labels_of([300, 100, 30, 10, 3, 1])
  choices = [set(images.divide("mine", labels, options_of(train_examples=k))[1].tolist()) for k in range(6, 445)]
  for small, large in zip(choices, choices[1:], strict=False):
    lost = [labels[i] for i in small - large]
    assert len(lost) == len(set(lost))
  assert choices[-1] == set(range(444))


def test_a_long_tailed_set_is_built_as_it_is_divided():
  counts = [60, 20, 4, 1]
  labels = labels_of(counts)
  pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
  pool = images.Examples(pixels, labels)
  dataset = images.build("mine", pool, pool, num_classes=4, options=options_of(validation=0.25, train_examples=40))
  by_split = {split: np.bincount(dataset.splits[split]["labels"], minlength=4) for split in ("train", "validation")}
  assert by_split["validation"].tolist() == [15, 5, 1, 0]
  assert by_split["train"].tolist() == [28, 9, 2, 1]  # of 45, 15, 3 and 1 that are left
  assert dataset.sizes == {"train": 40, "test": 85, "validation": 21}
  for split in ("train", "validation"):
    rows = dataset.splits[split]["images"].ravel()
    assert (np.diff(rows.astype(int)) > 0).all(), "the pool's order"
    np.testing.assert_array_equal(labels[rows], dataset.splits[split]["labels"])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"train_examples": 3}, "data.train_examples=3: expected at least 4, one of each class of mine, or 0 for all"),
    ({"train_examples": 86}, "data.train_examples=86: expected at most 85, what mine has to train on"),
    (
      {"train_examples": 80, "validation": 0.25},
      "data.train_examples=80: expected at most 64, what mine has to train on after 21 examples are held out for"
      " validation",
    ),
    (
      {"validation": 0.001},
      "data.validation=0.001: expected a share that leaves examples on both sides; it takes 0 of mine's 85 training"
      " examples",
    ),
  ],
)  # fmt: skip
def test_options_that_do_not_fit_long_tailed_data_are_reported(change, message):
  with pytest.raises(ConfigError) as error:
    images.divide("mine", labels_of([60, 20, 4, 1]), options_of(**change))
  assert str(error.value) == message


def test_digest_tells_data_apart():
  digests = [
    data.load(group(**change)).digest
    for change in ({}, {"train_examples": 399}, {"validation": 0.1}, {"train_examples": 360})
  ]
  assert len(set(digests)) == 4
  assert data.load(group(pad=2, flip=True)).digest == digests[0], "augmentation is no part of the data"
  base = {"train": {"images": np.zeros((2, 3), np.uint8), "labels": np.zeros(2, np.int32)}}
  for key, array in (("images", np.zeros((3, 2), np.uint8)), ("images", np.zeros((2, 3), np.int8))):
    assert digest(base) != digest({"train": base["train"] | {key: array}})
  assert digest(base) != digest({"test": base["train"]})
  flipped = np.zeros((2, 3), np.uint8)
  flipped[1, 2] = 1
  assert digest(base) != digest({"train": base["train"] | {"images": flipped}})
  assert digest(base) == digest({"train": dict(reversed(base["train"].items()))})


def test_loading_is_memoised_and_arrays_are_read_only():
  dataset = data.load(group(pad=1))
  assert data.load(ml_collections.FrozenConfigDict(group(pad=1))) is dataset
  assert data.load(group(pad=2)).fetch is not dataset.fetch
  assert data.load(group(pad=1, train_examples=10)).fetch is dataset.fetch
  for arrays in dataset.splits.values():
    assert arrays["mean"] is dataset.splits["train"]["mean"]
    for array in arrays.values():
      assert not array.flags.writeable


@pytest.mark.parametrize("change", [{}, {"train_examples": 30, "validation": 0.2}])
def test_normalised_training_images_have_mean_0_and_deviation_1(change):
  dataset = data.load(group(**change))
  arrays = dataset.splits["train"]
  index = np.arange(dataset.sizes["train"], dtype=np.int32)
  inputs = np.asarray(dataset.fetch(arrays, index, key=None, positions=None, train=False).inputs, np.float64)
  np.testing.assert_allclose(inputs.mean(axis=(0, 1, 2)), 0, atol=1e-6)
  np.testing.assert_allclose(inputs.std(axis=(0, 1, 2)), 1, atol=1e-6)


def test_channel_statistics_are_those_of_float64():
  pixels = np.random.default_rng(0).integers(0, 200, (2500, 4, 5, 3), dtype=np.uint8) + np.arange(3, dtype=np.uint8)
  pixels[..., 2] = 7
  mean, std = images.channel_statistics(pixels)
  assert mean.dtype == std.dtype == np.float32
  np.testing.assert_allclose(mean, (pixels / 255).mean(axis=(0, 1, 2)), rtol=1e-7)
  np.testing.assert_allclose(std[:2], (pixels / 255).std(axis=(0, 1, 2))[:2], rtol=1e-7)
  assert std[2] == 1, "a constant channel must not divide by zero"


# --- Orders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 128, 1397, 2000])
@pytest.mark.parametrize("split", ["train", "test"])
def test_eval_order_is_every_example_once(split, batch_size):
  dataset = data.load(group())
  order, size = dataset.eval_order(split, batch_size), dataset.sizes[split]
  assert order.dtype == np.int32
  assert order.shape == (-(-size // batch_size), batch_size)
  assert order.ravel()[:size].tolist() == list(range(size))
  assert (order.ravel()[size:] == -1).all()


@pytest.mark.parametrize("batch_size", [1, 7, 128, 400])
def test_train_order_is_a_permutation_drawn_from_the_key(batch_size):
  dataset = data.load(group())
  order = dataset.train_order(jax.random.key(0), batch_size)
  assert order.dtype == np.int32
  assert order.shape == (400 // batch_size, batch_size)
  assert len(np.unique(order)) == order.size
  assert order.min() >= 0
  assert order.max() < 400
  np.testing.assert_array_equal(dataset.train_order(jax.random.key(0), batch_size), order)
  assert (dataset.train_order(jax.random.key(1), batch_size) != order).mean() > 0.9
  assert (order.ravel() != np.arange(order.size)).mean() > 0.9


# --- The registry -----------------------------------------------------------------------------------------------------


def test_keys_are_those_that_the_loader_takes():
  images_keys = ("validation", "train_examples", "pad", "flip", "label_noise", "noise_kind", "noise_seed")
  images_keys = (*images_keys, "augment")
  assert data.DATASETS.options("cifar10") == data.DATASETS.options("cifar100") == ("dir", *images_keys)
  assert data.DATASETS.options("digits") == images_keys
  tfds_keys = ("dataset", "size", "train_split", "test_split", "validation_split", "stream", "view", "workers")
  assert data.DATASETS.options("tfds") == ("dir", *tfds_keys, *images_keys)
  assert data.DATASETS.options("ptb") == ("dir", "train_examples", "window")
  assert data.DATASETS.options("pydoc") == ("train_examples", "window", "tokens")


@pytest.mark.parametrize(
  "ask", [data.DATASETS.options, lambda name: data.load(group(name=name)), lambda name: data.describe(group(name=name))]
)
def test_unknown_data_set_is_reported(ask):
  with pytest.raises(ConfigError) as error:
    ask("mnist")
  assert str(error.value) == f"unknown data set 'mnist'; choose one of: {', '.join(sorted(data.DATASETS))}"


def test_keys_that_a_loader_does_not_take_are_ignored():
  dataset = data.load(group())
  assert data.load(group(dir="/nowhere", window=35)) is dataset
  taken = {"name": "digits", "validation": 0.0, "train_examples": 0, "pad": 0, "flip": False}
  assert data.load(taken) is dataset
  with pytest.raises(KeyError, match="flip"):
    data.load({key: value for key, value in taken.items() if key != "flip"})


def test_embedded_data_sets_are_one_of_each_kind():
  embedded = {name: source.kind for name, source in data.DATASETS.items() if source.embedded}
  assert embedded == {"digits": "images", "pydoc": "tokens"}
  for name, source in data.DATASETS.items():
    if name == "own":  # the caller's
      continue
    assert ("window" in data.DATASETS.options(name)) == (source.kind == "tokens")
    assert source.embedded == ("dir" not in data.DATASETS.options(name))
    assert (source.describe is None) == (source.embedded or name in ("enwik8", "wikitext"))


def assert_describes(known, dataset):
  """Asserts that the description of a data set is right, except for the words of its vocabulary."""
  assert known.spec._replace(words=()) == dataset.spec._replace(words=())
  assert len(known.spec.words) == len(dataset.spec.words)
  assert known.fetch is dataset.fetch
  of = lambda found: jax.tree.map(lambda array: (array.shape, array.dtype), found)  # noqa: E731
  assert of(dict(known.splits)) == of({split: dataset.splits[split] for split in known.splits})
  assert known.sizes == {split: dataset.sizes[split] for split in known.splits}
  assert {"train", "test"} <= known.splits.keys()
  assert ("validation" in known.splits) == ("validation" in dataset.splits)
  for batch_size in (1, 7):
    for order in (lambda data_, size: data_.train_order(jax.random.key(0), size), lambda d, n: d.eval_order("test", n)):
      np.testing.assert_array_equal(order(known, batch_size), order(dataset, batch_size))


OPTIONS = [{}, {"pad": 1, "flip": True}, {"validation": 0.1}, {"validation": 0.1, "train_examples": 60}]


@pytest.mark.parametrize("change", OPTIONS)
def test_embedded_images_are_described_by_loading(change):
  assert_describes(data.describe(group(**change)), data.load(group(**change)))


@pytest.mark.parametrize("change", OPTIONS)
def test_images_described_without_data_are_those_that_are_built(change):
  options = images.Options(*[group(**change)[key] for key in images.Options._fields])
  known = images.describe("digits", pool=400, test=1397, shape=(8, 8, 1), num_classes=10, options=options)
  assert_describes(known, data.load(group(**change)))


@BOTH
def test_cifar_is_described_without_data(name, tmp_path, no_connections):
  absent = str(tmp_path / "absent")
  known = data.describe(group(name=name, dir=absent, validation=0.1, pad=4, flip=True))
  assert known.spec == InputSpec("images", (32, 32, 3), {"cifar10": 10, "cifar100": 100}[name])
  assert known.splits["train"]["images"].shape == (45_000, 32, 32, 3)
  assert known.sizes == {"train": 45_000, "validation": 5_000, "test": 10_000}
  with pytest.raises(ConfigError, match=rf"data.train_examples=50001: expected at most 50000, what {name} has"):
    data.describe(group(name=name, dir=absent, train_examples=50_001))
  assert list(tmp_path.iterdir()) == []
  assert no_connections == []


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"train_examples": 401},
      "data.train_examples=401: expected at most 400, what digits has to train on",
    ),
    (
      {"train_examples": 400, "validation": 0.1},
      "data.train_examples=400: expected at most 360, what digits has to train on after 40 examples are held out for"
      " validation",
    ),
    (
      {"validation": 0.001},
      "data.validation=0.001: expected a share that leaves examples on both sides; it takes 0 of digits's 400"
      " training examples",
    ),
    (
      {"pad": 8},
      "data.pad=8: expected at most 7, because reflection needs more pixels than it pads, and digits has 8x8 images",
    ),
  ],
)
def test_options_that_do_not_fit_the_data_are_reported(change, message):
  with pytest.raises(ConfigError) as error:
    data.load(group(**change))
  assert str(error.value) == message


def test_bad_orders_are_reported():
  dataset = data.load(group(train_examples=100))
  with pytest.raises(ConfigError) as error:
    dataset.train_order(jax.random.key(0), 128)
  assert str(error.value) == "train.batch_size=128: expected at most 100, the training examples of digits"
  with pytest.raises(ConfigError) as error:
    dataset.eval_order("validation", 10)
  assert str(error.value) == "unknown split of digits 'validation'; choose one of: test, train"


def test_importing_the_package_imports_no_reader():
  heavy = {"tensorflow_datasets", "sklearn", "PIL"}
  process = run_python(f"import sys, ban_jax.data; print(sorted({heavy} & set(sys.modules)))")
  assert process.communicate()[0].strip() == "[]"


# --- Values that are wrong whatever the data --------------------------------------------------------------------------


def text_group(**changes):
  """Returns the `data` group of a text data set."""
  return group(**{"name": "pydoc", "window": 35} | changes)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (group(name="mnist"), f"unknown data set 'mnist'; choose one of: {', '.join(sorted(data.DATASETS))}"),
    (group(name=3), "data.name=3: expected a name"),
    (group(dir=None), 'data.dir is None: expected a local directory, or "" for the default'),
    (group(dir="gs://bucket/x"), "data.dir='gs://bucket/x': expected a local directory, or \"\" for the default"),
    (group(validation=1.0), "data.validation=1.0: expected a share in [0, 1)"),
    (group(validation=-0.1), "data.validation=-0.1: expected a share in [0, 1)"),
    (group(validation=float("nan")), "data.validation=nan: expected a share in [0, 1)"),
    (
      group(train_examples=-1),
      "data.train_examples=-1: expected a whole number of at least 0, 0 for all training examples",
    ),
    (
      group(train_examples=2.5),
      "data.train_examples=2.5: expected a whole number of at least 0, 0 for all training examples",
    ),
    (group(pad=-1), "data.pad=-1: expected a whole number of at least 0"),
    (group(pad=True), "data.pad=True: expected a whole number of at least 0"),
    (group(flip=1), "data.flip=1: expected True or False"),
    (group(window=35), "data.window=35: expected 0, because digits holds images, and no text is cut into windows"),
    (text_group(window=0), "data.window=0: expected at least 1, the tokens of a window of pydoc"),
    (text_group(window=-1), "data.window=-1: expected a whole number of at least 0"),
    (text_group(window=True), "data.window=True: expected a whole number of at least 0"),
    (text_group(pad=4), "data.pad=4: expected 0, because pydoc is text, and no image is cropped"),
    (text_group(flip=True), "data.flip=True: expected False, because pydoc is text, and no image is flipped"),
    (
      text_group(label_noise=0.1),
      "data.label_noise=0.1: expected 0.0, because pydoc is text, and has no labels to replace",
    ),
    (group(label_noise=1.0), "data.label_noise=1.0: expected a share in [0, 1)"),
    (group(noise_seed=-1), "data.noise_seed=-1: expected a whole number of at least 0"),
    (group(noise_kind="random"), "unknown data.noise_kind 'random'; choose one of: pairwise, symmetric"),
    (
      group(dataset="mnist"),
      "data.dataset='mnist': expected '', because digits is not read from TFDS by a name, as data.name='tfds' is",
    ),
    (
      text_group(size=8),
      "data.size=8: expected 0, because pydoc is not read from TFDS by a name, as data.name='tfds' is",
    ),
    (group(name="tfds"), "data.dataset='': expected a name of TFDS, such as mnist, because data.name='tfds'"),
    (group(name="tfds", dataset=3), "data.dataset=3: expected a name of TensorFlow Datasets"),
    (group(name="tfds", test_split=""), "data.test_split='': expected a split"),
    (group(name="tfds", size=-1), "data.size=-1: expected a whole number of at least 0, 0 for the images' own size"),
    (
      group(name="tfds", dataset="mnist", validation=0.1, validation_split="validation"),
      "data.validation=0.1: expected 0.0, because data.validation_split='validation' is the validation split",
    ),
    (text_group(validation=0.1), "data.validation=0.1: expected 0.0, because pydoc brings its own validation split"),
  ],
)
def test_wrong_values_are_reported(values, message):
  with pytest.raises(ConfigError) as error:
    check_data(values)
  assert str(error.value) == message


def test_wrong_values_are_reported_before_any_work(tmp_path, no_connections):
  with pytest.raises(ConfigError, match="data.pad=-4"):
    check_data(group(name="cifar10", dir=str(tmp_path / "absent"), pad=-4))
  assert list(tmp_path.iterdir()) == []
  assert no_connections == []


@pytest.mark.parametrize("name", data.DATASETS)
def test_right_values_are_accepted_for_any_directory(name):
  of_kind = text_group if data.DATASETS[name].kind == "tokens" else group
  by_name = {"dataset": "mnist"} if name == "tfds" else {}
  check_data(of_kind(name=name, dir="/nowhere", train_examples=0 if name == "own" else 10, **by_name))


# --- wrong labels ----------------------------------------------------------------------------------------------------


def test_label_noise_replaces_a_share_of_the_training_labels_and_nothing_else():
  clean, noisy = data.load(group(validation=0.1)), data.load(group(validation=0.1, label_noise=0.4))
  true, seen = clean.splits["train"]["labels"], noisy.splits["train"]["labels"]
  assert (true != seen).sum() == round(0.4 * len(true)) == round(noisy.record["wrong_labels"] * len(true))
  assert set(np.unique(seen)) <= set(range(10))
  for split in ("test", "validation"):
    np.testing.assert_array_equal(clean.splits[split]["labels"], noisy.splits[split]["labels"])
  np.testing.assert_array_equal(clean.splits["train"]["images"], noisy.splits["train"]["images"])
  confusion = np.zeros((10, 10), int)
  confusion[tuple(np.transpose(noisy.record["labels_seen"])[:2])] = np.transpose(noisy.record["labels_seen"])[2]
  np.testing.assert_array_equal(confusion.sum(1), np.bincount(true, minlength=10))
  assert np.trace(confusion) == (true == seen).sum()
  assert (confusion > 0).sum() > 40  # any other class
  assert noisy.digest != clean.digest
  assert clean.record == {}


@pytest.mark.parametrize(("share", "count"), [(0.001, 400), (0.2, 2), (1e-9, 400)])
def test_noise_that_replaces_no_label_is_refused_before_training(share, count):
  pixels, labels = np.zeros((count, 4, 4), np.uint8), np.arange(count) % 2
  message = f"data.label_noise={share}: expected a share that replaces at least one label; it takes 0 of mine's {count}"
  with pytest.raises(ConfigError, match=message):
    ban_jax.from_arrays((pixels, labels), (pixels, labels), label_noise=share, name="mine")


def test_a_record_of_noise_grows_with_the_labels_and_not_with_the_square_of_the_classes():
  pixels, labels = np.zeros((8000, 1, 1), np.uint8), np.arange(4000).repeat(2)
  made = ban_jax.from_arrays((pixels, labels), (pixels[:1], labels[:1]), label_noise=0.2)
  assert len(json.dumps(made.record)) < 200_000


def test_pairwise_noise_takes_the_next_class():
  noisy = data.load(group(label_noise=0.3, noise_kind="pairwise"))
  true, seen = (noisy.splits[split]["labels"] for split in ("train_true", "train_seen"))
  wrong = true != seen
  assert wrong.sum() == 120
  np.testing.assert_array_equal(seen[wrong], (true[wrong] + 1) % 10)


def test_the_noise_has_a_seed_of_its_own():
  first, again, other = (
    data.load(group(label_noise=0.4, noise_seed=seed, pad=pad)) for seed, pad in ((0, 0), (0, 1), (1, 0))
  )
  np.testing.assert_array_equal(first.splits["train"]["labels"], again.splits["train"]["labels"])
  assert (first.splits["train"]["labels"] != other.splits["train"]["labels"]).any()


def test_the_splits_of_wrong_labels_hold_them_all():
  noisy = data.load(group(label_noise=0.4))
  labels = {split: noisy.splits[split]["labels"] for split in ("train_true", "train_seen", "wrong_true", "wrong_seen")}
  assert noisy.sizes["train_true"] == noisy.sizes["train_seen"] == noisy.sizes["train"] == 400
  assert noisy.sizes["wrong_true"] == noisy.sizes["wrong_seen"] == 160
  assert (labels["wrong_true"] != labels["wrong_seen"]).all()
  wrong = labels["train_true"] != labels["train_seen"]
  np.testing.assert_array_equal(labels["train_true"][wrong], labels["wrong_true"])
  np.testing.assert_array_equal(labels["train_seen"][wrong], labels["wrong_seen"])


def test_a_generation_knows_what_became_of_wrong_labels(tmp_path, monkeypatch):
  saved, save = [], storage.save_step
  monkeypatch.setattr(storage, "save_step", lambda *arguments: (saved.append(arguments[-1]), save(*arguments)))
  cfg = conftest_config(data__train_examples=0, data__label_noise=0.4, train__epochs=1, train__checkpoint_every=10)
  metrics = ban_jax.train_generation(None, cfg, workdir=tmp_path, progress=False).metrics
  assert saved
  assert "labels_seen" not in json.dumps([record["lineage"] for record in saved])
  assert json.loads((tmp_path / "gen_0" / "manifest.json").read_text())["data"]["wrong_labels"] == 0.4
  assert (metrics["train_seen_count"], metrics["wrong_seen_count"]) == (400, 160)
  # Of 400 examples, 160 have wrong labels: the others' part of those predicted as they truly are is what is left.
  correct = {
    name: count - metrics[f"{name}_error"] * count / 100 for name, count in (("train_true", 400), ("wrong_true", 160))
  }
  assert -1e-6 <= correct["train_true"] - correct["wrong_true"] <= 240 + 1e-6
  plain = ban_jax.train_generation(None, conftest_config(train__epochs=1), progress=False)
  assert "train_seen_error" not in plain.metrics

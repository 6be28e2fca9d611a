"""Streamed data: the bytes of resident ones for any devices, processes, workers and kills; errors with their record."""

import contextlib
import functools
import io
import itertools
import pathlib
import pickle
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, Linear
from PIL import Image
from sklearn.datasets import load_digits
from sources import Absent, Fatal, Records

import ban_jax
from ban_jax import devices as devices_lib
from ban_jax import feeding, preemption, train, trees
from ban_jax.data import decoding
from ban_jax.errors import CheckpointError, ConfigError, DataError


class Killed(BaseException):
  """Ends a training between two dispatches."""


def digits(first, end):
  """Returns digits in four classes, from a beginning to an end."""
  pixels, labels = (array[first:end] for array in load_digits(return_X_y=True))
  return (15 * pixels.reshape(-1, 8, 8)).astype(np.uint8), labels % 4


TRAIN, TEST = Records(*digits(0, 160)), Records(*digits(900, 1003))


@functools.cache
def resident():
  return ban_jax.from_arrays((TRAIN.images, TRAIN.labels), (TEST.images, TEST.labels), pad=1)


def streamed(workers=0, train_source=TRAIN, **options):
  return ban_jax.from_source(train_source, TEST, **{"num_classes": 4, "pad": 1, "workers": workers, **options})


@functools.cache
def linear():
  """Returns a network that compiles in no time."""
  return ban_jax.from_flax(Linear(), resident())


def small(**changes):
  cfg = ban_jax.get_config("own,own,smoke")
  cfg.train.update(epochs=2, batch_size=40, checkpoint_every=1, evaluate_every=0)
  cfg.train.update(changes)
  return cfg


def train_one(dataset, taught_by=None, cfg=None, **given):
  return ban_jax.train_generation(taught_by, cfg or small(), dataset=dataset, model=linear(), progress=False, **given)


def train_two(dataset, devices=None, cfg=None):
  teacher = train_one(dataset, cfg=cfg, devices=devices)
  return teacher, train_one(dataset, teacher, cfg, devices=devices)


def known(generations):
  """Returns all that two runs must agree on."""
  return [(trees.digest(one.params), one.metrics) for one in generations]


@pytest.mark.parametrize(("count", "workers"), [(1, 4), (2, 0), (4, 1)])
def test_a_stream_trains_the_bytes_of_resident_data_on_any_number_of_devices(count, workers):
  devices = jax.devices()[:count]
  generations = train_two(streamed(workers), devices)
  assert known(generations) == known(train_two(resident(), devices))
  assert generations[1].metrics["test_count"] == 103  # an uneven last batch
  assert generations[0].history[0]["waited"] >= 0


@contextlib.contextmanager
def killed_at(step):
  """Ends the training in the block once so many steps are done."""
  real = train._advance

  def advance(lane, live):
    live = real(lane, live)
    if live.done >= step:
      raise Killed
    return live

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "_advance", advance)
    with pytest.raises(Killed):
      yield


@contextlib.contextmanager
def preempted_at(step):
  """Saves and ends the training in the block after so many steps, as a signal does that all processes learn of."""
  asked = itertools.count(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(preemption, "watch", lambda saves: contextlib.nullcontext(lambda: next(asked) == step))
    with pytest.raises(ban_jax.Preempted):
      yield


def drawn(count):
  """Returns some steps of the eight of a training, and a generator, whose seed is printed."""
  seed = time.time_ns()
  print(f"seed {seed}")
  rng = np.random.default_rng(seed)
  return np.sort(rng.choice(np.arange(1, 8), count, replace=False)).tolist(), rng


def test_killed_twice_at_random_and_resumed_by_other_workers_on_other_devices(tmp_path):
  steps, rng = drawn(2)
  layouts = list(zip(rng.permutation([0, 1, 4]).tolist(), rng.permutation([1, 2, 4]).tolist(), strict=True))
  print(f"killed at {steps}; workers and devices: {layouts}")
  found = []
  for name, made in (("resident", lambda workers: resident()), ("streamed", streamed)):
    *killed, (workers, count) = layouts
    for step, (some, few) in zip(steps, killed, strict=True):
      with killed_at(step):
        train_one(made(some), devices=jax.devices()[:few], workdir=tmp_path / name)
    found.append(train_one(made(workers), devices=jax.devices()[:count], workdir=tmp_path / name))
  assert known(found[:1]) == known(found[1:])


def test_recorded_teachers_of_a_stream_are_those_of_resident_data(tmp_path):
  found = []
  for name, dataset in (("resident", resident()), ("streamed", streamed())):
    found.append(train_two(dataset, cfg=small(replay=str(tmp_path / name), epochs=1)))
  assert known(found[0]) == known(found[1])


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_neither_workers_nor_where_reading_begins_change_what_is_read(workers):
  order = np.random.default_rng(0).permutation(160).astype(np.int32).reshape(4, 40)
  devices = tuple(jax.devices()[:2])
  dataset = streamed(workers)
  first, *rest = feeding.feeds(dataset, "train", order[1:], [2, 1], devices, 2, first=1, draw=(0, 0, 0))
  assert first["images"].shape == (2, 2, 20, 64)
  expected = TRAIN.images[order].reshape(4, 2, 20, 64).swapaxes(0, 1)
  np.testing.assert_array_equal(first["images"], expected[:, 1:3])
  np.testing.assert_array_equal(rest[0]["images"][:, 0], expected[:, 3])
  assert np.asarray(rest[0]["index"][:, 1] == devices_lib.NO_BATCH).all()


PROCESSES = """
import pathlib, sys, jax
sys.path.insert(0, "tests")
import test_streams as t
number, count, port, workers, step = map(int, sys.argv[1:6])
jax.config.update("jax_num_cpu_devices", 1)
jax.distributed.initialize(f"localhost:{port}", count, number)
class Own(t.Records):
  read = set()
  def __getitem__(self, number):
    self.read.add(number)
    return super().__getitem__(number)
source = t.TRAIN if workers else Own(t.TRAIN.images, t.TRAIN.labels)
found = []
for name, dataset in (("resident", t.resident()), ("streamed", t.streamed(workers, source))):
  Own.read.clear()
  workdir = pathlib.Path(sys.argv[6], name)
  if step:
    with t.preempted_at(step):
      t.train_one(dataset, workdir=workdir)
  else:
    teacher = t.train_one(dataset, workdir=workdir)
    found.append(t.known([teacher, t.train_one(dataset, teacher)]))
assert found[:1] == found[1:], found
print(len(Own.read), *(one[1]["test_count"] for each in found for one in each))
"""


def in_processes(folder, count, *arguments):
  """Runs so many processes, and returns the last line that each has printed."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  given = [map(str, (number, count, port, *arguments, folder)) for number in range(count)]
  started = [
    subprocess.Popen([sys.executable, "-c", PROCESSES, *one], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for one in given
  ]
  answers = [process.communicate(timeout=300)[0].splitlines()[-1].split() for process in started]
  assert [process.returncode for process in started] == [0] * count
  return answers


@pytest.mark.slow
def test_processes_read_their_own_rows_and_other_ones_resume_to_the_bytes_of_resident_data(tmp_path):
  (step,), _ = drawn(1)
  for answer in in_processes(tmp_path, 2, 0, step):
    assert 0 < int(answer[0]) < 160
  assert in_processes(tmp_path, 4, 1, 0) == [["0", *["103"] * 4]] * 4


def encoded(pixels, kind="PNG"):
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def replaced(number, record):
  """Returns the training records with another one in a place."""
  records = [TRAIN[each] for each in range(len(TRAIN))]
  records[number] = record
  return records


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (
      {"image": encoded(TRAIN.images[0])[:60], "label": 0},
      r"record 77 of 160 has an image that cannot be decoded \(.*tru",
    ),
    ({"image": b"no image", "label": 0}, r"record 77 of 160 has an image that cannot be decoded"),
    ({"image": np.zeros((8, 9), np.uint8), "label": 0}, r"record 77 is 8x9x1; expected 8x8x1"),
    ({"image": np.zeros((8, 8)), "label": 0}, r"record 77 of 160 .*float64 \[8, 8\]; expected uint8"),
    ({"image": TRAIN.images[0], "label": 4}, r"record 77 of 160 has the label 4; expected classes from 0 to 3"),
    ({"image": TRAIN.images[0], "label": 0.5}, r"record 77 of 160 has the label 0.5; expected a whole number"),
    ({"pixels": TRAIN.images[0]}, r"record 77 of 160 is a mapping with pixels; expected \(image, label\)"),
  ],
)
def test_what_cannot_be_read_is_named_by_its_record(record, message):
  with pytest.raises(DataError, match=message):
    streamed(train_source=replaced(77, record))


def test_a_source_that_shrinks_ends_the_training_with_a_sentence():
  records = replaced(0, TRAIN[0])
  dataset = streamed(train_source=records)
  del records[100:]
  with pytest.raises(
    DataError, match=r"source, train: record 1\d\d of 160, of which there are 100 by now, cannot be read"
  ):
    train_one(dataset)


def read_by(source, workers=1):
  """Reads 160 records, as `TRAIN` has them, by processes."""
  dataset = streamed(workers)
  stream = dataset.streams["train"]
  stream = stream._replace(read=stream.read.__self__._replace(source=source).read)
  order = np.arange(160, dtype=np.int32).reshape(4, 40)
  return feeding.feeds(dataset._replace(streams={"train": stream}), "train", order, [1] * 4, _one())


def test_a_process_that_dies_or_cannot_begin_is_a_sentence():
  with pytest.raises(DataError, match=r"source, train: a process that read record 7 has died \(exit status 1\), per"):
    list(read_by(Fatal(TRAIN.images, TRAIN.labels)))
  with pytest.raises(DataError, match=r"source, train: record 7 of 160 has the label 9; expected classes from 0 to 3"):
    list(read_by(Records(TRAIN.images, [*TRAIN.labels[:7], 9])))
  mine = Records(TRAIN.images, TRAIN.labels)
  mine.opened = lambda: 0
  with pytest.raises(DataError, match=r"source, train: the source cannot be given to other processes \(.*pickle"):
    list(read_by(mine))
  with pytest.raises(DataError, match=r"a process that was to read has ended at its start \(exit status 1\) and said"):
    list(read_by(Absent(TRAIN.images, TRAIN.labels)))


ABANDONED = """
import pathlib, sys, time
sys.path.insert(0, "tests")
import jax, numpy as np
import ban_jax, sources
from ban_jax import feeding
if __name__ == "__main__":
  source = sources.Watched(np.zeros((160, 8, 8), np.uint8), np.arange(160) % 2)
  source.folder = pathlib.Path(sys.argv[1])
  data = ban_jax.from_source(source, source, num_classes=2, workers=4)
  order = np.zeros((1000, 160), np.int32)
  feeds = feeding.feeds(data, "train", order, [1] * 1000, tuple(jax.devices()[:1]))
  next(feeds)
  print("reading", flush=True)
  time.sleep(600)
"""


def test_processes_that_read_end_with_a_killed_training_and_leave_no_memory_behind(tmp_path):
  started = subprocess.Popen(
    [sys.executable, "-c", ABANDONED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  assert started.stdout.readline() == "reading\n"
  readers = {int(entry.name) for entry in tmp_path.iterdir()} - {started.pid}
  assert readers
  for reader in readers:
    assert "/memfd:rows (deleted)" in pathlib.Path(f"/proc/{reader}/maps").read_text()  # which has no name to stay
  started.kill()
  started.communicate()
  end = time.monotonic() + 30
  while any(map(_runs, readers)):
    assert time.monotonic() < end
    time.sleep(0.01)


def _runs(process):
  status = pathlib.Path(f"/proc/{process}/stat")
  return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def _one():
  return tuple(jax.devices()[:1])


def test_a_slow_disk_is_said(monkeypatch, caplog):
  monkeypatch.setattr(feeding, "SLOW", 0.01)
  stream = streamed().streams["train"]

  def read(*arguments):
    time.sleep(0.1)
    return stream.read(*arguments)

  slow = streamed()._replace(streams={"train": stream._replace(read=read)})
  list(feeding.feeds(slow, "train", np.zeros((1, 40), np.int32), [1], _one()))
  assert "source, train: no mini-batch for 0 s; the disk is slow" in caplog.text


def test_another_source_is_refused_at_resumption_by_what_differs(tmp_path):
  train_one(streamed(), workdir=tmp_path)
  with pytest.raises(CheckpointError, match=r"train's examples: 160 there, 161 here"):
    train_one(streamed(train_source=Records(*digits(0, 161))), workdir=tmp_path)
  changed = replaced(0, {"image": 255 - TRAIN.images[0], "label": 0})
  with pytest.raises(CheckpointError, match=r"train's sample: "):
    train_one(streamed(train_source=changed), workdir=tmp_path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """Two folders of JPEGs of several sizes, in three classes."""
  root, rng = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
  for split, count in (("train", 8), ("test", 2)):
    for label in range(3):
      (root / split / f"class {label}").mkdir(parents=True)
      for number in range(count):
        shape = (20 + 3 * number, 50 - 2 * number, 3)
        slope = np.linspace(80 * label, 80 * label + 60, shape[1])[None, :, None] + rng.uniform(0, 20, shape)
        path = root / split / f"class {label}" / f"{number}.jpg"
        path.write_bytes(encoded(slope.astype(np.uint8), "JPEG"))
  return root


def test_a_folder_is_cut_into_random_parts_that_follow_from_seed_generation_epoch_and_place(folders):
  data = ban_jax.from_source(folders / "train", folders / "test", size=16, view="crops", flip=True)
  assert data.spec.shape == (16, 16, 3)
  assert (data.spec.num_classes, dict(data.sizes)) == (3, {"train": 24, "test": 6})
  read = data.streams["train"].read
  numbers, places = np.arange(24, dtype=np.int32), np.arange(24, dtype=np.int32)
  whole = read(numbers, places, (0, 0, 0))
  np.testing.assert_array_equal(whole["labels"], np.repeat(range(3), 8))
  part = read(numbers[9:12], places[9:12], (0, 0, 0))
  np.testing.assert_array_equal(part["images"], whole["images"][9:12])
  others = [read(numbers, places, draw)["images"] for draw in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
  others.append(read(numbers, places + 1, (0, 0, 0))["images"])
  assert all((other != whole["images"]).any(axis=1).mean() > 0.9 for other in others)
  middle = read(numbers, places, ())["images"]
  np.testing.assert_array_equal(middle, pickle.loads(pickle.dumps(read))(numbers, places + 5, ())["images"])
  cfg = ban_jax.get_config("own,mlp_16,smoke")
  cfg.train.update(epochs=1, batch_size=8, evaluate_every=0)
  generation = ban_jax.train_generation(None, cfg, dataset=data, progress=False)
  assert generation.metrics["test_count"] == 6


def test_a_part_is_where_its_box_says_and_a_draft_changes_little():
  ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
  form = decoding.Form(16, "crops", 3)
  middle = decoding.pixels(ramp, form)
  assert middle[0, 0, 0] == pytest.approx(16 + 7, abs=1)  # the middle seven eighths
  drawn = decoding.pixels(ramp, form, (3, 1, 4, 1))
  left, _, right, _ = decoding._box((256, 256), (3, 1, 4, 1))
  assert drawn[0, -1, 0] - drawn[0, 0, 0] == pytest.approx((right - left) * 15 / 16, abs=3)
  jpeg = decoding.pixels(encoded(np.ascontiguousarray(ramp), "JPEG"), form, (3, 1, 4, 1))
  assert np.abs(jpeg.astype(int) - drawn).max() <= 6


@pytest.mark.parametrize(
  ("given", "error", "message"),
  [
    ({"view": "all"}, ConfigError, "view='all': expected one of: crops, whole"),
    ({"view": "crops"}, ConfigError, "view='crops': expected a size"),
    ({"flip": "no"}, ConfigError, "flip='no': expected True or False"),
    ({"name": ""}, ConfigError, "name='': expected a printable word, because it names the data set in messages"),
    ({"num_classes": None}, ConfigError, "num_classes: expected the number of classes"),
    ({"workers": -1}, ConfigError, "workers=-1: expected a whole number of at least 0"),
    ({"train_source": 7}, DataError, "source, train is of type int; expected anything with len"),
    ({"train_source": []}, DataError, "source, train: it is empty"),
    ({"train_source": "/nowhere"}, DataError, "/nowhere cannot be read as a folder of images"),
    (
      {"train_source": (TRAIN.images, TRAIN.labels[1:])},
      DataError,
      r"\[160, 8, 8\] and int64 \[159\]; expected images",
    ),
    ({"train_source": (TRAIN.images, TRAIN.labels), "workers": 2}, ConfigError, "arrays are read by threads"),
  ],
)
def test_wrong_sources_are_refused(given, error, message):
  with pytest.raises(error, match=message):
    streamed(**given)


def test_arrays_larger_than_memory_are_read_from_their_file(tmp_path):
  mapped = np.memmap(tmp_path / "images", np.uint8, "w+", shape=TRAIN.images.shape)
  mapped[:] = TRAIN.images
  data = ban_jax.from_source((mapped, TRAIN.labels), (TEST.images, TEST.labels), pad=1)
  found = data.streams["train"].read(np.array([5, 3]), np.array([0, 1]), ())
  np.testing.assert_array_equal(found["images"], TRAIN.images[[5, 3]].reshape(2, 64))
  assert data.scaling == resident().scaling
  cfg = small()
  cfg.loss.class_weights = "balanced"
  with pytest.raises(ConfigError, match="source is streamed"):
    train_one(data, cfg=cfg)


def test_tokens_of_a_file_train_the_bytes_of_tokens_on_the_devices(tmp_path):
  ids = np.random.default_rng(0).integers(0, 9, 500).astype(np.uint16)
  ids.tofile(tmp_path / "ids.bin")
  mapped = np.memmap(tmp_path / "ids.bin", np.uint16, "r")
  data = ban_jax.from_tokens(mapped[:400], mapped[400:], vocabulary=9, window=8)
  whole = ban_jax.from_text(ids[:400], validation=0, test=ids[400:], vocabulary=9, window=8)
  cfg = ban_jax.get_config("own,lstm_32,smoke")
  cfg.train.update(epochs=1, batch_size=4, evaluate_every=0)
  cfg.optim.schedule = "constant"
  cfg.evaluate.batch_size = cfg.evaluate.training_batch_size = 3
  one, other = (ban_jax.train_generation(None, cfg, dataset=each, progress=False) for each in (data, whole))
  assert trees.digest(one.params) == trees.digest(other.params)
  assert one.metrics["test_nll"] == other.metrics["test_nll"]
  with pytest.raises(DataError, match=r"tokens, train: token 3 is 8; expected 0 to 7"):
    ban_jax.from_tokens(np.array([1, 2, 3, 8]), ids, vocabulary=8, window=2)

"""Text data sets: windows of streams, every token predicted once, vocabularies, PTB's files, the Python manual."""

import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ban_jax import data
from ban_jax.data import ptb, pydoc, reading, text
from ban_jax.errors import ConfigError, DataError
from ban_jax.evaluating import Subject, measure
from ban_jax.models.char_cnn_lstm import SYMBOLS, character_table
from ban_jax.types import InputSpec, Model

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("BAN_SHARED", ROOT.parent / "shared"))


def group(**changes):
  """Returns a configuration's `data` group."""
  values = {
    "name": "pydoc", "dir": "", "validation": 0.0, "train_examples": 0, "pad": 0, "flip": False, "window": 35
  } | changes  # fmt: skip
  return ml_collections.ConfigDict(values).lock()


def numbered(count, window, **changes):
  """Returns a data set whose splits are `count` different tokens, so that each shows its place."""
  parts = dict.fromkeys(("train", "validation", "test"), " ".join(f"w{i:03}" for i in range(count - 1)))
  options = text.Options(**{"train_examples": 0, "window": window} | changes)
  return reading.build("numbered", parts, reading.Reading("words", eos=True), options=options)


def read(dataset, split, order):
  """Returns the inputs, labels and mask of an order's batches, [steps, B, T] each."""
  arrays = dataset.splits[split]
  batches = [
    dataset.fetch(arrays, jnp.asarray(index), key=None, positions=None, train=split == "train") for index in order
  ]
  return [np.stack(parts) for parts in list(zip(*batches, strict=True))[:3]]


def columns(values, mask):
  """Returns the values that a row of the batch reads from the first step to the last, for each row, without padding."""
  return [values[:, row][mask[:, row]] for row in range(values.shape[1])]


# --- Windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 25, 200])
@pytest.mark.parametrize("window", [1, 7, 10, 100])
def test_every_token_is_predicted_once_in_order(window, batch_size):
  dataset = numbered(100, window, train_examples=100)
  tokens = dataset.splits["test"]["tokens"]
  eos = dataset.spec.words.index("<eos>")
  assert dataset.sizes["test"] == 100
  assert (tokens[0], tokens[-1]) == (eos, eos)
  order = dataset.eval_order("test", batch_size)
  assert order.dtype == np.int32
  assert order.shape == (math.ceil(math.ceil(100 / window) / batch_size), batch_size)
  inputs, labels, mask = read(dataset, "test", order)
  assert inputs.dtype == labels.dtype == np.int32
  assert mask.dtype == bool
  assert inputs.shape == labels.shape == mask.shape == (*order.shape, window)
  assert mask.sum() == 100
  assert (np.concatenate(columns(labels, mask)) == tokens[1:]).all(), "column after column, it is the text"
  assert (np.concatenate(columns(inputs, mask)) == tokens[:-1]).all(), "a label is not the token after its input"
  assert inputs[0, 0, 0] == eos
  assert not mask[order < 0].any()


@pytest.mark.parametrize(("window", "batch_size"), [(10, 3), (7, 4), (10, 10), (1, 100), (100, 1)])
def test_training_reads_equal_stretches_side_by_side(window, batch_size):
  dataset = numbered(100, window)
  order = dataset.train_order(jax.random.key(0), batch_size)
  assert order.dtype == np.int32
  assert order.shape == (100 // window // batch_size, batch_size)
  assert (dataset.train_order(jax.random.key(1), batch_size) == order).all()
  inputs, labels, mask = read(dataset, "train", order)
  assert mask.all()
  tokens = dataset.splits["train"]["tokens"]
  length = len(order) * window
  for row, (entering, leaving) in enumerate(zip(columns(inputs, mask), columns(labels, mask), strict=True)):
    assert (entering == tokens[row * length : (row + 1) * length]).all()
    assert (leaving == tokens[row * length + 1 : (row + 1) * length + 1]).all()


def test_fetch_belongs_to_the_window_alone():
  assert numbered(100, 7).fetch is numbered(50, 7, train_examples=20).fetch is text.make_fetch(7)
  assert numbered(100, 7).fetch is not numbered(100, 8).fetch


def test_fetch_is_the_same_in_a_compiled_step():
  dataset = numbered(100, 7)
  index = np.array([14, -1, 3], np.int32)
  fetch = jax.jit(lambda arrays, index: dataset.fetch(arrays, index, key=None, positions=None, train=False))
  inputs, labels, mask, _ = fetch(dataset.splits["test"], index)
  tokens = dataset.splits["test"]["tokens"]
  np.testing.assert_array_equal(mask.sum(1), [2, 0, 7])  # tokens 99 and 100 are the fifteenth window's
  np.testing.assert_array_equal(labels[0, :2], tokens[99:])
  np.testing.assert_array_equal(inputs[2], tokens[21:28])


# --- Evaluation -------------------------------------------------------------------------------------------------------


def unigram(dataset):
  """Returns a Model that answers every token with the words' frequencies in train (one added), and their logs."""
  counts = 1 + np.bincount(dataset.splits["train"]["tokens"][1:], minlength=dataset.spec.num_classes)
  logs = np.log(counts / counts.sum())

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    return jnp.broadcast_to(variables["params"]["logs"], (*inputs.shape, len(logs))), carry, {}

  return Model("unigram", dataset.spec, None, lambda batch: (), apply), logs


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 33])
def test_unigram_perplexity(batch_size, devices):
  dataset = data.load(group())
  model, logs = unigram(dataset)
  variables = {"params": {"logs": jnp.asarray(logs, jnp.float32)}, "batch_stats": {}}
  got = measure(Subject((model,), (variables,), dataset, tuple(jax.devices()[:devices])), "test", batch_size)
  tokens = dataset.splits["test"]["tokens"][1:]
  assert got["count"] == dataset.sizes["test"] == len(tokens)
  np.testing.assert_allclose(got["nll"], -logs[tokens].mean(), rtol=1e-6)
  np.testing.assert_allclose(got["perplexity"], np.exp(-logs[tokens].mean()), rtol=1e-5)
  np.testing.assert_allclose(got["error"], 100 * (tokens != logs.argmax()).mean(), rtol=1e-6)


# --- Penn Treebank ----------------------------------------------------------------------------------------------------

GOOD = {
  "ptb.train.txt": b" the cat sat \n the <unk> N \r\n\n the end",
  "ptb.valid.txt": b" the cat \n",
  "ptb.test.txt": b" sat the \n end \n",
}


def write_ptb(directory, **changes):
  """Writes the three files, with changes as `valid=b"..."`, or None for none, and returns the `data` group."""
  directory.mkdir(exist_ok=True)
  for file, content in (GOOD | {f"ptb.{split}.txt": content for split, content in changes.items()}).items():
    if content is not None:
      (directory / file).write_bytes(content)
  return group(name="ptb", dir=str(directory), window=2)


def sentence(dataset, split):
  return " ".join(dataset.spec.words[token] for token in dataset.splits[split]["tokens"])


def test_ptb_words_and_lines(tmp_path, caplog):
  dataset = data.load(write_ptb(tmp_path))
  # By frequency, then alphabetically.
  words = ("<eos>", "the", "<unk>", "N", "cat", "end", "sat")
  assert dataset.spec == InputSpec("tokens", (2,), 7, words)
  assert sentence(dataset, "train") == "<eos> the cat sat <eos> the <unk> N <eos> <eos> the end <eos>"
  assert sentence(dataset, "validation") == "<eos> the cat <eos>"
  assert sentence(dataset, "test") == "<eos> sat the <eos> end <eos>"
  assert dataset.sizes == {"train": 12, "validation": 3, "test": 5}
  assert "not the {'train': 929589, 'validation': 73760, 'test': 82430} of Mikolov's split" in caplog.text
  for arrays in dataset.splits.values():
    assert arrays["tokens"].dtype == np.int32
    assert not arrays["tokens"].flags.writeable


def test_a_small_training_text_is_the_beginning_and_keeps_the_vocabulary(tmp_path):
  whole = data.load(write_ptb(tmp_path))
  cfg = group(name="ptb", dir=str(tmp_path), window=2, train_examples=5)
  part = data.load(cfg)
  assert sentence(part, "train") == "<eos> the cat sat <eos> the"
  assert part.sizes == {"train": 5, "validation": 3, "test": 5}
  assert part.spec == whole.spec
  assert part.digest != whole.digest
  assert data.load(ml_collections.FrozenConfigDict(cfg)) is part


def test_digest_tells_texts_and_vocabularies_apart(tmp_path):
  digests = [
    data.load(write_ptb(tmp_path / str(number), **change)).digest
    for number, change in enumerate(
      (
        {},
        {"test": b"the sat\n end"},
        {"train": GOOD["ptb.train.txt"].replace(b"N", b"M")},  # the same ids, another word
      )
    )
  ]
  assert len(set(digests)) == 3
  assert data.load(write_ptb(tmp_path / "again")).digest == digests[0]
  assert data.load(group(name="ptb", dir=str(tmp_path / "again"), window=3)).digest == digests[0]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_another_system_s_text_is_the_same_text(mark, line_end, tmp_path):
  expected = data.load(write_ptb(tmp_path / "plain")).digest
  files = {
    name.split(".")[1]: mark + content.replace(b"\r", b"").replace(b"\n", line_end) for name, content in GOOD.items()
  }
  assert data.load(write_ptb(tmp_path / "other", **files)).digest == expected


def test_ptb_directory_may_be_under_home(tmp_path, monkeypatch):
  write_ptb(tmp_path / "penn")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert data.load(group(name="ptb", dir="~/penn", window=2)).sizes["train"] == 12


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"valid": None},
      "ptb: missing: {directory}/ptb.valid.txt; ptb is read from ptb.train.txt, ptb.valid.txt, ptb.tes",
    ),
    ({"test": b""}, "ptb: {directory}/ptb.test.txt: expected text, but there is no word in the file's 0 bytes"),
    ({"train": b" \n\n"}, "ptb: {directory}/ptb.train.txt: expected text, but there is no word in the file's 3 bytes"),
    (
      {"valid": b"the cat\nthe dog sat\n"},
      "ptb: {directory}/ptb.valid.txt, line 2: 'dog' is not in the vocabulary, the 7 words of ptb.train.txt",
    ),
    ({"train": b"the cat <eos>\n"}, "ptb: {directory}/ptb.train.txt, line 1: '<eos>' is added at each line's end; exp"),
    ({"test": b"the\nthe <eos> the\n"}, "ptb: {directory}/ptb.test.txt, line 2: '<eos>' is added at each line's end"),
    ({"test": b"the\n\nc\xe4t\n"}, "ptb: {directory}/ptb.test.txt, line 3: byte 0xe4 is not UTF-8"),
  ],
)
def test_broken_ptb_files_are_reported(change, message, tmp_path):
  cfg = write_ptb(tmp_path, **change)
  with pytest.raises(DataError) as error:
    data.load(cfg)
  assert message.format(directory=tmp_path) in str(error.value)


def test_a_ptb_file_that_cannot_be_read_is_reported(tmp_path):
  cfg = write_ptb(tmp_path, valid=None)
  (tmp_path / "ptb.valid.txt").mkdir()
  with pytest.raises(DataError, match="ptb: .*ptb.valid.txt cannot be read: .*directory"):
    data.load(cfg)


def test_a_ptb_directory_that_cannot_be_looked_into_is_reported():
  name = "a" * 300  # like in an unsearchable directory, even the existence check fails
  with pytest.raises(DataError, match=f"^ptb: {name}/ptb.train.txt cannot be read: .*File name too long"):
    data.load(group(name="ptb", dir=name))


def test_the_real_penn_treebank(caplog):
  directory = SHARED / "data/ptb"
  if not directory.exists():
    pytest.skip(f"no Penn Treebank at {directory}; set BAN_SHARED")
  dataset = data.load(group(name="ptb", dir=str(directory)))
  assert dataset.sizes == {"train": 929_589, "validation": 73_760, "test": 82_430}
  assert dataset.spec.num_classes == len(set(dataset.spec.words)) == 10_000
  assert dataset.spec.words[:4] == ("the", "<unk>", "<eos>", "N")
  counts = np.bincount(dataset.splits["train"]["tokens"][1:])
  assert (counts > 0).all()
  assert (np.diff(counts) <= 0).all()
  assert sentence(dataset, "validation").startswith("<eos> consumers may want to move their telephones a little")
  assert caplog.text == ""
  assert dataset.train_order(jax.random.key(0), 32).shape == (929_589 // 35 // 32, 32)
  # The CNN-LSTM's parameters depend on these; its table adds the two symbols, two boundaries and the padding.
  characters = set("".join(word for word in dataset.spec.words if word not in SYMBOLS))
  assert len(characters) == ptb.CHARACTERS == 46
  assert character_table(dataset.spec.words, 65, 7)[1] == 51
  known = data.describe(group(name="ptb"))
  assert known.spec._replace(words=()) == dataset.spec._replace(words=())
  shapes = {split: arrays["tokens"].shape for split, arrays in dataset.splits.items()}
  assert {split: arrays["tokens"].shape for split, arrays in known.splits.items()} == shapes


def test_the_penn_treebank_is_described_without_its_files():
  known = data.describe(group(name="ptb", dir="/nowhere"))
  assert len(known.train_order(jax.random.key(0), 1)) == 929_589 // 35
  assert known.splits["train"] == {"tokens": jax.ShapeDtypeStruct((929_590,), np.int32)}
  assert known.fetch is text.make_fetch(35)
  assert (known.spec.kind, known.spec.shape, known.spec.num_classes) == ("tokens", (35,), 10_000)
  assert len(set(known.spec.words)) == 10_000
  assert character_table(known.spec.words, 65, 7)[1] == 51, "other characters than the real vocabulary's"
  with pytest.raises(ConfigError, match="data.train_examples=929590: expected at most 929589, the tokens that ptb has"):
    data.describe(group(name="ptb", train_examples=929_590))


@pytest.mark.parametrize("change", [{}, {"train_examples": 2000, "window": 10}])
def test_text_described_without_data_is_what_is_built(change):
  dataset = data.load(group(**change))
  words = dataset.spec.words
  options = text.Options(*[group(**change)[key] for key in text.Options._fields])
  for known in (
    data.describe(group(**change)),
    text.describe("pydoc", tokens=data.load(group()).sizes, words=words, options=options),
  ):
    assert known.spec == dataset.spec
    assert known.fetch is dataset.fetch
    assert known.sizes == dataset.sizes
    for split, arrays in dataset.splits.items():
      assert known.splits[split]["tokens"].shape == arrays["tokens"].shape
    for batch_size in (1, 7):
      order = known.train_order(jax.random.key(0), batch_size)
      np.testing.assert_array_equal(order, dataset.train_order(jax.random.key(0), batch_size))


# --- The Python manual ------------------------------------------------------------------------------------------------


def test_the_manual_is_read_the_same_every_time():
  code = "from ban_jax.data import pydoc; print(pydoc.load(pydoc.Options(0, 9)).digest, hash('a'))"
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  digests, hashes = zip(
    *(
      subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONHASHSEED": seed}, check=True,
        capture_output=True, text=True,
      ).stdout.split()
      for seed in "12"
    ),
    strict=True,
  )  # fmt: skip
  assert hashes[0] != hashes[1], "Python's own hashes are alike: this test would not notice their use"
  assert set(digests) == {data.load(group()).digest}


def test_the_manuals_splits_share_nothing():
  from pydoc_data.topics import topics

  splits = pydoc.split_topics(topics)
  names = [topic for parts in splits.values() for topic in parts]
  assert sorted(names) == sorted(topics)
  lines = {split: [tuple(line) for part in parts.values() for line in part] for split, parts in splits.items()}
  everything = [line for part in lines.values() for line in part]
  assert len(set(everything)) == len(everything)
  assert set(everything) == {tuple(line) for topic in topics.values() for line in pydoc.paragraphs(topic)}
  backwards = pydoc.split_topics(dict(reversed(topics.items())))
  assert {split: list(parts.items()) for split, parts in backwards.items()} == {
    split: list(parts.items()) for split, parts in splits.items()
  }


def test_the_manuals_sizes_and_rare_words():
  from pydoc_data.topics import topics

  dataset = data.load(group())
  total = sum(dataset.sizes.values())
  shares = [dataset.sizes[split] / total for split in ("train", "validation", "test")]
  np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.04)
  assert total > 50_000
  counts = np.bincount(dataset.splits["train"]["tokens"][1:], minlength=dataset.spec.num_classes)
  assert counts.min() == 3
  assert {"<unk>", "<eos>", "the", "def", "."} <= set(dataset.spec.words)
  parts = pydoc.split_topics(topics)["test"].values()
  written = [word for part in parts for line in part for word in (*line, "<eos>")]
  expected = [word if word in dataset.spec.words else "<unk>" for word in written]
  assert sentence(dataset, "test") == " ".join(["<eos>", *expected])
  assert 0.02 < expected.count("<unk>") / len(expected) < 0.2


def test_paragraphs_worked_out_by_hand():
  parts = [
    'The "if" Statement\n******************',
    "It's *one* of ``x[1]``:",
    "   if x_1 == 2:",
    "\n====",
    "the suite’s\nend\n",
  ]
  assert pydoc.paragraphs("\n\n".join(parts)) == [
    ["the", "if", "statement"],
    ["it's", "one", "of", "x", "[", "1", "]", ":"],
    ["if", "x_1", "=", "=", "2", ":"],
    ["the", "suite's", "end"],
  ]


def test_a_python_without_its_manual_is_reported(monkeypatch):
  monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
  with pytest.raises(DataError, match="pydoc: this Python comes without its manual .module pydoc_data.topics."):
    pydoc.load(pydoc.Options(train_examples=0, window=35))


# --- Messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"name": "ptb"},
      "data.dir='': ptb is read from ptb.train.txt, ptb.valid.txt, ptb.test.txt in the directory that data.dir names;"
      " nothing is downloaded: the files (the Penn Treebank in Mikolov's split) have to be supplied by the user",
    ),
    (
      {"window": 35, "train_examples": 34},
      "data.window=35: expected at most 34, the tokens that pydoc is trained on",
    ),
  ],
)
def test_options_that_do_not_fit_the_data_are_reported(change, message):
  with pytest.raises(ConfigError) as error:
    data.load(group(**change))
  assert str(error.value) == message


def test_more_training_text_than_there_is_is_reported():
  with pytest.raises(ConfigError) as error:
    numbered(100, 10, train_examples=101)
  assert str(error.value) == ("data.train_examples=101: expected at most 100, the tokens that numbered has to train on")


def test_bad_orders_are_reported():
  dataset = numbered(100, 10)
  with pytest.raises(ConfigError) as error:
    dataset.train_order(jax.random.key(0), 11)
  assert str(error.value) == (
    "train.batch_size=11: expected at most 10, the windows of 10 tokens in the 100 training tokens of numbered"
  )
  with pytest.raises(ConfigError) as error:
    dataset.eval_order("dev", 1)
  assert str(error.value) == "unknown split of numbered 'dev'; choose one of: test, train, validation"

"""A caller's own text: words, characters, bytes, a tokenizer's tokens; exact bits; what is no text is named."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from test_text import group

import ban_jax
from ban_jax import data
from ban_jax.data import tokens
from ban_jax.devices import resolve
from ban_jax.evaluating import Subject, measure
from ban_jax.types import Model

TEXT = "the cat sat\r\non the mat\n\nthe café end\n"
PARTS = {"validation": "the end\n", "test": "a mat\nthe end"}
ORDINALS = (lambda text: [ord(letter) for letter in text], lambda ids: "".join(map(chr, ids)))


def written(dataset, split, own=None):
  """Returns the text of a split and the token before it."""
  ids = dataset.splits[split]["tokens"]
  return tokens.decode(dataset.spec, ids[1:].tolist(), own), dataset.spec.words[ids[0]] if dataset.spec.words else ids[
    0
  ]


def test_words_have_lines_and_unknown_ones():
  dataset = ban_jax.from_text(TEXT, **PARTS, window=2)
  assert dataset.spec.words == ("<eos>", "the", "café", "cat", "end", "mat", "on", "sat", "<unk>")
  assert written(dataset, "train") == ("the cat sat <eos> on the mat <eos> <eos> the café end <eos>", "<eos>")
  assert written(dataset, "test") == ("<unk> mat <eos> the end <eos>", "<eos>")
  assert dataset.written["train"] == {"byte": 38, "character": 37}, "of one line end for all systems"
  small = ban_jax.from_text(TEXT, **PARTS, window=2, vocabulary=4)
  assert small.spec.words == ("<unk>", "<eos>", "the", "café")
  plain = ban_jax.from_text(TEXT, validation="the", test="end", window=2, eos=False, unknown=False)
  assert written(plain, "train") == ("the cat sat on the mat the café end", "the")
  assert repr(dataset) == "Dataset('text', tokens (2,), 9 classes, train=13, validation=3, test=6)"


def test_characters_and_bytes_are_the_text_itself(tmp_path):
  path = tmp_path / "text.txt"
  path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
  letters = ban_jax.from_text(path, **PARTS, tokens="characters", window=2)
  assert written(letters, "train") == (TEXT.replace("\r", ""), "\n")
  assert written(letters, "test")[0] == PARTS["test"]
  assert letters.digest == ban_jax.from_text(TEXT, **PARTS, tokens="characters", window=3).digest
  assert letters != ban_jax.from_text(TEXT, **PARTS, tokens="characters", window=3)
  raw = ban_jax.from_text(TEXT.encode(), **PARTS, tokens="bytes", window=2)
  assert written(raw, "train") == (TEXT, "\n")
  assert raw.spec.num_classes == 256
  assert raw.written["train"] == {"byte": 39, "character": 38}
  assert tokens.encode(raw.spec, "é") == [195, 169]
  assert "character" not in ban_jax.from_text(b"\xff\xfe" * 20, tokens="bytes", window=2).written["train"]


def test_a_tokenizer_and_tokens_made_by_it_are_one_text():
  own = ban_jax.from_text(TEXT, **PARTS, tokens=ORDINALS, window=2)
  arrays = {split: np.array(ORDINALS[0](part)) for split, part in PARTS.items()}
  given = ban_jax.from_text(ORDINALS[0](TEXT.replace("\r", "")), **arrays, tokens=ORDINALS, window=2)
  assert own.digest == given.digest
  assert own.spec == given.spec == own.spec._replace(unit="tokens", num_classes=ord("é") + 1, words=())
  assert written(own, "train", ORDINALS) == (TEXT.replace("\r", ""), 0)
  assert written(own, "validation")[0].startswith("116 104 101 32")
  assert own.written
  assert not given.written
  assert ban_jax.from_text(TEXT, **PARTS, tokens=ORDINALS, vocabulary=300, window=2).spec.num_classes == 300


def test_shares_are_cut_from_the_end():
  letters = ban_jax.from_text("abcdefghij" * 10, validation=0.2, test=0.1, tokens="characters", window=2)
  assert letters.sizes == {"train": 70, "validation": 20, "test": 10}
  lines = ban_jax.from_text("".join(f"w{place:02} x\n" for place in range(20)), validation=0, test=0.11, window=2)
  assert "validation" not in lines.splits
  assert written(lines, "train")[0].endswith("w17 x <eos>"), "the line that a cut divides stays before it"
  numbers = ban_jax.from_text(np.arange(100), validation=0.05, test=0.05, window=2)
  assert numbers.splits["test"]["tokens"].tolist() == [0, 95, 96, 97, 98, 99]


def test_bits_are_all_nats_over_all_bytes():
  dataset = ban_jax.from_text(TEXT * 9, **PARTS, window=2)
  logs = np.log(np.arange(1, 10) / 45)

  def apply(variables, carry, inputs, *, train, key=None, positions=None):
    return jnp.broadcast_to(variables["params"]["logs"], (*inputs.shape, 9)), carry, {}

  model = Model("unigram", dataset.spec, None, lambda batch: (), apply)
  tree = {"params": {"logs": jnp.asarray(logs, jnp.float32)}, "batch_stats": {}}
  found = measure(Subject((model,), (tree,), dataset, resolve(None)[:1]), "test", 1)
  nats = -logs[dataset.splits["test"]["tokens"][1:]].sum()
  assert found["bits_per_byte"] == found["bits_per_character"] == pytest.approx(nats / np.log(2) / 13, rel=1e-6)
  assert found["perplexity"] == pytest.approx(np.exp(nats / 6), rel=1e-6)
  cut = ban_jax.from_text(TEXT * 9, **PARTS, window=2, train_examples=20)
  assert cut.written.keys() == {"validation", "test"}, "how much text 20 tokens are is not counted"


def test_wikitext_and_enwik8_are_found_by_their_names(tmp_path, caplog):
  for split, words in (("train", " = A <unk> title = \n \n a word\n"), ("valid", "a title\n"), ("test", "A word\n")):
    (tmp_path / f"wiki.{split}.tokens").write_text(words)
  (tmp_path / "enwik8").write_bytes(bytes(range(100)))
  wiki = data.load(group(name="wikitext", dir=str(tmp_path), window=2))
  assert written(wiki, "train")[0] == "= A <unk> title = <eos> <eos> a word <eos>"
  assert wiki.written["test"] == {"byte": 7, "character": 7}
  raw = data.load(group(name="enwik8", dir=str(tmp_path), window=2))
  assert raw.sizes == {"train": 90, "validation": 5, "test": 5}
  assert raw.splits["test"]["tokens"].tolist() == [10, 95, 96, 97, 98, 99]
  assert "enwik8 holds 100 bytes, not 100000000" in caplog.text
  (tmp_path / "wiki.test.tokens").write_text("a dog\n")
  with pytest.raises(ban_jax.DataError, match="^wikitext, test: 'dog' is not in the vocabulary, the 7 words of the"):
    data.load(group(name="wikitext", dir=str(tmp_path), window=3))
  with pytest.raises(
    ban_jax.DataError, match="^enwik8: missing: .*/none/enwik8; enwik8 is read from enwik8 in the dir"
  ):
    data.load(group(name="enwik8", dir=str(tmp_path / "none")))


def test_the_manual_is_read_by_characters_and_bytes():
  letters, raw = (data.load(group(tokens=unit)) for unit in ("characters", "bytes"))
  text = written(raw, "train")[0]
  assert text == written(letters, "train")[0]
  assert text.split("\n")[0].split() != []
  assert raw.written["train"]["byte"] == raw.sizes["train"] == len(text.encode())
  assert letters.sizes["train"] == len(text)


FAIL = (lambda text: 1 / 0, ORDINALS[1])


@pytest.mark.parametrize(
  ("given", "changes", "message"),
  [
    (__file__, {}, "train=.* is the name of a file: pass pathlib.Path"),
    (pathlib.Path("none.txt"), {}, "text: none.txt cannot be read: .*No such file"),
    (None, {}, "train=None: expected a string, a pathlib.Path, or an array of tokens"),
    (0.5, {}, "train=0.5: expected a text$"),
    (TEXT, {"test": 1.5}, r"test=1.5: expected a text, or a share in \[0, 1\)"),
    (TEXT, {"test": 0}, "test=0: expected a text, or a share above 0"),
    (TEXT, {"validation": 0.5, "test": 0.5}, "validation=0.5, test=0.5: expected less than 1 together"),
    ("one line", {}, "text, validation: nothing is left of a training text of 8 after it was cut; expected more words"),
    (TEXT, {**PARTS, "tokens": "word"}, "unknown tokens 'word'; choose one of: bytes, characters, words"),
    (TEXT, {**PARTS, "tokens": len}, r"a tokenizer is a pair of functions \(encode, decode\), not builtin_function"),
    (TEXT, {**PARTS, "tokens": FAIL}, "text, train: the tokenizer fails: ZeroDivisionError: division by zero"),
    (TEXT, {**PARTS, "tokens": ORDINALS, "vocabulary": 200}, "text, train: a token is 233; expected 0 to 199"),
    (TEXT, {**PARTS, "vocabulary": 2}, "vocabulary=2: expected more than the 2 symbols that are in it anyway"),
    (TEXT, {**PARTS, "unknown": False}, "text, test: 'a' is not in the vocabulary, the 8 words of the training text"),
    (TEXT, {**PARTS, "eos": 1}, "eos=1: expected True or False"),
    (TEXT, {**PARTS, "tokens": "bytes", "eos": True}, "eos=True: expected False, because only lines of words end in"),
    (TEXT, {**PARTS, "tokens": "bytes", "unknown": True}, "unknown=True: expected False, because there are no unknown"),
    (TEXT, {**PARTS, "tokens": "bytes", "vocabulary": 99}, "vocabulary=99: expected 256, because tokens='bytes'"),
    (TEXT, {**PARTS, "window": 99}, "data.window=99: expected at most 13, the tokens that text is trained on"),
    ("a <eos>\n", PARTS, "text, train, line 1: '<eos>' is added at each line's end"),
    (" \n", PARTS, "text, train: expected text, but there is no token in it"),
    (b"a\n\xff", PARTS, "text, train, line 2: byte 0xff is not UTF-8"),
    ([1, 2], PARTS, "train is an array and validation a text: expected all of one sort"),
    ([1.5] * 100, {}, r"text, train: the tokens are float64 \[100\]; expected whole numbers \[N\]"),
    ([1, 2], {"tokens": "bytes"}, "tokens='bytes': train is an array of tokens; expected .encode, decode., or nothing"),
  ],
)
def test_what_is_no_text_is_named(given, changes, message):
  with pytest.raises((ban_jax.ConfigError, ban_jax.DataError), match=message):
    ban_jax.from_text(given, **{"window": 1, **changes})

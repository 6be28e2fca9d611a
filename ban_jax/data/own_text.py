"""A caller's own text as a data set."""

import numbers
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ban_jax import devices as devices_lib
from ban_jax.data import reading, text, text_files
from ban_jax.data import tokens as tokens_lib
from ban_jax.data.arrays import as_array
from ban_jax.data.reading import UNITS, Content, Reading
from ban_jax.errors import ConfigError, DataError, check_name, check_whole, look_up
from ban_jax.types import Dataset


@devices_lib.default_modes()
def from_text(
  train: Any,
  *,
  validation: Any = 0.05,
  test: Any = 0.05,
  tokens: Any = "words",
  vocabulary: int | None = None,
  window: int = 64,
  eos: bool | None = None,
  unknown: bool | None = None,
  name: str = "text",
  train_examples: int = 0,
) -> Dataset:
  """Returns a data set of the caller's own text, for the argument `dataset` of `train_generation` and others.

  Every token of a split is predicted, the first from `<eos>`, a line's end, or token 0. Evaluations also give the bits
  per byte and per character of the text.

  Args:
    train: a string, a pathlib.Path of a UTF-8 file, or whole numbers [N], tokens that were made elsewhere.
    validation: of the same sort, or the share of `train` to cut from its end, before that of `test`.
    test: of the same sort, or a share. Words are cut at a line's end.
    tokens: "words" between white space, "characters", "bytes", or a tokenizer's functions (encode, decode).
    vocabulary: the number of tokens: of words and characters the most frequent in training, by default all; 256 of
      bytes; of others by default the largest plus one.
    window: tokens that are read at once, or before the gradient is cut.
    eos: whether each line of words ends in `<eos>`; by default it does.
    unknown: whether words and characters outside of the vocabulary become `<unk>`, as by default, or are an error.
    name: the data set's name, in messages and records.
    train_examples: tokens to train on, from the beginning, as `data.train_examples`; 0 for all.

  Returns:
    A Dataset.

  Raises:
    DataError: for texts that cannot be read.
    ConfigError: for a value out of range.

  Examples:
    >>> ban_jax.from_text("to be or not to be " * 100, tokens="characters").sizes
    {'train': 1710, 'validation': 95, 'test': 95}
  """
  check_name(name, "names the data set in messages")
  given = {"train": train, "validation": validation, "test": test}
  parts = {split: _part(name, split, part) for split, part in given.items()}
  how = _reading(tokens, vocabulary, eos, unknown, parts)
  parts = {split: _content(f"{name}, {split}", part, how.unit) for split, part in parts.items()}
  options = text.Options(check_whole("train_examples", train_examples, 0), check_whole("window", window, 1))
  dataset = reading.build(name, _divided(name, parts, how.unit), how, options=options)
  own = {"name": name, "tokens": how.unit, "vocabulary": dataset.spec.num_classes, **options._asdict()}
  return dataset._replace(options=own)


def _part(name: str, split: str, given: Any) -> Content | float:
  """Returns a text, bytes, tokens, or a share; raises a ConfigError or a DataError for what is none of them."""
  if isinstance(given, str):
    if len(given) < 1000 and "\n" not in given and os.path.isfile(given):
      raise ConfigError(f"{split}={given!r} is the name of a file: pass pathlib.Path({given!r})")
    return given
  if isinstance(given, os.PathLike):
    return text_files.read(name, pathlib.Path(given).expanduser())
  if isinstance(given, bytes):
    return given
  if isinstance(given, numbers.Real) and not isinstance(given, bool):
    share = float(given)
    if split == "train" or not 0 <= share < 1:
      raise ConfigError(f"{split}={given!r}: expected a text" + ("" if split == "train" else ", or a share in [0, 1)"))
    return share
  if given is None or isinstance(given, bool):
    raise ConfigError(f"{split}={given!r}: expected a string, a pathlib.Path, or an array of tokens")
  what = f"{name}, {split}"
  return tokens_lib.checked(what, as_array(f"{what}: the tokens", given), None)


def _reading(
  unit: Any, vocabulary: int | None, eos: bool | None, unknown: bool | None, parts: Mapping[str, Content | float]
) -> Reading:
  """Returns how a caller's texts are read; raises a ConfigError for values that do not fit each other."""
  for key, value in (("eos", eos), ("unknown", unknown)):
    if value is not None and not isinstance(value, bool | np.bool_):
      raise ConfigError(f"{key}={value!r}: expected True or False")
  arrays = [split for split, part in parts.items() if isinstance(part, np.ndarray)]
  texts = [split for split, part in parts.items() if isinstance(part, str | bytes)]
  if arrays and texts:
    raise ConfigError(f"{arrays[0]} is an array and {texts[0]} a text: expected all of one sort")
  most = 0 if vocabulary is None else check_whole("vocabulary", vocabulary, 2)
  own = None
  if isinstance(unit, str) and not (arrays and unit == "words"):
    look_up(dict.fromkeys(UNITS), unit, "tokens")
    if arrays:
      raise ConfigError(f"tokens={unit!r}: {arrays[0]} is an array of tokens; expected (encode, decode), or nothing")
  else:
    unit, own = "tokens", None if isinstance(unit, str) else tokens_lib.tokenizer(unit)
  if eos and unit != "words":
    raise ConfigError(f"eos={eos!r}: expected False, because only lines of words end in {tokens_lib.EOS}, not {unit}")
  if unknown and unit not in UNITS[:2]:
    raise ConfigError(f"unknown={unknown!r}: expected False, because there are no unknown {unit}")
  if unit == "bytes" and most not in (0, 256):
    raise ConfigError(f"vocabulary={vocabulary!r}: expected 256, because tokens='bytes'")
  return Reading(
    unit,
    most,
    eos=unit == "words" and eos is not False,
    unknown=unit in UNITS[:2] and unknown is not False,
    own=own,
  )


def _content(what: str, part: Content | float, unit: str) -> Content | float:
  """Returns a text as its unit is read from: bytes as they are, all else as str with one sort of line ends."""
  if unit == "bytes":
    return part.encode() if isinstance(part, str) else part
  if isinstance(part, bytes):
    return text_files.decoded(what, part)
  return text_files.one_line_end(part.removeprefix("\ufeff")) if isinstance(part, str) else part


def _divided(name: str, parts: Mapping[str, Content | float], unit: str) -> dict[str, Content]:
  """Returns the texts of the splits, with the shares cut from the end of the training text."""
  shares = {split: part if isinstance(part, float) else 0.0 for split, part in parts.items()}
  held, whole = shares["validation"] + shares["test"], parts["train"]
  if isinstance(parts["test"], float) and not parts["test"]:
    raise ConfigError("test=0: expected a text, or a share above 0")
  if held >= 1:
    raise ConfigError(f"validation={shares['validation']}, test={shares['test']}: expected less than 1 together")
  assert not isinstance(whole, float), "a training text is no share"

  def place(share: float) -> int:
    at = round(len(whole) * share)
    # The line that a cut would divide stays before it.
    return whole.find("\n", at) + 1 or len(whole) if unit == "words" and isinstance(whole, str) and share < 1 else at

  ends = place(1 - held), place(1 - shares["test"]), len(whole)
  cut = {"train": whole[: ends[0]], "validation": whole[ends[0] : ends[1]], "test": whole[ends[1] :]}
  if empty := [split for split, part in cut.items() if (shares[split] or split == "train") and not len(part)]:
    raise DataError(
      f"{name}, {empty[0]}: nothing is left of a training text of {len(whole):,} after it was cut; expected more "
      f"{unit}, or more lines of words, at whose ends they are cut"
    )
  found = {split: cut[split] if split == "train" or shares[split] else part for split, part in parts.items()}
  return {split: part for split, part in found.items() if not isinstance(part, float)}

"""Where results go: the caller's writers, and its say after each epoch."""

import csv
import fcntl
import json
import os
import struct
import sys
import termios

import pytest
from conftest import config

import ban_jax
from ban_jax import report, storage, trees
from ban_jax.errors import CheckpointError, ConfigError, StorageError

QUIET = {"progress": False}


def short(**changes):
  changes = {"train__batch_size": 8, "train__epochs": 6, "train__evaluate_every": 2} | changes
  return config("digits,own,smoke", generations=1, **changes)


def enough(history):
  """Ends a training after its third epoch."""
  return len(history) == 3


def interrupted(*_):
  raise KeyboardInterrupt


def test_writers_get_each_epoch_s_numbers(tiny, tmp_path):
  def to_csv(step, scalars):
    with (tmp_path / f"{scalars['generation']}.csv").open("a") as file:
      csv.writer(file).writerow([step, scalars["epoch"], scalars["train_loss"], scalars.get("test_error", "")])

  seen = []
  cfg = short()
  run = ban_jax.run(cfg, tmp_path / "run", **tiny, **QUIET, writers=[to_csv, lambda *given: seen.append(given)])
  for generation in run:
    rows = list(csv.reader((tmp_path / f"{generation.index}.csv").open()))
    assert [(int(a), int(b), float(c)) for a, b, c, _ in rows] == [
      (row["step"], row["epoch"], row["train_loss"]) for row in generation.history
    ]
    assert [d != "" for *_, d in rows] == [False, True] * 3
  assert [scalars["generation"] for _, scalars in seen] == [0] * 6 + [1] * 6
  # They change no byte.
  assert trees.digest(run[0].params) == trees.digest(ban_jax.train_generation(None, cfg, **tiny, **QUIET).params)


def test_a_training_may_be_ended_early_and_says_so(tiny, tmp_path, monkeypatch):
  cfg, lengths = short(train__evaluate_every=0, train__checkpoint_every=4), []
  alone = ban_jax.train_generation(None, cfg, **tiny, **QUIET, on_epoch=enough)
  assert [row["epoch"] for row in alone.history] == [1, 2, 3]
  assert alone.metrics["test_count"] == 20  # evaluated as at the end
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, cfg, workdir=tmp_path, **tiny, **QUIET, on_epoch=enough)
  resumed = ban_jax.train_generation(
    None,
    cfg,
    workdir=tmp_path,
    **tiny,
    **QUIET,
    on_epoch=lambda history: lengths.append(len(history)) or enough(history),
  )
  assert lengths == [3]
  assert trees.digest(resumed.params) == trees.digest(alone.params)
  assert json.loads((tmp_path / "gen_0" / "manifest.json").read_text())["stopped"] == {"epoch": 3, "of": 6}
  again = ban_jax.train_generation(None, cfg, workdir=tmp_path, **tiny, **QUIET, on_epoch=enough)
  assert again.metrics == resumed.metrics
  with pytest.raises(CheckpointError, match="gen_0 was ended by on_epoch after 3 of 6 epochs; give on_epoch again, or"):
    ban_jax.train_generation(None, cfg, workdir=tmp_path, **tiny, **QUIET)


def test_an_on_epoch_that_only_looks_changes_no_byte(tiny):
  lengths = []
  looked = ban_jax.train_generation(None, short(), **tiny, **QUIET, on_epoch=lambda rows: lengths.append(len(rows)))
  assert lengths == [1, 2, 3, 4, 5, 6]
  assert trees.digest(looked.params) == trees.digest(ban_jax.train_generation(None, short(), **tiny, **QUIET).params)


def test_what_is_no_writer_or_fails_is_named(tiny, tmp_path):
  def to_nowhere(step, scalars):
    raise ConnectionError("no route to host")

  with pytest.raises(StorageError, match="the writer to_nowhere failed: no route to host; what the run saved before"):
    ban_jax.run(short(), tmp_path, **tiny, **QUIET, writers=[to_nowhere])
  for given in (to_nowhere, ["log.csv"]):
    with pytest.raises(ConfigError, match="writers must be a sequence of functions of .step, scalars., not "):
      ban_jax.run(short(), tmp_path, **tiny, **QUIET, writers=given)
  with pytest.raises(StorageError, match="on_epoch failed: .*nowhere.*; what the run saved before is intact"):
    ban_jax.run(short(), tmp_path, **tiny, **QUIET, on_epoch=lambda history: os.stat("/nowhere"))
  with pytest.raises(ConfigError, match="on_epoch must be a function of the history, or None, not 3"):
    ban_jax.train_generation(None, short(), **tiny, **QUIET, on_epoch=3)


def test_a_terminal_of_80_columns_says_that_it_compiles_and_then_shows_the_test_error(monkeypatch):
  reads, writes = os.openpty()
  fcntl.ioctl(writes, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
  monkeypatch.setattr(sys, "stderr", os.fdopen(writes, "w"))
  bar = report.Progress("generation 1 (ban_label)", 12000, 0, True)
  bar.advance(1)
  bar.note(test_error=17.61, train_loss=1.14, train_error=37.5)
  bar.close()
  first, *_, last = os.read(reads, 10_000).decode().strip().split("\r")
  assert "0/12000, compiling, " in first
  assert "generation 1 (ban_label): 1/12000, test error 17.61, train loss 1.14, " in last
  assert len(last) <= 80

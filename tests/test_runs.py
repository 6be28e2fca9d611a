"""Run directories through the command line: finishing, resuming after a kill, refusing other runs."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import forks
import jax
import numpy as np
import pytest
from conftest import IMAGES, ROOT, config

import ban_jax
from ban_jax import storage, trees
from ban_jax.errors import CheckpointError

QUIET = {"progress": False}
WORDS = f"{ROOT}/configs/digits.py:{IMAGES}"
COMMAND = [sys.executable, str(ROOT / "experiments" / "train.py"), f"--config={WORDS}", "--devices=2"]


def train(workdir, *flags):
  # A run from another directory shows that the package, configurations and experiments are installed.
  return forks.run([*COMMAND, f"--workdir={workdir}", *flags], cwd="/")


def digests(workdir):
  manifests = sorted(pathlib.Path(workdir).glob("gen_*/manifest.json"))
  return [json.loads(path.read_text())["digest"] for path in manifests]


def times_of(workdir):
  """Returns when each file was written, except config.json and .lock, which every start rewrites."""
  files = [path for path in workdir.rglob("*") if path.is_file() and path.name not in ("config.json", ".lock")]
  return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run directory of two generations, trained in one go."""
  workdir = tmp_path_factory.mktemp("runs") / "whole"
  done = train(workdir, "--config.train.epochs=4")
  assert done.returncode == 0, done.stderr
  return workdir, done


def test_checkpoints_are_removed_after_the_last_of_them_is_complete(tmp_path, monkeypatch):
  managers, finish = [], storage.finish

  def checked(*arguments):
    assert managers
    assert not managers[-1].is_saving_in_progress()
    finish(*arguments)

  save = storage.save_step
  monkeypatch.setattr(storage, "save_step", lambda manager, *given: managers.append(manager) or save(manager, *given))
  monkeypatch.setattr(storage, "finish", checked)
  # Nothing happens between the last save and the end but a step.
  monkeypatch.setitem(ban_jax.train_generation.__globals__, "measure", lambda *_: {"error": 0.0})
  cfg = config(train__epochs=1, train__checkpoint_every=4)
  assert ban_jax.train_generation(None, cfg, workdir=tmp_path, devices=jax.devices()[:1], **QUIET).index == 0
  assert not (tmp_path / "gen_0" / "steps").exists()


def test_a_run_leaves_the_record_that_the_readme_describes(finished):
  workdir, done = finished
  assert "| teacher |" in done.stdout
  assert "| BAN-1   |" in done.stdout
  assert "generation 1 (ban): step 20/20" in done.stderr  # plain lines, where there is no terminal
  assert "\r" not in done.stderr
  for index in (0, 1):
    directory = workdir / f"gen_{index}"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["generation"] == index
    assert manifest["scale"] == "smoke"
    assert manifest["packages"]["jax"] == jax.__version__
    assert len([json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]) == 4
    assert json.loads((directory / "metrics.json").read_text())["test_count"] == 1397
    assert not (directory / "steps").exists()
  first, second = (json.loads((workdir / f"gen_{i}" / "manifest.json").read_text()) for i in (0, 1))
  assert first["teachers"] == []
  assert second["teachers"] == [first["digest"]]


def test_a_finished_run_is_only_shown(finished):
  workdir, done = finished
  before = times_of(workdir)
  again = train(workdir, "--config.train.epochs=4")
  assert again.returncode == 0, again.stderr
  assert "everything was finished already" in again.stdout
  assert "step" not in again.stderr
  assert again.stdout.splitlines()[-8:] == done.stdout.splitlines()[-8:]
  assert times_of(workdir) == before


def test_more_generations_may_be_asked_for_later(finished, tmp_path):
  workdir = tmp_path / "more"
  shutil.copytree(finished[0], workdir)
  more = train(workdir, "--config.train.epochs=4", "--config.generations=2")
  assert more.returncode == 0, more.stderr
  assert digests(workdir)[:2] == digests(finished[0])
  assert len(digests(workdir)) == 3
  assert "| Ens*2   |" in more.stdout


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.model.units=8"], "another configuration (model.units: 16 there, 8 here); give another workdir"),
    (
      ["--config.seed=1", "--config.optim.momentum=0.8"],
      "optim.momentum: 0.9 there, 0.8 here; seed: 0 there, 1",
    ),
    (
      ["--config.train.epoch=1"],
      "unknown configuration key 'train.epoch'; under train are: accumulate, batch_size, checkpoint_every",
    ),
    (["--config.sead=1"], "unknown configuration key 'sead'; there are: compute_dtype, data, evaluate, generations"),
    (["--config.seed.x=1"], "unknown configuration key 'seed.x'; under seed are: none, it is a value"),
    (
      ["--config.loss=ban"],
      "--config.loss is a group with the keys: class_weights, k, label_weight, label_weight_end, name, "
      "smoothing, teacher_weight, teacher_weight_end",
    ),
    (["--config.teacher.model=wrn_16_1"], "--config.teacher.model is a group; networks are chosen by the words"),
    (["--workdir="], "the workdir is empty"),
    (["--workdir=foo://bar"], "workdir 'foo://bar': unknown storage 'foo://'; give a local directory, or gs://..."),
    (["--workdir=file:///tmp/x"], "workdir 'file:///tmp/x': unknown storage 'file://'; give a local directory, or gs"),
    (["--workdir=memory://x"], "workdir 'memory://x': unknown storage 'memory://'"),
    (["--workdir=s3://bucket/run"], "workdir 's3://bucket/run': unknown storage 's3://'"),
    (["--workdir=/s3/bucket"], "workdir 's3://bucket': unknown storage 's3://'"),
    (["--config.train.epochs=ten"], "ten"),
    (["--config.generations=-1"], "generations=-1: expected a whole number of at least 0"),
    (["--config.seed=99999999999999999999"], "seed=99999999999999999999: expected a whole number from 0 to 4294967295"),
    (["--devices=3"], "train.batch_size=20 cannot be shared equally by 3 devices; use 1, 2 devices (--devices)"),
    (["--devices=-1"], "--devices must be at least 0, not -1"),
    (["--wrokdir=x"], "Unknown command line flag 'wrokdir'"),
    (["surplus"], "unexpected arguments: surplus"),
    ([f"--config={ROOT}/configs/digits.py:digits,wrn_11_1,smoke"], "unknown network 'wrn_11_1'; choose one of: "),
    ([f"--config={ROOT}/configs/nothing.py"], "configs/nothing.py: there is no such file"),
  ],
)
def test_mistakes_end_with_one_line_and_status_2(finished, flags, message):
  done = train(finished[0], "--config.train.epochs=4", *flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr
  assert done.stderr.startswith("error: ")
  assert digests(finished[0])


def test_a_workdir_without_a_name_in_utf_8_is_refused_before_anything_is_made(tmp_path):
  done = train(os.fsencode(tmp_path / "run").decode() + "\udcff")
  assert done.returncode == 2
  assert done.stderr.startswith("error: workdir '/")
  assert "run\\udcff': a name in UTF-8, without null bytes, is expected" in done.stderr
  assert done.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_cannot_be_written_is_refused():
  with pytest.raises(CheckpointError, match="workdir /proc/ban_jax cannot be written"):
    ban_jax.train_generation(None, config(), workdir="/proc/ban_jax", **QUIET)


def test_a_swapped_teacher_is_refused(tmp_path):
  cfg = config(train__epochs=1, train__evaluate_every=0)
  teachers = [ban_jax.train_generation(None, config(train__epochs=1, seed=seed), **QUIET) for seed in (0, 1)]
  ban_jax.train_generation(teachers[0], cfg, workdir=tmp_path, **QUIET)
  with pytest.raises(CheckpointError, match=r"gen_1 holds a generation of another origin \(teachers: .* here"):
    ban_jax.train_generation(teachers[1], cfg, workdir=tmp_path, **QUIET)


def test_altered_final_params_are_noticed(tmp_path):
  cfg = config(train__epochs=1, train__evaluate_every=0)
  teacher = ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  again = ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  assert trees.digest(again.params) == trees.digest(teacher.params)
  manifest = tmp_path / "gen_0" / "manifest.json"
  manifest.write_text(manifest.read_text().replace(trees.digest(teacher.params), "0" * 64))
  with pytest.raises(CheckpointError, match="gen_0/params is damaged: its digest is not the manifest's"):
    ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  (tmp_path / "gen_0" / "metrics.json").write_text("{")
  with pytest.raises(CheckpointError, match="gen_0 is damaged and cannot be read"):
    ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)


def test_digests_tell_trees_apart():
  tree = {"a": {"b": np.arange(4.0)}, "c": np.zeros((2, 2), np.float32)}
  same = {"c": np.zeros((2, 2), np.float32), "a": {"b": np.arange(4.0)}, "lineage": {"generation": np.int32(3)}}
  assert trees.digest(tree) == trees.digest(same)
  for other in (
    {**tree, "c": np.zeros((4, 1), np.float32)},
    {**tree, "c": np.zeros((2, 2), np.int32)},
    {**tree, "c": np.float32([[0, 0], [0, -0.0]])},
    {"a": {"d": np.arange(4.0)}, "c": tree["c"]},
  ):
    assert trees.digest(tree) != trees.digest(other)


def test_a_resumption_on_other_devices_says_that_bytes_may_differ(tmp_path, caplog):
  cfg = config(train__evaluate_every=0, train__checkpoint_every=3)
  whole = ban_jax.train_generation(None, cfg, devices=jax.devices()[:4], **QUIET)
  directory = leave_unfinished(tmp_path, cfg)
  assert [int(path.name) for path in (directory / "steps").glob("[0-9]*")]
  resumed = ban_jax.train_generation(None, cfg, workdir=tmp_path, devices=jax.devices()[:2], **QUIET)
  assert any("its bytes may differ" in record.getMessage() for record in caplog.records)
  for path, leaf in trees.leaves(whole.params).items():
    np.testing.assert_allclose(trees.leaves(resumed.params)[path], leaf, rtol=0.01, atol=1e-3, err_msg=path)


def interrupted(*_):
  raise KeyboardInterrupt


def leave_unfinished(workdir, cfg):
  """Trains generation 0 to the end on four devices, without writing its final files; returns its directory."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, cfg, workdir=workdir, devices=jax.devices()[:4], **QUIET)
  return workdir / "gen_0"


def test_home_directories_and_a_broken_table_cache(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path / "run")
  (tmp_path / "run" / "evaluations.json").write_text("garbage")
  done = subprocess.run(
    [*COMMAND, "--workdir=~/run", "--config.train.epochs=4"], cwd="/", capture_output=True, text=True, timeout=300,
    env={**os.environ, "HOME": str(tmp_path)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "| BAN-1   |" in done.stdout

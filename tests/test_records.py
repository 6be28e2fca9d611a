"""What a run leaves is read by any tool: standard JSON, UTF-8, TensorBoard's curves, layouts, the commit."""

import contextlib
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, config
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ban_jax
from ban_jax import config as config_lib
from ban_jax import devices as devices_lib
from ban_jax import job as job_lib
from ban_jax import report, resolving, resuming, storage, train, trees
from ban_jax.errors import CheckpointError
from ban_jax.models import common
from ban_jax.storage import finished, steps
from ban_jax.types import Generation, InputSpec, Network

QUIET = {"progress": False}
ODD = {"error": math.nan, "nll": math.inf, "brier": -math.inf, "ece": 0.25, "count": 7}


def strict(path):
  """Returns the values of a JSON or JSON Lines file; a number that standard JSON does not know is an error."""

  def refuse(word):
    raise AssertionError(f"{path} holds {word}, which is not standard JSON")

  lines = path.read_bytes().splitlines() if path.suffix == ".jsonl" else [path.read_bytes()]
  return [json.loads(line, parse_constant=refuse) for line in lines]


def json_files(folder):
  found = [path for path in pathlib.Path(folder).rglob("*") if path.suffix in (".json", ".jsonl")]
  return found + list(pathlib.Path(folder).rglob("meta/metadata"))  # a checkpoint's record


def killed_after(patch, step):
  """Makes the trainer stop as if killed once this step is dispatched; what it has saved is complete."""
  real = train._advance

  def advance(lane, live):
    live = real(lane, live)
    if live.done >= step:
      lane.checkpoints.wait_until_finished()
      raise KeyboardInterrupt
    return live

  patch.setattr(train, "_advance", advance)


def kill(workdir, cfg, step, **options):
  with pytest.MonkeyPatch.context() as patch:
    killed_after(patch, step)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(None, cfg, workdir=workdir, **options, **QUIET)


# --- JSON ----------------------------------------------------------------------------------------------------------


def test_a_run_with_numbers_that_are_not_finite_leaves_standard_json_and_the_same_numbers(tmp_path, monkeypatch):
  monkeypatch.setattr(train, "measure", lambda subject, split, batch_size: ODD)
  cfg = config(train__epochs=3, train__checkpoint_every=5)
  kill(tmp_path, cfg, 12)
  assert len(json_files(tmp_path / "gen_0")) >= 2
  for path in json_files(tmp_path):
    strict(path)

  trained = ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  assert len(trained.history) == 3
  assert {path.name for path in json_files(tmp_path)} >= {"metrics.json", "history.jsonl", "manifest.json"}
  for path in json_files(tmp_path):
    strict(path)
  assert strict(tmp_path / "gen_0" / "metrics.json")[0]["test_nll"] == "Infinity"

  loaded = ban_jax.load(tmp_path / "gen_0")
  for row, expected in zip((loaded.metrics, *loaded.history), (trained.metrics, *trained.history), strict=True):
    np.testing.assert_equal(dict(row), dict(expected))  # NaN equals NaN here
  assert math.isnan(loaded.metrics["test_error"])
  assert loaded.metrics["test_brier"] == -math.inf


def test_records_of_finite_numbers_have_the_bytes_of_earlier_versions(tmp_path):
  directory, value = epath.Path(tmp_path), {"b": [1, 0.1, None, True], "a": {"x": "NaN of a kind", "y": 1e300}}
  storage.write_json(directory / "value.json", value)
  assert (tmp_path / "value.json").read_text() == json.dumps(value, indent=2, sort_keys=True) + "\n"
  assert storage.standard(value) == value
  rows = ({"epoch": 1, "loss": 0.1}, {"epoch": 2, "loss": 1e-12})
  finished.finish(directory, Generation(0, {"params": {"x": np.float32([1])}}, {"b": 1.5, "a": 2}, rows), {})
  assert (tmp_path / "history.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows)
  digest = strict(tmp_path / "manifest.json")[0]["records_digest"]
  assert digest == trees.json_digest([{"b": 1.5, "a": 2}, list(rows)])


def test_records_of_earlier_versions_with_bare_nan_are_still_read(tmp_path):
  metrics, history = {"error": math.nan, "nll": math.inf}, [{"loss": -math.inf}]
  (tmp_path / "metrics.json").write_text(json.dumps(metrics))
  (tmp_path / "history.jsonl").write_text(json.dumps(history[0]) + "\n")
  (tmp_path / "manifest.json").write_text(json.dumps({"records_digest": trees.json_digest([metrics, history])}))
  found = finished.read_records(epath.Path(tmp_path))
  np.testing.assert_equal(found[:2], (metrics, history))


def test_a_checkpoint_of_a_configuration_that_says_nan_is_not_damaged(tmp_path):
  tree, record = {"x": np.float32([1])}, {"lineage": {"scale": "NaN"}, "history": [{"loss": math.nan}]}
  with steps.open_steps(epath.Path(tmp_path) / "steps") as manager:
    steps.save_step(manager, 1, tree, record)
    manager.wait_until_finished()
    _, restored = steps.restore_newest(manager, tree)
  assert restored["lineage"] == {"scale": "NaN"}
  assert math.isnan(storage.numbers(restored["history"])[0]["loss"])


# --- UTF-8 ---------------------------------------------------------------------------------------------------------

IN_C = """
import csv, io, os, socket
from etils import epath
from ban_jax import storage
from experiments import cli, results, table1
from experiments.tables.report import HEADER, Output

def main():
  here = epath.Path(os.environ["FOLDER"])
  storage.write_bytes(here / "text", "±".encode())
  assert (here / "text").read_bytes() == b"\\xc2\\xb1"
  text = io.StringIO()
  table = csv.DictWriter(text, HEADER)
  table.writeheader()
  table.writerow({"row": "naïve", "scale": "smoke", "seeds": "0;1"})
  results.write(here / "table1.csv", text.getvalue())
  assert Output(table1.TABLE, "smoke", here).existing().rows == {"naïve"}
  with storage.open_workdir(here / "run", {}):
    owner = (here / "run" / ".lock").read_text("utf-8")
  assert "on höst" in owner, owner
  print("10.0 ± 0.1")

socket.gethostname = lambda: "höst"
cli.run(main)
"""


def test_files_are_utf_8_whatever_the_locale(tmp_path):
  plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
  script = tmp_path / "in_c.py"
  script.write_text(IN_C, encoding="utf-8")
  environment = {**os.environ, **plain, "FOLDER": str(tmp_path)}
  done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "10.0 \\xb1 0.1\n"  # an ASCII terminal shows what it can


# --- TensorBoard ---------------------------------------------------------------------------------------------------


def test_tensorboard_shows_a_killed_and_resumed_run_forward(tmp_path):
  cfg = config(train__epochs=4, train__checkpoint_every=10)  # of 5 steps each
  kill(tmp_path, cfg, 17)  # epochs 1 to 3 are shown, and step 10 is saved
  kill(tmp_path, cfg, 16)
  trained = ban_jax.train_generation(None, cfg, workdir=tmp_path, **QUIET)
  directory = tmp_path / "gen_0"
  assert len(list(directory.glob("events.out.tfevents.*"))) >= 2
  reader = EventAccumulator(str(directory))
  reader.Reload()
  names = {
    name: f"train/{name}" if name in ("learning_rate", "seconds") else "/".join(name.rsplit("_", 1))
    for name in set(trained.history[-1]) - {"epoch", "step", "test_count"}
  }
  assert {"train/loss", "train/learning_rate", "test/error"} < set(names.values())
  assert set(reader.Tags()["scalars"]) == set(names.values())
  (text,) = reader.Tensors("configuration/text_summary")[-1].tensor_proto.string_val
  assert "| train.epochs | 4 |" in text.decode()
  for name, tag in names.items():
    shown = reader.Scalars(tag)
    rows = [row for row in trained.history if name in row]
    assert [event.step for event in shown] == [row["step"] for row in rows]
    assert [event.value for event in shown] == pytest.approx([row[name] for row in rows], rel=1e-6)
    times = [event.wall_time for event in shown]
    assert times == sorted(times)


@pytest.mark.parametrize("clock", [-7200, -1, 0, 3600])  # seconds by which the second session's clock is set
@pytest.mark.parametrize("done", [0, 2])
def test_tensorboard_shows_what_came_last_whatever_the_clock(clock, done, tmp_path, monkeypatch):
  begun = time.time()
  for now, first, value in ((begun, 0, 1.0), (begun + clock, done, 2.0)):
    monkeypatch.setattr(time, "time", lambda now=now: now)
    with report.tensorboard(tmp_path, first) as write:
      for step in range(first + 1, 5):
        write(step, {"grade": value})
  reader = EventAccumulator(str(tmp_path))
  reader.Reload()
  shown = reader.Scalars("train/grade")
  assert [(one.step, one.value) for one in shown] == [(n, 1.0 if n <= done else 2.0) for n in range(1, 5)]
  assert [one.wall_time for one in shown] == sorted(one.wall_time for one in shown)


# --- layouts -------------------------------------------------------------------------------------------------------


def test_a_run_keeps_every_layout_that_took_part_and_a_resumption_names_what_changed(tmp_path, caplog):
  cfg = config(train__epochs=4, train__checkpoint_every=5, train__evaluate_every=0)
  two = {"devices": jax.devices()[:2]}
  kill(tmp_path, cfg, 8, devices=jax.devices()[:4])
  with jax.default_matmul_precision("float32"):
    kill(tmp_path, cfg, 13, **two)
  kill(tmp_path, cfg, 12, **two)  # saves nothing, so it takes no part
  with jax.default_matmul_precision("float32"):
    ban_jax.train_generation(None, cfg, workdir=tmp_path, **two, **QUIET)
  (manifest,) = strict(tmp_path / "gen_0" / "manifest.json")
  took_part = [
    (layout["steps"], layout["devices"], layout["settings"]["matmul_precision"]) for layout in manifest["layouts"]
  ]
  assert took_part == [(0, 4, "default"), (5, 2, "float32")]
  assert manifest["layout"] == {key: value for key, value in manifest["layouts"][-1].items() if key != "steps"}
  warnings = [record.getMessage() for record in caplog.records if "another layout" in record.getMessage()]
  assert len(warnings) == 2
  assert "(devices was 4, is 2; settings.matmul_precision was 'default', is 'float32'): its bytes may" in warnings[0]
  assert "(settings.matmul_precision was 'float32', is 'default')" in warnings[1]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("drawn", [{}, {"dropout_draws": common.DRAWS - 1}])
def test_a_training_begun_with_other_draws_of_dropout_is_refused_and_others_are_not(dropout, drawn, tmp_path):
  job = job_lib.prepare(resolving.resolve(config(model__dropout=dropout), None), None, None)
  layout = {key: value for key, value in job.lineage["layout"].items() if key != "dropout_draws"} | drawn
  record = {"lineage": {**job.lineage, "layout": layout}}  # as an earlier version left it
  resuming.check(job, tmp_path, {"lineage": job.lineage})
  refused = pytest.raises(CheckpointError, match="begun by an earlier version, which drew dropout's masks otherwise")
  with refused if dropout else contextlib.nullcontext():
    resuming.check(job, tmp_path, record)


def test_a_checkpoint_of_an_earlier_version_resumes_without_a_warning_and_its_layout_is_kept(caplog):
  job = job_lib.prepare(resolving.resolve(config(), None), None, None)
  layout = {**job.lineage["layout"], "settings": {"matmul_precision": "default"}}  # fewer settings, and no list
  record = {"lineage": {**job.lineage, "layout": layout}}
  resuming.check(job, epath.Path("gen_0"), record)
  assert not caplog.records
  assert resuming.layouts(job, record, 5) == [{"steps": 0, **layout}, {"steps": 5, **job.lineage["layout"]}]


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    ("", False),
    ("--xla_gpu_deterministic_ops", True),
    ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ("--xla_gpu_exclude_nondeterministic_ops=1", True),
    ("--xla_gpu_deterministic_ops_of_others=true", False),
  ],
)
def test_the_layout_records_deterministic_operations_and_the_random_generator(flags, expected, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", flags)
  settings = devices_lib.layout(tuple(jax.devices()))["settings"]
  assert settings["deterministic_ops"] is expected
  assert settings["prng_impl"] == "threefry2x32"


def test_the_layout_of_tpus_records_the_flags_of_their_compiler(monkeypatch):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--b=2 --a=1")
  chip = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", process_index=0)
  assert devices_lib.layout((chip,))["settings"]["libtpu_flags"] == "--a=1 --b=2"
  assert "libtpu_flags" not in devices_lib.layout(tuple(jax.devices()))["settings"]


# --- the commit ----------------------------------------------------------------------------------------------------


def test_the_commit_is_that_of_the_source_tree_and_never_that_of_another_repository(tmp_path, monkeypatch):
  def git(*arguments, cwd):
    identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
    line = ["git", *identity, *arguments]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()

  def commit():
    return finished.provenance.__wrapped__()["git_commit"]

  inside = tmp_path / "environment" / "site-packages"
  shutil.copytree(ROOT / "ban_jax", inside / "ban_jax", ignore=shutil.ignore_patterns("__pycache__"))
  monkeypatch.setattr(finished, "__file__", str(inside / "ban_jax" / "storage" / "finished.py"))
  assert commit() is None
  git("init", "-q", cwd=tmp_path)
  git("add", "-f", ".", cwd=tmp_path)
  git("commit", "-q", "-m", "another project, whose environment holds the package", cwd=tmp_path)
  assert commit() is None

  git("init", "-q", cwd=inside)
  git("add", ".", cwd=inside)
  git("commit", "-q", "-m", "the source tree", cwd=inside)
  own = git("rev-parse", "HEAD", cwd=inside)
  assert commit() == own
  (inside / "ban_jax" / "version.py").write_text('__version__ = "changed"\n')
  assert commit() == own + "+"


# --- What is sound is not to be removed ------------------------------------------------------------------------------


def written(folder, **manifest):
  """Writes a small finished generation and changes its manifest."""
  directory = epath.Path(folder)
  finished.finish(directory, Generation(0, {"params": {"x": np.float32([1])}}, {"b": 1.5}, ()), {"generation": 0})
  record = {**strict(folder / "manifest.json")[0], **manifest}
  (folder / "manifest.json").write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
  return directory


@pytest.mark.parametrize(
  "manifest", [{"records_digest": None}, {"digest": None}, {"generation": None}, {"network_digest": "0"}], ids=str
)
def test_records_of_another_form_are_not_called_damaged(manifest, tmp_path):
  directory = written(tmp_path, **manifest)
  if "network_digest" in manifest:
    (tmp_path / "network.json").write_text('{"networks": []}')
    manifest = {"network_digest": trees.json_digest({"networks": []})}
    directory = written(tmp_path, **manifest)
  with pytest.raises(ban_jax.CheckpointError, match="read it with the version that wrote it") as error:
    ban_jax.load(directory)
  assert "remove" not in str(error.value)
  assert "damage" not in str(error.value)


@pytest.mark.parametrize(("version", "advice"), [(None, "remove .* to train it again"), ("0.1", "read it with orbax-")])
def test_what_another_orbax_wrote_is_not_to_be_removed(version, advice, tmp_path):
  directory = written(tmp_path, packages=version and {"orbax-checkpoint": version})
  shutil.rmtree(tmp_path / "params")
  with pytest.raises(ban_jax.CheckpointError, match=advice):
    ban_jax.load(directory)


def test_a_network_record_of_an_earlier_version_with_infinity_is_read(tmp_path):
  network = Network({"name": "own", "own": "N", "limit": math.inf}, "float32", InputSpec("images", (4, 4, 1), 3))
  bare = finished.network_record(network) | {"group": dict(network.group)}
  (tmp_path / "network.json").write_text(json.dumps(storage.standard(bare)))
  directory = written(tmp_path, network_digest=trees.json_digest(bare))
  assert ban_jax.load(directory).network.group["limit"] == "Infinity"


def test_a_configuration_of_a_name_that_is_not_known_is_not_to_be_removed(tmp_path):
  (tmp_path / "gen_0").mkdir()
  values = config_lib.record(config()) | {"loss.name": "focal"}
  (tmp_path / "gen_1").mkdir()
  (tmp_path / "config.json").write_text(json.dumps(values))
  with pytest.raises(ban_jax.CheckpointError, match="run of another configuration: unknown loss 'focal'") as error:
    ban_jax.run(config(), tmp_path, **QUIET)
  assert "remove" not in str(error.value)

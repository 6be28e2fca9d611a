"""experiments/accelerator.py at the smoke scale: all of its parts, slices of time, and what it refuses."""

import json
import shutil
import sys

import forks
import pytest
from conftest import ROOT

from ban_jax.trees import json_digest

COMMAND = [sys.executable, str(ROOT / "experiments" / "accelerator.py"), "--scale=smoke", "--seeds=1", "--devices=1"]
COMMAND += ["--side_by_side=1"]  # tests/test_tables.py has several processes at one table


def run(workdir, *given):
  return forks.run([*COMMAND, f"--workdir={workdir}", *given])


def replace(path, change):
  path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A workdir in which all parts are finished, and what the command printed."""
  workdir = tmp_path_factory.mktemp("accelerator") / "run"
  done = run(workdir)
  assert done.returncode == 0, done.stderr
  return workdir, done.stdout


@pytest.mark.slow
def test_every_part_runs_and_is_reported(finished):
  workdir, printed = finished
  text = (workdir / "accelerator.md").read_text()
  assert text in printed
  assert "to do" not in text
  assert "| steps   | lstm_200 | supervised | float32 |" in text
  found = json.loads((workdir / "accelerator.json").read_text())
  assert set(found["states"].values()) == {"finished"}
  assert [(row["kind"], row["values"], row["repeated"]) for row in found["numerics"]] == [
    ("images", 6, True), ("text", 6, None)
  ]  # fmt: skip
  assert found["bench"]["lstm_200"]["measurements"][0]["ours"][0] > 0
  for number in (1, 3):
    lines = found["tables"][f"table{number}"].splitlines()
    assert [line.split(",")[1:3] for line in lines[1:]] == [
      ["Wide-ResNet-28-1", "teacher"],
      ["Wide-ResNet-28-1", "BAN"],
    ]


@pytest.mark.slow
def test_without_time_nothing_begins_and_the_same_command_continues(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  shutil.rmtree(workdir / "tables")
  done = run(workdir, "--minutes=0.5")
  assert done.returncode == 75
  assert "--minutes=0.5 are over, and all is saved; rerun the command to continue" in done.stderr
  states = json.loads((workdir / "accelerator.json").read_text())["states"]
  assert [name for name, state in states.items() if state == "to do"] == ["table 1", "table 3"]
  assert not (workdir / "tables").exists()


def changed(change, *given, workdir):
  """Runs the command with other parts: `change` is code that makes `found` from the parts that there are."""
  code = f"""
import sys
from absl import flags
from experiments import accelerator, cli
whole = accelerator.parts
def parts(workdir):
  found = whole(workdir)
  {change}
  return found
accelerator.parts = parts
cli.run(accelerator.main)
"""
  command = [sys.executable, "-c", code, *COMMAND[2:], f"--workdir={workdir}", *given]
  return forks.run(command, cwd=ROOT)


@pytest.mark.soak  # it waits for a slice of time
def test_a_slice_ends_with_what_is_trained_saved(tmp_path):
  change = (
    "found = found[:1]; found[0].commands[0].line.append('--config.train.epochs=100000'); "
    "accelerator.GRACE, accelerator.LEAST = 60.0, 0.0"
  )
  workdir = tmp_path / "run"
  done = changed(change, "--minutes=1.6", workdir=workdir)
  assert done.returncode == 75, done.stderr
  log = (workdir / "logs" / "numerics_images_cpu.log").read_text()
  assert "asked to end by SIGTERM or Ctrl-C: generation 0 is saved at step" in log
  assert any((workdir / "numerics" / "images_cpu" / "gen_0" / "steps").iterdir())


@pytest.mark.slow
def test_numbers_that_differ_from_the_cpu_s_end_the_command(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished[0], workdir)
  own = workdir / "numerics" / "text_here" / "gen_1"
  replace(own / "metrics.json", lambda metrics: {**metrics, "test_nll": 1.03 * metrics["test_nll"]})
  history = [json.loads(line) for line in (own / "history.jsonl").read_text().splitlines()]
  digest = json_digest([json.loads((own / "metrics.json").read_text()), history])
  replace(own / "manifest.json", lambda manifest: {**manifest, "records_digest": digest})
  done = run(workdir)
  assert done.returncode == 3
  assert (
    "a small run on text differs between CPU and 1 x cpu by 3.00% of a loss, more than rounding's 2%" in done.stderr
  )


@pytest.mark.slow
def test_a_check_that_may_fail_is_named_and_the_others_go_on(tmp_path):
  workdir = tmp_path / "run"
  change = (
    "command, *others = found[0].commands; command.line.append('--config.seed=-1'); "
    "found = [found[0]._replace(commands=[command._replace(may_fail=True), *others], side_by_side=2)]"
  )
  done = changed(change, "--parts=numerics", workdir=workdir)
  assert done.returncode == 0, done.stderr
  text = (workdir / "accelerator.md").read_text()
  assert f"- numerics, images, cpu failed with status 2: see {workdir}/logs/numerics_images_cpu.log" in text
  assert [row["kind"] for row in json.loads((workdir / "accelerator.json").read_text())["numerics"]] == ["text"]


@pytest.mark.slow
def test_a_part_that_fails_names_its_log(tmp_path):
  workdir = tmp_path / "run"
  done = changed("found[0].commands[0].line.append('--config.seed=-1')", workdir=workdir)
  assert done.returncode == 3
  log = workdir / "logs" / "numerics_images_cpu.log"
  assert f"error: numerics, images, cpu failed with status 2: see {log}" in done.stderr
  assert "seed" in log.read_text()

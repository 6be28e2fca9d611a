"""The package as it is installed: import time and weight, the quickstart."""

import fnmatch
import importlib.util
import json
import runpy
import subprocess
import sys
import types

import forks
import jax.numpy as jnp
import jaxtyping
import pytest
from conftest import IMAGES, ROOT

import ban_jax
from ban_jax import losses


def test_importing_the_library_is_light_and_fast():
  code = (
    "import sys, time; start = time.process_time(); import {}; seconds = time.process_time() - start;"
    "heavy = {{'tensorflow_datasets', 'sklearn', 'matplotlib', 'tensorflow', 'PIL', 'orbax', 'scipy.stats'}};"
    "print(seconds); assert not heavy & set(sys.modules), heavy & set(sys.modules)"
  )
  # The best of three in processor time, so that neither a busy machine matters nor a slow one.
  seconds = {"ban_jax": [], "jax, flax.linen, optax, ml_collections": []}
  for names in 3 * list(seconds):
    command = [sys.executable, "-c", code.format(names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    seconds[names].append(float(done.stdout))
  own, others = map(min, seconds.values())
  assert own < 2
  assert own < 1.4 * others


@pytest.mark.slow
def test_the_quickstart_ends_with_a_table_and_a_plot_and_is_shown_at_once_afterwards(tmp_path):
  command = [sys.executable, "-m", "experiments.quickstart", f"--workdir={tmp_path}", "--seeds=2",
             f"--words={IMAGES}", "--devices=2"]  # fmt: skip
  first = forks.run(command, cwd="/")
  assert first.returncode == 0, first.stderr
  assert "±" in first.stdout
  assert (tmp_path / "error_by_generation.png").read_bytes().startswith(b"\x89PNG")
  assert f"plot:  {tmp_path}/error_by_generation.png" in first.stdout
  again = forks.run(command, cwd="/")
  assert "everything was finished already" in again.stdout
  assert again.stdout.split("\n\n", 1)[1] == first.stdout.split("\n\n", 1)[1]


@pytest.mark.slow
def test_how_much_training_is_enough_is_tabled_and_plotted(tmp_path):
  command = [sys.executable, "-m", "experiments.enough", f"--workdir={tmp_path}", "--seeds=1", "--devices=1",
             f"--words={IMAGES}", "--noise=0.4", "--epochs=1,2", "--generations=1"]  # fmt: skip
  done = forks.run(command, cwd="/")
  assert done.returncode == 0, done.stderr
  for epochs in (1, 2):
    assert f"| 40%          | {epochs}      |" in done.stdout
  assert "teacher's best stop" in done.stdout
  assert (tmp_path / "enough.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "enough.md").read_text() in done.stdout + "\n"
  lines = [json.loads(line) for line in (tmp_path / "enough.jsonl").read_text().splitlines()]
  assert [line["changes"]["train.epochs"] for line in lines if "train.epochs" in line["changes"]] == [1]
  assert all(list(line["results"]) == ["teacher", "BAN-1"] for line in lines)
  refused = forks.run([*command, "--epochs=ten"], cwd="/")
  assert refused.returncode == 2
  assert "error: --noise and --epochs take numbers, separated by commas" in refused.stderr


def test_an_installation_takes_no_other_name_than_ban_jax(monkeypatch):
  def find_packages(include):
    found = (".".join(path.relative_to(ROOT).parts[:-1]) for path in ROOT.glob("[!.]*/**/__init__.py"))
    return [name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in include)]

  given = {}
  setuptools = types.SimpleNamespace(find_packages=find_packages, setup=lambda **arguments: given.update(arguments))
  monkeypatch.setitem(sys.modules, "setuptools", setuptools)
  runpy.run_path(str(ROOT / "setup.py"))
  assert {name.partition(".")[0] for name in given["packages"]} == {"ban_jax"}
  assert {"ban_jax.presets", "ban_jax.models", "ban_jax.data", "ban_jax.storage"} < set(given["packages"])


def test_no_module_hides_behind_a_function_of_its_name():
  assert [name for name in ban_jax.__all__ if importlib.util.find_spec(f"ban_jax.{name}")] == []


def test_wrong_shapes_are_noticed_in_the_tests():
  logits = jnp.zeros((2, 3))
  with pytest.raises(jaxtyping.TypeCheckError):
    losses.label_cross_entropy(logits, jnp.zeros(4, int))

"""A run as files for others: what they say, and that they can be loaded as they say."""

import json
import re

import numpy as np
import pytest
from conftest import config

import ban_jax
from ban_jax import trees
from ban_jax.errors import CheckpointError, ConfigError

QUIET = {"progress": False}


def test_a_card_says_what_a_run_is_and_its_files_load_as_it_says(tiny, tmp_path, monkeypatch):
  cfg = config("digits,own,smoke,adamw", generations=1, train__batch_size=8)
  teacher, student = ban_jax.run(cfg, tmp_path / "run", **tiny, **QUIET, on_epoch=lambda history: len(history) == 1)
  ban_jax.export_card(tmp_path / "run", tmp_path / "card")
  files = {"README.md", "config.json", "lineage.json", "gen_0.safetensors", "gen_1.safetensors"}
  assert {path.name for path in (tmp_path / "card").iterdir()} == files
  text = (tmp_path / "card" / "README.md").read_text()
  (row,) = re.findall(rf"\| BAN-1 \| {student.metrics['test_error']:.2f} \[(.+), (.+)\] \|", text)
  for end in (float(number) / 100 for number in row):  # Wilson's: the share is on the edge of what is likely there
    distance = abs(student.metrics["test_error"] / 100 - end)
    np.testing.assert_allclose(distance, 1.959964 * np.sqrt(end * (1 - end) / 20), atol=2e-4)
  assert (
    "Linear, 68 parameters, trained for 1 epochs, ended after epoch 1 with the loss `ban`, taught by: teacher" in text
  )
  first, second = json.loads((tmp_path / "card" / "lineage.json").read_text())
  assert (first["teachers"], second["teachers"]) == ([], [trees.digest(teacher.params)])
  assert json.loads((tmp_path / "card" / "config.json").read_text())["optim.name"] == "adamw"

  monkeypatch.chdir(tmp_path / "card")
  namespace = {}
  exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), namespace)
  given = {name: tiny[name] for name in ("dataset", "model")}
  loaded = ban_jax.with_network(namespace["variables"], cfg, **given)
  images = tiny["dataset"].splits["test"]["images"]
  np.testing.assert_array_equal(ban_jax.predict(loaded, images), ban_jax.predict(student, images))
  assert namespace["network"]["group"]["own"] == "Linear"


def test_what_is_no_run_or_no_directory_is_refused(tmp_path):
  with pytest.raises(CheckpointError, match="holds no finished generation"):
    ban_jax.export_card(tmp_path, tmp_path / "card")
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match=r"path='.*file' is a file; name a directory"):
    ban_jax.export_card(tmp_path, tmp_path / "file")

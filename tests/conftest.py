"""Four virtual CPU devices and the compilation cache, set before the first computation; small configurations."""

import os
import pathlib

import jax
import pytest
from ml_collections import ConfigDict

from configs import digits
from experiments import cli

jax.config.update("jax_num_cpu_devices", 4)
cli.use_compilation_cache()

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def shared() -> pathlib.Path:
  """The folder with real data sets, or a skip."""
  folder = pathlib.Path(os.environ.get("BAN_SHARED", ROOT.parent / "shared")).resolve()
  if not (folder / "data").is_dir():
    pytest.skip(f"real data are not at {folder} (set BAN_SHARED)")
  return folder


def config(words: str = "digits,wrn_10_1,smoke", **changes) -> ConfigDict:
  """Returns a locked configuration of seconds, with `train__epochs=3` style changes."""
  cfg = digits.get_config(words)
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return cfg

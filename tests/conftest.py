"""Four virtual CPU devices and one compilation cache, set before the first computation; small configurations."""

import collections
import gc
import pathlib
import sys

import jax
import jaxtyping
import numpy as np
import one_cache
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

# Where arrays are computed, the shapes and dtypes of annotations are checked whenever a test calls a function.
CHECKED = [
  *("ban_jax.losses", "ban_jax.gradient", "ban_jax.metrics", "ban_jax.data.augment", "ban_jax.models.common"),
  # Not the files of other networks, whose options are tested with wrong types.
  *("ban_jax.models.wide_resnet", "ban_jax.models.matched_resnet", "ban_jax.models.mlp"),
]
jaxtyping.Array = jax.Array | np.ndarray  # JAX takes NumPy's arrays too, and tests give them
with jaxtyping.install_import_hook(CHECKED, "beartype.beartype"):
  import ban_jax
  from configs import digits

one_cache.install()
gc.set_threshold(100_000, 50, 50)  # JAX makes many objects when it traces; collecting them is a tenth of a test's time
jax.config.update("jax_num_cpu_devices", 4)
ban_jax.keep_programs()

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What is trained if the network does not matter: it compiles in a quarter of the time that a Wide-ResNet takes.
IMAGES = "digits,mlp_16,smoke"
# The command line of a short run on two devices, to which a test adds its flags.
TRAIN = [
  sys.executable,
  str(ROOT / "experiments" / "train.py"),
  f"--config={ROOT}/configs/digits.py:{IMAGES}",
  "--devices=2",
]


def config(words: str = IMAGES, **changes) -> ConfigDict:
  """Returns a locked configuration that trains in seconds; changes are given as `train__epochs=3`."""
  cfg = digits.get_config(words)
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return cfg


class Linear(nn.Module):
  """A network that compiles in no time."""

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="session")
def tiny():
  """Returns the arguments of a training that takes a second: four noisy stripes, a linear network, two devices."""
  rng = np.random.default_rng(0)
  labels = np.arange(80) % 4
  pixels = rng.normal(size=(80, 4, 4)) + labels[:, None, None]
  dataset = ban_jax.from_arrays((pixels[:60], labels[:60]), (pixels[60:], labels[60:]), 0.2)
  return {"dataset": dataset, "model": ban_jax.from_flax(Linear(), dataset), "devices": jax.devices()[:2]}


def pytest_collection_modifyitems(items):
  """Puts the files with the most slow tests first, so that at the end no worker is left with a long one."""
  slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
  items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
  """Drops the compiled programs if they are many: each has dozens of memory mappings, a process at most 65,530."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()
    gc.collect()

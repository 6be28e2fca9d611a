"""What a process keeps: freed buffers, which change no result, and compiled programs."""

import os
import platform
import subprocess
import sys

import forks
import jax
import pytest
from conftest import IMAGES, ROOT

import ban_jax

# Allocates and frees 64 MB twenty times, and prints the page faults that it takes.
FAULTS = """
import resource, sys
import numpy as np
import ban_jax
if sys.argv[1] == "keep":
  assert ban_jax.keep_freed_memory()
for _ in range(3):
  np.ones(2**23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
  np.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
  faults = {
    how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
    for how in ("keep", "not")
  }
  assert faults["keep"] < 1000
  assert faults["not"] > 5 * faults["keep"] + 1000


def test_neither_the_allocator_nor_a_profile_changes_a_byte(tmp_path):
  digests = []
  for name, own in (("keep", ["--keep_memory", f"--profile={tmp_path}/trace"]), ("not", ["--nokeep_memory"])):
    workdir = tmp_path / name
    words = f"--config={ROOT}/configs/digits.py:{IMAGES}"
    flags = [words, *own, "--config.generations=0", "--noprogress", f"--workdir={workdir}"]
    done = forks.run([sys.executable, str(ROOT / "experiments" / "train.py"), *flags])
    assert done.returncode == 0, done.stderr
    manifest = (workdir / "gen_0" / "manifest.json").read_text()
    digests.append([line for line in manifest.splitlines() if '"digest"' in line])
  assert digests[0] == digests[1]
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_programs_are_kept_where_jax_keeps_them_or_where_one_says(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  assert ban_jax.keep_programs() == before
  try:
    assert ban_jax.keep_programs(tmp_path) == jax.config.jax_compilation_cache_dir == str(tmp_path)
  finally:
    ban_jax.keep_programs(before)


def test_programs_are_kept_below_the_user_s_directory_of_caches(tmp_path):
  code = "import ban_jax; print(ban_jax.keep_programs())"
  environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
  for given, kept in (({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path), ({"HOME": str(tmp_path)}, tmp_path / ".cache")):
    done = subprocess.run(
      [sys.executable, "-c", code], env={**environment, "XDG_CACHE_HOME": "", **given}, capture_output=True, text=True
    )
    assert done.stdout == f"{kept / 'ban_jax' / 'xla'}\n", done.stderr

"""One compilation cache for all processes of the tests, in which a program is found whichever of them compiled it.

JAX's key of a CPU program names the process, its number of devices and those that the program runs on, although the
program depends on none of them. Without them, a run of the command line finds what a test compiled, each of several
processes what another one did, and a student what the one beside it did.

`install()` is for a process that has not computed yet. `python tests/one_cache.py SCRIPT ...` runs a script so.
"""

import os
import runpy
import sys

from jax._src import cache_key

# Programs of tests run for a moment only: less optimisation by LLVM takes a fifth to a third off their compilation, and
# adds a fifth to a Wide-ResNet's steps (without any, level 0, they take ten times as long). The second flag is set by
# the scripts; here it makes the tests' programs theirs.
XLA_FLAGS = "--xla_backend_optimization_level=1 --xla_gpu_deterministic_ops=true"


def install() -> None:
  from ban_jax import chips  # not before the tests' hook for its modules is there

  chips.describe_host()
  if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
  if hasattr(cache_key, "_hash_accelerator_config"):  # private to JAX; without it, tests only take longer
    cache_key._hash_accelerator_config = cache_key._hash_devices
  if hasattr(cache_key, "_hash_serialized_compile_options"):
    options = cache_key._hash_serialized_compile_options
    cache_key._hash_serialized_compile_options = lambda hashed, given, **_: options(hashed, given, True)


if __name__ == "__main__":
  install()
  del sys.argv[0]
  sys.path[0] = os.path.dirname(sys.argv[0])
  runpy.run_path(sys.argv[0], run_name="__main__")

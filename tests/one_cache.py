"""Runs a script as one of several processes, with one compilation cache for all of them.

A CPU's programs are kept by process 0 alone, under a key that differs from one process to the next, so that the others
would compile at every start. Here the key has the kinds of the devices only.
"""

import os
import runpy
import sys

from jax._src import cache_key

if hasattr(cache_key, "_hash_accelerator_config"):  # private to JAX; without it, tests only take longer
  cache_key._hash_accelerator_config = cache_key._hash_devices

if __name__ == "__main__":
  del sys.argv[0]
  sys.path[0] = os.path.dirname(sys.argv[0])
  runpy.run_path(sys.argv[0], run_name="__main__")

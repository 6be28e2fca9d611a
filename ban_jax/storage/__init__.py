"""Run directories on disk: who holds one, a generation's checkpoints in training, and what a finished one leaves.

    workdir/config.json         the configuration of the last run in it
    workdir/beginning.json      the run's first generation, and the digests of what taught it
    workdir/processes.json      where several processes train: the token by which they see the same directory
    workdir/.lock               held while a process works in the directory; not on an object store
    workdir/gen_K/steps/        checkpoints of a generation in training
    workdir/gen_K/damaged/      checkpoints that are not what was saved, kept until the generation is finished
    workdir/gen_K/params/       the finished variables
    workdir/gen_K/metrics.json, history.jsonl, events.out.tfevents.*
    workdir/gen_K/network.json  which network it is, and how its inputs are normalised
    workdir/gen_K/manifest.json the generation's lineage; written last, so its presence means: finished

Orbax restores a flipped byte without an error. Every tree is therefore compared with the digest it was saved with
before anything is computed from it.
"""

from ban_jax.storage.files import (
  damage,
  first_line,
  numbers,
  read_json,
  remove_partial,
  standard,
  storage_errors,
  write_bytes,
  write_json,
)
from ban_jax.storage.finished import (
  check_lineage,
  finish,
  load,
  load_together,
  network_record,
  provenance,
  read_records,
  remove_leftovers,
)
from ban_jax.storage.steps import open_steps, restore_newest, save_step
from ban_jax.storage.workdir import begin, open_workdir, resolve_workdir

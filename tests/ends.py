"""Ends a run at a place of its own: as a script in a process to be killed, or in the tests' own process.

`python tests/ends.py PLACE SCRIPT ...` runs a script that SIGKILL ends there.
"""

import os
import runpy
import signal
import sys
from collections.abc import Callable

from ban_jax import storage
from ban_jax.storage import finished
from ban_jax.storage import workdir as workdirs


def install(place: str, end: Callable[[], None], replace: Callable[[object, str, object], None] = setattr) -> None:
  """Makes a run call `end` when it first comes to the place.

  That is the rename of a file that is written under another name (its name); right after a second save, which still
  runs in the background ("save"); after a generation's first save ("gen_0", "gen_1"); or after a generation is
  finished and before its checkpoints are removed ("between").
  """
  write, save, remove, saves, ended = storage.write_json, storage.save_step, finished.remove_leftovers, [], []

  def once() -> None:
    if not ended:
      ended.append(place)
      end()

  def write_or_end(path, value) -> None:
    if path.name == place and not ended:
      (path.parent / ".0123456789abcdef.partial").write_text('{"half":')
      once()
    write(path, value)

  def save_and_end(manager, *given) -> None:
    save(manager, *given)
    saves.append(manager)
    if f"/{place}/" in str(manager.directory) and not ended:
      manager.wait_until_finished()
      once()
    elif place == "save" and len(saves) == 2:
      once()

  def end_or_remove(*given) -> None:
    if place == "between":
      once()
    remove(*given)

  replace(workdirs, "write_json", write_or_end)
  replace(finished, "write_json", write_or_end)
  replace(storage, "save_step", save_and_end)
  replace(finished, "remove_leftovers", end_or_remove)


if __name__ == "__main__":
  install(sys.argv[1], lambda: os.kill(os.getpid(), signal.SIGKILL))
  del sys.argv[:2]
  sys.path[0] = os.path.dirname(sys.argv[0])
  runpy.run_path(sys.argv[0], run_name="__main__")

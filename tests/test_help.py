"""--help of every script: what it does, all its flags in words, exit status 0."""

import re
import sys

import forks
import pytest
from conftest import ROOT

SCRIPTS = sorted(
  path.stem for path in (ROOT / "experiments").glob("*.py") if 'if __name__ == "__main__"' in path.read_text("utf-8")
)
# Where a script's flags are defined, besides itself.
ALSO = {f"table{number}": "tables/run.py" for number in range(1, 7)}


def defined_in(path):
  return set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"|add_argument\(\s*\"--(\w+)\"", path.read_text("utf-8")))


ASKED = [(name, "--help") for name in SCRIPTS] + [("train", "-h"), ("launch", "-h")]


@pytest.mark.parametrize(("script", "flag"), ASKED)
def test_help_shows_every_flag_and_is_no_error(script, flag):
  path = ROOT / "experiments" / f"{script}.py"
  done = forks.run([sys.executable, str(path), flag], cwd="/")
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  first = path.read_text("utf-8").partition('"""')[2].splitlines()[0]
  assert first in done.stdout.replace("\n", " ") if script == "launch" else done.stdout.startswith(first)
  files = [path] if script == "launch" else [path, ROOT / "experiments" / "cli.py"]
  files += [ROOT / "experiments" / ALSO[script]] if script in ALSO else []
  names = {name or other for file in files for name, other in defined_in(file)}
  assert len(names) >= 3
  for name in names:
    # The flag, and a line that says what it is for.
    assert re.search(rf"^  --(\[no\])?{name}( \w+|=VALUE)?\s+[^\s-]", done.stdout, re.M), name
  assert "absl" not in done.stdout


def test_help_wins_over_what_is_missing_or_wrong():
  train = str(ROOT / "experiments" / "train.py")
  done = forks.run([sys.executable, train, "--config=nope.py", "--bogus", "--help"], cwd="/")
  assert done.returncode == 0
  assert "--config.KEY=VALUE" in done.stdout


def test_the_list_of_words_and_keys_needs_no_configuration():
  done = forks.run([sys.executable, str(ROOT / "experiments" / "train.py"), "--list"], cwd="/")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == (ROOT / "docs" / "configuration.md").read_text("utf-8")

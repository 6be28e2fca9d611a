"""experiments/compile.py and what it is made of: programs as the compiler for TPUs makes them, where there is none.

Each compilation takes seconds of libtpu, which only Linux on x86-64 has.
"""

import importlib.util
import json
import math
import re
import sys

import pytest
from conftest import ROOT

from ban_jax import chips, compiled
from ban_jax.errors import ConfigError
from experiments import forks

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'ban_jax[compile]'"
)
IMAGES, TEXT = "configs/digits.py:digits,wrn_10_1,smoke", "configs/pydoc.py:pydoc,lstm_32,smoke"
# The command lines whose programs are looked at. All steps of a dispatch are in them, as in a run.
RUNS = {
  "images": [IMAGES, "v5e:2x2", "--programs=teacher,student,evaluation"],
  "text": [TEXT, "v5e:2x2", "--programs=student"],
  "pod": [TEXT, "v4:4x4x8", "--programs=student", "--config.train.batch_size=128"],
}
PROGRAMS = [
  ("images", "teacher"),
  ("images", "student"),
  ("images", "evaluation"),
  ("text", "student"),
  ("pod", "student"),
]
TRAINING = [each for each in PROGRAMS if each[1] != "evaluation"]
# Estimated cycles of a step, by version of libtpu: a change of more than 5 % is a change to look at.
CYCLES: dict[str, dict[tuple[str, str], float]] = {}


def compile_py(config, topology, *more):
  command = [sys.executable, str(ROOT / "experiments" / "compile.py"), f"--config={ROOT}/{config}"]
  return forks.run([*command, f"--topology={topology}", "--noprogress", *more])


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
  """Returns a function from a run and one of its programs to its report and its text; a run is made once."""
  done = {}

  def look(run, name):
    if run not in done:
      folder = tmp_path_factory.mktemp(run)
      found = compile_py(*RUNS[run], f"--out={folder}/out.json", f"--dump={folder}")
      assert found.returncode == 0, found.stderr
      assert not found.stderr
      done[run] = folder, json.loads((folder / "out.json").read_text()), found.stdout
    folder, answer, shown = done[run]
    (report,) = (each for each in answer["programs"] if each["program"] == name)
    return report, (folder / f"{name}.txt").read_text(), answer, shown

  return look


@needs_libtpu
@pytest.mark.parametrize(("run", "name"), PROGRAMS)
def test_what_a_program_takes_of_a_chip_is_told_by_kind(looked, run, name):
  report, _, answer, shown = looked(run, name)
  assert report["fits"]
  assert report["available"] == chips.CHIPS[RUNS[run][1].partition(":")[0]].memory
  assert report["needed"] == sum(report["memory"].values()) < report["available"]
  assert report["memory"].keys() >= ({"network"} if name == "evaluation" else {"state"}) | {"data", "temporaries"}
  assert ("teacher" in report["memory"]) == (name == "student")
  assert f"on {answer['chips']} chips of" in shown
  assert re.search(r"\| million cycles a step, estimated +\|", shown)


@needs_libtpu
@pytest.mark.parametrize(("run", "name"), TRAINING)
def test_the_state_is_donated(looked, run, name):
  report, text, *_ = looked(run, name)
  # Every array of the state and of the carry is written where it was read.
  assert report["memory"]["output"] < 0.1 * report["memory"]["state"]
  assert text.count("may-alias") + text.count("must-alias") > 15


@needs_libtpu
@pytest.mark.parametrize(("run", "name"), PROGRAMS)
def test_no_array_has_a_last_dimension_of_two(looked, run, name):
  """A TPU keeps such an array in tiles of 128 lanes, of which it would fill two."""
  _, text, *_ = looked(run, name)
  pairs = []
  for each in compiled.instructions(text):
    for shape, last in re.findall(r"\w+\[([\d,]+)\]\{(\d+)", each.shape):
      sizes = [int(size) for size in shape.split(",")]
      pairs += [each.line[:100]] if sizes[int(last)] == 2 and math.prod(sizes) > 1000 else []
  assert pairs == []


@needs_libtpu
@pytest.mark.parametrize(
  ("run", "name", "number"),
  # Two for each of seven batch norms, and two: gradients and sums, and counts. A language model has only those.
  [
    ("images", "teacher", 16),
    ("images", "student", 16),
    ("images", "evaluation", 2),
    ("text", "student", 2),
    ("pod", "student", 2),
  ],
)
def test_collectives_are_those_of_the_design(looked, run, name, number):
  report, *_ = looked(run, name)
  assert report["collectives"].keys() == {"all-reduce"}
  assert report["collectives"]["all-reduce"]["number"] == pytest.approx(number)


@needs_libtpu
def test_a_teacher_s_forward_pass_is_all_that_a_student_adds(looked):
  teacher, student = (looked("images", name)[0] for name in ("teacher", "student"))
  assert student["collectives"] == teacher["collectives"]
  assert 1 < student["cycles"] / teacher["cycles"] < 1.5
  assert 1.2 < student["flops"] / teacher["flops"] < 1.5


@needs_libtpu
@pytest.mark.parametrize(("run", "name"), PROGRAMS)
def test_cycles_are_what_they_were(looked, run, name):
  report, _, answer, _ = looked(run, name)
  known = CYCLES.get(answer["compiler"])
  if known is None:
    pytest.skip(f"no cycles are recorded for {answer['compiler']}")
  assert report["cycles"] == pytest.approx(known[run, name], rel=0.05)
  assert 0 < report["share"] < 1
  assert report["costly"] == sorted(report["costly"], key=lambda each: -each["cycles"])


@pytest.mark.parametrize(
  ("name", "kind", "shape"),
  [
    ("v5e:4x4", "v5e", (4, 4)),
    ("v5e-16", "v5e", (4, 4)),
    ("v6e-8", "v6e", (2, 4)),
    ("v5e-1", "v5e", (1, 1)),
    ("v4-8", "v4", (2, 2, 1)),  # its number counts cores
    ("v5p-256", "v5p", (4, 4, 8)),
    ("v4:2x2x1", "v4", (2, 2, 1)),
    ("h100", "h100", (1,)),
    ("h100x8", "h100", (8,)),
  ],
)
def test_chips_are_found_by_their_name(name, kind, shape):
  assert chips.parse(name) == (kind, shape)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v7:2x2", "topology='v7:2x2': expected CHIPS:SHAPE as v5e:4x4, or CHIPS-NUMBER as v5e-16, with v4, v5e"),
    ("", "topology=''"),
    ("v5e", "topology='v5e'"),
    ("v5e:4x4x4", "topology='v5e:4x4x4': expected 2 axes, since the chips of v5e lie in as many"),
    ("v5e-12", "topology='v5e-12': expected a power of two"),
    ("v4-1", "topology='v4-1': expected a power of two"),
    ("h100x0", "topology='h100x0'"),
  ],
)
def test_other_names_are_refused(name, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    chips.parse(name)


def test_a_missing_compiler_is_named_with_its_installation(monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find_spec(name))
  with pytest.raises(ConfigError, match=r"libtpu, .* is not installed: pip install 'ban_jax\[compile\]'"):
    chips.find("v5e:2x2")


@needs_libtpu
def test_a_slice_that_there_cannot_be_is_refused():
  done = compile_py(IMAGES, "v5e:3x5")
  assert done.returncode == 2
  assert re.fullmatch(r"error: topology='v5e:3x5': .*not divisible.*\n", done.stderr)


@needs_libtpu
def test_what_does_not_fit_is_a_sentence(tmp_path):
  changes = ["--config.model.units=40000", "--config.train.batch_size=8"]
  done = compile_py(TEXT, "v5e:2x2", "--programs=teacher", f"--out={tmp_path}/out.json", *changes)
  assert done.returncode == 2, done.stderr
  assert re.fullmatch(
    r"error: the teacher's step with 2 examples a chip does not fit: it needs [\d,]+ MiB of 16,128 MiB on a chip of v5e"
    r"; .*\n",
    done.stderr,
  )
  (report,) = json.loads((tmp_path / "out.json").read_text())["programs"]
  assert not report["fits"]
  assert report["needed"] > report["available"] == 16_128 * 2**20


@pytest.mark.parametrize(("a", "b"), [(10, 1.0), (0, 7.5), (900, 0.013)])
@pytest.mark.parametrize("first", [8, 128, 100_000])
def test_the_largest_batch_is_found_in_few_compilations(a, b, first):
  def needed(batch):
    tried.append(batch)
    fits = a + b * batch <= 1000
    return fits, int(a + b * batch) if fits or batch % 3 else 0  # not every refusal says how much it would be

  tried = []
  found = compiled.largest_batch(needed, first, 10_000, 1000)
  most = min(10_000, int((1000 - a) / b))
  assert most - max(8, most // 50) <= found <= most
  assert len(tried) == len(set(tried)) <= 9


def test_a_batch_that_never_fits_and_one_that_always_does():
  assert compiled.largest_batch(lambda batch: (False, 0), 128, 1000, 1000) == 0
  assert compiled.largest_batch(lambda batch: (True, batch), 8, 1000, 10**9) == 1000


def test_a_compiler_that_trades_time_for_memory_is_followed():
  tried = []

  def needed(batch):
    tried.append(batch)
    return batch <= 640, min(batch * 4, 1000)  # beyond 250 it computes again what it would have kept

  assert 625 <= compiled.largest_batch(needed, 16, 5000, 1000) <= 640
  assert len(tried) < 14

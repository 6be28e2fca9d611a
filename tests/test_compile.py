"""experiments/compile.py and what it is made of: programs as the compiler for TPUs makes them, where there is none.

Each compilation takes seconds of libtpu, which only Linux on x86-64 has.
"""

import gzip
import importlib.util
import json
import math
import re
import sys

import forks
import pytest
from conftest import ROOT

from ban_jax import chips, compiled
from ban_jax.errors import ConfigError

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'ban_jax[compile]'"
)
needs_cuda = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None, reason="XLA for GPUs is not installed: pip install '.[cuda]'"
)
IMAGES = ["configs/digits.py:digits,wrn_10_1,smoke"]
TEXT = ["configs/pydoc.py:pydoc,lstm_32,smoke"]
# The command lines whose programs are looked at. All steps of a dispatch are in them, as in a run.
RUNS = {
  "images": ("v5e:2x2", *IMAGES, "--programs=teacher,student,evaluation"),
  "text": ("v5e:2x2", *TEXT, "--programs=student"),
  "cifar": ("v5e:2x2", "configs/cifar.py:cifar10,wrn_10_1,paper", "--programs=student"),
  "pod": ("v4:4x4x8", *TEXT, "--programs=student", "--config.train.batch_size=128"),
}
# The arrays with all examples or tokens of the training set.
DATA = {"text": r"s32\[2001\]", "pod": r"s32\[2001\]", "cifar": r"u8\[50000,3072\]"}
PROGRAMS = [
  ("images", "teacher"),
  ("images", "student"),
  ("images", "evaluation"),
  ("text", "student"),
  ("pod", "student"),
]
TRAINING = [each for each in PROGRAMS if each[1] != "evaluation"]
# Estimated cycles of a step, by version of libtpu: a change of more than 5 % is a change to look at.
CYCLES = {
  "libtpu 0.0.42.1": {
    ("images", "teacher"): 272_331,
    ("images", "student"): 303_852,
    ("images", "evaluation"): 83_557,
    ("text", "student"): 542_118,
    ("pod", "student"): 261_731,
  },
  "libtpu 0.0.50.1": {
    ("images", "teacher"): 263_158,
    ("images", "student"): 292_847,
    ("images", "evaluation"): 81_711,
    ("text", "student"): 527_300,
    ("pod", "student"): 261_420,
  },
}


def compile_py(topology, config, *more, timeout=300):
  command = [sys.executable, str(ROOT / "experiments" / "compile.py"), f"--config={ROOT}/{config}"]
  return forks.run([*command, f"--topology={topology}", "--noprogress", *more], timeout=timeout)


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
  assert report["available"] == chips.CHIPS[RUNS[run][0].partition(":")[0]].memory
  assert report["needed"] == sum(report["memory"].values()) < report["available"]
  assert report["memory"].keys() >= ({"network"} if name == "evaluation" else {"state"}) | {"data", "temporaries"}
  assert ("teacher" in report["memory"]) == (name == "student")
  assert f"on {answer['chips']} chips of" in shown
  assert re.search(r"\| million cycles a step, estimated +\|", shown)


@needs_libtpu
def test_bytes_by_kind_add_up_to_the_compiler_s_own_number(tmp_path):
  given = [*TEXT, "--programs=student", f"--out={tmp_path}/out.json", f"--cache={tmp_path}/cache", "--vmem_kib=65536"]
  done = compile_py("v5e:1x1", *given)
  assert done.returncode == 0, done.stderr
  answer = json.loads((tmp_path / "out.json").read_text())
  (report,) = answer["programs"]
  assert answer["libtpu_flags"] == "--xla_tpu_scoped_vmem_limit_kib=65536"
  assert f"LIBTPU_INIT_ARGS={answer['libtpu_flags']}" in done.stdout
  (kept,) = (tmp_path / "cache").iterdir()
  size = json.loads(gzip.decompress(kept.read_bytes()))["memory"]
  total = size["argument"] + size["output"] - size["alias"] + size["temp"] + size["generated_code"]
  assert report["needed"] == pytest.approx(total, rel=0.02)


@needs_libtpu
@pytest.mark.parametrize(("run", "name"), TRAINING)
def test_the_state_is_donated(looked, run, name):
  report, text, *_ = looked(run, name)
  # Every array of the state and of the carry is written where it was read.
  assert report["memory"]["output"] < 0.1 * report["memory"]["state"]
  assert text.count("may-alias") + text.count("must-alias") > 15


@needs_libtpu
# Fewer images than these would be kept in another layout, and a copy of them costs nothing.
@pytest.mark.parametrize("run", ["text", "pod", pytest.param("cifar", marks=pytest.mark.compiler)])
def test_the_data_are_read_as_they_lie_there(looked, run):
  """A copy of all images into another layout was a third of a step's cycles."""
  _, text, *_ = looked(run, "student")
  found = list(compiled.instructions(text))
  (given,) = (each for each in found if each.kind == "parameter" and re.match(DATA[run], each.shape))
  # They may be brought nearer to the processor ahead of their use, in the layout that they have.
  handed_on = ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "copy-start", "copy-done")
  same = [each for each in found if each.shape[:2] == given.shape[:2] and each.bytes >= given.bytes]
  assert [each.line[:100] for each in same if each.kind not in handed_on] == []


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
  done = compile_py("v5e:3x5", *IMAGES)
  assert done.returncode == 2
  assert re.fullmatch(r"error: topology='v5e:3x5': .*not divisible.*\n", done.stderr)


@needs_libtpu
def test_what_does_not_fit_is_a_sentence(tmp_path):
  changes = ["--config.model.units=40000", "--config.train.batch_size=8"]
  done = compile_py("v5e:2x2", *TEXT, "--programs=teacher", f"--out={tmp_path}/out.json", *changes)
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


def test_with_what_is_fixed_the_second_batch_is_nearly_the_largest():
  """A Wide-ResNet-28-10's bytes on a v5e, in MiB: a compilation is a quarter of an hour."""
  tried = []

  def needed(batch):
    tried.append(batch)
    return 676 + 6.35 * batch <= 16_128, int(676 + 6.35 * batch)

  assert compiled.largest_batch(needed, 128, 45_000, 16_128, fixed=676) == 2_432
  assert tried == [128, 2_432, 2_480]  # the third shows that 2 % more is too much


def test_from_a_batch_that_nearly_fills_a_chip_one_more_compilation_ends_the_search():
  """A Wide-ResNet-28-10 on a v5e, whose compiler computes more and more again: what fits takes twenty minutes."""
  sizes = {5_912: 16_100, 6_024: 16_300}
  tried = []

  def needed(batch):
    tried.append(batch)
    return sizes[batch] <= 16_128, sizes[batch]

  assert compiled.largest_batch(needed, 5_912, 12_500, 16_128, fixed=643) == 5_912
  assert tried == [5_912, 6_024]


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


SENTENCES = """
import types
from experiments import compile
where = types.SimpleNamespace(kind="v5e", devices=(0, 1, 2, 3))
report = types.SimpleNamespace(needed=14 * 2**20, available=16 * 2**20)
for found in ((768, 776, report), (96, None, report), (0, 8, None)):
  print(compile.sentence(compile.Largest("student", *found), where))
"""


def test_the_largest_batch_is_said_with_what_is_too_much():
  done = forks.run([sys.executable, "-c", SENTENCES], timeout=300)
  fitting = "Largest batch: {} in all, for the student's step; it takes 14 of 16 MiB, and {}."
  assert done.stdout.splitlines() == [
    fitting.format("768 examples a chip, 3,072", "776 do not fit"),
    fitting.format("96 examples a chip, 384", "the training examples end within 2% of it"),
    "Largest batch: the student's step fits on no chip of v5e, however small the batch.",
  ], done.stderr


def answer(folder, topology, *given):
  """Returns what compile.py writes of large programs, which take it up to three hours."""
  done = compile_py(topology, *given, f"--out={folder}/out.json", timeout=3 * 3600)
  assert done.returncode == 0, done.stderr
  return json.loads((folder / "out.json").read_text())


@needs_libtpu
@pytest.mark.compiler
@pytest.mark.parametrize(
  ("words", "changes", "most"),
  [("cifar10,wrn_16_1,paper", ["model.width=4"], 6.9e6), ("cifar100,wrn_28_10,paper", [], 59e6)],
)
def test_a_wide_resnet_takes_fewer_cycles_where_fusions_may_use_more_of_the_chip_s_memory(
  words, changes, most, tmp_path
):
  options = [*changes, "model.dropout=0.3", "compute_dtype=bfloat16", "train.steps_per_dispatch=1"]
  config = [f"configs/cifar.py:{words}", *(f"--config.{option}" for option in options)]
  (report,) = answer(tmp_path, "v5e:1x1", *config, "--programs=student", "--vmem_kib=65536")["programs"]
  assert report["cycles"] < most


@needs_libtpu
@pytest.mark.compiler
@pytest.mark.parametrize(
  ("network", "topology", "batch"),  # a batch that was found on all four chips, so that few compilations are needed
  [
    ("wrn_28_10", "v5e:2x2", 24_544),
    ("wrn_28_10", "v4-8", 43_424),
    ("wrn_28_10", "v5p-8", 49_984),
    ("densenet_90_60", "v5e:2x2", 3_072),
    ("densenet_90_60", "v4-8", 6_656),
    ("densenet_90_60", "v5p-8", 21_696),
  ],
)
def test_the_largest_batch_of_a_large_network_is_just_below_one_that_does_not_fit(network, topology, batch, tmp_path):
  config = [f"configs/cifar.py:cifar100,{network},paper", "--config.compute_dtype=bfloat16", "--programs=student"]
  given = [*config, f"--config.train.batch_size={batch}", "--largest_batch"]
  found = answer(tmp_path, topology, *given)["largest_batch"]
  report = found["report"]
  assert report["fits"]
  assert report["batch"] == found["batch"]
  assert report["needed"] <= report["available"]
  most = found["refused"] or 50_000 // 4 + 1
  assert found["batch"] < most <= found["batch"] + max(8, found["batch"] // 50)


@needs_cuda
@pytest.mark.compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "config", ["cifar.py:cifar10,wrn_16_1", "cifar.py:cifar10,densenet_40_12", "ptb.py:ptb,lstm_200"]
)
def test_the_steps_compile_for_a_gpu(config, dtype, tmp_path):
  given = [f"configs/{config},paper", f"--config.compute_dtype={dtype}", "--programs=teacher,student,evaluation"]
  for report in answer(tmp_path, "h100", *given)["programs"]:
    assert report["fits"]
    assert report["cycles"] == 0  # nothing is estimated there


@needs_cuda
@pytest.mark.compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_activation_is_transposed_between_layers_on_a_gpu(dtype, tmp_path):
  given = ["configs/cifar.py:cifar10,wrn_16_1,paper", f"--config.compute_dtype={dtype}", "--programs=student"]
  answer(tmp_path, "h100", *given, f"--dump={tmp_path}", "--cache=")
  text = (tmp_path / "student.txt").read_text()
  shapes = re.findall(r"= \w+\[([\d,]+)\]\S* transpose\(", text)
  # Kernels, and their gradients, between our order of axes and cuDNN's.
  assert len(shapes) > 50
  assert not [shape for shape in shapes if "128" in shape.split(",")]  # images


@needs_cuda
@pytest.mark.compiler
def test_an_lstm_of_cudnn_cannot_be_compiled_without_a_gpu():
  done = compile_py("h100", "configs/ptb.py:ptb,lstm_200,paper", "--config.model.cudnn")
  assert done.returncode == 2
  assert done.stderr.endswith("cuDNN's LSTM compiles only where there is a GPU; choose model.cudnn=False\n")

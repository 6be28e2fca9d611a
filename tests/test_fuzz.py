"""Fuzzed configurations and command lines: each one runs, or ends with an error that names the mistake."""

import json
import math
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from ban_jax import config as config_lib
from ban_jax import job as job_lib
from ban_jax import presets, train, trees
from ban_jax.errors import BanError, ConfigError
from ban_jax.losses import LOSSES
from ban_jax.step import make_eval_step
from experiments import results

# All kinds of data and networks, and teachers of another kind than their student.
IMAGES, MATCHED = "digits,wrn_10_1,smoke", "digits,small_pre_resnet_2_1,smoke,teacher=densenet_16_8"
DENSE, TEXT, CHARACTERS = "digits,densenet_16_8,smoke", "pydoc,lstm_32,smoke", "pydoc,cnn_lstm_32,smoke,teacher=lstm_32"
STARTS = (IMAGES, DENSE, MATCHED, "digits,small_wide_match_1_1,smoke,teacher=densenet_16_8", TEXT, CHARACTERS)

FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 3, 1e-6, 1e6, math.nan, math.inf, -math.inf)
# Values for a key, by the type of its default; ml_collections accepts None for every key, and a bool for an int.
VALUES = {
  bool: (True, False, None),
  int: (0, 1, 2, 7, 1000, -1, -1000, True, False, None),
  float: (*FLOATS, 0.999, True, None),
  str: (
    *("", " ", "nonsense", "../..", "%s{}", "\0", "\ud800", "é☃", "x" * 5000, None),
    *("label", "ban_label", "dkpp", "lstm", "densenet", "digits", "pydoc", "ptb", "bfloat16", "plateau", "cosine"),
  ),
  tuple: ((), (0.5,), (0.1, 0.1), (0.9, 0.1), (math.nan,), ("x",), (None,), ((0.5,),), None)
  + tuple((value,) * 3 for value in (0, -1, 1, 16, True, 0.5)),
  type(None): (None, 3, "wrn_10_1", {}, {"name": None}, {"name": 3}, {"name": "lstm"}, {"name": "wide_resnet"}),
}
# Networks are built layer by layer: a thousand layers are legal but slow.
LOOPS = {
  "wide_resnet": ("depth",),
  "densenet": ("units",),
  "matched_pre_resnet": ("units",),
  "matched_wide_resnet": ("units",),
  "lstm": ("layers",),
  "char_cnn_lstm": ("layers", "highway_layers", "max_width"),
}
LONG = (1000,)
# Other names of a key in messages.
ALSO = {"data.train_examples": ("training examples", "trained on", "training tokens"), "data.window": ("windows of",)}


def leaves(group, prefix=""):
  """Returns the dotted keys of a configuration with their values, without groups."""
  found = {}
  for name, value in group.items():
    inside = leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name: value}
    found |= inside
  return found


def candidates(values, key):
  """Returns the values that a key of this configuration may be changed to."""
  group, _, name = key.rpartition(".")
  long = group.endswith("model") and name in LOOPS[values[f"{group}.name"]]
  return tuple(value for value in VALUES[type(values[key])] if not (long and value in LONG))


@st.composite
def changed_configurations(draw):
  """Draws the words of a configuration, and up to three changes of its keys."""
  words = draw(st.sampled_from(STARTS))
  values = leaves(presets.compose(words))
  keys = draw(st.lists(st.sampled_from(sorted(values)), min_size=1, max_size=3, unique=True))
  return words, {key: draw(st.sampled_from(candidates(values, key))) for key in keys}


def apply(words, changes):
  """Returns a configuration with the changes that ml_collections accepts, and these changes."""
  config, done = presets.compose(words), {}
  for key, value in changes.items():
    try:
      config.update_from_flattened_dict({key: value})
    except (TypeError, OverflowError):  # of another type: ml_collections' own error
      continue
    done[key] = value
  return config, done


def rehearse(config):
  """Does everything in a teacher's and a student's training except computing: checks, shapes, traced steps."""
  devices = tuple(jax.devices())
  setup = job_lib.resolve_run(config, devices)
  job = job_lib.prepare(setup, None, 0)
  trace(job)
  shapes = jax.eval_shape(job.student.init, jax.random.key(0))
  teacher = trees.to_host(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), 0)
  trace(job_lib.prepare(setup, teacher, 1))
  values = config_lib.record(config)
  assert values == json.loads(json.dumps(values))  # or a run could not be found again
  results.describe(config).encode()


def trace(job):
  """Traces a generation's training step and evaluation steps, with the arguments that `train` gives them."""
  config, devices = job.cfg, job.devices
  assert job.lineage["identity"]
  job.optimizer.rate(job.total_steps - 1, [])

  def carries(rows, models):
    return jax.eval_shape(lambda: tuple(model.init_carry(rows) for model in models))

  def on_each(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(devices), *leaf.shape), leaf.dtype), tree)

  state = jax.eval_shape(
    lambda key: job.updates.init(job.student.init(key), job.teacher.copied),
    jax.random.key(0),
  )
  rows = config.train.batch_size // len(devices)
  feed = {"index": jax.ShapeDtypeStruct((job.steps_per_dispatch, rows), np.int32)}
  key = jax.ShapeDtypeStruct((2,), np.uint32)
  carry = (*carries(rows, (job.student,)), jax.eval_shape(lambda: job.teacher.teaching.init_carry(rows)))
  source, arrays = job.teacher.source, job.dataset.splits["train"]
  jax.eval_shape(train.step_of(job).run, state, source, on_each(carry), arrays, on_each(feed), key)

  variables = {"params": state.params, "batch_stats": state.batch_stats}
  step = make_eval_step((job.student,), job.dataset.fetch, devices).run
  for split, arrays in job.dataset.splits.items():
    for rows in {config.evaluate.batch_size, config.evaluate.training_batch_size or config.evaluate.batch_size}:
      rows = -(-rows // len(devices))
      assert len(job.dataset.eval_order(split, rows * len(devices)))
      block = job_lib.block_size(job.dataset, split, rows * len(devices), devices)
      feed = {"index": jax.ShapeDtypeStruct((block, rows), np.int32)}
      jax.eval_shape(step, (variables,), on_each(carries(rows, (job.student,))), arrays, on_each(feed))


def names_one_of(changes, message):
  """Returns whether a message names one of the changed keys or, for a name that is looked up, its value."""
  for key, value in changes.items():
    names = [key.rpartition(".")[2], *ALSO.get(key, ())]
    if key.startswith("teacher.model."):
      names.append("teacher.model")
    if isinstance(value, str):
      names += [repr(value), value] if value.strip() else [repr(value)]
    if any(name in message for name in names):
      return True
  return False


@settings(max_examples=60, deadline=None, derandomize=True)
@given(changed_configurations())
def test_a_changed_configuration_runs_or_its_error_names_a_changed_key(drawn):
  config, changes = apply(*drawn)
  message = None
  try:
    rehearse(config)
  except BanError as error:
    message = str(error)
  assert message is None or names_one_of(changes, message)


# Found by the test above: another library's error, running out of memory, or no error at all.
MENDED = [
  (IMAGES, {"seed": True}, "seed=True: expected a whole number from 0"),
  (IMAGES, {"train.checkpoint_every": None}, "train.checkpoint_every is None: expected a whole number of at least 1"),
  (IMAGES, {"optim.boundaries": None}, "optim.boundaries is None"),
  (IMAGES, {"optim.factor": math.inf}, "optim.factor=inf: expected a finite number above 0"),
  (IMAGES, {"loss.temperature": 0.0}, "loss.temperature=0.0: expected a finite number above 0"),
  (IMAGES, {"loss.temperature": math.inf}, "loss.temperature=inf: expected a finite number above 0"),
  *(
    (IMAGES, {"loss.temperature": value}, "loss.temperature=.*: expected .* from 0.001 to 1000")
    for value in (1e-310, 1e-30, 9e-4, 1e4, 1e300)
  ),
  (IMAGES, {"optim.learning_rate": 1e-310}, "optim.learning_rate=1e-310: expected a finite number above 0"),
  (IMAGES, {"optim.learning_rate": 1e300}, r"optim.learning_rate=1e\+300: expected a finite number above 0"),
  (IMAGES, {"optim.clip_norm": 1e39}, r"optim.clip_norm=1e\+39: expected a finite number of at least 0"),
  (IMAGES, {"loss.label_weight": math.inf}, "loss.label_weight=inf: expected a finite number"),
  (IMAGES, {"loss.smoothing": 1.5}, "loss.smoothing=1.5: expected a share from 0 to 1"),
  (IMAGES, {"loss.smoothing": math.nan}, "loss.smoothing=nan: expected a share from 0 to 1"),
  (TEXT, {"loss.label_weight": 0.0, "loss.teacher_weight": 0.0}, "label_weight and loss.teacher_weight cannot both be"),
  (IMAGES, {"train.batch_size": 0}, "train.batch_size=0: expected a whole number of at least 1"),
  (IMAGES, {"teacher.model": 3}, "teacher.model must be a group with a name, one of: .*wide_resnet; it is '3'"),
  (IMAGES, {"teacher.model": {}}, "teacher.model must be a group with a name"),
  (IMAGES, {"teacher.model": {"name": "vgg"}}, "unknown teacher.model 'vgg'"),
  (IMAGES, {"scale": "\ud800"}, r"scale='\\ud800': expected a printable word"),
  (IMAGES, {"seed": 2**32}, "seed=4294967296: expected a whole number from 0 to 4294967295"),
  (TEXT, {"evaluate.training_batch_size": 10**9}, "evaluate.training_batch_size=1000000000: expected at most"),
  (MATCHED, {"teacher.model.units": 1}, "do not fit: .*teacher.model"),
  (MATCHED, {"model.ratio": math.nan}, "model.ratio=nan: a ratio is expected"),
  (MATCHED, {"model.ratio": math.inf}, "model.ratio=inf: a ratio is expected"),
]


@pytest.mark.parametrize(("words", "changes", "message"), MENDED, ids=lambda part: str(part)[:40])
def test_what_was_not_clear_is_answered(words, changes, message):
  config, done = apply(words, changes)
  assert done.keys() == changes.keys()
  with pytest.raises(ConfigError, match=message):
    rehearse(config)


@pytest.mark.parametrize("words", STARTS)
def test_an_unchanged_configuration_runs(words):
  rehearse(presets.compose(words))


WORDS = (*presets.DATASETS, *presets.SCALES, *LOSSES, "wrn_10_1", "lstm_32", "densenet_16_8", "teacher=wrn_10_1")
ODD = ("", " ", "teacher=", "teacher=x", "label=3", "=", ":", "é☃", "\udcff", "%s{}", '"', "x" * 5000)
word_lists = st.lists(st.sampled_from(WORDS) | st.sampled_from(ODD) | st.text(max_size=5), max_size=6).map(",".join)
good_words = st.sampled_from(("digits,wrn_10_1,smoke", "digits,densenet_16_8,smoke,cwtm,teacher=wrn_10_1"))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(word_lists | st.builds("{},{}".format, good_words, word_lists))
def test_words_compose_a_locked_configuration_or_are_refused(words):
  try:
    answer = presets.compose(words)
  except ConfigError as error:
    answer = str(error)
  assert answer.is_locked if isinstance(answer, ConfigDict) else answer.startswith("unknown ")


# Runs in a separate process. Reads command lines of experiments/train.py as lines of JSON, and replies with the exit
# status and output of each. In place of training, it prints the arguments of the training.
DRIVER = """
import json, os, sys, tempfile, traceback
from experiments import cli, train

def main():
  cli._check_processes()
  print("main:", train.CONFIG.value.to_json(), train.WORKDIR.value.encode("utf-8", "replace"))

for line in sys.stdin:
  with tempfile.TemporaryFile() as file:
    child = os.fork()
    if not child:
      os.dup2(file.fileno(), 1)
      os.dup2(file.fileno(), 2)
      sys.argv[:] = ["experiments/train.py", *json.loads(line)]
      status = 99
      try:
        cli.run(main)
      except SystemExit as end:
        status = end.code or 0
      except BaseException:
        traceback.print_exc()
      sys.stdout.flush()
      os._exit(status)
    _, status = os.waitpid(child, 0)
    file.seek(0)
    answer = file.read().decode(errors="replace")
  print(json.dumps([os.waitstatus_to_exitcode(status), answer]), flush=True)
"""


@pytest.fixture(scope="module")
def answer():
  """Returns the function from a command line's arguments to (exit status, output)."""
  command = [sys.executable, "-B", "-c", DRIVER]
  with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as driver:

    def ask(arguments):
      driver.stdin.write(json.dumps(arguments) + "\n")
      driver.stdin.flush()
      return json.loads(driver.stdout.readline())

    yield ask
    driver.stdin.close()


FILES = ("README.md", "LICENSE", "pyproject.toml", "configs", "configs/presets.py", "nope.py", "", "x" * 5000, "é.py")
VALID = leaves(presets.compose("digits,densenet_16_8,smoke,teacher=wrn_10_1"))
KEYS = (*VALID, "", ".", "nope", "model", "teacher", "loss", "model.nope", "seed.x", "model.name.x", "data..name", "é")
ARGUMENTS = (
  *("", "abc", "0", "-1", "1.5", "nan", "inf", "True", "None", "(1,2)", "()", "(", "1,2", "a b", "[1]", "{'a': 1}"),
  *("1e400", "0x10", " 3 ", "1_000", "'", "--x", "é☃", "\udcff", "9" * 5000, "x" * 5000, "(" * 300),
)
FLAGS = (
  *("devices", "distributed", "coordinator_address", "num_processes", "process_id", "start_timeout", "peer_timeout"),
  *("progress", "workdir", "config", "flagfile", "verbosity", "stderrthreshold", "undefok", "bogus", "é"),
)
LOOSE = ("--", "-", "---", "--=", "--=3", "-x", "word", "--config.", "--config.=", "--no")


def options(names, values):
  """Draws an option as one argument or two, or without its value."""
  begun = st.builds("{}{}".format, st.sampled_from(("--", "--", "--", "-", "--no")), names)
  value = values.map(lambda value: f"={value}")
  return st.tuples(st.builds("{}{}".format, begun, value)) | st.tuples(begun, values) | st.tuples(begun)


files = st.sampled_from(("configs/digits.py", "configs/digits.py", "configs/base.py", *FILES))
configurations = (
  st.builds("configs/digits.py:{}".format, good_words) | files | st.builds("{}:{}".format, files, word_lists)
).filter(lambda text: "\0" not in text)
overrides = options(st.sampled_from(KEYS).map("config.{}".format), st.sampled_from(ARGUMENTS))
others = options(st.sampled_from(FLAGS), st.sampled_from(ARGUMENTS)) | st.tuples(st.sampled_from(LOOSE + ARGUMENTS))


@st.composite
def command_lines(draw):
  """Draws the arguments of a command line, most of them with a configuration and a workdir first."""
  arguments = [f"--config={draw(configurations)}"] if draw(st.integers(0, 9)) else draw(others)
  arguments = [*arguments, "--workdir=w"] if draw(st.integers(0, 9)) else arguments
  more = draw(st.lists(overrides | overrides | others, max_size=3))
  return [*arguments, *(argument for group in more for argument in group)]


DIGITS = "--config=configs/digits.py:digits,wrn_10_1,smoke"


def names_an_argument(arguments, message):
  """Returns whether an error names what was given (for a key, its last word), or a missing flag.

  That the message has the word "config" in it says nothing.
  """
  names = {"--config", "--workdir"}
  for argument in arguments:
    option = argument.partition("=")[0]
    bare = option.lstrip("-")
    words = argument.partition(":")[2].split(",")  # after a configuration file
    names |= {argument, option, bare.rpartition(".")[2], bare.removeprefix("no")} if bare else set()
    names |= {repr(part) for word in words for part in (word.strip(), *word.split("=", 1))}
    printed = shlex.quote(argument).encode("utf-8", "backslashreplace").decode()
    names |= {f"unexpected arguments: {printed}", f"line flag {option[2:]!r}"}
  return any(name in message for name in names - {"", "config"})


@settings(max_examples=250, deadline=None, derandomize=True)
@given(arguments=command_lines())
@example(arguments=["--config=README.md", "--workdir=w"])  # no Python
@example(arguments=["--config=configs/base.py:x", "--workdir=w"])  # takes no words
@example(arguments=["--config=configs/presets.py", "--workdir=w"])  # no get_config
@example(arguments=["-config", "configs/digits.py", "--workdir=w", "--config.model.nope=3"])
def test_a_command_line_goes_on_or_is_refused_in_words(answer, arguments):
  status, text = answer(arguments)
  assert "Traceback" not in text
  assert status in (0, 2), text
  assert text.startswith("main: " if status == 0 else "error: ")
  assert status == 0 or names_an_argument(arguments, text), text


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "error: flag --config=None: "),
    ([DIGITS], "error: flag --workdir=None: "),
    ([DIGITS, "--workdir=w", "--devices=abc"], "error: flag --devices=abc: "),
    ([DIGITS, "--workdir=w", "", "a b"], "error: unexpected arguments: '' 'a b'; options begin with --"),
    (["--config=configs", "--config.seed=1", "--workdir=w"], "error: --config=configs cannot be read"),
    ([DIGITS, "--workdir=w", "--bogus"], "error: Unknown command line flag 'bogus'"),
    (
      [DIGITS, "--workdir=w", "--config.model.nope=3"],
      "error: unknown configuration key 'model.nope'; under model are",
    ),
    (
      [DIGITS, "--workdir=w", "--noconfig.model.compression=x"],
      "error: unknown configuration key 'model.compression'; under model are",
    ),
    ([DIGITS, "--workdir=w", "--config..=3"], "error: --config..: a configuration's key is expected, words with dots"),
    (["--workdir=w", "--config.", "3", "--config"], "error: --config.: a configuration's key is expected, words with"),
    ([DIGITS, "--workdir=w", "-config.nope", "3"], "error: unknown configuration key 'nope'; there are: "),
    ([DIGITS, "--workdir=w", "--config.train.epochs=1.5"], "error: flag --config.train.epochs=1.5: "),
    ([DIGITS, "--workdir=w", "--config.seed"], "error: Missing value for flag --config.seed"),
    (["--config=README.md", "--workdir=w"], "error: --config=README.md cannot be loaded: SyntaxError: "),
    (
      ["--config=configs/base.py:x"],
      "error: --config=configs/base.py:x cannot be loaded: TypeError: get_config() takes",
    ),
    (["--config=configs", "--workdir=w"], "error: --config=configs cannot be read"),
    (["-config", "configs/digits.py", "--config.nope=1"], "error: unknown configuration key 'nope'; there are: "),
    ([DIGITS, "--workdir=w", "--config.seed=7"], 'main: {"seed": 7, '),
  ],
)
def test_command_lines_are_answered(answer, arguments, message):
  assert answer(arguments)[1].startswith(message)

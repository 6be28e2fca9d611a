"""The guides: their Python runs and prints what they show, their commands parse, their links and messages exist."""

import contextlib
import doctest
import io
import math
import re
import shlex
import sys

import forks
import jax
import pytest
import test_own
import test_own_text
import test_streams
from conftest import ROOT
from test_own import arrays, cnn, dataset, run  # noqa: F401  fixtures

import ban_jax

GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^```([a-z]+)([a-z ]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+")


def names():
  return sorted(path.name for path in GUIDES.glob("*.md"))


def blocks(name):
  """Returns the guide's blocks: language, what follows it, and the text."""
  return [(kind, note.strip(), text) for kind, note, text in BLOCK.findall((GUIDES / name).read_text())]


def is_about(shown, printed):
  """Returns whether two outputs differ in their decimal numbers alone, and these by less than half."""
  pairs = zip(*([float(number) for number in NUMBER.findall(text)] for text in (shown, printed)), strict=True)
  same = NUMBER.sub("", shown).split() == NUMBER.sub("", printed).split()
  return same and all(math.isclose(one, other, rel_tol=0.5) for one, other in pairs)


def test_every_guide_is_in_the_index():
  assert set(re.findall(r"^\| \[(\w+\.md)\]", (GUIDES / "README.md").read_text(), re.MULTILINE)) | {"README.md"} == set(
    names()
  )


@pytest.mark.parametrize("name", names())
def test_links_lead_somewhere(name):
  for link in re.findall(r"\]\(([^)#]+)", (GUIDES / name).read_text()):
    assert (GUIDES / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if "```python" in (GUIDES / name).read_text()])
def test_its_python_prints_what_it_shows(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  if name == "pytorch_teacher.md":
    pytest.importorskip("torch", reason="PyTorch is not installed")
  # As a module, so that the classes of networks find their names.
  namespace, printed, compared = {"__name__": f"guide_{name.removesuffix('.md')}"}, "", 0
  for kind, note, text in blocks(name):
    if kind == "python":
      with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(text, f"{name}: {text.splitlines()[0]}", "exec"), namespace)
      printed = out.getvalue()
    elif kind == "text":
      compared += 1
      checker = doctest.OutputChecker()
      if note == "about":
        assert is_about(text, printed), printed
      else:
        assert checker.check_output(text, printed, doctest.ELLIPSIS), printed
  assert compared


COMMANDS = [
  (name, command)
  for name in names()
  for kind, _, text in blocks(name)
  if kind == "bash"
  for command in text.replace("\\\n", " ").splitlines()
]

PARSED = set()  # scripts that were seen to notice a wrong key


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_its_commands_have_flags_and_keys_that_exist(name, command):
  program, *arguments = shlex.split(command)
  assert program == ".venv/bin/python"
  checked = [sys.executable, *arguments, "--only_check_args"]
  done = forks.run(checked, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  if (script := [argument for argument in arguments if not argument.startswith("-")][-1]) not in PARSED:
    wrong = forks.run([*checked, "--config.train.epoch=1"], cwd=ROOT)
    assert wrong.returncode == 2, "the flags were not parsed"
    PARSED.add(script)


def cases(test):
  """Returns the parametrised cases of a test of tests/test_own.py."""
  (mark,) = [mark for mark in test.pytestmark if mark.name == "parametrize"]
  return mark.args[1]


def sentence(call, *arguments, **options):
  """Returns the message of the error that a call raises."""
  with pytest.raises(ban_jax.BanError) as error:
    call(*arguments, **options)
  return str(error.value)


@pytest.fixture(scope="module")
def sentences(run, dataset):  # noqa: F811
  """Returns the message of every wrong input that tests/test_own.py knows."""
  images = {"train": (test_own.PIXELS, test_own.LABELS), "test": (test_own.PIXELS, test_own.LABELS)}
  asked = {"generations": run[1], "inputs": test_own.np.zeros((1, 8, 8))}
  found = [
    sentence(ban_jax.from_arrays, **{**images, **changes})
    for changes, _ in cases(test_own.test_arrays_that_do_not_fit_are_refused_in_one_sentence)
  ]
  found += [
    sentence(ban_jax.from_text, given, **{"window": 1, **changes})
    for given, changes, _ in cases(test_own_text.test_what_is_no_text_is_named)
  ]
  found += [
    sentence(test_streams.streamed, **given) for given, _, _ in cases(test_streams.test_wrong_sources_are_refused)
  ]
  found += [
    sentence(test_streams.streamed, train_source=test_streams.replaced(77, record))
    for record, _ in cases(test_streams.test_what_cannot_be_read_is_named_by_its_record)
  ]
  found += [
    sentence(ban_jax.from_flax, module, dataset)
    for module, _ in cases(test_own.test_modules_that_do_not_fit_are_refused)
  ]
  found += [
    sentence(ban_jax.from_function, apply, variables, dataset, name=name)
    for apply, variables, name, _ in cases(test_own.test_functions_that_do_not_fit_are_refused)
  ]
  found += [
    sentence(ban_jax.predict, run[1], inputs)
    for inputs, _ in cases(test_own.test_inputs_that_the_network_cannot_read_are_refused)
  ]
  found += [
    sentence(ban_jax.predict, **{**asked, **arguments})
    for arguments, _ in cases(test_own.test_wrong_arguments_of_predict_are_refused)
  ]
  found += [
    sentence(ban_jax.export, run[1], **{"path": "x", **arguments})
    for arguments, _ in cases(test_own.test_wrong_arguments_of_export_are_refused)
  ]
  found += [
    sentence(call, test_own.config()) for call, _ in cases(test_own.test_arguments_of_a_wrong_type_get_one_sentence)
  ]
  with jax.disable_jit():
    found.append(sentence(ban_jax.predict, run[1], test_own.np.zeros((1, 8, 8))))
  # Those of directories.
  workdir, model = run[0], ban_jax.from_flax(test_own.Linear(), dataset)
  of_bytes = [
    (part["images"].astype("uint8"), part["labels"]) for part in (dataset.splits["train"], dataset.splits["test"])
  ]
  of_bytes = ban_jax.from_arrays(*of_bytes, name="bytes")
  one = {"dataset": dataset, "progress": False, "devices": jax.devices()[:1]}
  found += [
    sentence(ban_jax.load, workdir),
    sentence(ban_jax.load_run, workdir / "gen_0"),
    sentence(ban_jax.load, workdir / "gen_0", model=model),
    sentence(ban_jax.predict, ban_jax.load(workdir / "gen_0"), test_own.np.zeros((1, 8, 8))),
    sentence(ban_jax.predict, run[1][0].params, test_own.np.zeros((1, 8, 8))),
    sentence(ban_jax.run, test_own.own(train__epochs=9), workdir, model=model, **one),
    sentence(ban_jax.train_generation, None, test_own.own(), initial={"params": {}}, model=model, **one),
    sentence(ban_jax.train_generation, None, test_own.own(train__batch_size=1000), model=model, **one),
    sentence(ban_jax.evaluate, run[1], test_own.own(), "tests", dataset=dataset, model=model),
    sentence(ban_jax.evaluate, run[1][0], test_own.own(data__label_noise=0.4), dataset=dataset, model=model),
    sentence(
      ban_jax.evaluate, run[1][0], test_own.own(compute_dtype="bfloat16"), dataset=dataset, model=run[1][0].network.own
    ),
    sentence(ban_jax.evaluate, run[1][0], test_own.own(), dataset=of_bytes, model=model),
  ]
  return [message.replace(str(workdir), "RUN") for message in found]


def test_every_sentence_of_the_table_is_raised(sentences):
  text = (GUIDES / "wrong_inputs.md").read_text()
  rows = [row.split(" | ", 1) for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE)]
  shown = [re.sub(r"^`+ ?| ?`+$", "", message) for _, message in rows if message != "message" and "---" not in message]
  assert len(shown) > 40
  for message in shown:
    # "..." is where a message names what differs from machine to machine.
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert any(re.fullmatch(pattern, raised) for raised in sentences), message

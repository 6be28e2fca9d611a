"""experiments/bench.py: each section on networks of seconds, the table's form, and the equivalents in PyTorch."""

import importlib.util
import json
import re
import sys
import types

import forks
import jax
import numpy as np
import pytest
from conftest import ROOT

from ban_jax import data, trees
from ban_jax.errors import ConfigError
from ban_jax.programs import count_flops
from ban_jax.resolving import make_models
from experiments import bench
from experiments.analysis import cases, readers
from experiments.analysis.cases import KINDS, Row

WINDOW = {"data.window": 4, "model.dropout": 0.0}
TINY = {
  "tiny_wrn": Row("cifar10,wrn_10_1"),
  "tiny_densenet": Row("cifar10,densenet_10_16"),
  "tiny_lstm": Row("ptb,lstm_32", WINDOW),
  "tiny_cnn_lstm": Row("ptb,cnn_lstm_32", WINDOW),
}
PERCEPTRON = {"tiny_mlp": Row("cifar10,mlp_16")}  # if the network does not matter; it has no equivalent in PyTorch
OPTIONS = bench.Options(rows=("tiny_lstm",), turns=2, steps=1, epoch_steps=3, batch=2, torch=False)

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.fixture(autouse=True)
def _tiny_rows(monkeypatch):
  for name, row in (TINY | PERCEPTRON).items():
    monkeypatch.setitem(cases.ROWS, name, row)


@pytest.fixture(scope="module")
def place():
  return bench.Place("cpu", tuple(jax.devices()[:2]))


def bench_py(*arguments):
  command = [sys.executable, str(ROOT / "experiments" / "bench.py"), "--noprogress", *arguments]
  return forks.run(command)


def test_steps_of_every_kind_are_timed_and_their_operations_counted(place):
  found = list(bench.steps(OPTIONS, place))
  kinds = ("supervised", "distilled", "evaluation")
  assert [each.case for each in found] == [("tiny_lstm", kind, "float32") for kind in kinds]
  assert all(len(each.ours) == 2 and min(each.ours) > 0 and not each.other for each in found)
  supervised, distilled, evaluation = (each.flops for each in found)
  # A backward pass costs up to two forward passes, and a teacher one more.
  assert 2.5 * evaluation < supervised <= 3 * evaluation
  assert distilled == supervised + evaluation


def test_readers_of_jpegs_and_of_a_memory_map_are_timed(place, monkeypatch):
  monkeypatch.setattr(readers, "WORKERS", (0, 1))
  options = OPTIONS._replace(batch=8, feed_images=16, feed_gb=0.0)
  *files, mapped, resident = bench.feed(options, place)
  assert {each.case.kind for each in files} == {"0 processes", "1 processes"}
  assert all(min(each.ours) > 0 for each in (*files, mapped, resident))
  assert re.search(r"; 0\.\d\d GiB of own memory at most; a step of 50 ms waits \d", mapped.what)


def test_an_epoch_of_the_training_loop_takes_turns_with_steps_on_one_mini_batch(place):
  supervised, distilled = bench.epoch(OPTIONS, place)
  for found in (supervised, distilled):
    assert len(found.ours) == len(found.other) == 2
    assert min(*found.ours, *found.other) > 0
  assert supervised.ratios == [ours / other for ours, other in zip(supervised.ours, supervised.other, strict=True)]


@pytest.mark.slow
def test_a_recorded_teacher_is_replayed(place):
  options = OPTIONS._replace(rows=("tiny_mlp", "tiny_lstm"), kinds=("replayed",), epoch_steps=5)  # an image a class
  (found,) = bench.epoch(options, place)
  assert found.case == ("tiny_mlp", "replayed", "float32")  # text is left out
  assert min(found.ours) > 0


@pytest.mark.slow
def test_taught_steps_take_turns_with_supervised_ones(place):
  found = list(bench.replay(OPTIONS._replace(rows=("tiny_mlp", "tiny_lstm"), turns=1), place))
  assert [each.case.kind for each in found] == ["distilled", "distilled_3", "replayed", "replayed_3"]  # of images alone
  assert all(min(*each.ours, *each.other) > 0 for each in found)
  assert len({tuple(each.other) for each in found}) == 1
  setup = cases.setup_of(cases.configuration("tiny_mlp"), place.devices)
  names = ("supervised", "distilled", "distilled_3", "replayed", "replayed_3", "evaluation")
  none, one, three, *replayed, forward = (
    count_flops(KINDS[name].program(cases.job_of(KINDS[name], setup))) for name in names
  )
  assert one - none == forward
  assert three - one == 2 * forward
  assert replayed == [none, none]


def test_a_step_is_set_beside_the_least_that_its_work_takes(place):
  (found,) = bench.floor(OPTIONS._replace(kinds=("supervised",)), place)
  assert found.against in ("operations", "bytes")
  assert found.what.startswith("ms a step; operations ")
  assert found.other[0] == found.other[1] > 0
  setup = cases.setup_of(cases.configuration("tiny_lstm", batch=2), place.devices)
  supervised = KINDS["supervised"]
  assert found.flops == 2 * count_flops(supervised.program(cases.job_of(supervised, setup)))


def test_what_a_step_has_in_use_is_set_beside_what_its_compiler_expects(place, monkeypatch):
  options = OPTIONS._replace(kinds=("supervised",))
  assert not list(bench.memory(options, place))  # CPUs do not count
  monkeypatch.setattr(bench, "_most_used", lambda device: 3 * 2**20)
  (found,) = bench.memory(options, place)
  assert (found.ours, found.against) == ([3.0], "compiler")
  parameters = sum(leaf.size for leaf in jax.tree.leaves(cases.job_of(
    KINDS["supervised"], cases.setup_of(cases.configuration("tiny_lstm", batch=2), place.devices)).student.shapes
  ))  # fmt: skip
  assert found.other[0] > 4 * parameters / 2**20


def test_a_compiler_s_cycles_are_shown_as_time_on_the_chips_that_have_a_known_clock():
  text = """ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} fusion(%a), kind=kLoop, calls=%c, backend_config={"estimated_cycles":"1503000"}
}"""
  found = {
    kind: bench._estimate(types.SimpleNamespace(as_text=lambda: text), types.SimpleNamespace(device_kind=kind))
    for kind in ("TPU v5 lite", "TPU v4", "NVIDIA H100 80GB HBM3", "cpu")
  }
  assert found["TPU v5 lite"] == {"compiler's cycles": pytest.approx(1.0, rel=1e-3)}  # 1.503 GHz
  assert found["TPU v4"] == {"compiler's cycles": pytest.approx(1.503 / 1.049, rel=1e-3)}
  assert found["cpu"] == {}
  without = types.SimpleNamespace(as_text=lambda: text.replace("estimated_cycles", "none"))
  assert bench._estimate(without, types.SimpleNamespace(device_kind="TPU v4")) == {}


def test_a_changed_key_is_measured_and_shown(place):
  options = OPTIONS._replace(changes={"model.units": 3, "data.augment": []})
  case = bench.Case("tiny_lstm", "supervised", "float32")
  assert bench.configuration(options, case).model.units == 3
  assert bench.job_of(options, place, case).student.name == "lstm_2x3"
  assert "Changed: model.units=3, data.augment=[]." in bench.heading(bench.describe(options, place, 0.0))


def test_synthetic_data_have_the_shapes_of_the_real_ones():
  cfg = cases.configuration("wrn_16_1", batch=4, batches=3)
  dataset = cases.synthetic(cfg.data)
  assert dataset.spec == data.describe(cfg.data).spec
  assert {name: array.shape for name, array in dataset.splits["train"].items()} == {
    "images": (12, 32, 32, 3), "labels": (12,), "mean": (3,), "std": (3,)
  }  # fmt: skip
  assert dataset.train_order(jax.random.key(0), 4).shape == (3, 4)
  assert cases.synthetic(cases.configuration("wrn_16_4", batch=4, batches=3).data) is dataset
  text = cases.synthetic(cases.configuration("lstm_200", batch=4, batches=3).data)
  assert len(text.splits["train"]["tokens"]) == 4 * 3 * 35 + 1
  assert text.spec.num_classes == 10_000


def test_the_table_shows_medians_ratios_and_rates():
  case = bench.Case("wrn_16_1", "supervised", "float32")
  compared = bench.Measurement(
    "steps", case, "ms a step", [150.0, 100.0, 120.0], "PyTorch", [100.0, 100.0, 100.0], 12e9
  )
  single = bench.Measurement("epoch", case, "ms a step", [12.0])
  title, rule, *rows = bench.table([compared, single], peak=1e12).splitlines()
  cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (title, *rows)]
  assert set(rule) == set("|-")
  assert dict(zip(*cells[:2], strict=True)) == {
    "section": "steps", "network": "wrn_16_1", "kind": "supervised", "type": "float32", "measured": "ms a step",
    "ours": "120", "other": "100", "other is": "PyTorch", "ours / other": "1.20", "range": "1.00 to 1.50",
    "GFLOP/s": "100", "share of peak": "10.0%",
  }  # fmt: skip
  assert cells[2][5:] == ["12", "", "", "", "", "", ""]
  written = json.loads(bench.record({"turns": 3}, [compared]))
  assert written["settings"] == {"turns": 3}
  assert written["measurements"][0] | {"ours": [150, 100, 120], "row": "wrn_16_1"} == written["measurements"][0]


def test_a_busy_machine_is_warned_of(place):
  busy, quiet = (bench.heading(bench.describe(OPTIONS, place, load)) for load in (1.6, 1.4))
  assert "warning: the load average is above 1.5" in busy
  assert "warning" not in quiet
  assert f"JAX {jax.__version__}, devices: 2 (cpu); no PyTorch" in quiet


def test_an_unknown_row_is_refused_with_the_choices():
  with pytest.raises(ConfigError, match="unknown row 'wrn'; choose one of: cnn_lstm, densenet_40_12, .*wrn_28_2"):
    cases.configuration("wrn")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--rows=wrn", "unknown row 'wrn'; choose one of: cnn_lstm, densenet_40_12, "),
    ("--kinds=training", "unknown kind 'training'; choose one of: distilled, distilled_3, evaluation, replayed, "),
    ("--changes=[1]", '--changes=[1]: expected an object of values by key, as {"train.epochs": 30}'),
    ("--changes={", "--changes: Expecting property name"),
    (
      '--changes={"model.unit": 3}',
      "--changes: unknown configuration key 'model.unit'; choose one of: compute_dtype, ",
    ),
    ('--changes={"model.width": "wide"}', '--changes: model.width="wide": expected a value like 1'),
    ("--sections=step", "unknown section 'step'; choose one of: epoch, feed, floor, memory, replay, steps"),
  ],
)
def test_an_unknown_choice_ends_with_a_line_and_no_table(flag, message):
  done = bench_py(flag)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: {message}")
  assert not done.stdout


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_the_numbers(tmp_path):
  out = tmp_path / "bench.json"
  choice = ("--rows=lstm_200", "--kinds=supervised", "--sections=steps", "--batch=2", "--turns=1", "--steps=1")
  done = bench_py(*choice, "--notorch", "--processor_time", f"--out={out}")
  assert done.returncode == 0, done.stderr
  heading, table = done.stdout.split("\n\n")
  assert "cores: 1," in heading
  assert "processor time" in heading
  assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["steps"]
  (steps,) = json.loads(out.read_text())["measurements"]
  assert steps["flops"] > 1e8


def carried_over(variables, network):
  """Returns a PyTorch network's state that holds our variables, by the layers' names."""
  import torch

  state = dict(network.state_dict())
  for path, leaf in trees.leaves(variables).items():
    _, *layers, name = path.split("/")
    prefix = ".".join(layers)
    if layers[:1] == ["lstm"]:
      number = int(layers[1].removeprefix("layer")) - 1
      key = {"input_kernel": "weight_ih", "recurrent_kernel": "weight_hh", "bias": "bias_ih"}[name]
      key, leaf = f"lstm.layers.{key}_l{number}", leaf.T
    elif name == "kernel" and leaf.ndim == 4:
      key, leaf = f"{prefix}.weight", leaf.transpose(3, 2, 0, 1)
    elif name == "kernel" and layers[-1].startswith("width"):
      weight = state[f"{prefix}.weight"]  # [filters, embedding, width]
      key, leaf = f"{prefix}.weight", leaf.reshape(weight.shape[::-1]).T
    else:
      names = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean",
               "var": "running_var"}  # fmt: skip
      key, leaf = ".".join([*layers, names.get(name, name)]), leaf.T if name == "kernel" else leaf
    assert state[key].shape == leaf.shape, key
    state[key] = torch.from_numpy(np.ascontiguousarray(leaf))
  return state


@needs_torch
@pytest.mark.parametrize("row", TINY)
def test_equivalents_in_pytorch_have_the_same_logits(row):
  import torch

  from experiments.analysis import torch_networks

  cfg = cases.configuration(row)
  spec, rng = data.describe(cfg.data).spec, np.random.default_rng(0)
  _, ours = make_models(cfg, spec)
  network = torch_networks.make(cfg.model, ours).eval()
  variables = cases.untrained(ours)
  variables["batch_stats"] = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape), variables["batch_stats"])
  network.load_state_dict(carried_over(variables, network))
  if spec.kind == "images":
    inputs, state = rng.standard_normal((3, *spec.shape)).astype(np.float32), ()
    theirs = torch.from_numpy(inputs.transpose(0, 3, 1, 2))
  else:
    inputs, state = rng.integers(0, spec.num_classes, (3, *spec.shape)), ours.init_carry(3)
    theirs = torch.from_numpy(inputs.T)
  logits, _, _ = ours.apply(variables, state, inputs, train=False)
  zeros = tuple(torch.zeros(cfg.model.layers, 3, cfg.model.units) for _ in range(2)) if state else ()
  with torch.no_grad():
    found, _ = network(theirs, zeros)
  found = found.numpy() if spec.kind == "images" else found.numpy().swapaxes(0, 1)
  assert np.abs(logits).max() > 0.01
  np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(logits).max())


@needs_torch
@pytest.mark.parametrize("row", cases.ROWS)
def test_equivalents_in_pytorch_have_the_same_number_of_parameters(row):
  from experiments.analysis import torch_networks

  cfg = cases.configuration(row)
  torch_networks.make(cfg.model, make_models(cfg, data.describe(cfg.data).spec)[1])  # it compares


@needs_torch
def test_another_number_of_parameters_is_refused():
  from experiments.analysis import torch_networks

  cfg, wider = cases.configuration("wrn_16_1"), cases.configuration("wrn_16_4")
  ours = make_models(cfg, data.describe(cfg.data).spec)[1]
  with pytest.raises(ConfigError, match="wide_resnet_16_1 has 175,066 parameters, and its equivalent in PyTorch 2,7"):
    torch_networks.make(wider.model, ours)


@pytest.mark.slow
@needs_torch
def test_steps_are_compared_with_pytorch(place):
  options = OPTIONS._replace(torch=True, torch_compile=False, rows=("tiny_wrn", "tiny_lstm"))
  found = list(bench.steps(options._replace(kinds=("distilled", "replayed")), place))
  assert [each.against for each in found] == ["PyTorch"] * 3  # nothing is replayed for text
  assert all(min(each.ratios) > 0 for each in found)

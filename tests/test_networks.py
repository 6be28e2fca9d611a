"""ResNet, ViT and GPT: parameter counts, values and a step against PyTorch, dropout and drop-path by position."""

import functools
import importlib.util
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_models import initial, randomised

import ban_jax
from ban_jax import data, losses, presets
from ban_jax import job as job_lib
from ban_jax.errors import ConfigError
from ban_jax.models import check_options, common, make_model
from ban_jax.types import InputSpec

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")

IMAGES, TOKENS = InputSpec("images", (8, 12, 3), 5), InputSpec("tokens", (6,), 7)
RESNET = {"name": "resnet", "blocks": (1, 1), "width": 4, "bottleneck": False, "projection": False, "zero_scale": False}
VIT, GPT = (
  {"name": name, "width": 16, "layers": 2, "heads": 2, "dropout": 0.0, "drop_path": 0.0, "cudnn": False, **options}
  for name, options in (("vit", {"patch": 4}), ("gpt", {"positions": "learned"}))
)
CASES = {
  "resnet": (RESNET, IMAGES),
  "resnet_large": (RESNET | {"bottleneck": True, "projection": True}, InputSpec("images", (66, 67, 3), 5)),
  "resnet_preactivated": (RESNET | {"blocks": (2, 1), "projection": True, "preactivation": True}, IMAGES),
  "vit": (VIT, IMAGES),
  "gpt": (GPT, TOKENS),
  "gpt_rotary": (GPT | {"positions": "rotary"}, TOKENS),
}


def build(case, compute_dtype="float32", **changes):
  group, spec = CASES[case]
  return make_model(group | changes, spec, sync_batch_stats=False, compute_dtype=compute_dtype)


def batch(spec, rows=4):
  rng = np.random.default_rng(1)
  if spec.kind == "tokens":
    window = spec.shape[0] - 1  # a text may be shorter than a window of training
    return tuple(rng.integers(0, spec.num_classes, (rows, window)).astype(np.int32) for _ in range(2))
  return rng.normal(size=(rows, *spec.shape)).astype(np.float32), rng.integers(0, spec.num_classes, rows)


def count(network, spec):
  return sum(leaf.size for leaf in jax.tree.leaves(make_model(presets.MODELS[network], spec).shapes["params"]))


def images(size, classes):
  return InputSpec("images", (size, size, 3), classes)


@pytest.mark.parametrize(
  ("network", "spec", "parameters"),
  [
    ("resnet_20", images(32, 10), 269_722),  # 0.27M (He et al. 2016, Table 6)
    ("resnet_56", images(32, 10), 853_018),  # 0.85M
    ("resnet_18", images(32, 10), 11_173_962),
    ("resnet_18", images(224, 1000), 11_689_512),
    ("preact_resnet_18", images(32, 100), 11_217_444),  # no norm at the end, one after the stem
    ("resnet_50", images(224, 1000), 25_557_032),
    ("vit_32", images(32, 10), 1_205_898),
    ("vit_ti_16", images(224, 1000), 5_717_416),
    ("vit_s_16", images(224, 1000), 22_050_664),
    ("gpt_64", InputSpec("tokens", (256,), 256), 216_448),
    ("gpt_384", InputSpec("tokens", (256,), 65), 10_672_512),
    ("gpt_768", InputSpec("tokens", (1024,), 50_257), 124_439_808),  # GPT-2
  ],
)
def test_parameters_are_as_many_as_published(network, spec, parameters):
  assert count(network, spec) == parameters


# ---- Values.


@needs_torch
@pytest.mark.parametrize("case", CASES)
def test_logits_and_a_step_are_those_of_pytorch(case):
  import torch
  import torch_today

  model, rate = build(case), 0.1
  variables, (inputs, labels) = randomised(model), batch(model.spec)
  network = torch_today.NETWORKS[CASES[case][0]["name"]](model.spec, check_options(CASES[case][0])[1]).eval()
  before = torch_today.carried(variables, network)
  network.load_state_dict(before)
  with torch.no_grad():
    evaluated = network(torch.from_numpy(inputs)).numpy()
  trained, after = torch_today.step(network, torch.from_numpy(inputs), torch.from_numpy(labels).long(), rate)

  @jax.jit
  def step(variables):
    def loss(params):
      tree = {**variables, "params": params}
      logits, _, stats = model.apply(tree, (), inputs, train=True, key=jax.random.key(0), positions=jnp.arange(4))
      return losses.label_cross_entropy(logits, labels).mean(), (logits, stats)

    update, (logits, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda leaf, change: leaf - rate * change, variables["params"], update)
    return model.apply(variables, (), inputs, train=False)[0], logits, {"params": params, "batch_stats": stats}

  ours = step(variables)
  assert np.abs(evaluated).max() > 0.1
  for found, expected in zip(ours, (evaluated, trained), strict=False):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
  for key, found in torch_today.carried(ours[2], network).items():
    if not key.endswith(("running_var", "num_batches_tracked")):  # PyTorch's running variance is the unbiased one
      expected, scale = after[key].numpy(), np.abs(after[key].numpy()).max()
      np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5 * scale, err_msg=key)
      assert (found - before[key]).abs().max() > 1e-4, key


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, inputs, positions, key=0):
  """Returns the logits of a training step's mini-batch."""
  return model.apply(variables, (), inputs, train=True, key=jax.random.key(key), positions=positions)[0]


def test_a_new_residual_block_passes_its_input_through():
  params = initial(build("resnet_large", zero_scale=True), "stage1_unit1", "norm")
  block = params["stage1_unit1"]
  assert not block["norm3"]["scale"].any()
  assert all(block[name]["scale"].all() for name in ("norm1", "norm2", "shortcut_norm"))
  assert params["norm"]["scale"].all()


def test_gpt_starts_smaller_where_layers_add_up():
  params = initial(build("gpt", width=64, layers=1), "stack")["stack"]["layer1"]
  deviations = {name: float(params[name]["kernel"].std()) for name in ("qkv", "attention", "mlp_in", "mlp_out")}
  small = 0.02 / np.sqrt(2)
  assert deviations == pytest.approx({"qkv": 0.02, "attention": small, "mlp_in": 0.02, "mlp_out": small}, rel=0.05)


# ---- What is random follows the position; what is causal sees nothing later.


@pytest.mark.parametrize("case", ["vit", "gpt"])
def test_dropout_and_drop_path_follow_the_position(case):
  model = build(case, layers=1, dropout=0.3, drop_path=0.5)
  variables, (inputs, _) = randomised(model), batch(model.spec)
  whole = apply(model, variables, inputs, np.arange(4))
  parts = [apply(model, variables, inputs[first : first + 2], np.arange(first, first + 2)) for first in (0, 2)]
  np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-5)
  assert np.abs(apply(model, variables, inputs, np.arange(4), key=1) - whole).max() > 0.1
  assert np.abs(apply(model, variables, inputs, np.arange(4, 8)) - whole).max() > 0.1


class Paths(nn.Module):
  rate: float

  @nn.compact
  def __call__(self, x, positions):
    return common.drop_path(x, self.rate, train=True, positions=positions, name="path")


def test_drop_path_keeps_or_leaves_out_whole_examples_and_the_mean():
  kept = Paths(0.25).apply({}, jnp.ones((4000, 3, 2)), jnp.arange(4000), rngs={"dropout": jax.random.key(0)})
  assert set(np.unique(kept)) == {0, np.float32(4 / 3)}
  assert (kept == kept[:, :1, :1]).all()
  assert float(kept.mean()) == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("case", ["gpt", "gpt_rotary"])
def test_no_token_sees_later_ones(case):
  model = build(case)
  variables, (inputs, _) = randomised(model), batch(model.spec, 1)
  run = jax.jit(jax.vmap(lambda tokens: model.apply(variables, (), tokens[None], train=False)[0][0]))
  changed = np.repeat(inputs, 6, axis=0)
  changed[np.arange(5), np.arange(5)] = (inputs[0] + 1) % 7  # row t differs at place t; the last row is unchanged
  logits = run(changed)
  moved = np.abs(logits - logits[5]).max(-1)[:5] > 1e-4
  np.testing.assert_array_equal(moved, np.triu(np.ones((5, 5), bool)))


@pytest.mark.parametrize("case", ["resnet", "vit", "gpt"])
def test_bfloat16_is_close_to_float32_and_keeps_its_parameters_in_float32(case):
  logits = {}
  for dtype in ("float32", "bfloat16"):
    model = build(case, compute_dtype=dtype)
    variables, (inputs, _) = randomised(model), batch(model.spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.shapes)} == {np.dtype(np.float32)}
    logits[dtype] = apply(model, variables, inputs, np.arange(4))
    assert logits[dtype].dtype == np.float32
  distance = np.abs(logits["bfloat16"] - logits["float32"]).max() / np.std(logits["float32"])
  assert 1e-5 < distance < 0.2


def test_attention_is_cudnn_s_where_it_is_asked_for(monkeypatch):
  # What cannot be asked of a machine without cuDNN: its version, and the GPU's.
  fused = "jax._src.cudnn.fused_attention_stablehlo."
  monkeypatch.setattr(f"{fused}check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(f"{fused}check_compute_capability", lambda _: True)
  found = {}
  for cudnn in (False, True):
    model = build("gpt", "bfloat16", cudnn=cudnn)
    run = jax.jit(functools.partial(model.apply, train=False)).trace(model.shapes, (), batch(model.spec)[0])
    found[cudnn] = "__cudnn$fmha" in run.lower(lowering_platforms=("cuda",)).as_text()
  assert found == {False: False, True: True}


# ---- Refusals.


@pytest.mark.parametrize(
  ("name", "changes", "flags", "refused"),
  [
    ("gpt_64", {}, "--xla_gpu_deterministic_ops=true", True),
    ("vit_32", {}, "--xla_gpu_exclude_nondeterministic_ops", True),
    ("gpt_64", {}, "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ("gpt_64", {"layers": 1}, "--xla_gpu_deterministic_ops=true", False),
    ("gpt_64", {"cudnn": False}, "--xla_gpu_deterministic_ops=true", False),
    ("lstm_32", {}, "--xla_gpu_deterministic_ops=true", False),
  ],
)
def test_cudnn_s_attention_in_several_layers_is_not_trained_with_deterministic_kernels(
  name, changes, flags, refused, monkeypatch
):
  monkeypatch.setenv("XLA_FLAGS", flags)
  group = {**presets.MODELS[name].to_dict(), "cudnn": True, **changes}
  made = types.SimpleNamespace(network=types.SimpleNamespace(group=group))
  if refused:
    with pytest.raises(ConfigError, match=r"in \d layers .* set XLA_FLAGS=--xla_gpu_deterministic_ops=false"):
      job_lib._check_attention(made)
  else:
    job_lib._check_attention(made)


@pytest.mark.parametrize(
  ("case", "changes", "message"),
  [
    ("resnet", {"blocks": ()}, "model.blocks=(): the number of blocks of each stage is expected"),
    ("resnet", {"blocks": (1, 0)}, "model.blocks=0: a whole number of at least 1 is expected"),
    ("resnet", {"zero_scale": 1}, "model.zero_scale=1: True or False is expected"),
    ("resnet", {"preactivation": 1}, "model.preactivation=1: True or False is expected"),
    ("resnet_preactivated", {"bottleneck": True}, "model.preactivation=True: expected model.bottleneck=False, "),
    ("resnet_preactivated", {"zero_scale": True}, "model.preactivation=True: expected model.bottleneck=False, "),
    ("vit", {"patch": 8}, "model.patch=8: a divisor of the images' sides, 8 and 12, is expected"),
    ("vit", {"heads": 3}, "model.width=16: a multiple of model.heads=3 is expected"),
    ("vit", {"drop_path": 1.0}, "model.drop_path=1.0: a dropout rate lies in [0, 1)"),
    ("gpt", {"positions": "sine"}, "model.positions='sine': learned or rotary is expected"),
    ("gpt_rotary", {"width": 6}, "model.positions='rotary': an even number of channels per head is expected, not"),
    ("gpt", {"cudnn": True, "width": 8}, "model.cudnn=True: a multiple of 8 channels per head is expected, not model."),
  ],
)
def test_bad_options_are_refused_with_key_value_and_expectation(case, changes, message):
  with pytest.raises(ConfigError) as error:
    build(case, **changes)
  assert message in str(error.value)


@pytest.mark.parametrize("case", ["vit", "gpt"])
def test_cudnn_is_refused_where_it_is_not_available(case):
  options, spec = CASES[case]
  with pytest.raises(ConfigError, match="model.cudnn=True needs an NVIDIA GPU"):
    make_model(options | {"cudnn": True, "width": 32}, spec, compute_dtype="bfloat16", devices=jax.devices("cpu"))


@pytest.mark.parametrize(("case", "spec"), [("resnet", TOKENS), ("vit", TOKENS), ("gpt", IMAGES)])
def test_networks_refuse_the_other_kind_of_data(case, spec):
  with pytest.raises(ConfigError, match=r"reads (images|tokens); the data set holds (images|tokens)"):
    make_model(CASES[case][0], spec)


# ---- Training, evaluation, prediction.

QUIET = {"progress": False}


def with_model(words, group, **changes):
  cfg = ban_jax.get_config(words).copy_and_resolve_references()
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  with cfg.unlocked():
    cfg.model = group
  return cfg


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
  """A configuration, and a GPT with dropout and its student, read from disk."""
  small = GPT | {"layers": 1, "dropout": 0.1, "drop_path": 0.1, "positions": "rotary"}
  cfg = with_model("pydoc,gpt_64,smoke", small, train__epochs=1, train__evaluate_every=0)
  workdir = tmp_path_factory.mktemp("gpt")
  ban_jax.run(cfg, workdir, devices=jax.devices()[:1], **QUIET)
  return cfg, ban_jax.load_run(workdir)


def test_a_gpt_is_evaluated_alike_in_any_batch(gpt):
  cfg, generations = gpt
  few, many = (ban_jax.evaluate(generations, _batch(cfg, rows), devices=jax.devices()[:1]) for rows in (5, 64))
  assert many["count"] == few["count"] == data.load(cfg.data).sizes["test"]
  assert many["nll"] == pytest.approx(few["nll"], rel=1e-6)
  assert many["perplexity"] < 1500


def _batch(cfg, rows):
  cfg = cfg.copy_and_resolve_references()
  cfg.evaluate.batch_size = rows
  return cfg


def test_a_gpt_reads_a_long_sentence_in_windows_and_samples_from_the_last_one(gpt):
  _, generations = gpt
  spec = generations[0].network.spec
  window, words = spec.shape[0], spec.words
  tokens = np.random.default_rng(0).integers(2, len(words), 2 * window + 3)
  text = [words[token] for token in tokens]
  (logs,) = ban_jax.log_probabilities(generations, [" ".join(text)])
  read = [words.index("<eos>"), *tokens, words.index("<eos>")]
  for first in (0, window, 2 * window):
    part = np.array(read[first : first + window + 1])
    found = np.log(ban_jax.predict(generations, part[None, :-1])[0][np.arange(len(part) - 1), part[1:]])
    np.testing.assert_allclose(logs[first : first + window], found, rtol=1e-4)
  likely = words[int(ban_jax.predict(generations, [read[-window - 1 : -1]])[0, -1].argmax())]
  assert ban_jax.sample(generations, 1, prompt=" ".join(text), temperature=1e-3) == likely
  assert ban_jax.sample(generations, 5, seed=1) == ban_jax.sample(generations, 5, seed=1)
  with pytest.raises(ban_jax.DataError, match="have 11 tokens; a network without a carry reads at most its window, 10"):
    ban_jax.predict(generations, np.zeros((1, 11), int))


def test_a_gpt_and_an_lstm_teach_one_another(gpt):
  cfg, generations = gpt
  lstm = with_model("pydoc,lstm_32,smoke", presets.MODELS["lstm_32"], train__epochs=1, train__evaluate_every=0)
  student = ban_jax.train_generation(generations[0], lstm, devices=jax.devices()[:1], **QUIET)
  assert student.network.group["name"] == "lstm"
  assert len(ban_jax.sample([generations[0], student], 3).split()) == 3

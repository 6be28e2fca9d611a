"""Image networks: parameter counts, and values against NumPy references written from the papers' descriptions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ban_jax import presets
from ban_jax.devices import AXIS
from ban_jax.errors import ConfigError
from ban_jax.models import MODELS, check_options, common, make_model
from ban_jax.types import InputSpec
from experiments import parameters
from experiments.analysis import memory

SPEC = InputSpec("images", (8, 8, 3), 5)
SMALL = {
  "mlp": {"name": "mlp", "units": 6, "layers": 2, "dropout": 0.0},
  "wide_resnet": {"name": "wide_resnet", "depth": 16, "width": 2, "dropout": 0.0},
  "densenet": {"name": "densenet", "units": 2, "growth": (4, 3, 5), "stem": 7, "compression": 0.5, "remat": False},
  "matched_wide_resnet": {
    "name": "matched_wide_resnet", "units": 2, "ratio": 0.5, "stem": 7, "stages": (8, 12, 10), "dropout": 0.0,
  },
  "matched_pre_resnet": {"name": "matched_pre_resnet", "units": 2, "ratio": 1.0, "stem": 7, "stages": (8, 12, 22)},
}  # fmt: skip


def build(name, spec=SPEC, sync_batch_stats=False, compute_dtype="float32", **changes):
  options = SMALL[name] | changes
  return make_model(options, spec, sync_batch_stats=sync_batch_stats, compute_dtype=compute_dtype)


def randomised(model, seed=0):
  """Random variables, including scales, biases and running statistics, so that none is zero or one."""
  rng = np.random.default_rng(seed)

  def sample(path, leaf):
    name = path[-1].key
    if name in ("scale", "var"):
      return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    deviation = 0.3 if name in ("bias", "mean") else np.sqrt(2 / np.prod(leaf.shape[:-1]))
    return rng.normal(0, deviation, leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(sample, jax.eval_shape(model.init, jax.random.key(0)))


def initial(model, *names):
  """The initial parameters of these submodules only; they compile much faster than all."""
  return jax.jit(lambda key: {name: model.init(key)["params"][name] for name in names})(jax.random.key(0))


def images(batch=4, seed=1, shape=SPEC.shape):
  return np.random.default_rng(seed).normal(size=(batch, *shape)).astype(np.float32)


# ---- Values, against references in NumPy and float64.


class Reference:
  """Layers as the papers describe them, reading weights from a variables tree and collecting the running statistics."""

  def __init__(self, variables, train):
    self.params, self.stats, self.train = variables["params"], variables["batch_stats"], train
    self.updated = {}

  @staticmethod
  def at(tree, path):
    for name in path.split("/"):
      tree = tree[name]
    return tree

  def conv(self, path, x, stride=1):
    """Each output pixel is the sum over the window, centred on the input pixel, of pixel times weight."""
    kernel = np.asarray(self.at(self.params, path)["kernel"], np.float64)
    size = kernel.shape[0]
    batch, height, width, _ = x.shape
    padded = np.zeros((batch, height + size - 1, width + size - 1, x.shape[-1]))
    padded[:, size // 2 : size // 2 + height, size // 2 : size // 2 + width] = x
    y = np.zeros((batch, height // stride, width // stride, kernel.shape[-1]))
    for row in range(size):
      for column in range(size):
        y += padded[:, row : row + height : stride, column : column + width : stride] @ kernel[row, column]
    return y

  def norm_relu(self, path, x):
    weights, stats = self.at(self.params, path), self.at(self.stats, path)
    mean, var = np.asarray(stats["mean"], np.float64), np.asarray(stats["var"], np.float64)
    if self.train:
      running = mean, var
      mean = x.sum((0, 1, 2)) / x[..., 0].size
      var = ((x - mean) ** 2).sum((0, 1, 2)) / x[..., 0].size
      self.updated[path] = 0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * var
    return np.maximum((x - mean) / np.sqrt(var + 1e-5) * weights["scale"] + weights["bias"], 0)

  def avg_pool_2x2(self, x):
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

  def head(self, x):
    x = self.norm_relu("norm", x)
    weights = self.params["classifier"]
    return x.sum((1, 2)) / x[0, ..., 0].size @ weights["kernel"] + weights["bias"]

  def wide_block(self, path, x, stride, width):
    activated = self.norm_relu(f"{path}/norm1", x)
    y = self.conv(f"{path}/conv1", activated, stride)
    y = self.conv(f"{path}/conv2", self.norm_relu(f"{path}/norm2", y))
    return y + (x if x.shape[-1] == width else self.conv(f"{path}/shortcut", activated, stride))


def mlp(net, x):
  x = x.reshape(len(x), 1, 1, -1)
  for layer in (1, 2):
    x = net.norm_relu(f"norm{layer}", x @ np.asarray(net.params[f"layer{layer}"]["kernel"], np.float64))
    assert x.shape[-1] == 6
  return x[:, 0, 0] @ net.params["classifier"]["kernel"] + net.params["classifier"]["bias"]


def wide_resnet(net, x):  # depth 16, width 2: two blocks a stage
  x = net.conv("stem", x)
  for stage, width in ((1, 32), (2, 64), (3, 128)):
    x = net.wide_block(f"stage{stage}_unit1", x, 1 if stage == 1 else 2, width)
    x = net.wide_block(f"stage{stage}_unit2", x, 1, width)
    assert x.shape[-1] == width
  return net.head(x)


def densenet(net, x):
  x = net.conv("stem", x)
  for stage, growth in ((1, 4), (2, 3), (3, 5)):
    for unit in (f"stage{stage}_unit1", f"stage{stage}_unit2"):
      y = net.conv(f"{unit}/conv1", net.norm_relu(f"{unit}/norm1", x))
      assert y.shape[-1] == 4 * growth
      y = net.conv(f"{unit}/conv2", net.norm_relu(f"{unit}/norm2", y))
      assert y.shape[-1] == growth
      x = np.concatenate([x, y], axis=-1)
    channels = x.shape[-1]
    x = net.conv(f"transition{stage}/conv", net.norm_relu(f"transition{stage}/norm", x))
    assert x.shape[-1] == channels // 2
    x = net.avg_pool_2x2(x) if stage < 3 else x
  return net.head(x)


def matched_wide_resnet(net, x):
  x = net.conv("stem", x)
  for stage, width in ((1, 8), (2, 12), (3, 10)):
    for unit in (f"stage{stage}_unit1", f"stage{stage}_unit2"):
      x = net.wide_block(unit, x, 1, width // 2)
      assert x.shape[-1] == width // 2
    x = net.conv(f"match{stage}", x)
    assert x.shape[-1] == width
    x = net.avg_pool_2x2(x) if stage < 3 else x
  return net.head(x)


def matched_pre_resnet(net, x):
  x = net.conv("stem", x)
  for stage, width in ((1, 8), (2, 12), (3, 22)):
    for unit in (f"stage{stage}_unit1", f"stage{stage}_unit2"):
      activated = net.norm_relu(f"{unit}/norm1", x)
      y = net.norm_relu(f"{unit}/norm2", net.conv(f"{unit}/conv1", activated))
      y = net.norm_relu(f"{unit}/norm3", net.conv(f"{unit}/conv2", y))
      assert y.shape[-1] == width // 4
      x = net.conv(f"{unit}/conv3", y) + (net.conv(f"{unit}/shortcut", activated) if unit.endswith("1") else x)
    x = net.avg_pool_2x2(x) if stage < 3 else x
  return net.head(x)


REFERENCES = {
  "mlp": mlp,
  "wide_resnet": wide_resnet,
  "densenet": densenet,
  "matched_wide_resnet": matched_wide_resnet,
  "matched_pre_resnet": matched_pre_resnet,
}


def test_every_image_network_has_a_reference():
  others = {"own", "lstm", "char_cnn_lstm", "gpt", "resnet", "vit"}  # tests/test_language_models.py, test_networks.py
  assert {group.name for group in presets.MODELS.values()} - others == set(REFERENCES)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", REFERENCES)
def test_values_agree_with_an_independent_calculation(name, train):
  model = build(name)
  variables, x = randomised(model), images()
  run = jax.jit(model.apply, static_argnames="train")
  logits, carry, batch_stats = run(variables, (), x, train=train, key=jax.random.key(0), positions=jnp.arange(4))
  net = Reference(variables, train)
  np.testing.assert_allclose(logits, REFERENCES[name](net, np.asarray(x, np.float64)), atol=1e-4, rtol=1e-4)
  assert carry == ()
  norms = {path.rpartition("/")[0] for path in _paths(variables["batch_stats"])}
  if not train:
    jax.tree.map(np.testing.assert_array_equal, batch_stats, variables["batch_stats"])
    return
  assert set(net.updated) == norms  # neither side skips a norm
  for path, (mean, var) in net.updated.items():
    found = net.at(batch_stats, path)
    np.testing.assert_allclose(found["mean"], mean, atol=1e-4, rtol=1e-4, err_msg=path)
    np.testing.assert_allclose(found["var"], var, atol=1e-4, rtol=1e-4, err_msg=path)


def _paths(tree):
  return ["/".join(part.key for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_initial_weights_follow_he():
  model = build("densenet", SPEC, units=2, growth=32, stem=64)
  params = initial(model, "stage1_unit1", "stage1_unit2", "transition1", "classifier")
  for path in ("stage1_unit1/conv2", "stage1_unit2/conv1", "transition1/conv"):
    kernel = np.asarray(Reference.at(params, path)["kernel"])
    fan_in = np.prod(kernel.shape[:3])
    assert abs(kernel.std() * np.sqrt(fan_in / 2) - 1) < 0.05, path
    assert abs(kernel).max() * np.sqrt(fan_in / 2) > 3, path  # normal, not truncated at two deviations
  assert set(model.shapes["params"]["stem"]) == {"kernel"}
  assert not np.any(params["classifier"]["bias"])


@pytest.mark.parametrize("name", REFERENCES)
def test_bfloat16_is_close_to_float32_and_keeps_its_state_in_float32(name):
  x = images()
  logits = {}
  for dtype in ("float32", "bfloat16"):
    model = build(name, compute_dtype=dtype)
    variables = randomised(model)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
    run = jax.jit(model.apply, static_argnames="train")
    logits[dtype], _, batch_stats = run(variables, (), x, train=True, key=jax.random.key(0), positions=jnp.arange(4))
    assert {leaf.dtype for leaf in jax.tree.leaves(batch_stats)} == {np.dtype(np.float32)}
    assert logits[dtype].dtype == jnp.float32
  spread = np.std(logits["float32"])
  distance = np.abs(logits["bfloat16"] - logits["float32"]).max() / spread
  assert 1e-5 < distance < 0.2  # the precision did change, and nothing else


# ---- Rematerialisation.


def test_remat_changes_no_parameter_and_no_value():
  found, x = [], images()
  for remat in (False, True):
    model = build("densenet", units=1, remat=remat)
    variables = randomised(model)

    def loss(params, batch_stats, x, apply=model.apply):
      tree = {"params": params, "batch_stats": batch_stats}
      logits, _, updated = apply(tree, (), x, train=True, key=jax.random.key(0), positions=jnp.arange(4))
      return jnp.sum(jax.nn.log_softmax(logits)[:, 0]), (logits, updated)

    step = jax.jit(jax.grad(loss, has_aux=True)).trace(variables["params"], variables["batch_stats"], x)
    assert ("checkpoint" in str(step.jaxpr) or "remat" in str(step.jaxpr)) == remat
    gradient, aux = step.lower().compile()(variables["params"], variables["batch_stats"], x)
    found.append((initial(model, "stage1_unit1", "transition2"), gradient, aux))
  (plain_params, plain_gradient, plain_aux), (params, gradient, aux) = found
  jax.tree.map(np.testing.assert_array_equal, plain_params, params)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, plain_gradient, gradient)  # with the same structure
  jax.tree.map(close, plain_aux, aux)


def test_remat_keeps_memory_linear_in_the_units():
  def kept(units, remat):
    return memory.count_memory(build("densenet", units=units, growth=4, remat=remat), 4).kept

  few, many = ({remat: kept(units, remat) for remat in (True, False)} for units in (2, 6))
  assert many[True] / few[True] < 3
  assert many[False] / few[False] > 3.5
  assert many[True] < many[False] / 5


def test_counted_memory_of_chains_that_can_be_counted_by_hand():
  def keeps(x):  # at its end y, z and the result are alive
    y = jnp.sin(x)
    z = jnp.cos(y)
    return y * z

  def forgets(x):  # each result replaces the one before
    return jnp.sin(jnp.cos(jnp.sin(jnp.cos(x))))

  for chain, expected in ((keeps, 1200), (forgets, 800)):
    jaxpr = jax.make_jaxpr(chain)(jax.ShapeDtypeStruct((100,), jnp.float32)).jaxpr  # arrays of 400 bytes
    assert memory.peak_bytes(jaxpr, jaxpr.outvars) == expected


def test_densenet_80_120_fits_into_16_gib_with_remat():
  counted = memory.count_memory(parameters.build("densenet_80_120"), 128)
  assert presets.MODELS["densenet_80_120"].remat
  assert 4 * 50.4e6 * 4 < counted.weights < counted.peak  # parameters, momentum, gradient, teacher
  assert counted.kept < counted.peak < 16 * 2**30


# ---- Parameters.

# Trained parameters in millions, with 10 and with 100 classes, calculated by hand from the layer lists.
COUNTS = {
  "wrn_28_1": (0.369, 0.375),
  "wrn_28_2": (1.468, 1.479),
  "wrn_28_5": (9.133, 9.162),
  "wrn_28_10": (36.479, 36.537),
  "densenet_112_33": (7.45, 7.49),
  "densenet_90_60": (16.17, 16.24),
  "densenet_80_80": (22.42, 22.50),
  "densenet_80_120": (50.36, 50.48),
  "densenet_90_60_depth_0_5": (21.28, 21.35),
  "densenet_90_60_depth_2": (13.67, 13.74),
  "densenet_90_60_depth_3": (12.89, 12.95),
  "densenet_90_60_depth_4": (12.53, 12.60),
  "densenet_90_60_compression_0_5": (6.05, 6.12),
  "densenet_90_60_compression_0_75": (9.50, 9.57),
  "densenet_90_60_compression_1_5": (75.52, 75.59),
  "pre_resnet_14_0_5": (7.56, 7.56),
  "pre_resnet_14_1": (19.10, 19.10),
  "wide_match_1_1": (20.99, 20.99),
  "wide_match_2_1": (43.11, 43.11),
  "wide_match_4_0_5": (24.33, 24.33),
  "wide_match_4_1": (87.35, 87.35),
}
NOT_REPRODUCED = {
  ("densenet_112_33", "6.3"),
  ("densenet_90_60", "22.4"),
  ("densenet_90_60_compression_0_5", "5.1"),
  ("densenet_90_60_compression_0_75", "10.1"),
  ("densenet_90_60_compression_1_5", "80.5"),
  ("pre_resnet_14_0_5", "7.3"),
  ("pre_resnet_14_1", "17.7"),
}


@pytest.mark.parametrize("network", COUNTS)
def test_parameter_counts(network):
  found = parameters.describe(network).parameters
  for classes, expected in zip((10, 100), COUNTS[network], strict=True):
    assert abs(found[classes] / 1e6 - expected) <= (0.0005 if network.startswith("wrn") else 0.00501)


def test_the_table_has_every_network_and_marks_what_is_not_reproduced():
  rows = parameters.rows()
  assert {row.network for row in rows} == set(COUNTS)
  lines = parameters.table(rows).splitlines()[2:]
  assert len(lines) == len(rows)
  starred = {(row.network, row.paper) for row, line in zip(rows, lines, strict=True) if "*" in line}
  assert starred == NOT_REPRODUCED


def test_the_count_with_ten_classes_is_that_of_the_network_with_ten_classes():
  for network in ("wrn_10_1", "densenet_16_8", "small_wide_match_1_1"):
    model = parameters.build(network, 10)
    shapes = model.shapes["params"]
    trained = sum(leaf.size for name in shapes if name not in model.inherits for leaf in jax.tree.leaves(shapes[name]))
    assert parameters.describe(network).parameters[10] == trained


def test_stage_widths():
  for network in ("densenet_90_60", "densenet_90_60_depth_4", "pre_resnet_14_1", "wide_match_4_0_5"):
    assert parameters.describe(network).stages == (480, 660, 750)
  assert parameters.describe("densenet_80_120").stages == (840, 1140, 1290)
  for variant in ("0_5", "0_75", "1_5"):
    stages = parameters.describe(f"densenet_90_60_compression_{variant}").stages
    assert max(abs(np.subtract(stages, (480, 660, 750)))) <= 4


@pytest.mark.parametrize(
  ("student", "teacher"),
  [
    ("wide_match_2_1", "densenet_90_60"),
    ("pre_resnet_14_0_5", "densenet_90_60"),
    ("small_wide_match_1_1", "densenet_16_8"),
    ("small_pre_resnet_2_1", "densenet_16_8"),
  ],
)
def test_matched_students_can_take_their_teachers_first_and_last_layer(student, teacher):
  model = parameters.build(student)
  assert model.inherits == ("stem", "classifier")
  given, taken = parameters.build(teacher).shapes["params"], model.shapes["params"]
  for name in model.inherits:
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), given[name], taken[name])
    assert all(jax.tree.leaves(same)), same
  assert parameters.describe(student).stages == parameters.describe(teacher).stages


def test_equal_arguments_give_the_same_model():
  assert build("densenet") is build("densenet", growth=[4, 3, 5])
  assert build("densenet") is not build("densenet", remat=True)


# ---- Dropout by position.


class TwoDropouts(nn.Module):
  rate: float

  @nn.compact
  def __call__(self, x, positions):
    layer = lambda name: common.Dropout(self.rate, name=name)(x, train=True, positions=positions)  # noqa: E731
    return layer("first"), layer("second")


def drop(rate, shape=(4, 8, 8, 16), key=0, positions=None, dtype=jnp.float32):
  positions = jnp.arange(shape[0]) if positions is None else jnp.asarray(positions)
  run = jax.jit(TwoDropouts(rate).apply)
  outputs = run({}, jnp.ones(shape, dtype), positions, rngs={"dropout": jax.random.key(key)})
  return [np.asarray(y, np.float32) for y in outputs]


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.65])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate):
  first, _ = drop(rate, (16, 16, 16, 64))
  assert abs((first == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / first.size)
  rounded = round(rate * 65536) / 65536
  np.testing.assert_allclose(first[first != 0], 1 / (1 - rounded), rtol=1e-6)
  for axis in range(1, 4):  # no unit always dropped, none always kept
    others = tuple(i for i in range(4) if i != axis)
    assert np.abs((first == 0).mean(others) - rate).max() < 0.05
  quarters = (first == 0).reshape(16, 4, 4, 16, 64).swapaxes(0, 1).reshape(4, -1)  # rows that share words
  assert np.abs(np.corrcoef(quarters) - np.eye(4)).max() < 5 / np.sqrt(quarters.shape[1])


def test_dropout_draws_are_those_of_their_version():
  """Whoever changes them raises common.DRAWS, so that a run that is under way is not resumed with others."""
  first, second = drop(0.5, (2, 5, 3), key=1)
  kept = "".join(np.packbits(y != 0).tobytes().hex() for y in (first, second))
  assert (common.DRAWS, kept) == (3, "7af94068364bf530")


def test_dropout_mask_belongs_to_the_position():
  whole, _ = drop(0.5, (6, 4, 4, 3))
  parts = [drop(0.5, (2, 4, 4, 3), positions=p)[0] for p in ([4, 5], [2, 3], [1, 0])]
  np.testing.assert_array_equal(np.concatenate([parts[2][::-1], parts[1], parts[0]]), whole)


def test_dropout_differs_by_position_key_and_layer():
  first, second = drop(0.5)
  other, _ = drop(0.5, key=1)
  masks = [first, second, other, np.roll(first, 1, axis=0)]
  for i in range(len(masks)):
    for j in range(i):
      agreement = ((masks[i] == 0) == (masks[j] == 0)).mean()
      assert abs(agreement - 0.5) < 0.05, (i, j)


def test_dropout_of_an_odd_number_of_units_and_in_bfloat16():
  first, _ = drop(0.5, (2, 3, 3, 1))
  assert first.shape == (2, 3, 3, 1)
  reduced, _ = drop(0.5, (2, 3, 3, 1), dtype=jnp.bfloat16)
  np.testing.assert_array_equal(first, reduced)  # factor 2 is exact


@pytest.mark.parametrize("shape", [(4000, 1), (1000, 2, 2), (64, 1030, 5)])  # 1,030 is more than a byte counts
def test_dropout_of_any_number_of_rows_drops_at_its_rate_in_each(shape):
  first, _ = drop(0.3, shape)
  dropped = (first == 0).mean((0, *range(2, len(shape))))
  assert np.abs(dropped - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / (first.size / shape[1]))


def test_dropout_is_between_the_convolutions_and_only_in_training():
  plain, dropping = (build("wide_resnet", depth=10, width=1, dropout=rate) for rate in (0.0, 0.4))
  variables, x = randomised(plain), images()

  def run(model, train, key=0):
    apply = jax.jit(model.apply, static_argnames="train")
    return np.asarray(apply(variables, (), x, train=train, key=jax.random.key(key), positions=jnp.arange(4))[0])

  np.testing.assert_array_equal(run(plain, False), run(dropping, False))
  assert np.abs(run(plain, True) - run(dropping, True)).max() > 0.01
  assert np.abs(run(dropping, True, 1) - run(dropping, True)).max() > 0.01


# ---- Errors.


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("wide_resnet", {"depth": 12}, "model.depth=12: a Wide-ResNet has depth 6n + 4"),
    ("wide_resnet", {"depth": 4}, "model.depth=4: a Wide-ResNet has depth 6n + 4"),
    ("wide_resnet", {"width": 0}, "model.width=0: a Wide-ResNet's width factor is at least 1"),
    ("wide_resnet", {"dropout": 1.0}, "model.dropout=1.0: a dropout rate lies in [0, 1)"),
    ("wide_resnet", {"deepth": 16}, "takes the options depth, width, dropout; the configuration gives"),
    ("mlp", {"layers": 0}, "model.layers=0: a whole number of at least 1 is expected"),
    ("mlp", {"dropout": 1.0}, "model.dropout=1.0: a dropout rate lies in [0, 1)"),
    ("densenet", {"units": 0}, "model.units=0: a whole number of at least 1 is expected"),
    ("densenet", {"growth": 0}, "model.growth=0: a whole number of at least 1 is expected"),
    ("densenet", {"growth": (4, 4)}, "model.growth=(4, 4): one number, or 3, one for each stage, are expected"),
    ("densenet", {"stem": 2.5}, "model.stem=2.5: a whole number of at least 1 is expected"),
    ("densenet", {"compression": 1.5}, "model.compression=1.5: the share of channels kept lies in (0, 1]"),
    ("densenet", {"compression": 0.1}, "model.compression=0.1: it leaves no channel of model.stem=7"),
    ("densenet", {"remat": 1}, "model.remat=1: True or False is expected"),
    ("matched_wide_resnet", {"units": -1}, "model.units=-1: a whole number of at least 1 is expected"),
    ("matched_wide_resnet", {"ratio": 0.3}, "model.ratio=0.3: a ratio is expected that makes a whole number of"),
    ("matched_wide_resnet", {"ratio": 0.0}, "model.ratio=0.0: a ratio is expected that makes a whole number of"),
    ("matched_wide_resnet", {"ratio": float("nan")}, "model.ratio=nan: a ratio is expected to be finite"),
    ("matched_wide_resnet", {"stages": (8, 12)}, "model.stages=(8, 12): the teacher's three stage widths are expected"),
    ("matched_wide_resnet", {"stages": (8, 0, 4)}, "model.stages=0: a whole number of at least 1 is expected"),
    ("matched_wide_resnet", {"dropout": -0.1}, "model.dropout=-0.1: a dropout rate lies in [0, 1)"),
    ("matched_pre_resnet", {"ratio": 0.4}, "model.ratio=0.4: a ratio that leaves at least 1 of 8 / 4 channels"),
    ("matched_pre_resnet", {"dropout": 0.1}, "takes the options units, ratio, stem, stages; the configuration gives"),
  ],
)
def test_bad_options_are_refused_with_key_value_and_expectation(name, changes, message):
  with pytest.raises(ConfigError) as error:
    build(name, **changes)
  assert message in str(error.value)


def test_a_missing_option_is_refused():
  with pytest.raises(
    ConfigError, match="'wide_resnet' takes the options depth, width, dropout; the configuration gives"
  ):
    make_model({"name": "wide_resnet", "depth": 16, "width": 2}, SPEC)


def test_messages_name_the_group_that_the_options_are_from():
  with pytest.raises(
    ConfigError, match=r"^teacher.model.compression=0.1: it leaves no channel of teacher.model.stem=7$"
  ):
    check_options(SMALL["densenet"] | {"compression": 0.1}, "teacher.model")


def test_options_can_be_hashed_and_are_keyword_only():
  for name, group in SMALL.items():
    factory, options = check_options(group)
    assert factory is MODELS[name].make
    assert hash(options) == hash(check_options(group)[1])
    with pytest.raises(TypeError):
      MODELS[name].options(*(value for key, value in group.items() if key != "name"))


@pytest.mark.parametrize("name", REFERENCES)
def test_image_networks_refuse_text(name):
  with pytest.raises(ConfigError, match="reads images; the data set holds tokens"):
    build(name, InputSpec("tokens", (35,), 100))


def test_unknown_names_list_the_choices():
  with pytest.raises(ConfigError, match=r"unknown model 'vgg'; choose one of: .*densenet.*wide_resnet"):
    make_model({"name": "vgg"}, SPEC)
  with pytest.raises(ConfigError, match="unknown compute_dtype 'float16'; choose one of: bfloat16, float32"):
    build("densenet", compute_dtype="float16")


# ---- Images that are too small.


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (3, 9), (9, 3), (4, 4)], ids=str)
def test_images_of_which_pooling_leaves_nothing_are_refused(name, shape):
  least = 1 if name in ("wide_resnet", "mlp") else 4
  spec = InputSpec("images", (*shape, 1), 5)
  if min(shape) < least:
    message = rf"model '{name}.* halves images 2 times: expected at least 4x4 pixels, and the data set has {shape[0]}x"
    with pytest.raises(ConfigError, match=message):
      build(name, spec)
  else:
    model = build(name, spec)
    logits = jax.eval_shape(lambda v, x: model.apply(v, (), x, train=False)[0], model.shapes, images(2, 0, spec.shape))
    assert logits.shape == (2, 5)


# ---- Moments that are computed once.


@pytest.fixture
def elsewhere(monkeypatch):
  """Computes here what programs for accelerators compute."""
  monkeypatch.setattr(jax.lax, "platform_dependent", lambda *inputs, default, **_: default(*inputs))


def stepped(remat, devices):
  """Returns a DenseNet's loss, batch statistics and gradient for each device's share of a mini-batch."""
  model = build("densenet", sync_batch_stats=devices > 1, remat=remat, units=1)
  variables, inputs = randomised(model), images(8).reshape(devices, -1, *SPEC.shape)

  def loss(params, inputs):
    given = {**variables, "params": params}
    logits, _, statistics = model.apply(given, (), inputs, train=True, key=jax.random.key(1), positions=None)
    return (jnp.sin(logits) ** 2).sum(), statistics

  gradient = jax.value_and_grad(loss, has_aux=True)
  if devices == 1:
    return jax.jit(gradient)(variables["params"], inputs[0])
  return jax.pmap(gradient, AXIS, in_axes=(None, 0), devices=jax.devices()[:devices])(variables["params"], inputs)


@pytest.mark.parametrize(("remat", "devices"), [(False, 1), (True, 2)])
def test_a_densenet_on_accelerators_is_that_on_cpus(remat, devices, request):
  expected = stepped(remat, devices)
  request.getfixturevalue("elsewhere")
  jax.clear_caches()
  jax.tree.map(
    lambda ours, cpus: np.testing.assert_allclose(ours, cpus, rtol=1e-3, atol=1e-4), stepped(remat, devices), expected
  )
  jax.clear_caches()


def test_a_map_s_moments_are_computed_once_on_accelerators():
  model = build("densenet", units=3)
  variables = jax.eval_shape(model.init, jax.random.key(0))

  def run(variables, inputs):
    return model.apply(variables, (), inputs, train=True, key=jax.random.key(1), positions=None)

  traced, sums = jax.jit(run).trace(variables, images()), {}
  for platform in ("cpu", "tpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Over examples and pixels; how many channels each has.
    found = re.findall(r"stablehlo.add across dimensions = \[0, 1, 2\].*-> tensor<(\d+)xf32>", text)
    sums[platform] = sorted(map(int, found))
  once, joined, channels = [], [], 7
  for growth in SMALL["densenet"]["growth"]:
    once += [channels, *[growth] * 3, *[4 * growth] * 3]
    joined += [*(channels + growth * before for before in range(4)), *[4 * growth] * 3]
    channels = (channels + 3 * growth) // 2
  assert sums["tpu"] == sums["cuda"] == sorted(2 * [*once, channels])
  assert sums["cpu"] == sorted(2 * [*joined, channels])

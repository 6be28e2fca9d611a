"""Compiled steps: collectives, transfers, lowering for TPU and GPU, and counted operations."""

import functools
import re

import jax
import numpy as np
import pytest
from conftest import config

from ban_jax import compiled as compiled_lib
from ban_jax import data, feeding, job, optim, programs, resolving
from ban_jax import devices as devices_lib
from ban_jax.errors import ConfigError
from ban_jax.resolving import make_models
from ban_jax.updates import Updates
from configs import cifar, pydoc

WRN = "digits,wrn_10_1,smoke"
# Network -> its batch norms, and the products and convolutions of a forward pass and of a training step: the teacher's
# and the student's forward pass, and two gradients of each layer, but only one of an image network's stem.
NETWORKS = {
  "wide_resnet": (config(WRN), 7, 10, 4 * 10 - 1),
  "densenet": (config("digits,densenet_16_8,smoke", model__units=1), 10, 11, 4 * 11 - 1),
  # Rematerialised units and transitions compute a product again, unless its result is their last.
  "densenet_remat": (config("digits,densenet_16_8,smoke", model__units=1, model__remat=True), 10, 11, 4 * 11 - 1 + 3),
  "lstm": (pydoc.get_config("pydoc,lstm_32,smoke"), 0, 5, 4 * 5),
  "char_cnn_lstm": (pydoc.get_config("pydoc,cnn_lstm_32,smoke"), 0, 16, 4 * 16),
}


def train_program(cfg, devices, *, taught=True):
  """Returns the training step of a student, or without `taught` of generation 0, for one mini-batch a call."""
  return programs.training(job.describe(resolving.resolve(cfg, devices, load=data.describe), int(taught)), 1)


def eval_program(cfg, devices):
  return programs.evaluation(
    job.describe(resolving.resolve(cfg, devices, load=data.describe), 1), cfg.train.batch_size, 1, "train"
  )


@functools.cache
def texts(name, *, taught=True, count=4):
  """Returns the lowered and the compiled text of a training step on `count` devices."""
  program = train_program(NETWORKS[name][0], tuple(jax.devices()[:count]), taught=taught)
  lowered = program.step.lower(*program.arguments)
  return lowered.as_text(), lowered.compile().as_text()


def kinds(text):
  return [kind for kind, _ in compiled_lib.exchanges(text)]


def exchanged(text):
  """Returns the kind and the bytes of each exchange in a compiled program."""
  return [(kind, each.bytes) for kind, each in compiled_lib.exchanges(text)]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_has_two_all_reduces_a_batch_norm_and_two_more(name):
  norms = NETWORKS[name][1]
  lowered, compiled = texts(name)
  # Before XLA merges any, where it holds on every platform, and after.
  assert lowered.count('"stablehlo.all_reduce"') == 2 * norms + 2
  assert 2 <= kinds(compiled).count("all-reduce") <= 2 * norms + 2


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_exchanged_for_the_teacher_or_the_data(name):
  student, teacher = texts(name)[1], texts(name, taught=False)[1]
  assert exchanged(student) == exchanged(teacher)
  assert set(kinds(student)) == {"all-reduce"}
  # Labels and images are integers too, but only the errors and the count are summed over the devices.
  found = [each for _, each in compiled_lib.exchanges(student)]
  assert [each.bytes for each in found if re.match(r"\(?[su]\d", each.shape)] == [2 * 4]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_calls_nothing_on_the_host(name):
  for taught in (True, False):
    text = texts(name, taught=taught)[1]
    assert "custom-call" not in text
    assert "callback" not in text
    assert " conditional(" not in text  # nothing that is done for one platform is left to be chosen by the program
    assert not {"send", "recv", "infeed", "outfeed"} & set(kinds(text))


def test_a_callback_would_be_seen():
  def step(x):
    jax.debug.print("{}", x)
    return devices_lib.psum(x)

  devices = tuple(jax.devices())
  mapped = devices_lib.pmap(step, devices=devices, in_axes=(0,))
  text = mapped.lower(np.zeros((len(devices), 2), np.float32)).compile().as_text()
  assert "custom-call" in text
  assert "callback" in text


def test_batch_statistics_of_each_device_take_one_more_all_reduce():
  cfg = config(train__sync_batch_stats=False)
  program = train_program(cfg, tuple(jax.devices()))
  lowered = program.step.lower(*program.arguments)
  assert lowered.as_text().count('"stablehlo.all_reduce"') == 3
  assert 2 <= kinds(lowered.compile().as_text()).count("all-reduce") <= 3


def test_an_evaluation_step_has_two_all_reduces():
  program = eval_program(config(), tuple(jax.devices()))
  lowered = program.step.lower(*program.arguments)
  assert lowered.as_text().count('"stablehlo.all_reduce"') == 2
  assert kinds(lowered.compile().as_text()) == ["all-reduce"] * 2


def test_collectives_do_not_depend_on_the_number_of_devices():
  two, four = (exchanged(texts("wide_resnet", count=count)[1]) for count in (2, 4))
  assert two == four != []


def test_sums_are_exact_for_whole_numbers_and_keep_types_and_shapes():
  devices = tuple(jax.devices())
  tree = {
    "count": np.array([2**24, 1, 0, 0], np.int32),  # 2^24 + 1 is no float32
    "loss": np.array([0.5, 1.5, 2.0, 4.0], np.float32),
    "kernel": np.arange(24, dtype=np.float32).reshape(4, 2, 3),
    "none": (),
  }
  summed = devices_lib.pmap(devices_lib.psum, devices=devices, in_axes=(0,))(tree)
  for name in ("count", "loss", "kernel"):
    assert summed[name].dtype == tree[name].dtype
    np.testing.assert_array_equal(summed[name], np.broadcast_to(tree[name].sum(0), tree[name].shape))
  mean = devices_lib.pmap(devices_lib.pmean, devices=devices, in_axes=(0,))(tree["kernel"])
  np.testing.assert_array_equal(mean, np.broadcast_to(tree["kernel"].mean(0), mean.shape))


def test_the_index_vector_is_all_that_a_step_takes_from_the_host():
  cfg, devices = config(), tuple(jax.devices())
  program = train_program(cfg, devices)
  dataset = data.load(cfg.data)
  _, model = make_models(cfg, dataset.spec)
  variables = jax.device_get(model.init(jax.random.key(0)))
  state = jax.device_get(Updates(optim.make(cfg.optim, 1).transformation).init(model.init(jax.random.key(0)), {}))
  state = devices_lib.broadcast(state, devices)
  teachers = devices_lib.broadcast((variables,), devices)
  arrays = devices_lib.broadcast_split(dataset, "train", devices)
  key_data = devices_lib.broadcast(jax.random.key_data(jax.random.key(0)), devices)
  batches = np.arange(cfg.train.batch_size, dtype=np.int32)[None]
  feed = next(feeding.feeds(dataset, "train", batches, [1], devices))  # as a run does
  placed = devices_lib.place(feed, devices)
  carry = ((), ((),))
  state, carry, _ = program.step(state, teachers, carry, arrays, feed, key_data)  # compiles
  with jax.transfer_guard("disallow"):
    for _ in range(2):
      state, carry, sums = program.step(state, teachers, carry, arrays, placed, key_data)
      jax.block_until_ready(sums)
    with pytest.raises(Exception, match="host-to-device"):
      program.step(state, teachers, carry, arrays, feed, key_data)


MARKS = {"cpu": 111111, "cuda": 222222, "tpu": 333333}  # show which platform a program is for


@functools.cache
def marked(name, make):
  """Returns a program's step as it is traced, once for all platforms."""
  program = make(NETWORKS[name][0], tuple(jax.devices()))
  marks = {platform: functools.partial(np.int32, value) for platform, value in MARKS.items()}

  def step(*arguments):
    return program.step(*arguments), jax.lax.platform_dependent(**marks)

  return jax.jit(step).trace(*program.arguments)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("platform", MARKS)
def test_the_steps_are_lowered_for_every_platform(platform, name):
  _, norms, forward, training = NETWORKS[name]
  for make, products in ((eval_program, forward), (train_program, training)):
    text = marked(name, make).lower(lowering_platforms=(platform,)).as_text()
    assert [key for key, value in MARKS.items() if f"dense<{value}>" in text] == [platform]
    assert text.count("stablehlo.convolution") + text.count("stablehlo.dot_general") == products
    assert "stablehlo.all_reduce" in text
    # What is done for one platform follows the platform lowered for, whatever this process runs on: on CPU alone
    # activations stand behind barriers, and 1x1 convolutions are products.
    pointwise = re.findall(r"stablehlo\.convolution.*: \(tensor<\S+>, tensor<1x1x\d+x\d+xf32>\)", text)
    assert bool(pointwise) == (platform != "cpu" and norms > 0)
    # (A rematerialised network has barriers of its own, fewer.)
    assert (text.count("stablehlo.optimization_barrier") >= norms) == (platform == "cpu" or not norms)


def hand_count(size, width=16, classes=10, channels=3):
  """Returns the operations of WRN-10-1's forward pass on one image, and those of its stem, from its list of layers."""
  stem = 2 * size**2 * 9 * channels * width
  total, before = stem, width
  for stage in range(3):
    after, size = width * 2**stage, size // 2 if stage else size
    total += 2 * size**2 * 9 * (before * after + after * after)
    total += 2 * size**2 * before * after if before != after else 0  # the 1x1 shortcut
    before = after
  return total + 2 * before * classes, stem


@pytest.mark.parametrize("count", [1, 4])
def test_operations_are_those_of_a_count_by_hand(count):
  cfg = cifar.get_config("cifar10,wrn_10_1,paper")
  forward, stem = hand_count(32)
  devices = tuple(jax.devices()[:count])
  each = cfg.train.batch_size // count
  assert programs.count_flops(eval_program(cfg, devices)) == each * forward
  # Forward, and two gradients for each product except the stem's; then the same with a teacher's forward pass.
  assert programs.count_flops(train_program(cfg, devices, taught=False)) == each * (3 * forward - stem)
  assert programs.count_flops(train_program(cfg, devices)) == each * (4 * forward - stem)


def test_operations_of_an_lstm_are_those_of_a_count_by_hand():
  cfg = pydoc.get_config("pydoc,lstm_32,smoke")
  devices, units, words = tuple(jax.devices()), 32, data.load(cfg.data).spec.num_classes
  tokens = cfg.train.batch_size // len(devices) * cfg.data.window
  layer = 2 * 2 * units * 4 * units  # from input and state to four gates
  forward = tokens * (2 * layer + 2 * units * words)
  assert programs.count_flops(eval_program(cfg, devices)) == forward
  assert programs.count_flops(train_program(cfg, devices)) == 4 * forward


def test_operations_agree_with_xla():
  program = train_program(cifar.get_config("cifar10,wrn_10_1,paper"), tuple(jax.devices()[:1]))
  # XLA does not count taps on padding, and does count the operations between the products.
  assert program.step.lower(*program.arguments).cost_analysis()["flops"] == pytest.approx(
    programs.count_flops(program), rel=0.1
  )


def test_a_scan_counts_its_steps_and_an_unknown_loop_is_refused():
  def product(carry, _):
    return carry @ carry, None

  x = jax.ShapeDtypeStruct((3, 3), np.float32)
  scanned = programs.Program(lambda x: jax.lax.scan(product, x, None, length=5)[0], (x,))
  assert programs.count_flops(scanned) == 5 * 2 * 3**3
  loop = programs.Program(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x), (x,))
  with pytest.raises(ValueError, match="loop of unknown length"):
    programs.count_flops(loop)


@pytest.mark.parametrize("make", [train_program, eval_program])
def test_a_batch_that_the_devices_cannot_share_is_refused(make):
  with pytest.raises(ConfigError, match="train.batch_size=21 cannot be shared equally by 2 devices"):
    make(config(train__batch_size=21), tuple(jax.devices()[:2]))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_convolutions_in_bfloat16_are_neither_transposed_nor_converted(platform):
  cfg = cifar.get_config("cifar10,wrn_10_1,paper")
  cfg.compute_dtype = "bfloat16"
  program = train_program(cfg, tuple(jax.devices()[:2]))
  text = jax.jit(program.step).trace(*program.arguments).lower(lowering_platforms=(platform,)).as_text()
  convolutions = re.findall(r"stablehlo\.convolution.*: \((tensor<\S+>), (tensor<\S+>)\) -> (tensor<\S+>)", text)
  assert len(convolutions) == 35  # 7 of 3x3 and 2 of 1x1, forward for each network, 8 and 9 gradients
  assert all(tensor.endswith("xbf16>") for each in convolutions for tensor in each)
  # NHWC throughout: nothing of four axes is transposed; kernels are turned round inside the convolutions.
  assert not re.findall(r"stablehlo\.transpose.*: \(tensor<\d+x\d+x\d+x\d+x", text)


def test_dropout_draws_have_no_axis_of_two():
  # A TPU pads the last axis to 128. (Keys are two words each.)
  assert not re.findall(r"tensor<(?:\d+x){2,}2xui(?:16|32)>", texts("lstm")[0])


def test_no_state_has_a_device_axis():
  program = train_program(NETWORKS["lstm"][0], tuple(jax.devices()))
  state, carry, sums = jax.eval_shape(program.step, *program.arguments)
  assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, program.arguments[0])
  assert sums.ndim == 2
  assert {leaf.shape[0] for leaf in jax.tree.leaves(carry)} == {len(jax.devices())}


def test_state_and_carry_are_donated_and_the_teacher_is_not():
  for name in ("wide_resnet", "lstm"):
    program = train_program(NETWORKS[name][0], tuple(jax.devices()))
    lowered = program.step.lower(*program.arguments).as_text()
    donated = lowered.count("jax.buffer_donor") + lowered.count("tf.aliasing_output")
    assert donated == len(jax.tree.leaves((program.arguments[0], program.arguments[2])))

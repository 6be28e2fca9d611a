"""The language models: counts, values against NumPy, the carry between windows, and characters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import rnn

from ban_jax import devices as devices_lib
from ban_jax import losses, step, teacher
from ban_jax.errors import ConfigError
from ban_jax.models import make_model, recurrent
from ban_jax.models.char_cnn_lstm import BEGIN, END, PADDING, CharacterCNN, CharCNNLSTMOptions, character_table
from ban_jax.types import Batch, InputSpec, TrainState
from ban_jax.updates import Updates
from experiments import parameters

WORDS = ("<eos>", "<unk>", "a", "cab", "bad", "abacadaba", "dab", "decade", "bead", "e", "dacebad")
SPEC = InputSpec("tokens", (6,), len(WORDS), WORDS)
SMALL = {
  "lstm": {"name": "lstm", "units": 5, "layers": 2, "dropout": 0.0, "init_scale": 0.6, "cudnn": False},
  "char_cnn_lstm": {
    "name": "char_cnn_lstm", "char_embedding": 3, "max_width": 4, "filters_per_width": 2, "filters_at_most": 5,
    "highway_layers": 2, "units": 5, "layers": 2, "dropout": 0.0, "init_scale": 0.6, "cudnn": False,
    "max_word_length": 9,
  },
}  # fmt: skip
LARGE = {
  "lstm": SMALL["lstm"] | {"units": 1500, "dropout": 0.65, "init_scale": 0.04},
  "char_cnn_lstm": SMALL["char_cnn_lstm"]
  | {"char_embedding": 15, "max_width": 7, "filters_per_width": 50, "filters_at_most": 200, "units": 650}
  | {"dropout": 0.5, "init_scale": 0.05, "max_word_length": 65},
}
BOTH = pytest.mark.parametrize("name", SMALL)


def build(name, spec=SPEC, compute_dtype="float32", devices=(), **changes):
  return make_model(SMALL[name] | changes, spec, compute_dtype=compute_dtype, devices=devices)


@functools.cache
def initial(model, seed=0):
  return jax.device_get(model.init(jax.random.key(seed)))


def tokens(shape=(4, 6), seed=0):
  return np.random.default_rng(seed).integers(0, len(WORDS), shape).astype(np.int32)


def random_carry(model, batch=4, seed=3):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model.init_carry(batch))


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(model, variables, carry, inputs, *, train=False, key=None, positions=None):
  logits, carry, batch_stats = model.apply(variables, carry, inputs, train=train, key=key, positions=positions)
  assert batch_stats == {}
  return logits, carry


def count(model):
  return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


# ---- Parameters.


@pytest.mark.parametrize(("layers", "parameters"), [(2, 51_022_000), (1, 33_016_000)])
def test_the_paper_s_lstm_has_its_parameters(layers, parameters):
  words = tuple(str(number) for number in range(10_000))
  model = make_model(LARGE["lstm"] | {"layers": layers}, InputSpec("tokens", (35,), 10_000, words))
  assert count(model) == parameters


def test_kim_s_large_model_has_its_parameters():
  # 10,000 words over the 46 characters and two symbols of the Penn Treebank's vocabulary.
  rng = np.random.default_rng(0)
  characters = [chr(ord("0") + number) for number in range(46)]
  words = ("<eos>", "<unk>", *characters)
  words += tuple("".join(rng.choice(characters, 12)) for _ in range(10_000 - len(words)))
  model = make_model(LARGE["char_cnn_lstm"], InputSpec("tokens", (35,), 10_000, words))
  assert abs(count(model) / 19.4e6 - 1) < 0.02
  cnn = jax.eval_shape(model.init, jax.random.key(0))["params"]["cnn"]
  assert cnn["embedding"]["embedding"].shape == (51, 15)
  shapes = [cnn[f"width{width}"]["kernel"].shape for width in range(1, 8)]
  assert shapes == [(15, 50), (30, 100), (45, 150), (60, 200), (75, 200), (90, 200), (105, 200)]


def test_table_6_stands_beside_the_paper_s_counts():
  lines = [line.split("|") for line in parameters.language_table().splitlines()[2:]]
  found = {line[1].strip(): [cell.strip() for cell in line[3:7]] for line in lines}
  assert found["lstm"] == ["2", "51.022", "52", "-1.9%"]
  assert found["lstm_1"] == ["1", "33.016", "52", "-36.5%"]
  assert 19.0 < float(found["cnn_lstm"][1]) < 19.8


@BOTH
def test_parameters_are_initialised_uniformly_and_highway_gates_closed(name):
  variables = initial(build(name, units=40))
  assert variables["batch_stats"] == {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
    if jax.tree_util.keystr(path, simple=True, separator="/").endswith("gate/bias"):
      np.testing.assert_array_equal(leaf, -2)
      continue
    assert leaf.dtype == np.float32
    assert np.abs(leaf).max() <= 0.6, path
    assert leaf.min() < 0 < leaf.max(), path
  scaled = variables["params"]["lstm"]["layer2"]["recurrent_kernel"] / 0.6
  assert abs(scaled.mean()) < 0.03
  assert abs((scaled**2).mean() - 1 / 3) < 0.02


# ---- Values, against references in NumPy and float64.


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def numpy_lstm(layers, carry, x):  # [B, T, D] -> [B, T, units], last states
  last = []
  for layer, (hidden, cell) in zip(layers, carry, strict=True):
    w, u, b = (np.float64(layer[name]) for name in ("input_kernel", "recurrent_kernel", "bias"))
    units = hidden.shape[-1]
    outputs = []
    for t in range(x.shape[1]):
      i, f, g, o = ((x[:, t] @ w + hidden @ u + b)[:, k * units : (k + 1) * units] for k in range(4))
      cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
      hidden = sigmoid(o) * np.tanh(cell)
      outputs.append(hidden)
    x = np.stack(outputs, axis=1)
    last.append((hidden, cell))
  return x, last


def numpy_word(params, word, cut):
  """The vector of a word, from its letters."""
  numbers = {"<eos>": 3, "<unk>": 4} | {letter: 5 + place for place, letter in enumerate("abcde")}
  inside = [word] if word.startswith("<") else list(word)[: cut - 2]
  embedding = params["embedding"]["embedding"]
  x = np.stack([embedding[1], *(embedding[numbers[symbol]] for symbol in inside), embedding[2]])
  values = []
  for width in range(1, 5):
    kernel = params[f"width{width}"]["kernel"].reshape(width, x.shape[-1], -1)
    filled = np.concatenate([x, np.zeros((max(width - len(x), 0), x.shape[-1]))])
    places = [
      sum(filled[start + offset] @ kernel[offset] for offset in range(width))
      for start in range(len(filled) - width + 1)
    ]
    values.append(np.max(places, axis=0))
  return np.tanh(np.concatenate(values) + params["bias"])


def numpy_logits(name, params, carry, inputs):
  if name == "lstm":
    x = np.float64(params["embedding"]["embedding"])[inputs]
  else:
    x = np.stack([[numpy_word(params["cnn"], WORDS[token], 9) for token in row] for row in inputs])
    for layer in ("highway1", "highway2"):
      gate, change = (
        (x @ params[layer][part]["kernel"] + params[layer][part]["bias"]) for part in ("gate", "transform")
      )
      x = sigmoid(gate) * np.maximum(change, 0) + (1 - sigmoid(gate)) * x
  x, last = numpy_lstm([params["lstm"]["layer1"], params["lstm"]["layer2"]], carry, x)
  if name == "lstm":
    kernel = params.get("output_kernel", np.transpose(params["embedding"]["embedding"]))
    return x @ kernel + params["bias"], last
  return x @ params["classifier"]["kernel"] + params["classifier"]["bias"], last


@pytest.mark.parametrize(("name", "changes"), [("lstm", {}), ("lstm", {"tied": False}), ("char_cnn_lstm", {})])
def test_a_window_is_the_formula(name, changes):
  model = build(name, **changes)
  carry, inputs = random_carry(model), np.arange(24).reshape(4, 6) % len(WORDS)  # every word
  logits, last = run(model, initial(model), carry, inputs)
  expected, expected_last = numpy_logits(name, initial(model)["params"], carry, inputs)
  assert logits.shape == (4, 6, len(WORDS))
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), last, tuple(expected_last))


def test_the_recurrence_has_the_gradients_of_a_plain_loop():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
  arguments = normal(3, 12), normal(5, 2, 12), (normal(2, 3), normal(2, 3))
  weights = normal(5, 2, 3), (normal(2, 3), normal(2, 3))

  def plain(kernel, projected, state):
    hidden, cell = state
    outputs = []
    for now in projected:
      i, f, g, o = jnp.split(now + hidden @ kernel, 4, axis=-1)
      cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
      hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
      outputs.append(hidden)
    return jnp.stack(outputs), (hidden, cell)

  def total(function, *arguments):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), function(*arguments), weights)))

  ours, expected = (
    jax.jit(jax.grad(functools.partial(total, function), argnums=(0, 1, 2)))(*arguments)
    for function in (recurrent.recur, plain)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, expected)


def test_the_cell_adds_up_small_steps_in_bfloat16_products():
  # 3000 steps that forget nothing and each add 0.5 * tanh(0.004): in bfloat16 the sum would stop below 1.
  gates = jnp.asarray([0.0, 50.0, 0.004, 0.0], jnp.bfloat16)
  state = jnp.zeros((1, 1)), jnp.zeros((1, 1))
  _, (_, cell) = jax.jit(recurrent.recur)(jnp.zeros((1, 4), jnp.bfloat16), jnp.tile(gates, (3000, 1, 1)), state)
  np.testing.assert_allclose(cell, 3000 * 0.5 * np.tanh(np.float32(gates[2])), rtol=1e-3)


# ---- The carry.


@BOTH
def test_two_windows_with_the_carry_are_one_long_window(name):
  model = build(name)
  inputs = tokens((4, 12))
  whole, last = run(model, initial(model), random_carry(model), inputs)
  first, carry = run(model, initial(model), random_carry(model), inputs[:, :6])
  second, carry = run(model, initial(model), carry, inputs[:, 6:])
  np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carry, last)
  forgotten, _ = run(model, initial(model), model.init_carry(4), inputs[:, 6:])
  assert np.abs(forgotten - second).max() > 1e-3


@BOTH
def test_the_carry_is_rows_of_float32_by_the_model_s_own_width(name):
  narrow, wide = (build(name, units=units, layers=layers) for units, layers in ((5, 1), (7, 2)))
  for model, units, layers in ((narrow, 5, 1), (wide, 7, 2)):
    before = jax.tree.map(np.asarray, model.init_carry(3))
    assert [leaf.shape for leaf in jax.tree.leaves(before)] == [(3, units)] * 2 * layers
    assert not any(leaf.any() for leaf in jax.tree.leaves(before))
    _, after = run(model, initial(model), before, tokens((3, 6)))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) == (b.shape, np.float32), before, after)
    assert all(jax.tree.leaves(same))


@BOTH
def test_no_position_sees_later_inputs(name):
  model = build(name)
  inputs, changed = tokens(), tokens()
  changed[:, 3] = (changed[:, 3] + 1) % len(WORDS)
  before, after = (run(model, initial(model), model.init_carry(4), each)[0] for each in (inputs, changed))
  np.testing.assert_array_equal(before[:, :3], after[:, :3])
  assert (np.abs(before[:, 3:] - after[:, 3:]).max(axis=(0, 2)) > 1e-4).all()


def test_no_gradient_comes_from_later_inputs():
  model = build("lstm")
  inputs = np.arange(6)[None]  # every word once; the logit of word 7 uses none of their output rows

  def logit(params, place):
    return model.apply({"params": params}, model.init_carry(1), inputs, train=False)[0][0, place, 7]

  for place in range(6):
    rows = jax.jit(jax.grad(logit))(initial(model)["params"], place)["embedding"]["embedding"]
    reached = np.abs(rows[:6]).max(axis=1) > 0
    np.testing.assert_array_equal(reached, np.arange(6) <= place)


# ---- Through the training step.


def fetch(arrays, index, *, key, positions, train):
  windows = arrays["windows"][index]
  return Batch(windows[:, :-1], windows[:, 1:], jnp.ones_like(windows[:, 1:], bool))


SGD = optax.sgd(1.0)
STREAM = tokens((4, 13), seed=5)


def trained(model, count, inputs, carry, label="label", teachers=(), key=1):
  """Returns (parameters, student's carry, teachers' carries) after one step of plain SGD with rate 1."""
  group = {"name": label, "temperature": 1.0, "label_weight": 0.5, "teacher_weight": 0.5, "smoothing": 0.1}
  devices = tuple(jax.devices()[:count])
  train_step = step.make_train_step(
    student=model,
    teaching=teacher.live(teachers) if teachers else teacher.none(),
    frozen=(),
    loss=losses.make_loss(group),
    updates=Updates(SGD),
    fetch=fetch,
    devices=devices,
    sync_batch_stats=True,
    gradient_split=False,
  )
  variables = initial(model)
  state = TrainState(np.int32(0), variables["params"], variables["batch_stats"], SGD.init(variables["params"]))
  carries = carry, tuple(other.init_carry(len(inputs)) for other in teachers)
  state, carries, _ = train_step.run(
    devices_lib.broadcast(jax.device_get(state), devices),
    devices_lib.broadcast(tuple(initial(other, 8) for other in teachers), devices),
    devices_lib.split_rows(carries, devices),
    devices_lib.broadcast({"windows": inputs}, devices),
    {"index": devices_lib.split_batches(np.arange(len(inputs))[None], devices)},
    devices_lib.broadcast(jax.random.key_data(jax.random.key(key)), devices),
  )
  assert devices_lib.unreplicate(state).batch_stats == {}
  return (devices_lib.unreplicate(state).params, *devices_lib.join_rows(carries, devices))


@BOTH
def test_a_step_takes_the_state_across_the_boundary_and_no_gradient(name):
  model = build(name)
  params = initial(model)["params"]
  before, window = STREAM[:, :7], STREAM[:, 6:]
  _, carry = run(model, initial(model), random_carry(model), before[:, :-1])

  def mean_loss(params, through):
    # With `through`, the gradient also reaches the previous window, which it must not in training.
    whole = model.apply({"params": params}, random_carry(model), before[:, :-1], train=False)[1]
    start = whole if through else carry
    logits = model.apply({"params": params}, start, window[:, :-1], train=False)[0]
    return losses.label_cross_entropy(logits, window[:, 1:]).mean()

  right, wrong = (jax.jit(jax.grad(functools.partial(mean_loss, through=through)))(params) for through in (False, True))
  after, last, _ = trained(model, 1, window, jax.device_get(carry))
  updates = jax.tree.map(lambda a, b: a - b, params, after)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), updates, right)
  difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), updates, wrong)
  assert max(jax.tree.leaves(difference)) > 1e-3
  expected = run(model, initial(model), carry, window[:, :-1])[1]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), last, expected)


def test_a_student_and_its_teacher_carry_states_of_their_own_on_any_number_of_devices():
  student = build("lstm", dropout=0.4)
  teacher = build("char_cnn_lstm", units=7, layers=1)
  one, two = (trained(student, count, STREAM, random_carry(student), "ban_label", (teacher,)) for count in (1, 2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)
  _, expected = run(teacher, initial(teacher, 8), teacher.init_carry(4), STREAM[:, :-1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one[2], (expected,))
  plain = trained(student, 1, STREAM, random_carry(student))
  assert np.abs(plain[0]["bias"] - one[0]["bias"]).max() > 1e-3  # the teacher matters


# ---- Dropout.


@BOTH
def test_dropout_belongs_to_the_position(name):
  model = build(name, dropout=0.5)
  inputs, carry, key = np.repeat(tokens((1, 6)), 4, axis=0), model.init_carry(4), jax.random.key(5)
  rows = lambda tree, part: jax.tree.map(lambda leaf: leaf[part], tree)  # noqa: E731

  def train(part, key=key):
    positions = np.arange(4)[part]
    return run(model, initial(model), rows(carry, part), inputs[part], train=True, key=key, positions=positions)

  whole = train(slice(0, 4))
  for part in (slice(0, 2), slice(2, 4)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), train(part), rows(whole, part))
  logits = np.asarray(whole[0])
  for other in (logits[[1, 2, 3, 0]], train(slice(0, 4), jax.random.key(6))[0]):
    assert np.abs(logits - other).max() > 1e-2


def test_dropout_is_on_the_embedding_and_after_every_layer_and_never_on_the_state():
  for name, masks in (("lstm", 3), ("char_cnn_lstm", 2)):  # Kim et al. have no dropout on word vectors
    model = build(name, dropout=0.5)
    settings = {"train": True, "key": jax.random.key(0), "positions": np.arange(4)}
    program = jax.make_jaxpr(functools.partial(model.apply, **settings))(initial(model), model.init_carry(4), tokens())
    assert str(program).count("random_bits[") == masks, name
  # Dropout follows a layer: the state of the first layer is unaffected.
  model = build("char_cnn_lstm", dropout=0.5)
  options = {"train": True, "key": jax.random.key(0), "positions": jnp.arange(4)}
  dropping = run(model, initial(model), model.init_carry(4), tokens(), **options)[1]
  plain = run(model, initial(model), model.init_carry(4), tokens())[1]
  np.testing.assert_allclose(dropping[0][0], plain[0][0], rtol=1e-6)
  assert np.abs(dropping[1][0] - plain[1][0]).max() > 1e-2


@BOTH
def test_evaluation_drops_nothing_and_needs_no_key(name):
  plain, dropping = build(name), build(name, dropout=0.5)
  given = {"key": jax.random.key(0), "positions": jnp.arange(4)}
  first, again = (run(dropping, initial(plain), plain.init_carry(4), tokens(), **options) for options in ({}, given))
  expected = run(plain, initial(plain), plain.init_carry(4), tokens())
  jax.tree.map(np.testing.assert_array_equal, first, again)
  jax.tree.map(np.testing.assert_array_equal, first, expected)


# ---- bfloat16.


@BOTH
def test_bfloat16_is_near_and_its_state_float32(name):
  model, reduced = build(name, dropout=0.3), build(name, dropout=0.3, compute_dtype="bfloat16")
  options = {"train": True, "key": jax.random.key(0), "positions": jnp.arange(4)}

  def total(params, model):
    logits, carry, _ = model.apply({"params": params}, random_carry(model), tokens(), **options)
    return (logits**2).sum(), (logits, carry)

  (_, full), full_gradient = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)(
    initial(model)["params"], model
  )
  (_, half), half_gradient = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)(
    initial(model)["params"], reduced
  )
  assert {leaf.dtype for leaf in jax.tree.leaves((half, half_gradient))} == {jnp.dtype("float32")}
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), full, half)
  for a, b in zip(jax.tree.leaves(full_gradient), jax.tree.leaves(half_gradient), strict=True):
    assert np.abs(a - b).max() < 0.1 * np.abs(full_gradient["lstm"]["layer1"]["bias"]).max() + 0.1 * np.abs(a).max()
  assert np.abs(full[0] - half[0]).max() > 0


# ---- cuDNN, as far as testable without a GPU.


@functools.partial(jax.jit, static_argnames=("input_size", "hidden_size", "num_layers", "dropout", "bidirectional"))
def reference_lstm(x, h_0, c_0, weights, seq_lengths, *, input_size, hidden_size, num_layers, dropout, bidirectional):
  """Computes what cuDNN does with its packed weights, by JAX's own reference."""
  assert weights.size == rnn.get_num_params_in_lstm(input_size, hidden_size, num_layers, bidirectional)
  unpacked = rnn.unpack_lstm_weights(weights, input_size, hidden_size, num_layers, bidirectional)
  return rnn.lstm_ref(x, h_0, c_0, *unpacked, seq_lengths, input_size, hidden_size, num_layers, dropout, bidirectional)


@BOTH
def test_cudnn_s_weights_and_state_are_ours(name, monkeypatch):
  monkeypatch.setattr(rnn, "lstm", reference_lstm)
  plain, packed = build(name), build(name, cudnn=True)
  assert jax.tree.map(np.shape, initial(plain)) == jax.tree.map(np.shape, initial(packed))

  def total(params, model):
    logits, carry, _ = model.apply({"params": params}, random_carry(model), tokens(), train=False)
    return (logits**2).sum() + sum((leaf**2).sum() for leaf in jax.tree.leaves(carry)), (logits, carry)

  ours, theirs = (
    jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)(initial(plain)["params"], model)
    for model in (plain, packed)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
  in_program = [
    str(jax.make_jaxpr(total, static_argnums=1)(initial(plain)["params"], model)).count("name=reference_lstm")
    for model in (plain, packed)
  ]
  assert in_program == [0, 2]  # each layer uses cuDNN, and only on request


@BOTH
def test_cudnn_is_refused_where_it_is_not_available(name):
  with pytest.raises(
    ConfigError, match=r"model.cudnn=True needs an NVIDIA GPU, and this is \w+; choose model.cudnn=False"
  ):
    build(name, cudnn=True, units=6, devices=tuple(jax.devices("cpu")))


@BOTH
def test_cudnn_is_refused_in_bfloat16(name):
  class Client:
    platform_version = "PJRT C API\ncuda 12090"

  class Gpu:
    platform, device_kind, client = "gpu", "NVIDIA H100", Client

  # It is asked of the devices that the network is to run on, which need not be those of the process.
  with pytest.raises(ConfigError, match="computes in float32 only, not in bfloat16; choose compute_dtype float32"):
    build(name, cudnn=True, compute_dtype="bfloat16", devices=(Gpu,))
  build(name, cudnn=True, devices=(Gpu,))
  Client.platform_version = "rocm 60300"
  with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
    build(name, cudnn=True, devices=(Gpu,))


# ---- Characters.


def test_the_table_spells_words_between_boundaries_and_fills_up():
  table, numbers = character_table(("ba", "", "c<é", "<unk>"), 65, 2)
  assert (PADDING, BEGIN, END, numbers) == (0, 1, 2, 9)  # <, <unk>, a, b, c, é in the order of their code points
  b, a, c, less, acute, unknown = 6, 5, 7, 3, 8, 4
  np.testing.assert_array_equal(
    table,
    [
      [BEGIN, b, a, END, PADDING],
      [BEGIN, END, PADDING, PADDING, PADDING],
      [BEGIN, c, less, acute, END],
      [BEGIN, unknown, END, PADDING, PADDING],
    ],
  )


def test_the_table_cuts_long_words_and_is_as_wide_as_the_filters():
  table, numbers = character_table(("abcdef", "a"), 5, 2)
  np.testing.assert_array_equal(table, [[1, 3, 4, 5, 2], [1, 3, 2, 0, 0]])
  assert numbers == 6  # d, e and f are cut off and have no row in the embedding
  assert character_table(("a",), 65, 7)[0].shape == (1, 7)


def test_symbols_share_no_character_with_words_that_are_written_like_them():
  table, _ = character_table(("<eos>", "<unk>", "unk", "<eos", "eos>"), 65, 1)
  symbols, letters = set(table[:2, 1]), set(table[2:].ravel())
  assert len(symbols) == 2
  assert not symbols & letters


def test_a_word_s_vector_does_not_depend_on_how_long_other_words_are():
  words = ("a", "cab", "bead", "<unk>")
  changes = {"max_width": 5, "filters_per_width": 4, "filters_at_most": 4}
  options = {key: value for key, value in (SMALL["char_cnn_lstm"] | changes).items() if key != "name"}
  cnn = CharacterCNN(CharCNNLSTMOptions(**options), 9, jnp.float32)
  short, _ = character_table(words, 65, 5)
  long, _ = character_table((*words, "abcde" * 4), 65, 5)
  assert long.shape[1] > short.shape[1]
  # Both tables contain the same characters, so the ids are the same.
  np.testing.assert_array_equal(long[:4, : short.shape[1]], short)
  variables = jax.jit(cnn.init)(jax.random.key(0), short)
  vectors, among_longer = (jax.jit(cnn.apply)(variables, table) for table in (short, long))
  np.testing.assert_allclose(among_longer[:4], vectors, rtol=1e-6)
  assert np.abs(vectors[:, None] - vectors[None]).max(-1)[~np.eye(4, dtype=bool)].min() > 1e-3


# ---- Errors.


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("lstm", {"units": 0}, "model.units=0: a whole number of at least 1 is expected"),
    ("lstm", {"layers": 1.5}, "model.layers=1.5: a whole number of at least 1 is expected"),
    ("lstm", {"dropout": 1.0}, "model.dropout=1.0: a dropout rate lies in [0, 1)"),
    ("lstm", {"init_scale": 0.0}, "model.init_scale=0.0: a finite number above 0 is expected"),
    ("lstm", {"init_scale": float("inf")}, "model.init_scale=inf: a finite number above 0 is expected"),
    ("lstm", {"cudnn": "yes"}, "model.cudnn=yes: True or False is expected"),
    ("lstm", {"tied": 0}, "model.tied=0: True or False is expected"),
    ("lstm", {"unit": 5}, "takes the options units, layers, dropout, init_scale, cudnn, tied; the configuration gives"),
    ("char_cnn_lstm", {"dropout": -0.5}, "model.dropout=-0.5: a dropout rate lies in [0, 1)"),
    ("char_cnn_lstm", {"layers": 0}, "model.layers=0: a whole number of at least 1 is expected"),
    ("char_cnn_lstm", {"init_scale": -1.0}, "model.init_scale=-1.0: a finite number above 0 is expected"),
    ("char_cnn_lstm", {"cudnn": "no"}, "model.cudnn=no: True or False is expected"),
    ("char_cnn_lstm", {"char_embedding": 0}, "model.char_embedding=0: a whole number of at least 1"),
    ("char_cnn_lstm", {"max_width": 0}, "model.max_width=0: a whole number of at least 1 is expected"),
    ("char_cnn_lstm", {"filters_per_width": -1}, "model.filters_per_width=-1: a whole number of at least 1"),
    ("char_cnn_lstm", {"filters_at_most": 0}, "model.filters_at_most=0: a whole number of at least 1"),
    ("char_cnn_lstm", {"highway_layers": -1}, "model.highway_layers=-1: a whole number of at least 0 is expected"),
    ("char_cnn_lstm", {"max_word_length": 2}, "model.max_word_length=2: a whole number of at least 3 is expected"),
  ],
)
def test_bad_options_are_refused_with_key_value_and_expectation(name, changes, message):
  with pytest.raises(ConfigError) as error:
    build(name, **changes)
  assert message in str(error.value)


@BOTH
def test_language_models_refuse_images(name):
  with pytest.raises(ConfigError, match=f"model '{name}_2x5' reads tokens; the data set holds images"):
    build(name, InputSpec("images", (8, 8, 3), 10))


def test_characters_need_a_vocabulary():
  with pytest.raises(ConfigError, match="the data set gives 0 words for 10 tokens"):
    build("char_cnn_lstm", InputSpec("tokens", (6,), 10))

"""Generations: equal and different bytes, compilation, refusals."""

import logging

import flax
import jax
import numpy as np
import pytest
from conftest import IMAGES, config

import ban_jax
from ban_jax import data, job, losses, models, resolving, trees
from ban_jax import devices as devices_lib
from ban_jax.errors import CheckpointError, ConfigError

QUIET = {"progress": False}
WRN = "digits,wrn_10_1,smoke"


def untrained(cfg):
  """Returns the variables of an untrained network of the configuration."""
  return jax.device_get(models.make_model(cfg.model, data.load(cfg.data).spec).init(jax.random.key(0)))


def bytes_of(tree):
  return {path: leaf.tobytes() for path, leaf in trees.leaves(trees.to_plain(tree)).items()}


@pytest.fixture(scope="module")
def teacher():
  return ban_jax.train_generation(None, config(), **QUIET)


@pytest.fixture(scope="module")
def student(teacher):
  return ban_jax.train_generation(teacher, config(), **QUIET)


def test_a_generation_is_immutable_variables_with_a_lineage(teacher, student):
  assert isinstance(teacher.params, flax.core.FrozenDict)
  assert set(teacher.params) == {"params", "batch_stats", "lineage"}
  for leaf in jax.tree.leaves(teacher.params):
    assert isinstance(leaf, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
      leaf[...] = 0
  assert (teacher.index, student.index) == (0, 1)
  assert (trees.lineage(teacher.params), trees.lineage(student.params)) == (0, 1)
  assert [row["epoch"] for row in student.history] == [1, 2]
  assert student.metrics["test_count"] == 1397


def test_the_teacher_is_the_same_bytes_after_a_generation(teacher):
  before = bytes_of(teacher.params)
  assert any(path.startswith("batch_stats/") for path in before)
  ban_jax.train_generation(teacher.params, config(), **QUIET)
  assert bytes_of(teacher.params) == before


def test_the_same_call_gives_the_same_bytes(teacher, student):
  again = ban_jax.train_generation(teacher.params, config(), **QUIET)  # the tree in place of the Generation
  assert bytes_of(again.params) == bytes_of(student.params)
  assert again.metrics == student.metrics
  other = ban_jax.train_generation(teacher.params, config(seed=1), **QUIET)
  assert bytes_of(other.params) != bytes_of(student.params)


def test_bare_trees_start_each_generation_from_initial_params_of_its_own(monkeypatch):
  # At this rate nothing moves, so the result is the initial state.
  cfg = config(optim__learning_rate=1e-30, optim__weight_decay=0.0, train__epochs=1, train__evaluate_every=0)
  params, kernels = None, []
  for _ in range(3):
    params = ban_jax.train_generation(params, cfg, **QUIET).params
    kernels.append(params["params"]["layer1"]["kernel"])
  for first, second in ((0, 1), (0, 2), (1, 2)):
    assert not np.allclose(kernels[first], kernels[second])
  assert trees.lineage(params) == 2
  bare = {name: tree for name, tree in params.items() if name != "lineage"}
  assert ban_jax.train_generation(bare, cfg, **QUIET).index == 1  # a tree without a lineage counts as generation 0


def test_separate_calls_trace_and_compile_two_training_programs(monkeypatch, caplog):
  traced = []

  def counting(name):
    original = losses.LOSSES[name]

    def counted(logits, labels, teacher_logits, *, key, positions):
      traced.append(name)
      return original.apply(logits, labels, teacher_logits, key=key, positions=positions, **OPTIONS[name])

    return original._replace(apply=counted)

  OPTIONS = {"label": {}, "ban": {"temperature": 1.0}}
  for name in OPTIONS:
    monkeypatch.setitem(losses.LOSSES, name, counting(name))
  cfg = config(train__evaluate_every=0)
  with jax.log_compiles(), caplog.at_level(logging.WARNING):
    params = ban_jax.train_generation(None, cfg, **QUIET).params
    for _ in range(3):
      params = ban_jax.train_generation(params, cfg, **QUIET).params
    params = jax.tree.map(np.array, flax.core.unfreeze(params))  # a plain dict works like a FrozenDict
    ban_jax.train_generation(params, config(train__evaluate_every=0, seed=5), **QUIET)
  assert traced == ["label", "ban"]
  compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(_fun)")]  # by pmap
  assert len(compiled) <= 3  # two training programs and at most one evaluation


def test_a_run_by_shard_map_has_the_bytes_of_one_by_pmap(teacher, student):
  other = ban_jax.train_generation(teacher, config(train__mapping="shard_map"), **QUIET)
  assert bytes_of(other.params) == bytes_of(student.params)
  with pytest.raises(ConfigError, match="unknown train.mapping 'vmap'; choose one of: pmap, shard_map"):
    ban_jax.train_generation(None, config(train__mapping="vmap"), **QUIET)


@pytest.mark.parametrize(
  ("words", "loss"), [(WRN, "label"), (IMAGES, "ban"), (IMAGES, "cwtm"), (IMAGES, "dkpp")], ids=str
)
def test_one_device_and_four_agree(words, loss, teacher):
  # Dropout, crops and synchronised batch norm are on; 3 steps keep reordered sums from growing apart.
  cfg = config(words, model__dropout=0.3, data__flip=True, train__epochs=1, data__train_examples=60, loss__name=loss)
  parent, begun = None if loss == "label" else teacher, untrained(cfg)
  one, four = (
    ban_jax.train_generation(parent, cfg, initial=begun, devices=jax.devices()[:n], **QUIET).params for n in (1, 4)
  )
  one, four, start = (trees.leaves(trees.to_plain(tree)) for tree in (one, four, begun))
  for path in one:
    moved = np.linalg.norm(one[path] - start[path])
    assert np.linalg.norm(four[path] - one[path]) < 2e-3 * moved + 1e-6, path


def test_unsynchronised_batch_statistics_are_averaged_over_devices():
  # At this rate no weight moves, so both see the same activations.
  still = {"train__epochs": 1, "optim__learning_rate": 1e-30, "optim__weight_decay": 0.0}
  four = ban_jax.train_generation(None, config(train__sync_batch_stats=False, **still), **QUIET)
  sync = ban_jax.train_generation(None, config(**still), **QUIET)
  mean = "batch_stats/norm1/mean"  # of the first layer: the mean of device means is the batch's
  a, b = (trees.leaves(g.params)[mean] for g in (four, sync))
  np.testing.assert_allclose(a, b, atol=1e-5)
  assert bytes_of(four.params) != bytes_of(sync.params)


def test_several_generations_teach_together(teacher, student):
  taught = ban_jax.train_generation([teacher, student.params], config(train__epochs=1), **QUIET)
  assert taught.index == 2
  assert bytes_of(taught.params) != bytes_of(ban_jax.train_generation(student, config(train__epochs=1), **QUIET).params)


def test_how_teachers_teach_is_checked_before_any_work(teacher, student):
  with pytest.raises(ConfigError, match=r"teacher.weights=\(1.0, 2.0, 3.0\): expected 2 numbers of at least 0"):
    ban_jax.train_generation([teacher, student], config(teacher__weights=(1.0, 2.0, 3.0)), **QUIET)
  for changes, message in (
    ({"teacher__weights": (0.0, 0.0)}, "teacher.weights=.*expected .., or a tuple of numbers of at least 0, not all"),
    ({"teacher__view": "mine"}, "unknown teacher.view 'mine'; choose one of: other, plain, same"),
    ({"data__augment": ("mix",)}, "unknown data.augment 'mix'; choose one of: cutmix, erasing, mixup"),
  ):
    with pytest.raises(ConfigError, match=message):
      ban_jax.train_generation(teacher, config(**changes), **QUIET)
  text = ban_jax.get_config("pydoc,lstm_32,smoke")
  text.teacher.view = "plain"
  with pytest.raises(ConfigError, match="teacher.view='plain': expected 'same', because pydoc is text"):
    ban_jax.train_generation(None, text, **QUIET)


def test_gradient_split_is_in_the_history_of_students_alone(teacher):
  cfg = config(train__gradient_split=True, train__epochs=1)
  row = ban_jax.train_generation(teacher, cfg, **QUIET).history[0]
  assert 0 < row["dark_share"] < 1
  assert 0.1 < row["teacher_confidence"] <= 1
  assert -1 < row["correct_gradient"] < 1
  assert 0 < row["teacher_entropy"] < np.log(10)
  assert "dark_share" not in ban_jax.train_generation(None, cfg, **QUIET).history[0]


def test_another_network_can_teach(tmp_path):
  cfg = config("digits,densenet_10_16,smoke,teacher=mlp_16", train__epochs=1)
  generations = ban_jax.run(cfg.copy_and_resolve_references(), tmp_path / "run", **QUIET)
  assert ["transition1" in g.params["params"] for g in generations] == [False, True]
  both = ban_jax.evaluate(generations, cfg)  # an ensemble of both kinds
  assert both["count"] == 1397
  again = ban_jax.train_generation(generations[1], cfg, **QUIET)  # the teacher is itself a student
  assert again.index == 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data__name": "mnist"}, "unknown data set 'mnist'; choose one of: cifar10, cifar100, digits"),
    ({"model__name": "vgg"}, "unknown model 'vgg'; choose one of: .*wide_resnet"),
    (
      {"loss__name": "kd"},
      "unknown loss 'kd'; choose one of: annealed, ban, ban_label, cwtm, dkpp, entropy",
    ),
    ({"model__layers": 0}, "model.layers=0: a whole number of at least 1 is expected"),
    ({"model__dropout": 1.0}, r"model.dropout=1.0: a dropout rate lies in \[0, 1\)"),
    ({"compute_dtype": "float16"}, "unknown compute_dtype 'float16'; choose one of: bfloat16, float32"),
    ({"optim__schedule": "linear"}, "unknown optim.schedule 'linear'; choose one of: constant, cosine, plateau, steps"),
    ({"optim__boundaries": (0.5, 0.3)}, "optim.boundaries=.* expected rising shares"),
    ({"optim__learning_rate": 0.0}, "optim.learning_rate=0.0: expected a finite number above 0"),
    ({"optim__momentum": 1.0}, r"optim.momentum=1.0: expected a share in \[0, 1\)"),
    ({"train__epochs": 0}, "train.epochs=0: expected a whole number of at least 1"),
    ({"train__batch_size": 18}, "train.batch_size=18 cannot be shared equally by 4 devices; use 1, 2, 3 devices"),
    ({"train__batch_size": 200}, "200.*100"),
  ],
)
def test_wrong_configurations_are_answered_before_any_work(changes, message):
  with pytest.raises(ConfigError, match=message):
    ban_jax.train_generation(None, config(**changes), **QUIET)


def test_trees_that_do_not_fit_are_named(teacher):
  with pytest.raises(CheckpointError, match="teacher must be a variables tree with 'params'.*not a mapping with stem"):
    ban_jax.train_generation({"stem": 1}, config(), **QUIET)
  wide = config(model__units=32)
  expected = r"teacher does not fit model mlp_1_32 with 10 classes: at batch_stats/norm1/mean the model has "
  with pytest.raises(CheckpointError, match=expected + r"float32\[32\], the tree float32\[16\]"):
    ban_jax.train_generation(teacher.params, wide, **QUIET)  # a bare tree is of the network that is configured
  with pytest.raises(CheckpointError, match=r"member 2 does not fit model mlp_1_16.*the tree nothing"):
    ban_jax.evaluate([teacher, {"params": {}}], config())
  with pytest.raises(ConfigError, match="an empty sequence cannot teach"):
    ban_jax.train_generation([], config(), **QUIET)
  spec = data.load(config().data).spec._replace(num_classes=7)
  other = models.make_model(config().model, spec).init(jax.random.key(0))
  with pytest.raises(CheckpointError, match=r"with 10 classes: at params/classifier/bias .*\[10\], the tree .*\[7\]"):
    ban_jax.train_generation(jax.device_get(other), config(), **QUIET)


def test_a_network_with_bad_numbers_does_not_teach(teacher):
  broken = jax.tree.map(np.array, flax.core.unfreeze(teacher.params))
  broken["params"]["layer1"]["kernel"][0, 0] = np.nan
  with pytest.raises(CheckpointError, match="not finite"):
    ban_jax.train_generation(broken, config(), **QUIET)


MATCHED = "digits,small_wide_match_1_1,smoke,teacher=densenet_10_16"  # which has the widths of DenseNet-16-8


@pytest.fixture(scope="module")
def dense_teacher():
  return ban_jax.train_generation(None, config(MATCHED, train__epochs=1), **QUIET)


@pytest.mark.parametrize("loss", ["ban", "label"])  # a student, and its baseline from the labels
def test_layers_copied_from_the_teacher_keep_their_bytes_and_all_others_change(loss, dense_teacher):
  cfg = config(MATCHED, loss__name=loss, train__epochs=1)
  begun = untrained(cfg)
  student = ban_jax.train_generation(dense_teacher, cfg, initial=begun, **QUIET).params
  start = trees.leaves(begun)
  teacher = trees.leaves(dense_teacher.params)
  for path, leaf in trees.leaves({"params": student["params"]}).items():
    if path.split("/")[1] in ("stem", "classifier"):
      assert leaf.tobytes() == teacher[path].tobytes(), path
    else:
      assert (leaf != start[path]).any(), path


def test_a_matched_network_without_a_teacher_trains_all_its_layers():
  cfg = config("digits,small_wide_match_1_1,smoke", train__epochs=1)
  begun = untrained(cfg)
  trained = ban_jax.train_generation(None, cfg, initial=begun, **QUIET)
  for path, leaf in trees.leaves({"params": trained.params["params"]}).items():
    assert (leaf != trees.leaves(begun)[path]).any(), path


def test_layers_that_cannot_be_copied_are_refused(dense_teacher):
  cfg = config("digits,small_wide_match_1_1,smoke,teacher=wrn_10_1", train__epochs=1)
  teacher = untrained(config(WRN))
  with pytest.raises(
    ConfigError, match=r"copies stem and classifier .* at classifier/kernel the student has float32\[16, 10\]"
  ):
    ban_jax.train_generation(teacher, cfg, **QUIET)
  with pytest.raises(ConfigError, match="copies stem and classifier from one teacher; 2 were given"):
    ban_jax.train_generation([dense_teacher] * 2, config(MATCHED), **QUIET)


def test_64_bit_mode_is_refused(monkeypatch):
  with jax.enable_x64(True), pytest.raises(ConfigError, match="jax_enable_x64 is set: ban_jax trains in float32"):
    ban_jax.train_generation(None, config(), **QUIET)


def test_settings_that_change_bytes_are_recorded():
  before = devices_lib.layout(tuple(jax.devices()))
  assert before["settings"]["matmul_precision"] == "default"
  with jax.default_matmul_precision("float32"):
    assert devices_lib.layout(tuple(jax.devices()))["settings"]["matmul_precision"] == "float32"


def test_generation_0_has_a_loss_of_its_own(caplog):
  cfg = config(loss__name="label_smoothing", loss__smoothing=0.3, teacher__loss="label_smoothing")
  logits, labels = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32), np.arange(5)
  log_probabilities = np.asarray(jax.nn.log_softmax(logits))
  plain = -log_probabilities[np.arange(5), labels]
  for name, expected in (("label_smoothing", 0.7 * plain - 0.3 * log_probabilities.mean(axis=1)), ("label", plain)):
    assert not caplog.messages
    cfg.teacher.loss = name
    begun = job.prepare(resolving.resolve(cfg, None), None, None)
    values, _ = begun.loss.apply(logits, labels, None, key=None, positions=None)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
  assert caplog.messages == [
    "generation 0 is trained by teacher.loss='label'; loss.name='label_smoothing' is its students' loss"
  ]
  with pytest.raises(ConfigError, match="teacher.loss='ban': expected a loss that needs no teacher: label, label_smoo"):
    resolving.resolve(config(teacher__loss="ban"), None)

"""Training language models: carried states, the plateau schedule, resumption, evaluation."""

import collections

import jax
import numpy as np
import pytest
from conftest import IMAGES

import ban_jax
from ban_jax import data, optim, resolving, storage, train, trees
from ban_jax import devices as devices_lib
from ban_jax import job as job_lib
from ban_jax.config import check_dataset
from ban_jax.errors import CheckpointError, ConfigError, TrainingError
from ban_jax.evaluating import Subject, measure
from ban_jax.resolving import make_models
from configs import digits, pydoc

QUIET = {"progress": False}


def config(words="pydoc,lstm_32,smoke", **changes):
  cfg = pydoc.get_config(words)
  cfg.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  return cfg


@pytest.fixture(scope="module")
def teacher():
  return ban_jax.train_generation(None, config(), **QUIET)


# --- the plateau schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("factor", "threshold", "metrics", "rate"),
  [
    (0.25, 0.0, [], 8.0),
    (0.25, 0.0, [100.0], 8.0),
    (0.25, 0.0, [100.0, 99.9], 8.0),
    (0.25, 0.0, [100.0, 100.0], 2.0),
    (0.25, 0.0, [100.0, 101.0, 100.5], 0.5),  # both are worse than the best so far
    (0.25, 0.0, [100.0, 101.0, 99.0], 2.0),
    (0.5, 0.5, [100.0, 99.5], 8.0),
    (0.5, 0.5, [100.0, 99.6], 4.0),
    (0.5, 0.5, [100.0, 99.6, 99.2], 2.0),
    (0.5, 0.5, [100.0, 99.6, 99.0], 4.0),
    (0.5, 0.0, [100.0, np.nan], 4.0),
  ],
)
def test_the_rate_falls_where_an_epoch_brings_too_little(factor, threshold, metrics, rate):
  assert optim.plateau_rate(8.0, metrics, factor=factor, threshold=threshold) == rate


def test_the_rate_that_a_run_reports_is_the_one_that_it_trains_with():
  # The second epoch does not improve by 1000, so the third trains with a quarter of the rate.
  falling = ban_jax.train_generation(None, config(train__epochs=3, optim__threshold=1000.0), **QUIET)
  assert [row["learning_rate"] for row in falling.history] == [20.0, 20.0, 5.0]
  # Without that threshold the rate stays, and the runs agree until it falls in the other one.
  steady = ban_jax.train_generation(None, config(train__epochs=3), **QUIET)
  assert [row["learning_rate"] for row in steady.history] == [20.0, 20.0, 20.0]
  assert steady.history[1]["train_loss"] == falling.history[1]["train_loss"]
  assert steady.history[2]["train_loss"] != falling.history[2]["train_loss"]


def test_setting_the_rate_scales_the_update():
  optimizer = optim.make(config().optim, 1).transformation
  params = {"w": np.float32([1.0, 2.0])}
  gradient = {"w": np.float32([0.01, -0.02])}
  state = optimizer.init(params)
  update, _ = optimizer.update(gradient, state, params)
  slower, _ = optimizer.update(gradient, optim.set_rate(state, np.float32(5.0)), params)
  np.testing.assert_allclose(update["w"], [-0.2, 0.4], rtol=1e-6)
  np.testing.assert_allclose(slower["w"], [-0.05, 0.1], rtol=1e-6)


def test_a_rate_that_falls_compiles_nothing_more():
  events = collections.Counter()
  event = "/jax/core/compile/backend_compile_duration"
  jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.update([name]))
  counts = []
  try:
    # Each has its own optimizer, so its own step; the first also compiles what they share. With one epoch no step comes
    # after the rate is set.
    for momentum, epochs in ((0.1, 1), (0.2, 1), (0.3, 3)):
      before = events[event]
      cfg = config(train__epochs=epochs, optim__momentum=momentum, optim__threshold=1000.0)
      ban_jax.train_generation(None, cfg, **QUIET)
      counts.append(events[event] - before)
  finally:
    jax.monitoring.clear_event_listeners()
  assert counts[1] == counts[2] > 0


def test_a_plateau_needs_a_validation_split():
  cfg = digits.get_config(IMAGES)
  cfg.optim.schedule = "plateau"
  with pytest.raises(ConfigError, match="decides by a validation split, .*data.validation, .* cosine, steps"):
    ban_jax.train_generation(None, cfg, **QUIET)
  cfg.data.validation = 0.1
  cfg.optim.threshold = 1000.0
  assert [row["learning_rate"] for row in ban_jax.train_generation(None, cfg, **QUIET).history] == [0.1, 0.1]


# --- resumption ----------------------------------------------------------------------------------------------------


def interrupted(*_):
  raise KeyboardInterrupt


# 10 steps per epoch, and the rate falls after the second epoch. At step 26 of 30 the carry is that of the third epoch's
# sixth window; the checkpoint of step 20 is the one after which the rate falls and the carry starts again. Student and
# teacher both carry a state.
@pytest.mark.parametrize(("every", "newest"), [(13, 26), (20, 20)])
def test_a_resumed_run_ends_with_the_same_bytes(every, newest, teacher, tmp_path, monkeypatch):
  cfg = config(train__epochs=3, train__checkpoint_every=every, optim__threshold=1000.0)
  whole = ban_jax.train_generation(teacher, cfg, **QUIET)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  with storage.open_steps(storage.resolve_workdir(tmp_path) / "gen_1" / "steps") as manager:
    assert manager.latest_step() == newest
  resumed = ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  assert trees.digest(resumed.params) == trees.digest(whole.params)
  for row, other in zip(resumed.history, whole.history, strict=True):
    assert {**row, "seconds": 0} == {**other, "seconds": 0}
  assert resumed.metrics == whole.metrics
  assert [row["learning_rate"] for row in whole.history] == [20.0, 20.0, 5.0]


def test_other_teachers_are_refused_and_cost_no_checkpoint(teacher, tmp_path, monkeypatch):
  # Two teachers have a state each, so the checkpoint's tree differs; this is not damage.
  cfg = config(train__epochs=3, train__checkpoint_every=13)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  with pytest.raises(CheckpointError, match="gen_1 holds a generation of another origin .teachers: "):
    ban_jax.train_generation([teacher, teacher], cfg, workdir=tmp_path, **QUIET)
  assert sorted(path.name for path in (tmp_path / "gen_1" / "steps").glob("[0-9]*")) == ["13", "26"]


def test_what_is_resumed_from_needs_the_carry(teacher, tmp_path, monkeypatch):
  # With the carry zeroed on restoring, the result differs: the test above can fail.
  cfg = config(train__epochs=3, train__checkpoint_every=13, optim__threshold=1000.0)
  whole = ban_jax.train_generation(teacher, cfg, **QUIET)
  with monkeypatch.context() as patch:
    patch.setattr(storage, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  restore = storage.restore_newest

  def forgetful(*arguments):
    tree, record = restore(*arguments)
    return {**tree, "carry": jax.tree.map(np.zeros_like, tree["carry"])}, record

  monkeypatch.setattr(storage, "restore_newest", forgetful)
  resumed = ban_jax.train_generation(teacher, cfg, workdir=tmp_path, **QUIET)
  assert trees.digest(resumed.params) != trees.digest(whole.params)


# --- teachers, students and their states ---------------------------------------------------------------------------


def test_teacher_and_student_of_different_networks_carry_states_of_their_own():
  cfg = config("pydoc,lstm_32,smoke,teacher=lstm_32")
  cfg.teacher.model.units = 16
  teacher = ban_jax.train_generation(None, cfg, **QUIET)
  job = job_lib.prepare(resolving.resolve(cfg, None), teacher, None)
  _, (own, (taught,)) = train.initial(job)
  rows = cfg.train.batch_size
  assert [leaf.shape for leaf in jax.tree.leaves(own)] == [(rows, 32)] * 4
  assert [leaf.shape for leaf in jax.tree.leaves(taught)] == [(rows, 16)] * 4
  student = ban_jax.train_generation(teacher, cfg, **QUIET)
  assert student.index == 1
  both = ban_jax.evaluate([teacher, student], cfg)
  assert both["count"] == data.load(cfg.data).sizes["test"]


def test_a_student_learns_from_its_teachers_carried_state(teacher):
  # With the teacher's state reset at every step, the student differs.
  cfg = config(train__steps_per_dispatch=1)
  student = ban_jax.train_generation(teacher, cfg, **QUIET)
  real = train.make_train_step
  with pytest.MonkeyPatch.context() as patch:

    def make(**arguments):
      step = real(**arguments)

      def forgetful(state, variables, carry, *rest):
        own, taught = carry
        return step.run(state, variables, (own, jax.tree.map(lambda leaf: leaf * 0, taught)), *rest)

      return step._replace(run=forgetful)

    patch.setattr(train, "make_train_step", make)
    other = ban_jax.train_generation(teacher, cfg, **QUIET)
  assert trees.digest(other.params) != trees.digest(student.params)


@pytest.mark.parametrize("loss", ["cwtm", "dkpp"])  # weights of the whole batch, and draws by position
def test_one_device_and_four_agree(teacher, loss):
  cfg = config(loss__name=loss, train__epochs=1, model__dropout=0.5)
  one, four = (ban_jax.train_generation(teacher, cfg, devices=jax.devices()[:count], **QUIET) for count in (1, 4))
  for path, leaf in trees.leaves(one.params).items():
    np.testing.assert_allclose(trees.leaves(four.params)[path], leaf, rtol=2e-3, atol=2e-4, err_msg=path)
  assert one.history[0]["train_loss"] == pytest.approx(four.history[0]["train_loss"], rel=1e-4)


def test_the_state_begins_anew_with_each_epoch():
  cfg = config(train__steps_per_dispatch=1)
  seen = []
  real = train.make_train_step
  with pytest.MonkeyPatch.context() as patch:

    def make(**arguments):
      step = real(**arguments)

      def watched(state, variables, carry, *rest):
        seen.append(float(sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(carry)))))
        return step.run(state, variables, carry, *rest)

      return step._replace(run=watched)

    patch.setattr(train, "make_train_step", make)
    ban_jax.train_generation(None, cfg, **QUIET)
  steps = len(seen) // cfg.train.epochs
  assert [place for place, size in enumerate(seen) if not size] == [0, steps]


def test_an_image_network_cannot_teach_a_language_model():
  images = digits.get_config(IMAGES)
  images.train.epochs, images.train.evaluate_every = 1, 0
  teacher = ban_jax.train_generation(None, images, **QUIET)
  with pytest.raises(CheckpointError, match=r"teacher does not fit model lstm_2x32 .* at batch_stats/"):
    ban_jax.train_generation(teacher.params, config(), **QUIET)
  with pytest.raises(ConfigError, match="'mlp_1_16' reads images; the data set holds tokens"):
    ban_jax.train_generation(teacher, config(), **QUIET)
  with pytest.raises(ConfigError, match="reads images; the data set holds tokens"):
    ban_jax.train_generation(None, config("pydoc,mlp_16,smoke"), **QUIET)


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_a_carried_state_is_evaluated_in_as_many_streams_as_asked_for(teacher):
  cfg = config()
  dataset = data.load(cfg.data)
  model = make_models(cfg, dataset.spec)[0]
  members = (trees.to_plain(teacher.params),)
  by_devices = {
    (rows, count): measure(Subject((model,), members, dataset, tuple(jax.devices()[:count])), "validation", rows)
    for rows, count in ((1, 1), (1, 4), (6, 1), (6, 4), (4, 1), (4, 4))
  }
  assert {metrics["count"] for metrics in by_devices.values()} == {dataset.sizes["validation"]}
  # Four devices do not turn one stream into four, nor six into eight.
  assert by_devices[1, 4] == by_devices[1, 1]
  for rows in (4, 6):
    assert by_devices[rows, 4]["nll"] == pytest.approx(by_devices[rows, 1]["nll"], rel=1e-5)
  # The difference between the streams is small and exactly repeatable.
  assert by_devices[1, 1] != by_devices[6, 1]
  assert by_devices[1, 1]["perplexity"] == pytest.approx(np.exp(by_devices[1, 1]["nll"]))


@pytest.mark.parametrize("name", ["batch_size", "training_batch_size"])
def test_a_batch_of_more_rows_than_any_split_has_windows_is_refused_at_once(teacher, name):
  dataset = data.load(config().data)
  windows = max(-(-size // 10) for size in dataset.sizes.values())
  check_dataset(config(**{f"evaluate__{name}": windows}), dataset)
  cfg = config(**{f"evaluate__{name}": windows + 1})
  message = (
    f"evaluate.{name}={windows + 1}: expected at most {windows}, the windows of 10 tokens in pydoc's largest split"
  )
  for call in (lambda: ban_jax.train_generation(None, cfg, **QUIET), lambda: ban_jax.evaluate(teacher, cfg)):
    with pytest.raises(ConfigError) as error:
      call()
    assert str(error.value) == message


def test_the_reported_numbers_are_those_of_the_reported_batch():
  cfg = config(evaluate__batch_size=2, evaluate__training_batch_size=50)
  done = ban_jax.train_generation(None, cfg, **QUIET)
  last = {name.removeprefix("test_"): value for name, value in done.metrics.items() if name.startswith("test_")}
  assert last == ban_jax.evaluate(done, cfg)
  cfg.evaluate.batch_size = 50
  assert last["nll"] != ban_jax.evaluate(done, cfg)["nll"]


def test_too_high_a_rate_is_told():
  with pytest.raises(TrainingError, match="generation 0 diverged in epoch 1 at step "):
    ban_jax.train_generation(None, config(optim__learning_rate=1e38, optim__clip_norm=0.0), **QUIET)


def test_rows_are_joined_as_they_were_split():
  devices = tuple(jax.devices())
  tree = {"a": np.arange(24.0).reshape(8, 3), "b": (np.arange(8),)}
  split = devices_lib.split_rows(tree, devices)
  joined = devices_lib.join_rows(split, devices)
  jax.tree.map(np.testing.assert_array_equal, joined, tree)

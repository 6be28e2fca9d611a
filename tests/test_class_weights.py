"""Class weights from the configuration to the loss that a generation is trained with, and what is refused."""

import jax
import numpy as np
import pytest
from absl import flags
from conftest import IMAGES, config
from ml_collections import config_flags

import ban_jax
from ban_jax import data, job, losses, presets, trees
from ban_jax.errors import ConfigError

QUIET = {"progress": False}
DIGITS, TEXT = IMAGES, "pydoc,lstm_32,smoke"
TEN = (0.5, *[1.0] * 8, 2.0)
# Digits are even; wrong labels make them uneven.
UNEVEN = {"data__label_noise": 0.4, "train__epochs": 1, "train__evaluate_every": 0}


def loss_of(cfg):
  return job.prepare(job.resolve_run(cfg, None), None, None).loss


def test_balanced_counts_the_training_labels_that_are_used():
  cfg = config(loss__class_weights="balanced", **UNEVEN)
  labels = data.load(cfg.data).splits["train_seen"]["labels"]
  counts = np.bincount(labels)
  assert counts.max() > counts.min()
  expected = tuple(len(labels) / (10 * counts))
  assert loss_of(cfg) is losses.weighted(losses.make_loss({"name": "label"}), expected)
  assert sum(np.array(expected) * counts) == pytest.approx(len(labels))


def test_numbers_weigh_the_classes_and_none_leave_the_loss_as_it_is():
  label = losses.make_loss({"name": "label"})
  assert loss_of(config(loss__class_weights=TEN)) is losses.weighted(label, TEN)
  assert loss_of(config(loss__class_weights=list(TEN))) is losses.weighted(label, TEN)
  assert loss_of(config()) is label


def test_a_teacher_and_its_students_have_them():
  cfg = config(f"{DIGITS},cwtm", loss__class_weights=TEN)
  setup = job.resolve_run(cfg, None)
  teacher = setup.models[0].init(jax.random.key(0))
  assert job.prepare(setup, teacher, None).loss is losses.weighted(losses.make_loss(cfg.loss), TEN)


def test_they_change_what_is_learned():
  plain, weighted = (
    ban_jax.train_generation(None, cfg, **QUIET)
    for cfg in (config(**UNEVEN), config(loss__class_weights="balanced", **UNEVEN))
  )
  assert trees.digest(plain.params) != trees.digest(weighted.params)


@pytest.mark.parametrize(
  ("words", "given", "message"),
  [
    (
      DIGITS,
      (1.0, 2.0),
      "loss.class_weights has 2 numbers: expected 10, one for each class of digits",
    ),
    (DIGITS, (*[1.0] * 9, 0.0), 'loss.class_weights=.*0.0.: expected .., "balanced", or a tuple of a'),
    (DIGITS, (*[1.0] * 9, float("inf")), "expected .., .* a finite number above 0 for each class"),
    (DIGITS, (*[1.0] * 9, "1"), "expected .., .* a finite number above 0 for each class"),
    (DIGITS, "equal", "loss.class_weights='equal': expected .., \"balanced\", or a tuple"),
    (DIGITS, np.ones(10), "expected .., .balanced., or a tuple"),
    (DIGITS, 2.0, 'loss.class_weights=2.0: expected .., "balanced", or a tuple'),
    (TEXT, "balanced", "loss.class_weights='balanced': expected .., because pydoc is text"),
    (TEXT, (1.0, 2.0), "loss.class_weights=.1.0, 2.0.: expected .., because pydoc is text"),
  ],
)
def test_what_cannot_weigh_the_classes_is_refused(words, given, message):
  cfg = presets.compose(words)
  cfg.loss.class_weights = given
  with pytest.raises(ConfigError, match=message):
    ban_jax.train_generation(None, cfg, **QUIET)


@pytest.mark.parametrize(("text", "given"), [("balanced", "balanced"), ("(0.5, 2)", (0.5, 2)), ("()", ())])
def test_the_command_line_takes_a_word_or_numbers(text, given):
  values, words = flags.FlagValues(), ["x", f"--config.loss.class_weights={text}"]
  holder = config_flags.DEFINE_config_dict("config", presets.compose(DIGITS), flag_values=values, sys_argv=words)
  values(words)
  assert holder.value.loss.class_weights == given

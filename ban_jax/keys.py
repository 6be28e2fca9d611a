"""Every key of a configuration, once: its default, what it must be, and what it means.

The defaults are the paper's settings for CIFAR (its section on experiments). `experiments/train.py --list` prints the
keys, their choices, and the words that set several of them (docs/configuration.md).
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# The numbers of float32: the smallest above 0 and the largest. A smaller one would be 0.
LEAST, MOST = (float(bound) for bound in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class Rule(NamedTuple):
  """What a value must be: a test and the words for it."""

  holds: Callable[[Any], bool]
  expected: str


class Key(NamedTuple):
  """A key of the configuration."""

  default: Any
  rule: Rule
  words: str  # what it means
  # Whether the bytes of a generation depend on it. Keys without are labels, places, and what is only logged, saved or
  # evaluated, which may change between a run and its resumption.
  in_identity: bool = True
  # Of a key that was added after the first runs: the value, as JSON holds it, under which a run is as it was before the
  # key existed. The identity leaves the key out while it has this value, so every earlier run and table is still found.
  neutral: Any = ...
  # What a data set that has no use for the key must leave it at, and why it has none.
  unused: tuple[Any, str] | None = None
  several_types: bool = False  # a value may be of another type than the default


def _is_number(value: Any, kind: type) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)  # which Python counts as an int


def whole(least: int, most: int | None = None, note: str = "") -> Rule:
  """Returns the rule for a whole number."""
  span = f"of at least {least}" if most is None else f"from {least} to {most}"
  limit = math.inf if most is None else most
  return Rule(lambda v: _is_number(v, numbers.Integral) and least <= v <= limit, f"a whole number {span}{note}")


def real(holds: Callable[[float], bool], expected: str) -> Rule:
  """Returns the rule for a number that float32 holds, in which all is computed, and for which `holds` is true."""
  return Rule(lambda v: _is_number(v, numbers.Real) and -MOST <= v <= MOST and holds(v), expected)


def text(expected: str, holds: Callable[[str], bool] = lambda v: True) -> Rule:
  """Returns the rule for a string for which `holds` is true."""
  return Rule(lambda v: isinstance(v, str) and holds(v), expected)


def _is_rising(shares: Any) -> bool:
  inside = isinstance(shares, list | tuple) and all(isinstance(s, numbers.Real) and 0 < float(s) < 1 for s in shares)
  return inside and list(shares) == sorted(set(shares))


def _are_class_weights(value: Any) -> bool:
  if isinstance(value, list | tuple):
    return all(map(POSITIVE.holds, value))
  return isinstance(value, str) and value == "balanced"


def _are_weights(value: Any) -> bool:
  return isinstance(value, list | tuple) and all(map(NOT_NEGATIVE.holds, value)) and (not value or sum(value) > 0)


def _are_names(value: Any) -> bool:
  return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


FINITE = real(lambda v: True, "a finite number")
POSITIVE = real(lambda v: v >= LEAST, "a finite number above 0")
# Beyond these, logits divided by it, or their gradients times its square, are no numbers of float32 any more.
TEMPERATURE = real(lambda v: 1e-3 <= v <= 1e3, "a finite number above 0, from 0.001 to 1000")
NOT_NEGATIVE = real(lambda v: v >= 0, "a finite number of at least 0")
SHARE = real(lambda v: 0 <= v < 1, "a share in [0, 1)")
PART = real(lambda v: 0 <= v <= 1, "a share from 0 to 1")
FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
NAME = text("a name")  # the registry that it is looked up in lists the choices

_NOT_BY_NAME = "is not read from TFDS by a name, as data.name='tfds' is"

KEYS = {
  "seed": Key(
    0,
    whole(0, 2**32 - 1),
    "Random seed. Every random number depends on it and on generation, purpose, step and position in the mini-batch.",
  ),
  "generations": Key(
    3,
    whole(0),
    "Number of students trained after the teacher: 3 means generation 0, the teacher, then BAN-1, BAN-2 and BAN-3.",
    in_identity=False,
  ),
  "scale": Key(
    "paper",
    text("a printable word, because it labels the results", str.isprintable),
    "Name of the preset for durations and sizes: paper, quick, cpu or smoke. A label only, shown with every result.",
    in_identity=False,
  ),
  "compute_dtype": Key(
    "float32",
    NAME,
    "Dtype of activations and matrix products: float32 or bfloat16. Parameters, batch statistics and losses are "
    "float32.",
  ),
  "data.name": Key("cifar100", NAME, "The data set, a key of ban_jax.data.DATASETS."),
  "data.dir": Key(
    "",
    text('a local directory, or "" for the default', lambda v: "://" not in v),
    'TFDS data directory; "" is TFDS\'s own default ($TFDS_DATA_DIR or ~/tensorflow_datasets). For ptb: the directory '
    "with ptb.train.txt, ptb.valid.txt and ptb.test.txt.",
    in_identity=False,
  ),
  "data.validation": Key(
    0.0,
    SHARE,
    'Fraction of the training examples held out as the split "validation"; 0 for none. Text has a split of its own. If '
    "classes differ in size, it is a fraction of each class. No class loses its last example.",
    unused=(0.0, "brings its own validation split"),
  ),
  "data.train_examples": Key(
    0,
    whole(0, note=", 0 for all training examples"),
    "Number of training examples, a fixed class-balanced subset, or if classes differ in size a proportional one; or "
    "of tokens, from the beginning of the training text. 0 for all.",
    unused=(0, "brings its own examples"),
  ),
  "data.pad": Key(
    4,
    whole(0),
    "Augmentation: pixels of reflection padding before the random crop; 0 for no crop.",
    unused=(0, "is text, and no image is cropped"),
  ),
  "data.flip": Key(
    True,
    FLAG,
    "Augmentation: whether to flip images horizontally at random.",
    unused=(False, "is text, and no image is flipped"),
  ),
  "data.augment": Key(
    (),
    Rule(_are_names, "a tuple of names, as ('mixup',)"),
    "Further augmentations of normalised images, after crop and flip and in this order: keys of "
    "ban_jax.data.augment.AUGMENTATIONS. Teacher and student see the same images, unless teacher.view says otherwise.",
    neutral=[],
    unused=((), "is text, and no image is augmented"),
  ),
  "data.mixup_alpha": Key(1.0, POSITIVE, "The weights of mixup are from Beta(alpha, alpha): 1 for any weight alike."),
  "data.cutmix_alpha": Key(1.0, POSITIVE, "The areas of cutmix are from Beta(alpha, alpha)."),
  "data.erasing": Key(0.5, PART, "Probability that an image has a rectangle erased."),
  "data.crop_area": Key(
    0.08,
    real(lambda v: LEAST <= v <= 1, "a share in (0, 1]"),
    "Smallest share of the area to cut out and resize.",
  ),
  "data.distortions": Key(2, whole(1), "Number of random distortions of an image, one after the other."),
  "data.distortion_strength": Key(
    0.5, PART, "Their strength: at 1 rotations by 30 degrees, shifts by 0.3 of the size, colours nearly lost."
  ),
  "data.window": Key(
    0,
    whole(0),
    "For text: tokens per window, the length of truncated backpropagation through time; 0 for images.",
    unused=(0, "holds images, and no text is cut into windows"),
  ),
  "data.tokens": Key(
    "words",
    NAME,
    "For pydoc: what is predicted one after another: words, characters or bytes.",
    neutral="words",
    unused=("words", "does not take it"),
  ),
  "data.label_noise": Key(
    0.0,
    SHARE,
    "Share of the training labels replaced by another class. Test and validation labels stay true.",
    neutral=0.0,
    unused=(0.0, "is text, and has no labels to replace"),
  ),
  "data.noise_kind": Key(
    "symmetric",
    NAME,
    'Which class replaces a label: "symmetric", any other class, or "pairwise", the next class.',
    neutral="symmetric",
  ),
  "data.noise_seed": Key(0, whole(0), "The seed alone decides which labels are replaced, and by what.", neutral=0),
  "data.dataset": Key(
    "",
    text("a name of TensorFlow Datasets"),
    "An image classification set of TensorFlow Datasets, as mnist, eurosat/rgb or mnist:3.0.1.",
    unused=("", _NOT_BY_NAME),
  ),
  "data.size": Key(
    0,
    whole(0, note=", 0 for the images' own size"),
    "All images are resized to size x size pixels; 0 for images that have one size.",
    unused=(0, _NOT_BY_NAME),
  ),
  "data.train_split": Key(
    "train",
    text("a split", bool),
    "The split to train on: one of the set's or a part of one, as train[:80%].",
    unused=("train", _NOT_BY_NAME),
  ),
  "data.test_split": Key(
    "test", text("a split", bool), "The split to test on, likewise.", unused=("test", _NOT_BY_NAME)
  ),
  "data.validation_split": Key(
    "",
    text('a split, or "" for none'),
    'The set\'s own validation split; "" for none, or for one by `data.validation`.',
    unused=("", _NOT_BY_NAME),
  ),
  "data.stream": Key(
    False,
    FLAG,
    "Whether images are read as they are needed, in the order of the set's files, and not held by every device. It "
    "happens unasked where a split takes more than half of a device's memory.",
    neutral=False,
    unused=(False, _NOT_BY_NAME),
  ),
  "data.view": Key(
    "whole",
    Rule(lambda v: v in ("whole", "crops"), "'whole' or 'crops'"),
    'What of a stream\'s image becomes data.size x data.size pixels: "whole", all of it, or "crops", a random part in '
    "training and the middle in evaluation (Szegedy et al. 2015).",
    neutral="whole",
    unused=("whole", _NOT_BY_NAME),
  ),
  "data.workers": Key(
    0,
    whole(0),
    "Processes that read a stream; 0 reads by threads. No byte depends on it.",
    in_identity=False,
    neutral=0,
    unused=(0, _NOT_BY_NAME),
  ),
  "teacher.loss": Key(
    "label",
    NAME,
    "The loss of generation 0, one that needs no teacher, with the options of `loss`: label or label_smoothing.",
    neutral="label",
  ),
  "teacher.view": Key(
    "same",
    NAME,
    'Which images the teacher sees: "same", the student\'s, augmented alike; as controls "other", the same examples '
    'with augmentations drawn anew, or "plain", without any.',
    neutral="same",
  ),
  "teacher.weights": Key(
    (),
    Rule(_are_weights, "(), or a tuple of numbers of at least 0, not all of them 0"),
    "Weights of the mean of several networks that teach together, one for each; () for equal ones. A network that "
    "teaches alone has all the weight.",
    neutral=[],
  ),
  "loss.name": Key("ban", NAME, "The students' loss, a key of ban_jax.losses.LOSSES."),
  "loss.temperature": Key(
    1.0,
    TEMPERATURE,
    "Temperature T of teacher and student in a distillation term, which is multiplied by T^2 (Hinton et al. 2015).",
  ),
  "loss.label_weight": Key(
    0.5,
    FINITE,
    "Weight of BAN+L's term of the labels. The two weights sum to one, so that learning rate and weight decay have the "
    "same effect as with the other losses.",
  ),
  "loss.teacher_weight": Key(0.5, FINITE, "Weight of BAN+L's term of the teacher."),
  "loss.label_weight_end": Key(
    1.0,
    FINITE,
    "Weight of the labels' term at the last step; from the first, with loss.label_weight, it goes linearly.",
  ),
  "loss.teacher_weight_end": Key(0.0, FINITE, "Weight of the teacher's term at the last step, likewise."),
  "loss.k": Key(2, whole(1), "How many of the teacher's most probable classes top_k learns."),
  "loss.smoothing": Key(0.1, PART, "The probability that is spread evenly over all classes."),
  "loss.class_weights": Key(
    (),
    Rule(_are_class_weights, '(), "balanced", or a tuple of a finite number above 0 for each class'),
    "Weights of the classes, a number above 0 for each: every loss, generation 0's too, becomes the mean of its "
    'examples weighted by their labels\' classes. "balanced" gives all classes the same total weight among the '
    "training examples. () for none, and for text.",
    neutral=[],
    several_types=True,
  ),
  "optim.name": Key("sgd", NAME, "The optimizer, a key of ban_jax.optim.OPTIMIZERS.", neutral="sgd"),
  "optim.learning_rate": Key(0.1, POSITIVE, "Peak learning rate."),
  "optim.schedule": Key("steps", NAME, "How the learning rate changes over the run, a key of ban_jax.optim.SCHEDULES."),
  "optim.warmup": Key(
    0.0,
    SHARE,
    "Share of the run in which the rate rises linearly to its peak; the schedule spans the rest.",
    neutral=0.0,
  ),
  "optim.boundaries": Key(
    (0.3, 0.6, 0.8),
    Rule(_is_rising, "rising shares of the run, each between 0 and 1"),
    "Fractions of the schedule after which the rate is multiplied by `optim.factor` (epochs 60, 120 and 160 of 200).",
  ),
  "optim.factor": Key(0.2, POSITIVE, "What the rate is multiplied by, each time that it falls."),
  "optim.threshold": Key(
    0.0,
    NOT_NEGATIVE,
    "The rate falls after each evaluation in which the validation metric (the error in %, or text's perplexity) "
    "improves on the best one so far by less than this.",
  ),
  "optim.momentum": Key(0.9, SHARE, "Share of the velocity that is kept from step to step."),
  "optim.b1": Key(0.9, SHARE, "Share of the mean gradient that is kept from step to step."),
  "optim.b2": Key(
    0.999, SHARE, "Share of the mean squared gradient that is kept from step to step; of Lion's momentum usually 0.99."
  ),
  "optim.nesterov": Key(True, FLAG, "Whether the momentum is Nesterov's."),
  "optim.weight_decay": Key(
    5e-4,
    NOT_NEGATIVE,
    "Weight decay. For sgd it is added to the gradient; the others shrink the parameters themselves by it, times the "
    "learning rate.",
  ),
  "optim.decay": Key(
    "all",
    NAME,
    'Which parameters decay: "all", or "kernels", which leaves out biases, scales of normalisations and embeddings.',
    neutral="all",
  ),
  "optim.clip_norm": Key(0.0, NOT_NEGATIVE, "Maximum global norm of the gradient; 0 for no clipping."),
  "train.epochs": Key(200, whole(1), "Number of passes over the training examples."),
  "train.batch_size": Key(128, whole(1), "Global mini-batch, over all devices."),
  "train.accumulate": Key(
    1,
    whole(1),
    "Mini-batches whose gradients are added up before an update, which is then that of one mini-batch so many times as "
    "large. Steps are mini-batches; the schedule counts updates. What is left at the end of an epoch is dropped.",
    neutral=1,
  ),
  "train.ema": Key(
    0.0,
    SHARE,
    "Decay of the averaged weights: those after an update count ema times as much with each further update. With 0 the "
    "last weights are evaluated, saved and taught by, else their average, and that of the batch statistics.",
    neutral=0.0,
  ),
  "train.checkpoint_every": Key(1000, whole(1), "Number of steps between checkpoints.", in_identity=False),
  "train.steps_per_dispatch": Key(
    0,
    whole(0),
    "Steps per dispatch to the devices. 0 chooses: 1 for images on CPU, where a convolution inside a compiled loop is "
    "30 times slower, else ban_jax.job.BLOCK. It changes the rounding, which the recorded layout says.",
    in_identity=False,
  ),
  "train.mapping": Key(
    "pmap",
    NAME,
    'How the training step is mapped over the devices: "pmap", or in one process "shard_map", which will succeed it in '
    "JAX. The bytes are the same.",
    in_identity=False,
    neutral="pmap",
  ),
  "train.replay": Key(
    "",
    text('a directory, or "" for a live teacher'),
    "Directory in which a teacher's logits are recorded once and read by all students of the same teacher, seed and "
    'generation, such as those of different losses; "" runs the teacher live for each. It changes the rounding, which '
    "the recorded layout says.",
    in_identity=False,
  ),
  "train.replay_gib": Key(16.0, POSITIVE, "The most that all recordings may take, in GiB.", in_identity=False),
  "train.evaluate_every": Key(
    1,
    whole(0),
    "Number of epochs between evaluations; 0 to evaluate only after training. They never select a checkpoint.",
    in_identity=False,
  ),
  "train.sync_batch_stats": Key(
    True,
    FLAG,
    "Whether batch norm uses the statistics of the global mini-batch, or each device those of its own part.",
  ),
  "train.gradient_split": Key(
    False,
    FLAG,
    "Whether to log, per epoch, the correct-class and dark-knowledge terms (Eq. 7-9) of the plain BAN gradient between "
    "student and teacher, whichever loss is trained on.",
    in_identity=False,
  ),
  "evaluate.batch_size": Key(
    500,
    whole(1),
    "Global evaluation batch; it need not divide the split. For text: the number of parallel streams, each of which "
    "starts from a zero hidden state.",
    in_identity=False,
  ),
  "evaluate.training_batch_size": Key(
    0,
    whole(0),
    "The same for evaluations during training, which a plateau schedule depends on; 0 for evaluate.batch_size.",
    in_identity=False,
  ),
}


def neutral_values() -> dict[str, Any]:
  """Returns the neutral value of each key that has one."""
  return {name: key.neutral for name, key in KEYS.items() if key.neutral is not ...}

"""Every configuration key, documented, with its default: the paper's CIFAR settings (paper, experiments section).

What the paper does otherwise for language stands in presets.py.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns the base configuration; presets.py turns it into a run's."""
  config = ConfigDict()
  # All randomness derives from it, folded by generation, purpose, step and an example's place in the mini-batch.
  config.seed = 0
  # Students after the teacher: 3 means a teacher (generation 0) and BAN-1, BAN-2, BAN-3.
  config.generations = 3
  # Which durations and sizes the presets filled in: paper, quick, cpu or smoke. It labels every result.
  config.scale = "paper"
  # Of activations and matrix products: float32 or bfloat16. Parameters, batch statistics and losses stay float32.
  config.compute_dtype = "float32"

  config.data = ConfigDict()
  # A key of ban_jax.data.DATASETS.
  config.data.name = "cifar100"
  # Where TFDS keeps its data sets; "" is TFDS's own default (~/tensorflow_datasets or $TFDS_DATA_DIR). Of ptb: where
  # the user has put ptb.train.txt, ptb.valid.txt and ptb.test.txt.
  config.data.dir = ""
  # The share of the training examples held out as a split "validation"; 0 holds out none. Text brings its own.
  config.data.validation = 0.0
  # How many training examples to use, a fixed class-balanced choice, or how many tokens of the training text, from its
  # beginning; 0 uses all.
  config.data.train_examples = 0
  # Augmentation: pixels of reflection padding before the random crop (0: no crop), and random horizontal flips.
  config.data.pad = 4
  config.data.flip = True
  # Of text: tokens of a window, as far as a recurrent network is unrolled and its gradient goes back; 0 for images.
  config.data.window = 0

  # The students' network: a key of ban_jax.models.MODELS, and that network's own options.
  config.model = ConfigDict()
  config.model.name = "wide_resnet"
  config.model.depth = 28
  config.model.width = 10
  # Between the two convolutions of a block; 0.3 in the Wide-ResNet paper, and not stated in the born-again one.
  config.model.dropout = 0.3

  config.teacher = ConfigDict()
  # Generation 0's network, as a group like `model`; None means the students' own.
  config.teacher.model = None

  # The students' loss: a key of ban_jax.losses.LOSSES. Generation 0 always learns from the labels.
  config.loss = ConfigDict()
  config.loss.name = "ban"
  # Softens teacher and student in a distillation term, which is rescaled by T^2 (Hinton et al. 2015).
  config.loss.temperature = 1.0
  # Of ban_label alone. They sum to one, so that the gradient's size, and with it what the learning rate and the weight
  # decay do, is that of the other losses.
  config.loss.label_weight = 0.5
  config.loss.teacher_weight = 0.5
  # Of label_smoothing alone: the share of the label that is spread over all classes.
  config.loss.smoothing = 0.1

  # SGD: the peak learning rate and its schedule, "steps", "cosine" or "plateau".
  config.optim = ConfigDict()
  config.optim.learning_rate = 0.1
  config.optim.schedule = "steps"
  # Of "steps": the shares of the run after which the rate is multiplied by `factor` (epochs 60, 120 and 160 of 200).
  config.optim.boundaries = (0.3, 0.6, 0.8)
  config.optim.factor = 0.2
  # Of "plateau": the least improvement of the validation perplexity that counts. After an evaluation that brings less,
  # the rate is multiplied by `factor`.
  config.optim.threshold = 0.0
  config.optim.momentum = 0.9
  config.optim.nesterov = True
  # Coupled, on all parameters.
  config.optim.weight_decay = 5e-4
  # Largest global norm of the gradient; 0 leaves it as it is.
  config.optim.clip_norm = 0.0

  config.train = ConfigDict()
  config.train.epochs = 200
  # Of the global mini-batch, over all devices.
  config.train.batch_size = 128
  # Steps between checkpoints.
  config.train.checkpoint_every = 1000
  # Steps a dispatch to the devices. 0 chooses: 1 for images on CPU, where a convolution inside a compiled loop is 30
  # times slower, else ban_jax.job.BLOCK.
  config.train.steps_per_dispatch = 0
  # Epochs between evaluations during training; 0 evaluates the finished network only. Nothing is selected by them.
  config.train.evaluate_every = 1
  # Whether batch norm sees the whole mini-batch on all devices; otherwise each device's share.
  config.train.sync_batch_stats = True
  # Whether to log by epoch the correct-class and dark-knowledge terms (Eq. 7-9) of the plain BAN gradient between a
  # student and its teacher, whatever loss trains it.
  config.train.gradient_split = False

  config.evaluate = ConfigDict()
  # Of the global batch; the split need not divide by it. Of text: the stretches that are read side by side, each of
  # which begins without a hidden state.
  config.evaluate.batch_size = 500
  # Of evaluations during training, by which a plateau schedule decides; 0: as evaluate.batch_size.
  config.evaluate.training_batch_size = 0
  return config

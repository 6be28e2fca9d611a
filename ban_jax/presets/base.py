"""Every configuration key with its default: the paper's settings for CIFAR (its section on experiments).

The settings for language models are in __init__.py.
"""

from ml_collections import ConfigDict, FieldReference


def get_config() -> ConfigDict:
  """Returns the base configuration, which `presets.compose` turns into the configuration of a run."""
  config = ConfigDict()
  # Random seed. Every random number depends on it and on generation, purpose, step and position in the mini-batch.
  config.seed = 0
  # Number of students trained after the teacher: 3 means generation 0, the teacher, then BAN-1, BAN-2 and BAN-3.
  config.generations = 3
  # Name of the preset for durations and sizes: paper, quick, cpu or smoke. A label only, shown with every result.
  config.scale = "paper"
  # Dtype of activations and matrix products: float32 or bfloat16. Parameters, batch statistics and losses are float32.
  config.compute_dtype = "float32"

  config.data = ConfigDict()
  # A key of ban_jax.data.DATASETS.
  config.data.name = "cifar100"
  # TFDS data directory; "" is TFDS's own default ($TFDS_DATA_DIR or ~/tensorflow_datasets). For ptb: the directory
  # with ptb.train.txt, ptb.valid.txt and ptb.test.txt.
  config.data.dir = ""
  # Fraction of the training examples held out as the split "validation"; 0 for none. Text has a split of its own.
  # Where classes differ in size, it is a fraction of each class, and no class loses its last example.
  config.data.validation = 0.0
  # Number of training examples, a fixed class-balanced subset, or where classes differ in size a proportional one; or
  # of tokens, from the beginning of the training text. 0 for all.
  config.data.train_examples = 0
  # Augmentation: pixels of reflection padding before the random crop; 0 for no crop.
  config.data.pad = 4
  # Augmentation: whether to flip images horizontally at random.
  config.data.flip = True
  # For text: tokens per window, the length of truncated backpropagation through time; 0 for images.
  config.data.window = 0
  # Share of the training labels replaced by another class: "symmetric" (any other class) or "pairwise" (the next
  # class). The seed alone decides which labels are replaced, and by what. Test and validation labels stay true.
  config.data.label_noise = 0.0
  config.data.noise_kind = "symmetric"
  config.data.noise_seed = 0
  # For data.name="tfds": an image classification set of TensorFlow Datasets, as mnist, eurosat/rgb or mnist:3.0.1.
  config.data.dataset = ""
  # For "tfds": all images are resized to size x size pixels; 0 for images that have one size.
  config.data.size = 0
  # For "tfds": the splits to train on and to test, each a split of the set or a part of one, as train[:80%]; and the
  # set's own validation split, "" for none, or for one by `validation`.
  config.data.train_split = "train"
  config.data.test_split = "test"
  config.data.validation_split = ""

  # The students' network: a key of ban_jax.models.MODELS and that network's options, which its file describes. These
  # are Wide-ResNet's.
  config.model = ConfigDict()
  config.model.name = "wide_resnet"
  config.model.depth = 28
  config.model.width = 10
  # Dropout rate: 0.3 in the Wide-ResNet paper, not stated in the Born-Again paper.
  config.model.dropout = 0.3

  config.teacher = ConfigDict()
  # The network of generation 0, a group like `model`; None for the same network as the students'.
  config.teacher.model = None

  # The students' loss: a key of ban_jax.losses.LOSSES. Generation 0 is always trained on the labels.
  config.loss = ConfigDict()
  config.loss.name = "ban"
  # Temperature T of teacher and student in a distillation term, which is multiplied by T^2 (Hinton et al. 2015).
  config.loss.temperature = 1.0
  # For ban_label only: the weights of its two terms. They sum to one, so that learning rate and weight decay have the
  # same effect as with the other losses.
  config.loss.label_weight = 0.5
  config.loss.teacher_weight = 0.5
  # For label_smoothing only: the probability that is spread evenly over all classes.
  config.loss.smoothing = 0.1
  # Weights of the classes, a number above 0 for each: every loss, generation 0's too, becomes the mean of its examples
  # weighted by their labels' classes. "balanced" gives all classes the same total weight among the training examples.
  # () for none, and for text. A reference of type object may hold a word or a tuple.
  config.loss.class_weights = FieldReference((), field_type=object)

  # SGD.
  config.optim = ConfigDict()
  # Peak learning rate.
  config.optim.learning_rate = 0.1
  # "steps", "cosine" or "plateau".
  config.optim.schedule = "steps"
  # For "steps": fractions of the run after which the rate is multiplied by `factor` (epochs 60, 120 and 160 of 200).
  config.optim.boundaries = (0.3, 0.6, 0.8)
  config.optim.factor = 0.2
  # For "plateau": the rate is multiplied by `factor` after each evaluation in which the validation perplexity improves
  # on the best one so far by less than this.
  config.optim.threshold = 0.0
  config.optim.momentum = 0.9
  config.optim.nesterov = True
  # Added to the gradient of every parameter (coupled, unlike in AdamW).
  config.optim.weight_decay = 5e-4
  # Maximum global norm of the gradient; 0 for no clipping.
  config.optim.clip_norm = 0.0

  config.train = ConfigDict()
  config.train.epochs = 200
  # Global mini-batch, over all devices.
  config.train.batch_size = 128
  # Number of steps between checkpoints.
  config.train.checkpoint_every = 1000
  # Steps a dispatch to the devices. 0 chooses: 1 for images on CPU, where a convolution inside a compiled loop is 30
  # times slower, else ban_jax.job.BLOCK.
  config.train.steps_per_dispatch = 0
  # How the training step is mapped over the devices: "pmap", or in one process "shard_map", which will succeed it in
  # JAX. The bytes are the same.
  config.train.mapping = "pmap"
  # Directory in which a teacher's logits are recorded once and read by all students of the same teacher, seed and
  # generation, such as those of different losses; "" runs the teacher live for each. And the most they may take, GiB.
  config.train.replay = ""
  config.train.replay_gib = 16.0
  # Number of epochs between evaluations; 0 to evaluate only after training. They never select a checkpoint.
  config.train.evaluate_every = 1
  # Whether batch norm uses the statistics of the global mini-batch, or each device those of its own part.
  config.train.sync_batch_stats = True
  # Whether to log, per epoch, the correct-class and dark-knowledge terms (Eq. 7-9) of the plain BAN gradient between
  # student and teacher, whichever loss is trained on.
  config.train.gradient_split = False

  config.evaluate = ConfigDict()
  # Global evaluation batch; it need not divide the split. For text: the number of parallel streams, each of which
  # starts from a zero hidden state.
  config.evaluate.batch_size = 500
  # The same for evaluations during training, which a plateau schedule depends on; 0 for evaluate.batch_size.
  config.evaluate.training_batch_size = 0
  return config

"""Any image classification set of TensorFlow Datasets (TFDS), by its name there.

python experiments/train.py --config=configs/tfds.py:fashion_mnist,wrn_16_4,paper --workdir=runs/fashion

The settings are those of CIFAR, but for ImageNet, which has its own: imagenet2012,resnet_50,paper. What may have to be
changed:

  --config.data.size=32                      for images of different sizes
  --config.data.flip=False                   where a mirrored image is another class, as with digits and letters
  --config.data.validation_split=validation  for the set's own validation split
  --config.data.test_split=validation        for a set without a test split
  --config.data.stream=True                  for a set larger than memory
  --config.data.train_split="train[:80%]" --config.data.test_split="train[80%:]"  for one with a training split alone
"""

from ml_collections import ConfigDict

from ban_jax import presets


def get_config(words: str = "fashion_mnist,wrn_16_4,paper") -> ConfigDict:
  """Returns the locked configuration for the words "name,network,scale[,more]", the name being one of TFDS."""
  return presets.compose(f"tfds={words}", ("tfds",))

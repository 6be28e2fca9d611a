"""scikit-learn's handwritten digits: a small image data set that needs no download."""

import numpy as np

from ban_jax.data import images
from ban_jax.types import Dataset

TRAIN = 400  # of 1,797; few enough that a teacher leaves something to learn for its students


def load(options: images.Options) -> Dataset:
  """Returns the 1,797 digits, uint8 [8, 8, 1]: a training pool of 400, 40 of each class, and 1,397 to test.

  The 17 grey levels 0..16 become 0..255. Raises ConfigError for options that do not fit the data.
  """
  from sklearn.datasets import load_digits  # takes a second to import

  pixels, labels = load_digits(return_X_y=True)  # [N, 64] in 0..16, [N]
  everything = images.Examples(
    np.round(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8), labels.astype(np.int32)
  )
  order = images.balanced_order(everything.labels)
  pool, test = images.take(everything, order[:TRAIN]), images.take(everything, order[TRAIN:])
  return images.build("digits", pool, test, num_classes=10, options=options)

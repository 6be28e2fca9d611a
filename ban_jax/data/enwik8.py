"""enwik8 (the Hutter prize): 100 million bytes of Wikipedia, from a file that the user supplies."""

import logging

from ban_jax.data import reading, text, text_files
from ban_jax.types import Dataset

logger = logging.getLogger(__name__)

SIZE = 100_000_000
# Where the validation and the test split begin: 90, 5 and 5 of the 100 million bytes.
CUTS = (0.9, 0.95)


def load(*, dir: str, options: text.Options) -> Dataset:
  """Returns enwik8's bytes, in their order: 90,000,000 to train, 5,000,000 to validate and 5,000,000 to test.

  Reads the file `enwik8` in the directory `dir`; one of another size is cut in the same proportion, with a warning.
  Raises ConfigError if no directory is named or the options do not fit the text, and DataError for a file that is
  missing, empty or unreadable.
  """
  path = text_files.find("enwik8", dir, {"train": "enwik8"}, "the first 100,000,000 bytes of a dump of Wikipedia")
  content = text_files.read("enwik8", path["train"])
  if len(content) != SIZE:
    logger.warning("enwik8: %s holds %d bytes, not %d: results are no one else's", path["train"], len(content), SIZE)
  first, second = (round(share * len(content)) for share in CUTS)
  parts = {"train": content[:first], "validation": content[first:second], "test": content[second:]}
  return reading.build("enwik8", parts, reading.Reading("bytes"), options=options)

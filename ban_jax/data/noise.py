"""Wrong labels on purpose: a share of the training labels replaced by another class."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32

Labels = Int32[np.ndarray, " N"]


def symmetric(labels: Labels, num_classes: int, rng: np.random.Generator) -> Labels:
  """Returns another class for each label, every other class being equally likely."""
  return (labels + rng.integers(1, num_classes, len(labels))) % num_classes


def pairwise(labels: Labels, num_classes: int, rng: np.random.Generator) -> Labels:
  """Returns the next class for each label, as where annotators confuse a class with one neighbour."""
  return (labels + 1) % num_classes


KINDS: Mapping[str, Callable[[Labels, int, np.random.Generator], Labels]] = {
  "symmetric": symmetric,
  "pairwise": pairwise,
}


def corrupt(labels: Labels, num_classes: int, share: float, kind: str, seed: int) -> Labels:
  """Returns the labels, int32 [N], with round(share * N) of them replaced; `seed` alone decides which and by what."""
  rng = np.random.default_rng(seed)
  wrong = rng.choice(len(labels), round(share * len(labels)), replace=False)
  noisy = labels.copy()
  noisy[wrong] = KINDS[kind](labels[wrong], num_classes, rng)
  return noisy


def record(true: Labels, seen: Labels) -> dict[str, Any]:
  """Returns what a manifest keeps: the share of wrong labels, and [true class, class seen, count] of each such pair."""
  pairs, counts = np.unique(np.stack([true, seen]), axis=1, return_counts=True)
  return {"wrong_labels": float((true != seen).mean()), "labels_seen": np.stack([*pairs, counts], axis=1).tolist()}

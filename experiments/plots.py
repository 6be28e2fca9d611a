"""What the plots share beside ban_jax/plotting.py: every seed as a dot, and saving."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from etils import epath

from experiments import results


def seeds(
  axes: "matplotlib.axes.Axes", place: float, values: Sequence[float], color: object, *, width: float = 0.12
) -> None:
  """Draws a dot for each seed's value, spread over `place` plus and minus `width`."""
  spread = width * np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1)
  axes.plot(place + spread, values, ".", color=color, alpha=0.4)


def save(figure: "matplotlib.figure.Figure", path: epath.Path) -> None:
  """Writes a figure as PNG, whole or not at all."""
  file = io.BytesIO()
  figure.savefig(file, format="png", dpi=150)
  results.write(path, file.getvalue())

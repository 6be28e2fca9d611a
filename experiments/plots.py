"""What all plots share: a figure that needs no display, light axes, every seed as a dot, and saving."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from etils import epath

from experiments import results


def figure(width: float, height: float) -> "matplotlib.figure.Figure":
  """Returns an empty figure of this size in inches."""
  import matplotlib.figure  # slow to import; a command that ends before it plots does not need it

  return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def tidy(axes: "matplotlib.axes.Axes", *, grid: bool = False) -> None:
  """Removes the upper and the right spine; `grid` adds light horizontal lines."""
  axes.spines[["top", "right"]].set_visible(False)
  if grid:
    axes.grid(axis="y", alpha=0.3)


def zero_line(axes: "matplotlib.axes.Axes") -> None:
  """Draws a dashed line where y is 0."""
  axes.axhline(0, color="0.5", linewidth=1, linestyle="--")


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

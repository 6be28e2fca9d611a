"""How much training is enough: what students gain against how well their teacher fits its training set, over all runs.

    python experiments/gains.py --outdir=runs/gains

Reads the lines that enough.py, images.py, text.py, anchors.py and search.py write, averages each setting over its
seeds, and writes a table and a plot of BAN-1: images by the teacher's error on its training labels, text by its
training perplexity. A star is the whole training set, a dot a part of it. Settings with one seed, most of them
searches, are hollow. The table has the last student, too.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import itertools
import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from absl import flags
from etils import epath

from ban_jax import plotting, presets, storage, summary
from ban_jax.errors import ConfigError
from experiments import cli, plots, records, results

FILES = [
  f"docs/{name}.jsonl" for name in ("anchors", "enough", "images", "vit", "text", "characters", "ptb", "searched")
]
# Values that are told with the data set's name.
TOLD = ("data.label_noise", "data.tokens")
LINES = flags.DEFINE_list("lines", FILES, "Files to read.")
OUT = flags.DEFINE_string("outdir", "runs/gains", "Directory for the table and the plot.")


class Point(NamedTuple):
  """A setting: how well its teacher fits, and what its students gain over it."""

  dataset: str
  noise: float  # share of wrong labels
  examples: int  # training images or tokens; 0 are all
  setting: tuple[str, ...]  # the network, and the values that differ from the preset's
  is_text: bool
  fit: float  # teacher: training error [%], or training perplexity for text
  teacher: float  # test error [%] or test perplexity
  gain: summary.Difference  # of BAN-1
  last: str  # the last student
  last_gain: summary.Difference
  anchor: str  # of experiments/anchors.py, or ""

  @property
  def kind(self) -> str:
    """The data set, and its labels if some are wrong."""
    return f"{self.dataset}, {results.labels(self.noise)}" if self.noise else self.dataset


def read(paths: Sequence[str]) -> list[dict]:
  """Returns the lines of all files; raises a ConfigError for a file that is none."""
  found = []
  for path in paths:
    try:
      found += [json.loads(line) for line in epath.Path(path).expanduser().read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
      raise ConfigError(
        f"--lines: {path} is no file of lines that a study, anchors.py or search.py wrote: {error}"
      ) from error
  return found


def points(lines: Sequence[dict]) -> list[Point]:
  """Returns a point for each setting with students, its lines averaged over seeds, those of searches apart."""
  groups: dict[str, list[dict]] = {}
  for line in lines:
    if len(line["results"]) > 1:  # else a teacher alone, which stopped earlier
      key = json.dumps([line["words"], sorted(line["changes"].items()), line["seed"] >= records.SEARCH])
      groups.setdefault(key, []).append(line)
  return [_point(own) for own in groups.values()]


def _point(lines: Sequence[dict]) -> Point:
  words, changes = lines[0]["words"], lines[0]["changes"]
  teachers = [line["results"]["teacher"] for line in lines]
  is_text = "test_perplexity" in teachers[0]
  metric = "test_perplexity" if is_text else "test_error"
  common = set.intersection(*(set(line["results"]) for line in lines))
  last = max((name for name in common if name.startswith("BAN-")), key=lambda name: int(name[4:]))
  if is_text:
    fit = [math.exp(own["train_loss"]) for own in teachers]
  else:  # with wrong labels, the finished network's error on the labels it saw
    fit = [own.get("train_seen_error", own["train_error"]) for own in teachers]
  dataset, network, _ = words.split(",")
  dataset += f", {changes['data.tokens']}" if "data.tokens" in changes else ""
  examples = changes.get("data.train_examples", presets.compose(words).data.train_examples)
  shown = [f"{key.removeprefix('data.')} {value}" for key, value in changes.items() if key not in TOLD]

  def gain(student: str) -> summary.Difference:
    return summary.mean_difference(
      [own["results"][student][metric] - own["results"]["teacher"][metric] for own in lines]
    )

  teacher = summary.mean_and_error([own[metric] for own in teachers])[0]
  fit = summary.mean_and_error(fit)[0]
  noise, setting = changes.get("data.label_noise", 0), (network, *shown)
  anchor = lines[0].get("anchor", "")
  return Point(dataset, noise, examples, setting, is_text, fit, teacher, gain("BAN-1"), last, gain(last), anchor)


def table(found: Sequence[Point]) -> str:
  """Returns a line a setting, those whose teacher fits best first, and below what all settings of a data set share."""
  shared: dict[str, list[str]] = {}
  for point in (point for point in found if not point.anchor):
    before = shared.get(point.dataset, point.setting)
    shared[point.dataset] = [value for value in before if value in point.setting]
  rows = [["data", "setting", "seeds", "teacher, training", "teacher, test", "BAN-1 minus", "last", "minus teacher"]]
  for point in sorted(found, key=lambda point: (point.kind, point.fit)):
    if point.anchor:
      own = f"anchor {point.anchor}"
    else:
      own = ", ".join(value for value in point.setting if value not in shared[point.dataset])
    numbers = [f"{point.fit:.1f}", f"{point.teacher:.2f}", point.gain.text, point.last, point.last_gain.text]
    rows.append([point.kind, own, str(point.gain.seeds), *numbers])
  below = [f"- {dataset}, in all settings: {', '.join(values)}" for dataset, values in shared.items() if values]
  return "\n".join([summary.markdown(rows), "", *below])


def plot(found: Sequence[Point]) -> "matplotlib.figure.Figure":
  """Plots the gains: images in points of test error, text in perplexity, a panel each."""
  panels = [kind for kind in (False, True) if any(point.is_text == kind for point in found)]
  figure = plotting.figure_of(1 + 5.5 * len(panels), 4.5)
  for axes, is_text in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
    shown = [point for point in found if point.is_text == is_text]
    for number, kind in enumerate(dict.fromkeys(point.kind for point in shown)):
      _plot_kind(axes, [point for point in shown if point.kind == kind], f"C{number}")
    plotting.zero_line(axes)
    axes.set_xlabel(
      "teacher's training perplexity, dropout on" if is_text else "teacher's error on its training labels, %"
    )
    axes.set_ylabel(f"BAN-1 minus teacher,\ntest {'perplexity' if is_text else 'error in points'} (95% interval)")
    title = "stars: the whole training set" if any(not point.examples for point in shown) else None
    axes.legend(frameon=False, fontsize="small", title=title, title_fontsize="small")
    plotting.tidy(axes, grid=True)
  return figure


def _plot_kind(axes: "matplotlib.axes.Axes", points: Sequence[Point], color: str) -> None:
  label = points[0].kind
  for several, whole in itertools.product((True, False), repeat=2):
    own = [point for point in points if (point.gain.seeds > 1, not point.examples) == (several, whole)]
    if not own:
      continue
    half = [point.gain.high - point.gain.mean for point in own] if several else None
    axes.errorbar(
      [point.fit for point in own], [point.gain.mean for point in own], half,
      fmt="*" if whole else "o", markersize=9 if whole else 6, color=color,
      markerfacecolor=color if several else "none", capsize=3, label=label,
    )  # fmt: skip
    label = None  # once a kind


def main() -> None:
  """Reads the lines, and writes and prints the table and the plot's path."""
  found = points(read(LINES.value))
  if not found:
    raise ConfigError(f"--lines={','.join(LINES.value)}: there are no lines")
  out = storage.resolve_workdir(OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  text = table(found)
  results.write(out / "gains.md", text + "\n")
  plots.save(plot(found), out / "gains.png")
  print(f"{text}\n\nwritten: {out / 'gains.md'}, {out / 'gains.png'}")


if __name__ == "__main__":
  cli.run(main)

"""The page of all words and keys of a configuration, as Markdown: what `train.py --list` prints."""

import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from ban_jax import config, data, losses, models, optim, presets
from ban_jax.data.augment import AUGMENTATIONS
from ban_jax.keys import KEYS

# The choices of keys that name something.
CHOICES: dict[str, Iterable[str]] = {**config.CHOICES, "scale": presets.SCALES}

INTRODUCTION = (
  "# Configuration\n\n"
  "Words choose the configuration of a run, `DATASET,NETWORK,SCALE[,LOSS][,OPTIMIZER][,teacher=NETWORK]`: on the "
  "command line `--config=configs/digits.py:digits,wrn_10_1,cpu,adamw`, in Python "
  '`cfg = ban_jax.get_config("digits,wrn_10_1,cpu,adamw")`. Each word sets some of the keys below, and any key can be '
  "set afterwards: `--config.train.epochs=30`, `cfg.train.epochs = 30`. A wrong word, key or value gets an error that "
  "lists the choices. `experiments/train.py --list` prints this page."
)


class ListFlag(flags.BooleanFlag):
  """The flag --list, which prints the page and ends the program, whatever else is asked."""

  def __init__(self) -> None:
    super().__init__("list", False, "Print every word and key of a configuration, and end.", allow_hide_cpp=True)

  def parse(self, argument: str | bool) -> None:
    """Prints the page where the flag is given."""
    if argument and argument != "false":
      print(page())
      sys.exit(0)


def page() -> str:
  """Returns the page."""
  return "\n\n".join([INTRODUCTION, _words(), _keys()])


def _words() -> str:
  scales = {name: _first(function) for name, function in presets.SCALES.items()}
  kinds = {name: f"{kind.kind}{', embedded' if kind.embedded else ''}" for name, kind in data.DATASETS.items()}
  named = {name: _first(loss.apply) for name, loss in losses.LOSSES.items()}
  optimizers = {
    name: _first(function) + _values(presets.OPTIMIZER_SETTINGS.get(name, {}), " Sets: ")
    for name, function in optim.OPTIMIZERS.items()
  }
  parts = ["## Words"]
  for title, words in (
    (
      "Data sets",
      {name: kinds[name] for name in presets.DATASETS} | {"tfds=NAME": "the set NAME of TensorFlow Datasets"},
    ),
    ("Scales", scales),
    ("Losses", named),
    ("Optimizers", optimizers),
    ("Augmentations, which `data.augment` names", {n: _first(a.apply) for n, a in AUGMENTATIONS.items()}),
  ):
    parts += [f"### {title}", "\n".join(f"- `{word}`: {text}" for word, text in words.items())]
  parts.append("### Networks")
  for name, kind in models.MODELS.items():
    group = {word: preset for word, preset in presets.MODELS.items() if preset.name == name}
    lines = [
      f"- `{word}`{_values({k: v for k, v in preset.items() if k != 'name'}, ': ')}" for word, preset in group.items()
    ]
    parts += (
      [f"`model.name={name}`: {_first(kind.options).partition('; raises')[0].rstrip('.')}.", "\n".join(lines)]
      if lines
      else []
    )
  return "\n\n".join(parts)


def _keys() -> str:
  parts = ["## Keys", "Each with its default, what it must be, and what takes it if not all do."]
  group = None
  for name, key in KEYS.items():
    head = name.rpartition(".")[0]
    if head != group:
      parts.append(f"### {head or 'The run'}")
      group = head
    count = "some" if isinstance(key.default, tuple) else "one"
    must = f"{count} of {', '.join(f'`{c}`' for c in sorted(CHOICES[name]))}" if name in CHOICES else key.rule.expected
    takers = [entry for registry in config.REGISTRIES for entry in registry if name in registry.taken(entry)]
    taken = f" Taken by {', '.join(f'`{entry}`' for entry in takers)}." if takers else ""
    free = "" if key.in_identity else " May change between a run and its resumption."
    parts.append(f"**`{name}`** = `{json.dumps(key.default)}`: {must}. {key.words}{taken}{free}")
  return "\n\n".join(parts)


def _first(function: Any) -> str:
  """Returns the first sentence of a docstring."""
  return inspect.getdoc(function).partition("\n")[0]


def _values(group: Mapping[str, Any], before: str) -> str:
  shown = ", ".join(f"{key}={value!r}" for key, value in group.items())
  return f"{before}{shown}" if shown else ""

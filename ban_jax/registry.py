"""Registries: how a configuration's names are found, and which of its values each entry takes.

There is one way to declare options, for losses, schedules, optimizers, data sets and networks alike: an entry is a
function, or a NamedTuple whose first field is one, and the function's keyword-only arguments are its options. They may
be a class: an argument `options` stands for the fields of the class that it is annotated with.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ban_jax.errors import look_up

T = TypeVar("T")

# The name, in records, of what the caller gave as an argument: it takes nothing of the configuration.
OWN = "own"
# The argument that stands for the fields of its class.
OPTIONS = "options"


class Registry(dict[str, T]):
  """The entries of one kind by name; `key` is the configuration's key that chooses one, such as "loss.name".

  `what` names the kind in messages. `given` are the keyword-only arguments that the library gives: no options.
  """

  def __init__(self, key: str, what: str, entries: Mapping[str, T], given: Sequence[str] = ()):
    super().__init__(entries)
    self.key, self.what, self.given = key, what, tuple(given)

  def find(self, name: str) -> T:
    """Returns an entry; raises a ConfigError that lists the choices for an unknown name."""
    return look_up(self, name, self.what)

  def options(self, name: str) -> tuple[str, ...]:
    """Returns the options that an entry takes; raises a ConfigError for an unknown name."""
    return options_of(self.find(name), self.given)

  def arguments(self, name: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that an entry takes out of a group of the configuration."""
    found: dict[str, Any] = {}
    for argument, parameter in _parameters(self.find(name), self.given).items():
      if argument == OPTIONS:
        fields = inspect.signature(parameter.annotation).parameters.values()
        # A group that was recorded before a key existed lacks it: the field's default is neutral.
        given = {
          field.name: group[field.name] for field in fields if field.name in group or field.default is field.empty
        }
        found[argument] = parameter.annotation(**given)
      else:
        found[argument] = group[argument]
    return found

  def taken(self, *names: str) -> set[str]:
    """Returns the dotted keys of the options that the entries of these names take."""
    group = self.key.partition(".")[0]
    return {f"{group}.{option}" for name in names if name in self or name != OWN for option in self.options(name)}


def options_of(entry: Any, given: Sequence[str] = ()) -> tuple[str, ...]:
  """Returns the options that an entry takes, in the order of its arguments; `given` are those of the library."""
  found: list[str] = []
  for argument, parameter in _parameters(entry, given).items():
    found += inspect.signature(parameter.annotation).parameters if argument == OPTIONS else [argument]
  return tuple(found)


def _parameters(entry: Any, given: Sequence[str]) -> dict[str, inspect.Parameter]:
  """Returns the parameters of an entry that are options, or a class of options."""
  function = entry[0] if isinstance(entry, tuple) else entry
  return {
    name: parameter
    for name, parameter in inspect.signature(function).parameters.items()
    if name == OPTIONS or parameter.kind is parameter.KEYWORD_ONLY and name not in given
  }

"""What a network of one's own computes: digests of its lowered programs, and what these tell of its behaviour.

A class's name and its options do not say what its code does. The digest of the program that JAX makes of it does: alike
in every process, whatever classes, functions and files are called, and with every constant in it. What a callback to
Python computes is not seen. Other versions of JAX or Flax may make other programs of equal code; so they are recorded
beside the digests.
"""

import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np

from ban_jax.types import Program

logger = logging.getLogger(__name__)

VERSIONS = f"JAX {jax.__version__}, Flax {flax.__version__}"
# A symbol of the module's text: the function's name, which its author chose. A custom call's is what it computes.
_SYMBOL = re.compile(r'(custom_call )?@("(?:[^"\\]|\\.)*"|[\w$.-]+)')
# What results are called: paths in the trees that functions return.
_LABEL = re.compile(r' ?\{?jax\.result_info = "(?:[^"\\]|\\.)*"\}?')


@contextlib.contextmanager
def neutral() -> Iterator[None]:
  """Takes back settings of the process that would change the programs of equal code."""
  with (
    jax.disable_jit(False),
    jax.default_matmul_precision("default"),
    jax.default_prng_impl("threefry2x32"),
    jax.threefry_partitionable(True),
  ):
    yield


def trace(function: Callable[..., Any], *shapes: Any) -> Any:
  """Returns a function's trace (jax.stages.Traced) for arguments of these shapes."""
  with neutral():
    return jax.jit(function, keep_unused=True).trace(*shapes)  # an argument's place is part of what is computed


def digest(*traces: Any) -> str:
  """Returns the SHA-256 of what traced functions compute on any platform, without the names in their code."""
  total = hashlib.sha256()
  for traced in traces:
    with neutral():
      text = _lowered(traced).as_text()
    names: dict[str, str] = {}

    def plain(match: re.Match[str], names: dict[str, str] = names) -> str:
      return match[0] if match[1] else names.setdefault(match[2], f"@{len(names)}")

    total.update(_SYMBOL.sub(plain, _LABEL.sub("", text)).encode())
    for constant in traced.jaxpr.consts:  # which a later JAX may pass as arguments, in place of writing them down
      constant = np.asarray(constant)
      total.update(f"{constant.dtype} {constant.shape}".encode() + constant.tobytes())
  return total.hexdigest()


def _lowered(traced: Any) -> Any:
  try:
    return traced.lower(lowering_platforms=("cpu",))
  except Exception:  # a kernel for another platform, which is this one
    return traced.lower()


def reached(traced: Any, argument: int) -> Any:
  """Returns the tree of a traced function's results, each True where it depends on the argument of that number."""
  given = [number == argument for number, tree in enumerate(traced.in_avals[0]) for _ in jax.tree.leaves(tree)]
  return jax.tree.unflatten(jax.tree.structure(traced.out_info), _marks(traced.jaxpr.jaxpr, given))


def _marks(jaxpr: Any, given: Sequence[bool]) -> list[bool]:
  """Returns which results of a jaxpr depend on the inputs that are marked; some that do not may be among them."""
  marked = {variable for variable, mark in zip(jaxpr.invars, given, strict=True) if mark}

  def is_marked(atom: Any) -> bool:
    return not hasattr(atom, "val") and atom in marked  # a literal has a value, and no hash

  for equation in jaxpr.eqns:
    inputs = [is_marked(atom) for atom in equation.invars]
    outputs = [any(inputs)] * len(equation.outvars)
    for inner in equation.params.values():
      inner = getattr(inner, "jaxpr", inner)  # a call's
      sizes = [len(getattr(inner, name, ())) for name in ("invars", "outvars")]
      if any(inputs) and equation.primitive.name != "scan" and sizes == [len(inputs), len(outputs)]:
        outputs = _marks(inner, inputs)
    marked |= {variable for variable, mark in zip(equation.outvars, outputs, strict=True) if mark}
  return [is_marked(atom) for atom in jaxpr.outvars]


def record(name: str, own: Program, *, trained: bool) -> dict[str, str]:
  """Returns what a lineage keeps of a network's program, as JSON holds it; of a teacher's, not its training."""
  return {"name": name, **own._asdict(), **({} if trained else {"trains": ""})}


def changed(recorded: Mapping[str, str] | None, own: Mapping[str, str] | None, what: str = "network") -> str:
  """Returns in words what a network or optimizer computes otherwise than a `record` says; "" where nothing is known.

  Where the record is of other versions of JAX or Flax, under which equal code may have other digests, the network is
  taken as unchanged, and a warning says so.
  """
  if recorded is None or own is None:
    return ""
  modes = {"predicts": "evaluation", "trains": "training"}
  differing = " and ".join(mode for key, mode in modes.items() if recorded[key] != own[key])
  if differing and recorded["versions"] != own["versions"]:
    _warn(f"{what} {own['name']!r}", recorded["versions"], own["versions"])
    return ""
  return differing and f"the code of {what} {own['name']!r} was changed: it computes something else in {differing}"


@functools.cache
def _warn(what: str, recorded: str, own: str) -> None:
  logger.warning(
    f"{what} was recorded by {recorded}, and this is {own}: whether its code was changed too cannot be told; "
    "it is taken as unchanged"
  )

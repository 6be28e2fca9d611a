"""What a compiler makes of a program, for chips that are here or not: memory, cycles, exchanges, costly instructions.

The numbers are read from XLA's memory analysis and from the text of the optimised program.
"""

import collections
import gzip
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath

from ban_jax import storage
from ban_jax.chips import Slice
from ban_jax.programs import KINDS, Program


class Instruction(NamedTuple):
  """An instruction of a compiled program."""

  name: str
  kind: str  # fusion, convolution, copy, all-reduce, ...
  shape: str  # with its layout
  layer: str  # the part of the source that it comes from
  times: float  # how often a step runs it
  cycles: int  # the compiler's estimate for once; 0 where it gives none
  line: str

  @property
  def bytes(self) -> int:
    """The bytes of its result, without padding."""
    return sum(_size(array)[0] for array in _ARRAY.finditer(self.shape))


class Compiled(NamedTuple):
  """What a compiler made of a program, or that it does not fit."""

  seconds: float  # that it took
  memory: Mapping[str, int]  # bytes a chip: argument, output, alias, temp, generated_code; {} if it does not fit
  text: str  # the optimised program
  error: str = ""  # the compiler's words where the program does not fit


class Report(NamedTuple):
  """What a compiled program costs a chip. Cycles are the compiler's estimate, and leave out collectives."""

  program: str
  fits: bool
  needed: int  # bytes; 0 where the compiler does not say
  available: int
  memory: Mapping[str, int]  # bytes by kind: state, teacher, data, carry, index, output, temporaries, code
  batch: int  # of a chip
  steps: int  # mini-batches of a dispatch
  flops: int  # of a step
  cycles: float  # of a step; 0 where the compiler estimates none
  share: float  # of the peak, that these cycles would be
  costly: Sequence[Mapping[str, Any]]  # the most expensive instructions
  collectives: Mapping[str, Mapping[str, float]]  # kind -> number and bytes a step
  seconds: float
  error: str = ""


_ARRAY = re.compile(r"(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^{}]*)\})?")
_HEAD = re.compile(r"\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>.+?) (?P<kind>[a-z][\w\-]*)\(")
_EXCHANGES = re.compile(
  r"(all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|collective-broadcast|send|recv"
  r"|infeed|outfeed)(-start)?"
)
_FULL = re.compile(r"([\d.]+)([KMGT]?)\)? (?:of|exceeds available HBM)")


def compile_for(program: Program, where: Slice, cache: epath.Path | None = None) -> Compiled:
  """Returns what the compiler of `where` makes of a program.

  With `cache`, a directory, a program that was compiled before is read from there: it is known by its own text, the
  chips, the compiler and its flags.
  """
  lowered = program.step.lower(*program.arguments)
  flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
  key = [lowered.as_text(), where.kind, where.shape, len(program.devices), where.compiler, jax.__version__, flags]
  path = cache and cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json.gz"
  if path and path.exists():
    return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
  start = time.monotonic()
  memory, text, error = {}, "", ""
  try:
    compiled = lowered.compile()
    found = compiled.memory_analysis()
    names = ("argument", "output", "alias", "temp", "generated_code")
    memory = {name: int(getattr(found, f"{name}_size_in_bytes")) for name in names}
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError as problem:
    if "RESOURCE_EXHAUSTED" not in str(problem):
      raise
    error = str(problem).splitlines()[0]
  made = Compiled(round(time.monotonic() - start, 1), memory, text, error)
  if path:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(path, gzip.compress(json.dumps(made._asdict()).encode()))
  return made


def report(name: str, program: Program, flops: int, made: Compiled, where: Slice) -> Report:
  """Returns what a compiled program costs a chip of `where`, with its most expensive instructions.

  `flops` are those of one step (`count_flops`).
  """
  memory: dict[str, int] = {}
  cycles, costly = 0.0, []
  exchanged: dict[str, Any] = collections.defaultdict(collections.Counter)
  needed = _needed(made.error)
  if not made.error:
    memory = _by_kind(program, made)
    needed = sum(memory.values())
    found = sorted(instructions(made.text, program.steps), key=lambda each: -each.cycles * each.times)
    cycles = sum(each.cycles * each.times for each in found)
    costly = [
      {"cycles": each.cycles * each.times, "share": each.cycles * each.times / cycles, "instruction": each.name,
       "shape": each.shape, "layer": each.layer}
      for each in found[:10] if each.cycles
    ]  # fmt: skip
    for kind, each in exchanges(made.text, program.steps):
      exchanged[kind].update(number=each.times, bytes=each.bytes * each.times)
  peak = where.chip.flops_per_cycle
  return Report(
    program=name,
    fits=not made.error and needed <= where.chip.memory,
    needed=needed,
    available=where.chip.memory,
    memory=memory,
    batch=program.rows,
    steps=program.steps,
    flops=flops,
    cycles=cycles,
    share=flops / (cycles * peak) if cycles and peak else 0.0,
    costly=costly,
    collectives={kind: dict(sums) for kind, sums in exchanged.items()},
    seconds=made.seconds,
    error=made.error,
  )


def instructions(text: str, steps: int = 1) -> Iterator[Instruction]:
  """Yields the instructions of an optimised program, except those inside fusions.

  A loop of unknown length is the one over the `steps` mini-batches of a dispatch.
  """
  computations, entry = _computations(text)

  def walk(name: str, times: float) -> Iterator[Instruction]:
    for line in computations[name]:
      head = _HEAD.match(line)
      if not head:
        continue
      cycles, source = re.search(r'"estimated_cycles":"(\d+)"', line), re.search(r'op_name="([^"]*)"', line)
      layer = _layer(source[1]) if source else ""
      yield Instruction(head["name"], head["kind"], head["shape"], layer, times, int(cycles[1]) if cycles else 0, line)
      called = dict(re.findall(r"(condition|body|to_apply)=%?([\w.\-]+)", line))
      if head["kind"] == "while":
        yield from walk(called["body"], times * (_trips(computations[called["condition"]]) or steps))
      elif head["kind"] == "call":
        yield from walk(called["to_apply"], times)
      elif head["kind"] == "conditional":  # as if all branches were taken
        for branch in re.findall(r"%([\w.\-]+)", line.partition("branch_computations={")[2].partition("}")[0]):
          yield from walk(branch, times)

  yield from walk(entry, 1 / steps)


def exchanges(text: str, steps: int = 1) -> Iterator[tuple[str, Instruction]]:
  """Yields what is exchanged between devices, and between device and host: its kind and the instruction."""
  for each in instructions(text, steps):
    if kind := _EXCHANGES.fullmatch(each.kind):
      yield kind[1], each


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation of an optimised program, and the name of the first to run."""
  found: dict[str, list[str]] = {}
  lines, entry = [], ""
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if head:
      lines = found[head[2]] = []
      entry = head[2] if head[1] else entry
    else:
      lines.append(line)
  return found, entry


def _trips(condition: Sequence[str]) -> int:
  """Returns the turns of a loop that counts up to a constant from 0; 0 if their number is not known."""
  text = "\n".join(condition)
  bounds = re.findall(r"constant\((\d+)\)", text)
  return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in text else 0


def _layer(source: str) -> str:
  """Returns the layer that an instruction comes from, and its operation, marked if it belongs to the gradient."""
  parts = [
    part
    for part in source.split("/")
    if part not in ("shard_map", "while", "body", "cond", "closed_call", "branch_0_fun", "branch_1_fun")
  ]
  parts = [part for part in parts if not re.fullmatch(r"(jit|pjit|xla_pmap)\(.*\)", part)]
  gradient = any(part.startswith("transpose(") for part in parts)
  parts = [
    re.sub(r"^(?:(?:transpose|jvp|vmap|checkpoint|rematted_computation)\()+([^()]*)\)*$", r"\1", p) for p in parts
  ]
  return "/".join(part for part in parts if part) + (", gradient" if gradient else "")


def _size(array: re.Match[str]) -> tuple[int, int]:
  """Returns the bytes of an array, without and with the padding of its layout on a TPU."""
  lengths = [int(length) for length in array["shape"].split(",") if length]
  item = int(array["bits"]) / 8 if array["bits"] else 1
  order, _, tiles = (array["layout"] or "").partition(":")
  padded = [lengths[int(axis)] for axis in reversed(order.split(",")) if axis] or list(lengths)
  tile = re.match(r"T\(([\d,]+)\)", tiles)
  if tile:
    sizes = [int(size) for size in tile[1].split(",")]
    padded = [1] * (len(sizes) - len(padded)) + padded
    for place, size in enumerate(sizes, len(padded) - len(sizes)):
      padded[place] = -(-padded[place] // size) * size
  return math.ceil(math.prod(lengths) * item), math.ceil(math.prod(padded) * item)


def _by_kind(program: Program, made: Compiled) -> dict[str, int]:
  """Returns the bytes of a compiled program on a chip, by what they are for."""
  owners = [name for name, tree in zip(program.names, program.arguments, strict=True) for _ in jax.tree.leaves(tree)]
  computations, entry = _computations(made.text)
  found = dict.fromkeys((name for name in KINDS if name in owners), 0)
  for line in computations[entry]:
    head, number = _HEAD.match(line), re.search(r" parameter\((\d+)\)", line)
    if head and number:
      # Arguments that a program does not use are left out of its parameters, and keep their place in the name.
      named = re.search(r'op_name="flat_args\[(\d+)\]"', line)
      owner = owners[int(named[1] if named else number[1])]
      found[owner] += sum(_size(array)[1] for array in _ARRAY.finditer(head["shape"]))
  size = made.memory
  return {
    **found,
    "output": size["output"] - size["alias"],
    "temporaries": size["temp"],
    "code": size["generated_code"],
  }


def _needed(error: str) -> int:
  """Returns the bytes that a compiler says a program needs, where it says so as it refuses it; or 0."""
  found = _FULL.search(error)
  return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else 0


def fixed(report: Report) -> int:
  """Returns the bytes of a program that do not grow with the batch."""
  return sum(report.memory.get(kind, 0) for kind in ("state", "network", "teacher", "data", "code"))


def largest_batch(
  needed: Callable[[int], tuple[bool, int]], first: int, most: int, memory: int, fixed: int = 0, step: int = 8
) -> int:
  """Returns the largest batch of a chip that fits, 0 for none: a multiple of `step` up to `most`, within 2 %.

  `needed(batch)` compiles and returns (whether it fits, bytes, 0 if unknown); `first` is compiled first, and `fixed`
  are the bytes that would be needed without a batch. Memory is nearly a linear function of the batch, so the next one
  is where the line through the last two reaches `memory`. Where the compiler begins to compute things twice instead of
  keeping them, more fits than the line says.
  """
  fitting, failing, stride = 0, most // step * step + step, step
  known, batch = [(0, fixed)], min(max(step, first // step * step), failing - step)
  while batch > fitting:
    fits, size = needed(batch)
    known += [(batch, size)] if size else []
    fitting, failing = (batch, failing) if fits else (fitting, batch)
    if failing - fitting <= max(step, fitting // 50):
      break
    # With one point known, and not what is fixed, the line begins at 0 and may lie too high.
    guess = (
      max(_crossing(known[-2:], memory), 2 * batch if fits and len(known) == 2 and not fixed else 0) // step * step
    )
    stride = max(stride, fitting // 50 // step * step)  # where that much more does not fit, the search ends
    if guess < fitting + stride and fits or guess <= fitting:
      guess, stride = fitting + stride, 2 * stride
    if guess >= failing:
      guess = failing - step if failing > most else (fitting + failing) // 2 // step * step
    batch = guess
  return fitting


def _crossing(known: Sequence[tuple[int, int]], memory: int) -> int:
  """Returns where the line through two points (batch, bytes) reaches `memory`."""
  (one, low), (two, high) = known[0], known[-1]
  return int(two + (memory - high) * (two - one) / (high - low)) if high != low else 2 * max(one, two)

"""Measures training and evaluation steps and whole epochs, as one table of ratios.

  python experiments/bench.py                                        everything; on two cores an hour
  python experiments/bench.py --rows=wrn_16_1,lstm_200 --sections=steps
  python experiments/bench.py --processor_time                       on a machine that is busy otherwise: one thread

`pip install -e '.[benchmark]'` adds PyTorch and Grain, to compare with; without them our times stand alone. The sides
take turns, so that a machine that becomes slower or faster does so for all, and a ratio is of two neighboring turns.
Sections:

  steps   ours and PyTorch's: channels last, as it is and under torch.compile, whichever is faster. Ours cuts and
          augments its mini-batches in the step, PyTorch's lie ready (experiments/analysis/torch_networks.py); both have
          what --keep_memory does for the process
  replay  the kinds of taught steps beside the supervised one: by one teacher and by three, live and recorded
  floor   a step beside the least time that it could take: its operations at the rate of a large matrix product, or the
          bytes that XLA's instructions read and write at the rate of a copy, whichever is more; both rates are measured
          first. The bytes of a loop, as over an LSTM's window, are those of one turn. On TPUs also the cycles that
          their compiler expects, at the chip's clock
  memory  the MiB that the compiler says a step needs, and the most that were in use on a device until it ended: in the
          first case of a command nothing else was. Not on CPUs, which do not say
  epoch   a step of an epoch of ban_jax.train, evaluation of one example included where a plateau schedule decides by
          it, and the same step on one mini-batch again and again
  feed    a mini-batch of images of 224 pixels as a stream brings them to the devices: JPEGs of many sizes in an
          array_record file, by threads and by processes, beside Grain's plain loop and PyTorch's DataLoader, and a
          memory map of --feed_gb times 10^9 bytes, with the most memory that is this process's own; what a step of
          50 ms waits for its data; and the index that resident data need. A pass over the JPEGs is 16 mini-batches and
          begins with the start of threads and processes, each reader has one in a turn, and the first turn, in which
          libraries are imported, is left out.

On accelerators there are more rows, in bfloat16 too, and --peak_tflops shows the share of the peak.
"""

import experiments.interrupts  # noqa: F401  before all others: from here on Ctrl-C prints no traceback

import ctypes
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from ban_jax import chips, data, storage, summary, train
from ban_jax import compiled as compiled_lib
from ban_jax import devices as devices_lib
from ban_jax.errors import ConfigError, look_up
from ban_jax.job import Job
from ban_jax.models import DTYPES
from ban_jax.programs import count_flops
from ban_jax.resolving import make_models
from ban_jax.types import Devices
from experiments import cli, results
from experiments.analysis import cases, readers
from experiments.analysis.cases import KINDS, ROWS, Run

# Load average above which another program takes part of a core.
BUSY = 1.5
# Steps after which the heap, which --keep_memory does not give back, has its size.
WARM_UP = 5
# Mini-batches of a pass over JPEGs.
FEED_STEPS = 16


class Options(NamedTuple):
  """The values of the flags; an empty choice or a zero leaves it to the platform."""

  rows: tuple[str, ...] = ()
  kinds: tuple[str, ...] = ("supervised", "distilled", "replayed", "evaluation")
  sections: tuple[str, ...] = ("steps", "replay", "floor", "epoch")
  dtypes: tuple[str, ...] = ()
  feed_gb: float = 10.0
  feed_images: int = 2000
  turns: int = 7
  steps: int = 0
  epoch_steps: int = 16
  batch: int = 0
  processor_time: bool = False
  torch: bool = True
  torch_compile: bool = True
  peak_tflops: float = 0.0
  changes: Mapping[str, Any] = {}
  progress: bool = False

  @property
  def clock(self) -> Callable[[], float]:
    return time.process_time if self.processor_time else time.perf_counter


class Place(NamedTuple):
  """Where things are measured."""

  platform: str
  devices: Devices


class Case(NamedTuple):
  """What a line of the table is about."""

  row: str
  kind: str
  dtype: str


class Measurement(NamedTuple):
  """A line of the table: ours, and what it is compared with, turn by turn."""

  section: str
  case: Case
  what: str
  ours: Sequence[float]
  against: str = ""
  other: Sequence[float] = ()
  flops: float = 0.0  # a step's, on all devices together

  @property
  def ratios(self) -> list[float]:
    return [mine / other for mine, other in zip(self.ours, self.other, strict=True)] if self.other else []


# --- what is measured ----------------------------------------------------------------------------------------------


def cases_of(options: Options, place: Place, *, training: bool = False) -> Iterator[Case]:
  """Yields the chosen cases, those of `training` steps alone if asked to."""
  on_cpu = place.platform == "cpu"
  for row in options.rows or [name for name, row in ROWS.items() if not (row.large and on_cpu)]:
    for dtype in options.dtypes or (("float32",) if on_cpu else ("float32", "bfloat16")):
      for kind in options.kinds:
        if cases.is_measured(row, kind, training=training):
          if options.progress:
            print(f"{row}, {kind}, {dtype}", file=sys.stderr, flush=True)
          release_memory()
          yield Case(row, kind, dtype)


def release_memory() -> None:
  """Gives what the last case held back to the system.

  With --keep_memory the heap would grow from case to case, until it is trimmed and filled again in every step.
  """
  jax.clear_caches()
  gc.collect()
  if platform.libc_ver()[0] == "glibc":
    ctypes.CDLL(None).malloc_trim(0)


def configuration(options: Options, case: Case, changes: Mapping[str, Any] = {}, **more: Any) -> ConfigDict:
  """Returns the configuration of a case, changed by the flags and by `changes`; `more` as `cases.configuration`'s."""
  changes = {**options.changes, **changes}
  return cases.configuration(case.row, batch=options.batch, dtype=case.dtype, changes=changes, **more)


def job_of(options: Options, place: Place, case: Case, **changes: Any) -> Job:
  """Returns the job of a case, with changes of the configuration as `configuration` takes them."""
  cfg = configuration(options, case, **changes)
  return cases.job_of(KINDS[case.kind], cases.setup_of(cfg, place.devices))


def steps_of(options: Options, place: Place) -> int:
  """Returns the steps of a turn: enough that an accelerator's queue does not run dry."""
  return options.steps or (2 if place.platform == "cpu" else 50)


def take_turns(sides: Mapping[str, Run], options: Options, steps: int) -> dict[str, list[float]]:
  """Returns each side's seconds a step, turn by turn, after a turn that compiles and some steps that warm up."""
  for run in sides.values():
    run(steps)
    run(max(steps, WARM_UP))
  seconds = {name: [] for name in sides}
  for turn in range(options.turns):
    for name in list(sides)[:: 1 if turn % 2 else -1]:  # nobody is always the first
      start = options.clock()
      sides[name](steps)
      seconds[name].append((options.clock() - start) / steps)
  return seconds


def torch_device(options: Options, place: Place) -> str | None:
  """Returns the device on which PyTorch runs the same work, or None where it does not."""
  if not options.torch or importlib.util.find_spec("torch") is None:
    return None
  import torch

  from experiments.analysis import torch_networks

  torch_networks.start(devices_lib.cores())
  devices = {"cpu": "cpu"} | ({"gpu": "cuda"} if torch.cuda.is_available() else {})
  return devices.get(place.platform)


def torch_sides(options: Options, place: Place, case: Case) -> dict[str, Run]:
  """Returns PyTorch's sides of a case by name, ready to run: none where it is not there or does not know the kind."""
  device = torch_device(options, place)
  if device is None:
    return {}
  from experiments.analysis import torch_networks

  if case.kind not in torch_networks.KINDS:
    return {}
  cfg = configuration(options, case)
  ours, sides = make_models(cfg, data.describe(cfg.data).spec)[1], {}
  for name, compiled in {"PyTorch": False, "PyTorch, compiled": True}.items():
    if not compiled or options.torch_compile:
      run = torch_networks.run_of(case.kind, cfg, ours, device=device, compiled=compiled)
      try:
        run(1)
        sides[name] = run
      except Exception as error:  # torch.compile needs a C++ compiler, and raises what its parts raise
        if not compiled:
          raise
        print(f"warning: torch.compile fails, and is left out: {str(error).splitlines()[0]}", file=sys.stderr)
  return sides


def steps(options: Options, place: Place) -> Iterator[Measurement]:
  """Yields the time of a step, ours and PyTorch's."""
  for case in cases_of(options, place):
    yield _step(options, place, case)


def _step(options: Options, place: Place, case: Case) -> Measurement:
  job, kind = job_of(options, place, case), KINDS[case.kind]
  sides = {"ours": kind.run(job), **torch_sides(options, place, case)}
  seconds = take_turns(sides, options, steps_of(options, place))
  times = {name: [1e3 * each for each in found] for name, found in seconds.items()}
  ours = times.pop("ours")
  against = min(times, key=lambda name: statistics.median(times[name])) if times else ""
  flops = count_flops(kind.program(job)) * len(place.devices)
  return Measurement("steps", case, "ms a step", ours, against, times.get(against, ()), flops)


def replay(options: Options, place: Place) -> Iterator[Measurement]:
  """Yields the time of a taught step, beside that of a supervised one."""
  for case in cases_of(options._replace(kinds=("replayed",)), place):
    names = ("supervised", "distilled", "distilled_3", "replayed", "replayed_3")
    sides = {name: KINDS[name].run(job_of(options, place, case._replace(kind=name))) for name in names}
    seconds = take_turns(sides, options, steps_of(options, place))
    plain, *taught = ([1e3 * each for each in seconds[name]] for name in names)
    for name, times in zip(names[1:], taught, strict=True):
      yield Measurement("replay", case._replace(kind=name), "ms a step", times, "supervised", plain)


def floor(options: Options, place: Place) -> Iterator[Measurement]:
  """Yields the time of a step beside the least that its operations or its bytes take on these devices."""
  rates: dict[str, tuple[float, float]] = {}
  for case in cases_of(options, place):
    if case.dtype not in rates:
      rates[case.dtype] = peak_rates(options, place, case.dtype)
    job, kind, devices = job_of(options, place, case), KINDS[case.kind], len(place.devices)
    program = kind.program(job)
    compiled = program.step.lower(*program.arguments).compile()
    estimate = _estimate(compiled, place.devices[0])
    work = {"operations": count_flops(program), "bytes": compiled.cost_analysis()["bytes accessed"]}
    least = {
      what: 1e3 * amount * devices / rate for (what, amount), rate in zip(work.items(), rates[case.dtype], strict=True)
    }
    bound = max(least, key=least.get)
    seconds = take_turns({"ours": kind.run(job)}, options, steps_of(options, place))["ours"]
    shown = ", ".join(f"{what} {number(milliseconds)} ms" for what, milliseconds in (least | estimate).items())
    times = [1e3 * each for each in seconds]
    flops = work["operations"] * devices
    yield Measurement("floor", case, f"ms a step; {shown}", times, bound, [least[bound]] * len(times), flops)


def _estimate(compiled: Any, device: jax.Device) -> dict[str, float]:
  """Returns the milliseconds of a compiled step by its compiler's estimate, which only those of TPUs give."""
  chip = chips.of_device(device)
  if chip is None:
    return {}
  cycles = sum(each.cycles * each.times for each in compiled_lib.instructions(compiled.as_text()))
  return {"compiler's cycles": 1e3 * cycles / chip.clock} if cycles else {}


def memory(options: Options, place: Place) -> Iterator[Measurement]:
  """Yields the MiB in use on a device beside those that the compiler expects of a step."""
  for case in cases_of(options, place):
    job, kind = job_of(options, place, case), KINDS[case.kind]
    kind.run(job)(steps_of(options, place))
    used = _most_used(place.devices[0])
    if not used:
      continue
    program = kind.program(job, steps=0)
    found = program.step.lower(*program.arguments).compile().memory_analysis()
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, -found.alias_size_in_bytes)
    expected = sum(sizes) + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    yield Measurement("memory", case, "MiB", [used / 2**20], "compiler", [expected / 2**20])


def _most_used(device: jax.Device) -> int:
  """Returns the most bytes that were ever in use on a device; 0 for one that does not count them, as a CPU."""
  return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def peak_rates(options: Options, place: Place, dtype: str) -> tuple[float, float]:
  """Returns all devices' operations a second in a large matrix product, and bytes a second in a copy."""
  count, best = len(place.devices), []
  size, length = (1024, 2**24) if place.platform == "cpu" else (8192, 2**28)
  product = (lambda x: x @ x, (size, size), 2 * size**3)
  copy = (lambda x: x + 1, (length,), 2 * length * jax.numpy.dtype(dtype).itemsize)
  for function, shape, amount in (product, copy):
    mapped = devices_lib.pmap(function, devices=place.devices, in_axes=(0,))
    given = devices_lib.place(np.ones((count, *shape), dtype), place.devices)

    def run(steps: int, mapped=mapped, given=given) -> None:
      for _ in range(steps):
        jax.block_until_ready(mapped(given))

    best.append(count * amount / min(take_turns({"it": run}, options, steps_of(options, place))["it"]))
  if options.progress:
    print(f"{dtype}: {best[0] / 1e9:,.0f} GFLOP/s, {best[1] / 1e9:,.1f} GB/s", file=sys.stderr, flush=True)
  return best[0], best[1]


def epoch(options: Options, place: Place) -> Iterator[Measurement]:
  """Yields the time of a step in epochs of the training loop, and on one mini-batch between two epochs."""
  epochs, count = options.turns + 2, options.epoch_steps  # the first epoch compiles, and the last one is evaluated
  changes = {"train.epochs": epochs, "train.checkpoint_every": epochs * count, "train.evaluate_every": 0}
  for case in cases_of(options, place, training=True):
    times = _epochs(job_of(options, place, case, batches=count, changes=changes), options.clock)
    ours, fixed = ([1e3 * seconds for seconds in each[1:-1]] for each in zip(*times, strict=True))
    yield Measurement("epoch", case, "ms a step", ours, "one mini-batch", fixed)


def _epochs(job: Job, clock: Callable[[], float]) -> list[tuple[float, float]]:
  """Returns, for every epoch of a job, the seconds a step in it and after it, on one mini-batch."""
  count, fixed = job.steps_per_epoch, cases.training(job, fixed=True)
  fixed(count)
  dispatches, looks, began, times = -(-count // job.steps_per_dispatch), 0, clock(), []

  def look() -> bool:  # what the loop asks after each dispatch: whether to stop
    nonlocal looks, began
    looks += 1
    if looks % dispatches == 0:
      ended = clock()
      fixed(count)
      now = clock()
      times.append(((ended - began) / count, (now - ended) / count))
      began = clock()
    return False

  train.train([job], [None], look, False)
  return times


def feed(options: Options, place: Place) -> Iterator[Measurement]:
  """Yields the time in which a mini-batch of images is read, from sets that are made here and removed."""
  batch, devices = options.batch or cases.IMAGES, place.devices[:1]
  with tempfile.TemporaryDirectory() as name:
    folder, form = pathlib.Path(name), readers.FORM
    files = readers.jpegs(folder, options.feed_images)
    order, decoded = readers.order_of(len(files), batch, FEED_STEPS), readers.Decoded(files, form)
    readers.prepare()
    for workers in readers.WORKERS:
      sides = {"ours": functools.partial(readers.ours, readers.streamed(files, form, workers), order, devices)}
      others = {"grain": readers.grains, "torch": readers.torches} if options.torch else {}
      there = {side: make for side, make in others.items() if importlib.util.find_spec(side)}
      sides |= {side: functools.partial(make, decoded, order, workers) for side, make in there.items()}
      found: dict[str, list[float]] = {side: [] for side in sides}
      for turn in range(options.turns + 1):  # imports are in the first one, which is left out
        for side, make in sides.items():
          seconds = readers.go_through(make, options.clock).seconds
          found[side] += [1e3 * seconds] if turn else []
      mine, case = found.pop("ours"), Case("JPEG, array_record", f"{workers} processes", "uint8")
      for side, theirs in found.items() or [("", [])]:
        yield Measurement("feed", case, f"ms for {batch} images", mine, side, theirs)
    images, labels = readers.raw(folder, options.feed_gb)
    mapped = readers.streamed((images, labels), readers.Form(0, "whole", 3))
    case = Case(f"memory map, {images.nbytes / 1e9:.3g} GB", "0 processes", "uint8")
    order = readers.order_of(len(images), batch, len(images) // batch)  # a whole pass
    passed = readers.go_through(functools.partial(readers.ours, mapped, order, devices), options.clock)
    slow = functools.partial(readers.ours, mapped, order[: 10 * options.turns], devices)
    waited = readers.go_through(slow, options.clock, step=0.05).waited
    own = f"; {passed.own_gib:.2f} GiB of own memory at most; a step of 50 ms waits {waited:.1%}"
    yield Measurement("feed", case, f"ms for {batch} images{own}", [1e3 * passed.seconds])
  resident = mapped._replace(streams={})  # whose feeds are index vectors alone
  passed = readers.go_through(functools.partial(readers.ours, resident, order, devices), options.clock)
  yield Measurement("feed", Case("resident", "", "uint8"), f"ms for {batch} images", [1e3 * passed.seconds])


# The first one is that of memory, whose use does not fall again.
SECTIONS = {"memory": memory, "steps": steps, "replay": replay, "floor": floor, "epoch": epoch, "feed": feed}


def start_jax() -> Devices:
  """Returns the devices of the command line; one of several, unless --devices says otherwise."""
  devices = cli.start_jax(side_by_side=True)
  if jax.process_count() > 1:
    raise ConfigError("this benchmark runs in one process; leave out the flags for several")
  return devices if cli.DEVICES.value else devices[:1]


# --- the table -----------------------------------------------------------------------------------------------------


def number(value: float) -> str:
  """Returns a number with three digits or all before the point."""
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(measurements: Sequence[Measurement], peak: float = 0.0) -> str:
  """Returns a Markdown table; `peak` is the devices' operations a second together, 0 for no share of it."""
  title = ["section", "network", "kind", "type", "measured", "ours", "other", "other is", "ours / other", "range"]
  rows = [[*title, "GFLOP/s", *(["share of peak"] if peak else [])]]
  for found in measurements:
    row, ratios = [found.section, *found.case, found.what, number(statistics.median(found.ours))], found.ratios
    row += [number(statistics.median(found.other)) if found.other else "", found.against]
    row.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    row.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else "")
    rate = found.flops / statistics.median(found.ours) * 1e3  # from operations in milliseconds
    row.append(number(rate / 1e9) if rate else "")
    rows.append(row + ([f"{rate / peak:.1%}" if rate else ""] if peak else []))
  return summary.markdown(rows)


def describe(options: Options, place: Place, load: float) -> dict[str, Any]:
  """Returns under what settings the numbers were found."""
  has_torch = torch_device(options, place) is not None
  return {
    "processor": processor(),
    "cores": devices_lib.cores(),
    "jax": jax.__version__,
    "devices": len(place.devices),
    "device_kind": place.devices[0].device_kind,
    "torch": importlib.metadata.version("torch") if has_torch else None,
    "clock": "processor time" if options.processor_time else "wall time",
    "turns": options.turns,
    "steps": steps_of(options, place),
    "load": round(load, 2),
    "python": platform.python_version(),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    "changes": dict(options.changes),
  }


def heading(settings: Mapping[str, Any]) -> str:
  """Returns the settings as text, with a warning if the machine was busy."""
  torch = f"PyTorch {settings['torch']}, threads: {settings['cores']}" if settings["torch"] else "no PyTorch"
  lines = [
    f"{settings['processor']}, cores: {settings['cores']}, load average {settings['load']:.2f}. JAX {settings['jax']}, "
    f"devices: {settings['devices']} ({settings['device_kind']}); {torch}.",
    f"Medians of {settings['turns']} turns of {settings['steps']} steps, {settings['clock']}; ratios are medians over "
    "turns, below 1 where ours takes less.",
  ]
  if settings["changes"]:
    lines.append("Changed: " + ", ".join(f"{key}={value}" for key, value in settings["changes"].items()) + ".")
  if settings["load"] > BUSY:
    lines.append(
      f"warning: the load average is above {BUSY}: other programs run. Wall times then say little; --processor_time is "
      f"more robust. OMP_WAIT_POLICY of PyTorch's threads: {os.environ.get('OMP_WAIT_POLICY', 'default')}."
    )
  return "\n".join(lines)


def processor() -> str:
  """Returns the processor's name, or its architecture if the system does not give the name."""
  information = pathlib.Path("/proc/cpuinfo")
  lines = information.read_text("utf-8").splitlines() if information.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.machine()


def record(settings: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
  """Returns settings and measurements as JSON."""
  found = [
    {**each.case._asdict(), **{key: value for key, value in each._asdict().items() if key != "case"}}
    for each in measurements
  ]
  record = storage.standard({"settings": settings, "measurements": found})
  return json.dumps(record, indent=2, allow_nan=False) + "\n"


# --- the command line ----------------------------------------------------------------------------------------------


def define_flags() -> None:
  """Defines the flags; in a function, so that this file can be imported beside other scripts."""
  default = Options()
  flags.DEFINE_list("rows", list(default.rows), "Networks; by default all, those for accelerators only there.")
  flags.DEFINE_list("kinds", list(default.kinds), "Kinds of steps.")
  flags.DEFINE_list("sections", list(default.sections), "Parts of the table.")
  flags.DEFINE_list(
    "dtypes", list(default.dtypes), "Types of activations; by default float32, elsewhere than on CPU bfloat16 too."
  )
  flags.DEFINE_integer("turns", default.turns, "Turns of each side.", lower_bound=1)
  flags.DEFINE_integer("steps", default.steps, "Steps of a turn; 0: 2 on CPU, 50 elsewhere.", lower_bound=0)
  flags.DEFINE_integer("epoch_steps", default.epoch_steps, "Steps of an epoch.", lower_bound=1)
  flags.DEFINE_float("feed_gb", default.feed_gb, "10^9 bytes of the memory map that is read.", lower_bound=0.0)
  flags.DEFINE_integer("feed_images", default.feed_images, "JPEGs of the file that is read.", lower_bound=1)
  flags.DEFINE_integer("batch", default.batch, f"Mini-batch; 0: {cases.IMAGES} images, or the preset's.", lower_bound=0)
  flags.DEFINE_string("changes", "{}", "Values of the configuration to change, as JSON: dotted key -> value.")
  flags.DEFINE_bool("processor_time", default.processor_time, "Measure processor time, on one core and thread.")
  flags.DEFINE_bool("torch", default.torch, "Compare with PyTorch, and readers with Grain, where they are installed.")
  flags.DEFINE_bool("torch_compile", default.torch_compile, "Also compare with torch.compile.")
  flags.DEFINE_float("peak_tflops", default.peak_tflops, "A device's peak, 10^12 operations/s.", lower_bound=0.0)
  flags.DEFINE_string("out", None, "File for the numbers as JSON.")


def read_flags() -> Options:
  """Returns the values of the flags; raises a ConfigError that lists the choices for a wrong name."""
  values = {name: getattr(flags.FLAGS, name) for name in Options._fields}
  values |= {name: tuple(dict.fromkeys(value)) for name, value in values.items() if isinstance(value, list)}
  values["changes"] = cli.read_changes("--changes", values["changes"])
  for name, known in {"rows": ROWS, "kinds": KINDS, "sections": SECTIONS, "dtypes": DTYPES}.items():
    for value in values[name]:
      look_up(known, value, name.removesuffix("s"))
  return Options(**values)


def pin() -> None:
  """Keeps this process, and every thread that it starts from now on, on one core."""
  if not hasattr(os, "sched_setaffinity"):
    raise ConfigError("--processor_time needs a system that can keep a process on one core, as Linux does")
  os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(options: Options, load: float, out: str | None = None) -> tuple[dict[str, Any], list[Measurement]]:
  """Returns the settings and the measurements of the chosen sections; a file `out` has those found so far."""
  devices = start_jax()
  place = Place(devices[0].platform, devices)
  if options.processor_time and place.platform != "cpu":
    raise ConfigError("--processor_time measures a CPU; leave it out on accelerators")
  settings, found = describe(options, place, load), []
  for name, section in SECTIONS.items():
    for each in section(options, place) if name in options.sections else ():
      found.append(each)
      if out:
        results.write(epath.Path(out), record(settings, found))
  return settings, found


def main() -> None:
  """Measures, and prints the settings and the table."""
  cli.unwind_on_interrupt()
  options, out, load = read_flags(), flags.FLAGS.out, os.getloadavg()[0]
  if load > BUSY:  # PyTorch's threads spin while they wait: beside other programs a step takes ten times as long
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  if options.processor_time:
    pin()
  settings, found = measure(options, load, out)
  if out:
    results.write(epath.Path(out), record(settings, found))
  print(f"{heading(settings)}\n\n{table(found, 1e12 * options.peak_tflops * settings['devices'])}")


if __name__ == "__main__":
  define_flags()
  cli.run(main)

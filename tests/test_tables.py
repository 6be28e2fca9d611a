"""The six tables: training each network once, skipping, resuming, the values of cells and their sources."""

import csv
import importlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading

import forks
import jax
import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from conftest import ROOT
from etils import epath

import ban_jax
from ban_jax import optim as optim_lib
from ban_jax import storage, summary
from ban_jax.data import describe, load
from ban_jax.errors import CheckpointError, ConfigError
from experiments import anchors
from experiments.tables import cost, graph, report, run
from experiments.tables import train as training
from experiments.tables import values as cell_values
from experiments.tables.spec import Cell
from experiments.tables.values import Value

# Runs a script; see there.
ONE_CACHE = str(ROOT / "tests" / "one_cache.py")
TABLES = {number: importlib.import_module(f"experiments.table{number}").TABLE for number in range(1, 7)}
# The columns of each table's first row, as the paper has them.
COLUMNS = {
  1: ["teacher", "BAN"],
  2: ["teacher", "BAN", "BAN+L", "CWTM", "DKPP", "BAN-1", "BAN-2", "BAN-3", "Ens*2", "Ens*3"],
  3: ["teacher", "BAN", "DenseNet-90-60"],
  4: ["teacher", "2x depth"],
  5: ["baseline", "BAN"],
  6: ["teacher val", "BAN+L val", "teacher test", "BAN+L test"],
}


# Tables whose networks take longest to compile are made of one seed; how seeds are averaged, the others show.
SEEDS = dict.fromkeys(TABLES, "0;1") | {5: "0", 6: "0"}


def command(number, *flags):
  return [sys.executable, str(ROOT / "experiments" / f"table{number}.py"), "--devices=2", *flags]


def make(number, workdir, *flags):
  return forks.run(command(number, f"--workdir={workdir}", *flags), cwd="/")


def numbers_of(workdir, number):
  """Returns the lines of a table's file of numbers, by row and column."""
  lines = csv.DictReader((pathlib.Path(workdir) / f"table{number}.csv").read_text().splitlines())
  return {(line["row"], line["column"]): line for line in lines}


def written(workdir):
  """Returns when each generation's manifest was written."""
  return {path: path.stat().st_mtime_ns for path in pathlib.Path(workdir).glob("runs/*/gen_*/manifest.json")}


def cells(number, scale="paper", seeds=1, **options):
  return TABLES[number].cells(scale, seeds, "", controls=options.get("controls", False))


def nodes(number, *args, **options):
  """Returns all generations of a table."""
  return graph.topological_order(
    node for cell in cells(number, *args, **options) for members in cell.members for node in members
  )


def members(number, row, column, **options):
  """Returns the networks of a cell at its first seed."""
  (cell,) = [cell for cell in cells(number, **options) if (cell.row, cell.column) == (row, column)]
  return cell.members[0]


# --- made through the command line -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A workdir for all tables, which share generations."""
  return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def made(workdir):
  """Returns a function that makes a table, at most once, and returns the finished process."""
  done = {}

  def get(number):
    if number not in done:
      done[number] = make(number, workdir, f"--seeds={len(SEEDS[number].split(';'))}")
    assert done[number].returncode == 0, done[number].stderr
    return done[number]

  return get


@pytest.mark.slow
@pytest.mark.parametrize("number", TABLES)
def test_every_table_is_made_and_every_number_can_be_traced(number, made, workdir):
  done = made(number)
  text = (workdir / f"table{number}.md").read_text()
  assert text in done.stdout
  assert matplotlib.image.imread(workdir / f"table{number}.png").std() > 0.05, "the plot is blank"
  found = numbers_of(workdir, number)
  rows = [row for row in TABLES[number].rows if row.network]
  trained = {name: line for name, line in found.items() if line["sources"]}
  first = next(iter(trained))[0]
  assert [column for row, column in trained if row == first] == COLUMNS[number]
  assert len({row for row, _ in trained}) == (2 if number == 5 else 1)
  for (row, column), line in trained.items():
    paper = next(r.paper[column] for r in rows if r.name == row)
    assert float(line["paper"]) == paper
    assert (line["scale"], line["seeds"]) == ("smoke", SEEDS[number])
    values = [float(value) for value in line["values"].split(";")]
    several, error = len(values) > 1, abs(values[0] - values[-1]) / 2
    rounded = 1e-5 * max(values)
    assert float(line["mean"]) == pytest.approx(np.mean(values), rel=1e-5)
    assert line["standard_error"] == "" or float(line["standard_error"]) == pytest.approx(error, abs=rounded)
    assert (line["standard_error"] != "") == several
    assert float(line["difference_from_paper"]) == pytest.approx(np.mean(values) - paper, abs=rounded)
    assert f"| {paper:g} " in text
    # The table rounds the exact numbers, not those of the file, which are rounded already.
    shown = re.findall(r"\| (\d+\.\d\d) " + r"± (\d+\.\d\d) " * several, text)
    expected = pytest.approx(np.array([np.mean(values), error]) if several else np.mean(values), abs=0.005 + rounded)
    assert any(np.float64(one) == expected for one in shown)
    for value, sources in zip(values, line["sources"].split(";"), strict=True):
      shown = re.findall(rf": (\d+\.\d\d) from {re.escape(sources.replace('+', ', '))}\n", text)
      assert any(float(one) == pytest.approx(value, abs=0.005 + rounded) for one in shown)
      for source in sources.split("+"):
        trace(workdir / source)
      if "+" not in sources:
        metrics = json.loads((workdir / sources / "metrics.json").read_text())
        assert value == pytest.approx(metrics[METRICS[number](column)], rel=1e-5)


METRICS = dict.fromkeys(range(1, 6), lambda column: "test_error") | {
  6: lambda column: "validation_perplexity" if column.endswith("val") else "test_perplexity"
}


def trace(directory):
  """Asserts that a generation's manifest records its origin, and that its teacher is in the same workdir."""
  manifest = json.loads((directory / "manifest.json").read_text())
  config = json.loads((directory.parent / "config.json").read_text())
  assert manifest["seed"] == config["seed"]
  assert manifest["scale"] == config["scale"] == "smoke"
  assert manifest.keys() >= {"config", "dataset", "digest", "git_commit", "packages", "teachers"}
  digests = [json.loads(path.read_text())["digest"] for path in directory.parent.parent.glob("*/gen_*/manifest.json")]
  assert set(manifest["teachers"]) <= set(digests)
  # A student trained from labels has a teacher if it copies that teacher's first and last layer.
  taught = manifest["loss"] != "label" or manifest["model"].startswith("matched")
  assert bool(manifest["teachers"]) == (manifest["generation"] > 0 and taught)


@pytest.mark.slow
def test_an_ensemble_is_evaluated_as_the_library_does(made, workdir):
  made(2)
  line = numbers_of(workdir, 2)["DenseNet-112-33", "Ens*3"]
  for value, sources in zip(line["values"].split(";"), line["sources"].split(";"), strict=True):
    loaded = [storage.load(epath.Path(workdir) / source)[0] for source in sources.split("+")]
    assert [generation.index for generation in loaded] == [1, 2, 3]
    cfg = nodes(2, "smoke")[0].cfg
    assert float(value) == pytest.approx(ban_jax.evaluate(loaded, cfg)["error"], rel=1e-5)


@pytest.mark.slow
def test_a_finished_table_is_shown_again_and_tables_share_their_teachers(made, workdir):
  made(1)
  made(3)
  before = written(workdir)
  again = make(3, workdir)
  assert again.returncode == 0, again.stderr
  assert "0 of 6 generations were trained" in again.stdout
  assert "step" not in again.stderr
  assert written(workdir) == before
  # On the embedded digits tables 1 and 3 need the same networks, except for the DenseNet.
  first, third = numbers_of(workdir, 1), numbers_of(workdir, 3)
  for column in ("teacher", "BAN"):
    assert first["Wide-ResNet-28-1", column]["sources"] == third["Wide-ResNet-28-1", column]["sources"]
  planned = make(3, workdir, "--dry_run")
  assert "6 generations: 6 finished. Left, at most: 0 steps" in planned.stdout


@pytest.mark.slow
def test_a_killed_table_goes_on_and_repeats_nothing(made, workdir, tmp_path):
  made(1)
  die = f"""
import os, signal, sys
from ban_jax import presets, storage
save, smoke = storage.save_step, presets.SCALES["smoke"]
presets.SCALES["smoke"] = lambda config: smoke(config) or config.train.update(checkpoint_every=3)
def save_and_die(manager, step, tree, record):
  save(manager, step, tree, record)
  if "gen_1" in str(manager.directory) and step == 6:
    manager.wait_until_finished()
    os.kill(os.getpid(), signal.SIGKILL)
storage.save_step = save_and_die
sys.argv = ["table1.py", "--workdir={tmp_path}", "--devices=2"]
from experiments import table1
from experiments.tables import run
run.main(table1.TABLE)
"""
  killed = forks.run([sys.executable, "-c", die], cwd=ROOT)
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  before = written(tmp_path)
  (steps,) = tmp_path.glob("runs/*/gen_1/steps")
  (record,) = [json.loads(path.read_text()) for path in steps.glob("6/meta/*") if path.name == "metadata"]
  assert len(before) == 1
  assert (
    f"{float(numbers_of(workdir, 1)['Wide-ResNet-28-1', 'teacher']['values'].split(';')[0]):.2f} (1 of 2 seeds)"
    in (tmp_path / "table1.md").read_text()
  )

  done = make(1, tmp_path)
  assert done.returncode == 0, done.stderr
  assert "3 of 4 generations were trained" in done.stdout
  for path, time in before.items():
    assert written(tmp_path)[path] == time, f"{path} was trained again"
  # The seconds of the first epoch are those of the killed process: the epoch was not repeated.
  history = (steps.parent / "history.jsonl").read_text().splitlines()
  assert json.loads(history[0]) == record["record"]["history"][0]
  for name, line in numbers_of(workdir, 1).items():
    assert numbers_of(tmp_path, 1)[name]["values"] == line["values"]


@pytest.mark.slow
def test_two_processes_on_one_workdir_divide_a_table(made, workdir, tmp_path):
  made(3)
  shards = [
    subprocess.Popen(
      [sys.executable, ONE_CACHE, *command(3, f"--workdir={tmp_path}", f"--shard={number}/2")[1:]],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for number in (1, 2)
  ]
  outputs = [shard.communicate(timeout=300) for shard in shards]
  for shard, (_, errors) in zip(shards, outputs, strict=True):
    assert shard.returncode == 0, errors
  trained = [int(out.split(" generations were trained")[0].split("\n")[-1].split(" of ")[0]) for out, _ in outputs]
  assert sum(trained) == len(nodes(3, "smoke", 2)) == 6
  done = make(3, tmp_path)
  assert "0 of 6 generations were trained" in done.stdout
  for name, line in numbers_of(workdir, 3).items():
    assert numbers_of(tmp_path, 3)[name]["values"] == line["values"]


@pytest.mark.slow
def test_controls_are_columns_that_stay_with_the_table(made, workdir):
  made(1)
  done = make(1, workdir, "--controls", "--seeds=1")
  assert done.returncode == 0, done.stderr
  assert "3 of 5 generations were trained" in done.stdout
  names = ["label smoothing", "entropy-matched smoothing", "labels, twice as long"]
  # Fewer seeds, or no controls, remove nothing from the workdir's table.
  for again in (done, make(1, workdir, "--seeds=1")):
    assert again.returncode == 0, again.stderr
    found = numbers_of(workdir, 1)
    assert [column for _, column in found] == [*COLUMNS[1], *names]
    assert [line["seeds"] for line in found.values()] == ["0;1", "0;1", "0", "0", "0"]
    assert len(found) == 5
    assert "(1 of 2 seeds)" in (workdir / "table1.md").read_text()
  sources = [found["Wide-ResNet-28-1", name]["sources"] for name in names]
  manifests = [json.loads((workdir / source / "manifest.json").read_text()) for source in sources]
  assert [manifest["loss"] for manifest in manifests] == ["label_smoothing", "entropy_matched_smoothing", "label"]
  assert [len(manifest["teachers"]) for manifest in manifests] == [0, 1, 0]
  own = found["Wide-ResNet-28-1", "teacher"]["sources"].split(";")[0]
  lengths = [len((workdir / source / "history.jsonl").read_text().splitlines()) for source in (own, sources[2])]
  assert lengths == [2, 4]
  assert [line["interval_low"] == "" for line in found.values()] == [True, False, True, True, True]


@pytest.mark.slow
def test_several_processes_make_a_table_together(tmp_path):
  script = str(ROOT / "experiments" / "table1.py")
  run = [sys.executable, "-m", "experiments.launch", "--processes=2", "--", ONE_CACHE, script]
  done = forks.run([*run, f"--workdir={tmp_path}", "--seeds=1"], cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("2 of 2 generations were trained") == 1
  assert all(line["values"] for line in numbers_of(tmp_path, 1).values())


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_teacher_serves_all_that_learn_from_it():
  made = nodes(2, seeds=1)
  assert len(made) == 3 * (1 + 4 + 3) + (1 + 4 + 2)  # the paper has no BAN-3 of DenseNet-80-120
  row = "DenseNet-90-60"
  (teacher,) = members(2, row, "teacher")
  for column in ("BAN", "BAN+L", "CWTM", "DKPP", "BAN-1"):
    (node,) = members(2, row, column)
    assert node.teacher.path == teacher.path, column
  (ban,), (first,), (second,) = (members(2, row, column) for column in ("BAN", "BAN-1", "BAN-2"))
  assert second.teacher.path == first.path
  assert (second.generation, second.run) == (2, first.run)
  # BAN and BAN-1 differ in nothing but their seed.
  assert ban.cfg.seed != first.cfg.seed
  assert {**ban.cfg.to_dict(), "seed": 0} == {**first.cfg.to_dict(), "seed": 0}


def test_what_an_ensemble_is():
  def paths(row, column):
    return [node.path for node in members(2, row, column)]

  row = "DenseNet-90-60"
  assert paths(row, "Ens*2") == paths(row, "BAN-1") + paths(row, "BAN-2")
  assert paths(row, "Ens*3") == paths(row, "BAN-1") + paths(row, "BAN-2") + paths(row, "BAN-3")
  row = "DenseNet-80-120"
  assert paths(row, "Ens*3") == paths(row, "teacher") + paths(row, "BAN-1") + paths(row, "BAN-2")
  alone = members(2, row, "independent*3", controls=True)
  assert [node.generation for node in alone] == [0, 0, 0]
  assert len({node.cfg.seed for node in alone}) == 3


def test_tables_ask_for_the_same_teacher():
  (teacher,) = members(2, "DenseNet-90-60", "teacher")
  assert members(4, "DenseNet-90-60", "teacher")[0].path == teacher.path
  assert members(5, "BAN-Wide-ResNet-1-1", "BAN")[0].teacher.path == teacher.path
  assert members(1, "DenseNet-90-60", "teacher")[0].path != teacher.path  # on CIFAR-10


def test_a_students_directory_depends_on_its_teacher_s():
  builder = TABLES[3].builder("paper", 0, "")
  teachers = [builder.teacher("wrn_28_1"), builder.teacher("wrn_28_1", variant=1)]
  students = [builder.student(teacher, "densenet_90_60", "ban") for teacher in teachers]
  assert students[0].cfg.to_dict() == students[1].cfg.to_dict()
  assert students[0].path != students[1].path


def test_every_row_of_the_paper_is_there_at_full_length():
  assert {number: len(table.rows_at("paper")) for number, table in TABLES.items()} == {
    1: 8,
    2: 4,
    3: 4,
    4: 1,
    5: 7,
    6: 2,
  }
  for number, table in TABLES.items():
    for cell in cells(number):
      for node in cell.members[0] if cell.members else ():
        assert node.cfg.scale == "paper"
        assert node.cfg.train.epochs == (40 if number == 6 else 200)
        assert node.cfg.data.name == table.dataset
    assert {cell.column for cell in cells(number)} == {column for row in table.rows for column in row.paper}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_divide_rows_and_seeds(count):
  made = cells(1, "paper", 2)
  rows = [row.name for row in TABLES[1].rows]
  shards = [run.shard_of(made, rows, 2, (number, count)) for number in range(1, count + 1)]
  paths = [[node.path for members in shard for node in members] for shard in shards]
  together = [path for shard in paths for path in shard]
  assert sorted(together) == sorted(node.path for node in nodes(1, "paper", 2))
  # The largest row's seeds fall to different shards.
  large = [sum("densenet_80_120" in path for path in shard) for shard in paths]
  assert max(large) == 2 * math.ceil(2 / count)


def test_a_teacher_comes_before_its_students():
  seen = set()
  for node in nodes(2, "paper", 2):
    assert node.teacher is None or node.teacher.path in seen
    assert node.path not in seen
    seen.add(node.path)


# --- training and waiting --------------------------------------------------------------------------------------------


def train(made, workdir):
  messages = []
  count = training.train(made, workdir, groups=[tuple(jax.devices()[:2])], progress=False, log=messages.append)
  return count, messages


@pytest.fixture
def pair():
  """A teacher and its student that train in seconds."""
  builder = TABLES[1].builder("smoke", 0, "")
  teacher = builder.teacher("wrn_28_1")
  return [teacher, builder.student(teacher, "wrn_28_1", "ban")]


def test_what_another_process_trains_is_waited_for(pair, tmp_path, monkeypatch):
  monkeypatch.setattr(training, "PATIENCE", 0.05)
  workdir = epath.Path(tmp_path)
  (workdir / pair[0].run).mkdir(parents=True)
  held, release = threading.Event(), threading.Event()

  def hold():
    with storage.lock.hold(workdir / pair[0].run):
      held.set()
      release.wait(60)

  other = threading.Thread(target=hold)
  other.start()
  held.wait(60)
  messages = []

  def log(message):
    messages.append(message)
    if "waiting" in message:
      release.set()
      other.join()

  assert training.train(pair, workdir, groups=[tuple(jax.devices()[:2])], progress=False, log=log) == 2
  assert any(message.startswith("waiting: workdir ") and "is in use by" in message for message in messages)
  assert all(graph.state(node, workdir) == "finished" for node in pair)


def test_what_another_process_finished_meanwhile_is_not_counted(pair, tmp_path, monkeypatch):
  workdir = epath.Path(tmp_path)
  train(pair, workdir)
  looks, find = [], graph.find

  def late(node, *arguments):
    looks.append(node.path)
    return find(node, *arguments) if looks.count(node.path) > 1 else None

  monkeypatch.setattr(graph, "find", late)
  assert train(pair, workdir) == (0, [])


def test_other_data_are_refused_by_name(pair, tmp_path):
  workdir = epath.Path(tmp_path)
  train(pair[:1], workdir)
  graph.check(pair, workdir, tuple(jax.devices()[:2]))
  path = tmp_path / pair[0].path / "manifest.json"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps({**manifest, "dataset": "0" * 64}))
  with pytest.raises(CheckpointError, match="gen_0 was trained on other data than the digits found now .digest 0000"):
    graph.check(pair, workdir, tuple(jax.devices()[:2]))
  path.write_text(json.dumps({key: value for key, value in manifest.items() if key != "dataset"}))
  with pytest.raises(CheckpointError, match=r"manifest\.json lacks dataset; remove "):
    graph.check(pair, workdir, tuple(jax.devices()[:2]))


def test_a_changed_teacher_is_refused_by_name(pair, tmp_path):
  workdir = epath.Path(tmp_path)
  assert train(pair, workdir)[0] == 2
  assert train(pair, workdir) == (0, [])
  path = tmp_path / pair[0].path / "manifest.json"
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps({**manifest, "digest": "0" * 64}))
  with pytest.raises(
    CheckpointError, match=f"{pair[1].path} was taught by a teacher with the digest {manifest['digest']}"
  ):
    graph.find(pair[1], workdir)
  path.write_text(json.dumps({**manifest, "identity": "0" * 64}))
  with pytest.raises(CheckpointError, match=f"{pair[0].path} holds a generation of another configuration"):
    graph.find(pair[0], workdir)
  path.write_text(json.dumps(manifest))
  (tmp_path / pair[0].path / "metrics.json").write_text("{}")
  with pytest.raises(CheckpointError, match=r"metrics\.json or history\.jsonl was changed"):
    graph.find(pair[0], workdir)


def test_an_ensemble_of_other_networks_is_evaluated_anew(pair, tmp_path):
  workdir = epath.Path(tmp_path)
  train(pair, workdir)
  assert cell_values.ensemble_metrics(pair, workdir) is None
  cell_values.evaluate_ensemble(pair, workdir, tuple(jax.devices()[:2]))
  assert cell_values.ensemble_metrics(pair, workdir)["count"] == 1397
  (kept,) = (workdir / "ensembles").iterdir()
  record = json.loads(kept.read_text())
  kept.write_text(json.dumps({**record, "members": dict.fromkeys(record["members"], "0" * 64)}))
  assert cell_values.ensemble_metrics(pair, workdir) is None


# --- numbers ---------------------------------------------------------------------------------------------------------


def values(*numbers):
  return [Value(seed, number, ()) for seed, number in enumerate(numbers)]


def test_differences_are_paired_by_seed_with_student_s_interval():
  students, teachers = (21.0, 19.5, 20.25, 20.5), (20.5, 20.0, 21.0, 20.5)
  found = cell_values.paired(values(*students), values(*teachers))
  interval = scipy.stats.ttest_rel(students, teachers).confidence_interval(0.95)
  assert found.mean == pytest.approx(-0.1875)
  assert (found.low, found.high) == pytest.approx(tuple(interval))
  assert found.seeds == 4


def test_only_seeds_that_both_have_are_compared():
  found = cell_values.paired([Value(0, 5.0, ()), Value(2, 7.0, ())], [Value(1, 1.0, ()), Value(2, 4.0, ())])
  assert (found.mean, found.seeds) == (3.0, 1)
  assert math.isnan(found.low)
  assert cell_values.paired(values(1.0), [Value(1, 1.0, ())]) is None


def test_mean_and_standard_error():
  mean, error = summary.mean_and_error([1.0, 2.0, 4.0])
  assert mean == pytest.approx(7 / 3)
  assert error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
  assert math.isnan(summary.mean_and_error([1.0])[1])


def test_what_is_not_there_yet_is_an_ellipsis(tmp_path):
  output = report.Output(TABLES[4], "smoke", epath.Path(tmp_path))
  text = output.write(cells(4, "smoke", 2), 2, plot=True)
  (teacher,), (deeper,) = ([line for line in text.splitlines() if f"| {name} " in line] for name in ("17.69", "16.43"))
  assert [cell.strip() for cell in teacher.split("|")[2:5]] == ["teacher", "17.69", "…"]
  assert [cell.strip() for cell in deeper.split("|")[2:8]] == ["2x depth", "16.43", "…", "", "-1.26", "…"]
  assert "nan" not in text
  assert "nan" not in (tmp_path / "table4.csv").read_text()


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_a_plan_is_priced_before_it_is_trained(pair, tmp_path):
  text = cost.cost_table(pair, epath.Path(tmp_path))
  assert text.splitlines()[-1].startswith("2 generations: 2 to do. Left, at most: 20 steps, ")
  one, two = (cost.cost(node, {}) for node in pair)
  # A student's step has the teacher's forward pass in addition, which is less than half of a step.
  assert one.steps == two.steps == 10
  assert one.flops < two.flops < 1.5 * one.flops
  assert one.hours(1e12) == pytest.approx((one.flops / (1e12 * cost.UTILIZATION) + 10 * cost.STEP_SECONDS) / 3600)


def test_work_does_not_depend_on_the_devices_that_share_it(pair):
  works = [cost.work(pair[1].cfg, jax.devices()[:count]) for count in (1, 4)]
  assert works[0] == works[1]
  dataset = load(pair[1].cfg.data)
  assert works[0].steps_per_epoch == len(dataset.train_order(jax.random.key(0), 20)) == 5


SHARED = pathlib.Path(os.environ.get("BAN_SHARED", ROOT.parent / "shared")) / "data" / "ptb"


@pytest.mark.skipif(not SHARED.exists(), reason=f"no Penn Treebank in {SHARED}")
def test_the_penn_treebank_s_shapes_are_known_without_it():
  (node,) = members(6, "LSTM", "teacher val")
  known = describe(node.cfg.data)
  cfg = node.cfg.copy_and_resolve_references()
  cfg.data.dir = str(SHARED)
  dataset = load(cfg.data)
  assert known.splits["train"]["tokens"].shape == dataset.splits["train"]["tokens"].shape
  batch = cfg.train.batch_size
  assert len(known.train_order(jax.random.key(0), batch)) == len(dataset.train_order(jax.random.key(0), batch))
  assert (known.spec.shape, known.spec.num_classes) == (dataset.spec.shape, dataset.spec.num_classes)


# --- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--scale=big",), "unknown scale 'big'; choose one of: cpu, paper, quick, smoke"),
    (
      ("--rows=Wide-ResNet-28-2",),
      "--rows: Table 1 has no row 'Wide-ResNet-28-2' at the scale smoke; choose from: Wide-ResNet-28-1",
    ),
    (("--rows=",), "--rows: Table 1 has no row '' at the scale smoke; choose from: Wide-ResNet-28-1"),
    (("--columns=ban,Ens*2",), "--columns: there is no column 'ens*2'; choose from: BAN, teacher"),
    (("--seeds=-1",), "--seeds must be from 1 to 1000, not -1"),
    (("--seeds=0",), "--seeds must be from 1 to 1000, not 0"),
    (("--shard=3/2",), "--shard=3/2: K/N is expected, with K from 1 to N, as 2/4"),
    (("--shard=half",), "--shard=half: K/N is expected"),
    (
      ('--changes={"model.unit": 3}',),
      "--changes: unknown configuration key 'model.unit'; choose one of: compute_dtype, ",
    ),
    (('--changes={"train.epochs": 0}',), "train.epochs=0"),
    (('--changes={"train.epochs": 0}', "--columns=teacher"), "train.epochs=0"),
    (('--changes={"data.augment": ["cutout"]}',), "unknown augmentation 'cutout'; choose one of: "),
    (("--changes=3",), "--changes=3: expected an object of values by key"),
    (("--workdir=",), "the workdir is empty"),
    (("--devices=3",), "train.batch_size=20 cannot be shared equally by 3 devices"),
    (("extra",), "unexpected arguments: extra"),
  ],
)
def test_what_a_table_has_not_is_refused_in_words(flags, message, tmp_path):
  workdir = tmp_path / "tables"
  script = str(ROOT / "experiments" / "table1.py")
  done = forks.run([sys.executable, script, f"--workdir={workdir}", *flags], cwd=tmp_path)
  assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
  assert done.stderr.startswith(f"error: {message}")
  assert not workdir.exists()


def test_changed_values_make_networks_of_their_own_and_stand_in_the_heading(tmp_path):
  done = [make(1, tmp_path / name, "--dry_run", "--seeds=1", *given) for name, given in (
    ("plain", ()), ("changed", ('--changes={"train.epochs": 4, "train.checkpoint_every": 7}',)),
    ("kept", ('--changes={"train.checkpoint_every": 7}',)),
  )]  # fmt: skip
  plain, changed, kept = (re.findall(r"runs/\S+", each.stdout) for each in done)
  assert len(plain) == len(changed) == 2
  assert not set(plain) & set(changed)
  assert plain == kept  # how often a checkpoint is written changes no network
  table = TABLES[1]._replace(changes={"train.epochs": 4})
  cells = table.cells("smoke", 1, "", controls=False)
  assert {node.cfg.train.epochs for cell in cells for members in cell.members for node in members} == {4}
  text = report.Output(table, "smoke", epath.Path(tmp_path)).write(cells, 1, plot=False)
  assert "4 epochs, batch 20, train.epochs=4; test error" in text


@pytest.mark.slow
def test_a_table_shows_the_rows_that_were_asked_for_and_keeps_them(made, workdir, tmp_path):
  made(5)
  for node in nodes(5, "smoke", 1):
    shutil.copytree(workdir / node.run, tmp_path / node.run, dirs_exist_ok=True)  # trained before, tabled nowhere
  one = ("--seeds=1", "--rows=ban-wide-resnet-1-1")
  done = make(5, tmp_path, *one)
  assert done.returncode == 0, done.stderr
  assert {row for row, _ in numbers_of(tmp_path, 5)} == {"Pre-activation ResNet-1001", "BAN-Wide-ResNet-1-1"}
  assert make(5, tmp_path, "--seeds=1").returncode == 0
  assert make(5, tmp_path, *one).returncode == 0
  assert [row for row, column in numbers_of(tmp_path, 5) if column == "BAN"] == [
    "BAN-Pre-ResNet-14-1",
    "BAN-Wide-ResNet-1-1",
  ]


def test_missing_data_are_named_before_anything_is_trained(tmp_path):
  done = make(6, tmp_path / "tables", "--scale=cpu", f"--data_dir={tmp_path}/none")
  assert done.returncode == 2
  assert done.stderr.startswith("error: ptb: ")
  assert str(tmp_path / "none") in done.stderr
  assert not (tmp_path / "tables").exists()


def test_a_table_never_mixes_scales(tmp_path):
  workdir = epath.Path(tmp_path)
  output = report.Output(TABLES[1], "smoke", workdir)
  assert output.existing() == (0, set(), set())
  output.write(cells(1, "smoke", 2), 2, plot=False)
  assert output.existing() == (0, {"Wide-ResNet-28-1"}, {"teacher", "BAN"})
  with pytest.raises(ConfigError, match="table1.csv is of the scale smoke, not cpu; give another --workdir"):
    report.Output(TABLES[1], "cpu", workdir).existing()


@pytest.mark.parametrize("number", TABLES)
def test_every_cell_is_listed_with_its_network_and_the_paper_s_number(number):
  lines = [line.strip("|").split("|") for line in run.overview(TABLES[number], "paper").splitlines()[4:]]
  listed = {(row.strip(), column.strip()): (network.strip(), paper.strip()) for row, column, network, paper in lines}
  assert len(listed) == len(lines) == sum(len(row.paper) for row in TABLES[number].rows)
  for row in TABLES[number].rows:
    for column, value in row.paper.items():
      network, paper = listed[row.name, column]
      assert paper == f"{value:g}"
      assert network == ("quoted only" if row.network is None else members(number, row.name, column)[-1].network)


@pytest.mark.parametrize(("number", "row"), [(1, "Wide-ResNet-28-1"), (2, "DenseNet-90-60"), (3, "Wide-ResNet-28-1")])
def test_smoothed_labels_begin_as_the_student_that_they_are_compared_with(number, row):
  (ban,) = members(number, row, "BAN")
  for column in ("label smoothing", "entropy-matched smoothing"):
    (control,) = members(number, row, column, controls=True)
    assert (control.cfg.seed, control.generation) == (ban.cfg.seed, ban.generation), column


def test_what_differs_between_rows_is_told():
  assert report.setting(cells(6)) == "scale paper, ptb, all training tokens, 40 epochs, batch 20 or 32"


def test_a_cell_that_is_only_quoted_is_not_trained():
  quoted = [cell for cell in cells(5) if not cell.members]
  assert quoted == [Cell("Pre-activation ResNet-1001", "baseline", "", (), 22.71, False)]


# --- students side by side, and recorded teachers --------------------------------------------------------------------


def test_devices_are_grouped_for_students():
  devices = tuple(jax.devices()[:4])
  assert training.device_groups(devices, 0) == [devices]
  assert [len(group) for group in training.device_groups(devices, 2)] == [2, 2]
  with pytest.raises(ConfigError, match="--devices_per_student=3: 4 devices make groups of 1, 2, 4"):
    training.device_groups(devices, 3)


def test_students_side_by_side_are_those_of_one_at_a_time(tmp_path):
  nodes = graph.topological_order(
    node for column in ("BAN", "BAN+L", "DKPP") for node in members(2, "DenseNet-112-33", column, scale="smoke")
  )
  digests = []
  for name, count in (("one", 1), ("three", 3)):
    workdir = epath.Path(tmp_path / name)
    messages = []
    groups = [(device,) for device in jax.devices()[:count]]
    trained = training.train(nodes, workdir, groups=groups, progress=False, log=messages.append)
    assert trained == len(nodes) == len(messages) == 4
    assert not (workdir / "replay").exists()  # nobody needs it any more
    digests.append({node.path: graph.find(node, workdir)[1]["digest"] for node in nodes})
    layouts = {node.path: graph.find(node, workdir)[1]["layout"] for node in nodes}
    assert [layouts[node.path]["replayed"] for node in nodes] == [False, True, True, True]
    assert training.train(nodes, workdir, groups=groups, progress=False, log=messages.append) == 0
  assert digests[0] == digests[1]


@pytest.mark.parametrize("anchor", anchors.ANCHORS, ids=lambda table: table.number)
def test_an_anchor_is_a_table_of_published_numbers(anchor, tmp_path):
  own = anchor.cells("paper", 1, "", controls=True)
  assert {"teacher", "BAN-1", "label smoothing", "independent*2"} <= {cell.column for cell in own}
  (teacher,) = own[0].members[0]
  assert (own[0].column, own[0].paper, teacher.cfg.scale) == ("teacher", anchor.rows[0].paper["teacher"], "paper")
  # Independent networks have the anchor's training, too.
  for cell in own:
    for node in cell.members[0]:
      assert node.cfg.optim.learning_rate == teacher.cfg.optim.learning_rate
      assert node.cfg.data.window == teacher.cfg.data.window
  text = report.Output(anchor, "paper", epath.Path(tmp_path)).write(own, 1, plot=True)
  assert text.startswith(f"# Anchor {anchor.number}: ")
  assert "The published: " in text
  assert (tmp_path / f"anchor_{anchor.number}.png").exists()


def test_zaremba_s_rate_falls_after_each_epoch_from_the_fifth_on():
  teacher = anchors.ANCHORS[0].cells("paper", 1, "", controls=False)[0].members[0][0]
  optim = teacher.cfg.optim
  schedule = optim_lib.make_schedule(optim, 13)
  assert [float(schedule(epoch)) for epoch in range(7)] == [20.0, 20.0, 20.0, 20.0, 20.0, 10.0, 5.0]
  assert (optim.clip_norm, teacher.cfg.model.tied, teacher.cfg.data.window) == (0.25, False, 20)

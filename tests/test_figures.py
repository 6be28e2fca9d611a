"""What experiments/figures.py reads, measures, plots and writes."""

import json
import shutil
import sys

import forks
import jax
import matplotlib.image
import numpy as np
import pytest
from conftest import IMAGES, ROOT, config
from etils import epath

import ban_jax
from ban_jax import config as config_lib
from ban_jax import data, models, plotting, storage, trees
from ban_jax.errors import CheckpointError, ConfigError
from ban_jax.types import Generation
from experiments import figures

WORDS = f"--config={ROOT}/configs/digits.py:{IMAGES}"
PNGS = ("calibration.png", "agreement.png", "dark_knowledge.png")
WRITTEN = {*PNGS, "figures.md", "figures.json"}


def command(script, *arguments):
  line = [sys.executable, str(ROOT / "experiments" / script), *map(str, arguments), "--devices=2"]
  return forks.run(line)


def contents(directory):
  return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name not in WRITTEN}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run directory of a teacher and a student whose gradient was split, and the output of figures.py."""
  workdir = tmp_path_factory.mktemp("figures") / "run"
  done = command("train.py", WORDS, "--config.train.gradient_split=True", f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  before = contents(workdir)
  done = command("figures.py", f"--workdir={workdir}")
  assert done.returncode == 0, done.stderr
  assert contents(workdir) == before, "figures.py changed what it was to read"
  return workdir, done.stdout


@pytest.fixture(scope="module")
def wider(tmp_path_factory):
  """A run directory that holds a single generation, a wider network on the same data."""
  return leave_untrained(tmp_path_factory.mktemp("figures") / "wider", config(model__units=32))


def leave_untrained(workdir, cfg):
  """Writes a run directory whose teacher is untrained; returns it."""
  dataset = data.load(cfg.data)
  variables = jax.device_get(models.make_model(cfg.model, dataset.spec).init(jax.random.key(0)))
  with storage.open_workdir(workdir, config_lib.record(cfg)) as opened:
    generation = Generation(0, trees.to_host(variables, 0), {}, ({"epoch": 1},))
    storage.finish(opened / "gen_0", generation, {"generation": 0, "dataset": dataset.digest})
  return workdir


def refuse(constant):
  raise ValueError(f"{constant} is no JSON")


def generations_of(workdir):
  return [storage.load(epath.Path(workdir) / f"gen_{index}")[0] for index in (0, 1)]


def directories(workdir):
  return [epath.Path(workdir) / f"gen_{index}" for index in (0, 1)]


# --- the whole ------------------------------------------------------------------------------------------------------


def test_a_run_is_drawn_and_its_numbers_are_those_of_the_library(run):
  workdir, printed = run
  found = json.loads((workdir / "figures.json").read_text(), parse_constant=refuse)
  networks, cfg = generations_of(workdir), config()
  assert [each["name"] for each in found["generations"]] == ["teacher", "BAN-1"]
  assert (found["dataset"], found["split"]) == ("digits", "test")
  for each, network in zip(found["generations"], networks, strict=True):
    assert each["digest"] == trees.digest(network.params)
    for name, value in ban_jax.evaluate(network, cfg).items():
      assert each["metrics"][name] == pytest.approx(value, rel=1e-5), name
    for name, values in ban_jax.reliability(network, cfg).items():
      given = np.array(each["reliability"][name], float)  # null is not a number
      np.testing.assert_allclose(given, values, rtol=1e-5, err_msg=name)
  pairs = ban_jax.compare(networks, cfg)
  np.testing.assert_allclose(found["agreement"], pairs["agreement"], rtol=1e-6)
  np.testing.assert_allclose(found["kl"], pairs["kl"], rtol=1e-4, atol=1e-7)
  assert found["generations"][0]["dark_knowledge"] is None
  assert found["generations"][1]["dark_knowledge"] == {
    name: [row[name] for row in networks[1].history] for name in ("epoch", "dark_share", "correct_gradient")
  }
  text = (workdir / "figures.md").read_text()
  assert text in printed
  assert f"| BAN-1   | {found['generations'][1]['metrics']['error']:.2f} " in text
  assert f"| teacher | 100.00  | {100 * found['agreement'][0][1]:<6.2f} |" in text
  assert f"| teacher | 0.0000  | {found['kl'][0][1]:.4f} |" in text
  assert f"| BAN-1 | 2     | {networks[1].history[-1]['dark_share']:<20.4f} |" in text
  for name in PNGS:
    assert f"]({name})" in text
    assert matplotlib.image.imread(workdir / name).std() > 0.05, f"{name} is blank"


def test_generations_of_different_networks_are_shown_in_the_order_given(run, wider, tmp_path):
  out = tmp_path / "new" / "out"
  given = (f"{wider}/gen_0", f"{run[0]}/gen_1", f"{run[0]}/gen_0")
  done = command("figures.py", f"--generations={','.join(given)}", f"--out={out}", f"--data_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  found = json.loads((out / "figures.json").read_text())
  assert [each["name"] for each in found["generations"]] == ["wider/teacher", "run/BAN-1", "run/teacher"]
  wide = ban_jax.evaluate(storage.load(epath.Path(wider) / "gen_0")[0], config(model__units=32))
  assert found["generations"][0]["metrics"]["nll"] == pytest.approx(wide["nll"], rel=1e-5)
  whole = json.loads((run[0] / "figures.json").read_text())
  np.testing.assert_allclose(np.array(found["kl"])[1:, 1:], np.array(whole["kl"])[::-1, ::-1], rtol=1e-5)
  assert {path.name for path in out.iterdir()} == WRITTEN
  # The generations differ in what was trained, so each has its own description.
  assert "mlp(dropout=0.0, layers=1, units=32)" in (out / "figures.md").read_text()


def test_a_mistake_ends_with_one_line_and_status_2(tmp_path):
  done = command("figures.py", f"--workdir={tmp_path}")
  assert done.returncode == 2
  assert done.stderr == f"error: {tmp_path} is no run directory: there is no config.json\n"


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_recorded_configuration_is_that_of_the_run(run, tmp_path):
  assert figures.read_config(epath.Path(run[0])).to_dict() == {
    **json.loads(config(train__gradient_split=True).to_json())
  }
  cfg = config("digits,small_wide_match_1_1,smoke,teacher=densenet_16_8")
  with storage.open_workdir(tmp_path, config_lib.record(cfg)) as workdir:
    found = figures.read_config(workdir)
  assert found.teacher.model.to_dict() == cfg.teacher.model.to_dict()
  assert found.is_locked
  assert config_lib.record(found) == config_lib.record(cfg)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is not a configuration"),
    ("[3]", "is not a configuration"),
    ('{"seed": 0}', "lacks generations, data.name"),
    ('{"data.name": "own"}', "data.name of your own, which no command line can load; compare such generations by"),
    ('{"data.name": "own", "model.name": "own"}', "data.name and model.name of your own, which no command line"),
    ('{"data.name": "digits", "teacher.model.name": "own"}', "teacher.model.name of your own, which no command line"),
  ],
)
def test_a_record_that_is_none_is_refused(tmp_path, text, message):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(CheckpointError, match=message):
    figures.read_config(epath.Path(tmp_path))


def test_what_is_not_finished_is_refused_by_name(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  (workdir / "gen_1" / "manifest.json").unlink()
  given, _ = figures.chosen(str(workdir), None, None)
  with pytest.raises(CheckpointError, match=r"gen_1 is not finished: .* name finished ones by --generations"):
    figures.read(given, None)
  shutil.rmtree(workdir / "gen_1")  # the configuration requires it
  given, _ = figures.chosen(str(workdir), None, None)
  with pytest.raises(CheckpointError, match="gen_1 does not exist"):
    figures.read(given, None)
  with pytest.raises(CheckpointError, match="nowhere is no run directory"):
    figures.read([epath.Path(tmp_path / "nowhere" / "gen_0")], None)


def test_every_generation_of_a_run_is_shown_those_beyond_its_configuration_too(run, tmp_path):
  shutil.copytree(run[0], tmp_path / "run")
  for number in (2, 10):
    shutil.copytree(run[0] / "gen_1", tmp_path / "run" / f"gen_{number}")
  given, out = figures.chosen(str(tmp_path / "run"), None, None)
  assert [path.name for path in given] == ["gen_0", "gen_1", "gen_2", "gen_10"]
  assert out == epath.Path(tmp_path / "run")
  with pytest.raises(CheckpointError, match="gen_2 holds generation 1: expected it as gen_1"):
    figures.read(given, None)
  assert figures.chosen(str(tmp_path / "run"), None, "~/x")[1] == epath.Path("~/x").expanduser()


def test_other_data_are_refused(run, tmp_path):
  leave_untrained(tmp_path, config(data__train_examples=60))
  with pytest.raises(
    CheckpointError, match=r"gen_0 was trained on other data than those found: digits as .*run/config"
  ):
    figures.read([*directories(run[0]), epath.Path(tmp_path) / "gen_0"], None)


def test_the_data_may_have_moved(run):
  dataset, shown = figures.read(directories(run[0]), "/moved")
  assert {each.cfg.data.dir for each in shown} == {"/moved"}
  assert dataset.name == "digits"


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ((None, None, None), "expected one of --workdir=RUN and --generations"),
    (("a", ["b/gen_0"], "c"), "expected one of --workdir=RUN and --generations"),
    ((None, ["b/gen_0"], None), "--generations needs --out"),
    ((None, ["b/gen_0"], ""), "--generations needs --out"),
    ((None, [], "c"), "--generations=: expected directories, separated by commas"),
    ((None, ["b/gen_0", ""], "c"), "--generations=b/gen_0,: expected directories"),
    ((None, ["b/gen_0", "b/gen_1", "b/gen_0/"], "c"), "--generations names /.*b/gen_0 more than once"),
    (("", None, None), "the workdir is empty"),
  ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, message):
  with pytest.raises(ConfigError, match=message):
    figures.chosen(*flags)


def test_names_are_as_long_as_it_takes_to_tell_them_apart():
  def names(*paths):
    return figures.names_of([epath.Path(path) for path in paths], [int(path[-1]) for path in paths])

  assert names("/a/b/gen_0", "/a/b/gen_1") == ["teacher", "BAN-1"]
  assert names("/a/b/gen_0", "/a/c/gen_0") == ["b/teacher", "c/teacher"]
  assert names("/a/b/gen_1", "/c/b/gen_1", "/c/b/gen_0") == ["a/b/BAN-1", "c/b/BAN-1", "c/b/teacher"]


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(run):
  dataset, shown = figures.read(directories(run[0]), None)
  return dataset, shown, figures.measure(shown, dataset, tuple(jax.devices()))


def test_the_drawings_show_the_numbers(measured):
  _, shown, found = measured
  axes = plotting.plot_calibration(found.reliability, found.metrics).get_axes()
  panels, charts = axes[:-3], axes[-3:]
  assert [panel.get_title() for panel in panels if panel.get_visible()] == ["teacher", "BAN-1"]
  for panel, reliability in zip(panels, found.reliability.values(), strict=False):
    diagonal, line = panel.get_lines()
    full = reliability["count"] > 0
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_array_equal(line.get_xdata(), reliability["confidence"][full])
    np.testing.assert_array_equal(line.get_ydata(), reliability["accuracy"][full])
    assert sum(bar.get_height() for bar in panel.patches) == pytest.approx(1)
  for chart, (metric, label) in zip(charts, plotting.CALIBRATION, strict=True):
    assert chart.get_xlabel() == label
    assert [bar.get_width() for bar in chart.patches] == [each[metric] for each in found.metrics.values()]
    assert chart.yaxis_inverted()

  read = {name: np.asarray(values).tolist() for name, values in found.pairs.items()}  # as from a file
  agreement, kl = plotting.plot_agreement(read, list(found.metrics)).get_axes()
  np.testing.assert_array_equal(agreement.get_images()[0].get_array(), 100 * found.pairs["agreement"])
  np.testing.assert_array_equal(kl.get_images()[0].get_array(), found.pairs["kl"])
  places = {text.get_position(): text.get_text() for text in kl.texts}
  assert places[1, 0] == f"{found.pairs['kl'][0, 1]:.3g}", "a column is a place along the x axis"

  curve = plotting.dark_knowledge(shown[1].generation.history)
  share, correct = plotting.plot_dark_knowledge({each.name: each.generation for each in shown}).get_axes()
  np.testing.assert_array_equal(share.get_lines()[0].get_xydata(), np.array([curve["epoch"], curve["dark_share"]]).T)
  np.testing.assert_array_equal(correct.get_lines()[0].get_ydata(), curve["correct_gradient"])


def test_what_does_not_fit_together_is_refused(measured):
  _, shown, found = measured
  with pytest.raises(ConfigError, match=r"reliability of \['teacher', 'BAN-1'\] and metrics of \['BAN-1'\]; expected"):
    ban_jax.plot_calibration(found.reliability, {"BAN-1": found.metrics["BAN-1"]})
  with pytest.raises(ConfigError, match=r"names=\['teacher'\]: expected the names of 2 networks"):
    ban_jax.plot_agreement(found.pairs, ["teacher"])
  with pytest.raises(ConfigError, match="none of teacher recorded the split of its gradient; train with"):
    ban_jax.plot_dark_knowledge({"teacher": shown[0].generation})
  with pytest.raises(ConfigError, match="seed_table: expected a list of runs, each a list of generations, not \\[\\]"):
    ban_jax.seed_table([])
  runs = [[each.generation for each in shown], [shown[0].generation]]
  with pytest.raises(ConfigError, match=r"the runs have different generations: \['teacher', 'BAN-1'\], \['teacher'\]"):
    ban_jax.seed_table(runs)
  with pytest.raises(ConfigError, match="unknown reference 'BAN-2'; choose one of: BAN-1, teacher"):
    ban_jax.seed_table(runs[:1], "BAN-2")


def test_a_single_network_is_drawn(measured, tmp_path):
  dataset, shown, _ = measured
  alone = figures.measure(shown[:1], dataset, tuple(jax.devices()))
  figures.write(epath.Path(tmp_path), shown[:1], alone, dataset)
  assert json.loads((tmp_path / "figures.json").read_text())["agreement"] == [[1.0]]


def test_what_was_not_recorded_is_said(measured, tmp_path):
  dataset, shown, found = measured
  rows = [{name: value for name, value in row.items() if name != "dark_share"} for row in shown[1].generation.history]
  plain = shown[1]._replace(generation=shown[1].generation._replace(history=tuple(rows)))
  (tmp_path / "dark_knowledge.png").write_bytes(b"an earlier one")
  text = figures.write(epath.Path(tmp_path), [shown[0], plain], found, dataset)
  assert "train with --config.train.gradient_split=True" in text
  assert "dark_knowledge.png" not in text
  assert not (tmp_path / "dark_knowledge.png").exists()

  third = plain._replace(name="BAN-2")
  more = figures.measure([*shown, third], dataset, tuple(jax.devices()))
  text = figures.write(epath.Path(tmp_path), [*shown, third], more, dataset)
  assert "Not recorded by: BAN-2." in text
  assert (tmp_path / "dark_knowledge.png").exists()

"""The scripts that show the effect: text.py, images.py, search.py, and gains.py, which plots what they write."""

import json
import math
import sys

import forks
import matplotlib.image
import pytest
from conftest import IMAGES, ROOT
from etils import epath

from ban_jax import loading
from ban_jax.errors import ConfigError
from experiments import gains

KEYS = {"date", "words", "changes", "seed", "seconds", "results"}


def make(script, *given):
  return forks.run([sys.executable, str(ROOT / "experiments" / script), "--devices=1", *given])


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def cells_of(text, row):
  """Returns the cells of a Markdown table's row, without the first."""
  (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} ")]
  return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.slow
def test_the_effect_on_text_is_tabled_and_plotted_and_every_number_is_a_generation_s(tmp_path):
  given = ("--scale=smoke", "--seeds=2", f"--workdir={tmp_path}")
  done = make("text.py", *given)
  assert done.returncode == 0, done.stderr
  text = (tmp_path / "text.md").read_text()
  assert text.strip() in done.stdout
  lines = lines_of(tmp_path / "text.jsonl")
  assert [line["seed"] for line in lines] == [0, 0, 1, 1]
  assert all(line.keys() == KEYS for line in lines)
  assert lines[0]["words"] == "pydoc,lstm_32,smoke"
  assert lines[0]["changes"] == {"loss.name": "ban_label"}
  assert lines[1]["changes"] == {"loss.name": "ban_label", "model.dropout": 0.3}
  assert list(lines[1]["results"]) == ["teacher", "BAN-1"]
  assert cells_of(text, "BAN-1, dropout 0.3")[1].split(" ")[0] == (
    f"{sum(line['results']['BAN-1']['test_perplexity'] for line in lines[1::2]) / 2:.2f}"
  )
  assert "- BAN-1, dropout 0.3 minus teacher, dropout 0.3: " in text
  runs = [
    run for run in tmp_path.glob("runs/*") if json.loads((run / "config.json").read_text())["model.dropout"] == 0.2
  ]
  found = {run.name.split("-")[4] + run.name.split("-")[2]: loading.load_run(run) for run in runs}
  teachers, students = ([found[f"seed{seed}{loss}"] for seed in (0, 1)] for loss in ("label", "ban_label"))
  differences = [
    own[1].metrics["test_perplexity"] - teacher[0].metrics["test_perplexity"]
    for own, teacher in zip(students, teachers, strict=True)
  ]
  assert cells_of(text, "BAN-2")[-1].startswith(f"{sum(differences) / 2:+.2f} [")
  for seed, line in enumerate(lines[::2]):
    assert list(line["results"]) == ["teacher", "BAN-1", "BAN-2"]
    assert line["results"]["BAN-2"]["test_perplexity"] == round(students[seed][1].metrics["test_perplexity"], 4)
  (second,) = found["seed2000label"]
  assert cells_of(text, "second teacher")[1].split(" ")[0] == (
    f"{(second.metrics['test_perplexity'] + found['seed2001label'][0].metrics['test_perplexity']) / 2:.2f}"
  )
  assert {"labels, twice as long", "Ens*2", "independent*2"} <= {
    line.split(" | ")[0][2:].strip() for line in text.splitlines()
  }
  assert matplotlib.image.imread(tmp_path / "text.png").std() > 0.05, "the plot is blank"
  again = make("text.py", *given)
  assert again.stdout.startswith(f"\n{text}"), "something was trained again"


@pytest.mark.slow
def test_with_wrong_labels_the_effect_on_images_is_compared_with_an_earlier_stop(tmp_path):
  given = ("--scale=smoke", "--seeds=1", "--noise=0.4", f"--workdir={tmp_path}")
  assert "label smoothing" not in make("images.py", "--controls=none", *given).stdout
  many = make("images.py", "--train_examples=5000", *given)
  assert many.returncode == 2
  assert "data.train_examples=5000: expected at most " in many.stderr
  refused = make("images.py", "--controls=labels, twice as long;luck", *given)
  assert refused.returncode == 2
  assert "--controls: there is no control 'luck'; expected all, none, or some of: label smoothing; " in refused.stderr
  done = make("images.py", *given)
  assert done.returncode == 0, done.stderr
  lines = lines_of(tmp_path / "images.jsonl")
  assert [line["changes"].get("train.epochs") for line in lines] == [None, 1]
  assert {line["changes"]["data.label_noise"] for line in lines} == {0.4}
  assert "wrong_true_error" in lines[0]["results"]["teacher"]
  errors = [line["results"]["teacher"]["validation_error"] for line in lines]
  best = ("teacher", "teacher, 1 epochs")[errors.index(min(errors))]
  test = f"{lines[errors.index(min(errors))]['results']['teacher']['test_error']:.2f}"
  assert f"the teacher's best stop by the validation split: {best}, test error {test} %" in done.stdout
  assert "- BAN-1 minus entropy-matched smoothing: " in done.stdout
  weighted = {run: json.loads((run / "config.json").read_text()) for run in tmp_path.glob("runs/*-ban_label-*")}
  assert sorted((own["loss.teacher_weight"], own["loss.label_weight"]) for own in weighted.values()) == [
    (0.5, 0.5), (1.25, -0.25), (1.5, -0.5),
  ]  # fmt: skip
  run = next(run for run, own in weighted.items() if own["loss.teacher_weight"] == 1.5)
  assert cells_of(done.stdout, "BAN+L, teacher 1.5")[0] == f"{loading.load(run / 'gen_1').metrics['test_error']:.2f}"
  assert "- BAN+L, teacher 1.5 minus BAN-1: " in done.stdout
  assert matplotlib.image.imread(tmp_path / "images.png").std() > 0.05, "the plot is blank"


@pytest.mark.slow
def test_a_search_keeps_every_setting_once(tmp_path):
  log = tmp_path / "searched.jsonl"
  given = (f"--config={ROOT}/configs/digits.py:{IMAGES}", f"--workdir={tmp_path}/runs", f"--log={log}",
           "--config.train.checkpoint_every=100")  # fmt: skip
  grid = '--grid={"train.epochs": [1, 2], "data.label_noise": [0.4]}'
  done = make("search.py", *given, "--seeds=101", grid)
  assert done.returncode == 0, done.stderr
  lines = lines_of(log)
  assert [line["changes"] for line in lines] == [
    {"data.label_noise": 0.4, "loss.name": "ban", "train.epochs": 1},
    {"data.label_noise": 0.4, "loss.name": "ban"},
  ]
  assert all(line.keys() == KEYS and line["seed"] == 101 for line in lines)
  before = log.read_text()
  assert make("search.py", *given, "--seeds=101", grid).returncode == 0
  assert log.read_text() == before


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("--seeds=100,3",), "--seeds=100,3: expected whole numbers from 100 on"),
    (('--grid={"train.epochs": 3}',), "--grid: expected an object of lists"),
    (('--grid={"train.epoch": [3]}',), "--grid: unknown configuration key 'train.epoch'; choose one of: "),
    (("--grid=[",), "--grid: "),
    ((f"--config={ROOT}/configs/digits.py",), "name its words"),
  ],
)
def test_a_search_that_cannot_be_made_is_refused(given, message, tmp_path):
  config = () if given[0].startswith("--config") else (f"--config={ROOT}/configs/digits.py:{IMAGES}",)
  done = make("search.py", *config, *given, f"--workdir={tmp_path}", f"--log={tmp_path}/searched.jsonl")
  assert done.returncode == 2
  assert message in done.stderr
  assert not (tmp_path / "searched.jsonl").exists()


# --- gains ----------------------------------------------------------------------------------------------------------


def line(seed, teacher, student, words="cifar10,wrn_10_1,cpu", **changes):
  return {
    "words": words,
    "changes": changes,
    "seed": seed,
    "results": {"teacher": teacher, "BAN-1": {key: 2 + value for key, value in student.items()}, "BAN-2": student},
  }


def test_a_setting_is_a_point_that_averages_its_seeds():
  clean = [line(seed, {"train_error": 2.0 + seed, "test_error": 50.0}, {"test_error": 49.0 - seed}) for seed in (0, 1)]
  noisy = line(
    100, {"train_error": 30.0, "train_seen_error": 20.0, "test_error": 60.0}, {"test_error": 55.0},
    **{"data.label_noise": 0.4},
  )  # fmt: skip
  text = line(0, {"train_loss": 3.0, "test_perplexity": 57.0}, {"test_perplexity": 54.0}, "pydoc,lstm_200,cpu")
  alone = {**noisy, "changes": {"train.epochs": 3}, "results": {"teacher": noisy["results"]["teacher"]}}
  searched = {**clean[0], "seed": 100, "results": {**clean[0]["results"], "BAN-1": {"test_error": 51.0}}}
  del searched["results"]["BAN-2"]
  first, second, third, fourth = gains.points([clean[0], noisy, alone, clean[1], text, searched])
  assert (first.kind, first.is_text, first.fit, first.teacher) == ("cifar10", False, 2.5, 50.0)
  assert (first.last, first.gain.seeds, first.gain.mean, first.last_gain.mean) == ("BAN-2", 2, 0.5, -1.5)
  assert first.last_gain.low == pytest.approx(-1.5 - 12.7062 * 0.5, rel=1e-4)  # Student's t with one degree of freedom
  assert (second.kind, second.fit, second.last_gain.mean) == ("cifar10, 40% wrong labels", 20.0, -5.0)
  assert (fourth.last, fourth.gain.seeds, fourth.gain.mean) == ("BAN-1", 1, 1.0)
  assert (third.is_text, third.fit, third.last_gain.mean) == (True, pytest.approx(math.exp(3)), -3.0)


def test_an_anchor_is_called_by_its_name_and_told_from_parts_of_a_training_set():
  anchor = line(0, {"train_error": 9.0, "test_error": 14.0}, {"test_error": 13.0}, **{"train.epochs": 60})
  part = line(0, {"train_error": 9.0, "test_error": 14.0}, {"test_error": 13.0}, **{"data.train_examples": 500})
  first, second = gains.points([anchor | {"anchor": "cifar10_wrn_16_1"}, part])
  assert (first.anchor, first.examples) == ("cifar10_wrn_16_1", 0)
  assert (second.anchor, second.examples) == ("", 500)
  table = gains.table([first, second])
  assert "| anchor cifar10_wrn_16_1 | 1 " in table
  assert "- cifar10, in all settings: wrn_10_1, train_examples 500" in table


@pytest.mark.slow
def test_an_anchor_s_lineages_are_lines_that_gains_reads(tmp_path):
  given = ("--anchor=ptb_small", "--scale=smoke", "--seeds=2", f"--workdir={tmp_path}")
  done = make("anchors.py", *given)
  assert done.returncode == 0, done.stderr
  lines = lines_of(tmp_path / "anchor_ptb_small.jsonl")
  assert [(line["seed"], line["anchor"], list(line["results"])) for line in lines] == [
    (seed, "ptb_small", ["teacher", "BAN-1", "BAN-2"]) for seed in (0, 1)
  ]
  text = (tmp_path / "anchor_ptb_small.md").read_text()
  for name in ("teacher", "BAN-1"):
    for line in lines:
      assert f"{name}, seed {line['seed']}: {line['results'][name]['test_perplexity']:.2f} from " in text
  # Nothing is left to train, and a second run writes the same bytes.
  before = {path: path.read_bytes() for path in tmp_path.glob("anchor_*")}
  done = make("anchors.py", *given)
  assert "\n0 of 6 generations were trained" in done.stdout
  assert {path: path.read_bytes() for path in tmp_path.glob("anchor_*")} == before
  # Fewer seeds take nothing away from what was written.
  assert make("anchors.py", *given, "--seeds=1").returncode == 0
  assert {path: path.read_bytes() for path in tmp_path.glob("anchor_*")} == before
  assert len(gains.points(gains.read([str(tmp_path / "anchor_ptb_small.jsonl")]))) == 1


def test_gains_are_tabled_and_plotted(tmp_path):
  lines = [line(seed, {"train_error": 2.0, "test_error": 50.0}, {"test_error": 49.0 - seed}) for seed in (0, 1)] + [
    line(100, {"train_error": 9.0, "test_error": 60.0}, {"test_error": 61.0}, **{"train.epochs": 3}),
    line(0, {"train_loss": 3.0, "test_perplexity": 57.0}, {"test_perplexity": 54.0}, "pydoc,lstm_200,cpu"),
  ]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
  done = make("gains.py", f"--lines={tmp_path}/a.jsonl", f"--outdir={tmp_path}/out")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "out" / "gains.md").read_text() in done.stdout
  fitted, searched = [row.split(" | ")[1:] for row in done.stdout.splitlines() if row.startswith("| cifar10 ")]
  assert [cell.strip(" |") for cell in fitted[-4:]] == [
    "50.00",
    "+0.50 [-5.85, +6.85]",
    "BAN-2",
    "-1.50 [-7.85, +4.85]",
  ]
  assert [row[0].strip() for row in (fitted, searched)] == ["", "train.epochs 3"]
  assert "- cifar10, in all settings: wrn_10_1\n" in done.stdout
  picture = matplotlib.image.imread(tmp_path / "out" / "gains.png")
  assert picture[:, : picture.shape[1] // 2].std() > 0.05 < picture[:, picture.shape[1] // 2 :].std(), (
    "a panel is blank"
  )


def test_files_without_lines_are_refused(tmp_path):
  with pytest.raises(ConfigError, match="nowhere is no file of lines"):
    gains.read([f"{tmp_path}/nowhere"])
  (epath.Path(tmp_path) / "empty").write_text("")
  done = make("gains.py", f"--lines={tmp_path}/empty", f"--outdir={tmp_path}/out")
  assert done.returncode == 2
  assert "there are no lines" in done.stderr

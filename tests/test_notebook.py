"""The notebooks, executed from top to bottom in a kernel of their own."""

import ast
import json
import os
import re
import sys

import forks
import nbformat
import pytest
from conftest import ROOT
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

NOTEBOOK = ROOT / "experiments" / "quickstart.ipynb"
OWN_TASK = ROOT / "experiments" / "own_task.ipynb"
EPOCHS = 40  # in the notebook
PLOTS = ("curves", "errors", "compare", "dark", "classes", "split")
# Trains the notebook's first two generations in a program with the same configuration.
REFERENCE = """
import json
import jax
import ban_jax

jax.config.update("jax_num_cpu_devices", 2)
cfg = ban_jax.get_config("digits,NETWORK,cpu")
cfg.train.update(epochs=EPOCHS, batch_size=40, evaluate_every=5, gradient_split=True)
teacher = ban_jax.train_generation(None, cfg, progress=False)
student = ban_jax.train_generation(teacher, cfg, progress=False)
print(json.dumps([teacher.metrics, ban_jax.evaluate(student, cfg)]))
"""


@pytest.fixture
def notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture
def own_task():
  return nbformat.read(OWN_TASK, as_version=4)


@pytest.fixture
def execute(tmp_path, monkeypatch):
  """Runs a notebook in a directory, in a kernel of this Python, independent of installed kernels and HOME."""
  write_kernel_spec(tmp_path / "kernels" / "this_python")
  for name, value in (
    ("JUPYTER_PATH", tmp_path),
    ("JUPYTER_RUNTIME_DIR", tmp_path / "runtime"),
    ("IPYTHONDIR", tmp_path / "ipython"),
    ("MPLCONFIGDIR", tmp_path / "matplotlib"),
  ):
    monkeypatch.setenv(name, str(value))

  def run(notebook, directory):
    resources = {"metadata": {"path": str(directory)}}
    NotebookClient(notebook, kernel_name="this_python", timeout=170, resources=resources).execute()

  return run


def outputs(notebook, cell_id: str) -> list:
  (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
  return cell.outputs


def printed(notebook, cell_id: str) -> str:
  return "".join(output.text for output in outputs(notebook, cell_id) if output.get("name") == "stdout")


def shown(notebook, cell_id: str, kind: str) -> list[str]:
  return [output.data[kind] for output in outputs(notebook, cell_id) if kind in output.get("data", {})]


@pytest.mark.parametrize("name", ["notebook", "own_task"])
def test_the_committed_notebook_holds_no_outputs_and_nothing_of_a_machine(request, name):
  notebook = request.getfixturevalue(name)
  nbformat.validate(notebook)
  assert notebook.metadata == {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  }
  for cell in notebook.cells:
    assert cell.metadata == {}, cell.id
    if cell.cell_type == "code":
      assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def test_it_finds_the_package_from_the_root_too(notebook, execute):
  kept = [cell for cell in notebook.cells if cell.id in ("paths", "imports")]
  kept.append(nbformat.v4.new_code_cell("import json; print(json.dumps([sys.executable, sys.path[0]]))", id="probe"))
  notebook.cells = kept
  execute(notebook, ROOT)
  assert json.loads(printed(notebook, "probe")) == [os.path.abspath(sys.executable), str(ROOT)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("epochs", "networks"),
  [
    # Small networks, which compile faster.
    (6, {"mlp_256": "mlp_16", "densenet_16_8": "mlp_32"}),
    pytest.param(EPOCHS, {"mlp_256": "mlp_256"}, marks=pytest.mark.soak),
  ],
  ids=["short", "whole"],
)
def test_it_runs_from_top_to_bottom_and_shows_what_the_calls_return(notebook, execute, epochs, networks):
  (cell,) = [cell for cell in notebook.cells if cell.id == "configuration"]
  assert cell.source.count(f"cfg.train.epochs = {EPOCHS}\n") == 1
  cell.source = cell.source.replace(f"cfg.train.epochs = {EPOCHS}\n", f"cfg.train.epochs = {epochs}\n")
  for cell in notebook.cells:
    for name, other in networks.items():
      cell.source = cell.source.replace(name, other)
  probe = "import time; print(time.process_time())"
  notebook.cells.append(nbformat.v4.new_code_cell(probe, id="probe"))
  execute(notebook, NOTEBOOK.parent)
  # Three minutes of processor time; wall time depends on the machine's other load.
  assert float(printed(notebook, "probe")) < 180

  for name in PLOTS:
    assert len(shown(notebook, name, "image/png")) == 1, name
  assert 'Did you mean "epochs"' in printed(notebook, "mistakes")
  assert "unknown scale 'small'; choose one of: cpu, paper" in printed(notebook, "mistakes")
  assert "read-only" in printed(notebook, "generation")
  assert [line.split()[0] for line in printed(notebook, "losses").splitlines()] == ["ban", "ban_label", "dkpp"]
  assert "DenseNet student: test error" in printed(notebook, "networks")
  assert printed(notebook, "run").count("the same bytes: True") == 4

  done = forks.run(
    [sys.executable, "-c", REFERENCE.replace("EPOCHS", str(epochs)).replace("NETWORK", networks["mlp_256"])], cwd=ROOT
  )
  assert done.returncode == 0, done.stderr
  teacher, student = json.loads(done.stdout)
  assert ast.literal_eval(*shown(notebook, "teacher", "text/plain")) == teacher
  (table,) = shown(notebook, "ensembles", "text/markdown")
  teacher = {name.removeprefix("test_"): value for name, value in teacher.items()}
  assert table.splitlines()[2:4] == [
    f"| {name} | {found['error']:.2f} | {found['nll']:.4f} | {found['ece']:.4f} |"
    for name, found in (("teacher", teacher), ("BAN-1", student))
  ]
  names = [line.split()[1] for line in table.splitlines()[2:]]
  assert names == ["teacher", "BAN-1", "BAN-2", "BAN-3", "Ens*2", "Ens*3"]
  assert printed(notebook, "students").startswith(f"BAN-1: test error {student['error']:.2f}%\n")


@pytest.mark.slow
def test_the_one_of_an_own_task_goes_from_arrays_to_an_exported_function(own_task, execute):
  own_task.cells.append(nbformat.v4.new_code_cell("import time; print(time.process_time())", id="probe"))
  execute(own_task, OWN_TASK.parent)
  assert float(printed(own_task, "probe")) < 40
  assert "wrong labels: 40%" in printed(own_task, "data")
  assert "the labels seem to begin at 1" in printed(own_task, "mistakes")
  assert "for one-hot labels take labels.argmax(axis=1)" in printed(own_task, "mistakes")
  errors = [float(error) for error in re.findall(r"test_error=([\d.]+)", printed(own_task, "training"))]
  assert len(errors) == 4
  assert errors[-1] < errors[0]  # what the text says of the plot
  assert len(shown(own_task, "staircase", "image/png")) == 1
  predicted, evaluated = re.search(r"error ([\d.]+) %, by evaluate ([\d.]+) %", printed(own_task, "predict")).groups()
  assert predicted == evaluated
  assert printed(own_task, "tomorrow") == "4 generations, the same probabilities: True\n"
  assert float(printed(own_task, "export").split()[-1]) < 1e-6

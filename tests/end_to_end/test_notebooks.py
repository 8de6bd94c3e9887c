"""The notebooks: stored without outputs, thin, and every cell of them runs on a tiny survey."""

import ast
import json
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MARK = "GALAXYDIST_TEST_OF_NOTEBOOKS"
MOST_LINES = 12


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["explore", "train_and_evaluate"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and set(notebook.metadata.language_info) == {"name"}
    assert all(re.fullmatch(r"[a-z-]+", cell.id) for cell in notebook.cells), "ids with a meaning: a small diff"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id
    assert [cell.id for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())] == ["parameters"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_code_cells_are_short_without_control_flow_and_follow_text(path: Path) -> None:
    before = None
    for cell in read(path).cells:
        if cell.cell_type == "code":
            assert before == "markdown" or cell.id in ("parameters", "data"), f"{cell.id}: say what the reader will see"
            lines = [line for line in cell.source.splitlines() if line and not line.startswith("%")]
            tree = ast.parse("\n".join(lines))
            work = [line for line in lines if not line.startswith(("import ", "from ", "#"))]
            assert len(work) <= MOST_LINES, f"{cell.id}: {len(work)} lines; move them into the library"
            logic = (ast.FunctionDef, ast.ClassDef, ast.While, ast.For, ast.Try, ast.With)
            assert not [node for node in ast.walk(tree) if isinstance(node, logic)], f"{cell.id}: move it into the library"
        before = cell.cell_type


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_the_public_api_only(path: Path) -> None:
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    tree = ast.parse("\n".join(line for line in code.splitlines() if not line.startswith("%")))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {module for module in modules if module.split(".")[0] == "galaxydist"} == {"galaxydist"}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AsyncKernelManager]:
    """A kernel of this interpreter, whatever is installed; everything that it starts carries a mark."""
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    specs = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
    yield AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    left = marked(mark)
    for process in left:
        process.kill()
    assert not left, f"still running: {left}"


def marked(mark: str) -> list[psutil.Process]:
    """Other processes that carry the mark, after some seconds in which they may end."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != psutil.Process().pid and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return psutil.wait_procs(found, timeout=60)[1]


def files_of_the_project() -> set[str]:
    """What lies beside the code, and beside the notebooks, where a careless notebook would write."""
    places = (*ROOT.glob("[!.]*"), *(ROOT / "notebooks").rglob("*"))
    return {str(path) for path in places if ".ipynb_checkpoints" not in path.parts}


def execute(name: str, settings: str, folder: Path, kernel: AsyncKernelManager) -> dict[str, list[NotebookNode]]:
    """Run a notebook in a folder with other parameters; cell id -> outputs. A cell's error is raised."""
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    place = [cell.id for cell in notebook.cells].index("parameters")
    notebook.cells.insert(place + 1, new_code_cell(settings))
    before = files_of_the_project()
    client = NotebookClient(notebook, km=kernel, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(cleanup_kc=True)
    assert files_of_the_project() == before, "something was written into the project"
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def figures(outputs: dict[str, list[NotebookNode]]) -> dict[str, set[str]]:
    """Cell id -> kinds of images that it shows."""
    kinds = {cell: {kind for output in shown for kind in output.get("data", {})} for cell, shown in outputs.items()}
    return {cell: found & {"image/png", "image/jpeg"} for cell, found in kinds.items() if found & {"image/png", "image/jpeg"}}


def printed(outputs: list[NotebookNode]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def named_files(name: str) -> set[str]:
    """Files that the text of a notebook names, as `folder/name.ending` or `name.ending`."""
    text = "\n".join(cell.source for cell in read(ROOT / "notebooks" / f"{name}.ipynb").cells if cell.cell_type == "markdown")
    return set(re.findall(r"`([\w/.-]+\.(?:html|json|jpg|png|parquet|md|tex))`", text))


@pytest.mark.slow
def test_explore_notebook_runs_and_writes_the_files_named_in_its_text(tmp_path: Path, kernel: AsyncKernelManager) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    outputs = execute("explore", "NUM_GALAXIES = 150", folder, kernel)
    shown = figures(outputs)
    assert set(shown) == {"counts", "examples", "redshift", "batch"}
    assert "150 of 150 looked at" in printed(outputs["look"]) and "text/html" in outputs["page"][0].data
    assert "'pairs_across_splits': 0" in printed(outputs["overlaps"])
    assert "same galaxies: True" in printed(outputs["steps"])
    named = named_files("explore")
    assert named == {"explore.html", "survey.json", "gallery.jpg", "counts.png", "manifest.json"}
    assert all(list((folder / "output" / "explore").rglob(file)) for file in named)
    assert [path.name for path in folder.iterdir()] == ["output"]


@pytest.mark.slow
def test_train_and_evaluate_notebook_runs_and_writes_the_files_named_in_its_text(
    tmp_path: Path, kernel: AsyncKernelManager
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    settings = 'NUM_GALAXIES = 150\nCHANGES = ["train.epochs=1", "model.width=4", "train.batch_size=24", "train.ema=0"]'
    outputs = execute("train_and_evaluate", settings, folder, kernel)
    shown = figures(outputs)
    assert set(shown) == {"curves", "metrics", "confusion", "calibration", "gallery"}
    assert all(shown[cell] == {"image/png"} for cell in ("curves", "metrics", "confusion", "calibration"))
    assert "train.epochs = 1   (command line)" in printed(outputs["recipe"])
    assert "epoch 1/1" in printed(outputs["train"]) and "averaged over D4" in printed(outputs["evaluate-again"])
    assert "accuracy" in printed(outputs["metrics"]) and "1 run on simulated" in printed(outputs["report"])
    (run_dir,) = (folder / "output" / "train" / "simulated-150" / "runs").iterdir()
    assert json.loads((run_dir / "evaluation" / "test.json").read_text())["count"] == 15
    named = named_files("train_and_evaluate")
    assert named >= {
        "manifest.json",
        "evaluation/test.json",
        "evaluation/test-gallery.html",
        "report.html",
        "report.md",
        "report.tex",
    }
    for file in named:
        place = run_dir if "/" in file else run_dir.parents[1] / ("shards" if file == "manifest.json" else "")
        assert (place / file).is_file(), file
    assert [path.name for path in folder.iterdir()] == ["output"]

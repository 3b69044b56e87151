"""The tour: it only calls the package, is stored without outputs, and runs from its first cell to its last."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

HOME = Path(__file__).parent.parent
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
FEW = {
    "MODEL": "smollm2-135m",
    "N_ASKED": 16,
    "N_FACTS": 2,
    "N_NEW": 1,
    "QUOTA": 10,
    "MAX_EPOCHS": 1,
    "N_TOKENS": 32,
    "SEED": 0,
}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook: NotebookNode) -> NotebookNode:
    (cell,) = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    return cell


def foreign(source: str) -> set[str]:
    """What a cell imports besides the package, and plotly and pandas that show its results."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found - {"workbench", "plotly", "pandas"}


def run(notebook: NotebookNode) -> NotebookNode:
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(HOME)}})
    return client.execute()


def test_there_is_a_tour() -> None:
    assert "00_tour.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_without_outputs_and_only_calls_the_package(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None
        assert foreign(cell.source) == set()
        assert not [n for n in ast.walk(ast.parse(cell.source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert code_cells(notebook)[0] is parameters(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert str(HOME) not in path.read_text(encoding="utf-8")


def test_the_check_of_imports_can_fail() -> None:
    assert foreign("import torch\nfrom workbench import facts\nimport plotly.express as px") == {"torch"}
    assert foreign("from transformers import AutoModel") == {"transformers"}


@pytest.mark.real
def test_the_tour_runs_and_shows_its_figures() -> None:
    notebook = read(HOME / "notebooks" / "00_tour.ipynb")
    cell = parameters(notebook)
    names = {target.id for node in ast.parse(cell.source).body for target in node.targets}
    assert names == set(FEW)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in FEW.items())
    done = run(notebook)
    cells = code_cells(done)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]
    noise = [out.text for cell in cells for out in cell.outputs if out.get("name") == "stderr"]
    assert not [text for text in noise if "Warning" in text]
    drawing = [cell for cell in cells if cell.source.splitlines()[-1].startswith("figures.")]
    assert len(drawing) >= 8
    for cell in drawing:
        (shown,) = [out.data[PLOTLY] for out in cell.outputs if PLOTLY in out.get("data", {})]
        assert shown["data"], cell.source
        axes = [axis for name, axis in shown["layout"].items() if name.startswith("xaxis")]
        assert any("title" in axis for axis in axes), cell.source
    last = cells[-1].outputs[-1].data["text/plain"]
    for suite in ("efficacy", "paraphrase", "retained", "general"):
        assert suite in last


@pytest.mark.real
def test_an_error_in_a_notebook_is_an_error_of_its_test() -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import workbench as wb\nwb.nothing")])
    with pytest.raises(CellExecutionError, match="attribute nothing"):
        run(notebook)

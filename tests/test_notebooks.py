"""The notebooks of examples/ run from top to bottom, and are stored clean."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install 'fastgpt2[dev]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'fastgpt2[dev]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'fastgpt2[dev]'")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"kernels", "quick_start"}


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run(path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The cells run as a script. A Jupyter kernel would need ten seconds to import everything again."""
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed: pip install 'fastgpt2[dev]'")
    monkeypatch.setattr(sys, "argv", [str(path)])
    pyplot.switch_backend("Agg")
    namespace: dict[str, object] = {"__name__": "__main__"}
    try:
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), namespace)
        assert path.stem != "kernels" or pyplot.get_fignums(), "no figure was drawn"
    finally:
        pyplot.close("all")
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_in_jupyter(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(ROOT / "kernels"))))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type == "stream" and output.name == "stdout" for output in outputs)
    if path.stem == "kernels":
        assert any("image/png" in output.get("data", {}) for output in outputs), "no figure was drawn"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path: Path) -> None:
    """Notebooks are valid, without outputs and counts, and formatted by nbformat, so that diffs are small."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"

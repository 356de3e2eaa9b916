"""Every notebook runs top to bottom with nano, and is committed as it ran: in order, without errors, small.

They run on fewer pictures than the committed ones (SEG4DIFF_QUICK, see notebooks/start.py), and on as many with

    SEG4DIFF_FULL=1 pytest -q tests/test_notebooks.py
"""
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"image/png", "image/jpeg"}


def without_figure(cells: list[dict]) -> list[str]:
    """Cells that draw and show nothing."""
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and "plt.subplots" in "".join(c["source"])
            and not any(o.get("data", {}).keys() & PICTURES for o in c["outputs"])]


def test_there_are_some():
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")               # pytest runs as many tests at once as there are cores
    monkeypatch.delenv("SEG4DIFF_QUICK", raising=False)
    if not os.environ.get("SEG4DIFF_FULL"):
        monkeypatch.setenv("SEG4DIFF_QUICK", "1")
    monkeypatch.delenv("SEG4DIFF_MODEL", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=folder).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum(bool(o.get("data", {}).keys() & PICTURES) for o in outputs) >= 3
    assert not without_figure(notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_as_committed(path):
    code = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert path.stat().st_size < 300_000
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not without_figure(code)
    assert not [line for c in code for line in c["source"] if line.startswith("class ")]     # they call the library
    assert sum(bool(o.get("data", {}).keys() & PICTURES) for o in outputs) >= 3

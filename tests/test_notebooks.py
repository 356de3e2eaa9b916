"""Every notebook runs top to bottom with nano, and is committed as it ran: in order, without errors, small."""
import json
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
    assert len(NOTEBOOKS) == 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.delenv("SEG4DIFF_MODEL", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    pictures = [o for c in book.cells if c.cell_type == "code" for o in c.outputs if o.get("data", {}).keys() & PICTURES]
    assert len(pictures) >= 3 and not without_figure(book.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_as_committed(path):
    book = json.loads(path.read_text())
    code = [c for c in book["cells"] if c["cell_type"] == "code"]
    assert path.stat().st_size < 300_000
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not without_figure(code)
    assert not [line for c in code for line in c["source"] if line.startswith("class ")]     # they call the library
    assert sum(bool(o.get("data", {}).keys() & PICTURES) for o in outputs) >= 3

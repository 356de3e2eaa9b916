"""Every notebook runs top to bottom with nano, and is committed as it ran: in order, without errors, small.

They run on fewer pictures than the committed ones (SEG4DIFF_QUICK, see notebooks/start.py), one after the other in one
kernel, which saves four seconds of imports each.  With as many pictures, and each in a kernel of its own, by

    SEG4DIFF_FULL=1 pytest -q tests/test_notebooks.py

and then what they print is what they were committed with.
"""
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"image/png", "image/jpeg"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def printed(cells: list[dict]) -> str:
    """All that they print, and where a cell begins."""
    text = []
    for cell in cells:
        if cell["cell_type"] == "code":
            text.append("cell\n")
            text += ["".join(o["text"]) for o in cell["outputs"] if o.get("name") == "stdout"]
    return "".join(text)


def without_figure(cells: list[dict]) -> list[str]:
    """Cells that draw and show nothing."""
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and "plt.subplots" in "".join(c["source"])
            and not any(o.get("data", {}).keys() & PICTURES for o in c["outputs"])]


def test_there_are_some():
    assert len(NOTEBOOKS) == 6


@pytest.fixture(scope="module")
def kernel():
    """A kernel that the quick notebooks share; it is started by the first of them."""
    kernel = AsyncKernelManager(kernel_name="python3")
    yield kernel
    if kernel.has_kernel:
        run_sync(kernel.shutdown_kernel)(now=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch, kernel):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")               # pytest runs as many tests at once as there are cores
    monkeypatch.delenv("SEG4DIFF_QUICK", raising=False)
    monkeypatch.delenv("SEG4DIFF_MODEL", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    committed = printed(notebook.cells)
    if os.environ.get("SEG4DIFF_FULL"):
        kernel = None                                        # a new one
    else:
        monkeypatch.setenv("SEG4DIFF_QUICK", "1")
        notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))     # forget the notebook before
    folder = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, km=kernel, timeout=240, kernel_name="python3", resources=folder).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert sum(bool(o.get("data", {}).keys() & PICTURES) for o in outputs) >= 3
    assert not without_figure(notebook.cells)
    if kernel is None:
        now = printed(notebook.cells)
        assert NUMBER.sub("#", now) == NUMBER.sub("#", committed)
        numbers = [float(x) for x in NUMBER.findall(committed)]
        assert numbers and [float(x) for x in NUMBER.findall(now)] == pytest.approx(numbers, rel=0.02, abs=0.02)


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

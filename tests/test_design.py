"""What DESIGN.md asks of the files themselves: imports in one direction, no circle, sizes, and which files count."""
import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import evaluate
import protocol
import train_magnet

ROOT = Path(evaluate.__file__).parent
FOLDERS = ("support", "nano", "tools")
TOP = sorted(path.name for path in ROOT.glob("*.py"))
FILES = TOP + sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py"))
NETWORKS = ("mmdit.py", "flux.py", "vae.py", "text.py", "t5.py")


def file_of(module: str) -> str | None:
    """The project's file of a module's name, None for another's module."""
    name = module.replace(".", "/") + ".py"
    return name if name in FILES else None


def imports(file: str, inside_functions: bool = True) -> set[str]:
    """Full names of all modules that a file imports; without those that only a call of a function imports."""
    modules = set()
    nodes = [ast.parse((ROOT / file).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda) and not inside_functions:
            continue
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):                                 # a package's module, or a module's name
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return modules


def imported_files(file: str, inside_functions: bool = True) -> set[str]:
    return {file_of(module) for module in imports(file, inside_functions)} - {None}


def reachable(*files: str) -> set[str]:
    """These files and all of the project's that they import, directly or not."""
    reached = set()
    todo = list(files)
    while todo:
        file = todo.pop()
        if file not in reached:
            reached.add(file)
            todo += imported_files(file)
    return reached


def packages(files: set[str]) -> set[str]:
    return {module.split(".")[0] for file in files for module in imports(file)}


# ---------------------------------------------------------------------------- what a count depends on


# Imported by what counts, but no count depends on them.
COUNT_NOTHING = {"support/cli.py": "options of command lines and the sentence of an error",
                 "support/ctrl_c.py": "the same sentence before a command has begun",
                 "support/pictures.py": "draws; evaluations read their pictures by support/files.py",
                 "tools/doctor.py": "a report, which seg4diff.py imports when it is asked for",
                 "tools/forecast.py": "a part of it", "tools/costs.py": "a part of it",
                 "tools/bench.py": "its stopwatch"}
# Nor do the weights of MAGNET depend on this one, which only train_magnet.py imports.
TRAIN_NOTHING = {"support/report.py": "draws the log"}


@pytest.mark.parametrize("code, files, left_out", [
    (protocol.CODE, ("protocol.py", "support/ledger.py"), COUNT_NOTHING),
    (train_magnet.CODE, ("train_magnet.py",), COUNT_NOTHING | TRAIN_NOTHING)])
def test_the_code_of_a_run_is_complete_and_exact(code, files, left_out):
    """What protocol.py computes and the ledger keeps and adds up depends on protocol.CODE, and on nothing else.

    What train_magnet.py learns and measures depends in the same way on its own CODE.
    """
    assert len(set(code)) == len(code)
    python = {file for file in code if file.endswith(".py")}
    used = reachable(*files)
    assert left_out.keys() <= used
    assert python == used - left_out.keys()
    assert set(code) - python == {"support/classes.json"}                    # data that those files read


# ---------------------------------------------------------------------------- imports


def test_support_imports_nothing_of_the_top_level():
    for file in FILES:
        if file.startswith("support/"):
            below = {name for name in imported_files(file) if not name.startswith("support/")}
            assert below <= ({"nano/scenes.py"} if file == "support/data.py" else set()), file


def test_no_circle():
    graph = {file: imported_files(file, inside_functions=False) for file in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)  # raises CycleError with the circle


@pytest.mark.parametrize("file", NETWORKS)
def test_a_network_needs_no_hub_no_masks_and_no_toy_world(file):
    used = reachable(file)
    assert used <= {*NETWORKS, "support/checkpoint.py"}
    assert not packages(used) & {"huggingface_hub", "httpx2", "pycocotools", "nano"}


def test_the_method_imports_no_command():
    commands = {"evaluate.py", "protocol.py", "figures.py", "analysis.py", "magnet.py", "train_magnet.py"}
    assert not reachable("seg4diff.py") & commands


def test_what_an_import_loads():
    """In a process of its own: networks without the hub's client, the method without pycocotools and the toy world."""
    lines = ["import sys, mmdit, flux, vae, text, judges",
             "print({'huggingface_hub', 'pycocotools', 'nano'} & sys.modules.keys())",
             "import seg4diff", "print({'pycocotools', 'nano.scenes'} & sys.modules.keys())"]
    # Nor does it change how the program that imports it answers Ctrl-C.
    lines += ["import signal", "from support import ctrl_c", "print(signal.getsignal(signal.SIGINT) is ctrl_c.stop)"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\nset()\nFalse\n", "")


# ---------------------------------------------------------------------------- sizes


def test_no_file_is_long():
    """At most 400 lines for a file of the paper, 450 for any other."""
    tests = [f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")]
    lines = {file: (ROOT / file).read_text().count("\n") for file in (*FILES, *tests)}
    assert not {file: n for file, n in lines.items() if n > (400 if file in TOP else 450)}

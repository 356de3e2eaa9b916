"""Ctrl-C before a command has begun, while it imports its packages; test_cli and others press it later."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import seg4diff
from support import ctrl_c

ROOT = Path(seg4diff.__file__).parent
FILES = [path for folder in (".", "nano", "tools") for path in sorted(ROOT.glob(f"{folder}/*.py"))]
COMMANDS = [str(path.relative_to(ROOT)) for path in FILES if "\n    command(" in path.read_text()]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A folder of packages that are being imported for ever; each says so."""
    folder = tmp_path_factory.mktemp("slow")
    for name in ("numpy", "torch", "matplotlib"):
        (folder / f"{name}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    return folder


@pytest.fixture
def usual_answer():
    """Also for processes that are started: a parent that ignores Ctrl-C has children that do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("script", COMMANDS)
def test_while_packages_are_imported(slow, usual_answer, script):
    run = subprocess.Popen([sys.executable, ROOT / script], env=os.environ | {"PYTHONPATH": str(slow)}, cwd=slow,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "importing\n"
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out, err) == (130, "", f"{ctrl_c.STOPPED}\n")


def test_all_commands_are_there():
    assert len(COMMANDS) >= 12 and {"evaluate.py", "seg4diff.py", "nano/pretrain.py", "tools/bench.py"} < set(COMMANDS)


def test_a_command_takes_over(usual_answer, command, monkeypatch):
    """While it works, Ctrl-C is an exception; afterwards nothing of it is left."""
    seen = []

    def load(*args, **kwargs):
        seen.append(signal.getsignal(signal.SIGINT))
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr("loading.load", load)
    code, out, err = command("seg4diff.py", "generate", "car")
    assert (code, out, err) == (130, "", f"{ctrl_c.STOPPED}\n")
    assert seen == [signal.default_int_handler] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_others_have_set_stays(usual_answer):
    """An ignored Ctrl-C (`nohup`) stays ignored; test_design: an import as a library sets nothing."""
    for chosen in (signal.SIG_IGN, lambda *_: None):
        signal.signal(signal.SIGINT, chosen)
        ctrl_c.answer_early()
        assert signal.getsignal(signal.SIGINT) is chosen
        ctrl_c.answer_by_exception()
        assert signal.getsignal(signal.SIGINT) is chosen

"""support/files.py: what a killed process leaves behind is removed when the same file is next written."""
import os
import subprocess
import sys
from pathlib import Path

from support import files

ROOT = Path(files.__file__).parents[1]


def test_a_killed_process_leaves_nothing_for_long(tmp_path):
    """kill -9 in the middle of writing: the old file is still there, and the half new one goes when it is written."""
    path = tmp_path / "o [1].json"                       # no pattern of names, whatever it is called
    files.write_json(path, "old")
    lines = ["import time, sys", "from support import files", "with files.replacing(sys.argv[1]) as new:",
             "    new.write_text('half')", "    print('written', flush=True)", "    time.sleep(600)"]
    run = subprocess.Popen([sys.executable, "-c", "\n".join(lines), path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "written\n"
    left = tmp_path / f".{path.name}.{run.pid}.tmp"
    files.write_json(path, "meanwhile")                  # another process, which is alive, keeps what it writes
    assert left.read_text() == "half"
    run.kill()
    run.communicate()
    assert left.exists()
    files.write_json(path, "new")
    assert os.listdir(tmp_path) == [path.name] and files.read_json(path, str) == "new"


def test_nothing_else_is_removed(tmp_path):
    """Other outputs' leftovers, names that only look alike, numbers that no process can have."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    kept = [f".other.json.{dead.pid}.tmp", f".oxjson.{dead.pid}.tmp", f"o.json.{dead.pid}.tmp", ".o.json.x.tmp",
            f".o.json.{dead.pid}.tmp2", ".o.json..tmp", f".o.json.{os.getppid()}.tmp", f".o.json.{10**30}.tmp"]
    for name in (*kept, f".o.json.{dead.pid}.tmp"):
        (tmp_path / name).write_text("")
    files.write_json(tmp_path / "o.json", 1)
    assert set(os.listdir(tmp_path)) == {*kept, "o.json"}

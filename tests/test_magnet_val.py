"""What train_magnet.py measures on the way: a broken picture of --val is named and left out, an empty one left out."""
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_magnet
from nano import scenes
from support.data import DATASETS, Dataset, usable

FAST = ("--device", "cpu", "--batch", 1, "--accumulate", 1, "--warmup", 1, "--limit", 2, "--steps", 2)
VAL = ("--val", "ade20k", "--data-root", "d")


@pytest.fixture
def run(command, tiny_file, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setattr("support.report.plot_losses", lambda log, path: None)

    def run(*args):
        return command("train_magnet.py", "--model", tiny_file, *FAST, *args)
    return run


@pytest.fixture
def ade(tmp_path) -> Path:
    """Four pictures of ADE20K: a is whole, b is cut, c has no labelled pixel, d is whole."""
    root = tmp_path / "d/ADEChallengeData2016"
    for i, name in enumerate("abcd"):
        for folder, kind in (("images", "jpg"), ("annotations", "png")):
            path = root / f"{folder}/validation/{name}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene = scenes.draw(i)
            labels = scene.labels + 1 if name != "c" else np.zeros_like(scene.labels)        # 0: unlabelled
            Image.fromarray(scene.image if kind == "jpg" else labels).save(path)
    cut(root / "images/validation/b.jpg")
    return root


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def test_a_broken_picture_is_left_out_of_all_that_is_measured(run, ade, tmp_path):
    code, out, err = run(*VAL, "--val-every", 1, "--out", "run")
    assert code == 0 and "mIoU" in out, err
    assert err.count("picture b of ade20k cannot be read, not measured: ") == 1 and "picture c" not in err
    log = json.loads((tmp_path / "run/log.json").read_text())
    assert [entry["step"] for entry in log if "val" in entry] == [0, 1, 2]
    code, out, err = run(*VAL, "--measure", "run/lora.safetensors")
    assert code == 0 and "ade20k, 2 pictures" in out and err.count("picture b") == 1, err
    numbers = [float(line.split()[0]) for line in out.splitlines()[1:3]]
    measured = [entry["val"]["mIoU"] for entry in log if "val" in entry]
    assert numbers == pytest.approx([measured[0], measured[-1]], abs=1e-3)   # of the same pictures
    data = DATASETS["ade20k"](tmp_path / "d")
    found, broken = usable(data, data.names)
    assert found == train_magnet.measurable(data, data.names) == ["a", "d"]
    assert broken.keys() == {"b"} and "b.jpg" in broken["b"]
    assert usable(data, data.names, 1) == (["a"], {})                        # what follows is not looked at


def test_nothing_that_could_be_measured_is_a_sentence(run, ade, tmp_path):
    for name in "ad":
        cut(ade / f"images/validation/{name}.jpg")
    for args in ((), ("--measure", "l.safetensors")):
        code, out, err = run(*VAL, *args, "--out", "run")
        last = err.splitlines()[-1]
        assert code == 2 and out == "", err
        assert last.startswith("error: nothing can be measured: 3 of the 4 pictures of ade20k cannot be read, and no "
                               "other has a labelled pixel; '") and "a.jpg' cannot be read as a picture" in last
    assert not (tmp_path / "run").exists()


def test_drawn_scenes_are_not_read_for_it():
    data = Dataset("drawn", ["1", "2"], lambda name: 1 / 0)
    assert train_magnet.measurable(data, data.names) == ["1", "2"] and usable(data, data.names, 1) == (["1"], {})


def test_a_seed_of_any_size(run):
    """PyTorch's generators take seeds below 2**64 only; such a run can also be gone on with."""
    options = ("--val", "scenes-dev", "--val-limit", 1, "--seed", 2**70 + 3, "--out", "run")
    for steps in ("2 steps", "0 steps"):
        code, out, err = run(*options)
        assert code == 0 and steps in out, err


def test_torchrun_does_not_measure(run, monkeypatch):
    monkeypatch.setattr("support.ledger.world", lambda: (1, 2))
    code, out, err = run("--measure", "lora.safetensors")
    assert (code, out) == (2, "") and "leave torchrun out" in err

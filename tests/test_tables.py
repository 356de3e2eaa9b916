"""Real data sets in miniature, through the command: Table 1 and 2 beside the paper's numbers."""
import hashlib
import io
import json
import os
import sys
from functools import partial

import numpy as np
import pytest
from test_data import put

import seg4diff
from protocol import evaluation
from support.data import DATASETS, FACTS
from support.report import PAPER


def noise(path, seed=0, size=(40, 56)):
    put(path, np.random.default_rng(seed).integers(0, 255, (*size, 3)))


def halves(left: int, right: int) -> np.ndarray:
    labels = np.full((40, 56), left, np.uint8)
    labels[:, 30:] = right
    labels[:3] = 255
    return labels


@pytest.fixture
def root(tmp_path):
    """voc, coco and ade20k with two pictures each: cars on the left of cats or of the sky."""
    root = tmp_path / "data"
    for i, name in enumerate(("a", "b")):
        noise(root / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg", i)
        put(root / f"VOCdevkit/VOC2012/SegmentationClass/{name}.png", halves(7, 8 if i else 0), palette=True)
        noise(root / f"coco/val2017/{name}.jpg", i)
        put(root / f"coco/stuffthingmaps/val2017/{name}.png", halves(2, 16 if i else 91))
        noise(root / f"ADEChallengeData2016/images/validation/{name}.jpg", i)
        put(root / f"ADEChallengeData2016/annotations/validation/{name}.png", halves(21, 3))
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    return root


PRESENT = {"ovss": ["voc", "coco-object", "ade20k"], "unsup": ["voc21", "coco-object81", "stuff27", "ade20k"]}


@pytest.mark.parametrize("task", PRESENT)
def test_a_whole_table(command, tiny_file, tmp_path, root, task):
    title = PAPER[task]["title"]
    columns = PAPER[task]["columns"]
    paper = PAPER[task]["mIoU"]
    options = ("--dataset", "all", "--task", task, "--data-root", root, "--model", tiny_file, "--device", "cpu")
    code, out, err = command("evaluate.py", *options)
    assert code == 0, err
    missing = [c for c in columns if c not in PRESENT[task]]
    assert out.splitlines()[-1].startswith(f"not found below {root}: {', '.join(missing)};") and missing
    lines = out.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"{title}, mIoU")]
    lines = lines[start:-1]
    assert lines[0].split()[3:] == columns and len(lines) == 1 + len(paper) + 3
    for method, values in paper.items():
        line = next(x for x in lines if x.startswith(f"{method}, the paper's"))
        assert line.split("the paper's")[1].split() == [f"{x:.1f}" for x in values]
    for row in ("tiny", "floor", "ceiling"):
        cells = next(x for x in lines if x.startswith(f"{row}, ours")).split("ours")[1].split()
        for name, cell in zip(columns, cells, strict=True):
            if name not in PRESENT[task]:
                assert cell == "-"
                continue
            result = json.loads((tmp_path / f"out/{task}-all-tiny/{name}/results.json").read_text())
            assert cell == f"{result['rows'][row]['mIoU']:.1f}"
    assert {p.name for p in (tmp_path / f"out/{task}-all-tiny").iterdir()} == set(PRESENT[task])


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


OUTPUTS = {"pipe": (pipe_without_reader, 0), "full": (partial(open, "/dev/full", "w"), 2),
           "ascii": (lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), 0)}


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_cannot_be_printed_is_on_the_disk(command, tiny_file, tmp_path, root, monkeypatch, output):
    """Of every data set, not of the first alone (faults B.8)."""
    model = tmp_path / "t·ny.safetensors"                # a name that ASCII lacks
    model.symlink_to(tiny_file)
    options = ("--dataset", "all", "--data-root", root, "--model", model, "--device", "cpu", "--out", tmp_path / "out")
    opened, code = OUTPUTS[output]
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", opened())
        found, _, err = command("evaluate.py", *options)
        if output == "ascii":
            assert b"t\\xb7ny, ours" in sys.stdout.buffer.getvalue()
    assert found == code and "Traceback" not in err and ("standard output cannot be written" in err) == (code == 2)
    for name in PRESENT["ovss"]:
        assert {"results.json", "overlays.png"} < {path.name for path in (tmp_path / "out" / name).iterdir()}


def test_a_data_set_that_cannot_be_read(command, tiny_file, tmp_path, root):
    """It has no column in the table, and is the error that the command ends with."""
    for name in ("a", "b"):
        (root / f"coco/val2017/{name}.jpg").write_text("no picture")
    code, out, err = command("evaluate.py", "--dataset", "all", "--data-root", root, "--model", tiny_file)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: coco-object: none of the 2 pictures of coco-object could be read")
    cells = next(x for x in out.splitlines() if x.startswith("ceiling, ours")).split("ours")[1].split()
    assert [cell == "-" for cell in cells] == [column not in ("voc", "ade20k") for column in PAPER["ovss"]["columns"]]


def test_no_data_set_at_all(command, tiny_file, tmp_path):
    code, out, err = command("evaluate.py", "--dataset", "all", "--data-root", tmp_path / "empty", "--model", tiny_file)
    assert code == 2 and out == "" and err.startswith("error: none of the data sets voc, coco-object, context59, ")
    assert "VOCdevkit/VOC2012/JPEGImages/*.jpg" in err and not (tmp_path / "out").exists()


def test_real_data_sets_are_for_sd3(command, root, monkeypatch):
    """Without --model the real ones ask for SD3, and the scenes for nano."""
    asked = []

    def load(name, *args, **kwargs):
        asked.append(name)
        raise ValueError("enough")
    monkeypatch.setattr(seg4diff, "load", load)
    for dataset in ("voc", "all", "scenes", "scenes-dev"):
        assert command("evaluate.py", "--data-root", root, "--dataset", dataset)[0] == 2
    assert asked == ["sd3", "sd3", "nano", "nano"]
    command("evaluate.py", "--model", "")                # a name like any other: there is no such model
    assert asked[-1] == ""


def test_background_that_competes_and_is_never_scored(tiny, root):
    """coco-object-bg: one more name in the prompt, the same pixels scored (test_evaluate.py has such a class)."""
    usual = DATASETS["coco-object"](root)
    released = DATASETS["coco-object-bg"](root)
    assert released.classes == ["background", *usual.classes] and (released.always, usual.always) == ((0,), ())
    for name in ("a", "b"):
        a = usual.read(name).labels
        b = released.read(name).labels
        assert (np.where(a == 255, 255, a + 1) == b).all() and (b == 255).any() and not (b == 0).any()
    without = dict(evaluation(tiny, usual, "ovss").count(["a", "b"]))
    with_bg = dict(evaluation(tiny, released, "ovss").count(["a", "b"]))
    for name in ("a", "b"):
        assert (with_bg[name]["ceiling"][1:, 1:] == without[name]["ceiling"]).all()
    only_car = without["a"]["tiny"]                              # one class without background is a hundred percent
    assert only_car[2, 2] == only_car.sum() > with_bg["a"]["floor"][3, 3] > 0


# Class lists and the paper's numbers were compared with their sources once; nobody is to change them in passing.
CHECKED = {"voc20": "8c8425883da3", "context59": "c5b4ad56744b", "coco-object": "9d91ef16dc20",
           "stuff27": "91d9c99723fc", "ade20k": "4136624ea83c", "cityscapes": "bc77c478a57d",
           "coco-stuff171": "d0c5e8b87094"}


def short_digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def test_classes_are_those_that_were_checked():
    assert {key: short_digest(value) for key, value in FACTS.items()} == CHECKED
    for key in ("voc20", "coco-object", "cityscapes", "coco-stuff171"):
        assert FACTS[key]["source_ids"] == sorted(FACTS[key]["source_ids"]), key
    assert FACTS["voc20"]["classes"] == sorted(FACTS["voc20"]["classes"])


def test_the_paper_s_numbers_are_those_that_were_checked():
    assert short_digest(PAPER) == "aa9c480a5cf2"
    assert PAPER["ovss"]["mIoU"]["SD3"] == [89.2, 62.0, 49.0, 34.2, 26.5]

"""Real data sets in miniature, through the command: Table 1 and 2 beside the paper's numbers, and one's own folder."""
import json

import numpy as np
import pytest
from PIL import Image
from test_data import put

import evaluate
import seg4diff
from seg4diff import image_seed
from support import pictures
from support.data import DATASETS
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


FOUND = {"ovss": ["voc", "coco-object", "ade20k"], "unsup": ["voc21", "coco-object81", "stuff27", "ade20k"]}


@pytest.mark.parametrize("task", FOUND)
def test_a_whole_table(command, tiny_file, tmp_path, root, task):
    title, columns, paper = PAPER[task]
    options = ("--dataset", "all", "--task", task, "--data-root", root, "--model", tiny_file, "--device", "cpu")
    code, out, err = command("evaluate.py", *options)
    assert code == 0, err
    missing = [c for c in columns if c not in FOUND[task]]
    assert out.splitlines()[-1].startswith(f"not found below {root}: {', '.join(missing)};") and missing
    lines = out.splitlines()
    lines = lines[next(i for i, line in enumerate(lines) if line.startswith(f"{title}, mIoU")):-1]
    assert lines[0].split()[3:] == columns and len(lines) == 1 + len(paper) + 3
    for method, values in paper.items():
        line = next(x for x in lines if x.startswith(f"{method}, the paper's"))
        assert line.split("the paper's")[1].split() == [f"{x:.1f}" for x in values]
    for row in ("tiny", "floor", "ceiling"):
        cells = next(x for x in lines if x.startswith(f"{row}, ours")).split("ours")[1].split()
        for name, cell in zip(columns, cells, strict=True):
            path = tmp_path / f"out/{task}-all-tiny/{name}/results.json"
            assert cell == (f"{json.loads(path.read_text())['rows'][row]['mIoU']:.1f}" if name in FOUND[task] else "-")
    assert {p.name for p in (tmp_path / f"out/{task}-all-tiny").iterdir()} == set(FOUND[task])


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
    for options in (["voc"], ["all"], ["folder", "--classes", "car"], ["scenes"], ["scenes-dev"]):
        assert command("evaluate.py", "--data-root", root, "--dataset", *options)[0] == 2
    assert asked == ["sd3", "sd3", "sd3", "nano", "nano"]


def test_background_that_competes_and_is_never_scored(tiny, root):
    """coco-object-bg: one more name in the prompt, the same pixels scored."""
    usual, released = DATASETS["coco-object"](root), DATASETS["coco-object-bg"](root)
    assert released.classes == ["background", *usual.classes] and (released.always, usual.always) == ((0,), ())
    for name in ("a", "b"):
        a, b = usual.read(name).labels, released.read(name).labels
        assert (np.where(a == 255, 255, a + 1) == b).all() and (b == 255).any() and not (b == 0).any()
    ovss = evaluate.TASKS["ovss"](tiny)
    counts = {d.name: dict(evaluate.tally(tiny, d, ["a", "b"], ovss, evaluate.Protocol(), 2)) for d in (usual, released)}
    for name in ("a", "b"):
        with_bg, without = counts["coco-object-bg"][name], counts["coco-object"][name]
        assert with_bg["floor"].sum() == without["floor"].sum() and not with_bg["floor"][0].any()
        assert with_bg["floor"][:, 0].sum() > 0 and (with_bg["ceiling"][1:, 1:] == without["ceiling"]).all()
    only_car = counts["coco-object"]["a"]["tiny"]                # one class without background is a hundred percent
    assert only_car[2, 2] == only_car.sum() > counts["coco-object-bg"]["a"]["floor"][3, 3] > 0


# ---------------------------------------------------------------------------- --dataset folder


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    noise(folder / "one.png", 1)
    noise(folder / "two.jpg", 2, (64, 33))
    (folder / "notes.txt").write_text("no picture")
    return folder


def segment(command, tiny_file, folder, *options):
    fixed = ("--dataset", "folder", "--data-root", folder, "--model", tiny_file, "--device", "cpu")
    return command("evaluate.py", *fixed, *options)


def test_folder(command, tiny_file, tiny, tmp_path, folder):
    names = ["car", "teddy bear", "sky"]
    code, out, err = segment(command, tiny_file, folder, "--classes", "car, teddy bear ,sky,")
    assert code == 0, err
    written = tmp_path / "out/ovss-folder-tiny"
    assert sorted(str(p.relative_to(written)) for p in written.rglob("*.*")) == [
        "labels/one.png", "labels/two.png", "overlays/one.png", "overlays/two.png"]
    for name in ("one.png", "two.jpg"):
        image = pictures.open_image(folder / name)
        labels = Image.open(written / "labels" / f"{name[:3]}.png")
        want = seg4diff.segment(tiny, image, names, seed=image_seed(name, 0)).labels
        assert labels.mode == "P" and labels.size == image.size and (np.asarray(labels) == want).all()
        assert labels.getpalette()[:9] == pictures.palette(3).ravel().tolist()
        overlay = Image.open(written / "overlays" / f"{name[:3]}.png")
        assert (np.asarray(overlay) == np.asarray(pictures.panels(image, want, names))).all()
    assert "labels" in out and len(np.unique(want)) > 1

    (folder / "three.png").write_text("broken")
    code, out, err = segment(command, tiny_file, folder, "--classes", "car,sky", "--seed", 1, "--out", tmp_path / "o")
    assert code == 0 and "1 of 3 pictures could not be read" in out and "three.png" in out
    assert {p.name for p in (tmp_path / "o/labels").iterdir()} == {"one.png", "two.png"}


def test_processes_share_a_folder(command, tiny_file, tmp_path, folder, monkeypatch):
    """Each of two does every second picture; one with nothing to do is content."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, done in (("0", ["one"]), ("1", ["one", "two"])):
        monkeypatch.setenv("RANK", rank)
        assert segment(command, tiny_file, folder, "--classes", "car,sky")[0] == 0
        assert sorted(p.stem for p in (tmp_path / "out/ovss-folder-tiny/labels").iterdir()) == done
    assert segment(command, tiny_file, folder, "--classes", "car,sky", "--limit", 1, "--out", tmp_path / "o")[0] == 0
    assert not list((tmp_path / "o/labels").iterdir())


@pytest.mark.parametrize("limit", [None, 1])
def test_folder_of_broken_pictures(command, tiny_file, tmp_path, limit):
    for i in range(3):
        (tmp_path / f"p{i}.png").write_text("broken")
    options = ("--limit", limit) if limit else ()
    code, _, err = segment(command, tiny_file, tmp_path, "--classes", "car", *options)
    assert code == 2 and err.splitlines()[-1].startswith(f"error: none of the {limit or 3} pictures of")


@pytest.mark.parametrize("extra, options, told", [
    ([], ["--classes", ""], "list of classes is empty"), ([], ["--classes", " , "], "list of classes is empty"),
    ([], [], "--classes cat,dog,... go together"), (["one.jpg"], ["--classes", "car"], "no two of them with the same name"),
    ([], ["--classes", "car," + "x" * 99], "room for 26"), ([], ["--classes", "car", "--task", "unsup"], "--task ovss only"),
    ([], ["--classes", "car", "--draws", "2"], "do not go with it"),
    ([], ["--classes", "car", "--resize", "crop"], "--resize"),
    ([], ["--classes", "car", "--out", "pictures/notes.txt"], "notes.txt")])
def test_folder_errors(command, tiny_file, folder, extra, options, told):
    for name in extra:
        noise(folder / name)
    before = sorted(folder.parent.rglob("*"))
    code, _, err = segment(command, tiny_file, folder, *options)
    assert code == 2 and err.startswith("error: ") and told in err and err.count("\n") == 1, err
    assert sorted(folder.parent.rglob("*")) == before


def test_folder_without_pictures(command, tiny_file, tmp_path):
    for folder, told in (("none", "must be a folder"), (".", "holds 0 pictures")):
        code, _, err = segment(command, tiny_file, tmp_path / folder, "--classes", "car")
        assert code == 2 and told in err and "Traceback" not in err

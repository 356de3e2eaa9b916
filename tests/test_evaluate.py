"""Metrics by hand, floor and ceiling, and every task of the command on two scenes."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import seg4diff
from data import DATASETS, IGNORE, Item
from evaluate import TASKS, ceiling_map, confusion, floor_map, image_seed, scores

ROWS = {"ovss": 1, "layers": 3 * 2, "heads": 3 * 2, "timesteps": 14, "normalization": 4}     # 3 blocks, 2 heads

# ---------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    """Class 3 is never true, only predicted: it counts against class 1, and in no mean."""
    truth = np.array([[0, 0, 0, 1, 1], [2, 2, IGNORE, IGNORE, 0]], np.uint8)
    pred = np.array([[0, 0, 1, 1, 3], [2, 2, 0, 3, 2]])
    conf = confusion(truth, pred, 4)
    assert conf.tolist() == [[2, 1, 1, 0], [0, 1, 0, 1], [0, 0, 2, 0], [0, 0, 0, 0]]
    s = scores(conf)
    assert s["IoU"][:3] == pytest.approx([100 * 2 / 4, 100 * 1 / 3, 100 * 2 / 3]) and s["IoU"][3] is None
    assert s["mIoU"] == pytest.approx(50.0)
    assert s["mACC"] == pytest.approx((50 + 50 + 100) / 3)
    assert s["pACC"] == pytest.approx(100 * 5 / 8)


def test_confusion_adds_up_and_does_not_overflow():
    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 200, (2, 50, 50)).astype(np.uint8)
    whole = confusion(truth, pred, 200)
    assert whole.sum() == 2500 and whole[truth[3, 4], pred[3, 4]] > 0
    assert (whole == confusion(truth[:20], pred[:20], 200) + confusion(truth[20:], pred[20:], 200)).all()
    assert scores(confusion(truth, truth, 200)) | {"IoU": 0} == {"mIoU": 100, "mACC": 100, "pACC": 100, "IoU": 0}


def test_nothing_to_score():
    nothing = confusion(np.full((3, 3), IGNORE, np.uint8), np.zeros((3, 3), int), 2)
    assert nothing.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="no pixel"):
        scores(nothing)


# ---------------------------------------------------------------------------- floor and ceiling


def test_floor_is_chance():
    a = floor_map(4, (16, 16), (128, 128), 7)
    assert a.shape == (128, 128) and (a == floor_map(4, (16, 16), (128, 128), 7)).all()
    assert (a != floor_map(4, (16, 16), (128, 128), 8)).mean() > 0.5
    assert np.bincount(a.ravel(), minlength=4) / a.size == pytest.approx([0.25] * 4, abs=0.1)
    assert not floor_map(1, (16, 16), (9, 5), 0).any()


def test_ceiling_of_a_fine_grid_is_the_truth():
    labels = np.random.default_rng(0).choice([3, 5, 9], (16, 16)).astype(np.uint8)
    present = np.array([3, 5, 9])
    assert (present[ceiling_map(labels, present, (16, 16))] == labels).all()


def test_ceiling_of_halves_is_the_truth():
    labels = np.full((128, 96), 4, np.uint8)
    labels[:, 48:] = 2
    assert (np.array([2, 4])[ceiling_map(labels, np.array([2, 4]), (16, 16))] == labels).all()
    labels[64:] = IGNORE                                                     # ignored pixels vote for nobody
    up = np.array([2, 4])[ceiling_map(labels, np.array([2, 4]), (16, 16))]
    assert (up == labels)[:60].all()


def test_ceiling_loses_what_is_smaller_than_a_cell():
    labels = np.zeros((128, 128), np.uint8)
    labels[40:43, 40:43] = 1
    assert not ceiling_map(labels, np.array([0, 1]), (16, 16)).any()


def test_image_seed():
    """The same in every process, or no run could be repeated; Python's own hash() is not."""
    assert image_seed("2007_000033", 0) == 878262805
    names = [str(i) for i in range(500)]
    assert len({image_seed(n, s) for n in names for s in range(3)}) == 1500
    assert image_seed("12", 3) != image_seed("2", 31)


# ---------------------------------------------------------------------------- predictions


def test_scenes_and_scenes_dev():
    val, dev = DATASETS["scenes"](), DATASETS["scenes-dev"]()
    assert len(val.names) == len(set(val.names)) == 200 and dev.names and not set(val.names) & set(dev.names)
    for data in (val, dev):
        item = data.read(data.names[1])
        assert isinstance(item.image, Image.Image) and item.image.size == item.labels.shape[::-1]
        assert item.name == data.names[1] and item.labels.max() < len(data.classes)


def test_predict_is_segment_with_the_present_classes(tiny):
    """Same prompt, noise and argmax as the one-picture way; labels index the data set's classes."""
    data = DATASETS["scenes"]()
    items = [data.read(name) for name in data.names[:3]]
    variants = [evaluate.Variant("a", 1, tiny.preset.sigma), evaluate.Variant("b", 2, 0.3, "t2i", True, 1)]
    for item, got in zip(items, evaluate.predict(tiny, items, data.classes, variants, 5)):
        assert got.keys() == {"a", "b", "floor", "ceiling"}
        present = np.unique(item.labels)
        names = [data.classes[k] for k in present]
        for v in variants:
            seg = seg4diff.segment(tiny, item.image, names, block=v.block, sigma=v.sigma, kind=v.kind, head=v.head,
                                   minmax=v.minmax, seed=image_seed(item.name, 5))
            assert (got[v.name] == present[seg.labels]).mean() > 0.999
        assert all(set(np.unique(x)) <= set(present) for x in got.values())
        assert (got["ceiling"] == item.labels).mean() > 0.9


def test_ignored_pixels_are_not_prompted(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    labels = item.labels.copy()
    labels[labels == labels[0, 0]] = IGNORE
    (got,) = evaluate.predict(tiny, [Item(item.image, labels, "x")], data.classes, TASKS["ovss"](tiny), 0)
    assert set(np.unique(got["tiny"])) <= set(np.unique(labels)) - {IGNORE}


def test_a_picture_without_any_class_is_passed_over(tiny):
    data = DATASETS["scenes"]()
    unlabelled = data.names[1]

    def read(name):
        item = data.read(name)
        return item._replace(labels=np.full_like(item.labels, IGNORE)) if name == unlabelled else item
    for names in (data.names[:3], data.names[1:3]):
        conf, _ = evaluate.evaluate(tiny, replace(data, read=read), names, TASKS["ovss"](tiny), batch_size=1, seed=0)
        assert conf["tiny"].sum() == 128 * 128 * (len(names) - 1)


@pytest.mark.parametrize("task", ["ovss", "layers"])
def test_batch_size_changes_nothing(tiny, task):
    data, variants = DATASETS["scenes"](), TASKS[task](tiny)
    one, five = (evaluate.evaluate(tiny, data, data.names[:6], variants, batch_size=b, seed=0)[0] for b in (1, 5))
    assert one.keys() == five.keys() == {v.name for v in variants} | {"floor", "ceiling"}
    for row in one:                                    # fp32's last bit may move a pixel that sits on a border
        assert one[row].sum() == 6 * 128 * 128 and np.abs(one[row] - five[row]).sum() <= 8
    assert (one["floor"] == five["floor"]).all() and (one["ceiling"] == five["ceiling"]).all()


# ---------------------------------------------------------------------------- the command


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_task(command, tiny_file, tmp_path, task):
    code, out, err = command("evaluate.py", "--task", task, "--model", tiny_file, "--limit", 2, "--device", "cpu")
    assert code == 0, err
    folder = tmp_path / "out" / f"{task}-scenes-tiny"
    picture = "overlays.png" if task == "ovss" else f"{task}.png"
    assert sorted(p.name for p in folder.iterdir()) == sorted([picture, "results.json"])
    assert min(Image.open(folder / picture).size) > 200

    result = results(folder)
    rows, variants = result["rows"], result["variants"]
    assert len(variants) == ROWS[task] and list(rows) == [v["name"] for v in variants] + ["floor", "ceiling"]
    assert 0 <= rows["floor"]["mIoU"] < rows["ceiling"]["mIoU"] <= 100 and rows["ceiling"]["pACC"] > 90
    for name, row in rows.items():
        assert len(row["IoU"]) == len(result["classes"]) == 13
        seen = [x for x in row["IoU"] if x is not None]                # of classes that occur
        assert len(seen) < 13 and row["mIoU"] == pytest.approx(np.mean(seen))
        assert f"{name} " in out and f"{row['mIoU']:.1f}" in out
    assert len({round(rows[v["name"]]["pACC"], 6) for v in variants}) == len(variants)       # no two are the same
    assert result["task"] == task and result["arguments"]["limit"] == "2" and result["seconds"] > 0
    assert result["versions"]["torch"] == torch.__version__ and "2 pictures" in result["caption"]


def test_what_the_tasks_compare(tiny):
    def made(task):
        return {(v.block, round(v.sigma, 4), v.kind, v.minmax, v.head) for v in TASKS[task](tiny)}
    s = 0.5151
    assert made("ovss") == {(1, s, "softmax", False, None)}
    assert made("layers") == {(b, s, kind, False, None) for b in range(3) for kind in ("softmax", "t2i")}
    assert made("heads") == {(b, s, "softmax", False, h) for b in range(3) for h in range(2)}
    assert made("normalization") == {(1, s, kind, m, None) for kind in ("logits", "softmax") for m in (False, True)}
    levels = sorted(sigma for _, sigma, *_ in made("timesteps"))
    assert len(levels) == 14 and s in levels and levels[0] == 0.1109 and levels[-1] == 1


def test_options_have_effects(command, tiny_file, tmp_path):
    def run(name, *options):
        fixed = ("--model", tiny_file, "--device", "cpu", "--out", tmp_path / name)
        code, _, err = command("evaluate.py", *fixed, *options)
        assert code == 0, err
        return results(tmp_path / name)

    base, again = run("a", "--limit", 2), run("deep/er", "--limit", 2, "--batch-size", 1)
    assert again["arguments"]["batch_size"] == "1"
    assert base["rows"]["floor"] != run("b", "--limit", 2, "--seed", 1)["rows"]["floor"]
    other = results(tmp_path / "b")["rows"]
    assert other["tiny"]["pACC"] != base["rows"]["tiny"]["pACC"]
    assert other["ceiling"]["pACC"] == base["rows"]["ceiling"]["pACC"]       # the truth has no seed
    for row in base["rows"]:
        assert again["rows"][row]["pACC"] == pytest.approx(base["rows"][row]["pACC"], abs=0.02)
    assert run("c", "--limit", 3)["rows"]["ceiling"]["pACC"] != base["rows"]["ceiling"]["pACC"]
    assert run("d", "--limit", 2, "--dataset", "scenes-dev")["rows"]["ceiling"] != base["rows"]["ceiling"]
    assert not (tmp_path / "out").exists()


def test_results_are_json(command, tiny_file, tmp_path):
    command("evaluate.py", "--model", tiny_file, "--limit", 1, "--out", tmp_path / "r", "--device", "cpu")

    def refuse(constant):
        raise AssertionError(constant)
    json.loads((tmp_path / "r" / "results.json").read_text(), parse_constant=refuse)

"""Metrics by hand, floor and ceiling, and every task of the command on two scenes."""
import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from loading import image_seed
from protocol import TASKS, Protocol, Variant, ceiling_map, evaluation, floor_map, measure
from support.data import DATASETS, Item
from support.files import Broken
from support.metrics import (
    IGNORE,
    UNNAMED,
    classes_in,
    confusion,
    match_proposals,
    overlaps,
    proposal_scores,
    scores,
)

ROWS = {"ovss": 2, "readings": 4, "unsup": 1, "thresholds": 3 * 8, "layers": 3 * 2, "heads": 3 * 2, "timesteps": 14,
        "normalization": 4}                                                  # 3 blocks, 2 heads

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


def test_matching_by_hand():
    """Class 2 is not there; pixels to ignore are no false positives, a proposal without a class costs nothing."""
    truth = np.array([[0, 0, 0, 0, 0], [1, 1, 1, 3, IGNORE]], np.uint8)
    pred = np.array([[7, 7, 7, 4, 4], [4, 4, 7, 9, 9]])
    counts, named = match_proposals(truth, pred, 4)
    assert counts.tolist() == [[3, 1, 2], [2, 2, 1], [0, 0, 0], [1, 0, 0]]            # TP, FP, FN
    assert named.tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 3, 3]]
    lone, named = match_proposals(truth, np.where(pred == 4, 7, pred), 4)             # one proposal for two classes
    assert lone.tolist() == [[5, 3, 0], [0, 0, 3], [0, 0, 0], [1, 0, 0]]
    assert named.tolist() == [[0] * 5, [0, 0, 0, 3, 3]]
    counts, named = match_proposals(truth[:1], pred[:1], 4)                           # a proposal without a class
    assert counts.tolist() == [[3, 0, 2], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert named.tolist() == [[0, 0, 0, IGNORE, IGNORE]]


def test_matching_against_all_permutations():
    rng = np.random.default_rng(0)
    for classes, proposals in ((2, 5), (4, 4), (5, 3)):
        truth = rng.integers(0, classes, (8, 9)).astype(np.uint8)
        pred = 2 * rng.integers(0, proposals, (8, 9))
        truth[0, :4] = IGNORE
        counts, named = match_proposals(truth, pred, 6)
        valid = truth != IGNORE
        n = max(classes, proposals)
        overlap = [[int(((truth == k) & (pred == 2 * p)).sum()) for p in range(n)] for k in range(n)]
        best = max(sum(overlap[k][p] for k, p in enumerate(order)) for order in permutations(range(n)))
        assert counts[:, 0].sum() == best
        for k in range(6):
            assert counts[k].tolist() == [(named[truth == k] == k).sum(), ((named == k) & valid & (truth != k)).sum(),
                                          (named[truth == k] != k).sum()]
        assert len({(a, b) for a, b in zip(named.ravel(), pred.ravel()) if a != IGNORE}) == min(classes, proposals)


def test_scores_of_matches_by_hand():
    s = proposal_scores(np.array([[6, 2, 0], [0, 0, 2], [0, 0, 0], [3, 1, 1]]))
    assert s["IoU"] == [75, 0, None, 60] and s["mIoU"] == pytest.approx(45)
    assert s["mACC"] == pytest.approx((100 + 0 + 75) / 3) and s["pACC"] == pytest.approx(100 * 9 / 12)
    with pytest.raises(ValueError, match="no pixel"):
        proposal_scores(np.zeros((4, 3), int))


def test_a_pair_without_a_common_pixel_is_no_match():
    """Class 1 is left the region that lies in class 0 alone: no match, so no false positive either."""
    truth = np.array([[0, 0, 0, 0, 1]], np.uint8)
    counts, named = match_proposals(truth, np.array([[7, 7, 7, 9, 7]]), 2)
    assert counts.tolist() == [[3, 1, 1], [0, 0, 1]] and named.tolist() == [[0, 0, 0, 255, 0]]


def test_regions_count_wherever_they_lie():
    """Also the one on a pixel that is not scored; the fourth wins no pixel."""
    truth = torch.tensor([[0, 0, 1, IGNORE]], dtype=torch.uint8)
    overlap = overlaps(truth, torch.tensor([[0, 0, 1, 2]]), 2, 4)
    assert overlap.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    found = UNNAMED.score(UNNAMED.count(overlap.numpy(), np.arange(4)))
    assert found["regions"] == 3 and found["mIoU"] == 100
    truth = torch.tensor([[0, 0, 0, IGNORE]], dtype=torch.uint8)             # a data set of a single class
    one = overlaps(truth, torch.tensor([[0, 0, 1, 2]]), 1, 4)
    found = UNNAMED.score(UNNAMED.count(one.numpy(), np.arange(4)))
    assert found["regions"] == 3 and found["IoU"] == [pytest.approx(100 * 2 / 3)]


# ---------------------------------------------------------------------------- floor and ceiling


def test_floor_is_chance():
    a = floor_map(4, (16, 16), (128, 128), 7).numpy()
    assert a.shape == (128, 128) and (a == floor_map(4, (16, 16), (128, 128), 7).numpy()).all()
    assert (a != floor_map(4, (16, 16), (128, 128), 8).numpy()).mean() > 0.5
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


# ---------------------------------------------------------------------------- predictions


def test_scenes_and_scenes_dev():
    val = DATASETS["scenes"]()
    dev = DATASETS["scenes-dev"]()
    assert len(val.names) == len(set(val.names)) == 200 and dev.names and not set(val.names) & set(dev.names)
    for data in (val, dev):
        item = data.read(data.names[1])
        assert isinstance(item.image, Image.Image) and item.image.size == item.labels.shape[::-1]
        assert item.name == data.names[1] and item.labels.max() < len(data.classes)


@pytest.mark.parametrize("task", ["ovss", "layers"])
def test_predictions_are_those_of_segment(tiny, task):
    """Same prompt, noise and argmax as one picture alone; labels index the data set's classes."""
    data = DATASETS["scenes"]()
    items = [data.read(name) for name in data.names[:3]]
    variants = [Variant("a", 1, tiny.preset.sigma)]
    if task == "layers":                                                     # a task that sweeps over variants
        variants.append(Variant("b", 2, 0.3, "t2i", True, 1))
    ev = evaluation(tiny, data, task, Protocol(seed=5))._replace(variants=variants)
    for item, rows in zip(items, ev.predict(items), strict=True):
        assert rows.keys() == {*(v.name for v in variants), "floor", "ceiling"}
        present = np.unique(item.labels)
        names = [data.classes[k] for k in present]
        for v in variants:
            seg = seg4diff.segment(tiny, item.image, names, block=v.block, sigma=v.sigma, kind=v.kind, head=v.head,
                                   minmax=v.minmax, seed=image_seed(item.name, 5))
            assert (rows[v.name] == present[seg.labels]).mean() > 0.999
        assert all(set(np.unique(labels)) <= set(present) for labels in rows.values())
        assert (rows["ceiling"] == item.labels).mean() > 0.9


@pytest.mark.parametrize("task", ["unsup", "thresholds"])
def test_unnamed_regions_are_those_of_propose(tiny, task):
    data = DATASETS["scenes"]()
    items = [data.read(name) for name in data.names[:2]]
    variant = Variant("u", 1, 0.4, threshold=0.003, scaling="map")
    floor = "u floor" if task == "thresholds" else "floor"
    ev = evaluation(tiny, data, task, Protocol(seed=2))._replace(variants=[variant])
    for item, rows in zip(items, ev.predict(items), strict=True):
        proposals = seg4diff.propose(tiny, item.image, block=1, sigma=0.4, seed=image_seed(item.name, 2),
                                     threshold=0.003, scaling="map")
        assert (rows["u"] == proposals.labels).mean() > 0.999 and len(proposals.maps) > 1
        assert len(np.unique(rows[floor])) == len(proposals.maps)            # as many random ones


@pytest.mark.parametrize("task, function", [("ovss", "segment"), ("unsup", "propose")])
def test_one_road(command, tiny_file, monkeypatch, task, function):
    """The function that is taught is the function that the benchmark runs."""
    def stop(*args, **kwargs):
        raise ValueError(f"stopped in {function}")
    monkeypatch.setattr(seg4diff, function, stop)
    code, out, err = command("evaluate.py", "--task", task, "--model", tiny_file, "--limit", 1, "--device", "cpu")
    assert (code, out) == (2, "") and err.splitlines()[-1] == f"error: stopped in {function}"


def test_ignored_pixels_are_not_prompted(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    labels = item.labels.copy()
    labels[labels == labels[0, 0]] = IGNORE
    (rows,) = evaluation(tiny, data, "ovss").predict([Item(item.image, labels, "x")])
    assert set(np.unique(rows["tiny"])) <= set(np.unique(labels)) - {IGNORE}
    assert classes_in(labels).tolist() == sorted(set(np.unique(labels)) - {IGNORE})


def test_a_picture_without_any_class_is_passed_over(tiny):
    data = DATASETS["scenes"]()
    unlabelled = data.names[1]

    def read(name):
        item = data.read(name)
        return item._replace(labels=np.full_like(item.labels, IGNORE)) if name == unlabelled else item
    ev = evaluation(tiny, replace(data, read=read), "ovss", batch=2)
    for names in (data.names[:3], data.names[1:3], data.names[:2]):          # in the middle, first, last
        counts = dict(ev.count(names))
        assert counts.pop(unlabelled) == {} and set(counts) | {unlabelled} == set(names)
        assert [c["tiny"].sum() for c in counts.values()] == [128 * 128] * (len(names) - 1)


@pytest.mark.parametrize("task", ["ovss", "layers", "unsup"])
def test_batch_size_changes_nothing(tiny, task):
    data = DATASETS["scenes"]()
    names = data.names[:6]
    ev = evaluation(tiny, data, task)
    one, five = (dict(ev._replace(batch=batch).count(names)) for batch in (1, 5))
    assert list(one) == list(five) == names
    rows = slice(len(data.classes))
    columns = [0, 2] if task == "unsup" else slice(None)                     # TP and FN make up the picture
    for a, b in zip(one.values(), five.values()):
        assert a.keys() == b.keys() == {v.name for v in ev.variants} | {"floor", "ceiling"}
        for row in a:                                  # fp32's last bit may move a pixel that sits on a border
            assert a[row][rows, columns].sum() == 128 * 128
            assert np.abs(a[row] - b[row]).sum() <= 4
        assert all((a[row] == b[row]).all() for row in ("floor", "ceiling"))


def test_measure(tiny):
    """The same numbers without a ledger, of the task's variants or of those given."""
    data = DATASETS["scenes"]()
    names = data.names[:3]
    rows = measure(tiny, data, names, "layers")
    total = {}
    for _, counts in evaluation(tiny, data, "layers").count(names):
        for row, c in counts.items():
            total[row] = total.get(row, 0) + c
    assert rows == {row: scores(c) for row, c in total.items()}
    some = [Variant("u", 1, 0.4, threshold=0.003, scaling="map")]
    assert measure(tiny, data, names, "unsup", some, Protocol(seed=1)).keys() == {"u", "floor", "ceiling"}

    def read(name):
        raise Broken("it is gone")
    with pytest.raises(ValueError, match=f"{names[0]} cannot be read: it is gone"):
        measure(tiny, replace(data, read=read), names, "ovss")


def test_several_draws_are_averaged(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    present = np.unique(item.labels)
    names = [data.classes[k] for k in present]
    seed = image_seed(item.name, 0)
    maps = torch.stack([seg4diff.segment(tiny, item.image, names, seed=seed + i).maps for i in range(3)]).mean(0)
    want = present[seg4diff.label_map(maps, item.labels.shape).numpy()]
    (three,) = evaluation(tiny, data, "ovss", Protocol(draws=3)).predict([item])
    (one,) = evaluation(tiny, data, "ovss").predict([item])
    assert (three["tiny"] == want).mean() > 0.999
    assert (three["tiny"] != one["tiny"]).mean() > 0.001


def test_every_class_of_the_data_set_competes(tiny):
    """Prompt all: as segment does with all names; what is not in the picture can be predicted, and is then wrong."""
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    (rows,) = evaluation(tiny, data, "ovss", Protocol(prompt="all")).predict([item])
    assert len(seg4diff.split_classes(tiny.text, data.classes * 3)) > 1
    seg = seg4diff.segment(tiny, item.image, data.classes, seed=image_seed(item.name, 0))
    assert (rows["tiny"] == seg.labels).mean() > 0.999
    assert set(np.unique(rows["floor"])) == set(range(15)) > set(np.unique(item.labels))
    assert (rows["ceiling"] == item.labels).mean() > 0.9


def test_a_class_that_always_competes_is_never_scored(tiny):
    """As background in the released code's COCO-Object: pixels it wins are lost to the true class."""
    data = DATASETS["scenes"]()
    item = next(i for i in map(data.read, data.names) if 7 not in i.labels)
    always = evaluation(tiny, replace(data, always=(7,)), "ovss")
    present = np.union1d(np.unique(item.labels), [7])
    (rows,) = always.predict([item])
    seg = seg4diff.segment(tiny, item.image, [data.classes[k] for k in present], seed=image_seed(item.name, 0))
    assert (rows["tiny"] == present[seg.labels]).mean() > 0.999
    ((_, with_it),) = always.count([item.name])
    ((_, without),) = evaluation(tiny, data, "ovss").count([item.name])
    assert with_it["floor"][:, 7].sum() > 0 == without["floor"][:, 7].sum()
    assert with_it["floor"].sum() == without["floor"].sum() and not with_it["floor"][7].any()
    s = scores(with_it["floor"])
    assert s["IoU"][7] is None and s["pACC"] == pytest.approx(100 * np.trace(with_it["floor"]) / item.labels.size)
    assert (with_it["ceiling"] == without["ceiling"]).all()


def test_crop_takes_the_truth_along(tiny):
    """A wide picture, of which only the middle counts: as if it had been cut before."""
    data = DATASETS["scenes"]()
    name = data.names[0]

    def wide(name):
        item = data.read(name)
        image = Image.new("RGB", (200, 128), "red")
        image.paste(item.image, (36, 0))
        labels = np.full((128, 200), 14, np.uint8)
        labels[:, 36:164] = item.labels
        return Item(image, labels, name)

    def count(data, **options):
        ((counted, counts),) = evaluation(tiny, data, "ovss", Protocol(**options)).count([name])
        assert counted == name
        return counts

    crop = count(replace(data, read=wide), resize="crop")
    squash = count(replace(data, read=wide))
    cut = count(data)
    assert all((crop[row] == cut[row]).all() for row in cut)
    assert squash["tiny"].sum() == 128 * 200 and crop["tiny"].sum() == 128 * 128


# ---------------------------------------------------------------------------- the command


def results(folder, strict: bool = False) -> dict:
    """results.json; strict: without NaN and Infinity, which are no JSON."""
    def refuse(constant):
        raise AssertionError(constant)
    return json.loads((folder / "results.json").read_text(), parse_constant=refuse if strict else None)


@pytest.mark.parametrize("task", TASKS)
def test_task(command, tiny_file, tmp_path, task):
    code, out, err = command("evaluate.py", "--task", task, "--model", tiny_file, "--limit", 2, "--device", "cpu")
    assert code == 0, err
    folder = tmp_path / "out" / f"{task}-scenes-tiny"
    picture = "overlays.png" if task in ("ovss", "unsup") else f"{task}.png"
    result = results(folder, strict=True)
    assert {p.name for p in folder.iterdir()} == {picture, "results.json", f"ledger-{result['hash']}-0.jsonl"}
    assert min(Image.open(folder / picture).size) > 200
    rows = result["rows"]
    variants = result["variants"]
    floors = [f"{v['name']} floor" for v in variants] if task == "thresholds" else ["floor"]
    ceilings = ["ceiling", "ceiling pixels"] if task == "readings" else ["ceiling"]
    names = [v["name"] for v in variants]
    assert len(names) == ROWS[task] and sorted(rows) == sorted([*names, *floors, *ceilings])
    printed = [row for line in out.splitlines() for row in rows if line.startswith(f"{row:{max(map(len, rows))}s} ")]
    assert [row for row in printed if row in names] == names and [row for row in printed if row in floors] == floors
    assert printed[-len(ceilings):] == ceilings and (task == "thresholds" or printed[-len(ceilings) - 1] == "floor")
    assert all(0 <= rows[floor]["mIoU"] < rows["ceiling"]["mIoU"] <= 100 for floor in floors)
    assert rows["ceiling"]["pACC"] > 90
    for name, row in rows.items():
        assert len(row["IoU"]) == len(result["classes"]) == 15
        occurring = [x for x in row["IoU"] if x is not None]
        assert len(occurring) < 15 and row["mIoU"] == pytest.approx(np.mean(occurring))
        assert f"{name} " in out and f"{row['mIoU']:.1f}" in out
    different = len({round(rows[v["name"]]["pACC"], 6) for v in variants})
    alike = {"thresholds": 18, "readings": 1}.get(task, 0)                   # refinement can change nothing
    assert different >= len(variants) - alike
    assert result["task"] == task and result["arguments"]["limit"] == "2" and result["seconds"] > 0
    assert result["versions"]["torch"] == torch.__version__ and result["broken"] == {}
    facts = result["facts"]
    assert all(f"{fact}:" in out and value in out for fact, value in facts.items())
    assert facts["task"] == task and facts["data"] == "scenes, 2 pictures, 15 classes"
    assert facts["model"] == f"tiny ({result['identity']['model'][1]}), float32"
    assert facts["block"] == ("0 1 2" if task in ("layers", "heads") else "1")
    levels = sorted({v["sigma"] for v in variants})
    assert facts["sigma"] == " ".join(f"{sigma:.3f}" for sigma in levels) and "0.515" in facts["sigma"]
    assert facts["prompt"] == ("empty" if task in ("unsup", "thresholds") else "present")
    assert (facts["resize"], facts["seed"], facts["draws"]) == ("squash", "0", "1")
    assert ("merging" in facts) == (task == "unsup")
    if task == "unsup":
        assert "token" in facts["merging"] and "KL 0.1" in facts["merging"]


def test_what_the_tasks_compare(tiny):
    def made(task):
        return {(v.block, round(v.sigma, 4), v.kind, v.minmax, v.head) for v in TASKS[task].variants(tiny)}

    def merging(task):
        return {(v.threshold, v.scaling) for v in TASKS[task].variants(tiny)}
    s = 0.5151
    assert made("ovss") == made("unsup") == made("thresholds") == {(1, s, "softmax", False, None)}
    assert merging("unsup") == {(0.1, "token")}                              # the released code's
    assert len(merging("thresholds")) == 24
    assert merging("ovss") == merging("layers") == {(None, None)}
    assert made("layers") == {(b, s, kind, False, None) for b in range(3) for kind in ("softmax", "t2i")}
    assert made("heads") == {(b, s, "softmax", False, h) for b in range(3) for h in range(2)}
    assert made("normalization") == {(1, s, kind, m, None) for kind in ("logits", "softmax") for m in (False, True)}
    levels = sorted(sigma for _, sigma, *_ in made("timesteps"))
    assert len(levels) == 14 and s in levels and levels[0] == 0.1109 and levels[-1] == 1


def test_options_have_effects(command, tiny_file, tmp_path):
    def run(name, *options):
        fixed = ("--limit", 2, "--model", tiny_file, "--device", "cpu", "--out", tmp_path / name)
        code, _, err = command("evaluate.py", *fixed, *options)
        assert code == 0, err
        return results(tmp_path / name)

    base = run("base")
    again = run("deep/er", "--batch-size", 1)
    assert again["arguments"]["batch_size"] == "1" and again["hash"] == base["hash"]
    for row in base["rows"]:
        assert again["rows"][row]["pACC"] == pytest.approx(base["rows"][row]["pACC"], abs=0.02)

    rows = base["rows"]
    seed = run("seed", "--seed", 1)["rows"]
    assert seed["floor"] != rows["floor"] and seed["tiny"]["pACC"] != rows["tiny"]["pACC"]
    assert seed["ceiling"]["pACC"] == rows["ceiling"]["pACC"]                # the truth has no seed

    draws = run("draws", "--draws", 2)
    every = run("all", "--prompt", "all")
    crop = run("crop", "--resize", "crop")
    assert draws["rows"]["floor"] == crop["rows"]["floor"] == rows["floor"]
    assert draws["rows"]["tiny"]["pACC"] != rows["tiny"]["pACC"]
    assert crop["rows"]["tiny"] == rows["tiny"]                              # scenes are square already
    assert every["rows"]["floor"]["pACC"] < rows["floor"]["pACC"] and every["facts"]["prompt"] == "all"
    assert len({result["hash"] for result in (base, draws, every, crop)}) == 4

    merging = ("--task", "unsup", "--scaling", "map", "--threshold")
    low = run("low", *merging, 1e-9)
    high = run("high", *merging, 50)["rows"]
    assert high["floor"]["mIoU"] == high["tiny"]["mIoU"]                     # one proposal: the whole picture
    assert high["tiny"]["IoU"] != low["rows"]["tiny"]["IoU"] and "scaled over: map" in low["facts"]["merging"]

    assert run("limit", "--limit", 3)["rows"]["ceiling"]["pACC"] != rows["ceiling"]["pACC"]
    assert run("dev", "--dataset", "scenes-dev")["rows"]["ceiling"] != rows["ceiling"]
    assert not (tmp_path / "out").exists()

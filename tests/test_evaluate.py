"""Metrics by hand, floor and ceiling, and every task of the command on two scenes."""
import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import seg4diff
from evaluate import (
    TASKS,
    Protocol,
    ceiling_map,
    confusion,
    floor_map,
    image_seed,
    match_proposals,
    proposal_scores,
    scores,
)
from support.data import DATASETS, IGNORE, Item

ROWS = {"ovss": 1, "unsup": 1, "thresholds": 3 * 8, "layers": 3 * 2, "heads": 3 * 2, "timesteps": 14,
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
        truth, pred = rng.integers(0, classes, (8, 9)).astype(np.uint8), 2 * rng.integers(0, proposals, (8, 9))
        truth[0, :4] = IGNORE
        counts, named = match_proposals(truth, pred, 6)
        valid, n = truth != IGNORE, max(classes, proposals)
        overlap = [[int(((truth == k) & (pred == 2 * p)).sum()) for p in range(n)] for k in range(n)]
        assert counts[:, 0].sum() == max(sum(overlap[k][p] for k, p in enumerate(way)) for way in permutations(range(n)))
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
    truth, pred = np.array([[0, 0, 0, 0, 1]], np.uint8), np.array([[7, 7, 7, 9, 7]])
    counts, named = evaluate.match_proposals(truth, pred, 2)
    assert counts.tolist() == [[3, 1, 1], [0, 0, 1]] and named.tolist() == [[0, 0, 0, 255, 0]]


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
    for item, got in zip(items, evaluate.predict(tiny, items, data, variants, Protocol(5))):
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
    (got,) = evaluate.predict(tiny, [Item(item.image, labels, "x")], data, TASKS["ovss"](tiny), Protocol())
    assert set(np.unique(got["tiny"])) <= set(np.unique(labels)) - {IGNORE}


def test_a_picture_without_any_class_is_passed_over(tiny):
    data = DATASETS["scenes"]()
    unlabelled = data.names[1]

    def read(name):
        item = data.read(name)
        return item._replace(labels=np.full_like(item.labels, IGNORE)) if name == unlabelled else item
    for names in (data.names[:3], data.names[1:3]):
        counts = dict(evaluate.tally(tiny, replace(data, read=read), names, TASKS["ovss"](tiny), Protocol(), batch_size=2))
        assert counts.pop(unlabelled) == {} and set(counts) | {unlabelled} == set(names)
        assert [c["tiny"].sum() for c in counts.values()] == [128 * 128] * (len(names) - 1)


@pytest.mark.parametrize("task", ["ovss", "layers", "unsup"])
def test_batch_size_changes_nothing(tiny, task):
    data, variants = DATASETS["scenes"](), TASKS[task](tiny)
    one, five = (dict(evaluate.tally(tiny, data, data.names[:6], variants, Protocol(), batch_size=b)) for b in (1, 5))
    assert list(one) == list(five) == data.names[:6]
    for a, b in zip(one.values(), five.values()):
        assert a.keys() == b.keys() == {v.name for v in variants} | {"floor", "ceiling"}
        for row in a:                                  # fp32's last bit may move a pixel that sits on a border
            assert a[row][:, [0, 2] if task == "unsup" else slice(None)].sum() == 128 * 128
            assert np.abs(a[row] - b[row]).sum() <= 4
        assert all((a[row] == b[row]).all() for row in ("floor", "ceiling"))


def test_several_draws_are_averaged(tiny):
    data = DATASETS["scenes"]()
    item, v = data.read(data.names[0]), TASKS["ovss"](tiny)[0]
    present = np.unique(item.labels)
    names, seed = [data.classes[k] for k in present], image_seed(item.name, 0)
    maps = torch.stack([seg4diff.segment(tiny, item.image, names, seed=seed + i).maps for i in range(3)]).mean(0)
    (got,) = evaluate.predict(tiny, [item], data, [v], Protocol(draws=3))
    want = present[seg4diff.label_map(maps, item.labels.shape).numpy()]
    assert (got["tiny"] == want).mean() > 0.999
    assert (got["tiny"] != evaluate.predict(tiny, [item], data, [v], Protocol())[0]["tiny"]).mean() > 0.001


def test_every_class_of_the_data_set_competes(tiny):
    """Prompt all: as segment does with all names; what is not in the picture can be predicted, and is then wrong."""
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    (got,) = evaluate.predict(tiny, [item], data, TASKS["ovss"](tiny), Protocol(prompt="all"))
    assert len(seg4diff.split_classes(tiny.text, data.classes * 3)) > 1
    seg = seg4diff.segment(tiny, item.image, data.classes, seed=image_seed(item.name, 0))
    assert (got["tiny"] == seg.labels).mean() > 0.999
    assert set(np.unique(got["floor"])) == set(range(15)) > set(np.unique(item.labels))
    assert (got["ceiling"] == item.labels).mean() > 0.9


def test_a_class_that_always_competes_is_never_scored(tiny):
    """As background in the released code's COCO-Object: pixels it wins are lost to the true class."""
    data = DATASETS["scenes"]()
    item = next(i for i in map(data.read, data.names) if 7 not in i.labels)
    always, ovss = replace(data, always=(7,)), TASKS["ovss"](tiny)
    present = np.union1d(np.unique(item.labels), [7])
    (got,) = evaluate.predict(tiny, [item], always, ovss, Protocol())
    seg = seg4diff.segment(tiny, item.image, [data.classes[k] for k in present], seed=image_seed(item.name, 0))
    assert (got["tiny"] == present[seg.labels]).mean() > 0.999
    (_, with_it), = evaluate.tally(tiny, always, [item.name], ovss, Protocol(), 1)
    (_, without), = evaluate.tally(tiny, data, [item.name], ovss, Protocol(), 1)
    assert with_it["floor"][:, 7].sum() > 0 == without["floor"][:, 7].sum() and not with_it["floor"][7].any()
    counts = with_it["floor"]
    s = scores(counts)
    assert s["IoU"][7] is None and s["pACC"] == pytest.approx(100 * np.trace(counts) / item.labels.size)
    assert (with_it["ceiling"] == without["ceiling"]).all()


def test_crop_takes_the_truth_along(tiny):
    """A wide picture, of which only the middle counts: as if it had been cut before."""
    data, ovss = DATASETS["scenes"](), TASKS["ovss"](tiny)

    def wide(name):
        item = data.read(name)
        image, labels = Image.new("RGB", (200, 128), "red"), np.full((128, 200), 14, np.uint8)
        image.paste(item.image, (36, 0))
        labels[:, 36:164] = item.labels
        return Item(image, labels, name)
    (name, crop), = evaluate.tally(tiny, replace(data, read=wide), data.names[:1], ovss, Protocol(resize="crop"), 1)
    (_, cut), = evaluate.tally(tiny, data, data.names[:1], ovss, Protocol(), 1)
    (_, squash), = evaluate.tally(tiny, replace(data, read=wide), data.names[:1], ovss, Protocol(), 1)
    assert name == data.names[0] and all((crop[row] == cut[row]).all() for row in cut)
    assert squash["tiny"].sum() == 128 * 200 and crop["tiny"].sum() == 128 * 128


def test_unnamed_regions_are_those_of_propose(tiny):
    data, v = DATASETS["scenes"](), evaluate.Variant("u", 1, 0.4, threshold=0.003, scaling="map")
    items = [data.read(name) for name in data.names[:2]]
    for item, got in zip(items, evaluate.predict(tiny, items, data, [v], Protocol(2))):
        found = seg4diff.propose(tiny, item.image, block=1, sigma=0.4, seed=image_seed(item.name, 2), threshold=0.003,
                                 scaling="map")
        assert (got["u"] == found.labels).mean() > 0.999 and len(found.maps) > 1
        assert len(np.unique(got["floor"])) == len(found.maps)               # as many random ones


# ---------------------------------------------------------------------------- the command


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_task(command, tiny_file, tmp_path, task):
    code, out, err = command("evaluate.py", "--task", task, "--model", tiny_file, "--limit", 2, "--device", "cpu")
    assert code == 0, err
    folder = tmp_path / "out" / f"{task}-scenes-tiny"
    picture = "overlays.png" if ROWS[task] == 1 else f"{task}.png"
    result = results(folder)
    assert {p.name for p in folder.iterdir()} == {picture, "results.json", f"ledger-{result['hash']}-0.jsonl"}
    assert min(Image.open(folder / picture).size) > 200
    rows, variants = result["rows"], result["variants"]
    floors = [f"{v['name']} floor" for v in variants] if task == "thresholds" else ["floor"]
    assert len(variants) == ROWS[task] and list(rows) == [*(v["name"] for v in variants), *floors, "ceiling"]
    assert all(0 <= rows[floor]["mIoU"] < rows["ceiling"]["mIoU"] <= 100 for floor in floors)
    assert rows["ceiling"]["pACC"] > 90
    for name, row in rows.items():
        assert len(row["IoU"]) == len(result["classes"]) == 15
        seen = [x for x in row["IoU"] if x is not None]                # of classes that occur
        assert len(seen) < 15 and row["mIoU"] == pytest.approx(np.mean(seen))
        assert f"{name} " in out and f"{row['mIoU']:.1f}" in out
    different = len({round(rows[v["name"]]["pACC"], 6) for v in variants})
    assert different > 5 if task == "thresholds" else different == len(variants)             # no two are the same
    assert result["task"] == task and result["arguments"]["limit"] == "2" and result["seconds"] > 0
    assert result["versions"]["torch"] == torch.__version__ and result["broken"] == {}
    told = ["2 pictures", "15 classes", "tiny", result["protocol"]["model"][1], "float32", "sigma 0.", "squash", "draws 1",
            "seed 0", "empty prompt" if task in ("unsup", "thresholds") else "prompt: present classes"]
    assert result["caption"] in out and all(word in result["caption"] for word in told)
    assert ("token" in result["caption"] and "KL 0.1" in result["caption"]) == (task == "unsup")


def test_what_the_tasks_compare(tiny):
    def made(task):
        return {(v.block, round(v.sigma, 4), v.kind, v.minmax, v.head) for v in TASKS[task](tiny)}
    s = 0.5151
    assert made("ovss") == {(1, s, "softmax", False, None)}
    assert [(v.threshold, v.scaling) for v in TASKS["unsup"](tiny)] == [(0.1, "token")]      # the released code's
    assert len({(v.threshold, v.scaling) for v in TASKS["thresholds"](tiny)}) == 24
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
    more = {name: run(name, "--limit", 2, *options) for name, options in (
        ("draws", ("--draws", 2)), ("all", ("--prompt", "all")), ("crop", ("--resize", "crop")))}
    assert more["draws"]["rows"]["floor"] == more["crop"]["rows"]["floor"] == base["rows"]["floor"]
    assert more["draws"]["rows"]["tiny"]["pACC"] != base["rows"]["tiny"]["pACC"]
    assert more["crop"]["rows"]["tiny"] == base["rows"]["tiny"]               # scenes are square already
    assert more["all"]["rows"]["floor"]["pACC"] < base["rows"]["floor"]["pACC"] and "all classes" in more["all"]["caption"]
    assert len({r["hash"] for r in (base, *more.values())}) == 4 and again["hash"] == base["hash"]
    low, high = (run(f"u{t}", "--limit", 2, "--task", "unsup", "--scaling", "map", "--threshold", t) for t in (1e-9, 50))
    assert high["rows"]["floor"]["mIoU"] == high["rows"]["tiny"]["mIoU"]      # one proposal: the whole picture
    assert high["rows"]["tiny"]["IoU"] != low["rows"]["tiny"]["IoU"] and "scaled over: map" in low["caption"]
    assert run("c", "--limit", 3)["rows"]["ceiling"]["pACC"] != base["rows"]["ceiling"]["pACC"]
    assert run("d", "--limit", 2, "--dataset", "scenes-dev")["rows"]["ceiling"] != base["rows"]["ceiling"]
    assert not (tmp_path / "out").exists()


def test_results_are_json(command, tiny_file, tmp_path):
    command("evaluate.py", "--model", tiny_file, "--limit", 1, "--out", tmp_path / "r", "--device", "cpu")

    def refuse(constant):
        raise AssertionError(constant)
    json.loads((tmp_path / "r" / "results.json").read_text(), parse_constant=refuse)

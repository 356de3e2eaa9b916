"""The released code's choices: each against truths made by hand or the facts, alone and all together, as a command."""
import copy
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from pretend import pretend
from test_data import put

import analysis
import loading
import released
import seg4diff
from nano.pretrain import write_presets
from protocol import Protocol, evaluation
from released import OURS, Choices
from support.data import DATASETS, Dataset, Item
from support.files import Broken
from support.metrics import IGNORE, NAMED, UNNAMED, overlaps
from tools.waterfall import waterfall, worth

# ---------------------------------------------------------------------------- pictures


def test_sizes():
    """The facts' numbers at SD3's square: VOC's 500 x 375, Cityscapes' 2048 x 1024, one that is long and thin."""
    assert released.short_side(500, 375, 1024) == (853, 640)
    assert released.short_side(2048, 1024, 1024) == (1280, 640)
    assert released.short_side(5000, 500, 1024) == (2560, 256)
    assert released.short_side(128, 128, 128) == (80, 80)
    assert released.padded(Image.new("RGB", (853, 640)), 1024).size == (864, 640)


def test_padding_is_black_and_lies_right_and_below():
    out = np.array(released.padded(Image.new("RGB", (5, 8), "white"), 128))   # to multiples of 4
    assert out.shape == (8, 8, 3) and (out[:, :5] == 255).all() and not out[:, 5:].any()


def test_squashed_without_antialiasing():
    """Eight columns to two: the mean of the two columns at each centre; the others are not looked at."""
    columns = np.array([9, 10, 30, 200, 77, 50, 60, 255], np.uint8)
    image = Image.fromarray(np.repeat(np.tile(columns, (8, 1))[..., None], 3, axis=2))
    plain = released.squash_plainly(image, 2)
    assert plain.shape == (2, 2, 3) and (plain[..., 0] == [[20, 55], [20, 55]]).all()
    assert (loading.squash(image, 2).pixels[..., 0] != plain[..., 0]).all()


def wide(name="a"):
    """300 x 200 of a model for 128: larger than its short side, 80. Class 4 is one column that nearest neighbours
    pass over at 80, class 3 the lower third."""
    rng = np.random.default_rng(len(name))
    labels = np.full((200, 300), 1, np.uint8)
    labels[:, 150:] = 2
    labels[140:] = 3
    labels[:, 10] = 4
    image = Image.fromarray(rng.integers(0, 255, (200, 300, 3), dtype=np.uint8))
    return Item(image, labels, name)


def test_a_picture_our_way():
    item = wide()
    made = released.picture(item, 128, OURS)
    assert made.scored is item and made.square.image is item.image and made.prompted.tolist() == [1, 2, 3, 4]
    assert (made.square.pixels == loading.squash(item.image, 128).pixels).all()


def test_each_choice_of_a_picture():
    item = wide()
    small = item.image.resize((120, 80), Image.Resampling.BILINEAR)

    def made(**on):
        return released.picture(item, 128, Choices(**on))

    ours = made(half=True)
    resize = made(resize=True)
    assert (resize.square.pixels == released.squash_plainly(small, 128)).all() and resize.scored is item
    padding = made(padding=True)                         # 300 and 200 are multiples of 4
    assert (padding.square.pixels == ours.square.pixels).all()
    assert (made(padding=True, resize=True).square.pixels == resize.square.pixels).all()     # so are 120 and 80
    odd = item._replace(image=item.image.crop((0, 0, 299, 199)), labels=item.labels[:199, :299])
    black = released.picture(odd, 128, Choices(padding=True)).square.pixels
    assert black[:, -1].mean() < released.picture(odd, 128, OURS).square.pixels[:, -1].mean()
    size = made(size=True)
    assert size.scored.labels.shape == (80, 120) and size.scored.image.size == size.square.image.size == (120, 80)
    assert np.unique(size.scored.labels).tolist() == [1, 2, 3]
    present = made(present=True)
    assert present.prompted.tolist() == [1, 2, 3] and ours.prompted.tolist() == [1, 2, 3, 4]
    assert present.scored is item                        # class 4 is scored, and cannot be predicted
    both = made(size=True, corner=True)
    assert both.scored.labels.shape == (80, 120) and both.square.image is item.image
    thin = np.where(item.labels == 4, 4, IGNORE).astype(np.uint8)
    assert released.picture(item._replace(labels=thin), 128, Choices(present=True)).prompted.tolist() == [4]


def test_the_corner_counts_for_the_whole():
    labels = torch.arange(200 * 300).view(200, 300)
    both = released.as_scored(labels, (80, 120), 128, Choices(size=True, corner=True))
    assert (both == labels[:80, :120]).all()
    alone = released.as_scored(labels, (200, 300), 128, Choices(corner=True))
    assert alone.shape == (200, 300) and alone[0, 0] == labels[0, 0] and alone[-1, -1] == labels[79, 119]
    assert alone[100, 150] == labels[40, 60]
    small = labels[:60, :60]                             # smaller than the short side: nothing is cut
    assert released.as_scored(small, (60, 60), 128, Choices(corner=True)) is not labels
    assert (released.as_scored(small, (60, 60), 128, Choices(corner=True)) == small).all()
    assert released.as_scored(labels, (200, 300), 128, OURS) is labels


# ---------------------------------------------------------------------------- matching


def test_regions_left_over_are_false_positives_of_absent_classes():
    truth = torch.tensor([[0, 0, 0, 0, 1, 1, IGNORE]], dtype=torch.uint8)
    regions = torch.tensor([[0, 0, 1, 1, 2, 2, 2]])
    overlap = overlaps(truth, regions, 4, 3).numpy()
    ours = UNNAMED.count(overlap, np.arange(3))
    theirs = released.count_all(overlap, np.arange(3))
    assert ours.tolist() == [[2, 0, 2], [2, 0, 0], [0, 0, 0], [0, 0, 0], [3, 1, 0]]
    assert theirs[:2].tolist() == ours[:2].tolist() and theirs[4].tolist() == [3, 1, 0]
    assert sorted(theirs[2:4, 1]) == [0, 2] and not theirs[2:4, [0, 2]].any()


def test_only_regions_beyond_the_classes_are_free():
    rng = np.random.default_rng(0)
    for K, P in ((7, 3), (5, 5), (3, 9)):
        overlap = rng.integers(0, 50, (K + 1, P))
        overlap[rng.integers(K)] = 0                     # a class that is absent
        counts = released.count_all(overlap, np.arange(P))[:K]
        ours = UNNAMED.count(overlap, np.arange(P))[:K]
        assert counts[:, 0].sum() == ours[:, 0].sum() and (counts[:, [0, 2]].sum(1) == overlap[:K].sum(1)).all()
        if P <= K:                                       # every region has a class: all its pixels count
            assert counts[:, :2].sum() == overlap[:K].sum() >= ours[:, :2].sum()
        else:
            assert counts[:, :2].sum() < overlap[:K].sum()


# ---------------------------------------------------------------------------- models and data sets


def test_merging_is_the_released_codes(tiny):
    other = replace(tiny, preset=tiny.preset.changed(threshold=0.02, scaling="map"))
    made = released.model_of(other, Choices(merging=True)).preset
    assert (made.threshold, made.scaling) == (0.1, "token") and released.model_of(other, OURS).preset == other.preset


def test_flux_as_the_released_code_has_it(tiny_flux):
    """As `--model flux-released` is; the model that it is made from stays as it was."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8))
    names = ["car", "sky"]
    before = seg4diff.segment(tiny_flux, image, names).maps
    preset = loading.released_preset(tiny_flux.preset)
    assert released.model_of(tiny_flux, Choices(level=True)).preset.sigma == preset.sigma != tiny_flux.preset.sigma
    assert released.model_of(tiny_flux, Choices(unit=True)).vae.unit_pictures
    rows = released.model_of(tiny_flux, Choices(rows=True)).text
    wanted = tiny_flux.text.clip_l.positions
    assert rows.encode([names]).ctx.shape[1] == rows.length == wanted and rows.room == wanted - 1
    for name in ("level", "unit"):
        other = released.model_of(tiny_flux, Choices(**{name: True}))
        assert not torch.equal(seg4diff.segment(other, image, names).maps, before)
    assert torch.equal(seg4diff.segment(tiny_flux, image, names).maps, before)
    assert {"level", "unit", "rows"} < set(released.applicable("ovss", "voc", tiny_flux))
    fixed = replace(tiny_flux, preset=tiny_flux.preset.changed(level=0.3))
    assert "level" not in released.applicable("ovss", "voc", fixed)


@pytest.fixture
def root(tmp_path):
    """coco with two pictures: cars and sheep below the sky."""
    root = tmp_path / "data"
    for i, name in enumerate("ab"):
        labels = np.full((60, 90), 2, np.uint8)
        labels[20:, 40:] = 19
        labels[:20] = 91
        put(root / f"coco/val2017/{name}.jpg", np.random.default_rng(i).integers(0, 255, (60, 90, 3)))
        put(root / f"coco/stuffthingmaps/val2017/{name}.png", labels)
    return root


def test_the_background_of_coco_object(root):
    """The same as coco-object-bg."""
    made = released.data_of(DATASETS["coco-object"](root), Choices(background=True))
    wanted = DATASETS["coco-object-bg"](root)
    assert (made.classes, made.always) == (wanted.classes, wanted.always)
    assert all((made.read(name).labels == wanted.read(name).labels).all() for name in "ab")


def test_context_without_its_last_class():
    labels = np.array([[0, 1, 2, IGNORE]], np.uint8)
    data = Dataset("context60", ["a"], lambda name: Item(Image.new("RGB", (4, 1)), labels, name), ["bg", "b", "wood"])
    made = released.data_of(data, Choices(context=True))
    assert made.classes == ["bg", "b"] and made.read("a").labels.tolist() == [[0, 1, IGNORE, IGNORE]]


# ---------------------------------------------------------------------------- an evaluation


@pytest.mark.parametrize("task", released.TABLES)
def test_each_choice_changes_counts(tiny, task):
    """But for half, which is the model's precision, all those that apply; class by class where it is known which."""
    model = replace(tiny, preset=tiny.preset.changed(threshold=0.003, scaling="map", batch=2))

    def odd(name):                                       # 299 and 199 pixels are padded
        item = wide(name)
        return item._replace(image=item.image.crop((0, 0, 299, 199)), labels=item.labels[:199, :299])

    data = Dataset("wide", ["a", "bb"], odd, DATASETS["scenes"]().classes)

    def counted(**on):
        return [counts["tiny"] for _, counts in evaluation(model, data, task, Protocol(choices=Choices(**on))).count(
            data.names)]

    ours = counted()
    names = released.applicable(task, data.name, model)
    names.remove("half")
    for name in names:
        made = counted(**{name: True})
        assert any((a != b).any() for a, b in zip(ours, made)), name
        if name == "present":                            # class 4 is not named any more
            assert all(c[4].sum() == 199 and not c[:, 4].any() for c in made) and ours[0][:, 4].any()
        if name == "size":
            assert all(c[:15, [0, 2]].sum() == 80 * 120 for c in made)
    assert any((a != b).any() for a, b in zip(ours, counted(**dict.fromkeys(names, True))))


@pytest.fixture
def half_size(tiny_file, tmp_path):
    """The tiny model for squares of 64 pixels, as float16 is slow on a CPU."""
    path = tmp_path / "model/tiny.safetensors"
    path.parent.mkdir()
    shutil.copy(tiny_file, path)
    write_presets(path, size=64)
    return path


def run(command, folder, *options):
    code, out, err = command("evaluate.py", "--limit", 2, "--device", "cpu", "--out", folder, *options)
    assert code == 0, err
    return out, json.loads((folder / "results.json").read_text())


def test_the_command_says_which_choices_are_on(command, half_size, tmp_path):
    model = ("--model", half_size, "--task", "unsup")
    _, ours = run(command, tmp_path / "ours", *model)
    out, all_on = run(command, tmp_path / "released", *model, "--protocol", "released")
    names = "resize padding size corner matching merging"
    assert f"choices: the released code's {names}\n" in out and "choices" not in ours["facts"]
    assert all_on["facts"]["resize"] == "short side 40, then squash" and all_on["facts"]["model"].endswith("float32")
    assert all_on["identity"]["protocol"]["choices"] == names.split() and "tiny (released)" in all_on["rows"]
    assert ours["hash"] != all_on["hash"] and ours["identity"]["protocol"]["choices"] == []
    for options in (("--protocol", "released", "--dtype", "float16"), ("--protocol", "half")):   # where it is asked for
        _, half = run(command, tmp_path / "half", *model, *options)
        assert half["facts"]["choices"].endswith(" half") and half["facts"]["model"].endswith("float16")


@pytest.mark.parametrize("device, dtype", [("cuda", "float16"), ("mps", "float32")])
def test_half_where_it_is_fast_and_exact(command, half_size, tmp_path, device, dtype):
    with pretend(device):
        _, result = run(command, tmp_path, "--model", half_size, "--device", device, "--protocol", "released")
    assert result["facts"]["model"].endswith(dtype)
    assert ("half" in result["facts"]["choices"]) == (dtype == "float16")


@pytest.mark.parametrize("args, sentence", [
    (["--protocol", "paper"], "'paper' (choose from"),
    (["--protocol", "released", "--task", "layers"], "Tables 1 and 2"),
    (["--protocol", "released", "--resize", "crop"], "no --prompt"),
    (["--protocol", "size"], "changes nothing for --task ovss on scenes with this model; what does is resize, present"),
    (["--protocol", "level", "--task", "unsup"], "changes nothing"),
    (["--protocol", "background"], "changes nothing"),
    (["--protocol", "half", "--dtype", "float32"], "half is float16"),
    (["--task", "protocol", "--prompt", "all"], "none of them"),
    (["--task", "protocol", "--dataset", "all"], "on one data set")])
def test_what_does_not_go_together(command, tiny_file, args, sentence):
    code, out, err = command("evaluate.py", *args, "--model", tiny_file, "--limit", 1)
    assert (code, out) == (2, "") and err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_worth_by_hand():
    """Two settings, three pictures of two classes; the fourth picture is missing in one of them."""
    wrong = np.array([[3, 1, 1], [3, 1, 1]])
    right = np.array([[4, 0, 0], [4, 0, 0]])
    rows, n = worth({"ours": dict.fromkeys("abcd", wrong), "released": dict.fromkeys("abc", right)})
    assert n == 3 and rows["ours"] == {"mIoU": pytest.approx(60), "above ours": [0, 0, 0]}
    assert rows["released"] == {"mIoU": 100, "above ours": pytest.approx([40, 40, 40])}
    with pytest.raises(Broken, match="in every setting"):
        worth({"ours": {"a": wrong}, "released": {"b": right}})


def test_the_waterfall_of_a_real_data_set(command, half_size, tmp_path, root, monkeypatch):
    """A miniature of COCO-Object: what each setting scores is what its own command prints; a second run counts none."""
    monkeypatch.setattr(analysis, "bootstrap", partial(analysis.bootstrap, draws=50))
    data = ("--dataset", "coco-object", "--data-root", root, "--model", half_size)
    out, result = run(command, tmp_path / "w", "--task", "protocol", *data)
    rows = result["rows"]
    assert list(rows["Table 1"]) == ["ours", "resize", "present", "background", "released"]
    assert list(rows["Table 2"]) == ["ours", "resize", "padding", "size", "corner", "matching", "merging", "released"]
    assert result["n"] == {"Table 1": 2, "Table 2": 2} and min(Image.open(tmp_path / "w/protocol.png").size) > 200
    assert all(f"\n{name} " in out for name in rows["Table 1"] | rows["Table 2"])
    for task, name in (("ovss", "background"), ("unsup", "released")):
        _, alone = run(command, tmp_path / task, "--task", task, *data, "--protocol", name)
        row = rows[released.TABLES[task]][name]
        assert row["mIoU"] == pytest.approx(alone["rows"][f"tiny ({name})"]["mIoU"])
        assert row["above ours"][1] <= row["above ours"][2]
    before = {path: path.read_bytes() for path in (tmp_path / "w").rglob("*.jsonl")}
    assert len(before) == 13
    again, _ = run(command, tmp_path / "w", "--task", "protocol", *data)
    assert again.splitlines()[:-1] == out.splitlines()[:-1]
    assert before == {path: path.read_bytes() for path in (tmp_path / "w").rglob("*.jsonl")}


def test_a_whole_table_the_released_way(command, half_size, tmp_path, root):
    """Each data set with the choices that apply to it."""
    options = ("--dataset", "all", "--data-root", root, "--model", half_size, "--device", "cpu")
    code, out, err = command("evaluate.py", *options, "--protocol", "released")
    assert code == 0 and "\ntiny (released), ours" in out, err
    result = json.loads((tmp_path / "out/ovss-all-tiny-released/coco-object/results.json").read_text())
    assert result["facts"]["choices"] == "the released code's resize present background"
    assert result["classes"][0] == "background" and result["rows"]["tiny (released)"]["IoU"][0] is None


def test_the_waterfall_of_a_gpu_has_half_precision(half_size, tmp_path, monkeypatch, capsys):
    """Those settings that have it run on a model of their own."""
    monkeypatch.setattr(analysis, "bootstrap", partial(analysis.bootstrap, draws=50))
    monkeypatch.chdir(tmp_path)
    args = Namespace(dtype="float32", seed=0, draws=1, limit=1, batch_size=1, out=None)
    loaded = []

    def load(dtype):
        loaded.append(dtype)
        return seg4diff.load(half_size, device="cpu", dtype=dtype)

    waterfall(args, load, DATASETS["scenes"](), half=True)
    assert loaded == ["float32", "float16"]
    out = tmp_path / "out/protocol-scenes-tiny"
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows["Table 1"]) == ["ours", "resize", "present", "half", "released"]
    ledgers = list(out.glob("*/*/*.jsonl"))
    assert len(ledgers) == 5 + 9
    for path in ledgers:
        identity = json.loads(path.read_text().splitlines()[0])["identity"]
        assert ("half" in identity["protocol"]["choices"]) == (identity["model"][2] == "torch.float16")
    assert "released" in capsys.readouterr().out


def test_sizes_are_rounded():
    assert released.short_side(500, 333, 1024) == (961, 640)


def test_a_picture_smaller_than_the_short_side_is_drawn_at_it():
    item = Item(Image.new("RGB", (50, 40)), np.zeros((40, 50), np.uint8), "a")
    assert released.picture(item, 128, Choices(size=True, corner=True)).square.image.size == (100, 80)


def test_choices_of_one_data_set(tiny):
    for name in ("coco-object-bg", "coco-object81"):
        assert "background" not in released.applicable("ovss", name, tiny)
    assert "context" not in released.applicable("unsup", "context59", tiny)


def test_prompts_of_another_length_are_encoded_anew(tiny_flux):
    text = copy.copy(tiny_flux.text)
    text.length, text.room, text.cache = 30, 29, {}      # T5 reads more tokens than CLIP, as the published one does
    with torch.inference_mode():
        before = text.encode([["car", "sky"]]).ctx.shape[1]
        rows = released.model_of(replace(tiny_flux, text=text), Choices(rows=True)).text
        assert rows.encode([["car", "sky"]]).ctx.shape[1] == rows.length != before


def test_names_are_not_matched():
    assert released.scoring_of(NAMED, Choices(matching=True)) is NAMED

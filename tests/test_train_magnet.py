"""train_magnet.py: training sets, what each option changes, kills, broken files and several processes."""
import itertools
import json
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors import safe_open
from safetensors.torch import load_file

import seg4diff
import train_magnet
from nano import scenes
from support.data import DATASETS, FACTS, TRAINING_SETS, Dataset, subset

# ---------------------------------------------------------------------------- data


def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def test_scenes_are_fresh():
    data = TRAINING_SETS["scenes"](None, None)
    assert len(data.names) == 100_000
    assert {int(n) for n in data.names} <= set(scenes.TRAIN_SEEDS[100_000:])
    assert not {*data.names} & {*DATASETS["scenes"]().names, *DATASETS["scenes-dev"]().names}
    scene, pair = scenes.draw(int(data.names[5])), data.read(data.names[5])
    assert np.array_equal(pair.masks.sum(0), np.ones((128, 128))) and len(pair.names) == len(pair.masks)
    for mask, name in zip(pair.masks, pair.names):
        assert np.array_equal(mask, scene.labels == scenes.CLASSES.index(name))
    assert pair.caption == data.read(data.names[5]).caption and scene.things[0].name in pair.caption


def test_coco(tmp_path):
    put(tmp_path / "coco/train2017/000000000009.jpg", np.full((2, 3, 3), 90))
    put(tmp_path / "coco/train2017/000000000025.jpg", np.full((2, 3), 90))   # COCO has grey pictures
    for n in ("09", "25"):
        put(tmp_path / f"coco/stuffthingmaps/train2017/0000000000{n}.png", [[0, 0, 89], [123, 181, 255]])

    def read(captions=None):
        data = TRAINING_SETS["coco"](tmp_path, captions)
        assert data.names == ["000000000009", "000000000025"]
        return [data.read(n) for n in data.names]

    a, b = read()
    assert a.names == ["person", "toothbrush", "grass", "wood"] and a.image.mode == b.image.mode == "RGB"
    assert a.masks.astype(int).tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]],
                                            [[0, 0, 0], [0, 1, 0]]]
    assert a.caption == "person toothbrush grass wood"
    (tmp_path / "coco/annotations").mkdir()
    (tmp_path / "coco/annotations/captions_train2017.json").write_text(json.dumps(
        {"images": [], "annotations": [{"image_id": 9, "caption": "First. "}, {"image_id": 9, "caption": "Second."}]}))
    assert [x.caption for x in read()] == ["First.", "person toothbrush grass wood"]
    (tmp_path / "own.json").write_text(json.dumps({"9": "One here. Two! Three?", "000000000025": "A dog"}))
    assert [x.caption for x in read(tmp_path / "own.json")] == ["One here. Two!", "A dog"]
    assert len(FACTS["coco-stuff171"]["classes"]) == len(set(FACTS["coco-stuff171"]["classes"])) == 171
    (tmp_path / "own.json").write_text("[1]")
    with pytest.raises(ValueError, match="own.json"):
        read(tmp_path / "own.json")


def test_sa1b(tmp_path):
    folder = tmp_path / "sa1b/sa_000000"
    put(folder / "sa_7.jpg", np.full((20, 30, 3), 90))
    put(folder / "sa_8.jpg", np.full((20, 30, 3), 90))                       # without masks: not a picture of the set
    masks = np.zeros((40, 20, 30), np.uint8)
    masks[0, 0, :3], masks[1, 0, :4], masks[2, :10] = 1, 1, 1                # 0.5 %: out; a little more: in; half
    for i in range(3, 40):
        masks[i, :i] = 1
    annotations = []
    for m in masks:
        code = rle.encode(np.asfortranarray(m))
        annotations.append({"segmentation": {"size": code["size"], "counts": code["counts"].decode()}})
    (folder / "sa_7.json").write_text(json.dumps({"image": {}, "annotations": annotations[:3]}))
    (tmp_path / "c.json").write_text(json.dumps({"sa_7": "A grey wall."}))
    data = TRAINING_SETS["sa1b"](tmp_path, None)
    pair = data.read("sa_7")
    assert data.names == ["sa_7"] and pair.names == [] and pair.caption == ""
    assert pair.masks.dtype == bool and np.array_equal(pair.masks, masks[[2, 1]] > 0)        # largest first
    assert TRAINING_SETS["sa1b"](tmp_path, tmp_path / "c.json").read("sa_7").caption == "A grey wall."
    (folder / "sa_7.json").write_text(json.dumps({"image": {}, "annotations": annotations}))
    assert len(data.read("sa_7").masks) == 32
    (folder / "sa_7.json").write_text(json.dumps({"image": {}, "annotations": []}))
    assert data.read("sa_7").masks.shape == (0, 20, 30)


@pytest.mark.parametrize("name", ["coco", "sa1b"])
def test_wrong_tree_says_what_was_expected(tmp_path, name):
    with pytest.raises(ValueError, match="\\*.jpg"):
        TRAINING_SETS[name](tmp_path, None)
    put(tmp_path / "sa1b/sa_1.jpg", np.zeros((2, 3, 3)))                     # a picture without masks is not enough
    if name == "sa1b":
        with pytest.raises(ValueError, match="there is no .*json"):
            TRAINING_SETS[name](tmp_path, None)


# ---------------------------------------------------------------------------- runs


FAST = ("--device", "cpu", "--batch", 2, "--accumulate", 2, "--warmup", 2, "--lr", 1e-3, "--val", "none", "--limit", 5)


@pytest.fixture
def train(command, tiny_file):
    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("support.report.plot_losses", lambda log, path: None)        # half of the time of such a run
            return command("train_magnet.py", "--model", tiny_file, *FAST, *args)
    return run


def test_a_run_killed_and_resumed_ends_with_the_same_weights(command, train, tiny_file, tmp_path, monkeypatch):
    code, out, err = command("train_magnet.py", "--model", tiny_file, *FAST[:-4], "--limit", 5, "--steps", 4,
                             "--val", "scenes-dev", "--val-limit", 2, "--val-every", 2)
    whole = tmp_path / "out/magnet-scenes-tiny-0"
    assert code == 0, err
    assert {p.name for p in whole.iterdir()} == {"lora.safetensors", "log.json", "loss.png", "state.pt"}
    log = json.loads((whole / "log.json").read_text())
    assert [x["step"] for x in log if "val" in x] == [0, 2, 4]
    assert [x["step"] for x in log if "flow" in x] == [1, 2, 3, 4]
    assert {"lr", "flow", "focal", "dice", "loss", "norm"} < log[1].keys() and "mIoU" in out
    data = DATASETS["scenes-dev"]()
    before = seg4diff.load(tiny_file, "cpu")
    shown = subset(data.names, 2)
    assert log[0]["val"] == pytest.approx(train_magnet.measure(before, data, shown, 0))
    after = seg4diff.load(tiny_file, "cpu", lora=whole / "lora.safetensors")
    assert log[-1]["val"]["flow loss"] == pytest.approx(train_magnet.flow_loss(after, data, shown, 0), rel=1e-4)
    assert log[-1]["val"]["flow loss"] != log[0]["val"]["flow loss"]

    steps = iter(range(3))
    step = torch.optim.AdamW.step

    def dies(self, *args):
        if next(steps) == 2:                                                 # in the third step; the second was saved
            raise KeyboardInterrupt
        return step(self, *args)
    monkeypatch.setattr(torch.optim.AdamW, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        train("--steps", 4, "--save-every", 2, "--out", "cut")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert torch.load(tmp_path / "cut/state.pt", weights_only=True)["step"] == 2
    code, _, err = train("--steps", 4, "--save-every", 2, "--out", "cut")
    assert code == 0, err
    one, other = (load_file(f / "lora.safetensors") for f in (whole, tmp_path / "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert [x for x in log if "flow" in x] == json.loads((tmp_path / "cut/log.json").read_text())

    with safe_open(whole / "lora.safetensors", framework="pt") as f:
        assert json.loads(f.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 16
    train("--steps", 1, "--out", "first")
    opt, norm = (torch.load(tmp_path / "first/state.pt", weights_only=True)[k] for k in ("opt", "log"))
    mean = torch.cat([s["exp_avg"].flatten() for s in opt["state"].values()])                # a tenth of the gradient
    assert opt["param_groups"][0]["weight_decay"] == 1e-4 and opt["param_groups"][0]["betas"] == (0.9, 0.999)
    assert norm[0]["norm"] > 0.01 and mean.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)

    code, _, err = train("--steps", 4, "--out", "cut", "--lr", 1e-4)         # another run is not gone on with
    assert code == 2 and "lr 0.001 instead of 0.0001" in err and err.count("\n") == 1
    code, out, err = command("train_magnet.py", "--model", tiny_file, "--device", "cpu", "--val-limit", 2, "--measure",
                             whole / "lora.safetensors", "cut/lora.safetensors")
    assert code == 0 and "2 pictures" in out and "nan" not in out, err
    rows = [[float(x) for x in line.split()[:3]] for line in out.splitlines()[1:4]]
    assert rows[0] == pytest.approx(list(log[0]["val"].values()), abs=1e-3)
    assert rows[1] == rows[2] == pytest.approx(list(log[-1]["val"].values()), abs=0.5)


def test_every_option_is_felt(train, tmp_path):
    """One step at a time: the LoRA that comes out is not that of the defaults."""
    numbers = itertools.count()

    def lora(*args):
        out = tmp_path / str(next(numbers))
        code, _, err = train("--steps", 1, "--batch", 1, "--out", out, *args)
        assert code == 0, err
        return load_file(out / "lora.safetensors")

    usual = lora()
    for change in (("--match", "name"), ("--maps", "heads"), ("--normalise", "zscore"), ("--sigma", "logit-normal"),
                   ("--mask-weight", 0), ("--seed", 1), ("--lr", 2e-3), ("--warmup", 0), ("--batch", 2), ("--limit", 3),
                   ("--accumulate", 1), ("--dtype", "bfloat16")):
        assert any(not torch.equal(x, usual[k]) for k, x in lora(*change).items()), change
    assert {min(x.shape) for x in lora("--rank", 3).values()} == {3}
    for same in (("--save-every", 3), ("--device", "auto")):
        assert all(torch.equal(x, usual[k]) for k, x in lora(*same).items()), same
    for k, x in lora("--checkpointing").items():
        torch.testing.assert_close(x, usual[k], rtol=1e-3, atol=1e-4)


def test_coco_and_sa1b_run(train, tmp_path):
    rng = np.random.default_rng(0)
    put(tmp_path / "d/coco/train2017/1.jpg", rng.integers(0, 255, (40, 60, 3)))
    put(tmp_path / "d/coco/stuffthingmaps/train2017/1.png", np.repeat([[0, 2, 123]], 40, 0).repeat(20, 1))
    put(tmp_path / "d/sa1b/sa_1.jpg", rng.integers(0, 255, (40, 60, 3)))
    code = rle.encode(np.asfortranarray(np.eye(40, 60, dtype=np.uint8).repeat(1, 1) | (np.arange(60) < 20)))
    (tmp_path / "d/sa1b/sa_1.json").write_text(json.dumps(
        {"annotations": [{"segmentation": {"size": code["size"], "counts": code["counts"].decode()}}]}))
    for name, options in (("coco", ("--match", "name")), ("coco", ()), ("sa1b", ())):
        out = f"{name}{len(options)}"
        code, _, err = train("--dataset", name, "--data-root", "d", "--steps", 1, "--out", out, *options)
        assert code == 0, err
    (tmp_path / "d/sa1b/sa_1.jpg").write_text("broken")
    code, _, err = train("--dataset", "sa1b", "--data-root", "d", "--steps", 1, "--out", "broken")
    assert code == 2 and "picture sa_1 of sa1b cannot be read" in err


def test_a_broken_state_is_named(train, tmp_path):
    assert train("--steps", 1)[0] == 0
    state = tmp_path / "out/magnet-scenes-tiny-0/state.pt"
    state.write_bytes(state.read_bytes()[:500])
    code, _, err = train("--steps", 1)
    assert code == 2 and "state.pt is broken" in err.splitlines()[-1]


def test_the_batch_is_16_or_more(command, tiny_file):
    """Three at a time are accumulated six times, not five."""
    code, out, err = command("train_magnet.py", "--model", tiny_file, "--device", "cpu", "--val", "none", "--limit", 5,
                             "--steps", 1, "--warmup", 1, "--batch", 3)
    assert code == 0 and "1 steps of 18 pictures" in out, err


def test_a_loss_that_is_not_finite_ends_the_run_and_spoils_nothing(train, tmp_path, monkeypatch):
    code, _, err = train("--steps", 3, "--save-every", 1, "--lr", 1e30)
    assert code == 2 and "not finite" in err.splitlines()[-1] and "smaller --lr" in err
    good = load_file(tmp_path / "out/magnet-scenes-tiny-0/lora.safetensors")
    assert torch.load(tmp_path / "out/magnet-scenes-tiny-0/state.pt", weights_only=True)["step"] >= 1
    assert all(x.isfinite().all() for x in good.values())


BAD = {("--dataset", "voc"): "'scenes', 'coco', 'sa1b'", ("--match", "best"): "hungarian",
       ("--match", "tokens"): "'name'", ("--maps", "x"): "heads", ("--candidates", "heads"): "--maps",
       ("--normalise", "x"): "minmax",
       ("--sigma", "x"): "uniform", ("--val", "x"): "ade20k", ("--steps", 0): "--steps", ("--lr", 0): "--lr",
       ("--lr", "nan"): "--lr", ("--batch", 0): "--batch", ("--rank", 0): "--rank", ("--seed", -1): "--seed",
       ("--warmup", -1): "--warmup", ("--accumulate", 0): "--accumulate", ("--save-every", 0): "--save-every",
       ("--val-every", 0): "--val-every", ("--val-limit", 0): "--val-limit", ("--limit", 0): "--limit",
       ("--mask-weight", -1): "--mask-weight", ("--mask-weight", "nan"): "--mask-weight",
       ("--match", "name", "--maps", "heads"): "--maps heads", ("--match", "name", "--dataset", "sa1b"): "sa1b",
       ("--match", "name", "--captions", "c.json"): "--captions", ("--captions", "c.json"): "captions",
       ("--dataset", "coco", "--data-root", "nowhere"): "stuffthingmaps", ("--model", "nowhere"): "nowhere",
       ("--device", "tpu"): "tpu", ("--dtype", "x"): "float16", ("--measure", "nowhere.safetensors"): "nowhere",
       ("--measure", "l.safetensors", "--val", "none"): "--val"}


def test_bad_input_is_answered_in_a_sentence(train, tmp_path):
    for args, says in BAD.items():
        val = () if "--val" in args else ("--val", "scenes-dev")
        code, _, err = train("--steps", 1, *val, *args)
        assert code == 2 and err.startswith("error: ") and says in err, (args, err)
        assert err.count("\n") == 1 or "Found in" in err, (args, err)        # only a tree takes more than a line
    assert not list(tmp_path.rglob("*.safetensors"))


def share(rank: int, port: int, argv: list[str]) -> None:
    """One of two processes of torchrun."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(str(Path(train_magnet.__file__)), run_name="__main__")


def test_two_processes_are_one_with_twice_the_batch(train, tiny_file, tmp_path):
    code, _, err = train("--steps", 2, "--batch", 4, "--accumulate", 1, "--out", "one")
    assert code == 0, err
    options = ("--model", tiny_file, *FAST, "--steps", 2, "--batch", 2, "--accumulate", 1, "--out", "two")
    argv = ["train_magnet.py", *map(str, options)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    both = [multiprocessing.get_context("fork").Process(target=share, args=(r, port, argv)) for r in (0, 1)]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    one, two = (torch.load(tmp_path / f / "state.pt", weights_only=True) for f in ("one", "two"))
    assert one["run"] == two["run"]                                          # one may go on with the other's state
    for i, s in one["opt"]["state"].items():                                 # Adam's means are the gradients, added up
        scale = s["exp_avg"].abs().max()
        assert (s["exp_avg"] - two["opt"]["state"][i]["exp_avg"]).abs().max() < 1e-3 * scale
    for a, b in zip(one["log"], two["log"]):
        assert a == pytest.approx(b, rel=1e-3)


def test_rate():
    got = [train_magnet.rate(i, 110, 10) for i in range(110)]
    assert got[0] == 0.1 and got[9] == 1 == got[10] and got[60] == pytest.approx(0.5) and 0 < got[-1] < 0.001
    assert got[:10] == sorted(got[:10]) and got[10:] == sorted(got[10:], reverse=True)
    assert train_magnet.rate(0, 5, 0) == 1


def test_a_picture_that_cannot_be_read_is_replaced_by_the_next(capsys):
    def read(name):
        if name in "bd":
            raise OSError("truncated")
        return name
    data = Dataset("mine", list("abcd"), read)
    got = train_magnet.readable(data, data.names)
    assert [got(name) for name in "abcdb"] == ["a", "c", "c", "a", "c"]
    err = capsys.readouterr().err
    assert err.count("picture b of mine cannot be read") == 1 and err.count("picture d") == 1
    with pytest.raises(ValueError, match="none of the 2"):
        train_magnet.readable(Dataset("mine", ["b", "d"], read), ["b", "d"])("b")

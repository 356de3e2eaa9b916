"""train_magnet.py: training sets, what each option changes, kills, broken files and several processes."""
import itertools
import json
import multiprocessing
import os
import pickle
import runpy
import shutil
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
from support.files import Broken

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
    code, out, err = train("--steps", 4, "--save-every", 2, "--out", "cut")
    assert code == 130 and out == "" and err.splitlines()[-1].startswith("stopped; the same command goes on from here")
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


def test_another_run_is_not_gone_on_with(train, tmp_path, monkeypatch):
    """What its weights or its measurements depend on has changed; the sentence says what (faults A.2)."""
    coco = tmp_path / "d/coco"
    for split in ("train2017", "val2017"):
        put(coco / split / "1.jpg", np.full((40, 60, 3), 90))
        put(coco / "stuffthingmaps" / split / "1.png", np.full((40, 60), 2))
    (tmp_path / "c.json").write_text('{"1": "A car."}')
    shutil.copytree(tmp_path / "d", tmp_path / "elsewhere")
    usual = ("--dataset", "coco", "--data-root", "d", "--captions", "c.json", "--steps", 1, "--val", "coco-object",
             "--val-limit", 1, "--out", "run")
    assert train(*usual)[0] == train(*usual)[0] == 0

    def refused(says, *change):
        code, out, err = train(*usual, *change)
        last = err.splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("error: run holds a run with ") and says in last, err
    refused("val coco-object instead of none", "--val", "none")
    refused("val coco-object instead of scenes-dev", "--val", "scenes-dev")
    refused("val_limit 1 instead of 2", "--val", "scenes-dev", "--val-limit", 2)
    refused("captions c.json instead of ", "--captions", shutil.copy("c.json", "other.json"))
    refused(f"data_root {tmp_path / 'd'} instead of {tmp_path / 'elsewhere'}", "--data-root", "elsewhere")
    with monkeypatch.context() as m:
        m.setattr("support.files.code_stamp", lambda names: "changed")
        refused("instead of changed")
    assert train(*usual)[0] == 0
    for name, use in (("val2017/1.jpg", "measured"), ("train2017/1.jpg", "trained")):
        os.utime(coco / name)                            # a time of change cannot be put back
        refused(f"files that are {use} on ")


def test_a_finished_run_writes_again_what_is_gone(train, tmp_path):
    """Its files, as they were, though no step is left (faults B.9)."""
    assert train("--steps", 2, "--out", "run")[0] == 0
    lora = load_file(tmp_path / "run/lora.safetensors")
    log = (tmp_path / "run/log.json").read_text()
    for name in ("lora.safetensors", "log.json"):
        (tmp_path / "run" / name).unlink()
    code, out, err = train("--steps", 2, "--out", "run")
    assert code == 0 and "0 steps" in out and "wrote run/lora.safetensors" in out, err
    again = load_file(tmp_path / "run/lora.safetensors")
    assert all(torch.equal(again[key], x) for key, x in lora.items()) and again.keys() == lora.keys()
    assert (tmp_path / "run/log.json").read_text() == log


@pytest.fixture
def state(tmp_path):
    """A LoRA of two tensors, its optimiser, its identity, and what a run of a step would save of them."""
    params = [torch.nn.Parameter(torch.full(shape, 0.5)) for shape in ((2, 3), (4, 2))]
    opt = torch.optim.AdamW(params)
    sum(p.sum() for p in params).backward()
    opt.step()
    measured = {"mIoU": 5.0, "unsup mIoU": 6.0, "flow loss": 7.0}
    log = [{"step": 0, "val": measured}, {"step": 1, "lr": 1e-3, "flow": 1.0, "focal": 2.0, "dice": 3.0}]
    saved = {"step": 1, "log": log, "run": {"steps": 3}, "opt": opt.state_dict(), "lora": [p.detach() for p in params]}
    return params, opt, saved


def broken(saved):
    """States that differ from a good one in one part."""
    def without(part, key):
        return {k: v for k, v in part.items() if k != key}
    lora = saved["lora"]
    moments = saved["opt"]["state"]
    first, second = saved["log"]
    x = torch.zeros(2, 3)
    tensors = [None, "x", x / 0, x + torch.inf, x.T, x.flatten(), x.double(), x.long(), x.to_sparse()]
    parts = {"step": [-1, 4, 1.0, "1", None, True], "run": [None, [], "steps"],
             "lora": [*([x, lora[1]] for x in tensors), [], lora[:1], lora * 2, dict(enumerate(lora)), 5],
             "opt": [None, [], "x", {"param_groups": []}],
             "log": [5, "x", {}, [5], ["flow"], [[]], [{}], [first, without(second, "dice")], [first | {"val": 5}],
                     [first | {"val": {}}], [second | {"flow": "x"}], [second | {"flow": float("nan")}],
                     [without(second, "step")]]}
    states = [{}, [], [*moments.values()], {0: {}, 1: {}}, {0: 1, 1: 2}, moments | {0: without(moments[0], "step")}]
    states += [moments | {0: moments[0] | {key: x}} for x in tensors for key in ("exp_avg", "exp_avg_sq")]
    parts["opt"] += [{"state": x} for x in states]
    yield from ("text", [1, 2], None, 5, torch.zeros(3), {}, set())
    for key, values in parts.items():
        yield without(saved, key)
        yield from (saved | {key: x} for x in values)


def test_a_broken_state_is_named(state, tmp_path):
    """In a sentence, before anything is taken over, and never with the advice to let it run code (faults C.17)."""
    params, opt, saved = state
    path = tmp_path / "state.pt"
    before = [p.detach().clone() for p in params]

    def named():
        with pytest.raises(Broken, match=f"^'{path}' cannot be read as a state of a run .remove it") as raised:
            train_magnet.resume(path, {"steps": 3}, params, opt)
        assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)
        assert all(torch.equal(p, x) for p, x in zip(params, before))
    assert train_magnet.resume(path, {"steps": 3}, params, opt) == (0, [])
    for wrong in broken(saved):
        torch.save(wrong, path)
        named()
    torch.save(saved | {"run": Dataset("any class", [], None)}, path)
    named()
    torch.save(saved, path)
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:500], b"\0" * 1000, pickle.dumps(saved["log"])):
        path.write_bytes(data)
        named()
    path.unlink()
    path.mkdir()
    named()


def test_a_good_state_is_taken_over(state, tmp_path):
    """Values and moments; how the optimiser steps is said by this run's settings."""
    params, opt, saved = state
    torch.save(saved, tmp_path / "state.pt")
    again = [torch.nn.Parameter(torch.zeros_like(p)) for p in params]
    new = torch.optim.AdamW(again, lr=0.5, weight_decay=0.25)
    assert train_magnet.resume(tmp_path / "state.pt", {"steps": 3}, again, new) == (1, saved["log"])
    for p, q in zip(params, again):
        assert torch.equal(p, q) and all(torch.equal(x, new.state[q][key]) for key, x in opt.state[p].items())
    assert (new.param_groups[0]["lr"], new.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    with pytest.raises(ValueError, match="holds a run with steps 3 instead of 4; name another --out"):
        train_magnet.resume(tmp_path / "state.pt", {"steps": 4}, again, new)


def test_the_batch_is_16_or_more(command, tiny_file):
    """Three at a time are accumulated six times, not five."""
    code, out, err = command("train_magnet.py", "--model", tiny_file, "--device", "cpu", "--val", "none", "--limit", 5,
                             "--steps", 1, "--warmup", 1, "--batch", 3)
    assert code == 0 and "1 steps of 18 pictures" in out, err


@pytest.mark.parametrize("lr", [1e15, 1e30])
def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, lr):
    """Nor those that give losses which are not: there is no step after the last that would tell (faults A.6)."""
    code, out, err = train("--steps", 1, "--save-every", 1, "--lr", lr, "--out", "run")
    assert code == 2 and out == "" and "not finite at step 1" in err.splitlines()[-1]
    assert "smaller --lr" in err and "nothing was saved yet" in err and not list((tmp_path / "run").iterdir())


def test_what_is_not_finite_ends_the_run_and_spoils_nothing(train, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step
    steps = iter(range(1, 4))

    def breaks(self, *args):
        step(self, *args)
        if next(steps) == 3:                                                 # in the last step
            self.param_groups[0]["params"][0].data[0, 0] = torch.nan
    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    code, _, err = train("--steps", 3, "--save-every", 1, "--out", "run")
    assert code == 2 and "not finite at step 3" in err.splitlines()[-1] and "run has the last good state" in err
    good = load_file(tmp_path / "run/lora.safetensors")
    assert torch.load(tmp_path / "run/state.pt", weights_only=True)["step"] == 2
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
        assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1, (args, err)
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
        assert (s["exp_avg"] - two["opt"]["state"][i]["exp_avg"]).abs().max() < 1e-2 * scale      # rounding of 1e-8
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
            raise Broken("truncated")
        return name
    data = Dataset("mine", list("abcd"), read)
    got = train_magnet.readable(data, data.names)
    assert [got(name) for name in "abcdb"] == ["a", "c", "c", "a", "c"]
    err = capsys.readouterr().err
    assert err.count("picture b of mine cannot be read") == 1 and err.count("picture d") == 1
    with pytest.raises(ValueError, match="none of the 2"):
        train_magnet.readable(Dataset("mine", ["b", "d"], read), ["b", "d"])("b")
    with pytest.raises(AttributeError):                                      # a mistake of ours is none of the picture
        train_magnet.readable(Dataset("mine", ["b"], lambda name: name.nothing), ["b"])("b")

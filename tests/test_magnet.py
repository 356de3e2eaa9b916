"""MAGNET: losses against loops, matching against all permutations, what each option changes, kills and processes."""
import dataclasses
import itertools
import json
import math
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

import lora as lora_module
import magnet
import mmdit
import seg4diff
import train_magnet
from nano import scenes
from support.data import DATASETS, FACTS, TRAINING_SETS, Dataset, Pair, subset
from tools import full_size

SETTINGS = magnet.Settings()


def loop_losses(p, m):
    """One candidate, one mask, patch by patch."""
    focal = dice_top = dice_low = 0.0
    for x, y in zip(p.tolist(), m.tolist()):
        x = min(max(x, 1e-4), 1 - 1e-4)
        right = x if y else 1 - x
        focal -= (0.25 if y else 0.75) * (1 - right) ** 2 * math.log(right) / len(p)
    for x, y in zip(p.tolist(), m.tolist()):
        dice_top, dice_low = dice_top + 2 * x * y, dice_low + x + y
    return focal, 1 - (dice_top + 1) / (dice_low + 1)


def random_pairs(P=6, K=3, N=20):
    g = torch.Generator().manual_seed(0)
    return torch.rand(P, N, generator=g), (torch.rand(K, N, generator=g) < 0.3).float()


# ---------------------------------------------------------------------------- losses and matching


def test_pair_losses_are_the_loop():
    p, m = random_pairs()
    p[0, :3] = torch.tensor([0.0, 1.0, 0.5])                                 # ends of the range stay finite
    focal, dice = magnet.pair_losses(p, m)
    for i, k in itertools.product(range(len(p)), range(len(m))):
        assert (focal[i, k].item(), dice[i, k].item()) == pytest.approx(loop_losses(p[i], m[k]), rel=1e-4)
    perfect = magnet.pair_losses(m, m)
    assert all(x.diagonal().max() < 1e-6 for x in perfect)


@pytest.mark.parametrize("P, K", [(6, 3), (3, 5), (4, 4), (4, 0)])           # fewer maps than masks, and no masks, too
def test_matching_is_the_best_of_all(P, K):
    p, m = random_pairs(P, K)
    focal, dice = magnet.pair_losses(p, m)
    cost = (0.1 * focal + 0.2 * dice).numpy()
    rows, columns = magnet.match(p, m)
    n = min(P, K)
    assert len(set(rows)) == len(set(columns)) == len(rows) == n             # one to one
    best = min(sum(cost[r, c] for r, c in zip(rs, cs)) for rs in itertools.permutations(range(P), n)
               for cs in itertools.combinations(range(K), n))
    assert cost[rows, columns].sum() == pytest.approx(best)
    f, d = magnet.matched_losses(p, m, hungarian=True)
    if K == 0:
        assert f.item() == d.item() == 0
        return
    assert f.item() == pytest.approx(focal[rows, columns].mean().item())
    assert d.item() == pytest.approx(dice[rows, columns].mean().item())
    if P >= K:                                                               # by name: the i-th with the i-th
        f, d = magnet.matched_losses(p[:K], m, hungarian=False)
        assert f.item() == pytest.approx(np.mean([loop_losses(p[k], m[k])[0] for k in range(K)]), rel=1e-4)
        assert d.item() == pytest.approx(np.mean([loop_losses(p[k], m[k])[1] for k in range(K)]), rel=1e-4)


def test_normalisations():
    x = torch.tensor([[1.0, 3.0, 2.0], [0.1, 0.1, 0.1]])
    assert torch.equal(magnet.minmax(x), torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(magnet.zscore(x), torch.sigmoid(torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])))
    for f in magnet.NORMALISATIONS.values():                                 # each map on its own
        torch.testing.assert_close(f(x[:1] * 5 + 2), f(x)[:1])
    small = (torch.arange(100) < 5).float()[None]                            # what the docstring says of both
    assert magnet.minmax(0.02 * small).equal(small) and magnet.zscore(small)[0, -1] > 0.4


def test_noise_levels():
    def draws(kind, shift):
        return torch.cat([magnet.draw_sigma(kind, shift, torch.Generator().manual_seed(i)) for i in range(3000)])

    flat, peaked, shifted = draws("uniform", 3.0), draws("logit-normal", 1.0), draws("logit-normal", 3.0)
    assert abs(flat.mean() - 0.5) < 0.02 and abs(flat.std() - 12 ** -0.5) < 0.01
    logit = torch.logit(peaked)
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 0.5) < 0.02
    torch.testing.assert_close(shifted, 3 * peaked / (1 + 2 * peaked))
    assert flat.min() >= 0 and shifted.max() < 1


def test_rate():
    got = [train_magnet.rate(i, 110, 10) for i in range(110)]
    assert got[0] == 0.1 and got[9] == 1 == got[10] and got[60] == pytest.approx(0.5) and 0 < got[-1] < 0.001
    assert got[:10] == sorted(got[:10]) and got[10:] == sorted(got[10:], reverse=True)
    assert train_magnet.rate(0, 5, 0) == 1


# ---------------------------------------------------------------------------- one step


def pair_of(seed: int) -> Pair:
    return TRAINING_SETS["scenes"](None, None).read(str(seed))


@pytest.fixture
def learner(tiny_file):
    """A model with a LoRA that does something already, its parameters, three pictures and their seeds."""
    model = seg4diff.load(tiny_file, device="cpu", dtype="float32")
    params = lora_module.add_lora(model.transformer, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for p in params[1::2]:
        p.data.copy_(0.05 * torch.randn(p.shape, generator=g))
    batch = [magnet.features(model, pair_of(1_100_000 + i), by_name=False) for i in range(3)]
    return model, params, batch, [10, 11, 12]


def test_masks_on_the_grid(tiny):
    masks = np.zeros((3, 32, 64), bool)
    masks[0, :, :32], masks[1, 0, 0], masks[2, :16, :33] = True, True, True  # half, nearly nothing, a quarter
    grid = magnet.patch_masks(masks, (4, 4)).view(3, 4, 4)
    assert grid[0].tolist() == [[True, True, False, False]] * 4 and not grid[1].any() and grid[2].sum() == 4
    image, caption = Image.fromarray(scenes.draw(0).image), "red car"
    f = magnet.features(tiny, Pair(image, masks, ["a", "b", "c"], caption), by_name=False)
    assert f.masks.shape == (2, 256) and f.masks.sum(1).tolist() == [128, 64]                # largest first, none empty
    cond = tiny.text.encode([caption])
    assert torch.equal(f.ctx, cond.ctx[0]) and torch.equal(f.pooled, cond.pooled[0]) and f.spans == []
    torch.testing.assert_close(f.z0, seg4diff.encode_image(tiny, image)[0])
    assert magnet.features(tiny, Pair(image, masks[:0], [], ""), by_name=False).masks.shape == (0, 256)
    many = np.repeat(masks[:1], 40, 0)
    assert len(magnet.features(tiny, Pair(image, many, [], ""), by_name=False).masks) == 32
    f = magnet.features(tiny, Pair(image, masks, ["sky", "car", "teddy bear"], caption), by_name=True)
    assert f.spans == [slice(1, 2), slice(2, 4)]
    assert torch.equal(f.ctx, tiny.text.encode([["sky", "teddy bear"]]).ctx[0])
    crowded = magnet.features(tiny, Pair(image, many, ["teddy bear"] * 40, caption), by_name=True)
    assert len(crowded.spans) == len(crowded.masks) == (tiny.text.length - 2) // 2           # no name is cut


@pytest.mark.parametrize("change", [{}, {"maps": "heads"}, {"match": "name"}, {"normalise": "zscore"}, {"block": 2},
                                    {"mask_weight": 0.0}])
def test_losses_of_a_batch_are_those_of_its_pictures(learner, change):
    """Written out: noise, one forward pass a picture, its I2T maps, its masks."""
    model, _, batch, seeds = learner
    block = change.pop("block", 1)
    model = dataclasses.replace(model, preset=dataclasses.replace(model.preset, block=block))
    settings = SETTINGS._replace(**change)
    by_name = settings.match == "name"
    if by_name:
        batch = [magnet.features(model, pair_of(1_100_000 + i), by_name=True) for i in range(3)]
    got = magnet.batch_losses(model, batch, seeds, settings)
    want = []
    for f, seed in zip(batch, seeds, strict=True):
        g = torch.Generator().manual_seed(seed)
        s = torch.sigmoid(0.5 * torch.randn(1, generator=g))
        s = 3 * s / (1 + 2 * s)
        eps = torch.randn(f.z0.shape, generator=g)
        vel, taps = model.transformer(((1 - s) * f.z0 + s * eps)[None], s, f.ctx[None], f.pooled[None], capture={block})
        attn = mmdit.joint_probs(taps[block])[0, :, :256, 256:256 + model.text.length]       # (H, N, L)
        if by_name:
            maps = torch.stack([attn[:, :, span].mean((0, 2)) for span in f.spans])
        elif settings.maps == "heads":
            maps = torch.stack([attn[h, :, i] for h in range(attn.shape[0]) for i in range(attn.shape[2])])
        else:
            maps = torch.stack([attn[:, :, i].mean(0) for i in range(attn.shape[2])])
        pair = magnet.matched_losses(magnet.NORMALISATIONS[settings.normalise](maps), f.masks.float(), not by_name)
        want.append([(vel[0] - (eps - f.z0)).square().mean().item(), *(x.item() for x in pair)])
    flow, focal, dice = np.mean(want, axis=0)
    assert got["flow"].item() == pytest.approx(flow, rel=1e-4)
    assert (got["focal"].item(), got["dice"].item()) == pytest.approx((focal, dice), rel=1e-3)
    assert got["loss"].item() == pytest.approx(flow + settings.mask_weight * (0.1 * focal + 0.2 * dice), rel=1e-4)


def grads(params) -> torch.Tensor:
    out = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return out


def test_gradient_reaches_the_taps_and_only_lora(learner):
    model, params, batch, seeds = learner
    (0.2 * magnet.batch_losses(model, batch, seeds, SETTINGS)["dice"]).backward()
    blocks = [any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
              for block in model.transformer.joint_blocks]
    assert blocks == [True, True, False]                                     # block 1 is read; block 2 comes after it
    tap = model.transformer.joint_blocks[1].x_block.attn.qkv.groups                # of block 1: q and k, not v
    assert [g.B.grad.abs().max() > 0 for g in tap] == [True, True, False]
    for p in params:
        p.grad = None
    magnet.gradient(model, params, [(batch, seeds)], SETTINGS)
    assert all(p.grad.abs().max() > 0 for p in params)
    assert all(p.grad is None for p in model.transformer.parameters() if not p.requires_grad)


def test_mask_loss_falls_when_only_it_is_followed(learner):
    model, params, batch, seeds = learner
    opt, seen = torch.optim.AdamW(params, 3e-3), []
    for _ in range(15):
        opt.zero_grad()
        losses = magnet.batch_losses(model, batch, seeds, SETTINGS)
        (0.1 * losses["focal"] + 0.2 * losses["dice"]).backward()
        opt.step()
        seen.append(losses["dice"].item())
    assert seen[-1] < seen[0] - 0.05


def test_accumulation_and_checkpointing_change_no_gradient(learner):
    model, params, batch, seeds = learner
    one = magnet.gradient(model, params, [(batch, seeds)], SETTINGS)
    want = grads(params)
    three = magnet.gradient(model, params, [([f], [s]) for f, s in zip(batch, seeds)], SETTINGS)
    torch.testing.assert_close(grads(params), want, rtol=1e-3, atol=1e-6)
    assert three == pytest.approx(one, rel=1e-4)
    kept = {False: 0, True: 0}
    for model.transformer.checkpointing in (False, True):
        def pack(x):
            kept[model.transformer.checkpointing] += x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = magnet.batch_losses(model, batch, seeds, SETTINGS)["loss"]
        loss.backward()
        torch.testing.assert_close(grads(params), want, rtol=1e-4, atol=1e-7)
    assert kept[True] < kept[False] / 3                                      # and it does keep less in memory


def test_a_picture_without_masks_adds_no_mask_loss(learner):
    model, params, batch, seeds = learner
    bare = [f._replace(masks=f.masks[:0], spans=[]) for f in batch[:1]]
    for settings in (SETTINGS, SETTINGS._replace(match="name")):
        losses = magnet.batch_losses(model, bare, seeds[:1], settings)
        assert losses["focal"] == losses["dice"] == 0 and losses["loss"] == losses["flow"]
        losses["loss"].backward()
        assert grads(params).isfinite().all()


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


def test_base_in_bf16(learner, tiny_file):
    """What a GPU holds: a rounded base, LoRA and losses in fp32; the gradient points where the exact one does."""
    model, params, batch, seeds = learner
    want = magnet.gradient(model, params, [(batch, seeds)], SETTINGS)
    exact = grads(params)
    half = seg4diff.load(tiny_file, device="cpu", dtype="bfloat16")
    beside = lora_module.add_lora(half.transformer, generator=torch.Generator().manual_seed(0))
    for p, source in zip(beside, params, strict=True):
        assert p.dtype == torch.float32
        p.data.copy_(source)
    batch = [f._replace(ctx=f.ctx.bfloat16(), pooled=f.pooled.bfloat16()) for f in batch]
    assert magnet.gradient(half, beside, [(batch, seeds)], SETTINGS) == pytest.approx(want, rel=0.05)
    assert torch.cosine_similarity(grads(beside), exact, dim=0) > 0.9
    z = torch.stack([f.z0 for f in batch]).bfloat16()
    ctx = torch.stack([f.ctx for f in batch])
    pooled = torch.stack([f.pooled for f in batch])
    with torch.autocast("cpu", torch.bfloat16):
        vel, _ = half.transformer(z, torch.full((3,), 0.5), ctx, pooled)
    vel.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in beside)


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


def test_what_is_kept_for_the_backward_pass_is_linear_in_the_tokens(tiny_file):
    """No matrix of N x N is kept, not even the softmax of the expert's maps; checkpointing keeps a fraction."""
    found = full_size.measure_training(tiny_file, [64, 96, 128], "cpu")
    for rows in found.values():
        (n0, b0), (n1, b1), (n2, b2) = rows
        assert (n0, n1, n2) == (64, 144, 256) and b2 == pytest.approx(b0 + (b1 - b0) / (n1 - n0) * (n2 - n0), rel=1e-3)
    assert found[True][2][1] < 0.3 * found[False][2][1]

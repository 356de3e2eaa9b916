"""The numbers of a training: its flow loss, order, noise, rates and recipes, and what its runs are told apart by."""
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from test_train_magnet import train  # noqa: F401 - a fixture

import lora
import protocol
import seg4diff
import train_magnet
from loading import image_seed
from magnet import Settings
from support.data import DATASETS, Dataset


def test_flow_loss_by_hand(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    z0 = seg4diff.encode_image(tiny, item.image)
    cond = tiny.text.encode([protocol.names_of(tiny, item, data.classes)])
    want = []
    for i, s in enumerate((0.125, 0.375, 0.625, 0.875)):
        eps = seg4diff.noise(z0.shape[1:], [image_seed(item.name, 3 + i)])
        with torch.inference_mode():
            vel, _ = tiny((1 - s) * z0 + s * eps, s, cond.ctx, cond.pooled)
        want.append((vel - (eps - z0)).square().mean().item())
    assert train_magnet.flow_loss(tiny, data, [item.name], 3) == pytest.approx(np.mean(want), rel=1e-4)


def test_each_epoch_has_its_own_order_and_noise(monkeypatch):
    monkeypatch.setattr(train_magnet, "features", lambda model, pair, by_name: pair)
    data = Dataset("mine", list("abcdef"), lambda name: name)
    got = list(train_magnet.batches(None, data, Settings(batch=6, steps=4), 1, 0))
    assert all(sorted(batch) == data.names for batch, _ in got) and len({tuple(batch) for batch, _ in got}) > 1
    assert len({seed for _, seeds in got for seed in seeds}) == 24


def test_change_and_spread_over_seeds(monkeypatch, capsys):
    found = {None: 10.0, "a": 12.0, "b": 14.0}
    monkeypatch.setattr(train_magnet, "read_lora", lambda path: None)
    monkeypatch.setattr(seg4diff, "load", lambda base, device, dtype, lora: lora)
    monkeypatch.setattr(train_magnet, "measure", lambda model, data, names, seed: dict.fromkeys("xyz", found[model]))
    args = Namespace(measure=["a", "b"], device=None, dtype=None, seed=0)
    train_magnet.before_and_after(args, "nano", Dataset("mine", [], None), [])
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["+3.0000", "(sd", "1.4142)"]


def test_the_rate_of_each_step_and_the_scale_of_the_lora(train, tmp_path):  # noqa: F811
    assert train("--steps", 3, "--rank", 3, "--out", "run")[0] == 0
    log = json.loads((tmp_path / "run/log.json").read_text())
    assert [entry["lr"] for entry in log] == pytest.approx([5e-4, 1e-3, 1e-3])
    pairs, _ = lora.read_lora(tmp_path / "run/lora.safetensors")
    assert {pair.scale for pair in pairs.values()} == {1.0}


def test_recipes():
    coco, sa1b = train_magnet.RECIPES["coco"], train_magnet.RECIPES["sa1b"]
    assert (coco.steps, coco.val, coco.maps, coco.match) == (3000, "coco-object", "mean", "hungarian")
    assert (sa1b.steps, sa1b.maps) == (1000, "heads")
    for recipe in (coco, sa1b):
        assert (recipe.lr, recipe.warmup, recipe.batch, recipe.rank, recipe.sigma, recipe.mask_weight) == (
            1e-5, 500, 4, 16, "logit-normal", 1)


def test_it_is_measured_with_the_seed_of_the_run(train, monkeypatch):  # noqa: F811
    seen = []
    measure = protocol.measure
    monkeypatch.setattr(protocol, "measure", lambda *args, protocol: seen.append(protocol.seed) or measure(
        *args, protocol=protocol))
    assert train("--steps", 1, "--seed", 7, "--val", "scenes-dev", "--val-limit", 1, "--out", "run")[0] == 0
    assert set(seen) == {7}


def test_a_run_of_other_batches_or_pictures_is_not_gone_on_with(train, tmp_path):  # noqa: F811
    assert train("--steps", 2, "--out", "run")[0] == 0
    for change, says in ((("--accumulate", 1), "batch 4 instead of 2"), (("--limit", 3), "['scenes', 3]")):
        code, _, err = train("--steps", 2, "--out", "run", *change)
        assert code == 2 and says in err

"""Every command's functions on a tiny Flux: the method, the tasks, LoRA and MAGNET."""
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import analysis
import loading
import lora
import magnet
import protocol
import seg4diff
from flux import Flux
from nano import scenes
from support import weights
from support.data import DATASETS, TRAINING_SETS

GOLDEN = Path(__file__).parent / "golden/diffusers/flux_transformer"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8))


# ---------------------------------------------------------------------------- the method


def test_segment_propose_generate(tiny_flux):
    seg = seg4diff.segment(tiny_flux, PICTURE, ["red car", "sky"], block=3)
    assert seg.labels.shape == (96, 128) and seg.maps.shape == (2, 16, 16)
    pair = seg4diff.segment(tiny_flux, [PICTURE, PICTURE], [["red car", "sky"], ["sand"]], block=3)
    torch.testing.assert_close(pair[0].maps, seg.maps)
    proposals = seg4diff.propose(tiny_flux, PICTURE)
    assert sorted(set(sum(proposals.members, []))) == list(range(24))        # every row of T5 is a candidate
    regions = seg4diff.propose(tiny_flux, PICTURE, regions="i2i")
    assert sorted(sum(regions.members, [])) == list(range(64))               # every anchor is in one region
    plain, = seg4diff.generate(tiny_flux, "red car", steps=2)
    blurred, = seg4diff.generate(tiny_flux, "red car", steps=2, pag=2.0, blocks=[3])
    assert plain.size == (128, 128) and np.abs(np.array(plain, int) - np.array(blurred, int)).max() > 0


def test_names_in_several_prompts(tiny_flux):
    names = [*scenes.CLASSES] * 2
    seg = seg4diff.segment(tiny_flux, PICTURE, names)
    assert seg.maps.shape == (30, 16, 16) and seg.maps.isfinite().all()


@pytest.mark.parametrize("task", ["ovss", "unsup", "layers", "heads", "timesteps", "normalization", "readings"])
def test_every_task(tiny_flux, task):
    rows = protocol.measure(tiny_flux, DATASETS["scenes"](), ["0"], task, protocol.TASKS[task].variants(tiny_flux)[:3])
    assert all(math.isfinite(row["mIoU"]) for row in rows.values()) and len(rows) > 1


def test_analysis(tiny_flux):
    steps = [2, 4]
    model = replace(tiny_flux, preset=replace(tiny_flux.preset, steps=4, noise_steps=2))
    mean, uniform = analysis.mean_shares(model, ["red car"], steps)
    assert mean.keys() == {2, 4} and all(len(shares) == 4 for shares in mean[2].values()) and 0 < uniform < 1


# ---------------------------------------------------------------------------- LoRA and MAGNET


def lora_of(sd, rank=3, seed=5):
    """A pair for every matrix of the blocks, under diffusers' (peft) names, and the weights with all of it merged."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    merged = dict(sd)
    for key, w in sd.items():
        if "transformer_blocks" in key and w.ndim == 2:
            a, b = torch.randn(rank, w.shape[1], generator=g), torch.randn(w.shape[0], rank, generator=g)
            name = "transformer." + key.removesuffix(".weight")
            pairs |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            merged[key] = w + b @ a
    return pairs, merged


def test_a_published_lora_of_every_layer(tmp_path):
    """Double and single blocks, attention, MLPs and modulations: as if it had been merged under diffusers' keys."""
    sd = {key: w.float() for key, w in load_file(GOLDEN / "diffusion_pytorch_model.safetensors").items()}
    pairs, merged = lora_of(sd)
    save_file(pairs, tmp_path / "lora.safetensors")
    model = Flux.from_state_dict(weights.from_diffusers("mmdit", sd))
    lora.load_lora(model, tmp_path / "lora.safetensors")
    lora.merge_lora(model)
    for key, want in weights.from_diffusers("mmdit", merged).items():
        torch.testing.assert_close(model.state_dict()[key], want, atol=1e-5, rtol=0)
    assert len(pairs) == 2 * (2 * 14 + 2 * 6)


def test_our_lora_of_a_flux(tiny_flux_file, tmp_path):
    """On q, k, v and output of the image stream, in single blocks on q, k, v; a part of a model leaves some out."""
    model = loading.load(tiny_flux_file, "cpu")
    cond = model.text.encode(["red car"])
    x = torch.randn(1, 16, 8, 8), torch.tensor([0.5]), cond.ctx, cond.pooled
    before = model.transformer(*x)[0]
    params = lora.add_lora(model.transformer, rank=2)
    assert len(params) == 2 * (2 * 4 + 2 * 3) and torch.equal(model.transformer(*x)[0], before)
    with torch.no_grad():
        for p in params:
            p.normal_(std=0.1)
    after = model.transformer(*x)[0]
    assert (after - before).abs().max() > 1e-3
    lora.save_lora(model.transformer, tmp_path / "l.safetensors")
    merged = loading.load(tiny_flux_file, "cpu", lora=tmp_path / "l.safetensors")
    torch.testing.assert_close(merged.transformer(*x)[0], after, atol=1e-5, rtol=0)
    part = loading.load(tiny_flux_file, "cpu", segment_only=True, lora=tmp_path / "l.safetensors")
    whole, some = merged.transformer.state_dict(), part.transformer.state_dict()
    assert len(some) < len(whole) and all(torch.equal(some[key], whole[key]) for key in some)
    key = "transformer.single_transformer_blocks.0.proj_mlp"
    save_file({f"{key}.lora_A.weight": torch.zeros(1, 64), f"{key}.lora_B.weight": torch.zeros(64, 1)},
              tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match=r"proj_mlp of single block 0 takes A \(rank, 64\) and B \(256, rank\)"):
        lora.load_lora(merged.transformer, tmp_path / "l.safetensors")


def test_a_step_of_magnet(tiny_flux_file):
    """By Hungarian matching and by name; the gradient reaches every pair of the LoRA."""
    model = loading.load(tiny_flux_file, "cpu")
    params = lora.add_lora(model.transformer, rank=2)
    pair = TRAINING_SETS["scenes"](None, None).read("1100000")
    for settings in (magnet.Settings(), magnet.Settings(match="name", maps="mean")):
        features = magnet.features(model, pair, settings.match == "name")
        losses = magnet.batch_losses(model, [features, features], [0, 1], settings)
        assert all(loss.isfinite() for loss in losses.values()) and losses["dice"] > 0
    losses["loss"].backward()
    assert all(b.grad.abs().max() > 0 for b in params[1::2])                 # A's gradient is 0 where B is


def test_no_lora_is_trained_in_blocks_that_wait_elsewhere(tiny_flux_file):
    model = loading.load(tiny_flux_file, "cpu")
    model.transformer.single_blocks[0].to("meta")        # in the place of host memory
    with pytest.raises(ValueError, match="wait in host memory"):
        lora.add_lora(model.transformer, rank=2)

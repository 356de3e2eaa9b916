"""The published checkpoints load: every key and shape of them, on the meta device, without the tensors.

tests/layouts holds the listings; make_layouts.py there derives them and checks them against the files' sizes.
"""
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flux
import judges
import mmdit
import text
import vae

FOLDER = Path(__file__).parent / "layouts"
KIND = {"sd3_medium": mmdit.MMDiT, "sd35_medium": mmdit.MMDiT, "sd35_large": mmdit.MMDiT, "vae": vae.VAE,
        "clip_l": text.CLIPText, "clip_g": text.CLIPText, "t5xxl": text.T5, "flux_dev": flux.Flux,
        "flux_schnell": flux.Flux}


def listing(name: str) -> dict[str, Tensor]:
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", KIND)
def test_loads(name):
    sd = listing(name)
    module = KIND[name].from_state_dict(sd)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in sd.items()}


@pytest.mark.parametrize("name, kind, size", [("judge_clip", judges.CLIP, 224), ("judge_dino", judges.DINO, 224)])
def test_judges_load(name, kind, size):
    """Under other names inside; all but CLIP's temperature is taken."""
    sd = listing(name)
    module = kind.from_state_dict(sd)
    taken = sum(w.numel() for key, w in sd.items() if key != "logit_scale")
    assert module.size == size and sum(p.numel() for p in module.parameters()) == taken


@pytest.mark.parametrize("name, width, depth, grid, qk_norm, dual", [
    ("sd3_medium", 1536, 24, 192, False, ()), ("sd35_medium", 1536, 24, 384, True, tuple(range(13))),
    ("sd35_large", 2432, 38, 192, True, ())])
def test_config(name, width, depth, grid, qk_norm, dual):
    c = mmdit.MMDiTConfig.from_state_dict(listing(name))
    assert (c.width, c.depth, c.heads, c.head_dim, c.mlp) == (width, depth, depth, 64, 4 * width)
    assert (c.patch, c.channels, c.pos_grid, c.ctx_dim, c.pooled_dim) == (2, 16, grid, 4096, 2048)
    assert (c.qk_norm, c.dual_blocks) == (qk_norm, dual)


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell"])
def test_config_of_flux(name):
    c = flux.FluxConfig.from_state_dict(listing(name))
    assert (c.width, c.heads, c.head_dim, c.mlp, c.time_dim) == (3072, 24, 128, 4 * 3072, 256)
    assert (c.double_blocks, c.single_blocks, c.depth, c.patch_of(16)) == (19, 38, 57, 2)
    assert (c.ctx_dim, c.pooled_dim, c.guidance, c.whole) == (4096, 768, name == "flux_dev", True)


def test_t5_of_the_single_files_holds_its_embedding_twice():
    sd = listing("t5xxl")
    tower = text.T5.from_state_dict(sd | {"encoder.embed_tokens.weight": sd["shared.weight"]})
    assert (tower.vocab, tower.width, len(tower.encoder.block)) == (32128, 4096, 24)
    assert tower.encoder.block[23].layer[0].SelfAttention.heads == 64

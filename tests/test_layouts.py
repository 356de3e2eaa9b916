"""The published checkpoints load: every key and shape of them, on the meta device, without the tensors.

tests/layouts holds the listings; make_layouts.py there derives them and checks them against the files' sizes.
"""
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmdit
import text
import vae

FOLDER = Path(__file__).parent / "layouts"
KIND = {"sd3_medium": mmdit.MMDiT, "sd35_medium": mmdit.MMDiT, "sd35_large": mmdit.MMDiT, "vae": vae.VAE,
        "clip_l": text.CLIPText, "clip_g": text.CLIPText}


def listing(name: str) -> dict[str, Tensor]:
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


@pytest.mark.parametrize("name", KIND)
def test_loads(name):
    sd = listing(name)
    module = KIND[name].from_state_dict(sd)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in sd.items()}


@pytest.mark.parametrize("name, width, depth, grid, qk_norm, dual", [
    ("sd3_medium", 1536, 24, 192, False, ()), ("sd35_medium", 1536, 24, 384, True, tuple(range(13))),
    ("sd35_large", 2432, 38, 192, True, ())])
def test_config(name, width, depth, grid, qk_norm, dual):
    c = mmdit.MMDiTConfig.from_state_dict(listing(name))
    assert (c.width, c.depth, c.heads, c.head_dim, c.mlp) == (width, depth, depth, 64, 4 * width)
    assert (c.patch, c.channels, c.pos_grid, c.ctx_dim, c.pooled_dim) == (2, 16, grid, 4096, 2048)
    assert (c.qk_norm, c.dual_blocks) == (qk_norm, dual)

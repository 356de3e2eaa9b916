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

# Of each network, keys that its config is read off and keys deep inside.
KEYS = {
    mmdit.MMDiT: ["pos_embed", "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.mlp.0.weight",
                  "context_embedder.weight", "joint_blocks.0.x_block.mlp.fc1.weight",
                  "joint_blocks.5.x_block.attn.qkv.weight", "joint_blocks.7.context_block.mlp.fc2.bias",
                  "joint_blocks.23.context_block.adaLN_modulation.1.weight", "final_layer.linear.bias"],
    vae.VAE: ["encoder.conv_in.weight", "encoder.down.1.block.0.nin_shortcut.weight",
              "encoder.down.2.downsample.conv.bias", "encoder.mid.attn_1.q.weight", "decoder.conv_in.weight",
              "decoder.up.0.block.2.norm1.weight", "decoder.up.3.upsample.conv.weight"],
    text.CLIPText: ["text_model.embeddings.token_embedding.weight",
                    "text_model.embeddings.position_embedding.weight",
                    "text_model.encoder.layers.0.mlp.fc1.weight",
                    "text_model.encoder.layers.4.self_attn.k_proj.bias",
                    "text_model.final_layer_norm.weight"],
}
CASES = [(name, key) for name, kind in KIND.items() for key in KEYS[kind]]


def listing(name: str) -> dict[str, Tensor]:
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def refused(name: str, sd: dict[str, Tensor], key: str) -> None:
    with pytest.raises(ValueError) as error:
        KIND[name].from_state_dict(sd)
    assert key in str(error.value)


@pytest.mark.parametrize("name", KIND)
def test_loads(name):
    sd = listing(name)
    module = KIND[name].from_state_dict(sd)
    assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in sd.items()}


@pytest.mark.parametrize("name, key", CASES)
def test_missing_key_is_named(name, key):
    sd = listing(name)
    del sd[key]
    refused(name, sd, key)


@pytest.mark.parametrize("name", KIND)
def test_surplus_key_is_named(name):
    refused(name, listing(name) | {"no.such.weight": torch.empty(1, device="meta")}, "no.such.weight")


@pytest.mark.parametrize("name, key", [
    ("sd3_medium", "joint_blocks.5.x_block.attn.proj.weight"), ("sd3_medium", "pos_embed"),
    ("sd35_medium", "joint_blocks.12.x_block.attn2.ln_k.weight"),
    ("sd35_large", "joint_blocks.37.context_block.adaLN_modulation.1.bias"),
    ("vae", "decoder.mid.attn_1.proj_out.weight"), ("clip_l", "text_model.final_layer_norm.bias"),
    ("clip_g", "text_projection.weight")])
def test_misshapen_key_is_named(name, key):
    sd = listing(name)
    sd[key] = torch.empty([n + 1 for n in sd[key].shape], device="meta")
    refused(name, sd, key)


@pytest.mark.parametrize("name, width, depth, grid, qk_norm, dual", [
    ("sd3_medium", 1536, 24, 192, False, ()), ("sd35_medium", 1536, 24, 384, True, tuple(range(13))),
    ("sd35_large", 2432, 38, 192, True, ())])
def test_config(name, width, depth, grid, qk_norm, dual):
    c = mmdit.MMDiTConfig.from_state_dict(listing(name))
    assert (c.width, c.depth, c.heads, c.head_dim, c.mlp) == (width, depth, depth, 64, 4 * width)
    assert (c.patch, c.channels, c.pos_grid, c.ctx_dim, c.pooled_dim) == (2, 16, grid, 4096, 2048)
    assert (c.qk_norm, c.dual_blocks) == (qk_norm, dual)

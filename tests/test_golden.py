"""Parity with diffusers and transformers on tiny random networks, and proof that parity can fail.

What those libraries computed lies in tests/golden; make_goldens.py there wrote it, and says how.
"""
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import mmdit
import seg4diff
import text
import vae

FOLDER = Path(__file__).parent / "golden"
MMDITS = ["mmdit_sd3", "mmdit_sd35_large", "mmdit_sd35_medium"]


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Weights in fp32 (stored in 8 bits, as the reference had them), inputs and outputs, metadata."""
    path = FOLDER / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as f:
        meta = f.metadata()
    weights = {key.removeprefix("w."): w.float() for key, w in tensors.items() if key.startswith("w.")}
    return weights, {key: t for key, t in tensors.items() if not key.startswith("w.")}, meta


def same(ours: Tensor, theirs: Tensor, tol: float = 1e-5) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=tol, rtol=0)


def differ(ours: Tensor, theirs: Tensor, by: float = 1e-2) -> None:
    """The two have one shape and are apart by far more than rounding."""
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() > by


def velocity(weights: dict[str, Tensor], g: dict[str, Tensor], time: float = 1, **kwargs):
    model = mmdit.MMDiT.from_state_dict(weights)
    with torch.no_grad():
        return model(g["in.z"], time * g["in.sigma"], g["in.ctx"], g["in.pooled"], **kwargs)


# ---------------------------------------------------------------------------- MM-DiT


@pytest.mark.parametrize("name", MMDITS)
def test_mmdit_velocity_and_attention(name):
    weights, g, meta = golden(name)
    block, n_img = int(meta["block"]), 4 * 6                    # 8 x 12 latents, patches of 2 x 2
    vel, taps = velocity(weights, g, capture={block})
    same(vel, g["out.vel"])

    assert taps.keys() == {block} and taps[block].n_img == n_img and taps[block].grid == (4, 6)
    probs = mmdit.joint_probs(taps[block])
    same(probs, g["out.probs"])
    image_rows, text_rows = g["out.probs"].split([n_img, g["in.ctx"].shape[1]], dim=2)       # diffusers', image first
    same(mmdit.i2i(probs, n_img), image_rows[..., :n_img])
    same(mmdit.i2t(probs, n_img), image_rows[..., n_img:])
    same(mmdit.t2i(probs, n_img), text_rows[..., :n_img])
    same(mmdit.t2t(probs, n_img), text_rows[..., n_img:])
    for chunk in (1, 7, 1000):
        same(mmdit.i2t_attention(taps[block], chunk=chunk), image_rows[..., n_img:])


@pytest.mark.parametrize("name", MMDITS)
def test_text_first_slicing_fails_parity(name):
    """Stability's own code puts the text first; its slice has the right shape, and wrong values."""
    weights, g, meta = golden(name)
    block, n_txt = int(meta["block"]), g["in.ctx"].shape[1]
    _, taps = velocity(weights, g, capture={block})
    differ(mmdit.i2t_attention(taps[block]), g["out.probs"][:, :, n_txt:, :n_txt])


def swap_final_halves(weights: dict[str, Tensor]) -> None:
    """Scale before shift, as diffusers stores the last modulation."""
    for key in weights:
        if key.startswith("final_layer.adaLN_modulation"):
            weights[key] = torch.cat(weights[key].chunk(2)[::-1])


def swap_last_context_halves(weights: dict[str, Tensor]) -> None:
    """The other swap between the two layouts; the smallest error of all, and easily taken for rounding."""
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("joint_blocks."))
    for part in ("weight", "bias"):
        key = f"joint_blocks.{last}.context_block.adaLN_modulation.1.{part}"
        weights[key] = torch.cat(weights[key].chunk(2)[::-1])


def fuse_by_position(weights: dict[str, Tensor]) -> None:
    """k, v, q: the order in which diffusers happens to list the context's projections."""
    for key in weights:
        if ".context_block.attn.qkv." in key:
            q, k, v = weights[key].chunk(3)
            weights[key] = torch.cat([k, v, q])


@pytest.mark.parametrize("damage", [swap_final_halves, swap_last_context_halves, fuse_by_position])
@pytest.mark.parametrize("name", MMDITS)
def test_wrong_weights_fail_parity(name, damage):
    weights, g, _ = golden(name)
    damage(weights)
    differ(velocity(weights, g)[0], g["out.vel"])


@pytest.mark.parametrize("name", MMDITS)
def test_wrong_time_fails_parity(name):
    weights, g, _ = golden(name)
    differ(velocity(weights, g, time=1e-3)[0], g["out.vel"])    # sinusoids of sigma, not of 1000 * sigma


# ---------------------------------------------------------------------------- autoencoder


def test_vae():
    weights, g, _ = golden("vae")
    model = vae.VAE.from_state_dict(weights)
    with torch.no_grad():
        same(model.encode(g["in.x"]), g["out.z"])
        same(model.decode(g["out.z"]), g["out.decoded"])
        differ(model.decode(g["out.mean"]), g["out.decoded"])   # shift and scale belong inside decode
    same((g["out.mean"] - vae.SHIFT) * vae.SCALE, g["out.z"])


def test_norm_of_large_maps():
    """A million values a group, as 1024 x 1024 pixels have: against fp64, in both memory formats."""
    norm = vae.Norm(2, 8)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 8, 512, 512, generator=torch.Generator().manual_seed(1)) + 1
    exact = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps)
    for memory in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory)
        got = norm(given)
        assert got.is_contiguous(memory_format=memory) and (got - exact).abs().max() < 1e-5
    narrow = x / 100 + 10                                # the square of the mean is a million times the variance
    exact_narrow = F.group_norm(narrow.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps)
    assert (norm(narrow) - exact_narrow).abs().max() < 1e-3
    assert (norm(torch.full_like(x, 100.3)) - norm.bias[:, None, None]).abs().max() < 0.05       # no variance at all
    norm.bfloat16()
    assert torch.allclose(norm(x.bfloat16()).double(), exact, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------- text towers


def encode(weights: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return text.CLIPText.from_state_dict(weights)(ids)


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
@pytest.mark.parametrize("prefix", ["text_model.", ""])         # newer exports of transformers lack it
def test_clip(name, prefix):
    weights, g, _ = golden(name)
    weights = {key.replace("text_model.", prefix): w for key, w in weights.items()}
    hidden, pooled = encode(weights, g["in.ids"])
    same(hidden, g["out.hidden"])
    same(pooled, g["out.pooled"])


def test_clip_l_of_the_folder_layout():
    """SD3's folder layout gives CLIP-L an identity projection; it must not be taken for CLIP-G."""
    weights, g, _ = golden("clip_l")
    hidden, pooled = encode(weights | {"text_projection.weight": torch.eye(128)}, g["in.ids"])
    same(hidden, g["out.hidden"])
    same(pooled, g["out.pooled"])


def test_wrong_gelu_fails_parity():
    """Any other projection means CLIP-G and its exact GELU, and the other way round."""
    weights, g, _ = golden("clip_l")
    hidden, _ = encode(weights | {"text_projection.weight": 2 * torch.eye(128)}, g["in.ids"])
    differ(hidden, g["out.hidden"])
    weights, g, _ = golden("clip_g")
    del weights["text_projection.weight"]
    hidden, _ = encode(weights, g["in.ids"])
    differ(hidden, g["out.hidden"])


# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("steps", [28, 50])
def test_sigmas(steps):
    _, g, _ = golden("sigmas")
    ours = seg4diff.sigmas(steps, 3.0)
    same(ours, g[f"sigmas_{steps}"], tol=1e-6)
    differ(seg4diff.sigmas(steps, 1.0), ours)


def test_sigma_of_the_paper():
    """The official code's 8th from the end of 28; shifting only once gives 0.5132, missing by one 0.4649."""
    assert abs(float(seg4diff.sigmas(28, 3.0)[20]) - 0.5150721) < 1e-6


# ---------------------------------------------------------------------------- loading


LOADERS = [*((name, mmdit.MMDiT) for name in MMDITS),
           ("vae", vae.VAE), ("clip_l", text.CLIPText), ("clip_g", text.CLIPText)]
DEEP = {"mmdit_sd3": "joint_blocks.1.x_block.attn.proj.weight", "vae": "decoder.mid.attn_1.proj_out.weight",
        "mmdit_sd35_large": "joint_blocks.2.context_block.adaLN_modulation.1.bias",
        "mmdit_sd35_medium": "joint_blocks.1.x_block.attn2.ln_k.weight",
        "clip_l": "text_model.final_layer_norm.bias", "clip_g": "text_projection.weight"}


def refused(kind: type, sd: dict[str, Tensor], key: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        kind.from_state_dict(sd)
    assert key in str(error.value)


def one_of_each_kind(keys) -> list[str]:
    """Of keys that differ in the numbers of blocks and layers alone, the last."""
    return list({re.sub(r"\d+", "0", key): key for key in sorted(keys)}.values())


@pytest.mark.parametrize("name, kind", LOADERS)
def test_every_missing_key_is_named(name, kind):
    """Whether a config is read off it or not.  Without its projection CLIP-G would be a CLIP-L."""
    weights, _, _ = golden(name)
    for key in one_of_each_kind(weights.keys() - {"text_projection.weight"}):
        refused(kind, {k: w for k, w in weights.items() if k != key}, key, "1 missing|has no")


@pytest.mark.parametrize("name, kind", LOADERS)
def test_surplus_and_misshapen_keys_are_named(name, kind):
    weights, _, _ = golden(name)
    refused(kind, weights | {"no.such.weight": torch.empty(1)}, "no.such.weight", "1 surplus")
    for key in (DEEP[name], *(["pos_embed"] if "pos_embed" in weights else [])):
        refused(kind, weights | {key: torch.empty([n + 1 for n in weights[key].shape])}, key, "misshapen")

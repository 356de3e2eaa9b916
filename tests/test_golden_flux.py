"""Parity of flux.py with diffusers and of t5.py with transformers on tiny random networks, and proof that it can fail.

What those libraries computed lies in tests/golden; make_flux_goldens.py there wrote it.
"""
import pytest
import torch
from test_golden import differ, golden, refused, same
from torch import Tensor

import flux
import mmdit
import t5
import text

FLUXES = ["flux_dev", "flux_schnell"]
N_IMG = 4 * 6                           # 8 x 12 latents, patches of 2 x 2


def velocity(weights: dict[str, Tensor], g: dict[str, Tensor], **kwargs):
    model = flux.Flux.from_state_dict(weights)
    with torch.no_grad():
        return model(g["in.z"], g["in.sigma"], g["in.ctx"], g["in.pooled"], **kwargs)


def image_first(probs: Tensor, M: int) -> Tensor:
    """diffusers' attention, whose rows and columns begin with M text tokens, in the paper's order."""
    rows = torch.cat([probs[:, :, M:], probs[:, :, :M]], dim=2)
    return torch.cat([rows[..., M:], rows[..., :M]], dim=3)


# ---------------------------------------------------------------------------- Flux


@pytest.mark.parametrize("name", FLUXES)
def test_velocity_and_attention_of_both_kinds_of_blocks(name):
    """Block 1 is a double one, block 2 the first single one."""
    weights, g, _ = golden(name)
    vel, taps = velocity(weights, g, capture={1, 2})
    same(vel, g["out.vel"])
    M = g["in.ctx"].shape[1]
    for block in (1, 2):
        qkv = taps[block]
        assert qkv.n_img == N_IMG and qkv.grid == (4, 6)
        theirs = image_first(g[f"out.probs_{block}"], M)
        same(mmdit.joint_probs(qkv), theirs)
        same(mmdit.i2t_attention(qkv, chunk=7), theirs[:, :, :N_IMG, N_IMG:])
        differ(mmdit.i2t_attention(qkv), g[f"out.probs_{block}"][:, :, :N_IMG, N_IMG:], by=1e-3)    # text first


def test_guidance_is_read_where_the_model_reads_it():
    weights, g, _ = golden("flux_dev")
    differ(velocity(weights, g, guidance=1.0)[0], g["out.vel"])
    weights, g, _ = golden("flux_schnell")
    same(velocity(weights, g, guidance=1.0)[0], g["out.vel"])


def swap_final_halves(weights: dict[str, Tensor]) -> None:
    """Scale before shift, as diffusers stores the last modulation."""
    for key in weights:
        if key.startswith("final_layer.adaLN_modulation"):
            weights[key] = torch.cat(weights[key].chunk(2)[::-1])


def gate_first(weights: dict[str, Tensor]) -> None:
    """A single block's modulation in another order."""
    for key in weights:
        if key.startswith("single_blocks.0.modulation.lin"):
            weights[key] = torch.cat(weights[key].chunk(3)[::-1])


def swap_modalities(weights: dict[str, Tensor]) -> None:
    """The image's norms of q and k for the text, and the other way round."""
    for key in list(weights):
        if ".img_attn.norm." in key:
            twin = key.replace("img_attn", "txt_attn")
            weights[key], weights[twin] = weights[twin], weights[key]


def attention_last(weights: dict[str, Tensor]) -> None:
    """linear2 reads the attention's columns first, then the MLP's."""
    for key in weights:
        if key.endswith("linear2.weight"):
            weights[key] = weights[key].roll(-len(weights[key]), dims=1)


def channels_fastest(weights: dict[str, Tensor]) -> None:
    """SD3's order of the numbers of a patch."""
    w = weights["img_in.weight"]
    weights["img_in.weight"] = w.unflatten(1, (4, 4)).mT.flatten(1)          # (D, p*p*C)


@pytest.mark.parametrize("damage", [swap_final_halves, gate_first, swap_modalities, attention_last, channels_fastest])
@pytest.mark.parametrize("name", FLUXES)
def test_wrong_weights_fail_parity(name, damage):
    weights, g, _ = golden(name)
    damage(weights)
    differ(velocity(weights, g)[0], g["out.vel"])


def test_wrong_time_fails_parity():
    weights, g, _ = golden("flux_dev")
    differ(velocity(weights, g | {"in.sigma": 1000 * g["in.sigma"]})[0], g["out.vel"])


@pytest.mark.parametrize("wrong", ["rows for columns", "text turned, too", "halves instead of neighbours"])
def test_wrong_rotations_fail_parity(wrong, monkeypatch):
    weights, g, _ = golden("flux_dev")
    right, turn = flux.rotary, flux.rotate

    def rotary(grid, M, head_dim, device):
        if wrong == "rows for columns":
            where = right(grid[::-1], M, head_dim, device)
            return where._replace(grid=grid)
        if wrong == "text turned, too":
            where = right(grid, M, head_dim, device)
            return where._replace(cos=where.cos.roll(1, 0), sin=where.sin.roll(1, 0))
        return right(grid, M, head_dim, device)

    def rotate(x, where):
        if wrong != "halves instead of neighbours":
            return turn(x, where)
        halves = x.unflatten(-1, (2, -1)).mT.flatten(-2)
        return turn(halves, where)

    monkeypatch.setattr(flux, "rotary", rotary)
    monkeypatch.setattr(flux, "rotate", rotate)
    differ(velocity(weights, g)[0], g["out.vel"], by=1e-3)


# ---------------------------------------------------------------------------- T5


def encode(weights: dict[str, Tensor], ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return text.T5.from_state_dict(weights, **kwargs)(ids)


def test_t5():
    """In fp32, and in bf16 up to its rounding; a published file may hold the embedding twice, or only as the twin."""
    weights, g, _ = golden("t5")
    same(encode(weights, g["in.ids"]), g["out.hidden"])
    twice = weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}
    same(encode(twice, g["in.ids"]), g["out.hidden"])
    del twice["shared.weight"]
    same(encode(twice, g["in.ids"]), g["out.hidden"])
    key = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for few in (weights[key][:2], weights[key][:, :1].expand(-1, 3)):        # 2 buckets; 3 heads of 32 columns
        with pytest.raises(ValueError, match="T5's attention cannot have 32 columns"):
            encode(weights | {key: few}, g["in.ids"])
    half = encode(weights, g["in.ids"], dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert (half.float() - g["out.hidden"]).norm() < 0.03 * g["out.hidden"].norm()


def test_t5_in_float16_does_not_overflow():
    """Where the residual stream and the MLP's sums leave the range, as they do in the published weights."""
    weights, g, _ = golden("t5")
    for key in weights:
        if key.endswith("wo.weight"):
            weights[key] = 3e4 * weights[key]
    full = encode(weights, g["in.ids"])
    half = encode(weights, g["in.ids"], dtype=torch.float16)
    assert half.dtype == torch.float16 and half.isfinite().all()
    assert (half.float() - full).norm() < 0.03 * full.norm()


def test_wrong_weights_of_t5_fail_parity():
    weights, g, _ = golden("t5")
    gates = {k: weights[k.replace("wi_0", "wi_x").replace("wi_1", "wi_0").replace("wi_x", "wi_1")] for k in weights}
    differ(encode(gates, g["in.ids"]), g["out.hidden"])
    key = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    differ(encode(weights | {key: weights[key].roll(16, 0)}, g["in.ids"]), g["out.hidden"])      # before and after
    scaled = {k: w / 4 if k.endswith("SelfAttention.q.weight") else w for k, w in weights.items()}   # 1 / sqrt(d)
    differ(encode(scaled, g["in.ids"]), g["out.hidden"])


def test_distance_buckets():
    """The distance at which each range begins, from the published table; 16 more for keys after the query."""
    begins = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    bucket = t5.distance_buckets(300, 32)
    for distance in range(300):
        wanted = sum(first <= distance for first in begins) - 1
        assert bucket[distance, 0] == wanted
        assert bucket[0, distance] == wanted + (16 if distance else 0)


# ---------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name, kind, deep", [
    ("flux_dev", flux.Flux, "single_blocks.1.norm.key_norm.scale"),
    ("flux_schnell", flux.Flux, "double_blocks.1.txt_mlp.2.bias"),
    ("t5", text.T5, "encoder.block.2.layer.1.DenseReluDense.wo.weight")])
def test_missing_surplus_and_misshapen_keys_are_named(name, kind, deep):
    weights, _, _ = golden(name)
    for key in sorted(weights)[::4]:
        refused(kind, {k: w for k, w in weights.items() if k != key}, key, "1 missing|has no")
    refused(kind, weights | {"no.such.weight": torch.empty(1)}, "no.such.weight", "1 surplus")
    refused(kind, weights | {deep: torch.empty([n + 1 for n in weights[deep].shape])}, deep, "misshapen")

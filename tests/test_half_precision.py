"""In half precision: what is computed in fp32 all the same, and that everything runs."""
import copy
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_mmdit import FLUX, PLAIN, M, build, inputs

import flux
import loading
import mmdit
import sampling
import seg4diff
from mmdit import JointQKV, i2t_attention, i2t_scores, joint_probs, sinusoids, t2i_attention


def big_bf16():
    q, k, v = (4 * torch.randn(3, 1, 2, 7, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    return JointQKV(q, k, v, 4, (2, 2))


@pytest.mark.parametrize("f", [joint_probs, i2t_scores, i2t_attention, t2i_attention])
def test_maps_of_half_precision_are_computed_in_fp32(f):
    half = big_bf16()
    full = half._replace(q=half.q.float(), k=half.k.float(), v=half.v.float())
    assert f(half).dtype == torch.float32 and torch.equal(f(half), f(full))


def test_chunks_of_maps_are_copies(monkeypatch):
    seen = []
    cat = torch.cat
    monkeypatch.setattr(mmdit.torch, "cat", lambda xs, dim: seen.extend(xs) or cat(xs, dim=dim))
    i2t_attention(big_bf16(), chunk=2)
    assert [x.untyped_storage().nbytes() for x in seen] == [x.numel() * 4 for x in seen]


@pytest.mark.parametrize("cfg", [PLAIN, FLUX])
def test_edit_and_mix_in_bf16(cfg):
    z, sigma, ctx, pooled = inputs(cfg)
    model = build(cfg).bfloat16()
    x = z.bfloat16(), sigma, ctx.bfloat16(), pooled.bfloat16()
    vel, _ = model(*x)
    edited, _ = model(*x, edit={1: lambda probs, qkv: probs})
    mixed, _ = model(*x, mix={1: torch.eye(M)[None]})
    for other in (edited, mixed):
        assert other.dtype == torch.bfloat16 and (other - vel).float().norm() < 0.02 * vel.float().norm()


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_time_is_embedded_in_fp32(tiny, tiny_flux, which):
    model = copy.copy({"sd3": tiny, "flux": tiny_flux}[which])
    model.transformer = copy.deepcopy(model.transformer).bfloat16()
    cond = model.text.encode(["car"])
    seen = []
    embedder = model.transformer.t_embedder if which == "sd3" else model.transformer.time_in
    embedder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    z = torch.zeros(1, 16, 8, 8)
    model(z, 0.3771, cond.ctx.bfloat16(), cond.pooled.bfloat16())
    dim = model.transformer.config.time_dim
    assert torch.equal(seen[0], sinusoids(torch.tensor([0.3771]) * 1000, dim))


def test_clamped_by_hand():
    x = torch.tensor([-torch.inf, 1.0, torch.inf]).half()
    assert flux.clamped(x).tolist() == [-65504, 1, 65504]


@pytest.mark.parametrize("norm", [mmdit.RMSNorm(8), flux.RMSNorm(8)])
def test_epsilon_of_the_norms(norm):
    x = torch.full((1, 8), 1e-3)
    torch.testing.assert_close(norm(x), torch.full((1, 8), 0.5 ** 0.5))
    big = torch.full((1, 8), 3e4).half()
    assert norm.half()(big).tolist() == [[1.0] * 8]


def test_rotation_is_computed_in_fp32():
    where = flux.rotary((64, 64), 0, 32, None)
    x = torch.randn(1, 1, 4096, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(flux.rotate(x, where), flux.rotate(x.float(), where).bfloat16())


def test_guidance_is_computed_in_fp32(tiny):
    model = copy.copy(tiny)
    model.transformer = copy.deepcopy(tiny.transformer).bfloat16()
    with torch.inference_mode():
        cond, uncond = (tiny.text.encode([p]) for p in ("red car", ""))
        cond, uncond = (c._replace(ctx=c.ctx.bfloat16(), pooled=c.pooled.bfloat16()) for c in (cond, uncond))
        seen = []
        hook = model.transformer.register_forward_hook(lambda m, a, out: seen.append(out[0].float()))
        velocity = sampling.guided_velocity(model, cond, uncond, 7.5, 1.0, [1])
        got = velocity(seg4diff.noise((16, 8, 8), [0]), torch.tensor([0.5]))
        hook.remove()
    u, c, p = seen[0].chunk(3)
    assert got.dtype == torch.float32 and torch.equal(got, u + 7.5 * (c - u) + 1.0 * (c - p))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_generates_in_half_precision(tiny_file, tiny_flux_file, dtype):
    for file in (tiny_file, tiny_flux_file):
        model = seg4diff.load(file, "cpu", dtype)
        (image,) = seg4diff.generate(model, "red car", steps=1, pag=1.0, perturb=[0])
        assert image.size == (128, 128)


def test_pictures_are_scaled_before_they_are_rounded():
    model = SimpleNamespace(preset=SimpleNamespace(size=16), vae=SimpleNamespace(encode=lambda x: x), device="cpu",
                            dtype=torch.bfloat16)
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    x = loading.encode_image(model, Image.fromarray(pixels.numpy()))
    assert torch.equal(x[0, 0], (pixels.float() / 127.5 - 1).bfloat16())


def test_sampling_starts_from_fp32_noise_and_stays_there(tiny, monkeypatch):
    model = copy.copy(tiny)
    model.transformer = copy.deepcopy(tiny.transformer).bfloat16()
    model.vae = copy.deepcopy(tiny.vae).bfloat16()
    model.text = copy.deepcopy(tiny.text).bfloat16()
    model.text.cache = {}
    seen = []
    real = sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda velocity, z, *rest: seen.append(z) or real(velocity, z, *rest))
    seg4diff.generate(model, "car", steps=2, callback=lambda i, z: seen.append(z))
    assert {z.dtype for z in seen} == {torch.float32} and torch.equal(seen[0], seg4diff.noise((16, 16, 16), [0]))

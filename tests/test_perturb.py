"""The perturbation of Sec. 3.3 in its explicit and its fast form, and Eq. 7 by hand."""
import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d
from torch import Tensor

import seg4diff
from mmdit import JointQKV, MMDiT, MMDiTConfig, i2t, joint_probs
from seg4diff import blur_matrix, generate, guided_velocity


def blur_i2t(probs: Tensor, qkv: JointQKV) -> Tensor:
    """The perturbation as the paper has it, an `edit`: joint attention (B, H, N+M, N+M), its I2T part blurred."""
    N = qkv.n_img
    M = probs.shape[-1] - N
    out = probs.clone()
    out[:, :, :N, N:] = probs[:, :, :N, N:] @ blur_matrix(M)
    return out


@pytest.mark.parametrize("M", [3, 5, 17, 154])
def test_blur_matrix_is_a_gaussian_with_the_edge_repeated(M):
    """scipy's "reflect" repeats the edge; sum over tokens stays, whatever the tokens hold."""
    rows = np.random.default_rng(0).random((4, M))
    kernel = np.exp(-np.arange(-2, 3) ** 2 / (2 * 9.0 ** 2))
    want = convolve1d(rows, kernel / kernel.sum(), axis=1, mode="reflect")
    got = torch.from_numpy(rows).float() @ blur_matrix(M)
    assert np.abs(got.numpy() - want).max() < 1e-5
    assert torch.allclose(got.sum(1), torch.from_numpy(rows).float().sum(1), atol=1e-4)


def test_reflection_without_the_edge_would_lose_mass():
    """What the docstring says: an attended <sos> token keeps three fifths of its mass."""
    start = torch.zeros(1, 1, 20)
    start[..., 0] = 1
    padded = torch.nn.functional.pad(start, (2, 2), mode="reflect")[0, 0]
    kernel = torch.exp(-torch.arange(-2, 3).square() / (2 * 9.0 ** 2))
    blurred = padded.unfold(0, 5, 1) @ (kernel / kernel.sum())
    assert blurred.sum().item() == pytest.approx(0.6, abs=0.01)
    assert (start[0] @ blur_matrix(20)).sum().item() == pytest.approx(1)


def random_model(qk_norm: bool, dual: tuple[int, ...]) -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(MMDiTConfig(width=128, depth=3, head_dim=64, patch=2, channels=4, pos_grid=8, ctx_dim=16,
                              pooled_dim=8, mlp=256, time_dim=32, qk_norm=qk_norm, dual_blocks=dual))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".ln_" in name:
                p.fill_(2.0)                                                 # attention that is far from uniform
            else:
                p.normal_(std=0.2)
    return model.eval()


@pytest.mark.parametrize("qk_norm, dual", [(False, ()), (True, (0, 1))], ids=["SD3", "SD3.5"])
@torch.inference_mode()
def test_mixed_values_are_the_explicit_blur(qk_norm, dual):
    model = random_model(qk_norm, dual)
    args = torch.randn(2, 4, 12, 8), torch.tensor([0.3, 0.9]), torch.randn(2, 11, 16), torch.randn(2, 8)
    plain, taps = model(*args, capture={0, 1})
    blur = blur_matrix(11)[None]                                             # (1, M, M), for every row of the batch
    first_only = torch.stack([blur_matrix(11), torch.eye(11)])               # (B, M, M)
    for blocks in ([1], [0, 2]):
        explicit, _ = model(*args, edit=dict.fromkeys(blocks, blur_i2t))
        fast, _ = model(*args, mix=dict.fromkeys(blocks, blur))
        assert (explicit - fast).abs().max() < 1e-4 * plain.abs().max() < (explicit - plain).abs().max()
        first, _ = model(*args, mix=dict.fromkeys(blocks, first_only))
        assert torch.allclose(first[0], fast[0], atol=1e-4)
        assert torch.allclose(first[1], plain[1], atol=1e-4)
    probs = joint_probs(taps[1])
    blurred = blur_i2t(probs, taps[1])
    N = taps[1].n_img
    assert torch.allclose(i2t(blurred, N).sum(-1), i2t(probs, N).sum(-1), atol=1e-6)         # mass of each image token
    blurred[:, :, :N, N:] = probs[:, :, :N, N:]
    assert torch.equal(blurred, probs)                                       # nothing else was touched


def test_a_block_cannot_be_edited_and_mixed():
    model = random_model(False, ())
    with pytest.raises(ValueError, match=r"blocks \[1\] are in both"):
        model(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 5, 16), torch.zeros(1, 8), edit={1: blur_i2t},
              mix={1: torch.eye(5)[None]})


@torch.inference_mode()
def test_equation_7_by_hand(tiny):
    """Guidance alone (pag 0), the perturbation alone (cfg 1), and both, with a noise level for each picture."""
    cond = tiny.text.encode(["red car", "snow"])
    uncond = tiny.text.encode(["", ""])
    z = seg4diff.noise((16, 8, 8), [0, 1])
    sigma = torch.tensor([0.9, 0.3])

    def alone(c, edit=None):
        return tiny.transformer(z, sigma, c.ctx, c.pooled, edit=edit)[0]

    vel = alone(cond)
    empty = alone(uncond)
    worse = alone(cond, {1: blur_i2t})
    empty_worse = alone(uncond, {1: blur_i2t})
    assert (worse - vel).abs().max() > 1e-4
    for cfg, pag in ((0, 0.0), (1, 0.0), (3.5, 0.0), (1.0, 2.0), (3.0, 2.0), (3.0, -1.0)):
        want = empty + cfg * (vel - empty) + pag * (vel - worse)             # Eq. 7 over guidance
        got = guided_velocity(tiny, cond, uncond, cfg, pag, [1])(z, sigma)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    for cfg in (1.0, 3.0):                                                   # Fig. 5: every branch is blurred
        got = guided_velocity(tiny, cond, uncond, cfg, perturb=[1])(z, sigma)
        torch.testing.assert_close(got, empty_worse + cfg * (worse - empty_worse), atol=1e-4, rtol=0)


def test_options_of_generate(tiny):
    def picture(**options):
        return np.asarray(generate(tiny, "a red car", steps=2, **options)[0]).astype(int)

    usual = picture()
    assert (usual == picture(pag=0.0)).all()
    expert = picture(pag=5.0)
    assert (expert == picture(pag=5.0, blocks=[tiny.preset.block])).all()
    assert (expert != usual).any()
    assert (picture(pag=5.0, blocks=[0, 2]) != expert).any()
    assert (picture(perturb=[0]) != usual).any()
    for options in ({"pag": 1.0, "blocks": [3]}, {"perturb": [-1]}):
        with pytest.raises(ValueError, match="blocks are 0 to 2"):
            picture(**options)
    with pytest.raises(ValueError, match="scale pag is 0"):
        picture(blocks=[2])
    with pytest.raises(ValueError, match="finite"):
        picture(pag=float("nan"))

"""What must hold between the ways to run an MM-DiT, Flux too, and to read its attention, on tiny random weights."""
import math

import pytest
import torch
from torch import Tensor

from flux import Flux, FluxConfig
from mmdit import (
    JointQKV,
    MMDiT,
    MMDiTConfig,
    i2i,
    i2t,
    i2t_attention,
    i2t_scores,
    joint_attention,
    joint_probs,
    t2i,
    t2i_attention,
    t2t,
)

# All lengths differ, so that a swapped pair shows. The second is SD3.5 Medium's kind.
PLAIN = MMDiTConfig(width=64, depth=3, head_dim=32, patch=2, channels=4, pos_grid=7, ctx_dim=24, pooled_dim=12,
                    mlp=96, time_dim=16)
DUAL = MMDiTConfig(width=96, depth=3, head_dim=32, patch=1, channels=5, pos_grid=8, ctx_dim=20, pooled_dim=10,
                   mlp=80, time_dim=18, qk_norm=True, dual_blocks=(0, 1))
# two double blocks, then a single one; 4 channels in patches of 2 x 2
FLUX = FluxConfig(width=96, double_blocks=2, single_blocks=1, head_dim=32, columns=16, ctx_dim=24, pooled_dim=12,
                  mlp=80, time_dim=16)
CONFIGS = {"plain": PLAIN, "dual": DUAL, "flux": FLUX}
M, SIDES = 9, (4, 6)                    # text tokens; height and width of the latent


def build(cfg: MMDiTConfig | FluxConfig) -> MMDiT | Flux:
    torch.manual_seed(0)
    model = (Flux if isinstance(cfg, FluxConfig) else MMDiT)(cfg).requires_grad_(False)
    for p in (*model.parameters(), *model.buffers()):
        p.normal_(std=0.15)
    return model


def latent(cfg: MMDiTConfig | FluxConfig) -> tuple[int, int]:
    """Channels, and pixels per token and side, of which Flux's shapes tell but the product."""
    return (4, cfg.patch_of(4)) if isinstance(cfg, FluxConfig) else (cfg.channels, cfg.patch)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> MMDiT | Flux:
    return build(CONFIGS[request.param])


def inputs(cfg: MMDiTConfig | FluxConfig, B: int = 2, h: int = SIDES[0], w: int = SIDES[1]) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return (torch.randn(B, latent(cfg)[0], h, w, generator=g), torch.linspace(0.2, 0.8, B),
            torch.randn(B, M, cfg.ctx_dim, generator=g), torch.randn(B, cfg.pooled_dim, generator=g))


def close(a: Tensor, b: Tensor, tol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tol, rtol=0)


def equal(a: JointQKV, b: JointQKV) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3])) and a[3:] == b[3:]


# ---------------------------------------------------------------------------- attention, by hand and in pieces


def test_probs_by_hand():
    """One image and one text token of width 1: weights 1/(1+e) and e/(1+e)."""
    q, k = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    qkv = JointQKV(q[None, None], k[None, None], torch.tensor([[[[10.0], [20.0]]]]), 1, (1, 1))
    e = math.e
    close(joint_probs(qkv)[0, 0], torch.tensor([[1 / (1 + e), e / (1 + e)], [0.5, 0.5]]))
    close(i2t_attention(qkv), torch.full((1, 1, 1, 1), e / (1 + e)))
    close(t2i_attention(qkv), torch.full((1, 1, 1, 1), 0.5))
    close(i2t_scores(qkv), torch.ones(1, 1, 1, 1))
    close(joint_attention(qkv), torch.tensor([[[(10 + 20 * e) / (1 + e)], [15.0]]]))
    wide = JointQKV(*(x.repeat(1, 1, 1, 4) for x in qkv[:3]), 1, (1, 1))     # q.k = 4, divided by sqrt(4)
    close(i2t_scores(wide), torch.full((1, 1, 1, 1), 2.0))


def test_the_four_pathways_by_hand():
    """Each against a softmax written out query by query and key by key: N = 3 image tokens, then M = 2 of text."""
    H, N, M, d = 2, 3, 2, 4
    q, k, v = torch.randn(3, 1, H, N + M, d, generator=torch.Generator().manual_seed(2))
    probs = joint_probs(JointQKV(q, k, v, N, (1, N)))
    image, text = range(N), range(N, N + M)
    for pathway, queries, keys in ((i2i, image, image), (i2t, image, text), (t2i, text, image), (t2t, text, text)):
        part = pathway(probs, N)
        assert part.shape == (1, H, len(queries), len(keys))
        for head in range(H):
            for row, i in enumerate(queries):
                weights = [math.exp(float(q[0, head, i] @ k[0, head, j]) / math.sqrt(d)) for j in range(N + M)]
                want = [weights[j] / sum(weights) for j in keys]
                close(part[0, head, row], torch.tensor(want))


def test_slices_of_the_whole(model):
    _, taps = model(*inputs(model.config), capture=range(3))
    for qkv in taps.values():
        n, probs = qkv.n_img, joint_probs(qkv)
        close(probs.sum(-1), torch.ones(probs.shape[:-1]))
        for chunk in (1, 5, n, 512):
            close(i2t_attention(qkv, chunk), i2t(probs, n), 1e-6)
        close(t2i_attention(qkv), t2i(probs, n), 1e-6)
        # the softmax over a row is one constant away from the scores' exponential
        ratio = i2t(probs, n).log() - i2t_scores(qkv)
        close(ratio, ratio[..., :1].expand_as(ratio), 1e-4)


def test_the_explicit_softmax_is_the_fused_one(model):
    x = inputs(model.config)
    vel, taps = model(*x, capture={1})
    close(joint_attention(taps[1], edit=lambda probs, qkv: probs), joint_attention(taps[1]))
    edited, _ = model(*x, edit={i: lambda probs, qkv: probs for i in range(3)})
    close(edited, vel, 1e-4)


def test_edit(model):
    """It is given its own block's q, k, v, and what it returns is used: in that block and in no earlier one."""
    x, seen = inputs(model.config), []

    def blind(probs, qkv):
        seen.append((probs, qkv))
        probs = probs.clone()
        probs[:, :, :qkv.n_img, qkv.n_img:] = 0
        return probs

    vel, before = model(*x, capture=range(3))
    edited, after = model(*x, capture=range(3), edit={1: blind})
    (probs, qkv), = seen
    equal(qkv, before[1])
    close(probs, joint_probs(qkv))
    assert (edited - vel).abs().max() > 1e-3
    equal(after[1], before[1])
    assert (after[2].q - before[2].q)[:, :, :qkv.n_img].abs().max() > 1e-3
    close(after[2].q[:, :, qkv.n_img:], before[2].q[:, :, qkv.n_img:])       # text rows were left alone


def test_mix_multiplies_the_i2t_attention(model):
    """One matrix for each sample, or one for all; text rows are left alone."""
    x = inputs(model.config)
    _, taps = model(*x, capture={1})
    qkv, N = taps[1], taps[1].n_img
    mix = torch.rand(2, M, M, generator=torch.Generator().manual_seed(3))

    def multiplied(probs, _):
        out = probs.clone()
        out[:, :, :N, N:] = probs[:, :, :N, N:] @ mix[:, None]
        return out

    close(joint_attention(qkv, mix=mix), joint_attention(qkv, edit=multiplied))
    assert torch.equal(joint_attention(qkv, mix=mix[:1]), joint_attention(qkv, mix=mix[:1].expand(2, -1, -1)))
    close(model(*x, mix={1: mix})[0], model(*x, edit={1: multiplied})[0], 1e-4)
    with pytest.raises(ValueError, match="both edit and mix"):
        model(*x, edit={1: multiplied}, mix={1: mix})


# ---------------------------------------------------------------------------- the run


def test_stop_and_capture(model):
    x = inputs(model.config)
    vel, none = model(*x)
    full, taps = model(*x, capture=range(3))
    assert none == {} and taps.keys() == {0, 1, 2} and torch.equal(full, vel)
    for stop in range(3):
        early, some = model(*x, capture={0, stop}, stop_at=stop)
        assert early is None and some.keys() == {0, stop}
        for i in some:
            equal(some[i], taps[i])


def test_stopping_spares_the_rest():
    model = build(PLAIN)
    model.joint_blocks[2].x_block.attn.qkv.weight.fill_(float("nan"))
    model.joint_blocks[1].x_block.mlp.fc1.weight.fill_(float("nan"))
    _, taps = model(*inputs(PLAIN), capture={1}, stop_at=1)
    assert taps[1].q.isfinite().all()


def test_image_tokens_come_first(model):
    z, sigma, ctx, pooled = inputs(model.config)
    (_, a), (_, b) = (model(z, sigma, y, pooled, capture={0, 1}, stop_at=1) for y in (ctx, ctx.roll(1, 1)))
    N = a[0].n_img
    assert a[0].q.shape == (2, model.config.heads, N + M, 32)
    for x, y in zip(a[0][:3], b[0][:3]):                                     # q, k, v of the first block
        assert torch.equal(x[:, :, :N], y[:, :, :N])
        close(x[:, :, N:].roll(1, 2), y[:, :, N:])                           # text in the context's order
        assert (x - y)[:, :, N:].abs().amax((1, 3)).min() > 1e-2             # every text token moved
    close(a[1].q[:, :, :N], b[1].q[:, :, :N])                                # which no image token can tell


@pytest.mark.parametrize("h, w", [(3, 5), (5, 3), (1, 7)])
def test_tokens_are_row_major(model, h, w):
    """One latent pixel moves one image token: the one at row * w + column."""
    p = latent(model.config)[1]
    x = inputs(model.config, 1, h * p, w * p)
    vel, taps = model(*x, capture={0})
    assert vel.shape == x[0].shape and taps[0].grid == (h, w) and taps[0].n_img == h * w
    for row, col in [(0, 0), (0, w - 1), (h - 1, 0), (h // 2, w // 2)]:
        z = x[0].clone()
        z[0, 0, row * p, col * p] += 1
        _, other = model(z, *x[1:], capture={0})
        moved = (other[0].k - taps[0].k).abs().sum((0, 1, 3)) > 1e-4
        assert moved.nonzero().flatten().tolist() == [row * w + col]


def test_samples_do_not_see_their_batch(model):
    x = inputs(model.config, 3)
    vel, taps = model(*x, capture={1})
    for b in range(3):
        alone, tap = model(*(y[b:b + 1] for y in x), capture={1})
        close(alone[0], vel[b])
        close(tap[1].q[0], taps[1].q[b])


@pytest.mark.parametrize("i, what", list(enumerate(["z", "sigma", "ctx", "pooled"])))
def test_every_input_matters(model, i, what):
    x = list(inputs(model.config))
    vel, _ = model(*x)
    x[i] = x[i] + 0.1
    assert (model(*x)[0] - vel).abs().amax((1, 2, 3)).min() > 1e-3


def test_bf16(model):
    x = inputs(model.config)
    vel, _ = model(*x)
    half = build(model.config).bfloat16()
    rounded, taps = half(x[0].bfloat16(), x[1], x[2].bfloat16(), x[3].bfloat16(), capture={1})
    assert rounded.dtype == taps[1].q.dtype == torch.bfloat16 and rounded.isfinite().all()
    assert (rounded.float() - vel).norm() < 0.05 * vel.norm()
    maps = i2t_attention(taps[1])
    assert maps.dtype == torch.float32 and maps.min() >= 0 and maps.sum(-1).max() <= 1


def test_nano_kind_runs(tiny):
    cond = tiny.text.encode(["car sky", ""])
    z, sigma = torch.randn(2, 16, 16, 16), torch.tensor([0.5, 0.1])
    vel, taps = tiny.transformer(z, sigma, cond.ctx, cond.pooled, capture={1})
    assert vel.shape == (2, 16, 16, 16) and vel.isfinite().all() and taps[1].q.shape == (2, 2, 256 + 56, 32)


# ---------------------------------------------------------------------------- positions, config, errors


def test_positions_by_hand():
    """The centre, its upper left corner rounded down: rows 1 to 4 and columns 2 to 4 of 7 x 7."""
    model = build(PLAIN)
    model.pos_embed[0, :, 0] = torch.arange(49.0)
    assert model.positions(4, 3)[0, :, 0].tolist() == [9, 10, 11, 16, 17, 18, 23, 24, 25, 30, 31, 32]
    assert model.positions(1, 2)[0, :, 0].tolist() == [23, 24]
    assert torch.equal(model.positions(7, 7), model.pos_embed)
    for h, w in ((8, 3), (3, 8)):
        with pytest.raises(ValueError, match="7 x 7"):
            model.positions(h, w)


def test_latents_that_do_not_fit():
    model = build(PLAIN)
    for h, w in ((5, 4), (4, 5), (16, 4)):
        with pytest.raises(ValueError, match=f"{h} x {w}" if h < 16 else "8 x 2"):
            model(*inputs(PLAIN, 1, h, w))


@pytest.mark.parametrize("kwargs", [{"capture": {3}}, {"capture": {-1}}, {"stop_at": 3}, {"stop_at": -1},
                                    {"edit": {3: lambda probs, qkv: probs}}, {"mix": {3: torch.eye(M)[None]}}])
def test_blocks_that_do_not_exist(kwargs):
    with pytest.raises(ValueError, match="blocks are 0 to 2"):
        build(PLAIN)(*inputs(PLAIN, 1), **kwargs)


def test_config_is_read_off_the_shapes():
    model = build(DUAL)
    sd = model.state_dict()
    assert MMDiTConfig.from_state_dict(sd) == DUAL
    again = MMDiT.from_state_dict(sd)
    assert torch.equal(again(*inputs(DUAL))[0], model(*inputs(DUAL))[0])
    assert again.x_embedder.proj.weight.data_ptr() == sd["x_embedder.proj.weight"].data_ptr()    # no second copy
    assert not any(p.requires_grad for p in again.parameters())

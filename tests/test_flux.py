"""What is Flux's own, on tiny random weights; what it shares with SD3's transformer is tested in test_mmdit.py."""
import math
from dataclasses import replace

import pytest
import torch
from test_mmdit import FLUX, M, build, close, equal, inputs
from torch import Tensor

import flux
from flux import Flux, FluxConfig

# ---------------------------------------------------------------------------- positions


def test_angles_by_hand():
    """d = 32: 2 pairs that are not turned, 7 that turn with the row, 7 with the column; text is not turned."""
    where = flux.rotary((2, 3), 2, 32, None)
    assert where.grid == (2, 3) and where.cos.shape == where.sin.shape == (8, 16)
    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 0), (0, 0)]):
        speeds = [10000 ** (-k / 7) for k in range(7)]
        angles = [0, 0] + [row * speed for speed in speeds] + [column * speed for speed in speeds]
        close(where.cos[token], torch.tensor([math.cos(a) for a in angles]))
        close(where.sin[token], torch.tensor([math.sin(a) for a in angles]))


def test_published_speeds():
    """d = 128: axes of 16, 56 and 56 numbers; the speeds of the last two, from the published table."""
    where = flux.rotary((2, 1), 0, 128, None)
    speeds = torch.atan2(where.sin[1], where.cos[1])
    assert torch.equal(speeds[:8], torch.zeros(8)) and torch.equal(speeds[36:], torch.zeros(28))
    close(speeds[8:11], torch.tensor([1, 0.7196857, 0.5179475]), 1e-6)
    close(speeds[35], torch.tensor(1.3895e-4), 1e-8)


def test_neighbouring_numbers_are_a_pair():
    """A quarter turn takes (a, b) to (-b, a)."""
    x = torch.arange(1.0, 5)[None, None, None]                               # (1, 1, 1, 4)
    where = flux.Rotary((1, 1), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert flux.rotate(x, where).flatten().tolist() == [-2, 1, 3, 4]


def test_products_know_the_distance_alone():
    """q of one token times k of another is the same wherever the two stand."""
    where = flux.rotary((5, 6), 0, 32, None)
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    turned_q, turned_k = (flux.rotate(x.expand(1, 1, 30, 32), where)[0, 0].view(5, 6, 32) for x in (q, k))
    first = turned_q[0, 1] @ turned_k[2, 4]
    close(turned_q[1, 0] @ turned_k[3, 3], first)
    close(turned_q[2, 2] @ turned_k[4, 5], first)
    assert (turned_q[0, 1] @ turned_k[2, 3] - first).abs() > 1e-2


# ---------------------------------------------------------------------------- the run


def test_single_blocks_are_counted_on():
    model = build(FLUX)
    x = inputs(FLUX)
    _, taps = model(*x, capture=range(3))
    model.single_blocks[0].linear1.weight[:96] *= -1                         # its q
    _, other = model(*x, capture=range(3))
    equal(other[0], taps[0])
    equal(other[1], taps[1])
    assert (other[2].q - taps[2].q).abs().max() > 1e-2 and torch.equal(other[2].v, taps[2].v)


def test_stopping_spares_the_rest():
    model = build(FLUX)
    for layer in (model.double_blocks[1].img_mlp[0], model.single_blocks[0].linear1):
        layer.weight.fill_(float("nan"))
    _, taps = model(*inputs(FLUX), capture={1}, stop_at=1)
    assert taps[1].q.isfinite().all()


def test_guidance():
    """dev's strength moves the velocity; schnell has none to read."""
    x = inputs(FLUX)
    dev = build(FLUX)
    assert torch.equal(dev(*x)[0], dev(*x, guidance=3.5)[0])
    assert (dev(*x, guidance=1.0)[0] - dev(*x)[0]).abs().max() > 1e-3
    schnell = build(replace(FLUX, guidance=False))
    assert torch.equal(schnell(*x, guidance=1.0)[0], schnell(*x)[0])


def test_checkpointing_changes_nothing():
    model = build(FLUX)
    z, *rest = inputs(FLUX)
    grads = []
    for model.checkpointing in (False, True):
        x = z.clone().requires_grad_()
        vel, taps = model(x, *rest, capture={1})
        (vel.square().sum() + taps[1].q.square().sum()).backward()
        grads.append(x.grad)
    close(grads[0], grads[1])


@pytest.mark.parametrize("block", ["double_blocks.1.txt_mlp.2", "single_blocks.0.linear2"])
def test_float16_is_clamped(block):
    """A stream that leaves float16's range stays at its end, as in diffusers, instead of becoming infinite."""
    model = build(FLUX)
    model.get_submodule(block).bias.fill_(6e4)
    model.double_blocks[1].txt_mod.lin.bias[-FLUX.width:] = 10               # the gate
    model.single_blocks[0].modulation.lin.bias[-FLUX.width:] = 10
    z, sigma, ctx, pooled = (x.half() for x in inputs(FLUX))
    vel, _ = model.half()(z, sigma.float(), ctx, pooled)
    assert vel.isfinite().all()


# ---------------------------------------------------------------------------- config, errors


def test_config_is_read_off_the_shapes():
    for cfg in (FLUX, replace(FLUX, guidance=False)):
        model = build(cfg)
        sd = model.state_dict()
        assert FluxConfig.from_state_dict(sd) == cfg
        again = Flux.from_state_dict(sd)
        assert torch.equal(again(*inputs(cfg))[0], model(*inputs(cfg))[0])
        assert again.img_in.weight.data_ptr() == sd["img_in.weight"].data_ptr()              # no second copy
        assert not any(p.requires_grad for p in again.parameters())


def without(sd: dict[str, Tensor], *stems: str) -> dict[str, Tensor]:
    return {key: value for key, value in sd.items() if not key.startswith(stems)}


def test_a_part_segments_and_does_not_generate():
    """Cut after a double block, and (as the loader cuts it, which leaves out the last layer) after a single one."""
    sd = build(replace(FLUX, single_blocks=2)).state_dict()
    x = inputs(FLUX)
    _, taps = Flux.from_state_dict(sd)(*x, capture={1, 2}, stop_at=2)
    for left_out, last in ((("single_blocks.",), 1), (("single_blocks.1.", "final_layer."), 2)):
        part = Flux.from_state_dict(without(sd, *left_out))
        assert part.config.depth == last + 1 and not part.config.whole
        equal(part(*x, capture={last}, stop_at=last)[1][last], taps[last])
        with pytest.raises(ValueError, match=f"only blocks 0 to {last} are loaded"):
            part(*x)


def test_latents_and_heads_that_do_not_fit():
    model = build(FLUX)
    z, *rest = inputs(FLUX)
    with pytest.raises(ValueError, match="16 numbers is no square patch of a latent of 3 channels"):
        model(z[:, :3], *rest)
    with pytest.raises(ValueError, match="5 x 6 cannot be cut in patches of 2 x 2"):
        model(torch.ones(2, 4, 5, 6), *rest)
    with pytest.raises(ValueError, match="blocks are 0 to 2"):
        model(z, *rest, capture={3})
    with pytest.raises(ValueError, match="heads of width 48"):
        Flux.from_state_dict(build(replace(FLUX, head_dim=48)).state_dict())


def test_every_row_of_text_is_a_column():
    model = build(FLUX)
    _, taps = model(*inputs(FLUX), capture={2}, stop_at=2)
    assert taps[2].q.shape == (2, 3, 6 + M, 32)

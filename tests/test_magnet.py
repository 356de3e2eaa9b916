"""MAGNET's losses against loops, matching against all permutations, gradients."""
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import lora as lora_module
import magnet
import mmdit
import seg4diff
from nano import scenes
from support.data import TRAINING_SETS, Pair
from tools import full_size

SETTINGS = magnet.Settings()


def loop_losses(p, m):
    """One candidate, one mask, patch by patch."""
    focal = dice_top = dice_low = 0.0
    for x, y in zip(p.tolist(), m.tolist()):
        x = min(max(x, 1e-4), 1 - 1e-4)
        right = x if y else 1 - x
        focal -= (0.25 if y else 0.75) * (1 - right) ** 2 * math.log(right) / len(p)
    for x, y in zip(p.tolist(), m.tolist()):
        dice_top, dice_low = dice_top + 2 * x * y, dice_low + x + y
    return focal, 1 - (dice_top + 1) / (dice_low + 1)


def random_pairs(P=6, K=3, N=20):
    g = torch.Generator().manual_seed(0)
    return torch.rand(P, N, generator=g), (torch.rand(K, N, generator=g) < 0.3).float()


# ---------------------------------------------------------------------------- losses and matching


def test_pair_losses_are_the_loop():
    p, m = random_pairs()
    p[0, :3] = torch.tensor([0.0, 1.0, 0.5])                                 # ends of the range stay finite
    focal, dice = magnet.pair_losses(p, m)
    for i, k in itertools.product(range(len(p)), range(len(m))):
        assert (focal[i, k].item(), dice[i, k].item()) == pytest.approx(loop_losses(p[i], m[k]), rel=1e-4)
    perfect = magnet.pair_losses(m, m)
    assert all(x.diagonal().max() < 1e-6 for x in perfect)


@pytest.mark.parametrize("P, K", [(6, 3), (3, 5), (4, 4), (4, 0)])           # fewer maps than masks, and no masks, too
def test_matching_is_the_best_of_all(P, K):
    p, m = random_pairs(P, K)
    focal, dice = magnet.pair_losses(p, m)
    cost = (0.1 * focal + 0.2 * dice).numpy()
    rows, columns = magnet.match(p, m)
    n = min(P, K)
    assert len(set(rows)) == len(set(columns)) == len(rows) == n             # one to one
    best = min(sum(cost[r, c] for r, c in zip(rs, cs)) for rs in itertools.permutations(range(P), n)
               for cs in itertools.combinations(range(K), n))
    assert cost[rows, columns].sum() == pytest.approx(best)
    f, d = magnet.matched_losses(p, m, hungarian=True)
    if K == 0:
        assert f.item() == d.item() == 0
        return
    assert f.item() == pytest.approx(focal[rows, columns].mean().item())
    assert d.item() == pytest.approx(dice[rows, columns].mean().item())
    if P >= K:                                                               # by name: the i-th with the i-th
        f, d = magnet.matched_losses(p[:K], m, hungarian=False)
        assert f.item() == pytest.approx(np.mean([loop_losses(p[k], m[k])[0] for k in range(K)]), rel=1e-4)
        assert d.item() == pytest.approx(np.mean([loop_losses(p[k], m[k])[1] for k in range(K)]), rel=1e-4)


def test_normalisations():
    x = torch.tensor([[1.0, 3.0, 2.0], [0.1, 0.1, 0.1]])
    assert torch.equal(magnet.minmax(x), torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(magnet.zscore(x), torch.sigmoid(torch.tensor([[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])))
    for f in magnet.NORMALISATIONS.values():                                 # each map on its own
        torch.testing.assert_close(f(x[:1] * 5 + 2), f(x)[:1])
    small = (torch.arange(100) < 5).float()[None]                            # what the docstring says of both
    assert magnet.minmax(0.02 * small).equal(small) and magnet.zscore(small)[0, -1] > 0.4


def test_noise_levels():
    def draws(kind, shift):
        return torch.cat([magnet.draw_sigma(kind, shift, torch.Generator().manual_seed(i)) for i in range(3000)])

    flat, peaked, shifted = draws("uniform", 3.0), draws("logit-normal", 1.0), draws("logit-normal", 3.0)
    assert abs(flat.mean() - 0.5) < 0.02 and abs(flat.std() - 12 ** -0.5) < 0.01
    logit = torch.logit(peaked)
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 0.5) < 0.02
    torch.testing.assert_close(shifted, 3 * peaked / (1 + 2 * peaked))
    assert flat.min() >= 0 and shifted.max() < 1


# ---------------------------------------------------------------------------- one step


def pair_of(seed: int) -> Pair:
    return TRAINING_SETS["scenes"](None, None).read(str(seed))


@pytest.fixture
def learner(tiny_file):
    """A model with a LoRA that does something already, its parameters, three pictures and their seeds."""
    model = seg4diff.load(tiny_file, device="cpu", dtype="float32")
    params = lora_module.add_lora(model.transformer, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for p in params[1::2]:
        p.data.copy_(0.05 * torch.randn(p.shape, generator=g))
    batch = [magnet.features(model, pair_of(1_100_000 + i), by_name=False) for i in range(3)]
    return model, params, batch, [10, 11, 12]


def test_masks_on_the_grid(tiny):
    masks = np.zeros((3, 32, 64), bool)
    masks[0, :, :32], masks[1, 0, 0], masks[2, :16, :33] = True, True, True  # half, nearly nothing, a quarter
    grid = magnet.patch_masks(masks, (4, 4)).view(3, 4, 4)
    assert grid[0].tolist() == [[True, True, False, False]] * 4 and not grid[1].any() and grid[2].sum() == 4
    image, caption = Image.fromarray(scenes.draw(0).image), "red car"
    f = magnet.features(tiny, Pair(image, masks, ["a", "b", "c"], caption), by_name=False)
    assert f.masks.shape == (2, 256) and f.masks.sum(1).tolist() == [128, 64]                # largest first, none empty
    cond = tiny.text.encode([caption])
    assert torch.equal(f.ctx, cond.ctx[0]) and torch.equal(f.pooled, cond.pooled[0]) and f.spans == []
    torch.testing.assert_close(f.z0, seg4diff.encode_image(tiny, image)[0])
    assert magnet.features(tiny, Pair(image, masks[:0], [], ""), by_name=False).masks.shape == (0, 256)
    many = np.repeat(masks[:1], 40, 0)
    assert len(magnet.features(tiny, Pair(image, many, [], ""), by_name=False).masks) == 32
    f = magnet.features(tiny, Pair(image, masks, ["sky", "car", "teddy bear"], caption), by_name=True)
    assert f.spans == [slice(1, 2), slice(2, 4)]
    assert torch.equal(f.ctx, tiny.text.encode([["sky", "teddy bear"]]).ctx[0])
    crowded = magnet.features(tiny, Pair(image, many, ["teddy bear"] * 40, caption), by_name=True)
    assert len(crowded.spans) == len(crowded.masks) == (tiny.text.length - 2) // 2           # no name is cut


@pytest.mark.parametrize("change", [{}, {"maps": "heads"}, {"match": "name"}, {"normalise": "zscore"}, {"block": 2},
                                    {"mask_weight": 0.0}])
def test_losses_of_a_batch_are_those_of_its_pictures(learner, change):
    """Written out: noise, one forward pass a picture, its I2T maps, its masks."""
    model, _, batch, seeds = learner
    block = change.pop("block", 1)
    model = dataclasses.replace(model, preset=dataclasses.replace(model.preset, block=block))
    settings = SETTINGS._replace(**change)
    by_name = settings.match == "name"
    if by_name:
        batch = [magnet.features(model, pair_of(1_100_000 + i), by_name=True) for i in range(3)]
    got = magnet.batch_losses(model, batch, seeds, settings)
    want = []
    for f, seed in zip(batch, seeds, strict=True):
        g = torch.Generator().manual_seed(seed)
        s = torch.sigmoid(0.5 * torch.randn(1, generator=g))
        s = 3 * s / (1 + 2 * s)
        eps = torch.randn(f.z0.shape, generator=g)
        vel, taps = model.transformer(((1 - s) * f.z0 + s * eps)[None], s, f.ctx[None], f.pooled[None], capture={block})
        attn = mmdit.joint_probs(taps[block])[0, :, :256, 256:256 + model.text.length]       # (H, N, L)
        if by_name:
            maps = torch.stack([attn[:, :, span].mean((0, 2)) for span in f.spans])
        elif settings.maps == "heads":
            maps = torch.stack([attn[h, :, i] for h in range(attn.shape[0]) for i in range(attn.shape[2])])
        else:
            maps = torch.stack([attn[:, :, i].mean(0) for i in range(attn.shape[2])])
        pair = magnet.matched_losses(magnet.NORMALISATIONS[settings.normalise](maps), f.masks.float(), not by_name)
        want.append([(vel[0] - (eps - f.z0)).square().mean().item(), *(x.item() for x in pair)])
    flow, focal, dice = np.mean(want, axis=0)
    assert got["flow"].item() == pytest.approx(flow, rel=1e-4)
    assert (got["focal"].item(), got["dice"].item()) == pytest.approx((focal, dice), rel=1e-3)
    assert got["loss"].item() == pytest.approx(flow + settings.mask_weight * (0.1 * focal + 0.2 * dice), rel=1e-4)


def grads(params) -> torch.Tensor:
    out = torch.cat([p.grad.flatten() for p in params])
    for p in params:
        p.grad = None
    return out


def test_gradient_reaches_the_taps_and_only_lora(learner):
    model, params, batch, seeds = learner
    (0.2 * magnet.batch_losses(model, batch, seeds, SETTINGS)["dice"]).backward()
    blocks = [any(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())
              for block in model.transformer.joint_blocks]
    assert blocks == [True, True, False]                                     # block 1 is read; block 2 comes after it
    tap = model.transformer.joint_blocks[1].x_block.attn.qkv.groups                # of block 1: q and k, not v
    assert [g.B.grad.abs().max() > 0 for g in tap] == [True, True, False]
    for p in params:
        p.grad = None
    magnet.gradient(model, params, [(batch, seeds)], SETTINGS)
    assert all(p.grad.abs().max() > 0 for p in params)
    assert all(p.grad is None for p in model.transformer.parameters() if not p.requires_grad)


def test_mask_loss_falls_when_only_it_is_followed(learner):
    model, params, batch, seeds = learner
    opt, seen = torch.optim.AdamW(params, 3e-3), []
    for _ in range(15):
        opt.zero_grad()
        losses = magnet.batch_losses(model, batch, seeds, SETTINGS)
        (0.1 * losses["focal"] + 0.2 * losses["dice"]).backward()
        opt.step()
        seen.append(losses["dice"].item())
    assert seen[-1] < seen[0] - 0.05


def test_accumulation_and_checkpointing_change_no_gradient(learner):
    model, params, batch, seeds = learner
    one = magnet.gradient(model, params, [(batch, seeds)], SETTINGS)
    want = grads(params)
    three = magnet.gradient(model, params, [([f], [s]) for f, s in zip(batch, seeds)], SETTINGS)
    torch.testing.assert_close(grads(params), want, rtol=1e-3, atol=1e-6)
    assert three == pytest.approx(one, rel=1e-4)
    kept = {False: 0, True: 0}
    for model.transformer.checkpointing in (False, True):
        def pack(x):
            kept[model.transformer.checkpointing] += x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = magnet.batch_losses(model, batch, seeds, SETTINGS)["loss"]
        loss.backward()
        torch.testing.assert_close(grads(params), want, rtol=1e-4, atol=1e-7)
    assert kept[True] < kept[False] / 3                                      # and it does keep less in memory


def test_a_picture_without_masks_adds_no_mask_loss(learner):
    model, params, batch, seeds = learner
    bare = [f._replace(masks=f.masks[:0], spans=[]) for f in batch[:1]]
    for settings in (SETTINGS, SETTINGS._replace(match="name")):
        losses = magnet.batch_losses(model, bare, seeds[:1], settings)
        assert losses["focal"] == losses["dice"] == 0 and losses["loss"] == losses["flow"]
        losses["loss"].backward()
        assert grads(params).isfinite().all()


def test_base_in_bf16(learner, tiny_file):
    """What a GPU holds: a rounded base, LoRA and losses in fp32; the gradient points where the exact one does."""
    model, params, batch, seeds = learner
    want = magnet.gradient(model, params, [(batch, seeds)], SETTINGS)
    exact = grads(params)
    half = seg4diff.load(tiny_file, device="cpu", dtype="bfloat16")
    beside = lora_module.add_lora(half.transformer, generator=torch.Generator().manual_seed(0))
    for p, source in zip(beside, params, strict=True):
        assert p.dtype == torch.float32
        p.data.copy_(source)
    batch = [f._replace(ctx=f.ctx.bfloat16(), pooled=f.pooled.bfloat16()) for f in batch]
    assert magnet.gradient(half, beside, [(batch, seeds)], SETTINGS) == pytest.approx(want, rel=0.05)
    assert torch.cosine_similarity(grads(beside), exact, dim=0) > 0.9
    z = torch.stack([f.z0 for f in batch]).bfloat16()
    ctx = torch.stack([f.ctx for f in batch])
    pooled = torch.stack([f.pooled for f in batch])
    with torch.autocast("cpu", torch.bfloat16):
        vel, _ = half.transformer(z, torch.full((3,), 0.5), ctx, pooled)
    vel.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in beside)


def test_what_is_kept_for_the_backward_pass_is_linear_in_the_tokens(tiny_file):
    """No matrix of N x N is kept, not even the softmax of the expert's maps; checkpointing keeps a fraction."""
    found = full_size.measure_training(tiny_file, [64, 96, 128], "cpu")
    for rows in found.values():
        (n0, b0), (n1, b1), (n2, b2) = rows
        assert (n0, n1, n2) == (64, 144, 256) and b2 == pytest.approx(b0 + (b1 - b0) / (n1 - n0) * (n2 - n0), rel=1e-3)
    assert found[True][2][1] < 0.3 * found[False][2][1]

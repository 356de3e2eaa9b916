"""MAGNET's losses (Sec. 3.5): flow matching, and masks matched with the image-to-text maps of the expert block.

train_magnet.py is the loop around them.  Where the paper is silent, this is what is done:

* "Normalised" maps (Eq. 12): each is scaled from its least to its largest value, so that it can be read as a
  probability at every patch. Under this scaling every mask can be matched with no loss; a map brought to zero mean
  and unit variance before a sigmoid ("zscore") cannot get below 0.4 outside a small mask. NOTE(official): the released
  code sends scores before the softmax through a small network that is trained along and then thrown away; here the
  maps that segmentation reads are the ones that are trained.
* Candidates are the maps of all CLIP columns, <sos>, <eos> and <pad> too, as the proposals of Sec. 4.2 are; T5's
  empty rows are no candidates. The cost of a match is the loss itself (Eq. 12), with the same weights.
* A mask holds a patch if it covers half of it; masks that hold no patch are left out. Losses are means over patches,
  a picture's masks and pictures, so that a crowded picture counts as much as one with a single mask.
* Both losses see the same noisy latent, whatever its noise level; the LoRA is not dropped out.

Measured on nano (README, "Why this recipe"): the gain is the mask loss's alone. At weight 1 (released code) it is twice that
at 0.2, and the flow loss rises by 0.8 %; uniform noise levels (Eq. 2) and logit-normal ones do equally well. Min-max gains
0.8 points where zscore gains 0.2, tokens 0.8 where heads gain 0.5, and matching by name 1.4.
"""
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import seg4diff
from mmdit import i2t_attention
from seg4diff import Seg4Diff
from support.data import MAX_MASKS, Pair
from support.ledger import world

# ---------------------------------------------------------------------------- every constant, and where it is from

FOCAL_WEIGHT, DICE_WEIGHT = 0.1, 0.2        # lambda_focal, lambda_dice of Eq. 12: released code
MASK_WEIGHT = 1.0                           # lambda_mask of Eq. 13: released code
ALPHA, GAMMA = 0.25, 2.0                    # focal loss: released code
SIGMA_STD = 0.5                             # of the logit-normal noise levels: released code
RANK, LORA_ALPHA = 16, 16.0                 # Sec. 4.1; alpha: released code
DECAY, CLIP = 1e-4, 0.01                    # weight decay, largest gradient norm: released code
PICTURES = 10_000                           # of the training: Sec. 4.1; masks of a picture: data.MAX_MASKS

# ---------------------------------------------------------------------------- losses, Eq. 2, 12, 13


def minmax(maps: Tensor) -> Tensor:
    """Each map (..., N) from its least to its largest value: (..., N) in [0, 1]."""
    return seg4diff.rescale(maps, -1)


def zscore(maps: Tensor) -> Tensor:
    """Sigmoid of each map (..., N) at zero mean and unit variance: (..., N) in [0, 1]."""
    return torch.sigmoid((maps - maps.mean(-1, keepdim=True)) / maps.std(-1, keepdim=True).clamp_min(1e-12))


NORMALISATIONS = {"minmax": minmax, "zscore": zscore}


def pair_losses(p: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss of every candidate with every mask, 2 x (C, K); p (C, N) in [0, 1], masks (K, N) of 0, 1.

    NOTE(official): the released focal term takes raw logits for probabilities; here both terms see the same p.
    """
    q, N = p.clamp(1e-4, 1 - 1e-4), p.shape[1]
    hit, miss = -ALPHA * (1 - q) ** GAMMA * q.log(), -(1 - ALPHA) * q ** GAMMA * (1 - q).log()   # 2 x (C, N)
    focal = (hit @ masks.mT + miss @ (1 - masks).mT) / N                     # (C, K), mean over patches
    dice = 1 - (2 * p @ masks.mT + 1) / (p.sum(1)[:, None] + masks.sum(1) + 1)                   # (C, K)
    return focal, dice


def match(p: Tensor, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and masks one to one so that Eq. 12 is smallest (Hungarian): indices into p and masks.

    NOTE(official): the released code weighs 0.02 focal + 1 Dice here; the paper matches by the mask loss itself.
    """
    with torch.no_grad():
        focal, dice = pair_losses(p, masks)
        cost = (FOCAL_WEIGHT * focal + DICE_WEIGHT * dice).nan_to_num()      # scipy raises; `train` ends with a sentence
        return linear_sum_assignment(cost.cpu().numpy())


def mask_losses(p: Tensor, masks: Tensor, hungarian: bool) -> tuple[Tensor, Tensor]:
    """Means of both losses over pairs: matched ones of p (C, N) and masks (K, N), or the i-th map with the i-th mask."""
    if len(masks) == 0:
        return p.sum() * 0, p.sum() * 0
    if hungarian:
        rows, columns = match(p, masks)
        p, masks = p[rows], masks[columns]                                   # 2 x (K, N)
    focal, dice = pair_losses(p, masks)
    return focal.diagonal().mean(), dice.diagonal().mean()


def draw_sigma(kind: str, shift: float, generator: torch.Generator) -> Tensor:
    """A noise level (1,): "uniform" (Eq. 2), or "logit-normal", shifted as the sampler's schedule (released code)."""
    if kind == "uniform":
        return torch.rand(1, generator=generator)
    return seg4diff.shifted(torch.sigmoid(SIGMA_STD * torch.randn(1, generator=generator)), shift)


# ---------------------------------------------------------------------------- what a picture becomes, once


class Features(NamedTuple):
    z0: Tensor                              # (C, ., .)
    ctx: Tensor                             # (M, ctx_dim)
    pooled: Tensor                          # (pooled_dim,)
    masks: Tensor                           # (K, N) bool
    spans: list[slice]                      # of the masks' names in the prompt; only for --match tokens


def patch_masks(masks: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(K, height, width) bool -> (K, N) bool on the patch grid: patches of which the mask covers half or more."""
    return torch.stack([F.interpolate(torch.from_numpy(m)[None, None].float(), size=grid, mode="area").flatten() >= 0.5
                        for m in masks]) if len(masks) else torch.zeros(0, grid[0] * grid[1], dtype=torch.bool)


@torch.no_grad()
def features(model: Seg4Diff, pair: Pair, by_name: bool) -> Features:
    """Latent, text and masks of a picture. by_name: the prompt is the masks' names, as many as fit (released code, COCO)."""
    side = model.preset.size // model.vae.factor // model.transformer.config.patch
    masks = patch_masks(pair.masks, (side, side))                            # (K, N)
    keep = [k for k in masks.sum(1).argsort(descending=True, stable=True).tolist() if masks[k].any()][:MAX_MASKS]
    prompt = pair.caption
    if by_name:
        sizes = np.cumsum([model.text.n_tokens(pair.names[k]) for k in keep])
        keep = sorted(k for k, n in zip(keep, sizes) if n <= model.text.length - 2)
        prompt = [pair.names[k] for k in keep]
    cond = model.text.encode([prompt])
    image = seg4diff.image_tensor(pair.image, model.preset.size)[None].to(model.device, model.dtype)
    return Features(model.vae.encode(image)[0].cpu(), cond.ctx[0].cpu(), cond.pooled[0].cpu(), masks[keep],
                    cond.spans[0] if by_name else [])


# ---------------------------------------------------------------------------- one step


class How(NamedTuple):
    """Every choice that touches the losses."""
    block: int
    candidates: str
    by_name: bool
    normalise: str
    sigma: str
    mask_weight: float


def batch_losses(model: Seg4Diff, batch: Sequence[Features], seeds: Sequence[int], how: How) -> dict[str, Tensor]:
    """One forward pass -> {"flow", "focal", "dice", "loss"}, means over the batch; noise and its level from the seeds."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    sigma = torch.cat([draw_sigma(how.sigma, model.preset.shift, g) for g in generators]).to(model.device)   # (B,)
    eps = torch.stack([torch.randn(f.z0.shape, generator=g) for f, g in zip(batch, generators)]).to(model.device)
    z0, ctx, pooled = (torch.stack(x).to(model.device) for x in list(zip(*batch))[:3])
    z = seg4diff.add_noise(z0.float(), eps, sigma[:, None, None, None]).to(model.dtype)          # Eq. 1, (B, C, ., .)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        vel, taps = model.transformer(z, sigma, ctx, pooled, capture={how.block})
    flow = F.mse_loss(vel.float(), eps - z0.float())                         # Eq. 2
    focal, dice = [], []
    for attn, f in zip(i2t_attention(taps[how.block]), batch):                        # (H, N, M)
        if how.by_name:
            found = [attn.mean(0)[:, span].mean(-1) for span in f.spans]     # K x (N,)
            found = torch.stack(found) if found else attn.new_zeros(0, attn.shape[1])            # (K, N)
        else:
            found = attn[:, :, :model.text.length].mT                        # (H, L, N)
            found = found.mean(0) if how.candidates == "tokens" else found.flatten(0, 1)         # (L, N) or (H*L, N)
        masks = f.masks.to(found.device, found.dtype)
        for total, loss in zip((focal, dice), mask_losses(NORMALISATIONS[how.normalise](found), masks, not how.by_name)):
            total.append(loss)
    focal, dice = torch.stack(focal).mean(), torch.stack(dice).mean()
    mask = FOCAL_WEIGHT * focal + DICE_WEIGHT * dice                         # Eq. 12
    return {"flow": flow, "focal": focal, "dice": dice, "loss": flow + how.mask_weight * mask}   # Eq. 13


def gradient(model: Seg4Diff, params: Sequence[nn.Parameter], batches: list, how: How) -> dict[str, float]:
    """Gradient of the mean loss over all batches [(features, seeds)] of all processes into params; the mean losses."""
    total = torch.zeros(4)
    for batch, seeds in batches:
        losses = batch_losses(model, batch, seeds, how)
        (losses["loss"] / len(batches)).backward()
        total += torch.stack([x.detach().cpu() for x in losses.values()]) / len(batches)
    if world()[1] > 1:
        grads = [p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads] + [total.to(grads[0])])
        dist.all_reduce(flat)
        *parts, total = (flat / world()[1]).split([g.numel() for g in grads] + [len(total)])
        for g, part in zip(grads, parts):
            g.copy_(part.view_as(g))
    return dict(zip(losses, total.tolist()))

"""MAGNET's losses (Sec. 3.5): flow matching, and masks matched with the image-to-text maps of the expert block.

train_magnet.py is the loop around them.  Where the paper is silent, this is what is done:

* "Normalised" maps (Eq. 12): each is scaled from its least to its largest value, so that it can be read as a
  probability at every patch. Under this scaling every mask can be matched with no loss; a map brought to zero mean
  and unit variance before a sigmoid ("zscore") cannot get below 0.4 outside a small mask. NOTE(official): the released
  code sends scores before the softmax through a small network that is trained along and then thrown away; here the
  maps that segmentation uses are the ones that are trained.
* Candidates are the maps of all the prompt's columns, <sos>, <eos> and <pad> too, as the proposals of Sec. 3.4 are;
  the empty rows in T5's place are none. The cost of a match is the loss itself (Eq. 12), with the same weights.
* A mask holds a patch if it covers half of it; masks that hold no patch are left out. Losses are means over patches,
  a picture's masks and pictures, so that a crowded picture counts as much as one with a single mask.
* Both losses see the same noisy latent, whatever its noise level; the LoRA is not dropped out.
"""
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import seg4diff
from loading import Seg4Diff, shifted
from mmdit import i2t_attention
from support.checkpoint import pick_dtype
from support.data import MAX_MASKS, Pair
from support.ledger import world

# ---------------------------------------------------------------------------- every constant, and where it is from

FOCAL_WEIGHT, DICE_WEIGHT = 0.1, 0.2        # lambda_focal, lambda_dice of Eq. 12: released code
ALPHA, GAMMA = 0.25, 2.0                    # focal loss: released code
SIGMA_STD = 0.5                             # of the logit-normal noise levels: released code


class Settings(NamedTuple):
    """A run of train_magnet.py, which has an option for each; the losses read the last five. Defaults: SD3's."""
    model: str = "sd3"
    val: str = "none"                       # data set of evaluate.py that progress is measured on
    steps: int = 1000                       # of the optimiser: released code
    warmup: int = 500                       # steps until the full rate: released code
    lr: float = 1e-5                        # Sec. 4.1
    batch: int = 4                          # pictures at once, in each process: Sec. 4.1
    rank: int = 16                          # of the LoRA: Sec. 4.1
    seed: int = 0
    checkpointing: bool = True              # activations are computed twice instead of kept: SD3 needs it on 24 GB
    match: str = "hungarian"                # a mask gets the map that fits, Sec. 3.5; "name": its name's, released code
    maps: str = "mean"                      # candidates: the mean over heads, or "heads", each head's map (Sec. 4.1)
    normalise: str = "minmax"               # a key of NORMALISATIONS
    sigma: str = "logit-normal"             # noise levels: released code; "uniform": Eq. 2
    mask_weight: float = 1.0                # lambda_mask of Eq. 13: released code


# ---------------------------------------------------------------------------- losses


def flow_matching(model: Seg4Diff, z0: Tensor, eps: Tensor, sigma: Tensor, ctx: Tensor, pooled: Tensor, capture=()):
    """The flow-matching loss, and q, k, v of the blocks to capture, from one forward pass.

    z0 (B or 1, C, ., .), eps (B, C, ., .): clean latents and their noise, fp32; sigma (B,): noise levels in [0, 1].
    """
    z = seg4diff.add_noise(z0, eps, sigma[:, None, None, None])              # (B, C, ., .)
    vel, taps = model(z, sigma, ctx, pooled, capture=capture)
    return F.mse_loss(vel.float(), eps - z0), taps                           # Eq. 2


def minmax(maps: Tensor) -> Tensor:
    """Each map (..., N) from its least to its largest value: (..., N) in [0, 1]."""
    return seg4diff.rescale(maps, -1)


def zscore(maps):
    """Sigmoid of each map (..., N) at zero mean and unit variance: (..., N) in [0, 1]."""
    return torch.sigmoid((maps - maps.mean(-1, keepdim=True)) / maps.std(-1, keepdim=True).clamp_min(1e-12))


NORMALISATIONS = {"minmax": minmax, "zscore": zscore}


def pair_losses(p: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss of every map with every mask, 2 x (P, K); p (P, N) in [0, 1], masks (K, N) of 0 and 1.

    NOTE(official): the released focal term takes raw logits for probabilities; here both terms see the same p.
    """
    clamped = p.clamp(1e-4, 1 - 1e-4)                                        # both logarithms stay finite
    hit = -ALPHA * (1 - clamped) ** GAMMA * clamped.log()                    # (P, N), where the mask is 1
    miss = -(1 - ALPHA) * clamped ** GAMMA * (1 - clamped).log()             # (P, N), where it is 0
    focal = (hit @ masks.mT + miss @ (1 - masks).mT) / p.shape[1]            # (P, K), mean over patches
    dice = 1 - (2 * p @ masks.mT + 1) / (p.sum(1)[:, None] + masks.sum(1) + 1)                   # (P, K)
    return focal, dice


def mask_loss(focal, dice):
    """The mask loss, of focal and Dice losses of any equal shape."""
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * dice                         # Eq. 12


def match(p: Tensor, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Maps (P, N) and masks (K, N) one to one so that Eq. 12 is smallest (Hungarian): indices into p and masks.

    NOTE(official): the released code weighs 0.02 focal + 1 Dice here; the paper matches by the mask loss itself.
    """
    cost = mask_loss(*pair_losses(p.detach(), masks))                        # (P, K)
    return linear_sum_assignment(cost.nan_to_num().cpu().numpy())            # scipy refuses nan; the loop names it


def matched_losses(p, masks, hungarian):
    """Mean focal and Dice loss over pairs of maps (P, N) and masks (K, N): matched ones, or the i-th with the i-th.

    Both are 0 for a picture without masks.
    """
    if hungarian:
        rows, columns = match(p, masks)
        p = p[rows]                                                          # (K, N)
        masks = masks[columns]                                               # (K, N)
    focal, dice = pair_losses(p, masks)                                      # 2 x (K, K), a pair on the diagonal
    K = max(1, len(masks))
    return focal.diagonal().sum() / K, dice.diagonal().sum() / K


# ---------------------------------------------------------------------------- what a picture becomes


class Features(NamedTuple):
    z0: Tensor                              # (C, ., .)
    ctx: Tensor                             # (M, ctx_dim)
    pooled: Tensor                          # (pooled_dim,)
    masks: Tensor                           # (K, N) bool
    spans: list[slice]                      # columns of the masks' names; empty unless the prompt is the names


def patch_masks(masks: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(K, height, width) bool -> (K, N) bool on the patch grid: patches of which the mask covers half or more."""
    return F.adaptive_avg_pool2d(torch.from_numpy(masks).float(), grid).flatten(1) >= 0.5        # (K, N)


@torch.no_grad()
def features(model: Seg4Diff, pair: Pair, by_name: bool) -> Features:
    """Latent, text and masks of a picture, the largest first; with `by_name` the prompt is the names of the masks.

    Of these names it takes as many as fit, and puts them in the order of the data set (released code, COCO).
    """
    side = model.grid
    masks = patch_masks(pair.masks, (side, side))                            # (K, N)
    order = masks.sum(1).argsort(descending=True, stable=True).tolist()
    keep = [k for k in order if masks[k].any()][:MAX_MASKS]
    prompt = pair.caption
    if by_name:
        ends = np.cumsum([model.text.n_tokens(pair.names[k]) for k in keep])
        keep = sorted(keep[:np.count_nonzero(ends <= model.text.room)])
        prompt = [pair.names[k] for k in keep]
    cond = model.text.encode([prompt])
    z0 = seg4diff.encode_image(model, pair.image)                            # (1, C, ., .)
    return Features(z0[0].cpu(), cond.ctx[0].cpu(), cond.pooled[0].cpu(), masks[keep], cond.spans[0] if by_name else [])


# ---------------------------------------------------------------------------- one step


def draw_sigma(kind, shift, generator):
    """A noise level (1,): "uniform" (Eq. 2), or "logit-normal", shifted as the sampler's schedule (released code)."""
    if kind == "uniform":
        return torch.rand(1, generator=generator)
    return shifted(torch.sigmoid(SIGMA_STD * torch.randn(1, generator=generator)), shift)


def candidate_maps(attn, spans, settings, L):
    """One picture's I2T attention (H, N, M) -> the maps that masks are matched with, normalised, (P, N) in [0, 1].

    P = K, the maps of the masks' names at `spans`, or those of all L columns of the prompt: P = L, for each head H*L.
    """
    if settings.match == "name":
        mean = attn.mean(0)                                                  # (N, M)
        maps = [mean[:, span].mean(-1) for span in spans]                    # K x (N,)
        maps = torch.stack(maps) if maps else mean.new_zeros(0, len(mean))   # (K, N)
    else:
        maps = attn[:, :, :L].mT                                             # (H, L, N)
        maps = maps.flatten(0, 1) if settings.maps == "heads" else maps.mean(0)        # (H*L, N) or (L, N)
    return NORMALISATIONS[settings.normalise](maps)


def batch_losses(model: Seg4Diff, batch: list[Features], seeds: list[int], settings: Settings) -> dict[str, Tensor]:
    """One forward pass -> {"flow", "focal", "dice", "loss"}, means over the batch; a seed gives noise and its level."""
    device = model.device
    block = model.preset.block
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sigma = torch.cat([draw_sigma(settings.sigma, model.preset.shift, g) for g in generators])   # (B,)
    eps = torch.stack([torch.randn(batch[0].z0.shape, generator=g) for g in generators])         # (B, C, ., .)
    z0 = torch.stack([f.z0 for f in batch]).float()                          # (B, C, ., .)
    ctx = torch.stack([f.ctx for f in batch]).to(device)                     # (B, M, ctx_dim)
    pooled = torch.stack([f.pooled for f in batch]).to(device)               # (B, pooled_dim)
    # on 16-bit weights autocast would save nothing: it takes every norm to fp32, and LowRank casts by itself
    mixed = model.dtype == torch.float32 and pick_dtype("auto", device) == torch.bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed):
        flow, taps = flow_matching(model, z0.to(device), eps.to(device), sigma.to(device), ctx, pooled, {block})
    pairs = []
    for attn, f in zip(i2t_attention(taps[block]), batch, strict=True):      # (H, N, M)
        p = candidate_maps(attn, f.spans, settings, model.text.length)       # (P, N)
        pairs.append(matched_losses(p, f.masks.to(p), settings.match == "hungarian"))
    focal = torch.stack([focal for focal, _ in pairs]).mean()
    dice = torch.stack([dice for _, dice in pairs]).mean()
    loss = flow + settings.mask_weight * mask_loss(focal, dice)              # Eq. 13
    return {"flow": flow, "focal": focal, "dice": dice, "loss": loss}


def gradient(model: Seg4Diff, params: list[nn.Parameter], batches: list[tuple], settings: Settings) -> dict[str, float]:
    """Gradient of the mean loss over all batches [(features, seeds)] of all processes into params; the mean losses."""
    mean = torch.zeros(4, device=model.device)
    for batch, seeds in batches:
        losses = batch_losses(model, batch, seeds, settings)
        (losses["loss"] / len(batches)).backward()
        mean += torch.stack(list(losses.values())).detach() / len(batches)
    processes = world()[1]
    if processes > 1:
        parts = [*(p.grad for p in params), mean]
        flat = torch.cat([x.flatten() for x in parts])   # in one message
        torch.distributed.all_reduce(flat)               # the sum over processes
        for x, reduced in zip(parts, flat.split([x.numel() for x in parts])):
            x.copy_(reduced.view_as(x) / processes)
    return dict(zip(("flow", "focal", "dice", "loss"), mean.tolist()))

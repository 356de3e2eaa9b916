"""Beyond the paper: better masks from the same forward pass.

The paper reads one slice of one block, A_I2T. Here are four readings of what that block's q, k, v hold, each of which
includes the one before (`seg4diff.segment(..., reading=)`):

    paper     m = A_I2T, mean over heads and over a class's tokens (Eq. 10, 11)
    shares    s_kn = m_kn / sum_j m_jn: of a patch's attention to the classes, how much class k gets
    i2i       t_kn = mean over heads of sum_n' A_I2I[n, n'] s_kn': what the patches that n attends to are
    pixels    t upsampled, then averaged over neighbouring pixels of the same colour

And regions without names: rows of A_I2I, merged where they are alike (A.4 merges maps of <pad>).
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit import JointQKV

READINGS = ("paper", "shares", "i2i", "pixels")

# ---------------------------------------------------------------------------- shares and I2I


def shares(maps: Tensor) -> Tensor:
    """s_kn = m_kn / sum_j m_jn: maps (K, h, w) >= 0 -> shares of the classes at each patch, (K, h, w), that sum to 1.

    A patch's mass on all text varies from patch to patch. In the maps as they are, the bilinear step lets a patch of
    much mass bleed into its neighbours; in shares every patch has the same say.
    """
    return maps / maps.sum(0).clamp_min(1e-30)                               # (K, h, w)


def i2i_step(qkv: JointQKV, maps: Tensor) -> Tensor:
    """t = mean over heads of softmax(Q_I K_I^T / sqrt(d)) s: one step through I2I.  maps s (K, h, w) -> (K, h, w).

    qkv of one picture. The softmax goes over image keys alone: these are the rows of A_I2I (Fig. 2 a) divided by their
    sums. The N x N matrix is never formed: it is attention in which every head's values are the same K maps. The
    fused kernel wants values as wide as the heads, so maps go through in groups of d, padded by zeros; for narrower
    values the one of the CPU falls back to forming the matrix.
    """
    q = qkv.q[:, :, :qkv.n_img].float()                                      # (1, H, N, d)
    k = qkv.k[:, :, :qkv.n_img].float()                                      # (1, H, N, d)
    d = q.shape[-1]
    out = []
    for group in maps.flatten(1).split(d):                                   # (up to d, N)
        values = F.pad(group.mT, (0, d - len(group))).expand(*q.shape)       # (1, H, N, d)
        stepped = F.scaled_dot_product_attention(q, k, values.contiguous())  # (1, H, N, d)
        out.append(stepped.mean(1)[0, :, :len(group)].mT)                    # (up to d, N)
    return torch.cat(out).unflatten(1, qkv.grid)                             # (K, h, w)


def prompt_shares(prompts: Sequence[Tensor]) -> list[Tensor]:
    """One picture's prompts, maps of their classes head by head (H, K_p, h, w) -> shares, (K_p, h, w) each.

    Classes of all prompts compete, so a patch's shares sum to 1 over the classes of all its prompts.
    """
    maps = torch.cat([attn.mean(0) for attn in prompts])                     # Eq. 10, (K, h, w)
    return list(shares(maps).split([attn.shape[1] for attn in prompts]))


# ---------------------------------------------------------------------------- pixels

ROUNDS = 10                             # of averaging over neighbours
STRIP = 2 ** 16                         # pixels that are worked on at once
SHARPNESS = 0.1                         # colour differences count in units of this share of their local spread


def offsets(reach: int) -> list[tuple[int, int]]:
    """The eight directions at distances 1, 2, 4, ... up to `reach`, as (rows, columns)."""
    found = []
    distance = 1
    while distance <= max(1, reach):
        for dy in (-distance, 0, distance):
            for dx in (-distance, 0, distance):
                if (dy, dx) != (0, 0):
                    found.append((dy, dx))
        distance *= 2
    return found


def padded(x: Tensor, margin: int) -> Tensor:
    """x (., height, width) with its edge repeated: (., height+2*margin, width+2*margin)."""
    return F.pad(x[None], [margin] * 4, mode="replicate")[0]


def moved(x: Tensor, dy: int, dx: int, margin: int) -> Tensor:
    """Of a padded x, what is dy below and dx to the right of each pixel: (., height, width), a view."""
    height = x.shape[1] - 2 * margin
    width = x.shape[2] - 2 * margin
    return x[:, margin + dy:margin + dy + height, margin + dx:margin + dx + width]


def colour_scale(near: Tensor, around: Sequence[tuple[int, int]], margin: int) -> Tensor:
    """Padded colours near (3, ., .) -> -1 / max(0.1 std_ic, 1/765) of refine's formula, (3, height, width)."""
    colours = moved(near, 0, 0, margin)                                      # (3, height, width)
    total = torch.zeros_like(colours)
    squares = torch.zeros_like(colours)
    for dy, dx in around:
        difference = moved(near, dy, dx, margin) - colours                   # (3, height, width)
        total += difference
        squares.addcmul_(difference, difference)
    n = len(around) + 1                                                      # with the pixel itself, whose part is 0
    std = (squares / n - (total / n).square()).clamp_min(0).sqrt()           # (3, height, width)
    return -1 / (SHARPNESS * std).clamp_min(1 / 765)                         # at least a third of a grey level


def averaged(p: Tensor, near: Tensor, scale: Tensor, around: Sequence[tuple[int, int]], margin: int) -> Tensor:
    """One round of `refine`: p (K, ., .) and near (3, ., .) padded -> (K, height, width)."""
    colours = moved(near, 0, 0, margin)                                      # (3, height, width)
    mean = torch.zeros_like(moved(p, 0, 0, margin))                          # (K, height, width)
    mass = torch.zeros_like(colours[:1])                                     # (1, height, width)
    for dy, dx in around:
        difference = (moved(near, dy, dx, margin) - colours).abs_()          # (3, height, width)
        weight = difference.mul_(scale).mean(0, keepdim=True).exp_()         # (1, height, width)
        mass += weight
        mean.addcmul_(weight, moved(p, dy, dx, margin))
    return mean / mass                                                       # (K, height, width)


def refine(maps: Tensor, colours: Tensor, reach: int, rounds: int = ROUNDS) -> Tensor:
    """p_i <- sum_j w_ij p_j / sum_j w_ij, so many rounds: pixel-adaptive averaging (Araslanov and Roth, CVPR 2020).

    w_ij = exp(- mean over c of |x_jc - x_ic| / max(0.1 std_ic, 1/765)), x colours in [0, 1], j the pixels at
    offsets(reach) from i, std_ic the spread of the colours over these pixels and i. Beyond the edge the edge's own
    pixels stand. maps (K, height, width), colours (3, height, width) -> (K, height, width).

    Weights are computed anew in each round, strip by strip: kept, those of 12 megapixels would take 2 GB.
    """
    around = offsets(reach)
    margin = max(dy for dy, _ in around)
    rows = max(1, STRIP // colours.shape[2])
    near = padded(colours, margin)
    strips = []                                          # their rows in a padded picture, and the scale of the colours
    for top in range(0, colours.shape[1], rows):
        strip = slice(top, top + rows + 2 * margin)
        strips.append((strip, colour_scale(near[:, strip], around, margin)))
    for _ in range(rounds):
        p = padded(maps, margin)
        maps = torch.cat([averaged(p[:, strip], near[:, strip], scale, around, margin) for strip, scale in strips], 1)
    return maps                                                              # (K, height, width)


# ---------------------------------------------------------------------------- regions without names

ANCHORS = 8                             # to a side of the picture


def spread_patches(grid: tuple[int, int], side: int = ANCHORS) -> Tensor:
    """The patches at the centres of side x side cells of the picture, their numbers, (side*side,) at most."""
    h, w = grid
    centres = (torch.arange(side) + 0.5) / side
    rows = (centres * h).long().unique()
    columns = (centres * w).long().unique()
    return (rows[:, None] * w + columns).flatten()                           # (n,)


def image_rows(qkv: JointQKV, rows: Tensor) -> Tensor:
    """softmax(Q_I K_I^T / sqrt(d)) at these image queries of one picture, mean over heads: (len(rows), N)."""
    q = qkv.q[0, :, rows].float()                                            # (H, rows, d)
    k = qkv.k[0, :, :qkv.n_img].float()                                      # (H, N, d)
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).mean(0)           # (rows, N)


def anchor_maps(qkv: JointQKV, rows: Tensor, chunk: int = 512) -> Tensor:
    """Where two steps through I2I lead from each anchor: rows of A A, A that of image_rows, (anchors, h, w).

    Each map sums to 1. A is formed `chunk` rows at a time.
    """
    first = image_rows(qkv, rows)                                            # (anchors, N)
    second = torch.zeros_like(first)
    for part in torch.arange(qkv.n_img, device=first.device).split(chunk):
        second += first[:, part] @ image_rows(qkv, part)                     # (anchors, N)
    return second.unflatten(1, qkv.grid)                                     # (anchors, h, w)


def anchor_reading(qkv: JointQKV) -> Tensor:
    """What regions are made of: anchor_maps, and these read like class maps, shares and i2i: (2, anchors, h, w).

    They are stacked where other maps have their heads, so that `attend` takes the mean of both over draws of noise.
    """
    maps = anchor_maps(qkv, spread_patches(qkv.grid).to(qkv.q.device))       # (anchors, h, w)
    return torch.stack([maps, i2i_step(qkv, shares(maps))])                  # (2, anchors, h, w)


def symmetric_kl(log_p: Tensor) -> Tensor:
    """Distributions as logarithms (n, N) -> 0.5 (KL(p_i, p_j) + KL(p_j, p_i)) of each pair, (n, n)."""
    cross = log_p.exp() @ log_p.mT                                           # (n, n): sum of p_i log p_j
    self_cross = cross.diag()                                                # (n,), minus the entropies
    return 0.5 * (self_cross[:, None] - cross + self_cross[None] - cross.mT)                 # (n, n)


def merge_greedy(log_p: Tensor, threshold: float) -> list[list[int]]:
    """Distributions as logarithms (n, N) -> groups of them, in one pass in order.

    One that is not yet taken gathers all, taken ones too, whose symmetric KL to it is below the threshold.
    """
    near = (symmetric_kl(log_p) < threshold).cpu()                           # (n, n)
    near.fill_diagonal_(True)
    taken = torch.zeros(len(near), dtype=torch.bool)                         # (n,)
    groups = []
    for i in range(len(near)):
        if not taken[i]:
            taken |= near[i]
            groups.append(near[i].nonzero()[:, 0].tolist())
    return groups


def merge_nearest(p: Tensor, threshold: float) -> list[list[int]]:
    """Distributions (n, N) -> groups of them: the two nearest groups become one, until none are below the threshold.

    A group is the mean of its members, two are as near as their symmetric KL is small.
    """
    groups = [[i] for i in range(len(p))]
    means = p.clone()                                                        # (groups, N)
    while len(groups) > 1:
        kl = symmetric_kl(means.clamp_min(1e-30).log())                      # (groups, groups)
        kl.fill_diagonal_(torch.inf)
        if not kl.min() < threshold:
            break
        i, j = sorted(divmod(int(kl.argmin()), len(groups)))
        groups[i] += groups.pop(j)
        means[i] = p[groups[i]].mean(0)
        means = torch.cat([means[:j], means[j + 1:]])                        # (groups - 1, N)
    return groups


def merge_anchors(reading: Tensor, threshold: float) -> tuple[Tensor, list[list[int]]]:
    """anchor_reading (2, anchors, h, w) -> regions (P, h, w), and which anchors each gathers.

    Anchors are merged by where their attention goes. A patch's share of a region is the sum of its shares of the
    region's anchors, so regions sum to 1 at each patch.  ValueError: a threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold must be positive, not {threshold}")
    maps, patch_shares = reading.float()                                     # 2 x (anchors, h, w)
    members = merge_nearest(maps.flatten(1), threshold)
    return torch.stack([patch_shares[group].sum(0) for group in members]), members           # (P, h, w)

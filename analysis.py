"""What can be read off the joint attention (Sec. 3.3, App. B, D): functions of q, k and v, and of a model's answers to
a blur or a caption.  figures.py draws from them the figures of the paper, a command for each.

    shares = analysis.attention_shares(taps[9])          # Fig. 2 (b, c), of what MMDiT.forward(capture=[9]) returned
"""
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import seg4diff
from loading import Seg4Diff, image_seed
from mmdit import JointQKV, i2t_attention, t2i_attention
from protocol import names_of
from sampling import trajectory
from support.metrics import classes_in, scores

# ---------------------------------------------------------------------------- functions of q, k, v


def attention_shares(qkv: JointQKV) -> dict[str, Tensor]:
    """Fig. 2 (b, c): how much of its attention a query gives to image and to text keys, mean over queries, each (B, H).

    I2I + I2T = 1 and T2I + T2T = 1. Uniform attention would give N / (N+M) to the image (uniform_share).
    """
    i2t = i2t_attention(qkv).sum(-1).mean(-1)                                # (B, H)
    t2i = t2i_attention(qkv).sum(-1).mean(-1)                                # (B, H)
    return {"I2I": 1 - i2t, "I2T": i2t, "T2I": t2i, "T2T": 1 - t2i}


def uniform_share(qkv):
    """Share of the image keys among all keys, N / (N+M), the dotted line of Fig. 2."""
    return qkv.n_img / qkv.k.shape[2]


def word_columns(spans: Sequence[slice]) -> slice:
    """The text columns of a prompt's words, which stand together; none if the prompt is empty."""
    return slice(spans[0].start, spans[-1].stop) if spans else slice(0, 0)


def value_norms(qkv: JointQKV, words: Sequence[slice]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fig. 4, 28: mean L2 norm of the values of "image" tokens, of all "text" tokens and of the "prompt"'s words.

    words[b]: the text columns of sample b's words (word_columns). Returns the norms of whole values, (B,) for each
    kind, and those of each head's part, (B, H).  A sample without words has nan for "prompt".
    """
    N = qkv.n_img
    heads = qkv.v.float().norm(dim=-1)                                       # (B, H, N+M)
    whole = heads.square().sum(1).sqrt()                                     # (B, N+M)

    def means(norms):
        prompt = [norms[b, ..., N:][..., columns].mean(-1) for b, columns in enumerate(words)]       # B x () or (H,)
        return {"image": norms[..., :N].mean(-1), "text": norms[..., N:].mean(-1), "prompt": torch.stack(prompt)}

    return means(whole), means(heads)


def pca_rgb(x: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Fig. 3, 29: features of image tokens (N, D) -> their first three principal components as a picture (h, w, 3).

    Each component is scaled to [0, 1]; its sign is the one that makes the largest entry of its direction positive.
    """
    x = x.float() - x.float().mean(0)                                        # (N, D)
    _, _, directions = torch.linalg.svd(x, full_matrices=False)              # rows are directions
    v = directions[:3]                                                       # (3, D)
    v = v * v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    y = x @ v.mT                                                             # (N, 3)
    y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)).clamp_min(1e-12)
    return y.unflatten(0, grid).cpu().numpy()                                # (h, w, 3)


def token_maps(qkv: JointQKV, columns: Sequence[int], kind: str = "softmax") -> Tensor:
    """Fig. 16, 25, 26: attention of single text tokens head by head, (B, H, T, h, w), T the columns asked for.

    kind: a key of seg4diff.KINDS, "softmax" for I2T and "t2i" for T2I.
    """
    return seg4diff.KINDS[kind](qkv)[..., list(columns)].mT.unflatten(-1, qkv.grid)          # (B, H, T, h, w)


# ---------------------------------------------------------------------------- attention while a picture is generated


@torch.inference_mode()
def taps_of(model, prompts, at, seed=0):
    """Generate a batch; at each t in `at` (steps that are left) run the prompts alone once more and capture all blocks.

    Returns pictures, the encoded prompts, {t: {block: JointQKV}}.  ValueError: a t that the sampler does not visit.
    """
    steps = model.preset.steps
    if not all(1 <= t <= steps for t in at):
        raise ValueError(f"the sampler has steps 1 to {steps}, not {list(at)}")
    images, latents = trajectory(model, prompts, seed)
    cond = model.text.encode(list(prompts))
    schedule = model.preset.sigmas(steps).to(model.device)                   # (S+1,)
    taps = {}
    for t in at:
        _, taps[t] = model(latents[t], schedule[steps - t], cond.ctx, cond.pooled,
                           capture=range(model.transformer.config.depth))
    return images, cond, taps


def expert_maps(model, prompt):
    """A picture generated from a prompt; the prompt's L tokens and their I2T and T2I maps in the expert block.

    Maps are (H, L, h, w), on the CPU.
    """
    t = model.preset.noise_steps
    images, cond, taps = taps_of(model, [prompt], [t])
    names = cond.tokens[0]
    qkv = taps[t][model.preset.block]
    i2t = token_maps(qkv, range(len(names)))[0].cpu()                        # (H, L, h, w)
    t2i = token_maps(qkv, range(len(names)), "t2i")[0].cpu()                 # (H, L, h, w)
    return images[0], names, i2t, t2i


def captured(model, prompts, at, desc):
    """taps_of one batch of prompts after the other, under a progress bar: encoded prompts, t, block, its q, k, v."""
    size = model.preset.batch
    for i in tqdm(range(0, len(prompts), size), desc=desc, unit="batch"):
        _, cond, taps = taps_of(model, prompts[i:i + size], at, i)
        for t in at:
            for block, qkv in taps[t].items():
                yield cond, t, block, qkv


def mean_shares(model, prompts, at):
    """attention_shares, mean over heads and prompts: {t: {"I2T": [share in block 0, 1, ...]}}; and uniform_share."""
    each = defaultdict(list)                             # (t, pathway, block) -> a share for each prompt
    for _, t, block, qkv in captured(model, prompts, at, "shares"):
        uniform = uniform_share(qkv)
        for pathway, share in attention_shares(qkv).items():
            each[t, pathway, block] += share.mean(1).tolist()
    mean = {t: defaultdict(list) for t in at}
    for (t, pathway, _), x in each.items():
        mean[t][pathway].append(np.mean(x))
    return mean, uniform


def mean_norms(model, prompts):
    """value_norms at the preset's t, mean over prompts: of each kind one norm for each block, and H for each block.

    A prompt without words does not count for "prompt".
    """
    each = defaultdict(list)                             # (kind, block) -> a norm for each prompt
    by_head = defaultdict(list)                          # (kind, block) -> norms (B, H) of each batch of prompts
    for cond, _, block, qkv in captured(model, prompts, [model.preset.noise_steps], "values"):
        words = [word_columns(spans) for spans in cond.spans]
        whole, heads = value_norms(qkv, words)
        for kind in whole:
            each[kind, block] += whole[kind].tolist()
            by_head[kind, block].append(heads[kind].cpu())
    mean = defaultdict(list)
    mean_by_head = defaultdict(list)
    for kind, block in each:
        mean[kind].append(np.nanmean(each[kind, block]))
        mean_by_head[kind].append(torch.cat(by_head[kind, block]).nanmean(0).tolist())       # H of them
    return mean, mean_by_head


# ---------------------------------------------------------------------------- how well captions explain pictures


CAPTION_SIGMA = 0.8                     # a noise level where the text matters
CAPTION_DRAWS = 4                       # noise draws, the same for all captions of a picture
CHOICES = 8                             # captions to choose from: a picture's true one and the next ones in the list


@torch.inference_mode()
def caption_losses(model: Seg4Diff, images: Sequence[Image.Image], captions: Sequence[Sequence[str]],
                   sigma: float = CAPTION_SIGMA, seeds: Sequence[int] | None = None) -> np.ndarray:
    """Flow-matching loss (Eq. 2) of picture i under each of captions[i], equal lists: (pictures, captions).

    seeds: of each picture's noise; its place among them if None.
    The lower, the better the caption explains the picture. The model scores perturbed pictures and is not perturbed
    itself. It knows what it was trained on and nothing else, so the score is validated on true pairs and swapped
    captions. Its noise is never the noise that `generate` began from, which a picture would be recognised by.
    """
    out = []
    size = model.preset.batch
    if seeds is None:
        seeds = range(len(images))
    for image, texts, seed in zip(images, captions, seeds, strict=True):
        z0 = seg4diff.encode_image(model, image).float()                     # (1, C, ., .)
        cond = model.text.encode(list(texts))
        loss = 0.0
        for k in range(CAPTION_DRAWS):
            eps = seg4diff.noise(z0.shape[1:], [1_000_003 * (k + 1) + seed]).to(z0.device)      # (1, C, ., .)
            z = seg4diff.add_noise(z0, eps, sigma)                           # (1, C, ., .)
            vel = []
            for ctx, pooled in zip(cond.ctx.split(size), cond.pooled.split(size)):
                vel.append(model(z.expand(len(ctx), -1, -1, -1), sigma, ctx, pooled)[0].float())
            loss = loss + (torch.cat(vel) - (eps - z0)).square().mean((1, 2, 3))             # (captions,)
        out.append((loss / CAPTION_DRAWS).cpu().numpy())
    return np.stack(out)                                                     # (pictures, captions)


def choices(captions):
    """For each picture its true caption, then those of the next pictures: CHOICES in all, or as many as there are."""
    n = len(captions)
    return [[captions[(i + j) % n] for j in range(min(CHOICES, n))] for i in range(n)]


def loss_saved(losses, caption, empty):
    """By how much a caption lowers the flow loss against the empty prompt, in percent of it: (pictures,).

    caption, empty: their columns in the losses.
    """
    return 100 * (losses[:, empty] - losses[:, caption]) / losses[:, empty]


def caption_accuracy(losses):
    """Share of pictures, in percent, that their true caption, the first column, explains best of all."""
    return 100 * float((losses.argmin(1) == 0).mean())


# ---------------------------------------------------------------------------- which block is the expert?


@torch.inference_mode()
def sensitivity(model, items, classes, sigma):
    """How much the velocity changes, relative to its size, when I2T is blurred in one block: (n, depth), in percent.

    items: pictures of a data set (support.data.Item), n of them with a label, each prompted with the names of its
    classes at one noise level.  Cheap, and the same for any model.
    """
    labelled = [item for item in items if len(classes_in(item.labels))]
    out = []
    for item in tqdm(labelled, desc="sensitivity", unit="image"):
        z0 = seg4diff.encode_image(model, item.image).float()                # (1, C, ., .)
        eps = seg4diff.noise(z0.shape[1:], [image_seed(item.name, 0)]).to(z0.device)
        z = seg4diff.add_noise(z0, eps, sigma)                               # (1, C, ., .)
        cond = model.text.encode([names_of(model, item, classes)])
        plain = model(z, sigma, cond.ctx, cond.pooled)[0].float()            # (1, C, ., .)
        blur = seg4diff.blur_matrix(cond.ctx.shape[1])[None].to(z.device)    # (1, M, M), A.3
        changes = []
        for block in range(model.transformer.config.depth):
            blurred = model(z, sigma, cond.ctx, cond.pooled, mix={block: blur})[0].float()
            change = torch.linalg.vector_norm(blurred - plain) / torch.linalg.vector_norm(plain)
            changes.append(100 * change.item())
        out.append(changes)
    return np.array(out)                                                     # (n, depth)


def bootstrap(counts, draws=1000, seed=0, score=scores):
    """mIoU of each block when the pictures are drawn again with replacement.

    counts (n, blocks, K, K): confusion matrices of each picture, or what else `score` takes. Returns (draws, blocks)
    mIoU in percent and, for each block, the share of draws in which it is the best, (blocks,).
    """
    n, blocks, *shape = counts.shape
    flat = counts.reshape(n, -1).astype(np.float64)                          # (n, blocks*K*K)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)        # (draws, n)
    again = (times @ flat).reshape(-1, *shape)                               # (draws*blocks, K, K)
    miou = np.array([score(c)["mIoU"] for c in again]).reshape(draws, blocks)
    return miou, np.bincount(miou.argmax(1), minlength=blocks) / draws

"""Reading the joint attention (Sec. 3.3, App. B): functions of q, k and v, and of a model's answers to a blur or a
caption.  figures.py draws from them the figures of the paper, a command for each.

    shares = analysis.attention_shares(taps[9])          # Fig. 2 (b, c), of what MMDiT.forward(capture=[9]) returned
"""
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import evaluate
import seg4diff
from mmdit import JointQKV, i2t_attention, t2i_attention
from seg4diff import Seg4Diff
from support.data import IGNORE
from support.metrics import scores
from text import TextCond

# ---------------------------------------------------------------------------- functions of q, k, v


def attention_shares(qkv: JointQKV) -> dict[str, Tensor]:
    """Fig. 2 (b, c): how much of its attention a query gives to image and to text keys, mean over queries, each (B, H).

    I2I + I2T = 1 and T2I + T2T = 1. Uniform attention would give N / (N+M) to the image (uniform_share).
    """
    i2t = i2t_attention(qkv).sum(-1).mean(-1)                                # (B, H)
    t2i = t2i_attention(qkv).sum(-1).mean(-1)                                # (B, H)
    return {"I2I": 1 - i2t, "I2T": i2t, "T2I": t2i, "T2T": 1 - t2i}


def uniform_share(qkv: JointQKV) -> float:
    """Share of the image keys among all keys, the dotted line of Fig. 2."""
    return qkv.n_img / qkv.k.shape[2]


def value_norms(qkv: JointQKV, prompt: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Fig. 4, 28: mean L2 norm of the values of image tokens, all text tokens and the prompt's own tokens.

    prompt[b]: how many of sample b's text columns, after <sos>, are words. Returns for each kind the norm of the
    whole value, (B,), and of each head's part, (B, H).  A sample without words has nan for "prompt".
    """
    v, N = qkv.v.float(), qkv.n_img                                          # (B, H, N+M, d)
    heads = v.norm(dim=-1)                                                   # (B, H, N+M)
    whole = heads.square().sum(1).sqrt()                                     # (B, N+M)
    words = [slice(N + 1, N + 1 + n) for n in prompt]
    return {"image": (whole[:, :N].mean(1), heads[:, :, :N].mean(2)),
            "text": (whole[:, N:].mean(1), heads[:, :, N:].mean(2)),
            "prompt": (torch.stack([w[s].mean() for w, s in zip(whole, words)]),
                       torch.stack([h[:, s].mean(1) for h, s in zip(heads, words)]))}


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
    """Fig. 16, 25, 26: attention of single text tokens head by head, (B, H, T, h, w), T the columns asked for."""
    return seg4diff.KINDS[kind](qkv)[..., list(columns)].mT.unflatten(-1, qkv.grid)          # (B, H, T, h, w)


# ---------------------------------------------------------------------------- attention while a picture is generated


@torch.inference_mode()
def taps_of(model: Seg4Diff, prompts: Sequence[str], at: Sequence[int], seed: int = 0
            ) -> tuple[list[Image.Image], TextCond, dict[int, dict[int, JointQKV]]]:
    """Generate a batch, and at each t in `at` (steps that are left) run the prompt's branch once more, keeping all blocks.

    Returns pictures, the encoded prompts, {t: {block: JointQKV}}.  ValueError: a t that the sampler does not visit.
    """
    p, depth = model.preset, model.transformer.config.depth
    if not all(1 <= t <= p.steps for t in at):
        raise ValueError(f"the sampler has steps 1 to {p.steps}, not {list(at)}")
    schedule, side = seg4diff.sigmas(p.steps, p.shift).to(model.device), p.size // model.vae.factor
    cond, uncond = model.text.encode(list(prompts)), model.text.encode([""] * len(prompts))
    z = seg4diff.noise((model.transformer.config.channels, side, side), range(seed, seed + len(prompts))).to(model.device)
    visited = {p.steps: z}
    z = seg4diff.sample(seg4diff.guided_velocity(model, cond, uncond, p.cfg), z, schedule,
                        lambda i, z: visited.update({p.steps - 1 - i: z}))
    taps = {t: model.transformer(visited[t].to(model.dtype), schedule[p.steps - t].expand(len(z)), cond.ctx, cond.pooled,
                           capture=range(depth))[1] for t in at}
    return seg4diff.decode(model, z), cond, taps


def words_of(cond: TextCond, b: int) -> list[int]:
    """Text columns of the prompt's own tokens, between <sos> and <eos>."""
    return list(range(1, cond.tokens[b].index("<eos>")))


# ---------------------------------------------------------------------------- an automatic judge of pictures


JUDGE_SIGMA, JUDGE_DRAWS = 0.8, 4       # where text matters; noise draws, the same for all captions of a picture
CHOICES = 8                             # captions to choose from: a picture's own and the next ones in the list


@torch.inference_mode()
def caption_losses(model: Seg4Diff, images: Sequence[Image.Image], captions: Sequence[Sequence[str]],
                   level: float = JUDGE_SIGMA) -> np.ndarray:
    """Flow-matching loss (Eq. 2) of picture i under each of captions[i], (n, C): how well the caption explains it.

    The judge of perturbed pictures: the model as it is, not perturbed. It knows what it was trained on and nothing
    else, so it is validated on true pairs and swapped captions. Its noise is never the noise that `generate` began
    from, which a picture would be recognised by.
    """
    out = []
    for i, (image, own) in enumerate(zip(images, captions)):
        z0, cond, total = seg4diff.encode_image(model, image).float(), model.text.encode(list(own)), 0.0
        for k in range(JUDGE_DRAWS):
            eps = seg4diff.noise(z0.shape[1:], [1_000_003 * (k + 1) + i]).to(z0.device)
            z, vel = seg4diff.add_noise(z0, eps, level).to(model.dtype), []
            for ctx, pooled in zip(cond.ctx.split(model.preset.batch), cond.pooled.split(model.preset.batch)):
                sigma = torch.full((len(ctx),), level, device=z.device)
                vel.append(model.transformer(z.expand(len(ctx), -1, -1, -1), sigma, ctx, pooled)[0].float())
            total = total + (torch.cat(vel) - (eps - z0)).square().mean((1, 2, 3))           # (C,)
        out.append((total / JUDGE_DRAWS).cpu().numpy())
    return np.stack(out)                                                     # (n, C)


def choices(captions: Sequence[str]) -> list[list[str]]:
    """For each picture its own caption first, then those of the next pictures, CHOICES in all (or as many as there are)."""
    n = len(captions)
    return [[captions[(i + j) % n] for j in range(min(CHOICES, n))] for i in range(n)]


def judge_accuracy(losses: np.ndarray) -> float:
    """Share of pictures, in percent, that their own caption (the first column) explains best of all."""
    return 100 * float((losses.argmin(1) == 0).mean())


# ---------------------------------------------------------------------------- which block is the expert?


@torch.inference_mode()
def sensitivity(model: Seg4Diff, items: Sequence, classes: list[str], sigma: float) -> np.ndarray:
    """How much the velocity changes, relative to its size, when I2T is blurred in one block: (n, depth), in percent.

    Pictures (those with a label) under the names of their classes at one noise level; cheap, and the same for any model.
    """
    depth, out = model.transformer.config.depth, []
    for item in tqdm([item for item in items if (item.labels != IGNORE).any()], desc="sensitivity", unit="image"):
        z0 = seg4diff.encode_image(model, item.image).float()
        z = seg4diff.add_noise(z0, seg4diff.noise(z0.shape[1:], [evaluate.image_seed(item.name, 0)]).to(z0.device), sigma)
        cond = model.text.encode([seg4diff.names_of(model.text, item.labels, classes)])

        def velocity(blocks: Sequence[int]) -> Tensor:
            mix = seg4diff.perturbed_blocks(blocks, [True], cond.ctx.shape[1], z.device)
            return model.transformer(z.to(model.dtype), torch.full((1,), sigma, device=z.device), cond.ctx, cond.pooled,
                               mix=mix)[0].float()
        plain = velocity([])
        out.append([100 * ((velocity([i]) - plain).norm() / plain.norm()).item() for i in range(depth)])
    return np.array(out)                                                     # (n, depth)


def bootstrap(counts: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """mIoU of each block when the pictures are drawn again with replacement.

    counts (n, blocks, K, K): confusion matrices of each picture. Returns (draws, blocks) mIoU and, for each block, the
    share of draws in which it is the best, (blocks,).
    """
    rng, n = np.random.default_rng(seed), len(counts)
    flat = counts.reshape(n, -1).astype(np.float64)
    again = rng.multinomial(n, np.full(n, 1 / n), size=draws) @ flat         # (draws, blocks*K*K)
    miou = np.array([[scores(c)["mIoU"] for c in x] for x in again.reshape(draws, *counts.shape[1:])])
    return miou, np.bincount(miou.argmax(1), minlength=counts.shape[1]) / draws

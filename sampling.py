"""Pictures out of noise: rectified flow (Eq. 1), its sampler, and guidance by a perturbed branch (Eq. 7).

    images = generate(model, ["a red car on the grass under a blue sky"], pag=1.0)       # also seg4diff.generate
"""
import math
from collections.abc import Callable, Sequence
from numbers import Integral

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loading import Seg4Diff, noise
from support.checkpoint import check_finite
from support.pictures import to_image
from text import TextCond

# ---------------------------------------------------------------------------- rectified flow, Sec. 3.2


def add_noise(z0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """The noisy latent; Eq. 8 is the same line with t = 1 - sigma.  sigma: number or (B, 1, 1, 1)."""
    return (1 - sigma) * z0 + sigma * eps                                    # Eq. 1


def sample(velocity: Callable, z: Tensor, schedule: Tensor, callback: Callable | None = None) -> Tensor:
    """Euler steps along dz/dsigma = velocity(z (B, C, ., .), sigma (B,)); callback(i, z) sees z after step i."""
    for i in range(len(schedule) - 1):
        z = z + (schedule[i + 1] - schedule[i]) * velocity(z, schedule[i].expand(len(z)))
        if callback is not None:
            callback(i, z)
    return z


# ---------------------------------------------------------------------------- guidance, Sec. 3.3


def blur_matrix(M: int, kernel: int = 5, std: float = 9.0) -> Tensor:
    """(M, M): A_I2T @ blur_matrix blurs along the text tokens with a Gaussian (A.3); rows and columns sum to 1.

    NOTE(paper): it pads by reflection "to preserve the total attention mass", for which the edge itself must be
    repeated (b a | a b c), as here; without it the much attended <sos> token would lose two fifths of its mass.
    """
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1)
    weight = torch.exp(-offsets.square() / (2 * std ** 2))                   # (kernel,)
    edges = np.pad(np.eye(M, dtype=np.float32), ((reach, reach), (0, 0)), "symmetric")       # (M+2*reach, M)
    return sum(w * torch.from_numpy(edges[k:k + M]) for k, w in enumerate(weight / weight.sum()))    # (M, M)


def guided_velocity(model: Seg4Diff, cond: TextCond, uncond: TextCond, cfg: float, pag: float = 0.0,
                    blocks: Sequence[int] = (), perturb: Sequence[int] = ()) -> Callable:
    """uncond + cfg (cond - uncond) + pag (cond - perturbed): classifier-free guidance, and on top of it Eq. 7.

    All branches go through the model in one batch. "perturbed" has I2T blurred in `blocks`; `perturb` blurs it in all
    branches (Fig. 5). To blur A_I2T is to mix the text values that image queries see (mmdit.joint_attention).
    """
    branches = {"uncond": uncond} if cfg != 1 else {}
    branches["cond"] = cond
    if pag != 0:
        branches["perturbed"] = cond
    n = len(branches)
    ctx = torch.cat([branch.ctx for branch in branches.values()])            # (n*B, M, ctx_dim)
    pooled = torch.cat([branch.pooled for branch in branches.values()])      # (n*B, pooled_dim)
    B, M, _ = cond.ctx.shape
    blurred = blur_matrix(M).to(ctx.device).expand(n * B, M, M)              # (n*B, M, M)
    mix = {}
    if pag != 0:
        last_blurred = torch.eye(M, device=ctx.device).repeat(n * B, 1, 1)   # (n*B, M, M)
        last_blurred[-B:] = blurred[-B:]
        mix = dict.fromkeys(blocks, last_blurred)
    mix |= dict.fromkeys(perturb, blurred)

    def velocity(z, sigma):
        z = z.repeat(n, 1, 1, 1)                                             # (n*B, C, ., .)
        out, _ = model(z, sigma.repeat(n), ctx, pooled, mix=mix)
        vel = dict(zip(branches, out.float().chunk(n)))                      # each (B, C, ., .)
        guided = vel["cond"]
        if cfg != 1:
            guided = vel["uncond"] + cfg * (vel["cond"] - vel["uncond"])
        if pag != 0:
            guided = guided + pag * (vel["cond"] - vel["perturbed"])         # Eq. 7
        return guided
    return velocity


# ---------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate(model: Seg4Diff, prompt: str | Sequence[str], *, steps: int | None = None, cfg: float | None = None,
             pag: float = 0.0, blocks: Sequence[int] | None = None, perturb: Sequence[int] = (), seed: int = 0,
             callback: Callable | None = None) -> list[Image.Image]:
    """One picture of side preset.size for each prompt, preset.batch at once; picture i starts from noise seed + i.

    steps and cfg default to the model's preset.  pag: scale s of the perturbed guidance (Eq. 7), which blurs I2T in
    `blocks` (default: the expert block).  perturb: blocks blurred throughout (Fig. 5).  callback: as in `sample`.
    ValueError: steps or cfg out of range, no prompt, pag or pixels not finite, no such block, blocks without pag.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    preset = model.preset.changed(steps=steps, cfg=cfg, noise_steps=0)       # segmentation's 8 may be more than steps
    if not prompts or not math.isfinite(pag) or not isinstance(seed, Integral):
        raise ValueError("generation takes at least one prompt, a finite scale pag and a whole number as seed, not "
                         f"{len(prompts)} prompts, {pag} and {seed!r}")
    if blocks is not None and pag == 0:
        raise ValueError("blocks are those of the perturbed guidance, whose scale pag is 0; to blur alone name perturb")
    blocks = [preset.block] if blocks is None else blocks
    side = preset.size // model.vae.factor
    schedule = preset.sigmas(preset.steps).to(model.device)                  # (S+1,)
    images = []
    for start in range(0, len(prompts), preset.batch):
        part = prompts[start:start + preset.batch]
        seeds = range(seed + start, seed + start + len(part))
        z = noise((model.vae.channels, side, side), seeds).to(model.device)  # (B, C, side, side)
        cond = model.text.encode(part)
        uncond = model.text.encode([""] * len(part))
        z = sample(guided_velocity(model, cond, uncond, preset.cfg, pag, blocks, perturb), z, schedule, callback)
        for latent in z.to(model.dtype).split(1):                            # one at a time, to save memory
            images.append(to_image(check_finite(model.vae.decode(latent)[0], "the pixels")))
    return images


def trajectory(model: Seg4Diff, prompts: str | Sequence[str], seed: int = 0
               ) -> tuple[list[Image.Image], dict[int, Tensor]]:
    """A batch of pictures as `generate` draws them, and the latents on the way: {steps left: z (B, C, ., .)}.

    With all steps left they are noise, with none the picture's.  ValueError: more than a batch.
    """
    steps = model.preset.steps
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(prompts) > model.preset.batch:
        raise ValueError(f"{len(prompts)} prompts are more than a batch of this model, {model.preset.batch}")
    latents = {}

    def keep(i, z):
        latents[steps - 1 - i] = z                                           # (B, C, ., .)

    images = generate(model, prompts, seed=seed, callback=keep)
    latents[steps] = noise(latents[0].shape[1:], range(seed, seed + len(prompts))).to(model.device)
    return images, latents

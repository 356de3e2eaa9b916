"""The method of Seg4Diff: rectified flow, and image-to-text attention maps read as a segmentation, with names
(Sec. 3.4) or without (Sec. 4.2).

    python seg4diff.py segment photo.png car sky "teddy bear" --out overlay.png
    python seg4diff.py generate "a red car on the grass under a blue sky" --out image.png

Both use the embedded nano model unless --model names another.  From Python:

    model = seg4diff.load()
    seg = seg4diff.segment(model, Image.open("photo.png"), ["car", "sky", "teddy bear"])
"""
import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lora import load_lora, merge_lora
from mmdit import JointQKV, MMDiT, i2t_attention, i2t_scores, t2i_attention
from support import weights
from support.cli import command
from support.metrics import IGNORE
from support.pictures import check_out, open_image, panels, sheet
from text import CLIPText, TextCond, TextEncoders, clip_tokenizer
from vae import VAE

# ---------------------------------------------------------------------------- a model and its presets


@dataclass(frozen=True)
class Preset:
    """What the paper fixes for a model; nano carries its own in its file's header. Defaults: SD3 (A.1, Sec. 4.1)."""
    block: int = 9                  # the semantic grounding expert, counted from 0
    size: int = 1024                # side of the square a picture is squashed to, pixels
    steps: int = 28                 # of the Euler sampler
    shift: float = 3.0              # of the sigma schedule
    noise_steps: int = 8            # segmentation sees a latent this many steps before clean ("t = 8 of 28")
    cfg: float = 7.5                # classifier-free guidance scale
    batch: int = 1                  # pictures evaluated at once
    threshold: float = 0.1          # symmetric KL below which maps of <pad> tokens are merged (released code)
    scaling: str = "token"          # what those maps are scaled over first, of SCALINGS (released code)

    @staticmethod
    def from_header(meta: dict[str, str]) -> "Preset":
        """SD3's presets, but for those that a file carries as JSON under "presets".  ValueError: unknown ones."""
        own = json.loads(meta.get("presets", "{}"))
        if not isinstance(own, dict) or not own.keys() <= set(Preset.__dataclass_fields__):
            raise ValueError(f"the file's header has presets {own}; known are {', '.join(Preset.__dataclass_fields__)}")
        return Preset(**own)

    @property
    def sigma(self) -> float:
        """Noise level of segmentation: 0.515 for 8 of 28 steps at shift 3."""
        return sigmas(self.steps, self.shift)[self.steps - self.noise_steps].item()


@dataclass
class Seg4Diff:
    transformer: MMDiT
    vae: VAE
    text: TextEncoders
    preset: Preset
    name: str
    fingerprint: str                    # of its files (weights.fingerprint)

    @property
    def device(self) -> torch.device:
        return self.transformer.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.pos_embed.dtype


def load(name_or_path: str | Path = "nano", device: str = "auto", dtype: str | torch.dtype = "auto",
         segment_only: bool = False, lora: str | Path | None = None) -> Seg4Diff:
    """A model ready to use: a name of weights.NAMES, a .safetensors file, or a folder (weights.find).

    device "auto": CUDA if there is one.  dtype "auto": bf16 on CUDA (NOTE(official): fp16), fp32 on the CPU.  With
    segment_only, blocks after the expert are left on the disk; such a model segments, and cannot generate.  lora: a
    file of train_magnet.py's or another LoRA of SD3 (mmdit.load_lora), merged into the weights.
    ValueError: no such model, a file that is broken or does not fit, an unknown device or dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = None, 0
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"there is no device {device!r}; choose auto, cpu or cuda")
    if kind == "cuda" and index >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was asked for, but PyTorch sees {torch.cuda.device_count()} CUDA devices "
                         "here; use cpu")
    if dtype == "auto":
        dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError("dtype must be auto, float32, float16 or bfloat16")
    files = weights.find(name_or_path)
    preset = Preset.from_header(weights.header(files))
    sd = weights.read(files, preset.block if segment_only else None, device, dtype)
    mmdit = MMDiT.from_state_dict(sd["mmdit"])
    if not (mmdit.config.whole or segment_only):
        raise ValueError(f"{name_or_path} is incomplete: its block {mmdit.config.depth - 1} is not a last block")
    text = TextEncoders(CLIPText.from_state_dict(sd["clip_l"]), CLIPText.from_state_dict(sd["clip_g"]),
                        clip_tokenizer(weights.merges(files)), mmdit.config.ctx_dim)
    vae, rows = VAE.from_state_dict(sd["vae"]), len(text.clip_l.text_model.embeddings.token_embedding.weight)
    widths = [len(tower.text_model.final_layer_norm.weight) for tower in (text.clip_l, text.clip_g)]
    ctx, pooled = sum(widths), widths[0] + text.clip_g.text_projection.out_features
    for what, found, wanted in (("tokens in the tokenizer", text.tokenizer.get_vocab_size(), rows),
                                ("channels in the MM-DiT's latent", mmdit.config.channels, vae.channels),
                                ("columns of pooled text", pooled, mmdit.config.pooled_dim),
                                ("text columns that do not fit the context", max(0, ctx - mmdit.config.ctx_dim), 0),
                                ("patches of a side beyond the model's positions",
                                 max(0, preset.size // vae.factor // mmdit.config.patch - mmdit.config.pos_grid), 0),
                                ("pixels beyond whole patches", preset.size % (vae.factor * mmdit.config.patch), 0)):
        if found != wanted:
            raise ValueError(f"the parts of {name_or_path} do not fit each other: {found} {what}, not {wanted}")
    path, fingerprint = Path(name_or_path), weights.fingerprint(files)
    name = path.stem if path.suffix == ".safetensors" else path.name
    if lora is not None:
        load_lora(mmdit, lora)
        merge_lora(mmdit)
        own = Path(lora).stem if Path(lora).stem not in ("lora", "lora_weights") else Path(lora).resolve().parent.name
        name, fingerprint = f"{name}+{own}", weights.add_to_fingerprint(fingerprint, lora)
    return Seg4Diff(mmdit, vae, text, preset, name, fingerprint)


# ---------------------------------------------------------------------------- rectified flow, Sec. 3.2


def shifted(s: float | Tensor, shift: float) -> float | Tensor:
    """a s / (1 + (a-1) s): noise levels in [0, 1] moved towards noise, which large pictures need (a: 3 for SD3)."""
    return shift * s / (1 + (shift - 1) * s)


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of the Euler sampler, (steps+1,) from 1 down to 0; those of SD3's scheduler.

    The shift is applied to the ends of the line and then to the line itself, as the published scheduler does; its
    table has 1000 entries, so the last level above 0 comes from 1/1000.
    """
    line = torch.linspace(1.0, shifted(1 / 1000, shift), steps, dtype=torch.float64)         # (S,)
    return torch.cat([shifted(line, shift), line.new_zeros(1)]).float()      # (S+1,)


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) on the CPU, sample b from seeds[b] alone: the same for any batch size and device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(s % 2**63)) for s in seeds])


def add_noise(z0: Tensor, eps: Tensor, sigma: float | Tensor) -> Tensor:
    """Eq. 1: (1 - sigma) z0 + sigma eps. Eq. 8 is the same line with t = 1 - sigma.  sigma: number or (B, 1, 1, 1)."""
    return (1 - sigma) * z0 + sigma * eps


def sample(velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, schedule: Tensor,
           callback: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Euler steps along dz/dsigma = velocity(z, sigma) from schedule[0] to schedule[-1].

    z (B, C, ., .) noise; sigma reaches velocity as (B,).  callback(i, z) sees the latent after step i.
    """
    for i in range(len(schedule) - 1):
        z = z + (schedule[i + 1] - schedule[i]) * velocity(z, schedule[i].expand(len(z)))
        if callback is not None:
            callback(i, z)
    return z


# ---------------------------------------------------------------------------- perturbation and guidance, Sec. 3.3, Eq. 7


def blur_matrix(M: int, kernel: int = 5, sigma: float = 9.0) -> Tensor:
    """(M, M): A_I2T @ blur_matrix blurs along the text tokens with a Gaussian (A.3); rows and columns sum to 1.

    NOTE(paper): it pads by reflection "to preserve the total attention mass". Mass is preserved if the edge itself
    is repeated (b a | a b c), as here; without, the much attended <sos> token would lose two fifths of its mass.
    """
    reach = kernel // 2
    offsets = torch.arange(-reach, reach + 1)
    weight = torch.exp(-offsets.square() / (2 * sigma ** 2))
    to = torch.arange(M)[:, None] + offsets                                  # (M, kernel), beyond the ends too
    period = to % (2 * M)                                                    # reflected again where M < reach
    to = torch.where(period < M, period, 2 * M - 1 - period)
    return torch.zeros(M, M).scatter_add_(1, to, (weight / weight.sum()).expand(M, kernel))   # (M, M)


def blur_i2t(probs: Tensor, qkv: JointQKV) -> Tensor:
    """Eq. 4's matrix (B, H, N+M, N+M) with its I2T part blurred along the text tokens: the perturbation, to read.

    An `edit` for joint_attention; sampling uses the same thing as a `mix` of values (perturbed_blocks).
    """
    N, M = qkv.n_img, probs.shape[-1] - qkv.n_img
    out = probs.clone()
    out[:, :, :N, N:] = probs[:, :, :N, N:] @ blur_matrix(M).to(probs.device)
    return out


def perturbed_blocks(blocks: Sequence[int], rows: Sequence[bool], M: int, device: torch.device) -> dict[int, Tensor]:
    """A `mix` for MMDiT.forward: the blur in these blocks, for the batch rows where `rows` is true."""
    mix = torch.stack([blur_matrix(M) if row else torch.eye(M) for row in rows]).to(device)                # (B, M, M)
    return {i: mix for i in blocks}


def guided_velocity(model: Seg4Diff, cond: TextCond, uncond: TextCond, cfg: float, pag: float = 0.0,
                    blocks: Sequence[int] = (), perturb: Sequence[int] = ()) -> Callable[[Tensor, Tensor], Tensor]:
    """uncond + cfg (cond - uncond) + pag (cond - perturbed): classifier-free guidance, and on top of it Eq. 7.

    All branches go through the model in one batch; cfg 1 and pag 0 leave their branch out. The branch "perturbed"
    has I2T blurred in `blocks`; `perturb` blurs it in all branches (Fig. 5).
    """
    branches = [(uncond, False)] * (cfg != 1) + [(cond, False)] + [(cond, True)] * (pag != 0)
    ctx, pooled = (torch.cat([getattr(c, x) for c, _ in branches]) for x in ("ctx", "pooled"))
    B, M = cond.ctx.shape[:2]
    mix = perturbed_blocks(blocks, [worse for _, worse in branches for _ in range(B)], M, ctx.device) if pag else {}
    mix |= perturbed_blocks(perturb, [True] * len(ctx), M, ctx.device)

    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        z, sigma = z.to(model.dtype), sigma.to(z.device)
        n = len(branches)
        vel, _ = model.transformer(z.repeat(n, 1, 1, 1), sigma.repeat(n), ctx, pooled, mix=mix)    # (n*B, C, ., .)
        v = list(vel.float().chunk(n))
        out = v_cond = v[int(cfg != 1)]
        if cfg != 1:
            out = v[0] + cfg * (v_cond - v[0])
        return out + pag * (v_cond - v[-1]) if pag else out                  # Eq. 7
    return velocity


@torch.inference_mode()
def generate(model: Seg4Diff, prompt: str | Sequence[str], *, steps: int | None = None, cfg: float | None = None,
             pag: float = 0.0, blocks: Sequence[int] | None = None, perturb: Sequence[int] = (), seed: int = 0,
             callback: Callable[[int, Tensor], None] | None = None) -> list[Image.Image]:
    """One picture for each prompt, side model.preset.size; picture i starts from the noise of seed + i.

    steps and cfg default to the model's preset.  pag: scale s of the perturbed guidance (Eq. 7), which blurs I2T in
    `blocks` (default: the expert block).  perturb: blocks blurred throughout, as in Fig. 5.
    ValueError: steps < 1, no prompt, a scale that is not finite, a block that does not exist, blocks without pag.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    steps, cfg = (model.preset.steps if steps is None else steps), (model.preset.cfg if cfg is None else cfg)
    if steps < 1 or not prompts or not math.isfinite(cfg) or not math.isfinite(pag):
        raise ValueError(f"generation takes at least one step, one prompt and finite guidance scales, not {steps} steps, "
                         f"{len(prompts)} prompts, scales {cfg} and {pag}")
    if blocks is not None and pag == 0:
        raise ValueError("blocks are those of the perturbed guidance, whose scale pag is 0; for blurring alone name perturb")
    side = model.preset.size // model.vae.factor
    z = noise((model.transformer.config.channels, side, side), [seed + i for i in range(len(prompts))]).to(model.device)
    velocity = guided_velocity(model, model.text.encode(prompts), model.text.encode([""] * len(prompts)), cfg, pag,
                               [model.preset.block] if blocks is None else blocks, perturb)
    z = sample(velocity, z, sigmas(steps, model.preset.shift).to(model.device), callback)
    return decode(model, z)


def decode(model: Seg4Diff, z: Tensor) -> list[Image.Image]:
    """Clean latents (B, C, ., .) -> pictures, decoded one at a time to save memory."""
    x = [model.vae.decode(one.to(model.dtype))[0] for one in z.split(1)]     # B x (3, px, px)
    return [Image.fromarray((127.5 * (y.float() + 1)).clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy())
            for y in x]


# ---------------------------------------------------------------------------- I2T maps -> masks, Sec. 3.4


# What one pixel-word score can be (Table 5 of the supplement's B.3, Fig. 16): each is (B, H, N, M).
KINDS = {"softmax": i2t_attention, "logits": i2t_scores, "t2i": lambda qkv: t2i_attention(qkv).mT}


class Segmentation(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into classes
    maps: Tensor                        # (K, h, w) on the patch grid, what the argmax is taken of
    classes: list[str]


def image_tensor(image: Image.Image, size: int) -> Tensor:
    """Squash the whole picture to size x size (one bilinear resize, antialiased when shrinking), (3, size, size) in
    [-1, 1]. NOTE(official): the paper crops the centre; its code squashes, and so do we (it first shrinks the short
    side to 640, and resizes without antialiasing)."""
    x = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))     # (size, size, 3)
    return torch.from_numpy(x.copy()).permute(2, 0, 1).float() / 127.5 - 1                   # (3, size, size)


@torch.inference_mode()
def encode_image(model: Seg4Diff, image: Image.Image) -> Tensor:
    """A picture -> its clean latent (1, C, ., .)."""
    return model.vae.encode(image_tensor(image, model.preset.size)[None].to(model.device, model.dtype))


def split_classes(text: TextEncoders, classes: Sequence[str]) -> list[list[str]]:
    """Class names -> as few prompts as hold them all, equally full as far as order allows; no name is cut.

    ValueError: no names, a name without tokens, a name longer than a prompt.
    """
    sizes, limit = [text.n_tokens(name) for name in classes], text.length - 2
    for name, n in zip(classes, sizes):
        if n == 0:
            raise ValueError(f"the class name {name!r} has no token; give it letters or digits")
        if n > limit:
            raise ValueError(f"the class name {name[:40]!r}... takes {n} tokens; a prompt has room for {limit}")
    if not classes:
        raise ValueError("the list of classes is empty; name at least one thing to segment")

    def fill(room: int) -> list[list[str]]:
        prompts, left = [], 0
        for name, n in zip(classes, sizes):
            if n > left:
                prompts.append([])
                left = room
            prompts[-1].append(name)
            left -= n
        return prompts

    fewest = len(fill(limit))            # the smallest room that needs no prompt more: a last prompt of one name would
    return next(prompts for room in range(max(sizes), limit + 1)                # have little competition for attention
                if len(prompts := fill(room)) == fewest)


def names_of(text: TextEncoders, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """The classes of a label map (height, width), as many as fit into one prompt; none if nothing is labelled."""
    names = [classes[k] for k in np.setdiff1d(labels, [IGNORE])]
    return split_classes(text, names)[0] if names else []


def class_attention(qkv: JointQKV, spans: Sequence[Sequence[slice]], kind: str = "softmax") -> list[Tensor]:
    """Scores of each class on the patch grid, head by head: B tensors (H, K, h, w).

    A class of several tokens gets the mean of their columns (Sec. 3.4); spans[b][k] are the columns of class k.
    """
    scores = KINDS[kind](qkv)                                                # (B, H, N, M)
    return [torch.stack([s[:, :, span].mean(-1) for span in names], dim=1).unflatten(-1, qkv.grid)
            for s, names in zip(scores, spans)]


def rescale(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Every map, or whatever lies along `dim`, from its least to its largest value: [0, 1]; a constant one becomes 0."""
    lo, hi = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return (x - lo) / (hi - lo).clamp_min(1e-12)


def class_maps(attn: Tensor, head: int | None = None, minmax: bool = False) -> Tensor:
    """Eq. 10, 11: (H, K, h, w) -> the mean over heads (or one head), (K, h, w); `minmax` scales every map to [0, 1]."""
    maps = attn.mean(0) if head is None else attn[head]                      # (K, h, w)
    return rescale(maps, (1, 2)) if minmax else maps


def label_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> bilinear to (height, width) -> the best class at every pixel, (height, width) int64.

    ValueError: maps that are not finite, which would silently become the first class.
    """
    if not maps.isfinite().all():
        raise ValueError("the attention maps are not finite numbers; float16 can overflow: try bfloat16 or float32")
    best = maps.new_full(size, -torch.inf, dtype=torch.float32)              # (height, width)
    labels = best.new_zeros(size, dtype=torch.int64)
    for i in range(0, len(maps), 8):                     # a few classes at a time: 150 of them at 12 MP would take 7 GB
        up = F.interpolate(maps[None, i:i + 8].float(), size=size, mode="bilinear", align_corners=False)[0]
        value, index = up.max(0)                                             # 2 x (height, width)
        labels, best = torch.where(value > best, index + i, labels), torch.maximum(value, best)
    return labels


@torch.inference_mode()
def attend(model: Seg4Diff, z0: Tensor, classes: Sequence[Sequence[str]] | None, *, blocks: Sequence[int], sigma: float,
           seeds: Sequence[int], kinds: Sequence[str] = ("softmax",)) -> list[dict[tuple[int, str], Tensor]]:
    """Clean latents through the model once: {(block, kind): (H, K, h, w)} for each, K its own classes in order.

    z0 from vae.encode, one row a picture; the noise of picture b is that of seeds[b] (Eq. 8). More names than one
    prompt holds run as several prompts on the same noise. Each softmax map is a share of its pixel's attention over
    all keys, so maps of different prompts, which are equally full, are compared as they are. classes None: the empty
    prompt, and every CLIP column, <sos> and <pad> too, is a class.  The run ends at the last block asked for.
    ValueError: sigma outside [0, 1], a block that does not exist, names that do not fit.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must lie between 0 (clean) and 1 (noise), not {sigma}")
    z = add_noise(z0.float(), noise(z0.shape[1:], seeds).to(z0.device), sigma).to(model.dtype)
    prompts = [(b, names) for b in range(len(z)) for names in (split_classes(model.text, classes[b]) if classes else [[]])]
    out: list[dict] = [{(i, kind): [] for i in blocks for kind in kinds} for _ in z]
    for part in (prompts[i:i + len(z)] for i in range(0, len(prompts), len(z))):   # never more than B rows at once
        rows, cond = [b for b, _ in part], model.text.encode([names for _, names in part])
        _, taps = model.transformer(z[rows], torch.full((len(rows),), sigma, device=z.device), cond.ctx, cond.pooled,
                              capture=set(blocks), stop_at=max(blocks))
        spans = cond.spans if classes else [[slice(i, i + 1) for i in range(model.text.length)]] * len(rows)
        for i, kind in out[0]:
            for b, attn in zip(rows, class_attention(taps[i], spans, kind)):
                out[b][i, kind].append(attn)
    return [{key: torch.cat(attn, dim=1) for key, attn in maps.items()} for maps in out]


@torch.inference_mode()
def segment(model: Seg4Diff, image: Image.Image, classes: Sequence[str], *, block: int | Sequence[int] | None = None,
            sigma: float | None = None, seed: int = 0, kind: str = "softmax", head: int | None = None,
            minmax: bool = False) -> Segmentation:
    """Open-vocabulary segmentation of one picture (Sec. 3.4, Fig. 7): every pixel gets one of `classes`.

    block and sigma default to the model's preset; several blocks are averaged. kind (KINDS), head and minmax are
    the variants of Fig. 9 and of the supplement's B.2 to B.4.
    ValueError: no classes, names that do not fit, kind, block or head that does not exist, sigma outside [0, 1].
    """
    blocks = np.atleast_1d(model.preset.block if block is None else block).tolist()
    if isinstance(classes, str) or not blocks or len(classes) > IGNORE:
        raise ValueError(f"segment takes a list of at most {IGNORE} class names and at least one block")
    if head is not None and not 0 <= head < model.transformer.config.heads:
        raise ValueError(f"there is no head {head}: this model's heads are 0 to {model.transformer.config.heads - 1}")
    if kind not in KINDS:
        raise ValueError(f"there is no kind of score {kind!r}; the kinds are {', '.join(KINDS)}")
    z0 = encode_image(model, image)                                          # (1, C, ., .)
    attn, = attend(model, z0, [classes], blocks=blocks, kinds=[kind], seeds=[seed],
                   sigma=model.preset.sigma if sigma is None else sigma)     # {(block, kind): (H, K, h, w)}
    maps = torch.stack([class_maps(a, head, minmax) for a in attn.values()]).mean(0)         # (K, h, w)
    labels = label_map(maps, (image.height, image.width)).cpu().numpy()
    return Segmentation(labels, maps.cpu(), list(classes))


# ---------------------------------------------------------------------------- <pad> tokens -> proposals, Sec. 4.2, Table 2


SCALINGS = ("map", "token", "none")


class Proposals(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into maps
    maps: Tensor                        # (P, h, w), each sums to 1
    members: list[list[int]]            # for each proposal, the text columns whose maps it is the mean of


def merge_maps(maps: Tensor, threshold: float, scaling: str) -> tuple[Tensor, list[list[int]]]:
    """Attention maps of tokens (L, h, w) -> proposals (P, h, w), and which tokens each gathers.

    Every map becomes a distribution over the positions (softmax after min-max scaling: over the positions of a
    "map", over the tokens at each position, "token", or "none"). One greedy pass in token order: a map not yet taken
    gathers all maps, taken ones too, whose symmetric KL to it, half the sum of both directions, is below the
    threshold, and their mean is a proposal.
    NOTE(official): the released code scales over tokens (of two definitions the later wins), threshold 0.1.
    """
    x = maps.float().flatten(1)                                              # (L, N)
    if scaling != "none":
        x = rescale(x, 1 if scaling == "map" else 0)
    log_p = x.log_softmax(dim=1)                                             # (L, N)
    p = log_p.exp()
    cross = p @ log_p.mT                                                     # (L, L): sum of p_i log p_j
    own = cross.diag()
    kl = 0.5 * (own[:, None] - cross + own[None] - cross.mT)                 # (L, L)
    taken, proposals, members = torch.zeros(len(p), dtype=torch.bool), [], []
    for i, near in enumerate((kl < threshold).cpu()):
        if not taken[i]:
            near[i] = True
            taken |= near
            members.append(near.nonzero()[:, 0].tolist())
            proposals.append(p[members[-1]].mean(0))
    return torch.stack(proposals).unflatten(1, maps.shape[1:]), members      # (P, h, w)


@torch.inference_mode()
def pad_maps(model: Seg4Diff, z0: Tensor, *, block: int, sigma: float, seeds: Sequence[int]) -> Tensor:
    """I2T maps of all CLIP columns of the empty prompt, mean over heads: z0 (B, C, ., .) -> (B, L, h, w) (Fig. 9 b)."""
    attn = attend(model, z0, None, blocks=[block], sigma=sigma, seeds=seeds)
    return torch.stack([a[block, "softmax"].mean(0) for a in attn])          # (B, L, h, w)


def propose(model: Seg4Diff, image: Image.Image, *, block: int | None = None, sigma: float | None = None, seed: int = 0,
            threshold: float | None = None, scaling: str | None = None) -> Proposals:
    """Regions without any names (Sec. 4.2): <sos>, <eos> and <pad> of the empty prompt, their maps merged.

    What is not given comes from the model's preset.  ValueError: block, sigma, scaling that does not exist,
    a threshold that is not positive.
    """
    p = model.preset
    threshold, scaling = p.threshold if threshold is None else threshold, scaling or p.scaling
    if scaling not in SCALINGS or not threshold > 0:
        raise ValueError(f"the threshold must be positive, and scaling one of {', '.join(SCALINGS)}, "
                         f"not {threshold}, {scaling!r}")
    z0 = encode_image(model, image)                                          # (1, C, ., .)
    maps = pad_maps(model, z0, block=p.block if block is None else block, sigma=p.sigma if sigma is None else sigma,
                    seeds=[seed])[0]                                         # (L, h, w)
    proposals, members = merge_maps(maps, threshold, scaling)
    return Proposals(label_map(proposals, (image.height, image.width)).cpu().numpy(), proposals.cpu(), members)


# ---------------------------------------------------------------------------- command line


def run_segment(args: argparse.Namespace) -> None:
    check_out(args.out)
    image = open_image(args.image)
    model = load(args.model, args.device, args.dtype, segment_only=args.block is None, lora=args.lora)
    seg = segment(model, image, args.classes, block=args.block, sigma=args.sigma, seed=args.seed)
    panels(image, seg.labels, seg.classes).save(args.out)
    for k, name in enumerate(seg.classes):
        print(f"{name:<20s} {(seg.labels == k).mean():6.1%}")
    print(f"wrote {args.out}")


def run_generate(args: argparse.Namespace) -> None:
    check_out(args.out)
    model = load(args.model, args.device, args.dtype, lora=args.lora)
    steps, size = model.preset.steps if args.steps is None else args.steps, model.preset.batch
    with tqdm(total=max(steps, 0) * -(-len(args.prompts) // size), desc="sampling", unit="step") as bar:
        images = [image for i in range(0, len(args.prompts), size) for image in
                  generate(model, args.prompts[i:i + size], steps=steps, cfg=args.cfg, pag=args.pag, blocks=args.blocks,
                           perturb=args.perturb, seed=args.seed + i, callback=lambda i, z: bar.update())]
    picture = images[0] if len(images) == 1 else sheet(images, args.prompts)
    picture.save(args.out)
    print(f"wrote {args.out} ({picture.width} x {picture.height})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="segment | generate")
    seg = commands.add_parser("segment", help="mask the named classes in a picture")
    seg.add_argument("image", type=Path)
    seg.add_argument("classes", nargs="+", metavar="CLASS")
    seg.add_argument("--block", type=int, help="block whose attention is read; the model's expert block if not given")
    seg.add_argument("--sigma", type=float, help="noise level in [0, 1]; the model's preset if not given")
    seg.set_defaults(run=run_segment)
    gen = commands.add_parser("generate", help="draw a picture from a prompt, or a sheet of them from several")
    gen.add_argument("prompts", nargs="+", metavar="PROMPT")
    gen.add_argument("--steps", type=int, help="Euler steps; the model's preset if not given")
    gen.add_argument("--cfg", type=float, help="classifier-free guidance scale; the model's preset if not given")
    gen.add_argument("--pag", type=float, default=0.0, help="scale s of the perturbed guidance (Eq. 7); 0: none")
    gen.add_argument("--blocks", type=int, nargs="+", help="blocks blurred for --pag; the expert block if not given")
    gen.add_argument("--perturb", type=int, nargs="+", default=(), help="blocks whose I2T attention is blurred (Fig. 5)")
    gen.set_defaults(run=run_generate)
    for p, out in ((seg, "overlay.png"), (gen, "image.png")):
        p.add_argument("--out", type=Path, default=Path(out))
        p.add_argument("--model", default="nano", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder")
        p.add_argument("--lora", type=Path, help="a LoRA of that model, as train_magnet.py writes")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--device", default="auto", help="auto, cpu or cuda")
        p.add_argument("--dtype", default="auto", help="auto (bfloat16 on CUDA, float32 on the CPU), float32, bfloat16, "
                       "float16 (released code)")
    command(lambda args: args.run(args), parser)


if __name__ == "__main__":
    main()

"""The method of Seg4Diff: rectified flow, guidance by perturbation, and image-to-text attention as a segmentation.

    python seg4diff.py segment photo.png cat sofa wall --model sd3 --out overlay.png
    python seg4diff.py generate "a red car on the grass under a blue sky" --out image.png

    model = seg4diff.load("sd3")                         # the default is the embedded nano, which knows drawn scenes
    seg = seg4diff.segment(model, Image.open("photo.png"), ["cat", "sofa", "wall"])
"""
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from loading import SCALINGS, Preset, Seg4Diff, load, noise, sigmas  # noqa: F401 (SCALINGS, sigmas: for callers)
from mmdit import JointQKV, i2t_attention, i2t_scores, t2i_attention
from support.checkpoint import check_finite
from support.cli import Parser, add_model_options, command, show
from support.files import write_picture
from support.metrics import IGNORE
from support.pictures import check_out, open_image, panels, sheet, to_image
from text import TextCond, split_classes

# ---------------------------------------------------------------------------- flow, sampler, guidance, Sec. 3.2, 3.3


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


def blur_matrix(M: int, kernel: int = 5, std: float = 9.0) -> Tensor:
    """(M, M): A_I2T @ blur_matrix blurs along the text tokens with a Gaussian (A.3); rows and columns sum to 1.

    NOTE(paper): it pads by reflection "to preserve the total attention mass", for which the edge itself must be
    repeated (b a | a b c), as here; without, the much attended <sos> token would lose two fifths of its mass.
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
    branches = [cond]
    if cfg != 1:
        branches.insert(0, uncond)
    if pag != 0:
        branches.append(cond)
    n = len(branches)
    ctx = torch.cat([branch.ctx for branch in branches])                     # (n*B, M, ctx_dim)
    pooled = torch.cat([branch.pooled for branch in branches])               # (n*B, pooled_dim)
    B, M, _ = cond.ctx.shape
    blurred = blur_matrix(M).to(ctx.device).expand(n * B, M, M)
    mix = {}
    if pag != 0:
        last_blurred = torch.eye(M, device=ctx.device).repeat(n * B, 1, 1)   # (n*B, M, M)
        last_blurred[-B:] = blurred[-B:]
        mix = dict.fromkeys(blocks, last_blurred)
    mix |= dict.fromkeys(perturb, blurred)

    def velocity(z, sigma):
        z = z.to(model.dtype).repeat(n, 1, 1, 1)                             # (n*B, C, ., .)
        vel, _ = model.transformer(z, sigma.to(z.device).repeat(n), ctx, pooled, mix=mix, **model.preset.distilled)
        vel = vel.float().chunk(n)                                           # n x (B, C, ., .)
        vel_cond = guided = vel[0]
        if cfg != 1:
            vel_cond = vel[1]
            guided = vel[0] + cfg * (vel_cond - vel[0])
        if pag != 0:
            guided = guided + pag * (vel_cond - vel[-1])                     # Eq. 7
        return guided
    return velocity


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
    preset = model.preset.changed(steps=steps, cfg=cfg, noise_steps=0)       # noise_steps: of segmentation alone
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


# ---------------------------------------------------------------------------- I2T maps -> masks, Sec. 3.4

# what one pixel-word score can be (Table 5 of the supplement's B.3, Fig. 16): each is (B, H, N, M)
KINDS = {"softmax": i2t_attention, "logits": i2t_scores, "t2i": lambda qkv: t2i_attention(qkv).mT}
Images = Image.Image | Sequence[Image.Image]             # one picture, or several, which return lists


class Segmentation(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into classes
    maps: Tensor                        # (K, h, w) on the patch grid, what the argmax is taken of
    classes: list[str]


@torch.inference_mode()
def encode_image(model: Seg4Diff, image: Images) -> Tensor:
    """A picture, or several, squashed to the model's square -> clean latents (B, C, ., .), one at a time.

    NOTE(official): the paper crops the centre; its code squashes, in two steps, and so do we, in one antialiased step.
    """
    size = model.preset.size
    images = [image] if isinstance(image, Image.Image) else image
    latents = []
    for picture in images:
        square = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1    # (1, 3, size, size)
        latents.append(model.vae.encode(x.to(model.device, model.dtype)))
    return torch.cat(latents)                                                # (B, C, ., .)


def class_attention(qkv: JointQKV, spans: Sequence[Sequence[slice]], kind: str = "softmax") -> list[Tensor]:
    """Scores of each class on the patch grid, head by head: B tensors (H, K, h, w); spans[b][k]: columns of class k.

    A class of several tokens gets their columns' mean (Sec. 3.4), here before Eq. 10: means commute, no map changes.
    """
    out = []
    for scores, picture_spans in zip(KINDS[kind](qkv), spans):               # (H, N, M)
        columns = [scores[:, :, span].mean(-1) for span in picture_spans]    # K x (H, N)
        out.append(torch.stack(columns, dim=1).unflatten(-1, qkv.grid))      # Eq. 11, (H, K, h, w)
    return out


def rescale(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Every map, or what lies along `dim`, from its least to its largest value: [0, 1]; a constant one becomes 0."""
    lo = x.amin(dim, keepdim=True)
    hi = x.amax(dim, keepdim=True)
    return (x - lo) / (hi - lo).clamp_min(1e-12)


def class_maps(attn: Tensor, head: int | None = None, minmax: bool = False) -> Tensor:
    """(H, K, h, w) -> the mean over heads, or one head's, (K, h, w); `minmax` scales every map to [0, 1]."""
    maps = attn.mean(0) if head is None else attn[head]                      # Eq. 10, (K, h, w)
    return rescale(maps, (1, 2)) if minmax else maps


def label_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> bilinear to (height, width) -> every pixel's best class, int64.  ValueError: maps not finite."""
    check_finite(maps, "the attention maps")
    best = maps.new_full(size, -torch.inf, dtype=torch.float32)              # (height, width)
    labels = best.new_zeros(size, dtype=torch.int64)
    for i in range(0, len(maps), 8):                     # a few classes at a time: 150 of them at 12 MP would take 7 GB
        up = F.interpolate(maps[None, i:i + 8].float(), size=size, mode="bilinear", align_corners=False)[0]
        value, index = up.max(0)                                             # 2 x (height, width)
        labels = torch.where(value > best, index + i, labels)
        best = torch.maximum(value, best)
    return labels


def labels_of(maps: Tensor, image: Image.Image) -> np.ndarray:
    """`label_map` at the size of a picture."""
    return label_map(maps, (image.height, image.width)).cpu().numpy()


@torch.inference_mode()
def attend(model: Seg4Diff, z0: Tensor, classes: Sequence[Sequence[str]] | None, *, blocks: Sequence[int], sigma: float,
           seeds: Sequence[int], kinds: Sequence[str] = ("softmax",), draws: int = 1
           ) -> list[dict[tuple[int, str], Tensor]]:
    """Clean latents through the model: {(block, kind): (H, K, h, w)} for each, K its own classes in order.

    z0 from encode_image, a row for each picture; its noise is that of seeds[b], maps are means over so many draws, of
    seeds[b], seeds[b] + 1, ...  More names than a prompt holds run as several prompts on the same noise: softmax maps
    are shares of a pixel's attention over all keys, so those of equally full prompts are compared as they are.
    classes None: the empty prompt, and every CLIP column, <sos> and <pad> too, is a class.
    ValueError: sigma outside [0, 1], a block that does not exist, names that do not fit, no draws.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must lie between 0 (clean) and 1 (noise), not {sigma}")
    if not all(isinstance(x, Integral) for x in (draws, *seeds)) or draws < 1:
        raise ValueError(f"draws, at least 1, and seeds must be whole numbers, not {draws!r} and {list(seeds)}")
    B = len(z0)
    for what, values in (("seeds", seeds), ("lists of class names", classes)):
        if values is not None and len(values) != B:
            raise ValueError(f"{B} pictures and {len(values)} {what} are not equal lists")
    rows = []                                            # (picture, names of one of its prompts)
    for b in range(B):
        prompts = [[]] if classes is None else split_classes(model.text, classes[b])
        rows += [(b, names) for names in prompts]
    columns = [slice(i, i + 1) for i in range(model.text.length)]
    parts = [{(i, kind): [] for i in blocks for kind in kinds} for _ in range(B)]
    for draw in range(draws):
        eps = noise(z0.shape[1:], [seed + draw for seed in seeds]).to(z0.device)             # (B, C, ., .)
        z = add_noise(z0.float(), eps, sigma).to(model.dtype)                # Eq. 8
        for start in range(0, len(rows), B):             # never more than B rows at once
            pictures, prompts = zip(*rows[start:start + B])
            cond = model.text.encode(list(prompts))                          # Eq. 9
            levels = torch.full((len(pictures),), sigma, device=z.device)
            _, taps = model.transformer(z[list(pictures)], levels, cond.ctx, cond.pooled, capture=set(blocks),
                                        stop_at=max(blocks))
            spans = [columns] * len(pictures) if classes is None else cond.spans
            for i, kind in parts[0]:
                for b, attn in zip(pictures, class_attention(taps[i], spans, kind)):
                    parts[b][i, kind].append(attn)
    out = []
    for part in parts:                                   # of one picture: draws x prompts x (H, names, h, w)
        out.append({key: torch.cat(attn, 1).unflatten(1, (draws, -1)).mean(1) for key, attn in part.items()})
    return out


@torch.inference_mode()
def segment(model: Seg4Diff, image: Images, classes: Sequence, *, block: int | None = None, sigma: float | None = None,
            seed: int | Sequence[int] = 0, kind: str = "softmax", head: int | None = None, minmax: bool = False,
            draws: int = 1) -> Segmentation | list[Segmentation]:
    """Open-vocabulary segmentation (Sec. 3.4, Fig. 7): every pixel of a picture gets one of its `classes`.

    One picture and its class names, or equal lists, which go through the model together; a seed for each, or for all.
    block and sigma default to the model's preset. kind (KINDS), head and minmax are the variants of Fig. 9 and of the
    supplement's B.2 to B.4; draws: noise draws that the maps are averaged over.
    ValueError: no classes, names that do not fit, kind, block or head that does not exist, sigma outside [0, 1].
    """
    single = isinstance(image, Image.Image)
    images = [image] if single else image
    names = [classes] if single else classes
    seeds = [seed] * len(images) if np.ndim(seed) == 0 else seed
    if any(isinstance(x, str) or len(x) > IGNORE for x in names):
        raise ValueError(f"segment takes a list of at most {IGNORE} class names for each picture")
    last = model.transformer.config.heads - 1
    if head is not None and not 0 <= head <= last:
        raise ValueError(f"there is no head {head}: this model's heads are 0 to {last}")
    if kind not in KINDS:
        raise ValueError(f"there is no kind of score {kind!r}; the kinds are {', '.join(KINDS)}")
    block = model.preset.changed(block=block).block
    sigma = model.preset.sigma if sigma is None else sigma
    z0 = encode_image(model, images)                                         # (B, C, ., .)
    attn = attend(model, z0, names, blocks=[block], sigma=sigma, seeds=seeds, kinds=[kind], draws=draws)
    out = []
    for b, scores in enumerate(attn):
        maps = class_maps(scores[block, kind], head, minmax)                 # (K, h, w)
        out.append(Segmentation(labels_of(maps, images[b]), maps.cpu(), list(names[b])))
    return out[0] if single else out


# ---------------------------------------------------------------------------- <pad> maps -> proposals, Sec. 4.2

class Proposals(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into maps
    maps: Tensor                        # (P, h, w), each sums to 1
    members: list[list[int]]            # for each proposal, the text columns whose maps it is the mean of


def merge_maps(maps: Tensor, threshold: float, scaling: str) -> tuple[Tensor, list[list[int]]]:
    """Attention maps of tokens (L, h, w) -> proposals (P, h, w), and which tokens each gathers (Table 2).

    Every map becomes a distribution over the positions (softmax after min-max scaling: over the positions of a "map",
    over the tokens at each position, "token", or "none"). One greedy pass in token order: a map not yet taken gathers
    all maps, taken ones too, whose symmetric KL to it is below the threshold, and their mean is a proposal.
    NOTE(official): the released code scales over tokens (of two definitions the later wins), threshold 0.1.
    ValueError: a scaling that does not exist, a threshold that is not positive.
    """
    Preset(threshold=threshold, scaling=scaling)         # which checks both
    x = maps.float().flatten(1)                                              # (L, N)
    if scaling != "none":
        x = rescale(x, 1 if scaling == "map" else 0)
    log_p = x.log_softmax(dim=1)                                             # (L, N)
    p = log_p.exp()
    cross = p @ log_p.mT                                                     # (L, L): sum of p_i log p_j
    self_cross = cross.diag()                                                # (L,), minus the entropies
    kl = 0.5 * (self_cross[:, None] - cross + self_cross[None] - cross.mT)   # (L, L), mean of both directions
    taken = torch.zeros(len(p), dtype=torch.bool)
    proposals = []
    members = []
    for i, near in enumerate((kl < threshold).cpu()):
        if not taken[i]:
            near[i] = True
            taken |= near
            members.append(near.nonzero()[:, 0].tolist())
            proposals.append(p[members[-1]].mean(0))
    return torch.stack(proposals).unflatten(1, maps.shape[1:]), members      # (P, h, w)


@torch.inference_mode()
def pad_maps(model: Seg4Diff, z0: Tensor, *, block: int, sigma: float, seeds: Sequence[int], draws: int = 1) -> Tensor:
    """I2T maps of all CLIP columns of the empty prompt, mean over heads: z0 (B, C, ., .) -> (B, L, h, w) (Fig. 9 b)."""
    attn = attend(model, z0, None, blocks=[block], sigma=sigma, seeds=seeds, draws=draws)
    return torch.stack([class_maps(scores[block, "softmax"]) for scores in attn])            # (B, L, h, w)


@torch.inference_mode()
def propose(model: Seg4Diff, image: Images, *, block: int | None = None, sigma: float | None = None,
            seed: int | Sequence[int] = 0, threshold: float | None = None, scaling: str | None = None, draws: int = 1
            ) -> Proposals | list[Proposals]:
    """Regions without any names (Sec. 4.2): <sos>, <eos> and <pad> of the empty prompt, their maps merged.

    One picture or a list; a seed for each, or for all; the rest from the preset.  ValueError: see merge_maps.
    """
    single = isinstance(image, Image.Image)
    images = [image] if single else image
    seeds = [seed] * len(images) if np.ndim(seed) == 0 else seed
    preset = model.preset.changed(block=block, threshold=threshold, scaling=scaling)
    sigma = preset.sigma if sigma is None else sigma
    z0 = encode_image(model, images)                                         # (B, C, ., .)
    maps = pad_maps(model, z0, block=preset.block, sigma=sigma, seeds=seeds, draws=draws)    # (B, L, h, w)
    out = []
    for b in range(len(images)):
        proposals, members = merge_maps(maps[b], preset.threshold, preset.scaling)           # (P, h, w)
        out.append(Proposals(labels_of(proposals, images[b]), proposals.cpu(), members))
    return out[0] if single else out


# ---------------------------------------------------------------------------- command line


def run_segment(args):
    check_out(args.out)
    image = open_image(args.image)
    model = load(args.model, args.device, args.dtype, segment_only=args.block is None, lora=args.lora)
    seg = segment(model, image, args.classes, block=args.block, sigma=args.sigma, seed=args.seed)
    write_picture(args.out, panels(image, seg.labels, seg.classes))
    for k, name in enumerate(seg.classes):
        show(f"{name:<20s} {(seg.labels == k).mean():6.1%}")
    show(f"wrote {args.out}")


def run_generate(args):
    check_out(args.out)
    Preset().changed(steps=args.steps, cfg=args.cfg, noise_steps=0)          # ValueError before the model is loaded
    model = load(args.model, args.device, args.dtype, lora=args.lora, t5=args.t5).guided(args.guidance)
    steps = model.preset.steps if args.steps is None else args.steps
    batches = math.ceil(len(args.prompts) / model.preset.batch)
    with tqdm(total=steps * batches, desc="sampling", unit="step") as bar:
        images = generate(model, args.prompts, steps=steps, cfg=args.cfg, pag=args.pag, blocks=args.blocks,
                          perturb=args.perturb, seed=args.seed, callback=lambda i, z: bar.update())
    picture = images[0] if len(images) == 1 else sheet(images, args.prompts)
    write_picture(args.out, picture)
    show(f"wrote {args.out} ({picture.width} x {picture.height})")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="segment | generate")
    seg = commands.add_parser("segment", help="mask the named classes in a picture")
    seg.add_argument("image", type=Path)
    seg.add_argument("classes", nargs="+", metavar="CLASS")
    seg.add_argument("--block", type=int, help="block whose attention is taken; the model's expert block if not given")
    seg.add_argument("--sigma", type=float, help="noise level in [0, 1]; the model's preset if not given")
    seg.set_defaults(run=run_segment)
    gen = commands.add_parser("generate", help="draw a picture from a prompt, or a sheet of them from several")
    gen.add_argument("prompts", nargs="+", metavar="PROMPT")
    gen.add_argument("--steps", type=int, help="Euler steps; the model's preset if not given")
    gen.add_argument("--cfg", type=float, help="classifier-free guidance scale; the model's preset if not given")
    gen.add_argument("--guidance", type=float, help="strength that Flux.1-dev reads; the preset's, 3.5, if not given")
    gen.add_argument("--t5", type=Path, help="SD3: T5's file, which the paper leaves out; tokenizer.json beside it")
    gen.add_argument("--pag", type=float, default=0.0, help="scale s of the perturbed guidance (Eq. 7); 0: none")
    gen.add_argument("--blocks", type=int, nargs="+", help="blocks blurred for --pag; the expert block if not given")
    gen.add_argument("--perturb", type=int, nargs="+", default=(), help="blocks whose I2T is blurred (Fig. 5)")
    gen.set_defaults(run=run_generate)
    for subparser, out in ((seg, "overlay.png"), (gen, "image.png")):
        subparser.add_argument("--out", type=Path, default=Path(out), help=f"picture to write ({out})")
        add_model_options(subparser)
    command(lambda args: args.run(args), parser)

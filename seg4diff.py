"""The method of Seg4Diff: image-to-text attention as a segmentation, with names and without.

    python seg4diff.py segment photo.png cat sofa wall --model sd3 --out overlay.png
    python seg4diff.py generate "a red car on the grass under a blue sky" --out image.png
    python seg4diff.py doctor

    model = seg4diff.load("sd3")                         # the default is the embedded nano, which knows drawn scenes
    seg = seg4diff.segment(model, Image.open("photo.png"), ["cat", "sofa", "wall"])
"""
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import readings
from loading import (  # noqa: F401 - some are public here
    SCALINGS,
    Images,
    Picture,
    Preset,
    Seg4Diff,
    Square,
    encode_image,
    load,
    noise,
    sigmas,
    squash,
)
from mmdit import JointQKV, i2t_attention, i2t_scores, t2i_attention
from readings import READINGS
from sampling import add_noise, blur_matrix, generate, guided_velocity, sample  # noqa: F401 - public here, too
from support.checkpoint import check_finite
from support.cli import Parser, add_model_options, command, show, utf8
from support.files import write_picture
from support.metrics import IGNORE
from support.pictures import check_out, open_image, panels, sheet
from text import split_classes

# ---------------------------------------------------------------------------- I2T maps -> masks, Sec. 3.4

# what one pixel-word score can be (Table 5 of the supplement's B.3, Fig. 16): each is (B, H, N, M)
KINDS = {"softmax": i2t_attention, "logits": i2t_scores, "t2i": lambda qkv: t2i_attention(qkv).mT}


class Segmentation(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into classes
    maps: Tensor                        # (K, h, w) on the patch grid, before label_map upsamples (and refines) them
    classes: list[str]


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


def label_map(maps: Tensor, size: tuple[int, int], colours: Tensor | None = None) -> Tensor:
    """(K, h, w) -> bilinear to (height, width) -> every pixel's best class, int64.

    colours (3, height, width) in [0, 1]: the maps are refined by the picture (readings.refine) before they compete.
    ValueError: maps not finite.
    """
    check_finite(maps, "the attention maps")
    best = maps.new_full(size, -torch.inf, dtype=torch.float32)              # (height, width)
    labels = best.new_zeros(size, dtype=torch.int64)
    patch = max(size[0] // maps.shape[1], size[1] // maps.shape[2])          # its longer side, in pixels
    for i in range(0, len(maps), 4):                     # a few classes at a time: 150 of them at 12 MP would take 7 GB
        part = maps[None, i:i + 4].float()                                   # (1, up to 4, h, w)
        up = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0]         # (up to 4, height, width)
        if colours is not None:
            up = readings.refine(up, colours, patch)                         # (up to 4, height, width)
        value, index = up.max(0)                                             # Sec. 3.4, 2 x (height, width)
        labels = torch.where(value > best, index + i, labels)
        best = torch.maximum(value, best)
    return labels


def labels_of(maps: Tensor, image: Picture, reading: str = "paper") -> np.ndarray:
    """`label_map` at the size of a picture, refined by it for the reading "pixels"."""
    image = image.image if isinstance(image, Square) else image
    colours = None
    if reading == "pixels":
        rgb = torch.from_numpy(np.array(image.convert("RGB"))).to(maps.device)
        colours = rgb.permute(2, 0, 1) / 255                                 # (3, height, width)
    return label_map(maps, (image.height, image.width), colours).cpu().numpy()


def joined(kind: str, attn: Sequence[Tensor], qkvs: Sequence[JointQKV]) -> Tensor:
    """One kind of map of one picture: all its prompts' scores (H, K_p, h, w) and q, k, v -> (H, K, h, w).

    Readings beyond the paper begin with the mean over heads and have 1 in the place of H, "anchors" 2.
    """
    if kind == "anchors":
        return readings.anchor_reading(qkvs[0])                              # (2, anchors, h, w)
    if kind in KINDS:
        return torch.cat(list(attn), dim=1)
    parts = readings.prompt_shares(attn)                                     # of each prompt, (K_p, h, w)
    if kind == "i2i":                                    # each prompt's classes go through the I2I of its own pass
        parts = [readings.i2i_step(qkv, part) for qkv, part in zip(qkvs, parts)]
    return torch.cat(parts)[None]                                            # (1, K, h, w)


def passes(model: Seg4Diff, z: Tensor, prompts: Sequence[tuple[int, Sequence[str]]], blocks: Sequence[int],
           sigma: float) -> Iterator[tuple[Sequence[int], list[list[slice]], dict[int, JointQKV]]]:
    """All prompts (see `one_draw`) through the transformer, never more than B at once.

    Yields of those that go together: numbers of their pictures, text columns of each one's classes, {block: q, k, v}.
    """
    every = [slice(i, i + 1) for i in range(model.text.length)]              # of the empty prompt
    for start in range(0, len(prompts), len(z)):
        pictures, names = zip(*prompts[start:start + len(z)])
        cond = model.text.encode(list(names))                                # Eq. 9
        _, taps = model(z[list(pictures)], sigma, cond.ctx, cond.pooled, capture=set(blocks), stop_at=max(blocks))
        yield pictures, [spans or every for spans in cond.spans], taps       # an empty prompt has no spans


@torch.inference_mode()
def one_draw(model: Seg4Diff, z0: Tensor, prompts: Sequence[tuple[int, Sequence[str]]], *, blocks: Sequence[int],
             sigma: float, seeds: Sequence[int], kinds: Sequence[str]) -> list[dict[tuple[int, str], Tensor]]:
    """One draw of noise through the model: {(block, kind): (H, K, h, w)} for each picture, see `attend`.

    z0 (B, C, ., .); prompts: pictures' numbers, 0 to B-1, and the names of one prompt each; in the prompt without
    names, the empty one, every column (CLIP's; of Flux, T5's) is a class.
    """
    eps = noise(z0.shape[1:], seeds).to(z0.device)                           # (B, C, ., .)
    z = add_noise(z0.float(), eps, sigma)                                    # Eq. 8, (B, C, ., .)
    made_of = {kind: kind if kind in KINDS else "softmax" for kind in kinds if kind != "anchors"}    # of which scores
    scores = defaultdict(list)               # (picture, block, kind) -> of each prompt, (H, K_p, h, w)
    qkvs = defaultdict(list)                 # (picture, block) -> of each prompt, where a kind needs them
    for pictures, spans, taps in passes(model, z, prompts, blocks, sigma):
        for i, kind in product(blocks, set(made_of.values())):
            for b, attn in zip(pictures, class_attention(taps[i], spans, kind)):
                scores[b, i, kind].append(attn)
        if not {"i2i", "anchors"}.isdisjoint(kinds):
            for i in blocks:
                for b, qkv in zip(pictures, taps[i].each()):
                    qkvs[b, i].append(qkv)
    out = [{} for _ in z0]
    for b, i, kind in product(range(len(z0)), blocks, kinds):
        out[b][i, kind] = joined(kind, scores[b, i, made_of.get(kind)], qkvs[b, i])
    return out                                                               # B x {key: (H, K, h, w)}


@torch.inference_mode()
def attend(model: Seg4Diff, z0: Tensor, classes: Sequence[Sequence[str]] | None, *, blocks: Sequence[int], sigma: float,
           seeds: Sequence[int], kinds: Sequence[str] = ("softmax",), draws: int = 1
           ) -> list[dict[tuple[int, str], Tensor]]:
    """Clean latents through the model: {(block, kind): (H, K, h, w)} for each, K its own classes in order.

    z0 from encode_image, a row for each picture; its noise is that of seeds[b], maps are means over so many draws, of
    seeds[b], seeds[b] + 1, ...  kinds: of KINDS; "shares" and "i2i" (readings.py), (1, K, h, w); "anchors", of which
    regions are made, (2, anchors, h, w).  More names than a prompt holds run as several prompts on the same noise:
    softmax maps are parts of a patch's attention over all keys, so those of equally full prompts are compared as they
    are; shares are formed over the classes of all prompts.
    classes None: the empty prompt, and every column of it, <sos> and <pad> too, is a class.
    ValueError: sigma outside [0, 1], a block that does not exist, names that do not fit, no draws.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must lie between 0 (clean) and 1 (noise), not {sigma}")
    if not all(isinstance(x, Integral) for x in (draws, *seeds)) or draws < 1:
        raise ValueError(f"draws, at least 1, and seeds must be whole numbers, not {draws!r} and {list(seeds)}")
    B = len(z0)
    if len(seeds) != B:
        raise ValueError(f"{B} pictures and {len(seeds)} seeds are not equal lists")
    if classes is not None and len(classes) != B:
        raise ValueError(f"{B} pictures and {len(classes)} lists of class names are not equal lists")
    prompts = []
    for b in range(B):
        parts = [[]] if classes is None else split_classes(model.text, classes[b])
        prompts += [(b, names) for names in parts]
    out = [{} for _ in range(B)]
    for draw in range(draws):
        drawn = one_draw(model, z0, prompts, blocks=blocks, sigma=sigma, seeds=[seed + draw for seed in seeds],
                         kinds=kinds)
        for mean, maps in zip(out, drawn):
            for key, x in maps.items():
                mean[key] = mean.get(key, 0) + x / draws                     # (H, K, h, w)
    return out                                                               # B x {key: (H, K, h, w)}


@torch.inference_mode()
def segment(model: Seg4Diff, image: Images, classes: Sequence, *, reading: str | Sequence[str] = "paper",
            block: int | None = None, sigma: float | None = None, seed: int | Sequence[int] = 0, kind: str = "softmax",
            head: int | None = None, minmax: bool = False, draws: int = 1
            ) -> Segmentation | dict[str, Segmentation] | list:
    """Open-vocabulary segmentation (Sec. 3.4, Fig. 7): every pixel of a picture gets one of its `classes`.

    One picture and its class names, or equal lists, which go through the model together; a seed for each, or for all.
    reading: of READINGS, what is made of the attention (readings.py); several of them come off the same pass, as
    {reading: Segmentation} for each picture.
    block and sigma default to the model's preset. kind (KINDS), head and minmax are the variants of Fig. 9 and of the
    supplement's B.2 to B.4, and go with the paper's reading; draws: noise draws that the maps are averaged over.
    ValueError: no classes, over 255 or names that do not fit, a reading, kind, block or head that does not exist, sigma
    outside [0, 1], variants of the paper's reading with another.
    """
    single = isinstance(image, Picture)
    images = [image] if single else image
    names = [classes] if single else classes
    seeds = [seed] * len(images) if np.ndim(seed) == 0 else seed
    chosen = [reading] if isinstance(reading, str) else list(reading)
    check_segment(model, names, chosen, kind, head, minmax)
    block = model.preset.changed(block=block).block
    sigma = model.preset.sigma if sigma is None else sigma
    kind_of = {"paper": kind, "shares": "shares", "i2i": "i2i", "pixels": "i2i"}
    kinds = list(dict.fromkeys(kind_of[r] for r in chosen))
    z0 = encode_image(model, images)                                         # (B, C, ., .)
    attn = attend(model, z0, names, blocks=[block], sigma=sigma, seeds=seeds, kinds=kinds, draws=draws)
    out = []
    for b, scores in enumerate(attn):
        found = {}
        for r in chosen:
            maps = class_maps(scores[block, kind_of[r]], head, minmax)       # (K, h, w)
            found[r] = Segmentation(labels_of(maps, images[b], r), maps.cpu(), list(names[b]))
        out.append(found[reading] if isinstance(reading, str) else found)
    return out[0] if single else out


def check_segment(model, names, chosen, kind, head, minmax):
    """ValueError: see `segment`."""
    if any(isinstance(x, str) or len(x) > IGNORE for x in names):            # labels may be stored as uint8
        raise ValueError(f"segment takes a list of at most {IGNORE} class names for each picture")
    last = model.transformer.config.heads - 1
    if head is not None and not 0 <= head <= last:
        raise ValueError(f"there is no head {head}: this model's heads are 0 to {last}")
    if kind not in KINDS:
        raise ValueError(f"there is no kind of score {kind!r}; the kinds are {', '.join(KINDS)}")
    if not chosen or not set(chosen) <= set(READINGS):
        raise ValueError(f"there is no reading {', '.join(chosen)!r}; the readings are {', '.join(READINGS)}")
    if set(chosen) != {"paper"} and (kind, head, minmax) != ("softmax", None, False):
        raise ValueError("kind, head and minmax are variants of the paper's reading, not of any other")


# ---------------------------------------------------------------------------- <pad> maps -> proposals, Sec. 3.4, A.4

REGIONS = ("pad", "i2i")


class Proposals(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into maps
    maps: Tensor                        # (P, h, w): pad, each sums to 1; i2i, all sum to 1 at each patch
    members: list[list[int]]            # for each proposal, the text columns, or the anchors, that it gathers


def merge_maps(maps: Tensor, threshold: float, scaling: str) -> tuple[Tensor, list[list[int]]]:
    """Attention maps of tokens (L, h, w) -> proposals (P, h, w), and which tokens each gathers (Table 2).

    Maps are scaled to [0, 1], each over its positions ("map"), each position over the tokens ("token"), or not at all
    ("none"); a softmax over positions then makes each a distribution. They are merged in token order
    (readings.merge_greedy), and the mean of a group is a proposal.
    NOTE(official): the released code scales over tokens (of two definitions the later wins), threshold 0.1.
    ValueError: a scaling that does not exist, a threshold that is not positive.
    """
    Preset(threshold=threshold, scaling=scaling)         # which checks both
    x = maps.float().flatten(1)                                              # (L, N)
    if scaling != "none":
        x = rescale(x, 1 if scaling == "map" else 0)
    log_p = x.log_softmax(dim=1)                                             # (L, N)
    p = log_p.exp()
    members = readings.merge_greedy(log_p, threshold)
    proposals = torch.stack([p[group].mean(0) for group in members])         # (P, N)
    return proposals.unflatten(1, maps.shape[1:]), members                   # (P, h, w)


@torch.inference_mode()
def pad_maps(model: Seg4Diff, z0: Tensor, *, block: int, sigma: float, seeds: Sequence[int], draws: int = 1) -> Tensor:
    """I2T maps of all L columns of the empty prompt, mean over heads: z0 (B, C, ., .) -> (B, L, h, w) (Fig. 9 b)."""
    attn = attend(model, z0, None, blocks=[block], sigma=sigma, seeds=seeds, draws=draws)
    return torch.stack([class_maps(scores[block, "softmax"]) for scores in attn])            # (B, L, h, w)


@torch.inference_mode()
def propose(model: Seg4Diff, image: Images, *, regions: str = "pad", block: int | None = None,
            sigma: float | None = None, seed: int | Sequence[int] = 0, threshold: float | None = None,
            scaling: str | None = None, draws: int = 1) -> Proposals | list[Proposals]:
    """Regions without any names, by the empty prompt.  One picture or a list; a seed for each, or for all.

    regions "pad" (A.4): the maps of <sos>, <eos> and <pad>, merged (merge_maps). "i2i", beyond the paper: anchors on
    a grid, merged by where their image-to-image attention goes (readings.merge_anchors); no scaling is read.
    What is not given comes from the preset, with a threshold for each kind of regions.
    ValueError: regions that do not exist, a scaling for "i2i"; see merge_maps.
    """
    if regions not in REGIONS or (regions == "i2i" and scaling is not None):
        raise ValueError(f"regions is {' or '.join(REGIONS)}, and scaling belongs to pad; not {regions!r}, {scaling!r}")
    single = isinstance(image, Picture)
    images = [image] if single else image
    seeds = [seed] * len(images) if np.ndim(seed) == 0 else seed
    if threshold is None and regions == "i2i":
        threshold = model.preset.i2i_threshold
    preset = model.preset.changed(block=block, threshold=threshold, scaling=scaling)
    sigma = preset.sigma if sigma is None else sigma
    z0 = encode_image(model, images)                                         # (B, C, ., .)
    if regions == "pad":
        maps = pad_maps(model, z0, block=preset.block, sigma=sigma, seeds=seeds, draws=draws)    # (B, L, h, w)
        merged = [merge_maps(tokens, preset.threshold, preset.scaling) for tokens in maps]   # B x (P, h, w)
    else:
        attn = attend(model, z0, None, blocks=[preset.block], sigma=sigma, seeds=seeds, kinds=["anchors"], draws=draws)
        merged = [readings.merge_anchors(scores[preset.block, "anchors"], preset.threshold) for scores in attn]
    out = []
    for picture, (proposals, members) in zip(images, merged):
        out.append(Proposals(labels_of(proposals, picture), proposals.cpu(), members))
    return out[0] if single else out


# ---------------------------------------------------------------------------- command line


def run_segment(args):
    check_out(args.out)
    if args.out.exists() and args.out.samefile(args.image):
        raise ValueError(f"--out {args.out} is the picture itself, which would be lost; name another file")
    image = open_image(args.image)
    model = load(args.model, args.device, args.dtype, segment_only=args.block is None, lora=args.lora)
    seg = segment(model, image, args.classes, reading=args.reading, block=args.block, sigma=args.sigma, seed=args.seed)
    write_picture(args.out, panels(image, seg.labels, seg.classes))
    note = "" if args.reading == "paper" else " (beyond the paper; --reading paper gives the paper's)"
    show(f"reading: {args.reading}{note}")
    for k, name in enumerate(seg.classes):
        show(f"{name:<20s} {(seg.labels == k).mean():6.1%}")
    show(f"wrote {args.out}; to look into the attention: python explore.py {args.image} CLASS...")


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


def run_doctor(args):
    from tools.doctor import report  # which no other command needs
    report(args.model, args.device, args.dtype, args.data_root)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="segment | generate | doctor")
    seg = commands.add_parser("segment", help="mask the named classes in a picture")
    seg.add_argument("image", type=Path)
    seg.add_argument("classes", type=utf8, nargs="+", metavar="CLASS")
    seg.add_argument("--reading", default="i2i", choices=READINGS, help="how the attention is read (i2i)")
    seg.add_argument("--block", type=int, help="block whose attention is taken; the model's expert block if not given")
    seg.add_argument("--sigma", type=float, help="noise level in [0, 1]; the model's preset if not given")
    seg.set_defaults(run=run_segment)
    gen = commands.add_parser("generate", help="draw a picture from a prompt, or a sheet of them from several")
    gen.add_argument("prompts", type=utf8, nargs="+", metavar="PROMPT")
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
    doctor = commands.add_parser("doctor", help="what is there, what is missing, and what SD3 and Flux would take here")
    add_model_options(doctor, default=None, default_help="all models", lora=False, seed=False)
    doctor.add_argument("--data-root", type=Path, help="where data sets lie (default: SEG4DIFF_DATA, or ./data)")
    doctor.set_defaults(run=run_doctor)
    command(lambda args: args.run(args), parser)

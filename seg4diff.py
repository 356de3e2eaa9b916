"""The method of Seg4Diff: rectified flow, and image-to-text attention maps read as a segmentation (Sec. 3.4).

    python seg4diff.py segment photo.png car sky "teddy bear" --out overlay.png
    python seg4diff.py generate "a red car on the grass under a blue sky" --out image.png

Both use the embedded nano model unless --model names another.  From Python:

    model = seg4diff.load()
    seg = seg4diff.segment(model, Image.open("photo.png"), ["car", "sky", "teddy bear"])
"""
import argparse
import colorsys
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

import weights
from data import IGNORE
from mmdit import JointQKV, MMDiT, i2t_attention, i2t_scores, t2i_attention
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
    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    preset: Preset
    name: str

    @property
    def device(self) -> torch.device:
        return self.mmdit.pos_embed.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mmdit.pos_embed.dtype


def load(name_or_path: str | Path = "nano", device: str = "auto", dtype: str | torch.dtype = "auto",
         segment_only: bool = False) -> Seg4Diff:
    """A model ready to use: a name of weights.NAMES, a .safetensors file, or a folder (weights.find).

    device "auto": CUDA if there is one.  dtype "auto": bf16 on CUDA, fp32 on the CPU.  With segment_only, blocks
    after the expert are left on the disk; such a model segments, and cannot generate.
    ValueError: no such model, a file that is broken or does not fit, an unknown device or dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = str(device).split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"there is no device {device!r}; choose auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but PyTorch sees no CUDA device here; use cpu")
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
                                ("pixels beyond whole patches", preset.size % (vae.factor * mmdit.config.patch), 0)):
        if found != wanted:
            raise ValueError(f"the parts of {name_or_path} do not fit each other: {found} {what}, not {wanted}")
    path = Path(name_or_path)
    return Seg4Diff(mmdit, vae, text, preset, path.stem if path.suffix == ".safetensors" else path.name)


# ---------------------------------------------------------------------------- rectified flow, Sec. 3.2


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of the Euler sampler, (steps+1,) from 1 down to 0; those of SD3's scheduler.

    The shift f(s) = a s / (1 + (a-1) s) is applied to the ends of the line and then to the line itself, as
    the published scheduler does; its table has 1000 entries, so the last level above 0 comes from 1/1000.
    """
    def f(s):
        return shift * s / (1 + (shift - 1) * s)

    line = torch.linspace(1.0, f(1 / 1000), steps, dtype=torch.float64)      # (S,)
    return torch.cat([f(line), line.new_zeros(1)]).float()                   # (S+1,)


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


def guided_velocity(model: Seg4Diff, cond: TextCond, uncond: TextCond, cfg: float
                    ) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance: uncond + cfg (cond - uncond), both branches in one batch; cfg 1 runs cond alone."""
    def velocity(z: Tensor, sigma: Tensor) -> Tensor:
        z, sigma = z.to(model.dtype), sigma.to(z.device)
        if cfg == 1:
            return model.mmdit(z, sigma, cond.ctx, cond.pooled)[0].float()
        both, _ = model.mmdit(torch.cat([z, z]), torch.cat([sigma, sigma]), torch.cat([uncond.ctx, cond.ctx]),
                              torch.cat([uncond.pooled, cond.pooled]))       # (2B, C, ., .)
        v_uncond, v_cond = both.float().chunk(2)
        return v_uncond + cfg * (v_cond - v_uncond)
    return velocity


@torch.inference_mode()
def generate(model: Seg4Diff, prompt: str | Sequence[str], *, steps: int | None = None, cfg: float | None = None,
             seed: int = 0, callback: Callable[[int, Tensor], None] | None = None) -> list[Image.Image]:
    """One picture for each prompt, side model.preset.size; picture i starts from the noise of seed + i.

    steps and cfg default to the model's preset.  ValueError: steps < 1, no prompt.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    steps, cfg = (model.preset.steps if steps is None else steps), (model.preset.cfg if cfg is None else cfg)
    if steps < 1 or not prompts or not math.isfinite(cfg):
        raise ValueError(f"generation takes at least one step, one prompt and a finite guidance scale, not {steps} steps, "
                         f"{len(prompts)} prompts, scale {cfg}")
    side = model.preset.size // model.vae.factor
    z = noise((model.mmdit.config.channels, side, side), [seed + i for i in range(len(prompts))]).to(model.device)
    velocity = guided_velocity(model, model.text.encode(prompts), model.text.encode([""] * len(prompts)), cfg)
    z = sample(velocity, z, sigmas(steps, model.preset.shift).to(model.device), callback)
    x = [model.vae.decode(one.to(model.dtype))[0] for one in z.split(1)]     # B x (3, px, px), one at a time for memory
    return [Image.fromarray((127.5 * (y.float() + 1)).clamp(0, 255).round().byte().permute(1, 2, 0).cpu().numpy())
            for y in x]


# ---------------------------------------------------------------------------- I2T maps -> masks, Sec. 3.4


# What one pixel-word score can be (Table 5 of the supplement's B.3, Fig. 16): each is (B, H, N, M).
KINDS = {"softmax": i2t_attention, "logits": i2t_scores, "t2i": lambda qkv: t2i_attention(qkv).mT}


class Segmentation(NamedTuple):
    labels: np.ndarray                  # (height, width) of the picture given, index into classes
    maps: Tensor                        # (K, h, w) on the patch grid, what the argmax is taken of
    classes: list[str]


def open_image(path: str | Path) -> Image.Image:
    """Any file PIL reads -> RGB, the way a person sees it: turned upright, transparency on white.

    ValueError: no such file, not a picture.
    """
    try:
        image = Image.open(path)
        image.load()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise ValueError(f"no picture can be opened at {str(path)!r}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{str(path)!r} is not a picture that PIL can read: {e}") from None
    if image.mode[0] in "IF":                            # 16 or 32 bits, or floats: convert() would clip at 255
        x = np.nan_to_num(np.asarray(image, float)).clip(0)
        top = next((t for t in (1, 255, 65535) if x.max() <= t and (t > 1 or image.mode == "F")), x.max())
        image = Image.fromarray((255 * x / top).round().astype(np.uint8))
    rgba = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def image_tensor(image: Image.Image, size: int) -> Tensor:
    """Squash the whole picture to size x size (one bilinear resize, antialiased when shrinking), (3, size, size) in
    [-1, 1]. NOTE(official): the paper crops the centre; its code squashes, and so do we (it first shrinks the short
    side to 640, and resizes without antialiasing)."""
    x = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))     # (size, size, 3)
    return torch.from_numpy(x.copy()).permute(2, 0, 1).float() / 127.5 - 1                   # (3, size, size)


def split_classes(text: TextEncoders, classes: Sequence[str]) -> list[list[str]]:
    """Class names -> as few prompts as hold them all; no name is cut.

    ValueError: no names, a name without tokens, a name longer than a prompt.
    """
    prompts, room = [], 0
    for name in classes:
        n = text.n_tokens(name)
        if n == 0:
            raise ValueError(f"the class name {name!r} has no token; give it letters or digits")
        if n > text.length - 2:
            raise ValueError(f"the class name {name[:40]!r}... takes {n} tokens; a prompt has room for {text.length - 2}")
        if n > room:
            prompts.append([])
            room = text.length - 2
        prompts[-1].append(name)
        room -= n
    if not prompts:
        raise ValueError("the list of classes is empty; name at least one thing to segment")
    return prompts


def class_attention(qkv: JointQKV, spans: Sequence[Sequence[slice]], kind: str = "softmax") -> list[Tensor]:
    """Scores of each class on the patch grid, head by head: B tensors (H, K, h, w).

    A class of several tokens gets the mean of their columns (Sec. 3.4); spans[b][k] are the columns of class k.
    """
    scores = KINDS[kind](qkv)                                                # (B, H, N, M)
    return [torch.stack([s[:, :, span].mean(-1) for span in names], dim=1).unflatten(-1, qkv.grid)
            for s, names in zip(scores, spans)]


def class_maps(attn: Tensor, head: int | None = None, minmax: bool = False) -> Tensor:
    """Eq. 10, 11: (H, K, h, w) -> the mean over heads (or one head), (K, h, w); `minmax` scales every map to [0, 1]."""
    maps = attn.mean(0) if head is None else attn[head]                      # (K, h, w)
    if minmax:
        lo, hi = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        maps = (maps - lo) / (hi - lo).clamp_min(1e-12)
    return maps


def label_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(K, h, w) -> bilinear to (height, width) -> the best class at every pixel, (height, width) int64."""
    best = maps.new_full(size, -torch.inf, dtype=torch.float32)              # (height, width)
    labels = best.new_zeros(size, dtype=torch.int64)
    for i in range(0, len(maps), 8):                     # a few classes at a time: 150 of them at 12 MP would take 7 GB
        up = F.interpolate(maps[None, i:i + 8].float(), size=size, mode="bilinear", align_corners=False)[0]
        value, index = up.max(0)                                             # 2 x (height, width)
        labels, best = torch.where(value > best, index + i, labels), torch.maximum(value, best)
    return labels


@torch.inference_mode()
def attend(model: Seg4Diff, z0: Tensor, classes: Sequence[Sequence[str]], *, blocks: Sequence[int], sigma: float,
           seeds: Sequence[int], kinds: Sequence[str] = ("softmax",)) -> list[dict[tuple[int, str], Tensor]]:
    """Clean latents through the model once: {(block, kind): (H, K, h, w)} for each, K its own classes in order.

    z0 from vae.encode, one row a picture; the noise of picture b is that of seeds[b] (Eq. 8). More names than one
    prompt holds run as several prompts on the same noise. Each softmax map is a share of its pixel's attention over
    all keys, so maps of different prompts are compared as they are. The run ends at the last block asked for.
    ValueError: sigma outside [0, 1], a block that does not exist, names that do not fit.
    """
    if not 0 <= sigma <= 1:
        raise ValueError(f"sigma must lie between 0 (clean) and 1 (noise), not {sigma}")
    z = add_noise(z0.float(), noise(z0.shape[1:], seeds).to(z0.device), sigma).to(model.dtype)
    prompts = [(b, names) for b, own in enumerate(classes) for names in split_classes(model.text, own)]
    out: list[dict] = [{(i, kind): [] for i in blocks for kind in kinds} for _ in classes]
    for part in (prompts[i:i + len(z)] for i in range(0, len(prompts), len(z))):   # never more than B rows at once
        rows, cond = [b for b, _ in part], model.text.encode([names for _, names in part])
        _, taps = model.mmdit(z[rows], torch.full((len(rows),), sigma, device=z.device), cond.ctx, cond.pooled,
                              capture=set(blocks), stop_at=max(blocks))
        for i, kind in out[0]:
            for b, attn in zip(rows, class_attention(taps[i], cond.spans, kind)):
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
    if head is not None and not 0 <= head < model.mmdit.config.heads:
        raise ValueError(f"there is no head {head}: this model's heads are 0 to {model.mmdit.config.heads - 1}")
    if kind not in KINDS:
        raise ValueError(f"there is no kind of score {kind!r}; the kinds are {', '.join(KINDS)}")
    z0 = model.vae.encode(image_tensor(image, model.preset.size)[None].to(model.device, model.dtype))    # (1, C, ., .)
    attn, = attend(model, z0, [classes], blocks=blocks, kinds=[kind], seeds=[seed],
                   sigma=model.preset.sigma if sigma is None else sigma)     # {(block, kind): (H, K, h, w)}
    maps = torch.stack([class_maps(a, head, minmax) for a in attn.values()]).mean(0)         # (K, h, w)
    labels = label_map(maps, (image.height, image.width)).cpu().numpy()
    return Segmentation(labels, maps.cpu(), list(classes))


# ---------------------------------------------------------------------------- pictures


def palette(n: int) -> np.ndarray:
    """n colours, (n, 3) uint8: hues a golden section apart, so that neighbours differ most, in three strengths."""
    strengths = [(0.55, 1.0), (0.85, 0.9), (0.8, 0.6)]                        # saturation, value
    rgb = [colorsys.hsv_to_rgb((0.57 + 0.618034 * i) % 1, *strengths[i % 3]) for i in range(n)]
    return np.array([[round(255 * c) for c in x] for x in rgb], np.uint8)


def overlay(image: Image.Image, labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The picture, greyed, under its label map in colour; label IGNORE stays uncoloured."""
    grey = np.asarray(image.convert("L").convert("RGB"), float)
    table = np.concatenate([colours, np.zeros((256 - len(colours), 3), np.uint8)])
    mixed = np.where((labels == IGNORE)[..., None], grey, 0.4 * grey + 0.6 * table[labels])
    return Image.fromarray(mixed.astype(np.uint8))


def legend(names: Sequence[str], colours: np.ndarray, width: int) -> Image.Image:
    """Colour patches with their names, as many to a row as fit into `width` pixels."""
    font = ImageFont.load_default(14)
    rows, x, widest = [[]], 0, width
    for name, colour in zip(names, colours):
        w = 34 + int(font.getlength(name))
        if x + w > width and rows[-1]:
            rows.append([])
            x = 0
        rows[-1].append((x, name, tuple(int(c) for c in colour)))
        x += w
        widest = max(widest, x)
    strip = Image.new("RGB", (widest, 22 * len(rows) + 4), "white")
    pen = ImageDraw.Draw(strip)
    for i, row in enumerate(rows):
        for x, name, colour in row:
            pen.rectangle([x + 4, 22 * i + 5, x + 18, 22 * i + 19], fill=colour, outline="black")
            pen.text((x + 23, 22 * i + 3), name, fill="black", font=font)
    return strip


def sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Pictures of one size in rows, each above its caption, wrapped to the picture's width."""
    font, zoom = ImageFont.load_default(13), max(1.0, 192 / images[0].height)
    w, h = round(zoom * images[0].width), round(zoom * images[0].height)
    wrapped = []
    for caption in captions:
        lines = [""]
        for word in caption.split():
            if font.getlength(f"{lines[-1]} {word}") > w - 6 and lines[-1]:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        wrapped.append("\n".join(lines))
    cell_h = h + 18 * max(x.count("\n") + 1 for x in wrapped) + 8
    columns = min(columns, len(images))
    out = Image.new("RGB", (columns * (w + 6), -(-len(images) // columns) * cell_h), "white")
    for i, (image, caption) in enumerate(zip(images, wrapped)):
        x, y = i % columns * (w + 6), i // columns * cell_h
        out.paste(image.resize((w, h), Image.Resampling.BICUBIC), (x, y))
        ImageDraw.Draw(out).multiline_text((x + 2, y + h + 2), caption, fill="black", font=font)
    return out


def stack(*rows: Image.Image) -> Image.Image:
    """Pictures below each other on white."""
    out = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        out.paste(row, (0, sum(r.height for r in rows[:i])))
    return out


# ---------------------------------------------------------------------------- command line


PANEL = (512, 1024)                     # least and most pixels of a panel's longer side, so that its legend can be read


def check_out(path: Path) -> None:
    """ValueError now, not after the work, if a picture cannot be written to `path`."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out {path} should end in .png, .jpg or another picture format")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"--out {path} cannot be written: its folder must exist and be writable")


def run_segment(args: argparse.Namespace) -> None:
    check_out(args.out)
    image = open_image(args.image)
    model = load(args.model, args.device, segment_only=args.block is None)
    seg = segment(model, image, args.classes, block=args.block, sigma=args.sigma, seed=args.seed)
    colours, longest = palette(len(seg.classes)), max(image.size)
    shown = min(max(longest, PANEL[0]), PANEL[1])
    size = [max(1, round(x * shown / longest)) for x in image.size]
    panels = Image.new("RGB", (2 * size[0] + 4, size[1]), "white")
    for i, x in enumerate([image, overlay(image, seg.labels, colours)]):
        panels.paste(x.resize(size, Image.Resampling.BILINEAR), (i * (size[0] + 4), 0))
    stack(panels, legend(seg.classes, colours, panels.width)).save(args.out)
    for k, name in enumerate(seg.classes):
        print(f"{name:<20s} {(seg.labels == k).mean():6.1%}")
    print(f"wrote {args.out}")


def run_generate(args: argparse.Namespace) -> None:
    check_out(args.out)
    model = load(args.model, args.device)
    steps = model.preset.steps if args.steps is None else args.steps
    with tqdm(total=max(steps, 0), desc="sampling", unit="step") as bar:
        images = generate(model, args.prompts, steps=steps, cfg=args.cfg, seed=args.seed, callback=lambda i, z: bar.update())
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
    gen.set_defaults(run=run_generate)
    for p, out in ((seg, "overlay.png"), (gen, "image.png")):
        p.add_argument("--out", type=Path, default=Path(out))
        p.add_argument("--model", default="nano", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder")
        p.add_argument("--seed", type=int, default=0)
        p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    try:
        args.run(args)
    except (ValueError, OSError) as e:              # bad input: one sentence, no traceback
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

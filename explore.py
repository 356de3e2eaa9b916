"""An attention explorer in one HTML file: point at a patch and see which words it listens to, point at a word and see
where it is heard, slide through blocks, heads and noise levels (Sec. 3.3, 3.4, B.1, B.2).

    python explore.py photo.png cat sofa wall --model sd3            # a picture and the names of what is in it
    python explore.py --scene 15 --lora nano/magnet.safetensors      # a drawn scene with true masks; without and with
    python explore.py --generate "a red car with sand under the sky" car sand sky        # while it is being drawn

The file holds its data, asks no other address for anything and opens by a double click. Here is what is computed for
it; the page itself is support/explorer.html, with the scripts beside it.
"""
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import readings
import seg4diff
from loading import Preset, Seg4Diff
from mmdit import JointQKV, t2i_attention
from nano import scenes
from sampling import trajectory
from support.cli import Parser, add_model_options, at_least, command, show, utf8
from support.metrics import classes_in
from support.page import at_most, embedded, packed, quantised, write
from support.pictures import open_image, to_image
from text import TextCond, split_classes

SIDE = 32                               # of a larger grid, as SD3's, maps are kept at so many patches a side
HEAD_SIDE = 16                          # the same for maps of single heads, of which there are many
PADS = 3                                # <pad> tokens that keep a map of their own; the others share one
ROWS = 128                              # of I2I that are formed at once
MASKED = 256                            # longer side of the page's masks, pixels
STEPS = {"i2i": 63}                     # of a stored value: 6 bits for I2I, the largest part, 8 for all else
# words of a prompt that have no mask unless they are named
LITTLE = {"a", "an", "the", "and", "with", "of", "in", "on", "at", "to", "by", "under", "above", "below", "next"}

# ---------------------------------------------------------------------------- what is looked at


def columns_of(tokens: Sequence[str], M: int) -> list[slice]:
    """Text rows that share a map in the page: each token has one, but for the later <pad>s, and the M - L rows in T5's
    place, which are all alike."""
    L = len(tokens)
    padding = tokens.index("<pad>") if "<pad>" in tokens else L
    alone = min(padding + PADS, L)
    columns = [slice(i, i + 1) for i in range(alone)] + [slice(alone, L), slice(L, M)]
    return [rows for rows in columns if rows.start < rows.stop]


def i2i_blocks(model: Seg4Diff) -> list[int]:
    """The blocks whose I2I is kept: all of a small grid, of a large one the expert alone."""
    if model.grid > HEAD_SIDE:
        return [model.preset.block]
    return list(range(model.transformer.config.depth))


def levels_of(preset: Preset, every: int) -> dict[int, float]:
    """{steps left, the paper's t: sigma} from noise to clean: the preset's t and those a multiple of `every` away.

    ValueError: the preset's level is none of the sampler's, as FLUX.1-schnell's.
    """
    if preset.noise_steps == 0 or preset.level is not None:
        raise ValueError("the explorer shows noise levels of the sampler, and this model segments at none of them")
    schedule = preset.sigmas(preset.steps).tolist()
    lefts = [t for t in range(preset.steps, 0, -1) if (t - preset.noise_steps) % every == 0]
    return {t: schedule[preset.steps - t] for t in lefts}


@torch.inference_mode()
def noised(model: Seg4Diff, image: Image.Image, seed: int, levels: dict[int, float]) -> dict[int, Tensor]:
    """What seg4diff.segment shows the transformer, at several levels under the same noise: {t: z (1, C, ., .)}."""
    z0 = seg4diff.encode_image(model, image).float()                         # (1, C, ., .)
    eps = seg4diff.noise(z0.shape[1:], [seed]).to(z0.device)                 # (1, C, ., .)
    return {t: seg4diff.add_noise(z0, eps, sigma) for t, sigma in levels.items()}            # Eq. 8


@torch.inference_mode()
def drawn(model: Seg4Diff, prompt: str, seed: int, levels: dict[int, float]
          ) -> tuple[dict[int, Tensor], list[Image.Image]]:
    """A picture while it is generated: its latents {t: z (1, C, ., .)}, and what the sampler takes z0 for at each t.

    From one z to the next the sampler went along its velocity eps - z0, so its estimate is z0 = z - sigma * vel.
    """
    _, latents = trajectory(model, prompt, seed)
    sigmas = levels_of(model.preset, 1) | {0: 0.0}
    estimates = []
    for t, sigma in levels.items():
        vel = (latents[t - 1] - latents[t]) / (sigmas[t - 1] - sigma)        # (1, C, ., .)
        z0 = latents[t] - sigma * vel                                        # Eq. 1, (1, C, ., .)
        estimates.append(to_image(model.vae.decode(z0.to(model.dtype))[0]))
    return {t: latents[t] for t in levels}, estimates


def find_names(prompt: str, names: Sequence[str], spans: Sequence[slice]) -> dict[str, slice]:
    """Each name's text rows, where its words stand in the prompt; spans: rows of each word of the prompt.

    No names: every word, but for the little ones.  ValueError: a name that does not stand there, or was cut off.
    """
    words = [word.strip(",.;:!?\"'()").lower() for word in prompt.split()]
    names = names or [word for word in words if word and word not in LITTLE]
    if not names:
        raise ValueError(f"the prompt {prompt!r} has no word whose attention could be shown")
    found = {}
    for name in names:
        parts = name.lower().split()
        starts = [i for i in range(len(words)) if parts and words[i:i + len(parts)] == parts]
        if not starts:
            raise ValueError(f"{name!r} does not stand in the prompt {prompt!r}; only what does has maps")
        first = spans[starts[0]]
        last = spans[starts[0] + len(parts) - 1]
        if last.start == last.stop:
            raise ValueError(f"{name!r} has no token in the prompt, which is cut where the text encoder's rows end")
        found[name] = slice(first.start, last.stop)
    return found


# ---------------------------------------------------------------------------- maps


def shrunk(maps: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Maps (..., h*w) averaged down to at most side x side patches, (..., n)."""
    size = (min(grid[0], side), min(grid[1], side))
    return F.adaptive_avg_pool2d(maps.unflatten(-1, grid), size).flatten(-2)  # (..., n)


def column_maps(qkv: JointQKV, columns: Sequence[slice], patches: Tensor) -> Tensor:
    """i2t_attention's rows of these patches (n,), columns that share a map averaged: (H, T, n), without its chunks.

    It is attention in which a text row's value is a one in the place of its column, shared by the column's rows. The
    fused kernel wants values as wide as the heads, so columns go through in groups of d, padded by zeros.
    """
    N = qkv.n_img
    q = qkv.q[:, :, patches].float()                                         # (1, H, n, d)
    k = qkv.k.float()                                                        # (1, H, N+M, d)
    d = q.shape[-1]
    ones = torch.zeros(k.shape[2], len(columns), device=k.device)            # (N+M, T)
    for column, rows in enumerate(columns):
        ones[N + rows.start:N + rows.stop, column] = 1 / (rows.stop - rows.start)
    maps = []
    for group in ones.split(d, dim=1):
        values = F.pad(group, (0, d - group.shape[1])).expand(*k.shape)      # (1, H, N+M, d)
        out = F.scaled_dot_product_attention(q, k, values.contiguous())      # Eq. 4, (1, H, n, d)
        maps.append(out[0, :, :, :group.shape[1]].mT)                        # (H, up to d, n)
    return torch.cat(maps, dim=1)                                            # (H, T, n)


def image_attention(qkv: JointQKV, side: int) -> Tensor:
    """I2I: softmax over the image keys alone, mean over heads, (n, n); queries and keys averaged down to side x side.

    Each query's row of A_I2I divided by its sum.  ROWS at a time: all of them at SD3's size would take 1.6 GB.
    """
    rows = []
    for part in torch.arange(qkv.n_img, device=qkv.q.device).split(ROWS):
        whole = readings.image_rows(qkv, part)           # Eq. 4 without the text keys, (ROWS, N)
        rows.append(shrunk(whole, qkv.grid, side))                           # (ROWS, n)
    return shrunk(torch.cat(rows).mT, qkv.grid, side).mT                     # (n, n)


@torch.inference_mode()
def attention(model: Seg4Diff, latents: dict[int, Tensor], levels: dict[int, float], cond: TextCond,
              columns: Sequence[slice]) -> dict[str, Tensor]:
    """All maps of the page, in fp32 on the CPU, at n of the N patches: SIDE x SIDE, spread over a larger grid.

    Those of all of SD3's 4096 patches would take longer than its forward passes.
    i2t, t2i (levels, depth, T, n): means over heads (Eq. 10).  At the preset's level: i2t_heads, t2i_heads
    (depth, H, T, n), of fewer patches, and i2i (blocks, n, n), averaged down to them.
    """
    depth = model.transformer.config.depth
    side = min(model.grid, SIDE)
    patches = readings.spread_patches((model.grid, model.grid), SIDE)        # (n,)
    fewer = readings.spread_patches((side, side), HEAD_SIDE)                 # of those that are kept
    maps = {"i2t": [], "t2i": [], "i2t_heads": [], "t2i_heads": [], "i2i": []}
    for t, z in tqdm(latents.items(), desc=f"{model.name}: noise levels", unit="level"):
        _, taps = model(z, levels[t], cond.ctx, cond.pooled, capture=range(depth))
        for block in range(depth):
            qkv = taps.pop(block)
            t2i = t2i_attention(qkv)[0][:, :, patches]                       # (H, M, n)
            t2i = torch.stack([t2i[:, rows].mean(1) for rows in columns], dim=1)                     # (H, T, n)
            for name, heads in (("i2t", column_maps(qkv, columns, patches)), ("t2i", t2i)):
                maps[name].append(heads.mean(0).cpu())
                if t == model.preset.noise_steps:
                    maps[f"{name}_heads"].append(heads[:, :, fewer].cpu())
            if t == model.preset.noise_steps and block in i2i_blocks(model):
                maps["i2i"].append(image_attention(qkv, SIDE).cpu())
    out = {name: torch.stack(parts) for name, parts in maps.items()}
    for name in ("i2t", "t2i"):
        out[name] = out[name].unflatten(0, (len(levels), depth))             # (levels, depth, T, n)
    return out


# ---------------------------------------------------------------------------- the page's data


def pixel_labels(model: Seg4Diff, image: Image.Image, names: Sequence[str], seed: int) -> np.ndarray:
    """The mask of the reading "pixels" at the size of the page's masks; it looks at more than the maps."""
    labels = seg4diff.segment(model, image, names, reading="pixels", seed=seed).labels       # (height, width)
    small = Image.fromarray(labels.astype(np.uint8)).resize(at_most(image, MASKED).size, Image.Resampling.NEAREST)
    return np.asarray(small)


def facts(model: Seg4Diff, levels: dict[int, float], tokens: Sequence[str], columns: Sequence[slice],
          spans: dict[str, slice]) -> dict:
    """What the page has to know beside the maps; the same without and with a LoRA."""
    cfg = model.transformer.config
    labels = [*tokens, "<empty>"]                        # of the column that follows the last token
    side = model.grid
    return {
        "patches": side, "side": min(side, SIDE), "head_side": min(side, HEAD_SIDE), "depth": cfg.depth,
        "heads": cfg.heads, "expert": model.preset.block, "i2i_blocks": i2i_blocks(model),
        "steps": model.preset.steps, "preset": list(levels).index(model.preset.noise_steps),
        "levels": [{"left": t, "sigma": sigma} for t, sigma in levels.items()],
        "columns": [{"label": labels[c.start], "first": c.start, "count": c.stop - c.start} for c in columns],
        "classes": [{"name": name, "columns": list(range(s.start, s.stop))} for name, s in spans.items()]}


# ---------------------------------------------------------------------------- command line


def read_input(args):
    """Picture or None, names, and for each pixel of a drawn scene the number of its name."""
    if args.generate is not None:
        return None, args.words, None
    if args.scene is None:
        return open_image(args.words[0]), list(dict.fromkeys(args.words[1:])), None
    scene = scenes.draw(args.scene)
    ids = classes_in(scene.labels)                                           # (K,)
    truth = np.searchsorted(ids, scene.labels).astype(np.uint8)              # (height, width)
    return Image.fromarray(scene.image), [scenes.CLASSES[i] for i in ids], truth


def check(args):
    """ValueError, before any work: not exactly one input, or a file that cannot be written."""
    inputs = (args.scene is not None) + (args.generate is not None)
    if inputs > 1 or (args.scene is not None and args.words) or (inputs == 0 and len(args.words) < 2):
        raise ValueError("give a picture and at least one class name, or --scene SEED alone, or --generate PROMPT and "
                         "perhaps names that stand in it")
    if args.out.suffix.lower() != ".html" or not os.access(args.out.parent, os.W_OK) or args.out.is_dir():
        raise ValueError(f"--out {args.out} should be a file that ends in .html, in a folder that can be written to")


def main(args):
    check(args)
    image, names, truth = read_input(args)
    prompt = " ".join(names) if image else args.generate
    variants = []
    loras = [None]
    if args.lora:
        loras.append(args.lora)
    for lora in loras:
        model = seg4diff.load(args.model, args.device, args.dtype, lora=lora)
        levels = levels_of(model.preset, args.every or (8 if model.grid > SIDE else 4))
        if image is None:
            cond = model.text.encode([prompt])
            spans = find_names(prompt, names, cond.spans[0])
            latents, pictures = drawn(model, prompt, args.seed, levels)
        else:
            if len(split_classes(model.text, names)) > 1:
                raise ValueError(f"one prompt, and so the explorer, does not hold these {len(names)} names")
            cond = model.text.encode([names])                                # Eq. 9
            spans = dict(zip(names, cond.spans[0]))
            latents = noised(model, image, args.seed, levels)
            pictures = [image]
        columns = columns_of(cond.tokens[0], cond.ctx.shape[1])
        maps = attention(model, latents, levels, cond, columns)
        stored = {name: quantised(x, STEPS.get(name, 255)) for name, x in maps.items()}
        if image is not None:
            stored["pixels"] = packed(pixel_labels(model, image, names, args.seed))
        variants.append(stored | {"name": model.name, "pictures": [embedded(picture) for picture in pictures]})
    data = facts(model, levels, cond.tokens[0], columns, spans) | {
        "prompt": prompt, "generated": image is None, "seed": args.seed, "variants": variants,
        "size": at_most(pictures[0], MASKED).size, "truth": None if truth is None else packed(truth)}
    write(args.out, data)
    show(f"wrote {args.out} ({args.out.stat().st_size / 2**20:.1f} MB); open it in a browser")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("words", type=utf8, nargs="*", metavar="IMAGE CLASS",
                        help="a picture and the names of what is in it")
    parser.add_argument("--scene", type=at_least(0), metavar="SEED", help="instead: a drawn scene of nano's toy world")
    parser.add_argument("--generate", type=utf8, metavar="PROMPT",
                        help="instead: a picture while it is drawn; with masks for the given names, which stand in the "
                        "prompt, or else for all its words but the little ones")
    parser.add_argument("--every", type=at_least(1),
                        help="steps between the noise levels that are kept (4; of a large grid 8)")
    parser.add_argument("--out", type=Path, default=Path("explorer.html"), help="file to write (explorer.html)")
    add_model_options(parser)
    command(main, parser)

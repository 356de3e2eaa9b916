"""What the readings beyond the paper (readings.py) owe to each of their choices: a table on scenes-dev.

    python tools/ablate_readings.py                                      # into out/ablate-scenes-dev-nano
    python tools/ablate_readings.py --lora nano/magnet.safetensors       # with MAGNET's LoRA
    python tools/ablate_readings.py --textured                           # strong grain and a colour cast on all scenes

Each picture goes through the model once, and all variants are read off this pass (those of several noise draws off
their own).  Choices are made here, numbers are reported on scenes by `python evaluate.py --task readings`.
"""
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import readings  # noqa: E402
import seg4diff  # noqa: E402
from loading import image_seed  # noqa: E402
from mmdit import JointQKV, i2t_attention, joint_probs  # noqa: E402
from support.cli import Parser, add_model_options, at_least, command, show  # noqa: E402
from support.data import DATASETS, ROOT, Item, measurable, subset  # noqa: E402
from support.files import make_folder, write_json  # noqa: E402
from support.metrics import classes_in, confusion, match_proposals, proposal_scores, scores  # noqa: E402

# ---------------------------------------------------------------------------- a harder version of the toy world

GRAIN = 35                              # standard deviation of the noise on every pixel and colour, of 255
CAST = 0.25                             # how far a colour's factor can be from 1


def textured(read, name: str) -> Item:
    """A scene under strong grain and a colour cast, both drawn from its name; the truth stays."""
    item = read(name)
    rng = np.random.default_rng(image_seed(name, 1))
    pixels = np.asarray(item.image, float) * rng.uniform(1 - CAST, 1 + CAST, 3)              # (height, width, 3)
    pixels += rng.normal(0, GRAIN, pixels.shape)
    return item._replace(image=Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)))


# ---------------------------------------------------------------------------- variants with names


def through(matrix: Tensor, maps: Tensor) -> Tensor:
    """Maps (K, h, w) through an explicit matrix (N, N)."""
    return (maps.flatten(1) @ matrix.mT).view_as(maps)                       # (K, h, w)


def named_variants(taps: dict[int, JointQKV], spans: list[slice], block: int) -> dict[str, Tensor]:
    """{row of the table: maps (K, h, w)}, all off one pass over one picture."""
    qkv = taps[block]
    (attn,) = seg4diff.class_attention(qkv, [spans])                         # (H, K, h, w)
    paper = seg4diff.class_maps(attn)                                        # (K, h, w)
    shares = readings.shares(paper)
    once = readings.i2i_step(qkv, shares)
    twice = readings.i2i_step(qkv, once)
    out = {"paper": paper, "shares (0 steps)": shares, "i2i (1 step)": once, "2 steps": twice,
           "3 steps": readings.i2i_step(qkv, twice)}
    for i, other in taps.items():
        out[f"I2I of block {i}"] = readings.i2i_step(other, shares)

    N = qkv.n_img
    joint = joint_probs(qkv)[0, :, :N, :N]                                   # (H, N, N)
    alone = joint / joint.sum(-1, keepdim=True)                              # (H, N, N)
    by_head = torch.stack([readings.shares(maps) for maps in attn])          # (H, K, h, w)
    out["heads apart"] = torch.stack([through(a, s) for a, s in zip(alone, by_head)]).mean(0)
    out["shares of each head, then their mean"] = by_head.mean(0)
    out["I2I of the joint softmax, not renormalised"] = through(joint.mean(0), shares)
    out["the paper's maps through I2I, no shares"] = readings.i2i_step(qkv, paper)

    text = i2t_attention(qkv)[0].mean(0).sum(1).view(qkv.grid)               # (h, w), a patch's mass on all text
    out["shares of all text"] = paper / text
    out["shares of all text, i2i"] = readings.i2i_step(qkv, paper / text)
    for name, maps in (("paper", paper), ("shares", shares), ("i2i", once)):
        out[f"log of {name}"] = maps.clamp_min(1e-12).log()
    return out


def refined_variants(maps: Tensor, image: Image.Image) -> dict[str, Tensor]:
    """{row: maps (K, height, width)}: i2i's maps refined for some rounds and some reach; the ranges are pixels."""
    colours = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255       # (3, height, width)
    up = torch.nn.functional.interpolate(maps[None], colours.shape[1:], mode="bilinear")[0]  # (K, height, width)
    out = {}
    done = 0
    current = up
    for rounds in (5, 10, 20, 40):
        current = readings.refine(current, colours, 8, rounds - done)
        done = rounds
        out[f"{rounds} rounds, reach 8"] = current
    for reach in (1, 2, 4, 16):
        out[f"20 rounds, reach {reach}"] = readings.refine(up, colours, reach)
    return out


# ---------------------------------------------------------------------------- variants without names


def region_variants(qkv: JointQKV) -> dict[str, Tensor]:
    """{row: maps (P, h, w)}: how anchors are placed, stepped, merged and read."""
    out = {}
    all_rows = readings.image_rows(qkv, torch.arange(qkv.n_img))             # (N, N)
    for side in (4, 8, 16):
        anchors = readings.spread_patches(qkv.grid, side)
        p = all_rows[anchors]                                                # (anchors, N)
        for steps in (1, 2, 3):
            members = readings.i2i_step(qkv, readings.shares(p.unflatten(1, qkv.grid)))      # (anchors, h, w)
            kl = (0.3, 0.5, 0.7, 1.0) if (side, steps) == (8, 2) else (0.7,)
            for threshold in kl:
                groups = readings.merge_nearest(p, threshold)
                name = f"{side} x {side} anchors, {steps} steps, KL {threshold:g}"
                out[name] = torch.stack([members[group].sum(0) for group in groups])         # (P, h, w)
                if (side, steps) == (8, 2):
                    means = torch.stack([p[group].mean(0) for group in groups]).unflatten(1, qkv.grid)
                    out[f"{name}, means of the groups"] = means              # as DiffSeg reads them
                    groups = readings.merge_greedy(p.clamp_min(1e-30).log(), threshold)
                    out[f"{name}, greedy"] = torch.stack([members[group].sum(0) for group in groups])
            p = p @ all_rows                                                 # (anchors, N)
    means = all_rows[readings.spread_patches(qkv.grid)] @ all_rows           # (anchors, N)
    groups = readings.merge_greedy(means.clamp_min(1e-30).log(), 1.0)
    out["8 x 8 anchors, 2 steps, KL 1, greedy, means of the groups"] = torch.stack(
        [means[group].mean(0) for group in groups]).unflatten(1, qkv.grid)   # (P, h, w)
    return out


# ---------------------------------------------------------------------------- counting


def tapped(model, z0, names, seed, blocks):
    """One pass over one picture: {block: JointQKV} on the CPU, and the columns of the names."""
    sigma = model.preset.sigma
    eps = seg4diff.noise(z0.shape[1:], [seed]).to(z0.device)                 # (1, C, ., .)
    z = seg4diff.add_noise(z0.float(), eps, sigma)                           # (1, C, ., .)
    cond = model.text.encode([names])
    _, taps = model(z, sigma, cond.ctx, cond.pooled, capture=blocks, stop_at=max(blocks))
    taps = {i: qkv._replace(q=qkv.q.cpu(), k=qkv.k.cpu(), v=qkv.v.cpu()) for i, qkv in taps.items()}
    return taps, cond.spans[0]


DRAWS = (2, 4, 8)                       # of noise, beside the one of all other rows


@torch.inference_mode()
def count(model: seg4diff.Seg4Diff, item: Item, classes: list[str]) -> dict[str, np.ndarray]:
    """Of one picture: {row: confusion matrix (K, K)}."""
    block = model.preset.block
    seed = image_seed(item.name, 0)
    size = item.labels.shape
    ids = classes_in(item.labels)                                            # (classes in the picture,)
    names = [classes[k] for k in ids]
    z0 = seg4diff.encode_image(model, item.image)                            # (1, C, ., .)
    taps, spans = tapped(model, z0, names, seed, range(model.transformer.config.depth))
    maps = named_variants(taps, spans, block)
    for draws in DRAWS:
        attend = partial(seg4diff.attend, model, z0, [names], blocks=[block], sigma=model.preset.sigma, seeds=[seed])
        (several,) = attend(kinds=["softmax", "i2i"], draws=draws)
        maps[f"paper, {draws} draws"] = seg4diff.class_maps(several[block, "softmax"]).cpu()
        maps[f"i2i, {draws} draws"] = several[block, "i2i"][0].cpu()
    labels = {row: seg4diff.label_map(x, size) for row, x in maps.items()}
    for start in ("paper", "i2i (1 step)"):
        for row, x in refined_variants(maps[start], item.image).items():
            labels[f"{start.split()[0]}, {row}"] = x.argmax(0)               # (height, width)
    return {row: confusion(item.labels, ids[x.numpy()], len(classes)) for row, x in labels.items()}


@torch.inference_mode()
def count_regions(model: seg4diff.Seg4Diff, item: Item, K: int) -> dict[str, np.ndarray]:
    """Of one picture: {row: match_proposals' counts (K, 3) and a row (regions, 0, 0) below them}."""
    block = model.preset.block
    z0 = seg4diff.encode_image(model, item.image)                            # (1, C, ., .)
    taps, _ = tapped(model, z0, [], image_seed(item.name, 0), [block])
    out = {}
    for row, maps in region_variants(taps[block]).items():
        labels = seg4diff.label_map(maps, item.labels.shape).numpy()
        counts, _ = match_proposals(item.labels, labels, K)
        out[row] = np.concatenate([counts, [[len(np.unique(labels)), 0, 0]]])                # (K + 1, 3)
    return out


def table(title, columns, rows):
    """Lines of Markdown."""
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row, values in rows.items():
        lines.append(f"| {row} | {' | '.join(f'{x:.1f}' for x in values)} |")
    return "\n".join(lines)


def main(args):
    data = DATASETS[args.dataset](args.data_root)
    if args.textured:
        data = replace(data, name=f"{data.name}-textured", read=partial(textured, data.read))
    model = seg4diff.load(args.model, args.device, args.dtype, lora=args.lora)
    out = args.out or Path("out") / f"ablate-{data.name}-{model.name}"
    make_folder(out)
    names = measurable(data, subset(data.names, args.limit))
    K = len(data.classes)
    named = {}
    unnamed = {}
    for name in tqdm(names, desc="ablation", unit="image"):
        item = data.read(name)
        for row, counts in count(model, item, data.classes).items():
            named[row] = named.get(row, 0) + counts
        for row, counts in count_regions(model, item, K).items():
            unnamed[row] = unnamed.get(row, 0) + counts
    measured = {row: [scores(c)["mIoU"]] for row, c in named.items()}
    regions = {row: [proposal_scores(c[:K])["mIoU"], c[K, 0] / len(names)] for row, c in unnamed.items()}
    title = f"{data.name}, {len(names)} pictures, {model.name}"
    write_json(out / "ablation.json", {"title": title, "named": measured, "regions": regions})
    show(table(title, ["mIoU"], measured))
    show()
    show(table(f"{title}, without names", ["mIoU", "regions"], regions))
    show(f"wrote {out}/ablation.json")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", choices=DATASETS, default="scenes-dev")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--textured", action="store_true", help="strong grain and a colour cast over the pictures")
    parser.add_argument("--limit", type=at_least(1), help="only so many pictures, always the same ones")
    parser.add_argument("--out", type=Path, help="folder for ablation.json (default: out/ablate-DATASET-MODEL)")
    add_model_options(parser, seed=False)
    command(main, parser)

"""One command for each table or figure; without arguments, open-vocabulary segmentation by nano.

    python evaluate.py                                   # Table 1's protocol on 200 scenes of the toy world
    python evaluate.py --task layers                     # Fig. 8: mIoU of every block
    python evaluate.py --task heads                      # Fig. 17 / supplement Fig. 4: of every head
                                                         # (the paper: with --dataset voc21)
    python evaluate.py --task timesteps                  # Fig. 15 / supplement Fig. 2: against the noise level
    python evaluate.py --task normalization              # Table 5 / supplement Table 1: what is compared

Every run prints floor and ceiling beside the score: random maps, and the ground truth itself reduced to the
patch grid, through the same protocol on the same pictures.  Results go to --out as results.json and PNGs.
"""
import argparse
import json
import os
import platform
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import seg4diff
import weights
from data import DATASETS, IGNORE, ROOT, Dataset, Item
from seg4diff import Seg4Diff

# ---------------------------------------------------------------------------- metrics, A.4


def confusion(truth: np.ndarray, pred: np.ndarray, K: int) -> np.ndarray:
    """Pixel counts (K, K), rows the truth, columns the prediction; pixels whose truth is IGNORE are left out."""
    valid = truth != IGNORE
    if valid.any() and max(truth[valid].max(), pred[valid].max()) >= K:
        raise ValueError(f"a label map holds class {max(truth[valid].max(), pred[valid].max())}, but there are {K} classes")
    pairs = truth[valid].astype(np.int64) * K + pred[valid]
    return np.bincount(pairs, minlength=K * K).reshape(K, K)


def scores(conf: np.ndarray) -> dict:
    """mIoU and mACC (means over the classes that occur in the truth), pACC, and IoU per class; all in percent.

    A class that does not occur has IoU None.  ValueError: an empty confusion matrix.
    """
    if conf.sum() == 0:
        raise ValueError("no pixel was scored: the confusion matrix is empty")
    tp, truth, pred = np.diag(conf).astype(float), conf.sum(1), conf.sum(0)
    with np.errstate(invalid="ignore"):
        iou = np.where(truth > 0, 100 * tp / (truth + pred - tp), np.nan)   # TP / (TP + FN + FP)
        acc = np.where(truth > 0, 100 * tp / truth, np.nan)                  # TP / (TP + FN)
    return {"mIoU": float(np.nanmean(iou)), "mACC": float(np.nanmean(acc)), "pACC": float(100 * tp.sum() / conf.sum()),
            "IoU": [None if np.isnan(x) else float(x) for x in iou]}


def floor_map(K: int, grid: tuple[int, int], size: tuple[int, int], seed: int) -> np.ndarray:
    """What the protocol gives for random maps: chance, given the classes that are present."""
    maps = torch.rand(K, *grid, generator=torch.Generator().manual_seed(seed))               # (K, h, w)
    return seg4diff.label_map(maps, size).numpy()


def ceiling_map(labels: np.ndarray, present: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What the protocol gives for the truth itself, averaged over the cells of the patch grid."""
    onehot = torch.from_numpy(labels == present[:, None, None]).float()                      # (K, height, width)
    return seg4diff.label_map(F.interpolate(onehot[None], size=grid, mode="area")[0], labels.shape).numpy()


# ---------------------------------------------------------------------------- tasks: what is compared


class Variant(NamedTuple):
    """One way to read a segmentation off the attention; a task is a list of them, scored on the same pictures."""
    name: str                           # of its row in the table
    block: int
    sigma: float
    kind: str = "softmax"               # seg4diff.KINDS
    minmax: bool = False
    head: int | None = None


def ovss(m: Seg4Diff) -> list[Variant]:
    return [Variant(m.name, m.preset.block, m.preset.sigma)]


def layers(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"block {i} {way}", i, m.preset.sigma, kind) for kind, way in (("softmax", "I2T"), ("t2i", "T2I"))
            for i in range(m.mmdit.config.depth)]


def heads(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"block {i} head {h}", i, m.preset.sigma, head=h)
            for i in range(m.mmdit.config.depth) for h in range(m.mmdit.config.heads)]


def timesteps(m: Seg4Diff) -> list[Variant]:
    schedule = seg4diff.sigmas(m.preset.steps, m.preset.shift).tolist()
    return [Variant(f"t = {n} of {m.preset.steps}", m.preset.block, schedule[m.preset.steps - n])
            for n in range(2, m.preset.steps + 1, 2)]


def normalization(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"{'after' if kind == 'softmax' else 'before'} softmax{', min-max' if minmax else ''}",
                    m.preset.block, m.preset.sigma, kind, minmax)
            for kind in ("logits", "softmax") for minmax in (False, True)]


TASKS = {"ovss": ovss, "layers": layers, "heads": heads, "timesteps": timesteps, "normalization": normalization}

# ---------------------------------------------------------------------------- the evaluation


def image_seed(name: str, seed: int) -> int:
    """The seed of a picture's noise: its name and the run's seed, not its place in a batch."""
    return zlib.crc32(f"{seed}/{name}".encode())


@torch.inference_mode()
def predict(model: Seg4Diff, items: list[Item], classes: list[str], variants: list[Variant], seed: int
            ) -> list[dict[str, np.ndarray]]:
    """Label maps (indices into `classes`) of each picture, by each variant, the floor and the ceiling."""
    x = [seg4diff.image_tensor(item.image, model.preset.size)[None].to(model.device, model.dtype) for item in items]
    z0 = torch.cat([model.vae.encode(image) for image in x])                 # (B, C, ., .), one by one for memory
    present = [np.setdiff1d(np.unique(item.labels), [IGNORE]) for item in items]
    seeds = [image_seed(item.name, seed) for item in items]
    grid = tuple(s // model.mmdit.config.patch for s in z0.shape[-2:])
    out = [{"floor": ids[floor_map(len(ids), grid, item.labels.shape, s)],
            "ceiling": ids[ceiling_map(item.labels, ids, grid)]} for item, ids, s in zip(items, present, seeds)]
    for sigma in dict.fromkeys(v.sigma for v in variants):
        now = [v for v in variants if v.sigma == sigma]
        attn = seg4diff.attend(model, z0, [[classes[k] for k in ids] for ids in present], sigma=sigma, seeds=seeds,
                               blocks=sorted({v.block for v in now}), kinds=sorted({v.kind for v in now}))
        for b, v in ((b, v) for b in range(len(items)) for v in now):
            maps = seg4diff.class_maps(attn[b][v.block, v.kind], v.head, v.minmax)           # (K, h, w)
            out[b][v.name] = present[b][seg4diff.label_map(maps, items[b].labels.shape).cpu().numpy()]
    return out


def evaluate(model: Seg4Diff, data: Dataset, names: list[str], variants: list[Variant], *, batch_size: int, seed: int
             ) -> tuple[dict[str, np.ndarray], list[tuple[Item, np.ndarray]]]:
    """Confusion matrix of each variant, of floor and ceiling; and the first pictures with the first variant's labels."""
    K, shown = len(data.classes), []
    conf = {row: np.zeros((K, K), np.int64) for row in [*(v.name for v in variants), "floor", "ceiling"]}
    with tqdm(total=len(names), desc="evaluating", unit="image") as bar:
        for i in range(0, len(names), batch_size):
            items = [data.read(name) for name in names[i:i + batch_size]]
            bar.update(len(items))
            items = [item for item in items if (item.labels != IGNORE).any()]                # nothing to prompt or score
            if not items:
                continue
            for item, labels in zip(items, predict(model, items, data.classes, variants, seed)):
                for row, pred in labels.items():
                    conf[row] += confusion(item.labels, pred, K)
                if len(shown) < 12:
                    shown.append((item, labels[variants[0].name]))
            best = max(variants, key=lambda v: scores(conf[v.name])["mIoU"])
            bar.set_postfix({f"mIoU {best.name}": f"{scores(conf[best.name])['mIoU']:.1f}"})
    return conf, shown


# ---------------------------------------------------------------------------- pictures and tables


def overlay_grid(shown: list[tuple[Item, np.ndarray]], classes: list[str], side: int = 192) -> Image.Image:
    """picture | truth | prediction, two pictures to a row, with a legend."""
    colours = seg4diff.palette(len(classes))
    cells = []
    for item, pred in shown:
        cell = Image.new("RGB", (3 * side + 12, side + 6), "white")
        for j, x in enumerate([item.image, seg4diff.overlay(item.image, item.labels, colours),
                               seg4diff.overlay(item.image, pred, colours)]):
            cell.paste(x.resize((side, side), Image.Resampling.BILINEAR), (j * (side + 2), 0))
        cells.append(cell)
    columns = min(2, len(cells))
    grid = Image.new("RGB", (columns * cells[0].width, -(-len(cells) // columns) * cells[0].height), "white")
    for i, cell in enumerate(cells):
        grid.paste(cell, (i % columns * cell.width, i // columns * cell.height))
    title = Image.new("RGB", (grid.width, 24), "white")
    ImageDraw.Draw(title).text((2, 3), "picture | truth | prediction", fill="black", font=ImageFont.load_default(14))
    return seg4diff.stack(title, grid, seg4diff.legend(classes, colours, grid.width))


def plot(task: str, variants: list[Variant], rows: dict[str, dict], model: Seg4Diff, path: Path) -> None:
    """The task's figure: mIoU against block, head, noise level or kind of score, with floor and ceiling."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    miou = [rows[v.name]["mIoU"] for v in variants]
    if task == "heads":
        cfg = model.mmdit.config
        image = ax.imshow(np.reshape(miou, (cfg.depth, cfg.heads)).T, aspect="auto", cmap="viridis")
        for i, (v, y) in enumerate(zip(variants, miou)):
            if len(variants) <= 100:                     # SD3's 576 numbers would not be readable
                bright = y > (min(miou) + max(miou)) / 2
                ax.text(i // cfg.heads, v.head, f"{y:.0f}", ha="center", va="center", color="black" if bright else "white")
        ax.set(xlabel="block", ylabel="head", title="mIoU of each head (Fig. 17)")
        ax.locator_params(integer=True)
        fig.colorbar(image, label="mIoU [%]")
    else:
        if task == "layers":
            n = model.mmdit.config.depth
            for name, ys, mark in (("image-to-text", miou[:n], "o-"), ("text-to-image", miou[n:], "s--")):
                ax.plot(range(n), ys, mark, label=name)
            ax.set(xlabel="block", xticks=range(n), title="Segmentation performance across blocks (Fig. 8)")
        elif task == "timesteps":
            ax.plot([v.sigma for v in variants], miou, "o-", label=f"block {model.preset.block}")
            ax.axvline(model.preset.sigma, color="grey", lw=0.8,
                       label=f"t = {model.preset.noise_steps} of {model.preset.steps}")
            ax.set(xlabel="sigma of the noised picture (0 clean, 1 noise)", title="Against the noise level (Fig. 15)")
        else:
            ax.bar([v.name.replace(", ", ",\n") for v in variants], miou, width=0.6)
            ax.set(title="Which score is compared (Table 5)")
        for name, style in (("floor", ":"), ("ceiling", "-.")):
            ax.axhline(rows[name]["mIoU"], color="black", ls=style, lw=1, label=name)
        ax.set(ylabel="mIoU [%]", ylim=(0, 100))
        ax.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def peak_megabytes() -> float:
    """Peak memory of this process; nan where the system does not tell."""
    if sys.platform == "win32":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2)


def table(rows: dict[str, dict]) -> str:
    width = max(map(len, rows))
    lines = [f"{'':{width}s}   mIoU   mACC   pACC"]
    lines += [f"{name:{width}s} {r['mIoU']:6.1f} {r['mACC']:6.1f} {r['pACC']:6.1f}" for name, r in rows.items()]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    start = time.time()
    for what, value, valid in (("data set", args.dataset, DATASETS), ("task", args.task, TASKS)):
        if value not in valid:
            raise ValueError(f"there is no {what} {value!r}; choose one of {', '.join(valid)}")
    if any(x is not None and x < 1 for x in (args.batch_size, args.limit)):
        raise ValueError("--batch-size and --limit must be at least 1")
    data = DATASETS[args.dataset](args.data_root)
    name = args.model or ("nano" if args.dataset.startswith("scenes") else "sd3")
    model = seg4diff.load(name, args.device, segment_only=args.task not in ("layers", "heads"))
    names, variants = data.names[:args.limit], TASKS[args.task](model)
    if model.name in ("floor", "ceiling"):
        raise ValueError(f"a model called {model.name!r} would share its row with that baseline; rename its file")
    out = args.out or Path("out") / f"{args.task}-{data.name}-{model.name}"
    out.mkdir(parents=True, exist_ok=True)

    conf, shown = evaluate(model, data, names, variants, seed=args.seed,
                           batch_size=model.preset.batch if args.batch_size is None else args.batch_size)
    rows, seconds = {name: scores(c) for name, c in conf.items()}, time.time() - start
    blocks, levels = sorted({v.block for v in variants}), sorted({v.sigma for v in variants})
    caption = (f"{args.task} · {data.name}, {len(names)} pictures, {len(data.classes)} classes · model {model.name} · "
               f"block {blocks[0] if len(blocks) == 1 else f'{blocks[0]} to {blocks[-1]}'} · "
               f"sigma {levels[0]:.3f}{f' to {levels[-1]:.3f}' if len(levels) > 1 else ''} · "
               f"prompt: present classes · seed {args.seed}")
    print(caption, table(rows), sep="\n")
    if args.task == "ovss":
        print("IoU per class:", ", ".join(
            f"{c} {x:.0f}" for c, x in zip(data.classes, rows[model.name]["IoU"]) if x is not None))
    megabytes = peak_megabytes()
    result = {"task": args.task, "n": len(names), "caption": caption,
              "arguments": {k: str(v) for k, v in vars(args).items()},
              "versions": {"python": platform.python_version(), "torch": torch.__version__}, "classes": data.classes,
              "rows": rows, "variants": [v._asdict() for v in variants], "seconds": seconds, "peak_MB": megabytes}
    (out / "results.tmp").write_text(json.dumps(result, indent=1))
    os.replace(out / "results.tmp", out / "results.json")
    if args.task == "ovss":
        overlay_grid(shown, data.classes).save(out / "overlays.png")
    else:
        plot(args.task, variants, rows, model, out / f"{args.task}.png")
    print(f"{seconds:.0f} s, {megabytes / 1000:.1f} GB; wrote {out}/results.json and "
          f"{'overlays' if args.task == 'ovss' else args.task}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ovss", help=", ".join(TASKS))
    parser.add_argument("--dataset", default="scenes", help=", ".join(DATASETS))
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--model", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder (default: nano for "
                        "scenes, sd3 for real pictures)")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--batch-size", type=int, help="pictures at once (default: the model's preset); changes no number")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; each picture's own follows from it and its name")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder for results (default: out/TASK-DATASET-MODEL)")
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:              # bad input: one sentence, no traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""One command for each table or figure; without arguments, open-vocabulary segmentation by nano.

    python evaluate.py                                   # Table 1's protocol on 200 scenes of the toy world
    python evaluate.py --dataset voc                     # Table 1's first number, by SD3, of ./data/VOCdevkit
    python evaluate.py --dataset all                     # Table 1, beside the paper's numbers
    python evaluate.py --task unsup                      # Table 2: proposals from <pad> tokens (--dataset all, too)
    python evaluate.py --task thresholds                 # how Table 2's scaling and threshold are chosen
    python evaluate.py --task layers                     # Fig. 8: mIoU of every block
    python evaluate.py --task heads                      # Fig. 17 / supplement Fig. 4: of every head
                                                         # (the paper: with --dataset voc21)
    python evaluate.py --task timesteps                  # Fig. 15 / supplement Fig. 2: against the noise level
    python evaluate.py --task normalization              # Table 5 / supplement Table 1: what is compared
    python evaluate.py --dataset folder --data-root DIR --classes "cat,sofa"     # one's own pictures, no scores
    torchrun --nproc-per-node=4 evaluate.py --dataset ade20k                     # the pictures shared out

Every run prints floor and ceiling beside the score: random maps, and the ground truth itself reduced to the
patch grid, through the same protocol on the same pictures.  Results go to --out as results.json and PNGs; a run
that is killed goes on where it stopped (ledger.py).
"""
import argparse
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import seg4diff
from seg4diff import Seg4Diff
from support import weights
from support.cli import command
from support.data import DATASETS, ROOT, Dataset, Item, centre_crop, read_ahead, subset
from support.ledger import Counts, Ledger, world, write_json
from support.metrics import IGNORE, confusion, match_proposals, proposal_scores, scores
from support.pictures import open_image, overlay_grid, palette, panels
from support.report import PAPER, paper_table, peak_megabytes, plot, table

# ---------------------------------------------------------------------------- tasks: what is compared


class Variant(NamedTuple):
    """One way to read a segmentation off the attention; a task is a list of them, scored on the same pictures."""
    name: str                           # of its row in the table
    block: int
    sigma: float
    kind: str = "softmax"               # seg4diff.KINDS
    minmax: bool = False
    head: int | None = None
    threshold: float | None = None      # of merging <pad> maps; None: names are given, nothing is merged
    scaling: str | None = None          # seg4diff.SCALINGS


def ovss(m: Seg4Diff) -> list[Variant]:
    return [Variant(m.name, m.preset.block, m.preset.sigma)]


def layers(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"block {i} {way}", i, m.preset.sigma, kind) for kind, way in (("softmax", "I2T"), ("t2i", "T2I"))
            for i in range(m.transformer.config.depth)]


def heads(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"block {i} head {h}", i, m.preset.sigma, head=h)
            for i in range(m.transformer.config.depth) for h in range(m.transformer.config.heads)]


def timesteps(m: Seg4Diff) -> list[Variant]:
    schedule = seg4diff.sigmas(m.preset.steps, m.preset.shift).tolist()
    return [Variant(f"t = {n} of {m.preset.steps}", m.preset.block, schedule[m.preset.steps - n])
            for n in range(2, m.preset.steps + 1, 2)]


def normalization(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"{'after' if kind == 'softmax' else 'before'} softmax{', min-max' if minmax else ''}",
                    m.preset.block, m.preset.sigma, kind, minmax)
            for kind in ("logits", "softmax") for minmax in (False, True)]


def unsup(m: Seg4Diff) -> list[Variant]:
    return [Variant(m.name, m.preset.block, m.preset.sigma, threshold=m.preset.threshold, scaling=m.preset.scaling)]


def thresholds(m: Seg4Diff) -> list[Variant]:
    return [Variant(f"{scaling} {t:g}", m.preset.block, m.preset.sigma, threshold=t, scaling=scaling)
            for scaling in seg4diff.SCALINGS for t in (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)]


def floor_row(v: Variant, variants: list[Variant]) -> str:
    """The row of a variant's floor: random maps, as many as it has itself, so one for each when nothing is named."""
    return "floor" if v.threshold is None or len(variants) == 1 else f"{v.name} floor"


def score_of(variants: list[Variant]) -> Callable[[np.ndarray], dict]:
    """What turns the counts of these variants into a row of the table."""
    return scores if variants[0].threshold is None else proposal_scores


TASKS = {"ovss": ovss, "unsup": unsup, "thresholds": thresholds, "layers": layers, "heads": heads, "timesteps": timesteps,
         "normalization": normalization}

# ---------------------------------------------------------------------------- floor and ceiling


def floor_map(K: int, grid: tuple[int, int], size: tuple[int, int], seed: int) -> np.ndarray:
    """What the protocol gives for random maps: chance, given the classes that are present."""
    maps = torch.rand(K, *grid, generator=torch.Generator().manual_seed(seed))               # (K, h, w)
    return seg4diff.label_map(maps, size).numpy()


def ceiling_map(labels: np.ndarray, present: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What the protocol gives for the truth itself, averaged over the cells of the patch grid."""
    onehot = torch.from_numpy(labels == present[:, None, None]).float()                      # (K, height, width)
    return seg4diff.label_map(F.interpolate(onehot[None], size=grid, mode="area")[0], labels.shape).numpy()

# ---------------------------------------------------------------------------- the evaluation


class Protocol(NamedTuple):
    """Every choice beside model, data and variants that touches a number; stored with it and printed above it."""
    seed: int = 0
    prompt: str = "present"             # the classes of the picture, as in the paper, or "all" of the data set
    resize: str = "squash"              # the whole picture to a square, or "crop" its centre, truth and all
    draws: int = 1                      # noise draws whose maps are averaged


def image_seed(name: str, seed: int) -> int:
    """The seed of a picture's noise: its name and the run's seed, not its place in a batch."""
    return zlib.crc32(f"{seed}/{name}".encode())


def prepare(data: Dataset, name: str, how: Protocol) -> Item:
    """A picture and its truth, cropped if the protocol says so."""
    item = data.read(name)
    return centre_crop(item) if how.resize == "crop" else item


def average(draws: list[list[dict]]) -> list[dict]:
    """Mean over noise draws of what attend returns."""
    return [{key: torch.stack([d[b][key] for d in draws]).mean(0) for key in first} for b, first in enumerate(draws[0])]


@torch.inference_mode()
def predict(model: Seg4Diff, items: list[Item], data: Dataset, variants: list[Variant], how: Protocol
            ) -> list[dict[str, np.ndarray]]:
    """Label maps of each picture, by each variant, floor and ceiling: indices of classes, or of unnamed proposals.

    With the prompt "all", every class of the data set is a candidate, over several prompts (seg4diff.attend).
    """
    z0 = torch.cat([seg4diff.encode_image(model, item.image) for item in items])             # (B, C, ., .)
    present = [np.setdiff1d(np.unique(item.labels), [IGNORE]) for item in items]
    ids = [np.union1d(p, data.always).astype(int) if how.prompt == "present" else np.arange(len(data.classes))
           for p in present]
    seeds = [image_seed(item.name, how.seed) for item in items]
    grid = tuple(s // model.transformer.config.patch for s in z0.shape[-2:])
    named = variants[0].threshold is None
    out = [{"ceiling": p[ceiling_map(item.labels, p, grid)]} for item, p in zip(items, present)]
    for sigma in dict.fromkeys(v.sigma for v in variants):
        now = [v for v in variants if v.sigma == sigma]
        classes = [[data.classes[k] for k in own] for own in ids] if named else None
        attn = average([seg4diff.attend(model, z0, classes, sigma=sigma, seeds=[s + i for s in seeds],
                                        blocks=sorted({v.block for v in now}), kinds=sorted({v.kind for v in now}))
                        for i in range(how.draws)])
        for b, v in ((b, v) for b in range(len(items)) for v in now):
            maps, size = seg4diff.class_maps(attn[b][v.block, v.kind], v.head, v.minmax), items[b].labels.shape
            if not named:
                maps = seg4diff.merge_maps(maps, v.threshold, v.scaling)[0]  # (P, h, w)
            table, floor = ids[b] if named else np.arange(len(maps)), floor_row(v, variants)
            out[b][v.name] = table[seg4diff.label_map(maps, size).cpu().numpy()]
            if floor not in out[b]:
                out[b][floor] = table[floor_map(len(maps), grid, size, seeds[b])]
    return out


def tally(model: Seg4Diff, data: Dataset, names: list[str], variants: list[Variant], how: Protocol, batch_size: int
          ) -> Iterator[tuple[str, Counts | Exception]]:
    """(name, counts of every row of the table) picture by picture; the exception of one that cannot be read.

    Counts are a confusion matrix (K, K), or match_proposals' (K, 3); none for a picture without a labelled pixel.
    """
    K, batch = len(data.classes), []

    def count(truth: np.ndarray, pred: np.ndarray) -> np.ndarray:
        return confusion(truth, pred, K) if variants[0].threshold is None else match_proposals(truth, pred, K)[0]

    def finish() -> Iterator[tuple[str, Counts]]:
        for item, labels in zip(batch, predict(model, batch, data, variants, how) if batch else ()):
            yield item.name, {row: count(item.labels, pred) for row, pred in labels.items()}
        batch.clear()

    for name, item in read_ahead(lambda name: prepare(data, name, how), names, 2 * batch_size):
        if isinstance(item, Exception):
            yield name, item
        elif (item.labels == IGNORE).all():                                  # nothing to prompt or score
            yield name, {}
        else:
            batch.append(item)
            if len(batch) == batch_size:
                yield from finish()
    yield from finish()


def compare(model: Seg4Diff, data: Dataset, names: list[str], variants: list[Variant], how: Protocol = Protocol()
            ) -> dict[str, dict]:
    """The table's rows for a few pictures, without a ledger: scores of each variant, of floor and ceiling."""
    total: dict[str, np.ndarray] = {}
    for name, counts in tally(model, data, names, variants, how, model.preset.batch):
        if isinstance(counts, Exception):
            raise ValueError(f"{name} cannot be read: {counts}")
        total = {row: total.get(row, 0) + c for row, c in counts.items()} or total
    return {row: score_of(variants)(c) for row, c in total.items()}


def examples(model: Seg4Diff, data: Dataset, names: list[str], variant: Variant, how: Protocol) -> Image.Image:
    """Pictures beside truth and prediction; unnamed regions in the colour of the class they were matched to."""
    shown = []
    for name in names:
        item = prepare(data, name, how)
        pred = predict(model, [item], data, [variant], how)[0][variant.name]
        named = pred if variant.threshold is None else match_proposals(item.labels, pred, len(data.classes))[1]
        shown.append((item, named))
    return overlay_grid(shown, data.classes)


# ---------------------------------------------------------------------------- runs


def wait_for_all() -> None:
    """Until every process of torchrun is here."""
    if world()[1] > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        torch.distributed.barrier()


def caption(task: str, data: Dataset, n: int, model: Seg4Diff, variants: list[Variant], how: Protocol) -> str:
    """Everything that touches the numbers, in a line."""
    blocks, levels = sorted({v.block for v in variants}), sorted({v.sigma for v in variants})
    merging = "" if variants[0].threshold is None else "empty prompt" if len(variants) > 1 else \
        f"empty prompt, maps scaled over: {variants[0].scaling}, merged below KL {variants[0].threshold:g}"
    return (f"{task} · {data.name}, {n} pictures, {len(data.classes)} classes · model {model.name} "
            f"({model.fingerprint}, {str(model.dtype).removeprefix('torch.')}) · "
            f"block {blocks[0] if len(blocks) == 1 else f'{blocks[0]} to {blocks[-1]}'} · "
            f"sigma {levels[0]:.3f}{f' to {levels[-1]:.3f}' if len(levels) > 1 else ''} · "
            f"{merging or f'prompt: {how.prompt} classes'} · {how.resize} · draws {how.draws} · seed {how.seed}")


def run(args: argparse.Namespace, model: Seg4Diff, data: Dataset, out: Path) -> dict[str, dict]:
    """One task on one data set: count what the ledger has not, then everything from the ledger; rows of the table."""
    start, (rank, processes) = time.time(), world()
    names, variants = subset(data.names, args.limit), TASKS[args.task](model)
    if args.task == "unsup":
        variants = [v._replace(threshold=args.threshold or v.threshold, scaling=args.scaling or v.scaling) for v in variants]
    how = Protocol(args.seed, args.prompt, args.resize, args.draws)
    floors = list(dict.fromkeys(floor_row(v, variants) for v in variants))
    size = args.batch_size or model.preset.batch         # changes no number in fp32 on the CPU, elsewhere it may
    exact = model.device.type == "cpu" and model.dtype == torch.float32
    here = Path(__file__).parent                         # what a changed program had counted does not count
    code = "".join(p.read_text() for p in (*sorted(here.glob("*.py")), *sorted(here.glob("support/*.py")), here / "support/classes.json", here / "nano/scenes.py"))
    protocol = {"task": args.task, "dataset": data.name, "labels": data.source, "classes": data.classes,
                "always": data.always,
                "model": [model.name, model.fingerprint, str(model.dtype), model.device.type], "variants": variants,
                "how": how._asdict(), "code": zlib.crc32(code.encode()), "batch": exact or size}
    book = Ledger(out, protocol, rank)
    todo = [name for name in names[rank::processes] if name not in book.done]
    K = len(data.classes)
    shape, score = (K, K) if variants[0].threshold is None else (K, 3), score_of(variants)
    conf = book.sum(names, [v.name for v in variants], shape)                # for the progress bar only
    with tqdm(total=len(names[rank::processes]), initial=len(names[rank::processes]) - len(todo), desc="evaluating",
              unit="image", disable=rank > 0) as bar:
        for name, counts in tally(model, data, todo, variants, how, size):
            if isinstance(counts, Exception):
                book.skip(name, str(counts))
            else:
                book.add(name, counts, image_seed(name, how.seed))
                for row in conf.keys() & counts.keys():
                    conf[row] += counts[row]
            bar.update()
            best = max(conf, key=lambda row: score(conf[row])["mIoU"] if conf[row].any() else 0)
            if conf[best].any():
                bar.set_postfix({f"mIoU {best}": f"{score(conf[best])['mIoU']:.1f}"})
    wait_for_all()
    if rank > 0:
        return {}
    book = Ledger(out, protocol)                                             # with what the other processes wrote
    broken = {name: book.broken[name] for name in names if name not in book.done}
    if len(broken) == len(names):
        raise ValueError(f"none of the {len(names)} pictures of {data.name} could be read; the first: {broken[names[0]]}")
    total = book.sum(names, [*(v.name for v in variants), *floors, "ceiling"], shape)
    rows, seconds = {row: score(c) for row, c in total.items()}, time.time() - start
    line = caption(args.task, data, len(names) - len(broken), model, variants, how)
    print(line, table(rows), sep="\n")
    if len(variants) == 1:
        print("IoU per class:", ", ".join(
            f"{c} {x:.0f}" for c, x in zip(data.classes, rows[model.name]["IoU"]) if x is not None))
    if broken:
        print(f"{len(broken)} of {len(names)} pictures could not be read and are left out: "
              + "; ".join(f"{name} ({why})" for name, why in broken.items()))
    megabytes = peak_megabytes(model.device)
    result = {"task": args.task, "n": len(names) - len(broken), "caption": line, "protocol": protocol, "hash": book.hash,
              "broken": broken, "arguments": {k: str(v) for k, v in vars(args).items()},
              "versions": {"python": platform.python_version(), "torch": torch.__version__}, "classes": data.classes,
              "rows": rows, "variants": [v._asdict() for v in variants], "seconds": seconds, "peak_MB": megabytes}
    write_json(out / "results.json", result)
    picture = out / ("overlays.png" if len(variants) == 1 else f"{args.task}.png")
    if len(variants) == 1:
        examples(model, data, [name for name in names if book.done.get(name)][:12], variants[0], how).save(picture)
    else:
        plot(args.task, variants, rows, model, picture)
    print(f"{seconds:.0f} s, {megabytes / 1000:.1f} GB; wrote {out}/results.json and {picture.name}")
    return rows


def run_folder(args: argparse.Namespace, model: Seg4Diff, classes: list[str], out: Path) -> None:
    """Label maps (palette PNGs, value k the k-th class) and overlays of all pictures of a folder; no truth, no scores."""
    start, kinds, (rank, processes) = time.time(), Image.registered_extensions(), world()
    names = sorted(p.name for p in args.data_root.iterdir() if p.suffix.lower() in kinds)
    if not names or len({Path(n).stem for n in names}) < len(names):
        raise ValueError(f"{args.data_root} must hold pictures, no two of them with the same name before the dot; "
                         f"it holds {len(names)} pictures")
    for folder in ("labels", "overlays"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    broken, names = {}, subset(names, args.limit)[rank::processes]
    for name in tqdm(names, desc="segmenting", unit="image", disable=rank > 0):
        try:
            image = open_image(args.data_root / name)
        except ValueError as e:
            broken[name] = str(e)
            continue
        labels = seg4diff.segment(model, image, classes, seed=image_seed(name, args.seed)).labels
        stem = Path(name).stem
        picture = Image.fromarray(labels.astype(np.uint8))
        picture.putpalette(palette(len(classes)).ravel().tolist())
        picture.save(out / "labels" / f"{stem}.png")
        panels(image, labels, classes).save(out / "overlays" / f"{stem}.png")
    if names and len(broken) == len(names):
        raise ValueError(f"none of the {len(names)} pictures of {args.data_root} can be read; the first: {broken[names[0]]}")
    if broken:
        print(f"{len(broken)} of {len(names)} pictures could not be read and are left out: {'; '.join(broken.values())}")
    print(f"{time.time() - start:.0f} s; wrote {out}/labels and {out}/overlays")


def check(args: argparse.Namespace) -> None:
    """ValueError: arguments that cannot be, one sentence each."""
    sets = [*DATASETS, "all", "folder"]
    for what, value, valid in (("data set", args.dataset, sets), ("task", args.task, TASKS),
                               ("prompt", args.prompt, ("present", "all")), ("resize", args.resize, ("squash", "crop")),
                               ("scaling", args.scaling or "map", seg4diff.SCALINGS)):
        if value not in valid:
            raise ValueError(f"there is no {what} {value!r}; choose one of {', '.join(valid)}")
    if any(x is not None and x < 1 for x in (args.batch_size, args.limit, args.draws)):
        raise ValueError("--batch-size, --limit and --draws must be at least 1")
    if args.threshold is not None and not args.threshold > 0:
        raise ValueError(f"--threshold must be positive, not {args.threshold}")
    if (args.threshold or args.scaling) and args.task != "unsup":
        raise ValueError("--threshold and --scaling belong to --task unsup")
    if args.prompt == "all" and args.task in ("unsup", "thresholds"):
        raise ValueError(f"--prompt all names classes, but --task {args.task} uses the empty prompt")
    if args.dataset == "all" and args.task not in PAPER:
        raise ValueError(f"--dataset all is for the tables of the paper: --task {' or '.join(PAPER)}")
    if (args.dataset == "folder") != (args.classes is not None):
        raise ValueError("--dataset folder and --classes cat,dog,... go together")
    if args.dataset == "folder":
        if args.task != "ovss" or not args.data_root.is_dir():
            raise ValueError(f"--dataset folder segments the pictures of --data-root, which must be a folder, not "
                             f"{args.data_root}, and knows --task ovss only")
        if (args.prompt, args.resize, args.draws, args.batch_size) != ("present", "squash", 1, None):
            raise ValueError("--dataset folder looks for all --classes in whole pictures, one at a time: "
                             "--prompt, --resize, --draws and --batch-size do not go with it")


def main(args: argparse.Namespace) -> None:
    check(args)
    classes = [c.strip() for c in args.classes.split(",") if c.strip()] if args.classes is not None else None
    sets, missing = [], {}
    for name in PAPER[args.task][1] if args.dataset == "all" else [args.dataset] if classes is None else []:
        try:
            sets.append(DATASETS[name](args.data_root))
        except ValueError as e:
            if args.dataset != "all":
                raise
            missing[name] = str(e)
    if missing and not sets:
        raise ValueError(f"none of the data sets {', '.join(missing)} was found; " + next(iter(missing.values())))
    name = args.model or ("nano" if args.dataset.startswith("scenes") else "sd3")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device != "cpu" and torch.cuda.is_available() and world()[1] > 1 \
        else args.device                                                     # torchrun: a GPU for each process
    model = seg4diff.load(name, device, args.dtype, segment_only=args.task not in ("layers", "heads"), lora=args.lora)
    if model.name in ("floor", "ceiling"):
        raise ValueError(f"a model called {model.name!r} would share its row with that baseline; rename its file")

    def out(data: str) -> Path:
        folder = args.out or Path("out") / f"{args.task}-{args.dataset}-{model.name}"
        return folder / data if args.dataset == "all" else folder
    if classes is not None:
        seg4diff.split_classes(model.text, classes)
        return run_folder(args, model, classes, out("folder"))
    found = {data.name: run(args, model, data, out(data.name)) for data in sets}
    if args.dataset == "all" and world()[0] == 0:
        print(paper_table(args.task, model.name, found))
        if missing:
            print(f"not found below {args.data_root}: {', '.join(missing)}; --dataset NAME draws the tree that is expected")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="ovss", help=", ".join(TASKS))
    parser.add_argument("--dataset", default="scenes", help=", ".join([*DATASETS, "all (of the paper's table), folder"]))
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--classes", help="for --dataset folder: names, separated by commas")
    parser.add_argument("--model", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder (default: nano for "
                        "scenes, sd3 for real pictures)")
    parser.add_argument("--lora", type=Path, help="a LoRA of that model, as train_magnet.py writes")
    parser.add_argument("--limit", type=int, help="only so many pictures, always the same ones")
    parser.add_argument("--prompt", default="present", help="present (the picture's classes, as the paper) or all")
    parser.add_argument("--resize", default="squash", help="squash (as the released code), crop (as the paper says)")
    parser.add_argument("--draws", type=int, default=1, help="noise draws whose maps are averaged")
    parser.add_argument("--threshold", type=float, help="unsup: symmetric KL below which maps merge (default: the model's)")
    parser.add_argument("--scaling", help=f"unsup: {', '.join(seg4diff.SCALINGS)} (default: the model's)")
    parser.add_argument("--batch-size", type=int, help="pictures at once (default: the model's preset); in fp32 on the CPU "
                        "it changes no number")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; each picture's own follows from it and its name")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 on CUDA, float32 on the CPU), float32, bfloat16, "
                        "float16 (released code)")
    parser.add_argument("--out", type=Path, help="folder for ledger and results (default: out/TASK-DATASET-MODEL)")
    command(main, parser)

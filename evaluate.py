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
that is killed goes on where it stopped (support/ledger.py).
"""
import argparse
import os
import platform
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import seg4diff
from protocol import TASKS, Evaluation, Protocol, add_up, evaluation
from seg4diff import Seg4Diff, image_seed
from support.cli import Parser, add_model_options, at_least, command
from support.data import DATASETS, ROOT, Dataset, subset
from support.ledger import Ledger, wait_for_all, world, write_json
from support.metrics import table
from support.pictures import open_image, overlay_grid, palette, panels
from support.report import PAPER, paper_table, peak_megabytes, plot

# What the counts of a picture depend on. When one of these files changes, a run begins anew.
CODE = ("protocol.py", "seg4diff.py", "loading.py", "mmdit.py", "vae.py", "text.py", "lora.py", "support/checkpoint.py",
        "support/weights.py", "support/data.py", "support/metrics.py", "support/ledger.py", "support/classes.json",
        "nano/scenes.py")

# ---------------------------------------------------------------------------- a run: count, then report


def identity_of(ev: Evaluation) -> dict:
    """Everything that the counts depend on; the ledger keeps runs apart by it."""
    model, data = ev.model, ev.data
    code = "".join((Path(__file__).parent / file).read_text() for file in CODE)
    exact = model.device.type == "cpu" and model.dtype == torch.float32      # there the batch size changes no number
    return {"task": ev.task, "dataset": data.name, "labels": data.source, "classes": data.classes,
            "always": data.always, "variants": ev.variants, "protocol": ev.protocol._asdict(),
            "model": [model.name, model.fingerprint, str(model.dtype), model.device.type],
            "code": zlib.crc32(code.encode()), "batch": exact or ev.batch}


def facts_of(ev: Evaluation, n: int) -> dict[str, str]:
    """What is printed above the table, a fact a line."""
    model, protocol, first, last = ev.model, ev.protocol, ev.variants[0], ev.variants[-1]
    facts = {"task": ev.task, "data": f"{ev.data.name}, {n} pictures, {len(ev.data.classes)} classes",
             "model": f"{model.name} ({model.fingerprint}), {str(model.dtype).removeprefix('torch.')}",
             "block": str(first.block) if first.block == last.block else f"{first.block} to {last.block}",
             "sigma": f"{first.sigma:.3f}" if first.sigma == last.sigma else f"{first.sigma:.3f} to {last.sigma:.3f}",
             "prompt": f"{protocol.prompt} classes" if first.threshold is None else "empty"}
    if ev.task == "unsup":
        facts["merging"] = f"maps scaled over: {first.scaling}, merged below KL {first.threshold:g}"
    return facts | {"picture": protocol.resize, "noise": f"seed {protocol.seed}, draws {protocol.draws}"}


def count_into(ledger: Ledger, ev: Evaluation, names: list[str], shape: tuple[int, int], silent: bool) -> None:
    """Count the pictures that the ledger lacks, a line each, under a bar that shows the best mIoU so far."""
    todo = [name for name in names if name not in ledger.done]
    total = ledger.sum(names, shape)
    with tqdm(total=len(names), initial=len(names) - len(todo), desc="evaluating", unit="image", disable=silent) as bar:
        for name, counts in ev.count(todo):
            bar.update()
            if isinstance(counts, Exception):
                ledger.skip(name, str(counts))
                continue
            ledger.add(name, counts, image_seed(name, ev.protocol.seed))
            add_up(total, counts)
            if total:
                best, row = max((ev.scoring.score(total[v.name])["mIoU"], v.name) for v in ev.variants)
                bar.set_postfix({f"mIoU {row}": f"{best:.1f}"})


def examples(ev: Evaluation, names: list[str]) -> Image.Image:
    """Pictures beside truth and prediction; unnamed regions in the colour of the class that they were matched to."""
    shown = []
    for name in names:
        item = ev.read(name)
        (rows,) = ev.predict([item])
        _, labels = ev.scoring.count(item.labels, rows[ev.variants[0].name], len(ev.data.classes))
        shown.append((item.image, item.labels, labels))
    return overlay_grid(shown, ev.data.classes)


def report_broken(broken: dict[str, str], n: int) -> None:
    """Say which pictures were left out.  ValueError: all of them."""
    if broken and len(broken) == n:
        name, why = next(iter(broken.items()))
        raise ValueError(f"none of the {n} pictures could be read; the first: {name} ({why})")
    if broken:
        print(f"{len(broken)} of {n} pictures could not be read and are left out: "
              + "; ".join(f"{name} ({why})" for name, why in broken.items()))


def run(args: argparse.Namespace, model: Seg4Diff, data: Dataset, out: Path) -> dict[str, dict]:
    """One task on one data set: count what the ledger lacks, then report all that it has; rows of the table."""
    start = time.time()
    rank, processes = world()
    ev = evaluation(model, data, args.task, Protocol(args.seed, args.prompt, args.resize, args.draws), args.batch_size)
    merging = {key: value for key, value in (("threshold", args.threshold), ("scaling", args.scaling)) if value is not None}
    ev = ev._replace(variants=[v._replace(**merging) for v in ev.variants])
    identity = identity_of(ev)
    names = subset(data.names, args.limit)
    shape = len(data.classes), ev.scoring.columns(len(data.classes))
    count_into(Ledger(out, identity, rank), ev, names[rank::processes], shape, silent=rank > 0)
    wait_for_all()
    if rank > 0:
        return {}

    ledger = Ledger(out, identity)                                           # with what the other processes wrote
    broken = {name: ledger.broken[name] for name in names if name not in ledger.done}
    report_broken(broken, len(names))
    total = ledger.sum(names, shape)
    if not total:
        raise ValueError(f"no pixel was scored: the pictures of {data.name} have no labelled pixel")
    rows = {row: ev.scoring.score(c) for row, c in total.items()}
    facts = facts_of(ev, len(names) - len(broken))
    seconds = time.time() - start
    megabytes = peak_megabytes(model.device)
    write_json(out / "results.json", {
        "task": args.task, "n": len(names) - len(broken), "facts": facts, "protocol": identity, "hash": ledger.hash,
        "broken": broken, "arguments": {k: str(v) for k, v in vars(args).items()}, "classes": data.classes,
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "rows": rows,
        "variants": [v._asdict() for v in ev.variants], "seconds": seconds, "peak_MB": megabytes})
    for fact, value in facts.items():
        print(f"{fact + ':':9s}{value}")
    print(table(rows))
    if len(ev.variants) == 1:
        iou = zip(data.classes, rows[ev.variants[0].name]["IoU"])
        print("IoU per class:", ", ".join(f"{name} {x:.0f}" for name, x in iou if x is not None))
        picture = out / "overlays.png"
        examples(ev, [name for name in names if ledger.done.get(name)][:12]).save(picture)
    else:
        picture = out / f"{args.task}.png"
        plot(args.task, ev.variants, rows, model, picture)
    print(f"{seconds:.0f} s, {megabytes / 1000:.1f} GB; wrote {out}/results.json and {picture.name}")
    return rows


# ---------------------------------------------------------------------------- pictures of one's own


def run_folder(args: argparse.Namespace, model: Seg4Diff, out: Path) -> None:
    """Label maps (palette PNGs, value k the k-th class) and overlays of a folder's pictures; no truth, no scores."""
    start = time.time()
    rank, processes = world()
    classes = [name.strip() for name in args.classes.split(",") if name.strip()]
    seg4diff.split_classes(model.text, classes)                              # raises now if a name does not fit
    names = sorted(p.name for p in args.data_root.iterdir() if p.suffix.lower() in Image.registered_extensions())
    if not names or len({Path(name).stem for name in names}) < len(names):
        raise ValueError(f"{args.data_root} must hold pictures, no two of them with the same name before the dot; "
                         f"it holds {len(names)} pictures")
    for folder in ("labels", "overlays"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    names = subset(names, args.limit)[rank::processes]
    broken = {}
    for name in tqdm(names, desc="segmenting", unit="image", disable=rank > 0):
        try:
            image = open_image(args.data_root / name)
        except ValueError as e:
            broken[name] = str(e)
            continue
        labels = seg4diff.segment(model, image, classes, seed=image_seed(name, args.seed)).labels
        picture = Image.fromarray(labels.astype(np.uint8))
        picture.putpalette(palette(len(classes)).ravel().tolist())
        picture.save(out / "labels" / f"{Path(name).stem}.png")
        panels(image, labels, classes).save(out / "overlays" / f"{Path(name).stem}.png")
    report_broken(broken, len(names))
    print(f"{time.time() - start:.0f} s; wrote {out}/labels and {out}/overlays")


# ---------------------------------------------------------------------------- command line


def check(args: argparse.Namespace) -> None:
    """ValueError: options that do not go together, one sentence each."""
    if args.threshold is not None and not args.threshold > 0:
        raise ValueError(f"--threshold must be positive, not {args.threshold}")
    if (args.threshold is not None or args.scaling is not None) and args.task != "unsup":
        raise ValueError("--threshold and --scaling belong to --task unsup")
    if args.prompt == "all" and args.task in ("unsup", "thresholds"):
        raise ValueError(f"--prompt all names classes, but --task {args.task} uses the empty prompt")
    if args.dataset == "all" and args.task not in PAPER:
        raise ValueError(f"--dataset all is for the tables of the paper: --task ovss or unsup")
    if (args.dataset == "folder") != (args.classes is not None):
        raise ValueError("--dataset folder and --classes cat,dog,... go together")
    if args.dataset == "folder" and (args.task != "ovss" or not args.data_root.is_dir()):
        raise ValueError("--dataset folder segments the pictures of --data-root, which must be a folder, not "
                         f"{args.data_root}, and knows --task ovss only")
    one_picture = (args.prompt, args.resize, args.draws, args.batch_size) == ("present", "squash", 1, None)
    if args.dataset == "folder" and not one_picture:
        raise ValueError("--dataset folder looks for all --classes in whole pictures, one at a time: "
                         "--prompt, --resize, --draws and --batch-size do not go with it")


def find_sets(args: argparse.Namespace) -> tuple[list[Dataset], dict[str, str]]:
    """The data sets that are asked for; of the paper's whole table, those that are there, and why others are not."""
    if args.dataset != "all":
        return [DATASETS[args.dataset](args.data_root)], {}
    found = []
    missing = {}
    for name in PAPER[args.task]["columns"]:
        try:
            found.append(DATASETS[name](args.data_root))
        except ValueError as e:
            missing[name] = str(e)
    if not found:
        raise ValueError(f"none of the data sets {', '.join(missing)} was found; " + next(iter(missing.values())))
    return found, missing


def main(args: argparse.Namespace) -> None:
    check(args)
    folder = args.dataset == "folder"
    sets, missing = ([], {}) if folder else find_sets(args)
    name = args.model or ("nano" if args.dataset.startswith("scenes") else "sd3")
    device = args.device
    if device != "cpu" and torch.cuda.is_available() and world()[1] > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"                          # torchrun: a GPU for each process
    model = seg4diff.load(name, device, args.dtype, segment_only=args.task not in ("layers", "heads"), lora=args.lora)
    if model.name in ("floor", "ceiling"):
        raise ValueError(f"a model called {model.name!r} would share its row with that baseline; rename its file")
    out = args.out or Path("out") / f"{args.task}-{args.dataset}-{model.name}"
    if folder:
        run_folder(args, model, out)
    elif args.dataset != "all":
        run(args, model, sets[0], out)
    else:
        results = {data.name: run(args, model, data, out / data.name) for data in sets}
        if world()[0] == 0:
            print(paper_table(args.task, model.name, results))
        if world()[0] == 0 and missing:
            print(f"not found below {args.data_root}: {', '.join(missing)}; --dataset NAME draws the tree that is "
                  "expected")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--task", default="ovss", choices=TASKS)
    parser.add_argument("--dataset", default="scenes", choices=[*DATASETS, "all", "folder"],
                        help="a data set, all of the paper's table, or a folder of one's own")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--classes", help="for --dataset folder: names, separated by commas")
    parser.add_argument("--limit", type=at_least(1), help="only so many pictures, always the same ones")
    parser.add_argument("--prompt", default="present", choices=["present", "all"],
                        help="the picture's classes, as the paper, or all of the data set")
    parser.add_argument("--resize", default="squash", choices=["squash", "crop"],
                        help="squash (as the released code), crop (as the paper says)")
    parser.add_argument("--draws", type=at_least(1), default=1, help="noise draws whose maps are averaged")
    parser.add_argument("--threshold", type=float, help="unsup: KL below which maps merge (default: the model's)")
    parser.add_argument("--scaling", choices=seg4diff.SCALINGS, help="unsup: what maps are scaled over (default: the "
                        "model's)")
    parser.add_argument("--batch-size", type=at_least(1), help="pictures at once (default: the model's preset); in fp32 "
                        "on the CPU it changes no number")
    parser.add_argument("--out", type=Path, help="folder for ledger and results (default: out/TASK-DATASET-MODEL)")
    add_model_options(parser, default=None)              # nano for scenes, sd3 for real pictures
    command(main, parser)

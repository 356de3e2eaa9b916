"""One command for each table or figure; without arguments, open-vocabulary segmentation by nano.

    python evaluate.py                                   # Table 1's protocol on 200 scenes of the toy world
    python evaluate.py --dataset voc                     # Table 1's first number, by SD3, of ./data/VOCdevkit
    python evaluate.py --dataset all                     # Table 1, beside the paper's numbers
    python evaluate.py --task unsup                      # Table 2: regions without names (--dataset all, too)
    python evaluate.py --task thresholds                 # how Table 2's scaling and threshold are chosen
    python evaluate.py --task layers                     # Fig. 8: mIoU of every block
    python evaluate.py --task heads                      # Fig. 17 / supplement Fig. 4: of every head
                                                         # (the paper: with --dataset voc21)
    python evaluate.py --task timesteps                  # Fig. 15 / supplement Fig. 2: against the noise level
    python evaluate.py --task normalization              # Table 5 / supplement Table 1: what is compared
    torchrun --nproc-per-node=4 evaluate.py --dataset ade20k                     # the pictures shared out

Every run prints floor and ceiling beside the score: random maps, and the ground truth itself reduced to the
patch grid, through the same protocol on the same pictures.  Results go to --out as results.json and PNGs; a run
that is killed goes on where it stopped (support/ledger.py).
"""
import argparse
import platform
import time
import zlib
from pathlib import Path

import torch
from PIL import Image

import seg4diff
from loading import Seg4Diff, image_seed
from protocol import TASKS, UNNAMED, Evaluation, Protocol, add_up, evaluation
from support.checkpoint import peak_megabytes
from support.cli import BAR, Parser, add_model_options, at_least, command, positive, progress, renamed
from support.data import DATASETS, ROOT, Dataset, subset
from support.files import write_json
from support.ledger import Ledger, wait_for_all, world
from support.metrics import match_proposals, table
from support.pictures import overlay_grid
from support.report import PAPER, paper_table, plot

# What the counts of a picture depend on. When one of these files changes, a run begins anew.
CODE = ("protocol.py", "seg4diff.py", "loading.py", "mmdit.py", "vae.py", "text.py", "lora.py", "support/checkpoint.py",
        "support/weights.py", "support/data.py", "support/metrics.py", "support/ledger.py", "support/classes.json",
        "nano/scenes.py")

# ---------------------------------------------------------------------------- a run: count, then report


def identity_of(ev: Evaluation) -> dict:
    """Everything that the counts depend on; the ledger keeps runs apart by it."""
    model = ev.model
    data = ev.data
    code = "".join((Path(__file__).parent / file).read_text() for file in CODE)
    exact = model.device.type == "cpu" and model.dtype == torch.float32      # there the batch size changes no number
    return {"task": ev.task, "dataset": data.name, "labels": data.source, "classes": data.classes,
            "always": data.always, "variants": ev.variants, "protocol": ev.protocol._asdict(),
            "model": [model.name, model.fingerprint, str(model.dtype), model.device.type],
            "code": zlib.crc32(code.encode()), "batch": exact or ev.batch}


def facts_of(ev: Evaluation, n: int) -> dict[str, str]:
    """What is printed above the table, a fact a line."""
    model = ev.model
    blocks = sorted({v.block for v in ev.variants})
    sigmas = sorted({v.sigma for v in ev.variants})
    facts = {"task": ev.task, "data": f"{ev.data.name}, {n} pictures, {len(ev.data.classes)} classes",
             "model": f"{model.name} ({model.fingerprint}), {str(model.dtype).removeprefix('torch.')}",
             "block": " ".join(map(str, blocks)), "sigma": " ".join(f"{sigma:.3f}" for sigma in sigmas)}
    for choice, value in ev.protocol._asdict().items():
        facts[choice] = str(value)
    if ev.scoring is UNNAMED:
        facts["prompt"] = "empty"
    if ev.task == "unsup":
        facts["merging"] = f"maps scaled over: {ev.variants[0].scaling}, merged below KL {ev.variants[0].threshold:g}"
    return facts


def count_into(ledger, ev, names, shape, silent):
    """Count the pictures that the ledger lacks, a line each, under a bar that shows the best mIoU so far."""
    todo = [name for name in names if name not in ledger.done]
    total = ledger.sum(names, shape)
    shown = time.time()
    with progress("evaluating", "image", len(names), len(names) - len(todo), silent) as bar:
        for name, counts in ev.count(todo):
            bar.update()
            if isinstance(counts, Exception):
                ledger.skip(name, str(counts))
                continue
            ledger.add(name, counts, image_seed(name, ev.protocol.seed))
            add_up(total, counts)
            if total and not bar.disable and time.time() - shown > BAR:      # a score takes longer than a picture
                shown = time.time()
                best, row = max((ev.scoring.score(total[v.name])["mIoU"], v.name) for v in ev.variants)
                bar.set_postfix({f"mIoU {row}": f"{best:.1f}"})


def examples(ev: Evaluation, names: list[str]) -> Image.Image:
    """Pictures beside truth and prediction; unnamed regions in the colour of the class that they were matched to."""
    shown = []
    for name in names:
        item = ev.read(name)
        (rows,) = ev.predict([item])
        labels = rows[ev.variants[0].name]
        if ev.scoring is UNNAMED:
            _, labels = match_proposals(item.labels, labels, len(ev.data.classes))
        shown.append((item.image, item.labels, labels))
    return overlay_grid(shown, ev.data.classes)


def report(args, ev, ledger, names, total, seconds, out):
    """What the ledger holds as results.json, printed lines and pictures, in this order; rows of the table.

    ValueError: no picture could be read, or none has a labelled pixel.
    """
    broken = {name: ledger.broken[name] for name in names if name not in ledger.done}
    n = len(names) - len(broken)
    if n == 0:
        reason = next(iter(broken.values()))
        raise ValueError(f"none of the {len(names)} pictures of {ev.data.name} could be read; the first: {reason}")
    if not total:
        raise ValueError(f"no pixel can be scored: no picture of {ev.data.name} has a labelled pixel")
    rows = {row: ev.scoring.score(c) for row, c in total.items()}
    facts = facts_of(ev, n)
    megabytes = peak_megabytes(ev.model.device)
    write_json(out / "results.json", {
        "task": ev.task, "n": n, "facts": facts, "identity": identity_of(ev), "hash": ledger.hash, "broken": broken,
        "arguments": {k: str(v) for k, v in vars(args).items()}, "classes": ev.data.classes, "rows": rows,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "variants": [v._asdict() for v in ev.variants], "seconds": seconds, "peak_MB": megabytes})
    for fact, value in facts.items():
        print(f"{fact + ':':9s}{value}")
    print(table(rows))
    if broken:
        print(f"{len(broken)} of {len(names)} pictures could not be read and are left out: "
              + "; ".join(f"{name} ({why})" for name, why in broken.items()))
    if len(ev.variants) == 1:
        iou = zip(ev.data.classes, rows[ev.variants[0].name]["IoU"])
        print("IoU per class:", ", ".join(f"{name} {x:.0f}" for name, x in iou if x is not None))
        picture = out / "overlays.png"
        examples(ev, [name for name in names if ledger.done.get(name)][:12]).save(picture)
    else:
        picture = out / f"{ev.task}.png"
        plot(ev.task, ev.variants, rows, ev.model, picture)
    print(f"{seconds:.0f} s, {megabytes / 1000:.1f} GB; wrote {out}/results.json and {picture.name}")
    return rows


def run(args: argparse.Namespace, model: Seg4Diff, data: Dataset, out: Path) -> dict[str, dict]:
    """One task on one data set: count what the ledger lacks, then report all that it has; rows of the table."""
    start = time.time()
    rank, processes = world()
    ev = evaluation(model, data, args.task, Protocol(args.seed, args.prompt, args.resize, args.draws), args.batch_size)
    merging = {key: getattr(args, key) for key in ("threshold", "scaling") if getattr(args, key) is not None}
    ev = ev._replace(variants=[v._replace(**merging) for v in ev.variants])
    identity = identity_of(ev)
    names = subset(data.names, args.limit)
    shape = len(data.classes), ev.scoring.columns(len(data.classes))
    count_into(Ledger(out, identity, rank), ev, names[rank::processes], shape, silent=rank > 0)
    wait_for_all()
    if rank > 0:
        return {}
    ledger = Ledger(out, identity)                                           # with what the other processes wrote
    return report(args, ev, ledger, names, ledger.sum(names, shape), time.time() - start, out)


# ---------------------------------------------------------------------------- command line


def check(args):
    """ValueError: options that do not go together, one sentence each."""
    if (args.threshold is not None or args.scaling is not None) and args.task != "unsup":
        raise ValueError("--threshold and --scaling belong to --task unsup")
    if args.prompt == "all" and TASKS[args.task].scoring is UNNAMED:
        raise ValueError(f"--prompt all names classes, but --task {args.task} uses the empty prompt")
    if args.dataset == "all" and args.task not in PAPER:
        raise ValueError("--dataset all is for the tables of the paper: --task ovss or unsup")


def find_sets(args):
    """The data sets that are asked for; of the paper's whole table, those that are there, and why others are not."""
    if args.dataset != "all":
        return [DATASETS[args.dataset](args.data_root)], {}
    sets = []
    missing = {}
    for name in PAPER[args.task]["columns"]:
        try:
            sets.append(DATASETS[name](args.data_root))
        except ValueError as e:
            missing[name] = str(e)
    if not sets:
        raise ValueError(f"none of the data sets {', '.join(missing)} was found; " + next(iter(missing.values())))
    return sets, missing


def main(args):
    check(args)
    sets, missing = find_sets(args)
    name = args.model or ("nano" if args.dataset.startswith("scenes") else "sd3")
    segment_only = args.task not in ("layers", "heads")
    model = seg4diff.load(name, args.device, args.dtype, segment_only, args.lora)
    if model.name in ("floor", "ceiling"):
        raise ValueError(f"a model called {model.name!r} would share its row with that baseline; rename its file")
    out = args.out or Path("out") / f"{args.task}-{args.dataset}-{model.name}"
    if args.dataset != "all":
        run(args, model, sets[0], out)
        return
    results = {data.name: run(args, model, data, out / data.name) for data in sets}
    if world()[0] == 0:
        print(paper_table(args.task, model.name, results))
        if missing:
            print(f"not found below {args.data_root}: {', '.join(missing)}; --dataset NAME draws the expected tree")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--task", default="ovss", choices=TASKS)
    own_pictures = renamed("python seg4diff.py segment IMAGE CLASS...", "folder")
    parser.add_argument("--dataset", default="scenes", type=own_pictures, choices=[*DATASETS, "all"],
                        help="or all of the paper's table")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--limit", type=at_least(1), help="only so many pictures, always the same ones")
    parser.add_argument("--prompt", default="present", choices=["present", "all"], help="the picture's classes, or all")
    parser.add_argument("--resize", default="squash", choices=["squash", "crop"], help="the paper: crop")
    parser.add_argument("--draws", type=at_least(1), default=1, help="noise draws whose maps are averaged")
    parser.add_argument("--threshold", type=positive, help="unsup: KL below which maps merge (default: the model's)")
    parser.add_argument("--scaling", choices=seg4diff.SCALINGS, help="unsup: maps are scaled over it (the model's)")
    parser.add_argument("--batch-size", type=at_least(1), help="pictures at once (default: the model's preset)")
    parser.add_argument("--out", type=Path, help="folder for ledger and results (default: out/TASK-DATASET-MODEL)")
    add_model_options(parser, default=None, default_help="nano for scenes, sd3 for real pictures")
    command(main, parser)

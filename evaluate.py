"""One command for each table or figure; without arguments, open-vocabulary segmentation by nano.

    python evaluate.py                                   # Table 1's protocol on 200 scenes of the toy world
    python evaluate.py --dataset voc                     # Table 1's first number, by SD3, of ./data/VOCdevkit
    python evaluate.py --dataset all                     # Table 1, beside the paper's numbers
    python evaluate.py --task unsup                      # Table 2: regions without names (--dataset all, too)
    python evaluate.py --task unsup --regions i2i        # beyond the paper: regions of the image-to-image attention
    python evaluate.py --task readings                   # beyond the paper: four readings of the same attention
    python evaluate.py --task thresholds                 # how Table 2's scaling and threshold are chosen
    python evaluate.py --task layers                     # Fig. 8: mIoU of every block
    python evaluate.py --task heads                      # Fig. 17 / supplement Fig. 4: of every head
                                                         # (the paper: with --dataset voc21)
    python evaluate.py --task timesteps                  # Fig. 15 / supplement Fig. 2: against the noise level
    python evaluate.py --task normalization              # Table 5 / supplement Table 1: what is compared
    python evaluate.py --task quality                    # Table 3: generated pictures, judged (quality.py)
    python evaluate.py --model sd3                       # drawn scenes: are real weights read as they should be?
    python evaluate.py --model sd3 --control swapped     # wrong names, which must score like random maps
    python evaluate.py --protocol released               # Tables 1 and 2 the released code's way (released.py)
    python evaluate.py --task protocol                   # what each of its choices is worth
    torchrun --nproc-per-node=4 evaluate.py --dataset ade20k                     # the pictures shared out

Every run prints floor and ceiling beside the score: random maps, and the ground truth itself reduced to the
patch grid, through the same protocol on the same pictures.  Results go to --out as results.json and PNGs; a run
that is killed goes on where it stopped (support/ledger.py).
"""
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

import controls
import released
import seg4diff
from counting import VERSIONS, above_first, count, parts_of, scored_rows
from loading import Seg4Diff
from protocol import TASKS, Evaluation, Protocol, evaluation, unsup_i2i
from support.checkpoint import peak_megabytes, pick_device
from support.cli import Parser, add_model_options, at_least, command, positive, renamed, show
from support.data import DATASETS, ROOT, Dataset
from support.files import Broken, write_json, write_picture
from support.ledger import Ledger, world
from support.metrics import match_proposals, table
from support.pictures import overlay_grid
from support.report import PAPER, paper_table, plot

# ---------------------------------------------------------------------------- a run: count, then report


def facts_of(ev: Evaluation, n: int) -> dict[str, str]:
    """What is printed above the table, a fact a line."""
    model = ev.model
    blocks = sorted({v.block for v in ev.variants})
    sigmas = sorted({v.sigma for v in ev.variants})
    facts = {"task": ev.task, "data": f"{ev.data.name}, {n} pictures, {len(ev.data.classes)} classes",
             "model": f"{model.name} ({model.fingerprint}), {str(model.dtype).removeprefix('torch.')}",
             "block": " ".join(map(str, blocks)), "sigma": " ".join(f"{sigma:.3f}" for sigma in sigmas)}
    for choice in ("seed", "prompt", "resize", "draws"):
        facts[choice] = str(getattr(ev.protocol, choice))
    if not ev.scoring.named:
        facts["prompt"] = "empty"
    if ev.protocol.control != "none":
        facts["control"] = f"{ev.protocol.control}, which must score near the floor"
    if any(ev.protocol.choices):
        facts["choices"] = "the released code's " + " ".join(released.names_on(ev.protocol.choices))
        if ev.protocol.choices.resize:
            facts["resize"] = f"short side {int(released.SHORT * model.preset.size)}, then squash"
    first = ev.variants[0]
    if len(ev.variants) == 1 and first.reading != "paper":
        facts["reading"] = f"{first.reading}, beyond the paper"
    if len(ev.variants) == 1 and first.threshold is not None:
        what = f"maps scaled over: {first.scaling}" if first.regions == "pad" else "I2I of anchors, beyond the paper"
        facts["merging"] = f"{what}, merged below KL {first.threshold:g}"
    return facts


def differences(ev: Evaluation, ledger: Ledger, names: list[str]) -> dict[str, list[float]]:
    """`above_first` for each variant."""
    counts = np.stack(list(parts_of(ev, ledger, names).values()))            # (n, variants, K, 3)
    return dict(zip((v.name for v in ev.variants), above_first(counts)))


def examples(ev: Evaluation, names: list[str]) -> Image.Image:
    """Pictures beside truth and prediction; unnamed regions in the colour of the class that they were matched to."""
    shown = []
    for name in names:
        item = ev.read(name)
        (rows,) = ev.predict([item])
        labels = rows[ev.variants[0].name]
        scored = ev.prepare(item).item
        if not ev.scoring.named:
            _, labels = match_proposals(scored.labels, labels, len(ev.data.classes))
        shown.append((scored.image, scored.labels, labels))
    return overlay_grid(shown, ev.data.classes)


def report(args, ev, ledger, names, seconds, out):
    """What the ledger holds as results.json and a picture, then printed; rows of the table.  Broken: scored_rows."""
    rows, broken = scored_rows(ev, ledger, names)
    task = TASKS[ev.task]
    n = len(names) - len(broken)
    facts = facts_of(ev, n)
    megabytes = peak_megabytes(ev.model.device)
    above = differences(ev, ledger, names) if task.intervals else {}
    write_json(out / "results.json", {
        "task": ev.task, "n": n, "facts": facts, "identity": ledger.identity, "hash": ledger.hash, "broken": broken,
        "arguments": {k: str(v) for k, v in vars(args).items()}, "classes": ev.data.classes, "rows": rows,
        "above the first row": above, "versions": VERSIONS,
        "variants": [v._asdict() for v in ev.variants], "seconds": seconds, "peak_MB": megabytes})
    if task.overlays:
        picture = out / "overlays.png"
        write_picture(picture, examples(ev, [name for name in names if ledger.done.get(name)][:12]))
    else:
        picture = out / f"{ev.task}.png"
        plot(ev.task, ev.variants, rows, ev.model, picture)
    for fact, value in facts.items():
        show(f"{fact + ':':9s}{value}")
    show(table(rows))
    if task.note and len(ev.variants) > 1:
        show(task.note.format(*(v.name for v in ev.variants)))
    for row, (mean, low, high) in list(above.items())[1:]:
        show(f"{row} above {ev.variants[0].name}: {mean:+.1f} mIoU (95 % interval over the pictures: {low:+.1f} to "
             f"{high:+.1f})")
    if broken:
        show(f"{len(broken)} of {len(names)} pictures could not be read and are left out: "
             + "; ".join(f"{name} ({why})" for name, why in broken.items()))
    if task.overlays:
        iou = zip(ev.data.classes, rows[ev.variants[0].name]["IoU"])
        show("IoU per class:", ", ".join(f"{name} {x:.0f}" for name, x in iou if x is not None))
    show(f"{seconds:.0f} s, {megabytes / 1000:.1f} GB; wrote {out}/results.json and {picture.name}")
    return rows


def run(args: argparse.Namespace, model: Seg4Diff, data: Dataset, out: Path) -> dict[str, dict]:
    """One task on one data set: count what the ledger lacks, then report all that it has; rows of the table."""
    start = time.time()
    choices = released.chosen(args.protocol, args.task, data.name, model)
    protocol = Protocol(args.seed, args.prompt, args.resize, args.draws, args.control, choices)
    ev = evaluation(model, data, args.task, protocol, args.batch_size)
    if args.regions == "i2i":
        ev = ev._replace(variants=unsup_i2i(model))
    if args.reading is not None:
        row = model.name if args.reading == "paper" else f"{model.name} {args.reading}"
        ev = ev._replace(variants=[ev.variants[0]._replace(name=row, reading=args.reading)])
    counted = count(ev, args.limit, out)
    return report(args, ev, *counted, time.time() - start, out) if counted else {}


# ---------------------------------------------------------------------------- command line

# Options that --task quality alone reads
QUALITY = ("prompts", "images", "seeds", "cfg", "pag", "blocks", "perturb", "judge", "against")


def check(args):
    """ValueError: options that do not go together, one sentence each."""
    for option in QUALITY:
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} belongs to --task quality")
    own_picture = args.prompt != "present" or args.resize != "squash" or args.control != "none"
    own_regions = args.threshold is not None or args.scaling is not None or args.regions is not None
    own_protocol = args.protocol != "ours"
    if args.task == "protocol":
        if own_picture or own_regions or own_protocol or args.reading is not None or args.dataset == "all":
            raise ValueError("--task protocol switches the choices of the protocol itself, on one data set; it takes "
                             "none of them from the command line")
        return
    if own_protocol and args.task not in released.TABLES:
        raise ValueError("--protocol belongs to --task ovss and --task unsup, Tables 1 and 2")
    if own_protocol and (own_picture or own_regions):
        raise ValueError("--protocol stands for a choice of prompt, picture and regions; it takes no --prompt, "
                         "--resize, --control, --threshold, --scaling or --regions beside it")
    if args.protocol == "half" and args.dtype != "auto":
        raise ValueError("--protocol half is float16; it takes no --dtype beside it")
    if args.control != "none" and (args.task != "ovss" or args.dataset == "all"):
        raise ValueError("--control belongs to --task ovss on one data set: without names there is nothing to swap, "
                         "and patches that are alike remain so in a shuffled block")
    if (args.threshold is not None or args.scaling is not None) and args.task != "unsup":
        raise ValueError("--threshold and --scaling belong to --task unsup")
    if args.regions is not None and args.task != "unsup":
        raise ValueError("--regions belongs to --task unsup")
    if args.regions == "i2i" and args.scaling is not None:
        raise ValueError("--scaling belongs to --regions pad")
    if args.reading is not None and args.task != "ovss":
        raise ValueError("--reading belongs to --task ovss; --task readings compares all readings")
    if args.dataset == "all" and (args.reading not in (None, "paper") or args.regions == "i2i"):
        raise ValueError("--dataset all stands beside the paper's numbers; it takes its reading and its regions alone")
    if args.prompt == "all" and not TASKS[args.task].scoring.named:
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
    if args.task == "quality":
        import quality  # not above: no other task needs it
        quality.main(args)
        return
    check(args)
    world()                                              # what is wrong with it is said before the work
    sets, missing = find_sets(args)
    name = args.model
    if name is None:
        name = "nano" if args.dataset.startswith("scenes") else "sd3"
    segment_only = args.task not in ("layers", "heads")

    def load(dtype):
        return seg4diff.load(name, args.device, dtype, segment_only=segment_only, lora=args.lora)

    # the released code's precision, where it is fast and exact enough, or asked for
    half = args.dtype == "auto" and (pick_device(args.device).type == "cuda" or args.protocol == "half")
    if args.task == "protocol":
        from tools.waterfall import waterfall  # not above: no other task needs it
        waterfall(args, load, sets[0], half)
        return
    model = load("float16" if half and args.protocol in ("released", "half") else args.dtype)
    if model.name in ("floor", "ceiling", "ceiling pixels"):
        raise ValueError(f"a model called {model.name!r} would share its row with that baseline; rename its file")
    merging = "i2i_threshold" if args.regions == "i2i" else "threshold"
    model.preset = model.preset.changed(scaling=args.scaling, **{merging: args.threshold})
    if args.control == "block":
        model = controls.shuffle_block(model)
    special = [x for x in (args.control, args.protocol) if x not in ("none", "ours")]        # at most one of the two
    parts = [x for x in (*special, args.reading, args.regions) if x is not None]
    out = args.out or Path("out") / "-".join([args.task, args.dataset, model.name, *parts])
    for name in special:
        model.name += f" ({name})"
    if args.dataset != "all":
        run(args, model, sets[0], out)
        return
    results = {}
    problems = []
    for data in sets:
        try:
            results[data.name] = run(args, model, data, out / data.name)
        except (Broken, OSError) as e:                   # nothing of it can be read, or nothing printed: the next one
            problems.append(f"{data.name}: {e}")
    if world()[0] == 0 and results:
        show(paper_table(args.task, model.name, results))
        if missing:
            show(f"not found below {args.data_root}: {', '.join(missing)}; --dataset NAME says where each belongs")
    if problems:
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--task", default="ovss", choices=[*TASKS, "protocol", "quality"])
    own_pictures = renamed("python seg4diff.py segment IMAGE CLASS...", "folder")
    parser.add_argument("--dataset", default="scenes", type=own_pictures, choices=[*DATASETS, "all"],
                        help="or all of the paper's table")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--limit", type=at_least(1), help="only so many pictures, always the same ones")
    parser.add_argument("--prompt", default="present", choices=["present", "all"], help="the picture's classes, or all")
    parser.add_argument("--resize", default="squash", choices=["squash", "crop"], help="the paper: crop")
    parser.add_argument("--draws", type=at_least(1, most=1000), default=1, help="noise draws whose maps are averaged")
    parser.add_argument("--reading", choices=seg4diff.READINGS, help="ovss: this one alone (default: paper and i2i)")
    parser.add_argument("--regions", choices=seg4diff.REGIONS, help="unsup: <pad> maps, or I2I's (default: pad)")
    parser.add_argument("--threshold", type=positive, help="unsup: KL below which maps merge (default: the model's)")
    parser.add_argument("--scaling", choices=seg4diff.SCALINGS, help="unsup: maps are scaled over it (the model's)")
    parser.add_argument("--control", default="none", choices=["none", *controls.CONTROLS],
                        help="what must score like random maps: wrong names, or a block that is shuffled")
    parser.add_argument("--protocol", default="ours", choices=["ours", "released", *released.Choices._fields],
                        help="ovss, unsup: the released code's choices, or one of them (docs/protocol.md)")
    parser.add_argument("--batch-size", type=at_least(1, most=1024),
                        help="pictures at once (default: the model's preset)")
    gen = parser.add_argument_group("quality", "--task quality: generated pictures, judged")
    gen.add_argument("--prompts", help="scenes-dev, coco, or a file, a prompt a line (scenes-dev for nano, else coco)")
    gen.add_argument("--images", type=at_least(1), help="prompts, the first of them (default: 100)")
    gen.add_argument("--seeds", type=at_least(1, most=1000), help="pictures of each prompt (default: 1)")
    gen.add_argument("--cfg", type=float, help="classifier-free guidance scale (default: the model's preset)")
    gen.add_argument("--pag", type=at_least(-1000, float, most=1000), help="scale s of Eq. 7 (default: 0)")
    gen.add_argument("--blocks", type=int, nargs="+", help="blocks blurred for --pag (default: the expert block)")
    gen.add_argument("--perturb", type=int, nargs="+", help="blocks whose I2T is blurred throughout, Fig. 5")
    gen.add_argument("--judge", help="nano, clip, a CLIP's folder, or own: the model's flow loss (nano; else clip)")
    gen.add_argument("--against", type=Path, help="results.json of another arm, to be compared picture by picture")
    parser.add_argument("--out", type=Path, help="folder for ledger and results (default: out/TASK-DATASET-MODEL)")
    add_model_options(parser, default=None, default_help="nano for scenes, sd3 for real pictures")
    command(main, parser)

"""MAGNET (Sec. 3.5): a LoRA that aligns the image-to-text maps of the expert block with masks.

    python train_magnet.py                                        # nano on scenes of the toy world, on a laptop
    python train_magnet.py --dataset coco --match name            # SD3 on ./data/coco
    torchrun --nproc-per-node=2 train_magnet.py --dataset sa1b --captions cogvlm.json
    python train_magnet.py --measure out/magnet-scenes-nano-0/lora.safetensors         # before and after, in numbers

A run writes lora.safetensors, log.json and loss.png to --out. After a kill the same command goes on where it stopped
and ends with the same weights (on a GPU nearly the same: its sums are not always in one order).  The losses and the
meaning of each setting stand in magnet.py.
"""
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import argparse
import math
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import protocol
import seg4diff
from loading import Seg4Diff, image_seed
from lora import add_lora, read_lora, save_lora
from magnet import NORMALISATIONS, Settings, batch_losses, features, flow_matching, gradient
from support.checkpoint import check_finite, check_weight, peak_megabytes, pick_device, pick_dtype
from support.cli import Parser, add_model_options, at_least, command, positive, progress, renamed, show
from support.data import DATASETS, ROOT, TRAINING_SETS, Dataset, measurable, read_ahead, subset
from support.files import Broken, check_kind, code_stamp, decoding, read_tensors, stamp, write_json, write_tensors
from support.ledger import wait_for_all, world
from support.report import plot_losses

RECIPES = {                                 # what differs between data sets; that of scenes is ours
    "scenes": Settings("nano", "scenes-dev", steps=200, warmup=20, lr=5e-4, batch=16, checkpointing=False,
                       sigma="uniform", mask_weight=0.2),
    "coco": Settings(val="coco-object", steps=3000),
    "sa1b": Settings(maps="heads"),
}
MEANINGS = {"steps": "of the optimiser", "warmup": "steps until the full rate", "lr": "learning rate",
            "batch": "pictures at once, in each process", "rank": "of the LoRA", "mask_weight": "lambda_mask of Eq. 13",
            "val": "data set measured on the way", "match": "a mask gets the map that fits, or that of its name",
            "maps": "candidates: mean over heads, or each head's", "normalise": "maps, to [0, 1]",
            "sigma": "how noise levels are drawn"}
PICTURES = 10_000                           # of the training: Sec. 4.1
STEP = 16                                   # pictures a step, of all processes: 2 GPUs x 4 x 2, Sec. 4.1
DECAY, CLIP = 1e-4, 0.01                    # weight decay, largest gradient norm: released code
# What the weights, and what is measured on the way, depend on. When one of these files changes, a run cannot go on.
CODE = ("train_magnet.py", "magnet.py", *protocol.CODE)

# ---------------------------------------------------------------------------- before and after


@torch.inference_mode()
def flow_loss(model, data, names, seed):
    """Eq. 2 at fixed noise and noise levels (1/8, 3/8, ...), prompted with the class names; mean over the pictures."""
    sigma = torch.tensor([0.125, 0.375, 0.625, 0.875], device=model.device)
    total = 0.0
    for name in names:
        item = data.read(name)
        z0 = seg4diff.encode_image(model, item.image).float()                # (1, C, ., .)
        seeds = [image_seed(name, seed + i) for i in range(len(sigma))]
        eps = seg4diff.noise(z0.shape[1:], seeds).to(model.device)           # (4, C, ., .)
        cond = model.text.encode([protocol.names_of(model, item, data.classes)] * len(sigma))
        loss, _ = flow_matching(model, z0, eps, sigma, cond.ctx, cond.pooled)
        check_finite(loss, "flow losses")
        total += loss.item() / len(names)
    return total


def measure(model: Seg4Diff, data: Dataset, names: list[str], seed: int) -> dict[str, float]:
    """What MAGNET should raise, mIoU in percent with names and without, and what it should not spoil, the flow loss."""
    ours = protocol.Protocol(seed)
    named = protocol.measure(model, data, names, "ovss", protocol=ours)[model.name]["mIoU"]
    unnamed = protocol.measure(model, data, names, "unsup", protocol=ours)[model.name]["mIoU"]
    return {"mIoU": named, "unsup mIoU": unnamed, "flow loss": flow_loss(model, data, names, seed)}


def before_and_after(args, base, data, names):
    """A row of numbers without LoRA and with each; mean and spread of the change over several (say, seeds)."""
    for path in args.measure:
        read_lora(path)                                                      # a wrong one is named before the work
    show(f"{data.name}, {len(names)} pictures, seed {args.seed}: mIoU, unsup mIoU, flow loss")
    rows = []
    for path in [None, *args.measure]:
        model = seg4diff.load(base, args.device, args.dtype, lora=path)
        rows.append(list(measure(model, data, names, args.seed).values()))
        numbers = [f"{x:9.4f}" for x in rows[-1]]
        show("  ".join([*numbers, str(path or base)]))
    change = np.array(rows[1:]) - rows[0]                                    # (LoRAs, 3)
    spread = change.std(0, ddof=1) if len(change) > 1 else np.full(3, np.nan)
    columns = [f"{mean:+9.4f} (sd {sd:.4f})" for mean, sd in zip(change.mean(0), spread, strict=True)]
    show("  ".join([*columns, "change, mean and spread"]))


# ---------------------------------------------------------------------------- what a step learns from


def readable(data, names):
    """A reader that puts the next picture of `names` in the place of one that cannot be read, and says so once.

    ValueError: none of them can be read.
    """
    reported = set()

    def read(name):
        start = names.index(name)
        for candidate in (*names[start:], *names[:start]):
            try:
                return data.read(candidate)
            except Broken as e:
                if candidate not in reported:
                    reported.add(candidate)
                    tqdm.write(f"picture {candidate} of {data.name} cannot be read, left out: {e}", file=sys.stderr)
        raise ValueError(f"none of the {len(names)} pictures of {data.name} can be read")
    return read


def batches(model, data, settings, accumulate, done):
    """What this process learns from after `done` steps: pictures and seeds of their noise, settings.batch at a time.

    The g-th picture of a run and its noise are the same for any number of processes and after any kill.
    """
    rank, processes = world()
    share = settings.batch * accumulate                  # pictures of a process in a step
    size = share * processes
    order = []                                           # the g-th picture's name
    for epoch in range(math.ceil(settings.steps * size / len(data.names))):
        order += np.random.default_rng([settings.seed, epoch]).permutation(data.names).tolist()
    mine = [g for g in range(done * size, settings.steps * size) if g // share % processes == rank]
    pairs = read_ahead(readable(data, data.names), [order[g] for g in mine])
    for i in range(0, len(mine), settings.batch):
        batch = []
        for _, pair in islice(pairs, settings.batch):
            batch.append(features(model, pair, settings.match == "name"))
        yield batch, [image_seed(str(g), settings.seed) for g in mine[i:i + settings.batch]]


# ---------------------------------------------------------------------------- the run


def rate(step, steps, warmup):
    """Share of the full learning rate: a straight line up, then half a cosine down to zero.

    NOTE(official): there the cosine runs over all steps, those of the warm-up too.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def trial(model, params, batch, seeds, settings):
    """The losses with the weights as the last step has left them, and the size of these."""
    losses = batch_losses(model, batch, seeds, settings)
    size = torch.nn.utils.get_total_norm(params)
    return {key: loss.item() for key, loss in losses.items()} | {"LoRA": size.item()}


def check_log(log):
    """ValueError, or what a list or dictionary raises: not the log of a run."""
    for entry in check_kind(log, list, "its log"):
        numbers = [entry["step"]]
        if "flow" in entry:
            numbers += [entry[key] for key in ("flow", "focal", "dice")]
        else:
            numbers += [entry["val"][key] for key in ("mIoU", "unsup mIoU", "flow loss")]
        for x in numbers:
            if not isinstance(x, int | float) or not math.isfinite(x):
                raise ValueError(f"its log should hold finite numbers, not {str(x)[:40]}")


def check_state(state, params, steps):
    """ValueError, or what a list or dictionary raises: not the state of a run of so many steps.

    A state is the steps done, the log, the LoRA and the optimiser's moments.
    """
    if not 0 <= check_kind(state["step"], int, "its number of steps") <= steps:
        raise ValueError(f"its number of steps should be from 0 to {steps}, not {state['step']}")
    check_log(state["log"])
    lora = check_kind(state["lora"], list, "its LoRA")
    moments = check_kind(state["opt"]["state"], dict, "its state of the optimiser")
    if not len(lora) == len(moments) == len(params):
        raise ValueError(f"it should hold a LoRA of {len(params)} tensors and their moments")
    for i, p in enumerate(params):
        for x, like in ((lora[i], p), (moments[i]["exp_avg"], p), (moments[i]["exp_avg_sq"], p),
                        (moments[i]["step"], torch.tensor(0.0))):
            check_weight(f"number {i} of its tensors", x)
            if x.dtype != like.dtype or x.shape != like.shape or not x.isfinite().all():
                raise ValueError(f"number {i} of its tensors is not of this LoRA, or not finite")


def resume(path, identity, params, opt):
    """What a killed run has saved, into params and opt -> steps done and log; 0 and an empty log if there is nothing.

    ValueError: the file is broken, or another run's.
    """
    if not path.exists():
        return 0, []
    kind = "state of a run (remove it, or name another --out)"
    state = read_tensors(path, kind)
    with decoding(path, kind):
        saved = check_kind(check_kind(state, dict, "its content")["run"], dict, "its identity")
    other = [f"{key} {saved.get(key)} instead of {value}" for key, value in identity.items()
             if str(saved.get(key)) != str(value)]
    if other:
        raise ValueError(f"{path.parent} holds a run with {'; '.join(other)}; name another --out, or remove it")
    with decoding(path, kind):
        check_state(state, params, identity["steps"])
    opt.load_state_dict(opt.state_dict() | {"state": state["opt"]["state"]})
    for p, values in zip(params, state["lora"], strict=True):
        p.data.copy_(values)
    return state["step"], state["log"]


def print_change(log):
    """What was measured before the first step and after the last, a line for each number."""
    measured = [entry["val"] for entry in log if "val" in entry]
    if measured:
        for key, before in measured[0].items():
            show(f"{key:12s} {before:8.4f} -> {measured[-1][key]:8.4f}")


def identity_of(args, settings, model, data, val, size):
    """What the weights, and what is measured on the way, depend on; size: pictures a step."""
    return settings._asdict() | {
        "model": [model.name, model.fingerprint, str(model.dtype), model.device.type], "code": code_stamp(CODE),
        "data": [data.name, len(data.names)], "batch": size, "val_limit": len(val.names),
        "checkpointing": None,                           # changes no number but by rounding
        "data_root": str(args.data_root.resolve()) if data.files or val.files else None,
        "captions": str(args.captions), "files that are trained on": stamp(data.files),
        "files that are measured on": stamp(val.files)}


def check_losses(losses, step, out):
    """ValueError: one of them is not finite; then they must not reach the weights, nor these weights a file."""
    if not all(map(math.isfinite, losses.values())):
        kept = f"{out} has the last good state" if (out / "state.pt").exists() else "nothing was saved yet"
        raise ValueError(f"not finite at step {step}: {losses}; {kept}; a smaller --lr may help")


def train(args, settings, model, data, val, out):
    """settings.steps steps of AdamW on a new LoRA; the first process validates and saves."""
    start = time.time()
    rank, processes = world()
    accumulate = args.accumulate or math.ceil(STEP / (settings.batch * processes))
    size = settings.batch * accumulate * processes       # pictures a step
    identity = identity_of(args, settings, model, data, val, size)
    # alpha = rank: released code
    generator = torch.Generator().manual_seed(settings.seed % 2**63)
    params = add_lora(model.transformer, settings.rank, settings.rank, generator)
    model.transformer.checkpointing = settings.checkpointing
    opt = torch.optim.AdamW(params, settings.lr, weight_decay=DECAY)
    done, log = resume(out / "state.pt", identity, params, opt)

    def validate(step):
        if val.names and rank == 0:
            log.append({"step": step, "val": measure(model, val, val.names, settings.seed)})

    def save(step):
        if rank == 0:
            save_lora(model.transformer, out / "lora.safetensors")
            write_json(out / "log.json", log)
            plot_losses(log, out / "loss.png")
            lora = [p.detach() for p in params]
            state = {"step": step, "log": log, "run": identity, "opt": opt.state_dict(), "lora": lora}
            write_tensors(out / "state.pt", state)

    if not log:
        validate(0)
    stream = batches(model, data, settings, accumulate, done)
    steps = range(done + 1, settings.steps + 1)
    bar = progress("MAGNET", "step", settings.steps, done, rank > 0)
    for step in steps:
        opt.param_groups[0]["lr"] = settings.lr * rate(step - 1, settings.steps, settings.warmup)
        opt.zero_grad()
        learned = list(islice(stream, accumulate))
        losses = gradient(model, params, learned, settings)
        losses["norm"] = torch.nn.utils.clip_grad_norm_(params, CLIP).item()
        check_losses(losses, step, out)                  # before they reach the weights
        opt.step()
        log.append({"step": step, "lr": opt.param_groups[0]["lr"], **losses})
        bar.set_postfix({key: f"{losses[key]:.4f}" for key in ("flow", "focal", "dice")}, refresh=False)
        bar.update()
        validating = step % args.val_every == 0 or step == settings.steps
        saving = step % args.save_every == 0 and step < settings.steps
        if validating or saving:
            check_losses(trial(model, params, *learned[0], settings), step, out)             # before these reach a file
        if validating:
            validate(step)
        if saving:
            save(step)
    bar.close()
    save(settings.steps)                                 # also where a finished run's files are gone
    if rank == 0:
        print_change(log)
        show(f"{len(steps)} steps of {size} pictures, {time.time() - start:.0f} s, "
             f"{peak_megabytes(model.device) / 1000:.1f} GB; wrote {out}/lora.safetensors, log.json and loss.png")


def main(args):
    given = {key: value for key, value in vars(args).items() if key in Settings._fields and value is not None}
    settings = RECIPES[args.dataset]._replace(**given)
    if settings.match == "name" and (args.dataset == "sa1b" or settings.maps == "heads" or args.captions):
        raise ValueError("--match name prompts with the masks' names and gives each mask the map of its name, mean "
                         "over heads; sa1b's masks have no names, and neither --maps heads nor --captions has a use")
    if args.measure and settings.val == "none":
        raise ValueError("--measure needs pictures with label maps: choose them with --val")
    _, processes = world()                               # what is wrong with it is said before the work
    if args.measure and processes > 1:
        raise ValueError("--measure runs in one process: leave torchrun out")
    val = Dataset("none", [], None) if settings.val == "none" else DATASETS[settings.val](args.data_root)
    val = replace(val, names=measurable(val, subset(val.names, args.val_limit)))
    if args.measure:
        before_and_after(args, settings.model, val, val.names)
        return
    if pick_dtype(args.dtype, pick_device(args.device)) == torch.float16:
        raise ValueError("training in float16 loses small gradients, and they are not scaled here; use --dtype float32 "
                         "(auto is float16 on a GPU before compute capability 8.0)")
    captions = False if settings.match == "name" else args.captions          # False: the names are the prompt
    data = TRAINING_SETS[args.dataset](args.data_root, captions)
    data = replace(data, names=subset(data.names, args.limit))
    model = seg4diff.load(settings.model, args.device, args.dtype)
    out = args.out or Path("out") / f"magnet-{args.dataset}-{model.name}-{settings.seed}"
    out.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    train(args, settings, model, data, val, out)
    wait_for_all()


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", default="scenes", choices=RECIPES, help="its recipe fixes what has values below")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--captions", type=Path, help="JSON {image id: caption} for coco or sa1b")
    parser.add_argument("--limit", type=at_least(1), default=PICTURES, help="training pictures, always the same ones")
    add_model_options(parser, default=None, default_help="nano for scenes, else sd3", lora=False)
    few = at_least(1, most=1024)
    numbers = {"steps": at_least(1, most=10**6), "warmup": at_least(0), "lr": positive, "batch": few, "rank": few,
               "mask_weight": at_least(0, float), "match": renamed("'name'", "tokens")}
    choices = {"val": ["none", *DATASETS], "match": ["hungarian", "name"], "maps": ["mean", "heads"],
               "normalise": NORMALISATIONS, "sigma": ["uniform", "logit-normal"]}
    for key, meaning in MEANINGS.items():
        values = ", ".join(f"{data}: {getattr(recipe, key)}" for data, recipe in RECIPES.items())
        parser.add_argument("--" + key.replace("_", "-"), type=numbers.get(key), choices=choices.get(key),
                            help=f"{meaning} ({values})")
    parser.add_argument("--candidates", type=renamed("--maps mean or --maps heads"), help=argparse.SUPPRESS)
    parser.add_argument("--accumulate", type=few, help=f"batches a step (default: {STEP} pictures or more)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                        help="less memory: activations are computed twice (the default but for scenes)")
    parser.add_argument("--val-limit", type=at_least(1), default=100, help="pictures of --val that are measured")
    parser.add_argument("--val-every", type=at_least(1), default=100, help="steps between measurements")
    parser.add_argument("--save-every", type=at_least(1), default=25, help="steps between saved states")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="LORA", help="no training: numbers without and with")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/magnet-DATASET-MODEL-SEED)")
    command(main, parser)

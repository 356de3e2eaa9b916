"""MAGNET (Sec. 3.5): a LoRA that aligns the image-to-text maps of the expert block with masks.

    python train_magnet.py                                        # nano on scenes of the toy world, on a laptop
    python train_magnet.py --dataset coco --match name            # SD3 on ./data/coco
    torchrun --nproc-per-node=2 train_magnet.py --dataset sa1b --captions cogvlm.json
    python train_magnet.py --measure out/magnet-scenes-nano-0/lora.safetensors         # before and after, in numbers

A run writes lora.safetensors, log.json and loss.png to --out. After a kill the same command goes on where it stopped
and ends with the same weights (on a GPU nearly the same: its sums are not always in one order).  The losses and the
meaning of each setting stand in magnet.py.
"""
import argparse
import math
import pickle
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import protocol
import seg4diff
from loading import Seg4Diff, image_seed
from lora import add_lora, read_lora, save_lora
from magnet import NORMALISATIONS, Settings, features, flow_matching, gradient
from support.checkpoint import peak_megabytes, pick_device, pick_dtype
from support.cli import Parser, add_model_options, at_least, command, positive, progress, renamed
from support.data import BROKEN, DATASETS, ROOT, TRAINING_SETS, Dataset, read_ahead, subset
from support.files import write_json, write_tensors
from support.ledger import wait_for_all, world
from support.report import plot_losses

RECIPES = {                                 # what differs between data sets; that of scenes is ours
    "scenes": Settings("nano", "scenes-dev", steps=200, warmup=20, lr=5e-4, batch=16, checkpointing=False,
                       sigma="uniform", mask_weight=0.2),
    "coco": Settings(val="coco-object", steps=3000),
    "sa1b": Settings(maps="heads"),
}
MEANINGS = {"steps": "of the optimiser", "warmup": "steps until the full rate", "lr": "learning rate",
            "batch": "pictures at once and process", "rank": "of the LoRA", "mask_weight": "lambda_mask of Eq. 13",
            "val": "data set measured on the way", "match": "a mask gets the map that fits, or that of its name",
            "maps": "candidates: mean over heads, or each head's", "normalise": "maps, to [0, 1]",
            "sigma": "how noise levels are drawn"}
PICTURES = 10_000                           # of the training: Sec. 4.1
STEP = 16                                   # pictures a step, of all processes: 2 GPUs x 4 x 2, Sec. 4.1
DECAY, CLIP = 1e-4, 0.01                    # weight decay, largest gradient norm: released code

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
        total += loss.item() / len(names)
    return total


def measure(model: Seg4Diff, data: Dataset, names: list[str], seed: int) -> dict[str, float]:
    """What MAGNET should raise, mIoU in percent with names and without, and what it should not spoil, the flow loss."""
    choices = protocol.Protocol(seed)
    named = protocol.measure(model, data, names, "ovss", protocol=choices)[model.name]["mIoU"]
    unnamed = protocol.measure(model, data, names, "unsup", protocol=choices)[model.name]["mIoU"]
    return {"mIoU": named, "unsup mIoU": unnamed, "flow loss": flow_loss(model, data, names, seed)}


def before_and_after(args, base, data, names):
    """A row of numbers without LoRA and with each; mean and spread of the change over several (say, seeds)."""
    for path in args.measure:
        read_lora(path)                                                      # a wrong one is named before the work
    print(f"{data.name}, {len(names)} pictures, seed {args.seed}: mIoU, unsup mIoU, flow loss")
    rows = []
    for path in [None, *args.measure]:
        model = seg4diff.load(base, args.device, args.dtype, lora=path)
        rows.append(list(measure(model, data, names, args.seed).values()))
        print(*(f"{x:9.4f}" for x in rows[-1]), path or base, sep="  ", flush=True)
    change = np.array(rows[1:]) - rows[0]                                    # (LoRAs, 3)
    spread = change.std(0, ddof=1) if len(change) > 1 else np.full(3, np.nan)
    columns = [f"{mean:+9.4f} (sd {sd:.4f})" for mean, sd in zip(change.mean(0), spread, strict=True)]
    print(*columns, "change, mean and spread", sep="  ")


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
            except BROKEN as e:
                if candidate not in reported:
                    reported.add(candidate)
                    tqdm.write(f"picture {candidate} of {data.name} cannot be read, left out: {e}", file=sys.stderr)
        raise ValueError(f"none of the {len(names)} pictures of {data.name} can be read")
    return read


def batches(model, data, names, settings, accumulate, done):
    """What this process learns from after `done` steps: pictures and seeds of their noise, settings.batch at a time.

    The g-th picture of a run and its noise are the same for any number of processes and after any kill.
    """
    rank, processes = world()
    share = settings.batch * accumulate                  # pictures of a process in a step
    size = share * processes
    order = []                                           # the g-th picture's name
    for epoch in range(math.ceil(settings.steps * size / len(names))):
        order += np.random.default_rng([settings.seed, epoch]).permutation(names).tolist()
    mine = [g for g in range(done * size, settings.steps * size) if g // share % processes == rank]
    pairs = read_ahead(readable(data, names), [order[g] for g in mine])
    for i in range(0, len(mine), settings.batch):
        batch = []
        for _, pair in islice(pairs, settings.batch):
            if isinstance(pair, Exception):
                raise pair
            batch.append(features(model, pair, settings.match == "name"))
        yield batch, [image_seed(str(g), settings.seed) for g in mine[i:i + settings.batch]]


# ---------------------------------------------------------------------------- the run


def rate(step, steps, warmup):
    """Share of the full learning rate: a straight line up, then half a cosine down to zero (released code)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def resume(path, identity, params, opt):
    """What a killed run has saved, into params and opt -> steps done and log; 0 and an empty log if there is nothing.

    ValueError: the file is broken, or another run's.
    """
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise EOFError("it holds no state")
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is broken ({e}); remove it, or name another --out") from None
    saved = state.get("run", {})
    other = [f"{key} {saved.get(key)} instead of {value}" for key, value in identity.items() if saved.get(key) != value]
    if other:
        raise ValueError(f"{path.parent} holds a run with {'; '.join(other)}; name another --out, or remove it")
    opt.load_state_dict(state["opt"])
    for p, values in zip(params, state["lora"], strict=True):
        p.data.copy_(values)
    return state["step"], state["log"]


def print_change(log):
    """What was measured before the first step and after the last, a line for each number."""
    measured = [entry["val"] for entry in log if "val" in entry]
    if measured:
        for key, before in measured[0].items():
            print(f"{key:12s} {before:8.4f} -> {measured[-1][key]:8.4f}")


def train(args, settings, model, data, val, out):
    """settings.steps steps of AdamW on a new LoRA; the first process validates and saves."""
    start = time.time()
    rank, processes = world()
    names = subset(data.names, args.limit)
    accumulate = args.accumulate or math.ceil(STEP / (settings.batch * processes))
    size = settings.batch * accumulate * processes       # pictures a step
    identity = settings._asdict() | {                    # what the weights depend on
        "model": [model.name, model.fingerprint, str(model.dtype), model.device.type],
        "data": [data.name, len(names), str(args.captions)], "batch": size, "val": None,
        "checkpointing": None}
    # alpha = rank: released code
    params = add_lora(model.transformer, settings.rank, settings.rank, torch.Generator().manual_seed(settings.seed))
    model.transformer.checkpointing = settings.checkpointing
    opt = torch.optim.AdamW(params, settings.lr, weight_decay=DECAY)
    done, log = resume(out / "state.pt", identity, params, opt)

    def validate(step):
        if val is not None and rank == 0:
            log.append({"step": step, "val": measure(model, val, subset(val.names, args.val_limit), settings.seed)})

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
    stream = batches(model, data, names, settings, accumulate, done)
    steps = range(done + 1, settings.steps + 1)
    bar = progress("MAGNET", "step", settings.steps, done, rank > 0)
    for step in steps:
        opt.param_groups[0]["lr"] = settings.lr * rate(step - 1, settings.steps, settings.warmup)
        opt.zero_grad()
        losses = gradient(model, params, list(islice(stream, accumulate)), settings)
        losses["norm"] = torch.nn.utils.clip_grad_norm_(params, CLIP).item()
        if not all(map(math.isfinite, losses.values())):                     # they must not reach the weights
            kept = f"{out} has the last good state" if (out / "state.pt").exists() else "nothing was saved yet"
            raise ValueError(f"not finite at step {step}: {losses}; {kept}; a smaller --lr may help")
        opt.step()
        log.append({"step": step, "lr": opt.param_groups[0]["lr"], **losses})
        bar.set_postfix({key: f"{losses[key]:.4f}" for key in ("flow", "focal", "dice")}, refresh=False)
        bar.update()
        if step % args.val_every == 0 or step == settings.steps:
            validate(step)
        if step % args.save_every == 0 or step == settings.steps:
            save(step)
    bar.close()
    if rank == 0:
        print_change(log)
        print(f"{len(steps)} steps of {size} pictures, {time.time() - start:.0f} s, "
              f"{peak_megabytes(model.device) / 1000:.1f} GB; wrote {out}/lora.safetensors, log.json and loss.png")


def main(args):
    given = {key: value for key, value in vars(args).items() if key in Settings._fields and value is not None}
    settings = RECIPES[args.dataset]._replace(**given)
    if settings.match == "name" and (args.dataset == "sa1b" or settings.maps == "heads" or args.captions):
        raise ValueError("--match name prompts with the masks' names and gives each mask the map of its name, mean "
                         "over heads; sa1b's masks have no names, and neither --maps heads nor --captions has a use")
    if args.measure and settings.val == "none":
        raise ValueError("--measure needs pictures with label maps: choose them with --val")
    val = None if settings.val == "none" else DATASETS[settings.val](args.data_root)
    if args.measure:
        before_and_after(args, settings.model, val, subset(val.names, args.val_limit))
        return
    if pick_dtype(args.dtype, pick_device(args.device)) == torch.float16:
        raise ValueError("training in float16 loses small gradients, and they are not scaled here; use --dtype float32 "
                         "(auto is float16 on a GPU before compute capability 8.0)")
    data = TRAINING_SETS[args.dataset](args.data_root, args.captions)
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
    numbers = {"steps": at_least(1), "warmup": at_least(0), "lr": positive, "batch": at_least(1),
               "rank": at_least(1), "mask_weight": at_least(0, float), "match": renamed("'name'", "tokens")}
    choices = {"val": ["none", *DATASETS], "match": ["hungarian", "name"], "maps": ["mean", "heads"],
               "normalise": NORMALISATIONS, "sigma": ["uniform", "logit-normal"]}
    for key, meaning in MEANINGS.items():
        values = ", ".join(f"{data}: {getattr(recipe, key)}" for data, recipe in RECIPES.items())
        parser.add_argument("--" + key.replace("_", "-"), type=numbers.get(key), choices=choices.get(key),
                            help=f"{meaning} ({values})")
    parser.add_argument("--candidates", type=renamed("--maps mean or --maps heads"), help=argparse.SUPPRESS)
    parser.add_argument("--accumulate", type=at_least(1), help=f"batches a step (default: {STEP} pictures or more)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction,
                        help="less memory: activations are computed twice (the default but for scenes)")
    parser.add_argument("--val-limit", type=at_least(1), default=100, help="pictures of --val that are measured")
    parser.add_argument("--val-every", type=at_least(1), default=100, help="steps between measurements")
    parser.add_argument("--save-every", type=at_least(1), default=25, help="steps between saved states")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="LORA", help="no training: numbers without and with")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/magnet-DATASET-MODEL-SEED)")
    command(main, parser)

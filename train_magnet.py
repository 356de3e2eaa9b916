"""MAGNET (Sec. 3.5): a LoRA that aligns the image-to-text maps of the expert block with masks.

    python train_magnet.py                                        # nano on scenes of the toy world, on a laptop
    python train_magnet.py --dataset coco --match tokens          # SD3 on ./data/coco
    torchrun --nproc-per-node=2 train_magnet.py --dataset sa1b --captions cogvlm.json
    python train_magnet.py --measure out/magnet-scenes-nano-0/lora.safetensors         # before and after, in numbers

A run writes lora.safetensors, log.json and loss.png to --out; killed, the same command goes on where it stopped and
ends with the same weights (on a GPU nearly the same: its sums are not always in one order).  magnet.py has the losses.
"""
import argparse
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
import seg4diff
from lora import add_lora, read_lora, save_lora
from magnet import (
    CLIP,
    DECAY,
    LORA_ALPHA,
    MASK_WEIGHT,
    NORMALISATIONS,
    PICTURES,
    RANK,
    Features,
    How,
    features,
    gradient,
)
from seg4diff import Seg4Diff
from support import weights
from support.cli import command
from support.data import BROKEN, DATASETS, ROOT, TRAINING_SETS, Dataset, Pair, TrainingSet, read_ahead, subset
from support.ledger import world, write_json, write_tensors
from support.report import peak_megabytes, plot_losses

# ---------------------------------------------------------------------------- what differs between data sets


class Recipe(NamedTuple):
    """What differs between data sets; each has an option of the same name."""
    model: str
    val: str                                # data set of evaluate.py that progress is measured on, or "none"
    steps: int
    warmup: int
    lr: float
    batch: int                              # pictures at once and process
    effective: int                          # pictures a step, of all processes: what is missing is accumulated
    candidates: str                         # "tokens": mean over heads, or "heads": each head's own (Sec. 4.1)
    sigma: str                              # noise levels: "uniform" (Eq. 2), or "logit-normal"
    mask_weight: float                      # lambda_mask of Eq. 13


RECIPES = {"scenes": Recipe("nano", "scenes-dev", 200, 20, 5e-4, 16, 16, "tokens", "uniform", 0.2),       # ours
           "coco": Recipe("sd3", "coco-object", 3000, 500, 1e-5, 4, 16, "tokens", "logit-normal", MASK_WEIGHT),
           "sa1b": Recipe("sd3", "none", 1000, 500, 1e-5, 4, 16, "heads", "logit-normal", MASK_WEIGHT)}
# of the last two: rate, batch and candidates are Sec. 4.1's, the rest is the released code's

# ---------------------------------------------------------------------------- pictures, read once


def readable(data: TrainingSet, names: Sequence[str]) -> Callable[[str], Pair]:
    """A reader that puts the next picture of `names` in the place of one that cannot be read, and says so once.

    ValueError: none of them can be read.
    """
    place, told = {name: i for i, name in enumerate(names)}, set()

    def read(name: str) -> Pair:
        for other in (*names[place[name]:], *names[:place[name]]):
            try:
                return data.read(other)
            except BROKEN as e:
                if other not in told:
                    told.add(other)
                    tqdm.write(f"picture {other} of {data.name} cannot be read and is left out: {e}", file=sys.stderr)
        raise ValueError(f"none of the {len(names)} pictures of {data.name} can be read")
    return read


def featured(model: Seg4Diff, read: Callable[[str], Pair], names: Sequence[str], by_name: bool, room: float
             ) -> Iterator[Features]:
    """Features of the pictures in order, read ahead; kept in memory until `room` bytes are full."""
    kept, used = {}, 0
    for name, pair in read_ahead(lambda name: None if name in kept else read(name), names):
        if isinstance(pair, Exception):
            raise pair
        now = kept[name] if name in kept else features(model, pair, by_name)
        if name not in kept and used < room:
            kept[name] = now
            used += sum(x.numel() * x.element_size() for x in now if isinstance(x, Tensor))
        yield now


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the full learning rate: a straight line up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------- before and after


def miou(model: Seg4Diff, data: Dataset, names: Sequence[str], task: str, seed: int) -> float:
    """What evaluate.py's table says for a task (ovss, unsup) on these pictures."""
    rows = evaluate.compare(model, data, list(names), evaluate.TASKS[task](model), evaluate.Protocol(seed))
    return rows[model.name]["mIoU"]


@torch.inference_mode()
def flow_loss(model: Seg4Diff, data: Dataset, names: Sequence[str], seed: int, levels: int = 4) -> float:
    """Eq. 2 at fixed noise and noise levels (1/8, 3/8, ...), prompted with the class names; mean over the pictures."""
    sigma, total = ((torch.arange(levels) + 0.5) / levels).to(model.device), 0.0
    for name in names:
        item = data.read(name)
        z0 = seg4diff.encode_image(model, item.image).float()                # (1, C, ., .)
        eps = seg4diff.noise(z0.shape[1:], [evaluate.image_seed(name, seed + i) for i in range(levels)]).to(z0.device)
        cond = model.text.encode([seg4diff.names_of(model.text, item.labels, data.classes)] * levels)
        z = seg4diff.add_noise(z0, eps, sigma[:, None, None, None])          # (levels, C, ., .)
        vel, _ = model.transformer(z.to(model.dtype), sigma, cond.ctx, cond.pooled)
        total += F.mse_loss(vel.float(), eps - z0).item() / len(names)
    return total


def measure(model: Seg4Diff, data: Dataset, names: Sequence[str], seed: int) -> dict[str, float]:
    """What MAGNET should raise, and what it should not spoil."""
    return {"mIoU": miou(model, data, names, "ovss", seed), "unsup mIoU": miou(model, data, names, "unsup", seed),
            "flow loss": flow_loss(model, data, names, seed)}


def compare(args: argparse.Namespace, data: Dataset, names: Sequence[str]) -> None:
    """A row of numbers without LoRA and with each; mean and spread of the change over several (say, seeds)."""
    for path in args.measure:
        read_lora(path)                                              # a wrong one is told of before the work
    rows = [measure(seg4diff.load(args.model, args.device, lora=lora), data, names, args.seed)
            for lora in tqdm([None, *args.measure], desc="measuring", unit="model")]
    print(f"{data.name}, {len(names)} pictures, seed {args.seed}: " + ", ".join(rows[0]))
    for name, row in zip([args.model, *args.measure], rows):
        print(f"{'  '.join(f'{x:9.4f}' for x in row.values())}  {name}")
    change = np.array([list(row.values()) for row in rows[1:]]) - list(rows[0].values())         # (LoRAs, numbers)
    spread = change.std(0, ddof=1) if len(change) > 1 else np.full(change.shape[1], np.nan)
    print("  ".join(f"{m:+9.4f} (sd {s:.4f})" for m, s in zip(change.mean(0), spread)) + "  change, mean and spread")


# ---------------------------------------------------------------------------- the run


def train(args: argparse.Namespace, model: Seg4Diff, data: TrainingSet, val: Dataset | None, out: Path) -> None:
    (rank, processes), start = world(), time.time()
    names, size = subset(data.names, args.limit), args.batch * args.accumulate * processes
    how = How(model.preset.block, args.candidates, args.match == "tokens", args.normalise, args.sigma, args.mask_weight)
    params = add_lora(model.transformer, args.rank, args.rank * LORA_ALPHA / RANK, torch.Generator().manual_seed(args.seed))
    model.transformer.checkpointing = args.checkpointing
    opt = torch.optim.AdamW(params, args.lr, weight_decay=DECAY)
    this = {"model": [model.name, model.fingerprint, str(model.dtype), model.device.type], "how": list(how),
            "data": [data.name, len(names)], "size": size,
            "captions": str(args.captions), **{k: getattr(args, k) for k in ("steps", "warmup", "lr", "rank", "seed")}}
    done, log = 0, []
    if (out / "state.pt").exists():
        try:
            state = torch.load(out / "state.pt", map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise ValueError(f"{out}/state.pt is broken ({e}); remove it, or name another --out") from None
        if other := [f"{k} {state['run'].get(k)} instead of {this[k]}" for k in this if state["run"].get(k) != this[k]]:
            raise ValueError(f"{out} holds a run with {'; '.join(other)}; name another --out, or remove it")
        done, log = state["step"], state["log"]
        opt.load_state_dict(state["opt"])
        with torch.no_grad():
            for p, saved in zip(params, state["lora"]):
                p.copy_(saved)

    def validate(step: int) -> None:
        if val is not None and rank == 0:
            log.append({"step": step, "val": measure(model, val, subset(val.names, args.val_limit), args.seed)})

    def keep(step: int) -> None:
        if rank == 0:
            save_lora(model.transformer, out / "lora.safetensors")
            write_json(out / "log.json", log)
            plot_losses(log, out / "loss.png")
            lora = [p.detach() for p in params]
            write_tensors(out / "state.pt", dict(step=step, log=log, run=this, opt=opt.state_dict(), lora=lora))

    # the g-th sample of the whole run, its picture and its noise, is the same for any number of processes and kills
    epochs = range(-(-args.steps * size // len(names)))
    order = np.concatenate([np.random.default_rng([args.seed, e]).permutation(len(names)) for e in epochs])
    own = args.batch * args.accumulate
    mine = [s * size + rank * own + j for s in range(done, args.steps) for j in range(own)]
    stream = featured(model, readable(data, names), [names[order[g]] for g in mine], how.by_name, args.cache * 1e9)
    seeds = iter([evaluate.image_seed(str(g), args.seed) for g in mine])
    if not log:
        validate(0)
    with tqdm(total=args.steps, initial=done, desc="MAGNET", unit="step", disable=rank > 0) as bar:
        for step in range(done, args.steps):
            opt.param_groups[0]["lr"] = args.lr * rate(step, args.steps, args.warmup)
            opt.zero_grad()
            batches = [([next(stream) for _ in range(args.batch)], [next(seeds) for _ in range(args.batch)])
                       for _ in range(args.accumulate)]
            losses = gradient(model, params, batches, how)
            losses["norm"] = torch.nn.utils.clip_grad_norm_(params, CLIP).item()
            if not all(map(math.isfinite, losses.values())):
                kept = f"what was good is in {out}" if (out / "state.pt").exists() else "nothing was saved yet"
                raise ValueError(f"step {step + 1} gave {', '.join(f'{k} {x:g}' for k, x in losses.items())}, not finite "
                                 f"numbers, and the run ends; {kept}; a smaller --lr may help")
            opt.step()
            log.append({"step": step + 1, "lr": opt.param_groups[0]["lr"], **losses})
            bar.update()
            bar.set_postfix({k: f"{losses[k]:.4f}" for k in ("flow", "focal", "dice")})
            if (step + 1) % args.val_every == 0 or step + 1 == args.steps:
                validate(step + 1)
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                keep(step + 1)
    if rank == 0:
        gigabytes, seconds = peak_megabytes(model.device) / 1000, time.time() - start
        measured = [x["val"] for x in log if "val" in x]
        for key in measured[0] if measured else ():
            print(f"{key:12s} {measured[0][key]:8.4f} -> {measured[-1][key]:8.4f}")
        print(f"{args.steps - done} steps of {size} pictures, {seconds:.0f} s, {gigabytes:.1f} GB; wrote {out}/"
              "lora.safetensors, log.json and loss.png")


def check(args: argparse.Namespace) -> None:
    """ValueError: arguments that cannot be, one sentence each."""
    for what, value, valid in (("training set", args.dataset, RECIPES), ("match", args.match, ("hungarian", "tokens")),
                               ("kind of candidates", args.candidates or "tokens", ("tokens", "heads")),
                               ("normalisation", args.normalise, NORMALISATIONS),
                               ("noise level", args.sigma or "uniform", ("uniform", "logit-normal")),
                               ("validation set", args.val or "none", ("none", *DATASETS))):
        if value not in valid:
            raise ValueError(f"there is no {what} {value!r}; choose one of {', '.join(valid)}")
    for key, value in vars(args).items():
        least = {"warmup": 0, "mask_weight": 0, "cache": 0, "seed": 0}.get(key, 1)
        if key == "lr" and value is not None and not 0 < value < math.inf:
            raise ValueError(f"--lr must be positive and finite, not {value}")
        if key != "lr" and type(value) in (int, float) and not least <= value < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be finite and at least {least}, not {value}")
    if args.match == "tokens" and (args.dataset == "sa1b" or args.candidates == "heads"):
        raise ValueError("--match tokens reads each mask off the tokens of its name, mean over heads; sa1b's masks have no "
                         "names, and --candidates heads has nothing to choose")
    if args.captions and args.match == "tokens":
        raise ValueError("--match tokens prompts with the masks' names, so --captions would not be read")


def main(args: argparse.Namespace) -> None:
    check(args)
    processes, recipe = world()[1], RECIPES[args.dataset]
    for key in ("model", "val", "steps", "warmup", "lr", "batch", "candidates", "sigma", "mask_weight"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(recipe, key))
    if args.accumulate is None:
        args.accumulate = -(-recipe.effective // (args.batch * processes))   # so many or more
    val = DATASETS[args.val](args.data_root) if args.val != "none" else None
    if args.measure:
        if val is None:
            raise ValueError("--measure needs pictures with label maps: choose them with --val")
        return compare(args, val, subset(val.names, args.val_limit))
    data = TRAINING_SETS[args.dataset](args.data_root, args.captions)
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if processes > 1:                                    # torchrun: a GPU for each process
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
    model = seg4diff.load(args.model, args.device)       # it says so if there is no such GPU
    if processes > 1:
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))       # rank 0 validates alone
    out = args.out or Path("out") / f"magnet-{args.dataset}-{model.name}-{args.seed}"
    out.mkdir(parents=True, exist_ok=True)
    train(args, model, data, val, out)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="scenes", help=", ".join(RECIPES) + "; what is not given follows from it")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--captions", type=Path, help="JSON {image id: caption} for coco or sa1b")
    parser.add_argument("--limit", type=int, default=PICTURES, help="training pictures, always the same ones")
    parser.add_argument("--model", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder (nano; else sd3)")
    parser.add_argument("--match", default="hungarian", help="hungarian (the paper), tokens (released code, COCO)")
    parser.add_argument("--candidates", help="maps that are matched: tokens (mean over heads), heads (default of sa1b)")
    parser.add_argument("--normalise", default="minmax", help=", ".join(NORMALISATIONS))
    parser.add_argument("--sigma", help="noise level: uniform (Eq. 2; default of scenes), logit-normal (released code)")
    parser.add_argument("--mask-weight", type=float, help="lambda_mask of Eq. 13 (0.2; 1 as in the released code)")
    parser.add_argument("--rank", type=int, default=RANK, help="of the LoRA")
    parser.add_argument("--steps", type=int, help="of the optimiser (200; coco 3000, sa1b 1000)")
    parser.add_argument("--warmup", type=int, help="steps until the full rate (20; 500)")
    parser.add_argument("--lr", type=float, help="learning rate (5e-4; 1e-5)")
    parser.add_argument("--batch", type=int, help="pictures at once and process (16; 4)")
    parser.add_argument("--accumulate", type=int, help="batches a step (default: 16 pictures of all processes, or more)")
    parser.add_argument("--checkpointing", action="store_true", help="less memory: activations are computed twice")
    parser.add_argument("--cache", type=float, default=8, help="GB of memory for latents and text features")
    parser.add_argument("--val", help="data set of evaluate.py measured before, during and after (scenes-dev; coco: "
                        "coco-object; sa1b: none)")
    parser.add_argument("--val-limit", type=int, default=100, help="its pictures")
    parser.add_argument("--val-every", type=int, default=100, help="steps between measurements")
    parser.add_argument("--save-every", type=int, default=25, help="steps between saved states")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="LORA", help="no training: numbers without and with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/magnet-DATASET-MODEL-SEED)")
    command(main, parser)

"""MAGNET (Sec. 3.5): a LoRA that aligns the image-to-text maps of the expert block with masks.

    python train_magnet.py                                        # nano on scenes of the toy world, on a laptop
    python train_magnet.py --dataset coco --match name            # SD3 on ./data/coco
    torchrun --nproc-per-node=2 train_magnet.py --dataset sa1b --captions cogvlm.json
    python train_magnet.py --measure out/magnet-scenes-nano-0/lora.safetensors         # before and after, in numbers

A run writes lora.safetensors, log.json and loss.png to --out. After a kill the same command goes on where it stopped
and ends with the same weights (on a GPU nearly the same: its sums are not always in one order).  The losses stand in
magnet.py.
"""
import argparse
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import evaluate
import seg4diff
from loading import Seg4Diff
from lora import add_lora, read_lora, save_lora
from magnet import NORMALISATIONS, Features, Settings, features, flow_matching, gradient
from support.cli import Parser, add_model_options, at_least, command, renamed
from support.data import BROKEN, DATASETS, ROOT, TRAINING_SETS, Dataset, Pair, TrainingSet, read_ahead, subset
from support.ledger import world, write_json, write_tensors
from support.report import peak_megabytes, plot_losses

RECIPES = {                                 # what differs between data sets; that of scenes is ours
    "scenes": Settings("nano", "scenes-dev", steps=200, warmup=20, lr=5e-4, batch=16, sigma="uniform", mask_weight=0.2),
    "coco": Settings(val="coco-object", steps=3000),
    "sa1b": Settings(maps="heads"),
}
PICTURES = 10_000                           # of the training: Sec. 4.1
STEP = 16                                   # pictures a step, of all processes: 2 GPUs x 4 x 2, Sec. 4.1
DECAY, CLIP = 1e-4, 0.01                    # weight decay, largest gradient norm: released code

# ---------------------------------------------------------------------------- before and after


@torch.inference_mode()
def flow_loss(model: Seg4Diff, data: Dataset, names: Sequence[str], seed: int) -> float:
    """Eq. 2 at fixed noise and noise levels (1/8, 3/8, ...), prompted with the class names; mean over the pictures."""
    sigma = torch.tensor([0.125, 0.375, 0.625, 0.875], device=model.device)
    total = 0.0
    for name in names:
        item = data.read(name)
        z0 = seg4diff.encode_image(model, item.image).float()                # (1, C, ., .)
        seeds = [seg4diff.image_seed(name, seed + i) for i in range(len(sigma))]
        eps = seg4diff.noise(z0.shape[1:], seeds).to(model.device)           # (4, C, ., .)
        prompt = seg4diff.names_of(model.text, item.labels, data.classes)
        cond = model.text.encode([prompt] * len(sigma))
        loss, _ = flow_matching(model, z0, eps, sigma, cond.ctx, cond.pooled)
        total += loss.item() / len(names)
    return total


def measure(model: Seg4Diff, data: Dataset, names: list[str], seed: int) -> dict[str, float]:
    """What MAGNET should raise, mIoU in percent with names and without, and what it should not spoil, the flow loss."""
    numbers = {}
    for key, task in (("mIoU", "ovss"), ("unsup mIoU", "unsup")):
        rows = evaluate.measure(model, data, names, task, protocol=evaluate.Protocol(seed))
        numbers[key] = rows[model.name]["mIoU"]
    return numbers | {"flow loss": flow_loss(model, data, names, seed)}


def before_and_after(args: argparse.Namespace, base: str, data: Dataset, names: list[str]) -> None:
    """A row of numbers without LoRA and with each; mean and spread of the change over several (say, seeds)."""
    for path in args.measure:
        read_lora(path)                                                      # a wrong one is named before the work
    rows = []
    for path in tqdm([None, *args.measure], desc="measuring", unit="model"):
        model = seg4diff.load(base, args.device, args.dtype, lora=path)
        rows.append(measure(model, data, names, args.seed))
    print(f"{data.name}, {len(names)} pictures, seed {args.seed}: {', '.join(rows[0])}")
    values = np.array([list(row.values()) for row in rows])                  # (1 + LoRAs, 3)
    for row, name in zip(values, [base, *args.measure], strict=True):
        print("  ".join(f"{x:9.4f}" for x in row), name, sep="  ")
    change = values[1:] - values[0]                                          # (LoRAs, 3)
    spread = change.std(0, ddof=1) if len(change) > 1 else np.full(3, np.nan)
    columns = [f"{mean:+9.4f} (sd {sd:.4f})" for mean, sd in zip(change.mean(0), spread, strict=True)]
    print(*columns, "change, mean and spread", sep="  ")


# ---------------------------------------------------------------------------- what a step learns from


def readable(data: TrainingSet, names: Sequence[str]) -> Callable[[str], Pair]:
    """A reader that puts the next picture of `names` in the place of one that cannot be read, and says so once.

    ValueError: none of them can be read.
    """
    reported = set()

    def read(name: str) -> Pair:
        start = names.index(name)
        for candidate in (*names[start:], *names[:start]):
            try:
                return data.read(candidate)
            except BROKEN as e:
                if candidate not in reported:
                    reported.add(candidate)
                    tqdm.write(f"picture {candidate} of {data.name} cannot be read and is left out: {e}", file=sys.stderr)
        raise ValueError(f"none of the {len(names)} pictures of {data.name} can be read")
    return read


def batches(model: Seg4Diff, data: TrainingSet, names: list[str], settings: Settings, accumulate: int, done: int
            ) -> Iterator[tuple[list[Features], list[int]]]:
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
    batch = []
    seeds = []
    for g, (_, pair) in zip(mine, pairs, strict=True):
        if isinstance(pair, Exception):
            raise pair
        batch.append(features(model, pair, settings.match == "name"))
        seeds.append(seg4diff.image_seed(str(g), settings.seed))
        if len(batch) == settings.batch:
            yield batch, seeds
            batch = []
            seeds = []


# ---------------------------------------------------------------------------- the run


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the full learning rate: a straight line up, then half a cosine down to zero (released code)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def resume(path: Path, identity: dict, params: Sequence[nn.Parameter], opt: torch.optim.Optimizer
           ) -> tuple[int, list[dict]]:
    """What a killed run has saved, into params and opt -> steps done and log; 0 and an empty log if there is nothing.

    ValueError: the file is broken, or another run's.
    """
    if not path.exists():
        return 0, []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} is broken ({e}); remove it, or name another --out") from None
    saved = state["run"]
    other = [f"{key} {saved.get(key)} instead of {value}" for key, value in identity.items() if saved.get(key) != value]
    if other:
        raise ValueError(f"{path.parent} holds a run with {'; '.join(other)}; name another --out, or remove it")
    opt.load_state_dict(state["opt"])
    with torch.no_grad():
        for p, values in zip(params, state["lora"], strict=True):
            p.copy_(values)
    return state["step"], state["log"]


def check_finite(losses: dict[str, float], step: int, out: Path) -> None:
    """ValueError: a loss or the gradient is not finite, and must not reach the weights."""
    if not all(map(math.isfinite, losses.values())):
        values = ", ".join(f"{key} {value:g}" for key, value in losses.items())
        kept = f"what was good is in {out}" if (out / "state.pt").exists() else "nothing was saved yet"
        raise ValueError(f"step {step} gave {values}, not finite numbers, and the run ends; {kept}; a smaller --lr may help")


def train(args: argparse.Namespace, settings: Settings, model: Seg4Diff, data: TrainingSet, val: Dataset | None, out: Path
          ) -> None:
    """A LoRA by settings.steps steps of AdamW; validation and saving are the first process's work."""
    start = time.time()
    rank, processes = world()
    names = subset(data.names, args.limit)
    accumulate = args.accumulate or math.ceil(STEP / (settings.batch * processes))
    size = settings.batch * accumulate * processes
    identity = settings._asdict() | {
        "model": [model.name, model.fingerprint, str(model.dtype), model.device.type],
        "data": [data.name, len(names), str(args.captions)], "batch": size, "val": None}
    generator = torch.Generator().manual_seed(settings.seed)
    params = add_lora(model.transformer, settings.rank, settings.rank, generator)      # alpha = rank: released code
    model.transformer.checkpointing = args.checkpointing
    opt = torch.optim.AdamW(params, settings.lr, weight_decay=DECAY)
    done, log = resume(out / "state.pt", identity, params, opt)

    def validate(step: int) -> None:
        if val is not None and rank == 0:
            log.append({"step": step, "val": measure(model, val, subset(val.names, args.val_limit), settings.seed)})

    def save(step: int) -> None:
        if rank == 0:
            save_lora(model.transformer, out / "lora.safetensors")
            write_json(out / "log.json", log)
            plot_losses(log, out / "loss.png")
            lora = [p.detach() for p in params]
            write_tensors(out / "state.pt", dict(step=step, log=log, run=identity, opt=opt.state_dict(), lora=lora))

    if not log:
        validate(0)
    stream = batches(model, data, names, settings, accumulate, done)
    bar = tqdm(range(done, settings.steps), "MAGNET", settings.steps, initial=done, unit="step", disable=rank > 0)
    for step in bar:
        opt.param_groups[0]["lr"] = settings.lr * rate(step, settings.steps, settings.warmup)
        opt.zero_grad()
        losses = gradient(model, params, list(islice(stream, accumulate)), settings)
        losses["norm"] = nn.utils.clip_grad_norm_(params, CLIP).item()
        check_finite(losses, step + 1, out)
        opt.step()
        log.append({"step": step + 1, "lr": opt.param_groups[0]["lr"], **losses})
        bar.set_postfix({key: f"{losses[key]:.4f}" for key in ("flow", "focal", "dice")})
        last = step + 1 == settings.steps
        if last or (step + 1) % args.val_every == 0:
            validate(step + 1)
        if last or (step + 1) % args.save_every == 0:
            save(step + 1)
    if rank == 0:
        print_change(log)
        print(f"{settings.steps - done} steps of {size} pictures, {time.time() - start:.0f} s, "
              f"{peak_megabytes(model.device) / 1000:.1f} GB; wrote {out}/lora.safetensors, log.json and loss.png")


def print_change(log: list[dict]) -> None:
    """What was measured before the first step and after the last, a line for each number."""
    measured = [entry["val"] for entry in log if "val" in entry]
    if measured:
        for key, before in measured[0].items():
            print(f"{key:12s} {before:8.4f} -> {measured[-1][key]:8.4f}")


def check(args: argparse.Namespace, settings: Settings) -> None:
    """ValueError: options that do not go together, one sentence each."""
    if settings.match == "name" and (args.dataset == "sa1b" or settings.maps == "heads"):
        raise ValueError("--match name gives each mask the map of its name, mean over heads; sa1b's masks have no names, "
                         "and --maps heads has nothing to choose")
    if settings.match == "name" and args.captions:
        raise ValueError("--match name prompts with the masks' names, so --captions would not be read")
    if args.measure and settings.val == "none":
        raise ValueError("--measure needs pictures with label maps: choose them with --val")


def main(args: argparse.Namespace) -> None:
    given = {key: value for key, value in vars(args).items() if key in Settings._fields and value is not None}
    settings = RECIPES[args.dataset]._replace(**given)
    check(args, settings)
    val = None if settings.val == "none" else DATASETS[settings.val](args.data_root)
    if args.measure:
        before_and_after(args, settings.model, val, subset(val.names, args.val_limit))
        return
    data = TRAINING_SETS[args.dataset](args.data_root, args.captions)
    processes = world()[1]
    device = args.device
    if device != "cpu" and torch.cuda.is_available() and processes > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"                          # torchrun: a GPU for each process
    model = seg4diff.load(settings.model, device, args.dtype)
    if processes > 1:
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)
        backend = "nccl" if model.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))          # as long as the first process may validate
    out = args.out or Path("out") / f"magnet-{args.dataset}-{model.name}-{settings.seed}"
    out.mkdir(parents=True, exist_ok=True)
    train(args, settings, model, data, val, out)
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", default="scenes", choices=RECIPES, help="what is not given follows from it")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--captions", type=Path, help="JSON {image id: caption} for coco or sa1b")
    parser.add_argument("--limit", type=at_least(1), default=PICTURES, help="training pictures, always the same ones")
    add_model_options(parser, default=None, lora=False)
    parser.add_argument("--match", choices=["hungarian", "name"], help="the paper; the released code on COCO")
    parser.add_argument("--candidates", type=renamed("--maps mean or --maps heads"), help=argparse.SUPPRESS)
    parser.add_argument("--maps", choices=["mean", "heads"], help="what is matched: means over heads (default; sa1b: heads)")
    parser.add_argument("--normalise", choices=NORMALISATIONS, help="what scales the maps to [0, 1]")
    parser.add_argument("--sigma", choices=["uniform", "logit-normal"], help="noise levels: Eq. 2 (default of scenes); "
                        "released code")
    parser.add_argument("--mask-weight", type=at_least(0, float), help="lambda_mask of Eq. 13 (0.2; coco, sa1b: 1)")
    parser.add_argument("--rank", type=at_least(1), help="of the LoRA (16)")
    parser.add_argument("--steps", type=at_least(1), help="of the optimiser (200; coco 3000, sa1b 1000)")
    parser.add_argument("--warmup", type=at_least(0), help="steps until the full rate (20; 500)")
    parser.add_argument("--lr", type=at_least(1e-12, float), help="learning rate (5e-4; 1e-5)")
    parser.add_argument("--batch", type=at_least(1), help="pictures at once and process (16; 4)")
    parser.add_argument("--accumulate", type=at_least(1), help="batches a step and process (so many that a step has at "
                        f"least {STEP} pictures)")
    parser.add_argument("--checkpointing", action="store_true", help="less memory: activations are computed twice")
    parser.add_argument("--val", choices=["none", *DATASETS], help="data set of evaluate.py measured before, during and "
                        "after (scenes-dev; coco: coco-object; sa1b: none)")
    parser.add_argument("--val-limit", type=at_least(1), default=100, help="its pictures")
    parser.add_argument("--val-every", type=at_least(1), default=100, help="steps between measurements")
    parser.add_argument("--save-every", type=at_least(1), default=25, help="steps between saved states")
    parser.add_argument("--measure", type=Path, nargs="+", metavar="LORA", help="no training: numbers without and with")
    parser.add_argument("--out", type=Path, help="folder of the run (default: out/magnet-DATASET-MODEL-SEED)")
    command(main, parser)

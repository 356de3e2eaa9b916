"""MAGNET (Sec. 3.5): a LoRA that aligns the image-to-text maps of the expert block with masks.

    python train_magnet.py                                        # nano on scenes of the toy world, on a laptop
    python train_magnet.py --dataset coco --match tokens          # SD3 on ./data/coco
    torchrun --nproc-per-node=2 train_magnet.py --dataset sa1b --captions cogvlm.json
    python train_magnet.py --measure out/magnet-scenes-nano-0/lora.safetensors         # before and after, in numbers

A run writes lora.safetensors, log.json and loss.png to --out; killed, the same command goes on where it stopped and
ends with the same weights.  Where the paper is silent, this is what is done:

* "Normalised" maps (Eq. 12): each is scaled from its least to its largest value, which makes it a probability at
  every patch. Under this scaling every mask can be matched with no loss; a map brought to zero mean and unit variance
  before a sigmoid ("zscore") cannot get below 0.4 outside a small mask. NOTE(official): the released code sends scores
  before the softmax through a small network that is trained along and then thrown away; here the maps that
  segmentation reads are the ones that are trained.
* Candidates are the maps of all CLIP columns, <start>, <end> and <pad> too, as the proposals of Sec. 4.2 are; T5's
  empty rows are none. Matched is by the loss that is then minimised, with its own weights.
* A mask holds a patch if it covers half of it; masks that hold no patch are left out. Losses are means over patches,
  a picture's masks and pictures, so that a crowded picture counts as much as one with a single mask.
* Both losses see the same noisy latent, whatever its noise level; the LoRA is not dropped out.
"""
import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
import seg4diff
import weights
from data import BROKEN, DATASETS, ROOT, TRAINING_SETS, Dataset, Pair, TrainingSet, read_ahead, subset
from ledger import write_json
from mmdit import add_lora, i2t_attention, save_lora
from report import peak_megabytes, plot_losses
from seg4diff import Seg4Diff

# ---------------------------------------------------------------------------- every constant, and where it is from

FOCAL_WEIGHT, DICE_WEIGHT = 0.1, 0.2        # lambda_focal, lambda_dice of Eq. 12: released code
MASK_WEIGHT = 1.0                           # lambda_mask of Eq. 13: released code
ALPHA, GAMMA = 0.25, 2.0                    # focal loss: released code
SIGMA_STD = 0.5                             # of the logit-normal noise levels: released code
RANK, LORA_ALPHA = 16, 16.0                 # Sec. 4.1; alpha: released code
DECAY, CLIP = 1e-4, 0.01                    # weight decay, largest gradient norm: released code
MAX_MASKS, PICTURES = 32, 10_000            # of a picture: released code; of the training: Sec. 4.1


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


RECIPES = {"scenes": Recipe("nano", "scenes-dev", 300, 30, 5e-4, 16, 16, "tokens"),        # ours
           "coco": Recipe("sd3", "coco-object", 3000, 500, 1e-5, 4, 16, "tokens"),         # lr, batch, candidates: Sec. 4.1;
           "sa1b": Recipe("sd3", "none", 1000, 500, 1e-5, 4, 16, "heads")}                 # the rest: released code

# ---------------------------------------------------------------------------- losses, Eq. 2, 12, 13


def minmax(maps: Tensor) -> Tensor:
    """Each map (..., N) from its least to its largest value: (..., N) in [0, 1]."""
    lo, hi = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    return (maps - lo) / (hi - lo).clamp_min(1e-12)


def zscore(maps: Tensor) -> Tensor:
    """Sigmoid of each map (..., N) at zero mean and unit variance: (..., N) in [0, 1]."""
    return torch.sigmoid((maps - maps.mean(-1, keepdim=True)) / maps.std(-1, keepdim=True).clamp_min(1e-12))


NORMALISATIONS = {"minmax": minmax, "zscore": zscore}


def pair_losses(p: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Focal and Dice loss of every candidate with every mask, 2 x (C, K); p (C, N) in [0, 1], masks (K, N) of 0, 1.

    NOTE(official): the released focal term takes raw logits for probabilities; here both terms see the same p.
    """
    q, N = p.clamp(1e-4, 1 - 1e-4), p.shape[1]
    hit, miss = -ALPHA * (1 - q) ** GAMMA * q.log(), -(1 - ALPHA) * q ** GAMMA * (1 - q).log()   # 2 x (C, N)
    focal = (hit @ masks.mT + miss @ (1 - masks).mT) / N                     # (C, K), mean over patches
    dice = 1 - (2 * p @ masks.mT + 1) / (p.sum(1)[:, None] + masks.sum(1) + 1)                   # (C, K)
    return focal, dice


def match(p: Tensor, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and masks one to one so that Eq. 12 is smallest (Hungarian): indices into p and masks.

    NOTE(official): the released code weighs 0.02 focal + 1 Dice here; the paper matches by the mask loss itself.
    """
    with torch.no_grad():
        focal, dice = pair_losses(p, masks)
        cost = (FOCAL_WEIGHT * focal + DICE_WEIGHT * dice).nan_to_num()      # nan is told of by the loss, not by scipy
        return linear_sum_assignment(cost.cpu().numpy())


def mask_losses(p: Tensor, masks: Tensor, hungarian: bool) -> tuple[Tensor, Tensor]:
    """Means of both losses over pairs: matched ones of p (C, N) and masks (K, N), or the i-th map with the i-th mask."""
    if len(masks) == 0:
        return p.sum() * 0, p.sum() * 0
    if hungarian:
        rows, columns = match(p, masks)
        p, masks = p[rows], masks[columns]                                   # 2 x (K, N)
    focal, dice = pair_losses(p, masks)
    return focal.diagonal().mean(), dice.diagonal().mean()


def draw_sigma(kind: str, shift: float, generator: torch.Generator) -> Tensor:
    """A noise level (1,): "uniform" (Eq. 2), or "logit-normal", shifted as the sampler's schedule (released code)."""
    if kind == "uniform":
        return torch.rand(1, generator=generator)
    s = torch.sigmoid(SIGMA_STD * torch.randn(1, generator=generator))
    return shift * s / (1 + (shift - 1) * s)


# ---------------------------------------------------------------------------- what a picture becomes, once


class Features(NamedTuple):
    z0: Tensor                              # (C, ., .)
    ctx: Tensor                             # (M, ctx_dim)
    pooled: Tensor                          # (pooled_dim,)
    masks: Tensor                           # (K, N) bool
    spans: list[slice]                      # of the masks' names in the prompt; only for --match tokens


def patch_masks(masks: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(K, height, width) bool -> (K, N) bool on the patch grid: patches of which the mask covers half or more."""
    return torch.stack([F.interpolate(torch.from_numpy(m)[None, None].float(), size=grid, mode="area").flatten() >= 0.5
                        for m in masks]) if len(masks) else torch.zeros(0, grid[0] * grid[1], dtype=torch.bool)


@torch.no_grad()
def features(model: Seg4Diff, pair: Pair, by_name: bool) -> Features:
    """Latent, text and masks of a picture. by_name: the prompt is the masks' names, as many as fit (released code, COCO)."""
    side = model.preset.size // model.vae.factor // model.mmdit.config.patch
    masks = patch_masks(pair.masks, (side, side))                            # (K, N)
    keep = [k for k in masks.sum(1).argsort(descending=True, stable=True).tolist() if masks[k].any()][:MAX_MASKS]
    prompt = pair.caption
    if by_name:
        sizes = np.cumsum([model.text.n_tokens(pair.names[k]) for k in keep])
        keep = sorted(k for k, n in zip(keep, sizes) if n <= model.text.length - 2)
        prompt = [pair.names[k] for k in keep]
    cond = model.text.encode([prompt])
    image = seg4diff.image_tensor(pair.image, model.preset.size)[None].to(model.device, model.dtype)
    return Features(model.vae.encode(image)[0].cpu(), cond.ctx[0].cpu(), cond.pooled[0].cpu(), masks[keep],
                    cond.spans[0] if by_name else [])


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


# ---------------------------------------------------------------------------- one step


class How(NamedTuple):
    """Every choice that touches the losses."""
    block: int
    candidates: str
    by_name: bool
    normalise: str
    sigma: str
    mask_weight: float


def batch_losses(model: Seg4Diff, batch: Sequence[Features], seeds: Sequence[int], how: How) -> dict[str, Tensor]:
    """One forward pass -> {"flow", "focal", "dice", "loss"}, means over the batch; noise and its level from the seeds."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    sigma = torch.cat([draw_sigma(how.sigma, model.preset.shift, g) for g in generators]).to(model.device)   # (B,)
    eps = torch.stack([torch.randn(f.z0.shape, generator=g) for f, g in zip(batch, generators)]).to(model.device)
    z0, ctx, pooled = (torch.stack(x).to(model.device) for x in list(zip(*batch))[:3])
    z = seg4diff.add_noise(z0.float(), eps, sigma[:, None, None, None]).to(model.dtype)          # Eq. 1, (B, C, ., .)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        vel, taps = model.mmdit(z, sigma, ctx, pooled, capture={how.block})
    flow = F.mse_loss(vel.float(), eps - z0.float())                         # Eq. 2
    maps = partial(checkpoint, i2t_attention, use_reentrant=False) if model.mmdit.checkpointing else i2t_attention
    focal, dice = [], []
    for attn, f in zip(maps(taps[how.block]), batch):                        # (H, N, M)
        if how.by_name:
            found = [attn.mean(0)[:, span].mean(-1) for span in f.spans]     # K x (N,)
            found = torch.stack(found) if found else attn.new_zeros(0, attn.shape[1])            # (K, N)
        else:
            found = attn[:, :, :model.text.length].mT                        # (H, L, N)
            found = found.mean(0) if how.candidates == "tokens" else found.flatten(0, 1)         # (L, N) or (H*L, N)
        masks = f.masks.to(found.device, found.dtype)
        for total, loss in zip((focal, dice), mask_losses(NORMALISATIONS[how.normalise](found), masks, not how.by_name)):
            total.append(loss)
    focal, dice = torch.stack(focal).mean(), torch.stack(dice).mean()
    mask = FOCAL_WEIGHT * focal + DICE_WEIGHT * dice                         # Eq. 12
    return {"flow": flow, "focal": focal, "dice": dice, "loss": flow + how.mask_weight * mask}   # Eq. 13


def gradient(model: Seg4Diff, params: Sequence[nn.Parameter], batches: list, how: How) -> dict[str, float]:
    """Gradient of the mean loss over all batches [(features, seeds)] of all processes into params; the mean losses."""
    total = torch.zeros(4)
    for batch, seeds in batches:
        losses = batch_losses(model, batch, seeds, how)
        (losses["loss"] / len(batches)).backward()
        total += torch.stack([x.detach().cpu() for x in losses.values()]) / len(batches)
    if evaluate.world()[1] > 1:
        grads = [p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads] + [total.to(grads[0])])
        dist.all_reduce(flat)
        *parts, total = (flat / evaluate.world()[1]).split([g.numel() for g in grads] + [len(total)])
        for g, part in zip(grads, parts):
            g.copy_(part.view_as(g))
    return dict(zip(losses, total.tolist()))


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
        present = [data.classes[k] for k in np.unique(item.labels) if k < len(data.classes)]
        cond = model.text.encode([" ".join(present)] * levels)
        z = seg4diff.add_noise(z0, eps, sigma[:, None, None, None])          # (levels, C, ., .)
        vel, _ = model.mmdit(z.to(model.dtype), sigma, cond.ctx, cond.pooled)
        total += F.mse_loss(vel.float(), eps - z0).item() / len(names)
    return total


def measure(model: Seg4Diff, data: Dataset, names: Sequence[str], seed: int) -> dict[str, float]:
    """What MAGNET should raise, and what it should not spoil."""
    return {"mIoU": miou(model, data, names, "ovss", seed), "unsup mIoU": miou(model, data, names, "unsup", seed),
            "flow loss": flow_loss(model, data, names, seed)}


def compare(args: argparse.Namespace, data: Dataset, names: Sequence[str]) -> None:
    """A row of numbers without LoRA and with each; mean and spread of the change over several (say, seeds)."""
    for path in args.measure:
        weights.read_lora(path)                                              # a wrong one is told of before the work
    rows = [measure(seg4diff.load(args.model, args.device, lora=lora), data, names, args.seed)
            for lora in (None, *tqdm(args.measure, desc="measuring", unit="LoRA"))]
    print(f"{data.name}, {len(names)} pictures, seed {args.seed}: " + ", ".join(rows[0]))
    for name, row in zip([args.model, *args.measure], rows):
        print(f"{'  '.join(f'{x:9.4f}' for x in row.values())}  {name}")
    change = np.array([list(row.values()) for row in rows[1:]]) - list(rows[0].values())         # (LoRAs, numbers)
    spread = change.std(0, ddof=1) if len(change) > 1 else np.full(change.shape[1], np.nan)
    print("  ".join(f"{m:+9.4f} (sd {s:.4f})" for m, s in zip(change.mean(0), spread)) + "  change, mean and spread")


# ---------------------------------------------------------------------------- the run


def save_state(path: Path, state: dict) -> None:
    """torch.save that a kill cannot leave half written."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(args: argparse.Namespace, model: Seg4Diff, data: TrainingSet, val: Dataset | None, out: Path) -> None:
    (rank, processes), start = evaluate.world(), time.time()
    names, size = subset(data.names, args.limit), args.batch * args.accumulate * processes
    how = How(model.preset.block, args.candidates, args.match == "tokens", args.normalise, args.sigma, args.mask_weight)
    params = add_lora(model.mmdit, args.rank, args.rank * LORA_ALPHA / RANK, torch.Generator().manual_seed(args.seed))
    model.mmdit.checkpointing = args.checkpointing
    opt = torch.optim.AdamW(params, args.lr, weight_decay=DECAY)
    this = {"model": [model.name, model.fingerprint], "data": [data.name, len(names)], "size": size, "how": list(how),
            "captions": str(args.captions), **{k: getattr(args, k) for k in ("steps", "warmup", "lr", "rank", "seed")}}
    done, log = 0, []
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=model.device, weights_only=True)
        if other := [f"{k} {state['run'][k]} instead of {this[k]}" for k in this if state["run"][k] != this[k]]:
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
            save_lora(model.mmdit, out / "lora.safetensors")
            write_json(out / "log.json", log)
            plot_losses(log, out / "loss.png")
            lora = [p.detach() for p in params]
            save_state(out / "state.pt", dict(step=step, log=log, run=this, opt=opt.state_dict(), lora=lora))

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
        gigabytes = torch.cuda.max_memory_allocated() / 1e9 if model.device.type == "cuda" else peak_megabytes() / 1000
        seconds = time.time() - start
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
                               ("noise level", args.sigma, ("logit-normal", "uniform")),
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
    (rank, processes), recipe = evaluate.world(), RECIPES[args.dataset]
    for key in ("model", "val", "steps", "warmup", "lr", "batch", "candidates"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(recipe, key))
    if args.accumulate is None:
        args.accumulate = max(1, recipe.effective // (args.batch * processes))
    val = DATASETS[args.val](args.data_root) if args.val != "none" else None
    if args.measure:
        if val is None:
            raise ValueError("--measure needs pictures with label maps: choose them with --val")
        return compare(args, val, subset(val.names, args.val_limit))
    data = TRAINING_SETS[args.dataset](args.data_root, args.captions)
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if processes > 1:                                    # torchrun: a GPU for each process
        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu"
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))       # rank 0 validates alone
    model = seg4diff.load(args.model, args.device)
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
    parser.add_argument("--sigma", default="logit-normal", help="noise level: logit-normal (released code), uniform (Eq. 2)")
    parser.add_argument("--mask-weight", type=float, default=MASK_WEIGHT, help="lambda_mask of Eq. 13")
    parser.add_argument("--rank", type=int, default=RANK, help="of the LoRA")
    parser.add_argument("--steps", type=int, help="of the optimiser (300; coco 3000, sa1b 1000)")
    parser.add_argument("--warmup", type=int, help="steps until the full rate (30; 500)")
    parser.add_argument("--lr", type=float, help="learning rate (5e-4; 1e-5)")
    parser.add_argument("--batch", type=int, help="pictures at once and process (16; 4)")
    parser.add_argument("--accumulate", type=int, help="batches a step (default: until all processes saw 16 pictures)")
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
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:               # bad input: one sentence, no traceback
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""How nano was made: one command from nothing to nano.safetensors.

    python nano/pretrain.py --samples 150000              # on CPU; again after a kill: goes on where it stopped
    python nano/pretrain.py --init nano/nano.safetensors --low 0 --run nano/run/more     # trains nano on
    python nano/pretrain.py --init nano/run/nano.safetensors --depth 8 --low 0 --run nano/run/grown  # adds blocks
    python nano/pretrain.py --device cuda --samples 2000000 --batch 256 --width 256 --depth 8 --run nano/run/gpu

Five stages; the first three are skipped when their result lies in --run: draw the scenes, train the VAE, encode
all scenes once (the VAE is frozen from then on), train text towers and MM-DiT together by the flow-matching loss
alone, choose the expert block and how <pad> maps are merged.  Masks are not even drawn to disk.
NOTE(paper): Eq. 2 draws the noise level uniformly; here it is logit-normal as in SD3's own training, but with mean 0.8,
not 0: towards noise, where words matter.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
import zlib
from dataclasses import replace
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import protocol  # noqa: E402
import seg4diff  # noqa: E402
from mmdit import MMDiT, MMDiTConfig  # noqa: E402
from nano import scenes  # noqa: E402
from nano.train_vae import encode_latents, train_vae  # noqa: E402
from nano.training import Progress, optimise, optimisers, resume, save_state  # noqa: E402
from support import pictures, weights  # noqa: E402
from support.checkpoint import pick_device  # noqa: E402
from support.cli import Parser, at_least, command  # noqa: E402
from support.data import DATASETS  # noqa: E402
from support.files import write_json  # noqa: E402
from text import CLIPText, TextEncoders, clip_tokenizer  # noqa: E402
from vae import VAE  # noqa: E402

# What a run cannot change on the way.
FIXED = ("init", "seed", "scenes", "vae_widths", "width", "depth", "head_dim", "text_widths", "text_layers",
         "text_length")

# ---------------------------------------------------------------------------- 1. scenes


def draw_scenes(run: Path, n: int) -> None:
    """images.npy (n, side, side, 3) uint8 and facts.json, what captions are made of; all cores."""
    images = open_memmap(run / "images.tmp.npy", "w+", np.uint8, (n, scenes.SIDE, scenes.SIDE, 3))
    facts = []
    with Pool() as pool:
        drawn = pool.imap(scenes.draw, scenes.TRAIN_SEEDS[:n], chunksize=32)
        for i, scene in enumerate(tqdm(drawn, total=n, desc="scenes", mininterval=5)):
            images[i] = scene.image
            facts.append((scene.stuff, scene.things))
    images.flush()
    (run / "facts.json").write_text(json.dumps(facts))
    os.replace(run / "images.tmp.npy", run / "images.npy")


# --------------------------------------------------------------------------- 2, 3: train_vae.py; 4. text towers, MM-DiT


def word_merges(words: list[str]) -> list[str]:
    """Byte-pair merges under which every given word is one token; other words fall apart into pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(words)], trainer)
    return [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def sincos_grid(side: int, width: int) -> Tensor:
    """(1, side*side, width): the first half of the width encodes the column, the second the row."""
    freq = 10000 ** (-torch.arange(width // 4) / (width / 4))                           # (width/4,)
    angle = torch.arange(side)[:, None] * freq                                          # (side, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # (side, width/2)
    columns = line[None].expand(side, side, -1)                                         # (side, side, width/2)
    rows = line[:, None].expand(side, side, -1)                                         # (side, side, width/2)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


def initialise(mmdit: MMDiT) -> None:
    """Xavier for matrices, zero for gates and output: every block starts as the identity."""
    for name, p in mmdit.named_parameters():
        if "adaLN" in name or "final_layer.linear" in name or name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.flatten(1))


def grow(mmdit: MMDiT, depth: int) -> MMDiT:
    """The same function with more blocks, appended; they start as the identity, and so does what a last block has
    not: the output for text tokens.  ValueError: fewer blocks than there are."""
    last = mmdit.config.depth - 1
    if depth <= last:
        raise ValueError(f"a model of {last + 1} blocks cannot go on with {depth}")
    deeper = MMDiT(replace(mmdit.config, depth=depth))
    initialise(deeper)
    sd = deeper.state_dict()
    for key, value in mmdit.state_dict().items():
        if f"joint_blocks.{last}.context_block.adaLN" in key:
            sd[key][:len(value)] = value                 # shift and scale before the attention come first
        else:
            sd[key] = value
    deeper.load_state_dict(sd)
    return deeper


def new_model(args: argparse.Namespace, latent: int) -> tuple[MMDiT, TextEncoders, list[str]]:
    """MM-DiT (q/k-normed, so that its head width can be read off the file), two small CLIP towers, merges."""
    torch.manual_seed(args.seed)
    merges = word_merges(scenes.words())
    vocab = 2 * 256 + len(merges) + 2
    towers = []
    for width, is_l in zip(args.text_widths, (True, False)):
        towers.append(CLIPText(vocab, args.text_length, width, 2 * width, args.text_layers, quick_gelu=is_l,
                               project=not is_l))
    for tower in towers:
        nn.init.normal_(tower.text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(tower.text_model.embeddings.position_embedding.weight, std=0.1)
    pooled = sum(args.text_widths)
    ctx_dim = 256 * math.ceil(pooled / 256)
    mmdit = MMDiT(MMDiTConfig(width=args.width, depth=args.depth or 6, head_dim=args.head_dim, patch=1, channels=latent,
                              pos_grid=24, ctx_dim=ctx_dim, pooled_dim=pooled, mlp=4 * args.width, time_dim=128,
                              qk_norm=True))
    mmdit.pos_embed.copy_(sincos_grid(24, args.width))
    initialise(mmdit)
    return mmdit, TextEncoders(*towers, clip_tokenizer(merges), ctx_dim), merges


def read_model(args: argparse.Namespace) -> tuple[MMDiT, TextEncoders, list[str]]:
    """The same of the file --init, with more blocks if --depth says so."""
    files = weights.find(args.init)
    sd = weights.read(files, dtype=torch.float32)
    mmdit = MMDiT.from_state_dict(sd["mmdit"])
    if args.depth is not None:
        torch.manual_seed(args.seed)
        mmdit = grow(mmdit, args.depth)
    merges = weights.merges(files)
    text = TextEncoders(CLIPText.from_state_dict(sd["clip_l"]), CLIPText.from_state_dict(sd["clip_g"]),
                        clip_tokenizer(merges), mmdit.config.ctx_dim)
    return mmdit.requires_grad_(True).train(), text.requires_grad_(True).train(), merges


def export(path: Path, mmdit: MMDiT, text: TextEncoders, vae: VAE, merges: list[str], trained: dict) -> None:
    """ONE file in SD3's key layout, fp16; the tokenizer's merges and the presets travel in its header."""
    sd = {}
    for part, module in (("mmdit", mmdit), ("vae", vae), ("clip_l", text.clip_l), ("clip_g", text.clip_g)):
        for key, value in module.state_dict().items():
            sd[weights.PREFIXES[part] + key] = value.detach().half().cpu().contiguous()
    presets = {"block": mmdit.config.depth // 2, "size": scenes.SIDE, "steps": 28, "shift": 3.0, "noise_steps": 8,
               "cfg": 3.0, "batch": 16}
    header = {"merges": merges, "presets": presets, "trained": trained}
    write_model(path, sd, {key: json.dumps(value) for key, value in header.items()})


def write_model(path: Path, sd: dict[str, Tensor], header: dict[str, str]) -> None:
    """A model file that is there as a whole or not at all."""
    save_file(sd, path.with_suffix(".tmp"), header)
    os.replace(path.with_suffix(".tmp"), path)


def is_block_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon trains this parameter of MM-DiT or text towers."""
    return p.ndim == 2 and "adaLN" not in name and ("joint_blocks" in name or "layers" in name)


def train_mmdit(run: Path, args: argparse.Namespace, vae: VAE) -> None:
    """Eq. 2 on cached latents; Muon for the matrices inside the blocks, AdamW for the rest, EMA of all."""
    device = args.device
    latents = torch.from_numpy(np.load(run / "latents.npy"))                            # (n, C, h, w) fp16
    facts = []
    for stuff, things in json.loads((run / "facts.json").read_text()):
        facts.append(scenes.Scene(None, None, stuff, [scenes.Thing(*thing) for thing in things]))
    mmdit, text, merges = read_model(args) if args.init else new_model(args, latents.shape[1])
    model = nn.ModuleDict({"mmdit": mmdit, "clip_l": text.clip_l, "clip_g": text.clip_g}).to(device)
    ema = copy.deepcopy(model)
    opts = optimisers(model, is_block_matrix, args.lr)
    progress = Progress()
    resume(run / "mmdit.pt", {"model": model, "ema": ema}, opts, progress)
    rng = np.random.default_rng([args.seed, progress.step])
    generator = torch.Generator().manual_seed(args.seed + progress.step)
    velocity = torch.compile(mmdit, dynamic=False) if args.compile else mmdit
    losses = []

    def keep(tag: str = "") -> None:
        save_state(run / "mmdit.pt", {"model": model, "ema": ema}, opts, progress)
        path = run / f"nano{tag}.safetensors"
        smooth = TextEncoders(ema["clip_l"], ema["clip_g"], text.tokenizer, text.ctx_dim)
        trained = {"samples": progress.samples, "seconds": round(progress.spent), "scenes": len(latents),
                   "seed": args.seed}
        export(path, ema["mmdit"], smooth, vae, merges, trained)
        prompts = [scenes.caption(scenes.draw(s), np.random.default_rng(s)) for s in scenes.VAL_SEEDS[:16]]
        images = seg4diff.generate(seg4diff.load(path, device), prompts)
        pictures.sheet(images, prompts).save(run / f"samples{tag}.png")

    start = time.time() - progress.spent
    kept = time.time()
    bar = tqdm(total=args.samples, initial=progress.samples, desc="MM-DiT", unit="sample", mininterval=10)
    while progress.samples < args.samples:
        done = progress.samples / args.samples
        low = done < args.low                            # a cheap start on a quarter of the tokens
        idx = rng.integers(0, len(latents), 3 * args.batch if low else args.batch)
        z0 = latents[idx].to(device).float()                                            # (B, C, h, w)
        if low:
            z0 = F.avg_pool2d(z0, 2)                                                    # (B, C, h/2, w/2)
        captions = ["" if rng.random() < 0.1 else scenes.caption(facts[i], rng) for i in idx]
        eps = torch.randn(z0.shape, generator=generator).to(device)
        sigma = torch.sigmoid(args.noise_mean + torch.randn(len(z0), generator=generator))   # (B,), logit-normal
        sigma = sigma.to(device)
        # the pooled vector is mostly withheld, so that words have to come in through attention
        keep_pooled = torch.rand(len(z0), 1, generator=generator) < args.pooled         # (B, 1)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            cond = text.encode(captions)
            z = seg4diff.add_noise(z0, eps, sigma[:, None, None, None])                 # (B, C, h, w)
            vel, _ = velocity(z, sigma, cond.ctx, cond.pooled * keep_pooled.to(device))
        loss = F.mse_loss(vel.float(), eps - z0)                                        # Eq. 2
        rate = min(1, (progress.step + 1) / 200, (1 - done) / args.cooldown + 0.01)     # warm up, hold, fall
        optimise(opts, loss, args.lr * rate)
        progress.step += 1
        progress.samples += len(idx)
        progress.spent = time.time() - start
        decay = min(0.998, (1 + progress.step) / (10 + progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {progress.step} steps; the last good state is "
                             f"{run / 'mmdit.pt'}")
        if progress.step % 50 == 0:
            mean = float(np.mean(losses[-50:]))
            progress.log.append((progress.samples, mean))
            bar.n = progress.samples
            bar.set_postfix(loss=f"{mean:.4f}", minutes=f"{progress.spent / 60:.0f}")
        if time.time() - kept > 60 * args.snapshot:
            keep(f"_{progress.samples // 1000:04d}k")
            kept = time.time()
    keep()


# ---------------------------------------------------------------------------- 5. presets: which block is the expert


def block_scores(path: Path, limit: int | None = None, device: str | torch.device = "cpu"
                 ) -> tuple[list[float], float]:
    """mIoU of every block of a model file on scenes-dev (Fig. 8), and the floor's; percent."""
    model = seg4diff.load(path, device)
    data = DATASETS["scenes-dev"]()
    variants = [v for v in protocol.TASKS["layers"].variants(model) if v.kind == "softmax"]
    rows = protocol.measure(model, data, data.names[:limit], "layers", variants)
    return [rows[v.name]["mIoU"] for v in variants], rows["floor"]["mIoU"]


def write_presets(path: Path, **presets) -> None:
    """Change presets in a model file's header."""
    header = weights.header(weights.find(path))
    header["presets"] = json.dumps(json.loads(header["presets"]) | presets)
    write_model(path, load_file(path), header)


def choose_presets(path: Path, device: torch.device) -> None:
    """Write into the file's presets what is best on scenes-dev: the block, as the paper chose SD3's on its benchmarks,
    and for that block how maps of <pad> tokens are scaled and merged.  The only place in this file where masks are
    looked at, after the training is over."""
    miou, _ = block_scores(path, device=device)
    block = int(np.argmax(miou))
    write_presets(path, block=block)
    model = seg4diff.load(path, device)
    data = DATASETS["scenes-dev"]()
    rows = protocol.measure(model, data, data.names[:40], "thresholds")
    best = max(protocol.TASKS["thresholds"].variants(model), key=lambda v: rows[v.name]["mIoU"])
    write_presets(path, threshold=best.threshold, scaling=best.scaling)
    print(f"mIoU on scenes-dev by block: {' '.join(f'{x:.1f}' for x in miou)}; the expert is block {block}\n"
          f"<pad> maps: scaled over: {best.scaling}, merged below {best.threshold:g}: {rows[best.name]['mIoU']:.1f}, "
          f"as many random proposals {rows[f'{best.name} floor']['mIoU']:.1f}")


# ---------------------------------------------------------------------------- command line


def claim(args: argparse.Namespace) -> None:
    """Make --run this run's folder.  ValueError: it holds a run that began with other settings."""
    settings = {key: str(getattr(args, key)) for key in FIXED}
    settings["world"] = str(zlib.crc32((Path(__file__).parent / "scenes.py").read_bytes()))
    args.run.mkdir(parents=True, exist_ok=True)
    path = args.run / "origin.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    other = [f"{key} {before.get(key)} instead of {settings[key]}" for key in settings
             if before.get(key) != settings[key]]
    if other:
        raise ValueError(f"{args.run} holds a run with {', '.join(other)}; name another --run")
    write_json(path, settings)


def main(args: argparse.Namespace) -> None:
    args.device = pick_device(args.device)
    if args.width % args.head_dim or args.width % 4:
        raise ValueError(f"--width must be a multiple of 4 and of --head-dim, not {args.width}")
    claim(args)
    run = args.run
    if not (run / "images.npy").exists():
        draw_scenes(run, args.scenes)
    if args.init:
        sd = weights.read(weights.find(args.init), dtype=torch.float32)["vae"]
    else:
        if not (run / "vae_done.pt").exists():
            train_vae(run, args)
        sd = torch.load(run / "vae_done.pt", map_location="cpu", weights_only=True)["vae"]
    vae = VAE.from_state_dict(sd, device=args.device)
    if not (run / "latents.npy").exists():
        encode_latents(run, vae, args.device)
    train_mmdit(run, args, vae)
    choose_presets(run / "nano.safetensors", args.device)
    print(f"wrote {run / 'nano.safetensors'}; copy it to nano/nano.safetensors to make it the embedded model")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent / "run",
                        help="folder of scenes, latents and state")
    parser.add_argument("--init", type=Path, help="go on from this model file (its VAE too) instead of from nothing")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=at_least(1), default=24_000, help="distinct training scenes")
    parser.add_argument("--minutes-vae", type=float, default=12)
    parser.add_argument("--batch-vae", type=at_least(1), default=4)
    parser.add_argument("--vae-widths", type=int, nargs="+", default=(16, 24, 48, 64))
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term in the VAE's loss")
    parser.add_argument("--samples", type=int, default=150_000, help="that the MM-DiT sees, kills not counted")
    parser.add_argument("--batch", type=at_least(1), default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, help="blocks (6); with --init more than that file's are appended")
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--text-widths", type=int, nargs=2, default=(64, 128), help="CLIP-L's and CLIP-G's stand-in")
    parser.add_argument("--text-layers", type=at_least(1), default=1,
                        help="of a text tower; the context is the last but one's")
    parser.add_argument("--text-length", type=int, default=22, help="rows of a text tower, start and end included")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise-mean", type=float, default=0.8, help="of the logit-normal sigma; 0 is the middle")
    parser.add_argument("--pooled", type=float, default=0.1, help="how often the pooled text vector is not withheld")
    parser.add_argument("--low", type=float, default=0.4, help="share of the samples seen as 2x2-pooled latents first")
    parser.add_argument("--cooldown", type=float, default=0.25,
                        help="share of the samples in which the rate falls to zero")
    parser.add_argument("--snapshot", type=float, default=8, help="minutes between saved states")
    parser.add_argument("--compile", action="store_true", help="torch.compile the MM-DiT; needs a C++ compiler")
    command(main, parser)

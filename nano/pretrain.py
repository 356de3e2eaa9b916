"""How nano was made: one command from nothing to nano.safetensors.

    python nano/pretrain.py --samples 150000              # on CPU; again after a kill: goes on where it stopped
    python nano/pretrain.py --init nano/nano.safetensors --low 0 --run nano/run/more     # trains nano on
    python nano/pretrain.py --init nano/run/nano.safetensors --depth 8 --low 0 --run nano/run/grown    # with more blocks
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
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate  # noqa: E402
import seg4diff  # noqa: E402
from mmdit import MMDiT, MMDiTConfig  # noqa: E402
from nano import scenes  # noqa: E402
from support import (
    pictures,  # noqa: E402
    weights,  # noqa: E402
)
from support.cli import command  # noqa: E402
from support.data import DATASETS  # noqa: E402
from support.ledger import write_tensors  # noqa: E402
from text import CLIPText, TextEncoders, clip_tokenizer  # noqa: E402
from vae import SCALE, SHIFT, VAE  # noqa: E402

DEPTH = 6


# ---------------------------------------------------------------------------- 1. scenes

def draw(seed: int, side: int) -> tuple[np.ndarray, tuple]:
    scene = scenes.draw(seed, side)
    return scene.image, (scene.stuff, scene.things)


def draw_scenes(run: Path, n: int, side: int) -> None:
    """images.npy (n, side, side, 3) uint8 and facts.json, what captions are made of; all cores."""
    images = open_memmap(run / "images.tmp.npy", "w+", np.uint8, (n, side, side, 3))
    facts = []
    with Pool() as pool:
        seeds = (scenes.TRAIN_SEEDS[i] for i in range(n))
        drawn = pool.imap(partial(draw, side=side), seeds, chunksize=32)
        for i, (image, fact) in enumerate(tqdm(drawn, total=n, desc="scenes", mininterval=5)):
            images[i] = image
            facts.append(fact)
    images.flush()
    (run / "facts.json").write_text(json.dumps(facts))
    os.replace(run / "images.tmp.npy", run / "images.npy")


# ---------------------------------------------------------------------------- optimiser

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for weights that are matrices (a convolution's is out x rest).

    torch.optim.Muon does this in bf16, which takes seconds a step on a CPU without it; here it is fp32, and
    weights of one shape go through together.  The update's size is matched to AdamW's, so one rate fits both.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes = {}
            for p in (p for p in group["params"] if p.grad is not None):
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                for p in params:
                    self.state[p].setdefault("m", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                X = torch.stack([p.grad.lerp(self.state[p]["m"], group["momentum"]).flatten(1) for p in params])
                scale = 0.2 * max(X.shape[1:]) ** 0.5                                   # X: (n, out, in)
                if tall := X.shape[1] > X.shape[2]:
                    X = X.mT
                X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
                for _ in range(5):                       # Newton-Schulz: all singular values towards 1
                    A = X @ X.mT
                    X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
                for p, update in zip(params, X.mT if tall else X):
                    p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def optimisers(model: nn.Module, is_matrix, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the parameters of which is_matrix(name, p) holds, AdamW for the rest."""
    params = list(model.named_parameters())
    return [Muon([p for name, p in params if is_matrix(name, p)], lr),
            torch.optim.AdamW([p for name, p in params if not is_matrix(name, p)], lr, (0.9, 0.99), weight_decay=0.0)]


def optimise(opts: list[torch.optim.Optimizer], loss: Tensor, lr: float) -> None:
    """One step of all optimisers at this rate, gradient norm clipped at 1."""
    for opt in opts:
        opt.zero_grad(set_to_none=True)
        opt.param_groups[0]["lr"] = lr
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for opt in opts for p in opt.param_groups[0]["params"] if p.grad is not None], 1.0)
    for opt in opts:
        opt.step()


# ---------------------------------------------------------------------------- 2. VAE

def fold_scale(vae: VAE, batches) -> None:
    """Rescale the latent channels so that SD3's own shift and scale (vae.py) give them zero mean and unit
    variance: z' = a z + b goes into the encoder's last layer, its inverse into the decoder's first."""
    mean = torch.cat([vae.encoder(x).chunk(2, 1)[0] for x in batches])                  # (n, C, h, w)
    mu, std = mean.mean((0, 2, 3)), mean.std((0, 2, 3))                                 # 2 x (C,)
    a, b = 1 / (std * SCALE), SHIFT - mu / (std * SCALE)
    C, last, first = len(a), vae.encoder.conv_out, vae.decoder.conv_in
    last.weight[:C] *= a[:, None, None, None]
    last.bias[:C] = a * last.bias[:C] + b
    first.bias -= (first.weight * (b / a)[None, :, None, None]).sum((1, 2, 3))          # not exact at the border
    first.weight /= a[None, :, None, None]


def train_vae(run: Path, args: argparse.Namespace) -> None:
    """L1 + L2 + a touch of KL; the last third trains the decoder alone on latents that stay as they are."""
    device, images = args.device, np.load(run / "images.npy", mmap_mode="r")
    torch.manual_seed(args.seed)
    vae = VAE(args.vae_widths, enc_blocks=1, dec_blocks=1, latent=16).to(device)
    opts = optimisers(vae, lambda name, p: p.ndim == 4 and "conv_in" not in name and "conv_out" not in name, 1e-3)
    rng, start, spent, step, folded = np.random.default_rng(args.seed), time.time(), 0.0, 0, False
    if (run / "vae.pt").exists():
        state = torch.load(run / "vae.pt", map_location=device, weights_only=True)
        vae.load_state_dict(state["vae"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        spent, step, folded = state["spent"], state["step"], state["folded"]
        vae.encoder.requires_grad_(not folded)
        rng = np.random.default_rng([args.seed, step])

    def batch(n):
        x = torch.from_numpy(images[np.sort(rng.choice(len(images), n, replace=False))]).to(device)
        return x.permute(0, 3, 1, 2).float() / 127.5 - 1                                # (n, 3, side, side)

    bar = tqdm(total=args.minutes_vae * 60, initial=int(spent), desc="VAE", unit="s", mininterval=5)
    begun = spent
    while (done := spent / (60 * args.minutes_vae)) < 1:
        if done > 0.66 and not folded:
            with torch.no_grad():
                fold_scale(vae, [batch(32) for _ in range(16)])
            vae.encoder.requires_grad_(False)
            folded = True
        x = batch(args.batch_vae)
        mean, logvar = vae.encoder(x).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        z = mean + (0.02 / SCALE if folded else torch.exp(0.5 * logvar)) * torch.randn_like(mean)
        y = vae.decoder(z)
        l1, mse = F.l1_loss(y, x), F.mse_loss(y, x)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        loss = l1 + 2 * mse + (0 if folded else args.kl * kl)
        optimise(opts, loss, 1e-3 * min(1, (step + 1) / 50, 3 * (1 - done) + 0.01))    # warm up, hold, fall to zero
        step, spent = step + 1, begun + time.time() - start
        bar.n = int(spent)
        bar.set_postfix(psnr=f"{-10 * np.log10(mse.item() / 4):.1f}dB", kl=f"{kl.item():.2f}",
                        images=step * args.batch_vae)
        if step % 300 == 0 or spent >= 60 * args.minutes_vae:
            write_tensors(run / "vae.pt", dict(vae=vae.state_dict(), opts=[o.state_dict() for o in opts], spent=spent,
                                               step=step, folded=folded))
            show = torch.cat([x[:8], y[:8]]).detach().clamp(-1, 1).cpu()
            save_grid(show, run / "vae.png")
    write_tensors(run / "vae_done.pt", dict(vae=vae.state_dict()))


def save_grid(x: Tensor, path: Path, columns: int = 8) -> None:
    """(n, 3, px, px) in [-1, 1] -> one PNG, row by row."""
    rows = [torch.cat(list(x[i:i + columns]), dim=2) for i in range(0, len(x), columns)]   # (3, px, columns*px)
    grid = torch.cat(rows, dim=1).permute(1, 2, 0)                                         # (rows*px, columns*px, 3)
    Image.fromarray(((grid + 1) * 127.5).round().to(torch.uint8).numpy()).save(path)


# ---------------------------------------------------------------------------- 3. latents

@torch.inference_mode()
def encode_latents(run: Path, vae: VAE, device: str) -> None:
    """latents.npy (n, C, h, w) fp16: every scene through the frozen encoder, once."""
    images = np.load(run / "images.npy", mmap_mode="r")
    chunks = []
    for i in tqdm(range(0, len(images), 64), desc="latents", mininterval=5):
        x = torch.from_numpy(np.array(images[i:i + 64])).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        chunks.append(vae.encode(x).half().cpu().numpy())
    np.save(run / "latents.tmp.npy", np.concatenate(chunks))
    os.replace(run / "latents.tmp.npy", run / "latents.npy")


# ---------------------------------------------------------------------------- 4. text towers and MM-DiT

def word_merges(words: list[str]) -> list[str]:
    """Byte-pair merges under which every given word is one token; other words fall apart into pieces."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe.train_from_iterator([" ".join(words)], trainer)
    return [" ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]


def sincos_grid(K: int, width: int) -> Tensor:
    """(1, K*K, width): the first half of the width encodes the column, the second the row."""
    freq = 10000 ** (-torch.arange(width // 4) / (width / 4))                           # (width/4,)
    angle = torch.arange(K)[:, None] * freq                                             # (K, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # (K, width/2)
    col, row = line[None].expand(K, K, -1), line[:, None].expand(K, K, -1)
    return torch.cat([col, row], dim=-1).reshape(1, K * K, width)


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
    old, last = mmdit.state_dict(), mmdit.config.depth - 1
    if depth <= last:
        raise ValueError(f"a model of {last + 1} blocks cannot go on with {depth}")
    deeper = MMDiT(replace(mmdit.config, depth=depth))
    initialise(deeper)
    sd = deeper.state_dict()
    for key, value in old.items():
        if f"joint_blocks.{last}.context_block.adaLN" in key:
            sd[key][:len(value)] = value                 # shift and scale before the attention come first
        else:
            sd[key] = value
    deeper.load_state_dict(sd)
    return deeper


def build(args: argparse.Namespace, latent: int) -> tuple[MMDiT, TextEncoders, list[str]]:
    """MM-DiT (q/k-normed, so that its head width can be read off the file) and two small CLIP towers, from nothing;
    with --init all of them, and their sizes, from that file, with more blocks if --depth says so."""
    if args.init:
        files = weights.find(args.init)
        sd, merges = weights.read(files, dtype=torch.float32), weights.merges(files)
        parts = [MMDiT.from_state_dict(sd["mmdit"]), *(CLIPText.from_state_dict(sd[p]) for p in ("clip_l", "clip_g"))]
        if args.depth is not None:
            torch.manual_seed(args.seed)
            parts[0] = grow(parts[0], args.depth)
        mmdit, clip_l, clip_g = (m.requires_grad_(True).train() for m in parts)
        return mmdit, TextEncoders(clip_l, clip_g, clip_tokenizer(merges), mmdit.config.ctx_dim), merges
    torch.manual_seed(args.seed)
    merges = word_merges(scenes.words())
    vocab, (width_l, width_g), length = 2 * 256 + len(merges) + 2, args.text_widths, args.text_length
    towers = [CLIPText(vocab, length, w, 2 * w, layers=args.text_layers, quick_gelu=w == width_l, project=w == width_g)
              for w in (width_l, width_g)]
    ctx_dim = 256 * math.ceil((width_l + width_g) / 256)
    for tower in towers:
        nn.init.normal_(tower.text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(tower.text_model.embeddings.position_embedding.weight, std=0.1)
    cfg = MMDiTConfig(width=args.width, depth=args.depth or DEPTH, head_dim=args.head_dim, patch=1, channels=latent,
                      pos_grid=24, ctx_dim=ctx_dim, pooled_dim=width_l + width_g, mlp=4 * args.width, time_dim=128,
                      qk_norm=True)
    mmdit = MMDiT(cfg)
    mmdit.pos_embed.copy_(sincos_grid(cfg.pos_grid, cfg.width))
    initialise(mmdit)
    return mmdit, TextEncoders(towers[0], towers[1], clip_tokenizer(merges), ctx_dim), merges


def export(path: Path, mmdit: MMDiT, text: TextEncoders, vae: VAE, merges: list[str], note: dict) -> None:
    """ONE file in SD3's key layout, fp16; the tokenizer's merges and the presets travel in its header."""
    parts = {"mmdit": mmdit, "vae": vae, "clip_l": text.clip_l, "clip_g": text.clip_g}
    sd = {weights.PREFIXES[part] + k: v.detach().half().cpu().contiguous() for part, m in parts.items()
          for k, v in m.state_dict().items()}
    presets = dict(block=mmdit.config.depth // 2, size=scenes.SIDE, steps=28, shift=3.0, noise_steps=8, cfg=3.0,
                   batch=16)
    save_file(sd, path.with_suffix(".tmp"), {"merges": json.dumps(merges), "presets": json.dumps(presets),
                                             "trained": json.dumps(note)})
    os.replace(path.with_suffix(".tmp"), path)


def train_mmdit(run: Path, args: argparse.Namespace, vae: VAE) -> None:
    """Eq. 2 on cached latents; Muon for the matrices inside the blocks, AdamW for the rest, EMA of all."""
    device = args.device
    latents = torch.from_numpy(np.load(run / "latents.npy"))                            # (n, C, h, w) fp16
    facts = [scenes.Scene(None, None, stuff, [scenes.Thing(*t) for t in things])
             for stuff, things in json.loads((run / "facts.json").read_text())]
    mmdit, text, merges = build(args, latents.shape[1])
    model = nn.ModuleDict({"mmdit": mmdit, "clip_l": text.clip_l, "clip_g": text.clip_g}).to(device)
    ema = copy.deepcopy(model)
    opts = optimisers(model, lambda name, p: p.ndim == 2 and "adaLN" not in name
                      and ("joint_blocks" in name or "layers" in name), args.lr)
    step, samples, spent, log = 0, 0, 0.0, []
    if (run / "mmdit.pt").exists():
        state = torch.load(run / "mmdit.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"]), ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        step, samples, spent, log = state["step"], state["samples"], state["spent"], state["log"]
    kind = torch.device(device).type
    velocity = torch.compile(mmdit, dynamic=False) if args.compile else mmdit
    rng, generator = np.random.default_rng([args.seed, step]), torch.Generator().manual_seed(args.seed + step)
    start, begun, losses, snapshot = time.time(), spent, [], time.time()
    bar = tqdm(total=args.samples, initial=samples, desc="MM-DiT", unit="sample", mininterval=10)

    def keep(tag=""):
        write_tensors(run / "mmdit.pt", dict(model=model.state_dict(), ema=ema.state_dict(), step=step, samples=samples,
                                             opts=[o.state_dict() for o in opts], spent=spent, log=log))
        export(run / f"nano{tag}.safetensors", ema["mmdit"], TextEncoders(ema["clip_l"], ema["clip_g"], text.tokenizer,
               text.ctx_dim), vae, merges, dict(samples=samples, seconds=round(spent), scenes=len(latents), seed=args.seed))
        prompts = [scenes.caption(scenes.draw(s), np.random.default_rng(s)) for s in scenes.VAL_SEEDS[:16]]
        images = seg4diff.generate(seg4diff.load(run / f"nano{tag}.safetensors", device), prompts)
        pictures.sheet(images, prompts).save(run / f"samples{tag}.png")

    while samples < args.samples:
        done = samples / args.samples
        idx = rng.integers(0, len(latents), args.batch * (3 if done < args.low else 1))
        z0 = latents[idx].float()                                                       # (B, C, h, w)
        if done < args.low:                              # a cheap start on a quarter of the tokens
            z0 = F.avg_pool2d(z0, 2)
        captions = ["" if rng.random() < 0.1 else scenes.caption(facts[i], rng) for i in idx]
        eps = torch.randn(z0.shape, generator=generator)
        sigma = torch.sigmoid(args.noise_mean + torch.randn(len(z0), generator=generator))   # (B,), logit-normal
        keep_pooled = (torch.rand(len(z0), 1, generator=generator) < args.pooled).to(device)
        z0, eps, sigma = z0.to(device), eps.to(device), sigma.to(device)
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            cond = text.encode(captions)
            z = (1 - sigma)[:, None, None, None] * z0 + sigma[:, None, None, None] * eps     # Eq. 1
            # the pooled vector is mostly withheld, so that words have to come in through attention
            vel, _ = velocity(z, sigma, cond.ctx, cond.pooled * keep_pooled)
        loss = F.mse_loss(vel.float(), eps - z0)                                        # Eq. 2
        optimise(opts, loss, args.lr * min(1, (step + 1) / 200, (1 - done) / args.cooldown + 0.01))  # up, hold, down
        step, samples, spent = step + 1, samples + len(idx), begun + time.time() - start
        with torch.no_grad():
            decay = min(0.998, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {step} steps; the last good state is {run / 'mmdit.pt'}")
        if step % 50 == 0:
            log.append((samples, float(np.mean(losses[-50:]))))
            bar.n = samples
            bar.set_postfix(loss=f"{log[-1][1]:.4f}", minutes=f"{spent / 60:.0f}")
        if time.time() - snapshot > 60 * args.snapshot:
            keep(f"_{samples // 1000:04d}k")
            snapshot = time.time()
    keep()


# ---------------------------------------------------------------------------- 5. presets: which block is the expert

def block_scores(path: Path, limit: int | None = None, device: str = "cpu") -> tuple[list[float], float]:
    """mIoU of every block of a model file on scenes-dev (Fig. 8), and the floor's."""
    model, data = seg4diff.load(path, device), DATASETS["scenes-dev"]()
    variants = [v for v in evaluate.layers(model) if v.kind == "softmax"]
    rows = evaluate.compare(model, data, data.names[:limit], variants)
    return [rows[v.name]["mIoU"] for v in variants], rows["floor"]["mIoU"]


def write_presets(path: Path, **new) -> None:
    """Change presets in a model file's header."""
    with safe_open(path, framework="pt") as f:
        meta, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    meta["presets"] = json.dumps(json.loads(meta["presets"]) | new)
    save_file(tensors, path.with_suffix(".tmp"), meta)
    os.replace(path.with_suffix(".tmp"), path)


def choose_presets(path: Path, device: str) -> None:
    """Write into the file's presets what is best on scenes-dev: the block, as the paper chose SD3's on its benchmarks,
    and for that block how maps of <pad> tokens are scaled and merged.  The only place in this file where masks are
    looked at, after the training is over."""
    miou, _ = block_scores(path, device=device)
    write_presets(path, block=int(np.argmax(miou)))
    model, data = seg4diff.load(path, device), DATASETS["scenes-dev"]()
    variants = evaluate.thresholds(model)
    rows = evaluate.compare(model, data, data.names[:40], variants)
    best = max(variants, key=lambda v: rows[v.name]["mIoU"])
    write_presets(path, threshold=best.threshold, scaling=best.scaling)
    print(f"mIoU on scenes-dev by block: {' '.join(f'{x:.1f}' for x in miou)}; the expert is block {np.argmax(miou)}\n"
          f"<pad> maps: scaled over: {best.scaling}, merged below {best.threshold:g}: {rows[best.name]['mIoU']:.1f}, "
          f"as many random proposals {rows[f'{best.name} floor']['mIoU']:.1f}")


def check(args: argparse.Namespace) -> None:
    """ValueError now, not after the scenes are drawn: what cannot be trained."""
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device} was asked for, but PyTorch sees no CUDA device here; use cpu")
    if args.width % args.head_dim or args.width % 4:
        raise ValueError(f"--width must be a multiple of 4 and of --head-dim, not {args.width}")
    for key in ("scenes", "batch", "batch_vae", "text_layers"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} must be at least 1, not {getattr(args, key)}")


def main(args: argparse.Namespace) -> None:
    check(args)
    args.run.mkdir(parents=True, exist_ok=True)
    world = zlib.crc32((Path(__file__).parent / "scenes.py").read_bytes())           # a run stays in its world
    own = {k: str(getattr(args, k)) for k in ("init", "seed", "scenes", "vae_widths", "width", "depth", "head_dim",
                                              "text_widths", "text_layers", "text_length")} | {"world": str(world)}
    origin = args.run / "origin.json"
    before = json.loads(origin.read_text()) if origin.exists() else own
    if other := [f"{k} {before.get(k)} instead of {own[k]}" for k in own if before.get(k) != own[k]]:
        raise ValueError(f"{args.run} holds a run with {', '.join(other)}; name another --run")
    origin.write_text(json.dumps(own))
    if not (args.run / "images.npy").exists():
        draw_scenes(args.run, args.scenes, scenes.SIDE)
    if args.init:
        vae = VAE.from_state_dict(weights.read(weights.find(args.init), dtype=torch.float32)["vae"], device=args.device)
    else:
        if not (args.run / "vae_done.pt").exists():
            train_vae(args.run, args)
        trained = torch.load(args.run / "vae_done.pt", map_location="cpu", weights_only=True)["vae"]
        vae = VAE.from_state_dict(trained, device=args.device)
    if not (args.run / "latents.npy").exists():
        encode_latents(args.run, vae, args.device)
    train_mmdit(args.run, args, vae)
    choose_presets(args.run / "nano.safetensors", args.device)
    print(f"wrote {args.run / 'nano.safetensors'}; copy it to nano/nano.safetensors to make it the embedded model")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent / "run",
                        help="folder of scenes, latents and state")
    parser.add_argument("--init", type=Path, help="go on from this model file (its VAE too) instead of from nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=24_000, help="distinct training scenes")
    parser.add_argument("--minutes-vae", type=float, default=12)
    parser.add_argument("--batch-vae", type=int, default=4)
    parser.add_argument("--vae-widths", type=int, nargs="+", default=(16, 24, 48, 64))
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term in the VAE's loss")
    parser.add_argument("--samples", type=int, default=150_000, help="that the MM-DiT sees, kills not counted")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, help=f"blocks ({DEPTH}); with --init more than that file's are appended")
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--text-widths", type=int, nargs=2, default=(64, 128), help="CLIP-L's and CLIP-G's stand-in")
    parser.add_argument("--text-layers", type=int, default=1, help="of a text tower; the context is the last but one's")
    parser.add_argument("--text-length", type=int, default=22, help="rows of a text tower, start and end included")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--noise-mean", type=float, default=0.8, help="of the logit-normal sigma; 0 is the middle")
    parser.add_argument("--pooled", type=float, default=0.1, help="how often the pooled text vector is not withheld")
    parser.add_argument("--low", type=float, default=0.4, help="share of the samples seen as 2x2-pooled latents first")
    parser.add_argument("--cooldown", type=float, default=0.25, help="share of the samples in which the rate falls to zero")
    parser.add_argument("--snapshot", type=float, default=8, help="minutes between saved states")
    parser.add_argument("--compile", action="store_true", help="torch.compile the MM-DiT; needs a C++ compiler")
    command(main, parser)

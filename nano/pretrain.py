"""How nano was made: one command from nothing to nano.safetensors.

    python nano/pretrain.py --samples 150000              # on CPU; again after a kill: goes on where it stopped
    python nano/pretrain.py --init nano/nano.safetensors --low 0 --run nano/run/more     # trains nano on
    python nano/pretrain.py --init nano/run/nano.safetensors --depth 8 --low 0 --run nano/run/grown  # adds blocks
    python nano/pretrain.py --arch flux --vae nano/nano.safetensors --run nano/run/flux     # Flux's architecture
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
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import write_array_header_1_0
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import protocol  # noqa: E402
import seg4diff  # noqa: E402
from flux import Flux  # noqa: E402
from mmdit import MMDiT, MMDiTConfig  # noqa: E402
from nano import scenes  # noqa: E402
from nano.flux_model import new_flux  # noqa: E402
from nano.train_vae import LATENT, encode_latents, train_vae  # noqa: E402
from nano.training import Progress, check_trained, claim_run, optimise, optimisers, resume, save_state  # noqa: E402
from support import pictures, weights  # noqa: E402
from support.checkpoint import pick_device  # noqa: E402
from support.cli import Parser, at_least, command, positive, show  # noqa: E402
from support.data import DATASETS  # noqa: E402
from support.files import decoding, read_json, replacing, write_json, write_picture  # noqa: E402
from text import HEAD_DIM, CLIPText, FluxText, TextEncoders, clip_tokenizer  # noqa: E402
from vae import VAE, groups_of  # noqa: E402

# What a run cannot change on the way.
FIXED = ("arch", "init", "vae", "seed", "scenes", "vae_widths", "width", "depth", "flux_blocks", "mlp_ratio",
         "head_dim", "text_widths", "text_layers", "text_length")

# ---------------------------------------------------------------------------- 1. scenes


def draw_scenes(run: Path, n: int) -> None:
    """images.npy (n, side, side, 3) uint8 and facts.json, what captions are made of; all cores."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, scenes.SIDE, scenes.SIDE, 3)}
    facts = []
    with replacing(run / "images.npy") as new, open(new, "wb") as f:
        write_array_header_1_0(f, header)
        with Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:         # Ctrl-C is this process's
            drawn = pool.imap(scenes.draw, scenes.TRAIN_SEEDS[:n], chunksize=32)
            for scene in tqdm(drawn, total=n, desc="scenes", mininterval=5):
                f.write(scene.image.tobytes())
                facts.append((scene.stuff, scene.things))
        write_json(run / "facts.json", facts)


def read_facts(path: Path, n: int) -> list[scenes.Scene]:
    """The scenes of facts.json, without their pictures.  Broken: it is cut, or not of `n` scenes of this world."""
    facts = []
    with decoding(path, "list of scenes"):
        for stuff, things in read_json(path, list):
            scene = scenes.Scene(None, None, stuff, [scenes.Thing(*thing) for thing in things])
            known = set(scene.stuff) <= {*scenes.STUFF}
            for thing in scene.things:
                known = known and thing.name in scenes.THINGS and thing.colour in scenes.COLOURS
            if not known:
                raise ValueError(f"there is no such scene: {str([stuff, things])[:80]}")
            facts.append(scene)
        if len(facts) != n:
            raise ValueError(f"it holds {len(facts)} scenes, not {n}")
    return facts


# --------------------------------------------------------------------------- 2, 3: train_vae.py; 4. text towers, MM-DiT


def word_merges(words: list[str]) -> list[str]:
    """Byte-pair merges under which every given word is one token; other words fall apart into pieces.

    The pair that occurs most often is merged first, of those that occur as often the first in the alphabet.
    """
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while True:
        found = Counter(pair for pieces in split for pair in pairwise(pieces))
        if not found:
            return merges
        left, right = min(found, key=lambda pair: (-found[pair], pair))
        merges.append(f"{left} {right}")
        for pieces in split:
            for i in range(len(pieces) - 1, 0, -1):
                if pieces[i - 1:i + 1] == [left, right]:
                    pieces[i - 1:i + 1] = [left + right]


def sincos_grid(side: int, width: int) -> Tensor:
    """(1, side*side, width): the first half of the width encodes the column, the second the row."""
    freq = 10000 ** (-torch.arange(width // 4) / (width / 4))                           # (width/4,)
    angle = torch.arange(side)[:, None] * freq                                          # (side, width/4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)                                 # (side, width/2)
    columns = line[None].expand(side, side, -1)                                         # (side, side, width/2)
    rows = line[:, None].expand(side, side, -1)                                         # (side, side, width/2)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, width)


ZEROS = ("adaLN", "_mod.lin", "modulation.lin", "final_layer.linear")       # gates and output, SD3's and Flux's


def initialise(mmdit: MMDiT | Flux) -> None:
    """Xavier for matrices, zero for gates and output: every block starts as the identity."""
    for name, p in mmdit.named_parameters():
        if any(part in name for part in ZEROS) or name.endswith("bias"):
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


def new_model(args: argparse.Namespace, latent: int) -> tuple[MMDiT | Flux, TextEncoders | FluxText, list[str]]:
    """MM-DiT (q/k-normed, so that its head width can be read off the file), two small CLIP towers, merges.

    With --arch flux: a Flux, T5 and CLIP-L.
    """
    torch.manual_seed(args.seed)
    merges = word_merges(scenes.words())
    if args.arch == "flux":
        flux, text = new_flux(args, latent, scenes.words(), merges)
        initialise(flux)
        return flux, text, merges
    vocab = 2 * 256 + len(merges) + 2
    towers = []
    for width, is_l in zip(args.text_widths, (True, False)):
        towers.append(CLIPText(vocab, args.text_length, width, 2 * width, args.text_layers, quick_gelu=is_l,
                               project=0 if is_l else width))
    for tower in towers:
        nn.init.normal_(tower.text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(tower.text_model.embeddings.position_embedding.weight, std=0.1)
    pooled = sum(args.text_widths)
    ctx_dim = 256 * math.ceil(pooled / 256)
    mmdit = MMDiT(MMDiTConfig(width=args.width, depth=args.depth or 6, head_dim=args.head_dim, patch=1, channels=latent,
                              pos_grid=24, ctx_dim=ctx_dim, pooled_dim=pooled, mlp=args.mlp_ratio * args.width,
                              time_dim=128, qk_norm=True))
    mmdit.pos_embed.copy_(sincos_grid(24, args.width))
    initialise(mmdit)
    return mmdit, TextEncoders(*towers, clip_tokenizer(merges), ctx_dim), merges


def read_model(args: argparse.Namespace) -> tuple[MMDiT | Flux, TextEncoders | FluxText, list[str], VAE]:
    """MM-DiT, text encoders, merges and VAE of the file --init, with more blocks if --depth says so.

    ValueError: a Flux cannot grow.
    """
    model = seg4diff.load(args.init, "cpu", torch.float32)
    mmdit = model.transformer
    if args.depth is not None:
        if isinstance(mmdit, Flux):
            raise ValueError(f"{args.init} is a Flux, to which --depth adds no blocks")
        torch.manual_seed(args.seed)
        mmdit = grow(mmdit, args.depth)
    merges = weights.merges(weights.find(args.init))
    return mmdit.requires_grad_(True).train(), model.text.requires_grad_(True).train(), merges, model.vae


def export(path: Path, mmdit: MMDiT | Flux, text: TextEncoders | FluxText, vae: VAE, merges: list[str], trained: dict
           ) -> None:
    """ONE file in SD3's key layout, fp16; what the tokenizers are made of and the presets travel in its header.

    ValueError: a weight is not finite in fp16.
    """
    sd = {}
    for part, module in (("mmdit", mmdit), ("vae", vae), *text.named_children()):
        for key, value in module.state_dict().items():
            sd[weights.PREFIXES[part] + key] = value.detach().half().cpu().contiguous()
    check_trained(sd)
    presets = {"block": mmdit.config.depth // 2, "size": scenes.SIDE, "steps": 28, "shift": 3.0, "noise_steps": 8,
               "cfg": 3.0, "batch": 16}
    header = {"merges": merges, "presets": presets, "trained": trained}
    if isinstance(text, FluxText):
        presets["text_length"] = text.length
        header["t5_tokenizer"] = json.loads(text.tokenizer.to_str())
    write_model(path, sd, {key: json.dumps(value) for key, value in header.items()})


def write_model(path: Path, sd: dict[str, Tensor], header: dict[str, str]) -> None:
    """A model file that is there as a whole or not at all."""
    with replacing(path) as new:
        save_file(sd, new, header)


def is_block_matrix(name: str, p: Tensor) -> bool:
    """Whether Muon trains this parameter of MM-DiT or text towers."""
    inside = any(part in name for part in ("joint_blocks", "layers", "double_blocks", "single_blocks", "encoder.block"))
    return p.ndim == 2 and inside and not any(part in name for part in (*ZEROS, "relative_attention_bias"))


def train_mmdit(run: Path, args: argparse.Namespace, vae: VAE, mmdit: MMDiT | Flux, text: TextEncoders | FluxText,
                merges: list[str], latents: Tensor, facts: list[scenes.Scene]) -> None:
    """Eq. 2 on cached latents (n, C, h, w); Muon for the matrices inside the blocks, AdamW for the rest, EMA of all.

    ValueError: the loss or a weight is not finite.
    """
    device = args.device
    model = nn.ModuleDict({"mmdit": mmdit, "text": text}).to(device)
    ema = copy.deepcopy(model)
    opts = optimisers(model, is_block_matrix, args.lr)
    progress = Progress()
    resume(run / "mmdit.pt", {"model": model, "ema": ema}, opts, progress, args.origin)
    rng = np.random.default_rng([args.seed, progress.step])
    generator = torch.Generator().manual_seed(args.seed + progress.step)
    velocity = torch.compile(mmdit, dynamic=False) if args.compile else mmdit
    losses = []

    def keep(tag: str = "") -> None:
        path = run / f"nano{tag}.safetensors"
        trained = {"samples": progress.samples, "seconds": round(progress.spent), "scenes": len(latents),
                   "seed": args.seed}
        export(path, ema["mmdit"], ema["text"], vae, merges, trained)       # first: it is the stricter about inf
        save_state(run / "mmdit.pt", {"model": model, "ema": ema}, opts, progress, args.origin)
        prompts = [scenes.caption(scenes.draw(s), np.random.default_rng(s)) for s in scenes.VAL_SEEDS[:16]]
        images = seg4diff.generate(seg4diff.load(path, device), prompts)
        write_picture(run / f"samples{tag}.png", pictures.sheet(images, prompts))

    start = time.time() - progress.spent
    kept = time.time()
    bar = tqdm(total=args.samples, initial=progress.samples, desc="MM-DiT", unit="sample", mininterval=10)
    while progress.samples < args.samples:
        done = progress.samples / args.samples
        low = done < args.low                            # a cheap start on a quarter of the tokens
        # on a quarter of the tokens three times the pictures take about as long
        idx = rng.integers(0, len(latents), 3 * args.batch if low else args.batch)
        z0 = latents[idx].to(device).float()                                            # (B, C, h, w)
        if low:
            z0 = F.avg_pool2d(z0, 2)                                                    # (B, C, h/2, w/2)
        # a tenth without words: classifier-free guidance and the maps of <pad> need the empty prompt
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
        fall = (1 - done) / max(args.cooldown, 1e-9) + 0.01
        rate = min(1, (progress.step + 1) / 200, fall)                                  # warm up, hold, fall
        losses.append(optimise(opts, loss, args.lr * rate))
        progress.step += 1
        progress.samples += len(idx)
        progress.spent = time.time() - start
        decay = min(0.998, (1 + progress.step) / (10 + progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
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
    show(f"mIoU on scenes-dev by block: {' '.join(f'{x:.1f}' for x in miou)}; the expert is block {block}\n"
         f"<pad> maps: scaled over: {best.scaling}, merged below {best.threshold:g}: {rows[best.name]['mIoU']:.1f}, "
         f"as many random proposals {rows[f'{best.name} floor']['mIoU']:.1f}")


# ---------------------------------------------------------------------------- command line


def check(args: argparse.Namespace) -> None:
    """ValueError: sizes that do not go together, one sentence each."""
    if args.width % args.head_dim or args.width % 4:
        raise ValueError(f"--width must be a multiple of 4 and of --head-dim, not {args.width}")
    if args.arch == "flux" and (args.head_dim % 32 or args.text_widths[1] % args.head_dim):
        raise ValueError("with --arch flux --head-dim must be a multiple of 32, which the rotation needs, and T5's of "
                         f"--text-widths a multiple of it, not {args.head_dim} and {args.text_widths[1]}")
    if any(width % HEAD_DIM for width in args.text_widths):
        raise ValueError(f"--text-widths must be multiples of {HEAD_DIM}, the width of a head, not {args.text_widths}")
    groups = groups_of(args.vae_widths)
    if not 4 <= len(args.vae_widths) <= 7 or any(width % groups for width in args.vae_widths):
        raise ValueError("--vae-widths must be 4 to 7 multiples of 4, or of 32 if the first is one, not "
                         f"{args.vae_widths}")


def claim(args: argparse.Namespace) -> dict[str, str]:
    """Make --run this run's folder; the run's settings.  ValueError: it holds a run that began with other settings."""
    settings = {key: str(getattr(args, key)) for key in FIXED}
    for key in ("init", "vae"):
        if getattr(args, key):
            settings[key] += f" ({weights.fingerprint(weights.find(getattr(args, key)))})"
    settings["world"] = str(zlib.crc32((Path(__file__).parent / "scenes.py").read_bytes()))
    claim_run(args.run, settings)
    return settings


def main(args: argparse.Namespace) -> None:
    args.device = pick_device(args.device)
    check(args)
    if args.init:
        *networks, vae = read_model(args)                # before the work: most that can be wrong is wrong here
        vae = vae.to(args.device)
    else:
        networks = new_model(args, LATENT)
        if args.vae:
            vae = seg4diff.load(args.vae, args.device, torch.float32).vae
    args.origin = claim(args)
    run = args.run
    if not (run / "images.npy").exists():
        draw_scenes(run, args.scenes)
    facts = read_facts(run / "facts.json", args.scenes)
    if not args.init and not args.vae:
        vae = train_vae(run, args)
    latents = torch.from_numpy(encode_latents(run, vae, args.device, args.scenes))       # (n, C, h, w) fp16
    train_mmdit(run, args, vae, *networks, latents, facts)
    choose_presets(run / "nano.safetensors", args.device)
    embedded = weights.EMBEDDED["nano-flux" if args.arch == "flux" else "nano"]
    show(f"wrote {run / 'nano.safetensors'}; copy it to {embedded} to make it the embedded model")


if __name__ == "__main__":
    share = at_least(0, float, most=1)
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent / "run",
                        help="folder of scenes, latents and state")
    parser.add_argument("--init", type=Path, help="go on from this model file (its VAE too) instead of from nothing")
    parser.add_argument("--arch", choices=("sd3", "flux"), default="sd3", help="whose architecture")
    parser.add_argument("--vae", type=Path, help="take the VAE of this model file instead of training one")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=at_least(0, most=2**32), default=0)
    parser.add_argument("--scenes", type=at_least(1, most=len(scenes.TRAIN_SEEDS)), default=24_000,
                        help="distinct training scenes")
    parser.add_argument("--minutes-vae", type=positive, default=12)
    parser.add_argument("--batch-vae", type=at_least(1, most=1024), default=4)
    parser.add_argument("--vae-widths", type=at_least(4, most=4096), nargs="+", default=[16, 24, 48, 64])
    parser.add_argument("--kl", type=at_least(0, float), default=1e-4, help="weight of the KL term in the VAE's loss")
    parser.add_argument("--samples", type=at_least(0), default=150_000,
                        help="that the MM-DiT sees, kills not counted")
    parser.add_argument("--batch", type=at_least(1, most=4096), default=32)
    parser.add_argument("--width", type=at_least(4, most=4096), default=128)
    parser.add_argument("--depth", type=at_least(1, most=64),
                        help="blocks (6); with --init more than that file's are appended")
    parser.add_argument("--flux-blocks", type=at_least(1, most=64), nargs=2, default=[3, 3],
                        metavar=("DOUBLE", "SINGLE"), help="blocks of --arch flux (3 3)")
    parser.add_argument("--mlp-ratio", type=at_least(1, most=16), default=4, help="width of an MLP, in block widths")
    parser.add_argument("--head-dim", type=at_least(1, most=4096), default=32)
    parser.add_argument("--text-widths", type=at_least(HEAD_DIM, most=4096), nargs=2, default=[64, 128],
                        help="CLIP-L's and CLIP-G's stand-in; with --arch flux CLIP-L's and T5's")
    parser.add_argument("--text-layers", type=at_least(1, most=64), default=1,
                        help="of a text tower; the context is the last but one's")
    parser.add_argument("--text-length", type=at_least(4, most=1024), default=22,
                        help="rows of a text tower, start and end included")
    parser.add_argument("--lr", type=positive, default=2e-3)
    parser.add_argument("--noise-mean", type=at_least(-20, float, most=20), default=0.8,
                        help="of the logit-normal sigma; 0 is the middle")
    parser.add_argument("--pooled", type=share, default=0.1, help="how often the pooled text vector is not withheld")
    parser.add_argument("--low", type=share, default=0.4, help="share of the samples seen as 2x2-pooled latents first")
    parser.add_argument("--cooldown", type=share, default=0.25,
                        help="share of the samples in which the rate falls to zero")
    parser.add_argument("--snapshot", type=at_least(0, float), default=8, help="minutes between saved states")
    parser.add_argument("--compile", action="store_true", help="torch.compile the MM-DiT; needs a C++ compiler")
    command(main, parser)

"""How the judge of nano's pictures (nano/judge.py) was made: one command from nothing to judge.safetensors.

    python nano/train_judge.py                           # on CPU; again after a kill: goes on where it stopped

It learns from drawn scenes alone; no generated picture is seen.  Two things bring drawn pictures near generated ones.
Softness: half of the scenes go through nano's VAE with a little noise on their latents; all are warped, tinted, blurred
and noised, by other amounts each time.  Failures: in some scenes a thing is rubbed out, halved, or replaced by a lump,
and counts as not there.  From whole things alone the judge would learn that any coloured spot is some thing.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

import seg4diff  # noqa: E402
from nano import scenes  # noqa: E402
from nano.judge import Answers, Judge  # noqa: E402
from nano.scenes import CLASSES, COLOURS, SIDE, STUFF, THINGS, TRAIN_SEEDS, Scene, Thing  # noqa: E402
from nano.train_vae import pixels  # noqa: E402
from nano.training import Progress, check_trained, claim_run, optimise, optimisers, resume, save_state  # noqa: E402
from support import weights  # noqa: E402
from support.cli import Parser, at_least, command, progress, show  # noqa: E402
from support.files import (  # noqa: E402
    check_kind,
    code_stamp,
    decoding,
    make_folder,
    read_tensors,
    replacing,
    write_tensors,
)
from vae import VAE  # noqa: E402

# What the weights depend on, beside nano's: a run that began with other code is not gone on with.
CODE = ("nano/train_judge.py", "nano/judge.py", "nano/training.py", "nano/scenes.py")
SHARD = 250                             # scenes in one file of soft pictures
SAVE = 250                              # steps between two saved states
SPOILT = 0.35                           # share of the scenes one of whose things is spoilt
LATENT_NOISE = 0.35                     # at most; nano's latents have unit variance
SHIFT = 0.08                            # at most, to each side, as a share of the picture
WARP = 0.03                             # at most, of a smooth displacement: generated outlines wobble
TINT = 0.08                             # at most, of each channel's gain and offset
NOISE = 0.05                            # at most, standard deviation in [-1, 1]
PARTS = ("images", "there", "colour", "x")               # of a file of soft pictures
LR = 2e-3                               # of Muon and AdamW, as for nano

# ---------------------------------------------------------------------------- things that are not there


def covered(labels: np.ndarray, thing: Thing) -> np.ndarray:
    """Where a thing is seen, with the two pixels around it that its soft edge may reach.  (SIDE, SIDE) bool."""
    mask = Image.fromarray(labels == CLASSES.index(thing.name)).convert("L")
    return np.asarray(mask.filter(ImageFilter.MaxFilter(5))) > 0


def rub_out(image: np.ndarray, mask: np.ndarray) -> None:
    """Fill the mask, row by row, with the nearest pixel beside it."""
    for y in np.flatnonzero(mask.any(1)):
        free = np.flatnonzero(~mask[y])
        if len(free) > 0:
            gone = np.flatnonzero(mask[y])
            nearest = free[np.abs(free[None] - gone[:, None]).argmin(1)]     # (gone,)
            image[y, gone] = image[y, nearest]


def half_of(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One half of the mask, left, right, upper or lower."""
    axis = rng.integers(2)                               # 0: upper and lower, 1: left and right
    places = np.nonzero(mask)[axis]
    middle = (places.min() + places.max()) / 2
    half = np.mgrid[0:SIDE, 0:SIDE][axis] > middle                           # (SIDE, SIDE)
    return mask & (half if rng.random() < 0.5 else ~half)


def paint_lump(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> None:
    """A shape of no thing, as large as the mask, in a named colour, plain or with the pattern of any thing."""
    yy, xx = np.nonzero(mask)
    cy = (yy.min() + yy.max()) / 2
    cx = (xx.min() + xx.max()) / 2
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = 0.55 + 0.1 * np.sin(2 * angle + rng.uniform(0, 6.3)) + 0.1 * np.sin(3 * angle + rng.uniform(0, 6.3))
    outline = np.stack([cx + radius * np.ptp(xx) * np.cos(angle), cy + radius * np.ptp(yy) * np.sin(angle)], axis=1)
    lump = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(lump).polygon([tuple(point) for point in outline], fill=255)
    inside = np.asarray(lump) > 0                                            # (SIDE, SIDE)
    colour = np.array(COLOURS[rng.choice(list(COLOURS))]) + rng.normal(0, 7, 3)
    image[inside] = colour.clip(0, 255)
    if rng.random() < 0.5:
        other, where = scenes.PATTERNS[rng.choice(THINGS)]
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
        strength = 0.6 * where(x - cx / SIDE, yy.max() / SIDE - y)[inside]   # (pixels inside,)
        mixed = image[inside] + strength[:, None] * (np.array(other) - image[inside])
        image[inside] = mixed.clip(0, 255)


def spoil(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one of its things rubbed out, halved or replaced by a lump; that thing is no longer there."""
    image = scene.image.copy()
    thing = scene.things[rng.integers(len(scene.things))]
    mask = covered(scene.labels, thing)
    how = rng.choice(["nothing", "half", "lump"])
    rub_out(image, half_of(mask, rng) if how == "half" else mask)
    if how == "lump":
        paint_lump(image, mask, rng)
    return scene._replace(image=image, things=[t for t in scene.things if t is not thing])


# ---------------------------------------------------------------------------- soft pictures, made once


def facts(scene: Scene) -> dict[str, Tensor]:
    """What the judge is to answer: there (K,) 0 or 1; colour (things,) an index, -1 for none; x (things,)."""
    there = torch.zeros(len(CLASSES))
    colour = torch.full((len(THINGS),), -1)
    x = torch.zeros(len(THINGS))
    for name in scene.stuff:
        there[CLASSES.index(name)] = 1
    for thing in scene.things:
        k = THINGS.index(thing.name)
        there[len(STUFF) + k] = 1
        colour[k] = list(COLOURS).index(thing.colour)
        x[k] = thing.x
    return {"there": there, "colour": colour, "x": x}


@torch.inference_mode()
def soften(vae: VAE, images: np.ndarray, amount: Tensor, generator: torch.Generator) -> Tensor:
    """Through the VAE, with noise of standard deviation amount (n,) on the latents.

    (n, SIDE, SIDE, 3) uint8 -> (n, 3, SIDE, SIDE) uint8.
    """
    out = []
    for start in range(0, len(images), 10):
        z = vae.encode(pixels(images[start:start + 10], torch.device("cpu")))                # (10, C, h, w)
        z = z + amount[start:start + 10, None, None, None] * torch.randn(z.shape, generator=generator)
        out.append((127.5 * (vae.decode(z) + 1)).clamp(0, 255).round().byte())               # (10, 3, SIDE, SIDE)
    return torch.cat(out)


def make_shard(vae: VAE, seeds: range) -> dict[str, Tensor]:
    """Pictures (n, 3, SIDE, SIDE) uint8 of these scenes and their facts; some scenes are spoilt.

    Every second picture goes through the VAE.  The others stay as drawn, as the VAE is what takes the time.
    """
    drawn = []
    for seed in seeds:
        scene = scenes.draw(seed)
        rng = np.random.default_rng([seed, 1])
        drawn.append(spoil(scene, rng) if rng.random() < SPOILT else scene)
    generator = torch.Generator().manual_seed(seeds[0])
    amount = LATENT_NOISE * torch.rand(len(seeds), generator=generator)      # (n,)
    sharp = np.stack([scene.image for scene in drawn])                       # (n, SIDE, SIDE, 3)
    images = torch.from_numpy(sharp).permute(0, 3, 1, 2).contiguous()        # (n, 3, SIDE, SIDE)
    images[::2] = soften(vae, sharp[::2], amount[::2], generator)
    rows = [facts(scene) for scene in drawn]
    return {"images": images} | {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def soft_scenes(run: Path, n: int) -> dict[str, Tensor]:
    """The first n training scenes as make_shard makes them, kept in --run.  Broken: a file there is damaged."""
    model = None
    shards = []
    with progress("soft scenes", "scene", n) as bar:
        for start in range(0, n, SHARD):
            seeds = TRAIN_SEEDS[start:min(start + SHARD, n)]
            path = run / f"soft_{start:06d}.pt"
            if not path.exists():
                model = model or seg4diff.load("nano", device="cpu", dtype="float32")
                write_tensors(path, make_shard(model.vae, seeds))
            shard = read_tensors(path, "file of soft scenes")
            with decoding(path, "file of soft scenes"):
                for key in PARTS:
                    if len(check_kind(shard, dict, "its content")[key]) != len(seeds):
                        raise ValueError(f"it has not {len(seeds)} scenes; remove it, and it is made anew")
            shards.append(shard)
            bar.update(len(seeds))
    return {key: torch.cat([shard[key] for shard in shards]) for key in PARTS}


# ---------------------------------------------------------------------------- what changes every time


def uniform(shape: tuple[int, ...], most: float, generator: torch.Generator) -> Tensor:
    """Numbers from -most to most."""
    return most * (2 * torch.rand(shape, generator=generator) - 1)


def vary(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, 3, SIDE, SIDE) in [-1, 1], moved, warped, tinted, blurred and noised, each by a random amount.

    Also how far each was moved to the right, (B,), as a share of the width.
    """
    B = len(images)
    moved = uniform((B, 2), SHIFT, generator)                                # (B, 2): x, y
    rough = uniform((B, 2, 5, 5), WARP, generator)
    smooth = F.interpolate(rough, size=images.shape[2:], mode="bicubic", align_corners=True)
    identity = torch.eye(2, 3).expand(B, 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)  # (B, SIDE, SIDE, 2), -1 to 1
    grid = grid + 2 * smooth.permute(0, 2, 3, 1) - 2 * moved[:, None, None]
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)              # (B, 3, SIDE, SIDE)
    x = x * (1 + uniform((B, 3, 1, 1), TINT, generator)) + uniform((B, 3, 1, 1), TINT, generator)
    blurred = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.lerp(x, blurred, torch.rand((B, 1, 1, 1), generator=generator))
    noise = torch.randn(x.shape, generator=generator)
    x = x + NOISE * torch.rand((B, 1, 1, 1), generator=generator) * noise
    return x.clamp(-1, 1), moved[:, 0]


# ---------------------------------------------------------------------------- training


def is_kernel(name: str, p: Tensor) -> bool:
    """Whether Muon trains this parameter: the convolutions that make features of features."""
    return p.ndim == 4 and "stem" not in name and "where" not in name


def loss_of(answers: Answers, there: Tensor, colour: Tensor, x: Tensor) -> Tensor:
    """Cross-entropies of presence and colour, and the distance of centres; the last two of things that are there."""
    loss = 4 * F.binary_cross_entropy_with_logits(answers.there, there)
    is_there = colour >= 0                                                   # (B, things)
    if is_there.any():
        loss = loss + F.cross_entropy(answers.colour[is_there], colour[is_there])
        loss = loss + 2 * (answers.x - x).abs()[is_there].mean()
    return loss


def main(args: argparse.Namespace) -> None:
    make_folder(args.out.parent)                         # not after the work
    origin = {key: str(getattr(args, key)) for key in ("scenes", "steps", "seed", "batch")}
    origin["nano"] = weights.fingerprint(weights.find("nano"))
    origin["code"] = code_stamp(CODE)
    claim_run(args.run, origin)
    data = soft_scenes(args.run, args.scenes)
    n = len(data["images"])
    torch.manual_seed(args.seed)
    judge = Judge().to(memory_format=torch.channels_last)                    # a third faster on a CPU
    opts = optimisers(judge, is_kernel, LR)
    done = Progress()
    resume(args.run / "judge.pt", {"judge": judge}, opts, done, origin)
    with progress("judge", "step", args.steps, done.step) as bar:
        while done.step < args.steps:
            generator = torch.Generator().manual_seed(1_000_000 * args.seed + done.step)
            rows = torch.randint(n, (args.batch,), generator=generator)      # (B,)
            images, moved = vary(data["images"][rows] / 127.5 - 1, generator)
            place = data["x"][rows] + moved[:, None]                         # (B, things)
            loss = loss_of(judge(images), data["there"][rows], data["colour"][rows], place)
            rate = min(1, (done.step + 1) / 100, 2 * (1 - done.step / args.steps))           # warm up, hold, fall
            value = optimise(opts, loss, LR * rate)
            done.step += 1
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            if done.step % SAVE == 0 or done.step == args.steps:
                save_state(args.run / "judge.pt", {"judge": judge}, opts, done, origin)
    check_trained(judge.state_dict())
    with replacing(args.out) as new:
        save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, new)
    show(f"wrote {args.out}; what it is worth: python nano/judge.py --check")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent / "run" / "judge",
                        help="folder of soft scenes and state")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("judge.safetensors"))
    parser.add_argument("--scenes", type=at_least(1, most=len(TRAIN_SEEDS)), default=8000)
    parser.add_argument("--steps", type=at_least(1), default=700)
    parser.add_argument("--batch", type=at_least(1), default=32)
    parser.add_argument("--seed", type=at_least(0, most=10 ** 9), default=0)
    command(main, parser)

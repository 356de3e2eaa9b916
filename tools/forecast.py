"""What full-size models will take on a device, without their weights: bytes counted, seconds from a short burst.

    python tools/forecast.py                             # the tables of docs/gpu.md
    python tools/forecast.py --memory 8 24 --tflops 80   # for these cards, at a speed that you know

`python seg4diff.py doctor` measures the speed and says what it means on your machine.
"""
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import torch
from torch import nn

import readings  # noqa: E402
from loading import what_waits  # noqa: E402
from mmdit import i2t_attention  # noqa: E402
from support.cli import Parser, command, positive, show  # noqa: E402
from tools import costs  # noqa: E402
from tools.bench import seconds  # noqa: E402
from tools.costs import Shapes  # noqa: E402

# ---------------------------------------------------------------------------- does it fit


class Need(NamedTuple):
    """Bytes that a task needs: on the device, and of it for what is computed; in host memory for blocks that wait."""
    device: float
    work: float
    host: float
    waiting: tuple[str, ...]


def need(shapes: Shapes, task: str, dtype: torch.dtype, kind: str, free: float, batch: int = 1) -> Need:
    """What a task needs where so many bytes are free on the device; loading.what_waits decides what waits outside."""
    sizes = costs.values(shapes, segment_only=task == "segment")
    waiting = what_waits(sizes, dtype, free) if kind == "cuda" else ()
    if task == "magnet":                                 # blocks that wait are copied, and a copy learns nothing
        waiting = tuple(part for part in waiting if part != "mmdit")
    held = sum(sizes.values())
    host = 0
    for part in waiting:
        blocks = shapes.t5xxl.encoder.block if part == "t5xxl" else shapes.mmdit.blocks
        counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
        if part == "mmdit" and task == "segment":
            counts = counts[:shapes.preset.block + 1]
        host += sum(counts)
        held += max(counts) - sum(counts)                # one block at a time comes over
    work = costs.work_bytes(shapes, task, dtype, kind, batch)
    return Need(held * dtype.itemsize + work, work, host * dtype.itemsize, waiting)


RESERVE = 1e9                           # bytes of a GPU that PyTorch and its libraries take for themselves, about


def usable(memory: float, kind: str) -> float:
    """Of a device's memory, what is left for a model."""
    return memory - RESERVE if kind == "cuda" else memory


def way_out(shapes: Shapes, task: str, dtype: torch.dtype, half: torch.dtype | None, kind: str, memory: float,
            batch: int, host: float = math.inf) -> str | None:
    """The options that make a task fit: "" where none is needed, None where none helps.

    half: the 16 bits that this device is good at, None if it is at none.  MAGNET is refused in float16.  host: bytes of
    the machine's memory, where blocks of a GPU wait.
    """
    ways = [("", dtype, batch)]
    if dtype == torch.float32 and half is not None and not (task == "magnet" and half == torch.float16):
        ways.append((f"--dtype {str(half).removeprefix('torch.')}", half, batch))
    if task == "magnet" and batch > 1:
        ways += [(f"{option} --batch 1".strip(), smaller, 1) for option, smaller, _ in ways]
    free = usable(memory, kind)
    for option, smaller, pictures in ways:
        found = need(shapes, task, smaller, kind, free, pictures)
        if found.device <= free and found.host <= host:
            return option
    return None


# ---------------------------------------------------------------------------- seconds: a short burst, measured


class Rates(NamedTuple):
    """FLOP a second of each kind of work, and bytes a second from host memory to the device."""
    matrix: float
    conv: float
    maps: float
    copy: float


DRAWN = 2 ** 20                         # different numbers in a random weight, which are repeated: quicker, and as good


def random_on(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module of the meta device with small random weights."""
    module = copy.deepcopy(module).to(dtype).to_empty(device=device)
    drawn = 0.02 * torch.randn(DRAWN, device=device)                         # (DRAWN,)
    for p in module.parameters():
        for part in p.data.view(-1).split(DRAWN):                            # (up to DRAWN,)
            part.copy_(drawn[:len(part)])
    return module


LEAST = 0.2                             # seconds that a part of the burst is repeated for


def mean_seconds(call: Callable, device: torch.device, clock: Callable) -> float:
    """Seconds of a call by a clock of (call, device): one to warm up, then the mean of as many as take LEAST."""
    call()
    total = 0.0
    calls = 0
    while total < LEAST:
        total += clock(call, device)
        calls += 1
    return total / calls


STRIP = 8                               # the autoencoder is measured on such a part of a picture's rows


@torch.inference_mode()
def burst(shapes: Shapes, device: torch.device, dtype: torch.dtype, batch: int = 1, clock: Callable = seconds) -> Rates:
    """How fast the device is at one joint block of an SD3, both readings of it, and a residual block of the encoder.

    All at real size with random weights, freed again.  clock: what a call takes, of (call, device).
    """
    N = shapes.image_tokens
    M = shapes.text_tokens
    D = shapes.mmdit.config.width
    side = math.isqrt(N)
    block = random_on(shapes.mmdit.blocks[0], device, dtype)
    x = torch.randn(batch, N, D, device=device, dtype=dtype)                 # (B, N, D)
    text = torch.randn(batch, M, D, device=device, dtype=dtype)              # (B, M, D)
    c = torch.randn(batch, D, device=device, dtype=dtype)                    # (B, D)
    qkv = block(x, text, c, (side, side))[2]
    flop = batch * costs.block_flop(block, N, M).total
    matrix = flop / mean_seconds(lambda: block(x, text, c, (side, side)), device, clock)

    def read():
        for maps, one in zip(i2t_attention(qkv), qkv.each()):                # (H, N, M)
            classes = maps[:, :, 1:4].mean(0).mT.unflatten(1, (side, side))  # (3, h, w)
            readings.i2i_step(one, readings.shares(classes))

    maps = batch * costs.maps_flop(N, M, D) / mean_seconds(read, device, clock)
    residual = random_on(shapes.vae.encoder.down[0].block[0], device, dtype)
    size = shapes.preset.size
    channels = residual.conv1.in_channels
    picture = torch.randn(1, channels, max(1, size // STRIP), size, device=device, dtype=dtype)
    picture = picture.contiguous(memory_format=torch.channels_last)          # as vae.encode has it
    pixels = picture.shape[2] * picture.shape[3]
    conv = 2 * pixels * costs.weights_in(residual) / mean_seconds(lambda: residual(picture), device, clock)
    speed = math.inf
    if device.type == "cuda":
        moved = torch.empty(2 ** 26, dtype=torch.int32)  # 256 MB
        speed = moved.nbytes / mean_seconds(lambda: moved.to(device), device, clock)
    return Rates(matrix, conv, maps, speed)


def picture_seconds(shapes: Shapes, task: str, rates: Rates, wanted: Need, dtype: torch.dtype) -> float:
    """Seconds of one picture of a task."""
    work = costs.TASKS[task](shapes)
    total = work.matrix / rates.matrix + work.conv / rates.conv + work.maps / rates.maps
    sizes = costs.values(shapes, segment_only=task == "segment")
    for part in wanted.waiting:
        times = work.prompts if part == "t5xxl" else work.passes
        total += times * sizes[part] * dtype.itemsize / rates.copy
    return total


def human(duration: float) -> str:
    """Seconds as a person says them."""
    for unit, length in (("years", 31557600), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if duration >= 2 * length:
            digits = 0 if duration >= 10 * length else 1
            return f"{duration / length:.{digits}f} {unit}"
    return f"{1000 * duration:.0f} ms"


# ---------------------------------------------------------------------------- tables


PARTS = {"t5xxl": "T5", "mmdit": "the transformer"}
NAMES = {"segment": "segmentation", "generate": "generation", "magnet": "MAGNET, batch 4"}
BATCH = {"segment": 1, "generate": 1, "magnet": 4}       # presets and recipes of the published models


def waits(parts: tuple[str, ...]) -> str:
    """Which parts wait in host memory, in words."""
    return f"{' and '.join(PARTS[part] for part in parts)} waiting"


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def counted_table(dtype: torch.dtype, tflops: float) -> list[str]:
    """Bytes and operations of each model and task on a CUDA device, and seconds at one speed for all of it."""
    lines = [row("", "", "weights [GB]", "work [GB]", "sum [GB]", "TFLOP a picture", f"s at {tflops:g} TFLOP/s"),
             row(*["---"] * 7)]
    for name in costs.TRANSFORMERS:
        shapes = costs.published(name)
        for task, what in NAMES.items():
            found = need(shapes, task, dtype, "cuda", math.inf, BATCH[task])
            work = costs.TASKS[task](shapes)
            total = (work.matrix + work.conv + work.maps) / 1e12
            lines.append(row(name, what, f"{(found.device - found.work) / 1e9:.1f}", f"{found.work / 1e9:.1f}",
                             f"{found.device / 1e9:.1f}", f"{total:.1f}", f"{total / tflops:.2g}"))
    return lines


def cards_table(dtype: torch.dtype, sizes: list[float]) -> list[str]:
    """What fits cards of these GB: "fits", which parts wait in host memory, the option that helps, or "no"."""
    lines = [row("", "", *[f"{size:g} GB" for size in sizes]), row(*["---"] * (2 + len(sizes)))]
    for name in costs.TRANSFORMERS:
        shapes = costs.published(name)
        for task, what in NAMES.items():
            cells = []
            for size in sizes:
                option = way_out(shapes, task, dtype, dtype, "cuda", 1e9 * size, BATCH[task])
                waiting = need(shapes, task, dtype, "cuda", usable(1e9 * size, "cuda"), BATCH[task]).waiting
                if option is None:
                    cells.append("no")
                    continue
                cell = f"`{option}`" if option else "fits"
                if waiting:
                    cell += f", {waits(waiting)}"
                cells.append(cell)
            lines.append(row(name, what, *cells))
    return lines


def main(args):
    dtype = getattr(torch, args.dtype)
    show(f"counted, {args.dtype} on CUDA; {RESERVE / 1e9:g} GB for PyTorch itself comes on top:\n")
    for line in counted_table(dtype, args.tflops):
        show(line)
    show(f"\ncounted, cards of so many GB of which {RESERVE / 1e9:g} GB is PyTorch's own:\n")
    for line in cards_table(dtype, args.memory):
        show(line)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--memory", type=positive, nargs="+", default=[8, 12, 16, 24, 80], help="of cards, in GB")
    parser.add_argument("--tflops", type=positive, default=50, help="a speed that the card keeps up (50)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    command(main, parser)

"""What two shortcuts are worth, as ratios measured in one run: the early exit, and attention without the whole of A.

    python bench.py                                      # nano, on the CPU or the GPU that is there
    python bench.py --model sd3 --batch-size 4 --device cuda

Both ways of each pair take turns, and their medians are compared.  Peak memory is what a way takes on top of the
model and its input: PyTorch's own count on CUDA, the process's on Linux, n/a elsewhere.
"""
import argparse
import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import seg4diff  # noqa: E402
from mmdit import i2t, i2t_attention, joint_probs  # noqa: E402
from support import weights  # noqa: E402
from support.cli import command  # noqa: E402

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds(way: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, on CUDA until all of it is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    start = time.perf_counter()
    way()
    wait(device)
    return time.perf_counter() - start


def megabytes(way: Callable[[], object], device: torch.device) -> float:
    """Peak memory of one call, beyond what was held before; nan where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not os.access(CLEAR, os.W_OK):
        way()
        return math.nan

    def status(field: str) -> float:
        return next(int(line.split()[1]) / 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)          # give back what earlier calls left in the heap,
    CLEAR.write_text("5")                                                # and count the peak anew from here
    before = status("VmRSS")
    way()
    return status("VmHWM") - before


def compare(title: str, ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> None:
    """Two ways in turns, after a round to warm up and one for the memory; medians, and the first's share of the second's."""
    for way in ways.values():
        way()
    memory = [megabytes(way, device) for way in ways.values()]
    times = [[seconds(way, device) for way in ways.values()] for _ in tqdm(range(repeats), desc=title, leave=False)]
    middle = [median(own) for own in zip(*times)]
    for name, s, mb in zip(ways, middle, memory):
        print(f"{title:14s} {name:18s} {1000 * s:10.1f} ms {'n/a' if math.isnan(mb) else f'{mb:.1f} MB':>12s}")
    share = f"{memory[0] / memory[1]:.2f} x" if memory[1] > 0 else "n/a"
    print(f"{title:14s} {'ratio':18s} {middle[0] / middle[1]:10.2f} x {share:>12s}")


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    if args.repeats < 1 or args.batch_size is not None and args.batch_size < 1:
        raise ValueError("--batch-size and --repeats must be at least 1")
    model = seg4diff.load(args.model, args.device)
    cfg, block, B = model.transformer.config, model.preset.block, args.batch_size or model.preset.batch
    side = model.preset.size // model.vae.factor
    z = seg4diff.noise((cfg.channels, side, side), range(B)).to(model.device, model.dtype)   # (B, C, side, side)
    sigma, cond = torch.full((B,), model.preset.sigma, device=model.device), model.text.encode([["car", "sky"]] * B)
    print(f"{model.name}, {cfg.depth} blocks, expert {block} · {B} x {model.preset.size} pixels · {model.device}, "
          f"{str(model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads · medians of {args.repeats}")

    sizes = [sum(p.nbytes for p in b.parameters()) / 2**20 for b in model.transformer.joint_blocks]
    print(f"weights of the blocks: {sum(sizes[:block + 1]):.1f} of {sum(sizes):.1f} MB are all that segmentation loads")

    def forward(stop: int | None) -> tuple:
        return model.transformer(z, sigma, cond.ctx, cond.pooled, capture={block}, stop_at=stop)

    compare("MM-DiT", {f"up to block {block}": lambda: forward(block), f"all {cfg.depth} blocks": lambda: forward(None)},
            args.repeats, model.device)
    qkv = forward(block)[1][block]
    compare("attention maps", {"i2t_attention": lambda: i2t_attention(qkv),
                               "i2t(joint_probs)": lambda: i2t(joint_probs(qkv), qkv.n_img)}, args.repeats, model.device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder")
    parser.add_argument("--batch-size", type=int, help="pictures at once (default: the model's preset)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--repeats", type=int, default=10)
    command(main, parser)

"""What shortcuts are worth, as ratios measured in one run: the early exit, attention without the whole of A, the
autoencoder, and all of them in a whole segmentation against the way of the released code.

    python tools/bench.py                                # nano, on the CPU or the GPU that is there
    python tools/bench.py --model sd3 --batch-size 4 --device cuda
    python tools/full_size.py --write sd3_random.safetensors && python tools/bench.py --model sd3_random.safetensors

The two sides of each pair take turns, and their medians are compared.  Peak memory is what a side takes on top of the
model and its input: PyTorch's own count on CUDA, the process's on Linux, nan elsewhere.
"""
import ctypes
import math
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import seg4diff  # noqa: E402
from loading import check_fit, squash  # noqa: E402
from mmdit import i2t, i2t_attention, joint_probs  # noqa: E402
from support.checkpoint import synchronize  # noqa: E402
from support.cli import Parser, add_model_options, at_least, command, show  # noqa: E402

CLEAR = Path("/proc/self/clear_refs")


def seconds(call, device):
    """How long one call takes, until all of it is done on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def resident(field):
    """Memory of this process in MB: VmRSS, what it holds now, or VmHWM, its peak."""
    return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def megabytes(call, device):
    """Peak memory of one call, beyond what was held before; nan where nobody counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if not os.access(CLEAR, os.W_OK):
        call()
        return np.nan
    ctypes.CDLL(None).malloc_trim(0)                     # give back what earlier calls left in the heap,
    CLEAR.write_text("5")                                # and count the peak anew from here
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def compare(title, calls, repeats, device):
    """Two calls in turns, after a round to warm up and one for the memory: medians, and the first's share of the
    second's."""
    for call in calls.values():
        call()
    memory = [megabytes(call, device) for call in calls.values()]
    rounds = []
    for _ in tqdm(range(repeats), desc=title, leave=False):
        rounds.append([seconds(call, device) for call in calls.values()])
    times = 1000 * np.median(rounds, axis=0)
    for name, ms, mb in zip(calls, times, memory):
        show(f"{title:14s} {name:18s} {ms:10.1f} ms {mb:10.1f} MB")
    share = memory[0] / memory[1] if memory[1] > 0 else np.nan
    show(f"{title:14s} {'ratio':18s} {times[0] / times[1]:10.2f} x  {share:10.2f} x")


def plain_block(block, x):
    """A residual block of the autoencoder (vae.ResBlock) as it is usually written: nothing is overwritten in place."""
    y = block.conv1(F.silu(F.group_norm(x, block.norm1.num_groups, block.norm1.weight, block.norm1.bias, 1e-6)))
    y = block.conv2(F.silu(F.group_norm(y, block.norm2.num_groups, block.norm2.weight, block.norm2.bias, 1e-6)))
    return block.nin_shortcut(x) + y


def plain_encode(vae, x):
    """vae.encode as it is usually written, in the contiguous memory format: (B, 3, px, px) -> (B, C, px/8, px/8)."""
    encoder = vae.encoder
    x = encoder.conv_in(x)
    for level in encoder.down:
        for block in level.block:
            x = plain_block(block, x)
        x = level.downsample(x)
    x = plain_block(encoder.mid.block_2, encoder.mid.attn_1(plain_block(encoder.mid.block_1, x)))
    norm = encoder.norm_out
    x = F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, 1e-6))
    mean, _ = encoder.conv_out(x).chunk(2, dim=1)                            # (B, C, px/8, px/8) each
    return (mean - vae.shift) * vae.scale


def square_of(model, image):
    """A picture as the autoencoder takes it, (1, 3, size, size) in [-1, 1]."""
    x = torch.from_numpy(squash(image, model.preset.size).pixels).to(model.device)           # (size, size, 3)
    return (x.permute(2, 0, 1)[None].float() / 127.5 - 1).to(model.dtype)    # (1, 3, size, size)


@torch.inference_mode()
def released_way(model, image, names):
    """One picture's label map and class maps, computed as the released code does it.

    NOTE(official): the autoencoder is written as usual; all blocks run to the end, though nothing after the expert is
    read; and the expert's whole attention matrix is computed beside the fused attention, in the model's dtype.
    """
    z0 = plain_encode(model.vae, square_of(model, image))                    # (1, C, ., .)
    eps = seg4diff.noise(z0.shape[1:], [0]).to(z0.device)                    # (1, C, ., .)
    z = seg4diff.add_noise(z0.float(), eps, model.preset.sigma)              # (1, C, ., .)
    cond = model.text.encode([names])
    block = model.preset.block
    _, taps = model(z, model.preset.sigma, cond.ctx, cond.pooled, capture={block})
    q, k, _, N, grid = taps[block]
    probs = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)                  # (1, H, N+M, N+M)
    mean = i2t(probs, N).float().mean(1)[0]                                  # (N, M)
    maps = torch.stack([mean[:, span].mean(-1).unflatten(0, grid) for span in cond.spans[0]])          # (K, h, w)
    return seg4diff.labels_of(maps, image), maps.cpu()


@torch.inference_mode()
def main(args):
    model = seg4diff.load(args.model, args.device, args.dtype)
    model.preset = model.preset.changed(size=args.size)
    check_fit(model, args.model, segment_only=False)
    cfg = model.transformer.config
    block = model.preset.block
    B = args.batch_size or model.preset.batch
    side = model.preset.size // model.vae.factor
    z = seg4diff.noise((model.vae.channels, side, side), range(args.seed, args.seed + B))     # (B, C, side, side)
    z = z.to(model.device)
    cond = model.text.encode([["car", "sky"]] * B)
    show(f"{model.name}, {cfg.depth} blocks, expert {block}; {B} x {model.preset.size} pixels; {model.device}, "
         f"{model.dtype}, {torch.get_num_threads()} threads; medians of {args.repeats}")
    sizes = [sum(p.nbytes for p in b.parameters()) / 2**20 for b in model.transformer.blocks]
    show(f"weights of the blocks: {sum(sizes[:block + 1]):.1f} of {sum(sizes):.1f} MB are all that segmentation loads")

    def forward(stop):
        return model(z, model.preset.sigma, cond.ctx, cond.pooled, capture={block}, stop_at=stop)

    _, taps = forward(block)
    qkv = taps[block]
    runs = {f"up to block {block}": lambda: forward(block), f"all {cfg.depth} blocks": lambda: forward(None)}
    maps = {"i2t_attention": lambda: i2t_attention(qkv), "i2t(joint_probs)": lambda: i2t(joint_probs(qkv), qkv.n_img)}
    compare("MM-DiT", runs, args.repeats, model.device)
    compare("attention maps", maps, args.repeats, model.device)
    image = Image.effect_noise((640, 480), 64).convert("RGB")
    pixels = square_of(model, image)                                         # (1, 3, size, size)
    encoders = {"here": lambda: model.vae.encode(pixels), "as usual": lambda: plain_encode(model.vae, pixels)}
    compare("autoencoder", encoders, args.repeats, model.device)
    ways = {"here": lambda: seg4diff.segment(model, image, ["car", "sky"]),
            "the released way": lambda: released_way(model, image, ["car", "sky"])}
    compare("whole picture", ways, args.repeats, model.device)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    add_model_options(parser, lora=False)
    parser.add_argument("--batch-size", type=at_least(1, most=1024),
                        help="pictures at once (default: the model's preset)")
    parser.add_argument("--size", type=at_least(1), help="side of the picture in pixels (default: the model's preset)")
    parser.add_argument("--repeats", type=at_least(1), default=10)
    command(main, parser)

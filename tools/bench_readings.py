"""Time and memory of each reading (readings.py), as ratios to the paper's, measured in one run.

    python tools/bench_readings.py                       # nano: a whole call of seg4diff.segment, a picture at a time
    python tools/bench_readings.py --sd3                 # random q, k, v of SD3's size: without the forward pass
    python tools/bench_readings.py --megapixels 12       # what "pixels" takes of a photo, by itself

The readings take turns, and their medians are compared.  Peak memory is what a call takes on top of its input
(tools/bench.py).
"""
import json
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
from PIL import Image

import readings  # noqa: E402
import seg4diff  # noqa: E402
from loading import Preset  # noqa: E402
from mmdit import JointQKV, MMDiTConfig  # noqa: E402
from nano import scenes  # noqa: E402
from support.cli import Parser, at_least, command, show  # noqa: E402
from tools.bench import megabytes, seconds  # noqa: E402

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CLASSES = ["car", "sky", "grass"]


def layout(part):
    """The shapes of a published checkpoint, {key: shape}."""
    return json.loads((ROOT / f"tests/layouts/{part}.json").read_text())


def sd3_qkv(size):
    """Random q, k, v of the shape that a block of SD3 Medium has for a square of `size` pixels."""
    shapes = layout("sd3_medium")
    cfg = MMDiTConfig.from_state_dict({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    factor = 2 ** sum(key.startswith("encoder.") and key.endswith("downsample.conv.weight") for key in layout("vae"))
    side = size // factor // cfg.patch
    clip_rows, _ = layout("clip_l")["text_model.embeddings.position_embedding.weight"]
    tokens = side ** 2 + 2 * clip_rows                                       # with as many zeros in T5's place
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, cfg.heads, tokens, cfg.head_dim, generator=generator) for _ in range(3))
    return JointQKV(q, k, v, side ** 2, (side, side))


def read(qkv, image, reading):
    """From q, k, v to labels, as seg4diff.segment goes: three classes of one token each."""
    spans = [slice(i, i + 1) for i in range(1, 1 + len(CLASSES))]
    attn = seg4diff.class_attention(qkv, [spans])                            # of one picture, (H, K, h, w)
    kind = {"paper": "softmax", "pixels": "i2i"}.get(reading, reading)
    maps = seg4diff.class_maps(seg4diff.joined(kind, attn, [qkv]))           # (K, h, w)
    return seg4diff.labels_of(maps, image, reading)


def compare(title, calls, repeats):
    """Every call in turns, after one to warm up and a round for the memory: medians, and ratios to the first."""
    next(iter(calls.values()))()
    memory = [megabytes(call, CPU) for call in calls.values()]
    times = np.median([[seconds(call, CPU) for call in calls.values()] for _ in range(repeats)], axis=0)
    show(f"{title}, {torch.get_num_threads()} threads, medians of {repeats}")
    for name, ms, mb in zip(calls, 1000 * times, memory):
        show(f"{name:8s} {ms:10.1f} ms {mb:8.1f} MB   x {ms / 1000 / times[0]:.2f} in time")


@torch.inference_mode()
def main(args):
    size = Preset().size                                 # SD3's
    if args.megapixels is not None:
        height = round(math.sqrt(args.megapixels * 1e6 * 3 / 4))
        width = round(height * 4 / 3)
        maps = torch.rand(len(CLASSES), *sd3_qkv(size).grid, generator=torch.Generator().manual_seed(0))
        image = Image.effect_noise((width, height), 50).convert("RGB")
        calls = {r: partial(seg4diff.labels_of, maps, image, r) for r in ("paper", "pixels")}
        compare(f"maps of {len(CLASSES)} classes to labels of {width} x {height} pixels", calls, args.repeats)
        return
    if args.sd3:
        qkv = sd3_qkv(size)
        image = Image.effect_noise((size, size), 50).convert("RGB")
        title = f"q, k, v {tuple(qkv.q.shape)} to labels of {size} x {size} pixels"
        calls = {r: partial(read, qkv, image, r) for r in readings.READINGS}
    else:
        model = seg4diff.load("nano", "cpu")
        image = Image.fromarray(scenes.draw(0).image)
        title = f"segment, nano, one picture of {image.width} x {image.height} pixels"
        calls = {r: partial(seg4diff.segment, model, image, CLASSES, reading=r) for r in readings.READINGS}
    compare(title, calls, args.repeats)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--sd3", action="store_true", help="random q, k, v of SD3's size instead of nano")
    parser.add_argument("--megapixels", type=at_least(0.1, float, most=100),
                        help="size of the photo whose maps are refined")
    parser.add_argument("--repeats", type=at_least(1), default=5)
    command(main, parser)

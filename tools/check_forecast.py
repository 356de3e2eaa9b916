"""Forecast against measured, on this machine and in turns, as other work on it changes its speed (by busy_seconds).

    python tools/check_forecast.py                       # nano: segmentation and generation
    python tools/check_forecast.py --model sd3           # random weights: segmentation, MAGNET; minutes, 11 GB on a CPU

A round is a burst, which says what the task should take, and the task itself. Only the ratios mean anything.
"""
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
from PIL import Image

import magnet  # noqa: E402
import seg4diff  # noqa: E402
import text  # noqa: E402
from loading import Preset, Seg4Diff  # noqa: E402
from lora import add_lora  # noqa: E402
from mmdit import MMDiT  # noqa: E402
from support.checkpoint import pick_device, pick_dtype  # noqa: E402
from support.cli import Parser, at_least, command, show  # noqa: E402
from support.data import DATASETS, ROOT, TRAINING_SETS  # noqa: E402
from tools import costs, forecast  # noqa: E402
from tools.bench import megabytes, seconds  # noqa: E402

NAMES = ["cat", "dog", "sky"]
PIXELS = 32                             # of a side: 8 a latent, 2 latents a patch, and both for half the side


def random_sd3(device: torch.device, dtype: torch.dtype, preset: Preset, depth: int, whole: bool
               ) -> tuple[Seg4Diff, costs.Shapes]:
    """An SD3 Medium of so many blocks with random weights, and its shapes; whole: it ends with a last block."""
    shapes = costs.published("sd3")
    cfg = replace(shapes.mmdit.config, depth=depth, whole=whole)
    with torch.device("meta"):
        shapes = shapes._replace(mmdit=MMDiT(cfg), preset=preset)
    merges = costs.some_merges(shapes.clip_l.vocab)
    parts = [forecast.random_on(part, device, dtype).requires_grad_(False) for part in shapes[:4]]
    mmdit, vae, clip_l, clip_g = parts
    mmdit.pos_embed.zero_()                              # a buffer, which nothing else fills
    words = text.TextEncoders(clip_l, clip_g, text.clip_tokenizer(merges), cfg.ctx_dim)
    return Seg4Diff(mmdit, vae, words, preset, "random sd3", ""), shapes


def training_step(model: Seg4Diff) -> Callable:
    """A new LoRA, and what runs a picture of MAGNET through it, a drawn scene, encoders included."""
    params = add_lora(model.transformer, generator=torch.Generator().manual_seed(0))
    model.transformer.checkpointing = True
    data = TRAINING_SETS["scenes"](ROOT, None)

    def step():
        batch = [magnet.features(model, data.read(data.names[0]), by_name=False)]
        magnet.gradient(model, params, [(batch, [0])], magnet.Settings())
    return step


def busy_seconds(call: Callable, device: torch.device) -> float:
    """Seconds of a call; on the CPU those that it worked, on one thread, not those that it waited for others."""
    if device.type != "cpu":
        return seconds(call, device)
    start = time.process_time()
    call()
    return (time.process_time() - start) / torch.get_num_threads()


def compare(shapes: costs.Shapes, task: str, call: Callable, model: Seg4Diff, batch: int, rounds: int) -> None:
    """Prints seconds and bytes of `call`, a batch of a task, as foretold and as measured."""
    need = forecast.need(shapes, task, model.dtype, model.device.type, np.inf, batch)
    taken = 2 ** 20 * megabytes(call, model.device)      # also warms up
    held = (need.device - need.work) / 1e9
    show(f"{task:9s} {need.work / 1e9:8.2f} GB foretold {taken / 1e9:7.2f} GB measured  {need.work / taken:5.2f} x, "
         f"above the weights' {held:.1f} GB")
    for _ in range(rounds):
        rates = forecast.burst(shapes, model.device, model.dtype, batch, busy_seconds)
        told = batch * forecast.picture_seconds(shapes, task, rates, need, model.dtype)
        taken = busy_seconds(call, model.device)
        show(f"{task:9s} {told:8.2f} s foretold  {taken:7.2f} s measured   {told / taken:5.2f} x")


def check_sd3(device, dtype, rounds, size):
    """Segmentation by the ten blocks that it loads; a step of MAGNET through four blocks, half the size."""
    preset = Preset(size=size)
    model, shapes = random_sd3(device, dtype, preset, preset.block + 1, whole=False)
    picture = Image.effect_noise((500, 375), 64).convert("RGB")
    call = partial(seg4diff.segment, model, picture, NAMES, reading=["paper", "i2i"])
    compare(shapes, "segment", call, model, 1, rounds)
    del model, call
    model, shapes = random_sd3(device, dtype, Preset(block=2, size=size // 2), 4, whole=True)
    compare(shapes, "magnet", training_step(model), model, 1, rounds)


def check_nano(device, dtype, rounds):
    """Segmentation and four steps of the sampler, a batch each."""
    model = seg4diff.load("nano", device, dtype)
    model.preset = model.preset.changed(steps=4, noise_steps=0, level=model.preset.sigma)
    shapes = costs.shapes_of(model)
    B = model.preset.batch
    scenes = DATASETS["scenes-dev"](ROOT)
    pictures = [scenes.read(name).image for name in scenes.names[:B]]
    call = partial(seg4diff.segment, model, pictures, [NAMES] * B, reading=["paper", "i2i"])
    compare(shapes, "segment", call, model, B, rounds)
    compare(shapes, "generate", partial(seg4diff.generate, model, ["cat dog sky"] * B), model, B, rounds)


def main(args):
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.model == "nano" and args.size is not None:
        raise ValueError("--size belongs to --model sd3; nano has a size of its own")
    if args.model == "nano":
        check_nano(device, dtype, args.rounds)
        return
    size = Preset.size if args.size is None else args.size
    if size % PIXELS:
        raise ValueError(f"--size must be a multiple of {PIXELS}, not {size}: MAGNET is measured at half of it")
    check_sd3(device, dtype, args.rounds, size)


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=["nano", "sd3"], default="nano", help="nano, or sd3 with random weights")
    parser.add_argument("--size", type=at_least(128, most=2048), help="side of the picture of sd3 (1024)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--rounds", type=at_least(1), default=2)
    command(main, parser)

"""SD3 Medium at full size without its weights: random numbers in its exact layout, one 1024 x 1024 picture.

    python tools/full_size.py                    # writes 6 GB to a temporary folder, prints seconds and peak memory
    python tools/full_size.py --train            # a step of MAGNET, with and without checkpointing
    python tools/full_size.py --write FILE       # the file alone, for tools/bench.py --model FILE
    python tools/full_size.py --model flux       # Flux.1-dev: 18 GB, see tools/full_flux.py

Not a test that pytest collects: it takes minutes and 15 GB on a CPU.  Segmentation is measured twice, by the blocks up
to the expert alone and with all blocks run to the end, each in a process of its own, so that its peak is its own.

--train takes one picture at 128, 192 and 256 pixels and counts what is kept for the backward pass. That is a constant
(the text's rows) and a share for every image token: the attention's kernel keeps no matrix, and of the expert's maps
only the text columns are kept. So the line through the first two sizes is tested on the third, and then says what
1024 pixels would keep.
"""
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import magnet  # noqa: E402
import seg4diff  # noqa: E402
from lora import add_lora  # noqa: E402
from mmdit import i2t_attention  # noqa: E402
from support import weights  # noqa: E402
from support.checkpoint import peak_megabytes, pick_device, synchronize  # noqa: E402
from support.cli import Parser, command, show  # noqa: E402
from support.files import read_json, replacing  # noqa: E402
from tools import full_flux  # noqa: E402
from tools.bench import megabytes  # noqa: E402
from tools.costs import some_merges  # noqa: E402

ROOT = Path(__file__).parent.parent
LAYOUTS = {"mmdit": "sd3_medium", "vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g"}


def write(path, shapes):
    """Random fp16 tensors under the published keys, and as many merges as CLIP's vocabulary has."""
    sd = {}
    generator = torch.Generator().manual_seed(0)
    for part in shapes:
        for key, shape in shapes[part].items():
            scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
            sd[weights.PREFIXES[part] + key] = (scale * torch.randn(shape, generator=generator)).half()
    vocab = len(sd[weights.PREFIXES["clip_l"] + "text_model.embeddings.token_embedding.weight"])
    with replacing(path) as new:
        save_file(sd, new, {"merges": json.dumps(some_merges(vocab))})


@torch.inference_mode()
def segment(path, early, device):
    """Load the file and segment one picture, `early` by the blocks up to the expert alone; prints seconds and peak."""
    start = time.time()
    model = seg4diff.load(path, device, segment_only=early)
    loaded = time.time()
    z0 = seg4diff.encode_image(model, Image.effect_noise((1024, 768), 64).convert("RGB"))    # (1, C, ., .)
    cond = model.text.encode([["cat", "dog", "sky"]])
    synchronize(model.device)
    encoded = time.time()
    block = model.preset.block
    _, taps = model(z0, model.preset.sigma, cond.ctx, cond.pooled, capture={block}, stop_at=block if early else None)
    maps = i2t_attention(taps[block])                                        # (1, H, N, M)
    assert maps.isfinite().all() and maps.sum(-1).max() <= 1.001             # shares of each pixel's attention
    show(f"{loaded - start:.0f} s load, {encoded - loaded:.0f} s VAE and text, {time.time() - encoded:.0f} s MM-DiT")
    show(f"{model.transformer.config.depth} blocks, peak {peak_megabytes(model.device) / 1000:.1f} GB")


def kept_bytes(model, batch):
    """What a forward pass of MAGNET keeps for the backward pass, weights not counted."""
    kept = {}                                            # storage -> its bytes

    def count(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        magnet.batch_losses(model, batch, [0], magnet.Settings())
    for p in model.transformer.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def measure_training(path, sizes, device):
    """Without and with checkpointing, a line for each size: seconds and peak of a step of one picture, bytes kept.

    Returns {checkpointing: [(image tokens, bytes kept), ...]}.
    """
    model = seg4diff.load(path, device)
    transformer = model.transformer
    params = add_lora(transformer, generator=torch.Generator().manual_seed(0))
    show(f"{sum(p.numel() for p in params) / 1e6:.1f} M parameters of the LoRA, {model.device}, {model.dtype}")
    cond = model.text.encode(["cat dog sky"])
    tokens = [(size // model.vae.factor // transformer.config.patch) ** 2 for size in (*sizes, model.preset.size)]
    points = {}
    for checkpointing in (False, True):
        transformer.checkpointing = checkpointing
        show(f"checkpointing {checkpointing}; GB are those kept for the backward pass, and the peak above the weights")
        kept = []
        for size, N in zip(sizes, tokens):
            side = size // model.vae.factor
            masks = torch.rand(8, N, generator=torch.Generator().manual_seed(size)) < 0.3    # (K, N)
            z0 = torch.randn(transformer.config.channels, side, side)        # (C, side, side)
            batch = [magnet.Features(z0, cond.ctx[0].cpu(), cond.pooled[0].cpu(), masks, [])]
            kept.append(kept_bytes(model, batch))
            start = time.time()
            peak = megabytes(partial(magnet.gradient, model, params, [(batch, [0])], magnet.Settings()), model.device)
            show(f"{N} tokens: {time.time() - start:.1f} s, kept {kept[-1] / 1e9:.2f} GB, peak {peak / 1000:.1f} GB")
        slope, constant = np.polyfit(tokens[:2], kept[:2], 1)
        for N in tokens[2:]:
            show(f"by the line through the first two, {N} image tokens: kept {(constant + slope * N) / 1e9:.2f} GB")
        points[checkpointing] = list(zip(tokens, kept))
    return points


def measure_flux(args):
    """Flux's part of `main`.  ValueError: --train or --write, which are for SD3 alone."""
    if args.train or args.write is not None:
        raise ValueError("--train and --write are for sd3 alone, not for flux")
    shapes = {layout: read_json(ROOT / f"tests/layouts/{layout}.json") for layout in full_flux.FILES}
    with tempfile.TemporaryDirectory() as folder:
        full_flux.segment(full_flux.write(Path(folder), shapes), args.device)


def main(args):
    pick_device(args.device)                             # this and the layouts before 6 GB are written
    if args.model == "flux":
        return measure_flux(args)
    shapes = {part: read_json(ROOT / f"tests/layouts/{layout}.json") for part, layout in LAYOUTS.items()}
    if args.write is not None:
        write(args.write, shapes)
        return
    processes = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd3_random.safetensors"
        write(path, shapes)
        if args.train:
            measure_training(path, (128, 192, 256), args.device)
            return
        for early in (True, False):
            try:
                processes.submit(segment, path, early, args.device).result()
            except BrokenProcessPool:
                raise MemoryError from None              # the system ended it


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--model", choices=("sd3", "flux"), default="sd3", help="whose layout (sd3)")
    parser.add_argument("--write", type=Path, help="a file for SD3's random weights, and nothing else")
    parser.add_argument("--train", action="store_true", help="a step of MAGNET instead of segmentation")
    command(main, parser)

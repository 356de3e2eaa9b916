"""SD3 Medium at full size without its weights: random numbers in its exact layout, one 1024 x 1024 picture.

    python tools/full_size.py                    # writes 6 GB to a temporary folder, prints seconds and peak memory
    python tools/full_size.py --train            # a step of MAGNET, with and without checkpointing

Not a test that pytest collects: it takes minutes and 15 GB on a CPU.  Each way runs in a process of its own, so
that its peak memory is its own: the blocks up to the expert alone, and all blocks run to the end.

--train takes one picture at 128, 192 and 256 pixels and counts what is kept for the backward pass. That is a constant
(the text's rows) and a share for every image token: the attention's kernel keeps no matrix, and of the expert's maps
only the text columns are kept. So the line through the first two sizes is tested on the third, and then says what
1024 pixels would keep.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import magnet  # noqa: E402
import seg4diff  # noqa: E402
import text  # noqa: E402
from lora import add_lora  # noqa: E402
from mmdit import i2t_attention  # noqa: E402
from support import weights  # noqa: E402
from support.report import peak_megabytes  # noqa: E402
from tools.bench import megabytes, seconds  # noqa: E402

LISTINGS = {"mmdit": "sd3_medium", "vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g"}


def write(path: Path) -> None:
    """Random fp16 tensors under the published keys, and as many merges as CLIP's vocabulary has."""
    sd, gen = {}, torch.Generator().manual_seed(0)
    for part, listing in LISTINGS.items():
        shapes = json.loads((Path(__file__).parent.parent / "tests/layouts" / f"{listing}.json").read_text())
        for key, shape in shapes.items():
            scale = 1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
            sd[weights.PREFIXES[part] + key] = (scale * torch.randn(shape, generator=gen)).half()
    symbols = text.byte_symbols()
    rows = len(sd[weights.PREFIXES["clip_l"] + "text_model.embeddings.token_embedding.weight"])
    merges = [f"{a} {b}" for a in symbols for b in symbols][:rows - 2 * len(symbols) - 2]
    save_file(sd, path, {"merges": json.dumps(merges)})


def measure(path: Path, way: str, device: str) -> None:
    """Load the file and segment one picture; one line of seconds and peak memory."""
    start = time.time()
    model = seg4diff.load(path, device, segment_only=way == "early")
    loaded = time.time()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (768, 1024, 3), np.uint8))
    x = seg4diff.image_tensor(image, model.preset.size)[None].to(model.device, model.dtype)
    with torch.inference_mode():
        z0 = model.vae.encode(x)
        cond = model.text.encode([["cat", "dog", "sky"]])
        encoded = time.time()
        block = model.preset.block
        sigma = torch.full((1,), model.preset.sigma, device=model.device)
        stop = block if way == "early" else None
        _, taps = model.transformer(z0, sigma, cond.ctx, cond.pooled, capture={block}, stop_at=stop)
        maps = i2t_attention(taps[block])
    assert maps.isfinite().all() and maps.sum(-1).max() <= 1.001       # shares of each pixel's attention
    ran = time.time()
    print(f"{way:6s} {model.transformer.config.depth} blocks loaded, maps {tuple(maps.shape)}: load {loaded - start:.0f} s, "
          f"VAE and text {encoded - loaded:.0f} s, MM-DiT {ran - encoded:.0f} s, "
          f"peak {peak_megabytes(model.device) / 1000:.1f} GB", flush=True)


def measure_training(path: Path, sizes: list[int], device: str) -> dict[bool, list[tuple[int, int]]]:
    """A line for each size without and with checkpointing: seconds and peak of a step of one picture, bytes kept.

    Returns {checkpointing: [(image tokens, bytes kept), ...]}.
    """
    model = seg4diff.load(path, device)
    params = add_lora(model.transformer, generator=torch.Generator().manual_seed(0))
    cond = model.text.encode(["cat dog sky"])
    how = magnet.How(model.preset.block, "tokens", False, "minmax", "logit-normal", 1.0)
    print(f"{sum(p.numel() for p in params) / 1e6:.1f} M parameters of the LoRA, {model.device}, {model.dtype}")
    found: dict[bool, list] = {False: [], True: []}
    for size in sizes:
        side, cfg = size // model.vae.factor, model.transformer.config
        N = (side // cfg.patch) ** 2
        masks = torch.rand(8, N, generator=torch.Generator().manual_seed(size)) < 0.3
        z0 = torch.randn(cfg.channels, side, side)
        batch = [magnet.Features(z0, cond.ctx[0].cpu(), cond.pooled[0].cpu(), masks, [])]
        for model.transformer.checkpointing in (False, True):
            kept = {}

            def count(x: torch.Tensor) -> torch.Tensor:
                if not isinstance(x, torch.nn.Parameter):
                    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x
            with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                loss = magnet.batch_losses(model, batch, [0], how)["loss"]
            weights_of = {p.untyped_storage().data_ptr() for p in model.transformer.parameters()}
            total = sum(n for at, n in kept.items() if at not in weights_of)
            del loss
            took = []
            peak = megabytes(lambda: took.append(seconds(lambda: magnet.gradient(model, params, [(batch, [0])], how),
                                                         model.device)), model.device)
            found[model.transformer.checkpointing].append((N, total))
            print(f"{size:5d} px, {N:5d} image tokens, checkpointing {'on ' if model.transformer.checkpointing else 'off'}: "
                  f"{took[0]:6.1f} s, {total / 1e9:6.2f} GB kept for the backward pass, peak {peak / 1000:.1f} GB above the "
                  "weights", flush=True)
    for way, rows in found.items():
        (n0, b0), (n1, b1), (n2, b2) = rows
        slope = (b1 - b0) / (n1 - n0)
        full = (model.preset.size // model.vae.factor // model.transformer.config.patch) ** 2
        print(f"checkpointing {'on ' if way else 'off'}: {slope / 1e6:.3f} MB for each image token; the line says "
              f"{(b0 + slope * (n2 - n0)) / 1e9:.2f} GB for the third size (counted: {b2 / 1e9:.2f}) and "
              f"{(b0 + slope * (full - n0)) / 1e9:.1f} GB for {full} tokens at {model.preset.size} px")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--way", choices=["early", "full", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help="a step of MAGNET instead of segmentation")
    parser.add_argument("--sizes", type=int, nargs=3, default=(128, 192, 256), help="pixels, of --train")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way == "train":
        measure_training(args.file, args.sizes, args.device)
    elif args.way:
        measure(args.file, args.way, args.device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sd3_random.safetensors"
            write(path)
            print(f"wrote {path.stat().st_size / 1e9:.2f} GB of random weights", flush=True)
            for way in ["train"] if args.train else ["early", "full"]:
                subprocess.run([sys.executable, __file__, "--way", way, "--file", path, "--device", args.device,
                                "--sizes", *map(str, args.sizes)], check=True)

"""SD3 Medium at full size without its weights: random numbers in its exact layout, one 1024 x 1024 picture.

    python tests/full_size.py                    # writes 6 GB to a temporary folder, prints seconds and peak memory

Not a test that pytest collects: it takes minutes and 15 GB on a CPU.  Each way runs in a process of its own, so
that its peak memory is its own: the blocks up to the expert alone, and all blocks run to the end.
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
import evaluate                                          # noqa: E402
import seg4diff                                          # noqa: E402
import text                                              # noqa: E402
import weights                                           # noqa: E402
from mmdit import i2t_attention                          # noqa: E402

LISTINGS = {"mmdit": "sd3_medium", "vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g"}


def write(path: Path) -> None:
    """Random fp16 tensors under the published keys, and as many merges as CLIP's vocabulary has."""
    sd, gen = {}, torch.Generator().manual_seed(0)
    for part, listing in LISTINGS.items():
        shapes = json.loads((Path(__file__).parent / "layouts" / f"{listing}.json").read_text())
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
        _, taps = model.mmdit(z0, sigma, cond.ctx, cond.pooled, capture={block}, stop_at=stop)
        maps = i2t_attention(taps[block])
    assert maps.isfinite().all() and maps.sum(-1).max() <= 1.001       # shares of each pixel's attention
    ran = time.time()
    gpu = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the GPU" if model.device.type == "cuda" else ""
    print(f"{way:6s} {model.mmdit.config.depth} blocks loaded, maps {tuple(maps.shape)}: load {loaded - start:.0f} s, "
          f"VAE and text {encoded - loaded:.0f} s, MM-DiT {ran - encoded:.0f} s, "
          f"peak {evaluate.peak_megabytes() / 1000:.1f} GB{gpu}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--way", choices=["early", "full"], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        measure(args.file, args.way, args.device)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "sd3_random.safetensors"
            write(path)
            print(f"wrote {path.stat().st_size / 1e9:.2f} GB of random weights", flush=True)
            for way in ("early", "full"):
                subprocess.run([sys.executable, __file__, "--way", way, "--file", path, "--device", args.device], check=True)

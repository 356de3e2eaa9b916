"""Flux.1-dev at full size without its weights: what `python tools/full_size.py --model flux` runs.

It writes the 13 blocks that segmentation reads, T5-XXL and the small parts as random bfloat16 numbers in the published
layout, 18 GB, and segments one picture of 512 x 512 pixels in bfloat16.  Only a few numbers are drawn and repeated:
that is quicker, and as good for seconds and memory.
"""
import json
import struct
import time
from math import prod
from pathlib import Path

import torch
from PIL import Image

import seg4diff
from loading import flux_preset
from nano.flux_model import word_unigrams
from support import weights
from support.checkpoint import peak_megabytes
from support.cli import show
from support.files import write_json
from tools.costs import some_merges

FILES = {"flux_dev": "flux1-dev.safetensors", "t5xxl": "t5xxl_fp16.safetensors", "clip_l": "clip_l.safetensors",
         "vae": "ae.safetensors"}
DRAWN = 2 ** 22                         # different numbers in a tensor


def write_random(path: Path, shapes: dict[str, list[int]]) -> None:
    """A .safetensors file of random bfloat16 numbers, tensor by tensor, so that memory never holds more than one."""
    header = {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text_of_header = json.dumps(header).encode()
    drawn = torch.randn(DRAWN, generator=torch.Generator().manual_seed(0))               # (DRAWN,)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text_of_header)) + text_of_header)
        for shape in shapes.values():
            n = prod(shape)
            scale = prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1
            numbers = (scale * drawn[:n]).bfloat16().view(torch.int16).numpy().tobytes()
            whole, rest = divmod(n, DRAWN)
            for _ in range(whole):
                f.write(numbers)
            f.write(numbers[:2 * rest])


def write(folder: Path, shapes: dict[str, dict[str, list[int]]]) -> Path:
    """Flux's files as they are published, the blocks after the expert but one left out; the transformer's path."""
    block = flux_preset().block
    kept = {}
    for key, shape in shapes["flux_dev"].items():        # one single block, by which Flux is known
        if weights.block_of(key, 19) <= block or key.startswith("single_blocks.0."):
            kept[key] = shape
    for layout, name in FILES.items():
        write_random(folder / name, kept if layout == "flux_dev" else shapes[layout])
    vocab = shapes["clip_l"]["text_model.embeddings.token_embedding.weight"][0]
    (folder / "merges.txt").write_text("\n".join(["#version", *some_merges(vocab)]), encoding="utf-8")
    (folder / "tokenizer_2").mkdir()
    write_json(folder / weights.T5_TOKENIZER, json.loads(word_unigrams(["cat", "dog", "sky"]).to_str()))
    return folder / FILES["flux_dev"]


@torch.inference_mode()
def segment(path: Path, device: str, size: int = 512) -> None:
    """Load the files and segment one picture; prints seconds and peak memory, of which most is the files' own pages."""
    start = time.time()
    model = seg4diff.load(path, device, torch.bfloat16, segment_only=True)
    model.preset = flux_preset(size=size)
    loaded = time.time()
    model.text.encode([["cat", "dog", "sky"]])
    encoded = time.time()
    seg = seg4diff.segment(model, Image.effect_noise((size, size), 64).convert("RGB"), ["cat", "dog", "sky"])
    assert seg.maps.isfinite().all() and seg.labels.shape == (size, size)
    show(f"{loaded - start:.0f} s load, {encoded - loaded:.0f} s text, {time.time() - encoded:.0f} s the rest")
    show(f"{model.transformer.config.depth} blocks, {model.text.length} rows of T5, sigma {model.preset.sigma:.3f}, "
         f"peak {peak_megabytes(model.device) / 1000:.1f} GB")

"""LoRA (Sec. 3.5): low-rank layers beside frozen ones; add, merge, save, load."""
import json
import math
import os
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit import MMDiT

# The layers of a block under the names that LoRA files give them (diffusers'): stream, our linear layer, and which of
# its row groups, as q, k and v are one matrix here. MAGNET adapts the image stream; the text stream is only read.
LORA_LAYERS = {"attn.to_q": ("x_block", "qkv", 0), "attn.to_k": ("x_block", "qkv", 1), "attn.to_v": ("x_block", "qkv", 2),
               "attn.to_out.0": ("x_block", "proj", 0), "attn.add_q_proj": ("context_block", "qkv", 0),
               "attn.add_k_proj": ("context_block", "qkv", 1), "attn.add_v_proj": ("context_block", "qkv", 2),
               "attn.to_add_out": ("context_block", "proj", 0)}
IMAGE_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


class LowRank(nn.Module):
    """scale * B A x, with scale = alpha / rank; zero until B is trained.  A Gaussian of std 1/rank (released code)."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, generator: torch.Generator | None,
                 device: torch.device):
        super().__init__()
        self.A = nn.Parameter((torch.randn(rank, d_in, generator=generator) / rank).to(device))   # (r, d_in) fp32
        self.B = nn.Parameter(torch.zeros(d_out, rank, device=device))       # (d_out, r)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))         # (..., d_out)


class LoRALinear(nn.Module):
    """A linear layer whose rows are cut in groups (q, k, v), each with a low-rank update of its own."""

    def __init__(self, base: nn.Linear, groups: int, rank: int, alpha: float, generator: torch.Generator | None):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base = base
        self.groups = nn.ModuleList(
            LowRank(d_in, d_out // groups, rank, alpha, generator, base.weight.device) for _ in range(groups))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.cat([group(x) for group in self.groups], dim=-1)              # (..., d_out)


def lora_group(model: MMDiT, block: int, layer: str, rank: int, alpha: float, generator: torch.Generator | None) -> LowRank:
    """The low-rank pair of a layer of LORA_LAYERS, put in place, as a no-op, if it is not yet there."""
    stream, name, group = LORA_LAYERS[layer]
    attn = getattr(model.joint_blocks[block], stream).attn
    if not isinstance(getattr(attn, name), LoRALinear):
        setattr(attn, name, LoRALinear(getattr(attn, name), 3 if name == "qkv" else 1, rank, alpha, generator))
    return getattr(attn, name).groups[group]


def add_lora(model: MMDiT, rank: int = 16, alpha: float = 16, generator: torch.Generator | None = None
             ) -> list[nn.Parameter]:
    """Freeze the model and put a LoRA on q, k, v and output projection of every block's image stream.

    An exact no-op until trained.  Returns the parameters to train, fp32 whatever the model's dtype.
    ValueError: a rank below 1, a model that has a LoRA.
    """
    if rank < 1 or any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError(f"a LoRA needs a rank of at least 1, not {rank}, and a model without one; merge_lora first")
    model.requires_grad_(False)
    groups = [lora_group(model, i, layer, rank, alpha, generator)
              for i in range(model.config.depth) for layer in IMAGE_LAYERS]
    return [p for group in groups for p in group.parameters()]


def merge_lora(model: MMDiT) -> MMDiT:
    """W + scale * B A into the weights, row group by row group, and the plain layers back in place."""
    for attn in (getattr(block, stream).attn for block in model.joint_blocks for stream in ("x_block", "context_block")):
        for name in ("qkv", "proj"):
            if isinstance(layer := getattr(attn, name), LoRALinear):
                with torch.no_grad():
                    update = torch.cat([g.scale * g.B @ g.A for g in layer.groups])               # (d_out, d_in)
                    layer.base.weight.copy_(layer.base.weight.float() + update)
                setattr(attn, name, layer.base)
    return model


def base_samples(model: MMDiT) -> list[list[float]]:
    """Eight weights of each block, by which a LoRA knows its base in whatever file and dtype it comes."""
    layers = [block.x_block.attn.qkv for block in model.joint_blocks]
    flat = [(x.base if isinstance(x, LoRALinear) else x).weight.flatten() for x in layers]        # depth x (3*D*D,)
    return [w[::len(w) // 8][:8].float().tolist() for w in flat]


def save_lora(model: MMDiT, path: str | Path) -> None:
    """The LoRA alone, under diffusers' key names, with rank, alpha and what its base was; never half written."""
    sd, scales = {}, {}
    for i, block in enumerate(model.joint_blocks):
        for layer, (stream, name, group) in LORA_LAYERS.items():
            if isinstance(module := getattr(getattr(block, stream).attn, name), LoRALinear):
                key, pair = f"transformer_blocks.{i}.{layer}", module.groups[group]
                scales[key] = pair.B.shape[1], pair.scale * pair.B.shape[1]                       # rank, alpha
                for x in "AB":
                    sd[f"transformer.{key}.lora_{x}.weight"] = getattr(pair, x).detach().cpu().contiguous()
    if not sd:
        raise ValueError("this model has no LoRA that could be saved; add_lora first")
    rank, alpha = next(iter(scales.values()))
    adapter = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({k.split(".", 2)[2] for k in scales}),
               "rank_pattern": {k: r for k, (r, _) in scales.items() if r != rank},
               "alpha_pattern": {k: a for k, (_, a) in scales.items() if a != alpha}}
    base = {"width": model.config.width, "depth": model.config.depth, "samples": base_samples(model)}
    tmp = Path(path).with_suffix(".tmp")
    save_file(sd, tmp, {"format": "pt", "base": json.dumps(base), "lora_adapter_metadata":
                        json.dumps({f"transformer.{k}": v for k, v in adapter.items()})})
    os.replace(tmp, path)


def load_lora(model: MMDiT, path: str | Path) -> None:
    """Put a LoRA file's layers into the model: ours, diffusers' (peft) .safetensors, or the authors' .pth.

    Pairs of blocks that a model read for segmentation lacks are left out.
    ValueError: another base, misshapen pairs, layers that are not adapted here, nothing that fits.
    """
    (pairs, base), cfg = read_lora(path), model.config
    if other := sorted({layer for _, layer in pairs} - LORA_LAYERS.keys()):
        raise ValueError(f"{path} adapts {other[0]}, which is not adapted here; known are {', '.join(LORA_LAYERS)}")
    fits = {(i, layer): pair for (i, layer), pair in pairs.items() if i < cfg.depth}
    if not fits or (cfg.whole and len(fits) < len(pairs)):
        raise ValueError(f"{path} adapts blocks {sorted({i for i, _ in pairs})}; this model has blocks 0 to {cfg.depth - 1}")
    if base is not None and not (base["width"] == cfg.width and len(base["samples"]) >= cfg.depth and all(
            math.isclose(a, b, rel_tol=0.02, abs_tol=1e-5)                   # bf16 keeps 8 bits
            for ours, theirs in zip(base_samples(model), base["samples"]) for a, b in zip(ours, theirs))):
        raise ValueError(f"{path} belongs to another model (width {base['width']}, {base['depth']} blocks); load it with "
                         "the one it was trained on")
    for (i, layer), (A, B, _) in fits.items():
        stream, name, _ = LORA_LAYERS[layer]
        exists = getattr(getattr(model.joint_blocks[i], stream).attn, name) is not None
        if not exists or A.shape != (len(A), cfg.width) or B.shape != (cfg.width, len(A)):
            wanted = f"takes A (rank, {cfg.width}) and B ({cfg.width}, rank)" if exists else "has no such layer"
            raise ValueError(f"{path} does not fit: {layer} of block {i} has A {tuple(A.shape)} and B {tuple(B.shape)}, and "
                             f"this model {wanted}")
    for (i, layer), (A, B, scale) in fits.items():
        group = lora_group(model, i, layer, 1, 1, torch.Generator())
        group.A, group.B, group.scale = nn.Parameter(A.to(group.A.device)), nn.Parameter(B.to(group.A.device)), scale


# ---------------------------------------------------------------------------- LoRA files


LORA_KEY = re.compile(r"(?:.*\.)?transformer_blocks\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")


class LoRAFile(NamedTuple):
    pairs: dict[tuple[int, str], tuple[Tensor, Tensor, float]]   # (block, diffusers' name of a layer): A, B, scale; fp32
    base: dict | None                       # what mmdit.save_lora noted of the model it was trained on


def read_lora(path: str | Path) -> LoRAFile:
    """A LoRA in diffusers' (peft) naming: .safetensors, or a PyTorch .pth (the authors'), whose pickle cannot run code.

    The scale of a pair is alpha / rank with the file's alpha, 1 without one.
    ValueError: no such file, broken, no LoRA in it, half a pair, another naming.
    """
    path, meta = Path(path), {}
    if not path.is_file():
        raise ValueError(f"there is no LoRA file {path}")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as f:
                sd, meta = {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
        else:
            sd = torch.load(path, map_location="cpu", weights_only=True)
            sd = sd.get("model", sd)                                         # the authors' .pth keeps more beside it
        adapter = {k.removeprefix("transformer."): v for k, v in json.loads(meta.get("lora_adapter_metadata", "{}")).items()}
        base = json.loads(meta.get("base", "null"))
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError, ValueError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path} cannot be read as a LoRA (.safetensors, or a .pth of tensors alone): "
                         f"{str(e).splitlines()[0] if str(e) else type(e).__name__}") from None
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key in (k for k in sd if "lora" in k):
        if (m := LORA_KEY.fullmatch(key)) is None:
            raise ValueError(f"{path} holds {key!r}, which is not diffusers' (peft) naming of a layer of SD3's transformer")
        found.setdefault((int(m[1]), m[2]), {})[m[3]] = sd[key].float()
    if not found:
        raise ValueError(f"{path} is no LoRA: of its {len(sd)} tensors none has 'lora' in its name")
    pairs = {}
    for (i, layer), pair in found.items():
        if len(pair) < 2:
            raise ValueError(f"{path} is incomplete: {layer} of block {i} has lora_{next(iter(pair))} alone")
        rank, key = len(pair["A"]), f"transformer_blocks.{i}.{layer}"
        alpha = next((a for pattern, a in adapter.get("alpha_pattern", {}).items()
                      if re.fullmatch(rf"(.*\.)?({pattern})", key)), adapter.get("lora_alpha", rank))
        pairs[i, layer] = pair["A"], pair["B"], alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
    return LoRAFile(pairs, base)

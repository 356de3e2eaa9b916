"""LoRA (Sec. 3.5): low-rank layers beside frozen ones; add, merge, save, load."""
import json
import math
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdit import MMDiT

# The layers of a block under the names that LoRA files give them (diffusers'): our linear layer, and which of its row
# groups, as q, k and v are one matrix here. MAGNET adapts the image stream; the text stream's can only be loaded.
LORA_LAYERS = {"attn.to_q": ("x_block.attn.qkv", 0), "attn.to_k": ("x_block.attn.qkv", 1),
               "attn.to_v": ("x_block.attn.qkv", 2), "attn.to_out.0": ("x_block.attn.proj", 0),
               "attn.add_q_proj": ("context_block.attn.qkv", 0), "attn.add_k_proj": ("context_block.attn.qkv", 1),
               "attn.add_v_proj": ("context_block.attn.qkv", 2), "attn.to_add_out": ("context_block.attn.proj", 0)}
IMAGE_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


class LowRank(nn.Module):
    """scale * B A x, with scale = alpha / rank; zero until B is trained.  A Gaussian of std 1/rank (released code)."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, generator: torch.Generator | None):
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, d_in, generator=generator) / rank)                # (r, d_in) fp32
        self.B = nn.Parameter(torch.zeros(d_out, rank))                      # (d_out, r)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))         # (..., d_out)


class LoRALinear(nn.Module):
    """A linear layer whose rows are cut in groups (q, k, v), each with a low-rank update beside it."""

    def __init__(self, base: nn.Linear, groups: int, rank: int, alpha: float, generator: torch.Generator | None):
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base = base
        pairs = [LowRank(d_in, d_out // groups, rank, alpha, generator) for _ in range(groups)]
        self.groups = nn.ModuleList(pairs).to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.cat([group(x) for group in self.groups], dim=-1)              # (..., d_out)


def lora_group(model: MMDiT, block: int, layer: str, rank: int, alpha: float, generator: torch.Generator | None
               ) -> LowRank:
    """The low-rank pair of a layer of LORA_LAYERS, put in place, as a no-op, if it is not yet there."""
    path, group = LORA_LAYERS[layer]
    path = f"joint_blocks.{block}.{path}"
    linear = model.get_submodule(path)
    if not isinstance(linear, LoRALinear):
        linear = LoRALinear(linear, 3 if path.endswith("qkv") else 1, rank, alpha, generator)
        model.set_submodule(path, linear)
    return linear.groups[group]


def add_lora(model: MMDiT, rank: int = 16, alpha: float = 16, generator: torch.Generator | None = None
             ) -> list[nn.Parameter]:
    """Freeze the model and put a LoRA on q, k, v and output projection of every block's image stream.

    An exact no-op until trained.  Returns the parameters to train, fp32 whatever the model's dtype.
    ValueError: a rank below 1, a model that has a LoRA.
    """
    if rank < 1 or any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError(f"a LoRA needs a rank of at least 1, not {rank}, and a model without one; merge_lora first")
    model.requires_grad_(False)
    params = []
    for i in range(model.config.depth):
        for layer in IMAGE_LAYERS:
            params += lora_group(model, i, layer, rank, alpha, generator).parameters()
    return params


@torch.no_grad()
def merge_lora(model: MMDiT) -> MMDiT:
    """W + scale * B A into the weights, row group by row group, and the plain layers back in place."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            update = torch.cat([group.scale * group.B @ group.A for group in layer.groups])       # (d_out, d_in)
            layer.base.weight.copy_(layer.base.weight.float() + update)
            model.set_submodule(path, layer.base)
    return model


# ---------------------------------------------------------------------------- LoRA files


def base_samples(model: MMDiT) -> Tensor:
    """Eight weights of each block, (depth, 8), by which a LoRA knows its base in whatever file and dtype it comes."""
    samples = []
    for block in model.joint_blocks:
        linear = block.x_block.attn.qkv
        w = getattr(linear, "base", linear).weight.flatten()                 # (3*D*D,), of a LoRALinear the base's
        samples.append(w[::len(w) // 8][:8].float().cpu())
    return torch.stack(samples)


def save_lora(model: MMDiT, path: str | Path) -> None:
    """The LoRA alone, under diffusers' key names, with rank, alpha and what its base was; never half written.

    ValueError: a model without a LoRA.
    """
    modules = dict(model.named_modules())
    sd, scales = {}, {}
    for i in range(model.config.depth):
        for layer, (name, group) in LORA_LAYERS.items():
            linear = modules.get(f"joint_blocks.{i}.{name}")
            if isinstance(linear, LoRALinear):
                pair = linear.groups[group]
                key = f"transformer_blocks.{i}.{layer}"
                scales[key] = len(pair.A), pair.scale * len(pair.A)          # rank, alpha
                sd[f"transformer.{key}.lora_A.weight"] = pair.A.detach().cpu().contiguous()
                sd[f"transformer.{key}.lora_B.weight"] = pair.B.detach().cpu().contiguous()
    if not sd:
        raise ValueError("this model has no LoRA that could be saved; add_lora first")
    rank, alpha = next(iter(scales.values()))
    adapter = {"transformer.r": rank, "transformer.lora_alpha": alpha,
               "transformer.target_modules": sorted({key.split(".", 2)[2] for key in scales}),
               "transformer.rank_pattern": {key: r for key, (r, _) in scales.items() if r != rank},
               "transformer.alpha_pattern": {key: a for key, (_, a) in scales.items() if a != alpha}}
    base = {"width": model.config.width, "depth": model.config.depth, "samples": base_samples(model).tolist()}
    tmp = Path(path).with_suffix(".tmp")
    save_file(sd, tmp, {"format": "pt", "base": json.dumps(base), "lora_adapter_metadata": json.dumps(adapter)})
    os.replace(tmp, path)


def load_lora(model: MMDiT, path: str | Path) -> None:
    """Put a LoRA file's layers into the model: ours, diffusers' (peft) .safetensors, or the authors' .pth.

    Pairs of blocks that a model read for segmentation lacks are left out.
    ValueError: another base, misshapen pairs, layers that are not adapted here, nothing that fits.
    """
    pairs, base = read_lora(path)
    D, depth = model.config.width, model.config.depth
    unknown = sorted({layer for _, layer in pairs} - LORA_LAYERS.keys())
    if unknown:
        raise ValueError(f"{path} adapts {unknown[0]}, which is not adapted here; known are {', '.join(LORA_LAYERS)}")
    fits = {(i, layer): pair for (i, layer), pair in pairs.items() if i < depth}
    if not fits or (model.config.whole and len(fits) < len(pairs)):
        blocks = sorted({i for i, _ in pairs})
        raise ValueError(f"{path} adapts blocks {blocks}; this model has blocks 0 to {depth - 1}")
    if base is not None:
        theirs = torch.tensor(base["samples"][:depth])                       # (depth, 8)
        # bf16 keeps 8 bits
        if base["depth"] < depth or not torch.allclose(base_samples(model), theirs, rtol=0.02, atol=1e-5):
            raise ValueError(f"{path} belongs to another model (width {base['width']}, {base['depth']} blocks); load "
                             "it with the one it was trained on")
    modules = dict(model.named_modules())
    for (i, layer), (A, B, _) in fits.items():
        name, _ = LORA_LAYERS[layer]
        exists = f"joint_blocks.{i}.{name}" in modules
        if not exists or A.shape != (len(A), D) or B.shape != (D, len(A)):
            wanted = f"takes A (rank, {D}) and B ({D}, rank)" if exists else "has no such layer"
            raise ValueError(f"{path} does not fit: {layer} of block {i} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                             f"and this model {wanted}")
    for (i, layer), (A, B, scale) in fits.items():
        group = lora_group(model, i, layer, 1, 1, torch.Generator())
        device = group.A.device
        group.A = nn.Parameter(A.to(device))                                 # (r, D)
        group.B = nn.Parameter(B.to(device))                                 # (D, r)
        group.scale = scale


LORA_KEY = re.compile(r"(?:.*\.)?transformer_blocks\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
Pairs = dict[tuple[int, str], tuple[Tensor, Tensor, float]]     # (block, diffusers' name of a layer): A, B, scale; fp32


def read_lora(path: str | Path) -> tuple[Pairs, dict | None]:
    """A LoRA in diffusers' (peft) naming: .safetensors, or a PyTorch .pth (the authors'), whose pickle cannot run code.

    Returns its pairs, and what save_lora noted of the model it was trained on.
    ValueError: no such file, broken, no LoRA in it, half a pair, another naming.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no LoRA file {path}")
    meta = {}
    try:
        if path.suffix == ".safetensors":
            sd = load_file(path)
            with safe_open(path, framework="pt") as f:
                meta = f.metadata() or {}
        else:
            sd = torch.load(path, map_location="cpu", weights_only=True)
            sd = sd.get("model", sd)                                         # the authors' .pth keeps more beside it
        adapter = json.loads(meta.get("lora_adapter_metadata", "{}"))
        adapter = {key.removeprefix("transformer."): value for key, value in adapter.items()}
        base = json.loads(meta.get("base", "null"))
    except Exception as e:                                                   # a broken pickle can raise anything
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a LoRA (.safetensors, or a .pth of tensors alone): "
                         f"{reason}") from None
    matrices: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key in sd:
        match = LORA_KEY.fullmatch(key)
        if match is not None:
            i, layer, side = match.groups()
            matrices.setdefault((int(i), layer), {})[side] = sd[key].float()
        elif "lora" in key:
            raise ValueError(f"{path} holds {key!r}, which is not diffusers' (peft) naming of a layer of SD3's "
                             "transformer")
    if not matrices:
        raise ValueError(f"{path} is no LoRA: of its {len(sd)} tensors none has 'lora' in its name")
    pairs = {}
    for (i, layer), pair in matrices.items():
        if len(pair) < 2:
            raise ValueError(f"{path} is incomplete: {layer} of block {i} has lora_{next(iter(pair))} alone")
        scale = scale_of(adapter, f"transformer_blocks.{i}.{layer}", len(pair["A"]))
        pairs[i, layer] = pair["A"], pair["B"], scale
    return pairs, base


def scale_of(adapter: dict, key: str, rank: int) -> float:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank), for peft's description of an adapter.

    alpha is that of the first pattern that fits the key, else the adapter's, else the rank.
    """
    alpha = adapter.get("lora_alpha", rank)
    for pattern, special in adapter.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", key):
            alpha = special
            break
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)

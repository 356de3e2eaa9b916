"""LoRA (Sec. 3.5): low-rank layers beside frozen ones; add, merge, save, load."""
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux import Flux
from mmdit import MMDiT
from support.checkpoint import check_finite, check_weight
from support.files import check_kind, decoding, read_tensors, replacing

# The layers of a block under the names that LoRA files give them (diffusers'), and where their pair stands here: beside
# a linear layer, for one group of its rows, as q, k and v are one matrix. MAGNET adapts the image stream; pairs of
# other layers can only be loaded.
JOINT_LAYERS = {
    "attn.to_q": "x_block.attn.qkv.groups.0", "attn.to_k": "x_block.attn.qkv.groups.1",
    "attn.to_v": "x_block.attn.qkv.groups.2", "attn.to_out.0": "x_block.attn.proj.groups.0",
    "attn.add_q_proj": "context_block.attn.qkv.groups.0", "attn.add_k_proj": "context_block.attn.qkv.groups.1",
    "attn.add_v_proj": "context_block.attn.qkv.groups.2", "attn.to_add_out": "context_block.attn.proj.groups.0"}
DOUBLE_LAYERS = {
    "attn.to_q": "img_attn.qkv.groups.0", "attn.to_k": "img_attn.qkv.groups.1", "attn.to_v": "img_attn.qkv.groups.2",
    "attn.to_out.0": "img_attn.proj.groups.0", "attn.add_q_proj": "txt_attn.qkv.groups.0",
    "attn.add_k_proj": "txt_attn.qkv.groups.1", "attn.add_v_proj": "txt_attn.qkv.groups.2",
    "attn.to_add_out": "txt_attn.proj.groups.0", "norm1.linear": "img_mod.lin.groups.0",
    "norm1_context.linear": "txt_mod.lin.groups.0", "ff.net.0.proj": "img_mlp.0.groups.0",
    "ff.net.2": "img_mlp.2.groups.0", "ff_context.net.0.proj": "txt_mlp.0.groups.0",
    "ff_context.net.2": "txt_mlp.2.groups.0"}
SINGLE_LAYERS = {
    "attn.to_q": "linear1.groups.0", "attn.to_k": "linear1.groups.1", "attn.to_v": "linear1.groups.2",
    "proj_mlp": "linear1.groups.3", "proj_out": "linear2.groups.0", "norm.linear": "modulation.lin.groups.0"}
# our name of a kind of blocks, theirs, and its layers
BLOCKS = (("joint_blocks", "transformer_blocks", JOINT_LAYERS), ("double_blocks", "transformer_blocks", DOUBLE_LAYERS),
          ("single_blocks", "single_transformer_blocks", SINGLE_LAYERS))
IMAGE_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


def places_of(model):
    """What can be adapted in a model: a LoRA file's name of each layer -> where its pair stands here."""
    places = {}
    for ours, theirs, layers in BLOCKS:
        for i in range(len(getattr(model, ours, []))):   # Flux has no joint blocks, SD3 none of Flux's
            for layer, place in layers.items():
                places[f"{theirs}.{i}.{layer}"] = f"{ours}.{i}.{place}"
    return places


def told(name):
    """A layer's name as a sentence says it: "attn.to_q of block 3"."""
    kind, i, layer = name.split(".", 2)
    return f"{layer} of {'single ' if kind.startswith('single') else ''}block {i}"


class LowRank(nn.Module):
    """scale * B A x, with scale = alpha / rank."""

    def __init__(self, A, B, scale=1.0):
        super().__init__()
        self.A = nn.Parameter(A)                                             # (r, d_in) fp32
        self.B = nn.Parameter(B)                                             # (d_out, r) fp32
        self.scale = scale

    def forward(self, x):
        return self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))         # (..., d_out)


class LoRALinear(nn.Module):
    """A linear layer whose rows are cut in groups (q, k, v), each with a low-rank update beside it, zero at first."""

    def __init__(self, base, rows):
        super().__init__()
        d_in = base.weight.shape[1]
        self.base = base
        self.groups = nn.ModuleList(LowRank(torch.zeros(1, d_in), torch.zeros(n, 1)) for n in rows)

    def forward(self, x):
        return self.base(x) + torch.cat([group(x) for group in self.groups], dim=-1)              # (..., d_out)


def rows_of(path, linear):
    """How many rows each group of a linear layer has: q, k, v (in a single block of Flux the MLP's, too), or all."""
    d_out, d_in = linear.weight.shape
    if path.endswith("qkv"):
        return [d_in, d_in, d_in]
    if path.endswith("linear1"):
        return [d_in, d_in, d_in, d_out - 3 * d_in]
    return [d_out]


def put_pair(model, place, pair):
    """Put a low-rank pair where `places_of` says, on the layer's device."""
    path, group = place.split(".groups.")
    linear = model.get_submodule(path)
    if not isinstance(linear, LoRALinear):
        linear = LoRALinear(linear, rows_of(path, linear))
        linear.groups.to(linear.base.weight.device)
        model.set_submodule(path, linear)
    linear.groups[int(group)] = pair.to(linear.base.weight.device)


def add_lora(model: MMDiT | Flux, rank: int = 16, alpha: float = 16, generator: torch.Generator | None = None
             ) -> list[Tensor]:
    """Freeze the model and put a LoRA on q, k, v and output projection of every block's image stream.

    In a single block of Flux, where both modalities share one stream, on its q, k and v.
    A is Gaussian with std 1/rank (released code), B zero: an exact no-op until trained.
    Returns the parameters to train, fp32 whatever the model's dtype.
    ValueError: a rank below 1, a model that has a LoRA, one whose blocks wait in host memory.
    """
    if rank < 1 or any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError(f"a LoRA needs a rank of at least 1, not {rank}, and a model without one; merge_lora first")
    if len({p.device for p in model.parameters()}) > 1:  # copies of such blocks run, and they would learn nothing
        raise ValueError("a LoRA is trained where the whole transformer is, and this device has no room for it: some "
                         "of its blocks wait in host memory; take a larger device")
    model.requires_grad_(False)
    D = model.config.width
    params = []
    for name, place in places_of(model).items():
        if name.endswith(IMAGE_LAYERS):
            pair = LowRank(torch.randn(rank, D, generator=generator) / rank, torch.zeros(D, rank), alpha / rank)
            put_pair(model, place, pair)
            params += pair.parameters()
    return params


@torch.no_grad()
def merge_lora(model: MMDiT | Flux) -> MMDiT | Flux:
    """W + scale * B A into the weights, row group by row group, and the plain layers back in place."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            update = torch.cat([group.scale * group.B @ group.A for group in layer.groups])       # (d_out, d_in)
            layer.base.weight.copy_(layer.base.weight.float() + update)
            model.set_submodule(path, layer.base)
    return model


# ---------------------------------------------------------------------------- LoRA files


def base_samples(model):
    """Eight weights of each block, (depth, 8), by which a LoRA knows its base in whatever file and dtype it comes."""
    samples = []
    for name, place in places_of(model).items():
        if name.endswith("attn.to_q"):
            linear = model.get_submodule(place.split(".groups.")[0])
            w = getattr(linear, "base", linear).weight.flatten()             # (d_out*D,), of a LoRALinear the base's
            samples.append(w[::len(w) // 8][:8].float().cpu())
    return torch.stack(samples)


def save_lora(model: MMDiT | Flux, path: str | Path) -> None:
    """The LoRA alone, under diffusers' key names, with rank, alpha and what its base was; never half written.

    ValueError: a model without a LoRA, numbers that are not finite, a file that cannot be written.
    """
    modules = dict(model.named_modules())
    sd = {}
    scales = {}
    for key, place in places_of(model).items():
        pair = modules.get(place)
        if pair is not None:
            scales[key] = len(pair.A), pair.scale * len(pair.A)              # rank, alpha
            for side, matrix in pair.state_dict().items():
                sd[f"transformer.{key}.lora_{side}.weight"] = check_finite(matrix, f"{side} of {key}").contiguous()
    if not sd:
        raise ValueError("this model has no LoRA that could be saved; add_lora first")
    rank, alpha = next(iter(scales.values()))
    adapter = {"transformer.r": rank, "transformer.lora_alpha": alpha,
               "transformer.target_modules": sorted({key.split(".", 2)[2] for key in scales}),
               "transformer.rank_pattern": {key: r for key, (r, _) in scales.items() if r != rank},
               "transformer.alpha_pattern": {key: a for key, (_, a) in scales.items() if a != alpha}}
    base = {"width": model.config.width, "depth": model.config.depth, "samples": base_samples(model).tolist()}
    with replacing(path) as new:
        save_file(sd, new, {"format": "pt", "base": json.dumps(base), "lora_adapter_metadata": json.dumps(adapter)})


def load_lora(model: MMDiT | Flux, path: str | Path) -> None:
    """Put a LoRA file's layers into the model: ours, diffusers' (peft) .safetensors, or the authors' .pth.

    Pairs of blocks that a model read for segmentation lacks are left out.
    ValueError: another base, misshapen pairs, layers that are not adapted here, nothing that fits.
    """
    pairs, base = read_lora(path)
    depth = model.config.depth
    if base is not None:
        samples = base["samples"][:depth]                                    # (depth, 8); bf16 keeps 8 bits
        if len(samples) < depth or not torch.allclose(base_samples(model), samples, rtol=0.02, atol=1e-5):
            raise ValueError(f"{path} is for another model (width {base['width']}, {base['depth']} blocks); use that")
    modules = dict(model.named_modules())
    places = places_of(model)
    blocks = {tuple(name.split(".")[:2]) for name in places}                 # ("transformer_blocks", "3")
    fits = {}
    for name, pair in pairs.items():
        if model.config.whole or tuple(name.split(".")[:2]) in blocks:
            fits[name] = pair
    for name, pair in (fits or pairs).items():           # where none fits, the first one is named
        layer, _, group = places.get(name, "unknown").partition(".groups.")
        if layer not in modules:
            layers = dict.fromkeys(known.split(".", 2)[2] for known in places)
            raise ValueError(f"{path} adapts {told(name)}, but there is no such layer: this model has blocks 0 to "
                             f"{depth - 1}, and what can be adapted in them is {', '.join(layers)}")
        linear = getattr(modules[layer], "base", modules[layer])
        rank = len(pair.A)
        d_in = linear.weight.shape[1]
        d_out = rows_of(layer, linear)[int(group)]
        if pair.A.shape != (rank, d_in) or pair.B.shape != (d_out, rank):
            raise ValueError(f"{path} does not fit: {told(name)} takes A (rank, {d_in}) and B ({d_out}, rank), not "
                             f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)}")
    for name, pair in fits.items():
        put_pair(model, places[name], pair)


LORA_KEY = re.compile(r"(?:.*\.)?((?:single_)?transformer_blocks)\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")


def read_lora(path: str | Path) -> tuple[dict[str, LowRank], dict | None]:
    """A LoRA in diffusers' (peft) naming: .safetensors, or a PyTorch .pth (the authors'), whose pickle cannot run code.

    Returns {diffusers' name of a layer: pair}, and what save_lora noted of the model it was trained on.
    ValueError: no such file, broken, no LoRA in it, half a pair, another naming, numbers that are not finite.
    """
    meta = {}
    with decoding(path, "LoRA"):
        if Path(path).suffix == ".safetensors":
            sd = load_file(path)
            with safe_open(path, framework="pt") as f:
                meta = f.metadata() or {}
        else:
            sd = check_kind(read_tensors(path, "LoRA"), dict, "its content")
            sd = check_kind(sd.get("model", sd), dict, "its model")          # the authors' .pth keeps more beside it
        adapter = read_adapter(json.loads(meta.get("lora_adapter_metadata", "{}")))
        pairs = read_pairs(sd, adapter)
        base = read_base(json.loads(meta.get("base", "null")))
        for name in pairs:
            if base is not None and int(name.split(".")[1]) >= base["depth"]:
                raise ValueError(f"it adapts {told(name)}, but its base has blocks 0 to {base['depth'] - 1}")
        return pairs, base


def read_pairs(sd, adapter):
    """The pairs of `read_lora` out of the file's tensors.  ValueError: see there."""
    keys = [key for key in sd if "lora" in str(key)]
    if not keys:
        raise ValueError(f"it is no LoRA: of its {len(sd)} tensors none has 'lora' in its name")
    matrices = {}
    for key in keys:
        match = LORA_KEY.fullmatch(str(key))
        if match is None:
            raise ValueError(f"it holds {key!r}, which is not diffusers' (peft) name of a layer of the transformer")
        kind, i, layer, side = match.groups()
        name = f"{kind}.{int(i)}.{layer}"
        if len(name) > 100:                              # patterns are tried on it; a layer's has no more than 50
            raise ValueError(f"it adapts {name[:40]}..., a name of {len(name)} characters, and no layer has that")
        pair = matrices.setdefault(name, {})
        if side in pair:
            raise ValueError(f"it holds lora_{side} of {told(name)} twice")
        pair[side] = check_finite(check_weight(key, sd[key]).float(), f"values of {key!r}")
    pairs = {}
    for name, pair in matrices.items():
        if len(pair) < 2:
            raise ValueError(f"it is incomplete: {told(name)} has lora_{next(iter(pair))} alone")
        if pair["A"].ndim != 2 or len(pair["A"]) < 1:
            raise ValueError(f"A of {told(name)} should be (rank, columns), not {tuple(pair['A'].shape)}")
        pairs[name] = LowRank(pair["A"], pair["B"], scale_of(adapter, name, len(pair["A"])))
    return pairs


# What a pattern of layers' names may be made of. Others can take for ever: '(.+)+z', or many groups of alternatives.
PATTERN = re.compile(r"([\w.|^$()]|\\\.|\\d\+){0,200}", re.ASCII)


def check_pattern(pattern, what):
    """ValueError: a regular expression of peft's that is none, or might take long."""
    if PATTERN.fullmatch(pattern) is None or pattern.count("(") > 2 or pattern.count(r"\d+") > 2:
        raise ValueError(f"{pattern!r:.40} in its {what} is not read: only letters, digits, _ . \\. | ^ $, \\d+ twice "
                         "and two pairs of parentheses are")
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"{pattern!r} in its {what} is no regular expression ({e})") from None


def read_adapter(adapter):
    """What peft says of an adapter, without the prefix of its keys.  ValueError: other kinds than scale_of needs."""
    check_kind(adapter, dict, "lora_adapter_metadata")
    adapter = {key.removeprefix("transformer."): value for key, value in adapter.items()}
    for what in ("alpha_pattern", "rank_pattern"):
        for pattern in check_kind(adapter.get(what, {}), dict, what):
            check_pattern(pattern, what)
    for alpha in (adapter.get("lora_alpha", 1), *adapter.get("alpha_pattern", {}).values()):
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise ValueError(f"alpha must be a finite number, not {alpha!r:.40}")
    if not isinstance(adapter.get("use_rslora", False), bool):
        raise ValueError(f"use_rslora must be true or false, not {adapter['use_rslora']!r:.40}")
    return adapter


def read_base(base):
    """What save_lora noted of the base, its samples as a tensor (depth, 8).  ValueError: other kinds, other shapes."""
    if base is None:
        return None
    check_kind(base, dict, "base")
    for what in ("width", "depth"):
        check_kind(base.get(what), int, f"the {what} of its base")
    samples = torch.tensor(check_kind(base.get("samples"), list, "samples"), dtype=torch.float64).float()
    if samples.shape != (base["depth"], 8):
        raise ValueError(f"the samples of its base should be {(base['depth'], 8)}, not {tuple(samples.shape)}")
    return base | {"samples": samples}


def scale_of(adapter, key, rank):
    """alpha / rank, or with rsLoRA alpha / sqrt(rank), for peft's description of an adapter.

    alpha is that of the first pattern that fits the key, else the adapter's, else the rank.
    """
    divisor = math.sqrt(rank) if adapter.get("use_rslora") else rank
    for pattern, alpha in adapter.get("alpha_pattern", {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", key):
            return alpha / divisor
    return adapter.get("lora_alpha", rank) / divisor

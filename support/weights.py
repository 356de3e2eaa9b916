"""Where a model's tensors come from, and every loading error.

A model is named by what the hub calls it ("sd3"), by a .safetensors file in SD3's original layout, or by a
folder in the original or the diffusers layout.  `find` says which files hold which part, `read` opens them
lazily, casts each tensor while it is read and returns one state dict per part in the original key layout;
`assign` puts a state dict into a module built on the meta device without a second copy in memory.
"""
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx2  # the hub's own client, whose errors it lets through
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from support.checkpoint import count, shape

PREFIXES = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.",
            "clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer."}
NANO = Path(__file__).parent.parent / "nano" / "nano.safetensors"
# The transformer and VAE of a name; its repository also holds the text towers, at ENCODERS.
HUB = {"sd3": ("stabilityai/stable-diffusion-3-medium", "sd3_medium.safetensors"),
       "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors"),
       "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors")}
NAMES = ["nano", *HUB]
ENCODERS = {"clip_l": "text_encoders/clip_l.safetensors", "clip_g": "text_encoders/clip_g.safetensors"}
TOKENIZER = ("openai/clip-vit-large-patch14", "merges.txt")
FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}   # diffusers'

# ---------------------------------------------------------------------------- diffusers' keys -> SD3's

# "part#i": the rows of three keys, stacked in the order q, k, v, make the original's fused one.
MMDIT_KEYS = [
    (r"pos_embed\.pos_embed", "pos_embed"), (r"pos_embed\.proj", "x_embedder.proj"),
    (r"time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
    (r"time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
    (r"norm_out\.linear", "final_layer.adaLN_modulation.1"), (r"proj_out", "final_layer.linear"),
    (r"transformer_blocks", "joint_blocks"),
    (r"norm1\.linear", "x_block.adaLN_modulation.1"), (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
    (r"ff\.net\.0\.proj", "x_block.mlp.fc1"), (r"ff\.net\.2", "x_block.mlp.fc2"),
    (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"), (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    (r"attn\.norm_added_", "context_block.attn.ln_"), (r"(attn2?)\.norm_([qk])\.", r"x_block.\1.ln_\2."),
    (r"attn\.to_add_out", "context_block.attn.proj"), (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    *((rf"(attn2?)\.to_{x}\.(\w+)", rf"x_block.\1.qkv.\2#{i}") for i, x in enumerate("qkv")),
    *((rf"attn\.add_{x}_proj\.(\w+)", rf"context_block.attn.qkv.\1#{i}") for i, x in enumerate("qkv"))]
VAE_KEYS = [
    (r"down_blocks\.", "down."), (r"up_blocks\.", "up."), (r"downsamplers\.0", "downsample"),
    (r"upsamplers\.0", "upsample"), (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"), (r"resnets\.", "block."),
    (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out")]


def from_diffusers(part: str, sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the diffusers layout under SD3's original keys; other layouts pass through unchanged."""
    if part == "mmdit" and "pos_embed.pos_embed" in sd:
        parts: dict[str, dict[str, Tensor]] = {}
        for key, v in sd.items():
            for theirs, original in MMDIT_KEYS:
                key = re.sub(rf"(?:^|(?<=\.)){theirs}", original, key)
            name, _, i = key.partition("#")
            parts.setdefault(name, {})[i] = v
        sd = {key: torch.cat([vs[i] for i in sorted(vs)]) if len(vs) > 1 else vs[""] for key, vs in parts.items()}
        width = shape(sd, "x_embedder.proj.weight", 4)[0]
        for key, v in sd.items():           # diffusers keeps [scale; shift] where there are two chunks (final layer, last
            if "adaLN_modulation" in key and len(v) == 2 * width:            # block's text), the original [shift; scale]
                sd[key] = torch.cat(v.chunk(2)[::-1])
    elif part == "vae" and count(sd, "decoder.up_blocks."):
        top, out = count(sd, "decoder.up_blocks.") - 1, {}
        for key, v in sd.items():
            for theirs, original in VAE_KEYS:
                key = re.sub(rf"(?<=\.){theirs}", original, key)
            key = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}", key)     # counted the other way
            out[key] = v[..., None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key) and v.ndim == 2 else v
        sd = out
    return sd


# ---------------------------------------------------------------------------- name -> files


class Files(NamedTuple):
    parts: dict[str, tuple[list[Path], str]]    # part -> its files, and the prefix of its keys in them
    merges: Path | None                         # CLIP's merges.txt; None: in the header of the model's file


def hub(repo: str, file: str) -> Path:
    """A file from the hub's cache or the hub itself; ValueError says what to open, accept or type."""
    page = f"https://huggingface.co/{repo}"
    try:
        return Path(hf_hub_download(repo, file))
    except GatedRepoError:
        raise ValueError(f"{file} of {repo} is behind a licence: open {page}, accept it, then log in here "
                         "with `hf auth login`") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError) as e:
        raise ValueError(f"{file} of {repo} is not in the cache and cannot be fetched ({type(e).__name__}): connect to the "
                         f"network, or download it from {page} and pass its path with --model") from None


def keys_of(path: Path) -> list[str]:
    """Names of the tensors in a file, without reading them.  ValueError: missing, truncated, not safetensors."""
    try:
        with safe_open(path, framework="pt") as f:
            return list(f.keys())
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read as a .safetensors file (broken or cut off?): {e}") from None


def find(name_or_path: str | Path) -> Files:
    """A name of NAMES, a .safetensors file or a folder -> the files of each part.

    Text towers that a file does not hold are looked for beside it (in text_encoders/ too), then in SD3's
    repository on the hub, CLIP's merges in a tokenizer/ folder, then on the hub.  ValueError says what is missing.
    """
    name, path = str(name_or_path), NANO if str(name_or_path) == "nano" else Path(name_or_path)
    repo = HUB["sd3"][0]
    if name in HUB:
        repo, file = HUB[name]
        path = hub(repo, file)
    if path.is_dir() and (path / "transformer").is_dir():
        files = {part: sorted((path / folder).glob("*.safetensors")) for part, folder in FOLDERS.items()}
        files = {part: [f for f in found if ".fp16" not in f.name] or found for part, found in files.items()}
        for part, found in files.items():
            if not found:
                raise ValueError(f"{path} looks like a diffusers folder, but {FOLDERS[part]}/ holds no .safetensors file")
            for file in found:
                keys_of(file)                                                # a broken one is named before anything is read
        merges = path / "tokenizer/merges.txt"
        return Files({part: (found, "") for part, found in files.items()}, merges if merges.exists() else hub(*TOKENIZER))
    if path.is_dir():
        models = [f for f in sorted(path.glob("*.safetensors"))
                  if any(k.startswith(PREFIXES["mmdit"]) for k in keys_of(f))]
        if len(models) != 1:
            raise ValueError(f"the folder {path} should hold one model file (keys under {PREFIXES['mmdit']!r}) or "
                             f"diffusers' transformer/, but {len(models)} model files were found"
                             f"{': ' + ', '.join(f.name for f in models) if models else ''}")
        path = models[0]
    if not path.is_file():
        raise ValueError(f"no model {name!r}: there is no such file or folder, and the known names are {', '.join(NAMES)}")
    keys = keys_of(path)
    if not any(k.startswith(PREFIXES["mmdit"]) for k in keys):
        lora = any("lora" in k for k in keys)
        raise ValueError(f"{path} holds no tensor under {PREFIXES['mmdit']!r}, so it is no SD3 model file"
                         f"{' (it looks like a LoRA, which is added to a model and is none itself)' if lora else ''}")
    parts = {part: ([path], prefix) for part, prefix in PREFIXES.items() if any(k.startswith(prefix) for k in keys)}
    if "vae" not in parts:
        raise ValueError(f"{path} holds no tensor under {PREFIXES['vae']!r}: the autoencoder is missing")
    for part, file in ENCODERS.items():
        if part not in parts:
            beside = next((p for p in (path.parent / file, path.parent / Path(file).name) if p.is_file()), None)
            parts[part] = ([beside or hub(repo, file)], "")
    with safe_open(path, framework="pt") as f:
        if "merges" in (f.metadata() or {}):
            return Files(parts, None)
    merges = next((p for p in (path.parent / "tokenizer/merges.txt", path.parent / "merges.txt") if p.is_file()), None)
    return Files(parts, merges or hub(*TOKENIZER))


def fingerprint(files: Files) -> str:
    """12 hex digits of the model's files: their sizes and 1024 samples of 64 KB, which is all of a file up to 64 MB.

    So many, because a model with MAGNET merged into it differs in its attention weights alone.
    """
    h = hashlib.sha256()
    for path in sorted({p for paths, _ in files.parts.values() for p in paths}):
        size = path.stat().st_size
        h.update(str(size).encode())
        with open(path, "rb") as f:
            for at in range(0, size, max(65536, size // 1024)):
                f.seek(at)
                h.update(f.read(65536))
    return h.hexdigest()[:12]


# ---------------------------------------------------------------------------- files -> state dicts


def tensors(files: list[Path], prefix: str, wanted: Callable[[str], bool], device: str | torch.device | None,
            dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors under a prefix, one at a time, each cast before the next is read."""
    for path in files:
        with safe_open(path, framework="pt") as f:
            for key in f.keys():
                if key.startswith(prefix) and wanted(key.removeprefix(prefix)):
                    yield key.removeprefix(prefix), f.get_tensor(key).to(device=device, dtype=dtype)


def block_of(key: str) -> int:
    """The joint block that an MM-DiT key of either layout belongs to; -1 for the rest."""
    m = re.match(r"(?:joint_blocks|transformer_blocks)\.(\d+)\.", key)
    return int(m[1]) if m else -1


def read(files: Files, last_block: int | None = None, device: str | torch.device | None = None,
         dtype: torch.dtype | None = None) -> dict[str, dict[str, Tensor]]:
    """The state dict of each part under SD3's original keys, without prefix.

    With `last_block`, blocks after it are not read: segmentation needs no more (less than half of SD3's transformer).
    ValueError for a broken file.
    """
    parts = {}
    for part, (paths, prefix) in files.parts.items():
        cut = last_block if part == "mmdit" and last_block is not None else math.inf
        try:
            read_now = tensors(paths, prefix, lambda key: block_of(key) <= cut, device, dtype)
            parts[part] = from_diffusers(part, dict(read_now))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{paths[0]} cannot be read as a .safetensors file (broken or cut off?): {e}") from None
    return parts


def header(files: Files) -> dict[str, str]:
    """What the model's file says about itself: for nano, "presets" and "merges" as JSON.  ValueError: not JSON."""
    path = files.parts["mmdit"][0][0]
    with safe_open(path, framework="pt") as f:
        meta = dict(f.metadata() or {})
    for key in ("presets", "merges"):
        try:
            json.loads(meta.get(key, "{}"))
        except json.JSONDecodeError as e:
            raise ValueError(f"the header of {path} is broken: its {key!r} is not JSON ({e})") from None
    return meta


def merges(files: Files) -> list[str]:
    """CLIP's byte-pair merges, "a b" each: from the model's header, or from a merges.txt, whose first line is a version."""
    if files.merges is None:
        return json.loads(header(files)["merges"])
    return files.merges.read_text(encoding="utf-8").strip().split("\n")[1:]


def add_to_fingerprint(fingerprint: str, path: str | Path) -> str:
    """12 hex digits of a model together with a LoRA file."""
    return hashlib.sha256(fingerprint.encode() + Path(path).read_bytes()).hexdigest()[:12]


def lora_name(path: str | Path) -> str:
    """What a LoRA file is called: its own name, or its folder's where all are called alike."""
    path = Path(path)
    return path.resolve().parent.name if path.stem in ("lora", "lora_weights") else path.stem

"""Where a model's tensors come from, and every loading error.

A model is named by a short name of NAMES ("sd3"), by a .safetensors file in the original layout, SD3's or Flux's, or
by a folder in that or the diffusers layout.  `find` says which files hold which part; `read` casts each tensor while it
is read and returns one state dict per part in the original key layout.
"""
import hashlib
import json
import math
import re
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import GatedRepoError, HTTPError  # the second is its HTTP client's
from safetensors import safe_open
from torch import Tensor

from support.checkpoint import check_weight, count, shape
from support.files import decoding, read_text

PREFIXES = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.",
            "clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer.",
            "t5xxl": "text_encoders.t5xxl.transformer."}
NANO = Path(__file__).parents[1] / "nano/nano.safetensors"
EMBEDDED = {"nano": NANO, "nano-flux": NANO.with_name("nano-flux.safetensors")}
# The transformer and VAE of a name; its repository also holds the text towers, at ENCODERS.
HUB = {"sd3": ("stabilityai/stable-diffusion-3-medium", "sd3_medium.safetensors"),
       "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors"),
       "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors"),
       "flux": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"),
       "flux-schnell": ("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors")}
HUB["flux-released"] = HUB["flux"]      # with the released code's choices, see loading.released_preset
NAMES = [*EMBEDDED, *HUB]
ENCODERS = {"clip_l": "text_encoders/clip_l.safetensors", "clip_g": "text_encoders/clip_g.safetensors"}
TOKENIZER = ("openai/clip-vit-large-patch14", "merges.txt")
FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2"}   # diffusers'
# Flux's file holds the transformer alone; what the others are called beside it, and in its repository.
FLUX_FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder", "t5xxl": "text_encoder_2"}
FLUX_BESIDE = {"vae": ["ae.safetensors"], "clip_l": ["clip_l.safetensors"],
               "t5xxl": ["t5xxl_fp16.safetensors", "t5xxl.safetensors", "t5xxl_fp8_e4m3fn.safetensors"]}
FLUX_HUB = {"vae": ["ae.safetensors"], "clip_l": ["text_encoder/model.safetensors"],
            "t5xxl": [f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)]}
T5_TOKENIZER = "tokenizer_2/tokenizer.json"

# ---------------------------------------------------------------------------- diffusers' keys -> the original ones

# "key#q": the rows of three keys, stacked in the order q, k, v, make the original's fused one.
MMDIT_KEYS = {
    r"pos_embed\.pos_embed": "pos_embed", r"pos_embed\.proj": "x_embedder.proj", r"transformer_blocks": "joint_blocks",
    r"time_text_embed\.timestep_embedder": "t_embedder", r"time_text_embed\.text_embedder": "y_embedder",
    r"linear_1": "mlp.0", r"linear_2": "mlp.2", r"net\.0\.proj": "fc1", r"net\.2": "fc2", r"ff\.": "x_block.mlp.",
    r"ff_context\.": "context_block.mlp.", r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"norm1\.linear": "x_block.adaLN_modulation.1", r"norm1_context\.linear": "context_block.adaLN_modulation.1",
    r"proj_out": "final_layer.linear", r"attn\.to_add_out": "context_block.attn.proj",
    r"(attn2?)\.to_out\.0": r"x_block.\1.proj", r"(attn2?)\.to_([qkv])\.(\w+)": r"x_block.\1.qkv.\3#\2",
    r"attn\.add_([qkv])_proj\.(\w+)": r"context_block.attn.qkv.\2#\1",
    r"(attn2?)\.norm_([qk])\.": r"x_block.\1.ln_\2.", r"attn\.norm_added_": "context_block.attn.ln_"}
VAE_KEYS = {
    r"down_blocks": "down", r"up_blocks": "up", r"downsamplers\.0": "downsample", r"upsamplers\.0": "upsample",
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2", r"resnets": "block",
    r"mid_block\.attentions\.0": "mid.attn_1", r"group_norm": "norm", r"to_out\.0": "proj_out", r"to_([qkv])": r"\1",
    r"conv_shortcut": "nin_shortcut", r"conv_norm_out": "norm_out"}

FLUX_KEYS = {
    r"x_embedder": "img_in", r"context_embedder": "txt_in", r"time_text_embed\.timestep_embedder": "time_in",
    r"time_text_embed\.guidance_embedder": "guidance_in", r"time_text_embed\.text_embedder": "vector_in",
    r"linear_1": "in_layer", r"linear_2": "out_layer", r"norm_out\.linear": "final_layer.adaLN_modulation.1",
    r"proj_out": "final_layer.linear", r"transformer_blocks": "double_blocks", r"norm1\.linear": "img_mod.lin",
    r"norm1_context\.linear": "txt_mod.lin", r"attn\.to_out\.0": "img_attn.proj", r"attn\.to_add_out": "txt_attn.proj",
    r"ff\.net\.(0\.proj|2)": r"img_mlp.\1", r"ff_context\.net\.(0\.proj|2)": r"txt_mlp.\1", r"0\.proj": "0",
    r"attn\.to_([qkv])\.(\w+)": r"img_attn.qkv.\2#\1", r"attn\.add_([qkv])_proj\.(\w+)": r"txt_attn.qkv.\2#\1",
    r"attn\.norm_added_": "txt_attn.norm.", r"attn\.norm_": "img_attn.norm.",
    r"norm\.q\.weight": "norm.query_norm.scale", r"norm\.k\.weight": "norm.key_norm.scale"}
SINGLE_KEYS = {
    r"single_transformer_blocks": "single_blocks", r"norm\.linear": "modulation.lin", r"proj_out": "linear2",
    r"attn\.norm_q\.weight": "norm.query_norm.scale", r"attn\.norm_k\.weight": "norm.key_norm.scale",
    r"attn\.to_([qkv])\.(\w+)": r"linear1.\2#\1", r"proj_mlp\.(\w+)": r"linear1.\1#m"}


def rename(key, table):
    """A key with each pattern of the table, where it begins the key or follows a dot, replaced in turn."""
    for theirs, original in table.items():
        key = re.sub(rf"(?:^|(?<=\.)){theirs}", original, key)
    return key


def mmdit_from_diffusers(sd):
    width = shape(sd, "pos_embed.proj.weight", 4)[0]
    out = {}
    for key, tensor in sd.items():
        name = rename(key, MMDIT_KEYS)
        # where there are but two chunks (final layer, last block's text), diffusers keeps scale before shift
        swap = "adaLN_modulation" in name and tensor.shape[:1] == (2 * width,)
        out[name] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor
    return joined(out)


def joined(out):
    """The pieces "key#q", "key#k", "key#v" (of Flux's single blocks "key#m", too) as the rows of one tensor."""
    for name in {name.partition("#")[0] for name in out if "#" in name}:
        pieces = [out.pop(f"{name}#{letter}") for letter in "qkvm" if f"{name}#{letter}" in out]
        if any(piece.ndim == 0 or piece.shape[1:] != pieces[0].shape[1:] for piece in pieces):
            raise ValueError(f"q, k and v of {name!r} are misshapen: {[tuple(piece.shape) for piece in pieces]}")
        out[name] = torch.cat(pieces)                                        # (3*D, D), or (3*D,) of a bias
    return out


def flux_from_diffusers(sd):
    out = {}
    for key, tensor in sd.items():
        name = rename(key, SINGLE_KEYS if key.startswith("single_") else FLUX_KEYS)
        swap = "adaLN_modulation" in name                # of the last layer: diffusers keeps scale before shift
        out[name] = torch.cat(tensor.chunk(2)[::-1]) if swap else tensor
    return joined(out)


def vae_from_diffusers(sd):
    top = count(sd, "decoder.up_blocks.") - 1                                # the original counts from the other end
    out = {}
    for key, tensor in sd.items():
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{top - int(m[1])}", rename(key, VAE_KEYS))
        out[name] = tensor[..., None, None] if tensor.ndim == 2 else tensor  # as 1 x 1 convolutions, (c, c, 1, 1)
    return out


def from_diffusers(part: str, sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the diffusers layout under the original keys; other layouts pass through unchanged.

    part: of PREFIXES; "mmdit" is the transformer, SD3's or Flux's.
    """
    if part == "mmdit" and "pos_embed.pos_embed" in sd:
        return mmdit_from_diffusers(sd)
    if part == "mmdit" and "context_embedder.weight" in sd and "x_embedder.weight" in sd:
        return flux_from_diffusers(sd)
    if part == "vae" and count(sd, "decoder.up_blocks."):
        return vae_from_diffusers(sd)
    return sd


# ---------------------------------------------------------------------------- name -> files


class Files(NamedTuple):
    parts: dict[str, tuple[list[Path], str]]    # part -> its files, and the prefix of its keys in them
    merges: Path | None                         # CLIP's merges.txt; None: in the header of the model's file
    t5_tokenizer: Path | None = None            # Flux: T5's tokenizer.json; None: in the header, too


def hub(repo, file, option="--model"):
    """A file from the hub's cache or the hub itself; ValueError says what to open, accept or type after `option`."""
    page = f"https://huggingface.co/{repo}"
    try:
        return Path(hf_hub_download(repo, file))
    except GatedRepoError:
        raise ValueError(f"{file} is behind a licence: accept it at {page}, then log in with `hf auth login`") from None
    except (HTTPError, OSError) as e:                    # the hub's own errors are of these kinds, too
        raise ValueError(f"{file} is not in the cache and cannot be fetched ({type(e).__name__}): connect to the "
                         f"network, or download it from {page} and pass its path with {option}") from None


@contextmanager
def opened(path):
    """A .safetensors file, whose tensors are read when they are asked for.  Broken: cut off, or another format."""
    with decoding(path, ".safetensors file"), safe_open(path, framework="pt") as f:
        yield f


def keys_of(path):
    """Names of the tensors in a file, without reading them."""
    with opened(path) as f:
        return f.keys()


def first_of(folder, *names):
    """The first of these files that the folder holds."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def find(name_or_path: str | Path) -> Files:
    """A name of NAMES, a .safetensors file or a folder -> the files of each part.

    Text towers that a file does not hold are looked for beside it (in text_encoders/ too), then in SD3's or Flux's
    repository on the hub, CLIP's merges in a tokenizer/ folder, then on the hub.  ValueError says what is missing.
    """
    name = str(name_or_path)
    repo, file = HUB.get(name, HUB["sd3"])
    path = EMBEDDED.get(name, Path(name))
    if name in HUB:
        path = hub(repo, file)
    if name == "nano-flux" and not path.exists():
        raise ValueError(f"nano-flux is not there: train it by `python nano/pretrain.py --arch flux --vae {NANO} "
                         f"--run FOLDER`, and copy FOLDER/nano.safetensors to {path}")
    if not name or not path.exists():                    # Path("") would be the folder that one is in
        raise ValueError(f"no model {name!r}: there is no such file or folder; the known names are {', '.join(NAMES)}")
    if path.is_dir() and not (path / "transformer").is_dir():
        path = model_in(path)
    parts = parts_of_folder(path) if path.is_dir() else parts_of_file(path, repo)
    if "merges" in header(Files(parts, None)):
        return Files(parts, None)
    folder = path if path.is_dir() else path.parent
    t5_tokenizer = None
    if "t5xxl" in parts:
        repo = HUB[flux_name(keys_of_part(parts["mmdit"]))][0]
        t5_tokenizer = first_of(folder, T5_TOKENIZER, "tokenizer.json") or hub(repo, T5_TOKENIZER)
    return Files(parts, first_of(folder, "tokenizer/merges.txt", "merges.txt") or hub(*TOKENIZER), t5_tokenizer)


def with_t5(files, path):
    """The files of a model with a file of T5 and the tokenizer.json beside it.  ValueError: none of these."""
    path = Path(path)
    if "t5xxl" in files.parts:
        raise ValueError(f"this model reads T5 already; {path} is not needed")
    if not any(key.startswith("encoder.block.") for key in keys_of(path)):
        raise ValueError(f"{path} is no encoder of T5: no key of it begins with 'encoder.block.'")
    tokenizer = first_of(path.parent, "tokenizer.json", "tokenizer_3/tokenizer.json", T5_TOKENIZER)
    if tokenizer is None:
        raise ValueError(f"T5's tokenizer.json should lie beside {path}; Flux's and SD3's repositories hold it")
    return files._replace(parts=files.parts | {"t5xxl": ([path], "")}, t5_tokenizer=tokenizer)


def is_flux(keys):
    """Whether a transformer with such keys, of either layout, is Flux's."""
    return any("single_blocks.0." in key or "single_transformer_blocks.0." in key for key in keys)


def flux_name(keys):
    """Which published Flux has such keys: dev alone reads a guidance strength."""
    return "flux" if any("guidance" in key for key in keys) else "flux-schnell"


def keys_of_part(part):
    """The keys of a part in all its files, without the prefix."""
    paths, prefix = part
    return [key.removeprefix(prefix) for path in paths for key in keys_of(path) if key.startswith(prefix)]


def model_in(folder):
    """The one file of a folder that is a model in the original layout."""
    prefix = PREFIXES["mmdit"]
    models = []
    for file in sorted(folder.glob("*.safetensors")):
        keys = keys_of(file)
        if is_flux(keys) or any(key.startswith(prefix) for key in keys):
            models.append(file)
    if len(models) != 1:
        names = ", ".join(f.name for f in models) or "none"
        raise ValueError(f"the folder {folder} should hold diffusers' transformer/ or one model file (keys under "
                         f"{prefix!r}), but {len(models)} model files were found: {names}")
    return models[0]


def parts_of_folder(path):
    """The parts of a model in the diffusers layout, each in a folder of its own."""
    parts = {}
    is_a_flux = any(is_flux(keys_of(file)) for file in (path / "transformer").glob("*.safetensors"))
    for part, folder in (FLUX_FOLDERS if is_a_flux else FOLDERS).items():
        files = sorted((path / folder).glob("*.safetensors"))
        if not files:
            raise ValueError(f"{path} looks like a diffusers folder, but {folder}/ holds no .safetensors file")
        parts[part] = ([f for f in files if ".fp16" not in f.name] or files, "")
    return parts


def parts_of_file(path, repo):
    """The parts of a file in the original layout; text towers that it lacks, from beside it or the hub."""
    keys = keys_of(path)
    parts = {part: ([path], prefix) for part, prefix in PREFIXES.items() if any(k.startswith(prefix) for k in keys)}
    if is_flux(keys):
        return parts_of_flux_file(path, keys, parts)
    parts.pop("t5xxl", None)                             # the paper leaves it out
    if "mmdit" not in parts:
        hint = " (it looks like a LoRA, which is added to a model)" if any("lora" in key for key in keys) else ""
        raise ValueError(f"{path} holds no tensor under {PREFIXES['mmdit']!r}, so it is no SD3 model file{hint}")
    if "vae" not in parts:
        raise ValueError(f"{path} holds no tensor under {PREFIXES['vae']!r}: the autoencoder is missing")
    for part, file in ENCODERS.items():
        if part not in parts:
            parts[part] = ([first_of(path.parent, file, Path(file).name) or hub(repo, file)], "")
    return parts


def parts_of_flux_file(path, keys, parts):
    """The parts of a Flux file; those that it lacks, from beside it (in text_encoders/ too) or the hub."""
    parts.setdefault("mmdit", ([path], ""))              # the published file holds the transformer alone, no prefix
    repo = HUB[flux_name(keys)][0]
    for part, names in FLUX_BESIDE.items():
        if part not in parts:
            beside = first_of(path.parent, *names, *(f"text_encoders/{name}" for name in names))
            parts[part] = ([beside] if beside else [hub(repo, file) for file in FLUX_HUB[part]], "")
    return parts


def fingerprint(files):
    """12 hex digits of the model's files: their sizes and 1024 samples of 64 KB, which is all of a file up to 64 MB.

    So many, because a model with MAGNET merged into it differs in its attention weights alone.
    """
    digest = hashlib.sha256()
    paths = {path for paths, _ in files.parts.values() for path in paths}
    tokenizers = {files.merges, files.t5_tokenizer} - {None}
    for path in sorted(paths | tokenizers):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with open(path, "rb") as f:
            for at in range(0, size, max(65536, size // 1024)):
                f.seek(at)
                digest.update(f.read(65536))
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------- files -> state dicts


def block_of(key: str, doubles: int = 0) -> int:
    """The block that a transformer's key of either layout belongs to; -1 for the rest.

    doubles: how many double blocks a Flux has, after which its single ones are counted on.
    """
    m = re.match(r"(?:joint_blocks|double_blocks|(single_)?transformer_blocks|(single_)blocks)\.(\d+)\.", key)
    if m is None:
        return -1
    return int(m[3]) + (doubles if m[1] or m[2] else 0)


def needed(names, last_block):
    """Of a part's keys those that a run up to `last_block` needs; None: all."""
    if last_block is None:
        return set(names)
    doubles = count(names, "double_blocks.") + count(names, "transformer_blocks.")
    kept = {name for name in names if block_of(name, doubles) <= last_block}
    if is_flux(names):                                   # by their absence Flux knows that it is not whole
        kept = {name for name in kept if not name.startswith(("final_layer.", "norm_out.", "proj_out."))}
    return kept


def is_part_of_a_block(part, name):
    """Whether a key of the transformer or of T5 belongs to one of its blocks."""
    return name.startswith("encoder.block.") if part == "t5xxl" else part == "mmdit" and block_of(name) >= 0


def sizes(files, last_block=None):
    """How many values of each part `read` would read, from the files' headers alone."""
    values = {}
    for part, (paths, prefix) in files.parts.items():
        wanted = needed(keys_of_part((paths, prefix)), last_block)
        values[part] = 0
        for path in paths:
            with opened(path) as f:
                for key in f.keys():  # noqa: SIM118 (safe_open is no dict)
                    if key.startswith(prefix) and key.removeprefix(prefix) in wanted:
                        values[part] += math.prod(f.get_slice(key).get_shape())
    return values


def read(files, last_block=None, device=None, dtype=None, waiting=()):
    """The state dict of each part under its original keys, without prefix, each tensor cast before the next is read.

    With `last_block`, blocks after it are not read: segmentation needs no more (less than half of SD3's transformer).
    The blocks of parts in `waiting` stay in host memory (support.checkpoint.on_device).
    ValueError for a broken file, and for tensors that hold no floats.
    """
    parts = {}
    for part, (paths, prefix) in files.parts.items():
        sd = {}
        wanted = needed(keys_of_part((paths, prefix)), last_block)
        for path in paths:
            with opened(path) as f:
                keys = f.keys()
                for key in keys:
                    name = key.removeprefix(prefix)
                    if key.startswith(prefix) and name in wanted:
                        place = "cpu" if part in waiting and is_part_of_a_block(part, name) else device
                        sd[name] = check_weight(key, f.get_tensor(key)).to(device=place, dtype=dtype)
        parts[part] = from_diffusers(part, sd)
    return parts


def header(files):
    """What the model's file says about itself: nano's "presets" and tokenizers, in JSON, not decoded here."""
    with opened(files.parts["mmdit"][0][0]) as f:
        return f.metadata() or {}


def read_merges(path):
    """The byte-pair merges of CLIP's merges.txt, "a b" each, from below its first line."""
    return read_text(path).strip().split("\n")[1:]


def merges(files):
    """CLIP's byte-pair merges, "a b" each: from the model's header, or from a merges.txt."""
    if files.merges is not None:
        return read_merges(files.merges)
    with decoding(files.parts["mmdit"][0][0], "model file with merges in its header"):
        return json.loads(header(files)["merges"])


def t5_tokenizer(files):
    """The text of T5's tokenizer.json: from the model's header, or from the file."""
    if files.t5_tokenizer is None:
        return header(files)["t5_tokenizer"]
    return read_text(files.t5_tokenizer)


def add_to_fingerprint(fingerprint, path):
    """12 hex digits of a model together with a LoRA file."""
    return hashlib.sha256(fingerprint.encode() + Path(path).read_bytes()).hexdigest()[:12]


def lora_name(path):
    """What a LoRA file is called: its own name, or its folder's where all are called alike."""
    path = Path(path)
    return path.resolve().parent.name if path.stem in ("lora", "lora_weights") else path.stem

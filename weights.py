"""Where a model's tensors come from, and every loading error.

A checkpoint is one .safetensors file in SD3's original key layout; its parts are told apart by prefix.
`read` opens it lazily and returns one state dict per part, `assign` puts a state dict into a module built
on the meta device without a second copy in memory.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

PREFIXES = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.",
            "clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer."}
NAMES = {"nano": Path(__file__).parent / "nano" / "nano.safetensors"}


def shape(sd: dict[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of one tensor that a config is read off; ValueError if it is not there."""
    if key not in sd:
        raise ValueError(f"this state dict has no {key!r}, so it is not a network of the expected kind; "
                         f"it holds {len(sd)} tensors, the first: {', '.join(sorted(sd)[:3]) or 'none'}")
    return tuple(sd[key].shape)


def count(sd: dict[str, Tensor], stem: str) -> int:
    """1 + the largest number N for which a key starts with `stem` + "N.", 0 if there is none."""
    pattern = re.compile(re.escape(stem) + r"(\d+)\.")
    return max((int(m[1]) + 1 for m in map(pattern.match, sd) if m), default=0)


def assign(module: nn.Module, sd: dict[str, Tensor], what: str, device: str | torch.device | None,
           dtype: torch.dtype | None) -> nn.Module:
    """Fill a module built on the meta device with the tensors of `sd` themselves (no copy unless the device
    or dtype changes), strictly. ValueError lists missing, surplus and misshapen keys."""
    want = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    wrong = {"missing": sorted(want.keys() - sd.keys()), "surplus": sorted(sd.keys() - want.keys()),
             "misshapen": [f"{k} {tuple(sd[k].shape)} instead of {want[k]}" for k in sorted(want.keys() & sd.keys())
                           if tuple(sd[k].shape) != want[k]]}
    if any(wrong.values()):
        told = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                         for kind, keys in wrong.items() if keys)
        raise ValueError(f"the checkpoint does not fit the {what}: {told}")
    module.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in sd.items()}, strict=True, assign=True)
    return module.requires_grad_(False).eval()


def find(name_or_path: str | Path) -> Path:
    """'nano' or a path to a .safetensors file -> that file's path.  ValueError says what was expected."""
    path = Path(NAMES.get(str(name_or_path), name_or_path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a model is one .safetensors file, or a name: {', '.join(NAMES)}")
    if not path.is_file():
        raise ValueError(f"no model {str(name_or_path)!r}: there is no such file, and the known names are "
                         f"{', '.join(NAMES)}")
    return path


def read(name_or_path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """A model file -> ({part: state dict without prefix}, metadata of its header).

    Parts are those of PREFIXES that the file holds. ValueError for a file that is missing, truncated, not
    safetensors, or without an MM-DiT.
    """
    path = find(name_or_path)
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as f:
            for key in f.keys():
                for part, prefix in PREFIXES.items():
                    if key.startswith(prefix):
                        parts.setdefault(part, {})[key.removeprefix(prefix)] = f.get_tensor(key)
            meta = f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read as a .safetensors file (broken or cut off?): {e}") from None
    if "mmdit" not in parts:
        raise ValueError(f"{path} holds no tensor under {PREFIXES['mmdit']!r}, so it is no SD3 model file")
    return parts, meta


def presets(meta: dict[str, str]) -> dict:
    """The sampling and segmentation presets that a file carries in its header; {} if none."""
    return json.loads(meta.get("presets", "{}"))

"""State dict -> module: what a config is read off, and a strict load without a second copy in memory."""
import re

import torch
from torch import Tensor, nn


def shape(sd: dict[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """Shape of one tensor that a config is read off; ValueError if it is not there or has another number of dimensions."""
    if key not in sd:
        raise ValueError(f"this state dict has no {key!r}, so it is not a network of the expected kind; "
                         f"it holds {len(sd)} tensors, the first: {', '.join(sorted(sd)[:3]) or 'none'}")
    if sd[key].ndim != ndim:
        raise ValueError(f"{key!r} is misshapen: {tuple(sd[key].shape)}, where {ndim} dimensions are expected")
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


def pick_device(device: str | torch.device) -> torch.device:
    """"auto" is CUDA if there is one, else the CPU.  ValueError: a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"there is no device {str(device)!r}; choose auto, cpu or cuda")
    seen = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= seen:
        raise ValueError(f"device {str(device)!r} was asked for, but PyTorch sees {seen} CUDA devices here; use cpu")
    return found


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """"auto" is fp32 on the CPU, bf16 elsewhere (NOTE(official): fp16).  ValueError: another than these three."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if str(dtype).removeprefix("torch.") not in known:
        raise ValueError("dtype must be auto, float32, float16 or bfloat16")
    return known[str(dtype).removeprefix("torch.")]

"""State dict -> module: what a config is read off, and a strict load without a second copy in memory.

At the end: on which device, in which dtype, how exact, and what it took.
"""
import copy
import os
import re
import sys

import torch
from torch import Tensor, nn

Device = str | torch.device | None
Dtype = torch.dtype | None
# What weights are stored in. The last is that of T5's small files: each value is cast as it is, no scale beside it.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)


def check_weight(key: str, tensor: Tensor) -> Tensor:
    """A tensor read from a file, if it holds floats.  ValueError: integers, say, which no cast would make weights."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        held = getattr(tensor, "dtype", type(tensor).__name__)
        raise ValueError(f"{key!r} holds {held}, but weights are dense tensors of floating-point numbers")
    return tensor


def check_finite(x: Tensor, what: str) -> Tensor:
    """The tensor as it is.  ValueError: not all of it is finite; such numbers become no picture, score or file."""
    if not x.isfinite().all():
        raise ValueError(f"{what} are not finite numbers: a file is broken, or something overflowed, as it can in "
                         "float16 (try bfloat16 or float32)")
    return x


def shape(sd: dict[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """Shape of a tensor that a config is read off.  ValueError: it is missing, empty, or has not `ndim` dimensions."""
    if key not in sd:
        raise ValueError(f"this state dict has no {key!r}: no network of the expected kind, but {sorted(sd)[:3]} ...")
    if sd[key].ndim != ndim or 0 in sd[key].shape:
        raise ValueError(f"{key!r} is misshapen: {tuple(sd[key].shape)}, where {ndim} dimensions are expected")
    return tuple(sd[key].shape)


def count(sd: dict[str, Tensor], stem: str) -> int:
    """1 + the largest number N for which a key starts with `stem` + "N.", 0 if there is none.

    ValueError: more than there are keys, so that no module of a billion blocks is built before it is refused.
    """
    pattern = re.compile(re.escape(stem) + r"(\d+)\.")
    n = max((int(m[1]) + 1 for m in map(pattern.match, sd) if m), default=0)
    if n > len(sd):
        raise ValueError(f"{stem}{n - 1} is there, but most of those before it are not: no network of this kind")
    return n


def assign(module: nn.Module, sd: dict[str, Tensor], what: str, device: Device, dtype: Dtype) -> nn.Module:
    """Fill a module built on the meta device with the tensors of `sd` themselves, strictly.

    No tensor is copied unless the device or dtype changes.  ValueError names the first of the missing, surplus and
    misshapen keys.
    """
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in sd.items()}
    differ = [key for key in wanted.keys() & given if given[key] != wanted[key]]
    wrong = {"missing": wanted.keys() - given, "surplus": given.keys() - wanted,
             "misshapen": [f"{key} {given[key]} instead of {wanted[key]}" for key in differ]}
    problems = [f"{len(keys)} {kind}: {', '.join(sorted(keys)[:3])}" for kind, keys in wrong.items() if keys]
    if problems:
        raise ValueError(f"the checkpoint does not fit the {what}: {'; '.join(problems)}")
    module.load_state_dict({k: v.to(device=device, dtype=dtype) for k, v in sd.items()}, assign=True)
    return module.requires_grad_(False).eval()


def on_device(block: nn.Module, device: torch.device) -> nn.Module:
    """The block itself, or a copy on the device of one that waits in host memory; let go, the copy is gone."""
    if next(block.parameters()).device == device:
        return block
    moved = {id(p): nn.Parameter(p.to(device), requires_grad=False) for p in block.parameters()}
    return copy.deepcopy(block, moved)                   # deepcopy takes what `moved` has for a parameter


def pick_device(device: str | torch.device) -> torch.device:
    """"auto" is CUDA if there is one, else Apple's MPS, else the CPU.  ValueError: a device that is not there.

    A CUDA device becomes the current one, or each process of torchrun would hold memory of the first one, too.
    """
    device = str(device)
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there = ["mps", "mps:0", "cpu"]
    if device == "auto":
        device = "cuda" if cards else there[0]
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"                   # torchrun gives each process its own
    if device in cards:
        torch.cuda.set_device(device)
    elif device not in there:
        raise ValueError(f"there is no device {device!r}; use cpu or cuda (PyTorch sees {len(cards)} CUDA devices), "
                         "mps on an Apple computer, or auto")
    return torch.device(device)


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """"auto" is bf16 on CUDA (NOTE(official): fp16), fp32 elsewhere.  ValueError: another than these three.

    Before compute capability 8.0 (V100, T4, RTX 20) it is fp16: bf16 has no fast attention there. On MPS 16 bits lose
    too much over long sequences.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError("dtype must be auto, float32, float16 or bfloat16")
    return getattr(torch, name)


def full_float32():
    """A context in which CUDA's convolutions in float32 are just that, not TF32, which rounds factors to 10 bits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for; a clock that is read before tells nothing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_megabytes(device):
    """Peak memory: on the GPU that is meant, else of this process; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2)

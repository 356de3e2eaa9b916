"""What the trainings of nano's VAE, its MM-DiT and its judge share: optimisers, a step, states to go on from."""
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from support.checkpoint import check_finite
from support.files import check_kind, decoding, read_json, read_tensors, write_json, write_tensors


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for weights that are matrices (a convolution's is out x rest).

    torch.optim.Muon does this in bf16, which takes seconds a step on a CPU without it; here it is fp32, and
    weights of one shape go through together.  The update's size is matched to AdamW's, so one rate fits both.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        shapes = {}
        for p in group["params"]:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for params in shapes.values():
            updates = []
            for p in params:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(m, group["momentum"]).flatten(1))
            X = torch.stack(updates)                                         # (n, out, in)
            tall = X.shape[1] > X.shape[2]
            if tall:
                X = X.mT                                                     # (n, in, out)
            X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
            for _ in range(5):                           # Newton-Schulz: all singular values towards 1
                A = X @ X.mT
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            if tall:
                X = X.mT                                                     # (n, out, in)
            scale = 0.2 * max(X.shape[1:]) ** 0.5
            for p, update in zip(params, X):
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)


def optimisers(model: nn.Module, is_matrix: Callable[[str, Tensor], bool], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the parameters of which is_matrix(name, p) holds, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if is_matrix(name, p)]
    others = [p for name, p in model.named_parameters() if not is_matrix(name, p)]
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr, (0.9, 0.99), weight_decay=0.0)]


def optimise(opts: list[torch.optim.Optimizer], loss: Tensor, lr: float) -> float:
    """One step of all optimisers at this rate, gradient norm clipped at 1; the loss.  ValueError: it is not finite."""
    value = loss.item()
    if not math.isfinite(value):                         # it must not reach the weights
        raise ValueError(f"the loss is {value}; the same command goes on from the last saved state, which is good, "
                         "and a smaller rate of learning may help")
    params = []
    for opt in opts:
        opt.zero_grad(set_to_none=True)
        opt.param_groups[0]["lr"] = lr
        params += opt.param_groups[0]["params"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    for opt in opts:
        opt.step()
    return value


@dataclass
class Progress:
    """How far a training is."""
    step: int = 0
    samples: int = 0
    spent: float = 0.0                  # seconds, kills not counted
    log: list = field(default_factory=list)              # (samples, mean loss)
    folded: bool = False                # of the VAE: its encoder is done


def claim_run(run: Path, settings: dict[str, str]) -> None:
    """Make a folder this run's: its origin.json holds the settings.  ValueError: it is another run's, or a file."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run {run} is a file; name a folder")
    run.mkdir(parents=True, exist_ok=True)
    path = run / "origin.json"
    before = read_json(path) if path.exists() else settings
    other = [f"{key} {str(before.get(key))[:60]!r} instead of {value!r}" for key, value in settings.items()
             if before.get(key) != value]
    if other:
        raise ValueError(f"{run} holds a run with {', '.join(other)}; name another --run")
    write_json(path, settings)


def check_trained(sd: dict[str, Tensor]) -> None:
    """ValueError: a weight is not finite, so that nobody should save it."""
    for key, value in sd.items():
        if not value.isfinite().all():
            raise ValueError(f"the training went astray, {key} is not finite; what was saved before is still good, and "
                             "a smaller rate of learning may help")


def save_state(path: Path, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer], progress: Progress,
               origin: dict[str, str]) -> None:
    """Weights, the optimisers' state, progress and the run's settings (claim_run), in one file.

    ValueError: a weight is not finite.
    """
    state = {name: module.state_dict() for name, module in modules.items()}
    for sd in state.values():
        check_trained(sd)
    write_tensors(path, state | vars(progress) | {"opts": [opt.state_dict() for opt in opts], "origin": origin})


def check_alike(saved: object, own: object, what: str) -> None:
    """ValueError: a saved value is of another kind or shape than the one whose place it takes, or is not finite."""
    if isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or (saved.shape, saved.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{what} is no {own.dtype} of shape {tuple(own.shape)}")
        check_finite(saved, what)
    elif isinstance(own, dict):
        if check_kind(saved, dict, what).keys() != own.keys():
            raise ValueError(f"{what} has other parts")
        for key in own:
            check_alike(saved[key], own[key], key)
    elif type(saved) is not type(own):
        raise ValueError(f"{what} is {str(saved)[:40]}")


def resume(path: Path, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer], progress: Progress,
           origin: dict[str, str]) -> bool:
    """Put back what save_state wrote; False: there is no such file.  Broken: it is cut, or of another run."""
    if not path.exists():
        return False
    state = read_tensors(path, "state of this run")
    with decoding(path, "state of this run"):
        if check_kind(state, dict, "its content")["origin"] != origin:
            raise ValueError("it is another run's; remove it, or name another --run")
        for name, module in modules.items():
            check_alike(state[name], module.state_dict(), name)
            module.load_state_dict(state[name])
        for opt, saved in zip(opts, state["opts"], strict=True):
            check_alike(saved["param_groups"][0], opt.state_dict()["param_groups"][0], "param_groups")
            for i, values in check_kind(saved["state"], dict, "state").items():
                own = opt.param_groups[0]["params"][i].data
                if check_kind(values, dict, "state").keys() not in ({"m"}, {"step", "exp_avg", "exp_avg_sq"}):
                    raise ValueError(f"of the optimiser's state it has {list(values)}")
                for key, value in values.items():
                    is_count = torch.is_tensor(value) and value.ndim == 0    # AdamW's steps
                    check_alike(value, torch.zeros(()) if is_count else own, key)
            opt.load_state_dict(saved)
        for key, value in vars(progress).items():
            check_alike(state[key], value, key)
            setattr(progress, key, state[key])
    return True


def read_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file of this dtype and shape, read when it is looked at.  Broken: anything else."""
    with decoding(path, "array of this run"):
        array = open_memmap(path, "r")
        if (array.dtype, array.shape) != (dtype, shape):
            raise ValueError(f"it holds {array.dtype} {array.shape} instead of {np.dtype(dtype)} {shape}; remove it, "
                             "and it is made anew")
        return array

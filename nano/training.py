"""What the trainings of nano's VAE and of its MM-DiT share: the optimisers, a step, and states to go on from."""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from support.files import write_tensors


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


def optimise(opts: list[torch.optim.Optimizer], loss: Tensor, lr: float) -> None:
    """One step of all optimisers at this rate, gradient norm clipped at 1."""
    params = []
    for opt in opts:
        opt.zero_grad(set_to_none=True)
        opt.param_groups[0]["lr"] = lr
        params += opt.param_groups[0]["params"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    for opt in opts:
        opt.step()


@dataclass
class Progress:
    """How far a training is."""
    step: int = 0
    samples: int = 0
    spent: float = 0.0                  # seconds, kills not counted
    log: list = field(default_factory=list)              # (samples, mean loss)
    folded: bool = False                # of the VAE: its encoder is done


def save_state(path: Path, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer], progress: Progress
               ) -> None:
    """Weights, the optimisers' state and progress, in one file."""
    state = {name: module.state_dict() for name, module in modules.items()}
    write_tensors(path, state | vars(progress) | {"opts": [opt.state_dict() for opt in opts]})


def resume(path: Path, modules: dict[str, nn.Module], opts: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Put back what save_state wrote, if it did."""
    if not path.exists():
        return
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    for opt, saved in zip(opts, state["opts"]):
        opt.load_state_dict(saved)
    for key in vars(progress):
        setattr(progress, key, state[key])

"""What an evaluation prints and draws: tables, the paper's own numbers beside ours, one plot for each task."""
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

SCALINGS = ("map", "token", "none")


def plot(task: str, variants: list, rows: dict[str, dict], model, path: Path) -> None:
    """The task's figure: mIoU against block, head, noise level or kind of score, with floor and ceiling."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    miou = [rows[v.name]["mIoU"] for v in variants]
    if task == "heads":
        cfg = model.transformer.config
        image = ax.imshow(np.reshape(miou, (cfg.depth, cfg.heads)).T, aspect="auto", cmap="viridis")
        for i, (v, y) in enumerate(zip(variants, miou)):
            if len(variants) <= 100:                     # SD3's 576 numbers would not be readable
                bright = y > (min(miou) + max(miou)) / 2
                ax.text(i // cfg.heads, v.head, f"{y:.0f}", ha="center", va="center", color="black" if bright else "white")
        ax.set(xlabel="block", ylabel="head", title="mIoU of each head (Fig. 17)")
        ax.locator_params(integer=True)
        fig.colorbar(image, label="mIoU [%]")
    elif task == "thresholds":
        for scaling in SCALINGS:
            own = [v for v in variants if v.scaling == scaling]
            x, y = [v.threshold for v in own], [rows[v.name]["mIoU"] for v in own]
            line, = ax.semilogx(x, y, "o-", label="not scaled" if scaling == "none" else f"scaled over: {scaling}")
            ax.semilogx(x, [rows[f"{v.name} floor"]["mIoU"] for v in own], ":", color=line.get_color())
        ax.set(xlabel="threshold on the symmetric KL", ylabel="mIoU [%]", ylim=(0, 100),
               title="Proposals of the empty prompt's tokens; dotted: as many random ones")
        ax.axhline(rows["ceiling"]["mIoU"], color="black", ls="-.", lw=1, label="ceiling")
        ax.legend()
    else:
        if task == "layers":
            n = model.transformer.config.depth
            for name, ys, mark in (("image-to-text", miou[:n], "o-"), ("text-to-image", miou[n:], "s--")):
                ax.plot(range(n), ys, mark, label=name)
            ax.set(xlabel="block", xticks=range(n), title="Segmentation performance across blocks (Fig. 8)")
        elif task == "timesteps":
            ax.plot([v.sigma for v in variants], miou, "o-", label=f"block {model.preset.block}")
            ax.axvline(model.preset.sigma, color="grey", lw=0.8,
                       label=f"{model.preset.noise_steps} of {model.preset.steps} left, sigma {model.preset.sigma:.3f}")
            ax.set(xlabel="sigma of the noised picture (0 clean, 1 noise)", title="Against the noise level (Fig. 15)")
        else:
            ax.bar([v.name.replace(", ", ",\n") for v in variants], miou, width=0.6)
            ax.set(title="Which score is compared (Table 5)")
        for name, style in (("floor", ":"), ("ceiling", "-.")):
            ax.axhline(rows[name]["mIoU"], color="black", ls=style, lw=1, label=name)
        ax.set(ylabel="mIoU [%]", ylim=(0, 100))
        ax.legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def peak_megabytes(device: torch.device) -> float:
    """Peak memory: on the GPU that is meant, else of this process; nan where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024 ** 2)


# What the paper prints, in percent of mIoU; never ours.
PAPER = {
    "ovss": ("Table 1", ["voc", "coco-object", "context59", "ade20k", "cityscapes"], {
        "ProxyCLIP": [83.3, 49.8, 39.6, 24.2, 42.0], "CorrCLIP": [91.8, 52.7, 47.9, 28.8, 49.9],
        "DiffSegmter": [66.4, 40.0, 45.9, 24.2, 12.4], "iSeg": [82.9, 37.3, 39.2, 24.2, 24.8],
        "SD3": [89.2, 62.0, 49.0, 34.2, 26.5], "SD3.5": [86.1, 57.8, 43.4, 30.7, 23.8],
        "Flux.1-dev": [83.1, 50.6, 38.2, 23.9, 17.1], "SD3 + MAGNET (SA-1B)": [89.1, 62.0, 49.1, 34.7, 25.4],
        "SD3 + MAGNET (COCO)": [89.8, 62.9, 51.2, 35.2, 26.0]}),
    "unsup": ("Table 2", ["voc21", "context60", "coco-object81", "stuff27", "cityscapes", "ade20k"], {
        "ReCO": [25.1, 19.9, 15.7, 26.3, 19.3, 11.2], "MaskCLIP": [38.8, 23.6, 20.6, 19.6, 10.0, 9.8],
        "MaskCut": [53.8, 43.4, 30.1, 41.7, 18.7, 35.7], "DiffSeg": [49.8, 48.8, 23.2, 44.2, 16.8, 37.7],
        "DiffCut": [62.0, 54.1, 32.0, 46.1, 28.4, 42.4],
        "SD3": [54.9, 52.6, 38.5, 49.7, 24.2, 44.9], "SD3.5": [52.3, 52.9, 36.8, 47.1, 24.2, 41.5],
        "SD3 + MAGNET (SA-1B)": [55.1, 52.8, 39.0, 50.8, 24.2, 45.0],
        "SD3 + MAGNET (COCO)": [56.1, 53.5, 38.8, 53.5, 24.4, 45.4]})}


def table(rows: dict[str, dict]) -> str:
    """mIoU, mACC, pACC, a row to a variant; floor and ceiling last."""
    width = max(map(len, rows))
    last = {"floor": 1, "ceiling": 2}
    rows = dict(sorted(rows.items(), key=lambda row: last.get(row[0], 0)))
    lines = [f"{'':{width}s}   mIoU   mACC   pACC"]
    lines += [f"{name:{width}s} {r['mIoU']:6.1f} {r['mACC']:6.1f} {r['pACC']:6.1f}" for name, r in rows.items()]
    return "\n".join(lines)


def paper_table(task: str, name: str, found: dict[str, dict[str, dict]]) -> str:
    """Our rows of each data set that was found below the paper's, in the shape of its Table 1 or 2."""
    title, columns, paper = PAPER[task]
    rows = {f"{method}, the paper's": values for method, values in paper.items()}
    for row, label in ((name, f"{name}, ours"), ("floor", "floor, ours"), ("ceiling", "ceiling, ours")):
        rows[label] = [found[c][row]["mIoU"] if c in found else None for c in columns]
    width, cell = max(map(len, rows)), max(map(len, columns)) + 2
    lines = [f"{title + ', mIoU':{width}s}" + "".join(f"{c:>{cell}s}" for c in columns)]
    lines += [f"{row:{width}s}" + "".join(f"{'-' if x is None else f'{x:.1f}':>{cell}s}" for x in values)
              for row, values in rows.items()]
    return "\n".join(lines)


def plot_losses(log: list[dict], path: Path) -> None:
    """train_magnet.py's log: each loss against the step, and what was measured on the validation pictures."""
    steps, checks = [x for x in log if "flow" in x], [x for x in log if "val" in x]
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for ax, keys in zip(axes, (["flow"], ["focal", "dice"])):
        for key in keys:
            ax.plot([x["step"] for x in steps], [x[key] for x in steps], lw=0.8, label=key)
        ax.set(xlabel="step", title="flow matching, Eq. 2" if keys == ["flow"] else "mask losses, Eq. 12")
        ax.legend()
    for key in ("mIoU", "unsup mIoU"):
        seen = [x for x in checks if key in x["val"]]
        axes[2].plot([x["step"] for x in seen], [x["val"][key] for x in seen], "o-", label=key)
    axes[2].set(xlabel="step", ylabel="%", title="validation")
    axes[2].legend()
    fig.savefig(path, dpi=100)
    plt.close(fig)

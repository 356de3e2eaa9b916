"""What an evaluation draws and measures of itself: the paper's own numbers beside ours, one plot for each task."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from support.files import read_json, write_figure

# mIoU in percent as the paper prints it; never ours
PAPER = read_json(Path(__file__).parent / "paper_miou.json")


def miou_of(variants, rows, suffix=""):
    return [rows[v.name + suffix]["mIoU"] for v in variants]


def plot_layers(ax, variants, rows, model):
    """Fig. 8."""
    depth = model.transformer.config.depth
    miou = miou_of(variants, rows)
    ax.plot(range(depth), miou[:depth], "o-", label="image-to-text")
    ax.plot(range(depth), miou[depth:], "s--", label="text-to-image")
    ax.axvline(model.preset.block, color="grey", lw=0.8, label=f"expert block, {model.preset.block}")
    ax.set(xlabel="block", xticks=range(depth), title="Segmentation performance across blocks (Fig. 8)")


def plot_timesteps(ax, variants, rows, model):
    """Fig. 15."""
    p = model.preset
    ax.plot([v.sigma for v in variants], miou_of(variants, rows), "o-", label=f"block {p.block}")
    ax.axvline(p.sigma, color="grey", lw=0.8, label=f"{p.noise_steps} of {p.steps} left, sigma {p.sigma:.3f}")
    ax.set(xlabel="sigma of the noised picture (0 clean, 1 noise)", title="Against the noise level (Fig. 15)")


def plot_normalization(ax, variants, rows, model):
    """Table 5."""
    ax.bar([v.name.replace(", ", ",\n") for v in variants], miou_of(variants, rows), width=0.6)
    ax.set(title="Which score is compared (Table 5)")


def plot_thresholds(ax, variants, rows, model):
    for scaling in dict.fromkeys(v.scaling for v in variants):
        chosen = [v for v in variants if v.scaling == scaling]
        x = [v.threshold for v in chosen]
        label = "not scaled" if scaling == "none" else f"scaled over: {scaling}"
        (line,) = ax.semilogx(x, miou_of(chosen, rows), "o-", label=label)
        ax.semilogx(x, miou_of(chosen, rows, " floor"), ":", color=line.get_color())
    ax.set(xlabel="threshold on the symmetric KL",
           title="Proposals of the empty prompt's tokens; dotted: as many random ones")


def plot_heads(ax, variants, rows, model):
    """Fig. 17."""
    cfg = model.transformer.config
    miou = miou_of(variants, rows)
    image = ax.imshow(np.reshape(miou, (cfg.depth, cfg.heads)).T, aspect="auto")
    if len(variants) <= 100:                             # SD3's 576 numbers would not be readable
        for v, y in zip(variants, miou):
            bright = y > (min(miou) + max(miou)) / 2
            ax.text(v.block, v.head, f"{y:.0f}", ha="center", va="center", color="black" if bright else "white")
    ax.set(xlabel="block", ylabel="head", title="mIoU of each head (Fig. 17)")
    ax.locator_params(integer=True)
    ax.figure.colorbar(image, label="mIoU [%]")


def plot_readings(ax, variants, rows, model):
    """Beyond the paper."""
    ax.bar([v.name for v in variants], miou_of(variants, rows), width=0.6)
    ax.axhline(rows["ceiling pixels"]["mIoU"], color="grey", ls="--", lw=1, label="ceiling, refined by pixels")
    ax.set(title="Readings of the same attention")


PLOTS = {"readings": plot_readings, "layers": plot_layers, "timesteps": plot_timesteps,
         "normalization": plot_normalization, "thresholds": plot_thresholds, "heads": plot_heads}


def plot(task, variants, rows, model, path):
    """The task's figure: mIoU against block, head, noise level, threshold or kind of score, with floor and ceiling."""
    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    PLOTS[task](ax, variants, rows, model)
    ax.set_title(f"{model.name}: {ax.get_title()}")
    if task != "heads":
        for name, style in (("floor", ":"), ("ceiling", "-.")):
            if name in rows:
                ax.axhline(rows[name]["mIoU"], color="black", ls=style, lw=1, label=name)
        ax.set(ylabel="mIoU [%]", ylim=(0, 100))
        ax.legend(loc=(0.62, 0.55) if task == "thresholds" else "best")      # there nothing lies below it
    write_figure(path, fig, dpi=110)
    plt.close(fig)


def paper_table(task, name, results):
    """Our rows of each data set that was evaluated below the paper's, in the shape of its Table 1 or 2."""
    title = PAPER[task]["title"]
    columns = PAPER[task]["columns"]
    rows = {f"{method}, the paper's": values for method, values in PAPER[task]["mIoU"].items()}
    for row in (name, "floor", "ceiling"):
        rows[f"{row}, ours"] = [results[c][row]["mIoU"] if c in results else None for c in columns]
    width = max(map(len, rows))
    cell = max(map(len, columns)) + 2
    lines = [f"{title + ', mIoU':{width}s}" + "".join(f"{c:>{cell}s}" for c in columns)]
    for row, values in rows.items():
        numbers = ["-" if x is None else f"{x:.1f}" for x in values]
        lines.append(f"{row:{width}s}" + "".join(f"{x:>{cell}s}" for x in numbers))
    return "\n".join(lines)


# CLIPScore as the paper prints it, never ours. A.5: 500 pictures of Pick-a-Pic for each of five seeds, 5000 of COCO,
# 1000 of SA-1B
TABLE_3 = {"SD3, the paper's": {"Pick-a-Pic": 27.0252, "coco": 26.0638, "SA-1B": 28.3422},
           "SD3 + MAGNET (SA-1B), the paper's": {"Pick-a-Pic": 27.0547, "coco": 26.2318, "SA-1B": 28.4476},
           "SD3 + MAGNET (COCO), the paper's": {"Pick-a-Pic": 27.0409, "coco": 26.2319, "SA-1B": 28.5553}}


def beside_table_3(row: str, source: str, mean: float) -> str:
    """Our mean below Table 3's rows, in the column of its prompts, or in one of their own."""
    rows = TABLE_3 | {row: {source: mean}}
    columns = dict.fromkeys(["Pick-a-Pic", "coco", "SA-1B", source])
    width = max(map(len, rows))
    lines = [f"{'Table 3, CLIPScore':{width}s}" + "".join(f"{column:>12.11s}" for column in columns)]
    for name, values in rows.items():
        numbers = [f"{values[column]:.4f}" if column in values else "-" for column in columns]
        lines.append(f"{name:{width}s}" + "".join(f"{number:>12s}" for number in numbers))
    return "\n".join(lines)


def waterfall_table(found):
    """{table: {setting: its mIoU, and [difference, low, high] above ours}} -> a row to a setting."""
    width = max(len(name) for rows in found.values() for name in rows)
    lines = []
    for title, rows in found.items():
        lines.append(f"{title:{width}s}   mIoU  above ours  95 % interval over the pictures")
        for name, row in rows.items():
            difference, low, high = row["above ours"]
            worth = "" if name == "ours" else f"  {difference:+10.2f}  {low:+.2f} to {high:+.2f}"
            lines.append(f"{name:{width}s} {row['mIoU']:6.1f}{worth}")
    return "\n".join(lines)


def plot_waterfall(found, whose, path):
    """waterfall_table as bars: what each choice alone adds to ours, and all together, with the interval of each."""
    size = (5 * len(found), 4)
    fig, axes = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False, sharex=True)
    fig.suptitle(f"The released code's choices, {whose}")
    for ax, (table, rows) in zip(axes[0], found.items()):
        names = [name for name in rows if name != "ours"]
        above = np.array([rows[name]["above ours"] for name in names])       # (settings, 3)
        ends = np.abs(above[:, 1:] - above[:, :1]).T                         # (2, settings)
        colours = ["tab:blue" if name == "released" else "tab:grey" for name in names]
        labels = [f"{name} {difference:+.2f}" for name, difference in zip(names, above[:, 0])]
        ax.barh(labels, above[:, 0], color=colours, xerr=ends, capsize=3)
        ax.invert_yaxis()
        ax.axvline(0, color="black", lw=0.8)
        ax.set(xlabel="mIoU above ours [points]", title=f"{table}: ours is {rows['ours']['mIoU']:.1f}")
    write_figure(path, fig, dpi=110)
    plt.close(fig)


def plot_losses(log, path):
    """train_magnet.py's log: each loss against the step, and what was measured on the validation pictures."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    steps = [x for x in log if "flow" in x]
    checks = [x for x in log if "val" in x]
    for ax, key in ((axes[0], "flow"), (axes[1], "focal"), (axes[1], "dice")):
        ax.plot([x["step"] for x in steps], [x[key] for x in steps], lw=0.8, label=key)
    for key in ("mIoU", "unsup mIoU"):
        axes[2].plot([x["step"] for x in checks], [x["val"][key] for x in checks], "o-", label=key)
    for ax, title in zip(axes, ("flow matching, Eq. 2", "mask losses, Eq. 12", "validation, %")):
        ax.set(xlabel="step", title=title)
        ax.legend()
    write_figure(path, fig, dpi=100)
    plt.close(fig)

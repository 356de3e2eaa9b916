"""The paper's figures that read or blur the attention (Sec. 3.3, App. B, C): a command for each, by any model.

    python figures.py                                   # every figure below, by nano, into out/figures-nano
    python figures.py shares values                     # Fig. 2 (b, c); Fig. 4, 19, 28
    python figures.py pca tokens heads pads             # Fig. 3, 29; Fig. 16, 25; Fig. 9 (a), 26, 27; Fig. 9 (b), 30
    python figures.py gallery                           # a picture for each prompt (Fig. 14)
    python figures.py perturb guide                     # Fig. 5, 31 (18, 20 with our own judge); Fig. 6, 32
    python figures.py expert                            # which block is the semantic grounding expert?
    python figures.py text                              # at which noise levels do the words matter?
    python figures.py magnet --lora nano/magnet.safetensors      # Fig. 12, 33: maps and pictures without and with

Pictures are generated from prompts, and attention is read on the way, at t = 8 of 28 steps left (shares: at t = 28,
noise, too).  Prompts: captions of the toy world for nano, else the paper's 50 of DrawBench (prompts.txt).
"""
import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm

import evaluate
import seg4diff
from analysis import (
    CHOICES,
    JUDGE_DRAWS,
    JUDGE_SIGMA,
    attention_shares,
    bootstrap,
    caption_losses,
    choices,
    judge_accuracy,
    pca_rgb,
    sensitivity,
    taps_of,
    token_maps,
    uniform_share,
    value_norms,
    words_of,
)
from nano import scenes
from seg4diff import Seg4Diff
from support import weights
from support.cli import command
from support.data import DATASETS, IGNORE, ROOT
from support.ledger import write_json
from support.metrics import scores
from support.pictures import overlay, palette, sheet

# ---------------------------------------------------------------------------- drawing


class Figure:
    """A grid of panels that is written when the block ends."""

    def __init__(self, path: Path, rows: int, columns: int, size: tuple[float, float], title: str):
        self.path = path
        self.fig, axes = plt.subplots(rows, columns, figsize=(columns * size[0], rows * size[1]), layout="constrained",
                                      squeeze=False)
        self.axes = axes
        self.fig.suptitle(textwrap.fill(title, int(9 * columns * size[0])))

    def __enter__(self) -> np.ndarray:
        return self.axes

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self.fig.savefig(self.path, dpi=90)
        plt.close(self.fig)


def panel(ax, picture: np.ndarray | Image.Image, title: str = "", **options) -> None:
    """A picture or a map without ticks."""
    ax.imshow(np.asarray(picture), **options)
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])


def batches(model: Seg4Diff, prompts: Sequence[str], desc: str):
    """(index of the first, prompts) of one batch after the other, under a progress bar."""
    size = model.preset.batch
    for i in tqdm(range(0, len(prompts), size), desc=desc, unit="batch"):
        yield i, prompts[i:i + size]


def shares(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 2 (b, c)."""
    at, depth = (model.preset.noise_steps, model.preset.steps), model.transformer.config.depth
    found: dict = {t: {kind: [[] for _ in range(depth)] for kind in ("I2I", "I2T", "T2I", "T2T")} for t in at}
    for i, part in batches(model, prompts, "shares"):
        _, _, taps = taps_of(model, part, at, i)
        for t in at:
            for block, qkv in taps[t].items():
                for kind, share in attention_shares(qkv).items():
                    found[t][kind][block] += share.mean(1).tolist()
                line = uniform_share(qkv)
    mean = {t: {kind: [float(np.mean(x)) for x in found[t][kind]] for kind in found[t]} for t in at}
    with Figure(out / "shares.png", 1, 2, (5, 3.4), f"Where attention goes, {model.name} (Fig. 2)") as axes:
        for ax, who, uniform in zip(axes[0], "IT", (1 - line, line)):
            other = "T" if who == "I" else "I"
            for t, style in zip(at, ("o-", "s--")):
                ax.plot(range(depth), mean[t][f"{who}2{other}"], style, label=f"t = {t}")
            ax.axhline(uniform, color="black", ls=":", label="uniform")
            ax.set(xlabel="block", ylim=(0, 1), ylabel=f"share given to {'text' if who == 'I' else 'image'} keys",
                   title=f"{'image' if who == 'I' else 'text'} queries")
            ax.legend()
    return {"prompts": len(prompts), "uniform image share": line, "shares": mean}


def norms_of(model: Seg4Diff, prompts: list[str]) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Value norms by block of "image", "text" and "prompt" tokens, mean over prompts: whole, and of each head (depth, H)."""
    t, depth = model.preset.noise_steps, model.transformer.config.depth
    found: dict = {kind: [[] for _ in range(depth)] for kind in ("image", "text", "prompt")}
    by_head: dict = {kind: [[] for _ in range(depth)] for kind in found}
    for i, part in batches(model, prompts, "values"):
        _, cond, taps = taps_of(model, part, [t], i)
        for block, qkv in taps[t].items():
            for kind, (whole, head) in value_norms(qkv, [len(words_of(cond, b)) for b in range(len(part))]).items():
                found[kind][block] += whole.tolist()
                by_head[kind][block].append(head.cpu())
    return ({kind: [float(np.nanmean(x)) for x in found[kind]] for kind in found},
            {kind: np.array([torch.cat(x).nanmean(0).tolist() for x in by_head[kind]]) for kind in by_head})


def values(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 4, 19: value norms of each block; Fig. 28: of each head."""
    t, depth = model.preset.noise_steps, model.transformer.config.depth
    mean, heads = norms_of(model, prompts)
    with Figure(out / "values.png", 1, 3, (4.6, 3.4), f"L2 norm of values at t = {t}, {model.name} (Fig. 4, 28)") as axes:
        for kind, mark, label in (("image", "o-", "image"), ("text", "s--", "all text"), ("prompt", "^-", "prompt tokens")):
            axes[0, 0].plot(range(depth), mean[kind], mark, label=label)
        axes[0, 0].set(xlabel="block", ylabel="mean norm", title="whole values")
        axes[0, 0].legend()
        top = max(heads["image"].max(), heads["prompt"].max())
        for ax, kind in zip(axes[0, 1:], ("image", "prompt")):
            shown = ax.imshow(heads[kind].T, aspect="auto", vmin=0, vmax=top)
            ax.set(xlabel="block", ylabel="head", title=f"{kind} tokens, each head")
            ax.locator_params(integer=True)
        plt.colorbar(shown, ax=axes[0, 2])
    return {"prompts": len(prompts), "t": t, "norms": mean, "heads": {kind: x.tolist() for kind, x in heads.items()}}


def pca(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 3, 29: one picture, q, k, v of its image tokens in every block."""
    t = model.preset.noise_steps
    (image,), _, taps = taps_of(model, prompts[:1], [t])
    depth, qkv = model.transformer.config.depth, taps[t]
    title = f"First three components at t = {t} (Fig. 3, 29): {prompts[0]}"
    with Figure(out / "pca.png", 3, depth + 1, (1.4, 1.5), title) as axes:
        for row, name in enumerate("qkv"):
            panel(axes[row, 0], image, "generated" if row == 0 else "")
            axes[row, 0].set_ylabel({"q": "queries", "k": "keys", "v": "values"}[name])
            for block in range(depth):
                x = getattr(qkv[block], name)[0, :, :qkv[block].n_img].transpose(0, 1).flatten(1)    # (N, D)
                panel(axes[row, block + 1], pca_rgb(x, qkv[block].grid), f"block {block}" if row == 0 else "")
    return {"prompt": prompts[0], "t": t}


def tokens(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 16, 25: I2T and T2I maps of every token of a prompt in the expert block."""
    t, block = model.preset.noise_steps, model.preset.block
    (image,), cond, taps = taps_of(model, prompts[:1], [t])
    columns = [0, *words_of(cond, 0)][:16]
    both = {way: token_maps(taps[t][block], columns, kind)[0].mean(0) for way, kind in (("I2T", "softmax"), ("T2I", "t2i"))}
    title = f"Maps of block {block} at t = {t} (Fig. 16, 25): {prompts[0]}"
    with Figure(out / "tokens.png", 2, len(columns) + 1, (1.25, 1.5), title) as axes:
        for row, (way, maps) in enumerate(both.items()):
            panel(axes[row, 0], image, "generated" if row == 0 else "")
            axes[row, 0].set_ylabel(way)
            for i, (c, one) in enumerate(zip(columns, maps)):
                panel(axes[row, i + 1], one.cpu(), cond.tokens[0][c] if row == 0 else "")
    return {"prompt": prompts[0], "tokens": [cond.tokens[0][c] for c in columns]}


def heads(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 9 (a), 26, 27: every head's map of each word of a prompt, in the expert block."""
    t, block = model.preset.noise_steps, model.preset.block
    (image,), cond, taps = taps_of(model, prompts[:1], [t])
    columns = words_of(cond, 0)[:10]
    maps = token_maps(taps[t][block], columns)[0]                            # (H, T, h, w)
    title = f"Each head of block {block} at t = {t} (Fig. 9 a, 26): {prompts[0]}"
    with Figure(out / "heads.png", len(columns), len(maps) + 2, (1.25, 1.4), title) as axes:
        for row, column in enumerate(columns):
            panel(axes[row, 0], image)
            axes[row, 0].set_ylabel(cond.tokens[0][column])
            panel(axes[row, 1], maps[:, row].mean(0).cpu(), "mean" if row == 0 else "")
            for h, one in enumerate(maps[:, row]):
                panel(axes[row, h + 2], one.cpu(), f"head {h}" if row == 0 else "")
    return {"prompt": prompts[0], "tokens": [cond.tokens[0][c] for c in columns]}


def pads(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 9 (b), 30: a picture generated from the empty prompt, and the maps of all its text tokens."""
    t, block = model.preset.noise_steps, model.preset.block
    (image,), cond, taps = taps_of(model, [""], [t])
    names, columns = cond.tokens[0], 10
    maps = token_maps(taps[t][block], range(len(names)))[0].mean(0)          # (L, h, w)
    rows = -(-(len(names) + 1) // columns)
    title = f"The empty prompt in block {block} at t = {t} (Fig. 9 b, 30)"
    with Figure(out / "pads.png", rows, columns, (1.25, 1.45), title) as axes:
        panel(axes.flat[0], image, "generated")
        for i, ax in enumerate(axes.flat[1:]):
            if i < len(names):
                panel(ax, maps[i].cpu(), f"{names[i]} {i}")
            else:
                ax.axis("off")
    return {"tokens": len(names)}


def drawn(model: Seg4Diff, prompts: list[str], **options) -> list[Image.Image]:
    """Pictures of all prompts, a batch at a time; picture i starts from the noise of seed i."""
    size = model.preset.batch
    return [im for i in range(0, len(prompts), size) for im in
            seg4diff.generate(model, prompts[i:i + size], seed=i, **options)]


def gallery(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """What the model makes of each prompt (the paper's are its Fig. 14)."""
    sheet(drawn(model, prompts), prompts).save(out / "gallery.png")
    return {"prompts": len(prompts)}


def judged(model: Seg4Diff, prompts: list[str], ways: dict[str, dict], out: Path, name: str, title: str) -> dict:
    """Generate the same seeds in each way (options of generate), judge, and draw pictures and numbers."""
    prompts = list(dict.fromkeys(prompts))
    rows, shown = {}, []
    for way, options in tqdm(ways.items(), desc=name, unit="way"):
        images = drawn(model, prompts, **options)
        losses = caption_losses(model, images, [[*own, ""] for own in choices(prompts)])     # (n, CHOICES+1)
        own, empty = losses[:, 0], losses[:, -1]
        gain = 100 * (empty - own) / empty
        rows[way] = {"accuracy": judge_accuracy(losses[:, :-1]), "gain": float(gain.mean()),
                     "error": float(gain.std() / len(gain) ** 0.5)}
        shown.append(images[:4])
    pictures = [images[k] for k in range(len(shown[0])) for images in shown]
    captions = [f"{way}: {prompts[k]}" if way == next(iter(ways)) else way for k in range(len(shown[0])) for way in ways]
    sheet(pictures, captions, columns=len(ways), side=192).save(out / f"{name}_pictures.png")
    panels, n = [("gain", "loss saved by the caption [%]")], len(prompts)
    if n >= CHOICES:                                     # a choice of two captions says little
        panels.append(("accuracy", f"own caption best of {CHOICES} [%]"))
    with Figure(out / f"{name}.png", 1, len(panels), (5, 3.4), f"{title}; {n} pictures") as axes:
        for ax, (key, label) in zip(axes[0], panels):
            ax.bar(range(len(rows)), [r[key] for r in rows.values()],
                   yerr=[r["error"] for r in rows.values()] if key == "gain" else None)
            ax.set(ylabel=label, xticks=range(len(rows)))
            ax.set_xticklabels(rows, rotation=45, ha="right")
        if n >= CHOICES:
            axes[0, 1].axhline(100 / CHOICES, color="black", ls=":", label="chance")
            axes[0, 1].legend(loc="lower right")
    return {"n": n, "judge": f"flow loss at sigma {JUDGE_SIGMA}, {JUDGE_DRAWS} draws, "
            f"{min(CHOICES, n)} captions", "rows": rows}


def perturb(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 5, 18, 31: I2T blurred in one block after the other, in all branches of the guidance; same seeds.

    For nano the judge is validated beside it, on drawn scenes with their own and with each other's captions, if there
    are prompts enough for a choice.
    """
    ways = {"none": {}} | {f"block {i}": {"perturb": [i]} for i in range(model.transformer.config.depth)}
    ways["all"] = {"perturb": range(model.transformer.config.depth)}
    found = judged(model, prompts, ways, out, "perturb", f"I2T blurred in one block, {model.name} (Fig. 5, 18)")
    if toy(model) and len(prompts) >= CHOICES:
        true = [scenes.draw(s) for s in scenes.VAL_SEEDS[200:200 + len(prompts)]]
        told = [scenes.caption(s, np.random.default_rng(i)) for i, s in enumerate(true)]
        losses = caption_losses(model, [Image.fromarray(s.image) for s in true], choices(told))
        found["validation"] = {"pairs": len(losses), "captions": CHOICES, "own caption best [%]": judge_accuracy(losses),
                               "own better than the next [%]": 100 * float((losses[:, 0] < losses[:, 1]).mean())}
    return found


def guide(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 6, 32: Eq. 7 with s = 1 and one block after the other, on top of classifier-free guidance."""
    ways = {"none": {}} | {f"block {i}": {"pag": 1.0, "blocks": [i]} for i in range(model.transformer.config.depth)}
    return judged(model, prompts, ways, out, "guide", f"Guidance by a perturbed block (Eq. 7, s = 1), {model.name} (Fig. 6)")


def expert(model: Seg4Diff, prompts: list[str], out: Path, data_name: str = "scenes-dev", root: Path = ROOT,
           limit: int = 100) -> dict:
    """mIoU, value norms and sensitivity to perturbation of every block, side by side; do they name the same block?"""
    data, depth = DATASETS[data_name](root), model.transformer.config.depth
    names = evaluate.subset(data.names, limit)
    variants = [v for v in evaluate.layers(model) if v.kind == "softmax"]
    counts = [[c[v.name] for v in variants] for _, c in
              tqdm(evaluate.tally(model, data, names, variants, evaluate.Protocol(), model.preset.batch), total=len(names),
                   desc="mIoU of blocks", unit="image") if isinstance(c, dict) and c]
    miou, best = bootstrap(np.array(counts))
    low, high = np.percentile(miou, [2.5, 97.5], axis=0)
    norms, _ = norms_of(model, prompts)
    ratio = np.array(norms["prompt"]) / np.array(norms["image"])
    change = sensitivity(model, [data.read(name) for name in names[:32]], data.classes, model.preset.sigma).mean(0)
    total = np.array([scores(c)["mIoU"] for c in np.sum(counts, axis=0)])
    rows = {"mIoU [%]": total, "value norm, prompt / image": ratio, "change by blurring I2T [%]": change}
    agreement = {f"{a} ~ {b}": float(spearmanr(rows[a], rows[b]).statistic)
                 for i, a in enumerate(rows) for b in list(rows)[i + 1:]}
    with Figure(out / "expert.png", 1, 3, (4.6, 3.2), f"Which block is the expert? {model.name}, {data.name}") as axes:
        for ax, (label, y) in zip(axes[0], rows.items()):
            ax.bar(range(depth), y, color=["C1" if i == np.argmax(y) else "C0" for i in range(depth)],
                   yerr=np.stack([total - low, high - total]).clip(0) if "mIoU" in label else None)
            ax.set(xlabel="block", ylabel=label, xticks=range(0, depth, max(1, depth // 8)))
    return {"n": len(counts), "prompts": len(prompts), "rows": {k: list(map(float, v)) for k, v in rows.items()}, "best": {
        k: int(np.argmax(v)) for k, v in rows.items()}, "95% of mIoU": [list(map(float, low)), list(map(float, high))],
        "share of bootstrap draws in which a block has the best mIoU": best.tolist(), "rank correlation": agreement}


def text(model: Seg4Diff, prompts: list[str], out: Path, data_name: str = "scenes-dev", root: Path = ROOT,
         limit: int = 100) -> dict:
    """How much of the flow loss of real pictures their class names save, against the empty prompt, at each noise level;
    and what the names of the next picture do."""
    data = DATASETS[data_name](root)
    items = [data.read(name) for name in evaluate.subset(data.names, min(limit, 32))]
    named = [seg4diff.names_of(model.text, item.labels, data.classes) for item in items]
    levels, rows = sorted({0.1, 0.3, 0.7, 0.9, round(model.preset.sigma, 3)}), {}
    for level in tqdm(levels, desc="text", unit="level"):
        losses = caption_losses(model, [item.image for item in items],
                                [[own, "", other] for own, other in zip(named, named[1:] + named[:1])], level)
        own, other = (100 * (losses[:, 1] - losses[:, k]) / losses[:, 1] for k in (0, 2))    # (n,)
        rows[level] = {"own": float(own.mean()), "error": float(own.std() / len(own) ** 0.5), "others": float(other.mean()),
                       "own explain better than others [% of pictures]": 100 * float((own > other).mean())}
    with Figure(out / "text.png", 1, 1, (5.4, 3.6), f"What words tell, {model.name}, {data.name}") as axes:
        ax = axes[0, 0]
        ax.errorbar(levels, [r["own"] for r in rows.values()], [r["error"] for r in rows.values()], fmt="o-",
                    label="the picture's own class names")
        ax.plot(levels, [r["others"] for r in rows.values()], "s--", label="those of the next picture")
        ax.axvline(model.preset.sigma, color="black", ls=":", label="where segmentation reads")
        ax.axhline(0, color="grey", lw=0.8)
        ax.set(xlabel="sigma", ylabel="flow loss saved [%]")
        ax.legend()
    return {"n": len(items), "flow loss saved by class names [%]": rows}


def magnet(model: Seg4Diff, prompts: list[str], out: Path, base: Seg4Diff, data_name: str = "scenes-dev",
           root: Path = ROOT) -> dict:
    """Fig. 12, 33: masks and class maps of the same noised pictures without (base) and with a LoRA; and what the same
    noise becomes, without and with."""
    data = DATASETS[data_name](root)
    items = [data.read(name) for name in data.names[:3]]
    present = [np.setdiff1d(np.unique(item.labels), [IGNORE]) for item in items]
    columns, colours = 2 + min(6, max(map(len, present))), palette(len(data.classes))
    title = f"Block {model.preset.block} without and with {model.name.removeprefix(base.name + '+')} (Fig. 12, 33); " \
        "maps: each class's share among the classes, dark 0, bright 1"
    with Figure(out / "magnet.png", 2 * len(items), columns, (1.4, 1.5), title) as axes:
        for ax in axes.flat:
            ax.axis("off")
        for i, (item, ids) in enumerate(zip(items, present)):
            names = [data.classes[k] for k in ids]
            for line, m, label in zip(axes[2 * i:], (base, model), ("without", "with")):
                found = seg4diff.segment(m, item.image, names, seed=evaluate.image_seed(item.name, 0))
                shown = [(item.image, "picture") if m is base else (overlay(item.image, item.labels, colours), "truth")]
                shown.append((overlay(item.image, ids[found.labels], colours), "argmax"))
                shares = found.maps / found.maps.sum(0)                      # (K, h, w), what argmax compares
                for ax, (picture, name) in zip(line, [*shown, *zip(shares, names)]):
                    ax.axis("on")
                    panel(ax, picture, name, vmin=0, vmax=1)
                line[0].set_ylabel(label)
    few = prompts[:4]
    before, after = (drawn(m, few) for m in (base, model))
    sheet([*before, *after], [*(f"without: {p}" for p in few), *["with, from the same noise"] * len(few)],
          columns=len(few)).save(out / "magnet_pictures.png")
    change = np.abs(np.stack(before).astype(float) - np.stack(after)).mean()
    return {"pictures": [item.name for item in items], "change of generated pictures [grey levels of 255]": float(change)}


def toy(model: Seg4Diff) -> bool:
    """Whether a model makes pictures of the toy world's size: nano, or one that was trained like it."""
    return model.preset.size == scenes.SIDE


FIGURES: dict[str, Callable] = {"shares": shares, "values": values, "pca": pca, "tokens": tokens, "heads": heads,
                                "pads": pads, "gallery": gallery, "perturb": perturb, "guide": guide, "expert": expert,
                                "text": text, "magnet": magnet}


def main(args: argparse.Namespace) -> None:
    for figure in args.figures:
        if figure not in FIGURES:
            raise ValueError(f"there is no figure {figure!r}; choose from {', '.join(FIGURES)}")
    if args.limit < 1:
        raise ValueError("--limit must be at least 1")
    if args.dataset is not None and args.dataset not in DATASETS:
        raise ValueError(f"there is no data set {args.dataset!r}; choose one of {', '.join(DATASETS)}")
    if "magnet" in args.figures and args.lora is None:
        raise ValueError("magnet shows a model without and with a LoRA; name one with --lora")
    model = seg4diff.load(args.model, args.device, args.dtype, lora=args.lora)
    if args.prompts is not None and not args.prompts.is_file():
        raise ValueError(f"--prompts {args.prompts} is not a file; it should hold a prompt to a line")
    if args.prompts is None and toy(model):
        prompts = [scenes.caption(scenes.draw(s), np.random.default_rng(s)) for s in scenes.VAL_SEEDS[:args.limit]]
    else:
        lines = (args.prompts or Path(__file__).parent / "support/prompts.txt").read_text().splitlines()
        prompts = [line for line in lines if line.strip()][:args.limit]
        if not prompts:
            raise ValueError(f"{args.prompts} holds no prompt")
    out = args.out or Path("out") / f"figures-{model.name}"
    out.mkdir(parents=True, exist_ok=True)
    for figure in args.figures or [f for f in FIGURES if f != "magnet" or args.lora]:
        options = {} if figure not in ("expert", "text", "magnet") else dict(
            data_name=args.dataset or ("scenes-dev" if toy(model) else "voc"), root=args.data_root)
        options |= dict(base=seg4diff.load(args.model, args.device, args.dtype)) if figure == "magnet" else \
            dict(limit=2 * args.limit) if options else {}
        numbers = {"model": [model.name, model.fingerprint]} | FIGURES[figure](model, prompts, out, **options)
        write_json(out / f"{figure}.json", numbers)
        for key, value in numbers.items():
            if key not in ("heads", "model"):
                print(f"{figure}: {key}: {json.dumps(value)}")
        print(f"wrote {out}/{figure}.json and {figure}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=f"{', '.join(FIGURES)} (default: all; magnet only with --lora)")
    parser.add_argument("--model", default="nano", help=f"{', '.join(weights.NAMES)}, a .safetensors file or a folder")
    parser.add_argument("--lora", type=Path, help="a LoRA of that model, as train_magnet.py writes")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt to a line")
    parser.add_argument("--limit", type=int, default=50, help="how many prompts; pictures: expert twice as many, text 32")
    parser.add_argument("--dataset", help="pictures of expert, text and magnet (default: scenes-dev for nano, else voc); "
                        f"{', '.join(DATASETS)}")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto (bfloat16 on CUDA, float32 on the CPU), float32, bfloat16, "
                        "float16 (released code)")
    parser.add_argument("--out", type=Path, help="folder for figures and numbers (default: out/figures-MODEL)")
    command(main, parser)

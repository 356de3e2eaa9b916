"""The paper's figures that read or blur the attention (Sec. 3.3, App. B, C): a command for each, by any model.

    python figures.py                                   # every figure below, by nano, into out/figures-nano
    python figures.py shares values                     # Fig. 2 (b, c); Fig. 4, 19, 28
    python figures.py pca tokens heads pads             # Fig. 3, 29; Fig. 16, 25; Fig. 9 (a), 26, 27; Fig. 9 (b), 30
    python figures.py gallery                           # a picture for each prompt (Fig. 14)
    python figures.py perturb guide                     # Fig. 5, 31 (18, 20 with our own score); Fig. 6, 32
    python figures.py expert                            # which block is the semantic grounding expert?
    python figures.py text                              # at which noise levels do the words matter?
    python figures.py magnet --lora nano/magnet.safetensors      # Fig. 12, 33: maps and pictures without and with

Pictures are generated from prompts, and attention is read on the way, at t = 8 of 28 steps left (shares: at t = 28,
noise, too).  Prompts: captions of the toy world for nano, else the paper's 50 of DrawBench (support/prompts.txt).
"""
import argparse
import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm

import analysis
import protocol
import seg4diff
from mmdit import JointQKV
from nano import scenes
from seg4diff import Seg4Diff
from support.cli import Parser, add_model_options, at_least, command
from support.data import DATASETS, ROOT, Dataset, subset
from support.ledger import write_json
from support.metrics import classes_in, scores
from support.pictures import overlay, palette, sheet
from text import TextCond

# ---------------------------------------------------------------------------- drawing


def new_figure(columns: int, width: float, height: float, title: str, rows: int = 1) -> tuple[plt.Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each of width x height inches."""
    fig, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), layout="constrained",
                             squeeze=False)
    fig.suptitle(textwrap.fill(title, int(9 * columns * width)))
    return fig, axes


def save_figure(fig: plt.Figure, path: Path) -> None:
    fig.savefig(path, dpi=90)
    plt.close(fig)


def panel(ax: plt.Axes, picture: np.ndarray | Image.Image, title: str = "", **options) -> None:
    """A picture or a map without ticks; options are those of imshow."""
    ax.imshow(np.asarray(picture), **options)
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])


def picture_rows(path: Path, title: str, labels: list[str], rows: list[list], titles: list[list[str]],
                 width: float = 1.25, **options) -> None:
    """Rows of pictures and maps.  labels[i] stands at the left of row i, titles[i] above it, if there are so many."""
    fig, axes = new_figure(max(map(len, rows)), width, width + 0.15, title, len(rows))
    for i, row in enumerate(rows):
        for j, ax in enumerate(axes[i]):
            if j < len(row):
                panel(ax, row[j], titles[i][j] if i < len(titles) else "", **options)
            else:
                ax.axis("off")
        axes[i, 0].set_ylabel(labels[i])
    save_figure(fig, path)


# ---------------------------------------------------------------------------- attention, mean over prompts


def captured(model: Seg4Diff, prompts: list[str], at: list[int], desc: str
             ) -> Iterator[tuple[TextCond, int, int, JointQKV]]:
    """(encoded prompts, t, block, its q, k, v) of one batch of prompts after the other, under a progress bar."""
    size = model.preset.batch
    for i in tqdm(range(0, len(prompts), size), desc=desc, unit="batch"):
        _, cond, taps = analysis.taps_of(model, prompts[i:i + size], at, i)
        for t in at:
            for block, qkv in taps[t].items():
                yield cond, t, block, qkv


def shares(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 2 (b, c): share of the attention that goes along each pathway in each block."""
    at = [model.preset.noise_steps, model.preset.steps]
    each = defaultdict(list)                             # (t, pathway, block) -> a share for each prompt
    for _, t, block, qkv in captured(model, prompts, at, "shares"):
        uniform = analysis.uniform_share(qkv)
        for pathway, share in analysis.attention_shares(qkv).items():
            each[t, pathway, block] += share.mean(1).tolist()
    mean = {t: defaultdict(list) for t in at}            # t -> pathway -> a share for each block
    for (t, pathway, _), x in each.items():
        mean[t][pathway].append(np.mean(x))
    fig, axes = new_figure(2, 5, 3.4, f"Where attention goes, {model.name} (Fig. 2)")
    plots = (("I2T", "image", "text", 1 - uniform), ("T2I", "text", "image", uniform))
    for ax, (pathway, queries, keys, line) in zip(axes[0], plots, strict=True):
        ax.plot(mean[at[0]][pathway], "o-", label=f"t = {at[0]}")
        ax.plot(mean[at[1]][pathway], "s--", label=f"t = {at[1]}")
        ax.axhline(line, color="black", ls=":", label="uniform")
        ax.set(xlabel="block", ylim=(0, 1), ylabel=f"share given to {keys} keys", title=f"{queries} queries")
        ax.legend()
    save_figure(fig, out / "shares.png")
    return {"prompts": len(prompts), "uniform image share": uniform, "shares": mean}


def norms_of(model: Seg4Diff, prompts: list[str]) -> tuple[dict[str, list], dict[str, list]]:
    """Mean value norms of "image", "text" and "prompt" tokens: one for each block; and a list over heads for each."""
    each = defaultdict(list)                             # (kind, block) -> a norm for each prompt
    by_head = defaultdict(list)                          # (kind, block) -> norms (B, H) of each batch of prompts
    for cond, _, block, qkv in captured(model, prompts, [model.preset.noise_steps], "values"):
        words = [len(analysis.words_of(cond, b)) for b in range(len(cond.tokens))]
        for kind, (norms, head_norms) in analysis.value_norms(qkv, words).items():
            each[kind, block] += norms.tolist()
            by_head[kind, block].append(head_norms.cpu())
    mean = defaultdict(list)
    mean_by_head = defaultdict(list)
    for kind, block in each:                             # nan: a prompt without words
        mean[kind].append(np.nanmean(each[kind, block]))
        mean_by_head[kind].append(torch.cat(by_head[kind, block]).nanmean(0).tolist())       # H of them
    return mean, mean_by_head


def values(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 4, 19: value norms of each block; Fig. 28: of each head."""
    t = model.preset.noise_steps
    mean, by_head = norms_of(model, prompts)
    fig, axes = new_figure(3, 4.6, 3.4, f"L2 norm of values at t = {t}, {model.name} (Fig. 4, 28)")
    for kind, mark in (("image", "o-"), ("text", "s--"), ("prompt", "^-")):
        axes[0, 0].plot(mean[kind], mark, label="all text" if kind == "text" else kind)
    axes[0, 0].set(xlabel="block", ylabel="mean norm", title="whole values")
    axes[0, 0].legend()
    top = np.max([by_head["image"], by_head["prompt"]])
    for ax, kind in zip(axes[0, 1:], ("image", "prompt"), strict=True):
        drawn = ax.imshow(np.transpose(by_head[kind]), aspect="auto", vmin=0, vmax=top)
        ax.set(xlabel="block", ylabel="head", title=f"{kind} tokens, each head")
        ax.locator_params(integer=True)
    fig.colorbar(drawn, ax=axes[0, 2])
    save_figure(fig, out / "values.png")
    return {"prompts": len(prompts), "t": t, "norms": mean, "heads": by_head}


# ---------------------------------------------------------------------------- maps of one prompt


def pca(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 3, 29: one picture, q, k, v of its image tokens in every block."""
    t = model.preset.noise_steps
    images, _, taps = analysis.taps_of(model, prompts[:1], [t])
    rows = []
    for name in "qkv":
        row = [images[0]]
        for qkv in taps[t].values():
            x = getattr(qkv, name)[0, :, :qkv.n_img].transpose(0, 1).flatten(1)              # (N, D)
            row.append(analysis.pca_rgb(x, qkv.grid))
        rows.append(row)
    picture_rows(out / "pca.png", f"First three components at t = {t} (Fig. 3, 29): {prompts[0]}",
                 ["queries", "keys", "values"], rows, [["generated", *(f"block {block}" for block in taps[t])]], 1.4)
    return {"prompt": prompts[0], "t": t}


def expert_maps(model: Seg4Diff, prompt: str) -> tuple[Image.Image, list[str], torch.Tensor, torch.Tensor, str]:
    """A picture generated from a prompt, the prompt's L tokens, their I2T and T2I maps (H, L, h, w) in the expert
    block, and a title that says where and when."""
    t = model.preset.noise_steps
    block = model.preset.block
    images, cond, taps = analysis.taps_of(model, [prompt], [t])
    columns = range(len(cond.tokens[0]))
    i2t = analysis.token_maps(taps[t][block], columns)[0].cpu()              # (H, L, h, w)
    t2i = analysis.token_maps(taps[t][block], columns, "t2i")[0].cpu()       # (H, L, h, w)
    return images[0], cond.tokens[0], i2t, t2i, f"Block {block} at t = {t}, {{}}: {prompt or 'the empty prompt'}"


def tokens(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 16, 25: I2T and T2I maps of every token of a prompt in the expert block, mean over heads."""
    image, names, i2t, t2i, title = expert_maps(model, prompts[0])
    names = names[:min(16, names.index("<eos>"))]        # <sos> and the words
    rows = [[image, *maps.mean(0)[:len(names)]] for maps in (i2t, t2i)]
    picture_rows(out / "tokens.png", title.format("Fig. 16, 25"), ["I2T", "T2I"], rows, [["generated", *names]])
    return {"prompt": prompts[0], "tokens": names}


def heads(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 9 (a), 26, 27: every head's I2T map of each word of a prompt, in the expert block."""
    image, names, i2t, _, title = expert_maps(model, prompts[0])
    words = range(1, min(11, names.index("<eos>")))
    rows = [[image, i2t[:, column].mean(0), *i2t[:, column]] for column in words]            # maps (h, w)
    names = [names[column] for column in words]
    titles = ["generated", "mean", *(f"head {i}" for i in range(len(i2t)))]
    picture_rows(out / "heads.png", title.format("Fig. 9 a, 26"), names, rows, [titles])
    return {"prompt": prompts[0], "tokens": names}


def pads(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 9 (b), 30: a picture generated from the empty prompt, and the I2T maps of all its text tokens."""
    image, names, i2t, _, title = expert_maps(model, "")
    pictures = [image, *i2t.mean(0)]
    titles = ["generated", *(f"{name} {i}" for i, name in enumerate(names))]
    starts = range(0, len(pictures), 10)                 # ten to a row
    picture_rows(out / "pads.png", title.format("Fig. 9 b, 30"), [""] * len(starts),
                 [pictures[i:i + 10] for i in starts], [titles[i:i + 10] for i in starts])
    return {"tokens": len(names)}


# ---------------------------------------------------------------------------- generated pictures


def draw_prompts(model: Seg4Diff, prompts: list[str], **options) -> list[Image.Image]:
    """Pictures of all prompts, a batch at a time; picture i starts from the noise of seed i."""
    size = model.preset.batch
    images = []
    for i in range(0, len(prompts), size):
        images += seg4diff.generate(model, prompts[i:i + size], seed=i, **options)
    return images


def gallery(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """What the model makes of each prompt (the paper's are its Fig. 14)."""
    sheet(draw_prompts(model, prompts), prompts).save(out / "gallery.png")
    return {"prompts": len(prompts)}


def mean_and_error(x: np.ndarray) -> tuple[float, float]:
    """Mean of one number for each picture, and its standard error."""
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


def compare_pictures(model: Seg4Diff, prompts: list[str], variants: dict[str, dict], path: Path, title: str) -> dict:
    """Pictures from the same noise by each variant (options of generate), and how well their captions explain them."""
    prompts = list(dict.fromkeys(prompts))
    rows = {}
    shown = []
    for variant, options in tqdm(variants.items(), desc=path.stem, unit="variant"):
        images = draw_prompts(model, prompts, **options)
        captions = [[*candidates, ""] for candidates in analysis.choices(prompts)]
        losses = analysis.caption_losses(model, images, captions)            # (n, choices + 1)
        gain, error = mean_and_error(100 * (losses[:, -1] - losses[:, 0]) / losses[:, -1])   # against the empty prompt
        rows[variant] = {"accuracy": analysis.caption_accuracy(losses[:, :-1]), "gain": gain, "error": error}
        shown.append(images[:4])
    pictures = [image for same_prompt in zip(*shown, strict=True) for image in same_prompt]
    captions = [f"{variant}: {prompt}" for prompt in prompts[:4] for variant in variants]
    sheet(pictures, captions, len(variants), 192).save(path.with_name(f"{path.stem}_pictures.png"))
    choices = min(analysis.CHOICES, len(prompts))
    bars = [("gain", "loss saved by the caption [%]")]
    if choices == analysis.CHOICES:                      # a choice of two captions says little
        bars.append(("accuracy", f"true caption best of {choices} [%]"))
    fig, axes = new_figure(len(bars), 5, 3.4, f"{title}; {len(prompts)} pictures")
    for ax, (key, label) in zip(axes[0], bars, strict=True):
        errors = [row["error"] for row in rows.values()] if key == "gain" else None
        ax.bar(list(rows), [row[key] for row in rows.values()], yerr=errors)
        ax.set(ylabel=label)
        ax.tick_params("x", rotation=90)
        if key == "accuracy":
            ax.axhline(100 / choices, color="black", ls=":", label="chance")
            ax.legend(loc="lower right")
    save_figure(fig, path)
    score = f"flow loss at sigma {analysis.CAPTION_SIGMA}, {analysis.CAPTION_DRAWS} draws, {choices} captions"
    return {"n": len(prompts), "judge": score, "rows": rows}


def perturb(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 5, 18, 31: I2T blurred in one block after the other, in all branches of the guidance; same seeds.

    For nano the score is validated beside it, on drawn scenes with their own and with each other's captions, if there
    are prompts enough for a choice.
    """
    blocks = range(model.transformer.config.depth)
    variants = {"none": {}, **{f"block {i}": {"perturb": [i]} for i in blocks}, "all": {"perturb": blocks}}
    numbers = compare_pictures(model, prompts, variants, out / "perturb.png",
                               f"I2T blurred in one block, {model.name} (Fig. 5, 18)")
    if toy(model) and len(prompts) >= analysis.CHOICES:
        drawn = [scenes.draw(seed) for seed in scenes.VAL_SEEDS[200:200 + len(prompts)]]
        captions = [scenes.caption(scene, np.random.default_rng(i)) for i, scene in enumerate(drawn)]
        losses = analysis.caption_losses(model, [Image.fromarray(scene.image) for scene in drawn],
                                         analysis.choices(captions))         # (n, choices)
        numbers["validation"] = {"pairs": len(losses), "captions": analysis.CHOICES,
                                 "own caption best [%]": analysis.caption_accuracy(losses),
                                 "own better than the next [%]": 100 * np.mean(losses[:, 0] < losses[:, 1])}
    return numbers


def guide(model: Seg4Diff, prompts: list[str], out: Path) -> dict:
    """Fig. 6, 32: Eq. 7 with s = 1 and one block after the other, on top of classifier-free guidance."""
    blocks = range(model.transformer.config.depth)
    variants = {"none": {}, **{f"block {i}": {"pag": 1.0, "blocks": [i]} for i in blocks}}
    return compare_pictures(model, prompts, variants, out / "guide.png",
                            f"Guidance by a perturbed block (Eq. 7, s = 1), {model.name} (Fig. 6)")


# ---------------------------------------------------------------------------- pictures of a data set


def expert(model: Seg4Diff, prompts: list[str], out: Path, data: Dataset, limit: int = 100) -> dict:
    """mIoU, value norms and sensitivity to perturbation of every block, side by side; do they name the same block?"""
    names = subset(data.names, limit)
    evaluation = protocol.evaluation(model, data, "layers")
    variants = [v for v in evaluation.variants if v.kind == "softmax"]
    counts = []
    for _, rows in tqdm(evaluation._replace(variants=variants).count(names), total=len(names), desc="mIoU of blocks"):
        if isinstance(rows, dict) and rows:              # else it cannot be read, or has no labels
            counts.append([rows[v.name] for v in variants])
    counts = np.array(counts)                                                # (n, depth, K, K)
    miou, best = analysis.bootstrap(counts)                                  # (draws, depth), (depth,)
    low, high = np.percentile(miou, [2.5, 97.5], axis=0)                     # (depth,) each
    total = np.array([scores(c)["mIoU"] for c in counts.sum(0)])             # (depth,)
    norms, _ = norms_of(model, prompts)
    items = [data.read(name) for name in names[:32]]
    measures = {
        "mIoU [%]": total, "value norm, prompt / image": np.array(norms["prompt"]) / np.array(norms["image"]),
        "change by blurring I2T [%]": analysis.sensitivity(model, items, data.classes, model.preset.sigma).mean(0)}
    fig, axes = new_figure(3, 4.6, 3.2, f"Which block is the expert? {model.name}, {data.name}")
    for ax, (label, y) in zip(axes[0], measures.items(), strict=True):
        ax.bar(range(len(y)), y)[y.argmax()].set_color("C1")
        ax.set(xlabel="block", ylabel=label)
        ax.locator_params("x", integer=True)
    axes[0, 0].errorbar(range(len(total)), total, np.clip([total - low, high - total], 0, None), fmt="k,")
    save_figure(fig, out / "expert.png")
    return {"n": len(counts), "prompts": len(prompts), "rows": {label: y.tolist() for label, y in measures.items()},
            "best": {label: int(y.argmax()) for label, y in measures.items()},
            "95% of mIoU": [low.tolist(), high.tolist()],
            "share of bootstrap draws in which a block has the best mIoU": best.tolist(),
            "rank correlation": {f"{a} ~ {b}": spearmanr(measures[a], measures[b]).statistic
                                 for a, b in combinations(measures, 2)}}


def text_matters(model: Seg4Diff, prompts: list[str], out: Path, data: Dataset, limit: int = 100) -> dict:
    """How much of the flow loss of real pictures their class names save, against the empty prompt, at each noise level;
    and what the names of the next picture do."""
    items = [data.read(name) for name in subset(data.names, min(limit, 32))]
    images = [item.image for item in items]
    named = [seg4diff.names_of(model.text, item.labels, data.classes) for item in items]
    captions = [[names, "", named[i - len(named) + 1]] for i, names in enumerate(named)]
    rows = {}
    for sigma in tqdm(sorted({0.1, 0.3, 0.7, 0.9, round(model.preset.sigma, 3)}), desc="text", unit="level"):
        losses = analysis.caption_losses(model, images, captions, sigma)     # (n, 3)
        true = 100 * (losses[:, 1] - losses[:, 0]) / losses[:, 1]            # (n,)
        other = 100 * (losses[:, 1] - losses[:, 2]) / losses[:, 1]           # (n,)
        mean, error = mean_and_error(true)
        rows[sigma] = {"own": mean, "error": error, "others": float(other.mean()),
                       "own explain better than others [% of pictures]": 100 * np.mean(true > other)}
    fig, axes = new_figure(1, 5.4, 3.6, f"At which noise levels words matter, {model.name}, {data.name}")
    ax = axes[0, 0]
    ax.errorbar(list(rows), [row["own"] for row in rows.values()], [row["error"] for row in rows.values()], fmt="o-",
                label="the picture's own class names")
    ax.plot(list(rows), [row["others"] for row in rows.values()], "s--", label="those of the next picture")
    ax.axvline(model.preset.sigma, color="black", ls=":", label="where segmentation reads")
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel="sigma", ylabel="flow loss saved [%]")
    ax.legend()
    save_figure(fig, out / "text.png")
    return {"n": len(items), "flow loss saved by class names [%]": rows}


def magnet_maps(model: Seg4Diff, prompts: list[str], out: Path, data: Dataset, base: Seg4Diff) -> dict:
    """Fig. 12, 33: masks and class maps of the same noised pictures without (base) and with a LoRA; and what the same
    noise becomes, without and with."""
    items = [data.read(name) for name in data.names[:3]]
    colours = palette(len(data.classes))
    rows = []
    titles = []
    for item in items:
        ids = classes_in(item.labels)
        names = [data.classes[k] for k in ids]
        truth = overlay(item.image, item.labels, colours)
        for m, picture, caption in ((base, item.image, "picture"), (model, truth, "truth")):
            seg = seg4diff.segment(m, item.image, names, seed=seg4diff.image_seed(item.name, 0))
            share = seg.maps / seg.maps.sum(0)                               # (K, h, w), what argmax compares
            rows.append([picture, overlay(item.image, ids[seg.labels], colours), *share[:6]])
            titles.append([caption, "argmax", *names])
    picture_rows(out / "magnet.png", f"Block {model.preset.block} without and with {model.name.partition('+')[2]} (Fig. "
                 "12, 33); maps: each class's share among the classes, dark 0, bright 1",
                 ["without", "with"] * len(items), rows, titles, 1.4, vmin=0, vmax=1)
    few = prompts[:4]
    before = draw_prompts(base, few)
    after = draw_prompts(model, few)
    captions = [f"without: {prompt}" for prompt in few] + ["with, from the same noise"] * len(few)
    sheet(before + after, captions, columns=len(few)).save(out / "magnet_pictures.png")
    change = np.abs(np.stack(before).astype(float) - np.stack(after)).mean()
    return {"pictures": [item.name for item in items], "change of generated pictures [grey levels of 255]": change}


# ---------------------------------------------------------------------------- command line


def toy(model: Seg4Diff) -> bool:
    """Whether a model makes pictures of the toy world's size: nano, or one that was trained like it."""
    return model.preset.size == scenes.SIDE


def prompts_for(model: Seg4Diff, limit: int, path: Path | None = None) -> list[str]:
    """The first prompts of a file, one a line; without one, captions of the toy world for nano, the paper's for others.

    ValueError: there is no such file, or no prompt in it.
    """
    if path is None and toy(model):
        return [scenes.caption(scenes.draw(seed), np.random.default_rng(seed)) for seed in scenes.VAL_SEEDS[:limit]]
    path = path or Path(__file__).parent / "support/prompts.txt"
    if not path.is_file():
        raise ValueError(f"--prompts {path} is not a file; it should hold a prompt to a line")
    prompts = [line for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts[:limit]


FIGURES: dict[str, Callable[..., dict]] = {
    "shares": shares, "values": values, "pca": pca, "tokens": tokens, "heads": heads, "pads": pads, "gallery": gallery,
    "perturb": perturb, "guide": guide, "expert": expert, "text": text_matters, "magnet": magnet_maps}


def main(args: argparse.Namespace) -> None:
    for figure in args.figures:
        if figure not in FIGURES:
            raise ValueError(f"there is no figure {figure!r}; choose from {', '.join(FIGURES)}")
    if "magnet" in args.figures and args.lora is None:
        raise ValueError("magnet shows a model without and with a LoRA; name one with --lora")
    model = seg4diff.load(args.model, args.device, args.dtype, lora=args.lora)
    prompts = prompts_for(model, args.limit, args.prompts)
    dataset = args.dataset or ("scenes-dev" if toy(model) else "voc")
    out = args.out or Path("out") / f"figures-{model.name}"
    out.mkdir(parents=True, exist_ok=True)
    for figure in args.figures or [f for f in FIGURES if f != "magnet" or args.lora]:
        inputs = [model, prompts, out]
        if figure in ("expert", "text", "magnet"):
            inputs.append(DATASETS[dataset](args.data_root))
        if figure in ("expert", "text"):
            inputs.append(2 * args.limit)
        if figure == "magnet":
            inputs.append(seg4diff.load(args.model, args.device, args.dtype))
        numbers = {"model": [model.name, model.fingerprint], **FIGURES[figure](*inputs)}
        write_json(out / f"{figure}.json", numbers)
        for key, value in numbers.items():
            if key not in ("heads", "model"):
                print(f"{figure}: {key}: {json.dumps(value)}")
        print(f"wrote {out}/{figure}.json and {figure}.png")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("figures", nargs="*", help=f"{', '.join(FIGURES)} (default: all; magnet only with --lora)")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt to a line")
    parser.add_argument("--limit", type=at_least(1), default=50, help="prompts; pictures: expert twice as many, text 32")
    parser.add_argument("--dataset", choices=DATASETS, help="pictures of expert, text and magnet (default: scenes-dev "
                        "for nano, else voc)")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--out", type=Path, help="folder for figures and numbers (default: out/figures-MODEL)")
    add_model_options(parser)
    command(main, parser)

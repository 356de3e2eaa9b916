"""The paper's figures that read or blur the attention (Sec. 3.3, App. B to D): a command for each, by any model.

    python figures.py                                   # every figure below, by nano, into out/figures-nano
    python figures.py shares values strip gallery       # Fig. 2 (b, c); Fig. 4, 19, 22, 28; Fig. 7; Fig. 14
    python figures.py pca tokens heads pads             # Fig. 3, 29; Fig. 16, 25; Fig. 9 (a), 26, 27; Fig. 9 (b), 30
    python figures.py perturb guide                     # Fig. 5, 31 and 18, 20, 23 (--judge); Fig. 6, 32
    python figures.py expert text                       # which block is the expert? at which noise do words matter?
    python figures.py magnet compare --lora nano/magnet.safetensors      # Fig. 12: maps without and with; Fig. 13, 33

Pictures are generated from prompts; attention is that of a second pass at t = 8 of 28 steps left (shares: 28, too).
Prompts: captions of the toy world for nano, else the paper's 50 of DrawBench (support/prompts.txt).
"""
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import json
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from scipy.stats import spearmanr
from tqdm import tqdm

import analysis
import protocol
import quality
import seg4diff
from generated_figures import gallery, guide, load_judges, new_figure, perturb
from loading import Seg4Diff, image_seed
from nano import scenes
from quality import toy
from support.cli import Parser, add_model_options, at_least, command, show
from support.data import DATASETS, ROOT, subset, usable
from support.effects import mean_and_error, or_none
from support.files import make_folder, read_text, write_figure, write_json
from support.metrics import classes_in, scores
from support.pictures import overlay, palette

# ---------------------------------------------------------------------------- drawing


def panel(ax: Axes, picture: np.ndarray | Image.Image, title: str = "", **options) -> None:
    """A picture or a map without ticks; options are those of imshow."""
    ax.imshow(np.asarray(picture), **options)
    ax.set_title(title, fontsize=9)
    ax.set(xticks=[], yticks=[])


def picture_rows(path, title, labels, rows, titles, **options):
    """Rows of pictures and maps; labels[i] stands at the left of row i, titles[i] above it, as far as there are any."""
    fig, axes = new_figure(len(rows), max(map(len, rows)), title, 1.3, 1.45)
    for (i, j), ax in np.ndenumerate(axes):
        if j < len(rows[i]):
            panel(ax, rows[i][j], titles[i][j] if i < len(titles) else "", **options)
        else:
            ax.axis("off")
    for ax, label in zip(axes[:, 0], labels):
        ax.set_ylabel(label)
    write_figure(path, fig)


# ---------------------------------------------------------------------------- attention while pictures are generated
# Every figure is a function of a Seg4Diff, a folder `out` (Path) and what NEEDS says. It writes NAME.png into `out`
# and returns the numbers of NAME.json, a dict.


def shares(model, prompts, out):
    """Fig. 2 (b, c): the share of each pathway in each block."""
    preset = model.preset
    mean, uniform = analysis.mean_shares(model, prompts, [preset.noise_steps, preset.steps])
    fig, [[left, right]] = new_figure(1, 2, f"Where attention goes, {model.name} (Fig. 2)")
    left.set(title="image queries", ylabel="share given to text keys")
    right.set(title="text queries", ylabel="share given to image keys")
    for ax, pathway, line in ((left, "I2T", 1 - uniform), (right, "T2I", uniform)):
        ax.plot(mean[preset.noise_steps][pathway], "o-", label=f"t = {preset.noise_steps}")
        ax.plot(mean[preset.steps][pathway], "s--", label=f"t = {preset.steps}")
        ax.axhline(line, color="black", ls=":", label="uniform")
        ax.set(xlabel="block", ylim=(0, 1))
        ax.legend()
    write_figure(out / "shares.png", fig)
    return {"prompts": len(prompts), "uniform image share": uniform, "shares": mean}


def values(model, prompts, out):
    """Fig. 4, 19, 22: value norms of each block; Fig. 28: of each head."""
    t = model.preset.noise_steps
    mean, by_head = analysis.mean_norms(model, prompts)
    fig, [[left, middle, right]] = new_figure(1, 3, f"L2 norm of values at t = {t}, {model.name} (Fig. 4, 28)")
    for kind, mark in (("image", "o-"), ("text", "s--"), ("prompt", "^-")):
        left.plot(mean[kind], mark, label="all text" if kind == "text" else kind)
    left.set(xlabel="block", ylabel="mean norm", title="whole values")
    left.legend()
    top = np.max([by_head["image"], by_head["prompt"]])
    for ax, kind in ((middle, "image"), (right, "prompt")):
        drawn = ax.imshow(np.transpose(by_head[kind]), aspect="auto", vmin=0, vmax=top)
        ax.set(xlabel="block", ylabel="head", title=f"{kind} tokens, each head")
        ax.locator_params(integer=True)
    fig.colorbar(drawn, ax=right, label="mean norm")
    write_figure(out / "values.png", fig)
    return {"prompts": len(prompts), "t": t, "norms": mean, "heads": by_head}


def pca(model, prompts, out):
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
                 ["queries", "keys", "values"], rows, [["generated", *(f"block {block}" for block in taps[t])]])
    return {"prompt": prompts[0], "t": t}


def tokens(model, prompts, out):
    """Fig. 16, 25: I2T and T2I maps of <sos> (T5 has none) and every word of a prompt in the expert block."""
    image, names, i2t, t2i = analysis.expert_maps(model, prompts[0])
    names = names[:min(16, names.index("<eos>"))]
    rows = [[image, *maps.mean(0)[:len(names)]] for maps in (i2t, t2i)]      # maps (h, w)
    title = f"Block {model.preset.block} at t = {model.preset.noise_steps} (Fig. 16, 25): {prompts[0]}"
    picture_rows(out / "tokens.png", title, ["I2T", "T2I"], rows, [["generated", *names]])
    return {"prompt": prompts[0], "tokens": names}


def heads(model, prompts, out):
    """Fig. 9 (a), 26, 27: every head's I2T map of each word of a prompt in the expert block."""
    image, names, i2t, _ = analysis.expert_maps(model, prompts[0])
    first = 1 if names[0] == "<sos>" else 0              # T5 has none
    words = range(first, min(first + 10, names.index("<eos>")))
    names = [names[i] for i in words]
    rows = [[image, i2t[:, i].mean(0), *i2t[:, i]] for i in words]           # maps (h, w)
    title = f"Each head of block {model.preset.block} at t = {model.preset.noise_steps} (Fig. 9 a, 26): {prompts[0]}"
    titles = ["generated", "mean", *(f"head {i}" for i in range(len(i2t)))]
    picture_rows(out / "heads.png", title, names, rows, [titles])
    return {"prompt": prompts[0], "tokens": names}


def pads(model, out):
    """Fig. 9 (b), 30: a picture generated from the empty prompt, and the I2T maps of all its text tokens."""
    image, names, i2t, _ = analysis.expert_maps(model, "")
    pictures = [image, *i2t.mean(0)]
    titles = ["generated", *(f"{name} {i}" for i, name in enumerate(names))]
    starts = range(0, len(pictures), 10)                 # ten to a row
    title = f"The empty prompt in block {model.preset.block} at t = {model.preset.noise_steps} (Fig. 9 b, 30)"
    picture_rows(out / "pads.png", title, [], [pictures[i:i + 10] for i in starts], [titles[i:i + 10] for i in starts])
    return {"tokens": len(names)}


# ---------------------------------------------------------------------------- pictures of a data set


def expert(model, prompts, out, data, limit=100):
    """mIoU, value norms and sensitivity to perturbation of every block, side by side; do they name the same block?"""
    names, broken = usable(data, subset(data.names, limit))
    evaluation = protocol.evaluation(model, data, "layers")
    variants = [v for v in evaluation.variants if v.kind == "softmax"]       # I2T
    counts = []
    for _, rows in tqdm(evaluation._replace(variants=variants).count(names), total=len(names), desc="mIoU of blocks"):
        counts.append([rows[v.name] for v in variants])
    counts = np.array(counts)                                                # (n, depth, K, K)
    miou, best = analysis.bootstrap(counts)                                  # (draws, depth), (depth,)
    low, high = np.percentile(miou, [2.5, 97.5], axis=0)                     # (depth,) each
    norms, _ = analysis.mean_norms(model, prompts)
    change = analysis.sensitivity(model, map(data.read, names[:32]), data.classes, model.preset.sigma)   # (n, depth)
    rows = {"mIoU [%]": [scores(c)["mIoU"] for c in counts.sum(0)],
            "value norm, prompt / image": list(np.divide(norms["prompt"], norms["image"])),
            "change by blurring I2T [%]": change.mean(0).tolist()}
    blocks = range(len(variants))
    fig, axes = new_figure(1, 3, f"Which block is the expert? {model.name}, {data.name}")
    for ax, (label, y) in zip(axes[0], rows.items()):
        bars = ax.bar(blocks, y)
        bars[np.argmax(y)].set_color("C1")
        ax.set(xlabel="block", ylabel=label)
        ax.locator_params("x", integer=True)
    axes[0, 0].vlines(blocks, low, high, color="black")
    write_figure(out / "expert.png", fig)
    return {"n": len(counts), "broken": broken, "prompts": len(prompts), "rows": rows,
            "best": {label: int(np.argmax(y)) for label, y in rows.items()}, "95% of mIoU": [list(low), list(high)],
            "share of bootstrap draws in which a block has the best mIoU": list(best),
            "rank correlation": {f"{a} ~ {b}": spearmanr(rows[a], rows[b]).statistic for a, b in combinations(rows, 2)}}


TEXT_LEVELS = (0.1, 0.3, 0.7, 0.9)      # and the preset's


def text_matters(model, out, data, limit=100):
    """How much of a picture's flow loss its class names save, and those of the next picture, at each noise level."""
    names, broken = usable(data, subset(data.names, min(limit, 32)))
    items = [data.read(name) for name in names]
    named = [protocol.names_of(model, item, data.classes) for item in items]
    captions = [[names, "", others] for names, others in zip(named, named[1:] + named[:1])]
    rows = {}
    errors = []
    for sigma in tqdm(sorted({*TEXT_LEVELS, round(model.preset.sigma, 3)}), desc="text", unit="level"):
        losses = analysis.caption_losses(model, [item.image for item in items], captions, sigma)       # (n, 3)
        true = analysis.loss_saved(losses, 0, 1)                             # (n,)
        other = analysis.loss_saved(losses, 2, 1)                            # (n,)
        mean, error, _ = mean_and_error(true[:, None])
        errors.append(error)
        rows[sigma] = {"own": mean, "error": or_none(error), "others": float(other.mean()),
                       "own explain better than others [% of pictures]": 100 * np.mean(true > other)}
    fig, [[ax]] = new_figure(1, 1, f"At which noise levels words matter, {model.name}, {data.name}")
    ax.errorbar(list(rows), [row["own"] for row in rows.values()], errors, fmt="o-",
                label="the picture's own class names")
    ax.plot(list(rows), [row["others"] for row in rows.values()], "s--", label="class names of the next picture")
    ax.axvline(model.preset.sigma, color="black", ls=":", label="noise level of segmentation")
    ax.axhline(0, color="grey", lw=0.8)
    ax.set(xlabel="sigma", ylabel="flow loss saved [%]")
    ax.legend()
    write_figure(out / "text.png", fig)
    return {"n": len(items), "broken": broken, "flow loss saved by class names [%]": rows}


def class_shares(model, item, data, reading):
    """A picture's class names, the argmax in colour, and each class's share among the classes."""
    ids = classes_in(item.labels)
    names = [data.classes[k] for k in ids]
    seg = seg4diff.segment(model, item.image, names, reading=reading, seed=image_seed(item.name, 0))
    argmax = overlay(item.image, ids[seg.labels], palette(len(data.classes)))
    return names, argmax, list(seg.maps / seg.maps.sum(0))                   # K x (h, w)


def strip(model, out, data, reading="paper"):
    """Fig. 7: a picture, a heat map for each class name, and the argmax over them."""
    (name,), broken = usable(data, data.names, 1)
    item = data.read(name)
    names, argmax, maps = class_shares(model, item, data, reading)
    title = f"Block {model.preset.block} of {model.name} (Fig. 7), {reading}; each class's share, dark 0, bright 1"
    picture_rows(out / "strip.png", title, [], [[item.image, *maps, argmax]], [["picture", *names, "argmax"]],
                 vmin=0, vmax=1)
    return {"picture": name, "broken": broken, "reading": reading}


def magnet_maps(model, out, data, base, reading="paper"):
    """Fig. 12: class maps of noised pictures without (base) and with a LoRA."""
    shown, broken = usable(data, data.names, 3)
    items = [data.read(name) for name in shown]
    rows = []
    titles = []
    for item in items:
        truth = overlay(item.image, item.labels, palette(len(data.classes)))
        for m, picture, caption in ((base, item.image, "picture"), (model, truth, "truth")):
            names, argmax, maps = class_shares(m, item, data, reading)
            rows.append([picture, argmax, *maps[:6]])
            titles.append([caption, "argmax", *names])
    title = (f"Block {model.preset.block} without and with the LoRA {model.name.removeprefix(base.name + '+')} "
             f"(Fig. 12), {reading}; maps: each class's share among the classes, dark 0, bright 1")
    picture_rows(out / "magnet.png", title, ["without", "with"] * len(items), rows, titles, vmin=0, vmax=1)
    return {"pictures": shown, "broken": broken}


# ---------------------------------------------------------------------------- command line


def prompts_for(model: Seg4Diff, limit: int, path: Path | None = None) -> list[str]:
    """The first prompts of a file, one to a line; without one, captions of the toy world for nano, else the paper's.

    ValueError: there is no such file, or no prompt in it.
    """
    if path is None and toy(model):
        return [scenes.caption(scenes.draw(seed), np.random.default_rng(seed)) for seed in scenes.VAL_SEEDS[:limit]]
    path = path or Path(__file__).parent / "support/prompts.txt"
    prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts[:limit]


FIGURES = {"shares": shares, "values": values, "pca": pca, "tokens": tokens, "heads": heads, "pads": pads,
           "gallery": gallery, "perturb": perturb, "guide": guide, "strip": strip, "expert": expert,
           "text": text_matters, "magnet": magnet_maps, "compare": quality.compare_lora}
# What each is given beside the model and the folder
NEEDS = {"shares": ["prompts"], "values": ["prompts"], "pca": ["prompts"], "tokens": ["prompts"], "heads": ["prompts"],
         "pads": [], "gallery": ["prompts"], "perturb": ["prompts", "judge"], "guide": ["prompts"],
         "strip": ["data", "reading"], "expert": ["prompts", "data", "limit"], "text": ["data", "limit"],
         "magnet": ["data", "base", "reading"], "compare": ["prompts", "base"]}


def main(args):
    if args.lora is None and not {"magnet", "compare"}.isdisjoint(args.figures):
        raise ValueError("magnet and compare show a model without and with a LoRA; name one with --lora")
    model = seg4diff.load(args.model, args.device, args.dtype, lora=args.lora)
    prompts = prompts_for(model, args.limit, args.prompts)
    out = args.out or Path("out") / f"figures-{model.name}"
    if "all" in args.figures:                            # by default
        args.figures = [figure for figure in FIGURES if figure not in ("magnet", "compare") or args.lora]
    judge = load_judges(args.judge, model) if "perturb" in args.figures else None
    make_folder(out)
    for figure in args.figures:
        inputs = {"prompts": prompts, "limit": 2 * args.limit, "judge": judge, "reading": args.reading}
        if "data" in NEEDS[figure]:
            inputs["data"] = DATASETS[args.dataset or ("scenes-dev" if toy(model) else "voc")](args.data_root)
        if "base" in NEEDS[figure]:
            inputs["base"] = seg4diff.load(args.model, args.device, args.dtype)
        needed = {name: inputs[name] for name in NEEDS[figure]}
        numbers = {"model": [model.name, model.fingerprint], **FIGURES[figure](model, out=out, **needed)}
        write_json(out / f"{figure}.json", numbers)
        for key, value in numbers.items():
            if key not in ("heads", "model", "broken"):
                show(f"{figure}: {key}: {json.dumps(value)}")
        for name, why in numbers.get("broken", {}).items():
            show(f"{figure}: picture {name} is left out: {why}")
        if numbers.get("broken"):
            show(f"{figure}: {len(numbers['broken'])} pictures cannot be read and are left out")
        show(f"wrote {out}/{figure}.json and {figure}.png")


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("figures", nargs="*", default="all", choices=[*FIGURES, "all"], help="magnet, compare: --lora")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt to a line")
    parser.add_argument("--limit", type=at_least(1), default=50, help="prompts; data set's pictures: twice that")
    parser.add_argument("--dataset", choices=DATASETS, help="of strip, expert, text, magnet (scenes-dev; else voc)")
    parser.add_argument("--reading", choices=seg4diff.READINGS, default="paper", help="of strip and magnet (paper)")
    parser.add_argument("--judge", help="of perturb: clip (CLIP and DINO from the hub), their folder, or own (nano's)")
    parser.add_argument("--data-root", type=Path, default=ROOT, help="where real data sets lie; also SEG4DIFF_DATA")
    parser.add_argument("--out", type=Path, help="folder for figures and numbers (default: out/figures-MODEL)")
    add_model_options(parser, seed=False)
    command(main, parser)

"""Figures of generated pictures: what each block's blurred attention does to them (Sec. 3.3, B.5).

figures.py runs them: `python figures.py gallery perturb guide`.  Pictures of all variants begin from the same noise.
How good they are is told by a judge: CLIP and DINO as in Fig. 18, 20 and 23 (judges.py), or, for nano, whose drawn
world they do not know, the model's own flow loss (analysis.caption_losses).
"""
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import analysis
import judges
import quality
import seg4diff
from loading import Seg4Diff
from nano import scenes
from quality import Arm, toy
from support.effects import mean_and_error, or_none
from support.files import write_figure, write_picture
from support.pictures import sheet


def new_figure(rows, columns, title, width=5, height=3.4):
    """A figure and its axes (rows, columns), each of width x height inches."""
    fig = Figure((columns * width, rows * height), dpi=90, layout="constrained")
    fig.suptitle(textwrap.fill(title, int(9 * columns * width)))
    return fig, fig.subplots(rows, columns, squeeze=False)


def gallery(model, prompts, out):
    """What the model makes of each prompt (the paper's are its Fig. 14)."""
    write_picture(out / "gallery.png", sheet(seg4diff.generate(model, prompts), prompts))
    return {"prompts": len(prompts)}


def each_variant(model: Seg4Diff, prompts: list[str], variants: dict[str, dict], path: Path
                 ) -> Iterator[tuple[str, list[Image.Image]]]:
    """A picture of each prompt by each variant (options of an Arm), from the same noise: (variant, pictures).

    Each is kept in NAME/VARIANT beside `path`, so that a killed figure goes on where it stopped.  At the end the first
    four of each are written as NAME_pictures.png.
    """
    shown = []
    for variant, options in variants.items():
        folder = path.with_suffix("") / variant.replace(" ", "")
        quality.generate_missing(model, Arm(variant, **options), prompts, [0], folder)
        images = [quality.kept(quality.path_of(folder, i, 0)) for i in range(len(prompts))]
        shown.append(images[:4])
        yield variant, images
    pictures = [images[i] for i in range(len(shown[0])) for images in shown]
    first, *others = variants
    titles = []
    for prompt in prompts[:4]:                           # once in each row
        titles += [f"{first}: {prompt}", *others]
    write_picture(path.with_name(f"{path.stem}_pictures.png"), sheet(pictures, titles, len(variants), 192))


# ---------------------------------------------------------------------------- judged by the model's own flow loss


def compare_pictures(model, prompts, variants, path, title):
    """Pictures by each variant, and how well their captions explain them."""
    prompts = list(dict.fromkeys(prompts))
    n = len(prompts)
    candidates = [[*captions, ""] for captions in analysis.choices(prompts)]
    rows = {}
    errors = []
    for variant, images in each_variant(model, prompts, variants, path):
        losses = analysis.caption_losses(model, images, candidates)          # (n, choices + 1)
        saved = analysis.loss_saved(losses, 0, -1)                           # (n,)
        gain, error, _ = mean_and_error(saved[:, None])
        errors.append(error)
        rows[variant] = {"accuracy": analysis.caption_accuracy(losses[:, :-1]), "gain": gain, "error": or_none(error)}
    choices = min(analysis.CHOICES, n)
    enough = choices == analysis.CHOICES                 # a choice of two captions says little
    fig, axes = new_figure(1, 1 + enough, f"{title}; {n} pictures")
    axes[0, 0].bar(list(rows), [row["gain"] for row in rows.values()], yerr=errors)
    axes[0, 0].set(ylabel="loss saved by the caption [%]")
    if enough:
        axes[0, 1].bar(list(rows), [row["accuracy"] for row in rows.values()])
        axes[0, 1].axhline(100 / choices, color="black", ls=":", label="chance")
        axes[0, 1].set(ylabel=f"true caption best of {choices} [%]")
        axes[0, 1].legend(loc="lower right")
    for ax in axes[0]:
        ax.tick_params("x", rotation=90)
    write_figure(path, fig)
    score = f"flow loss at sigma {analysis.CAPTION_SIGMA}, {analysis.CAPTION_DRAWS} draws, {choices} captions"
    return {"n": n, "judge": score, "rows": rows}


# ---------------------------------------------------------------------------- judged by CLIP and DINO


class Judges(NamedTuple):
    """The networks of Fig. 18."""
    clip: judges.ClipScore
    dino: judges.DINO
    files: list[str]                    # fingerprints of CLIP's and DINO's


def load_judges(name: str | None, model: Seg4Diff) -> Judges | None:
    """What --judge names: "own" (None: the model judges itself), "clip" or a folder, on the model's device.

    Without a name nano judges itself, and all others are judged by CLIP and DINO.  ValueError: they are not there.
    """
    if name is None:
        name = "own" if toy(model) else "clip"
    if name == "own":
        return None
    if name == "nano":
        raise ValueError("figures are not drawn by nano's judge; python tools/experiments.py blocks is, and compares "
                         "each block so")
    clip = judges.load_judge(name, model.device)
    dino, fingerprint = judges.load_dino(name, model.device)
    return Judges(clip, dino, [clip.fingerprint, fingerprint])


def judge_pictures(model, prompts, variants, path, title, judge):
    """Pictures by each variant, and how they resemble those of the first and their prompts: means with errors."""
    prompts = list(dict.fromkeys(prompts))
    found = {}                                           # variant -> column -> (mean, error, how many)
    references = None
    for variant, images in each_variant(model, prompts, variants, path):
        references = references or images
        scores = judges.similarity(judge.clip, judge.dino, images, references, prompts)
        found[variant] = {column: mean_and_error(x[:, None]) for column, x in scores.items()}
    columns = list(scores)
    fig, axes = new_figure(1, len(columns), f"{title}; {len(prompts)} pictures")
    rows = {variant: {} for variant in found}
    for ax, column in zip(axes[0], columns):
        values = []
        errors = []
        for variant in found:
            mean, error, _ = found[variant][column]
            values.append(mean)
            errors.append(error)
            rows[variant] |= {column: mean, f"{column} error": or_none(error)}
        ax.errorbar(list(found), values, errors, fmt="o-")
        ax.set(ylabel=f"{column} [%]")
        ax.tick_params("x", rotation=90)
    write_figure(path, fig)
    return {"n": len(prompts), "judge": [judge.clip.name, *judge.files], "rows": rows}


# ---------------------------------------------------------------------------- the figures


def perturb(model, prompts, out, judge=None):
    """Fig. 5, 31: I2T blurred in one block after the other; by CLIP and DINO it is Fig. 18, 20 and 23.

    Without a judge the model's own score is taken, nano's with its validation on drawn scenes.
    """
    blocks = range(model.transformer.config.depth)
    variants = {"none": {}, **{f"block {i}": {"perturb": [i]} for i in blocks}, "all": {"perturb": blocks}}
    title = f"I2T blurred in one block, {model.name} (Fig. 5, 18)"
    if judge is not None:
        return judge_pictures(model, prompts, variants, out / "perturb.png", title, judge)
    numbers = compare_pictures(model, prompts, variants, out / "perturb.png", title)
    if toy(model) and len(prompts) >= analysis.CHOICES:
        drawn = [scenes.draw(seed) for seed in scenes.VAL_SEEDS[200:200 + len(prompts)]]
        images = [Image.fromarray(scene.image) for scene in drawn]
        captions = [scenes.caption(scene, np.random.default_rng(i)) for i, scene in enumerate(drawn)]
        losses = analysis.caption_losses(model, images, analysis.choices(captions))          # (n, choices)
        numbers["validation"] = {"pairs": len(losses), "captions": analysis.CHOICES,
                                 "own caption best [%]": analysis.caption_accuracy(losses),
                                 "own better than the next [%]": 100 * np.mean(losses[:, 0] < losses[:, 1])}
    return numbers


def guide(model, prompts, out):
    """Fig. 6, 32: Eq. 7 with s = 1 and one block after the other, on top of classifier-free guidance."""
    depth = model.transformer.config.depth
    variants = {"none": {}, **{f"block {i}": {"pag": 1.0, "blocks": [i]} for i in range(depth)}}
    return compare_pictures(model, prompts, variants, out / "guide.png",
                            f"Guidance by a perturbed block (Eq. 7, s = 1), {model.name} (Fig. 6)")

"""The released code's protocol for Tables 1 and 2, choice by choice: where it differs from ours (docs/protocol.md).

    python evaluate.py --protocol released               # all choices that matter to the task, the data set, the model
    python evaluate.py --protocol matching               # one alone
    python evaluate.py --task protocol                   # what each alone is worth, and all together

In code a choice is switched by `protocol.Protocol(choices=Choices(matching=True))`.
"""
import copy
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from flux import Flux
from loading import Preset, Seg4Diff, Square, flux_shift, squash
from support.data import Dataset, Item
from support.metrics import IGNORE, Scoring, classes_in, with_regions


class Choices(NamedTuple):
    """Each is ours (False) or the released code's (True)."""
    resize: bool = False                # to a short side of 640 pixels, then squashed without antialiasing
    padding: bool = False               # Table 2: with black, to multiples of 32; it is never removed
    size: bool = False                  # Table 2: scored at the short side of 640
    corner: bool = False                # Table 2: of larger label maps the upper left corner counts for the whole
    matching: bool = False              # Table 2: regions are matched to all classes of the data set
    merging: bool = False               # Table 2: scaled over tokens, merged below KL 0.1
    context: bool = False               # Table 2: Pascal Context with background without its last class
    present: bool = False               # Table 1: the prompt's classes are those of the truth at the short side of 640
    background: bool = False            # Table 1: COCO-Object's background is prompted and competes, never scored
    half: bool = False                  # float16 (elsewhere than on CUDA only where it is asked for)
    level: bool = False                 # Flux: noise level of a schedule shifted for 16 image tokens
    unit: bool = False                  # Flux: pictures go to the autoencoder as [0, 1]
    rows: bool = False                  # Flux: T5 reads as many tokens as CLIP can


OURS = Choices()
TABLES = {"ovss": "Table 1", "unsup": "Table 2"}         # the tasks that there are choices for


def names_on(choices: Choices) -> list[str]:
    return [name for name, on in choices._asdict().items() if on]


def applicable(task: str, dataset: str, model: Seg4Diff) -> list[str]:
    """The choices that can change a number of this task on this data set with this model, as Choices has them."""
    names = {"resize", "half"}
    if task == "ovss":
        names |= {"present"}
        if dataset == "coco-object":
            names |= {"background"}
    else:
        names |= {"padding", "size", "corner", "matching", "merging"}
        if dataset == "context60":
            names |= {"context"}
    if isinstance(model.transformer, Flux):
        names |= {"unit", "rows"}
        if model.preset.level is None:                   # schnell is read at a level of our choice
            names |= {"level"}
    return [name for name in Choices._fields if name in names]


def chosen(protocol: str, task: str, dataset: str, model: Seg4Diff) -> Choices:
    """--protocol: "ours", "released", or the name of one choice.  ValueError: that one changes nothing here."""
    if protocol == "ours":
        return OURS
    names = applicable(task, dataset, model)
    if protocol == "released":
        if model.dtype != torch.float16:                 # --dtype asked for another, or it is no CUDA
            names.remove("half")
        return Choices(**dict.fromkeys(names, True))
    if protocol not in names:
        raise ValueError(f"the released code's {protocol!r} changes nothing for --task {task} on {dataset} with this "
                         f"model; what does is {', '.join(names)}")
    return Choices(**{protocol: True})


# ---------------------------------------------------------------------------- model and data set


def model_of(model: Seg4Diff, choices: Choices) -> Seg4Diff:
    """The same weights, read as the released code reads them: `merging`, and Flux's `level`, `unit` and `rows`.

    NOTE(official): the configuration's KL threshold of 0.035 is overridden by 0.1, and of two scalings the later
    definition holds. Flux's schedule is shifted by the number of latent channels in the place of image tokens.
    """
    preset = model.preset
    vae = model.vae
    text = model.text
    if choices.merging:
        preset = preset.changed(threshold=Preset.threshold, scaling=Preset.scaling)
    if choices.level:
        preset = preset.changed(shift=flux_shift(vae.channels))
    if choices.unit:
        vae = copy.copy(vae)
        vae.unit_pictures = True
    if choices.rows:
        text = copy.copy(text)
        text.length = text.clip_l.positions
        text.room = text.length - 1
        text.cache = {}                                  # those were prompts of another length
    return replace(model, preset=preset, vae=vae, text=text)


def data_of(data: Dataset, choices: Choices) -> Dataset:
    """The data set with `background` or `context`.

    NOTE(official): the prompt of COCO-Object holds "background", which is label 0 and ignored (coco-object-bg is the
    same). Pascal Context with background has 60 labels and a list of 59 names; the last label's pixels are left out.
    """
    last = len(data.classes) - 1

    def with_background(name):
        item = data.read(name)
        labels = np.where(item.labels == IGNORE, IGNORE, item.labels + 1)    # (height, width)
        return item._replace(labels=labels.astype(np.uint8))

    def without_last(name):
        item = data.read(name)
        labels = np.where(item.labels == last, IGNORE, item.labels)          # (height, width)
        return item._replace(labels=labels.astype(np.uint8))

    if choices.background:
        return replace(data, read=with_background, classes=["background", *data.classes], always=(0,))
    if choices.context:
        return replace(data, read=without_last, classes=data.classes[:last])
    return data


# ---------------------------------------------------------------------------- pictures

# Shares of the side of the model's square, so that a small model has its own. Of SD3's 1024 pixels they are:
SHORT = 5 / 8                           # 640, a picture's shorter side (the configuration's MIN_SIZE_TEST)
LONGEST = 5 / 2                         # 2560, the most that its longer one may be (MAX_SIZE_TEST)
MULTIPLE = 1 / 32                       # 32 (SIZE_DIVISIBILITY)


def short_side(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) of a picture once it is resized for a square of `size` pixels."""
    scale = min(SHORT * size / min(width, height), LONGEST * size / max(width, height))
    return int(scale * width + 0.5), int(scale * height + 0.5)


def at_short_side(item: Item, size: int) -> Item:
    """A picture bilinearly, and its label map by nearest neighbours, at `short_side`."""
    shape = short_side(*item.image.size, size)
    labels = Image.fromarray(item.labels).resize(shape, Image.Resampling.NEAREST)
    return Item(item.image.convert("RGB").resize(shape, Image.Resampling.BILINEAR), np.array(labels), item.name)


def padded(image: Image.Image, size: int) -> Image.Image:
    """`padding`: black at the right and below, up to the next multiples."""
    multiple = max(1, int(MULTIPLE * size))
    width = math.ceil(image.width / multiple) * multiple
    height = math.ceil(image.height / multiple) * multiple
    out = Image.new("RGB", (width, height))
    out.paste(image)
    return out


def squash_plainly(image: Image.Image, size: int) -> np.ndarray:
    """The second step of `resize`: bilinear, without antialiasing where it shrinks -> (size, size, 3) float32."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).float()             # (height, width, 3)
    x = x.permute(2, 0, 1)[None]                                             # (1, 3, height, width)
    x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)            # (1, 3, size, size)
    return x[0].permute(1, 2, 0).numpy()                                     # (size, size, 3)


class Picture(NamedTuple):
    scored: Item                        # picture and truth at the size at which they are scored
    square: Square                      # what the model sees; .image has the size at which label maps are drawn
    prompted: np.ndarray                # the classes that its prompt names, (K,) uint8


def picture(item: Item, size: int, choices: Choices) -> Picture:
    """A picture for the model's square of `size` pixels, ours or by `resize`, `padding`, `size`, `corner`, `present`.

    Where no class is left at the short side, the prompt names those of the truth: nothing can be predicted without.
    """
    if not any(choices):
        return Picture(item, squash(item.image, size), classes_in(item.labels))
    small = at_short_side(item, size)
    scored = small if choices.size else item
    drawn = scored.image
    if choices.corner and item.image.width > small.image.width:
        drawn = item.image
    image = small.image if choices.resize else item.image
    if choices.padding:
        image = padded(image, size)
    pixels = squash_plainly(image, size) if choices.resize else squash(image, size).pixels   # (size, size, 3)
    prompted = classes_in(item.labels)                                       # (K,)
    if choices.present and len(classes_in(small.labels)):
        prompted = classes_in(small.labels)
    return Picture(scored, Square(pixels, drawn), prompted)


def as_scored(labels: Tensor, shape: tuple[int, int], size: int, choices: Choices) -> Tensor:
    """A label map (height, width) as it was drawn -> of the `shape` of the truth; size: of the model's square.

    `corner`.  NOTE(official): maps of the original size are cut as if their short side were 640 already, before they
    are resized to it, so that of a larger picture the upper left corner is scored against the whole truth.
    """
    if choices.corner:
        width, height = short_side(labels.shape[1], labels.shape[0], size)
        labels = labels[:height, :width]                                     # all of a smaller picture
    if labels.shape == shape:
        return labels
    height, width = shape
    rows = torch.arange(height, device=labels.device) * labels.shape[0] // height
    columns = torch.arange(width, device=labels.device) * labels.shape[1] // width
    return labels[rows][:, columns]                                          # (height, width)


# ---------------------------------------------------------------------------- matching


def count_all(overlap: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """`matching`: overlaps (K+1, P) -> TP, FP, FN of each class, and regions, (K+1, 3), as metrics.count_unnamed.

    NOTE(official): the rows of the Hungarian matching are all classes of the data set, present or not. A region that
    no present class takes goes to an absent one, whose false positives its pixels are; only regions beyond K are free.
    """
    K = len(overlap) - 1
    overlap_of_classes = overlap[:K]                                         # (K, P)
    missing = max(0, K - overlap.shape[1])
    square = np.pad(overlap_of_classes, ((0, 0), (0, missing)))              # (K, at least K)
    counts = np.zeros((K, 3), np.int64)
    for k, p in zip(*linear_sum_assignment(square, maximize=True)):
        tp = square[k, p]
        counts[k] = tp, square[:, p].sum() - tp, square[k].sum() - tp
    return with_regions(counts, overlap)


def scoring_of(scoring: Scoring, choices: Choices) -> Scoring:
    """A task's scoring, with `matching` where it is chosen."""
    return scoring._replace(count=count_all) if choices.matching and not scoring.named else scoring

"""What is compared, and how it is scored (Sec. 4.1, A.4): variants, predictions, floor and ceiling, counts of pixels.

evaluate.py is the command for it.  A few pictures without a command:

    rows = protocol.measure(seg4diff.load(), DATASETS["scenes"](), ["0", "1"], "ovss")
    rows["nano"]["mIoU"], rows["floor"]["mIoU"], rows["ceiling"]["mIoU"]
"""
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import seg4diff
from loading import Seg4Diff, image_seed
from support.data import Dataset, Item, centre_crop, read_ahead
from support.metrics import IGNORE, classes_in, confusion, match_proposals, proposal_scores, scores

Counts = dict[str, np.ndarray]          # row of the table -> pixel counts (K, .)

# What the counts of a picture depend on. When one of these files changes, a run begins anew.
CODE = ("protocol.py", "seg4diff.py", "loading.py", "mmdit.py", "flux.py", "vae.py", "text.py", "t5.py", "lora.py",
        "support/checkpoint.py", "support/weights.py", "support/data.py", "support/files.py", "support/metrics.py",
        "support/ledger.py", "support/classes.json", "nano/scenes.py")

# ---------------------------------------------------------------------------- variants: model -> list[Variant]


class Variant(NamedTuple):
    """One choice of what is read off the attention; a task is a list of them, scored on the same pictures."""
    name: str                           # of its row in the table
    block: int
    sigma: float
    kind: str = "softmax"               # seg4diff.KINDS
    minmax: bool = False
    head: int | None = None
    threshold: float | None = None      # of merging <pad> maps
    scaling: str | None = None          # seg4diff.SCALINGS


def ovss(m):
    """Table 1."""
    return [Variant(m.name, m.preset.block, m.preset.sigma)]


def layers(m):
    """Fig. 8: every block, I2T and T2I."""
    blocks = range(m.transformer.config.depth)
    i2t = [Variant(f"block {i} I2T", i, m.preset.sigma) for i in blocks]
    t2i = [Variant(f"block {i} T2I", i, m.preset.sigma, kind="t2i") for i in blocks]
    return i2t + t2i


def heads(m):
    """Fig. 17: every head of every block."""
    cfg = m.transformer.config
    pairs = product(range(cfg.depth), range(cfg.heads))
    return [Variant(f"block {i} head {h}", i, m.preset.sigma, head=h) for i, h in pairs]


def timesteps(m):
    """Fig. 15: noise levels, by the number of steps that are left."""
    steps = m.preset.steps
    schedule = m.preset.sigmas(steps).tolist()
    return [Variant(f"t = {n} of {steps}", m.preset.block, schedule[steps - n]) for n in range(2, steps + 1, 2)]


def normalization(m):
    """Table 5: scores before and after the softmax, each map as it is or scaled to [0, 1]."""
    block = m.preset.block
    sigma = m.preset.sigma
    return [Variant("before softmax", block, sigma, "logits"),
            Variant("before softmax, min-max", block, sigma, "logits", minmax=True),
            Variant("after softmax", block, sigma),
            Variant("after softmax, min-max", block, sigma, minmax=True)]


def unsup(m):
    """Table 2."""
    p = m.preset
    return [Variant(m.name, p.block, p.sigma, threshold=p.threshold, scaling=p.scaling)]


def thresholds(m):
    """How <pad> maps are merged: what Table 2's presets are chosen from."""
    block = m.preset.block
    sigma = m.preset.sigma
    pairs = product(seg4diff.SCALINGS, (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3))
    return [Variant(f"{scaling} {t:g}", block, sigma, threshold=t, scaling=scaling) for scaling, t in pairs]


# ---------------------------------------------------------------------------- predictions


class Protocol(NamedTuple):
    """Every choice beside model, data and variants that touches a number; stored with it and printed above it."""
    seed: int = 0
    prompt: str = "present"             # the classes of the picture, as in the paper, or "all" of the data set
    resize: str = "squash"              # the whole picture to a square, or "crop" its centre, truth and all
    draws: int = 1                      # noise draws whose maps are averaged


class Batch(NamedTuple):
    images: list[Image.Image]
    ids: list[np.ndarray]               # of each picture, the classes that it is prompted with: (K,) uint8
    names: list[list[str]]              # the names of these classes
    seeds: list[int]                    # of its noise


class Prediction(NamedTuple):
    labels: np.ndarray                  # (height, width) uint8: classes of the data set, or numbers of proposals
    values: np.ndarray                  # what labels can be: one value for each map that competed, uint8


# Four functions of (model, batch, variants, draws), which return {variant: Prediction} for each picture
def predict_named(model, batch, variants, draws):
    """Each variant is a call of seg4diff.segment."""
    out = [{} for _ in batch.images]
    for v in variants:
        segmentations = seg4diff.segment(model, batch.images, batch.names, block=v.block, sigma=v.sigma, draws=draws,
                                         seed=batch.seeds, kind=v.kind, head=v.head, minmax=v.minmax)
        for row, ids, segmentation in zip(out, batch.ids, segmentations):
            row[v.name] = Prediction(ids[segmentation.labels], ids)
    return out


def predict_unnamed(model, batch, variants, draws):
    """Each variant is a call of seg4diff.propose."""
    out = [{} for _ in batch.images]
    for v in variants:
        regions = seg4diff.propose(model, batch.images, block=v.block, sigma=v.sigma, draws=draws, seed=batch.seeds,
                                   threshold=v.threshold, scaling=v.scaling)
        for row, proposals in zip(out, regions):
            values = np.arange(len(proposals.maps), dtype=np.uint8)
            row[v.name] = Prediction(values[proposals.labels], values)
    return out


@torch.inference_mode()
def sweep_named(model, batch, variants, draws):
    """Many variants off the same passes, by the functions that `segment` is made of."""
    z0 = seg4diff.encode_image(model, batch.images)                          # (B, C, ., .)
    out = [{} for _ in batch.images]
    for sigma in dict.fromkeys(v.sigma for v in variants):
        chosen = [v for v in variants if v.sigma == sigma]
        blocks = sorted({v.block for v in chosen})
        kinds = sorted({v.kind for v in chosen})
        attn = seg4diff.attend(model, z0, batch.names, blocks=blocks, sigma=sigma, seeds=batch.seeds, kinds=kinds,
                               draws=draws)
        for row, image, ids, scores_of in zip(out, batch.images, batch.ids, attn):
            for v in chosen:
                maps = seg4diff.class_maps(scores_of[v.block, v.kind], v.head, v.minmax)     # (K, h, w)
                row[v.name] = Prediction(ids[seg4diff.labels_of(maps, image)], ids)
    return out


@torch.inference_mode()
def sweep_unnamed(model, batch, variants, draws):
    """The <pad> maps of one block and noise level merged in many ways, by the functions that `propose` is made of."""
    ((block, sigma),) = {(v.block, v.sigma) for v in variants}
    z0 = seg4diff.encode_image(model, batch.images)                          # (B, C, ., .)
    pads = seg4diff.pad_maps(model, z0, block=block, sigma=sigma, seeds=batch.seeds, draws=draws)      # (B, L, h, w)
    out = [{} for _ in batch.images]
    for row, image, tokens in zip(out, batch.images, pads):
        for v in variants:
            maps, _ = seg4diff.merge_maps(tokens, v.threshold, v.scaling)    # (P, h, w)
            values = np.arange(len(maps), dtype=np.uint8)
            row[v.name] = Prediction(values[seg4diff.labels_of(maps, image)], values)
    return out


def floor_map(K: int, grid: tuple[int, int], size: tuple[int, int], seed: int) -> np.ndarray:
    """What the protocol gives for K random maps, chance: labels of shape `size`."""
    maps = torch.rand(K, *grid, generator=torch.Generator().manual_seed(seed))               # (K, h, w)
    return seg4diff.label_map(maps, size).numpy()


def ceiling_map(labels: np.ndarray, present: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """What the protocol gives for the truth itself, averaged over the cells of the patch grid."""
    onehot = torch.from_numpy(labels == present[:, None, None]).float()                      # (K, height, width)
    maps = F.interpolate(onehot[None], size=grid, mode="area")[0]                            # (K, h, w)
    return seg4diff.label_map(maps, labels.shape).numpy()


# ---------------------------------------------------------------------------- tasks and their scores


class Scoring(NamedTuple):
    count: Callable                     # truth, labels, K -> pixel counts (K, .), and the labels under classes' names
    score: Callable                     # counts, added up -> mIoU, mACC, pACC, IoU of each class
    columns: Callable                   # K -> width of the counts


class Task(NamedTuple):
    variants: Callable                  # model -> list[Variant]
    predict: Callable                   # one of the four above
    scoring: Scoring
    floor: str = "floor"                # name of a variant's floor: random maps, as many as compete in it


def count_named(truth, labels, K):
    return confusion(truth, labels, K), labels


# With names (Table 1) or without (Table 2): this is decided here, and nowhere else.
NAMED = Scoring(count_named, scores, lambda K: K)
UNNAMED = Scoring(match_proposals, proposal_scores, lambda K: 3)
TASKS = {"ovss": Task(ovss, predict_named, NAMED), "unsup": Task(unsup, predict_unnamed, UNNAMED),
         "thresholds": Task(thresholds, sweep_unnamed, UNNAMED, "{} floor"), "layers": Task(layers, sweep_named, NAMED),
         "heads": Task(heads, sweep_named, NAMED), "timesteps": Task(timesteps, sweep_named, NAMED),
         "normalization": Task(normalization, sweep_named, NAMED)}


class Evaluation(NamedTuple):
    """What is evaluated, on what, and how."""
    model: Seg4Diff
    data: Dataset
    task: str                           # of TASKS
    variants: list[Variant]
    protocol: Protocol
    batch: int                          # pictures at once

    @property
    def scoring(self):
        return TASKS[self.task].scoring

    @property
    def rows(self):
        """Names of the table's rows: variants, the floor of each or of all, the ceiling."""
        names = [v.name for v in self.variants]
        floors = [TASKS[self.task].floor.format(name) for name in names]
        return [*names, *dict.fromkeys(floors), "ceiling"]

    def read(self, name: str) -> Item:
        """A picture and its truth, cropped if the protocol says so."""
        item = self.data.read(name)
        return centre_crop(item) if self.protocol.resize == "crop" else item

    def predict(self, items: list[Item]) -> list[dict[str, np.ndarray]]:
        """For each picture {row of the table: label map (height, width)}: variants, floor and ceiling."""
        model = self.model
        data = self.data
        task = TASKS[self.task]
        side = model.grid
        ids = [np.arange(len(data.classes), dtype=np.uint8)] * len(items)
        if self.protocol.prompt == "present":
            ids = [np.union1d(classes_in(item.labels), data.always).astype(np.uint8) for item in items]
        names = [[data.classes[k] for k in prompted] for prompted in ids]
        seeds = [image_seed(item.name, self.protocol.seed) for item in items]
        batch = Batch([item.image for item in items], ids, names, seeds)
        out = []
        predicted = task.predict(model, batch, self.variants, self.protocol.draws)
        for item, seed, predictions in zip(items, seeds, predicted):
            rows = {name: labels for name, (labels, _) in predictions.items()}
            for name, (_, values) in predictions.items():
                floor = task.floor.format(name)
                if floor not in rows:
                    rows[floor] = values[floor_map(len(values), (side, side), item.labels.shape, seed)]
            present = classes_in(item.labels)
            rows["ceiling"] = present[ceiling_map(item.labels, present, (side, side))]
            out.append(rows)
        return out

    def count(self, names: list[str]) -> Iterator[tuple[str, Counts | Exception]]:
        """(name, counts of every row) picture by picture; the exception of one that cannot be read.

        Counts are a confusion matrix (K, K), or match_proposals' (K, 3); none for a picture without a labelled pixel.
        """
        waiting = []
        for n, (name, item) in enumerate(read_ahead(self.read, names, 2 * self.batch), 1):
            if isinstance(item, Exception):
                yield name, item
            elif (item.labels == IGNORE).all():                              # nothing to prompt or score
                yield name, {}
            else:
                waiting.append(item)
            if waiting and (len(waiting) == self.batch or n == len(names)):
                for picture, rows in zip(waiting, self.predict(waiting)):
                    K = len(self.data.classes)
                    yield picture.name, {r: self.scoring.count(picture.labels, rows[r], K)[0] for r in rows}
                waiting = []


def evaluation(model: Seg4Diff, data: Dataset, task: str, protocol: Protocol | None = None, batch=None) -> Evaluation:
    """A task of TASKS with the variants that the model's preset gives it."""
    variants = TASKS[task].variants(model)
    return Evaluation(model, data, task, variants, protocol or Protocol(), batch or model.preset.batch)


def names_of(model: Seg4Diff, item: Item, classes: list[str]) -> list[str]:
    """The classes of a picture, as many as fit into one prompt; none if nothing is labelled."""
    names = [classes[k] for k in classes_in(item.labels)]
    return seg4diff.split_classes(model.text, names)[0] if names else []


def add_up(total, counts):
    for row, c in counts.items():
        total[row] = total.get(row, 0) + c


def measure(model: Seg4Diff, data: Dataset, names: list[str], task: str, variants: list[Variant] | None = None,
            protocol: Protocol | None = None) -> dict[str, dict]:
    """The table's rows for a few pictures, without a ledger: scores of each variant, of floor and ceiling."""
    ev = evaluation(model, data, task, protocol)
    if variants is not None:
        ev = ev._replace(variants=variants)
    total: Counts = {}
    for name, counts in ev.count(names):
        if isinstance(counts, Exception):
            raise ValueError(f"{name} cannot be read: {counts}")
        add_up(total, counts)
    return {row: ev.scoring.score(c) for row, c in total.items()}

"""What is compared, and how it is scored (Sec. 4.2, A.4): variants, predictions, floor and ceiling, counts of pixels.

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
from torch import Tensor

import controls
import released
import seg4diff
from loading import Seg4Diff, Square, image_seed
from support.checkpoint import Device
from support.data import Dataset, Item, centre_crop, read_ahead
from support.metrics import BORDERS, NAMED, UNNAMED, Scoring, border_counts, classes_in, overlaps

Counts = dict[str, np.ndarray]          # row of the table -> pixel counts (K, .)

# What the counts of a picture depend on. When one of these files changes, a run begins anew.
CODE = ("protocol.py", "released.py", "controls.py", "seg4diff.py", "readings.py", "sampling.py", "loading.py",
        "mmdit.py", "flux.py", "vae.py", "text.py", "t5.py", "lora.py", "support/checkpoint.py", "support/weights.py",
        "support/data.py", "support/files.py", "support/metrics.py", "support/ledger.py", "support/classes.json",
        "nano/scenes.py")

# ---------------------------------------------------------------------------- variants: model -> list[Variant]


class Variant(NamedTuple):
    """One choice of what is read off the attention; a task is a list of them, scored on the same pictures."""
    name: str                           # of its row in the table
    block: int
    sigma: float
    kind: str = "softmax"               # seg4diff.KINDS
    minmax: bool = False
    head: int | None = None
    threshold: float | None = None      # of merging regions
    scaling: str | None = None          # seg4diff.SCALINGS
    reading: str = "paper"              # seg4diff.READINGS
    regions: str = "pad"                # seg4diff.REGIONS


def ovss(model):
    """Table 1; and below the paper's reading the one beyond it that looks at the model's attention alone."""
    where = model.preset.block, model.preset.sigma
    return [Variant(model.name, *where), Variant(f"{model.name} i2i", *where, reading="i2i")]


def readings(model):
    """Beyond the paper: all readings of one pass (readings.py)."""
    return [Variant(r, model.preset.block, model.preset.sigma, reading=r) for r in seg4diff.READINGS]


def layers(model):
    """Fig. 8, 21, 24: every block, I2T and T2I."""
    blocks = range(model.transformer.config.depth)
    i2t = [Variant(f"block {i} I2T", i, model.preset.sigma) for i in blocks]
    t2i = [Variant(f"block {i} T2I", i, model.preset.sigma, kind="t2i") for i in blocks]
    return i2t + t2i


def heads(model):
    """Fig. 17: every head of every block."""
    cfg = model.transformer.config
    pairs = product(range(cfg.depth), range(cfg.heads))
    return [Variant(f"block {i} head {h}", i, model.preset.sigma, head=h) for i, h in pairs]


def timesteps(model):
    """Fig. 15: noise levels, by the number of steps that are left.  ValueError: there is none to compare."""
    steps = model.preset.steps
    schedule = model.preset.sigmas(steps).tolist()
    if steps < 2:
        raise ValueError(f"{model.name} goes from noise to picture in one step: there are no noise levels to compare")
    return [Variant(f"t = {n} of {steps}", model.preset.block, schedule[steps - n]) for n in range(2, steps + 1, 2)]


def normalization(model):
    """Table 5: scores before and after the softmax, each map as it is or scaled to [0, 1]."""
    where = model.preset.block, model.preset.sigma
    return [Variant("before softmax", *where, "logits"),
            Variant("before softmax, min-max", *where, "logits", minmax=True),
            Variant("after softmax", *where),
            Variant("after softmax, min-max", *where, minmax=True)]


def unsup(model):
    """Table 2."""
    preset = model.preset
    return [Variant(model.name, preset.block, preset.sigma, threshold=preset.threshold, scaling=preset.scaling)]


def unsup_i2i(model):
    """Beyond the paper: regions of the image-to-image attention."""
    preset = model.preset
    return [Variant(f"{model.name} i2i", preset.block, preset.sigma, regions="i2i", threshold=preset.i2i_threshold)]


def thresholds(model):
    """How <pad> maps are merged: what Table 2's presets are chosen from."""
    preset = model.preset
    pairs = product(seg4diff.SCALINGS, (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3))
    return [Variant(f"{s} {t:g}", preset.block, preset.sigma, threshold=t, scaling=s) for s, t in pairs]


# ---------------------------------------------------------------------------- predictions


class Protocol(NamedTuple):
    """Every choice beside model, data and variants that touches a number; stored with it and printed above it."""
    seed: int = 0
    prompt: str = "present"             # the classes of the picture, as in the paper, or "all" of the data set
    resize: str = "squash"              # the whole picture to a square, or "crop" its centre, truth and all
    draws: int = 1                      # noise draws whose maps are averaged
    control: str = "none"               # one of controls.CONTROLS: a score that must fall to the floor
    choices: released.Choices = released.OURS            # what is done the released code's way


class Prepared(NamedTuple):
    """A picture with all that needs no model, made by read_ahead's threads while the device works."""
    item: Item                          # as it is scored
    square: Square
    ids: np.ndarray                     # the classes that it is prompted with: (K,) uint8
    names: list[str]                    # that stand in the prompt for them
    present: np.ndarray                 # the classes that are in its truth: (K',) uint8
    ceilings: dict[str, np.ndarray]     # row of the table -> (height, width) uint8: index into present


class Batch(NamedTuple):
    images: list[Square]
    names: list[list[str]]              # the names that each picture is prompted with
    seeds: list[int]                    # of its noise


# Four functions of (model, batch, variants, draws). For each picture b and each variant they yield b, the variant's
# name, the label map (height, width) on the model's device, and how many maps competed in it: one at a time, as many
# variants of a large picture would fill a GPU.
def predict_named(model, batch, variants, draws):
    """Calls of seg4diff.segment; variants that differ in their reading alone share one."""
    calls = {}
    for v in variants:
        calls.setdefault(v._replace(name="", reading=""), []).append(v)
    for v, alike in calls.items():
        found = seg4diff.segment(model, batch.images, batch.names, reading=[a.reading for a in alike], block=v.block,
                                 sigma=v.sigma, seed=batch.seeds, kind=v.kind, head=v.head, minmax=v.minmax,
                                 draws=draws)
        for b, segmentations in enumerate(found):
            for a in alike:
                labels = torch.from_numpy(segmentations[a.reading].labels).to(model.device)
                yield b, a.name, labels, len(batch.names[b])


def predict_unnamed(model, batch, variants, draws):
    """Each variant is a call of seg4diff.propose."""
    for v in variants:
        regions = seg4diff.propose(model, batch.images, regions=v.regions, block=v.block, sigma=v.sigma, draws=draws,
                                   seed=batch.seeds, threshold=v.threshold, scaling=v.scaling)
        for b, proposals in enumerate(regions):
            yield b, v.name, torch.from_numpy(proposals.labels).to(model.device), len(proposals.maps)


@torch.inference_mode()
def sweep_named(model, batch, variants, draws):
    """Many variants off the same passes, by the functions that `segment` is made of."""
    z0 = seg4diff.encode_image(model, batch.images)                          # (B, C, ., .)
    for sigma in dict.fromkeys(v.sigma for v in variants):
        chosen = [v for v in variants if v.sigma == sigma]
        blocks = sorted({v.block for v in chosen})
        kinds = sorted({v.kind for v in chosen})
        attn = seg4diff.attend(model, z0, batch.names, blocks=blocks, sigma=sigma, seeds=batch.seeds, kinds=kinds,
                               draws=draws)
        for b, square in enumerate(batch.images):
            size = (square.image.height, square.image.width)
            for v in chosen:
                maps = seg4diff.class_maps(attn[b][v.block, v.kind], v.head, v.minmax)       # (K, h, w)
                yield b, v.name, seg4diff.label_map(maps, size), len(maps)


@torch.inference_mode()
def sweep_unnamed(model, batch, variants, draws):
    """The <pad> maps of one block and noise level merged in many ways, by the functions that `propose` is made of."""
    ((block, sigma),) = {(v.block, v.sigma) for v in variants}
    z0 = seg4diff.encode_image(model, batch.images)                          # (B, C, ., .)
    pads = seg4diff.pad_maps(model, z0, block=block, sigma=sigma, seeds=batch.seeds, draws=draws)      # (B, L, h, w)
    for b, square in enumerate(batch.images):
        size = (square.image.height, square.image.width)
        for v in variants:
            maps, _ = seg4diff.merge_maps(pads[b], v.threshold, v.scaling)   # (P, h, w)
            yield b, v.name, seg4diff.label_map(maps, size), len(maps)


def floor_map(K: int, grid: tuple[int, int], size: tuple[int, int], seed: int, device: Device = None) -> Tensor:
    """What the protocol gives for K random maps, chance: labels of shape `size`."""
    maps = torch.rand(K, *grid, generator=torch.Generator().manual_seed(seed))               # (K, h, w)
    return seg4diff.label_map(maps.to(device), size)


def ceiling_map(labels: np.ndarray, present: np.ndarray, grid: tuple[int, int],
                refined_by: Image.Image | None = None) -> np.ndarray:
    """What the protocol gives for the truth itself, averaged over the cells of the patch grid.

    refined_by: the picture, for what the reading "pixels" can make of it.
    """
    onehot = torch.from_numpy(labels == present[:, None, None]).float()                      # (K, height, width)
    maps = F.interpolate(onehot[None], size=grid, mode="area")[0]                            # (K, h, w)
    if refined_by is not None:
        return seg4diff.labels_of(maps, refined_by, "pixels").astype(np.uint8)
    return seg4diff.label_map(maps, labels.shape).numpy().astype(np.uint8)


# ---------------------------------------------------------------------------- tasks


class Task(NamedTuple):
    variants: Callable                  # model -> list[Variant]
    predict: Callable                   # one of the four above
    scoring: Scoring
    own_floor: bool = False             # each variant has its own floor: random maps, as many as compete in it
    overlays: bool = False              # evaluate.py shows label maps and the IoU of each class in place of a plot
    intervals: bool = False             # and how far each variant is above the first one, with a 95 % interval
    note: str = ""                      # what the rows of several variants mean, for the reader of the table


BOTH_READINGS = "{0}: the paper's reading; {1}: beyond it, a step through the block's own image-to-image attention"
TASKS = {"ovss": Task(ovss, predict_named, NAMED, overlays=True, note=BOTH_READINGS),
         "unsup": Task(unsup, predict_unnamed, UNNAMED, overlays=True),
         "readings": Task(readings, predict_named, BORDERS, intervals=True),
         "thresholds": Task(thresholds, sweep_unnamed, UNNAMED, own_floor=True),
         "layers": Task(layers, sweep_named, NAMED),
         "heads": Task(heads, sweep_named, NAMED),
         "timesteps": Task(timesteps, sweep_named, NAMED),
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
        return released.scoring_of(TASKS[self.task].scoring, self.protocol.choices)

    @property
    def rows(self):
        """Names of the table's rows: variants, the floor of each or of all, the ceiling, and that of refined maps."""
        names = [v.name for v in self.variants]
        floors = [f"{name} floor" for name in names] if TASKS[self.task].own_floor else ["floor"]
        refined = ["ceiling pixels"] if any(v.reading == "pixels" for v in self.variants) else []
        return [*names, *floors, "ceiling", *refined]

    @property
    def grid(self):
        """(h, w) of the model's patches."""
        return self.model.grid, self.model.grid

    def read(self, name: str) -> Item:
        """A picture and its truth, cropped if the protocol says so."""
        item = self.data.read(name)
        return centre_crop(item) if self.protocol.resize == "crop" else item

    def prepare(self, item: Item) -> Prepared:
        """A picture, ready for the model."""
        item, square, prompted = released.picture(item, self.model.preset.size, self.protocol.choices)
        classes = self.data.classes
        ids = np.arange(len(classes), dtype=np.uint8)
        if self.protocol.prompt == "present":
            ids = np.union1d(prompted, self.data.always).astype(np.uint8)
        names = [classes[k] for k in ids]
        if self.protocol.control == "swapped":
            names = controls.swapped(ids, classes, image_seed(item.name, self.protocol.seed))
        present = classes_in(item.labels)
        ceilings = {}
        if len(present):
            ceilings["ceiling"] = ceiling_map(item.labels, present, self.grid)
            if "ceiling pixels" in self.rows:
                ceilings["ceiling pixels"] = ceiling_map(item.labels, present, self.grid, item.image)
        return Prepared(item, square, ids, names, present, ceilings)

    def label_maps(self, pictures: list[Prepared]) -> Iterator[tuple[int, str, Tensor, np.ndarray]]:
        """Which picture, row of the table, label map (height, width) on the model's device, class of each label (P,).

        First every variant's, then floors' and ceilings'.  Without names a label's class is a number of its own.
        """
        model = self.model
        task = TASKS[self.task]
        seeds = [image_seed(p.item.name, self.protocol.seed) for p in pictures]
        batch = Batch([p.square for p in pictures], [p.names for p in pictures], seeds)
        competed = [{} for _ in pictures]                # name of a floor -> what competes in it
        for b, row, labels, P in task.predict(model, batch, self.variants, self.protocol.draws):
            classes = pictures[b].ids if task.scoring.named else np.arange(P)                # (P,)
            competed[b].setdefault(f"{row} floor" if task.own_floor else "floor", classes)
            shape = pictures[b].item.labels.shape
            yield b, row, released.as_scored(labels, shape, model.preset.size, self.protocol.choices), classes
        for b, picture in enumerate(pictures):
            for row, classes in competed[b].items():
                size = picture.item.labels.shape
                yield b, row, floor_map(len(classes), self.grid, size, seeds[b], model.device), classes
            for row, labels in picture.ceilings.items():
                yield b, row, torch.from_numpy(labels).to(model.device), picture.present

    def predict(self, items: list[Item]) -> list[dict[str, np.ndarray]]:
        """For each picture {row of the table: label map (height, width)}, to look at: variants, floor and ceiling."""
        pictures = [self.prepare(item) for item in items]
        out = [{} for _ in items]
        for b, row, labels, classes in self.label_maps(pictures):
            out[b][row] = classes[labels.cpu().numpy()]
        return out

    def count_batch(self, pictures: list[Prepared]) -> list[Counts]:
        """For each picture the counts of every row.  Label maps stay on the device; overlaps leave it, all at once.

        Where borders are scored, label maps leave it, too: distances are SciPy's.
        """
        K = len(self.data.classes)
        truths = [torch.from_numpy(p.item.labels).to(self.model.device) for p in pictures]
        found = [{} for _ in pictures]                   # row -> overlaps (K+1, P), class of each label (P,)
        borders = [{} for _ in pictures]                 # row -> border_counts (K, 2)
        for b, row, labels, classes in self.label_maps(pictures):
            found[b][row] = overlaps(truths[b], labels, K, len(classes)), classes
            if self.scoring.borders:
                borders[b][row] = border_counts(pictures[b].item.labels, classes[labels.cpu().numpy()], K)
        out = []
        for b, rows in enumerate(found):
            sizes = [len(classes) for _, classes in rows.values()]
            together = torch.cat([overlap for overlap, _ in rows.values()], dim=1).cpu()     # (K+1, all P)
            counts = {}
            for (row, (_, classes)), overlap in zip(rows.items(), together.split(sizes, dim=1)):         # (K+1, P)
                counts[row] = self.scoring.count(overlap.numpy(), classes)
                if self.scoring.borders:
                    counts[row] = np.concatenate([counts[row], borders[b][row]], axis=1)     # (K, K + 2)
            out.append(counts)
        return out

    def count(self, names: list[str]) -> Iterator[tuple[str, Counts | Exception]]:
        """(name, counts of every row) picture by picture; the exception of one that cannot be read.

        Counts (K, .) are what the task's scoring makes of overlaps; none for a picture without a labelled pixel.
        """
        def read(name):
            return self.prepare(self.read(name))

        waiting = []
        for n, (name, picture) in enumerate(read_ahead(read, names, 2 * self.batch), 1):
            if isinstance(picture, Exception):
                yield name, picture
            elif len(picture.present) == 0:                                  # nothing to prompt or score
                yield name, {}
            else:
                waiting.append(picture)
            if waiting and (len(waiting) == self.batch or n == len(names)):
                for done, counts in zip(waiting, self.count_batch(waiting)):
                    yield done.item.name, counts
                waiting = []


def evaluation(model: Seg4Diff, data: Dataset, task: str, protocol: Protocol | None = None, batch=None) -> Evaluation:
    """A task of TASKS with the variants that the model's preset gives it."""
    protocol = protocol or Protocol()
    model = released.model_of(model, protocol.choices)
    data = released.data_of(data, protocol.choices)
    variants = TASKS[task].variants(model)
    return Evaluation(model, data, task, variants, protocol, batch or model.preset.batch)


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

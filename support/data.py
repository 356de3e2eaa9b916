"""Data sets as (picture, label map, name) with the names of their classes; and pictures with masks to train MAGNET on.

    data = DATASETS["voc"](Path("data"))
    image, labels, name = data.read(data.names[0])

The real ones are read in the layouts they are downloaded in, below one root. Their label maps are converted while they
are read. classes.json holds the class lists, in each benchmark's order, and the ids that the files use for them.
"""
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from nano import scenes
from support.files import Broken, check_kind, decoding, objects, open_labels, open_stored, read_json, read_text
from support.ledger import world
from support.metrics import IGNORE, classes_in

ROOT = Path(os.environ.get("SEG4DIFF_DATA", "data"))
FACTS = read_json(Path(__file__).parent / "classes.json")


class Item(NamedTuple):
    image: Image.Image                  # RGB
    labels: np.ndarray                  # (height, width) uint8: index into the data set's classes, or IGNORE
    name: str


class Pair(NamedTuple):
    image: Image.Image                  # RGB
    masks: np.ndarray                   # (K, height, width) bool, K may be 0
    names: list[str]                    # of the masks; empty where nobody named them
    caption: str


@dataclass(frozen=True)
class Dataset:
    name: str
    names: list[str]                    # one for each picture, in a fixed order
    read: Callable[[str], Item | Pair]  # Pair: to train MAGNET on.  files.Broken: one of its files is broken
    classes: Sequence[str] = ()         # of its label maps
    source: str = ""                    # where its label maps are
    always: tuple[int, ...] = ()        # classes that stand in every prompt though they are never true
    files: tuple[Path, ...] = ()        # all that `read` reads: numbers depend on them, see files.stamp


def subset(names, limit):
    """`limit` of the names, always the same ones; a larger limit keeps those of a smaller one. None: all names."""
    chosen = np.random.default_rng(0).permutation(len(names))[:limit]
    return [names[i] for i in sorted(chosen)]


def centre_crop(item):
    """The largest square in the middle of a picture, and of its label map."""
    side = min(item.image.size)
    x = (item.image.width - side) // 2
    y = (item.image.height - side) // 2
    return Item(item.image.crop((x, y, x + side, y + side)), item.labels[y:y + side, x:x + side], item.name)


def read_ahead(read, names, ahead=8):
    """(name, item) in order; other threads read up to `ahead` of the next pictures meanwhile.

    A picture that cannot be read comes as its files.Broken, so that it does not end a run; other errors are ours.
    """
    def attempt(name):
        try:
            return name, read(name)
        except Broken as e:
            return name, e

    waiting = deque()
    with ThreadPoolExecutor(min(4, ahead)) as pool:
        for name in names:
            waiting.append(pool.submit(attempt, name))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def usable(data: Dataset, names: Sequence[str], most: int | None = None) -> tuple[list[str], dict[str, str]]:
    """The first `most` of those pictures that can be read and have a labelled pixel; {name: why} of what cannot be.

    None: all of them.  ValueError: there is none.
    """
    if not data.files:                                   # drawn scenes are never broken
        return names[:most], {}
    found = []
    broken = {}
    for name, item in read_ahead(data.read, names):
        if isinstance(item, Broken):
            broken[name] = str(item)
        elif len(classes_in(item.labels)):
            found.append(name)
        if len(found) == most:
            break
    if not found:
        first = f"; {next(iter(broken.values()))}" if broken else ""
        raise ValueError(f"nothing can be measured: {len(broken)} of the {len(names)} pictures of {data.name} cannot "
                         f"be read, and no other has a labelled pixel{first}")
    return found, broken


def measurable(data, names):
    """All usable pictures; those that cannot be read are named once on stderr.  ValueError: there is none."""
    found, broken = usable(data, names)
    for name, why in broken.items():
        if world()[0] == 0:
            tqdm.write(f"picture {name} of {data.name} cannot be read, not measured: {why}", file=sys.stderr)
    return found


def lookup(key, background=False, ids=None):
    """The class names of an entry of FACTS, and a table from an id in a label file to the index of its class.

    Other ids go to IGNORE, or with `background` to class 0; the named classes then count from 1. Id 255, which the
    files keep for pixels that are not scored, goes to IGNORE.
    """
    ids = FACTS[key]["source_ids"] if ids is None else ids
    named = FACTS[key]["classes"]
    classes = ["background", *named] if background else named
    table = np.full(65536, 0 if background else IGNORE, np.uint8)            # (65536,)
    table[255] = IGNORE
    table[ids] = [classes.index(name) for name in named]
    return classes, table


def need(name, root, folder, *tree):
    """root / folder.  Each line of the tree begins with a pattern of files below it.

    ValueError that says which tree is expected and what is there instead, unless each pattern fits a file.
    """
    missing = [line for line in tree if not any((root / folder).glob(line.split()[0]))]
    if missing:
        content = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else "no such folder"
        expected = "; ".join(f"{folder}/{line}" for line in tree)
        raise ValueError(f"data set {name!r} was not found: there is no {root / folder / missing[0]}. Expected below "
                         f"{root} (--data-root or SEG4DIFF_DATA): {expected}. Found there: {content or 'nothing'}")
    return root / folder


def by_stem(images, labels):
    """{name: (its picture, its label map)} of every label map in a folder."""
    return {p.stem: (images / f"{p.stem}.jpg", p) for p in labels.glob("*.png")}


def paired(name, pairs, classes, table, always=()):
    """A data set of picture files and label PNGs (palette or grey), whose values go through `table` (65536,).

    ValueError: no pairs.
    """
    if not pairs:
        raise ValueError(f"data set {name!r} has its folders, but no picture with a label map in them")

    def read(key):
        image_path, label_path = pairs[key]
        image = open_stored(image_path)
        return Item(image, table[open_labels(label_path, image.size)], key)  # labels: (height, width)

    names = sorted(pairs)
    files = [path for key in names for path in pairs[key]]
    return Dataset(name, names, read, classes, str(files[1].parent.resolve()), always, tuple(files))


def runs_of(code, size):
    """The lengths of a run-length mask's runs, as COCO writes it: in turns outside and inside, column after column.

    A character from "0" to "o" holds 5 bits of a number, the lowest first, and whether the number goes on; the highest
    bit of its last one is the sign. From the fourth number on it is the difference to the number two before.
    size: (width, height) of the picture.  ValueError: the mask is of another size, or no such mask.
    """
    check_kind(code, dict, "a segmentation")
    width, height = size
    if code.get("size") != [height, width]:
        raise ValueError(f"a mask has the size {str(code.get('size'))[:40]}, its picture {[height, width]}")
    counts = check_kind(code.get("counts"), str, "'counts' of a segmentation")
    if not re.fullmatch("([P-o]{0,6}[0-O])+", counts):                       # "P" to "o": the number goes on
        raise ValueError(f"'counts' of a segmentation, {counts[:20]!r}, are not COCO's")
    runs = []
    value = shift = 0
    for character in counts.encode():
        bits = character - ord("0")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(runs) > 2:
            value += runs[-2]
        runs.append(value)
        value = shift = 0
    if min(runs) < 0 or sum(runs) != height * width:
        raise ValueError(f"'counts' of a segmentation, {counts[:20]!r}, are not those of {height} x {width} pixels")
    return runs


def area(runs):
    return sum(runs[1::2])


def mask_of(runs, size):
    """Such runs, and the size of the picture -> (height, width) bool."""
    width, height = size
    inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(inside, runs).reshape(width, height).T                  # (height, width)


# ---------------------------------------------------------------------------- the data sets


def toy_scenes(root: Path = ROOT, name: str = "scenes", seeds: range = scenes.VAL_SEEDS[:200]) -> Dataset:
    """nano's world (nano/scenes.py), drawn when read and not from `root`; a picture's name is its seed."""
    def read(seed):
        scene = scenes.draw(int(seed))
        return Item(Image.fromarray(scene.image), scene.labels, seed)
    return Dataset(name, [str(s) for s in seeds], read, scenes.CLASSES)


def voc(root, name):
    """Pascal VOC 2012 val: 1449 pictures, 20 classes, or 21 with the background as the first (voc21)."""
    base = need(name, root, "VOCdevkit/VOC2012", "JPEGImages/*.jpg", "ImageSets/Segmentation/val.txt",
                "SegmentationClass*/*.png (SegmentationClass or SegmentationClassAug)")
    labels = base / "SegmentationClassAug"
    if not labels.exists():
        labels = base / "SegmentationClass"
    split = read_text(base / "ImageSets/Segmentation/val.txt").split()
    pairs = {stem: (base / f"JPEGImages/{stem}.jpg", labels / f"{stem}.png") for stem in split}
    return paired(name, pairs, *lookup("voc20", background=name == "voc21"))


def context(root, name):
    """Pascal Context val: 59 classes, or 60 with the background (context60), as run-length masks in one JSON file."""
    base = need(name, root, "VOCdevkit/VOC2010", "JPEGImages/*.jpg", "trainval_merged.json")
    source = base / "trainval_merged.json"
    merged = read_json(source)
    with decoding(source, "list of pictures and masks"):
        val = {}
        for im in objects(merged, "images"):
            if im["phase"] == "val":
                val[check_kind(im["file_name"], str, "a file_name")] = im["image_id"]
        masks = {image_id: [] for image_id in val.values()}
        for anno in objects(merged, "annos_segmentation"):
            if anno["image_id"] in masks:
                masks[anno["image_id"]].append(anno)
        if not val:
            raise ValueError("it has no picture of the phase 'val'")
    classes, table = lookup("context59", background=name == "context60")
    table[255] = table[0]                                # a category like any other outside the 59

    def read(file_name):
        image = open_stored(base / "JPEGImages" / file_name)
        ids = np.zeros((image.height, image.width), np.uint16)               # (height, width), 0: no mask
        with decoding(source, "list of masks"):
            for anno in masks[val[file_name]]:
                category = check_kind(anno.get("category_id"), int, "a category_id")
                if not 0 <= category <= 65535:
                    raise ValueError(f"a category_id should be from 0 to 65535, not {category}")
                ids[mask_of(runs_of(anno.get("segmentation"), image.size), image.size)] = category
        return Item(image, table[ids], file_name)

    names = sorted(val)
    files = (source, *(base / "JPEGImages" / file_name for file_name in names))
    return Dataset(name, names, read, classes, str(source.resolve()), files=files)


def coco(root, name):
    """COCO val2017, 5000 pictures: coco-object (80 things), coco-object81 (with the background), stuff27.

    NOTE(official): in the released code "background" stands in the prompt of coco-object and competes for pixels,
    though it is never scored; that is coco-object-bg here.

    Label PNGs hold fine ids: 0 to 90 things (category id - 1), 91 to 181 stuff, 255 unlabelled.
    """
    folder = "stuffthingmaps"
    if not (root / "coco/stuffthingmaps/val2017").is_dir() and (root / "coco/annotations/val2017").is_dir():
        folder = "annotations"
    base = need(name, root, "coco", "val2017/*.jpg", f"{folder}/val2017/*.png")
    labels = base / folder / "val2017"
    pairs = by_stem(base / "val2017", labels)
    if name == "stuff27":
        table = np.full(65536, IGNORE, np.uint8)
        table[:182] = FACTS[name]["coarse_of_fine"]
        return paired(name, pairs, FACTS[name]["classes"], table)
    ids = [i - 1 for i in FACTS["coco-object"]["source_ids"]]
    classes, table = lookup("coco-object", name != "coco-object", ids)
    if name == "coco-object-bg":
        table[table == 0] = IGNORE
        return paired(name, pairs, classes, table, always=(0,))
    return paired(name, pairs, classes, table)


def ade20k(root, name):
    """ADE20K validation: 2000 pictures, 150 classes; value 0 is unlabelled, k is class k-1."""
    base = need(name, root, "ADEChallengeData2016", "images/validation/*.jpg", "annotations/validation/*.png")
    return paired(name, by_stem(base / "images/validation", base / "annotations/validation"), *lookup(name))


def cityscapes(root, name):
    """Cityscapes val: 500 pictures, 19 classes, from *_labelTrainIds.png where they exist, else *_labelIds.png."""
    base = need(name, root, "cityscapes", "leftImg8bit/val/*/*_leftImg8bit.png",
                "gtFine/val/*/*_gtFine_label*Ids.png (labelIds or labelTrainIds)")
    ids = range(19)
    paths = sorted(base.glob("gtFine/val/*/*_gtFine_labelTrainIds.png"))
    if not paths:
        ids = FACTS[name]["source_ids"]
        paths = sorted(base.glob("gtFine/val/*/*_gtFine_labelIds.png"))
    pairs = {}
    for p in paths:
        stem = p.name.rsplit("_gtFine_", 1)[0]
        pairs[stem] = (base / f"leftImg8bit/val/{p.parent.name}/{stem}_leftImg8bit.png", p)
    return paired(name, pairs, *lookup(name, ids=ids))


# Neither scenes was trained on; choices such as the expert block are made on scenes-dev, numbers reported on scenes.
READERS = {"scenes": toy_scenes, "scenes-dev": partial(toy_scenes, seeds=scenes.VAL_SEEDS[5000:5100]),
           "voc": voc, "voc21": voc, "context59": context, "context60": context,
           "coco-object": coco, "coco-object81": coco, "coco-object-bg": coco, "stuff27": coco,
           "ade20k": ade20k, "cityscapes": cityscapes}
# name -> a function of the root folder that returns a Dataset. ValueError: it is not there
DATASETS = {name: partial(reader, name=name) for name, reader in READERS.items()}


# ---------------------------------------------------------------------------- pictures with masks to train on, Sec. 4.1

LEAST_AREA = 0.005                      # of a mask, as a share of its picture (SA-1B): released code
MAX_MASKS = 32                          # of a picture: released code


def class_masks(labels, classes):
    """A label map (height, width) -> a mask (K, height, width) and a name for each class in it, in class order."""
    ids = classes_in(labels)                                                 # (K,)
    return labels == ids[:, None, None], [classes[i] for i in ids]


def first_captions(content):
    """{number of a picture: its first caption}, in order, of what COCO's captions_*.json hold."""
    first = {}
    for entry in objects(content, "annotations"):
        caption = check_kind(entry["caption"], str, "a caption")
        first.setdefault(check_kind(entry["image_id"], int, "an image_id"), caption.strip())
    return first


def captions_of(path, names):
    """{name of a picture: its caption} from a JSON file, as far as it has captions of these; no path: nothing.

    The file is {image id: caption}, as the released code has for CogVLM's captions, of which the first two sentences
    are kept; or COCO's own captions_*.json, of which each picture's first caption is kept.
    files.Broken: anything else; captions of none of these pictures.
    """
    if not path:
        return {}
    captions = read_json(path)
    found = {}                                           # by number
    with decoding(path, "file of captions, {image id: caption}"):
        if "annotations" in captions:
            found = {number(str(i)): caption for i, caption in first_captions(captions).items()}
        else:
            for key, caption in captions.items():
                sentences = re.split(r"(?<=[.!?])\s+", check_kind(caption, str, f"the caption of {key!r}").strip())
                found[number(key)] = " ".join(sentences[:2])
        caption_of = {name: found[number(name)] for name in names if number(name) in found}
        if not caption_of:
            raise ValueError(f"it has no caption of any of the {len(names)} pictures")
    return caption_of


def number(stem):
    """"000000000009", "sa_9" and "9" are the same picture: "9"."""
    return stem.removeprefix("sa_").removesuffix(".jpg").lstrip("0")


def scenes_pairs(root, captions):
    """Scenes of the toy world that nano was not trained on (its first seeds are nano's own), one mask a class."""
    if captions:
        raise ValueError("the scenes caption themselves; --captions is for coco and sa1b")

    def read(seed):
        scene = scenes.draw(int(seed))
        masks, names = class_masks(scene.labels, scenes.CLASSES)
        caption = scenes.caption(scene, np.random.default_rng(int(seed)))
        return Pair(Image.fromarray(scene.image), masks, names, caption)
    return Dataset("scenes", [str(s) for s in scenes.TRAIN_SEEDS[100_000:200_000]], read)


def coco_pairs(root, captions):
    """COCO train2017 with COCO-Stuff's label maps: one mask for each of 171 classes.

    Captions from the file given, else (None) from COCO's own, else the names of the classes.
    """
    base = need("coco", root, "coco", "stuffthingmaps/train2017/*.png",
                "train2017/*.jpg (captions: --captions FILE, annotations/captions_train2017.json or the class names)")
    official = base / "annotations/captions_train2017.json"
    if captions is None and official.exists():
        captions = official
    data = paired("coco", by_stem(base / "train2017", base / "stuffthingmaps/train2017"), *lookup("coco-stuff171"))
    caption_of = captions_of(captions, data.names)

    def read(stem):
        item = data.read(stem)
        masks, names = class_masks(item.labels, data.classes)
        return Pair(item.image, masks, names, caption_of.get(stem, " ".join(names)))
    files = (*data.files, captions) if captions else data.files
    return Dataset("coco", data.names, read, files=files)


def sa1b_pairs(root, captions):
    """SA-1B: sa_*.jpg with a sa_*.json of run-length masks beside each, in any folders below sa1b/.

    The 32 largest masks of more than 0.5 % of the picture (released code). They have no names, and a picture without
    a caption in the file given has the empty one.
    """
    base = need("sa1b", root, "sa1b", "**/sa_*.jpg", "**/sa_*.json (beside each sa_*.jpg)")
    paths = {p.stem: p for p in sorted(base.rglob("sa_*.json")) if p.with_suffix(".jpg").exists()}
    if not paths:
        raise ValueError(f"data set 'sa1b' has no sa_*.jpg in {base} with its sa_*.json beside it")
    caption_of = captions_of(captions, paths)

    def read(stem):
        image = open_stored(paths[stem].with_suffix(".jpg"))
        content = read_json(paths[stem])
        with decoding(paths[stem], "list of masks"):
            runs = [runs_of(a.get("segmentation"), image.size) for a in objects(content, "annotations")]
        runs.sort(key=area, reverse=True)
        least = LEAST_AREA * image.width * image.height
        masks = [mask_of(r, image.size) for r in runs[:MAX_MASKS] if area(r) > least]
        masks = np.stack(masks) if masks else np.zeros((0, image.height, image.width), bool)     # (K, height, width)
        return Pair(image, masks, [], caption_of.get(stem, ""))

    files = [captions] if captions else []
    for path in paths.values():
        files += [path.with_suffix(".jpg"), path]
    return Dataset("sa1b", list(paths), read, files=tuple(files))


# name -> a function of the root folder and a file of captions (None: the data set's own, False: none are needed) that
# returns a data set of Pairs. ValueError: it, or the file, is not there, or cannot be read
TRAINING_SETS = {"scenes": scenes_pairs, "coco": coco_pairs, "sa1b": sa1b_pairs}

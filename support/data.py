"""Data sets as (picture, label map, name) with the names of their classes.

    data = DATASETS["voc"](Path("data"))
    image, labels, name = data.read(data.names[0])

The real ones are read in the layouts they are downloaded in, below one root; label maps are converted while
reading.  classes.json holds the class lists, in each benchmark's order, and the ids the files use for them.
"""
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from nano import scenes
from support.metrics import IGNORE

ROOT = Path(os.environ.get("SEG4DIFF_DATA", "data"))
FACTS = json.loads((Path(__file__).parent / "classes.json").read_text())


# What a broken picture, label map or mask file raises; SyntaxError is PIL's, of PNGs.
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Item(NamedTuple):
    image: Image.Image                  # RGB
    labels: np.ndarray                  # (height, width) uint8: index into the data set's classes, or IGNORE
    name: str


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: list[str]
    names: list[str]                    # one for each picture, in a fixed order
    read: Callable[[str], Item]         # OSError, ValueError: a broken picture or label map
    source: str = ""                    # where its label maps are
    always: tuple[int, ...] = ()        # classes that stand in every prompt though they are never true


def subset(names: Sequence[str], limit: int | None) -> list[str]:
    """`limit` of the names, always the same ones, a larger limit keeping those of a smaller; None: all."""
    if limit is None:
        return list(names)
    chosen = sorted(np.random.default_rng(0).permutation(len(names))[:limit])
    return [names[i] for i in chosen]


def centre_crop(item: Item) -> Item:
    """The largest square in the middle of a picture, and of its label map."""
    side = min(item.image.size)
    x, y = (item.image.width - side) // 2, (item.image.height - side) // 2
    return Item(item.image.crop((x, y, x + side, y + side)), item.labels[y:y + side, x:x + side], item.name)


def read_ahead(read: Callable[[str], Item], names: Sequence[str], ahead: int = 8) -> Iterator[tuple[str, Item | Exception]]:
    """(name, item) in order; up to `ahead` of the next pictures are read by other threads meanwhile.

    A picture that cannot be read comes as its exception, so that one broken file does not end a run.
    """
    def attempt(name: str) -> Item | Exception:
        try:
            return read(name)
        except BROKEN as e:
            return e

    with ThreadPoolExecutor(min(4, ahead)) as pool:
        waiting = deque((name, pool.submit(attempt, name)) for name in names[:ahead])
        for i in range(len(names)):
            if i + ahead < len(names):
                waiting.append((names[i + ahead], pool.submit(attempt, names[i + ahead])))
            name, item = waiting.popleft()
            yield name, item.result()


def lookup(source_ids: Sequence[int], background: bool = False, ignore: int | None = 255) -> np.ndarray:
    """Table from an id in a label file to the index of its class, uint8.

    Other ids go to IGNORE, or with `background` to class 0, the named ones then counting from 1; `ignore` is the
    id that the files themselves keep for pixels not to be scored.
    """
    table = np.full(65536, 0 if background else IGNORE, np.uint8)
    if ignore is not None:
        table[ignore] = IGNORE
    table[list(source_ids)] = np.arange(len(source_ids)) + background
    return table


def need(name: str, root: Path, tree: str, paths: Sequence[Path]) -> None:
    """ValueError that draws the expected tree and says what was found, unless all paths exist."""
    missing = [p for p in paths if not p.exists()]
    if missing:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) if root.is_dir() else "no such folder"
        raise ValueError(f"data set {name!r} was not found: there is no {missing[0]}. Expected below {root} "
                         f"(--data-root or SEG4DIFF_DATA):\n{tree}\nFound in {root}: {found or 'nothing'}")


def paired(name: str, classes: list[str], table: np.ndarray, pairs: dict[str, tuple[Path, Path]]) -> Dataset:
    """A data set of picture files and label PNGs (palette or grey) whose values go through `table`."""
    def read(key: str) -> Item:
        image_path, label_path = pairs[key]
        image, label = Image.open(image_path), Image.open(label_path)
        if label.mode not in ("P", "L", "I", "I;16"):
            raise ValueError(f"{label_path} holds colours (mode {label.mode}), not the numbers of classes")
        labels = table[np.asarray(label)]                                    # (height, width)
        if labels.shape != (image.height, image.width):
            raise ValueError(f"{label_path} is {label.width} x {label.height}, its picture {image.width} x {image.height}")
        return Item(image.convert("RGB"), labels, key)

    if not pairs:
        raise ValueError(f"data set {name!r} has its folders, but no picture with a label map in them")
    return Dataset(name, classes, sorted(pairs), read, str(next(iter(pairs.values()))[1].resolve().parent))


# ---------------------------------------------------------------------------- the data sets


def toy_scenes(root: Path = ROOT, name: str = "scenes", seeds: range = scenes.VAL_SEEDS[:200]) -> Dataset:
    """nano's world (nano/scenes.py), drawn when read and not from `root`; a picture's name is its seed."""
    def read(seed: str) -> Item:
        scene = scenes.draw(int(seed))
        return Item(Image.fromarray(scene.image), scene.labels, seed)
    return Dataset(name, scenes.CLASSES, [str(s) for s in seeds], read)


def voc(root: Path = ROOT, background: bool = False) -> Dataset:
    """Pascal VOC 2012 val: 1449 pictures, 20 classes, or 21 with the background as the first."""
    name, base = "voc21" if background else "voc", root / "VOCdevkit/VOC2012"
    split = base / "ImageSets/Segmentation/val.txt"
    need(name, root, "  VOCdevkit/VOC2012/JPEGImages/*.jpg\n  VOCdevkit/VOC2012/SegmentationClass/*.png "
         "(or SegmentationClassAug)\n  VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", [base / "JPEGImages", split])
    folders = [base / f for f in ("SegmentationClassAug", "SegmentationClass")]
    need(name, root, "  VOCdevkit/VOC2012/SegmentationClass/*.png", [folders[1] if not folders[0].exists() else folders[0]])
    labels = next(f for f in folders if f.exists())
    facts = FACTS["voc20"]
    return paired(name, ["background"] * background + facts["classes"], lookup(facts["source_ids"], background),
                  {n: (base / f"JPEGImages/{n}.jpg", labels / f"{n}.png") for n in split.read_text().split()})


def context(root: Path = ROOT, background: bool = False) -> Dataset:
    """Pascal Context val: 59 classes, or 60 with the background, as run-length masks in one JSON file."""
    name, base = "context60" if background else "context59", root / "VOCdevkit/VOC2010"
    need(name, root, "  VOCdevkit/VOC2010/JPEGImages/*.jpg\n  VOCdevkit/VOC2010/trainval_merged.json",
         [base / "JPEGImages", base / "trainval_merged.json"])
    merged, facts = json.loads((base / "trainval_merged.json").read_text()), FACTS["context59"]
    images = {im["image_id"]: im for im in merged["images"] if im["phase"] == "val"}
    masks: dict[int, list[dict]] = {i: [] for i in images}
    for anno in merged["annos_segmentation"]:
        if anno["image_id"] in masks:
            masks[anno["image_id"]].append(anno)
    table, by_file = lookup(facts["source_ids"], background, ignore=None), {im["file_name"]: im for im in images.values()}

    def read(file_name: str) -> Item:
        im = by_file[file_name]
        ids = np.zeros((im["height"], im["width"]), np.uint16)               # 0: no mask
        for anno in masks[im["image_id"]]:
            ids[rle.decode(anno["segmentation"]).astype(bool)] = anno["category_id"]
        return Item(Image.open(base / "JPEGImages" / file_name).convert("RGB"), table[ids], file_name)

    return Dataset(name, ["background"] * background + facts["classes"], sorted(by_file), read,
                   str(base.resolve() / "trainval_merged.json"))


def coco(root: Path = ROOT, name: str = "coco-object") -> Dataset:
    """COCO val2017, 5000 pictures: coco-object (80 things; coco-object81 with the background) or stuff27.

    NOTE(official): in the released code "background" stands in the prompt of coco-object and competes for pixels,
    though it is never scored; that is coco-object-bg here.

    Label PNGs hold fine ids: 0 to 90 things (category id - 1), 91 to 181 stuff, 255 unlabelled.
    """
    base = root / "coco"
    labels = next((f for f in (base / "stuffthingmaps/val2017", base / "annotations/val2017") if f.is_dir()),
                  base / "stuffthingmaps/val2017")
    need(name, root, "  coco/val2017/*.jpg\n  coco/stuffthingmaps/val2017/*.png", [base / "val2017", labels])
    background = name in ("coco-object81", "coco-object-bg")
    if name == "stuff27":
        classes, table = FACTS["stuff27"]["classes"], np.full(65536, IGNORE, np.uint8)
        table[:182] = FACTS["stuff27"]["coarse_of_fine"]
    else:
        classes = ["background"] * background + FACTS["coco-object"]["classes"]
        table = lookup([i - 1 for i in FACTS["coco-object"]["source_ids"]], background)
        if name == "coco-object-bg":
            table[table == 0] = IGNORE
    data = paired(name, classes, table, {p.stem: (base / f"val2017/{p.stem}.jpg", p) for p in labels.glob("*.png")})
    return replace(data, always=(0,)) if name == "coco-object-bg" else data


def ade20k(root: Path = ROOT) -> Dataset:
    """ADE20K validation: 2000 pictures, 150 classes; value 0 is unlabelled, k is class k-1."""
    base = root / "ADEChallengeData2016"
    images, labels = base / "images/validation", base / "annotations/validation"
    need("ade20k", root, "  ADEChallengeData2016/images/validation/*.jpg\n"
         "  ADEChallengeData2016/annotations/validation/*.png", [images, labels])
    facts = FACTS["ade20k"]
    return paired("ade20k", facts["classes"], lookup(facts["source_ids"]),
                  {p.stem: (images / f"{p.stem}.jpg", p) for p in labels.glob("*.png")})


def cityscapes(root: Path = ROOT) -> Dataset:
    """Cityscapes val: 500 pictures, 19 classes, from *_labelTrainIds.png where they exist, else *_labelIds.png."""
    base = root / "cityscapes"
    images, labels = base / "leftImg8bit/val", base / "gtFine/val"
    need("cityscapes", root, "  cityscapes/leftImg8bit/val/CITY/*_leftImg8bit.png\n"
         "  cityscapes/gtFine/val/CITY/*_gtFine_labelIds.png (or *_gtFine_labelTrainIds.png)", [images, labels])
    facts = FACTS["cityscapes"]
    train = sorted(labels.glob("*/*_gtFine_labelTrainIds.png"))
    ids = range(len(facts["classes"])) if train else facts["source_ids"]
    pairs = {}
    for p in train or labels.glob("*/*_gtFine_labelIds.png"):
        stem = p.name.rsplit("_gtFine_", 1)[0]
        pairs[stem] = (images / p.parent.name / f"{stem}_leftImg8bit.png", p)
    return paired("cityscapes", facts["classes"], lookup(ids), pairs)


# Neither scenes was trained on; choices such as the expert block are made on scenes-dev, numbers reported on scenes.
DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "scenes": toy_scenes,
    "scenes-dev": partial(toy_scenes, name="scenes-dev", seeds=scenes.VAL_SEEDS[5000:5100]),
    "voc": voc, "voc21": partial(voc, background=True),
    "context59": context, "context60": partial(context, background=True),
    "coco-object": coco, "coco-object81": partial(coco, name="coco-object81"),
    "coco-object-bg": partial(coco, name="coco-object-bg"),
    "stuff27": partial(coco, name="stuff27"), "ade20k": ade20k, "cityscapes": cityscapes,
}


# ---------------------------------------------------------------------------- pictures with masks to train on, Sec. 4.1


LEAST_AREA, MAX_MASKS = 0.005, 32       # of a picture's masks: share of the picture (SA-1B), how many; released code


class Pair(NamedTuple):
    image: Image.Image                  # RGB
    masks: np.ndarray                   # (K, height, width) bool, K may be 0
    names: list[str]                    # of the masks; empty where nobody named them
    caption: str


@dataclass(frozen=True)
class TrainingSet:
    name: str
    names: list[str]                    # one for each picture, in a fixed order
    read: Callable[[str], Pair]         # OSError, ValueError: a broken picture or mask file


def class_masks(labels: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """A label map (height, width) -> one mask for each class in it, (K, height, width) in class order, and their names."""
    ids = np.setdiff1d(labels, [IGNORE])                                     # (K,)
    return labels == ids[:, None, None], [classes[i] for i in ids]


def captions_of(path: Path | None) -> dict[str, str]:
    """A JSON file {image id: caption}, as the released code has for CogVLM's -> the first two sentences of each; or
    COCO's own captions_*.json -> the first caption of each picture.  Keys are numbers as text; no path: nothing."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text())
        if "annotations" in found:
            return {str(a["image_id"]): a["caption"].strip() for a in reversed(found["annotations"])}
        return {number(k): " ".join(re.split(r"(?<=[.!?])\s+", v.strip())[:2]) for k, v in found.items()}
    except (OSError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} cannot be read as captions, a JSON object {{image id: caption}}: {e}") from None


def number(stem: str) -> str:
    """"000000000009", "sa_9" and "9" are the same picture: "9"."""
    digits = stem.removeprefix("sa_").removesuffix(".jpg")
    return str(int(digits)) if digits.isdecimal() else digits


def scenes_pairs(root: Path = ROOT, captions: Path | None = None) -> TrainingSet:
    """Scenes of the toy world that nano was not trained on (its first seeds are nano's own), one mask a class."""
    if captions is not None:
        raise ValueError("the scenes caption themselves; --captions is for coco and sa1b")

    def read(seed: str) -> Pair:
        scene = scenes.draw(int(seed))
        return Pair(Image.fromarray(scene.image), *class_masks(scene.labels, scenes.CLASSES),
                    scenes.caption(scene, np.random.default_rng(int(seed))))
    return TrainingSet("scenes", [str(s) for s in scenes.TRAIN_SEEDS[100_000:200_000]], read)


def coco_pairs(root: Path = ROOT, captions: Path | None = None) -> TrainingSet:
    """COCO train2017 with COCO-Stuff's label maps: one mask for each of 171 classes.

    Captions from the file given, else from COCO's own, else the names of the classes.
    """
    base = root / "coco"
    images, labels, own = base / "train2017", base / "stuffthingmaps/train2017", base / "annotations/captions_train2017.json"
    need("coco", root, "  coco/train2017/*.jpg\n  coco/stuffthingmaps/train2017/*.png\n"
         "  coco/annotations/captions_train2017.json (or --captions FILE; else class names)", [images, labels])
    facts = FACTS["coco-stuff171"]
    told = captions_of(captions or (own if own.exists() else None))
    pairs = paired("coco", facts["classes"], lookup(facts["source_ids"]),
                   {p.stem: (images / f"{p.stem}.jpg", p) for p in labels.glob("*.png")})

    def read(stem: str) -> Pair:
        item = pairs.read(stem)
        masks, names = class_masks(item.labels, facts["classes"])
        return Pair(item.image, masks, names, told.get(number(stem), " ".join(names)))
    return TrainingSet("coco", pairs.names, read)


def sa1b_pairs(root: Path = ROOT, captions: Path | None = None) -> TrainingSet:
    """SA-1B: sa_*.jpg with a sa_*.json of run-length masks beside each, in any folders below sa1b/.

    The 32 largest masks of more than 0.5 % of the picture (released code). They have no names, and a picture without
    a caption in the file given has the empty one.
    """
    base, told = root / "sa1b", captions_of(captions)
    need("sa1b", root, "  sa1b/sa_*.jpg (or sa1b/FOLDER/sa_*.jpg)\n  sa1b/sa_*.json beside them", [base])
    images = {p.stem: p for p in sorted(base.rglob("sa_*.jpg")) if p.with_suffix(".json").exists()}
    if not images:
        raise ValueError(f"data set 'sa1b' was not found: {base} holds no sa_*.jpg with its sa_*.json beside it")

    def read(stem: str) -> Pair:
        image, found = Image.open(images[stem]), json.loads(images[stem].with_suffix(".json").read_text())
        if not isinstance(found, dict) or not all("segmentation" in a for a in found.get("annotations", [{}])):
            raise ValueError(f"{images[stem].with_suffix('.json')} holds no annotations with a segmentation each")
        area = {i: int(rle.area(a["segmentation"])) for i, a in enumerate(found["annotations"])}
        large = sorted((i for i in area if area[i] > LEAST_AREA * image.width * image.height), key=lambda i: -area[i])
        masks = [rle.decode(found["annotations"][i]["segmentation"]).astype(bool) for i in large[:MAX_MASKS]]
        stacked = np.stack(masks) if masks else np.zeros((0, image.height, image.width), bool)   # (K, height, width)
        return Pair(image.convert("RGB"), stacked, [], told.get(number(stem), ""))
    return TrainingSet("sa1b", list(images), read)


TRAINING_SETS: dict[str, Callable[[Path, Path | None], TrainingSet]] = {
    "scenes": scenes_pairs, "coco": coco_pairs, "sa1b": sa1b_pairs}

"""Data sets as (picture, label map, name) with the names of their classes.

    data = DATASETS["scenes"]()
    image, labels, name = data.read(data.names[0])
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from nano import scenes

IGNORE = 255                            # label of pixels that belong to no class and are never scored


class Item(NamedTuple):
    image: Image.Image                  # RGB
    labels: np.ndarray                  # (height, width) uint8: index into the data set's classes, or IGNORE
    name: str


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: list[str]
    names: list[str]                    # one for each picture, in a fixed order
    read: Callable[[str], Item]


def toy_scenes(name: str, seeds: range) -> Dataset:
    """nano's world (nano/scenes.py), drawn when read; the name of a picture is its seed."""
    def read(seed: str) -> Item:
        scene = scenes.draw(int(seed))
        return Item(Image.fromarray(scene.image), scene.labels, seed)
    return Dataset(name, scenes.CLASSES, [str(s) for s in seeds], read)


# Neither was trained on; choices such as the expert block are made on scenes-dev, numbers reported on scenes.
DATASETS: dict[str, Callable[[], Dataset]] = {
    "scenes": lambda: toy_scenes("scenes", scenes.VAL_SEEDS[:200]),
    "scenes-dev": lambda: toy_scenes("scenes-dev", scenes.VAL_SEEDS[5000:5100]),
}

"""Label maps in colour, legends and sheets, by hand."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from nano import scenes
from support import pictures


@pytest.mark.parametrize("n", [1, 2, 13, 20, 59, 150])
def test_palette_is_distinct(n):
    colours = pictures.palette(n)
    assert colours.shape == (n, 3) and colours.dtype == np.uint8 and len({tuple(c) for c in colours}) == n
    if n <= 20:
        apart = np.abs(colours[:, None].astype(int) - colours[None]).sum(-1) + 999 * np.eye(n, dtype=int)
        assert apart.min() >= 60                                             # a person can tell these


def test_overlay_by_hand():
    image = Image.new("RGB", (4, 2), (100, 100, 100))
    labels = np.array([[0, 0, 1, 255], [0, 1, 1, 255]])
    over = pictures.overlay(image, labels, np.array([[200, 0, 0], [0, 0, 255]], np.uint8))
    assert over.size == (4, 2)
    assert np.asarray(over)[0].tolist() == [[160, 40, 40], [160, 40, 40], [40, 40, 193], [100, 100, 100]]
    assert over.getpixel((1, 1)) == (40, 40, 193)


def test_legend_shows_every_colour():
    names = scenes.CLASSES
    colours = pictures.palette(len(names))
    narrow, wide = (pictures.legend(names, colours, width) for width in (300, 2000))
    assert narrow.width == 300 and wide.width == 2000 and narrow.height > 2 * wide.height
    for strip in (narrow, wide):
        grey = Image.new("RGB", (1, len(names)), (128, 128, 128))
        over = pictures.overlay(grey, np.arange(len(names))[:, None], colours)
        assert {over.getpixel((0, i)) for i in range(len(names))} <= {c for _, c in strip.getcolors(1 << 16)}


def test_legend_writes_out_a_long_name():
    """Cut off, it would have fewer dark pixels than where there is room."""
    def ink(width: int) -> int:
        strip = pictures.legend(["a teddy bear with a long name"], np.array([[255, 255, 255]], np.uint8), width)
        return int((np.asarray(strip.convert("L")) < 128).sum())
    assert ink(40) == ink(400)


def test_stack():
    out = pictures.stack(Image.new("RGB", (5, 2), "red"), Image.new("RGB", (3, 4), "blue"))
    assert out.size == (5, 6)
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    assert [out.getpixel(at) for at in ((4, 1), (0, 2), (2, 5), (3, 5))] == [red, blue, blue, white]


def test_tile():
    red, blue = (Image.new("RGB", (5, 2), colour) for colour in ("red", "blue"))
    out = pictures.tile([red, blue, red], 2, gap=1)
    assert out.size == (11, 5) and pictures.tile([red], 2, gap=1).size == (5, 2)
    where = {(4, 1): "red", (5, 0): "white", (6, 0): "blue", (0, 2): "white", (0, 3): "red", (6, 3): "white"}
    assert all(out.getpixel(at) == ImageColor.getrgb(colour) for at, colour in where.items())


def test_overlay_grid():
    """Picture, truth and prediction beside each other, in their order, under the title and above the legend."""
    image = Image.new("RGB", (40, 20), (100, 100, 100))
    truth, wrong = np.zeros((20, 40), np.uint8), np.ones((20, 40), np.uint8)
    grid = pictures.overlay_grid([(image, truth, truth), (image, truth, wrong), (image, wrong, truth)], ["a", "b"])
    over = [pictures.overlay(image, labels, pictures.palette(2)).getpixel((0, 0)) for labels in (truth, wrong)]
    assert grid.height > 24 + 2 * 192 and grid.width == 6 * 192 + 4 * 2 + 8
    row = [grid.getpixel((i * 194 + 90 + (6 if i > 2 else 0), 100)) for i in range(6)]
    assert row == [(100, 100, 100), over[0], over[0], (100, 100, 100), over[0], over[1]]
    assert [grid.getpixel((i * 194 + 90, 300)) for i in range(3)] == [(100, 100, 100), over[1], over[0]]

"""Label maps in colour, legends and sheets, by hand."""
import io

import numpy as np
import pytest
from PIL import Image

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
        over = pictures.overlay(Image.new("RGB", (1, len(names)), (128, 128, 128)), np.arange(len(names))[:, None], colours)
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


def test_small_files():
    """A notebook's copy: narrower, never wider, colours kept in JPEG and exact in a plot of few colours."""
    red = Image.new("RGBA", (600, 300), (200, 30, 30, 255))
    photo, plot = (Image.open(io.BytesIO(pictures.small(red, 300, p))) for p in (False, True))
    assert (photo.format, photo.size, plot.format) == ("JPEG", (300, 150), "PNG")
    assert np.abs(np.subtract(photo.getpixel((9, 9)), (200, 30, 30))).max() < 6
    assert plot.convert("RGB").getpixel((9, 9)) == (200, 30, 30)
    assert Image.open(io.BytesIO(pictures.small(red, 900))).size == (600, 300)

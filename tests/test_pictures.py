"""Label maps in colour, legends and sheets, by hand; files that are no pictures."""
import os

import numpy as np
import pytest
from PIL import Image, ImageColor

from nano import scenes
from support import files, pictures
from support.files import Broken


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


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_picture_of_infinite_values_is_none(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "a.tif")
    for read in (pictures.open_image, files.open_stored):
        with pytest.raises(Broken, match="a.tif.*not finite"):
            read(tmp_path / "a.tif")


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(Broken, match="a.png"):
        pictures.open_image(tmp_path / "a.png")


def test_whatever_a_decoder_raises_is_a_sentence(tmp_path):
    """PIL's of AVIF raises RuntimeErrors, that of SPIDER an AttributeError."""
    avif = tmp_path / "a.avif"
    Image.new("RGB", (40, 30)).save(avif)
    avif.write_bytes(avif.read_bytes().replace(b"iloc", b"ilok"))
    spider = tmp_path / "a.spider"
    Image.new("F", (40, 30)).save(spider, "SPIDER")
    content = bytearray(spider.read_bytes())
    content[26 * 4:27 * 4] = np.float32(1).tobytes()     # the first picture of a stack, of which there is none
    spider.write_bytes(content)
    for path in (avif, spider):
        for read in (pictures.open_image, files.open_stored):
            with pytest.raises(Broken, match=path.name):
                read(path)


def test_a_turn_that_is_written_in_a_broken_way(tmp_path):
    """A person's picture is refused; that of a data set is not turned, and its pixels are good."""
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png", exif=b"Exif\0\0II*\0\xff")
    with pytest.raises(Broken, match="a.png"):
        pictures.open_image(tmp_path / "a.png")
    assert files.open_stored(tmp_path / "a.png").size == (4, 3)


@pytest.mark.parametrize("ending", ["", ".txt", ".xbm", ".msp", ".palm", ".blp", ".h5", ".wmf", ".psd"])
def test_check_out_refuses_what_cannot_be_written(tmp_path, ending):
    with pytest.raises(ValueError, match="picture format"):
        pictures.check_out(tmp_path / f"a{ending}")


@pytest.mark.parametrize("ending", [".png", ".PNG", ".jpg", ".gif", ".tif", ".webp", ".pdf", ".bmp"])
def test_check_out_takes_what_can_be_written(tmp_path, ending):
    pictures.check_out(tmp_path / f"a{ending}")

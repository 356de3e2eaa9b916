"""Pictures to look at: label maps in colour, legends, sheets.  Plots are made where their numbers are."""
import colorsys
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from support.data import Item
from support.metrics import IGNORE

SHOWN = (512, 1024)                     # least and most pixels of the longer side of a picture of one's own


# 19 colours that are easily told apart; the first 15 suit the toy world (sky, sunset, night, grass, sand, water, snow, ...)
DISTINCT = ("42d4f4 fabed4 000075 3cb44b ffe119 4363d8 dcbeff e6194b 9a6324 bfef45 f58231 469990 f032e6 800000 911eb4 "
            "aaffc3 808000 ffd8b1 a9a9a9").split()
STRENGTH = 0.6                          # of a label's colour over the grey picture


def palette(n: int) -> np.ndarray:
    """n colours, (n, 3) uint8. More than DISTINCT has: hues a golden section apart, so that neighbours differ most, in
    three strengths."""
    if n <= len(DISTINCT):
        return np.array([list(bytes.fromhex(x)) for x in DISTINCT[:n]], np.uint8).reshape(n, 3)
    strengths = [(0.55, 1.0), (0.85, 0.9), (0.8, 0.6)]                        # saturation, value
    rgb = [colorsys.hsv_to_rgb((0.57 + 0.618034 * i) % 1, *strengths[i % 3]) for i in range(n)]
    return np.array([[round(255 * c) for c in x] for x in rgb], np.uint8)


def overlay(image: Image.Image, labels: np.ndarray, colours: np.ndarray) -> Image.Image:
    """The picture, greyed, under its label map in colour; label IGNORE stays uncoloured."""
    grey = np.asarray(image.convert("L").convert("RGB"), float)
    table = np.concatenate([colours, np.zeros((256 - len(colours), 3), np.uint8)])
    mixed = np.where((labels == IGNORE)[..., None], grey, (1 - STRENGTH) * grey + STRENGTH * table[labels])
    return Image.fromarray(mixed.astype(np.uint8))


def legend(names: Sequence[str], colours: np.ndarray, width: int) -> Image.Image:
    """Colour patches with their names, as many to a row as fit into `width` pixels; each as it is over middle grey."""
    font = ImageFont.load_default(14)
    rows, x, widest = [[]], 0, width
    for name, colour in zip(names, colours):
        w = 34 + int(font.getlength(name))
        if x + w > width and rows[-1]:
            rows.append([])
            x = 0
        rows[-1].append((x, name, tuple(int(STRENGTH * c + (1 - STRENGTH) * 128) for c in colour)))
        x += w
        widest = max(widest, x)
    strip = Image.new("RGB", (widest, 22 * len(rows) + 4), "white")
    pen = ImageDraw.Draw(strip)
    for i, row in enumerate(rows):
        for x, name, colour in row:
            pen.rectangle([x + 4, 22 * i + 5, x + 18, 22 * i + 19], fill=colour, outline="black")
            pen.text((x + 23, 22 * i + 3), name, fill="black", font=font)
    return strip


def sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 4, side: int | None = None
          ) -> Image.Image:
    """Pictures of one size in rows, each above its caption, wrapped to the picture's width.

    side: height of a picture; without it as they are, but no smaller than captions need.
    """
    font, zoom = ImageFont.load_default(13), side / images[0].height if side else max(1.0, 192 / images[0].height)
    w, h = round(zoom * images[0].width), round(zoom * images[0].height)
    wrapped = []
    for caption in captions:
        lines = [""]
        for word in caption.split():
            if font.getlength(f"{lines[-1]} {word}") > w - 6 and lines[-1]:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        wrapped.append("\n".join(lines))
    cell_h = h + 18 * max(x.count("\n") + 1 for x in wrapped) + 8
    columns = min(columns, len(images))
    out = Image.new("RGB", (columns * (w + 6), -(-len(images) // columns) * cell_h), "white")
    for i, (image, caption) in enumerate(zip(images, wrapped)):
        x, y = i % columns * (w + 6), i // columns * cell_h
        out.paste(image.resize((w, h), Image.Resampling.BICUBIC), (x, y))
        ImageDraw.Draw(out).multiline_text((x + 2, y + h + 2), caption, fill="black", font=font)
    return out


def stack(*rows: Image.Image) -> Image.Image:
    """Pictures below each other on white."""
    out = Image.new("RGB", (max(r.width for r in rows), sum(r.height for r in rows)), "white")
    for i, row in enumerate(rows):
        out.paste(row, (0, sum(r.height for r in rows[:i])))
    return out


def panels(image: Image.Image, labels: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A picture beside its label map, above the legend; the longer side brought into SHOWN, so that it can be read."""
    colours, longest = palette(len(classes)), max(image.size)
    shown = min(max(longest, SHOWN[0]), SHOWN[1])
    width, height = (max(1, round(x * shown / longest)) for x in image.size)
    pair = Image.new("RGB", (2 * width + 4, height), "white")
    for i, x in enumerate([image, overlay(image, labels, colours)]):
        pair.paste(x.resize((width, height), Image.Resampling.BILINEAR), (i * (width + 4), 0))
    return stack(pair, legend(classes, colours, pair.width))


def overlay_grid(shown: list[tuple[Item, np.ndarray]], classes: list[str], side: int = 192) -> Image.Image:
    """picture | truth | prediction, two pictures to a row, with a legend."""
    colours = palette(len(classes))
    cells = []
    for item, pred in shown:
        cell = Image.new("RGB", (3 * side + 12, side + 6), "white")
        for j, x in enumerate([item.image, overlay(item.image, item.labels, colours),
                               overlay(item.image, pred, colours)]):
            cell.paste(x.resize((side, side), Image.Resampling.BILINEAR), (j * (side + 2), 0))
        cells.append(cell)
    columns = min(2, len(cells))
    grid = Image.new("RGB", (columns * cells[0].width, -(-len(cells) // columns) * cells[0].height), "white")
    for i, cell in enumerate(cells):
        grid.paste(cell, (i % columns * cell.width, i // columns * cell.height))
    title = Image.new("RGB", (grid.width, 24), "white")
    ImageDraw.Draw(title).text((2, 3), "picture | truth | prediction", fill="black", font=ImageFont.load_default(14))
    return stack(title, grid, legend(classes, colours, grid.width))


def check_out(path: Path) -> None:
    """ValueError now, not after the work, if a picture cannot be written to `path`."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:             # some can only be read
        raise ValueError(f"--out {path} should end in .png, .jpg or another picture format")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"--out {path} cannot be written: its folder must exist and be writable")


def small(picture: Image.Image, width: int, plot: bool = False) -> bytes:
    """A picture as a file small enough for a notebook, at most `width` wide: JPEG, or PNG of 128 colours for a plot."""
    picture = picture.convert("RGB")
    picture.thumbnail((width, 10 * width))
    (picture.quantize(128) if plot else picture).save(file := io.BytesIO(), "PNG" if plot else "JPEG", quality=82)
    return file.getvalue()


def open_image(path: str | Path) -> Image.Image:
    """Any file PIL reads -> RGB, the way a person sees it: turned upright, transparency on white.

    ValueError: no such file, not a picture.
    """
    try:
        image = Image.open(path)
        image.load()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise ValueError(f"no picture can be opened at {str(path)!r}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"{str(path)!r} is not a picture that PIL can read: {e}") from None
    if image.mode[0] in "IF":                            # 16 or 32 bits, or floats: convert() would clip at 255
        x = np.nan_to_num(np.asarray(image, float)).clip(0)
        top = next((t for t in (1, 255, 65535) if x.max() <= t and (t > 1 or image.mode == "F")), x.max())
        image = Image.fromarray((255 * x / top).round().astype(np.uint8))
    rgba = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")

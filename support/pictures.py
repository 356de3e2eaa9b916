"""Pictures from files, and pictures to look at: label maps in colour, legends, sheets.

Plots are made where their numbers are.
"""
import colorsys
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from support.files import decoded, decoding
from support.metrics import IGNORE

SHOWN = (512, 1024)                     # `panels` brings the longer side of a picture between these, in pixels
# 19 colours that a person can tell apart; the first 15 suit the toy world (sky, sunset, night, grass, sand, ...)
DISTINCT = np.frombuffer(bytes.fromhex(
    "42d4f4 fabed4 000075 3cb44b ffe119 4363d8 dcbeff e6194b 9a6324 bfef45 f58231 469990 f032e6 800000 911eb4 aaffc3 "
    "808000 ffd8b1 a9a9a9"), np.uint8).reshape(-1, 3)    # (19, 3)
STRENGTH = 0.6                          # of a label's colour over the grey picture


def to_image(x):
    """(3, height, width) in [-1, 1], as the autoencoder decodes it -> a picture."""
    pixels = (127.5 * (x.float() + 1)).clamp(0, 255).round().byte()          # (3, height, width)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def palette(n):
    """n colours, (n, 3) uint8.

    More than DISTINCT has: hues a golden section apart, so that neighbours differ most, in three strengths.
    """
    if n <= len(DISTINCT):
        return DISTINCT[:n]
    strengths = [(0.55, 1.0), (0.85, 0.9), (0.8, 0.6)]                       # saturation, value
    rgb = [colorsys.hsv_to_rgb((0.57 + 0.618034 * i) % 1, *strengths[i % 3]) for i in range(n)]
    return (255 * np.array(rgb)).round().astype(np.uint8)                    # (n, 3)


def overlay(image, labels, colours):
    """The picture, greyed, under its label map (height, width) in colour; label IGNORE stays uncoloured."""
    grey = np.asarray(image.convert("L").convert("RGB"), float)              # (height, width, 3)
    ignored = labels == IGNORE
    colour = colours[np.where(ignored, 0, labels)]                           # (height, width, 3)
    mixed = np.where(ignored[..., None], grey, (1 - STRENGTH) * grey + STRENGTH * colour)
    return Image.fromarray(mixed.astype(np.uint8))


def legend(names, colours, width):
    """Colour patches with their names, as many to a row as fit into `width` pixels; each as it is over middle grey."""
    font = ImageFont.load_default(14)
    x = y = 0
    widest = width
    corners = []
    for name in names:
        room = 34 + int(font.getlength(name))
        if x > 0 and x + room > width:
            x = 0
            y += 22
        corners.append((x, y))
        x += room
        widest = max(widest, x)
    strip = Image.new("RGB", (widest, y + 26), "white")
    pen = ImageDraw.Draw(strip)
    over_grey = (STRENGTH * colours + (1 - STRENGTH) * 128).astype(int)      # (K, 3)
    for (x, y), name, colour in zip(corners, names, over_grey):
        pen.rectangle([x + 4, y + 5, x + 18, y + 19], fill=tuple(colour), outline="black")
        pen.text((x + 23, y + 3), name, fill="black", font=font)
    return strip


def tile(pictures, columns, gap=0):
    """Pictures of one size in rows of `columns` at most, with `gap` pixels of white between them."""
    columns = min(columns, len(pictures))
    w = pictures[0].width + gap
    h = pictures[0].height + gap
    out = Image.new("RGB", (columns * w - gap, math.ceil(len(pictures) / columns) * h - gap), "white")
    for i, picture in enumerate(pictures):
        out.paste(picture, (i % columns * w, i // columns * h))
    return out


def stack(*rows):
    """Pictures below each other on white."""
    out = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    y = 0
    for row in rows:
        out.paste(row, (0, y))
        y += row.height
    return out


def wrap(caption, font, width):
    """A caption with line ends where it would be wider than `width` pixels."""
    lines = [""]
    for word in caption.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def sheet(images, captions, columns=4, side=None):
    """Pictures of one size in rows, each above its caption, wrapped to the picture's width.

    side: height of a picture; without it as they are, but no smaller than captions need.
    """
    font = ImageFont.load_default(13)
    zoom = (side or max(192, images[0].height)) / images[0].height
    w = round(zoom * images[0].width)
    h = round(zoom * images[0].height)
    wrapped = [wrap(caption, font, w - 6) for caption in captions]
    lines = max(caption.count("\n") + 1 for caption in wrapped)
    cells = []
    for image, caption in zip(images, wrapped):
        cell = ImageOps.expand(image.resize((w, h), Image.Resampling.BICUBIC), (0, 0, 6, 18 * lines + 8), "white")
        ImageDraw.Draw(cell).multiline_text((2, h + 2), caption, fill="black", font=font)
        cells.append(cell)
    return tile(cells, columns)


def panels(image, labels, classes):
    """A picture beside its label map, above the legend; the longer side brought into SHOWN, so that it can be read."""
    colours = palette(len(classes))
    longest = max(image.size)
    shown = min(max(longest, SHOWN[0]), SHOWN[1])
    size = [max(1, round(x * shown / longest)) for x in image.size]
    pair = [x.resize(size, Image.Resampling.BILINEAR) for x in (image, overlay(image, labels, colours))]
    both = tile(pair, 2, gap=4)
    return stack(both, legend(classes, colours, both.width))


def overlay_grid(shown, classes):
    """Triples of picture, truth and prediction in squares side by side, two triples to a row, above the legend."""
    colours = palette(len(classes))
    cells = []
    for image, truth, prediction in shown:
        triple = [image, overlay(image, truth, colours), overlay(image, prediction, colours)]
        cells.append(tile([x.resize((192, 192), Image.Resampling.BILINEAR) for x in triple], 3, gap=2))
    grid = tile(cells, 2, gap=8)
    title = Image.new("RGB", (grid.width, 24), "white")
    ImageDraw.Draw(title).text((2, 3), "picture | truth | prediction", fill="black", font=ImageFont.load_default(14))
    return stack(title, grid, legend(classes, colours, grid.width))


def check_out(path):
    """ValueError now, not after the work, if a picture cannot be written to `path`."""
    try:                                                 # some formats can only be read, some take no colours
        Image.new("RGB", (16, 16)).save(io.BytesIO(), Image.registered_extensions()[path.suffix.lower()])
    except (LookupError, OSError, ValueError):
        raise ValueError(f"--out {path} should end in .png, .jpg or another picture format") from None
    if len(os.fsencode(path.name)) > 200:                # a file system takes 255, and we write beside it first
        raise ValueError(f"--out {path.name[:40]}... is too long a name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise ValueError(f"--out {path} cannot be written: its folder must exist and be writable")


# ---------------------------------------------------------------------------- files from outside


def open_image(path: str | Path) -> Image.Image:
    """A picture file -> RGB, the way a person sees it: turned upright, transparency on white.

    files.Broken: see decoded.
    """
    image = decoded(path, "picture")
    if image.mode[0] in "IF":                            # 16 or 32 bits, or floats: convert() would clip at 255
        x = np.asarray(image, float).clip(0)
        white = x.max()                                  # the value that is shown white: the next usual one
        for usual in (65535, 255, 1) if image.mode == "F" else (65535, 255):
            if x.max() <= usual:
                white = usual
        image = Image.fromarray((255 * x / white).round().astype(np.uint8))
    with decoding(path, "picture"):                       # how it is to be turned can be written in a broken way
        rgba = ImageOps.exif_transpose(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")

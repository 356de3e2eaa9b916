"""The toy world that nano is trained on: procedurally drawn scenes with exact masks and captions.

Seven kinds of stuff fill the picture (sky, sunset or night above, one or two grounds below); one or two
things stand in front of it, each kind in a pattern of its own. A thing's class, colour and size are drawn
independently of each other, so they can only be known from the picture or from the caption; no class is in
every picture, so every name tells something. Everything follows from the seed alone.

    python nano/scenes.py --out scenes.png          # a sheet of scenes with their masks and captions
"""
import argparse
import colorsys
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":                     # Ctrl-C is answered while packages are imported, too
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (214, 48, 49), "orange": (240, 132, 28), "yellow": (246, 210, 50),
           "green": (52, 160, 72), "blue": (44, 92, 214), "purple": (138, 62, 184)}
SKIES = {"sky": ((92, 160, 236), (190, 224, 250)), "sunset": ((226, 130, 168), (252, 216, 196)),
         "night": ((20, 24, 62), (62, 68, 124))}
GROUNDS = {"grass": (118, 178, 74), "sand": (228, 202, 142), "water": (54, 132, 170), "snow": (238, 243, 250)}
# what a thing's kind adds to the named colour: the colour of the pattern and how much of it, 0 to 1, at x to the right
# of and y above the foot, in units of the picture's width
PATTERNS = {
    "car": ((240, 242, 246), lambda x, y: bars(8 * (x + y))),                                 # slanted stripes
    "house": ((60, 44, 40), lambda x, y: bars(14 * y, 0.4)),                                  # tiles in rows
    "tree": ((24, 56, 32), lambda x, y: bars(9 * x) * bars(9 * y)),                           # leaves
    "boat": ((250, 250, 246), lambda x, y: bars(10 * y, 0.45)),                               # stripes along
    "mushroom": ((248, 240, 220), lambda x, y: bars(6 * (x + y)) * bars(6 * (x - y))),        # dots
    "flower": ((255, 232, 240), lambda x, y: bars(24 * np.hypot(x, y - 0.34), 0.5)),          # rings
    "teddy bear": ((104, 66, 36), lambda x, y: 1 - bars(8 * (x + y), 0.8) * bars(8 * (x - y), 0.8)),   # fur
    "air balloon": ((250, 236, 190), lambda x, y: bars(8 * x, 0.5)),                          # panels
}
STUFF = [*SKIES, *GROUNDS]
THINGS = [*PATTERNS]
CLASSES = STUFF + THINGS                       # label map value = index in this list; every pixel has one
CLOUD = 2.6                                    # radii within which a cloud is seen: exp(-2.6^4) is below 1e-19
SIDE = 128                                     # pixels; drawn at twice that, then shrunk, for smooth edges
TRAIN_SEEDS = range(1_000_000, 2_000_000)
VAL_SEEDS = range(10_000)                      # disjoint from TRAIN_SEEDS


class Thing(NamedTuple):
    name: str
    colour: str
    size: str                                  # "big" or "small"
    x: float                                   # centre, as a share of the picture's width


class Scene(NamedTuple):
    image: np.ndarray                          # (SIDE, SIDE, 3) uint8
    labels: np.ndarray                         # (SIDE, SIDE) uint8, index into CLASSES
    stuff: list[str]                           # top to bottom
    things: list[Thing]                        # left to right


def shade(rgb: tuple, k: float) -> tuple:
    """rgb made darker (k < 1) or lighter (k > 1) in value, clipped to the colour cube."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(h, s if k <= 1 else s / k, min(1.0, v * k)))


def window(yy: np.ndarray, xx: np.ndarray, y: float, x: float, up: float, across: float) -> tuple[slice, slice]:
    """Rows and columns of the grids that are at most so far from a point: what is drawn there need not see the rest."""
    rows = np.searchsorted(yy[:, 0], (y - up, y + up))
    columns = np.searchsorted(xx[0], (x - across, x + across))
    return slice(*rows), slice(*columns)


def paint_sky(yy: np.ndarray, xx: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """Vertical gradient with soft clouds, or with stars by night.  (Y, X) grids in [0, 1] -> (Y, X, 3)."""
    top, low = np.array(SKIES[name], float)
    sky = top + (low - top) * np.clip(yy / 0.6, 0, 1)[..., None]         # (Y, X, 3)
    if name == "night":
        for x, y in rng.uniform(0, 1, (40, 2)):
            part = window(yy, xx, 0.6 * y, x, 0.01, 0.01)
            sky[part][(xx[part] - x) ** 2 + (yy[part] - 0.6 * y) ** 2 < 9e-5] = 235
        return sky
    for x, y, r in zip(rng.uniform(0, 1, 3), rng.uniform(0.05, 0.3, 3), rng.uniform(0.08, 0.16, 3)):
        part = window(yy, xx, y, x, 0.35 * r * CLOUD, r * CLOUD)         # beyond it a cloud changes no number
        cloud = np.exp(-(((xx[part] - x) / r) ** 2 + ((yy[part] - y) / (0.35 * r)) ** 2) ** 2)[..., None]
        sky[part] += (np.array([250.0, 250, 252]) - sky[part]) * 0.75 * cloud
    return sky


def bars(t: np.ndarray, width: float = 0.6) -> np.ndarray:
    """Soft-edged stripes, one to each unit of t, this share of it wide.  Values in [0, 1]."""
    return np.clip(3 * (np.cos(2 * np.pi * t) - np.cos(np.pi * width)) + 0.5, 0, 1)


def paint_ground(yy: np.ndarray, xx: np.ndarray, name: str, rng: np.random.Generator) -> np.ndarray:
    """One flat colour under a texture of its own: stripes, dunes, waves or drifts.  (Y, X) -> (Y, X, 3)."""
    p = rng.uniform(0, 2 * np.pi, 3)
    base = np.array(GROUNDS[name], float)
    if name == "grass":                        # upright blades
        t = 16 * np.sin(2 * np.pi * 24 * xx + 3 * np.sin(2 * np.pi * 9 * yy + p[0]) + p[1])
    elif name == "sand":                       # slanted ripples
        t = 10 * np.sin(2 * np.pi * (5 * xx + 12 * yy) + 1.5 * np.sin(2 * np.pi * 2 * xx + p[0]))
    elif name == "water":                      # level waves, wide in front
        t = 22 * np.sin(2 * np.pi * 13 * yy + 1.2 * np.sin(2 * np.pi * 3 * xx + p[0]))
    else:                                      # snow: wide soft drifts
        t = 9 * np.sin(2 * np.pi * (2 * xx + p[0]) + 4 * np.sin(2 * np.pi * 1.5 * yy + p[1]))
    light = (1.0, 1.0, 0.5) if name == "snow" else (1.0, 1.0, 1.0)      # drifts have blue shadows
    return base * rng.uniform(0.93, 1.04) + t[..., None] * np.array(light)


def paint_thing(image: Image.Image, labels: Image.Image, name: str, rgb: tuple,
                cx: float, base: float, s: float) -> None:
    """Draw one thing of height s (pixels) standing on y = base around x = cx, and the same shapes into
    the label picture. Few, bold parts; what has the named colour gets its kind's pattern."""
    dark = shade(rgb, 0.68)
    lite = shade(rgb, 1.35)
    brown = (112, 74, 46)
    cream = (244, 232, 208)
    coat = Image.new("L", image.size)          # where the named colour is seen
    pens = [ImageDraw.Draw(im) for im in (image, labels, coat)]

    def fills(fill):
        return fill, CLASSES.index(name), 255 * (fill in (rgb, dark, lite))

    def pts(*xy):                              # relative to the foot, y upwards, in units of s
        return [(cx + x * s, base - y * s) for x, y in xy]

    def ellipse(x0, y0, x1, y1, fill):
        for pen, f in zip(pens, fills(fill)):
            pen.ellipse([*pts((x0, y1))[0], *pts((x1, y0))[0]], fill=f)

    def poly(fill, *xy):
        for pen, f in zip(pens, fills(fill)):
            pen.polygon(pts(*xy), fill=f)

    def rect(x0, y0, x1, y1, fill):
        poly(fill, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    if name == "car":
        poly(rgb, (-.42, .36), (-.26, .68), (.24, .68), (.42, .36))
        rect(-.72, .12, .72, .40, rgb)
        poly((206, 232, 246), (-.30, .40), (-.20, .61), (-.03, .61), (-.03, .40))
        poly((206, 232, 246), (.03, .40), (.03, .61), (.19, .61), (.29, .40))
        for x in (-.42, .42):
            ellipse(x - .17, 0, x + .17, .34, (34, 34, 40))
            ellipse(x - .07, .10, x + .07, .24, (190, 190, 196))
    elif name == "house":
        rect(-.42, 0, .42, .58, cream)
        poly(rgb, (-.56, .55), (0, 1.0), (.56, .55))
        rect(-.10, 0, .12, .34, dark)
        for x in (-.33, .20):
            rect(x, .28, x + .14, .45, (110, 170, 214))
    elif name == "tree":
        rect(-.08, 0, .08, .45, brown)
        ellipse(-.36, .28, .36, .78, dark)
        ellipse(-.29, .46, .29, 1.0, rgb)
    elif name == "boat":
        poly(brown, (-.52, .26), (.52, .26), (.36, 0), (-.36, 0))
        rect(-.025, .2, .025, 1.0, (70, 50, 36))
        poly(rgb, (.05, .98), (.05, .33), (.48, .33))
        poly(lite, (-.05, .86), (-.05, .33), (-.38, .33))
    elif name == "mushroom":
        poly(cream, (-.14, 0), (.14, 0), (.11, .5), (-.11, .5))
        for pen, f in zip(pens, fills(rgb)):
            pen.pieslice([*pts((-.5, 1.0))[0], *pts((.5, .0))[0]], 180, 360, fill=f)
    elif name == "flower":
        rect(-.04, 0, .04, .5, (44, 120, 50))
        poly((44, 120, 50), (0, .08), (.3, .3), (.04, .28))
        poly((44, 120, 50), (0, .08), (-.3, .3), (-.04, .28))
        for a in np.arange(6) * np.pi / 3:
            x = .2 * np.cos(a)
            y = .68 + .2 * np.sin(a)
            ellipse(x - .15, y - .15, x + .15, y + .15, rgb)
        ellipse(-.12, .56, .12, .80, (92, 54, 30))
    elif name == "teddy bear":
        for x in (-.2, .2):
            ellipse(x - .11, .80, x + .11, 1.0, dark)
            ellipse(x * 1.1 - .14, 0, x * 1.1 + .14, .26, dark)
            ellipse(x * 1.55 - .11, .26, x * 1.55 + .11, .50, dark)
        ellipse(-.28, .06, .28, .58, rgb)
        ellipse(-.28, .46, .28, .96, rgb)
        ellipse(-.14, .50, .14, .70, cream)
        for x in (-.11, .11):
            ellipse(x - .035, .74, x + .035, .81, (24, 20, 20))
        ellipse(-.045, .61, .045, .68, (24, 20, 20))
    else:                                      # air balloon
        poly((120, 96, 70), (-.14, .26), (.14, .26), (.07, .12), (-.07, .12))
        ellipse(-.36, .24, .36, 1.0, rgb)
        rect(-.09, 0, .09, .13, brown)
    pattern, where = PATTERNS[name]
    box = coat.getbbox()                       # elsewhere the pattern is not seen
    yy, xx = np.mgrid[box[1]:box[3], box[0]:box[2]] / image.width
    spots = 0.6 * np.asarray(coat.crop(box)) * where(xx - cx / image.width, base / image.width - yy)
    image.paste(pattern, box, Image.fromarray(spots.astype(np.uint8)))


def draw(seed: int, side: int = SIDE) -> Scene:
    """The scene of one seed: image, label map and the facts a caption is made of."""
    rng = np.random.default_rng(seed)
    big = 2 * side
    yy, xx = np.mgrid[0:big, 0:big] / big
    # stuff: one kind of sky over one or two grounds, with gently curved borders
    sky = str(rng.choice(list(SKIES)))
    grounds = list(rng.choice(list(GROUNDS), size=1 + int(rng.random() < 0.45), replace=False))
    horizon = rng.uniform(0.36, 0.56)
    edges = [horizon] if len(grounds) == 1 else [horizon, horizon + rng.uniform(0.17, 0.26)]
    canvas = paint_sky(yy, xx, sky, rng)                                 # (big, big, 3)
    ids = np.full((big, big), CLASSES.index(sky), np.uint8)
    for name, edge in zip(grounds, edges):
        line = edge + rng.uniform(0.0, 0.03) * np.sin(2 * np.pi * rng.uniform(0.4, 1.2) * xx + rng.uniform(0, 6.3))
        below = yy > line
        first = below.any(1).argmax()          # rows above it show none of this ground
        canvas[first:][below[first:]] = paint_ground(yy[first:], xx[first:], name, rng)[below[first:]]
        ids[below] = CLASSES.index(name)
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    labels = Image.fromarray(ids)
    # things: one in each of n columns, far ones first so that near ones cover them
    n = int(rng.choice([1, 2], p=[0.4, 0.6]))
    placed = []                                # (foot, thing, height)
    for col, name in zip(rng.permutation(n), rng.choice(THINGS, size=n, replace=False)):
        size = str(rng.choice(["big", "small"]))
        colour = str(rng.choice(list(COLOURS)))
        s = {"big": rng.uniform(0.56, 0.68), "small": rng.uniform(0.38, 0.46)}[size] * (0.8 if name == "car" else 1.0)
        cx = (col + rng.uniform(0.35, 0.65)) / n
        base = rng.uniform(max(horizon + 0.08, s + 0.01), 0.97)          # whole, and on the ground
        if name == "air balloon":              # in the air: its foot may hang above the horizon
            base = rng.uniform(s + 0.02, max(s + 0.03, horizon + 0.1))
        placed.append((base, Thing(str(name), colour, size, float(cx)), s))
    for base, thing, s in sorted(placed, key=lambda t: t[0]):
        rgb = tuple(int(c) for c in np.clip(np.array(COLOURS[thing.colour]) + rng.normal(0, 7, 3), 0, 255))
        paint_thing(image, labels, thing.name, rgb, thing.x * big, base * big, s * big)
    ids = np.asarray(labels)[1::2, 1::2].copy()                          # (side, side)
    things = sorted((thing for _, thing, _ in placed), key=lambda t: t.x)
    stuff = [name for name in [sky, *map(str, grounds)] if (ids == CLASSES.index(name)).any()]
    return Scene(np.asarray(image.resize((side, side), Image.Resampling.BOX)), ids, stuff, things)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption of a scene, drawn from its facts: half of them class lists as Seg4Diff prompts them
    ("red car sky grass"), half sentences; sizes and colours are named or left out at random."""
    if rng.random() < 0.5:
        colours = rng.random() < 0.5
        items = [f"{t.colour} {t.name}" if colours else t.name for t in scene.things]
        items += scene.stuff
        return " ".join(items[i] for i in rng.permutation(len(items)))

    def noun(t):
        size = f"{t.size} " if rng.random() < 0.5 else ""
        colour = f"{t.colour} " if rng.random() < 0.8 else ""
        return f"a {size}{colour}{t.name}"

    things = scene.things
    if len(things) < 2 or rng.random() >= 0.6:
        sentence = " and ".join(noun(things[i]) for i in rng.permutation(len(things)))
    elif rng.random() < 0.5:
        sentence = f"{noun(things[0])} left of {noun(things[1])}"
    else:
        sentence = f"{noun(things[1])} right of {noun(things[0])}"
    sentence += " with " + " and ".join(name for name in scene.stuff if name not in SKIES)
    for sky in scene.stuff:
        if sky in SKIES:
            sentence += f" under the {sky}"
    return sentence


def words() -> list[str]:
    """Every word a caption can hold, and a few that none does (photo, on, above); nano's tokenizer is made of them."""
    sentence = "a and with under the left right of big small an on in above below next to photo"
    return sorted(set(" ".join([*CLASSES, *COLOURS, sentence]).split()))


def main(args: argparse.Namespace) -> None:
    from support import cli, files, pictures  # not above: nothing that draws a scene needs them

    pictures.check_out(args.out)
    colours = pictures.palette(len(CLASSES))
    cells = []
    captions = []
    for seed in VAL_SEEDS[args.first:args.first + 12]:
        scene = draw(seed)
        image = Image.fromarray(scene.image)
        cells.append(Image.fromarray(np.concatenate([image, pictures.overlay(image, scene.labels, colours)], axis=1)))
        captions.append(caption(scene, np.random.default_rng(seed)))
    sheet = pictures.sheet(cells, captions, columns=3)
    files.write_picture(args.out, pictures.stack(sheet, pictures.legend(CLASSES, colours, sheet.width)))
    cli.show(f"wrote {args.out}")


if __name__ == "__main__":
    from support.cli import Parser, at_least, command

    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("scenes.png"))
    parser.add_argument("--first", type=at_least(0, most=len(VAL_SEEDS) - 1), default=0,
                        help="first validation scene of the sheet")
    command(main, parser)

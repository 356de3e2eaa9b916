"""A judge of nano's pictures that shares no weight with nano: what is there, in which colour, and where.

A small CNN says of a picture which kinds of stuff and of things it shows, and of each thing its colour and place.
A caption claims some of that; a verdict is the share of its claims that hold.

    python nano/judge.py --check                         # how far it can be trusted; nano/judge.md
    judge = load()
    verdict(look(judge, [image])[0], claims("a red car left of a boat with grass under the sky"))

nano/train_judge.py trains it, nano/check_judge.py compares it with the truth and with the eye.
"""
import argparse
import hashlib
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
if __name__ == "__main__":                               # Ctrl-C is answered while PyTorch is imported, too
    from support import ctrl_c
    ctrl_c.answer_early()

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from nano.scenes import CLASSES, COLOURS, SIDE, STUFF, THINGS, Scene  # noqa: E402
from support.checkpoint import assign  # noqa: E402
from support.cli import Parser, command  # noqa: E402
from support.files import code_stamp, decoding  # noqa: E402

FILE = Path(__file__).with_name("judge.safetensors")
THERE = 0.5                             # the least probability of what counts as there
WIDTHS = (16, 32, 64, 80)               # channels after each halving: 128 pixels become 8 x 8 cells
GROUPS = 8                              # of the group norms
BATCH = 50                              # pictures that are looked at together

# ---------------------------------------------------------------------------- the network


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.norm1(x).relu())
        return x + self.conv2(self.norm2(y).relu())


class Answers(NamedTuple):
    there: Tensor                       # (B, K) logits, one for each of CLASSES
    colour: Tensor                      # (B, things, colours) logits
    x: Tensor                           # (B, things) in [0, 1]: the centre, as a share of the picture's width


class Judge(nn.Module):
    """Convolutions down to a grid of cells; then each class attends to the cells where it is seen.

    What a class's attention gathers says whether it is there and, of a thing, in which colour.  The attention's mean
    column is the thing's place.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        downs = []
        blocks = []
        for before, width in zip(widths, widths[1:]):
            downs.append(nn.Conv2d(before, width, 4, stride=2, padding=1))
            blocks.append(Residual(width))
        self.downs = nn.ModuleList(downs)
        self.blocks = nn.ModuleList(blocks)
        self.last = Residual(widths[-1])
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.where = nn.Conv2d(widths[-1], len(CLASSES), 1)
        self.there = nn.Parameter(torch.zeros(len(CLASSES), widths[-1]))
        self.bias = nn.Parameter(torch.zeros(len(CLASSES)))
        self.colour = nn.Linear(widths[-1], len(COLOURS))

    @classmethod
    def from_state_dict(cls, sd: dict[str, Tensor]) -> "Judge":
        """On the CPU, in float32.  Widths are read off the shapes.  ValueError: the tensors do not fit."""
        widths = []
        for key in ("stem", "downs.0", "downs.1", "downs.2"):
            if f"{key}.weight" not in sd:
                raise ValueError(f"it is no judge of nano's pictures: it has no {key}.weight")
            widths.append(len(sd[f"{key}.weight"]))
        with torch.device("meta"):
            judge = cls(tuple(widths))
        return assign(judge, sd, "judge", "cpu", torch.float32)

    def forward(self, x: Tensor) -> Answers:
        """(B, 3, SIDE, SIDE) in [-1, 1] -> Answers."""
        x = self.stem(x).relu()
        for down, block in zip(self.downs, self.blocks):
            x = block(down(x))
        x = self.norm(self.last(x)).relu()                                   # (B, width, rows, columns)
        columns = x.shape[-1]
        attention = self.where(x).flatten(2).softmax(-1)                     # (B, K, rows*columns)
        seen = attention @ x.flatten(2).mT                                   # (B, K, width)
        there = (seen * self.there).sum(-1) + self.bias                      # (B, K)
        of_things = attention[:, len(STUFF):]                                # (B, things, rows*columns)
        by_column = of_things.unflatten(-1, (-1, columns)).sum(-2)           # (B, things, columns)
        centres = (torch.arange(columns, device=x.device) + 0.5) / columns   # (columns,)
        return Answers(there, self.colour(seen[:, len(STUFF):]), by_column @ centres)


def load(path: str | Path | None = None) -> Judge:
    """The judge of a file, by default the one beside this file.  files.Broken: it is none."""
    path = FILE if path is None else path
    with decoding(path, "judge of nano's pictures"):
        return Judge.from_state_dict(load_file(path))


# ---------------------------------------------------------------------------- what it sees


class Seen(NamedTuple):
    stuff: dict[str, float]             # name: probability that it is there
    things: dict[str, float]            # the same
    colours: dict[str, str]             # thing: its likeliest colour, whether it is there or not
    x: dict[str, float]                 # thing: its centre, as a share of the picture's width


def pixels(images: list[Image.Image]) -> Tensor:
    """Pictures -> (B, 3, SIDE, SIDE) in [-1, 1].  ValueError: one has another size."""
    rows = []
    for image in images:
        if image.size != (SIDE, SIDE):
            raise ValueError(f"nano's pictures are {SIDE} x {SIDE} pixels, not {image.width} x {image.height}")
        rows.append(torch.from_numpy(np.array(image.convert("RGB"))))        # (SIDE, SIDE, 3)
    return torch.stack(rows).permute(0, 3, 1, 2) / 127.5 - 1                 # (B, 3, SIDE, SIDE)


@torch.inference_mode()
def look(judge: Judge, images: list[Image.Image]) -> list[Seen]:
    """What the judge sees in each picture of SIDE x SIDE pixels.  ValueError: one has another size."""
    names = list(COLOURS)
    found = []
    for start in range(0, len(images), BATCH):
        answers = judge(pixels(images[start:start + BATCH]))
        there = answers.there.sigmoid()                                      # (B, K)
        colour = answers.colour.argmax(-1)                                   # (B, things)
        for b in range(len(there)):
            probability = dict(zip(CLASSES, there[b].tolist()))
            stuff = {name: probability[name] for name in STUFF}
            things = {name: probability[name] for name in THINGS}
            colours = {name: names[i] for name, i in zip(THINGS, colour[b].tolist())}
            found.append(Seen(stuff, things, colours, dict(zip(THINGS, answers.x[b].tolist()))))
    return found


def truth(scene: Scene) -> Seen:
    """What a judge that is always right would see in a drawn scene; things that are not there have no colour and x."""
    there = {thing.name: thing for thing in scene.things}
    return Seen({name: float(name in scene.stuff) for name in STUFF},
                {name: float(name in there) for name in THINGS},
                {name: thing.colour for name, thing in there.items()},
                {name: thing.x for name, thing in there.items()})


# ---------------------------------------------------------------------------- what a caption claims, what of it holds


class Claim(NamedTuple):
    things: list[tuple[str, str | None]]     # in the caption's order: (name, its colour or None)
    relation: tuple[str, str] | None         # (the left thing, the right thing)
    stuff: list[str]


# what a caption holds beside classes, colours and a side; sizes are not judged
OTHER_WORDS = {"a", "and", "with", "under", "the", "of", "big", "small"}


def claims(caption: str) -> Claim:
    """What one of nano's captions (scenes.caption) claims.  ValueError: a word of no caption, or no claim at all."""
    text = caption
    for name in THINGS:
        text = text.replace(name, name.replace(" ", "_"))                    # "teddy bear" is one name
    things = []
    stuff = []
    colour = None
    side = None
    for word in text.split():
        name = word.replace("_", " ")
        if name in COLOURS:
            colour = name
        elif name in THINGS:
            things.append((name, colour))
            colour = None
        elif name in STUFF and colour is None:
            stuff.append(name)
        elif name in ("left", "right"):
            side = name
        elif name not in OTHER_WORDS:
            raise ValueError(f"the judge knows no {name!r} there, only nano's captions; this one is {caption!r}")
    if colour:
        raise ValueError(f"the caption {caption!r} ends in a colour, {colour}, without the thing that has it")
    if not things and not stuff:
        raise ValueError(f"the caption {caption!r} names nothing that the judge knows")
    if side and len(things) != 2:
        raise ValueError(f"the caption {caption!r} says {side}, and names {len(things)} things instead of 2")
    relation = None
    if side:
        first, second = (name for name, _ in things)
        relation = (first, second) if side == "left" else (second, first)
    return Claim(things, relation, stuff)


COLUMNS = ("things", "colours", "position", "stuff", "all right")


def share(holds: list[bool]) -> float:
    """The share of claims that hold; NaN where none is made."""
    return sum(holds) / len(holds) if holds else math.nan


def holding(seen: Seen, claim: Claim) -> dict[str, list[bool]]:
    """Of each kind of claim, in the claim's order: does it hold?  Nothing is asked of what no claim names."""
    there = {name for name, p in seen.things.items() if p > THERE}
    position = []
    if claim.relation:
        left, right = claim.relation
        position = [{left, right} <= there and seen.x[left] < seen.x[right]]
    colours = []
    for name, colour in claim.things:
        if colour:
            colours.append(name in there and seen.colours[name] == colour)
    return {"things": [name in there for name, _ in claim.things], "colours": colours, "position": position,
            "stuff": [seen.stuff[name] > THERE for name in claim.stuff]}


def verdict(seen: Seen, claim: Claim) -> dict[str, float]:
    """The shares of the claim's things, colours, positions and stuff that hold, each NaN where it makes none.

    A colour holds only on its own thing, a position only if both things are there.  "all right": 1 or 0.
    """
    holds = holding(seen, claim)
    found = {kind: share(items) for kind, items in holds.items()}
    found["all right"] = float(all(all(items) for items in holds.values()))
    return found


class CaptionJudge:
    """The judge as quality.py takes one: pictures and their captions in, a column of scores for each kind of claim out.

    fingerprint: 12 hex digits that change with the weights and with the code that judges.
    """
    name = "nano's judge"
    columns = COLUMNS

    def __init__(self, path: str | Path | None = None):
        path = FILE if path is None else Path(path)
        self.judge = load(path)
        code = code_stamp(["nano/judge.py", "nano/scenes.py"])
        self.fingerprint = hashlib.sha256(code.encode() + path.read_bytes()).hexdigest()[:12]

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """n pictures and n captions -> each column, (n,) in [0, 1], NaN where a caption claims nothing of the kind.

        ValueError: no equal lists, a caption or a picture that is not nano's.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} captions are not equal lists")
        claimed = [claims(prompt) for prompt in prompts]
        rows = []
        for seen, claim in zip(look(self.judge, images), claimed):
            rows.append(verdict(seen, claim))
        return {column: np.array([row[column] for row in rows]) for column in self.columns}


def main(args: argparse.Namespace) -> None:
    from nano.check_judge import check  # not above: it imports this file, and generates pictures

    if not args.check:
        raise ValueError("there is nothing to do without --check; nano/train_judge.py trains the judge")
    check(load())


if __name__ == "__main__":
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="print how often it is right: a few minutes")
    command(main, parser)

"""A page that holds its data and needs nothing else: numbers and pictures as text, and the template they are put into.

explorer.html is the template, in which two marks stand for the data and for the scripts beside it.
"""
import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from support.checkpoint import check_finite
from support.files import replacing

HERE = Path(__file__).parent
SCRIPTS = ("maps", "draw", "controls")
SHOWN = 768                             # longer side of a picture in the page, pixels


def packed(x: np.ndarray) -> str:
    """Bytes, compressed and as text; the same for the same numbers."""
    return base64.b64encode(gzip.compress(x.tobytes(), mtime=0)).decode()


def quantised(maps: Tensor, steps: int) -> dict:
    """Maps (..., n) >= 0 as bytes: round(steps * sqrt(x / top)), top the largest value of each map.

    By the square root small values, of which there are most, keep more digits.  ValueError: maps not finite.
    """
    check_finite(maps, "the attention maps")
    top = maps.amax(-1, keepdim=True).clamp_min(1e-30)                       # (..., 1)
    codes = (steps * (maps / top).sqrt()).round().byte()                     # (..., n)
    return {"shape": list(maps.shape), "steps": steps, "top": packed(top.numpy()), "codes": packed(codes.numpy())}


def at_most(image: Image.Image, side: int) -> Image.Image:
    """A picture, made smaller if its longer side is above `side` pixels."""
    smaller = image.convert("RGB")
    smaller.thumbnail((side, side))
    return smaller


def embedded(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    file = io.BytesIO()
    at_most(image, SHOWN).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write(path: Path, data: dict) -> None:
    """The page with its scripts and its data in it."""
    page = (HERE / "explorer.html").read_text(encoding="utf-8")
    scripts = [(HERE / f"explorer_{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    page = page.replace("{{SCRIPTS}}", "".join(scripts))
    text = json.dumps(data).replace("<", "\\u003c")      # a name such as "</script>" must not end the data
    with replacing(path) as new:
        new.write_text(page.replace("{{DATA}}", text), encoding="utf-8")

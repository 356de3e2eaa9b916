"""Files from outside and files that we write: a broken one is a sentence that names it, a good one is never lost.

    with files.decoding(path):                            # whatever decoding raises becomes files.Broken
        image = Image.open(path)
    with files.replacing(path) as new:                   # what is written to `new` takes the place of `path` as a whole
        image.save(new, "PNG")
"""
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError


class Broken(ValueError):
    """A file from outside cannot be used; the sentence names it.  For this error alone a picture is left out."""


# What decoding a file of the wrong kind, depth, encoding or size raises. AttributeError, NameError and the like are not
# here: they are mistakes of ours. SyntaxError is PIL's, of PNGs.
DECODING = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, OverflowError, MemoryError,
            RecursionError, struct.error, zlib.error, SafetensorError, Image.DecompressionBombError)


def first_line(e: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    lines = str(e).strip().splitlines()
    return lines[0] if lines else type(e).__name__


@contextmanager
def decoding(path: str | Path, kind: str = "file") -> Iterator[None]:
    """Around the lines that decode a file, and around no others.

    Broken: it is not there, it is no regular file (a pipe would wait for ever), or decoding it raises one of DECODING.
    """
    if not os.path.isfile(path):
        found = "it is a folder or a device" if os.path.exists(path) else "there is no such file"
        raise Broken(f"{str(path)!r} cannot be read as a {kind}: {found}")
    try:
        yield
    except Broken:
        raise
    except DECODING as e:
        said = "it is nested too deep" if isinstance(e, RecursionError) else first_line(e)
        if isinstance(e, LookupError):
            said = f"{type(e).__name__} {said}"          # a KeyError says no more than the key
        raise Broken(f"{str(path)!r} cannot be read as a {kind}: {said}") from None


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, with or without a byte-order mark.  Broken: it is not one."""
    with decoding(path, "text file in UTF-8"):
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path, kind: type = dict) -> dict | list:
    """A JSON file that holds an object, or a list.  Broken: anything else."""
    with decoding(path, "JSON file"):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        check_kind(value, kind, "its content")
        return value


def check_kind(value, kind, what):
    """ValueError: a part of a JSON file is of another kind than expected."""
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{what} should be {names[kind]}, not {str(value)[:40]}")
    return value


def objects(value, key):
    """The list of objects below a key of a JSON object.  ValueError: it is something else."""
    for entry in check_kind(value.get(key), list, repr(key)):
        check_kind(entry, dict, f"an entry of {key!r}")
    return value[key]


def read_tensors(path: str | Path, kind: str) -> object:
    """What torch.save wrote, as long as it is made of tensors, numbers, texts, lists and dictionaries.

    Broken: anything else; a broken pickle can raise whatever it likes, so all of it is caught here.
    """
    with decoding(path, kind):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            # the whole message of torch advises to switch weights_only off, which would let the file run code
            said = "it holds more than tensors" if "weights_only" in str(e) else first_line(e)
            raise ValueError(said) from None


def decoded(path: str | Path, kind: str, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture file as it is stored.  size: (width, height) that it should have, compared before it is decoded.

    files.Broken: no such file, a pipe, no format that PIL reads, another size, infinite or undefined values.
    """
    with decoding(path, kind):
        try:
            image = Image.open(path)
            if size not in (None, image.size):
                raise ValueError(f"it has the size {image.size}, its picture {size}")
            image.load()
        except Exception as e:                           # PIL's decoders raise RuntimeErrors and AttributeErrors, too
            raise ValueError(first_line(e)) from None
        if image.mode == "F" and not np.isfinite(image).all():
            raise ValueError("it holds values that are not finite")
        return image


def open_stored(path: str | Path) -> Image.Image:
    """A picture file -> RGB as it is stored, not turned: label maps are drawn on it so.  files.Broken: see decoded."""
    return decoded(path, "picture").convert("RGB")


def open_labels(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A label map file, grey or with a palette -> numbers of classes from 0 to 65535, (height, width).

    size: (width, height) of its picture.  files.Broken: see decoded; it holds something else.
    """
    image = decoded(path, "label map", size)
    with decoding(path, "label map"):
        if image.mode not in ("P", "L", "I", "I;16"):
            held = {"1": "single bits", "F": "fractions"}.get(image.mode, "colours")
            raise ValueError(f"it holds {held} (mode {image.mode}), not the numbers of classes")
        labels = np.asarray(image)                                           # (height, width)
        if labels.min() < 0 or labels.max() > 65535:
            raise ValueError(f"it holds numbers from {labels.min()} to {labels.max()}; classes have 0 to 65535")
        return labels


def stamp(paths: Iterable[str | Path]) -> str:
    """12 hex digits that change when one of these files is replaced, changed or gone: names, sizes, times of change."""
    digest = hashlib.sha256()
    for path in map(os.path.abspath, paths):
        facts = f"{path} is missing\n"
        if os.path.exists(path):
            found = os.stat(path)
            facts = f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}\n"
        digest.update(facts.encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]


def code_stamp(names: Iterable[str]) -> str:
    """12 hex digits that change with the text of these files of the project."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return digest.hexdigest()[:12]


def make_folder(path: str | Path) -> None:
    """A folder for results.  ValueError: it cannot be one."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"{path} cannot be a folder for results ({e.strerror}); name another one with --out") from None


def alive(pid: int) -> bool:
    """Whether there is a process of this number on this computer, of whatever user; True where nobody knows."""
    if os.name != "posix":                               # elsewhere os.kill would end it
        return True
    try:
        os.kill(pid, 0)                                  # sends nothing, but says whether it could be sent
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):             # another user's; no number of a process
        return True
    return True


def remove_leftovers(path: Path) -> None:
    """The `.NAME.PID.tmp` beside a path that `replacing` left there when its process was killed (`kill -9`).

    Only of processes that are no more.  They are taken for processes of this computer: if another one writes the same
    file in a shared folder just now, it loses its new file, and says so.
    """
    left = re.compile(rf"\.{re.escape(path.name)}\.([0-9]+)\.tmp")
    with suppress(OSError):                              # a folder that is not there; another process was faster
        for found in os.listdir(path.parent):
            match = left.fullmatch(found)
            if match and not alive(int(match[1])):
                (path.parent / found).unlink()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place when the block ends, and is removed when the block fails.

    What a killed process left of such a file is removed, too.
    ValueError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    remove_leftovers(path)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield new
        os.replace(new, path)
    except (OSError, SafetensorError) as e:
        kept = "; what was there before is still there" if path.exists() else ""
        raise ValueError(f"{path} cannot be written ({first_line(e)}){kept}") from None
    finally:
        with suppress(OSError):                          # a name that no file can have
            new.unlink(missing_ok=True)


def write_json(path: str | Path, value: object) -> None:
    """A JSON file that is there as a whole or not at all."""
    with replacing(path) as new:
        new.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_tensors(path: str | Path, value: object) -> None:
    """A file of torch.save's that is there as a whole or not at all."""
    with replacing(path) as new, open(new, "wb") as file:
        torch.save(value, file)


def write_picture(path: str | Path, image: Image.Image) -> None:
    """A picture file that is there as a whole or not at all, in the format of its name.

    Whether there is such a format, pictures.check_out says before the work begins.
    """
    with replacing(path) as new:
        image.save(new, Image.registered_extensions()[Path(path).suffix.lower()])


def write_figure(path: str | Path, figure, **options) -> None:
    """A figure of matplotlib as a PNG that is there as a whole or not at all."""
    with replacing(path) as new:
        figure.savefig(new, format="png", **options)

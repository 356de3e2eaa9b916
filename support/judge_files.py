"""Where the weights of judges (judges.py) come from: the hub, or a folder with its repositories as they are there.

    judges/clip-vit-large-patch14/{model.safetensors, merges.txt}            # of openai/clip-vit-large-patch14
    judges/dino-vits16/pytorch_model.bin                                     # of facebook/dino-vits16

`--judge clip` takes them from the hub, `--judge judges` from that folder.
"""
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from support import weights
from support.checkpoint import check_weight
from support.files import decoding, read_tensors

HUB = {"clip": "openai/clip-vit-large-patch14", "dino": "facebook/dino-vits16"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")     # the first that is there
MERGES = "merges.txt"
OPTION = "--judge, which takes its folder"               # ends the sentence about a file that cannot be fetched


class Files(NamedTuple):
    weights: Path
    merges: Path | None                 # CLIP's byte-pair merges; DINO reads no text


def from_hub(repo: str) -> Files:
    """A judge's files from the cache or the hub.  ValueError: they cannot be fetched."""
    found = None
    with suppress(ValueError):                           # not every repository has the first of WEIGHTS
        found = weights.hub(repo, WEIGHTS[0], OPTION)
    found = found or weights.hub(repo, WEIGHTS[1], OPTION)
    return Files(found, weights.hub(repo, MERGES, OPTION) if repo == HUB["clip"] else None)


def find(kind: str, name_or_path: str | Path) -> Files:
    """The files of the judge of this kind, of HUB: "clip" means the hub, else a folder.

    A folder is the judge's own, or one that holds it under its repository's name.  ValueError says what is missing.
    """
    if str(name_or_path) == "clip":
        return from_hub(HUB[kind])
    folder = Path(name_or_path)
    if not str(name_or_path) or not folder.is_dir():
        raise ValueError(f"no judge {str(name_or_path)!r}: there is no such folder, and the known name is clip")
    own = HUB[kind].partition("/")[2]
    if (folder / own).is_dir():
        folder = folder / own
    found = weights.first_of(folder, *WEIGHTS)
    if found is None:
        raise ValueError(f"{folder} should hold {' or '.join(WEIGHTS)} of {HUB[kind]}, by itself or in {own}/")
    merges = folder / MERGES
    if kind == "clip" and not merges.is_file():
        raise ValueError(f"{MERGES} of {HUB[kind]} should lie beside {found}")
    return Files(found, merges if kind == "clip" else None)


def read(files: Files) -> dict[str, Tensor]:
    """The state dict.  ValueError: a broken file, or tensors that hold no floats, but for numbers of positions."""
    if files.weights.suffix == ".bin":
        sd = read_tensors(files.weights, "state dict of a judge")
        with decoding(files.weights, "state dict of a judge"):
            if not isinstance(sd, dict) or not all(isinstance(key, str) for key in sd):
                raise ValueError("it holds no tensors by name")
    else:
        with weights.opened(files.weights) as f:
            sd = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    with decoding(files.weights, "state dict of a judge"):
        for key, tensor in sd.items():
            if not key.endswith("position_ids"):         # whole numbers, in old files
                check_weight(key, tensor)
    return sd


def fingerprint(files: Files) -> str:
    """12 hex digits of the files, as models have."""
    return weights.fingerprint(weights.Files({"judge": ([files.weights], "")}, files.merges))

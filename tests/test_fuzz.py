"""Broken input of every kind, drawn from a seed: a command succeeds, or ends with exit code 2 and one sentence.

    SEG4DIFF_FUZZ=1000 python -m pytest -n 0 tests/test_fuzz.py -k lora      # so many cases of a kind, not a few

A kind is a function that writes broken files to an empty folder and returns a command line.  Case n of a kind is always
the same.  What is written must be whole, whatever the outcome.
"""
import json
import os
import random
import resource
import shutil
import signal
import traceback
from argparse import Namespace
from functools import partial
from itertools import count
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nano import scenes, train_vae
from support.data import DATASETS, toy_scenes

CASES = int(os.environ.get("SEG4DIFF_FUZZ") or 0)         # 0: as many as KINDS says
MEMORY = 12 << 30                                        # bytes of addresses that many cases may take
SECONDS = 120                                            # that a case may take
DEEP = "nested deep"                                     # stands for 20,000 brackets in a JSON text
LEAVES = (None, [], {}, "", "x", "5", True, -1, 0, 1, 1.5, 70_000, 10**12, 10**30, 1e300, -1e300, float("nan"), DEEP)
WORDS = ("", "x", "-1", "0", "1", "1.5", "nan", "inf", "-inf", "1_0", "é", "\0", "none.png", "/dev/null",
         "--", "-x", "cuda:99999", "%s", ".", "/")
LARGE = ("1e300", "1000000000000", "9" * 30, "9" * 5000)


class Hang(BaseException):
    """Nothing of the program catches it."""


# ---------------------------------------------------------------------------- how things are broken


def break_bytes(data: bytes, rng: random.Random, first: int | None = None) -> bytes:
    """Bytes flipped, cut off, put in, overwritten or swapped, in the `first` ones."""
    n = min(first or len(data), len(data))
    at, to = sorted(rng.randrange(n) for _ in range(2))
    out = bytearray(data)
    how = rng.randrange(5)
    if how == 0:
        for _ in range(rng.choice((1, 5, 50))):
            out[rng.randrange(n)] ^= 1 << rng.randrange(8)
    elif how == 1:
        del out[at:rng.choice((to, len(out)))]
    elif how == 2:
        out[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif how == 3:
        out[at:at + 8] = rng.choice((b"\0", b"\xff")) * 8
    else:
        out[at:at + 16], out[to:to + 16] = out[to:to + 16], out[at:at + 16]
    return bytes(out)


def break_value(value: object, rng: random.Random) -> object:
    """A copy of nested dictionaries and lists with one node replaced, removed or doubled."""
    if isinstance(value, torch.Tensor) and rng.random() < 0.7:
        return rng.choice((value * torch.nan, value[:-1] if value.ndim else value, value.flatten(), value.double(),
                           value.to(torch.int64), value[None]))
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(LEAVES)
    value = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    how = rng.random()
    if how < 0.15:
        value.pop(key)
    elif how < 0.25 and isinstance(value, list):
        value.insert(rng.randrange(len(value)), value[key])
    elif how < 0.25:
        value[f"{key}x"] = value.pop(key)
    else:
        value[key] = break_value(value[key], rng)
    return value


def json_text(value: object) -> str:
    return json.dumps(value).replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000)


def break_json(path: Path, rng: random.Random) -> None:
    """A JSON file with a node, or a few bytes, changed."""
    if rng.random() < 0.2:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    else:
        path.write_text(json_text(break_value(json.loads(path.read_text()), rng)))


def break_tensors(path: Path, rng: random.Random) -> None:
    """The same for a file of torch.save."""
    if rng.random() < 0.3:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    else:
        torch.save(break_value(torch.load(path, weights_only=True), rng), path)


def break_header(path: Path, rng: random.Random, keys: tuple[str, ...]) -> None:
    """A safetensors file whose metadata's JSON under one of these keys is changed."""
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    key = rng.choice(keys)
    meta[key] = json_text(break_value(json.loads(meta[key]), rng))
    save_file(load_file(path), path, meta)


def break_safetensors(path: Path, rng: random.Random) -> None:
    """A safetensors file with bytes changed, anywhere or in its header, or a node of its header."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    how = rng.randrange(3)
    if how < 2:
        path.write_bytes(break_bytes(data, rng, end if how else None))
        return
    header = json_text(break_value(json.loads(data[8:end]), rng)).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def break_options(args: list, rng: random.Random, endless: tuple[str, ...]) -> list:
    """One or two arguments, most often values, changed; none of LARGE for an option in `endless`."""
    args = [str(x) for x in args]
    for _ in range(rng.choice((1, 1, 2))):
        values = [i for i in range(2, len(args)) if args[i - 1].startswith("--")]
        i = rng.choice(values) if rng.random() < 0.8 else rng.randrange(1, len(args))
        how = rng.random()
        if how < 0.1:
            del args[i]
        elif how < 0.15:
            args.insert(i, args[i])
        else:
            args[i] = rng.choice(WORDS if args[i - 1] in endless else WORDS + LARGE)
    return args


# ---------------------------------------------------------------------------- good input, made once


def put(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def data_sets(root: Path) -> None:
    """Two pictures of 40 x 30 pixels in the layouts of voc, context59, coco and sa1b."""
    devkit = root / "VOCdevkit"
    merged = {"images": [], "annos_segmentation": []}
    (devkit / "VOC2012/ImageSets/Segmentation").mkdir(parents=True)
    (devkit / "VOC2012/ImageSets/Segmentation/val.txt").write_text("1\n2\n")
    for name in ("1", "2"):
        picture = np.asarray(Image.fromarray(scenes.draw(int(name)).image).resize((40, 30)))
        labels = np.full((30, 40), 3, np.uint8)
        labels[:, 20:] = 7
        for folder in ("VOCdevkit/VOC2012/JPEGImages/", "VOCdevkit/VOC2010/JPEGImages/", "coco/train2017/", "sa1b/sa_"):
            put(root / f"{folder}{name}.jpg", picture)
        put(devkit / f"VOC2012/SegmentationClass/{name}.png", labels)
        put(root / f"coco/stuffthingmaps/train2017/{name}.png", labels)
        code = rle.encode(np.asfortranarray(labels == 7).astype(np.uint8))
        mask = {"segmentation": {"size": code["size"], "counts": code["counts"].decode()}}
        (root / f"sa1b/sa_{name}.json").write_text(json.dumps({"annotations": [mask, mask]}))
        merged["images"].append({"file_name": f"{name}.jpg", "image_id": int(name), "phase": "val"})
        merged["annos_segmentation"].append(mask | {"image_id": int(name), "category_id": 23})
    (devkit / "VOC2010/trainval_merged.json").write_text(json.dumps(merged))
    (root / "captions.json").write_text(json.dumps({"1": "a car. a tree.", "2": "a boat"}))
    official = {"annotations": [{"image_id": 1, "caption": "a car"}, {"image_id": 2, "caption": "a boat"}]}
    (root / "official.json").write_text(json.dumps(official))


CPU = ("--device", "cpu", "--dtype", "float32")
MAGNET = ("train_magnet.py", "--model", "m.safetensors", *CPU, "--batch", 1, "--accumulate", 1, "--rank", 2, "--val",
          "none", "--out", "out", "--steps")
EVALUATE = ("evaluate.py", "--model", "m.safetensors", *CPU, "--out", "out", "--limit", 2)


@pytest.fixture
def good(tiny_file, tmp_path, command) -> Path:
    """A folder of everything that is broken below, made once: a model, LoRAs, data sets, runs that are not finished."""
    folder = tiny_file.parent.parent / "good"
    if folder.exists():
        return folder
    data_sets(tmp_path)
    shutil.copy(tiny_file, tmp_path / "m.safetensors")
    Image.open(tmp_path / "coco/train2017/1.jpg").save(tmp_path / "photo.png")
    for script, out in (((*MAGNET, 2), "magnet"), (EVALUATE, "evaluated")):
        code, _, err = command(*script)
        assert code == 0, err
        shutil.move(tmp_path / "out", tmp_path / out)
    state = torch.load(tmp_path / "magnet/state.pt", weights_only=True)
    state["step"] = 1
    torch.save(state | {"log": state["log"][:1]}, tmp_path / "magnet/state.pt")
    shutil.copy(tmp_path / "magnet/lora.safetensors", tmp_path / "l.safetensors")
    torch.save({"model": load_file(tmp_path / "l.safetensors"), "step": 1}, tmp_path / "l.pth")
    (tmp_path / "run").mkdir()
    torch.save({"samples": 8, "log": [(4, 0.9), (8, 0.8)]}, tmp_path / "run/mmdit.pt")
    with safe_open(tiny_file, "pt") as f:
        meta = f.metadata() | {"trained": json.dumps({"samples": 8})}
    save_file(load_file(tiny_file), tmp_path / "run/nano_0000k.safetensors", meta)
    code, _, err = command("nano/curves.py", "--run", "run", "--limit", 1, "--out", "c.png")
    assert code == 0, err
    shutil.copytree(tmp_path, folder)
    return folder


# ---------------------------------------------------------------------------- kinds: random numbers -> command


def segment(rng, *more):
    return "seg4diff.py", "segment", "photo.png", "car", "sky", "--model", "m.safetensors", *CPU, *more


def with_model(breaker, rng):
    breaker(Path("m.safetensors"), rng)
    generate = "seg4diff.py", "generate", "car", "--model", "m.safetensors", *CPU, "--steps", 1
    return rng.choice((segment(rng), generate, (*EVALUATE, "--task", "unsup")))


def lora(rng):
    path = Path(rng.choice(("l.safetensors", "l.pth")))
    if path.suffix == ".pth":
        break_tensors(path, rng)
    else:
        rng.choice((break_safetensors, partial(break_header, keys=("base", "lora_adapter_metadata"))))(path, rng)
    return segment(rng, "--lora", path)


def context(rng):
    break_json(Path("VOCdevkit/VOC2010/trainval_merged.json"), rng)
    return *EVALUATE, "--dataset", "context59", "--data-root", "."


def captions(rng):
    path = Path(rng.choice(("captions.json", "official.json")))
    break_json(path, rng)
    return *MAGNET, 1, "--dataset", "coco", "--data-root", ".", "--captions", path


def sa1b(rng):
    for path in rng.choice((["sa1b/sa_1.json"], ["sa1b/sa_1.json", "sa1b/sa_2.json"])):
        break_json(Path(path), rng)
    return *MAGNET, 1, "--dataset", "sa1b", "--data-root", "."


def pictures(rng):
    """Those of a data set, their label maps and their list."""
    files = sorted(path for path in Path("VOCdevkit/VOC2012").rglob("*.*"))
    for path in rng.sample(files, rng.choice((1, 1, 2))):
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    return *EVALUATE, "--dataset", "voc", "--data-root", "."


def photo(rng):
    path = Path(rng.choice(("photo.png", "coco/train2017/1.jpg")))
    path.write_bytes(break_bytes(path.read_bytes(), rng, rng.choice((100, None))))
    return "seg4diff.py", "segment", path, "car", "--model", "m.safetensors", *CPU


def prompts(rng):
    Path("p.txt").write_bytes(break_bytes("a car\na boät\n".encode(), rng))
    return "figures.py", "strip", "--model", "m.safetensors", *CPU, "--prompts", "p.txt", "--out", "out", "--limit", 1


def ledger(rng):
    shutil.move("evaluated", "out")
    (path,) = Path("out").glob("*.jsonl")
    lines = path.read_text().splitlines()
    if rng.random() < 0.3:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
    else:
        i = rng.randrange(len(lines))
        lines[i] = json_text(break_value(json.loads(lines[i]), rng))
        path.write_text("\n".join(lines) + "\n")
    return EVALUATE


def state(rng):
    shutil.move("magnet", "out")
    break_tensors(Path("out/state.pt"), rng)
    return *MAGNET, 2


def curves(rng):
    path = Path(rng.choice(("run/mmdit.pt", "run/curves.json", "run/nano_0000k.safetensors")))
    if path.suffix == ".pt":
        break_tensors(path, rng)
    elif path.suffix == ".json":
        break_json(path, rng)
    else:
        break_header(path, rng, ("trained", "presets", "merges"))
    return "nano/curves.py", "--run", "run", "--limit", 1, "--out", "out.png"


def options(args, endless, rng):
    broken = break_options(args, rng, endless)
    for option in ("--run", "--out"):                    # some are below nano/ if they are not given
        if option in args and option not in broken:
            broken += [option, "out.png"]
    return broken


NANO = ("nano/pretrain.py", "--run", "out", "--device", "cpu", "--seed", 0, "--scenes", 2, "--minutes-vae", 0.001,
        "--batch-vae", 2, "--vae-widths", 4, 4, 4, 4, "--kl", 1e-4, "--samples", 4, "--batch", 2, "--width", 32,
        "--depth", 1, "--head-dim", 32, "--text-widths", 64, 64, "--text-layers", 1, "--text-length", 8, "--lr", 1e-3,
        "--noise-mean", 0.8, "--pooled", 0.1, "--low", 0.5, "--cooldown", 0.2, "--snapshot", 8)
# options of each command, and which of them say how much work there is
OPTIONS = {
    "segment": ((*segment(None), "--seed", 0, "--sigma", 0.5, "--block", 1, "--lora", "l.safetensors"), ()),
    "generate": (("seg4diff.py", "generate", "car", "--steps", 1, "--cfg", 2, "--pag", 1, "--blocks", 0, 1, "--perturb",
                  2, "--seed", 3, "--model", "m.safetensors", *CPU, "--out", "o.png"), ("--steps",)),
    "evaluate": ((*EVALUATE, "--task", "unsup", "--dataset", "voc", "--data-root", ".", "--resize", "crop", "--prompt",
                  "present", "--draws", 1, "--threshold", 0.1, "--scaling", "map", "--batch-size", 1, "--seed", 1,
                  "--lora", "l.safetensors"), ("--draws",)),
    "released": ((*EVALUATE, "--task", "ovss", "--dataset", "voc", "--data-root", ".", "--protocol", "present",
                  "--draws", 1, "--reading", "paper", "--dtype", "float32"), ("--draws",)),
    "control": ((*EVALUATE, "--dataset", "voc", "--data-root", ".", "--control", "block", "--draws", 1, "--seed", 1),
                ("--draws",)),
    "magnet": ((*MAGNET, 1, "--dataset", "coco", "--data-root", ".", "--captions", "captions.json", "--limit", 2,
                "--seed", 0, "--warmup", 1, "--lr", 0.1, "--mask-weight", 0.1, "--maps", "heads",
                "--normalise", "zscore", "--sigma", "uniform", "--val-limit", 1, "--val-every", 1, "--save-every", 1),
               ("--steps", "--batch", "--accumulate")),
    "figures": (("figures.py", "strip", "--limit", 1, "--out", "out", "--model", "m.safetensors", *CPU, "--dataset",
                 "scenes-dev", "--data-root", "."), ("figures.py",)),
    "pretrain": (NANO, ("--scenes", "--minutes-vae", "--samples", "--batch-vae", "--batch")),
    "curves": (("nano/curves.py", "--run", "run", "--limit", 1, "--out", "out.png"), ("--limit",)),
    "sheet": (("nano/scenes.py", "--first", 5, "--out", "out.png"), ()),
    "bench": (("tools/bench.py", "--repeats", 1, "--batch-size", 1, "--seed", 0, "--model", "m.safetensors", *CPU),
              ("--repeats",)),
}
# kind -> (what it does, how many cases of it the suite runs)
KINDS = {
    "model": (partial(with_model, break_safetensors), 3),
    "presets": (partial(with_model, partial(break_header, keys=("presets",))), 3),
    "merges": (partial(with_model, partial(break_header, keys=("merges",))), 2),
    "lora": (lora, 3), "context": (context, 2), "captions": (captions, 2), "sa1b": (sa1b, 2), "pictures": (pictures, 2),
    "photo": (photo, 3), "prompts": (prompts, 1), "ledger": (ledger, 2), "state": (state, 2), "curves": (curves, 2)}
for name, (args, endless) in OPTIONS.items():
    KINDS[f"options of {name}"] = partial(options, args, endless), 2


# ---------------------------------------------------------------------------- what may come of it


def stamps() -> dict[Path, tuple]:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in Path().rglob("*") if path.is_file()}


def check_outcome(code: int, out: str, err: str) -> None:
    lines = [line.rpartition("\r")[2] for line in err.splitlines()]         # without progress bars
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in err and "weights_only" not in err, err
    assert (code, len(errors)) in ((0, 0), (2, 1)), (code, err)
    assert code == 0 or lines[-1] == errors[0], err


def check_file(path: Path) -> None:
    """What was written is whole."""
    assert not path.name.endswith(".tmp"), path
    if path.suffix in (".png", ".jpg"):
        Image.open(path).load()
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        json.loads(path.read_bytes().splitlines()[-1])   # those before it may be the broken ones
    elif path.suffix == ".safetensors":
        assert all(value.isfinite().all() for value in load_file(path).values()), path
    elif path.suffix == ".pt":
        torch.load(path, weights_only=True)
    if path.name == "results.json":
        found = json.loads(path.read_text())
        assert found["n"] + len(found["broken"]) <= 2 and 0 <= found["rows"]["ceiling"]["mIoU"] <= 100, found


def hang(*_):
    raise Hang(f"more than {SECONDS} s")


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(command, good, tmp_path, monkeypatch, kind):
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5001)))
    monkeypatch.setattr(scenes, "VAL_SEEDS", range(1))
    monkeypatch.setattr(train_vae, "time", Namespace(time=partial(next, count())))           # a step takes a second
    signal.signal(signal.SIGALRM, hang)
    if CASES:                                            # the machine is not to suffer from what may be found
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    make, cases = KINDS[kind]
    findings = []
    for n in range(CASES or cases):
        folder = tmp_path / f"case{n}"
        shutil.copytree(good, folder, copy_function=os.link if kind.startswith("options") else shutil.copy)
        monkeypatch.chdir(folder)
        args = make(random.Random(f"{kind} {n}"))
        before = stamps()
        signal.alarm(SECONDS)
        try:
            check_outcome(*command(*args))
            for path, stamp in stamps().items():
                if before.get(path) != stamp:
                    check_file(path)
        except (Exception, Hang):
            findings.append(f"case {n}, {[str(x) for x in args]}:\n{traceback.format_exc()[-3000:]}")
        finally:
            signal.alarm(0)
            plt.close("all")
        shutil.rmtree(folder)
    assert not findings, "\n\n".join([f"{len(findings)} of {n + 1} cases", *findings])

"""What is there and what is missing, a line a fact, each missing thing with what mends it.  Nothing is downloaded.

    python seg4diff.py doctor
    python seg4diff.py doctor --model flux --device cuda:1 --data-root /data

It ends with exit code 0 if the embedded model works, whatever else is missing. Seconds are forecasts from a short burst
at the size of SD3 (tools/forecast.py), half a minute on a CPU.
"""
import math
import os
import platform
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants, try_to_load_from_cache

import seg4diff
from support import weights
from support.checkpoint import pick_device, pick_dtype
from support.cli import NO_MEMORY, show
from support.data import DATASETS, ROOT, TRAINING_SETS
from support.files import first_line
from support.metrics import classes_in, confusion, scores
from tools import costs, forecast


def say(fact: str, *words: object) -> None:
    """A line of the report."""
    show(f"{fact + ':':11s}" + " ".join(map(str, words)))


# ---------------------------------------------------------------------------- this machine


def host_memory() -> float:
    """Bytes of this machine's memory; infinite where the system does not tell (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gigabytes(n: float) -> str:
    """Bytes as a person reads them."""
    return "an unknown number of GB" if n == math.inf else f"{n / 1e9:.1f} GB"


def device_memory(device: torch.device) -> float:
    """All bytes of a device; Apple's GPUs use the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


def half(device: torch.device) -> torch.dtype | None:
    """The 16 bits that a device is good at: on CUDA what "auto" takes; on MPS none (pick_dtype says why)."""
    if device.type == "cuda":
        return pick_dtype("auto", device)
    return torch.bfloat16 if device.type == "cpu" else None


def report_machine(device: torch.device, dtype: torch.dtype) -> None:
    """Python, PyTorch, every device, and the one that will be used."""
    say("python", platform.python_version(), "on", platform.system(), platform.machine())
    build = "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    say("torch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")
    if torch.cuda.device_count() == 0 and shutil.which("nvidia-smi"):
        say("torch", "there seems to be an NVIDIA GPU, but PyTorch does not see it: https://pytorch.org/get-started")
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
        say("device", f"cuda:{i}, {card.name}, {gigabytes(card.total_memory)}, compute capability {capability}")
    if torch.backends.mps.is_available():
        say("device", "mps, Apple's GPU")
    say("device", f"cpu, {os.cpu_count()} cores, {gigabytes(host_memory())}")
    say("used", f"{device}, {str(dtype).removeprefix('torch.')} (--device and --dtype choose others)")


# ---------------------------------------------------------------------------- models

# A licence has to be accepted before these can be downloaded; whether schnell's has to be is not known here.
GATED = ("sd3", "sd3.5-medium", "sd3.5-large", "flux")


def files_of(name: str) -> list[tuple[str, str]]:
    """(repository, file) of all that a model of weights.HUB is loaded from."""
    repo, file = weights.HUB[name]
    others = list(weights.ENCODERS.values())
    if name.startswith("flux"):
        others = [weights.T5_TOKENIZER]
        for parts in weights.FLUX_HUB.values():
            others += parts
    return [(repo, file), *((repo, other) for other in others), weights.TOKENIZER]


def report_embedded(name: str) -> None:
    path = weights.EMBEDDED[name]
    if path.is_file():
        say("model", f"{name}: {path.stat().st_size / 1e6:.1f} MB, embedded")
    else:
        card = "flux.md" if name == "nano-flux" else "README.md"
        say("model", f"{name}: not there; nano/{card} says how it is trained")


def report_cached(name: str) -> None:
    """What of a model is in the hub's cache, and what would bring the rest."""
    files = files_of(name)
    missing = []
    for repo, file in files:
        if not isinstance(try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE), str):
            missing.append(file)
    if not missing:
        say("model", f"{name}: in the cache")
        return
    line = f"{name}: {len(files) - len(missing)} of {len(files)} files in the cache"
    if len(missing) < len(files):
        line += f", without {', '.join(missing)}"
    if name in GATED:
        line += f"; licence: https://huggingface.co/{weights.HUB[name][0]}"
    say("model", line)


def report_models(name: str | None) -> None:
    """One model, or all that have a name, and the login."""
    names = weights.NAMES if name is None else [name]
    for known in names:
        if known in weights.EMBEDDED:
            report_embedded(known)
        elif known != "flux-released":                   # whose files are flux's
            report_cached(known)
    say("model", f"what is missing, the first command with --model NAME downloads to {constants.HF_HUB_CACHE}")
    say("model", "first with a new one: `python evaluate.py --model NAME`, drawn scenes that need no data set "
        "(docs/data.md)")
    there = os.environ.get("HF_TOKEN") or Path(constants.HF_TOKEN_PATH).is_file()
    say("login", "a token is there" if there else "no token: `hf auth login`; models behind a licence need one")


# ---------------------------------------------------------------------------- data sets

# One data set of each download, how many pictures it should have, and the names that it is also used under.
EXPECTED = {"voc": (1449, "voc21"), "context59": (5104, "context60"),
            "coco-object": (5000, "coco-object81, coco-object-bg, stuff27"), "ade20k": (2000, ""),
            "cityscapes": (500, "")}
TRAINING = {"coco": "train2017, for train_magnet.py", "sa1b": "for train_magnet.py"}


def report_data(root: Path) -> None:
    """Which data sets lie below the root, and what is missing of them."""
    if not root.is_dir():
        say("data", f"there is no folder {root} (--data-root or SEG4DIFF_DATA); docs/data.md says what belongs there")
        return
    readers = {name: partial(DATASETS[name], root) for name in EXPECTED}
    readers |= {f"{name} ({use})": partial(TRAINING_SETS[name], root, None) for name, use in TRAINING.items()}
    found = 0
    for name, reader in readers.items():
        try:
            data = reader()
        except (ValueError, OSError) as e:               # OSError: a folder that may not be listed
            said = first_line(e).partition(". Expected")[0]
            _, _, why = said.partition(" was not found: ")
            say("data", f"{name}: {why or said}")
            continue
        found += 1
        expected, others = EXPECTED.get(name, (len(data.names), ""))
        line = f"{name}: {len(data.names)} pictures" + (f"; also {others}" if others else "")
        if len(data.names) != expected:
            line += f"; {expected} were expected"
        holes = [path for path in data.files if not os.path.isfile(path)]    # Path's raises at names that cannot be
        if holes:
            line += f"; missing files: {len(holes)}, the first is {holes[0]}: unpack its archive again"
        say("data", line)
    if found < len(readers):
        say("data", f"looked below {root} (--data-root or SEG4DIFF_DATA); docs/data.md says what to get, and where it "
            "belongs")


# ---------------------------------------------------------------------------- the embedded model

SCENES = 8
MIOU = 79.8                             # of nano on these scenes, in percent
TOLERANCE = 1.0
DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}   # of maps, shares of attention


def self_test(device: torch.device, dtype: torch.dtype) -> str | None:
    """nano on a few scenes, on the device and on the CPU; what is wrong with it, or None."""
    try:
        data = DATASETS["scenes-dev"](ROOT)
        items = [data.read(name) for name in data.names[:SCENES]]
        images = [item.image for item in items]
        names = [[data.classes[k] for k in classes_in(item.labels)] for item in items]
        here = seg4diff.segment(seg4diff.load("nano", device, dtype), images, names)
        cpu = seg4diff.segment(seg4diff.load("nano", "cpu", torch.float32), images, names)
    except (ValueError, OSError, RuntimeError) as e:
        return first_line(e)
    counts = np.zeros((len(data.classes), len(data.classes)), np.int64)      # (K, K)
    for item, seg in zip(items, here):
        present = classes_in(item.labels)
        counts += confusion(item.labels, present[seg.labels], len(data.classes))
    miou = scores(counts)["mIoU"]
    difference = max((a.maps.float() - b.maps).abs().max().item() for a, b in zip(here, cpu))
    say("self-test", f"nano on {SCENES} scenes: mIoU {miou:.1f} %, {MIOU:.1f} +- {TOLERANCE:.1f} were expected")
    say("self-test", f"its maps on {device} differ from the CPU's by {difference:.1e} at most, {DIFFERENCE[dtype]:g} "
        "may be")
    if not abs(miou - MIOU) <= TOLERANCE:
        return f"its mIoU is {miou:.1f} %, not {MIOU:.1f} +- {TOLERANCE:.1f}"
    if not difference <= DIFFERENCE[dtype]:
        return f"its maps differ from the CPU's by {difference:.1e}"
    return None


# ---------------------------------------------------------------------------- forecasts

COMMANDS = {"segment": "evaluate.py --dataset voc", "generate": "seg4diff.py generate",
            "magnet": "train_magnet.py --dataset coco"}
PICTURES = {"segment": 1449, "generate": 1, "magnet": 3000 * 16}             # VOC's; one; COCO's steps of 16 pictures


def remedy(shapes: costs.Shapes, task: str, option: str | None, device: torch.device) -> str:
    """What makes a task fit that does not: an option (forecast.way_out), a GPU's machine in its place, or nothing."""
    if option is not None:
        return f"{option} makes it fit"
    slow = forecast.need(shapes, task, torch.float32, "cpu", 0, forecast.BATCH[task]).device
    if device.type == "cuda" and slow <= host_memory():
        return f"--device cpu, which takes {gigabytes(slow)} of host memory and is slow, makes it fit"
    return "no option makes it fit"


def report_task(shapes: costs.Shapes, name: str, task: str, rates: forecast.Rates, device: torch.device,
                dtype: torch.dtype) -> None:
    """Seconds and bytes of one command with one model, or what makes it fit."""
    what = f"{COMMANDS[task]} --model {name}"
    batch = forecast.BATCH[task]
    forced = ""
    if task == "magnet" and dtype == torch.float16:      # in which training is refused
        dtype = torch.float32
        forced = "--dtype float32"
    memory = device_memory(device)
    host = host_memory()
    free = forecast.usable(memory, device.type)
    need = forecast.need(shapes, task, dtype, device.type, free, batch)
    room = f"{need.device / 1e9:.1f} of {gigabytes(free)}"
    if forced:
        room += f", with {forced}"
    if need.waiting:
        room += f", {forecast.waits(need.waiting)} in {need.host / 1e9:.1f} of {gigabytes(host)} of host memory"
    option = forecast.way_out(shapes, task, dtype, half(device), device.type, memory, batch, host)
    if option != "":
        if option is not None:
            option = f"{forced} {option}".strip()
        say("forecast", f"{what}: does not fit, {room}; {remedy(shapes, task, option, device)}")
        return
    one = forecast.picture_seconds(shapes, task, rates, need, dtype)
    each = f", {forecast.human(one)} a picture" if PICTURES[task] > 1 else ""
    say("forecast", f"{what}: {forecast.human(PICTURES[task] * one)}{each}; {room}")


def report_forecasts(names: list[str], device: torch.device, dtype: torch.dtype) -> None:
    """A burst at SD3's size, and what it means for each model and command."""
    try:
        rates = forecast.burst(costs.published("sd3"), device, dtype)
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not any(words in str(e) for words in NO_MEMORY):
            raise
        say("forecast", "a single block of SD3 does not fit this device now; other programs may hold its memory")
        return
    speeds = [f"{rate / 1e12:.3g}" for rate in (rates.matrix, rates.conv, rates.maps)]
    say("forecast", f"measured: {speeds[0]} TFLOP/s in a block of SD3, {speeds[1]} in its autoencoder, {speeds[2]} in "
        "attention maps; the rest is counted")
    for name in names:
        shapes = costs.published(name)
        for task in COMMANDS:
            report_task(shapes, name, task, rates, device, dtype)
    say("forecast", "checked on a CPU alone, where seconds were within a factor of 1.5 of these; docs/gpu.md has "
        "tables for other cards, and how to send what you have measured")


# ---------------------------------------------------------------------------- the whole report


def report(name: str | None, device: str, dtype: str, root: Path | None) -> None:
    """All of it, for one model of weights.NAMES or (None) for all; root: of the data sets, None: the default.

    ValueError: an unknown model or device; the embedded model does not work.
    """
    if name is not None and name not in weights.NAMES:
        raise ValueError(f"doctor knows the models {', '.join(weights.NAMES)}, not {name!r}")
    if name == "flux-released":
        name = "flux"                                    # the same files, read in another way
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    report_machine(device, dtype)
    report_models(name)
    report_data(ROOT if root is None else root)
    problem = self_test(device, dtype)
    if problem is not None:
        raise ValueError(f"the embedded model nano does not work on {device}: {problem}")
    names = ["sd3", "flux"] if name is None else [name]
    names = [name for name in names if name in costs.TRANSFORMERS]
    if names:
        report_forecasts(names, device, dtype)

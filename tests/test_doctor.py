"""doctor: every branch of its report, and an exit code that depends on the embedded model alone."""
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pretend import pretend

from support import weights
from tools import doctor, forecast

RATES = forecast.Rates(matrix=50e12, conv=40e12, maps=20e12, copy=10e9)
SELF_TEST = doctor.self_test


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with nothing on it, and a burst that takes no time; its folder."""
    monkeypatch.setattr(doctor.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(forecast, "burst", lambda shapes, device, dtype: RATES)
    monkeypatch.setattr(doctor, "self_test", lambda device, dtype: None)
    return tmp_path


@pytest.fixture
def one_scene(machine, tiny_file, monkeypatch):
    """The true self-test, but of a tiny model on one scene, whose score is no matter."""
    monkeypatch.setitem(weights.EMBEDDED, "nano", tiny_file)
    monkeypatch.setattr(doctor, "self_test", SELF_TEST)
    monkeypatch.setattr(doctor, "SCENES", 1)
    monkeypatch.setattr(doctor, "TOLERANCE", 100)


@pytest.fixture
def lines(capsys):
    """Runs the report -> what it said of each fact: {"data": [...], ...}."""
    def run(model=None, device="cpu", dtype="auto", root=Path("none")):
        doctor.report(model, device, dtype, root)
        said = {}
        for line in capsys.readouterr().out.splitlines():
            fact, _, words = line.partition(":")
            said.setdefault(fact, []).append(words.strip())
        return said
    return run


def cached(folder: Path, repo: str, files: list[str]) -> None:
    """Files of a repository as the hub's client puts them in its cache."""
    base = folder / "cache" / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs/main").write_text("abc")
    for file in files:
        path = base / "snapshots/abc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")


def voc(root: Path, *missing: str) -> None:
    """A Pascal VOC of two pictures, without what is missing."""
    base = root / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("one\ntwo\n")
    for name in ("one", "two"):
        Image.new("RGB", (8, 6)).save(base / f"JPEGImages/{name}.jpg")
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(base / f"SegmentationClass/{name}.png")
    for name in missing:
        (base / name).unlink()


# ---------------------------------------------------------------------------- this machine, models, data


def test_nothing_is_there(machine, lines):
    """Each missing thing has what mends it, and that is no error."""
    said = lines()
    assert said["torch"][0].startswith(torch.__version__) and said["used"][0].startswith("cpu, float32")
    assert re.fullmatch(r"cpu, \d+ cores, [\d.]+ GB", said["device"][-1])
    models = said["model"]
    assert models[0] == "nano: 11.6 MB, embedded"
    page = "https://huggingface.co/stabilityai/stable-diffusion-3-medium"
    assert f"sd3: 0 of 4 files in the cache; licence: {page}" in models
    assert "flux-schnell: 0 of 7 files in the cache" in models
    assert models[-2].endswith(f"downloads to {machine / 'cache'}")
    assert "`python evaluate.py --model NAME`" in models[-1]
    assert "`hf auth login`" in said["login"][0]
    (data,) = said["data"]
    assert data == "there is no folder none (--data-root or SEG4DIFF_DATA); docs/data.md says what belongs there"
    assert len(said["forecast"]) == 1 + 2 * 3 + 1
    assert sum(map(len, said.values())) + 2 + 7 <= 40    # a screen, the self-test and more lines on data sets included


def test_the_released_flux_is_flux(machine, lines):
    assert lines("flux-released")["model"][0].startswith("flux: 0 of 7 files in the cache; licence: ")


def test_a_gpu_that_pytorch_does_not_see(machine, lines, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda program: f"/bin/{program}")
    assert "PyTorch does not see it: https://pytorch.org/get-started" in lines("nano")["torch"][1]


@pytest.mark.parametrize("there", [True, False])
def test_every_embedded_model(machine, lines, monkeypatch, there):
    path = machine / "nano-flux.safetensors"
    if there:
        path.write_bytes(bytes(12_300_000))
    monkeypatch.setitem(weights.EMBEDDED, "nano-flux", path)
    wanted = "12.3 MB, embedded" if there else "not there; nano/flux.md says how it is trained"
    assert lines("nano-flux")["model"][0] == f"nano-flux: {wanted}"


def test_where_the_training_of_nano_is_told(monkeypatch, capsys):
    monkeypatch.setitem(weights.EMBEDDED, "nano", Path("nowhere"))
    doctor.report_embedded("nano")
    assert "nano: not there; nano/README.md says how it is trained" in capsys.readouterr().out


def test_a_model_in_the_cache_and_a_token(machine, lines):
    repo = weights.HUB["sd3"][0]
    cached(machine, repo, ["sd3_medium.safetensors", "text_encoders/clip_l.safetensors"])
    cached(machine, weights.TOKENIZER[0], ["merges.txt"])
    said = lines("sd3")
    assert said["model"][0].startswith("sd3: 3 of 4 files in the cache, without text_encoders/clip_g.safetensors; lic")
    cached(machine, repo, ["text_encoders/clip_g.safetensors"])
    (machine / "token").write_text("")
    said = lines("sd3")
    assert said["model"][0] == "sd3: in the cache" and said["login"] == ["a token is there"]


def test_what_is_needed_is_what_is_loaded(machine, monkeypatch):
    """files_of names the files that weights.find asks the hub for."""
    asked = []

    def hub(repo, file):
        asked.append((repo, file))
        return machine / "x"

    keys = {"sd3": ["model.diffusion_model.x", "first_stage_model.x"], "flux": ["single_blocks.0.x", "guidance_in.x"]}
    (machine / "x").write_text("")
    monkeypatch.setattr(weights, "hub", hub)
    monkeypatch.setattr(weights, "header", lambda files: {})
    for name, held in keys.items():
        asked.clear()
        monkeypatch.setattr(weights, "keys_of", lambda path, held=held: held)
        weights.find(name)
        assert sorted(asked) == sorted(doctor.files_of(name))


def test_data_sets(machine, lines):
    """One that is there but for a file, and is smaller than it should be; what is missing of the others."""
    voc(machine, "SegmentationClass/two.png")
    context = machine / "VOCdevkit/VOC2010"
    (context / "JPEGImages").mkdir(parents=True)
    (context / "JPEGImages/one.jpg").write_text("")
    (context / "trainval_merged.json").write_text("{")
    said = lines("nano", root=machine)["data"]
    assert said[0].startswith("voc: 2 pictures; also voc21; 1449 were expected; missing files: 1, the first is ")
    assert said[0].endswith("two.png: unpack its archive again")
    assert said[1].startswith("context59: ") and "trainval_merged.json' cannot be read as a JSON file" in said[1]
    assert any(line.startswith("ade20k: there is no ") for line in said)
    assert any(line.startswith("coco (train2017, for train_magnet.py): there is no ") for line in said)
    assert said[-1].startswith(f"looked below {machine}")


def test_folders_and_names_that_cannot_be_read(machine, lines, monkeypatch):
    """A folder that may not be listed, a name that no file can have: said, and the report goes on."""
    def forbidden(root):
        raise PermissionError(13, "Permission denied", str(root))
    monkeypatch.setitem(doctor.DATASETS, "ade20k", forbidden)
    voc(machine)
    (machine / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("one\n" + "x" * 5000 + "\n")
    said = lines("nano", root=machine)["data"]
    assert said[0].startswith("voc: 2 pictures") and "missing files: 2, the first is " in said[0]
    assert any(line.startswith("ade20k: ") and "Permission denied" in line for line in said)


# ---------------------------------------------------------------------------- the embedded model


def test_nano_as_it_is(lines):
    """The committed model on all the scenes of the self-test, with the tolerance that is stated; no forecast for it."""
    said = lines("nano")
    assert f"{doctor.MIOU} +- {doctor.TOLERANCE} were expected" in said["self-test"][0]
    assert "differ from the CPU's by 0.0e+00 at most" in said["self-test"][1] and "forecast" not in said


def test_a_broken_nano(machine, one_scene, command, monkeypatch):
    broken = machine / "nano.safetensors"
    broken.write_bytes(weights.NANO.read_bytes()[:-1000])
    monkeypatch.setitem(weights.EMBEDDED, "nano", broken)
    code, out, err = command("seg4diff.py", "doctor", "--data-root", "none")
    assert code == 2 and err.count("\n") == 1 and "forecast" not in out and "login" in out
    assert err.startswith("error: the embedded model nano does not work on cpu: ") and str(broken) in err


def test_a_nano_that_scores_otherwise(one_scene, lines, monkeypatch):
    monkeypatch.setattr(doctor, "MIOU", -101)
    with pytest.raises(ValueError, match=r"does not work on cpu: its mIoU is [\d.]+ %, not -101"):
        lines()


def test_maps_that_differ(one_scene, lines, monkeypatch):
    monkeypatch.setattr(doctor, "DIFFERENCE", {torch.bfloat16: 1e-9})
    with pytest.raises(ValueError, match="its maps differ from the CPU's by"):
        lines(dtype="bfloat16")


def test_the_command(machine, command):
    code, out, err = command("seg4diff.py", "doctor", "--model", "nano", "--device", "cpu", "--data-root", machine)
    assert (code, err) == (0, "") and f"looked below {machine}" in out
    code, _, err = command("seg4diff.py", "doctor", "--model", "sd4")
    assert code == 2 and "not 'sd4'" in err
    code, _, err = command("seg4diff.py", "doctor", "--device", "cuda:7")
    assert code == 2 and "no device 'cuda:7'" in err


# ---------------------------------------------------------------------------- forecasts


@pytest.fixture
def card(machine, monkeypatch):
    """A pretended GPU of so many GB, and a host with 128 GB."""
    def of(gigabytes):
        properties = SimpleNamespace(name="Pretended", total_memory=1e9 * gigabytes)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(doctor, "host_memory", lambda: 128e9)
    return of


def test_a_gpu_of_80_gb(card, one_scene, lines):
    card(80)
    with pretend("cuda"):
        said = lines(device="cuda")
    assert said["device"][0] == "cuda:0, Pretended, 80.0 GB, compute capability 8.0"
    assert said["used"][0].startswith("cuda:0, bfloat16") and "cuda:0 differ" in said["self-test"][1]
    told = dict(line.partition(": ")[::2] for line in said["forecast"])
    assert told["measured"].startswith("50 TFLOP/s in a block of SD3, 40 in its autoencoder, 20 in attention maps")
    # 4.88 TFLOP at 40, 3.34 at 50, 0.16 at 20 TFLOP/s: 0.197 s a picture
    assert told["evaluate.py --dataset voc --model sd3"] == "4.7 min, 197 ms a picture; 4.5 of 79.0 GB"
    assert not any("fit" in line or "waiting" in line for line in told.values())


def test_a_gpu_of_8_gb(card, lines):
    """An old one: float16, in which nothing is trained; Flux's blocks wait."""
    card(8)
    with pretend("cuda", (7, 5)):
        said = lines(device="cuda")
    assert said["used"][0].startswith("cuda:0, float16")
    told = dict(line.partition(": ")[::2] for line in said["forecast"])
    assert "4.5 of 7.0 GB" in told["evaluate.py --dataset voc --model sd3"]
    drawn = told["seg4diff.py generate --model sd3"]
    assert re.fullmatch(r"does not fit, 7.3 of 7.0 GB; --device cpu, which takes 1\d.\d GB of host memory and is slow, "
                        "makes it fit", drawn)
    assert "with --dtype float32" in told["train_magnet.py --dataset coco --model sd3"]
    flux = told["evaluate.py --dataset voc --model flux"]
    assert "T5 and the transformer waiting in 18.1 of 128.0 GB of host memory" in flux and "fit" not in flux


def test_a_gpu_of_16_gb(card, lines):
    """An old one: what MAGNET needs, both options in one."""
    card(16)
    with pretend("cuda", (7, 5)):
        said = lines("sd3", device="cuda")
    assert any(line.endswith("; --dtype float32 --batch 1 makes it fit") for line in said["forecast"])


def test_halves():
    assert doctor.half(torch.device("cpu")) == torch.bfloat16 and doctor.half(torch.device("mps")) is None


def test_no_option_helps(card, lines, monkeypatch):
    card(8)
    monkeypatch.setattr(doctor, "host_memory", lambda: 8e9)
    with pretend("cuda"):
        said = lines("sd3", device="cuda")
    assert any(line.endswith("7.3 of 7.0 GB; no option makes it fit") for line in said["forecast"])
    assert not any("--dtype" in line for line in said["forecast"])
    monkeypatch.setattr(doctor, "host_memory", lambda: 10e9)
    said = lines("sd3")                                  # on the CPU, in float32
    assert any("generate --model sd3: does not fit, 14.6 of 10.0 GB; --dtype bfloat16 makes it fit" in line
               for line in said["forecast"])


def test_too_little_host_memory_for_what_waits(card, lines, monkeypatch):
    card(8)
    monkeypatch.setattr(doctor, "host_memory", lambda: 16e9)
    with pretend("cuda"):
        said = lines("flux", device="cuda")
    told = dict(line.partition(": ")[::2] for line in said["forecast"])
    assert told["evaluate.py --dataset voc --model flux"] == (
        "does not fit, 2.7 of 7.0 GB, T5 and the transformer waiting in 18.1 of 16.0 GB of host memory; "
        "no option makes it fit")


def test_a_mac(machine, lines, monkeypatch):
    """Its GPU uses the machine's memory, and 16 bits are no way out."""
    monkeypatch.setattr(doctor, "host_memory", lambda: 12e9)
    with pretend("mps"):
        said = lines("sd3", device="mps")
    assert said["device"][0] == "mps, Apple's GPU" and said["used"][0].startswith("mps, float32")
    told = dict(line.partition(": ")[::2] for line in said["forecast"])
    assert told["evaluate.py --dataset voc --model sd3"].endswith("; 8.9 of 12.0 GB")
    assert told["seg4diff.py generate --model sd3"] == "does not fit, 14.6 of 12.0 GB; no option makes it fit"


def test_a_system_that_does_not_tell_its_memory(machine, lines, monkeypatch):
    monkeypatch.setattr(doctor.os, "sysconf_names", {})
    said = lines("sd3")
    assert said["device"][-1].endswith("cores, an unknown number of GB")
    assert all("not fit" not in line for line in said["forecast"])


def test_a_burst_without_memory(machine, lines, monkeypatch):
    def burst(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
    monkeypatch.setattr(forecast, "burst", burst)
    assert lines()["forecast"] == ["a single block of SD3 does not fit this device now; other programs may hold its "
                                   "memory"]

    def mistake(*args):
        raise RuntimeError("shapes do not match")
    monkeypatch.setattr(forecast, "burst", mistake)
    with pytest.raises(RuntimeError, match="shapes"):
        lines()


"""The two command lines as a person types them: pictures of the right size, or one sentence and exit code 2."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import seg4diff
from nano import scenes

ROOT = Path(seg4diff.__file__).parent


@pytest.fixture(scope="session")
def models(tiny_file, tmp_path_factory) -> Path:
    """Model files that are none, or do not fit."""
    at = tmp_path_factory.mktemp("models")
    (at / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:-1000])
    (at / "words.safetensors").write_text("not a model")
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)}, at / "lora.safetensors")
    tensors = load_file(tiny_file)
    with safe_open(tiny_file, framework="pt") as f:
        meta = f.metadata()
    save_file({k: v for k, v in tensors.items() if "diffusion_model" not in k}, at / "half.safetensors")
    key = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    for name, change in (("missing", {key: None}), ("surplus", {key + "s": torch.zeros(2)}),
                         ("misshapen", {key: tensors[key][1:]})):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, at / f"{name}.safetensors", meta)
    for name, size in (("large", 1024), ("odd", 100)):           # nano's VAE shrinks by 8; it has 24 x 24 positions
        presets = json.dumps(json.loads(meta["presets"]) | {"size": size})
        save_file(tensors, at / f"{name}.safetensors", meta | {"presets": presets})
    return at


@pytest.fixture
def folder(tmp_path, models) -> Path:
    """Good and bad input, below the folder that commands are run in."""
    Image.fromarray(scenes.draw(0).image).resize((60, 45)).save(tmp_path / "photo.png")
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "empty").mkdir()
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------------------- what works


def test_segment(command, folder, tiny, tiny_file):
    names = ["car", "sky", "teddy bear"]
    code, out, err = command("seg4diff.py", "segment", "photo.png", *names, "--model", tiny_file, "--device", "cpu")
    assert (code, err) == (0, "")
    *areas, last = out.splitlines()
    labels = seg4diff.segment(tiny, Image.open(folder / "photo.png"), names).labels
    assert [line.rsplit(maxsplit=1)[0] for line in areas] == names
    assert [line.split()[-1] for line in areas] == [f"{(labels == k).mean():.1%}" for k in range(3)]
    assert last == "wrote overlay.png"
    overlay = Image.open(folder / "overlay.png")                             # 60 x 45, enlarged to 512 x 384
    assert overlay.width == 2 * 512 + 4 and 384 < overlay.height < 384 + 100
    shown = Image.open(folder / "photo.png").resize((512, 384), Image.Resampling.BILINEAR)
    assert (np.asarray(overlay.crop((0, 0, 512, 384))) == np.asarray(shown)).all()


def test_segment_options(command, folder, tiny_file):
    def run(*options):
        fixed = ("photo.png", "car", "sky", "snow", "--model", tiny_file, "--device", "cpu", "--out", "o.png")
        code, _, err = command("seg4diff.py", "segment", *fixed, *options)
        assert (code, err) == (0, "")
        return (folder / "o.png").read_bytes()

    usual = run()
    assert usual == run("--block", 1, "--seed", 0)
    others = [run("--block", 2), run("--sigma", 0.9), run("--seed", 1)]
    assert len({usual, *others}) == 4


@pytest.mark.parametrize("size", [(1, 1), (700, 9), (5, 300), (3000, 2000)])
def test_segment_any_aspect_ratio(command, folder, tiny_file, size):
    Image.new("RGBA", size, (200, 30, 30, 128)).save(folder / "strip.png")
    code, _, err = command("seg4diff.py", "segment", "strip.png", "car", "--model", tiny_file, "--out", "o.jpg")
    assert (code, err) == (0, "")
    scale = min(max(512, max(size)), 1024) / max(size)                        # neither tiny nor larger than a screen
    out = Image.open(folder / "o.jpg")
    assert out.width >= 2 * max(1, round(size[0] * scale)) + 4 and round(size[1] * scale) < out.height <= 1100


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_segment_any_kind_of_picture(command, folder, tiny_file, mode):
    """Palettes, transparency, 16 bits and so on: what a person sees is what is segmented."""
    grey = Image.open(folder / "photo.png").convert("L")
    image = Image.fromarray(257 * np.asarray(grey, np.uint16)) if mode == "I;16" else grey.convert(mode)
    path = folder / ("p.tif" if mode in ("CMYK", "F") else "p.png")
    image.save(path)
    shown = []
    for name in (path, "grey.png"):
        grey.save(folder / "grey.png")
        code, _, err = command("seg4diff.py", "segment", name, "car", "sky", "--model", tiny_file, "--out", "o.png")
        assert (code, err) == (0, "")
        shown.append(np.asarray(Image.open(folder / "o.png"), int))
    if mode != "1":                                              # which is black and white dots
        assert np.abs(shown[0][:384, :512] - shown[1][:384, :512]).max() <= 3


def test_segment_200_classes(command, folder, tiny, tiny_file):
    """They take many prompts; every name is told, in order, and their areas make up the picture."""
    names = [f"{c} {n} {i}" for i, (c, n) in enumerate((c, n) for c in scenes.COLOURS for n in scenes.CLASSES * 3)][:200]
    assert len(set(names)) == 200 and len(seg4diff.split_classes(tiny.text, names)) > 20
    code, out, err = command("seg4diff.py", "segment", "photo.png", *names, "--model", tiny_file)
    areas = [line.rsplit(maxsplit=1) for line in out.splitlines()[:-1]]
    assert (code, err) == (0, "") and [name for name, _ in areas] == names
    assert sum(float(share.rstrip("%")) for _, share in areas) == pytest.approx(100, abs=0.05 * 200)
    labels = seg4diff.segment(tiny, Image.open(folder / "photo.png"), names).labels
    assert labels.max() > 26 and [share for _, share in areas] == [f"{(labels == k).mean():.1%}" for k in range(200)]
    code, _, err = command("seg4diff.py", "segment", "photo.png", *names, *names, "--model", tiny_file)
    assert code == 2 and "at most 255 class names" in err


def test_generate(command, folder, tiny_file):
    def run(*options):
        fixed = ("--model", tiny_file, "--device", "cpu", "--steps", 2, "--out", "g.png")
        code, out, err = command("seg4diff.py", "generate", *options, *fixed)
        assert code == 0 and "wrote g.png" in out and "2/2" in err, err
        return np.asarray(Image.open(folder / "g.png"))

    usual = run("a red car")
    assert usual.shape == (128, 128, 3) and (usual == run("a red car", "--seed", 0)).all()
    for other in (["snow"], ["a red car", "--seed", 1], ["a red car", "--cfg", 1]):
        assert (run(*other) != usual).any()
    assert run("a red car", "snow").shape[1] > 2 * 128                       # a sheet


def test_in_a_process_of_its_own(folder, tiny_file):
    """From another folder, with nothing imported before."""
    def run(script, *args):
        return subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=folder, text=True,
                              capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    good = run("seg4diff.py", "segment", "photo.png", "car", "sky", "--model", tiny_file, "--out", "o.png")
    assert (good.returncode, good.stderr) == (0, "") and Image.open(folder / "o.png").width == 1028
    before = files(folder)
    bad = run("evaluate.py", "--model", "cut.safetensors", "--limit", 1)
    assert bad.returncode == 2 and bad.stderr.startswith("error: cut.safetensors") and bad.stderr.count("\n") == 1
    assert files(folder) == before


# ---------------------------------------------------------------------------- what does not


SEGMENT = [
    (["none.png", "car"], "'none.png'"), (["words.png", "car"], "not a picture"), ([".", "car"], "'.'"),
    (["photo.png", ""], "no token"), (["photo.png", "car", "   "], "'   ' has no token"),
    (["photo.png", "x" * 200], "room for 26"), (["photo.png", "car", "--sigma", "2"], "not 2.0"),
    (["photo.png", "car", "--sigma", "nan"], "not nan"), (["photo.png", "car", "--block", "99"], "blocks are 0 to 2"),
    (["photo.png", "car", "--block", "-1"], "no block -1"), (["photo.png", "car", "--device", "gpu"], "cpu or cuda"),
    (["photo.png", "car", "--out", "words.png/o.png"], "words.png/o.png"),
    (["photo.png", "car", "--out", "none/o.png"], "none/o.png"),
    (["photo.png", "car", "--out", "o.picture"], ".picture"), (["photo.png", "car", "--out", "o.psd"], ".psd"),
    (["photo.png", "car", "--dtype", "int8"], "dtype must be")]
GENERATE = [(["car", "--steps", "-1"], "at least one step"), (["car", "--device", "gpu"], "cpu or cuda")]
EVALUATE = [
    (["--task", "layer"], "choose one of ovss, unsup"), (["--dataset", "imagenet"], "choose one of scenes"),
    (["--limit", "0"], "at least 1"), (["--limit", "-3"], "at least 1"), (["--batch-size", "0"], "at least 1"),
    (["--device", "gpu"], "cpu or cuda"), (["--limit", "1", "--out", "words.png"], "words.png"),
    (["--limit", "1", "--out", "words.png/o"], "words.png/o"), (["--draws", "0"], "at least 1"),
    (["--prompt", "some"], "present, all"), (["--resize", "pad"], "squash, crop"),
    (["--scaling", "pixel", "--task", "unsup"], "map, token, none"), (["--threshold", "0", "--task", "unsup"], "positive"),
    (["--threshold", "nan", "--task", "unsup"], "positive"), (["--threshold", "0.1"], "--task unsup"),
    (["--scaling", "map", "--task", "layers"], "--task unsup"), (["--task", "unsup", "--prompt", "all"], "empty prompt"),
    (["--task", "heads", "--dataset", "all"], "ovss or unsup"), (["--classes", "car"], "go together"),
    (["--dataset", "folder"], "go together"), (["--dataset", "folder", "--data-root", "none", "--classes", "a"], "none")]
MODELS = [("none", "known names are nano"), ("none.safetensors", "known names are nano"),
          ("cut.safetensors", "cannot be read"), ("words.safetensors", "cannot be read"),
          ("half.safetensors", "no SD3 model file"), ("photo.png", "cannot be read"), ("empty", "0 model files"),
          ("lora.safetensors", "looks like a LoRA"), ("missing.safetensors", "1 missing: "),
          ("surplus.safetensors", "1 surplus: "), ("misshapen.safetensors", "1 misshapen: "),
          ("large.safetensors", "104 patches of a side beyond"), ("odd.safetensors", "pixels beyond whole patches")]
CASES = [("seg4diff.py", ["segment", *args], told) for args, told in SEGMENT]
CASES += [("seg4diff.py", ["generate", *args], told) for args, told in GENERATE]
CASES += [("evaluate.py", args, told) for args, told in EVALUATE]
CASES += [(script, [*args, "--model", model], told) for model, told in MODELS
          for script, args in (("seg4diff.py", ["segment", "photo.png", "car"]), ("seg4diff.py", ["generate", "car"]),
                               ("evaluate.py", ["--limit", "1"]))]


@pytest.mark.parametrize("script, args, told", CASES, ids=[" ".join(args)[:60] for _, args, _ in CASES])
def test_one_sentence_and_code_2(command, folder, tiny_file, script, args, told):
    before = files(folder)
    model = [] if "--model" in args else ["--model", tiny_file]
    code, _, err = command(script, *args, *model)
    lines = [line for line in err.splitlines() if line and "sampling:" not in line]          # but for a progress bar
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0], err
    assert "Traceback" not in err and files(folder) == before


@pytest.mark.parametrize("script, args, told", [
    ("nano/scenes.py", ["--first", "10000"], "0 to 9999"), ("nano/scenes.py", ["--out", "none/o.png"], "none/o.png"),
    ("nano/pretrain.py", ["--device", "cuda"], "use cpu"), ("nano/pretrain.py", ["--width", "100"], "multiple"),
    ("nano/pretrain.py", ["--scenes", "0"], "--scenes"), ("nano/curves.py", ["--run", "none"], "mmdit.pt")])
def test_nano_answers_in_a_sentence(command, folder, monkeypatch, script, args, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = files(folder)
    code, _, err = command(script, *args, *(["--run", "r"] if "pretrain" in script else []))
    assert code == 2 and err.startswith("error: ") and told in err and err.count("\n") == 1 and files(folder) == before


def test_too_little_memory(command, folder, tiny_file, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    monkeypatch.setattr(seg4diff, "attend", full)
    code, _, err = command("evaluate.py", "--limit", 1, "--model", tiny_file, "--device", "cpu", "--out", "o")
    assert code == 2 and err.splitlines()[-1].startswith("error: the device has too little memory")


@pytest.mark.parametrize("script, args", [
    ("seg4diff.py", []), ("seg4diff.py", ["segment", "photo.png"]), ("seg4diff.py", ["paint"]),
    ("seg4diff.py", ["generate"]), ("seg4diff.py", ["segment", "photo.png", "car", "--sigma", "low"]),
    ("evaluate.py", ["--limit", "many"]), ("evaluate.py", ["--nonsense"])])
def test_usage(command, folder, script, args):
    before = files(folder)
    code, out, err = command(script, *args)
    assert code == 2 and err.startswith("usage: ") and "error: " in err.splitlines()[-1]
    assert out == "" and files(folder) == before


def test_a_data_set_that_is_not_there(command, folder):
    code, _, err = command("evaluate.py", "--dataset", "voc", "--data-root", "nowhere")
    assert code == 2 and err.startswith("error: data set 'voc'") and "nowhere" in err and "Traceback" not in err


def test_a_picture_too_large_to_open(command, folder, tiny_file, monkeypatch):
    """PIL refuses what would fill the memory; here the bound is lowered instead of a picture of 180 megapixels made."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    code, _, err = command("seg4diff.py", "segment", "photo.png", "car", "--model", tiny_file)
    assert code == 2 and err.startswith("error: 'photo.png'") and "pixels" in err and err.count("\n") == 1


def test_no_room_for_the_results(command, folder, tiny_file, monkeypatch):
    """The ledger is complete, the summary finds the disk full: one sentence, and the same command only writes it."""
    options = ("--limit", 2, "--model", tiny_file, "--device", "cpu", "--out", "o")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(Path, "write_text", full)
        code, _, err = command("evaluate.py", *options)
    assert code == 2 and "error: [Errno 28] No space left on device" in err and "Traceback" not in err
    assert not (folder / "o/results.json").exists()
    code, _, err = command("evaluate.py", *options)
    assert code == 0 and (folder / "o/results.json").exists() and len(list((folder / "o").glob("*.jsonl"))) == 1


def test_out_is_tried_before_the_work(command, folder, tiny_file):
    options = ("--model", tiny_file, "--steps", 2, "--out", "none/g.png")
    code, _, err = command("seg4diff.py", "generate", "car", *options)
    assert code == 2 and err.startswith("error: ") and "none/g.png" in err

"""The command lines as a person types them: pictures of the right size, or one sentence and exit code 2."""
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import loading
import seg4diff
from nano import scenes
from support.pictures import panels

ROOT = Path(seg4diff.__file__).parent


@pytest.fixture
def folder(tmp_path, tiny_file) -> Path:
    """Good and bad input, below the folder that commands are run in."""
    Image.fromarray(scenes.draw(0).image).resize((60, 45)).save(tmp_path / "photo.png")
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:-1000])
    return tmp_path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---------------------------------------------------------------------------- what works


def test_segment(command, folder, tiny, tiny_file):
    names = ["car", "sky", "teddy bear"]
    code, out, err = command("seg4diff.py", "segment", "photo.png", *names, "--model", tiny_file, "--device", "cpu")
    assert (code, err) == (0, "")
    reading, *areas, last = out.splitlines()
    assert reading == "reading: i2i (beyond the paper; --reading paper gives the paper's)"
    labels = seg4diff.segment(tiny, Image.open(folder / "photo.png"), names, reading="i2i").labels
    assert [line.rsplit(maxsplit=1)[0] for line in areas] == names
    assert [line.split()[-1] for line in areas] == [f"{(labels == k).mean():.1%}" for k in range(3)]
    assert last == "wrote overlay.png; to look into the attention: python explore.py photo.png CLASS..."
    overlay = Image.open(folder / "overlay.png")                             # 60 x 45, enlarged to 512 x 384
    assert overlay.width == 2 * 512 + 4 and 384 < overlay.height < 384 + 100
    shown = Image.open(folder / "photo.png").resize((512, 384), Image.Resampling.BILINEAR)
    assert (np.asarray(overlay.crop((0, 0, 512, 384))) == np.asarray(shown)).all()


def test_segment_options(command, folder, tiny, tiny_file):
    """All reach seg4diff.segment: the picture is that of the same options, and of no fewer."""
    options = {"block": 2, "sigma": 0.9, "seed": 1, "reading": "paper"}
    names = ["car", "sky", "snow"]
    arguments = [x for key, value in options.items() for x in (f"--{key}", value)]
    fixed = ("--model", tiny_file, "--out", "o.png")
    code, _, err = command("seg4diff.py", "segment", "photo.png", *names, *fixed, *arguments)
    assert (code, err) == (0, "")
    photo = Image.open(folder / "photo.png")
    labels = seg4diff.segment(tiny, photo, names, **options).labels
    assert (np.asarray(Image.open(folder / "o.png")) == np.asarray(panels(photo, labels, names))).all()
    for option in ("block", "sigma", "seed"):
        fewer = {key: value for key, value in options.items() if key != option}
        assert (seg4diff.segment(tiny, photo, names, **fewer).labels != labels).any()
    assert (seg4diff.segment(tiny, photo, names, **options | {"reading": "i2i"}).labels != labels).any()


@pytest.mark.parametrize("size", [(1, 1), (700, 9), (5, 300), (1500, 1000)])
def test_segment_any_aspect_ratio(command, folder, tiny_file, size):
    """Also of strips; what is shown is neither tiny nor larger than a screen."""
    Image.new("RGBA", size, (200, 30, 30, 128)).save(folder / "strip.png")
    code, _, err = command("seg4diff.py", "segment", "strip.png", "car", "--model", tiny_file, "--out", "o.jpg")
    assert (code, err) == (0, "")
    scale = min(max(512, max(size)), 1024) / max(size)
    out = Image.open(folder / "o.jpg")
    assert out.width >= 2 * max(1, round(size[0] * scale)) + 4 and round(size[1] * scale) < out.height <= 1100


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "F"])
def test_segment_any_kind_of_picture(command, folder, tiny_file, mode):
    """Palettes, transparency, 16 bits and so on: what a person sees is what is segmented, and is shown."""
    grey = Image.open(folder / "photo.png").convert("L")
    image = Image.fromarray(257 * np.asarray(grey, np.uint16)) if mode == "I;16" else grey.convert(mode)
    name = "p.tif" if mode in ("CMYK", "F") else "p.png"
    image.save(folder / name)
    code, _, err = command("seg4diff.py", "segment", name, "car", "sky", "--model", tiny_file, "--out", "o.png")
    assert (code, err) == (0, "")
    if mode != "1":                                              # which is black and white dots
        shown = np.asarray(Image.open(folder / "o.png").crop((0, 0, 512, 384)), int)
        want = np.asarray(grey.convert("RGB").resize((512, 384), Image.Resampling.BILINEAR), int)
        assert np.abs(shown - want).max() <= 3


def test_segment_200_classes(command, folder, tiny, tiny_file):
    """They take many prompts; every name is printed, in order, and their areas make up the picture."""
    coloured = [f"{c} {name}" for c in scenes.COLOURS for name in scenes.CLASSES * 3]
    names = [f"{name} {i}" for i, name in enumerate(coloured[:200])]
    assert len(set(names)) == 200 and len(seg4diff.split_classes(tiny.text, names)) > 20
    code, out, err = command("seg4diff.py", "segment", "photo.png", *names, "--model", tiny_file)
    areas = [line.rsplit(maxsplit=1) for line in out.splitlines()[1:-1]]
    assert (code, err) == (0, "") and [name for name, _ in areas] == names
    assert sum(float(share.rstrip("%")) for _, share in areas) == pytest.approx(100, abs=0.05 * 200)
    labels = seg4diff.segment(tiny, Image.open(folder / "photo.png"), names, reading="i2i").labels
    assert labels.max() > 26 and [share for _, share in areas] == [f"{(labels == k).mean():.1%}" for k in range(200)]
    code, _, err = command("seg4diff.py", "segment", "photo.png", *names, *names, "--model", tiny_file)
    assert code == 2 and "at most 255 class names" in err


def test_generate(command, folder, tiny, tiny_file):
    def run(*options):
        fixed = ("--model", tiny_file, "--device", "cpu", "--steps", 2, "--out", "g.png")
        code, out, err = command("seg4diff.py", "generate", *options, *fixed)
        assert code == 0 and "wrote g.png" in out and "2/2" in err, err
        return np.asarray(Image.open(folder / "g.png"))

    usual = run("a red car")
    assert usual.shape == (128, 128, 3)
    assert (usual == np.asarray(seg4diff.generate(tiny, "a red car", steps=2)[0])).all()
    options = {"seed": 1, "cfg": 2.0, "pag": 4.0, "blocks": [0, 2], "perturb": [1]}
    all_of_them = run("snow", "--seed", 1, "--cfg", 2, "--pag", 4, "--blocks", 0, 2, "--perturb", 1)
    assert (all_of_them == np.asarray(seg4diff.generate(tiny, "snow", steps=2, **options)[0])).all()
    for dropped in (["seed"], ["cfg"], ["blocks"], ["pag", "blocks"], ["perturb"]):
        fewer = {key: value for key, value in options.items() if key not in dropped}
        assert (all_of_them != np.asarray(seg4diff.generate(tiny, "snow", steps=2, **fewer)[0])).any(), dropped
    sheet = run("a red car", "snow", "--cfg", 1)
    assert sheet.shape[1] > 2 * 128


def process(folder: Path, *args, **environment: str) -> subprocess.Popen:
    """`python seg4diff.py segment photo.png ...` in a process of its own, its stdout and stderr in pipes."""
    return subprocess.Popen([sys.executable, ROOT / "seg4diff.py", "segment", "photo.png", *args], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)


def test_in_a_process_of_its_own(folder, tiny_file):
    """From another folder, with nothing imported before, and nothing on stderr; on a terminal that has no umlauts."""
    args = ("größe", "sky", "--model", tiny_file, "--out", "o.png")
    run = process(folder, *args, PYTHONIOENCODING="ascii")
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "") and "wrote o.png" in out and out.splitlines()[1].startswith(r"gr\xf6\xdfe ")
    assert Image.open(folder / "o.png").width == 1028


def test_nobody_reads_what_is_printed(folder, tiny_file):
    """`... | head -0`: the picture is on the disk by then, so this is no error."""
    run = process(folder, "car", "--model", tiny_file, "--out", "o.png")
    run.stdout.close()
    err = run.stderr.read()
    run.stderr.close()
    assert (run.wait(), err) == (0, "") and Image.open(folder / "o.png").width == 1028


# ---------------------------------------------------------------------------- what does not


SEGMENT = [
    (["none.png", "car"], "'none.png'"), (["words.png", "car"], "'words.png' cannot be read"), ([".", "car"], "'.'"),
    (["photo.png", ""], "no token"), (["photo.png", "car", "   "], "'   ' has no token"),
    (["photo.png", "x" * 200], "room for 26"), (["photo.png", "car", "--sigma", "2"], "not 2.0"),
    (["photo.png", "car", "--sigma", "nan"], "not nan"), (["photo.png", "car", "--block", "99"], "blocks are 0 to 2"),
    (["photo.png", "car", "--block", "-1"], "not -1"), (["photo.png", "car", "--model", ""], "no model ''"),
    (["photo.png", "car", "--device", "gpu"], "cpu or cuda"),
    (["photo.png", "car", "--seed", "-1"], "from 0 to"), (["photo.png", "car", "--dtype", "int8"], "dtype must be"),
    (["photo.png", "car", "--out", "words.png/o.png"], "words.png/o.png"),
    (["photo.png", "car", "--out", "none/o.png"], "none/o.png"),
    (["photo.png", "car", "--out", "o.picture"], ".picture"), (["photo.png", "car", "--out", "o.psd"], ".psd"),
    (["photo.png", "car", "--device", "cuda:99999"], "no device 'cuda:99999'"),
    (["photo.png", "car", "--lora", "words.png"], "'words.png' cannot be read as a LoRA"),
    (["photo.png", "car", "--model", "cut.safetensors"], "'cut.safetensors' cannot be read")]
GENERATE = [
    (["car", "--steps", "-1"], "1 to 1000, not -1"), (["car", "--steps", "0"], "1 to 1000, not 0"),
    (["car", "--cfg", "1e300"], "cfg must be"), (["car", "--cfg", "nan"], "not nan"), (["car", "--pag", "inf"], "inf"),
    (["car", "--steps", "1", "--pag", "1e300"], "pixels are not finite"),
    (["car", "--device", "gpu"], "cpu or cuda"), (["car", "--out", "none/g.png"], "none/g.png"),
    (["car", "--perturb", "7"], "no block 7"),
    (["car", "--model", "cut.safetensors"], "'cut.safetensors' cannot be read")]
EVALUATE = [
    (["--seed", "9" * 640], "argument --seed: must be from 0 to 340282366920938463463374607431768211455, not 9999"),
    (["--task", "layer"], "invalid choice: 'layer'"), (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    (["--limit", "0"], "at least 1"), (["--limit", "-3"], "at least 1"), (["--batch-size", "0"], "from 1 to 1024"),
    (["--device", "gpu"], "cpu or cuda"), (["--limit", "1", "--out", "words.png"], "words.png"),
    (["--limit", "1", "--out", "words.png/o"], "words.png/o"), (["--draws", "0"], "from 1 to 1000"),
    (["--prompt", "some"], "'some' (choose from"), (["--resize", "pad"], "'pad' (choose from"),
    (["--scaling", "pixel", "--task", "unsup"], "'pixel' (choose from"),
    (["--threshold", "0", "--task", "unsup"], "positive"), (["--threshold", "nan", "--task", "unsup"], "positive"),
    (["--dataset", "folder"], "seg4diff.py segment"),
    (["--threshold", "0.1"], "--task unsup"), (["--scaling", "map", "--task", "layers"], "--task unsup"),
    (["--task", "unsup", "--prompt", "all"], "empty prompt"),
    (["--task", "heads", "--dataset", "all"], "ovss or unsup"),
    (["--limit", "1", "--model", "cut.safetensors"], "'cut.safetensors' cannot be read")]
OLD = [(["--candidates", "tokens"], "--maps mean or --maps heads"), (["--match", "tokens"], "'tokens' is now 'name'")]
CASES = [("seg4diff.py", ["segment", *args], sentence) for args, sentence in SEGMENT]
CASES += [("seg4diff.py", ["generate", *args], sentence) for args, sentence in GENERATE]
CASES += [("evaluate.py", args, sentence) for args, sentence in EVALUATE]
CASES += [("train_magnet.py", args, sentence) for args, sentence in OLD]


@pytest.mark.parametrize("script, args, sentence", CASES, ids=[" ".join(args)[:60] for _, args, _ in CASES])
def test_one_sentence_and_code_2(command, folder, tiny_file, script, args, sentence):
    before = files(folder)
    model = [] if "--model" in args else ["--model", tiny_file]
    code, _, err = command(script, *args, *model)
    lines = [line for line in err.splitlines() if line and "sampling:" not in line]          # but for a progress bar
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and sentence in lines[0], err
    assert "Traceback" not in err and files(folder) == before


@pytest.mark.parametrize("script, args, sentence", [
    ("seg4diff.py", [], "arguments are required: segment | generate"),
    ("seg4diff.py", ["segment", "photo.png"], "arguments are required: CLASS"),
    ("seg4diff.py", ["paint"], "invalid choice: 'paint'"),
    ("seg4diff.py", ["generate"], "arguments are required: PROMPT"),
    ("seg4diff.py", ["segment", "photo.png", "car", "--sigma", "low"], "--sigma: invalid float value: 'low'"),
    ("evaluate.py", ["--limit", "many"], "--limit: invalid int value: 'many'"),
    ("evaluate.py", ["--nonsense"], "unrecognized arguments: --nonsense")])
def test_what_no_command_understands(command, folder, script, args, sentence):
    before = files(folder)
    code, out, err = command(script, *args)
    assert (code, out) == (2, "") and err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert files(folder) == before


def test_a_data_set_that_is_not_there(command, folder):
    code, _, err = command("evaluate.py", "--dataset", "voc", "--data-root", "nowhere")
    assert code == 2 and err.startswith("error: data set 'voc'") and "nowhere" in err and err.count("\n") == 1
    assert "VOCdevkit/VOC2012/JPEGImages/*.jpg; VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt; " in err


ODD = "no\nsuch\r\x1b[2J\u2028.png"   # line ends of all kinds, and what clears a terminal


@pytest.mark.parametrize("script, args", [
    ("seg4diff.py", ["segment", ODD, "car"]), ("seg4diff.py", ["segment", "photo.png", "car", "--model", ODD]),
    ("seg4diff.py", ["segment", "photo.png", "car", "--out", f"{ODD}/o.png"]),
    ("evaluate.py", ["--dataset", "voc", "--data-root", ODD]), ("evaluate.py", ["--limit", ODD]),
    ("evaluate.py", ["--limit", "1", "--out", f"words.png/{ODD}"])])
def test_the_sentence_is_one_line_whatever_it_holds(command, folder, tiny_file, script, args):
    model = [] if "--model" in args else ["--model", tiny_file]
    code, _, err = command(script, *args, *model)
    shown = r"no\nsuch\r\x1b[2J\u2028.png"
    assert code == 2 and len(err.splitlines()) == 1 and "\x1b" not in err, err
    assert err.startswith("error: ") and shown in err, err


@pytest.mark.parametrize("script, args, sentence", [
    ("nano/scenes.py", ["--first", "10000"], "0 to 9999"), ("nano/scenes.py", ["--out", "none/o.png"], "none/o.png"),
    ("nano/pretrain.py", ["--device", "cuda"], "use cpu"), ("nano/pretrain.py", ["--width", "100"], "multiple"),
    ("nano/pretrain.py", ["--scenes", "0"], "--scenes"), ("nano/curves.py", ["--run", "none"], "mmdit.pt")])
def test_nano_answers_in_a_sentence(command, folder, monkeypatch, script, args, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = files(folder)
    code, _, err = command(script, *args, *(["--run", "r"] if "pretrain" in script else []))
    assert code == 2 and err.startswith("error: ") and sentence in err and err.count("\n") == 1, err
    assert files(folder) == before


def stop_with(error: BaseException):
    def load(*args, **kwargs):
        raise error
    return load


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")])
def test_too_little_memory(command, folder, monkeypatch, error):
    monkeypatch.setattr(loading, "load", stop_with(error))
    code, _, err = command("seg4diff.py", "segment", "photo.png", "car")
    assert code == 2 and err.startswith("error: the device has too little memory") and err.count("\n") == 1


def test_a_mistake_of_ours_surfaces(command, folder, monkeypatch):
    for error in (RuntimeError("shapes differ"), AttributeError("nothing"), KeyError("x"), TypeError("x")):
        monkeypatch.setattr(loading, "load", stop_with(error))
        with pytest.raises(type(error), match=str(error)):
            command("seg4diff.py", "segment", "photo.png", "car")


def test_ctrl_c(command, folder, monkeypatch):
    monkeypatch.setattr(loading, "load", stop_with(KeyboardInterrupt()))
    code, out, err = command("seg4diff.py", "segment", "photo.png", "car")
    assert (code, out) == (130, "") and err.startswith("stopped; ") and err.count("\n") == 1


@pytest.mark.parametrize("words", [("segment", "photo.png", "car"), ("generate", "car", "--steps", 1)])
def test_a_full_disk_leaves_the_last_picture(command, folder, tiny_file, monkeypatch, words):
    run = partial(command, "seg4diff.py", *words, "--model", tiny_file, "--out", "o.png")
    assert run()[0] == 0
    before = (folder / "o.png").read_bytes()
    inside = files(folder)

    def full(image, path, *args, **kwargs):
        if isinstance(path, str | Path):                                     # not check_out's trial in memory
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run()
    assert code == 2 and "error: o.png cannot be written" in err and "what was there before is still there" in err
    assert (folder / "o.png").read_bytes() == before and files(folder) == inside


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
    assert code == 2 and "o/results.json cannot be written" in err and "Traceback" not in err
    assert not (folder / "o/results.json").exists()
    code, _, err = command("evaluate.py", *options)
    assert code == 0 and (folder / "o/results.json").exists() and len(list((folder / "o").glob("*.jsonl"))) == 1


def test_what_would_be_lost_or_garbled_is_refused(command, folder, tiny_file):
    """The picture itself as --out, a name too long, names that are no UTF-8, a file as folder."""
    before = (folder / "photo.png").read_bytes()
    for words, says in ((["car", "--out", "photo.png"], "the picture itself"),
                        (["car", "--out", "x" * 240 + ".png"], "long"), (["\udcff"], "no text in UTF-8")):
        code, _, err = command("seg4diff.py", "segment", "photo.png", *words, "--model", tiny_file)
        assert code == 2 and says in err and err.count("\n") == 1
    assert (folder / "photo.png").read_bytes() == before
    code, _, err = command("evaluate.py", "--limit", 1, "--model", tiny_file, "--out", "words.png")
    assert code == 2 and "words.png cannot be a folder for results" in err


def test_guidance_is_not_ignored(command, tiny_file):
    code, _, err = command("seg4diff.py", "generate", "a car", "--model", tiny_file, "--steps", 1, "--guidance", 2)
    assert code == 2 and "reads no guidance" in err

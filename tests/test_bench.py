"""bench.py: what it prints can be read back, its clock and its memory count are right, bad input is one sentence."""
import os
import re
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from PIL import Image

import loading
import seg4diff
from nano import scenes
from support import weights
from tools import bench, full_flux, full_size


def test_bench(command, tiny_file):
    options = ["--model", tiny_file, "--repeats", 3, "--batch-size", 4, "--device", "cpu"]
    code, out, err = command("tools/bench.py", *options)
    assert code == 0, err
    head, weights, *rows = out.splitlines()
    part, whole = map(float, re.findall(r"[\d.]+", weights)[:2])
    assert whole > 1 and 0.55 < part / whole < 0.75             # two blocks of three; the last has no text MLP
    assert all(word in head for word in ("tiny, 3 blocks, expert 1", "4 x 128 pixels", "cpu, torch.float32", "of 3"))
    pattern = r"(MM-DiT|attention maps|autoencoder|whole picture) +(.+?) +([\d.]+) (ms|x) +(nan|-?[\d.]+) (?:MB|x)"
    rows = [re.fullmatch(pattern, row) for row in rows]
    assert all(rows) and [row[2] for row in rows] == ["up to block 1", "all 3 blocks", "ratio", "i2t_attention",
                                                      "i2t(joint_probs)", "ratio", "here", "as usual",
                                                      "ratio", "here", "the released way", "ratio"]
    for first, second, ratio in (rows[:3], rows[3:6], rows[6:9], rows[9:]):
        assert float(ratio[3]) == pytest.approx(float(first[3]) / float(second[3]), rel=0.2, abs=0.02)
    assert float(rows[2][3]) < 1                                # a run that stops early is shorter


def test_the_released_way_gives_the_same_maps(tiny):
    image = Image.fromarray(scenes.draw(3).image)
    labels, maps = bench.released_way(tiny, image, ["car", "night sky"])
    here = seg4diff.segment(tiny, image, ["car", "night sky"])
    torch.testing.assert_close(maps, here.maps, rtol=1e-4, atol=1e-7)
    assert (labels == here.labels).mean() > 0.999


@torch.inference_mode()
def test_the_usual_autoencoder_gives_the_same_latents(tiny):
    pixels = bench.square_of(tiny, Image.fromarray(scenes.draw(3).image))
    assert pixels.shape == (1, 3, 128, 128) and pixels.amin() >= -1 and pixels.amax() <= 1
    z0 = seg4diff.encode_image(tiny, Image.fromarray(scenes.draw(3).image))
    torch.testing.assert_close(bench.plain_encode(tiny.vae, pixels), z0, rtol=1e-5, atol=1e-5)


def test_the_size_is_the_pictures(command, tiny_file):
    code, out, err = command("tools/bench.py", "--model", tiny_file, "--repeats", 1, "--size", 64, "--device", "cpu")
    assert code == 0 and "16 x 64 pixels" in out, err


def test_bench_of_a_flux(command, tiny_flux_file):
    code, out, err = command("tools/bench.py", "--model", tiny_flux_file, "--repeats", 1, "--batch-size", 1)
    assert code == 0 and "tiny_flux, 4 blocks, expert 2" in out and "all 4 blocks" in out, err


def test_the_clock_and_the_memory():
    def hold():
        x = torch.ones(32 << 20)                                # 128 MB
        time.sleep(0.05)
        return x.sum().item()
    cpu = torch.device("cpu")
    assert 0.05 <= bench.seconds(hold, cpu) < 2 and bench.seconds(lambda: None, cpu) < 0.05
    if os.access(bench.CLEAR, os.W_OK):
        assert 120 < bench.megabytes(hold, cpu) < 160
        assert bench.megabytes(lambda: None, cpu) < 20          # the peak before does not stay


def test_no_memory_count(monkeypatch, tmp_path, capsys):
    """Where the system does not tell, nan is printed, and the times all the same."""
    monkeypatch.setattr(bench, "CLEAR", tmp_path / "none")
    bench.compare("t", {"one": lambda: time.sleep(0.01), "two": lambda: time.sleep(0.02)}, 1, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines] == ["nan"] * 3 and 0.3 < float(lines[2].split()[2]) < 0.8


def test_calls_take_turns_and_medians_are_compared(monkeypatch, capsys):
    calls, times = [], iter([1, 4, 2, 100, 3, 6])
    monkeypatch.setattr(bench, "seconds", lambda call, device: (call(), next(times))[1])
    monkeypatch.setattr(bench, "megabytes", lambda call, device: 10 if call() == "a" else 40)
    pair = {"one": lambda: calls.append("a") or "a", "two": lambda: calls.append("b")}
    bench.compare("t", pair, 3, torch.device("cpu"))
    assert calls == ["a", "b"] * 5
    assert [line.split()[-4:] for line in capsys.readouterr().out.splitlines()] == [
        ["2000.0", "ms", "10.0", "MB"], ["6000.0", "ms", "40.0", "MB"], ["0.33", "x", "0.25", "x"]]


@pytest.mark.parametrize("options, sentence", [
    (["--repeats", 0], "at least 1"), (["--batch-size", -1], "from 1 to 1024"),
    (["--batch-size", 10**12], "from 1 to 1024"), (["--size", 9000], "size must be a whole number from 1 to 8192"),
    (["--size", 70], "pixels beyond whole patches"), (["--size", 512], "beyond the model's positions"),
    (["--model", "none"], "known names are nano"), (["--device", "tpu"], "cpu or cuda")])
def test_bad_input(command, options, sentence):
    code, out, err = command("tools/bench.py", *options)
    assert (code, out) == (2, "") and err.startswith("error: ") and sentence in err and err.count("\n") == 1


def test_full_size_begins_with_its_checks(command, monkeypatch):
    """An unknown device and a missing layout before 6 GB are written; sizes are no options."""
    def write(path, shapes):
        raise AssertionError("too late")
    monkeypatch.setattr(full_size, "write", write)
    monkeypatch.setattr(full_size, "LAYOUTS", {"mmdit": "none"})
    with pytest.raises(ValueError, match=r"none\.json"):
        full_size.main(Namespace(device="cpu", train=False, model="sd3"))
    for options in (["--train", "--model", "flux"], ["--write", "x", "--model", "flux"], ["--device", "tpu"],
                    ["--device", "cuda:99999"], ["--sizes", 0]):
        code, out, err = command("tools/full_size.py", *options)
        assert (code, out) == (2, "") and err.startswith("error: ") and str(options[0])[2:] in err


def test_full_size_of_flux_in_small(tiny_flux_file, tmp_path, monkeypatch, capsys):
    """What is written is read as Flux's published files are, and a picture is segmented by it."""
    layout = {"flux_dev": "mmdit", "t5xxl": "t5xxl", "clip_l": "clip_l", "vae": "vae"}
    tiny = weights.read(weights.find(tiny_flux_file))
    shapes = {name: {key: list(w.shape) for key, w in tiny[part].items()} for name, part in layout.items()}
    real = loading.flux_preset
    for module in (loading, full_flux):                  # the tiny model has no block 12
        monkeypatch.setattr(module, "flux_preset", lambda *a, **k: replace(real(*a, **k), block=1))
    monkeypatch.setattr(full_flux, "DRAWN", 1000)
    path = full_flux.write(tmp_path, shapes)
    written = weights.read(weights.find(path))
    assert {key: list(w.shape) for key, w in written["t5xxl"].items()} == shapes["t5xxl"]
    assert 0.9 < written["t5xxl"]["shared.weight"].float().std() * 96 ** 0.5 < 1.1
    full_flux.segment(path, "cpu", size=64)
    assert re.search(r"2 blocks, 256 rows of T5, sigma 0\.\d+, peak [\d.]+ GB", capsys.readouterr().out)

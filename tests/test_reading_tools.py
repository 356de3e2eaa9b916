"""tools/ablate_readings.py, why_readings.py and bench_readings.py: their own pieces, and each once as a command."""
import json
from functools import partial

import numpy as np
import torch
from PIL import Image

import readings
import seg4diff
from mmdit import joint_probs
from support.data import DATASETS, toy_scenes
from tools import ablate_readings, bench_readings

DATA = DATASETS["scenes-dev"]()


def test_textured_scenes_keep_their_truth():
    name = DATA.names[0]
    plain = DATA.read(name)
    hard = ablate_readings.textured(DATA.read, name)
    assert (hard.labels == plain.labels).all() and hard.name == name
    difference = np.asarray(hard.image, float) - np.asarray(plain.image, float)
    assert 15 < difference.std() < 60
    assert np.array_equal(np.asarray(hard.image), np.asarray(ablate_readings.textured(DATA.read, name).image))


def test_variants_of_one_pass(tiny):
    item = DATA.read(DATA.names[0])
    z0 = seg4diff.encode_image(tiny, item.image)
    names = ["car", "teddy bear", "sky"]
    taps, spans = ablate_readings.tapped(tiny, z0, names, 4, range(3))
    maps = ablate_readings.named_variants(taps, spans, 2)
    found = seg4diff.segment(tiny, item.image, names, reading=seg4diff.READINGS, seed=4, block=2)
    for row, reading in (("paper", "paper"), ("shares (0 steps)", "shares"), ("i2i (1 step)", "i2i")):
        torch.testing.assert_close(maps[row], found[reading].maps, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(maps["I2I of block 2"], maps["i2i (1 step)"])
    torch.testing.assert_close(maps["2 steps"], readings.i2i_step(taps[2], maps["i2i (1 step)"]))
    joint = joint_probs(taps[2])[0, :, :256, :256].mean(0)
    shares = maps["shares (0 steps)"].flatten(1)                             # (K, N)
    torch.testing.assert_close(maps["I2I of the joint softmax, not renormalised"].flatten(1), shares @ joint.mT)
    refined = ablate_readings.refined_variants(found["i2i"].maps, item.image)
    assert (refined["20 rounds, reach 8"].argmax(0).numpy() == found["pixels"].labels).mean() > 0.999


def test_the_chosen_regions_are_those_of_propose(tiny):
    item = DATA.read(DATA.names[0])
    z0 = seg4diff.encode_image(tiny, item.image)
    taps, _ = ablate_readings.tapped(tiny, z0, [], 7, [1])
    maps = ablate_readings.region_variants(taps[1])["8 x 8 anchors, 2 steps, KL 0.7"]
    found = seg4diff.propose(tiny, item.image, regions="i2i", block=1, seed=7)
    torch.testing.assert_close(maps, found.maps, atol=1e-6, rtol=1e-3)


def test_ablation(command, tiny_file, tmp_path):
    fixed = ("--model", tiny_file, "--device", "cpu", "--limit", 1)
    code, out, err = command("tools/ablate_readings.py", *fixed, "--textured", "--out", tmp_path / "o")
    assert code == 0, err
    found = json.loads((tmp_path / "o/ablation.json").read_text())
    assert found["title"] == "scenes-dev-textured, 1 pictures, tiny"
    for row, values in (found["named"] | found["regions"]).items():
        assert f"| {row} | {values[0]:.1f} |" in out and 0 <= values[0] <= 100
    assert command("tools/ablate_readings.py", *fixed, "--out", tmp_path / "p")[0] == 0
    assert json.loads((tmp_path / "p/ablation.json").read_text())["named"] != found["named"]


def test_why(command, tiny_file, tmp_path):
    options = ("--model", tiny_file, "--device", "cpu", "--limit", 3, "--out", "o")
    code, out, err = command("tools/why_readings.py", *options)
    assert code == 0, err
    assert "by chance" in out and len(json.loads((tmp_path / "o/why.json").read_text())["pictures"]) == 3
    for name in ("typical.png", "bleeding.png", "rows.png", "failures.png"):
        assert min(Image.open(tmp_path / "o" / name).size) > 150


def test_why_with_too_few_pictures(command, tiny_file, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5002)))
    code, out, err = command("tools/why_readings.py", "--model", tiny_file, "--out", "o")
    assert (code, out) == (2, "") and not (tmp_path / "o").exists()
    assert err == "error: each figure shows 3 pictures; scenes-dev has 2 that can be measured\n"


def test_bench(command):
    code, out, err = command("tools/bench_readings.py", "--megapixels", 0.1, "--repeats", 1)
    assert code == 0, err
    first, *lines = out.splitlines()
    assert "to labels of 365 x 274 pixels" in first and [line.split()[0] for line in lines] == ["paper", "pixels"]
    qkv = bench_readings.sd3_qkv(128)
    assert qkv.q.shape == (1, 24, 64 + 154, 64) and qkv.grid == (8, 8)
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    for reading in readings.READINGS:
        labels = bench_readings.read(qkv, image, reading)
        assert labels.shape == (30, 40) and labels.max() < 3

"""Figures of generated pictures as judged by CLIP and DINO, which here are tiny and random."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_analysis import quick_file  # noqa: F401 - a fixture
from test_judges import write_judges

import generated_figures
import judges
import quality
import seg4diff
from nano import scenes
from quality import Arm

PROMPTS = ["a red car", "snow"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_judges(tmp_path_factory.mktemp("judges"))


def test_perturb_by_clip_and_dino(command, quick_file, folder, tmp_path):  # noqa: F811
    """Its numbers are those of pictures that are generated and judged one by one."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    options = ["--model", quick_file, "--prompts", "p.txt", "--out", "out", "--device", "cpu"]
    code, out, err = command("figures.py", "perturb", "--judge", folder, *options)
    assert code == 0 and "wrote out/perturb.json" in out, err
    found = json.loads((tmp_path / "out/perturb.json").read_text())
    assert found["n"] == 2 and found["judge"][0] == folder.name and len(found["judge"]) == 3
    rows = found["rows"]
    assert list(rows) == ["none", "block 0", "block 1", "block 2", "all"]
    assert rows["none"]["CLIP-I"] == pytest.approx(100) and rows["none"]["DINO"] == pytest.approx(100)
    assert all(rows[variant]["CLIP-I"] < 100 > rows[variant]["DINO"] for variant in rows if variant != "none")
    judge = judges.load_judge(folder, "cpu")
    dino, _ = judges.load_dino(folder, "cpu")
    model = seg4diff.load(quick_file, "cpu")
    plain, blurred = ([quality.draw(model, arm, prompt, i, 0) for i, prompt in enumerate(PROMPTS)]
                      for arm in (Arm("none"), Arm("blurred", perturb=(1,))))
    want = judges.similarity(judge, dino, blurred, plain, PROMPTS)
    for column in ("CLIP-I", "CLIP-T", "DINO"):
        assert rows["block 1"][column] == pytest.approx(want[column].mean(), abs=1e-3)
        assert rows["block 1"][f"{column} error"] == pytest.approx(want[column].std(ddof=1) / 2 ** 0.5, abs=1e-3)
    for name in ("perturb.png", "perturb_pictures.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 100


def test_a_judge_that_is_not_there_ends_it_before_the_work(command, tiny_file, tmp_path):
    code, _, err = command("figures.py", "perturb", "--judge", "none", "--model", tiny_file, "--limit", 1)
    assert code == 2 and "no judge 'none'" in err and err.count("\n") == 1 and not list(tmp_path.glob("out/*"))
    code, _, err = command("figures.py", "perturb", "--judge", "clip", "--model", tiny_file, "--limit", 1)     # offline
    assert code == 2 and "model.bin is not in the cache" in err and "--judge" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_who_judges_without_a_name(monkeypatch):
    """nano itself; a model of photographs, CLIP and DINO."""
    asked = []
    monkeypatch.setattr(judges, "load_judge", lambda *args: asked.append(args) or SimpleNamespace(fingerprint="a"))
    monkeypatch.setattr(judges, "load_dino", lambda *args: ("dino", "b"))
    small, large = (SimpleNamespace(preset=SimpleNamespace(size=size), device="cpu") for size in (scenes.SIDE, 1024))
    assert generated_figures.load_judges(None, small) is None and generated_figures.load_judges("own", large) is None
    with pytest.raises(ValueError, match="tools/experiments.py blocks"):
        generated_figures.load_judges("nano", small)
    assert not asked
    assert generated_figures.load_judges(None, large).files == ["a", "b"]
    assert generated_figures.load_judges("clip", small).dino == "dino" and asked == [("clip", "cpu")] * 2


def test_variants_begin_from_the_same_noise(tiny, tmp_path, monkeypatch):
    """And a killed figure goes on with the pictures that are there."""
    variants = {"a": {"steps": 2}, "the b": {"steps": 2}, "c": {"steps": 2, "cfg": 1.0}}
    images = dict(generated_figures.each_variant(tiny, PROMPTS, variants, tmp_path / "x.png"))
    a, b, c = (np.stack(images[variant]) for variant in variants)
    assert (a == b).all() and (a != c).any()
    assert Image.open(tmp_path / "x_pictures.png").width > 3 * 192
    (tmp_path / "x/theb/00001_0.png").unlink()
    drawn = []
    draw = quality.draw
    monkeypatch.setattr(quality, "draw", lambda model, arm, *rest: drawn.append(arm.name) or draw(model, arm, *rest))
    again = dict(generated_figures.each_variant(tiny, PROMPTS, variants, tmp_path / "x.png"))
    assert drawn == ["the b"] and (np.stack(again["the b"]) == b).all()
    with pytest.raises(ValueError, match="other prompts"):
        list(generated_figures.each_variant(tiny, PROMPTS[::-1], variants, tmp_path / "x.png"))

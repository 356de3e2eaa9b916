"""Generated pictures: each once, whatever was killed or shared out; the commands on a tiny model."""
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_design import reachable
from test_docs import parser_of
from test_judges import write_judges

import judges
import quality
import seg4diff
from loading import image_seed
from nano import scenes
from quality import Arm
from support import report
from support.data import DATASETS
from support.effects import compare
from support.files import Broken

PROMPTS = ["a red car", "snow and sand", "a boat"]
QUICK = Arm("quick", cfg=2.0, steps=1)


class Fake:
    """A judge that looks at pixels; what is red is asked for by some prompts only."""
    name = "fake"
    fingerprint = "0"
    columns = ("red", "light")

    def score(self, images, prompts):
        pixels = np.array([np.asarray(image, float).mean((0, 1)) for image in images])       # (n, 3)
        red = [x if "red" in prompt else math.nan for x, prompt in zip(pixels[:, 0], prompts)]
        return {"red": np.array(red), "light": pixels.mean(1)}


@pytest.fixture
def one_step_file(tiny_file, tmp_path) -> Path:
    """The tiny model with a sampler of one step."""
    with safe_open(tiny_file, "pt") as f:
        header = f.metadata()
    presets = {**json.loads(header["presets"]), "steps": 1, "noise_steps": 1}
    save_file(load_file(tiny_file), tmp_path / "tiny.safetensors", {**header, "presets": json.dumps(presets)})
    return tmp_path / "tiny.safetensors"


@pytest.fixture
def quick_file(one_step_file, monkeypatch) -> Path:
    """The same, and the fake judge for whoever asks."""
    monkeypatch.setattr(quality, "pick_judge", lambda name, model, prompts: Fake())
    return one_step_file


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*_*.png")}


# ---------------------------------------------------------------------------- each picture once


def test_the_noise_of_a_picture_is_fixed(tiny):
    """quality.py is not part of a folder's identity, so its rule must stay."""
    (image,) = seg4diff.generate(tiny, "snow", cfg=2.0, steps=1, seed=image_seed("3", 2))
    assert quality.draw(tiny, QUICK, "snow", 3, 2).tobytes() == image.tobytes()


def coloured(model, arm, prompt, i, seed) -> Image.Image:
    """In the place of quality.draw: a colour for each arm, prompt, number and seed."""
    red = int(10 * arm.cfg + 40 * arm.pag + 7 * len(arm.perturb))
    return Image.new("RGB", (128, 128), (red, 9 * i + len(prompt), seed))


def test_resumed_and_shared_pictures_are_the_same(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "draw", coloured)
    quality.generate_missing(tiny, QUICK, PROMPTS, [0, 1], tmp_path / "whole")
    whole = pictures(tmp_path / "whole")
    assert sorted(whole) == ["00000_0.png", "00000_1.png", "00001_0.png", "00001_1.png", "00002_0.png", "00002_1.png"]
    assert len(set(whole.values())) == 6

    killed = tmp_path / "killed"                         # after one prompt, and once more later
    quality.generate_missing(tiny, QUICK, PROMPTS[:1], [1], killed)
    kept = (killed / "00000_1.png").stat().st_mtime_ns
    quality.generate_missing(tiny, QUICK, PROMPTS, [0, 1], killed)
    (killed / "00001_1.png").unlink()
    quality.generate_missing(tiny, QUICK, PROMPTS, [0, 1], killed)
    assert pictures(killed) == whole and (killed / "00000_1.png").stat().st_mtime_ns == kept
    monkeypatch.setattr(quality, "draw", None)           # nothing is left to do
    quality.generate_missing(tiny, QUICK, PROMPTS[:2], [1], killed)
    monkeypatch.setattr(quality, "draw", coloured)

    shared = tmp_path / "shared"                         # of two processes; the second finds what the first has made
    monkeypatch.setattr(quality, "wait_for_all", lambda: None)
    for rank in range(2):
        monkeypatch.setattr(quality, "world", lambda rank=rank: (rank, 2))
        quality.generate_missing(tiny, QUICK, PROMPTS, [0, 1], shared)
        assert len(pictures(shared)) == 3 * (rank + 1)
    assert pictures(shared) == whole


def test_arms_share_noise_and_differ_in_options(tiny, tmp_path):
    arms = [QUICK, QUICK._replace(name="cfg", cfg=1.0), QUICK._replace(name="perturb", perturb=(0, 1, 2)),
            QUICK._replace(name="pag", pag=5.0), QUICK._replace(name="blocks", pag=5.0, blocks=(0,)),
            QUICK._replace(name="steps", steps=2)]
    found = []
    for arm in arms:
        quality.generate_missing(tiny, arm, PROMPTS[:1], [7], tmp_path / arm.name)
        found += pictures(tmp_path / arm.name).values()
        options = {name: x for name, x in arm._asdict().items() if name not in ("name", "lora")}
        (image,) = seg4diff.generate(tiny, PROMPTS[0], seed=image_seed("0", 7), **options)
        stored = Image.open(tmp_path / arm.name / "00000_7.png")
        assert stored.tobytes() == image.tobytes()
    assert len(set(found)) == len(arms)


def test_a_folder_keeps_its_identity(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "arm"

    def claim(prompts=PROMPTS, model=tiny, **options):
        quality.claim(folder, quality.identity_of(model, QUICK._replace(**options), prompts))

    claim(cfg=7.0)                                       # begun and given up before the first picture
    claim(PROMPTS[:2])
    (folder / "00000_0.png").touch()
    claim(PROMPTS)                                       # more prompts, fewer prompts, another name: no change
    claim(PROMPTS[:1], name="other")
    assert json.loads((folder / "identity.json").read_text())["prompts"] == PROMPTS
    claim(blocks=(1,))                                   # nothing reads them without pag
    claim(model=replace(tiny, preset=tiny.preset.changed(batch=3)))          # each picture is drawn alone
    other = replace(tiny, fingerprint="abc")
    on_a_gpu = SimpleNamespace(name=tiny.name, fingerprint=tiny.fingerprint, preset=tiny.preset,
                               dtype=torch.bfloat16, device=torch.device("cuda"))
    for says, change in (("cfg 2.0 instead of 3.0", {"cfg": 3.0}), ("steps 1 instead of 2", {"steps": 2}),
                         ("pag 0.0 instead of 1.0; blocks None instead of [1]", {"pag": 1.0, "blocks": (1,)}),
                         ("perturb [] instead of [0]", {"perturb": (0,)}), ("other prompts", {"prompts": ["a tree"]}),
                         ("other prompts", {"prompts": [PROMPTS[0], "a tree"]}),
                         (f"fingerprint {tiny.fingerprint} instead of abc", {"model": other}),
                         ("dtype torch.float32 instead of torch.bfloat16; device cpu instead of cuda",
                          {"model": on_a_gpu})):
        with pytest.raises(ValueError) as e:
            claim(**change)
        assert str(e.value) == f"{folder} holds pictures with {says}; name another --out, or remove it"
    monkeypatch.setattr(quality, "code_stamp", lambda files: "new")
    with pytest.raises(ValueError, match="with code [0-9a-f]+ instead of new"):
        claim()
    for damage in ("{", '{"cfg": 2.0}', '{"prompts": 3}'):
        (folder / "identity.json").write_text(damage)
        with pytest.raises(Broken, match="identity.json' cannot be read as a "):
            claim()
    (folder / "identity.json").unlink()
    with pytest.raises(ValueError, match="holds pictures without the identity.json"):
        claim()


def test_the_code_of_a_picture_is_complete_and_exact():
    assert len(set(quality.CODE)) == len(quality.CODE)
    assert set(quality.CODE) == reachable("sampling.py")


def test_scores_stand_where_their_pictures_do(tmp_path, monkeypatch):
    for i in range(3):
        for seed in (4, 9):
            Image.new("RGB", (8, 8), (10 * i + seed, 0, 0)).save(quality.path_of(tmp_path, i, seed))
    whole = quality.judged(Fake(), PROMPTS, [4, 9], tmp_path)
    assert whole["light"] * 3 == pytest.approx(np.array([[4, 9], [14, 19], [24, 29]]))
    assert whole["red"][0].tolist() == [4, 9] and np.isnan(whole["red"][1:]).all()
    monkeypatch.setattr(quality, "JUDGED", 4)
    assert np.array_equal(quality.judged(Fake(), PROMPTS, [4, 9], tmp_path)["light"], whole["light"])
    (tmp_path / "00001_9.png").write_text("no picture")
    with pytest.raises(Broken, match="00001_9.png.*remove it, and it is drawn anew"):
        quality.judged(Fake(), PROMPTS, [4, 9], tmp_path)


def test_the_own_judge(tiny, monkeypatch):
    """It is analysis.caption_losses against the empty prompt; no other judge has to be there for it."""
    monkeypatch.setattr(quality.analysis, "CAPTION_DRAWS", 1)
    judge = quality.pick_judge("own", tiny, ["a dog"])
    assert (judge.name, judge.fingerprint, judge.columns) == ("own", tiny.fingerprint, ("loss saved",))
    image = Image.effect_noise((128, 128), 50).convert("RGB")
    seeds = [image_seed("a red car", 0)]
    losses = quality.analysis.caption_losses(tiny, [image], [["a red car", ""]], seeds=seeds)
    (saved,) = judge.score([image], ["a red car"])["loss saved"]
    assert saved == pytest.approx(100 * (losses[0, 1] - losses[0, 0]) / losses[0, 1])
    other, again = judge.score([image, image], ["snow", "a red car"])["loss saved"]          # wherever it stands
    assert again == pytest.approx(saved) and abs(other - saved) > 0.01


def test_a_judge_that_cannot_answer_is_refused_before_the_work(tiny):
    assert quality.pick_judge(None, tiny, ["a red car", "snow"]).columns[-1] == "all right"
    with pytest.raises(ValueError, match="knows no 'dog'"):
        quality.pick_judge("nano", tiny, ["a red car", "a dog"])
    large = replace(tiny, preset=tiny.preset.changed(size=256))
    with pytest.raises(ValueError, match="pictures of 128 pixels, and tiny makes them of 256"):
        quality.pick_judge("nano", large, [])


def test_other_pictures_are_judged_by_clip_on_the_model_s_device(monkeypatch):
    monkeypatch.setattr(quality, "load_judge", lambda *asked: asked)
    model = SimpleNamespace(preset=SimpleNamespace(size=512), device="the model's")
    assert quality.pick_judge(None, model, ["a dog"]) == ("clip", "the model's")
    assert quality.pick_judge("folder", model, ["a dog"]) == ("folder", "the model's")


# ---------------------------------------------------------------------------- prompts


def test_captions_of_the_toy_world():
    first = quality.captions(0, 4)
    for caption, name in zip(first, DATASETS["scenes-dev"]().names):
        assert caption == scenes.caption(scenes.draw(int(name)), np.random.default_rng(int(name)))
    assert quality.captions(2, 2) == first[2:] and len(first) == 4
    last = scenes.VAL_SEEDS[-1]
    assert quality.captions(4999, 2) == [scenes.caption(scenes.draw(last), np.random.default_rng(last))]


def test_prompts(tmp_path):
    root = tmp_path / "data"
    with pytest.raises(ValueError, match="captions_val2017.json"):
        quality.prompts_of("coco", 1, root)
    file = root / "coco/annotations/captions_val2017.json"
    file.parent.mkdir(parents=True)
    entries = [(7, " A cat. "), (3, "A dog."), (7, "Another cat."), (5, "A bus.")]
    file.write_text(json.dumps({"annotations": [{"image_id": i, "caption": c} for i, c in entries]}))
    assert quality.prompts_of("coco", 3, root) == ["A cat.", "A dog.", "A bus."]
    with pytest.raises(ValueError, match="coco holds 3 prompts, not 4; choose fewer with --images"):
        quality.prompts_of("coco", 4, root)
    for damage in ({"annotations": [{"image_id": 7}]}, {"annotations": [{"image_id": "7", "caption": "x"}]}, {}):
        file.write_text(json.dumps(damage))
        with pytest.raises(Broken, match="captions_val2017.json"):
            quality.prompts_of("coco", 1, root)
    (tmp_path / "mine.txt").write_text("a tree\n\n  a boat\u2028with a sail \n")
    assert quality.prompts_of(str(tmp_path / "mine.txt"), 2, root) == ["a tree", "a boat\u2028with a sail"]
    assert quality.prompts_of("scenes-dev", 2, root) == quality.captions(0, 2)


def test_table_3():
    """Each mean of the paper's table is that of its three columns; ours stands in one of them, or in its own."""
    means = [27.1437, 27.2447, 27.2760]
    assert [np.mean(list(row.values())) for row in report.TABLE_3.values()] == pytest.approx(means, abs=2e-4)
    head, *rows, ours = report.beside_table_3("sd3, ours", "coco", 26.1).splitlines()
    assert head.split()[-3:] == ["Pick-a-Pic", "coco", "SA-1B"] and ours.split()[-3:] == ["-", "26.1000", "-"]
    assert rows[0].split()[-3:] == ["27.0252", "26.0638", "28.3422"] and all("the paper's" in row for row in rows)
    head, *_, ours = report.beside_table_3("sd3, ours", "mine", 26.1).splitlines()
    assert head.split()[-1] == "mine" and ours.split()[-4:] == ["-", "-", "-", "26.1000"]


# ---------------------------------------------------------------------------- commands


def test_evaluate_quality(command, quick_file, tmp_path):
    options = ("--task", "quality", "--model", quick_file, "--device", "cpu", "--images", 2, "--seeds", 2)
    code, out, err = command("evaluate.py", *options)
    assert code == 0, err
    folder = tmp_path / "out/quality-scenes-dev-tiny/cfg3"
    result = json.loads((folder / "results.json").read_text())
    assert len(pictures(folder)) == 4 and min(Image.open(folder / "sheet.png").size) > 200
    mean = result["rows"]["light"]["mean"]
    assert mean == pytest.approx(np.mean(result["scores"]["light"])) and f"{mean:.4f}" in out
    assert "seeds:   0 1\n" in out and "Table 3" not in out and result["prompts"] == quality.captions(0, 2)
    options += ("--cfg", 1, "--pag", 2, "--blocks", 0, "--perturb", 1, "--seed", 1)
    code, out, err = command("evaluate.py", *options)
    assert code == 0, err
    other = json.loads((folder.with_name("cfg1-s2-block0-blurred1") / "results.json").read_text())
    assert other["options"] == {"cfg": 1.0, "pag": 2.0, "blocks": [0], "perturb": [1], "steps": None}
    assert set(pictures(folder.with_name("cfg1-s2-block0-blurred1"))) >= {"00001_2.png"}
    assert other["rows"]["light"]["mean"] != mean


def test_a_lora_is_in_the_pictures(command, quick_file, own_lora, tmp_path):
    options = ("--task", "quality", "--model", quick_file, "--device", "cpu", "--images", 1)
    for out, more in (("a", ()), ("b", ("--lora", own_lora))):
        code, _, err = command("evaluate.py", *options, *more, "--out", tmp_path / out)
        assert code == 0, err
    assert pictures(tmp_path / "a/cfg3") != pictures(tmp_path / "b/cfg3")


def test_table_3_by_clip(command, one_step_file, tmp_path):
    """The command for COCO, with a tiny CLIP: its score is that of the kept pictures and their captions."""
    folder = write_judges(tmp_path / "judges")
    file = tmp_path / "data/coco/annotations/captions_val2017.json"
    file.parent.mkdir(parents=True)
    captions = ["a red car", "snow", "a boat"]
    file.write_text(json.dumps({"annotations": [{"image_id": i, "caption": c} for i, c in enumerate(captions)]}))
    code, out, err = command("evaluate.py", "--task", "quality", "--prompts", "coco", "--data-root", tmp_path / "data",
                             "--model", one_step_file, "--judge", folder, "--images", 2, "--device", "cpu")
    assert code == 0, err
    kept = tmp_path / "out/quality-coco-tiny/cfg3"
    images = [Image.open(quality.path_of(kept, i, 0)) for i in range(2)]
    want = judges.load_judge(folder, "cpu").score(images, captions[:2])["CLIPScore"]
    result = json.loads((kept / "results.json").read_text())
    assert np.ravel(result["scores"]["CLIPScore"]) == pytest.approx(want) and result["prompts"] == captions[:2]
    mean = result["rows"]["CLIPScore"]["mean"]
    (line,) = [line for line in out.splitlines() if line.startswith("tiny, ours")]
    assert mean == pytest.approx(want.mean()) and line.split()[-3:] == ["-", f"{mean:.4f}", "-"]


@pytest.mark.parametrize("options, model, source, count", [
    ([], "nano", "scenes-dev", 100), (["--prompts", "coco", "--images", "3"], "sd3", "coco", 3),
    (["--model", "sd3"], "sd3", "coco", 100), (["--model", "nano", "--prompts", "coco"], "nano", "coco", 100)])
def test_what_is_drawn_and_by_whom_without_options(command, tiny, monkeypatch, options, model, source, count):
    found = []

    def load(name, *_, **__):
        found.append(name)
        return tiny if name == "nano" else replace(tiny, preset=tiny.preset.changed(size=256))
    monkeypatch.setattr(seg4diff, "load", load)
    monkeypatch.setattr(quality, "prompts_of", lambda *asked: found.append(asked[:2]) or [])
    monkeypatch.setattr(quality, "pick_judge", lambda *asked: Fake())
    monkeypatch.setattr(quality, "run", lambda *asked: None)
    assert command("evaluate.py", "--task", "quality", *options)[0] == 0
    assert found == [model, (source, count)]


def test_evaluate_quality_against_another_arm(command, quick_file, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "draw", coloured)
    options = ("--task", "quality", "--model", quick_file, "--device", "cpu", "--images", 2)
    assert command("evaluate.py", *options)[0] == 0
    base = tmp_path / "out/quality-scenes-dev-tiny/cfg3/results.json"
    code, out, err = command("evaluate.py", *options, "--cfg", 1, "--against", base)
    assert code == 0, err
    scores = [json.loads((tmp_path / f"out/quality-scenes-dev-tiny/{arm}/results.json").read_text())["scores"]["light"]
              for arm in ("cfg1", "cfg3")]
    found = compare(np.array(scores[0]), np.array(scores[1]))
    assert f"light, against {base}: {found.difference:+.3f} (95 % interval: none), cannot be told (" in out
    code, _, err = command("evaluate.py", *options, "--seed", 1, "--against", base)
    assert code == 2 and "its 'seeds' is [0], this run's is [1]" in err and err.count("\n") == 1


def test_scores_that_are_no_base(tmp_path):
    compared = {"prompts": ["a", "b"], "seeds": [0], "judge": ["fake", "0"]}
    good = compared | {"scores": {"red": [[None], [1]], "light": [[2], [3]]}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(good))
    found = quality.scores_of(path, compared, Fake.columns)
    np.testing.assert_equal(found, {"red": [[math.nan], [1]], "light": [[2], [3]]})
    for says, content in (("its 'seeds' is [1], this run's is [0]", {"seeds": [1]}),
                          ("its 'prompts' is []", {"prompts": []}), ("KeyError", {"scores": {}}),
                          ("not 2 x 1 finite numbers", {"scores": {"red": [[1]], "light": [[1]]}}),
                          ("not 2 x 1 finite numbers", {"scores": {"red": [[1], [math.inf]]}}),
                          ("could not convert", {"scores": {"red": "x"}}),
                          ("its 'judge' is ['own', '0'], this run's is ['fake', '0']", {"judge": ["own", "0"]})):
        path.write_text(json.dumps(good | content))
        with pytest.raises(Broken, match=re.escape(says)):
            quality.scores_of(path, compared, Fake.columns)


@pytest.mark.parametrize("options, says", [
    (["--dataset", "voc"], "--dataset belongs to segmentation"), (["--limit", "3"], "--limit belongs to segmentation"),
    (["--blocks", "1"], "whose scale is 0; give --pag"), (["--cfg", "nan"], "cfg must be a number"),
    (["--pag", "nan"], "from -1000 to 1000"),
    (["--prompts", "none.txt"], "no such file"), (["--prompts", ""], "no such file"),
    (["--perturb", "3"], "blocks are 0 to 2"),
    (["--images", "0"], "least 1"), (["--batch-size", "2"], "--batch-size belongs to segmentation"),
    (["--task", "ovss"], "--images belongs to --task quality")])
def test_bad_options(command, quick_file, options, says):
    code, out, err = command("evaluate.py", "--task", "quality", "--images", 1, "--model", quick_file, *options)
    assert code == 2 and out == "" and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_defaults_of_the_options_that_are_not_read():
    parser = parser_of("evaluate.py")
    assert {name: parser.get_default(name) for name in quality.NOT_READ} == quality.NOT_READ


# ---------------------------------------------------------------------------- Fig. 13


def test_pictures_without_and_with_a_lora(tiny, tmp_path, monkeypatch):
    """From the same noise: the same model changes nothing; at most twelve prompts are shown."""
    change = "change of generated pictures [grey levels of 255]"
    quick = replace(tiny, preset=tiny.preset.changed(steps=1, noise_steps=1))
    other = replace(quick, preset=quick.preset.changed(cfg=1.0))
    assert quality.compare_lora(quick, ["a car", "snow"], tmp_path, quick) == {"prompts": 2, change: 0}
    assert Image.open(tmp_path / "compare.png").width > 4 * 256 - 20
    assert quality.compare_lora(quick, ["a car"], tmp_path, other)[change] > 0
    monkeypatch.setattr(quality, "draw", lambda model, arm, prompt, i, seed: Image.new("RGB", (9, 9), (i, seed, 0)))
    assert quality.compare_lora(quick, ["a car"] * 13, tmp_path, other)["prompts"] == 12

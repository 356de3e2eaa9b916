"""The judge of nano's pictures: it reads captions, and sees what was drawn by hand, and nothing where nothing is."""
import math
import shutil
from argparse import Namespace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import seg4diff
from nano import check_judge, judge, scenes, train_judge
from nano.judge import Claim, Seen, claims, look, truth, verdict
from nano.scenes import COLOURS, SIDE, STUFF, THINGS, TRAIN_SEEDS, VAL_SEEDS
from support.files import Broken


@pytest.fixture(scope="module")
def trained() -> judge.Judge:
    return judge.load()


@pytest.fixture(scope="module")
def drawn() -> list[scenes.Scene]:
    return [scenes.draw(seed) for seed in VAL_SEEDS[2000:2025]]


def paint(*things: tuple[str, str, float], sky: str = "sky", ground: str = "grass") -> Image.Image:
    """A picture drawn by hand: (name, colour, x) of each thing, half as high as the picture, on one ground."""
    big = 2 * SIDE
    yy, xx = np.mgrid[0:big, 0:big] / big
    rng = np.random.default_rng(0)
    canvas = scenes.paint_sky(yy, xx, sky, rng)
    canvas[big // 2:] = scenes.paint_ground(yy, xx, ground, rng)[big // 2:]
    image = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    labels = Image.new("L", image.size)
    for name, colour, x in things:
        scenes.paint_thing(image, labels, name, COLOURS[colour], x * big, 0.8 * big, 0.5 * big)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def judged(trained: judge.Judge, image: Image.Image, caption: str) -> dict[str, float]:
    return verdict(look(trained, [image])[0], claims(caption))


# ---------------------------------------------------------------------------- captions


def test_a_caption_claims_what_its_scene_holds(drawn):
    for i, scene in enumerate(drawn):
        for j in range(20):
            caption = scenes.caption(scene, np.random.default_rng([i, j]))
            claim = claims(caption)
            colours = {thing.name: thing.colour for thing in scene.things}
            assert sorted(name for name, _ in claim.things) == sorted(colours)
            assert sorted(claim.stuff) == sorted(scene.stuff)
            named = [(name, colour) for name, colour in claim.things if colour]
            assert all(colours[name] == colour for name, colour in named)
            assert len(named) == sum(word in COLOURS for word in caption.split())
            order = tuple(thing.name for thing in scene.things)
            assert claim.relation == (order if {"left", "right"} & set(caption.split()) else None)
            assert verdict(truth(scene), claim)["all right"] == 1


def test_claims_by_hand():
    assert claims("red car sky teddy bear grass") == Claim([("car", "red"), ("teddy bear", None)], None,
                                                           ["sky", "grass"])
    assert claims("a big air balloon right of a small blue boat with sand under the night") == Claim(
        [("air balloon", None), ("boat", "blue")], ("boat", "air balloon"), ["sand", "night"])


@pytest.mark.parametrize("caption, said", [("", "nothing"), ("a red", "ends in a colour"), ("a dog on grass", "'dog'"),
                                           ("a red sky with a car", "no 'sky' there"), ("a car with a boat red", "red"),
                                           ("a car left of grass", "1 things")])
def test_other_captions_are_refused(caption, said):
    with pytest.raises(ValueError, match=said):
        claims(caption)


# ---------------------------------------------------------------------------- verdicts, without a network


def test_a_colour_counts_on_its_thing_and_a_position_with_both():
    seen = Seen(dict.fromkeys(STUFF, 0.0) | {"sky": 0.9}, dict.fromkeys(THINGS, 0.1) | {"car": 0.8},
                dict.fromkeys(THINGS, "red"), dict.fromkeys(THINGS, 0.5) | {"car": 0.2})
    found = verdict(seen, claims("a red car left of a red boat with grass under the sky"))
    assert found == {"things": 0.5, "colours": 0.5, "position": 0, "stuff": 0.5, "all right": 0}
    found = verdict(seen, claims("car sky"))
    assert (found["things"], found["stuff"], found["all right"]) == (1, 1, 1)
    assert math.isnan(found["colours"]) and math.isnan(found["position"])


# ---------------------------------------------------------------------------- pictures drawn by hand


def test_right_wrong_colour_swapped_missing(trained):
    caption = "a red car left of a blue house with grass under the sky"
    assert judged(trained, paint(("car", "red", 0.28), ("house", "blue", 0.74)), caption) == dict.fromkeys(
        judge.COLUMNS, 1)
    wrong = judged(trained, paint(("car", "green", 0.28), ("house", "blue", 0.74)), caption)
    assert wrong == {"things": 1, "colours": 0.5, "position": 1, "stuff": 1, "all right": 0}
    swapped = judged(trained, paint(("house", "blue", 0.28), ("car", "red", 0.74)), caption)
    assert swapped == {"things": 1, "colours": 1, "position": 0, "stuff": 1, "all right": 0}
    missing = judged(trained, paint(("car", "red", 0.28)), caption)
    assert missing == {"things": 0.5, "colours": 0.5, "position": 0, "stuff": 1, "all right": 0}
    snow = judged(trained, paint(("car", "red", 0.28), ("house", "blue", 0.74), ground="snow"), caption)
    assert snow == {"things": 1, "colours": 1, "position": 1, "stuff": 0.5, "all right": 0}


@pytest.mark.parametrize("name", THINGS)
def test_every_thing_is_seen_and_placed(trained, name):
    for colour, x in (("red", 0.3), ("purple", 0.6)):
        seen = look(trained, [paint((name, colour, x), sky="sunset", ground="sand")])[0]
        assert [thing for thing in THINGS if seen.things[thing] > judge.THERE] == [name]
        assert [stuff for stuff in STUFF if seen.stuff[stuff] > judge.THERE] == ["sunset", "sand"]
        assert seen.colours[name] == colour and abs(seen.x[name] - x) < 0.1


def test_a_coloured_spot_is_no_thing(trained):
    image = paint()
    ImageDraw.Draw(image).ellipse([40, 40, 90, 100], fill=COLOURS["red"])
    assert max(look(trained, [image])[0].things.values()) < judge.THERE


def test_pictures_do_not_depend_on_each_other(trained, drawn, monkeypatch):
    images = [Image.fromarray(scene.image) for scene in drawn[:5]]
    together = look(trained, images)
    assert look(trained, images) == together
    monkeypatch.setattr(judge, "BATCH", 2)
    for one, other in zip(look(trained, images), together):
        assert one.colours == other.colours
        for a, b in ((one.stuff, other.stuff), (one.things, other.things), (one.x, other.x)):
            assert list(a.values()) == pytest.approx(list(b.values()), abs=1e-4)


# ---------------------------------------------------------------------------- as experiments take it


def test_scores_are_columns(tmp_path):
    judging = judge.CaptionJudge()
    images = [paint(("car", "red", 0.28), ("house", "blue", 0.74)), paint(("car", "red", 0.5))]
    scores = judging.score(images, ["a red car left of a blue house with grass under the sky", "boat sky"])
    assert tuple(scores) == judging.columns == ("things", "colours", "position", "stuff", "all right")
    assert all(column.shape == (2,) for column in scores.values())
    assert [column[0] for column in scores.values()] == [1] * 5
    np.testing.assert_equal([column[1] for column in scores.values()], [0, np.nan, np.nan, 1, 0])
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        judging.score(images, ["boat sky"])
    with pytest.raises(ValueError, match="128 x 128 pixels, not 64 x 32"):
        judging.score([Image.new("RGB", (64, 32))], ["boat sky"])
    sd = load_file(judge.FILE)
    save_file(sd | {"bias": sd["bias"] + 1}, tmp_path / "other.safetensors")
    assert judge.CaptionJudge().fingerprint == judging.fingerprint
    assert judge.CaptionJudge(tmp_path / "other.safetensors").fingerprint != judging.fingerprint


def test_broken_files_are_named(tmp_path):
    with pytest.raises(Broken, match="no such file"):
        judge.load(tmp_path / "none.safetensors")
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(Broken, match="no judge of nano's pictures"):
        judge.load(path)
    sd = load_file(judge.FILE)
    del sd["bias"]
    save_file(sd, path)
    with pytest.raises(Broken, match="1 missing: bias"):
        judge.load(path)


# ---------------------------------------------------------------------------- how it was trained


def test_a_spoilt_thing_is_gone_and_the_rest_is_left(drawn):
    for i, scene in enumerate(drawn[:12]):
        spoilt = train_judge.spoil(scene, np.random.default_rng(i))
        gone = [thing for thing in scene.things if thing not in spoilt.things]
        assert len(gone) == 1 and spoilt.stuff == scene.stuff
        changed = (spoilt.image != scene.image).any(-1)
        assert changed[scene.labels == scenes.CLASSES.index(gone[0].name)].mean() > 0.2
        facts = train_judge.facts(spoilt)
        k = THINGS.index(gone[0].name)
        assert facts["there"].sum() == len(spoilt.stuff) + len(spoilt.things) and facts["colour"][k] == -1


def test_varied_pictures_move_as_told():
    images = torch.full((8, 3, SIDE, SIDE), -0.5)
    images[..., 60:68] = 0.5                             # a bar in the middle
    generator = torch.Generator().manual_seed(0)
    varied, moved = train_judge.vary(images, generator)
    bar = (varied.mean((1, 2)) > 0).float()                                  # (B, columns)
    centre = (bar * torch.arange(SIDE)).sum(1) / bar.sum(1) / SIDE           # (B,)
    assert (centre - 0.5 - moved).abs().max() < 0.03 and moved.abs().max() > 0.04


def test_a_file_of_soft_scenes():
    """Every second one went through the VAE; spoilt things count as not there; no scene is one of the check's."""
    vae = seg4diff.load("nano", device="cpu", dtype="float32").vae
    seeds = TRAIN_SEEDS[:6]
    shard = train_judge.make_shard(vae, seeds)
    spoilt = []
    for i, seed in enumerate(seeds):
        scene = scenes.draw(seed)
        rng = np.random.default_rng([seed, 1])
        spoilt.append(rng.random() < train_judge.SPOILT)
        expected = train_judge.spoil(scene, rng) if spoilt[-1] else scene
        drawn = torch.tensor(expected.image).permute(2, 0, 1).float()    # (3, SIDE, SIDE)
        change = (shard["images"][i] - drawn).abs().mean()
        assert change == 0 if i % 2 else 1 < change < 30
        assert shard["there"][i].sum() == len(scene.stuff) + len(scene.things) - spoilt[-1]
    assert 0 < sum(spoilt) < len(seeds)
    assert not set(TRAIN_SEEDS) & set(check_judge.HELD_OUT)
    assert set(check_judge.HELD_OUT) == set(VAL_SEEDS[1000:2000])


def training(tmp_path, run: str, **options) -> Namespace:
    return Namespace(**{"run": tmp_path / run, "out": tmp_path / f"{run}.safetensors", "scenes": 2, "steps": 2,
                        "batch": 2, "seed": 0} | options)


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """Killed in its second step, it ends with the weights of a run that was not; its scenes are drawn once."""
    monkeypatch.setattr(train_judge, "SAVE", 1)
    train_judge.main(training(tmp_path, "whole"))
    whole = load_file(tmp_path / "whole.safetensors")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed/judge.pt").unlink()
    monkeypatch.setattr(train_judge, "make_shard", None)
    optimise = train_judge.optimise
    rates = []

    def killed(opts, loss, rate):
        if len(rates) == 1:
            raise KeyboardInterrupt
        rates.append(rate)
        return optimise(opts, loss, rate)
    monkeypatch.setattr(train_judge, "optimise", killed)
    with pytest.raises(KeyboardInterrupt):
        train_judge.main(training(tmp_path, "killed"))
    monkeypatch.setattr(train_judge, "optimise", optimise)
    assert not (tmp_path / "killed.safetensors").exists()
    train_judge.main(training(tmp_path, "killed"))
    again = load_file(tmp_path / "killed.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    new = judge.Judge().state_dict()
    assert any((whole[key] != new[key].half()).any() for key in ("bias", "there"))
    assert len(look(judge.load(tmp_path / "killed.safetensors"), [paint()])) == 1


def test_a_run_keeps_its_settings_and_its_scenes(tmp_path, monkeypatch):
    train_judge.main(training(tmp_path, "run", steps=1))
    for options, says in (({"seed": 1}, "seed '0' instead of '1'"), ({"steps": 2}, "steps '1' instead of '2'"),
                          ({"scenes": 3}, "scenes '2' instead of '3'")):
        with pytest.raises(ValueError, match=f"holds a run with {says}; name another --run"):
            train_judge.main(training(tmp_path, "run", **{"steps": 1} | options))
    path = tmp_path / "run/soft_000000.pt"
    good = torch.load(path)
    for damage, says in ({key: x[:1] for key, x in good.items()}, "it has not 2 scenes; remove it"), ([1], "an object"):
        torch.save(damage, path)
        with pytest.raises(Broken, match=f"soft_000000.pt' cannot be read as a file of soft scenes: .*{says}"):
            train_judge.main(training(tmp_path, "run", steps=1))
    monkeypatch.setattr(train_judge, "CODE", ["nano/judge.py"])
    with pytest.raises(ValueError, match="holds a run with code"):
        train_judge.main(training(tmp_path, "run", steps=1))


def test_options_of_the_training(command, tmp_path):
    (tmp_path / "file").touch()
    for options, says in ((["--scenes", 0], "from 1 to"), (["--seed", 10 ** 20], "from 0 to"),
                          (["--batch", 0], "at least 1"), (["--out", tmp_path / "file/x"], "cannot be a folder")):
        code, _, err = command("nano/train_judge.py", "--run", tmp_path / "run", *options)
        assert code == 2 and says in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- how it is checked


def test_kappa_and_interval_by_hand():
    a, b = [True, True, True, False], [True, True, False, False]
    assert check_judge.kappa(a, b) == pytest.approx((0.75 - 0.5) / 0.5)
    assert math.isnan(check_judge.kappa([True], [True]))
    assert check_judge.interval(8, 10) == " 80.0 % (49.0 to 94.3), n = 10"


def test_near_misses_do_not_hold(drawn):
    kinds = set()
    for i, scene in enumerate(drawn):
        rng = np.random.default_rng(i)
        for kind, claim in check_judge.near_misses(claims(scenes.caption(scene, rng)), scene, rng).items():
            kinds.add(kind)
            assert verdict(truth(scene), claim)["all right"] == 0
    assert kinds == {"a thing replaced", "a colour changed", "sides swapped", "stuff replaced"}


def test_a_judge_that_is_right_has_every_fact_right(drawn):
    for scene in drawn:
        assert all(all(answers) for answers in check_judge.facts_right(truth(scene), truth(scene)).values())


def test_the_list_of_judged_pictures_fits_its_captions():
    rows = check_judge.read_judged()
    assert len(rows) >= 100
    for row in rows:
        claim = claims(row["caption"])
        claimed = [len(claim.things), sum(colour is not None for _, colour in claim.things),
                   int(claim.relation is not None), len(claim.stuff)]
        assert [len(row[kind]) for kind in judge.COLUMNS[:-1]] == claimed
        assert set("".join(row[kind] for kind in judge.COLUMNS[:-1])) <= {"y", "n"}
    for before, row in pairwise(rows):                   # of one setting: pictures are made from seeds in a row
        if all(before[key] == row[key] for key in ("cfg", "pag", "perturb")):
            assert int(row["seed"]) == int(before["seed"]) + 1
    for row in rows[::20]:
        seed = int(row["seed"])
        assert row["caption"] == scenes.caption(scenes.draw(seed), np.random.default_rng(seed))
        assert seed in VAL_SEEDS and seed not in TRAIN_SEEDS


def test_pictures_are_made_as_the_list_says(monkeypatch):
    rows = [row for row in check_judge.read_judged() if int(row["seed"]) in (5000, 5001)]
    calls = []

    def generate(model, captions, **options):
        calls.append((len(captions), options))
        return captions

    monkeypatch.setattr(check_judge, "seg4diff", SimpleNamespace(generate=generate))
    assert check_judge.generate_judged(None, rows) == [row["caption"] for row in rows]
    assert calls == [(2, {"cfg": 1.0, "pag": 0.0, "perturb": [], "seed": 5000}),
                     (2, {"cfg": 1.0, "pag": 0.0, "perturb": [5], "seed": 5000})]


def test_the_check_prints_all_of_it(command, monkeypatch):
    """On the drawn scenes of three captions of the list, which are all right."""
    rows = check_judge.read_judged()[7:10]
    made = [Image.fromarray(scenes.draw(int(row["seed"])).image) for row in rows]
    monkeypatch.setattr(check_judge, "HELD_OUT", VAL_SEEDS[1000:1003])
    monkeypatch.setattr(check_judge, "read_judged", lambda: rows)
    monkeypatch.setattr(check_judge, "generate_judged", lambda model, rows: made)
    code, out, err = command("nano/judge.py", "--check")
    assert code == 0, err
    lines = {line.split("  ")[0]: line for line in out.replace("\n  ", "\n").splitlines()}
    assert "100.0 %" in lines["all of a scene"] and "n = 3" in lines["all of a scene"]
    assert "100.0 %" in lines["stuff replaced"]
    assert "kappa nan; holds by eye 100 %, by the judge 100 %" in lines["things"]
    code, _, err = command("nano/judge.py")
    assert code == 2 and "nothing to do without --check" in err

"""The experiments on nano's pictures: their arms, their captions, and what is said of the scores."""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import t
from test_quality import Fake, coloured, one_step_file, quick_file  # noqa: F401 - some are fixtures

import quality
import seg4diff
from quality import Arm
from support import effects
from support.effects import compare
from support.files import Broken
from tools import experiments


def experiment(name: str, depth: int = 8, out: Path = Path("none")) -> experiments.Experiment:
    """One of an MM-DiT of so many blocks, whose preset is nano's."""
    preset = SimpleNamespace(cfg=3.0, block=5)
    transformer = SimpleNamespace(config=SimpleNamespace(depth=depth))
    model = SimpleNamespace(transformer=transformer, preset=preset, name="nano", fingerprint="0")
    return experiments.EXPERIMENTS[name](model, Fake(), out)


def test_arms_of_the_experiments(tmp_path):
    blocks = experiment("blocks")
    assert len(blocks.arms) == 2 + 3 * 8 <= experiments.MOST
    for arm, base in blocks.pairs:
        assert (base.pag, base.cfg) == (0, arm.cfg) and (arm.pag == 1) != (len(arm.perturb) == 1)
    others = [(arm.perturb, base.perturb) for arm, base in blocks.pairs if base.perturb]
    assert others == 2 * [((5,), (block,)) for block in range(8) if block != 5]              # at cfg 1 and 3
    rows = []
    for block, difference in enumerate((0.1, 0.4, 0.0, 0.3, 0.2)):
        for column in ("first", "last"):
            sign = 1 if column == "last" else -1
            rows.append({"arm": f"b{block}", "column": column, "difference": sign * difference})
    arms = {f"b{block}": {"pag": 1.0, "blocks": [block]} for block in range(5)}
    content = {"model": ["nano", "0"], "judge": ["fake", "0"], "columns": ["first", "last"],
               "comparisons": rows, "arms": arms, "prompts": [""] * 29}
    path = tmp_path / "blocks-fake.json"                 # those of nano's judge are called blocks.json
    path.write_text(json.dumps(content))
    guidance = experiment("guidance", out=tmp_path)
    assert {arm.blocks for arm, _ in guidance.pairs} == {(1,), (3,), (5,)} and "on 29 other captions" in guidance.title
    assert len(guidance.arms) == 4 + 4 * 3 * 2 <= experiments.MOST
    assert guidance.unchanged == {"cfg1", "cfg1.5", "cfg2", "cfg3"}
    others = [(arm.name, base.name) for arm, base in guidance.pairs if base.pag]
    assert len(others) == 4 * 2 * 2 and ("cfg1.5-s3-block5", "cfg1.5-s3-block3") in others
    assert all(arm.replace("block5", "block") == base[:-1] for arm, base in others)          # at the same cfg and s
    path.write_text(json.dumps(content | {"prompts": [""] * 19}))
    with pytest.raises(ValueError, match="too few captions .*: 19; run"):
        experiment("guidance", out=tmp_path)
    path.write_text(json.dumps(content | {"model": ["other", "0"]}))
    with pytest.raises(ValueError, match="another model"):
        experiment("guidance", out=tmp_path)
    path.write_text(json.dumps(content | {"judge": ["fake", "1"]}))
    with pytest.raises(ValueError, match="another judge"):
        experiment("guidance", out=tmp_path)
    path.write_text(json.dumps({"model": ["nano", "0"], "judge": ["fake", "0"]}))
    with pytest.raises(Broken, match="result of the experiment blocks"):
        experiment("guidance", out=tmp_path)
    magnet = experiment("magnet")
    assert [(arm.cfg, arm.lora, base.lora) for arm, base in magnet.pairs] == [(1.0, experiments.LORA, None),
                                                                             (3.0, experiments.LORA, None)]
    assert list(magnet.seeds) == [0, 1, 2] and experiments.LORA.is_file()


def test_stages_share_no_scene(monkeypatch):
    monkeypatch.setattr(experiments, "best_blocks", lambda path, model, judge: ([1, 3, 5], 128))
    for stage, (begins, n) in {"blocks": (0, 128), "guidance": (128, 256), "magnet": (128, 256)}.items():
        assert (experiment(stage).first, experiment(stage).captions) == (begins, n)


def test_names_that_a_reader_understands():
    named = quality.named
    names = [named(1.5, 3.0, [5]).name, named(3, perturb=[1, 2]).name, named(1).name]
    assert names == ["cfg1.5-s3-block5", "cfg3-blurred1+2", "cfg1"]
    said = ["cfg 1.5, s 3, guided by block 5", "cfg 3, blurred block 1+2", "cfg 1"]
    assert list(map(experiments.readable, names)) == said


def test_a_flux_has_fewer_arms(tiny_flux, monkeypatch):
    """Its two double and two single blocks: blurred and as guidance at cfg 1 alone; the best at two scales of cfg."""
    model = replace(tiny_flux, preset=tiny_flux.preset.changed(cfg=3.0))
    arms = experiments.blocks(model, Fake(), Path("none")).arms
    assert len(arms) == 1 + 2 * 4 and {arm.cfg for arm in arms} == {1.0}
    monkeypatch.setattr(experiments, "best_blocks", lambda path, model, judge: ([0, 2, 3], 9))
    arms = experiments.guidance(model, Fake(), Path("none")).arms
    assert len(arms) == 2 + 2 * 3 * 2 and {arm.cfg for arm in arms} == {1.0, 2.0}


def test_experiment_command(command, quick_file, tmp_path, monkeypatch):  # noqa: F811
    """Each arm's pictures in a colour of their own; what draws them is tested in test_quality."""
    monkeypatch.setattr(effects, "LEAST", 2)
    monkeypatch.setattr(quality, "draw", coloured)
    options = ("--model", quick_file, "--device", "cpu", "--limit", 2)
    code, _, err = command("tools/experiments.py", "guidance", *options)
    assert code == 2 and "run the experiment blocks first" in err
    code, out, err = command("tools/experiments.py", "blocks", *options)
    assert code == 0, err
    result = json.loads((tmp_path / "out/experiments-tiny/blocks-fake.json").read_text())
    assert result["prompts"] == quality.captions(0, 2) and "26 comparisons; *: survives Holm" in out
    assert len(result["comparisons"]) == 2 * (3 * 3 + 2 * 2)
    for row in result["comparisons"]:
        arm = np.array(result["scores"][row["arm"]][row["column"]], float)
        base = np.array(result["scores"][row["base"]][row["column"]], float)
        found = compare(arm, base)
        assert row["verdict"] == found.verdict and row["verdict"] in out
        assert row["difference"] == (None if found.n == 0 else pytest.approx(found.difference))
        seen = None if found.error == 0 else found.seen
        assert row["could be seen"] == (None if found.n == 0 else pytest.approx(seen))
        assert row["with"] == (None if found.n == 0 else pytest.approx(np.nanmean(arm)))
        assert row["without"] == (None if found.n == 0 else pytest.approx(np.nanmean(base)))
    for name in ("blocks-fake.png", "blocks-fake_pictures.png"):
        assert min(Image.open(tmp_path / "out/experiments-tiny" / name).size) > 200


def test_stars_stand_for_all_comparisons_together():
    """p of 0.03 in each of two columns: either alone would pass 0.05, both together do not; 0.001 does."""
    n = 40
    x = np.random.default_rng(0).normal(size=(n, 1))
    x = (x - x.mean()) / x.std(ddof=1)                                       # (n, 1), mean 0 and deviation 1

    def with_p(p):
        return x + t.isf(p / 2, n - 1) / math.sqrt(n)
    scores = {"base": {"red": 0 * x, "light": 0 * x}, "weak": {"red": with_p(0.03), "light": with_p(0.03)},
              "strong": {"red": with_p(0.001), "light": 0 * x}}
    pairs = [(Arm("weak"), Arm("base")), (Arm("strong"), Arm("base"))]
    rows = experiments.rows_of(experiments.Experiment("", 0, n, range(1), pairs), scores, ("red", "light"))
    assert [row.found.p for row in rows] == pytest.approx([0.03, 0.001, 0.03, 1])
    assert [row.survives for row in rows] == [False, True, False, False]
    assert [line.endswith("*") for line in experiments.table(rows).splitlines()] == [False, False, True, False, False]
    assert [experiments.entry(row)["survives Holm"] for row in rows] == [False, True, False, False]


def test_what_is_no_experiment(quick_file, tmp_path, monkeypatch):  # noqa: F811
    args = SimpleNamespace(experiment="blocks", model=quick_file, judge=None, device="cpu", dtype="auto",
                           out=tmp_path / "out")
    monkeypatch.setattr(experiments, "MOST", 10)
    with pytest.raises(ValueError, match="11 arms are more than 10"):
        experiments.main(args)
    monkeypatch.setattr(quality, "toy", lambda model: False)
    with pytest.raises(ValueError, match="python evaluate.py --task quality"):
        experiments.main(args)
    assert not args.out.exists()


def test_magnet_is_in_its_arms_alone(quick_file, own_lora, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(experiments, "LORA", own_lora)
    experiments.main(SimpleNamespace(experiment="magnet", model=quick_file, judge=None, device="cpu",
                                     dtype="float32", out=tmp_path, limit=1))
    result = json.loads((tmp_path / "magnet-fake.json").read_text())
    assert result["prompts"] == quality.captions(128, 1) and result["arms"]["cfg3-MAGNET"]["lora"] == "own.safetensors"
    assert result["scores"]["cfg3"] != result["scores"]["cfg3-MAGNET"]
    plain, adapted = (json.loads((tmp_path / f"magnet/{arm}/identity.json").read_text())
                      for arm in ("cfg3", "cfg3-MAGNET"))
    assert plain["fingerprint"] == seg4diff.load(quick_file, "cpu").fingerprint != adapted["fingerprint"]

"""Each analysis against explicit loops, and the command with every figure."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import analysis
import figures
import lora as lora_module
import seg4diff
from mmdit import JointQKV, joint_probs
from nano import scenes
from seg4diff import blur_i2t
from support.data import DATASETS


def random_qkv(B=2, H=3, h=3, w=4, M=6, d=5) -> JointQKV:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, h * w + M, d)
    return JointQKV(q, k, v, h * w, (h, w))


def test_shares_by_loops():
    qkv, N, M = random_qkv(), 12, 6
    A, got = joint_probs(qkv), analysis.attention_shares(qkv)
    for b in range(2):
        for h in range(3):
            rows = [sum(A[b, h, i, j].item() for j in range(N, N + M)) for i in range(N)]
            assert got["I2T"][b, h].item() == pytest.approx(sum(rows) / N, abs=1e-5)
            rows = [sum(A[b, h, i, j].item() for j in range(N)) for i in range(N, N + M)]
            assert got["T2I"][b, h].item() == pytest.approx(sum(rows) / M, abs=1e-5)
    for one, other in (("I2I", "I2T"), ("T2I", "T2T")):
        assert torch.allclose(got[one] + got[other], torch.ones(2, 3))
    assert analysis.uniform_share(qkv) == pytest.approx(12 / 18)
    flat = analysis.attention_shares(qkv._replace(q=torch.zeros_like(qkv.q)))                # uniform attention
    assert torch.allclose(flat["I2T"], torch.full((2, 3), 6 / 18))


def test_value_norms_by_loops():
    qkv, N = random_qkv(), 12
    got = analysis.value_norms(qkv, [2, 0])
    v = qkv.v.numpy()
    for kind, span in (("image", range(N)), ("text", range(N, N + 6)), ("prompt", range(N + 1, N + 3))):
        whole, heads = got[kind]
        want = np.mean([np.sqrt(sum((v[0, h, i] ** 2).sum() for h in range(3))) for i in span])
        assert whole[0].item() == pytest.approx(want, rel=1e-5)
        for h in range(3):
            assert heads[0, h].item() == pytest.approx(np.mean([np.linalg.norm(v[0, h, i]) for i in span]), rel=1e-5)
    assert got["prompt"][0][1].isnan() and not got["text"][0].isnan().any()


def test_pca_finds_planted_directions():
    """Features that vary most from left to right, then from top to bottom, with a little noise."""
    rng, (h, w) = np.random.default_rng(0), (8, 8)
    y, x = np.mgrid[0:h, 0:w]
    basis = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    features = 10 * x.reshape(-1, 1) * basis[0] + 3 * y.reshape(-1, 1) * basis[1] + 0.01 * rng.normal(size=(64, 20)) + 5
    rgb = analysis.pca_rgb(torch.from_numpy(features), (h, w))
    assert rgb.shape == (8, 8, 3) and rgb.min() == 0 and rgb.max() == 1
    assert abs(np.corrcoef(rgb[..., 0].ravel(), x.ravel())[0, 1]) > 0.999
    assert abs(np.corrcoef(rgb[..., 1].ravel(), y.ravel())[0, 1]) > 0.999
    assert np.allclose(rgb, analysis.pca_rgb(torch.from_numpy(features * 3 + 1), (h, w)), atol=1e-3)


def test_token_maps_are_columns():
    qkv = random_qkv()
    A = joint_probs(qkv)
    got = analysis.token_maps(qkv, [0, 4])
    assert got.shape == (2, 3, 2, 3, 4)
    for t, column in enumerate((0, 4)):
        for i in range(12):
            assert got[1, 2, t, i // 4, i % 4].item() == pytest.approx(A[1, 2, i, 12 + column].item(), abs=1e-6)
            back = analysis.token_maps(qkv, [0, 4], "t2i")[1, 2, t, i // 4, i % 4].item()
            assert back == pytest.approx(A[1, 2, 12 + column, i].item(), abs=1e-6)


@torch.inference_mode()
def test_taps_while_generating(tiny):
    prompts = ["a red car", "snow"]
    images, cond, taps = analysis.taps_of(tiny, prompts, [28, 8], seed=3)
    want = seg4diff.generate(tiny, prompts, seed=3)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, want))
    z = seg4diff.noise((16, 16, 16), [3, 4])                                                 # t = 28: noise alone
    _, direct = tiny.transformer(z, torch.ones(2), cond.ctx, cond.pooled, capture=range(3))
    for block in range(3):
        assert torch.allclose(taps[28][block].q, direct[block].q, atol=1e-4)
        assert not torch.allclose(taps[8][block].q, direct[block].q, atol=1e-2)
    assert [cond.tokens[0][i] for i in analysis.words_of(cond, 0)] == ["a", "red", "car"]
    for t in (0, 29):
        with pytest.raises(ValueError, match="steps 1 to 28"):
            analysis.taps_of(tiny, prompts, [t])


@torch.inference_mode()
def test_caption_losses_by_hand(tiny):
    images = [Image.fromarray(scenes.draw(s).image) for s in (0, 1)]
    got = analysis.caption_losses(tiny, images, [["sand", "water", ""], ["snow", "red car", ""]])
    z0, total = seg4diff.encode_image(tiny, images[1]), 0.0
    for k in range(analysis.JUDGE_DRAWS):
        eps, cond = seg4diff.noise((16, 16, 16), [1_000_003 * (k + 1) + 1]), tiny.text.encode(["red car"])
        vel, _ = tiny.transformer(0.2 * z0 + 0.8 * eps, torch.tensor([0.8]), cond.ctx, cond.pooled)
        total += ((vel - (eps - z0)) ** 2).mean().item() / analysis.JUDGE_DRAWS
    assert got.shape == (2, 3) and got[1, 1] == pytest.approx(total, rel=1e-4)
    assert analysis.judge_accuracy(np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1.0]])) == pytest.approx(200 / 3)
    assert analysis.choices(["a", "b", "c"]) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert len(analysis.choices(list("abcdefghijkl"))[11]) == analysis.CHOICES


def test_the_judge_never_sees_the_noise_a_picture_was_made_from(tiny, monkeypatch):
    used, plain = [], seg4diff.noise
    monkeypatch.setattr(seg4diff, "noise", lambda shape, seeds: used.extend(seeds) or plain(shape, seeds))
    images = seg4diff.generate(tiny, ["snow", "sand"], steps=1)
    begun = set(used)
    used.clear()
    analysis.caption_losses(tiny, images, [["snow"], ["sand"]])
    assert begun == {0, 1} and len(set(used)) == 2 * analysis.JUDGE_DRAWS and not begun & set(used)


def test_nano_tells_captions_apart():
    """The judge, validated on scenes with their own and with each other's captions."""
    model = seg4diff.load("nano", device="cpu")
    drawn = [scenes.draw(s) for s in scenes.VAL_SEEDS[300:308]]
    captions = [scenes.caption(s, np.random.default_rng(i)) for i, s in enumerate(drawn)]
    losses = analysis.caption_losses(model, [Image.fromarray(s.image) for s in drawn], analysis.choices(captions))
    assert analysis.judge_accuracy(losses) >= 75                                             # chance: 12.5


def test_sensitivity_is_that_of_the_explicit_blur(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    unlabelled = item._replace(labels=np.full_like(item.labels, 255))
    got = analysis.sensitivity(tiny, [unlabelled, item], data.classes, 0.5)
    cond = tiny.text.encode([[data.classes[k] for k in np.unique(item.labels)]])
    with torch.inference_mode():
        z0 = seg4diff.encode_image(tiny, item.image)
        eps = seg4diff.noise((16, 16, 16), [analysis.evaluate.image_seed(item.name, 0)])
        args = (0.5 * z0 + 0.5 * eps, torch.tensor([0.5]), cond.ctx, cond.pooled)
        plain, _ = tiny.transformer(*args)
        want = [100 * ((tiny.transformer(*args, edit={i: blur_i2t})[0] - plain).norm() / plain.norm()).item() for i in range(3)]
    assert got.shape == (1, 3) and got[0] == pytest.approx(want, rel=1e-2)


def test_bootstrap():
    """Block 1 is right everywhere, block 0 on every second picture, block 2 never."""
    right, wrong = np.diag([30, 10]), np.array([[0, 30], [10, 0]])
    counts = np.array([[right if i % 2 else wrong, right, wrong] for i in range(20)])
    miou, best = analysis.bootstrap(counts, draws=200)
    assert miou.shape == (200, 3) and best.tolist() == [0, 1, 0]
    assert (miou[:, 1] == 100).all() and (miou[:, 2] == 0).all() and 0 < miou[:, 0].min() < miou[:, 0].max() < 100
    assert np.array_equal(miou, analysis.bootstrap(counts, draws=200)[0])
    assert not np.array_equal(miou, analysis.bootstrap(counts, draws=200, seed=1)[0])
    close = np.array([[right if i % 2 else wrong, wrong if i % 2 else right] for i in range(20)])
    assert 0.2 < analysis.bootstrap(close, draws=500)[1][0] < 0.8


def test_every_figure(command, tiny_file, tmp_path):
    code, out, err = command("figures.py", "--model", tiny_file, "--limit", 2, "--out", tmp_path / "a", "--device", "cpu")
    assert code == 0, err
    assert not (tmp_path / "a" / "magnet.json").exists()
    for figure in [f for f in figures.FIGURES if f != "magnet"]:
        numbers = json.loads((tmp_path / "a" / f"{figure}.json").read_text())
        assert numbers.get("prompts", 2) == 2 and f"wrote {tmp_path}/a/{figure}.json" in out
        assert min(Image.open(tmp_path / "a" / f"{figure}.png").size) > 100
    shares = json.loads((tmp_path / "a" / "shares.json").read_text())
    assert all(0 < x < 1 for x in shares["shares"]["8"]["I2T"]) and shares["uniform image share"] == pytest.approx(256 / 312)
    rows = json.loads((tmp_path / "a" / "perturb.json").read_text())["rows"]
    assert list(rows) == ["none", "block 0", "block 1", "block 2", "all"] and rows["none"]["gain"] != rows["all"]["gain"]
    found = json.loads((tmp_path / "a" / "expert.json").read_text())
    assert found["n"] == 4 and len(found["rows"]) == 3 and len(found["rank correlation"]) == 3
    found = json.loads((tmp_path / "a" / "text.json").read_text())
    assert found["n"] == 4 and "0.515" in found["flow loss saved by class names [%]"]


def test_words_matter_where_segmentation_reads(tmp_path):
    """nano: a picture's own names save flow loss at sigma 0.515, another's save less; at 0.1 the picture says it all."""
    found = figures.text(seg4diff.load("nano", device="cpu"), [], tmp_path, limit=12)
    rows = found["flow loss saved by class names [%]"]
    assert found["n"] == 12 and rows[0.515]["own"] > 3 * rows[0.515]["error"] > 0
    assert rows[0.515]["others"] < rows[0.515]["own"] and abs(rows[0.1]["own"]) < rows[0.515]["own"] < rows[0.9]["own"]


def test_a_lora_changes_what_is_read(command, tiny_file, tmp_path):
    model = seg4diff.load(tiny_file, device="cpu")
    for p in lora_module.add_lora(model.transformer, generator=torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(p, std=0.2)
    lora_module.save_lora(model.transformer, tmp_path / "own.safetensors")
    lora = ["--lora", tmp_path / "own.safetensors"]
    for out, options in (("a", ["shares"]), ("b", ["shares", "magnet", *lora])):
        assert command("figures.py", *options, "--model", tiny_file, "--limit", 1, "--out", tmp_path / out)[0] == 0
    a, b = (json.loads((tmp_path / out / "shares.json").read_text()) for out in "ab")
    assert b["model"][0] == a["model"][0] + "+own" and b["model"] != a["model"] and b["shares"] != a["shares"]
    found = json.loads((tmp_path / "b" / "magnet.json").read_text())
    assert found["change of generated pictures [grey levels of 255]"] > 1 and len(found["pictures"]) == 3
    assert all(Image.open(tmp_path / "b" / f).height > 300 for f in ("magnet.png", "magnet_pictures.png"))


def test_prompts_of_ones_own(command, tiny_file, tmp_path):
    (tmp_path / "mine.txt").write_text("a car\n\nsnow\n")
    code, out, _ = command("figures.py", "pads", "tokens", "--model", tiny_file, "--prompts", "mine.txt")
    assert code == 0 and 'tokens: prompt: "a car"' in out
    assert sorted(p.name for p in (tmp_path / "out/figures-tiny").iterdir()) == [
        "pads.json", "pads.png", "tokens.json", "tokens.png"]


@pytest.mark.parametrize("args, told", [
    (["shades"], "no figure 'shades'"), (["--limit", "0"], "at least 1"), (["--model", "none"], "no model"),
    (["pads", "--prompts", "none.txt"], "not a file"), (["pads", "--prompts", "blank.txt"], "holds no prompt"),
    (["expert", "--dataset", "foo"], "no data set 'foo'"), (["magnet"], "--lora"), (["--device", "cpu:foo"], "no device"),
    (["--device", "cuda:9"], "CUDA devices")])
def test_bad_input(command, tiny_file, tmp_path, args, told):
    (tmp_path / "blank.txt").write_text("\n \n")
    model = [] if "--model" in args else ["--model", tiny_file]
    code, _, err = command("figures.py", *args, *model)
    assert code == 2 and err.startswith("error: ") and told in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))

"""Each analysis against explicit loops, and the command with every figure."""
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_data import put
from torch import Tensor

import analysis
import figures
import sampling
import seg4diff
from loading import image_seed
from mmdit import JointQKV, joint_probs
from nano import scenes
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
    whole, heads = analysis.value_norms(qkv, [slice(1, 3), slice(0, 0)])
    v = qkv.v.numpy()
    for kind, span in (("image", range(N)), ("text", range(N, N + 6)), ("prompt", range(N + 1, N + 3))):
        want = np.mean([np.sqrt(sum((v[0, h, i] ** 2).sum() for h in range(3))) for i in span])
        assert whole[kind].shape == (2,) and whole[kind][0].item() == pytest.approx(want, rel=1e-5)
        for h in range(3):
            want = np.mean([np.linalg.norm(v[0, h, i]) for i in span])
            assert heads[kind].shape == (2, 3) and heads[kind][0, h].item() == pytest.approx(want, rel=1e-5)
    assert whole["prompt"][1].isnan() and heads["prompt"][1].isnan().all() and not whole["text"][0].isnan().any()


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
    assert cond.tokens[0][:5] == ["<sos>", "a", "red", "car", "<eos>"]
    for t in (0, 29):
        with pytest.raises(ValueError, match="steps 1 to 28"):
            analysis.taps_of(tiny, prompts, [t])


@pytest.fixture
def quick_file(tiny_file, tmp_path, monkeypatch) -> Path:
    """The tiny model with a sampler of 4 steps and captions scored with one draw: nothing in these tests depends on
    how good its pictures or how exact their scores are."""
    monkeypatch.setattr(analysis, "CAPTION_DRAWS", 1)
    with safe_open(tiny_file, "pt") as f:
        header = f.metadata()
    presets = {**json.loads(header["presets"]), "steps": 4, "noise_steps": 2}
    save_file(load_file(tiny_file), tmp_path / "tiny.safetensors", {**header, "presets": json.dumps(presets)})
    return tmp_path / "tiny.safetensors"


@torch.inference_mode()
def test_means_over_prompts(quick_file):
    """Over two batches, from the noise of each prompt's place; the empty prompt has no words, so it does not count."""
    model = seg4diff.load(quick_file, device="cpu")
    prompts = ["a red car", "", "snow"]
    model.preset = model.preset.__class__(**{**vars(model.preset), "batch": 2})
    alone = [analysis.taps_of(model, [prompt], [2, 4], seed=i)[2] for i, prompt in enumerate(prompts)]
    shares, uniform = analysis.mean_shares(model, prompts, [2, 4])
    norms, by_head = analysis.mean_norms(model, prompts)
    assert uniform == pytest.approx(256 / 312)
    for block in range(3):
        for t in (2, 4):
            want = np.mean([analysis.attention_shares(taps[t][block])["I2T"].mean() for taps in alone])
            assert shares[t]["I2T"][block] == pytest.approx(want, rel=1e-4)
        words = (slice(1, 4), slice(0, 0), slice(1, 2))  # after <sos>
        whole, heads = zip(*(analysis.value_norms(taps[2][block], [x]) for taps, x in zip(alone, words)))
        assert norms["text"][block] == pytest.approx(np.mean([x["text"].item() for x in whole]), rel=1e-4)
        for i in (0, 1):
            want = np.mean([whole[0]["prompt"].item(), whole[2]["prompt"].item()])
            assert norms["prompt"][block] == pytest.approx(want, rel=1e-4)
            want = (heads[0]["prompt"][0, i] + heads[2]["prompt"][0, i]).item() / 2
            assert by_head["prompt"][block][i] == pytest.approx(want, rel=1e-4)


@torch.inference_mode()
def test_norms_of_a_flux_s_words(tiny_flux):
    """T5 has no <sos>: a prompt's words begin in the first column."""
    model = replace(tiny_flux, preset=tiny_flux.preset.changed(steps=2, noise_steps=1))
    assert model.text.encode(["sky"]).tokens[0][:2] == ["sky", "<eos>"]
    norms, _ = analysis.mean_norms(model, ["sky"])
    _, _, taps = analysis.taps_of(model, ["sky"], [1])
    for block in range(4):
        v = taps[1][block].v[0, :, taps[1][block].n_img]                     # (H, d), of "sky"
        assert norms["prompt"][block] == pytest.approx(v.norm().item(), rel=1e-5)


@torch.inference_mode()
def test_caption_losses_by_hand(tiny):
    images = [Image.fromarray(scenes.draw(s).image) for s in (0, 1)]
    got = analysis.caption_losses(tiny, images, [["sand", "water", ""], ["snow", "red car", ""]])
    z0, total = seg4diff.encode_image(tiny, images[1]), 0.0
    for k in range(analysis.CAPTION_DRAWS):
        eps, cond = seg4diff.noise((16, 16, 16), [1_000_003 * (k + 1) + 1]), tiny.text.encode(["red car"])
        vel, _ = tiny.transformer(0.2 * z0 + 0.8 * eps, torch.tensor([0.8]), cond.ctx, cond.pooled)
        total += ((vel - (eps - z0)) ** 2).mean().item() / analysis.CAPTION_DRAWS
    assert got.shape == (2, 3) and got[1, 1] == pytest.approx(total, rel=1e-4)
    assert analysis.caption_accuracy(np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1.0]])) == pytest.approx(200 / 3)
    assert analysis.loss_saved(np.array([[1.5, 2, 3]]), 0, 1).tolist() == [25]
    assert analysis.choices(["a", "b", "c"]) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert len(analysis.choices(list("abcdefghijkl"))[11]) == analysis.CHOICES


def test_captions_are_scored_with_other_noise_than_pictures_begin_from(tiny, monkeypatch):
    used, plain = [], seg4diff.noise
    for module in (seg4diff, sampling):
        monkeypatch.setattr(module, "noise", lambda shape, seeds: used.extend(seeds) or plain(shape, seeds))
    images = seg4diff.generate(tiny, ["snow", "sand"], steps=1)
    begun = set(used)
    used.clear()
    analysis.caption_losses(tiny, images, [["snow"], ["sand"]])
    assert begun == {0, 1} and len(set(used)) == 2 * analysis.CAPTION_DRAWS and not begun & set(used)


def test_nano_tells_captions_apart(monkeypatch):
    """The score, validated on scenes with their own and with each other's captions.

    One draw of noise instead of four: less exact, and exact enough. Guessing (1 of 8) would be right for 6 of 8
    pictures or more once in 13,000 times.
    """
    monkeypatch.setattr(analysis, "CAPTION_DRAWS", 1)
    model = seg4diff.load("nano", device="cpu")
    drawn = [scenes.draw(s) for s in scenes.VAL_SEEDS[300:308]]
    captions = [scenes.caption(s, np.random.default_rng(i)) for i, s in enumerate(drawn)]
    losses = analysis.caption_losses(model, [Image.fromarray(s.image) for s in drawn], analysis.choices(captions))
    assert losses.shape == (8, 8) and analysis.caption_accuracy(losses) >= 75


def blur_i2t(probs: Tensor, qkv: JointQKV) -> Tensor:
    """The perturbation as A.3 says it: I2T of Eq. 4's matrix blurred along the text tokens; an `edit`."""
    N, M = qkv.n_img, probs.shape[-1] - qkv.n_img
    out = probs.clone()
    out[:, :, :N, N:] = probs[:, :, :N, N:] @ seg4diff.blur_matrix(M)
    return out


def test_sensitivity_is_that_of_the_explicit_blur(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    unlabelled = item._replace(labels=np.full_like(item.labels, 255))
    got = analysis.sensitivity(tiny, [unlabelled, item], data.classes, 0.5)
    cond = tiny.text.encode([[data.classes[k] for k in np.unique(item.labels)]])
    with torch.inference_mode():
        z0 = seg4diff.encode_image(tiny, item.image)
        eps = seg4diff.noise((16, 16, 16), [image_seed(item.name, 0)])
        args = (0.5 * z0 + 0.5 * eps, torch.tensor([0.5]), cond.ctx, cond.pooled)
        plain, _ = tiny.transformer(*args)
        blurred = [tiny.transformer(*args, edit={i: blur_i2t})[0] for i in range(3)]
        want = [100 * ((vel - plain).norm() / plain.norm()).item() for vel in blurred]
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


def test_every_figure(command, quick_file, tmp_path):
    out = tmp_path / "a"
    code, printed, err = command("figures.py", "--model", quick_file, "--limit", 2, "--out", out, "--device", "cpu")
    assert code == 0, err
    assert not (out / "magnet.json").exists()
    numbers = {}
    for figure in [f for f in figures.FIGURES if f not in ("magnet", "compare")]:
        numbers[figure] = json.loads((out / f"{figure}.json").read_text())
        assert numbers[figure].get("prompts", 2) == 2 and f"wrote {out}/{figure}.json" in printed
        assert min(Image.open(out / f"{figure}.png").size) > 100
    shares = numbers["shares"]
    assert all(0 < x < 1 for x in shares["shares"]["2"]["I2T"]) and list(shares["shares"]) == ["2", "4"]
    assert shares["uniform image share"] == pytest.approx(256 / 312)
    rows = numbers["perturb"]["rows"]
    assert list(rows) == ["none", "block 0", "block 1", "block 2", "all"]
    assert rows["none"]["gain"] != rows["all"]["gain"]
    assert list(numbers["guide"]["rows"]) == ["none", "block 0", "block 1", "block 2"]
    assert "1 draws, 2 captions" in numbers["guide"]["judge"]
    expert = numbers["expert"]
    assert expert["n"] == 4 and len(expert["rows"]) == 3 and len(expert["rank correlation"]) == 3
    sigma = round(seg4diff.load(quick_file, device="cpu").preset.sigma, 3)
    levels = numbers["text"]["flow loss saved by class names [%]"]
    assert numbers["text"]["n"] == 4 and set(levels) == {"0.1", "0.3", "0.7", "0.9", str(sigma)}


def test_words_matter_where_segmentation_reads(tmp_path, monkeypatch):
    """nano: a picture's own names save flow loss at sigma 0.515, another's save less; at 0.1 the picture says it all.

    8 pictures and one draw of noise: the names save 4.5 % with a standard error of 0.7 %, twice as much as is asked.
    """
    monkeypatch.setattr(analysis, "CAPTION_DRAWS", 1)
    monkeypatch.setattr(figures, "TEXT_LEVELS", (0.1, 0.9))
    model = seg4diff.load("nano", device="cpu")
    numbers = figures.text_matters(model, tmp_path, DATASETS["scenes-dev"](), limit=8)
    rows = numbers["flow loss saved by class names [%]"]
    assert numbers["n"] == 8 and rows[0.515]["own"] > 3 * rows[0.515]["error"] > 0
    assert rows[0.515]["others"] < rows[0.515]["own"] and abs(rows[0.1]["own"]) < rows[0.515]["own"] < rows[0.9]["own"]


def test_a_lora_changes_what_is_read(command, quick_file, own_lora, tmp_path):
    for out, options in (("a", ["shares"]), ("b", ["shares", "magnet", "compare", "--lora", own_lora])):
        assert command("figures.py", *options, "--model", quick_file, "--limit", 1, "--out", tmp_path / out)[0] == 0
    a, b = (json.loads((tmp_path / out / "shares.json").read_text()) for out in "ab")
    assert b["model"][0] == a["model"][0] + "+own" and b["model"] != a["model"] and b["shares"] != a["shares"]
    found = json.loads((tmp_path / "b" / "magnet.json").read_text())
    assert len(found["pictures"]) == 3
    drawn = json.loads((tmp_path / "b" / "compare.json").read_text())
    assert drawn["change of generated pictures [grey levels of 255]"] > 1 and drawn["prompts"] == 1
    assert Image.open(tmp_path / "b/magnet.png").height > 300
    assert Image.open(tmp_path / "b/compare.png").height > 100


def test_broken_pictures_are_named_counted_and_left_out(command, quick_file, own_lora, tmp_path):
    """The first is cut off, the third has no label map, the last has nothing labelled; two are left."""
    base = tmp_path / "data/VOCdevkit/VOC2012"
    names = [f"p{i}" for i in range(5)]
    labels = np.repeat([[7] * 20 + [8] * 40], 40, axis=0)
    for i, name in enumerate(names):
        put(base / f"JPEGImages/{name}.jpg", np.random.default_rng(i).integers(0, 255, (40, 60, 3)))
        put(base / f"SegmentationClass/{name}.png", 0 * labels if name == "p4" else labels, palette=True)
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    (base / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    (base / "JPEGImages/p0.jpg").write_bytes((base / "JPEGImages/p0.jpg").read_bytes()[:500])
    (base / "SegmentationClass/p2.png").unlink()
    options = ("--model", quick_file, "--lora", own_lora, "--dataset", "voc", "--data-root", tmp_path / "data")
    shown = {"expert": {"n": 2}, "text": {"n": 2}, "strip": {"picture": "p1"}, "magnet": {"pictures": ["p1", "p3"]}}
    code, out, err = command("figures.py", *shown, *options, "--limit", 3, "--out", "o")
    assert code == 0, err
    for figure, facts in shown.items():
        found = json.loads((tmp_path / f"o/{figure}.json").read_text())
        broken = ["p0"] if figure == "strip" else ["p0", "p2"]
        assert list(found["broken"]) == broken and found | facts == found
        assert all(f"{figure}: picture {name} is left out: '" in out for name in broken)
        assert f"{figure}: {len(broken)} pictures cannot be read and are left out\n" in out


def test_prompts_of_ones_own(command, quick_file, tmp_path):
    (tmp_path / "mine.txt").write_text("a car\n\nsnow\n")
    code, out, _ = command("figures.py", "pads", "tokens", "--model", quick_file, "--prompts", "mine.txt")
    assert code == 0 and 'tokens: prompt: "a car"' in out
    assert sorted(p.name for p in (tmp_path / "out/figures-tiny").iterdir()) == [
        "pads.json", "pads.png", "tokens.json", "tokens.png"]


def test_prompts_for_each_model():
    """Captions of the toy world for a model of its size, else the 50 of DrawBench; as many as are asked for."""
    small, large = (SimpleNamespace(preset=SimpleNamespace(size=size)) for size in (scenes.SIDE, 1024))
    drawn = scenes.draw(scenes.VAL_SEEDS[1])
    assert figures.prompts_for(small, 2)[1] == scenes.caption(drawn, np.random.default_rng(scenes.VAL_SEEDS[1]))
    assert len(figures.prompts_for(small, 3)) == len(figures.prompts_for(large, 3)) == 3
    assert len(set(figures.prompts_for(large, 99))) == 50


@pytest.mark.parametrize("args, says", [
    (["shades"], "invalid choice: 'shades'"), (["--limit", "0"], "at least 1"), (["--model", "none"], "no model"),
    (["pads", "--prompts", "none.txt"], "no such file"), (["pads", "--prompts", "blank.txt"], "holds no prompt"),
    (["expert", "--dataset", "foo"], "invalid choice: 'foo'"), (["magnet"], "--lora"),
    (["--device", "cpu:foo"], "no device"), (["--device", "cuda:9"], "CUDA devices")])
def test_bad_input(command, tiny_file, tmp_path, args, says):
    (tmp_path / "blank.txt").write_text("\n \n")
    model = [] if "--model" in args else ["--model", tiny_file]
    code, _, err = command("figures.py", *args, *model)
    assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_sensitivity_takes_each_picture_s_own_noise(tiny, monkeypatch):
    seeds = []
    noise = seg4diff.noise
    monkeypatch.setattr(seg4diff, "noise", lambda shape, s: seeds.extend(s) or noise(shape, s))
    data = DATASETS["scenes"]()
    items = [data.read(name) for name in data.names[:2]]
    analysis.sensitivity(tiny, items, data.classes, 0.5)
    assert seeds == [image_seed(item.name, 0) for item in items]


def test_the_dotted_line_of_each_pathway(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(figures, "write_figure", lambda path, fig: made.append(fig))
    mean = {t: {"I2T": [0.1], "T2I": [0.9]} for t in (8, 28)}
    monkeypatch.setattr(analysis, "mean_shares", lambda model, prompts, at: (mean, 0.75))
    model = SimpleNamespace(name="tiny", preset=SimpleNamespace(noise_steps=8, steps=28))
    figures.shares(model, ["x"], tmp_path)
    uniform = [[line.get_ydata()[0] for line in ax.lines if line.get_label() == "uniform"] for ax in made[0].axes]
    assert uniform == [[0.25], [0.75]]


def test_the_ratio_of_norms(tiny, monkeypatch, tmp_path):
    norms = {"prompt": [2.0, 8, 3], "image": [2.0, 4, 6]}
    monkeypatch.setattr(analysis, "mean_norms", lambda model, prompts: (norms, {}))
    found = figures.expert(tiny, ["x"], tmp_path, DATASETS["scenes-dev"](), 2)
    assert found["rows"]["value norm, prompt / image"] == [1, 2, 0.5]


def test_limits_of_expert(tiny, monkeypatch, tmp_path):
    miou = np.arange(1001.0)[:, None].repeat(3, 1)
    monkeypatch.setattr(analysis, "bootstrap", lambda counts: (miou, np.ones(3) / 3))
    norms = {"prompt": [1.0, 2, 3], "image": [1.0, 1, 1]}
    monkeypatch.setattr(analysis, "mean_norms", lambda model, prompts: (norms, {}))
    found = figures.expert(tiny, ["x"], tmp_path, DATASETS["scenes-dev"](), 2)
    assert found["95% of mIoU"] == [[25] * 3, [975] * 3]


def test_how_often_own_names_explain_better(tiny, monkeypatch, tmp_path):
    losses = np.array([[8.0, 10, 7], [8.0, 10, 9], [11.0, 10, 9], [8.0, 10, 9]])       # own, empty, others
    monkeypatch.setattr(analysis, "caption_losses", lambda *args: losses)
    found = figures.text_matters(tiny, tmp_path, DATASETS["scenes-dev"](), 4)
    row = found["flow loss saved by class names [%]"][0.1]
    assert row["own explain better than others [% of pictures]"] == 50 and row["own"] == pytest.approx(12.5)


def test_others_are_the_next_picture_s_names(tiny, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(analysis, "caption_losses", lambda model, images, captions, sigma: seen.append(captions)
                        or np.ones((len(images), 3)))
    figures.text_matters(tiny, tmp_path, DATASETS["scenes-dev"](), 3)
    own = [texts[0] for texts in seen[0]]
    assert [texts[2] for texts in seen[0]] == [own[1], own[2], own[0]] and {texts[1] for texts in seen[0]} == {""}


def test_overlays_of_class_shares_have_the_data_set_s_colours(tiny, monkeypatch):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    seen = []
    monkeypatch.setattr(figures, "overlay", lambda image, labels, colours: seen.append(labels))
    figures.class_shares(tiny, item, data, "paper")
    assert set(np.unique(seen[0])) <= set(np.unique(item.labels))


def test_class_shares_take_the_picture_s_own_noise(tiny, monkeypatch):
    seen = []
    segment = seg4diff.segment
    monkeypatch.setattr(seg4diff, "segment", lambda *args, **options: seen.append(options["seed"]) or segment(
        *args, **options))
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])
    figures.class_shares(tiny, item, data, "paper")
    assert seen == [image_seed(item.name, 0)]

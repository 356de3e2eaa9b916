"""The explorer: its page holds what the library computes, and asks for nothing from elsewhere.

What a reader does in the page: test_explore_browser.py and test_explore_tasks.py.
"""
import base64
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import explore
import loading
import seg4diff
from lora import add_lora, save_lora
from mmdit import JointQKV, i2i, i2t_attention, joint_probs, t2i_attention
from nano import scenes
from support.metrics import classes_in
from support.page import write

NAMES = ["car", "sky", "teddy bear"]
PROMPT = "A small red car, left of a teddy bear with sand under the sky"
SEED = 3


def unpack(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)


def read_page(path: Path) -> dict:
    """The data of a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    return json.loads(text)


def values(stored: dict) -> torch.Tensor:
    """What support.page.quantised stored, as the page's script reads it."""
    top = unpack(stored["top"], np.float32).reshape(*stored["shape"][:-1], 1)
    codes = unpack(stored["codes"], np.uint8).reshape(stored["shape"])
    return torch.from_numpy(top * (codes / np.float32(stored["steps"])) ** 2)


def assert_stored(stored: dict, maps: torch.Tensor) -> None:
    """Equal within half a step of the square root of a value's share of its map's largest."""
    got = values(stored)
    assert got.shape == maps.shape
    top = maps.amax(-1, keepdim=True)
    half = 0.5 / stored["steps"]
    bound = top * (2 * half * (maps / top).sqrt() + half ** 2)
    assert ((got - maps).abs() <= 1.01 * bound).all()


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(scenes.draw(0).image).resize((60, 45)).save(path)
    return path


@pytest.fixture
def page(command, tiny_file, tmp_path) -> Callable[..., dict]:
    """Makes a page by the command line; returns its data."""
    def make(*args) -> dict:
        code, out, err = command("explore.py", *args, "--model", tiny_file, "--seed", SEED, "--device", "cpu")
        assert code == 0, err
        assert re.fullmatch(r"wrote explorer.html \(\d\.\d MB\); open it in a browser\n", out)
        return read_page(tmp_path / "explorer.html")
    return make


# ---------------------------------------------------------------------------- values


def image_keys(qkv) -> torch.Tensor:
    """I2I over the image keys alone, mean over heads, from the whole matrix: (1, N, N)."""
    probs = i2i(joint_probs(qkv), qkv.n_img)
    return (probs / probs.sum(-1, keepdim=True)).mean(1)


def test_maps_are_the_library_s(page, photo, tiny):
    data = page(photo, *NAMES, "--every", 10)
    (stored,) = data["variants"]
    schedule = seg4diff.sigmas(28, tiny.preset.shift).tolist()
    assert data["levels"] == [{"left": t, "sigma": schedule[28 - t]} for t in (28, 18, 8)]
    assert (data["preset"], data["expert"], data["i2i_blocks"]) == (2, tiny.preset.block, [0, 1, 2])
    cond = tiny.text.encode([NAMES])
    columns = [slice(c["first"], c["first"] + c["count"]) for c in data["columns"]]
    assert [row for rows in columns for row in range(rows.start, rows.stop)] == list(range(cond.ctx.shape[1]))
    assert [c["columns"] for c in data["classes"]] == [list(range(span.start, span.stop)) for span in cond.spans[0]]

    z0 = seg4diff.encode_image(tiny, Image.open(photo))
    eps = seg4diff.noise(z0.shape[1:], [SEED])
    kept = {}
    means = {"i2t": [], "t2i": []}                              # a tensor (depth, T, N) for each level
    for level in data["levels"]:
        z = seg4diff.add_noise(z0, eps, level["sigma"])
        with torch.inference_mode():
            _, taps = tiny.transformer(z, torch.tensor([level["sigma"]]), cond.ctx, cond.pooled, capture=range(3))
        heads = {"i2t": torch.cat([i2t_attention(qkv).mT for qkv in taps.values()]),
                 "t2i": torch.cat([t2i_attention(qkv) for qkv in taps.values()])}            # (depth, H, M, N)
        for name, attn in heads.items():
            kept[name] = torch.stack([attn[:, :, rows].mean(2) for rows in columns], 2)      # (depth, H, T, N)
            means[name].append(kept[name].mean(1))
    for name in means:
        assert_stored(stored[name], torch.stack(means[name]))
        assert_stored(stored[f"{name}_heads"], kept[name])                                   # of the last level, t = 8
    assert_stored(stored["i2i"], torch.cat([image_keys(qkv) for qkv in taps.values()]))


def test_more_columns_than_a_head_is_wide():
    """Columns go through the fused kernel in groups."""
    q, k, v = torch.randn(3, 1, 2, 30, 4, generator=torch.Generator().manual_seed(0))        # B 1, H 2, N + M 30, d 4
    qkv = JointQKV(q, k, v, 20, (4, 5))
    columns = [slice(i, i + 1) for i in range(7)] + [slice(7, 10)]
    attn = i2t_attention(qkv)[0].mT                             # (H, M, N)
    expected = torch.stack([attn[:, rows].mean(1) for rows in columns], 1)
    torch.testing.assert_close(explore.column_maps(qkv, columns, torch.arange(20)), expected)
    some = torch.tensor([3, 19])
    torch.testing.assert_close(explore.column_maps(qkv, columns, some), expected[:, :, some])


def test_class_maps_are_those_of_segment(page, photo, tiny):
    data = page(photo, *NAMES)
    seg = seg4diff.segment(tiny, Image.open(photo), NAMES, seed=SEED)
    maps = values(data["variants"][0]["i2t"])[data["preset"], data["expert"]]                # (T, N)
    for c, expected in zip(data["classes"], seg.maps.flatten(1)):
        assert (maps[c["columns"]].mean(0) - expected).abs().max() <= expected.max() / 255
    assert [c["name"] for c in data["classes"]] == NAMES and data["prompt"] == "car sky teddy bear"
    assert (data["size"], data["truth"], data["generated"], len(data["levels"])) == ([60, 45], None, False, 7)


def test_of_a_large_grid_some_patches_are_kept(tiny, photo, monkeypatch):
    cond = tiny.text.encode([NAMES])
    columns = explore.columns_of(cond.tokens[0], cond.ctx.shape[1])
    levels = explore.levels_of(tiny.preset, 20)
    latents = explore.noised(tiny, Image.open(photo), SEED, levels)
    whole = explore.attention(tiny, latents, levels, cond, columns)
    monkeypatch.setattr(explore, "SIDE", 8)
    monkeypatch.setattr(explore, "HEAD_SIDE", 4)
    small = explore.attention(tiny, latents, levels, cond, columns)

    def averaged(maps, k):                                      # (..., 256) -> means of k x k patches
        return maps.unflatten(-1, (16 // k, k, 16 // k, k)).mean((-1, -3)).flatten(-2)

    for name, k, middle in (("i2t", 2, 1), ("t2i", 2, 1), ("i2t_heads", 4, 3), ("t2i_heads", 4, 3)):
        patches = whole[name].unflatten(-1, (16, 16))[..., middle::k, middle::k]             # one of each k x k
        torch.testing.assert_close(small[name], patches.flatten(-2))
    rows = averaged(averaged(whole["i2i"][tiny.preset.block], 2).mT, 2).mT
    torch.testing.assert_close(small["i2i"], rows[None])        # of the expert alone


def test_scene_and_lora(page, tiny_file, tmp_path):
    """The truth is the scene's; a LoRA's maps stand beside those without it."""
    model = seg4diff.load(tiny_file, device="cpu")
    for p in add_lora(model.transformer, rank=2):
        p.data.normal_(std=0.3)
    save_lora(model.transformer, tmp_path / "some.safetensors")
    data = page("--scene", 15, "--lora", "some.safetensors", "--every", 20)
    scene = scenes.draw(15)
    names = [c["name"] for c in data["classes"]]
    assert names == [scenes.CLASSES[i] for i in classes_in(scene.labels)]
    truth = unpack(data["truth"], np.uint8).reshape(data["size"])
    assert (np.array(names)[truth] == np.array(scenes.CLASSES)[scene.labels]).all()
    without, with_lora = data["variants"]
    assert (without["name"], with_lora["name"]) == ("tiny", "tiny+some")
    assert without["pictures"] == with_lora["pictures"]
    assert not torch.allclose(values(without["i2t"]), values(with_lora["i2t"]), rtol=0.1)
    assert page("--scene", 15, "--every", 20)["variants"] == [without]


# ---------------------------------------------------------------------------- generation


def test_generate(page):
    data = page("--generate", PROMPT, "--every", 9)
    assert data["generated"] and data["prompt"] == PROMPT
    assert [level["left"] for level in data["levels"]] == [26, 17, 8] and len(data["variants"][0]["pictures"]) == 3
    names = [c["name"] for c in data["classes"]]
    assert names == ["small", "red", "car", "left", "teddy", "bear", "sand", "sky"]
    tokens = [data["columns"][c["columns"][0]]["label"] for c in data["classes"]]
    assert all(name.startswith(token) for name, token in zip(names, tokens))


def test_the_estimate_before_the_last_step_is_the_picture(tiny):
    """With one step left the sampler goes all the way to its estimate; the latents are those that it went through."""
    every = explore.levels_of(tiny.preset, 1)
    assert list(every) == list(range(28, 0, -1))
    levels = {t: every[t] for t in (28, 1)}
    latents, estimates = explore.drawn(tiny, "a red car", SEED, levels)
    (image,) = seg4diff.generate(tiny, "a red car", seed=SEED)
    assert np.abs(np.asarray(estimates[-1], int) - np.asarray(image, int)).max() <= 1
    assert list(latents) == [28, 1] and torch.equal(latents[28], seg4diff.noise(latents[28].shape[1:], [SEED]))
    assert np.abs(np.asarray(estimates[0], int) - np.asarray(image, int)).max() > 1


def test_names_in_a_prompt(tiny):
    _, pieces, spans = tiny.text.tokenize(PROMPT)
    found = explore.find_names(PROMPT, ["Teddy Bear", "car", "sky"], spans)
    assert list(found) == ["Teddy Bear", "car", "sky"]
    assert "".join(pieces[found["Teddy Bear"]]) == "teddybear" and "".join(pieces[found["car"]]) == "car,"
    for name in ("cat", "bear teddy", "ca", ""):
        with pytest.raises(ValueError, match=f"'{name}' does not stand in the prompt"):
            explore.find_names(PROMPT, [name], spans)
    long = " ".join(["sand"] * tiny.text.length) + " car"
    with pytest.raises(ValueError, match="'car' has no token in the prompt, which is cut"):
        explore.find_names(long, ["car"], tiny.text.tokenize(long)[2])


# ---------------------------------------------------------------------------- the file, and bad input


def test_the_file_is_whole_and_the_same_again(page, photo, tmp_path):
    """No address of elsewhere, no mark left, no name that ends the data, the same bytes from the same input."""
    name = "</script>{{SCRIPTS}}"
    data = page(photo, "car", name)
    assert [c["name"] for c in data["classes"]] == ["car", name]
    text = (tmp_path / "explorer.html").read_text()
    assert not re.findall(r"https?://|\{\{DATA|@import|<link[^>]+(?!href=\"data:)href=\"[^d]", text)
    assert text.count("</script>") == 2 and "default-src 'none'" in text
    page(photo, "car", name)
    assert (tmp_path / "explorer.html").read_text() == text


@pytest.mark.parametrize("name", ["explorer.html", "explorer_generation.html"])
def test_committed_pages_are_of_this_version(name, tmp_path):
    """All of a page in docs/ but its data is what would be written today."""
    committed = (Path(explore.__file__).parent / "docs" / name).read_text(encoding="utf-8")
    write(tmp_path / name, {})
    start, end = (tmp_path / name).read_text(encoding="utf-8").split("{}</script>")
    assert committed.startswith(start) and committed.endswith(end)


@pytest.mark.parametrize("args, said", [
    ([], "give a picture and at least one class name"),
    (["photo.png"], "give a picture and at least one class name"),
    (["car", "--scene", 1], "give a picture and at least one class name"),
    (["--generate", "a car", "--scene", 1], "give a picture and at least one class name"),
    (["none.png", "car"], "none.png"),
    (["--scene", 1, "--out", "page.png"], "should be a file that ends in .html"),
    (["--scene", 1, "--out", "no/page.html"], "in a folder that can be written to"),
    (["--scene", 1, "--every", 0], "at least 1"),
    (["--generate", "with the"], "has no word whose attention could be shown"),
    (["--generate", "a car", "boat"], "'boat' does not stand in the prompt"),
])
def test_bad_input_is_one_sentence(command, tiny_file, tmp_path, args, said):
    code, out, err = command("explore.py", *args, "--model", tiny_file)
    assert (code, out) == (2, "") and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))


def test_more_names_than_a_prompt_holds(command, tiny_file, photo):
    code, _, err = command("explore.py", photo, *scenes.CLASSES, *scenes.COLOURS, *"abcdefgh", "--model", tiny_file)
    assert code == 2 and "one prompt, and so the explorer, does not hold these" in err


def test_pixels(page, photo, tiny):
    """The reading "pixels" is stored as seg4diff.segment gives it."""
    data = page(photo, *NAMES)
    labels = seg4diff.segment(tiny, Image.open(photo), NAMES, reading="pixels", seed=SEED).labels
    assert (unpack(data["variants"][0]["pixels"], np.uint8).reshape(labels.shape) == labels).all()


def test_a_flux(command, tiny_flux, tiny_flux_file, photo):
    """Its text is T5's rows alone; a model that segments at no level of the sampler is refused."""
    code, out, err = command("explore.py", photo, *NAMES, "--model", tiny_flux_file, "--seed", SEED, "--device", "cpu")
    assert code == 0, err
    data = read_page(Path("explorer.html"))
    seg = seg4diff.segment(tiny_flux, Image.open(photo), NAMES, seed=SEED)
    i2t = values(data["variants"][0]["i2t"])[data["preset"], data["expert"]]                 # (T, n)
    for found, wanted in zip(data["classes"], seg.maps.flatten(1)):
        torch.testing.assert_close(i2t[found["columns"]].mean(0), wanted, rtol=0, atol=0.01 * float(i2t.max()))
    with pytest.raises(ValueError, match="segments at none of them"):
        explore.levels_of(loading.flux_preset(guidance=False), 1)
    with pytest.raises(ValueError, match="at none of them"):
        explore.levels_of(loading.Preset(level=0.4), 1)

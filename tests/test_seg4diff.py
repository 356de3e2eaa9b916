"""Rectified flow, maps to masks, and pictures: by hand where a hand can do it, else one way against another."""
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import seg4diff
from mmdit import JointQKV, i2t_attention, i2t_scores, t2i_attention
from nano import scenes
from support import pictures


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(scenes.draw(0).image)


def near(a: Image.Image, b: Image.Image) -> bool:
    """The same picture, but for the last bit of fp32."""
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def gap(a: Image.Image, b: Image.Image) -> float:
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).mean()


# ---------------------------------------------------------------------------- rectified flow


def test_add_noise():
    z0, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(seg4diff.add_noise(z0, eps, 0), z0) and torch.equal(seg4diff.add_noise(z0, eps, 1.0), eps)
    one = torch.ones(2, 1, 1, 1)
    mixed = seg4diff.add_noise(2 * one, 10 * one, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1))
    assert mixed.flatten().tolist() == [4, 8]


def test_sigmas_end_points():
    for steps in (1, 2, 28):
        s = seg4diff.sigmas(steps, 3.0)
        assert len(s) == steps + 1 and s[0] == 1 and s[-1] == 0 and (s.diff() < 0).all()


def test_sample_follows_a_straight_line():
    """The velocity of Eq. 2 is constant along a path: any schedule ends in z0, and passes Eq. 1 on its way."""
    z0, eps, seen = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), []
    schedule = seg4diff.sigmas(5, 3.0)

    def velocity(z, sigma):
        assert sigma.shape == (2,)
        return eps - z0

    z = seg4diff.sample(velocity, eps, schedule, lambda i, z: seen.append((i, z)))
    torch.testing.assert_close(z, z0, atol=1e-6, rtol=0)
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    for (_, z), sigma in zip(seen, schedule[1:]):
        torch.testing.assert_close(z, seg4diff.add_noise(z0, eps, sigma), atol=1e-6, rtol=0)


def test_sample_is_explicit_euler():
    """dz/dsigma = z + sigma, by hand: 2 -> 2 - 0.5 * 3 = 0.5 -> 0.5 - 0.5 * (0.5 + 0.5) = 0."""
    z = seg4diff.sample(lambda z, sigma: z + sigma.view(-1, 1), torch.tensor([[2.0]]), torch.tensor([1.0, 0.5, 0.0]))
    assert z.tolist() == [[0.0]]


def test_noise_depends_on_its_own_seed_alone():
    a, b = seg4diff.noise((16, 8, 8), [3, 7]), seg4diff.noise((16, 8, 8), [7])
    assert a.shape == (2, 16, 8, 8) and torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    assert abs(a.mean()) < 0.1 and abs(a.std() - 1) < 0.1
    torch.manual_seed(5)
    assert torch.equal(seg4diff.noise((16, 8, 8), [7]), b)                   # and no global state


@pytest.mark.parametrize("cfg", [0, 1, 3.5])
def test_guidance_by_hand(tiny, cfg):
    cond, uncond = tiny.text.encode(["car", "sky"]), tiny.text.encode(["", ""])
    z, sigma = seg4diff.noise((16, 8, 8), [0, 1]), torch.tensor([0.9, 0.3])
    with_, without = (tiny.transformer(z, sigma, c.ctx, c.pooled)[0] for c in (cond, uncond))
    got = seg4diff.guided_velocity(tiny, cond, uncond, cfg)(z, sigma)
    torch.testing.assert_close(got, without + cfg * (with_ - without), atol=1e-4, rtol=0)


def test_generate(tiny):
    a, b = seg4diff.generate(tiny, ["a red car", "snow"], steps=3, seed=5)
    assert a.size == b.size == (128, 128) and a.mode == "RGB" and gap(a, b) > 2
    again, = seg4diff.generate(tiny, "a red car", steps=3, seed=5)
    second, = seg4diff.generate(tiny, "snow", steps=3, seed=6)               # picture i starts from seed + i
    assert near(a, again) and near(b, second)
    for other in (dict(seed=6), dict(seed=5, cfg=9.0), dict(seed=5, cfg=1)):
        assert gap(a, seg4diff.generate(tiny, "a red car", steps=3, **other)[0]) > 2
    preset, = seg4diff.generate(tiny, "a red car", steps=3, seed=5, cfg=tiny.preset.cfg)
    assert near(a, preset)


def test_generate_without_guidance_by_hand(tiny):
    """cfg 1: the conditional velocity alone, Euler, decode, [-1, 1] -> bytes."""
    latents = []
    image, = seg4diff.generate(tiny, "a red car", steps=2, cfg=1, seed=3, callback=lambda i, z: latents.append(z))
    cond, s = tiny.text.encode(["a red car"]), seg4diff.sigmas(2, 3.0)
    z = seg4diff.noise((16, 16, 16), [3])
    for i in range(2):
        z = z + (s[i + 1] - s[i]) * tiny.transformer(z, s[i:i + 1], cond.ctx, cond.pooled)[0]
        torch.testing.assert_close(latents[i], z, atol=1e-4, rtol=0)
    x = (tiny.vae.decode(z)[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    assert np.abs(np.asarray(image) - x.numpy()).max() < 1


def test_generate_errors(tiny):
    for prompt, steps in (("car", -1), ([], 2)):
        with pytest.raises(ValueError, match="at least one step, one prompt"):
            seg4diff.generate(tiny, prompt, steps=steps)


def test_zero_steps_are_refused(tiny):
    with pytest.raises(ValueError):
        seg4diff.generate(tiny, "car", steps=0)


# ---------------------------------------------------------------------------- I2T maps -> masks


def random_qkv() -> JointQKV:
    g = torch.Generator().manual_seed(0)
    return JointQKV(*(torch.randn(2, 2, 6 + 5, 4, generator=g) for _ in range(3)), 6, (2, 3))


@pytest.mark.parametrize("kind, scores", [("softmax", i2t_attention), ("logits", i2t_scores),
                                          ("t2i", lambda qkv: t2i_attention(qkv).transpose(2, 3))])
def test_class_attention_by_hand(kind, scores):
    """A class's score at a pixel is the mean over its tokens' columns, head by head."""
    s = scores(random_qkv())                                                 # (2, 2, 6, 5)
    first, second = seg4diff.class_attention(random_qkv(), [[slice(1, 2), slice(2, 5)], [slice(0, 2)]], kind)
    assert first.shape == (2, 2, 2, 3) and second.shape == (2, 1, 2, 3)
    for h in range(2):
        for row in range(2):
            for col in range(3):
                at = s[:, h, 3 * row + col]
                assert first[h, 0, row, col] == pytest.approx(float(at[0, 1]), abs=1e-6)
                assert first[h, 1, row, col] == pytest.approx(float(at[0, 2] + at[0, 3] + at[0, 4]) / 3, abs=1e-6)
                assert second[h, 0, row, col] == pytest.approx(float(at[1, 0] + at[1, 1]) / 2, abs=1e-6)


def test_class_maps_by_hand():
    attn = torch.tensor([[[[0.0, 4.0]], [[2.0, 2.0]]], [[[2.0, 0.0]], [[4.0, 8.0]]]])        # (H 2, K 2, 1, 2)
    assert seg4diff.class_maps(attn).tolist() == [[[1, 2]], [[3, 5]]]
    assert seg4diff.class_maps(attn, head=1).tolist() == [[[2, 0]], [[4, 8]]]
    assert seg4diff.class_maps(attn, minmax=True).tolist() == [[[0, 1]], [[0, 1]]]           # each map on its own
    assert seg4diff.class_maps(attn, head=0, minmax=True).tolist() == [[[0, 1]], [[0, 0]]]   # a flat one stays finite


def test_label_map_by_hand():
    """[1, 0] at twice the width is [1, .75, .25, 0], corners not aligned; nearest would give [1, 1, 0, 0]."""
    ramp = torch.tensor([1.0, 0.0])
    for constant, labels in ((0.7, [0, 0, 1, 1]), (0.2, [0, 0, 0, 1]), (0.8, [0, 1, 1, 1])):
        maps = torch.stack([ramp, torch.full((2,), constant)])[:, None]      # (2, 1, 2)
        assert seg4diff.label_map(maps, (3, 4)).tolist() == [labels] * 3
        assert seg4diff.label_map(maps.mT, (4, 3)).T.tolist() == [labels] * 3


def test_split_classes(tiny):
    names = [f"{c} {n}" for c in scenes.COLOURS for n in scenes.CLASSES]     # 78 names of 2 and 3 tokens
    prompts = seg4diff.split_classes(tiny.text, names)
    assert sum(prompts, []) == names
    sizes = [sum(map(tiny.text.n_tokens, p)) for p in prompts]
    assert max(sizes) <= 26
    assert len(prompts) == -(-sum(sizes) // 26) and min(sizes) >= max(sizes) - 3           # as few as can be, equally full
    for b, spans in enumerate(tiny.text.encode(prompts).spans):              # none is cut, none is empty
        assert [s.stop - s.start for s in spans] == list(map(tiny.text.n_tokens, prompts[b]))
    assert [len(p) for p in seg4diff.split_classes(tiny.text, ["car"] * 27)] == [14, 13]
    assert [len(p) for p in seg4diff.split_classes(tiny.text, ["car"] * 26)] == [26]
    assert [len(p) for p in seg4diff.split_classes(tiny.text, ["car"] * 25 + ["teddy bear"])] == [14, 12]


def test_split_classes_against_all_ways(tiny):
    """Of all cuts into as few prompts as fit, none has a fullest prompt that is less full."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        names = [" ".join(["car"] * n) for n in rng.integers(1, 13, 9)]
        sizes = [tiny.text.n_tokens(name) for name in names]
        prompts = seg4diff.split_classes(tiny.text, names)
        assert sum(prompts, []) == names and all(prompts)

        def fullest(cuts):
            edges = [0, *cuts, len(names)]
            return max(sum(sizes[a:b]) for a, b in zip(edges, edges[1:]))
        ways = {k: [fullest(cuts) for cuts in combinations(range(1, len(names)), k)] for k in range(len(names))}
        fewest = next(k for k, found in ways.items() if min(found) <= 26)
        assert len(prompts) == fewest + 1
        assert max(sum(map(tiny.text.n_tokens, p)) for p in prompts) == min(ways[fewest])


@pytest.mark.parametrize("names, told", [([], "empty"), ([""], "no token"), (["car", "   "], "no token"),
                                         (["\n"], "no token"), (["car", "a " * 27], "room for 26"),
                                         (["q" * 100], "100 tokens")])
def test_split_classes_errors(tiny, names, told):
    with pytest.raises(ValueError, match=told):
        seg4diff.split_classes(tiny.text, names)


def test_attend_over_several_prompts(tiny):
    """35 names take two prompts, beside a picture that takes one: as if each prompt had run alone."""
    names = [f"{c} {n}" for c in ("red", "blue") for n in scenes.CLASSES] + ["sky"] * 9
    own, z0 = [names, ["teddy bear", "car"]], seg4diff.noise((16, 8, 8), [50, 51])
    args = dict(blocks=[0, 2], sigma=0.4, kinds=["softmax", "t2i"])
    both = seg4diff.attend(tiny, z0, own, seeds=[1, 2], **args)
    assert [set(maps) for maps in both] == [{(0, "softmax"), (0, "t2i"), (2, "softmax"), (2, "t2i")}] * 2
    assert len(seg4diff.split_classes(tiny.text, names)) > 2
    for b in range(2):
        alone = [seg4diff.attend(tiny, z0[b:b + 1], [part], seeds=[1 + b], **args)[0]
                 for part in seg4diff.split_classes(tiny.text, own[b])]
        for key, attn in both[b].items():
            assert attn.shape == (2, len(own[b]), 8, 8) and attn.isfinite().all()
            torch.testing.assert_close(attn, torch.cat([a[key] for a in alone], dim=1), atol=1e-6, rtol=0)


def test_attend_noises_the_latent(tiny):
    def maps(z0, sigma, seed):
        return seg4diff.attend(tiny, z0, [["car", "sky"]], blocks=[1], sigma=sigma, seeds=[seed])[0][1, "softmax"]
    a, b = seg4diff.noise((16, 8, 8), [50]), seg4diff.noise((16, 8, 8), [51])
    assert torch.equal(maps(a, 0, 1), maps(a, 0, 2)) and not torch.equal(maps(a, 0, 1), maps(b, 0, 1))
    assert torch.equal(maps(a, 1, 1), maps(b, 1, 1)) and not torch.equal(maps(a, 1, 1), maps(a, 1, 2))


def test_segment_by_hand(tiny, picture):
    """Every step of Sec. 3.4 with the pieces alone: sigma 0.515, block 1, the names' own columns, mean over heads."""
    seg = seg4diff.segment(tiny, picture, ["car", "teddy bear", "sky"], seed=4)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1               # 128 x 128 already
    z = seg4diff.add_noise(tiny.vae.encode(x), seg4diff.noise((16, 16, 16), [4]), 0.51507)
    cond = tiny.text.encode(["car teddy bear sky"])
    _, taps = tiny.transformer(z, torch.tensor([0.51507]), cond.ctx, cond.pooled, capture={1})
    columns = i2t_attention(taps[1])[0].mean(0).T.reshape(-1, 16, 16)        # (M, h, w)
    want = torch.stack([columns[1], (columns[2] + columns[3]) / 2, columns[4]])
    torch.testing.assert_close(seg.maps, want, atol=1e-6, rtol=1e-3)
    assert seg.classes == ["car", "teddy bear", "sky"] and len(np.unique(seg.labels)) == 3
    assert (seg.labels == seg4diff.label_map(seg.maps, (128, 128)).numpy()).all()


@pytest.mark.parametrize("size", [(37, 211), (300, 20), (1, 1)])
def test_segment_any_aspect_ratio(tiny, picture, size):
    seg = seg4diff.segment(tiny, picture.resize(size), ["car", "sky"])
    assert seg.labels.shape == size[::-1] and seg.maps.shape == (2, 16, 16) and set(np.unique(seg.labels)) <= {0, 1}


def test_segment_options(tiny, picture):
    """Each has its effect; several blocks are the mean of their maps, min-max taken block by block."""
    names = ["car", "sky"]

    def maps(**options):
        return seg4diff.segment(tiny, picture, names, **options).maps

    usual = maps()
    assert torch.equal(usual, maps(block=1)) and torch.equal(usual, maps(sigma=tiny.preset.sigma, seed=0))
    for options in (dict(block=0), dict(sigma=0.9), dict(seed=1), dict(kind="logits"), dict(kind="t2i"),
                    dict(head=0)):
        assert (maps(**options) - usual).abs().max() > 1e-5, options
    torch.testing.assert_close((maps(head=0) + maps(head=1)) / 2, usual)
    for minmax in (False, True):
        apart = [maps(block=b, minmax=minmax) for b in (0, 2)]
        torch.testing.assert_close(maps(block=[0, 2], minmax=minmax), (apart[0] + apart[1]) / 2)
    scaled = maps(minmax=True)
    assert scaled.amin((1, 2)).tolist() == [0, 0] and scaled.amax((1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("options, told", [
    (dict(sigma=2.0), "between 0 .* and 1"), (dict(sigma=-0.1), "not -0.1"), (dict(sigma=float("nan")), "not nan"),
    (dict(block=3), "blocks are 0 to 2"), (dict(block=[0, 99]), "no block 99"), (dict(block=-1), "no block -1"),
    (dict(head=2), "heads are 0 to 1"), (dict(head=-1), "no head -1"), (dict(kind="hard"), "softmax, logits, t2i")])
def test_segment_errors(tiny, picture, options, told):
    with pytest.raises(ValueError, match=told):
        seg4diff.segment(tiny, picture, ["car"], **options)


def test_image_tensor_squashes_the_whole_picture():
    image = Image.new("RGB", (300, 60), "black")
    image.paste((255, 255, 255), (150, 0, 300, 60))
    image.paste((255, 0, 0), (0, 30, 150, 60))
    x = seg4diff.image_tensor(image, 32)
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32
    assert x[:, 8, 8].tolist() == [-1, -1, -1] and x[:, 8, 24].tolist() == [1, 1, 1]
    assert x[:, 24, 8].tolist() == [1, -1, -1]


# ---------------------------------------------------------------------------- pictures


def save_and_open(image: Image.Image, path, **options) -> list[tuple]:
    image.save(path, **options)
    got = pictures.open_image(path)
    assert got.mode == "RGB" and got.size == image.size
    return [got.getpixel((x, 0)) for x in range(got.width)]


def test_open_image(tmp_path):
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.putpixel((1, 0), 1)
    assert save_and_open(indexed, tmp_path / "palette.png") == [(10, 20, 30), (200, 100, 50)]
    assert save_and_open(indexed, tmp_path / "hole.png", transparency=0) == [(255, 255, 255), (200, 100, 50)]

    alpha = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    alpha.putpixel((1, 0), (255, 0, 0, 255))
    alpha.putpixel((2, 0), (0, 0, 0, 51))
    assert save_and_open(alpha, tmp_path / "alpha.png") == [(255, 255, 255), (255, 0, 0), (204, 204, 204)]

    deep = Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], np.uint16))
    assert save_and_open(deep, tmp_path / "deep.png") == [(v, v, v) for v in (0, 1, 128, 255)]
    assert save_and_open(Image.new("1", (1, 1), 1), tmp_path / "one.png") == [(255, 255, 255)]
    assert save_and_open(Image.new("L", (1, 1), 7), tmp_path / "grey.bmp") == [(7, 7, 7)]
    (red,) = save_and_open(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), tmp_path / "cmyk.tif")
    assert red == (255, 0, 0)


def test_open_image_errors(tmp_path, picture):
    picture.save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    for name, content in (("words.png", b"hello"), ("empty.png", b""), ("cut.png", whole[:len(whole) // 2])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a picture"):
            pictures.open_image(tmp_path / name)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match="no picture can be opened"):
            pictures.open_image(path)


def test_open_image_turns_photos_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6                                                         # orientation: turn clockwise to show
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert pictures.open_image(tmp_path / "phone.jpg").size == (20, 40)


# ---------------------------------------------------------------------------- loading


def test_load(tiny, tiny_file):
    assert (tiny.name, tiny.device.type, tiny.dtype) == ("tiny", "cpu", torch.float32)
    assert tiny.preset == loading.Preset(block=1, size=128, cfg=3.0, batch=16) and abs(tiny.preset.sigma - 0.5150721) < 1e-6
    assert tiny.transformer.config.head_dim == 32 and tiny.transformer.config.heads == 2
    assert loading.Preset() == loading.Preset(block=9, size=1024, steps=28, shift=3.0, noise_steps=8, cfg=7.5)
    half = seg4diff.load(str(tiny_file), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    seg = seg4diff.segment(half, Image.new("RGB", (40, 30)), ["car", "sky"])
    assert seg.maps.isfinite().all() and seg.labels.shape == (30, 40)


def test_segment_only(tiny, tiny_file, picture):
    """Without the blocks after the expert: the same labels; nothing that needs those blocks."""
    part = seg4diff.load(tiny_file, device="cpu", segment_only=True)
    assert len(part.transformer.joint_blocks) == 2 < len(tiny.transformer.joint_blocks)
    for options in (dict(), dict(block=0)):
        seg, whole = (seg4diff.segment(m, picture, ["car", "sky"], **options) for m in (part, tiny))
        torch.testing.assert_close(seg.maps, whole.maps)
    for fails in (lambda: seg4diff.segment(part, picture, ["car"], block=2), lambda: seg4diff.generate(part, "car")):
        with pytest.raises(ValueError, match="0 to 1"):
            fails()


def test_name_of_a_folder(tiny_file, tmp_path):
    (tmp_path / "sd3.5-medium").mkdir()
    (tmp_path / "sd3.5-medium" / "model.safetensors").write_bytes(tiny_file.read_bytes())
    assert seg4diff.load(tmp_path / "sd3.5-medium", device="cpu").name == "sd3.5-medium"


@pytest.fixture(scope="module")
def contents(tiny_file):
    with safe_open(tiny_file, framework="pt") as f:
        return load_file(tiny_file), f.metadata()


def load_changed(contents, path, drop: str = "", **meta) -> seg4diff.Seg4Diff:
    """The tiny model without the tensors that `drop` begins, and with another header."""
    tensors, header = contents
    kept = {k: v for k, v in tensors.items() if not drop or not k.startswith(drop)}
    save_file(kept, path, {k: v for k, v in (header | meta).items() if v is not None})
    return seg4diff.load(path, device="cpu")


@pytest.mark.parametrize("drop, meta, told", [
    ("first_stage_model.", {}, "first_stage_model"), ("text_encoders.clip_l.", {}, "clip_l"),
    ("text_encoders.clip_g.", {}, "clip_g"), ("text_encoders.clip_g.transformer.text_projection", {}, "CLIP-G"),
    ("model.diffusion_model.", {}, "model.diffusion_model"), ("", {"merges": None}, "tokenizer|merges"),
    ("model.diffusion_model.joint_blocks.1.x_block.mlp.fc1", {}, "2 missing: joint_blocks.1.x_block.mlp.fc1.bias")])
def test_incomplete_files(contents, tmp_path, drop, meta, told):
    with pytest.raises(ValueError, match=told):
        load_changed(contents, tmp_path / "part.safetensors", drop, **meta)


@pytest.mark.parametrize("meta, told", [
    ({"presets": '{"sise": 128}'}, "presets"), ({"presets": "3"}, "presets"), ({"merges": '["abc"]'}, "merges"),
    ({"merges": '["xx yy"]'}, "merges"), ({"merges": '["c a"]'}, "tokens in the tokenizer")])
def test_headers_that_do_not_fit(contents, tmp_path, meta, told):
    with pytest.raises(ValueError, match=told):
        load_changed(contents, tmp_path / "header.safetensors", **meta)


def test_presets_travel_in_the_header(contents, tmp_path):
    model = load_changed(contents, tmp_path / "m.safetensors", presets='{"block": 2, "size": 64, "noise_steps": 14}')
    assert model.preset == loading.Preset(block=2, size=64, noise_steps=14) and model.preset.sigma > 0.7
    assert seg4diff.segment(model, Image.new("RGB", (9, 9)), ["car"]).maps.shape == (1, 8, 8)


@pytest.mark.parametrize("options", [dict(dtype="float64"), dict(dtype="nn"), dict(dtype=torch.int32)])
def test_load_errors(tiny_file, options):
    with pytest.raises(ValueError, match="dtype must be"):
        seg4diff.load(tiny_file, **options)


def test_unknown_device(tiny_file):
    with pytest.raises(ValueError):
        seg4diff.load(tiny_file, device="gpu")

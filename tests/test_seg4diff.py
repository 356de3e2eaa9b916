"""Rectified flow, maps to masks, and pictures: by hand where a hand can do it, else one computation against another."""
import copy
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import loading
import readings
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
    z0 = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4)
    assert torch.equal(seg4diff.add_noise(z0, eps, 0), z0) and torch.equal(seg4diff.add_noise(z0, eps, 1.0), eps)
    one = torch.ones(2, 1, 1, 1)
    mixed = seg4diff.add_noise(2 * one, 10 * one, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1))
    assert mixed.flatten().tolist() == [4, 8]


def test_sample_follows_a_straight_line():
    """The velocity of Eq. 2 is constant along a path: any schedule ends in z0, and passes Eq. 1 on its way."""
    z0 = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4)
    steps = []
    schedule = seg4diff.sigmas(5, 3.0)

    def velocity(z, sigma):
        assert sigma.shape == (2,)
        return eps - z0

    z = seg4diff.sample(velocity, eps, schedule, lambda i, z: steps.append((i, z)))
    torch.testing.assert_close(z, z0, atol=1e-6, rtol=0)
    assert [i for i, _ in steps] == [0, 1, 2, 3, 4]
    for (_, z), sigma in zip(steps, schedule[1:]):
        torch.testing.assert_close(z, seg4diff.add_noise(z0, eps, sigma), atol=1e-6, rtol=0)


def test_sample_is_explicit_euler():
    """dz/dsigma = z + sigma, by hand: 2 -> 2 - 0.5 * 3 = 0.5 -> 0.5 - 0.5 * (0.5 + 0.5) = 0."""
    z = seg4diff.sample(lambda z, sigma: z + sigma.view(-1, 1), torch.tensor([[2.0]]), torch.tensor([1.0, 0.5, 0.0]))
    assert z.tolist() == [[0.0]]


def test_noise_depends_on_its_own_seed_alone():
    a = seg4diff.noise((16, 8, 8), [3, 7])
    b = seg4diff.noise((16, 8, 8), [7])
    assert a.shape == (2, 16, 8, 8) and torch.equal(a[1], b[0]) and not torch.equal(a[0], a[1])
    assert abs(a.mean()) < 0.1 and abs(a.std() - 1) < 0.1
    torch.manual_seed(5)
    assert torch.equal(seg4diff.noise((16, 8, 8), [np.int64(7)]), b)         # and no global state


def test_generate(tiny):
    a, b = seg4diff.generate(tiny, ["a red car", "snow"], steps=3, seed=5)
    assert a.size == b.size == (128, 128) and a.mode == "RGB" and gap(a, b) > 2
    (again,) = seg4diff.generate(tiny, "a red car", steps=3, seed=5)
    (second,) = seg4diff.generate(tiny, "snow", steps=3, seed=6)             # picture i starts from seed + i
    assert near(a, again) and near(b, second)
    for other in ({"seed": 6}, {"seed": 5, "cfg": 9.0}, {"seed": 5, "cfg": 1}):
        assert gap(a, seg4diff.generate(tiny, "a red car", steps=3, **other)[0]) > 2
    (preset,) = seg4diff.generate(tiny, "a red car", steps=3, seed=5, cfg=tiny.preset.cfg)
    assert near(a, preset)


@pytest.mark.parametrize("schedule, levels", [("sd3", loading.sigmas), ("flux", loading.flux_sigmas)])
def test_generate_without_guidance_by_hand(tiny, schedule, levels):
    """cfg 1: the conditional velocity alone, Euler, decode, [-1, 1] -> bytes."""
    model = replace(tiny, preset=replace(tiny.preset, schedule=schedule))
    latents = []
    (image,) = seg4diff.generate(model, "a red car", steps=2, cfg=1, seed=3, callback=lambda i, z: latents.append(z))
    cond = tiny.text.encode(["a red car"])
    s = levels(2, 3.0)
    z = seg4diff.noise((16, 16, 16), [3])
    for i in range(2):
        z = z + (s[i + 1] - s[i]) * tiny.transformer(z, s[i:i + 1], cond.ctx, cond.pooled)[0]
        torch.testing.assert_close(latents[i], z, atol=1e-4, rtol=0)
    x = (tiny.vae.decode(z)[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    assert np.abs(np.asarray(image) - x.numpy()).max() < 1


@pytest.mark.parametrize("options, sentence", [
    ({"steps": -1}, "steps must be a whole number from 1 to 1000, not -1"), ({"steps": 0}, "not 0"),
    ({"steps": 1.5}, "not 1.5"), ({"steps": True}, "not True"), ({"cfg": float("nan")}, "cfg .* not nan"),
    ({"cfg": 1e300}, "cfg .* not 1e"), ({"prompt": []}, "at least one prompt"), ({"seed": 0.5}, "and 0.5"),
    ({"seed": "x"}, "and 'x'")])
def test_generate_errors(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.generate(tiny, **{"prompt": "car"} | options)


def with_nan(model: seg4diff.Seg4Diff, part: str) -> seg4diff.Seg4Diff:
    """The model with one undefined weight in each layer of a part."""
    broken = copy.deepcopy(getattr(model, part))
    with torch.no_grad():
        for weight in broken.parameters():
            weight.view(-1)[0] = torch.nan
    return replace(model, **{part: broken})


def test_no_picture_and_no_map_of_numbers_that_are_not_finite(tiny, picture):
    for part in ("transformer", "vae"):
        broken = with_nan(tiny, part)
        with pytest.raises(ValueError, match="pixels are not finite"):
            seg4diff.generate(broken, "car", steps=1)
        with pytest.raises(ValueError, match="maps are not finite"):
            seg4diff.segment(broken, picture, ["car", "sky"])
        for scaling in seg4diff.SCALINGS:
            with pytest.raises(ValueError, match="maps are not finite"):
                seg4diff.propose(broken, picture, scaling=scaling)
    with pytest.raises(ValueError, match="pixels are not finite"):
        seg4diff.generate(tiny, "car", steps=1, pag=1e300)                   # a finite scale, and what it leads to


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
    assert len(prompts) == -(-sum(sizes) // 26) and min(sizes) >= max(sizes) - 3   # as few as can be, equally full
    for b, spans in enumerate(tiny.text.encode(prompts).spans):              # none is cut, none is empty
        assert [s.stop - s.start for s in spans] == list(map(tiny.text.n_tokens, prompts[b]))
    assert [len(p) for p in seg4diff.split_classes(tiny.text, ["car"] * 27)] == [14, 13]
    assert [len(p) for p in seg4diff.split_classes(tiny.text, ["car"] * 26)] == [26]
    assert [len(p) for p in seg4diff.split_classes(tiny.text, ["car"] * 25 + ["teddy bear"])] == [14, 12]


def fullest(sizes: list[int], cuts: tuple[int, ...]) -> int:
    edges = [0, *cuts, len(sizes)]
    return max(sum(sizes[a:b]) for a, b in zip(edges, edges[1:]))


def test_split_classes_against_all_cuts(tiny):
    """Of all cuts into as few prompts as fit, none has a fullest prompt that is less full."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        names = [" ".join(["car"] * n) for n in rng.integers(1, 13, 9)]
        sizes = [tiny.text.n_tokens(name) for name in names]
        prompts = seg4diff.split_classes(tiny.text, names)
        assert sum(prompts, []) == names and all(prompts)
        for k in range(len(names)):
            least = min(fullest(sizes, cuts) for cuts in combinations(range(1, len(names)), k))
            if least <= 26:
                break
        assert len(prompts) == k + 1
        assert max(sum(map(tiny.text.n_tokens, p)) for p in prompts) == least


@pytest.mark.parametrize("names, sentence", [([], "empty"), ([""], "no token"), (["car", "   "], "no token"),
                                             (["\n"], "no token"), (["car", "a " * 27], "room for 26"),
                                             (["q" * 100], "100 tokens")])
def test_split_classes_errors(tiny, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.split_classes(tiny.text, names)


def test_attend_over_several_prompts(tiny):
    """35 names take two prompts, beside a picture that takes one: as if each prompt had run alone."""
    names = [f"{c} {n}" for c in ("red", "blue") for n in scenes.CLASSES] + ["sky"] * 9
    classes = [names, ["teddy bear", "car"]]
    z0 = seg4diff.noise((16, 8, 8), [50, 51])
    args = {"blocks": [0, 2], "sigma": 0.4, "kinds": ["softmax", "t2i"]}
    both = seg4diff.attend(tiny, z0, classes, seeds=[1, 2], **args)
    assert [set(maps) for maps in both] == [{(0, "softmax"), (0, "t2i"), (2, "softmax"), (2, "t2i")}] * 2
    assert len(seg4diff.split_classes(tiny.text, names)) > 2
    for b in range(2):
        alone = [seg4diff.attend(tiny, z0[b:b + 1], [part], seeds=[1 + b], **args)[0]
                 for part in seg4diff.split_classes(tiny.text, classes[b])]
        for key, attn in both[b].items():
            assert attn.shape == (2, len(classes[b]), 8, 8) and attn.isfinite().all()
            torch.testing.assert_close(attn, torch.cat([a[key] for a in alone], dim=1), atol=1e-6, rtol=0)


def test_attend_noises_the_latent(tiny):
    def maps(z0, sigma, seed):
        return seg4diff.attend(tiny, z0, [["car", "sky"]], blocks=[1], sigma=sigma, seeds=[seed])[0][1, "softmax"]
    a = seg4diff.noise((16, 8, 8), [50])
    b = seg4diff.noise((16, 8, 8), [51])
    assert torch.equal(maps(a, 0, 1), maps(a, 0, 2)) and not torch.equal(maps(a, 0, 1), maps(b, 0, 1))
    assert torch.equal(maps(a, 1, 1), maps(b, 1, 1)) and not torch.equal(maps(a, 1, 1), maps(a, 1, 2))


def test_attend_is_the_mean_of_single_draws(tiny):
    """Each by seg4diff.one_draw, on its own noise; a prompt without names has every CLIP column for a class."""
    z0 = seg4diff.noise((16, 8, 8), [50, 51])
    prompts = [(0, ["car", "sky"]), (1, ["teddy bear"]), (1, ["snow"])]
    args = {"blocks": [1], "sigma": 0.4, "kinds": ["softmax", "i2i"]}
    one, other = (seg4diff.one_draw(tiny, z0, prompts, seeds=seeds, **args) for seeds in ([1, 2], [2, 3]))
    assert one[1][1, "softmax"].shape == (2, 2, 8, 8) and one[1][1, "i2i"].shape == (1, 2, 8, 8)
    both = seg4diff.attend(tiny, z0[:1], [["car", "sky"]], seeds=[1], draws=2, **args)[0]
    for key, maps in both.items():
        torch.testing.assert_close(maps, (one[0][key] + other[0][key]) / 2, atol=1e-6, rtol=1e-4)
    args = args | {"kinds": ["softmax"]}
    (empty,) = seg4diff.one_draw(tiny, z0[:1], [(0, [])], seeds=[1], **args)
    assert torch.equal(empty[1, "softmax"], seg4diff.attend(tiny, z0[:1], None, seeds=[1], **args)[0][1, "softmax"])
    assert empty[1, "softmax"].shape == (2, tiny.text.length, 8, 8)


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


@pytest.mark.parametrize("options", [{}, {"block": 2, "sigma": 0.3, "kind": "t2i", "head": 1, "minmax": True},
                                     {"draws": 2}], ids=["preset", "variant", "draws"])
def test_a_list_of_pictures_is_each_alone(tiny, picture, options):
    """Of any aspect ratio, with classes of their own, more than one prompt holds among them, and seeds of their own."""
    images = [picture.resize(size) for size in ((37, 211), (300, 20), (1, 1))]
    classes = [["car", "sky"], [f"{c} {name}" for c in ("red", "blue") for name in scenes.CLASSES], ["snow"]]
    seeds = [3, 4, 5]
    together = seg4diff.segment(tiny, images, classes, seed=seeds, **options)
    assert len(together) == 3
    for image, names, seed, seg in zip(images, classes, seeds, together):
        alone = seg4diff.segment(tiny, image, names, seed=seed, **options)
        assert seg.classes == alone.classes == names
        assert seg.labels.shape == (image.height, image.width) and seg.maps.shape == (len(names), 16, 16)
        torch.testing.assert_close(seg.maps, alone.maps, atol=1e-6, rtol=1e-4)
        assert (seg.labels == alone.labels).mean() > 0.999 and set(np.unique(seg.labels)) <= set(range(len(names)))


def test_lists_are_equally_long(tiny, picture):
    for classes, seeds in (([["car"]], [0, 1]), ([["car"]] * 3, [0, 1]), ([["car"]] * 2, [0])):
        with pytest.raises(ValueError, match="2 pictures"):
            seg4diff.segment(tiny, [picture, picture], classes, seed=seeds)
    for call in (lambda: seg4diff.segment(tiny, [], []), lambda: seg4diff.propose(tiny, [])):
        with pytest.raises(ValueError, match="no picture"):
            call()
    (seg,) = seg4diff.segment(tiny, [picture], [["car", "sky"]], seed=[0])
    assert (seg.labels == seg4diff.segment(tiny, picture, ["car", "sky"]).labels).all()


def test_segment_options(tiny, picture):
    """Each has its effect."""
    def maps(**options):
        return seg4diff.segment(tiny, picture, ["car", "sky"], **options).maps

    usual = maps()
    assert torch.equal(usual, maps(block=1)) and torch.equal(usual, maps(sigma=tiny.preset.sigma, seed=0))
    for option in ({"block": 0}, {"sigma": 0.9}, {"seed": 1}, {"kind": "logits"}, {"kind": "t2i"}, {"head": 0}):
        assert (maps(**option) - usual).abs().max() > 1e-5, option
    torch.testing.assert_close((maps(head=0) + maps(head=1)) / 2, usual)
    torch.testing.assert_close(maps(draws=2), (usual + maps(seed=1)) / 2)
    scaled = maps(minmax=True)
    assert scaled.amin((1, 2)).tolist() == [0, 0] and scaled.amax((1, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("options, sentence", [
    ({"sigma": 2.0}, "between 0 .* and 1"), ({"sigma": -0.1}, "not -0.1"), ({"sigma": float("nan")}, "not nan"),
    ({"block": 3}, "blocks are 0 to 2"), ({"block": 99}, "no block 99"), ({"block": -1}, "not -1"),
    ({"block": [1]}, r"not \[1\]"), ({"block": True}, "not True"), ({"draws": 0}, "draws, at least 1"),
    ({"draws": 1.5}, "not 1.5"), ({"seed": 0.5}, r"\[0.5\]"), ({"seed": "x"}, r"\['x'\]"),
    ({"head": 2}, "heads are 0 to 1"), ({"head": -1}, "no head -1"), ({"kind": "hard"}, "softmax, logits, t2i")])
def test_segment_errors(tiny, picture, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.segment(tiny, picture, ["car"], **options)


def test_encode_image_squashes_the_whole_picture():
    """Seen by a VAE that hands on what it gets; a list is encoded one at a time."""
    shapes = []

    def encode(x):
        shapes.append(x.shape)
        return x
    model = SimpleNamespace(preset=SimpleNamespace(size=32), vae=SimpleNamespace(encode=encode), device="cpu",
                            dtype=torch.float32)
    image = Image.new("RGB", (300, 60), "black")
    image.paste((255, 255, 255), (150, 0, 300, 60))
    image.paste((255, 0, 0), (0, 30, 150, 60))
    x = seg4diff.encode_image(model, [image, image.rotate(180)])
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.float32 and shapes == [(1, 3, 32, 32)] * 2
    assert torch.equal(x[:1], seg4diff.encode_image(model, image))
    assert x[0, :, 8, 8].tolist() == [-1, -1, -1] and x[0, :, 8, 24].tolist() == [1, 1, 1]
    assert x[0, :, 24, 8].tolist() == [1, -1, -1] and x[1, :, 8, 24].tolist() == [1, -1, -1]


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
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            pictures.open_image(tmp_path / name)
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ValueError, match="cannot be read as a picture"):
            pictures.open_image(path)


def test_open_image_turns_photos_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[0x0112] = 6                                                         # orientation: turn clockwise to show
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert pictures.open_image(tmp_path / "phone.jpg").size == (20, 40)


def test_of_equal_classes_the_first_wins():
    assert not seg4diff.label_map(torch.zeros(6, 2, 2), (4, 4)).any()


def test_pixels_are_refined_by_their_colours_as_far_as_a_patch(monkeypatch):
    """By the longer side of a patch, 300 / 4 pixels, and with colours in [0, 1]."""
    seen = []
    monkeypatch.setattr(readings, "refine", lambda up, colours, reach: seen.append((colours, reach)) or up)
    seg4diff.labels_of(torch.rand(2, 4, 4), Image.new("RGB", (300, 100), "white"), "pixels")
    colours, reach = seen[0]
    assert colours.shape == (3, 100, 300) and colours.unique().tolist() == [1] and reach == 75


def test_no_more_classes_than_a_uint8_holds(tiny):
    """255 is what is not scored."""
    with pytest.raises(ValueError, match="at most 255"):
        seg4diff.segment(tiny, Image.new("RGB", (128, 128)), ["car"] * 256)


def test_a_noise_level_of_zero_is_clean(tiny):
    """It is no lack of one; then no seed matters."""
    image = Image.fromarray(scenes.draw(0).image)
    a, b = (seg4diff.segment(tiny, image, ["car", "sky"], sigma=0, seed=seed).maps for seed in (0, 1))
    assert torch.equal(a, b)
    a, b = (seg4diff.propose(tiny, image, sigma=0, seed=seed, threshold=1e-6).maps for seed in (0, 1))
    assert torch.equal(a, b)

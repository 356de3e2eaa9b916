"""Readings beyond the paper against explicit loops and matrices, and the whole way from a picture."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import readings
import seg4diff
from mmdit import JointQKV, joint_probs
from nano import scenes
from tools.bench import megabytes


def random_qkv(H: int = 2, grid: tuple[int, int] = (4, 3), M: int = 5, d: int = 4, B: int = 1) -> JointQKV:
    g = torch.Generator().manual_seed(0)
    N = grid[0] * grid[1]
    return JointQKV(*(torch.randn(B, H, N + M, d, generator=g) for _ in range(3)), N, grid)


def explicit_i2i(qkv: JointQKV) -> torch.Tensor:
    """The I2I block of the whole joint softmax, rows divided by their sums, mean over heads: (N, N)."""
    block = joint_probs(qkv)[0, :, :qkv.n_img, :qkv.n_img]                   # (H, N, N)
    return (block / block.sum(-1, keepdim=True)).mean(0)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(scenes.draw(4).image)         # of which refinement changes a few pixels


# ---------------------------------------------------------------------------- shares and I2I


def test_shares_by_hand():
    maps = torch.tensor([[[1.0, 0.0, 0.2]], [[3.0, 0.0, 0.2]]])              # (K 2, 1, 3)
    assert readings.shares(maps).tolist() == [[[0.25, 0, 0.5]], [[0.75, 0, 0.5]]]


@pytest.mark.parametrize("K", [1, 3, 4, 5, 9])
def test_i2i_step_is_the_explicit_matrix(K):
    """Also for more maps than a head is wide, which go through in groups."""
    qkv = random_qkv()
    maps = torch.rand(K, 4, 3)
    want = (explicit_i2i(qkv) @ maps.flatten(1).mT).mT.view(K, 4, 3)
    torch.testing.assert_close(readings.i2i_step(qkv, maps), want)


def test_i2i_step_in_loops():
    qkv = random_qkv()
    maps = torch.rand(2, 4, 3)
    got = readings.i2i_step(qkv, maps)
    for k in range(2):
        for n in range(12):
            value = 0.0
            for head in range(2):
                weights = [math.exp(qkv.q[0, head, n] @ qkv.k[0, head, m] / 2) for m in range(12)]
                value += sum(w * maps[k].flatten()[m].item() for m, w in enumerate(weights)) / sum(weights) / 2
            assert got[k].flatten()[n] == pytest.approx(value, rel=1e-5)


def test_i2i_step_never_forms_the_matrix():
    """At 48 x 48 patches and 8 heads the matrices would take 170 MB."""
    qkv = random_qkv(H=8, grid=(48, 48), d=32)
    maps = torch.rand(3, 48, 48)
    whole = 8 * 2304 ** 2 * 4 / 2 ** 20
    used = megabytes(lambda: readings.i2i_step(qkv, maps), torch.device("cpu"))
    if math.isnan(used):
        pytest.skip("nobody counts memory here")
    assert used < whole / 4


def test_shares_over_several_prompts():
    """The classes of all prompts share a patch; each prompt's classes go through its own I2I."""
    one, other = random_qkv(B=2).each()
    attn = [torch.rand(2, 3, 4, 3), torch.rand(2, 1, 4, 3)]                  # prompts of 3 classes and 1
    parts = readings.prompt_shares(attn)
    maps = torch.cat([attn[0].mean(0), attn[1].mean(0)])
    torch.testing.assert_close(torch.cat(parts), maps / maps.sum(0))
    assert [len(part) for part in parts] == [3, 1]
    got = seg4diff.joined("i2i", attn, [one, other])
    assert got.shape == (1, 4, 4, 3) and torch.equal(seg4diff.joined("shares", attn, [])[0], torch.cat(parts))
    torch.testing.assert_close(got[0, :3], readings.i2i_step(one, parts[0]))
    torch.testing.assert_close(got[0, 3:], readings.i2i_step(other, parts[1]))


# ---------------------------------------------------------------------------- pixels


def refined(maps: np.ndarray, colours: np.ndarray, distances: list[int], rounds: int) -> np.ndarray:
    """The formula in loops, float64: maps (K, height, width), colours (3, height, width)."""
    _, height, width = colours.shape
    steps = [(a * r, b * r) for r in distances for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    for _ in range(rounds):
        new = np.zeros_like(maps)
        for y in range(height):
            for x in range(width):
                at = [(min(max(y + a, 0), height - 1), min(max(x + b, 0), width - 1)) for a, b in steps]
                near = np.array([colours[:, i, j] for i, j in at] + [colours[:, y, x]])      # (n + 1, 3)
                spread = np.maximum(0.1 * near.std(0), 1 / 255 / 3)                          # (3,)
                w = np.exp(-(np.abs(near[:-1] - near[-1]) / spread).mean(1))                 # (n,)
                for k in range(len(maps)):
                    new[k, y, x] = sum(w[n] * maps[k, i, j] for n, (i, j) in enumerate(at)) / w.sum()
        maps = new
    return maps


@pytest.mark.parametrize("reach, distances", [(0, [1]), (1, [1]), (5, [1, 2, 4])])
def test_refine_in_loops(reach, distances):
    rng = np.random.default_rng(0)
    maps = rng.random((2, 5, 7))
    colours = rng.random((3, 5, 7))
    colours[:, :, :3] = 0.4                                                  # a flat part
    got = readings.refine(torch.from_numpy(maps).float(), torch.from_numpy(colours).float(), reach, rounds=2)
    np.testing.assert_allclose(got, refined(maps, colours, distances, 2), rtol=2e-3)


def test_refine_moves_a_border_to_the_edge_of_the_colours():
    """Truth and colour change at column 20, the coarse map at column 24."""
    colours = torch.zeros(3, 32, 40)
    colours[:, :, 20:] = 0.8
    coarse = torch.zeros(2, 4, 5)
    coarse[0, :, :3] = 1
    coarse[1] = 1 - coarse[0]
    truth = (torch.arange(40) >= 20).long().expand(32, 40)
    before = (seg4diff.label_map(coarse, (32, 40)) != truth).float().mean()
    after = (seg4diff.label_map(coarse, (32, 40), colours) != truth).float().mean()
    assert before == pytest.approx(0.1) and after == 0


def test_refine_needs_little_memory():
    """Of a picture of a megapixel the weights of all neighbours would take 128 MB."""
    maps = torch.rand(2, 1024, 1024)
    colours = torch.rand(3, 1024, 1024)
    used = megabytes(lambda: readings.refine(maps, colours, 8, rounds=1), torch.device("cpu"))
    if math.isnan(used):
        pytest.skip("nobody counts memory here")
    assert used < 100


def test_strips_change_nothing(monkeypatch):
    maps = torch.rand(2, 23, 9)
    colours = torch.rand(3, 23, 9)
    whole = readings.refine(maps, colours, 4, rounds=3)
    for pixels in (1, 20, 100):
        monkeypatch.setattr(readings, "STRIP", pixels)
        torch.testing.assert_close(readings.refine(maps, colours, 4, rounds=3), whole)


# ---------------------------------------------------------------------------- segment


def test_all_readings_of_one_pass(tiny, picture):
    """By hand from the pieces; a list of readings is each reading alone, and takes one pass."""
    names = ["car", "teddy bear", "sky"]
    found = seg4diff.segment(tiny, picture, names, reading=seg4diff.READINGS, seed=4, block=2)
    z0 = seg4diff.encode_image(tiny, picture)
    z = seg4diff.add_noise(z0, seg4diff.noise(z0.shape[1:], [4]), tiny.preset.sigma)
    cond = tiny.text.encode([names])
    _, taps = tiny.transformer(z, torch.tensor([tiny.preset.sigma]), cond.ctx, cond.pooled, capture={2}, stop_at=2)
    (attn,) = seg4diff.class_attention(taps[2], cond.spans)
    paper = attn.mean(0)
    shares = paper / paper.sum(0)
    i2i = (explicit_i2i(taps[2]) @ shares.flatten(1).mT).mT.view(3, 16, 16)
    for reading, want in (("paper", paper), ("shares", shares), ("i2i", i2i), ("pixels", i2i)):
        torch.testing.assert_close(found[reading].maps, want, atol=1e-6, rtol=1e-3)
        alone = seg4diff.segment(tiny, picture, names, reading=reading, seed=4, block=2)
        assert (found[reading].labels == alone.labels).all() and found[reading].classes == names
    colours = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert (found["pixels"].labels == seg4diff.label_map(i2i, (128, 128), colours).numpy()).mean() > 0.99
    assert (found["paper"].labels == seg4diff.segment(tiny, picture, names, seed=4, block=2).labels).all()
    labels = [found[reading].labels for reading in seg4diff.READINGS]
    assert all((a != b).any() for a, b in zip(labels, labels[1:]))


def test_readings_over_several_prompts_and_draws(tiny, picture):
    """35 names take two prompts; shares are formed, and the step is taken, in each draw."""
    names = [f"{c} {n}" for c in ("red", "blue") for n in scenes.CLASSES] + ["sky"] * 5
    assert len(seg4diff.split_classes(tiny.text, names)) > 1

    def maps(reading, **options):
        return seg4diff.segment(tiny, picture, names, reading=reading, **options).maps

    paper = maps("paper")
    torch.testing.assert_close(maps("shares"), paper / paper.sum(0), atol=1e-6, rtol=1e-4)
    for reading in ("shares", "i2i"):
        torch.testing.assert_close(maps(reading, draws=2), (maps(reading) + maps(reading, seed=1)) / 2)
    assert maps("shares").sum(0).allclose(torch.ones(16, 16))


def test_a_list_of_pictures_is_each_alone(tiny, picture):
    images = [picture.resize(size) for size in ((37, 211), (300, 20), (1, 1))]
    classes = [["car", "sky"], [f"{c} {name}" for c in ("red", "blue") for name in scenes.CLASSES], ["snow"]]
    together = seg4diff.segment(tiny, images, classes, reading=["i2i", "pixels"], seed=[3, 4, 5])
    for image, names, seed, found in zip(images, classes, (3, 4, 5), together):
        for reading, seg in found.items():
            alone = seg4diff.segment(tiny, image, names, reading=reading, seed=seed)
            assert seg.labels.shape == (image.height, image.width)
            torch.testing.assert_close(seg.maps, alone.maps, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options, sentence", [
    ({"reading": "best"}, "paper, shares, i2i, pixels"), ({"reading": []}, "no reading"),
    ({"reading": "i2i", "head": 0}, "variants of the paper's reading"),
    ({"reading": ["paper", "shares"], "minmax": True}, "variants of the paper's reading"),
    ({"reading": "pixels", "kind": "logits"}, "variants of the paper's reading")])
def test_segment_errors(tiny, picture, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.segment(tiny, picture, ["car"], **options)


# ---------------------------------------------------------------------------- regions without names


def test_anchors_are_the_centres_of_cells():
    assert readings.spread_patches((4, 6), 2).tolist() == [7, 10, 19, 22]    # rows 1 and 3, columns 1 and 4
    assert readings.spread_patches((2, 3), 8).tolist() == list(range(6))     # no more than there are patches
    assert len(readings.spread_patches((64, 64))) == readings.ANCHORS ** 2


def test_anchor_maps_are_rows_of_the_squared_matrix():
    qkv = random_qkv()
    rows = torch.tensor([0, 5, 11])
    squared = explicit_i2i(qkv) @ explicit_i2i(qkv)
    for chunk in (1, 5, 512):
        maps = readings.anchor_maps(qkv, rows, chunk)
        torch.testing.assert_close(maps.flatten(1), squared[rows])
    both = readings.anchor_reading(qkv)
    assert both.shape == (2, 12, 4, 3)                                       # a grid so small that all are anchors
    torch.testing.assert_close(both[0].flatten(1), squared)
    torch.testing.assert_close(both[1], readings.i2i_step(qkv, readings.shares(both[0])))


def merged(p: np.ndarray, threshold: float) -> set[frozenset[int]]:
    """The two nearest groups become one, in loops and float64."""
    groups = [[i] for i in range(len(p))]
    while len(groups) > 1:
        best = None
        for i in range(len(groups)):
            for j in range(i):
                a = p[groups[i]].mean(0)
                b = p[groups[j]].mean(0)
                distance = (a * np.log(a / b)).sum() / 2 + (b * np.log(b / a)).sum() / 2
                if best is None or distance < best[0]:
                    best = distance, i, j
        if best[0] >= threshold:
            break
        groups[best[2]] += groups.pop(best[1])
    return {frozenset(group) for group in groups}


def test_merging_in_loops():
    numbers = set()
    for seed in range(3):
        p = np.random.default_rng(seed).dirichlet(np.ones(6), 9)
        for threshold in (1e-9, 0.1, 0.3, 0.6, 1.0, 100):
            groups = readings.merge_nearest(torch.from_numpy(p), threshold)
            assert sorted(sum(groups, [])) == list(range(9))
            assert {frozenset(group) for group in groups} == merged(p, threshold)
            numbers.add(len(groups))
    assert {1, 9} < numbers


def test_greedy_merging_by_hand():
    """The first takes the second, the third takes the second again."""
    line = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [1.0, 0, 0, 0]]).log_softmax(1)
    kl = readings.symmetric_kl(line)
    threshold = float((kl[0, 1] + kl[0, 2]) / 2)
    assert readings.merge_greedy(line, threshold) == [[0, 1], [1, 2]]
    assert readings.merge_greedy(line, 1e-9) == [[0], [1], [2]]


def test_propose_by_hand(tiny, picture):
    """Two draws, from the picture to the labels; regions share every patch."""
    image = picture.resize((90, 61))
    z0 = seg4diff.encode_image(tiny, image)
    cond = tiny.text.encode([""])
    draws = []
    for seed in (3, 4):
        z = seg4diff.add_noise(z0, seg4diff.noise(z0.shape[1:], [seed]), 0.4)
        _, taps = tiny.transformer(z, torch.tensor([0.4]), cond.ctx, cond.pooled, capture={2}, stop_at=2)
        draws.append(readings.anchor_reading(taps[2]))
    usual = {"regions": "i2i", "block": 2, "sigma": 0.4, "seed": 3, "draws": 2, "threshold": 1e-4}
    got = seg4diff.propose(tiny, image, **usual)
    maps, members = readings.merge_anchors(torch.stack(draws).mean(0), 1e-4)
    assert got.members == members and 1 < len(members) == len(got.maps) < 64
    torch.testing.assert_close(got.maps, maps, atol=1e-6, rtol=1e-3)
    torch.testing.assert_close(got.maps.sum(0), torch.ones(16, 16))
    assert got.labels.shape == (61, 90) and got.labels.max() < len(members)
    for option in ({"block": 1}, {"sigma": 0.9}, {"seed": 1}, {"draws": 1}, {"threshold": 1e-9}):
        other = seg4diff.propose(tiny, image, **usual | option).maps
        assert other.shape != got.maps.shape or not torch.equal(other, got.maps), option


def test_propose_takes_the_presets_threshold(tiny, picture):
    by_preset = seg4diff.propose(tiny, [picture], regions="i2i")[0]
    same = seg4diff.propose(tiny, picture, regions="i2i", threshold=tiny.preset.i2i_threshold)
    assert by_preset.members == same.members


@pytest.mark.parametrize("options, sentence", [
    ({"regions": "sam"}, "pad or i2i"), ({"regions": "i2i", "scaling": "map"}, "scaling belongs to pad"),
    ({"regions": "i2i", "threshold": 0}, "threshold must be"), ({"regions": "i2i", "threshold": math.nan}, "not nan")])
def test_propose_errors(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.propose(tiny, Image.new("RGB", (8, 8)), **options)


def test_constants_of_the_readings():
    assert (readings.ROUNDS, readings.SHARPNESS, readings.ANCHORS) == (10, 0.1, 8)


def test_a_threshold_of_anchors():
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="must be positive"):
            readings.merge_anchors(torch.rand(2, 4, 2, 2), wrong)


def test_the_least_spread_is_a_third_of_a_grey_level():
    rng = np.random.default_rng(0)
    maps = rng.random((2, 5, 7))
    colours = 0.4 + rng.integers(0, 3, (3, 5, 7)) / 255
    got = readings.refine(torch.from_numpy(maps).float(), torch.from_numpy(colours).float(), 1, rounds=2)
    np.testing.assert_allclose(got, refined(maps, colours, [1], 2), rtol=5e-3)

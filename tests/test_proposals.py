"""Proposals from <pad> tokens: the merging against explicit loops, and the whole way from a picture."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import protocol
import seg4diff
from mmdit import i2t_attention
from nano import scenes
from seg4diff import SCALINGS, merge_maps
from support.data import DATASETS
from support.metrics import match_proposals


def merged(maps: np.ndarray, threshold: float, scaling: str) -> tuple[list[list[int]], list[np.ndarray]]:
    """A.4 in loops, float64: maps (L, N) -> which maps each proposal gathers, and their means."""
    x = maps.astype(float).copy()
    L, N = x.shape
    if scaling == "map":
        for i in range(L):
            x[i] = (maps[i] - maps[i].min()) / max(maps[i].max() - maps[i].min(), 1e-12)
    if scaling == "token":
        for n in range(N):
            x[:, n] = (maps[:, n] - maps[:, n].min()) / max(maps[:, n].max() - maps[:, n].min(), 1e-12)
    p = [np.exp(row) / sum(math.exp(v) for v in row) for row in x]
    taken = set()
    members = []
    means = []
    for i in range(L):
        if i in taken:
            continue
        near = []
        for j in range(L):
            there = sum(a * math.log(a / b) for a, b in zip(p[i], p[j]))
            back = sum(b * math.log(b / a) for a, b in zip(p[i], p[j]))
            if i == j or (there + back) / 2 < threshold:
                near.append(j)
        taken |= set(near)
        members.append(near)
        means.append(np.mean([p[j] for j in near], axis=0))
    return members, means


@pytest.mark.parametrize("scaling", SCALINGS)
def test_merging_against_loops(scaling):
    numbers = set()
    for seed in range(4):
        maps = np.random.default_rng(seed).normal(0, 1, (10, 4, 5)).astype(np.float32)
        for threshold in (1e-9, 0.03, 0.06, 0.12, 0.4, 1.0, 100):
            members, means = merged(maps.reshape(10, 20), threshold, scaling)
            proposals, gathered = merge_maps(torch.from_numpy(maps), threshold, scaling)
            assert gathered == members and proposals.shape == (len(members), 4, 5)
            np.testing.assert_allclose(proposals.flatten(1).numpy(), means, rtol=1e-5)
            torch.testing.assert_close(proposals.sum((1, 2)), torch.ones(len(members)))
            numbers.add(len(members))
    assert {1, 10} < numbers                             # from all maps in one to none merged, and cases between


def test_a_map_that_is_taken_is_gathered_again():
    """Three maps in a row, neighbours near: the first takes the second, and so does the third; in another order one
    proposal takes all."""
    line = torch.tensor([[0.0, 0, 0, 0], [0.5, 0, 0, 0], [1.0, 0, 0, 0]])[:, None]          # (3, 1, 4)
    p = line.flatten(1).softmax(1).double()
    near = 0.5 * ((p[0] - p[1]) * (p[0] / p[1]).log()).sum()
    far = 0.5 * ((p[0] - p[2]) * (p[0] / p[2]).log()).sum()
    threshold = float((near + far) / 2)
    proposals, members = merge_maps(line, threshold, "none")
    assert members == [[0, 1], [1, 2]]
    means = torch.stack([p[:2].mean(0), p[1:].mean(0)])
    torch.testing.assert_close(proposals.flatten(1).double(), means, rtol=1e-5, atol=0)
    assert merge_maps(line[[1, 0, 2]], threshold, "none")[1] == [[0, 1, 2]]
    assert merge_maps(line, float(near) * 0.99, "none")[1] == [[0], [1], [2]]


def test_what_is_scaled():
    """Twice the contrast is the same map once it is scaled over positions; a token that leads everywhere is not."""
    x = torch.linspace(0, 1, 6).view(2, 3)
    assert merge_maps(torch.stack([x, 9 * x + 3]), 1e-6, "map")[1] == [[0, 1]]
    assert merge_maps(torch.stack([x, 9 * x + 3]), 1e-6, "none")[1] == [[0], [1]]
    assert merge_maps(torch.stack([x, x + 1]), 1e-6, "none")[1] == [[0, 1]]                  # softmax sees no offset
    three = torch.stack([x, x + 1, x.flip(1)])
    assert merge_maps(three, 1e-6, "map")[1] == [[0, 1], [2]]
    assert merge_maps(three, 1e-6, "token")[1] == [[0], [1], [2]]
    constant = merge_maps(torch.ones(3, 2, 2), 0.1, "map")                   # no contrast, no division by zero
    assert constant[1] == [[0, 1, 2]] and torch.equal(constant[0], torch.full((1, 2, 2), 0.25))


def test_pad_maps_are_the_clip_columns_of_the_empty_prompt(tiny):
    """28 columns, <sos> and <eos> and <pad>, of the 56 that the softmax goes over."""
    z0 = seg4diff.noise((16, 8, 8), [50, 51])
    maps = seg4diff.pad_maps(tiny, z0, block=1, sigma=0.4, seeds=[1, 2])
    cond = tiny.text.encode([""])
    assert cond.tokens[0] == ["<sos>", "<eos>"] + ["<pad>"] * 26 and maps.shape == (2, 28, 8, 8)
    for b in range(2):
        z = seg4diff.add_noise(z0[b:b + 1], seg4diff.noise((16, 8, 8), [1 + b]), 0.4)
        _, taps = tiny.transformer(z, torch.tensor([0.4]), cond.ctx, cond.pooled, capture={1}, stop_at=1)
        attn = i2t_attention(taps[1])[0].mean(0)                             # (N, M)
        torch.testing.assert_close(maps[b].flatten(1), attn[:, :28].mT, atol=1e-6, rtol=1e-4)
        assert (maps[b].sum(0) < attn.sum(1).view(8, 8)).all()


def test_propose(tiny):
    image = Image.fromarray(scenes.draw(0).image).resize((90, 61))

    def propose(**options):
        return seg4diff.propose(tiny, image, **{"threshold": 1e-3, "scaling": "map"} | options)

    usual = propose()
    assert usual.labels.shape == (61, 90) and usual.labels.max() < len(usual.maps) == len(usual.members) > 1
    assert sorted(set(sum(usual.members, []))) == list(range(28))
    z0 = seg4diff.encode_image(tiny, image)
    by_hand = seg4diff.pad_maps(tiny, z0, block=1, sigma=tiny.preset.sigma, seeds=[0])[0]
    maps, members = merge_maps(by_hand, 1e-3, "map")
    assert members == usual.members and (seg4diff.label_map(maps, (61, 90)).numpy() == usual.labels).all()
    for option in ({"block": 2}, {"sigma": 0.9}, {"seed": 1}, {"scaling": "none"}, {"threshold": 1e-9}):
        other = propose(**option).maps
        assert other.shape != usual.maps.shape or not torch.equal(other, usual.maps), option
    preset = seg4diff.propose(tiny, image)                                   # of the model, here SD3's
    same = propose(threshold=0.1, scaling="token", block=1, sigma=tiny.preset.sigma, seed=0)
    assert preset.members == same.members and torch.equal(preset.maps, same.maps)


def test_several_draws_are_averaged(tiny):
    image = Image.fromarray(scenes.draw(0).image)
    z0 = seg4diff.encode_image(tiny, image)
    options = {"block": 1, "sigma": 0.4}
    each = torch.stack([seg4diff.pad_maps(tiny, z0, seeds=[seed], **options) for seed in (5, 6, 7)])
    mean = seg4diff.pad_maps(tiny, z0, seeds=[5], draws=3, **options)
    torch.testing.assert_close(mean, each.mean(0), atol=1e-6, rtol=1e-4)
    _, members = merge_maps(mean[0], 0.003, "map")
    assert seg4diff.propose(tiny, image, seed=5, draws=3, threshold=0.003, scaling="map", **options).members == members


def test_a_list_of_pictures_is_each_alone(tiny):
    sizes = ((90, 61), (40, 40), (9, 70))
    images = [Image.fromarray(scenes.draw(i).image).resize(size) for i, size in enumerate(sizes)]
    options = {"threshold": 1e-3, "scaling": "map", "block": 2, "sigma": 0.4}
    together = seg4diff.propose(tiny, images, seed=[5, 6, 7], **options)
    assert len(together) == 3
    for image, seed, one in zip(images, (5, 6, 7), together):
        alone = seg4diff.propose(tiny, image, seed=seed, **options)
        assert one.members == alone.members and one.labels.shape == (image.height, image.width)
        torch.testing.assert_close(one.maps, alone.maps, atol=1e-6, rtol=1e-4)
        assert (one.labels == alone.labels).mean() > 0.999
    assert len(seg4diff.propose(tiny, images[:1], **options)) == 1           # a seed for all of them: 0
    with pytest.raises(ValueError, match="3 pictures and 1 seeds are not equal lists"):
        seg4diff.propose(tiny, images, seed=[5], **options)


@pytest.mark.parametrize("options, sentence", [
    ({"threshold": 0}, "not 0"), ({"threshold": -1}, "not -1"), ({"threshold": math.nan}, "not nan"),
    ({"threshold": True}, "not True"), ({"scaling": "pixel"}, "map, token, none"), ({"draws": 0}, "at least 1"),
    ({"block": [1]}, r"not \[1\]"), ({"block": 3}, "blocks are 0 to 2"), ({"sigma": 1.5}, "not 1.5")])
def test_propose_errors(tiny, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.propose(tiny, Image.new("RGB", (8, 8)), **options)


@pytest.mark.parametrize("threshold, scaling", [(0, "map"), (-1, "map"), ("x", "map"), (0.1, "zzz"), (0.1, None)])
def test_merge_maps_errors(threshold, scaling):
    with pytest.raises(ValueError, match="must be"):
        merge_maps(torch.zeros(3, 2, 2), threshold, scaling)


def test_more_than_256_regions(tiny, monkeypatch):
    """As many as Flux has rows of text: no two of them become one in what is shown, or in what is counted."""
    data = DATASETS["scenes-dev"]()
    item = data.read(data.names[0])
    height, width = item.labels.shape
    labels = np.arange(height * width).reshape(height, width) % 512          # every pixel is a region's of 512
    found = torch.from_numpy(labels)
    task = protocol.TASKS["unsup"]._replace(predict=lambda *inputs: [(0, "tiny", found, 512)])
    monkeypatch.setitem(protocol.TASKS, "unsup", task)
    ev = protocol.evaluation(tiny, data, "unsup")
    (shown,) = ev.predict([item])
    assert np.array_equal(shown["tiny"], labels) and shown["floor"].max() > 256
    (counts,) = ev.count_batch([ev.prepare(item)])
    assert np.array_equal(counts["tiny"][:-1], match_proposals(item.labels, labels, len(data.classes))[0])
    assert counts["tiny"][-1].tolist() == [512, 1, 0]

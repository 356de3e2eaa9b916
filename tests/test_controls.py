"""Negative controls fall to the floor; and any SD3 segments the drawn scenes, which needs no data set."""
import json
import shutil

import numpy as np
import pytest
import torch

import controls
import seg4diff
from mmdit import i2t_attention
from nano.pretrain import write_presets
from protocol import Protocol, evaluation
from support.data import DATASETS


def test_swapped_names_are_never_right():
    classes = list("abcdefgh")
    for ids in ([0], [2, 5], [1, 2, 3, 7]):
        names = controls.swapped(np.array(ids, np.uint8), classes, 3)
        assert len(set(names)) == len(ids) and not set(names) & {classes[k] for k in ids}    # of absent classes
        assert names == controls.swapped(np.array(ids, np.uint8), classes, 3)
    assert len({tuple(controls.swapped(np.array([1, 2]), classes, seed)) for seed in range(20)}) > 5
    for ids in ([0, 1, 2, 3, 4, 5], list(range(8))):     # too few are absent: some are of the picture, but another's
        names = controls.swapped(np.array(ids, np.uint8), classes, 0)
        assert len(set(names)) == len(ids) and all(name != classes[k] for k, name in zip(ids, names))
    with pytest.raises(ValueError, match="two classes"):
        controls.swapped(np.array([0]), ["a"], 0)


@pytest.mark.parametrize("file", ["tiny_file", "tiny_flux_file"])
def test_a_shuffled_block(request, file):
    """Its queries have other channels, all before it and its keys are the same."""
    path = request.getfixturevalue(file)
    before = seg4diff.load(path, device="cpu", dtype="float32")
    after = seg4diff.load(path, device="cpu", dtype="float32")
    shuffled = controls.shuffle_block(after)
    assert shuffled.fingerprint != before.fingerprint
    block = before.preset.block
    z = seg4diff.noise((16, 16, 16), [0])
    cond = before.text.encode([["car", "sky"]])
    taps = []
    for model in (before, shuffled):
        _, found = model.transformer(z, torch.tensor([0.5]), cond.ctx, cond.pooled, capture={0, block}, stop_at=block)
        taps.append(found)
    assert all(torch.equal(a, b) for a, b in zip(taps[0][block][1:3], taps[1][block][1:3]))  # k and v
    n = taps[0][block].n_img
    if file == "tiny_file":                              # the Flux's block is a single one: one layer for both
        assert torch.equal(taps[0][block].q[:, :, n:], taps[1][block].q[:, :, n:])
    assert not torch.equal(i2t_attention(taps[0][block]), i2t_attention(taps[1][block]))
    if block > 0:
        assert all(torch.equal(a, b) for a, b in zip(taps[0][0][:3], taps[1][0][:3]))


def results(command, *options):
    code, out, err = command("evaluate.py", "--device", "cpu", "--out", "o", *options)
    assert code == 0, err
    with open("o/results.json") as file:
        return out, json.load(file)


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_nano_falls_to_the_floor(command, control):
    """40 scenes gave 15.0 and 7.5, their floor is 13.2 and nano's own score 80."""
    out, result = results(command, "--control", control, "--limit", 4, "--reading", "paper")
    rows = result["rows"]
    assert rows[f"nano ({control})"]["mIoU"] < rows["floor"]["mIoU"] + 10 < 30
    assert f"control: {control}, " in out and result["identity"]["protocol"]["control"] == control


def test_a_model_of_another_size_segments_the_drawn_scenes(command, tiny_file, tmp_path):
    """As `--model sd3` does: pictures of 128 pixels are squashed up to its square, masks brought down from its grid."""
    path = tmp_path / "sd3like.safetensors"
    shutil.copy(tiny_file, path)
    write_presets(path, size=144)
    model = seg4diff.load(path, device="cpu")
    assert (model.preset.size, model.grid) == (144, 18)
    hashes = set()
    for options in ([], ["--control", "swapped"], ["--control", "block"]):
        out, result = results(command, "--model", path, "--limit", 1, "--reading", "paper", *options)
        hashes.add(result["hash"])
        assert result["facts"]["data"] == "scenes, 1 pictures, 15 classes" and "ceiling" in out
        (row, *_) = result["rows"]
        assert 0 < result["rows"][row]["pACC"] < 100
    assert len(hashes) == 3


@pytest.mark.parametrize("args", [["swapped", "--task", "unsup"], ["block", "--task", "heads"],
                                  ["block", "--dataset", "all"]])
def test_controls_are_for_named_classes(command, tiny_file, args):
    code, out, err = command("evaluate.py", "--model", tiny_file, "--control", *args)
    assert (code, out) == (2, "") and "--control belongs to --task ovss" in err and err.count("\n") == 1


def test_swapped_names_follow_picture_and_seed(tiny):
    data = DATASETS["scenes"]()
    item = data.read(data.names[0])

    def names(item, seed):
        return tuple(evaluation(tiny, data, "ovss", Protocol(seed, control="swapped")).prepare(item).names)
    assert len({names(item, seed) for seed in range(5)}) > 1
    assert len({names(item._replace(name=str(i)), 0) for i in range(5)}) > 1


def test_weights_and_biases_are_shuffled_alike(tiny_file):
    model = seg4diff.load(tiny_file, device="cpu", dtype="float32")
    qkv = model.transformer.joint_blocks[model.preset.block].x_block.attn.qkv
    D = qkv.in_features
    weight, bias = qkv.weight.detach().clone(), qkv.bias.detach().clone()
    controls.shuffle_block(model, 3)
    order = torch.randperm(D, generator=torch.Generator().manual_seed(3))
    assert torch.equal(qkv.weight[:D], weight[:D][order]) and torch.equal(qkv.bias[:D], bias[:D][order])
    assert torch.equal(qkv.weight[D:], weight[D:]) and torch.equal(qkv.bias[D:], bias[D:])

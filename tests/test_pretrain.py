"""nano's training from nothing, in seconds: it writes a model that loads, resumes where it stopped, goes on from a file."""
import json
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import ARGS
from PIL import Image

import seg4diff
from nano import pretrain, scenes
from nano.pretrain import Muon
from support import weights
from support.data import DATASETS, toy_scenes

FAST = ["--scenes", 40, "--minutes-vae", 0.02, "--batch-vae", 2, "--width", 64, "--depth", 2, "--batch", 4]


def trained(path) -> dict:
    return json.loads(weights.header(weights.find(path))["trained"])


def test_from_nothing_then_resumed_then_from_a_file(command, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5004)))
    monkeypatch.setattr(scenes, "VAL_SEEDS", range(2))      # fewer pictures to show
    run, more = tmp_path / "run", tmp_path / "more"
    code, out, err = command("nano/pretrain.py", "--run", run, *FAST, "--samples", 40)
    assert code == 0 and "the expert is block" in out, err
    first, spent = trained(run / "nano.safetensors"), torch.load(run / "mmdit.pt", weights_only=True)["spent"]
    kept = [(run / f).stat().st_mtime_ns for f in ("images.npy", "vae_done.pt", "latents.npy")]
    assert first["samples"] >= 40 and first["scenes"] == 40

    code, _, err = command("nano/pretrain.py", "--run", run, *FAST, "--samples", 80)
    second = trained(run / "nano.safetensors")
    assert code == 0 and second["samples"] >= 80 > first["samples"], err
    assert torch.load(run / "mmdit.pt", weights_only=True)["spent"] > spent > 0
    assert [(run / f).stat().st_mtime_ns for f in ("images.npy", "vae_done.pt", "latents.npy")] == kept

    code, _, err = command("nano/pretrain.py", "--run", more, *FAST, "--samples", 0, "--init", run / "nano.safetensors")
    assert code == 0, err                                   # no step is made: the same model comes out
    old, new = (weights.read(weights.find(f / "nano.safetensors")) for f in (run, more))
    for part in old:
        assert all(torch.equal(old[part][k], new[part][k]) for k in old[part])
    code, _, err = command("nano/pretrain.py", "--run", more, *FAST, "--samples", 8, "--pooled", 0,
                           "--init", run / "nano.safetensors")
    unused = "y_embedder.mlp.0.weight"                      # of a pooled vector that is always withheld: nothing is learnt
    seen = weights.read(weights.find(more / "nano.safetensors"))["mmdit"]
    assert code == 0 and torch.equal(seen[unused], old["mmdit"][unused]), err
    assert not torch.equal(seen["y_embedder.mlp.2.bias"], old["mmdit"]["y_embedder.mlp.2.bias"])
    code, _, err = command("nano/pretrain.py", "--run", more, *FAST)         # that run did not begin from nothing
    assert code == 2 and "name another --run" in err
    for f in (run, more):                                   # as snapshots are named
        (f / "nano_0000k.safetensors").write_bytes((f / "nano.safetensors").read_bytes())
    code, out, err = command("nano/curves.py", "--run", run, more, "--limit", 2, "--out", tmp_path / "curves.png")
    seen = [int(line.split()[0]) for line in out.splitlines() if "mIoU by block" in line]
    assert code == 0 and seen == [second["samples"], second["samples"] + trained(more / "nano.safetensors")["samples"]], err
    assert Image.open(tmp_path / "curves.png").width > 500
    assert command("nano/curves.py", "--run", tmp_path)[0] == 2
    image, = seg4diff.generate(seg4diff.load(more / "nano.safetensors"), "red car", steps=2)
    assert image.size == (128, 128)


def test_layers_of_the_text_towers():
    for layers in (1, 2):
        _, text, _ = pretrain.build(Namespace(**vars(ARGS) | {"text_layers": layers}), 16)
        assert [len(tower.text_model.encoder.layers) for tower in (text.clip_l, text.clip_g)] == [layers, layers]


def test_muon_makes_updates_orthogonal():
    """All singular values of an update come out alike, whatever those of the gradient; tall, wide and kernels."""
    torch.manual_seed(0)
    for shape in ((48, 16), (16, 48), (12, 3, 2, 2)):
        p = torch.nn.Parameter(torch.zeros(shape))
        rank_one_ish = torch.randn(shape[0], 1) @ torch.randn(1, p[0].numel()) + 0.1 * torch.randn(shape[0], p[0].numel())
        p.grad = rank_one_ish.reshape(shape)
        Muon([p], lr=1.0).step()
        size = 0.2 * max(p.flatten(1).shape) ** 0.5
        values = torch.linalg.svdvals(p.detach().flatten(1)) / size
        assert 0.6 < values.min() and values.max() < 1.3
        assert (p.detach() * p.grad).sum() < 0              # against the gradient


def test_grown_blocks_begin_as_the_identity(tiny):
    """The same velocity from more blocks; the old last block's attention is read as before, and all new weights learn."""
    z, sigma = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    cond = tiny.text.encode(["a red car", "snow"])
    grown = pretrain.grow(tiny.transformer, 5).requires_grad_(True)
    a, taps = tiny.transformer(z, sigma, cond.ctx, cond.pooled, capture={2})
    b, grown_taps = grown(z, sigma, cond.ctx, cond.pooled, capture={2})
    assert grown.config.depth == 5 and torch.allclose(a, b, atol=1e-5)
    assert torch.allclose(taps[2].q, grown_taps[2].q, atol=1e-5)
    for _ in range(3):                                   # zero gates let the next weights learn from the second step on
        grown(z, sigma, cond.ctx, cond.pooled)[0].square().mean().backward()
        with torch.no_grad():
            for p in grown.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0)
    still = [k for k, p in grown.named_parameters() if "joint_blocks.3" in k and (p.grad is None or not p.grad.any())]
    assert not still
    with pytest.raises(ValueError, match="3 blocks cannot go on with 2"):
        pretrain.grow(tiny.transformer, 2)

"""nano's training from nothing, in seconds: it writes a model that loads, resumes where it stopped, goes on from a file."""
import json

import torch

import seg4diff
import weights
from nano.pretrain import Muon

FAST = ["--scenes", 40, "--minutes-vae", 0.02, "--batch-vae", 2, "--width", 64, "--depth", 2, "--batch", 4]


def trained(path) -> dict:
    return json.loads(weights.header(weights.find(path))["trained"])


def test_from_nothing_then_resumed_then_from_a_file(command, tmp_path):
    run, more = tmp_path / "run", tmp_path / "more"
    code, out, err = command("nano/pretrain.py", "--run", run, *FAST, "--minutes", 0.03)
    assert code == 0 and "the expert is block" in out, err
    first, drawn = trained(run / "nano.safetensors"), (run / "images.npy").stat().st_mtime_ns
    vae = (run / "vae_done.pt").stat().st_mtime_ns
    assert first["samples"] > 0 and first["scenes"] == 40

    code, _, err = command("nano/pretrain.py", "--run", run, *FAST, "--minutes", 0.06)
    second = trained(run / "nano.safetensors")
    assert code == 0 and second["samples"] > first["samples"] and second["seconds"] > first["seconds"], err
    assert ((run / "images.npy").stat().st_mtime_ns, (run / "vae_done.pt").stat().st_mtime_ns) == (drawn, vae)

    code, _, err = command("nano/pretrain.py", "--run", more, *FAST, "--minutes", 0, "--init", run / "nano.safetensors")
    assert code == 0, err                                   # no step is made: the same model comes out
    old, new = (weights.read(weights.find(f / "nano.safetensors")) for f in (run, more))
    for part in old:
        assert all(torch.equal(old[part][k], new[part][k]) for k in old[part])
    code, _, err = command("nano/pretrain.py", "--run", more, *FAST)         # that run did not begin from nothing
    assert code == 2 and "name another --run" in err
    image, = seg4diff.generate(seg4diff.load(more / "nano.safetensors"), "red car", steps=2)
    assert image.size == (128, 128)


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

"""nano's training from nothing, in seconds: it writes a model that loads, goes on where it stopped, and from a file."""
import json
from argparse import Namespace
from functools import partial
from itertools import count

import numpy as np
import pytest
import torch
from conftest import ARGS
from PIL import Image

import seg4diff
from nano import pretrain, scenes, train_vae, training
from support import weights
from support.data import DATASETS, toy_scenes
from support.files import Broken
from vae import VAE

FAST = ["--scenes", 16, "--minutes-vae", 0.05, "--batch-vae", 2, "--vae-widths", 4, 8, 8, 8, "--width", 64,
        "--depth", 2, "--batch", 4]


@pytest.fixture
def clock(monkeypatch):
    """A step of the VAE's training takes a second, whatever the machine does."""
    monkeypatch.setattr(train_vae, "time", Namespace(time=partial(next, count())))


def is_matrix(name, p):
    return p.ndim == 2


def trained(path) -> dict:
    return json.loads(weights.header(weights.find(path))["trained"])


def test_from_nothing_then_resumed_then_from_a_file(command, tmp_path, monkeypatch, clock):
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5002)))
    monkeypatch.setattr(scenes, "VAL_SEEDS", range(1))      # fewer pictures to show
    run, more = tmp_path / "run", tmp_path / "more"
    code, out, err = command("nano/pretrain.py", "--run", run, *FAST, "--samples", 40)
    assert code == 0 and "the expert is block" in out, err
    first, spent = trained(run / "nano.safetensors"), torch.load(run / "mmdit.pt", weights_only=True)["spent"]
    kept = [(run / f).stat().st_mtime_ns for f in ("images.npy", "vae_done.pt", "latents.npy")]
    assert first["samples"] >= 40 and first["scenes"] == 16
    old = weights.read(weights.find(run / "nano.safetensors"))
    assert old["vae"]["encoder.conv_in.weight"].shape[0] == 4 and old["vae"]["decoder.conv_in.weight"].shape[0] == 8

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
    unused = "y_embedder.mlp.0.weight"                      # of a pooled vector that is always withheld: no gradient
    seen = weights.read(weights.find(more / "nano.safetensors"))["mmdit"]
    assert code == 0 and torch.equal(seen[unused], old["mmdit"][unused]), err
    assert not torch.equal(seen["y_embedder.mlp.2.bias"], old["mmdit"]["y_embedder.mlp.2.bias"])
    code, _, err = command("nano/pretrain.py", "--run", more, *FAST)         # that run did not begin from nothing
    assert code == 2 and "name another --run" in err
    for f in (run, more):                                   # as snapshots are named
        (f / "nano_0000k.safetensors").write_bytes((f / "nano.safetensors").read_bytes())
    code, out, err = command("nano/curves.py", "--run", run, more, "--limit", 2, "--out", tmp_path / "curves.png")
    samples = [int(line.split()[0]) for line in out.splitlines() if "mIoU by block" in line]
    assert code == 0, err
    assert samples == [second["samples"], second["samples"] + trained(more / "nano.safetensors")["samples"]]
    assert Image.open(tmp_path / "curves.png").width > 500
    assert command("nano/curves.py", "--run", tmp_path)[0] == 2
    image, = seg4diff.generate(seg4diff.load(more / "nano.safetensors"), "red car", steps=2)
    assert image.size == (128, 128)


def test_flux_from_another_models_vae_then_on(command, tmp_path, tiny_file, monkeypatch):
    """--arch flux: one file under SD3's prefixes that loads by itself, on the VAE that it was given, and goes on."""
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5001)))
    monkeypatch.setattr(scenes, "VAL_SEEDS", range(1))
    run, more = tmp_path / "run", tmp_path / "more"
    size = ["--scenes", 8, "--batch", 2, "--arch", "flux"]
    code, out, err = command("nano/pretrain.py", "--run", run, *size, "--vae", tiny_file, "--samples", 6, "--width", 32,
                             "--flux-blocks", 1, 2, "--mlp-ratio", 3)
    assert code == 0 and "the expert is block" in out, err
    sd = weights.read(weights.find(run / "nano.safetensors"))
    vae_sd = weights.read(weights.find(tiny_file))["vae"]
    assert all(torch.equal(sd["vae"][key], vae_sd[key]) for key in vae_sd) and not (run / "vae.pt").exists()
    model = seg4diff.load(run / "nano.safetensors", "cpu")
    config = model.transformer.config
    assert (config.double_blocks, config.single_blocks, config.guidance) == (1, 2, False)
    assert config.mlp == 3 * config.width and model.text.length == 22 and model.text.t5xxl.width == 128
    code, _, err = command("nano/pretrain.py", "--run", more, *size, "--samples", 2, "--init", run / "nano.safetensors")
    new = weights.read(weights.find(more / "nano.safetensors"))
    assert code == 0 and sd.keys() == new.keys() == {"mmdit", "vae", "clip_l", "t5xxl"}, err
    assert any(not torch.equal(sd["mmdit"][key], new["mmdit"][key]) for key in sd["mmdit"])


def test_what_muon_trains_of_a_flux():
    """The matrices inside the blocks of all three networks, but no modulation, embedding or table of biases."""
    flux, text, _ = pretrain.new_model(Namespace(**vars(ARGS) | {"arch": "flux", "text_layers": 1}), 16)
    modules = torch.nn.ModuleDict({"mmdit": flux, "text": text})
    chosen = {name for name, p in modules.named_parameters() if pretrain.is_block_matrix(name, p)}
    assert len(chosen) == 2 * 8 + 2 * 2 + 7 + 6          # double, single, T5, CLIP
    assert not [name for name in chosen if "mod" in name.split(".")[-2] or "embed" in name or "bias" in name]


@pytest.mark.parametrize("options, sentence", [
    (["--minutes-vae", 0], "must be positive"), (["--minutes-vae", -1], "must be positive"),
    (["--head-dim", 0], "from 1 to 4096"), (["--head-dim", 48], "of --head-dim"),
    (["--width", 10**9], "from 4 to 4096"),
    (["--vae-widths", 0, 0], "from 4 to 4096"), (["--vae-widths", 8, 8, 8], "4 to 7 multiples"),
    (["--vae-widths", 8, 8, 6, 8], "multiples of 4"), (["--vae-widths", 32, 32, 40, 64], "of 32"),
    (["--text-widths", 64, 96], "multiples of 64"), (["--text-length", 3], "from 4 to 1024"),
    (["--arch", "flux", "--head-dim", 16], "multiple of 32"),
    (["--depth", 0], "from 1 to 64"), (["--samples", -1], "at least 0"), (["--seed", -1], "from 0 to"),
    (["--scenes", 10**7], "from 1 to 1000000"),
    (["--lr", -1], "positive"), (["--lr", "nan"], "positive"), (["--kl", -1], "at least 0"),
    (["--low", 1.5], "from 0 to 1"), (["--pooled", -0.1], "from 0 to 1"), (["--cooldown", 2], "from 0 to 1"),
    (["--noise-mean", "inf"], "from -20 to 20"), (["--snapshot", "nan"], "at least 0"),
    (["--device", "tpu"], "cpu or cuda"),
    (["--init", "none.safetensors"], "no such file")])
def test_bad_options_are_named_before_the_work(command, tmp_path, options, sentence):
    code, out, err = command("nano/pretrain.py", "--run", "run", *options)
    assert (code, out) == (2, "") and err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_few_scenes_and_few_minutes(command, tmp_path, monkeypatch, clock):
    """Two scenes are enough for a run, and one step of the VAE for latents of unit variance; broken parts are named."""
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5001)))
    monkeypatch.setattr(scenes, "VAL_SEEDS", range(1))
    few = ["--run", tmp_path / "run", *FAST, "--scenes", 2, "--minutes-vae", 0.001, "--samples", 4, "--cooldown", 0]
    code, _, err = command("nano/pretrain.py", *few)
    assert code == 0, err
    latents = np.load(tmp_path / "run/latents.npy").astype(np.float32)
    assert latents.shape == (2, 16, 16, 16) and abs(latents.std() - 1) < 0.1
    (tmp_path / "run/nano_0000k.safetensors").write_bytes((tmp_path / "run/nano.safetensors").read_bytes())
    for name in ("origin.json", "facts.json", "images.npy", "vae_done.pt", "latents.npy", "mmdit.pt"):
        path = tmp_path / "run" / name
        good = path.read_bytes()
        for broken in (b"[5]", good[:len(good) // 2]):
            path.write_bytes(broken)
            code, out, err = command("nano/pretrain.py", *few)
            sentence = err.splitlines()[-1]
            assert (code, out) == (2, "") and sentence.startswith("error: ") and name in sentence, name
            assert "Traceback" not in err and path.read_bytes() == broken
        path.write_bytes(good)
    for name in ("nano_0000k.safetensors", "curves.json", "mmdit.pt"):
        path = tmp_path / "run" / name
        good = path.read_bytes() if path.exists() else b'{"x/60": {"samples": 8, "mIoU": [null], "floor": 1.0}}\n'
        for broken in (b"[5]", good[:-1]):
            path.write_bytes(broken)
            code, out, err = command("nano/curves.py", "--run", tmp_path / "run", "--out", tmp_path / "c.png")
            assert (code, out) == (2, "") and err.startswith("error: ") and name in err and err.count("\n") == 1, name
        path.write_bytes(good)


def test_states_of_another_run_or_astray_are_refused(tmp_path):
    layer = torch.nn.Linear(4, 4)
    path, origin = tmp_path / "mmdit.pt", {"seed": "0"}
    opts = training.optimisers(layer, is_matrix, 1e-3)
    training.save_state(path, {"model": layer}, opts, training.Progress(5), origin)

    def resume(module=layer, origin=origin):
        return training.resume(path, {"model": module}, training.optimisers(module, is_matrix, 1e-3), progress, origin)

    progress = training.Progress()
    assert resume() and progress.step == 5
    for wrong in ({"origin": {"seed": "1"}}, {"module": torch.nn.Linear(4, 5)}):
        with pytest.raises(Broken, match="mmdit.pt"):
            resume(**wrong)
    state = torch.load(path, weights_only=True)
    for part, value in (("model", {}), ("opts", []), ("opts", [5, 5]), ("step", "5"), ("log", None), ("origin", 0)):
        torch.save(state | {part: value}, path)
        with pytest.raises(Broken, match="mmdit.pt"):
            resume()
    good = path.read_bytes()
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        training.save_state(path, {"model": layer}, [], progress, origin)
    with pytest.raises(ValueError, match="the loss is nan"):
        training.optimise([], layer(torch.ones(4)).sum(), 1e-3)
    assert path.read_bytes() == good


def test_latents_of_another_vae_are_refused(tmp_path):
    np.save(tmp_path / "images.npy", np.stack([scenes.draw(seed).image for seed in range(2)]))
    first, second = (VAE((4, 8, 8, 8), 1, 1, 16) for _ in range(2))
    latents = train_vae.encode_latents(tmp_path, first, torch.device("cpu"), 2)
    assert (train_vae.encode_latents(tmp_path, first, torch.device("cpu"), 2) == latents).all()
    with pytest.raises(Broken, match="another VAE"):
        train_vae.encode_latents(tmp_path, second, torch.device("cpu"), 2)


def test_the_vae_goes_on_with_its_encoder_as_it_was(tmp_path, monkeypatch, clock):
    """The last third trains the decoder alone, after a kill too."""
    monkeypatch.setattr(scenes, "SIDE", 32)
    np.save(tmp_path / "images.npy", np.stack([scenes.draw(seed, 32).image for seed in range(40)]))
    args = Namespace(device=torch.device("cpu"), seed=0, vae_widths=(4, 8, 8, 8), batch_vae=2, kl=1e-4,
                     scenes=40, origin={})
    states = []
    for args.minutes_vae in (0.1, 0.15):
        (tmp_path / "vae_done.pt").unlink(missing_ok=True)
        train_vae.train_vae(tmp_path, args)
        states.append(torch.load(tmp_path / "vae.pt", weights_only=True))
    first, second = states
    assert (first["step"], second["step"]) == (6, 9) and first["folded"] and second["folded"]
    done = torch.load(tmp_path / "vae_done.pt", weights_only=True)["vae"]
    changed = {key.split(".")[0] for key in done if not torch.equal(done[key], first["vae"][key])}
    assert changed == {"decoder"}
    assert Image.open(tmp_path / "vae.png").size == (64, 64)                 # two pictures above what came back


def test_folded_latents_have_zero_mean_and_unit_variance():
    torch.manual_seed(0)
    vae = VAE((4, 8, 8, 8), 1, 1, 16)
    batches = [torch.rand(8, 3, 32, 32) * 2 - 1 for _ in range(2)]
    train_vae.fold_scale(vae, batches)
    with torch.no_grad():
        z = vae.encode(torch.cat(batches))
    assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_layers_of_the_text_towers():
    for layers in (1, 2):
        _, text, _ = pretrain.new_model(Namespace(**vars(ARGS) | {"text_layers": layers}), 16)
        assert [len(tower.text_model.encoder.layers) for tower in (text.clip_l, text.clip_g)] == [layers, layers]


def test_muon_makes_updates_orthogonal():
    """All singular values of an update come out alike, whatever those of the gradient; tall, wide and kernels."""
    torch.manual_seed(0)
    for shape in ((48, 16), (16, 48), (12, 3, 2, 2)):
        p = torch.nn.Parameter(torch.zeros(shape))
        width = p[0].numel()
        rank_one_ish = torch.randn(shape[0], 1) @ torch.randn(1, width) + 0.1 * torch.randn(shape[0], width)
        p.grad = rank_one_ish.reshape(shape)
        training.Muon([p], lr=1.0).step()
        size = 0.2 * max(p.flatten(1).shape) ** 0.5
        values = torch.linalg.svdvals(p.detach().flatten(1)) / size
        assert values.min() > 0.6 and values.max() < 1.3
        assert (p.detach() * p.grad).sum() < 0              # against the gradient


def test_grown_blocks_begin_as_the_identity(tiny):
    """The same velocity from more blocks; the old last block's attention is the same, and all new weights learn."""
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

"""The same numbers on a GPU, and nothing on the wrong side: every command's path on a pretended one (pretend.py).

What a pretended device cannot show is tested on a real one, by test_cuda.py.
"""
import json
from argparse import Namespace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretend import Card, Far, pretend
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_explore import read_page, values

import analysis
import figures
import lora
import magnet
import protocol
import readings
import seg4diff
from nano import scenes, train_vae
from support.checkpoint import pick_device, pick_dtype
from support.data import DATASETS, TRAINING_SETS, Pair, toy_scenes

NAMES = ["sky", "night", "grass", "snow", "car"]


@pytest.fixture(scope="session")
def small_file(tiny_file, tmp_path_factory) -> Path:
    """The tiny model at 64 pixels, with a sampler of 2 steps: a quarter of the time of tests/conftest.py's."""
    with safe_open(tiny_file, "pt") as f:
        header = f.metadata()
    presets = {**json.loads(header["presets"]), "size": 64, "steps": 2, "noise_steps": 1}
    path = tmp_path_factory.mktemp("small") / "tiny.safetensors"
    save_file(load_file(tiny_file), path, {**header, "presets": json.dumps(presets)})
    return path


@pytest.fixture(scope="session")
def near(small_file) -> seg4diff.Seg4Diff:
    return seg4diff.load(small_file, "cpu", "float32")


@pytest.fixture(scope="session")
def loaded(small_file) -> dict[str, tuple[Card, seg4diff.Seg4Diff]]:
    """A card of each kind and the small model on it: to load it for each test would be a third of the time."""
    found = {}
    for kind in ("cuda", "mps"):
        with pretend(kind) as card:
            found[kind] = card, seg4diff.load(small_file, "auto", "float32")
    return found


@pytest.fixture(params=["cuda", "mps"])
def card(request, loaded):
    """A device that is pretended; after the test, nothing was refused on it."""
    card, _ = loaded[request.param]
    with pretend(request.param, card=card):
        yield card
    assert not card.refused


@pytest.fixture
def far(card, loaded) -> seg4diff.Seg4Diff:
    _, model = loaded[card.device.type]
    return model


@pytest.fixture(scope="session")
def picture() -> Image.Image:
    return Image.fromarray(scenes.draw(3).image)


# ---------------------------------------------------------------------------- which device, which dtype


def test_auto_takes_cuda_then_mps_then_the_cpu(small_file):
    assert (pick_device("auto"), pick_dtype("auto", torch.device("cpu"))) == (torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="no device 'mps'; use cpu or cuda .PyTorch sees 0 CUDA"):
        pick_device("mps")
    for kind, dtype in (("cuda", torch.bfloat16), ("mps", torch.float32)):
        with pretend(kind):
            model = seg4diff.load(small_file)
            parameters = [p for part in (model.transformer, model.vae, model.text) for p in part.parameters()]
            assert model.device == torch.device(kind, 0) and {p.dtype for p in parameters} == {dtype}
            assert all(isinstance(p.data, Far) for p in parameters)
            assert pick_device("cpu").type == "cpu"


def test_bfloat16_is_for_cards_that_have_it():
    for capability, dtype in (((9, 0), torch.bfloat16), ((7, 5), torch.float16), ((7, 0), torch.float16)):
        with pretend("cuda", capability):
            assert pick_dtype("auto", pick_device("cuda")) == dtype
            assert pick_dtype("bfloat16", pick_device("cuda")) == torch.bfloat16             # asked for, so taken


def test_each_process_of_torchrun_has_its_own_card():
    chosen = []
    with pretend("cuda"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.device_count", lambda: 2)
        patch.setattr("torch.cuda.set_device", chosen.append)
        patch.setenv("LOCAL_RANK", "1")
        assert pick_device("auto") == torch.device("cuda", 1) and chosen == ["cuda:1"]


def test_float32_is_not_tf32(near, picture):
    seen = []
    convolutions = [near.vae.encoder.conv_in, near.vae.decoder.conv_in, near.transformer.x_embedder.proj]
    hooks = [layer.register_forward_pre_hook(lambda *args: seen.append(torch.backends.cudnn.allow_tf32))
             for layer in convolutions]
    before = torch.backends.cudnn.allow_tf32
    with torch.inference_mode():
        z0 = seg4diff.encode_image(near, picture)
        near.vae.decode(z0)
        near.transformer.x_embedder(z0)
    assert seen == [False] * 3 and torch.backends.cudnn.allow_tf32 == before
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------------------- the method


def same(there, here):
    assert type(there.maps) is torch.Tensor
    torch.testing.assert_close(there.maps, here.maps, rtol=1e-4, atol=1e-6)
    assert (there.labels == here.labels).mean() > 0.99


def test_segments_and_proposes(far, near, picture, monkeypatch):
    monkeypatch.setattr(readings, "refine", partial(readings.refine, rounds=1))
    for call in (lambda m: seg4diff.segment(m, picture, NAMES, kind="t2i", head=1, minmax=True, draws=2),
                 lambda m: seg4diff.propose(m, picture),
                 lambda m: seg4diff.propose(m, picture, regions="i2i", threshold=1e-7)):
        same(call(far), call(near))
    many = [f"thing {i}" for i in range(12)]                                 # in several prompts
    assert len(seg4diff.split_classes(near.text, many)) > 1
    for names, chosen in ((NAMES, seg4diff.READINGS), (many, ("paper", "i2i"))):
        there = seg4diff.segment(far, picture, names, reading=chosen)
        here = seg4diff.segment(near, picture, names, reading=chosen)
        for reading in chosen:
            same(there[reading], here[reading])


def test_pixels_are_refined_on_the_device(card, far, picture, monkeypatch):
    """Whatever comes home, nothing does in between."""
    monkeypatch.setattr(readings, "refine", partial(readings.refine, rounds=2))
    seg4diff.segment(far, picture, NAMES, reading="pixels")
    assert card.crossings and not [c for c in card.crossings if "refine" in c.functions]


def test_generates_without_a_stop(card, far, near):
    """Nothing crosses and nothing waits inside the sampler's loop."""
    options = {"steps": 3, "pag": 1.0, "perturb": [0]}
    there, here = (np.asarray(seg4diff.generate(m, "a car", **options)[0], int) for m in (far, near))
    assert np.abs(there - here).max() <= 1
    assert card.crossings and not [c for c in card.crossings if "sample" in c.functions]


def test_a_sweep_brings_counts_home_and_no_label_maps(card, far):
    """Of each picture's 24 maps one table comes back; what else stops is a question of label_map and bincount's."""
    data = DATASETS["scenes"]()
    card.crossings.clear()
    protocol.measure(far, data, data.names[:2], "heads")
    home = [c for c in card.crossings if c.kind == "to host" and "label_maps" not in c.functions]
    assert len([c for c in home if "count_batch" in c.functions]) == 2
    assert not [c for c in card.crossings if c.kind == "to host" and "sweep_named" in c.functions]


@pytest.mark.parametrize("task", ["layers", "heads", "timesteps", "normalization", "thresholds"])
def test_every_sweep_scores_the_same(near, loaded, task):
    """The other tasks are test_evaluate's."""
    data = DATASETS["scenes"]()
    card, far = loaded["cuda"]
    with pretend("cuda", card=card):
        there = protocol.measure(far, data, data.names[:1], task)
    here = protocol.measure(near, data, data.names[:1], task)
    assert there.keys() == here.keys() and card.crossings and not card.refused
    for row in here:
        assert there[row]["mIoU"] == pytest.approx(here[row]["mIoU"], abs=0.1), row


def test_prompts_are_encoded_once(small_file, picture, monkeypatch):
    """For all noise levels and draws of a picture, and for all pictures where the prompt is empty."""
    model = seg4diff.load(small_file, "cpu")
    encode_now = model.text.encode_now
    encoded = []
    monkeypatch.setattr(model.text, "encode_now", lambda prompts: encoded.append(prompts) or encode_now(prompts))
    for sigma in (0.3, 0.5):
        seg4diff.segment(model, picture, NAMES, sigma=sigma, draws=2)
    assert encoded == [[NAMES]]
    seg4diff.propose(model, picture)
    seg4diff.propose(model, Image.fromarray(scenes.draw(4).image))
    assert encoded[1:] == [[[]]]
    with torch.inference_mode():
        for i in range(20):
            model.text.encode([f"thing {i}"])
    assert len(model.text.cache) <= 16


@pytest.mark.parametrize("kind, waits", [("cuda", False), ("cuda", True), ("mps", False)])
def test_a_flux_segments_and_generates(tiny_flux, tiny_flux_file, picture, monkeypatch, kind, waits):
    if waits:                                            # T5's and the transformer's blocks stay in host memory
        monkeypatch.setattr("loading.free_memory", lambda device: 0)
    names = ["sky", "red car"]
    here = seg4diff.segment(tiny_flux, picture, names, reading="i2i")
    plain, = seg4diff.generate(tiny_flux, "red car", steps=1, pag=1.0)
    with pretend(kind) as card:
        far = seg4diff.load(tiny_flux_file, "auto", "float32")
        there = seg4diff.segment(far, picture, names, reading="i2i")
        drawn, = seg4diff.generate(far, "red car", steps=1, pag=1.0)
    assert not card.refused
    torch.testing.assert_close(there.maps, here.maps, rtol=1e-4, atol=1e-6)
    assert np.abs(np.array(plain, int) - np.array(drawn, int)).max() <= 1


# ---------------------------------------------------------------------------- MAGNET


def gradients(model, checkpointing):
    params = lora.add_lora(model.transformer, generator=torch.Generator().manual_seed(0))
    model.transformer.checkpointing = checkpointing
    data = TRAINING_SETS["scenes"](Path(), None)
    batch = [magnet.features(model, data.read(name), False) for name in data.names[:2]]
    losses = magnet.gradient(model, params, [(batch, [0, 1])], magnet.Settings())
    return losses, params


@pytest.mark.parametrize("kind, checkpointing", [("cuda", True), ("mps", False)])
def test_trains(small_file, kind, checkpointing):
    here, wanted = gradients(seg4diff.load(small_file, "cpu", "float32"), checkpointing)
    with pretend(kind) as card:
        there, params = gradients(seg4diff.load(small_file, "auto", "float32"), checkpointing)
        assert all(p.device == card.device for p in params) and not card.refused
        got = [p.grad.cpu() for p in params]
    assert there == pytest.approx(here, rel=1e-4)
    for grad, q in zip(got, wanted):
        torch.testing.assert_close(grad, q.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind, capability, dtype, mixed", [
    ("cuda", (8, 0), "float32", True), ("cuda", (8, 0), "bfloat16", False), ("cuda", (7, 5), "float32", False),
    ("mps", None, "float32", False)])
def test_autocast_is_for_fp32_weights(small_file, loaded, near, picture, kind, capability, dtype, mixed):
    features = magnet.features(near, Pair(picture, np.ones((1, 128, 128), bool), [], "a car"), False)
    card, model = loaded[kind]
    seen = []

    def look(*args):
        seen.append(torch.is_autocast_enabled(kind))
        raise StopIteration

    with pretend(kind, capability, card):
        if dtype != "float32":
            model = seg4diff.load(small_file, "auto", dtype)
        hook = model.transformer.register_forward_pre_hook(look)
        with pytest.raises(StopIteration):
            magnet.batch_losses(model, [features], [0], magnet.Settings())
        hook.remove()
    assert seen == [mixed]


# ---------------------------------------------------------------------------- command lines


@pytest.fixture
def both(command, tmp_path, small_file):
    """Runs a command on a pretended device and on the CPU, in float32: what it wrote there, and what here."""
    def run(kind: str, out: str, *args) -> tuple[Path, Path]:
        options = ["--model", small_file, "--dtype", "float32"]
        for folder in ("there", "here"):
            (tmp_path / folder).mkdir(exist_ok=True)
        with pretend(kind) as card:
            code, _, err = command(*args, *options, "--device", "auto", "--out", tmp_path / "there" / out)
        assert code == 0 and not card.refused, (err, card.refused)
        assert card.crossings
        code, _, err = command(*args, *options, "--device", "cpu", "--out", tmp_path / "here" / out)
        assert code == 0, err
        return tmp_path / "there" / out, tmp_path / "here" / out
    return run


def test_segment_and_generate(both, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    for args in (("segment", tmp_path / "a.png", "car", "sky"), ("generate", "a car", "snow", "--pag", 1)):
        there, here = (np.asarray(Image.open(path), int) for path in both("cuda", "x.png", "seg4diff.py", *args))
        assert np.abs(there - here).mean() < 0.1


def test_explore(both, picture, tmp_path):
    picture.save(tmp_path / "a.png")
    for args in ((tmp_path / "a.png", "car", "sky"), ("--generate", "a car with snow", "snow")):
        there, here = (read_page(path)["variants"][0] for path in both("mps", "x.html", "explore.py", *args))
        for name, stored in here.items():
            if isinstance(stored, dict):                                     # maps, quantised
                torch.testing.assert_close(values(there[name]), values(stored), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("kind, task, options", [
    ("cuda", "unsup", ()), ("mps", "ovss", ()), ("cuda", "readings", ()), ("mps", "unsup", ("--regions", "i2i")),
    ("cuda", "unsup", ("--protocol", "corner")), ("cuda", "ovss", ("--control", "block"))])
def test_evaluate(both, monkeypatch, kind, task, options):
    monkeypatch.setattr(readings, "refine", partial(readings.refine, rounds=1))
    results = [json.loads((path / "results.json").read_text())
               for path in both(kind, task, "evaluate.py", "--task", task, "--limit", 1, *options)]
    assert results[0]["identity"]["model"][-1] == kind
    for row, scores in results[1]["rows"].items():
        for name in set(scores) - {"IoU"}:               # mIoU, boundary IoU, the number of regions, ...
            assert results[0]["rows"][row][name] == pytest.approx(scores[name], abs=0.1)


def test_train_magnet(both, command, tmp_path, small_file, monkeypatch):
    """Two steps, saved after each; then the run is gone on with, and measured."""
    monkeypatch.setattr("support.report.plot_losses", lambda log, path: None)
    args = ["train_magnet.py", "--steps", 2, "--warmup", 1, "--batch", 2, "--accumulate", 1, "--limit", 4,
            "--val", "none", "--save-every", 1]
    there, here = (load_file(path / "lora.safetensors") for path in both("cuda", "m", *args))
    for key, matrix in here.items():
        torch.testing.assert_close(there[key], matrix, rtol=1e-3, atol=1e-5)
    with pretend("cuda") as card:
        options = ["--model", small_file, "--dtype", "float32"]
        code, out, err = command(*args, *options, "--device", "auto", "--out", tmp_path / "there/m")
        assert code == 0 and "0 steps" in out, err
        code, out, err = command("train_magnet.py", *options, "--val-limit", 1, "--measure",
                                 tmp_path / "there/m/lora.safetensors")
        assert code == 0 and "change" in out, err
    assert not card.refused


def test_old_cards_do_not_train_in_float16(command, small_file):
    with pretend("cuda", (7, 5)):
        code, _, err = command("train_magnet.py", "--model", small_file, "--steps", 1)
        assert code == 2 and "--dtype float32" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures(near, loaded, tmp_path, monkeypatch, name):
    """Made of the CPU's numbers; matplotlib's part of it is test_analysis's."""
    monkeypatch.setattr(analysis, "CAPTION_DRAWS", 1)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    monkeypatch.setattr(analysis, "bootstrap", partial(analysis.bootstrap, draws=5))
    monkeypatch.setattr(figures, "picture_rows", lambda path, *args, **kwargs: look_at(path, *args))
    inputs = {"prompts": ["a red car"], "limit": 1, "judge": None, "reading": "paper", "base": near,
              "data": DATASETS["scenes-dev"]()}
    needed = {key: inputs[key] for key in figures.NEEDS[name]}
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    here = figures.FIGURES[name](near, out=tmp_path / "here", **needed)
    card, far = loaded["cuda"]
    with pretend("cuda", card=card):
        there = figures.FIGURES[name](far, out=tmp_path / "there", **needed)
    assert numbers(there) == pytest.approx(numbers(here), rel=1e-2, abs=1e-2)
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("*.[np]*")]         # .npz, .png
    drawn = {file: images_in(tmp_path / "here" / file) for file in files}
    for file, images in drawn.items():
        for image, other in zip(images, images_in(tmp_path / "there" / file), strict=True):
            assert np.abs(image - other).mean() < 0.02 * max(1e-3, np.abs(image).max())
    assert numbers(here) or any(drawn.values())          # something was compared
    assert card.crossings and not card.refused


def look_at(path, title, labels, rows, *args):
    """As matplotlib would, which cannot draw what is on a device; kept to be compared."""
    np.savez(path.with_suffix(".npz"), *[np.asarray(picture, float) for row in rows for picture in row])


def images_in(path):
    """What a figure's file shows; what matplotlib would have made is empty here."""
    if path.stat().st_size == 0:
        return []
    if path.suffix == ".npz":
        return list(np.load(path).values())
    return [np.asarray(Image.open(path), float)]


def numbers(value):
    """Those in nested dicts and lists."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [value] if isinstance(value, float) else []
    found = []
    for x in value:
        found += numbers(x)
    return found


def test_bench(command, small_file):
    with pretend("cuda") as card:
        code, out, err = command("tools/bench.py", "--model", small_file, "--repeats", 1, "--device", "auto")
        assert code == 0 and "cuda:0" in out, err
    assert not card.refused and [c for c in card.crossings if c.kind == "wait" and "seconds" in c.functions]


def test_tools_of_readings(command, small_file, tmp_path, monkeypatch):
    """They take q, k and v home, so what follows is test_reading_tools'; here it is cut short."""
    monkeypatch.setattr(readings, "refine", lambda maps, colours, reach, rounds=1: maps)
    monkeypatch.setattr(readings, "merge_nearest", lambda p, threshold: [[0], [1]])
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    for script, limit in (("ablate_readings", 1), ("why_readings", 3)):
        with pretend("cuda") as card:
            code, _, err = command(f"tools/{script}.py", "--model", small_file, "--limit", limit, "--out", tmp_path)
        assert code == 0 and card.crossings and not card.refused, err


def test_pretraining(command, tmp_path, monkeypatch):
    """On pictures of 32 pixels, drawn before: VAE, MM-DiT and the choice of presets.  A step of the VAE is a second."""
    run = tmp_path / "run"
    run.mkdir()
    drawn = [scenes.draw(seed, 32) for seed in range(32)]
    np.save(run / "images.npy", np.stack([scene.image for scene in drawn]))
    (run / "facts.json").write_text(json.dumps([(scene.stuff, scene.things) for scene in drawn]))
    monkeypatch.setitem(DATASETS, "scenes-dev", partial(toy_scenes, name="scenes-dev", seeds=range(5000, 5001)))
    monkeypatch.setattr(scenes, "VAL_SEEDS", range(1))
    monkeypatch.setattr(scenes, "SIDE", 32)
    monkeypatch.setattr(train_vae, "time", Namespace(time=partial(next, count())))
    with pretend("cuda") as card:
        code, _, err = command("nano/pretrain.py", "--device", "cuda", "--run", run, "--scenes", 32,
                               "--minutes-vae", 0.001, "--batch-vae", 1, "--samples", 2, "--batch", 2,
                               "--width", 64, "--depth", 2, "--vae-widths", 4, 8, 8, 8)
    assert code == 0 and not card.refused, err

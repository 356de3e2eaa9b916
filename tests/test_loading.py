"""A model out of a file: what it is, what its header brings, and every kind of file that is none or does not fit."""
import json
import math

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loading
import seg4diff
from nano import scenes


def test_sigmas_end_points():
    for steps in (1, 2, 28):
        s = loading.sigmas(steps, 3.0)
        assert len(s) == steps + 1 and s[0] == 1 and s[-1] == 0 and (s.diff() < 0).all()


def test_image_seed():
    """The same in every process, or no run could be repeated; Python's own hash() is not."""
    assert loading.image_seed("2007_000033", 0) == 878262805
    names = [str(i) for i in range(500)]
    assert len({loading.image_seed(name, seed) for name in names for seed in range(3)}) == 1500
    assert loading.image_seed("12", 3) != loading.image_seed("2", 31)


def test_load(tiny, tiny_file):
    assert seg4diff.load is loading.load
    assert (tiny.name, tiny.device.type, tiny.dtype) == ("tiny", "cpu", torch.float32)
    assert tiny.preset == loading.Preset(block=1, size=128, cfg=3.0, batch=16)
    assert abs(tiny.preset.sigma - 0.5150721) < 1e-6
    assert tiny.transformer.config.head_dim == 32 and tiny.transformer.config.heads == 2
    assert loading.Preset() == loading.Preset(block=9, size=1024, steps=28, shift=3.0, noise_steps=8, cfg=7.5)
    half = seg4diff.load(str(tiny_file), device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    seg = seg4diff.segment(half, Image.new("RGB", (40, 30)), ["car", "sky"])
    assert seg.maps.isfinite().all() and seg.labels.shape == (30, 40)


def test_segment_only(tiny, tiny_file):
    """Without the blocks after the expert: the same labels; nothing that needs those blocks."""
    picture = Image.fromarray(scenes.draw(0).image)
    part = seg4diff.load(tiny_file, device="cpu", segment_only=True)
    assert len(part.transformer.joint_blocks) == 2 < len(tiny.transformer.joint_blocks)
    for options in ({}, {"block": 0}):
        seg, whole = (seg4diff.segment(m, picture, ["car", "sky"], **options) for m in (part, tiny))
        torch.testing.assert_close(seg.maps, whole.maps)
    for fails in (lambda: seg4diff.segment(part, picture, ["car"], block=2), lambda: seg4diff.generate(part, "car")):
        with pytest.raises(ValueError, match="0 to 1"):
            fails()


def test_name_of_a_folder(tiny_file, tmp_path):
    (tmp_path / "sd3.5-medium").mkdir()
    (tmp_path / "sd3.5-medium" / "model.safetensors").write_bytes(tiny_file.read_bytes())
    assert seg4diff.load(tmp_path / "sd3.5-medium", device="cpu").name == "sd3.5-medium"


@pytest.mark.parametrize("options, sentence", [
    ({"dtype": "float64"}, "dtype must be"), ({"dtype": "nn"}, "dtype must be"),
    ({"dtype": torch.int32}, "dtype must be"), ({"device": "gpu"}, "cpu or cuda")])
def test_options_that_are_none(tiny_file, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        seg4diff.load(tiny_file, **options)


# ---------------------------------------------------------------------------- changed files


@pytest.fixture(scope="module")
def contents(tiny_file):
    with safe_open(tiny_file, framework="pt") as f:
        return load_file(tiny_file), f.metadata()


@pytest.fixture
def save(contents, tmp_path):
    """save(drop=..., add=..., presets=...) -> a file of the tiny model without the tensors whose names begin with
    `drop`, with those of `add`, and with another header."""
    tensors, header = contents

    def changed(drop: str | None = None, add: dict | None = None, **meta: str | None):
        kept = {name: tensor for name, tensor in tensors.items() if drop is None or not name.startswith(drop)}
        header_kept = {key: value for key, value in (header | meta).items() if value is not None}
        save_file(kept | (add or {}), tmp_path / "changed.safetensors", header_kept)
        return tmp_path / "changed.safetensors"
    return changed


def refused(path, sentence: str) -> None:
    """In one sentence, whether all blocks are read or not."""
    for segment_only in (False, True):
        with pytest.raises(ValueError, match=sentence) as error:
            seg4diff.load(path, device="cpu", segment_only=segment_only)
        assert "\n" not in str(error.value)


def test_presets_travel_in_the_header(save):
    model = seg4diff.load(save(presets='{"block": 2, "size": 64, "noise_steps": 14}'), device="cpu")
    assert model.preset == loading.Preset(block=2, size=64, noise_steps=14) and model.preset.sigma > 0.7
    assert seg4diff.segment(model, Image.new("RGB", (9, 9)), ["car"]).maps.shape == (1, 8, 8)


DIT = "model.diffusion_model."
QKV = f"{DIT}joint_blocks.1.x_block.attn.qkv.weight"


@pytest.mark.parametrize("drop, sentence", [
    ("first_stage_model.", "first_stage_model"), ("first_stage_model.encoder.", "encoder.down.0.block.0.conv1"),
    ("text_encoders.clip_l.", "clip_l"),
    ("text_encoders.clip_g.", "clip_g"), ("text_encoders.clip_g.transformer.text_projection", "CLIP-G"),
    (DIT, f"no tensor under '{DIT}', so it is no SD3 model file"), (QKV, "1 missing: joint_blocks.1.x_block.attn.qkv"),
    (f"{DIT}joint_blocks.1.x_block.mlp.fc1", "2 missing: joint_blocks.1.x_block.mlp.fc1.bias")])
def test_incomplete_files(save, drop, sentence):
    refused(save(drop), sentence)


def test_other_tensors(save, contents):
    refused(save(add={f"{QKV}s": torch.zeros(2)}), "1 surplus: joint_blocks.1.x_block.attn.qkv.weights")
    refused(save(add={QKV: contents[0][QKV][1:]}), "1 misshapen: joint_blocks.1.x_block.attn.qkv.weight")
    far = {f"{DIT}joint_blocks.1000000000.x_block.attn.qkv.weight": torch.zeros(2)}          # no billion is built
    with pytest.raises(ValueError, match="joint_blocks.1000000000 is there, but most"):
        seg4diff.load(save(add=far), device="cpu")


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("meta, sentence", [
    ({"presets": '{"sise": 128}'}, r"unknown presets \['sise'\]"), ({"presets": "3"}, "presets should be an object"),
    ({"presets": "{"}, "presets .*Expecting"), ({"presets": DEEP}, "presets .*nested too deep"),
    ({"merges": None}, "merges.txt is not in the cache"), ({"merges": "["}, "merges .*Expecting"),
    ({"merges": DEEP}, "merges .*nested too deep"), ({"merges": '{"a b": 1}'}, "merges must be a list"),
    ({"merges": "[1]"}, "merges must be a list"), ({"merges": '["abc"]'}, "merges must be a list"),
    ({"merges": '["xx yy"]'}, "no earlier merge"), ({"merges": '["ca t", "c a"]'}, "no earlier merge makes: 'ca t'"),
    ({"merges": '["c a", "c a"]'}, "second time: 'c a'"), ({"merges": '["c a"]'}, "tokens in the tokenizer")])
def test_headers_that_do_not_fit(save, meta, sentence):
    refused(save(**meta), sentence)


PRESETS = {"block": ["5", 1.0, True, None, -1, [1]], "size": ["128", 128.0, 0, -128, 10**12],
           "steps": ["x", 0, -1, 10**12, 28.0, True], "shift": ["a", 0, -3, math.nan, 1e300],
           "noise_steps": [99, -3, 1.5, "8", 29], "cfg": ["x", math.inf, -math.inf, math.nan, [3], True],
           "batch": [0, "x", -1, 10**9, 1.5], "threshold": [-1, 0, "x", math.nan, None], "scaling": ["zzz", 3, None],
           "level": [True, 1.5, -0.1, "x"], "guidance": [True, -1, "x", math.nan], "unit_pictures": ["no", 1, None]}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_that_cannot_be(save, contents, name):
    """A file's header says so in a sentence that names the file, and a Preset made by hand says the same."""
    usual = json.loads(contents[1]["presets"])
    for value in PRESETS[name]:
        refused(save(presets=json.dumps(usual | {name: value})), f"changed.safetensors' .*: {name} must be")
        with pytest.raises(ValueError, match=f"{name} must be"):
            loading.Preset(**usual | {name: value})


def test_every_number_of_a_preset_has_its_limits():
    others = {"scaling", "schedule", "unit_pictures"}
    assert loading.LIMITS.keys() == loading.Preset.__dataclass_fields__.keys() - others
    for name, (_, least, largest) in loading.LIMITS.items():
        for value in (least, largest):
            loading.Preset(**{"steps": 1000, name: value} | ({"noise_steps": 0} if name == "steps" else {}))


def test_changed_presets():
    preset = loading.Preset(block=1)
    assert preset.changed() == preset.changed(block=None) == preset
    assert preset.changed(steps=12, block=0) == loading.Preset(block=0, steps=12)
    with pytest.raises(ValueError, match="noise_steps must be at most steps, which are 4, not 8"):
        preset.changed(steps=4)


def test_parts_of_different_models(save, contents):
    """What would fail only when the model is used."""
    tensors, header = contents
    presets = json.loads(header["presets"])
    embeddings = "text_encoders.clip_g.transformer.text_model.embeddings."
    heads = {key: w[:-1].clone() for key, w in tensors.items() if ".ln_q." in key or ".ln_k." in key}
    time = f"{DIT}t_embedder.mlp.0.weight"
    for part in ("token", "position"):
        key = f"{embeddings}{part}_embedding.weight"
        refused(save(add={key: tensors[key][:-1].clone()}), f"1 {part}s of CLIP-L that CLIP-G lacks, not 0")
    refused(save(add=heads), "columns beyond whole heads, not 0")
    refused(save(add={time: tensors[time][:, :-1].clone()}), "1 columns of the time beyond pairs, not 0")
    refused(save(presets=json.dumps(presets | {"guidance": 3.0})), "guidance strength, which its transformer does not")


def test_an_expert_beyond_the_last_block(save, contents):
    presets = json.loads(contents[1]["presets"]) | {"block": 3}
    refused(save(presets=json.dumps(presets)), "3 blocks up to the preset's block, not 4")


def test_a_mistake_of_ours_is_none_of_the_file(tiny_file, monkeypatch):
    """It surfaces, and is not told as a fault of the file that was being read."""
    for module, name in ((loading.Preset, "from_header"), (loading, "clip_tokenizer"), (loading.weights, "header")):
        with monkeypatch.context() as m:
            m.setattr(module, name, lambda *args: None.nothing)
            with pytest.raises(AttributeError):
                seg4diff.load(tiny_file)


@pytest.mark.parametrize("size, sentence", [
    (1024, "104 patches of a side beyond"), (100, "pixels beyond whole patches")])
def test_sizes_that_do_not_fit(save, contents, size, sentence):
    """The VAE makes a side 8 times smaller; the transformer has positions for 24 x 24 patches."""
    presets = json.loads(contents[1]["presets"]) | {"size": size}
    refused(save(presets=json.dumps(presets)), sentence)


@pytest.mark.parametrize("name, sentence", [
    ("none", "known names are nano"), ("none.safetensors", "known names are nano"),
    ("cut.safetensors", "cannot be read"), ("words.safetensors", "cannot be read"), ("photo.png", "cannot be read"),
    ("empty", "0 model files"), ("lora.safetensors", "looks like a LoRA")])
def test_what_is_no_model(tiny_file, tmp_path, monkeypatch, name, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.safetensors").write_bytes(tiny_file.read_bytes()[:-1000])
    (tmp_path / "words.safetensors").write_text("not a model")
    Image.new("RGB", (9, 9)).save("photo.png")
    save_file({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 4)}, "lora.safetensors")
    refused(name, sentence)

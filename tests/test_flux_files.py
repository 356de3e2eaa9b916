"""Flux's text, presets and files, in each layout that they come in."""
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_golden import golden
from tokenizers import processors

import loading
import seg4diff
import vae
from flux import Flux
from nano import flux_model, scenes
from support import weights
from support.checkpoint import on_device
from t5 import T5, t5_tokenizer
from text import T5_MARKS, FluxText, split_classes, tokenize

GOLDEN = Path(__file__).parent / "golden/diffusers/flux_transformer"


# ---------------------------------------------------------------------------- text


def test_words_and_spans():
    """A plain prompt's words, or names that become one prompt: the same ids; columns of a name of two words."""
    tokenizer = flux_model.word_unigrams(scenes.words())
    read = partial(tokenize, tokenizer, T5_MARKS, 8)
    ids, pieces, spans = read(["red car", "teddy bear", "xy"])
    assert pieces == ["red", "car", "teddy", "bear", "", "x", "y", "<eos>"]
    assert spans == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert read("red car teddy bear xy")[0] == ids == tokenizer.encode("red car teddy bear xy").ids + [1]
    ids, pieces, spans = read(["red car teddy bear", "sky sand", "water night"])
    assert spans == [slice(0, 4), slice(4, 6), slice(6, 7)] and ids[-1] == 1     # cut: the end needs a column
    assert read("")[0] == [1] + 7 * [0] and read("Sky")[1][0] == "sky"


def test_the_end_that_a_published_tokenizer_adds_is_not_counted_twice():
    tokenizer = flux_model.word_unigrams(scenes.words())
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=12)
    published = t5_tokenizer(tokenizer.to_str())
    ids, _, spans = tokenize(published, T5_MARKS, 6, ["car", "sky"])
    assert ids[2:] == [1, 0, 0, 0] and spans == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("broken, says", [("{", "cannot be read"), ("{}", "cannot be read"), (
    json.dumps({"version": "1.0", "model": {"type": "Unigram", "vocab": [["a", 0.0]]}}), "should hold the tokens")])
def test_tokenizers_that_are_none(broken, says):
    with pytest.raises(ValueError, match=says):
        t5_tokenizer(broken)


def test_context_is_t5_and_pooled_is_clip(tiny_flux):
    text = tiny_flux.text
    cond = text.encode(["red car", ["teddy bear", "sky"]])
    assert cond.ctx.shape == (2, 24, 96) and cond.pooled.shape == (2, 64)
    ids = torch.tensor([text.tokenize("teddy bear sky")[0]])
    torch.testing.assert_close(cond.ctx[1:], text.t5xxl(ids))
    assert cond.tokens[1][:4] == ["teddy", "bear", "sky", "<eos>"] and cond.spans[1] == [slice(0, 2), slice(2, 3)]
    again = text.encode([["teddy bear", "sky"]])         # alone as in a batch
    torch.testing.assert_close(again.pooled[0], cond.pooled[1])


def test_names_fill_all_of_t5_but_its_end(tiny_flux):
    names = [*scenes.CLASSES] * 2                        # 34 tokens
    prompts = split_classes(tiny_flux.text, names)
    assert [name for prompt in prompts for name in prompt] == names and len(prompts) == 2
    assert [len(split_classes(tiny_flux.text, ["car"] * n)) for n in (23, 24)] == [1, 2]


# ---------------------------------------------------------------------------- presets


def test_noise_levels():
    """The published numbers: dev's at 50 steps with 4096, 1024 and 256 image tokens, and the released code's 16."""
    for tokens, level in ((4096, 0.3756090), (1024, 0.2634278), (256, 0.2389894), (16, 0.2316793)):
        levels = loading.flux_sigmas(50, loading.flux_shift(tokens))
        assert len(levels) == 51 and levels[0] == 1 and levels[-1] == 0
        assert abs(levels[42].item() - level) < 1e-6
    assert loading.flux_sigmas(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_presets():
    dev, schnell = loading.flux_preset(), loading.flux_preset(guidance=False)
    assert (dev.block, dev.size, dev.steps, dev.cfg, dev.text_length) == (12, 1024, 50, 1.0, 512)
    assert abs(dev.sigma - 0.3756090) < 1e-6 and schnell.sigma == dev.sigma
    assert (schnell.steps, schnell.shift, schnell.text_length) == (4, 1.0, 256)
    assert abs(loading.flux_preset(size=512).sigma - 0.2634278) < 1e-6
    assert (dev.latent_shift, dev.latent_scale) == (0.1159, 0.3611)


def test_the_latent_of_flux():
    weights_of_vae, g, _ = golden("vae")
    model = vae.VAE.from_state_dict(weights_of_vae, shift=vae.FLUX_SHIFT, scale=vae.FLUX_SCALE)
    with torch.no_grad():
        z = model.encode(g["in.x"])
        torch.testing.assert_close(z, (g["out.mean"] - 0.1159) * 0.3611, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.decode(z), g["out.decoded"], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- files


def parts(path) -> dict:
    """The tiny model's tensors, part by part, without prefixes."""
    return weights.read(weights.find(path))


def published(path, folder, guidance=False):
    """The tiny model as Flux is published: its own file without prefixes, the others and the tokenizers beside it."""
    tensors = parts(path)
    if guidance:
        for key, value in list(tensors["mmdit"].items()):
            if key.startswith("time_in."):
                tensors["mmdit"]["guidance_in" + key.removeprefix("time_in")] = value.clone()
    names = {"mmdit": "flux1-dev.safetensors", "vae": "ae.safetensors", "clip_l": "text_encoders/clip_l.safetensors",
             "t5xxl": "text_encoders/t5xxl_fp16.safetensors"}
    (folder / "text_encoders").mkdir(parents=True)
    (folder / "tokenizer_2").mkdir()
    for part, name in names.items():
        save_file(tensors[part], folder / name)
    meta = weights.header(weights.find(path))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *json.loads(meta["merges"])]))
    (folder / "tokenizer_2/tokenizer.json").write_text(meta["t5_tokenizer"])
    return folder / names["mmdit"]


def test_one_file(tiny_flux, tiny_flux_file):
    """In SD3's single-file layout, as nano-flux is kept: what the header says goes before Flux's presets."""
    assert isinstance(tiny_flux.transformer, Flux) and isinstance(tiny_flux.text, FluxText)
    assert tiny_flux.transformer.config.depth == 4 and not tiny_flux.transformer.config.guidance
    assert (tiny_flux.preset.size, tiny_flux.preset.schedule, tiny_flux.text.length) == (scenes.SIDE, "sd3", 24)
    assert tiny_flux.vae.scale == vae.SCALE and tiny_flux.grid == 16
    assert all(key.startswith(tuple(weights.PREFIXES.values())) for key in load_file(tiny_flux_file))


@pytest.fixture
def shallow(monkeypatch):
    """Flux's presets for a model that has no block 12."""
    real = loading.flux_preset
    monkeypatch.setattr(loading, "flux_preset", lambda guidance: replace(real(guidance), block=2))


@pytest.mark.parametrize("guidance", [True, False])
def test_published_files(tiny_flux, tiny_flux_file, tmp_path, shallow, guidance):
    """Found beside the file or in the folder; the presets are dev's or schnell's, and so is the latent's scale."""
    path = published(tiny_flux_file, tmp_path / "model", guidance)
    for where in (path, path.parent):
        model = loading.load(where, "cpu", segment_only=True)
        assert model.preset == loading.flux_preset(guidance) and model.vae.scale == vae.FLUX_SCALE
        assert model.text.length == (512 if guidance else 256)
    whole = loading.load(path, "cpu", text_length=77)
    assert whole.text.length == 77
    for key, value in tiny_flux.transformer.state_dict().items():
        assert torch.equal(whole.transformer.state_dict()[key], value)
    ids = torch.tensor([[3, 4, 1]])
    assert torch.equal(model.text.t5xxl(ids), tiny_flux.text.t5xxl(ids))


def test_sd3_with_t5(tiny_file, tiny, tmp_path):
    """For generation: T5's rows in place of the zeros, as many; what does not fit is named."""
    ctx_dim = tiny.transformer.config.ctx_dim
    torch.manual_seed(0)
    words = flux_model.word_unigrams(scenes.words())
    tower = T5(words.get_vocab_size(), ctx_dim, 64, 2, 96, 1, 32)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_file({key: value.detach() for key, value in tower.state_dict().items()}, tmp_path / "t5xxl.safetensors")
    with pytest.raises(ValueError, match="tokenizer.json should lie beside"):
        loading.load(tiny_file, "cpu", t5=tmp_path / "t5xxl.safetensors")
    (tmp_path / "tokenizer.json").write_text(words.to_str())
    model = loading.load(tiny_file, "cpu", t5=tmp_path / "t5xxl.safetensors")
    L = model.text.length
    with torch.no_grad():
        ours, plain = (m.text.encode(["red car", ""]) for m in (model, tiny))
        ids = [words.encode("red car").ids + [1] + (L - 3) * [0], [1] + (L - 1) * [0]]
        torch.testing.assert_close(ours.ctx[:, L:], model.text.t5xxl(torch.tensor(ids)))
    assert torch.equal(ours.ctx[:, :L], plain.ctx[:, :L]) and not plain.ctx[:, L:].any()
    pictures = [np.array(seg4diff.generate(m, "red car", steps=1)[0], int) for m in (model, tiny)]
    assert np.abs(pictures[0] - pictures[1]).max() > 0
    with pytest.raises(ValueError, match="is no encoder of T5"):
        loading.load(tiny_file, "cpu", t5=tiny_file)
    few = {key: value.detach() for key, value in tower.state_dict().items()}
    few["shared.weight"] = few["shared.weight"][:-2].clone()
    save_file(few, tmp_path / "t5xxl.safetensors")
    with pytest.raises(ValueError, match="2 tokens of T5 beyond its weights, not 0"):
        loading.load(tiny_file, "cpu", t5=tmp_path / "t5xxl.safetensors")


def test_what_is_missing_beside_the_file_is_named(tiny_flux_file, tmp_path):
    path = published(tiny_flux_file, tmp_path / "model")
    for file in ("tokenizer_2/tokenizer.json", "text_encoders/t5xxl_fp16.safetensors", "ae.safetensors"):
        (path.parent / file).unlink()
        with pytest.raises(ValueError, match=file.split("/")[0].split(".")[0].replace("encoders", "encoder_2")):
            loading.load(path, "cpu")


def test_another_tokenizer_of_t5_is_another_model(tiny_flux_file, tmp_path):
    path = published(tiny_flux_file, tmp_path)
    usual = weights.fingerprint(weights.find(path))
    (tmp_path / "tokenizer_2/tokenizer.json").write_text("{}")
    assert weights.fingerprint(weights.find(path)) != usual


def diffusers_folder(path, folder, shards=2):
    """The golden transformer in diffusers' own keys, in shards; the other parts in their folders."""
    tensors = parts(path)
    sd = load_file(GOLDEN / "diffusion_pytorch_model.safetensors")
    keys = sorted(sd)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        (folder / name).mkdir(parents=True)
    index = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({key: sd[key].float() for key in keys[i::shards]}, folder / "transformer" / file)
        index |= dict.fromkeys(keys[i::shards], file)
    file = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    for part, name in (("vae", "vae"), ("clip_l", "text_encoder"), ("t5xxl", "text_encoder_2")):
        save_file(tensors[part], folder / name / "model.safetensors")
    return folder


def test_diffusers_folder_in_shards(tiny_flux_file, tmp_path):
    folder = diffusers_folder(tiny_flux_file, tmp_path / "model")
    original, _, _ = golden("flux_dev")
    files = weights.Files(weights.parts_of_folder(folder), None)
    assert list(files.parts) == ["mmdit", "vae", "clip_l", "t5xxl"]
    sd = weights.read(files, dtype=torch.float32)["mmdit"]
    assert sd.keys() == original.keys() and all(torch.equal(sd[key], original[key]) for key in sd)


@pytest.mark.parametrize("last, singles", [(0, 0), (1, 0), (2, 1)])
def test_blocks_after_the_expert_stay_on_the_disk(tiny_flux, tiny_flux_file, tmp_path, last, singles):
    """In both layouts; what is left of a Flux segments, and says that it cannot generate."""
    folder = diffusers_folder(tiny_flux_file, tmp_path / "model")
    for files in (weights.find(tiny_flux_file), weights.Files(weights.parts_of_folder(folder), None)):
        part = Flux.from_state_dict(weights.read(files, last, dtype=torch.float32)["mmdit"])
        assert (part.config.double_blocks, part.config.single_blocks) == (min(last + 1, 2), singles)
        assert not part.config.whole
    assert weights.block_of("single_blocks.3.linear1.weight", 19) == 22
    assert weights.block_of("single_transformer_blocks.0.attn.to_q.weight", 19) == 19
    assert weights.block_of("double_blocks.3.img_mod.lin.bias") == weights.block_of("transformer_blocks.3.x") == 3
    assert weights.block_of("img_in.weight") == -1


def test_t5_in_eight_bits(tiny_flux, tiny_flux_file, tmp_path, shallow):
    path = published(tiny_flux_file, tmp_path / "model")
    folder = path.parent / "text_encoders"
    sd = load_file(folder / "t5xxl_fp16.safetensors")
    (folder / "t5xxl_fp16.safetensors").unlink()
    small = {key: value.to(torch.float8_e4m3fn) for key, value in sd.items()}
    save_file(small, folder / "t5xxl_fp8_e4m3fn.safetensors")
    model = loading.load(path, "cpu", segment_only=True)
    ids = torch.tensor([[3, 4, 1, 0]])
    ours, full = model.text.t5xxl(ids), tiny_flux.text.t5xxl(ids)
    assert ours.dtype == torch.float32 and 0 < (ours - full).norm() < 0.2 * full.norm()


def test_the_released_way(tiny_flux, tiny_flux_file, tmp_path, shallow, monkeypatch):
    """`--model flux-released`: dev's files with the released code's noise level, pictures from 0 to 1 and 77 rows."""
    path = published(tiny_flux_file, tmp_path / "model", guidance=True)
    monkeypatch.setattr(weights, "hub", lambda repo, file: path)
    model = loading.load("flux-released", "cpu", segment_only=True)
    assert abs(model.preset.sigma - 0.2316793) < 1e-6 and model.text.length == 77
    model.preset = replace(model.preset, size=128)
    usual = vae.VAE.from_state_dict(model.vae.state_dict(), shift=vae.FLUX_SHIFT, scale=vae.FLUX_SCALE)
    pixels = scenes.draw(3).image                        # of one colour, rounding would be all that norms leave
    z = seg4diff.encode_image(model, Image.fromarray(pixels))                # (1, 16, 16, 16)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255                # (1, 3, 128, 128)
    torch.testing.assert_close(z, usual.encode(x), atol=1e-5, rtol=0)
    assert (usual.encode(2 * x - 1) - z).abs().max() > 0.01


def test_what_does_not_fit_waits_in_host_memory(tiny_flux, tiny_flux_file, monkeypatch, capsys):
    """None, T5 or both, by what is free; a block that waits is copied for its turn, and nothing else changes."""
    files = weights.find(tiny_flux_file)
    sizes = weights.sizes(files)
    assert sizes == {part: sum(w.numel() for w in sd.values()) for part, sd in weights.read(files).items()}
    assert weights.sizes(files, 2)["mmdit"] < sizes["mmdit"]
    small = sum(sizes.values()) - sizes["mmdit"] - sizes["t5xxl"]
    z = torch.randn(1, 16, 8, 8)
    results = []
    for room, waiting in ((sum(sizes.values()), ""), (small + sizes["mmdit"], "t5xxl "), (small, "t5xxl and mmdit")):
        monkeypatch.setattr(loading, "free_memory", lambda device, room=room: 4 * room + loading.WORK)
        model = loading.load(tiny_flux_file, "cpu")
        said = f"blocks of {waiting.strip()} wait in host memory and come to cpu one by one\n" if waiting else ""
        assert capsys.readouterr().err == said
        cond = model.text.encode(["red car"])
        results.append(model.transformer(z, torch.tensor([0.5]), cond.ctx, cond.pooled)[0])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert loading.what_waits({"mmdit": 10 ** 12, "clip_g": 1}, torch.bfloat16, 0) == ()
    dev = {"mmdit": 11_901_408_320, "vae": 83_819_683, "clip_l": 123_060_480, "t5xxl": 4_762_310_656}
    assert loading.what_waits(dev, torch.bfloat16, 24e9) == ("t5xxl", "mmdit")
    assert loading.what_waits(dev, torch.bfloat16, 48e9) == ()
    sd = weights.read(files, device="meta", waiting=("t5xxl", "mmdit"))
    waits = {key for part in ("t5xxl", "mmdit") for key, w in sd[part].items() if w.device.type == "cpu"}
    assert len(waits) > 40 and all(key.startswith(("encoder.block.", "double_", "single_")) for key in waits)

    block = tiny_flux.transformer.double_blocks[0]
    assert on_device(block, torch.device("cpu")) is block
    twin = on_device(block, torch.device("meta"))
    assert {p.device.type for p in twin.parameters()} == {"meta"} and block.img_mod.lin.weight.device.type == "cpu"
    assert twin.state_dict().keys() == block.state_dict().keys()


def test_t5_reads_a_prompt_once(tiny_flux, monkeypatch):
    """The memory of prompts is SD3's (test_device)."""
    text = tiny_flux.text
    monkeypatch.setattr(text, "cache", {})
    monkeypatch.setattr("text.CACHE_SIZE", 2)
    asked = []
    real = text.t5xxl.forward
    monkeypatch.setattr(text.t5xxl, "forward", lambda ids: asked.append(len(ids)) or real(ids))
    with torch.inference_mode():
        for prompts in (["red car", "sky"], ["sand"], ["red car", "sky"]):
            text.encode(prompts)
        assert asked == [2, 1]
        text.encode(["tree"])                            # the third: the memory is full
        text.encode(["sand"])
    assert asked == [2, 1, 1, 1]
    text.encode(["sand"])                                # in training: always
    assert asked == [2, 1, 1, 1, 1]


def test_parts_that_do_not_fit(tiny_flux, tiny_flux_file, tmp_path):
    header = weights.header(weights.find(tiny_flux_file))
    sd = load_file(tiny_flux_file)
    key = weights.PREFIXES["mmdit"] + "txt_in.weight"
    presets = json.dumps(json.loads(header["presets"]) | {"size": 100})
    for change, meta, says in (
            ({key: sd[key][:, :80].contiguous()}, {}, "96 columns of T5, not 80"),
            ({}, {"presets": presets}, "4 pixels beyond whole patches"),
            ({}, {"t5_tokenizer": flux_model.word_unigrams([*scenes.words(), "zebra"]).to_str()}, "1 tokens of T5")):
        save_file(sd | change, tmp_path / "other.safetensors", header | meta)
        with pytest.raises(ValueError, match=says):
            loading.load(tmp_path / "other.safetensors", "cpu")


def test_guidance_that_a_model_reads(tiny_flux, tiny_flux_file, tmp_path, shallow):
    """dev's strength is an option of generation; a model that reads none says so."""
    model = loading.load(published(tiny_flux_file, tmp_path / "model", guidance=True), "cpu")
    model.preset = replace(model.preset, size=64)
    pictures = [np.array(seg4diff.generate(model.guided(g), "red car", steps=1)[0], int) for g in (None, 3.5, 1.0)]
    assert np.array_equal(pictures[0], pictures[1]) and np.abs(pictures[0] - pictures[2]).max() > 0
    assert tiny_flux.guided(None) == tiny_flux
    with pytest.raises(ValueError, match="tiny_flux reads no guidance strength"):
        tiny_flux.guided(2.0)
    for wrong in ({"guidance": -1.0}, {"level": 1.5}, {"schedule": "linear"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(tiny_flux.preset, **wrong)


def test_nano_flux_that_is_not_there(command, tmp_path, monkeypatch):
    monkeypatch.setitem(weights.EMBEDDED, "nano-flux", tmp_path / "nano-flux.safetensors")
    code, out, err = command("seg4diff.py", "generate", "sky", "--model", "nano-flux")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "nano-flux is not there: train it by `python nano/pretrain.py --arch flux --vae" in err

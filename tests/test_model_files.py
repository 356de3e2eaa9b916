"""Model files, presets and pictures: what no other test of theirs would notice if it changed."""
import copy
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_flux_files import parts, published, shallow  # noqa: F401 - some are fixtures
from test_loading import contents, refused, save  # noqa: F401 - some are fixtures
from tokenizers import processors

import loading
import seg4diff
import vae
from nano import flux_model, scenes
from support import weights
from t5 import T5, t5_tokenizer

DIT = "model.diffusion_model."


def published_tokenizer():
    tokenizer = flux_model.word_unigrams(scenes.words())
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(max_length=3)
    return t5_tokenizer(tokenizer.to_str())


def test_counting_with_a_published_tokenizer(tiny_flux, monkeypatch):
    monkeypatch.setattr(tiny_flux.text, "tokenizer", published_tokenizer())
    assert [tiny_flux.text.n_tokens(x) for x in ("car", "red car sky sand tree", "")] == [1, 5, 0]


def test_clip_of_a_flux_reads_all_it_can(tiny_flux):
    text = copy.copy(tiny_flux.text)
    n = text.clip_l.positions
    text.length = 8
    long = ["car"] * (n - 3)
    a, b = (text.encode_now([" ".join([*long, last])]).pooled for last in ("sky", "sand"))
    assert (a - b).abs().max() > 1e-3


def test_pictures_of_any_sides(tiny):
    for side in ((16, 20), (20, 16)):
        with pytest.raises(AssertionError, match="multiples of 8"):
            tiny.vae.encode(torch.zeros(1, 3, *side))
    assert tiny.vae.encode(torch.zeros(1, 3, 16, 24)).shape == (1, 16, 2, 3)


def test_pictures_of_any_mode():
    for mode in ("L", "RGBA", "P", "1"):
        assert loading.squash(Image.new(mode, (8, 4)), 6).pixels.shape == (6, 6, 3)


def test_pictures_are_squashed_bilinearly():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (240, 240, 240))
    assert loading.squash(image, 8).pixels[0, :, 0].tolist() == [0, 0, 30, 90, 150, 210, 240, 240]


def test_defaults_of_a_preset():
    assert loading.Preset() == loading.Preset(9, 1024, 28, 3.0, 8, 7.5, 1, 0.1, "token", 0.7, "sd3", None, 512, False,
                                              None, 0.0609, 1.5305)
    dev, schnell = loading.flux_preset(), loading.flux_preset(guidance=False)
    assert (dev.guidance, dev.schedule, dev.noise_steps, dev.batch, schnell.guidance) == (3.5, "flux", 8, 1, None)


def test_memory_that_is_free_is_not_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 2))
    assert loading.free_memory(torch.device("cuda")) == 1


def test_room_to_work_is_left():
    dev = {"mmdit": 11_901_408_320, "vae": 83_819_683, "clip_l": 123_060_480, "t5xxl": 4_762_310_656}
    assert loading.what_waits(dev, torch.bfloat16, 36e9) == ("t5xxl",)
    sd3 = {"mmdit": 2e9, "vae": 8e7, "clip_l": 1e8, "clip_g": 7e8, "t5xxl": 4.7e9}
    assert [loading.what_waits(sd3, torch.bfloat16, free) for free in (4e9, 12e9, 24e9)] == [("t5xxl",)] * 2 + [()]


def test_parts_that_disagree(save, contents):  # noqa: F811
    tensors, _ = contents
    other = vae.VAE((16, 24, 48, 64), 1, 1, 8)
    refused(save("first_stage_model.", {f"first_stage_model.{k}": v.detach().contiguous() for k, v in
                                        other.state_dict().items()}), "16 channels in the MM-DiT's latent, not 8")
    key = f"{DIT}y_embedder.mlp.0.weight"
    refused(save(add={key: tensors[key][:, :-1].contiguous()}), "columns of pooled text")
    key = f"{DIT}context_embedder.weight"
    refused(save(add={key: tensors[key][:, :150].contiguous()}), "42 text columns that do not fit the context")


def test_parts_of_a_flux_that_disagree(tiny_flux_file, tmp_path):
    header, sd = weights.header(weights.find(tiny_flux_file)), load_file(tiny_flux_file)
    key = f"{DIT}vector_in.in_layer.weight"
    merges = json.loads(header["merges"])
    for change, meta, says in (({key: sd[key][:, :-1].contiguous()}, {}, "64 columns of pooled text, not 63"),
                               ({}, {"merges": json.dumps(merges[:-1])}, "tokens in CLIP's tokenizer")):
        save_file(sd | change, tmp_path / "other.safetensors", header | meta)
        with pytest.raises(ValueError, match=says):
            loading.load(tmp_path / "other.safetensors", "cpu")


def test_t5_of_another_width(tiny_file, tmp_path):
    words = flux_model.word_unigrams(scenes.words())
    tower = T5(words.get_vocab_size(), 96, 64, 2, 96, 1, 32)
    save_file({k: torch.ones_like(v) for k, v in tower.state_dict().items()}, tmp_path / "t5xxl.safetensors")
    (tmp_path / "tokenizer.json").write_text(words.to_str())
    with pytest.raises(ValueError, match="96 columns of T5, not 256"):
        loading.load(tiny_file, "cpu", t5=tmp_path / "t5xxl.safetensors")


def test_t5_twice(tiny_flux_file):
    with pytest.raises(ValueError, match="reads T5 already"):
        loading.load(tiny_flux_file, "cpu", t5=tiny_flux_file)


def test_t5_in_a_file_of_sd3_is_left_out(save, tiny):  # noqa: F811
    path = save(add={"text_encoders.t5xxl.transformer.shared.weight": torch.ones(4, 4)})
    assert "t5xxl" not in weights.find(path).parts
    assert loading.load(path, "cpu").text.t5xxl is None


def test_the_exacter_t5_goes_first(tiny_flux_file, tmp_path):
    path = published(tiny_flux_file, tmp_path / "model")
    folder = path.parent / "text_encoders"
    (folder / "t5xxl_fp8_e4m3fn.safetensors").write_bytes((folder / "t5xxl_fp16.safetensors").read_bytes())
    assert weights.find(path).parts["t5xxl"][0] == [folder / "t5xxl_fp16.safetensors"]


def test_a_folder_of_fp16_alone(tmp_path, tiny_file):
    sd = load_file(tiny_file)
    for part, name in weights.FOLDERS.items():
        (tmp_path / name).mkdir()
        prefix = weights.PREFIXES[part]
        save_file({k.removeprefix(prefix): v for k, v in sd.items() if k.startswith(prefix)},
                  tmp_path / name / "model.fp16.safetensors")
    assert all(len(paths) == 1 for paths, _ in weights.parts_of_folder(tmp_path).values())


def test_a_model_without_its_last_block_is_incomplete(save):  # noqa: F811
    path = save(f"{DIT}joint_blocks.2.")
    with pytest.raises(ValueError, match="is incomplete: its block 1 is not a last block"):
        loading.load(path, "cpu")
    loading.load(path, "cpu", segment_only=True)


def test_stored_in_64_bits(tiny_file, tmp_path, tiny):
    with safe_open(tiny_file, framework="pt") as f:
        meta = f.metadata()
    save_file({k: v.double() for k, v in load_file(tiny_file).items()}, tmp_path / "m.safetensors", meta)
    model = seg4diff.load(tmp_path / "m.safetensors", "cpu")
    assert torch.equal(model.transformer.pos_embed, tiny.transformer.pos_embed)


def test_names_on_the_hub():
    assert weights.HUB == {
        "sd3": ("stabilityai/stable-diffusion-3-medium", "sd3_medium.safetensors"),
        "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", "sd3.5_medium.safetensors"),
        "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", "sd3.5_large.safetensors"),
        "flux": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"),
        "flux-released": ("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"),
        "flux-schnell": ("black-forest-labs/FLUX.1-schnell", "flux1-schnell.safetensors")}


@pytest.mark.parametrize("guidance, repo", [(True, "black-forest-labs/FLUX.1-dev"),
                                            (False, "black-forest-labs/FLUX.1-schnell")])
def test_what_a_flux_asks_the_hub_for(tiny_flux_file, tmp_path, monkeypatch, guidance, repo):
    path = published(tiny_flux_file, tmp_path / "there", guidance)
    (tmp_path / "alone").mkdir()
    alone = path.rename(tmp_path / "alone" / path.name)
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        names = {"text_encoder/model.safetensors": "text_encoders/clip_l.safetensors"}
        for shard in shards:
            names[shard] = "text_encoders/t5xxl_fp16.safetensors"
        return tmp_path / "there" / names.get(file, file)

    shards = [f"text_encoder_2/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    monkeypatch.setattr(weights, "hf_hub_download", download)
    weights.find(alone)
    assert set(asked) == {(repo, file) for file in ("ae.safetensors", "text_encoder/model.safetensors", *shards,
                                                    "tokenizer_2/tokenizer.json")} | {weights.TOKENIZER}


def test_fingerprint_of_model_and_lora(tmp_path):
    (tmp_path / "l").write_bytes(b"lora")
    assert weights.add_to_fingerprint("a", tmp_path / "l") != weights.add_to_fingerprint("b", tmp_path / "l")


def test_length_of_text_of_the_released_flux(tiny_flux_file, tmp_path, shallow, monkeypatch):  # noqa: F811
    """What is asked for goes before what the released code has."""
    path = published(tiny_flux_file, tmp_path / "model", guidance=True)
    monkeypatch.setattr(weights, "hub", lambda repo, file: path)
    assert loading.load("flux-released", "cpu", segment_only=True, text_length=20).text.length == 20

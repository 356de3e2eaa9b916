"""Where tensors come from: both layouts, files beside the model, the hub's refusals, no more read than needed."""
from pathlib import Path

import httpx2  # the hub's HTTP client, which comes with it
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import seg4diff
from loading import Preset
from support import weights

GOLDEN = Path(__file__).parent / "golden"


# ---------------------------------------------------------------------------- diffusers' keys


@pytest.mark.parametrize("part, folder, golden", [("mmdit", "transformer", "mmdit_sd35_medium"), ("vae", "vae", "vae")])
def test_diffusers_layout_becomes_the_original(part, folder, golden):
    """Bit for bit: fused q, k, v, the two swapped modulations, reversed decoder levels, 1x1 convolutions."""
    theirs = load_file(GOLDEN / "diffusers" / folder / "diffusion_pytorch_model.safetensors")
    stored = load_file(GOLDEN / f"{golden}.safetensors")
    original = {k.removeprefix("w."): v for k, v in stored.items() if k.startswith("w.")}
    ours = weights.from_diffusers(part, {k: v.float() for k, v in theirs.items()})
    assert ours.keys() == original.keys() and ours.keys() != theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], original[key].float()), key
    again = weights.from_diffusers(part, ours)
    assert all(again[key] is ours[key] for key in ours)        # the original layout passes through


def test_a_part_of_the_diffusers_layout(tmp_path):
    """Cut after block 1, its text modulation has six chunks and must not be swapped."""
    theirs = load_file(GOLDEN / "diffusers/transformer/diffusion_pytorch_model.safetensors")
    whole = weights.from_diffusers("mmdit", {k: v.float() for k, v in theirs.items()})
    part = weights.from_diffusers("mmdit", {k: v.float() for k, v in theirs.items() if weights.block_of(k) <= 1})
    assert part.keys() == {k for k in whole if weights.block_of(k) <= 1}
    assert all(torch.equal(part[k], whole[k]) for k in part)


# ---------------------------------------------------------------------------- files and folders


@pytest.fixture
def split(tiny_file, tmp_path):
    """The tiny model as published: transformer and VAE in one file, towers and merges beside it."""
    tensors = load_file(tiny_file)
    with safe_open(tiny_file, framework="pt") as f:
        meta = f.metadata()
    for part in ("clip_l", "clip_g"):
        prefix = weights.PREFIXES[part]
        path = tmp_path / weights.ENCODERS[part]
        path.parent.mkdir(exist_ok=True)
        save_file({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, path)
    save_file({k: v for k, v in tensors.items() if "text_encoders" not in k}, tmp_path / "model.safetensors",
              {"presets": meta["presets"]})
    (tmp_path / "tokenizer").mkdir()
    merges = weights.merges(weights.find(tiny_file))
    (tmp_path / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return tmp_path


def same(a: seg4diff.Seg4Diff, b: seg4diff.Seg4Diff) -> None:
    for x, y in ((a.transformer, b.transformer), (a.vae, b.vae), (a.text, b.text)):
        assert all(torch.equal(x.state_dict()[k], v) for k, v in y.state_dict().items())
    assert a.text.tokenizer.get_vocab() == b.text.tokenizer.get_vocab() and a.preset == b.preset


def test_towers_and_merges_beside_the_model(split, tiny):
    same(seg4diff.load(split / "model.safetensors", "cpu"), tiny)
    same(seg4diff.load(split, "cpu"), tiny)                     # the folder, in the original layout
    (split / "text_encoders/clip_l.safetensors").rename(split / "clip_l.safetensors")
    (split / "tokenizer/merges.txt").rename(split / "merges.txt")
    same(seg4diff.load(split, "cpu"), tiny)


def test_diffusers_folder(split, tiny, tmp_path_factory):
    """Its folders hold each part without prefix; keys of the original layout in them are taken as they are."""
    folder = tmp_path_factory.mktemp("snapshot")
    tensors = load_file(split / "model.safetensors")
    for part, name in weights.FOLDERS.items():
        (folder / name).mkdir()
        prefix = weights.PREFIXES[part]
        sd = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        sd = sd or load_file(split / weights.ENCODERS[part])
        keys = sorted(sd)
        half = len(sd) // 2                                     # two shards, and a twin in fp16 to be passed over
        save_file({k: sd[k] for k in keys[:half]}, folder / name / "model-00001-of-00002.safetensors",
                  {"presets": '{"size": 128, "block": 1}'})
        save_file({k: sd[k] for k in keys[half:]}, folder / name / "model-00002-of-00002.safetensors")
        save_file({k: 0 * sd[k] for k in keys}, folder / name / "model.fp16.safetensors")
    (split / "tokenizer").rename(folder / "tokenizer")
    model = seg4diff.load(folder, "cpu")
    assert torch.equal(model.transformer.pos_embed, tiny.transformer.pos_embed) and model.preset == Preset(1, 128)
    shard = folder / "transformer/model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors' cannot be read"):
        weights.read(weights.find(folder))
    shard.write_bytes(data)
    for f in (folder / "vae").iterdir():
        f.unlink()
    with pytest.raises(ValueError, match="vae/ holds no"):
        weights.find(folder)


def test_folder_with_two_models_or_none(split, tmp_path_factory):
    (split / "again.safetensors").write_bytes((split / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="again.safetensors, model.safetensors"):
        weights.find(split)
    with pytest.raises(ValueError, match="0 model files"):
        weights.find(tmp_path_factory.mktemp("empty"))


def test_lora_is_no_model(tmp_path):
    key = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    save_file({key: torch.zeros(2, 4)}, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="LoRA"):
        weights.find(tmp_path / "l.safetensors")


def test_vae_must_be_there(split):
    kept = {k: v for k, v in load_file(split / "model.safetensors").items() if not k.startswith("first_stage")}
    save_file(kept, split / "model.safetensors")
    with pytest.raises(ValueError, match="autoencoder is missing"):
        weights.find(split / "model.safetensors")


def test_misshapen_diffusers_keys():
    """q, k and v that cannot be stacked, and a number where a modulation should be."""
    theirs = load_file(GOLDEN / "diffusers/transformer/diffusion_pytorch_model.safetensors")
    key = "transformer_blocks.0.attn.to_q.weight"
    for wrong in (theirs[key][:, 1:], theirs[key][0], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"joint_blocks\.0\.x_block\.attn\.qkv\.weight' are misshapen"):
            weights.from_diffusers("mmdit", theirs | {key: wrong})
    scalar = {"norm_out.linear.weight": torch.tensor(1.0)}
    assert weights.from_diffusers("mmdit", theirs | scalar)["final_layer.adaLN_modulation.1.weight"].ndim == 0


@pytest.mark.parametrize("content", [b"\xff\xfe#version\nc a\n", b"#version\na c\nac\n", b"#version\nca t\nc a\n"])
def test_merges_that_are_none(split, content):
    """Not UTF-8, half a merge, the wrong order: the file is named."""
    path = split / "tokenizer/merges.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer/merges.txt' cannot be read"):
        seg4diff.load(split / "model.safetensors", "cpu")


def test_no_name_is_no_model(tiny_file, monkeypatch):
    """Path("") would be the folder that one is in, and the model in it."""
    monkeypatch.chdir(tiny_file.parent)
    assert weights.find(".").parts
    with pytest.raises(ValueError, match="no model ''"):
        weights.find("")


# ---------------------------------------------------------------------------- the hub


def refuse_with(error):
    def download(repo, file):
        raise error
    return download


@pytest.mark.parametrize("error, says", [
    (GatedRepoError.__new__(GatedRepoError),
     ["licence", "huggingface.co/stabilityai/stable-diffusion-3-medium", "hf auth login"]),
    (LocalEntryNotFoundError("no network"),
     ["not in the cache", "huggingface.co/stabilityai/stable-diffusion-3-medium"]),
    (ConnectionError("no route"), ["not in the cache", "--model"]),
    (httpx2.ProxyError("no proxy"), ["not in the cache", "--model"]),
    (httpx2.ReadError("cut off"), ["not in the cache", "--model"])])
def test_what_the_hub_refuses(monkeypatch, error, says):
    monkeypatch.setattr(weights, "hf_hub_download", refuse_with(error))
    with pytest.raises(ValueError) as raised:
        seg4diff.load("sd3", "cpu")
    assert all(x in str(raised.value) for x in ["sd3_medium.safetensors", *says])


def test_names_of_the_hub(monkeypatch, split):
    """Each name asks for its repository's file, that repository's towers and CLIP's merges, once each."""
    requests = []

    def download(repo, file):
        requests.append((repo, file))
        if file == "merges.txt":
            return str(split / "tokenizer/merges.txt")
        return str(split / file if "clip" in file else split / "model.safetensors")
    monkeypatch.setattr(weights, "hf_hub_download", download)
    (split / "tokenizer").rename(split / "elsewhere")
    (split / "text_encoders").rename(split / "towers")
    towers = {part: file.replace("text_encoders", "towers") for part, file in weights.ENCODERS.items()}
    monkeypatch.setattr(weights, "ENCODERS", towers)
    for part in weights.ENCODERS.values():                      # found on the hub, not beside the model
        (split / part).rename(split / Path(part).name.replace("clip", "hub_clip"))
    for name, (repo, file) in weights.HUB.items():
        requests.clear()
        weights.find(name)
        assert requests == [(repo, file), (repo, "towers/clip_l.safetensors"), (repo, "towers/clip_g.safetensors"),
                            weights.TOKENIZER]


def test_fingerprint(tiny_file, tiny, tmp_path):
    """Another for any changed byte of a file up to 64 MB, of a larger one for a stretch of them; not for a name."""
    def fingerprint(data: bytes) -> str:
        path = tmp_path / "m.safetensors"
        path.write_bytes(data)
        return weights.fingerprint(weights.Files({"mmdit": ([path], ""), "vae": ([path], "")}, None))
    data = tiny_file.read_bytes()
    usual = fingerprint(data)
    assert usual == tiny.fingerprint and len(usual) == 12
    for at in (0, 70_000, len(data) // 2, len(data) - 1):
        assert fingerprint(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]) != usual
    assert fingerprint(data + b"x") != usual
    large = bytearray(100 << 20)
    zeros = fingerprint(large)
    large[60_000_000:60_200_000] = bytes([1]) * 200_000
    assert fingerprint(large) != zeros


# ---------------------------------------------------------------------------- no more than needed


def test_only_the_blocks_that_segmentation_needs(tiny_file, tiny):
    files = weights.find(tiny_file)
    part = weights.read(files, last_block=1)["mmdit"]
    whole = weights.read(files)["mmdit"]
    assert set(whole) - set(part) == {k for k in whole if k.startswith("joint_blocks.2.")} != set()
    short = seg4diff.load(tiny_file, "cpu", segment_only=True)  # the preset's expert is block 1
    assert short.transformer.config.depth == tiny.preset.block + 1
    assert tiny.transformer.config.whole and not short.transformer.config.whole


def test_tensors_are_cast_while_they_are_read(tiny_file):
    parts = weights.read(weights.find(tiny_file), dtype=torch.bfloat16)
    assert {v.dtype for sd in parts.values() for v in sd.values()} == {torch.bfloat16}
    model = seg4diff.load(tiny_file, "cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


@pytest.fixture
def stored_as(tiny_file, tmp_path):
    """stored_as(dtype, key) -> a file of the tiny model in which this tensor, or all, are stored in another dtype."""
    with safe_open(tiny_file, framework="pt") as f:
        meta = f.metadata()

    def write(dtype: torch.dtype, key: str | None = None) -> Path:
        sd = {k: v.to(dtype) if key in (None, k) else v for k, v in load_file(tiny_file).items()}
        save_file(sd, tmp_path / "stored.safetensors", meta)
        return tmp_path / "stored.safetensors"
    return write


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize("key", ["model.diffusion_model.pos_embed", "first_stage_model.encoder.conv_in.weight"])
def test_what_holds_no_floats_is_no_weight(stored_as, dtype, key):
    with pytest.raises(ValueError, match=f"stored.safetensors' cannot be read .* '{key}' holds {dtype}"):
        seg4diff.load(stored_as(dtype, key), "cpu")


def test_eight_bits_are_cast_as_they_are(stored_as, tiny_file, tiny):
    """float8_e4m3fn is what small files of T5 are stored in: no scales, the values themselves."""
    model = seg4diff.load(stored_as(torch.float8_e4m3fn), "cpu")
    for part in ("transformer", "vae", "text"):
        want = getattr(tiny, part).state_dict()
        for key, value in getattr(model, part).state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, want[key].to(torch.float8_e4m3fn).float()), key


def test_merges_are_part_of_the_fingerprint(tmp_path):
    """Another merges.txt gives other tokens, so it is another model."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    files = weights.Files({"mmdit": ([tmp_path / "model.safetensors"], "")}, tmp_path / "merges.txt")
    prints = set()
    for merges in ("#version\na b", "#version\na c"):
        (tmp_path / "merges.txt").write_text(merges)
        prints.add(weights.fingerprint(files))
    assert len(prints) == 2

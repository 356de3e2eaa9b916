"""CLIP and DINO: parity with transformers, proof that it can fail, their files, and scores worked out by hand."""
import numpy as np
import pytest
import torch
from PIL import Image
from pretend import pretend
from safetensors.torch import load_file, save_file
from test_golden import differ, golden, one_of_each_kind, refused, same

import judges
from support import judge_files, weights
from text import byte_symbols

KINDS = {"judge_clip": judges.CLIP, "judge_dino": judges.DINO}


def read(name):
    """A golden's weights and tensors.  Its temperature is stored, as published, and judges do not use it."""
    w, g, _ = golden(name)
    return w, g


@torch.no_grad()
def outputs(name, w, g):
    if name == "judge_dino":
        return {"out.token": judges.DINO.from_state_dict(w)(g["in.x"])}
    clip = judges.CLIP.from_state_dict(w)
    return {"out.image": clip.image(g["in.x"]), "out.text": clip.text(g["in.ids"])}


# ---------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", KINDS)
def test_parity(name):
    w, g = read(name)
    for key, out in outputs(name, w, g).items():
        same(out, g[key])


def test_sizes_are_read_off_the_shapes():
    clip = judges.CLIP.from_state_dict(read("judge_clip")[0])
    dino = judges.DINO.from_state_dict(read("judge_dino")[0])
    assert (clip.size, clip.length, len(clip.image_tower.vision_model.encoder.layers), dino.size) == (24, 12, 3, 24)
    with torch.device("meta"):                           # ViT-L/14 and ViT-S/16
        assert judges.CLIPImage(1024, 4096, 1, 14, 257, 768).size == judges.DINO(384, 1536, 1, 16, 197).size == 224
    with pytest.raises(ValueError, match="square"):
        judges.side_of(12, 8)
    with pytest.raises(ValueError, match="a width of 100 is no multiple of 64"):
        judges.DINO(100, 100, 1, 8, 10)


def test_what_files_hold_beside_the_weights_is_left_out():
    w, g = read("judge_clip")
    assert "logit_scale" in w
    old = w | {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("text", "vision")}
    del old["logit_scale"]
    same(outputs("judge_clip", old, g)["out.image"], g["out.image"])
    w, g = read("judge_dino")
    pooled = w | {"pooler.dense.weight": torch.ones(128, 128), "pooler.dense.bias": torch.ones(128)}
    same(outputs("judge_dino", pooled, g)["out.token"], g["out.token"])


def gelu(network, kind):
    for module in network.modules():
        if hasattr(module, "gelu"):
            module.gelu = kind()


def epsilon(network, value):
    for module in network.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = value


@torch.no_grad()
def test_wrong_networks_fail_parity():
    """The other GELU, the other epsilon, a picture whose patches see only those before them."""
    w, g = read("judge_clip")
    clip = judges.CLIP.from_state_dict(w)
    gelu(clip, torch.nn.GELU)
    differ(clip.image(g["in.x"]), g["out.image"])
    differ(clip.text(g["in.ids"]), g["out.text"])
    clip = judges.CLIP.from_state_dict(w)
    for layer in clip.image_tower.vision_model.encoder.layers:
        layer.self_attn.causal = True
    differ(clip.image(g["in.x"]), g["out.image"])
    w, g = read("judge_dino")
    dino = judges.DINO.from_state_dict(w)
    epsilon(dino, 1e-5)
    differ(dino(g["in.x"]), g["out.token"], by=1e-3)
    dino = judges.DINO.from_state_dict(w)
    gelu(dino, judges.Layer(64, 64, quick_gelu=True).mlp.gelu.__class__)
    differ(dino(g["in.x"]), g["out.token"])


@pytest.mark.parametrize("name", KINDS)
def test_every_missing_key_is_named(name):
    w, _ = read(name)
    for key in one_of_each_kind(w.keys() - {"logit_scale"}):
        refused(KINDS[name], {k: t for k, t in w.items() if k != key}, judges.layer_key(key), "1 missing|has no")
    refused(KINDS[name], w | {"no.such.weight": torch.empty(1)}, "no.such.weight", "1 surplus")
    key = "text_projection.weight" if name == "judge_clip" else "embeddings.cls_token"
    refused(KINDS[name], w | {key: torch.empty([n + 1 for n in w[key].shape])}, key, "misshapen")


# ---------------------------------------------------------------------------- pictures


def test_preprocessing_is_that_of_transformers():
    """A picture of 53 x 37 pixels, to the last bit."""
    _, g = read("judge_clip")
    picture = Image.fromarray(g["in.picture"].numpy())
    assert torch.equal(judges.clip_picture(picture, 24), g["out.picture"])
    assert not torch.equal(judges.dino_picture(picture, 24), g["out.picture"])


@pytest.mark.parametrize("width, height", [(40, 80), (80, 40), (41, 83)])
def test_the_centre_is_cut_out(width, height):
    """One side red, the other blue, green between: a centre of green alone, in each network's own colours."""
    x = np.zeros((max(width, height), min(width, height), 3), np.uint8)
    x[:, :, 1] = 255
    x[:16] = (255, 0, 0)
    x[-16:] = (0, 0, 255)
    picture = Image.fromarray(x if height > width else x.transpose(1, 0, 2).copy())
    for prepare, (mean, std) in ((judges.clip_picture, judges.CLIP_COLOURS),
                                 (judges.dino_picture, judges.DINO_COLOURS)):
        out = prepare(picture, 14)
        green = (torch.tensor([0.0, 1, 0]) - torch.tensor(mean)) / torch.tensor(std)         # (3,)
        assert out.shape == (3, 14, 14)
        assert torch.allclose(out, green[:, None, None].expand(3, 14, 14), atol=0.1)


def test_dino_sees_less_than_clip():
    """Its short side is 256 / 224 of what is cut out: of 16 pixels the 14 in the centre, without the rim."""
    x = np.full((16, 16, 3), (0, 255, 0), np.uint8)
    x[[0, -1]] = x[:, [0, -1]] = (255, 0, 0)
    green = (torch.tensor([0.0, 1, 0]) - torch.tensor(judges.DINO_COLOURS[0])) / torch.tensor(judges.DINO_COLOURS[1])
    out = judges.dino_picture(Image.fromarray(x), 14)
    assert torch.equal(out, green[:, None, None].expand(3, 14, 14))
    clip = judges.clip_picture(Image.fromarray(x), 14)
    assert not torch.allclose(clip[:, 0], clip[:, 7])


# ---------------------------------------------------------------------------- scores


def write_judges(folder, old=False):
    """Tiny random judges as their repositories are published, with a vocabulary of bytes.  old: pickles alone."""
    w, _ = read("judge_clip")
    vocab = 2 * len(byte_symbols()) + 3                  # bytes, bytes at the end of a word, one merge, start, end
    generator = torch.Generator().manual_seed(0)
    w["text_model.embeddings.token_embedding.weight"] = torch.randn(vocab, 64, generator=generator)
    dino, _ = read("judge_dino")
    for name, sd in (("clip-vit-large-patch14", w), ("dino-vits16", dino)):
        (folder / name).mkdir(parents=True)
        if old or name == "dino-vits16":
            sd = sd | {"pooler.dense.weight": torch.ones(1)} if name == "dino-vits16" else sd
            torch.save(sd, folder / name / "pytorch_model.bin")
        else:
            save_file(sd, folder / name / "model.safetensors")
    (folder / "clip-vit-large-patch14/merges.txt").write_text("#version: 0.2\na b</w>\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_judges(tmp_path_factory.mktemp("judges"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)) for _ in range(2)]


def test_clipscore_by_hand(folder, pictures):
    judge = judges.load_judge(folder, "cpu")
    prompts = ["ab a", "b" * 99]                         # the second does not fit, and is cut
    found = judge.score(pictures, prompts)
    assert list(found) == list(judge.columns) == ["CLIPScore"] and judge.name == folder.name
    start, end = judge.clip.text_tower.vocab - 2, judge.clip.text_tower.vocab - 1
    id_of = judge.tokenizer.token_to_id
    tokens = [[start, id_of("ab</w>"), id_of("a</w>")] + [end] * 9, [start] + [id_of("b")] * 10 + [end]]
    assert id_of("ab</w>") == start - 1
    with torch.no_grad():
        for i, (image, ids) in enumerate(zip(pictures, tokens)):
            a = judge.clip.image(judges.clip_picture(image, 24)[None])[0]
            b = judge.clip.text(torch.tensor([ids]))[0]
            assert found["CLIPScore"][i] == pytest.approx(100 * torch.cosine_similarity(a, b, dim=0).item(), abs=1e-3)
    assert judge.score(pictures[:1], prompts[:1])["CLIPScore"][0] == found["CLIPScore"][0]
    assert judge.score(pictures, prompts[::-1])["CLIPScore"][0] != found["CLIPScore"][0]
    with pytest.raises(ValueError, match="2 pictures and 1 prompts"):
        judge.score(pictures, prompts[:1])


def test_similarity_by_hand(folder, pictures):
    judge = judges.load_judge(folder, "cpu")
    dino, _ = judges.load_dino(folder, "cpu")
    same_pictures = judges.similarity(judge, dino, pictures, pictures, ["a", "b"])
    assert list(same_pictures) == ["CLIP-I", "CLIP-T", "DINO"]
    assert same_pictures["CLIP-I"] == pytest.approx(100) and same_pictures["DINO"] == pytest.approx(100)
    others = judges.similarity(judge, dino, pictures, pictures[::-1], ["a", "b"])
    assert (others["CLIP-T"] == judge.score(pictures, ["a", "b"])["CLIPScore"]).all()
    assert (others["CLIP-T"] == same_pictures["CLIP-T"]).all()
    with torch.no_grad():
        a, b = (dino(judges.dino_picture(image, 24)[None])[0] for image in pictures)
        c, d = (judge.clip.image(judges.clip_picture(image, 24)[None])[0] for image in pictures)
    assert others["DINO"] == pytest.approx(100 * torch.cosine_similarity(a, b, dim=0).item(), abs=1e-3)
    assert others["CLIP-I"] == pytest.approx(100 * torch.cosine_similarity(c, d, dim=0).item(), abs=1e-3)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_on_a_device(folder, pictures, kind):
    """A pretended one (pretend.py): the CPU's numbers, and nothing on the wrong side."""
    here = judges.load_judge(folder, "cpu"), judges.load_dino(folder, "cpu")[0]
    with pretend(kind) as card:
        there = judges.load_judge(folder, "auto"), judges.load_dino(folder, "auto")[0]
        assert there[0].device.type == kind
        far = judges.similarity(*there, pictures, pictures[::-1], ["a", "b"])
    near = judges.similarity(*here, pictures, pictures[::-1], ["a", "b"])
    assert not card.refused and card.crossings
    assert all(far[column] == pytest.approx(near[column], abs=1e-3) for column in near)


def test_numbers_that_are_not_finite_are_no_score(folder, pictures):
    judge = judges.load_judge(folder, "cpu")
    judge.clip.image_tower.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        judge.score(pictures, ["a", "b"])


# ---------------------------------------------------------------------------- files


def test_files_of_both_formats_are_one_judge(folder, tmp_path, pictures):
    old = judges.load_judge(write_judges(tmp_path / "old", old=True) / "clip-vit-large-patch14", "cpu")
    new = judges.load_judge(folder, "cpu")
    a, b = (judge.score(pictures, ["a", "b"])["CLIPScore"] for judge in (old, new))
    assert a == pytest.approx(b, abs=1e-5)
    assert (old.name, len(old.fingerprint)) == ("clip-vit-large-patch14", 12) and old.fingerprint != new.fingerprint


def test_from_the_hub(folder, monkeypatch):
    """CLIP's first file; DINO's repository has the second alone, here."""
    asked = []

    def fetch(repo, file):
        asked.append((repo, file))
        path = folder / repo.split("/")[1] / file
        if not path.is_file():
            raise OSError("404")
        return path
    monkeypatch.setattr(weights, "hf_hub_download", fetch)
    assert judges.load_judge("clip", "cpu").name == "clip" and judges.load_dino("clip", "cpu")[0].size == 24
    assert asked == [("openai/clip-vit-large-patch14", "model.safetensors"),
                     ("openai/clip-vit-large-patch14", "merges.txt"), ("facebook/dino-vits16", "model.safetensors"),
                     ("facebook/dino-vits16", "pytorch_model.bin")]


def test_bad_files_are_sentences(folder, tmp_path):
    def says(match, path, load=judges.load_judge):
        with pytest.raises(ValueError, match=match):
            load(path, "cpu")

    says("the known name is clip", tmp_path / "none")
    says("the known name is clip", "")
    says("should hold model.safetensors or pytorch_model.bin of openai", tmp_path)
    with pytest.raises(ValueError, match="--judge"):     # the tests are offline
        judges.load_judge("clip", "cpu")
    bad = write_judges(tmp_path / "bad")
    clip = bad / "clip-vit-large-patch14"
    (clip / "merges.txt").write_text("#version\na b\nb a</w>\n")
    says("do not fit each other: 516 tokens", bad)
    (clip / "merges.txt").write_text("#version\nab\n")
    says("merges.txt' cannot be read as a list of CLIP's merges", bad)
    (clip / "merges.txt").unlink()
    says("merges.txt of openai", bad)
    torch.save([1], bad / "dino-vits16/pytorch_model.bin")
    says("no tensors by name", bad, judges.load_dino)
    torch.save({"embeddings.cls_token": torch.arange(3)}, bad / "dino-vits16/pytorch_model.bin")
    says("floating-point", bad, judges.load_dino)
    save_file(load_file(folder / "clip-vit-large-patch14/model.safetensors"), bad / "dino-vits16/model.safetensors")
    says("no 'embeddings.patch_embeddings.projection.weight'", bad, judges.load_dino)
    (clip / "model.safetensors").write_bytes(b"no")
    (clip / "merges.txt").write_text("#version\n")
    says("cannot be read as a .safetensors file", bad)


def test_the_fingerprint_is_that_of_the_files(folder):
    files = judge_files.find("clip", folder)
    assert files.weights.name == "model.safetensors" and weights.read_merges(files.merges) == ["a b</w>"]
    assert judges.load_judge(folder, "cpu").fingerprint == judge_files.fingerprint(files)

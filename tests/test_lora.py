"""LoRA: nothing before it is trained, W + BA on the right rows after, and files of three kinds read or refused."""
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora
import seg4diff
from lora import add_lora, load_lora, merge_lora, read_lora, save_lora
from nano import scenes

WIDTH, DEPTH, RANK = 64, 3, 4
ROWS = {"to_q": slice(0, WIDTH), "to_k": slice(WIDTH, 2 * WIDTH), "to_v": slice(2 * WIDTH, 3 * WIDTH)}


def fresh(tiny_file, **options) -> seg4diff.Seg4Diff:
    return seg4diff.load(tiny_file, device="cpu", dtype="float32", **options)


def run(model: seg4diff.Seg4Diff) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    z, sigma = torch.randn(2, 16, 16, 16, generator=g), torch.tensor([0.2, 0.7])
    cond = model.text.encode(["red car sky", "a boat"])
    return model.transformer(z, sigma, cond.ctx, cond.pooled)[0]


def trained(tiny_file, rank=RANK, alpha=8.0) -> seg4diff.Seg4Diff:
    """A model with a LoRA whose B is no longer zero."""
    model = fresh(tiny_file)
    g = torch.Generator().manual_seed(1)
    for p in add_lora(model.transformer, rank, alpha, g):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


def peft_pairs(names=("to_q", "to_k", "to_v", "to_out.0"), rank=RANK, depth=DEPTH, width=WIDTH) -> dict:
    """Random pairs under diffusers' names, without prefix."""
    g = torch.Generator().manual_seed(2)
    sd = {}
    for i in range(depth):
        for name in names:
            sd[f"transformer_blocks.{i}.attn.{name}.lora_A.weight"] = 0.3 * torch.randn(rank, width, generator=g)
            sd[f"transformer_blocks.{i}.attn.{name}.lora_B.weight"] = 0.3 * torch.randn(width, rank, generator=g)
    return sd


def merged_by_hand(base: dict, pairs: dict, scale: float) -> dict[str, torch.Tensor]:
    """W + scale B A, written out for each kind of layer."""
    want = {k: v.clone() for k, v in base.items()}
    for key in (k for k in pairs if ".lora_A." in k):
        block, layer = int(key.split(".")[1]), key.split(".attn.")[1].split(".lora_A")[0]
        update = scale * pairs[key.replace("lora_A", "lora_B")] @ pairs[key]
        stem = f"joint_blocks.{block}."
        if layer in ROWS:
            want[stem + "x_block.attn.qkv.weight"][ROWS[layer]] += update
        elif layer == "to_out.0":
            want[stem + "x_block.attn.proj.weight"] += update
        elif layer == "to_add_out":
            want[stem + "context_block.attn.proj.weight"] += update
        else:                                                # add_q_proj -> to_q
            want[stem + "context_block.attn.qkv.weight"][ROWS["to_" + layer[4]]] += update
    return want


def assert_same(model: seg4diff.Seg4Diff, want: dict) -> None:
    got = model.transformer.state_dict()
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-5)


def test_no_op_at_the_start_and_only_lora_learns(tiny, tiny_file):
    model = fresh(tiny_file)
    model.transformer.requires_grad_(True)
    params = add_lora(model.transformer, generator=torch.Generator().manual_seed(0))
    assert torch.equal(run(model), run(tiny))
    assert len(params) == DEPTH * 4 * 2 and sum(p.numel() for p in params) == DEPTH * 4 * 2 * 16 * WIDTH
    a = torch.cat([p.flatten() for p in params[::2]])
    assert abs(a.std() - 1 / 16) < 1e-3 and all((p == 0).all() for p in params[1::2])
    run(model).square().mean().backward()
    with_grad = {name for name, p in model.transformer.named_parameters() if p.grad is not None}
    assert len(with_grad) == len(params) and all(".groups." in name for name in with_grad)
    assert {name for name, p in model.transformer.named_parameters() if p.requires_grad} == with_grad
    assert all(p.grad.abs().max() > 0 for p in params[1::2])                 # every B can learn
    with pytest.raises(ValueError, match="merge_lora"):
        add_lora(model.transformer)
    with pytest.raises(ValueError, match="at least 1"):
        add_lora(fresh(tiny_file).transformer, rank=0)
    again = add_lora(fresh(tiny_file).transformer, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(params, again))             # the generator alone decides


def test_merged_is_the_adapter(tiny, tiny_file):
    model = trained(tiny_file)
    adapted = run(model)
    assert (adapted - run(tiny)).abs().max() > 0.01
    merge_lora(model.transformer)
    torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-5)
    assert model.transformer.state_dict().keys() == tiny.transformer.state_dict().keys()


def test_round_trip(tiny_file, tmp_path):
    model = trained(tiny_file)
    save_lora(model.transformer, tmp_path / "lora.safetensors")
    assert {p.name for p in tmp_path.iterdir()} == {"lora.safetensors"}      # no half written file beside it
    sd = load_file(tmp_path / "lora.safetensors")
    assert len(sd) == DEPTH * 4 * 2
    assert sd["transformer.transformer_blocks.1.attn.to_k.lora_A.weight"].shape == (RANK, WIDTH)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as f:
        meta = f.metadata()
    adapter = json.loads(meta["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (RANK, 8.0)
    base = json.loads(meta["base"])
    assert (base["width"], base["depth"]) == (WIDTH, DEPTH)
    other = fresh(tiny_file)
    load_lora(other.transformer, tmp_path / "lora.safetensors")
    assert torch.equal(run(other), run(model))
    save_lora(other.transformer, tmp_path / "again.safetensors")             # ours -> ours
    with safe_open(tmp_path / "again.safetensors", framework="pt") as f:
        assert f.metadata() == meta and all(torch.equal(f.get_tensor(k), v) for k, v in sd.items())
    whole = fresh(tiny_file, lora=tmp_path / "lora.safetensors")
    torch.testing.assert_close(run(whole), run(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="add_lora first"):
        save_lora(whole.transformer, tmp_path / "none.safetensors")


def test_another_base_is_refused(tiny_file, tmp_path):
    model = trained(tiny_file)
    save_lora(model.transformer, tmp_path / "lora.safetensors")
    half = seg4diff.load(tiny_file, device="cpu", dtype="bfloat16")          # the same base, rounded
    load_lora(half.transformer, tmp_path / "lora.safetensors")
    other = fresh(tiny_file)
    other.transformer.joint_blocks[2].x_block.attn.qkv.weight.mul_(1.05)
    before = run(other)
    with pytest.raises(ValueError, match="another model"):
        load_lora(other.transformer, tmp_path / "lora.safetensors")
    assert torch.equal(run(other), before)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_diffusers_layout(tiny, tiny_file, tmp_path, alpha):
    """All eight layers of an SD3 LoRA, q, k and v on their rows; no alpha means scale 1."""
    pairs = peft_pairs(("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"))
    pairs |= peft_pairs(("to_add_out",), depth=DEPTH - 1)                    # the last block's text has no projection
    meta = None
    if alpha:
        meta = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": alpha})}
    save_file({f"transformer.{k}": v for k, v in pairs.items()}, tmp_path / "l.safetensors", meta)
    assert_same(fresh(tiny_file, lora=tmp_path / "l.safetensors"),
                merged_by_hand(tiny.transformer.state_dict(), pairs, 1.0 if alpha is None else alpha / RANK))


def test_patterns_and_ranks_of_single_layers(tiny, tiny_file, tmp_path):
    q, v = peft_pairs(("to_q",), rank=2), peft_pairs(("to_v",), rank=6)
    meta = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"attn.to_v": 3}, "rank_pattern": {"attn.to_v": 6}}
    save_file(q | v, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(meta)})
    half_way = merged_by_hand(tiny.transformer.state_dict(), q, 2.0)
    model = fresh(tiny_file)
    load_lora(model.transformer, tmp_path / "l.safetensors")
    save_lora(model.transformer, tmp_path / "ours.safetensors")        # which then has to say all that itself
    for name in ("l", "ours"):
        assert_same(fresh(tiny_file, lora=tmp_path / f"{name}.safetensors"), merged_by_hand(half_way, v, 0.5))
    save_file(q, tmp_path / "rs.safetensors", {"lora_adapter_metadata": json.dumps(meta | {"use_rslora": True})})
    assert_same(fresh(tiny_file, lora=tmp_path / "rs.safetensors"),
                merged_by_hand(tiny.transformer.state_dict(), q, 4 / 2 ** 0.5))


def test_the_authors_pth(tiny, tiny_file, tmp_path):
    pairs = peft_pairs()
    stored = {f"backbone.transformer.{k.replace('.weight', '.default.weight')}": v for k, v in pairs.items()}
    stored["attn_mlp.attn_score_layer.0.weight"] = torch.zeros(64, 1, 3, 3)  # of training; not needed
    stored["backbone.transformer.transformer_blocks.0.attn.to_q.base_layer.weight"] = torch.zeros(WIDTH, WIDTH)
    torch.save({"model": stored, "iteration": 2999}, tmp_path / "lora_weights.pth")
    want = merged_by_hand(tiny.transformer.state_dict(), pairs, 1.0)
    assert_same(fresh(tiny_file, lora=tmp_path / "lora_weights.pth"), want)


def test_model_read_for_segmentation(tiny_file, tmp_path):
    """Pairs of blocks that were left on the disk are skipped, unless nothing is left; maps are the whole model's."""
    model = trained(tiny_file)
    save_lora(model.transformer, tmp_path / "lora.safetensors")
    image = Image.fromarray(scenes.draw(0).image)
    maps = [seg4diff.segment(fresh(tiny_file, lora=tmp_path / "lora.safetensors", segment_only=only), image,
                             ["car", "sky"]).maps for only in (False, True)]
    assert torch.equal(*maps)
    last = {k: v for k, v in peft_pairs().items() if "blocks.2." in k}
    save_file(last, tmp_path / "last.safetensors")
    fresh(tiny_file, lora=tmp_path / "last.safetensors")
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        fresh(tiny_file, lora=tmp_path / "last.safetensors", segment_only=True)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def bad_files(folder: Path) -> dict[str, str]:
    """File -> what the sentence must say."""
    good = peft_pairs()
    key = "transformer_blocks.0.attn.to_q.lora_B.weight"
    cases = {"none": ({"x.weight": torch.zeros(2)}, "no LoRA"),
             "kohya": ({"lora_unet_x.lora_down.weight": torch.zeros(2)}, "lora_unet_x"),
             "mlp": (good | {f"transformer_blocks.0.ff.net.2.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
                     "ff.net.2"),
             "text": (good | {"text_encoder.q_proj.lora_A.weight": torch.zeros(4, 64)}, "text_encoder"),
             "tall": (good | {key: torch.zeros(65, 4)}, r"\(65, 4\)"),
             "half": ({k: v for k, v in good.items() if k != key}, "to_q"),
             "ranks": (good | {key: torch.zeros(64, 5)}, r"\(64, 5\)"), "deep": (peft_pairs(depth=5), "blocks 0 to 2"),
             "wide": (peft_pairs(width=128), "128"), "out": (peft_pairs(("to_add_out",)), "no such layer"),
             "rank0": (peft_pairs(rank=0), r"should be \(rank, columns\), not \(0, 64\)"),
             "scalar": (good | {key.replace("_B", "_A"): torch.tensor(1.0)}, r"columns\), not \(\)"),
             "whole": (good | {key: torch.ones(64, 4, dtype=torch.int64)}, f"'{key}' holds torch.int64"),
             "nan": (good | {key: torch.full((64, 4), torch.nan)}, f"'{key}' are not finite"),
             "twice": (good | {f"transformer.{key}": good[key].clone()}, "lora_B of attn.to_q of block 0 twice"),
             "far": (good | {key.replace(".0.", f".{'9' * 5000}."): torch.ones(64, 4)}, "integer string conversion")}
    for name, (sd, _) in cases.items():
        save_file({k: v.contiguous() for k, v in sd.items()}, folder / f"{name}.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "deep.safetensors").read_bytes()[:-100])
    (folder / "words.pth").write_text("not a LoRA")
    (folder / "folder").mkdir()
    with zipfile.ZipFile(folder / "zip.pth", "w") as archive:
        archive.writestr("words.txt", "not a LoRA")
    torch.save({"model": {"lora": Bomb()}}, folder / "bomb.pth")
    sparse = good | {key: torch.zeros(64, 4).to_sparse()}
    stored = {"five": {"model": 5}, "list": [1, 2], "tensor": torch.zeros(2), "words_in": {key: "words"},
              "numbers": {1: torch.zeros(2)}, "sparse": {"model": sparse}}
    for name, value in stored.items():
        torch.save(value, folder / f"{name}.pth")
    says = {f"{name}.safetensors": text for name, (_, text) in cases.items()}
    return says | {"cut.safetensors": "cannot be read", "words.pth": "cannot be read", "zip.pth": "cannot be read",
                   "bomb.pth": "more than tensors", "missing.safetensors": "no such", "missing.pth": "no such file",
                   "folder": "a folder", "five.pth": "its model should be an object", "words_in.pth": "holds str",
                   "list.pth": "content should be an object", "tensor.pth": "content should be an object",
                   "numbers.pth": "no LoRA", "sparse.pth": "dense"}


def test_bad_files_are_refused_in_a_sentence(tiny_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = fresh(tiny_file)
    before = run(model)
    for file, says in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=says) as error:
            load_lora(model.transformer, tmp_path / file)
        assert file in str(error.value) and "\n" not in str(error.value), file
        assert "weights_only" not in str(error.value), file                  # torch's advice to switch it off
    assert torch.equal(run(model), before) and not Path("exploded").exists()


DEEP = "[" * 100_000 + "]" * 100_000
BASE = {"width": WIDTH, "depth": DEPTH, "samples": [[0.5] * 8] * DEPTH}


@pytest.mark.parametrize("adapter, sentence", [
    ("{", "Expecting"), (DEEP, "nested too deep"), ("5", "lora_adapter_metadata should be an object"),
    ('{"lora_alpha": "8"}', "alpha must be a finite number, not '8'"), ('{"lora_alpha": NaN}', "not nan"),
    ('{"lora_alpha": null}', "not None"), ('{"lora_alpha": true}', "not True"), ('{"lora_alpha": [8]}', r"not \[8\]"),
    ('{"alpha_pattern": []}', "alpha_pattern should be an object"), ('{"alpha_pattern": {"to_q": "x"}}', "not 'x'"),
    ('{"alpha_pattern": {"(": 2}}', r"'\(' in its alpha_pattern is no regular expression"),
    (f'{{"lora_alpha": 1{"0" * 400}}}', "too large"), ('{"use_rslora": "false"}', "true or false, not 'false'"),
    ('{"use_rslora": 1}', "not 1"), ('{"use_rslora": null}', "not None"),
    ('{"rank_pattern": []}', "rank_pattern should be an object"),
    ('{"rank_pattern": {"(": 2}}', r"'\(' in its rank_pattern is no regular expression"),
    *(('{"%s": {%s: 3}}' % (what, json.dumps(pattern)), f"in its {what} is not read: only letters")
      for what in ("alpha_pattern", "rank_pattern")
      for pattern in ("(.+)+z", "(.|.)" * 30 + "z", "(a)+", "(a)?", "a{9}", ".*", "\\d+" * 3, "(?:a)", "a" * 201))])
def test_adapters_that_are_none(tmp_path, adapter, sentence):
    save_file(peft_pairs(), tmp_path / "l.safetensors", {"lora_adapter_metadata": adapter})
    with pytest.raises(ValueError, match=f"l.safetensors' cannot be read as a LoRA: .*{sentence}"):
        read_lora(tmp_path / "l.safetensors")


def test_patterns_that_are_read(tmp_path):
    """And the slowest of them on the longest name, which is fast."""
    slow = f"({'|'.join('.' * 40)})({'|'.join('.' * 40)})\\d+\\d+z"
    patterns = {slow: 5.0, r"^transformer_blocks\.\d+\.attn\.(to_k|to_v)$": 2.0, "0.attn.to_q": 3.0}
    meta = {"r": RANK, "lora_alpha": 8, "alpha_pattern": patterns, "rank_pattern": {"attn.to_v": 4}}
    name = f"transformer_blocks.{'1' * 77}.x"
    long = {f"{name}.lora_{side}.weight": torch.ones(1, 1) for side in "AB"}
    save_file(peft_pairs() | long, tmp_path / "l.safetensors", {"lora_adapter_metadata": json.dumps(meta)})
    start = time.process_time()
    pairs, _ = read_lora(tmp_path / "l.safetensors")
    assert time.process_time() - start < 5 and name in pairs
    scales = [pairs[f"transformer_blocks.{layer}"].scale * RANK for layer in ("2.attn.to_k", "0.attn.to_q",
                                                                              "1.attn.to_q")]
    assert scales == [2, 3, 8]
    longer = {key.replace(".x.", f".{'x' * 500}."): x for key, x in long.items()}
    save_file(longer, tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match="a name of 597 characters"):
        read_lora(tmp_path / "l.safetensors")


@pytest.mark.parametrize("only", [False, True])
def test_a_block_that_the_base_lacks(tiny_file, tmp_path, only):
    """It is refused also where pairs of blocks that were left on the disk are skipped."""
    save_lora(trained(tiny_file).transformer, tmp_path / "lora.safetensors")
    sd = load_file(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as f:
        meta = f.metadata()
    for block in (DEPTH, "9" * 20):
        moved = {key.replace("blocks.2.", f"blocks.{block}."): x for key, x in sd.items()}
        save_file(moved, tmp_path / "moved.safetensors", meta)
        with pytest.raises(ValueError, match=f"moved.*of block {block}, but its base has blocks 0 to 2$"):
            fresh(tiny_file, lora=tmp_path / "moved.safetensors", segment_only=only)


@pytest.mark.parametrize("base, sentence", [
    ("[", "Expecting"), (DEEP, "nested too deep"), ("[5]", "base should be an object"), ("{}", "width of its base"),
    (BASE | {"width": "64"}, "width of its base should be a whole"), (BASE | {"depth": None}, "depth of its base"),
    (BASE | {"samples": 5}, "samples should be a list"), (BASE | {"samples": [["x"] * 8] * DEPTH}, ""),
    (BASE | {"samples": [[1.0], [1.0, 2.0]]}, ""), (BASE | {"samples": [[{}] * 8] * DEPTH}, ""),
    (BASE | {"samples": [[1.0] * 7] * DEPTH}, r"samples of its base should be \(3, 8\)"),
    (BASE | {"samples": [[10**400] * 8] * DEPTH}, "too large")])
def test_bases_that_are_none(tmp_path, base, sentence):
    base = base if isinstance(base, str) else json.dumps(base)
    save_file(peft_pairs(), tmp_path / "l.safetensors", {"base": base})
    with pytest.raises(ValueError, match=f"l.safetensors' cannot be read as a LoRA: .*{sentence}"):
        read_lora(tmp_path / "l.safetensors")


def test_a_mistake_of_ours_is_none_of_the_file(tmp_path, monkeypatch):
    save_file(peft_pairs(), tmp_path / "l.safetensors")
    monkeypatch.setattr(lora, "scale_of", lambda *args: None.nothing)
    with pytest.raises(AttributeError):
        read_lora(tmp_path / "l.safetensors")


def test_a_lora_that_cannot_be_saved_leaves_the_last_one(tiny_file, tmp_path, monkeypatch):
    """Numbers that are not finite, a full disk: what was there is still there, and nothing beside it."""
    path = tmp_path / "lora.safetensors"
    model = trained(tiny_file).transformer
    save_lora(model, path)
    before = path.read_bytes()

    def full(sd, new, *args):
        Path(new).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(lora, "save_file", full)
        with pytest.raises(ValueError, match="cannot be written .*No space left on device.*; what was there before"):
            save_lora(model, path)
    model.joint_blocks[1].x_block.attn.proj.groups[0].B.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="B of transformer_blocks.1.attn.to_out.0 are not finite"):
        save_lora(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


def test_command_lines(command, tiny_file, tmp_path):
    save_lora(trained(tiny_file).transformer, tmp_path / "sharp.safetensors")
    fixed = ("--model", tiny_file, "--device", "cpu")
    with_and_without = ((), ("--lora", "sharp.safetensors"))
    results = []
    for option in with_and_without:
        code, _, err = command("evaluate.py", "--limit", 2, *fixed, "--out", "same", *option)
        assert code == 0, err
        results.append(json.loads((tmp_path / "same/results.json").read_text()))
    names = [r["identity"]["model"][:2] for r in results]
    assert [n for n, _ in names] == ["tiny", "tiny+sharp"] and names[0][1] != names[1][1]
    assert results[0]["hash"] != results[1]["hash"]              # no count of one run is taken for the other's
    assert results[0]["rows"]["tiny"] != results[1]["rows"]["tiny+sharp"]
    Image.fromarray(scenes.draw(0).image).save(tmp_path / "photo.png")
    for words in (("segment", "photo.png", "car", "sky"), ("generate", "red car", "--steps", 2)):
        pictures = []
        for option in with_and_without:
            code, _, err = command("seg4diff.py", *words, *fixed, "--out", "o.png", *option)
            assert code == 0, err
            pictures.append(np.asarray(Image.open("o.png")))
        assert (pictures[0] != pictures[1]).any()
    code, _, err = command("seg4diff.py", "generate", "a car", "--model", tiny_file, "--lora", "photo.png")
    assert code == 2 and err.startswith("error: ") and "photo.png" in err and err.count("\n") == 1


def test_rslora_with_an_alpha_of_its_own():
    adapter = {"use_rslora": True, "lora_alpha": 4, "alpha_pattern": {"attn.to_v": 3}}
    assert lora.scale_of(adapter, "transformer_blocks.0.attn.to_v", 9) == 1

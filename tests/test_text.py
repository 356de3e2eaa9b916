"""Tokens, the columns of class names, and what an MM-DiT gets to read."""
import json
from pathlib import Path

import pytest
import torch

import text
from nano import scenes

# CLIP's published ids, start and end left out: facts of openai/clip-vit-large-patch14's tokenizer.
GOLDEN = {
    "": [],
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A cat holding a sign that says hello world!": [320, 2368, 5050, 320, 2292, 682, 1563, 3306, 1002, 256],
    "aeroplane bicycle bird": [27735, 3980, 11652, 3329],
    "tv monitor potted plant": [1583, 10198, 48581, 3912],
    "wow!! ok": [2781, 748, 2481],
    "Café (red:1.2) 12345": [15304, 263, 736, 281, 272, 269, 273, 264, 272, 273, 274, 275, 276],
}


def words(tokenizer, s: str) -> list[str]:
    """Where a tokenizer without merges cuts a text: its pieces end in </w>."""
    return "".join(tokenizer.encode(s).tokens).split("</w>")[:-1]


# ---------------------------------------------------------------------------- tokens


def test_byte_symbols():
    symbols = text.byte_symbols()
    assert len(symbols) == len(set(symbols)) == 256
    assert symbols[0] == "!" and symbols[64] == "a" and symbols[94] == "¡" and symbols[187] == "ÿ"
    assert symbols[188] == "Ā" and symbols[188 + ord(" ")] == "Ġ"            # bytes 0 and 32, in hiding
    assert all(s.isprintable() and not s.isspace() for s in symbols)


def test_vocabulary_order():
    tokenizer = text.clip_tokenizer(["c a", "ca t</w>", "a r</w>", "c ar</w>"])
    where = tokenizer.token_to_id
    assert tokenizer.get_vocab_size() == 518
    assert (where("!"), where("a"), where("!</w>"), where("a</w>")) == (0, 64, 256, 320)
    assert [where(x) for x in ("ca", "cat</w>", "ar</w>", "car</w>")] == [512, 513, 514, 515]
    assert (where("<|startoftext|>"), where("<|endoftext|>")) == (516, 517)


def test_merges_in_order_of_rank():
    """c-a is merged before a-r, so "car" never gets to c-ar."""
    tokenizer = text.clip_tokenizer(["c a", "ca t</w>", "a r</w>", "c ar</w>"])
    assert tokenizer.encode("cat").ids == [513]
    assert tokenizer.encode("car").ids == [512, 256 + ord("r") - 33]
    assert tokenizer.encode("cata").ids == [512, ord("t") - 33, 256 + ord("a") - 33]     # no cat inside a word
    assert tokenizer.encode("é").ids == [127, 256 + 102]                                 # bytes C3 A9


@pytest.mark.parametrize("merges, sentence", [
    (["ca t</w>", "c a"], "no earlier merge makes: 'ca t</w>'"), (["ca r"], "no earlier merge makes: 'ca r'"),
    (["c a", "a t", "ca t", "c at"], "second time: 'c at'"), (["c a", "c a"], "second time: 'c a'"),
    ([" a"], "no earlier merge"), ([1], "must be a list"), ([["c", "a"]], "must be a list"), ("c a", "must be a list"),
    (None, "must be a list"), ({"c a": 1}, "must be a list")])
def test_merges_that_no_bytes_lead_to(merges, sentence):
    """Only pieces that are there already can be joined, and what they make must be new: else ids are others'."""
    with pytest.raises(ValueError, match=sentence):
        text.clip_tokenizer(merges)


@pytest.mark.parametrize("s, pieces", [
    ("A CAT", ["a", "cat"]), ("  a \t\n cat\u3000 ", ["a", "cat"]), ("", []), (" \n ", []),
    ("2024", ["2", "0", "2", "4"]), ("x2y", ["x", "2", "y"]), ("wow!! ok", ["wow", "!!", "ok"]),
    ("(red:1.2)", ["(", "red", ":", "1", ".", "2", ")"]), ("don't", ["don", "'t"]), ("IT'S", ["it", "'s"]),
    ("they've we're i'm you'll he'd", ["they", "'ve", "we", "'re", "i", "'m", "you", "'ll", "he", "'d"]),
    ("e\u0301", ["Ã©"]), ("a_b-c", ["a", "_", "b", "-", "c"]), ("<|endoftext|>", ["<|", "endoftext", "|>"])])
def test_words(s, pieces):
    assert words(text.clip_tokenizer([]), s) == pieces


@pytest.mark.parametrize("s", GOLDEN)
def test_clip_ids(s):
    """With those of CLIP's merges that these texts meet, under their published ids."""
    merges = json.loads((Path(__file__).parent / "golden" / "clip_merges.json").read_text())
    tokenizer = text.clip_tokenizer([merge for _, merge in merges])
    ids = {512 + i: published for i, (published, _) in enumerate(merges)}
    assert [ids.get(i, i) for i in tokenizer.encode(s).ids] == GOLDEN[s]


def test_two_pieces_of_aeroplane():
    merges = json.loads((Path(__file__).parent / "golden" / "clip_merges.json").read_text())
    encoding = text.clip_tokenizer([merge for _, merge in merges]).encode("Aeroplane  bicycle")
    assert encoding.tokens == ["aerop", "lane</w>", "bicycle</w>"]
    assert encoding.offsets == [(0, 5), (5, 9), (11, 18)]                    # of the text as given


def test_nano_words_are_single_tokens(tiny):
    ids = [tiny.text.tokenizer.encode(word).ids for word in scenes.words()]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(ids)
    vocab, _ = tiny.text.clip_l.text_model.embeddings.token_embedding.weight.shape
    assert tiny.text.tokenizer.get_vocab_size() == vocab


# ---------------------------------------------------------------------------- spans


def test_spans(tiny):
    ids, tokens, spans = tiny.text.tokenize(["sky", "teddy bear", "zebu", "air balloon", "sky"])
    n = tiny.text.n_tokens("zebu")                                           # not a word of nano's: several pieces
    assert n > 1
    assert spans == [slice(1, 2), slice(2, 4), slice(4, 4 + n), slice(4 + n, 6 + n), slice(6 + n, 7 + n)]
    assert tokens[:4] == ["<sos>", "sky", "teddy", "bear"] and "".join(tokens[spans[2]]) == "zebu"
    assert tokens[7 + n:] == ["<eos>"] + ["<pad>"] * (28 - 8 - n)


@pytest.mark.parametrize("names", [
    ["it's", "x!", "!x"], ["Café", "e\u0301te\u0301", "Åland"], ["İzmir", "ﬁn", "ß"], ["日本", "🙂", "가"],
    [" car ", "teddy  bear", "red\tcar"], ["car", "carcar", "car", "ca", "r"], ["a", "a a", "a"]])
def test_spans_hold_the_tokens_of_the_name(tiny, names):
    """Whatever lower-casing, NFC or whitespace do to the offsets, and whatever stands beside."""
    ids, _, spans = tiny.text.tokenize(names)
    ids_alone = [tiny.text.tokenizer.encode(name).ids for name in names]
    assert [ids[span] for span in spans] == ids_alone
    assert [span.start for span in spans] == [1 + sum(map(len, ids_alone[:k])) for k in range(len(names))]
    assert [tiny.text.n_tokens(name) for name in names] == list(map(len, ids_alone))


def test_a_plain_prompt_has_a_span_for_each_word(tiny):
    assert tiny.text.tokenize("a  red car") == tiny.text.tokenize(["a", "red", "car"])
    assert tiny.text.tokenize("a red car")[2] == [slice(1, 2), slice(2, 3), slice(3, 4)]


def test_truncation(tiny):
    names = ["sky"] * 25 + ["teddy bear", "car"]                             # 28 tokens; there is room for 26
    ids, tokens, spans = tiny.text.tokenize(names)
    start, end = (tiny.text.tokenizer.token_to_id(f"<|{x}oftext|>") for x in ("start", "end"))
    assert len(ids) == len(tokens) == tiny.text.length == 28
    assert ids[0] == start and ids[-1] == end and end not in ids[:-1] and tokens[-2:] == ["teddy", "<eos>"]
    assert spans[24:] == [slice(25, 26), slice(26, 27), slice(27, 27)]         # half a bear, no car


# ---------------------------------------------------------------------------- context


def test_context_layout_and_padding(tiny):
    """[CLIP-L | CLIP-G | zeros] over zero rows; after the end CLIP-L reads end tokens, CLIP-G zeros."""
    cond = tiny.text.encode(["a red car"])
    ids = torch.tensor([tiny.text.tokenize("a red car")[0]])
    end = ids.max()
    assert ids[0, 4:].eq(end).all() and ids[0, :4].ne(end).all()
    zeros = ids.clone()
    zeros[:, 5:] = 0
    (hidden_l, pooled_l), (hidden_g, pooled_g) = tiny.text.clip_l(ids), tiny.text.clip_g(zeros)
    assert cond.ctx.shape == (1, 56, 256) and len(cond.tokens[0]) == 28
    torch.testing.assert_close(cond.ctx[:, :28, :64], hidden_l)
    torch.testing.assert_close(cond.ctx[:, :28, 64:192], hidden_g)
    assert not cond.ctx[:, :28, 192:].any() and not cond.ctx[:, 28:].any()
    torch.testing.assert_close(cond.pooled, torch.cat([pooled_l, pooled_g], dim=1))

    padded_as_l, pooled = tiny.text.clip_g(ids)
    assert (padded_as_l - hidden_g)[:, 5:].abs().max() > 1e-2                # the padding is seen in its own rows
    torch.testing.assert_close(pooled, pooled_g)                             # and nowhere before


def test_pooled_is_read_at_the_first_end(tiny):
    """Causal towers: what follows the end cannot change it, what precedes it must."""
    ids = torch.tensor([tiny.text.tokenize(p)[0] for p in ("a red car", "a red car", "a blue car")])
    ids[1, 5:] = torch.arange(23) + 40
    for tower in (tiny.text.clip_l, tiny.text.clip_g):
        _, pooled = tower(ids)
        torch.testing.assert_close(pooled[0], pooled[1])
        assert (pooled[0] - pooled[2]).abs().max() > 1e-2


def test_empty_prompt(tiny):
    cond = tiny.text.encode(["", "car"])
    start, end = (tiny.text.tokenizer.token_to_id(f"<|{x}oftext|>") for x in ("start", "end"))
    ids, tokens, spans = tiny.text.tokenize("")
    assert ids == [start] + [end] * 27 and tokens == ["<sos>", "<eos>"] + ["<pad>"] * 26 and spans == []
    assert cond.spans == [[], [slice(1, 2)]]
    torch.testing.assert_close(cond.ctx[0, 0], cond.ctx[1, 0])               # <sos> reads nothing but itself
    assert (cond.pooled[0] - cond.pooled[1]).abs().max() > 1e-2


def test_prompts_do_not_see_their_batch(tiny):
    both = tiny.text.encode([["car", "sky"], ["teddy bear"]])
    for b, names in enumerate([["car", "sky"], ["teddy bear"]]):
        alone = tiny.text.encode([names])
        torch.testing.assert_close(both.ctx[b], alone.ctx[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(both.pooled[b], alone.pooled[0], atol=1e-5, rtol=0)
        assert (both.tokens[b], both.spans[b]) == (alone.tokens[0], alone.spans[0])


def test_a_second_clip_l_is_no_clip_g(tiny):
    with pytest.raises(ValueError, match="text_projection"):
        text.TextEncoders(tiny.text.clip_l, tiny.text.clip_l, tiny.text.tokenizer, 256)

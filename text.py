"""From words to what an MM-DiT reads: tokens, the CLIP-L and CLIP-G text towers, context and pooled vector.

SD3's context rows are [CLIP-L | CLIP-G], zero-padded to the context width, followed by as many zero rows in the
place of the T5 encoder, which the paper leaves out (A.1).  Flux's are T5's (t5.py) alone, and CLIP-L makes its pooled
vector.  Key names are those of the published files.

    cond = text.encode([["bicycle", "cat", "person"]])      # cond.spans[0][1]: the columns of "cat"
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from support.checkpoint import Device, Dtype, assign, count, shape
from t5 import T5

# ---------------------------------------------------------------------------- tokens


def byte_symbols():
    """CLIP's 256 printable stand-ins for the bytes, in vocabulary order: visible Latin-1 first, then the rest."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer(merges: list[str]) -> Tokenizer:
    """CLIP's lower-casing byte-level BPE.

    Its vocabulary follows from the merges ("a b" each) alone: bytes, bytes at a word's end, one entry a merge, then
    start and end of text, the largest ids.  ValueError: not a list of merges, or not in an order they can be made in.
    """
    if not isinstance(merges, list) or not all(isinstance(m, str) and m.count(" ") == 1 for m in merges):
        raise ValueError('the tokenizer\'s merges must be a list of texts such as "a b"')
    symbols = byte_symbols()
    vocab = {piece: i for i, piece in enumerate(symbols + [s + "</w>" for s in symbols])}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for left, right in pairs:
        if left not in vocab or right not in vocab:
            raise ValueError(f"the tokenizer's merges join pieces that no earlier merge makes: '{left} {right}'")
        if left + right in vocab:
            raise ValueError(f"the tokenizer's merges make a piece for the second time: '{left} {right}'")
        vocab[left + right] = len(vocab)
    for piece in ("<|startoftext|>", "<|endoftext|>"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, pairs, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")     # all else only separates
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "removed", invert=True),
                                                       pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


class Marks(NamedTuple):
    """The tokens that a prompt is put between and filled up with."""
    start: str | None
    end: str
    pad: str


CLIP_MARKS = Marks("<|startoftext|>", "<|endoftext|>", "<|endoftext|>")
T5_MARKS = Marks(None, "</s>", "<pad>")


def tokenize(tokenizer: Tokenizer, marks: Marks, length: int, prompt: str | list[str]
             ) -> tuple[list[int], list[str], list[slice]]:
    """A prompt, or class names that become one ("a", "b c" -> "a b c") -> ids, token strings, spans.

    ids are padded to `length`.  A span holds the columns of a name's tokens (of a plain prompt: of each word's).  A
    name that was cut off keeps the tokens that are left, or gets an empty slice.
    """
    ids = [] if marks.start is None else [tokenizer.token_to_id(marks.start)]
    pieces = ["<sos>"] * len(ids)
    spans = []
    names = prompt.split() if isinstance(prompt, str) else prompt
    for name in names:                                   # no token crosses a space: one by one
        encoding = tokenizer.encode(name, add_special_tokens=False)
        encoding.truncate(length - 1 - len(ids))                             # the end needs a column
        spans.append(slice(len(ids), len(ids) + len(encoding)))
        ids += encoding.ids
        # CLIP marks the end of a word, T5 its beginning
        pieces += [piece.removesuffix("</w>").removeprefix("\u2581") for piece in encoding.tokens]
    pad = length - 1 - len(ids)
    ids += [tokenizer.token_to_id(marks.end)] + [tokenizer.token_to_id(marks.pad)] * pad
    return ids, [*pieces, "<eos>"] + ["<pad>"] * pad, spans


# ---------------------------------------------------------------------------- one tower


HEAD_DIM = 64                       # of every CLIP text tower; it leaves no trace in a checkpoint


class SelfAttention(nn.Module):
    def __init__(self, width, causal=True):
        super().__init__()
        if width % HEAD_DIM:
            raise ValueError(f"a width of {width} is no multiple of {HEAD_DIM}, the width of an attention head")
        self.causal = causal                             # text: a token sees those before it; pictures: all
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)     # 3 x (B, heads, L, HEAD_DIM)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)   # no padding mask, as published
        return self.out_proj(y.transpose(1, 2).flatten(2))                   # (B, L, W)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Layer(nn.Module):
    def __init__(self, width, hidden, quick_gelu, causal=True, eps=1e-5):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = SelfAttention(width, causal)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential()                       # its parts are named as the published keys are
        self.mlp.fc1 = nn.Linear(width, hidden)
        self.mlp.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.mlp.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPText(nn.Module):
    """A CLIP text tower: CLIP-L (quick GELU, no projection), CLIP-G (GELU, projection), or a judge's (judges.py).

    project: columns that the projection makes; 0: there is none.
    """

    def __init__(self, vocab, positions, width, hidden, layers, quick_gelu, project):
        super().__init__()
        self.vocab = vocab
        self.positions = positions
        self.width = width
        self.text_model = nn.Module()                    # nothing but names: those of the published keys
        self.text_model.embeddings = nn.Module()
        # Weights are given, because drawing them on the meta device would import a compiler for two seconds.
        tokens = torch.empty(vocab, width)
        places = torch.empty(positions, width)
        self.text_model.embeddings.token_embedding = nn.Embedding(vocab, width, _weight=tokens)
        self.text_model.embeddings.position_embedding = nn.Embedding(positions, width, _weight=places)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(Layer(width, hidden, quick_gelu) for _ in range(layers))
        self.text_model.final_layer_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, project, bias=False) if project else nn.Identity()

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None,
                        quick_gelu: bool | None = None) -> "CLIPText":
        """The tower of the shapes in `sd`, holding those very tensors.

        quick_gelu None: no projection, or an identity (SD3's folder layout), means CLIP-L and its quick GELU.
        ValueError names missing, surplus and misshapen keys.
        """
        if "final_layer_norm.weight" in sd:
            sd = {k if k.startswith("text_projection") else "text_model." + k: v for k, v in sd.items()}
        proj = sd.get("text_projection.weight")
        project = 0 if proj is None else shape(sd, "text_projection.weight", 2)[0]
        if quick_gelu is None:
            quick_gelu = proj is None or (not proj.is_meta and torch.equal(proj.float().cpu(), torch.eye(*proj.shape)))
        vocab, width = shape(sd, "text_model.embeddings.token_embedding.weight", 2)
        positions, _ = shape(sd, "text_model.embeddings.position_embedding.weight", 2)
        hidden, _ = shape(sd, "text_model.encoder.layers.0.mlp.fc1.weight", 2)
        layers = count(sd, "text_model.encoder.layers.")
        with torch.device("meta"):
            tower = CLIPText(vocab, positions, width, hidden, layers, quick_gelu, project)
        return assign(tower, sd, "CLIP text tower", device, dtype)

    @property
    def device(self) -> torch.device:
        return self.text_model.final_layer_norm.weight.device

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> hidden (B, L, W) after the last but one layer, not normed; pooled (B, pooled_dim): the last
        layer's row at the first end-of-text token (the largest id), normed and projected."""
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) + embeddings.position_embedding.weight[:ids.shape[1]]        # (B, L, W)
        for layer in self.text_model.encoder.layers:
            hidden = x
            x = layer(x)
        x = self.text_model.final_layer_norm(x)
        pooled = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]            # (B, W)
        return hidden, self.text_projection(pooled)                          # (B, L, W), (B, pooled_dim)


# ---------------------------------------------------------------------------- both towers


class TextCond(NamedTuple):
    ctx: Tensor                         # (B, M, ctx_dim); SD3: M/2 rows of CLIP, then zeros for T5; Flux: T5's rows
    pooled: Tensor                      # (B, pooled_dim)
    tokens: list[list[str]]             # what stands in each row of CLIP (Flux: of T5), padding included
    spans: list[list[slice]]            # for each prompt, the rows of each of its names


CACHE_SIZE = 16                     # lists of prompts; a prompt of Flux takes 4 MB in bf16


def cached(text, prompts):
    """What `text.encode_now` makes of prompts.  What inference encoded is kept: CACHE_SIZE lists of prompts.

    Noise levels and draws of one picture share its prompts, and all pictures the empty one; T5 is slow to ask again.
    """
    key = str(prompts)
    if not torch.is_inference_mode_enabled():            # training changes the weights, and wants gradients
        return text.encode_now(prompts)
    if key not in text.cache:
        if len(text.cache) == CACHE_SIZE:
            text.cache.clear()
        text.cache[key] = text.encode_now(prompts)
    return text.cache[key]


class TextEncoders(nn.Module):
    """What SD3 reads: both CLIP towers, and where they are given T5 and its tokenizer in place of the zero rows."""

    def __init__(self, clip_l, clip_g, tokenizer, ctx_dim, t5xxl=None, t5_tokenizer=None):
        super().__init__()
        if isinstance(clip_g.text_projection, nn.Identity):
            raise ValueError("the CLIP-G tower has no text_projection.weight: it is incomplete, or a CLIP-L tower")
        self.clip_l = clip_l
        self.clip_g = clip_g
        self.t5xxl = t5xxl
        self.t5_tokenizer = t5_tokenizer
        self.tokenizer = tokenizer
        self.ctx_dim = ctx_dim
        self.vocab = clip_l.vocab                        # tokens that have a row in the embedding
        self.length = clip_l.positions                   # rows of a tower: start, up to `room` tokens, end, padding
        self.room = self.length - 2
        self.width = clip_l.width + clip_g.width         # columns of the context that text fills
        self.pooled_dim = clip_l.width + clip_g.text_projection.out_features
        self.cache = {}                                  # prompts -> what `encode` made of them

    def n_tokens(self, name: str) -> int:
        """How many tokens a text takes, start and end not counted."""
        return len(self.tokenizer.encode(name).ids)

    def tokenize(self, prompt: str | list[str]) -> tuple[list[int], list[str], list[slice]]:
        """A prompt, or class names that become one -> ids padded to `length` as for CLIP-L, token strings, spans."""
        return tokenize(self.tokenizer, CLIP_MARKS, self.length, prompt)

    def encode(self, prompts: list[str] | list[list[str]]) -> TextCond:
        """Eq. 9: B prompts (or lists of class names) -> context, pooled vector, tokens and spans.

        A prompt that is too long is cut after `room` tokens, as published; callers that must not lose a
        name count with n_tokens first.  What inference has encoded is kept.
        """
        return cached(self, prompts)

    def encode_now(self, prompts):
        """`encode` without the cache."""
        ids, tokens, spans = zip(*map(self.tokenize, prompts))
        ids = torch.tensor(ids, device=self.clip_l.device)                   # (B, L)
        after_end = torch.arange(self.length, device=ids.device) > ids.argmax(-1, keepdim=True)  # (B, L)
        hidden_l, pooled_l = self.clip_l(ids)                                # (B, L, W_l), (B, W_l)
        hidden_g, pooled_g = self.clip_g(ids.masked_fill(after_end, 0))      # CLIP-G pads with 0, CLIP-L with the end
        clip = torch.cat([hidden_l, hidden_g], dim=-1)                       # (B, L, W_l+W_g)
        # zero columns up to ctx_dim on the right, L zero rows below in T5's place
        ctx = F.pad(clip, (0, self.ctx_dim - self.width, 0, self.length))    # (B, 2L, ctx_dim)
        if self.t5xxl is not None:
            t5_ids = [tokenize(self.t5_tokenizer, T5_MARKS, self.length, prompt)[0] for prompt in prompts]
            t5_ids = torch.tensor(t5_ids, device=self.t5xxl.device)          # (B, L)
            ctx[:, self.length:] = self.t5xxl(t5_ids)                        # (B, L, ctx_dim)
        return TextCond(ctx, torch.cat([pooled_l, pooled_g], dim=-1), list(tokens), list(spans))


class FluxText(nn.Module):
    """What Flux reads: T5's rows as context, CLIP-L's pooled vector; the other face of TextEncoders."""

    def __init__(self, clip_l: CLIPText, t5xxl: T5, clip_tokenizer: Tokenizer, tokenizer: Tokenizer, length: int):
        super().__init__()
        self.clip_l = clip_l
        self.t5xxl = t5xxl
        self.clip_tokenizer = clip_tokenizer
        self.tokenizer = tokenizer                       # T5's
        self.length = length                             # rows of T5: up to `room` tokens, end, padding
        self.room = length - 1
        self.width = t5xxl.width                         # columns of the context
        self.pooled_dim = clip_l.width
        self.cache = {}                                  # as in TextEncoders

    def n_tokens(self, name: str) -> int:
        """How many tokens of T5 a text takes, the end not counted."""
        return len(self.tokenizer.encode(name, add_special_tokens=False).ids)

    def tokenize(self, prompt: str | list[str]) -> tuple[list[int], list[str], list[slice]]:
        """A prompt, or class names that become one -> T5's ids padded to `length`, token strings, spans."""
        return tokenize(self.tokenizer, T5_MARKS, self.length, prompt)

    def encode(self, prompts: list[str] | list[list[str]]) -> TextCond:
        """B prompts (or lists of class names) -> context (B, length, W), pooled vector (B, W_l), tokens and spans.

        Padding is attended to, in T5 and in Flux, as published.  What is too long is cut, for each tower by itself.
        What inference has encoded is kept.
        """
        return cached(self, prompts)

    def encode_now(self, prompts):
        """`encode` without the cache."""
        clip_ids = [tokenize(self.clip_tokenizer, CLIP_MARKS, self.clip_l.positions, prompt)[0] for prompt in prompts]
        ids, tokens, spans = zip(*map(self.tokenize, prompts))
        _, pooled = self.clip_l(torch.tensor(clip_ids, device=self.clip_l.device))               # (B, W_l)
        ctx = self.t5xxl(torch.tensor(ids, device=self.t5xxl.device))        # (B, L, W)
        return TextCond(ctx.to(pooled), pooled, list(tokens), list(spans))


# ---------------------------------------------------------------------------- class names -> prompts


def split_classes(text: TextEncoders | FluxText, classes: Sequence[str]) -> list[list[str]]:
    """Class names -> as few prompts as hold them all, equally full as far as order allows; no name is cut.

    ValueError: no names, a name without tokens, a name longer than a prompt.
    """
    if not classes:
        raise ValueError("the list of classes is empty; name at least one thing to segment")
    limit = text.room
    sizes = [text.n_tokens(name) for name in classes]
    for name, n in zip(classes, sizes):
        if n == 0:
            raise ValueError(f"the class name {name!r} has no token; give it letters or digits")
        if n > limit:
            raise ValueError(f"the class name {name[:40]!r}... takes {n} tokens; a prompt has room for {limit}")

    def fill(room):
        prompts = []
        left = 0
        for name, n in zip(classes, sizes):
            if n > left:
                prompts.append([])
                left = room
            prompts[-1].append(name)
            left -= n
        return prompts

    # The least room that needs no more prompts: a last prompt of one name would have little competition for attention.
    fewest = len(fill(limit))
    for room in range(max(sizes), limit + 1):
        prompts = fill(room)
        if len(prompts) == fewest:
            return prompts

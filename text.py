"""From words to what an MM-DiT reads: tokens, the CLIP-L and CLIP-G text towers, context and pooled vector.

Context rows are [CLIP-L | CLIP-G], zero-padded to the context width, followed by as many zero rows in the
place of the T5 encoder, which the paper leaves out (A.1).  Key names are those of the published files.

    cond = text.encode([["bicycle", "cat", "person"]])      # Eq. 9; cond.spans[0][1]: the columns of "cat"
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from support.checkpoint import assign, count, shape

# ---------------------------------------------------------------------------- tokens


def byte_symbols() -> list[str]:
    """CLIP's 256 printable stand-ins for the bytes, in vocabulary order: visible Latin-1 first, then the rest."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in visible] + [chr(256 + i) for i in range(256 - len(visible))]


def clip_tokenizer(merges: list[str]) -> Tokenizer:
    """CLIP's lower-casing byte-level BPE. Its vocabulary follows from the merges ("a b" each) alone: bytes,
    bytes at a word's end, one entry a merge, then start and end of text, the largest ids.
    ValueError: not a list of merges."""
    alphabet = byte_symbols()
    if not isinstance(merges, list) or not all(isinstance(m, str) and m.count(" ") == 1 for m in merges):
        raise ValueError('the tokenizer\'s merges must be a list of texts such as "a b"')
    pieces = alphabet + [s + "</w>" for s in alphabet] + [m.replace(" ", "") for m in merges]
    vocab = {piece: i for i, piece in enumerate(pieces + ["<|startoftext|>", "<|endoftext|>"])}
    unknown = [m for m in merges if not vocab.keys() >= set(m.split(" "))]
    if unknown:
        raise ValueError(f"the tokenizer's merges join pieces that no earlier merge makes: {unknown[0]!r}")
    bpe = models.BPE(vocab, [tuple(m.split(" ")) for m in merges], end_of_word_suffix="</w>",
                     continuing_subword_prefix="", unk_token="<|endoftext|>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


# ---------------------------------------------------------------------------- one tower


HEAD_DIM = 64                       # of every CLIP text tower; it leaves no trace in a checkpoint


class SelfAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)        # 3 x (B, heads, L, HEAD_DIM)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)          # no padding mask, as published
        return self.out_proj(y.transpose(1, 2).flatten(2))                   # (B, L, W)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.fc1, self.fc2, self.quick_gelu = nn.Linear(width, hidden), nn.Linear(hidden, width), quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(width), SelfAttention(width)
        self.layer_norm2, self.mlp = nn.LayerNorm(width), MLP(width, hidden, quick_gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, vocab: int, positions: int, width: int):
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(vocab, width), nn.Embedding(positions, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]     # (B, L, W)


class Layers(nn.Module):
    def __init__(self, layers: int, width: int, hidden: int, quick_gelu: bool):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, hidden, quick_gelu) for _ in range(layers))


class TextModel(nn.Module):
    def __init__(self, vocab: int, positions: int, width: int, hidden: int, layers: int, quick_gelu: bool):
        super().__init__()
        self.embeddings = Embeddings(vocab, positions, width)
        self.encoder = Layers(layers, width, hidden, quick_gelu)
        self.final_layer_norm = nn.LayerNorm(width)


class CLIPText(nn.Module):
    """A CLIP text tower: CLIP-L (quick GELU, no projection) or CLIP-G (GELU, projection)."""

    def __init__(self, vocab: int, positions: int, width: int, hidden: int, layers: int, quick_gelu: bool,
                 project: bool):
        super().__init__()
        self.text_model = TextModel(vocab, positions, width, hidden, layers, quick_gelu)
        self.text_projection = nn.Linear(width, width, bias=False) if project else None

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: str | torch.device | None = None,
                        dtype: torch.dtype | None = None) -> "CLIPText":
        """The tower of the shapes in `sd`. No projection, or an identity (SD3's folder layout), means CLIP-L and
        its quick GELU.  ValueError names missing, surplus and misshapen keys."""
        if "text_model.final_layer_norm.weight" not in sd and "final_layer_norm.weight" in sd:
            sd = {k if k.startswith("text_projection") else "text_model." + k: v for k, v in sd.items()}
        proj = sd.get("text_projection.weight")
        is_l = proj is None or not proj.is_meta and torch.equal(proj.float().cpu(), torch.eye(*proj.shape))
        vocab, width = shape(sd, "text_model.embeddings.token_embedding.weight", 2)
        with torch.device("meta"):
            tower = CLIPText(vocab, shape(sd, "text_model.embeddings.position_embedding.weight", 2)[0], width,
                             shape(sd, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
                             count(sd, "text_model.encoder.layers."), is_l, proj is not None)
        return assign(tower, sd, "CLIP text tower", device, dtype)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) -> hidden (B, L, W) after the last but one layer, not normed; pooled (B, P): the last
        layer's row at the first end-of-text token (the largest id), normed and projected."""
        x = self.text_model.embeddings(ids)                                  # (B, L, W)
        for layer in self.text_model.encoder.layers:
            hidden, x = x, layer(x)
        x = self.text_model.final_layer_norm(x)
        pooled = x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]            # (B, W)
        return hidden, pooled if self.text_projection is None else self.text_projection(pooled)


# ---------------------------------------------------------------------------- both towers


class TextCond(NamedTuple):
    ctx: Tensor                         # (B, M, ctx_dim); the first M/2 rows are CLIP's, the rest T5's zeros
    pooled: Tensor                      # (B, pooled_dim)
    tokens: list[list[str]]             # what stands in each CLIP row, padding included
    spans: list[list[slice]]            # for each prompt, the rows of each of its names


class TextEncoders(nn.Module):
    def __init__(self, clip_l: CLIPText, clip_g: CLIPText, tokenizer: Tokenizer, ctx_dim: int):
        super().__init__()
        if clip_g.text_projection is None:
            raise ValueError("the CLIP-G tower has no text_projection.weight: it is incomplete, or a CLIP-L tower")
        self.clip_l, self.clip_g, self.tokenizer, self.ctx_dim = clip_l, clip_g, tokenizer, ctx_dim

    @property
    def length(self) -> int:
        """Rows of a CLIP tower: start, up to length - 2 tokens, end, padding."""
        return len(self.clip_l.text_model.embeddings.position_embedding.weight)

    def n_tokens(self, name: str) -> int:
        """How many tokens a text takes, start and end not counted."""
        return len(self.tokenizer.encode(name).ids)

    def tokenize(self, prompt: str | list[str]) -> tuple[list[int], list[str], list[slice]]:
        """A prompt, or class names that become one ("a", "b c" -> "a b c") -> ids padded to `length` as for
        CLIP-L, token strings, and for each name (of a plain prompt: each word) the columns of its tokens, found
        by character offsets.  A name that was cut off keeps the tokens
        that are left, or gets an empty slice."""
        names = prompt.split() if isinstance(prompt, str) else prompt
        text = " ".join(names)
        enc = self.tokenizer.encode(text)
        sot, eot = (self.tokenizer.token_to_id(f"<|{x}oftext|>") for x in ("start", "end"))
        room = self.length - 2
        starts = [a for a, _ in enc.offsets[:room]]
        spans, at = [], 0
        for name in names:
            inside = [i for i, a in enumerate(starts) if at <= a < at + len(name)]
            spans.append(slice(1 + inside[0], 2 + inside[-1]) if inside else slice(0, 0))    # column 0 is <sos>
            at += len(name) + 1
        n_pad = self.length - 2 - len(enc.ids[:room])
        ids = [sot, *enc.ids[:room], eot] + [eot] * n_pad
        tokens = ["<sos>", *(t.removesuffix("</w>") for t in enc.tokens[:room]), "<eos>"] + ["<pad>"] * n_pad
        return ids, tokens, spans

    def encode(self, prompts: list[str] | list[list[str]]) -> TextCond:
        """Eq. 9: B prompts (or lists of class names) -> context, pooled vector, tokens and spans.

        A prompt that is too long is cut after `length` - 2 tokens, as published; callers that must not lose a
        name count with n_tokens first.
        """
        ids, tokens, spans = zip(*map(self.tokenize, prompts))
        ids = torch.tensor(ids, device=self.clip_l.text_model.final_layer_norm.weight.device)
        end = ids.argmax(-1, keepdim=True)
        after_end = torch.arange(self.length, device=ids.device) > end                       # (B, L)
        hidden_l, pooled_l = self.clip_l(ids)                                # (B, L, W_l), (B, W_l)
        hidden_g, pooled_g = self.clip_g(ids.masked_fill(after_end, 0))      # CLIP-G pads with 0, CLIP-L with the end
        clip = torch.cat([hidden_l, hidden_g], dim=-1)                       # (B, L, W_l+W_g)
        # zero columns up to ctx_dim on the right, L zero rows below in T5's place
        ctx = F.pad(clip, (0, self.ctx_dim - clip.shape[-1], 0, self.length))                # (B, 2L, ctx_dim)
        return TextCond(ctx, torch.cat([pooled_l, pooled_g], dim=-1), list(tokens), list(spans))

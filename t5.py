"""The encoder of T5 (v1.1), which Flux reads its prompts with, and its tokenizer.

Module names are the published checkpoints' key names.  What a reader of BERT or CLIP would not expect: attention logits
are not divided by sqrt(d), positions come in as a bias on these logits, the same in all layers, and there are no
biases and no means: norms are RMS norms.

    hidden = T5.from_state_dict(sd)(ids)                 # (B, L) -> (B, L, W)
"""
import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from support.checkpoint import Device, Dtype, assign, count, on_device, shape

# ---------------------------------------------------------------------------- tokens


def t5_tokenizer(text: str) -> Tokenizer:
    """The unigram tokenizer of a tokenizer.json's text.  ValueError: another kind, or one without <pad> and </s>."""
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as e:                                                   # the library has no class for its errors
        raise ValueError(f"T5's tokenizer.json cannot be read: {str(e).splitlines()[0]}") from None
    if tokenizer.token_to_id("<pad>") is None or tokenizer.token_to_id("</s>") is None:
        raise ValueError("T5's tokenizer.json should hold the tokens <pad> and </s>")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# ---------------------------------------------------------------------------- network

MAX_DISTANCE = 128                  # tokens further apart than this share a bias; it leaves no trace in a checkpoint


def distance_buckets(L: int, buckets: int, device: Device = None) -> Tensor:
    """(L, L): which of `buckets` learned biases query i adds to its logit for key j.

    Half of them for keys before or at the query, half for keys after it.  In each half the first half stands for one
    distance each, the others for ranges of distances that grow geometrically up to MAX_DISTANCE.
    """
    at = torch.arange(L, device=device)
    offset = at[None, :] - at[:, None]                                       # (L, L), key - query
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()                                                  # (L, L)
    growth = torch.log(distance.clamp_min(1) / exact) / math.log(MAX_DISTANCE / exact)
    ranges = exact + (growth * (half - exact)).long()                        # (L, L), rounded down
    bucket = torch.where(distance < exact, distance, ranges.clamp_max(half - 1))
    return bucket + half * (offset > 0)                                      # (L, L)


class Norm(nn.Module):
    """RMS norm of the fp32 stream, in the weights' dtype."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=1e-6).to(self.weight.dtype) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, width, inner, heads, buckets=None):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        if buckets is not None:                          # the first layer's, for all layers
            table = torch.empty(buckets, heads)          # given, as in text.CLIPText
            self.relative_attention_bias = nn.Embedding(buckets, heads, _weight=table)

    def forward(self, x, bias):
        """x (B, L, W), bias (1, heads, L, L); every token sees every other, padding too, as in the published code."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # 3 x (B, heads, L, d)
                   for proj in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(y.transpose(1, 2).flatten(2))                          # (B, L, W)


class DenseReluDense(nn.Module):
    """The gated MLP, whose published name is older than its GELU."""

    def __init__(self, width, hidden):
        super().__init__()
        self.wi_0 = nn.Linear(width, hidden, bias=False)
        self.wi_1 = nn.Linear(width, hidden, bias=False)
        self.wo = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        y = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)          # (B, L, hidden)
        if y.dtype == torch.float16:                     # the sums of this product leave float16's range
            return F.linear(y.float(), self.wo.weight.float())               # (B, L, W)
        return self.wo(y)                                                    # (B, L, W)


def named(**modules: nn.Module) -> nn.Module:
    """A module that is nothing but the published names of these."""
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


class T5(nn.Module):
    def __init__(self, vocab, width, inner, heads, hidden, layers, buckets):
        super().__init__()
        self.vocab = vocab
        self.width = width
        blocks = nn.ModuleList()
        for i in range(layers):
            attention = SelfAttention(width, inner, heads, buckets if i == 0 else None)
            first = named(SelfAttention=attention, layer_norm=Norm(width))
            second = named(DenseReluDense=DenseReluDense(width, hidden), layer_norm=Norm(width))
            blocks.append(named(layer=nn.ModuleList([first, second])))
        self.shared = nn.Embedding(vocab, width, _weight=torch.empty(vocab, width))
        self.encoder = named(block=blocks, final_layer_norm=Norm(width))

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None) -> "T5":
        """The encoder of the shapes in `sd`, holding those very tensors.

        The embedding may stand there twice, as in the published single files.
        ValueError names missing, surplus and misshapen keys, or says what cannot be cut into heads or buckets.
        """
        sd = dict(sd)
        twin = sd.pop("encoder.embed_tokens.weight", None)
        if twin is not None:
            sd.setdefault("shared.weight", twin)
        vocab, width = shape(sd, "shared.weight", 2)
        inner, _ = shape(sd, "encoder.block.0.layer.0.SelfAttention.q.weight", 2)
        buckets, heads = shape(sd, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)
        hidden, _ = shape(sd, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2)
        layers = count(sd, "encoder.block.")
        if inner % heads or buckets < 4:                 # half of the buckets for each side, half of these for ranges
            raise ValueError(f"T5's attention cannot have {inner} columns, {heads} heads and {buckets} buckets")
        with torch.device("meta"):
            tower = T5(vocab, width, inner, heads, hidden, layers, buckets)
        return assign(tower, sd, "T5 encoder", device, dtype)

    @property
    def device(self) -> torch.device:
        return self.shared.weight.device

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L), padding included -> (B, L, W), normed.  The sums between the layers are kept in fp32."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.to(ids.device)
        buckets = distance_buckets(ids.shape[1], len(table), ids.device)     # (L, L)
        bias = table[buckets].permute(2, 0, 1)[None]                         # (1, heads, L, L)
        x = self.shared(ids).float()                                         # (B, L, W)
        for block in self.encoder.block:
            attention, mlp = on_device(block, ids.device).layer              # where T5 does not fit, one by one
            x = x + attention.SelfAttention(attention.layer_norm(x), bias).float()
            x = x + mlp.DenseReluDense(mlp.layer_norm(x)).float()
        return self.encoder.final_layer_norm(x)                              # (B, L, W)

"""What full-size models need, counted from their shapes: operations of each kind of work, and bytes.

Networks are built on the meta device, where tensors have shapes and no numbers. One rule counts almost all operations:
each weight of a matrix or of a convolution multiplies and adds once for every token or pixel that it is applied to,
2 FLOP. Attention adds Q K^T and A V. tests/test_forecast.py compares with PyTorch's own counter.
"""
import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from flux import Flux, FluxConfig, SingleBlock
from loading import Preset, Seg4Diff, flux_preset
from mmdit import JointBlock, MMDiT, MMDiTConfig
from t5 import T5
from text import CLIPText, byte_symbols
from vae import VAE

# ---------------------------------------------------------------------------- the published models, by their numbers

SD3 = MMDiTConfig(width=1536, depth=24, head_dim=64, patch=2, channels=16, pos_grid=192, ctx_dim=4096, pooled_dim=2048,
                  mlp=6144, time_dim=256)
FLUX = FluxConfig(width=3072, double_blocks=19, single_blocks=38, head_dim=128, columns=64, ctx_dim=4096,
                  pooled_dim=768, mlp=12288, time_dim=256)
TRANSFORMERS = {
    "sd3": SD3,
    "sd3.5-medium": replace(SD3, pos_grid=384, qk_norm=True, dual_blocks=tuple(range(13))),
    "sd3.5-large": replace(SD3, width=2432, depth=38, mlp=9728, qk_norm=True),
    "flux": FLUX,
    "flux-schnell": replace(FLUX, guidance=False)}
CLIP_L = {"vocab": 49408, "positions": 77, "width": 768, "hidden": 3072, "layers": 12}
CLIP_G = {"vocab": 49408, "positions": 77, "width": 1280, "hidden": 5120, "layers": 32}
T5XXL = {"vocab": 32128, "width": 4096, "inner": 4096, "heads": 64, "hidden": 10240, "layers": 24, "buckets": 32}


class Shapes(NamedTuple):
    """A model without numbers: its networks on the meta device, under the names of weights.PREFIXES, and its preset."""
    mmdit: MMDiT | Flux
    vae: VAE
    clip_l: CLIPText
    clip_g: CLIPText | None
    t5xxl: T5 | None
    preset: Preset

    @property
    def image_tokens(self) -> int:
        """N of one picture."""
        cfg = self.mmdit.config
        patch = cfg.patch_of(self.vae.channels) if isinstance(cfg, FluxConfig) else cfg.patch
        return (self.preset.size // self.vae.factor // patch) ** 2

    @property
    def text_tokens(self) -> int:
        """M of one prompt: T5's rows, or CLIP's and as many zeros."""
        return 2 * self.clip_l.positions if self.t5xxl is None else self.preset.text_length


@cache
def published(name: str) -> Shapes:
    """The shapes of a model of TRANSFORMERS, as its files have them."""
    cfg = TRANSFORMERS[name]
    preset = flux_preset(cfg.guidance) if isinstance(cfg, FluxConfig) else Preset()
    with torch.device("meta"):
        vae = VAE((128, 256, 512, 512), 2, 3, SD3.channels)
        clip_l = CLIPText(**CLIP_L, quick_gelu=True, project=0)
        if isinstance(cfg, FluxConfig):
            return Shapes(Flux(cfg), vae, clip_l, None, T5(**T5XXL), preset)
        clip_g = CLIPText(**CLIP_G, quick_gelu=False, project=CLIP_G["width"])
        return Shapes(MMDiT(cfg), vae, clip_l, clip_g, None, preset)


def shapes_of(model: Seg4Diff) -> Shapes:
    """The shapes of an SD3 that is loaded, T5 not among them."""
    parts = (model.transformer, model.vae, model.text.clip_l, model.text.clip_g)
    return Shapes(*(copy.deepcopy(part).to("meta") for part in parts), None, model.preset)


def some_merges(vocab: int) -> list[str]:
    """Merges for CLIP's tokenizer, pairs of bytes, as many as its vocabulary is large."""
    symbols = byte_symbols()
    return [f"{a} {b}" for a in symbols for b in symbols][:vocab - 2 * len(symbols) - 2]


# ---------------------------------------------------------------------------- operations, counted


@dataclass(frozen=True)
class Flop:
    """Operations of a transformer or of text encoders."""
    linear: float = 0                   # of their matrices
    attention: float = 0

    def __add__(self, other):
        return Flop(self.linear + other.linear, self.attention + other.attention)

    @property
    def total(self) -> float:
        return self.linear + self.attention


def weights_in(*modules: nn.Module | None) -> int:
    """How many weights the matrices and convolutions of these have; a module that is None has none."""
    total = 0
    there = [module for module in modules if module is not None]
    for layer in nn.ModuleList(there).modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            total += layer.weight.numel()
    return total


def attention(queries: int, keys: int, width: int) -> int:
    """Q K^T and A V of all heads, which are `width` wide together."""
    return 4 * queries * keys * width


def block_flop(block: nn.Module, N: int, M: int, early: bool = False) -> Flop:
    """One block with N image and M text tokens; early: only up to its q, k, v, where segmentation stops."""
    if isinstance(block, SingleBlock):
        matrices = [block.linear1] if early else [block.linear1, block.linear2]
        D = block.linear1.in_features
        linear = (N + M) * weights_in(*matrices) + weights_in(block.modulation)
        return Flop(2 * linear, 0 if early else attention(N + M, N + M, D))
    if isinstance(block, JointBlock):
        image = [block.x_block.attn, block.x_block.attn2, block.x_block.mlp]
        text = [block.context_block.attn, block.context_block.mlp]
        once = [block.x_block.adaLN_modulation, block.context_block.adaLN_modulation]
    else:
        image = [block.img_attn, block.img_mlp]
        text = [block.txt_attn, block.txt_mlp]
        once = [block.img_mod, block.txt_mod]
    D = image[0].qkv.in_features
    if early:
        return Flop(2 * N * weights_in(image[0].qkv) + 2 * M * weights_in(text[0].qkv) + 2 * weights_in(*once))
    linear = 2 * N * weights_in(*image) + 2 * M * weights_in(*text) + 2 * weights_in(*once)
    dual = isinstance(block, JointBlock) and block.x_block.attn2 is not None
    return Flop(linear, attention(N + M, N + M, D) + (attention(N, N, D) if dual else 0))


def transformer_flop(shapes: Shapes, stop_at: int | None = None) -> Flop:
    """One forward pass of one picture.  Left out: the layers before and after the blocks, 0.1 % of it."""
    N = shapes.image_tokens
    M = shapes.text_tokens
    total = Flop()
    for i, block in enumerate(shapes.mmdit.blocks):
        if i == stop_at:
            return total + block_flop(block, N, M, early=True)
        total += block_flop(block, N, M)
    return total


def text_flop(shapes: Shapes) -> Flop:
    """All text encoders on one prompt."""
    total = Flop()
    for tower in (shapes.clip_l, shapes.clip_g):
        if tower is not None:
            L = tower.positions
            layers = tower.text_model.encoder.layers
            linear = 2 * L * weights_in(layers) + 2 * weights_in(tower.text_projection)
            total += Flop(linear, len(layers) * attention(L, L, tower.width))
    if shapes.t5xxl is not None:
        rows = shapes.preset.text_length
        layers = shapes.t5xxl.encoder.block
        inner = layers[0].layer[0].SelfAttention.q.out_features
        total += Flop(2 * rows * weights_in(layers), len(layers) * attention(rows, rows, inner))
    return total


def middle_flop(middle: nn.Module, pixels: int) -> int:
    """The middle of encoder or decoder, with its attention over all positions."""
    return 2 * pixels * weights_in(middle) + attention(pixels, pixels, middle.attn_1.q.in_channels)


def encode_flop(vae: VAE, size: int) -> int:
    """A picture of size x size pixels to a latent."""
    encoder = vae.encoder
    pixels = size ** 2
    total = 2 * pixels * weights_in(encoder.conv_in)
    for level in encoder.down:
        total += 2 * pixels * weights_in(level.block)
        if weights_in(level.downsample):
            pixels //= 4
            total += 2 * pixels * weights_in(level.downsample)
    return total + middle_flop(encoder.mid, pixels) + 2 * pixels * weights_in(encoder.conv_out)


def decode_flop(vae: VAE, size: int) -> int:
    """A latent to a picture of size x size pixels."""
    decoder = vae.decoder
    pixels = (size // vae.factor) ** 2
    total = 2 * pixels * weights_in(decoder.conv_in) + middle_flop(decoder.mid, pixels)
    for level in reversed(decoder.up):
        total += 2 * pixels * weights_in(level.block)
        if weights_in(level.upsample):
            pixels *= 4
            total += 2 * pixels * weights_in(level.upsample)
    return total + 2 * pixels * weights_in(decoder.conv_out)


def maps_flop(N: int, M: int, D: int) -> int:
    """A_I2T, whose softmax goes over all keys (Q K^T alone), and the step through I2I: two readings, both in fp32."""
    return attention(N, N + M, D) // 2 + attention(N, N, D)


class Work(NamedTuple):
    """What a picture costs: FLOP that the burst has a speed for each, and passes over the blocks and over T5."""
    matrix: float                       # transformer and text encoders
    conv: float                         # autoencoder
    maps: float                         # attention maps, in fp32
    passes: int                         # how often each block of the transformer is run
    prompts: int                        # how often T5 is


def segmentation(shapes: Shapes) -> Work:
    """A picture of `evaluate.py`: both of its readings, off one pass up to the expert block."""
    forward = transformer_flop(shapes, stop_at=shapes.preset.block) + text_flop(shapes)
    maps = maps_flop(shapes.image_tokens, shapes.text_tokens, shapes.mmdit.config.width)
    return Work(forward.total, encode_flop(shapes.vae, shapes.preset.size), maps, 1, 1)


def branches(shapes: Shapes) -> int:
    """How many versions of a picture go through the sampler at once: classifier-free guidance has two."""
    return 1 if shapes.preset.cfg == 1 else 2


def generation(shapes: Shapes) -> Work:
    """A picture of `seg4diff.py generate`: two prompts, its own and the empty one."""
    steps = shapes.preset.steps
    matrix = steps * branches(shapes) * transformer_flop(shapes).total + 2 * text_flop(shapes).total
    return Work(matrix, decode_flop(shapes.vae, shapes.preset.size), 0, steps, 2)


def training(shapes: Shapes) -> Work:
    """A picture of a step of `train_magnet.py`, with checkpointing: the forward pass twice, and the backward pass.

    That one takes a matrix once, as its weights are frozen, and attention twice; the LoRA's 1 % is left out. The maps
    are computed, computed again, and led back through.
    """
    forward = transformer_flop(shapes)
    maps = attention(shapes.image_tokens, shapes.image_tokens + shapes.text_tokens, shapes.mmdit.config.width) // 2
    matrix = 3 * forward.linear + 4 * forward.attention + text_flop(shapes).total
    return Work(matrix, encode_flop(shapes.vae, shapes.preset.size), 4 * maps, 2, 1)


# ---------------------------------------------------------------------------- bytes, counted


@cache
def values(shapes: Shapes, segment_only: bool = False) -> dict[str, int]:
    """How many values of each part are loaded, as weights.sizes counts them in files."""
    found = {}
    for part in ("mmdit", "vae", "clip_l", "clip_g", "t5xxl"):
        module = getattr(shapes, part)
        if module is not None:
            found[part] = sum(x.numel() for x in module.state_dict().values())
    if segment_only:
        for block in list(shapes.mmdit.blocks)[shapes.preset.block + 1:]:
            found["mmdit"] -= sum(p.numel() for p in block.parameters())
    return found


def encode_bytes(vae: VAE, size: int, itemsize: int) -> int:
    """At the picture's own size a residual block has three maps of its channels in memory."""
    return 3 * vae.encoder.conv_in.out_channels * size ** 2 * itemsize


def decode_bytes(vae: VAE, size: int, itemsize: int) -> int:
    """The last level's first block takes twice the channels: two such maps, and one that it makes of them."""
    block = vae.decoder.up[0].block[0]
    return (2 * block.conv1.in_channels + block.conv1.out_channels) * size ** 2 * itemsize


ROWS = 30                               # of D numbers for a token: the most that a block's forward pass has at once
KEPT = 26                               # the same when it is led back through, what the pass has kept included


def forward_bytes(shapes: Shapes, batch: int, itemsize: int, rows: int = ROWS) -> int:
    tokens = shapes.image_tokens + shapes.text_tokens
    return batch * tokens * shapes.mmdit.config.width * itemsize * rows


CHUNK = 512                             # rows of A at once, as mmdit.i2t_attention takes them


def maps_bytes(shapes: Shapes, batch: int, copies: int) -> int:
    """I2T's maps in fp32, and `copies` of the rows of A that are worked on at once, logits and softmax."""
    N = shapes.image_tokens
    M = shapes.text_tokens
    return 4 * batch * shapes.mmdit.config.heads * (N * M + copies * min(CHUNK, N) * (N + M))


TASKS = {"segment": segmentation, "generate": generation, "magnet": training}


def work_bytes(shapes: Shapes, task: str, dtype: torch.dtype, kind: str, batch: int) -> int:
    """The most that is computed at once.  kind: of device; on MPS the autoencoder's norms are in fp32 (vae.Norm)."""
    size = shapes.preset.size
    wide = 4 if kind == "mps" else dtype.itemsize
    encode = encode_bytes(shapes.vae, size, wide)
    if task == "segment":
        return max(encode, forward_bytes(shapes, batch, dtype.itemsize), maps_bytes(shapes, batch, copies=2))
    if task == "generate":
        forward = forward_bytes(shapes, batch * branches(shapes), dtype.itemsize)
        return max(decode_bytes(shapes.vae, size, wide), forward)
    # MAGNET keeps what each block begins with; on top of it one block's, or the maps with their gradients
    kept = forward_bytes(shapes, batch, dtype.itemsize, rows=shapes.mmdit.config.depth)
    back = forward_bytes(shapes, batch, dtype.itemsize, rows=KEPT)
    return max(encode, kept + max(back, maps_bytes(shapes, batch, copies=5)))

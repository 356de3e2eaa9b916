"""The transformer of Flux.1 (App. C.2), to be read beside mmdit.py, whose joint attention it uses.

Module names are the published checkpoints' key names, as in mmdit.py, and so is the forward's contract.

    vel, taps = transformer(z, sigma, ctx, pooled, guidance=3.5, capture={12})
    maps = i2t_attention(taps[12])                       # (B, H, N, M)

What differs from SD3, and why:
    blocks          first double ones, as SD3's: a stream of weights for each modality.  Then single ones, where image
                    and text share one: fewer weights.  They are numbered after them: 0 to 18 double, 19 to 56 single.
    single block    attention and MLP read the same input side by side, and one matrix puts both back: one wait less.
    positions       rotary (RoPE): q and k are rotated by their token's row and column, so that their product knows the
                    distance; nothing is added to the image tokens, and any grid fits.  Text tokens are not rotated.
    q/k norm        always
    text            T5's rows alone; CLIP-L's pooled vector modulates the blocks, together with the time
    guidance        a number that the network reads (dev): it learned to draw what classifier-free guidance would,
                    in one pass.  schnell has learned one strength and reads none.
    patches         are cut inside, with the channel as the slowest of a token's numbers
Flux joins text first and image second.  No token's number depends on where it stands in the sequence, so here the order
is the paper's (Eq. 3), image tokens first, throughout.
"""
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdit import Edit, FinalLayer, JointQKV, check_run, joint_attention, modulate, sinusoids
from support.checkpoint import Device, Dtype, assign, count, on_device, shape

# ---------------------------------------------------------------------------- config


@dataclass(frozen=True)
class FluxConfig:
    width: int                      # D
    double_blocks: int
    single_blocks: int
    head_dim: int                   # d
    columns: int                    # numbers of a token, C * patch^2
    ctx_dim: int                    # width of a context row
    pooled_dim: int                 # width of the pooled text vector
    mlp: int                        # hidden width of the MLPs
    time_dim: int                   # number of sinusoids of the time embedding
    guidance: bool = True           # whether it reads a guidance strength: dev does, schnell does not
    whole: bool = True              # False: the blocks after some block are missing, enough for segmentation

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def depth(self) -> int:
        return self.double_blocks + self.single_blocks

    def patch_of(self, channels: int) -> int:
        """Latent pixels per token and side, where a latent has `channels` channels.  ValueError: no whole number."""
        side = math.isqrt(self.columns // channels)
        if side < 1 or side * side * channels != self.columns:
            raise ValueError(f"a token of {self.columns} numbers is no square patch of a latent of {channels} channels")
        return side

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor]) -> "FluxConfig":
        """Everything the architecture needs, from the shapes of Flux's original keys (no prefix) alone.

        ValueError names the key that is missing, or says that heads are no multiple of 32 wide, which the rotation
        needs.
        """
        double = count(sd, "double_blocks.")
        single = count(sd, "single_blocks.")
        width, columns = shape(sd, "img_in.weight", 2)
        head_dim, = shape(sd, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
        if head_dim % 32:
            raise ValueError(f"heads of width {head_dim} cannot be rotated: it should be a multiple of 32")
        return FluxConfig(
            width=width, double_blocks=double, single_blocks=single, head_dim=head_dim, columns=columns,
            ctx_dim=shape(sd, "txt_in.weight", 2)[1],
            pooled_dim=shape(sd, "vector_in.in_layer.weight", 2)[1],
            mlp=shape(sd, "double_blocks.0.img_mlp.0.weight", 2)[0],
            time_dim=shape(sd, "time_in.in_layer.weight", 2)[1],
            guidance=any(key.startswith("guidance_in.") for key in sd),
            # what is read for segmentation alone ends with a block, most often a double one
            whole=single > 0 and any(key.startswith("final_layer.") for key in sd))


# ---------------------------------------------------------------------------- positions


class Rotary(NamedTuple):
    """Rotary position embedding (RoPE): the angles by which each token's place rotates its q and k."""
    grid: tuple[int, int]           # (h, w)
    cos: Tensor                     # (N+M, d/2) fp32
    sin: Tensor                     # (N+M, d/2)


def rotary(grid: tuple[int, int], M: int, head_dim: int, device: Device) -> Rotary:
    """Angles of h*w image tokens, row-major, then of M text tokens, whose angles are 0.

    A head's d numbers are d/2 pairs: the first d/16 belong to an axis that generation leaves at 0, the next 7d/32 turn
    with the row, the last 7d/32 with the column, at speeds from 1 down to almost 1/10000 radian a token.
    """
    h, w = grid
    pairs = 7 * head_dim // 32
    speed = 10000 ** (-torch.arange(pairs, device=device) / pairs)           # (7d/32,)
    rows = torch.arange(h, device=device)[:, None] * speed                   # (h, 7d/32)
    columns = torch.arange(w, device=device)[:, None] * speed                # (w, 7d/32)
    angles = torch.zeros(h * w + M, head_dim // 2, device=device)            # (N+M, d/2)
    angles[:h * w, -2 * pairs:-pairs] = rows.repeat_interleave(w, dim=0)     # (N, 7d/32)
    angles[:h * w, -pairs:] = columns.repeat(h, 1)                           # (N, 7d/32)
    return Rotary(grid, angles.cos(), angles.sin())


def rotate(x: Tensor, rope: Rotary) -> Tensor:
    """Turn each pair of neighbouring numbers of q or k (B, H, N+M, d) by its token's angle, in fp32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)                       # 2 x (B, H, N+M, d/2)
    turned = torch.stack([a * rope.cos - b * rope.sin, a * rope.sin + b * rope.cos], dim=-1)     # (B, H, N+M, d/2, 2)
    return turned.flatten(-2).to(x.dtype)                                    # (B, H, N+M, d)


# ---------------------------------------------------------------------------- modules


def clamped(x: Tensor) -> Tensor:
    """float16 ends at 65504, and sums beyond it would be infinite; other types are left as they are.

    As in diffusers it is the text after a double block, and both modalities after a single one.
    """
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(x.dtype).max
    return x.clamp(-limit, limit)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.scale


class QKNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: for the sinusoids of time and guidance, and for the pooled text."""

    def __init__(self, dim, width):
        super().__init__()
        self.in_layer = nn.Linear(dim, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x.to(self.in_layer.weight.dtype))))


class Modulation(nn.Module):
    """The conditioning's shift, scale and gate, once for the attention and (double blocks) once for the MLP."""

    def __init__(self, width, chunks):
        super().__init__()
        self.chunks = chunks
        self.lin = nn.Linear(width, chunks * width)

    def forward(self, c):
        return self.lin(F.silu(c)).chunk(self.chunks, dim=-1)                # 3 or 6 x (B, D)


def split_heads(qkv: Tensor, norm: QKNorm, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3*D) -> q, k, v, each (B, H, L, d), q and k normed."""
    q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).permute(2, 0, 3, 1, 4)    # 3 x (B, H, L, d)
    return norm.query_norm(q), norm.key_norm(k), v


class Attention(nn.Module):
    """One stream's projections; the attention itself is mmdit.joint_attention."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.norm = QKNorm(cfg.head_dim)
        self.proj = nn.Linear(cfg.width, cfg.width)

    def heads_of(self, x):
        """(B, L, D) -> q, k, v, each (B, H, L, d), q and k normed, not yet rotated."""
        return split_heads(self.qkv(x), self.norm, self.head_dim)


def feed_forward(cfg: FluxConfig) -> nn.Sequential:
    return nn.Sequential(nn.Linear(cfg.width, cfg.mlp), nn.GELU(approximate="tanh"), nn.Linear(cfg.mlp, cfg.width))


class DoubleBlock(nn.Module):
    """Two streams that meet in the joint attention, as in SD3."""

    def __init__(self, cfg):
        super().__init__()
        self.img_mod = Modulation(cfg.width, 6)
        self.img_attn = Attention(cfg)
        self.img_mlp = feed_forward(cfg)
        self.txt_mod = Modulation(cfg.width, 6)
        self.txt_attn = Attention(cfg)
        self.txt_mlp = feed_forward(cfg)

    def joint(self, x, text, c, rope):
        """x (B, N, D), text (B, M, D), conditioning c (B, D) -> q, k, v of both joined, and what `update` needs."""
        shift, scale, *image_mod = self.img_mod(c)                           # 6 x (B, D), 4 of them for `update`
        image = self.img_attn.heads_of(modulate(x, shift, scale))            # 3 x (B, H, N, d)
        shift, scale, *text_mod = self.txt_mod(c)                            # 6 x (B, D)
        words = self.txt_attn.heads_of(modulate(text, shift, scale))         # 3 x (B, H, M, d)
        q, k, v = (torch.cat(both, dim=2) for both in zip(image, words))     # Eq. 3, 3 x (B, H, N+M, d)
        return JointQKV(rotate(q, rope), rotate(k, rope), v, x.shape[1], rope.grid), (image_mod, text_mod)

    def forward(self, x, text, c, rope, edit=None, mix=None):
        """One block of both streams: x (B, N, D), text (B, M, D) after it, and the q, k, v of its attention."""
        qkv, (image_mod, text_mod) = self.joint(x, text, c, rope)
        out = joint_attention(qkv, edit, mix)                                # (B, N+M, D)
        N = qkv.n_img
        x = self.update(x, out[:, :N], image_mod, self.img_attn.proj, self.img_mlp)          # (B, N, D)
        text = self.update(text, out[:, N:], text_mod, self.txt_attn.proj, self.txt_mlp)     # (B, M, D)
        return x, clamped(text), qkv

    @staticmethod
    def update(x, out, mod, proj, mlp):
        """Residual updates of a stream x (B, L, D): with the joint attention's output (B, L, D), then the MLP's."""
        gate, shift, scale, gate_mlp = mod                                   # 4 x (B, D)
        x = x + gate[:, None] * proj(out)                                    # Eq. 6, (B, L, D)
        return x + gate_mlp[:, None] * mlp(modulate(x, shift, scale))        # (B, L, D)


class SingleBlock(nn.Module):
    """One stream for both modalities; attention and MLP side by side."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.rows = [3 * cfg.width, cfg.mlp]                                 # of linear1: q, k, v; the MLP's input
        self.modulation = Modulation(cfg.width, 3)
        self.linear1 = nn.Linear(cfg.width, sum(self.rows))
        self.norm = QKNorm(cfg.head_dim)
        self.linear2 = nn.Linear(cfg.width + cfg.mlp, cfg.width)

    def joint(self, x, text, c, rope):
        """x (B, N, D), text (B, M, D), conditioning c (B, D) -> q, k, v; the joined stream, its MLP's input, a gate."""
        joined = torch.cat([x, text], dim=1)                                 # (B, N+M, D)
        shift, scale, gate = self.modulation(c)                              # 3 x (B, D)
        both = self.linear1(modulate(joined, shift, scale))
        qkv, hidden = both.split(self.rows, dim=-1)                          # (B, N+M, 3D), (B, N+M, mlp)
        q, k, v = split_heads(qkv, self.norm, self.head_dim)                 # Eq. 3, 3 x (B, H, N+M, d)
        return JointQKV(rotate(q, rope), rotate(k, rope), v, x.shape[1], rope.grid), (joined, hidden, gate)

    def forward(self, x, text, c, rope, edit=None, mix=None):
        """As a double block's: x (B, N, D), text (B, M, D) after it, and the q, k, v of its attention."""
        qkv, (joined, hidden, gate) = self.joint(x, text, c, rope)
        out = joint_attention(qkv, edit, mix)                                # (B, N+M, D)
        both = torch.cat([out, F.gelu(hidden, approximate="tanh")], dim=-1)  # (B, N+M, D+mlp)
        joined = clamped(joined + gate[:, None] * self.linear2(both))        # (B, N+M, D)
        return joined[:, :qkv.n_img], joined[:, qkv.n_img:], qkv


class Flux(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.checkpointing = False      # True: activations of a block are computed again in the backward pass
        self.img_in = nn.Linear(cfg.columns, cfg.width)
        self.txt_in = nn.Linear(cfg.ctx_dim, cfg.width)
        self.time_in = Embedder(cfg.time_dim, cfg.width)
        self.vector_in = Embedder(cfg.pooled_dim, cfg.width)
        self.guidance_in = Embedder(cfg.time_dim, cfg.width) if cfg.guidance else None
        self.double_blocks = nn.ModuleList(DoubleBlock(cfg) for _ in range(cfg.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(cfg) for _ in range(cfg.single_blocks))
        self.final_layer = FinalLayer(cfg.width, cfg.columns) if cfg.whole else None

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None) -> "Flux":
        """The model of the shapes in `sd` (Flux's original keys, no prefix), holding those very tensors.

        ValueError names missing, surplus and misshapen keys.
        """
        cfg = FluxConfig.from_state_dict(sd)
        if not cfg.whole:
            sd = {key: tensor for key, tensor in sd.items() if not key.startswith("final_layer.")}
        with torch.device("meta"):
            model = Flux(cfg)
        return assign(model, sd, "Flux transformer", device, dtype)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks as they are counted: double ones, then single ones."""
        return [*self.double_blocks, *self.single_blocks]

    def condition(self, sigma: Tensor, pooled: Tensor, guidance: float) -> Tensor:
        """What modulates every block: time, guidance and pooled text, (B, D)."""
        time_dim = self.config.time_dim
        c = self.time_in(sinusoids(1000 * sigma, time_dim)) + self.vector_in(pooled)         # (B, D)
        if self.guidance_in is not None:
            strength = torch.full_like(sigma, 1000 * guidance)                               # (B,)
            c = c + self.guidance_in(sinusoids(strength, time_dim))
        return c

    def forward(self, z: Tensor, sigma: Tensor, ctx: Tensor, pooled: Tensor, *, guidance: float = 3.5,
                capture: Collection[int] = (), stop_at: int | None = None, edit: Mapping[int, Edit] | None = None,
                mix: Mapping[int, Tensor] | None = None) -> tuple[Tensor | None, dict[int, JointQKV]]:
        """As MMDiT.forward: predicted velocity, and the joint q, k, v of the blocks in `capture`, image tokens first.

        z (B, C, h*p, w*p) noisy latent with patches of p x p, sigma (B,) in [0, 1], ctx (B, M, ctx_dim) rows of T5,
        pooled (B, pooled_dim) of CLIP-L.  guidance: the strength that a distilled model reads; schnell's reads none.
        capture, stop_at, edit and mix as there; double blocks come first, single blocks are counted on.
        """
        edit = edit or {}
        mix = mix or {}
        p = self.config.patch_of(z.shape[1])
        check_run(self.config, p, z, capture, stop_at, edit, mix)
        grid = z.shape[-2] // p, z.shape[-1] // p                            # (h, w)
        rope = rotary(grid, ctx.shape[1], self.config.head_dim, z.device)
        x = self.img_in(F.pixel_unshuffle(z, p).flatten(2).mT)               # (B, N, D), channels slowest in a patch
        text = self.txt_in(ctx)                                              # (B, M, D)
        c = self.condition(sigma, pooled, guidance)                          # (B, D)
        taps = {}
        for i, block in enumerate(self.blocks):
            block = on_device(block, z.device)           # where they do not all fit, each comes for its turn
            if i == stop_at:
                if i in capture:
                    taps[i], _ = block.joint(x, text, c, rope)
                return None, taps
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing else block
            x, text, qkv = run(x, text, c, rope, edit.get(i), mix.get(i))
            if i in capture:
                taps[i] = qkv
        y = self.final_layer(x, c).mT.unflatten(2, grid)                     # (B, C*p*p, h, w)
        return F.pixel_shuffle(y, p), taps                                   # (B, C, h*p, w*p)

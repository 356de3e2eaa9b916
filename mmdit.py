"""The MM-DiT of Stable Diffusion 3 and 3.5 (Sec. 3.2), with its joint attention written out.

Module names are the published checkpoints' key names, so a state dict loads as it is, and the config is
read off its shapes.  The forward returns the velocity and, for the blocks one asks for, the q, k, v of the
joint attention; every attention map in this project is a pure function of those.

    vel, taps = transformer(z, sigma, ctx, pooled, capture={9})
    maps = i2t_attention(taps[9])                        # (B, H, N, M)

Alphabet, used in the whole project:
    B batch   C latent channels   h x w patch grid   N = h*w image tokens   M text tokens   D = H*d width
    H heads   d head width        K classes          S steps                z latents       eps noise
    L tokens of one stream or prompt      P maps or regions without names
    vel = eps - z0                sigma in [0, 1]: 0 clean, 1 noise (the time embedding gets 1000 * sigma)
The paper's l is M here, its hw is N, its d is D and its d_k d; its numbers of classes, C (Sec. 3.4) and N (A.4), are K.
Joint order is Eq. 3's: image tokens first, then text.  Blocks count from 0; SD3's expert block is 9.
"""
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.checkpoint import Device, Dtype, assign, count, full_float32, shape

# ---------------------------------------------------------------------------- joint attention, Eq. 3 to 6


class JointQKV(NamedTuple):
    """Queries, keys and values of both modalities, concatenated (Eq. 3); q and k as they enter the softmax."""
    q: Tensor                       # (B, H, N+M, d), image tokens first
    k: Tensor                       # (B, H, N+M, d)
    v: Tensor                       # (B, H, N+M, d)
    n_img: int                      # N
    grid: tuple[int, int]           # (h, w), N = h*w, row-major

    def each(self) -> list["JointQKV"]:
        """The samples one by one, B = 1 each."""
        return [self._replace(q=q, k=k, v=v) for q, k, v in zip(self.q.split(1), self.k.split(1), self.v.split(1))]


def joint_probs(qkv: JointQKV) -> Tensor:
    """A = softmax(Q K^T / sqrt(d)), (B, H, N+M, N+M) in fp32; rows are queries and sum to 1.

    Segmentation and sampling never form it: with a 1024 x 1024 picture it takes 1.7 GB a block and sample.
    """
    logits = qkv.q.float() @ qkv.k.float().mT / math.sqrt(qkv.q.shape[-1])   # (B, H, N+M, N+M)
    return logits.softmax(dim=-1)                                            # Eq. 4, (B, H, N+M, N+M)


# The four pathways of Fig. 2 (a): rows are queries, columns are keys.
def i2i(probs: Tensor, n_img: int) -> Tensor:
    """Image queries, image keys: (B, H, N+M, N+M) -> (B, H, N, N)."""
    return probs[..., :n_img, :n_img]


def i2t(probs: Tensor, n_img: int) -> Tensor:
    """Image queries, text keys, the paper's A_I2T: (B, H, N+M, N+M) -> (B, H, N, M)."""
    return probs[..., :n_img, n_img:]


def t2i(probs: Tensor, n_img: int) -> Tensor:
    """Text queries, image keys: (B, H, N+M, N+M) -> (B, H, M, N)."""
    return probs[..., n_img:, :n_img]


def t2t(probs: Tensor, n_img: int) -> Tensor:
    """Text queries, text keys: (B, H, N+M, N+M) -> (B, H, M, M)."""
    return probs[..., n_img:, n_img:]


def i2t_scores(qkv: JointQKV) -> Tensor:
    """The I2T block of Q K^T / sqrt(d) before the softmax, (B, H, N, M) in fp32 (Table 5, first rows)."""
    N = qkv.n_img
    return qkv.q[:, :, :N].float() @ qkv.k[:, :, N:].float().mT / math.sqrt(qkv.q.shape[-1])  # (B, H, N, M)


def i2t_attention(qkv: JointQKV, chunk: int = 512) -> Tensor:
    """A_I2T = i2t(joint_probs(qkv)), (B, H, N, M) in fp32, without ever holding the whole of A.

    The softmax runs over all N+M keys, for `chunk` image queries at a time; only text columns are kept (cloned,
    as a view would keep the whole chunk alive).  For the backward pass a chunk is computed again, not kept.
    """
    N = qkv.n_img
    k = qkv.k.float().mT / math.sqrt(qkv.q.shape[-1])                        # (B, H, d, N+M)

    def text_columns(q):
        probs = (q.float() @ k).softmax(dim=-1)                              # Eq. 4, (B, H, chunk, N+M)
        return probs[..., N:].clone()                                        # (B, H, chunk, M)

    run = partial(checkpoint, text_columns, use_reentrant=False) if qkv.q.requires_grad else text_columns
    return torch.cat([run(q) for q in qkv.q[:, :, :N].split(chunk, dim=2)], dim=2)           # (B, H, N, M)


def t2i_attention(qkv: JointQKV) -> Tensor:
    """A_T2I = t2i(joint_probs(qkv)), (B, H, M, N) in fp32: the few text rows are computed alone."""
    N = qkv.n_img
    k = qkv.k.float().mT / math.sqrt(qkv.q.shape[-1])                        # (B, H, d, N+M)
    return (qkv.q[:, :, N:].float() @ k).softmax(dim=-1)[..., :N]            # (B, H, M, N)


Edit = Callable[[Tensor, JointQKV], Tensor]       # (probs (B, H, N+M, N+M), qkv) -> probs of the same shape


def joint_attention(qkv: JointQKV, edit: Edit | None = None, mix: Tensor | None = None) -> Tensor:
    """O = A V, (B, N+M, D), heads side by side as the output projection of Eq. 6 takes them.

    PyTorch's fused attention is Eq. 4 and 5 at once.  With `edit` the softmax is formed, edited and applied.
    With `mix` (B or 1, M, M), never both, image queries see the text values mix @ V_T.  As (A mix) V_T = A (mix V_T),
    this is the I2T attention times mix, without forming it; text queries see the values as they are.
    """
    q, k, v, N, _ = qkv
    if edit is None and mix is None:
        out = F.scaled_dot_product_attention(q, k, v)                        # Eq. 5, (B, H, N+M, d)
    elif edit is not None:
        out = edit(joint_probs(qkv), qkv).to(v.dtype) @ v                    # Eq. 5, (B, H, N+M, d)
    else:
        mixed = torch.cat([v[:, :, :N], mix[:, None].to(v.dtype) @ v[:, :, N:]], dim=2)      # (B, H, N+M, d)
        image = F.scaled_dot_product_attention(q[:, :, :N], k, mixed)        # Eq. 5, (B, H, N, d)
        text = F.scaled_dot_product_attention(q[:, :, N:], k, v)             # Eq. 5, (B, H, M, d)
        out = torch.cat([image, text], dim=2)                                # (B, H, N+M, d)
    return out.transpose(1, 2).flatten(2)                                    # (B, N+M, D)


# ---------------------------------------------------------------------------- config

SD3_HEAD_DIM = 64


@dataclass(frozen=True)
class MMDiTConfig:
    width: int                      # D
    depth: int                      # number of joint blocks
    head_dim: int                   # d
    patch: int                      # latent pixels per token and side
    channels: int                   # C
    pos_grid: int                   # side of the stored grid of positions, of which the centre is used
    ctx_dim: int                    # width of a context row
    pooled_dim: int                 # width of the pooled text vector
    mlp: int                        # hidden width of the MLPs
    time_dim: int                   # number of sinusoids of the time embedding
    qk_norm: bool = False           # SD3.5: RMS-norm of q and k
    dual_blocks: tuple[int, ...] = ()   # SD3.5 Medium: blocks with a second, image-only attention
    whole: bool = True              # False: the blocks after some block are missing, enough for segmentation

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor]) -> "MMDiTConfig":
        """Everything the architecture needs, from the shapes of SD3's original keys (no prefix) alone.

        ValueError names the key that is missing. A head width leaves no trace in SD3's checkpoint: it is the
        family's; with q/k norm it is the length of the norm's weight.
        """
        def holds(stem):
            return any(key.startswith(stem) for key in sd)

        width, channels, patch, _ = shape(sd, "x_embedder.proj.weight", 4)
        qk_norm = any(".attn.ln_q." in key for key in sd)
        depth = count(sd, "joint_blocks.")
        return MMDiTConfig(
            width=width, depth=depth, patch=patch, channels=channels, qk_norm=qk_norm,
            head_dim=shape(sd, "joint_blocks.0.x_block.attn.ln_q.weight", 1)[0] if qk_norm else SD3_HEAD_DIM,
            pos_grid=math.isqrt(shape(sd, "pos_embed", 3)[1]),
            ctx_dim=shape(sd, "context_embedder.weight", 2)[1],
            pooled_dim=shape(sd, "y_embedder.mlp.0.weight", 2)[1],
            mlp=shape(sd, "joint_blocks.0.x_block.mlp.fc1.weight", 2)[0],
            time_dim=shape(sd, "t_embedder.mlp.0.weight", 2)[1],
            dual_blocks=tuple(i for i in range(depth) if holds(f"joint_blocks.{i}.x_block.attn2.")),
            # only the very last block of a checkpoint has no MLP for the text
            whole=not holds(f"joint_blocks.{depth - 1}.context_block.mlp."))


# ---------------------------------------------------------------------------- modules


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then the conditioning's scale and shift: x (B, L, D), shift and scale (B, D)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]   # (B, L, D)


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """t (B,) in [0, 1000] -> (B, dim) in fp32: cosines first, then sines, wave lengths 2 pi to 20000 pi."""
    freq = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freq                                        # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)                     # (B, dim)


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.weight


class Embedder(nn.Module):
    """Linear, SiLU, Linear: for the time's sinusoids and for the pooled text."""

    def __init__(self, dim, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(x.to(self.mlp[0].weight.dtype))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, z):
        with full_float32():
            return self.proj(z).flatten(2).mT                                # (B, N, D), rows of the grid first


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """One stream's projections; the attention itself is joint_attention() above."""

    def __init__(self, cfg, proj=True):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.proj = nn.Linear(cfg.width, cfg.width) if proj else None
        self.ln_q = RMSNorm(cfg.head_dim) if cfg.qk_norm else nn.Identity()
        self.ln_k = RMSNorm(cfg.head_dim) if cfg.qk_norm else nn.Identity()

    def heads_of(self, x):
        """(B, L, D) -> q, k, v, each (B, H, L, d), q and k normed where the model does so."""
        y = self.qkv(x).unflatten(-1, (3, -1, self.head_dim))                # (B, L, 3, H, d)
        q, k, v = y.permute(2, 0, 3, 1, 4)                                   # 3 x (B, H, L, d)
        return self.ln_q(q), self.ln_k(k), v


class StreamBlock(nn.Module):
    """One modality's half of a joint block: what happens before and after the joint attention."""

    def __init__(self, cfg, dual=False, pre_only=False):
        super().__init__()
        self.attn = Attention(cfg, proj=not pre_only)
        self.attn2 = Attention(cfg) if dual else None                        # image tokens among themselves
        self.mlp = None if pre_only else MLP(cfg.width, cfg.mlp)
        self.chunks = 2 if pre_only else 6 + 3 * dual                        # of the modulation
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cfg.width, self.chunks * cfg.width))

    def pre_attention(self, x, c):
        """x (B, L, D), conditioning c (B, D) -> this stream's q, k, v (B, H, L, d) and the rest of its modulation."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(self.chunks, dim=-1)        # 2, 6 or 9 x (B, D)
        return self.attn.heads_of(modulate(x, shift, scale)), rest

    def post_attention(self, x, out, mod):
        """Residual updates of x (B, L, D): with the joint attention's output (B, L, D), then with the MLP's."""
        gate, shift, scale, gate_mlp, *second = mod                          # 4 or 7 x (B, D)
        y = x + gate[:, None] * self.attn.proj(out)                          # Eq. 6, (B, L, D)
        if self.attn2 is not None:                  # SD3.5 Medium: from the block's input, not from y
            shift2, scale2, gate2 = second
            q, k, v = self.attn2.heads_of(modulate(x, shift2, scale2))       # 3 x (B, H, N, d)
            out2 = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)        # (B, N, D)
            y = y + gate2[:, None] * self.attn2.proj(out2)
        return y + gate_mlp[:, None] * self.mlp(modulate(y, shift, scale))


class JointBlock(nn.Module):
    """One block: two streams that meet in the joint attention."""

    def __init__(self, cfg, i):
        super().__init__()
        self.x_block = StreamBlock(cfg, dual=i in cfg.dual_blocks)
        self.context_block = StreamBlock(cfg, pre_only=cfg.whole and i == cfg.depth - 1)     # its text goes nowhere

    def joint(self, x, text, c, grid):
        """x (B, N, D), text (B, M, D), conditioning c (B, D) -> both streams' q, k, v joined, and their modulations."""
        image, image_mod = self.x_block.pre_attention(x, c)                  # 3 x (B, H, N, d)
        words, text_mod = self.context_block.pre_attention(text, c)          # 3 x (B, H, M, d)
        q, k, v = (torch.cat(both, dim=2) for both in zip(image, words))     # Eq. 3, 3 x (B, H, N+M, d)
        return JointQKV(q, k, v, x.shape[1], grid), image_mod, text_mod

    def forward(self, x, text, c, grid, edit=None, mix=None):
        """One block of both streams: x (B, N, D), text (B, M, D) after it, and the q, k, v of its attention."""
        qkv, image_mod, text_mod = self.joint(x, text, c, grid)
        out = joint_attention(qkv, edit, mix)                                # (B, N+M, D)
        N = qkv.n_img
        x = self.x_block.post_attention(x, out[:, :N], image_mod)            # (B, N, D)
        if self.context_block.mlp is not None:
            text = self.context_block.post_attention(text, out[:, N:], text_mod)             # (B, M, D)
        return x, text, qkv


class FinalLayer(nn.Module):
    def __init__(self, width, columns):
        super().__init__()
        self.linear = nn.Linear(width, columns)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)             # 2 x (B, D)
        return self.linear(modulate(x, shift, scale))                        # (B, N, columns)


def check_run(cfg, p, z, capture, stop_at, edit, mix):
    """ValueError: blocks, or sides of the latent z, that do not fit a model of this config with patches of p x p."""
    last = cfg.depth - 1
    for i in {*capture, *edit, *mix, last if stop_at is None else stop_at}:
        if not 0 <= i <= last:
            raise ValueError(f"there is no block {i}: this model's blocks are 0 to {last}")
    if edit.keys() & mix.keys():
        raise ValueError(f"blocks {sorted(edit.keys() & mix.keys())} are in both edit and mix; choose one for each")
    if stop_at is None and not cfg.whole:
        raise ValueError(f"of this model only blocks 0 to {last} are loaded: it can segment, not generate")
    if z.shape[-2] % p or z.shape[-1] % p:
        raise ValueError(f"a latent of {z.shape[-2]} x {z.shape[-1]} cannot be cut in patches of {p} x {p}")


class MMDiT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        self.checkpointing = False      # True: activations of a block are computed again in the backward pass
        self.register_buffer("pos_embed", torch.zeros(1, cfg.pos_grid ** 2, cfg.width))
        self.x_embedder = PatchEmbed(cfg.channels, cfg.width, cfg.patch)
        self.t_embedder = Embedder(cfg.time_dim, cfg.width)
        self.y_embedder = Embedder(cfg.pooled_dim, cfg.width)
        self.context_embedder = nn.Linear(cfg.ctx_dim, cfg.width)
        self.joint_blocks = nn.ModuleList(JointBlock(cfg, i) for i in range(cfg.depth))
        self.final_layer = FinalLayer(cfg.width, cfg.patch ** 2 * cfg.channels)

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None) -> "MMDiT":
        """The model of the shapes in `sd` (SD3's original keys, no prefix), holding those very tensors.

        ValueError names missing, surplus and misshapen keys.
        """
        with torch.device("meta"):
            model = MMDiT(MMDiTConfig.from_state_dict(sd))
        return assign(model, sd, "MM-DiT", device, dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        """All blocks, under the name that Flux has for its two kinds."""
        return self.joint_blocks

    def positions(self, h: int, w: int) -> Tensor:
        """The centre h x w of the stored grid of position embeddings, (1, N, D); never interpolated."""
        side = self.config.pos_grid
        if max(h, w) > side:
            raise ValueError(f"a grid of {h} x {w} tokens is larger than the model's {side} x {side} positions")
        top = (side - h) // 2
        left = (side - w) // 2
        return self.pos_embed.view(1, side, side, -1)[:, top:top + h, left:left + w].flatten(1, 2)     # (1, N, D)

    def forward(self, z: Tensor, sigma: Tensor, ctx: Tensor, pooled: Tensor, *, capture: Collection[int] = (),
                stop_at: int | None = None, edit: Mapping[int, Edit] | None = None,
                mix: Mapping[int, Tensor] | None = None) -> tuple[Tensor | None, dict[int, JointQKV]]:
        """Predicted velocity eps - z0 (Eq. 2), and the joint q, k, v of the blocks in `capture` (Sec. 3.2).

        z (B, C, h*p, w*p) noisy latent with patches of p x p, sigma (B,) in [0, 1], ctx (B, M, ctx_dim), pooled (B,
        pooled_dim).  With `stop_at` the run ends as soon as that block's q, k, v exist, and the velocity is None.
        `edit` {block: function of (probs, qkv)} replaces the softmax of chosen blocks (Sec. 3.3), `mix` {block:
        (B or 1, M, M)} the text values that image queries see there (joint_attention).
        Returns vel of z's shape and {block: JointQKV}.  ValueError: sides or blocks that do not fit.
        """
        edit = edit or {}
        mix = mix or {}
        p = self.config.patch
        check_run(self.config, p, z, capture, stop_at, edit, mix)
        grid = z.shape[-2] // p, z.shape[-1] // p                            # (h, w)
        x = self.x_embedder(z) + self.positions(*grid)                       # (B, N, D)
        text = self.context_embedder(ctx)                                    # (B, M, D)
        c = self.t_embedder(sinusoids(1000 * sigma, self.config.time_dim)) + self.y_embedder(pooled)   # (B, D)
        taps = {}
        for i, block in enumerate(self.joint_blocks):
            if i == stop_at:
                if i in capture:
                    taps[i], _, _ = block.joint(x, text, c, grid)
                return None, taps
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing else block
            x, text, qkv = run(x, text, c, grid, edit.get(i), mix.get(i))
            if i in capture:
                taps[i] = qkv
        y = self.final_layer(x, c).unflatten(1, grid).unflatten(-1, (p, p, -1))                  # (B, h, w, p, p, C)
        return y.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3), taps                     # (B, C, h*p, w*p)

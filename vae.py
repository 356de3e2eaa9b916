"""The autoencoder of SD3 and Flux: pictures in [-1, 1] <-> 16-channel latents at 1/8 of the side.

Key names and forward pass are those of the published checkpoints (`first_stage_model.`), so a state dict
loads as it is; every width and the number of levels are read off its shapes.  Latent shift and scale are
applied inside encode() and decode() and nowhere else in this project.

    z0 = vae.encode(image)          # E_VAE(I) of Eq. 8, (B, 3, px, px) -> (B, 16, px/8, px/8)
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.checkpoint import Device, Dtype, assign, count, full_float32, shape

SHIFT, SCALE = 0.0609, 1.5305       # SD3 and SD3.5: z = (mean - SHIFT) * SCALE has about unit variance
FLUX_SHIFT, FLUX_SCALE = 0.1159, 0.3611
PART = 8192                         # pixels that Norm looks at together on a CPU, few enough for its cache


def moments(parts: Sequence[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group of channels over all parts of a map (B, c, rows, width); (B, groups) in fp64.

    PyTorch's own GroupNorm on a CPU adds up the values of a group one after the other if a map's memory format is
    channels_last; after a million of them it is wrong in the fourth digit.  A channel's values are counted from its
    first one, so that no large mean drowns a small variance.
    """
    origin = parts[0][:, :, :1, :1].float()                                  # (B, c, 1, 1)
    total = torch.zeros(origin.shape[:2], dtype=torch.float64)               # (B, c)
    square = torch.zeros(origin.shape[:2], dtype=torch.float64)              # (B, c)
    for part in parts:
        part = part - origin                                                 # (B, c, rows, width) in fp32
        total += part.sum((2, 3))
        square += part.square().sum((2, 3))
    pixels = sum(part[0, 0].numel() for part in parts)
    mean = total / pixels                                                    # (B, c), of what is above the origin
    var = (square / pixels - mean.square()).unflatten(1, (groups, -1))       # (B, groups, channels of a group)
    mean = (mean + origin[:, :, 0, 0]).unflatten(1, (groups, -1))            # (B, groups, channels of a group)
    return mean.mean(2), var.mean(2) + mean.var(2, correction=0)


class Norm(nn.GroupNorm):
    """GroupNorm in fp32 whatever the weights' dtype: its sums over a 1024 x 1024 map overflow fp16.

    CUDA's kernel sums in fp32 by itself (tests/test_cuda.py), so there no copy in fp32 is made.
    """

    def __init__(self, groups, c):
        super().__init__(groups, c, eps=1e-6)

    def forward(self, x):
        if x.is_cuda:
            return super().forward(x)
        weight = self.weight.float()                                         # (c,)
        bias = self.bias.float()                                             # (c,)
        if x.device.type != "cpu":
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        rows = max(1, PART // x.shape[3])
        parts = x.split(rows, dim=2)                                         # each (B, c, rows, width)
        mean, var = moments(parts, self.num_groups)                          # 2 x (B, groups)
        channels = len(weight) // self.num_groups                            # of a group
        std = (var + self.eps).sqrt().float().repeat_interleave(channels, 1)             # (B, c)
        scale = weight / std                                                 # (B, c)
        shift = bias - mean.float().repeat_interleave(channels, 1) * scale   # (B, c)
        y = torch.empty_like(x)
        for i, part in enumerate(parts):
            normed = torch.addcmul(shift[..., None, None], part.float(), scale[..., None, None])
            y[:, :, i * rows:(i + 1) * rows] = normed
        return y


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = Norm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = Norm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        # One map of 1024 x 1024 pixels takes 0.5 GB: in place, and under one name, so that no more than three exist.
        y = self.norm1(x)
        y = self.conv1(F.silu(y, inplace=True))
        y = self.norm2(y)
        y = self.conv2(F.silu(y, inplace=True))
        y += self.nin_shortcut(x)
        return y


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, once in the middle of encoder and decoder."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = Norm(groups, c)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        y = self.norm(x)                                # (B, c, height, width), L = height * width
        # contiguous, or no fused kernel takes them and 1024 x 1024 pixels cost a matrix of 16384 x 16384
        q, k, v = (f(y).flatten(2).mT.contiguous()[:, None] for f in (self.q, self.k, self.v))   # 3 x (B, 1, L, c)
        y = F.scaled_dot_product_attention(q, k, v)                                # (B, 1, L, c)
        return x + self.proj_out(y[:, 0].mT.reshape(x.shape))                      # (B, c, height, width)


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))        # zeros right and below only: half the sides


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))       # twice the sides


class Level(nn.Module):
    """The residual blocks of one resolution; what changes the resolution after them is set by encoder and decoder."""

    def __init__(self, c_in, c_out, blocks, groups):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if b == 0 else c_out, c_out, groups) for b in range(blocks))


class Middle(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.block_1 = ResBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResBlock(c, c, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths, blocks, latent, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, c in enumerate(widths):
            level = Level(widths[max(i - 1, 0)], c, blocks, groups)
            level.downsample = Downsample(c) if i < len(widths) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = Norm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent, 3, padding=1)

    def forward(self, x):
        """(B, 3, px, px) -> (B, 2C, px/8, px/8): mean and log-variance of the latent."""
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths, blocks, latent, groups):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, c in enumerate(widths):                  # up[0] is the finest level, run last
            level = Level(widths[min(i + 1, len(widths) - 1)], c, blocks, groups)
            level.upsample = Upsample(c) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = Norm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        """(B, C, px/8, px/8) -> (B, 3, px, px)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            x = level.upsample(x)
        x = self.norm_out(x)
        return self.conv_out(F.silu(x, inplace=True))


def groups_of(widths):
    """Groups of channels that norms take together.  Their number leaves no trace in a checkpoint: 32 in every published
    one; nano's narrow levels cannot be cut in 32 and use 4.
    """
    return 32 if widths[0] % 32 == 0 else 4


class VAE(nn.Module):
    def __init__(self, widths, enc_blocks, dec_blocks, latent, shift=SHIFT, scale=SCALE, unit_pictures=False):
        super().__init__()
        self.shift = shift
        self.scale = scale
        self.unit_pictures = unit_pictures              # NOTE(official): the released Flux code encodes [0, 1]
        groups = groups_of(widths)
        self.channels = latent                          # C
        self.factor = 2 ** (len(widths) - 1)            # pixels per latent and side, 8
        self.encoder = Encoder(widths, enc_blocks, latent, groups)
        self.decoder = Decoder(widths, dec_blocks, latent, groups)

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None, *, shift: float = SHIFT,
                        scale: float = SCALE, unit_pictures: bool = False) -> "VAE":
        """A VAE of the shapes found in `sd` (keys `encoder.*`, `decoder.*`), holding those very tensors.

        Shift and scale of its latents leave no trace in a checkpoint: SD3's, or Flux's by the loader's word.
        unit_pictures: encode() takes its pictures from [-1, 1] to [0, 1] first, which no autoencoder was trained with.
        ValueError names missing, surplus and misshapen keys.
        """
        levels = max(1, count(sd, "encoder.down."))      # a decoder alone lacks the first level's key
        widths = tuple(shape(sd, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels))
        with torch.device("meta"):
            vae = VAE(widths, count(sd, "encoder.down.0.block."), count(sd, "decoder.up.0.block."),
                      shape(sd, "decoder.conv_in.weight", 4)[1], shift, scale, unit_pictures)
        return assign(vae, sd, "VAE", device, dtype)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, px, px) in [-1, 1] -> latent (B, C, px/8, px/8): the posterior's mean, shifted and scaled."""
        assert not any(side % self.factor for side in x.shape[-2:]), \
            f"image {tuple(x.shape[-2:])} must have sides that are multiples of {self.factor}"
        if self.unit_pictures:
            x = (x + 1) / 2
        with full_float32():
            x = x.contiguous(memory_format=torch.channels_last)              # a CPU's convolutions copy less then
            mean, _ = self.encoder(x).chunk(2, dim=1)   # mean, log-variance: (B, C, px/8, px/8) each
        return (mean - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, C, px/8, px/8) -> picture (B, 3, px, px), about [-1, 1]; clamp before showing it."""
        with full_float32():
            z = (z / self.scale + self.shift).contiguous(memory_format=torch.channels_last)
            return self.decoder(z)

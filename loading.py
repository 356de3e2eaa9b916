"""A model ready to use: its networks, what the paper fixes for it, noise and its levels.

    model = loading.load("sd3")                          # seg4diff.load is the same function
    model.preset.sigma                                   # 0.515: where segmentation looks
"""
import json
import math
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux import Flux, FluxConfig
from lora import load_lora, merge_lora
from mmdit import JointQKV, MMDiT
from support import weights
from support.checkpoint import pick_device, pick_dtype
from support.files import check_kind, decoding
from t5 import T5, t5_tokenizer
from text import CLIPText, FluxText, TextEncoders, clip_tokenizer
from vae import FLUX_SCALE, FLUX_SHIFT, SCALE, SHIFT, VAE

# ---------------------------------------------------------------------------- noise and its levels, Sec. 3.2


def shifted(s: float | Tensor, shift: float) -> float | Tensor:
    """a s / (1 + (a-1) s): noise levels in [0, 1] moved towards noise, which large pictures need (a: 3 for SD3)."""
    return shift * s / (1 + (shift - 1) * s)


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of the Euler sampler, (steps+1,) from 1 down to 0; those of SD3's scheduler.

    The shift is applied to the ends of the line and then to the line itself, as the published scheduler does; its
    table has 1000 entries, so the last level above 0 comes from 1/1000.
    """
    line = torch.linspace(1.0, shifted(1 / 1000, shift), steps, dtype=torch.float64)         # (S,)
    return torch.cat([shifted(line, shift), line.new_zeros(1)]).float()      # (S+1,)


FLUX_SHIFTS = (256, 0.5), (4096, 1.15)      # image tokens, and the logarithm of their shift; between them a line


def flux_shift(tokens: int) -> float:
    """How far Flux.1-dev moves its noise levels for a picture of so many image tokens: 1.65 for 256, 3.16 for 4096."""
    (least, low), (most, high) = FLUX_SHIFTS
    return math.exp(low + (high - low) * (tokens - least) / (most - least))


def flux_sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels of Flux's Euler sampler, (steps+1,) from 1 down to 0: equal steps, shifted once."""
    return shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift).float()      # (S+1,)


def image_seed(name: str, seed: int) -> int:
    """The seed of a picture's noise: its name and the run's seed, not its place in a batch."""
    return zlib.crc32(f"{seed}/{name}".encode())


def noise(shape: Sequence[int], seeds: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape) on the CPU, sample b from seeds[b] alone: the same for any batch size and device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(index(s) % 2**63)) for s in seeds])


# ---------------------------------------------------------------------------- pictures


@dataclass
class Square:
    """A picture at the model's size, made before it is needed (protocol.Evaluation.prepare)."""
    pixels: np.ndarray                  # (size, size, 3) uint8
    image: Image.Image                  # that it was made from


Picture = Image.Image | Square
Images = Picture | Sequence[Picture]                     # one picture, or several, which return lists


def squash(image: Image.Image, size: int) -> Square:
    """A picture to the model's square.

    NOTE(official): the paper crops the centre; its code squashes the whole picture, in two steps; here it is squashed
    in one antialiased step.
    """
    square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return Square(np.array(square), image)


# ---------------------------------------------------------------------------- a model and its presets

SCALINGS = ("map", "token", "none")
# What a number of a preset may be: its kind, the least, the largest. Whether it suits a model is for check_fit to say.
LIMITS = {"block": (Integral, 0, 999), "size": (Integral, 1, 8192), "steps": (Integral, 1, 1000),
          "shift": (Real, 0.01, 100), "noise_steps": (Integral, 0, 1000), "cfg": (Real, -1000, 1000),
          "batch": (Integral, 1, 1024), "threshold": (Real, 1e-30, 1e30), "i2i_threshold": (Real, 1e-30, 1e30),
          "text_length": (Integral, 2, 8192), "latent_shift": (Real, -100, 100), "latent_scale": (Real, 1e-6, 1e6),
          "level": (Real, 0, 1), "guidance": (Real, 0, 1000)}              # level 0 is clean, 1 noise
OPTIONAL = ("level", "guidance")


@dataclass(frozen=True)
class Preset:
    """What is fixed for a model, by the paper where nothing else is said; nano's is in its file's header.

    Defaults: SD3 (A.1, Sec. 4.1).
    """
    block: int = 9                  # the semantic grounding expert, counted from 0
    size: int = 1024                # side of the square a picture is squashed to, pixels
    steps: int = 28                 # of the Euler sampler
    shift: float = 3.0              # of the sigma schedule, as SD3 was published
    noise_steps: int = 8            # segmentation sees a latent this many steps before clean ("t = 8 of 28")
    cfg: float = 7.5                # classifier-free guidance scale
    batch: int = 1                  # pictures evaluated at once
    threshold: float = 0.1          # symmetric KL below which maps of <pad> tokens are merged (released code)
    scaling: str = "token"          # what those maps are scaled over first, of SCALINGS (released code)
    i2i_threshold: float = 0.7      # symmetric KL below which anchors are merged (chosen on nano's scenes-dev)
    schedule: str = "sd3"           # of the noise levels: "sd3" (sigmas) or "flux" (flux_sigmas)
    level: float | None = None      # noise level of segmentation that is no level of the schedule
    text_length: int = 512          # rows of T5, where it is the context; CLIP's are in its weights
    unit_pictures: bool = False     # pictures go to the autoencoder as [0, 1] instead of [-1, 1]
    guidance: float | None = None   # strength that a distilled model reads; None: it reads none
    latent_shift: float = SHIFT     # of the autoencoder
    latent_scale: float = SCALE

    def __post_init__(self):
        """ValueError: what cannot be.  The one check of a file's header and of arguments (`changed`)."""
        for name, (kind, least, largest) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not isinstance(value, kind) or isinstance(value, bool) or not least <= value <= largest:
                number = "whole number" if kind is Integral else "number"
                raise ValueError(f"{name} must be a {number} from {least} to {largest}, not {value!r:.40}")
        if self.noise_steps > self.steps:
            raise ValueError(f"noise_steps must be at most steps, which are {self.steps}, not {self.noise_steps}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, not {self.scaling!r:.40}")
        if self.schedule not in ("sd3", "flux"):
            raise ValueError(f"schedule must be sd3 or flux, not {self.schedule!r:.40}")
        if not isinstance(self.unit_pictures, bool):
            raise ValueError(f"unit_pictures must be true or false, not {self.unit_pictures!r:.40}")

    @staticmethod
    def from_header(meta: dict[str, str]) -> "Preset":
        """SD3's presets, but for those that a file carries as JSON under "presets".  ValueError: others."""
        presets = check_kind(json.loads(meta.get("presets", "{}")), dict, "presets")
        unknown = presets.keys() - Preset.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"unknown presets {sorted(unknown)}; known are {', '.join(Preset.__dataclass_fields__)}")
        return Preset(**presets)

    def changed(self, **given: float | str | None) -> "Preset":
        """A copy with the given values; None keeps the preset's.  ValueError: one that cannot be."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels of so many Euler steps, (steps+1,) from 1 down to 0."""
        return (flux_sigmas if self.schedule == "flux" else sigmas)(steps, self.shift)

    @property
    def distilled(self) -> dict[str, float]:
        """What a distilled transformer takes beside the others' inputs."""
        return {} if self.guidance is None else {"guidance": self.guidance}

    @property
    def sigma(self) -> float:
        """Noise level of segmentation: 0.515 for 8 of 28 steps at shift 3."""
        if self.level is not None:
            return self.level
        return self.sigmas(self.steps)[self.steps - self.noise_steps].item()


def flux_preset(guidance: bool = True, size: int = 1024) -> Preset:
    """Flux.1-dev's or (without guidance) schnell's preset for pictures of this side.

    The block is the paper's (App. C), t = 8 of 50 the released code's, the rest are Flux's own defaults.
    schnell has no shift and 4 steps, none of them near dev's level: that it is read at dev's is our choice.
    """
    tokens = (size // 16) ** 2                           # 8 pixels a latent, 2 latents a token and side
    dev = Preset(block=12, size=size, steps=50, shift=flux_shift(tokens), cfg=1.0, guidance=3.5, schedule="flux",
                 text_length=512, latent_shift=FLUX_SHIFT, latent_scale=FLUX_SCALE)
    if guidance:
        return dev
    return replace(dev, steps=4, noise_steps=0, shift=1.0, guidance=None, level=dev.sigma, text_length=256)


def released_preset(preset: Preset) -> Preset:
    """Dev's preset as the released code has it (NOTE(official)), `--model flux-released`.

    It takes the 16 latent channels for the number of image tokens, so that its noise level is 0.232 instead of 0.376;
    pictures go to the autoencoder as [0, 1]; T5 reads as many tokens as CLIP can.
    """
    return replace(preset, shift=flux_shift(16), unit_pictures=True, text_length=77)


@dataclass
class Seg4Diff:
    transformer: MMDiT | Flux
    vae: VAE
    text: TextEncoders | FluxText
    preset: Preset
    name: str
    fingerprint: str                    # of its files (weights.fingerprint)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    @property
    def grid(self) -> int:
        """Image tokens along a side of its square pictures."""
        cfg = self.transformer.config
        patch = cfg.patch_of(self.vae.channels) if isinstance(cfg, FluxConfig) else cfg.patch
        return self.preset.size // self.vae.factor // patch

    def __call__(self, z: Tensor, sigma: float | Tensor, ctx: Tensor, pooled: Tensor, **options: Any
                 ) -> tuple[Tensor | None, dict[int, JointQKV]]:
        """The transformer at a noise level, a number or (B,): velocity (B, C, ., .), and q, k, v of captured blocks.

        z (B, C, ., .), ctx (B, M, ctx_dim), pooled (B, pooled_dim); options: those of MMDiT.forward and Flux.forward,
        whose guidance strength, where one is read, is the preset's.
        """
        levels = torch.as_tensor(sigma, device=z.device).expand(len(z))      # (B,)
        return self.transformer(z.to(self.dtype), levels, ctx, pooled, **options, **self.preset.distilled)

    def guided(self, guidance: float | None) -> "Seg4Diff":
        """This model with another strength to read, None: with the preset's.  ValueError: it reads none."""
        if guidance is not None and self.preset.guidance is None:
            raise ValueError(f"{self.name} reads no guidance strength, as Flux.1-dev does; cfg is what it has")
        return replace(self, preset=self.preset.changed(guidance=guidance))


@torch.inference_mode()
def encode_image(model: Seg4Diff, image: Images) -> Tensor:
    """A picture, or several, squashed to the model's square -> clean latents (B, C, ., .), one at a time.

    ValueError: an empty list.
    """
    images = [image] if isinstance(image, Picture) else image
    if not images:
        raise ValueError("there is no picture to encode")
    latents = []
    for picture in images:
        square = picture if isinstance(picture, Square) else squash(picture, model.preset.size)
        x = torch.from_numpy(square.pixels).to(model.device)                 # (size, size, 3), as bytes over the bus
        x = x.permute(2, 0, 1)[None].float() / 127.5 - 1                     # (1, 3, size, size)
        latents.append(model.vae.encode(x.to(model.dtype)))
    return torch.cat(latents)                                                # (B, C, ., .)


def load(name_or_path: str | Path = "nano", device: str = "auto", dtype: str | torch.dtype = "auto",
         segment_only: bool = False, lora: str | Path | None = None, text_length: int | None = None,
         t5: str | Path | None = None) -> Seg4Diff:
    """A model ready to use: a name of weights.NAMES, a .safetensors file, or a folder (weights.find).

    device "auto": CUDA, MPS or CPU, the first that is there.  dtype "auto": support.checkpoint.pick_dtype.  With
    segment_only, blocks after the expert are left on the disk; such a model segments, and cannot generate.  lora: a
    file of train_magnet.py's or another LoRA of it (lora.load_lora), merged into the weights.  text_length: rows of T5,
    where Flux reads it; the preset's if None.  t5: for an SD3, a file of T5 to generate with, tokenizer.json beside it.
    ValueError: no such model, a file that is broken or does not fit, an unknown device or dtype.
    """
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    files = weights.find(name_or_path)
    if t5 is not None:
        files = weights.with_t5(files, t5)
    path = files.parts["mmdit"][0][0]
    with decoding(path, "model file with presets in its header"):
        preset = preset_of(files)
        if name_or_path == "flux-released":
            preset = released_preset(preset)
        preset = preset.changed(text_length=text_length)
    with decoding(files.merges or path, "list of CLIP's merges"):
        tokenizer = clip_tokenizer(weights.merges(files))
    last_block = preset.block if segment_only else None
    waiting = what_waits(weights.sizes(files, last_block), dtype, free_memory(device))
    if waiting:                                          # so much slower that every command should say it
        print(f"blocks of {' and '.join(waiting)} wait in host memory and come to {device} one by one", file=sys.stderr)
    sd = weights.read(files, last_block, device, dtype, waiting)
    clip_l = CLIPText.from_state_dict(sd["clip_l"])
    t5xxl = tokenizer_of_t5 = None
    if "t5xxl" in sd:
        with decoding(files.t5_tokenizer or path, "tokenizer of T5"):
            tokenizer_of_t5 = t5_tokenizer(weights.t5_tokenizer(files))
        t5xxl = T5.from_state_dict(sd["t5xxl"])
    if "clip_g" in sd:
        transformer = MMDiT.from_state_dict(sd["mmdit"])
        text = TextEncoders(clip_l, CLIPText.from_state_dict(sd["clip_g"]), tokenizer, transformer.config.ctx_dim,
                            t5xxl, tokenizer_of_t5)
    else:
        transformer = Flux.from_state_dict(sd["mmdit"])
        text = FluxText(clip_l, t5xxl, tokenizer, tokenizer_of_t5, preset.text_length)
    vae = VAE.from_state_dict(sd["vae"], shift=preset.latent_shift, scale=preset.latent_scale,
                              unit_pictures=preset.unit_pictures)
    name = Path(os.path.abspath(name_or_path)).name.removesuffix(".safetensors")
    model = Seg4Diff(transformer, vae, text, preset, name, weights.fingerprint(files))
    check_fit(model, name_or_path, segment_only)
    if lora is not None:
        load_lora(transformer, lora)
        merge_lora(transformer)
        model.name = f"{name}+{weights.lora_name(lora)}"
        model.fingerprint = weights.add_to_fingerprint(model.fingerprint, lora)
    return model


WORK = 4e9                          # bytes for what is computed: most of it the autoencoder's maps


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU; on the CPU nothing could wait elsewhere, so they are never too few."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def what_waits(sizes: dict[str, int], dtype: torch.dtype, free: float) -> tuple[str, ...]:
    """Parts whose blocks are to wait in host memory, so that the rest and some work fit: none, T5, or both large ones.

    sizes: values of each part.  SD3's own transformer never waits: it fits any card that can run it.
    """
    if "t5xxl" not in sizes:
        return ()
    for waiting in ((), ("t5xxl",)):
        if dtype.itemsize * sum(n for part, n in sizes.items() if part not in waiting) <= free - WORK:
            return waiting
    return ("t5xxl",) if "clip_g" in sizes else ("t5xxl", "mmdit")


def preset_of(files: weights.Files) -> Preset:
    """Flux's or SD3's presets by what the files hold; a file's own, in its header, go before."""
    keys = weights.keys_of_part(files.parts["mmdit"])
    header = weights.header(files)
    if weights.is_flux(keys) and "presets" not in header:
        return flux_preset(guidance=weights.flux_name(keys) == "flux")
    return Preset.from_header(header)


def fits(model: Seg4Diff) -> list[tuple[str, int, int]]:
    """What an SD3's parts have to agree in: what it is, how much of it is there, and how much there should be."""
    cfg = model.transformer.config
    text = model.text
    pixels = model.vae.factor * cfg.patch                # of a patch's side
    rows = [("tokens in the tokenizer", text.tokenizer.get_vocab_size(), text.vocab),
            ("tokens of CLIP-L that CLIP-G lacks", max(0, text.vocab - text.clip_g.vocab), 0),
            ("positions of CLIP-L that CLIP-G lacks", max(0, text.length - text.clip_g.positions), 0),
            ("channels in the MM-DiT's latent", cfg.channels, model.vae.channels),
            ("columns of pooled text", text.pooled_dim, cfg.pooled_dim),
            ("text columns that do not fit the context", max(0, text.width - cfg.ctx_dim), 0),
            ("patches of a side beyond the model's positions", max(0, model.grid - cfg.pos_grid), 0),
            ("pixels beyond whole patches", model.preset.size % pixels, 0)]
    if text.t5xxl is not None:
        rows += [("columns of T5", text.t5xxl.width, cfg.ctx_dim),
                 ("tokens of T5 beyond its weights", max(0, text.t5_tokenizer.get_vocab_size() - text.t5xxl.vocab), 0)]
    return rows


def flux_fits(model: Seg4Diff) -> list[tuple[str, int, int]]:
    """What a Flux's parts have to agree in, see `fits`."""
    cfg = model.transformer.config
    text = model.text
    pixels = model.vae.factor * cfg.patch_of(model.vae.channels)             # of a patch's side; ValueError
    return [("tokens in CLIP's tokenizer", text.clip_tokenizer.get_vocab_size(), text.clip_l.vocab),
            ("tokens of T5 beyond its weights", max(0, text.tokenizer.get_vocab_size() - text.t5xxl.vocab), 0),
            ("columns of pooled text", text.pooled_dim, cfg.pooled_dim),
            ("columns of T5", text.width, cfg.ctx_dim),
            ("pixels beyond whole patches", model.preset.size % pixels, 0)]


def check_fit(model: Seg4Diff, path: str | Path, segment_only: bool) -> None:
    """ValueError: parts that are not of one model, or too few blocks."""
    cfg = model.transformer.config
    if not (cfg.whole or segment_only):
        raise ValueError(f"{path} is incomplete: its block {cfg.depth - 1} is not a last block")
    flux = isinstance(model.transformer, Flux)
    if model.preset.guidance is not None and not (flux and cfg.guidance):
        raise ValueError(f"{path} asks for a guidance strength, which its transformer does not read")
    blocks = model.preset.block + 1
    rows = [("blocks up to the preset's block", min(blocks, cfg.depth), blocks),
            ("columns beyond whole heads", cfg.width % cfg.head_dim, 0),
            ("columns of the time beyond pairs", cfg.time_dim % 2, 0)]
    rows += flux_fits(model) if flux else fits(model)
    for what, value, wanted in rows:
        if value != wanted:
            raise ValueError(f"the parts of {path} do not fit each other: {value} {what}, not {wanted}")

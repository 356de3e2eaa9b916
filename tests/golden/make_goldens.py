"""Reference outputs of diffusers and transformers on tiny random networks, for tests/test_golden.py.

    python -m venv oracle && oracle/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers==5.23.0
    oracle/bin/python tests/golden/make_goldens.py

Only this script needs those two libraries.  It writes *.safetensors beside itself; each holds
    w.*     weights under SD3's original key names, the layout this project loads
    in.*    inputs
    out.*   what the library made of them
and names the library versions in its header.  diffusers/ holds the weights of mmdit_sd35_medium and vae once
more, under that library's own keys, as its folders do.  The libraries compute in fp64, so that the rounding of one
machine's fp32 kernels is not part of the reference; what is stored is fp32.

The weights are random numbers rounded to float8_e4m3fn and stored as such: the library itself computes with
the rounded values, so upcasting them loses nothing, and the files are a quarter of the size.
"""
import re
from pathlib import Path
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FOLDER = Path(__file__).parent
VERSIONS = {lib.__name__: str(lib.__version__) for lib in (torch, diffusers, transformers)}
STORED = torch.float8_e4m3fn
SHIFT, SCALE = 0.0609, 1.5305   # latent shift and scale of SD3's autoencoder

# SD3 has as many heads as blocks, each 64 wide; where q and k are normalised, the norm tells the head width
# and the heads can be small.
MMDITS = {
    "mmdit_sd3": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16},
    "mmdit_sd35_large": {"num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 16, "in_channels": 4,
                         "qk_norm": "rms_norm"},
    "mmdit_sd35_medium": {"num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
                          "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}

# Applied in this order to a diffusers key whose q, k and v are fused already.
MMDIT_NAMES = [
    ("pos_embed.proj.", "x_embedder.proj."), ("pos_embed.pos_embed", "pos_embed"),
    ("time_text_embed.timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("time_text_embed.timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("time_text_embed.text_embedder.linear_1.", "y_embedder.mlp.0."),
    ("time_text_embed.text_embedder.linear_2.", "y_embedder.mlp.2."),
    ("norm_out.linear.", "final_layer.adaLN_modulation.1."), ("proj_out.", "final_layer.linear."),
    ("transformer_blocks.", "joint_blocks."),
    ("norm1.linear.", "x_block.adaLN_modulation.1."),
    ("norm1_context.linear.", "context_block.adaLN_modulation.1."),
    ("attn.qkv.", "x_block.attn.qkv."), ("attn2.qkv.", "x_block.attn2.qkv."),
    ("attn.add_qkv.", "context_block.attn.qkv."),
    ("attn.norm_added_", "context_block.attn.ln_"),
    ("attn.norm_", "x_block.attn.ln_"), ("attn2.norm_", "x_block.attn2.ln_"),
    ("attn.to_out.0.", "x_block.attn.proj."), ("attn2.to_out.0.", "x_block.attn2.proj."),
    ("attn.to_add_out.", "context_block.attn.proj."),
    ("ff.net.0.proj.", "x_block.mlp.fc1."), ("ff.net.2.", "x_block.mlp.fc2."),
    ("ff_context.net.0.proj.", "context_block.mlp.fc1."), ("ff_context.net.2.", "context_block.mlp.fc2."),
]

VAE_NAMES = [
    ("down_blocks.", "down."), ("up_blocks.", "up."), (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."), ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."), (".resnets.", ".block."), ("conv_shortcut", "nin_shortcut"),
    ("mid_block.attentions.0.", "mid.attn_1."), ("group_norm.", "norm."), (".to_out.0.", ".proj_out."),
    (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), ("conv_norm_out.", "norm_out."),
]


def rename(key: str, names: list[tuple[str, str]]) -> str:
    for theirs, original in names:
        key = key.replace(theirs, original)
    return key


def mmdit_to_original(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of diffusers' SD3 transformer -> SD3's original layout."""
    fused = {}
    for key, w in sd.items():
        # diffusers stores the context's three in the order k, v, q: fuse by name, never by position
        if "to_q." in key:
            fused[key.replace("to_q", "qkv")] = torch.cat([sd[key.replace("to_q", f"to_{p}")] for p in "qkv"])
        elif "add_q_proj." in key:
            parts = [sd[key.replace("add_q_proj", f"add_{p}_proj")] for p in "qkv"]
            fused[key.replace("add_q_proj", "add_qkv")] = torch.cat(parts)
        elif not re.search(r"to_[kv]\.|add_[kv]_proj\.", key):
            fused[key] = w
    out = {rename(key, MMDIT_NAMES): w for key, w in fused.items()}

    # Two modulations have scale before shift in diffusers and shift before scale in the original.
    last = max(int(key.split(".")[1]) for key in out if key.startswith("joint_blocks."))
    for key in out:
        if key.startswith((f"joint_blocks.{last}.context_block.adaLN", "final_layer.adaLN")):
            scale, shift = out[key].chunk(2)
            out[key] = torch.cat([shift, scale])
    return out


def vae_to_original(sd: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """State dict of diffusers' AutoencoderKL -> original layout: decoder levels count from the finest one,
    and the linear layers of the attention are 1x1 convolutions."""
    out = {}
    for key, w in sd.items():
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{levels - 1 - int(m[1])}", key)
        out[rename(key, VAE_NAMES)] = w[:, :, None, None] if w.ndim == 2 else w
    return out


def check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:4]
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random values for every tensor, of a size that keeps activations at about 1, exact in STORED."""
    gen = torch.Generator().manual_seed(seed)
    for key, w in model.state_dict().items():       # these are the model's own tensors, not copies
        x = torch.randn(w.shape, generator=gen)
        if w.ndim < 2:
            x = 0.25 * x + (1 if key.endswith("weight") else 0)     # a norm's weight, or a bias
        elif key.endswith("pos_embed"):
            x = 0.5 * x
        else:
            x = x / (w.numel() / len(w)) ** 0.5
        w.copy_(x.to(STORED))
    return model.double().eval()


def save(name: str, weights: dict[str, Tensor], tensors: dict[str, Tensor], **meta: str) -> None:
    tensors = {key: t.float() if t.is_floating_point() else t for key, t in tensors.items()}
    stored = {f"w.{key}": w.to(STORED).contiguous() for key, w in weights.items()}
    assert all(torch.equal(stored[f"w.{key}"].double(), w) for key, w in weights.items())
    assert all(t.isfinite().all() for t in tensors.values())
    path = FOLDER / f"{name}.safetensors"
    path.write_bytes(to_bytes(stored | {k: t.contiguous() for k, t in tensors.items()}, VERSIONS | meta))
    sizes = [f"{k} rms {t.square().mean().sqrt():.2f}" for k, t in tensors.items() if k.startswith("out.")]
    print(f"{path.name:32s} {path.stat().st_size:9,d} bytes   {', '.join(sizes)}")


def save_folder(part: str, sd: dict[str, Tensor]) -> None:
    """The same weights as diffusers itself keeps them: one part of a folder in its layout."""
    path = FOLDER / "diffusers" / part / "diffusion_pytorch_model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes({k: w.to(STORED).contiguous() for k, w in sd.items()}, VERSIONS))


class ExplicitSoftmax(JointAttnProcessor2_0):
    """diffusers' joint attention with the kernel alone replaced: the softmax written out, and kept."""

    def __call__(self, *args, **kwargs):
        with mock.patch.object(F, "scaled_dot_product_attention", self.attend):
            return super().__call__(*args, **kwargs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        self.probs = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)   # (B, H, N+M, N+M), image first
        return self.probs @ v


def make_mmdit(name: str, config: dict, seed: int, block: int = 1) -> None:
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    model = SD3Transformer2DModel(sample_size=16, patch_size=2, pos_embed_max_size=9, joint_attention_dim=24,
                                  caption_projection_dim=hidden, pooled_projection_dim=20,
                                  out_channels=config["in_channels"], **config)
    randomise(model, seed)
    gen = torch.Generator().manual_seed(seed + 100)
    z = torch.randn(2, config["in_channels"], 8, 12, generator=gen)     # 4 x 6 patches inside the 9 x 9 grid
    ctx = torch.randn(2, 10, 24, generator=gen)
    pooled = torch.randn(2, 20, generator=gen)
    sigma = torch.tensor([0.515, 0.0625])

    args = {"hidden_states": z.double(), "encoder_hidden_states": ctx.double(),
            "pooled_projections": pooled.double(), "timestep": 1000 * sigma}
    vel = model(**args).sample
    explicit = ExplicitSoftmax()
    model.transformer_blocks[block].attn.set_processor(explicit)
    torch.testing.assert_close(model(**args).sample, vel, atol=1e-12, rtol=0)

    weights = mmdit_to_original(model.state_dict())
    check_same(convert_sd3_transformer_checkpoint_to_diffusers(dict(weights)), dict(model.state_dict()))
    if model.config.dual_attention_layers:
        save_folder("transformer", model.state_dict())  # the flavour that has every kind of key
    save(name, weights, {"in.z": z, "in.sigma": sigma, "in.ctx": ctx, "in.pooled": pooled, "out.vel": vel,
                         "out.probs": explicit.probs}, block=str(block))


def make_vae(seed: int) -> None:
    # 32 groups want at least 32 channels; getting narrower instead of wider keeps the file small, and still
    # has a shortcut in encoder and decoder.
    widths = (64, 32, 32)
    vae = AutoencoderKL(block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * len(widths),
                        up_block_types=["UpDecoderBlock2D"] * len(widths), layers_per_block=1,
                        latent_channels=16, norm_num_groups=32, use_quant_conv=False,
                        use_post_quant_conv=False)
    randomise(vae, seed)
    x = 2 * torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed + 100)) - 1
    mean = vae.encode(x.double()).latent_dist.mean
    z = (mean - SHIFT) * SCALE
    decoded = vae.decode(z / SCALE + SHIFT).sample

    weights = vae_to_original(vae.state_dict(), len(widths))
    check_same(convert_ldm_vae_checkpoint(weights, vae.config), dict(vae.state_dict()))
    save_folder("vae", vae.state_dict())
    save("vae", weights, {"in.x": x, "out.mean": mean, "out.z": z, "out.decoded": decoded})


def make_clip(name: str, cls: type, act: str, pad: int, seed: int) -> None:
    # eos_token_id=2 is what the published configs say; it makes transformers pool at the largest id.
    bos, eos = 58, 59
    config = CLIPTextConfig(vocab_size=60, hidden_size=128, intermediate_size=160, num_hidden_layers=3,
                            num_attention_heads=2, max_position_embeddings=12, projection_dim=128,
                            hidden_act=act, bos_token_id=bos, eos_token_id=2)
    model = randomise(cls(config), seed)
    words = torch.randint(1, bos, (3, 12), generator=torch.Generator().manual_seed(seed + 100)).tolist()
    ids = torch.tensor([[bos, *row[:n], eos] + [pad] * (10 - n) for row, n in zip(words, (10, 4, 0))])
    out = model(ids, output_hidden_states=True)

    # Recent releases of transformers drop the prefix that the published files have.
    weights = {k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": w
               for k, w in model.state_dict().items()}
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    save(name, weights, {"in.ids": ids, "out.hidden": out.hidden_states[-2], "out.pooled": pooled})


def make_sigmas() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    out = {}
    for steps in (28, 50):
        scheduler.set_timesteps(steps)
        out[f"sigmas_{steps}"] = scheduler.sigmas.clone()
    save("sigmas", {}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        for seed, (name, config) in enumerate(MMDITS.items()):
            make_mmdit(name, config, seed)
        make_vae(seed=10)
        make_clip("clip_l", CLIPTextModel, "quick_gelu", pad=59, seed=20)
        make_clip("clip_g", CLIPTextModelWithProjection, "gelu", pad=0, seed=21)
        make_sigmas()

"""Reference outputs of diffusers' Flux and transformers' T5 on tiny random networks, for tests/test_golden_flux.py.

    oracle/bin/python tests/golden/make_flux_goldens.py      # the environment of make_goldens.py, which says the rest

flux_dev reads a guidance strength, flux_schnell does not.  diffusers/flux_transformer holds the weights of flux_dev
once more, under that library's own keys.
"""
import inspect
import re
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from make_goldens import STORED, check_same, randomise, rename, save, save_folder
from torch import Tensor
from transformers import T5Config, T5EncoderModel

FLUX_NAMES = [
    ("x_embedder.", "img_in."), ("context_embedder.", "txt_in."),
    ("time_text_embed.timestep_embedder.", "time_in."), ("time_text_embed.guidance_embedder.", "guidance_in."),
    ("time_text_embed.text_embedder.", "vector_in."), (".linear_1.", ".in_layer."), (".linear_2.", ".out_layer."),
    ("norm1.linear.", "img_mod.lin."), ("norm1_context.linear.", "txt_mod.lin."),
    ("attn.to_out.0.", "img_attn.proj."), ("attn.to_add_out.", "txt_attn.proj."),
    ("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    ("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
    ("ff.net.0.proj.", "img_mlp.0."), ("ff.net.2.", "img_mlp.2."),
    ("ff_context.net.0.proj.", "txt_mlp.0."), ("ff_context.net.2.", "txt_mlp.2."),
    ("norm_out.linear.", "final_layer.adaLN_modulation.1."),
]
SINGLE_NAMES = [
    ("single_transformer_blocks.", "single_blocks."), (".norm.linear.", ".modulation.lin."),
    (".attn.norm_q.weight", ".norm.query_norm.scale"), (".attn.norm_k.weight", ".norm.key_norm.scale"),
    (".proj_out.", ".linear2."),
]
DOUBLE_NAMES = [
    ("transformer_blocks.", "double_blocks."), ("attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
    ("attn.norm_k.weight", "img_attn.norm.key_norm.scale"), ("proj_out.", "final_layer.linear."),
]


def flux_to_original(sd: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of diffusers' Flux transformer -> the original layout."""
    out = {}
    for key, w in sd.items():
        single = key.startswith("single_transformer_blocks.")
        if "attn.to_q." in key:
            parts = [sd[key.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            if single:
                parts.append(sd[key.replace("attn.to_q", "proj_mlp")])
                key = key.replace("attn.to_q", "linear1")
            w = torch.cat(parts)
            key = key.replace("attn.to_q", "img_attn.qkv")
        elif "attn.add_q_proj." in key:
            w = torch.cat([sd[key.replace("add_q", f"add_{letter}")] for letter in "qkv"])
            key = key.replace("attn.add_q_proj", "txt_attn.qkv")
        elif re.search(r"attn\.(to_[kv]|add_[kv]_proj)\.|proj_mlp\.", key):
            continue
        key = rename(key, SINGLE_NAMES) if single else rename(rename(key, FLUX_NAMES), DOUBLE_NAMES)
        if key.startswith("final_layer.adaLN"):          # scale before shift in diffusers
            scale, shift = w.chunk(2)
            w = torch.cat([shift, scale])
        out[key] = w
    return out


def to_diffusers(weights: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """diffusers' own conversion, which knows the published width alone."""
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    names = dict(vars(single_file_utils))
    exec(inspect.getsource(convert).replace("inner_dim = 3072", f"inner_dim = {width}"), names)
    return names[convert.__name__](dict(weights))


class ExplicitSoftmax(FluxAttnProcessor):
    """diffusers' joint attention with the kernel alone replaced: the softmax written out, and kept."""

    def __call__(self, *args, **kwargs):
        with mock.patch.object(F, "scaled_dot_product_attention", self.attend):
            return super().__call__(*args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        self.probs = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1)     # (B, H, M+N, M+N), text first
        return self.probs @ value


def make_flux(name: str, guidance: bool, seed: int) -> None:
    heads, head_dim = 2, 32
    model = FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
                                   attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=24,
                                   pooled_projection_dim=20, guidance_embeds=guidance, axes_dims_rope=(4, 14, 14))
    randomise(model, seed)
    gen = torch.Generator().manual_seed(seed + 100)
    z = torch.randn(2, 4, 8, 12, generator=gen)          # 4 channels in 4 x 6 patches of 2 x 2
    ctx = torch.randn(2, 10, 24, generator=gen)
    pooled = torch.randn(2, 20, generator=gen)
    sigma = torch.tensor([0.376, 0.0625])

    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    img_ids = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], dim=1)       # (N, 3)
    packed = z.unflatten(3, (6, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 1, 3, 5).reshape(2, 24, 16)
    strength = torch.full((2,), 3.5).double() if guidance else None
    args = {"hidden_states": packed.double(), "encoder_hidden_states": ctx.double(), "guidance": strength,
            "pooled_projections": pooled.double(), "timestep": sigma.double(), "img_ids": img_ids.double(),
            "txt_ids": torch.zeros(10, 3).double()}
    out = model(**args).sample                                                               # (B, N, 16)
    explicit = [ExplicitSoftmax(), ExplicitSoftmax()]
    model.transformer_blocks[1].attn.set_processor(explicit[0])
    model.single_transformer_blocks[0].attn.set_processor(explicit[1])
    torch.testing.assert_close(model(**args).sample, out, atol=1e-12, rtol=0)
    vel = out.reshape(2, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 12)

    weights = flux_to_original(model.state_dict())
    check_same(to_diffusers(weights, heads * head_dim), dict(model.state_dict()))
    if guidance:
        save_folder("flux_transformer", model.state_dict())
    save(name, weights, {"in.z": z, "in.sigma": sigma, "in.ctx": ctx, "in.pooled": pooled, "out.vel": vel,
                         "out.probs_1": explicit[0].probs, "out.probs_2": explicit[1].probs})


def make_t5(seed: int) -> None:
    config = T5Config(vocab_size=50, d_model=24, d_kv=16, num_heads=2, d_ff=40, num_layers=3,
                      feed_forward_proj="gated-gelu", dropout_rate=0.0)
    model = randomise(T5EncoderModel(config), seed)
    for key, w in model.state_dict().items():
        if key.endswith("SelfAttention.q.weight"):       # the logits are not divided: as small as T5's are
            w.copy_((w / 4).to(STORED))
    gen = torch.Generator().manual_seed(seed + 100)
    # long enough that the last of the distances' buckets, from 91 on, is in use
    ids = torch.randint(3, 50, (2, 100), generator=gen)
    ids[0, 60] = 1                                       # </s>, then padding
    ids[0, 61:] = 0
    out = model(ids).last_hidden_state
    weights = {key: w for key, w in model.state_dict().items() if key != "encoder.embed_tokens.weight"}
    save("t5", weights, {"in.ids": ids, "out.hidden": out})


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        make_flux("flux_dev", guidance=True, seed=30)
        make_flux("flux_schnell", guidance=False, seed=31)
        make_t5(seed=40)

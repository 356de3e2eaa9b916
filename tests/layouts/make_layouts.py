"""Key -> shape of every tensor in the published models, for tests/test_layouts.py.

    python tests/layouts/make_layouts.py

Writes *.json beside itself, plain Python and offline: the listings follow from the architecture, and their
numbers of tensors and values are checked against those of the published files.  Keys carry no prefix.
"""
import json
from math import prod
from pathlib import Path

FOLDER = Path(__file__).parent
Shapes = dict[str, tuple[int, ...]]


def linear(key: str, c_out: int, c_in: int) -> Shapes:
    return {f"{key}.weight": (c_out, c_in), f"{key}.bias": (c_out,)}


def conv(key: str, c_out: int, c_in: int, side: int = 3) -> Shapes:
    return {f"{key}.weight": (c_out, c_in, side, side), f"{key}.bias": (c_out,)}


def norm(key: str, c: int) -> Shapes:
    return {f"{key}.weight": (c,), f"{key}.bias": (c,)}


def mmdit(depth: int, grid: int, qk_norm: bool = False, dual: range = range(0)) -> Shapes:
    """SD3's transformer; `grid` is the side of the stored position grid, `dual` the blocks with attn2."""
    D, d = 64 * depth, 64

    def attn(key: str, proj: bool = True) -> Shapes:
        norms = {f"{key}.ln_{x}.weight": (d,) for x in "qk"} if qk_norm else {}
        return linear(f"{key}.qkv", 3 * D, D) | norms | (linear(f"{key}.proj", D, D) if proj else {})

    def mlp(key: str) -> Shapes:
        return linear(f"{key}.fc1", 4 * D, D) | linear(f"{key}.fc2", D, 4 * D)

    out = {"pos_embed": (1, grid * grid, D)} | conv("x_embedder.proj", D, 16, side=2)
    out |= linear("t_embedder.mlp.0", D, 256) | linear("t_embedder.mlp.2", D, D)
    out |= linear("y_embedder.mlp.0", D, 2048) | linear("y_embedder.mlp.2", D, D)
    out |= linear("context_embedder", D, 4096)
    for i in range(depth):
        x, c = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        out |= attn(f"{x}.attn") | mlp(f"{x}.mlp")
        out |= linear(f"{x}.adaLN_modulation.1", (9 if i in dual else 6) * D, D)
        if i in dual:
            out |= attn(f"{x}.attn2")
        if i < depth - 1:
            out |= attn(f"{c}.attn") | mlp(f"{c}.mlp") | linear(f"{c}.adaLN_modulation.1", 6 * D, D)
        else:       # nothing reads the context after the last block: it only lends q, k, v to the attention
            out |= attn(f"{c}.attn", proj=False) | linear(f"{c}.adaLN_modulation.1", 2 * D, D)
    out |= linear("final_layer.linear", 2 * 2 * 16, D) | linear("final_layer.adaLN_modulation.1", 2 * D, D)
    return out


def vae() -> Shapes:
    widths, latent = (128, 256, 512, 512), 16

    def res(key: str, c_in: int, c_out: int) -> Shapes:
        out = norm(f"{key}.norm1", c_in) | conv(f"{key}.conv1", c_out, c_in)
        out |= norm(f"{key}.norm2", c_out) | conv(f"{key}.conv2", c_out, c_out)
        return out | (conv(f"{key}.nin_shortcut", c_out, c_in, side=1) if c_in != c_out else {})

    def mid(key: str, c: int) -> Shapes:
        out = res(f"{key}.block_1", c, c) | res(f"{key}.block_2", c, c) | norm(f"{key}.attn_1.norm", c)
        for layer in ("q", "k", "v", "proj_out"):
            out |= conv(f"{key}.attn_1.{layer}", c, c, side=1)
        return out

    out = conv("encoder.conv_in", widths[0], 3) | mid("encoder.mid", widths[-1])
    out |= norm("encoder.norm_out", widths[-1]) | conv("encoder.conv_out", 2 * latent, widths[-1])
    out |= conv("decoder.conv_in", widths[-1], latent) | mid("decoder.mid", widths[-1])
    out |= norm("decoder.norm_out", widths[0]) | conv("decoder.conv_out", 3, widths[0])
    for i, c in enumerate(widths):
        c_in = widths[max(i - 1, 0)]                    # the encoder comes from the finer level ...
        for b in range(2):
            out |= res(f"encoder.down.{i}.block.{b}", c if b else c_in, c)
        if i < len(widths) - 1:
            out |= conv(f"encoder.down.{i}.downsample.conv", c, c)
        c_in = widths[min(i + 1, len(widths) - 1)]      # ... and the decoder from the coarser one
        for b in range(3):
            out |= res(f"decoder.up.{i}.block.{b}", c if b else c_in, c)
        if i > 0:
            out |= conv(f"decoder.up.{i}.upsample.conv", c, c)
    return out


def clip(width: int, layers: int, projection: bool) -> Shapes:
    out = {"text_model.embeddings.token_embedding.weight": (49408, width),
           "text_model.embeddings.position_embedding.weight": (77, width)}
    for i in range(layers):
        key = f"text_model.encoder.layers.{i}"
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"{key}.self_attn.{layer}", width, width)
        out |= norm(f"{key}.layer_norm1", width) | norm(f"{key}.layer_norm2", width)
        out |= linear(f"{key}.mlp.fc1", 4 * width, width) | linear(f"{key}.mlp.fc2", width, 4 * width)
    out |= norm("text_model.final_layer_norm", width)
    return out | ({"text_projection.weight": (width, width)} if projection else {})


def judge_clip() -> Shapes:
    """CLIP ViT-L/14 whole: 224 pixels in patches of 14."""
    W, vision = 1024, "vision_model"
    out = clip(768, layers=12, projection=True) | {"logit_scale": (), "visual_projection.weight": (768, W)}
    out |= {f"{vision}.embeddings.class_embedding": (W,), f"{vision}.embeddings.patch_embedding.weight": (W, 3, 14, 14),
            f"{vision}.embeddings.position_embedding.weight": (1 + 16 ** 2, W)}
    out |= norm(f"{vision}.pre_layrnorm", W) | norm(f"{vision}.post_layernorm", W)
    for i in range(24):
        key = f"{vision}.encoder.layers.{i}"
        for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= linear(f"{key}.self_attn.{layer}", W, W)
        out |= norm(f"{key}.layer_norm1", W) | norm(f"{key}.layer_norm2", W)
        out |= linear(f"{key}.mlp.fc1", 4 * W, W) | linear(f"{key}.mlp.fc2", W, 4 * W)
    return out


def judge_dino() -> Shapes:
    """DINO ViT-S/16: 224 pixels in patches of 16."""
    W = 384
    out = {"embeddings.cls_token": (1, 1, W), "embeddings.position_embeddings": (1, 1 + 14 ** 2, W)}
    out |= conv("embeddings.patch_embeddings.projection", W, 3, side=16) | norm("layernorm", W)
    for i in range(12):
        key = f"encoder.layer.{i}"
        for layer in ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                      "attention.output.dense"):
            out |= linear(f"{key}.{layer}", W, W)
        out |= norm(f"{key}.layernorm_before", W) | norm(f"{key}.layernorm_after", W)
        out |= linear(f"{key}.intermediate.dense", 4 * W, W) | linear(f"{key}.output.dense", W, 4 * W)
    return out


def flux(guidance: bool) -> Shapes:
    """Flux.1's transformer: 19 double blocks, then 38 single ones; dev reads a guidance strength."""
    D, d = 3072, 128
    out = linear("img_in", D, 2 * 2 * 16) | linear("txt_in", D, 4096)
    embedded = {"time_in": 256, "vector_in": 768} | ({"guidance_in": 256} if guidance else {})
    for key, c_in in embedded.items():
        out |= linear(f"{key}.in_layer", D, c_in) | linear(f"{key}.out_layer", D, D)

    def norms(key: str) -> Shapes:
        return {f"{key}.norm.{x}_norm.scale": (d,) for x in ("query", "key")}

    for i in range(19):
        for stream in ("img", "txt"):
            key = f"double_blocks.{i}.{stream}"
            out |= linear(f"{key}_mod.lin", 6 * D, D) | norms(f"{key}_attn")
            out |= linear(f"{key}_attn.qkv", 3 * D, D) | linear(f"{key}_attn.proj", D, D)
            out |= linear(f"{key}_mlp.0", 4 * D, D) | linear(f"{key}_mlp.2", D, 4 * D)
    for i in range(38):
        key = f"single_blocks.{i}"
        out |= linear(f"{key}.modulation.lin", 3 * D, D) | norms(key)
        out |= linear(f"{key}.linear1", 7 * D, D) | linear(f"{key}.linear2", D, 5 * D)
    return out | linear("final_layer.linear", 2 * 2 * 16, D) | linear("final_layer.adaLN_modulation.1", 2 * D, D)


def t5() -> Shapes:
    """The encoder of T5-XXL (v1.1), whose linear layers have no biases."""
    W, hidden = 4096, 10240
    out = {"shared.weight": (32128, W), "encoder.final_layer_norm.weight": (W,)}
    out["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for i in range(24):
        first, second = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        out |= {f"{first}.SelfAttention.{x}.weight": (W, W) for x in "qkvo"} | {f"{first}.layer_norm.weight": (W,)}
        out |= {f"{second}.DenseReluDense.{x}.weight": (hidden, W) for x in ("wi_0", "wi_1")}
        out |= {f"{second}.DenseReluDense.wo.weight": (W, hidden), f"{second}.layer_norm.weight": (W,)}
    return out


def main() -> None:
    layouts = {  # name: listing, number of tensors, number of values
        "sd3_medium": (mmdit(depth=24, grid=192), 491, 2_084_951_104),
        "sd35_medium": (mmdit(depth=24, grid=384, qk_norm=True, dual=range(13)), 665, 2_469_663_936),
        "sd35_large": (mmdit(depth=38, grid=192, qk_norm=True), 923, 8_146_280_768),
        "vae": (vae(), 244, 83_819_683),
        "clip_l": (clip(768, layers=12, projection=False), 196, 123_060_480),
        "clip_g": (clip(1280, layers=32, projection=True), 517, 694_659_840),
        "flux_dev": (flux(guidance=True), 780, 11_901_408_320),
        # dev's without the guidance embedder: two linear layers, 256 -> 3072 -> 3072
        "flux_schnell": (flux(guidance=False), 776, 11_901_408_320 - (257 + 3073) * 3072),
        "t5xxl": (t5(), 219, 4_762_310_656),
        # numbers of transformers' CLIPModel and ViTModel of these sizes, the second without a pooler
        "judge_clip": (judge_clip(), 590, 427_616_513),
        "judge_dino": (judge_dino(), 198, 21_665_664),
    }
    size = {}
    for name, (shapes, tensors, values) in layouts.items():
        size[name] = sum(prod(shape) for shape in shapes.values())
        derived = (len(shapes), size[name])
        assert derived == (tensors, values), f"{name}: {derived}, expected {(tensors, values)} tensors and values"
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(shape)}" for key, shape in sorted(shapes.items()))
        (FOLDER / f"{name}.json").write_text(f"{{\n{lines}\n}}\n")
        print(f"{name:12s} {tensors:4d} tensors {values:14,d} values")

    # The files' tensor bytes: two per value, transformer and autoencoder (and text towers) together.
    assert 2 * (size["sd3_medium"] + size["vae"]) == 4_337_541_574
    assert 2 * (size["sd35_medium"] + size["vae"]) == 5_106_967_238
    assert 2 * (size["sd35_large"] + size["vae"]) == 16_460_200_902
    assert 2 * (size["sd3_medium"] + size["vae"] + size["clip_l"] + size["clip_g"]) == 5_972_982_214
    assert 2 * size["flux_dev"] == 23_802_816_640
    assert 2 * size["t5xxl"] == 9_524_621_312


if __name__ == "__main__":
    main()

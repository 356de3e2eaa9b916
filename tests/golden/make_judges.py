"""Reference outputs of transformers' CLIPModel and ViTModel on tiny random networks, for tests/test_judges.py.

    oracle/bin/python tests/golden/make_judges.py        # the environment of make_goldens.py, whose ways it follows

judge_clip.safetensors and judge_dino.safetensors hold weights (w.*), inputs (in.*) and outputs (out.*); judge_clip also
what CLIPImageProcessorPil makes of a small picture of odd size, which is stored beside it (in.picture, out.picture).
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
from make_goldens import STORED, randomise, save
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel
from transformers.models.clip import CLIPImageProcessorPil

SMALL = 2 ** -7


def published(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the keys of published files; transformers has others for ViT, and translates when it saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")

def make_clip(seed: int) -> None:
    """Towers of different width, depth and output; the end of text is the largest id, as in make_goldens.py."""
    bos, eos = 58, 59
    text = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 1, "max_position_embeddings": 12, "hidden_act": "quick_gelu", "bos_token_id": bos,
            "eos_token_id": 2}
    vision = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 24, "patch_size": 8, "hidden_act": "quick_gelu"}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=48))
    randomise(model, seed)
    gen = torch.Generator().manual_seed(seed + 100)
    words = torch.randint(1, bos, (3, 12), generator=gen).tolist()
    ids = torch.tensor([[bos, *row[:n], eos] + [eos] * (10 - n) for row, n in zip(words, (10, 4, 0))])
    x = torch.randn(2, 3, 24, 24, generator=gen)
    words = model.text_projection(model.text_model(ids).pooler_output)
    picture = model.visual_projection(model.vision_model(x.double()).pooler_output)
    both = model(input_ids=ids, pixel_values=x.double())     # what the whole model compares has length 1
    torch.testing.assert_close(both.text_embeds, words / words.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(both.image_embeds, picture / picture.norm(dim=-1, keepdim=True))

    photo = np.random.default_rng(seed).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    made = processor(photo, return_tensors="pt")["pixel_values"][0]
    save("judge_clip", published(model), {
        "in.ids": ids, "in.x": x, "out.text": words, "out.image": picture, "in.picture": torch.from_numpy(photo),
        "out.picture": made})


def make_dino(seed: int) -> None:
    config = ViTConfig(hidden_size=128, intermediate_size=160, num_hidden_layers=3, num_attention_heads=2,
                       image_size=24, patch_size=8)
    model = randomise(ViTModel(config, add_pooling_layer=False), seed)
    for key, w in model.state_dict().items():                # so small that the epsilon of the first norm matters
        if key.startswith("embeddings.") and not key.endswith("projection.weight"):
            w.copy_((SMALL * w).to(STORED))
    x = SMALL * torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(seed + 100))
    out = model(x.double()).last_hidden_state[:, 0]
    save("judge_dino", published(model), {"in.x": x, "out.token": out}, eps=str(config.layer_norm_eps))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        make_clip(seed=40)
        make_dino(seed=41)

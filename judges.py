"""Networks that judge generated pictures (Table 3; Fig. 18, 20, 23): CLIP's two towers, and DINO's.

CLIP (Radford et al., 2021) puts pictures and texts into one space, so that a cosine says how well they go together.
DINO (Caron et al., 2021) has never seen a text: its cosine compares two pictures.  Both are transformers over patches
with one class token more, whose row is the answer.  Keys are those of the published files, layers text.py's.

    judge = judges.load_judge("clip")                    # or a folder
    judge.score(images, prompts)                         # {"CLIPScore": (n,)}, 100 x cosine

quality.py says what a judge is.
"""
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from support.checkpoint import Device, Dtype, assign, check_finite, count, full_float32, pick_device, shape
from support.files import decoding
from text import CLIP_MARKS, CLIPText, Layer, clip_tokenizer, tokenize

# ---------------------------------------------------------------------------- pictures -> tensors

# Mean and standard deviation of the colours, red, green, blue, that each network was trained with.
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DINO_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_SHORT = 256 / 224                  # the short side before DINO's centre is cut out, in sides of what is cut out


def centre(image: Image.Image, short: int, size: int, colours: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """The centre of a picture, (3, size, size), normalised; before, its short side is brought to `short`, bicubic."""
    image = image.convert("RGB")
    shortest = min(image.size)
    width = short * image.width // shortest              # what is no whole pixel is cut off, as published
    height = short * image.height // shortest
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left = (width - size) // 2
    top = (height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    mean, std = torch.tensor(colours)                                        # 2 x (3,)
    x = torch.from_numpy(np.array(image)) / 255                              # (size, size, 3), in [0, 1]
    return ((x - mean) / std).permute(2, 0, 1)                               # (3, size, size)


def clip_picture(image: Image.Image, size: int) -> Tensor:
    """A picture as CLIP was trained to see it, (3, size, size)."""
    return centre(image, size, size, CLIP_COLOURS)


def dino_picture(image: Image.Image, size: int) -> Tensor:
    """A picture as DINO sees it, (3, size, size): 256 pixels, of which the 224 in the centre, as DreamBooth has it."""
    return centre(image, round(size * DINO_SHORT), size, DINO_COLOURS)


# ---------------------------------------------------------------------------- networks


def read_patches(conv: nn.Conv2d, first: Tensor, positions: Tensor, x: Tensor) -> Tensor:
    """Pictures (B, 3, ., .) -> a token for each patch, after the class token `first` (1, 1, W): (B, 1+n, W)."""
    patches = conv(x).flatten(2).mT                                          # (B, n, W)
    tokens = torch.cat([first.expand(len(x), 1, -1), patches], dim=1)        # (B, 1+n, W)
    return tokens + positions


def side_of(positions: int, patch: int) -> int:
    """The side in pixels of the square whose patches, and the class token, have so many positions.

    ValueError: they make no square.
    """
    side = math.isqrt(positions - 1)
    if side < 1 or side ** 2 != positions - 1:
        raise ValueError(f"{positions} positions are not those of a class token and the patches of a square")
    return side * patch


class CLIPImage(nn.Module):
    """CLIP's image tower with its projection."""

    def __init__(self, width, hidden, layers, patch, positions, project):
        super().__init__()
        self.size = side_of(positions, patch)            # of the square that it takes, pixels
        self.vision_model = nn.Module()                  # nothing but names: those of the published keys
        self.vision_model.embeddings = nn.Module()
        self.vision_model.embeddings.class_embedding = nn.Parameter(torch.empty(width))
        self.vision_model.embeddings.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        places = torch.empty(positions, width)
        self.vision_model.embeddings.position_embedding = nn.Embedding(positions, width, _weight=places)
        self.vision_model.pre_layrnorm = nn.LayerNorm(width)                 # spelled so in the files
        self.vision_model.encoder = nn.Module()
        self.vision_model.encoder.layers = nn.ModuleList()
        for _ in range(layers):
            self.vision_model.encoder.layers.append(Layer(width, hidden, quick_gelu=True, causal=False))
        self.vision_model.post_layernorm = nn.LayerNorm(width)
        self.visual_projection = nn.Linear(width, project, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, size, size), normalised -> the class token's row, normed and projected, (B, dim)."""
        tower = self.vision_model
        places = tower.embeddings.position_embedding.weight                  # (1+n, W)
        first = tower.embeddings.class_embedding[None, None]                 # (1, 1, W)
        x = tower.pre_layrnorm(read_patches(tower.embeddings.patch_embedding, first, places, x))   # (B, 1+n, W)
        for layer in tower.encoder.layers:
            x = layer(x)
        return self.visual_projection(tower.post_layernorm(x[:, 0]))         # (B, dim)


class CLIP(nn.Module):
    """Both towers of a CLIP; quick GELU in both, though they have projections (SD3's CLIP-G has GELU)."""

    def __init__(self, text_tower: CLIPText, image_tower: CLIPImage):
        super().__init__()
        self.text_tower = text_tower
        self.image_tower = image_tower
        self.length = text_tower.positions               # rows of a text
        self.size = image_tower.size                     # side of a picture, pixels

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None) -> "CLIP":
        """The CLIP of the shapes in `sd` (transformers' CLIPModel), holding those very tensors.

        Not used: the temperature of its training, and in old files the numbers 0, 1, 2, ... of the positions.
        ValueError names missing, surplus and misshapen keys.
        """
        sd = {key: w for key, w in sd.items() if key != "logit_scale" and not key.endswith("embeddings.position_ids")}
        words = {key: w for key, w in sd.items() if key.startswith(("text_model.", "text_projection."))}
        rest = {key: w for key, w in sd.items() if key not in words}
        project, _ = shape(sd, "text_projection.weight", 2)
        width, _, patch, _ = shape(rest, "vision_model.embeddings.patch_embedding.weight", 4)
        positions, _ = shape(rest, "vision_model.embeddings.position_embedding.weight", 2)
        hidden, _ = shape(rest, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)
        layers = count(rest, "vision_model.encoder.layers.")
        with torch.device("meta"):
            image_tower = CLIPImage(width, hidden, layers, patch, positions, project)
        return CLIP(CLIPText.from_state_dict(words, device, dtype, quick_gelu=True),
                    assign(image_tower, rest, "CLIP image tower", device, dtype))

    def image(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, size, size), of clip_picture -> (B, dim), not of length 1."""
        return self.image_tower(x)

    def text(self, ids: Tensor) -> Tensor:
        """Tokens (B, L) -> the row at the end of text, normed and projected, (B, dim), not of length 1."""
        return self.text_tower(ids)[1]


# DINO's names of what a layer of CLIP has, too, in this order.
DINO_KEYS = {"attention.attention.query": "self_attn.q_proj", "attention.attention.key": "self_attn.k_proj",
             "attention.attention.value": "self_attn.v_proj", "attention.output.dense": "self_attn.out_proj",
             "layernorm_before": "layer_norm1", "layernorm_after": "layer_norm2", "intermediate.dense": "mlp.fc1",
             "output.dense": "mlp.fc2"}


def layer_key(key: str) -> str:
    """A key of a DINO file under the name that text.Layer has for it."""
    for theirs, ours in DINO_KEYS.items():
        key = key.replace(theirs, ours)
    return key


class DINO(nn.Module):
    """DINO's vision transformer: exact GELU, and layer norms with an epsilon of 1e-12."""

    def __init__(self, width, hidden, layers, patch, positions):
        super().__init__()
        self.size = side_of(positions, patch)            # of the square that it takes, pixels
        self.embeddings = nn.Module()                    # nothing but names: those of the published keys
        self.embeddings.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.embeddings.position_embeddings = nn.Parameter(torch.empty(1, positions, width))
        self.embeddings.patch_embeddings = nn.Module()
        self.embeddings.patch_embeddings.projection = nn.Conv2d(3, width, patch, stride=patch)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList()
        for _ in range(layers):
            self.encoder.layer.append(Layer(width, hidden, quick_gelu=False, causal=False, eps=1e-12))
        self.layernorm = nn.LayerNorm(width, eps=1e-12)

    @staticmethod
    def from_state_dict(sd: dict[str, Tensor], device: Device = None, dtype: Dtype = None) -> "DINO":
        """The network of the shapes in `sd` (facebook/dino-vits16), holding those very tensors.

        Not used: a `pooler`, which the hub's files can hold and DINO was not trained with.
        ValueError names missing, surplus and misshapen keys, those of layers as text.Layer has them.
        """
        sd = {layer_key(key): w for key, w in sd.items() if not key.startswith("pooler.")}
        width, _, patch, _ = shape(sd, "embeddings.patch_embeddings.projection.weight", 4)
        _, positions, _ = shape(sd, "embeddings.position_embeddings", 3)
        hidden, _ = shape(sd, "encoder.layer.0.mlp.fc1.weight", 2)
        with torch.device("meta"):
            network = DINO(width, hidden, count(sd, "encoder.layer."), patch, positions)
        return assign(network, sd, "DINO network", device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, size, size), of dino_picture -> the class token after the last norm, (B, D)."""
        places = self.embeddings.position_embeddings                         # (1, 1+n, D)
        conv = self.embeddings.patch_embeddings.projection
        x = read_patches(conv, self.embeddings.cls_token, places, x)         # (B, 1+n, D)
        for layer in self.encoder.layer:
            x = layer(x)
        return self.layernorm(x)[:, 0]                                       # (B, D)


# ---------------------------------------------------------------------------- judges


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows of length 1, (n, dim) each -> their cosines, in percent, (n,).  ValueError: not as many of both."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} pictures and {len(b)} prompts or references are not equal lists")
    return 100 * (a * b).sum(1)


@torch.inference_mode()
def unit_rows(inputs: Iterable[Tensor], network, device: torch.device) -> np.ndarray:
    """What a network makes of each input, one at a time, divided by its length: (n, dim)."""
    rows = []
    for x in inputs:
        with full_float32():
            row = network(x[None].to(device))[0].cpu().double()              # (dim,); MPS has no float64
        rows.append((check_finite(row, "the judge's numbers") / row.norm()).numpy())
    return np.stack(rows)                                                    # (n, dim)


class ClipScore:
    """A judge: CLIPScore as Table 3 has it, 100 x the cosine of a picture and its prompt.

    The paper does not name its CLIP, nor the factor; by their size, its values are those of ViT-L/14.  CLIPScore as
    published (Hessel et al., 2021) is 2.5 x the positive cosine, by ViT-B/32.
    """
    columns = ("CLIPScore",)

    def __init__(self, clip: CLIP, tokenizer: Tokenizer, name: str, fingerprint: str):
        self.clip = clip
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint

    @property
    def device(self) -> torch.device:
        return self.clip.text_tower.device

    def pictures(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pictures -> (n, dim), of length 1."""
        inputs = (clip_picture(image, self.clip.size) for image in images)
        return unit_rows(inputs, self.clip.image, self.device)

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> (n, dim), of length 1.  What is longer than the tower's rows is cut, as published."""
        inputs = []
        for prompt in prompts:
            ids, _, _ = tokenize(self.tokenizer, CLIP_MARKS, self.clip.length, prompt)
            inputs.append(torch.tensor(ids))                                 # (L,)
        return unit_rows(inputs, self.clip.text, self.device)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"CLIPScore": (n,)} of n pictures and their prompts."""
        return {"CLIPScore": cosine(self.pictures(images), self.texts(prompts))}


def similarity(judge: ClipScore, dino: DINO, images: Sequence[Image.Image], references: Sequence[Image.Image],
               prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """How pictures resemble their references and prompts (B.5, Fig. 18, 20, 23), in percent: {column: (n,)}.

    CLIP-I and DINO: cosine with the reference, a picture from the same noise without the perturbation; CLIP-T: cosine
    with the prompt, which is CLIPScore.
    """
    pictures = judge.pictures(images)                                        # (n, dim)
    seen = unit_rows((dino_picture(image, dino.size) for image in images), dino, judge.device)       # (n, D)
    expected = unit_rows((dino_picture(image, dino.size) for image in references), dino, judge.device)
    return {"CLIP-I": cosine(pictures, judge.pictures(references)),
            "CLIP-T": cosine(pictures, judge.texts(prompts)),
            "DINO": cosine(seen, expected)}


def load_judge(name_or_path: str | Path = "clip", device: str | torch.device = "auto") -> ClipScore:
    """CLIP as a judge: "clip" is ViT-L/14 from the hub, else a folder (support.judge_files.find).  In float32.

    ValueError: no such file, one that is broken, or of another network.
    """
    from support import judge_files, weights  # here: they import the hub's client, which networks do not need
    files = judge_files.find("clip", name_or_path)
    clip = CLIP.from_state_dict(judge_files.read(files), pick_device(device), torch.float32)
    with decoding(files.merges, "list of CLIP's merges"):
        tokenizer = clip_tokenizer(weights.read_merges(files.merges))
    if tokenizer.get_vocab_size() != clip.text_tower.vocab:
        raise ValueError(f"the parts of {files.weights} do not fit each other: {tokenizer.get_vocab_size()} tokens in "
                         f"the merges, {clip.text_tower.vocab} in the weights")
    return ClipScore(clip, tokenizer, Path(name_or_path).resolve().name, judge_files.fingerprint(files))


def load_dino(name_or_path: str | Path = "clip", device: str | torch.device = "auto") -> tuple[DINO, str]:
    """The DINO that goes with the judge of that name, or lies in that folder; and its files' fingerprint."""
    from support import judge_files
    files = judge_files.find("dino", name_or_path)
    network = DINO.from_state_dict(judge_files.read(files), pick_device(device), torch.float32)
    return network, judge_files.fingerprint(files)

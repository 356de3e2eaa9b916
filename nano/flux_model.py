"""nano-flux before its training: Flux's architecture in small, with a T5 of one layer and a unigram tokenizer.

pretrain.py --arch flux trains it, on the scenes, latents and captions that nano is trained on.
"""
import argparse

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from flux import Flux, FluxConfig
from t5 import T5
from text import CLIPText, FluxText, clip_tokenizer


def word_unigrams(words: list[str]) -> Tokenizer:
    """T5's kind of tokenizer, in which each of these words is one token; other words fall apart into letters.

    A unigram tokenizer takes the pieces whose scores have the largest sum, so one piece of a word beats its letters.
    """
    pieces = [(mark, 0.0) for mark in ("<pad>", "</s>", "<unk>")]            # ids 0, 1, 2 as in T5
    pieces += [("\u2581" + word, -5.0) for word in words]
    pieces += [(letter, -10.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def new_flux(args: argparse.Namespace, latent: int, words: list[str], merges: list[str]) -> tuple[Flux, FluxText]:
    """Transformer and text towers of the sizes in `args`, untrained; `merges` are those of CLIP's tokenizer.

    Like schnell it reads no guidance strength: it is not distilled, so classifier-free guidance is there to use.
    """
    torch.manual_seed(args.seed)
    clip_width, width = args.text_widths
    tokenizer = word_unigrams(words)
    clip_l = CLIPText(2 * 256 + len(merges) + 2, args.text_length, clip_width, 2 * clip_width, args.text_layers,
                      quick_gelu=True, project=0)
    t5xxl = T5(tokenizer.get_vocab_size(), width, inner=width, heads=width // args.head_dim, hidden=2 * width,
               layers=args.text_layers, buckets=32)
    embeddings = clip_l.text_model.embeddings
    nn.init.normal_(embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.1)
    nn.init.normal_(t5xxl.shared.weight)
    for block in t5xxl.encoder.block:                    # a layer begins as the identity: a word is its own first
        nn.init.zeros_(block.layer[0].SelfAttention.o.weight)
        nn.init.zeros_(block.layer[1].DenseReluDense.wo.weight)
    nn.init.zeros_(t5xxl.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    double, single = args.flux_blocks
    flux = Flux(FluxConfig(width=args.width, double_blocks=double, single_blocks=single, head_dim=args.head_dim,
                           columns=latent, ctx_dim=width, pooled_dim=clip_width, mlp=args.mlp_ratio * args.width,
                           time_dim=128, guidance=False))
    return flux, FluxText(clip_l, t5xxl, clip_tokenizer(merges), tokenizer, args.text_length)

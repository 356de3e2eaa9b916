"""Negative controls: what must not segment.  If it does, the score does not come from where it should.

    python evaluate.py --control swapped                 # wrong names: is it the words that segment?
    python evaluate.py --control block                   # its queries shuffled: is it this block's trained weights?

Both leave all else as it is: the same pictures, as many names, maps as smooth as before. Only what links a patch to its
word is gone, so the score should fall to the floor or near it, on either side.
"""
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flux import Flux, SingleBlock
from loading import Seg4Diff

CONTROLS = ("swapped", "block")


def swapped(ids: np.ndarray, classes: list[str], seed: int) -> list[str]:
    """For each class of a picture (K,) the name of another class, in random order; no name twice.

    Names of classes that the picture does not hold, as a caption of another picture has them. Where the data set has
    too few of those, the rest get names of this picture, never their own.  ValueError: the data set has one class.
    """
    if len(classes) < 2:
        raise ValueError("--control swapped needs a data set of two classes or more")
    absent = np.setdiff1d(np.arange(len(classes)), ids)                      # (K',)
    absent = np.random.default_rng(seed).permutation(absent)
    names = []
    for i in range(len(ids)):
        other = absent[i] if i < len(absent) else ids[i - 1]
        names.append(classes[other])
    return names


def shuffle(rows: Tensor, seed: int) -> None:
    """Permute a tensor's rows where it lies."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows.copy_(rows[order.to(rows.device)])


@torch.no_grad()
def shuffle_block(model: Seg4Diff, seed: int = 0) -> Seg4Diff:
    """The model with the channels of its expert block's queries in another order; its weights are changed.

    The queries are those of the image (of a single block of Flux, of both modalities). Each patch then asks for
    something that no word answers. All before the block, and the words' keys, stay right.
    """
    n = model.preset.block
    if isinstance(model.transformer, Flux):
        block = model.transformer.blocks[n]
        qkv = block.linear1 if isinstance(block, SingleBlock) else block.img_attn.qkv
    else:
        qkv = model.transformer.joint_blocks[n].x_block.attn.qkv
    D = qkv.in_features
    for part in (qkv.weight, qkv.bias):
        if part is not None:
            shuffle(part[:D], seed)                      # q's rows are the first
    return replace(model, fingerprint=f"{model.fingerprint}, block {n} shuffled")

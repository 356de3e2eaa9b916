"""One tiny random model for all tests, made by nano's own code and loaded from its file like any other."""
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import seg4diff
from nano import pretrain
from vae import VAE

ARGS = Namespace(seed=0, text_widths=(64, 128), text_length=28, width=64, depth=3, head_dim=32)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """nano's architecture at width 64, untrained, in SD3's key layout; no parameter is left at zero."""
    mmdit, text, merges = pretrain.build(ARGS, 16)
    torch.manual_seed(1)
    vae = VAE((16, 24, 48, 64), 1, 1)
    with torch.no_grad():
        for part in (mmdit, text, vae):
            for name, p in part.named_parameters():
                if name.endswith("bias") or "adaLN" in name or "final_layer.linear" in name:
                    p.normal_(std=0.1)
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    pretrain.export(path, mmdit, text, vae, merges, {"by": "tests"})
    return path


@pytest.fixture(scope="session")
def tiny(tiny_file) -> seg4diff.Seg4Diff:
    return seg4diff.load(tiny_file, device="cpu", dtype="float32")

"""The GPU takes the same path as the CPU.  Only with a GPU, and when asked for (see conftest.py):

    SEG4DIFF_CUDA=1 pytest -q tests/test_cuda.py
"""
import numpy as np
import pytest
import torch

import seg4diff
from lora import add_lora, load_lora, merge_lora, save_lora
from support.data import DATASETS
from vae import Norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or SEG4DIFF_CUDA is not set")


@pytest.fixture(scope="module")
def models():
    return [seg4diff.load("nano", device, "float32") for device in ("cpu", "cuda")]


def test_segmentation_is_the_cpus(models):
    item = DATASETS["scenes"]().read("0")
    here, there = (seg4diff.segment(m, item.image, ["sky", "grass", "car"]) for m in models)
    torch.testing.assert_close(there.maps, here.maps, rtol=1e-3, atol=1e-5)
    assert (here.labels == there.labels).mean() > 0.999


def test_pictures_are_the_cpus(models):
    """Guided by a blurred branch, too."""
    here, there = (seg4diff.generate(m, ["a red car on grass"], steps=4, pag=1.0, seed=0)[0] for m in models)
    assert np.abs(np.asarray(here, int) - np.asarray(there, int)).mean() < 1


def test_lora_moves_to_the_gpu(tmp_path):
    model = seg4diff.load("nano", "cuda").transformer                        # bf16
    params = add_lora(model, generator=torch.Generator().manual_seed(0))
    assert all(p.device.type == "cuda" and p.dtype == torch.float32 for p in params)
    save_lora(model, tmp_path / "lora.safetensors")
    other = seg4diff.load("nano", "cuda").transformer
    load_lora(other, tmp_path / "lora.safetensors")
    loaded = [p for name, p in other.named_parameters() if ".groups." in name]
    assert len(loaded) == len(params) and all(p.device.type == "cuda" for p in loaded)
    assert merge_lora(other).state_dict().keys() == seg4diff.load("nano", "cuda").transformer.state_dict().keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_evaluation_in_half_precision(command, tmp_path, dtype):
    code, out, err = command("evaluate.py", "--limit", 4, "--dtype", dtype, "--device", "cuda", "--out", tmp_path / "o")
    assert code == 0 and dtype in out, err


def test_training_goes_on_after_a_kill(command, tmp_path):
    """bf16 autocast, checkpointing, accumulation, and the state that comes back from the disk."""
    common = ("--steps", 4, "--warmup", 1, "--batch", 2, "--accumulate", 2, "--limit", 8, "--val", "none",
              "--device", "cuda", "--save-every", 1, "--checkpointing", "--out", tmp_path / "m")
    code, out, err = command("train_magnet.py", *common)
    assert code == 0 and "wrote" in out, err
    code, out, err = command("train_magnet.py", *common)
    assert code == 0 and "0 steps" in out, err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudas_group_norm_sums_in_float32(dtype):
    """On a map of a 1024 x 1024 picture, far from zero: as exact as a copy in float32 whose result is rounded."""
    x = (100 + 30 * torch.randn(1, 128, 1024, 1024, generator=torch.Generator().manual_seed(0))).to("cuda", dtype)
    norm = Norm(32, 128).to("cuda", dtype)
    want = torch.nn.functional.group_norm(x.float(), 32, eps=1e-6)
    got = norm(x).float()
    assert got.isfinite().all() and (got - want).abs().max() < 2 * torch.finfo(dtype).eps * want.abs().max()

"""One tiny random model for all tests, made by nano's own code and loaded from its file like any other."""
import os
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"         # no test may reach for the network; read when the hub's client is imported
if not os.environ.get("SEG4DIFF_CUDA"):    # numbers are compared with the CPU's; tests/test_cuda.py asks for the GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))                        # from whatever folder pytest is started

import lora  # noqa: E402
import seg4diff  # noqa: E402
from nano import pretrain  # noqa: E402
from vae import VAE  # noqa: E402

torch.set_num_threads(1)                   # for tensors this small; on a busy machine more threads wait for each other

ARGS = Namespace(arch="sd3", seed=0, text_widths=(64, 128), text_length=28, text_layers=2, width=64, depth=3,
                 head_dim=32, flux_blocks=(2, 2), mlp_ratio=4)


def write_tiny(args: Namespace, path: Path) -> Path:
    """A model file of these sizes, untrained; no parameter is left at zero."""
    mmdit, text, merges = pretrain.new_model(args, 16)
    torch.manual_seed(1)
    vae = VAE((16, 24, 48, 64), 1, 1, 16)
    with torch.no_grad():
        for part in (mmdit, text, vae):
            for name, p in part.named_parameters():
                if name.endswith("bias") or not p.any():
                    p.normal_(std=0.1)
    pretrain.export(path, mmdit, text, vae, merges, {"by": "tests"})
    return path


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """nano's architecture at width 64, in SD3's key layout."""
    return write_tiny(ARGS, tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny(tiny_file) -> seg4diff.Seg4Diff:
    return seg4diff.load(tiny_file, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_flux_file(tmp_path_factory) -> Path:
    """nano-flux's at width 64: two double blocks, two single ones."""
    args = Namespace(**vars(ARGS) | {"arch": "flux", "text_widths": (64, 96), "text_length": 24, "text_layers": 1})
    return write_tiny(args, tmp_path_factory.mktemp("model") / "tiny_flux.safetensors")


@pytest.fixture(scope="session")
def tiny_flux(tiny_flux_file) -> seg4diff.Seg4Diff:
    return seg4diff.load(tiny_flux_file, device="cpu", dtype="float32")


@pytest.fixture
def own_lora(tiny_file, tmp_path) -> Path:
    """A LoRA of the tiny model that changes much."""
    model = seg4diff.load(tiny_file, device="cpu")
    for p in lora.add_lora(model.transformer, generator=torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(p, std=0.2)
    lora.save_lora(model.transformer, tmp_path / "own.safetensors")
    return tmp_path / "own.safetensors"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a script as the command line would, in an empty folder: command("evaluate.py", "--limit", 2, ...) ->
    exit code, stdout, stderr.  In this process, which saves two seconds of imports a run."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, *args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(Path(seg4diff.__file__).parent / script), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        return code, *capsys.readouterr()
    return run


# of the explorer's tests, which share pages and browser; browser.py skips them where there is none


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Pages of the explorer."""
    import browser

    folder = tmp_path_factory.mktemp("pages")
    browser.write_pages(folder)
    return folder


@pytest.fixture(scope="session")
def driver():
    import browser

    driver = browser.new_driver()
    yield driver
    driver.quit()


@pytest.fixture
def open_page(driver, folder):
    """Opens a page of `folder`: browser.opening."""
    import browser

    yield from browser.opening(driver, folder)

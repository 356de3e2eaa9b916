"""Counts agree with PyTorch's own counter and with the published layouts; forecasts add up."""
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import flux
import magnet
import mmdit
import readings
from loading import Preset
from lora import add_lora
from support import weights
from t5 import T5
from text import CLIPText
from tools import check_forecast, costs, forecast
from tools.costs import Shapes
from vae import VAE

LAYOUTS = Path(__file__).parent / "layouts"
FILES = {"sd3": "sd3_medium", "sd3.5-medium": "sd35_medium", "sd3.5-large": "sd35_large", "flux": "flux_dev",
         "flux-schnell": "flux_schnell"}
PLAIN = mmdit.MMDiTConfig(width=128, depth=3, head_dim=64, patch=2, channels=16, pos_grid=64, ctx_dim=96,
                          pooled_dim=96, mlp=512, time_dim=256)
DUAL = mmdit.MMDiTConfig(**vars(PLAIN) | {"qk_norm": True, "dual_blocks": (0, 1)})
FLUX = flux.FluxConfig(width=128, double_blocks=2, single_blocks=2, head_dim=32, columns=64, ctx_dim=96, pooled_dim=64,
                       mlp=512, time_dim=256, guidance=False)


def small(cfg: mmdit.MMDiTConfig | flux.FluxConfig, size: int = 256) -> Shapes:
    """A model of this transformer, every other part small."""
    preset = Preset(size=size, block=1, steps=2, noise_steps=1, text_length=48)
    with torch.device("meta"):
        vae = VAE((8, 16, 32, 32), 1, 1, 16)
        clip_l = CLIPText(500, 77, 64, 128, 2, quick_gelu=True, project=0)
        if isinstance(cfg, flux.FluxConfig):
            return Shapes(flux.Flux(cfg), vae, clip_l, None, T5(200, 96, 64, 2, 128, 2, 32), preset.changed(cfg=1.0))
        clip_g = CLIPText(500, 77, 128, 256, 2, quick_gelu=False, project=128)
        return Shapes(mmdit.MMDiT(cfg), vae, clip_l, clip_g, None, preset)


@torch.no_grad()
def counted(call, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """What PyTorch's counter says of a call with such tensors."""
    with torch.device("meta"):
        inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            call(*inputs)
    return counter.get_total_flops()


# ---------------------------------------------------------------------------- the published models


@pytest.mark.parametrize("name, layout", FILES.items())
def test_published_shapes(name, layout):
    """Key for key those of the files, and as many values as are loaded of them, for segmentation alone, too."""
    shapes = costs.published(name)
    parts = {"mmdit": layout, "vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5xxl"}
    for part, file in parts.items():
        module = getattr(shapes, part)
        if module is None:
            continue
        listed = json.loads((LAYOUTS / f"{file}.json").read_text())
        assert {key: list(x.shape) for key, x in module.state_dict().items()} == listed
        assert costs.values(shapes)[part] == sum(map(math.prod, listed.values()))
        if part == "mmdit":
            kept = weights.needed(listed, shapes.preset.block)
            assert costs.values(shapes, True)[part] == pytest.approx(sum(math.prod(listed[k]) for k in kept), 0.01)


def test_shapes_of_a_model_that_is_loaded(tiny):
    shapes = costs.shapes_of(tiny)
    assert (shapes.image_tokens, shapes.text_tokens) == (tiny.grid ** 2, 2 * tiny.text.length)
    assert costs.values(shapes)["vae"] == sum(p.numel() for p in tiny.vae.parameters())
    assert tiny.device.type == "cpu"                     # it is still where it was


# ---------------------------------------------------------------------------- operations


@pytest.mark.parametrize("cfg, i", [(PLAIN, 0), (PLAIN, 2), (DUAL, 0), (FLUX, 0), (FLUX, 3)])
@pytest.mark.parametrize("early", [False, True])
def test_operations_of_a_block(cfg, i, early):
    shapes = small(cfg)
    block = shapes.mmdit.blocks[i]
    N, M, D = 16, 10, cfg.width
    where = (4, 4)
    if isinstance(cfg, flux.FluxConfig):
        where = flux.rotary(where, M, cfg.head_dim, "meta")
    call = block.joint if early else block
    wanted = counted(lambda x, text, c: call(x, text, c, where), (1, N, D), (1, M, D), (1, D))
    assert costs.block_flop(block, N, M, early).total == wanted


@pytest.mark.parametrize("cfg", [PLAIN, FLUX])
@pytest.mark.parametrize("stop_at", [None, 1])
def test_operations_of_a_transformer(cfg, stop_at):
    """All but the layers at its ends, which are more of a narrow one than of a published one."""
    shapes = small(cfg)
    inputs = (1, 16, 32, 32), (1,), (1, shapes.text_tokens, cfg.ctx_dim), (1, cfg.pooled_dim)
    wanted = counted(lambda *x: shapes.mmdit(*x, capture={1}, stop_at=stop_at), *inputs)
    assert costs.transformer_flop(shapes, stop_at).total == pytest.approx(wanted, 0.05)


def test_operations_of_text_and_autoencoder():
    sd3 = small(PLAIN)
    both = sum(counted(tower, (1, 77), dtype=torch.int64) for tower in (sd3.clip_l, sd3.clip_g))
    assert costs.text_flop(sd3).total == both
    of_flux = small(FLUX)
    both = counted(of_flux.clip_l, (1, 77), dtype=torch.int64) + counted(of_flux.t5xxl, (1, 48), dtype=torch.int64)
    assert costs.text_flop(of_flux).total == both
    assert costs.encode_flop(sd3.vae, 64) == counted(sd3.vae.encode, (1, 3, 64, 64))
    assert costs.decode_flop(sd3.vae, 64) == counted(sd3.vae.decode, (1, 16, 8, 8))


def test_operations_of_maps():
    def read(qkv):
        qkv = mmdit.JointQKV(*qkv, 64, (8, 8))
        readings.i2i_step(qkv, mmdit.i2t_attention(qkv)[0, 0, :, :3].mT.unflatten(1, (8, 8)))

    assert costs.maps_flop(64, 20, 128) == counted(read, (3, 1, 2, 84, 64))


def test_operations_of_training():
    """Forward, forward again, and back: as the counter says, but for the LoRA, ends and maps that are left out."""
    shapes = small(PLAIN)._replace(preset=Preset(size=512, block=1))
    model = small(PLAIN).mmdit
    add_lora(model, rank=1)
    model.checkpointing = True
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inputs = torch.empty(1, 16, 64, 64), torch.empty(1), torch.empty(1, 154, 96), torch.empty(1, 96)
        vel, _ = model(*inputs)
        vel.mean().backward()
    matrix = costs.training(shapes).matrix - costs.text_flop(shapes).total
    assert matrix == pytest.approx(counter.get_total_flops(), 0.1)


def test_maps_of_training():
    """Computed, computed again on the way back, and led back through."""
    shapes = small(PLAIN)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        q, k, v = (torch.empty(1, 2, 256 + 154, 64, requires_grad=True) for _ in range(3))
        mmdit.i2t_attention(mmdit.JointQKV(q, k, v, 256, (16, 16))).sum().backward()
    assert costs.training(shapes).maps == counter.get_total_flops()


def test_work_of_the_tasks():
    shapes = small(PLAIN)
    forward = costs.transformer_flop(shapes).total
    text = costs.text_flop(shapes).total
    drawn = costs.generation(shapes)
    assert drawn == (4 * forward + 2 * text, costs.decode_flop(shapes.vae, 256), 0, 2, 2)     # 2 steps, 2 branches
    seen = costs.segmentation(shapes)
    assert seen.matrix == costs.transformer_flop(shapes, 1).total + text
    assert (seen.conv, seen.maps) == (costs.encode_flop(shapes.vae, 256), costs.maps_flop(256, 154, 128))
    assert costs.generation(small(FLUX)).passes == 2 and costs.branches(small(FLUX)) == 1


# ---------------------------------------------------------------------------- bytes


class Alive(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.held = {}                                   # storage -> what tells whether it is still there, its bytes
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(n for _, n in self.held.values()))
        return out

    @classmethod
    def _should_skip_dynamo(cls):                        # else PyTorch imports its compiler, for seconds
        return False


@torch.inference_mode()
def alive(call) -> int:
    with Alive() as mode:
        call()
    return mode.peak


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_of_the_autoencoder(dtype, itemsize):
    """Beside them are only the parts that a norm looks at, few of a map as large as this."""
    vae = forecast.random_on(small(PLAIN).vae, torch.device("cpu"), dtype)
    x = torch.randn(1, 3, 512, 512).to(dtype)
    z = torch.randn(1, 16, 64, 64).to(dtype)
    assert alive(lambda: vae.encode(x)) == pytest.approx(costs.encode_bytes(vae, 512, itemsize), 0.2)
    assert alive(lambda: vae.decode(z)) == pytest.approx(costs.decode_bytes(vae, 512, itemsize), 0.1)


@pytest.mark.parametrize("cfg", [PLAIN, DUAL, FLUX])
def test_bytes_of_the_transformer(cfg):
    """Forward, maps, and a step of MAGNET, within a factor of 1.5; a pass of two kinds of blocks takes less."""
    shapes = small(cfg, size=384)                        # 576 image tokens
    model = forecast.random_on(shapes.mmdit, torch.device("cpu"), torch.float32)
    for buffer in model.buffers():
        buffer.zero_()
    M = shapes.text_tokens
    inputs = torch.randn(1, 16, 48, 48), torch.ones(1), torch.randn(1, M, cfg.ctx_dim), torch.randn(1, cfg.pooled_dim)
    assert 0.5 < alive(lambda: model(*inputs)) / costs.forward_bytes(shapes, 1, 4) < 1.1
    _, taps = model(*inputs, capture={1}, stop_at=1)
    maps = alive(lambda: mmdit.i2t_attention(taps[1]))
    assert maps == pytest.approx(costs.maps_bytes(shapes, 1, copies=2), 0.2)
    add_lora(model, 2)
    model.checkpointing = True
    with Alive() as mode:
        vel, taps = model(*inputs, capture={1})
        p = magnet.minmax(mmdit.i2t_attention(taps[1]).mean(1).mT)
        (vel.square().mean() + p.square().mean()).backward()
    assert 1 / 1.5 < mode.peak / costs.work_bytes(shapes, "magnet", torch.float32, "cpu", 1) < 1.5


# ---------------------------------------------------------------------------- does it fit, how long


def test_what_fits():
    sd3 = costs.published("sd3")
    bf16 = torch.bfloat16

    def way(task, gigabytes, dtype=bf16, shapes=sd3, kind="cuda"):
        return forecast.way_out(shapes, task, dtype, bf16, kind, 1e9 * gigabytes, forecast.BATCH[task])

    assert way("segment", 8) == "" and way("generate", 8) is None and way("generate", 12) == ""
    assert way("generate", 12, torch.float32) == "--dtype bfloat16"
    assert way("magnet", 10) == "--batch 1" and way("magnet", 16) == ""
    assert way("magnet", 10, torch.float32) == "--dtype bfloat16 --batch 1"
    assert way("segment", 8, torch.float32, kind="cpu") == "--dtype bfloat16"
    fixed = (sd3, "segment", torch.float32)
    assert forecast.way_out(*fixed, None, "mps", 8e9, 1) is None             # no 16 bits there
    assert forecast.way_out(*fixed, torch.float16, "cuda", 8e9, 1) == "--dtype float16"
    assert forecast.way_out(sd3, "magnet", torch.float32, torch.float16, "cuda", 16e9, 4) == "--batch 1"
    assert forecast.way_out(sd3, "magnet", torch.float32, torch.float16, "cuda", 12e9, 4) is None


def test_what_waits():
    """T5 first, then the transformer, of which segmentation has 13 blocks; but MAGNET's blocks cannot wait."""
    shapes = costs.published("flux")

    def need(task, free):
        return forecast.need(shapes, task, torch.bfloat16, "cuda", free)

    assert need("segment", 80e9).waiting == () and need("segment", 80e9).host == 0
    assert need("segment", 15e9).waiting == ("t5xxl",)
    assert need("segment", 15e9).host == pytest.approx(9.3e9, 0.02)
    both = need("segment", 8e9)
    assert both.waiting == ("t5xxl", "mmdit") and both.device < 4e9 and both.host == pytest.approx(18e9, 0.05)
    assert need("generate", 24e9).host == pytest.approx(33e9, 0.05)
    assert need("magnet", 8e9).waiting == ("t5xxl",) and need("magnet", 8e9).device > 24e9
    # each block comes once a pass, T5 once a prompt
    rates = forecast.Rates(math.inf, math.inf, math.inf, 1e9)
    sizes = costs.values(shapes)
    wanted = 2 * (50 * sizes["mmdit"] + 2 * sizes["t5xxl"]) / 1e9
    drawn = forecast.picture_seconds(shapes, "generate", rates, need("generate", 8e9), torch.bfloat16)
    assert drawn == pytest.approx(wanted)


def test_burst_and_seconds(monkeypatch):
    """The seconds of a block, of a strip of the autoencoder and of the maps, at their own speed each."""
    monkeypatch.setattr(forecast, "LEAST", 0.01)
    shapes = small(PLAIN)
    rates = forecast.burst(shapes, torch.device("cpu"), torch.float32, batch=2)
    assert all(1e6 < rate < 1e15 for rate in rates[:3]) and rates.copy == math.inf

    def clock(call, device):
        call()
        return 2.0

    by_clock = forecast.burst(shapes, torch.device("cpu"), torch.float32, clock=clock)
    assert by_clock.matrix == costs.block_flop(shapes.mmdit.blocks[0], 256, 154).total / 2
    need = forecast.need(shapes, "segment", torch.float32, "cpu", math.inf)
    total = forecast.picture_seconds(shapes, "segment", rates, need, torch.float32)
    work = costs.segmentation(shapes)
    assert total == pytest.approx(work.matrix / rates.matrix + work.conv / rates.conv + work.maps / rates.maps)


def test_forecast_beside_measured(tiny, capsys, monkeypatch):
    """A line for the bytes, a line for each round; what waits takes no seconds, on the CPU."""
    monkeypatch.setattr(forecast, "LEAST", 0.01)
    monkeypatch.setattr(check_forecast, "megabytes", lambda call, device: 1000)              # of 2 ** 20 bytes each
    asleep = check_forecast.busy_seconds(lambda: time.sleep(0.1), tiny.device)
    assert asleep < 0.05
    shapes = costs.shapes_of(tiny)
    check_forecast.compare(shapes, "segment", lambda: torch.randn(2 ** 20).sort(), tiny, 1, rounds=2)
    memory, *rounds = capsys.readouterr().out.splitlines()
    assert "GB foretold    1.05 GB measured" in memory and "above the weights'" in memory
    assert len(rounds) == 2 and all("s foretold" in line and "s measured" in line for line in rounds)


@pytest.mark.parametrize("seconds, said", [(0.0123, "12 ms"), (1.5, "1500 ms"), (3.21, "3.2 s"), (150, "2.5 min"),
                                           (36000, "10 h"), (1e9, "32 years")])
def test_durations(seconds, said):
    assert forecast.human(seconds) == said


def test_tables(command, monkeypatch):
    monkeypatch.setattr(costs, "TRANSFORMERS", {"sd3": costs.SD3})
    code, out, err = command("tools/forecast.py", "--memory", 8, 24, "--tflops", 100)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert "| sd3 | segmentation | 3.7 | 0.8 | 4.5 | 8.4 | 0.084 |" in lines
    assert "| sd3 | MAGNET, batch 4 | no | fits |" in lines and len(lines) == 2 * (3 + 2) + 5
    code, _, err = command("tools/forecast.py", "--memory", -1)
    assert code == 2 and "must be positive" in err


@pytest.mark.parametrize("args, sentence", [(["--size", 512], "--size belongs to --model sd3"),
                                            (["--model", "sd3", "--size", 144], "a multiple of 32, not 144")])
def test_sizes_that_are_refused(command, args, sentence):
    """At once, not after minutes of random weights."""
    code, out, err = command("tools/check_forecast.py", *args)
    assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1

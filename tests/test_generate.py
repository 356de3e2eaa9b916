"""Generation beyond one batch, its schedule, its branches; and what is remembered of prompts."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import loading
import sampling
import seg4diff


@pytest.mark.parametrize("batch", [1, 2])
def test_each_batch_has_its_own_prompts_and_noise(tiny, batch):
    prompts = ["red car", "snow", "teddy bear"]
    model = replace(tiny, preset=replace(tiny.preset, batch=batch))
    z, want = [], []
    images = seg4diff.generate(model, prompts, steps=1, seed=5, callback=lambda i, x: z.append(x))
    seg4diff.generate(tiny, prompts, steps=1, seed=5, callback=lambda i, x: want.append(x))
    assert len(images) == 3
    torch.testing.assert_close(torch.cat(z), want[0], atol=1e-4, rtol=0)


def test_a_block_that_is_blurred_throughout_and_for_guidance(tiny):
    with torch.inference_mode():
        cond, uncond = (tiny.text.encode([p]) for p in ("red car", ""))
        z, sigma = seg4diff.noise((16, 8, 8), [0]), torch.tensor([0.5])
        both = sampling.guided_velocity(tiny, cond, uncond, 3.0, 2.0, [1], perturb=[1])(z, sigma)
        throughout = sampling.guided_velocity(tiny, cond, uncond, 3.0, perturb=[1])(z, sigma)
    torch.testing.assert_close(both, throughout, atol=1e-5, rtol=0)      # no branch is worse than another


def test_latents_on_the_way(tiny):
    model = replace(tiny, preset=replace(tiny.preset, steps=2, noise_steps=1))
    images, latents = sampling.trajectory(model, ["car", "sky"], seed=4)
    assert latents.keys() == {0, 1, 2} and torch.equal(latents[2], seg4diff.noise((16, 16, 16), [4, 5]))
    x = (model.vae.decode(latents[0])[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    assert (torch.from_numpy(np.array(images[0])) - x).abs().max() < 1
    with pytest.raises(ValueError, match="more than a batch"):
        sampling.trajectory(model, ["car"] * 17)


def test_the_memory_of_prompts_tells_names_apart(tiny):
    with torch.inference_mode():
        for prompts in ([["teddy bear", "sky"]], [["teddy", "bear sky"]], ["teddy bear sky"], [["sky"], ["car"]],
                        [["car"], ["sky"]]):
            now, kept = tiny.text.encode_now(prompts), tiny.text.encode(prompts)
            assert kept.spans == now.spans and torch.equal(kept.ctx, now.ctx) and torch.equal(kept.pooled, now.pooled)


def test_seeds_of_any_size():
    a = loading.noise((4,), [-1, 2**63 - 1, 2**63 + 5, 5, 2**32 + 5, 2**70 + 5])
    assert torch.equal(a[0], a[1]) and torch.equal(a[2], a[3]) and torch.equal(a[3], a[5])


def test_zero_is_a_level_and_a_strength():
    preset = loading.Preset(level=0.0, guidance=0.0)
    assert preset.sigma == 0 and preset.distilled == {"guidance": 0.0}


def test_the_preset_s_strength_is_kept(tiny):
    model = replace(tiny, preset=replace(tiny.preset, guidance=2.0))
    assert model.guided(None).preset.guidance == 2.0

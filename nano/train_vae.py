"""nano's VAE: its training, and the latents of all scenes, which are encoded once.  A stage of pretrain.py."""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from nano import scenes
from nano.training import Progress, optimise, optimisers, read_array, resume, save_state
from support.files import Broken, replacing, write_picture
from vae import SCALE, SHIFT, VAE

LATENT = 16                             # channels, as SD3's


def pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """(n, side, side, 3) uint8 -> (n, 3, side, side) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def fold_scale(vae: VAE, batches: list[Tensor]) -> None:
    """Rescale the latent channels so that SD3's own shift and scale (vae.py) give them zero mean and unit
    variance: z' = a z + b goes into the encoder's last layer, its inverse into the decoder's first."""
    mean = torch.cat([vae.encoder(x).chunk(2, 1)[0] for x in batches])                  # (n, C, h, w)
    std = mean.std((0, 2, 3))                                                           # (C,)
    a = 1 / (std * SCALE)                                                               # (C,)
    b = SHIFT - mean.mean((0, 2, 3)) / (std * SCALE)                                    # (C,)
    C = len(a)
    last = vae.encoder.conv_out
    last.weight[:C] *= a[:, None, None, None]
    last.bias[:C] = a * last.bias[:C] + b
    first = vae.decoder.conv_in
    first.bias -= (first.weight * (b / a)[None, :, None, None]).sum((1, 2, 3))          # not exact at the border
    first.weight /= a[None, :, None, None]


def is_inner_kernel(name: str, p: Tensor) -> bool:
    """Whether Muon trains this parameter of the VAE."""
    return p.ndim == 4 and "conv_in" not in name and "conv_out" not in name


def train_vae(run: Path, args: argparse.Namespace) -> VAE:
    """L1 + L2 + a touch of KL; the last third trains the decoder alone on latents that stay as they are.

    What was trained is kept in vae_done.pt.  Broken: this, or the state of a killed training.
    """
    torch.manual_seed(args.seed)
    vae = VAE(args.vae_widths, enc_blocks=1, dec_blocks=1, latent=LATENT).to(args.device)
    if resume(run / "vae_done.pt", {"vae": vae}, [], Progress(), args.origin):
        return vae.requires_grad_(False).eval()
    images = read_images(run, args.scenes)
    opts = optimisers(vae, is_inner_kernel, 1e-3)
    progress = Progress()
    resume(run / "vae.pt", {"vae": vae}, opts, progress, args.origin)
    vae.encoder.requires_grad_(not progress.folded)
    rng = np.random.default_rng([args.seed, progress.step])

    def batch(n: int) -> Tensor:
        n = min(n, len(images))
        return pixels(images[np.sort(rng.choice(len(images), n, replace=False))], args.device)

    def fold() -> None:
        fold_scale(vae, [batch(32) for _ in range(16)])
        vae.encoder.requires_grad_(False)
        progress.folded = True

    budget = 60 * args.minutes_vae
    start = time.time() - progress.spent
    bar = tqdm(total=budget, initial=int(progress.spent), desc="VAE", unit="s", mininterval=5)
    while progress.spent < budget:
        done = progress.spent / budget
        if done > 0.66 and not progress.folded:
            fold()
        x = batch(args.batch_vae)                                            # (B, 3, side, side)
        mean, logvar = vae.encoder(x).chunk(2, dim=1)                        # 2 x (B, C, h, w)
        logvar = logvar.clamp(-30, 20)
        std = 0.02 / SCALE if progress.folded else torch.exp(0.5 * logvar)
        y = vae.decoder(mean + std * torch.randn_like(mean))                 # (B, 3, side, side)
        mse = F.mse_loss(y, x)
        kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
        loss = F.l1_loss(y, x) + 2 * mse
        if not progress.folded:
            loss = loss + args.kl * kl
        rate = min(1, (progress.step + 1) / 50, 3 * (1 - done) + 0.01)    # warm up, hold, fall to zero
        optimise(opts, loss, 1e-3 * rate)
        progress.step += 1
        progress.samples += len(x)
        progress.spent = time.time() - start
        bar.n = int(progress.spent)
        bar.set_postfix(psnr=f"{-10 * np.log10(mse.item() / 4):.1f}dB", kl=f"{kl.item():.2f}",
                        images=progress.samples)
        if progress.step % 300 == 0 or progress.spent >= budget:
            save_state(run / "vae.pt", {"vae": vae}, opts, progress, args.origin)
            save_pairs(x[:8], y[:8], run / "vae.png")
    if not progress.folded:                              # so few minutes that two thirds were over with the last step
        fold()
    save_state(run / "vae_done.pt", {"vae": vae}, [], progress, args.origin)
    return vae.requires_grad_(False).eval()


def save_pairs(x: Tensor, y: Tensor, path: Path) -> None:
    """Pictures x above what came back of them, y; both (n, 3, px, px) in [-1, 1]."""
    rows = [torch.cat(list(row), dim=2) for row in (x, y)]                   # 2 x (3, px, n*px)
    grid = torch.cat(rows, dim=1).permute(1, 2, 0).detach().clamp(-1, 1)     # (2*px, n*px, 3)
    write_picture(path, Image.fromarray(((grid.cpu() + 1) * 127.5).round().to(torch.uint8).numpy()))


def read_images(run: Path, n: int) -> np.ndarray:
    """images.npy (n, side, side, 3) uint8, as draw_scenes wrote it.  Broken: it is cut, or holds other scenes."""
    return read_array(run / "images.npy", np.uint8, (n, scenes.SIDE, scenes.SIDE, 3))


@torch.inference_mode()
def encode_latents(run: Path, vae: VAE, device: torch.device, n: int) -> np.ndarray:
    """Every scene through the frozen encoder, once: (n, C, h, w) fp16, kept in latents.npy.

    Broken: what is kept is cut, or not the latents of these scenes by this VAE.
    """
    path = run / "latents.npy"
    images = read_images(run, n)
    side = scenes.SIDE // vae.factor
    if path.exists():
        latents = np.array(read_array(path, np.float16, (n, vae.channels, side, side)))
        first = vae.encode(pixels(np.array(images[:1]), device)).cpu().numpy()
        if not np.allclose(latents[:1], first, atol=0.1):                    # fp16, another device
            raise Broken(f"{path} holds latents of another VAE; remove it, and they are encoded anew")
        return latents
    chunks = []
    for i in tqdm(range(0, len(images), 64), desc="latents", mininterval=5):
        x = pixels(np.array(images[i:i + 64]), device)                       # (64, 3, side, side)
        chunks.append(vae.encode(x).half().cpu().numpy())
    latents = np.concatenate(chunks)
    with replacing(path) as new, open(new, "wb") as f:   # an open file, as np.save would add .npy to a name
        np.save(f, latents)
    return latents

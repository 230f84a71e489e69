"""How well a VQGAN copies images: L1, PSNR, SSIM, perceptual distance, use of the codebook."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgen.vqgan import VQGAN
from scripts.evaluation.figures import grid

FLOOR = 1e-6  # of a squared error: below it two images are equal in 8 bits; 60 dB


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal to noise (N,) in dB of pixels (N, 3, H, W) in [0, 1]; at most 60."""
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=FLOOR).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (N,) of pixels (N, 3, H, W) in [0, 1], H and W at least 11.

    Gaussian window of 11 pixels and 1.5, K1 0.01, K2 0.03 (Wang et al. 2004), a channel at a time.
    """
    offsets = torch.arange(11, device=a.device, dtype=a.dtype) - 5
    line = (-offsets.square() / (2 * 1.5**2)).exp()
    line = line / line.sum()
    window = (line[:, None] * line[None]).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
             / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return value.mean((1, 2, 3))


def entropy(counts: Tensor) -> float:
    """Nats, of the frequencies that counts (K,) stand for."""
    p = counts.double() / counts.sum()
    return -(p * p.clamp(min=1e-30).log()).sum().item()


@torch.no_grad()
def copy_scores(vqgan: VQGAN, images: Tensor,
                perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
                ) -> tuple[dict[str, float], Image.Image]:
    """Scores over images uint8 (N, 3, S, S), and a grid of the first 8 above their copies."""
    device = vqgan.quantizer.embedding.weight.device
    counts = torch.zeros(vqgan.config.codebook_size, device=device)
    sums: dict[str, float] = {}
    copies = []
    for part in images.split(32):
        pixels = part.to(device).float() / 255
        codes = vqgan.encode(pixels)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        copy = vqgan.decode(codes)
        copies.append(copy[:max(0, 8 - 32 * len(copies))])
        values = {"l1": (copy - pixels).abs().mean((1, 2, 3)), "psnr_db": psnr(copy, pixels)}
        if min(pixels.shape[2:]) >= 11:
            values["ssim"] = ssim(copy, pixels)
        if perceptual:
            values["perceptual"] = perceptual(copy, pixels).expand(len(part))
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item()
    scores = {name: total / len(images) for name, total in sums.items()}
    scores |= {"codebook_usage": (counts > 0).float().mean().item(),
               "codebook_perplexity": math.exp(entropy(counts))}
    shown = images[:8].to(device).float() / 255
    both = torch.cat([shown, torch.cat(copies)])
    return scores, grid(both, len(shown), ["held-out images", "as the VQGAN copies them"])

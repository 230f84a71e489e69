"""The PatchGAN discriminator of VQGAN training (arXiv 1611.07004, hinge loss as in 2012.09841)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """Pixels (N, 3, H, W) to realness of each patch (N, 1, h, w); GroupNorm suits any batch."""

    def __init__(self, channels: int = 32, layers: int = 3):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(layers - 1):
            parts += [nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False),
                      nn.GroupNorm(math.gcd(8, 2 * channels), 2 * channels), nn.LeakyReLU(0.2)]
            channels *= 2
        parts += [nn.Conv2d(channels, 1, 3, 1, 1)]
        self.layers = nn.Sequential(*parts)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss: real above 1, fake below -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())

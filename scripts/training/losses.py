"""The losses of the VQGAN beyond L1 and L2: a discriminator's and a perceptual distance."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.clip import CLIP


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


VGG16 = "vgg16-397923af.pth"  # torchvision's name of the weights that LPIPS measures with


class CLIPDistance(nn.Module):
    """Distance between feature maps of CLIP's image tower, unit length at each place.

    The form is that of LPIPS (arXiv 1801.03924) with every channel weighing the same.  Four maps:
    stem and first three stages of a convolutional tower, evenly spaced blocks of a transformer.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = copy.deepcopy(clip).eval().requires_grad_(False)
        tower = self.clip.model.visual
        blocks = len(tower.transformer.resblocks) if hasattr(tower, "transformer") else 4
        self.indices = sorted({blocks * i // 4 for i in range(4)})

    def features(self, pixels: Tensor) -> list[Tensor]:
        given = self.clip.preprocess(pixels).contiguous(memory_format=torch.channels_last)
        maps = self.clip.model.visual.forward_intermediates(
            given, indices=self.indices, intermediates_only=True)["image_intermediates"]
        return [F.normalize(m.float(), dim=1) for m in maps]

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pixels (N, 3, H, W) from target, both around [0, 1]."""
        with torch.no_grad():
            wanted = self.features(target)
        given = self.features(pixels)
        return sum((a - b).square().sum(1).mean() for a, b in zip(given, wanted, strict=True))


class LPIPS(nn.Module):
    """LPIPS (arXiv 1801.03924) on VGG16, of the package `lpips`."""

    def __init__(self):
        super().__init__()
        try:
            import lpips
        except ImportError:
            raise SystemExit("--perceptual-loss lpips needs the package: pip install lpips, or "
                             "take --perceptual-loss clip") from None
        weights = Path(torch.hub.get_dir(), "checkpoints", VGG16)
        if not weights.is_file():
            raise SystemExit(f"--perceptual-loss lpips needs torchvision's VGG16 at {weights}: "
                             f"put https://download.pytorch.org/models/{VGG16} there, or take "
                             "--perceptual-loss clip")
        self.distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pixels (N, 3, H, W) from target, both around [0, 1]."""
        return self.distance(pixels, target, normalize=True).mean()

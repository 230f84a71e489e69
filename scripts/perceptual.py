"""Perceptual losses: distances between images as a network sees them, not pixel by pixel."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.clip import CLIP

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

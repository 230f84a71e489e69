"""Losses beyond L1, L2 and cross-entropy.

Of the VQGAN: the quantizer's, a perceptual distance, a discriminator's, the adaptive weight between
them.  Of the GPT: embedding reconstruction.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from clipgen.clip import CLIP
from clipgen.vqgan import VQGAN


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
            raise ValueError("--perceptual-loss lpips needs the package: pip install lpips, or "
                             "take --perceptual-loss clip") from None
        weights = Path(torch.hub.get_dir(), "checkpoints", VGG16)
        if not weights.is_file():
            raise ValueError(f"--perceptual-loss lpips needs torchvision's VGG16 at {weights}: "
                             f"put https://download.pytorch.org/models/{VGG16} there, or take "
                             "--perceptual-loss clip")
        self.distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Mean distance of pixels (N, 3, H, W) from target, both around [0, 1]."""
        return self.distance(pixels, target, normalize=True).mean()


def quantize(vqgan: VQGAN, features: Tensor, commitment: float) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, D, h, w) to straight-through vectors, codes (N, h, w) and the quantizer's loss.

    `commitment` weighs the encoder's term, the codebook's weighs 1 (VQ-VAE, arXiv 1711.00937).
    """
    z = vqgan.quantizer.normalise(features)
    with torch.no_grad():
        codes = vqgan.quantizer.nearest(features)
    vectors = vqgan.quantizer.vectors(codes)
    loss = commitment * F.mse_loss(z, vectors.detach()) + F.mse_loss(vectors, z.detach())
    return z + (vectors - z).detach(), codes, loss


def adaptive_weight(wanted: Tensor, gan: Tensor, weight: Tensor, accelerator: Accelerator
                    ) -> Tensor:
    """|gradient of the other losses| / |gradient of the GAN's| at the decoder's last weight, at
    most 10,000 (arXiv 2012.09841, equation 7); of the batches of all processes together."""
    norms = []
    for loss in (wanted, gan):
        gradient, = torch.autograd.grad(loss, weight, retain_graph=True)
        norms.append(accelerator.reduce(gradient, "mean").norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4).detach()


def centre(embedding: Tensor, mean: Tensor | None) -> Tensor:
    """Unit rows (N, D) less the mean of their kind, of unit length again; unchanged without one."""
    return embedding if mean is None else F.normalize(embedding - mean.to(embedding), dim=1)


class EmbeddingReconstruction(nn.Module):
    """The paper's embedding-reconstruction loss: 1 - cosine of the condition and of what CLIP sees
    in the predicted codes, decoded; the argmax passes gradients straight through (1308.3432)."""

    def __init__(self, clip: CLIP, vqgan: VQGAN):
        super().__init__()
        self.clip, self.vqgan = clip.requires_grad_(False), vqgan.requires_grad_(False)

    def forward(self, logits: Tensor, embedding: Tensor, mean: Tensor | None) -> Tensor:
        """Logits (N, L, K) and the embeddings (N, D) they should lead to, less `mean` if given."""
        soft = logits.float().softmax(-1)  # (N, L, K)
        hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
        vectors = (hard + soft - soft.detach()) @ self.vqgan.quantizer.codebook()  # (N, L, d)
        side = self.vqgan.config.grid
        pixels = self.vqgan.decoder(vectors.transpose(1, 2).unflatten(2, (side, side)))
        seen = self.clip.model.encode_image(self.clip.preprocess((pixels * 0.5 + 0.5).clamp(0, 1)))
        seen = F.normalize(seen.float(), dim=1)
        if (own := self.clip.config.image_embedding_mean) is not None:
            seen = centre(seen, seen.new_tensor(own))
        return 1 - (centre(seen, mean) * embedding).sum(1).mean()

"""The networks whose features are compared: Inception, CLIP, and what registers itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clipgen.clip import CLIP, IMAGES_PER_PASS
from scripts.evaluation import NETWORKS
from scripts.evaluation.metrics import blur

INCEPTION_URL = ("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                 "weights-inception-2015-12-05-6726825d.pth")
# DALL-E (arXiv 2102.12092, section 3), CogView and CLIP-GEN compare images of 256 pixels after a
# Gaussian filter of these radii: what is left when detail below a radius does not count.
RADII, RADII_SIDE = (0, 1, 2, 4, 8), 256


@dataclass(frozen=True)
class Network:
    """A network that turns pixels into features."""

    name: str  # as the report names it
    dimensions: int
    resize: str  # how it brings pixels to its own size
    embed: Callable[[Tensor], Tensor]  # pixels float (N, 3, H, W) in [0, 1] -> (N, dimensions)
    # features (N, dimensions) -> probabilities (N, K) of the classes that Inception score is of
    classify: Callable[[Tensor], Tensor] | None = None


def load_network(name: str | None, clip: CLIP, clip_name: str) -> Network:
    """The network called inception, clip (the given one) or as one of NETWORKS, on its device.

    None: Inception if it can be had, else CLIP, which a line on stderr then says.  ValueError: no
    such network, or inception asked for and not there.
    """
    if name in (None, "inception"):
        if not (missing := inception_missing()):
            return inception(clip.device)
        if name == "inception":
            raise ValueError(f"--features inception: {missing}, or use --features clip")
        print(f"features of CLIP, not of Inception: {missing}", file=sys.stderr)
    if name in NETWORKS:
        return NETWORKS[name](clip.device)
    if name not in (None, "inception", "clip"):
        known = ", ".join(["inception", "clip", *NETWORKS])
        raise ValueError(f"--features {name} is no network: give one of {known}")
    # Of length √D, so that the kernel of KID, a polynomial of x · y / D, is one of the cosine.
    length = clip.embedding_dim ** 0.5
    return Network(f"embeddings of {clip_name}", clip.embedding_dim,
                   f"bicubic, antialiased, to {clip.image_size} pixels",
                   lambda pixels: length * clip.embed_pixels(pixels))


def inception_file() -> Path:
    """Where torch-fidelity looks for its weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]


def inception_missing() -> str:
    """What to do before Inception can be used; empty if nothing."""
    if importlib.util.find_spec("torch_fidelity") is None:
        return "install torch-fidelity (pip install torch-fidelity)"
    if not inception_file().is_file():
        return f"download {INCEPTION_URL} to {inception_file()}"
    return ""


def inception(device: torch.device) -> Network:
    """The Inception v3 of the FID paper (arXiv 1706.08500), as torch-fidelity converted it."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)

    def embed(pixels: Tensor) -> Tensor:
        return network((pixels * 255).round().to(torch.uint8))[0]

    def classify(features: Tensor) -> Tensor:
        # Without the bias, as the code of Inception score did (arXiv 1606.03498).
        return (features.to(network.fc.weight) @ network.fc.weight.T).softmax(1)

    return Network("Inception v3, pool3 (torch-fidelity)", 2048,
                   "bilinear as in TensorFlow 1, to 299 pixels", embed, classify)


@torch.no_grad()
def blurred_features(network: Network, images: Tensor, device: torch.device,
                     radii: tuple[int, ...] = RADII) -> np.ndarray:
    """Features float32 (len(radii), N, D) of images uint8 (N, 3, S, S) after each blur.

    For sizes S other than 256 the radii are the same share of the side: radius · S / 256.
    """
    scale = images.shape[-1] / RADII_SIDE
    parts = []
    for part in tqdm(images.split(IMAGES_PER_PASS), desc="features"):
        pixels = part.to(device).float() / 255
        parts.append(torch.stack([network.embed(blur(pixels, radius * scale)).float().cpu()
                                  for radius in radii]))
    return torch.cat(parts, 1).numpy()

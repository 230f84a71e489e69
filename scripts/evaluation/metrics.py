"""The formulas of evaluation: functions of arrays that know no model and no file."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 1024  # of the kernel matrix at a time: bounds memory, changes nothing else


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features a (N, D) and b (M, D), >= 0.

    |mean a - mean b|² + tr(A + B - 2 (A B)^½) with the covariances A and B; with Inception features
    this is FID (arXiv 1706.08500).  It is biased upwards, the more the smaller N and M: below D + 1
    a covariance is singular.  ValueError: fewer than 2 rows or different D.
    """
    a, b = _two_sets(a, b)
    A, B = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    # (A B)^½ and (A^½ B A^½)^½ have the same trace, and the second is symmetric.
    values, vectors = np.linalg.eigh(A)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ B @ root).clip(0)).sum()
    shift = a.mean(0) - b.mean(0)
    return max(0.0, float(shift @ shift + np.trace(A) + np.trace(B) - 2 * trace))


def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Squared maximum mean discrepancy of features a (N, D) and b (M, D): KID (arXiv 1801.01401).

    Unbiased, with the kernel (x · y / D + 1)³, over all pairs instead of random subsets; around 0,
    hence negative at times, for two draws of one distribution.  ValueError as frechet_distance.
    """
    a, b = _two_sets(a, b)

    def kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
        return sum(float(((x[i:i + ROWS] @ y.T / x.shape[1] + 1) ** 3).sum())
                   for i in range(0, len(x), ROWS))

    def within(x: np.ndarray) -> float:  # without the pairs of a row with itself
        n, itself = len(x), float((((x * x).sum(1) / x.shape[1] + 1) ** 3).sum())
        return (kernel_sum(x, x) - itself) / (n * (n - 1))

    return within(a) + within(b) - 2 * kernel_sum(a, b) / (len(a) * len(b))


def clip_score(images: np.ndarray, targets: np.ndarray) -> float:
    """Mean of 100 · max(cos, 0) over pairs of unit rows (N, D), 0 to 100.

    With the texts' embeddings as targets it is CLIP score (arXiv 2104.08718, whose weight is 2.5
    instead of 100); with those of images it is CLIP-I (arXiv 2208.12242) in the same scale.
    """
    return float(100 * (images * targets).sum(1).clip(0).mean())


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Area under the ROC curve of scores (N,) and (M,): the chance that one of the former exceeds
    one of the latter, a tie counting half; NaN where either is empty."""
    if not len(above) or not len(below):
        return float("nan")
    differences = np.asarray(above)[:, None] - np.asarray(below)
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def retrieval_r1(images: np.ndarray, targets: np.ndarray, seed: int = 0, among: int = 100) -> float:
    """R@1: the share of images (N, D) whose own target is the nearest of `among`, 0 to 1.

    Unit rows, row i of targets is image i's own; the others are the among - 1 that follow it in a
    random order of all (all N where N is less).  A target equal to the own one does not count
    against it.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    images, targets = images[order], targets[order]
    own = (images * targets).sum(1)
    best = own
    for k in range(1, min(among, len(images))):
        best = np.maximum(best, (images * np.roll(targets, -k, axis=0)).sum(1))
    return float((own >= best).mean())


def inception_score(probabilities: np.ndarray, splits: int = 10) -> float:
    """exp(E KL(p(class | image) || p(class))) of rows (N, K) that sum to 1: from 1 to K.

    The mean over `splits` equal parts (arXiv 1606.03498).
    """
    def score(p: np.ndarray) -> float:
        log = np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(p.mean(0), 1e-300))
        return float(np.exp((p * log).sum(1).mean()))

    parts = np.array_split(np.asarray(probabilities, np.float64), splits)
    return float(np.mean([score(part) for part in parts]))


def blur(pixels: Tensor, radius: float) -> Tensor:
    """Pixels float (N, C, H, W) after a Gaussian filter whose standard deviation is `radius`.

    Edges are mirrored, so that the mean of every image stays.  radius 0: the pixels as they are.
    """
    if radius == 0:
        return pixels
    height, width = (_filter(side, radius).to(pixels) for side in pixels.shape[-2:])
    return height @ pixels @ width.T


def _filter(side: int, radius: float) -> Tensor:
    """The one-dimensional filter as a matrix (side, side); its rows and its columns sum to 1."""
    reach = int(np.ceil(4 * radius))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / radius) ** 2)
    mirrored = np.pad(np.eye(side), ((reach, reach), (0, 0)), mode="symmetric")
    rows = sum(w * mirrored[i:i + side] for i, w in enumerate(weights / weights.sum()))
    return torch.from_numpy(rows)


def _two_sets(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError("a distance needs features (N, D) and (M, D), N and M at least 2, got "
                         f"{a.shape} and {b.shape}")
    return np.asarray(a, np.float64), np.asarray(b, np.float64)


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

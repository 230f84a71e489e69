"""evaluation.metrics: distances against closed forms, scores on made embeddings, the blur."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from scripts.evaluation.metrics import (
    auc,
    blur,
    clip_score,
    frechet_distance,
    inception_score,
    mmd,
    retrieval_r1,
)


def normal(seed: int, n: int = 400, d: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def white(seed: int, n: int = 400, d: int = 6) -> np.ndarray:
    """Rows of mean exactly 0 and covariance exactly the identity."""
    x = normal(seed, n, d)
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("n", [400, 4])  # more rows than dimensions, and fewer
def test_the_frechet_distance_of_a_set_to_itself_is_zero(n):
    assert frechet_distance(normal(0, n), normal(0, n)) == pytest.approx(0, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=6, max_size=6),
       st.lists(st.floats(0.1, 4), min_size=6, max_size=6), st.integers(0, 1000))
def test_the_frechet_distance_of_gaussians_is_the_closed_form(shift, scale, seed):
    shift, scale = np.array(shift), np.array(scale)
    # Covariances I and diag(scale²): tr(I + S² - 2 S) = sum (scale - 1)².
    expected = (shift**2).sum() + ((scale - 1) ** 2).sum()
    assert frechet_distance(white(seed), white(seed + 1) * scale + shift) == pytest.approx(expected)


def test_the_frechet_distance_of_covariances_that_do_not_commute():
    a, b = normal(0) @ normal(2, 6), normal(1) @ normal(3, 6)
    A, B = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    trace = np.sqrt(np.linalg.eigvals(A @ B).real).sum()  # the definition, (A B)^½ itself
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(expected)


@pytest.mark.parametrize("distance", [frechet_distance, mmd])
def test_distances_are_symmetric_and_know_no_axes(distance):
    a, b = normal(0), normal(1) * 1.5 + 0.3
    rotation, _ = np.linalg.qr(normal(2, 6))
    assert distance(a, b) > 0.1
    assert distance(b, a) == pytest.approx(distance(a, b))
    assert distance(a @ rotation, b @ rotation) == pytest.approx(distance(a, b))


@pytest.mark.parametrize("distance", [frechet_distance, mmd])
def test_distances_name_the_shapes_they_cannot_compare(distance):
    for a, b in ((normal(0, 1), normal(1)), (normal(0), normal(1, d=5)), (normal(0)[0], normal(1))):
        with pytest.raises(ValueError, match="at least 2, got"):
            distance(a, b)


def test_mmd_is_unbiased():
    draws = [mmd(normal(2 * i, 50), normal(2 * i + 1, 50)) for i in range(200)]
    assert min(draws) < 0 < max(draws)
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(200)
    assert mmd(normal(0, 50), normal(1, 50) + 0.5) > 3 * np.std(draws)


def test_mmd_is_the_formula_of_kid_whatever_the_block_of_rows(monkeypatch):
    a, b = normal(0, 37), normal(1, 23)

    def k(x, y):
        return (x @ y.T / 6 + 1) ** 3

    def mean_of_others(m):
        return m[~np.eye(len(m), dtype=bool)].mean()

    expected = mean_of_others(k(a, a)) + mean_of_others(k(b, b)) - 2 * k(a, b).mean()
    assert mmd(a, b) == pytest.approx(expected)
    monkeypatch.setattr("scripts.evaluation.metrics.ROWS", 10)
    assert mmd(a, b) == pytest.approx(expected)


def test_clip_score_is_a_hundred_times_the_cosine_and_never_negative():
    x = unit(normal(0, 5))
    assert clip_score(x, x) == pytest.approx(100)
    assert clip_score(x, -x) == 0
    assert clip_score(np.array([[1.0, 0]]), np.array([[0.6, 0.8]])) == pytest.approx(60)
    # A mean of clipped cosines, not a clipped mean.
    assert clip_score(np.eye(2), np.array([[1.0, 0], [0, -1]])) == pytest.approx(50)


def test_r1_counts_images_whose_own_target_is_nearest():
    x = unit(normal(0, 150, 40))
    assert retrieval_r1(x, x) == 1
    assert retrieval_r1(x, -x) == 0
    targets = x.copy()
    targets[:30] *= -1  # 30 of 150 are told apart wrongly
    assert retrieval_r1(x, targets, among=150) == pytest.approx(0.8)
    assert retrieval_r1(x, np.tile(x[:1], (150, 1))) == 1  # equal texts cannot be told apart


def test_r1_of_chance_is_one_in_the_number_of_targets():
    images, targets = unit(normal(0, 4000, 64)), unit(normal(1, 4000, 64))
    assert retrieval_r1(images, targets, seed=5) == retrieval_r1(images, targets, seed=5)
    assert retrieval_r1(images, targets) == pytest.approx(0.01, abs=0.006)
    assert retrieval_r1(images, targets, among=2) == pytest.approx(0.5, abs=0.03)
    assert retrieval_r1(images[:5], targets[:5], among=100) >= 0


def test_the_inception_score_lies_between_one_and_the_number_of_classes():
    assert inception_score(np.full((50, 8), 1 / 8)) == pytest.approx(1)
    assert inception_score(np.eye(8)[np.full(50, 3)]) == pytest.approx(1)  # sure, but all the same
    assert inception_score(np.tile(np.eye(8), (20, 1))) == pytest.approx(8)  # sure and varied
    assert inception_score(np.eye(8), splits=1) == pytest.approx(8)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([0.25, 1, 2.5, 8]), st.integers(2, 24), st.integers(0, 1000))
def test_a_blur_keeps_the_mean_and_the_range_and_takes_variance(radius, side, seed):
    pixels = torch.rand(2, 3, side, side + 3, generator=torch.Generator().manual_seed(seed))
    blurred = blur(pixels, radius)
    assert blurred.shape == pixels.shape
    assert blurred.min() >= -1e-6 and blurred.max() <= 1 + 1e-6
    torch.testing.assert_close(blurred.mean((2, 3)), pixels.mean((2, 3)))
    assert (blurred.var((2, 3)) < pixels.var((2, 3))).all()
    assert torch.equal(blur(pixels, 0), pixels)


def test_a_blurred_point_is_a_gaussian_and_pillow_agrees():
    point = torch.zeros(1, 1, 65, 65)
    point[0, 0, 32, 32] = 1
    x = torch.arange(-32, 33, dtype=torch.float32)
    gaussian = torch.exp(-0.5 * (x / 3) ** 2)
    gaussian /= gaussian.sum()
    torch.testing.assert_close(blur(point, 3)[0, 0], gaussian[:, None] * gaussian, atol=1e-5,
                               rtol=0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    theirs = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(4)), np.float32)
    ours = blur(torch.from_numpy(noise).float()[None, None], 4)[0, 0].numpy()
    assert np.abs(ours - theirs)[16:-16, 16:-16].mean() < 1.5  # Pillow approximates by boxes


SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(SCORES, SCORES)
def test_the_area_counts_pairs_and_turns_with_them(above, below):
    wins = [(a > b) + (a == b) / 2 for a in above for b in below]
    assert auc(np.array(above), np.array(below)) == pytest.approx(np.mean(wins))
    assert auc(np.array(below), np.array(above)) == pytest.approx(1 - np.mean(wins))
    assert np.isnan(auc(np.array([]), np.array(below)))

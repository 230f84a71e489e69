"""What training minimises, against plain lines and values worked out by hand."""

import math
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.evaluation.metrics import ssim
from scripts.training import losses
from scripts.training.gpt import perturbation
from scripts.training.losses import (
    LPIPS,
    CLIPDistance,
    Discriminator,
    EmbeddingReconstruction,
    adaptive_weight,
    centre,
    hinge_loss,
    quantize,
)
from tests.micro import micro_clip, micro_vqgan


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# SSIM


def ssim_plainly(a: list, b: list) -> float:
    """Wang et al. 2004, window by window: grey images, as lists of rows."""
    weight = [math.exp(-(i - 5) ** 2 / (2 * 1.5**2)) for i in range(11)]
    total = sum(weight) ** 2
    values = []
    for top in range(len(a) - 10):
        for left in range(len(a[0]) - 10):
            places = [(weight[i] * weight[j] / total, a[top + i][left + j], b[top + i][left + j])
                      for i in range(11) for j in range(11)]
            mean_a, mean_b = sum(w * x for w, x, _ in places), sum(w * y for w, _, y in places)
            var_a = sum(w * (x - mean_a) ** 2 for w, x, _ in places)
            var_b = sum(w * (y - mean_b) ** 2 for w, _, y in places)
            both = sum(w * (x - mean_a) * (y - mean_b) for w, x, y in places)
            values.append((2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
                          / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)))
    return sum(values) / len(values)


def test_ssim_is_the_mean_over_all_windows_and_channels():
    a = torch.rand(2, 3, 13, 12, dtype=torch.float64)
    b = (a + 0.2 * torch.randn_like(a)).clamp(0, 1)
    for n in range(2):
        expected = sum(ssim_plainly(a[n, c].tolist(), b[n, c].tolist()) for c in range(3)) / 3
        assert ssim(a, b)[n].item() == pytest.approx(expected, abs=1e-9)


@given(st.floats(0, 1), st.floats(0, 1))
@settings(deadline=None, max_examples=20)
def test_ssim_of_flat_images_is_that_of_their_means(x, y):
    a, b = (torch.full((1, 3, 16, 16), value, dtype=torch.float64) for value in (x, y))
    expected = (2 * x * y + 1e-4) / (x * x + y * y + 1e-4)
    assert ssim(a, b).item() == pytest.approx(expected, abs=1e-9)


# Perceptual distances


def test_clip_distance_is_the_sum_of_squared_distances_of_unit_features():
    clip = micro_clip()
    distance = CLIPDistance(clip)
    a, b = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    maps = [clip.model.visual.forward_intermediates(clip.preprocess(x),
                                                    indices=distance.indices)["image_intermediates"]
            for x in (a, b)]
    expected = 0.0
    for one, other in zip(*maps, strict=True):
        for n in range(2):
            for y in range(one.shape[2]):
                for x in range(one.shape[3]):
                    u, v = one[n, :, y, x], other[n, :, y, x]
                    gap = u / u.norm() - v / v.norm()
                    expected += (gap @ gap).item() / (2 * one.shape[2] * one.shape[3])
    assert len(maps[0]) > 1 and expected > 1e-3
    assert distance(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert distance(a, a).item() == pytest.approx(0, abs=1e-6)


def test_clip_distance_moves_the_copy_alone_and_leaves_clip_as_it_is():
    clip = micro_clip()
    distance = CLIPDistance(clip)
    copy = torch.rand(1, 3, 32, 32, requires_grad=True)
    target = torch.rand(1, 3, 32, 32, requires_grad=True)
    loss = distance(copy, target)
    loss.backward()
    assert target.grad is None and all(p.grad is None for p in clip.parameters())
    with torch.no_grad():
        nearer = distance(copy - 1e-3 * copy.grad / copy.grad.norm(), target)
    assert nearer < loss


@pytest.fixture
def lpips(monkeypatch, tmp_path):
    """Stands in for the package: sums |a - b| of what it is given, in [-1, 1] if `normalize`."""
    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "vgg"
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, a, b, normalize):
            a, b = (2 * x - 1 if normalize else x for x in (a, b))
            return self.scale * (a - b).abs().mean((1, 2, 3), keepdim=True)

    package = ModuleType("lpips")
    package.LPIPS = Distance
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / losses.VGG16


def test_lpips_takes_pixels_in_0_1_and_gives_one_number(lpips):
    lpips.touch()
    distance = LPIPS()
    a = torch.zeros(2, 3, 8, 8, requires_grad=True)
    b = torch.full((2, 3, 8, 8), 0.25)
    b[1] = 1
    loss = distance(a, b)
    assert loss.item() == pytest.approx((0.5 + 2) / 2)  # [0, 1] became [-1, 1]
    loss.backward()
    assert a.grad.abs().sum() > 0 and not any(p.requires_grad for p in distance.parameters())


def test_lpips_names_what_is_missing(lpips, monkeypatch):
    with pytest.raises(ValueError, match=f"VGG16 at .*{losses.VGG16}: put https://"):
        LPIPS()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="needs the package: pip install lpips"):
        LPIPS()


# The GAN


@pytest.mark.parametrize("real, fake, expected", [
    ([1.0], [-1.0], 0.0),  # as far apart as wanted
    ([3.0], [-5.0], 0.0),  # farther costs nothing
    ([0.0], [0.0], 1.0),  # knows nothing
    ([-1.0], [1.0], 2.0),  # all wrong
    ([0.5, 2.0], [-1.0, 0.0], 0.5 * (0.25 + 0.5)),
    ([-2.0], [-2.0], 0.5 * 3.0)])  # takes all for fake: the real term alone
def test_hinge_loss_of_known_outputs(real, fake, expected):
    assert hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(expected)


def test_hinge_loss_pushes_real_up_and_fake_down():
    real, fake = (torch.zeros(4, requires_grad=True) for _ in range(2))
    hinge_loss(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


def test_a_discriminator_learns_to_tell_real_from_fake():
    discriminator = Discriminator(8)
    real, fake = torch.rand(4, 3, 32, 32), torch.zeros(4, 3, 32, 32)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        hinge_loss(discriminator(real), discriminator(fake)).backward()
        optimizer.step()
    with torch.no_grad():
        assert discriminator(real).mean() > 0.5 and discriminator(fake).mean() < -0.5


@pytest.mark.parametrize("others, gan, expected", [
    (3.0, 0.5, 3 / (0.5 + 1e-4)), (0.5, 3.0, 0.5 / (3 + 1e-4)),
    (2.0, 0.0, 1e4)])  # no gradient of the GAN's: at most 10,000
def test_adaptive_weight_is_the_ratio_of_gradients(others, gan, expected):
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    direction = torch.tensor([0.6, -0.8])  # of length 1
    wanted, adversarial = (factor * (weight @ direction) for factor in (others, gan))
    ratio = adaptive_weight(wanted, adversarial, weight, Accelerator(cpu=True))
    assert ratio.item() == pytest.approx(expected, rel=1e-5)
    assert not ratio.requires_grad and weight.grad is None
    (wanted + ratio * adversarial).backward()  # both graphs are still there


# The quantizer


@pytest.mark.parametrize("normalised", [False, True])
def test_the_quantizers_loss_and_its_two_gradients(normalised):
    vqgan = micro_vqgan()
    vqgan.quantizer.l2_normalised = normalised
    features = torch.randn(2, 8, 3, 3, requires_grad=True)
    vectors, codes, loss = quantize(vqgan, features, commitment=0.25)
    book = vqgan.quantizer.embedding.weight
    if normalised:
        z, book = F.normalize(features, dim=1), F.normalize(book, dim=1)
    else:
        z = features
    rows = z.permute(0, 2, 3, 1).flatten(0, 2)
    nearest = torch.stack([(book - row).square().sum(1).argmin() for row in rows])
    assert torch.equal(codes.flatten(), nearest)
    chosen = book[nearest].view(2, 3, 3, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(vectors, chosen)
    assert loss.item() == pytest.approx(1.25 * (z - chosen).square().mean().item(), rel=1e-5)
    # 0.25 of the gradient is the encoder's, the codebook's is whole.
    found = torch.autograd.grad(loss, [features, vqgan.quantizer.embedding.weight])
    encoder = torch.autograd.grad(0.25 * F.mse_loss(z, chosen.detach()), features)[0]
    codebook = torch.autograd.grad(F.mse_loss(chosen, z.detach()),
                                   vqgan.quantizer.embedding.weight)[0]
    torch.testing.assert_close(found, (encoder, codebook))


def test_gradients_pass_straight_through_the_quantizer():
    vqgan = micro_vqgan()
    vqgan.quantizer.l2_normalised = False
    features = torch.randn(1, 8, 2, 2, requires_grad=True)
    vectors, _, _ = quantize(vqgan, features, 0.25)
    towards = torch.randn_like(features)
    (vectors * towards).sum().backward()
    assert torch.equal(features.grad, towards)
    assert vqgan.quantizer.embedding.weight.grad is None


# What the GPT is given, and the embedding-reconstruction loss


@given(st.integers(1, 40), st.integers(2, 64), st.floats(0.01, 4), st.integers(0, 10**6),
       st.sampled_from(["fixed", "random"]))
@settings(deadline=None, max_examples=30)
def test_perturbations_have_their_length_and_come_from_the_generator(rows, dim, length, seed, kind):
    drawn = [perturbation(rows, dim, length, torch.Generator().manual_seed(seed), kind)
             for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].shape == (rows, dim)
    other = perturbation(rows, dim, length, torch.Generator().manual_seed(seed + 1), kind)
    assert not torch.equal(drawn[0], other)
    lengths = drawn[0].norm(dim=1)
    assert (lengths <= length * 1.0001).all() and lengths.min() > 0
    if kind == "fixed":
        torch.testing.assert_close(lengths, torch.full((rows,), length))


def test_perturbations_point_everywhere():
    n = perturbation(4000, 8, 1.0, torch.Generator().manual_seed(0))
    assert n.mean(0).abs().max() < 0.05
    torch.testing.assert_close(n.T @ n / 4000, torch.eye(8) / 8, atol=0.01, rtol=0)


def test_centring_is_the_difference_of_unit_length():
    rows, mean = F.normalize(torch.randn(3, 4), dim=1), torch.tensor([0.1, -0.2, 0.3, 0.0])
    for row, found in zip(rows.tolist(), centre(rows, mean).tolist(), strict=True):
        less = [x - m for x, m in zip(row, mean.tolist(), strict=True)]
        length = math.sqrt(sum(x * x for x in less))
        assert found == pytest.approx([x / length for x in less], abs=1e-6)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_embedding_reconstruction_is_one_less_the_cosine_of_what_clip_sees(own, mean):
    clip, vqgan = micro_clip(), micro_vqgan()
    if own:
        clip.config = replace(clip.config, image_embedding_mean=tuple(0.1 * torch.randn(32)))
    less = 0.1 * torch.randn(32) if mean else None
    logits, wanted = torch.randn(3, 16, 64), F.normalize(torch.randn(3, 32), dim=1)
    seen = clip.embed_pixels(vqgan.decode(logits.argmax(2).view(3, 4, 4)))
    if mean:
        seen = F.normalize(seen - less, dim=1)
    cosines = [(s @ w).item() for s, w in zip(seen, wanted, strict=True)]
    found = EmbeddingReconstruction(clip, vqgan)(logits, wanted, less).item()
    assert found == pytest.approx(1 - sum(cosines) / 3, abs=1e-4)


def test_embedding_reconstruction_teaches_the_logits_and_nothing_else():
    clip, vqgan = micro_clip(), micro_vqgan()
    reconstruction = EmbeddingReconstruction(clip, vqgan)
    logits = torch.randn(1, 16, 64, requires_grad=True)
    wanted = clip.embed_pixels(vqgan.decode(torch.randint(64, (1, 4, 4))))
    reconstruction(logits, wanted, None).backward()
    assert (logits.grad.abs().sum(2) > 0).all()  # every place is taught
    assert all(p.grad is None for m in (clip, vqgan) for p in m.parameters())

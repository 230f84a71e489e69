"""The VQGAN: shapes, ranges, nearest codes, by config."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgen.vqgan import VQGAN, VQGANConfig
from tests.micro import micro_vqgan

SIZES = {"image_size": 16, "channels": (32, 32), "attention_sizes": (8,), "blocks_per_level": 1,
         "code_dim": 6, "codebook_size": 20, "l2_normalised": False}


@settings(deadline=None, max_examples=12)
@given(levels=st.integers(1, 3), grid=st.integers(2, 4), attention=st.booleans(),
       blocks=st.integers(1, 2), normalised=st.booleans(), count=st.integers(1, 3))
def test_codes_and_pixels_of_any_size(levels, grid, attention, blocks, normalised, count):
    size = grid * 2 ** (levels - 1)
    attention_sizes = (grid,) if attention else ()
    vqgan = VQGAN(VQGANConfig(size, (32,) * levels, attention_sizes, blocks, 6, 20,
                              normalised)).eval()
    codes = vqgan.encode(torch.rand(count, 3, size, size))
    assert codes.shape == (count, grid, grid) and codes.dtype == torch.int64
    assert vqgan.code_grid == (grid, grid)
    assert 0 <= codes.min() and codes.max() < 20
    pixels = vqgan.decode(codes)
    assert pixels.shape == (count, 3, size, size)
    assert 0 <= pixels.min() and pixels.max() <= 1


@pytest.mark.parametrize("normalised", [False, True])
def test_the_nearest_code_is_the_nearest(normalised):
    torch.manual_seed(0)
    quantizer = VQGAN(VQGANConfig(**SIZES | {"l2_normalised": normalised})).quantizer
    features = torch.randn(2, 6, 3, 4)
    book, z = quantizer.embedding.weight, features.permute(0, 2, 3, 1).reshape(-1, 6)
    if normalised:
        book, z = F.normalize(book, dim=1), F.normalize(z, dim=1)
    slow = torch.cdist(z, book).argmin(1).view(2, 3, 4)
    assert torch.equal(quantizer.nearest(features), slow)
    vectors = quantizer.vectors(slow)
    assert torch.equal(vectors[1, :, 2, 3], book[slow[1, 2, 3]])
    assert torch.equal(quantizer.nearest(vectors), slow)  # a code's own vector is nearest to itself


def test_decode_is_the_raw_output_moved_to_0_1_and_clamped():
    vqgan = micro_vqgan()
    codes = torch.randint(64, (2, 4, 4))
    with torch.no_grad():
        raw = vqgan.decode_raw(codes)
    assert torch.equal(vqgan.decode(codes), (raw * 0.5 + 0.5).clamp(0, 1))


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\), got \(1, 3, 31, 32\)"):
        micro_vqgan().encode(torch.rand(1, 3, 31, 32))


@pytest.mark.parametrize("change, words", [
    ({"image_size": 15}, "image size 15 is not a multiple of 2"),
    ({"channels": (32, 40)}, "multiples of norm_groups"), ({"channels": ()}, "channels"),
    ({"codebook_size": 0}, "codebook_size")])
def test_impossible_sizes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        VQGANConfig(**SIZES | change)

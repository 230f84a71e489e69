"""What a VQGAN may have or lack by config: patches of pixels, attention in the middle."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgen.bundle import SamplingDefaults, load_vqgan, save_bundle
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.training import vqgan as vqgan_training
from tests.micro import micro_bundle, micro_clip, micro_gpt

SIZES = {"image_size": 32, "channels": (8, 12), "attention_sizes": (), "blocks_per_level": 1,
         "code_dim": 4, "codebook_size": 16, "l2_normalised": True, "norm_groups": 0}


@settings(deadline=None, max_examples=12)
@given(patch=st.sampled_from([1, 2, 3, 4]), levels=st.integers(1, 2), grid=st.integers(2, 3),
       attention=st.booleans())
def test_codes_and_pixels_of_any_patch(patch, levels, grid, attention):
    size = grid * patch * 2 ** (levels - 1)
    config = VQGANConfig(**SIZES | {"image_size": size, "channels": (8,) * levels, "patch": patch,
                                    "attention_sizes": (grid,) if attention else ()})
    assert config.factor * grid == size and config.grid == grid
    vqgan = VQGAN(config).eval()
    codes = vqgan.encode(torch.rand(2, 3, size, size))
    assert codes.shape == (2, grid, grid)
    assert vqgan.decode(codes).shape == (2, 3, size, size)


def test_no_layer_runs_at_full_resolution():
    vqgan = VQGAN(VQGANConfig(**SIZES | {"patch": 4})).eval()
    sides = []
    for module in vqgan.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *call: sides.append(call[-1].shape[-1]))
    vqgan.decode(vqgan.encode(torch.rand(1, 3, 32, 32)))
    assert max(sides) == 8 and min(sides) == 4


@pytest.mark.parametrize("attention", [False, True])
def test_gradients_reach_all_weights(attention):
    vqgan = VQGAN(VQGANConfig(**SIZES | {"patch": 2, "middle_attention": attention}))
    pixels = torch.rand(2, 3, 32, 32)
    result, _, _, loss = vqgan_training.Autoencoder(vqgan, 0.25)(pixels, True)
    (F.mse_loss(result, pixels) + loss).backward()
    assert not [name for name, p in vqgan.named_parameters()
                if p.grad is None or not p.grad.any()]


def test_every_pixel_of_a_patch_is_drawn_by_itself():
    vqgan = VQGAN(VQGANConfig(**SIZES | {"patch": 4})).eval()
    with torch.no_grad():
        vqgan.decoder.final[-1].weight.zero_()
        vqgan.decoder.final[-1].bias.copy_(torch.linspace(-1, 1, 48))
        raw = vqgan.decode_raw(torch.zeros(1, 4, 4, dtype=torch.long))
    square = torch.linspace(-1, 1, 48).view(3, 4, 4)
    torch.testing.assert_close(raw[0], square.repeat(1, 8, 8))


def test_without_attention_a_place_does_not_see_the_far_end():
    codes = torch.zeros(1, 40, 40, dtype=torch.long)
    other = codes.clone()
    other[0, -1, -1] = 1
    for attention in False, True:
        torch.manual_seed(0)
        config = VQGANConfig(**SIZES | {"image_size": 80, "middle_attention": attention})
        vqgan = VQGAN(config).eval().double()
        with torch.no_grad():
            change = (vqgan.decode_raw(codes) - vqgan.decode_raw(other)).abs()
        assert change[..., -2:, -2:].max() > 1e-4
        assert (change[..., :2, :2].max() > 0) == attention


def test_a_bundle_keeps_its_patch_and_an_older_one_has_none(tmp_path):
    vqgan = VQGAN(VQGANConfig(**SIZES | {"patch": 2, "middle_attention": False})).eval()
    save_bundle(tmp_path / "new", clip=micro_clip(["a"]), vqgan=vqgan,
                gpt=micro_gpt(codebook_size=16, block_size=64), sampling=SamplingDefaults(),
                trained_on={}, dtype=torch.float32)
    loaded, pixels = load_vqgan(tmp_path / "new"), torch.rand(2, 3, 32, 32)
    assert loaded.config == vqgan.config and loaded.config.patch == 2
    assert torch.equal(loaded.encode(pixels), vqgan.encode(pixels))
    config = micro_bundle(tmp_path / "old") / "config.json"
    text = json.loads(config.read_text())
    before = load_vqgan(tmp_path / "old")
    del text["vqgan"]["patch"], text["vqgan"]["middle_attention"]
    config.write_text(json.dumps(text))
    after = load_vqgan(tmp_path / "old")
    assert after.config == replace(before.config, patch=1, middle_attention=True)
    assert torch.equal(after.encode(pixels), before.encode(pixels))


@pytest.mark.parametrize("change, words", [
    ({"patch": 0}, "VQGAN patch must be at least 1, got 0"),
    ({"patch": 3}, "image size 32 is not a multiple of 6, the reduction of 2 levels and patches "
     "of 3")])
def test_impossible_patches_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        VQGANConfig(**SIZES | change)

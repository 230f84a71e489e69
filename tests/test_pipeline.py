"""ClipGen: seeds that make an image again, ranking, defaults, warnings."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgen import AllAlike, ClipGen, TextTruncated, UnknownWords
from clipgen.bundle import SamplingDefaults
from tests.marks import NEEDS_INT8
from tests.micro import micro_bundle

TEXT = "a cat on the beach"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = micro_bundle(tmp_path_factory.mktemp("bundle") / "micro", null_embedding=True,
                             vocabulary=[TEXT, "night, day"], sampling=SamplingDefaults(top_k=20))
    return ClipGen.load(directory)


def pixels(generated):
    return np.asarray(generated.image)


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_every_image_is_made_again_from_its_seed(model, guidance):
    images = model.generate(TEXT, num_images=9, candidates=11, seed=2**31 - 4, guidance=guidance)
    seeds = {i.seed for i in images}
    assert len(seeds) == 9 and seeds <= {(2**31 - 4 + k) % 2**31 for k in range(11)}
    assert {0, 1, 2} & {i.seed for i in images}  # wrapped at 2**31
    for image in images:
        again, = model.generate(TEXT, 1, 1, seed=image.seed, guidance=guidance)
        assert np.array_equal(again.codes, image.codes)
        assert np.array_equal(pixels(again), pixels(image))
        assert again.score == pytest.approx(image.score, abs=1e-5)


def test_the_best_come_first_by_clip_cosine(model):
    images = model.generate(TEXT, num_images=12, candidates=12, seed=0)
    scores = [i.score for i in images]
    assert scores == sorted(scores, reverse=True) and len({i.seed for i in images}) == 12
    assert [i.seed for i in model.generate(TEXT, num_images=3, candidates=12, seed=0)] == [
        i.seed for i in images[:3]]
    stacked = torch.from_numpy(np.stack([pixels(i) for i in images])).permute(0, 3, 1, 2) / 255
    cosine = (model.clip.embed_pixels(stacked) @ model.clip.embed_texts([TEXT])[0]).tolist()
    assert scores == pytest.approx(cosine, abs=2e-2)  # files hold 8 bits a channel


def test_the_default_is_four_of_sixteen_and_the_bundles_settings(model):
    images = model.generate(TEXT, seed=0)
    assert len(images) == 4 and all(0 <= i.seed < 16 for i in images)
    own = model.generate(TEXT, 1, 1, seed=7)[0]
    assert np.array_equal(own.codes, model.generate(TEXT, 1, 1, seed=7, top_k=20)[0].codes)
    assert not np.array_equal(own.codes, model.generate(TEXT, 1, 1, seed=7, top_k=1)[0].codes)
    assert isinstance(own.image, Image.Image) and own.image.mode == "RGB"
    assert own.image.size == (32, 32) and own.codes.shape == (4, 4)


def test_no_seed_is_a_drawn_seed_and_zero_is_a_seed(model):
    assert len({model.generate(TEXT, 1, 1)[0].seed for _ in range(4)}) > 1
    assert model.generate(TEXT, 1, 1, seed=0)[0].seed == 0


def test_few_candidates_are_raised_to_the_number_of_images(model):
    assert len(model.generate(TEXT, num_images=5, candidates=2, seed=0)) == 5


@pytest.mark.parametrize("setting", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0}])
def test_of_images_that_are_all_alike_one_is_drawn(model, setting):
    (name, value), = setting.items()
    with pytest.warns(AllAlike, match=f"^{name} {value} draws .*: 1 is drawn instead of 8$"):
        (image,) = model.generate(TEXT, num_images=4, candidates=8, seed=7, **setting)
    for seed in (7, 8):  # one that was asked for is nothing to speak of
        with warnings.catch_warnings(action="error"):
            (same,) = model.generate(TEXT, 1, 1, seed=seed, **setting)
        assert np.array_equal(image.codes, same.codes)
    assert image.seed == 7
    assert len(model.generate(TEXT, 2, 2, seed=7, temperature=0.1)) == 2


def test_images_can_be_sampled_from_image_embeddings(model):
    embeddings = model.clip.embed_pixels(torch.rand(3, 3, 50, 40))
    codes = model.sample(embeddings, [4, 5, 6])
    assert codes.shape == (3, 4, 4)
    assert torch.equal(codes[1:2], model.sample(embeddings[1:2], [5]))
    assert model.gpt(embeddings, codes.flatten(1)[:, :-1]).isfinite().all()  # under autograd


@pytest.mark.parametrize("change, words", [
    ({"text": "  "}, "text must not be empty"), ({"num_images": 0}, "num_images .* got 0"),
    ({"candidates": -1}, "candidates .* got -1"), ({"num_images": 2.5}, "num_images .* got 2.5"),
    ({"seed": 1.5}, "seed .* got 1.5"), ({"seed": "1"}, "seed .* got '1'"),
    ({"seed": 2**31}, "seed .* got 2147483648"),
    ({"seed": -1}, "seed .* got -1"), ({"top_p": 2}, "top_p .* got 2")])
def test_bad_values_are_named(model, change, words):
    with pytest.raises(ValueError, match=words):
        model.generate(**{"text": TEXT, "num_images": 1, "candidates": 1} | change)


def test_warnings_say_what_was_cut_and_what_was_never_seen(model):
    with pytest.warns(UnknownWords, match="'zebra'"):
        model.generate("a zebra on the beach", 1, 1, seed=0)
    with pytest.warns(TextTruncated, match="32 tokens"):
        model.generate("a cat " * 40, 1, 1, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate("a cat, on the beach.", 1, 1, seed=0)


def test_seeds_wrap_and_whole_floats_count(model):
    e = model.clip.embed_texts([TEXT])
    assert torch.equal(model.sample(e, [2**31 + 3]), model.sample(e, [3.0], top_k=20.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16,
                                   pytest.param(torch.int8, marks=NEEDS_INT8)])
def test_the_parts_compose(model, dtype):
    other = ClipGen.load(model.bundle.directory, dtype=dtype)
    assert other.dtype is dtype
    e = other.clip.embed_texts([TEXT, "night"])
    codes = other.sample(e, [0, 1])
    assert other.gpt(e, codes.flatten(1)[:, :-1]).shape == (2, 16, 64)
    torch.testing.assert_close(other.vqgan.decode(codes), other.decode(codes))
    assert other.vqgan.encode(other.vqgan.decode(codes)).shape == (2, 4, 4)


@settings(deadline=None, max_examples=8)
@given(num=st.integers(1, 10), candidates=st.integers(0, 12), seed=st.integers(0, 2**31 - 1))
def test_any_request_is_made_of_single_images(model, num, candidates, seed):
    images = model.generate(TEXT, num, candidates, seed)
    assert len(images) == num
    for image in images[::4]:
        again, = model.generate(TEXT, 1, 1, image.seed)
        assert np.array_equal(again.codes, image.codes) and np.array_equal(pixels(again),
                                                                           pixels(image))


@pytest.mark.parametrize("change, words", [
    ({"device": "cuda:99"}, "^device cuda:99 does not exist: PyTorch sees .*; use device cpu$"),
    ({"device": "toaster"}, "^device must be cpu, cuda or cuda:N, got 'toaster'$"),
    ({"dtype": "float32"}, "^dtype must be torch.float32, .* got 'float32'$"),
    ({"dtype": torch.int64}, "^dtype must be .* got torch.int64$")])
def test_devices_and_dtypes_that_cannot_be_had_are_named(model, change, words):
    with pytest.raises(ValueError, match=words):
        ClipGen.load(model.bundle.directory, **change)


def test_pixels_that_are_not_finite_are_an_error(model, monkeypatch):
    monkeypatch.setattr(model.vqgan, "decode_raw",
                        lambda codes: torch.full((1, 3, 32, 32), float("inf")))
    with pytest.raises(FloatingPointError, match="not finite"):
        model.generate(TEXT, 1, 1, seed=0)

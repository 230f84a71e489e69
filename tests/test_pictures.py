"""Pictures as prompts: variations, blends, negatives, edits; and recipes that make them again."""

import io
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipgen import ClipGen, NothingToDraw, UnknownWords, read_recipe
from clipgen.canvas import make_canvas
from clipgen.images import FORMATS, centre_square, read_picture
from clipgen.recipe import save_image
from tests.micro import micro_bundle

TEXT = "a cat on the beach"
S, ROWS, CELL = 32, 4, 8  # the micro bundle's pixels and codes a side, and pixels a code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return ClipGen.load(micro_bundle(tmp_path_factory.mktemp("bundle") / "micro",
                                     null_embedding=True, vocabulary=[TEXT, "night, day"]))


def noise(seed, size=(S, S)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def one(model, seed=3, **options):
    image, = model.generate(num_images=1, candidates=1, seed=seed, **options)
    return image


def same(a, b):
    return np.array_equal(a.codes, b.codes) and np.array_equal(np.asarray(a.image),
                                                               np.asarray(b.image))


def embedded(model, picture):
    view = centre_square(picture, S).transpose(2, 0, 1).copy()
    return model.clip.embed_pixels(torch.from_numpy(view)[None].float() / 255)[0]


# Variations and blends


def test_the_weights_ends_are_the_text_and_the_image_alone(model):
    cat = noise(1, (50, 40))
    assert same(one(model, text=TEXT, image=cat, image_weight=0), one(model, text=TEXT))
    alone = one(model, image=cat)
    assert same(one(model, text=TEXT, image=cat, image_weight=1), alone)
    assert same(one(model, text=" \n", image=cat), alone)
    assert not same(alone, one(model, text=TEXT))


@settings(deadline=None, max_examples=10)
@given(weight=st.floats(0, 1), seed=st.integers(0, 2**31 - 9), guidance=st.sampled_from([1, 3.0]))
def test_a_blend_draws_and_ranks_by_the_mean_of_both(model, weight, seed, guidance):
    cat = noise(seed)
    wanted = F.normalize((1 - weight) * model.clip.embed_texts([TEXT])[0]
                         + weight * embedded(model, cat), dim=0)
    images = model.generate(TEXT, 3, 3, seed, image=cat, image_weight=weight, guidance=guidance)
    for image in images:
        codes = model.sample(wanted[None], [image.seed], guidance=guidance)
        again = one(model, image.seed, text=TEXT, image=cat, image_weight=weight, guidance=guidance)
        assert same(image, again) and np.array_equal(codes[0].numpy(), again.codes)
        score = model.clip.embed_pixels(model.decode(codes))[0] @ wanted
        assert image.score == pytest.approx(score.item(), abs=1e-4)
    assert [i.score for i in images] == sorted((i.score for i in images), reverse=True)


def test_a_file_an_image_and_other_shapes_of_one_picture_are_alike(model, tmp_path):
    cat = noise(2)
    cat.save(tmp_path / "cat.png")
    expected = one(model, image=cat)
    assert same(one(model, image=tmp_path / "cat.png"), expected)
    assert same(one(model, image=str(tmp_path / "cat.png")), expected)
    wide = Image.new("RGB", (S + 20, S))
    wide.paste(cat, (10, 0))
    assert same(one(model, image=wide), expected)
    turned = cat.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as opened:
        assert same(one(model, image=opened), expected)
        assert opened.size == (S, S) and opened.getexif()[0x0112] == 6  # the caller's is untouched


@pytest.mark.parametrize("mode, colour", [
    ("L", 200), ("1", 1), ("P", 3), ("RGBA", (9, 9, 9, 0)), ("LA", (9, 90)),
    ("CMYK", (0, 90, 9, 9)), ("I;16", 40_000), ("I", 40_000),
    ("YCbCr", (90, 90, 90)), ("LAB", (50, 9, 9))])
@pytest.mark.parametrize("size", [(1, 1), (1, 90), (33, 32)])
def test_pictures_of_every_mode_and_shape_are_taken(model, mode, colour, size):
    assert one(model, image=Image.new(mode, size, colour)).image.size == (S, S)


def test_transparency_lies_on_white(model):
    clear, white = Image.new("RGBA", (9, 9), (255, 0, 0, 0)), Image.new("RGB", (9, 9), "white")
    assert same(one(model, image=clear), one(model, image=white))


def encoded(image, kind="PNG", **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


BAD = {"empty.png": b"", "text.png": b"no image", "cut.png": encoded(noise(3))[:90],
       "cut.jpg": encoded(noise(3, (64, 64)), "JPEG")[:300],
       "bomb.png": encoded(Image.new("1", (15_000, 15_000))),
       "float.tif": encoded(Image.new("F", (4, 4)), "TIFF")}


@pytest.mark.parametrize("name", [*BAD, "missing.png", "."])
@pytest.mark.parametrize("where", ["image", "init_image", "mask"])
def test_a_picture_that_cannot_be_read_is_one_sentence(model, tmp_path, name, where):
    if name in BAD:
        (tmp_path / name).write_bytes(BAD[name])
    pictures = {"init_image": noise(1)} if where == "mask" else {}
    pictures[where] = tmp_path / name
    if where == "init_image":
        pictures["keep"] = 0.5
    with pytest.raises(ValueError) as caught:
        one(model, text=TEXT, **pictures)
    message = str(caught.value)
    assert message.startswith(f"{where} '{pictures[where].name}' cannot be read (")
    assert message.endswith(f": give a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture")
    assert "\n" not in message


def test_100_megapixels_are_taken(model):
    assert one(model, image=Image.new("L", (10_000, 10_000), 9)).image.size == (S, S)


# Negative texts


def test_a_negative_text_takes_the_null_embeddings_place(model):
    images = [one(model, text=TEXT, guidance=3, **negative)
              for negative in ({}, {"negative_text": "night"}, {"negative_text": "day"})]
    assert not any(same(a, b) for a, b in zip(images, images[1:], strict=False))
    e, away = model.clip.embed_texts([TEXT, "night"])
    codes = model.sample(e[None], [3], guidance=3, negative=away)
    assert np.array_equal(codes[0].numpy(), images[1].codes)
    assert same(one(model, text=TEXT, guidance=3, negative_text=" "), images[0])
    with pytest.warns(UnknownWords, match="zebra"):
        one(model, text=TEXT, guidance=3, negative_text="zebra")


# Edits


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_a_mask_draws_its_codes_and_keeps_the_pixels_outside(model, seed, share):
    picture, rng = noise(seed), np.random.default_rng(seed)
    white = rng.random((S, S)) < share
    # Away from the mask by as much as the edge is soft: two pixels here, a quarter of a code.
    near = F.max_pool2d(torch.from_numpy(white).float()[None, None], 5, 1, 2)[0, 0].bool().numpy()
    cells = white.reshape(ROWS, CELL, ROWS, CELL).any((1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if not white.any() else "error")
        images = model.generate(TEXT, 2, 2, seed, init_image=picture,
                                mask=Image.fromarray(white))
    own = model.vqgan.encode(torch.from_numpy(np.asarray(picture).transpose(2, 0, 1).copy())[None]
                             .float() / 255)[0].numpy()
    for image in images:
        pixels = np.asarray(image.image)
        assert np.array_equal(image.codes[~cells], own[~cells])
        assert np.array_equal(pixels[~near], np.asarray(picture)[~near])
        decoded = model.decode(torch.from_numpy(image.codes)[None])[0]
        new = (decoded * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(pixels[white], new[white])
        again = one(model, image.seed, text=TEXT, init_image=picture, mask=Image.fromarray(white))
        assert same(again, image)
        if share == 1:
            assert same(image, one(model, image.seed, text=TEXT))
        if share == 0:
            assert np.array_equal(pixels, np.asarray(picture))


@pytest.mark.parametrize("keep, rows", [(0, 0), (0.4, 2), (0.25, 1), (0.5, 2), (0.99, 4), (1, 4)])
def test_keep_is_the_share_of_rows_from_the_top(model, keep, rows):
    picture = noise(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = one(model, text=TEXT, init_image=picture, keep=keep)
    mask = Image.new("L", (S, S), 0)
    mask.paste(255, (0, rows * CELL, S, S))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(image, one(model, text=TEXT, init_image=picture, mask=mask))
    assert [w.category for w in caught] == [NothingToDraw] * (rows == ROWS)
    if rows == 0:
        assert same(image, one(model, text=TEXT))


def test_the_edge_is_soft_and_outside_the_mask():
    anew = torch.zeros(64, 64, dtype=torch.bool)
    anew[:, 32:] = True
    share = make_canvas(torch.zeros(3, 64, 64), torch.zeros(4, 4).long(), anew).share[0]
    assert share[32:].eq(1).all() and share[:28].eq(0).all()
    assert (share[28:32] > 0).all() and (share[28:32] < 1).all() and (share.diff() >= 0).all()


def test_an_edit_of_a_larger_picture_takes_its_centre(model):
    picture = noise(5, (48, 32))
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (0, 16, 48, 32))
    square = (8, 0, 40, 32)
    assert same(one(model, text=TEXT, init_image=picture, mask=mask),
                one(model, text=TEXT, init_image=picture.crop(square), mask=mask.crop(square)))


@pytest.mark.parametrize("change, words", [
    ({"text": None}, "text must not be empty, got None: give a text or an image"),
    ({"text": 5, "image": noise(1)}, "text must be a text, got 5"),
    ({"image": 5}, "image must be a PIL image or the path of a file, got 5"),
    ({"image": noise(1), "image_weight": 1.5}, "image_weight must be .* from 0 to 1, got 1.5"),
    ({"image_weight": True}, "image_weight .* got True"),
    ({"image_weight": float("nan")}, "image_weight .* got nan"),
    ({"negative_text": "day"}, "negative_text 'day' needs guidance above 1, got 1.0: give guid"),
    ({"negative_text": 5, "guidance": 3}, "negative_text must be a text, got 5"),
    ({"mask": noise(1)}, "mask needs init_image.* give init_image too, or leave mask out"),
    ({"keep": 0.5}, "keep needs .* give init_image too"),
    ({"init_image": noise(1)}, "either mask .* or keep .*, got neither mask nor keep"),
    ({"init_image": noise(1), "mask": noise(1), "keep": 0.5}, "mask .* or keep .*, got both"),
    ({"init_image": noise(1), "keep": -0.1}, "keep must be a number from 0 to 1, got -0.1"),
    ({"init_image": noise(1), "keep": "half"}, "keep .* got 'half'")])
def test_what_does_not_go_together_is_one_sentence(model, change, words):
    with pytest.raises(ValueError, match=words) as caught:
        one(model, **{"text": TEXT} | change)
    assert "\n" not in str(caught.value)


def test_forced_codes_of_another_grid_are_named(model):
    e = model.clip.embed_texts([TEXT])
    with pytest.raises(ValueError, match=r"shape \(N, 4, 4\), got \(1, 16\)"):
        model.sample(e, [0], forced=torch.zeros(1, 16).long())


# Recipes


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "PNG"])
@settings(deadline=None, max_examples=20)
@given(text=st.text(min_size=1, max_size=300))
def test_a_file_keeps_its_recipe(suffix, tmp_path_factory, text):
    path = tmp_path_factory.mktemp("recipe") / f"a.{suffix}"
    recipe = {"text": text, "seed": 3, "bundle": "f", "temperature": 0.1 + 0.2}
    save_image(noise(1), path, recipe)
    assert read_recipe(path) == recipe
    with Image.open(path) as image:
        assert image.size == (S, S)
        if suffix == "png":
            assert json.loads(image.text["parameters"]) == recipe
    plain = path.with_stem("plain")
    save_image(noise(1), plain)
    with Image.open(path) as a, Image.open(plain) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
    with pytest.raises(ValueError, match="does not say how it was made: give an image"):
        read_recipe(plain)


def test_a_recipe_has_every_setting_and_makes_the_image_again(model, tmp_path):
    cat, sea, mask = noise(1), noise(2), noise(3)
    pictures = {"image": cat, "init_image": sea, "mask": mask}
    images = model.generate(TEXT, 2, 4, 8, guidance=2, top_k=9, negative_text="day",
                            image_weight=0.3, **pictures)
    for image in images:
        image.save(tmp_path / "a.webp")
        recipe = read_recipe(tmp_path / "a.webp")
        assert recipe == image.recipe
        assert recipe["seed"] == image.seed and recipe["bundle"] == model.bundle.fingerprint != ""
        assert set(recipe) == {"text", "seed", "temperature", "top_k", "top_p", "guidance", "image",
                               "image_weight", "negative_text", "init_image", "mask", "device",
                               "dtype", "bundle", "version"}
        made_of = {key: recipe[key] for key in ("text", "seed", "temperature", "top_k", "top_p",
                                                "guidance", "image_weight", "negative_text")}
        assert same(one(model, **made_of, **pictures), image)
    plain = one(model, text=TEXT)
    assert "image" not in plain.recipe and "negative_text" not in plain.recipe
    plain.save(tmp_path / "b.png", metadata=False)
    with pytest.raises(ValueError, match="does not say"):
        read_recipe(tmp_path / "b.png")


def test_files_that_hold_no_recipe_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ValueError, match="a.png cannot be read"):
        read_recipe(tmp_path / "a.png")
    with pytest.raises(ValueError, match="b.png is not there"):
        read_recipe(tmp_path / "b.png")
    with pytest.raises(ValueError, match="must end in one of .png"):
        save_image(noise(1), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="more than fit into an image file"):
        save_image(noise(1), tmp_path / "c.jpg", {"text": "x" * 40_000})


def test_a_picture_is_refused_by_what_it_was_given_as():
    with pytest.raises(ValueError, match=r"mask must be a PIL image or the path .* got \[\]"):
        read_picture([], "mask")

"""CLIP: tokens, vocabulary, preprocessing, embeddings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torchvision.transforms import functional as tv

from clipgen.clip import CLIP, END, PADDING, START, CLIPConfig, _encode, vocabulary_of
from tests.micro import micro_clip

CAPTIONS = ["a red apple on the beach at night", "a dog, in the snow!"]
LONG = "a red apple " * 40


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return micro_clip()


@pytest.fixture(scope="module")
def compact(clip):
    """The same CLIP with a token table of the captions' rows alone."""
    small = micro_clip(CAPTIONS)
    state = clip.model.state_dict()
    state["token_embedding.weight"] = state["token_embedding.weight"][list(small.config.vocabulary)]
    small.model.load_state_dict(state)
    return small


# Tokens


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))  # open_clip raises on those
def test_tokens_are_open_clips(clip, text):
    assert torch.equal(clip.tokenize([text, "a"]), open_clip.tokenize([text, "a"], 32))


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text("ab c,!", max_size=300))
def test_every_text_starts_and_ends(clip, text):
    tokens = clip.tokenize([text])
    assert tokens.shape == (1, 32) and tokens.dtype == torch.int64
    place = int(tokens[0].argmax())  # where open_clip pools
    assert tokens[0, 0] == START and tokens[0, place] == END
    assert clip.truncated(text) == (len(open_clip.tokenizer._tokenizer.encode(
        text.encode("utf-8", "replace").decode())) > 30)


def test_a_long_text_keeps_its_end(clip, compact):
    for model, end in ((clip, END), (compact, len(compact.config.vocabulary) - 1)):
        tokens = model.tokenize([LONG])[0]
        assert tokens[-1] == end and (tokens[:-1] != end).all() and model.truncated(LONG)
    assert not clip.truncated("a red apple")
    assert not clip.truncated("apple " * 30) and clip.truncated("apple " * 31)


def test_tags_in_a_text_are_no_tokens(clip):
    """Where a text names the end, open_clip would take the embedding from there."""
    tagged = "a <start_of_text> cat <end_of_text> on the beach"
    assert torch.equal(clip.tokenize([tagged]), clip.tokenize(["a cat on the beach"]))


def test_texts_is_a_list(clip):
    with pytest.raises(ValueError, match="list of texts.*'a cat'"):
        clip.tokenize("a cat")
    assert clip.embed_texts([]).shape == (0, 32)


# The compact vocabulary


def test_vocabulary_of():
    rows = vocabulary_of(CAPTIONS)
    assert list(rows) == sorted(set(rows)) and {PADDING, START, END} < set(rows)
    assert vocabulary_of([]) == (PADDING, START, END)


def test_compact_embeds_as_the_full_one(clip, compact):
    texts = [*CAPTIONS, "a dog at the beach", "", LONG]
    assert compact.model.token_embedding.weight.shape[0] == len(compact.config.vocabulary) < 30
    assert torch.equal(compact.embed_texts(texts), clip.embed_texts(texts))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from("a red apple zebra dog snow ! , jumping UFO 🍎 über".split()),
                max_size=40))
def test_end_is_the_largest_row_always(compact, words):
    tokens = compact.tokenize([" ".join(words)])[0]
    end = len(compact.config.vocabulary) - 1
    assert (tokens == end).sum() == 1 and tokens[0] == end - 1 and tokens.max() == end
    assert (tokens[int(tokens.argmax()) + 1:] == 0).all()


@pytest.mark.parametrize(("text", "unknown"), [
    ("a red apple", []),
    ("a zebra on the beach", ["zebra"]),
    ("Zebra! A ZEBRA; a giraffe?", ["zebra", "giraffe"]),
    ("a dog; the snow -- (night)...", []),
    ("a dog 🦓", ["🦓"]),
    ("redapple", ["redapple"]),
    ("", []),
])
def test_unknown_words(clip, compact, text, unknown):
    assert compact.unknown_words(text) == unknown
    assert clip.unknown_words(text) == []


def test_unknown_tokens_are_row_0(compact):
    assert compact.tokenize(["a zebra dog"])[0, 2] == 0
    assert (compact.tokenize(["a red dog"])[0, :5] != 0).all()


@pytest.mark.parametrize("rows", [(), (0, 49407), (0, 7, 3, 49406, 49407), (0, 0, 49406, 49407),
                                  (0, 49406, 49407, 49408), (-1, 0, 49406, 49407)])
def test_bad_vocabulary(rows):
    model = {**CLIPConfig.published().model, "text_cfg": {"vocab_size": len(rows)}}
    with pytest.raises(ValueError, match="vocabulary|token ids"):
        CLIPConfig(model=model, vocabulary=rows)


def test_vocabulary_and_vocab_size_agree():
    with pytest.raises(ValueError, match="vocab_size is 49408.*3 tokens"):
        CLIPConfig(model=CLIPConfig.published().model, vocabulary=(0, START, END))


# Other ways to write known words


EMOJI = json.loads((Path(__file__).parent.parent / "weights/emoji/config.json").read_text())["clip"]


@pytest.fixture(scope="module")
def default():
    """The default model's CLIP without its weights: what it makes of a text's words."""
    return CLIP.on_meta(CLIPConfig(model=EMOJI["model"], vocabulary=tuple(EMOJI["vocabulary"])))


@pytest.mark.parametrize("text, plainly", [
    ("a c\u200bat on the be\u00adach", "a cat on the beach"),
    ("a cat\u200bon the beach", "a cat on the beach"), ("a cat\ufe0f\u200d", "a cat"),
    ("a cát on thé beäch", "a cat on the beach"), ("a c\u0327a\u0301t", "a cat"),
    ("ａ ｃａｔ", "a cat"), ("&#8203;a c&#173;at", "a cat"),
    ("2 cats on the beach", "two cats on the beach"), ("2cats, 1 dog", "two cats, a dog"),
    ("a 🐱 on the 🏖️", "a cat on the beach with umbrella"), ("a 🚗🐱!", "a car cat !"),
    ("🎂", "birthday cake"), ("🍎", "red apple"), ("⛄️ at night", "snowman at night"),
    ("a zébra and a cát", "a zébra and a cat")])
def test_other_ways_to_write_known_words(default, clip, text, plainly):
    assert torch.equal(default.tokenize([text]), default.tokenize([plainly]))
    assert default.unknown_words(text) == default.unknown_words(plainly)
    assert default.truncated(text) == default.truncated(plainly)
    # CLIP's whole vocabulary has a meaning for each of them.
    assert torch.equal(clip.tokenize([text]), open_clip.tokenize([text], 32))


def test_the_emoji_of_all_known_things_are_known(default):
    for glyph in "🐱🐶🍎🚗🚀🐘🍓⛵🦊🎈🏠🍌🐧🚒🍕🤖🐸🎁🚲🍔🦉⚽🐷🎂🐢🦄🍄🚌🐼🎸🍉⛄🐯🍇🦋🍦☂🦀🚜🌻":
        assert default.unknown_words(f"a {glyph} on the beach") == [], glyph
    for glyph in "🦓🔴⚡😂⬅🔎":
        assert default.unknown_words(f"a {glyph} on the beach") == [glyph]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("cat\u200b\u00ad\u0301é2 🐱🏽①ﷺ½,<\ud800"), max_size=30))
def test_no_text_is_known_worse_than_before(default, text):
    as_it_is = default._lacking(text)
    assert len(default.unknown_words(text)) <= len(as_it_is)
    if not as_it_is:
        tokens, rows = _encode(text), EMOJI["vocabulary"]
        expected = [rows.index(token) if token in rows else 0 for token in tokens][:30]
        assert default.tokenize([text])[0, 1:len(expected) + 1].tolist() == expected


# Pixels


def test_published_is_open_clips_own():
    assert CLIPConfig.published().model == open_clip.get_model_config("ViT-B-32-quickgelu")
    assert CLIPConfig.published().image_mean == open_clip.OPENAI_DATASET_MEAN
    assert CLIPConfig.published().image_std == open_clip.OPENAI_DATASET_STD


def hard_edges(height, width):
    """A checkerboard, coloured bars and letters: what bicubic filters overshoot at."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([(x // 3 + y // 3) % 2, x // 5 % 2, y // 4 % 2], -1).astype(np.uint8) * 255
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text((2, 2), "ABC xyz", fill="white")
    return image


def as_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (20, 20), (100, 41), (41, 100), (33, 32),
                                   (1, 1), (31, 500), (256, 256)])
def test_preprocess_is_pillows(clip, shape):
    """CLIP was trained on what Pillow's antialiased bicubic resize makes of bytes.

    Columns before rows, in two calls: Pillow 13 takes the rows of some tall images first.
    """
    height, width = (32 * side // min(shape) for side in shape)
    noise = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    std = torch.tensor(clip.config.image_std).view(1, 3, 1, 1)
    for image in (Image.fromarray(noise), hard_edges(*shape)):
        pillow = image.resize((width, shape[0]), Image.Resampling.BICUBIC)
        pillow = pillow.resize((width, height), Image.Resampling.BICUBIC)
        if shape[0] <= shape[1]:
            one_call = tv.resize(image, 32, tv.InterpolationMode.BICUBIC)
            assert (as_tensor(one_call) - as_tensor(pillow)).abs().max() < 0.5 / 255
        expected = tv.normalize(as_tensor(tv.center_crop(pillow, 32)), clip.config.image_mean,
                                clip.config.image_std)
        difference = (clip.preprocess(as_tensor(image)[None]) - expected) * std
        assert difference.abs().max() < 1.1 / 255


def test_preprocess_clamps_the_overshoot(clip):
    step = torch.zeros(1, 3, 48, 48)
    step[..., 24:] = 1  # bicubic rings at an edge
    mean = torch.tensor(clip.config.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(clip.config.image_std).view(1, 3, 1, 1)
    raw = F.interpolate(step, 32, mode="bicubic", antialias=True)
    assert float(raw.max()) > 1.005
    back = clip.preprocess(step) * std + mean
    assert back.min() >= -1e-6 and back.max() <= 1 + 1e-6


def test_preprocess_has_a_gradient(clip):
    pixels = torch.rand(1, 3, 50, 40, requires_grad=True)
    clip.model.encode_image(clip.preprocess(pixels)).sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("pixels", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8),
                                    torch.zeros(1, 3, 0, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_bad_pixels(clip, pixels):
    with pytest.raises(ValueError, match="pixels must"):
        clip.embed_pixels(pixels)


# Embeddings


def test_embeddings_are_unit_rows_of_float32(clip):
    texts = clip.embed_texts(["a cat", "a dog", "a dog"])
    for rows in (texts, clip.embed_pixels(torch.rand(3, 3, 50, 40).half())):
        assert rows.shape == (3, clip.embedding_dim) and rows.dtype == torch.float32
        assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-6)
    assert not torch.allclose(texts[0], texts[1]) and torch.equal(texts[1], texts[2])


def test_many_at_once_equal_one_by_one(clip):
    pixels = torch.rand(131, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    rows = clip.embed_pixels(pixels)
    assert rows.shape == (131, 32)
    for i in (0, 63, 64, 130):
        assert torch.allclose(rows[i], clip.embed_pixels(pixels[i:i + 1])[0], atol=1e-5)
    texts = [f"number {i}" for i in range(300)]
    assert torch.allclose(clip.embed_texts(texts)[299], clip.embed_texts(texts[299:])[0], atol=1e-5)
    assert clip.embed_pixels(pixels[:0]).shape == (0, 32)


def test_autocast_changes_nothing(clip):
    pixels = torch.rand(2, 3, 32, 32)
    plain = clip.embed_texts(["a cat"]), clip.embed_pixels(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = clip.embed_texts(["a cat"]), clip.embed_pixels(pixels)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


def test_embeddings_can_feed_a_model_in_training(clip):
    layer = torch.nn.Linear(32, 1)
    layer(clip.embed_texts(["a cat"])).sum().backward()  # inference-mode tensors would raise
    assert layer.weight.grad is not None


def test_the_causal_mask_is_causal(clip):
    """A text's embedding depends on nothing behind its end token."""
    tokens = clip.tokenize(["a cat"])
    changed = tokens.clone()
    changed[0, 10:] = 5
    encode = clip.model.encode_text
    assert torch.allclose(encode(tokens), encode(changed), atol=1e-6)
    before = clip.model.attn_mask.clone()
    clip.rebuild_buffers()
    assert torch.equal(clip.model.attn_mask, before)


def test_importing_clip_leaves_open_clip_alone():
    code = "import sys, clipgen.clip; sys.exit('open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""The scenes: deterministic, varied, truthfully captioned, and a tenth of their pairs held out."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from scripts.data.presets import open_images
from scripts.data.transforms import batches
from scripts.emoji import scenes, world
from scripts.emoji.painter import PLAIN, STICKERS
from scripts.emoji.scenes import Scenes, draw_scene
from tests.sprites import drawn_sprites

SPRITES = drawn_sprites()
SEEDS = st.integers(0, 2**40)
EVERYWHERE = [world.Labels(("cat",), place, time) for place in world.PLACES
              for time in ([None] if place in world.TIMELESS else world.TIMES)]
EVERYWHERE += [world.Labels(("cat",), colour, None) for colour in world.COLOURS]


@pytest.fixture
def sprites(monkeypatch):
    monkeypatch.setattr(scenes, "emoji_sprites", lambda edged=False: SPRITES)
    monkeypatch.setattr(scenes, "find_font", lambda: None)


def pixels(labels, seed, size=32, look=PLAIN):
    return np.asarray(draw_scene(np.random.default_rng(seed), labels, size, SPRITES, look))


@settings(deadline=None, max_examples=60)
@given(seed=SEEDS, objects=st.integers(2, len(world.OBJECTS)), held_out=st.booleans())
def test_a_seed_is_a_scene(seed, objects, held_out):
    source = Scenes(range(seed, seed + 1), objects, held_out=held_out)
    labels = source.drawn_labels(0)
    assert labels == Scenes((5, seed), objects, held_out=held_out).drawn_labels(1)
    assert world.is_held_out(labels) == held_out
    assert set(labels.objects) <= set(list(world.OBJECTS)[:objects])
    image = pixels(labels, seed)
    assert (image == pixels(labels, seed)).all() and image.shape == (32, 32, 3)
    assert (image != pixels(labels, seed + 1)).any()
    assert source.captions(0) == source.captions(0)


def test_scenes_that_are_kept_are_those_that_are_drawn(sprites):
    drawn, kept = (open_images(f"scenes:70,objects=6,size=32,first=9{more}")[0]
                   for more in ("", ",keep"))
    assert kept.drawn.shape == (70, 32, 32, 3) and drawn.drawn is None
    assert kept.fingerprint() == drawn.fingerprint()
    for some in (range(70), [69, 3]):
        for a, b in zip(*(map(np.asarray, map(each.subset(some).image, range(len(some))))
                          for each in (drawn, kept)), strict=True):
            assert (a == b).all()
    assert len({image.tobytes() for image in kept.drawn}) == 70


def test_places_times_and_colours_differ():
    images = [pixels(labels, 7) for labels in EVERYWHERE]
    assert len({image.tobytes() for image in images}) == len(EVERYWHERE) == 11 * 4 + 1 + 9
    night, day = (np.array([pixels(world.Labels(("cat",), "snow", time), seed)
                            for seed in range(9)]) for time in ("night", "day"))
    for part in (slice(None), slice(-8, None)):  # with the sky, and the ground alone
        assert night[:, part].mean((1, 2, 3)).max() < day[:, part].mean((1, 2, 3)).min()


def test_two_objects_are_drawn_left_and_right():
    for seed in range(9):
        left = pixels(world.Labels(("cat", "dog"), "white", None), seed)
        for half, name in ((left[:, :14], "cat"), (left[:, 18:], "dog")):
            colour = np.array(SPRITES[name].getpixel((60, 50))[:3], int)
            assert (np.abs(half.astype(int) - colour).sum(2) < 30).mean() > 0.1


@settings(deadline=None, max_examples=200)
@given(seed=SEEDS, unseen=st.booleans())
def test_captions_say_what_the_scene_shows(seed, unseen):
    rng = np.random.default_rng(seed)
    labels = world.draw_labels(rng, len(world.OBJECTS))
    text = world.write_caption(rng, labels, unseen=unseen)
    assert text == " ".join(text.split()) and " ," not in text and ",," not in text
    assert not set(text) & set("{}") and text[0].isalpha() and text[-1] not in ",:"
    twins = len(labels.objects) == 2 and len(set(labels.objects)) == 1
    for name in labels.objects:
        said = [world.plural(n) if twins else world.article(n) for n in world.OBJECTS[name][1]]
        assert any(n in text for n in said)
    if labels.place in world.COLOURS:
        assert labels.place in text
    else:
        assert any(p in text for p in world.PLACES[labels.place])
    if labels.time:
        assert any(t in text for t in world.TIMES[labels.time])
    shorter = world.write_caption(rng, labels, place=False, time=False)
    assert not any(t in shorter for t in sum(world.TIMES.values(), ()))


def test_left_and_right_are_told_truly():
    labels = world.Labels(("cat", "dog"), "snow", "day")
    names = [[world.article(n) for n in world.OBJECTS[name][1]] for name in labels.objects]
    told = set()
    for seed in range(400):
        text = world.write_caption(np.random.default_rng(seed), labels)
        (cat,), (dog,) = ([n for n in each if n in text] for each in names)
        for k, sentence in enumerate((f"{cat} to the left of {dog}", f"{dog} to the right of {cat}",
                                      f"{cat} on the left and {dog} on the right")):
            told |= {k} if sentence in text else set()
        assert f"{dog} to the left" not in text and f"{dog} on the left" not in text
        assert f"{cat} to the right" not in text and f"{cat} on the right" not in text
    assert told == {0, 1, 2}


def test_no_training_caption_is_worded_as_the_test_texts_are():
    assert not set(world.ONE) & set(world.UNSEEN)
    words = {word.strip(",:") for pattern in world.ONE for word in pattern.split()}
    assert {word.strip(",:") for pattern in world.UNSEEN for word in pattern.split()} - words <= {
        "is", "and", "of"}


@pytest.mark.parametrize("noun, article, plural", [
    ("apple", "an apple", "apples"), ("unicorn", "a unicorn", "unicorns"), ("ufo", "a ufo", "ufos"),
    ("bus", "a bus", "buses"), ("fox", "a fox", "foxes"), ("puppy", "a puppy", "puppies"),
    ("monkey", "a monkey", "monkeys"), ("torch", "a torch", "torches"), ("owl", "an owl", "owls"),
    ("slice of pizza", "a slice of pizza", "slices of pizza"), ("sheep", "a sheep", "sheep"),
    ("bunch of grapes", "a bunch of grapes", "bunches of grapes"), ("wolf", "a wolf", "wolves")])
def test_nouns(noun, article, plural):
    assert (world.article(noun), world.plural(noun)) == (article, plural)


@pytest.mark.parametrize("objects", [20, 40, len(world.OBJECTS)])
def test_a_tenth_of_all_pairs_is_held_out_and_nothing_is_wholly_unseen(objects):
    names = list(world.OBJECTS)[:objects]
    held = [pair for pair in world.HELD_OUT if pair[0] in names]
    assert abs(len(held) / (objects * len(world.PLACES)) - 0.1) < 0.01
    for name in names:
        assert 1 <= sum(pair[0] == name for pair in held) <= 2
    counts = [sum(pair[1] == place for pair in held) for place in world.PLACES]
    assert max(counts) - min(counts) <= 1 and max(counts) < objects // 2


def test_the_world_is_as_large_as_it_says():
    assert len(world.OBJECTS) >= 200 and len(world.PLACES) == 12 and len(world.TIMES) == 4
    names = [name for _, names in world.OBJECTS.values() for name in names]
    assert len(names) == len(set(names))
    assert len({glyph for glyph, _ in world.OBJECTS.values()}) == len(world.OBJECTS)


def test_scenes_are_an_image_source(sprites):
    images, validation = open_images("scenes:9,objects=12,size=32,first=100")
    assert validation is None and len(images) == len(set(images.names)) == 9
    again = pickle.loads(pickle.dumps(images)).subset([3])
    assert again.image(0).tobytes() == images.image(3).tobytes()
    assert again.captions(0) == images.captions(3) and again.labels(0) == images.labels(3)
    assert images.fingerprint() != open_images("scenes:9,objects=13,size=32")[0].fingerprint()
    read = batches(images, 32, 4, seed=0, first_step=0, steps=3, scale=1.0, flip=False)
    for index, views in read:
        for i, view in zip(index.tolist(), views, strict=True):
            assert (view.permute(1, 2, 0).numpy() == np.asarray(images.image(i))).all()
    held, _ = open_images("scenes:50,held-out")
    assert all(world.is_held_out(held.drawn_labels(i)) for i in range(50))


def test_so_many_scenes_of_a_hundred_show_two_things(sprites):
    shares = {}
    for pairs in (None, 0, 60, 100):
        images, _ = open_images("scenes:400" + (f",pairs={pairs}" if pairs is not None else ""))
        assert images.subset([5]).labels(0) == images.labels(5)
        shares[pairs] = np.mean([len(images.labels(i)["objects"]) == 2 for i in range(400)])
    assert shares[0] == 0 and shares[100] == 1
    assert abs(shares[None] - world.PAIR_SHARE) < 0.07 and abs(shares[60] - 0.6) < 0.09
    own = round(100 * world.PAIR_SHARE)
    parted = {open_images(f"scenes:9,pairs={p}")[0].fingerprint() for p in (own, 60)}
    assert len(parted | {open_images("scenes:9")[0].fingerprint()}) == 2


def test_stickers_are_larger_and_leave_less_to_draw(sprites):
    """Edges between neighbouring pixels, of grounds without things."""
    def edges(look):
        grounds = [pixels(replace(labels, objects=()), seed, 64, look).astype(int)
                   for labels in EVERYWHERE for seed in range(3)]
        return np.mean([(np.abs(np.diff(each, axis=0)).max(2) > 40).mean() for each in grounds])

    def covered(look):
        labels = world.Labels(("cat",), "red", None)
        return np.mean([(np.abs(pixels(labels, seed, 64, look).astype(int) - pixels(
            replace(labels, objects=()), seed, 64, look)).max(2) > 8).mean() for seed in range(20)])

    assert edges(STICKERS) < 0.95 * edges(PLAIN)
    assert covered(STICKERS) > 1.1 * covered(PLAIN)
    source, _ = open_images("scenes:3,stickers")
    assert source.look == STICKERS and open_images("scenes:3")[0].look == PLAIN
    assert source.fingerprint() != open_images("scenes:3")[0].fingerprint()
    assert source.image(0).tobytes() != open_images("scenes:3")[0].image(0).tobytes()


@settings(deadline=None, max_examples=60)
@given(SEEDS, SEEDS, st.sampled_from([("cat",), ("cat", "dog"), ("dog", "cat")]))
def test_a_sticker_looks_the_same_in_every_scene(seed, other, names):
    """One size, one place, no tilt, never mirrored: so its codes are the same too."""
    def ink(seed, look):
        sprite = Image.new("RGBA", (100, 80), (255, 255, 255, 255))
        ImageDraw.Draw(sprite).rectangle([50, 0, 99, 40], fill=(0, 0, 0, 0))  # not symmetric
        image = draw_scene(np.random.default_rng(seed), world.Labels(names, "red", None), 128,
                           {"cat": sprite, "dog": Image.new("RGBA", (9, 9))}, look)
        return (np.asarray(image) == 255).all(2)

    assert (ink(seed, STICKERS) == ink(other, STICKERS)).all() and ink(seed, STICKERS).any()
    assert len({ink(each, PLAIN).tobytes() for each in range(9)}) == 9


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([3, 12, 64]), st.sampled_from([0, 35, 100]))
def test_a_family_differs_in_little(start, objects, pairs):
    family = [Scenes(range(4 * start, 4 * start + 4), objects, families=True, pairs=pairs)
              .drawn_labels(i) for i in range(4)]
    base, other, third, last = family
    assert not any(world.is_held_out(each) for each in family)
    assert base == Scenes(range(4 * start, 4 * start + 1), objects, pairs=pairs).drawn_labels(0)
    assert (other.place, other.time) == (third.place, third.time) == (base.place, base.time)
    if objects == 3:  # where all others may be held out
        return
    changed = [b not in base.objects for b in other.objects]
    assert len(other.objects) == len(base.objects) and sum(changed) == 1
    assert all(a == b for a, b, c in zip(base.objects, other.objects, changed, strict=True)
               if not c)
    assert third.objects == base.objects[::-1] if len(set(base.objects)) == 2 else (
        third.objects[0] == base.objects[0] != third.objects[1])
    assert len(last.objects) == 1 and last.objects[0] in base.objects
    if len(base.objects) == 2:
        assert (last.place, last.time) == (base.place, base.time)


@pytest.mark.parametrize("which", [1, 3])
def test_in_families_either_of_two_things_is_exchanged_or_missing(which):
    base = world.Labels(("cat", "dog"), "sea", "day")
    kept = [world.relative(np.random.default_rng(seed), base, which, 12).objects
            for seed in range(200)]
    assert 60 < sum("cat" in each for each in kept) < 140
    assert all(("cat" in each) != ("dog" in each) for each in kept)


def test_a_sprite_has_a_white_edge_and_is_else_as_it_was():
    ink = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    ink.paste((200, 10, 10, 255), (20, 10, 40, 30))
    wide = scenes.OUTLINE
    edged = scenes.outlined(ink)
    assert edged.size == (60 + 2 * wide, 40 + 2 * wide)
    pixels = np.asarray(edged)[wide:-wide, wide:-wide]
    assert (pixels[10:30, 20:40] == (200, 10, 10, 255)).all()
    assert (pixels[9, 25:35] == 255).all()  # white, opaque
    assert not pixels[0, 0, 3] and not pixels[-1, -1, 3]


@pytest.mark.parametrize("source, sentence", [
    ("scenes:", "is no number of scenes"), ("scenes:0", "'0' is no number"),
    ("scenes:-5", "'-5' is no number"), ("scenes:9,object=3", "'object=3' is none of"),
    ("scenes:9,objects=1", "objects from 2 to"), ("scenes:9,size=4", "size from 8"),
    ("scenes:9,objects=999", "objects from 2 to"), ("scenes:9,size=x", "'size=x' is none of"),
    ("scenes:9,first=2,families", "begin at a multiple of it, not at first=2"),
    ("scenes:9,pairs=101", "from 0 to 100"), ("scenes:9,pairs=-1", "'pairs=-1' is none of")])
def test_what_is_no_source_is_one_sentence(sprites, source, sentence):
    with pytest.raises(ValueError, match="scenes:.*" + sentence):
        open_images(source)


def test_a_missing_font_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPGEN_EMOJI_FONT", str(tmp_path / "no.ttf"))
    for need in (scenes.find_font, lambda: open_images("scenes:9")):
        with pytest.raises(ValueError, match="apt install fonts-noto-color-emoji"):
            need()


def test_inference_needs_no_font(tmp_path):
    code = "import clipgen.command, clipgen.pipeline"
    env = os.environ | {"CLIPGEN_EMOJI_FONT": str(tmp_path / "no.ttf")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)

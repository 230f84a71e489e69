"""The scenes: deterministic, varied, truthfully captioned, and a tenth of them held out."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import scenes
from tests.sprites import drawn_sprites

SPRITES = drawn_sprites()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**40), held_out=st.booleans())
def test_a_seed_is_a_scene(seed, held_out):
    scene = scenes.render(seed, 64, held_out, SPRITES)
    again = scenes.render(seed, 64, held_out, SPRITES)
    assert np.array_equal(np.asarray(scene.image), np.asarray(again.image))
    assert scene.captions == again.captions
    assert scene.image.size == (64, 64) and scene.image.mode == "RGB"
    assert ((scene.object, scene.place, scene.time) in scenes.HELD_OUT) == held_out


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**40), labels=st.sampled_from(scenes.COMBINATIONS))
def test_captions_say_what_the_scene_shows(seed, labels):
    name, place, time = labels
    text = scenes.write_caption(np.random.default_rng(seed), name, place, time)
    assert any(n in text for n in scenes.OBJECTS[name][1])
    assert any(p in text for p in scenes.PLACES[place])
    assert any(t in text for t in scenes.TIMES[time])
    assert text == " ".join(text.split()) and " ," not in text


def test_every_combination_can_be_drawn_and_seeds_differ():
    images = set()
    for i, labels in enumerate(scenes.COMBINATIONS):
        scene = scenes.render(i, 32, sprites=SPRITES, labels=labels)
        assert (scene.object, scene.place, scene.time) == labels
        images.add(scene.image.tobytes())
    assert len(images) == len(scenes.COMBINATIONS)
    same = [scenes.render(s, 32, sprites=SPRITES, labels=labels).image.tobytes() for s in (1, 2)]
    assert same[0] != same[1]


def test_a_tenth_is_held_out_and_nothing_is_wholly_unseen():
    assert len(scenes.HELD_OUT) == round(len(scenes.COMBINATIONS) / 10)
    seen = set(scenes.COMBINATIONS) - scenes.HELD_OUT
    for column, names in enumerate((scenes.OBJECTS, scenes.PLACES, scenes.TIMES)):
        assert {labels[column] for labels in seen} == set(names)
        assert all(sum(c[column] == n for c in seen) >= 9 for n in names)


def test_a_missing_font_is_one_sentence(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPGEN_EMOJI_FONT", str(tmp_path / "no.ttf"))
        with pytest.raises(FileNotFoundError, match="apt install fonts-noto-color-emoji"):
            scenes.find_font()


def test_inference_needs_no_font(tmp_path):
    code = "import clipgen, scripts.generate_images"
    env = os.environ | {"CLIPGEN_EMOJI_FONT": str(tmp_path / "no.ttf")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)

"""The stranger's sheet, and what a CLIP tells apart: keys, answers, counts."""

import base64
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.emoji import clip_scores, nats, scenes, stranger, suggested
from scripts.emoji.painter import STICKERS
from scripts.emoji.scenes import Scenes
from scripts.emoji.world import HELD_OUT, OBJECTS, Labels, draw_labels, write_caption
from tests.micro import micro_bundle
from tests.sprites import drawn_sprites

SPRITES = drawn_sprites()

THINGS = [["cat"], ["dog"], ["slice of pizza"], ["cat", "dog"]]


@given(st.integers(2, 120), st.integers(0, 1000))
def test_a_sheet_shows_things_where_training_did_not(objects, seed):
    labels = stranger.labels_of(objects, seed)
    assert len(labels) == stranger.COUNT
    assert {each.objects[0] for each in labels} <= set(list(OBJECTS)[:objects])
    assert labels == stranger.labels_of(objects, seed) != stranger.labels_of(objects, seed + 1)
    assert all((each.objects[0], each.place) in HELD_OUT for each in labels)


def test_what_no_other_picture_shows_says_nothing():
    """Any thing may be shown again or never; over many sheets each is as likely."""
    sheets = [Counter(each.objects[0] for each in stranger.labels_of(64, seed))
              for seed in range(40)]
    assert all(30 < len(counts) < 50 for counts in sheets)  # of 64; 40.6 on average
    total = sum(sheets, Counter())
    assert len(total) == 64 and 15 < min(total.values()) and max(total.values()) < 75


def test_any_name_of_a_thing_is_right_and_all_must_be_named_in_order():
    answers = stranger.read_answers("1 Kitten\n2. fox\n\n4: cat, puppy\n")
    assert stranger.score(THINGS, answers) == (
        2, [(2, "dog", "fox"), (3, "slice of pizza", "no answer")])
    answers = stranger.read_answers("3) pizza\n1 cat, dog\n4 dog, cat")
    assert stranger.score(THINGS, answers) == (
        1, [(1, "cat", "cat, dog"), (2, "dog", "no answer"), (4, "cat, dog", "dog, cat")])


@pytest.mark.parametrize("text, sentence", [
    ("cat", "'cat' is not a number and"), ("1", "'1' is not a number and"),
    ("1 cat\n1 dog", "number 1 is answered twice")])
def test_answers_that_cannot_be_read_are_one_sentence(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        stranger.read_answers(text)


def test_draw_then_score(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stranger, "COUNT", 3)
    monkeypatch.setattr(stranger, "CANDIDATES", 1)
    words = {write_caption(np.random.default_rng(i), Labels((name,), "sea", "day"))
             for i in range(300) for name in list(OBJECTS)[:3]}
    bundle = micro_bundle(tmp_path / "bundle", vocabulary=sorted(words | {"elephants in rain"}))
    assert stranger.things_of(stranger.ClipGen.load(bundle)) >= 3
    sheet = tmp_path / "sheet"
    stranger.main(["draw", str(sheet), "--weights", str(bundle), "--seed", "5"])
    key = json.loads(base64.b64decode((sheet / "key.txt").read_text()))
    assert (key["of"], key["seed"], len(key["things"])) == ("pictures", 5, 3)
    assert {name for each in key["things"] for name in each} <= set(
        (sheet / "things.txt").read_text().split("\n"))
    assert (sheet / "sheet.png").stat().st_size
    (sheet / "answers.txt").write_text(f"1 {key['things'][0][0]}\n2 nothing\n", "utf-8")
    assert stranger.main(["score", str(sheet)]) == {
        "of": "pictures", "seed": 5, "right": 1, "shown": 3}
    assert "was called no answer" in capsys.readouterr().err


def test_a_score_that_is_right_half_the_time_has_half_the_area():
    family = [Labels((name,), "sea", "day") for name in ("cat", "dog", "cat", "fox")]
    equal, best = torch.ones(4, 4), torch.eye(4)
    assert clip_scores.score_auc([equal], family) == 0.5
    assert clip_scores.score_auc([best], family) == 1
    assert clip_scores.score_auc([-best], family) == 0
    # The two that show the same are not compared: it is no matter which of them wins.
    best[0, 2] = best[2, 0] = 9
    assert clip_scores.score_auc([best], family) == 1


def test_a_caption_of_equal_labels_is_found_too():
    labels = [Labels((name,), "sea", "day") for name in ("cat", "dog", "cat")]
    swapped = torch.eye(3)[[2, 1, 0]]
    assert clip_scores.retrieval([swapped], labels) == 1
    assert clip_scores.retrieval([torch.eye(3)[[1, 0, 2]]], labels) == 1 / 3


def test_what_things_change_is_told_from_the_ground(monkeypatch):
    monkeypatch.setattr(scenes, "emoji_sprites", lambda edged=False: SPRITES)
    drawn = Scenes(range(6), 12, 64, pairs=50)
    pixels, changes = nats.with_masks(drawn)
    for i, (each, mask) in enumerate(zip(pixels, changes, strict=True)):
        assert (each.permute(1, 2, 0).numpy() == np.asarray(drawn.image(i))).all()
        assert 0.05 < mask.float().mean() < 0.8
        assert not mask[:8, :4].any() and mask[40:60, 8:56].float().mean() > 0.15


def test_nats_are_split_by_what_their_codes_show():
    changes = torch.zeros(1, 8, 8, dtype=torch.bool)
    changes[0, :4, :4], changes[0, 4, 4] = True, True  # a whole cell, and one pixel of another
    values = torch.tensor([[[6.0, 1.0], [2.0, 3.0]]])
    assert nats.split(values, changes) == pytest.approx({
        "all": 3, "thing": 6, "ground": 1.5, "edge": 3,
        "share_thing": 0.5, "share_ground": 0.25, "share_edge": 0.25})
    assert np.asarray(nats.heat_map(values))[::16, ::16].tolist() == [[255, 42], [85, 128]]


@given(st.integers(0, 10**6), st.booleans())
def test_a_caption_is_read_as_what_it_was_written_of(seed, unseen):
    rng = np.random.default_rng(seed)
    labels = draw_labels(rng, 64, 0.5)
    assert suggested.labels_of(write_caption(rng, labels, unseen=unseen)) == labels


def test_suggested_texts_name_a_thing_and_are_judged_by_all_that_they_name():
    readme = 'Try `"a cat on the moon"`, "no thing here", "cat" or ("two dogs at night").'
    assert suggested.suggested(readme)[:2] == ["a cat on the moon", "two dogs at night"]

    class Answers:
        def right(self, pixels, labels):
            return {"objects": [True, True, False, True], "place": [True, False, True, True],
                    "time": [True, True, True, None]}

        def sides_right(self, pixels, labels):
            return [None, None, None, False]

    pixels = torch.zeros(4, 3, 8, 8)
    for labels, expected in ((Labels(("cat",), "moon", None), [True, False, False, False]),
                             (Labels(("cat",), "", None), [True, True, False, False]),
                             (Labels(("cat",), "", "night"), [True, True, False, False])):
        assert suggested.right(Answers(), pixels, labels) == expected


def test_both_are_read_from_embeddings_that_say_them(monkeypatch):
    """A CLIP whose embeddings are sums of one direction a thing, and captions of noise."""
    directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    names = list(OBJECTS)[:6]

    def embedded(clip, images, size=64):
        labels = [images.drawn_labels(i) for i in range(len(images))]
        sums = torch.stack([sum(directions[names.index(name)] for name in each.objects)
                            for each in labels])
        return torch.nn.functional.normalize(sums, dim=1), labels

    class Deaf:
        def embed_texts(self, texts):
            return torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(clip_scores, "embedded", embedded)
    for noise, least in ((0, 0.99), (0.4, 0.9)):
        read = clip_scores.both_read(Deaf(), 6, 40, STICKERS, steps=300, noise=noise)
        assert read["both_read"] >= least and read["both_read_text"] < 0.5
    blurred = clip_scores.both_read(Deaf(), 6, 40, STICKERS, steps=300, noise=100)
    assert blurred["both_read"] < 0.9


def test_a_thing_that_an_embedding_leaves_out_is_told_by_its_side(monkeypatch):
    directions, names = torch.eye(6), list(OBJECTS)[:6]

    def embedded(clip, images, size=64):
        labels = [images.drawn_labels(i) for i in range(len(images))]
        return torch.stack([directions[names.index(each.objects[1])] for each in labels]), labels

    class Same:
        def embed_texts(self, texts):
            return torch.ones(len(texts), 6)

    monkeypatch.setattr(clip_scores, "embedded", embedded)
    read = clip_scores.both_read(Same(), 6, 40, STICKERS, steps=300)
    assert read["right_read"] == 1 and read["left_read"] < 0.7
    assert read["both_read"] == read["left_read"]

"""What emoji.evaluate says of a bundle of its world, by a judge that is easy to read."""

import pytest
import torch

from scripts.emoji import scores as world_scores
from scripts.emoji import world
from scripts.emoji.prompts import held_out_labels, with_seen_places
from scripts.emoji.scores import Prompts, paired_scores, text_scores
from scripts.emoji.world import Labels

OBJECTS = 12


class Reader:
    """Says yes of an image's red, green and blue for object, place and time."""

    look = None

    def right(self, pixels, labels):
        red, green, blue = (pixels[:, k].mean((1, 2)) > 0.5 for k in range(3))
        return {"objects": red.tolist(), "place": green.tolist(),
                "time": [yes if each.time else None
                         for yes, each in zip(blue.tolist(), labels, strict=True)]}

    def sides_right(self, pixels, labels):
        return (pixels[:, 1].mean((1, 2)) > 0.5).tolist()


def images(answers):
    """uint8 images of which Reader says these (object, place, time)."""
    return 255 * torch.tensor(answers, dtype=torch.uint8)[..., None, None].expand(-1, 3, 4, 4)


def test_a_fifth_as_many_texts_of_two_objects():
    prompts = Prompts.draw(50, OBJECTS, seed=0)
    assert (len(prompts.ones), len(prompts.twos), len(prompts.texts)) == (50, 10, 60)
    assert prompts == Prompts.draw(50, OBJECTS, seed=0) != Prompts.draw(50, OBJECTS, seed=1)
    assert Prompts.draw(4, OBJECTS, seed=0).twos == []


def test_texts_of_one_and_of_two_objects_are_counted_apart(capsys):
    ones = [Labels(("cat",), "sea", "day"), Labels(("dog",), "moon", None),
            Labels(("car",), "snow", "rain"), Labels(("bus",), "farm", "night")]
    twos = [Labels(("cat", "dog"), "sea", "day"), Labels(("dog", "car"), "moon", None)]
    prompts = Prompts(ones, twos, [f"text {i}" for i in range(6)])
    best = images([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    first = images([[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert text_scores(Reader(), prompts, best, first) == {
        "object_right": 0.75, "object_right_one_candidate": 0.25, "place_right": 4 / 6,
        "time_right": 0.75, "both_objects_right": 0.5, "both_objects_right_one_candidate": 0,
        "sides_right": 1}
    wrong = capsys.readouterr().err.splitlines()
    assert wrong == ["wrong place, time: text 2", "wrong objects: text 3",
                     "wrong objects, place: text 5"]


def test_pairs_and_conditions_are_compared_with_one_candidate_each(monkeypatch):
    monkeypatch.setattr(world_scores, "draw_labelled", lambda labels, size, seed, look: torch.full(
        (len(labels), 3, size, size), 9, dtype=torch.uint8))
    ones, asked = held_out_labels(8, OBJECTS, 0), []
    twos = [Labels(("cat", "dog"), "sea", "day"), Labels(("dog", "car"), "moon", None)]
    prompts = Prompts(ones, twos, [""] * 10)

    def sample(conditions, candidates):
        asked.append(conditions)
        n = len(conditions)
        n_right = 1 if n == 2 else 6 if isinstance(conditions, torch.Tensor) else 7
        assert candidates == 1 and n in (2, 8)
        return None, images([[1, 0, 0]] * n_right + [[0, 0, 0]] * (n - n_right))

    first = images([[1, 0, 0]] * 3 + [[0, 0, 0]] * 5 + [[1, 0, 0]] * 2)
    scores = paired_scores(Reader(), prompts, first, sample, 16, seed=0)
    assert scores == {"object_right_unseen_pairs": 3 / 8, "object_right_seen_pairs": 7 / 8,
                      "object_right_of_images": 6 / 8, "both_objects_right_of_images": 1 / 2,
                      "text_over_image": pytest.approx(0.5)}
    texts, pictures, of_two = asked
    assert len(of_two) == 2 and isinstance(of_two, torch.Tensor)
    assert pictures.shape == (8, 3, 16, 16)
    for text, moved in zip(texts, with_seen_places(ones, 0), strict=True):
        assert any(name in text for name in world.OBJECTS[moved.objects[0]][1])

"""The judge: small, sure of what it answers for, and marking each question."""

import pytest
import torch

from scripts.emoji import judge as judging
from scripts.emoji.judge import ALL_PLACES, ALL_TIMES, WEIGHTS, Judge, load_judge, share_right
from scripts.emoji.world import Labels


@pytest.fixture(scope="module")
def answered():
    """The committed judge's answers on noise: pixels, and labels that agree with them."""
    judge, pixels = load_judge(), torch.rand(6, 3, 64, 64)
    with torch.no_grad():
        logits = judge(pixels)
    places, times = logits["place"].argmax(1).tolist(), logits["time"].argmax(1).tolist()
    objects = [[judge.objects[i] for i in row] for row in logits["objects"].topk(3, 1)[1].tolist()]
    return judge, pixels, objects, [ALL_PLACES[i] for i in places], [ALL_TIMES[i] for i in times]


def test_the_judge_is_small():
    assert WEIGHTS.stat().st_size <= 4 * 2**20


def test_every_question_is_marked_by_itself(answered):
    judge, pixels, objects, places, times = answered
    def right(objects, places, times):
        return judge.right(pixels, [Labels(tuple(o), p, t) for o, p, t in
                                    zip(objects, places, times, strict=True)])

    ones, wrong = [o[:1] for o in objects], [o[1:2] for o in objects]
    yes, no = [True] * 6, [False] * 6
    assert right(ones, places, times) == {"objects": yes, "place": yes, "time": yes}
    assert right(wrong, places, times)["objects"] == no
    assert right([o[:2] for o in objects], places, times)["objects"] == yes
    assert right([o[1::-1] for o in objects], places, times)["objects"] == yes
    assert right([[o[0], o[2]] for o in objects], places, times)["objects"] == no
    assert right([[o[0], o[0]] for o in objects], places, times)["objects"] == yes
    assert right([[o[1], o[1]] for o in objects], places, times)["objects"] == no
    others = [next(p for p in ALL_PLACES if p != place) for place in places]
    assert right(ones, others, times) == {"objects": yes, "place": no, "time": yes}
    others = [next(t for t in ALL_TIMES if t != time) for time in times]
    assert right(ones, places, others) == {"objects": yes, "place": yes, "time": no}
    assert right(ones, places, [None] * 6)["time"] == [None] * 6


def test_sides_are_told_by_the_halves_of_a_picture():
    judge = Judge(3).eval()  # of a cat, which is red, a dog, green, and an apple, blue
    judge.features, head = torch.nn.Identity(), torch.nn.Linear(3, 3, bias=False)
    judge.heads["objects"] = head
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    pixels = torch.zeros(1, 3, 128, 128)
    pixels[0, 0, 40:80, 10:50], pixels[0, 1, 20:90, 80:120] = 1, 1
    cat_dog, dog_cat = Labels(("cat", "dog"), "sea", "day"), Labels(("dog", "cat"), "sea", "day")
    alike, missing = Labels(("cat", "cat"), "sea", "day"), Labels(("cat", "apple"), "sea", "day")
    assert judge.sides_right(pixels.expand(4, -1, -1, -1), [cat_dog, dog_cat, alike, missing]) == [
        True, False, None, False]
    assert judge.sides_right(pixels.flip(3), [dog_cat]) == [True]


def test_what_was_not_asked_does_not_count():
    assert share_right([True, None, False, None, True, True]) == 0.75


def test_targets_hold_all_objects_and_no_time_where_there_is_none():
    judge = Judge(4)
    targets = judge.targets([Labels(("dog",), "red", None), Labels(("cat", "car"), "sea", "rain"),
                             Labels(("apple", "apple"), "moon", None)])
    assert targets["objects"].tolist() == [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]]
    assert [ALL_PLACES[i] for i in targets["place"]] == ["red", "sea", "moon"]
    assert targets["time"].tolist() == [-1, ALL_TIMES.index("rain"), -1]


def test_augmentation_keeps_pixels_in_range_and_repeats():
    pixels = torch.rand(3, 3, 64, 64)
    for seed in range(20):
        made = [judging.augment(pixels, torch.Generator().manual_seed(seed)) for _ in range(2)]
        assert torch.equal(*made) and made[0].shape == pixels.shape
        assert 0 <= made[0].min() and made[0].max() <= 1 and not torch.equal(made[0], pixels)

"""Pictures as prompts, judged: what is asked of the model, and what counts as right."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from scripts.emoji import edits
from scripts.emoji.prompts import held_out_labels
from scripts.emoji.world import TIMELESS

OBJECTS, COUNT = 12, 20
# What an image of each kind of request shows, by its colours: the thing, the place, the time.
SHOWN = {"variation": (1, 0, 0), "blend": (1, 1, 0), "completion": (1, 0, 1), "text": (0, 0, 1),
         "negative": (0, 0, 0)}


class Model:
    """Draws one colour for each kind of request, and keeps what it was asked."""

    vqgan = SimpleNamespace(config=SimpleNamespace(image_size=16))

    def __init__(self):
        self.asked = []

    def generate(self, num_images, candidates, seed, **request):
        kind = ("completion" if "init_image" in request else "negative" if "negative_text" in
                request else "text" if "image" not in request else
                "blend" if "text" in request else "variation")
        assert num_images == 1 and candidates == 3
        self.asked.append((kind, seed, request))
        colour = tuple(255 * yes for yes in SHOWN[kind])
        return [SimpleNamespace(image=Image.new("RGB", (16, 16), colour))]


class Reader:
    look = None

    def right(self, pixels, labels):
        thing, place, time = ((pixels[:, k].mean((1, 2)) > 0.5).tolist() for k in range(3))
        self.wanted = labels
        return {"objects": thing, "place": place, "time": time}


def test_each_request_is_judged_by_what_it_asks_for(monkeypatch):
    monkeypatch.setattr(edits, "draw_labelled", lambda labels, size, seed, look: torch.zeros(
        len(labels), 3, size, size, dtype=torch.uint8))
    model, labels = Model(), held_out_labels(COUNT, OBJECTS, 7)
    assert edits.scores(model, Reader(), OBJECTS, COUNT, 3, 7) == {
        "variation_thing": 1, "variation_place": 0, "blend": 1, "completion": 1, "named": 1,
        "named_negative": 0}
    kinds = [kind for kind, _, _ in model.asked]
    elsewhere = sum(each.place != "moon" for each in labels)
    timed = sum(each.place not in TIMELESS for each in labels)
    assert [kinds.count(kind) for kind in SHOWN] == [COUNT, elsewhere, COUNT, timed, timed]
    requests = {kind: request for kind, _, request in model.asked}
    assert requests["blend"]["text"] == "on the moon"
    assert requests["completion"]["keep"] == 0.4
    assert requests["negative"] == requests["text"] | {"negative_text": "at night"}
    assert "night" not in requests["text"]["text"]
    seeds = [seed for kind, seed, _ in model.asked if kind == "variation"]
    assert len(set(seeds)) == COUNT


@pytest.mark.parametrize("shown", [(1, 0, 0), (0, 1, 0)])
def test_a_blend_must_show_both(shown, monkeypatch):
    monkeypatch.setitem(SHOWN, "blend", shown)
    monkeypatch.setattr(edits, "draw_labelled", lambda labels, size, seed, look: torch.zeros(
        len(labels), 3, size, size, dtype=torch.uint8))
    assert edits.scores(Model(), Reader(), OBJECTS, COUNT, 3, 7)["blend"] == 0

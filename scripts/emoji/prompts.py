"""The texts that the default bundle is scored on: of its world, about pairs never shown."""

from __future__ import annotations

import numpy as np

from scripts.emoji.world import (
    HELD_OUT,
    OBJECTS,
    PLACES,
    TIMELESS,
    TIMES,
    Labels,
    write_caption,
)


def held_out_labels(count: int, objects: int, seed: int) -> list[Labels]:
    """Of one object in a place where no training showed it; each pair once before any again.

    Of a world with the first `objects` objects.
    """
    names = list(OBJECTS)[:objects]
    pairs = sorted(pair for pair in HELD_OUT if pair[0] in names)
    rng, labels = np.random.default_rng([seed, 1]), []
    while len(labels) < count:
        labels += [Labels((name,), place, draw_time(rng, place))
                   for name, place in (pairs[i] for i in rng.permutation(len(pairs)))]
    return labels[:count]


def with_seen_places(labels: list[Labels], seed: int) -> list[Labels]:
    """The same objects, each in a place where training may have shown it."""
    rng = np.random.default_rng([seed, 2])
    moved = []
    for each in labels:
        places = [place for place in PLACES if (each.objects[0], place) not in HELD_OUT]
        place = places[rng.integers(len(places))]
        time = each.time if each.time and place not in TIMELESS else draw_time(rng, place)
        moved.append(Labels(each.objects, place, time))
    return moved


def with_second_object(labels: list[Labels], objects: int, seed: int) -> list[Labels]:
    """The same with an object of another kind at one side."""
    rng, names = np.random.default_rng([seed, 3]), list(OBJECTS)[:objects]
    both = []
    for each in labels:
        others = [name for name in names if name not in each.objects]
        pair = [*each.objects, others[rng.integers(len(others))]]
        both.append(Labels(tuple(pair[i] for i in rng.permutation(2)), each.place, each.time))
    return both


def draw_time(rng: np.random.Generator, place: str) -> str | None:
    return None if place in TIMELESS else list(TIMES)[rng.integers(len(TIMES))]


def texts_of(labels: list[Labels], seed: int) -> list[str]:
    """A text for each, in a wording that no training caption has."""
    rng = np.random.default_rng([seed, 4])
    return [write_caption(rng, each, unseen=True) for each in labels]

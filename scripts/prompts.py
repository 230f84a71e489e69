"""The texts that a bundle is scored on: of the scenes' world, of a file or of COCO."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from scripts.images import read_captions
from scripts.world import HELD_OUT, OBJECTS, PLACES, TIMELESS, TIMES, Labels, write_caption

COCO_TEXTS = 30_000  # of the papers (DALL-E, CogView, CLIP-GEN)


def read_prompts(source: str, count: int | None, seed: int) -> list[str]:
    """At most `count` texts of `source`: the path of a file, or coco:PATH.

    ValueError, one sentence: it is neither or holds no text.
    """
    if source.startswith("coco:"):
        return coco_prompts(Path(source.removeprefix("coco:")), count or COCO_TEXTS, seed)
    return file_prompts(Path(source))[:count]


def world_size(source: str) -> int | None:
    """The number of texts about the default bundle's world that `source` asks for, if it does."""
    if not re.fullmatch(r"[-+]?[0-9]+", source):
        return None
    if int(source) < 2:
        raise ValueError(f"--prompts {source}: the number of texts starts at 2")
    return int(source)


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


def coco_prompts(path: Path, count: int, seed: int) -> list[str]:
    """Captions of COCO in an order drawn by seed, one of an image, which is drawn too."""
    table = read_captions(path / "annotations/captions_val2017.json" if path.is_dir() else path)
    if len(table) < count:
        print(f"coco:{path} has captions of {len(table)} images: one of each", file=sys.stderr)
    rng, names = np.random.default_rng(seed), sorted(table)
    chosen = [table[names[i]] for i in rng.permutation(len(names))[:count]]
    return [" ".join(captions[rng.integers(len(captions))].split()) for captions in chosen]


def file_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"--prompts {path} cannot be read ({reason}): give a whole number, a file "
                         "of texts, one a line, or coco:PATH") from None
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"--prompts {path} has no text in it: write one a line")
    return texts

"""Do the texts that the documents suggest come out right?  The judge looks at 16 images of each.

    python -m scripts.emoji.suggested weights/emoji [--seeds 16] [--candidates 16]

Texts are those of the README that stand in quotes and name a thing of the world, and those of its
pictures.  An image is right if the judge sees each thing, on its side, and the place and time that
its text names; it is the best of the candidates.  Exits with 1 where a text is right in fewer than
14 of 16.  The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from clipgen import ClipGen
from scripts.emoji.judge import Judge, load_judge
from scripts.emoji.pictures import TEXTS
from scripts.emoji.world import COLOURS, OBJECTS, PLACES, TIMES, Labels, plural
from scripts.training.cli import one_sentence, positive

README = Path("README.md")
ENOUGH = 14 / 16


def labels_of(text: str) -> Labels | None:
    """What a text asks for: its things from left to right, its place and time ("" and None where it
    says none); None if it names no thing."""
    rest = f" {re.sub('[^a-z ]', ' ', text.lower())} "

    def taken(phrase: str) -> int:
        """Where the phrase stands, which is blanked out; -1 if nowhere."""
        nonlocal rest
        at = rest.find(f" {phrase} ")
        if at >= 0:
            rest = rest[:at + 1] + "_" * len(phrase) + rest[at + 1 + len(phrase):]
        return at

    def said(options: dict[str, tuple[str, ...]]) -> str | None:
        phrases = [(phrase, name) for name, phrases in options.items() for phrase in phrases]
        longest = sorted(phrases, key=lambda pair: -len(pair[0]))
        return next((name for phrase, name in longest if taken(phrase) >= 0), None)

    # These first, as some hold names of things: "under the stars", "on an orange background".
    colours = {c: (f"{c} background", f"{c} wall", f"plain {c}") for c in COLOURS}
    place, time = said(PLACES) or said(colours) or "", said(TIMES)
    named = [(name, thing, times) for thing, (_, names) in OBJECTS.items() for one in names
             for name, times in ((one, 1), (plural(one), 2))]
    found: list[tuple[int, str]] = []
    for name, thing, times in sorted(named, key=lambda each: -len(each[0])):
        while (at := taken(name)) >= 0:
            found += times * [(at, thing)]
    things = [thing for _, thing in sorted(found)]
    if " to the right of " in rest:
        things.reverse()
    return Labels(tuple(things), place, time) if things else None


def suggested(readme: str) -> list[str]:
    """The texts in quotes that name a thing of the world, each once, then those of the pictures."""
    quoted = re.findall(r'"([A-Za-z][A-Za-z ,\'-]+)"', readme)
    return list(dict.fromkeys(t for t in [*quoted, *TEXTS] if " " in t and labels_of(t)))


def right(judge: Judge, pixels: torch.Tensor, labels: Labels) -> list[bool]:
    """Of images in [0, 1] (N, 3, S, S) of one text, those that show all that it names."""
    known = Labels(labels.objects, labels.place or "sea", labels.time)
    answers = judge.right(pixels, [known] * len(pixels))
    asked = ["objects", *(["place"] if labels.place else []), *(["time"] if labels.time else [])]
    sides = [side is not False for side in judge.sides_right(pixels, [known] * len(pixels))]
    return [all(each) for each in zip(sides, *(answers[name] for name in asked), strict=True)]


def main(arguments: list[str] | None = None) -> dict[str, int]:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.suggested", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path)
    p.add_argument("--seeds", type=positive, default=16)
    p.add_argument("--candidates", type=positive, default=16)
    a = p.parse_args(arguments)
    counts = {}
    with one_sentence():
        model, judge = ClipGen.load(a.weights, device="cpu"), load_judge()
        for text in suggested(README.read_text(encoding="utf-8")):
            images = [model.generate(text, 1, a.candidates, seed=1000 * (1 + i))[0].image
                      for i in range(a.seeds)]
            pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
            pixels = pixels.permute(0, 3, 1, 2).float() / 255
            counts[text] = sum(right(judge, pixels, labels_of(text)))
            print(f"{counts[text]:3d} of {a.seeds}: {text}", file=sys.stderr, flush=True)
    print(json.dumps(counts))
    if weak := [text for text, count in counts.items() if count < ENOUGH * a.seeds]:
        raise SystemExit(f"too seldom right, so not to be suggested: {'; '.join(weak)}")
    return counts


if __name__ == "__main__":
    main()

"""What a stranger can name in pictures that are shown without their texts.

    python -m scripts.emoji.stranger draw DIR [--weights weights/emoji] [--of pictures] [--seed 0]
    python -m scripts.emoji.stranger score DIR

draw   writes DIR/sheet.png, 64 numbered pictures, DIR/things.txt, what they may show, and the key.
       --of pictures: things drawn with repeats, in places where no training showed them, from
       unseen texts, best of 16 candidates; copies: the VQGAN's of renders of the same;
       renders: those themselves, which is the most that any model can reach; pairs: pictures of two
       things.  Whoever reads the sheet writes DIR/answers.txt: a line for each number, as in
       "12 cat", or "12 cat, dog" for two from left to right.
score  compares the answers with the key and names what was mistaken for what.  The last line is
       JSON.  Nobody who has seen the key, the texts or another sheet is a stranger.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipgen import ClipGen
from clipgen.sheet import sheet
from scripts.data.files import write_text
from scripts.emoji.judge import draw_labelled, load_judge
from scripts.emoji.prompts import held_out_labels, texts_of, with_second_object
from scripts.emoji.world import OBJECTS, Labels
from scripts.training.cli import number, one_sentence

COUNT, CANDIDATES = 64, 16
KINDS = ("pictures", "copies", "renders", "pairs")
NAMES = {name: thing for thing, (_, names) in OBJECTS.items() for name in names}


def things_of(model: ClipGen) -> int:
    """How many of the world's objects, in their order, the bundle's CLIP has words for."""
    for i, name in enumerate(OBJECTS):
        if model.clip.unknown_words(name):
            return i
    return len(OBJECTS)


def labels_of(objects: int, seed: int) -> list[Labels]:
    """64 scenes of one object each in unseen places.

    Objects are drawn with repeats: nobody can name a picture by what no other one shows.
    """
    found: dict[str, list[Labels]] = {}
    for labels in held_out_labels(8 * max(objects, COUNT), objects, seed):
        found.setdefault(labels.objects[0], []).append(labels)
    rng, scenes = np.random.default_rng([seed, 9]), list(found.values())
    return [own[rng.integers(len(own))]
            for own in (scenes[i] for i in rng.integers(len(scenes), size=COUNT))]


def pictures_of(model: ClipGen, kind: str, labels: Sequence[Labels],
                seed: int) -> list[Image.Image]:
    size = model.vqgan.config.image_size
    if kind in ("pictures", "pairs"):
        texts = texts_of(list(labels), seed)
        return [model.generate(text, num_images=1, candidates=CANDIDATES, seed=seed)[0].image
                for text in texts]
    pixels = draw_labelled(labels, size, [seed, 8], load_judge().look)
    if kind == "copies":
        pixels = torch.cat([copied(model, part) for part in pixels.split(16)])
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


@torch.no_grad()
def copied(model: ClipGen, pixels: Tensor) -> Tensor:
    """The VQGAN's copies of pixels uint8 (N, 3, S, S), as such."""
    codes = model.vqgan.encode(pixels.to(model.clip.device).float() / 255)
    return (model.decode(codes) * 255).round().to("cpu", torch.uint8)


def draw(directory: Path, model: ClipGen, kind: str, seed: int) -> None:
    """Write the sheet, what it may show and the key."""
    objects = things_of(model)
    if objects < 2:
        raise ValueError("this bundle's CLIP has no words for the default world's things: the "
                         "stranger's sheet is for weights/emoji and others of that world")
    labels = labels_of(objects, seed)
    if kind == "pairs":
        labels = with_second_object(labels, objects, seed)
    directory.mkdir(parents=True, exist_ok=True)
    pictures = pictures_of(model, kind, labels, seed)
    numbered = [(str(i + 1), image.resize((192, 192), Image.Resampling.BICUBIC))
                for i, image in enumerate(pictures)]
    sheet(numbered).save(directory / "sheet.png")
    write_text(directory / "things.txt", "\n".join(sorted(list(OBJECTS)[:objects])) + "\n")
    key = json.dumps({"of": kind, "seed": seed, "things": [each.objects for each in labels]})
    # Encoded, so that nobody reads it by chance.
    write_text(directory / "key.txt", base64.b64encode(key.encode()).decode() + "\n")


def read_answers(text: str) -> dict[int, list[str]]:
    """Things by number.  ValueError: a line that is not as in "12 cat", or a number twice."""
    answers: dict[int, list[str]] = {}
    for line in filter(str.strip, text.splitlines()):
        match = re.fullmatch(r"\s*(\d{1,3})[.:)]?\s+(.+?)\s*", line)
        if not match:
            raise ValueError(f"answer {line[:60]!r} is not a number and what the picture shows, as "
                             "in '12 cat' or '12 cat, dog'")
        which = int(match[1])
        if which in answers:
            raise ValueError(f"number {which} is answered twice: leave one of the lines out")
        answers[which] = [part.strip().lower() for part in match[2].split(",")]
    return answers


def score(things: Sequence[Sequence[str]],
          answers: dict[int, list[str]]) -> tuple[int, list[tuple[int, str, str]]]:
    """How many pictures were named right, all that they show and in that order; and the others:
    number, what it shows, the answer.  Any name of a thing counts."""
    right, wrong = 0, []
    for i, shown in enumerate(things, 1):
        given = answers.get(i, [])
        if [NAMES.get(name, name) for name in given] == list(shown):
            right += 1
        else:
            wrong.append((i, ", ".join(shown), ", ".join(given) or "no answer"))
    return right, wrong


def read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {remedy}") from None


def main(arguments: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.stranger", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("draw", "score"))
    p.add_argument("directory", type=Path)
    p.add_argument("--weights", type=Path, default=Path("weights/emoji"), help="(weights/emoji)")
    p.add_argument("--of", choices=KINDS, default="pictures", help="(pictures)")
    p.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0)
    a = p.parse_args(arguments)
    with one_sentence():
        if a.what == "draw":
            draw(a.directory, ClipGen.load(a.weights, device="cpu"), a.of, a.seed)
            return {"sheet": str(a.directory / "sheet.png")}
        key = json.loads(base64.b64decode(read(a.directory / "key.txt", "draw a sheet first")))
        answers = read_answers(read(a.directory / "answers.txt", "write a line a picture there"))
        right, wrong = score(key["things"], answers)
        for i, shown, given in wrong:
            print(f"{i}: {shown} was called {given}", file=sys.stderr)
        return {"of": key["of"], "seed": key["seed"], "right": right, "shown": len(key["things"])}


if __name__ == "__main__":
    print(json.dumps(main()))

"""The texts that a bundle is scored on: of the scenes' world, of a file or of COCO."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from scripts import scenes
from scripts.images import read_captions

COCO_TEXTS = 30_000  # of the papers (DALL-E, CogView, CLIP-GEN)


def read_prompts(source: str, count: int | None,
                 seed: int) -> tuple[list[str], list[tuple[str, str, str]]]:
    """At most `count` texts and, of the scenes' world, the (object, place, time) of each.

    `source`: a whole number, the path of a file, or coco:PATH.  ValueError, one sentence: it is
    none of these or holds no text.
    """
    if re.fullmatch(r"[-+]?[0-9]+", source):
        if int(source) < 1:
            raise ValueError(f"--prompts {source}: the number of texts starts at 1")
        prompts = held_out_prompts(min(int(source), count or int(source)), seed)
        return [text for text, _ in prompts], [combination for _, combination in prompts]
    if source.startswith("coco:"):
        return coco_prompts(Path(source.removeprefix("coco:")), count or COCO_TEXTS, seed), []
    return file_prompts(Path(source))[:count], []


def held_out_prompts(count: int, seed: int) -> list[tuple[str, tuple[str, str, str]]]:
    """(text, (object, place, time)) of held-out combinations, each once before any comes again."""
    combinations = sorted(scenes.HELD_OUT)
    rng = np.random.default_rng(seed)
    prompts = []
    while len(prompts) < count:
        for i in rng.permutation(len(combinations)):
            labels = combinations[i]
            prompts.append((scenes.write_caption(rng, *labels), labels))
    return prompts[:count]


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

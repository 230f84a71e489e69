"""The texts that a bundle is scored on: of the scenes' world, of a file or of COCO."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from scripts.data.captions import read_captions

COCO_TEXTS = 30_000  # of the papers (DALL-E, CogView, CLIP-GEN)


def read_prompts(source: str, count: int | None, seed: int) -> list[str]:
    """At most `count` texts of `source`: the path of a file, or coco:PATH.

    ValueError, one sentence: it is neither or holds no text.
    """
    if source.startswith("coco:"):
        return coco_prompts(Path(source.removeprefix("coco:")), count or COCO_TEXTS, seed)
    return file_prompts(Path(source))[:count]


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
        raise ValueError(f"--prompts {path} cannot be read ({reason}): give a file of texts, "
                         "one a line, or coco:PATH") from None
    if not (texts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"--prompts {path} has no text in it: write one a line")
    return texts

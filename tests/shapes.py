"""Plain images for training tests: flat colours, stripes and dots.

    python -m tests.shapes DIR [COUNT] [SIZE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 170, 50), "blue": (40, 60, 220),
           "yellow": (240, 210, 40), "white": (245, 245, 245), "black": (20, 20, 20),
           "orange": (240, 130, 30), "purple": (140, 50, 170)}


def draw(index: int, size: int) -> tuple[str, Image.Image]:
    """(kind and colours, image): flat, stripes or dots in turn."""
    rng = np.random.default_rng(index)
    kind = ("flat", "stripes", "dots")[index % 3]
    names = rng.choice(list(COLOURS), 2, replace=False)
    if index % 9 == 0:
        names[0] = ("red", "green", "blue")[index // 9 % 3]
    below, above = (np.array(COLOURS[n]) for n in names)
    y, x = np.mgrid[:size, :size]
    period = size / rng.integers(2, 5)
    if kind == "flat":
        return f"flat-{names[0]}", Image.new("RGB", (size, size), COLOURS[names[0]])
    if kind == "stripes":
        mask = ((x if rng.random() < 0.5 else y) // (period / 2) % 2).astype(bool)
    else:
        mask = np.hypot(x % period - period / 2, y % period - period / 2) < period / 3.5
    pixels = np.where(mask[..., None], above, below).astype(np.uint8)
    return f"{kind}-{names[0]}-{names[1]}", Image.fromarray(pixels)


def write(directory: Path, count: int = 400, size: int = 64) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        name, image = draw(index, size)
        image.save(directory / f"{index:04d}-{name}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))

"""Sizes of models and batches that suit the images and the machine."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data.images import Images, UnreadableImage
from scripts.training.loading import load_vqgan

SHORT = 1200  # seconds on a CPU too few for a GAN to help
LOOKED_AT = 33  # images whose size and brightness are looked at
DARK = 64  # of 255: a quarter of the range, which 14 bits in 16 reach
BRIGHT, MOST = 0.99, 0.9  # shares of an image's values, and of the images, that lie below
# On a CPU.  Small batches at a high rate learn more in short runs (docs/speed.md, notes on
# learning); what they are worth in long ones was not measured.
CPU_GPT = {"layers": 6, "width": 192, "heads": 6, "batch": 8, "lr": 6e-3}
LONG = 7200  # seconds from which they are not taken
LARGE_BATCH = {"batch": 32, "lr": 2e-3}

# Pixels a side, settings of the VQGAN's training, settings of the GPT's.
Sizes = tuple[int, dict[str, Any], dict[str, Any]]


def sizes_of(bundle: Path, size: int | None, cuda: bool) -> Sizes:
    """To go on with a bundle: smaller steps, batches by machine.  ValueError: another size."""
    own = load_vqgan(bundle).config.image_size
    if size not in (None, own):
        raise ValueError(f"--size {size} is not that of {bundle}, {own}: leave --size out")
    vqgan = {"batch": 16 if cuda else 8, "lr": 3e-4 if own <= 64 else 1e-4,
             "optimizer": "adamw"}
    return own, vqgan, {"batch": 32, "lr": 3e-4}


def new_sizes(images: Images, size: int | None, cuda: bool, seconds: float) -> Sizes:
    """For new models.  Codes a side: 8 for small images, else 16.  ValueError: no such size, or
    no image can be read.  Warns on stderr of images that are nearly black."""
    side, brightest = look_at(images)
    if brightest <= DARK:
        print(f"{MOST:.0%} of the images looked at have hardly a value above {brightest} of 255; "
              "16-bit images that use fewer bits must be scaled to the full range first",
              file=sys.stderr)
    size = size or max(32, min(256 if cuda else 64, 2 ** (side.bit_length() - 1)))
    grid = 16 if size > 128 or cuda and size > 64 else 8
    halvings = max(1, round(math.log2(size / grid)))
    if size < 16 or size % 2**halvings:
        fitting = max(16, size - size % 2**halvings)
        raise ValueError(f"--size {size} is no multiple of {2**halvings}, at least 16: give "
                         f"{fitting}")
    vqgan: dict[str, Any] = {"size": size}
    if cuda:
        widths, codebook = (64, 128, 128, 256, 256), 4096 if len(images) < 100_000 else 16384
        layers, width = ((8, 512) if len(images) < 20_000 else
                         (12, 768) if len(images) < 200_000 else (24, 1024))
        gpt = {"layers": layers, "width": width, "heads": width // 64, "batch": 64,
               "lr": 5e-4}
        # Patches, Muon and a middle without attention are measured on a CPU alone.
        vqgan |= {"batch": 16, "lr": 5e-4, "optimizer": "adamw", "middle_attention": True}
    else:
        vqgan |= {"batch": 4, "lr": 2e-3, "patch": 2 ** min(2, halvings)}
        halvings -= min(2, halvings)  # what is left to the levels
        widths, codebook = (64, 128) if halvings else (128,), 1024
        gpt = CPU_GPT | ({} if seconds < LONG else LARGE_BATCH)
        if seconds < SHORT:
            vqgan["gan"] = 0
    widths = (widths + widths[-1:] * halvings)[:halvings + 1]
    vqgan |= {"channels": ",".join(map(str, widths)), "codebook_size": codebook}
    return size, vqgan, gpt


def look_at(images: Images) -> tuple[int, int]:
    """Of some images: the shorter side that half of them reach, and how bright they are.

    The latter is a high percentile over images of a high percentile of an image's values: a few
    stray bright pixels or images say nothing of the others.
    """
    sides, bright, reason = [], [], ""
    for i in range(0, len(images), max(1, len(images) // LOOKED_AT)):
        try:
            image = images.image(i)
        except UnreadableImage as error:
            reason = str(error)
            continue
        sides.append(min(image.size))
        values = np.array(image.histogram()).reshape(-1, 256).cumsum(1)  # a row a channel
        bright.append(int((values < BRIGHT * values[:, -1:]).sum(1).max()))
    if not sides:
        raise ValueError(f"none of the images looked at can be read: {reason}")
    return sorted(sides)[len(sides) // 2], sorted(bright)[round(MOST * (len(bright) - 1))]

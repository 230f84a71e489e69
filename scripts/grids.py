"""Grids of images with a label beside each row."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def grid(pixels: Tensor, columns: int, labels: list[str]) -> Image.Image:
    """Pixels (N, 3, S, S) in [0, 1] in rows of `columns`, label i above row i; small ones twice
    or more as large."""
    size = pixels.shape[-1]
    scale = max(1, round(128 / size))
    cell, strip, font = scale * size, 16, ImageFont.load_default(11)
    page = Image.new("RGB", (columns * cell, len(labels) * (cell + strip)), "white")
    draw = ImageDraw.Draw(page)
    for row, label in enumerate(labels):
        draw.text((2, row * (cell + strip) + 1), label, "black", font)
    array = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte()
    for i, image in enumerate(array.permute(0, 2, 3, 1).numpy()):
        picture = Image.fromarray(np.ascontiguousarray(image))
        place = (i % columns * cell, i // columns * (cell + strip) + strip)
        page.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), place)
    return page

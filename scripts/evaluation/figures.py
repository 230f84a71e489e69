"""Grids and plots: images of images."""

from __future__ import annotations

import json
from pathlib import Path

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


COLOURS = ("#1f5fbf", "#c2410c", "#15803d", "#7e22ce")


def curves_of(run: Path, names: tuple[str, ...]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of entries of a run's log.jsonl; those that never occur are left out."""
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in names:
            if name in entry:
                curves[name].append((entry["step"], entry[name]))
    return {name: points for name, points in curves.items() if points}


def plot(title: str, curves: dict[str, list[tuple[float, float]]]) -> Image.Image:
    """Curves over steps, in one frame from the least value to the largest."""
    width, height, left, top, bottom = 480, 240, 56, 24, 24
    font = ImageFont.load_default(11)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    points = [p for curve in curves.values() for p in curve]
    last = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = high - low or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (width - left - 8) * x / last,
                top + (height - top - bottom) * (high - y) / span)

    draw.rectangle([left, top, width - 8, height - bottom], outline="#999999")
    draw.text((left, 6), title, "black", font)
    draw.text((4, top - 6), f"{high:.3g}", "black", font)
    draw.text((4, height - bottom - 8), f"{low:.3g}", "black", font)
    draw.text((width - 70, height - 18), f"step {last:g}", "black", font)
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        places = [place(x, y) for x, y in curve]
        draw.line(places, colour, 2) if len(places) > 1 else draw.point(places, colour)
        draw.text((width - 130, 6 + 14 * i), name, colour, font)
    return page

"""Sheets, grids and plots: images of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, LINES = 8, 4  # pixels between images; lines of text below each, at most


def sheet(pictures: Sequence[tuple[str, Image.Image]], title: str = "",
          columns: int = 8) -> Image.Image:
    """The (text, image) pairs, row by row, at 128 pixels or their own width if that is more.

    Texts wrap; one that needs more than 4 lines ends in an ellipsis.
    """
    cell = max([128, *(image.width for _, image in pictures)])
    font = ImageFont.load_default(cell * 12 / 128)
    line = sum(font.getmetrics())
    columns = min(columns, len(pictures))
    width = columns * (cell + MARGIN) + MARGIN
    above = wrap(title, width - 2 * MARGIN, font, lines=10) if title else []
    top = MARGIN + len(above) * line + (MARGIN if above else 0)
    labels = [wrap(text, cell, font, LINES) for text, _ in pictures]
    height = cell + max(map(len, labels)) * line + 2 * MARGIN
    page = Image.new("RGB", (width, top + -(-len(pictures) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(above):
        draw.text((MARGIN, MARGIN + i * line), text, "black", font)
    for i, (label, (_, image)) in enumerate(zip(labels, pictures, strict=True)):
        x, y = MARGIN + i % columns * (cell + MARGIN), top + i // columns * height
        page.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        for j, text in enumerate(label):
            draw.text((x, y + cell + 2 + j * line), text, "black", font)
    return page


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int) -> list[str]:
    """The text in at most `lines` lines of at most `width` pixels; the rest is an ellipsis."""
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            wrapped[-1] = longer
        else:
            wrapped += [word] if wrapped[-1] else []
            wrapped[-1] = word
    cut = wrapped[:lines]
    if len(wrapped) > lines:
        cut[-1] += " …"
    for i, row in enumerate(cut):  # a word, or the ellipsis, may be too long for the line
        while row and font.getlength(row) > width:
            row = row.removesuffix("…").rstrip()[:-1] + "…"
        cut[i] = row
    return cut


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

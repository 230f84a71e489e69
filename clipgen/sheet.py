"""A contact sheet: images in rows, a text below each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

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

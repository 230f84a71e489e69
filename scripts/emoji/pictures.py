"""The pictures of the README, with their texts.

    python -m scripts.emoji.pictures docs/pictures.png [--weights weights/emoji]

Each is the best of 16 candidates by CLIP, shown larger.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from clipgen import ClipGen
from scripts.training.cli import one_sentence

TEXTS = {  # and their seeds
    "a unicorn on the moon": 1, "a cat and a dog on the beach by day": 1,
    "a hamburger on the moon": 1, "a car on the beach at sunset": 1,
    "a panda in the city in the rain": 1, "a pig next to a frog in a green meadow by day": 1}
SIDE, COLUMNS, GAP, STRIP = 256, 3, 12, 30  # pixels


def main(arguments: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.pictures", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("path", type=Path, help="a PNG")
    p.add_argument("--weights", type=Path, default=Path("weights/emoji"), help="(weights/emoji)")
    a = p.parse_args(arguments)
    with one_sentence():
        model = ClipGen.load(a.weights, device="cpu")
        rows = -(-len(TEXTS) // COLUMNS)
        page = Image.new("RGB", (COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + STRIP + GAP) + GAP),
                         "white")
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
        for i, (text, seed) in enumerate(TEXTS.items()):
            image, = model.generate(text, num_images=1, candidates=16, seed=seed)
            x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + STRIP + GAP)
            page.paste(image.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
            draw.text((x + SIDE / 2, y + SIDE + STRIP / 2), text, "black", font, anchor="mm")
        page.quantize(256).save(a.path, optimize=True)


if __name__ == "__main__":
    main()

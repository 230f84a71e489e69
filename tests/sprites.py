"""Stand-ins for the emoji glyphs: a coloured shape for each object, so that tests need no font."""

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from scripts.emoji.scenes import Scenes, draw_scene
from scripts.emoji.world import OBJECTS


def drawn_sprites() -> dict[str, Image.Image]:
    sprites = {}
    for i, name in enumerate(OBJECTS):
        sprite = Image.new("RGBA", (120, 100 + i % 30))
        colour = (37 * i % 256, 91 * i % 256, 149 * i % 256, 255)
        draw = ImageDraw.Draw(sprite)
        shape = draw.ellipse if i % 2 else draw.rectangle
        shape([0, 0, 119, 99], fill=colour)
        sprites[name] = sprite
    return sprites


def drawn_scenes(count: int, size: int) -> Iterator[tuple[Image.Image, list[str]]]:
    """Pictures and captions of scenes with these stand-ins."""
    sprites, scenes = drawn_sprites(), Scenes(range(count), size=size)
    for i in range(count):
        picture = draw_scene(np.random.default_rng(i), scenes.drawn_labels(i), size, sprites)
        yield picture, scenes.captions(i)

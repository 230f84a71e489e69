"""Stand-ins for the emoji glyphs: a coloured shape for each object, so that tests need no font."""

from PIL import Image, ImageDraw

from scripts.scenes import OBJECTS


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

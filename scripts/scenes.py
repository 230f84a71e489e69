"""Scenes that the default bundle learns from: an emoji in a place at a time of day, drawn by seed.

    python -m scripts.scenes runs/scenes.tar --count 60000 [--start 0] [--size 64] [--held-out]

writes a tar in WebDataset's layout: `000000.png`, `000000.txt` (captions, one a line; only
`train_clip` reads them) and `000000.json` (labels; only the judge reads them).  One (object, place,
time) combination in ten is held out: it appears only with `--held-out`, and then alone.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import sys
import tarfile
import time as clock
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps

# name: (glyph, names in captions)
OBJECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cat": ("\U0001F431", ("cat", "kitten", "cat face")),
    "dog": ("\U0001F436", ("dog", "puppy", "dog face")),
    "fox": ("\U0001F98A", ("fox", "red fox")),
    "tiger": ("\U0001F42F", ("tiger", "tiger face")),
    "pig": ("\U0001F437", ("pig", "piglet")),
    "panda": ("\U0001F43C", ("panda", "panda bear")),
    "frog": ("\U0001F438", ("frog", "green frog")),
    "elephant": ("\U0001F418", ("elephant",)),
    "penguin": ("\U0001F427", ("penguin",)),
    "owl": ("\U0001F989", ("owl",)),
    "turtle": ("\U0001F422", ("turtle", "tortoise")),
    "apple": ("\U0001F34E", ("apple", "red apple")),
    "strawberry": ("\U0001F353", ("strawberry",)),
    "banana": ("\U0001F34C", ("banana",)),
    "pizza": ("\U0001F355", ("pizza", "slice of pizza")),
    "watermelon": ("\U0001F349", ("watermelon", "slice of watermelon")),
    "hamburger": ("\U0001F354", ("hamburger", "burger")),
    "cake": ("\U0001F382", ("birthday cake", "cake")),
    "grapes": ("\U0001F347", ("bunch of grapes",)),
    "car": ("\U0001F697", ("car", "red car")),
    "fire engine": ("\U0001F692", ("fire engine", "fire truck")),
    "bus": ("\U0001F68C", ("bus",)),
    "sailboat": ("\u26F5", ("sailboat", "sailing boat")),
    "rocket": ("\U0001F680", ("rocket", "spaceship")),
    "bicycle": ("\U0001F6B2", ("bicycle", "bike")),
    "umbrella": ("\u2614", ("umbrella",)),
    "balloon": ("\U0001F388", ("balloon", "red balloon")),
    "guitar": ("\U0001F3B8", ("guitar",)),
    "gift": ("\U0001F381", ("gift", "present", "gift box")),
    "football": ("\u26BD", ("football", "soccer ball")),
    "house": ("\U0001F3E0", ("house", "home")),
    "mushroom": ("\U0001F344", ("mushroom", "toadstool")),
}
PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach", "by the sea"),
    "forest": ("in the forest", "in the woods", "in a forest", "among trees"),
    "city": ("in the city", "on a city street", "on the road in town", "in front of buildings"),
    "snow": ("in the snow", "on the snow", "in a snowy landscape", "in winter"),
    "desert": ("in the desert", "on a sand dune", "in a desert with cactuses", "among cactuses"),
    "meadow": ("on a meadow", "in a field of flowers", "on green grass", "in a green field"),
}
TIMES: dict[str, tuple[str, ...]] = {
    "day": ("by day", "during the day", "on a sunny day", "in daylight", "under a blue sky"),
    "sunset": ("at sunset", "at dusk", "in the evening", "under an orange sky"),
    "night": ("at night", "by night", "under the stars", "in the dark", "in the moonlight"),
}
COMBINATIONS = [(o, p, t) for o in OBJECTS for p in PLACES for t in TIMES]
HELD_OUT = frozenset(COMBINATIONS[i] for i in np.random.default_rng(2203).permutation(
    len(COMBINATIONS))[:round(0.1 * len(COMBINATIONS))])

SKY = {"day": ((74, 152, 235), (196, 228, 255)), "sunset": ((106, 70, 140), (255, 160, 84)),
       "night": ((8, 10, 40), (40, 48, 100))}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.78, 0.68), "night": (0.42, 0.46, 0.66)}
Sprites = Mapping[str, Image.Image]  # object name -> RGBA picture


@dataclass(frozen=True)
class Scene:
    image: Image.Image  # RGB, square
    captions: tuple[str, ...]
    object: str
    place: str
    time: str


def find_font() -> Path:
    """The Noto Color Emoji font: $CLIPGEN_EMOJI_FONT, else where Debian puts it."""
    default = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    path = Path(os.environ.get("CLIPGEN_EMOJI_FONT") or default)
    if not path.is_file():
        raise FileNotFoundError(f"no emoji font at {path}: run 'apt install "
                                "fonts-noto-color-emoji' or set CLIPGEN_EMOJI_FONT to a "
                                "NotoColorEmoji.ttf")
    return path


@functools.cache
def emoji_sprites(path: Path | None = None) -> Sprites:
    """Every object's glyph, cropped to its ink (the font's bitmaps exist at size 109 alone)."""
    font = ImageFont.truetype(str(path or find_font()), 109)
    sprites = {}
    for name, (glyph, _) in OBJECTS.items():
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((8, 8), glyph, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"the font {path or find_font()} has no glyph for {name}; "
                             "use a current NotoColorEmoji.ttf")
        sprites[name] = canvas.crop(box)
    return sprites


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def write_caption(rng: np.random.Generator, name: str, place: str | None, time: str | None) -> str:
    """A caption in one of many wordings; a place or time of None is left unsaid."""
    def pick(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    thing = article(pick(OBJECTS[name][1]))
    where = pick(PLACES[place]) if place else ""
    when = pick(TIMES[time]) if time else ""
    pattern = pick(("{thing} {where} {when}", "{thing} {where} {when}", "{when}, {thing} {where}",
                    "{thing} {when} {where}", "a picture of {thing} {where} {when}",
                    "{where} {when}: {thing}", "there is {thing} {where} {when}"))
    words = pattern.format(thing=thing, where=where, when=when).split()
    return " ".join(words).replace(" ,", ",").replace(" :", ":").strip(",: ")


class Painter:
    """Draws one background on a square canvas of side `s`; all lengths are shares of it."""

    def __init__(self, rng: np.random.Generator, s: int, time: str):
        self.rng, self.s, self.time = rng, s, time
        self.image = self.sky()
        self.draw = ImageDraw.Draw(self.image)
        self.lights()

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def lit(self, rgb: tuple[int, int, int], spread: int = 10) -> tuple[int, int, int]:
        """A colour under this time's light, jittered."""
        jitter = self.rng.integers(-spread, spread + 1)
        return tuple(int(np.clip((c + jitter) * k, 0, 255))
                     for c, k in zip(rgb, LIGHT[self.time], strict=True))

    def sky(self) -> Image.Image:
        top, bottom = (np.array(c, float) + self.rng.uniform(-14, 14, 3) for c in SKY[self.time])
        ramp = np.linspace(0, 1, self.s)[:, None] / 0.62
        rows = top + (bottom - top) * np.clip(ramp, 0, 1)  # full colour at the horizon
        rows = np.clip(rows, 0, 255).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(
            rows[:, None], (self.s, self.s, 3))))

    def dot(self, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
        s = self.s
        self.draw.ellipse([(x - r) * s, (y - r) * s, (x + r) * s, (y + r) * s], fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        s = self.s
        self.draw.rectangle([x0 * s, y0 * s, x1 * s, y1 * s], fill=colour)

    def shape(self, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        self.draw.polygon([(x * self.s, y * self.s) for x, y in points], fill=colour)

    def lights(self) -> None:
        """Sun and clouds, a low sun, or moon and stars."""
        if self.time == "day":
            self.dot(self.u(0.08, 0.92), self.u(0.07, 0.16), self.u(0.05, 0.07), (255, 236, 120))
            for _ in range(self.rng.integers(1, 4)):
                x, y = self.u(0, 1), self.u(0.06, 0.3)
                for _ in range(4):
                    self.dot(x + self.u(-0.08, 0.08), y + self.u(-0.015, 0.015),
                             self.u(0.025, 0.05), (250, 252, 255))
        elif self.time == "sunset":
            self.dot(self.u(0.1, 0.9), self.u(0.3, 0.42), self.u(0.08, 0.11), (255, 222, 120))
        else:
            for _ in range(self.rng.integers(18, 36)):
                self.dot(self.u(0, 1), self.u(0, 0.5), self.u(0.004, 0.01), (236, 238, 255))
            x, y, r = self.u(0.1, 0.9), self.u(0.08, 0.2), self.u(0.05, 0.075)
            self.dot(x, y, r, (246, 242, 214))

    def hills(self, base: float, height: float, rgb: tuple[int, int, int], waves: float) -> None:
        """A wavy ground that reaches from `base` (share from the top) to the bottom."""
        a, b = self.u(0, 6.3), self.u(0, 6.3)
        x = np.linspace(0, 1, 33)
        y = base - height * (0.6 * np.sin(waves * x + a) + 0.4 * np.sin(1.7 * waves * x + b))
        self.shape([(0, 1), *zip(x.tolist(), y.tolist(), strict=True), (1, 1)], self.lit(rgb))

    def beach(self) -> None:
        horizon, shore = self.u(0.4, 0.48), self.u(0.6, 0.68)
        self.box(0, horizon, 1, 1, self.lit((28, 120, 190)))
        for _ in range(9):
            x, y = self.u(-0.1, 1), self.u(horizon + 0.02, shore)
            self.box(x, y, x + self.u(0.06, 0.2), y + 0.008, self.lit((150, 205, 240)))
        self.hills(shore - 0.015, 0.015, (245, 250, 255), 9)
        self.hills(shore + 0.01, 0.015, (240, 212, 150), 9)
        for _ in range(14):
            self.dot(self.u(0, 1), self.u(shore + 0.08, 1), self.u(0.004, 0.01),
                     self.lit((205, 172, 112)))

    def pine(self, x: float, base: float, height: float, rgb: tuple[int, int, int],
             cap: bool = False) -> None:
        self.box(x - 0.012, base - 0.02, x + 0.012, base + 0.03, self.lit((96, 64, 40)))
        colour = self.lit(rgb)
        for k in range(3):
            top = base - height * (1 - 0.22 * k)
            half, low = height * (0.16 + 0.06 * k), base - height * (0.56 - 0.28 * k)
            self.shape([(x, top), (x - half, low), (x + half, low)], colour)
            if cap:
                self.shape([(x, top), (x - half * 0.5, (top + low) / 2),
                            (x + half * 0.5, (top + low) / 2)], self.lit((244, 248, 255), 4))

    def forest(self) -> None:
        ground = self.u(0.6, 0.68)
        self.hills(ground - 0.2, 0.04, (24, 78, 44), 7)
        for row, green in ((0.0, (30, 96, 48)), (0.05, (44, 122, 56))):
            for x in np.arange(-0.05, 1.1, 0.13):
                self.pine(x + self.u(-0.05, 0.05), ground + row, self.u(0.34, 0.52), green)
        self.hills(ground + 0.06, 0.015, (84, 100, 48), 5)

    def city(self) -> None:
        street = self.u(0.66, 0.72)
        x = -0.05
        while x < 1:
            wide, top = self.u(0.12, 0.22), self.u(0.12, 0.44)
            grey = self.rng.integers(90, 170)
            self.box(x, top, x + wide, street, self.lit((grey, grey - 6, grey + 14)))
            for wx in np.arange(x + 0.025, x + wide - 0.03, 0.05):
                for wy in np.arange(top + 0.03, street - 0.05, 0.07):
                    bright = self.rng.random() < 0.6
                    glow = (255, 226, 120) if bright else (60, 60, 84)
                    pane = glow if self.time != "day" else (190, 216, 236)
                    self.box(wx, wy, wx + 0.025, wy + 0.035, pane)
            x += wide + self.u(0, 0.02)
        self.box(0, street, 1, street + 0.05, self.lit((176, 172, 168)))
        self.box(0, street + 0.05, 1, 1, self.lit((82, 82, 90)))
        phase = self.u(0, 0.2)
        for x in np.arange(-phase, 1, 0.22):
            self.box(x, 0.9, x + 0.12, 0.92, self.lit((240, 240, 230)))

    def snow(self) -> None:
        ground = self.u(0.56, 0.64)
        self.hills(ground - 0.12, 0.06, (206, 222, 242), 6)
        for _ in range(self.rng.integers(2, 5)):
            self.pine(self.u(0, 1), ground + self.u(-0.04, 0.03), self.u(0.2, 0.36), (52, 104, 84),
                      cap=True)
        self.hills(ground + 0.03, 0.03, (242, 247, 255), 5)
        for _ in range(26):
            self.dot(self.u(0, 1), self.u(0, 1), self.u(0.006, 0.012), (250, 252, 255))

    def desert(self) -> None:
        ground = self.u(0.54, 0.62)
        self.hills(ground - 0.06, 0.05, (206, 140, 66), 6)
        self.hills(ground + 0.04, 0.04, (232, 172, 88), 5)
        for _ in range(self.rng.integers(1, 4)):
            x, base, h = self.u(0.05, 0.95), ground + self.u(0.02, 0.12), self.u(0.2, 0.3)
            green, side = self.lit((66, 130, 70)), self.rng.choice([-1, 1])
            self.box(x - 0.022, base - h, x + 0.022, base, green)
            for k, level in ((side, 0.45), (-side, 0.6)):
                arm = x + k * 0.075
                self.box(min(x, arm), base - h * level, max(x, arm), base - h * level + 0.03, green)
                self.box(arm - 0.016, base - h * (level + 0.3), arm + 0.016,
                         base - h * level + 0.03, green)
        self.hills(self.u(0.78, 0.84), 0.03, (240, 186, 104), 6)

    def meadow(self) -> None:
        ground = self.u(0.54, 0.62)
        self.hills(ground - 0.06, 0.06, (118, 186, 84), 6)
        self.hills(ground + 0.03, 0.03, (92, 170, 62), 5)
        blooms = ((255, 244, 250), (255, 226, 74), (238, 90, 120), (190, 110, 220))
        for _ in range(30):
            x, y = self.u(0, 1), self.u(ground + 0.08, 1)
            self.dot(x, y, self.u(0.01, 0.018), self.lit(blooms[self.rng.integers(4)]))


def place_object(painter: Painter, sprite: Image.Image) -> None:
    """Put the sprite on the ground with a shadow: size, position, tilt and mirror vary."""
    s, image = painter.s, painter.image
    scale = painter.u(0.48, 0.62) * s / max(sprite.size)
    if painter.rng.random() < 0.5:
        sprite = ImageOps.mirror(sprite)
    sprite = sprite.resize([max(1, round(d * scale)) for d in sprite.size], Image.Resampling.BOX)
    sprite = sprite.rotate(painter.u(-6, 6), Image.Resampling.BILINEAR, expand=True)
    x, feet = painter.u(0.34, 0.66) * s, painter.u(0.82, 0.92) * s
    w, h = sprite.size
    shade = Image.new("L", image.size)
    ImageDraw.Draw(shade).ellipse([x - 0.42 * w, feet - 0.035 * s, x + 0.42 * w, feet + 0.03 * s],
                                  fill=90)
    image.paste((20, 20, 40), mask=shade)
    # Objects are lit less than the ground, so that they stay readable at night.
    tint = tuple(round(255 * k ** 0.4) for k in LIGHT[painter.time])
    rgb = ImageChops.multiply(sprite.convert("RGB"), Image.new("RGB", sprite.size, tint))
    image.paste(rgb, (round(x - w / 2), round(feet - h)), sprite.getchannel("A"))


def render(seed: int, size: int = 64, held_out: bool = False, sprites: Sprites | None = None,
           labels: tuple[str, str, str] | None = None) -> Scene:
    """The scene of a seed.  size: pixels a side; labels: (object, place, time), drawn if None."""
    rng = np.random.default_rng([seed, 64])
    while labels is None:
        drawn = COMBINATIONS[rng.integers(len(COMBINATIONS))]
        if (drawn in HELD_OUT) == held_out:
            labels = drawn
    name, place, time = labels
    painter = Painter(rng, 2 * size, time)  # twice the size, then reduced: smooth edges
    paint: Callable[[], None] = getattr(painter, place)
    paint()
    place_object(painter, (sprites or emoji_sprites())[name])
    captions = [write_caption(rng, name, place, time) for _ in range(4)]
    captions.append(write_caption(rng, name, place, None) if rng.random() < 0.7
                    else write_caption(rng, name, None, None))
    return Scene(painter.image.reduce(2), tuple(captions), name, place, time)


def encode(seed: int, size: int, held_out: bool) -> tuple[int, bytes, str, str]:
    scene = render(seed, size, held_out)
    data = io.BytesIO()
    scene.image.save(data, "PNG", compress_level=1)
    labels = {"object": scene.object, "place": scene.place, "time": scene.time}
    return seed, data.getvalue(), "\n".join(scene.captions), json.dumps(labels)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="the tar to write")
    p.add_argument("--count", type=int, default=60000, help="scenes")
    p.add_argument("--start", type=int, default=0, help="first seed")
    p.add_argument("--size", type=int, default=64, help="pixels a side")
    p.add_argument("--held-out", action="store_true", help="held-out combinations, and no other")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    a = p.parse_args()
    if min(a.count, a.size, a.workers) < 1 or a.start < 0:
        p.error("--count, --size and --workers start at 1, --start at 0")
    emoji_sprites()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    began = clock.time()
    work = functools.partial(encode, size=a.size, held_out=a.held_out)
    part = a.out.with_name(a.out.name + ".part")
    with multiprocessing.Pool(a.workers) as pool, tarfile.open(part, "w") as tar:
        seeds = range(a.start, a.start + a.count)
        for seed, png, text, labels in pool.imap(work, seeds, chunksize=64):
            for ending, data in (("png", png), ("txt", text.encode()), ("json", labels.encode())):
                member = tarfile.TarInfo(f"{seed:07d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    part.replace(a.out)
    seconds = clock.time() - began
    print(f"{a.count} scenes in {seconds:.0f} s ({a.count / seconds:.0f} a second)",
          file=sys.stderr)


if __name__ == "__main__":
    main()

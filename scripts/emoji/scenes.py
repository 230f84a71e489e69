"""Scenes that the default bundle learns from: emoji in a place at a time of day, drawn by seed.

An image source for every script of this folder, drawn when asked for:

    scenes:COUNT[,objects=N][,size=64][,first=0][,pairs=35][,held-out][,families][,stickers][,keep]

COUNT scenes of a world with the first N objects (default: all), by seeds from `first` on; `pairs`
of a hundred show two things.  One (object, place) in ten is held out: it appears only with
`held-out`, where every scene has such a pair.  With `families`, four seeds that follow each other
show almost the same (`world.relative`): hard negatives for a CLIP (`train_clip --together 4`).
With `stickers` things are larger, have a white edge and lie where all others lie, and less else is
drawn (`painter.Look`): a GPT learns their shapes from far fewer scenes.
With `keep` all are drawn at once, on all cores, and kept in memory, for who sees each many times;
each process that trains has its own.  `train_clip` learns from the captions; `encode_images` embeds
some, to measure the gap between texts and images with, and for `train_gpt --subtract-means`.

    python -m scripts.emoji.scenes runs/sheet.png [--objects N] [--size 128]   64 scenes to look at
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps
from tqdm import tqdm

from scripts.emoji.painter import LIGHT, PLAIN, STICKERS, Look, Painter
from scripts.emoji.world import (
    FAMILY,
    OBJECTS,
    PAIR_SHARE,
    Labels,
    draw_labels,
    is_held_out,
    relative,
    write_caption,
)
from scripts.training.cli import number, positive

Sprites = Mapping[str, Image.Image]  # object name -> RGBA picture
OUTLINE = 4  # pixels of a glyph of about 120
SMOOTH = 2  # drawn at so many times the size, then reduced
MOST_SEEDS = 2**40
WORDS = ("held-out", "families", "stickers", "keep")  # of a source, without a value


def find_font() -> Path:
    """The Noto Color Emoji font: $CLIPGEN_EMOJI_FONT, else where Debian puts it.

    ValueError: it is not there.
    """
    default = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    path = Path(os.environ.get("CLIPGEN_EMOJI_FONT") or default)
    if not path.is_file():
        raise ValueError(f"no emoji font at {path}: run 'apt install fonts-noto-color-emoji' or "
                         "set CLIPGEN_EMOJI_FONT to a NotoColorEmoji.ttf")
    return path


@functools.cache
def emoji_sprites(edged: bool = False) -> Sprites:
    """Every object's glyph, cropped to its ink (the font's bitmaps exist at size 109 alone).

    edged: as `outlined` makes them.
    """
    path = find_font()
    font = ImageFont.truetype(str(path), 109)
    sprites = {}
    for name, (glyph, _) in OBJECTS.items():
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((8, 8), glyph, font=font, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"the font {path} has no glyph for {name}; use a current "
                             "NotoColorEmoji.ttf")
        sprites[name] = outlined(canvas.crop(box)) if edged else canvas.crop(box)
    return sprites


def outlined(sprite: Image.Image) -> Image.Image:
    """With a white edge around its ink, like a sticker: thin and dark things stand out anywhere."""
    ink = ImageOps.expand(sprite.getchannel("A"), OUTLINE)
    near = ink.filter(ImageFilter.GaussianBlur(OUTLINE / 2)).point(lambda a: min(255, 5 * a))
    edge = Image.merge("RGBA", [Image.new("L", near.size, 255)] * 3 + [near])
    return Image.alpha_composite(edge, ImageOps.expand(sprite, OUTLINE, (255, 255, 255, 0)))


def place_object(painter: Painter, sprite: Image.Image, x: float, spread: float,
                 scale: float) -> None:
    """Put the sprite on the ground, at most `spread` from `x`, its longer side about `scale`.

    With a shadow; size, place, tilt and mirror vary as the look says.
    """
    s, image = painter.s, painter.image
    look = painter.look
    side = painter.u(1 - look.jitter, 1 + look.jitter) * scale * s
    if painter.rng.random() < 0.5 and look.mirrored:
        sprite = ImageOps.mirror(sprite)
    ratio = side / max(sprite.size)
    sprite = sprite.resize([max(1, round(d * ratio)) for d in sprite.size], Image.Resampling.BOX)
    sprite = sprite.rotate(painter.u(-look.tilt, look.tilt), Image.Resampling.BILINEAR, expand=True)
    x, feet = (x + painter.u(-spread, spread)) * s, painter.u(*look.feet) * s
    w, h = sprite.size
    shade = Image.new("L", image.size)
    ImageDraw.Draw(shade).ellipse([x - 0.42 * w, feet - 0.035 * s, x + 0.42 * w, feet + 0.03 * s],
                                  fill=90)
    image.paste((20, 20, 40), mask=shade)
    # Objects are lit less than the ground, so that they stay readable at night.
    tint = tuple(round(255 * k ** look.shade) for k in LIGHT[painter.time])
    rgb = ImageChops.multiply(sprite.convert("RGB"), Image.new("RGB", sprite.size, tint))
    image.paste(rgb, (round(x - w / 2), round(feet - h)), sprite.getchannel("A"))


def draw_scene(rng: np.random.Generator, labels: Labels, size: int,
               sprites: Sprites | None = None, look: Look = PLAIN) -> Image.Image:
    """A picture (RGB, `size` pixels a side) of what the labels say; no two are alike."""
    sprites = sprites or emoji_sprites(look.edged)
    painter = Painter(rng, SMOOTH * size, labels.place, labels.time, look)
    if look.behind:
        painter.falling(labels.place)
    # Things have numbers of their own: without them the rest of a scene is the same.
    painter.rng = np.random.default_rng(rng.integers(2**63))
    if len(labels.objects) == 1:
        place_object(painter, sprites[labels.objects[0]], 0.5, look.spread[0], look.thing)
    elif labels.objects:
        for x, name in zip(look.sides, labels.objects, strict=True):
            place_object(painter, sprites[name], x, look.spread[1], look.pair)
    painter.rng = rng
    painter.front(labels.place)
    if not look.behind:
        painter.falling(labels.place)
    return painter.image.reduce(SMOOTH)


@dataclass(frozen=True)
class Scenes:
    """Scenes by seed, as `data.images.Images` has images: nothing is kept unless `drawn`."""

    seeds: range | tuple[int, ...]
    objects: int = len(OBJECTS)
    size: int = 64
    held_out: bool | None = False  # None: whatever comes
    pairs: int = round(100 * PAIR_SHARE)  # in a hundred: scenes of two things
    families: bool = False
    look: Look = PLAIN
    drawn: np.ndarray | None = field(default=None, repr=False, compare=False)  # uint8 (N, S, S, 3)

    @classmethod
    def parse(cls, text: str) -> Scenes:
        """Of what follows `scenes:`.  ValueError: it is not as the module says."""
        count, *rest = text.split(",")
        values = dict(objects=len(OBJECTS), size=64, first=0, pairs=cls.pairs)
        held_out, families, stickers, keep = (word in rest for word in WORDS)
        for part in rest:
            name, equals, value = part.partition("=")
            known = name in values and re.fullmatch("[0-9]{1,9}", value)
            if part not in WORDS and not known:
                raise ValueError(f"scenes:{text}: {part!r} is none of objects=N, size=N, first=N, "
                                 "pairs=PERCENT, held-out, families, stickers and keep")
            if equals:
                values[name] = int(value)
        if not re.fullmatch("[0-9]{1,9}", count) or not int(count):
            raise ValueError(f"scenes:{text}: {count!r} is no number of scenes")
        if not 2 <= values["objects"] <= len(OBJECTS) or values["size"] < 8:
            raise ValueError(f"scenes:{text}: objects from 2 to {len(OBJECTS)}, size from 8")
        if values["pairs"] > 100:
            raise ValueError(f"scenes:{text}: pairs, of a hundred scenes, from 0 to 100")
        find_font()
        first = values.pop("first")
        if families and first % FAMILY:
            raise ValueError(f"scenes:{text}: families of {FAMILY} begin at a multiple of it, not "
                             f"at first={first}")
        scenes = cls(range(first, first + int(count)), held_out=held_out, families=families,
                     look=STICKERS if stickers else PLAIN, **values)
        return replace(scenes, drawn=scenes.draw_all()) if keep else scenes

    def draw_all(self) -> np.ndarray:
        """All pictures, uint8 (N, S, S, 3), drawn by as many processes as there are cores."""
        cores = len(os.sched_getaffinity(0))
        with multiprocessing.get_context("fork").Pool(cores) as pool:
            drawn = tqdm(pool.imap(self._pixels, range(len(self)), chunksize=32), "drawing",
                         len(self), mininterval=10)
            result = np.empty((len(self), self.size, self.size, 3), np.uint8)
            for i, pixels in enumerate(drawn):
                result[i] = pixels
        return result

    def _pixels(self, i: int) -> np.ndarray:
        return np.asarray(self.image(i))

    @functools.cached_property
    def names(self) -> list[str]:
        return [f"scene{seed:010d}" for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def drawn_labels(self, i: int) -> Labels:
        which = self.seeds[i] % FAMILY if self.families else 0
        rng = np.random.default_rng([self.seeds[i] - which, 1])
        while True:
            labels = draw_labels(rng, self.objects, self.pairs / 100)
            if self.wanted(labels):
                break
        rng = np.random.default_rng([self.seeds[i], 4])
        for _ in range(100):  # of a small world, all others in this place may be held out
            other = relative(rng, labels, which, self.objects)
            if self.wanted(other):
                return other
        return labels

    def wanted(self, labels: Labels) -> bool:
        return self.held_out is None or is_held_out(labels) == self.held_out

    def image(self, i: int, least: int | None = None) -> Image.Image:
        if self.drawn is not None:
            return Image.fromarray(self.drawn[i])
        return draw_scene(np.random.default_rng([self.seeds[i], 2]), self.drawn_labels(i),
                          self.size, look=self.look)

    def captions(self, i: int) -> list[str]:
        """Four whole ones, and one that leaves time, or time and place, unsaid."""
        rng, labels = np.random.default_rng([self.seeds[i], 3]), self.drawn_labels(i)
        whole = [write_caption(rng, labels) for _ in range(4)]
        return [*whole, write_caption(rng, labels, place=rng.random() < 0.7, time=False)]

    def labels(self, i: int) -> dict[str, Any]:
        return asdict(self.drawn_labels(i))

    def subset(self, indices: Iterable[int]) -> Scenes:
        chosen = [int(i) for i in indices]
        return replace(self, seeds=tuple(self.seeds[i] for i in chosen),
                       drawn=None if self.drawn is None else self.drawn[chosen])

    def fingerprint(self) -> str:
        first, last = self.seeds[0], self.seeds[-1]
        return (f"scenes {len(self)} from {first} to {last} of {self.objects} at {self.size}, "
                f"held out: {self.held_out}, pairs: {self.pairs}, families: {self.families}, "
                f"look: {self.look}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path, help="the PNG to write")
    p.add_argument("--objects", type=number(int, 2, len(OBJECTS)), default=len(OBJECTS))
    p.add_argument("--size", type=positive, default=128, help="pixels a side")
    p.add_argument("--stickers", action="store_true", help="as the source has it")
    p.add_argument("--first", type=number(int, 0, MOST_SEEDS), default=0, help="seed")
    a = p.parse_args()
    from clipgen.sheet import sheet

    look = STICKERS if a.stickers else PLAIN
    scenes = Scenes(range(a.first, a.first + 64), a.objects, a.size, held_out=None, look=look)
    try:
        emoji_sprites(look.edged)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    began = time.perf_counter()
    images = [scenes.image(i) for i in range(len(scenes))]
    speed = len(images) / (time.perf_counter() - began)
    cells = [(scenes.captions(i)[0], image) for i, image in enumerate(images)]
    sheet(cells, f"drawn on one core at {speed:.0f} scenes a second").save(a.out)


if __name__ == "__main__":
    main()

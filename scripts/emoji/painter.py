"""Backgrounds of the default bundle's world, drawn by chance: hills, trees, houses, waves.

All lengths are shares of the picture's side, from its top left corner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from scripts.emoji.world import COLOURS, TIMELESS

Colour = tuple[int, int, int]
SKY = {"day": ((74, 152, 235), (196, 228, 255)), "sunset": ((106, 70, 140), (255, 160, 84)),
       "night": ((8, 10, 40), (40, 48, 100)), "rain": ((84, 96, 112), (150, 160, 172)),
       None: ((4, 4, 14), (14, 14, 34))}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.78, 0.68), "night": (0.42, 0.46, 0.66),
         "rain": (0.68, 0.74, 0.8), None: (1.0, 1.0, 1.0)}


WAVES = ((0.86, 0.9, (24, 96, 168)), (0.93, 0.96, (16, 78, 146)))  # in front of things in the sea

Range = tuple[float, float]


@dataclass(frozen=True)
class Look:
    """How scenes look: how large things are, and how much else there is.  Counts: least and most.

    The more there is that nobody asks for, the more a GPT must spend on it.
    """

    edged: bool = False  # things have a white edge, as stickers have
    thing: float = 0.6  # longer side of one thing, and of each of two
    pair: float = 0.43
    spread: tuple[float, float] = (0.14, 0.03)  # of the place of one thing, and of each of two
    sides: tuple[float, float] = (0.27, 0.73)  # where two things are
    feet: Range = (0.84, 0.93)
    jitter: float = 0.12  # of sizes
    tilt: float = 6  # degrees
    mirrored: bool = True  # every other thing
    shade: float = 0.4  # exponent of the light that falls on things: less is brighter
    behind: bool = False  # rain and snow fall behind the things
    stars: tuple[int, int] = (18, 36)
    stars_of_moon: tuple[int, int] = (40, 40)
    star: Range = (0.004, 0.01)
    flakes: tuple[int, int] = (14, 24)
    flake: Range = (0.006, 0.012)
    drops: tuple[int, int] = (24, 30)  # outside, and behind a window
    drop: Range = (0.04, 0.07)
    drop_width: float = 0.007
    waves: int = 2  # in front of things in the sea
    grains: int = 14  # on the beach
    flowers: tuple[int, int] = (30, 30)
    flower: Range = (0.01, 0.018)
    straws: int = 24
    craters: tuple[int, int] = (7, 11)
    pane: Range = (0.025, 0.035)  # width and height of windows
    lit_panes: float = 0.6


PLAIN = Look()
STICKERS = Look(
    edged=True, thing=0.7, pair=0.47, spread=(0, 0), sides=(0.25, 0.75), feet=(0.92, 0.92),
    jitter=0, tilt=0, mirrored=False, shade=0.25, behind=True,
    stars=(7, 12), stars_of_moon=(10, 14), star=(0.008, 0.013), flakes=(8, 12),
    flake=(0.009, 0.014), drops=(12, 12), drop=(0.08, 0.11), drop_width=0.011, waves=1, grains=0,
    flowers=(7, 10), flower=(0.018, 0.026), straws=0, craters=(5, 7), pane=(0.035, 0.05),
    lit_panes=1)


class Painter:
    """Draws one place at one time on a square canvas of side `s`."""

    def __init__(self, rng: np.random.Generator, s: int, place: str, time: str | None,
                 look: Look = PLAIN):
        self.rng, self.s, self.time, self.look = rng, s, time, look
        if place in COLOURS:
            self.image = self.plain(COLOURS[place])
            self.draw = ImageDraw.Draw(self.image)
        else:
            self.image = self.ramp(*SKY[time])
            self.draw = ImageDraw.Draw(self.image)
            if place not in TIMELESS:
                self.lights()
            getattr(self, place)()

    def u(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def count(self, low: int, high: int) -> range:
        """So many times: from low to high."""
        return range(low if low == high else self.rng.integers(low, high + 1))

    def lit(self, rgb: Colour, spread: int = 10) -> Colour:
        """A colour under this time's light, jittered."""
        jitter = self.rng.integers(-spread, spread + 1)
        return tuple(int(np.clip((c + jitter) * k, 0, 255))
                     for c, k in zip(rgb, LIGHT[self.time], strict=True))

    def ramp(self, top: Colour, bottom: Colour, at: float = 0.62) -> Image.Image:
        """From one colour at the top to the other at the horizon and below."""
        high, low = (np.array(c, float) + self.rng.uniform(-14, 14, 3) for c in (top, bottom))
        share = np.clip(np.linspace(0, 1 / at, self.s), 0, 1)[:, None]
        rows = np.clip(high + (low - high) * share, 0, 255).astype(np.uint8)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(
            rows[:, None], (self.s, self.s, 3))))

    def plain(self, rgb: Colour) -> Image.Image:
        """A wall of one colour, a little darker at its foot."""
        shaded = tuple(round(0.86 * c) for c in rgb)
        return self.ramp(rgb, shaded, at=1.0)

    def dot(self, x: float, y: float, r: float, colour: Colour, flat: float = 1.0) -> None:
        """An ellipse of width 2 r and height 2 r · flat."""
        s = self.s
        self.draw.ellipse([(x - r) * s, (y - r * flat) * s, (x + r) * s, (y + r * flat) * s],
                          fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        s = self.s
        self.draw.rectangle([x0 * s, y0 * s, x1 * s, y1 * s], fill=colour)

    def shape(self, points: list[tuple[float, float]], colour: Colour) -> None:
        self.draw.polygon([(x * self.s, y * self.s) for x, y in points], fill=colour)

    def hills(self, base: float, height: float, rgb: Colour, waves: float) -> None:
        """A wavy ground that reaches from `base` to the bottom."""
        a, b = self.u(0, 6.3), self.u(0, 6.3)
        x = np.linspace(0, 1, 33)
        y = base - height * (0.6 * np.sin(waves * x + a) + 0.4 * np.sin(1.7 * waves * x + b))
        self.shape([(0, 1), *zip(x.tolist(), y.tolist(), strict=True), (1, 1)], self.lit(rgb))

    def lights(self) -> None:
        """What the sky shows: sun and clouds, a low sun, moon and stars, or dark clouds."""
        if self.time == "day":
            self.dot(self.u(0.08, 0.92), self.u(0.07, 0.16), self.u(0.05, 0.07), (255, 236, 120))
            for _ in self.count(1, 3):
                self.cloud(self.u(0.06, 0.3), (250, 252, 255))
        elif self.time == "sunset":
            self.dot(self.u(0.1, 0.9), self.u(0.3, 0.42), self.u(0.08, 0.11), (255, 222, 120))
            for _ in self.count(0, 2):
                self.cloud(self.u(0.06, 0.3), (244, 150, 140))
        elif self.time == "night":
            for _ in self.count(*self.look.stars):
                self.dot(self.u(0, 1), self.u(0, 0.5), self.u(*self.look.star), (236, 238, 255))
            x, y, r = self.u(0.1, 0.9), self.u(0.08, 0.2), self.u(0.05, 0.075)
            self.dot(x, y, r, (246, 242, 214))
            if self.rng.random() < 0.5:  # a crescent
                self.dot(x + 0.5 * r, y - 0.2 * r, 0.85 * r, (12, 14, 48))
        else:
            for _ in self.count(4, 7):
                grey = int(self.u(64, 104))
                self.cloud(self.u(0.0, 0.22), (grey, grey + 4, grey + 12), 1.8)

    def cloud(self, y: float, colour: Colour, size: float = 1.0) -> None:
        x = self.u(0, 1)
        for _ in range(4):
            self.dot(x + size * self.u(-0.08, 0.08), y + size * self.u(-0.015, 0.015),
                     size * self.u(0.025, 0.05), colour)

    def falling(self, place: str) -> None:
        """Rain and snow."""
        self.draw, look = ImageDraw.Draw(self.image), self.look
        if place == "snow":
            for _ in self.count(*look.flakes):
                self.dot(self.u(0, 1), self.u(0, 1), self.u(*look.flake), (250, 252, 255))
        if self.time == "rain" and place != "kitchen":
            self.drops(0, 0, 1, 1, look.drops[0])

    def front(self, place: str) -> None:
        """Waves in front of the objects."""
        self.draw = ImageDraw.Draw(self.image)
        if place == "sea":
            for low, high, rgb in WAVES[-self.look.waves:]:
                self.hills(self.u(low, high), 0.015, rgb, 12)

    def drops(self, x0: float, y0: float, x1: float, y1: float, count: int) -> None:
        s, look = self.s, self.look
        for _ in range(count):
            x, y = self.u(x0, x1), self.u(y0, y1 - 0.05 * (y1 - y0))
            length = self.u(*look.drop) * (y1 - y0)
            self.draw.line([x * s, y * s, (x - 0.3 * length) * s, (y + length) * s],
                           fill=(196, 208, 224), width=max(1, round(look.drop_width * s)))

    def beach(self) -> None:
        horizon, shore = self.u(0.4, 0.48), self.u(0.6, 0.68)
        self.box(0, horizon, 1, 1, self.lit((28, 120, 190)))
        for _ in range(9):
            x, y = self.u(-0.1, 1), self.u(horizon + 0.02, shore)
            self.box(x, y, x + self.u(0.06, 0.2), y + 0.008, self.lit((150, 205, 240)))
        self.hills(shore - 0.015, 0.015, (245, 250, 255), 9)
        self.hills(shore + 0.01, 0.015, (240, 212, 150), 9)
        if self.rng.random() < 0.6:
            self.palm(*self.rng.choice([[0.09, -1], [0.91, 1]]), shore + self.u(0.02, 0.08))
        for _ in range(self.look.grains):
            self.dot(self.u(0, 1), self.u(shore + 0.08, 1), self.u(0.004, 0.01),
                     self.lit((205, 172, 112)))

    def palm(self, x: float, side: float, base: float) -> None:
        top, lean = base - self.u(0.36, 0.48), -0.06 * side
        self.shape([(x - 0.018, base), (x + lean - 0.01, top), (x + lean + 0.01, top),
                    (x + 0.018, base)], self.lit((140, 100, 58)))
        green = self.lit((52, 140, 62))
        for dx, dy in ((-0.15, 0.05), (-0.12, -0.05), (0, -0.09), (0.12, -0.05), (0.15, 0.05)):
            self.shape([(x + lean, top - 0.02), (x + lean + dx, top + dy),
                        (x + lean + 0.4 * dx, top + 0.3 * dy + 0.035)], green)

    def sea(self) -> None:
        horizon = self.u(0.4, 0.5)
        self.box(0, horizon, 1, 1, self.lit((36, 130, 200)))
        if self.rng.random() < 0.4:  # an island far away
            x, r = self.u(0.1, 0.9), self.u(0.08, 0.14)
            self.shape([(x - r, horizon), (x - 0.3 * r, horizon - 0.5 * r),
                        (x + 0.4 * r, horizon - 0.35 * r), (x + r, horizon)],
                       self.lit((70, 120, 90)))
        for k, colour in enumerate(((32, 122, 192), (28, 112, 184), (26, 104, 176))):
            self.hills(horizon + 0.08 + 0.12 * k, 0.014, colour, 14 - 2 * k)
        for _ in range(8):
            x, y = self.u(-0.1, 1), self.u(horizon + 0.03, 0.95)
            self.box(x, y, x + self.u(0.05, 0.14), y + 0.01, self.lit((170, 214, 244)))

    def pine(self, x: float, base: float, height: float, rgb: Colour, cap: bool = False) -> None:
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

    def meadow(self) -> None:
        ground = self.u(0.54, 0.62)
        self.hills(ground - 0.06, 0.06, (118, 186, 84), 6)
        if self.rng.random() < 0.5:
            x, y, r = self.u(0.05, 0.95), ground - 0.08, self.u(0.07, 0.1)
            self.box(x - 0.014, y, x + 0.014, y + 0.14, self.lit((110, 78, 48)))
            for dx, dy in ((-0.6, 0.1), (0.6, 0.1), (0, -0.5)):
                self.dot(x + r * dx, y + r * dy, r, self.lit((64, 146, 64)))
        self.hills(ground + 0.03, 0.03, (92, 170, 62), 5)
        blooms = ((255, 244, 250), (255, 226, 74), (238, 90, 120), (190, 110, 220))
        for _ in self.count(*self.look.flowers):
            x, y = self.u(0, 1), self.u(ground + 0.08, 1)
            self.dot(x, y, self.u(*self.look.flower), self.lit(blooms[self.rng.integers(4)]))

    def mountains(self) -> None:
        ground = self.u(0.58, 0.66)
        for far, rgb in ((1, (138, 152, 178)), (0, (104, 112, 132))):
            for x in np.arange(self.u(-0.1, 0.1), 1.1, 0.34):
                top, half = self.u(0.14, 0.3) + 0.1 * (1 - far), self.u(0.24, 0.34)
                self.shape([(x - half, ground + 0.05), (x, top), (x + half, ground + 0.05)],
                           self.lit(rgb))
                share = 0.3
                low = top + share * (ground - top)
                self.shape([(x, top), (x - share * half, low), (x - 0.1 * half, low - 0.03),
                            (x + 0.08 * half, low + 0.02), (x + share * half, low)],
                           self.lit((242, 246, 255), 4))
        self.hills(ground + 0.02, 0.02, (118, 122, 104), 8)
        for _ in range(7):
            x, y, r = self.u(0, 1), self.u(ground + 0.1, 0.98), self.u(0.02, 0.05)
            self.dot(x, y, r, self.lit((146, 144, 142)), 0.55)

    def snow(self) -> None:
        ground = self.u(0.56, 0.64)
        self.hills(ground - 0.12, 0.06, (206, 222, 242), 6)
        for _ in self.count(2, 4):
            self.pine(self.u(0, 1), ground + self.u(-0.04, 0.03), self.u(0.2, 0.36), (52, 104, 84),
                      cap=True)
        self.hills(ground + 0.03, 0.03, (242, 247, 255), 5)

    def desert(self) -> None:
        ground = self.u(0.54, 0.62)
        self.hills(ground - 0.06, 0.05, (206, 140, 66), 6)
        self.hills(ground + 0.04, 0.04, (232, 172, 88), 5)
        for _ in self.count(1, 3):
            x, base, h = self.u(0.05, 0.95), ground + self.u(0.02, 0.12), self.u(0.2, 0.3)
            green, side = self.lit((66, 130, 70)), self.rng.choice([-1, 1])
            self.box(x - 0.022, base - h, x + 0.022, base, green)
            for k, level in ((side, 0.45), (-side, 0.6)):
                arm = x + k * 0.075
                self.box(min(x, arm), base - h * level, max(x, arm), base - h * level + 0.03, green)
                self.box(arm - 0.016, base - h * (level + 0.3), arm + 0.016,
                         base - h * level + 0.03, green)
        self.hills(self.u(0.78, 0.84), 0.03, (240, 186, 104), 6)

    def city(self) -> None:
        street = self.u(0.66, 0.72)
        x = -0.05
        while x < 1:
            wide, top = self.u(0.12, 0.22), self.u(0.12, 0.44)
            grey = self.rng.integers(90, 170)
            self.box(x, top, x + wide, street, self.lit((grey, grey - 6, grey + 14)))
            across, down = self.look.pane
            for wx in np.arange(x + 0.025, x + wide - across - 0.005, 2 * across):
                for wy in np.arange(top + 0.03, street - down - 0.015, 2 * down):
                    glow = (255, 226, 120) if self.rng.random() < self.look.lit_panes else (
                        60, 60, 84)
                    pane = (190, 216, 236) if self.time == "day" else glow
                    self.box(wx, wy, wx + across, wy + down, pane)
            x += wide + self.u(0, 0.02)
        self.box(0, street, 1, street + 0.05, self.lit((176, 172, 168)))
        self.box(0, street + 0.05, 1, 1, self.lit((82, 82, 90)))
        phase = self.u(0, 0.2)
        for x in np.arange(-phase, 1, 0.22):
            self.box(x, 0.9, x + 0.12, 0.92, self.lit((240, 240, 230)))

    def kitchen(self) -> None:
        """Indoors: the time shows in the window, and in the light."""
        table = self.u(0.64, 0.72)
        if self.time == "rain":
            self.drops(0, 0, 1, 0.6, self.look.drops[1])
        walls = ((250, 226, 176), (206, 232, 222), (246, 204, 196), (214, 222, 246))
        wall = self.lit(walls[self.rng.integers(len(walls))])
        x0, x1 = self.u(0.06, 0.2), self.u(0.8, 0.94)
        y0, y1 = self.u(0.04, 0.08), self.u(0.44, 0.52)
        for x, y, right, low in ((0, 0, x0, 1), (x1, 0, 1, 1), (0, 0, 1, y0), (0, y1, 1, 1)):
            self.box(x, y, right, low, wall)
        frame, middle = self.lit((250, 250, 250), 4), (x0 + x1) / 2
        for x in (x0, middle, x1):
            self.box(x - 0.012, y0, x + 0.012, y1, frame)
        for y in (y0, y1):
            self.box(x0 - 0.012, y - 0.012, x1 + 0.012, y + 0.012, frame)
        cloths = ((226, 92, 84), (90, 140, 200), (240, 190, 80), (120, 180, 110))
        cloth = self.lit(cloths[self.rng.integers(len(cloths))])
        for x, way in ((x0, 1), (x1, -1)):
            self.shape([(x - 0.04 * way, y0 - 0.02), (x + 0.1 * way, y0 - 0.02),
                        (x + 0.03 * way, y1), (x - 0.04 * way, y1)], cloth)
        self.box(0, table, 1, 1, self.lit((186, 122, 66)))
        self.box(0, table, 1, table + 0.02, self.lit((216, 154, 92)))
        for y in (0.8, 0.9):
            y += self.u(-0.02, 0.02)
            self.box(0, y, 1, y + 0.012, self.lit((150, 94, 48)))

    def farm(self) -> None:
        ground = self.u(0.58, 0.64)
        self.hills(ground - 0.05, 0.03, (150, 190, 90), 6)
        x, w, top = self.u(0.08, 0.5), self.u(0.36, 0.44), self.u(0.3, 0.36)
        red, roof, white = self.lit((190, 50, 44)), self.lit((96, 64, 60)), (246, 240, 232)
        self.box(x, top, x + w, ground + 0.04, red)
        self.shape([(x - 0.03, top), (x + 0.1, top - 0.14), (x + w - 0.1, top - 0.14),
                    (x + w + 0.03, top)], roof)
        door = x + w / 2
        self.box(door - 0.08, top + 0.1, door + 0.08, ground + 0.04, self.lit(white))
        self.box(door - 0.06, top + 0.12, door + 0.06, ground + 0.04, self.lit((130, 34, 32)))
        self.hills(ground + 0.04, 0.015, (222, 186, 84), 5)
        for y in (0.06, 0.1):
            self.box(0, ground + y, 1, ground + y + 0.014, self.lit((240, 236, 226), 4))
        for post in np.arange(self.u(0, 0.1), 1, 0.14):
            self.box(post, ground + 0.03, post + 0.02, ground + 0.16, self.lit((240, 236, 226), 4))
        for _ in range(self.look.straws):
            x, y = self.u(0, 1), self.u(ground + 0.18, 1)
            self.box(x, y, x + 0.01, y + 0.04, self.lit((196, 152, 56)))

    def volcano(self) -> None:
        ground, x, top = self.u(0.6, 0.68), self.u(0.25, 0.75), self.u(0.2, 0.28)
        glow, rock = (255, 140, 40), self.lit((88, 66, 66))
        for _ in range(6):
            grey = int(self.u(90, 140))
            self.dot(x + self.u(-0.1, 0.1), top - self.u(0.02, 0.16), self.u(0.03, 0.06),
                     self.lit((grey, grey - 8, grey - 8)))
        self.shape([(x - 0.5, ground + 0.05), (x - 0.09, top), (x + 0.09, top),
                    (x + 0.5, ground + 0.05)], rock)
        self.dot(x, top, 0.09, glow, 0.3)
        for _ in self.count(2, 3):
            a, b = self.u(-0.07, 0.07), self.u(-0.2, 0.2)
            self.shape([(x + a - 0.02, top), (x + a + 0.02, top), (x + b + 0.035, ground + 0.05),
                        (x + b - 0.015, ground + 0.05)], (255, 96, 28))
        self.hills(ground + 0.03, 0.02, (62, 50, 52), 8)
        for _ in self.count(3, 5):
            px, py, r = self.u(0, 1), self.u(ground + 0.1, 0.97), self.u(0.05, 0.1)
            self.dot(px, py, r, (240, 84, 24), 0.3)
            self.dot(px, py, 0.6 * r, (255, 176, 60), 0.25)

    def moon(self) -> None:
        for _ in self.count(*self.look.stars_of_moon):
            self.dot(self.u(0, 1), self.u(0, 0.62), self.u(*self.look.star), (240, 240, 255))
        x, y, r = self.u(0.12, 0.88), self.u(0.12, 0.22), self.u(0.08, 0.11)  # the Earth
        self.dot(x, y, r, (60, 120, 220))
        for _ in range(3):
            self.dot(x + self.u(-0.5, 0.5) * r, y + self.u(-0.5, 0.5) * r, 0.34 * r, (90, 180, 100))
        ground = self.u(0.58, 0.66)
        self.hills(ground - 0.03, 0.03, (132, 132, 138), 6)
        self.hills(ground + 0.04, 0.02, (176, 176, 180), 5)
        for _ in self.count(*self.look.craters):
            x, y, r = self.u(0, 1), self.u(ground + 0.1, 0.98), self.u(0.03, 0.07)
            self.dot(x, y, r, self.lit((128, 128, 134)), 0.45)
            self.dot(x, y + 0.1 * r, 0.85 * r, self.lit((152, 152, 157)), 0.4)

"""Progress of a command: one line on a terminal that is written over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

FROM = 2.0  # seconds: what is over sooner shows nothing
SURE = 0.5  # seconds after which the time that is left can be told
EVERY = 0.2  # seconds between two lines


class Progress:
    """How far something is and how long it still takes; nothing where `stream` is no terminal."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock = stream, clock
        self.terminal = stream.isatty()
        self.began, self.last, self.width = clock(), -EVERY, 0

    def update(self, share: float, what: str) -> None:
        """Say it, where that share, above 0 up to 1, is done."""
        spent = self.clock() - self.began
        if (not self.terminal or spent < SURE or spent / share < FROM
                or spent - self.last < EVERY):
            return
        self.last = spent
        left = round(spent / share - spent)
        left = f"{left} s" if left < 90 else f"{left // 60}:{left % 60:02d} min"
        line = f"clipgen: {what}, {int(100 * share)} %, {left} left"
        self.stream.write(f"\r{line:{self.width}}")
        self.stream.flush()
        self.width = max(self.width, len(line))

    def clear(self) -> None:
        """Take the line away, so that something else can be written."""
        if self.width:
            self.stream.write(f"\r{'':{self.width}}\r")
            self.stream.flush()
            self.width = 0

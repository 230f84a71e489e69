"""What the commands' flags take: numbers in bounds, durations.  Imports nothing that is slow."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of that kind from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # not a number is in no range
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
        return value

    return parse


positive, whole = number(int, 1, 10**9), number(int, 0, 10**9)
seed = number(int, 0, 2**31 - 1)
amount, share, scale = number(float, 0, 1e9), number(float, 0, 1), number(float, 0.01, 1)


def duration(text: str) -> float:
    """Seconds of a text such as 90s, 20m, 1.5h or 2h30m."""
    parts = re.findall(r"([0-9]+\.?[0-9]*)([smh])", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write 90s, 20m or 2h30m")
    seconds = sum(float(value) * {"s": 1, "m": 60, "h": 3600}[unit] for value, unit in parts)
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time above 0")
    return seconds

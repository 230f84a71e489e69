"""Command lines: what flags take, and errors as one line.  Imports nothing that is slow."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; of a flag that it does not know, the one that is meant.

    instead: what to do, by a name that people try; set by who makes the parser.
    """

    instead: Mapping[str, str] = {}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"clipgen: {message} (--help lists the flags)\n")

    def parse_args(self, args: Sequence[str] | None = None,
                   namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown[0])
        return parsed

    def refuse(self, given: str) -> NoReturn:
        """The error for what is no flag of this parser."""
        name = re.match(r"[\W_]*(\w*(?:[-_][^\W\d]+)*)", given)[1].replace("_", "-").lower()
        if name in self.instead:
            self.error(f"{given!r} is no flag: {self.instead[name]}")
        *others, last = [f"--{flag}" for flag in self.meant(name)] or [""]
        meant = f"{', '.join(others)} or {last}" if others else last
        self.error(f"{given!r} is no flag" + (f": did you mean {meant}?" if meant else ""))

    def meant(self, name: str) -> list[str]:
        """The flags, without dashes, that somebody who wrote `name` may have meant."""
        flags = sorted(self.flags())
        name = name.rstrip("0123456789")  # as in -n3
        if not name:
            return []
        if name in flags:
            return [name]
        parts = [flag for flag in flags if flag.startswith(name) or name.startswith(f"{flag}-")]
        return parts or difflib.get_close_matches(name, flags, 2)

    def flags(self) -> set[str]:
        """The names of all flags, without dashes."""
        return {option[2:] for option in self._option_string_actions if option.startswith("--")}


def device(text: str) -> str:
    """An argparse type: the name of a device, be it here or not."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    return text


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of that kind from low to high."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # NaN is in no range
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")
        return value

    return parse


seed = number(int, 0, 2**31 - 1)

"""Command lines: what flags take, settings as dataclasses, errors as one sentence.

A dataclass whose fields are made with `setting` describes the flags of a command.  `add_settings`
adds them to a parser and `settings_of` makes the dataclass of what was parsed.  Imports nothing
that is slow.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import MISSING, Field, field, fields
from typing import Any

# What the command of the package needs too lies there, and is had from here as well.
from clipgen.arguments import Parser as Parser
from clipgen.arguments import device as device
from clipgen.arguments import number
from clipgen.arguments import seed as seed

positive, whole = number(int, 1, 10**9), number(int, 0, 10**9)
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


ANSWERS = {"yes": True, "no": False}


def answer(text: str) -> bool:
    """True of yes, False of no; for settings that are neither where they are not given."""
    if text not in ANSWERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not yes or no")
    return ANSWERS[text]


def said(value: bool) -> str:
    """The text of which `answer` makes the value."""
    return "yes" if value else "no"


def setting(default: Any = MISSING, help: str = "", *, type: Callable[[str], Any] | None = None,
            choices: Any = None, flag: str | None = None, metavar: str | None = None,
            positional: bool = False, free: bool = False, instead_of: str | None = None) -> Any:
    """A field of a settings dataclass, and the flag that fills it.

    Without a default it is required.  `flag` is its name on the command line (default: that of the
    field).  `instead_of` names the setting that it excludes.  A run that goes on may have another
    value of a `free` setting: where things are, how often it saves.
    """
    return field(default=default, metadata={
        "help": help, "type": type, "choices": choices, "flag": flag, "metavar": metavar,
        "positional": positional, "free": free, "instead_of": instead_of})


def add_settings(parser: argparse.ArgumentParser, kind: type, prefix: str = "",
                 without: Collection[str] = ()) -> None:
    """Add a flag for each field of the dataclass `kind` but those `without`.

    With a prefix, as in `gpt.`, flags are `--gpt.batch`; none is required, has a default or is in
    --help.
    """
    kept = [each for each in fields(kind) if each.name not in without]
    pairs: dict[str, Any] = {}
    for each in kept:
        if other := each.metadata["instead_of"]:
            pairs[other] = pairs[each.name] = parser.add_mutually_exclusive_group()
    for each in kept:
        _add_setting(pairs.get(each.name, parser), each, prefix)


def _add_setting(parser: Any, each: Field, prefix: str) -> None:
    given, default = each.metadata, None if each.default is MISSING else each.default
    shown = f"{default:g}" if isinstance(default, int | float) else default
    if default and given["type"] is duration:
        shown = f"{default / 3600:g}h"
    text = given["help"]
    if default not in (None, "") and not isinstance(default, bool):
        text = f"{text} ({shown})".strip()
    options: dict[str, Any] = {"help": argparse.SUPPRESS if prefix else text.replace("%", "%%")}
    if given["positional"]:
        parser.add_argument(each.name, type=given["type"], **options)
        return
    negative = default is True
    flag = given["flag"] or ("no-" if negative else "") + each.name.replace("_", "-")
    if isinstance(default, bool):
        options["action"] = "store_false" if negative else "store_true"
    else:
        options |= {"type": given["type"], "choices": given["choices"],
                    "metavar": given["metavar"],
                    "required": each.default is MISSING and not prefix}
    parser.add_argument(f"--{prefix}{flag}", dest=prefix + each.name,
                        default=argparse.SUPPRESS if prefix else default, **options)


def settings_of(kind: type, namespace: argparse.Namespace) -> Any:
    """The dataclass `kind` filled from what a parser with its flags has parsed."""
    return kind(**{each.name: getattr(namespace, each.name) for each in fields(kind)})


def parse_settings(kind: type, arguments: list[str] | None, description: str,
                   prog: str | None = None,
                   defaults_with: dict[str, dict[str, Any]] | None = None) -> Any:
    """The dataclass `kind` of a command line that consists of its flags.

    `defaults_with`: by the name of a setting that is on or off, other defaults where it is on.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(parser, kind)
    for name, defaults in (defaults_with or {}).items():
        if getattr(parser.parse_known_args(arguments)[0], name):
            parser.set_defaults(**defaults)
    return settings_of(kind, parser.parse_args(arguments))


def given_with(prefix: str, namespace: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given with flags of that prefix, by field."""
    return {name.removeprefix(prefix): value for name, value in vars(namespace).items()
            if name.startswith(prefix)}


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a command after it had saved its work; `signal` is its number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """What a user can mend ends the command with its sentence instead of a traceback.

    Libraries raise ValueError (a value that cannot be), OSError, MemoryError, FloatingPointError or
    `Stopped`.  Of several processes one says it.
    """
    try:
        yield
    except Stopped as stop:
        if said_here():
            print(stop, file=sys.stderr)
        raise SystemExit(128 + stop.signal) from None
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        raise SystemExit(str(error) if said_here() else 1) from None


def said_here() -> bool:
    """Whether this process speaks for all; training libraries, once loaded, know which it is."""
    accelerate = sys.modules.get("accelerate")
    # Where it could not be made, as for want of an address, it knows nothing.
    return accelerate is None or getattr(accelerate.PartialState(), "is_main_process", True)

"""Tables of results, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def print_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """To stdout, a line for each row."""
    for row in (titles, ["---"] * len(titles), *rows):
        print("|", " | ".join(map(str, row)), "|")


def print_named(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The same of rows by name and column; a row lacks what it has no value for."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print_table(["", *columns], [[name, *(row.get(key, "") for key in columns)]
                                 for name, row in rows.items()])

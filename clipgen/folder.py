"""A folder to which files are added: whole, under names that were free."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 60  # characters of a text in a file's name


class Folder:
    """Adds files to a folder; one whose name is taken gets a number behind it.

    replace: files that were there before are replaced instead; its own never are.
    """

    def __init__(self, path: Path, replace: bool = False):
        self.path, self.replace = path, replace
        self.own: set[str] = set()

    def prepare(self) -> None:
        """Make the folder; OSError where no file can be written to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.path).close()

    def add(self, files: Sequence[tuple[str, str, Callable[[Path], None]]]) -> list[Path]:
        """Add files, each given as a name, its ending and what writes it; all of them or none.

        OSError where one cannot be written.  Other processes may add at the same time.
        """
        hidden: list[Path] = []
        with alone_in(self.path):
            taken = {*self.own} if self.replace else {
                *self.own, *(path.name.lower() for path in self.path.iterdir())}
            names = []
            for name, ending, _ in files:
                names.append(free_name(name, ending, taken))
                taken.add(names[-1].lower())
            try:
                for name, (_, _, save) in zip(names, files, strict=True):
                    hidden.append(self.path / f".{os.getpid()}-{name}")
                    save(hidden[-1])
                for part, name in zip(hidden, names, strict=True):
                    os.replace(part, self.path / name)
                    self.own.add(name.lower())
            finally:
                for part in hidden:
                    part.unlink(missing_ok=True)
        return [self.path / name for name in names]


def free_name(name: str, ending: str, taken: set[str]) -> str:
    """As in cat.png, or cat-2.png where that is taken; `taken` are lower case."""
    found, number = f"{name}.{ending}", 1
    while found.lower() in taken:
        number += 1
        found = f"{name}-{number}.{ending}"
    return found


def named_by(text: str, seed: int) -> str:
    """As in a-red-apple-seed-7."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LONGEST].rstrip("-") or "image"
    return f"{words}-seed-{seed}"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other run is writing there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

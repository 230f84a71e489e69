"""Checkpoints that survive a crash at any moment: written aside, synced, renamed, checked.

A checkpoint is named for its step and for the digest of its content, so a damaged one is known as
such and the one before it is used.  The newest two are kept.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from scripts.data.files import Hashing, sha256, sync

PATTERN = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{16})\.pt")
KEPT = 2


def found(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in a directory, newest first; their content is not read."""
    matches = ((PATTERN.fullmatch(path.name), path) for path in directory.glob("checkpoint-*.pt"))
    return sorted(((int(m[1]), path) for m, path in matches if m), reverse=True)


def save(directory: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of `step` completed steps; an OSError leaves the others as they were."""
    part = directory / ".checkpoint.part"
    try:
        with open(part, "wb") as file:
            hashing = Hashing(file)
            torch.save(state, hashing)
            file.flush()
            os.fsync(file.fileno())
        path = directory / f"checkpoint-{step:09d}-{hashing.digest.hexdigest()[:16]}.pt"
        part.replace(path)
    except RuntimeError as error:  # torch's writer hides the OSError that it met
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        part.unlink(missing_ok=True)
    sync(directory)
    # Later ones are damaged, or this run would have gone on from there.
    kept = [path, *(other for found_step, other in found(directory) if found_step < step)][:KEPT]
    for _, other in found(directory):
        if other not in kept:
            other.unlink()


def load(directory: Path, report: bool = True) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None without one.

    With `report` damaged ones are named on stderr.
    """
    state, damaged = None, []
    for _, path in found(directory):
        if is_whole(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
            break
        damaged.append(path.name)
    if damaged and report:
        how = f"going on from step {state['step']}" if state else "starting from the beginning"
        print(f"{directory}: damaged, and not used: {', '.join(damaged)}; {how}", file=sys.stderr)
    return state


def is_whole(path: Path) -> bool:
    """Whether the content of a checkpoint is what its name says; not where it cannot be read."""
    try:
        return sha256(path)[:16] == PATTERN.fullmatch(path.name)[2]
    except OSError:
        return False

"""The directory of a run: its lock, its log, its result."""

from __future__ import annotations

import contextlib
import fcntl
import json
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import PartialState
from safetensors.torch import save
from torch import Tensor

from scripts.data.files import write_bytes, write_text


def claim(directory: Path, main: bool) -> contextlib.AbstractContextManager[IO | None]:
    """Make the directory and lock it: two runs in one would spoil each other's checkpoints.

    The lock ends with the process, however that ends.  OSError, ValueError: it cannot be had.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w") if main else contextlib.nullcontext()
    except OSError as error:
        raise OSError(f"--run {directory} cannot be written ({error.strerror}): give another "
                      "directory") from None
    if main:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {directory}: stop it first, or give "
                             "another --run directory") from None
        except OSError:
            pass  # some network disks have no locks
    return lock


def step_of(line: str) -> int:
    """The step of a line of log.jsonl; 0 where a crash or a disk spoiled it."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else 0
    except (ValueError, TypeError, KeyError):
        return 0


def logged(directory: Path, name: str) -> list[float]:
    """The values of that name in the log of a run."""
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def all_finite(state: Any) -> bool:
    if isinstance(state, Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(map(all_finite, state.values()))
    return all(map(all_finite, state)) if isinstance(state, list | tuple) else True


def finish(directory: Path, name: str, state: dict[str, Tensor], config: Any,
           **others: Any) -> None:
    """Write a run's result: NAME.safetensors, then `others` as JSON files of their names, then
    NAME.json, without which it is not finished.

    One sentence each: FloatingPointError, weights that are not finite; OSError.
    """
    path = directory / f"{name}.safetensors"
    if not all_finite(state):
        raise FloatingPointError(f"{path} would hold weights that are not finite: train again with "
                                 "a lower --lr")
    try:
        write_bytes(path, save({k: v.detach().cpu().contiguous() for k, v in state.items()}))
        for file, content in (others | {name: config}).items():
            write_text(directory / f"{file}.json", json.dumps(content))
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): make room, and the same "
                      "command goes on from the last checkpoint") from None


def report(result: dict) -> None:
    """The last line of stdout, from one of the processes."""
    if PartialState().is_main_process:
        print(json.dumps(result))


def memory_gb(device: torch.device) -> float:
    """The most memory in GB that this process has held so far, on the device it trains on."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

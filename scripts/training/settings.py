"""The settings that all trainings share, and whether a run still is what it was begun as."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from scripts.training.cli import amount, duration, number, positive, setting, share, whole

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(kw_only=True)
class RunSettings:
    """How long, how large and where; each training adds its own and its own defaults."""

    run: Path = setting(help="directory of checkpoints and result", type=Path, free=True)
    steps: int = setting(12000, type=positive)
    time: float | None = setting(None, "instead of --steps, as in 90s, 20m, 2h", type=duration,
                                 free=True, instead_of="steps")
    batch: int = setting(16, "of each process", type=positive)
    lr: float = setting(1e-3, "peak learning rate", type=number(float, 0, 1e30), free=True)
    warmup: int = setting(200, "steps", type=whole)
    ema: float = setting(0.999, "decay of the averaged weights", type=share)
    dtype: str = setting("float32", "of autocast", choices=PRECISIONS)
    seed: int = setting(0, type=number(int, 0, 2**63 - 1))
    save_minutes: float = setting(3.0, "between checkpoints", type=amount, free=True)
    validations: int = setting(10, "in the whole run", type=positive)
    anyway: bool = setting(False, "train also where a --time is too short to be of use", free=True)


def identity(settings: Any, **facts: Any) -> dict[str, Any]:
    """What makes a run the one it is, as JSON has it: settings that are not free, and `facts`
    such as sizes and digests of its data."""
    fixed = {each.name: getattr(settings, each.name) for each in fields(settings)
             if not each.metadata.get("free")}
    return json.loads(json.dumps(fixed | facts, default=str))


def on_any_processes(own: dict[str, Any]) -> dict[str, Any]:
    """The same settings however the batch is divided: a run may go on with more processes, or
    fewer, as long as all of them together have the same batch."""
    whole = own["batch"] * own["processes"]
    return {name: value for name, value in own.items() if name not in ("batch", "processes")} | {
        "batch of all processes": whole}


def require_same(where: Path, was: dict[str, Any], now: dict[str, Any],
                 remedy: str = "give those again, or another --run directory") -> None:
    """ValueError, one sentence, where the run begun in `where` was another one."""
    changed = [f"{name} {before} became {after}" for name, before, after in differences(was, now)]
    if changed:
        raise ValueError(f"{where} holds a run with other settings ({', '.join(changed)}): "
                         f"{remedy}")


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, before, after) of what differs, names of nested settings as in gpt.width."""
    def flat(given: dict[str, Any], above: str = "") -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in given.items():
            result |= (flat(value, f"{above}{name}.") if isinstance(value, dict)
                       else {above + name: value})
        return result

    was, now = flat(was), flat(now)
    return [(name, was.get(name), now.get(name)) for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)]

"""Half an hour of a GPU: tests, speed and the default model's large preset, one after the other.

    python -m scripts.benchmark gpu --out runs/gpu [--minutes 30] [--only sample,train]
    python -m scripts.benchmark gpu --out runs/dry --micro      all of it in minutes, on any device

Each part is a command of this project in a process of its own, whose output is kept as NAME.log.  A
part that fails is named and the others go on; one that is done is not done again, so the same
command goes on where it was stopped.  The model gets the minutes that the others, by their limits,
leave.  It needs the emoji font (see scripts.emoji.scenes) and requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.data.files import write_text
from scripts.serving.schema import ROOT
from scripts.training.cli import amount

Figures = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """A command (after `python -m`), the minutes it may take, and what is told of its last line,
    which is JSON where `told` is given."""

    command: list[str]
    minutes: float
    told: Callable[[dict[str, Any]], Figures] | None = None


def sampled(result: dict[str, Any]) -> Figures:
    """ms a step by way and rows."""
    return {f"{each['name']}, {each['rows']} rows: ms a step": each["ms_per_step"]
            for each in result["results"]}


def trained(result: dict[str, Any]) -> Figures:
    ours, public = result["results"]
    return {"training: images a second": ours["images_per_s"],
            "training: times the public way": ours["images_per_s"] / public["images_per_s"]} | (
        {"training: MFU": ours["mfu"]} if ours.get("mfu") else {})


def scored(result: dict[str, Any]) -> Figures:
    names = ("object_right", "object_right_one_candidate", "both_objects_right",
             "both_objects_right_one_candidate", "frechet_ratio", "psnr_db")
    return {name: result[name] for name in names if name in result}


def stages(out: Path, minutes: float, micro: bool) -> dict[str, Stage]:
    """By name, in order."""
    bundle, judge = str(out / "bundle"), str(out / "judge.safetensors")
    small = ["--device", "cpu", "--steps", "2"] if micro else []
    size = "weights/emoji" if micro else "published"
    limits = {"tests": 3.0, "sample": 4.0, "train": 3.0, "judge": 4.0, "evaluate": 4.0}
    left = max(1.0, minutes - sum(limits.values()))
    look = ["--objects", "8" if micro else "244", "--stickers", "--file", judge]
    few = ["--steps", "3", "--renders", "64", "--count", "64"] if micro else []
    commands = {
        "tests": ["pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"],
        "sample": ["scripts.benchmark", "sample", "--size", size, "--rows", "1" if micro else
                   "1,16", "--baseline", "uncached", "--candidates", "2" if micro else "64",
                   "--images", "1" if micro else "8", *small],
        "train": ["scripts.benchmark", "train", "--size", size, *(["--batch", "2"] if micro
                                                                  else []), *small],
        "model": ["scripts.emoji.train", "--preset", "micro" if micro else "gpu", "--out", bundle,
                  "--run", str(out / "model"), *([] if micro else [
                      "--minutes", f"{left:.1f}", "--training", f"{max(1, int(0.75 * left))}"])],
        "judge": ["scripts.emoji.judge", "--train", *look, *few],
        "evaluate": ["scripts.emoji.evaluate", bundle, "--judge", judge, "--prompts",
                     "10" if micro else "200", *(["--candidates", "2"] if micro else []),
                     "--sheet", str(out / "sheet.png")]}
    told = {"sample": sampled, "train": trained, "evaluate": scored}
    return {name: Stage(command, limits.get(name, left + 2), told.get(name))
            for name, command in commands.items()}


def run(name: str, stage: Stage, out: Path) -> dict[str, Any]:
    """What is kept of a part: seconds, whether it did what it should, its figures, its last
    words."""
    began = time.monotonic()
    with open(out / f"{name}.log", "w+") as log:
        try:
            status = subprocess.run([sys.executable, "-m", *stage.command], cwd=ROOT, text=True,
                                    stdout=subprocess.PIPE, stderr=log, check=False,
                                    timeout=60 * stage.minutes)
        except subprocess.TimeoutExpired:
            return {"seconds": time.monotonic() - began, "done": False, "figures": {},
                    "said": f"not done after {stage.minutes:g} minutes"}
        log.write(status.stdout)
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()] or [""]
    figures: Figures = {}
    done, last = status.returncode == 0, (status.stdout.splitlines() or [""])[-1]
    if stage.told:
        # An evaluation by a judge that is not sure enough prints its scores, and ends with 1.
        done = last.startswith("{")
        figures = stage.told(json.loads(last)) if done else {}
    return {"seconds": time.monotonic() - began, "done": done, "figures": figures,
            "said": lines[-1][:200]}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark gpu", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("runs/gpu"), help="logs, model, sheet")
    p.add_argument("--minutes", type=amount, default=30.0, help="for all (30)")
    p.add_argument("--micro", action="store_true", help="small, to see that all of it runs")
    p.add_argument("--only", help="some parts, with commas: tests, sample, train, model, judge, "
                   "evaluate")
    a = p.parse_args(arguments)
    a.out = a.out.resolve()  # the parts run in the project's folder
    names = list(stages(a.out, a.minutes, a.micro))
    a.only = a.only.split(",") if a.only else names
    if odd := [name for name in a.only if name not in names]:
        raise ValueError(f"--only {odd[0]} is none of {', '.join(names)}")
    return a


def measure(a: argparse.Namespace) -> dict[str, Any]:
    a.out.mkdir(parents=True, exist_ok=True)
    kept = a.out / "parts.json"
    state: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for name, stage in stages(a.out, a.minutes, a.micro).items():
        if name not in a.only or state.get(name, {}).get("done"):
            continue
        print(f"{name}: {' '.join(stage.command)}", file=sys.stderr, flush=True)
        state[name] = run(name, stage, a.out)
        write_text(kept, json.dumps(state, indent=1))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "parts": state}


def table(result: dict[str, Any]) -> str:
    lines = [result["device"]]
    for name, part in result["parts"].items():
        lines.append(f"{name:10} {part['seconds']:6.0f} s  "
                     + ("done" if part["done"] else f"FAILED: {part['said']}"))
        lines += [f"           {figure:42} {value:.4g}"
                  for figure, value in part["figures"].items()]
    return "\n".join(lines)

"""How much faster a training recipe learns than a frozen one, side by side on the same cores.

    python -m scripts.benchmark speedrun gpt SHARDS [--minutes 30]
    python -m scripts.benchmark speedrun vqgan IMAGES --clip weights/emoji [--minutes 30]

`today` is the recipe of --against, flags of `train_gpt` or `train_vqgan` in a small file that stays
as it is; `new` is the recipe of --recipe, another such file, by default what `scripts.train` gives
a GPT on a CPU, at the same noise, and the default bundle a VQGAN.

How many steps each can do in the time is measured first, so that each ends its own schedule; then
the two take turns, step by step: whoever has spent less goes next.  Held-out scores are taken on a
fixed grid of times, outside the clock.

Printed are the scores over time and for each the ratio of the times at which the two reach the last
value of `today` (between two scores a straight line).  A recipe that never does has no ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from scripts.data import shards
from scripts.data.dataset import open_parts, stack_views
from scripts.training import plan
from scripts.training.cli import parse_settings, positive, whole
from scripts.training.gpt import GPTSettings, GPTTask, make_gpt
from scripts.training.trainer import State, start
from scripts.training.vqgan import VQGANSettings, VQGANTask, make_vqgan, perceptual_loss

TODAY = Path(__file__).with_name("today.json")
TRIAL = 6  # steps that measure speed; the first ones are slow
# Of each kind the scores that are compared, and whether less is better.
SCORES = {"gpt": {"token_ce": True, "token_ce_text": True},
          "vqgan": {"psnr_db": False, "perceptual": True}}
DEFAULT = {"gpt": [*(f"--{k}={v}" for k, v in plan.CPU_GPT.items()), "--noise=0.4"],
           "vqgan": ["--size=64", "--channels=128", "--patch=4", "--batch=4", "--lr=2e-3",
                     "--gan=0", "--scale=1", "--no-flip"]}
COLOURS = {"today": "#888888", "new": "#cc3311"}


@dataclass
class Contestant:
    """A recipe in a race: its training, how far it is and what it scored when."""

    training: State
    steps: int
    spent: float = 0.0  # seconds of its steps
    done: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    def step(self) -> None:
        began = time.perf_counter()
        self.training.step(self.done)["loss"].item()
        self.spent += time.perf_counter() - began
        self.done += 1

    def score(self, names: list[str]) -> None:
        scores = self.training.validate()[0]
        self.curve.append({"seconds": self.spent, "step": self.done}
                          | {name: scores[name] for name in names if name in scores})


def steps_in(make: Callable[[int], State], seconds: float) -> int:
    """How many steps fit into a time, by a short training that is thrown away."""
    trial = Contestant(make(TRIAL), TRIAL)
    took = []
    for _ in range(TRIAL):
        before = trial.spent
        trial.step()
        took.append(trial.spent - before)
    return max(1, int(seconds / statistics.median(took)))


def race(makers: dict[str, Callable[[int], State]], seconds: float, points: int,
         names: list[str]) -> dict[str, Contestant]:
    """Train each in turns for so many seconds; scores at the start and at `points` evenly spaced
    shares of its steps."""
    runners = {}
    for name, make in makers.items():
        steps = steps_in(make, seconds)
        runners[name] = Contestant(make(steps), steps)
        runners[name].score(names)
    while going := {k: r for k, r in runners.items() if r.done < r.steps}:
        name = min(going, key=lambda k: going[k].spent)
        runner = going[name]
        runner.step()
        due = min(points, len(runner.curve)) * runner.steps // points
        if runner.done >= due:
            runner.score(names)
            print(f"{name:8}" + "".join(f"{k} {v:<10.4g}" for k, v in runner.curve[-1].items()),
                  file=sys.stderr, flush=True)
    return runners


def reached(curve: list[dict[str, float]], name: str, value: float, less: bool) -> float | None:
    """The seconds at which a score is first as good as `value`; None if it never is.

    Before the first score nothing is known: a curve that begins as good says that time.
    """
    sign = 1 if less else -1
    before: dict[str, float] | None = None
    for point in curve:
        if sign * point[name] <= sign * value:
            if before is None or before[name] == point[name]:
                return point["seconds"]
            share = (before[name] - value) / (before[name] - point[name])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


def ratios(curves: dict[str, list[dict[str, float]]], scores: dict[str, bool]
           ) -> dict[str, dict[str, float | None]]:
    """Of each score today's last value, when each first reaches it, and today's time over new's."""
    result = {}
    for name, less in scores.items():
        if not all(name in point for curve in curves.values() for point in curve):
            continue
        value = curves["today"][-1][name]
        times = {who: reached(curve, name, value, less) for who, curve in curves.items()}
        result[name] = {"value": value, **times,
                        "ratio": times["today"] / times["new"] if times["new"] else None}
    return result


def flags_of(path: Path, kind: str) -> list[str]:
    """The flags of a recipe file, {"gpt": [...], "vqgan": [...]}.  ValueError: it is none."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8"))[kind]
        if not all(isinstance(flag, str) for flag in flags):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no list of flags for {kind}: give a file such as {TODAY}"
                         ) from None
    return flags


def gpt_maker(a: argparse.Namespace, flags: list[str]) -> Callable[[int], State]:
    settings = parse_settings(
        GPTSettings, [a.source, *flags, f"--seed={a.seed}", "--run=unused"], "")
    accelerator = start(settings.dtype, settings.seed)
    data, held = shards.read_shards(a.source), shards.read_shards(a.source, "validation")

    def make(steps: int) -> State:
        torch.manual_seed(a.seed)
        task = GPTTask(settings, accelerator, make_gpt(settings, data), data, held)
        return State(task, settings, accelerator, steps)

    return make


def vqgan_maker(a: argparse.Namespace, flags: list[str]) -> Callable[[int], State]:
    given = [*(["--clip", a.clip] if a.clip else []),
             *(["--validation", a.validation] if a.validation else [])]
    settings = parse_settings(
        VQGANSettings, [a.source, *given, *flags, f"--seed={a.seed}", "--run=unused"], "")
    accelerator = start(settings.dtype, settings.seed)
    images, held, _ = open_parts(settings.images, settings.validation, settings.held_out)
    perceptual = perceptual_loss(settings)

    def make(steps: int) -> State:
        torch.manual_seed(a.seed)
        vqgan = make_vqgan(settings)
        pixels = stack_views(held, vqgan.config.image_size, 256)[1]
        task = VQGANTask(settings, accelerator, steps, vqgan, images, pixels, perceptual)
        return State(task, settings, accelerator, steps)

    return make


MAKERS = {"gpt": gpt_maker, "vqgan": vqgan_maker}


def measure(a: argparse.Namespace) -> dict[str, Any]:
    make = MAKERS[a.kind]
    flags = {"today": flags_of(a.against, a.kind),
             "new": flags_of(a.recipe, a.kind) if a.recipe else DEFAULT[a.kind]}
    runners = race({name: make(a, own) for name, own in flags.items()}, 60 * a.minutes, a.points,
                   list(SCORES[a.kind]))
    curves = {name: runner.curve for name, runner in runners.items()}
    result = {"kind": a.kind, "minutes": a.minutes, "seed": a.seed,
              "threads": torch.get_num_threads(), "flags": flags, "curves": curves,
              "ms_per_step": {name: 1000 * r.spent / r.done for name, r in runners.items()},
              "ratios": ratios(curves, SCORES[a.kind])}
    if a.plot:
        plot(curves, list(result["ratios"])).save(a.plot)
    return result


def table(r: dict[str, Any]) -> str:
    lines = [f"{r['kind']}, {r['minutes']:g} minutes each, threads {r['threads']}, "
             f"seed {r['seed']}"]
    names = list(r["ratios"])
    for who, curve in r["curves"].items():
        lines += [f"{who}: {r['ms_per_step'][who]:.0f} ms a step",
                  f"{'seconds':>9}{'step':>8}" + "".join(f"{name:>15}" for name in names)]
        lines += [f"{p['seconds']:9.0f}{p['step']:8d}" + "".join(f"{p[n]:15.4f}" for n in names)
                  for p in curve]
    for name, x in r["ratios"].items():
        ratio = "never" if x["ratio"] is None else (f"{x['ratio']:.2f} × ({x['today']:.0f} s, "
                                                    f"{x['new']:.0f} s)")
        lines.append(f"{name} {x['value']:.4f} is reached: {ratio}")
    return "\n".join(lines)


def plot(curves: dict[str, list[dict[str, float]]], names: list[str]) -> Image.Image:
    """A panel for each score over time, both recipes in each."""
    wide, high, edge = 480, 320, 48
    image = Image.new("RGB", (wide * len(names), high), "white")
    pen = ImageDraw.Draw(image)
    end = max(point["seconds"] for curve in curves.values() for point in curve) or 1.0
    for i, name in enumerate(names):
        values = [point[name] for curve in curves.values() for point in curve]
        low, span = min(values), (max(values) - min(values)) or 1.0
        left, right, top, bottom = i * wide + edge, (i + 1) * wide - 16, 28, high - edge
        pen.rectangle((left, top, right, bottom), outline="black")
        pen.text((left, 8), name, fill="black")
        pen.text((i * wide + 4, top), f"{low + span:.4g}", fill="black")
        pen.text((i * wide + 4, bottom - 12), f"{low:.4g}", fill="black")
        pen.text((right - 40, bottom + 6), f"{end:.0f} s", fill="black")
        for j, (who, curve) in enumerate(curves.items()):
            places = [(left + point["seconds"] / end * (right - left),
                       bottom - (point[name] - low) / span * (bottom - top)) for point in curve]
            pen.line(places, fill=COLOURS[who], width=2)
            pen.text((left + 100 * j, bottom + 6), who, fill=COLOURS[who])
    return image


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark speedrun", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("kind", choices=MAKERS)
    add("source", help="shards with captioned validation images (gpt), or images (vqgan)")
    add("--minutes", type=float, default=30.0, help="of steps, for each recipe (30)")
    add("--points", type=positive, default=12, help="scores of each, evenly spaced (12)")
    add("--against", type=Path, default=TODAY, help="the frozen recipe (benchmarks/today.json)")
    add("--recipe", type=Path, help="that of `new` (default: see above)")
    add("--clip", help="vqgan: of the perceptual distance")
    add("--validation", help="vqgan: images that are not trained on")
    add("--seed", type=whole, default=0)
    add("--plot", type=Path, help="write the curves there, a PNG")
    a = p.parse_args(arguments)
    if not 0 < a.minutes < float("inf"):
        raise ValueError(f"--minutes must be above 0, got {a.minutes}")
    return a

"""What busy neighbours cost: the time of `ClipGen.generate` beside processes that keep cores busy.

Two processes hold the bundle and take turns, quiet and beside the busy ones: `new` with the threads
and the spinning of `clipgen.threads`, or those that the environment gives; `plain` with OpenMP's
own spinning, and its own threads unless the environment gives them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipgen import threads
from scripts.serving.schema import ROOT

ROUNDS = 3
WAYS = ("plain", "new")
CHILD = """
import sys, time
from clipgen import ClipGen
weights, text, images, candidates = sys.argv[1:]
model = ClipGen.load(weights, "cpu")
def call():
    began = time.perf_counter()
    model.generate(text, int(images), int(candidates), seed=0)
    return time.perf_counter() - began
call()
print("ready", flush=True)
for line in sys.stdin:
    print(call(), flush=True)
"""


class Child:
    """A process that generates when it is asked to; one way of WAYS."""

    def __init__(self, way: str, a: argparse.Namespace, text: str):
        ours = set() if way == "new" else threads.SPINNING | threads.SETTLED.keys()
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", CHILD, str(Path(a.size).resolve()), text,
             str(min(a.images, a.candidates)), str(a.candidates)], cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self) -> str:
        if not (line := self.process.stdout.readline()):
            raise ChildProcessError(f"a process of the measurement ended with status "
                                    f"{self.process.wait()}")
        return line

    def seconds(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer())


@contextlib.contextmanager
def ended(processes: list[subprocess.Popen]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def beside(count: int) -> contextlib.AbstractContextManager[None]:
    """Processes of one thread that compute until the context ends."""
    return ended([subprocess.Popen([sys.executable, "-c", "while True: pass"])
                  for _ in range(count)])


def measure(a: argparse.Namespace, text: str) -> dict[str, Any]:
    """Medians of seconds; `ratio` is busy by quiet, `quiet_ratio` new by plain."""
    children = {way: Child(way, a, text) for way in WAYS}
    took: dict[tuple[str, int], list[float]] = {}
    with ended([child.process for child in children.values()]):
        for child in children.values():
            child.answer()
        for _ in tqdm(range(ROUNDS), desc="measuring", file=sys.stderr):
            for count in (0, a.busy):
                with beside(count):
                    for way, child in children.items():
                        took.setdefault((way, count), []).append(child.seconds())
    found = {way: {"quiet_s": statistics.median(took[way, 0]),
                   "busy_s": statistics.median(took[way, a.busy])} for way in WAYS}
    for times in found.values():
        times["ratio"] = times["busy_s"] / times["quiet_s"]
    names = sorted({"OMP_NUM_THREADS"} | threads.SPINNING)
    return {"size": a.size, "busy": a.busy, "candidates": a.candidates,
            "images": min(a.images, a.candidates), "cores": threads.own_cores(),
            "set": {name: os.environ[name] for name in names if name in os.environ}, **found,
            "quiet_ratio": found["new"]["quiet_s"] / found["plain"]["quiet_s"]}


def table(r: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={value}" for name, value in r["set"].items()) or "nothing set"
    return "\n".join([
        f"{r['images']} images of {r['candidates']} candidates on {r['cores']} cores, quiet and "
        f"beside {r['busy']} busy processes; new has {told}",
        *(f"{way:6}{r[way]['quiet_s']:8.3f} s quiet{r[way]['busy_s']:9.3f} s busy"
          f"{r[way]['ratio']:8.2f} times as long" for way in WAYS),
        f"quiet, new takes {r['quiet_ratio']:.3f} times as long as plain"])

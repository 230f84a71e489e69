"""From the start of a process to a model that is ready, by part, and to a server that is.

    python -m scripts.benchmark start [--weights weights/emoji] [--device cpu]

python        the interpreter
torch, open_clip, clipgen   importing each, in this order: what one brings the next finds there
reading       the bundle's files to modules on the CPU, every byte hashed and checked
moving        those to the device
preparing     packing weights on a CPU, capturing graphs on CUDA
ready         all of it: a process that can generate
server        the real Cog server, from its start to READY; beyond: what that takes longer
bytes         reading the same files once and no more, for comparison; they are cached, since the
              bundle was read just before
cold reading, cold bytes    the same two with the files dropped from the system's cache before, as
              at the first start of a machine; Linux alone drops them, and from disks alone

Numbers are medians over --times processes, each new.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipgen.bundle import FILES
from clipgen.device import find_device
from scripts.benchmarks.serve import serving
from scripts.serving.schema import ROOT
from scripts.training.cli import positive

# The clock is the machine's, so that it goes on from this process to the next.
CHILD = """
import json, os, sys, time
times = [time.monotonic()]
def done(): times.append(time.monotonic())
import torch; done()
import open_clip.model; done()
import clipgen.bundle, clipgen.device, clipgen.pipeline; done()
weights, device = sys.argv[1:]
device = torch.device(device)
dtype = clipgen.device.default_dtype(device)
def load(): return clipgen.bundle.load_bundle(weights, "cpu", dtype)
bundle = load(); done()
for part in (bundle.clip, bundle.vqgan, bundle.gpt):
    part.to(device)
if device.type == "cuda": torch.cuda.synchronize()
done()
model = clipgen.ClipGen(bundle)
if device.type == "cuda": torch.cuda.synchronize()
done()
buffer = bytearray(2**22)
files = [f"{weights}/{name}" for name in clipgen.bundle.FILES.values()]
def read():
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer): pass
read(); done()
del bundle, model, part
def cold(call):
    for path in files if hasattr(os, "posix_fadvise") else ():
        with open(path, "rb") as file: os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.monotonic(); call()
    return time.monotonic() - began
print(json.dumps([times, {"cold reading": cold(load), "cold bytes": cold(read)}]))
"""
PARTS = ("python", "torch", "open_clip", "clipgen", "reading", "moving", "preparing", "bytes")


def sync(weights: Path) -> None:
    """Let files that were just written be on the disk: else they cannot leave the cache."""
    for name in FILES.values():
        with open(weights / name, "rb") as file:
            os.fsync(file.fileno())


def one_process(weights: Path, device: str) -> dict[str, float]:
    """Seconds of every part but the server's."""
    sync(weights)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, str(weights), device], cwd=ROOT, text=True,
                          capture_output=True)
    if done.returncode:
        raise ChildProcessError(done.stderr.strip().splitlines()[-1])
    times, cold = json.loads(done.stdout)
    times = [began, *times]
    parts = {name: after - before
             for name, before, after in zip(PARTS, times[:-1], times[1:], strict=True)}
    return parts | cold | {"ready": times[-2] - began}


def measure(a: argparse.Namespace) -> dict[str, Any]:
    find_device(a.device)
    rounds = []
    for _ in tqdm(range(a.times), desc="starting", file=sys.stderr):
        parts = one_process(a.weights, a.device)
        began = time.monotonic()
        with serving(a.weights):
            parts["server"] = time.monotonic() - began
        parts["beyond"] = parts["server"] - parts["ready"]
        rounds.append(parts)
    result = {name: statistics.median(parts[name] for parts in rounds) for name in rounds[0]}
    ours = sum(result[name] for name in ("clipgen", "reading", "moving", "preparing"))
    return {"weights": str(a.weights), "device": a.device, "times": a.times, "seconds": result,
            "ours": ours, "reading_over_bytes": result["reading"] / result["bytes"],
            "cold_reading_over_bytes": result["cold reading"] / result["cold bytes"]}


def table(r: dict[str, Any]) -> str:
    return "\n".join([*(f"{name:13}{value:8.2f} s" for name, value in r["seconds"].items()),
                      f"ours, without the imports of torch and open_clip: {r['ours']:.2f} s; "
                      f"reading takes {r['reading_over_bytes']:.2f} times as long as its bytes, "
                      f"{r['cold_reading_over_bytes']:.2f} times where they are not cached"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.benchmark start", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--weights", type=Path, default=ROOT / "weights" / "emoji", help="bundle (weights/emoji)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="of the process; the server takes "
        "CUDA where there is one (cpu)")
    add("--times", type=positive, default=3, help="processes (3)")
    a = p.parse_args(arguments)
    if not (a.weights / "config.json").is_file():
        raise ValueError(f"--weights {a.weights} is no bundle, it has no config.json")
    a.weights = a.weights.resolve()
    return a

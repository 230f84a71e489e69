"""The training scripts, in this process or another, on data so small that a step takes
milliseconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.data import shards
from scripts.training import checkpoints
from tests.shapes import write as write_images

# Sums of more threads may differ in the last bit.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
              "PYTHONPATH": os.getcwd()}
# On CPUs: accelerate's own --cpu starts one process, however many are asked for.
TWO_PROCESSES = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                 "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                 "--main_process_port", "0")
STEPS = {"train_gpt": 200, "train_vqgan": 24, "train_clip": 20, "train_text": 20}
# Everything that draws random numbers or keeps a state of its own is on, and all of it is saved.
FLAGS = {
    "train_gpt": ("--layers", 1, "--width", 32, "--heads", 2, "--batch", 8, "--dropout", 0.1,
                  "--noise-kind", "random", "--corruption", 0.5, "--optimizer", "muon",
                  "--validations", 4),
    "train_vqgan": ("--perceptual-loss", "none", "--size", 32, "--channels", "32,32,32",
                    "--codebook-size", 256, "--batch", 4, "--gan-weight", "adaptive", "--gan-start",
                    0.4, "--validations", 3),
    "train_clip": ("--size", 32, "--width", 8, "--text-width", 32, "--text-layers", 1, "--batch",
                   8, "--validations", 4),
    "train_text": ("--clip", "weights/emoji", "--batch", 8, "--validations", 4)}


def micro_shards(directory: Path, spoilt: int | None = None) -> Path:
    """Random codes of 4x4 and embeddings of 16; those of the image `spoilt` are infinite."""
    rng = np.random.default_rng(0)
    directory.mkdir()
    parts = {}
    for part, count in (("train", 64), ("validation", 8)):
        embeddings = rng.normal(size=(count, 2, 16))
        if spoilt is not None and part == "train":
            embeddings[spoilt] = np.inf
        shards.write_shard(directory, part, 0, {
            "codes": rng.integers(0, 32, (count, 2, 16)), "embeddings": embeddings,
            "texts": rng.normal(size=(count, 16)), "images": np.arange(count)})
        parts[part] = [shards.describe_shard(directory, part, 0)]
    shards.write_manifest(directory, {
        "crops": 2, "grid": [4, 4], "codebook_size": 32, "embedding_dim": 16, "clip_sha256": "c",
        "vqgan_sha256": "v", "text_mean": rng.normal(size=16).tolist(), "parts": parts})
    return directory


def micro_images(directory: Path) -> Path:
    """40 images of 40 pixels with two captions each."""
    write_images(directory, 40, 40)
    for path in directory.glob("*.png"):
        words = path.stem.replace("-", " ")[5:]
        path.with_suffix(".txt").write_text(f"an image of {words}\n{words}")
    return directory


def begin(script: str, data: Path, run: Path, *flags: object, processes: int = 1
          ) -> subprocess.Popen:
    """Start a training of STEPS and FLAGS; `flags` come last, so they can replace those."""
    command = [sys.executable, "-m", *((*TWO_PROCESSES, "-m") if processes == 2 else ()),
               f"scripts.{script}", data, "--run", run, *FLAGS[script],
               *(() if "--time" in flags else ("--steps", STEPS[script])), *flags]
    return start(*command)


def start(*command: object) -> subprocess.Popen:
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ONE_THREAD)


def end(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a process that must end with that exit status, without a traceback."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == status, f"exit status {process.returncode}: {errors}"
    assert "Traceback" not in errors, errors
    return out, errors


def train(script: str, data: Path, run: Path, *flags: object, processes: int = 1) -> dict:
    """Train to the end; returns the JSON that is printed.  One process: this one."""
    if processes == 1:
        return json.loads(json.dumps(here(script, data, run, *flags)))
    process = begin(script, data, run, *flags, processes=processes)
    return json.loads(end(process)[0].splitlines()[-1])


def sentence(script: str, data: Path, run: Path, *flags: object) -> str:
    """Why a training fails, in this process."""
    with pytest.raises(SystemExit) as stop:
        here(script, data, run, *flags)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def here(script: str, data: Path, run: Path, *flags: object) -> dict:
    """What the script's main returns in this process, on one thread as in those that `begin`
    starts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return import_module(f"scripts.{script}").main(
            [str(word) for word in (data, "--run", run, *FLAGS[script], "--steps", STEPS[script],
                                    *flags)])
    finally:
        torch.set_num_threads(threads)


def saved(run: Path) -> list[int]:
    """The steps of the checkpoints, newest first."""
    return [step for step, _ in checkpoints.found(run)]


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Until something happened that the process does before it ends."""
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Until the checkpoint of that step, or a later one, is there."""
    wait_until(process, lambda: max(saved(run), default=0) >= step)


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of the result."""
    return {path.name: path.read_bytes() for path in run.glob("*.safetensors")}


def log(run: Path, name: str) -> dict[int, float]:
    """Step to value of a name in log.jsonl, where a step may occur but once."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    entries = [(line["step"], line[name]) for line in lines if name in line]
    steps = [step for step, _ in entries]
    assert steps == sorted(set(steps))
    return dict(entries)

"""What numbers too small for float32's normal form cost a VQGAN's training on a CPU.

    python -m scripts.benchmark denormals IMAGES --run RUN ...    with the flags of that run

Goes on from the last checkpoint of a run of `train_vqgan`, in memory alone, with such numbers taken
as zero, as all trainings do, and without, in turns; processor time of a step, medians.  A young run
has few of them: look at one of some thousand steps.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from scripts.data.dataset import open_parts, stack_views
from scripts.training import checkpoints
from scripts.training.cli import parse_settings
from scripts.training.trainer import State, start
from scripts.training.vqgan import (
    PUBLISHED,
    VQGANSettings,
    VQGANTask,
    make_vqgan,
    perceptual_loss,
)

BLOCKS, STEPS = 12, 2  # blocks of so many steps; one more before each is not counted


def parse(arguments: list[str]) -> VQGANSettings:
    return parse_settings(VQGANSettings, arguments, __doc__, "scripts.benchmark denormals",
                          {"published": PUBLISHED})


def measure(settings: VQGANSettings) -> dict[str, Any]:
    """ValueError: the run has no checkpoint."""
    accelerator = start(settings.dtype, settings.seed)
    checkpoint = checkpoints.load(settings.run, report=False)
    if checkpoint is None:
        raise ValueError(f"{settings.run} has no checkpoint: give the --run of a train_vqgan that "
                         "is under way or done")
    vqgan = make_vqgan(settings)
    images, held, _ = open_parts(settings.images, settings.validation, settings.held_out)
    _, pixels = stack_views(held, vqgan.config.image_size, 1)
    step, steps = checkpoint["step"], checkpoint["step"] + BLOCKS * (STEPS + 1)
    task = VQGANTask(settings, accelerator, steps, vqgan, images, pixels, perceptual_loss(settings))
    state = State(task, settings, accelerator, steps)
    state.load_state_dict(checkpoint["training"])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for block in range(BLOCKS):
        flush = block % 2 == 0
        torch.set_flush_denormal(flush)
        for k in range(STEPS + 1):
            began = time.process_time()
            state.step(step)
            step += 1
            if k:
                seconds[flush].append(time.process_time() - began)
    torch.set_flush_denormal(True)
    as_zero, as_they_are = (statistics.median(seconds[flush]) for flush in (True, False))
    return {"step": checkpoint["step"], "seconds_as_zero": round(as_zero, 4),
            "seconds_as_they_are": round(as_they_are, 4),
            "ratio": round(as_they_are / as_zero, 3)}


def table(result: dict[str, Any]) -> str:
    return (f"after step {result['step']}: {result['seconds_as_zero']} s of processor time a step, "
            f"{result['seconds_as_they_are']} s with denormal numbers as they are, "
            f"{result['ratio']} times as much")

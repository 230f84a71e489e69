"""Images to training: which ones are trained on, and the batch of each step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from scripts.data.images import Images, by_hash, split
from scripts.data.presets import open_images
from scripts.data.reading import PLAIN, Reading
from scripts.data.transforms import all_views, batches


def open_parts(source: str, validation: str | None, held_out: float,
               captions: Path | None = None,
               reading: Reading = PLAIN) -> tuple[Images, Images, str]:
    """(images to train on, images held out, fingerprint of the former).

    Held out is the set at `validation`, else the source's own, else a share of it; in no order, so
    that the first few of them stand for all.
    """
    images, held = open_images(source, captions, reading)
    if validation:
        train, part = open_images(validation, captions, reading)
        held = part or train
    if held is None:
        images, held = split(images, held_out)
    else:
        held = held.subset(by_hash(held))
    return images, held, images.fingerprint()


def refuse_inside(source: str, **directories: Path) -> None:
    """ValueError: a directory that is written to lies in the folder of the images."""
    folder = Path(source).resolve()
    for name, path in directories.items():
        if folder.is_dir() and folder in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"--{name} {path} lies in the folder of the images, and what is "
                             "written there would count as one of them: give one outside")


def stack_views(images: Images, size: int, count: int) -> tuple[list[int], Tensor]:
    """Indices and centre views uint8 (N, 3, S, S) of the first readable images, at most `count`."""
    indices: list[int] = []
    views: list[Tensor] = []
    for index, pixels in all_views(images, size, 32):
        indices += index.tolist()
        views.append(pixels)
        if len(indices) >= count:
            break
    return indices[:count], torch.cat(views)[:count]


class BatchLoader:
    """The batch of a step, for this process: indices (B,) and pixels uint8 (B, 3, S, S).

    A function of the step alone; steps taken in order are read ahead, by `workers` processes.
    `batch` is that of this process, `scale` and `flip` are as in `random_view`, `together` as in
    `order`.
    """

    def __init__(self, images: Images, size: int, accelerator: Accelerator, steps: int, *,
                 batch: int, seed: int, scale: float, flip: bool, workers: int,
                 together: int = 1):
        self.images, self.size, self.steps, self.workers = images, size, steps, workers
        self.ahead = max(1, steps // 10)  # of a run that turns out longer than planned
        self.settings = {"batch": batch, "seed": seed, "scale": scale, "flip": flip,
                         "rank": accelerator.process_index, "world": accelerator.num_processes,
                         "together": together}
        self.next = -1
        self.iterator: Iterator[tuple[Tensor, Tensor]] = iter(())

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        if step != self.next or step >= self.steps:
            self.steps = max(self.steps, step + self.ahead)
            self.iterator = self.batches(step, self.steps - step, self.workers)
        self.next = step + 1
        return next(self.iterator)

    def batches(self, step: int, steps: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `steps` steps from `step`; asking for them moves nothing."""
        return iter(batches(self.images, self.size, first_step=step, steps=steps, workers=workers,
                            **self.settings))

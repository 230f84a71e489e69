"""What training sees of an image: a square of it, scaled; a pure function of seed and place.

Step s of a run reads the positions s * world * batch to (s + 1) * world * batch - 1 of an endless
sequence, rank r the r-th stretch of `batch`.  The sequence is one permutation of all images after
another.  Nothing depends on what was read before, so a run that goes on at any step, with any
number of worker processes, sees what an uninterrupted one would have, and two ranks of batch B see
together what one of batch 2B sees.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipgen.images import UnreadableImage, centre_square, square
from scripts.data.images import Images

MOST_TRIES = 1000  # unreadable images in a row, after which something else must be wrong
ORDER, VIEW = 0, 1  # separate the random streams of one seed


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def centre_view(image: Image.Image, size: int) -> Tensor:
    """The centre square of an RGB image, scaled: uint8 (3, size, size)."""
    return _tensor(centre_square(image, size))


def random_view(image: Image.Image, size: int, rng: np.random.Generator, scale: float = 0.85,
                flip: bool = True) -> Tensor:
    """A random square of an RGB image, scaled: uint8 (3, size, size).

    Its side is `scale` to 1 times the image's shorter side, its place anywhere in the image; with
    `flip` every other one is mirrored.
    """
    u_side, u_left, u_top, u_flip = rng.random(4)
    shorter = min(image.size)
    side = max(1, round(shorter * (scale + (1 - scale) * u_side)))
    left, top = int(u_left * (image.width - side + 1)), int(u_top * (image.height - side + 1))
    pixels = square(image, left, top, side, size)
    return _tensor(pixels[:, ::-1] if flip and u_flip < 0.5 else pixels)


def least_side(size: int, scale: float = 1.0) -> int:
    """How large a JPEG must still come for a view to lose nothing by it: twice its own size."""
    return int(2 * size / scale) + 1


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> Tensor:
    rng = np.random.default_rng((seed, ORDER, epoch))
    return torch.from_numpy(rng.permutation(count))


def order(count: int, position: int, length: int, seed: int, together: int = 1) -> Tensor:
    """Indices int64 (length,) of the samples from `position` on, of an endless sequence.

    The sequence is a permutation of 0 to count - 1, then another one, each keyed by (seed, epoch).
    Stretches of so many `together` are permuted as one; a rest of the count is left out.
    """
    if together > 1:
        first, last = position // together, (position + length - 1) // together
        stretches = order(count // together, first, last - first + 1, seed)
        inside = torch.arange(together)
        return (stretches[:, None] * together + inside).flatten()[position % together:][:length]
    epochs = range(position // count, (position + length - 1) // count + 1)
    start = position - epochs.start * count
    return torch.cat([_permutation(count, seed, e) for e in epochs])[start:start + length]


class ViewDataset(Dataset):
    """Maps (index, key) to (index used, pixels uint8 (3, size, size)).

    A key, any ints, names a random view; None is the centre view.  An unreadable image is replaced
    by the next readable one; the index used is -1 where there is none.
    """

    def __init__(self, images: Images, size: int, scale: float = 0.85, flip: bool = True):
        if not 0 < scale <= 1:
            raise ValueError(f"the scale of random views must lie above 0 and at most at 1, "
                             f"got {scale}")
        self.images, self.size, self.scale, self.flip = images, size, scale, flip

    def __getitem__(self, item: tuple[int, tuple[int, ...] | None]) -> tuple[int, Tensor]:
        index, key = item
        for _ in range(min(len(self.images), MOST_TRIES)):
            try:
                image = self.images.image(index, least_side(self.size, self.scale))
            except UnreadableImage:
                index = (index + 1) % len(self.images)
                continue
            if key is None:
                return index, centre_view(image, self.size)
            rng = np.random.default_rng(key)
            return index, random_view(image, self.size, rng, self.scale, self.flip)
        return -1, torch.zeros(3, self.size, self.size, dtype=torch.uint8)


class _Skipped:
    """Names every unreadable image once on stderr."""

    def __init__(self, images: Images):
        self.images, self.seen = images, set()

    def report(self, asked: int, used: int) -> None:
        """`used` was read instead of `asked`.  ValueError: nothing could be read."""
        if used < 0:
            raise ValueError(f"no image can be read: {self.reason(asked)}; nor any after it")
        while asked != used:
            if asked not in self.seen:
                self.seen.add(asked)
                print(f"skipped {self.reason(asked)}", file=sys.stderr)
            asked = (asked + 1) % len(self.images)

    def reason(self, i: int) -> str:
        """NAME: reason, found by reading again, since a worker process found it first."""
        try:
            self.images.image(i)
        except UnreadableImage as error:
            return str(error)
        return f"{self.images.names[i]}: could not be read a moment ago"


def _load(views: ViewDataset, plan: list | Iterator, workers: int) -> DataLoader:
    # A generator of its own: otherwise the loader draws from torch's, which belongs to the run.
    return DataLoader(views, batch_sampler=plan, num_workers=workers, generator=torch.Generator())


def batches(images: Images, size: int, batch: int, *, seed: int, first_step: int, steps: int,
            rank: int = 0, world: int = 1, scale: float = 0.85, flip: bool = True,
            workers: int = 0, together: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Random views for `steps` steps of a run from `first_step` on, one batch a step.

    Yields indices int64 (batch,) and pixels uint8 (batch, 3, size, size).  `batch` is that of this
    rank, `together` as in `order`.  Unreadable images are replaced and named once on stderr.
    ValueError: none is readable.
    """
    def plan() -> Iterator[list[tuple[int, tuple[int, int, int]]]]:
        for step in range(first_step, first_step + steps):
            start = (step * world + rank) * batch
            indices = order(len(images), start, batch, seed, together).tolist()
            yield [(i, (seed, VIEW, start + slot)) for slot, i in enumerate(indices)]

    skipped = _Skipped(images)
    views = ViewDataset(images, size, scale, flip)
    for asked, (used, pixels) in zip(plan(), _load(views, plan(), workers), strict=True):
        for (index, _), found in zip(asked, used.tolist(), strict=True):
            if index != found:
                skipped.report(index, found)
        yield used, pixels


def all_views(images: Images, size: int, batch: int,
              workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Centre views of all images in order: indices int64 (n,), pixels uint8 (n, 3, size, size).

    n is at most `batch`; unreadable images are left out and named once on stderr.  ValueError:
    none is readable.
    """
    def plan() -> Iterator[list[tuple[int, None]]]:
        for start in range(0, len(images), batch):
            yield [(i, None) for i in range(start, min(start + batch, len(images)))]

    skipped = _Skipped(images)
    views = ViewDataset(images, size, scale=1.0)
    for asked, (used, pixels) in zip(plan(), _load(views, plan(), workers), strict=True):
        for (index, _), found in zip(asked, used.tolist(), strict=True):
            if index != found:
                skipped.report(index, found)
        kept = used == torch.tensor([index for index, _ in asked])
        if kept.any():
            yield used[kept], pixels[kept]

"""The judge of the default bundle's world: a classifier of objects, place and time, without CLIP.

    python -m scripts.emoji.judge --train --objects 40 [--stickers]    writes judge.safetensors
    python -m scripts.emoji.judge                           scores it on 4,000 new renders

--file is another place for it, which emoji.evaluate --judge takes.

It learns from fresh renders with augmentation and has seen no generated image.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.emoji.painter import PLAIN, STICKERS, Look
from scripts.emoji.scenes import Scenes, draw_scene, emoji_sprites, find_font
from scripts.emoji.world import COLOURS, OBJECTS, PLACES, TIMES, Labels
from scripts.training.cli import number, positive
from scripts.training.optim import EMA, adamw, learning_rate, set_learning_rate

WEIGHTS = Path(__file__).with_name("judge.safetensors")
ALL_PLACES, ALL_TIMES = [*PLACES, *COLOURS], list(TIMES)
FIRST_SEED, FRESH_SEED = 100_000_000, 200_000_000  # its renders are nobody else's
SIZE = 64  # what it looks at


class Judge(nn.Module):
    """Pixels (N, 3, S, S) in [0, 1] to logits: "objects" (N, O), of which several may be there,
    "place" (N, 21) and "time" (N, 4), of which one is."""

    def __init__(self, objects: int, look: Look = PLAIN):
        super().__init__()
        self.objects, self.look = list(OBJECTS)[:objects], look
        widths = ((3, 32, 2), (32, 64, 1), (64, 96, 2), (96, 128, 1), (128, 160, 2),
                  (160, 160, 1))
        self.features = nn.Sequential(*(
            layer for i, o, stride in widths
            for layer in (nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())))
        self.dimensions = widths[-1][1]
        self.heads = nn.ModuleDict({q: nn.Linear(self.dimensions, n) for q, n in
                                    (("objects", objects), ("place", len(ALL_PLACES)),
                                     ("time", len(ALL_TIMES)))})

    def embed(self, pixels: Tensor) -> Tensor:
        """Penultimate features (N, dimensions)."""
        if pixels.shape[-1] != SIZE:
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="area")
        return self.features(pixels * 2 - 1).amax((2, 3))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        h = self.embed(pixels)
        return {question: head(h) for question, head in self.heads.items()}

    def halves(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of objects (N, O) by the features of the left half of a picture, and the right."""
        if pixels.shape[-1] != SIZE:
            pixels = F.interpolate(pixels, (SIZE, SIZE), mode="area")
        features = self.features(pixels * 2 - 1)
        return tuple(self.heads["objects"](half.amax((2, 3))) for half in features.chunk(2, 3))

    def targets(self, labels: Sequence[Labels]) -> dict[str, Tensor]:
        """objects float (N, O), place and time int64 (N,), time -1 where there is none."""
        objects = torch.zeros(len(labels), len(self.objects))
        for row, each in zip(objects, labels, strict=True):
            row[[self.objects.index(name) for name in each.objects]] = 1
        return {"objects": objects,
                "place": torch.tensor([ALL_PLACES.index(each.place) for each in labels]),
                "time": torch.tensor([ALL_TIMES.index(each.time) if each.time else -1
                                      for each in labels])}

    @torch.no_grad()
    def right(self, pixels: Tensor, labels: Sequence[Labels]) -> dict[str, list[bool | None]]:
        """Which images show what their labels say; None where there is no question.

        `objects`: the one or two kinds named are the surest, whatever else there is; `place`,
        `time`: the surest.  ValueError: an object that the judge never learned.
        """
        if unknown := {name for each in labels for name in each.objects} - {*self.objects}:
            raise ValueError(f"the judge never learned {', '.join(sorted(unknown))}: train it with "
                             "scripts.emoji.judge --train --objects N")
        device = next(self.parameters()).device
        parts = [self(part.to(device)) for part in pixels.split(64)]
        answers = {q: torch.cat([part[q] for part in parts]).cpu() for q in self.heads}
        sure = answers["objects"].topk(2, 1).indices.tolist()
        objects = [{self.objects[i] for i in indices[:len(set(each.objects))]} == set(each.objects)
                   for indices, each in zip(sure, labels, strict=True)]
        places = [ALL_PLACES[i] == each.place for i, each in
                  zip(answers["place"].argmax(1).tolist(), labels, strict=True)]
        times = [ALL_TIMES[i] == each.time if each.time else None for i, each in
                 zip(answers["time"].argmax(1).tolist(), labels, strict=True)]
        return {"objects": objects, "place": places, "time": times}

    @torch.no_grad()
    def sides_right(self, pixels: Tensor, labels: Sequence[Labels]) -> list[bool | None]:
        """Of labels of two kinds: whether each is surer in its own half of the picture than in the
        other; else None."""
        device = next(self.parameters()).device
        parts = [self.halves(part.to(device)) for part in pixels.split(64)]
        left, right = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
        answers: list[bool | None] = []
        for row, each in zip(left - right, labels, strict=True):
            a, b = (self.objects.index(each.objects[k]) for k in (0, -1))
            answers.append(bool(row[a] > 0 > row[b]) if a != b else None)
        return answers


def share_right(verdicts: Sequence[bool | None]) -> float:
    """Of those that were asked, the share right; NaN of none."""
    asked = [verdict for verdict in verdicts if verdict is not None]
    return sum(asked) / len(asked) if asked else float("nan")


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The committed judge, or another one.  ValueError: there is none."""
    if not path.is_file():
        raise ValueError(f"there is no judge at {path}: train one, python -m scripts.emoji.judge "
                         f"--train --file {path}")
    with safe_open(path, "pt") as file:
        facts = file.metadata()
        judge = Judge(int(facts["objects"]), STICKERS if facts.get("stickers") else PLAIN)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return judge.eval()


def _render(i: int, scenes: Scenes) -> np.ndarray:
    return np.asarray(scenes.image(i))


def renders(scenes: Scenes) -> tuple[Tensor, list[Labels]]:
    """All of them: pixels uint8 (N, 3, S, S), drawn by all cores, and their labels."""
    emoji_sprites(scenes.look.edged)
    with multiprocessing.get_context("fork").Pool() as pool:
        made = pool.map(functools.partial(_render, scenes=scenes), range(len(scenes)), 64)
    pixels = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()
    return pixels, [scenes.drawn_labels(i) for i in range(len(scenes))]


def draw_labelled(labels: Sequence[Labels], size: int, seed: Sequence[int],
                  look: Look = PLAIN) -> Tensor:
    """A fresh render of each: pixels uint8 (N, 3, size, size)."""
    made = [np.asarray(draw_scene(np.random.default_rng([*seed, i]), each, size, look=look))
            for i, each in enumerate(labels)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, blur, noise, brightness: what a decoder may do to a picture that is right."""
    def u() -> float:
        return torch.rand((), generator=generator).item()

    if u() < 0.5:
        pixels = pixels.flip(3)
    dy, dx = int(u() * 9) - 4, int(u() * 9) - 4
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")
    pixels = pixels[:, :, 4 + dy:4 + SIZE + dy, 4 + dx:4 + SIZE + dx]
    if u() < 0.5:
        small = F.interpolate(pixels, scale_factor=0.4 + 0.6 * u(), mode="area")
        pixels = F.interpolate(small, (SIZE, SIZE), mode="bilinear")
    pixels = pixels + 0.06 * u() * torch.randn(pixels.shape, generator=generator)
    return ((pixels - 0.5) * (0.85 + 0.3 * u()) + 0.5 + 0.1 * (u() - 0.5)).clamp(0, 1)


def score_on_renders(judge: Judge, count: int, first: int = FRESH_SEED,
                     size: int = SIZE) -> dict[str, float]:
    """Shares right on new renders of that size and any combination, held out or not."""
    scenes = Scenes(range(first, first + count), len(judge.objects), size, held_out=None,
                    look=judge.look)
    pixels, labels = renders(scenes)
    pixels = pixels.float() / 255
    shares = {q: share_right(hits) for q, hits in judge.right(pixels, labels).items()}
    return shares | {"sides": share_right(judge.sides_right(pixels, labels))}


def train(objects: int, look: Look, steps: int, batch: int, count: int) -> Judge:
    pixels, labels = renders(Scenes(range(FIRST_SEED, FIRST_SEED + count), objects, SIZE,
                                    held_out=None, look=look))
    torch.manual_seed(0)
    judge = Judge(objects, look)
    targets = judge.targets(labels)
    average, optimizer = EMA(judge, 0.995), adamw(judge, 2e-3, 0.05)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(pixels), (batch,), generator=generator)
        logits = judge(augment(pixels[index].float() / 255, generator))
        loss = (20 * F.binary_cross_entropy_with_logits(logits["objects"],
                                                        targets["objects"][index])
                + F.cross_entropy(logits["place"], targets["place"][index])
                + F.cross_entropy(logits["time"], targets["time"][index], ignore_index=-1))
        set_learning_rate(optimizer, learning_rate(step, steps, 2e-3, 100))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update(judge, step)
        if (step + 1) % 100 == 0:
            print(f"{step + 1}/{steps}  loss {loss.item():.4f}", file=sys.stderr, flush=True)
    judge.load_state_dict(average.state())
    return judge


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", action="store_true", help="train it anew; without this it is scored")
    p.add_argument("--objects", type=number(int, 2, len(OBJECTS)), default=40,
                   help="how many of the world's objects it learns (40)")
    p.add_argument("--stickers", action="store_true", help="of the look of that name")
    p.add_argument("--steps", type=positive, default=4000)
    p.add_argument("--batch", type=positive, default=64)
    p.add_argument("--renders", type=positive, default=40000)
    p.add_argument("--file", type=Path, default=WEIGHTS, help="of its weights (beside this file)")
    p.add_argument("--count", type=positive, default=4000, help="new renders that it is scored on")
    a = p.parse_args()
    try:
        find_font()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if a.train:
        look = STICKERS if a.stickers else PLAIN
        judge = train(a.objects, look, a.steps, a.batch, a.renders)
        save_file({k: v.half() if v.is_floating_point() else v
                   for k, v in judge.state_dict().items()}, a.file,
                  {"objects": str(a.objects)} | ({"stickers": "yes"} if a.stickers else {}))
    print(json.dumps({"judge_on_renders": score_on_renders(load_judge(a.file), a.count)}))


if __name__ == "__main__":
    main()

"""The judge of `scripts.evaluate`: a classifier of object, place and time that knows no CLIP.

    python -m scripts.judge --train [--steps 3000]      writes scripts/judge.safetensors

It learns from fresh renders with augmentation and has seen no generated image.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scripts import scenes
from scripts.optimise import Average, adamw, learning_rate, set_learning_rate

WEIGHTS = Path(__file__).with_name("judge.safetensors")
QUESTIONS = {"object": list(scenes.OBJECTS), "place": list(scenes.PLACES),
             "time": list(scenes.TIMES)}
FIRST_SEED = 10_000_000  # its renders are nobody else's


class Judge(nn.Module):
    """Pixels (N, 3, 64, 64) in [0, 1] to logits for each question."""

    def __init__(self):
        super().__init__()
        widths = ((3, 32, 2), (32, 64, 2), (64, 96, 1), (96, 128, 2), (128, 192, 1), (192, 192, 2))
        self.features = nn.Sequential(*(
            layer for i, o, stride in widths
            for layer in (nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())))
        self.heads = nn.ModuleDict({q: nn.Linear(192, len(v)) for q, v in QUESTIONS.items()})

    def embed(self, pixels: Tensor) -> Tensor:
        """Penultimate features (N, 192)."""
        pixels = F.interpolate(pixels, (64, 64), mode="area") if pixels.shape[-1] != 64 else pixels
        return self.features(pixels * 2 - 1).amax((2, 3))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        h = self.embed(pixels)
        return {question: head(h) for question, head in self.heads.items()}

    @torch.no_grad()
    def right(self, pixels: Tensor, labels: list[tuple[str, str, str]]) -> dict[str, list[bool]]:
        """Which images show what their (object, place, time) says."""
        parts = [self(part) for part in pixels.split(64)]
        answers = {q: torch.cat([part[q].argmax(1) for part in parts]) for q in QUESTIONS}
        return {q: [QUESTIONS[q][a] == label[i] for a, label in
                    zip(answers[q].tolist(), labels, strict=True)]
                for i, q in enumerate(QUESTIONS)}


def load_judge() -> Judge:
    """The committed judge."""
    judge = Judge()
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v
                           for k, v in load_file(WEIGHTS).items()})
    return judge.eval()


def render_labelled(seed: int, size: int = 64) -> tuple[np.ndarray, tuple[str, str, str]]:
    """A scene of any combination, held out or not: pixels uint8 (size, size, 3) and its labels."""
    labels = scenes.COMBINATIONS[np.random.default_rng(seed).integers(len(scenes.COMBINATIONS))]
    return np.asarray(scenes.render(seed, size, labels=labels).image), labels


def renders(first: int, count: int, size: int = 64) -> tuple[Tensor, list[tuple[str, str, str]]]:
    """Fresh renders by seed: pixels uint8 (count, 3, size, size) and labels, drawn by all cores."""
    scenes.emoji_sprites()
    with multiprocessing.get_context("fork").Pool() as pool:
        made = pool.starmap(render_labelled, [(s, size) for s in range(first, first + count)], 64)
    pixels = torch.from_numpy(np.stack([m[0] for m in made])).permute(0, 3, 1, 2).contiguous()
    return pixels, [m[1] for m in made]


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, shift, blur, noise, brightness: what a decoder may do to a picture that is right."""
    def u() -> float:
        return torch.rand((), generator=generator).item()

    if u() < 0.5:
        pixels = pixels.flip(3)
    dy, dx = int(u() * 9) - 4, int(u() * 9) - 4
    pixels = F.pad(pixels, (4, 4, 4, 4), mode="replicate")[:, :, 4 + dy:68 + dy, 4 + dx:68 + dx]
    if u() < 0.5:
        small = F.interpolate(pixels, scale_factor=0.4 + 0.6 * u(), mode="area")
        pixels = F.interpolate(small, (64, 64), mode="bilinear")
    pixels = pixels + 0.06 * u() * torch.randn(pixels.shape, generator=generator)
    return ((pixels - 0.5) * (0.85 + 0.3 * u()) + 0.5 + 0.1 * (u() - 0.5)).clamp(0, 1)


def score_on_renders(judge: Judge, count: int = 1000, first: int = 20_000_000) -> dict[str, float]:
    """Shares right on new renders."""
    pixels, labels = renders(first, count)
    return {q: sum(hits) / count for q, hits in judge.right(pixels.float() / 255, labels).items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", action="store_true", help="train it anew; without this it is scored")
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--renders", type=int, default=40000)
    a = p.parse_args()
    if a.train:
        pixels, labels = renders(FIRST_SEED, a.renders)
        targets = {q: torch.tensor([v.index(label[i]) for label in labels])
                   for i, (q, v) in enumerate(QUESTIONS.items())}
        torch.manual_seed(0)
        judge = Judge()
        average, optimizer = Average(judge, 0.995), adamw(judge, 2e-3, 0.05)
        for step in range(a.steps):
            generator = torch.Generator().manual_seed(step)
            index = torch.randint(len(pixels), (a.batch,), generator=generator)
            logits = judge(augment(pixels[index].float() / 255, generator))
            loss = sum(F.cross_entropy(logits[q], targets[q][index]) for q in QUESTIONS)
            set_learning_rate(optimizer, learning_rate(step, a.steps, 2e-3, 100))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update(judge, step)
            if (step + 1) % 100 == 0:
                print(f"{step + 1}/{a.steps}  loss {loss.item():.4f}", file=sys.stderr, flush=True)
        save_file({k: v.half() if v.is_floating_point() else v for k, v in average.state.items()},
                  WEIGHTS)
    print(json.dumps({"judge_on_renders": score_on_renders(load_judge(), 4000)}))


if __name__ == "__main__":
    main()

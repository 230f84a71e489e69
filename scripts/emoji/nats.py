"""Where a GPT of the default world spends its nats: over places, and on thing, ground and edge.

    python -m scripts.emoji.nats weights/emoji [--count 200] [--out runs/nats.png]

Scenes that nothing was trained on are encoded; the GPT is given their own embeddings.  A code is of
the thing if at least half of its pixels change when the scene is drawn without its things, of the
ground if none does, else of the edge between them.  The picture shows the mean nats of each place,
black for none, white for the most; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clipgen import ClipGen
from scripts.emoji.judge import load_judge
from scripts.emoji.scenes import Scenes, draw_scene
from scripts.emoji.stranger import things_of
from scripts.training.cli import one_sentence, positive

FIRST = 330_000_000  # a seed from which on nothing is trained on
CHANGED = 8  # of 255, in any channel


def with_masks(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (N, 3, S, S), and which of them the things and their shadows change (N, S, S).

    The ground is drawn first, from the same random numbers with things and without.
    """
    drawn = []
    for i, seed in enumerate(scenes.seeds):
        labels = scenes.drawn_labels(i)
        drawn.append([np.asarray(draw_scene(np.random.default_rng([seed, 2]), each, scenes.size,
                                       look=scenes.look))
                      for each in (labels, replace(labels, objects=()))])
    pixels = torch.from_numpy(np.array(drawn)).permute(0, 1, 4, 2, 3)  # (N, 2, 3, S, S)
    changes = (pixels[:, 0].int() - pixels[:, 1].int()).abs().amax(1) > CHANGED
    return pixels[:, 0], changes


@torch.no_grad()
def nats(model: ClipGen, pixels: Tensor) -> Tensor:
    """Cross-entropy of each code, (N, G, G), given the embeddings of pixels uint8 (N, 3, S, S)."""
    found = []
    for part in pixels.float().div(255).split(32):
        codes = model.vqgan.encode(part).flatten(1)  # (n, L)
        logits = model.gpt(model.clip.embed_pixels(part), codes[:, :-1])
        found.append(F.cross_entropy(logits.transpose(1, 2), codes, reduction="none"))
    side = model.vqgan.config.grid
    return torch.cat(found).view(-1, side, side)


def split(values: Tensor, changes: Tensor) -> dict[str, float]:
    """Mean nats (N, G, G) of codes of things, grounds and edges, and the share of each in all."""
    cell = changes.shape[-1] // values.shape[-1]
    covered = F.avg_pool2d(changes.float()[:, None], cell)[:, 0]
    kinds = {"thing": covered >= 0.5, "ground": covered == 0}
    kinds["edge"] = ~(kinds["thing"] | kinds["ground"])
    result = {"all": float(values.mean())}
    for name, where in kinds.items():
        if where.any():
            result[name] = float(values[where].mean())
        result[f"share_{name}"] = float(values[where].sum() / values.sum())
    return result


def heat_map(values: Tensor) -> Image.Image:
    """Mean nats of each place (G, G), black for none, white for the most; 16 pixels a place."""
    mean = values.mean(0)
    levels = (mean / mean.max() * 255).round().to(torch.uint8).numpy()
    return Image.fromarray(levels).resize([16 * side for side in mean.shape],
                                          Image.Resampling.NEAREST)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.nats", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path)
    p.add_argument("--count", type=positive, default=200)
    p.add_argument("--out", type=Path, help="PNG of the heat map")
    a = p.parse_args(arguments)
    with one_sentence():
        model = ClipGen.load(a.weights, device="cpu", dtype=torch.float32)
        scenes = Scenes(range(FIRST, FIRST + a.count), things_of(model),
                        model.vqgan.config.image_size, look=load_judge().look)
        pixels, changes = with_masks(scenes)
        values = nats(model, pixels)
        if a.out:
            heat_map(values).save(a.out)
        return {name: round(value, 4) for name, value in split(values, changes).items()}


if __name__ == "__main__":
    print(json.dumps(main()))

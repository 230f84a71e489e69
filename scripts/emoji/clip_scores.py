"""What a CLIP of the default world tells apart: measured on renders that it never saw.

    python -m scripts.emoji.clip_scores weights/emoji [--objects 40] [--count 1000] [--stickers]
        [--noise 0]

retrieval_one, retrieval_two   share of scenes of one or two things whose nearest caption of 100 is
                  their own (or says the same), among captions of as many things.
retrieval_family  the same among the captions of its family alone (`world.relative`): another thing,
                  the same two the other way round, one of them missing, another place.
score_auc         the chance that a scene with what its text says scores above one of its family
                  that lacks it: how far the score can be believed.
both_read         scenes of two things in whose embedding a small network finds both, trained with
                  `--noise` on the embeddings, as a GPT is.
left_read, right_read   the same of the thing on that side alone.
both_read_text    both, of the embeddings of their captions, which the network never saw.

A CLIP is a bundle, a run of train_clip or open_clip's ARCHITECTURE:PRETRAINED.  The last line of
stdout is JSON.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.clip import CLIP
from scripts.data.dataset import stack_views
from scripts.emoji.painter import PLAIN, STICKERS, Look
from scripts.emoji.scenes import Scenes
from scripts.emoji.world import FAMILY, OBJECTS, PAIR_SHARE, Labels, write_caption
from scripts.training.cli import amount, number, one_sentence, positive
from scripts.training.gpt import perturbation
from scripts.training.loading import load_clip
from scripts.training.optim import adamw, learning_rate, set_learning_rate

FIRST = 320_000_000  # a seed, a multiple of FAMILY, from which on nothing is trained on
AMONG = 100


@torch.no_grad()
def embedded(clip: CLIP, scenes: Scenes, size: int = 64) -> tuple[Tensor, list[Labels]]:
    """Image embeddings (N, D) of the scenes and what these show."""
    _, pixels = stack_views(scenes, size, len(scenes))
    embeddings = torch.cat([clip.embed_pixels(part.float() / 255) for part in pixels.split(100)])
    return embeddings, [scenes.drawn_labels(i) for i in range(len(scenes))]


def captions(labels: list[Labels], seed: int) -> list[str]:
    """Of each a whole caption, in a wording that training has."""
    rng = np.random.default_rng(seed)
    return [write_caption(rng, each) for each in labels]


@torch.no_grad()
def similarities(clip: CLIP, images: Tensor, labels: list[Labels], among: int) -> list[Tensor]:
    """Cosines (n, n) of each stretch of `among` images with the captions of the same."""
    texts = clip.embed_texts(captions(labels, 0))
    return [a @ b.T for a, b in zip(images.split(among), texts.split(among), strict=True)]


def retrieval(parts: list[Tensor], labels: list[Labels]) -> float:
    """Share of images whose nearest caption is their own, or that of equal labels."""
    hits, start = 0, 0
    for cosines in parts:
        own = labels[start:start + len(cosines)]
        hits += sum(own[j] == own[i] for i, j in enumerate(cosines.argmax(1).tolist()))
        start += len(cosines)
    return hits / len(labels)


def score_auc(parts: list[Tensor], labels: list[Labels]) -> float:
    """Area under the ROC curve within families: of a text's own image against each other one."""
    wins = total = 0.0
    for k, cosines in enumerate(parts):
        own = labels[k * FAMILY:(k + 1) * FAMILY]
        for i in range(len(own)):
            for j in range(len(own)):
                if own[i] != own[j]:
                    wins += float(cosines[i, i] > cosines[j, i]) + 0.5 * float(
                        cosines[i, i] == cosines[j, i])
                    total += 1
    return wins / total


def both_read(clip: CLIP, objects: int, count: int, look: Look, first: int = FIRST + 10**6,
              steps: int = 3000, noise: float = 0) -> dict[str, float]:
    """Shares of held-back scenes of two kinds of things, and of their captions, of which a network
    of one hidden layer, trained on the embeddings of 20 times as many other scenes, finds both, or
    the one on the left or right, among the two surest.  noise: as `train_gpt` adds it to those."""
    scenes = Scenes(range(first, first + 21 * count), objects, pairs=100, look=look)
    images, labels = embedded(clip, scenes)
    names = list(OBJECTS)[:objects]
    targets = torch.zeros(len(labels), objects)
    for row, each in zip(targets, labels, strict=True):
        row[[names.index(name) for name in each.objects]] = 1
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(images.shape[1], 512), nn.GELU(), nn.Linear(512, objects))
    optimizer, scale = adamw(network, 2e-3, 0.05), images.shape[1] ** 0.5
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        rows = torch.randint(count, len(labels), (256,), generator=random)
        seen = F.normalize(images[rows] + perturbation(
            len(rows), images.shape[1], noise, random, "fixed"), dim=1)
        loss = F.binary_cross_entropy_with_logits(network(scale * seen), targets[rows])
        set_learning_rate(optimizer, learning_rate(step, steps, 2e-3, 100))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    two = [i for i in range(count) if len(set(labels[i].objects)) == 2]

    def found(embeddings: Tensor) -> np.ndarray:
        """bool (N, 2): the thing on the left, that on the right."""
        sure = network(scale * embeddings).topk(2, 1).indices.tolist()
        return np.array([[names.index(name) in pair for name in labels[i].objects]
                         for pair, i in zip(sure, two, strict=True)])

    with torch.no_grad():
        of_images = found(images[two])
        of_texts = found(clip.embed_texts(captions([labels[i] for i in two], 0)))
    left, right = of_images.mean(0).tolist()
    return {"both_read": float(of_images.all(1).mean()), "left_read": left, "right_read": right,
            "both_read_text": float(of_texts.all(1).mean())}


def scores(clip: CLIP, objects: int, count: int, look: Look, noise: float = 0
           ) -> dict[str, float]:
    found = {}
    for name, pairs in (("retrieval_one", 0), ("retrieval_two", 100)):
        images, labels = embedded(clip, Scenes(range(FIRST, FIRST + count), objects, pairs=pairs,
                                               look=look))
        found[name] = retrieval(similarities(clip, images, labels, AMONG), labels)
    family = Scenes(range(FIRST, FIRST + count // FAMILY * FAMILY), objects, families=True,
                    pairs=round(100 * PAIR_SHARE), look=look)
    images, labels = embedded(clip, family)
    parts = similarities(clip, images, labels, FAMILY)
    return found | {"retrieval_family": retrieval(parts, labels),
                    "score_auc": score_auc(parts, labels)} | both_read(clip, objects, count, look,
                                                                       noise=noise)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.clip_scores", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("clip")
    p.add_argument("--objects", type=number(int, 2, len(OBJECTS)), default=40)
    p.add_argument("--count", type=positive, default=1000)
    p.add_argument("--stickers", action="store_true", help="scenes of that look")
    p.add_argument("--noise", type=amount, default=0.0, help="for both_read (0)")
    a = p.parse_args(arguments)
    look = STICKERS if a.stickers else PLAIN
    with one_sentence():
        return {name: round(value, 4) for name, value in
                scores(load_clip(a.clip), a.objects, a.count, look, a.noise).items()}


if __name__ == "__main__":
    print(json.dumps(main()))

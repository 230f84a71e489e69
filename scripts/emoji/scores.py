"""What the judge says of a bundle of the default world: the scores of `emoji.evaluate`."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clipgen import ClipGen
from scripts.emoji.judge import FRESH_SEED, Judge, draw_labelled, score_on_renders, share_right
from scripts.emoji.prompts import (
    held_out_labels,
    texts_of,
    with_second_object,
    with_seen_places,
)
from scripts.emoji.world import Labels
from scripts.evaluation import metrics
from scripts.evaluation.scores import copy_scores

PAIRS_OF = 5  # one text of two objects for so many of one
# (texts or images uint8 (N, 3, S, S), candidates) -> per text the best of its candidates and the
# first of them, both uint8 (N, 3, S, S)
Sample = Callable[[Sequence[str] | Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Prompts:
    """Texts of held-out pairs of object and place: `ones` of one object, then `twos` of two."""

    ones: list[Labels]
    twos: list[Labels]
    texts: list[str]  # of ones, then of twos

    @classmethod
    def draw(cls, count: int, objects: int, seed: int) -> Prompts:
        ones = held_out_labels(count, objects, seed)
        twos = with_second_object(ones[:count // PAIRS_OF], objects, seed)
        return cls(ones, twos, texts_of([*ones, *twos], seed))


def judged_on_renders(judge: Judge, size: int) -> float:
    """The judge's share right on 1,000 new renders, of the question it answers worst."""
    first = FRESH_SEED + random.SystemRandom().randrange(10**8)
    shares = score_on_renders(judge, 1000, first, size)
    print(f"judge on 1,000 new renders from seed {first}: {shares}", file=sys.stderr)
    return min(shares.values())


def text_scores(judge: Judge, prompts: Prompts, best: Tensor, first: Tensor) -> dict[str, float]:
    """Shares of texts whose image, uint8 (N, 3, S, S), is right: the best of the candidates, and
    the first of them.  Wrong ones of the best are named on stderr."""
    labels, n = [*prompts.ones, *prompts.twos], len(prompts.ones)
    right, single = (judge.right(images.float() / 255, labels) for images in (best, first))
    for i, text in enumerate(prompts.texts):
        if wrong := [question for question, hits in right.items() if hits[i] is False]:
            print(f"wrong {', '.join(wrong)}: {text}", file=sys.stderr)
    scores = {"object_right": share_right(right["objects"][:n]),
              "object_right_one_candidate": share_right(single["objects"][:n]),
              "place_right": share_right(right["place"]), "time_right": share_right(right["time"])}
    if prompts.twos:
        scores["both_objects_right"] = share_right(right["objects"][n:])
        scores["both_objects_right_one_candidate"] = share_right(single["objects"][n:])
        sides = judge.sides_right(best[n:].float() / 255, prompts.twos)
        scores["sides_right"] = share_right([side for side, both in zip(
            sides, right["objects"][n:], strict=True) if both])  # of those with both right
    return scores


@torch.no_grad()
def score_auc(model: ClipGen, judge: Judge, prompts: Prompts, first: Tensor) -> float:
    """How far the bundle's score can be believed: the chance that an image, uint8 (N, 3, S, S),
    with the things of its text has a higher one than one without.  NaN where all are right."""
    pixels, labels = first.float() / 255, [*prompts.ones, *prompts.twos]
    right, clip = np.array(judge.right(pixels, labels)["objects"]), model.clip
    images = torch.cat([clip.embed_pixels(part.to(clip.device)) for part in pixels.split(64)])
    cosines = (images * clip.embed_texts(prompts.texts)).sum(1).cpu().numpy()
    return metrics.auc(cosines[right], cosines[~right])


def paired_scores(judge: Judge, prompts: Prompts, first: Tensor, sample: Sample, size: int,
                  seed: int) -> dict[str, float]:
    """One candidate each: pairs that training never showed against pairs that it may have shown,
    and texts, of one thing and of two, against the embeddings of renders that show the same."""
    def right(conditions: Sequence[str] | Tensor, labels: list[Labels]) -> float:
        return share_right(judge.right(sample(conditions, 1)[1].float() / 255, labels)["objects"])

    n = len(prompts.ones)
    unseen = share_right(judge.right(first[:n].float() / 255, prompts.ones)["objects"])
    moved = with_seen_places(prompts.ones, seed)
    seen = right(texts_of(moved, seed), moved)
    of_images = right(draw_labelled(prompts.ones, size, [seed, 5], judge.look), prompts.ones)
    of_two = {"both_objects_right_of_images": right(draw_labelled(
        prompts.twos, size, [seed, 8], judge.look), prompts.twos)} if prompts.twos else {}
    return of_two | {"object_right_unseen_pairs": unseen, "object_right_seen_pairs": seen,
            "object_right_of_images": of_images,
            "text_over_image": unseen / max(of_images, 1e-9)}


@torch.no_grad()
def quality_scores(model: ClipGen, judge: Judge, prompts: Prompts, best: Tensor, first: Tensor,
                   size: int, seed: int) -> dict[str, float]:
    """The VQGAN's copies of held-out renders, and Fréchet distances on the judge's features: of the
    best of the candidates, the first of them, those copies and what is copied.

    All distances are to the same real renders, which are neither copied nor sampled from; the
    last, "real", is the least there can be with so few.
    """
    n = len(prompts.ones)
    if n <= judge.dimensions:
        print(f"{n} images are too few for {judge.dimensions} dimensions: the judge's Fréchet "
              "distances are mostly bias, and their ratio is nearer to 1 than it should be",
              file=sys.stderr)
    originals, others = (draw_labelled(prompts.ones, size, [seed, k], judge.look)
                         for k in (6, 7))
    copies = torch.cat([(model.decode(model.vqgan.encode(part.to(model.clip.device).float() / 255))
                         * 255).round().to("cpu", torch.uint8) for part in originals.split(32)])
    copied, _ = copy_scores(model.vqgan, originals)

    def features(images: Tensor) -> Tensor:
        return torch.cat([judge.embed(part.float() / 255) for part in images.split(64)]).numpy()

    real = features(others)
    distance, of_first, of_copies, of_real = (
        metrics.frechet_distance(features(images), real)
        for images in (best[:n], first[:n], copies, originals))
    return {"psnr_db": copied["psnr_db"], "codebook_usage": copied["codebook_usage"],
            "judge_frechet": distance, "judge_frechet_one_candidate": of_first,
            "judge_frechet_of_copies": of_copies, "judge_frechet_real": of_real,
            "frechet_ratio": distance / of_copies}

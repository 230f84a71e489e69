"""Pictures as prompts, judged: do variations, blends, completions and negative texts do their job?

    python -m scripts.emoji.edits weights/emoji [--count 200] [--candidates 4]

The pictures are renders of pairs of thing and place that no training showed.

variation_thing, variation_place   share of images like a render that show the same
blend        of a render and the text "on the moon", that show its thing and the moon
completion   of a render whose upper 40 % are kept, under a text of what it shows, with its thing
named, named_negative   share of night in images of texts that leave the time open, without and
             with the negative text "at night"

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipgen import ClipGen
from scripts.emoji.judge import Judge, draw_labelled, load_judge, share_right
from scripts.emoji.prompts import held_out_labels, texts_of
from scripts.emoji.stranger import things_of
from scripts.emoji.world import TIMELESS, Labels
from scripts.training.cli import number, one_sentence, positive

KEEP, NEGATIVE = 0.4, "at night"


def images_of(model: ClipGen, requests: Sequence[dict[str, Any]], candidates: int, seed: int,
              name: str) -> Tensor:
    """The best of the candidates of each request of `ClipGen.generate`: (N, 3, S, S) in [0, 1]."""
    made = [np.asarray(model.generate(**request, num_images=1, candidates=candidates,
                                      seed=seed + 1000 * i)[0].image)
            for i, request in enumerate(tqdm(requests, name, mininterval=10))]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def scores(model: ClipGen, judge: Judge, objects: int, count: int, candidates: int,
           seed: int) -> dict[str, float]:
    labels = held_out_labels(count, objects, seed)
    pixels = draw_labelled(labels, model.vqgan.config.image_size, [seed, 9], judge.look)
    pictures = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]

    def right(requests: list[dict[str, Any]], wanted: Sequence[Labels],
              name: str) -> dict[str, list[bool | None]]:
        return judge.right(images_of(model, requests, candidates, seed, name), wanted)

    like = right([{"image": picture} for picture in pictures], labels, "variations")
    below = [i for i, each in enumerate(labels) if each.place != "moon"]
    moved = [Labels(labels[i].objects, "moon", None) for i in below]
    blend = right([{"text": "on the moon", "image": pictures[i]} for i in below], moved, "blends")
    whole = right([{"text": text, "init_image": picture, "keep": KEEP} for text, picture in
                   zip(texts_of(labels, seed), pictures, strict=True)], labels, "completions")
    by_night = [replace(each, time="night") for each in labels if each.place not in TIMELESS]
    open_texts = texts_of([replace(each, time=None) for each in by_night], seed)
    night = [right([{"text": text, **more} for text in open_texts], by_night, name)["time"]
             for name, more in (("texts", {}), ("negative texts", {"negative_text": NEGATIVE}))]
    return {"variation_thing": share_right(like["objects"]),
            "variation_place": share_right(like["place"]),
            "blend": share_right([a and b for a, b in
                                  zip(blend["objects"], blend["place"], strict=True)]),
            "completion": share_right(whole["objects"]),
            "named": share_right(night[0]), "named_negative": share_right(night[1])}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.edits", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("weights", type=Path)
    p.add_argument("--count", type=positive, default=200)
    p.add_argument("--candidates", type=positive, default=4)
    p.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0)
    a = p.parse_args(arguments)
    with one_sentence():
        model = ClipGen.load(a.weights, device="cpu")
        found = scores(model, load_judge(), things_of(model), a.count, a.candidates, a.seed)
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    print(json.dumps(main()))

"""Score a bundle: how well its images fit their texts, how real they look.

    python -m scripts.evaluate weights/coco --prompts texts.txt --images photos.zip
    python -m scripts.evaluate weights/coco --prompts coco:/data/coco --images coco:/data/coco
    python -m scripts.evaluate weights/mine --images photos/               no text anywhere

The default bundle's own world has a command of its own: python -m scripts.emoji.evaluate.

--prompts FILE  a file of texts, one a line.
--prompts coco:PATH  captions of COCO, one an image; PATH: its folder, of which
                annotations/captions_val2017.json is read, or a file like that one.
--images SOURCE real images to compare with: a folder, zip, tar or shards, or coco:, imagenet:,
                googlecc: and a folder (the validation part where there is one).  Without --prompts
                each image is sampled from the embedding of one of them.

Scores, higher is better: CLIP score (CLIP-I without texts), R@1 (the own text is the nearest of
100; texts that mean the same count against each other), Inception score (with Inception alone).
Lower is better: Fréchet distance, also after Gaussian blurs of 1, 2, 4 and 8 pixels (standard
deviation; of 256, other sizes in proportion), and MMD (the unbiased KID).  Distances are comparable
only where features, number of images and resizing are the same: they are in the output.  Where
--images has twice as many images as are generated, the other half is what these are compared with,
and "FD real" and "MMD real" are those of the two halves: what perfect images would get.  All images
are held in memory, 200 kB each at 256 pixels.

Progress goes to stderr; stdout is a Markdown table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import time

from scripts.evaluation.features import RADII
from scripts.evaluation.prompts import COCO_TEXTS, read_prompts
from scripts.evaluation.report import print_table
from scripts.evaluation.scores import EvaluationSettings, check, evaluate, load_model, save_sheet
from scripts.training.cli import Parser, add_settings, one_sentence, settings_of
from scripts.training.loading import load_clip

# Columns of the table by key of the result; those that a run has no value for are left out.
COLUMNS = {
    "bundle": "bundle", "condition": "sampled from", "n_generated": "images",
    "candidates": "best of", "guidance": "guidance", "clip_score": "CLIP score ↑",
    "clip_i": "CLIP-I ↑", "retrieval_r1": "R@1 ↑", "inception_score": "IS ↑",
    "frechet_distance": "FD ↓", "frechet_distance_real": "FD real",
    **{f"frechet_distance_blur_{r}": f"FD-{r} ↓" for r in RADII[1:]},
    "mmd": "MMD ↓", "mmd_real": "MMD real", "features": "features", "seconds_per_image": "s/image",
}


def parse(arguments: list[str] | None) -> tuple[EvaluationSettings, str | None]:
    """The settings, and the source of texts."""
    p = Parser(prog="scripts.evaluate", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(p, EvaluationSettings)
    p.add_argument("--prompts", help=f"FILE or coco:PATH; at most {COCO_TEXTS} of COCO")
    a = p.parse_args(arguments)
    if a.prompts is None and not a.images:
        p.error("give --prompts FILE, --prompts coco:PATH or --images SOURCE; the default bundle's "
                "own texts are those of scripts.emoji.evaluate")
    return settings_of(EvaluationSettings, a), a.prompts


def main(arguments: list[str] | None = None) -> dict:
    """The result, which is also the last line of stdout."""
    settings, prompts = parse(arguments)
    began = time.time()
    with one_sentence():
        check(settings)
        texts = read_prompts(prompts, settings.count, settings.seed) if prompts else []
        model = load_model(settings)
        scoring = load_clip(settings.score_clip) if settings.score_clip else None
        found = evaluate(settings, model, texts, scoring)
        result = found.result | {"prompts": prompts, "seconds": round(time.time() - began, 1)}
        if settings.sheet:
            save_sheet(settings.sheet, found, texts)
    columns = {key: title for key, title in COLUMNS.items() if result.get(key) is not None}
    print_table([*columns.values()], [[result[key] for key in columns]])
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()

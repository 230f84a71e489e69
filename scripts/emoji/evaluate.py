"""Score the default bundle, or another one of its world: does a judge see what the texts say?

    python -m scripts.emoji.evaluate weights/emoji [--prompts 1000] [--sheet docs/sheet.png]

--prompts N     texts about things in places where the training of the default bundle never showed
                them, and N / 5 of two things; see scripts/emoji/scores.py for what the scores mean.
                It needs the emoji font: apt install fonts-noto-color-emoji.

The scores of scripts.evaluate are there too; --images and --features add distances to real images.
Progress goes to stderr; stdout is a Markdown table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from torch import Tensor

from scripts.emoji.judge import WEIGHTS, Judge, load_judge
from scripts.emoji.scores import (
    Prompts,
    judged_on_renders,
    paired_scores,
    quality_scores,
    score_auc,
    text_scores,
)
from scripts.evaluation.report import print_table
from scripts.evaluation.scores import (
    Conditions,
    EvaluationSettings,
    check,
    enough_memory,
    evaluate,
    load_model,
    rounded,
    sample,
    save_sheet,
    unknown_words,
)
from scripts.training.cli import Parser, add_settings, number, one_sentence, settings_of
from scripts.training.loading import load_clip

COLUMNS = {
    "bundle": "bundle", "n_generated": "images", "candidates": "best of", "guidance": "guidance",
    "object_right": "object right", "object_right_one_candidate": "with 1 candidate",
    "both_objects_right": "both objects right", "sides_right": "sides right",
    "place_right": "place right", "time_right": "time right", "text_over_image": "text / image",
    "psnr_db": "PSNR",
    "frechet_ratio": "FD / FD of copies", "clip_score": "CLIP score ↑", "retrieval_r1": "R@1 ↑",
    "seconds_per_image": "s/image",
}


def parse(arguments: list[str] | None) -> tuple[EvaluationSettings, int, Path]:
    """The settings, the number of texts, the judge's file."""
    p = Parser(prog="scripts.emoji.evaluate", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(p, EvaluationSettings, without=("count",))
    p.add_argument("--prompts", type=number(int, 2, 10**6), default=200,
                   help="texts of one thing (200)")
    p.add_argument("--judge", type=Path, default=WEIGHTS,
                   help="file of another judge (emoji.judge --file)")
    p.set_defaults(count=None)
    a = p.parse_args(arguments)
    return settings_of(EvaluationSettings, a), a.prompts, a.judge


def judged(s: EvaluationSettings, count: int, judge: Judge) -> dict:
    """The result of the evaluation with the judge's scores."""
    began = time.time()
    prompts = Prompts.draw(count, len(judge.objects), s.seed)
    model = load_model(s)
    size = model.vqgan.config.image_size
    if unknown := unknown_words(model, prompts.texts):
        raise ValueError("this bundle was not trained on the world of the default one, its CLIP "
                         f"never saw {', '.join(map(repr, unknown[:3]))}: score it with "
                         "scripts.evaluate")
    scores = {"judge_on_renders": judged_on_renders(judge, size)}
    scoring = load_clip(s.score_clip) if s.score_clip else None
    found = evaluate(s, model, prompts.texts, scoring)

    def again(conditions: Conditions, candidates: int) -> tuple[Tensor, Tensor]:
        return sample(model, conditions, s.seed + 1, candidates, found.sampling)[:2]

    with enough_memory(s.candidates):
        scores |= text_scores(judge, prompts, found.best, found.first)
        scores["score_auc"] = score_auc(model, judge, prompts, found.first)
        scores |= paired_scores(judge, prompts, found.first, again, size, s.seed)
        scores |= quality_scores(model, judge, prompts, found.best, found.first, size, s.seed)
    found.result |= rounded(scores) | {
        "prompts": count, "n_prompts": len(prompts.ones), "n_objects": len(judge.objects),
        "judge_dimensions": judge.dimensions, "seconds": round(time.time() - began, 1)}
    if s.sheet:
        save_sheet(s.sheet, found, prompts.texts)
    return found.result


def main(arguments: list[str] | None = None) -> dict:
    """The result, which is also the last line of stdout."""
    settings, count, judge = parse(arguments)
    with one_sentence():
        check(settings)
        result = judged(settings, count, load_judge(judge))
    columns = {key: title for key, title in COLUMNS.items() if result.get(key) is not None}
    print_table([*columns.values()], [[result[key] for key in columns]])
    print(json.dumps(result))
    if result["judge_on_renders"] < 0.99:
        raise SystemExit("the judge gets fewer than 99 % of new renders right, so its word counts "
                         "for little: train it again with scripts.emoji.judge --train")
    return result


if __name__ == "__main__":
    main()

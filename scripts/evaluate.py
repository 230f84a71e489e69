"""Judge a bundle that was trained on the scenes of `scripts.scenes`.

    python -m scripts.evaluate weights/emoji [--prompts 200] [--sheet runs/sheet.png]

Texts describe held-out (object, place, time) combinations; the first image of
`generate(text, num_images=1)` is shown to the judge, which is itself scored on new renders (for
those the emoji font is needed: `apt install fonts-noto-color-emoji`).  The last line of stdout is
JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from clipgen import ClipGen
from scripts import scenes
from scripts.judge import QUESTIONS, load_judge, score_on_renders

JUDGE_SEEDS = (20_000_000, 2_000_000_000)  # of renders that nothing is trained on


def held_out_prompts(count: int, seed: int) -> list[tuple[str, tuple[str, str, str]]]:
    """(text, (object, place, time)) of held-out combinations, each once before any comes again."""
    combinations = sorted(scenes.HELD_OUT)
    rng = np.random.default_rng(seed)
    prompts = []
    while len(prompts) < count:
        for i in rng.permutation(len(combinations)):
            labels = combinations[i]
            prompts.append((scenes.write_caption(rng, *labels), labels))
    return prompts[:count]


def sheet(pictures: list[tuple[str, Image.Image]], columns: int = 8) -> Image.Image:
    """Images at 128 pixels, each with its text below."""
    cell, text_height, font = 128, 40, ImageFont.load_default(11)
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + text_height) + 8), "white")
    draw = ImageDraw.Draw(page)
    for i, (text, image) in enumerate(pictures):
        x, y = 8 + i % columns * (cell + 8), 8 + i // columns * (cell + text_height)
        page.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font=font) <= cell:
                lines[-1] = longer
            else:
                lines.append(word)
        draw.multiline_text((x, y + cell + 2), "\n".join(lines[:3]), "black", font, spacing=1)
    return page


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", type=Path)
    p.add_argument("--prompts", type=int, default=200, help="texts")
    p.add_argument("--candidates", type=int, default=16, help="images drawn for each text")
    p.add_argument("--guidance", type=float, help="instead of the bundle's own")
    p.add_argument("--top-p", type=float, help="instead of the bundle's own")
    p.add_argument("--temperature", type=float, help="instead of the bundle's own")
    p.add_argument("--seed", type=int, default=0, help="of the texts and of the images")
    p.add_argument("--sheet", type=Path, help="write the first 32 images with their texts here")
    a = p.parse_args()
    began = time.time()
    judge = load_judge()
    try:
        renders = score_on_renders(judge, 1000, random.SystemRandom().randrange(*JUDGE_SEEDS))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    print(f"judge on 1,000 new renders: {renders}", file=sys.stderr)
    model = ClipGen.load(a.bundle)
    prompts = held_out_prompts(a.prompts, a.seed)
    images, pixels = [], []
    for i, (text, _) in enumerate(prompts):
        best = model.generate(text, num_images=1, candidates=a.candidates,
                              seed=(a.seed + i * a.candidates) % 2**31, guidance=a.guidance,
                              top_p=a.top_p, temperature=a.temperature)[0]
        images.append(best.image)
        pixels.append(torch.from_numpy(np.array(best.image)).permute(2, 0, 1).float() / 255)
        if (i + 1) % 20 == 0:
            print(f"{i + 1}/{len(prompts)} texts", file=sys.stderr, flush=True)
    right = judge.right(torch.stack(pixels), [labels for _, labels in prompts])
    if a.sheet:
        a.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet([(t, im) for (t, _), im in zip(prompts, images, strict=True)][:32]).save(a.sheet)
    for (text, _), *hits in zip(prompts, *(right[q] for q in QUESTIONS), strict=True):
        if not all(hits):
            wrong = [q for q, hit in zip(QUESTIONS, hits, strict=True) if not hit]
            print(f"wrong {', '.join(wrong)}: {text}", file=sys.stderr)
    scores = {f"{q}_right": round(sum(hits) / len(hits), 4) for q, hits in right.items()}
    print(json.dumps({"judge_on_renders": min(renders.values()), **scores,
                      "n_prompts": len(prompts), "candidates": a.candidates,
                      "seconds": round(time.time() - began, 1)}))
    if min(renders.values()) < 0.99:
        raise SystemExit("the judge gets fewer than 99 % of new renders right, so its word counts "
                         "for little: train it again with scripts.judge --train")


if __name__ == "__main__":
    main()

"""The method that CLIP-GEN set out to replace, VQGAN-CLIP, beside it: same CLIP, same VQGAN.

    python -m scripts.emoji.baseline_vqgan_clip weights/emoji [--prompts 32] [--steps 300]

VQGAN-CLIP (arXiv 2204.08583) has no GPT: for every text it optimizes the VQGAN's latent by Adam
until CLIP finds the decoded image, seen through random cut-outs, near to the text.  Texts are those
of scripts.evaluate about pairs that training never showed, the judge is the same, and Fréchet
distances are to the same fresh renders; below 161 texts they are mostly bias,
and MMD says more.  The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clipgen import ClipGen
from clipgen.pipeline import to_image
from clipgen.sheet import sheet
from scripts.emoji.judge import Judge, draw_labelled, load_judge, share_right
from scripts.emoji.prompts import held_out_labels, texts_of
from scripts.emoji.world import Labels
from scripts.evaluation import metrics
from scripts.evaluation.report import print_named
from scripts.evaluation.scores import fit, sample, unknown_words
from scripts.training.cli import number, positive, seed
from scripts.training.losses import centre

TOGETHER = 8  # texts optimized at once


def cut_outs(pixels: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` random squares of each image (N, 3, S, S), half mirrored, with a little noise:
    (count * N, 3, size, size).  Squares have from half the side to all of it."""
    side, squares = pixels.shape[-1], []
    for _ in range(count):
        u = torch.rand(4, generator=generator).tolist()
        length = max(2, round(side * (0.5 + 0.5 * u[0])))
        top, left = round(u[1] * (side - length)), round(u[2] * (side - length))
        square = pixels[:, :, top:top + length, left:left + length]
        square = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
        squares.append(square.flip(3) if u[3] < 0.5 else square)
    cut = torch.cat(squares)
    return cut + 0.05 * torch.randn(cut.shape, generator=generator).to(cut)


def optimize(model: ClipGen, texts: list[str], steps: int, cuts: int, rate: float,
             seed: int) -> Tensor:
    """One image of each text by VQGAN-CLIP: uint8 (N, 3, S, S)."""
    clip, vqgan = model.clip, model.vqgan
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(vqgan.config.codebook_size, (len(texts), *vqgan.code_grid),
                          generator=generator).to(clip.device)
    latent = vqgan.quantizer.vectors(codes).detach().clone().requires_grad_(True)
    optimizer = torch.optim.Adam([latent], lr=rate)
    target, mean = clip.embed_texts(texts), clip.config.image_embedding_mean
    mean = None if mean is None else target.new_tensor(mean)
    for _ in range(steps):
        z = vqgan.quantizer.normalise(latent)
        vectors = vqgan.quantizer.vectors(vqgan.quantizer.nearest(latent))
        pixels = vqgan.decoder(z + (vectors - z).detach()) * 0.5 + 0.5  # straight through
        seen = clip.preprocess(cut_outs(pixels, cuts, clip.image_size, generator))
        embedding = centre(F.normalize(clip.model.encode_image(seen), dim=-1), mean)
        distance = (embedding - target.repeat(cuts, 1)).norm(dim=1) / 2
        loss = 2 * distance.clamp(max=1 - 1e-6).arcsin().square().sum()  # squared great-circle
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        pixels = model.decode(vqgan.quantizer.nearest(latent))
    return (pixels * 255).round().to("cpu", torch.uint8)


@torch.no_grad()
def scores(model: ClipGen, judge: Judge, images: Tensor, texts: list[str], labels: list[Labels],
           real: Tensor) -> dict[str, float]:
    right = judge.right(images.float() / 255, labels)
    a, b = (judge.embed(x.float() / 255).numpy() for x in (images, real))
    near = fit(model.clip, images, texts, 0)
    return {"object_right": share_right(right["objects"]),
            "place_right": share_right(right["place"]),
            "time_right": share_right(right["time"]), "clip_score": near["clip_score"],
            "frechet_distance": metrics.frechet_distance(a, b), "mmd": metrics.mmd(a, b)}


def main(arguments: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.baseline_vqgan_clip",
                                description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", type=Path)
    p.add_argument("--prompts", type=number(int, 2, 10**6), default=32, help="texts (32)")
    p.add_argument("--steps", type=positive, default=300, help="of Adam, for each image (300)")
    p.add_argument("--cuts", type=positive, default=8, help="cut-outs in a step (8)")
    p.add_argument("--rate", type=number(float, 1e-6, 10), default=0.1, help="of Adam (0.1)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--sheet", type=Path, metavar="PNG",
                   help="write the images of both of the first 8 texts here")
    a = p.parse_args(arguments)
    try:
        model, judge = ClipGen.load(a.bundle), load_judge()
        labels = held_out_labels(a.prompts, len(judge.objects), a.seed)
        texts = texts_of(labels, a.seed)
        if unknown := unknown_words(model, texts):
            raise ValueError("this bundle was not trained on the world of the default one, its "
                             f"CLIP never saw {unknown[0]!r}: give weights/emoji")
        real = draw_labelled(labels, model.vqgan.config.image_size, [a.seed, 7],
                             judge.look)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for module in (model.clip, model.vqgan):
        module.requires_grad_(False)
    made, results = {}, {}
    for candidates in (1, 16):
        name = f"CLIP-GEN, best of {candidates}"
        made[name], _, seconds = sample(model, texts, a.seed, candidates,
                                                 asdict(model.sampling))
        results[name] = {"seconds_per_image": seconds / len(texts)}
    name, began, parts = f"VQGAN-CLIP, {a.steps} steps", time.perf_counter(), []
    for start in tqdm(range(0, len(texts), TOGETHER), desc="optimizing"):
        parts.append(optimize(model, texts[start:start + TOGETHER], a.steps, a.cuts, a.rate,
                              a.seed + start))
    made[name] = torch.cat(parts)
    results[name] = {"seconds_per_image": (time.perf_counter() - began) / len(texts)}
    for name, images in made.items():
        results[name] = {k: float(f"{v:.4g}") for k, v in
                         (scores(model, judge, images, texts, labels, real)
                          | results[name]).items()}
    print_named(results)
    if a.sheet:
        cells = [(f"{name}: {texts[i]}", to_image(images[i] / 255))
                 for i in range(min(8, len(texts))) for name, images in made.items()]
        sheet(cells, columns=2 * len(made)).save(a.sheet)
    result = {"n_prompts": len(texts), "device": str(model.clip.device), "steps": a.steps,
              "cuts": a.cuts, "dimensions": judge.dimensions, "results": results}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()

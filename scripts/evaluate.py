"""Score a bundle: what its images show, how well they fit their texts, how real they look.

    python -m scripts.evaluate weights/emoji                               its own world, judged
    python -m scripts.evaluate weights/coco --prompts texts.txt --images photos.zip
    python -m scripts.evaluate weights/coco --prompts coco:/data/coco --images coco:/data/coco
    python -m scripts.evaluate runs/mine --images photos/                  no text anywhere

--prompts N     texts about things in places where the training of the default bundle never showed
                them, and N / 5 of two things; a judge says whether they are right (that needs
                the emoji font: apt install fonts-noto-color-emoji).  Without --prompts and
                --images: 200.  See scripts.emoji.evaluate for what the scores mean.
--prompts FILE  a file of texts, one a line.
--prompts coco:PATH  captions of COCO, one an image; PATH: its folder, of which
                annotations/captions_val2017.json is read, or a file like that one.
--images SOURCE real images to compare with: a folder, zip, tar or shards, or coco:, imagenet:,
                googlecc: and a folder (the validation part where there is one).
--condition images   no texts: each image is sampled from the embedding of one of --images.

Scores, higher is better: CLIP score (CLIP-I with --condition images), R@1 (the own text is the
nearest of 100; texts that mean the same count against each other), Inception score (with Inception
alone).  Lower is better: Fréchet distance, also after Gaussian blurs of 1, 2, 4 and 8 pixels
(standard deviation; of 256, other sizes in proportion), and MMD (the unbiased KID).  Distances are
comparable only where features, number of images and resizing are the same: they are in the output.
Where --images has twice as many images as are generated, the other half is what these are compared
with, and "FD real" and "MMD real" are those of the two halves: what perfect images would get.
All images are held in memory, 200 kB each at 256 pixels.

Progress goes to stderr; stdout is a Markdown table and, as its last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from math import isnan
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipgen import ClipGen, is_out_of_memory
from clipgen.clip import CLIP, IMAGES_PER_PASS
from clipgen.device import find_device
from clipgen.pipeline import to_image
from clipgen.sampling import SEEDS
from scripts.data.dataset import stack_views
from scripts.data.presets import open_images
from scripts.emoji import evaluate as world_scores
from scripts.emoji.judge import load_judge
from scripts.emoji.prompts import world_size
from scripts.evaluation import metrics
from scripts.evaluation.features import RADII, Network, blurred_features, load_network
from scripts.evaluation.figures import sheet
from scripts.evaluation.prompts import COCO_TEXTS, read_prompts
from scripts.evaluation.report import print_table
from scripts.generate_images import Parser, device
from scripts.training.cli import number
from scripts.training.loading import load_clip

TOGETHER = 64  # images sampled in one call: a multiple of the sampler's blocks
AMONG, IN_SHEET = 100, 64  # targets that R@1 chooses from; images on a sheet
OWN_IMAGES = 1000  # that --condition images samples from without --count, at most

Conditions = list[str] | Tensor  # sampled from: texts, or images uint8 (N, 3, S, S)

# Columns of the table by key of the result; those that a run has no value for are left out.
COLUMNS = {
    "bundle": "bundle", "condition": "sampled from", "n_generated": "images",
    "candidates": "best of", "guidance": "guidance", "object_right": "object right",
    "object_right_one_candidate": "with 1 candidate", "both_objects_right": "both objects right",
    "place_right": "place right", "time_right": "time right", "text_over_image": "text / image",
    "psnr_db": "PSNR", "frechet_ratio": "FD / FD of copies", "clip_score": "CLIP score ↑",
    "clip_i": "CLIP-I ↑", "retrieval_r1": "R@1 ↑", "inception_score": "IS ↑",
    "frechet_distance": "FD ↓", "frechet_distance_real": "FD real",
    **{f"frechet_distance_blur_{r}": f"FD-{r} ↓" for r in RADII[1:]},
    "mmd": "MMD ↓", "mmd_real": "MMD real", "features": "features", "seconds_per_image": "s/image",
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    p = Parser(prog="scripts.evaluate", description=__doc__, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    own = "(default: the bundle's own)"
    p.add_argument("bundle", type=Path)
    p.add_argument("--prompts", help="a whole number, FILE or coco:PATH")
    p.add_argument("--images", metavar="SOURCE", help="real images")
    p.add_argument("--condition", choices=("texts", "images"), help="what images are sampled from "
                   "(default: texts; images where --images is given and --prompts is not)")
    p.add_argument("--count", type=number(int, 1, 10**9), help="at most so many texts or images "
                   f"(default: all; {COCO_TEXTS} of COCO; for --condition images half of them, or "
                   f"{OWN_IMAGES})")
    p.add_argument("--features", choices=("inception", "clip", "judge"), help="network of the "
                   "distances (default: inception, with torch-fidelity and its weights, else clip)")
    p.add_argument("--score-clip", metavar="CLIP", help="CLIP of CLIP score and --features clip: "
                   "another bundle, or ARCHITECTURE:PRETRAINED of open_clip (default: the bundle's "
                   "own, which also steered and ranked the images)")
    p.add_argument("--candidates", type=number(int, 1, 4096), default=16,
                   help="images sampled for each that is kept, the one nearest by CLIP (16)")
    p.add_argument("--guidance", type=number(float, 1, 20), help=own)
    p.add_argument("--top-p", type=number(float, 0, 1), help=own)
    p.add_argument("--temperature", type=number(float, 0, 4), help=own)
    p.add_argument("--seed", type=number(int, 0, SEEDS - 1), default=0,
                   help="of the choice of texts and images, and of sampling (0)")
    p.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: cuda if there)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "int8"),
                   help="of the GPT (default: what suits the device)")
    p.add_argument("--sheet", type=Path, metavar="PNG",
                   help="write the first 64 images here, with their texts or their originals")
    a = p.parse_args(arguments)
    a.condition = a.condition or ("images" if a.images and not a.prompts else "texts")
    if a.condition == "images" and not a.images:
        p.error("--condition images needs --images SOURCE")
    if a.condition == "images" and a.prompts:
        p.error("--condition images uses no texts: leave --prompts out")
    if a.features and not a.images:
        p.error("--features is for distances to real images: give --images SOURCE too")
    if a.condition == "texts" and a.prompts is None:
        a.prompts = "200"
    try:
        find_device(a.device)
    except ValueError as error:
        p.error(f"--{error}")
    if a.sheet:
        if a.sheet.suffix.lower() != ".png" or a.sheet.is_dir():
            p.error(f"--sheet {a.sheet} must be a file that ends in .png")
        try:
            a.sheet.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            p.error(f"--sheet {a.sheet} cannot be written ({error.strerror}): name another file")
    return a


def main(arguments: list[str] | None = None) -> dict:
    """The result, which is also the last line of stdout."""
    a = parse_arguments(arguments)
    try:
        result = evaluate(a)
    except (ValueError, FloatingPointError) as error:  # a sentence: what is wrong, what to do
        raise SystemExit(str(error)) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"out of memory with --candidates {a.candidates}: try a lower number, or "
                         "fewer texts or images (--count)") from None
    columns = {key: title for key, title in COLUMNS.items() if result.get(key) is not None}
    print_table([*columns.values()], [[result[key] for key in columns]])
    print(json.dumps(result))
    if result.get("judge_on_renders", 1) < 0.99:
        raise SystemExit("the judge gets fewer than 99 % of new renders right, so its word counts "
                         "for little: train it again with scripts.emoji.judge --train")
    return result


def evaluate(a: argparse.Namespace) -> dict:
    """Everything between the arguments and the result."""
    began = time.time()
    count = world_size(a.prompts) if a.condition == "texts" else None
    if count and a.count == 1:
        raise ValueError("--count 1: the number of texts starts at 2")
    judge = load_judge() if count else None
    prompts = world_scores.Prompts.draw(min(count, a.count or count), len(judge.objects),
                                        a.seed) if judge else None
    texts = (prompts.texts if prompts else
             read_prompts(a.prompts, a.count, a.seed) if a.condition == "texts" else [])
    model = ClipGen.load(a.bundle, a.device, a.dtype and getattr(torch, a.dtype))
    device, size = model.clip.device, model.vqgan.config.image_size
    known = check_texts(model, texts, world=judge is not None)
    clip, clip_name = scoring_clip(model, a.score_clip)
    network = load_network(a.features, clip, clip_name) if a.images else None
    names, real, other = [], None, None
    if a.images:
        names, real, other = read_real(a.images, size, len(texts) or a.count, a.seed)
        if other is None and not texts:
            print(f"{a.images} has fewer than {2 * len(real)} readable images, so samples are "
                  "compared with the very images they were sampled from, which flatters them",
                  file=sys.stderr)
    scores = {"judge_on_renders": world_scores.judged_on_renders(judge, size)} if judge else {}

    conditions = texts or real
    settings = asdict(model.sampling) | {name: getattr(a, name) for name in
                                         ("guidance", "temperature", "top_p")
                                         if getattr(a, name) is not None}
    generated, first, seconds = sample(model, conditions, a.seed, a.candidates, settings)
    scores |= fit(clip, generated, conditions, a.seed)
    if judge:
        def again(conditions: Conditions, candidates: int) -> tuple[Tensor, Tensor]:
            return sample(model, conditions, a.seed + 1, candidates, settings)[:2]

        scores |= world_scores.text_scores(judge, prompts, generated, first)
        scores |= world_scores.paired_scores(judge, prompts, first, again, size, a.seed)
        scores |= world_scores.quality_scores(model, judge, prompts, generated, first, size, a.seed)
    if network:
        scores |= distances(network, generated, real, other, device)
    result = {
        "bundle": str(a.bundle), "condition": a.condition, "prompts": a.prompts, "images": a.images,
        # A share of nothing, of texts that all leave the time open, is no number.
        **{name: float(f"{score:.5g}") for name, score in scores.items() if not isnan(score)},
        "n_prompts": len(prompts.ones if prompts else texts),
        "n_objects": judge and len(judge.objects),
        "judge_dimensions": judge and judge.dimensions, **known,
        "n_generated": len(generated), "n_real": 0 if real is None else len(real),
        "independent": network and other is not None,
        "image_size": size, "retrieval_among": min(AMONG, len(generated)), "score_clip": clip_name,
        "features": network and network.name, "dimensions": network and network.dimensions,
        "resize": network and network.resize, "candidates": a.candidates, **settings,
        "seed": a.seed, "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.time() - began, 1),
        "seconds_per_image": float(f"{seconds / len(generated):.3g}")}
    if a.sheet:
        try:
            draw_sheet(result, generated, texts, names, real).save(a.sheet)
        except OSError as error:  # the scores took longer than a sheet, and stay
            print(f"--sheet {a.sheet} cannot be written ({error.strerror})", file=sys.stderr)
    return result


def check_texts(model: ClipGen, texts: list[str], world: bool) -> dict[str, int]:
    """How many texts CLIP cuts and how many words it never saw; ValueError: such in its `world`."""
    unknown = sorted({word for text in texts for word in model.clip.unknown_words(text)})
    if world and unknown:
        raise ValueError("this bundle was not trained on the world of the default one, its CLIP "
                         f"never saw {', '.join(map(repr, unknown[:3]))}: give --prompts FILE or "
                         "--images SOURCE")
    if unknown:
        print(f"CLIP never saw {len(unknown)} words of these texts in training and will guess: "
              f"{', '.join(map(repr, unknown[:20]))}", file=sys.stderr)
    if truncated := sum(model.clip.truncated(text) for text in texts):
        print(f"{truncated} texts are longer than CLIP's {model.clip.context_length} tokens; their "
              "ends were cut off", file=sys.stderr)
    return {"n_truncated": truncated, "n_unknown_words": len(unknown)}


def scoring_clip(model: ClipGen, source: str | None) -> tuple[CLIP, str]:
    """The CLIP that scores, on the model's device, and what the report calls it."""
    if source:
        clip, name = load_clip(source).to(model.clip.device), f"CLIP {source}"
    else:
        clip, name = model.clip, "the bundle's own CLIP"
        print("CLIP score, R@1 and CLIP features are by the CLIP that also steered and ranked the "
              "images, which flatters them: --score-clip takes another", file=sys.stderr)
    if clip.config.text_embedding_mean or clip.config.image_embedding_mean:
        name += ", its embeddings less their means"
    return clip, name


def read_real(source: str, size: int, count: int | None,
              seed: int) -> tuple[list[str], Tensor, Tensor | None]:
    """Names and pixels uint8 (N, 3, size, size) of N real images, and as many other ones.

    N is `count` (None: at most 1000, and no more than half of all), or less where there are fewer;
    the others are None where there are fewer than 2 N.
    """
    train, validation = open_images(source)
    images = validation or train
    count = count or max(2, min(OWN_IMAGES, len(images) // 2))
    drawn = images.subset(np.random.default_rng(seed).permutation(len(images)).tolist())
    indices, views = stack_views(drawn, size, 2 * count)
    names = [drawn.names[i] for i in indices]
    if min(count, len(views)) < 2:
        raise ValueError(f"a distance needs at least 2 real images and 2 samples, got {len(views)} "
                         f"and {count}: give more, or leave --images out")
    return names[:count], views[:count], views[count:] if len(views) == 2 * count else None


def embed(clip: CLIP, conditions: Conditions) -> Tensor:
    """Unit rows (N, D) of texts, or of images uint8 (N, 3, S, S)."""
    if isinstance(conditions, Tensor):
        return torch.cat([clip.embed_pixels(part.float() / 255)
                          for part in conditions.split(IMAGES_PER_PASS)])
    # One by one, as `generate` does: another number of rows rounds differently.
    return torch.cat([clip.embed_texts([text]) for text in conditions])


def sample(model: ClipGen, conditions: Conditions, seed: int, candidates: int,
           settings: dict[str, float]) -> tuple[Tensor, Tensor, float]:
    """For each text or image (uint8) the best of its candidates and the first of them, both uint8
    (N, 3, S, S), and the seconds it took.

    Image i is that of `generate(texts[i], num_images=1, candidates=candidates, seed=seed + i *
    candidates)`, but the candidates of several texts share the sampler's blocks.
    """
    began, best, firsts = time.perf_counter(), [], []
    group = max(1, TOGETHER // candidates)
    bar = tqdm(total=len(conditions), unit="image", desc="sampling")
    for start in range(0, len(conditions), group):
        embeddings = embed(model.clip, conditions[start:start + group])
        first = seed + start * candidates
        seeds = [(first + i) % SEEDS for i in range(len(embeddings) * candidates)]
        codes = model.sample(embeddings.repeat_interleave(candidates, 0), seeds, **settings)
        for embedding, pixels in zip(embeddings, model.decode(codes).split(candidates),
                                     strict=True):
            nearest = (model.clip.embed_pixels(pixels) @ embedding).argmax()
            for kept, one in ((best, pixels[nearest]), (firsts, pixels[0])):
                kept.append((one * 255).round().to("cpu", torch.uint8))
        bar.update(len(embeddings))
    bar.close()
    return torch.stack(best), torch.stack(firsts), time.perf_counter() - began


def fit(clip: CLIP, generated: Tensor, conditions: Conditions,
        seed: int) -> dict[str, float]:
    """How near the images are to what they were sampled from: CLIP score or CLIP-I, and R@1."""
    images, targets = (embed(clip, x).cpu().numpy() for x in (generated, conditions))
    name = "clip_i" if isinstance(conditions, Tensor) else "clip_score"
    return {name: metrics.clip_score(images, targets),
            "retrieval_r1": metrics.retrieval_r1(images, targets, seed, AMONG)}


def distances(network: Network, generated: Tensor, real: Tensor, other: Tensor | None,
              device: torch.device) -> dict[str, float]:
    """Fréchet distances by blur, MMD and Inception score of images uint8 (N, 3, S, S).

    They are compared with `other`, as many real images that nothing was sampled from, else with
    `real`; both distances take as many of either set.
    """
    count = min(len(generated), len(real))
    if count <= network.dimensions:
        print(f"{count} images are too few for {network.dimensions} dimensions: the covariances "
              "are singular and Fréchet distances much too high; take more images, or MMD, which "
              "is unbiased", file=sys.stderr)
    a = blurred_features(network, generated, device)
    b = blurred_features(network, real if other is None else other, device)
    scores = {f"frechet_distance_blur_{radius}" if radius else "frechet_distance":
              metrics.frechet_distance(a[i, :count], b[i, :count])
              for i, radius in enumerate(RADII)}
    if other is not None:
        halves = blurred_features(network, real, device, radii=(0,))[0], b[0]
        scores["frechet_distance_real"] = metrics.frechet_distance(*halves)
        scores["mmd_real"] = metrics.mmd(*halves)
    scores["mmd"] = metrics.mmd(a[0, :count], b[0, :count])
    if network.classify:
        probabilities = network.classify(torch.from_numpy(a[0])).cpu().numpy()
        scores["inception_score"] = metrics.inception_score(probabilities, min(10, len(a[0])))
    return scores


def draw_sheet(result: dict, generated: Tensor, texts: list[str], names: list[str],
               real: Tensor | None) -> Image.Image:
    """The first images with their texts, or, sampled from images, beside those."""
    images = [to_image(image / 255) for image in generated[:IN_SHEET]]
    if texts:
        cells, of = list(zip(texts, images, strict=False)), "the text below"
    else:
        cells, of = [], "the CLIP embedding of the image on its left"
        for name, original, image in zip(names, real, images[:IN_SHEET // 2], strict=False):
            cells += [(f"original: {Path(name).name}", to_image(original / 255)),
                      ("sampled from the image's embedding", image)]
    best = ("one sample each" if result["candidates"] == 1
            else f"the best of {result['candidates']} by CLIP")
    shown = len(cells) if texts else len(cells) // 2
    return sheet(cells, f"{result['bundle']}: each image sampled from {of}, {best}, guidance "
                        f"{result['guidance']:g}; the first {shown} of {len(generated)}")


if __name__ == "__main__":
    main()

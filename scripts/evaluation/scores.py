"""Scoring a bundle: how well its images fit their texts, how real they look; and its copies."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clipgen import ClipGen
from clipgen.clip import CLIP, IMAGES_PER_PASS
from clipgen.device import find_device, is_out_of_memory
from clipgen.pipeline import to_image
from clipgen.sampling import SEEDS
from clipgen.sheet import sheet
from clipgen.vqgan import VQGAN
from scripts.data.dataset import stack_views
from scripts.data.presets import open_images
from scripts.data.reading import PLAIN, Reading, ReadingSettings
from scripts.evaluation import metrics
from scripts.evaluation.features import RADII, Network, blurred_features, load_network
from scripts.evaluation.figures import grid
from scripts.training.cli import device, number, setting

TOGETHER = 64  # images sampled in one call: a multiple of the sampler's blocks
AMONG, IN_SHEET = 100, 64  # targets that R@1 chooses from; images on a sheet
OWN_IMAGES = 1000  # that images are sampled from without --count, at most

Conditions = Sequence[str] | Tensor  # sampled from: texts, or images uint8 (N, 3, S, S)

@dataclass(kw_only=True)
class EvaluationSettings(ReadingSettings):
    """What is sampled from a bundle, and what it is compared with."""

    bundle: Path = setting(type=Path, positional=True)
    images: str | None = setting(None, "real images", metavar="SOURCE")
    count: int | None = setting(None, "at most so many texts or images (default: all)",
                                type=number(int, 1, 10**9))
    features: str | None = setting(None, "network of the distances: inception, clip, judge "
                                   "(default: inception, with torch-fidelity and its weights, else "
                                   "clip)")
    score_clip: str | None = setting(None, "CLIP of CLIP score and --features clip: another "
                                     "bundle, or ARCHITECTURE:PRETRAINED of open_clip (default: "
                                     "the bundle's own, which also steered and ranked the images)",
                                     metavar="CLIP")
    candidates: int = setting(16, "images sampled for each that is kept, the one nearest by CLIP",
                              type=number(int, 1, 4096))
    guidance: float | None = setting(None, "(default: the bundle's own)", type=number(float, 1, 20))
    top_p: float | None = setting(None, "(default: the bundle's own)", type=number(float, 0, 1))
    temperature: float | None = setting(None, "(default: the bundle's own)",
                                        type=number(float, 0, 4))
    seed: int = setting(0, "of the choice of texts and images, and of sampling",
                        type=number(int, 0, SEEDS - 1))
    device: str | None = setting(None, "cpu, cuda or cuda:N (default: cuda if there)", type=device)
    dtype: str | None = setting(None, "of the GPT (default: what suits the device)",
                                choices=("float32", "bfloat16", "float16", "int8"))
    sheet: Path | None = setting(None, "write the first 64 images here, with their texts or their "
                                 "originals", type=Path, metavar="PNG")


@dataclass
class Evaluation:
    """What `evaluate` made and found.  best, first: uint8 (N, 3, S, S), of the candidates."""

    best: Tensor
    first: Tensor
    result: dict[str, Any]
    sampling: dict[str, float]
    names: list[str]  # of the real images
    real: Tensor | None


def check(s: EvaluationSettings) -> None:
    """ValueError, one sentence: settings that cannot be, before anything is loaded."""
    if s.features and not s.images:
        raise ValueError("--features is for distances to real images: give --images SOURCE too")
    try:
        find_device(s.device)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    if s.sheet:
        if s.sheet.suffix.lower() != ".png" or s.sheet.is_dir():
            raise ValueError(f"--sheet {s.sheet} must be a file that ends in .png")
        try:
            s.sheet.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--sheet {s.sheet} cannot be written ({error.strerror}): name "
                             "another file") from None


@contextmanager
def enough_memory(candidates: int) -> Iterator[None]:
    """MemoryError, one sentence, for all the ways in which memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory with --candidates {candidates}: try a lower number, or "
                          "fewer texts or images (--count)") from None


def load_model(s: EvaluationSettings) -> ClipGen:
    return ClipGen.load(s.bundle, s.device, s.dtype and getattr(torch, s.dtype))


def evaluate(s: EvaluationSettings, model: ClipGen, texts: Sequence[str],
             scoring: CLIP | None = None) -> Evaluation:
    """Sample from `texts`, or without any from real images, and score what comes of it.

    `scoring`: the CLIP of --score-clip.  ValueError, one sentence: too few images.
    FloatingPointError: weights that are damaged.
    """
    began = time.time()
    device, size = model.clip.device, model.vqgan.config.image_size
    known = check_texts(model, texts)
    clip, clip_name = scoring_clip(model, scoring, s.score_clip)
    network = load_network(s.features, clip, clip_name) if s.images else None
    names, real, other = [], None, None
    if s.images:
        names, real, other = read_real(s.images, size, len(texts) or s.count, s.seed,
                                       s.reading)
        if other is None and not texts:
            print(f"{s.images} has fewer than {2 * len(real)} readable images, so samples are "
                  "compared with the very images they were sampled from, which flatters them",
                  file=sys.stderr)
    conditions = texts or real
    sampling = asdict(model.sampling) | {name: getattr(s, name) for name in
                                         ("guidance", "temperature", "top_p")
                                         if getattr(s, name) is not None}
    with enough_memory(s.candidates):
        best, first, seconds = sample(model, conditions, s.seed, s.candidates, sampling)
        scores = fit(clip, best, conditions, s.seed)
        if network:
            scores |= distances(network, best, real, other, device)
    result = {
        "bundle": str(s.bundle), "condition": "texts" if texts else "images",
        "images": s.images, **rounded(scores), "n_prompts": len(texts), **known,
        "n_generated": len(best), "n_real": 0 if real is None else len(real),
        "independent": network and other is not None,
        "image_size": size, "retrieval_among": min(AMONG, len(best)), "score_clip": clip_name,
        "features": network and network.name, "dimensions": network and network.dimensions,
        "resize": network and network.resize, "candidates": s.candidates, **sampling,
        "seed": s.seed, "device": str(device), "dtype": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.time() - began, 1),
        "seconds_per_image": float(f"{seconds / len(best):.3g}")}
    return Evaluation(best, first, result, sampling, names, real)


def rounded(scores: dict[str, float]) -> dict[str, float]:
    """To five digits; a share of nothing, of texts that all leave the time open, is no number."""
    return {name: float(f"{score:.5g}") for name, score in scores.items() if not isnan(score)}


def save_sheet(path: Path, found: Evaluation, texts: Sequence[str]) -> None:
    try:
        draw_sheet(found.result, found.best, texts, found.names, found.real).save(path)
    except OSError as error:  # the scores took longer than a sheet, and stay
        print(f"--sheet {path} cannot be written ({error.strerror})", file=sys.stderr)


def unknown_words(model: ClipGen, texts: Sequence[str]) -> list[str]:
    return sorted({word for text in texts for word in model.clip.unknown_words(text)})


def check_texts(model: ClipGen, texts: Sequence[str]) -> dict[str, int]:
    """How many texts CLIP cuts and how many words it never saw."""
    unknown = unknown_words(model, texts)
    if unknown:
        print(f"CLIP never saw {len(unknown)} words of these texts in training and will guess: "
              f"{', '.join(map(repr, unknown[:20]))}", file=sys.stderr)
    if truncated := sum(model.clip.truncated(text) for text in texts):
        print(f"{truncated} texts are longer than CLIP's {model.clip.context_length} tokens; their "
              "ends were cut off", file=sys.stderr)
    return {"n_truncated": truncated, "n_unknown_words": len(unknown)}


def scoring_clip(model: ClipGen, given: CLIP | None, source: str | None) -> tuple[CLIP, str]:
    """The CLIP that scores, on the model's device, and what the report calls it."""
    if given:
        clip, name = given.to(model.clip.device), f"CLIP {source}"
    else:
        clip, name = model.clip, "the bundle's own CLIP"
        print("CLIP score, R@1 and CLIP features are by the CLIP that also steered and ranked the "
              "images, which flatters them: --score-clip takes another", file=sys.stderr)
    if clip.config.text_embedding_mean or clip.config.image_embedding_mean:
        name += ", its embeddings less their means"
    return clip, name


def read_real(source: str, size: int, count: int | None, seed: int,
              reading: Reading = PLAIN) -> tuple[list[str], Tensor, Tensor | None]:
    """Names and pixels uint8 (N, 3, size, size) of N real images, and as many other ones.

    N is `count` (None: at most 1000, and no more than half of all), or less where there are fewer;
    the others are None where there are fewer than 2 N.
    """
    train, validation = open_images(source, reading=reading)
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


def draw_sheet(result: dict, generated: Tensor, texts: Sequence[str], names: list[str],
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


@torch.no_grad()
def copy_scores(vqgan: VQGAN, images: Tensor,
                perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
                ) -> tuple[dict[str, float], Image.Image]:
    """Scores over images uint8 (N, 3, S, S), and a grid of the first 8 above their copies."""
    device = vqgan.quantizer.embedding.weight.device
    counts = torch.zeros(vqgan.config.codebook_size, device=device)
    sums: dict[str, float] = {}
    copies = []
    for part in images.split(32):
        pixels = part.to(device).float() / 255
        codes = vqgan.encode(pixels)
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
        copy = vqgan.decode(codes)
        copies.append(copy[:max(0, 8 - 32 * len(copies))])
        values = {"l1": (copy - pixels).abs().mean((1, 2, 3)),
                  "psnr_db": metrics.psnr(copy, pixels)}
        if min(pixels.shape[2:]) >= 11:
            values["ssim"] = metrics.ssim(copy, pixels)
        if perceptual:
            values["perceptual"] = perceptual(copy, pixels).expand(len(part))
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item()
    scores = {name: total / len(images) for name, total in sums.items()}
    scores |= {"codebook_usage": (counts > 0).float().mean().item(),
               "codebook_perplexity": math.exp(metrics.entropy(counts))}
    shown = images[:8].to(device).float() / 255
    both = torch.cat([shown, torch.cat(copies)])
    return scores, grid(both, len(shown), ["held-out images", "as the VQGAN copies them"])

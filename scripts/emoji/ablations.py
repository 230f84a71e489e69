"""What each part of the recipe is worth: small VQGANs and GPTs, with the same scenes and steps.

    python -m scripts.emoji.ablations --clip weights/emoji [--objects 12] [--scenes 12000]
        [--steps 1000] [--vqgan-steps 1500] [--seeds 1] [--prompts 200] [--variants NAME ...]

Trains a VQGAN for each of QUANTIZERS on scenes of a small world, 8 x 8 codes an image; on the codes
of the first, a GPT for each of VARIANTS and each seed; on those of the others, GPTs like BASE.
The judge looks at what the GPTs make of texts and of images, both about pairs of object and place
that no training showed.  The GPTs of BASE are then sampled with each of SAMPLING.

Rerun, it goes on, also to more --seeds; seconds of training are those of the last start.  Once the
quantizers are there, several processes may do different --variants in the same --run at the same
time.  The table has the means of all rows made so far, in Markdown; the last line of stdout is
JSON.  Fréchet distances of no more texts than the judge has dimensions are mostly bias.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from clipgen import ClipGen
from scripts.data.files import write_text
from scripts.emoji.judge import draw_labelled, load_judge, share_right
from scripts.emoji.prompts import held_out_labels, texts_of
from scripts.emoji.world import OBJECTS
from scripts.evaluation import metrics
from scripts.evaluation.report import print_named
from scripts.evaluation.scores import sample
from scripts.training.bundling import BundleSettings, make_bundle
from scripts.training.cli import number, one_sentence, positive
from scripts.training.encoding import EncodeSettings, encode_images
from scripts.training.gpt import GPTSettings, train_gpt
from scripts.training.loading import load_vqgan
from scripts.training.settings import require_same
from scripts.training.trainer import start
from scripts.training.vqgan import VQGANSettings, train_vqgan

QUANTIZERS: dict[str, dict[str, Any]] = {  # settings of a VQGAN; all variants share the first
    "codes of 8 dimensions, unit length": {"code_dim": 8},
    "codes of 256 dimensions, any length": {"code_dim": 256, "unnormalised": True}}
VARIANTS: dict[str, dict[str, Any]] = {  # settings of a GPT
    "paper's recipe: no noise": {"noise": 0.0},
    "noise 0.25": {"noise": 0.25},
    "noise 0.5": {"noise": 0.5},
    "noise 1": {"noise": 1.0},
    "noise 0.5, Muon": {"noise": 0.5, "optimizer": "muon"},
    "means subtracted, no noise": {"noise": 0.0, "subtract_means": True},
    "means subtracted, noise 0.5": {"noise": 0.5, "subtract_means": True},
    "noise 0.5, embedding reconstruction": {"noise": 0.5, "reconstruction": 0.1}}
BASE = "noise 0.5"  # what guidance, candidates and quantizers are tried on
SAMPLING = [*({"guidance": g} for g in (1.5, 2.5, 4.0, 6.0)),
            *({"guidance": 2.5, key: value} for key, value in (
                ("top_p", 0.95), ("top_p", 0.9), ("top_k", 100), ("temperature", 0.8))),
            *({"guidance": 2.5, "top_p": 0.95, "candidates": n} for n in (4, 16, 64))]
SIZE, CODES = 64, 1024
VQGAN = {"size": SIZE, "channels": "32,64,64,128", "codebook_size": CODES, "batch": 8, "gan": 0.0,
         "optimizer": "adamw", "middle_attention": True}
GPT = {"layers": 4, "width": 128, "heads": 4, "batch": 32, "lr": 2e-3, "optimizer": "adamw"}
EXACT = {"scale": 1.0, "flip": False}  # a scene is seen as it was drawn


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower())


def train_quantizer(name: str, a: argparse.Namespace) -> dict[str, float]:
    """Train a VQGAN and encode the scenes with it; how well it copies scenes never shown."""
    world, run = f"objects={a.objects},size={SIZE}", a.run / slug(name)
    scenes = f"scenes:{a.scenes},{world}"
    scores = train_vqgan(VQGANSettings(
        images=scenes, validation=f"scenes:256,{world},held-out,first=310000000",
        run=run / "vqgan", clip=a.clip, steps=a.vqgan_steps, validations=1, **EXACT,
        **VQGAN | QUANTIZERS[name]), start("float32", 0))
    encode_images(EncodeSettings(
        images=scenes, out=run / "shards", clip=a.clip, vqgan=str(run / "vqgan"), crops=1,
        held_out=0.02, **EXACT))
    vqgan, labels = load_vqgan(run / "vqgan"), held_out_labels(a.prompts, a.objects, 0)
    copies = torch.cat([vqgan.decode(vqgan.encode(part.float() / 255))
                        for part in draw_labelled(labels, SIZE, [0, 5]).split(32)])
    return {"psnr_db": scores["psnr_db"], "codebook_usage": scores["codebook_usage"],
            "object_right_of_copies": share_right(load_judge().right(copies, labels)["objects"])}


def train(variant: str, quantizer: str, seed: int,
          a: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """The bundle of a GPT, and what its training ended with."""
    parts, began = a.run / slug(quantizer), time.perf_counter()
    vqgan, run = str(parts / "vqgan"), parts / slug(f"{variant} {seed}")
    scores = train_gpt(GPTSettings(
        shards=parts / "shards", run=run, vqgan=vqgan, clip=a.clip, steps=a.steps,
        warmup=a.steps // 10, seed=seed, validations=1, **GPT | VARIANTS[variant]),
        start("float32", seed))
    make_bundle(BundleSettings(out=run / "bundle", clip=a.clip, vqgan=vqgan, gpt=run, guidance=1.0,
                               top_p=1.0, force=True))
    return run / "bundle", {"token_ce": scores["token_ce"],
                            "training_seconds": time.perf_counter() - began}


def measure(bundle: Path, a: argparse.Namespace, candidates: int = 1,
            **sampling: float) -> dict[str, float]:
    """Shares of texts, and of renders given as images, whose object is right; and so on."""
    model, judge = ClipGen.load(bundle), load_judge()
    labels = held_out_labels(a.prompts, a.objects, 0)
    texts = texts_of(labels, 0)
    settings = asdict(model.sampling) | sampling
    images, _, seconds = sample(model, texts, 0, candidates, settings)
    originals, others = (draw_labelled(labels, SIZE, [0, k]) for k in (5, 7))
    of_images, *_ = sample(model, originals, 1, candidates, settings)

    def right(made: torch.Tensor) -> float:
        return share_right(judge.right(made.float() / 255, labels)["objects"])

    with torch.no_grad():
        features = [judge.embed(x.float() / 255).numpy() for x in (images, others)]
    return {"object_right_of_texts": right(images), "object_right_of_images": right(of_images),
            "frechet_distance": metrics.frechet_distance(*features), "mmd": metrics.mmd(*features),
            "dimensions": judge.dimensions, "seconds_per_image": seconds / len(texts)}


def tasks(a: argparse.Namespace) -> dict[str, tuple[str | None, Callable[[], dict[str, float]]]]:
    """Row by row in the table's order: the variant that it belongs to, and what makes it."""
    first, *others = QUANTIZERS

    def trained(variant: str, quantizer: str, seed: int) -> dict[str, float]:
        bundle, scores = train(variant, quantizer, seed, a)
        return measure(bundle, a) | scores

    def sampled(sampling: dict[str, float], seed: int) -> dict[str, float]:
        return measure(train(BASE, first, seed, a)[0], a, **sampling)

    rows: dict[str, tuple[str | None, Callable[[], dict[str, float]]]] = {
        f"copies, {name}": (None, partial(train_quantizer, name, a)) for name in QUANTIZERS}
    for name in VARIANTS:
        for seed in range(a.seeds):
            rows[f"{name}, seed {seed}"] = name, partial(trained, name, first, seed)
    for sampling in SAMPLING:
        settings = ", ".join(f"{key} {value:g}" for key, value in sampling.items())
        for seed in range(a.seeds):
            rows[f"{BASE}, {settings}, seed {seed}"] = BASE, partial(sampled, sampling, seed)
    for name in others:
        for seed in range(a.seeds):
            rows[f"{BASE}, {name}, seed {seed}"] = BASE, partial(trained, BASE, name, seed)
    return rows


def summary(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The rows, those that differ by their seed alone as their mean."""
    groups: dict[str, list[dict[str, float]]] = {}
    for name, row in rows.items():
        groups.setdefault(re.sub(", seed [0-9]+$", "", name), []).append(row)
    return {name: {k: float(f"{mean(row[k] for row in group):.4g}") for k in group[0]}
            | {"rows": len(group)} for name, group in groups.items()}


def main(arguments: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m scripts.emoji.ablations",
                                description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clip", required=True, help="run of train_clip, or bundle")
    p.add_argument("--run", type=Path, default=Path("runs/ablations"), help="(runs/ablations)")
    p.add_argument("--objects", type=number(int, 4, len(OBJECTS)), default=12)
    p.add_argument("--scenes", type=positive, default=12_000)
    p.add_argument("--steps", type=positive, default=1000, help="of each GPT (1000)")
    p.add_argument("--vqgan-steps", type=positive, default=1500, help="of each VQGAN (1500)")
    p.add_argument("--seeds", type=positive, default=1, help="GPTs of each variant (1)")
    p.add_argument("--prompts", type=number(int, 2, 10**6), default=200,
                   help="texts, and as many images (200)")
    p.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS),
                   metavar="NAME", help=f"some of: {'; '.join(VARIANTS)} (all)")
    a = p.parse_args(arguments)
    if a.objects > (known := len(load_judge().objects)):
        raise SystemExit(f"--objects {a.objects}: the judge knows {known}")
    kept, settings = a.run / "rows", a.run / "settings.json"
    kept.mkdir(parents=True, exist_ok=True)
    given = {k: str(v) for k, v in vars(a).items() if k not in ("run", "variants", "seeds")}
    if settings.is_file():
        with one_sentence():
            require_same(a.run, json.loads(settings.read_text()), given)
    write_text(settings, json.dumps(given, indent=1))
    rows = {}
    for name, (variant, make) in tasks(a).items():
        path = kept / f"{slug(name)}.json"
        if not path.is_file() and (variant is None or variant in a.variants):
            with one_sentence():
                row = make()
            write_text(path, json.dumps({k: float(f"{v:.4g}") for k, v in row.items()}))
        if path.is_file():
            rows[name] = json.loads(path.read_text())
    print_named(summary(rows))
    return {"settings": given, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(main()))

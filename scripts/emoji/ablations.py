"""What each part of the recipe is worth: small VQGANs and GPTs, with the same scenes and steps.

    python -m scripts.emoji.ablations --clip weights/emoji [--objects 12] [--scenes 12000]
        [--steps 1000] [--vqgan-steps 1500] [--seeds 1] [--prompts 200] [--variants NAME ...]

Trains a VQGAN for each of QUANTISERS on scenes of a small world, 8 x 8 codes an image; on the codes
of the first, a GPT for each of VARIANTS and each seed; on those of the others, GPTs like BASE.
The judge looks at what the GPTs make of texts and of images, both about pairs of object and place
that no training showed.  The GPTs of BASE are then sampled with each of SAMPLING.

Rerun, it goes on, also to more --seeds; seconds of training are those of the last start.  Once the
quantisers are there, several processes may do different --variants in the same --run at the same
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

import torch

from clipgen import ClipGen
from scripts import encode_images, evaluate, make_bundle, train_gpt, train_vqgan
from scripts.data.files import write_text
from scripts.emoji.judge import draw_labelled, load_judge, share
from scripts.emoji.prompts import held_out_labels, texts_of
from scripts.emoji.world import OBJECTS
from scripts.evaluation import metrics
from scripts.evaluation.report import print_named
from scripts.training.cli import number, positive
from scripts.training.loading import load_vqgan

QUANTISERS = {  # flags of train_vqgan; the codes of the first are those of all variants
    "codes of 8 dimensions, unit length": "--code-dim 8",
    "codes of 256 dimensions, any length": "--code-dim 256 --unnormalised"}
VARIANTS = {  # flags of train_gpt
    "paper's recipe: no noise": "--noise 0",
    "noise 0.25": "--noise 0.25",
    "noise 0.5": "--noise 0.5",
    "noise 1": "--noise 1",
    "noise 0.5, Muon": "--noise 0.5 --optimizer muon",
    "means subtracted, no noise": "--noise 0 --subtract-means",
    "means subtracted, noise 0.5": "--noise 0.5 --subtract-means",
    "noise 0.5, embedding reconstruction": "--noise 0.5 --reconstruction 0.1"}
BASE = "noise 0.5"  # what guidance, candidates and quantisers are tried on
SAMPLING = [*({"guidance": g} for g in (1.5, 2.5, 4.0, 6.0)),
            *({"guidance": 2.5, key: value} for key, value in (
                ("top_p", 0.95), ("top_p", 0.9), ("top_k", 100), ("temperature", 0.8))),
            *({"guidance": 2.5, "top_p": 0.95, "candidates": n} for n in (4, 16, 64))]
SIZE, CODES = 64, 1024
VQGAN = f"--size {SIZE} --channels 32,64,64,128 --codebook-size {CODES} --batch 8 --gan 0"
GPT = "--layers 4 --width 128 --heads 4 --batch 32 --lr 2e-3 --optimizer adamw"
EXACT = "--scale 1 --no-flip"  # a scene is seen as it was drawn


def slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower())


def train_quantiser(name: str, a: argparse.Namespace) -> dict[str, float]:
    """Train a VQGAN and encode the scenes with it; how well it copies scenes never shown."""
    world, run = f"objects={a.objects},size={SIZE}", a.run / slug(name)
    scores = train_vqgan.main([
        f"scenes:{a.scenes},{world}", "--validation",
        f"scenes:256,{world},held-out,first=310000000", "--run", str(run / "vqgan"),
        "--clip", a.clip, "--steps", str(a.vqgan_steps), "--validations", "1",
        *f"{VQGAN} {EXACT} {QUANTISERS[name]}".split()])
    encode_images.main([
        f"scenes:{a.scenes},{world}", str(run / "shards"), "--clip", a.clip, "--vqgan",
        str(run / "vqgan"), "--crops", "1", "--held-out", "0.02", *EXACT.split()])
    vqgan, labels = load_vqgan(run / "vqgan"), held_out_labels(a.prompts, a.objects, 0)
    copies = torch.cat([vqgan.decode(vqgan.encode(part.float() / 255))
                        for part in draw_labelled(labels, SIZE, [0, 5]).split(32)])
    return {"psnr_db": scores["psnr_db"], "codebook_usage": scores["codebook_usage"],
            "object_right_of_copies": share(load_judge().right(copies, labels)["objects"])}


def train(variant: str, quantiser: str, seed: int,
          a: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """The bundle of a GPT, and what its training ended with."""
    parts, began = a.run / slug(quantiser), time.perf_counter()
    vqgan, run = str(parts / "vqgan"), parts / slug(f"{variant} {seed}")
    scores = train_gpt.main([
        str(parts / "shards"), "--run", str(run), "--vqgan", vqgan, "--clip", a.clip,
        "--steps", str(a.steps), "--warmup", str(a.steps // 10), "--seed", str(seed),
        "--validations", "1", *f"{GPT} {VARIANTS[variant]}".split()])
    make_bundle.main([str(run / "bundle"), "--clip", a.clip, "--vqgan", vqgan, "--gpt", str(run),
                      "--guidance", "1", "--top-p", "1", "--force"])
    return run / "bundle", {"token_ce": scores["token_ce"],
                            "training_seconds": time.perf_counter() - began}


def measure(bundle: Path, a: argparse.Namespace, candidates: int = 1,
            **sampling: float) -> dict[str, float]:
    """Shares of texts, and of renders given as images, whose object is right; and so on."""
    model, judge = ClipGen.load(bundle), load_judge()
    labels = held_out_labels(a.prompts, a.objects, 0)
    texts = texts_of(labels, 0)
    evaluate.check_texts(model, texts, world=True)
    settings = asdict(model.sampling) | sampling
    images, _, seconds = evaluate.sample(model, texts, 0, candidates, settings)
    originals, others = (draw_labelled(labels, SIZE, [0, k]) for k in (5, 7))
    of_images, *_ = evaluate.sample(model, originals, 1, candidates, settings)

    def right(made: torch.Tensor) -> float:
        return share(judge.right(made.float() / 255, labels)["objects"])

    with torch.no_grad():
        features = [judge.embed(x.float() / 255).numpy() for x in (images, others)]
    return {"object_right_of_texts": right(images), "object_right_of_images": right(of_images),
            "frechet_distance": metrics.frechet_distance(*features), "mmd": metrics.mmd(*features),
            "dimensions": judge.dimensions, "seconds_per_image": seconds / len(texts)}


def tasks(a: argparse.Namespace) -> dict[str, tuple[str | None, Callable[[], dict[str, float]]]]:
    """Row by row in the table's order: the variant that it belongs to, and what makes it."""
    first, *others = QUANTISERS

    def trained(variant: str, quantiser: str, seed: int) -> dict[str, float]:
        bundle, scores = train(variant, quantiser, seed, a)
        return measure(bundle, a) | scores

    def sampled(sampling: dict[str, float], seed: int) -> dict[str, float]:
        return measure(train(BASE, first, seed, a)[0], a, **sampling)

    rows: dict[str, tuple[str | None, Callable[[], dict[str, float]]]] = {
        f"copies, {name}": (None, partial(train_quantiser, name, a)) for name in QUANTISERS}
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
    if settings.is_file() and json.loads(settings.read_text()) != given:
        raise SystemExit(f"{a.run} holds ablations with other arguments: give another --run")
    write_text(settings, json.dumps(given, indent=1))
    rows = {}
    for name, (variant, make) in tasks(a).items():
        path = kept / f"{slug(name)}.json"
        if not path.is_file() and (variant is None or variant in a.variants):
            write_text(path, json.dumps({k: float(f"{v:.4g}") for k, v in make().items()}))
        if path.is_file():
            rows[name] = json.loads(path.read_text())
    print_named(summary(rows))
    return {"settings": given, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(main()))

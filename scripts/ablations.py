"""What each part of the recipe is worth: small GPTs on the same codes, with the same steps.

    python -m scripts.ablations --clip runs/emoji-cpu/clip --vqgan runs/emoji-cpu/vqgan \\
        [--objects 12] [--scenes 12000] [--steps 1000] [--seeds 1] [--prompts 200]

Encodes scenes of a small world, trains one GPT for each of VARIANTS and each seed, and has the
judge look at what they make of texts and of images, both about pairs of object and place that no
training showed.  The GPT of BASE is then sampled with each of SAMPLING.  Rows of Markdown; the
last line of stdout is JSON.  Rerun, it goes on; seconds of training are those of the last start.
Fréchet distances of no more texts than the judge has dimensions are mostly bias.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch

from clipgen import ClipGen
from scripts import encode_images, evaluate, make_bundle, metrics, train_gpt
from scripts.arguments import number, positive
from scripts.checkpoints import write_text
from scripts.judge import draw_labelled, load_judge, share
from scripts.parts import load_vqgan
from scripts.prompts import held_out_labels, texts_of
from scripts.world import OBJECTS

VARIANTS = {  # flags of train_gpt
    "paper's recipe: no noise": "--noise 0",
    "noise 0.25": "--noise 0.25",
    "noise 0.4": "--noise 0.4",
    "noise 1": "--noise 1",
    "means subtracted, no noise": "--noise 0 --subtract-means",
    "means subtracted, noise 0.5": "--noise 0.5 --subtract-means",
    "noise 0.5": "--noise 0.5",
    "noise 0.5, embedding reconstruction": "--noise 0.5 --reconstruction 0.1"}
BASE = "noise 0.5"  # what guidance and candidates are tried on
SAMPLING = [{"guidance": 1.5}, {"guidance": 2.5}, {"guidance": 4.0},
            {"guidance": 2.5, "top_p": 0.95}, {"guidance": 2.5, "top_k": 100},
            {"guidance": 2.5, "temperature": 0.8},
            *({"guidance": 2.5, "top_p": 0.95, "candidates": n} for n in (4, 16, 64))]
GPT = "--layers 4 --width 128 --heads 4 --batch 32 --lr 2e-3 --validations 1"


def measure(bundle: Path, a: argparse.Namespace, candidates: int = 1,
            **sampling: float) -> dict[str, float]:
    """Shares of texts, and of renders given as images, whose object is right; and so on."""
    model, judge = ClipGen.load(bundle), load_judge()
    labels = held_out_labels(a.prompts, a.objects, 0)
    texts, size = texts_of(labels, 0), model.vqgan.config.image_size
    evaluate.check_texts(model, texts, world=True)
    settings = asdict(model.sampling) | sampling
    images, _, seconds = evaluate.sample(model, texts, 0, candidates, settings)
    originals, others = (draw_labelled(labels, size, [0, k]) for k in (5, 7))
    of_images, *_ = evaluate.sample(model, originals, 1, candidates, settings)

    def right(made: torch.Tensor) -> float:
        return share(judge.right(made.float() / 255, labels)["objects"])

    with torch.no_grad():
        features = [judge.embed(x.float() / 255).numpy() for x in (images, others)]
    return {"object_right_of_texts": right(images), "object_right_of_images": right(of_images),
            "frechet_distance": metrics.frechet_distance(*features), "mmd": metrics.mmd(*features),
            "dimensions": judge.dimensions,
            "seconds_per_image": seconds / len(texts)}


def train(name: str, seed: int, a: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """The bundle of a variant, and what its training ended with."""
    run = a.run / f"{name.replace(' ', '-').replace(':', '').replace(',', '')}-{seed}"
    flags = f"{VARIANTS[name]} {GPT} --steps {a.steps} --warmup {a.steps // 10} --seed {seed}"
    began = time.perf_counter()
    scores = train_gpt.main([str(a.run / "shards"), "--run", str(run), "--vqgan", a.vqgan,
                             "--clip", a.clip, *flags.split()])
    bundle = run / "bundle"
    make_bundle.main([str(bundle), "--clip", a.clip, "--vqgan", a.vqgan, "--gpt", str(run)])
    return bundle, {"token_ce": scores["token_ce"],
                    "training_seconds": time.perf_counter() - began}


def main(arguments: list[str] | None = None) -> dict:
    p = argparse.ArgumentParser(prog="python -m scripts.ablations", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--clip", required=True, help="run of train_clip, or bundle")
    p.add_argument("--vqgan", required=True, help="run of train_vqgan, or bundle")
    p.add_argument("--run", type=Path, default=Path("runs/ablations"), help="(runs/ablations)")
    p.add_argument("--objects", type=number(int, 4, len(OBJECTS)), default=12)
    p.add_argument("--scenes", type=positive, default=12_000)
    p.add_argument("--steps", type=positive, default=1000, help="of each GPT (1000)")
    p.add_argument("--seeds", type=positive, default=1, help="GPTs of each variant (1)")
    p.add_argument("--prompts", type=number(int, 2, 10**6), default=200,
                   help="texts, and as many images (200)")
    p.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    a = p.parse_args(arguments)
    a.run.mkdir(parents=True, exist_ok=True)
    kept = a.run / "results.json"
    rows: dict[str, dict] = json.loads(kept.read_text()) if kept.is_file() else {}
    settings = {k: str(v) for k, v in vars(a).items() if k not in ("run", "variants")}
    if rows.setdefault("settings", settings) != settings:
        raise SystemExit(f"{a.run} holds ablations with other arguments: give another --run")
    if a.objects > (known := len(load_judge().objects)):
        raise SystemExit(f"--objects {a.objects}: the judge knows {known}")
    size = load_vqgan(a.vqgan).config.image_size
    encode_images.main([f"scenes:{a.scenes},objects={a.objects},size={size}",
                        str(a.run / "shards"), "--clip", a.clip, "--vqgan", a.vqgan,
                        "--scale", "1", "--no-flip", "--crops", "1", "--held-out", "0.02"])

    def keep(name: str, row: dict[str, float]) -> None:
        rows[name] = {k: float(f"{v:.4g}") for k, v in row.items()}
        write_text(kept, json.dumps(rows, indent=1))

    for name in a.variants:
        runs = []
        for seed in range(a.seeds):
            if f"{name}, seed {seed}" not in rows:
                bundle, scores = train(name, seed, a)
                keep(f"{name}, seed {seed}", measure(bundle, a) | scores)
            runs.append(rows[f"{name}, seed {seed}"])
        keep(name, {k: mean(run[k] for run in runs) for k in runs[0]})
    if BASE in a.variants:
        bundle, _ = train(BASE, 0, a)
        for sampling in SAMPLING:
            name = ", ".join([BASE, *(f"{key} {value:g}" for key, value in sampling.items())])
            if name not in rows:
                keep(name, measure(bundle, a, **sampling))
    shown = {k: v for k, v in rows.items() if k != "settings" and ", seed " not in k}
    columns = list(dict.fromkeys(key for row in shown.values() for key in row))
    for line in (["", *columns], ["---"] * (1 + len(columns)),
                 *([name, *(str(row.get(key, "")) for key in columns)]
                   for name, row in shown.items())):
        print("|", " | ".join(line), "|")
    return rows


if __name__ == "__main__":
    print(json.dumps(main()))

"""From a folder of images without captions to a bundle ready to host, in one command.

    python -m scripts.train IMAGES --out weights/mine --clip weights/emoji --size 64 --time 20m
    python -m scripts.train IMAGES --out weights/mine --from weights/coco --time 2h
    accelerate launch -m scripts.train ...      on several devices

Looks at the images and the machine, prints a plan, then: VQGAN, codes and embeddings, GPT, bundle,
evaluation.  Stop it at any moment: the same command goes on from there.  Every stage is a command
of its own too (scripts.train_vqgan, encode_images, train_gpt, make_bundle, evaluate), and what they
print and keep is in --run.

The last line of stdout is JSON, on images that were not trained on: `psnr_db`, `token_ce` and
`unigram_ce`, nats per code; `codebook_usage` is the share of codes that occur in any image.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from clipgen.bundle import BundleError
from clipgen.pipeline import to_image
from scripts import (
    checkpoints,
    encode_images,
    evaluate,
    make_bundle,
    runs,
    train_gpt,
    train_vqgan,
)
from scripts.card import curves_of, plot, write_card
from scripts.feed import open_parts, stack_views
from scripts.images import Images
from scripts.parts import load_clip
from scripts.shards import read_shards
from scripts.sizes import new_sizes, sizes_of

# Shares of --time.  What encoding and evaluation leave over goes to the GPT.
SHARES = {"vqgan": 0.55, "encode": 0.08, "evaluate": 0.08}
VIEWS_PER_SECOND = {"cpu": 150, "cuda": 2000}  # encoded, about; crops are chosen by it
GUIDANCE, TOP_P = 2.0, 0.95  # those that suited the default bundle, a little gentler
EVALUATED = 200  # held-out images that samples are compared with
MOST_CROPS = 16


@dataclass
class Plan:
    """What was settled when the run began; kept in plan.json, so that a rerun does the same."""

    arguments: dict  # those that make the result
    n_images: int
    n_held_out: int
    n_captioned: int  # held-out images with a caption
    fingerprint: str
    vqgan: list[str]  # flags of the stage
    gpt: list[str]
    size: int
    seconds: float
    spent: dict[str, float]  # by finished stage


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.train", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("images", help="folder, zip, tar, 'shards/{000..099}.tar', or coco:, imagenet:, googlecc: "
        "and a folder")
    add("--out", type=Path, required=True, help="the bundle to make, as in weights/mine")
    add("--clip", help="bundle, run of train_clip, or open_clip's ARCHITECTURE:PRETRAINED "
        "(default: that of --from, else ViT-B-32-quickgelu:openai)")
    add("--size", type=runs.positive, help="pixels a side (default: that of --from, else what "
        "images and machine suggest)")
    add("--time", type=runs.duration, default="2h", help="for all stages together (2h)")
    add("--from", dest="start_from", type=Path, metavar="BUNDLE", help="fine-tune this one")
    add("--tune", choices=("both", "gpt", "decoder"), default="both",
        help="of --from: VQGAN and GPT, the GPT alone, or the VQGAN's decoder alone")
    add("--captions", type=Path, help="NAME<TAB>caption lines or COCO's JSON: to measure with, "
        "never to train on")
    add("--held-out", type=float, default=0.05, help="share of images kept for measuring (0.05)")
    add("--scale", type=float, default=0.85, help="least share of the side in a crop (0.85)")
    add("--no-flip", action="store_true", help="mirror no image")
    add("--dtype", choices=runs.PRECISIONS, help="default: bfloat16 on CUDA where it has it")
    add("--workers", type=int, help="processes that read images (default: by machine)")
    add("--run", type=Path, help="directory of the work (default: runs/ and the name of --out)")
    add("--seed", type=int, default=0)
    a = p.parse_args(arguments)
    a.run = a.run or Path("runs") / a.out.name
    cuda = torch.cuda.is_available()
    a.dtype = a.dtype or ("bfloat16" if cuda and torch.cuda.is_bf16_supported() else "float32")
    a.workers = a.workers if a.workers is not None else (
        min(8, (os.cpu_count() or 2) // 2) if cuda else 0)
    if a.start_from and a.clip:
        raise SystemExit(f"--from {a.start_from} brings its own CLIP: leave --clip out")
    if a.tune != "both" and not a.start_from:
        raise SystemExit(f"--tune {a.tune} goes with --from BUNDLE")
    a.clip = a.clip or str(a.start_from or "ViT-B-32-quickgelu:openai")
    return a


def main(arguments: list[str] | None = None) -> dict:
    began = time.time()
    a = parse(arguments)
    accelerator = runs.start(a.dtype, a.seed)
    try:
        images, held, fingerprint = open_parts(a.images, None, a.held_out, a.captions)
        plan = make_plan(a, accelerator, images, held, fingerprint)
    except (ValueError, BundleError) as error:
        raise SystemExit(str(error)) from None
    if accelerator.is_main_process:
        describe(a, accelerator, plan)
    stages = Stages(a, accelerator, plan, began)
    try:
        return stages.run(held)
    except torch.OutOfMemoryError:
        raise SystemExit("out of memory: give a smaller --size, or leave more of the device's "
                         "memory free; the same command goes on from the last checkpoint"
                         ) from None


def make_plan(a: argparse.Namespace, accelerator: Accelerator, images: Images, held: Images,
              fingerprint: str) -> Plan:
    """The plan of an earlier start of the same run, else a new one, equal in all processes."""
    path = a.run / "plan.json"
    settings = {name: str(value) for name, value in vars(a).items()
                if name not in ("run", "workers", "time", "images")}
    if path.is_file():
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
        changed = sorted(k for k in settings if settings[k] != plan.arguments.get(k))
        if changed:
            raise ValueError(f"{a.run} holds a run with other arguments ({', '.join(changed)}): "
                             "give those again, or another --run directory")
        if plan.fingerprint != fingerprint:
            raise ValueError(f"{a.run} was begun with other images than {a.images} holds now: "
                             "give another --run directory")
        return plan
    if (a.out / "config.json").exists():
        raise ValueError(f"{a.out} holds a bundle already: give another --out, or delete it")
    cuda = accelerator.device.type == "cuda"
    size, vqgan, gpt = (sizes_of(a.start_from, a.size, cuda) if a.start_from
                        else new_sizes(images, a.size, cuda, a.time))
    captioned = sum(bool(held.captions(i)) for i in range(min(len(held), 1000)))
    plan, = broadcast_object_list([Plan(
        settings, len(images), len(held), captioned, fingerprint, vqgan, gpt, size, a.time, {})])
    if accelerator.is_main_process:
        load_clip(a.clip)  # better now than after the first stage
        a.run.mkdir(parents=True, exist_ok=True)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(path, json.dumps(asdict(plan), indent=1))
    accelerator.wait_for_everyone()
    return plan


def describe(a: argparse.Namespace, accelerator: Accelerator, plan: Plan) -> None:
    """The plan on stderr."""
    device = accelerator.device
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda"
               else f"CPU, {os.cpu_count()} cores")
    free = f"{shutil.disk_usage(a.run).free / 1e9:.0f} GB of disk"
    memory = (torch.cuda.mem_get_info(device)[1] if device.type == "cuda"
              else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 1e9
    print(f"""images   {a.images}: {plan.n_images} to train on, {plan.n_held_out} held out
machine  {accelerator.num_processes} x {machine}, {memory:.0f} GB of memory, {free} free
VQGAN    {plan.size} x {plan.size} pixels, {' '.join(plan.vqgan)}
GPT      {' '.join(plan.gpt)}
time     {plan.seconds / 60:.0f} min; each stage measures its speed and prints its steps
work in  {a.run}, bundle in {a.out}; stop at any moment, the same command goes on""",
          file=sys.stderr)


class Stages:
    """The stages in order; each is a script's `main`, and each of those goes on where it was."""

    def __init__(self, a: argparse.Namespace, accelerator: Accelerator, plan: Plan, began: float):
        self.a, self.accelerator, self.plan = a, accelerator, plan
        self.mark = began
        self.vqgan_run, self.gpt_run, self.shards = (a.run / n for n in ("vqgan", "gpt", "shards"))

    def done(self, stage: str) -> None:
        """Note what a stage took, once, for the stages after it."""
        now = time.time()
        self.plan.spent.setdefault(stage, now - self.mark)
        self.mark = now
        if self.accelerator.is_main_process:
            checkpoints.write_text(self.a.run / "plan.json",
                                   json.dumps(asdict(self.plan), indent=1))

    def run(self, held: Images) -> dict:
        a, plan = self.a, self.plan
        new = a.start_from is None
        vqgan_scores, gpt_scores = {}, {}
        vqgan = str(self.vqgan_run) if new or a.tune != "gpt" else str(a.start_from)
        gpt = self.gpt_run if new or a.tune != "decoder" else a.start_from
        if vqgan == str(self.vqgan_run):
            vqgan_scores = self.train_vqgan()
        self.done("vqgan")
        if gpt == self.gpt_run:
            self.encode(vqgan)
            self.done("encode")
            gpt_scores = self.train_gpt(vqgan)
        self.done("gpt")
        result = {"bundle": str(a.out), "n_images": plan.n_images, "n_held_out": plan.n_held_out}
        result |= {k: vqgan_scores[k] for k in ("psnr_db", "ssim", "codebook_usage")
                   if k in vqgan_scores}
        result |= {k: gpt_scores[k] for k in ("token_ce", "unigram_ce", "token_ce_text", "text_gap")
                   if k in gpt_scores}
        if gpt == self.gpt_run:
            counts = sum(read_shards(self.shards, part).code_counts()
                         for part in ("train", "validation"))
            result["codebook_usage"] = round((counts > 0).float().mean().item(), 4)
        if self.accelerator.is_main_process:
            self.bundle(vqgan, gpt)
            scores = self.evaluate(held)
            result |= {k: scores[k] for k in ("clip_score", "clip_i", "frechet_distance",
                                              "seconds_per_image") if scores.get(k) is not None}
            self.done("evaluate")
            result["seconds"] = round(sum(plan.spent.values()), 1)
            self.write_card(result)
        self.accelerator.wait_for_everyone()
        return result

    def common(self, *names: str) -> list[str]:
        a = self.a
        flags = {"dtype": ["--dtype", a.dtype], "seed": ["--seed", str(a.seed)],
                 "workers": ["--workers", str(a.workers)],
                 "held_out": ["--held-out", str(a.held_out)],
                 "crop": ["--scale", str(a.scale), *(["--no-flip"] if a.no_flip else [])]}
        return [flag for name in names for flag in flags[name]]

    def train_vqgan(self) -> dict:
        a, plan = self.a, self.plan
        seconds = max(10.0, SHARES["vqgan"] * plan.seconds - (time.time() - self.mark))
        if a.tune == "decoder":
            seconds += 0.3 * plan.seconds
        given = []
        if a.start_from:
            given = ["--decoder-of" if a.tune == "decoder" else "--from", str(a.start_from)]
        return train_vqgan.main([
            a.images, "--run", str(self.vqgan_run), "--clip", a.clip, "--time", f"{seconds:.1f}s",
            *plan.vqgan, *given, *self.common("dtype", "seed", "workers", "held_out", "crop")])

    def encode(self, vqgan: str) -> None:
        a, plan = self.a, self.plan
        views = SHARES["encode"] * plan.seconds * VIEWS_PER_SECOND[self.accelerator.device.type]
        crops = max(2, min(MOST_CROPS, int(views / plan.n_images)))
        captions = ["--captions", str(a.captions)] if a.captions else []
        encode_images.main([
            a.images, str(self.shards), "--clip", a.clip, "--vqgan", vqgan, "--crops", str(crops),
            *captions, *self.common("seed", "workers", "held_out", "crop")])

    def train_gpt(self, vqgan: str) -> dict:
        a, plan = self.a, self.plan
        left = (1 - SHARES["evaluate"]) * plan.seconds - sum(plan.spent.values())
        given = ["--from", str(a.start_from)] if a.start_from else []
        return train_gpt.main([
            str(self.shards), "--run", str(self.gpt_run), "--vqgan", vqgan, "--time",
            f"{max(10.0, left):.1f}s", *plan.gpt, *given, *self.common("dtype", "seed")])

    def bundle(self, vqgan: str, gpt: Path) -> None:
        a = self.a
        guided = ["--guidance", str(GUIDANCE), "--top-p", str(TOP_P)]
        make_bundle.main([str(a.out), "--clip", a.clip, "--vqgan", vqgan, "--gpt", str(gpt),
                          "--trained-on", f"{self.plan.n_images} images of {Path(a.images).name}",
                          *guided])

    def evaluate(self, held: Images) -> dict:
        """Samples from the embeddings of held-out images, or of their captions, beside them."""
        a, folder = self.a, self.a.run / "held_out"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        indices, views = stack_views(held, self.plan.size, EVALUATED)
        for i, view in zip(indices, views, strict=True):
            to_image(view.float() / 255).save(folder / f"{i:06d}.png")
        flags = ["--images", str(folder), "--sheet", str(a.run / "sheet.png"), "--candidates", "1",
                 "--features", "clip"]
        texts = [held.captions(i)[0] for i in indices if held.captions(i)]
        if len(texts) > 1:
            (a.run / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
            flags += ["--prompts", str(a.run / "prompts.txt")]
        return evaluate.evaluate(evaluate.parse_arguments([str(a.out), *flags]))

    def write_card(self, result: dict) -> None:
        a, plan = self.a, self.plan
        plots, grids = {}, {}
        if (self.vqgan_run / "log.jsonl").is_file():
            curves = curves_of(self.vqgan_run, ("l1", "perceptual"))
            plots["vqgan"] = plot("VQGAN", curves)
            grids["copies"] = ("Held-out images and the VQGAN's copies of them",
                               Image.open(self.vqgan_run / "grid.png"))
        if (self.gpt_run / "log.jsonl").is_file():
            plots["gpt"] = plot("GPT, nats per code", curves_of(self.gpt_run, ("loss", "token_ce")))
        grids["samples"] = ("Samples beside the held-out images or captions they were made from",
                            Image.open(a.run / "sheet.png"))
        write_card(
            a.out, data={"images": a.images, "trained on": plan.n_images,
                         "held out": plan.n_held_out, "sha256 of the list": plan.fingerprint[:16]},
            command=f"python -m scripts.train {shlex.join(command_of(a))}",
            settings={"CLIP": a.clip, "VQGAN": " ".join(plan.vqgan), "GPT": " ".join(plan.gpt),
                      "precision": a.dtype, "seconds by stage":
                      ", ".join(f"{k} {v:.0f}" for k, v in plan.spent.items())},
            scores={k: v for k, v in result.items() if isinstance(v, float)},
            plots=plots, grids=grids)


def command_of(a: argparse.Namespace) -> list[str]:
    """The arguments that say what was done."""
    given = {"--clip": None if a.start_from else a.clip, "--size": a.size, "--from": a.start_from,
             "--captions": a.captions, "--time": f"{a.time:g}s"}
    flags = [text for name, value in given.items() if value for text in (name, str(value))]
    return [a.images, "--out", str(a.out), *flags, *(["--no-flip"] if a.no_flip else [])]


if __name__ == "__main__":
    runs.report(main())

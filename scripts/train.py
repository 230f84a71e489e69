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
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from clipgen.bundle import BundleError, load_bundle, refuse_other_files
from clipgen.pipeline import to_image
from scripts import encode_images, evaluate, make_bundle, train_gpt, train_vqgan
from scripts.data.captions import shown
from scripts.data.dataset import open_parts, refuse_inside, stack_views
from scripts.data.files import write_text
from scripts.data.images import Images, UnreadableImage
from scripts.data.shards import read_shards
from scripts.data.transforms import least_side
from scripts.evaluation.figures import curves_of, plot
from scripts.evaluation.report import write_card
from scripts.training import trainer
from scripts.training.cli import duration, positive, scale, seed, share, whole
from scripts.training.loading import load_clip, load_vqgan
from scripts.training.plan import new_sizes, sizes_of

# Shares of --time.  What the others leave over goes to the GPT, and at least its own share.
SHARES = {"vqgan": 0.5, "encode": 0.08, "gpt": 0.25, "evaluate": 0.08}
EVALUATED = 200  # held-out images that samples are compared with
MOST_CROPS, MOST_ENCODING = 16, 0.3  # views of an image; share of --time


@dataclass
class Plan:
    """What was settled when the run began; kept in plan.json, so that a rerun does the same."""

    command: list[str]
    arguments: dict  # those that make the result
    n_images: int
    n_held_out: int
    fingerprint: str
    size: int
    vqgan: list[str]  # flags of the stage
    gpt: list[str]
    seconds: float
    encode: list[str] | None = None  # flags, settled when the stage begins
    spent: dict[str, float] = field(default_factory=dict)  # seconds by stage
    result: dict | None = None  # of a finished run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="python -m scripts.train", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("images", help="folder, zip, tar, 'shards/{000..099}.tar', or coco:, imagenet:, googlecc: "
        "and a folder")
    add("--out", type=Path, required=True, help="the bundle to make, as in weights/mine")
    add("--clip", help="bundle, run of train_clip, or open_clip's ARCHITECTURE:PRETRAINED "
        "(default: that of --from, else ViT-B-32-quickgelu:openai)")
    add("--size", type=positive, help="pixels a side (default: that of --from, else what "
        "images and machine suggest)")
    add("--time", type=duration, default="2h", help="for all stages together (2h)")
    add("--from", dest="start_from", type=Path, metavar="BUNDLE", help="fine-tune this one")
    add("--tune", choices=("both", "gpt", "decoder"), default="both",
        help="of --from: VQGAN and GPT, the GPT alone, or the VQGAN's decoder alone")
    add("--captions", type=Path, help="NAME<TAB>caption lines or COCO's JSON: to measure with, "
        "never to train on")
    add("--held-out", type=share, default=0.05, help="share of images kept for measuring, at "
        "most 5,000 of them (0.05)")
    add("--scale", type=scale, default=0.85, help="least share of the side in a crop (0.85)")
    add("--no-flip", action="store_true", help="mirror no image")
    add("--dtype", choices=trainer.PRECISIONS, help="default: bfloat16 on CUDA where it has it")
    add("--workers", type=whole, help="processes that read images (default: by machine)")
    add("--run", type=Path, help="directory of the work (default: runs/ and the name of --out)")
    add("--seed", type=seed, default=0)
    a = p.parse_args(arguments)
    a.command = sys.argv[1:] if arguments is None else arguments
    a.run = a.run or Path("runs") / a.out.name
    cuda = torch.cuda.is_available()
    # Before compute capability 8 bfloat16 is emulated, and Triton compiles for none below 7.5.
    a.modern = cuda and torch.cuda.get_device_capability()[0] >= 8
    a.dtype = a.dtype or ("bfloat16" if a.modern else "float16" if cuda else "float32")
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
    accelerator = trainer.start(a.dtype, a.seed)
    try:
        images, held, fingerprint = open_parts(a.images, None, a.held_out, a.captions)
        plan = None
        if accelerator.is_main_process:
            plan = old_plan(a, fingerprint) or new_plan(a, accelerator, images, held, fingerprint)
        plan, = broadcast_object_list([plan])
    except (ValueError, BundleError) as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"{error.filename} cannot be used ({error.strerror}): give other --out "
                         "and --run directories") from None
    if plan.result and (a.out / "config.json").is_file():
        if accelerator.is_main_process:
            print(f"{a.out} is finished: nothing to do", file=sys.stderr)
        return plan.result
    if accelerator.is_main_process:
        describe(a, accelerator, plan)
    try:
        return Stages(a, accelerator, plan, began).run(images, held)
    except OSError as error:
        raise SystemExit(f"{error.filename or a.run} cannot be used ({error.strerror or error}): "
                         "mend that, and the same command goes on") from None


def settings_of(a: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(a).items()
            if name not in ("run", "workers", "time", "images", "command", "modern")}


def old_plan(a: argparse.Namespace, fingerprint: str) -> Plan | None:
    """The plan of an earlier start of this run.  ValueError: it was of something else."""
    path, settings = a.run / "plan.json", settings_of(a)
    if not path.is_file():
        return None
    try:
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: give another --run directory") from None
    changed = sorted(k for k in settings if settings[k] != plan.arguments.get(k))
    if changed:
        raise ValueError(f"{a.run} holds a run with other arguments ({', '.join(changed)}): give "
                         "those again, or another --run directory")
    if plan.fingerprint != fingerprint:
        raise ValueError(f"{a.run} was begun with other images than {a.images} holds now: give "
                         "another --run directory")
    if plan.seconds != a.time:
        print(f"this run was begun with {plan.seconds / 60:g} minutes, and keeps to them",
              file=sys.stderr)
    return plan


def new_plan(a: argparse.Namespace, accelerator: Accelerator, images: Images, held: Images,
             fingerprint: str) -> Plan:
    """ValueError: directories that hold other things, a size that cannot be."""
    if (a.out / "config.json").exists():
        raise ValueError(f"{a.out} holds a bundle already: give another --out, or delete it")
    if a.out.is_dir():
        refuse_other_files(a.out)
    if a.run.is_dir() and any(a.run.iterdir()):
        raise ValueError(f"{a.run} holds other things: give another --run directory")
    refuse_inside(a.images, out=a.out, run=a.run)
    cuda = accelerator.device.type == "cuda"
    size, vqgan, gpt = (sizes_of(a.start_from, a.size, cuda) if a.start_from
                        else new_sizes(images, a.size, cuda, a.time))
    load_clip(a.clip)  # better now than after the first stage
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.run.mkdir(parents=True, exist_ok=True)
    plan = Plan(a.command, settings_of(a), len(images), len(held), fingerprint, size, vqgan,
                gpt + (["--compile"] if a.modern else []), a.time)
    write_text(a.run / "plan.json", json.dumps(asdict(plan), indent=1))
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
        self.new = a.start_from is None
        self.vqgan = str(self.vqgan_run) if self.new or a.tune != "gpt" else str(a.start_from)
        self.gpt = self.gpt_run if self.new or a.tune != "decoder" else a.start_from

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what a stage takes to the plan, also where it is interrupted."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # a full disk has been told of
                self.spend(stage)
            raise
        self.spend(stage)

    def spend(self, stage: str) -> None:
        now = time.time()
        self.plan.spent[stage] = self.plan.spent.get(stage, 0.0) + now - self.mark
        self.mark = now
        self.keep_plan()

    def keep_plan(self) -> None:
        if self.accelerator.is_main_process:
            write_text(self.a.run / "plan.json",
                                   json.dumps(asdict(self.plan), indent=1))

    def run(self, images: Images, held: Images) -> dict:
        a, plan = self.a, self.plan
        result = {"bundle": str(a.out), "n_images": plan.n_images, "n_held_out": plan.n_held_out}
        if self.vqgan == str(self.vqgan_run):
            with self.timed("vqgan"):
                scores = self.train_vqgan()
            result |= {k: scores[k] for k in ("psnr_db", "ssim")}
        if self.gpt == self.gpt_run:
            with self.timed("encode"):
                self.encode(images)
            with self.timed("gpt"):
                scores = self.train_gpt()
            result |= {k: scores[k] for k in ("token_ce", "unigram_ce", "token_ce_text", "text_gap")
                       if k in scores}
            counts = sum(read_shards(self.shards, part).code_counts()
                         for part in ("train", "validation"))
            result["codebook_usage"] = round((counts > 0).float().mean().item(), 4)
        if self.accelerator.is_main_process:
            with self.timed("evaluate"):
                self.bundle()
                result |= self.evaluate(held)
            result["seconds"] = round(sum(plan.spent.values()), 1)
            self.write_card(result)
            plan.result = result
            self.keep_plan()
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
        share = 1 - SHARES["evaluate"] if a.tune == "decoder" else SHARES["vqgan"]
        seconds = max(10.0, share * plan.seconds - (time.time() - self.mark))
        given = []
        if a.start_from:
            given = ["--decoder-of" if a.tune == "decoder" else "--from", str(a.start_from)]
        return train_vqgan.main([
            a.images, "--run", str(self.vqgan_run), "--clip", a.clip, "--time", f"{seconds:.1f}s",
            *plan.vqgan, *given, *self.common("dtype", "seed", "workers", "held_out", "crop")])

    def encode(self, images: Images) -> None:
        a, plan = self.a, self.plan
        if plan.encode is None:
            plan.encode, = broadcast_object_list([self.views(images)])
            self.keep_plan()
        captions = ["--captions", str(a.captions)] if a.captions else []
        encode_images.main([
            a.images, str(self.shards), "--clip", a.clip, "--vqgan", self.vqgan, *plan.encode,
            *captions, *self.common("seed", "workers", "held_out", "crop")])

    def views(self, images: Images) -> list[str]:
        """How many crops of how many images can be encoded in the time, from the speed of a few."""
        a, plan, device = self.a, self.plan, self.accelerator.device
        clip, vqgan = load_clip(self.a.clip).to(device), load_vqgan(self.vqgan).to(device)
        pixels = torch.rand(8, 3, plan.size, plan.size, device=device)
        for _ in range(2):  # the first time is slow
            began = time.time()
            vqgan.encode(pixels).cpu(), clip.embed_pixels(pixels).cpu()
        processes = self.accelerator.num_processes
        crop = (time.time() - began) / len(pixels) / processes  # seconds of one
        few = range(0, len(images), -(-len(images) // 8))
        began = time.time()
        for i in few:
            with suppress(UnreadableImage):
                images.image(i, least_side(plan.size, a.scale))
        reading = (time.time() - began) / len(few) / processes / max(1, a.workers)
        crops = int((SHARES["encode"] * plan.seconds / plan.n_images - reading) / crop)
        most = max(64, int(MOST_ENCODING * plan.seconds / (reading + crop)))
        if most >= plan.n_images:
            return ["--crops", str(max(1, min(MOST_CROPS, crops)))]
        if self.accelerator.is_main_process:
            print(f"encoding {most} of {plan.n_images} images, at {1 / (reading + crop):.1f} a "
                  "second there is no time for more", file=sys.stderr)
        return ["--crops", "1", "--limit", str(most)]

    def train_gpt(self) -> dict:
        a, plan = self.a, self.plan
        left = (1 - SHARES["evaluate"]) * plan.seconds - sum(plan.spent.values())
        least = SHARES["gpt"] * plan.seconds
        if left < least and self.accelerator.is_main_process:
            print(f"the stages before took longer than planned, so the whole takes about "
                  f"{(least - left) / 60:.0f} min more than it should", file=sys.stderr)
        given = ["--from", str(a.start_from)] if a.start_from else []
        return train_gpt.main([
            str(self.shards), "--run", str(self.gpt_run), "--vqgan", self.vqgan, "--time",
            f"{max(10.0, left, least):.1f}s", *plan.gpt, *given, *self.common("dtype", "seed")])

    def bundle(self) -> None:
        """A bundle that was fine-tuned keeps its own sampling settings."""
        a, settings = self.a, {}
        if not self.new:
            settings = asdict(load_bundle(a.start_from).sampling)
        make_bundle.main([
            str(a.out), "--clip", a.clip, "--vqgan", self.vqgan, "--gpt", str(self.gpt), "--force",
            "--trained-on", shown(f"{self.plan.n_images} images of {Path(a.images).name}"),
            *(text for name, value in settings.items()
              for text in (f"--{name.replace('_', '-')}", str(value)))])

    def evaluate(self, held: Images) -> dict:
        """Samples from the embeddings of held-out images, or of their captions, beside them."""
        a = self.a
        indices, views = stack_views(held, self.plan.size, EVALUATED)
        if len(indices) < 2:
            print("one held-out image is too few to compare samples with", file=sys.stderr)
            return {}
        with tempfile.TemporaryDirectory() as folder:
            for i, view in zip(indices, views, strict=True):
                to_image(view.float() / 255).save(Path(folder, f"{i:06d}.png"))
            flags = ["--images", folder, "--sheet", str(a.run / "sheet.png"), "--candidates", "1",
                     "--features", "clip"]
            texts = [held.captions(i)[0] for i in indices if held.captions(i)]
            if len(texts) > 1:
                prompts = a.run / "prompts.txt"
                prompts.write_text("\n".join(texts) + "\n", encoding="utf-8")
                flags += ["--prompts", str(prompts)]
            scores = evaluate.evaluate(evaluate.parse_arguments([str(a.out), *flags]))
        names = ("clip_score", "clip_i", "retrieval_r1", "frechet_distance", "features", "n_real",
                 "n_generated", "independent", "seconds_per_image")
        return {k: scores[k] for k in names if scores.get(k) is not None}

    def write_card(self, result: dict) -> None:
        """The model card, unless somebody has written one."""
        a, plan = self.a, self.plan
        if (a.out / "README.md").exists():
            return
        plots, grids = {}, {}
        if (self.vqgan_run / "log.jsonl").is_file():
            plots["vqgan"] = plot("VQGAN", curves_of(self.vqgan_run, ("l1", "perceptual")))
            grids["copies"] = ("Held-out images and the VQGAN's copies of them",
                               Image.open(self.vqgan_run / "grid.png"))
        if (self.gpt_run / "log.jsonl").is_file():
            plots["gpt"] = plot("GPT, nats per code", curves_of(self.gpt_run, ("loss", "token_ce")))
        if (a.run / "sheet.png").is_file():
            grids["samples"] = ("Samples, with what each was made from",
                                Image.open(a.run / "sheet.png"))
        write_card(
            a.out, data={"images": shown(a.images), "trained on": plan.n_images,
                         "held out": plan.n_held_out, "sha256 of the list": plan.fingerprint[:16]},
            command=shown(f"python -m scripts.train {shlex.join(plan.command)}"),
            settings={"CLIP": a.clip, "VQGAN": " ".join(plan.vqgan), "GPT": " ".join(plan.gpt),
                      "precision": a.dtype, "seconds by stage":
                      ", ".join(f"{k} {v:.0f}" for k, v in plan.spent.items())},
            scores={k: v for k, v in result.items() if k not in ("bundle", "n_images",
                                                                "n_held_out")},
            plots=plots, grids=grids)


if __name__ == "__main__":
    trainer.report(main())

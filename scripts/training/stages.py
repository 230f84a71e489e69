"""The stages of `scripts.train` in order: VQGAN, codes and embeddings, GPT, bundle, evaluation.

Each is what a command of its own does and goes on where it was stopped.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from PIL import Image

from clipgen.bundle import load_bundle
from clipgen.pipeline import to_image
from scripts.data.captions import shown
from scripts.data.dataset import stack_views
from scripts.data.files import write_text
from scripts.data.images import Images, UnreadableImage
from scripts.data.reading import ReadingSettings
from scripts.data.shards import read_shards
from scripts.data.transforms import least_side
from scripts.evaluation.figures import curves_of, plot
from scripts.evaluation.report import write_card
from scripts.evaluation.scores import EvaluationSettings, evaluate, load_model, save_sheet
from scripts.training.bundling import BundleSettings, make_bundle
from scripts.training.cli import duration, positive, scale, seed, setting, share, whole
from scripts.training.encoding import EncodeSettings, encode_images
from scripts.training.gpt import GPTSettings, train_gpt
from scripts.training.loading import load_clip, load_vqgan
from scripts.training.settings import PRECISIONS
from scripts.training.trainer import start
from scripts.training.verdict import verdict
from scripts.training.vqgan import VQGANSettings, train_vqgan

# Shares of --time.  What the others leave over goes to the GPT, and at least its own share.
SHARES = {"vqgan": 0.5, "encode": 0.08, "gpt": 0.25, "evaluate": 0.08}
EVALUATED = 200  # held-out images that samples are compared with
MOST_CROPS, MOST_ENCODING = 16, 0.3  # views of an image; share of --time
STAGES = {"vqgan": VQGANSettings, "encode": EncodeSettings, "gpt": GPTSettings}
# Settings of stages that follow from those of the whole.
SETTLED = {"run", "out", "shards", "vqgan", "clip", "start_from", "decoder_of", "images", "size",
           "time", "captions", "held_out", "scale", "flip", "dtype", "workers", "seed", "anyway",
           *(each.name for each in fields(ReadingSettings))}


@dataclass(kw_only=True)
class TrainSettings(ReadingSettings):
    """Settings of `scripts.train`; those of a stage are given as in --gpt.batch 4."""

    images: str = setting(help="folder, zip, tar, 'shards/{000..099}.tar', or coco:, imagenet:, "
                          "googlecc: and a folder", positional=True, free=True)
    out: Path = setting(help="the bundle to make, as in weights/mine", type=Path)
    clip: str | None = setting(None, "bundle, run of train_clip, or open_clip's "
                               "ARCHITECTURE:PRETRAINED (default: that of --from, else "
                               "ViT-B-32-quickgelu:openai)")
    size: int | None = setting(None, "pixels a side (default: that of --from, else what images and "
                               "machine suggest)", type=positive)
    time: float = setting(7200.0, "for all stages together", type=duration, free=True)
    start_from: Path | None = setting(None, "fine-tune this one", type=Path, flag="from",
                                      metavar="BUNDLE")
    tune: str = setting("both", "of --from: VQGAN and GPT, the GPT alone, or the VQGAN's decoder "
                        "alone", choices=("both", "gpt", "decoder"))
    captions: Path | None = setting(None, "NAME<TAB>caption lines or COCO's JSON: to measure with, "
                                    "never to train on", type=Path)
    held_out: float = setting(0.05, "share of images kept for measuring, at most 5,000 of them",
                              type=share)
    scale: float = setting(0.85, "least share of the side in a crop", type=scale)
    flip: bool = setting(True, "mirror no image")
    dtype: str | None = setting(None, "default: bfloat16 on CUDA where it has it",
                                choices=PRECISIONS)
    workers: int | None = setting(None, "processes that read images (default: by machine)",
                                  type=whole, free=True)
    run: Path | None = setting(None, "directory of the work (default: runs/ and the name of --out)",
                               type=Path, free=True)
    seed: int = setting(0, type=seed)
    anyway: bool = setting(False, "train also where --time is too short to be of use", free=True)


@dataclass
class Plan:
    """What was settled when the run began; kept in plan.json, so that a rerun does the same."""

    command: list[str]
    settings: dict[str, Any]  # those that make the result
    n_images: int
    n_held_out: int
    fingerprint: str
    size: int
    vqgan: dict[str, Any]  # settings of the stage
    gpt: dict[str, Any]
    seconds: float
    encode: dict[str, Any] | None = None  # settled when the stage begins
    spent: dict[str, float] = field(default_factory=dict)  # seconds by stage
    steps: dict[str, int] = field(default_factory=dict)  # that the trainings took
    caveats: list[str] = field(default_factory=list)  # what was said on the way
    result: dict | None = None  # of a finished run


def as_flags(settings: dict[str, Any]) -> str:
    """Settings as they would be typed."""
    return " ".join(f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
                    + ("" if isinstance(value, bool) else f" {value}")
                    for name, value in settings.items())


def public(word: str) -> str:
    """A word of a command without the folders of this machine."""
    before, equals, value = word.rpartition("=")
    return before + equals + (Path(value).name if Path(value).is_absolute() else value)


class Stages:
    """The stages in order; `given` holds by stage the settings that the user gave for it."""

    def __init__(self, settings: TrainSettings, accelerator: Accelerator, plan: Plan, began: float,
                 given: dict[str, dict[str, Any]]):
        self.settings, self.accelerator, self.plan, self.given = settings, accelerator, plan, given
        self.mark = began
        self.vqgan_run, self.gpt_run, self.shards = (
            settings.run / name for name in ("vqgan", "gpt", "shards"))
        source, tune = settings.start_from, settings.tune
        self.new = source is None
        self.vqgan = str(self.vqgan_run) if self.new or tune != "gpt" else str(source)
        self.gpt = self.gpt_run if self.new or tune != "decoder" else source

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what a stage takes to the plan, also where it is interrupted."""
        try:
            yield
        except BaseException as error:
            with suppress(OSError):  # a full disk has been told of
                self.spend(stage)
            for kind in (ValueError, FloatingPointError, MemoryError):
                if isinstance(error, kind):
                    raise kind(self.as_given_here(stage, str(error))) from error
            raise
        self.spend(stage)

    def as_given_here(self, stage: str, sentence: str) -> str:
        """A stage's error with the flags that it names as this command takes them: --lr is
        --gpt.lr."""
        own = {each.name.replace("_", "-") for each in fields(STAGES[stage])
               if each.name not in SETTLED} if stage in STAGES else set()
        return re.sub(r"--([a-z][a-z-]*)", lambda m: f"--{stage}.{m[1]}" if m[1] in own else m[0],
                      sentence)

    def spend(self, stage: str) -> None:
        now = time.time()
        self.plan.spent[stage] = self.plan.spent.get(stage, 0.0) + now - self.mark
        self.mark = now
        self.keep_plan()

    def keep_plan(self) -> None:
        if self.accelerator.is_main_process:
            write_text(self.settings.run / "plan.json", json.dumps(asdict(self.plan), indent=1))

    def say(self, caveat: str) -> None:
        """On the terminal, and later in the model card."""
        print(caveat, file=sys.stderr)
        if caveat not in self.plan.caveats:
            self.plan.caveats.append(caveat)

    def run(self, images: Images, held: Images) -> dict:
        s, plan = self.settings, self.plan
        result = {"bundle": str(s.out), "n_images": plan.n_images, "n_held_out": plan.n_held_out}
        if self.vqgan == str(self.vqgan_run):
            with self.timed("vqgan"):
                scores = self.train_vqgan()
                plan.steps["vqgan"] = scores["steps"]
            result |= {k: scores[k] for k in ("psnr_db", "ssim")}
        if self.gpt == self.gpt_run:
            with self.timed("encode"):
                self.encode(images)
            with self.timed("gpt"):
                scores = self.train_gpt()
                plan.steps["gpt"] = scores["steps"]
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
            result["verdict"] = verdict(result, plan.steps, plan.seconds)
            print(result["verdict"], file=sys.stderr)
            self.write_card(result)
            plan.result = result
            self.keep_plan()
        self.accelerator.wait_for_everyone()
        return result

    def settle(self, stage: str, **own: Any) -> Any:
        """The settings of a stage: what it takes of this command's, its own, the user's for it."""
        kind, mine = STAGES[stage], vars(self.settings)
        shared = {each.name: mine[each.name] for each in fields(kind)
                  if each.name in SETTLED & mine.keys() - {"run", "out", "start_from", "size",
                                                           "time"}}
        given = self.given.get(stage, {})
        if "steps" in given:
            own["time"] = None
        return kind(**shared | own | given)

    def train_vqgan(self) -> dict[str, Any]:
        plan, s = self.plan, self.settings
        share = 1 - SHARES["evaluate"] if s.tune == "decoder" else SHARES["vqgan"]
        seconds = max(10.0, share * plan.seconds - (time.time() - self.mark))
        source = {"decoder_of" if s.tune == "decoder" else "start_from":
                  s.start_from and str(s.start_from)}
        return train_vqgan(self.settle("vqgan", run=self.vqgan_run, time=round(seconds, 1),
                                       **plan.vqgan, **source), start(s.dtype, s.seed))

    def encode(self, images: Images) -> None:
        plan = self.plan
        if plan.encode is None:
            plan.encode, = broadcast_object_list([self.views(images)])
            self.keep_plan()
        encode_images(self.settle("encode", out=self.shards, vqgan=self.vqgan, **plan.encode))

    def views(self, images: Images) -> dict[str, int]:
        """How many crops of how many images can be encoded in the time, from the speed of a few."""
        s, plan, device = self.settings, self.plan, self.accelerator.device
        clip, vqgan = load_clip(s.clip).to(device), load_vqgan(self.vqgan).to(device)
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
                images.image(i, least_side(plan.size, s.scale))
        reading = (time.time() - began) / len(few) / processes / max(1, s.workers)
        crops = int((SHARES["encode"] * plan.seconds / plan.n_images - reading) / crop)
        most = max(64, int(MOST_ENCODING * plan.seconds / (reading + crop)))
        if most >= plan.n_images:
            return {"crops": max(1, min(MOST_CROPS, crops))}
        if self.accelerator.is_main_process:
            self.say(f"encoding {most} of {plan.n_images} images, at {1 / (reading + crop):.1f} a "
                     "second there is no time for more")
        return {"crops": 1, "limit": most}

    def train_gpt(self) -> dict[str, float]:
        s, plan = self.settings, self.plan
        before = sum(spent for stage, spent in plan.spent.items() if stage != "gpt")
        left = (1 - SHARES["evaluate"]) * plan.seconds - before
        least = SHARES["gpt"] * plan.seconds
        if left < least and self.accelerator.is_main_process:
            self.say("the stages before took longer than planned, so the whole takes about "
                     f"{(least - left) / 60:.0f} min more than it should")
        return train_gpt(self.settle(
            "gpt", shards=self.shards, run=self.gpt_run, vqgan=self.vqgan,
            time=round(max(10.0, left, least), 1), **plan.gpt,
            start_from=s.start_from and str(s.start_from)), start(s.dtype, s.seed))

    def bundle(self) -> None:
        """A bundle that was fine-tuned keeps its own sampling settings."""
        s = self.settings
        sampling = {} if self.new else asdict(load_bundle(s.start_from).sampling)
        make_bundle(BundleSettings(
            out=s.out, clip=s.clip, vqgan=self.vqgan, gpt=self.gpt, force=True, **sampling,
            trained_on=shown(f"{self.plan.n_images} images of {Path(s.images).name}")))

    def evaluate(self, held: Images) -> dict:
        """Samples from the embeddings of held-out images, or of their captions, beside them."""
        s = self.settings
        indices, views = stack_views(held, self.plan.size, EVALUATED)
        if len(indices) < 2:
            self.say("one held-out image is too few to compare samples with")
            return {}
        texts = [held.captions(i)[0] for i in indices if held.captions(i)]
        with tempfile.TemporaryDirectory() as folder:
            for i, view in zip(indices, views, strict=True):
                to_image(view.float() / 255).save(Path(folder, f"{i:06d}.png"))
            evaluation = EvaluationSettings(bundle=s.out, images=folder, candidates=1,
                                            features="clip")
            found = evaluate(evaluation, load_model(evaluation), texts if len(texts) > 1 else [])
        save_sheet(s.run / "sheet.png", found, texts if len(texts) > 1 else [])
        scores = found.result
        names = ("clip_score", "clip_i", "retrieval_r1", "frechet_distance", "features", "n_real",
                 "n_generated", "independent", "seconds_per_image")
        return {k: scores[k] for k in names if scores.get(k) is not None}

    def write_card(self, result: dict) -> None:
        """The model card, unless somebody has written one."""
        s, plan = self.settings, self.plan
        if (s.out / "README.md").exists():
            return
        plots, grids = {}, {}
        if (self.vqgan_run / "log.jsonl").is_file():
            plots["vqgan"] = plot("VQGAN", curves_of(self.vqgan_run, ("l1", "perceptual")))
            grids["copies"] = ("Held-out images and the VQGAN's copies of them",
                               Image.open(self.vqgan_run / "grid.png"))
        if (self.gpt_run / "log.jsonl").is_file():
            plots["gpt"] = plot("GPT, nats per code", curves_of(self.gpt_run, ("loss", "token_ce")))
        if (s.run / "sheet.png").is_file():
            grids["samples"] = ("Samples, with what each was made from",
                                Image.open(s.run / "sheet.png"))
        write_card(
            s.out, notes=[result["verdict"], *plan.caveats],
            data={"images": shown(Path(s.images).name), "trained on": plan.n_images,
                         "held out": plan.n_held_out, "sha256 of the list": plan.fingerprint[:16]},
            command=shown("python -m scripts.train "
                          + shlex.join(public(word) for word in plan.command)),
            settings={"CLIP": public(s.clip), "VQGAN": as_flags(plan.vqgan),
                      "GPT": as_flags(plan.gpt), "precision": s.dtype, "seconds by stage":
                      ", ".join(f"{k} {v:.0f}" for k, v in plan.spent.items())},
            scores=result, plots=plots, grids=grids)

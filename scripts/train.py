"""From a folder of images without captions to a bundle ready to host, in one command.

    python -m scripts.train IMAGES --out weights/mine --clip weights/emoji --size 64 --time 20m
    python -m scripts.train IMAGES --out weights/mine --from weights/coco --time 2h
    accelerate launch -m scripts.train ...      on several devices

Looks at the images and the machine, prints a plan, then: VQGAN, codes and embeddings, GPT, bundle,
evaluation.  Stop it at any moment: the same command goes on from there.  Every stage is a command
of its own too (scripts.train_vqgan, encode_images, train_gpt, make_bundle, evaluate), and what they
print and keep is in --run.  A stage takes its own settings with its name before them:
--vqgan.lr 1e-4, --encode.crops 2, --gpt.batch 16; each command's --help lists them.

The last line of stdout is JSON, on images that were not trained on: `psnr_db`, `token_ce` and
`unigram_ce`, nats per code; `codebook_usage` is the share of codes that occur in any image.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from clipgen.bundle import refuse_other_files
from scripts.data.dataset import open_parts, refuse_inside
from scripts.data.files import write_text
from scripts.data.images import Images
from scripts.training.cli import add_settings, given_with, one_sentence, settings_of
from scripts.training.loading import load_clip
from scripts.training.plan import new_sizes, sizes_of
from scripts.training.run_directory import report
from scripts.training.settings import identity, require_same
from scripts.training.stages import SETTLED, STAGES, Plan, Stages, TrainSettings, as_flags
from scripts.training.trainer import start


def parse(arguments: list[str] | None) -> tuple[TrainSettings, dict[str, dict]]:
    """The settings of the whole, and by stage those that were given for it."""
    p = argparse.ArgumentParser(prog="python -m scripts.train", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add_settings(p, TrainSettings)
    for stage, kind in STAGES.items():
        add_settings(p, kind, f"{stage}.", without=SETTLED)
    a = p.parse_args(arguments)
    settings = settings_of(TrainSettings, a)
    if settings.start_from and settings.clip:
        p.error(f"--from {settings.start_from} brings its own CLIP: leave --clip out")
    if settings.tune != "both" and not settings.start_from:
        p.error(f"--tune {settings.tune} goes with --from BUNDLE")
    return settings, {stage: given_with(f"{stage}.", a) for stage in STAGES}


def fill_in(settings: TrainSettings) -> None:
    """What was not given, by machine and bundle."""
    cuda = torch.cuda.is_available()
    settings.run = settings.run or Path("runs") / settings.out.name
    settings.clip = settings.clip or str(settings.start_from or "ViT-B-32-quickgelu:openai")
    settings.dtype = settings.dtype or ("bfloat16" if is_modern() else "float16" if cuda
                                        else "float32")
    if settings.workers is None:
        settings.workers = min(8, (os.cpu_count() or 2) // 2) if cuda else 0


def is_modern() -> bool:
    """Before compute capability 8 bfloat16 is emulated, and Triton compiles for none below 7.5."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8


def main(arguments: list[str] | None = None) -> dict:
    began = time.time()
    settings, given = parse(arguments)
    fill_in(settings)
    with one_sentence():
        accelerator = start(settings.dtype, settings.seed)
        return train(settings, given, accelerator, began,
                     sys.argv[1:] if arguments is None else arguments)


def train(settings: TrainSettings, given: dict[str, dict], accelerator: Accelerator, began: float,
          command: list[str]) -> dict:
    """Plan, or take up the plan of an earlier start, and go through the stages."""
    images, held, fingerprint = open_parts(settings.images, None, settings.held_out,
                                           settings.captions, settings.reading)
    plan = None
    try:
        if accelerator.is_main_process:
            plan = old_plan(settings, fingerprint) or new_plan(settings, accelerator, images, held,
                                                               fingerprint, command)
    except OSError as error:
        raise OSError(f"{error.filename} cannot be used ({error.strerror}): give other --out and "
                      "--run directories") from None
    plan, = broadcast_object_list([plan])
    if plan.result and (settings.out / "config.json").is_file():
        if accelerator.is_main_process:
            print(f"{settings.out} is finished: nothing to do", file=sys.stderr)
        return plan.result
    if accelerator.is_main_process:
        describe(settings, accelerator, plan, given)
    try:
        return Stages(settings, accelerator, plan, began, given).run(images, held)
    except OSError as error:
        if not error.strerror:  # a sentence already
            raise
        raise OSError(f"{error.filename or settings.run} cannot be used ({error.strerror}): mend "
                      "that, and the same command goes on") from None


def old_plan(settings: TrainSettings, fingerprint: str) -> Plan | None:
    """The plan of an earlier start of this run.  ValueError: it was of something else."""
    path = settings.run / "plan.json"
    if not path.is_file():
        return None
    try:
        plan = Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged: give another --run directory") from None
    require_same(settings.run, plan.settings, identity(settings))
    if plan.fingerprint != fingerprint:
        raise ValueError(f"{settings.run} was begun with other images than {settings.images} holds "
                         "now: give another --run directory")
    if plan.seconds != settings.time:
        print(f"this run was begun with {plan.seconds / 60:g} minutes, and has "
              f"{settings.time / 60:g} now", file=sys.stderr)
        plan.seconds = settings.time
    return plan


def new_plan(settings: TrainSettings, accelerator: Accelerator, images: Images, held: Images,
             fingerprint: str, command: list[str]) -> Plan:
    """ValueError: directories that hold other things, a size that cannot be."""
    out, run = settings.out, settings.run
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a bundle already: give another --out, or delete it")
    if out.is_dir():
        refuse_other_files(out)
    if run.is_dir() and any(run.iterdir()):
        raise ValueError(f"{run} holds other things: give another --run directory")
    refuse_inside(settings.images, out=out, run=run)
    cuda = accelerator.device.type == "cuda"
    size, vqgan, gpt = (sizes_of(settings.start_from, settings.size, cuda) if settings.start_from
                        else new_sizes(images, settings.size, cuda, settings.time))
    if is_modern():
        gpt["compile"] = True
    load_clip(settings.clip)  # better now than after the first stage
    out.parent.mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    plan = Plan(command, identity(settings), len(images), len(held), fingerprint, size, vqgan, gpt,
                settings.time)
    write_text(run / "plan.json", json.dumps(asdict(plan), indent=1))
    return plan


def describe(settings: TrainSettings, accelerator: Accelerator, plan: Plan,
             given: dict[str, dict]) -> None:
    """The plan on stderr."""
    device = accelerator.device
    machine = (torch.cuda.get_device_name(device) if device.type == "cuda"
               else f"CPU, {os.cpu_count()} cores")
    free = f"{shutil.disk_usage(settings.run).free / 1e9:.0f} GB of disk"
    memory = (torch.cuda.mem_get_info(device)[1] if device.type == "cuda"
              else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 1e9
    print(f"""images   {settings.images}: {plan.n_images} to train on, {plan.n_held_out} held out
machine  {accelerator.num_processes} x {machine}, {memory:.0f} GB of memory, {free} free
VQGAN    {plan.size} x {plan.size} pixels, {as_flags(plan.vqgan | given["vqgan"])}
GPT      {as_flags(plan.gpt | given["gpt"])}
time     {plan.seconds / 60:.0f} min; each stage measures its speed and prints its steps
work in  {settings.run}, bundle in {settings.out}; stop at any moment, the same command goes on""",
          file=sys.stderr)


if __name__ == "__main__":
    report(main())
